"""The comb that a pruner works by: given, or made of a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from cpd.coupling.comb import Comb
from cpd.coupling.comb import comb as comb_model
from cpd.deploy.export import check_runs
from cpd.errors import InputError, NothingToPruneError
from cpd.model.architecture import check_architecture
from cpd.model.inputs import as_call
from cpd.model.skeleton import skeleton


def comb_to_prune(
    model: nn.Module,
    comb: Comb | None,
    example_inputs: Any,
    stage: Callable[[str], AbstractContextManager[None]],
    measures: bool,
    options: Mapping[str, Any],
) -> Comb:
    """The comb of a model, of a copy: the model itself will not stay as it is.

    Args:
        model: what is pruned.
        comb: its comb, if there is one already.
        example_inputs: as for `cpd.comb`.
        stage: a context manager for each stage by name.
        measures: whether it must run on them.
        options: those of `cpd.comb`.

    Raises:
        InputError: if the comb is of another model.
        NothingToPruneError: if no group can be pruned.
    """
    if comb is None:
        if measures:
            check_runs(model, as_call(example_inputs))
        with stage("comb"):
            comb = comb_model(skeleton(model, {}), example_inputs, **options)
    check_architecture(
        model, comb.architecture, InputError, "The comb was made for",
        "Pass comb=cpd.comb(model, example_inputs) of this model, or leave comb= out.",
    )  # fmt: skip
    if comb.model is model:
        comb = replace(comb, model=skeleton(model, {}))
    if not comb.open:
        reasons = "\n".join(f"  {group.name} ({group.size}): {group.frozen}" for group in comb.groups)
        raise NothingToPruneError(f"No group of {type(model).__name__} can be pruned:\n{reasons}")
    return comb
