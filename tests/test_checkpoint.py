"""Checkpoints: whole at any moment, read by nobody else's settings, and a run that goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpd
from cpd.distillation.distiller import DistillConfig
from cpd.errors import CheckpointError, InputError, TrainingError
from cpd.files.checkpoint import Checkpoint
from cpd.files.reading import digest_of
from cpd.jobs.identity import TOLD, identity
from cpd.model.randomness import random_states, set_random_states
from cpd.model.tensors import hash_of
from helpers.files import Killed, stopped
from helpers.forks import started
from helpers.mutations import mutations
from helpers.runs import OPTIONS, Interrupted, Shuffled, run
from helpers.training import loader, net

pytestmark = pytest.mark.usefixtures("undeployed")

STATE = {
    "tensors": {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.tensor(3), torch.zeros(0, dtype=torch.int64)]},
    "plain": [1, 2.5, None, True, "text", (1, (2, 3)), torch.bfloat16],
    "numbered": {0: {"step": torch.tensor(1.0)}, 7: {"betas": (0.9, 0.999)}},
}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.safetensors.123").write_bytes(b"half of one, its process killed")
    Checkpoint(tmp_path, {"lr": 0.1}).write({**STATE, "random": random_states()})
    found = Checkpoint(tmp_path, {"lr": 0.1}).read()
    assert found["plain"] == STATE["plain"]
    assert found["numbered"][7] == {"betas": (0.9, 0.999)}
    assert torch.equal(found["tensors"]["a"], STATE["tensors"]["a"])
    assert found["tensors"]["b"][1].dtype == torch.int64
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    set_random_states(found["random"])
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_nothing_in_it_is_executed(tmp_path: Path) -> None:
    """It is a plain safetensors file whose header is JSON."""
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.write(STATE)
    assert set(safetensors.torch.load_file(checkpoint.path)) == {
        "/tensors/a", "/tensors/b/0", "/tensors/b/1", "/numbered/0/step"
    }  # fmt: skip
    with safetensors.safe_open(checkpoint.path, "pt") as file:
        assert json.loads(file.metadata()["cpd"])["format"] == 2
    with pytest.raises(CheckpointError, match="cannot hold"):
        checkpoint.write({"model": object()})
    assert checkpoint.read() is not None


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"lr": 0.1, "seed": 0}).write(STATE)
    with pytest.raises(CheckpointError, match=r"lr: 0\.1 then, 0\.2 now"):
        Checkpoint(tmp_path, {"lr": 0.2, "seed": 0}).read()
    assert Checkpoint(tmp_path / "nowhere", {}).read() is None


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_file_is_named_and_left(tmp_path: Path, damage: str) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.write(STATE)
    content = {
        "cut": checkpoint.path.read_bytes()[:-9],
        "empty": b"",
        "foreign": safetensors.torch.save(STATE["tensors"] | {"b": torch.ones(1)}),
    }[damage]
    checkpoint.path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a checkpoint that cpd wrote .* It was not changed"):
        checkpoint.read()
    assert checkpoint.path.read_bytes() == content


def test_what_cannot_be_written_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.write({"step": 1})

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*former checkpoint .* is intact.*resume=True"):
        checkpoint.write({"step": 2})
    monkeypatch.undo()
    assert checkpoint.read()["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_writing_that_stops_anywhere_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The former state or the new one; what is left of the writing, the next one deletes."""
    mine = tmp_path / ".checkpoint.safetensors.mine"
    mine.write_text("of the user")
    for stop in range(20):
        Checkpoint(tmp_path, {}).write({"step": 1})
        left = tmp_path / f".checkpoint.safetensors.{10**9 + stop}"  # of another process
        left.write_bytes(b"half of one")
        whole = False
        with contextlib.suppress(Killed), stopped(stop):
            Checkpoint(tmp_path, {}).write({"step": 2})
            whole = True
        assert safetensors.torch.load_file(tmp_path / "checkpoint.safetensors") == {}
        assert Checkpoint(tmp_path, {}).read()["step"] in ((2,) if whole else (1, 2))
        Checkpoint(tmp_path, {}).write({"step": 3})
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", mine.name}
        if whole:
            break
    assert whole
    assert stop > 3


def forged(path: Path, change: Callable[[Any], Any], *, signed: bool) -> None:
    """Change what the header of a checkpoint holds as JSON."""
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["cpd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = change(content)
    if signed and isinstance(content, dict):
        content["sha256"] = digest_of({key: content.get(key) for key in ("key", "state")})
    safetensors.torch.save_file(tensors, path, {"cpd": content if isinstance(content, str) else json.dumps(content)})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), signed=st.booleans())
def test_any_change_of_the_header_is_refused_or_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, data: Any, signed: bool
) -> None:
    checkpoint = Checkpoint(tmp_path_factory.mktemp("fuzz"), {"lr": 0.1, "layers": [1, 2]})
    checkpoint.write(STATE)
    forged(checkpoint.path, lambda content: data.draw(mutations(content)), signed=signed)
    written = checkpoint.path.read_bytes()
    try:
        found = checkpoint.read()
    except CheckpointError:
        assert checkpoint.state is None
    else:
        assert signed or repr(found) == repr({**STATE})
    assert checkpoint.path.read_bytes() == written


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 2, "key": ' + "9" * 5000 + "}", "", "null"])
def test_a_header_that_is_deep_or_endless(tmp_path: Path, text: str) -> None:
    Checkpoint(tmp_path, {}).write(STATE)
    forged(tmp_path / "checkpoint.safetensors", lambda _: text, signed=False)
    with pytest.raises(CheckpointError, match=r"not a checkpoint that cpd wrote .* It was not changed"):
        Checkpoint(tmp_path, {}).read()


# ---------------------------------------------------------------- runs that end early


@functools.cache
def undisturbed(training: DistillConfig | None = None) -> cpd.Result:
    return run(None, training=training)


@pytest.mark.parametrize("stop", [4, 9, 14, 18])
@pytest.mark.parametrize("training", [None, DistillConfig(optimizer="adamw", ema=0.9, mixup=0.2)])
def test_a_run_that_goes_on_ends_as_one_undisturbed(tmp_path: Path, stop: int, training: DistillConfig | None) -> None:
    expected = undisturbed(training)
    with pytest.raises(Interrupted):
        run(tmp_path, stop=stop, training=training)
    found = run(tmp_path, resume=True, training=training)
    assert found.plan.digest == expected.plan.digest
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["loss"] for row in found.report.history] == [row["loss"] for row in expected.report.history]
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_run_of_one_shot_goes_on_without_scoring_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"schedule": "one-shot", "evaluate": lambda model: 1.0}
    expected = run(None, **options)
    with pytest.raises(Interrupted):
        run(tmp_path, stop=9, **options)
    monkeypatch.setattr(sys.modules["cpd.pruner"], "score", lambda *_, **__: pytest.fail("scored again"))
    found = run(tmp_path, resume=True, **options)
    assert found.plan.digest == expected.plan.digest
    assert [row["epoch"] for row in found.report.history] == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True))


def test_projections_and_memories_go_on_too(tmp_path: Path) -> None:
    options = {"training": DistillConfig(kd="mse", features=["conv"], momentum=0.5), "schedule": "one-shot"}
    expected = run(None, **options)
    with pytest.raises(Interrupted):
        run(tmp_path, stop=9, **options)
    found = run(tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True))


def test_a_run_that_did_not_end_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, stop=9)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(InputError, match="resume=True"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match="lr: "):
        run(tmp_path, resume=True, lr=0.5)
    with pytest.raises(InputError, match="output_dir"):
        run(None, resume=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("epoch",), "one"), (("done",), None), (("sums",), [1]), (("records",), [{}]), (("student",), {}),
        (("optimizer", "param_groups"), 3), (("pruner", "plan"), {"x": [0]}), (("pruner", "steps_taken"), "x"),
        (("random", "numpy"), []), (("random", "python"), 1), (("extra", "history"), 1), (("extra",), {}),
    ],
)  # fmt: skip
def test_a_state_that_is_not_ours_is_told_as_such(stopped_run: Path, tmp_path: Path, place: Any, value: Any) -> None:
    """Forged, with a checksum that agrees."""
    path = tmp_path / "checkpoint.safetensors"
    shutil.copy(stopped_run / path.name, path)

    def change(content: Any) -> Any:
        holder = content["state"]
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        return content

    forged(path, change, signed=True)
    written = path.read_bytes()
    with pytest.raises(CheckpointError):
        run(tmp_path, resume=True)
    assert path.read_bytes() == written


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory, undeployed: None) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        run(folder, stop=9)
    return folder


BATCHES = loader()


def of_batches(folder: Path, *, resume: bool = True, **changed) -> cpd.Result:
    """A run on a list of batches, interrupted unless it goes on."""
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        if calls == 9 and not resume:
            raise Interrupted
        return torch.nn.functional.cross_entropy(output, target)

    given = {"model": net(), "data": BATCHES, "loss": loss, "teacher": net().eval(), **changed}
    return cpd.compress(given.pop("model"), output_dir=folder, resume=resume, **given, **OPTIONS)


def other_net() -> torch.nn.Module:
    model = net()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] += 1e-3
    return model


def mean_loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)


OTHERS = {
    "weights of the model": {"model": other_net()},
    "weights of the teacher": {"teacher": other_net()},
    "loss": {"loss": mean_loss},
    "first batch": {"data": [(x.neg(), y) for x, y in BATCHES]},
    "number of batches": {"data": BATCHES[:-1]},
}


def test_a_run_goes_on_with_what_it_was_given_alone(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        of_batches(tmp_path, resume=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for name, changed in OTHERS.items():
        with pytest.raises(CheckpointError, match=f"{name}: .* then, .* now"):
            of_batches(tmp_path, **changed)
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert of_batches(tmp_path, data=tuple(BATCHES)).plan.groups  # the same in another container


def test_what_a_run_is_of_is_told_without_false_alarms() -> None:
    images = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.arange(10))
    shuffled = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)
    first = identity(net(), None, shuffled, functools.partial(mean_loss))
    list(shuffled)
    again = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True, num_workers=1)
    assert identity(net().eval().requires_grad_(False), None, again, mean_loss) == first
    assert {key: value for key, value in first.items() if "weights" not in key} == {
        "loss": "mean_loss", "number of batches": 3, "batch size": 4, "data set": "TensorDataset",
        "number of samples": 10,
    }  # fmt: skip

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    endless = torch.utils.data.DataLoader(Endless())
    assert identity(net(), None, endless, torch.nn.MSELoss()).keys() == {
        "weights of the model", "loss", "batch size", "data set"
    }  # fmt: skip
    assert set(identity(net(), net(), BATCHES, mean_loss)) <= set(TOLD)


def test_a_hash_tells_every_bit_and_nothing_else() -> None:
    for tensor in (
        torch.randn(3000), torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.tensor(3),
        torch.randn(5, dtype=torch.complex64).conj(), torch.ones(3, dtype=torch.bool), torch.randn(9, 9).bfloat16()[1:],
        torch.empty(0), torch.arange(5, dtype=torch.uint8),
    ):  # fmt: skip
        assert hash_of({"a": tensor}) == hash_of({"a": tensor.clone().contiguous()})
        assert hash_of({"a": tensor}) != hash_of({"b": tensor})
        for index in range(min(tensor.numel(), 3)):
            changed = tensor.clone().contiguous()
            changed.view(-1)[index] = 0 if tensor.dtype == torch.bool else changed.view(-1)[index] + 1
            assert hash_of({"a": tensor}) != hash_of({"a": changed})
    weights = torch.randn(4096)
    assert hash_of({"a": weights}) != hash_of({"a": weights.roll(1024)})


def test_a_loss_that_is_not_finite_leaves_a_checkpoint_from_before(tmp_path: Path) -> None:
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(output, target) * (float("nan") if calls == 9 else 1)

    with pytest.raises(TrainingError, match="not finite"):
        cpd.compress(net(), data=Shuffled(), loss=loss, output_dir=tmp_path, **OPTIONS)
    assert run(tmp_path, resume=True).plan.groups


def go_on(folder: Path) -> None:
    """Begin a run, or go on with it, and tell its plan: for a process that is killed meanwhile."""
    warnings.simplefilter("error")
    print(run(folder, resume=(folder / "checkpoint.safetensors").exists()).plan.digest)


def test_a_run_killed_again_and_again_ends_with_the_same_plan(tmp_path: Path) -> None:
    """SIGKILL at moments all over the run; `benchmarks/kill_test.py` does the same twenty times at random."""
    moments, said = random.Random(0), tmp_path / "said.txt"
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    for _ in range(3):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = started("test_checkpoint:go_on", checkpoint.parent, output=said)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.is_alive():
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                time.sleep(moments.uniform(0, 0.3))
                break
            time.sleep(0.01)
        process.kill()
        process.join()
        if checkpoint.exists():
            assert safetensors.torch.load_file(checkpoint)
    process = started("test_checkpoint:go_on", checkpoint.parent, output=said)
    process.join(120)
    assert process.exitcode == 0, said.read_text()[-2000:]
    assert said.read_text().split()[-1] == undisturbed().plan.digest
