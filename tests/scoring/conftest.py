"""Loaded tiny models, and a model whose every next token is dictated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from malmen_cli.base.model import Base

OpenBase = Callable[..., Base]
WORDS = ("<unk>", "<end>", "\n", "a", "b", "c", "d", "e", "f", "g", "x", "y", "z", "</s>")


class Dictated(nn.Module):
    """A model without a cache whose next token depends on the last one only: `follows[last]`, else `z`.

    `batches` records the (rows, width) of every forward.
    """

    def __init__(self, tokenizer: Any, follows: Mapping[str, str]) -> None:
        super().__init__()
        table = {
            tokenizer.convert_tokens_to_ids(last): tokenizer.convert_tokens_to_ids(then)
            for last, then in follows.items()
        }
        size = len(tokenizer)
        self.head = nn.Linear(size, size, bias=False)
        self.head.weight.data.zero_()
        for last in range(size):
            self.head.weight.data[table.get(last, tokenizer.convert_tokens_to_ids("z")), last] = 4.0
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(eos_token_id=None), is_encoder_decoder=False
        )
        self.batches: list[tuple[int, int]] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:
        self.batches.append((input_ids.shape[0], input_ids.shape[1]))
        return SimpleNamespace(logits=self.head(nn.functional.one_hot(input_ids, self.head.in_features).float()))


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token a word, split at spaces; `<end>` is the end of text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


@pytest.fixture
def dictated(word_tokenizer: Any) -> Callable[[Mapping[str, str]], Base]:
    """`dictated({"a": "b"}) -> Base`: after `a` it says `b`."""

    def build(follows: Mapping[str, str]) -> Base:
        return Base(
            "dictated", Path("nowhere"), None, "0" * 64, Dictated(word_tokenizer, follows).eval(), word_tokenizer
        )

    return build


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], Base]:
    """`opened(folder) -> Base`, loaded anew each time."""

    def build(folder: Path) -> Base:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
        return Base(str(folder), folder, None, "0" * 64, model, AutoTokenizer.from_pretrained(folder))

    return build
