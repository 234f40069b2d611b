"""What a user should know of a comb and its plans, sentence by sentence."""

from __future__ import annotations

from cpd.coupling.comb import Comb
from cpd.coupling.cost import unused_sentence
from cpd.errors import some
from cpd.model.outputs import outputs_sentence

#: Integers left alone that a note names.
NAMED = 8


def notes_of(comb: Comb) -> list[str]:
    """What should be known before anything is pruned."""
    notes = [unused_sentence(comb.unused)] if comb.unused else list[str]()
    if comb.operations.chosen is not None:
        notes.append(outputs_sentence(comb.outputs))
    if comb.operations.values_read:
        notes.append(comb.operations.values_sentence)
    return notes


def left_alone_sentence(places: tuple[str, ...]) -> str:
    """What a plan leaves as it is though it equals an old width."""
    return (
        "These integer attributes equal a former width, but are not changed, because the forward does not read them: "
        f"{some(places, NAMED)}."
    )
