"""Runs that start at the token to whose hidden state something is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.suffix import Suffix, Whole, way_to_run

FAMILIES = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
Load = Callable[..., Base]
SEQUENCES = [
    Encoded((3, 4, 5, 6, 7, 8, 9), 5, 2),
    Encoded((9, 8, 7), 2, 1),
    Encoded((4, 4, 6, 2, 1, 5), 3, 0),
    Encoded((11, 12, 13, 14, 15, 16, 17, 18, 19), 6, 5),
]


def by_hook(runner: Runner, block: int, sequence: Encoded, added: Tensor) -> Tensor:
    """The logits at the answer of one sequence alone, by a plain forward with a hook behind `block`."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, sequence.subject] += added
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = runner.blocks[block].register_forward_hook(hook)
    try:
        logits: Tensor = runner.model(torch.tensor([sequence.ids])).logits[0]
        return logits[list(sequence.positions)]
    finally:
        handle.remove()


def added_to(runner: Runner, count: int) -> Tensor:
    """One vector a sequence, as large as hidden states are."""
    width = runner.model.get_input_embeddings().embedding_dim
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [0, 2])
def test_logits_are_those_of_a_plain_forward_with_a_hook(load: Load, family: str, block: int) -> None:
    base = load(family, layers=4)
    runner = Runner(base, block)
    added = added_to(runner, len(SEQUENCES))
    for kind in {Whole, way_to_run(runner, block, 9)}:
        run = kind(runner, block, SEQUENCES)
        for rows in ([0, 1, 2, 3], [3, 1], [2]):
            wanted = torch.cat([by_hook(runner, block, SEQUENCES[row], added[row]) for row in rows])
            logits, batch = run.run(rows, added[rows])
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            assert batch.labels.tolist() == [token for row in rows for token in SEQUENCES[row].answer]
        plain = torch.cat([by_hook(runner, block, s, torch.zeros(1)) for s in SEQUENCES])
        torch.testing.assert_close(run.logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_at_the_subject(load: Load, family: str) -> None:
    """One that no longer did would cost two thirds more time, and nobody would notice."""
    assert way_to_run(Runner(load(family, layers=4), 1), 1, 9) is Suffix


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_states_and_gradients_are_those_of_whole_sequences(load: Load, family: str) -> None:
    runner = Runner(load(family, layers=4), 1)
    found = {}
    for kind in (Whole, Suffix):
        run = kind(runner, 1, SEQUENCES)
        added = added_to(runner, len(SEQUENCES)).requires_grad_(True)
        with torch.enable_grad():
            loss = run.run(range(4), added)[0].float().square().sum()
        found[kind] = run.states, torch.autograd.grad(loss, added)[0]
    for mine, theirs in zip(found[Suffix], found[Whole], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_tokens_from_the_subject_on_are_run_again(load: Load) -> None:
    runner = Runner(load("llama", layers=4), 1)
    run = way_to_run(runner, 1, 9)(runner, 1, SEQUENCES)
    seen: dict[int, list[tuple[int, ...]]] = {0: [], 1: [], 2: []}
    for index, shapes in seen.items():
        module = runner.model.model.layers[index].mlp.down_proj
        module.register_forward_hook(lambda _, args, __, shapes=shapes: shapes.append(tuple(args[0].shape[:2])))
    run.run([0, 3], torch.zeros(2, runner.model.config.hidden_size))
    # The longer one has nine tokens: five in front of the subject's last, and an end that predicts nothing.
    assert seen == {0: [], 1: [], 2: [(2, 4)]}


def test_behind_the_last_block_there_is_nothing_to_run_again(load: Load) -> None:
    runner = Runner(load("llama", layers=3), 2)
    assert way_to_run(runner, 2, 9) is Whole
    added = added_to(runner, 4)
    wanted = torch.cat([by_hook(runner, 2, s, row) for s, row in zip(SEQUENCES, added, strict=True)])
    torch.testing.assert_close(way_to_run(runner, 2, 9)(runner, 2, SEQUENCES).run(range(4), added)[0], wanted)


@pytest.mark.parametrize("fault", ["ignores what is in front", "takes no cache"])
def test_a_model_that_cannot_be_told_runs_whole_sequences(
    load: Load, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    runner = Runner(load("llama", layers=4), 1)
    true = runner.model.model.forward

    def forward(*args: Any, past_key_values: DynamicCache | None = None, **kwargs: Any) -> Any:
        if past_key_values is None:
            return true(*args, **kwargs)
        if fault == "takes no cache":
            raise TypeError("past_key_values")
        kwargs["attention_mask"] = kwargs["attention_mask"][..., -kwargs["attention_mask"].shape[-2] :]
        return true(*args, **kwargs)

    monkeypatch.setattr(runner.model.model, "forward", forward)
    assert way_to_run(runner, 1, 9) is Whole


def test_in_half_precision_too(load: Load) -> None:
    runner = Runner(load("llama", layers=4, dtype="bfloat16"), 1)
    assert way_to_run(runner, 1, 9) is Suffix


@pytest.mark.parametrize(("window", "wanted"), [(4, Whole), (64, Suffix)])
def test_a_window_that_the_sequences_are_longer_than_is_kept(load: Load, window: int, wanted: type) -> None:
    """The trial is as long as the longest of them."""
    runner = Runner(load("mistral", layers=4, sliding_window=window), 1)
    sequences = [Encoded(tuple(range(3, 43)), 38, 30), *SEQUENCES]
    kind = way_to_run(runner, 1, 40)
    assert kind is wanted
    added = added_to(runner, len(sequences))
    found = torch.cat([by_hook(runner, 1, s, row) for s, row in zip(sequences, added, strict=True)])
    torch.testing.assert_close(kind(runner, 1, sequences).run(range(5), added)[0], found, rtol=1e-4, atol=1e-4)


def test_positions_end_where_a_sequence_does(load: Load) -> None:
    """Not where the longest suffix beside it would: a model with a table of positions has none behind its last."""
    runner = Runner(load("gpt2", layers=4, n_positions=32), 1)
    sequences = [Encoded(tuple(range(3, 33)), 28, 26), Encoded(tuple(range(3, 23)), 18, 1)]
    added = added_to(runner, 2)
    logits, _ = Suffix(runner, 1, sequences).run([0, 1], added)
    wanted = torch.cat([by_hook(runner, 1, s, row) for s, row in zip(sequences, added, strict=True)])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_memory_that_runs_out_is_not_a_model_that_cannot(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(load("llama", layers=4), 1)

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Suffix, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        way_to_run(runner, 1, 9)


def test_only_the_blocks_behind_keep_keys_and_values_and_no_more_than_the_front(load: Load) -> None:
    runner = Runner(load("llama", layers=4), 1)
    run = Suffix(runner, 1, SEQUENCES)
    assert sorted(run._pairs) == [2, 3]
    for pair in run._pairs.values():
        for kept in pair:
            assert kept.shape[2] == 5  # in front of the latest subject
            assert kept.untyped_storage().nbytes() == kept.nbytes
