"""Options that several commands have, what they may be, and how a model is named."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpd.deploy.runtimes.catalogue import RUNTIMES
from cpd.errors import CPDError, InputError, first_line
from cpd.model.progress import part

if TYPE_CHECKING:
    from torch import nn

    from cpd.model.sources import ModelSource

Model = Annotated[
    str,
    typer.Argument(
        help="The model: timm:NAME, torchvision:NAME, hf:NAME_OR_FOLDER, ultralytics:NAME or package.module:factory. "
        "Arguments follow after commas, as in timm:resnet18,num_classes=10."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images: one folder for each class, or images/ and labels/ (label maps), or train/ and val/ "
        "that hold such folders. For models of ultralytics: one of their data files, such as coco8.yaml."
    ),
]
NeededData = Annotated[Path, typer.Option(help="Folder of images, as for cpd compress.")]
InputSize = Annotated[
    str | None, typer.Option("--input-size", metavar="H[,W]", help="Image size in pixels, if the model's is not known.")
]


def folder_path(text: str | Path) -> Path:
    """A folder that is named on the command line; an empty text names none, though Python takes it for the current."""
    if not str(text).strip():
        raise typer.BadParameter("an empty text is not a folder; use '.' for the current folder.")
    return Path(text)


OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", parser=folder_path, metavar="FOLDER", help="Folder to which the result is written."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Also replace files in --output-dir that cpd did not write, or that were changed since."
    ),
]
Saved = Annotated[Path, typer.Argument(parser=folder_path, metavar="FOLDER", help="A folder that cpd compress wrote.")]
TrustSource = Annotated[
    bool,
    typer.Option(
        "--trust-source", help="Import and call the package.module:factory that FOLDER names, which runs its code."
    ),
]
TrustTeacher = Annotated[
    bool,
    typer.Option(
        "--trust-source",
        help="Import and call the package.module:factory that the folder of --teacher names, which runs its code.",
        rich_help_panel="Training",
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw a picture, to an .svg or .png file.")]
Pretrained = Annotated[bool, typer.Option(help="Start from the library's pretrained weights, which are downloaded.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that the runtime uses when latency is measured.")]
Runtime = Annotated[
    str, typer.Option(help=f"Where the models run: {', '.join(RUNTIMES)}; several with commas between them.")
]
Seconds = Annotated[float, typer.Option(min=0, help="Longest time that the timing takes.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="A teacher other than the unpruned model: a model named like MODEL, or a folder that cpd compress wrote.",
        rich_help_panel="Training",
    ),
]
AutoAugment = Annotated[
    str | None, typer.Option(help="Augmentation policy of timm, such as rand-m9-mstd0.5.", rich_help_panel="Training")
]
RandomErasing = Annotated[
    float,
    typer.Option(min=0, max=1, help="Probability that a patch of an image is erased.", rich_help_panel="Training"),
]
Augment = Annotated[
    str,
    typer.Option(
        help="Augmentation of training images: none; light (crops of at least 70 % of an image, mirroring); or "
        "imagenet (crops of at least 8 %, mirroring, colour changes). Channels are always scored on plain images.",
        rich_help_panel="Training",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        help="Mean for the normalisation of images.",
        show_default="the model's, or ImageNet's",
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std",
        metavar="R,G,B",
        help="Standard deviation for the normalisation of images.",
        show_default="the model's, or ImageNet's",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
_PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
WORKERS = min(4, len(_PROCESSORS))
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that load images.", show_default="one per core, at most 4")
]


def parse_size(text: str) -> tuple[int, int]:
    """`H` or `H,W` (also `HxW`) as height and width in pixels.

    Raises:
        InputError: if it is neither.
    """
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) in (1, 2) and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise InputError(f"--input-size takes H or H,W in pixels, as in 224 or 224,320; got {text!r}.")


def parse_numbers(text: str, option: str = "") -> list[float]:
    """`1.5,2,3` as numbers.

    Args:
        text: what is given.
        option: what it is given for, for the message.

    Raises:
        InputError: if it is something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        where = f" for {option}" if option else ""
        raise InputError(f"Give numbers with commas between them{where}, as in 1.5,2,3; got {text!r}.")
    return found


def build(name: str, input_size: str | None, pretrained: bool) -> tuple[ModelSource, nn.Module, Any]:
    """The source, the model in eval mode, and one example input: [1, C, H, W] of most models.

    Raises:
        InputError: if there is no such model, or its input is not known.
    """
    if input_size is not None:
        parse_size(input_size)
    with part("load"):
        from cpd.model import sources

        source = sources.resolve(name)
        model = _built(source, pretrained)
    return source, model, example_inputs_of(model, name, input_size, source)


def example_inputs_of(model: nn.Module, name: str, input_size: str | None, source: ModelSource | None = None) -> Any:
    """One example input of a model: [1, C, H, W] of most.

    Raises:
        InputError: if its input is not known.
    """
    from cpd.model import sources

    if input_size is not None:
        return sources.image_inputs(model, parse_size(input_size))
    inputs = sources.default_inputs(model, source)
    if inputs is None:
        from cpd.tasks.task import task_of

        inputs = task_of(model).example_inputs(model)
    if inputs is None:
        raise InputError(f"The input of {name} is not known: pass its image size in pixels, --input-size H[,W].")
    return inputs


def build_teacher(name: str, pretrained: bool, trust: bool) -> nn.Module:
    """A teacher: a model by its name, or a result by its folder; in eval mode.

    Args:
        name: the name or the folder.
        pretrained: whether a model by its name has the library's own weights.
        trust: whether a `package.module:factory` that a folder names is imported and called, which runs its code.

    Raises:
        InputError: if there is no such model.
        ArtifactError: if the folder holds no result.
    """
    if Path(name).is_dir():
        from cpd.report.artifacts import load

        return load(name, trust_source=trust)
    from cpd.model import sources

    return _built(sources.resolve(name), pretrained)


def _built(source: ModelSource, pretrained: bool) -> nn.Module:
    """A model of a source, in eval mode; what a factory of the user's raises is told as its own.

    What is random in it is the same each time: a run that goes on, and each of several processes, has the same model.
    """
    from cpd.model.randomness import random_states_kept, seeded

    with random_states_kept(), seeded(None, 0):
        if source.by_name:
            return source.build(pretrained=pretrained).eval()
        try:
            return source.build().eval()
        except CPDError:
            raise
        except Exception as error:
            raise InputError(
                f"{source} raised {type(error).__name__}: {first_line(error)}. It is called with the arguments that "
                "follow its name after commas, and must return the model."
            ) from error


def result_folder(folder: Path) -> Path:
    """A folder that is there.

    Raises:
        InputError: if it is not, or is a file.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise InputError(f"{folder} is not a folder that cpd compress or result.save wrote: {found}.")
    return folder


def opened(name: str, input_size: str | None, inputs: Any) -> tuple[Any, Any]:
    """A model to be timed, and example inputs: those of the first that has some serve all."""
    path = Path(name)
    if path.is_dir():
        from cpd.files.folder import reading

        with reading(path) as files:
            path = files.file("model.onnx")
        if not path.is_file():
            raise InputError(f"{name} holds no model.onnx: it is not a folder that cpd compress wrote.")
    if path.suffix == ".onnx" and not path.is_file():
        raise InputError(f"{name} does not exist: pass an ONNX file, a folder that cpd compress wrote, or a model.")
    if path.suffix == ".onnx":
        if inputs is None:
            from cpd.deploy.export import random_inputs

            inputs = random_inputs(str(path))
        return str(path), inputs
    _, built, example_inputs = build(name, input_size, pretrained=False)
    return built, example_inputs if inputs is None else inputs
