"""Which ops of torch's registry the rules cover: how many, and which of the core set none does, and why.

    python benchmarks/rules.py            # a table of the ops of torch's core set without a rule
    python benchmarks/rules.py --json out.json

A forward that is exported calls the ops that its author wrote (`conv2d`), not the kernels that those end in
(`convolution`), so much of the core set never meets a rule. `docs/algebra.md` explains the kinds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import results
import torch
from torch._ops import OpOverload
from torch.fx import Graph

from cpd.rules.base import find
from cpd.trace.pointwise import is_pointwise

#: Why an op of the core set needs no rule, by its name; the first that fits.
WHY = (
    (r".*_backward(_data)?|backward", "a gradient: no forward calls it"),
    (r"sym_\w+|_local_scalar_dense|item", "gives a number, not a tensor"),
    (r"nonzero\w*|masked_select|_unique2", "its shape depends on values"),
    (r"resize_|empty_strided|set_", "memory as such"),
    (
        r"(_?native_\w+|convolution|_adaptive_\w+|_cdist_forward|_pdist_forward|_embedding_bag|_fft_\w+)",
        "the kernel of an op that has a rule; an export keeps that op",
    ),
)


def registry() -> Iterator[OpOverload]:
    """Every overload of every ATen op."""
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if namespace == "aten" and op is not None:
            yield op


def why(name: str) -> str:
    """Why an op of the core set has no rule."""
    return next((reason for pattern, reason in WHY if re.fullmatch(pattern, name)), "to be written")


def coverage() -> dict[str, object]:
    """How many ops have a rule, of all and by kind; which of the core set have none."""
    rows = [(op, find(Graph().call_function(op)) is not None) for op in registry()]
    kinds = {
        "all": [found for _, found in rows],
        "pointwise by tag": [found for op, found in rows if torch.Tag.pointwise in op.tags],
        "pointwise by decomposition": [
            found for op, found in rows if torch.Tag.pointwise not in op.tags and is_pointwise(op)
        ],
        "core": [found for op, found in rows if torch.Tag.core in op.tags],
    }
    names = sorted(
        {op._schema.name.removeprefix("aten::") for op, found in rows if torch.Tag.core in op.tags and not found}
    )
    return {
        "torch": torch.__version__,
        "overloads": {kind: {"with a rule": sum(found), "of": len(found)} for kind, found in kinds.items()},
        "core without a rule": {name: why(name) for name in names},
    }


def main() -> None:
    """Print the table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    found = coverage()
    print(f"torch {found['torch']}: overloads with a rule")
    for kind, counts in found["overloads"].items():  # type: ignore[attr-defined]
        print(f"  {kind:<28}{counts['with a rule']:>6} of {counts['of']}")
    print("\nOps of the core set without a rule")
    for name, reason in found["core without a rule"].items():  # type: ignore[attr-defined]
        print(f"  {name:<40}{reason}")
    if options.json is not None:
        results.write(options.json, found)


if __name__ == "__main__":
    main()
