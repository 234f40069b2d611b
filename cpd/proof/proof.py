"""Proof before promise: every group that the comb lists as prunable has been shrunk on a copy and traced again.

The algebra sees operations, not the Python that called them. So narrower copies (`cpd.proof.copies`), without values,
are run at several random widths (`cpd.proof.draws`). Where the forward asks for another width than predicted, or fails,
what may explain it is tried (`cpd.proof.remedies`) and accepted only if the forward then agrees:

1. *attribute*: an integer attribute of the calling module (or of one around it) that had the old width;
2. *tie*: the width is computed from another dimension's, so the two must keep equally many positions;
3. *minimum*: the forward gets further once twice as many positions stay.

Where nothing does, the group is frozen (`cpd.proof.freezing`): not prunable, for a reason that says which line asks for
which width. At last a narrower copy is compared with the prediction op by op: operations, shapes, integers, constants.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from cpd.algebra.axes import Dim
from cpd.errors import first_line
from cpd.proof.auxiliary import fails_in_train_mode
from cpd.proof.constants import Constants, Scale
from cpd.proof.copies import Budget, BudgetSpent, Copies
from cpd.proof.draws import Counts, Draws, Widths, moved, open_axes
from cpd.proof.freezing import Freezer
from cpd.proof.provenance import Place
from cpd.proof.remedies import RETRIES, Remedies
from cpd.proof.replay import Observation
from cpd.proof.unread import Unread
from cpd.rules import Context
from cpd.trace.graph import OperationGraph

log = logging.getLogger("cpd")

#: Narrower copies tried; random widths make a coincidence of widths in all of them unlikely.
DRAWS = 4
#: Copies traced at most to tell the formulas of a constant apart.
MAX_TRACES = 8
#: Widths drawn to find some that tell formulas apart.
TELLING = 20
#: Narrower copies tried before what is not proved is frozen.
MAX_COPIES = 1000
#: Copies that are tried beyond, while whole blocks are frozen.
RESERVE = 100


class Proof:
    """Tries narrower copies until all behave as predicted; finds the attributes, ties and minimums which that takes.

    Args:
        model: the unpruned model; never changed.
        ctx: the result of the algebra; axes are frozen and ties added in place.
        dims: the dimensions of every parameter and buffer.
        in_train_mode: the operations in train mode, where more layers run then: narrower copies are tried in it too.
        max_copies: how many narrower copies are tried before what is not proved is frozen.
        max_seconds: after how long the same happens; None: never.

    Attributes:
        attributes: integers that must follow a width.
        left_alone: integers that equal a width and do not follow it, each with the widths that it equals.
        draws: the widths that are tried.
        constants: the numbers of the copies compared, and the formulas that explain them.
        freezer: freezes what nothing explains.
        copies: makes narrower copies, and observes them.
        remedies: what is tried where a copy does not behave as predicted.
    """

    def __init__(
        self, model: nn.Module, ctx: Context, dims: Mapping[str, tuple[Dim, ...]], *,
        in_train_mode: OperationGraph | None = None, max_copies: int = MAX_COPIES, max_seconds: float | None = None,
    ) -> None:  # fmt: skip
        self.ctx, self.dims, self.in_train_mode = ctx, Widths(dims), in_train_mode
        self.attributes: dict[Place, Dim] = {}
        self.spent: str | None = None
        self.left_alone: dict[Place, tuple[Dim, ...]] = {}
        self.draws = Draws(ctx, self.dims)
        self.constants = Constants(ctx)
        kinds = {path: type(module) for path, module in model.named_modules()}
        self.freezer = Freezer(ctx, self.dims, self.attributes, kinds)
        self.budget = Budget(max_copies, max_seconds)
        self.copies = Copies(model, ctx, self.dims, self.attributes, self.constants, self.freezer, self.budget)
        self.remedies = Remedies(self.copies, self.draws)

    @property
    def scales(self) -> list[Scale]:
        """The formula of each constant that depends on a width."""
        return self.constants.scales

    def run(self) -> None:
        """Repair or freeze until narrower copies behave as predicted, each open axis among those narrowed."""
        self.constants.adopt_attention()
        self.remedies.adopt_named_attributes()
        self.remedies.adopt_attention()
        try:
            self._run()
        except BudgetSpent as spent:
            self.spent = f"not verified within {spent}: raise proof_copies or proof_seconds to try more"
            log.warning("Not all widths of this model were verified; the others are %s.", self.spent)
            self.budget.reserve(RESERVE)
            try:
                self._run()
            except BudgetSpent:
                for axis in open_axes(self.dims):
                    axis.frozen = self.spent

    def _run(self) -> None:
        while True:
            self._settle(DRAWS + bool(self.draws.small_axes()))
            self._settle_minimums()
            self._settle_train_mode()
            unread = Unread(self.remedies.candidates)
            following = unread.following()
            self.copies.tentative, self.copies.confirmed = following, False
            if self._settle(1, compare=True):
                break
        if not self.copies.confirmed:
            following = unread.harmless(following, self.draws.draw(done=0))
        self.attributes.update(following)
        self.left_alone = unread.left_alone()

    def _settle(self, draws: int, *, compare: bool = False) -> bool:
        """Observe random widths, at least `draws` times and each open axis narrowed once; repair what differs.

        Args:
            draws: how many copies in a row must behave as predicted.
            compare: whether to compare the copies with the prediction op by op, until one asks for a wrong width.

        Returns:
            Whether nothing differed.
        """
        clean, done, unproven = True, 0, set(open_axes(self.dims))
        while True:
            counts: Counts = self.draws.draw(unproven, done)
            if done >= draws and not moved(counts, unproven):
                telling = self._telling_widths() if compare and done < MAX_TRACES else None
                if telling is None:
                    for axis in unproven:
                        axis.frozen = "tied to other widths, and no smaller width satisfies all of them"
                    return clean
                counts = telling
            open_before = len(open_axes(self.dims))
            seen = self.copies.observe(counts, compare=compare)
            if seen.as_predicted():
                done, unproven = done + 1, unproven - moved(counts, unproven)
                continue
            clean, done = False, 0
            if self.spent is not None:
                self.freezer.freeze_blocks(seen.failing(), self.spent)
            else:
                compare = self._repair(seen, open_before) and compare
            unproven = set(open_axes(self.dims))

    def _repair(self, seen: Observation, open_before: int) -> bool:
        """Explain what a copy did that is not as predicted, or freeze; whether it was compared op by op."""
        seen = self._where_wrong(seen)
        if seen.wrong():
            self._explain(seen)
            return seen.compared
        if len(open_axes(self.dims)) == open_before:
            self._get_further(seen)
        return True

    def _telling_widths(self) -> Counts | None:
        """Widths at which formulas that explain one constant so far differ most; None where they never do."""
        return self.constants.telling(self.draws.draw() for _ in range(TELLING))

    def _where_wrong(self, seen: Observation) -> Observation:
        """A run that did not behave as predicted, or one like it which shows an integer that is not as predicted.

        Earlier draws may have had widths alike by chance, or have ended before the place.
        """
        counts, found = seen.counts, seen
        for _ in range(RETRIES):
            if found.wrong():
                return found
            found = self.copies.replay(counts)
            counts = self.draws.draw_alike()
        return seen

    def _explain(self, seen: Observation) -> None:
        """Where the forward names wrong widths: find the attributes and ties that explain them, or freeze them."""
        first = set(seen.wrong())
        seen = self.remedies.try_ties(self.remedies.try_followed(seen))
        if first.intersection(seen.wrong()):  # what other widths brought up has its own turn
            seen = self.remedies.try_unfollowed(seen)
            wrong = [item for item in seen.wrong() if item in first]
            if not (self.remedies.try_ratios(wrong) or self.remedies.try_whole(wrong)):
                constant = [item for item in wrong if seen.is_constant(item)]
                self.freezer.freeze_literals(constant or wrong)  # what is computed from those has its own turn

    def _get_further(self, seen: Observation) -> None:
        """Where a copy fails and names no wrong width: find what lets the forward get further, or freeze."""
        failed = self.copies.replay(seen.counts)
        if not (
            self.remedies.try_checked_attributes(failed)
            or self.remedies.try_checked_ties(failed)
            or self.remedies.try_minimum(failed)
        ):
            self.freezer.freeze_culprit(seen)

    def _settle_minimums(self) -> None:
        """Try a copy as narrow as the ties allow; where it fails, more positions must stay."""
        while open_axes(self.dims):
            seen = self.copies.replay(self.draws.narrowest())
            if seen.as_predicted():
                return
            if self.spent is not None:
                self.freezer.freeze_blocks(seen.failing(), self.spent)
                continue
            if self.remedies.try_minimum(seen) or self.remedies.raise_minimums(seen):
                continue
            if seen.error is None:
                self.freezer.freeze_literals(seen.wrong())
            else:
                self.freezer.freeze_culprit(seen)

    def _settle_train_mode(self) -> None:
        """Freeze what the module works on in which a narrower copy fails in train mode."""
        while self.in_train_mode is not None and open_axes(self.dims):
            narrow = self.copies.narrow(self.draws.draw(done=0), meta=True)
            failure = fails_in_train_mode(narrow, self.ctx.graph.call, self.in_train_mode.answers)
            if failure is None:
                return
            path, error = failure
            self.freezer.freeze_module(path, f"a narrower copy fails in train mode ({first_line(error)})")
