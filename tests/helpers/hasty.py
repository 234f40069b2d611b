"""What makes a process of the tests quick: timings for a moment; exports that share what they look up.

`python -m helpers.hasty ARGUMENTS` is `cpd` with that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._export import utils
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

from cpd.cli import main
from cpd.deploy import kernels, latency, rounds
from cpd.jobs import compress
from cpd.selection import search


def hasten(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Time models and kernels for a moment, and let exports share what is the same for all.

    An export of a small model takes a third then: it reads the sources of 500 operators for the translations of the
    exporter, and asks the dispatcher twice for all operators that are made of others.

    Args:
        put: sets an attribute; that of a `pytest.MonkeyPatch` puts it back later.
    """
    for place, name, value in (
        (kernels, "SECONDS", 0.02), (rounds, "_BLOCK_MS", 2.0), (rounds, "_LEAD_MS", 1.0),
        (rounds, "_WARM_UP_MS", 10.0),
        (compress, "FINAL_SECONDS", 0.25), (compress, "PROFILE_SECONDS", 0.02), (compress, "ELSEWHERE_SECONDS", 0.05),
        (search, "SECONDS", 0.25), (latency, "timed_apart", lambda *_: None),
    ):  # fmt: skip
        put(place, name, value)
    put(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
    collect, name = utils._collect_all_valid_cia_ops, "_collect_all_valid_cia_ops"
    known = functools.cache(lambda libraries: collect())
    for place in (utils, decomp_utils, exported_program):
        put(place, name, lambda: known(tuple(torch.ops._dir)))


def command_line(*arguments: str) -> None:
    """`cpd` with these arguments, as all that a process does."""
    sys.argv = ["cpd", *arguments]
    main()


if __name__ == "__main__":
    hasten()
    main()
