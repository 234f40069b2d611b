"""Options: each is declared once, and is the same in Python, on the command line and in a recipe."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from fractions import Fraction
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import cpd
from cpd.cli import app
from cpd.cli.options import values
from cpd.cli.wording import in_options
from cpd.errors import needs_extra
from cpd.model.inputs import as_call, of_shape
from cpd.options import THREADS, check_options, checked, number, options_of, several
from cpd.selection.target import TARGETS

PRUNING = {item.name: item for item in options_of(cpd.PruneConfig)}
TRAINING = {item.name: item for item in options_of(cpd.DistillConfig)}


def command(name: str) -> dict[str, click.Parameter]:
    """The parameters of a command by name."""
    group = typer.main.get_command(app)
    return {item.name: item for item in group.commands[name].params}


# ------------------------------------------------------------------------------------------ once, everywhere


@pytest.mark.parametrize("name", PRUNING)
def test_an_option_of_pruning_is_the_same_everywhere(name: str) -> None:
    option = PRUNING[name]
    assert getattr(cpd.PruneConfig(), name) == option.default
    for function in (cpd.compress, cpd.Pruner, *([] if name in TARGETS else [cpd.sweep, cpd.family])):
        assert inspect.signature(function).parameters[name].default == option.default
        text = " ".join(function.__doc__.split())
        assert f"{name}: {option.help}" in text
    for subcommand in ("compress", *([] if name in TARGETS else ["sweep", "family"])):
        shown = command(subcommand)[name]
        assert shown.opts == [f"--{name.replace('_', '-')}"]
        assert shown.help == option.help
        default = () if option.check.read is not None and option.default is None else option.default
        assert (tuple(shown.default) if isinstance(shown.default, list) else shown.default) == default


def test_functions_and_commands_have_no_option_of_pruning_of_their_own() -> None:
    parameters = inspect.signature(cpd.sweep).parameters
    assert not set(TARGETS) & set(parameters)
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD  # those of compress
    assert not set(TARGETS) & set(command("sweep"))
    own = {
        "model", "data", "output_dir", "overwrite", "batch_size", "workers", "pretrained", "input_size", "teacher",
        "trust_source", "augment", "auto_augment", "random_erasing", "mean", "std", "resume", "checkpoint_minutes",
        "max_drop", "confidence", "config", "json_output", "quiet", "verbose", "debug",
    }  # fmt: skip
    assert set(command("compress")) - own == set(PRUNING) | set(TRAINING) - {"progress"}


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in ("progress", "seed", "kd")])
def test_an_option_of_the_training_is_the_same_on_the_command_line(name: str) -> None:
    for subcommand in ("compress", "sweep", "family"):
        shown = command(subcommand)[name]
        assert shown.help == TRAINING[name].help
        default = shown.default if not isinstance(shown.default, list) else tuple(shown.default)
        assert default == TRAINING[name].default


def test_help_of_a_config_lists_every_option() -> None:
    for config, options in ((cpd.PruneConfig, PRUNING), (cpd.DistillConfig, TRAINING)):
        text = " ".join(config.__doc__.split())
        assert all(f"{name}: {item.help}" in text for name, item in options.items())


def test_the_help_of_a_command_shows_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["compress", "--help"]).stdout
    assert all(f"--{name.replace('_', '-')} " in shown for name in PRUNING)


# ------------------------------------------------------------------------------------------ checks

WRONG: dict[str, Any] = {
    "target_speedup": 0.9, "target_latency_ms": 0, "target_macs": -1, "target_params": float("nan"),
    "target_memory": "half", "max_file_mb": 0, "max_memory_mb": "1", "criterion": 3, "normalization": "flops",
    "exponent": -1, "scope": "layer", "compensation": 1, "score_batches": 0, "memory_gb": 0,
    "schedule": "sudden", "prune_from": -0.1, "prune_until": 1.1, "interval": 0,
    "round_to": 2.5, "max_ratio": 1, "min_width": True, "ratios": {"a": 1}, "tolerance": 0, "threads": 0,
    "runtime": "tpu",
    "branches": 1, "max_removed": 1.5, "regularization": "lasso", "regularization_strength": 0,
    "latency_inputs": 3, "seed": -1, "outputs": 1.5, "masks": "drop", "proof_copies": 0, "proof_seconds": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNING)
def test_a_value_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(cpd.InputError, match=f"^{name} must be .*; got "):
        cpd.PruneConfig(**{name: WRONG[name]})
    check_options(cpd.PruneConfig())


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    config = cpd.PruneConfig(target_macs=np.float32(0.5), round_to=np.int64(4), max_ratio=Fraction(1, 2))
    assert [(type(value), value) for value in (config.target_macs, config.round_to, config.max_ratio)] == [
        (float, 0.5), (int, 4), (float, 0.5),
    ]  # fmt: skip
    assert type(cpd.DistillConfig(lr=np.float32(0.5)).lr) is float  # a checkpoint can hold it

    @checked(threads=THREADS, share=number("", lambda value: True))
    def called(threads: int, *, share: float | None = None, **others: Any) -> Any:
        return threads, share, others

    found, share, others = called(np.uint8(2), share=np.float64(0.5), other=np.int64(1))
    assert (type(found), found, type(share), share, others) == (int, 2, float, 0.5, {"other": 1})
    with pytest.raises(cpd.InputError, match=r"threads must be an integer from 1 to 1024; got (np.int64\(0\)|0)\."):
        called(np.int64(0))
    for wrong in (np.bool_(True), np.float64(1), np.array(1)):
        with pytest.raises(cpd.InputError, match="threads must be"):
            called(wrong)


def test_several_values_come_in_any_array() -> None:
    two = several(lambda value: value > 0, "two numbers above 0", 2)
    for value in ((1, 2), [1, 2], range(1, 3), np.array([1.0, 2.0])):
        assert two.accepts(value)
    for value in ((), (1,), (1, 2, 3), [0, 1], {1, 2}, {1: 2, 2: 1}, "12", np.array(1.0), 2, iter((1, 2))):
        assert not two.accepts(value)


def test_a_name_that_there_is_not_is_refused() -> None:
    model, inputs = torch.nn.Linear(3, 3), torch.zeros(1, 3)
    with pytest.raises(cpd.InputError, match=r"cpd.compress has no option round_two. Is round_to meant\? It has: "):
        cpd.compress(model, target_macs=0.5, example_inputs=inputs, round_two=8)
    with pytest.raises(cpd.InputError, match=r"cpd\.Pruner has no option epochs"):
        cpd.Pruner(model, inputs, target_macs=0.5, steps=1, epochs=3)
    with pytest.raises(cpd.InputError, match=r"config must be a cpd\.PruneConfig, or None; got dict"):
        cpd.compress(model, target_macs=0.5, example_inputs=inputs, config={"round_to": 8})
    with pytest.raises(cpd.InputError, match="sweep takes its targets from speedups: leave target_macs out"):
        cpd.sweep(model, [2], target_macs=0.5)


def test_exactly_one_target() -> None:
    assert cpd.PruneConfig(target_macs=0.5).target.value == 0.5
    with pytest.raises(cpd.InputError, match=r"exactly one target; got target_speedup, target_macs\."):
        cpd.PruneConfig(target_speedup=2, target_macs=0.5)
    with pytest.raises(cpd.InputError, match=r"exactly one target of .*; got none"):
        _ = cpd.PruneConfig().target


def test_options_by_name_replace_those_of_a_config() -> None:
    config = cpd.PruneConfig(round_to=16, schedule="cubic", prune_from=0.1, interval=5)
    found = cpd.PruneConfig.of(config, {"target_macs": 0.5, "seed": 3}, "a test")
    assert found == dataclasses.replace(config, target_macs=0.5, seed=3)
    assert cpd.PruneConfig.of(None, {}, "a test") == cpd.PruneConfig()
    other = cpd.PruneConfig.of(config, {"schedule": cpd.Schedule("linear", end=0.7)}, "a test")
    assert other.when == cpd.Schedule("linear", end=0.7)
    assert other.round_to == 16


def test_a_schedule_is_taken_apart() -> None:
    config = cpd.PruneConfig(schedule=cpd.Schedule("cubic", start=0.1, end=0.6, interval=20))
    assert (config.schedule, config.prune_from, config.prune_until, config.interval) == ("cubic", 0.1, 0.6, 20)
    assert config == cpd.PruneConfig(schedule="cubic", prune_from=0.1, prune_until=0.6, interval=20)
    with pytest.raises(cpd.InputError, match="prune_until is part of the Schedule"):
        cpd.PruneConfig(schedule=cpd.Schedule("cubic"), prune_until=0.7)
    with pytest.raises(cpd.InputError, match="below the one at which it ends"):
        cpd.PruneConfig(schedule="cubic", prune_from=0.6)


def test_the_former_name_of_the_start_of_a_schedule() -> None:
    with pytest.warns(DeprecationWarning, match="start="):
        assert cpd.Schedule("cubic", warmup=0.2) == cpd.Schedule("cubic", start=0.2)
    assert not hasattr(cpd.Schedule("cubic"), "warmup")


# ------------------------------------------------------------------------------------------ shapes as inputs


def test_inputs_by_their_shape() -> None:
    like = as_call(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    (made,) = of_shape((4, 3, 16, 8), like).args
    assert (tuple(made.shape), made.dtype) == ((4, 3, 16, 8), torch.float64)
    assert made.std() > 0.5
    state = torch.get_rng_state()
    assert torch.equal(of_shape((4, 3, 16, 8), like).args[0], made)
    assert torch.equal(torch.get_rng_state(), state)
    given = torch.zeros(2, 3)
    assert of_shape(given, like).args[0] is given
    for shape, inputs in (((4, 3), like), ((0, 3, 8, 8), like), ((2, 3), as_call((given, given)))):
        with pytest.raises(cpd.InputError, match="The shape"):
            of_shape(shape, inputs)


# ------------------------------------------------------------------------------------------ the command line


class Caught(Exception):
    """Carries what a command has called the library with."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `cpd.compress` is called with by `cpd compress`, which ends there."""
    given: dict[str, Any] = {}

    def compress(*_: Any, **options: Any) -> None:
        given.update(options)
        raise cpd.TargetError("max_ratio=0.9 is too little: pass data=loader, or loss=…")

    monkeypatch.setattr(cpd, "compress", compress, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    return given


EVERY = (
    "--target-memory 0.5 --max-file-mb 9 --max-memory-mb 8 "
    "--criterion magnitude --normalization none --exponent 0.5 --scope isomorphic "
    "--no-compensation --score-batches 3 --memory-gb 2.5 --schedule linear "
    "--prune-from 0.1 --prune-until 0.9 --interval 7 "
    "--round-to 2 --max-ratio 0.7 --min-width 4 --ratios layer1*=0.25 --ratios fc=0 --tolerance 0.1 --threads 2 "
    "--runtime openvino:int8,torch "
    "--latency-inputs 2x3x64x64 --latency-inputs 1x3x32x32 --seed 5 --outputs logits --outputs 1.0 --masks permanent "
    "--branches --max-removed 0.4 --proof-copies 50 --proof-seconds 30 "
    "--regularization growing --regularization-strength 0.5 "
    "--momentum 0.5 --warmup 0.2 --max-grad-norm none --kd none --features fc"
)


def test_every_option_reaches_the_library(called: dict[str, Any], tmp_path: Any) -> None:
    arguments = ["compress", "timm:test_resnet", "--no-pretrained", *EVERY.split()]
    assert CliRunner().invoke(app, arguments).exit_code == 3
    assert called["config"] == cpd.PruneConfig(
        target_memory=0.5, max_file_mb=9.0, max_memory_mb=8.0,
        criterion="magnitude", normalization="none", exponent=0.5, scope="isomorphic",
        compensation=False, score_batches=3, memory_gb=2.5,
        schedule="linear", prune_from=0.1, prune_until=0.9, interval=7, round_to=2,
        max_ratio=0.7, min_width=4, ratios={"layer1*": 0.25, "fc": 0.0}, tolerance=0.1, threads=2,
        runtime="openvino:int8,torch",
        latency_inputs=((2, 3, 64, 64), (1, 3, 32, 32)), seed=5, outputs=("logits", "1.0"), masks="permanent",
        proof_copies=50, proof_seconds=30.0, branches=True, max_removed=0.4,
        regularization="growing", regularization_strength=0.5,
    )  # fmt: skip
    assert all(getattr(called["config"], name) != item.default for name, item in PRUNING.items() if name not in TARGETS)
    training = called["training"]
    assert (training.momentum, training.warmup, training.max_grad_norm, training.kd) == (0.5, 0.2, None, "none")
    assert (training.features, training.seed) == (("fc",), 5)
    recipe = tmp_path / "recipe.yaml"
    parsed = command_options(arguments)
    recipe.write_text(yaml.safe_dump(parsed))
    first = dict(called)
    called.clear()
    assert CliRunner().invoke(app, ["compress", "--config", str(recipe)]).exit_code == 3
    assert (called["config"], called["training"]) == (first["config"], first["training"])


def command_options(arguments: list[str]) -> dict[str, Any]:
    """The options of a call as a recipe holds them."""
    group = typer.main.get_command(app)
    context = group.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    return {
        name: value
        for name, value in context.params.items()
        if value is not None and name not in ("config", "json_output", "quiet", "verbose", "debug", "resume")
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--round-to 0", "error: --round-to must be an integer from 1 to 1000000000; got 0."),
        ("--seed -1", "error: --seed must be an integer from 0 to 2147483647; got -1."),
        ("--threads 1000000", "error: --threads must be an integer from 1 to 1024; got 1000000."),
        ("--lr 0", "error: --lr must be a number above 0; got 0.0."),
        ("--criterion taylro", "error: --criterion must be a name"),
        ("--criterion taylro", "got 'taylro'. Is taylor meant?"),
        ("--kd cdw", "got 'cdw'. Is cwd meant?"),
        ("--ratios fc", "error: --ratios takes PATTERN=SHARE"),
        ("--latency-inputs big", "error: --latency-inputs takes shapes"),
        ("--target-macs 2 --target-params 2", "got --target-macs, --target-params"),
        ("--max-grad-norm 0", "error: --max-grad-norm must be a number above 0; got 0.0"),
    ],
)
def test_a_wrong_option_is_named_as_it_is_given(called: dict[str, Any], option: str, message: str) -> None:
    result = CliRunner().invoke(app, ["compress", "timm:test_resnet", "--no-pretrained", *option.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not called


def test_errors_of_the_library_speak_of_options(called: dict[str, Any]) -> None:
    result = CliRunner().invoke(app, ["compress", "timm:test_resnet", "--no-pretrained"])
    assert "error: --max-ratio 0.9 is too little: pass --data FOLDER, or loss=…" in result.stderr


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Pass resume=True to go on, or compensation=False.", "Pass --resume to go on, or --no-compensation."),
        ("schedule='cubic' needs a length; allow (round_to=8, max_ratio=0.9).",
         "--schedule cubic needs a length; allow (--round-to 8, --max-ratio 0.9)."),
        ("Pass example_inputs=(…) on which it runs.", "Pass --input-size H,W on which it runs."),
        ("output_dir /tmp/x is a file", "--output-dir /tmp/x is a file"),
        ("a/round_to.py, x.max_ratio and size=3 stay.", "a/round_to.py, x.max_ratio and size=3 stay."),
        ("pass loss=….", "pass loss=… (from Python: cpd.compress)."),
        ("threads must be 1, or None", "--threads must be 1, or None"),
    ],
)  # fmt: skip
def test_messages_in_the_words_of_the_command_line(said: str, shown: str) -> None:
    assert in_options(said, {*PRUNING, *TRAINING, "data", "resume", "output_dir", "input_size"}) == shown


def test_what_is_not_given_is_left_out() -> None:
    assert values(cpd.PruneConfig, {"ratios": [], "latency_inputs": [], "seed": 0, "criterion": None}) == {"seed": 0}
    assert values(cpd.DistillConfig, {"max_grad_norm": "none", "kd": "none"}) == {"max_grad_norm": None, "kd": "none"}


# ------------------------------------------------------------------------------------------ a light front


@pytest.mark.parametrize("arguments", ["--version", "--help", "compress --help", "comb --help"])
def test_the_front_imports_no_torch(arguments: str) -> None:
    code = (
        "import sys\nfrom cpd.cli import main\nsys.argv = ['cpd', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'timm', 'onnx', 'onnxruntime', 'accelerate', 'matplotlib', 'sklearn', 'networkx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments.split()], check=True, stdout=subprocess.DEVNULL)


def test_public_names_are_where_they_are_said_to_be() -> None:
    code = "import cpd; assert all(getattr(cpd, name) is not None for name in cpd.__all__); print(*dir(cpd))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {*cpd.__all__, "criteria", "picture", "segmentation"} <= set(shown)
    assert {name for names in cpd._ROOMS.values() for name in names} | {
        name for name in cpd.__all__ if name.endswith("Error")
    } == set(cpd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = cpd.no_such


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("sklearn", "from cpd.demo import digits; digits()", "demo"),
        ("matplotlib", "from cpd.jobs.sensitivity import check_plot; check_plot('a.png')", "plot"),
        ("torchmetrics", "import torch; from cpd.tasks.segmentation import mean_iou; "
         "mean_iou(torch.nn.Identity(), [(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3).long())], 2)", "segmentation"),
        ("lightning", "import cpd.lightning", "lightning"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(module: str, call: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules['{module}'] = None\nfrom cpd import InputError\n"
        f"try:\n    {call}\nexcept InputError as error:\n    print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert f'pip install "cpd[{extra}]"' in shown
    with (
        pytest.raises(cpd.InputError, match=r'A picture needs no_such, .* "cpd\[plot\]"'),
        needs_extra("plot", "A picture"),
    ):
        import no_such  # noqa: F401
