"""What a benchmark has found, as JSON: its rows, the calls, the commits, and the machine with its versions.

`benchmarks/results/` holds what README and docs quote (see `figures.py`). Every benchmark writes through `write`, and
takes up what it has written through `read`. A file of rows alone, as earlier benchmarks wrote them, is read too.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write(path: Path, rows: Any, **about: Any) -> None:
    """Write rows, and what they were found with; the folder is made.

    A file may hold the rows of several calls: all calls are kept, and a new row is marked with the commit it is of.

    Args:
        path: the file.
        rows: plain JSON types.
        about: more to tell of them, as the card or the seeds.
    """
    from cpd.jobs.outcome import environment_of

    before = _content(path).get("about", {})
    commit, call = _commit(), _call()
    if isinstance(rows, list):
        rows = [{"commit": commit, **row} if isinstance(row, dict) else row for row in rows]
    calls = list(dict.fromkeys([*before.get("calls", []), call]))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": {"calls": calls, "commit": commit, **environment_of(), **about}, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(path: Path | None) -> Any:
    """The rows that `write` wrote; none where there is no file yet."""
    if path is None or not path.exists():
        return []
    return _content(path).get("rows", [])


def about(path: Path) -> dict[str, Any]:
    """The calls, the commit, the machine and its versions."""
    told: dict[str, Any] = _content(path).get("about", {})
    return told


def attempted(row: dict[str, Any], examine: Callable[[], dict[str, Any]], *, trace: bool = False) -> dict[str, Any]:
    """A row with what an examination finds, or with the reason why it failed; with `trace` an error ends the run."""
    try:
        return row | examine()
    except Exception as failure:
        if trace:
            raise
        return {**row, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:300]}


def examined(
    names: Iterable[str],
    examine: Callable[[str], dict[str, Any]],
    path: Path | None,
    *,
    key: str = "model",
    trace: bool = False,
) -> list[dict[str, Any]]:
    """A row for each name, in the place of the one that the file may hold of it; written and told one by one.

    Args:
        names: of what is examined.
        examine: what a row tells of one.
        path: the file, or None.
        key: the entry of a row that holds its name.
        trace: let an error end the run.

    Returns:
        The rows, those of the file that were not examined again first.
    """
    rows: list[dict[str, Any]] = read(path)
    for name in names:
        row = attempted({key: name}, partial(examine, name), trace=trace)
        print({entry: value for entry, value in row.items() if isinstance(value, (str, int, float))}, flush=True)
        rows = [*(old for old in rows if old[key] != name), row]
        if path is not None:
            write(path, rows)
    return rows


def _content(path: Path) -> dict[str, Any]:
    """A file as `write` writes them; of one that holds rows alone, those."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and {"about", "rows"} <= found.keys() else {"rows": found}


def _call() -> str:
    """The command, folders of data named DATA_DIR, which are elsewhere on each machine."""
    told = ["DATA_DIR" if _is_data(Path(word)) else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *told])


def _is_data(path: Path) -> bool:
    """Whether an argument is a folder, and not the name of this package, which is a folder of a checkout."""
    return path.is_dir() and not (path / "__init__.py").exists()


def _commit() -> str:
    """The commit of the working tree, with a plus sign where it has changes; "unknown" where git does not tell."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        told = ["git", "status", "--porcelain", "--untracked-files=no", "--", "../cpd", "."]
        changed = subprocess.run(told, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())
