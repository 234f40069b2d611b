"""The name of a metric, and how its values are written."""

from __future__ import annotations

from functools import partial

import pytest

from cpd.cli.folders import accuracy
from cpd.tasks.metric import metric_name, named, told, written
from cpd.tasks.segmentation import mean_iou


def f1_score(model: object) -> float:
    return 0.5


class Judge:
    metric = "mAP [%]"

    def __call__(self, model: object) -> float:
        return 40.0


@pytest.mark.parametrize(
    ("evaluate", "name"),
    [
        (f1_score, "f1 score"),
        (partial(f1_score, 3), "f1 score"),
        (accuracy, "top-1 accuracy [%]"),
        (partial(accuracy, images=[]), "top-1 accuracy [%]"),
        (partial(mean_iou, classes=3), "mean IoU [%]"),
        (Judge(), "mAP [%]"),
        (named("AUC")(lambda model: 0.5), "AUC"),
        (lambda model: 0.5, "metric"),
        (None, "metric"),
        ([].append, "append"),
    ],
)
def test_names(evaluate: object, name: str) -> None:
    assert metric_name(evaluate) == name


def test_values() -> None:
    assert told("top-1 accuracy [%]", 91.3) == "top-1 accuracy 91.30 %"
    assert (written("f1 score", 0.91304), written("perplexity", 17.5)) == ("0.9130", "17.50")
