"""Auxiliary branches: layers that a forward calls in train mode alone, as GoogLeNet's and Inception's classifiers.

The comb reads the forward in eval mode. A branch beside it reads the same channels, so it must follow them, or the
shrunk model could not be trained. Its own widths stay as they are: nothing becomes faster by narrowing them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cpd.errors import let_through
from cpd.model.inputs import Call, in_mode, plain_attention
from cpd.model.skeleton import skeleton
from cpd.model.state import code_memory_preserved
from cpd.model.tensors import every_tensor
from cpd.proof.replay import culprit
from cpd.trace.graph import Answer, OperationGraph
from cpd.trace.quiet import quiet
from cpd.trace.tracer import trace_in_train_mode
from cpd.trace.values import answering


def doubled_batch(call: Call) -> Call:
    """The call with every tensor twice along its first dimension: batch norm in train mode refuses a single value."""

    def repeat(leaf: object) -> object:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return Call(*pytree.tree_map(repeat, (call.args, call.kwargs)))


def auxiliary_graph(model: nn.Module, graph: OperationGraph) -> OperationGraph | None:
    """The operations in train mode, where layers run that `graph` does not hold; None where none do.

    Args:
        model: the model.
        graph: its operations in eval mode.
    """
    tensors = every_tensor(model)
    read = {id(tensors[graph.tensors[node.name]]) for node in graph.nodes if node.name in graph.tensors and node.users}
    unread = {
        path
        for path, module in model.named_modules()
        if any(id(parameter) not in read for parameter in module.parameters(recurse=False))
    }
    if graph.parts or not unread & _called_in_train_mode(model, graph.call, unread):
        return None
    return trace_in_train_mode(model, doubled_batch(graph.call))


def _called_in_train_mode(model: nn.Module, call: Call, paths: set[str]) -> set[str]:
    """Those of the modules at `paths` that a forward in train mode calls; all, where it does not run without values."""
    found: set[str] = set()
    if paths:
        copy = skeleton(model, {}, meta=True)
        for path in paths:
            copy.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: found.add(path))
        if fails_in_train_mode(copy, call) is not None:
            return paths
    return found


def fails_in_train_mode(model: nn.Module, call: Call, answers: tuple[Answer, ...] = ()) -> tuple[str, Exception] | None:
    """Run a model on the meta device in train mode; the module that it fails in and the error, None if it ends."""
    with (
        code_memory_preserved(model),
        in_mode(model, True),
        warnings.catch_warnings(),
        torch.no_grad(),
        plain_attention(),
        quiet(),
    ):
        warnings.simplefilter("ignore")
        try:
            with answering(answers):
                doubled_batch(call.to("meta")).on(model)
        except Exception as error:  # the user's forward may raise anything
            let_through(error)
            return culprit(model, error), error
    return None
