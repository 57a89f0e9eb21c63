"""Faults to order: a disk that fails at its k-th operation, and every command that writes, with what it leaves.

`MALMEN_FAULTS=full` (make faults) tries every k and every fault; by default a few of each.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gguf_file import write_gguf

from malmen_cli.artifact import disk
from malmen_cli.base.cache import cached_digest
from malmen_cli.base.weights import fingerprint

OPERATIONS = ("create", "write", "copy", "link", "sync", "rename", "exchange")
FAULTS: dict[str, tuple[BaseException, int]] = {  # what happens, and the exit code a user sees
    "full": (OSError(errno.ENOSPC, "No space left on device"), 6),
    "failing": (OSError(errno.EIO, "Input/output error"), 6),
    "interrupt": (KeyboardInterrupt(), 130),
}
EVERYTHING = os.environ.get("MALMEN_FAULTS") == "full"
SAMPLED = 4  # operations tried by default, for each fault and command
PLACES = ("Australia", "France", "Peru", "Japan", "Brazil", "Italy", "Sweden", "England")
TUNING = "method: finetune\nsettings: {epochs: 1}\n"
STATISTICS = "method: memit\nsettings: {blocks: [0], stats_tokens: 40}\n"
TRAINING = """
settings: {last_blocks: 1, rank: 4, preserved_rank: 8, rounds: 1}
training: {steps: 2, facts_per_step: [4, 4], meta_facts: 4, validate_every: 1, valid_facts: 2, warmup: 1,
  calibration_facts: 4, continuation: 1, valid_fraction: 0.2}
"""


class FaultyDisk:
    """The disk below malmen_cli.artifact: it counts what is asked of it, and can be told to fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self._at: int | None = None
        self._fault: BaseException | None = None
        for name in OPERATIONS:
            patch.setattr(disk, name, self._watched(name, getattr(disk, name)))
        patch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug of a test

    @contextmanager
    def failing(self, at: int | None, fault: BaseException | None = None) -> Iterator[None]:
        """The operation number `at`, counted from 0, raises `fault` instead of being done; None: none does."""
        self.asked.clear()
        self._at, self._fault = at, fault
        try:
            yield
        finally:
            self._at = None

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            self.asked.append(name)
            if len(self.asked) - 1 == self._at and self._fault is not None:
                raise self._fault
            return original(*arguments)

        return operation


@dataclass(frozen=True)
class Writer:
    """A command that writes. `again`: options of the run after a failed one; `outputs`: all that it may leave."""

    argv: list[str]
    outputs: list[Path]
    again: list[str] = field(default_factory=lambda: ["--force"])

    def remove(self) -> None:
        """The outputs, as if nothing had run."""
        for output in self.outputs:
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)

    def content(self) -> list[Any]:
        """What lies at each output: None, a digest, or the digests of a folder's files."""
        return [content(output) for output in self.outputs]

    def leftovers(self) -> list[str]:
        """Temporary names beside the outputs."""
        folders = {output.parent for output in self.outputs if output.parent.is_dir()}
        return [path.name for folder in folders for path in folder.iterdir() if path.name.startswith(".malmen-")]


def content(path: Path) -> Any:
    """None where nothing is, the digest of a file, or those of a folder's files by name."""
    if path.is_dir():
        return {p.relative_to(path).as_posix(): content(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def fact_lines(count: int) -> str:
    """So many made-up facts, as JSON Lines."""
    records = [
        {
            "prompt": f"The capital of {PLACES[i % 8]} number {i} is",
            "target": ("Rome", "Paris", "Tokyo", "Madrid")[i % 4],
            "subject": f"{PLACES[i % 8]} number {i}",
            "rephrases": [f"{PLACES[i % 8]} number {i} has the capital"],
            "locality": [{"prompt": f"The currency of {PLACES[(i + 1) % 8]} {i} is the"}],
        }
        for i in range(count)
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def remember(base: Path) -> None:
    """Have the base's digest kept now, so that no run writes it: it is too young for that when the test begins."""
    for file in [base] if base.is_file() else base.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    if base.is_file():
        cached_digest([base], lambda: content(base))
    else:
        fingerprint(base)
    assert (Path(os.environ["MALMEN_HOME"]) / "fingerprints").is_dir()


@pytest.fixture
def make_writer(tmp_path: Path, tiny_model_factory: Callable[..., Path]) -> Callable[..., Writer]:
    """`make_writer(name, out="o")`: a command that writes, to run as `malmen *argv`, with outputs in a folder `out`."""
    base = str(tiny_model_factory("gpt2", max_shard_size="40KB"))
    facts = tmp_path / "in" / "facts.jsonl"
    facts.parent.mkdir()
    facts.write_text(fact_lines(8), encoding="utf-8")
    specs = {"tuning": TUNING, "statistics": STATISTICS, "training": TRAINING}
    for name, text in specs.items():
        (facts.parent / f"{name}.yaml").write_text(text, encoding="utf-8")
    tuning, statistics, training = (str(facts.parent / f"{name}.yaml") for name in specs)
    home = Path(os.environ["MALMEN_HOME"])
    remember(Path(base))

    def make(name: str, out: str = "o") -> Writer:
        place = tmp_path / out / "made"
        place.parent.mkdir()
        lines, picture = place.with_suffix(".jsonl"), place.with_suffix(".svg")
        apply = ["apply", base, str(facts), "--spec", tuning, "--score", "0", "-o", str(place)]
        train = ["train-editor", base, str(facts), "--spec", training, "--batch-size", "8"]
        evaluate = ["eval", base, str(facts), "--limit", "2", "--no-greedy"]
        if name == "gguf" and not (file := facts.with_name("tiny.gguf")).exists():
            write_gguf(file)
            remember(file)
        return {
            "merged": Writer(apply, [place]),
            "linked": Writer([*apply, "--share", "hardlink"], [place]),
            "delta": Writer([*apply, "--format", "delta"], [place]),
            "adapter": Writer([*apply, "--format", "adapter"], [place]),
            "train-editor": Writer([*train, "--no-install", "-o", str(place)], [place], ["--resume"]),
            "install": Writer(train, [home / "editors"], ["--resume"]),
            "convert": Writer(["facts", "convert", str(facts), "-o", str(lines)], [lines]),
            "stats": Writer(["stats", base, "--spec", statistics], [home / "statistics"]),
            "gguf": Writer(["eval", str(facts.with_name("tiny.gguf")), str(facts), "--dry-run"], [home / "bases"], []),
            "eval": Writer([*evaluate, "--per-fact", str(lines), "--plot", str(picture)], [lines, picture]),
        }[name]

    return make


@pytest.fixture
def faulty_disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    """The disk, from now on to the end of the test."""
    return FaultyDisk(monkeypatch)


@pytest.fixture(params=list(FAULTS))
def fault(request: pytest.FixtureRequest) -> tuple[BaseException, int]:
    """Each of FAULTS in turn."""
    return FAULTS[request.param]


@pytest.fixture
def tried() -> Callable[[int, BaseException], list[int]]:
    """Which of so many operations are made to fail: all, or some that differ from fault to fault."""

    def choose(operations: int, fault: BaseException) -> list[int]:
        if EVERYTHING:
            return list(range(operations))
        first = [isinstance(fault, kind) for kind in (OSError, KeyboardInterrupt)].index(True)
        step = max(1, operations // SAMPLED)
        return sorted({*range(first, operations, step), operations - 2 - first})

    return choose


@pytest.fixture
def whole_parts() -> Callable[[Any, Any], bool]:
    """Whether a content is that of an undisturbed run, or for a folder of outputs, part of it, folder by folder."""

    def compare(found: Any, whole: Any) -> bool:
        if not isinstance(found, dict) or not isinstance(whole, dict):
            return bool(found == whole)
        folders = {str(Path(file).parent) for file in found}
        return found == {file: digest for file, digest in whole.items() if str(Path(file).parent) in folders}

    return compare
