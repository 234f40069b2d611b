"""The report as dict, page and card."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cpd.errors import ArtifactError
from cpd.report.records import Figures, GroupRow
from cpd.report.report import Report, call_text, human
from helpers.pages import Page

HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script>'


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
    assert page.count("path", class_="target") == 1  # the metric of the unpruned model
    assert page.count("rect", class_="was") == page.count("rect", class_="kept") == 5  # layers, operators
    assert "Asked for a speed-up of 2; found 2.04 times as fast (95 % interval 1.98 to 2.11)." in page.text
    assert "cpd.compress(model, target_speedup=2, epochs=2, seed=0, threads=1)" in page.text


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


def test_the_metric_from_stage_to_stage_is_one_line_and_the_notes_are_folded(report: Report) -> None:
    page = Page(report.to_html())
    line = "0.9270 before → 0.2500 after pruning → 0.9100 compensated → 0.9150 trained"
    assert line in page.text
    assert next(found for tag, found in page.tags if tag == "details") == {}
    assert (
        page.text.index(line) < page.text.index("1 note on the run") < page.text.index("statistics were measured anew")
    )
    assert f"Metric: {line}." in report.model_card()
    bare = dataclasses.replace(report, original=dataclasses.replace(report.original, metric=None))
    assert bare.trail == ()
    assert next(found for tag, found in Page(bare.to_html()).tags if tag == "details") == {"open": None}


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ((), ["before", "after"]),
        (({"epoch": 0, "metric": 0.915},), ["before", "after pruning"]),
        (({"epoch": 0, "metric": 0.915, "pruned": 0.915},), ["before", "after pruning"]),
        (({"epoch": 0, "metric": 0.915, "pruned": 0.2, "recovery": "recalibration"},),
         ["before", "after pruning", "with BatchNorm recalibrated"]),
        (({"epoch": 0, "metric": 0.915, "kept": True}, {"epoch": 1, "metric": 0.9, "kept": False}),
         ["before", "before training"]),
        (({"epoch": 1, "metric": 0.92, "kept": True}, {"epoch": 2, "metric": 0.9}),
         ["before", "trained", "in the end"]),
    ],
)  # fmt: skip
def test_stages_of_the_metric(report: Report, history: tuple[dict[str, Any], ...], words: list[str]) -> None:
    trail = dataclasses.replace(report, history=history).trail
    assert [step.words for step in trail] == words
    assert (trail[0].value, trail[-1].value) == ("0.9270", "0.9150")


def test_the_metric_of_an_int8_model_ends_its_line(report: Report) -> None:
    found = dataclasses.replace(
        report, latency={"runtime": "onnxruntime:int8"}, result=dataclasses.replace(report.result, metric=0.9)
    )
    assert tuple(found.trail[-1]) == ("0.9000", "in INT8")


def test_a_fraction_is_shown_in_per_cent(report: Report) -> None:
    found = dataclasses.replace(report, metric_name="val accuracy", call={"max_drop": 0.02})
    assert tuple(found.figure_rows[0]) == ("Val accuracy", "92.70 %", "91.50 %", "−1.20")
    assert "at most 2 of val accuracy; found 1.2" in found.asked
    text = Page(found.to_html()).text
    assert "92.70 % before → 25.00 % after pruning" in text
    assert "Val accuracy [%] (dotted: shrinks)" in text
    for name, original in (("val accuracy", 92.7), ("validation loss", 0.9), ("accuracy [%]", 0.9)):
        figures = dataclasses.replace(report.original, metric=original)
        other = dataclasses.replace(report, metric_name=name, original=figures)
        assert other.figure_rows[0].before in ("92.70", "0.9000", "0.90 %")  # as it was given


def test_the_search_is_a_table_with_a_verdict(report: Report) -> None:
    page = Page(report.to_html())
    rows = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*ranked.*?</tr>", report.to_html(), re.S)
    assert [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows] == [
        ["35.0 %", "1.90×", "2.04×", "chosen, 2.0 % faster than asked"]
    ]
    assert page.count("tr", class_="chosen") == 1
    assert "50.0 %" in page.text  # of a candidate of which an older report says less


def test_the_environment_is_told_once(report: Report) -> None:
    text = Page(report.to_html()).text
    assert text.count("An EPYC") == 1
    assert text.index("Environment") < text.index("1.22")  # what the timing adds


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


def test_the_metric_is_called_by_its_name(report: Report) -> None:
    figures = [
        dataclasses.replace(item, metric=value) for item, value in ((report.original, 92.7), (report.result, 91.5))
    ]
    named = dataclasses.replace(report, original=figures[0], result=figures[1], metric_name="top-1 accuracy [%]")
    assert tuple(named.figure_rows[0]) == ("Top-1 accuracy", "92.70 %", "91.50 %", "−1.20")
    assert "Top-1 accuracy" in Page(named.to_html()).text
    assert "| Top-1 accuracy | 92.70 % | 91.50 % | −1.20 |" in named.model_card()
    assert Report.from_dict(json.loads(json.dumps(named.to_dict()))) == named
    old = {name: value for name, value in named.to_dict().items() if name != "metric_name"}
    assert Report.from_dict(old).figure_rows[0].label == "Metric"
    hostile = dataclasses.replace(named, metric_name="<b>|x|</b>")
    assert "<b>" not in hostile.to_html()
    assert "&lt;b>\\|x\\|&lt;/b>" in hostile.model_card()
