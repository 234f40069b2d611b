"""The house keeps its order: which room imports which, and how large anything may grow."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import cpd

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "cpd").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

FLOORS = "Every room imports from the floors below it"
ALGEBRA = "The algebra knows nothing of torch"
FINDING = "What finds the groups knows nothing of what is done with them"
DISTILLATION = "Distillation knows nothing of pruning"
INDEPENDENT = "Scores, export, training, picture and report are independent of one another"
JOBS = "Only the command line, the demo and the package itself know of whole runs"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


# ------------------------------------------------------------------------------------------ directions


def lint_imports(folder: Path) -> tuple[int, str]:
    """The exit code of `lint-imports --no-cache` in `folder`, and what it prints, with single spaces."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_contracts_are_kept() -> None:
    code, output = lint_imports(ROOT)
    assert code == 0, output
    assert [name for name in (FLOORS, ALGEBRA, FINDING, DISTILLATION, INDEPENDENT, JOBS) if name not in output] == []


@pytest.mark.parametrize(
    ("room", "statement", "contract"),
    [
        ("algebra", "import torch", ALGEBRA),
        ("algebra", "def late() -> None:\n    from torch import nn", ALGEBRA),
        ("algebra", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor", ALGEBRA),
        ("model", "import cpd.surgery.shrink", FINDING),
        ("trace", "from cpd.criteria import CRITERIA", FINDING),
        ("rules", "from cpd.deploy import latency", FINDING),
        ("proof", "from cpd.selection.limits import Limits", FINDING),
        ("coupling", "from cpd.distillation.kd import KD", FINDING),
        ("distillation", "from cpd.pruner import Pruner", DISTILLATION),
        ("distillation", "from cpd.criteria import CRITERIA", DISTILLATION),
        ("distillation", "from cpd.deploy.latency import measure_latency", DISTILLATION),
        ("distillation", "from cpd.selection.schedule import Schedule", DISTILLATION),
        ("report", "from cpd.distillation.config import DistillConfig", INDEPENDENT),
        ("report", "from cpd.jobs.compress import Result", JOBS),
        ("pruner", "from cpd.jobs import compress", JOBS),
        ("lightning", "from cpd.jobs import compress", JOBS),
        ("rules", "from cpd.proof import replay", FLOORS),
        ("surgery", "from cpd.criteria import CRITERIA", FLOORS),
        ("shed", "", FLOORS),
    ],
)
def test_a_wrong_import_is_named(room: str, statement: str, contract: str, tmp_path: Path) -> None:
    """`shed` is a new room that has no floor."""
    shutil.copytree(ROOT / "cpd", tmp_path / "cpd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "cpd" / room
    with (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")
    code, output = lint_imports(tmp_path)
    assert code == 1, output
    assert f"{contract} BROKEN" in output


def imports() -> nx.DiGraph:
    """Which module imports which; an import inside a function or for type checkers counts."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for module, path in modules.items():
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports by a relative path"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else str(node.module) for name in inner]
            else:
                continue
            graph.add_edges_from((module, name) for name in names if name in modules)
    return graph


def test_no_circle_of_imports() -> None:
    graph = imports()
    assert graph.number_of_edges() > len(FILES)
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


# ------------------------------------------------------------------------------------------ names and sizes


def rooms() -> list[str]:
    """The names at the top of the package: folders and files."""
    inside = (ROOT / "cpd").iterdir()
    return sorted(path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists())


def test_no_room_is_hidden_by_a_public_name() -> None:
    assert set(rooms()) & set(cpd.__all__) == set()


def test_rooms_are_few() -> None:
    assert len({*rooms()} - {"__init__", "__main__"}) <= 26


def lengths(*kinds: type[Definition]) -> dict[str, int]:
    """Lines of every definition without its docstring; decorators do not count, the signature does."""
    found = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                first = node.body[0]
                text = ast.get_docstring(node, clean=False)
                docstring = first.end_lineno - first.lineno + 1 if text is not None else 0
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found[place] = node.end_lineno - node.lineno + 1 - docstring
    return found


def over(found: dict[str, int], most: int) -> dict[str, int]:
    return {place: length for place, length in found.items() if length > most}


def test_files_are_short() -> None:
    found = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert over(found, 520) == {}


def test_classes_are_short() -> None:
    assert over(lengths(ast.ClassDef), 320) == {}


def test_functions_are_short() -> None:
    found = lengths(ast.FunctionDef, ast.AsyncFunctionDef)
    assert over(found, 60) == {}
    assert sorted(found.values())[int(0.9 * len(found))] <= 20
