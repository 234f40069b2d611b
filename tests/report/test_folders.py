"""Folders that are saved, killed, filled, shared and forged: the old result or the new one, and nobody else's files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import cpd
from cpd.files import folder as folders
from cpd.files.checkpoint import Checkpoint
from cpd.files.folder import JOURNAL, reading, write_files
from cpd.files.reading import DEPTH, digest_of, parsed
from cpd.model.recorded import unsafe, why_not_by_name
from cpd.model.sources import resolve
from cpd.report.artifacts import add_files, read_document, read_report
from helpers.files import Killed, stopped
from helpers.kills import state_of
from helpers.mutations import mutations
from helpers.tiny import INPUT, Tiny

RESULT = {"README.md", "model.onnx", "model.safetensors", "plan.json", "report.html", "report.json"}


@pytest.fixture(scope="module")
def two() -> tuple[cpd.Result, cpd.Result]:
    """An older result and a newer one, of other widths."""
    torch.manual_seed(0)
    model = Tiny().eval()
    old, new = (cpd.compress(model, target_macs=share, example_inputs=INPUT) for share in (0.6, 0.3))
    return old, new


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def which(folder: Path, two: tuple[cpd.Result, cpd.Result], load: Callable[..., nn.Module] = cpd.load) -> str:
    """Whether the older result loads, or the newer, to the bit."""
    found = load(folder, model=Tiny())
    of = {count(result.model): (name, result.model) for name, result in zip(("old", "new"), two, strict=True)}
    name, model = of[count(found)]
    with torch.no_grad():
        assert torch.equal(found(INPUT), model(INPUT))
    return name


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def every_stop(act: Callable[[], Any]) -> int:
    """How many operations on files something takes."""
    with stopped(10**6) as done:
        act()
    return len(done)


@pytest.mark.parametrize("save", ["save", "save_pretrained"])
def test_a_save_that_stops_anywhere_leaves_the_old_result_or_the_new(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], save: str
) -> None:
    old, new = two
    load = cpd.load if save == "save" else cpd.from_pretrained

    def prepared(name: str) -> Path:
        return getattr(old, save)(tmp_path / name)

    folder = prepared("counted")
    total = every_stop(lambda: getattr(new, save)(folder))
    seen = []
    for stop in range(total):
        folder = prepared(str(stop))
        with pytest.raises(Killed), stopped(stop):
            getattr(new, save)(folder)
        seen.append(which(folder, two, load))
        getattr(old, save)(folder)
        assert litter(folder) == []
        assert which(folder, two, load) == "old"
    assert total > 20
    assert seen == sorted(seen, reverse=True), "from one moment on it is the new one"
    assert {"old", "new"} == set(seen)


KILLS = Path(__file__).parents[1] / "helpers" / "kills.py"


def test_a_process_that_is_killed_before_any_operation(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    """SIGKILL, in processes of their own; what they leave is read here: all of the older files, or of the newer."""

    def files(folder: Path) -> str:
        with reading(folder) as found:
            return "old" if found.has("gone") else "new"

    def checkpoint(folder: Path) -> str:
        state = Checkpoint(folder, {}).read()
        assert torch.equal(state["weights"], state_of(state["name"])["weights"])
        return state["name"]

    for name, result in zip(("old", "new"), two, strict=True):
        result.save(tmp_path / name)
    paths = os.pathsep.join([str(KILLS.parents[2]), str(KILLS.parents[1])])
    subprocess.run(
        [sys.executable, "-W", "ignore", KILLS, tmp_path, tmp_path / "killed"], timeout=200, check=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for writer, (least, found) in {
        "files": (20, files),
        "save": (60, lambda folder: which(folder, two)),
        "save_pretrained": (20, lambda folder: which(folder, two, cpd.from_pretrained)),
        "checkpoint": (8, checkpoint),
    }.items():
        folders = tmp_path / "killed" / writer
        whole = {name: contents(folders / name) for name in ("old", "new")}
        stops = len(list(folders.iterdir())) - 2
        seen = []
        for stop in range(stops):
            seen.append(found(folders / str(stop)))
            left = contents(folders / str(stop))
            assert {name: text for name, text in left.items() if name[0] != "."} == whole[seen[-1]], (writer, stop)
            write_files(folders / str(stop), {})
            assert litter(folders / str(stop)) == []
        assert stops > least, writer
        assert seen == sorted(seen, reverse=True), "from one moment on it is the new one"
        assert {"old", "new"} == set(seen), writer


def test_a_folder_that_can_only_be_read_is_read_through_its_journal(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two
    old.save(tmp_path)
    renames = 0
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames > 3:
            raise OSError(errno.EROFS, "Read-only file system")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(cpd.ArtifactError, match="Read-only"):
        new.save(tmp_path)
    assert (tmp_path / JOURNAL).exists()
    assert which(tmp_path, two) == "new"
    assert read_report(tmp_path).result == new.report.result
    monkeypatch.undo()
    assert which(tmp_path, two) == "new"
    assert litter(tmp_path) == []


def test_a_journal_that_is_damaged_or_forged_is_refused(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    two[0].save(tmp_path / "out")
    outside = tmp_path / "outside"
    outside.write_text("of the user")
    journal = tmp_path / "out" / JOURNAL
    digest = hashlib.sha256(b"x").hexdigest()
    beside = ".cpd-save.0123456789abcdef.plan.json"
    for content in (
        {"format": "cpd-save-1", "files": {"../outside": {"beside": beside, "sha256": digest}}},
        {"format": "cpd-save-1", "files": {"plan.json": {"beside": "../outside", "sha256": digest}}},
        {"format": "cpd-save-1", "files": {}, "gone": ["../outside"]},
        {"format": "cpd-save-1", "files": {}, "gone": "README.md"},
        {"format": "other", "files": {}},
        [],
    ):
        journal.write_text(json.dumps(content))
        with pytest.raises(cpd.ArtifactError, match=r"\.cpd-save\.json"):
            cpd.load(tmp_path / "out", model=Tiny())
        with pytest.raises(cpd.ArtifactError):
            two[1].save(tmp_path / "out")
    (tmp_path / "out" / beside).write_text("y")
    journal.write_text(
        json.dumps({"format": "cpd-save-1", "files": {"plan.json": {"beside": beside, "sha256": digest}}})
    )
    with pytest.raises(cpd.ArtifactError, match="damaged"):
        cpd.load(tmp_path / "out", model=Tiny())
    journal.unlink()
    assert which(tmp_path / "out", two) == "old"
    assert outside.read_text() == "of the user"


def test_a_full_disk_leaves_the_old_result_and_no_litter(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    two[0].save(tmp_path)
    new = dict.fromkeys(RESULT, b"new")
    with stopped(10**6) as done:
        write_files(tmp_path / "elsewhere", new)
    until = done.index("replace")
    needs_room = [index for index, name in enumerate(done[:until]) if name in ("open", "write")]
    before = contents(tmp_path)
    for stop in needs_room[1:]:  # the first opens the folder for its lock

        def full() -> OSError:
            return OSError(errno.ENOSPC, "No space left on device")

        if done[stop + 1] == "fsync" and done[stop] == "open":
            continue  # the folder, which not all systems can open
        with stopped(stop, full, once=True), pytest.raises(cpd.ArtifactError, match="No space left"):
            write_files(tmp_path, new)
        assert contents(tmp_path) == before
    assert which(tmp_path, two) == "old"


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_new_files_follow_the_umask_and_replaced_ones_keep_their_mode(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result]
) -> None:
    before = os.umask(0o027)
    try:
        two[0].save(tmp_path)
        assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in RESULT} == {0o640}
        (tmp_path / "model.onnx").chmod(0o604)
        two[1].save(tmp_path)
        Checkpoint(tmp_path, {}).write({"step": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.onnx").stat().st_mode) == 0o604
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o640
    place = Checkpoint(tmp_path, {}).path
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    place.chmod(0o600)
    Checkpoint(tmp_path, {}).write({"step": 2})
    assert stat.S_IMODE(place.stat().st_mode) == 0o600


# ---------------------------------------------------------------- whose files they are


@pytest.mark.parametrize("name", ["README.md", "model.onnx", "plan.json", "report.html", "model.safetensors"])
def test_files_of_the_user_are_not_overwritten(tmp_path: Path, two: tuple[cpd.Result, cpd.Result], name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(cpd.InputError, match=rf"{name}.*overwrite=True"):
        two[0].save(tmp_path)
    calls = []
    with pytest.raises(cpd.InputError, match="overwrite=True"):
        cpd.compress(
            Tiny(),
            target_macs=0.5,
            example_inputs=INPUT,
            evaluate=lambda _: calls.append(1) or 0.0,
            output_dir=tmp_path,
        )
    assert calls == []
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt"}
    assert (tmp_path / name).read_text() == "mine"
    two[0].save(tmp_path, overwrite=True)
    assert which(tmp_path, two) == "old"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_other_files_takes_a_result_and_a_former_one_gives_way(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result]
) -> None:
    old, new = two
    mine = {"notes.txt", ".cpd-save.json.bak", ".cpd-save.notes", "checkpoint.safetensors.123"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    old.save(tmp_path)
    add_files(tmp_path, {"recipe.yaml": b"# cpd compress\n"})
    new.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine | RESULT, "the recipe was the former result's"
    assert which(tmp_path, two) == "new"


def test_a_card_that_was_edited_is_kept_and_loads(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    old, new = two
    old.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# My model")
    assert which(tmp_path, two, cpd.from_pretrained) == "old"
    with pytest.raises(cpd.InputError, match=r"README\.md.*changed since"):
        new.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path, overwrite=True)
    assert which(tmp_path, two, cpd.from_pretrained) == "new"


def test_both_forms_of_one_result_lie_in_one_folder(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    old, new = two
    old.save(tmp_path)
    old.save_pretrained(tmp_path)
    old.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*RESULT, "config.json"}
    new.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert which(tmp_path, two) == "new"


@pytest.mark.parametrize("path", ["", None, b"out", "a\0b"])
def test_what_is_no_folder(two: tuple[cpd.Result, cpd.Result], path: Any) -> None:
    for act in (two[0].save, two[0].save_pretrained, cpd.load, cpd.from_pretrained):
        with pytest.raises(cpd.InputError, match="folder"):
            act(path)


def test_files_that_were_changed_or_deleted(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    two[0].save(tmp_path)
    for name in ("model.onnx", "report.json", "report.html", "README.md"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1])
        if name != "README.md":
            with pytest.raises(cpd.ArtifactError, match="truncated"):
                cpd.load(tmp_path, model=Tiny())
        (tmp_path / name).unlink()
        assert which(tmp_path, two) == "old"


def test_what_a_report_writes_anew_is_listed(tmp_path: Path, two: tuple[cpd.Result, cpd.Result], run: Any) -> None:
    two[0].save(tmp_path)
    add_files(tmp_path, {"report.html": b"another page"})
    assert which(tmp_path, two) == "old"
    assert run("report", tmp_path).exit_code == 0
    assert which(tmp_path, two) == "old"
    two[1].save(tmp_path)


# ---------------------------------------------------------------- sources that a file names


def forged(folder: Path, source: str | None) -> Path:
    """A folder whose document names another source, with checksums that agree."""
    document = json.loads((folder / "plan.json").read_text())
    document["source"] = source
    document["sha256"] = digest_of(document)
    (folder / "plan.json").write_text(json.dumps(document))
    return folder


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.place}",)


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights or downloads anything fails the test."""
    for place in ("torch.load", "torch.hub.load_state_dict_from_url", "huggingface_hub.hf_hub_download",
                  "timm.models._factory.load_checkpoint", "timm.models._builder.load_pretrained"):  # fmt: skip
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("something is loaded"))


@pytest.mark.parametrize(
    "argument",
    [
        'checkpoint_path="{place}"', "checkpoint_path=1", "pretrained=true", 'pretrained_cfg={{"file":"{place}"}}',
        'pretrained_cfg_overlay={{"url":"http://127.0.0.1/x"}}', "pretrained_strict=false", 'weights="DEFAULT"',
        'cache_dir="{place}"', 'block_args="{place}"', "global_pool={place}", 'act_layer="../x"',
        "num_classes=1e9", "num_classes=" + "9" * 5000, "num_classes=" + "[" * 90_000, "stem_type=deep",
    ],
)  # fmt: skip
def test_arguments_that_load_or_name_something_are_refused(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], nothing_loaded: None, argument: str
) -> None:
    weights = tmp_path / "weights.bin"
    torch.save({"state_dict": Evil(tmp_path / "ran")}, weights)
    two[0].save(tmp_path / "out")
    for library in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(cpd.ArtifactError, match=r"model=fresh") as caught:
            cpd.load(forged(tmp_path / "out", f"{library},{argument.format(place=weights)}"), trust_source=True)
        assert len(str(caught.value)) < 1000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["timm:local-dir:{}", "timm:hf-hub:timm/resnet18.a1_in1k", "timm:hf_hub:x/resnet18", "torchvision:{}/x"]
)
def test_names_of_places_are_no_models(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], nothing_loaded: None, name: str
) -> None:
    two[0].save(tmp_path)
    with pytest.raises(cpd.ArtifactError, match="has no model"):
        cpd.load(forged(tmp_path, name.format(tmp_path)))


@pytest.mark.parametrize(
    "source",
    ["timm:test_resnet,num_classes=2,channels=[8,8,8,8],stem_width=8", "timm:test_vit,img_size=[32,32],drop_rate=0.1",
     "timm:test_convnext,global_pool=avg,in_chans=1", "torchvision:googlenet,aux_logits=true,transform_input=false"],
)  # fmt: skip
def test_what_a_user_may_name_is_built(source: str, nothing_loaded: None) -> None:
    found = resolve(source)
    assert unsafe(found) is None
    assert isinstance(found.build(), nn.Module)


def test_a_source_that_is_not_built_from_a_file_is_told_when_it_is_saved() -> None:
    source = "timm:test_resnet,checkpoint_path=x.bin"
    result = cpd.compress(Tiny(), target_macs=0.5, example_inputs=INPUT, source=source)
    assert any("cpd.load cannot build" in note and "checkpoint_path" in note for note in result.report.notes)
    assert "by name" in str(why_not_by_name("my.models:net"))
    assert why_not_by_name("timm:test_resnet,num_classes=2") is None


FACTORY = """
from pathlib import Path
from helpers.tiny import Tiny
Path(__file__).with_name("ran").touch()
"""


def test_a_factory_is_imported_only_where_its_source_is_trusted(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_by_a_file.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    two[0].save("out")
    forged(Path("out"), "named_by_a_file:Tiny")
    with pytest.raises(cpd.ArtifactError, match=r"trust_source=True"):
        cpd.load("out")
    assert not Path("ran").exists()
    assert which(Path("out"), two, lambda folder, model: cpd.load(folder, trust_source=True)) == "old"
    assert Path("ran").exists()
    forged(Path("out"), "named_by_a_file:Path")
    with pytest.raises(cpd.ArtifactError, match="cannot be built"):
        cpd.load("out", trust_source=True)


# ---------------------------------------------------------------- JSON that nobody wrote


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, f"1{'0' * 30}", '{"a": 1, "a": 2}', "{", "\xff", ""],
)
def test_json_that_is_deep_endless_or_ambiguous(text: str) -> None:
    with pytest.raises(cpd.ArtifactError, match="the file"):
        parsed(text.encode("latin-1"), "the file")


def test_what_json_has_no_word_for_is_nothing() -> None:
    assert parsed("[NaN, Infinity, 1e999, 1.5]", "it") == [None, None, None, 1.5]
    assert parsed("[" * DEPTH + "]" * DEPTH, "it")
    with pytest.raises(cpd.ArtifactError):
        parsed("[" * (DEPTH + 2) + "]" * (DEPTH + 2), "it")


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": [{"module": "", "name": "__class__", "old": 1, "new": 2}]},
        {"attributes": [{"module": "no.such", "name": "heads", "old": 1, "new": 2}]},
        {"attributes": [{"module": "stem", "name": "groups", "old": 1, "new": [1]}]},
        {"attributes": [{"module": "stem", "name": "weight", "old": 1, "new": 0}]},
        {"attributes": [{"module": "stem", "name": "groups", "old": 1, "new": 0}]},
        {"caches": [{"module": "", "name": "_modules", "cold": "absent"}]},
        {"caches": [{"module": "", "name": "training", "cold": "absent"}]},
        {"caches": [{"module": "", "name": "__dict__", "cold": "absent"}]},
        {"caches": [{"module": "no.such", "name": "cache", "cold": "absent"}]},
        {"caches": [{"module": "bn", "name": "running_mean", "cold": "value", "value": "x"}]},
        {"caches": [{"module": "bn", "name": "eps", "cold": "entries"}]},
        {"caches": [{"module": "bn", "name": "eps", "cold": "boiling"}]},
        {"indices": [[0, 1, 2], [-1, 0]]},
        {"indices": [[2, 1, 0]] * 9},
        {"indices": [[0, 0, 1]] * 9},
        {"indices": [[0, 10**9]] * 9},
        {"indices": [[10**30]] * 9},
        {"indices": [[]] * 9},
        {"kept": {"stem.weight": {"-1": 0}}},
        {"kept": {"stem.weight": {"9": 0}}},
        {"kept": {"stem.weight": {"0": 99}}},
        {"kept": {"no.such": {"0": 0}}},
        {"shapes": {}},
        {"rescales": [{"tensor": "stem.weight", "dim": 99, "positions": [0], "factor": 2.0}]},
        {"rescales": [{"tensor": "stem.weight", "dim": -1, "positions": [0], "factor": 2.0}]},
        {"rescales": [{"tensor": "stem.weight", "dim": 0, "positions": [-3], "factor": 2.0}]},
        {"rescales": [{"tensor": "no.such", "dim": 0, "positions": [0], "factor": 2.0}]},
        {"groups": {"stem": [1, 0]}},
    ],
)
def test_a_plan_that_makes_no_sense_changes_nothing(
    tmp_path: Path, two: tuple[cpd.Result, cpd.Result], change: dict[str, Any]
) -> None:
    two[0].save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    document["plan"].update(change)
    document["sha256"] = digest_of(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    model = Tiny()
    before = state(model)
    with pytest.raises(cpd.ArtifactError):
        cpd.load(tmp_path, model=model)
    assert same(state(model), before)


def state(model: nn.Module) -> dict[str, Any]:
    """Weights, settings and mode of a model."""
    settings = {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple))
    }
    return {**{name: tensor.clone() for name, tensor in model.state_dict().items()}, **settings}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        for key, value in wanted.items()
    )


FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FUZZ
@given(data=st.data(), signed=st.booleans())
def test_any_change_of_a_plan_is_refused_or_makes_no_difference(
    tmp_path_factory: pytest.TempPathFactory, two: tuple[cpd.Result, cpd.Result], data: Any, signed: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    two[0].save(folder)
    document = json.loads((folder / "plan.json").read_text())
    changed = data.draw(mutations(document))
    if signed and isinstance(changed, dict):  # as whoever forges a file would
        changed["sha256"] = digest_of(changed)
    text = json.dumps(changed)
    if data.draw(st.integers(0, 9)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    (folder / "plan.json").write_text(text)
    model = Tiny()
    before = state(model)
    try:
        found = cpd.load(folder, model=model)
    except cpd.CPDError:
        assert same(state(model), before)
    else:
        with torch.no_grad():
            assert torch.equal(found(INPUT), two[0].model(INPUT)) or signed


@FUZZ
@given(data=st.data())
def test_any_change_of_a_report_is_refused_or_drawn(
    tmp_path_factory: pytest.TempPathFactory, report: Any, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "report.json").write_text(json.dumps(data.draw(mutations(report.to_dict()))))
    try:
        found = read_report(folder)
    except cpd.ArtifactError as error:
        told = str(error)
        assert told.startswith(str(folder / "report.json"))
    else:
        assert found.to_html()
        assert found.model_card()
        assert repr(found)


def test_a_document_is_read_whole(tmp_path: Path, two: tuple[cpd.Result, cpd.Result]) -> None:
    two[0].save(tmp_path)
    assert set(read_document(tmp_path)["files"]) == RESULT - {"plan.json"}
    assert folders.sha256_of(tmp_path / "model.onnx") == read_document(tmp_path)["files"]["model.onnx"]
