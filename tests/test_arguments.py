"""Every argument of everything public, replaced in turn by values of every kind.

What may not be is refused by an error of `cpd` before anything is done; nothing around the call changes.
"""

from __future__ import annotations

import inspect
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cpd
from cpd.jobs import compress
from helpers.calls import BEGINS, CALLS, Began, began, comb, compared, masks, onnx, result, seen, swept
from helpers.world import differences, files, same, whole, world

#: Seconds that any call may take.
LIMIT = 20.0


class Broken:
    """An object on which nothing works but that it can be made."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


KINDS: dict[str, Any] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "a huge integer": lambda: 10**30,
    "an integer beyond all floats": lambda: 10**5000,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "a complex number": lambda: 1j,
    "a number in a string": lambda: "4",
    "an empty string": lambda: "",
    "a string": lambda: "nonsense",
    "a string with a zero": lambda: "a\0b",
    "bytes": lambda: b"nonsense",
    "a list": lambda: [],
    "a list of None": lambda: [None],
    "a list of strings": lambda: ["nonsense"],
    "a tuple of numbers": lambda: (1, 3, 6, 6),
    "a dict": lambda: {},
    "a dict of strings": lambda: {"nonsense": "nonsense"},
    "a set": lambda: {1},
    "an object": object,
    "a broken object": Broken,
    "a function": lambda: lambda: None,
    "a class": lambda: nn.ReLU,
    "a module": nn.Identity,
    "a tensor": lambda: torch.zeros(2),
    "an empty tensor": lambda: torch.zeros(0, 3, 6, 6),
    "a tensor of NaN": lambda: torch.full((1, 3, 6, 6), float("nan")),
    "an array": lambda: np.zeros(2),
    "a generator": lambda: (item for item in ()),
    "a file": lambda: Path("file"),
    "a module of python": lambda: np,
}

CASES = [(name, parameter) for name, valid in CALLS.items() for parameter in valid.parameters]

#: Types that an annotation may consist of, where it says all; a value of another type is refused.
SIMPLE = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None), "nn.Module": nn.Module,
          "Plan": cpd.Plan, "Comb": cpd.Comb, "PruneConfig": cpd.PruneConfig, "DistillConfig": cpd.DistillConfig,
          "os.PathLike[str]": Path, "Path": (str, Path)}  # fmt: skip


#: What makes random weights by the global generator, as every module of torch does.
MAKES_WEIGHTS = ("segmentation.EncoderDecoder",)


def wrong(annotation: str, value: Any) -> bool:
    """Whether a value must be refused by what the signature says alone."""
    parts = [part.strip() for part in str(annotation).split("|")]
    if not all(part in SIMPLE for part in parts):
        return False
    if isinstance(value, bool):
        return "bool" not in parts
    number = isinstance(value, (int, float))
    return not isinstance(value, tuple(SIMPLE[part] for part in parts)) or (number and not abs(value) < 10**30)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with a saved result and a file; where the work of long calls begins, they end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("arguments"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(compress, "FINAL_SECONDS", 0.1)
        result().save("saved")
        masks().save("masks.safetensors")
        onnx(), comb(), seen(), swept(), compared()
        Path("file").write_text("mine")
        for folder in ("images", "labels"):
            Path("maps", folder).mkdir(parents=True)
            Image.new("L", (8, 8)).save(Path("maps", folder, "a.png"))
        for module, name in BEGINS:
            patch.setattr(module, name, began)
        yield


def hang(*_: Any) -> None:
    raise TimeoutError


def outcome(name: str, parameter: str, kind: str, before: dict[str, Any]) -> list[str]:
    """What is wrong with how one call ended."""
    valid, value = CALLS[name], KINDS[kind]()
    given = {**valid.given(), parameter: value}
    models = [item for item in given.values() if isinstance(item, nn.Module)]
    kept, around = [whole(item) for item in models], world()
    refused, found = True, []
    start = time.perf_counter()
    try:
        valid.call(**given)
        refused = False
    except Began:
        refused = False
    except cpd.CPDError:
        pass
    except BaseException as error:
        found.append(f"raised {type(error).__name__}: {error!s:.150}")
    if time.perf_counter() - start > LIMIT / 2:
        found.append("took too long")
    if not refused and wrong(valid.parameters[parameter].annotation, value):
        found.append("was accepted")
    changed = differences(around, world())
    found += [text for text in changed if not (name in MAKES_WEIGHTS and text.startswith("random of torch"))]
    if refused:
        found += [
            f"changed {names}" for item, old in zip(models, kept, strict=True) if (names := same(old, whole(item)))
        ]
        now = files(Path())
        if now != before:
            found.append(f"changed files: {sorted(set(now) ^ set(before))}")
    return [f"{name}({parameter}={kind}) {text}" for text in found]


@pytest.mark.filterwarnings("ignore:Schedule:DeprecationWarning")
@pytest.mark.parametrize(("name", "parameter"), CASES, ids=[f"{name}-{parameter}" for name, parameter in CASES])
def test_values_of_every_kind(name: str, parameter: str) -> None:
    former = signal.signal(signal.SIGALRM, hang)
    found = []
    try:
        for kind in KINDS:
            before = files(Path())
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            found += outcome(name, parameter, kind, before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert found == []


def test_there_are_many_cases() -> None:
    assert len(CASES) * len(KINDS) > 5000


#: Classes of what the library itself makes: their constructors are not called by users.
MADE = {
    "Branch", "Comb", "Group", "LatencyComparison", "LatencyTable", "Masks", "ModelProfile", "Plan", "Quantized",
    "Report", "Result", "Sensitivity", "SparseResult", "Sweep", "Family", "Member",
}  # fmt: skip


def test_nothing_public_is_left_out() -> None:
    errors = {name for name in cpd.__all__ if isinstance(getattr(cpd, name), type) and name.endswith("Error")}
    assert set(cpd.__all__) - errors - MADE - set(CALLS) == {"Task"}  # whose methods users write
    for name in {*MADE, "Pruner", "Schedule", "Sparsifier"}:
        one = getattr(cpd, name)
        methods = {key for key in vars(one) if not key.startswith("_")} - set(getattr(one, "__dataclass_fields__", ()))
        for method in (key for key in methods if callable(getattr(one, key))):
            taken = set(inspect.signature(getattr(one, method)).parameters) - {"self"}
            assert not taken or f"{name}.{method}" in CALLS, f"{name}.{method}"


# ------------------------------------------------------------------------------------------ what is read


def places(value: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """The way to everything in nested dicts and lists, the first two items of each list."""
    if depth and isinstance(value, dict):
        for key, item in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in places(item, depth - 1))
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value[:2]):
            yield (index,)
            yield from ((index, *rest) for rest in places(item, depth - 1))


def replaced(value: Any, place: tuple[Any, ...], item: Any) -> Any:
    """A copy in which something else is at a place."""
    first, *rest = place
    found = dict(value) if isinstance(value, dict) else list(value)
    found[first] = replaced(value[first], tuple(rest), item) if rest else item
    return found


READ = {
    "Report.from_dict": "data",
    "Sweep.from_dict": "data",
    "Pruner.load_state_dict": "state",
}


@pytest.mark.parametrize("name", READ)
def test_anything_else_in_what_is_read(name: str) -> None:
    (whole_one,) = CALLS[name].given().values()
    found = []
    for place in places(whole_one):
        for kind in ("None", "-1", "a huge integer", "NaN", "a string", "a list of None", "a dict", "an object"):
            data = replaced(whole_one, place, KINDS[kind]())
            try:
                CALLS[name].call(**{READ[name]: data})
            except cpd.CPDError:
                pass
            except Exception as error:
                found.append(f"{name}, {kind} at {place}: {type(error).__name__}: {error!s:.80}")
    assert found == []
