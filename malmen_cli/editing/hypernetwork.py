"""The hyper-network: normalised key and value gradient of one row to pseudo-key and pseudo-gradient.

One network per weight shape (dk, dv), shared by the m modules of that shape; D = dk + dv. Block i computes
`y <- y + scale_i[m, r] * relu(y A_i B_i + bias_i) + shift_i[m, r]` with B_i = 0 at the start, so that the untrained
network is the identity on normalised features (MALMEN, section 3; after MEND). Normaliser, scale, shift and step are
per module m and, ours, per role r of the row's token (see capture.ROLES), since roles differ in scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EVERY = slice(None)  # of the modules
VARIANCE_FLOOR = 1e-12  # a feature that never moved is passed on unscaled by noise
# Share of its role's usual value gradient below which a damped row pushes in proportion less. A network with a bias
# answers a gradient of zero too: undamped, later passes push for what is learned as hard as for the rest, and LS pays.
FAINT = 0.1


class Moments:
    """Running mean and variance of features (m, n, D), merged exactly (Chan et al.), fp64 sums and integer counts."""

    def __init__(self, modules: int, width: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(modules, width, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.mean)

    def add(self, features: Tensor) -> None:
        """Merge rows (m, n, D); n may be 0 or 1."""
        rows = features.shape[1]
        if rows == 0:
            return
        exact = features.double()
        mean = exact.mean(1)
        squares = (exact - mean[:, None]).square().sum(1)
        total = self.count + rows
        delta = mean - self.mean
        self.mean = self.mean + delta * (rows / total)
        self.squares = self.squares + squares + delta.square() * (self.count * rows / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased variance (m, D), zero where fewer than two rows were seen."""
        return self.squares / max(self.count - 1, 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean of squares about zero (m, D)."""
        return self.squares / max(self.count, 1) + self.mean.square()


class HyperNetwork(nn.Module):
    """Value shifts of m modules of one shape from their keys and value gradients.

    rank: of each block; blocks: 0 gives the identity network. Learned besides the blocks: log step `log_lr` per
    module and role, `log_lambda` and, for every edited row, `log_mu` per module. The normaliser (mean, std) is a
    buffer, frozen after calibration.
    """

    mean: Tensor
    std: Tensor
    limit: Tensor

    def __init__(
        self,
        modules: int,
        dk: int,
        dv: int,
        *,
        rank: int,
        blocks: int,
        roles: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = dk + dv
        self.dk, self.dv = dk, dv
        self.down = nn.Parameter(torch.randn(blocks, width, rank, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(blocks, rank, width))
        self.bias = nn.Parameter(torch.zeros(blocks, width))
        self.scale = nn.Parameter(torch.ones(blocks, modules, roles, width))
        self.shift = nn.Parameter(torch.zeros(blocks, modules, roles, width))
        self.log_lr = nn.Parameter(torch.zeros(modules, roles))
        self.log_lambda = nn.Parameter(torch.zeros(modules))
        self.log_mu = nn.Parameter(torch.zeros(modules))
        self.register_buffer("mean", torch.zeros(modules, roles, width))
        self.register_buffer("std", torch.ones(modules, roles, width))
        self.register_buffer("limit", torch.full((modules, roles), torch.finfo(torch.float32).max))

    @property
    def roles(self) -> int:
        """How many roles of tokens are told apart."""
        return self.log_lr.shape[1]

    def normalise_by(self, moments: Moments, *, centre: bool, role: int = 0) -> None:
        """Freeze a role's normaliser; without centring, features are divided by their root mean square."""
        spread = moments.variance if centre else moments.mean_square
        self.mean[:, role] = moments.mean if centre else torch.zeros_like(moments.mean)
        # Keys and gradients apart: their scales have nothing to do with each other.
        parts = (spread[:, : self.dk], spread[:, self.dk :])
        typical = torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in parts], -1)
        typical = typical.clamp(min=VARIANCE_FLOOR)
        self.std[:, role] = torch.where(spread > VARIANCE_FLOOR * typical, spread, typical).sqrt()

    def features(self, keys: Tensor, gradients: Tensor, roles: Tensor, modules: slice = EVERY) -> tuple[Tensor, Tensor]:
        """Pseudo-keys (m, n, dk) and pseudo-gradients (m, n, dv) of keys (m, n, dk) and value gradients (m, n, dv).

        roles: (n,) long. modules: which ones the rows are of.
        """
        mean, std = (each[modules][:, roles] for each in (self.mean, self.std))
        y = (torch.cat([keys, gradients], -1) - mean) / std
        for down, up, bias, scale, shift in zip(self.down, self.up, self.bias, self.scale, self.shift, strict=True):
            # clamp, not relu: its gradient at 0 is 1, so that B = 0 and bias = 0 can leave the start.
            pushed = (y @ down @ up + bias).clamp(min=0)
            y = y + scale[modules][:, roles] * pushed + shift[modules][:, roles]
        return y[..., : self.dk], y[..., self.dk :]

    def steps(self, roles: Tensor, modules: slice = EVERY) -> Tensor:
        """lr of each row, (m, n, 1)."""
        return self.log_lr.exp()[modules][:, roles, None]

    def value_shifts(
        self, keys: Tensor, gradients: Tensor, roles: Tensor, modules: slice = EVERY, *, damped: bool = False
    ) -> Tensor:
        """`d_j = -lr (k_j . k~_j) g~_j`, (m, n, dv).

        `k . k~` grows with the square of a key and `g~` with the loss; a few tokens have keys forty times the
        others'. The norm of `d / lr` is bounded by `limit` (m, roles), so that no row outweighs all others. damped: it
        goes to zero with the gradient (see FAINT).
        """
        pseudo_keys, pseudo_gradients = self.features(keys, gradients, roles, modules)
        push = (keys * pseudo_keys).sum(-1, keepdim=True) * pseudo_gradients
        size = push.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(push.dtype).tiny)
        bounded: Tensor = push * (self.limit[modules][:, roles, None] / size).clamp(max=1)
        asked = self._asked(gradients, roles, modules) if damped else 1.0
        return -self.steps(roles, modules) * (bounded * asked)

    def _asked(self, gradients: Tensor, roles: Tensor, modules: slice) -> Tensor:
        """How much of its push each row is to have, (m, n, 1); all of it where nothing is a bias, without blocks and
        mean."""
        if len(self.down) == 0 and not bool(self.mean.any()):
            return torch.ones_like(gradients[..., :1])
        usual = (self.mean.square() + self.std.square())[..., self.dk :].sum(-1).sqrt()
        asked: Tensor = gradients.norm(dim=-1, keepdim=True) / (FAINT * usual[modules][:, roles, None])
        return asked.clamp(max=1)
