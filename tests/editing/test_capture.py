"""Keys and value gradients at the edited leaves: the same rows however facts are batched, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from malmen_cli.base.batch import make_batch
from malmen_cli.base.families import default_modules
from malmen_cli.base.memory import halving
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing import capture
from malmen_cli.editing.capture import (
    ANSWER,
    CONTEXT,
    PROMPT_END,
    ROLES,
    SUBJECT,
    Rows,
    all_keys,
    edit_rows,
    fact_loss,
    places,
    row_count,
    watching,
    weight_gradients,
)
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import MemoryLimitError, NumericsError

TOKENS = tuple(ROLES)
FAMILIES = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
CPU = torch.device("cpu")


def in_order(parts: Iterator[Rows]) -> Rows:
    """The rows of all batches in the order of the facts."""
    found = list(parts)
    owners = torch.cat([part.owners for part in found])
    order = owners.argsort(stable=True)

    def joined(kind: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(p, kind)[name] for p in found])[order] for name in found[0].keys}

    loss = sum(part.loss for part in found)
    roles = torch.cat([part.roles for part in found])[order]
    return Rows(joined("keys"), joined("gradients"), joined("values"), owners[order], roles, loss)


def close(mine: Rows, theirs: Rows, tolerance: float = 1e-5) -> None:
    assert torch.equal(mine.owners, theirs.owners)
    assert torch.equal(mine.roles, theirs.roles)
    assert mine.loss == pytest.approx(theirs.loss, rel=tolerance)
    for kind in ("keys", "gradients", "values"):
        for name, wanted in getattr(theirs, kind).items():
            scale = float(wanted.abs().max())
            torch.testing.assert_close(getattr(mine, kind)[name], wanted, rtol=tolerance, atol=tolerance * scale)


def alone(base: Base, fact: Encoded, name: str, rows: list[int]) -> tuple[Tensor, Tensor, float]:
    """Keys and value gradients at the positions `rows`, and loss, of one fact by plain autograd, without padding."""
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["key"], seen["value"] = args[0].reshape(-1, args[0].shape[-1]), output.detach().requires_grad_(True)
        return seen["value"]

    handle = base.model.get_submodule(name).register_forward_hook(hook)
    try:
        logits = base.model(torch.tensor([fact.ids])).logits[0, list(fact.positions)]
        loss = cross_entropy(logits, torch.tensor(fact.answer))
        loss.backward()
    finally:
        handle.remove()
    gradient = seen["value"].grad
    assert gradient is not None
    return seen["key"][rows].detach(), gradient.reshape(-1, gradient.shape[-1])[rows], float(loss.detach())


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def broken_weight(load: Callable) -> Iterator[Callable[[Base, str, float], None]]:
    """Puts a value into the first entry of a weight, and the old one back at the end."""
    undo: list[tuple[Tensor, Tensor]] = []

    def put(base: Base, name: str, value: float) -> None:
        weight = base.model.get_submodule(name).weight
        undo.append((weight, weight.detach().clone()))
        weight.data.view(-1)[0] = value

    yield put
    for weight, kept in undo:
        weight.data.copy_(kept)


# ---------------------------------------------------------------- places

IDS = tuple(range(10, 18))  # eight tokens, of which five are the prompt below


@pytest.mark.parametrize(
    ("subject", "tokens", "wanted"),
    [
        (2, "answer", [(4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (2, "subject", [(2, SUBJECT), (4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (2, "all", [(1, CONTEXT), (2, SUBJECT), (3, CONTEXT), (4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (None, "subject", [(4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (None, "all", [(1, CONTEXT), (2, CONTEXT), (3, CONTEXT), (4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (4, "subject", [(4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),  # the subject ends the prompt
        (4, "all", [(1, CONTEXT), (2, CONTEXT), (3, CONTEXT), (4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
        (0, "subject", [(4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),  # the attention sink
        (0, "all", [(1, CONTEXT), (2, CONTEXT), (3, CONTEXT), (4, PROMPT_END), (5, ANSWER), (6, ANSWER)]),
    ],
)
def test_places_and_their_roles(subject: int | None, tokens: str, wanted: list[tuple[int, int]]) -> None:
    edit = Encoded(IDS, 5, subject)
    assert places(edit, tokens) == wanted
    assert row_count([edit], tokens) == len(wanted)


@pytest.mark.parametrize("subject", [None, 0])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_prompt_of_one_token_gives_its_only_row(subject: int | None, tokens: str) -> None:
    assert places(Encoded((5, 6), 1, subject), tokens) == [(0, PROMPT_END)]
    assert places(Encoded((5, 6, 7), 1, subject), tokens) == [(0, PROMPT_END), (1, ANSWER)]


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_places_are_the_answer_s_and_more_and_never_the_sink(data: st.DataObject, n_prompt: int, answer: int) -> None:
    subject = data.draw(st.none() | st.integers(0, n_prompt - 1))
    edit = Encoded(tuple(range(n_prompt + answer)), n_prompt, subject)
    found = {tokens: places(edit, tokens) for tokens in TOKENS}
    assert [position for position, _ in found["answer"]] == list(edit.positions)
    assert set(found["answer"]) <= set(found["subject"])
    assert {p for p, _ in found["subject"]} <= {p for p, _ in found["all"]} <= set(range(len(edit.ids) - 1))
    for tokens, some in found.items():
        positions, roles = zip(*some, strict=True)
        assert list(positions) == sorted(set(positions))
        assert all(0 <= role < ROLES[tokens] for role in roles)
        assert roles.count(PROMPT_END) == 1
        assert roles.count(SUBJECT) == (tokens != "answer" and subject not in (None, 0, n_prompt - 1))
        assert (0 in positions) == (n_prompt == 1)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_are_each_fact_s_own_by_plain_autograd(load: Callable, facts: Callable, family: str, tokens: str) -> None:
    base = load(family)
    edits = facts(base.tokenizer, 5)
    names = default_modules(base.model, 2)
    rows = in_order(edit_rows(Runner(base), edits, names, 3, tokens))
    chosen = [places(fact, tokens) for fact in edits]
    assert rows.owners.tolist() == [i for i, some in enumerate(chosen) for _ in some]
    assert rows.roles.tolist() == [role for some in chosen for _, role in some]
    for name in names:
        parts = [alone(base, fact, name, [p for p, _ in some]) for fact, some in zip(edits, chosen, strict=True)]
        for mine, theirs in ((rows.keys, 0), (rows.gradients, 1)):
            wanted = torch.cat([part[theirs] for part in parts])
            torch.testing.assert_close(mine[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert rows.loss == pytest.approx(sum(part[2] for part in parts), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 100])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_do_not_depend_on_the_batch(
    load: Callable, facts: Callable, family: str, batch_size: int, tokens: str
) -> None:
    base = load(family)
    edits, names = facts(base.tokenizer, 9), default_modules(base.model, 2)
    mine, theirs = (in_order(edit_rows(Runner(base), edits, names, size, tokens)) for size in (batch_size, 4))
    close(mine, theirs)
    assert len(mine.owners) == row_count(edits, tokens)


@pytest.mark.parametrize("tokens", ["subject", "all"])
def test_more_tokens_leave_the_answers_rows_as_they_are(load: Callable, facts: Callable, tokens: str) -> None:
    base = load("llama")
    edits, names = facts(base.tokenizer, 6), default_modules(base.model, 2)
    more, fewer = (in_order(edit_rows(Runner(base), edits, names, 4, which)) for which in (tokens, "answer"))
    kept = more.roles < ROLES["answer"]
    assert not kept.all()
    assert torch.equal(more.owners[kept], fewer.owners)
    assert torch.equal(more.roles[kept], fewer.roles)
    assert more.loss == fewer.loss
    for kind in ("keys", "gradients", "values"):
        for name in names:
            assert torch.equal(getattr(more, kind)[name][kept], getattr(fewer, kind)[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", ["subject", "all"])
def test_the_last_block_s_mlp_gets_no_gradient_in_front_of_the_answer(
    load: Callable, facts: Callable, family: str, tokens: str
) -> None:
    """No later attention reads those tokens there; in every block before, one does."""
    base = load(family, layers=3)
    edits, names = facts(base.tokenizer, 5), default_modules(base.model, 3)
    rows = in_order(edit_rows(Runner(base), edits, names, 3, tokens))
    for role in range(ROLES[tokens]):
        assert bool((rows.roles == role).any())
        for name in names:
            sizes = rows.gradients[name][rows.roles == role].norm(dim=-1)
            assert bool((sizes == 0).all() if role in (SUBJECT, CONTEXT) and name == names[-1] else (sizes > 0).all())


def test_two_modules_of_one_block_get_their_own_gradients(load: Callable, facts: Callable) -> None:
    """The inner matrix's output already lies in the graph of no other: the outer one's must not cut it off."""
    base = load("gpt2")
    edits = facts(base.tokenizer, 3)
    names = [f"transformer.h.{i}.mlp.{leaf}" for i in (0, 1) for leaf in ("c_fc", "c_proj")]
    rows = in_order(edit_rows(Runner(base), edits, names, 8, "answer"))
    for name in names:
        wanted = torch.cat([alone(base, fact, name, list(fact.positions))[1] for fact in edits])
        torch.testing.assert_close(rows.gradients[name], wanted, rtol=1e-5, atol=1e-6)
        assert float(wanted.norm()) > 1e-3


def test_half_precision_rows_come_in_fp32(load: Callable, facts: Callable) -> None:
    base = load("gpt2", dtype="bfloat16")
    (rows,) = edit_rows(Runner(base), facts(base.tokenizer, 3), default_modules(base.model, 2), 8, "subject")
    for kind in (rows.keys, rows.gradients, rows.values):
        assert all(tensor.dtype == torch.float32 for tensor in kind.values())


def test_no_weight_gradient_is_left_behind(load: Callable, facts: Callable) -> None:
    base = load("llama")
    list(edit_rows(Runner(base), facts(base.tokenizer, 3), default_modules(base.model, 2), 8, "subject"))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())


def test_capturing_works_inside_no_grad(load: Callable, facts: Callable) -> None:
    base = load("llama")
    edits, names = facts(base.tokenizer, 3), default_modules(base.model, 2)
    with torch.no_grad():
        inside = in_order(edit_rows(Runner(base), edits, names, 8, "subject"))
    close(inside, in_order(edit_rows(Runner(base), edits, names, 8, "subject")))


@pytest.mark.parametrize("batch", [[0], [0, 1], [0, 1, 2, 3], [3, 0]])
def test_a_fact_s_loss_is_the_mean_over_its_own_tokens(batch: list[int]) -> None:
    sequences = [Encoded((1, 2, 3), 2), Encoded((1, 2, 3, 4, 5), 1), Encoded((1, 2), 1), Encoded((4, 3, 2, 1), 1)]
    logits = {
        i: torch.randn(len(s.positions), 6, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(sequences)
    }
    each = {i: float(cross_entropy(logits[i], torch.tensor(s.answer))) for i, s in enumerate(sequences)}
    made = make_batch([sequences[i] for i in batch], CPU)
    found = fact_loss(torch.cat([logits[i] for i in batch]), made)
    assert float(found) == pytest.approx(sum(each[i] for i in batch), rel=1e-6)


# ---------------------------------------------------------------- keys of every token


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("block", [0, 1])  # of two
def test_every_real_token_gives_a_key_and_padding_none(
    load: Callable, facts: Callable, family: str, block: int, batch_size: int
) -> None:
    base = load(family)
    sequences = [*facts(base.tokenizer, 6), Encoded((20, 21, 22), 3)]  # the last: a prompt without answer
    name, last = default_modules(base.model, 2)[block], default_modules(base.model, 1)[0]
    runner, run = Runner(base), []
    handle = base.model.get_submodule(last).register_forward_hook(lambda *_: run.append(last))
    try:
        found = torch.cat([keys[name] for keys in all_keys(runner, sequences, [name], batch_size)])
    finally:
        handle.remove()
    assert bool(run) == (name == last)  # blocks behind are left out
    assert len(found) == sum(len(sequence.ids) for sequence in sequences)
    wanted = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        with torch.no_grad(), watching(base.model, [name], gradients=False) as (inputs, _):
            base.model(torch.tensor([sequence.ids]))
        wanted.append(inputs[name].reshape(-1, inputs[name].shape[-1]))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5 * float(found.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_left_and_right_padding_give_the_same_keys(
    load: Callable, facts: Callable, family: str, batch_size: int
) -> None:
    base = load(family)
    edits, (name,) = facts(base.tokenizer, 8), default_modules(base.model, 1)
    found = {}
    for side in ("left", "right"):
        parts = []
        for start in range(0, 8, batch_size):
            batch = make_batch(edits[start : start + batch_size], CPU, side=side)
            with torch.no_grad(), watching(base.model, [name], gradients=False) as (inputs, _):
                Runner(base).full_logits(batch)
            parts.append(inputs[name].reshape(*batch.ids.shape, -1)[batch.rows, batch.columns])
        found[side] = torch.cat(parts)
    torch.testing.assert_close(found["left"], found["right"], rtol=1e-5, atol=1e-5 * float(found["right"].abs().max()))


# ---------------------------------------------------------------- gradients by the weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1])
def test_weight_gradients_are_autograd_s(load: Callable, facts: Callable, family: str, first: int) -> None:
    base = load(family)
    edits, names = facts(base.tokenizer, 5), default_modules(base.model, 2 - first)
    loss, found = weight_gradients(Runner(base, first), edits, names, fact_loss)
    weights = [base.model.get_submodule(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        logits, batch = Runner(base).logits(edits)
        wanted_loss = fact_loss(logits, batch)
        gradients = torch.autograd.grad(wanted_loss, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    assert loss == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        wanted = gradient.T if isinstance(base.model.get_submodule(name), nn.Linear) else gradient
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weight_gradients_in_halves_are_summed_in_fp32(load: Callable, facts: Callable, dtype: str) -> None:
    """Against the sum in fp64 of the very keys and gradients: bfloat16 is rounded once, float16, which has no room for
    such small numbers, not at all."""
    base = load("llama", dtype=dtype)
    edits, names = facts(base.tokenizer, 5), default_modules(base.model, 2)
    runner = Runner(base)
    small = lambda logits, batch: fact_loss(logits, batch) * 1e-2  # noqa: E731
    with torch.enable_grad(), watching(base.model, names, gradients=True) as (inputs, outputs):
        loss = small(*runner.logits(edits))
        pulls = torch.autograd.grad(loss, [outputs[name] for name in names])
    _, found = weight_gradients(runner, edits, names, small)
    for name, pull in zip(names, pulls, strict=True):
        keys, pull = (tensor.flatten(0, -2).double() for tensor in (inputs[name], pull))
        wanted, tolerance = keys.mT @ pull, 2**-8 if dtype == "bfloat16" else 1e-5
        apart = (found[name].double() - wanted).norm() / wanted.norm()
        assert found[name].dtype == torch.float32
        assert float(apart) <= tolerance


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_names_module_and_fact(
    load: Callable, facts: Callable, broken_weight: Callable, family: str, value: float
) -> None:
    base = load(family)
    names = default_modules(base.model, 2)
    broken_weight(base, names[0], value)
    with pytest.raises(
        NumericsError, match=r"^(transformer|model)\.\S+: (key|value gradient) is not finite for fact \d"
    ):
        list(edit_rows(Runner(base), facts(base.tokenizer, 3), names, 2, "subject"))
    assert hook_count(base.model) == 0


def test_the_fact_to_blame_is_named_by_its_place_in_the_sequence(load: Callable, broken_weight: Callable) -> None:
    base = load("llama")
    edits = [Encoded((20, 21, 22, 23, 24), 3), Encoded((30, 31, 32), 2), Encoded((20, 21, 25), 2)]
    weight = base.model.get_input_embeddings().weight
    kept = weight[31].clone()
    try:
        weight.data[31] = float("nan")
        with pytest.raises(NumericsError, match=r"^model.layers.0.mlp.down_proj: key is not finite for fact 1 "):
            list(edit_rows(Runner(base), edits, default_modules(base.model, 2), 8, "subject"))
    finally:
        weight.data[31] = kept


@pytest.mark.parametrize("batch_size", [5, 9])
@pytest.mark.parametrize("fits", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved(
    load: Callable, facts: Callable, monkeypatch: pytest.MonkeyPatch, batch_size: int, fits: int
) -> None:
    base = load("gpt2")
    edits, names = facts(base.tokenizer, 9), default_modules(base.model, 2)
    wanted = in_order(edit_rows(Runner(base), edits, names, batch_size, "subject"))
    runner, sizes = Runner(base), []
    plain = runner.logits

    def small(sequences: list[Encoded], **options: Any) -> Any:
        sizes.append(len(sequences))
        if len(sequences) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return plain(sequences, **options)

    monkeypatch.setattr(runner, "logits", small)
    close(in_order(edit_rows(runner, edits, names, batch_size, "subject")), wanted)
    assert max(sizes) == batch_size
    assert hook_count(base.model) == 0


def test_one_fact_that_does_not_fit_says_what_was_needed(load: Callable, facts: Callable, monkeypatch) -> None:
    base = load("gpt2")
    runner = Runner(base)

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(runner, "logits", full)
    with pytest.raises(MemoryLimitError, match=r"^out of memory on a single prompt .*Tried to allocate 2.00 GiB"):
        list(edit_rows(runner, facts(base.tokenizer, 4), default_modules(base.model, 2), 4, "subject"))
    assert hook_count(base.model) == 0


def test_halving_runs_every_index_once_in_order() -> None:
    ran = []

    def run(indices: list[int]) -> Any:
        if len(indices) > 2 or 5 in indices[1:]:
            raise torch.OutOfMemoryError("full")
        ran.append(indices)
        return indices

    assert list(halving([9, 8, 7, 6, 5, 4, 3], run)) == ran
    assert [i for part in ran for i in part] == [9, 8, 7, 6, 5, 4, 3]
    with pytest.raises(ValueError, match="another"):  # other errors are not memory
        list(halving([1, 2], lambda indices: (_ for _ in ()).throw(ValueError("another"))))


def test_hooks_go_when_the_body_raises(load: Callable) -> None:
    base = load("llama")
    names = default_modules(base.model, 2)
    with pytest.raises(IndexError), watching(base.model, names, gradients=True):
        [][hook_count(base.model)]
    assert hook_count(base.model) == 0


def test_a_loss_that_raises_leaves_no_hook(load: Callable, facts: Callable) -> None:
    base = load("llama")
    with pytest.raises(ZeroDivisionError):
        weight_gradients(Runner(base), facts(base.tokenizer, 2), default_modules(base.model, 2), lambda *_: 1 / 0)
    assert hook_count(base.model) == 0


def test_an_abandoned_capture_leaves_no_hook(load: Callable, facts: Callable) -> None:
    base = load("llama")
    parts = capture.edit_rows(Runner(base), facts(base.tokenizer, 6), default_modules(base.model, 2), 2, "subject")
    next(parts)
    assert hook_count(base.model) == 0
