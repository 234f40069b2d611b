"""The examples in the docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import cpd

#: What users call most.
CALLED = (
    "Comb.plan", "Pruner", "comb", "compare_latency", "compensate", "compress", "distill", "export_onnx", "load",
    "measure_latency", "profile_model", "quantize_onnx", "score", "sensitivity", "shrink", "sweep", "family",
)  # fmt: skip


def example(name: str) -> doctest.DocTest:
    """The example in the docstring of `cpd.<name>`; without one it is empty."""
    namespace = {"cpd": cpd, "torch": torch}
    (found,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(
        attrgetter(name)(cpd), f"cpd.{name}", globs=namespace
    )
    return found


def public() -> list[str]:
    """Every public function and class, and the public methods of the classes."""
    names = []
    for name in cpd.__all__:
        thing = getattr(cpd, name)
        names.append(name)
        if inspect.isclass(thing):
            own = (method for method, value in vars(thing).items() if inspect.isroutine(value) and method[0] != "_")
            names.extend(f"{name}.{method}" for method in own)
    return names


@pytest.mark.parametrize("name", CALLED)
def test_what_users_call_most_has_an_example(name: str) -> None:
    assert example(name).examples
    assert "\nExamples:\n" in inspect.getdoc(attrgetter(name)(cpd))  # the heading that the reference shows as code


@pytest.mark.parametrize("name", [name for name in public() if example(name).examples])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example(name), out=said.append)
    assert not said, "".join(said)
