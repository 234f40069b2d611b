"""Artifacts: a result written to a folder, and a model rebuilt from it. No pickle is read or written.

model.safetensors   the weights
plan.json           what was kept, how a fresh model is built, and the checksum of the weights
model.onnx          the model as it is deployed
report.json         every figure
report.html         the same to look at
README.md           a model card

`save_pretrained` writes what model hubs look for instead: the weights, and `config.json` with what plan.json holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from cpd.errors import ArtifactError, CPDError, InputError, first_line
from cpd.model.arguments import MODEL
from cpd.model.inputs import check_model
from cpd.options import PATH, checked
from cpd.plan import Plan
from cpd.report.report import Report
from cpd.surgery.shrink import shrink

FORMAT = "cpd-1"
WEIGHTS, PLAN, ONNX, REPORT, PAGE, CARD, CONFIG = (
    "model.safetensors", "plan.json", "model.onnx", "report.json", "report.html", "README.md", "config.json",
)  # fmt: skip


def check_output_dir(path: str | os.PathLike[str]) -> Path:
    """Make sure that files can be written to `path`, before any work is done.

    Raises:
        InputError: if it is a file, or cannot be created or written to.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"output_dir {target} is a file; give a folder.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError(f"output_dir {target} cannot be written to: {error.strerror or error}.") from error
    return target


def save_result(directory: Path, model: nn.Module, plan: Plan, report: Report, onnx: bytes | None) -> None:
    """Write every artifact; each file is whole or not there.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    weights = save(unique_tensors(model))
    files: dict[str, bytes] = {
        WEIGHTS: weights,
        PLAN: json.dumps(_document(weights, plan, report)).encode(),
        REPORT: json.dumps(report.to_dict(), indent=1).encode(),
        PAGE: report.to_html().encode(),
        CARD: report.model_card().encode(),
    }
    if onnx is not None:
        files[ONNX] = onnx
    write_files(directory, files)


def save_pretrained(directory: Path, model: nn.Module, plan: Plan, report: Report) -> None:
    """Write `config.json`, `model.safetensors` and the model card, as model hubs have them.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    weights = save(unique_tensors(model))
    config = {"architectures": [report.model_class], "library_name": "cpd", "cpd": _document(weights, plan, report)}
    files = {WEIGHTS: weights, CONFIG: json.dumps(config).encode(), CARD: report.model_card().encode()}
    write_files(directory, files)


def _document(weights: bytes, plan: Plan, report: Report) -> dict[str, Any]:
    """What a model is rebuilt from, beside its weights."""
    return {
        "format": FORMAT,
        "source": report.source,
        "model_class": report.model_class,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "plan": plan.to_dict(),
    }


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder; each is whole or as it was.

    Raises:
        ArtifactError: if one cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(directory / name, content)
    except OSError as error:
        raise ArtifactError(f"{directory} could not be written: {error.strerror or error}.") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: under another name first, then renamed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, each once however many names it has, contiguous and on the CPU."""
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    result = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor.detach().cpu().contiguous().clone()
    return result


@checked(directory=PATH, model=MODEL)
def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuild a compressed model from its folder.

    Args:
        directory: what `result.save` or `result.save_pretrained` wrote.
        model: a fresh model of the original architecture, which is shrunk in place; None builds one by the
            name in timm or torchvision that was saved.

    Returns:
        The compressed model in eval mode.

    Raises:
        ArtifactError: if a file is missing, truncated or foreign, or no name was saved and no model given.
            A model that was given is then as it was.

    Examples:
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
        >>> images = torch.randn(1, 3, 8, 8)
        >>> result = cpd.compress(build(), target_macs=0.5, example_inputs=images)
        >>> folder = result.save("out")
        >>> model = cpd.load(folder, build())
        >>> model[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        >>> torch.equal(model(images), result.model(images))
        True
    """
    folder = Path(directory)
    document = read_document(folder)
    plan = Plan.from_dict(document["plan"])
    weights = _read_weights(folder, document)
    model = _fresh(document) if model is None else check_model(model)
    _check_fit(model, plan, weights)
    try:
        shrink(model, plan)
    except CPDError as error:
        raise ArtifactError(f"{folder / PLAN} does not fit the model: {error}") from error
    state = OrderedDict(weights)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # versions that safetensors drops
    model.load_state_dict(state, strict=False)
    return model.eval()


@checked(name=PATH, model=MODEL)
def from_pretrained(name: str | os.PathLike[str], model: nn.Module | None = None, **download: Any) -> nn.Module:
    """Rebuild a compressed model from a folder, or from a repository of the Hugging Face hub.

    Args:
        name: a folder that `result.save_pretrained` or `result.save` wrote, or `user/repository`, downloaded.
        model: as for `load`.
        download: further arguments of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Returns:
        The compressed model in eval mode.

    Raises:
        ArtifactError: as for `load`, or the repository cannot be downloaded.
    """
    if Path(name).is_dir():
        return load(name, model)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(name), allow_patterns=[CONFIG, PLAN, WEIGHTS], **download)
    except Exception as error:  # of the hub, of requests, of the disk
        raise ArtifactError(f"{name} is no folder here, and cannot be downloaded: {first_line(error)}.") from error
    return load(folder, model)


def read_document(folder: Path) -> dict[str, Any]:
    """The plan of a saved result, and what goes with it: `format`, `plan`, `source`.

    Raises:
        ArtifactError: if it is missing, truncated or foreign.
    """
    path = folder / PLAN
    hub = not path.exists() and (folder / CONFIG).exists()
    path = folder / CONFIG if hub else path
    document = read_json(path)
    if hub and isinstance(document, dict):
        document = document.get("cpd")
    if not isinstance(document, dict) or document.get("format") != FORMAT or "plan" not in document:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(f"{path} is not of the format {FORMAT} (found {found!r}); it was not written by this cpd.")
    return document


def read_report(folder: Path) -> Report:
    """The report of a saved result.

    Raises:
        ArtifactError: if it is missing, truncated or foreign.
    """
    return Report.from_dict(read_json(folder / REPORT))


def read_json(path: Path) -> Any:
    """What a JSON file of a saved result holds.

    Raises:
        ArtifactError: if it is missing or truncated.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing: {path.parent} is no folder that result.save wrote.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}. It is truncated or not written by cpd.") from error


def _read_weights(folder: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != document.get("weights_sha256"):
            raise ArtifactError(f"{path} is truncated, or not the file that was saved with {PLAN}.")
        return load_tensors(content)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.") from error
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def _fresh(document: Mapping[str, Any]) -> nn.Module:
    from cpd.model.sources import BY_NAME, resolve

    source = document.get("source")
    if not isinstance(source, str) or not source.startswith(BY_NAME):
        raise ArtifactError(
            f"This model of class {document.get('model_class')} is known by no timm or torchvision name: build one "
            "as the original was built and pass it, cpd.load(directory, model=fresh)."
        )
    try:
        return resolve(source).build()
    except CPDError as error:
        raise ArtifactError(f"The model {source} cannot be built here: {error}") from error


def _check_fit(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    """The weights must have, under every name, the shape that the plan gives the model."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if first.setdefault(id(tensor), name) != name and name not in weights:
            continue
        shape = list(tensor.shape)
        for dim, indices in plan.kept.get(name, {}).items():
            if dim >= len(shape):
                raise ArtifactError(f"The plan cuts dim {dim} of {name}, which here is {shape}.")
            shape[dim] = len(indices)
        if name not in weights:
            raise ArtifactError(f"{WEIGHTS} lacks {name}: it belongs to another model.")
        if list(weights[name].shape) != shape:
            raise ArtifactError(f"{name} is {list(weights[name].shape)} in {WEIGHTS}; the plan makes it {shape} here.")
    extra = sorted(set(weights) - set(state))
    if extra:
        raise ArtifactError(f"{WEIGHTS} holds {extra[0]}, which this model lacks: it belongs to another model.")
