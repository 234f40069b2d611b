"""`cpd sparsify`: its options are those of `cpd.SparseConfig`, and reach the library."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import cpd
from cpd.cli import app
from cpd.options import options_of

SPARSE = {item.name: item for item in options_of(cpd.SparseConfig)}
#: What choosing masks once, and a `Sparsifier`, have no use for.
NOT_OF = {
    "mask": {
        "compensation", "memory_gb", "schedule", "prune_from", "prune_until", "interval", "regrow", "outputs",
        "threads",
    },
    "Sparsifier": {"threads"},
    "sparsify": set(),
}  # fmt: skip
EVERY = (
    "--sparsity 0.7 --pattern 4x1 --scope layer --norm 2 --criterion taylor --ratios layer1*=0.25 --ratios fc=0 "
    "--max-ratio 0.9 --no-compensation --score-batches 3 --memory-gb 2.5 --schedule linear --prune-from 0.1 "
    "--prune-until 0.9 --interval 7 --regrow splice --outputs logits --threads 2 --seed 5"
)
WRONG: dict[str, Any] = {
    "sparsity": 1, "pattern": "4-8", "scope": "group", "norm": 3, "criterion": 3, "ratios": {"a": 1}, "max_ratio": 0,
    "compensation": 1, "score_batches": 0, "memory_gb": 0, "schedule": "sudden", "prune_from": -0.1,
    "prune_until": 1.1, "interval": 0, "regrow": "grow", "outputs": 1.5, "threads": 0, "seed": -1,
}  # fmt: skip


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `cpd.sparsify` is called with by the command, which ends there."""
    given: dict[str, Any] = {}

    def sparsify(*_: Any, **options: Any) -> None:
        given.update(options)
        raise cpd.InputError("sparsity=0.9 cannot be reached: pass data=loader")

    monkeypatch.setattr(cpd, "sparsify", sparsify, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    return given


@pytest.mark.parametrize("name", SPARSE)
def test_an_option_is_the_same_everywhere(name: str) -> None:
    option = SPARSE[name]
    for function, without in NOT_OF.items():
        shown = inspect.signature(getattr(cpd, function)).parameters
        assert (name in shown) == (name not in without)
        if name in shown:
            assert shown[name].default == option.default
            assert f"{name}: {option.help}" in " ".join(getattr(cpd, function).__doc__.split())
    group = typer.main.get_command(app)
    parameters = {item.name: item for item in group.commands["sparsify"].params}
    assert parameters[name].opts == [f"--{name.replace('_', '-')}"]
    assert parameters[name].help == option.help


@pytest.mark.parametrize("name", SPARSE)
def test_a_value_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(cpd.InputError, match=f"^{name} must be .*; got "):
        cpd.SparseConfig(**{name: WRONG[name]})


def test_every_option_reaches_the_library(called: dict[str, Any]) -> None:
    arguments = [
        "sparsify",
        "timm:test_resnet",
        "--no-pretrained",
        *EVERY.split(),
        "--storage",
        "packed",
        "--lr",
        "0.5",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--sparsity 0.9 cannot be reached: pass --data FOLDER" in result.stderr
    config = called["config"]
    assert config == cpd.SparseConfig(
        sparsity=0.7, pattern="4x1", scope="layer", norm=2, criterion="taylor", ratios={"layer1*": 0.25, "fc": 0.0},
        max_ratio=0.9, compensation=False, score_batches=3, memory_gb=2.5, schedule="linear", prune_from=0.1,
        prune_until=0.9, interval=7, regrow="splice", outputs=("logits",), threads=2, seed=5,
    )  # fmt: skip
    assert all(getattr(config, name) != item.default for name, item in SPARSE.items())
    assert (called["storage"], called["training"].lr) == ("packed", 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "sparsity must be given"),
        ("--pattern 2:4 --sparsity 0.8", "--pattern 2:4 sets a share of 0.5 to zero: leave --sparsity out"),
        ("--sparsity 0.8 --pattern 3-4", "--pattern must be unstructured, N:M"),
        ("--sparsity 0.8 --ratios half", "--ratios takes erk, lamp, or PATTERN=SHARE"),
        ("--sparsity 0.8 --criterion tailor", "Is taylor meant?"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_given(called: dict[str, Any], options: str, message: str) -> None:
    result = CliRunner().invoke(app, ["sparsify", "timm:test_resnet", "--no-pretrained", *options.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not called


def test_a_rule_of_ratios_by_its_name(called: dict[str, Any]) -> None:
    CliRunner().invoke(app, ["sparsify", "timm:test_resnet", "--no-pretrained", "--sparsity", "0.8", "--ratios", "erk"])
    assert called["config"].ratios == "erk"
