"""What the library says, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection

#: Arguments of Python that have another form on the command line, and those that have none.
_OTHERWISE = {"example_inputs": ("input_size", "--input-size H,W"), "data": ("data", "--data FOLDER")}
_PYTHON_ONLY = ("loss", "evaluate")
_VALUE = r"(?:'[^']*'|\([^()]*\)|[^\s,;:)]*[^\s,;:).])?"


def in_options(message: str, given: Collection[str]) -> str:
    """A message of the library in the words of the command line: `round_to=8` becomes `--round-to 8`.

    Args:
        message: what the library says.
        given: the command's options; other names stay as they are.
    """

    def option(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    def assigned(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"].strip("'")
        if name in _PYTHON_ONLY:
            return f"{match[0]} (from Python: cpd.compress)"
        counterpart, form = _OTHERWISE.get(name, (name, ""))
        if counterpart not in given:
            return match[0]
        if form:
            return form
        if value in ("True", "False"):
            return option(name) if value == "True" else option(f"no_{name}")
        return f"{option(name)} {value}".strip()

    text = re.sub(rf"\b(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})", assigned, message)
    names = [name for name in given if "_" in name]
    if names:
        text = re.sub(rf"(?<![\w./-])({'|'.join(names)})(?![\w=/-]|\.\w)", lambda match: option(match[1]), text)
    text = re.sub(
        r"^([a-z]+)(?= must be | takes )|(?<=\bleave )([a-z]+)(?= out\b)",
        lambda match: option(match[0]) if match[0] in given else match[0],
        text,
    )
    text = re.sub(r", or None(?=[;.])", "", text)  # an option that is not given
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", text)  # where the library names the option itself
