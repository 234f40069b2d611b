"""Checkpoints: all that a training needs to go on, in one file that is whole at any moment.

The file is a safetensors file: tensors, and everything else as JSON in its header, with a checksum. Nothing in it is
executed when it is read. It is written in a folder of its own, flushed to the disk, and put in place by one rename;
what a process left that was killed before that is deleted by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cpd.errors import ArtifactError, CheckpointError, CPDError, first_line
from cpd.files.folder import flush
from cpd.files.reading import conform, digest_of, parsed, signed

FORMAT = 2
NAME = "checkpoint.safetensors"
#: What settings were by default that are None by default now.
FORMER = {"score_batches": 16}
#: Names of folders for files that are not yet in place: of their process. (Earlier versions wrote a file so named.)
_BESIDE = re.compile(rf"\.{re.escape(NAME)}\.\d+")
#: Keys of JSON objects that stand for what JSON has no word for.
_TENSOR, _TUPLE, _ITEMS, _DTYPE = "__tensor__", "__tuple__", "__items__", "__dtype__"


class _Content(TypedDict):
    """What the header holds as JSON."""

    format: int
    key: dict[str, Any]
    state: dict[str, Any]
    sha256: NotRequired[str]


class Checkpoint:
    """The checkpoint of one run, in a folder.

    Args:
        folder: where it lies; must exist.
        key: the settings of the run; a checkpoint of other settings is not read.
        usual: the settings that a checkpoint had which was written before there were such.
        minutes: between two writings at least, apart from those that are demanded.

    Attributes:
        state: what `read` found.
        extra: written along with every state.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], minutes: float = 10.0, usual: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.minutes = folder / NAME, minutes
        self.key: dict[str, Any] = json.loads(json.dumps(dict(key), default=str))
        self.usual: dict[str, Any] = json.loads(json.dumps(dict(usual or {}), default=str))
        self.state: dict[str, Any] | None = None
        self.digest = ""  # of what was read
        self.extra: dict[str, Any] = {}
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= 60 * self.minutes

    def write(self, state: Mapping[str, Any]) -> None:
        """Put a state in the place of the former one.

        Args:
            state: nested dicts, lists and tuples of plain JSON values, tensors and their types.

        Raises:
            CheckpointError: if it cannot be written; the former one is then as it was.
        """
        tensors: dict[str, Tensor] = {}
        packed = _packed({**state, "extra": self.extra}, "", tensors)
        content = {"key": self.key, "state": packed}
        header = {"cpd": json.dumps({"format": FORMAT, **signed(content)})}
        folder = self.path.with_name(f".{NAME}.{os.getpid()}")
        beside = folder / NAME  # with what safetensors writes beside that, under names of its own
        try:
            self._tidy()
            folder.mkdir()
            beside.touch()  # with the mode of the umask, which safetensors does not mind
            mode = (self.path if self.path.exists() else beside).stat().st_mode & 0o7777
            safetensors.torch.save_file(tensors, beside, header)
            os.chmod(beside, mode)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            folder.rmdir()
            flush(self.path.parent)
        except (OSError, safetensors.SafetensorError) as error:
            self._tidy()
            former = f"The former checkpoint {self.path} is intact" if self.path.is_file() else "There was none before"
            raise CheckpointError(
                f"The checkpoint cannot be written to {self.path.parent}: {error}. {former}. Make room, or make the "
                "folder writable, and start again with resume=True."
            ) from error
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """The state that was written last, also kept in `state`; None if there is no checkpoint.

        Raises:
            CheckpointError: if the file is no checkpoint, or one of other settings.
        """
        self._tidy()
        if not self.path.is_file():
            return None
        with self._ours():
            with safetensors.safe_open(self.path, framework="pt") as file:
                text = file.metadata()["cpd"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = conform(parsed(text, "its header", finite=False), _Content, "a header")
            if found["format"] not in (1, FORMAT):
                raise CheckpointError(
                    f"{self.path} has format {found['format']}, but this version of cpd reads 1 and {FORMAT}."
                )
            content = {"key": found["key"], "state": found["state"]}
            if "sha256" in found and digest_of(content) != found["sha256"]:
                raise ArtifactError("its header is not the one that was written")
            then = _settings_of_format_1(found["key"]) if found["format"] == 1 else found["key"]
            state = conform(_unpacked(found["state"], tensors), dict[str, Any], "a state")
            extra = conform(state.pop("extra"), dict[str, Any], "a state")
        then = {**self.usual, **then}
        then |= {name: None for name, value in FORMER.items() if then.get(name) == value and self.key.get(name) is None}
        other = [key for key in {**self.key, **then} if self.key.get(key) != then.get(key)]
        if other:
            told = "; ".join(f"{key}: {then.get(key)!r} then, {self.key.get(key)!r} now" for key in other)
            raise CheckpointError(
                f"{self.path} belongs to a run with other settings ({told}). Pass those settings, or another folder."
            )
        self.state, self.extra, self.digest = state, extra, digest_of(content)
        return state

    @contextlib.contextmanager
    def taken_up(self) -> Iterator[None]:
        """Where a block goes on from `state`, and fails: that is because the state is none that cpd wrote.

        Raises:
            CheckpointError: in the place of anything else but the errors of `cpd`.
        """
        with contextlib.nullcontext() if self.state is None else self._ours():
            yield

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of safetensors, of torch's optimizers: whatever a foreign value makes them raise
            if isinstance(error, CPDError) and not isinstance(error, ArtifactError):
                raise
            raise CheckpointError(
                f"{self.path} is not a checkpoint that cpd wrote ({type(error).__name__}: {first_line(error)}). "
                "It was not changed."
            ) from error

    def _tidy(self) -> None:
        """Delete what processes have left that were killed while they wrote."""
        with contextlib.suppress(OSError):
            for part in self.path.parent.iterdir():
                if _BESIDE.fullmatch(part.name):
                    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file, once there is a result in its place."""
        self.path.unlink(missing_ok=True)


def _settings_of_format_1(key: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are written now: there the schedule was one text, and what was said of the training twice."""
    if "schedule" not in key:  # not of `compress`
        return dict(key)
    text = str(key["schedule"])
    parts = dict(re.findall(r"(\w+)=([^,)]+)", text))
    return {
        **{name: value for name, value in key.items() if name != "training"},
        "schedule": parts.get("kind", text).strip("'"),
        "prune_from": float(parts.get("warmup", 0.0)),
        "prune_until": float(parts.get("end", 0.5)),
        "interval": None if (interval := parts.get("interval", "None")) == "None" else int(interval),
    }


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put aside."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _packed(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _packed(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_packed(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold.")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    if _DTYPE in value:
        return _dtype(value[_DTYPE])
    if _ITEMS in value:
        return {key: _unpacked(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unpacked(item, tensors) for key, item in value.items()}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return found
