"""The charts of a report: layers by stage, widths, operators."""

from __future__ import annotations

import math

import pytest

from cpd.report.charts import _stages, line_chart, stage_bar
from cpd.report.report import Report
from helpers.pages import Page


def test_html_bars_are_widths_against_the_widest_layer(report: Report) -> None:
    page = Page(report.to_html())
    heights = [attributes["height"] for tag, attributes in page.tags if tag == "rect"][:6]
    assert heights == ["80.0", "56.57", "160.0", "113.14", "160.0", "160.0"]  # 160 sqrt(width / widest)
    colours = [attributes["class"] for tag, attributes in page.tags if tag == "g" and "s" in attributes["class"][:1]]
    assert colours == ["s1", "s2", "s2"]


def test_html_tells_where_the_time_goes(report: Report) -> None:
    page = Page(report.to_html())
    bars = [attributes["width"] for tag, attributes in page.tags if tag == "rect"][6:10]
    assert bars == ["100.0", "33.33", "6.67", "13.33"]  # Conv, then Gemm: which came only after
    assert page.text.index("second") < page.text.index("first") < page.text.index("third")


def test_html_tells_widths_before_and_after(report: Report) -> None:
    text = " ".join(Page(report.to_html()).text.split())
    assert "layer1.0.conv1Conv2d64 → 32−50 %" in text
    assert "blocks.0.fc2Linear256" in text
    assert "256 → 256" not in text


def test_stages_are_one_bar_that_adds_up(report: Report) -> None:
    bar = stage_bar({"comb": 1.0, "shrink": 0.001, "score": 3.0, "check": 0.001, "lost": math.nan})
    assert [(part.name, part.hue) for part in bar] == [("comb", 1), ("score", 2), ("others", 0)]
    assert sum(part.width for part in bar) == pytest.approx(720, abs=0.1)
    assert [part.x for part in bar[1:]] == pytest.approx([bar[0].width, bar[0].width + bar[1].width], abs=0.01)
    assert len(stage_bar({str(number): 1.0 for number in range(20)})) == 7
    assert stage_bar({}) == []
    text = Page(report.to_html()).text
    assert "comb 1.5 s (11 %)" in text
    assert "14 s in all" in text


@pytest.mark.parametrize(
    ("values", "counts", "ticks"),
    [
        ([98.67, 99.17], False, ["98.6", "98.8", "99.0", "99.2"]),
        ([0.01352, 0.1031], False, ["0.000", "0.025", "0.050", "0.075", "0.100", "0.125"]),
        ([0, 6], True, ["0", "2", "4", "6"]),
        ([1, 2], True, ["1", "2"]),
        ([-1.2, 0.3], False, ["−1.5", "−1.0", "−0.5", "0.0", "0.5"]),
        ([0, 4_000_000], False, ["0", "1e+06", "2e+06", "3e+06", "4e+06"]),
        ([3.0, 3.0], False, ["3"]),
        ([0.0, 5e-324], False, ["0"]),
        ([-1.7e308, 1.7e308], False, ["-1.7e+308"]),
    ],
)
def test_axes_have_round_numbers(values: list[float], counts: bool, ticks: list[str]) -> None:
    chart = line_chart("it", "x", {"it": [(value, 1.0) for value in values]}, counts=counts)
    assert chart is not None
    assert [text for _, text in chart.x_ticks] == ticks
    places = [x for x, _ in chart.x_ticks]
    if len(ticks) > 1:  # the first and the last at the ends, and the values between them
        assert (places[0], places[-1]) == (46.0, 344.0)
        assert all(46.0 <= x <= 344.0 for x, _ in chart.lines[0].points)


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
