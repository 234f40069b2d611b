"""Obstacles: what keeps a target out of reach, in shares of the unpruned model's figure, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from operator import attrgetter

from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.errors import some
from cpd.selection.limits import Limits
from cpd.selection.selector import Selector

#: What is not named: less than this share of the figure. How many reasons are named, and places of each.
NEGLIGIBLE, REASONS, PLACES = 0.005, 4, 2
#: A share of a group that may go, given as one that is hardly a limit.
MOST = 0.99


def obstacles(
    selector: Selector, figure: Callable[[Mapping[Axis, int]], float], fixed: Mapping[str, float], by: str = "macs"
) -> str:
    """What keeps a figure from being lower at the narrowest widths allowed, sentence by sentence.

    Args:
        selector: holds the limits and the groups.
        figure: of any widths: what has to get down.
        fixed: what of it no width changes, each by the end of a sentence that begins with its share.
        by: "macs" or "parameters": what the shares of frozen groups are told in.
    """
    full = max(figure({}), 1e-30)
    left = figure(selector.least()) / full
    found = [f"{left:.1%} of the original's are left at the narrowest widths allowed."]
    found += _limits(selector, lambda counts: figure(counts) / full, left)
    found += [f"{share / full:.1%} {what}." for what, share in fixed.items() if share / full >= NEGLIGIBLE]
    return " ".join([*found, _frozen(selector.comb, by)])


def _limits(selector: Selector, share: Callable[[Mapping[Axis, int]], float], left: float) -> list[str]:
    """What the options of `Limits` hold together, and each alone, and what looser ones would leave."""
    ours = selector.limits
    loosest = Limits(round_to=1, max_ratio=max(MOST, ours.max_ratio))
    names = [item.name for item in fields(Limits) if getattr(ours, item.name) != getattr(loosest, item.name)]
    could = share(selector.least(loosest))
    if left - could < NEGLIGIBLE:
        return [f"Looser limits do not help: every group keeps a channel, or what a tie requires ({could:.1%})."]
    alone = {name: left - share(selector.least(replace(ours, **{name: getattr(loosest, name)}))) for name in names}
    telling = sorted((name for name in names if alone[name] >= NEGLIGIBLE), key=lambda name: -alone[name])
    each = ", ".join(f"{name}={getattr(ours, name)} alone {alone[name]:.1%}" for name in telling)
    looser = ", ".join(f"{name}={getattr(loosest, name)}" for name in names)
    because = f"The limits account for {left - could:.1%}{f' ({each})' if each else ''}"
    return [f"{because}: {looser} would leave {could:.1%}."]


def _frozen(comb: Comb, by: str) -> str:
    """What frozen groups hold, with the reasons that hold most, and where."""
    if not any(group.frozen for group in comb.groups):
        return "No group is frozen."
    share = attrgetter(by)
    rows = sorted(comb.frozen_share, key=share, reverse=True)
    unit = "MACs" if by == "macs" else by
    total = sum(map(share, rows))
    if total < NEGLIGIBLE:
        return f"Frozen groups hold less than {NEGLIGIBLE:.1%} of the {unit}."
    reasons = []
    for row in rows[:REASONS]:
        places = some(row.places, PLACES)
        if share(row) >= NEGLIGIBLE:
            reasons.append(f"{share(row):.1%} {row.reason}" + (f" [{places}]" if places else ""))
    advice = " If the model returns more than you use, name the parts that you use: outputs=." * (len(comb.outputs) > 1)
    listed = "; ".join([*reasons, "comb.frozen_share lists all of them"])
    return f"Frozen groups hold {total:.1%} of the {unit}: {listed}.{advice}"
