"""The hyper-network and the moments that its normaliser is frozen from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from malmen_cli.editing.hypernetwork import HyperNetwork, Moments

F64 = torch.float64
M, R, DK, DV = 2, 3, 5, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def role(number: int, rows: int) -> Tensor:
    return torch.full((rows,), number)


def network(blocks: int = 2, seed: int = 0, roles: int = R) -> HyperNetwork:
    generator = torch.Generator().manual_seed(seed)
    return HyperNetwork(M, DK, DV, rank=4, blocks=blocks, roles=roles, generator=generator).double()


@torch.no_grad()
def stirred(blocks: int = 2) -> HyperNetwork:
    net = network(blocks)
    for i, parameter in enumerate(net.parameters()):
        parameter += 0.3 * normal(*parameter.shape, seed=i)
    net.mean.copy_(normal(M, R, DK + DV, seed=50))
    net.std.copy_(normal(M, R, DK + DV, seed=51).abs() + 0.5)
    net.limit.copy_(1 + normal(M, R, seed=52).abs())  # some rows are beyond it
    return net


# ---------------------------------------------------------------- moments


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**31), st.floats(-3, 3))
def test_any_chunking_gives_the_variance(sizes: list[int], seed: int, offset: float) -> None:
    """T4: of any numbers of rows, one among them."""
    rows = normal(M, sum(sizes), 4, seed=seed, dtype=torch.float32) + offset
    moments = Moments(M, 4)
    for part in rows.split(sizes, 1):
        moments.add(part)
    assert moments.count == sum(sizes)
    if sum(sizes) > 1:
        torch.testing.assert_close(moments.variance, rows.double().var(1), rtol=1e-6, atol=1e-12)
    if sum(sizes) > 0:
        torch.testing.assert_close(moments.mean, rows.double().mean(1), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(moments.mean_square, rows.double().square().mean(1), rtol=1e-6, atol=1e-12)


def test_small_variance_on_a_large_mean_is_not_lost() -> None:
    rows = 1e4 + 1e-3 * normal(1, 2000, 2)
    moments = Moments(1, 2)
    for part in rows.split(7, 1):
        moments.add(part)
    torch.testing.assert_close(moments.variance, rows.var(1), rtol=1e-6, atol=0)


def test_no_row_and_one_row_have_no_variance() -> None:
    moments = Moments(M, 4)
    moments.add(torch.zeros(M, 0, 4))
    assert moments.count == 0
    assert not moments.variance.any()
    moments.add(torch.full((M, 1, 4), 3.0))
    assert moments.count == 1
    assert not moments.variance.any()
    assert moments.mean.eq(3).all()
    assert moments.mean_square.eq(9).all()


# ---------------------------------------------------------------- normaliser


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 30])
def test_the_normaliser_of_few_rows_is_finite(centre: bool, rows: int) -> None:
    """T4: statistics of one row are finite."""
    features = normal(M, rows, DK + DV, seed=3)
    moments = Moments(M, DK + DV)
    moments.add(features)
    net = network()
    net.normalise_by(moments, centre=centre, role=1)
    assert bool((net.std > 0).all())
    values = net.value_shifts(features[..., :DK], features[..., DK:], role(1, rows))
    assert bool(values.isfinite().all())


def test_centred_features_have_mean_zero_and_variance_one() -> None:
    keys, gradients = 7 + 3 * normal(M, 200, DK), 1e-5 * normal(M, 200, DV, seed=1)
    moments = Moments(M, DK + DV)
    moments.add(torch.cat([keys, gradients], -1))
    net = network()
    net.normalise_by(moments, centre=True, role=2)
    for part in net.features(keys, gradients, role(2, 200)):
        torch.testing.assert_close(part.mean(1), torch.zeros_like(part[:, 0]), rtol=0, atol=1e-9)
        torch.testing.assert_close(part.var(1), torch.ones_like(part[:, 0]), rtol=1e-9, atol=0)


def test_without_centring_features_have_mean_square_one_and_keep_their_sign() -> None:
    keys, gradients = 7 + 3 * normal(M, 200, DK), 1e-5 * normal(M, 200, DV, seed=1)
    moments = Moments(M, DK + DV)
    moments.add(torch.cat([keys, gradients], -1))
    net = network()
    net.mean.fill_(3.0)  # of an earlier, centred calibration
    net.normalise_by(moments, centre=False)
    for part, raw in zip(net.features(keys, gradients, role(0, 200)), (keys, gradients), strict=True):
        torch.testing.assert_close(part.square().mean(1), torch.ones_like(part[:, 0]), rtol=1e-9, atol=0)
        assert part.sign().eq(raw.sign()).all()


def test_a_feature_that_never_moved_is_not_blown_up() -> None:
    features = normal(M, 50, DK + DV)
    features[..., 2] = 4.0
    moments = Moments(M, DK + DV)
    moments.add(features)
    net = network()
    net.normalise_by(moments, centre=True)
    assert bool((net.std[:, 0, 2] > 0.1).all())


def test_small_gradients_beside_huge_keys_are_not_taken_for_dead() -> None:
    """Massive activations are thousands, value gradients of a confident model millionths."""
    keys, gradients = normal(M, 80, DK), 1e-6 * normal(M, 80, DV, seed=1)
    keys[..., 0] *= 3e3
    moments = Moments(M, DK + DV)
    moments.add(torch.cat([keys, gradients], -1))
    net = network()
    net.normalise_by(moments, centre=True)
    pseudo = net.features(keys, gradients, role(0, 80))[1]
    torch.testing.assert_close(pseudo.var(1), torch.ones(M, DV, dtype=F64), rtol=1e-9, atol=0)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_start_is_the_identity_on_normalised_features(blocks: int) -> None:
    net = network(blocks)
    net.mean.fill_(0.5)
    net.std.fill_(2.0)
    keys, gradients = normal(M, 6, DK), normal(M, 6, DV, seed=1)
    pseudo_keys, pseudo_gradients = net.features(keys, gradients, torch.arange(6) % R)
    torch.testing.assert_close(pseudo_keys, (keys - 0.5) / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(pseudo_gradients, (gradients - 0.5) / 2, rtol=1e-14, atol=0)


def test_the_first_backward_reaches_up_and_bias() -> None:
    net = network()
    net.value_shifts(normal(M, 6, DK), normal(M, 6, DV, seed=1), torch.arange(6) % R).square().sum().backward()
    for name in ("up", "bias", "shift", "log_lr"):
        gradient = getattr(net, name).grad
        assert gradient is not None
        assert bool(gradient.flatten(1).any(-1).all() if gradient.dim() > 1 else gradient.all()), name


def test_down_starts_at_one_over_the_root_of_the_width() -> None:
    net = HyperNetwork(1, 300, 100, rank=64, blocks=2, generator=torch.Generator().manual_seed(0))
    assert float(net.down.detach().std()) == pytest.approx(1 / math.sqrt(400), rel=0.02)


def test_value_shifts_by_hand() -> None:
    """k = (1, 2), g = 3, mean 1, std 2, step e^0.5: k~ = (0, .5), g~ = 1, so d = -e^0.5 * 1 * 1."""
    net = HyperNetwork(1, 2, 1, rank=1, blocks=0).double()
    net.mean.fill_(1.0)
    net.std.fill_(2.0)
    net.log_lr.data.fill_(0.5)
    key, gradient = torch.tensor([[[1.0, 2.0]]], dtype=F64), torch.tensor([[[3.0]]], dtype=F64)
    shifts = net.value_shifts(key, gradient, role(0, 1))
    assert shifts.item() == pytest.approx(-math.exp(0.5) * (1 * 0 + 2 * 0.5) * 1, rel=1e-15)


def test_blocks_row_by_row_as_in_the_paper() -> None:
    net = stirred()
    keys, gradients = normal(M, 4, DK, seed=8), normal(M, 4, DV, seed=9)
    roles = [2, 0, 1, 0]
    pseudo_keys, pseudo_gradients = net.features(keys, gradients, torch.tensor(roles))
    for m in range(M):
        for j, r in enumerate(roles):
            y = (torch.cat([keys[m, j], gradients[m, j]]) - net.mean[m, r]) / net.std[m, r]
            for i in range(2):
                hidden = torch.relu(y @ net.down[i] @ net.up[i] + net.bias[i])
                y = y + net.scale[i, m, r] * hidden + net.shift[i, m, r]
            torch.testing.assert_close(pseudo_keys[m, j], y[:DK], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(pseudo_gradients[m, j], y[DK:], rtol=1e-12, atol=1e-12)


def test_gradients_of_the_network() -> None:
    """T2: of every parameter, the step included."""
    net = stirred()
    keys, gradients = normal(M, 3, DK, seed=8), normal(M, 3, DV, seed=9)
    parameters = [net.down, net.up, net.bias, net.scale, net.shift, net.log_lr]
    roles = torch.tensor([2, 0, 2])
    assert torch.autograd.gradcheck(lambda *_: net.value_shifts(keys, gradients, roles), parameters, fast_mode=True)


def test_the_seed_decides_the_start() -> None:
    assert torch.equal(network(seed=1).down, network(seed=1).down)
    assert not torch.equal(network(seed=1).down, network(seed=2).down)


def test_no_row_pushes_harder_than_the_limit_of_its_module_and_role() -> None:
    """Keys a hundred times the others' would push ten thousand times as hard; the direction stays."""
    net, roles = network(0), torch.tensor([0, 1, 2, 1, 0])
    net.limit.copy_(torch.tensor([[1.0, 30.0, 1e9], [1e9, 2.0, 5.0]]))
    keys, gradients = normal(M, 5, DK, seed=8), normal(M, 5, DV, seed=9)
    keys[:, 1:4] *= 100
    found = net.value_shifts(keys, gradients, roles)
    for m in range(M):
        for j, r in enumerate(roles.tolist()):
            push = keys[m, j].square().sum() * gradients[m, j]
            bounded = push * min(1.0, float(net.limit[m, r] / push.norm()))
            torch.testing.assert_close(found[m, j], -bounded, rtol=1e-12, atol=0)
            assert float(found[m, j].detach().norm()) <= float(net.limit[m, r]) * (1 + 1e-12)
    net.std[..., :DK] = -1  # every pseudo-key opposed to its key
    torch.testing.assert_close(net.value_shifts(keys, gradients, roles), -found, rtol=1e-12, atol=0)


def test_a_row_that_is_learned_pushes_in_proportion_to_what_is_left() -> None:
    """The network's bias answers a gradient of zero as well; the row's own share of a tenth of the usual one counts."""
    net, roles = stirred(), torch.tensor([0, 1, 2, 1, 0])
    keys, gradients = normal(M, 5, DK, seed=8), normal(M, 5, DV, seed=9)
    usual = (net.mean[..., DK:].square() + net.std[..., DK:].square()).sum(-1).sqrt()[:, roles, None]
    unit = gradients / gradients.norm(dim=-1, keepdim=True) * usual

    def shifts(share: float) -> Tensor:
        return net.value_shifts(keys, share * unit, roles, damped=True).detach()

    plain = net.value_shifts(keys, 0.02 * unit, roles).detach()
    torch.testing.assert_close(shifts(0.02), 0.2 * plain)
    none, faint, edge, beyond = (shifts(share) for share in (0.0, 0.02, 0.1, 0.1000001))
    assert float(none.abs().max()) == 0
    pseudo = net.features(keys, torch.zeros_like(gradients), roles)[1]
    assert float(pseudo.detach().norm(dim=-1).min()) > 0.1
    torch.testing.assert_close(edge, beyond, rtol=1e-5, atol=1e-6)  # no step where it begins
    sizes, edges = faint.norm(dim=-1), edge.norm(dim=-1)
    assert bool((sizes < 0.4 * edges).all())
    whole = network(0)  # without blocks, and so without a bias, it is linear in the gradient already
    torch.testing.assert_close(
        whole.value_shifts(keys, 1e-6 * gradients, roles, damped=True),
        1e-6 * whole.value_shifts(keys, gradients, roles),
    )


def test_before_calibration_there_is_no_limit() -> None:
    keys, gradients = 1e6 * normal(M, 5, DK, seed=8), normal(M, 5, DV, seed=9)
    found = network(0).value_shifts(keys, gradients, role(0, 5))
    torch.testing.assert_close(found, -keys.square().sum(-1, keepdim=True) * gradients, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- roles


def moments_of(keys: Tensor, gradients: Tensor) -> Moments:
    moments = Moments(M, DK + DV)
    moments.add(torch.cat([keys, gradients], -1))
    return moments


@pytest.mark.parametrize("centre", [True, False])
def test_rows_are_normalised_with_the_moments_of_their_role(centre: bool) -> None:
    """Keys and gradients of three scales, in one call and out of order."""
    roles = torch.arange(90) % R
    size = torch.tensor([1.0, 40.0, 1e-3], dtype=F64)[roles, None]
    keys, gradients = size * (3 + normal(M, 90, DK)), size * normal(M, 90, DV, seed=1)
    net = network()
    for r in range(R):
        net.normalise_by(moments_of(keys[:, roles == r], gradients[:, roles == r]), centre=centre, role=r)
    found = torch.cat(net.features(keys, gradients, roles), -1)
    for r in range(R):
        mine = found[:, roles == r]
        spread = mine.var(1) if centre else mine.square().mean(1)
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-9, atol=0)
        if centre:
            torch.testing.assert_close(mine.mean(1), torch.zeros_like(mine[:, 0]), rtol=0, atol=1e-9)


def test_freezing_one_role_leaves_the_others() -> None:
    net = stirred()
    mean, std = net.mean.clone(), net.std.clone()
    net.normalise_by(moments_of(normal(M, 9, DK), normal(M, 9, DV, seed=1)), centre=True, role=1)
    for before, after in ((mean, net.mean), (std, net.std)):
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
        assert not bool((after[:, 1] == before[:, 1]).any())


def of_one_role(net: HyperNetwork, number: int) -> HyperNetwork:
    """A network without roles that holds one role's part of `net`."""
    alone = network(len(net.down), roles=1)
    alone.load_state_dict(
        {
            name: tensor[..., number : number + 1, :]
            if name in ("mean", "std", "scale", "shift")
            else (tensor[:, number : number + 1] if tensor.shape == (M, R) else tensor)
            for name, tensor in net.state_dict().items()
        }
    )
    return alone


@pytest.mark.parametrize("blocks", [0, 2])
def test_three_roles_are_three_networks_that_share_their_matrices(blocks: int) -> None:
    net, roles = stirred(blocks), torch.tensor([0, 1, 2, 2, 0, 1, 1])
    keys, gradients = normal(M, 7, DK, seed=8), normal(M, 7, DV, seed=9)
    pseudo = net.features(keys, gradients, roles)
    values = net.value_shifts(keys, gradients, roles)
    for r in range(R):
        alone, mine = of_one_role(net, r), roles == r
        given = keys[:, mine], gradients[:, mine], role(0, int(mine.sum()))
        for found, wanted in zip(pseudo, alone.features(*given), strict=True):
            torch.testing.assert_close(found[:, mine], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(values[:, mine], alone.value_shifts(*given), rtol=1e-12, atol=1e-12)


def test_the_order_of_rows_does_not_matter() -> None:
    net, roles, order = stirred(), torch.tensor([0, 1, 2, 2, 0]), torch.tensor([3, 0, 4, 1, 2])
    keys, gradients = normal(M, 5, DK, seed=8), normal(M, 5, DV, seed=9)
    found = net.value_shifts(keys[:, order], gradients[:, order], roles[order])
    torch.testing.assert_close(found, net.value_shifts(keys, gradients, roles)[:, order], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_value_shift_is_scaled_by_the_step_of_its_module_and_role() -> None:
    net, roles = stirred(), torch.tensor([0, 1, 2, 1])
    keys, gradients = normal(M, 4, DK, seed=8), normal(M, 4, DV, seed=9)
    net.log_lr.zero_()
    unit = net.value_shifts(keys, gradients, roles)
    net.log_lr.copy_(torch.arange(6.0).reshape(M, R) / 2)
    found = net.value_shifts(keys, gradients, roles)
    for m in range(M):
        for j, r in enumerate(roles.tolist()):
            torch.testing.assert_close(found[m, j], math.exp((3 * m + r) / 2) * unit[m, j], rtol=1e-12, atol=0)
    torch.testing.assert_close(net.steps(roles)[..., 0], (torch.arange(6.0).reshape(M, R) / 2).exp().double()[:, roles])


def test_a_role_without_rows_gets_no_gradient() -> None:
    net = stirred()
    net.value_shifts(normal(M, 6, DK), normal(M, 6, DV, seed=1), torch.arange(6) % 2).square().sum().backward()
    for name in ("log_lr", "scale", "shift"):
        gradient = getattr(net, name).grad
        by_role = gradient.reshape(-1, M, R, gradient[0].numel() // (M * R) if name != "log_lr" else 1)
        assert not by_role[:, :, 2].any(), name
        assert by_role[:, :, :2].flatten(2).any(-1).all(), name
