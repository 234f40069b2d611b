"""Folders: several files that are put in place together, and read together.

Every new file is first written under a name of our own beside its place, and flushed to the disk. Then a journal that
names all of them is put in place by one rename: from there on the new files count, before they do not. Then each is
renamed to its own name, and the journal is deleted. Who finds a journal in a folder reads through it, and finishes it
if the folder can be written to; what a writer left that was killed before its journal is deleted by the next.

Where the system can lock a folder (not on Windows), writers wait for each other, and readers for writers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpd.errors import ArtifactError
from cpd.files.reading import conform, naming, parsed

#: What names the files of a save that has been decided on and not yet finished.
JOURNAL = ".cpd-save.json"
_FORMAT = "cpd-save-1"
#: Names of files that are not yet in place: their own, after sixteen digits that are new each time.
_BESIDE = re.compile(r"\.cpd-save\.[0-9a-f]{16}\.(?P<name>.+)")


@dataclass(frozen=True)
class _Entry:
    """A file that is to be put in place: where it lies until then, and the checksum of what it holds."""

    beside: str
    sha256: str


@dataclass(frozen=True)
class _Journal:
    """A save that has been decided on: the files by their names, and those that go, as they are of a former result."""

    format: str
    files: dict[str, _Entry]
    gone: tuple[str, ...] = ()


class Folder:
    """The files of a folder, as they are while nobody else changes them; see `reading`.

    Args:
        path: the folder.
        journal: a save that could not be finished here, as the folder can only be read.
    """

    def __init__(self, path: Path, journal: _Journal | None) -> None:
        self.path, self._journal = path, journal

    def file(self, name: str) -> Path:
        """Where a file lies; there may be none."""
        entry = None if self._journal is None else self._journal.files.get(name)
        beside = self.path / name if entry is None else self.path / entry.beside
        return beside if beside.is_file() else self.path / name

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.file(name).is_file() and (self._journal is None or name not in self._journal.gone)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Folder]:
    """A folder whose files nobody changes meanwhile. A save that was killed is finished before, where that can be.

    Raises:
        ArtifactError: if what is left of a save is damaged.
    """
    with contextlib.suppress(OSError):
        if (path / JOURNAL).exists():
            with _locked(path, alone=True):
                _finish(path)
    with _locked(path, alone=False):
        yield Folder(path, _read_journal(path))


def write_files(path: Path, files: Mapping[str, bytes], gone: Collection[str] = ()) -> None:
    """Write files into a folder: all of them are there at once, or the folder is as it was.

    A file that is replaced keeps its mode, a new one has that of the user's umask.

    Args:
        path: the folder; made if there is none.
        files: what each file holds, by its name.
        gone: names of files that are deleted at the same time, where there are such.

    Raises:
        ArtifactError: if one cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in (*files, *gone):
            if (path / name).is_dir():
                raise ArtifactError(
                    f"{path / name} is a folder, so no file of that name can be written: move the folder."
                )
        with _locked(path, alone=True):
            _finish(path)
            _decide(path, files, gone)
            _finish(path)
    except OSError as error:
        raise ArtifactError(f"{path} could not be written: {error.strerror or error}.") from error


def _decide(path: Path, files: Mapping[str, bytes], gone: Collection[str]) -> None:
    """Write the files beside their places, and then the journal; nothing is left where that fails."""
    token = secrets.token_hex(8)
    beside = {name: f".cpd-save.{token}.{name}" for name in (*files, JOURNAL)}
    entries = {name: [beside[name], hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    journal = {
        "format": _FORMAT,
        "files": {name: {"beside": place, "sha256": digest} for name, (place, digest) in entries.items()},
        "gone": sorted({*gone} - {*files}),
    }
    try:
        for name, content in files.items():
            _write(path / beside[name], content, like=path / name)
        _write(path / beside[JOURNAL], json.dumps(journal).encode())
        flush(path)
        os.replace(path / beside[JOURNAL], path / JOURNAL)
        flush(path)
    except BaseException:
        if not (path / JOURNAL).exists():
            for place in beside.values():
                with contextlib.suppress(OSError):
                    (path / place).unlink(missing_ok=True)
        raise


def _finish(path: Path) -> None:
    """Do what the journal says, if there is one; delete what other saves have left that were killed before theirs."""
    journal = _read_journal(path)
    if journal is not None:
        for name, entry in journal.files.items():
            if (path / entry.beside).exists():
                os.replace(path / entry.beside, path / name)
        for name in journal.gone:
            (path / name).unlink(missing_ok=True)
        flush(path)
        (path / JOURNAL).unlink()
    for item in path.iterdir():
        if _BESIDE.fullmatch(item.name) and not item.is_dir():
            item.unlink(missing_ok=True)


def _read_journal(path: Path) -> _Journal | None:
    """The journal of a folder, whose files are what it says.

    Raises:
        ArtifactError: if it is no journal of ours, or one of its files is damaged.
    """
    place = path / JOURNAL
    try:
        text = place.read_bytes()
    except OSError:  # there is none, or no folder
        return None
    with naming(place):
        journal = conform(parsed(text, "the journal of a save"), _Journal, "a journal")
    pairs = [(name, _BESIDE.fullmatch(entry.beside)) for name, entry in journal.files.items()]
    plain = all(name == Path(name).name != "" and name != JOURNAL for name in (*journal.files, *journal.gone))
    if journal.format != _FORMAT or not plain or any(found is None or found["name"] != name for name, found in pairs):
        raise ArtifactError(f"{place} is not a journal written by this version of cpd. Delete it to discard that save.")
    for entry in journal.files.values():
        file = path / entry.beside
        if file.is_file() and sha256_of(file) != entry.sha256:
            raise ArtifactError(
                f"{file}, from a save that was interrupted, is damaged. Delete {place} to discard that save."
            )
    return journal


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, content: bytes, like: Path | None = None) -> None:
    """Write a new file, flushed to the disk, with the mode of the one that it is to replace."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    if like is not None and like.exists():
        os.chmod(path, like.stat().st_mode & 0o7777)


def flush(folder: Path) -> None:
    """Make renames last; not all systems can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait until nobody else writes to a folder, nor reads it if we are to be alone; nothing where that is unknown."""
    handle = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
