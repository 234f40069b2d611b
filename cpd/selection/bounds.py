"""Bounds beside a target: how large the file of the model, and its memory while it runs, may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cpd.algebra.axes import Axis
from cpd.coupling.comb import Comb
from cpd.deploy.memory import PeakMemory
from cpd.errors import TargetError

MB = 1e6
#: Of a number, by precision; 4 of others.
BYTES = {"bf16": 2, "f16": 2, "int8": 1}
#: How much of its bound a figure fills before it is said that the bound decided.
FULL = 0.97


@dataclass
class Bounds:
    """What a model may take, in MB; None: as much as it likes.

    Args:
        whole: the comb of the unpruned model.
        file_mb: of the file that is run: the ONNX model in the runtime's precision.
        memory_mb: of weights and tensors while one pass over the example inputs runs, where a runtime reuses memory.
        precisions: of the runtimes.
        file_of: the bytes of the unpruned model's file; asked for once, if at all.
    """

    whole: Comb
    file_mb: float | None
    memory_mb: float | None
    precisions: Sequence[str]
    file_of: Callable[[], int]

    def __post_init__(self) -> None:
        """Nothing has been seen yet."""
        self._stored = 1 if set(self.precisions) == {"int8"} else 4
        self._computed = max(BYTES.get(name, 4) for name in self.precisions)
        self._rest: float | None = None
        self._peaks: dict[tuple[str, ...], PeakMemory] = {}

    @property
    def asked(self) -> bool:
        """Whether there are any."""
        return self.file_mb is not None or self.memory_mb is not None

    def file(self, comb: Comb, counts: Mapping[Axis, int]) -> float:
        """The MB of the file at these widths: its weights, and what it holds beside them."""
        if self._rest is None:
            self._rest = self.file_of() - self._stored * self.whole.cost({}).parameters
        return (self._stored * comb.cost(counts).parameters + self._rest) / MB

    def memory(self, comb: Comb, counts: Mapping[Axis, int]) -> float:
        """The MB of weights and of the tensors alive at once at these widths."""
        key = tuple(sorted(comb.removed))
        if key not in self._peaks:
            self._peaks[key] = PeakMemory(comb)
        return self._computed * (comb.cost(counts).parameters + self._peaks[key](counts)) / MB

    def excess(self, comb: Comb, counts: Mapping[Axis, int]) -> float:
        """The largest share of a bound that is taken: above 1, one is exceeded."""
        shares = [
            figure(comb, counts) / bound
            for figure, bound in ((self.file, self.file_mb), (self.memory, self.memory_mb))
            if bound is not None
        ]
        return max(shares, default=0.0)

    def saw(self, comb: Comb, counts: Mapping[Axis, int], content: int) -> None:
        """Learn from a file that was written how much it holds beside its weights."""
        if self.file_mb is not None:
            self._rest = content - self._stored * comb.cost(counts).parameters

    def check(self, comb: Comb, least: Mapping[Axis, int]) -> None:
        """Raise `TargetError` if even the narrowest widths take more."""
        for name, bound, figure in (
            ("max_file_mb", self.file_mb, self.file), ("max_memory_mb", self.memory_mb, self.memory),
        ):  # fmt: skip
            if bound is not None and (found := figure(comb, least)) > bound:
                raise TargetError(
                    f"{name}={bound:g} cannot be reached: the narrowest widths allowed take {found:.3g} MB, the "
                    f"original {figure(self.whole, {}):.3g}. Raise {name}, or allow narrower widths (max_ratio)."
                )

    def decided(self, comb: Comb, counts: Mapping[Axis, int]) -> bool:
        """Whether widths are as they are for a bound rather than for the target."""
        return self.excess(comb, counts) >= FULL

    def notes(self, comb: Comb, counts: Mapping[Axis, int]) -> list[str]:
        """What a user should know where a bound decided rather than the target."""
        if not self.decided(comb, counts):
            return []
        taken = [
            f"{name} ({figure(comb, counts):.3g} MB of {bound:g})"
            for name, bound, figure in (
                ("the size of the file", self.file_mb, self.file), ("peak memory", self.memory_mb, self.memory),
            )
            if bound is not None and figure(comb, counts) / bound >= FULL
        ]  # fmt: skip
        return [f"What decided the widths: {' and '.join(taken)}; the target may be more than met."]
