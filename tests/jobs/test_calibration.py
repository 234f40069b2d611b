"""`calibration`: channels are scored, and layers refitted, on other batches than those that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import cpd
from cpd.jobs import stages
from cpd.model.progress import part
from helpers.tiny import INPUT, Tiny, loader


class Noted:
    """Batches, and how often they were taken."""

    def __init__(self, seed: int) -> None:
        self.batches, self.taken = loader(seed), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.taken += 1
            yield batch


def test_recovery_on_calibration_alone_is_a_stage_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []

    def noted(name: str) -> Any:
        parts.append(name)
        return part(name)

    monkeypatch.setattr(stages, "part", noted)
    cpd.compress(Tiny(), target_macs=0.5, example_inputs=INPUT, calibration=loader(1), score_batches=2)
    names = ["comb", "score", "select", "shrink", "check", "recover", "deploy"]
    assert parts == [f"stage {number} of 7: {name}" for number, name in enumerate(names, 1)]


@pytest.mark.usefixtures("undeployed")
def test_scores_and_recovery_read_calibration_alone() -> None:
    data, calibration = Noted(0), Noted(1)
    options: dict[str, Any] = {"target_macs": 0.5, "example_inputs": INPUT, "score_batches": 2}
    model = Tiny()
    result = cpd.compress(model, data=data, calibration=calibration, epochs=0, **options)
    assert data.taken == 1  # the first batch, which is checked
    assert calibration.taken > 5
    assert {"data", "calibration"} <= result.report.call.keys()
    same = cpd.compress(model, data=Noted(1), epochs=0, **options)
    assert result.plan.digest == same.plan.digest
    trained = cpd.compress(model, data=Noted(0), calibration=Noted(1), epochs=1, **options)
    assert trained.plan.digest == same.plan.digest
    assert len(trained.report.history) == 1
