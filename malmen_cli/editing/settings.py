"""Settings of a method, and the one way a mapping of settings becomes a checked dataclass."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from malmen_cli.exceptions import SpecError

S = TypeVar("S")

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_BRIEF.maxlevel = 3


ROUNDS = 4  # small steps that correct each other beat one large one, which no locality survives


@dataclass(frozen=True)
class MalmenSettings:
    """MALMEN and its relatives. MEND is `aggregation: sum`; the untrained form is `network: identity`."""

    modules: tuple[str, ...] | None = None  # patterns; default: the second MLP matrix of blocks at 60% to 92% of depth
    last_blocks: int | None = None  # instead: of the last so many blocks (the paper: 6)
    tokens: Literal["answer", "subject", "all"] = "subject"  # where rows are taken: see capture.places
    aggregation: Literal["ridge", "sum"] = "ridge"
    network: Literal["mlp", "identity"] = "mlp"
    rank: int = 256
    blocks: int = 2  # of the hyper-network, as in the paper
    centre: bool = True  # subtract the mean of keys and gradients before the hyper-network
    rounds: int | None = None  # passes over the facts, each on the model edited so far; default: ROUNDS, MEND's sum 1
    end_of_text: bool = True  # append end-of-text to targets, so that greedy answers stop
    ridge_lambda: float = 1.0  # in units of the keys' mean square entry
    preserved_rank: int = 256  # of C0; 0 leaves the preserved-key term out
    preserved_weight: float = 0.1  # mu at the start, for every edited row

    @property
    def passes(self) -> int:
        """How often the facts are gone over."""
        if self.rounds is not None:
            return self.rounds
        return 1 if self.aggregation == "sum" else ROUNDS

    def __post_init__(self) -> None:
        given = [name for name in ("last_blocks", "rounds") if getattr(self, name) is not None]
        at_least(self, 1, "rank", *given)
        at_least(self, 0, "blocks", "preserved_rank", "preserved_weight")
        above_zero(self, "ridge_lambda")


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tuning of one matrix: LocFT-BF (Yang et al., arXiv 2509.22072), whose published runs take 25 epochs."""

    modules: tuple[str, ...] | None = None  # patterns that name one matrix; default: the second MLP matrix of `block`
    block: int | None = None  # counted from 0; default: five sixths of the way up, see methods/finetune.py
    epochs: int = 25  # at most
    batch_facts: int = 16  # facts behind one step of Adam
    lr: float = 1e-3
    weight_decay: float = 0.0  # AdamW's, of the shift: it pulls the matrix back to the base's
    max_relative_norm: float | None = None  # of the shift to the matrix, Frobenius; default: unbounded
    end_of_text: bool = True  # append end-of-text to targets, so that greedy answers stop
    stop_loss: float = 0.02  # an epoch with a mean loss below, in nats a token, is the last; 0 runs every epoch

    @property
    def passes(self) -> int:
        """How often the facts are gone over, at most."""
        return self.epochs

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "batch_facts")
        at_least(self, 0, "weight_decay", "stop_loss", *(["block"] if self.block is not None else []))
        above_zero(self, "lr", *(["max_relative_norm"] if self.max_relative_norm is not None else []))
        if self.modules and self.block is not None:
            raise SpecError("block: `modules` names the matrix already; give one of the two")


LEAST_LAMBDA, LAMBDA_A_FACT = (
    1000.0,
    4.0,
)  # the best tried at 64 and at 1,024 facts (docs/memit.md)


@dataclass(frozen=True)
class MemitSettings:
    """MEMIT (Meng et al., arXiv 2210.07229), with its defaults but for lambda and prefixes; ROME and AlphaEdit: other
    constraints.

    Lambda is 15,000 in the paper, for GPT-J and 10,000 facts: beside the keys of a few facts that leaves next to
    nothing of an edit, so it is chosen by their number (see for_facts). Five prefixes, as in the authors' code, there
    cost six times the work and teach less (docs/memit.md).

    `least_squares` is MEMIT's, `equality` ROME's (arXiv 2202.05262), `null_space` AlphaEdit's (arXiv 2410.02355).
    """

    modules: tuple[str, ...] | None = None  # patterns, one matrix a block; default: the second MLP matrix of `blocks`
    blocks: tuple[int, ...] | None = None  # counted from 0; default: five from an eighth of the depth on, ROME: one
    constraint: Literal["least_squares", "equality", "null_space"] = "least_squares"
    steps: int = 25  # of Adam for a fact's target, at most
    lr: float = 0.5  # Adam's
    clamp: float = 0.75  # of a target's distance to the hidden state's norm
    kl_factor: float = 0.0625  # of what the edit changes behind '{subject} is a'
    decay: float = 0.5  # of the target's squared distance, relative to the hidden state's squared norm
    stop_loss: float = 0.05  # nats a token, below which a fact's target is found
    prefixes: int = 0  # texts of the base's own in front of the prompt, beside the prompt alone (docs/memit.md)
    prefix_tokens: int = 10
    moment_weight: float | None = None  # lambda: of E[k k'] beside the facts' own keys; default: 1,000, or 4 a fact
    null_threshold: float = 0.02  # eigenvalues of E[k k'] below are free to be edited; null_space alone
    ridge: float = 10.0  # lambda_2, of ||S||^2; null_space alone
    stats_tokens: int = 20_000  # of text that E[k k'] is taken over, at most
    end_of_text: bool = True  # append end-of-text to targets, so that greedy answers stop

    @property
    def passes(self) -> int:
        """How often the facts are gone over."""
        return 1

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "prefix_tokens", "stats_tokens")
        at_least(self, 0, "kl_factor", "decay", "stop_loss", "prefixes")
        above_zero(self, "lr", "clamp", "null_threshold", "ridge")
        if self.moment_weight is not None:
            above_zero(self, "moment_weight")
        if self.modules and self.blocks is not None:
            raise SpecError("blocks: `modules` names the matrices already; give one of the two")
        if self.blocks is not None and (not self.blocks or min(self.blocks) < 0):
            raise SpecError(f"blocks: must be numbers from 0, not {brief(list(self.blocks))}")

    def for_facts(self, count: int) -> MemitSettings:
        """With lambda for so many facts, where it was left open: what pulls at the weights grows with them, so what
        holds these has to grow too."""
        weight = max(LEAST_LAMBDA, LAMBDA_A_FACT * count)
        return self if self.moment_weight is not None else replace(self, moment_weight=weight)


def brief(value: object) -> str:
    """`repr` of what a spec says, for an error message: its middle is left out where it is long."""
    return _BRIEF.repr(value)


def at_least(settings: object, least: float, *names: str) -> None:
    """Raise SpecError for the first named setting below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise SpecError(f"{name}: must be at least {least}, not {getattr(settings, name)}")


def above_zero(settings: object, *names: str) -> None:
    """Raise SpecError for the first named setting that is not above zero."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise SpecError(f"{name}: must be above 0, not {getattr(settings, name)}")


def from_mapping(cls: type[S], given: Mapping[str, Any], where: str) -> S:
    """A settings dataclass from plain data; every key must be a field and every value of its type.

    Raises SpecError naming the place, the key and, for a misspelt one, the nearest field.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), list(known), 1)
            raise SpecError(
                f"{where}: unknown setting {brief(key)}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
            )
    values = {}
    for name, field in known.items():
        if name in given:
            values[name] = _checked(given[name], hints[name], f"{where}.{name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SpecError(f"{where}: {name} is missing")
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}.{error}") from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise SpecError(f"{where}: {brief(value)} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise SpecError(f"{where}: expected a list of {arguments[0].__name__}, not {brief(value)}")
        return tuple(_checked(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not isfinite(value):
        raise SpecError(f"{where}: must be a finite number, not {value}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise SpecError(f"{where}: expected {hint.__name__}, not {brief(value)}")
    return value
