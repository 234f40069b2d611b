"""Comb, shrink by 30 % at random, and put the result through every oracle: `python benchmarks/oracles.py MODEL …`.

A model is `timm:NAME`, `torchvision:NAME`, `resnet56` or `fault:NAME` (`benchmarks/faults.py`); its weights are random,
norms and their statistics too.

| check | passes if |
|---|---|
| masked | float64: the unpruned model with removed slices zero gives what the shrunk one gives, to 1e-9 (1e-4 where the forward itself computes in float32) |
| shapes | every node of the shrunk model's own graph has the shape that the comb predicts |
| class | the model's class, and that of every submodule, is what it was |
| onnx | ONNX Runtime agrees with PyTorch on the shrunk model to 1e-3, where the unpruned model exports at all |
| again | the shrunk model can be combed again, finds the same groups at the kept widths, and can be shrunk again |
| train | forward, backward and an optimizer step run in train mode at another batch size |
| reload | saved, and loaded in a fresh process, it gives the same outputs to the bit |
| warm | with `--warm`: the groups are the same after a forward in eval mode (with gradients and without) and in train mode, and comb and export leave every attribute the object that it was, cached tensors too |
"""  # noqa: E501

from __future__ import annotations

import argparse
import collections
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import results
import torch
from faults import FAULTS
from models import random_branches, random_plan, randomize, resnet56
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from warm import check_warm

import cpd
from cpd.coupling.comb import Comb
from cpd.coupling.groups import Group
from cpd.model import sources
from cpd.model.inputs import Call, as_call
from cpd.model.tensors import copy_of
from cpd.plan import Plan, removes
from cpd.report.artifacts import save_result
from cpd.report.records import Figures
from cpd.report.report import Report
from cpd.surgery.masked import masked_error, shape_mismatch
from cpd.trace.graph import op_name
from cpd.trace.tracer import retrace

CHECKS = ("masked", "shapes", "class", "onnx", "again", "train", "reload", "warm")
DEFAULT = [
    "timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100", "timm:densenet121", "timm:convnext_atto",
    "timm:vit_tiny_patch16_224", "torchvision:swin_t", "torchvision:shufflenet_v2_x1_0", "resnet56",
]  # fmt: skip


def build(name: str) -> tuple[nn.Module, Any]:
    """A model in eval mode with random weights, and an input of batch 1 that it takes."""
    if name == "resnet56":
        return randomize(resnet56()), torch.randn(1, 3, 32, 32)
    if name.startswith("fault:"):
        torch.manual_seed(0)
        fault = FAULTS[name.removeprefix("fault:")]
        return randomize(fault.make().eval()), fault.inputs()
    source = sources.resolve(name)
    model = randomize(source.build().eval())
    return model, sources.default_inputs(model, source)


def double(value: Any) -> Any:
    """A model, or inputs, in float64."""
    if isinstance(value, nn.Module):
        return copy_of(value).double()
    return pytree.tree_map(lambda leaf: leaf.double() if _is_float(leaf) else leaf, value)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _float_type(model: nn.Module) -> torch.dtype:
    """The type of a model's real parameters; it may have complex ones beside."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def outputs_of(model: nn.Module, call: Call) -> list[Tensor]:
    """Every tensor that the model gives, without gradients."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(call.on(model)) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------------- the oracles


def check_masked(dense: nn.Module, comb: Comb, plan: Plan) -> str:
    """Masked equals shrunk, in the dtype that the comb was made in."""
    shrunk = cpd.shrink(copy_of(dense), plan)
    error = masked_error(dense, shrunk, comb, plan)
    single = next(dense.parameters()).dtype is torch.float32
    low = single or any(
        "float32" in str((*n.args, n.kwargs)) for n in comb.operations.operations if op_name(n) in _CASTS
    )
    assert error <= (1e-4 if low else 1e-9), f"relative difference {error:.1e}"
    return f"{error:.0e}"


_CASTS = ("to", "_to_copy", "arange", "full", "zeros", "ones")


def check_all_removed(dense: nn.Module, comb: Comb) -> str:
    """Every branch that can go, of each sum one, removed at once: masked equals removed, all widths whole."""
    plan = comb.plan({}, remove=random_branches(comb, 1.0))
    return check_masked(dense, comb, plan) if plan.removed else "none"


def check_shapes(comb: Comb, plan: Plan, again: Comb) -> str:
    """The shrunk model's own graph has the predicted shapes, node by node.

    Parts are traced on the inputs that those of the unpruned model had: how many boxes they get depends on values.
    """
    graph = retrace(again.model, comb.operations) if comb.operations.parts else again.operations
    assert (found := shape_mismatch(comb, plan, graph)) is None, found
    return "ok"


def check_class(original: nn.Module, small: nn.Module, plan: Plan) -> str:
    """The same classes everywhere, but where a branch has gone."""
    assert type(small) is type(original), f"{type(original)} became {type(small)}"
    replaced = {item.module for item in plan.replacements}
    left = [(path, module) for path, module in original.named_modules() if not removes(plan.replacements, path)]
    pairs = zip(left, small.named_modules(), strict=True)
    for (path, old), (_, new) in pairs:
        assert path in replaced or type(old) is type(new), f"{path}: {type(old)} became {type(new)}"
    return "ok"


def check_onnx(original: nn.Module, small: nn.Module, call: Call) -> str:
    """ONNX Runtime against PyTorch on the shrunk model."""
    try:
        serialised = cpd.export_onnx(small, call, check=False)
        error = cpd.deploy.export.onnx_parity(small, serialised, call)
        assert error < 1e-3, f"relative difference {error:.1e}"
    except Exception as failure:
        try:
            serialised = cpd.export_onnx(original, call, check=False)
            error = cpd.deploy.export.onnx_parity(original, serialised, call)
            assert error < 1e-3, f"unpruned: relative difference {error:.1e}"
        except Exception as own:
            return f"n/a: unpruned, {_line(own)}"
        raise failure
    return f"{error:.0e}"


def check_again(comb: Comb, plan: Plan, again: Comb, share: float) -> str:
    """The same groups of each layer at the kept widths; a second shrink, and a forward pass of what it leaves.

    A group of which one position is left is none, so the numbers in the names behind it may move up.
    """
    found = collections.Counter((_layer(group), group.size, group.frozen is None) for group in again.groups)
    for group in comb.open:
        kept = len(plan.groups[group.name])
        if kept > 1:
            same = found[_layer(group), kept, True] + found[_layer(group), kept, False] * bool(group.ties)
            assert same, f"{group.name}: {kept} kept, no such open group of this layer the second time"
    smaller = cpd.shrink(copy_of(again.model), random_plan(again, share, seed=1, at_least=1))
    outputs_of(again.operations.runner(smaller), again.operations.call)
    return "ok"


def _layer(group: Group) -> str:
    return group.name.partition("#")[0]


def check_train(small: nn.Module, call: Call, comb: Comb) -> str:
    """One step of SGD in train mode at batch 3; of the parts alone, where the whole cannot be exported."""
    model = comb.operations.runner(copy_of(small)).train()
    if comb.operations.parts:
        call = Call(
            pytree.tree_map(lambda leaf: leaf.float() if _is_float(leaf) else leaf, comb.operations.call.args), {}
        )
    args = pytree.tree_map(lambda leaf: torch.cat([leaf] * 3) if isinstance(leaf, Tensor) else leaf, call.args)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    leaves = [leaf for leaf in pytree.tree_leaves(model(*args, **call.kwargs)) if _is_float(leaf) and leaf.grad_fn]
    assert leaves, "no output carries a gradient"
    sum(leaf.square().mean() for leaf in leaves).backward()
    optimizer.step()
    return "ok"


def check_reload(name: str, small: nn.Module, plan: Plan, call: Call) -> str:
    """Saved, and loaded in a fresh process: the same outputs to the bit."""
    if name == "resnet56" or name.startswith("fault:"):
        return "n/a: has no name to rebuild it by"
    with tempfile.TemporaryDirectory() as folder:
        figures = Figures(0, 0, 0)
        report = Report({}, type(small).__qualname__, name, "", "", "", figures, figures)
        save_result(Path(folder), small, plan, report, None)
        inputs = [leaf.contiguous() for leaf in pytree.tree_leaves(call.args) if isinstance(leaf, Tensor)]
        torch.save(call.args, f"{folder}/inputs.pt")
        command = [sys.executable, __file__, "--reload", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
        found = load_file(f"{folder}/outputs.safetensors")
        expected = outputs_of(small, call)
        assert inputs, "nothing was given to the model"
        assert len(found) == len(expected), f"{len(found)} outputs, {len(expected)} expected"
        assert all(torch.equal(found[str(i)], tensor) for i, tensor in enumerate(expected)), "outputs differ"
    return "ok"


def _reload(folder: str) -> None:
    torch.set_num_threads(1)
    model = cpd.load(folder)
    args = torch.load(f"{folder}/inputs.pt")
    outputs = outputs_of(model, Call(args, {}))
    tensors = {str(index): tensor.contiguous().clone() for index, tensor in enumerate(outputs)}
    save_file(tensors, f"{folder}/outputs.safetensors")


# ---------------------------------------------------------------------------------- one model


def examine(
    name: str, share: float, seed: int, skip: tuple[str, ...], note: Callable[[dict[str, Any]], None],
    branches: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One model through comb, plan, shrink and the oracles; `note` is given the row after every stage."""
    start = time.perf_counter()
    model, inputs = build(name)
    row: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "commit": _commit(),
    }
    row["build_s"] = time.perf_counter() - start
    dense, call = double(model), as_call(double(inputs))
    try:
        outputs_of(copy_of(dense), call)
    except RuntimeError:  # the forward itself makes tensors of float32
        dense, call = copy_of(model), as_call(inputs)
    row["dtype"] = str(next(dense.parameters()).dtype).removeprefix("torch.")
    start = time.perf_counter()
    cpd.comb(nn.Linear(2, 2), torch.zeros(1, 2))  # the first export of a process imports torch's compiler
    row["import_s"] = time.perf_counter() - start
    start = time.perf_counter()
    comb = cpd.comb(dense, call)
    row |= {"comb_s": time.perf_counter() - start, "trace_s": comb.operations.seconds}
    note(row)
    row |= {
        "nodes": len(comb.operations.operations),
        "parts": list(comb.operations.parts),
        "groups": len(comb.groups),
        "open": len(comb.open),
        "exact": sum(group.exact for group in comb.open),
        "open_parameters": comb.open_share["parameters"],
        "open_macs": comb.open_share["macs"],
        "unknown": list(comb.unknown),
        "reasons": frozen_reasons(comb),
    }
    start = time.perf_counter()
    found = comb.branches if branches else ()
    row |= {
        "branches": len(found),
        "open_branches": sum(branch.frozen is None for branch in found),
        "branch_reasons": list(dict.fromkeys(str(branch.frozen) for branch in found if branch.frozen))[:4],
        "branches_s": time.perf_counter() - start,
    }
    note(row)
    plan = random_plan(comb, share, seed=seed, at_least=1)
    if branches:
        removed = random_branches(comb, share, seed=seed)
        plan = comb.plan(plan.groups, remove=removed)
        row |= {"removed": len(removed), "all_removed": check_all_removed(dense, comb)}
    start = time.perf_counter()
    small = cpd.shrink(copy_of(model), plan)
    row["shrink_s"] = time.perf_counter() - start
    row["parameters_left"] = sum(p.numel() for p in small.parameters()) / row["parameters"]
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note(row)
    again: list[Comb] = []

    def second() -> Comb:
        if not again:
            again.append(cpd.comb(copy_of(small).to(next(dense.parameters()).dtype), call))
        return again[0]

    call32 = as_call(inputs)
    stages: dict[str, Callable[[], str]] = {
        "masked": lambda: check_masked(dense, comb, plan),
        "shapes": lambda: check_shapes(comb, plan, second()),
        "class": lambda: check_class(model, small, plan),
        "onnx": lambda: check_onnx(model, small, call32),
        "again": lambda: check_again(comb, plan, second(), share),
        "train": lambda: check_train(small, call32, comb),
        "reload": lambda: check_reload(name, small, plan, call32),
        "warm": lambda: check_warm(lambda: build(name)[0].to(_float_type(dense)), call, comb),
    }
    for stage in CHECKS:
        if stage in skip:
            continue
        start = time.perf_counter()
        try:
            row[stage] = stages[stage]()
        except Exception as error:
            row[stage] = f"FAILED: {_line(error)}"
            row[f"{stage}_traceback"] = "".join(traceback.format_exception(error)[-12:])
        row[f"{stage}_s"] = time.perf_counter() - start
        note(row)
    return row


def _commit() -> str:
    """The commit of this checkout, with a plus sign where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def frozen_reasons(comb: Comb) -> list[str]:
    """The frozen widths with the most parameters along them that no open group holds, and why."""
    opened = {member.tensor for group in comb.open for member in group.members}

    def closed(group: Group) -> int:
        names = {member.tensor for member in group.members} - opened
        return sum(attrgetter(name)(comb.model).numel() for name in names)

    frozen = [group for group in comb.groups if group.frozen is not None and group.size > 1]
    return [f"{group.name}[{group.size}]: {group.frozen}" for group in sorted(frozen, key=closed, reverse=True)[:8]]


def passed(row: dict[str, Any]) -> bool:
    """Whether every check that was made passed."""
    return "error" not in row and not any(str(row.get(check, "")).startswith("FAILED") for check in CHECKS)


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """The figures of some models, a row each."""
    names = ["model", "params", "nodes", "groups", "open", "open params", "open MACs", "left", "branches", "open",
             "all removed", *CHECKS, "trace s", "comb s", "branches s", "shrink s", "MiB"]  # fmt: skip
    table = Table(*names, title=title)
    for row in rows:
        if "open_parameters" not in row:
            table.add_row(row["model"], str(row.get("error", "?"))[:100])
            continue
        table.add_row(
            row["model"], f"{row['parameters'] / 1e6:.1f} M", str(row["nodes"]), str(row["groups"]), str(row["open"]),
            f"{row['open_parameters']:.1%}", f"{row['open_macs']:.1%}", f"{row.get('parameters_left', 1):.1%}",
            *(str(row.get(key, "-")) for key in ("branches", "open_branches", "all_removed")),
            *(str(row.get(check, "-")).split(":")[0] for check in CHECKS),
            *(f"{row.get(key, 0):.1f}" for key in ("trace_s", "comb_s", "branches_s", "shrink_s")),
            f"{row.get('peak_mib', 0):.0f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Check every model named; exit code 1 if an oracle fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT, metavar="MODEL")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", default=[], choices=CHECKS, help="checks to leave out")
    parser.add_argument("--warm", action="store_true", help="comb after forwards too")
    parser.add_argument(
        "--branches", action="store_true", help="that share of the branches goes too; then all that can"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.reload:
        _reload(options.reload)
        return 0
    torch.set_num_threads(1)
    skip = (*options.skip, *(() if options.warm else ("warm",)))
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        if options.json:
            results.write(options.json, [*rows, row])

    for name in options.models:
        try:
            row = examine(name, options.share, options.seed, skip, note, options.branches)
        except Exception as error:
            row = {"model": name, "error": _line(error), "traceback": traceback.format_exc()}
        note(row)
        rows.append(row)
    Console(width=220).print(table_of(rows, f"{options.share:.0%} of every open group removed"))
    return int(not all(passed(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
