"""What stands in a model where a branch was: modules that compute nothing.

`x + branch(x)` without the branch is `x`. The user's forward still says `x + …`, so what the branch gives is a
`Nothing`, to which adding `x` gives `x` itself: no operation is left of the branch, in eager mode or in an export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cpd.plan import Replacement

_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SUBTRACTING = {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
_FROM = {"rsub", "__rsub__"}
#: What only a tensor can tell.
_ASKED = {
    "size", "dim", "ndimension", "numel", "nelement", "item", "tolist", "numpy", "stride", "is_contiguous", "data_ptr",
    "element_size", "storage", "untyped_storage", "is_floating_point", "is_complex", "get_device", "__len__",
}  # fmt: skip


class Nothing:
    """A tensor of zeros: a sum with it is the other operand, whatever else is done with it gives it again.

    Args:
        copied: a sum gives a copy of the other operand, for something is written to it later.
        like: a tensor of its shape; None where that is not known.
    """

    def __init__(self, *, copied: bool = False, like: Tensor | None = None) -> None:
        self._copied, self._like = copied, like

    def __repr__(self) -> str:
        """Its name."""
        return "Nothing()"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What a function of torch gives."""
        name, kwargs = func.__name__, kwargs or {}
        nothing = next(item for item in tree_leaves((args, kwargs)) if isinstance(item, cls))
        operands = [*args[:2], *(kwargs[key] for key in ("input", "other") if key in kwargs)]
        if name in (_ADDING | _SUBTRACTING | _FROM) and len(operands) == 2:
            left, right = operands
            if isinstance(right, cls):
                return nothing._sum(left, -1 if name in _FROM else 1)
            factor = kwargs.get("alpha", 1) * (-1 if name in _SUBTRACTING else 1)
            return nothing._sum(right, factor)
        like = None
        if nothing._like is not None:
            if name.endswith("_") and not name.startswith("__"):
                return nothing  # what is written to it
            apart = {"inplace": False} if "inplace" in kwargs else {}
            known = tree_map(lambda item: item._like if isinstance(item, cls) else item, (args, {**kwargs, **apart}))
            like = func(*known[0], **known[1])
            if not isinstance(like, Tensor):
                return like
        elif name in _ASKED:
            raise TypeError(f"A branch was removed here, and what it gave has no {name}.")
        return cls(copied=nothing._copied, like=like)

    def _sum(self, other: Any, factor: Any) -> Any:
        """What `factor * other` and nothing are together."""
        if not isinstance(other, Tensor):
            return self if isinstance(other, Nothing) or other == 0 else other
        if factor != 1:
            return other * factor
        return other.clone() if self._copied else other

    def __getattr__(self, name: str) -> Any:
        """A method or a property of a tensor."""
        method = None if name.startswith("__") else getattr(Tensor, name, None)
        if callable(method):
            return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)
        if method is not None and self._like is not None:
            return getattr(self._like, name)
        raise AttributeError(f"A branch was removed here, and what it gave has no {name}.")


def _operator(name: str) -> Callable[..., Any]:
    """An operator of tensors, for nothing."""
    method = getattr(Tensor, name)

    def operator(self: Nothing, *args: Any) -> Any:
        return Nothing.__torch_function__(method, (), (self, *args))

    operator.__name__ = name
    operator.__doc__ = "As of a tensor of zeros."
    return operator


for _name in (
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "itruediv", "matmul", "rmatmul",
    "getitem", "neg", "pow",
):  # fmt: skip
    setattr(Nothing, f"__{_name}__", _operator(f"__{_name}__"))


class Removed(nn.Module):
    """Stands where the last module of a branch was; gives `Nothing`.

    Args:
        item: what it takes the place of.
    """

    def __init__(self, item: Replacement) -> None:
        super().__init__()
        self.copied, self.shaped, self.outputs = item.copied, item.shaped, item.outputs

    def forward(self, *args: Any, **kwargs: Any) -> Nothing | tuple[Nothing, ...]:
        """Nothing, whatever is given."""
        given = next((item for item in (*args, *kwargs.values()) if isinstance(item, (Tensor, Nothing))), None)
        if isinstance(given, Tensor):
            given = Nothing(like=given.new_zeros(()).expand(given.shape))
        nothing = Nothing(copied=self.copied, like=given._like if self.shaped and given is not None else None)
        return nothing if self.outputs is None else (nothing,) * self.outputs


def replacement(item: Replacement) -> nn.Module:
    """The module that stands where another was."""
    return nn.Identity() if item.by == "identity" else Removed(item)


def put_in_place(model: nn.Module, paths: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Set submodules, under every path that they have; what was there before, by path."""
    before = {path: model.get_submodule(path) for path in paths}
    new = {id(before[path]): module for path, module in paths.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new and child is not None:
                new[id(child)].training = child.training
                parent._modules[name] = new[id(child)]
    return before
