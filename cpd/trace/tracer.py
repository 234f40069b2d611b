"""Trace: a model and its example inputs become an `OperationGraph`, an ATen-level FX graph with known shapes.

`torch.export` is used rather than `torch.fx.symbolic_trace`: it follows every Python forward that ends in
tensor operations, gives each node its shape, each parameter its name, and each node its module and line.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from cpd.errors import InputError, TraceError, first_line, let_through
from cpd.model.inputs import Call, as_call, as_exported, check_model, evaluating, in_mode, plain_attention
from cpd.model.state import code_memory_preserved, preserved
from cpd.model.tensors import every_tensor, plain_tensors
from cpd.plan import Cache
from cpd.trace.graph import MODEL_PREFIX, Answer, OperationGraph, Parts, is_user_code, op_name, writes_state
from cpd.trace.quiet import garbage_collection_paused, quiet
from cpd.trace.standins import StandIns, restore
from cpd.trace.values import answering, asked, reads_values

log = logging.getLogger(__name__)


def trace(model: nn.Module, example_inputs: Any) -> OperationGraph:
    """Export `model` (in eval mode; its modes are left as found) on `example_inputs`.

    A model that runs but cannot be exported whole (detection, say, whose post-processing depends on values) is traced
    by its largest submodules that can; what those give to the rest counts as the graph's output.

    Args:
        model: the model.
        example_inputs: a tensor, a tuple, or `(tuple, dict)`.

    Raises:
        InputError: if `model` is no module, or itself fails on `example_inputs`.
        TraceError: if the model runs, but neither it nor a part of it can be exported; the message names the line.
    """
    model = check_model(model)
    call = as_call(example_inputs)
    start = time.perf_counter()
    try:
        graph = _export_answered(model, call)
    except Exception as error:  # the user's forward may raise anything
        let_through(error)
        explained = _explain(model, call, error)
        parts = {} if isinstance(explained, InputError) else find_parts(model, call)
        if not parts:
            raise explained from error
        reason = str(explained).removesuffix(_REMEDY)
        log.warning("%s Falling back to the submodules that can be exported: %s.", reason, ", ".join(parts))
        graph = trace_parts(model, tuple(parts), Call(tuple(parts.values()), {}))
    if graph.values_read:
        log.warning(graph.values_sentence)
    return dataclasses.replace(graph, seconds=time.perf_counter() - start)


def trace_in_train_mode(model: nn.Module, call: Call) -> OperationGraph | None:
    """Export `model` in train mode (its modes are left as found); None where that fails."""
    try:
        return _export_answered(model, call, training=True)
    except Exception as error:  # the user's forward may raise anything
        let_through(error)
        log.warning(
            "The model cannot be traced in train mode, so layers that only run in train mode are not pruned: %s.",
            first_line(error),
        )
        return None


def retrace(model: nn.Module, graph: OperationGraph) -> OperationGraph:
    """Export a narrower copy of a model in the way that `graph` was.

    Raises:
        InputError: if the copy fails on the inputs.
        TraceError: if it runs, but cannot be exported.
    """
    try:
        found = _export(graph.runner(model), graph.call, graph.answers)
        return _of_parts(found, graph.parts) if graph.parts else found
    except Exception as error:  # the user's forward may raise anything
        let_through(error)
        raise _explain(graph.runner(model), graph.call, error) from error


def retrace_operations(model: nn.Module, graph: OperationGraph) -> OperationGraph | None:
    """The operations of a narrower copy alone, by the tracer inside `torch.export`: in half the time of an export.

    Returns:
        A graph whose nodes know neither their modules nor the names of the tensors, or None where that fails.
    """
    runner = graph.runner(model)
    state: dict[str, Tensor] = {**dict(runner.named_parameters()), **dict(runner.named_buffers())}
    leaves, layout = torch.utils._pytree.tree_flatten(graph.call)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(tensors: dict[str, Tensor], inputs: list[Tensor]) -> Any:
        given = list(leaves)
        for index, tensor in zip(places, inputs, strict=True):
            given[index] = tensor
        args, kwargs = torch.utils._pytree.tree_unflatten(given, layout)
        return torch.func.functional_call(runner, tensors, args, kwargs)

    with code_memory_preserved(model), evaluating(model), warnings.catch_warnings(), as_exported(), quiet(), StandIns():
        warnings.simplefilter("ignore")
        try:
            tracer = make_fx(forward, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
            with answering(graph.answers):
                module = tracer(state, [leaves[index] for index in places])
        except Exception as error:  # the user's forward may raise anything
            let_through(error)
            return None
    restore(module)
    return OperationGraph(module, {}, {}, (), graph.call, graph.parts)


def trace_parts(model: nn.Module, parts: tuple[str, ...], calls: Call) -> OperationGraph:
    """Export some submodules of `model` as one graph, every name in it as in `model`."""
    return _of_parts(_export_answered(Parts(model, parts), calls), parts)


def _of_parts(graph: OperationGraph, parts: tuple[str, ...]) -> OperationGraph:
    """The graph of some submodules of a model, every name in it as in the model."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix(MODEL_PREFIX), kind)
            for key, (path, kind) in stack.items()
            if path.startswith(MODEL_PREFIX)
        }
    tensors = {name: target.removeprefix(MODEL_PREFIX) for name, target in graph.tensors.items()}
    caches = tuple(dataclasses.replace(cache, module=cache.module.removeprefix(MODEL_PREFIX)) for cache in graph.caches)
    return dataclasses.replace(graph, tensors=tensors, parts=parts, caches=caches)


def _export_answered(model: nn.Module, call: Call, *, training: bool = False) -> OperationGraph:
    """Export a model; where that fails, or sizes depend on values, with those that it reads on the example inputs."""
    failure: Exception | None = None
    try:
        graph = _export(model, call, training=training)
        if not reads_values(graph.nodes):
            return graph
    except Exception as error:  # the user's forward may raise anything
        let_through(error)
        failure = error
    answers = asked(model, call, training=training)
    if failure is not None and not answers:
        raise failure
    graph = _export(model, call, answers, training=training)
    if reads_values(graph.nodes):
        raise TraceError("a size depends on values")
    return graph


def _export(
    model: nn.Module, call: Call, answers: tuple[Answer, ...] = (), *, training: bool = False
) -> OperationGraph:
    caches: list[Cache] = []

    def ended(*_: Any) -> None:  # older versions of export refuse a model that keeps tensors in attributes
        caches.extend(snapshot.caches())
        snapshot.restore(registered=False)

    with preserved(model) as snapshot, in_mode(model, training), warnings.catch_warnings(), plain_attention():
        warnings.simplefilter("ignore")
        handle = model.register_forward_hook(ended)
        # on failure export writes the whole graph to its log
        with quiet(), garbage_collection_paused(), StandIns(), answering(answers):
            try:
                program = torch.export.export(model, call.args, call.kwargs, strict=False)
            finally:
                handle.remove()
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    attributes = {name for name, tensor in plain_tensors(model).items() if tensor.numel() > 1}
    tensors = {
        name: spec.target
        for name, spec in kinds.items()
        if spec.target is not None
        and (spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) or spec.target in attributes)
    }
    constants = {
        name: program.constants[spec.target]
        for name, spec in kinds.items()
        if spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None and name not in tensors
    }
    inputs = tuple(name for name, spec in kinds.items() if spec.kind is InputKind.USER_INPUT)
    restore(program.graph_module)
    _inline_regions(program.graph_module)
    _name_once(program.graph_module, model)
    _drop_new_buffers(program.graph_module, tensors, every_tensor(model))
    layout = program.call_spec.out_spec
    return OperationGraph(
        program.graph_module, tensors, constants, inputs, call, layout=layout, answers=answers, caches=tuple(caches)
    )


def _drop_new_buffers(graph: GraphModule, tensors: dict[str, str], known: Mapping[str, Tensor]) -> None:
    """Leave out buffers that the forward registers first of all: they are computed, and nothing reads the old ones."""
    for node in [node for node in graph.graph.nodes if writes_state(node)]:
        if tensors.get(node.args[0].name) not in known:  # export may take the wrong one for the new buffer
            graph.graph.erase_node(node)
    for node in [node for node in graph.graph.nodes if tensors.get(node.name, "") not in ("", *known)]:
        if not node.users:
            graph.graph.erase_node(node)
            del tensors[node.name]


def _name_once(graph: GraphModule, model: nn.Module) -> None:
    """Give a module that is reached by several paths one of them, the first of `named_modules`, at every node."""
    every = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in model.named_modules()}
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        plain = {key: (str(path).split("@")[0], kind) for key, (path, kind) in stack.items()}
        node.meta["nn_module_stack"] = {
            key: (first[id(every[path])] if path in every else path, kind) for key, (path, kind) in plain.items()
        }


# ---------------------------------------------------------------- parts of a model that cannot be exported whole


def find_parts(model: nn.Module, call: Call) -> dict[str, Call]:
    """The largest submodules that a forward pass calls once and that can be exported, each with its inputs.

    A submodule that holds layers which are also called from elsewhere is none.
    """
    calls: dict[str, list[Call]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.setdefault(name, []).append(Call(args, dict(kwargs))),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model), torch.no_grad():
            with preserved(model):
                call.on(model)
            whole = {name: len(found) for name, found in calls.items()}
            recorded = {name: found[0] for name, found in calls.items()}
            found: dict[str, Call] = {}
            pending = [name for name, _ in model.named_children()]
            while pending:
                path = pending.pop(0)
                module = model.get_submodule(path)
                if not any(True for _ in module.parameters()):
                    continue
                if whole.get(path) == 1 and _stands_alone(module, path, recorded[path], calls, whole):
                    found[path] = recorded[path]
                else:
                    pending += [f"{path}.{name}" for name, _ in module.named_children()]
    finally:
        for handle in handles:
            handle.remove()
    return found


def _stands_alone(
    module: nn.Module, path: str, call: Call, calls: dict[str, list[Call]], whole: dict[str, int]
) -> bool:
    """Whether a submodule can be exported, and its layers are called by itself alone."""
    inner = [f"{path}.{name}" if name else path for name, _ in module.named_modules()]
    leaves = torch.utils._pytree.tree_leaves((call.args, call.kwargs))
    if not all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves):
        return False
    calls.clear()
    try:
        with preserved(module):
            call.on(module)
        if any(len(calls.get(name, ())) != whole.get(name, 0) for name in inner):
            return False
        _export_answered(module, call)
    except Exception as error:  # the user's forward may raise anything
        let_through(error)
        return False
    return True


def _inline_regions(module: GraphModule) -> None:
    """Put regions that export keeps as sub-graphs (under `no_grad`, `autocast`) in the place of their call.

    Checks that export adds at their edges go with them.
    """
    before = len(module.graph.nodes)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("wrap_with_"):
            continue
        place = next(index for index, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr")
        region = getattr(module, str(node.args[place].target))
        _inline_regions(region)
        inputs = [inner for inner in region.graph.nodes if inner.op == "placeholder"]
        values = dict(zip(inputs, node.args[place + 1 :], strict=True))
        with module.graph.inserting_before(node):
            result = module.graph.graph_copy(region.graph, values)
        for user in list(node.users):
            if not isinstance(result, Node):  # several results, each read by a getitem
                user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
                module.graph.erase_node(user)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if op_name(node).startswith("_assert_") and not node.users:
            module.graph.erase_node(node)
    if len(module.graph.nodes) != before:
        module.recompile()


_REMEDY = " No submodule can be exported either. Call cpd.comb on one that can, e.g. cpd.comb(model.backbone, …)."


def _explain(model: nn.Module, call: Call, error: Exception) -> InputError | TraceError:
    """Tell a model that does not run on its inputs from one that cannot be exported."""
    shapes = [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    try:
        with preserved(model), torch.no_grad(), evaluating(model):
            call.on(model)
    except Exception as own:
        let_through(own)
        return InputError(
            f"The model fails on the example inputs of shape {shapes}: {type(own).__name__}: {first_line(own)}. "
            "Pass example_inputs=(…) on which model(*example_inputs) runs."
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_code(frame.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return TraceError(f"torch.export cannot trace {type(model).__name__}{line}: {first_line(error)}.{_REMEDY}")
