"""The commands: what they pass on, print and write, and what an error looks like."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import cpd
from cpd.cli import command
from cpd.deploy import model_profile
from cpd.errors import ArtifactError, NothingToPruneError
from cpd.jobs.sensitivity import RATIOS
from cpd.jobs.sweep import Sweep
from cpd.report.records import SweepPoint
from cpd.report.report import Report
from helpers.fakes import Fakes
from helpers.folders import LEAKY, write_images
from helpers.pages import Page


def test_compress_prints_before_and_after(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    result = run("compress", "timm:resnet18,num_classes=10", "--no-pretrained", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "2.04× faster" in result.stdout
    assert "11.18 M" in result.stdout
    assert "BatchNorm statistics were measured anew" in result.stdout
    (call,) = fakes.calls
    assert call.pop("model").fc.out_features == 10
    assert call.pop("example_inputs").shape == (1, 3, 224, 224)
    assert call.pop("training") == cpd.DistillConfig()
    assert (call.pop("resume"), call.pop("checkpoint_minutes"), call.pop("progress")) == (False, 10.0, None)
    assert (call.pop("max_drop"), call.pop("confidence")) == (None, 0.95)
    assert call == {
        "config": cpd.PruneConfig(target_speedup=2.0),
        "output_dir": tmp_path,
        "overwrite": False,
        "source": "timm:resnet18,num_classes=10",
    }


def test_without_a_target_but_with_max_drop_no_speed_is_asked_for(fakes: Fakes, run: Any) -> None:
    result = run("compress", "timm:resnet18", "--no-pretrained", "--max-drop", "1", "--confidence", "0.9")
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert call["config"] == cpd.PruneConfig()
    assert (call["max_drop"], call["confidence"]) == (1.0, 0.9)


def test_compress_passes_its_options(fakes: Fakes, run: Any) -> None:
    options = (
        "--target-macs 0.5 --epochs 0 --threads 2 --seed 7 --round-to 4 --input-size 64,32 --no-pretrained "
        "--schedule cubic --prune-from 0.1 --prune-until 0.6 --interval 20 --criterion taylor --optimizer adamw "
        "--lr 1e-3 --weight-decay 0.05 --kd cwd --kd-weight 2 --temperature 3 --ema 0.99 --mixup 0.2 --cutmix 1 "
        "--mixed-precision bf16 --accumulate 2 --scheduler poly --task-weight 0.5 --features layer2 --features layer3 "
        "--resume --checkpoint-minutes 2"
    )
    result = run("compress", "timm:resnet18", *options.split(), "--json")
    assert result.exit_code == 0, result.stderr
    assert Report.from_dict(json.loads(result.stdout)) == fakes.report
    (call,) = fakes.calls
    config = call["config"]
    assert config.target_speedup is None
    assert (config.target_macs, call["training"].epochs, config.threads, config.seed) == (0.5, 0, 2, 7)
    assert config.round_to == 4
    assert config.when == cpd.Schedule("cubic", start=0.1, end=0.6, interval=20)
    assert (call["resume"], call["checkpoint_minutes"], config.criterion) == (True, 2.0, "taylor")
    assert call["training"] == cpd.DistillConfig(
        epochs=0, seed=7, optimizer="adamw", lr=1e-3, weight_decay=0.05, kd="cwd", kd_weight=2.0, temperature=3.0,
        ema=0.99, mixup=0.2, cutmix=1.0, mixed_precision="bf16", accumulate=2, scheduler="poly", task_weight=0.5,
        features=("layer2", "layer3"),
    )  # fmt: skip
    assert call["example_inputs"].shape == (1, 3, 64, 32)


@LEAKY
def test_sensitivity_of_a_folder(run: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=2)
    options = f"--no-pretrained --input-size 32 --batch-size 2 --workers 0 --data {tmp_path / 'train'}"
    result = run(
        "sensitivity", "timm:test_resnet,num_classes=2", *options.split(), "--plot", tmp_path / "m.png", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {point["ratio"] for point in found["points"]} == set(RATIOS)
    assert all(point["loss"] > 0 for point in found["points"])
    assert (tmp_path / "m.png").stat().st_size > 1000
    result = run("sensitivity", "timm:test_resnet,num_classes=2", *options.split(), "--accuracy")
    assert "validation images" in result.output


SMALL = "timm:test_resnet,num_classes=2"


def test_profile_shows_where_the_time_goes(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_profile, "profile_model", partial(cpd.profile_model, seconds=0.2))
    plot = tmp_path / "groups.html"
    result = run("profile", SMALL, "--input-size", "32", "--check", "1", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    assert re.search(r"in [\d.]+% of the MACs, [\d.e-]+ ms</span>", plot.read_text())
    assert re.search(r"layer1\.0\.conv1 +. +Conv +.", result.stdout)
    totals = [line for line in result.stdout.splitlines() if "total" in line]
    assert ["100.0%" in line for line in totals] == [True, True]  # of the layers, and of the operators
    assert "Conv" in result.stdout
    assert "kernels on this machine are kept in" in result.stdout
    assert "of the MACs, the predicted speed-up is" in result.stdout
    found = json.loads(run("profile", SMALL, "--input-size", "32", "--json", "-q").stdout)
    for rows in (found["operators"], found["layers"]):
        assert sum(row["ms"] for row in rows) == pytest.approx(found["total_ms"])


@LEAKY
def test_sweep_then_quantize_then_latency(run: Any, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, classes=2)
    out, name = tmp_path / "out", "timm:test_vit,num_classes=2,depth=1"
    options = f"--no-pretrained --speedups 1.2,400 --output-dir {out} --plot {tmp_path / 's.svg'} --round-to 4"
    result = run("sweep", name, *options.split())
    assert result.exit_code == 0, result.output
    assert "out of reach" in result.stdout
    assert "original" in result.stdout
    assert (tmp_path / "s.svg").stat().st_size > 1000
    saved = out / "1.2x"
    options = f"--data {tmp_path / 'data'} --batch-size 2 --workers 0 --seconds 0.2"
    result = run("quantize", saved, *options.split())
    assert result.exit_code == 0, result.output
    assert "original int8" in result.stdout
    assert "the class is the same for" in result.stdout
    assert (saved / "model.int8.onnx").exists()
    result = run("latency", saved, saved / "model.int8.onnx", "--seconds", "0.2", "--json", "-q")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == [str(saved), str(saved / "model.int8.onnx")]
    result = run("latency", SMALL, "--input-size", "32", "--batch-size", "2", "--seconds", "0.2")
    assert "2 sample(s) a run" in result.stdout


def test_comb_lists_groups(fakes: Fakes, run: Any) -> None:
    result = run("comb", "torchvision:shufflenet_v2_x0_5")
    assert result.exit_code == 0, result.stderr
    for text in ("open[1]", "5:", "layer2.weight dim 0", "and 2 more", "an output", "tied: heads"):
        assert text in result.stdout
    assert "layer3.weight" not in result.stdout
    assert "1 of 2 groups can be pruned: they hold 98.7% of the parameters and 50.0% of the MACs." in result.stdout
    assert "It reads values (net.py:14)." in result.stdout
    run("comb", "torchvision:shufflenet_v2_x0_5", "--proof-copies", "7", "--proof-seconds", "2")
    assert [(call["proof_copies"], call["proof_seconds"]) for call in fakes.calls] == [(1000, None), (7, 2.0)]


def test_outputs_that_matter_are_named(fakes: Fakes, run: Any) -> None:
    result = run("comb", "torch.nn:Identity", "--input-size", "8", "--outputs", "logits", "--outputs", "hidden.2")
    assert result.exit_code == 0, result.stderr
    assert fakes.calls[0]["outputs"] == ["logits", "hidden.2"]
    assert "These outputs keep their width" in result.stdout
    result = run("compress", "timm:resnet18", "--no-pretrained", "--outputs", "logits", "--outputs", "hidden.2")
    assert result.exit_code == 0, result.stderr
    assert fakes.calls[1]["config"].outputs == ("logits", "hidden.2")


def test_comb_as_json(fakes: Fakes, run: Any) -> None:
    result = run("comb", "torch.nn:Identity", "--input-size", "8", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["open_share"] == {"parameters": 0.987, "macs": 0.5}
    assert data["values_read"] == ["net.py:14"]
    assert [group["frozen"] for group in data["groups"]] == [None, "an output"]
    assert len(data["groups"][0]["members"]) == 5
    assert fakes.calls[0]["example_inputs"].shape == (1, 3, 8, 8)


def test_demo(report: Report, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def run_demo(**kwargs: Any) -> Any:
        given.update(kwargs)
        return SimpleNamespace(report=report)

    monkeypatch.setitem(sys.modules, "cpd.demo", SimpleNamespace(run_demo=run_demo))
    result = run("demo", "--output-dir", tmp_path, "--seed", "3", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert given == {"output_dir": tmp_path, "overwrite": False, "seed": 3, "progress": False}
    assert "0.9270" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("comb", "timm:resnet81"), "error: timm has no model 'resnet81'."),
        (("compress", "nothing"), "error: A model is named timm:NAME"),
        (("comb", "torch.nn:Identity"), "--input-size H[,W]"),
        (("comb", "timm:resnet18", "--input-size", "big"), "error: --input-size takes H or H,W"),
        (("compress", "timm:resnet18", "--data", "/no/such"), "error: --data /no/such is not a folder"),
    ],
)
def test_errors_are_one_line(fakes: Fakes, run: Any, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not fakes.calls


def test_library_errors_and_debug(fakes: Fakes, run: Any) -> None:
    fakes.error = NothingToPruneError("no group [of 3] can be pruned")
    arguments = ("compress", "timm:resnet18", "--no-pretrained", "--quiet")
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (3, "error: no group [of 3] can be pruned\n")
    result = run(*arguments, "--debug")
    assert result.exception is fakes.error
    fakes.error = ArtifactError("the disk is full")
    assert run(*arguments).exit_code == 1


def test_interrupted_runs_say_how_to_resume(
    fakes: Fakes, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.error = KeyboardInterrupt()
    arguments = ["compress", "timm:resnet18", "--no-pretrained", "--output-dir", str(tmp_path / "my run")]
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (
        130,
        "interrupted. There was no checkpoint yet: start the command again.\n",
    )
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "checkpoint.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["cpd", *arguments])
    result = run(*arguments)
    assert f"is intact; resume with: cpd {' '.join(arguments[:-1])} '{tmp_path}/my run' --resume\n" in result.stderr
    assert run(*arguments[:3], "--quiet").stderr == "interrupted. Nothing was written.\n"


def test_report_is_written_anew_from_the_figures(report: Report, run: Any, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "report.html").read_text() == report.to_html()
    assert "2.04× faster" in result.stdout
    (tmp_path / "report.json").write_text("{")
    before = (tmp_path / "report.html").read_text()
    result = run("report", tmp_path)
    assert (result.exit_code, "truncated" in result.stderr) == (1, True)
    assert (tmp_path / "report.html").read_text() == before
    assert "is not a folder that cpd compress or result.save wrote" in run("report", tmp_path / "none").stderr


def test_report_of_a_sweep(report: Report, run: Any, tmp_path: Path) -> None:
    points = (
        SweepPoint(2.0, 2.04, report.result, str(tmp_path / "2x")),
        SweepPoint(40.0, None, None, error="too fast <b>"),
    )
    swept = Sweep(report.original, points)
    assert Sweep.from_dict(json.loads(json.dumps(swept.to_dict()))) == swept
    (tmp_path / "sweep.json").write_text(json.dumps(swept.to_dict()))
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "out of reach" in result.stdout
    page = Page((tmp_path / "report.html").read_text())
    assert not page.open
    assert page.count("circle") == 2
    assert [found["href"] for tag, found in page.tags if tag == "a"] == ["2x/report.html"]
    assert "too fast <b>" in page.text
    (tmp_path / "sweep.json").write_text("{}")
    assert run("report", tmp_path).exit_code == 1
    assert not Page(Sweep(None, points[1:]).to_html()).open


def test_log_is_shown_and_quietened(fakes: Fakes, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def compress(model: nn.Module, **kwargs: Any) -> Any:
        logging.getLogger("cpd.selection.search").info("combing [1]")
        return fakes.compress(model, **kwargs)

    monkeypatch.setattr(cpd, "compress", compress, raising=False)
    arguments = ("compress", "timm:resnet18", "--no-pretrained", "--json")
    result = run(*arguments)
    assert "combing [1]" in result.stderr
    json.loads(result.stdout)
    assert run(*arguments, "--quiet").stderr == ""
    assert logging.getLogger("cpd").handlers == []


def test_version_and_help(run: Any) -> None:
    version = run("--version")
    assert version.exit_code == 0
    assert re.fullmatch(r"cpd \d+\.\d+\.\d+.*\n", version.stdout)
    assert all(command in run("--help").stdout for command in ("compress", "comb", "demo"))


def test_a_reader_that_has_enough_ends_the_command_without_a_word() -> None:
    """As `cpd env | head -1` does."""
    command = [sys.executable, "-c", "from cpd.cli import app; print('here', flush=True); input(); app(['env'])"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert None not in (process.stdin, process.stdout, process.stderr)
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert "not foreseen" not in process.stderr.read()
    assert process.returncode == 1


def test_env_says_what_a_report_of_a_fault_needs(run: Any) -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "timm", "onnxruntime", "cpu", "cores", "platform"} <= set(found)
    assert run("env").stdout.splitlines() == [f"{name}: {value}" for name, value in found.items()]


def test_python_m_and_lazy_imports() -> None:
    code = (
        "import sys, cpd; before = set(sys.modules); import cpd.cli; new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'timm', 'torchvision', 'onnx', 'accelerate'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "cpd", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("cpd ")


def test_log_and_notes_are_in_the_words_of_the_command_line(
    fakes: Fakes, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.report = dataclasses.replace(fakes.report, notes=("Pass data=loader to keep it.",))

    def compress(model: nn.Module, **kwargs: Any) -> Any:
        logging.getLogger("cpd").info("round_to=8 and [1] are kept")
        return fakes.compress(model, **kwargs)

    monkeypatch.setattr(cpd, "compress", compress, raising=False)
    result = run("compress", "timm:test_resnet", "--no-pretrained")
    assert "Note: Pass --data FOLDER to keep it." in result.stdout
    assert "--round-to 8 and [1] are kept" in result.stderr


def test_a_note_that_the_log_has_shown_on_the_same_terminal_is_not_shown_again(
    fakes: Fakes, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.report = dataclasses.replace(fakes.report, notes=("It was recovered.", "A group is frozen."))

    def compress(model: nn.Module, **kwargs: Any) -> Any:
        logging.getLogger("cpd").info("It was recovered.")
        logging.getLogger("cpd").warning("A group is frozen.")
        return fakes.compress(model, **kwargs)

    monkeypatch.setattr(cpd, "compress", compress, raising=False)
    arguments = ("compress", "timm:test_resnet", "--no-pretrained")
    assert "Note: It was recovered." in run(*arguments).stdout
    monkeypatch.setattr(command, "_one_terminal", lambda: True)
    shown = run(*arguments).stdout
    assert "recovered" not in shown
    assert "Note: A group is frozen." in shown


def test_where_a_result_is_not_written_it_says_so(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    said = "Nothing was written: --output-dir FOLDER"
    assert said in run("compress", "timm:test_resnet", "--no-pretrained").stdout
    assert said not in run("compress", "timm:test_resnet", "--no-pretrained", "--output-dir", tmp_path).stdout


def test_retries_without_a_network_are_told_once(
    fakes: Fakes, run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compress(model: nn.Module, **kwargs: Any) -> Any:
        for number in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry %d/5].", number)
        return fakes.compress(model, **kwargs)

    monkeypatch.setattr(cpd, "compress", compress, raising=False)
    assert run("compress", "timm:test_resnet", "--no-pretrained").exit_code == 0
    assert [record.args for record in caplog.records if "Retrying" in record.msg] == [(0,)]
    caplog.clear()
    assert run("compress", "timm:test_resnet", "--no-pretrained", "--verbose").exit_code == 0
    assert len([record for record in caplog.records if "Retrying" in record.msg]) == 5


def test_a_teacher_by_name(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    result = run("compress", "timm:test_resnet", "--no-pretrained", "--teacher", "timm:test_vit")
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert (type(call["model"]).__name__, type(call["teacher"]).__name__) == ("ResNet", "VisionTransformer")
    assert not call["teacher"].training
    result = run("compress", "timm:test_resnet", "--no-pretrained", "--teacher", tmp_path)
    assert (result.exit_code, "is not a folder that cpd compress or result.save wrote" in result.stderr) == (1, True)
    assert run("compress", "timm:test_resnet", "--no-pretrained", "--teacher", "timm:nothing").exit_code == 2
    assert len(fakes.calls) == 1
