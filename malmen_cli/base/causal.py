"""The task of decoder-only language models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.batch import Batch
from malmen_cli.base.families import CAUSAL
from malmen_cli.base.prompts import Encoded, encode, encode_prompt
from malmen_cli.base.task import Task, no_tokens


class CausalTask(Task):
    """Decoder-only: prompt and answer are one text."""

    kind = CAUSAL
    auto_class, peft_type, pipeline = "AutoModelForCausalLM", "CAUSAL_LM", "text-generation"

    @property
    def pad_id(self) -> int:
        return 0  # hidden by the mask, and always in the vocabulary, which a config's -1 is not

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def encode(
        self,
        prompt: str,
        target: str,
        *,
        end_of_text: bool = False,
        room: int | None = None,
        subject: str | None = None,
    ) -> Encoded:
        return encode(self.tokenizer, prompt, target, end_of_text=end_of_text, room=room, subject=subject)

    def question(self, prompt: str) -> Encoded:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise no_tokens("prompt", prompt)
        return Encoded(ids, len(ids))

    def opening(self, words: Sequence[int]) -> Encoded:
        begin = self.tokenizer.bos_token_id
        ids = tuple(words) if begin is None else (begin, *words)
        return Encoded(ids, len(ids))

    def trial(self, tokens: Sequence[int]) -> Encoded:
        return Encoded(tuple(tokens), 2)

    def inputs(self, batch: Batch, memory: Tensor | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False, "attention_mask": batch.mask}
        if self._takes_positions:
            options["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        return options

    def step(
        self, ids: Tensor, length: int, source: Tensor | None, memory: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        past = {"past_key_values": cache} if cache is not None else {}
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": True} | past
