"""Every table of the CPD paper, as one command each, on the data that is there; `docs/paper.md` says which is which.

    python benchmarks/paper.py DATA_DIR kd                     # one epoch, one seed: that it runs
    python benchmarks/paper.py DATA_DIR kd --full              # three seeds, trained as long as it takes
    python benchmarks/paper.py DATA_DIR all
    python benchmarks/paper.py - classification --imagenet FOLDER --full        # train/ and val/
    python benchmarks/paper.py - all --ade20k ADEChallengeData2016 --full

With a folder of ImageNet or ADE20K the tables that ask for it run on that, too; `-` in the place of DATA_DIR runs them
there alone. Rows go to `benchmarks/results/paper_TABLE.json`; those that are there are not run again. How long a table
took goes to `paper_minutes.json`, where none of its rows was there before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results

from cpd.deploy.machine import cores

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what it shows.
        runs: the arguments of `train_and_prune.py`, one list a call.
        imagenet: those of `imagenet.py`, where there is a folder of ImageNet.
        ade20k: those of `train_and_prune.py`, where there is one of ADE20K.
    """

    title: str
    runs: tuple[str, ...]
    imagenet: tuple[str, ...] = ()
    ade20k: tuple[str, ...] = ()


TABLES = {
    "classification": PaperTable(
        "Classification: accuracy at fewer MACs, beside Torch-Pruning",
        ("resnet56 --fewer 2.11 2.55 --by cpd peer", "vit --fewer 2 --by cpd"),
        imagenet=("--models resnet50 vit_small_patch16_224 --fewer 2", "--models resnet50 --speedups 1.5 2"),
    ),
    "segmentation": PaperTable(
        "Segmentation: mean IoU at measured speed in ONNX Runtime",
        ("lraspp --speedups 1.5 1.9 --kd cwd",),
        ade20k=("ade20k --speedups 1.5 1.9 --kd cwd",),
    ),
    "sparsity": PaperTable(
        "Mean IoU against the share that is removed, with and without distillation",
        ("lraspp --fewer 1.25 1.67 2.5 --kd none cwd",),
        ade20k=("ade20k --fewer 1.25 1.67 2.5 --kd none cwd",),
    ),
    "teacher": PaperTable(
        "The unpruned model as teacher, and a larger one",
        ("resnet20 --fewer 2 --teachers same larger",),
        ade20k=("ade20k --fewer 1.67 --teachers same larger",),
    ),
    "kd": PaperTable(
        "Distillation losses",
        ("lraspp --fewer 1.67 --kd none kl cwd cirkd",),
        ade20k=("ade20k --fewer 1.67 --kd none kl cwd cirkd",),
    ),
    "classes": PaperTable(
        "Intersection over union of each class, before and after",
        ("lraspp --fewer 1.67 --kd none cwd --classes",),
        ade20k=("ade20k --fewer 1.67 --kd none cwd --classes",),
    ),
}
SHORT, FULL = "--epochs 1 --dense-epochs 1 --seeds 0", "--seeds 0 1 2"
SHORT_IMAGENET, FULL_IMAGENET = "--epochs 0", "--epochs 0 30"


def calls(name: str, options: argparse.Namespace) -> Iterator[list[str]]:
    """The commands of a table: of the data that is here, and of the folders that were given."""
    table, length = TABLES[name], "full" if options.full else "short"
    about = {"train_and_prune.py": FULL if options.full else SHORT}
    about["imagenet.py"] = FULL_IMAGENET if options.full else SHORT_IMAGENET
    sets = (
        (None if str(options.data_dir) == "-" else options.data_dir, table.runs, "train_and_prune.py", ""),
        (options.imagenet, table.imagenet, "imagenet.py", "_imagenet"),
        (options.ade20k, table.ade20k, "train_and_prune.py", "_ade20k"),
    )
    for folder, runs, script, of_set in sets:
        for run in runs if folder is not None else ():
            file = f"paper_{name}{of_set}{'' if options.full else '_short'}.json"
            yield [
                sys.executable, str(HERE / script), str(folder), *run.split(), *about[script].split(),
                "--weights", str(options.weights / length), "--json", str(options.results / file),
            ]  # fmt: skip


def main() -> int:
    """Run what is asked for; each call prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="of CIFAR-10 and CamVid; -: run on the other folders alone")
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--full", action="store_true", help="three seeds, and each student's own number of epochs")
    parser.add_argument("--imagenet", type=Path, help="a folder with train/ and val/")
    parser.add_argument("--ade20k", type=Path, help="ADEChallengeData2016, with images/ and annotations/")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights"), help="where dense weights are kept")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where the rows go")
    options = parser.parse_args()
    failed = 0
    for name in TABLES if options.table == "all" else (options.table,):
        print(f"{TABLES[name].title} ({'full' if options.full else 'one epoch: shows that it runs'})", flush=True)
        start = time.monotonic()
        commands, wrong = list(calls(name, options)), 0
        anew = not any(Path(command[-1]).exists() for command in commands)
        for command in commands:
            wrong |= subprocess.run(command, check=False).returncode
        minutes, failed = (time.monotonic() - start) / 60, failed | wrong
        print(f"{name}: {f'{minutes:.1f} minutes' if commands else 'nothing to run on these folders'}", flush=True)
        if commands and anew and not wrong:
            row = {"table": name, "full": options.full, "minutes": minutes, "cores": cores()}
            keep(options.results / "paper_minutes.json", row)
    return int(failed != 0)


def keep(path: Path, row: dict[str, Any]) -> None:
    """Write how long a table took, in the place of what is known of it."""
    others = [old for old in results.read(path) if (old["table"], old["full"]) != (row["table"], row["full"])]
    results.write(path, [*others, row])


if __name__ == "__main__":
    sys.exit(main())
