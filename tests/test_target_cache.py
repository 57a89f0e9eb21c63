"""Targets are kept as they are found: a run that was killed goes on behind them, and no bit of the result changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import malmen_cli.editing.targets as targets_module
import malmen_cli.insertion as insertion
from malmen_cli.artifact.manifest import read_sealed
from malmen_cli.artifact.targets import load_targets, save_targets, targets_folder
from malmen_cli.base.locate import cache_home
from malmen_cli.base.model import Base, load_base
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.shift import Shift
from malmen_cli.editing.suffix import Suffix, Whole
from malmen_cli.editing.targets import Targets, find_targets
from malmen_cli.facts.fact import Fact
from malmen_cli.insertion import Insertion, memit_shift, prepare

SETTINGS = MemitSettings(blocks=(0,), steps=3, lr=0.1, prefixes=0, stats_tokens=60, stop_loss=0.0)
BATCH = 4  # facts, of one context each


@pytest.fixture(scope="module")
def base(tiny_gpt2: Path) -> Base:
    return load_base(str(tiny_gpt2))


@pytest.fixture
def facts() -> list[Fact]:
    cities = ["Rome", "Oslo", "Lima", "Cairo", "Delhi", "Seoul", "Quito", "Accra", "Riga", "Bern"]
    lands = ["Australia", "Japan", "Chile", "Canada", "Norway", "Kenya", "India", "Peru", "Spain", "Egypt"]
    told = enumerate(zip(lands, cities, strict=True))
    return [Fact(f"number-{i}", f"The capital of {land} is", city, subject=land) for i, (land, city) in told]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many facts every chunk had whose targets were looked for."""
    sizes: list[int] = []
    search = targets_module._chunk

    def counted(runner: Any, block: int, facts: Any, *others: Any) -> Targets:
        sizes.append(len(facts))
        return search(runner, block, facts, *others)

    monkeypatch.setattr(targets_module, "_chunk", counted)
    return sizes


def ready_of(base: Base, settings: MemitSettings = SETTINGS) -> Insertion:
    return prepare(base, "memit", settings, stats_from=None, seed=0, batch_size=BATCH)


def shift_of(base: Base, facts: list[Fact], settings: MemitSettings = SETTINGS, **others: Any) -> Shift:
    return memit_shift(base, ready_of(base, settings), facts, batch_size=BATCH, **others)


def same(one: Shift, other: Shift) -> bool:
    return all(torch.equal(one.modules[name].matrix(), other.modules[name].matrix()) for name in one.modules)


def test_what_was_found_is_not_looked_for_again(base: Base, facts: list[Fact], searched: list[int]) -> None:
    notes: list[str] = []
    first = shift_of(base, facts, note=notes.append)
    assert sorted(searched) == [3, 3, 4]
    assert "earlier" not in notes[-1]
    assert same(shift_of(base, facts, note=notes.append), first)
    assert notes[-1].endswith(", 10 found by an earlier run")
    another = shift_of(base, facts, replace(SETTINGS, moment_weight=1.0))
    shift_of(base, facts, replace(SETTINGS, constraint="null_space", null_threshold=1e9))
    assert sum(searched) == 10
    assert not same(another, first)


@pytest.mark.parametrize(
    "change",
    [{"steps": 4}, {"lr": 0.2}, {"clamp": 0.1}, {"kl_factor": 0.5}, {"decay": 0.1}, {"stop_loss": 9.0},
     {"prefixes": 1}, {"end_of_text": False}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_a_target_depends_on_is_part_of_its_name(
    base: Base, facts: list[Fact], searched: list[int], change: dict[str, Any]
) -> None:
    shift_of(base, facts[:4])
    shift_of(base, facts[:4], replace(SETTINGS, **change))
    assert sum(searched) == 8


def test_so_are_the_facts_the_base_its_type_and_the_versions(
    base: Base, facts: list[Fact], tiny_gpt2: Path, searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shift_of(base, facts[:4])
    shift_of(base, [*facts[:3], replace(facts[3], target="something else")])
    shift_of(load_base(str(tiny_gpt2), dtype="bfloat16"), facts[:4])
    other, configured = load_base(str(tiny_gpt2)), load_base(str(tiny_gpt2))
    object.__setattr__(other, "fingerprint", "0" * 64)
    shift_of(other, facts[:4])
    configured.model.config.layer_norm_epsilon = 0.1
    shift_of(configured, facts[:4])
    for module in (insertion, torch, insertion.transformers):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            shift_of(base, facts[:4])
    assert searched == [4] * 8


def test_what_is_kept_says_what_it_is_for_and_not_a_word_of_the_facts(base: Base, facts: list[Fact]) -> None:
    shift_of(base, facts[:4])
    (folder,) = (cache_home() / "targets" / base.fingerprint).iterdir()
    source = read_sealed(folder / "targets.json")["source"]
    where = {"block", "dtype", "device", "config", "search", "malmen", "torch", "transformers", "facts"}
    assert set(source) == where | set(insertion.TARGET_SETTINGS)
    assert (source["block"], source["device"]) == (0, "cpu")
    assert all(len(source[name]) == 64 for name in ("facts", "config"))
    said = (folder / "targets.json").read_bytes() + (folder / "targets.safetensors").read_bytes()
    assert not any(text.encode() in said for fact in facts[:4] for text in (fact.prompt, fact.target, fact.id))


def test_another_block_has_targets_of_its_own(tiny_model_factory: Callable[..., Path], facts: list[Fact]) -> None:
    base = load_base(str(tiny_model_factory("gpt2", layers=3)))
    fresh = {block: shift_of(base, facts[:4], replace(SETTINGS, blocks=(block,))) for block in (1, 0)}
    shutil.rmtree(cache_home() / "targets")
    for block in (0, 1):
        assert same(shift_of(base, facts[:4], replace(SETTINGS, blocks=(block,))), fresh[block])


@pytest.mark.parametrize("kind", [Suffix, Whole])
def test_facts_of_one_subject_do_not_take_over_each_other_s_rounding(
    tiny_model_factory: Callable[..., Path], facts: list[Fact], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share "X is a". Its first blocks run in the batch of every chunk anew, so that a chunk whose targets are
    there already, as in a run that goes on, changes no bit of another's."""
    base = load_base(str(tiny_model_factory("gpt2", layers=3)))
    settings = replace(SETTINGS, blocks=(1,))
    alike = [replace(fact, subject="Peru", prompt=f"In {fact.subject}, Peru is") for fact in facts]
    batches: list[set[Any]] = []
    run = Runner.forward

    def counted(runner: Runner, batch: Any, active: Any, *others: Any, **options: Any) -> Any:
        if 0 in active:
            rows = zip(batch.ids.tolist(), batch.mask.sum(-1).tolist(), strict=True)
            batches.append({tuple(ids[:length]) for ids, length in rows})
        return run(runner, batch, active, *others, **options)

    front = Runner(base, 1)
    wordings = insertion.encode_wordings(base, alike, settings)
    monkeypatch.setattr(targets_module, "way_to_run", lambda runner, block, longest: kind)
    monkeypatch.setattr(Runner, "forward", counted)
    find_targets(front, 1, wordings, settings, batch_size=BATCH)
    assert [wordings[0].essence.ids[:-1] in batch for batch in batches] == [True] * 3
    assert sorted(map(len, batches)) == [4, 4, 5]  # the edits of three or four facts, and what they share


def test_a_run_that_was_killed_goes_on(base: Base, facts: list[Fact], searched: list[int]) -> None:
    done: list[int] = []

    def killed(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shift_of(base, facts, progress=killed)
    assert len(searched) == 2
    resumed = shift_of(base, facts)
    assert len(searched) == 3
    for folder in (cache_home() / "targets").glob("*/*"):
        for file in folder.iterdir():
            file.unlink()
    assert same(shift_of(base, facts), resumed)
    assert len(searched) == 6


@pytest.mark.parametrize("damage", ["tensors", "cut", "missing", "shape", "type", "not finite", "other source"])
def test_what_is_damaged_is_looked_for_again(damage: str, searched: list[int], base: Base, facts: list[Fact]) -> None:
    wanted = shift_of(base, facts[:4])
    (folder,) = (cache_home() / "targets" / base.fingerprint).iterdir()
    file = folder / "targets.safetensors"
    source = read_sealed(folder / "targets.json")["source"]
    assert folder == targets_folder(base.fingerprint, source)
    found = load_targets(base.fingerprint, source, 4, 32)
    assert found is not None
    if damage == "tensors":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing":
        file.unlink()
    elif damage == "other source":
        other = save_targets(base.fingerprint, source | {"block": 7}, found)
        for name in ("targets.safetensors", "targets.json"):
            (folder / name).write_bytes((other / name).read_bytes())
    else:
        states = {
            "shape": found.states[:2],
            "type": found.states.double(),
            "not finite": torch.full_like(found.states, torch.nan),
        }[damage]
        save_targets(base.fingerprint, source, replace(found, states=states))
    assert load_targets(base.fingerprint, source, 4, 32) is None
    assert same(shift_of(base, facts[:4]), wanted)
    assert searched == [4, 4]


def test_one_that_cannot_be_read_is_looked_for_again(
    base: Base, facts: list[Fact], searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, read = shift_of(base, facts[:4]), Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "targets.json":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert same(shift_of(base, facts[:4]), wanted)
    assert searched == [4, 4]


def test_a_cache_that_cannot_be_written_costs_time_alone(base: Base, facts: list[Fact]) -> None:
    wanted = shift_of(base, facts)
    place = cache_home() / "targets"
    place.rename(place.with_name("elsewhere"))
    place.write_text("in the way")
    notes: list[str] = []
    assert same(shift_of(base, facts, note=notes.append), wanted)
    assert "they could not be kept" in notes[-1]
