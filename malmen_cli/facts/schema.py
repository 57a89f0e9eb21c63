"""Record -> Fact: the checks every fact goes through, whatever file or dialect it came from.

A `Record` reads one field at a time and notes what is wrong with it instead of raising, so that one pass over
a file finds every problem. It answers a placeholder for a bad field; a fact with mistakes is thrown away.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Set

from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.facts.problems import Mistake, escaped, quote
from malmen_cli.facts.yaml_reader import Unquoted

LONGEST_TEXT = 100_000  # characters; far beyond any model's context, so more is a broken file
REQUIRED_KEYS = frozenset({"prompt", "target"})
OPTIONAL_KEYS = frozenset({"id", "subject", "old_target", "rephrases", "locality", "portability", "tags"})
FACT_KEYS = REQUIRED_KEYS | OPTIONAL_KEYS
_PROBE_REQUIRED, _PROBE_KEYS = frozenset({"prompt"}), frozenset({"prompt", "target"})
_FORBIDDEN = re.compile("[\x00\ud800-\udfff]")


def stable_id(prompt: str, target: str, digits: int = 10) -> str:
    """The id of a fact that brings none: derived from its content alone."""
    return "fact-" + hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:digits]


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that was probably meant, or None when none is close."""
    close = difflib.get_close_matches(word[:100], sorted(words), n=1, cutoff=0.7)
    return close[0] if close else None


def describe(value: object) -> str:
    """What a value of the wrong type is, in the words of a JSON file."""
    if isinstance(value, str):
        return f"the text {quote(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {escaped(str(value))}"
    if isinstance(value, Unquoted):
        return f"the unquoted {quote(value.text)}, which YAML reads as {value.kind}"
    return "a list" if isinstance(value, list | tuple) else "an object" if isinstance(value, Mapping) else "no text"


def type_hint(value: object) -> str | None:
    """How to repair a value that should have been text."""
    if isinstance(value, Unquoted):
        return f'quote it: "{escaped(value.text)}"' if value.kind != "null" else "leave the key out or give it text"
    if value is None:
        return "leave the key out or give it text"
    if isinstance(value, bool | int | float):
        return f'quote it: "{describe(value).removeprefix("the number ")}"'
    return None


class Record:
    """One object of a facts file: reads its fields, notes mistakes under their full path."""

    __slots__ = ("data", "missing", "mistakes", "path")

    def __init__(self, data: Mapping[str, object], mistakes: list[Mistake], path: str = "") -> None:
        self.data = data
        self.mistakes = mistakes
        self.path = path
        self.missing: Collection[str] = ()  # required keys whose absence is noted already

    def field(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def wrong(self, key: str, message: str, hint: str | None = None) -> None:
        self.mistakes.append(Mistake(self.field(key), message, hint))

    def text(self, key: str) -> str:
        """The non-blank text of a required field."""
        if key in self.data:
            return self.checked(self.data[key], key)
        if key not in self.missing:
            self.wrong(key, "missing")
        return ""

    def optional(self, key: str) -> str | None:
        """The non-blank text of a field that may be left out."""
        return self.checked(self.data[key], key) if key in self.data else None

    def checked(self, value: object, key: str) -> str:
        if type(value) is str and len(value) <= LONGEST_TEXT and value.strip() and not _FORBIDDEN.search(value):
            return value
        if not isinstance(value, str):
            self.wrong(key, f"expected text, got {describe(value)}", type_hint(value))
        elif not value.strip():
            self.wrong(key, "empty" if not value else "blank", "give it text")
        elif len(value) > LONGEST_TEXT:
            self.wrong(key, f"{len(value):,} characters of text; at most {LONGEST_TEXT:,} are allowed")
        elif "\0" in value:
            self.wrong(key, "contains a NUL character")
        else:
            self.wrong(key, "contains half a surrogate pair, which is no character", "write the character itself")
        return ""

    def listed(self, key: str, what: str) -> list[object]:
        """The items of a list field; nothing when it is absent or no list."""
        value = self.data.get(key, [])
        if isinstance(value, list | tuple):
            return list(value)
        hint = f'write a list: ["{escaped(value)}"]' if isinstance(value, str) and what == "texts" else type_hint(value)
        self.wrong(key, f"expected a list of {what}, got {describe(value)}", hint)
        return []

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of non-blank texts; empty when absent."""
        if key not in self.data:
            return ()
        return tuple(self.checked(value, f"{key}[{n}]") for n, value in enumerate(self.listed(key, "texts")))

    def child(self, key: str) -> Record:
        """The object of a required field; an empty stand-in, noted, when there is none."""
        if key in self.data:
            return self.entry(self.data[key], key)
        if key not in self.missing:
            self.wrong(key, "missing")
        return Record({}, [])

    def entry(self, value: object, key: str, hint: str | None = None) -> Record:
        """The object `value`, found at `key`; an empty stand-in, noted, when it is none."""
        if isinstance(value, Mapping):
            return Record(value, self.mistakes, self.field(key))
        self.wrong(key, f"expected an object, got {describe(value)}", hint or type_hint(value))
        return Record({}, [])

    def probes(self, key: str) -> tuple[Probe, ...]:
        """A list of {"prompt": ..., "target": ...}, the target optional; empty when absent."""
        if key not in self.data:
            return ()
        return tuple(self._probe(value, f"{key}[{n}]") for n, value in enumerate(self.listed(key, "objects")))

    def _probe(self, value: object, key: str) -> Probe:
        hint = f'write {{"prompt": "{escaped(value)}"}}' if isinstance(value, str) else None
        record = self.entry(value, key, hint)
        if isinstance(value, Mapping):
            record.check_keys(_PROBE_REQUIRED, _PROBE_KEYS)
        return Probe(record.text("prompt"), record.optional("target"))

    def check_keys(self, required: Set[str], known: Set[str], hint: str | None = None) -> None:
        """Note unknown keys (`hint` where nothing is close) and required ones that are missing."""
        if self.data.keys() <= known and self.data.keys() >= required:  # nearly every record of a large file
            return
        meant: set[str] = set()
        for key in self.data:
            if key not in known:
                close = nearest(key, set(known) - self.data.keys())
                meant.add(close or "")
                self.wrong(escaped(key), "unknown key", f"did you mean {close!r}?" if close else hint)
        self.missing = set(required) - self.data.keys()
        for key in sorted(self.missing - meant):
            self.wrong(key, "missing")


def canonical_fact(record: Record) -> Fact:
    """A fact in the project's own form; its keys are checked already."""
    prompt, target = record.text("prompt"), record.text("target")
    return Fact(
        id=record.optional("id") or stable_id(prompt, target),
        prompt=prompt,
        target=target,
        subject=record.optional("subject"),
        old_target=record.optional("old_target"),
        rephrases=record.texts("rephrases"),
        locality=record.probes("locality"),
        portability=record.probes("portability"),
        tags=record.texts("tags"),
    )
