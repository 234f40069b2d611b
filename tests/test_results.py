"""What benchmarks write: rows with what they were found with, and taken up again."""

from __future__ import annotations

import importlib.util
import re
import sys
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
    (row,) = results.read(path)
    about = results.about(path)
    assert row == {"a": 1, "commit": about["commit"]}
    assert {"calls", "commit", "cpu", "cores", "torch", "cpd", "python", "seeds"} <= about.keys()
    path.write_text('[{"b": 2}]')  # as earlier ones wrote them
    assert results.read(path) == [{"b": 2}]
    path.write_text('{"rows": 3}')
    assert results.read(path) == {"rows": 3}


def test_rows_keep_their_commit_and_calls_add_up(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["/somewhere/one.py", str(tmp_path), "--seeds", "0"])
    results.write(path, [{"a": 1, "commit": "older"}])
    monkeypatch.setattr(sys, "argv", ["one.py", str(tmp_path), "--seeds", "1"])
    results.write(path, [*results.read(path), {"a": 2}])
    assert [row["commit"] for row in results.read(path)] == ["older", results.about(path)["commit"]]
    assert results.about(path)["calls"] == [f"python benchmarks/one.py DATA_DIR --seeds {seed}" for seed in (0, 1)]


def test_rows_are_examined_one_by_one_in_the_place_of_older_ones(results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results.write(path, [{"model": "a", "x": 1}, {"model": "b", "x": 1}])

    def examine(name: str) -> dict[str, int]:
        if name == "c":
            raise ValueError("odd\nand more")
        return {"x": 2}

    told = {"b": 1, "a": 2}
    rows = results.examined(["a", "c"], examine, path)
    assert {row["model"]: row.get("x", row.get("failed")) for row in rows} == {**told, "c": "ValueError: odd"}
    assert [row["model"] for row in results.read(path)] == ["b", "a", "c"]
    with pytest.raises(ValueError, match="odd"):
        results.examined(["c"], examine, path, trace=True)
    assert [row["model"] for row in results.read(path)] == ["b", "a", "c"], "what was found before is lost"


def test_benchmarks_read_and_write_rows_in_one_way() -> None:
    """A benchmark that reads what another one wrote would else meet the record around the rows."""
    odd = [
        file.name
        for file in FILE.parent.glob("*.py")
        if file != FILE and re.search(r"json\.write_text|json\.loads\((options|file)\.(json|read)", file.read_text())
    ]
    assert sorted(odd) == ["coverage.py", "strangers.py"]  # one row that a process of their own hands over
