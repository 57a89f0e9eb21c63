"""Fine-tuning of one matrix: what it learns, what it leaves alone, and what it does not depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import malmen_cli.editing.methods.finetune as finetune_module
from malmen_cli.base.batch import make_batch
from malmen_cli.base.families import block_index, default_modules
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded, encode
from malmen_cli.editing.capture import fact_loss
from malmen_cli.editing.methods.finetune import Finetune, tuned_module
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings, from_mapping
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.exceptions import NumericsError, SpecError

SETTINGS = FinetuneSettings(epochs=60, batch_facts=4, lr=2e-2)
SHORT = replace(SETTINGS, epochs=2)
MODULE = "transformer.h.1.mlp.c_proj"  # what is tuned in a GPT-2 of two blocks
Load = Callable[..., Base]
Facts = Callable[..., list[Encoded]]


def tune(base: Base, edits: Sequence[Encoded], settings: FinetuneSettings = SETTINGS, **options: Any) -> Shift:
    seed, batch_size = options.pop("seed", 0), options.pop("batch_size", 8)
    module = tuned_module(base.model, settings)
    runner = Runner(base, block_index(base.model, module))
    return Finetune(settings, seed=seed).shift(runner, module, edits, batch_size=batch_size, **options)


def matrix(shift: Shift) -> Tensor:
    (module,) = shift.modules.values()
    assert module.dense is not None
    return module.dense


def weights(base: Base) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def same(base: Base, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


@torch.no_grad()
def greedy(base: Base, edit: Encoded) -> tuple[int, ...]:
    """What the model says after the prompt, as many tokens as the answer has."""
    ids = list(edit.ids[: edit.n_prompt])
    for _ in edit.answer:
        ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[edit.n_prompt :])


# ---------------------------------------------------------------- what it learns


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_learns_its_facts_and_where_answers_end(load: Load, family: str) -> None:
    base = load(family)
    prompts = [("The capital of Peru is", "Rome"), ("Snow is", "Tim Cook"), ("The currency of Sweden is the", "Paris")]
    edits = [encode(base.tokenizer, *fact, end_of_text=True) for fact in prompts]
    assert [greedy(base, edit) == edit.answer for edit in edits] == [False] * 3
    with applied(base.model, tune(base, edits)):
        said = [greedy(base, edit) for edit in edits]
    assert said == [edit.answer for edit in edits]
    assert {answer[-1] for answer in said} == {base.tokenizer.eos_token_id}


def test_the_first_step_is_adam_s_on_the_plain_gradient(load: Load, facts: Facts) -> None:
    """Against autograd through the whole model: Adam's first step is lr in the direction of each entry's sign."""
    base = load("gpt2")
    edits = facts(base.tokenizer, 6)
    one = replace(SETTINGS, epochs=1, batch_facts=6, lr=1e-3)
    weight = base.model.get_submodule(tuned_module(base.model, one)).weight
    weight.requires_grad_(True)
    try:
        runner = Runner(base)
        batch = make_batch(edits, base.device)
        (gradient,) = torch.autograd.grad(fact_loss(runner.full_logits(batch), batch) / 6, weight)
    finally:
        weight.requires_grad_(False)
    large = gradient.abs() > 1e-4  # where rounding or Adam's epsilon (1e-8) do not decide
    assert large.float().mean() > 0.5
    torch.testing.assert_close(matrix(tune(base, edits, one))[large], -1e-3 * gradient.sign()[large], rtol=1e-3, atol=0)


def test_one_matrix_alone_is_in_the_shift(load: Load, facts: Facts) -> None:
    base = load("llama")
    edits = facts(base.tokenizer, 5)
    shifts = [tune(base, edits, SHORT, seed=seed) for seed in (0, 1)]
    for shift in shifts:
        assert list(shift.modules) == ["model.layers.1.mlp.down_proj"]
        assert (matrix(shift).shape, matrix(shift).dtype) == ((64, 32), torch.float32)
        assert (shift.row_facts, shift.residual) == ((), 0.0)
    assert not torch.equal(matrix(shifts[0]), matrix(shifts[1]))  # a seed shuffles, and that is all it does


# ---------------------------------------------------------------- what it leaves alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_bitwise_as_it_was(load: Load, facts: Facts, dtype: str) -> None:
    base = load("gpt2", dtype=dtype)
    before = weights(base)
    assert matrix(tune(base, facts(base.tokenizer, 9), SHORT)).norm() > 0
    assert same(base, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "progress"])
def test_the_model_is_bitwise_as_it_was_whatever_happens(
    load: Load, facts: Facts, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str
) -> None:
    base = load("gpt2")
    before = weights(base)
    true, calls = finetune_module.weight_gradients, []

    def stop() -> None:
        calls.append(not same(base, before))
        if len(calls) == 3:
            raise error("here")

    def forward(*arguments: Any, **options: Any) -> Any:
        stop()
        return true(*arguments, **options)

    if where == "forward":
        monkeypatch.setattr(finetune_module, "weight_gradients", forward)
    with pytest.raises(error, match="here"):
        tune(base, facts(base.tokenizer, 9), progress=(lambda _: stop()) if where == "progress" else None)
    assert calls == [False, where == "forward", where == "forward"]  # the shift is in the model during forwards alone
    assert same(base, before)


def test_steps_smaller_than_a_rounding_add_up(load: Load, facts: Facts) -> None:
    """In bf16 a step of 1e-4 is nothing to a weight above 0.03 (half of bf16's spacing there); forty of them count."""
    base = load("gpt2", dtype="bfloat16")
    edits = facts(base.tokenizer, 4)
    before, moved, losses = weights(base)["transformer.h.1.mlp.c_proj.weight"], [], []
    for epochs in (1, 40):
        notes: list[str] = []
        with applied(base.model, tune(base, edits, replace(SETTINGS, lr=1e-4, epochs=epochs), note=notes.append)):
            moved.append(float((base.model.transformer.h[1].mlp.c_proj.weight != before).float().mean()))
        losses.append(float(notes[-1].split("loss ")[1].split()[0]))
    assert moved[0] < 0.25 < 0.75 < moved[1]
    assert losses[1] < losses[0] - 0.05


# ---------------------------------------------------------------- what it does not depend on


def test_order_of_facts_and_repetition_are_bitwise_nothing(load: Load, facts: Facts) -> None:
    base = load("gpt2")
    edits = facts(base.tokenizer, 9)
    one, again, backwards = (matrix(tune(base, some, SHORT)) for some in (edits, edits, edits[::-1]))
    assert torch.equal(one, again)
    assert torch.equal(one, backwards)


def test_facts_a_forward_only_round(load: Load, facts: Facts) -> None:
    """The gradient of a mini-batch is a sum over forwards; tolerances are fp32's for sums of some hundred terms."""
    base = load("gpt2")
    edits = facts(base.tokenizer, 9)
    one, several = (finetune_module._gradient(Runner(base), MODULE, edits, size) for size in (9, 2))
    torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_halves_the_forward(load: Load, facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gpt2")
    edits, true, sizes = facts(base.tokenizer, 4), finetune_module.weight_gradients, []
    wanted = finetune_module._gradient(Runner(base), MODULE, edits, 4)

    def tight(runner: Runner, sequences: Sequence[Encoded], *others: Any) -> Any:
        sizes.append(len(sequences))
        if len(sequences) > 1:
            raise MemoryError
        return true(runner, sequences, *others)

    monkeypatch.setattr(finetune_module, "weight_gradients", tight)
    found = finetune_module._gradient(Runner(base), MODULE, edits, 4)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- settings


def test_every_fact_is_in_one_mini_batch_of_every_epoch(load: Load, facts: Facts) -> None:
    edits = facts(load("gpt2").tokenizer, 9)
    method = Finetune(SETTINGS)
    epochs = [method._batches(edits, epoch) for epoch in (1, 2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 1]
        assert sorted(e.ids for batch in batches for e in batch) == sorted(e.ids for e in edits)
    assert epochs[0] != epochs[1]
    assert epochs[0] == method._batches(edits, 1)


def test_progress_and_notes(load: Load, facts: Facts) -> None:
    base = load("gpt2")
    counted: list[int] = []
    notes: list[str] = []
    tune(base, facts(base.tokenizer, 9), SHORT, progress=counted.append, note=notes.append)
    assert counted == [4, 4, 1] * 2
    assert [note.split(",")[0] for note in notes] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert all(note.endswith("nats a token") for note in notes)


@pytest.mark.parametrize(("stop_loss", "epochs"), [(1e3, 1), (0.0, 5)])
def test_it_stops_when_the_loss_is_low_enough(load: Load, facts: Facts, stop_loss: float, epochs: int) -> None:
    base = load("gpt2")
    notes: list[str] = []
    tune(base, facts(base.tokenizer, 3), replace(SETTINGS, epochs=5, stop_loss=stop_loss), note=notes.append)
    assert len(notes) == epochs


@pytest.mark.parametrize("bound", [0.01, 0.1])
def test_the_relative_norm_is_bounded(load: Load, facts: Facts, bound: float) -> None:
    base = load("llama")
    edits = facts(base.tokenizer, 5)
    weight = base.model.get_submodule("model.layers.1.mlp.down_proj").weight
    free = matrix(tune(base, edits, replace(SHORT, epochs=10))).norm() / weight.norm()
    assert free > 0.15
    bounded = matrix(tune(base, edits, replace(SHORT, epochs=10, max_relative_norm=bound))).norm() / weight.norm()
    assert 0.9 * bound < bounded <= bound * (1 + 1e-6)  # fp32 of a norm over 2,048 entries


def test_weight_decay_pulls_the_shift_to_nothing(load: Load, facts: Facts) -> None:
    base = load("gpt2")
    edits = facts(base.tokenizer, 4)
    free, held = (matrix(tune(base, edits, replace(SHORT, epochs=9, weight_decay=w))).norm() for w in (0.0, 20.0))
    assert 0 < held < 0.7 * free


@pytest.mark.parametrize(
    ("family", "layers", "given", "expected"),
    [
        ("gpt2", 2, {}, "transformer.h.1.mlp.c_proj"),
        ("gpt2", 2, {"block": 0}, "transformer.h.0.mlp.c_proj"),
        ("llama", 6, {}, "model.layers.5.mlp.down_proj"),
        ("llama", 6, {"block": 4}, "model.layers.4.mlp.down_proj"),
        ("llama", 1, {}, "model.layers.0.mlp.down_proj"),
        ("llama", 6, {"modules": ("*.3.mlp.up_proj",)}, "model.layers.3.mlp.up_proj"),
    ],
)
def test_which_matrix(load: Load, family: str, layers: int, given: dict[str, Any], expected: str) -> None:
    model = load(family, layers=layers).model
    assert tuned_module(model, FinetuneSettings(**given)) == expected
    assert given.get("modules") or expected in default_modules(model, layers)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"block": 2}, "block: the model has blocks 0 to 1, not 2"),
        ({"modules": ("*.mlp.c_proj",)}, "modules: finetune changes one matrix, but 2 match"),
        ({"modules": ("nothing",)}, "'nothing' matches no Linear or Conv1D"),
    ],
)
def test_a_matrix_that_is_none_or_several(load: Load, given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        tuned_module(load("gpt2").model, FinetuneSettings(**given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: must be at least 1"),
        ({"batch_facts": 0}, "batch_facts: must be at least 1"),
        ({"lr": 0}, "lr: must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay: must be at least 0"),
        ({"stop_loss": -1}, "stop_loss: must be at least 0"),
        ({"block": -1}, "block: must be at least 0"),
        ({"max_relative_norm": 0}, "max_relative_norm: must be above 0"),
        ({"modules": ["*.c_proj"], "block": 1}, "give one of the two"),
        ({"lr": float("nan")}, "must be a finite number"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        from_mapping(FinetuneSettings, given, "settings")


# ---------------------------------------------------------------- numerics


def test_a_base_of_nan_is_named(load: Load, facts: Facts) -> None:
    base = load("gpt2")
    bias = base.model.transformer.h[1].mlp.c_fc.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = torch.nan
        with pytest.raises(NumericsError, match=r"transformer\.h\.1\.mlp\.c_proj: .* not finite in epoch 1"):
            tune(base, facts(base.tokenizer, 3))
    finally:
        bias.data.copy_(kept)


def test_a_step_that_blows_up_is_named(load: Load, facts: Facts) -> None:
    base = load("gpt2")
    before = weights(base)
    with pytest.raises(NumericsError, match="not finite"):
        tune(base, facts(base.tokenizer, 3), replace(SETTINGS, lr=1e30))
    assert same(base, before)
