"""The registry of editing methods. A variant of a method is a preset of its settings, not a class of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings, brief
from malmen_cli.exceptions import SpecError


@dataclass(frozen=True)
class Entry:
    """Where a method's class is (`module:attribute`, imported when asked for), its variant's settings, their class."""

    target: str
    preset: Mapping[str, object] = field(default_factory=dict)
    settings: type[MalmenSettings] | type[FinetuneSettings] | type[MemitSettings] = MalmenSettings

    @property
    def has_editor(self) -> bool:
        """Whether it edits through an editor, trained or calibrated; else facts and settings are all it takes."""
        return self.settings is MalmenSettings


MEMIT = "malmen_cli.editing.methods.memit:Memit"

METHODS: dict[str, Entry] = {
    "malmen": Entry("malmen_cli.editing.methods.malmen:Malmen"),
    "mend": Entry("malmen_cli.editing.methods.malmen:Malmen", {"aggregation": "sum"}),
    "identity": Entry("malmen_cli.editing.methods.malmen:Malmen", {"network": "identity"}),
    "finetune": Entry("malmen_cli.editing.methods.finetune:Finetune", settings=FinetuneSettings),
    "memit": Entry(MEMIT, settings=MemitSettings),
    "rome": Entry(MEMIT, {"constraint": "equality"}, MemitSettings),
    "alphaedit": Entry(MEMIT, {"constraint": "null_space"}, MemitSettings),
}


def method_entry(name: str) -> Entry:
    """The registry's entry. Raises SpecError with the nearest name for an unknown one."""
    if name not in METHODS:
        near = get_close_matches(name, list(METHODS), 1)
        raise SpecError(
            f"method {brief(name)} is not known"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(METHODS)}")
        )
    return METHODS[name]
