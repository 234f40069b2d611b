"""Trace: a model and its example inputs become an `OperationGraph`, an ATen-level FX graph with known shapes.

`torch.export` is used rather than `torch.fx.symbolic_trace`: it follows every Python forward that ends in
tensor operations, gives each node its shape, each parameter its name, and each node its module and line.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from cpd.errors import InputError, TraceError, first_line
from cpd.model.inputs import Call, as_call, as_exported, check_model, evaluating, in_mode, plain_attention
from cpd.trace.standins import StandIns, restore

log = logging.getLogger(__name__)
_EXPORTER_LOGGERS = (
    "torch", "torch._subclasses.fake_tensor", "torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir",
)  # fmt: skip
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False)
class OperationGraph:
    """The operations of one forward pass.

    Attributes:
        module: the exported `GraphModule`; parameters, buffers and constants are its first placeholders.
        tensors: placeholder name -> name of the parameter or buffer in the model.
        constants: placeholder name -> the tensor that the forward uses without registering it.
        inputs: names of the placeholders that are the user's inputs, in order.
        call: the example inputs; those of each part, where the model cannot be traced whole.
        parts: paths of the submodules that were traced in the model's place, where it cannot be traced whole.
        seconds: wall-clock time that the export took.
    """

    module: GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    call: Call
    parts: tuple[str, ...] = ()
    seconds: float = 0.0

    def runner(self, model: nn.Module) -> nn.Module:
        """What `call` is a call of: `model` itself, or its parts."""
        return Parts(model, self.parts) if self.parts else model

    @property
    def nodes(self) -> list[Node]:
        """All nodes in the order of execution."""
        return list(self.module.graph.nodes)

    @property
    def operations(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.nodes if node.op == "call_function"]

    def constant(self, node: Node) -> Tensor | None:
        """The value of a node that holds one element and follows from constants alone; None for any other."""
        value = node.meta.get("val")
        if node.op == "placeholder":
            found = self.constants.get(node.name)
        elif node.op == "get_attr":
            found = getattr(self.module, str(node.target))
        elif isinstance(value, Tensor) and value.numel() == 1 and callable(node.target) and node.all_input_nodes:
            known = {source: self.constant(source) for source in node.all_input_nodes}
            if any(item is None for item in known.values()):
                return None
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
            found = node.target(*args, **kwargs)
        else:
            return None
        return found.clone() if isinstance(found, Tensor) and found.numel() == 1 else None

    def digraph(self) -> nx.DiGraph:
        """The graph as `networkx.DiGraph`: a node a name, with `op`, `module`, `shape` and `line`."""
        graph = nx.DiGraph()
        for node in self.nodes:
            name = self.tensors.get(node.name, node.name)
            graph.add_node(name, op=op_name(node), module=owner(node), shape=shape_of(node), line=line_of(node))
            for source in node.all_input_nodes:
                graph.add_edge(self.tensors.get(source.name, source.name), name)
        return graph


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
    check_model(model)
    call = as_call(example_inputs)
    start = time.perf_counter()
    try:
        graph = _export(model, call)
    except Exception as error:  # the user's forward may raise anything
        explained = _explain(model, call, error)
        parts = {} if isinstance(explained, InputError) else find_parts(model, call)
        if not parts:
            raise explained from error
        reason = str(explained).removesuffix(_REMEDY)
        log.warning("%s What can be traced of it is combed: %s.", reason, ", ".join(parts))
        graph = trace_parts(model, tuple(parts), Call(tuple(parts.values()), {}))
    return dataclasses.replace(graph, seconds=time.perf_counter() - start)


def trace_in_train_mode(model: nn.Module, call: Call) -> OperationGraph | None:
    """Export `model` in train mode (its modes are left as found); None where that fails."""
    try:
        return _export(model, call, training=True)
    except Exception as error:  # the user's forward may raise anything
        log.warning(
            "The model cannot be traced in train mode, so layers that run only then stay as they are: %s.",
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
        return trace_parts(model, graph.parts, graph.call) if graph.parts else _export(model, graph.call)
    except Exception as error:  # the user's forward may raise anything
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

    with evaluating(model), warnings.catch_warnings(), as_exported(), quiet(), StandIns():
        warnings.simplefilter("ignore")
        try:
            tracer = make_fx(forward, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
            module = tracer(state, [leaves[index] for index in places])
        except Exception:  # the user's forward may raise anything
            return None
    restore(module)
    return OperationGraph(module, {}, {}, (), graph.call, graph.parts)


def trace_parts(model: nn.Module, parts: tuple[str, ...], calls: Call) -> OperationGraph:
    """Export some submodules of `model` as one graph, every name in it as in `model`."""
    graph = _export(Parts(model, parts), calls)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix(_MODEL), kind) for key, (path, kind) in stack.items() if path.startswith(_MODEL)
        }
    tensors = {name: target.removeprefix(_MODEL) for name, target in graph.tensors.items()}
    return dataclasses.replace(graph, tensors=tensors, parts=parts)


def _export(model: nn.Module, call: Call, *, training: bool = False) -> OperationGraph:
    with in_mode(model, training), warnings.catch_warnings(), plain_attention():
        warnings.simplefilter("ignore")
        with quiet(), growing(), StandIns():  # on failure export writes the whole graph to its log
            program = torch.export.export(model, call.args, call.kwargs, strict=False)
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {
        name: spec.target
        for name, spec in kinds.items()
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None
    }
    constants = {
        name: program.constants[spec.target]
        for name, spec in kinds.items()
        if spec.kind is InputKind.CONSTANT_TENSOR and spec.target is not None
    }
    inputs = tuple(name for name, spec in kinds.items() if spec.kind is InputKind.USER_INPUT)
    restore(program.graph_module)
    _inline_regions(program.graph_module)
    _name_once(program.graph_module, model)
    return OperationGraph(program.graph_module, tensors, constants, inputs, call)


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


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings, log lines and graph print-outs from the user, who can act on none of them."""
    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def growing() -> Iterator[None]:
    """No search for garbage in a block: while a large graph grows there is little, and looking takes a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---------------------------------------------------------------- parts of a model that cannot be exported whole

_MODEL = "model."


class Parts(nn.Module):
    """Runs some submodules of a model, each on its own inputs: what is exported where the whole cannot be.

    Args:
        model: the model.
        paths: of the submodules.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.paths = paths

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
        """The output of each submodule on its own (args, kwargs)."""
        return [
            self.model.get_submodule(path)(*args, **kwargs)
            for path, (args, kwargs) in zip(self.paths, calls, strict=True)
        ]


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
        call.on(module)
        if any(len(calls.get(name, ())) != whole.get(name, 0) for name in inner):
            return False
        _export(module, call)
    except Exception:  # the user's forward may raise anything
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


_REMEDY = " Nor any part of it alone: comb a submodule that can be traced, e.g. cpd.comb(model.backbone, …)."


def _explain(model: nn.Module, call: Call, error: Exception) -> InputError | TraceError:
    """Tell a model that does not run on its inputs from one that cannot be exported."""
    shapes = [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    try:
        with torch.no_grad(), evaluating(model):
            call.on(model)
    except Exception as own:
        return InputError(
            f"The model fails on the example inputs of shape {shapes}: {type(own).__name__}: {own}. "
            "Pass example_inputs=(…) on which model(*example_inputs) runs."
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_user_code(frame.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return TraceError(f"torch.export cannot trace {type(model).__name__}{line}: {first_line(error)}.{_REMEDY}")


def _is_user_code(filename: str) -> bool:
    return not filename.startswith((_TORCH, "<", str(Path(__file__).parents[1])))


# ---------------------------------------------------------------- what a node knows about itself


def op_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`; the node's kind for placeholders and outputs."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the node's tensor; `()` where it has none."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def owners(node: Node) -> list[str]:
    """Paths of the modules whose forward the node was called in, innermost first; "" is the model."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[::-1] or [""]


def owner(node: Node) -> str:
    """Path of the innermost module that called the node."""
    return owners(node)[0]


def line_of(node: Node) -> str:
    """`file:line` of the innermost line of the user's code that called the node."""
    trace_lines = (node.meta.get("stack_trace") or "").splitlines()
    places = []
    for text in trace_lines:
        if text.strip().startswith('File "'):
            filename, number = text.strip().split('"')[1], text.split("line ")[1].split(",")[0]
            places.append((filename, number))
    mine = [place for place in places if _is_user_code(place[0])] or places
    return f"{Path(mine[-1][0]).name}:{mine[-1][1]}" if mine else "unknown line"


#: Ops that compute nothing: left out where a tensor is laid out so already, which may depend on a width, or kept as
#: the edge of a sub-graph.
_IDLE = {"contiguous", "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_assert_tensor_metadata"}


def pair(old: OperationGraph, new: OperationGraph) -> tuple[dict[Node, Node], Node | None]:
    """Each operation of one graph beside its twin in the graph of the same model at other widths.

    Returns:
        The pairs, and the first operation of `old` that has no twin; None where all have one.
    """
    left, right = ([n for n in graph.operations if op_name(n) not in _IDLE] for graph in (old, new))
    pairs: dict[Node, Node] = {}
    for before, after in zip(left, right, strict=False):
        if op_name(before) != op_name(after):
            return pairs, before
        pairs[before] = after
    return pairs, None if len(left) == len(right) else left[min(len(left), len(right)) - 1]
