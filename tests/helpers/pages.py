"""A report of every stage, and a page taken apart."""

from __future__ import annotations

from html.parser import HTMLParser

from cpd.report.records import Figures, GroupRow, LayerRow
from cpd.report.report import Report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Every tag with its attributes, and the text, of a page whose tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return sum(name == tag and wanted.items() <= found.items() for name, found in self.tags)


def example_report() -> Report:
    """A report in which every stage has something to tell."""
    return Report(
        call={"target_speedup": 2, "target_macs": None, "epochs": 2, "seed": 0, "threads": 1},
        model_class="timm.models.resnet.ResNet",
        source="timm:resnet18,num_classes=10",
        criterion="hessian",
        criterion_reason="data was given",
        normalization="memory",
        original=Figures(11_181_642, 1_814_083_944, 2_484_746, 20.0, 0.927),
        result=Figures(3_100_000, 640_000_000, 1_300_000, 9.8, 0.915),
        latency={
            "speedup": 2.04,
            "original_ms": 20.0,
            "candidate_ms": 9.8,
            "speedup_low": 1.98,
            "speedup_high": 2.11,
            "threads": 1,
            "runs": 50,
            "environment": {"onnxruntime": "1.22", "cpu": "An EPYC"},
        },
        groups=(
            GroupRow(
                "layer1.0.conv1", 64, 24, True, None, ("layer1.0.conv1.weight dim 0", "layer1.0.bn1.weight dim 0")
            ),
            GroupRow("blocks.0.norm", 512, 256, False, None, ("blocks.0.norm.weight dim 0",)),
            GroupRow("fc", 10, 10, True, "is an output of the model", ("fc.weight dim 0",)),
        ),
        layers=(
            LayerRow("layer1.0.conv1", "Conv2d", 64, 32),
            LayerRow("blocks.0.fc1", "Linear", 256, 128),
            LayerRow("blocks.0.fc2", "Linear", 256, 256),
        ),
        nodes=(
            {"name": "first", "op": "Conv", "before_ms": 0.5, "after_ms": 0.25},
            {"name": "second", "op": "Conv", "before_ms": 1.0, "after_ms": 0.25},
            {"name": "third", "op": "Gemm", "before_ms": 0.1, "after_ms": None},
            {"name": "fourth", "op": "Gemm", "before_ms": None, "after_ms": 0.2},
        ),
        shrinks=({"epoch": 0.5, "step": 5, "share": 0.5}, {"epoch": 1.5, "step": 15, "share": 1.0}),
        checks={"masked_equals_shrunk": 3e-7, "onnx_parity": 1e-6},
        history=(
            {"epoch": 0, "metric": 0.91, "before": 0.927, "pruned": 0.25, "recovery": "compensation"},
            {"epoch": 1, "loss": 2.0, "task_loss": 1.5, "kd_loss": 0.5, "lr": 0.01, "metric": 0.90},
            {"epoch": 2, "loss": 1.2, "task_loss": 0.9, "kd_loss": 0.3, "lr": 0.001, "metric": 0.915, "kept": True},
        ),
        search=(
            {"macs_ratio": 0.5, "speedup": 1.6},
            {
                "scope": "group",
                "macs_ratio": 0.35,
                "predicted": 1.9,
                "speedup": 2.04,
                "attained": 1.02,
                "verdict": "chosen, 2.0 % faster than asked",
            },
        ),
        seconds={"comb": 1.5, "search": 12.0, "shrink": 0.001},
        environment={"torch": "2.9", "cpu": "An EPYC"},
        notes=("BatchNorm statistics were measured anew",),
    )
