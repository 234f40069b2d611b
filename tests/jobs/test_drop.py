"""`compress(max_drop=…)`: the fastest whose metric loses no more, a table of what was tried, and what is refused."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.cli.work import report_output
from cpd.errors import TargetError
from cpd.jobs.drop import MOST_TRAINED, Fastest, Within
from cpd.tasks.metric import each_of, named
from helpers.tiny import Tiny, loader


def agreement(teacher, images):
    """A metric of which it is known what each image contributes: whether it gets the teacher's class."""
    with torch.no_grad():
        classes = teacher.eval()(images).argmax(1)

    def each(model):
        return 100.0 * (model(images).argmax(1) == classes)

    @named("agreement [%]", each=each)
    def evaluate(model):
        return float(each(model).double().mean())

    return evaluate


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = Tiny()
    images = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    evaluate = agreement(model, images)
    options = {"round_to": 4, "scope": "global", "branches": False}
    return cpd.compress(model, max_drop=30.0, data=loader(), epochs=0, evaluate=evaluate, **options), evaluate


def test_the_result_is_the_fastest_that_held(found):
    result, evaluate = found
    report = result.report
    held = [row for row in report.tried if row["holds"]]
    assert report.result.metric == evaluate(result.model) == held[-1]["metric"]
    assert held[-1]["asked"] == max(row["asked"] for row in held)
    assert report.metric_drop <= held[-1]["upper"] <= 30.0
    assert report.result.macs / report.original.macs == pytest.approx(held[-1]["macs_left"])
    assert all(row["upper"] > 30.0 for row in report.tried if not row["holds"] and row["error"] is None)
    assert report.call["max_drop"] == 30.0
    assert "target_speedup" not in report.call


def test_report_card_and_command_show_what_was_tried(found):
    report = found[0].report
    assert cpd.Report.from_dict(report.to_dict()) == report
    for page in (report.to_html(), report.model_card()):
        assert f"{report.tried[0]['asked']:.2f}×" in page
    assert "Asked for the fastest that loses at most 30 of agreement" in report.asked
    tables = report_output(report, None).shown
    assert any(getattr(table, "title", None) == "Speeds that were tried" for table in tables)


def attempts(drop_at, tried):
    """Models that lose so many points of a thousand samples, by speed and training."""
    cost = SimpleNamespace(cost=lambda _: SimpleNamespace(macs=100))

    def attempt(speedup, trained):
        tried.append((speedup, trained))
        if speedup > 8:
            raise TargetError("out of reach.")
        pruner = SimpleNamespace(
            search=[{"speedup": speedup}], shrinks=[SimpleNamespace(macs=50)], comb=cost, note=lambda _: None
        )
        student = nn.Identity()
        student.lost = drop_at(speedup, trained)
        return SimpleNamespace(student=student, pruner=pruner, metrics=(None, None))

    return attempt


def values(model):
    return 100.0 * (np.arange(1000) >= 10 * getattr(model, "lost", 0))


def metric(model):
    return float(values(model).mean())


metric.each = values


def searched(drop_at, trains, limit=2.0):
    tried = []
    search = Fastest(nn.Identity(), Within(limit, 0.95, metric), attempts(drop_at, tried), lambda model: model)
    return search, tried, search.search(trains)


def test_a_training_is_spent_on_the_last_candidates_alone():
    search, tried, best = searched(lambda speedup, trained: int((speedup - 1) * (2 if trained else 10)), True)
    trained = [speedup for speedup, trains in tried if trains]
    untrained = [speedup for speedup, trains in tried if not trains]
    assert 0 < len(trained) <= MOST_TRAINED
    assert min(trained) > max(row["asked"] for row in search.tried if row["holds"] and not row["trained"])
    assert tried[: len(untrained)] == [(speedup, False) for speedup in untrained]  # all of them before any training
    assert best.student.lost == search.tried[[row["holds"] for row in search.tried].index(True)]["drop"] or trained
    assert [row for row in search.tried if row["holds"]][-1]["trained"]


def test_what_is_out_of_reach_bounds_the_search():
    search, tried, best = searched(lambda speedup, trained: 0, True)
    assert best.pruner.search[0]["speedup"] > 7
    assert any(row["error"] for row in search.tried)
    assert all(
        speedup < min(row["asked"] for row in search.tried if row["error"]) for speedup, trains in tried if trains
    )


def test_where_no_speed_holds_the_error_says_what_was_tried():
    with pytest.raises(
        TargetError, match=r"max_drop=2: no speed-up .* 1\.50x loses 20 \(at most 2.*Allow a larger drop"
    ):
        searched(lambda speedup, trained: 20, False)


def test_a_metric_of_one_number_is_taken_at_its_word():
    within = Within(2.0, 0.95, lambda model: metric(model))
    search = Fastest(nn.Identity(), within, attempts(lambda speedup, trained: int(speedup), []), lambda model: model)
    search.search(False)
    assert all(row["upper"] is None for row in search.tried)
    assert max(row["asked"] for row in search.tried if row["holds"]) < 3.0


def test_each_is_found_through_partials():
    def accuracy(model, images):
        return 0.0

    accuracy.each = lambda model, images: [model, images]
    assert each_of(partial(accuracy, images=3))("model") == ["model", 3]
    assert each_of(partial(partial(accuracy), images=3))("model") == ["model", 3]
    assert each_of(lambda model: 0.0) is None


def test_what_cannot_be_searched_is_refused_before_any_work(tmp_path):
    model = Tiny()
    evaluate = agreement(model, torch.randn(20, 3, 16, 16))
    given = {"data": loader(), "epochs": 0}
    with pytest.raises(cpd.InputError, match="max_drop needs evaluate"):
        cpd.compress(model, max_drop=1.0, **given)
    with pytest.raises(cpd.InputError, match="both max_drop and target_macs"):
        cpd.compress(model, max_drop=1.0, target_macs=0.5, evaluate=evaluate, **given)
    with pytest.raises(cpd.InputError, match="keeps no checkpoint"):
        cpd.compress(model, max_drop=1.0, evaluate=evaluate, output_dir=tmp_path, resume=True, **given)
    with pytest.raises(cpd.InputError, match=r"uses 20 samples, .* takes 165"):
        cpd.compress(model, max_drop=1.0, evaluate=evaluate, **given)
    with pytest.raises(
        cpd.InputError,
        match=r"max_drop=1 would allow the whole metric to be lost, which is 0\.9.*in the unit of the metric",
    ):
        cpd.compress(model, max_drop=1.0, evaluate=lambda model: 0.9, **given)
    with pytest.raises(cpd.InputError, match="max_drop must be a number above 0"):
        cpd.compress(model, max_drop=0, evaluate=evaluate, **given)
