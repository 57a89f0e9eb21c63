"""How each task is asked: tokens by hand, labels, heads; which class loads a checkpoint; and who is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from malmen_cli.base.classifier import ONE_LOGIT, reads_first
from malmen_cli.base.families import chosen_modules, default_modules, kind_of, stacks
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import ANSWER, CONTEXT, PROMPT_END, SUBJECT, places
from malmen_cli.editing.methods.memit import memit_modules
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.exceptions import CheckpointError, FactsError, SpecError

Load = Callable[..., Base]
CLAIM = "The capital of France is Paris"


@pytest.fixture(scope="module")
def load(tiny_model_factory: Callable[..., Path]) -> Load:
    known: dict[str, Base] = {}

    def build(family: str, **options: Any) -> Base:
        key = family + json.dumps(options, sort_keys=True)
        known[key] = known.get(key) or load_base(str(tiny_model_factory(family, **options)), device="cpu")
        return known[key]

    return build


def copied(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with another config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


# ---------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize(("family", "start"), [("t5", ["<pad>"]), ("bart", ["</s>", "<s>"])])
def test_the_prompt_is_the_encoder_s_and_the_target_the_decoder_s(load: Load, family: str, start: list[str]) -> None:
    base = load(family)
    words = base.tokenizer.convert_ids_to_tokens
    found = base.task.encode(" Snow is ", " Paris", end_of_text=True, subject="snow")
    front = ["<s>"] if family == "bart" else []
    assert words(found.source)[: len(front)] == front
    assert words(found.source)[-1] == "</s>"
    assert base.tokenizer.decode(found.source, skip_special_tokens=True) == "Snow is"
    assert words(found.ids[: found.n_prompt]) == start
    assert base.tokenizer.decode(found.answer, skip_special_tokens=True).strip() == "Paris"
    assert words(found.answer)[-1] == "</s>"
    assert found.read == len(found.source)
    assert base.tokenizer.decode(found.source[: found.subject + 1], skip_special_tokens=True) == "Snow"
    assert base.task.encode("Snow is", "Paris").answer == found.answer[:-1]
    assert base.task.question("Snow is").answered(found.answer).key == found.key


def test_an_end_of_text_that_the_tokenizer_leaves_out_is_put_behind_the_prompt(load: Load, tmp_path: Path) -> None:
    folder = copied(load("t5").folder, tmp_path / "bare", lambda config: None)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bare = load_base(str(folder), device="cpu")
    assert bare.tokenizer("Snow is")["input_ids"][-1] != bare.tokenizer.eos_token_id
    assert bare.task.question("Snow is") == load("t5").task.question("Snow is")


def test_rows_of_an_encoder_are_its_real_tokens_and_of_a_decoder_the_answer_s(load: Load) -> None:
    found = load("t5").task.encode("The capital of France is", "Rome in snow", end_of_text=True, subject="France")
    answer = [(i, PROMPT_END if i == 0 else ANSWER) for i in range(len(found.answer))]
    for tokens in ("answer", "subject", "all"):
        assert places(found, tokens, "ids") == answer
        roles = [SUBJECT if tokens != "answer" and i == found.subject else PROMPT_END for i in range(len(found.source))]
        assert places(found, tokens, "source") == list(enumerate(roles))


def test_the_first_token_of_an_encoder_may_be_the_subject(load: Load) -> None:
    """No attention sink stands there, as it does in front of a decoder's prompt."""
    found = load("t5").task.encode("France is in", "Rome", subject="France")
    assert found.subject == 0
    assert places(found, "subject", "source")[0] == (0, SUBJECT)
    assert places(Encoded((1, 2, 3), 2, 0), "subject") == [(1, PROMPT_END)]


def test_a_head_that_is_not_tied_stays_its_own(load: Load, tmp_path: Path) -> None:
    """transformers ties T5's unless the checkpoint holds both with different values."""
    folder = copied(load("t5").folder, tmp_path / "untied", lambda config: config.update(tie_word_embeddings=False))
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = load_base(str(folder), device="cpu")
    assert torch.equal(base.model.lm_head.weight, tensors["lm_head.weight"])
    assert not torch.equal(base.model.lm_head.weight, base.model.shared.weight)
    assert torch.equal(base.model.decoder.embed_tokens.weight, base.model.shared.weight)


def test_modules_are_found_in_encoder_and_decoder(load: Load) -> None:
    model = load("t5", layers=3).model
    assert [stack.prefix for stack in stacks(model)] == ["encoder.block", "decoder.block"]
    ends = ("encoder.block.2.layer.1.DenseReluDense.wo", "decoder.block.2.layer.2.DenseReluDense.wo")
    assert default_modules(model) == list(ends)
    assert chosen_modules(model, ["*.block.2.*.wi_0", "decoder.*.2.layer.2.*.wo"]) == [
        ends[0].replace("wo", "wi_0"),
        ends[1].replace("wo", "wi_0"),
        ends[1],
    ]


# ---------------------------------------------------------------- classifiers


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_claim_is_the_source_and_its_label_the_answer(load: Load, family: str) -> None:
    base = load(family)
    found = base.task.encode(f" {CLAIM} ", "supports", end_of_text=True, subject="France")
    assert found.source == tuple(base.tokenizer(CLAIM)["input_ids"])
    assert (found.ids, found.n_prompt, found.answer, found.read) == ((0, 1), 1, (1,), 1)
    assert base.task.encode(CLAIM, "REFUTES").answer == (0,)
    assert base.task.text((1,)) == "SUPPORTS"
    assert places(found, "answer", "source") == [(0, PROMPT_END)]
    assert places(found, "subject", "source") == [(0, PROMPT_END), (found.subject, SUBJECT)]
    everywhere = [CONTEXT] * len(found.source)
    everywhere[0], everywhere[found.subject] = PROMPT_END, SUBJECT
    assert places(found, "all", "source") == list(enumerate(everywhere))


def test_a_label_that_the_model_has_not(load: Load) -> None:
    with pytest.raises(FactsError, match="'MAYBE' is no label of this model; it has REFUTES, SUPPORTS"):
        load("bert").task.encode(CLAIM, "MAYBE")


def test_what_has_no_tokens_or_too_many(load: Load) -> None:
    for family in ("t5", "bart", "bert"):
        with pytest.raises(FactsError, match="prompt: '  ' has no tokens"):
            load(family).task.question("  ")
        with pytest.raises(FactsError, match="the model reads at most 4"):
            load(family).task.encode(CLAIM, "SUPPORTS", room=4)
    with pytest.raises(FactsError, match="target: ' ' has no tokens"):
        load("t5").task.encode("Snow is", " ")


def test_positions_that_padding_takes_are_no_room(load: Load) -> None:
    """RoBERTa's 128 positions begin behind its padding index, 1: as many tokens as fit run, one more does not."""
    base = load("roberta")
    assert (base.room, load("bert").room, load("t5").room) == (126, 128, None)
    base.model(input_ids=torch.full((1, 126), 5))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        base.model(input_ids=torch.full((1, 127), 5))


def test_one_logit_has_two_labels_by_its_sign(load: Load) -> None:
    """Cross-entropy over (0, z) is the binary cross-entropy of z."""
    base = load("bert", num_labels=1, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})
    assert base.task.labels == ONE_LOGIT
    claims = [base.task.encode(CLAIM, "SUPPORTS"), base.task.encode("Snow is white", "REFUTES")]
    batch = base.task.batch(claims, base.device)
    output = base.model(**base.task.inputs(batch))
    logits = base.task.logits(output)[batch.rows, batch.columns]
    wanted = nn.functional.binary_cross_entropy_with_logits(output.logits[:, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(nn.functional.cross_entropy(logits, batch.labels), wanted)


@pytest.mark.parametrize(
    ("own", "labels"), [("toxic", ("not toxic", "toxic")), ("Supports", ONE_LOGIT), ("LABEL_0", ONE_LOGIT)]
)
def test_one_logit_is_of_its_own_label(load: Load, own: str, labels: tuple[str, str]) -> None:
    task = load("bert", num_labels=1, id2label={0: own}, label2id={own: 0}).task
    assert task.labels == labels
    assert [task.label(label.upper()) for label in labels] == [0, 1]
    with pytest.raises(FactsError, match=f"'green' is no label of this model; it has {labels[0]}, {labels[1]}"):
        task.label("green")


class MeanPooled(nn.Module):
    """A classifier over `read` of its tokens, with the parts of one that are looked at."""

    def __init__(self, base: Base, read: slice) -> None:
        super().__init__()
        self.inner, self.read = base.model.bert, read
        self.config, self.head = base.model.config, base.model.classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        states = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return type("Output", (), {"logits": self.head(states[:, self.read].mean(1))})


@pytest.mark.parametrize(("read", "first"), [(slice(0, 1), True), (slice(None), False)])
def test_which_tokens_a_head_reads_is_found_by_its_gradient(load: Load, read: slice, first: bool) -> None:
    base = load("bert")
    batch = base.task.batch([base.task.trial(range(3, 9))], base.device)
    assert reads_first(MeanPooled(base, read), batch) is first


def test_a_head_that_leaves_the_first_token_out_is_refused(load: Load) -> None:
    base = load("bert")
    batch = base.task.batch([base.task.trial(range(3, 9))], base.device)
    with pytest.raises(CheckpointError, match="does not read the first token"):
        reads_first(MeanPooled(base, slice(-1, None)), batch)


# ---------------------------------------------------------------- what loads, and what does not


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("gpt2", "causal_lm", "GPT2LMHeadModel"),
        ("t5", "seq2seq_lm", "T5ForConditionalGeneration"),
        ("bart", "seq2seq_lm", "BartForConditionalGeneration"),
        ("bert", "classifier", "BertForSequenceClassification"),
        ("distilbert", "classifier", "DistilBertForSequenceClassification"),
    ],
)
def test_the_config_decides_what_a_checkpoint_is(load: Load, family: str, kind: str, name: str) -> None:
    base = load(family)
    assert (kind_of(base.model), type(base.model).__name__, base.task.kind) == (kind, name, kind)
    assert base.task.record() == ({} if family == "gpt2" else {"task": kind})


def test_an_encoder_without_a_head_is_refused(load: Load, tmp_path: Path) -> None:
    for name in ("BertModel", "BertForMaskedLM"):
        folder = copied(
            load("bert").folder, tmp_path / name, lambda config, name=name: config.update(architectures=[name])
        )
        with pytest.raises(CheckpointError, match=f"a {name} has no classification head"):
            load_base(str(folder), device="cpu")


def test_a_head_that_is_not_in_the_checkpoint_is_refused(load: Load, tmp_path: Path) -> None:
    """transformers would make one up."""
    folder = copied(load("bert").folder, tmp_path / "headless", lambda config: None)
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if "classifier" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its classification head is missing \(classifier.bias\)"):
        load_base(str(folder), device="cpu")


def test_a_classifier_with_a_decoder_is_refused(load: Load, tmp_path: Path) -> None:
    name = "BartForSequenceClassification"
    folder = copied(load("bart").folder, tmp_path / "c", lambda config: config.update(architectures=[name]))
    with pytest.raises(CheckpointError, match=f"{name} classifies with a decoder"):
        load_base(str(folder), device="cpu")


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_memit_is_for_causal_language_models(load: Load, family: str) -> None:
    model = load(family).model
    with pytest.raises(SpecError, match=f"causal language models only, not a {type(model).__name__}"):
        memit_modules(model, MemitSettings())
