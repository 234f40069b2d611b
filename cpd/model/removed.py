"""What stands in a model where a branch was: modules that compute nothing.

`x + branch(x)` without the branch is `x`. The user's forward still says `x + …`, so what the branch gives is a
`Nothing`, to which adding `x` gives `x` itself: no operation is left of the branch, in eager mode or in an export.
`torch.cat([x, branch(x)], 1)` leaves it out in the same way, and `x * gate(x)` is `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cpd.plan import Replacement

_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SUBTRACTING = {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
_FROM = {"rsub", "__rsub__"}
_MULTIPLYING = {
    "mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__", "div", "div_", "divide", "divide_",
    "true_divide", "__truediv__", "__itruediv__",
}  # fmt: skip
_JOINING = {"cat", "concat", "concatenate"}
Kind = Literal["nothing", "empty", "one"]
#: What only a tensor can tell.
_ASKED = {
    "size", "dim", "ndimension", "numel", "nelement", "item", "tolist", "numpy", "stride", "is_contiguous", "data_ptr",
    "element_size", "storage", "untyped_storage", "is_floating_point", "is_complex", "get_device", "__len__",
}  # fmt: skip


class Nothing:
    """What an operation takes no notice of; whatever else is done with it gives it again.

    Args:
        kind: of the operation: "nothing" is zeros in a sum, "empty" no channel in a concatenation, "one" ones in a
            product.
        copied: a sum or product gives a copy of the other operand, for something is written to it later.
        like: a tensor of its shape; None where that is not known.
    """

    def __init__(self, kind: Kind = "nothing", *, copied: bool = False, like: Tensor | None = None) -> None:
        self._kind, self._copied, self._like = kind, copied, like

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
        found = nothing._neutral(func, name, args, kwargs)
        if found is not None:
            return found
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
        return cls(nothing._kind, copied=nothing._copied, like=like)

    def _neutral(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the operation gives that takes no notice of it; None for all others."""
        if self._kind == "empty":
            if name not in _JOINING:
                return None
            joined, *others = args or [kwargs["tensors"]]
            left = [item for item in joined if not (isinstance(item, Nothing) and item._kind == "empty")]
            nothing = next((item for item in left if isinstance(item, Nothing)), None if left else self)
            rest = {key: value for key, value in kwargs.items() if key != "tensors"}
            return func(left, *others, **rest) if nothing is None else nothing
        operands = [*args[:2], *(kwargs[key] for key in ("input", "other") if key in kwargs)]
        if len(operands) != 2:
            return None
        left, right = operands
        if self._kind == "one":
            return self._product(right if left is self else left) if name in _MULTIPLYING else None
        if name not in (_ADDING | _SUBTRACTING | _FROM):
            return None
        if isinstance(right, Nothing):
            return self._sum(left, -1 if name in _FROM else 1)
        return self._sum(right, kwargs.get("alpha", 1) * (-1 if name in _SUBTRACTING else 1))

    def _product(self, other: Any) -> Any:
        """What `other` and one are together."""
        return other.clone() if self._copied and isinstance(other, Tensor) else other

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
    """Stands where a module of a branch was; gives `Nothing`.

    Args:
        item: what it takes the place of.
    """

    def __init__(self, item: Replacement) -> None:
        super().__init__()
        assert item.by != "identity"
        self.kind: Kind
        self.kind, self.copied, self.shaped, self.outputs = item.by, item.copied, item.shaped, item.outputs

    def forward(self, *args: Any, **kwargs: Any) -> Nothing | tuple[Nothing, ...]:
        """Nothing, whatever is given."""
        given = next((item for item in (*args, *kwargs.values()) if isinstance(item, (Tensor, Nothing))), None)
        if isinstance(given, Tensor):
            given = Nothing(like=given.new_zeros(()).expand(given.shape))
        like = given._like if self.shaped and given is not None else None
        nothing = Nothing(self.kind, copied=self.copied, like=like)
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
