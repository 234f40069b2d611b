"""What the commands print: one function a table. Names go in as `Text`: rich takes "[dB]" in a string for markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cpd.errors import some
from cpd.tasks.metric import title, written

if TYPE_CHECKING:
    from cpd.coupling.branches import Branch
    from cpd.coupling.cost import FrozenShare
    from cpd.deploy.latency import LatencyTable
    from cpd.deploy.model_profile import ModelProfile
    from cpd.jobs.sensitivity import Sensitivity
    from cpd.jobs.sweep import Sweep
    from cpd.report.report import Report

MEMBERS_SHOWN = 3
PLACES_SHOWN = 2
LAYERS_SHOWN = 40
_TIMES = ("ms", "share", "at half of every width")


def sensitivity_table(found: Sensitivity) -> Table:
    """A row a group, a column a ratio: the loss, or the metric where there is one."""
    name = found.shown
    table = Table(title=Text(f"{found.heading('now')}, when a group alone loses this share", "table.title"))
    table.add_column("group")
    table.add_column("size", justify="right")
    for ratio in sorted({point.ratio for point in found.points}):
        table.add_column(f"{ratio:.0%}", justify="right")
    for points in found.by_group.values():
        table.add_row(Text(points[0].label), str(points[0].size), *(f"{getattr(point, name):.3g}" for point in points))
    return table


def latency_table(found: LatencyTable) -> Table:
    """One row a model and runtime; ratios are against the first."""
    table = Table(title=f"{found.runs} rounds, {found.threads} thread(s), {found.samples} sample(s) a run")
    several = len({row.runtime for row in found.rows}) > 1
    table.add_column("model", overflow="fold")
    if several:
        table.add_column("runtime")
    for column in ("median ms", "p90 ms", "speed-up", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        figures = (f"{row.median_ms:.3g}", f"{row.p90_ms:.3g}", f"{row.speedup:.2f}")
        interval = f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"
        table.add_row(Text(row.name), *([Text(row.runtime)] if several else []), *figures, interval)
    return table


def layer_times_table(found: ModelProfile) -> Table:
    """Where the time goes, by layer, the most costly first, and in all."""
    table = Table(title=f"{found.total_ms:.3g} ms in {found.runtime}, {found.threads} thread(s)")
    table.add_column("layer", overflow="fold")
    table.add_column("operator", overflow="fold")
    for column in _TIMES:
        table.add_column(column, justify="right")
    for row in found.layers[:LAYERS_SHOWN]:
        table.add_row(Text(row.name or "(other)"), Text(row.op), *_times(found, row.ms, row.half_ms))
    if rest := found.layers[LAYERS_SHOWN:]:
        ms, half = sum(row.ms for row in rest), sum(row.half_ms for row in rest)
        table.add_row(f"({len(rest)} more)", "", *_times(found, ms, half), style="dim")
    table.add_section()
    table.add_row("total", "", *_times(found, found.total_ms, sum(row.half_ms for row in found.layers)))
    return table


def operator_times_table(found: ModelProfile) -> Table:
    """Where the time goes, by operator, and in all."""
    table = Table()
    table.add_column("operator", overflow="fold")
    for column in ("nodes", *_TIMES):
        table.add_column(column, justify="right")
    for row in found.operators:
        table.add_row(Text(row.op), str(row.nodes), *_times(found, row.ms, row.half_ms))
    nodes, half = sum(row.nodes for row in found.operators), sum(row.half_ms for row in found.operators)
    table.add_section()
    table.add_row("total", str(nodes), *_times(found, found.total_ms, half))
    return table


def _times(found: ModelProfile, ms: float, half_ms: float) -> tuple[str, str, str]:
    return f"{ms:.3g}", f"{ms / found.total_ms:.1%}" if found.total_ms else "", f"{half_ms:.3g}"


def sweep_table(found: Sweep) -> Table:
    """One row a speed-up."""
    table = Table()
    for column in ("asked", "measured", "ms", "MACs left", "parameters left", title(found.metric_name)):
        table.add_column(Text(column), justify="right")
    if (whole := found.original) is not None:
        table.add_row("original", "1", f"{whole.latency_ms or 0:.3g}", "100%", "100%", _metric(found, whole.metric))
    for point in found.points:
        if (figures := point.figures) is None or whole is None:
            table.add_row(f"{point.asked:g}", "out of reach", "", "", "", "")
            continue
        table.add_row(
            f"{point.asked:g}", f"{point.speedup:.2f}", f"{figures.latency_ms:.3g}",
            f"{figures.macs / max(whole.macs, 1):.1%}", f"{figures.parameters / max(whole.parameters, 1):.1%}",
            _metric(found, figures.metric),
        )  # fmt: skip
    return table


def _metric(found: Sweep, value: float | None) -> str:
    return "-" if value is None else written(found.metric_name, value)


def figures_table(report: Report) -> Table:
    """Original and result side by side."""
    faster = None if report.speedup is None else f"{report.speedup:.2f}× faster, measured"
    table = Table(title=faster if report.zeros is None else f"{100 * report.zeros:.1f} % of the weights are zero")
    table.add_column("")
    for column in ("original", "compressed", "change"):
        table.add_column(column, justify="right")
    for row in report.figure_rows:
        table.add_row(*map(Text, row))
    return table


def tried_table(report: Report) -> Table:
    """One row a speed-up that was tried for `max_drop`."""
    table = Table(title="Speeds that were tried", title_justify="left")
    for column in ("asked", "measured", "MACs left", "trained", title(report.metric_name), "loses", "at most", "holds"):
        table.add_column(Text(column), justify="right")
    for row in report.tried:
        if row["error"] is not None:
            table.add_row(f"{row['asked']:.2f}", "out of reach")
            continue
        table.add_row(
            f"{row['asked']:.2f}", "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
            f"{row['macs_left']:.1%}", "yes" if row["trained"] else "no", written(report.metric_name, row["metric"]),
            f"{row['drop']:.3g}", "-" if row["upper"] is None else f"{row['upper']:.3g}",
            "yes" if row["holds"] else "no",
        )  # fmt: skip
    return table


def groups_table(groups: Sequence[Any]) -> Table:
    """One row a group: size, members, exact, prunable or why not."""
    table = Table()
    table.add_column("group", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("members", overflow="fold")
    table.add_column("exact")
    table.add_column("prunable", overflow="fold")
    for group in groups:
        frozen = Text(
            "yes" if group.frozen is None else f"no: {group.frozen}", style="" if group.frozen is None else "yellow"
        )
        demands = [f"tied: {', '.join(group.ties)}"] if group.ties else []
        demands += [f"at least {group.minimum}"] if group.minimum > 1 else []
        ties = Text("".join(f"; {demand}" for demand in demands), style="dim")
        exact = Text("yes" if group.exact else "no")
        table.add_row(Text(group.name), str(group.size), Text(_members(group.members)), exact, frozen + ties)
    return table


def frozen_table(rows: Sequence[FrozenShare]) -> Table:
    """One row a reason: what it keeps from being pruned, and where."""
    table = Table(title="What no open group reaches, and why", title_justify="left")
    table.add_column("reason", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("places", overflow="fold")
    for row in rows:
        places = f"{len(row.places)}: {some(row.places, PLACES_SHOWN)}" if row.places else ""
        table.add_row(Text(row.reason), _share(row.parameters), _share(row.macs), Text(places))
    return table


def branches_table(branches: Sequence[Branch]) -> Table:
    """One row a branch: where it is, what goes with it, removable or why not."""
    table = Table(title="Branches: what can be removed as a whole", title_justify="left")
    table.add_column("branch", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("removable", overflow="fold")
    for branch in branches:
        frozen = "yes" if branch.frozen is None else f"no: {branch.frozen}"
        style = "" if branch.frozen is None else "yellow"
        table.add_row(Text(branch.name), f"{branch.parameters:,}", f"{branch.macs:,}", Text(frozen, style=style))
    return table


def branch_dict(branch: Branch) -> dict[str, Any]:
    """A branch as JSON types."""
    return {
        "name": branch.name,
        "start": list(branch.start),
        "end": branch.end,
        "modules": list(branch.modules),
        "groups": list(branch.groups),
        "parameters": branch.parameters,
        "macs": branch.macs,
        "frozen": branch.frozen,
    }


def _share(share: float) -> str:
    """A share in per cent; one that rounds to nothing is told from none."""
    return "<0.01%" if 0 < share < 0.00005 else f"{share:.2%}"


def _members(members: Sequence[Any]) -> str:
    """How many members, and the first few."""
    return f"{len(members)}: {some(members, MEMBERS_SHOWN)}"


def group_dict(group: Any) -> dict[str, Any]:
    """A group as JSON types."""
    return {
        "name": group.name,
        "size": group.size,
        "exact": group.exact,
        "frozen": group.frozen,
        "members": [str(member) for member in group.members],
        "ties": [str(tie) for tie in group.ties],
    }
