"""Time ONNX files in turn where this lies, and print the median of each in ms: `python3 time_onnx.py A.onnx B.onnx`.

`over_ssh` copies it to the device: it needs ONNX Runtime and NumPy there, and nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time

#: Seconds that are timed, and that a block of runs lasts about.
SECONDS, BLOCK = 5.0, 0.02


def main(paths: list[str], seconds: float = SECONDS) -> list[float]:
    """The median of the means of blocks of runs, in ms, of each file; blocks of all files follow one another."""
    import numpy as np
    import onnxruntime

    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    runs = []
    for path in paths:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {
            item.name: np.ones([size if isinstance(size, int) else 1 for size in item.shape], kinds[item.type])
            for item in session.get_inputs()
        }
        start = time.perf_counter()
        for _ in range(3):
            session.run(None, feeds)
        runs.append((session, feeds, max(1, round(3 * BLOCK / (time.perf_counter() - start)))))
    times: list[list[float]] = [[] for _ in paths]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for found, (session, feeds, repeat) in zip(times, runs, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                session.run(None, feeds)
            found.append((time.perf_counter() - start) / repeat * 1e3)
    return [statistics.median(found) for found in times]


if __name__ == "__main__":
    print("\n".join(f"{ms:.6f}" for ms in main(sys.argv[1:])))
