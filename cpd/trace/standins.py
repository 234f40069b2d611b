"""Stand-ins for the recurrent ops while a model is traced.

Tensors without values go through `aten::lstm` one time step after the other, in Python: seconds for each layer. Its
results' shapes need no step, so during a trace an op with the same arguments that knows only those takes its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_SCHEMAS = {name: str(getattr(torch.ops.aten, name).input._schema) for name in NAMES}


def _shapes_only(
    input: Tensor,
    hx: list[Tensor] | Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Empty results: [*, directions x H] of the last layer, then the states, each like the one given."""
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:2], width)), *(torch.empty_like(state) for state in states)


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cpd::{_name}", _schema[_schema.index("(") :])
    torch.library.register_fake(f"cpd::{_name}")(_shapes_only)
_ORIGINAL = {getattr(torch.ops.cpd, name).default: getattr(torch.ops.aten, name).input for name in NAMES}
_STAND_INS = {op: stand_in for stand_in, op in _ORIGINAL.items()}


class StandIns(TorchFunctionMode):
    """While active, recurrent layers on a sequence that is not packed call their stand-in."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in NAMES and len(args) == 9 and isinstance(args[3], bool):
            return getattr(torch.ops.cpd, name)(*args)
        return func(*args, **(kwargs or {}))


def stand_in(target: Any) -> Any:
    """The stand-in of an op, or the op itself."""
    return _STAND_INS.get(target, target)


def restore(module: GraphModule) -> None:
    """Put the original ops in the place of their stand-ins in a traced graph."""
    found = [node for node in module.graph.nodes if node.target in _ORIGINAL]
    for node in found:
        node.target = _ORIGINAL[node.target]
    if found:
        module.recompile()
