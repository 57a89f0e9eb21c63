"""What a training says of itself: a line for every step, the best editor so far, and the one that is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from malmen_cli.training.validation import Validation


@dataclass
class Progress:
    """One line of a training's history. `validation` is set where the editor was validated."""

    step: int
    learned: float
    moved: float
    facts: int
    seconds: float
    validation: Validation | None = None

    @classmethod
    def from_plain(cls, item: dict[str, Any]) -> Progress:
        """The opposite of `dataclasses.asdict`."""
        validation = item["validation"]
        return cls(**item | {"validation": Validation(**validation) if validation else None})


@dataclass
class Best:
    """The best editor so far by validation score, as its state."""

    step: int = -1
    rank: tuple[float, float] = (-1.0, -1.0)  # Validation.rank
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The best editor as it is saved, the factor chosen for its steps, and the validation of exactly that: on all facts
    at once, and in `parts` parts."""

    state: dict[str, Tensor]
    step_factor: float
    validation: Validation
    in_parts: Validation
    parts: int
