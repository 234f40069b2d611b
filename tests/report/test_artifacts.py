"""Folders: what is written to them, what comes back, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch

import cpd
from helpers.tiny import INPUT, Tiny, compressed


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = Tiny(), tmp_path_factory.mktemp("out") / "new"
    return model, compressed(model, folder), folder


def test_folder_is_whole_and_loads_to_the_bit(result):
    _, found, folder = result
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "plan.json", "model.onnx", "report.json", "report.html", "README.md"}
    rebuilt = cpd.load(folder, model=Tiny())
    with torch.no_grad():
        assert torch.equal(rebuilt(INPUT), found.model(INPUT))
    assert json.loads((folder / "report.json").read_text())["criterion"] == "obs"


def test_pretrained_folder_loads_to_the_bit(result, tmp_path, monkeypatch):
    _, found, _ = result
    folder = found.save_pretrained(tmp_path / "hub")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for place in (folder, "somebody/tiny"):
        rebuilt = cpd.from_pretrained(place, model=Tiny())
        with torch.no_grad():
            assert torch.equal(rebuilt(INPUT), found.model(INPUT))
    assert (asked["name"], "model.safetensors" in asked["allow_patterns"]) == ("somebody/tiny", True)

    def fails(name, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(cpd.ArtifactError, match=r"somebody/tiny is not a local folder.*no network"):
        cpd.from_pretrained("somebody/tiny")
    (folder / "config.json").write_text('{"architectures": []}')
    with pytest.raises(cpd.ArtifactError, match=r"config\.json does not have the format"):
        cpd.from_pretrained(folder, model=Tiny())


class Versioned(Tiny):
    """Asks its state dict for a version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_modules_that_ask_for_the_version_of_their_state(result):
    _, found, folder = result
    with torch.no_grad():
        assert torch.equal(cpd.load(folder, model=Versioned())(INPUT), found.model(INPUT))


def test_loads_by_name_in_a_fresh_process(tmp_path):
    import timm

    model = timm.create_model("resnet18", num_classes=7).eval()
    found = cpd.compress(model, target_macs=0.3, example_inputs=torch.randn(1, 3, 64, 64))
    assert found.report.criterion == "magnitude"
    assert any("No data" in note for note in found.report.notes)
    found.save(tmp_path / "out")
    x = torch.randn(2, 3, 64, 64)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import torch, cpd, sys; m = cpd.load(sys.argv[1] + '/out'); x = torch.load(sys.argv[1] + '/x.pt');"
        "torch.save(m(x).detach(), sys.argv[1] + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), found.model(x))


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_truncated_artifacts(result, tmp_path, name):
    _, found, _ = result
    found.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    fresh = Tiny()
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises(cpd.ArtifactError, match="truncated"):
        cpd.load(tmp_path, model=fresh)
    assert all(torch.equal(tensor, before[key]) for key, tensor in fresh.state_dict().items())


def test_foreign_artifacts(result, tmp_path):
    _, found, _ = result
    with pytest.raises(cpd.ArtifactError, match="missing"):
        cpd.load(tmp_path, model=Tiny())
    found.save(tmp_path)
    with pytest.raises(cpd.ArtifactError, match="model=fresh"):
        cpd.load(tmp_path)
    with pytest.raises(cpd.ArtifactError, match=r"was made from a .*does not fit this .*stem.*fresh, unpruned"):
        cpd.load(tmp_path, model=Tiny(width=16))
    (tmp_path / "plan.json").write_text('{"format": "other"}')
    with pytest.raises(cpd.ArtifactError, match="does not have the format"):
        cpd.load(tmp_path, model=Tiny())
