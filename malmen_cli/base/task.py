"""What a model is asked and how it answers: everything in which tasks differ, one subclass and file each.

A causal language model continues the prompt. An encoder-decoder reads the prompt in its encoder and writes the answer
in its decoder. A sequence classifier reads a claim and answers with a label: here it is an encoder-decoder whose
decoder makes one step, over labels instead of tokens. What runs a model, edits it or scores it asks its task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from malmen_cli.base.batch import Batch, make_batch
from malmen_cli.base.families import CAUSAL
from malmen_cli.base.prompts import Encoded
from malmen_cli.exceptions import FactsError, Problem

OPENING_WORDS = 8  # that an encoder reads where a model's own text is asked for


class Task(ABC):
    """A model's way of being asked.

    auto_class: what loads it in transformers; peft_type: its task in PEFT; pipeline: on the hub.
    """

    kind: ClassVar[str]
    auto_class: ClassVar[str]
    peft_type: ClassVar[str | None]
    pipeline: ClassVar[str]
    longest_answer: ClassVar[int | None] = None  # in tokens
    opening_words: ClassVar[int] = 1  # random words that a text of the model's own starts from

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def record(self) -> dict[str, str]:
        """What a manifest's `base` says of the task: see `recorded_task`."""
        return {"task": self.kind} if self.kind != CAUSAL else {}

    @property
    def behind(self) -> tuple[int, ...]:
        """What is kept behind the model's own answer: whether it ends there is part of what it says."""
        return (self.tokenizer.eos_token_id or 0,)

    @property
    def ends_answers(self) -> bool:
        """Whether an answer can be given an end of its own (see `encode`)."""
        return self.tokenizer.eos_token_id is not None

    @property
    def pad_id(self) -> int:
        """What batches are padded with: what an encoder may look for itself to tell padding."""
        pad = self.model.config.pad_token_id
        return 0 if pad is None else int(pad)

    @abstractmethod
    def encode(
        self,
        prompt: str,
        target: str,
        *,
        end_of_text: bool = False,
        room: int | None = None,
        subject: str | None = None,
    ) -> Encoded:
        """A prompt and its answer in tokens.

        end_of_text: the answer ends as the model's own would. room: the most tokens the model reads. subject: what the
        fact is about, looked for in the prompt. Raises FactsError for what has no tokens, too many, or no label.
        """

    @abstractmethod
    def question(self, prompt: str) -> Encoded:
        """A prompt without an answer. Raises FactsError where it has no tokens."""

    @abstractmethod
    def opening(self, words: Sequence[int]) -> Encoded:
        """What a text of the model's own starts from: token ids of a few words, as a question."""

    @abstractmethod
    def trial(self, tokens: Sequence[int]) -> Encoded:
        """Any tokens as something with an answer, to try out how the model runs."""

    @abstractmethod
    def inputs(self, batch: Batch, memory: Tensor | None = None) -> dict[str, Any]:
        """A forward's arguments. memory: (B, S, width), what the encoder gave for this batch already."""

    @abstractmethod
    def step(
        self, ids: Tensor, length: int, source: Tensor | None, memory: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        """The arguments of one step of writing on: `ids` (B, t) are new, of `length` tokens in all; none is padding.

        source: (B, S); memory: what the encoder gave for it, once it ran; cache: the model's own.
        """

    def logits(self, output: Any) -> Tensor:
        """The forward's logits over answer tokens (B, T, tokens)."""
        found: Tensor = output.logits
        return found

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text, by the tokenizer and the model's config (never its generation_config)."""
        stated = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(stated if isinstance(stated, (list, tuple)) else [stated])]
        return frozenset(int(end) for end in ends if end is not None)

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text: the first line, without special tokens or surrounding space."""
        whole = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(whole).split("\n", 1)[0].strip()

    def breaks(self, token: int) -> bool:
        """Whether a token brings a new line, at which an answer is over."""
        return "\n" in self.tokenizer.decode([token])

    def batch(self, sequences: Sequence[Encoded], device: torch.device, **options: Any) -> Batch:
        """`make_batch` with the model's padding."""
        return make_batch(sequences, device, pad_id=self.pad_id, **options)


def special_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts in front of a text and behind it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def no_tokens(field: str, text: str) -> FactsError:
    return FactsError([Problem("facts", None, field, f"{text!r} has no tokens for this tokenizer")])
