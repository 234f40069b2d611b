"""Artifacts: a result written to a folder, and a model rebuilt from it. No pickle is read or written.

model.safetensors   the weights
plan.json           what was kept, how a fresh model is built, and the checksums of all files
model.onnx          the model as it is deployed
model.int8.onnx     the same in 8-bit integers, where the runtime that was asked for computes in them
report.json         every figure
report.html         the same to look at
README.md           a model card
recipe.yaml         of the command line alone: the options of the run
masks.safetensors   of a sparse model: which weights stay
packed.safetensors  of one that was saved packed, in the place of model.safetensors: a bitmap and the values

`save_pretrained` writes what model hubs look for instead: the weights, and `config.json` with what plan.json holds.

A result is put in place as a whole (`cpd.files.folder`). A new one takes the place of the former: files of that which
it has none of are deleted, unless they were changed. Files that are not of a result are never overwritten unasked: only
the names above count, so that a folder may hold whatever else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, nn

from cpd.errors import ArtifactError, InputError, first_line
from cpd.files.folder import Folder, reading, sha256_of, write_files
from cpd.files.reading import check_signed, conform, naming, read_json, signed
from cpd.model.arguments import MODEL
from cpd.model.inputs import check_model
from cpd.model.recorded import rebuilt
from cpd.options import FLAG, PATH, checked
from cpd.plan import Cache, Plan, removes
from cpd.report.packed import unpack
from cpd.report.report import Report
from cpd.surgery.shrink import shrink

FORMAT = "cpd-1"
WEIGHTS, PLAN, ONNX, INT8, REPORT, PAGE, CARD, CONFIG, RECIPE, SWEEP, MASKS, PACKED = (
    "model.safetensors", "plan.json", "model.onnx", "model.int8.onnx", "report.json", "report.html", "README.md",
    "config.json", "recipe.yaml", "sweep.json", "masks.safetensors", "packed.safetensors",
)  # fmt: skip
#: What `save_result`, `save_pretrained` and a sweep write.
RESULT, PRETRAINED, SWEPT = (WEIGHTS, PLAN, ONNX, INT8, REPORT, PAGE, CARD), (WEIGHTS, CONFIG, CARD), (SWEEP, PAGE)
FAMILY_WEIGHTS, FAMILY_SHEET = "family.safetensors", "family.json"
#: What a family is written to.
FAMILY = (FAMILY_WEIGHTS, FAMILY_SHEET, PAGE)
#: Files that say which of several models are in a folder, and what such a file holds.
SHEETS = {SWEEP: ("original", "points"), FAMILY_SHEET: ("original", "points", "plans")}
#: What a sparse result is written to, too.
SPARSE = (*RESULT, MASKS, PACKED)
#: What users change as they like: a model loads whatever has become of it.
EDITABLE = (CARD, RECIPE, INT8)


class Document(TypedDict):
    """What a model is rebuilt from, beside its weights; earlier versions wrote no checksums but that of the weights."""

    format: str
    source: str | None
    model_class: str
    weights_sha256: str
    plan: dict[str, Any]
    files: NotRequired[dict[str, str]]
    sha256: NotRequired[str]


def check_output_dir(path: str | os.PathLike[str], names: Collection[str] = RESULT, *, overwrite: bool = False) -> Path:
    """Make sure that files can be written to `path`, before any work is done.

    Args:
        path: the folder; made if there is none.
        names: the files that will be written.
        overwrite: whether those may be replaced, too, that are of no result, or were changed since it was saved.

    Raises:
        InputError: if it is no folder, cannot be created or written to, or holds such files.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_dir():
            raise InputError(f"output_dir {target} is a file: pass a folder.")
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
        with reading(target) as files:
            known = _known(files, names)
            foreign = [name for name in names if not _is_ours(files, name, {None} if overwrite else known[name])]
    except OSError as error:
        raise InputError(f"output_dir {target} cannot be written to: {error.strerror or error}.") from error
    if foreign:
        raise InputError(
            f"output_dir {target} holds {', '.join(foreign)}, which cpd did not write or which was changed since, and "
            "which would be overwritten. Choose another folder, or pass overwrite=True."
        )
    return target


def _known(files: Folder, names: Collection[str]) -> dict[str, set[str | None]]:
    """The checksums that files have in the results of a folder, None where they may have any."""
    known = defaultdict[str, set[str | None]](set)
    for sheet, keys in SHEETS.items():
        if sheet in names:
            known.update({name: {None} for name in names if _holds(files, sheet, keys)})
            return known
    for place, document in _documents(files):
        for name, digest in {**_owned(document), place: None}.items():
            known[name].add(digest)
    return known


def _is_ours(files: Folder, name: str, digests: Collection[str | None]) -> bool:
    """Whether a name is free, or that of a file with one of these checksums."""
    if not files.has(name):
        return not os.path.lexists(files.path / name)
    return None in digests or (bool(digests) and sha256_of(files.file(name)) in digests)


def _holds(files: Folder, sheet: str, keys: Collection[str]) -> bool:
    """Whether a folder has a sheet of several models that is as it was saved."""
    path = files.file(sheet)
    try:
        found = read_json(path)
        check_signed(found, path)
    except ArtifactError:
        return False
    return isinstance(found, dict) and set(keys) <= found.keys()


def _documents(files: Folder) -> Iterator[tuple[str, Document]]:
    """The documents of the results in a folder, by the names of their files: that of `save`, that of a hub, or both."""
    for name in (PLAN, CONFIG):
        if files.has(name):
            try:
                yield name, _read_document(files.file(name), hub=name == CONFIG)
            except ArtifactError:
                continue


def _owned(document: Document) -> dict[str, str | None]:
    """The files of a result, and their checksums, which an earlier version has not written."""
    listed = document.get("files")
    return {**listed} if listed is not None else dict.fromkeys((*RESULT, RECIPE))


def save_result(
    directory: Path, model: nn.Module, plan: Plan, report: Report, onnx: bytes | None, int8: bytes | None = None, *,
    masks: bytes | None = None, packed: bytes | None = None,
) -> None:  # fmt: skip
    """Write every artifact; all of them are there at once, or what was there before.

    Args:
        directory: the folder.
        model: the result.
        plan: what it keeps of the original.
        report: every figure.
        onnx: the model as it is deployed, if it could be exported.
        int8: the same in INT8, if it is what was timed.
        masks: which weights stay, of a sparse one.
        packed: its weights, where they are to take the place of the plain ones.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    files: dict[str, bytes] = {
        **({WEIGHTS: save(unique_tensors(model))} if packed is None else {PACKED: packed}),
        **({} if masks is None else {MASKS: masks}),
        REPORT: json.dumps(report.to_dict(), indent=1).encode(),
        PAGE: report.to_html().encode(),
        CARD: report.model_card().encode(),
        **({} if onnx is None else {ONNX: onnx}),
        **({} if int8 is None else {INT8: int8}),
    }
    document = _document(files, plan, report)
    write_files(directory, {**files, PLAN: json.dumps(signed(document)).encode()}, _stale(directory, document))


def save_pretrained(directory: Path, model: nn.Module, plan: Plan, report: Report) -> None:
    """Write `config.json`, `model.safetensors` and the model card, as model hubs have them, all at once.

    Raises:
        ArtifactError: if a file cannot be written.
    """
    files = {WEIGHTS: save(unique_tensors(model)), CARD: report.model_card().encode()}
    document = _document(files, plan, report)
    config = {"architectures": [report.model_class], "library_name": "cpd", "cpd": signed(document)}
    write_files(directory, {**files, CONFIG: json.dumps(config).encode()}, _stale(directory, document))


def _document(files: Mapping[str, bytes], plan: Plan, report: Report) -> Document:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {
        "format": FORMAT,
        "source": report.source,
        "model_class": report.model_class,
        "weights_sha256": digests[WEIGHTS] if WEIGHTS in digests else digests[PACKED],
        "plan": plan.to_dict(),
        "files": digests,
    }


def _stale(directory: Path, document: Document) -> set[str]:
    """Files of former results in a folder, of other weights, as they were written."""
    gone = set[str]()
    with reading(directory) as files:
        for place, former in _documents(files):
            if former["weights_sha256"] != document["weights_sha256"]:
                known = {name: digest for name, digest in _owned(former).items() if files.has(name)}
                same = {name for name, digest in known.items() if digest == sha256_of(files.file(name))}
                gone |= {place, *same, *(name for name, digest in known.items() if digest is None and name != CARD)}
    return gone


def add_files(directory: Path, added: Mapping[str, bytes]) -> None:
    """Write further files of a result, whose document then lists them.

    Raises:
        ArtifactError: if one cannot be written.
    """
    files = dict(added)
    with reading(directory) as found:
        for place, document in _documents(found):
            if "files" in document:
                digests = {name: hashlib.sha256(content).hexdigest() for name, content in added.items()}
                document["files"] = {**document["files"], **digests}
                whole = read_json(found.file(place), finite=False)
                whole = {**whole, "cpd": signed(document)} if place == CONFIG else signed(document)
                files[place] = json.dumps(whole).encode()
    write_files(directory, files)


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


@checked(directory=PATH, model=MODEL, trust_source=FLAG)
def load(directory: str | os.PathLike[str], model: nn.Module | None = None, *, trust_source: bool = False) -> nn.Module:
    """Rebuild a compressed model from its folder. No code in the folder is run, and nothing is downloaded.

    The files are compared with their checksums, except README.md and recipe.yaml, which you may edit. All files except
    plan.json and model.safetensors (or packed.safetensors) may be deleted.

    Args:
        directory: The folder that `result.save` or `result.save_pretrained` wrote.
        model: A fresh model of the original architecture, which is shrunk in place. Default: one built from the saved
            name in timm or torchvision, if its arguments are plain values such as numbers.
        trust_source: Whether to import and call a saved `package.module:factory`, which runs its code.

    Returns:
        The compressed model in eval mode.

    Raises:
        InputError: If `directory` is not a path, or `model` is not a module.
        ArtifactError: If a file is missing, truncated, changed or not written by cpd; or if no model is passed and none
            can be built from a saved name. A model that was passed is then unchanged.

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
    given = None if model is None else check_model(model)
    try:
        with reading(folder) as files:
            document = _read_main(files)
            with naming(folder / PLAN):
                plan = Plan.from_dict(document["plan"])
            weights = _read_weights(files, document)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if given is None:
        given = rebuilt(document["source"], document["model_class"], trust=trust_source)
    try:
        check_fit(given, plan, weights)
    except ArtifactError as error:
        raise ArtifactError(
            f"{folder} was made from a {document['model_class']} and does not fit this {type(given).__name__}: {error}"
            " Pass a fresh, unpruned model, built with the same arguments, to cpd.load."
        ) from error
    try:
        shrink(given, plan)
    except Exception as error:  # a plan that fits no model; `shrink` has put all back
        raise ArtifactError(f"The plan in {folder} does not fit the model: {error}") from error
    state = OrderedDict(weights)
    state._metadata = given.state_dict()._metadata  # type: ignore[attr-defined]  # versions that safetensors drops
    given.load_state_dict(state, strict=False)
    return given.eval()


@checked(name=PATH, model=MODEL, trust_source=FLAG)
def from_pretrained(
    name: str | os.PathLike[str], model: nn.Module | None = None, *, trust_source: bool = False, **download: Any
) -> nn.Module:
    """Rebuild a compressed model from a folder, or from a repository on the Hugging Face Hub.

    Args:
        name: A folder that `result.save_pretrained` or `result.save` wrote, or `user/repository`, which is downloaded.
        model: A fresh model of the original architecture, as for `cpd.load`.
        trust_source: Whether to import and call a saved `package.module:factory`, as for `cpd.load`.
        download: Further arguments of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Returns:
        The compressed model in eval mode.

    Raises:
        ArtifactError: As for `cpd.load`, or if the repository cannot be downloaded.
    """
    if Path(name).is_dir():
        return load(name, model, trust_source=trust_source)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(name), allow_patterns=[CONFIG, PLAN, WEIGHTS, PACKED], **download)
    except Exception as error:  # of the hub, of requests, of the disk
        raise ArtifactError(f"{name} is not a local folder and cannot be downloaded: {first_line(error)}.") from error
    return load(folder, model, trust_source=trust_source)


def read_document(folder: Path) -> Document:
    """The plan of a saved result, and what goes with it.

    Raises:
        ArtifactError: if it is missing, truncated or foreign, or a file of the result is not as it was saved.
    """
    with reading(folder) as files:
        return _read_main(files)


def _read_main(files: Folder) -> Document:
    """The document of a folder, whose files are as it says."""
    hub = not files.has(PLAN) and files.has(CONFIG)
    document = _read_document(files.file(CONFIG if hub else PLAN), hub=hub)
    for name, digest in document.get("files", {}).items():
        compared = name not in EDITABLE and name == Path(name).name and files.has(name)
        if compared and sha256_of(files.file(name)) != digest:
            raise ArtifactError(f"{files.path / name} is truncated, or is not the file that was saved with {PLAN}.")
    return document


def _read_document(path: Path, *, hub: bool) -> Document:
    document = read_json(path, finite=False)
    if hub and isinstance(document, dict):
        document = document.get("cpd")
    if not isinstance(document, dict) or document.get("format") != FORMAT or "plan" not in document:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(
            f"{path} does not have the format {FORMAT} (found {found!r}): this version of cpd did not write it."
        )
    with naming(path):
        read = conform(document, Document, "a document")
    check_signed(read, path)
    return read


def read_report(folder: Path) -> Report:
    """The report of a saved result.

    Raises:
        ArtifactError: if it is missing, truncated or foreign.
    """
    with reading(folder) as files:
        path = files.file(REPORT)
        content = read_json(path)
    with naming(path):
        return Report.from_dict(content)


def _read_weights(files: Folder, document: Document) -> dict[str, Tensor]:
    packed = not files.has(WEIGHTS) and files.has(PACKED)
    path = files.file(PACKED if packed else WEIGHTS)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != document["weights_sha256"]:
            raise ArtifactError(f"{path} is truncated, or is not the file that was saved with {PLAN}.")
        return unpack(content) if packed else load_tensors(content)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def check_fit(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor]) -> None:
    """The weights must have, under every name, the shape that the plan gives the model, and its caches be there."""
    for cache in plan.caches:
        _check_cache(model, cache)
    paths = dict(model.named_modules(remove_duplicate=False))
    absent = next((item.module for item in plan.replacements if item.module not in paths), None)
    if absent is not None:
        raise ArtifactError(f"The plan removes {absent}, which this model does not have.")
    state = {
        name: item for name, item in model.state_dict(keep_vars=True).items() if not removes(plan.replacements, name)
    }
    first: dict[int, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if first.setdefault(id(tensor), name) != name and name not in weights:
            continue
        shape = list(tensor.shape)
        for dim, indices in plan.kept.get(name, {}).items():
            if dim >= len(shape):
                raise ArtifactError(f"The plan removes channels of {name} in dim {dim}, but its shape here is {shape}.")
            shape[dim] = len(indices)
        if name not in weights:
            raise ArtifactError(f"{WEIGHTS} does not hold {name}: it belongs to another model.")
        if list(weights[name].shape) != shape:
            raise ArtifactError(
                f"{name} has shape {list(weights[name].shape)} in {WEIGHTS}, but the plan makes it {shape} here."
            )
        if not torch.can_cast(weights[name].dtype, tensor.dtype):
            raise ArtifactError(f"{name} is {weights[name].dtype} in {WEIGHTS}, but {tensor.dtype} in this model.")
    extra = sorted(set(weights) - set(state))
    if extra:
        raise ArtifactError(f"{WEIGHTS} holds {extra[0]}, which this model does not have: it belongs to another model.")


def _check_cache(model: nn.Module, cache: Cache) -> None:
    """What a plan empties must be of a module that there is, and of a kind that can be emptied so."""
    try:
        module = model.get_submodule(cache.module)
    except AttributeError as error:
        raise ArtifactError(
            f"The plan empties {cache.module}.{cache.name}, but this model has no such module."
        ) from error
    held = vars(module).get(cache.name)
    entries = cache.cold == "entries" and not isinstance(held, (dict, list, type(None)))
    if entries or (cache.name in module._buffers and (cache.cold == "entries" or cache.value is not None)):
        raise ArtifactError(
            f"The plan empties {cache.module}.{cache.name} in a way that does not fit its type in this model."
        )
