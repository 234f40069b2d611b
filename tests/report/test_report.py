"""The report as dict, page and card; models by name; the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import cpd
from cpd.cli import app
from cpd.cli.arguments import parse_numbers, parse_size
from cpd.cli.folders import image_folders
from cpd.errors import ArtifactError, InputError, NothingToPruneError
from cpd.jobs.sensitivity import RATIOS
from cpd.jobs.sweep import Sweep
from cpd.model.inputs import as_call
from cpd.model.sources import ModelSource, default_inputs, identify, image_inputs, resolve
from cpd.report.charts import _stages
from cpd.report.records import Figures, GroupRow, LayerRow, SweepPoint
from cpd.report.report import Report, call_text, human

HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script>'
LEAKY = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's image reader
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture
def report() -> Report:
    return Report(
        call={"target_speedup": 2, "target_macs": None, "epochs": 2, "seed": 0, "threads": 1},
        model_class="timm.models.resnet.ResNet",
        source="timm:resnet18,num_classes=10",
        criterion="hessian",
        criterion_reason="data was given",
        normalization="memory",
        original=Figures(11_181_642, 1_814_083_944, 2_484_746, 20.0, 0.927),
        result=Figures(3_100_000, 640_000_000, 1_300_000, 9.8, 0.915),
        latency={
            "speedup": 2.04,
            "original_ms": 20.0,
            "candidate_ms": 9.8,
            "speedup_low": 1.98,
            "speedup_high": 2.11,
            "threads": 1,
            "runs": 50,
            "environment": {"onnxruntime": "1.22"},
        },
        groups=(
            GroupRow(
                "layer1.0.conv1", 64, 24, True, None, ("layer1.0.conv1.weight dim 0", "layer1.0.bn1.weight dim 0")
            ),
            GroupRow("blocks.0.norm", 512, 256, False, None, ("blocks.0.norm.weight dim 0",)),
            GroupRow("fc", 10, 10, True, "is an output of the model", ("fc.weight dim 0",)),
        ),
        layers=(
            LayerRow("layer1.0.conv1", "Conv2d", 64, 32),
            LayerRow("blocks.0.fc1", "Linear", 256, 128),
            LayerRow("blocks.0.fc2", "Linear", 256, 256),
        ),
        nodes=(
            {"name": "first", "op": "Conv", "before_ms": 0.5, "after_ms": 0.25},
            {"name": "second", "op": "Conv", "before_ms": 1.0, "after_ms": 0.25},
            {"name": "third", "op": "Gemm", "before_ms": 0.1, "after_ms": None},
            {"name": "fourth", "op": "Gemm", "before_ms": None, "after_ms": 0.2},
        ),
        shrinks=({"epoch": 0.5, "step": 5, "share": 0.5}, {"epoch": 1.5, "step": 15, "share": 1.0}),
        checks={"masked_equals_shrunk": 3e-7, "onnx_parity": 1e-6},
        history=(
            {"epoch": 1, "loss": 2.0, "task_loss": 1.5, "kd_loss": 0.5, "lr": 0.01, "metric": 0.90},
            {"epoch": 2, "loss": 1.2, "task_loss": 0.9, "kd_loss": 0.3, "lr": 0.001, "metric": 0.915},
        ),
        search=({"macs_ratio": 0.5, "speedup": 1.6}, {"macs_ratio": 0.35, "speedup": 2.04}),
        seconds={"comb": 1.5, "search": 12.0},
        environment={"torch": "2.9"},
        notes=("BatchNorm statistics were measured anew",),
    )


class Page(HTMLParser):
    """Every tag with its attributes, and the text, of a page whose tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return sum(name == tag and wanted.items() <= found.items() for name, found in self.tags)


# ------------------------------------------------------------------------------------------ report


def test_report_round_trips_through_json(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == report


def test_report_of_nothing_measured_round_trips(report: Report) -> None:
    bare = Report({}, "m.Net", None, "magnitude", "no data", "none", Figures(10, 20, 30), Figures(5, 6, 7))
    assert Report.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    assert (bare.speedup, bare.metric_drop) == (None, None)


def test_to_dict_is_plain(report: Report) -> None:
    odd = dataclasses.replace(
        report,
        call={"output_dir": Path("out"), "dtype": torch.float32, "sizes": (1, 2), "nan": math.nan},
        original=dataclasses.replace(report.original, macs=torch.tensor([7]).numpy()[0]),
    )
    plain = odd.to_dict()
    assert plain["call"] == {"output_dir": "out", "dtype": "torch.float32", "sizes": [1, 2], "nan": None}
    assert type(plain["original"]["macs"]) is int


def test_report_properties(report: Report) -> None:
    assert report.speedup == 2.04
    assert report.metric_drop == pytest.approx(0.012)
    assert dataclasses.replace(report, latency=None).speedup == pytest.approx(20.0 / 9.8)


def test_report_is_frozen(report: Report) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.criterion = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("broken", "named"), [({"call": {}}, "criterion"), ([], "list"), (None, "NoneType")])
def test_foreign_dict_is_an_artifact_error(broken: Any, named: str) -> None:
    with pytest.raises(ArtifactError, match=named):
        Report.from_dict(broken)


def test_truncated_nested_dict_is_an_artifact_error(report: Report) -> None:
    data = report.to_dict()
    del data["original"]["macs"]
    with pytest.raises(ArtifactError, match="Figures lacks macs"):
        Report.from_dict(data)
    with pytest.raises(ArtifactError, match="not a report"):
        Report.from_dict({**report.to_dict(), "groups": 3})


def test_figure_rows(report: Report) -> None:
    rows = {row.label: row for row in report.figure_rows}
    assert rows["Parameters"][1:] == ("11.18 M", "3.10 M", "−72.3 %")
    assert rows["ONNX Runtime latency"][1:] == ("20.00 ms", "9.80 ms", "2.04× faster")
    assert rows["Metric"][1:] == ("0.9270", "0.9150", "−0.0120")
    unmeasured = dataclasses.replace(report, original=Figures(1, 0, 1), result=Figures(1, 0, 1))
    assert [row.label for row in unmeasured.figure_rows] == ["Parameters", "MACs", "Activations"]


def test_human() -> None:
    assert [human(n) for n in (0, 999, 1_000, 11_689_512, 712_345_678)] == ["0", "999", "1.00 k", "11.69 M", "712.3 M"]


def test_html_is_self_contained(report: Report) -> None:
    html = report.to_html()
    page = Page(html)
    assert not page.open
    assert page.count("script") == page.count("img") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(key) or "data:,").startswith(("data:", "#")), (tag, attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert "@import" not in html
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert page.count("meta", name="viewport") == 1


def test_html_shows_every_stage(report: Report) -> None:
    page = Page(report.to_html())
    for text in ("2.04× faster", "11.18 M", "hessian", "data was given", "layer1.0.conv1", "3.0e-07", "1.22"):
        assert text in page.text
    assert "is an output of the model" in page.text
    assert "BatchNorm statistics were measured anew" in page.text
    assert page.count("polyline") == 4  # loss, task, distillation; metric
    assert page.count("path", class_="mark") == 2  # shrinks
    assert page.count("path", class_="target") == 2  # the metric of the unpruned model, the speed-up asked for
    assert page.count("rect", class_="was") == page.count("rect", class_="kept") == 5  # layers, operators
    assert "Asked for a speed-up of 2; found 2.04 times as fast (95 % interval 1.98 to 2.11)." in page.text
    assert "cpd.compress(model, target_speedup=2, epochs=2, seed=0, threads=1)" in page.text


def test_html_bars_are_widths_against_the_widest_layer(report: Report) -> None:
    page = Page(report.to_html())
    heights = [attributes["height"] for tag, attributes in page.tags if tag == "rect"][:6]
    assert heights == ["80.0", "56.57", "160.0", "113.14", "160.0", "160.0"]  # 160 sqrt(width / widest)
    colours = [attributes["class"] for tag, attributes in page.tags if tag == "g" and "s" in attributes["class"][:1]]
    assert colours == ["s1", "s2", "s2"]


def test_html_tells_where_the_time_goes(report: Report) -> None:
    page = Page(report.to_html())
    bars = [attributes["width"] for tag, attributes in page.tags if tag == "rect"][6:]
    assert bars == ["100.0", "33.33", "6.67", "13.33"]  # Conv, then Gemm: which came only after
    assert page.text.index("second") < page.text.index("first") < page.text.index("third")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"target_macs": 0.5}, "Asked for 50.0% of the MACs; found 35.3%."),
        ({"target_params": 4_000_000}, "Asked for 4,000,000 parameters; found 3,100,000."),
        ({"target_latency_ms": 10}, "Asked for 10 ms; found 9.8 ms."),
        ({}, ""),
    ],
)
def test_what_was_asked(report: Report, call: dict[str, Any], told: str) -> None:
    assert dataclasses.replace(report, call=call).asked == told
    assert told in Page(dataclasses.replace(report, call=call).to_html()).text


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["conv1", "layer1.0.conv1", "layer2.0.conv1", "fc"], ["conv1", "layer1", "layer2", "fc"]),
        (["stages.0.a", "stages.1.a", "head.fc"], ["stages.0", "stages.1", "head"]),
        ([f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1)], [f"layer{i}" for i in (1, 1, 2, 2, 3, 3)]),
        ([f"features.{i}.conv" for i in range(20)], ["features"] * 20),
        (["features.conv0", "features.b1.a", "features.b2.a"], ["features", "features.b1", "features.b2"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_stages(names: list[str], stages: list[str]) -> None:
    assert _stages(names) == stages


def test_html_escapes(report: Report) -> None:
    hostile = dataclasses.replace(
        report,
        source=HOSTILE,
        criterion_reason=HOSTILE,
        notes=(HOSTILE,),
        call={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        groups=(GroupRow("<script>", 8, 4, True), GroupRow("<script>", 8, 8, True, HOSTILE)),
    )
    html = hostile.to_html()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert HOSTILE in Page(html).text


def test_html_of_a_bare_report() -> None:
    bare = Report({}, "m.Net", None, "magnitude", "no data", "none", Figures(10, 20, 30), Figures(5, 6, 7))
    page = Page(bare.to_html())
    assert not page.open
    assert "Compression report" in page.text
    assert page.count("svg") == 0


def test_html_skips_what_is_not_finite(report: Report) -> None:
    history = ({"epoch": 1, "loss": math.nan, "metric": None}, {"epoch": 2, "loss": 1.0})
    page = Page(dataclasses.replace(report, history=history, checks={"onnx_parity": math.nan}).to_html())
    assert page.count("polyline") == 1
    assert "nan" not in page.text
    assert "not finite" in page.text


def test_model_card_of_a_named_model(report: Report) -> None:
    card = report.model_card()
    assert "| Parameters | 11.18 M | 3.10 M | −72.3 % |" in card
    assert 'cpd.load("path/to/this/folder")' in card
    assert "onnxruntime.InferenceSession" in card
    assert "cpd.compress(model, target_speedup=2, epochs=2, seed=0, threads=1)" in card


def test_model_card_of_other_models(report: Report) -> None:
    unknown = dataclasses.replace(report, source=None).model_card()
    assert 'cpd.load("path/to/this/folder", model=fresh)' in unknown
    factory = dataclasses.replace(report, source="my.models:build,depth=3").model_card()
    assert "from my.models import build" in factory
    assert "model=build()" in factory


def test_model_card_keeps_its_table_and_its_code(report: Report) -> None:
    card = dataclasses.replace(report, criterion_reason="a|b <script>\n# head", notes=("x\n## y",)).model_card()
    assert "a\\|b &lt;script> # head" in card
    assert "\n## y" not in card
    for code in re.findall(r"```python\n(.*?)```", card, re.S):
        compile(code, "card", "exec")


def test_call_text_breaks_long_calls() -> None:
    text = call_text({"target_speedup": 2, **{f"argument_{i}": "value" * 3 for i in range(5)}, "loss": None})
    assert text.startswith("cpd.compress(\n    model,\n    target_speedup=2,\n")
    assert "loss" not in text
    told = call_text({"schedule": {"kind": "cubic", "end": 0.6}, "training": {"kd": "cwd"}})
    assert told.startswith("cpd.compress(\n    model,\n    schedule=cpd.Schedule(kind='cubic', end=0.6),\n")
    assert "    training=cpd.DistillConfig(kd='cwd'),\n" in told
    assert call_text({"seed": 0, "data": "data"}) == "cpd.compress(model, seed=0, data=data)"


# ------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:resnet18.a1_in1k,num_classes=10",
        "timm:vit_tiny_patch16_224,img_size=[96,96],num_classes=10",
        "torchvision:swin_t",
        "torchvision:resnet18,num_classes=3",
        "torch.nn:Identity",
        'torch.nn:Identity,note="10"',
    ],
)
def test_names_round_trip(name: str) -> None:
    source = resolve(name)
    assert str(source) == name
    assert ModelSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_arguments_are_json_or_text() -> None:
    source = resolve("timm:resnet18,num_classes=10,global_pool=max,norm=null")
    assert source.kwargs == {"num_classes": 10, "global_pool": "max", "norm": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet81", "timm has no model 'resnet81'.*resnet18"),
        ("timm:resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("torchvision:shufflenet_v2_x1", "shufflenet_v2_x1_0"),
        ("resnet18", "timm:resnet18 or torchvision:resnet18"),
        ("timm:", "timm:NAME"),
        ("", "timm:NAME"),
        ("a b:c", "timm:NAME"),
        ("../x:y", "timm:NAME"),
        ("cpd_no_such_package.models:build", "no module"),
        ("torchvisio:build", "torchvision"),
        ("torch.nn:Identiti", "Identity"),
        ("torch:__version__", "not a callable"),
    ],
)
def test_unknown_names_suggest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_factory_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_here.py").write_text(
        "import torch\ndef build(width=4):\n    return torch.nn.Linear(width, 2)\ndef number():\n    return 3\n"
    )
    (tmp_path / "needs_more_here.py").write_text("import cpd_no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = resolve("my_models_here:build,width=6").build()
    assert isinstance(model, nn.Linear)
    assert model.in_features == 6
    with pytest.raises(InputError, match="got int"):
        resolve("my_models_here:number").build()
    with pytest.raises(InputError, match="cpd_no_such_dependency"):
        resolve("needs_more_here:build")
    assert sys.path == path


def test_build_failure_is_an_input_error() -> None:
    with pytest.raises(InputError, match="Could not build timm:resnet18,no_such_argument=1"):
        resolve("timm:resnet18,no_such_argument=1").build()
    with pytest.raises(InputError, match="num_classes"):
        resolve("torchvision:resnet18,num_classes=3").build(pretrained=True)


def test_build_takes_arguments() -> None:
    model = resolve("timm:resnet18,num_classes=10").build(num_classes=4)
    assert model.fc.out_features == 4


def test_foreign_source_dict() -> None:
    with pytest.raises(ArtifactError, match="no model source"):
        ModelSource.from_dict({"kind": "pickle", "name": "x", "kwargs": {}})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: timm.create_model("resnet18", num_classes=10), "timm:resnet18.a1_in1k,num_classes=10"),
        (lambda: timm.create_model("resnet18", in_chans=1), "timm:resnet18.a1_in1k,num_classes=1000,in_chans=1"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=5),
            "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k,num_classes=5,img_size=[96,96]",
        ),
        (lambda: torchvision.models.shufflenet_v2_x1_0(), "torchvision:shufflenet_v2_x1_0,num_classes=1000"),
        (lambda: torchvision.models.squeezenet1_1(num_classes=7), "torchvision:squeezenet1_1,num_classes=7"),
        (lambda: torchvision.models.regnet_x_400mf(), "torchvision:regnet_x_400mf,num_classes=1000"),
    ],
)
def test_identify(model: Any, expected: str) -> None:
    built = model()
    state = torch.get_rng_state()
    source = identify(built)
    assert str(source) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert source is not None
    rebuilt = source.build()
    rebuilt.load_state_dict(built.state_dict())


def _changed_conv() -> nn.Module:
    model = timm.create_model("resnet18")
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 5, padding=2, bias=False)
    return model


def _changed_stride() -> nn.Module:
    model = timm.create_model("resnet18")
    model.layer2[0].conv1.stride = (1, 1)
    return model


def _changed_setting() -> nn.Module:
    model = timm.create_model("resnet18")
    model.drop_rate = 0.5  # neither the state dict nor str(model) shows it
    return model


def _changed_forward() -> nn.Module:
    model = timm.create_model("resnet18")
    model.forward = model.forward_features
    return model


class _Subclass(torchvision.models.ResNet):
    pass


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        _changed_conv,
        _changed_stride,
        _changed_setting,
        _changed_forward,
        lambda: _Subclass(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    ],
)
def test_identify_gives_none_rather_than_guess(build: Any) -> None:
    assert identify(build()) is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet18", (1, 3, 224, 224)),
        ("timm:resnet18,in_chans=1", (1, 1, 224, 224)),
        ("timm:vit_tiny_patch16_224,img_size=96,depth=1", (1, 3, 96, 96)),
        ("torchvision:shufflenet_v2_x0_5", (1, 3, 224, 224)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("torchvision:efficientnet_b1", (1, 3, 240, 240)),
        ("torchvision:lraspp_mobilenet_v3_large", (1, 3, 224, 224)),
    ],
)
def test_default_inputs(name: str, shape: tuple[int, ...]) -> None:
    source = resolve(name)
    model = source.build().double()
    state = torch.get_rng_state()
    inputs = default_inputs(model, source)
    assert inputs is not None
    assert (tuple(inputs.shape), inputs.dtype) == (shape, torch.float64)
    assert inputs.std() > 0.9
    assert torch.equal(inputs, default_inputs(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mc3_18", "raft_small", "ssdlite320_mobilenet_v3_large"])
def test_default_inputs_of_torchvision_models_that_take_no_single_image(name: str) -> None:
    source = resolve(f"torchvision:{name}")
    model = source.build().eval()
    first, again = default_inputs(model, source), default_inputs(model)
    leaves = zip(tree_leaves(first), tree_leaves(again), strict=True)
    assert all(torch.equal(left, right) for left, right in leaves)
    with torch.no_grad():
        as_call(first).on(model)


def test_default_inputs_of_unknown_models() -> None:
    assert default_inputs(nn.Conv2d(3, 8, 3)) is None
    assert image_inputs(nn.Conv2d(5, 8, 3), (4, 6)).shape == (1, 5, 4, 6)


# ------------------------------------------------------------------------------------------ command line


class Fakes:
    """Stand-ins for the library's functions, which record what they were given."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def compress(self, model: nn.Module, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append({"model": model, **kwargs})
        return SimpleNamespace(report=self.report, speedup=self.report.speedup, model=model)

    def comb(self, model: nn.Module, example_inputs: Any) -> Any:
        self.calls.append({"model": model, "example_inputs": example_inputs})
        members = tuple(f"layer{i}.weight dim 0" for i in range(5))
        groups = (
            SimpleNamespace(
                name="open[1]", size=64, minimum=2, frozen=None, exact=True, members=members, ties=("heads",)
            ),
            SimpleNamespace(
                name="fc", size=10, minimum=1, frozen="an output", exact=False, members=members[:1], ties=()
            ),
        )
        return SimpleNamespace(groups=groups, open_share={"parameters": 0.987, "macs": 0.5}, frozen_share=())


@pytest.fixture
def fakes(report: Report, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(report)
    monkeypatch.setattr(cpd, "compress", fakes.compress, raising=False)
    monkeypatch.setattr(cpd, "comb", fakes.comb, raising=False)
    return fakes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    assert call.pop("schedule") == cpd.Schedule("one-shot")
    assert (call.pop("resume"), call.pop("checkpoint_minutes")) == (False, 10.0)
    assert call == {
        "target_speedup": 2.0,
        "output_dir": tmp_path,
        "seed": 0,
        "threads": 1,
        "round_to": 8,
        "source": "timm:resnet18,num_classes=10",
    }


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
    assert "target_speedup" not in call
    assert (call["target_macs"], call["epochs"], call["threads"], call["seed"]) == (0.5, 0, 2, 7)
    assert call["round_to"] == 4
    assert call["schedule"] == cpd.Schedule("cubic", warmup=0.1, end=0.6, interval=20)
    assert (call["resume"], call["checkpoint_minutes"], call["criterion"]) == (True, 2.0, "taylor")
    assert call["training"] == cpd.DistillConfig(
        optimizer="adamw", lr=1e-3, weight_decay=0.05, kd="cwd", kd_weight=2.0, temperature=3.0, ema=0.99, mixup=0.2,
        cutmix=1.0, mixed_precision="bf16", accumulate=2, scheduler="poly", task_weight=0.5,
        features=["layer2", "layer3"],
    )  # fmt: skip
    assert call["example_inputs"].shape == (1, 3, 64, 32)


def _write_images(root: Path, classes: int, count: int = 3) -> None:
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 16), (80 * label, 30 * index, 0)).save(folder / f"{index}.png")


@LEAKY
def test_compress_reads_image_folders(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    _write_images(tmp_path / "train", classes=2)
    _write_images(tmp_path / "val", classes=2)
    options = f"--no-pretrained --input-size 32 --batch-size 2 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18,num_classes=2", *options.split())
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    batches = list(call["data"])
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 32, 32)] * 3
    assert sorted(int(label) for _, labels in batches for label in labels) == [0, 0, 0, 1, 1, 1]

    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, 1.0]).expand(len(images), 2)

    model = Always().train()
    assert call["evaluate"](model) == 0.5
    assert model.training


@LEAKY
def test_sensitivity_of_a_folder(run: Any, tmp_path: Path) -> None:
    _write_images(tmp_path / "train", classes=2)
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


def test_profile_shows_where_the_time_goes(run: Any) -> None:
    result = run("profile", SMALL, "--input-size", "32", "--check", "1")
    assert result.exit_code == 0, result.output
    assert "Conv" in result.stdout
    assert "kernels are known on this machine" in result.stdout
    assert "of the MACs: predicted" in result.stdout
    found = json.loads(run("profile", SMALL, "--input-size", "32", "--json", "-q").stdout)
    assert sum(row["ms"] for row in found["operators"]) == pytest.approx(found["total_ms"])


@LEAKY
def test_sweep_then_quantize_then_latency(run: Any, tmp_path: Path, quick: None) -> None:
    for part in ("train", "val"):
        _write_images(tmp_path / "data" / part, classes=2)
    out, name = tmp_path / "out", "timm:test_vit,num_classes=2"
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
    assert "the same class in" in result.stdout
    assert (saved / "model.int8.onnx").exists()
    result = run("latency", saved, saved / "model.int8.onnx", "--seconds", "0.2", "--json", "-q")
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == [str(saved), str(saved / "model.int8.onnx")]
    result = run("latency", SMALL, "--input-size", "32", "--batch-size", "2", "--seconds", "0.2")
    assert "2 sample(s) a run" in result.stdout


def test_numbers_with_commas() -> None:
    assert parse_numbers("1.5, 2,3") == [1.5, 2.0, 3.0]
    with pytest.raises(InputError, match="Numbers with commas"):
        parse_numbers("fast")


@LEAKY
def test_grayscale_folder_without_validation(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    _write_images(tmp_path, classes=2)
    options = f"--no-pretrained --input-size 32 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18,num_classes=2,in_chans=1", *options.split())
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert "evaluate" not in call
    assert next(iter(call["data"]))[0].shape == (6, 1, 32, 32)


def test_image_folders_are_checked_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "onlyval" / "val" / "a").mkdir(parents=True)
    for name, message in (
        ("file", "not a folder"),
        ("no", "not a folder"),
        ("empty", "no folders"),
        ("onlyval", "no train/"),
    ):
        with pytest.raises(InputError, match=message):
            image_folders(tmp_path / name)


def test_classes_that_are_not_the_models(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    _write_images(tmp_path / "train", classes=2)
    _write_images(tmp_path / "val", classes=3)
    options = f"--no-pretrained --input-size 32 --workers 0 --data {tmp_path}"
    result = run("compress", "timm:resnet18", *options.split())
    assert "holds 2 classes (folders), the model has 1000 outputs" in result.stderr
    result = run("compress", "timm:resnet18,num_classes=2", *options.split())
    assert "different classes" in result.stderr
    assert not fakes.calls


def test_folder_without_images(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    result = run("compress", "timm:resnet18", "--no-pretrained", "--data", tmp_path)
    assert result.exit_code == 2
    assert "no images that can be read" in result.stderr


def test_comb_lists_groups(fakes: Fakes, run: Any) -> None:
    result = run("comb", "torchvision:shufflenet_v2_x0_5")
    assert result.exit_code == 0, result.stderr
    for text in ("open[1]", "5:", "layer2.weight dim 0", "and 2 more", "an output", "tied: heads"):
        assert text in result.stdout
    assert "layer3.weight" not in result.stdout
    assert "1 of 2 groups are open: they hold 98.7% of the parameters and 50.0% of the MACs." in result.stdout


def test_comb_as_json(fakes: Fakes, run: Any) -> None:
    result = run("comb", "torch.nn:Identity", "--input-size", "8", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["open_share"] == {"parameters": 0.987, "macs": 0.5}
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
    assert given == {"output_dir": tmp_path, "seed": 3, "progress": False}
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
    arguments = ("compress", "timm:resnet18", "--no-pretrained")
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
    assert (result.exit_code, result.stderr) == (130, "interrupted. There was no checkpoint yet: start it again.\n")
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "checkpoint.safetensors").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["cpd", *arguments])
    result = run(*arguments)
    assert f"go on with: cpd {' '.join(arguments[:-1])} '{tmp_path}/my run' --resume\n" in result.stderr
    assert run(*arguments[:3]).stderr == "interrupted. Nothing was written.\n"


# ------------------------------------------------------------------------------------------ recipes


def test_a_recipe_holds_any_option(fakes: Fakes, run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: timm:resnet18\ntarget-macs: 0.5\nseed: 3\nepochs: null\npretrained: false\nkd: cwd\n"
        "features: [layer2, layer3]\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    result = run("compress", "--config", recipe, "--seed", "4", "--output-dir", out)
    assert result.exit_code == 0, result.stderr
    (call,) = fakes.calls
    assert (call["target_macs"], call["seed"], call["training"].kd) == (0.5, 4, "cwd")  # the command line comes first
    assert list(call["training"].features) == ["layer2", "layer3"]
    fakes.calls.clear()
    written = out / "recipe.yaml"
    assert "seed: 4" in written.read_text()
    assert run("compress", "--config", written).exit_code == 0
    again = fakes.calls[0]
    assert {key: value for key, value in again.items() if key not in ("model", "example_inputs")} == {
        key: value for key, value in call.items() if key not in ("model", "example_inputs")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target_maks: 0.5", "no option target_maks. Is target_macs meant?"),
        ("- 3", "holds no options"),
        ("seed: [", "cannot be read as YAML"),
        ("seed: many", "Invalid value for '--seed'"),
        ("json_output: true", "no option json_output"),
        ("", "holds no options"),
    ],
)
def test_a_wrong_recipe_is_told(fakes: Fakes, run: Any, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = run("compress", "timm:resnet18", "--no-pretrained", "--config", recipe)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not fakes.calls
    assert run("compress", "--config", tmp_path / "none.yaml").exit_code == 2


def test_help_has_examples_and_exit_codes(run: Any) -> None:
    assert "130 interrupted" in run("--help").stdout
    for command in ("compress", "comb", "sweep", "quantize", "latency", "profile", "sensitivity", "report", "demo"):
        assert f"cpd {command}" in run(command, "--help").stdout.partition("Examples:")[2]
        assert "--json" in run(command, "--help").stdout


# ------------------------------------------------------------------------------------------ cpd report


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
    assert "no folder that result.save wrote" in run("report", tmp_path / "none").stderr


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


def test_parse_size() -> None:
    assert [parse_size(text) for text in ("224", "224,320", "64x32")] == [(224, 224), (224, 320), (64, 32)]
    for text in ("", "0", "-3", "1,2,3", "a", "1.5"):
        with pytest.raises(InputError):
            parse_size(text)


def test_version_and_help(run: Any) -> None:
    version = run("--version")
    assert version.exit_code == 0
    assert re.fullmatch(r"cpd (\d+\.\d+\.\d+.*|\(not installed\))\n", version.stdout)
    assert all(command in run("--help").stdout for command in ("compress", "comb", "demo"))


def test_python_m_and_lazy_imports() -> None:
    code = (
        "import sys, cpd; before = set(sys.modules); import cpd.cli; new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'timm', 'torchvision', 'onnx', 'accelerate'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "cpd", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("cpd ")
