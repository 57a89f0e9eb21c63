"""The last MLP sees the tokens whose logits are wanted, and every token where something else would notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from malmen_cli.base.model import load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.last_mlp import alone_at, only_at
from malmen_cli.editing.replay import Runner

ROWS, COLUMNS = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2])
SHAPE = torch.Size([2, 5])


class Part(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states.tanh() * 3


class Mixing(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states + 1e-4 * nn.functional.pad(states, (0, 0, 1, -1))  # a little of the token in front


STATES = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def picked(states: Tensor) -> Tensor:
    return states[ROWS, COLUMNS]


RUNS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], Tensor], bool]] = {
    "token by token": (Part, lambda part: picked(STATES + part(STATES)), True),
    "mixes tokens": (Mixing, lambda part: picked(STATES + part(STATES)), False),
    "read elsewhere, hardly": (Part, lambda part: picked(STATES + part(STATES)) + 1e-6 * part(STATES).mean(), False),
    "read as a mean": (Part, lambda part: (STATES + part(STATES)).mean(1), False),
    "read at another token": (Part, lambda part: (STATES + part(STATES))[:, 3], False),
    "never run": (Part, lambda part: picked(STATES), False),
    "run and not read": (Part, lambda part: (part(STATES), picked(STATES.clone().requires_grad_(True)))[1], False),
    "run twice": (Part, lambda part: picked(part(STATES) + part(STATES)), False),
    "one expert": (Part, lambda part: picked(STATES + part(STATES.flatten(0, 1)).reshape(STATES.shape)), False),
    "in parts": (Part, lambda part: picked(torch.cat([part(STATES[:, :2]), STATES[:, 2:]], 1)), False),
    "by keyword": (Part, lambda part: picked(STATES + part(states=STATES)), False),
    "not finite": (Part, lambda part: picked(part(STATES) / 0), False),
}


@pytest.mark.parametrize("how", RUNS)
def test_whether_it_is_read_alone(how: str) -> None:
    kind, run, wanted = RUNS[how]
    part = kind()
    assert alone_at(part, SHAPE, ROWS, COLUMNS, lambda: run(part)) == wanted
    assert not part._forward_pre_hooks


def test_out_of_memory_is_no_answer() -> None:
    def full() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        alone_at(Part(), SHAPE, ROWS, COLUMNS, full)


def test_the_others_get_nothing_and_gradients_flow() -> None:
    part, states = Part(), STATES.clone().requires_grad_(True)
    with only_at(part, ROWS, COLUMNS):
        output = part(states)
    assert torch.equal(picked(output), picked(STATES.tanh() * 3))
    rest = output.detach().clone()
    rest[ROWS, COLUMNS] = 0
    assert not rest.any()
    (mine,) = torch.autograd.grad(output.square().sum(), states)
    (wanted,) = torch.autograd.grad(picked(states.tanh() * 3).square().sum(), states)
    torch.testing.assert_close(mine, wanted)
    assert not part._forward_hooks
    assert torch.equal(part(STATES), STATES.tanh() * 3)


QUESTIONS = [Encoded((0, 5, 6, 7), 2, None, tuple(range(20, 29)), 9), Encoded((0, 8), 1, None, (21, 23, 25), 3)]
CLAIMS = [Encoded((0, 1), 1, None, tuple(range(20, 29)), 1), Encoded((0, 0), 1, None, (21, 23, 25), 1)]


@pytest.mark.parametrize(
    ("family", "sequences", "narrow"),
    [("t5", QUESTIONS, True), ("distilbert", CLAIMS, True), ("bert", CLAIMS, False), ("roberta", CLAIMS, False)],
)
def test_other_tasks(load: Callable, family: str, sequences: list[Encoded], narrow: bool) -> None:
    """BERT's second matrix lies in a module that takes two tensors; the others' MLP is narrowed, in T5's decoder."""
    base = load(family, layers=3)
    runner = Runner(base)
    assert (runner._last_mlp is not None) == narrow
    with torch.no_grad():
        logits, batch = runner.logits(sequences)
        whole = runner.full_logits(batch)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_head_that_reads_a_mean_has_every_token(tiny_model_factory: Callable, scale: float) -> None:
    """However little the last MLP has to say."""
    base = load_base(str(tiny_model_factory("distilbert", layers=3)), device="cpu")
    model = base.model
    model.distilbert.transformer.layer[-1].ffn.lin2.weight.data *= scale

    class Mean(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states.mean(1, keepdim=True).expand_as(states)

    whole_forward = model.distilbert.forward

    def pooled(*args: object, **kwargs: object) -> object:
        output = whole_forward(*args, **kwargs)
        output["last_hidden_state"] = Mean()(output[0])
        return output

    model.distilbert.forward = pooled
    assert Runner(base)._last_mlp is None


def test_one_expert_of_several_sees_what_is_routed_to_it(tiny_model_factory: Callable) -> None:
    base = load_base(str(tiny_model_factory("llama", layers=3)), device="cpu")

    class Routed(nn.Module):
        def __init__(self, first: nn.Module, second: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList([first, second])

        def forward(self, states: Tensor) -> Tensor:
            flat = states.flatten(0, 1)
            second = flat[:, 0] > flat[:, 0].median()
            return torch.where(second[:, None], self.experts[1](flat), self.experts[0](flat)).reshape(states.shape)

    layers = base.model.model.layers
    layers[2].mlp = Routed(layers[2].mlp, layers[1].mlp)
    runner = Runner(base, 1)
    assert runner._last_mlp is None
    assert runner.replaying
