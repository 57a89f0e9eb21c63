"""T24 for what malmen may forget: digests of large files, and a `.gguf` file's conversion, which is made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.base.cache import cache_home, cached_digest
from malmen_cli.base.model import load_base
from malmen_cli.cli.errors import main
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.facts.fact import Fact
from malmen_cli.insertion import memit_shift, prepare

DIGEST = "5" * 64


def kept() -> dict[str, str]:
    """What lies among the digests."""
    folder = cache_home() / "fingerprints"
    return {file.name: file.read_text() for file in folder.iterdir()} if folder.is_dir() else {}


def test_a_failing_disk_costs_a_digest_its_place_and_nothing_else(
    fault: tuple[BaseException, int], faulty_disk: Any, tmp_path: Path
) -> None:
    """Whatever operation fails, the answer is right, and what is kept is that answer or nothing."""
    (file := tmp_path / "weights").write_bytes(b"w")
    os.utime(file, (1_600_000_000, 1_600_000_000))
    error, _ = fault
    with faulty_disk.failing(None):
        assert cached_digest([file], lambda: DIGEST) == DIGEST
    (name,) = kept()
    assert faulty_disk.asked == ["create", "write", "sync", "rename", "sync"]
    for k in range(5):
        (cache_home() / "fingerprints" / name).unlink()
        with faulty_disk.failing(k, error):
            try:
                assert cached_digest([file], lambda: DIGEST) == DIGEST
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
        assert kept() in ({}, {name: DIGEST})
        assert cached_digest([file], lambda: DIGEST) == DIGEST
        assert kept() == {name: DIGEST}


def test_a_failing_disk_costs_targets_their_place_and_nothing_else(
    fault: tuple[BaseException, int], faulty_disk: Any, tiny_gpt2: Path, tried: Callable[..., list[int]]
) -> None:
    """Whatever operation fails, the shift has the same bits, and what is kept is every chunk whole or not at all."""
    base, (error, _) = load_base(str(tiny_gpt2)), fault
    facts = [Fact(place, f"The capital of {place} is", "Rome", subject=place) for place in ("Peru", "Chile", "Spain")]
    settings = MemitSettings(blocks=(0,), steps=1, prefixes=0, stats_tokens=40)
    ready = prepare(base, "memit", settings, facts, stats_from=None, seed=0, batch_size=4)
    folder = cache_home() / "targets" / base.fingerprint

    def edited() -> list[bytes]:
        shift = memit_shift(base, ready, facts, batch_size=2)
        return [module.matrix().numpy().tobytes() for module in shift.modules.values()]

    def chunks() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    with faulty_disk.failing(None):
        wanted = edited()
    operations, whole = len(faulty_disk.asked), chunks()
    assert len(whole) == 4  # two chunks of two facts at most, two files each
    for k in tried(operations, error):
        shutil.rmtree(folder)
        with faulty_disk.failing(k, error):
            try:
                assert edited() == wanted
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
        left = chunks()
        assert left.items() <= whole.items()
        assert len(left) % 2 == 0
        assert edited() == wanted
        assert chunks() == whole


def test_a_digest_that_a_killed_run_was_writing_is_cleaned(tmp_path: Path) -> None:
    (file := tmp_path / "weights").write_bytes(b"w")
    os.utime(file, (1_600_000_000, 1_600_000_000))
    cached_digest([file], lambda: DIGEST)
    (name,) = kept()
    entry = cache_home() / "fingerprints" / name
    entry.rename(entry.with_name(f".malmen-{name}-0123abcd"))
    assert cached_digest([file], lambda: DIGEST) == DIGEST
    assert kept() == {name: DIGEST}


def test_a_failing_disk_leaves_no_conversion_or_the_whole(
    fault: tuple[BaseException, int],
    make_writer: Callable[..., Any],
    faulty_disk: Any,
    tried: Callable[[int, BaseException], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and exit 4, or 130; then the conversion is made, or was made already, and is the same."""
    writer, (error, code) = make_writer("gguf"), fault
    with faulty_disk.failing(None):
        assert main([*writer.argv, "-q"]) == 0
    (whole,), operations = writer.content(), faulty_disk.asked.copy()
    assert operations[-2:] == ["rename", "sync"]
    assert len(operations) >= 6
    converted = [file for file in whole if not file.startswith(".malmen-")]
    assert any(file.endswith("model.safetensors") for file in converted)
    ks = tried(len(operations), error)
    for k in ks:
        writer.remove()
        with faulty_disk.failing(k, error):
            assert main([*writer.argv, "-q"]) == (code if code == 130 else 4), k
        assert len(capsys.readouterr().err.splitlines()) == 1
        found = {file for file in writer.content()[0] or {} if not file.endswith(".lock")}
        assert found in (set(), set(converted)), k
        assert main([*writer.argv, "-q"]) == 0
        assert writer.content() == [whole]
    print(f"gguf, {error!r}: {len(ks)} of {len(operations)} operations fail")
