"""The metric: what a user's `evaluate` gives, its name, and how it is written.

A function is named by itself, or by an attribute, with the unit in brackets:

    accuracy.metric = "top-1 accuracy [%]"      # shown as: top-1 accuracy 91.30 %

It may say what each sample contributes, by another: then it is known how far chance moves what it gives.

    accuracy.each = lambda model: 100.0 * is_right(model(images), labels)       # one number a sample, of that mean
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: What a metric is called that has no name of its own.
UNNAMED = "metric"
_PER_CENT = " [%]"


def named(metric: str, each: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Give a function its attribute `metric`: the name of what it gives, as in `@named("mean IoU [%]")`.

    Args:
        metric: the name.
        each: its attribute `each`, a function of the same arguments: one number a sample, whose mean it gives.
    """

    def decorated(evaluate: F) -> F:
        evaluate.metric = metric  # type: ignore[attr-defined]
        if each is not None:
            evaluate.each = each  # type: ignore[attr-defined]
        return evaluate

    return decorated


def each_of(evaluate: Any) -> Callable[[Any], Any] | None:
    """A function of a model that gives one number a sample, whose mean `evaluate` gives; None where there is none."""
    if isinstance(evaluate, partial) and not hasattr(evaluate, "each"):
        inner = each_of(evaluate.func)
        return None if inner is None else partial(inner, *evaluate.args, **evaluate.keywords)
    found = getattr(evaluate, "each", None)
    return found if callable(found) else None


def metric_name(evaluate: Any) -> str:
    """The name of what a function gives, with its unit in brackets if it has one.

    It is the function's attribute `metric`, or else its own name; "metric" if that says nothing.
    """
    while isinstance(evaluate, partial) and not hasattr(evaluate, "metric"):
        evaluate = evaluate.func
    given = getattr(evaluate, "metric", None)
    if isinstance(given, str) and given.strip():
        return given.strip()
    name = str(getattr(evaluate, "__name__", UNNAMED)).strip("_").replace("_", " ")
    return UNNAMED if name in ("evaluate", "<lambda>", "") else name


def title(name: str) -> str:
    """The name of a metric at the head of a table or an axis, without its unit."""
    return name.removesuffix(_PER_CENT)


def is_share(name: str) -> bool:
    """Whether the metric of that name is in per cent."""
    return name.endswith(_PER_CENT)


def written(name: str, value: float) -> str:
    """A value of the metric of that name: `91.30 %`, or four places of a share."""
    if is_share(name):
        return f"{value:.2f} %"
    return f"{value:.{4 if abs(value) <= 1.5 else 2}f}"


def told(name: str, value: float) -> str:
    """A value with its name: `top-1 accuracy 91.30 %`."""
    return f"{title(name)} {written(name, value)}"
