"""Options from a file: `--config`, and the recipe that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.fakes import Fakes


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
    found = (call["config"].target_macs, call["config"].seed, call["training"].kd)
    assert found == (0.5, 4, "cwd")  # the command line comes first
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
    commands = (
        "compress",
        "comb",
        "sweep",
        "family",
        "quantize",
        "latency",
        "profile",
        "sensitivity",
        "report",
        "demo",
    )
    for command in commands:
        assert f"cpd {command}" in run(command, "--help").stdout.partition("Examples:")[2]
        assert "--json" in run(command, "--help").stdout
