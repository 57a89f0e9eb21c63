"""Replaying from the first edited block on: the full forward's logits and gradients, in every family."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import malmen_cli.editing.replay as replay_module
from malmen_cli.base.batch import Batch, make_batch
from malmen_cli.base.families import default_modules, second_matrix, stacks
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.spill import Spill
from malmen_cli.editing.blocks import SHORT
from malmen_cli.editing.capture import edit_rows, watching
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.states import States

FAMILIES = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
CPU = torch.device("cpu")
SEQUENCES = [Encoded(tuple(range(20, 20 + n)), n - a) for n, a in ((9, 2), (4, 1), (12, 5), (2, 1), (7, 3))]


def plain_logits(model: Any, sequence: Encoded) -> Tensor:
    """One sequence alone, without padding, mask, positions or any hook of ours."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence.ids])).logits[0]
    return logits[list(sequence.positions)]


def count_runs(module: nn.Module) -> list[int]:
    """The batch size of every forward that this leaf computes from now on."""
    sizes: list[int] = []
    module.register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[0]))
    return sizes


def runner_leaf(runner: Runner, index: int) -> str:
    """The name of the second MLP matrix of a block."""
    (stack,) = stacks(runner.model)
    return second_matrix(runner.model, stack, index)


def block_leaf(runner: Runner, index: int) -> nn.Module:
    """The second MLP matrix of a block."""
    return runner.model.get_submodule(runner_leaf(runner, index))


def gemma2(layers: int = 4, cap: float = 0.7) -> Base:
    """A model whose logits are capped, far below the logits' size."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=100,
            num_hidden_layers=layers,
            head_dim=8,
            final_logit_softcapping=cap,
            initializer_range=0.5,
            sliding_window=4,
            **sizes,
        )
        model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    return Base("gemma2", None, None, "0" * 64, model, None)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_pads_and_points_at_answers(side: str) -> None:
    pair = [Encoded((5, 6, 7), 1), Encoded((8, 9), 1)]
    batch = make_batch(pair, CPU, side=side, pad_id=3)
    wanted = [[5, 6], [8, 3]] if side == "right" else [[5, 6], [3, 8]]  # an answer's last token predicts nothing
    assert batch.ids.tolist() == wanted
    assert batch.mask.tolist() == [[1, 1], [int(token != 3) for token in wanted[1]]]
    assert batch.rows.tolist() == batch.owners.tolist() == [0, 0, 1]
    assert batch.columns.tolist() == [0, 1, 0 if side == "right" else 1]
    assert batch.labels.tolist() == [6, 7, 9]
    whole = make_batch(pair, CPU, side=side, pad_id=3, whole=True)
    assert whole.ids.tolist() == ([[5, 6, 7], [8, 9, 3]] if side == "right" else [[5, 6, 7], [3, 8, 9]])
    assert whole.labels.tolist() == batch.labels.tolist()


def test_sequences_without_answers_have_no_positions() -> None:
    batch = make_batch([Encoded((5, 6), 2)], CPU)
    assert batch.rows.shape == batch.columns.shape == batch.labels.shape == (0,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_and_company_do_not_change_answers(load: Callable, family: str, side: str) -> None:
    runner = Runner(load(family))
    sequences = (SEQUENCES * 2)[:8]
    with torch.no_grad():
        together = runner.full_logits(make_batch(sequences, CPU, side=side, pad_id=1))
    alone = torch.cat([plain_logits(runner.model, sequence) for sequence in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_gives_the_full_forward_s_logits(load: Callable, family: str) -> None:
    base = load(family, layers=4)
    runner = Runner(base, 2)
    assert runner.replaying
    for sequences in (SEQUENCES, SEQUENCES[1:4], SEQUENCES[::-1]):  # the second and third time from kept states
        with torch.no_grad():
            logits, batch = runner.logits(sequences)
        wanted = torch.cat([plain_logits(base.model, sequence) for sequence in sequences])
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert batch.labels.tolist() == [token for sequence in sequences for token in sequence.answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_gives_the_full_forward_s_keys_and_gradients(load: Callable, family: str) -> None:
    base = load(family, layers=4)
    names = default_modules(base.model, 2)
    (full,) = edit_rows(Runner(base), SEQUENCES, names, 8, "all")
    runner = Runner(base, 2)
    assert runner.replaying
    for keep in (True, True, False):
        (replayed,) = edit_rows(runner, SEQUENCES, names, 8, "all", keep=keep)
        assert torch.equal(replayed.owners, full.owners)
        assert torch.equal(replayed.roles, full.roles)
        assert replayed.loss == pytest.approx(full.loss, rel=1e-5)
        for kind in ("keys", "gradients", "values"):
            for name in names:
                mine, theirs = getattr(replayed, kind)[name], getattr(full, kind)[name]
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_replay_skips_the_blocks_in_front(load: Callable) -> None:
    base = load("llama", layers=4)
    runner = Runner(base, 2)
    front, behind = (count_runs(base.model.model.layers[i].mlp.down_proj) for i in (1, 2))
    runner.logits(SEQUENCES)
    runner.logits(SEQUENCES)
    assert (front, behind) == ([5], [5, 5])


def test_a_changed_block_behind_the_kept_states_counts(load: Callable) -> None:
    base = load("gpt2", layers=4)
    runner = Runner(base, 2)
    weight = base.model.transformer.h[2].mlp.c_proj.weight
    runner.logits(SEQUENCES)
    kept = weight.data.clone()
    try:
        weight.data += 0.1
        with torch.no_grad():
            logits, _ = runner.logits(SEQUENCES)
        wanted = torch.cat([plain_logits(base.model, sequence) for sequence in SEQUENCES])
    finally:
        weight.data.copy_(kept)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [1, 3])
def test_replay_from_any_block(load: Callable, first: int) -> None:
    base = load("gptj", layers=4)
    runner = Runner(base, first)
    assert runner.replaying
    with torch.no_grad():
        mine, theirs = runner.logits(SEQUENCES)[0], Runner(base).logits(SEQUENCES)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_hands_on_can_be_changed(load: Callable, family: str, first: int) -> None:
    """As a change of the next block's input would; the prefix runs past the block, unchanged, and is kept so."""
    base = load(family, layers=4)
    runner = Runner(base, first)
    assert runner.replaying == (first > 0)
    seen: list[torch.Tensor] = []

    def change(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states * 1.5 + 0.1

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (args[0] * 1.5 + 0.1, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 1.5 + 0.1}

    plain = Runner(base)
    with torch.no_grad():
        untouched = runner.logits(SEQUENCES)[0]
        changed, batch = runner.logits(SEQUENCES, behind=(2, change))
        again = runner.logits(SEQUENCES)[0]
        handle = plain.blocks[3].register_forward_pre_hook(before, with_kwargs=True)
        try:
            wanted = plain.logits(SEQUENCES)[0]
        finally:
            handle.remove()
    torch.testing.assert_close(changed, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(untouched, again)
    assert [states.shape[:2] for states in seen] == [batch.ids.shape]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_replay_in_half_precision(load: Callable, dtype: str) -> None:
    base = load("llama", layers=4, dtype=dtype)
    runner = Runner(base, 2)
    assert runner.replaying
    with torch.no_grad():
        mine, theirs = runner.logits(SEQUENCES)[0].float(), Runner(base).logits(SEQUENCES)[0].float()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.03 * float(theirs.abs().max()))


# ---------------------------------------------------------------- the last MLP


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_sees_the_positions_of_logits_alone(
    load: Callable, family: str, first: int, gradients: bool
) -> None:
    """And every token where it is watched, or what comes behind it is; OPT's is no module of its own."""
    runner = Runner(load(family, layers=4), first)
    with watching(runner.model, [runner_leaf(runner, 3)], gradients=gradients) as (inputs, _):

        def tokens(**options: Any) -> int:
            runner.logits(SEQUENCES, **options)
            return next(iter(inputs.values())).flatten(0, -2).shape[0]

        whole, positions = len(SEQUENCES) * 11, 12
        assert tokens() == (whole if family == "opt" else positions)
        assert tokens(everywhere=True) == whole
        assert tokens(behind=(3, lambda states: states)) == whole


@pytest.mark.parametrize("first", [0, 2])
def test_an_mlp_that_looks_around_sees_every_token(tiny_model_factory, first: int) -> None:
    base = load_base(str(tiny_model_factory("llama", layers=4)), device="cpu")

    class Shifted(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.down_proj, self.mlp = mlp.down_proj, mlp

        def forward(self, states: Tensor) -> Tensor:
            return self.mlp(states + nn.functional.pad(states, (0, 0, 1, -1)))  # and the token in front

    base.model.model.layers[3].mlp = Shifted(base.model.model.layers[3].mlp)
    runner = Runner(base, first)
    assert runner.replaying == (first > 0)
    assert runner._last_mlp is None
    with torch.no_grad():
        logits, batch = runner.logits(SEQUENCES)
        whole = runner.full_logits(batch)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- kept states


def states_of(runner: Runner) -> dict[tuple[int, ...], Tensor]:
    return {ids: state for (_, ids), (state,) in runner._states._held.items()}


def test_kept_states_are_bounded_and_the_oldest_go_first(load: Callable) -> None:
    base = load("llama", layers=4)
    each = 10 * 32 * 4  # tokens, width, bytes
    sequences = [Encoded(tuple(range(start, start + 10)), 8) for start in range(20, 80, 10)]
    runner = Runner(base, 2, cache_bytes=3 * each)
    with torch.no_grad():
        wanted = [plain_logits(base.model, sequence) for sequence in sequences]
        for sequence in (0, 1, 2, 0, 3, 4, 5, 0, 1, 2, 3, 4, 5):
            logits, _ = runner.logits([sequences[sequence]])
            torch.testing.assert_close(logits, wanted[sequence], rtol=1e-5, atol=1e-5)
            assert sum(state.nbytes for state in states_of(runner).values()) <= 3 * each
        runner.logits([sequences[0]])
        runner.logits([sequences[1]])
        runner.logits([sequences[0]])
        runner.logits([sequences[2], sequences[3]])
        assert list(states_of(runner)) == [sequences[i].ids for i in (0, 2, 3)]
        torch.testing.assert_close(runner.logits(sequences)[0], torch.cat(wanted), rtol=1e-5, atol=1e-5)


def test_states_not_worth_keeping_are_not_kept(load: Callable) -> None:
    runner = Runner(load("gpt2", layers=4), 2)
    runner.logits(SEQUENCES, keep=False)
    assert states_of(runner) == {}
    runner.logits(SEQUENCES[:2])
    runner.logits(SEQUENCES, keep=False)
    assert set(states_of(runner)) == {sequence.ids for sequence in SEQUENCES[:2]}


def test_a_hit_is_the_very_state_that_was_kept(load: Callable) -> None:
    runner = Runner(load("gpt2", layers=4), 2)
    with torch.no_grad():
        first, _ = runner.logits(SEQUENCES)
        again, _ = runner.logits(SEQUENCES)
    assert torch.equal(first, again)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [True, False])
def test_company_gives_the_same_bits_whoever_is_asked_first(load: Callable, family: str, keep: bool) -> None:
    base = load(family, layers=4)
    found = []
    for asked in ([0], [3, 1], [4, 0, 2], [2, 2], [0, 1, 2, 3, 4]):
        runner = Runner(base, 2)
        runner.keep_company(SEQUENCES)
        runner.keep_company(SEQUENCES[::-1])  # a member keeps its first company
        runner.logits([SEQUENCES[i] for i in asked], keep=keep)
        assert set(states_of(runner)) == {sequence.ids for sequence in SEQUENCES}
        found.append(states_of(runner))
    for states in found[1:]:
        assert all(torch.equal(states[ids], state) for ids, state in found[0].items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_spilled_states_are_the_very_states(load: Callable, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of nothing that spills gives the bits of one that holds everything, and computes no prefix twice."""
    base = load(family, layers=4)
    small, large = Runner(base, 2, cache_bytes=1, spill_bytes=1 << 20), Runner(base, 2)
    with torch.no_grad():
        for runner in (small, large):
            runner.logits(SEQUENCES)
        assert len(states_of(small)) == 1
        monkeypatch.setattr(Runner, "_run_prefix", None)
        for asked in ([2, 0], [4], [1, 3, 2, 0, 4]):
            mine, theirs = (runner.logits([SEQUENCES[i] for i in asked])[0] for runner in (small, large))
            assert torch.equal(mine, theirs)


def test_a_file_that_goes_away_between_two_parts_is_no_half_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(1, 1 << 20, CPU)
    states.keep({key: (torch.ones(3), torch.ones(4) * key) for key in (1, 2)})
    found = states.get(1)
    assert found is not None
    assert [part.tolist() for part in found] == [[1.0] * 3, [1.0] * 4]
    get = Spill.get

    def once(spill: Spill, key: Any, device: torch.device) -> Tensor | None:
        part = get(spill, key, device)
        for file in list(spill._files):
            file.unlink(missing_ok=True)
        return part

    monkeypatch.setattr(Spill, "get", once)
    assert states.get(1) is None


def test_company_survives_a_small_cache(load: Callable) -> None:
    base = load("gpt2", layers=4)
    small, large = Runner(base, 2, cache_bytes=1), Runner(base, 2)
    for runner in (small, large):
        runner.keep_company(SEQUENCES[:3])
        runner.keep_company(SEQUENCES[3:])
    with torch.no_grad():
        for asked in ([2, 0], [4], [1, 3, 2, 0, 4]):
            mine, theirs = (runner.logits([SEQUENCES[i] for i in asked])[0] for runner in (small, large))
            assert torch.equal(mine, theirs)
    assert len(states_of(small)) == 1


@pytest.mark.parametrize(("batch_size", "room"), [(2, 99), (None, 2), (4, 1)])
def test_company_is_computed_in_batches_and_in_halves_where_memory_is_short(
    load: Callable, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, room: int
) -> None:
    base = load("gpt2", layers=4)
    whole, parts = Runner(base, 2), Runner(base, 2)
    whole.keep_company(SEQUENCES)
    parts.keep_company(SEQUENCES, batch_size)
    run, sizes = parts._run_prefix, []

    def short(sequences: Any) -> Any:
        if len(sequences) > room:
            raise torch.OutOfMemoryError
        sizes.append(len(sequences))
        return run(sequences)

    monkeypatch.setattr(parts, "_run_prefix", short)
    with torch.no_grad():
        for runner in (whole, parts):
            runner.logits(SEQUENCES)
    assert max(sizes) == min(batch_size or len(SEQUENCES), room)
    assert sum(sizes) == len(SEQUENCES) == len(states_of(parts))
    for ids, state in states_of(whole).items():
        torch.testing.assert_close(states_of(parts)[ids], state, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- models that cannot replay


class Wrapped(nn.Module):
    """A block with a forward of the test's own around it."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self.around = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.block, *args, **kwargs)


def unreplayable(how: str, base: Base) -> None:
    layers, side = base.model.model.layers, {}

    def note(block: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
        output = block(states, **kwargs)
        side["states"] = output
        return output

    def needs(block: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
        return block(side.pop("states"), **kwargs)  # a KeyError where block 1 did not run

    def uses(block: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
        return block(states, **kwargs) + side.pop("states", 0)

    def shares(block: nn.Module, states: Tensor, **kwargs: Any) -> Tensor:
        return block(states, **kwargs) + side["states"]  # stale, and of the right shape, where block 1 did not run

    layers[1] = Wrapped(layers[1], note)
    layers[2] = Wrapped(layers[2], {"needs": needs, "uses": uses, "shares": shares}[how])


@pytest.mark.parametrize("how", ["needs", "uses", "shares"])
def test_a_model_that_cannot_replay_runs_in_full(tiny_model_factory, how: str) -> None:
    base = load_base(str(tiny_model_factory("llama", layers=4)), device="cpu")
    unreplayable(how, base)
    runner = Runner(base, 2)
    assert not runner.replaying
    with torch.no_grad():
        logits, _ = runner.logits(SEQUENCES)
        wanted = torch.cat([plain_logits(base.model, sequence) for sequence in SEQUENCES])
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert states_of(runner) == {}


def test_blocks_that_name_their_input_otherwise_run_in_full(tiny_model_factory) -> None:
    base = load_base(str(tiny_model_factory("llama", layers=4)), device="cpu")
    inner = base.model.model

    class Renamed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *, x: Tensor, **kwargs: Any) -> Tensor:
            return self.block(x, **kwargs)

    class Caller(nn.Module):
        """Calls the renamed block the way its own model would, by that name."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.renamed = Renamed(block)

        def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
            return self.renamed(x=states, **kwargs)

    for i in range(4):
        inner.layers[i] = Caller(inner.layers[i])
    with torch.no_grad():
        wanted = torch.cat([plain_logits(base.model, sequence) for sequence in SEQUENCES])
    runner = Runner(base, 2)
    runner.blocks = nn.ModuleList([caller.renamed for caller in inner.layers])
    assert not runner._verify()
    runner.replaying = False
    with torch.no_grad():
        torch.testing.assert_close(runner.logits(SEQUENCES)[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_wrapped_forward_of_a_block_is_put_back(tiny_model_factory) -> None:
    """accelerate, for one, keeps a forward of its own on the blocks."""
    base = load_base(str(tiny_model_factory("llama", layers=4)), device="cpu")
    calls = []
    for block in base.model.model.layers:
        own = block.forward

        def forward(self: nn.Module, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            calls.append(self)
            return own(*args, **kwargs)

        block.forward = MethodType(forward, block)
    kept = [block.forward for block in base.model.model.layers]
    runner = Runner(base, 2)
    assert runner.replaying
    runner.logits(SEQUENCES)
    assert [block.forward for block in base.model.model.layers] == kept
    calls.clear()
    plain_logits(base.model, SEQUENCES[0])
    assert len(calls) == 4


@pytest.mark.parametrize("first", [0, 2])
def test_a_run_leaves_no_trace_on_the_model(load: Callable, first: int) -> None:
    base = load("gptj", layers=4)
    runner = Runner(base, first)
    hooks = [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in base.model.modules()]
    runner.logits(SEQUENCES)
    runner.logits_of(runner.heads(SEQUENCES)[0])
    with pytest.raises(IndexError):  # a token that the embeddings do not have
        runner.logits([Encoded((10**6, 1), 1)])
    assert [dict(m._forward_pre_hooks) | dict(m._forward_hooks) for m in base.model.modules()] == hooks
    assert not any("forward" in vars(m) for m in base.model.modules())


# ---------------------------------------------------------------- inputs of the head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 2])
def test_logits_of_heads_are_the_logits(load: Callable, family: str, first: int) -> None:
    runner = Runner(load(family, layers=4), first)
    heads = runner.heads(SEQUENCES)
    assert [head.shape for head in heads] == [(len(sequence.positions), 32) for sequence in SEQUENCES]
    with torch.no_grad():
        wanted, _ = runner.logits(SEQUENCES)
        torch.testing.assert_close(runner.logits_of(torch.cat(heads)), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(runner.logits_of(heads[3]), wanted[-4:-3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 2])
def test_capped_logits_stay_capped(first: int) -> None:
    base = gemma2()
    runner = Runner(base, first)
    assert runner.replaying == (first > 0)
    wanted = torch.cat([plain_logits(base.model, sequence) for sequence in SEQUENCES])
    assert 0.5 < float(wanted.abs().max()) <= 0.7
    with torch.no_grad():
        torch.testing.assert_close(runner.logits(SEQUENCES)[0], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(runner.logits_of(torch.cat(runner.heads(SEQUENCES))), wanted, rtol=1e-5, atol=1e-5)


def test_the_head_computes_the_wanted_rows_only(load: Callable) -> None:
    base = load("llama")
    rows = []
    handle = base.model.lm_head.register_forward_hook(
        lambda module, args, output: rows.append(tuple(output.shape[:-1]))
    )
    Runner(base).full_logits(make_batch(SEQUENCES, CPU))
    handle.remove()
    assert rows[-1] == (1, sum(len(sequence.positions) for sequence in SEQUENCES))


def test_a_batch_is_plain_data() -> None:
    one = torch.zeros(1, dtype=torch.long)
    assert Batch(one[None], one[None], one, one, one).owners is one


# ---------------------------------------------------------------- how it attends


def attending(runner: Runner, tokens: int) -> str:
    """How the model attends in a forward of so many tokens."""
    seen: list[str] = []
    handle = runner.blocks[0].register_forward_hook(lambda *_: seen.append(runner.model.config._attn_implementation))
    try:
        runner.logits([Encoded(tuple(range(2, 3 + tokens)), tokens - 1)])  # the last token is not run
    finally:
        handle.remove()
    return seen[-1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_short_texts_with_gradients_attend_written_out(load: Callable, family: str) -> None:
    runner = Runner(load(family))
    assert runner.model.config._attn_implementation == "sdpa"
    with torch.enable_grad():
        assert [attending(runner, tokens) for tokens in (5, SHORT, SHORT + 1)] == ["eager", "eager", "sdpa"]
    with torch.no_grad():
        assert attending(runner, 5) == "sdpa"
    assert runner.model.config._attn_implementation == "sdpa"


def test_how_it_attends_survives_a_forward_that_fails(load: Callable) -> None:
    runner = Runner(load("llama"))
    handle = runner.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with torch.enable_grad(), pytest.raises(ZeroDivisionError):
        runner.logits([SEQUENCES[0]])
    handle.remove()
    assert runner.model.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_told_is_not_told(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would warn at every forward."""
    runner = Runner(load("llama"))
    monkeypatch.setattr(type(runner.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(runner.model, "set_attn_implementation", lambda name: 1 / 0)
    with torch.enable_grad():
        assert attending(runner, 5) == "sdpa"


def test_written_out_the_gradients_are_the_same(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, names = Runner(load("llama", layers=4)), ["model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    found = []
    for short in (SHORT, 0):
        monkeypatch.setattr(replay_module, "SHORT", short)
        found.append(list(edit_rows(runner, SEQUENCES, names, 3, "answer")))
    for mine, theirs in zip(*found, strict=True):
        for name in names:
            torch.testing.assert_close(mine.gradients[name], theirs.gradients[name], rtol=1e-4, atol=1e-6)


def test_a_state_kept_of_a_whole_sequence_serves_it_with_an_answer(load: Callable) -> None:
    """The same tokens asked about without an answer are run to the last one; with an answer, but for that."""
    runner = Runner(load("llama", layers=4), 2)
    ids = tuple(range(5, 14))
    with torch.no_grad():
        wanted = plain_logits(runner.model, Encoded(ids, 7))
        runner.logits([Encoded(ids, 9)])
        torch.testing.assert_close(runner.logits([Encoded(ids, 7)])[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first", [0, 1])
def test_behind_the_last_block_asked_for_none_is_run(load: Callable, family: str, first: int) -> None:
    runner = Runner(load(family, layers=4), first)
    leaves = [block_leaf(runner, index) for index in range(4)]
    seen: list[Tensor] = []

    def look(states: Tensor) -> Tensor:
        seen.append(states)
        return states

    with torch.no_grad():
        runner.logits(SEQUENCES, behind=(2, look))
        runs = [count_runs(leaf) for leaf in leaves]
        runner.logits(SEQUENCES, behind=(2, look), until=2)
    assert torch.equal(*seen)
    assert [len(sizes) for sizes in runs][first:] == [1, 1, 1, 0][first:]
