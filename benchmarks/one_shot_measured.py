"""One-shot pruning of real models to measured speed-ups: `python benchmarks/one_shot_measured.py DATA_DIR`.

`cpd.compress(model, target_speedup=…, data=…, epochs=0)`, with no other option and in a process of its own, for trained
ImageNet models (400 images to calibrate, 300 to test) and the CIFAR-10 ResNet-56 (1,024 and 1,017). The ONNX file
that comes of it is judged by ONNX Runtime, on one thread: its accuracy, and in one more process its speed, in turn with
the unpruned model's. `--parts` says what may go: widths and branches, or one of the two alone. `--peer` prunes by
others on the same images, ever more, until they are as fast: Torch-Pruning (widths in multiples of 8, BatchNorm
recalibrated), and onnxsim on the ONNX file (L2 or Wanda, then its refit).
`--images` gives compress fewer images, at 1.7 times fewer MACs; `--fewer` asks for MACs, widths free and in multiples
of 8. Both put beside what the same plan keeps by BatchNorm recalibration alone. The JSON file goes on where it ended.

    python benchmarks/one_shot_measured.py DATA_DIR --peer --json runs/one_shot_measured.json
    python benchmarks/one_shot_measured.py DATA_DIR --models tf_efficientnet_lite0 --speedups \\
        --images 32 64 128 256 400 --json runs/one_shot_images.json --plot runs/one_shot_images.svg
    python benchmarks/one_shot_measured.py DATA_DIR --models resnet56 --speedups --fewer 2.11 2.55 4 --json F
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import imagenet
import onnx
import platformdirs
import results
import torch
from coverage import PEER, installed_peer
from models import PARTS, counted_macs
from one_shot import Batches, Images, peer_steps
from onnx_latency import separately
from resnet56_cifar10 import BORDER, MissingDataError, check_files, load_data, load_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import cpd
from cpd.demo import accuracy
from cpd.model.inputs import as_call
from cpd.surgery.batchnorm import recalibrate_batchnorm

SPEEDUPS = (1.25, 1.5, 2.0)
#: Times fewer MACs at which the number of images is varied, and what widths are then multiples of.
IMAGES_FEWER, IMAGES_ROUND = 1.7, 8
#: Instead of what compress does by itself, to try this command.
QUICK = {"criterion": "magnitude", "normalization": "none", "compensation": False}

ONNXSIM = "onnxsim==0.8.1"
#: How near a peer must come to the speed-up asked for; how long each candidate is timed.
AS_FAST, SECONDS = 0.98, 2.0
#: Share of the MACs that a candidate has at most of the one before it, of those that take long to export.
APART = 0.97
#: Images that onnxsim calibrates and refits on, to end in time.
ONNXSIM_IMAGES = 128


# ---------------------------------------------------------------------------------- what is pruned


class Subject(NamedTuple):
    """A trained model and its images.

    Attributes:
        load: (folder, cache) -> the model.
        images: (folder, "calibration" or "test") -> images and classes.
        batch: images of a calibration batch.
    """

    load: Callable[[Path, Path], nn.Module]
    images: Callable[[Path, str], Images]
    batch: int


def cifar(folder: Path, part: str) -> Images:
    """1,024 training images, or the 1,017 test images."""
    check_files(folder)
    data = load_data(folder, seed=0)
    if part == "test":
        return data.test_images, data.test_labels
    return data.loader.images[:1024, :, BORDER:-BORDER, BORDER:-BORDER], data.loader.labels[:1024]


SUBJECTS = {
    **{name: Subject(partial(imagenet.load, name), partial(imagenet.sample, name), 32) for name in imagenet.MODELS},
    "resnet56": Subject(lambda folder, cache: load_model(folder), cifar, 128),
}


def loaded(name: str, options: argparse.Namespace, count: int | None = None) -> tuple[nn.Module, Batches]:
    """A model, and its calibration batches of so many images, or of all."""
    subject = SUBJECTS[name]
    images, labels = (tensor[:count] for tensor in subject.images(options.data_dir, "calibration"))
    if count is not None and len(images) < count:
        raise SystemExit(f"{name} has {len(images)} images to calibrate on; --images asks for {count}.")
    model = subject.load(options.data_dir, options.cache).eval()
    return model, list(zip(images.split(subject.batch), labels.split(subject.batch), strict=True))


# ---------------------------------------------------------------------------------- in processes of their own


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def unpruned(name: str, options: argparse.Namespace, file: Path) -> float:
    """The ONNX file of the unpruned model; its accuracy."""
    model, batches = loaded(name, options)
    return right(name, options, cpd.export_onnx(model, batches[0][0][:1], file))


def right(name: str, options: argparse.Namespace, file: Path) -> float:
    """Per cent of the test images, by ONNX Runtime."""
    return accuracy(cpd.OnnxModule(file, threads=1), *SUBJECTS[name].images(options.data_dir, "test"))


def compressed(
    name: str, options: argparse.Namespace, target: dict[str, Any], count: int | None, folder: Path
) -> dict[str, Any]:
    """One call of compress; `model.onnx` is in the folder. At given MACs also what recalibration alone gives."""
    model, batches = loaded(name, options, count)
    target = {**target, **(QUICK if options.quick else {})}
    start = time.perf_counter()
    try:
        result = cpd.compress(model, data=batches, epochs=0, progress=False, output_dir=folder, **target)
    except cpd.TargetError as error:
        return {"seconds": time.perf_counter() - start, "error": str(error)}
    report = result.report
    kept = (re.search(r"kept '([^']+)'", note) for note in report.notes if note.startswith("Recovery"))
    found = {
        "seconds": time.perf_counter() - start,
        "stages": report.seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        "recovery": next((match[1] for match in kept if match), ""),
        "notes": report.notes,
        "macs_left": report.result.macs / report.original.macs,
        "removed": f"{len(result.plan.removed)} of {len(report.branches)}",
        "said": result.speedup,
    }
    if "target_macs" in target:
        alone = cpd.shrink(copy.deepcopy(model), result.plan)
        recalibrate_batchnorm(alone, batches)
        found["recalibrated"] = accuracy(alone, *SUBJECTS[name].images(options.data_dir, "test"))
    return found


# ---------------------------------------------------------------------------------- peers

#: What is timed, and what writes it to a file once it has been recovered from.
Candidate = tuple[nn.Module | onnx.ModelProto, Callable[[Path], object]]


def torch_pruned(importance: str, name: str, options: argparse.Namespace, dense: Path) -> Iterator[Candidate]:
    """By Torch-Pruning: global, step by step."""
    import torch_pruning as tp

    model, batches = loaded(name, options)
    example = batches[0][0][:1]

    def finish(narrow: nn.Module, file: Path) -> None:
        recalibrate_batchnorm(narrow, batches)
        cpd.export_onnx(narrow, example, file)

    macs = counted_macs(model, as_call(example))
    for narrow in peer_steps(tp, importance, model, example, batches, round_to=8):
        left = counted_macs(narrow, as_call(example))
        if left <= APART * macs:
            macs, narrow = left, copy.deepcopy(narrow)
            yield narrow, partial(finish, narrow)


def onnx_pruned(calibrated: bool, name: str, options: argparse.Namespace, dense: Path) -> Iterator[Candidate]:
    """By onnxsim: every layer by one share, in 32nds, of which some give widths that suit the kernels."""
    import onnxsim
    from onnxsim import pruning

    original = onnx.load(dense)
    key = original.graph.input[0].name
    _, batches = loaded(name, options)
    data = [{key: image.numpy()} for images, _ in batches for image in images.split(1)][:ONNXSIM_IMAGES]

    def pruned(share: float, images: int) -> onnx.ModelProto:
        if not calibrated:
            return pruning.apply_structured_pruning(original, sparsity=share)
        return pruning.apply_structured_wanda_pruning(original, calibration_data=data[:images], sparsity=share)

    def finish(share: float, file: Path) -> None:
        found = pruned(share, ONNXSIM_IMAGES)
        onnx.save(onnxsim.apply_pruning_finetune(original, found, calibration_data=data), file)

    for share in (step / 32 for step in range(1, 31)):
        yield pruned(share, 1), partial(finish, share)


PEERS = {
    "Torch-Pruning magnitude": partial(torch_pruned, "magnitude"),
    "Torch-Pruning Taylor": partial(torch_pruned, "taylor"),
    "onnxsim L2": partial(onnx_pruned, False),
    "onnxsim Wanda": partial(onnx_pruned, True),
}


def as_fast(
    by: str, name: str, options: argparse.Namespace, speedups: list[float], dense: Path, folder: Path
) -> dict[float, tuple[Path, bool]]:
    """{speed-up asked for: (the file of a peer's first candidate as fast as that, else of its fastest, and which)}."""
    example = SUBJECTS[name].images(options.data_dir, "test")[0][:1]
    todo, found, fastest = sorted(speedups), dict[float, tuple[Path, bool]](), None

    def keep(finish: Callable[[Path], object], reached: bool) -> None:
        file = folder / f"{todo[0]}.onnx"
        finish(file)
        found[todo.pop(0)] = file, reached

    for model, finish in PEERS[by](name, options, dense):
        speed = cpd.compare_latency(dense, model, example, seconds=SECONDS, min_runs=6).speedup
        while todo and speed >= AS_FAST * todo[0]:
            keep(finish, True)
        if not todo:
            break
        if fastest is None or speed > fastest[0]:
            fastest = speed, finish
    while todo and fastest is not None:
        keep(fastest[1], False)
    return found


# ---------------------------------------------------------------------------------- rows


class Bench:
    """Rows of one model; files are in a folder of its own."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        self.name, self.options, self.folder = name, options, folder

    @cached_property
    def dense(self) -> tuple[Path, float]:
        """The unpruned model's ONNX file, and its accuracy."""
        file = self.folder / f"{self.name}.onnx"
        return file, apart(unpruned, self.name, self.options, file)

    def tasks(self) -> Iterator[tuple[list[dict[str, Any]], Callable[..., Iterator[dict[str, Any]]]]]:
        """What rows are told by, and what makes those of them that are missing."""
        options = self.options
        for part in options.parts:
            by = "cpd" if part == "both" else f"cpd, {part} alone"
            for asked in options.speedups:
                yield [{"model": self.name, "by": by, "asked": asked}], partial(self.ours, part)
        for by in PEERS if options.peer and options.speedups else ():
            yield [{"model": self.name, "by": by, "asked": asked} for asked in options.speedups], self.theirs
        at_macs = [(IMAGES_FEWER, IMAGES_ROUND, count) for count in options.images]
        at_macs += [(fewer, round_to, None) for fewer in options.fewer for round_to in (1, 8)]
        for fewer, round_to, count in at_macs:
            yield [{"model": self.name, "fewer": fewer, "round_to": round_to, "images": count}], self.at_macs

    def ours(self, part: str, heads: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """compress, asked for a speed-up."""
        for head in heads:
            target = {"target_speedup": head["asked"], **PARTS[part]}
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                found = apart(compressed, self.name, self.options, target, None, Path(folder))
                if "error" not in found:
                    found |= self.judged(Path(folder, "model.onnx")) | {"reached": True}
                yield head | {"dense": self.dense[1]} | found

    def theirs(self, heads: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A peer, at the same speed-ups."""
        by, asked = heads[0]["by"], [head["asked"] for head in heads]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            start = time.perf_counter()
            try:
                files = apart(as_fast, by, self.name, self.options, asked, self.dense[0], Path(folder))
                failure = "no candidate"
            except Exception as error:  # whatever the peer raises, or makes of the model
                files, failure = {}, f"{type(error).__name__}: {error}"[:200]
            seconds = time.perf_counter() - start
            for head in heads:
                file, reached = files.get(head["asked"], (None, False))
                found = {"error": failure} if file is None else self.judged(file) | {"reached": reached}
                yield head | {"dense": self.dense[1], "seconds": seconds / len(heads)} | found

    def at_macs(self, heads: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """compress, asked for MACs, widths alone."""
        for head in heads:
            target = {"target_macs": 1 / head["fewer"], "round_to": head["round_to"], **PARTS["widths"]}
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                found = apart(compressed, self.name, self.options, target, head["images"], Path(folder))
                if "error" not in found:
                    found["accuracy"] = apart(right, self.name, self.options, Path(folder, "model.onnx"))
                yield head | {"dense": self.dense[1]} | found

    def judged(self, file: Path) -> dict[str, Any]:
        """Accuracy and speed of an ONNX file."""
        return {
            "accuracy": apart(right, self.name, self.options, file),
            "speedup": separately(self.dense[0], file, threads=1, pairs=10 if self.options.quick else 60),
        }


# ---------------------------------------------------------------------------------- what is printed


def spent(row: dict[str, Any]) -> tuple[str, ...]:
    """Recovery, seconds by stage, peak memory."""
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row.get("stages", {}).items() if seconds >= 0.5)
    peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
    return row.get("recovery", ""), f"{row['seconds']:.0f}", stages, peak


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Measured speed-ups and those who reach them; fixed MACs."""
    timed, fixed = [row for row in rows if "by" in row], [row for row in rows if "fewer" in row]
    spends = ("recovery", "s", "by stage", "peak GiB")
    if timed:
        heads = (
            "model",
            "unpruned",
            "by",
            "asked",
            "measured apart",
            "% right",
            "MACs left",
            "branches removed",
            *spends,
        )
        table = Table(*heads, title="At measured speed, ONNX Runtime, one thread")
        for row in sorted(timed, key=lambda row: (row["model"], row["asked"])):
            first = row["model"], f"{row['dense']:.1f}", row["by"], f"{row['asked']:g}x"
            if "error" in row:
                table.add_row(*first, "out of reach", "-", row["error"][:60])
                continue
            speed = f"{row['speedup']:.2f}x" + ("" if row["reached"] else ", its fastest")
            left = f"{row['macs_left']:.1%}" if "macs_left" in row else ""
            gone = row.get("removed", "")
            table.add_row(*first, speed, f"{row['accuracy']:.1f}", left, gone, *spent(row))
        yield table
    if fixed:
        heads = ("model", "unpruned", "MACs", "widths", "images", "BatchNorm recalibrated alone", "% right", *spends)
        table = Table(*heads, title="At fixed MACs")
        for row in sorted(fixed, key=lambda row: (row["model"], row["fewer"], row["round_to"], row["images"] or 1e9)):
            widths = "free" if row["round_to"] == 1 else f"multiples of {row['round_to']}"
            first = row["model"], f"{row['dense']:.1f}", f"{row['fewer']:g}x fewer", widths, str(row["images"] or "all")
            if "error" in row:
                table.add_row(*first, "out of reach", "-", row["error"][:60])
                continue
            table.add_row(*first, f"{row['recalibrated']:.1f}", f"{row['accuracy']:.1f}", *spent(row))
        yield table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the number of images, one picture a model."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("images") and "error" not in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(6 * max(1, len(models)), 4.5), layout="constrained")
    areas = figure.subplots(1, max(1, len(models)), squeeze=False)[0]
    for model, area in zip(models, areas, strict=False):
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["images"])
        counts = [row["images"] for row in mine]
        area.plot(counts, [row["accuracy"] for row in mine], "-", marker="o", label="cpd.compress")
        area.plot(counts, [row["recalibrated"] for row in mine], "--", marker="o", label="BatchNorm recalibrated alone")
        area.axhline(mine[0]["dense"], color="grey", lw=1, label="unpruned")
        area.set_xscale("log", base=2)
        area.set_xticks(counts, map(str, counts))
        area.set(title=f"{model}, {IMAGES_FEWER:g}x fewer MACs", xlabel="images", ylabel="% right, no gradient step")
        area.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--speedups", nargs="*", type=float, default=list(SPEEDUPS), help="measured in ONNX Runtime")
    parser.add_argument("--parts", nargs="+", default=["both"], choices=list(PARTS), help="what may go")
    parser.add_argument("--peer", action="store_true", help=f"run {PEER} and {ONNXSIM} too")
    parser.add_argument("--images", nargs="*", type=int, default=[], help="to calibrate on, at 1.7 times fewer MACs")
    parser.add_argument("--fewer", nargs="*", type=float, default=[], help="times fewer MACs, of all images")
    parser.add_argument(
        "--cache", type=Path, default=platformdirs.user_cache_path("cpd") / "benchmarks",
        help="where weights that packages ship are kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="magnitude, nothing refitted: to try this command")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> int:
    """Run what is asked for, print the tables."""
    options, console = parsed(), Console(stderr=True)
    rows = results.read(options.json)
    with (
        installed_peer(options.peer, PEER, ONNXSIM) as peers,
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        sys.path[:0] = [peers] if peers else []
        benches = (Bench(name, options, Path(folder)) for name in options.models)
        tasks = [task for bench in benches for task in bench.tasks()]
        total = bar.add_task("", total=sum(len(heads) for heads, _ in tasks))
        for heads, make in tasks:
            missing = [head for head in heads if not any(head.items() <= row.items() for row in rows)]
            bar.update(total, description=" ".join(map(str, heads[0].values())))
            for row in make(missing) if missing else ():
                rows.append(row)
                print({key: value for key, value in row.items() if key != "notes"}, file=sys.stderr, flush=True)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    results.write(options.json, rows)
            bar.advance(total, len(heads))
    for table in tables(rows):
        Console(width=220).print(table)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MissingDataError as missing:
        sys.exit(str(missing))
