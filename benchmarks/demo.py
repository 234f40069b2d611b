"""`cpd demo` as a row: accuracy, latency, parameters and MACs before and after, seconds in all.

python benchmarks/demo.py --json benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import results

from cpd.demo import run_demo


def main() -> int:
    """Run it, print and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    result = run_demo(seed=options.seed)
    report = result.report
    row = {
        "seed": options.seed,
        "seconds": time.perf_counter() - start,
        "speedup": result.speedup,
        "history": [row["metric"] for row in report.history],
        "table": [
            {"what": line.label, "original": line.before, "compressed": line.after, "change": line.change}
            for line in report.figure_rows
        ],
        **{f"{name}_before": value for name, value in report.original.to_dict().items()},
        **{f"{name}_after": value for name, value in report.result.to_dict().items()},
    }
    print(row)
    if options.json:
        results.write(options.json, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
