"""For the reference: the options of a config, as they are declared, become the attributes of its docstring."""

from __future__ import annotations

import ast
from typing import Any

import griffe

HEADING = "Options:\n    Each may be read as an attribute."


class Options(griffe.Extension):
    """Reads `name: type = option(default, check, help)`."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Show the default of each option in the signature, and its help in the docstring."""
        lines = ["Attributes:"]
        for name, attribute in cls.attributes.items():
            value = attribute.value
            if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
                default, text = value.arguments[0], value.arguments[2]
                attribute.value = default
                lines.append(f"    {name}: {ast.literal_eval(str(text))}")
        if len(lines) > 1:
            assert cls.docstring is not None, f"{cls.path} has no docstring"
            assert HEADING in cls.docstring.value, f"{cls.path} has no place for its options"
            cls.docstring.value = cls.docstring.value.replace(HEADING, "\n".join(lines))
