"""Progress: one line for all that runs, the log above it, and nothing where stderr is no terminal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cpd.model import progress
from helpers.terminal import Screen, run_program

HERE = Path(__file__).parents[2]
#: Two stages, the second with twelve epochs of ten steps; logs, prints and warnings come meanwhile.
PROGRAM = """
import logging, sys, time, warnings
from rich.console import Console
from rich.logging import RichHandler
from cpd.model.progress import part, shown
log = logging.getLogger("cpd")
log.setLevel(logging.INFO)
log.propagate = False
for handler in (logging.StreamHandler(), RichHandler(console=Console(stderr=True), show_time=False, show_path=False)):
    log.addHandler(handler)
before = [getattr(handler, "stream", None) or handler.console for handler in log.handlers]
with shown():
    with part("stage 1 of 2: comb"):
        log.info("combed")
        time.sleep(0.5)
    with shown(), part("stage 2 of 2: a stage that has a name so long that nothing else would fit"):
        with part("", 120) as epochs:
            for epoch in range(1, 13):
                for step in range(10):
                    time.sleep(0.01)
                    epochs.advance(name=f"epoch {epoch} of 12")
                log.info("Epoch %d: 91.30 %%", epoch)
                print("said", epoch)
            warnings.warn("warned")
assert before == [getattr(handler, "stream", None) or handler.console for handler in log.handlers]
assert sys.stderr is sys.__stderr__
log.info("over")
"""


@pytest.mark.parametrize("width", [40, 80, 120])
def test_one_line_with_the_log_above_it(width: int) -> None:
    code, text = run_program(PROGRAM, width=width, folder=HERE)
    screen = Screen(width).send(text)
    assert code == 0, text
    assert not screen.wrapped
    assert screen.cursor
    lines = [line.rstrip() for line in screen.lines]
    for epoch in range(1, 13):  # whole lines of their own, of both handlers and of print
        assert [line for line in lines if line == f"Epoch {epoch}: 91.30 %"], lines
        assert [line for line in lines if line.endswith(f"INFO     Epoch {epoch}: 91.30 %")], lines
        assert f"said {epoch}" in lines
    assert not [line for line in lines if "stage" in line or "━" in line], "the line is wiped in the end"
    live = [line for line in screen.seen if "stage " in line]
    assert any("stage 1 of 2: comb" in line for line in live)
    assert any(line.rstrip().endswith("left") and "%" in line for line in live)
    assert (width < 80) or any("━" in line for line in live)


def test_nothing_is_shown_on_what_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.shown(True), progress.part("train", 3) as training:
        training.advance(3, "over")
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_brings_the_cursor_back() -> None:
    program = "import time\nfrom cpd.model.progress import part, shown\nwith shown(), part('long'):\n    time.sleep(60)"
    code, text = run_program(program, width=80, folder=HERE, interrupt_at="long")
    screen = Screen(80).send(text)
    assert code != 0
    assert "KeyboardInterrupt" in text
    assert screen.cursor


def test_a_worker_that_is_forked_writes_as_if_no_line_was_shown() -> None:
    """It has no thread that draws, and must not wait for a lock that this thread held."""
    program = (
        "import os, sys, time\nfrom cpd.model import progress\n"
        "with progress.shown(), progress.part('on'):\n"
        "    for _ in range(30):\n"
        "        time.sleep(0.02)\n"
        "        if not (child := os.fork()):\n"
        "            print('from the child', file=sys.stderr, flush=True)\n"
        "            os._exit(progress._line is not None)\n"
        "        assert os.waitpid(child, 0)[1] == 0\n"
    )
    code, text = run_program(program, "-W", "ignore", width=80, folder=HERE, seconds=30)
    assert code == 0, text
    assert text.count("from the child") == 30


def test_the_time_left_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    found = progress.Part("train", 40, done=10)  # ten of an earlier run
    assert found.left is None
    now[0] += 6
    found.advance(3)
    assert found.left == pytest.approx(6 / 3 * 27)
    assert progress.Part("comb").left is None


def test_logging_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = list(logging.getLogger("cpd").handlers)
    with progress.shown(True):
        pass
    assert logging.getLogger("cpd").handlers == handlers
