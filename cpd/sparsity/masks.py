"""Masks: which weights of a model stay, as a value; applied, kept through a training, saved, and exchanged with torch.

Plain weights, masks outside: a masked model has the parameters, names and classes that it had, so it is copied, saved,
exported, combed and shrunk like any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import prune

from cpd.coupling.comb import COMB, Comb
from cpd.errors import ArtifactError, InputError
from cpd.files.folder import write_files
from cpd.model.arguments import MODEL, OPTIMIZER
from cpd.model.bits import packed_bits, unpacked_bits
from cpd.model.inputs import check_model
from cpd.model.masks import masked_weights
from cpd.model.tensors import hash_of
from cpd.options import PATH, checked, instance
from cpd.plan import PLAN, Plan
from cpd.sparsity.channels import emptied

FORMAT = "cpd-masks-1"
FILE = "masks.safetensors"


@dataclass(frozen=True, repr=False, eq=False)
class Masks:
    """Which weights of a model are kept, and which are set to zero.

    Attributes:
        kept: {parameter name: bool tensor of its shape, on the CPU}, True where a weight is kept.
        pattern: Which weights are zero together, as for `cpd.mask`.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> masks = cpd.mask(model, 0.75)
        >>> masks
        Masks(unstructured: 4,644 of 6,192 weights in 2 layers are zero, 75.0%)
        >>> cpd.get_sparsity(masks.apply(model))
        0.75
    """

    kept: Mapping[str, Tensor]
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        own = {name: tensor.detach().to("cpu", torch.bool) for name, tensor in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(own))

    def __repr__(self) -> str:
        """The number and the share of zeros."""
        count, layers = self.elements, len(self.kept)
        told = f"{self.zeros:,} of {count:,} weights in {layers} layer{'s' * (layers != 1)} are zero"
        return f"Masks({self.pattern}: {told}, {self.sparsity:.1%})"

    def __eq__(self, other: object) -> bool:
        """Whether both masks keep the same weights."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.kept.keys() == other.kept.keys() and all(
            torch.equal(mask, other.kept[name]) for name, mask in self.kept.items()
        )

    __hash__ = None  # type: ignore[assignment]

    # ------------------------------------------------------------------------------ what they are

    @property
    def elements(self) -> int:
        """Number of weights in the masked layers."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def zeros(self) -> int:
        """Number of weights that are set to zero."""
        return sum(mask.numel() - int(mask.sum()) for mask in self.kept.values())

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of the masked layers."""
        return self.zeros / max(1, self.elements)

    @property
    def by_layer(self) -> dict[str, float]:
        """{parameter name: share of zeros}."""
        return {name: 1 - float(mask.double().mean()) for name, mask in self.kept.items()}

    @property
    def digest(self) -> str:
        """SHA-256 of all masks, which is equal for equal masks."""
        return hash_of({name: self.kept[name] for name in sorted(self.kept)})

    # ------------------------------------------------------------------------------ on a model

    @checked(model=MODEL)
    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Set the weights that are not kept to zero, in place.

        Args:
            model: The model.

        Returns:
            The same model.

        Raises:
            InputError: If the model does not have these parameters. It is then unchanged.
        """
        for parameter, mask in self.pairs(check_model(model)):
            parameter.masked_fill_(~mask, 0)
        return model

    @checked(model=MODEL)
    def pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of each masked parameter of a model and its mask, on the parameter's device.

        Raises:
            InputError: If the model does not have one of the parameters, or if its shape differs.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.kept.items():
            if name not in parameters:
                raise InputError(f"The masks belong to another model: this one has no parameter {name!r}.")
            if parameters[name].shape != mask.shape:
                raise InputError(
                    f"The masks belong to another model: {name} has shape {list(parameters[name].shape)} here, and its "
                    f"mask has {list(mask.shape)}."
                )
        return [(parameters[name], mask.to(parameters[name].device)) for name, mask in self.kept.items()]

    @checked(model=MODEL, optimizer=OPTIMIZER)
    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Kept:
        """Keep the zeros of a model at zero while it is trained.

        The gradients are masked before each step of the optimizer, and the weights after it. No hook or buffer is added
        to the model. If you clip gradients, call `handle.mask_gradients()` before (the step calls it as well), so that
        their norm is that of the weights that are trained.

        Args:
            model: The model. Its weights are masked immediately.
            optimizer: The optimizer that trains it.

        Returns:
            A handle. Its `remove()` stops the masking; it can be used in a `with` statement.

        Examples:
            >>> from torch import nn
            >>> model = nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            >>> with cpd.mask(model, 0.5).keep(model, optimizer):
            ...     for _ in range(3):
            ...         optimizer.zero_grad()
            ...         model(torch.randn(2, 8)).square().mean().backward()
            ...         optimizer.step()
            >>> cpd.get_sparsity(model)
            0.5
        """
        self.apply(model)
        return Kept(self.pairs(model), optimizer)

    # ------------------------------------------------------------------------------ files

    @checked(path=PATH)
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the masks to a file, with one bit for each weight.

        Returns:
            The path of the file.

        Raises:
            ArtifactError: If it cannot be written.
        """
        target = Path(path)
        write_files(target.parent, {target.name: self.to_bytes()})
        return target

    def to_bytes(self) -> bytes:
        """The bytes that `save` writes: safetensors with packed bits, and the shapes and the pattern in the header."""
        shapes = {name: list(mask.shape) for name, mask in self.kept.items()}
        told = {"format": FORMAT, "pattern": self.pattern, "shapes": json.dumps(shapes), "sha256": self.digest}
        return save({name: packed_bits(mask) for name, mask in self.kept.items()}, told)

    @staticmethod
    @checked(path=PATH)
    def load(path: str | os.PathLike[str]) -> Masks:
        """Read masks from a file, or from a folder that `cpd.sparsify` wrote.

        Raises:
            ArtifactError: If the file is missing, damaged or not written by cpd.
        """
        target = Path(path)
        target = target / FILE if target.is_dir() else target
        try:
            with safe_open(target, "pt") as file:
                told = file.metadata() or {}
                if told.get("format") != FORMAT:
                    raise ArtifactError(f"{target} holds no masks of the format {FORMAT}.")
                shapes = json.loads(told["shapes"])
                kept = {name: unpacked_bits(file.get_tensor(name), shapes[name]) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise ArtifactError(f"{target} is missing.") from error
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactError(f"{target} cannot be read as masks: {error}.") from error
        found = Masks({name: kept[name] for name in shapes}, told.get("pattern", "unstructured"))
        if found.digest != told.get("sha256"):
            raise ArtifactError(f"{target} is damaged: its masks are not those that were saved.")
        return found

    # ------------------------------------------------------------------------------ torch.nn.utils.prune

    @checked(model=MODEL)
    def to_torch(self, model: nn.Module) -> nn.Module:
        """Lay the masks on a model as `torch.nn.utils.prune` does, in place: `weight_orig`, `weight_mask`, a hook.

        Returns:
            The model. `prune.remove`, or `cpd.Masks.from_torch` and `apply` on a plain one, ends it.

        Raises:
            InputError: if the model has no such parameters, or a mask lies on one already.
        """
        self.pairs(check_model(model))
        for name, mask in self.kept.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            prune.custom_from_mask(module, own, mask.to(getattr(module, own)))
        return model

    @staticmethod
    @checked(model=MODEL)
    def from_torch(model: nn.Module) -> Masks:
        """The masks that lie on a model by `torch.nn.utils.prune`, or as `torch.ao.pruning`'s `FakeSparsity`.

        The names are those of the parameters of the plain model. The model is left as it was.

        Raises:
            InputError: if there is no mask on it.
        """
        kept = dict[str, Tensor]()
        for full, (module, name) in masked_weights(check_model(model)).items():
            kept[full.removesuffix("_orig")] = module.get_buffer(f"{name}_mask") != 0
        for path, module in model.named_modules():
            for name, items in getattr(module, "parametrizations", {}).items():
                for item in items:
                    if type(item).__name__ == "FakeSparsity" and isinstance(getattr(item, "mask", None), Tensor):
                        kept[f"{path}.{name}".removeprefix(".")] = item.mask != 0
        if not kept:
            raise InputError("No mask of torch.nn.utils.prune or torch.ao.pruning lies on the model.")
        return Masks(kept)

    # ------------------------------------------------------------------------------ with plans

    @checked(comb=COMB)
    def plan(self, comb: Comb) -> Plan:
        """The plan that removes every channel of which the masks leave nothing.

        A channel is removed where all weights that give it, or all that read it, are zero in one of its layers; its
        biases and norms must be zero then, too, for the model to stay as it was, so `cpd.compensate` may follow.

        Args:
            comb: of the model.

        Returns:
            The plan; one that changes nothing where no channel is wholly zero.
        """
        return comb.plan(emptied(self.kept, comb))

    @checked(plan=PLAN)
    def narrowed(self, plan: Plan) -> Masks:
        """The masks of the model that a plan makes: the channels that it removes are removed from them."""
        found = dict[str, Tensor]()
        for name, mask in self.kept.items():
            for dim, index in plan.kept.get(name, {}).items():
                mask = mask.index_select(dim, index)
            found[name] = mask
        return Masks(found, self.pattern)


class Kept:
    """The handle of masks that are kept through a training; also a context manager.

    Args:
        pairs: each parameter with its mask.
        optimizer: whose steps they are kept through.
    """

    def __init__(self, pairs: list[tuple[nn.Parameter, Tensor]], optimizer: torch.optim.Optimizer) -> None:
        self.pairs = pairs
        self._gone = [(parameter, ~mask) for parameter, mask in pairs]
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.mask_gradients()),
            optimizer.register_step_post_hook(lambda *_: self.mask_weights()),
        ]

    def mask_gradients(self) -> None:
        """Set the gradients of the weights that are zero to zero."""
        for parameter, gone in self._gone:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the weights that are to be zero to zero."""
        for parameter, gone in self._gone:
            parameter.masked_fill_(gone, 0)

    def remove(self) -> None:
        """End it; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


MASKS = instance(Masks, "a cpd.Masks, as cpd.mask gives it")
