"""What benchmarks write: rows with what they were found with, and taken up again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "results.py"


@pytest.fixture
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_of_benchmarks", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_written_with_machine_and_commit(results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    assert results.read(path) == results.read(None) == []
    results.write(path, [{"a": 1}], seeds=[0, 1])
    assert results.read(path) == [{"a": 1}]
    about = json.loads(path.read_text())["about"]
    assert {"call", "commit", "cpu", "cores", "torch", "cpd", "python", "seeds"} <= about.keys()
    path.write_text('[{"b": 2}]')  # as earlier ones wrote them
    assert results.read(path) == [{"b": 2}]
    path.write_text('{"rows": 3}')
    assert results.read(path) == {"rows": 3}
