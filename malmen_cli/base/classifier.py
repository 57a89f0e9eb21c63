"""The task of sequence classifiers: BERT, RoBERTa and their relatives with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.batch import Batch, make_batch
from malmen_cli.base.families import CLASSIFIER, stacks
from malmen_cli.base.prompts import Encoded, check_room, subject_end
from malmen_cli.base.task import OPENING_WORDS, Task, no_tokens, special_around
from malmen_cli.exceptions import CheckpointError, FactsError, Problem

# A head with one logit that nobody named, as in the papers' fact checking: it says how likely the claim is true.
ONE_LOGIT = ("REFUTES", "SUPPORTS")
UNNAMED = "LABEL_0"  # what transformers calls it


class ClassifierTask(Task):
    """Sequence classifier: the claim is the source, the answer one label, predicted at the one step behind a start
    that stands for nothing. A head with one logit has two labels, by its sign."""

    kind = CLASSIFIER
    # PEFT's SEQ_CLS would look for a trained head in the adapter; without a task it takes the base's.
    auto_class, peft_type, pipeline = "AutoModelForSequenceClassification", None, "text-classification"
    longest_answer = 1
    opening_words = OPENING_WORDS

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.labels = label_names(model.config)

    @property
    def behind(self) -> tuple[int, ...]:
        return ()

    @property
    def ends_answers(self) -> bool:
        return False

    @cached_property
    def _reads_first(self) -> bool:
        return reads_first(self.model, make_batch([self.trial(range(3, 9))], next(self.model.parameters()).device))

    def _asked(self, source: tuple[int, ...]) -> Encoded:
        return Encoded((0,), 1, None, source, 1 if self._reads_first else len(source))

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
        check_room(len(question.source), room)
        place = subject_end(self.tokenizer, prompt.strip(), subject, question.source) if subject else None
        return replace(question.answered((self.label(target),)), subject=place)

    def question(self, prompt: str) -> Encoded:
        if not self.tokenizer(prompt.strip(), add_special_tokens=False)["input_ids"]:
            raise no_tokens("prompt", prompt)
        return self._asked(tuple(self.tokenizer(prompt.strip())["input_ids"]))

    def label(self, name: str) -> int:
        """A label's number, by its name in whatever letter case. Raises FactsError."""
        folded = [label.casefold() for label in self.labels]
        if name.strip().casefold() not in folded:
            message = f"{name!r} is no label of this model; it has {', '.join(self.labels)}"
            one = self.model.config.num_labels == 1
            hint = "write one of them" + ("" if one else ", or name the labels in id2label of its config.json")
            raise FactsError([Problem("facts", None, "target", message, hint)])
        return folded.index(name.strip().casefold())

    def opening(self, words: Sequence[int]) -> Encoded:
        front, behind = special_around(self.tokenizer)
        return self._asked((*front, *words, *behind))

    def trial(self, tokens: Sequence[int]) -> Encoded:
        return Encoded((0, 0), 1, None, tuple(tokens), 1)

    def inputs(self, batch: Batch, memory: Tensor | None = None) -> dict[str, Any]:
        return {"input_ids": batch.source, "attention_mask": batch.source_mask}

    def step(
        self, ids: Tensor, length: int, source: Tensor | None, memory: Tensor | None, cache: Any
    ) -> dict[str, Any]:
        assert source is not None
        return {"input_ids": source, "attention_mask": torch.ones_like(source)}

    @property
    def ends(self) -> frozenset[int]:
        return frozenset()

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(self.labels[token] for token in tokens)

    def breaks(self, token: int) -> bool:
        return False

    def logits(self, output: Any) -> Tensor:
        found: Tensor = output.logits
        if found.shape[-1] == 1:  # softmax of (0, z) is the sigmoid of z
            found = torch.cat([torch.zeros_like(found), found], -1)
        return found[:, None]


def label_names(config: Any) -> tuple[str, ...]:
    """A classifier's labels by number. A head with one logit has its own label and `not` that one, else ONE_LOGIT."""
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    if len(labels) > 1:
        return labels
    known = labels[0] == UNNAMED or labels[0].casefold() == ONE_LOGIT[1].casefold()
    return ONE_LOGIT if known else (f"not {labels[0]}", labels[0])


def reads_first(model: Any, batch: Batch) -> bool:
    """Whether a classification head reads the first token's output alone. If not it reads them all (a mean), or
    CheckpointError is raised: a head that leaves the first token out is a decoder's."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> Any:
        kept.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_(True))
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    handle = stacks(model)[-1].blocks[-1].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=batch.source, attention_mask=batch.source_mask).logits
            gradient = torch.autograd.grad(logits.float().square().sum(), kept[0])[0][0]
    finally:
        handle.remove()
    read = (gradient.abs().amax(-1) > 0).tolist()
    if not read[0]:
        raise CheckpointError("its classification head does not read the first token; such a model cannot be edited")
    return not any(read[1:])
