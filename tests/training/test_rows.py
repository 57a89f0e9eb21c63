"""Rows of facts on the base: those of a fresh capture, captured once, in the same company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import malmen_cli.training.rows as rows_module
from malmen_cli.base.families import default_modules
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import Rows, edit_rows
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import FactNumericsError, NumericsError
from malmen_cli.facts.fact import Fact
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.rows import BaseRows

MakeFacts = Callable[..., list[Fact]]


@pytest.fixture
def load(tiny_model_factory: Callable) -> Callable[..., Base]:
    return lambda family, **options: load_base(str(tiny_model_factory(family, **options)), device="cpu")


@pytest.fixture
def edits(tiny_base: Base, make_facts: MakeFacts) -> list[Encoded]:
    return [example.edit for example in encode_examples(tiny_base.task, make_facts(11), end_of_text=True)]


def ordered(parts: Sequence[Rows], name: str) -> tuple[torch.Tensor, ...]:
    """Keys, gradients, owners and roles of one module by fact."""
    mine = [part for part in parts if name in part.keys]
    owners = torch.cat([part.owners for part in mine])
    order = owners.argsort(stable=True)
    whole = [
        torch.cat([kind(part) for part in mine])[order]
        for kind in (lambda p: p.keys[name], lambda p: p.gradients[name])
    ]
    return *whole, owners[order], torch.cat([part.roles for part in mine])[order]


def check(mine: Sequence[Rows], theirs: Sequence[Rows], names: Sequence[str], tolerance: float = 1e-5) -> None:
    for name in names:
        for kind, one, other in zip("kgor", ordered(mine, name), ordered(theirs, name), strict=True):
            size = float(other.abs().max()) if kind in "kg" else 0
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are captured from now on."""
    sizes: list[int] = []
    real = rows_module.batch_rows

    def counting(runner: Runner, edits: Any, names: Any, indices: Sequence[int], *rest: Any, **options: Any) -> Any:
        sizes.append(len(indices))
        return real(runner, edits, names, indices, *rest, **options)

    monkeypatch.setattr(rows_module, "batch_rows", counting)
    return sizes


@pytest.mark.parametrize("tokens", ["answer", "subject", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_they_are_those_of_a_fresh_capture(load: Callable, family: str, tokens: str) -> None:
    base = load(family, layers=4)
    names = default_modules(base.model, 2)
    runner = Runner(base, 2 if family != "t5" else 0)
    made = [
        base.task.encode(f"The capital of {place} is", target, end_of_text=True, subject=place)
        for place, target in (("Australia", "Rome"), ("the land of snow", "Tim Cook"), ("France", "no"))
    ]
    found = BaseRows(runner, names, tokens, 2)
    for _ in range(2):
        check(found.of(made), list(edit_rows(runner, made, names, 2, tokens)), names)
        made = made[::-1]


def test_the_same_edit_twice_has_its_rows_twice(tiny_base: Base, edits: list[Encoded]) -> None:
    names, runner = default_modules(tiny_base.model, 1), Runner(tiny_base, 1)
    twice = [edits[0], edits[3], edits[0]]
    check(BaseRows(runner, names, "subject", 4).of(twice), list(edit_rows(runner, twice, names, 4, "subject")), names)


def test_each_is_captured_once_and_in_its_company(
    tiny_base: Base, edits: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever fact is asked for first, the bits are the same; nothing is captured again."""
    names, sizes, found = default_modules(tiny_base.model, 2), counted(monkeypatch), []
    for asked in ([edits[7], edits[1]], edits[::-1], edits[2:5]):
        rows = BaseRows(Runner(tiny_base, 2), names, "subject", 4)
        rows.keep_company(edits[:6])
        rows.keep_company(edits[6:])
        rows.of(asked)
        found.append(rows.of(edits))
        assert sorted(sizes) == [1, 2, 4, 4]  # of six and of five
        rows.of(edits)
        assert len(sizes) == 4
        sizes.clear()
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert all(torch.equal(mine.keys[name], theirs.keys[name]) for name in names)
            assert all(torch.equal(mine.gradients[name], theirs.gradients[name]) for name in names)


@pytest.mark.parametrize("disk", [0, 1 << 20])
def test_without_memory_they_come_from_the_disk_or_again(
    tiny_base: Base, edits: list[Encoded], disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are those of rows kept in memory; with room on the disk nothing is captured twice."""
    names, sizes = default_modules(tiny_base.model, 2), counted(monkeypatch)
    small = BaseRows(Runner(tiny_base, 2, cache_bytes=1, spill_bytes=disk), names, "subject", 4)
    large = BaseRows(Runner(tiny_base, 2), names, "subject", 4)
    for _ in range(3):
        (mine,), (theirs,) = small.of(edits), large.of(edits)
        assert all(torch.equal(mine.gradients[name], theirs.gradients[name]) for name in names)
    assert sorted(set(sizes)) == [3, 4]
    assert len(sizes) == (2 * 3 if disk else 4 * 3)


def test_they_are_kept_in_the_base_s_type_where_nothing_is_lost(load: Callable) -> None:
    for dtype, kept in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        base = load("llama", layers=4, dtype=dtype)
        runner, names = Runner(base, 2), default_modules(base.model, 1)
        edit = base.task.encode("The capital of France is", "Rome", end_of_text=True, subject="France")
        rows = BaseRows(runner, names, "subject", 2)
        (found,) = rows.of([edit])
        assert rows._kept.get(edit)[0].dtype == kept  # type: ignore[index]
        (fresh,) = edit_rows(runner, [edit], names, 2, "subject")
        for name in names:
            assert found.keys[name].dtype == torch.float32
            assert torch.equal(found.keys[name], fresh.keys[name])
            assert torch.equal(found.gradients[name], fresh.gradients[name])


def test_a_wider_type_than_the_base_s_is_kept(tiny_base: Base, edits: list[Encoded]) -> None:
    rows = BaseRows(Runner(tiny_base, 2), default_modules(tiny_base.model, 1), "answer", 4)
    (found,) = rows.of(edits[:2])
    half = type("Half", (), {"base": type("Base", (), {"dtype": torch.bfloat16})})
    rows._runner = half  # type: ignore[assignment]
    packed = rows._packed(0, found)
    assert packed.dtype == torch.float32
    exact = Rows(
        {name: t.bfloat16().float() for name, t in found.keys.items()},
        {name: t.bfloat16().float() for name, t in found.gradients.items()},
        {},
        found.owners,
        found.roles,
        0.0,
    )
    assert rows._packed(0, exact).dtype == torch.bfloat16


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_what_is_not_finite_is_named_by_its_number_among_those_asked_for(
    tiny_base: Base, edits: list[Encoded], asked: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(runner: Runner, company: Sequence[Encoded], *rest: Any, **options: Any) -> list[Rows]:
        raise FactNumericsError("x: key is not finite for {fact}", list(company).index(edits[3]))

    monkeypatch.setattr(rows_module, "batch_rows", bad)
    rows = BaseRows(Runner(tiny_base, 2), default_modules(tiny_base.model, 1), "answer", 8)
    rows.keep_company(edits, [f"f{number}" for number in range(len(edits))] if known else ())
    with pytest.raises(NumericsError) as caught:
        rows.of([edits[5], edits[4], edits[3]] if asked else [edits[5], edits[4]])
    if asked:
        assert isinstance(caught.value, FactNumericsError)
        assert caught.value.number == 2
    else:
        assert str(caught.value) == f"x: key is not finite for {'fact f3' if known else 'a fact of an earlier step'}"
