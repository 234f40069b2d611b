"""Comb and shrink every model of a library: `python benchmarks/coverage.py --library timm [--json runs/timm.json]`.

Each model runs in a process of its own (`benchmarks/oracles.py`), under a time limit; the JSON file is written after
each, and a run that is started again with the same file goes on where it ended (what ended in an error runs again).

| option | models |
|---|---|
| (none) | the smallest model of every module of the library |
| `--sample N --seed S` | N more models a module, drawn at random |
| `--all` | all of them |
| `--faults` | the small models of what once broke a comb (`benchmarks/faults.py`), through "masked" and "warm" alone |

`--branches` removes the same share of the branches too, and then all that can go; the table says how many there are.

`--warm` combs each model after forwards too, and compares groups and attributes.

`--peer` runs Torch-Pruning on the same models in the same run (its own graph, group magnitude, uniform ratio 0.5); it
is installed into a temporary folder. Seconds leave out what the first export of a process imports, as they leave out
importing Torch-Pruning. `--depths` measures the growth of time with depth instead of covering a library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import results
from faults import FAULTS
from oracles import CHECKS, passed, table_of
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
CATALOGUE = HERE / "catalogue.json"
PEER = "torch-pruning==1.6.1"
LIMITS = {"timm": 120e6, "torchvision": 160e6}
TASKS = ("classification", "segmentation", "video", "optical_flow", "detection")


# ---------------------------------------------------------------------------------- which models there are


def catalogue(library: str) -> dict[str, dict[str, Any]]:
    """{model name: {"module", "parameters"}}; counted once a version of the library, which takes minutes."""
    known: dict[str, Any] = json.loads(CATALOGUE.read_text()) if CATALOGUE.exists() else {}
    if known.get(library, {}).get("version") != version(library):
        models = dict(_count_timm() if library == "timm" else _count_torchvision())
        known[library] = {"version": version(library), "models": models}
        CATALOGUE.write_text(json.dumps(known, indent=0, sort_keys=True))
    found: dict[str, dict[str, Any]] = known[library]["models"]
    return found


def _count_timm() -> Iterator[tuple[str, dict[str, Any]]]:
    import timm

    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            yield name, {"module": module, "parameters": _parameters(lambda name=name: timm.create_model(name))}


def _count_torchvision() -> Iterator[tuple[str, dict[str, Any]]]:
    import torchvision

    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        path = builder.__module__.split(".")
        task = path[2] if path[2] in TASKS else "classification"
        if path[2] != "quantization":
            count = _parameters(lambda builder=builder: builder(weights=None, **_no_backbone(builder)))
            yield name, {"module": path[-1], "task": task, "parameters": count}


def _no_backbone(builder: Any) -> dict[str, Any]:
    import inspect

    return {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}


def _parameters(make: Any) -> int:
    """Number of parameters; the model is built without values where it allows that."""
    import torch

    try:
        with torch.device("meta"):
            model = make()
    except Exception:  # a constructor that reads values
        model = make()
    return sum(p.numel() for p in model.parameters())


def chosen(options: argparse.Namespace) -> list[str]:
    """The models to run, as `library:name`, the smallest first."""
    models = catalogue(options.library)
    small = {name: entry for name, entry in models.items() if entry["parameters"] <= options.max_parameters}
    if options.library == "torchvision" and not options.detection:
        small = {name: entry for name, entry in small.items() if entry["task"] != "detection"}
    elif options.library == "torchvision":
        small = {name: entry for name, entry in small.items() if entry["task"] == "detection"}
    by_module: dict[str, list[str]] = {}
    for name, entry in sorted(models.items(), key=lambda item: (item[1]["parameters"], item[0])):
        by_module.setdefault(entry["module"], []).append(name)
    if options.all or options.library == "torchvision":
        names = list(small)
    elif options.sample:
        rng = random.Random(options.seed)
        rest = [[name for name in names[1:] if name in small] for _, names in sorted(by_module.items())]
        names = [name for group in rest for name in rng.sample(sorted(group), min(options.sample, len(group)))]
    else:
        names = [names[0] for names in by_module.values()]
    return [f"{options.library}:{name}" for name in sorted(names, key=lambda name: (models[name]["parameters"], name))]


# ---------------------------------------------------------------------------------- running them


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in a process of its own; what it had found when the time was up, if it did not end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, str(HERE / "oracles.py"), name, "--share", str(options.share), "--json", str(file)]
        if options.skip:
            command += ["--skip", *options.skip]
        command += ["--warm"] * options.warm + ["--branches"] * options.branches
        end = limited(command, options.limit)
        rows = results.read(file)
    row = rows[-1] if rows else {"model": name}
    if end is not None or not rows:
        row.setdefault("error", end or "it wrote no row")
    return row


def limited(command: list[str], limit: float, **environment: str) -> str | None:
    """Run a command; what went wrong, if anything did: the last line of its errors, or that it did not end."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    variables = {**os.environ, **threads, **environment}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the process that reloads
        process.wait()
        return f"no end in {limit:.0f} s"
    if process.returncode in (0, 1):
        return None
    lines = errors.strip().splitlines()
    return f"exit code {process.returncode}: {lines[-1] if lines else ''}"


def cover(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every model that the JSON file does not hold yet."""
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists() and not options.again:
        rows = {row["model"]: row for row in results.read(options.json) if "error" not in row}
    todo = [name for name in names if name not in rows]
    columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(options.jobs) as pool,
        installed_peer(options.peer) as peer,
    ):
        task = bar.add_task("", total=len(todo))

        def one(name: str) -> dict[str, Any]:
            bar.update(task, description=name)
            row = run(name, options)
            if peer is not None:
                row["peer"] = _run_peer(name, peer, options.limit)
            return row

        for row in pool.map(one, todo):
            rows[row["model"]] = row
            bar.advance(task)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                results.write(options.json, list(rows.values()))
    return [rows[name] for name in names]


# ---------------------------------------------------------------------------------- the peer


@contextmanager
def installed_peer(wanted: bool, *packages: str) -> Iterator[str | None]:
    """A temporary folder with the peer, or these packages, installed in it; None where they can be imported already."""
    missing = [package for package in packages or (PEER,) if not _importable(package)]
    if not wanted or not missing:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, *missing], check=True)
        yield folder


def _importable(package: str) -> bool:
    """Whether this version of a package is installed."""
    name, _, version = package.partition("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def _run_peer(name: str, folder: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "row.json"
        command = [sys.executable, str(HERE / "peer.py"), name, str(file)]
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        end = limited(command, limit, PYTHONPATH=os.pathsep.join(paths))
        row: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return row if end is None else {**row, "outcome": end}


# ---------------------------------------------------------------------------------- the tables


def summary(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Counts and medians over all models."""
    table = Table("figure", "value", title=f"{options.library}, {len(rows)} models")
    done = [row for row in rows if "open_parameters" in row]
    ok = [row for row in done if passed(row) and (row.get("parameters_left", 1) <= options.at_most)]
    table.add_row(f"all checks pass, at most {options.at_most:.0%} of the parameters left", f"{len(ok)} of {len(rows)}")
    for check in CHECKS:
        found = [str(row.get(check, "-")) for row in done]
        failed, none = (sum(text.startswith(word) for text in found) for word in ("FAILED", "n/a"))
        absent = sum(text == "-" for text in found)
        table.add_row(f"  {check}", f"{len(found) - failed - none - absent} pass, {failed} fail, {none + absent} n/a")
    if done:
        shares = [row["open_parameters"] for row in done]
        seconds = [row["comb_s"] + row.get("shrink_s", 0) for row in done]
        table.add_row("open share of parameters, median", f"{statistics.median(shares):.1%}")
        table.add_row("models with at least 90 % of the parameters open", f"{sum(s >= 0.9 for s in shares)}")
        table.add_row("trace + comb + shrink, median / longest / sum", _times(seconds))
        table.add_row("models over 20 s", f"{sum(s > 20 for s in seconds)}")
    if options.branches:
        having = [row for row in done if row.get("branches")]
        errors = [str(row.get("all_removed", "-")) for row in having if row.get("open_branches")]
        largest = max((float(error) for error in errors if error[0].isdigit()), default=0.0)
        table.add_row("models with branches", str(len(having)))
        table.add_row("branches found", str(sum(row["branches"] for row in having)))
        table.add_row("branches that can go", str(sum(row["open_branches"] for row in having)))
        table.add_row("  all of them gone: largest error", f"{largest:.0e} of {len(errors)} models")
        for row in having:
            if row["open_branches"] < row["branches"]:
                reasons = "; ".join(row["branch_reasons"])
                table.add_row(f"  {row['model']}: {row['open_branches']} of {row['branches']}", reasons)
    both = [row for row in done if row.get("peer", {}).get("seconds") and "shrink_s" in row]
    if any("peer" in row for row in rows):
        outcomes: dict[str, int] = {}
        for row in rows:
            outcome = str(row.get("peer", {}).get("outcome", "not run")).split(":")[0]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1]):
            table.add_row(f"{PEER}: {outcome}", str(count))
        ours, theirs = (sum(values) for values in zip(*(_pair(row) for row in both), strict=True)) if both else (0, 0)
        table.add_row(f"seconds over the {len(both)} models where both end: cpd, peer", f"{ours:.0f}, {theirs:.0f}")
    unknown = sorted({op for row in done for op in row["unknown"]})
    table.add_row("ops without a rule", ", ".join(unknown) or "none")
    return table


def _closed(row: dict[str, Any]) -> bool:
    """Whether a model of a fault has less in open groups than it must."""
    name = row["model"].removeprefix("fault:")
    return name != row["model"] and row.get("open_parameters", 1) < FAULTS[name].least


def _pair(row: dict[str, Any]) -> tuple[float, float]:
    return row["comb_s"] + row["shrink_s"], row["peer"]["seconds"]


def _times(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s / {max(seconds):.1f} s / {sum(seconds):.0f} s"


def depths(share: float) -> Table:
    """Seconds of trace, comb and shrink of one ViT and one DenseNet at growing depth."""
    import copy

    import timm
    import torch
    from models import random_plan

    import cpd

    def vit(depth: int) -> Any:
        return timm.create_model("vit_tiny_patch16_224", depth=depth), torch.randn(1, 3, 224, 224)

    def densenet(depth: int) -> Any:
        return timm.models.DenseNet(growth_rate=16, block_config=(depth // 4,) * 4), torch.randn(1, 3, 64, 64)

    torch.set_num_threads(1)
    names = ("model", "depth", "nodes", "trace s", "comb s", "shrink s", "s a node x 1000")
    table = Table(*names, title="growth with depth")
    cpd.comb(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # the first export of a process imports torch's compiler
    for label, make in (("ViT", vit), ("DenseNet", densenet)):
        for depth in (12, 24, 48, 96):
            model, inputs = make(depth)
            start = time.perf_counter()
            comb = cpd.comb(model.eval(), inputs)
            middle = time.perf_counter()
            cpd.shrink(copy.deepcopy(model), random_plan(comb, share, at_least=1))
            end, nodes = time.perf_counter(), len(comb.operations.operations)
            table.add_row(
                label, str(depth), str(nodes), f"{comb.operations.seconds:.1f}", f"{middle - start:.1f}",
                f"{end - middle:.2f}", f"{1000 * (end - start) / nodes:.1f}",
            )  # fmt: skip
    return table


def main() -> int:
    """Run the models asked for, print the tables; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="library:name; instead of a library's")
    parser.add_argument("--library", choices=("timm", "torchvision"), default="timm")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--detection", action="store_true", help="torchvision's detection models instead of the others")
    parser.add_argument("--sample", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-parameters", type=float, help="default: 120 M of timm, 160 M of torchvision")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--at-most", type=float, default=0.75, help="share of parameters left that passes")
    parser.add_argument("--skip", nargs="*", default=[], choices=CHECKS)
    parser.add_argument("--limit", type=float, default=600, help="seconds a model")
    parser.add_argument("--jobs", type=int, default=1, help="models at once; timings count with one only")
    parser.add_argument("--warm", action="store_true", help="comb after forwards too: the groups must be the same")
    parser.add_argument("--branches", action="store_true", help="remove that share of the branches too")
    parser.add_argument("--faults", action="store_true", help="what once broke a comb, instead of a library")
    parser.add_argument("--peer", action="store_true", help=f"run {PEER} too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="do not go on from the JSON file")
    parser.add_argument("--depths", action="store_true", help="time over depth instead")
    options = parser.parse_args()
    options.max_parameters = options.max_parameters or LIMITS[options.library]
    console = Console(width=230)
    if options.depths:
        console.print(depths(options.share))
        return 0
    if options.faults:
        options.library, options.warm, options.at_most = "faults", True, 1.0
        options.models = options.models or [f"fault:{name}" for name in FAULTS]
        options.skip = options.skip or [check for check in CHECKS if check not in ("masked", "warm")]
    names = options.models or chosen(options)
    rows = cover(names, options)
    console.print(table_of(rows, f"{options.share:.0%} of every open group removed"))
    for row in rows:
        problems = [f"{check} {row[check]}" for check in CHECKS if str(row.get(check, "")).startswith("FAILED")]
        problems += [f"open {row['open_parameters']:.1%}"] if _closed(row) else []
        problems += [row["error"]] if "error" in row else []
        problems += [f"left {row['parameters_left']:.1%}"] if row.get("parameters_left", 0) > options.at_most else []
        if problems:
            console.print(f"{row['model']}: {'; '.join(problems)}", highlight=False, markup=False)
    console.print(summary(rows, options))
    return int(not all(passed(row) and not _closed(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
