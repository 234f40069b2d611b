"""The how-to pages: every Python block runs, page by page, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

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
