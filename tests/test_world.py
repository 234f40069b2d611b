"""Calls leave the process as it was: random states, threads, flags, warnings, loggers, folders, hooks."""

from __future__ import annotations

import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import cpd
from cpd.model.inputs import plain_attention
from helpers.calls import CALLS, X, Y, comb, data, evaluate, family, loss, masks, model, narrow, onnx, plan, result
from helpers.world import differences, same, whole, world

fast_path = torch.backends.mha.get_fastpath_enabled


@pytest.mark.filterwarnings("ignore:Schedule:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("sweep", "family", "demo.run_demo")])
def test_the_process_and_the_model_are_as_they_were(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result().save("saved")
    masks().save("masks.safetensors")
    family().save("family")
    for folder in ("images", "labels"):
        Path("maps", folder).mkdir(parents=True)
    CALLS["comb"].call(**CALLS["comb"].given())  # what torch sets once, when it is first used, is no call's doing
    onnx(), plan()
    given = CALLS[name].given()
    kept, before = whole(model()), world()
    try:
        CALLS[name].call(**given)
    except cpd.InputError:
        assert name == "segmentation.SegmentationFolder"  # an empty one
    makes_weights = name == "segmentation.EncoderDecoder"
    changed = [text for text in differences(before, world()) if not (makes_weights and "random of torch" in text)]
    assert changed == []
    assert same(kept, whole(model())) == []


def test_the_fast_path_of_attention_is_on_after_compensation() -> None:
    """Two models run in two threads, and the switch is one for both."""
    assert fast_path()
    for _ in range(5):
        cpd.compensate(narrow(), model(), plan(), data())
        assert fast_path()


def test_the_switch_is_turned_back_by_the_last_of_several_threads() -> None:
    assert fast_path()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with plain_attention():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with plain_attention():
        leave.set()
        thread.join()
        assert not fast_path()
    assert fast_path()


def test_a_run_that_fails_in_its_training_leaves_the_process_as_it_was() -> None:
    calls = 0

    def fails(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(output, target) * (float("nan") if calls > 2 else 1.0)

    comb()
    given = deepcopy(model())
    kept, before = whole(given), world()
    with pytest.raises(cpd.TrainingError, match="not finite"):
        cpd.compress(
            given, target_macs=0.6, round_to=1, example_inputs=X[:1], data=data(), loss=fails, epochs=1,
            evaluate=evaluate,
        )  # fmt: skip
    assert differences(before, world()) == []
    assert same(kept, whole(given)) == []
    assert Y.tolist() == [0, 1, 2, 3]
    assert isinstance(given, nn.Module)
