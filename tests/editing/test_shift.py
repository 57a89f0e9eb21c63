"""Putting a shift into a loaded model and out again, in the module's own orientation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from malmen_cli.editing.capture import edit_rows
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.shift import IN_OUT, OUT_IN, ModuleShift, Shift, applied, weight_layout
from malmen_cli.exceptions import EditorError, NumericsError

TARGETS = {"gpt2": "transformer.h.1.mlp.c_proj", "llama": "model.layers.1.mlp.down_proj"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, kept: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def low_rank(layout: str, dk: int, dv: int, seed: int = 0) -> ModuleShift:
    return ModuleShift(layout, left=0.1 * normal(dk, 3, seed=seed), right=normal(3, dv, seed=seed + 1))


def test_layout_goes_by_type() -> None:
    assert weight_layout(nn.Linear(4, 4)) == OUT_IN
    assert weight_layout(Conv1D(4, 4)) == IN_OUT


def test_rank_and_matrix_of_both_forms() -> None:
    factors = low_rank(OUT_IN, 6, 4)
    assert factors.left is not None
    assert factors.right is not None
    dense = ModuleShift(OUT_IN, dense=factors.left @ factors.right)
    assert (factors.rank, dense.rank) == (3, None)
    assert torch.equal(factors.matrix(), dense.matrix())
    assert factors.matrix().shape == (6, 4)
    assert factors.for_weight().shape == (4, 6)
    assert ModuleShift(IN_OUT, dense=dense.matrix()).for_weight().shape == (6, 4)


@pytest.mark.parametrize(
    ("ranks", "rank"), [((3, 4), 7), ((4, 4), 8), ((5, 4), None), ((None, 2), None), ((2, None), None)]
)
def test_two_shifts_add_up_and_stay_low_rank_while_they_can(ranks: tuple, rank: int | None) -> None:
    def shift(n: int | None, fact: str) -> Shift:
        left, right = normal(8, n or 3, seed=len(fact)), normal(n or 3, 5, seed=7)
        module = ModuleShift(IN_OUT, left=left, right=right) if n else ModuleShift(IN_OUT, dense=left @ right)
        return Shift({"a": module}, (fact,) * (n or 0), residual=n or 0.5)

    first, second = shift(ranks[0], "x"), shift(ranks[1], "yy")
    total = first.plus(second)
    wanted = first.modules["a"].matrix() + second.modules["a"].matrix()
    torch.testing.assert_close(total.modules["a"].matrix(), wanted, rtol=1e-5, atol=1e-5)
    assert total.modules["a"].rank == rank
    assert total.row_facts == (("x",) * ranks[0] + ("yy",) * ranks[1] if rank else ())
    assert total.residual == max(first.residual, second.residual)


@pytest.mark.parametrize("family", sorted(TARGETS))
@pytest.mark.parametrize("mlp", [32, 64])  # 32: a square weight
@pytest.mark.parametrize("form", ["factors", "dense"])
def test_outputs_move_by_keys_times_shift(load: Callable, facts: Callable, family: str, mlp: int, form: str) -> None:
    base, name = load(family, mlp=mlp), TARGETS[family]
    (rows,) = edit_rows(Runner(base), facts(base.tokenizer, 4), [name], 8, "subject")
    module, keys = base.model.get_submodule(name), rows.keys[name]
    change = low_rank(weight_layout(module), mlp, 32)
    if form == "dense":
        change = ModuleShift(change.layout, dense=change.matrix())
    before = module(keys)
    with applied(base.model, Shift({name: change})):
        after = module(keys)
    torch.testing.assert_close(before, rows.values[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after - before, keys @ change.matrix(), rtol=1e-5, atol=1e-5)
    assert float((after - before).norm()) > 0.1


@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", False), ("qwen2", True)])
def test_embeddings_tied_or_not_survive(load: Callable, family: str, tied: bool) -> None:
    model = load(family).model
    name = TARGETS.get(family, TARGETS["llama"])
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    kept = bits(model)
    with applied(model, Shift({name: low_rank(weight_layout(model.get_submodule(name)), 64, 32)})):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert torch.equal(model.get_output_embeddings().weight, kept["lm_head.weight"])
        changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, kept[n])]
        assert changed == [f"{name}.weight"]
    assert model.get_output_embeddings().weight is head
    assert model.get_input_embeddings().weight is words


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_rounds_leave_the_base_bitwise_unchanged(load: Callable, dtype: str) -> None:
    model = load("gpt2", dtype=dtype).model
    kept = bits(model)
    for seed in range(100):
        with applied(model, Shift({TARGETS["gpt2"]: low_rank(IN_OUT, 64, 32, seed)})):
            assert not same(model, kept)
    assert same(model, kept)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_body_that_raises_leaves_the_base_unchanged(load: Callable, failure: type[BaseException]) -> None:
    model = load("llama").model
    kept = bits(model)
    for seed in range(5):
        with pytest.raises(failure), applied(model, Shift({TARGETS["llama"]: low_rank(OUT_IN, 64, 32, seed)})):
            raise failure
    assert same(model, kept)


def test_a_second_module_that_does_not_fit_leaves_the_first_unchanged(load: Callable) -> None:
    model = load("llama").model
    kept = bits(model)
    good, bad = low_rank(OUT_IN, 64, 32), low_rank(OUT_IN, 63, 32)
    with (
        pytest.raises(EditorError, match=r"model\.layers\.0\.mlp\.down_proj is for a weight of shape \(32, 63\)"),
        applied(model, Shift({TARGETS["llama"]: good, "model.layers.0.mlp.down_proj": bad})),
    ):
        pass
    assert same(model, kept)


def test_nested_shifts_add_up_and_unwind(load: Callable) -> None:
    model, name = load("gpt2").model, TARGETS["gpt2"]
    kept = bits(model)
    first, second = low_rank(IN_OUT, 64, 32, 1), low_rank(IN_OUT, 64, 32, 5)
    with applied(model, Shift({name: first})), applied(model, Shift({name: second})):
        moved = model.get_submodule(name).weight - kept[f"{name}.weight"]
        torch.testing.assert_close(moved, first.matrix() + second.matrix(), rtol=1e-5, atol=1e-6)
    assert same(model, kept)


def test_half_precision_weights_are_rounded_once(load: Callable) -> None:
    model, name = load("gpt2", dtype="bfloat16").model, TARGETS["gpt2"]
    change = low_rank(IN_OUT, 64, 32)
    wanted = (model.get_submodule(name).weight.float() + change.matrix()).to(torch.bfloat16)
    with applied(model, Shift({name: change})):
        assert torch.equal(model.get_submodule(name).weight, wanted)


@pytest.mark.parametrize("part", ["dense", "left", "right"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_shift_that_is_not_finite_names_its_module(load: Callable, part: str, value: float) -> None:
    model = load("gpt2").model
    kept = bits(model)
    tensors = {"dense": {"dense": normal(64, 32)}}.get(part, {"left": normal(64, 2), "right": normal(2, 32)})
    tensors[part][1, 1] = value
    bad = Shift(
        {"transformer.h.0.mlp.c_proj": low_rank(IN_OUT, 64, 32), TARGETS["gpt2"]: ModuleShift(IN_OUT, **tensors)}
    )
    with pytest.raises(NumericsError, match=r"transformer.h.1.mlp.c_proj"), applied(model, bad):
        pass
    assert same(model, kept)
