"""Torch-Pruning on one model, in the way of its own timm example: `python benchmarks/peer.py MODEL FILE.json`.

Started by `coverage.py --peer`, which installs the peer. Group magnitude, uniform ratio 0.5, widths in multiples of 8,
the classifier ignored, attention heads given by hand and set by hand afterwards. Nothing checks the values.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import counted_macs
from oracles import build
from torch import nn

from cpd.model import sources
from cpd.model.inputs import as_call

#: Outputs of torchvision's segmentation models.
SEGMENTATION_CLASSES = 21


def main(name: str, file: Path) -> None:
    """Write {"outcome", "seconds", "parameters_left"}."""
    import torch_pruning as tp

    torch.set_num_threads(1)
    model, inputs = build(name)
    before, row = sum(p.numel() for p in model.parameters()), {"outcome": "raises"}

    def write(**found: Any) -> None:
        row.update(found)
        file.write_text(json.dumps(row))

    with torch.no_grad():
        expected = _shapes(model(*inputs) if isinstance(inputs, tuple) else model(inputs))
    try:
        start = time.perf_counter()
        narrowed(tp, model, inputs, 0.5)
        seconds = time.perf_counter() - start
    except Exception as error:
        return write(outcome=f"raises: {type(error).__name__}: {error}"[:200])
    try:
        with torch.no_grad():
            found = _shapes(model(*inputs) if isinstance(inputs, tuple) else model(inputs))
    except Exception as error:
        return write(outcome=f"forward broken: {type(error).__name__}: {error}"[:200], seconds=seconds)
    left = sum(p.numel() for p in model.parameters()) / before
    outcome = "output shape changed" if found != expected else "nothing removed" if left == 1 else "runs, smaller"
    return write(outcome=outcome, seconds=seconds, parameters_left=left)


def narrowed(tp: Any, model: nn.Module, inputs: Any, ratio: float) -> nn.Module:
    """`model` with every group narrower by this share, in multiples of 8; classifiers and heads as its examples do."""
    heads, ignored = {}, []
    classes = getattr(model, "num_classes", 1000)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == classes:
            ignored.append(module)
        if isinstance(module, nn.Conv2d) and module.out_channels == SEGMENTATION_CLASSES:
            ignored.append(module)
        if hasattr(module, "num_heads"):
            for part in ("qkv", "qkv_proj"):
                if isinstance(getattr(module, part, None), nn.Linear):
                    heads[getattr(module, part)] = module.num_heads
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=ratio, round_to=8,
        ignored_layers=ignored, num_heads=heads, prune_num_heads=False, prune_head_dims=True,
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        for part in ("qkv", "qkv_proj"):
            layer = getattr(module, part, None)
            if isinstance(layer, nn.Linear) and layer in pruner.num_heads:
                module.num_heads = pruner.num_heads[layer]
                module.head_dim = layer.out_features // (3 * module.num_heads)
    return model


def with_macs(tp: Any, name: str, wanted: float, *, seconds: int) -> tuple[nn.Module, float]:
    """timm's model `name` with the ratio whose share of the MACs is nearest to the one wanted, and its share.

    Raises:
        TimeoutError: if that takes longer than `seconds`.
    """
    with limited(seconds):
        low, high = 0.0, 0.95  # by MACs, which need no export
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if with_ratio(tp, name, middle)[1] > wanted else (low, middle)
        found = (with_ratio(tp, name, ratio) for ratio in (low, high) if ratio)
        return min(found, key=lambda item: abs(item[1] - wanted))


def with_ratio(tp: Any, name: str, ratio: float) -> tuple[nn.Module, float]:
    """timm's model `name`, from seed 0, with this ratio, and its share of the MACs."""
    torch.manual_seed(0)
    model = sources.resolve(name).build().eval()
    inputs = sources.default_inputs(model)
    call = as_call(inputs)
    full = counted_macs(model, call)
    found = narrowed(tp, model, inputs, ratio)
    for module in found.modules():  # not in its example, but timm's attention asks for it
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.num_heads * module.head_dim
    return found.eval(), counted_macs(found, call) / full


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in a block that takes longer."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _shapes(output: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
