"""Second moments of keys, streamed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.moments import second_moments
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import NumericsError

Load = Callable[..., Base]
NAMES = {
    "gpt2": [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)],
    "llama": [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)],
}


def texts(count: int = 9) -> list[Encoded]:
    ids = [tuple((7 * i + 11 * j) % 300 for j in range(3 + i)) for i in range(count)]
    return [Encoded(text, len(text)) for text in ids]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_streamed_moments_are_the_direct_ones(load: Load, family: str, batch_size: int) -> None:
    """Of all keys stacked, each text run by itself and unpadded. Tolerance: fp32 keys of batches of another shape."""
    base, counted = load(family), []
    found = second_moments(Runner(base), texts(), NAMES[family], batch_size, counted.append)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES[family]}
    handles = [
        base.model.get_submodule(name).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        for name, kept in seen.items()
    ]
    with torch.no_grad():
        for text in texts():
            base.model(torch.tensor([text.ids]))
    for handle in handles:
        handle.remove()
    for name, parts in seen.items():
        keys = torch.cat(parts).double()
        assert len(keys) == sum(counted) == sum(len(text.ids) for text in texts())
        torch.testing.assert_close(found[name].double(), keys.T @ keys / len(keys), rtol=1e-5, atol=1e-6)
        assert found[name].dtype == torch.float32


def test_keys_that_are_not_finite_name_their_module(load: Load) -> None:
    base = load("gpt2")
    bias = base.model.transformer.h[1].mlp.c_fc.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = torch.nan
        with pytest.raises(NumericsError, match=r"^transformer\.h\.1\.mlp\.c_proj: its keys are not finite"):
            second_moments(Runner(base), texts(), NAMES["gpt2"], 4)
    finally:
        bias.data.copy_(kept)
