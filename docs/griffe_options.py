"""For the reference: the options of a config, as they are declared, become the attributes of its docstring.

Where a default is a constant, its value is shown instead of its name.
"""

from __future__ import annotations

from pydoc import locate
from typing import Any

import griffe

from cpd.options import options_of

HEADING = "Options:\n    Each can be read as an attribute."


class Options(griffe.Extension):
    """Reads `name: type = option(default, check, help)`, and constants that are defaults."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Show the value of each default that is the name of a constant."""
        for parameter in func.parameters:
            name = parameter.default
            if isinstance(name, griffe.ExprName) and name.name.isupper():
                value = locate(f"{func.module.path}.{name.name}")
                if isinstance(value, (bool, int, float, str, tuple)):
                    parameter.default = repr(value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Show the default of each option in the signature, and its help in the docstring."""
        declared = {
            name: attribute
            for name, attribute in cls.attributes.items()
            if isinstance(attribute.value, griffe.ExprCall) and str(attribute.value.function) == "option"
        }
        helps = {item.name: item.help for item in options_of(locate(cls.canonical_path))} if declared else {}
        lines = ["Attributes:"]
        for name, attribute in declared.items():
            assert isinstance(attribute.value, griffe.ExprCall)
            attribute.value = attribute.value.arguments[0]
            lines.append(f"    {name}: {helps[name]}")
        if len(lines) > 1:
            assert cls.docstring is not None, f"{cls.path} has no docstring"
            assert HEADING in cls.docstring.value, f"{cls.path} has no place for its options"
            cls.docstring.value = cls.docstring.value.replace(HEADING, "\n".join(lines))
