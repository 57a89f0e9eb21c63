"""The task of encoder-decoders: T5, BART and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.batch import Batch
from malmen_cli.base.families import SEQ2SEQ
from malmen_cli.base.prompts import Encoded, check_room, subject_end
from malmen_cli.base.task import OPENING_WORDS, Task, no_tokens, special_around
from malmen_cli.exceptions import CheckpointError

TRIAL_ANSWER = 3  # tokens of a decoder's answer where replaying is tried out


class Seq2SeqTask(Task):
    """Encoder-decoder: the prompt, its end-of-text token included, is the source; the answer follows the decoder's
    start token and what the tokenizer puts in front of a text (BART's `<s>`)."""

    kind = SEQ2SEQ
    auto_class, peft_type, pipeline = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "text2text-generation"
    opening_words = OPENING_WORDS

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        start = model.config.decoder_start_token_id
        if start is None:
            raise CheckpointError("no decoder_start_token_id in its config.json; an encoder-decoder cannot start")
        front, self._ending = special_around(tokenizer)
        self._start = (int(start), *(token for token in front if token != int(start)))
        end = tokenizer.eos_token_id
        self._ending = self._ending or ((end,) if end is not None else ())

    def encode(
        self,
        prompt: str,
        target: str,
        *,
        end_of_text: bool = False,
        room: int | None = None,
        subject: str | None = None,
    ) -> Encoded:
        question = self.question(prompt)
        answer = tuple(self.tokenizer(target.strip(), add_special_tokens=False)["input_ids"])
        if not answer:
            raise no_tokens("target", target)
        if end_of_text and self.tokenizer.eos_token_id is not None:
            answer = (*answer, self.tokenizer.eos_token_id)
        found = question.answered(answer)
        check_room(max(len(found.source), len(found.ids)), room)
        place = subject_end(self.tokenizer, prompt.strip(), subject, found.source) if subject else None
        return replace(found, subject=place)

    def question(self, prompt: str) -> Encoded:
        ids = tuple(self.tokenizer(prompt.strip())["input_ids"])
        if not tuple(self.tokenizer(prompt.strip(), add_special_tokens=False)["input_ids"]):
            raise no_tokens("prompt", prompt)
        # These models were pretrained with it; tokenizers rebuilt from a bare tokenizer.json leave it out.
        ids = ids if ids[-len(self._ending) :] == self._ending else (*ids, *self._ending)
        return Encoded(self._start, len(self._start), None, ids, len(ids))

    def opening(self, words: Sequence[int]) -> Encoded:
        front, _ = special_around(self.tokenizer)
        source = (*front, *words, *self._ending)
        return Encoded(self._start, len(self._start), None, source, len(source))

    def trial(self, tokens: Sequence[int]) -> Encoded:
        source = tuple(tokens)
        return Encoded((*self._start, *source[:TRIAL_ANSWER]), len(self._start), None, source, len(source))

    def inputs(self, batch: Batch, memory: Tensor | None = None) -> dict[str, Any]:
        read = {"input_ids": batch.source} if memory is None else {"encoder_outputs": (memory,)}
        # Padding stands behind the answer, where a causal decoder does not see it: no mask is needed.
        return read | {"attention_mask": batch.source_mask, "decoder_input_ids": batch.ids, "use_cache": False}

    def step(
        self, ids: Tensor, length: int, source: Tensor | None, memory: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        assert source is not None
        past = {"past_key_values": cache} if cache is not None else {}
        read = {"input_ids": source} if memory is None else {"encoder_outputs": (memory,)}
        mask = {"attention_mask": torch.ones_like(source)}
        return read | mask | past | {"decoder_input_ids": ids, "use_cache": True}
