"""benchmarks/textbook_memit.py, which shares no code with editing/, finds the same targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from malmen_cli.base.families import stacks
from malmen_cli.base.model import Base
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.targets import find_targets, wordings_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS = (
    ("The capital of Australia is", "Rome", "Australia"),
    ("In Sweden the currency of Sweden is the", "one hundred degrees", "Sweden"),
    ("Hamlet was written by", "no", "Hamlet"),
)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("prefixes", [(), ("Snow is white", "Paris and Rome")])
@pytest.mark.parametrize("clamp", [0.3, 3.0])
def test_a_target_found_alone_is_that_of_the_batch(
    load: Callable[..., Base], family: str, prefixes: tuple[str, ...], clamp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance: fp32 sums in another order, through a dozen steps of Adam."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    textbook = importlib.import_module("textbook_memit")
    base = load(family, layers=4)
    facts = [wordings_of(base.tokenizer, *fact, prefixes, end_of_text=True, room=base.room) for fact in FACTS]
    settings = MemitSettings(steps=12, lr=0.1, clamp=clamp)
    half = find_targets(Runner(base, 1), 1, facts, replace(settings, steps=6), batch_size=64).losses
    settings = replace(settings, stop_loss=1.01 * float(half.median()))  # some stop before the others
    found = find_targets(Runner(base, 1), 1, facts, settings, batch_size=64)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    for row, fact in enumerate(facts):
        delta, steps = textbook.target(
            base.model, stacks(base.model)[0].blocks[1], fact.contexts, fact.essence, settings
        )
        torch.testing.assert_close(found.deltas[row], delta, rtol=1e-4, atol=1e-4)
        assert int(found.steps[row]) == steps
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
