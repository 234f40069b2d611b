"""What `compress` leaves behind: nothing of ours, however often it runs.

Each export leaves a few hundred small objects (entries of the cache of fake tensors: tuples, frames of tracebacks,
symbols), in a loop of `torch.export.export` or `torch.onnx.export` alone as well. Those are torch's, and not counted.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

import cpd
from helpers.training import X, loader, net


def held() -> Counter[str]:
    """How many there are of what is ours or holds memory: models, tensors, objects of cpd, threads, files, hooks."""
    for _ in range(2):  # what a finalizer frees is found by the second
        gc.collect()
    found: Counter[str] = Counter()
    for item in gc.get_objects():
        kind = type(item)
        if str(kind.__module__).partition(".")[0] == "cpd":
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
        elif issubclass(kind, Tensor) and not issubclass(kind, FakeTensor):  # which torch keeps, without values
            found["tensors"] += 1
        elif issubclass(kind, nn.Module):
            found["modules"] += 1
        elif issubclass(kind, torch.fx.Node):
            found["nodes"] += 1
    found["threads"] = threading.active_count()
    if Path("/proc/self/fd").exists():
        found["files"] = len(os.listdir("/proc/self/fd"))
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    found["hooks"] = sum(map(len, hooks))
    return found


def test_nothing_of_ours_is_left_behind(tmp_path: Path) -> None:
    model, data = net(), loader(2)
    ours = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    def run(number: int) -> None:  # data, an output folder, a metric, a training
        cpd.compress(
            model, target_macs=0.6, data=data, example_inputs=X[:1], epochs=1, lr=1e-2, round_to=1,
            output_dir=tmp_path / str(number), evaluate=lambda _: 1.0, progress=False,
        )  # fmt: skip

    run(0)  # what is loaded or remembered once
    before = held()
    run(1)
    assert held() - before == Counter()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == ours
