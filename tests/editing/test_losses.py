"""Losses against autograd in fp64 of the very logits: summed in fp32, the gradient rounded to the logits' type once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from malmen_cli.editing import losses

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, VOCABULARY = 70, 50


def some_logits(dtype: torch.dtype, seed: int) -> Tensor:
    return 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exactly(logits: Tensor, loss: Tensor) -> tuple[float, Tensor]:
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def check(found: Tensor, logits: Tensor, wanted: tuple[float, Tensor]) -> None:
    """Value and twice the gradient."""
    (mine,) = torch.autograd.grad(2 * found, logits)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(wanted[0], rel=1e-5)
    assert mine.dtype == logits.dtype
    tolerance = max(torch.finfo(logits.dtype).eps, 1e-5)
    assert float((mine.double() - 2 * wanted[1]).norm() / (2 * wanted[1]).norm()) <= tolerance


@pytest.fixture(params=[1, 7, 500], autouse=True)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CACHED", request.param * 4 * VOCABULARY)


@pytest.fixture
def shares() -> Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", TYPES)
def test_divergence(dtype: torch.dtype, shares: Tensor) -> None:
    wanted, logits = some_logits(dtype, 0), some_logits(dtype, 1).requires_grad_(True)
    exact = logits.detach().double().requires_grad_(True)
    terms = kl_div(log_softmax(exact, -1), log_softmax(wanted.double(), -1), reduction="none", log_target=True)
    total = (terms.sum(-1) * shares.double()).sum()
    check(losses.divergence(wanted, logits, shares), logits, exactly(exact, total))


@pytest.mark.parametrize("dtype", TYPES)
def test_cross_entropy(dtype: torch.dtype, shares: Tensor) -> None:
    """A label that is nearly sure too, where 1 - p is all there is to its gradient."""
    labels = torch.arange(ROWS) % VOCABULARY
    logits = some_logits(dtype, 1)
    logits[3, 3] = 15.0
    exact = logits.double().requires_grad_(True)
    total = -(log_softmax(exact, -1)[torch.arange(ROWS), labels] * shares.double()).sum()
    wanted = exactly(exact, total)
    check(losses.cross_entropy(logits.requires_grad_(True), labels, shares), logits, wanted)
    if dtype in (torch.float32, torch.float64):
        (mine,) = torch.autograd.grad(losses.cross_entropy(logits, labels, shares), logits)
        assert float(mine[3, 3]) == pytest.approx(float(wanted[1][3, 3]), rel=1e-3)


@pytest.mark.parametrize("top", [0, 3, VOCABULARY])
@pytest.mark.parametrize("dtype", TYPES)
def test_bregman_is_the_divergence_of_linear_logits(dtype: torch.dtype, shares: Tensor, top: int) -> None:
    """By a head's inputs: what the logits hand down and what is taken off along the tangent come to its gradient."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(8, VOCABULARY, generator=generator).double()
    base, moved = (torch.randn(ROWS, 8, generator=generator).double() for _ in range(2))
    inputs = moved.clone().requires_grad_(True)
    terms = kl_div(log_softmax(inputs @ head, -1), log_softmax(base @ head, -1), reduction="none", log_target=True)
    total, gradient = exactly(inputs, (terms.sum(-1) * shares.double()).sum())
    said, level = (base @ head).softmax(-1).float(), losses.log_partition((base @ head).float())
    torch.testing.assert_close(level, (base @ head).logsumexp(-1).float())
    most = said.topk(top, -1)
    kept, slope = losses.Top(most.indices, most.values), said.scatter(-1, most.indices, 0.0).double() @ head.T
    level = level - kept.of(base @ head)
    mine = moved.to(dtype).requires_grad_(True)
    along = ((mine.float() - base.float()) * slope.float()).sum(-1)
    found = losses.bregman(mine @ head.to(dtype), along, level, kept, shares)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
    assert float(found.detach()) == pytest.approx(total, rel=tolerance)
    (pulled,) = torch.autograd.grad(2 * found, mine)
    assert float((pulled.double() - 2 * gradient).norm() / (2 * gradient).norm()) <= tolerance


def test_what_rounding_makes_negative_counts_nothing_and_pushes_all_the_same() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]], requires_grad=True)
    level = logits.detach().logsumexp(-1) + torch.tensor([1e-3, -0.5])
    along = torch.zeros(2, requires_grad=True)
    none = losses.Top(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0))
    found = losses.bregman(logits, along, level, none, torch.tensor([1.0, 2.0]))
    assert float(found.detach()) == pytest.approx(1.0, rel=1e-5)
    found.backward()
    assert along.grad is not None
    assert logits.grad is not None
    assert along.grad.tolist() == [-1.0, -2.0]
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) * torch.tensor([[1.0], [2.0]]))


def test_nothing_is_lost_where_no_gradient_is_asked_for(shares: Tensor) -> None:
    logits, wanted = some_logits(torch.float32, 0), some_logits(torch.float32, 1)
    assert not losses.divergence(wanted, logits, shares).requires_grad
    labels = torch.zeros(ROWS, dtype=torch.long)
    with_graph = logits.clone().requires_grad_(True)
    assert torch.equal(losses.cross_entropy(logits, labels, shares), losses.cross_entropy(with_graph, labels, shares))


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy", "bregman"])
def test_no_rows_are_no_loss(loss: str) -> None:
    none, empty = torch.zeros(0, VOCABULARY, requires_grad=True), torch.zeros(0)
    top = losses.Top(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    given = {"divergence": (none, none), "cross_entropy": (none, empty.long()), "bregman": (none, empty, empty, top)}
    found = getattr(losses, loss)(*given[loss], empty)
    assert float(found.detach()) == 0
    assert losses.log_partition(none).shape == (0,)
