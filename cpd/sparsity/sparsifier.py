"""Sparsifier: masks chosen, kept and changed while a model is trained, in any loop.

    sparsifier = cpd.Sparsifier(model, 0.9, schedule="cubic", optimizer=optimizer, steps=epochs * len(loader))
    for images, labels in loader:
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
        sparsifier.step()

Weights stay plain parameters; hooks of the optimizer alone keep the zeros.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from cpd import processes
from cpd.coupling.comb import COMB, Comb
from cpd.coupling.comb import comb as comb_model
from cpd.errors import CheckpointError, CPDError, InputError
from cpd.files.reading import conform
from cpd.model.allocator import memory_reused
from cpd.model.arguments import INPUTS, MODEL, OPTIMIZER, REPEATED_DATA
from cpd.model.bits import packed_bits, unpacked_bits
from cpd.model.inputs import check_model
from cpd.model.outputs import reader
from cpd.model.randomness import random_states_kept, seeded
from cpd.model.skeleton import skeleton
from cpd.model.tensors import copy_of, named_tensors
from cpd.options import LOSS, Check, checked, checks_of, function, integer, takes_options, text
from cpd.plan import Plan
from cpd.sparsity.channels import masks_of
from cpd.sparsity.closed_form import sparsified, stages
from cpd.sparsity.config import SPARSE, SparseConfig
from cpd.sparsity.keeping import Keeper
from cpd.sparsity.masking import channel_plan, choose, fitting, get_sparsity
from cpd.sparsity.masks import Masks
from cpd.sparsity.patterns import CHANNEL
from cpd.sparsity.regrowth import rigl_share, swapped
from cpd.surgery.calibration import Calibration
from cpd.surgery.recovery import Recovery
from cpd.tasks.loss import LossFunction

log = logging.getLogger("cpd")

Stage = Callable[[str], AbstractContextManager[None]]
#: Changes of the masks while weights come back, where no interval is given.
CHANGES = 10
#: A weight that has gone is compared as if it were so much smaller (network surgery's two thresholds).
STAYING = 1.1
#: Added to the seed for the order of the data on which masks are chosen.
CHOOSING = 1 << 21


@dataclass(frozen=True)
class Change:
    """One change of the masks.

    Attributes:
        step: Number of optimizer steps before it.
        sparsity: The share of zeros after it.
        regrown: Number of weights that came back.
        masks_hash: SHA-256 of all masks.
    """

    step: int
    sparsity: float
    regrown: int
    masks_hash: str


class _State(TypedDict):
    """What `Sparsifier.state_dict` gives."""

    steps_taken: int
    changes: tuple[Change, ...]
    shapes: dict[str, tuple[int, ...]]
    groups: dict[str, tuple[int, ...]] | None
    notes: tuple[str, ...]


@takes_options(SparseConfig, leave_out=("threads",))
class Sparsifier:
    """Makes a model sparse, in place, while your own loop trains it.

    With `torch.distributed`, every process makes a `Sparsifier` of the unwrapped model and calls it in the same way. A
    model wrapped by FSDP raises an error, because its weights do not have their own shapes.

    Args:
        model: The model that is trained.
        sparsity: The first of the options below.
        steps: Number of optimizer steps of the whole training. The schedule is given in fractions of it.
        optimizer: The optimizer that trains the model. It can be set later, before the first step.
        data: Batches for scores and refits. Without data, nothing is refitted and the criterion must not need data.
        loss: `loss(output, target) -> scalar`, for the criterion "taylor".
        comb: The comb of the model, for the pattern "channel".
        example_inputs: Inputs to make that comb from, if it is not passed.
        config: Options held together. Options given by name replace those in it.
        stage: A function that takes the name of a stage and returns a context manager, to time or show the stage.
        options: The options of `cpd.SparseConfig`, by name:

    Attributes:
        masks: Which weights are kept so far; None before the first change.
        plan: For the pattern "channel": the plan by which `cpd.shrink` can remove the zeros in the end; else None.
        changes: One `Change` for each change of the masks so far.
        config: All options.
        steps_taken: Number of calls of `step` so far.
        notes: Sentences that explain what was done.

    Raises:
        InputError: An argument cannot be used.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparsifier = cpd.Sparsifier(model, 0.9, schedule="cubic", interval=2, optimizer=optimizer, steps=12)
        >>> for step in range(12):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(torch.randn(8, 20)), torch.randint(4, (8,))).backward()
        ...     optimizer.step()
        ...     if sparsifier.step():
        ...         print(f"after step {step}: {cpd.get_sparsity(model):.1%} zeros")
        after step 1: 63.3% zeros
        after step 3: 86.7% zeros
        after step 5: 90.0% zeros
        >>> print(f"{cpd.get_sparsity(model):.1%}")  # the training has kept them
        90.0%
    """

    @checked(
        model=MODEL, **checks_of(SparseConfig, "sparsity"), steps=integer(0), optimizer=OPTIMIZER, data=REPEATED_DATA,
        loss=LOSS, comb=COMB, example_inputs=INPUTS, config=SPARSE, stage=function("stage(name)"),
    )  # fmt: skip
    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | None = None,
        loss: LossFunction | None = None,
        comb: Comb | None = None,
        example_inputs: Any = None,
        config: SparseConfig | None = None,
        stage: Stage | None = None,
        **options: Any,
    ) -> None:
        named = options if sparsity is None else {"sparsity": sparsity, **options}
        self.config = SparseConfig.of(config, named, "cpd.Sparsifier")
        self.model, self.loss = _unwrapped(model), loss
        self.data = None if data is None else processes.Share(data, self.config.score_batches)
        self._batches = data
        self._share = self.config.share
        fitting(self.model, self.config)
        self.comb = self._comb_of(comb, example_inputs)
        self._events = events(self.config, steps)
        self._stage: Stage = (lambda _: nullcontext()) if stage is None else stage
        self._keeper = Keeper(self.model, self.config.regrow)
        self.masks: Masks | None = None
        self.plan: Plan | None = None
        self.steps_taken = 0
        self.changes: list[Change] = []
        self.notes: list[str] = []
        self.recovery: Recovery | None = None
        self.optimizer = optimizer

    def _comb_of(self, comb: Comb | None, example_inputs: Any) -> Comb | None:
        if self.config.pattern != CHANNEL:
            return None
        if comb is None and example_inputs is None:
            raise InputError("pattern='channel' needs the groups of a comb: pass example_inputs=, or comb=.")
        found = (
            comb_model(skeleton(self.model, {}), example_inputs, outputs=self.config.outputs) if comb is None else comb
        )
        return found

    # ------------------------------------------------------------------------------ when

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """That trains the model; hooks on its steps keep the zeros."""
        return self._keeper.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._keeper.attach(optimizer)

    @property
    def done(self) -> bool:
        """Whether the masks will change no more."""
        return len(self.changes) == len(self._events)

    @property
    def due(self) -> bool:
        """Whether a change is due after the steps taken so far."""
        return not self.done and self._events[len(self.changes)][0] <= self.steps_taken

    def mask_gradients(self) -> None:
        """Set the gradients of weights that are zero to zero: before they are clipped, so that their norm is right.

        The optimizer's step does it anyway.
        """
        self._keeper.before_step()

    def step(self) -> bool:
        """Note one optimizer step; change the masks if it is time. True if they were changed.

        Raises:
            InputError: there is no optimizer.
        """
        if self.optimizer is None:
            raise InputError("The Sparsifier has no optimizer, so the zeros would not be kept: set its optimizer.")
        if self.done:
            return False
        self.steps_taken += 1
        changed = self.due
        if changed:
            self.prune()
        self._watch()
        return changed

    def _watch(self) -> None:
        """Have the gradients of the next step noted, if the masks change after it."""
        self._keeper.watching = not self.done and self._events[len(self.changes)][0] <= self.steps_taken + 1

    def prune(self) -> Change:
        """Make the next change of the masks now."""
        share = self._share * self._events[len(self.changes)][1]
        seed = self.config.seed + CHOOSING + len(self.changes)
        last = len(self.changes) + 1 == len(self._events)
        with random_states_kept(), seeded(self.data, seed):
            before = self.masks
            self._keeper.show_dense()
            number = len(self.changes)
            full = number > 0 and self._events[number][1] == self._events[number - 1][1]
            if self.config.regrow == "rigl" and before is not None and full:
                masks = self._swapped(before)
            else:
                masks = self._chosen(share, before, last=last)
            processes.check_same(masks.digest, "masks")
        regrown = 0 if before is None else sum(
            int((now & ~before.kept[name]).sum()) for name, now in masks.kept.items() if name in before.kept
        )  # fmt: skip
        self.masks = masks
        self._keeper.take(masks, last=last)
        self.changes.append(Change(self.steps_taken, masks.sparsity, regrown, masks.digest))
        log.info(
            "Change %d of %d of the masks: %.1f%% of the weights are zero.",
            len(self.changes),
            len(self._events),
            100 * get_sparsity(self.model),
        )
        return self.changes[-1]

    # ------------------------------------------------------------------------------ which

    def _chosen(self, share: float, before: Masks | None, *, last: bool) -> Masks:
        """The masks of a share of zeros; the model is then masked, and refitted where that was asked for."""
        if self.comb is not None:
            with self._stage("score"):
                self.plan = channel_plan(
                    self.model, self.config, share, self.data, self.loss, self.comb, None, processes.total
                )  # fmt: skip
            masks = Masks(masks_of(self.plan, dict(self.model.named_parameters())), CHANNEL)
            if self.data is None or not self.config.compensation:
                return masks
            return self._refitted(lambda model, share: masks, [share])
        free = self.config.regrow in ("soft", "splice") and not last
        if self.data is None or not self.config.compensation or free:
            with self._stage("score"):
                return self._choose(self.model, share)
        there = 0.0 if before is None else before.sparsity
        return self._refitted(self._choose, stages(there, share))

    def _choose(self, model: nn.Module, share: float) -> Masks:
        scale = STAYING if self.config.regrow == "splice" and model is self.model else 1.0
        with self._keeper.weighed(self.masks, scale):
            return choose(model, self.config, share, self.data, self.loss, processes.total)

    @memory_reused()
    def _refitted(self, choose: Callable[[nn.Module, float], Masks], shares: list[float]) -> Masks:
        """The model made sparse by the closed form, as all processes do it together."""
        by_size = self.config.criterion == "magnitude" and self.comb is None
        with self._stage("recover"):
            calibration = Calibration(
                copy_of(self.model), self._batches or (), limit=self.config.score_batches, seed=self.config.seed,
                memory_gb=self.config.memory_gb, read=reader(self.config.outputs), together=True,
            )  # fmt: skip
            masks, found = sparsified(self.model, calibration, choose, shares, by_size=by_size)
            processes.copy_from_first(named_tensors(self.model).values())
        self.recovery = found
        self.note(str(found) if len(self._events) == 1 else f"Change {len(self.changes) + 1}: {found}")
        if found.failure is not None:
            self.note(f"Compensation was not possible: {found.failure}")
        return masks

    def _swapped(self, before: Masks) -> Masks:
        """RigL's masks: the smallest weights go, and as many come back where the gradient is largest."""
        total = max(1, self._events[-1][0] - self._events[0][0])
        time = (self._events[len(self.changes)][0] - self._events[0][0]) / total
        with self._stage("score"):
            return swapped(self.model, before, self.config.layout, self._keeper.gradients, rigl_share(time))

    @checked(text=text("a sentence"))
    def note(self, text: str) -> None:
        """Say something to the user, now and in the report."""
        self.notes.append(text)
        log.info(text)

    # ------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on, in plain types and tensors; the weights are not in it."""
        kept = {} if self.masks is None else self.masks.kept
        return {
            "steps_taken": self.steps_taken,
            "changes": [asdict(item) for item in self.changes],
            "shapes": {name: list(mask.shape) for name, mask in kept.items()},
            "bits": {name: packed_bits(mask) for name, mask in kept.items()},
            "groups": None if self.plan is None else {name: list(item) for name, item in self.plan.groups.items()},
            "dense": self._keeper.dense(),
            "notes": list(self.notes),
        }

    @checked(state=Check("a mapping, as state_dict() gives it", lambda value: isinstance(value, Mapping)))
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a `Sparsifier` of the same model and options; load the weights of the model after it.

        Raises:
            CheckpointError: if it is of another model or of other options.
        """
        try:
            found = conform({name: state[name] for name in _State.__annotations__}, _State, "a state")
            kept = {name: unpacked_bits(state["bits"][name], shape) for name, shape in found["shapes"].items()}
            masks = Masks(kept, self.config.pattern) if found["changes"] else None
            dense = {name: tensor.clone() for name, tensor in state["dense"].items()}
            if masks is not None:
                masks.pairs(self.model)
                if masks.digest != found["changes"][-1].masks_hash or len(found["changes"]) > len(self._events):
                    raise CheckpointError(
                        "This state belongs to another run: its masks do not match their checksum or their number."
                    )
            groups = found["groups"]
            plan = None if groups is None or self.comb is None else self.comb.plan(dict(groups))
        except CheckpointError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, CPDError) as error:
            raise CheckpointError(
                f"This state belongs to a different model: {type(error).__name__}: {error}."
            ) from error
        self.masks, self.plan = masks, plan
        self.changes, self.notes = list(found["changes"]), list(found["notes"])
        self.steps_taken = found["steps_taken"]
        self._keeper.restore(masks, dense, last=self.done)
        self._watch()


def events(config: SparseConfig, steps: int) -> list[tuple[int, float]]:
    """(optimizer step after which the masks change, share of the zeros that there are then), in order."""
    found = config.when.events(steps)
    first, last = found[-1][0], round(config.prune_until * steps)
    if config.regrow is None or config.schedule != "one-shot":
        return found
    span = config.interval or max(1, (last - first) // CHANGES)
    if steps and last - first < span:
        raise InputError(
            f"A training of {steps} steps is too short for regrow={config.regrow!r}: train longer, set a later "
            "prune_until, or use a shorter interval."
        )
    return [*found, *((step, 1.0) for step in range(first + span, last + 1, span))]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself; one whose weights are flattened has none that masks could lie on.

    Raises:
        InputError: if it is wrapped by FSDP.
    """
    for module in model.modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "FSDPModule"):
            raise InputError("The model is wrapped by FSDP, which flattens its weights: make it sparse before that.")
    return check_model(model)
