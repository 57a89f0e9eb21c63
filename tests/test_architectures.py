"""The properties that a user relies on, each over every architecture: T3, T5 to T9, T12 and T16 of one small edit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from malmen_cli.artifact.delta import read_delta, write_delta
from malmen_cli.artifact.manifest import MANIFEST, read_sealed
from malmen_cli.artifact.merged import write_merged
from malmen_cli.base.families import CLASSIFIER, SEQ2SEQ, SOURCE, block_index, second_matrix, stacks
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.weights import read_index, read_tensor
from malmen_cli.compare import compare
from malmen_cli.editing.capture import all_keys, edit_rows, fact_loss, row_count, weight_gradients
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.finetune import Finetune, tuned_module
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.editing.stacked import gather
from malmen_cli.facts.fact import Fact
from malmen_cli.scoring.decoder import Asker
from malmen_cli.scoring.judge import PROTOCOLS
from malmen_cli.scoring.metrics import exact_match
from malmen_cli.scoring.protocols import GREEDY_MARGIN, collect
from malmen_cli.scoring.report import summarise
from malmen_cli.training.calibration import scaled
from malmen_cli.training.objective import meta_loss
from malmen_cli.training.references import References, divergence

CAUSAL_FAMILIES = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
PAIRED, CLASSIFIERS = ("t5", "bart"), ("bert", "roberta", "distilbert")
FAMILIES = (*CAUSAL_FAMILIES, *PAIRED, *CLASSIFIERS)
TIED = ("gpt2", "opt", "qwen2", "gemma", *PAIRED)  # input and output embeddings, by their configs
PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy")
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris")
SQUARE = 32  # both sides of a matrix, where they are equal


@dataclass(frozen=True)
class Opened:
    """A tiny base, facts for it, an editor whose steps are small, and the shift it makes; shared by all tests."""

    folder: Path
    base: Base
    facts: list[Fact]
    edits: list[Encoded]
    editor: Editor
    shift: Shift


def facts_for(base: Base, verbs: tuple[str, ...]) -> list[Fact]:
    """Facts of unequal length, with answers as the base's task has them."""
    answers = base.task.labels if base.task.kind == CLASSIFIER else ANSWERS
    asked = [(f"The capital of {place} {verb}", place) for verb in verbs for place in PLACES]
    return [
        Fact(f"fact-{i}", prompt, answers[i % len(answers)], subject=place) for i, (prompt, place) in enumerate(asked)
    ]


def make_shift(editor: Editor, base: Base, edits: list[Encoded]) -> Shift:
    return Malmen(editor).shift(Runner(base), edits, ids_of(edits), batch_size=8)


def ids_of(edits: list[Encoded]) -> list[str]:
    return [f"fact-{i}" for i in range(len(edits))]


def open_base(folder: Path, tokens: Literal["subject", "all"], verbs: tuple[str, ...]) -> Opened:
    base = load_base(str(folder), device="cpu")
    editor = Editor.fresh(base.model, MalmenSettings(network="identity", tokens=tokens, preserved_rank=0))
    for group in editor.groups:
        group.network.log_lr.data.fill_(-4.0)
    facts = facts_for(base, verbs)
    edits = [base.task.encode(fact.prompt, fact.target, subject=fact.subject) for fact in facts]
    return Opened(folder, base, facts, edits, editor, make_shift(editor, base, edits))


@pytest.fixture(scope="session")
def opened(tiny_model_factory: Callable[..., Path]) -> Callable[[str], Opened]:
    known: dict[str, Opened] = {}

    def build(family: str) -> Opened:
        if family not in known:
            known[family] = open_base(tiny_model_factory(family), "subject", ("is",))
        return known[family]

    return build


@pytest.fixture(scope="session")
def crowded(tiny_model_factory: Callable[..., Path]) -> Callable[[str], Opened]:
    """Square matrices, and more rows than a key has numbers: the form that keeps sums over rows alone."""
    known: dict[str, Opened] = {}

    def build(family: str) -> Opened:
        if family not in known:
            verbs = ("is", "was", "is not", "was once")
            known[family] = open_base(tiny_model_factory(family, width=SQUARE, mlp=SQUARE), "all", verbs)
        return known[family]

    return build


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, opened: Callable[[str], Opened]) -> Opened:
    return opened(request.param)


def matrices(shift: Shift) -> dict[str, Tensor]:
    return {name: module.matrix() for name, module in shift.modules.items()}


def logits_of(base: Base, edits: list[Encoded]) -> Tensor:
    with torch.no_grad():
        return Runner(base).logits(edits)[0]


# ---------------------------------------------------------------- T3: how facts are batched decides nothing


@pytest.mark.parametrize(
    ("facts", "chunk", "batch_size"),
    [(1, 1024, 1), (6, 1, 7), (7, 7, 7), (4, 1024, 3), (7, 7, 3), (7, 1024, 32)],  # 1, b - 1, b, b + 1, 2b + 1
)
def test_batches_and_order_do_not_change_the_shift(model: Opened, facts: int, chunk: int, batch_size: int) -> None:
    edits = model.edits[:facts]
    wanted = matrices(make_shift(model.editor, model.base, edits))
    found = Malmen(model.editor, chunk=chunk).shift(
        Runner(model.base), edits[::-1], ids_of(edits)[::-1], batch_size=batch_size
    )
    for name, matrix in matrices(found).items():
        assert float((matrix - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm())
    assert all(float(matrix.norm()) > 0 for matrix in wanted.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_do_they_where_only_sums_over_rows_are_kept(crowded: Callable[[str], Opened], family: str) -> None:
    """More rows than a key has numbers, of square matrices."""
    model = crowded(family)
    found = Malmen(model.editor, chunk=7).shift(
        Runner(model.base), model.edits[::-1], ids_of(model.edits)[::-1], batch_size=5
    )
    for name, shift in model.shift.modules.items():
        assert shift.left is None
        assert set(shift.matrix().shape) == {SQUARE}
        assert float((found.modules[name].matrix() - shift.matrix()).norm()) <= 1e-5 * float(shift.matrix().norm())


# ---------------------------------------------------------------- T5: nothing is left behind


def test_editing_and_asking_leave_editor_and_base_as_they_were(model: Opened) -> None:
    state = {name: tensor.clone() for name, tensor in model.editor.state().items()}
    weights = {name: p.detach().clone() for name, p in model.base.model.named_parameters()}
    for _ in range(100):
        with applied(model.base.model, model.shift):
            pass
    make_shift(model.editor, model.base, model.edits[:2])
    with applied(model.base.model, model.shift):
        collect(model.base, model.facts, batch_size=4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.editor.state().items())
    assert all(torch.equal(p, weights[name]) for name, p in model.base.model.named_parameters())


# ---------------------------------------------------------------- T6: W'k - Wk is what was solved for


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_module_moves_its_output_by_the_shift(
    request: pytest.FixtureRequest, family: str, square: bool
) -> None:
    model = request.getfixturevalue("crowded" if square else "opened")(family)
    for name, shift in model.shift.modules.items():
        module = model.base.model.get_submodule(name)
        keys = torch.randn(5, shift.matrix().shape[0], generator=torch.Generator().manual_seed(0))
        before = module(keys)
        with applied(model.base.model, model.shift):
            moved = module(keys) - before
        wanted = keys @ shift.matrix()
        assert float((moved - wanted).norm()) <= 1e-5 * float(before.norm()) + 1e-5 * float(wanted.norm())


# ---------------------------------------------------------------- T7: padding


def test_padding_changes_no_key_and_no_logit(model: Opened) -> None:
    """On the right, where malmen pads; tests/editing has causal models padded on the left too. What counts positions
    from the start of a batch, as BERT and BART's decoder do, cannot be padded there."""
    names, tokens = model.editor.names, model.editor.settings.tokens
    for group in model.editor.groups:
        alone, together = (
            gather(group, edit_rows(Runner(model.base), model.edits, names, size, tokens)) for size in (1, 8)
        )
        assert len(together.roles) == row_count(model.edits, tokens, group.reads)
        assert torch.equal(alone.roles, together.roles)
        torch.testing.assert_close(alone.keys, together.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.gradients, together.gradients, rtol=1e-4, atol=1e-6)
    each = torch.cat([logits_of(model.base, [edit]) for edit in model.edits])
    torch.testing.assert_close(logits_of(model.base, model.edits), each, rtol=1e-5, atol=2e-5)


def test_every_real_token_gives_a_key_and_padding_none(model: Opened) -> None:
    """Of what the module's stack reads: an encoder's are the prompt's tokens, a decoder's the answer's."""
    for group in model.editor.groups:
        counts = [len(edit.source if group.reads == SOURCE else edit.ids) for edit in model.edits]
        assert len(set(counts)) > 1  # so that some are padded
        for name in group.names:
            together, alone = (
                torch.cat([keys[name] for keys in all_keys(Runner(model.base), model.edits, [name], size)])
                for size in (8, 1)
            )
            assert len(together) == sum(counts)
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


# ---------------------------------------------------------------- T8: replay


def test_replaying_is_the_full_forward(model: Opened) -> None:
    """From every block on: logits, and gradients of the edited modules that are not in front of it."""
    base, names = model.base, model.editor.names
    full = Runner(base)
    loss, gradients = weight_gradients(full, model.edits, names, fact_loss)
    for first in range(1, len(full.blocks)):
        runner = Runner(base, first)
        behind = [name for name in names if block_index(base.model, name) >= first]
        for _ in range(2):  # computed, then kept
            again, found = weight_gradients(runner, model.edits, behind, fact_loss) if behind else (loss, {})
            assert again == pytest.approx(loss, rel=1e-5)
            for name in behind:
                torch.testing.assert_close(found[name], gradients[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits_of(base, model.edits), runner.logits(model.edits)[0], rtol=1e-5, atol=2e-5)


def test_the_meta_loss_reaches_the_first_blocks(model: Opened) -> None:
    """As autograd has it. What the base said is computed anew while the loss is, and T5's first blocks run for that."""
    base, runner = model.base, Runner(model.base)
    names = [second_matrix(base.model, stack, 0) for stack in stacks(base.model)]
    references = References(runner, 3, 8).of([base.task.question(fact.prompt) for fact in model.facts])
    weights = [base.model.get_submodule(name).weight for name in names]
    with applied(base.model, model.shift):
        found = meta_loss(runner, model.edits, references, names, locality_weight=2.0, batch_size=3).gradients
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with runner.head_inputs() as seen:
                said = runner.logits([r.sequence for r in references])
                moved = divergence(runner, references, seen, *said)
            loss = fact_loss(*runner.logits(model.edits)) + 2.0 * moved
            wanted = torch.autograd.grad(loss / len(model.edits), weights)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
    for name, gradient in zip(names, wanted, strict=True):
        rows = gradient if model.base.model.get_submodule(name).weight.shape == found[name].shape else gradient.T
        torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_which_blocks_can_be_left_out(opened: Callable[[str], Opened], family: str) -> None:
    """All in front of the first edited one. T5's blocks hand a position bias on: there the first runs for it."""
    base = opened(family).base
    for first in range(1, sum(len(stack.blocks) for stack in stacks(base.model))):
        runner = Runner(base, first)
        assert (runner.replaying, runner.first) == (True, first)


# ---------------------------------------------------------------- T9, T12, T16: what is written


def asked_in_memory(model: Opened) -> dict[str, Any]:
    """What is asked of a merged folder, and what the edited model in memory said; `es` as a report has it."""
    base, facts = model.base, model.facts
    before = collect(base, facts, batch_size=4)
    with applied(base.model, model.shift):
        after = collect(base, facts, batch_size=4)
        forced = Asker(base, 4, lambda count: None).teacher_forced(model.edits)
    asked = [
        {
            "ids": edit.ids,
            "source": edit.source,
            "start": base.task.question(fact.prompt).ids,
            "most": len(edit.answer) + GREEDY_MARGIN,
            "logprobs": found.logprobs,
            "text": after.of(fact.prompt, fact.target).text,
        }
        for fact, edit, found in zip(facts, model.edits, forced, strict=True)
    ]
    es = {part: summarise(facts, before, after).after.figures[f"es.{part}"] for part in PROTOCOLS}
    return {"kind": base.task.kind, "asked": asked, "es": es}


@pytest.fixture(scope="session")
def written(opened: Callable[[str], Opened], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the family's `merged` and `delta`, and `asked.json`: what the edited model in memory says."""
    known: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in known:
            model, out = opened(family), tmp_path_factory.mktemp(f"written-{family}")
            said = {"base": {"name": family, "fingerprint": model.base.fingerprint} | model.base.task.record()}
            write_merged(out / "merged", model.folder, model.shift, said, card="", force=False)
            write_delta(out / "delta", model.shift, said, card="", force=False)
            (out / "asked.json").write_text(json.dumps(asked_in_memory(model)))
            known[family] = out
        return known[family]

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_base_plus_delta_rounded_once(
    opened: Callable[[str], Opened], written: Callable[[str], Path], family: str
) -> None:
    model, out = opened(family), written(family)
    base, merged = read_index(model.folder), read_index(out / "merged")
    delta, _ = read_delta(out / "delta", fingerprint=model.base.fingerprint)
    assert base.keys() == merged.keys()
    edited = {f"{name}.weight" for name in delta.modules}
    for name, entry in base.items():
        before, after = read_tensor(entry), read_tensor(merged[name])
        shift = delta.modules[name.removesuffix(".weight")].for_weight() if name in edited else None
        assert torch.equal(after, before if shift is None else (before.float() + shift).to(before.dtype))
    found = compare(model.folder, out / "merged")
    assert {change.name for change in found.changes} == edited
    assert found.same == len(base) - len(edited)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_base_says_what_rounding_kept(
    opened: Callable[[str], Opened], tiny_model_factory: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """A shift of about a bf16 step, part of which is rounded away."""
    folder, shift = tiny_model_factory(family, dtype="bfloat16"), scaled(opened(family).shift, 0.05)
    write_merged(tmp_path / "merged", folder, shift, {}, card="", force=False)
    figures = read_sealed(tmp_path / "merged" / MANIFEST)["modules"]
    before, after = read_index(folder), read_index(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, entry in before.items():
        was, found = read_tensor(entry), read_tensor(after[name])
        module = shift.modules.get(name.removesuffix(".weight"))
        if module is None:
            assert torch.equal(was, found)
            continue
        wanted = module.for_weight()
        assert was.dtype == found.dtype == torch.bfloat16
        assert torch.equal(found, (was.float() + wanted).to(torch.bfloat16))
        kept = float((found.double() - was.double()).norm() / wanted.double().norm())
        assert figures[name.removesuffix(".weight")]["realised"] == pytest.approx(kept, rel=1e-5)
        assert kept != 1.0


def tied_names(folder: Path) -> set[frozenset[str]]:
    """Names that stand for one and the same parameter."""
    sharing: dict[int, set[str]] = {}
    for name, parameter in load_base(str(folder), device="cpu").model.named_parameters(remove_duplicate=False):
        sharing.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in sharing.values() if len(names) > 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_tied_stays_tied(written: Callable[[str], Path], opened: Callable[[str], Opened], family: str) -> None:
    before = tied_names(opened(family).folder)
    assert bool(before) == (family in TIED)
    assert tied_names(written(family) / "merged") == before


FRESH = """
import json, sys
from pathlib import Path
sys.modules["malmen_cli"] = None  # from here on it cannot be imported
import torch
import transformers
AUTO = {"causal_lm": "AutoModelForCausalLM", "seq2seq_lm": "AutoModelForSeq2SeqLM",
        "classifier": "AutoModelForSequenceClassification"}
PLAIN = {"do_sample": False, "num_beams": 1, "forced_eos_token_id": None}
found = {}
for folder in map(Path, sys.argv[1:]):
    said = json.loads((folder / "asked.json").read_text())
    kind = said["kind"]
    model = getattr(transformers, AUTO[kind]).from_pretrained(folder / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    rows = []
    for asked in said["asked"]:
        ids, source, start = (torch.tensor([asked[name]]) for name in ("ids", "source", "start"))
        answer = ids[0, start.shape[1]:]
        if kind == "classifier":
            logits = model(input_ids=source.long()).logits
            text = model.config.id2label[logits.argmax().item()]
        else:
            read = {"input_ids": start} if kind == "causal_lm" else {"input_ids": source, "decoder_input_ids": start}
            written = model.generate(**read, **PLAIN, max_new_tokens=asked["most"])[0, start.shape[1]:]
            text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            read[list(read)[-1]] = ids
            logits = model(**read).logits[0, start.shape[1] - 1 : -1]
        rows.append({
            "forced": (logits.argmax(-1) == answer).float().mean().item(),
            "logprobs": logits.float().log_softmax(-1).gather(-1, answer[:, None])[:, 0].tolist(),
            "text": text.split("\\n")[0].strip(),
        })
    found[str(folder)] = rows
print(json.dumps(found))
"""


@pytest.mark.slow  # a process that imports torch and transformers anew, for all families at once
def test_a_fresh_process_gives_the_reported_scores(
    written: Callable[[str], Path], opened: Callable[[str], Opened]
) -> None:
    """And every answer behind them, in plain transformers where malmen cannot be imported."""
    folders = {family: written(family) for family in FAMILIES}
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, *map(str, folders.values())],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for family, folder in folders.items():
        wanted, rows = json.loads((folder / "asked.json").read_text()), said[str(folder)]
        for one, asked in zip(rows, wanted["asked"], strict=True):
            assert one["logprobs"] == pytest.approx(asked["logprobs"], abs=2e-4)
            assert one["text"] == asked["text"]
        right = [exact_match(one["text"], fact.target) for one, fact in zip(rows, opened(family).facts, strict=True)]
        es = {"teacher_forced": sum(one["forced"] for one in rows) / len(rows), "greedy": sum(right) / len(rows)}
        assert es == pytest.approx(wanted["es"])


# ---------------------------------------------------------------- what the architectures are


@pytest.mark.parametrize("family", PAIRED)
def test_encoder_and_decoder_are_edited_together(opened: Callable[[str], Opened], family: str) -> None:
    model = opened(family)
    assert model.base.task.kind == SEQ2SEQ
    assert [group.reads for group in model.editor.groups] == ["source", "ids"]
    sides = {
        stack.reads: [name for name in model.editor.names if stack.holds(name)] for stack in stacks(model.base.model)
    }
    assert all(sides.values())
    assert set(model.shift.modules) == {name for names in sides.values() for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_changes_a_matrix_of_the_stack_that_answers(opened: Callable[[str], Opened], family: str) -> None:
    """And leaves the facts better learned than it found them."""
    model = opened(family)
    base, settings = model.base, FinetuneSettings(epochs=4, lr=0.01)
    module = tuned_module(base.model, settings)
    assert stacks(base.model)[-1].holds(module)
    runner = Runner(base, block_index(base.model, module))
    shift = Finetune(settings).shift(runner, module, model.edits, batch_size=4)
    with torch.no_grad():
        before = float(fact_loss(*runner.logits(model.edits)))
        with applied(base.model, shift):
            assert float(fact_loss(*runner.logits(model.edits))) < before


def greedy_by_generate(base: Base, question: Encoded, tokens: int) -> list[int]:
    written: Any = base.model.generate(
        input_ids=torch.tensor([question.source]),
        decoder_input_ids=torch.tensor([question.ids]),
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        forced_eos_token_id=None,
    )
    return list(written[0, len(question.ids) :].tolist())


@pytest.mark.parametrize("family", PAIRED)
def test_greedy_text_is_that_of_generate(opened: Callable[[str], Opened], family: str) -> None:
    """In batches, which their rows leave at different lengths, against one prompt at a time."""
    base = opened(family).base
    questions = [base.task.question(f"The capital of {place} is") for place in PLACES]
    questions += [base.task.question(f"The capital of {place} was") for place in PLACES]  # of the same lengths
    budgets = [1 + 3 * i % 7 for i in range(len(questions))]
    found = Asker(base, 4, lambda count: None).greedy(questions, budgets)
    for question, tokens, budget in zip(questions, found, budgets, strict=True):
        wanted = greedy_by_generate(base, question, budget)
        stop = next((i for i, t in enumerate(wanted) if t in base.task.ends), len(wanted))
        line = next((i + 1 for i, t in enumerate(wanted[:stop]) if base.task.breaks(t)), stop)
        assert list(tokens) == wanted[:line]
