"""Every table of the CPD paper, as one command each, on the data that is there; `docs/paper.md` says which is which.

    python benchmarks/paper.py DATA_DIR kd                     # one epoch, one seed: that it runs
    python benchmarks/paper.py DATA_DIR kd --full              # three seeds, trained as long as it takes
    python benchmarks/paper.py DATA_DIR all

Rows go to `benchmarks/results/paper_TABLE.json`; those that are there are not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from results import FOLDER

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what it shows.
        runs: the arguments of `train_and_prune.py`, one list a call.
    """

    title: str
    runs: tuple[str, ...]


TABLES = {
    "classification": PaperTable(
        "Classification: accuracy at fewer MACs, beside Torch-Pruning",
        ("resnet56 --fewer 2.11 2.55 --by cpd peer", "vit --fewer 2 --by cpd"),
    ),
    "segmentation": PaperTable(
        "Segmentation: mean IoU at measured speed in ONNX Runtime", ("lraspp --speedups 1.5 1.9 --kd cwd",)
    ),
    "sparsity": PaperTable(
        "Mean IoU against the share that is removed, with and without distillation",
        ("lraspp --fewer 1.25 1.67 2.5 --kd none cwd",),
    ),
    "teacher": PaperTable(
        "The unpruned model as teacher, and a larger one", ("resnet20 --fewer 2 --teachers same larger",)
    ),
    "kd": PaperTable("Distillation losses", ("lraspp --fewer 1.67 --kd none kl cwd cirkd",)),
}
SHORT, FULL = "--epochs 1 --dense-epochs 1 --seeds 0", "--seeds 0 1 2"


def main() -> int:
    """Run what is asked for; each call prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("table", choices=(*TABLES, "all"))
    parser.add_argument("--full", action="store_true", help="three seeds, and each student's own number of epochs")
    parser.add_argument("--weights", type=Path, default=Path("runs/weights"), help="where dense weights are kept")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where the rows go")
    options = parser.parse_args()
    failed = 0
    for name in TABLES if options.table == "all" else (options.table,):
        print(f"{TABLES[name].title} ({'full' if options.full else 'one epoch: shows that it runs'})", flush=True)
        start = time.monotonic()
        for run in TABLES[name].runs:
            length = "full" if options.full else "short"
            command = [
                sys.executable, str(HERE / "train_and_prune.py"), str(options.data_dir), *run.split(),
                *(FULL if options.full else SHORT).split(), "--weights", str(options.weights / length),
                "--json", str(options.results / f"paper_{name}{'' if options.full else '_short'}.json"),
            ]  # fmt: skip
            failed |= subprocess.run(command, check=False).returncode
        print(f"{name}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
