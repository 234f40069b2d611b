"""The how-to pages: every Python block runs, page by page, in one namespace."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in (ROOT / "docs" / "how_to").glob("*.md") if "```python" in page.read_text())
#: Pages whose code needs packages that not everybody has.
NEEDED = {"hugging_face": ("transformers",), "detection": ("pycocotools", "torchmetrics")}
#: Pages whose code needs weights that are downloaded; `tests/tasks/test_yolo.py` makes the same calls.
ELSEWHERE = {"ultralytics"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in NEEDED.get(page.stem, ()):
        pytest.importorskip(package)
    namespace: dict[str, object] = {}
    for code in blocks(page):
        compiled = compile(code, page.name, "exec")
        if page.stem not in ELSEWHERE:
            exec(compiled, namespace)


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                found += 1
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
    assert found > 20


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("cogapp")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("figures")


def test_measured_figures_are_those_of_the_results(figures: ModuleType) -> None:
    pages = figures.pages()
    assert {"README.md", "benchmarks.md", "one_shot.md"} <= {page.name for page in pages}
    assert [page.name for page in pages if figures.check(page, "--check") != 0] == []


def test_a_changed_digit_is_an_error(figures: ModuleType, tmp_path: Path) -> None:
    for name in ("README.md", "docs/benchmarks.md"):
        page = tmp_path / "page.md"
        text = (ROOT / name).read_text(encoding="utf-8")
        blocks = list(re.finditer(r"\]\]\] ?-->\n(.*?)<!-- \[\[\[end", text, re.S))
        digit = re.search(r"\d(?=[^\d])", blocks[0][1])
        place = blocks[0].start(1) + digit.start()
        other = str((int(text[place]) + 1) % 10)
        page.write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")
        assert figures.check(page, "--check") != 0
        page.write_text(text, encoding="utf-8")
        assert figures.check(page, "--check") == 0


def test_no_table_of_figures_stands_outside_a_block() -> None:
    """What is measured is printed; what stands in a table by hand explains."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", "", page.read_text(encoding="utf-8"), flags=re.S)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        measured = [row for row in rows if re.search(r"\d\.\d+ ?(%|x\b|ms\b|s\b)", row)]
        assert measured == [], f"{page.relative_to(ROOT)}: move it to benchmarks/results"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 6000
