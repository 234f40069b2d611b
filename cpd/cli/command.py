"""What every command shares: options from a file, tables or JSON, the log, errors and exit codes."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console, RenderableType
from rich.text import Text

from cpd.cli.wording import in_options
from cpd.errors import CPDError, InputError, NothingToPruneError, TargetError, first_line
from cpd.model import progress
from cpd.options import check_names

FAILED, WRONG, OUT_OF_REACH, INTERRUPTED = 1, 2, 3, 130
#: The logger of huggingface_hub that tells of retries.
_HUB = "huggingface_hub.utils._http"
#: Options that hold for one run only: a recipe leaves them out.
ONCE = ("resume", "overwrite", "trust_source")


@dataclass(frozen=True)
class Output:
    """What a command answers.

    Attributes:
        data: all of it as JSON types, for `--json`.
        shown: tables and sentences.
    """

    data: Any
    shown: tuple[RenderableType, ...]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a file says as the defaults of the command's options."""
    if path is None:
        return None
    names = {name for item in context.command.params if (name := item.name) and name not in SHOWN}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise typer.BadParameter(f"{path} holds no options: write lines such as `target_speedup: 2`.")
    options = {str(key).replace("-", "_"): value for key, value in found.items()}
    try:
        check_names(options, names, f"{path}: {context.command.name}")
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    context.default_map = {**(context.default_map or {}), **{k: v for k, v in options.items() if v is not None}}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.yaml", is_eager=True, callback=_read_config,
        help="File with options by name. Options on the command line replace those in the file.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_SHARED = (("config", Config, None), ("json_output", Json, False), ("quiet", Quiet, False),
           ("verbose", Verbose, False), ("debug", Debug, False))  # fmt: skip
#: Options that say how a run is shown; a recipe leaves them out too.
SHOWN = tuple(name for name, *_ in _SHARED)


def register(app: typer.Typer, function: Callable[..., Output], *examples: str) -> None:
    """Make a function a command: its arguments are the options, what it returns is printed.

    Args:
        app: where it belongs.
        function: where it has an argument `progress`, that is no option: False if quiet, else None.
        examples: arguments that a user might give, for the help.
    """
    signature = inspect.signature(function, eval_str=True)
    hidden = inspect.Parameter.VAR_KEYWORD
    own = [item for name, item in signature.parameters.items() if name != "progress" and item.kind is not hidden]

    def run(context: typer.Context, **given: Any) -> None:
        shown = {name: given.pop(name) for name in SHOWN}
        with _running(shown["quiet"], shown["verbose"], shown["debug"], given) as log:
            wanted = False if shown["quiet"] or not is_first_process() else None
            if "progress" in signature.parameters:
                given["progress"] = wanted
            with progress.shown(wanted):
                output = function(**given)
            if not is_first_process():
                return
            if given.get("output_dir") is not None:
                _write_recipe(context, Path(given["output_dir"]))
            if shown["json_output"]:
                typer.echo(json.dumps(output.data, indent=2))
                return
            console = Console()
            for item in output.shown:
                if isinstance(item, str) and log.told(item):
                    continue
                if isinstance(item, str):
                    console.print(Text(in_options(item, given)), soft_wrap=not console.file.isatty())
                else:
                    console.print(item)

    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, kind, default=value, annotation=hint) for name, hint, value in _SHARED]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    every = [context, *(item.replace(kind=kind) for item in own), *shared]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {item.name: item.annotation for item in every}
    lines = [f"cpd {function.__name__} {example}".strip() for example in examples]
    app.command(epilog="\n\n".join(["Examples:", *lines]))(run)


def is_first_process() -> bool:
    """Whether this process is the one, of those that `accelerate launch` has started, that prints."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(error: CPDError) -> int:
    """What a command ends with: 2 if what it was given is wrong, 3 if what was asked cannot be had, else 1."""
    if isinstance(error, (TargetError, NothingToPruneError)):
        return OUT_OF_REACH
    return WRONG if isinstance(error, InputError) else FAILED


class _Log(logging.Handler):
    """Shows the log on stderr in the words of the command line: a line a message, above the progress line."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self._given = given
        self._told: set[str] = set()

    def told(self, note: str) -> bool:
        """Whether who reads the output has seen a note already."""
        return note.removeprefix("Note: ") in self._told and _one_terminal()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the time and the message; on a terminal it is wrapped between words."""
        head = time.strftime("%H:%M:%S ", time.localtime(record.created))
        warned = record.levelno >= logging.WARNING
        if not warned:
            self._told.add(self.format(record))
        message = Text("warning: " * warned + in_options(self.format(record), self._given), "yellow" * warned)
        screen = progress.console()
        if screen.file.isatty():
            rest = max(screen.width - len(head), 20)
            message = Text("\n" + " " * len(head)).join(message.wrap(screen, rest))
        screen.print(Text(head, "dim") + message, soft_wrap=True)


def _one_terminal() -> bool:
    """Whether log and output are read together."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class _First(logging.Filter):
    """Lets one message pass: what retries without a network say, 20 times over, the error says again in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this is the first."""
        told, self._told = self._told, True
        return not told


@contextlib.contextmanager
def _running(quiet: bool, verbose: bool, debug: bool, given: Mapping[str, Any]) -> Iterator[_Log]:
    """Show the log of `cpd` on stderr; turn an error into one line and an exit code (unless `debug`)."""
    logger = logging.getLogger("cpd")
    handler = _Log(given)
    level, propagate = logger.level, logger.propagate
    quiet = quiet or not is_first_process()
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    hub, first = logging.getLogger(_HUB), _First()
    if not verbose:
        hub.addFilter(first)
    try:
        yield handler
    except (Exception, KeyboardInterrupt) as error:
        if debug or isinstance(error, BrokenPipeError):  # who reads the output, as `head`, has enough: typer ends
            raise
        told, code = _ending(error, given)
        screen = Console(stderr=True)
        screen.print(Text(told, "red"), soft_wrap=not screen.file.isatty())
        raise typer.Exit(code) from None
    finally:
        hub.removeFilter(first)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _ending(error: BaseException, given: Mapping[str, Any]) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted. {_how_to_resume(given)}".strip(), INTERRUPTED
    if isinstance(error, CPDError):
        text = str(error)
        if text.startswith("Caught "):  # by a process that loads data: the traceback, and then the error
            text = text.strip().rpartition(f"{type(error).__name__}: ")[2]
        return f"error: {in_options(text, given)}", exit_code(error)
    told = f"{type(error).__name__}: {first_line(error)}"
    return f"error: unexpected {told}. Run the command with --debug to see the traceback.", FAILED


def _how_to_resume(given: Mapping[str, Any]) -> str:
    """The command that goes on with a run, if it has left a checkpoint."""
    from cpd.files.checkpoint import NAME

    if "resume" not in given or given.get("output_dir") is None:
        return "Nothing was written."
    path = Path(given["output_dir"]) / NAME
    if not path.exists():
        return "There was no checkpoint yet: start the command again."
    command = shlex.join(["cpd", *(part for part in sys.argv[1:] if part != "--resume"), "--resume"])
    return f"The checkpoint {path} is intact; resume with: {command}"


def _write_recipe(context: typer.Context, folder: Path) -> None:
    """The options of a run as a file that `--config` takes, beside what came of it; a file that is none is left."""
    from cpd.report.artifacts import RECIPE, add_files

    start, place = "# cpd ", folder / RECIPE
    if place.exists() and not context.params.get("overwrite") and not place.read_bytes().startswith(start.encode()):
        logging.getLogger("cpd").warning("%s was not written by cpd, so it was not replaced.", place)
        return
    options = {name: value for name, value in context.params.items() if name not in (*SHOWN, *ONCE)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    head = f"{start}{context.command.name} --config {RECIPE}\n"
    text = head + yaml.safe_dump({name: value for name, value in plain.items() if value is not None}, sort_keys=False)
    add_files(folder, {RECIPE: text.encode()})
