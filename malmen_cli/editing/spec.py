"""Specs: settings in YAML, checked whole before anything is loaded.

method: malmen            # see methods.METHODS
settings: {tokens: subject, rank: 256}
training: {steps: 600}    # used by train-editor; finetune and memit have none
facts: [...]              # optional; read by facts/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from malmen_cli.editing.methods import METHODS, method_entry
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings, brief, from_mapping
from malmen_cli.exceptions import FactsError, SpecError
from malmen_cli.facts.yaml_reader import load_yaml

KEYS = ("method", "settings", "training", "facts")
METHOD = "malmen"
S = TypeVar("S", MalmenSettings, MemitSettings)


@dataclass(frozen=True)
class Spec:
    """A method with an editor, its settings, and the training settings as written (checked by `training`)."""

    method: str = METHOD
    settings: MalmenSettings = field(default_factory=MalmenSettings)
    training: Mapping[str, Any] = field(default_factory=dict)
    source: str = "defaults"
    given: Mapping[str, Any] = field(default_factory=dict)  # the settings written in the file
    method_given: bool = False  # by the command line or the file; else a trained editor brings its own


@dataclass(frozen=True)
class FinetuneSpec:
    """A method that needs no editor, and its settings."""

    method: str = "finetune"
    settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    source: str = "defaults"


@dataclass(frozen=True)
class MemitSpec:
    """MEMIT or a relative of it, which needs statistics of the base instead of an editor, and its settings."""

    method: str = "memit"
    settings: MemitSettings = field(default_factory=MemitSettings)
    source: str = "defaults"


def read_spec(path: Path | None, *, method: str | None = None) -> Spec | FinetuneSpec | MemitSpec:
    """The spec in a YAML file, or the defaults. method: what the command line asks for, over the file's.

    Raises SpecError naming file and setting.
    """
    name, document, source = _opened(path, method)
    if method_entry(name).has_editor:
        return _editor_spec(name, document, source, method_given=method is not None)
    if _mapping(document, "training", source):
        raise SpecError(f"{source}: training: {name} needs no training; leave it out or choose another method")
    given = _mapping(document, "settings", source)
    if method_entry(name).settings is MemitSettings:
        return MemitSpec(name, _with_preset(MemitSettings, name, given, source), source)
    return FinetuneSpec(name, from_mapping(FinetuneSettings, given, _where(source)), source)


def read_editor_spec(path: Path | None, *, method: str | None = None) -> Spec:
    """The spec of an editor to train. Raises SpecError as `read_spec` does, and for a method that has no editor."""
    name, document, source = _opened(path, method)
    if not method_entry(name).has_editor:
        raise SpecError(f"{name} needs no training; use it with: malmen apply BASE FACTS -o DIR --method {name}")
    return _editor_spec(name, document, source, method_given=method is not None)


def _opened(path: Path | None, method: str | None) -> tuple[str, Mapping[str, Any], str]:
    """A spec's method, its document with no key unknown, and what errors call it."""
    document = _read(path) if path is not None else {}
    source = str(path) if path is not None else "settings"
    unknown = [key for key in document if key not in KEYS]
    if unknown:
        raise SpecError(f"{source}: unknown key {brief(unknown[0])}; a spec has {', '.join(KEYS)}")
    name = method or document.get("method", METHOD)
    if not isinstance(name, str):
        raise SpecError(f"{source}: method must be a name, not {brief(name)}")
    return name, document, source


def _editor_spec(method: str, document: Mapping[str, Any], source: str, *, method_given: bool) -> Spec:
    given = _mapping(document, "settings", source)
    training = _mapping(document, "training", source)
    settings = _with_preset(MalmenSettings, method, given, source)
    return Spec(method, settings, training, source, given, method_given=method_given or "method" in document)


def _with_preset(cls: type[S], method: str, given: Mapping[str, Any], source: str) -> S:
    """A method's settings: its preset, which may not be contradicted, and what is given."""
    preset = dict(method_entry(method).preset)
    for key, value in preset.items():
        if key in given and given[key] != value:
            plain = next(name for name, entry in METHODS.items() if entry.settings is cls)
            raise SpecError(
                f"{source}: {method} is {plain} with {key}: {value}; leave {key} out or choose another method"
            )
    return from_mapping(cls, {**given, **preset}, _where(source))


def _where(source: str) -> str:
    return f"{source}: settings" if source != "settings" else "settings"


def _mapping(document: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SpecError(f"{source}: {key} must be a mapping of settings, not {brief(value)}")
    return value


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = load_yaml(path.read_text("utf-8"), str(path)).data
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except FactsError as error:
        raise SpecError(str(error)) from error
    if not isinstance(data, Mapping):
        raise SpecError(f"{path}: a spec is a mapping with {', '.join(KEYS)}")
    return data
