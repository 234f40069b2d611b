"""Write the measured figures of README and docs from `benchmarks/results/`, or check that they are those.

    python benchmarks/figures.py            # write
    python benchmarks/figures.py --check    # a figure that differs from its result is an error, with the difference

The pages hold blocks that cog fills in (https://cog.readthedocs.io). Between the markers stands a call of a function of
this module, and below it the Markdown that it printed last:

    <!-- [[[cog figures.table("sparsity") ]]] -->
    ...
    <!-- [[[end]]] -->

Text is edited in the page, figures by running the benchmark with `--json benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import string
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

# ---------------------------------------------------------------------------------- what stands in a page


def table(name: str, *only: str, **where: Any) -> None:
    """The rows of a result as a table.

    Args:
        name: of the result; one of `COLUMNS`, or its rows are texts by heading already.
        only: headings of the columns wanted; without them all.
        where: rows wanted, by what they hold.
    """
    rows = [row for row in rows_of(name) if where.items() <= row.items()]
    columns = COLUMNS[name] if name in COLUMNS else {head: _text(head) for head in rows[0] if head != "commit"}
    heads = [head for head in columns if not only or head in only]
    print(markdown(heads, [[columns[head](row) for head in heads] for row in rows]))


def source(name: str) -> None:
    """The command, the commit, the machine and its versions, as one small line."""
    told = results.about(results.FOLDER / f"{name}.json")
    calls = ", ".join(dict.fromkeys(f"`{re.sub(' --(json|plot) [^ ]+', '', call)}`" for call in told["calls"]))
    commits = sorted({row.get("commit", told["commit"])[:7] for row in rows_of(name)})
    commit = str(told["commit"]) if "kept" in told else ", ".join(commits)
    known = [f"{key} {told[key]}" for key in ("torch", "onnxruntime", "timm", "transformers") if told.get(key)]
    machine = [told[key] for key in ("cpu", "gpu", "peer", "note", "seeds") if told.get(key)]
    parts = ["" if calls == "`not noted`" else calls, f"commit {commit}", *map(str, machine), *known]
    print(f"*{'; '.join(filter(None, [*parts, f'`benchmarks/results/{name}.json`']))}.*\n")


def say(text: str) -> None:
    """A paragraph with figures in braces, as in `str.format`: `{NAME[figure]}`, of `SUMMARIES`."""
    wanted = {field.partition("[")[0] for _, field, *_ in string.Formatter().parse(text) if field}
    print(text.strip().format(**{name: SUMMARIES[name]() for name in wanted}) + "\n")


def by_target(rows: list[Row], cell: Callable[[Row], str], **further: Callable[[dict[float, Row]], str]) -> None:
    """A row a model, a column a target; after those, columns of all rows of a model by their heading."""
    targets = sorted({row["asked"] for row in rows})
    of_model = defaultdict[str, dict[float, Row]](dict)
    for row in rows:
        of_model[row["model"]][row["asked"]] = row
    lines = [
        [_model({"model": model}), *(cell(mine[target]) if target in mine else "-" for target in targets)]
        + [column(mine) for column in further.values()]
        for model, mine in of_model.items()
    ]
    print(markdown(["model", *(f"{target:g}x" for target in targets), *further], lines))


def latency() -> None:
    """Speed-ups asked for: as measured and as another process measured them."""

    def cell(row: Row) -> str:
        return "out of reach" if row.get("error") else f"{row['measured']:.2f}x ({row['again']:.2f}x)"

    def left(mine: dict[float, Row]) -> str:
        return "" if mine[2].get("error") else f"{mine[2]['macs_left']:.1%}, {mine[2]['parameters_left']:.1%}"

    by_target(rows_of("onnx_latency"), cell, **{"MACs, parameters left at 2x": left})
    say(
        "**{onnx_latency[within]} of {onnx_latency[cells]} are within 5 % of what was asked** by the second "
        "measurement; {onnx_latency[out]} are out of reach. At most {onnx_latency[exports]} exports and, in the "
        "median, {onnx_latency[seconds]} s a target; the prediction for the first candidate, before anything was "
        "measured, is off by {onnx_latency[predicted]} in the median."
    )


def with_data() -> None:
    """Speed-ups asked for with images, as the last timing gave them and as another process measured them."""
    rows = rows_of("runtimes_data")
    by_target(rows, lambda row: f"{row['last_timing']:.2f}x ({row['second']:.2f}x)" if "second" in row else "-")
    near, tenth, furthest = _nearness(rows)
    seconds = statistics.median(row["seconds"] for row in rows)
    print(
        f"**{near} are within 5 % of what was asked** by the second measurement, {tenth} within 10 %; the furthest is "
        f"off by {furthest}. In the median {seconds:.0f} s a target, on one core.\n"
    )


def runtimes() -> None:
    """Each runtime's speed-ups as another process measured them there: how many are near what was asked, and all."""
    rows = [row for row in rows_of("runtimes") if row["plan"] == row["runtime"]]
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    targets = sorted({row["asked"] for row in rows})
    found = {(row["model"], row["runtime"], row["asked"]): row for row in rows}

    def counts(runtime: str) -> list[str]:
        mine = [row for row in rows if row["runtime"] == runtime]
        out, failed = sum("error" in row for row in mine), sum("failed" in row for row in mine)
        seconds = statistics.median(row["seconds"] for row in mine if "seconds" in row)
        return [f"`{runtime}`", *_nearness(mine), str(out), str(failed), f"{seconds:.0f}"]

    def cell(model: str, runtime: str) -> str:
        told = [found.get((model, runtime, target)) for target in targets]
        if not any(told):
            return ""
        return ", ".join(
            "-" if row is None or "failed" in row else "out of reach" if "error" in row else f"{row['second']:.2f}"
            for row in told
        )  # fmt: skip

    heads = ["runtime", *NEARNESS, "out of reach", "failed", "seconds a target"]
    print(markdown(heads, list(map(counts, names))))
    print(f"Asked for {', '.join(f'{target:g}x' for target in targets)}; measured by another process:\n")
    models = dict.fromkeys(row["model"] for row in rows)
    print(markdown(["model", *names], [[_model({"model": m}), *(cell(m, name) for name in names)] for m in models]))


NEARNESS = ("within 5 %", "within 10 %", "furthest off")


def zeros_in_runtimes() -> None:
    """What zeros do to the time in each runtime, and to the bytes of the weights."""
    rows = rows_of("sparsity_runtimes")
    timed = defaultdict[str, dict[str, Row]](dict)
    for row in rows:
        if "ms" in row:
            timed[row["runtime"]][row["zeros_of"]] = row
    kinds = [kind for kind in next(iter(timed.values())) if kind != "dense"]
    lines = [
        [f"`{name}`", f"{mine['dense']['ms']:.2f}", *(f"{mine[kind]['speedup']:.2f}x" for kind in kinds)]
        for name, mine in timed.items()
    ]
    print(markdown(["runtime", "dense, ms", *(kind.replace("%", " %") for kind in kinds)], lines))
    stored = {row["stored"]: row for row in rows if "stored" in row}
    files = ("safetensors", "packed", "packed-int8", "onnx", "onnx.xz")
    dense = stored["dense"]["safetensors"]
    lines = [[f"`{file}`", *(f"{stored[kind][file] / dense:.3f}" for kind in kinds)] for file in files]
    print("Bytes, relative to the dense model in `safetensors`:\n")
    print(markdown(["file", *(kind.replace("%", " %") for kind in kinds)], lines))


def rethought() -> None:
    """What is pruned beside the same masks or shape trained anew: mean and spread over seeds."""
    of_kind = defaultdict[tuple[str, str, float], list[Row]](list)
    for row in rows_of("rethinking"):
        of_kind[row["pruned"], row["what"], row["epochs"]].append(row)
    lines = []
    for (pruned, what, epochs), mine in of_kind.items():
        found = [row["metric"] for row in mine]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        lines.append([pruned.replace("%", " %"), what, f"{epochs:g}", f"{statistics.fmean(found):.1f}{spread} %"])
    print(markdown(["pruned", "what is done", "epochs", "right"], lines))


def learned() -> None:
    """Trainings with and without sparse learning before the shrink: mean and spread over seeds."""
    of_kind = defaultdict[tuple[float, str], list[Row]](list)
    for row in rows_of("train_and_prune_learning"):
        of_kind[row["fewer"], row["learning"]].append(row)
    lines = []
    for (fewer, learning), mine in sorted(of_kind.items(), key=lambda item: item[0][0]):
        metrics, without = [row["metric"] for row in mine], [row["untrained"] for row in mine if row["untrained"]]
        spread = f" ± {statistics.stdev(metrics):.2f}" if len(metrics) > 1 else ""
        before = f"{statistics.fmean(without):.2f} %" if without else "-"
        lines.append([f"{fewer:g}x", learning, str(len(mine)), before, f"{statistics.fmean(metrics):.2f}{spread} %"])
    print(markdown(["fewer MACs", "`regularization`", "seeds", "before training", "after"], lines))


def families() -> None:
    """The members of a family beside runs of their own, and the time of both."""
    rows = rows_of("family")
    found = {(row["by"], row["asked"]): row for row in rows}
    lines = [
        [f"{asked:g}x", *(f"{found[by, asked][key]:.2f}{unit}" if (by, asked) in found else "-"
                          for by in ("family", "alone") for key, unit in (("speedup", "x"), ("metric", " %")))]
        for asked in sorted({row["asked"] for row in rows})
    ]  # fmt: skip
    print(markdown(["asked", "family, measured", "accuracy", "a run of its own, measured", "accuracy"], lines))
    alone = [row["seconds"] for row in rows if row["by"] == "alone"]
    together = next(row["seconds"] for row in rows if row["by"] == "family")
    times, share = together / statistics.fmean(alone), 100 * together / sum(alone)
    print(
        f"The family took {together:.0f} s, a run of its own {statistics.fmean(alone):.0f} s in the mean: the family "
        f"takes {times:.1f} times as long as one of them, {share:.0f} % of the time of all.\n"
    )


def stages_in_processes(count: int) -> None:
    """The seconds of every stage in one process and in two, and what follows for more of them."""
    import scaling

    one, two = (row["seconds"] for row in rows_of("scaling"))
    more = scaling.predicted(one, two, count)
    lines = [
        [stage, *(f"{seconds:.1f}" for seconds in (one[stage], two[stage], more[stage]))]
        for stage in one if one[stage] >= 0.05
    ]  # fmt: skip
    totals = [sum(found.values()) for found in (one, two, more)]
    lines.append(["all", *(f"{seconds:.1f}" for seconds in totals)])
    print(markdown(["stage", "one process, s", "two processes, s", f"{count} processes, s, predicted"], lines))


def _nearness(rows: list[Any]) -> list[str]:
    """How many of the measured rows are so near what was asked, and the furthest."""
    off = [abs(row["second"] / row["asked"] - 1) for row in rows if "second" in row]
    near = [f"{sum(error <= limit for error in off)} of {len(off)}" for limit in (0.05, 0.1)]
    return [*near, f"{max(off):.0%}" if off else "-"]


def plans_in_runtimes() -> None:
    """Speed-ups in a runtime by plans made for it, for ONNX Runtime, and by a peer's models with as many MACs."""
    rows = [row for row in rows_of("runtimes") if "second" in row]
    told = {"onnxruntime": "ONNX Runtime in float", "peer": "Torch-Pruning, as many MACs"}
    compared = {(row["runtime"], row["model"], row["asked"]) for row in rows if row["plan"] != row["runtime"]}
    found = {
        (row["runtime"], row["plan"], row["model"], row["asked"]): f"{row['second']:.2f}x"
        for row in rows
        if (row["runtime"], row["model"], row["asked"]) in compared
    }
    cells = list(dict.fromkeys((model, asked) for *_, model, asked in found))
    heads = ["runtime", "plan for", *(f"{_model({'model': model})}, {asked:g}x" for model, asked in cells)]
    lines = [
        [f"`{runtime}`", "this runtime" if plan == runtime else told.get(plan, plan)]
        + [found.get((runtime, plan, *cell), "-") for cell in cells]
        for runtime, plan in sorted({key[:2] for key in found}, key=lambda pair: (pair[0], pair[1] != pair[0], pair[1]))
    ]
    print(markdown(heads, lines))


def demo() -> None:
    """The demo's model before and after."""
    (row,) = rows_of("demo")
    table = [[line["what"], line["original"], line["compressed"], line["change"]] for line in row["table"]]
    print(markdown(["", "original", "compressed", "change"], table))


def five() -> None:
    """The figures that the README begins with."""
    shot, trained, latency, timm, peer = (
        SUMMARIES[name]()
        for name in (
            "one_shot_measured", "train_and_prune_resnet56", "onnx_latency", "coverage_timm", "onnx_latency_peer"
        )
    )  # fmt: skip
    told = {
        f"{latency['within']} of {latency['cells']}": "speed-ups asked for (12 models; 1.5x, 2x, 3x) met within 5 %, "
        "measured by another process",
        f"{timm['passed']} of {timm['models']}": "model families of timm shrunk: the same outputs as the unpruned "
        "model with the removed channels at zero",
        f"{shot['lite0_1.5']} %": "of 300 ImageNet images right at 1.5x measured, without training, fitted to "
        f"400 others; {shot['lite0_dense']} % before (EfficientNet-Lite0; all images are of its training set)",
        f"{trained['at_2']} %": "of CIFAR-10 right at 2x measured, after 15 epochs; "
        f"{trained['dense']} % before (ResNet-56; at 3x {trained['at_3']} %)",
        f"{peer['faster']}x": "as fast as Torch-Pruning's result at equal MACs, in the median of "
        f"{peer['models']} models",
    }
    lines = [[f"**{figure}**", words] for figure, words in told.items()]
    print(markdown(["", ""], lines))


def coverage(name: str) -> None:
    """Counts and medians of a sweep over a library."""
    found = _of_coverage(name)["table"]
    print(markdown(["figure", "value"], [[what, str(value)] for what, value in found.items()]))


def sentences() -> None:
    """What commands said that print no table."""
    for row in rows_of("sentences"):
        machine = "; ".join(filter(None, [row.get("cpu"), row.get("torch") and f"torch {row['torch']}"]))
        print(f"- **{row['what'].capitalize()}.** {row['said']} *`{row['call']}`; commit {row['commit']}; {machine}.*")
    print()


# ---------------------------------------------------------------------------------- how a row is written


def _text(head: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(head) is None else str(row[head])


def _percent(key: str, digits: int = 1, share: bool = False) -> Callable[[Row], str]:
    return lambda row: f"{row[key] * (100 if share else 1):.{digits}f} %" if row.get(key) is not None else ""


def _times(key: str, digits: int = 2) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.{digits}f}x" if row.get(key) is not None else ""


def _model(row: Row) -> str:
    return str(row["model"]).replace(":", " ")


def _seconds(row: Row) -> str:
    return f"{row['seconds']:.0f}" if "seconds" in row else ""


ONE_SHOT: Columns = {
    "model": _model,
    "unpruned": _percent("dense"),
    "by": lambda row: row["by"],
    "asked": lambda row: f"{row['asked']:g}x",
    "measured apart": lambda row: "out of reach" if "error" in row else f"{row['speedup']:.2f}x",
    "right": _percent("accuracy"),
    "MACs left": _percent("macs_left", share=True),
    "blocks removed": lambda row: "-" if row.get("removed", "0 of 0") == "0 of 0" else row["removed"],
    "recovery": lambda row: row.get("recovery", ""),
    "seconds": _seconds,
    "peak memory": lambda row: f"{row['peak_gib']:.1f} GiB" if "peak_gib" in row else "",
}
IMAGES: Columns = {
    "model": _model,
    "unpruned": _percent("dense"),
    "images": _text("images"),
    "BatchNorm recalibrated alone": _percent("recalibrated"),
    "as compress does": _percent("accuracy"),
}
ORACLES: Columns = {
    "model": _model,
    "groups open / all": lambda row: f"{row['open']} / {row['groups']}",
    "parameters in open groups": _percent("open_parameters", share=True),
    "error": lambda row: str(row["masked"]).split(":")[0],
    "parameters left": _percent("parameters_left", share=True),
}
TRAINED: Columns = {
    "asked": lambda row: f"{row['speedup']:g}x",
    "seed": lambda row: str(row["seed"]),
    "measured apart": _times("apart"),
    "unpruned": _percent("dense", 2),
    "before training": _percent("untrained", 2),
    "after": _percent("metric", 2),
    "epochs": lambda row: f"{row['epochs']:g}",
}
MAX_DROP: Columns = {
    "seed": _text("seed"),
    "speed-up": lambda row: "none is sure" if "error" in row else f"{row['speedup']:.2f}x",
    "MACs left": _percent("macs_left", share=True),
    "points lost, images of the search": lambda row: f"{row['drop']:.2f}" if "drop" in row else "",
    "at most, by its bound": lambda row: f"{row['upper']:.2f}" if "upper" in row else "",
    "points lost, images never seen": lambda row: f"{row['unseen_drop']:.2f}" if "unseen_drop" in row else "",
    "seconds": _seconds,
}
INT8_TARGET: Columns = {
    "plan": _text("plan"),
    "asked": _times("asked"),
    "speed-up in INT8": _times("speedup"),
    "right in INT8": _percent("top1"),
    "right in float": _percent("float_top1"),
    "MACs left": _percent("macs_left", share=True),
    "seconds": _seconds,
}
TRANSFER: Columns = {
    "student": _text("student"),
    "by": lambda row: (
        "cpd, widths alone" if (row["by"], row.get("parts")) == ("cpd", "widths") else row["by"].replace("==", " ")
    ),
    **TRAINED,
    "MACs": lambda row: f"{row['macs']:.2f}x fewer",
}
PRUNED_AND_TRAINED: Columns = {
    "unpruned": _percent("dense"),
    "pruned": _percent("pruned"),
    "trained back": _percent("after"),
    "MACs left": _percent("macs_left", share=True),
    "parameters left": _percent("parameters_left", share=True),
}
DETECTOR: Columns = {
    "by": _text("by"),
    "asked": lambda row: "" if row["by"] == "unpruned" else f"{row['asked']:g}x",
    "measured apart": _times("speedup"),
    **PRUNED_AND_TRAINED,
}
DETECTION: Columns = {
    "detector": _text("model"),
    "parameters": lambda row: f"{row['parameters'] / 1e6:.1f} M",
    "in open groups": _percent("open", share=True),
    "error": _text("error"),
    "parameters left": _percent("left", share=True),
}
BOXES: Columns = {
    "detector": _text("model"),
    "parameters": lambda row: f"{row['parameters'] / 1e6:.1f} M",
    **PRUNED_AND_TRAINED,
    "unpruned, trained on as long": _percent("longer"),
}
COLUMNS: dict[str, Columns] = {
    "boxes": BOXES,
    "yolo": {
        "model": _model,
        "parameters": lambda row: f"{row['parameters'] / 1e6:.2f} M",
        "in open groups": _percent("open", share=True),
        "error": _text("error"),
        "asked": _times("asked", 1),
        "measured": _times("speed-up"),
        "parameters left": lambda row: f"{row['left'] / 1e6:.2f} M",
        "trainer": _text("trainer"),
        "exporter": _text("exporter"),
        "seconds": _seconds,
    },
    "detector": DETECTOR,
    "detection": DETECTION,
    "one_shot_measured": ONE_SHOT,
    "one_shot_parts": ONE_SHOT,
    "one_shot_peers": ONE_SHOT,
    "one_shot_images": IMAGES,
    "oracles": ORACLES,
    "gpu_checks": {"step": _text("what"), "on the GPU": lambda row: str(row["found"]), "s": _seconds},
    "train_and_prune_resnet56_gpu": TRAINED,
    "train_and_prune_resnet56": TRAINED,
    "train_and_prune_lraspp_2x": TRAINED,
    "train_and_prune_vit_2x": TRAINED,
    "sparsity_trained": {
        "masks": _text("masks"),
        "refitted, no epoch": _percent("refitted"),
        "after each epoch": lambda row: ", ".join(
            f"{value:.1f}" for epoch, value in row["history"].items() if int(epoch)
        ),
        "kept": _percent("trained"),
    },
    "transfer": TRANSFER,
    "paper_minutes": {
        "table": lambda row: f"`{row['table']}`",
        "cores": lambda row: str(row["cores"]),
        "minutes": lambda row: f"{row['minutes']:.1f}",
    },
    "train_and_prune_lite0": TRANSFER,
    "int8_target": INT8_TARGET,
    "max_drop": MAX_DROP,
}


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; columns of figures are aligned to the right."""

    def figures(column: int) -> bool:
        cells = [cell for row in rows if (cell := row[column].lstrip("−-≈ "))]
        return bool(cells) and all(cell[0].isdigit() for cell in cells)

    bars = ["---:" if figures(column) else "---" for column in range(len(heads))]
    lines = [heads, bars, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# ---------------------------------------------------------------------------------- figures in the text


def rows_of(name: str) -> list[Row]:
    """The rows of a result that is kept."""
    rows: list[Row] = results.read(results.FOLDER / f"{name}.json")
    if not rows:
        raise FileNotFoundError(f"benchmarks/results/{name}.json does not exist or has no rows.")
    return rows


def _of_latency() -> dict[str, Any]:
    rows = rows_of("onnx_latency")
    reached = [row for row in rows if not row.get("error")]
    predicted = statistics.median(abs(row["predicted"] / row["first"] - 1) for row in reached)
    return {
        "cells": len(rows),
        "out": len(rows) - len(reached) or "none",
        "within": sum(abs(row["again"] / row["asked"] - 1) <= 0.05 for row in reached),
        "exports": max(row["exports"] for row in reached),
        "seconds": f"{statistics.median(row['seconds'] for row in reached):.0f}",
        "predicted": f"{predicted:.1%}",
    }


def _of_peer() -> dict[str, Any]:
    """How much faster at equal MACs, of the models where both results run."""
    cells = [row["Torch-Pruning at our MACs"] for row in rows_of("onnx_latency_peer")]
    pairs = [re.findall(r"[0-9.]+(?=x)", cell) for cell in cells]
    faster = [float(ours) / float(theirs) for theirs, ours in filter(None, pairs)]
    return {"faster": f"{statistics.median(faster):.2f}", "models": len(faster)}


def _of_coverage(name: str) -> dict[str, Any]:
    from oracles import CHECKS, passed

    rows = rows_of(name)
    done = [row for row in rows if "open_parameters" in row]
    seconds = [row["comb_s"] + row.get("shrink_s", 0) for row in done]
    having = [row for row in done if row.get("branches")]
    errors = [float(row["all_removed"]) for row in having if str(row.get("all_removed", "-"))[0].isdigit()]
    made = [check for check in CHECKS if any(check in row for row in done)]
    right = sum(map(passed, rows))
    table = {
        f"models that pass every check made ({', '.join(made)})": f"{right} of {len(rows)}",
        "at most 75 % of the parameters left": sum(row.get("parameters_left", 1) <= 0.75 for row in done),
        "at least 90 % of the parameters in open groups": sum(row["open_parameters"] >= 0.9 for row in done),
        "parameters in open groups, median": f"{statistics.median(row['open_parameters'] for row in done):.1%}",
        "ops without a rule": ", ".join(sorted({op for row in done for op in row["unknown"]})) or "none",
        "trace, proof and shrink, median and longest": f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s",
    }
    if having:
        table |= {
            "models with residual blocks or branches": len(having),
            "branches found, of them removable": f"{sum(row['branches'] for row in having)}, "
            f"{sum(row['open_branches'] for row in having)}",
            "largest error with all of them removed": f"{max(errors, default=0.0):.0e}",
        }
    return {"models": len(rows), "passed": right, "table": table}


def _of_training() -> dict[str, Any]:
    """Mean accuracy after training by the speed-up asked for, over the seeds of both machines."""
    rows = [*rows_of("train_and_prune_resnet56_gpu"), *rows_of("train_and_prune_resnet56")]
    mine = {f"{asked:g}": [row for row in rows if row["speedup"] == asked] for asked in (1.5, 2.0, 3.0)}
    return {"dense": f"{rows[0]['dense']:.1f}"} | {
        f"at_{asked}": f"{statistics.fmean(row['metric'] for row in found):.1f}" for asked, found in mine.items()
    }


def _of_one_shot() -> dict[str, Any]:
    """Per cent right by model and speed-up asked for, as `lite0_1.5`, and of the unpruned model."""
    names = {"tf_efficientnet_lite0": "lite0", "resnet56": "resnet56"}
    rows = [row for row in rows_of("one_shot_measured") if row["model"] in names and row["by"] == "cpd"]
    dense = {f"{names[row['model']]}_dense": f"{row['dense']:.1f}" for row in rows}
    return dense | {
        f"{names[row['model']]}_{row['asked']:g}": f"{row['accuracy']:.1f}" for row in rows if "accuracy" in row
    }


SUMMARIES: dict[str, Callable[[], Any]] = {
    "onnx_latency": _of_latency,
    "onnx_latency_peer": _of_peer,
    "coverage_timm": partial(_of_coverage, "coverage_timm"),
    "train_and_prune_resnet56": _of_training,
    "one_shot_measured": _of_one_shot,
}


def check(page: Path, *options: str) -> int:
    """Run cog on one page; 0 where all is as it was printed, or was written."""
    from cogapp import Cog

    here = str(Path(__file__).parent)
    found: int = Cog().main(["cog", "-P", "-I", here, "-p", "import figures", *options, str(page)])
    return found


def pages() -> list[Path]:
    """README and the pages of docs that hold blocks."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if "[[[cog" in page.read_text(encoding="utf-8")]


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say what differs")
    options = ("--check", "--diff") if parser.parse_args().check else ("-r",)
    return max(check(page, *options) for page in pages())


if __name__ == "__main__":
    sys.exit(main())
