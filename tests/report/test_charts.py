"""The charts of a report: layers by stage, widths, operators."""

from __future__ import annotations

import pytest

from cpd.report.charts import _stages
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
    bars = [attributes["width"] for tag, attributes in page.tags if tag == "rect"][6:]
    assert bars == ["100.0", "33.33", "6.67", "13.33"]  # Conv, then Gemm: which came only after
    assert page.text.index("second") < page.text.index("first") < page.text.index("third")


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
