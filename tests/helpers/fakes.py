"""Stand-ins for what the command line calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from cpd.report.report import Report


class Fakes:
    """Stand-ins for the library's functions, which record what they were given."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def compress(self, model: nn.Module, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append({"model": model, **kwargs})
        return SimpleNamespace(report=self.report, speedup=self.report.speedup, model=model)

    def comb(self, model: nn.Module, example_inputs: Any, outputs: Any = None, **budget: Any) -> Any:
        self.calls.append({"model": model, "example_inputs": example_inputs, "outputs": outputs, **budget})
        members = tuple(f"layer{i}.weight dim 0" for i in range(5))
        groups = (
            SimpleNamespace(
                name="open[1]", size=64, minimum=2, frozen=None, exact=True, members=members, ties=("heads",)
            ),
            SimpleNamespace(
                name="fc", size=10, minimum=1, frozen="an output", exact=False, members=members[:1], ties=()
            ),
        )
        branch = SimpleNamespace(
            name="layer1.1", start=("relu",), end="batch_norm", modules=("layer1.1",), groups=("layer1.1.conv1",),
            parameters=73984, macs=231211008, frozen=None,
        )  # fmt: skip
        return SimpleNamespace(
            groups=groups, open=groups[:1], branches=(branch,),
            open_share={"parameters": 0.987, "macs": 0.5}, frozen_share=(), unused={}, outputs=("",),
            operations=SimpleNamespace(values_read=("net.py:14",), values_sentence="It reads values (net.py:14)."),
        )  # fmt: skip
