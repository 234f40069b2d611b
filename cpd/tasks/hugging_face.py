"""Models of Hugging Face transformers: their batches, their own losses, the parts of their outputs that matter.

The arguments of a model are known from the signature of its forward, its outputs from their names; no architecture is
named here. transformers itself is not imported: whoever has such a model has installed it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cpd.errors import InputError
from cpd.model.inputs import Call, as_call, device_of, evaluating, move
from cpd.model.outputs import Outputs, reader
from cpd.options import Check, integer, is_function
from cpd.tasks.task import Task, TaskBatches

#: Arguments of a forward that are targets; other names of the first of them in data sets.
LABELS = ("labels", "mask_labels", "class_labels", "start_positions", "end_positions", "next_sentence_label")
ALIASES = {"label": "labels", "label_ids": "labels"}
#: The parts of an output that matter. The loss of the distillation applies to the first that an output has.
MATTER = (
    "logits", "predicted_depth", "class_queries_logits", "logits_per_image", "start_logits", "prediction_logits",
    "reconstruction", "pred_boxes", "pred_masks", "masks_queries_logits", "logits_per_text", "end_logits",
    "image_embeds", "text_embeds",
)  # fmt: skip
#: Those of them whose last of three dimensions are classes.
CLASSES = ("logits", "class_queries_logits", "prediction_logits")
#: Outputs that are not classes: they are distilled as features are.
EMBEDDINGS = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output")
#: The main inputs of models, and the number of dimensions of one sample.
SAMPLES = {"pixel_values": 3, "pixel_values_videos": 4, "input_ids": 1}
#: Tokens of an example input; height and width of its image if the configuration names none, in pixels.
TOKENS, PIXELS = 16, 224

_COLLATE = Check("a collator, called as collate(rows)", is_function)


@dataclass(frozen=True)
class HuggingFace(Task):
    """Models of transformers. The loss is the model's own: labels are passed to its forward.

    Batches are mappings as a collator returns them, `{"pixel_values": …, "labels": …}`; columns that the forward does
    not take are ignored. Rows of a data set, `{"pixel_values": Tensor[3, H, W], "labels": 3}`, are put into batches.

    Args:
        batch_size: Number of rows in a batch.
        collate: `collate(rows) -> mapping`, as a data collator of transformers. Default: values of equal shapes are
            stacked.
        seed: Seed of the order of the rows.

    Examples:
        >>> task = cpd.tasks.hugging_face.HuggingFace(batch_size=32)
        >>> task.batch_size
        32
    """

    batch_size: int = 16
    collate: Callable[[Sequence[Any]], Any] | None = None
    seed: int = 0
    name: ClassVar[str] = "transformers"

    def __post_init__(self) -> None:
        """Check every argument."""
        integer(1).demand("batch_size", self.batch_size)
        _COLLATE.demand("collate", self.collate, optional=True)

    def read(self, model: nn.Module, item: Any) -> Any:
        """Turn a mapping into (arguments, labels); labels are a tensor if they are the only target."""
        takes = parameters_of(model)
        if not isinstance(item, Mapping):
            return item
        named: dict[str, Any] = {ALIASES.get(str(name), str(name)): value for name, value in item.items()}
        target: dict[str, Any] = {}
        for name in LABELS:
            if name in named and (name in takes or name == "labels"):
                target[name] = named.pop(name)
        known: dict[str, Any] = {name: value for name, value in named.items() if name in takes}
        known.update(without_cache(model))
        only: Any = target["labels"] if set(target) == {"labels"} else target or None
        return ((), known), only

    def learn(self, model: nn.Module, call: Call, target: Any) -> tuple[Any, Tensor | None]:
        """The output and the model's own loss; for depth models without a loss, the mean absolute error."""
        takes = parameters_of(model)
        labels: dict[str, Any] = {"labels": target}
        if isinstance(target, Mapping):
            labels = {str(name): value for name, value in target.items()}
        elif target is None:
            labels = {"return_loss": True}
        labels = {name: value for name, value in labels.items() if name in takes}
        try:
            output = call._replace(kwargs={**call.kwargs, **labels}).on(model)
        except NotImplementedError:  # some models have no loss, and say so when they are given labels
            output = call.on(model)
        loss = _field(output, "loss")
        if loss is None and isinstance(depth := _field(output, "predicted_depth"), Tensor):
            loss = _absolute_error(depth, target)
        return output, loss

    def outputs(self, model: nn.Module) -> Outputs:
        """The parts of the output that matter, such as `logits` and `pred_boxes`; the whole output without any."""
        return what_matters

    def chosen(self, model: nn.Module, outputs: Outputs) -> Outputs:
        """The named parts, with classes in dimension 1; a function is taken as it is."""
        if callable(outputs):
            return outputs
        pick = reader(outputs)

        def chosen(output: Any) -> Any:
            found = pick(output)
            classes = [_field(output, name) for name in CLASSES]
            each = [
                with_classes_second(part) if any(part is item for item in classes) else part
                for part in (found if isinstance(found, tuple) else (found,))
            ]
            return tuple(each) if isinstance(found, tuple) else each[0]

        chosen.__qualname__ = str(outputs)  # as which a report tells it
        return chosen

    def training(self, model: nn.Module) -> Mapping[str, Any]:
        """AdamW, the usual optimizer of transformers; feature distillation if the output has no classes."""
        config: Any = model.config
        kind = type(model).__name__
        chooses_queries = bool(getattr(config, "two_stage", False)) or hasattr(config, "learn_initial_query")
        if chooses_queries:  # by their scores: a student chooses others than its teacher
            return {"optimizer": "adamw", "kd": "none"}
        given = self._embedding_modules(model)
        mimicked = {"kd": "mse", "features": given} if given else {"kd": "mse"} if "Depth" in kind else {}
        return {"optimizer": "adamw", "lr": 1e-4, **mimicked}

    def _embedding_modules(self, model: nn.Module) -> tuple[str, ...]:
        """The modules that return a model's embeddings, if the first part that matters of its output is one."""
        inputs = self.example_inputs(model)
        if inputs is None:
            return ()
        given: dict[int, str] = {}
        kept: list[Any] = []  # so that no number is used twice

        def note(name: str, output: Any) -> None:
            kept.append(output)
            given.setdefault(id(output), name)

        handles = [
            module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
            for name, module in model.named_modules()
            if name
        ]
        try:
            with torch.no_grad(), evaluating(model):
                output = as_call(inputs).on(model)
        finally:
            for handle in handles:
                handle.remove()
        first = next((name for name in (*MATTER, *EMBEDDINGS) if isinstance(_field(output, name), Tensor)), None)
        if first not in EMBEDDINGS:
            return ()
        names = EMBEDDINGS[:2] if first in EMBEDDINGS[:2] else EMBEDDINGS[2:]
        wanted = [_field(output, name) for name in names]
        return tuple(given[id(part)] for part in wanted if isinstance(part, Tensor) and id(part) in given)

    def example_inputs(self, model: nn.Module) -> Any:
        """One image, or some tokens, as the configuration describes them; None if it does not."""
        takes, config = parameters_of(model), cast(Any, model).config
        found: dict[str, Any] = {}
        if "input_ids" in takes and cast(Any, model).main_input_name in ("input_ids", "pixel_values"):
            text = getattr(config, "text_config", None) or config
            size, longest = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None) or TOKENS
            if size:
                found["input_ids"] = torch.arange(min(TOKENS, longest))[None] % size
        if "pixel_values" in takes:
            found["pixel_values"] = _image(model, config)
        if not found or cast(Any, model).main_input_name not in found:
            return None
        placed = move(found, device_of(model))
        if list(placed) == ["pixel_values"] == list(takes)[:1]:
            return placed["pixel_values"]
        return (), {**placed, **without_cache(model)}

    def batches(self, model: nn.Module, data: Iterable[Any]) -> Iterable[Any]:
        """The batches of a loader, or of the rows of a data set, read by this task."""
        if isinstance(data, TaskBatches) or not self._are_rows(data):
            return super().batches(model, data)
        generator = torch.Generator().manual_seed(self.seed)
        loader: DataLoader[Any] = DataLoader(
            cast(Any, data), self.batch_size, shuffle=True, collate_fn=self.collate or stacked, generator=generator
        )
        return super().batches(model, loader)

    def _are_rows(self, data: Any) -> bool:
        """Whether data holds single samples, as a data set does, rather than batches."""
        if isinstance(data, DataLoader) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            return False
        if self.collate is not None:
            return True
        first = data[0] if len(data) else None
        if not isinstance(first, Mapping):
            return False
        return any(name in first and np.ndim(first[name]) == dims for name, dims in SAMPLES.items())


# ---------------------------------------------------------------------------------- what a model takes and gives


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward, by name."""
    found = inspect.signature(model.forward).parameters
    return {name: item for name, item in found.items() if item.kind is not item.VAR_KEYWORD}


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The argument with which a language model does not return its keys and values."""
    return {"use_cache": False} if "use_cache" in parameters_of(model) else {}


def what_matters(output: Any) -> Any:
    """The parts of an output that matter, classes in dimension 1; the whole output if none is known."""
    found = [part for name in MATTER if isinstance(part := _field(output, name), Tensor)]
    if not found:
        return output
    first, *others = found
    if any(_field(output, name) is first for name in CLASSES):
        first = with_classes_second(first)
    return (first, *others) if others else first


def with_classes_second(logits: Tensor) -> Tensor:
    """Logits `[N, tokens or queries, classes]` as `[N, classes, tokens or queries]`; others as they are."""
    return logits.movedim(-1, 1) if logits.dim() == 3 else logits


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _absolute_error(depth: Tensor, target: Any) -> Tensor | None:
    """The mean absolute error of depths `[N, H, W]` over the pixels whose target is above 0."""
    if not isinstance(target, Tensor):
        return None
    if target.shape != depth.shape:
        raise InputError(f"The depths of a batch are {list(target.shape)}; the model predicts {list(depth.shape)}.")
    known = target > 0
    return F.l1_loss(depth[known].float(), target[known].float()) if bool(known.any()) else depth.sum() * 0


def _image(model: nn.Module, config: Any) -> Tensor:
    """Gaussian noise [1, C, H, W], the same at every call, of the size that the configuration names."""
    places = [config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config"))]
    size = next((found for place in places if (found := getattr(place, "image_size", None))), PIXELS)
    height, width = (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put rows into one batch: numbers and arrays of equal shapes are stacked, others (boxes) are kept in a list."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(isinstance(value, (int, float, Tensor, np.ndarray, list)) and _is_numeric(value) for value in values):
            tensors = [torch.as_tensor(np.asarray(value)) for value in values]
            found[name] = torch.stack(tensors) if len({item.shape for item in tensors}) == 1 else tensors
        elif not any(isinstance(value, str) for value in values):
            found[name] = values
    return found


def _is_numeric(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "biuf"
    except ValueError:  # lists of several lengths
        return False
