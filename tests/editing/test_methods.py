"""The registry of methods: names, presets, and what they point to."""

from __future__ import annotations

import importlib

import pytest

from malmen_cli.editing.methods import METHODS, method_entry
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings, from_mapping
from malmen_cli.exceptions import SpecError


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_entry_points_to_a_class_and_its_preset_is_valid(name: str) -> None:
    entry = method_entry(name)
    module, _, attribute = entry.target.partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), type)
    settings = from_mapping(entry.settings, dict(entry.preset), name)
    assert all(getattr(settings, key) == value for key, value in entry.preset.items())


def test_variants_differ_in_their_settings_alone() -> None:
    assert method_entry("mend").preset == {"aggregation": "sum"}
    assert method_entry("identity").preset == {"network": "identity"}
    assert method_entry("malmen").preset == {}
    assert len({method_entry(name).target for name in ("malmen", "mend", "identity")}) == 1
    assert method_entry("memit").preset == {}
    assert method_entry("rome").preset == {"constraint": "equality"}
    assert method_entry("alphaedit").preset == {"constraint": "null_space"}
    assert len({method_entry(name).target for name in ("memit", "rome", "alphaedit")}) == 1


def test_which_methods_have_no_editor() -> None:
    without = {name: method_entry(name).settings for name in METHODS if not method_entry(name).has_editor}
    memits = dict.fromkeys(("memit", "rome", "alphaedit"), MemitSettings)
    assert without == {"finetune": FinetuneSettings} | memits
    assert method_entry("malmen").settings is MalmenSettings


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("malman", "malmen"),
        ("MEND", None),
        ("identitty", "identity"),
        ("finetun", "finetune"),
        ("memitt", "memit"),
        ("", None),
    ],
)
def test_an_unknown_method_is_refused(name: str, near: str | None) -> None:
    hint = rf"did you mean '{near}'\?" if near else "known: malmen, mend, identity, finetune, memit, rome, alphaedit"
    with pytest.raises(SpecError, match=rf"^method '{name}' is not known; {hint}"):
        method_entry(name)
