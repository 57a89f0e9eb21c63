"""Text sampled from the base: the same as without a cache, the same for the same seed, from the base's distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from malmen_cli.base.model import Base, load_base
from malmen_cli.base.sampling import TOKENS, WINDOW, WINDOWS_AT_ONCE, random_starts, sampled_texts, sampled_windows
from malmen_cli.exceptions import NumericsError

FAMILIES = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")


@pytest.fixture(scope="module")
def base(tiny_gpt2: Path) -> Base:
    return load_base(str(tiny_gpt2), device="cpu")


def written_without_cache(base: Base, starts: list[tuple[int, ...]], length: int, generator: torch.Generator) -> list:
    """Every token from a full forward over all before it."""
    texts = torch.tensor([start.ids for start in starts])
    with torch.no_grad():
        while texts.shape[1] < length:
            odds = base.model(texts, use_cache=False).logits[:, -1].softmax(-1)
            texts = torch.cat([texts, torch.multinomial(odds, 1, generator=generator)], 1)
    return [tuple(text) for text in texts.tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_sampling_is_uncached_sampling(tiny_model_factory: Callable[..., Path], family: str) -> None:
    """Token for token: in fp32 the two differ by rounding alone, far less than what decides a draw."""
    base = load_base(str(tiny_model_factory(family)), device="cpu")
    for seed, count, tokens in ((0, 32, TOKENS), (3, 5, 40), (1, WINDOWS_AT_ONCE + 3, 2)):
        generator = torch.Generator().manual_seed(seed)
        starts = random_starts(base, count, generator)
        expected = written_without_cache(base, starts, len(starts[0].ids) + tokens, generator)
        assert [text.ids for text in sampled_texts(base, count, tokens, seed=seed)] == expected


def test_windows_too_are_those_of_uncached_sampling(base: Base) -> None:
    """A batch of them after the other, from one generator."""
    count, generator = WINDOWS_AT_ONCE + 2, torch.Generator().manual_seed(0)
    starts = random_starts(base, count, generator)
    expected = [
        text
        for part in (starts[:WINDOWS_AT_ONCE], starts[WINDOWS_AT_ONCE:])
        for text in written_without_cache(base, part, WINDOW, generator)
    ]
    assert sampled_windows(base, count * WINDOW) == expected


def test_the_cache_is_used(base: Base) -> None:
    """After the start, a forward sees one token of each text."""
    seen: list[tuple[int, ...]] = []
    embeddings = base.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        sampled_texts(base, 3, 4)
    finally:
        handle.remove()
    assert seen == [(3, 2), (3, 1), (3, 1), (3, 1)]


def test_texts(base: Base) -> None:
    texts = sampled_texts(base, 5, seed=1)
    assert [len(text.ids) for text in texts] == [2 + TOKENS] * 5
    assert all(text.ids[0] == base.tokenizer.bos_token_id for text in texts)
    assert all(text.ids[1] not in base.tokenizer.all_special_ids for text in texts)
    assert all(text.n_prompt == (2 + TOKENS) // 2 for text in texts)
    state = torch.get_rng_state()
    assert sampled_texts(base, 5, seed=1) == texts
    assert sampled_texts(base, 5, seed=2) != texts
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_of_a_tokenizer_without_a_beginning(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.tokenizer._special_tokens_map, "bos_token", None)
    assert base.tokenizer.bos_token_id is None
    assert [len(text.ids) for text in sampled_texts(base, 2, 3)] == [4, 4]


def test_a_base_that_is_not_finite_is_refused(tiny_gpt2: Path) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")
    base.model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(NumericsError, match="logits are not finite"):
        sampled_texts(base, 2, 3)


@pytest.mark.parametrize("tokens", [1, 2, 50, WINDOW * 2 + 5])
def test_windows_hold_as_many_tokens_as_asked_for(base: Base, tokens: int) -> None:
    found = sampled_windows(base, tokens)
    assert sum(map(len, found)) == tokens
    assert {len(ids) for ids in found[:-1]} <= {WINDOW}
    assert found == sampled_windows(base, tokens)
    assert all(0 <= token < 512 for ids in found for token in ids)


def test_windows_are_drawn_from_the_base_s_distribution(base: Base) -> None:
    """Mean log-probability of the drawn tokens under the plain forward: minus the entropy, up to sampling noise."""
    drawn, entropy = [], []
    with torch.no_grad():
        for ids in sampled_windows(base, 40 * WINDOW):
            logp = base.model(torch.tensor([ids])).logits[0, 1:-1].double().log_softmax(-1)
            drawn.append(logp.gather(-1, torch.tensor(ids[2:])[:, None])[:, 0])
            entropy.append(-(logp.exp() * logp).sum(-1))
    gap = torch.cat(drawn) + torch.cat(entropy)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5
