"""What an earlier commit saved loads today: a plan, folders, a recipe, checkpoints; see `saved/README.md`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import cpd
from cpd.jobs.sweep import read_sweep
from cpd.plan import Plan
from cpd.report.artifacts import read_report
from cpd.report.report import Report
from helpers.fakes import Fakes
from helpers.folders import LEAKY, write_images
from helpers.saved import IMAGES, classifier, trained

SAVED = Path(__file__).parent / "saved"
OUTPUTS = json.loads((SAVED / "outputs.json").read_text())


def assert_gives(model: nn.Module, images: Tensor, name: str) -> None:
    """A model gives what it gave when it was saved, but for the order in which another machine adds."""
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.tensor(OUTPUTS[name]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- plans and folders


def test_a_plan_is_read_and_shrinks_a_model_to_what_was_saved() -> None:
    written = json.loads((SAVED / "plan.json").read_text())
    plan = Plan.from_dict(written)
    assert plan.to_dict() == written
    assert plan.digest == OUTPUTS["digest"]
    assert plan.attributes
    assert plan.rescales
    model = cpd.shrink(classifier(), plan)
    saved = cpd.load(SAVED / "own", model=classifier())
    assert model.heads == saved.heads < classifier().heads
    assert [p.shape for p in model.parameters()] == [p.shape for p in saved.parameters()]


def test_the_same_widths_make_the_same_plan() -> None:
    plan = Plan.from_dict(json.loads((SAVED / "plan.json").read_text()))
    combed = cpd.comb(classifier().eval(), IMAGES[:1])
    assert [group.name for group in combed.groups] == list(plan.groups)
    assert combed.plan({group.name: plan.groups[group.name] for group in combed.open}).digest == plan.digest


@pytest.mark.parametrize("name", ["own", "hub"])
def test_a_folder_of_ones_own_class(name: str) -> None:
    load = cpd.load if name == "own" else cpd.from_pretrained
    assert_gives(load(SAVED / name, model=classifier()), IMAGES, "own")


def test_a_folder_of_a_model_by_name() -> None:
    assert_gives(cpd.load(SAVED / "command_line"), IMAGES.repeat(1, 1, 2, 2), "command_line")


def holds(found: Any, written: Any) -> bool:
    """Whether what was read is what was written; fields that are new since then are None."""
    if isinstance(written, dict):
        new = [found[key] for key in found.keys() - written.keys()]
        kept = written.keys() <= found.keys() and all(holds(found[key], written[key]) for key in written)
        return kept and all(value is None for value in new)
    if isinstance(written, list):
        return len(found) == len(written) and all(map(holds, found, written))
    return bool(found == written)


@pytest.mark.parametrize("name", ["own", "command_line"])
def test_a_report_is_read_and_its_page_written_anew(name: str, run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(SAVED / name, tmp_path / name)
    written = json.loads((folder / "report.json").read_text())
    report = read_report(folder).to_dict()
    assert holds({key: report[key] for key in written}, written)
    result = run("report", folder)
    assert result.exit_code == 0, result.stderr
    assert (folder / "report.html").stat().st_size > 1000


def test_a_sweep_is_read_and_its_page_written_anew(run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(SAVED / "sweep", tmp_path / "sweep")
    found = read_sweep(folder)
    assert holds(json.loads(json.dumps(found.to_dict())), json.loads((folder / "sweep.json").read_text()))
    assert [point.asked for point in found.points] == [1.2, 1000]
    result = run("report", folder)
    assert result.exit_code == 0, result.stderr
    assert "out of reach" in result.stdout


@LEAKY
def test_a_recipe_asks_for_the_same_run(
    report: Report, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes(report)
    monkeypatch.setattr(cpd, "compress", fakes.compress)
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_images(Path("images", part), classes=2)
    recipe = SAVED / "command_line" / "recipe.yaml"
    result = run("compress", "--config", recipe)
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert call["source"] == "timm:test_resnet,num_classes=2,channels=[8,8,8,8],stem_width=8"
    assert call["config"] == cpd.PruneConfig(
        target_macs=0.5, round_to=2, seed=3, criterion="taylor",
        schedule=cpd.Schedule("cubic", start=0.1, end=0.6, interval=1),
    )  # fmt: skip
    assert call["training"] == cpd.DistillConfig(epochs=2, optimizer="adamw", lr=1e-3, temperature=2.0, ema=0.9, seed=3)
    assert call["example_inputs"].shape == (1, 3, 32, 32)
    before, after = (yaml.safe_load(path.read_text()) for path in (recipe, Path("command_line", "recipe.yaml")))
    assert {key: after[key] for key in before} == before


# ---------------------------------------------------------------- checkpoints

#: Folder of a checkpoint -> the options of its run; `saved/make.py` gave the same.
RUNS: dict[str, dict[str, Any]] = {
    "one_shot": {
        "criterion": "magnitude",
        "compensation": False,
        "training": cpd.DistillConfig(optimizer="adamw", ema=0.9),
    },
    "scheduled": {
        "criterion": "magnitude",
        "compensation": False,
        "schedule": cpd.Schedule("cubic", end=0.6, start=0.1),
        "training": cpd.DistillConfig(kd="mse", features=["conv"]),
    },
    "summed": {
        "schedule": cpd.Schedule("linear", end=0.8, interval=4),
        "criterion": "taylor",
        "compensation": False,
    },
}


@pytest.mark.usefixtures("undeployed")
@pytest.mark.parametrize("name", RUNS)
def test_a_training_goes_on_to_the_end_of_one_undisturbed(name: str, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(SAVED / name / "checkpoint.safetensors", tmp_path))
    expected = trained(None, **RUNS[name])
    found = trained(tmp_path, resume=True, stop=18, **RUNS[name])  # a whole run asks for its loss 18 times
    assert found.plan.digest == expected.plan.digest
    assert not checkpoint.exists()
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():  # equal to the bit on the machine that wrote them; others add in another order
        torch.testing.assert_close(ours[key], tensor, rtol=1e-2, atol=2e-3)
    losses = [[row["loss"] for row in result.report.history if "loss" in row] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
