"""Settings of meta-training, with the reason for each default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from malmen_cli.editing.settings import above_zero, at_least
from malmen_cli.exceptions import SpecError


@dataclass(frozen=True)
class TrainingSettings:
    """How an editor is trained. Sizes are facts unless said."""

    steps: int = 400
    facts_per_step: tuple[int, ...] = (64, 512)  # edited at once: one size, or log-uniform between two
    meta_facts: int = 64  # of those, whose rephrases and probes the meta-loss is taken on; it is linear in cost
    judged_facts: int = 4096  # that the meta-loss draws from: the base answers each of their probes once
    meta_lr: float = 1e-3
    scale_lr: float = 3e-2  # of log step, log lambda and log mu, which hardly move at the network's rate
    locality_weight: float = 5.0
    continuation: int = 6  # tokens of the base's own greedy text after a locality probe that must stay
    clip: float = 1.0
    warmup: int = 10  # steps
    validate_every: int = 25  # steps
    valid_facts: int = 256  # edited at once and scored teacher-forced at every validation
    valid_fraction: float = 0.05  # held out by subject where no validation facts are given
    calibration_facts: int = 128
    preserved_prompts: int = 3000  # training prompts and probes whose keys make C0

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "steps",
            "meta_facts",
            "judged_facts",
            "continuation",
            "validate_every",
            "valid_facts",
            "calibration_facts",
        )
        at_least(self, 0, "locality_weight", "warmup", "preserved_prompts")
        above_zero(self, "meta_lr", "scale_lr", "clip", "valid_fraction")
        if not self.facts_per_step or len(self.facts_per_step) > 2 or min(self.facts_per_step) < 1:
            raise SpecError(f"facts_per_step: one or two sizes of at least 1, not {list(self.facts_per_step)}")
        if self.valid_fraction >= 1:
            raise SpecError(f"valid_fraction: must be below 1, not {self.valid_fraction}")

    def schedule(self, step: int) -> float:
        """The share of its rates that `step` (from 0) learns at: a linear warm-up, then a cosine to a tenth."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return warm * (0.55 + 0.45 * math.cos(math.pi * step / max(self.steps, 1)))
