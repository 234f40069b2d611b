"""Kill runs again and again, in each of their stages, and see that they end as one that nobody disturbed.

A small convnet on scikit-learn's digits is pruned in eight steps, or made sparse in a few, while it is distilled, with
a checkpoint at every step of the optimizer, into a folder that holds an older result. A run is killed once in each of
its stages, at a random moment of it, and taken up again each time; then it runs to its end, and another begins, until
there were enough kills. After every kill the folder is read: the checkpoint must be whole, and the older result load,
or the newer.

    python benchmarks/kill_test.py --kills 20 --json runs/kill_test.json
    python benchmarks/kill_test.py --job sparsify --kills 10
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import results
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import cpd
from cpd.demo import DigitsNet, digits
from cpd.files.checkpoint import NAME
from cpd.jobs import compress as compressing
from cpd.jobs import sparsify as sparsifying
from cpd.jobs import stages
from cpd.report.artifacts import read_document


@dataclass(frozen=True)
class Job:
    """What is killed.

    Attributes:
        stages: those of a run, in their order, each by the function that does its work. Changes of the model, which are
            called "shrink", fall into the training.
        run: does it: (model, loader, images, options) -> the result.
        options: those of the run that is killed.
        older: those of the older result.
        changes: what the state of its pruner calls the changes.
    """

    stages: dict[str, tuple[Any, str]]
    run: Callable[..., Any]
    options: dict[str, Any]
    older: dict[str, Any]
    changes: str


JOBS = {
    "compress": Job(
        {
            "training": (stages, "distill"),
            "shrink": (cpd.Pruner, "prune"),
            "export": (compressing, "export_onnx"),
            "save": (cpd.Result, "save"),
        },
        cpd.compress,
        {"target_macs": 0.4, "criterion": "taylor", "schedule": cpd.Schedule("cubic", end=0.9, interval=8)},
        {"target_macs": 0.2},
        "shrinks",
    ),
    "sparsify": Job(
        {
            "training": (stages, "distill"),
            "shrink": (cpd.Sparsifier, "prune"),
            "export": (sparsifying, "export_onnx"),
            "save": (cpd.SparseResult, "save"),
        },
        cpd.sparsify,
        {"sparsity": 0.8, "schedule": cpd.Schedule("cubic", end=0.9, interval=12), "regrow": "rigl"},
        {"sparsity": 0.3},
        "changes",
    ),
}


# ---------------------------------------------------------------------------------- the process that is killed


def run(job: Job, folder: Path, resume: bool) -> dict[str, Any]:
    """One run to its end, told stage by stage; what came of it."""
    torch.manual_seed(0)
    model = DigitsNet().eval()
    loader, images, _ = digits()
    with contextlib.ExitStack() as stack:
        for stage, (owner, name) in job.stages.items():
            stack.enter_context(mock.patch.object(owner, name, told(stage, getattr(owner, name))))
        result = job.run(
            model, data=loader, example_inputs=images[:1], epochs=4, lr=0.02, score_batches=2, checkpoint_minutes=1e-6,
            output_dir=folder, resume=resume, progress=False, **job.options,
        )  # fmt: skip
    return {**of(result.plan, result.model, getattr(result, "masks", None)), "macs": result.report.result.macs}


def told(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that says when it begins and when it ends."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        tell("begin", stage)
        found = function(*args, **kwargs)
        tell("end", stage)
        return found

    return timed


def tell(what: str, of: Any) -> None:
    """A line for the process that started this one: what, of which stage, when."""
    print(json.dumps([what, of, time.monotonic()]), flush=True)


# ---------------------------------------------------------------------------------- the one that kills it


class Child:
    """The run in a process of its own, and what it has told."""

    def __init__(self, job: str, folder: Path) -> None:
        self.stages, self.told = JOBS[job].stages, list[list[Any]]()
        command = [
            sys.executable,
            __file__,
            "--job",
            job,
            "--child",
            str(folder),
            *(["--resume"] if (folder / NAME).exists() else []),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __iter__(self) -> Iterator[list[Any]]:
        """What it tells from now on, as it tells it."""
        for line in self.process.stdout or ():
            if line.endswith("\n"):  # else it was killed as it wrote
                self.told.append(json.loads(line))
                yield self.told[-1]

    def kill(self, stage: str, count: int, after: float) -> str | None:
        """Kill it some seconds after the `count`-th begin of a stage; gives where it was, None if it had ended."""
        begun = (line for line in self if line[:2] == ["begin", stage])
        if not any(index == count for index, _ in enumerate(begun, 1)):
            return None
        time.sleep(after)
        self.process.kill()  # SIGKILL
        list(self)
        self.process.wait()
        within = [stage for stage in self.stages if self._of(stage, "begin") > self._of(stage, "end")]
        return None if self.told[-1][0] == "result" else within[-1] if within else "between"

    def _of(self, stage: str, what: str) -> int:
        return sum(line[:2] == [what, stage] for line in self.told)

    def result(self) -> dict[str, Any]:
        """What came of it at its end."""
        list(self)
        if self.process.wait():
            raise SystemExit("A run failed, as told above.")
        found: dict[str, Any] = self.told[-1][1]
        return found

    def seconds(self, stage: str) -> float:
        """How long a stage took."""
        times = {what: [line[2] for line in self.told if line[:2] == [what, stage]] for what in ("begin", "end")}
        return mean(end - begin for begin, end in zip(times["begin"], times["end"], strict=True))


def found_in(job: Job, folder: Path, ends: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a kill has left, read in a copy of the folder: which result loads, and what the checkpoint holds."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / "copy"))
        left = sum(path.name.startswith(".") for path in copy.iterdir())
        model = cpd.load(copy, DigitsNet())  # every file is compared with its checksum
        plan = cpd.Plan.from_dict(read_document(copy)["plan"])
        masks = cpd.Masks.load(copy) if job.run is cpd.sparsify else None
        found = of(plan, model, masks).items()
        which = [name for name, result in ends.items() if found <= result.items()]
        if len(which) != 1:
            raise SystemExit("After a kill the folder holds neither the older result nor the newer.")
        return {"result": which[0], "checkpoint": state_of(copy / NAME, job.changes), "half_written": left}


def of(plan: cpd.Plan, model: nn.Module, masks: cpd.Masks | None) -> dict[str, Any]:
    """What two results are told apart by."""
    weights = sum(float(value.double().abs().sum()) for value in model.state_dict().values())
    return {"digest": plan.digest, "masks": masks and masks.digest, "weights": weights}


def state_of(checkpoint: Path, changes: str) -> dict[str, Any] | None:
    """How far a checkpoint has come, if there is one; raises unless it is whole."""
    if not checkpoint.exists():
        return None
    with safetensors.safe_open(checkpoint, "pt") as file:
        state = json.loads(file.metadata()["cpd"])["state"]
        size = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    shrinks = len(state["pruner"][changes])
    return {"epoch": state["epoch"], "step": state["done"], "shrinks": shrinks, "numbers": size}


def killed(name: str, place: Path, kills: int, longest: float, seed: int) -> dict[str, Any]:
    """Runs that are killed so many times: each kill, and whether every run ended as one that nobody disturbed."""
    job = JOBS[name]
    moments, rows, ends = random.Random(seed), list[dict[str, Any]](), list[dict[str, Any]]()
    _, images, _ = digits()
    older = job.run(DigitsNet().eval(), example_inputs=images[:1], **job.older)
    undisturbed = Child(name, older.save(place / "undisturbed"))
    known = {"older": of(older.plan, older.model, getattr(older, "masks", None)), "newer": undisturbed.result()}
    lasts = {stage: min(undisturbed.seconds(stage), longest) for stage in job.stages}
    while len(rows) < kills:
        folder = older.save(place / str(len(ends)))
        for stage in list(job.stages)[: kills - len(rows)]:
            child, after = Child(name, folder), moments.uniform(0, lasts[stage])
            hit = child.kill(stage, moments.randint(1, 2) if stage == "shrink" else 1, after)
            if hit is None:
                break
            rows.append({"run": len(ends) + 1, "stage": hit, "aimed": stage, "after_s": after})
            rows[-1] |= found_in(job, folder, known)
        ends.append(Child(name, folder).result())
    return {"kills": rows, "same": [end == known["newer"] for end in ends], "seconds": lasts}


def main() -> int:
    """Run undisturbed, run killed, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="compress")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=4, help="seconds after a stage began that a kill may come")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compressing.FINAL_SECONDS = sparsifying.FINAL_SECONDS = 1.0  # of timing, while nothing is written
    if options.child:
        tell("result", run(JOBS[options.job], options.child, options.resume))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = killed(options.job, Path(folder), options.kills, options.longest, options.seed)
    console, rows = Console(), found["kills"]
    console.print(table_of(rows))
    spread = Counter(row["stage"] for row in rows)
    told = ", ".join(f"{count} in {stage}" for stage, count in spread.items())
    console.print(
        f"{len(rows)} kills ({told}) of {len(found['same'])} runs; after each the checkpoint was whole and a whole "
        f"result loaded; runs that ended with plan, masks and weights of an undisturbed one: {sum(found['same'])}."
    )
    if options.json:
        results.write(options.json, found["kills"], same=found["same"], spread=spread)
    return 0 if all(found["same"]) and spread.keys() >= JOBS[options.job].stages.keys() else 1


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A row a kill."""
    table = Table(
        "run", "killed in", "after", "result in the folder", "checkpoint: epoch, step, shrinks", "half-written"
    )
    for row in rows:
        state = row["checkpoint"]
        written = "none" if state is None else f"{state['epoch']}, {state['step']}, {state['shrinks']}"
        table.add_row(
            str(row["run"]), row["stage"], f"{row['after_s']:.3f} s", row["result"], written, str(row["half_written"])
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
