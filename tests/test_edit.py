"""From facts to a shift: the plan, which editor is taken, the calibrated identity network, and the record."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from live import LiveTensors

import malmen_cli
import malmen_cli.identity as identity
from malmen_cli.artifact.editors import install_editor, save_editor
from malmen_cli.artifact.manifest import canonical
from malmen_cli.base import causal
from malmen_cli.base.locate import cache_home
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import encode
from malmen_cli.base.spill import Spill
from malmen_cli.edit import (
    Ready,
    Tuning,
    calibrated_identity,
    encode_edits,
    find_ready,
    finishing,
    make_shift,
    manifest,
    ready_for,
)
from malmen_cli.editing.capture import row_count
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import ROUNDS, FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.editing.spec import Spec, read_spec
from malmen_cli.exceptions import EditorError, FactsError, NumericsError, Problem
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.insertion import Insertion, prepare
from malmen_cli.plan import plan

SETTINGS = MalmenSettings(last_blocks=2, rank=4, preserved_rank=8)
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris")


@pytest.fixture(scope="module")
def base(tiny_gpt2: Path) -> Base:
    return load_base(str(tiny_gpt2), device="cpu")


def some_facts(count: int = 8, probes: bool = True) -> list[Fact]:
    return [
        Fact(
            f"f{i}",
            f"The capital of Peru number {i} is",
            ANSWERS[i % 4],
            rephrases=(f"Peru number {i} has the capital",),
            locality=(Probe(f"The currency of Sweden {i} is the"),) if probes else (),
        )
        for i in range(count)
    ]


def save(folder: Path, base: Base, made_with: MalmenSettings = SETTINGS, /, **changes: Any) -> Path:
    """An untrained editor, saved as a trained one is."""
    editor = Editor.fresh(base.model, made_with)
    said = {"base": {"name": base.name, "fingerprint": base.fingerprint}, "method": "malmen"}
    save_editor(folder, editor.state(), said | {"settings": asdict(made_with)} | changes, force=True)
    return folder


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(("count", "rounds"), [(1, None), (8, None), (1, 1), (8, 1), (60, 1)])
def test_plan(base: Base, count: int, rounds: int | None) -> None:
    facts = some_facts(count)
    found = plan(base, facts, replace(SETTINGS, rounds=rounds), batch_size=4)
    edits = [encode(base.tokenizer, fact.prompt, fact.target, end_of_text=True) for fact in facts]
    rows = sum(len(e.answer) for e in edits)
    assert found.modules == {f"transformer.h.{i}.mlp.c_proj": (64, 32) for i in (0, 1)}
    assert (found.facts, found.tokens, found.rows) == (count, sum(len(e.ids) for e in edits), rows)
    assert found.passes == (rounds or ROUNDS)
    rank = rows * found.passes  # every pass brings factors of its own
    assert found.rank == (rank if rank <= 64 else None)
    weights = sum(p.numel() * 4 for p in base.model.parameters())
    held = min(rows, 64) * (64 + 32)
    assert found.memory >= weights + 2 * 8 * held
    assert found.memory < weights + 2 * 8 * held + 2 * 4 * 64 * 32 + 4 * 40 * 32 * 4 * 24


def test_plan_follows_the_settings(base: Base) -> None:
    one = plan(base, some_facts(), replace(SETTINGS, modules=("*.0.mlp.c_fc",)), 4)
    assert one.modules == {"transformer.h.0.mlp.c_fc": (32, 64)}
    passes = [plan(base, some_facts(count), replace(SETTINGS, rounds=3), 4) for count in (1, 8)]
    assert [found.rank for found in passes] == [3 * passes[0].rows, None]
    without_end = plan(base, some_facts(), replace(SETTINGS, end_of_text=False), 4)
    assert without_end.rows == one.rows - 8


def test_memory_does_not_grow_with_the_facts_beyond_dk(base: Base) -> None:
    """T27: what `--dry-run` says of it."""
    few, many = (plan(base, some_facts(count), SETTINGS, 4) for count in (100, 300))
    assert many.rows > 2.5 * few.rows > 64
    assert many.memory < 1.05 * few.memory


@pytest.mark.parametrize("rounds", [1, 3])
def test_ten_times_the_facts_take_no_more_memory(base: Base, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T27: counted over every tensor that is alive at once; what passes keep beyond the memory given is on disk."""
    monkeypatch.setitem(Malmen.__init__.__kwdefaults__, "chunk", 32)  # rows at once: both numbers of facts have many
    settings = replace(SETTINGS, last_blocks=1)
    ready = with_rounds(calibrated_identity(base, some_facts(20), settings, seed=0, batch_size=8), rounds)
    peaks = []
    for count in (80, 800):
        with LiveTensors() as live:
            make_shift(base, ready, some_facts(1000 + count)[1000:], batch_size=8, memory=0)
        peaks.append(live.peak)
    assert 0 < peaks[1] <= 1.1 * peaks[0], peaks


def test_facts_without_tokens_are_named(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(tokenizer: Any, prompt: str, target: str, **options: Any) -> Any:
        raise FactsError([Problem("facts", None, "target", f"{target!r} has no tokens for this tokenizer")])

    monkeypatch.setattr(causal, "encode", encode)
    facts = some_facts(25)
    for run in (
        lambda: encode_edits(base, facts, end_of_text=True),
        lambda: plan(base, facts, SETTINGS, 4),
        lambda: calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=4),
    ):
        with pytest.raises(FactsError) as caught:
            run()
        assert (caught.value.total, len(caught.value.problems)) == (25, 20)
        assert str(caught.value.problems[3]) == "fact f3:target: 'Paris' has no tokens for this tokenizer"


# ---------------------------------------------------------------- which editor


def test_no_editor_is_none(base: Base) -> None:
    assert find_ready(base, read_spec(None), None) is None


def test_the_folder_given_then_the_installed_then_the_shipped(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    monkeypatch.setattr(malmen_cli, "__file__", str(package / "__init__.py"))
    shipped = save(package / "editors" / base.fingerprint, base, replace(SETTINGS, rank=2))
    ready = find_ready(base, read_spec(None), None)
    assert ready is not None
    assert (ready.source, ready.editor.settings.rank) == (shipped, 2)
    installed = install_editor(save(tmp_path / "mine", base, replace(SETTINGS, rank=3)), base.fingerprint)
    ready = find_ready(base, read_spec(None), None)
    assert ready is not None
    assert (ready.source, ready.editor.settings.rank) == (installed, 3)
    given = save(tmp_path / "given", base)
    ready = find_ready(base, read_spec(None), given)
    assert ready is not None
    assert (ready.source, ready.editor.settings) == (given, SETTINGS)
    digest = json.loads((given / "editor.json").read_text())["files"]["editor.safetensors"]
    assert ready.record() == {"path": "given", "sha256": digest}
    assert ready.calibration is None


def test_identity_takes_no_installed_editor(base: Base, tmp_path: Path) -> None:
    install_editor(save(tmp_path / "mine", base), base.fingerprint)
    assert find_ready(base, read_spec(None, method="identity"), None) is None


def test_without_a_method_the_editor_brings_its_own(base: Base, tmp_path: Path) -> None:
    mend = save(tmp_path / "mend", base, replace(SETTINGS, aggregation="sum"), method="mend")
    for folder in (mend, None):
        ready = find_ready(base, read_spec(None), folder)
        assert ready is not None
        assert (ready.method, ready.editor.settings.aggregation) == ("mend", "sum")
        install_editor(mend, base.fingerprint)


def test_an_installed_editor_of_another_method_is_passed_by_and_a_given_one_refused(base: Base, tmp_path: Path) -> None:
    mend = save(tmp_path / "mend", base, replace(SETTINGS, aggregation="sum"), method="mend")
    install_editor(mend, base.fingerprint)
    assert find_ready(base, read_spec(None, method="malmen"), None) is None
    assert find_ready(base, read_spec(None, method="mend"), None) is not None
    for method in ("malmen", "identity"):
        with pytest.raises(EditorError, match=f"trained for method mend, not {method}"):
            find_ready(base, read_spec(None, method=method), mend)


def test_another_base_is_refused(base: Base, tmp_path: Path, tiny_llama: Path) -> None:
    folder = save(tmp_path / "editor", base)
    with pytest.raises(EditorError, match="another base"):
        find_ready(load_base(str(tiny_llama), device="cpu"), read_spec(None), folder)
    with pytest.raises(EditorError, match="another base"):
        find_ready(replace(base, fingerprint="f" * 64), read_spec(None), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"rank": "four"}}, "its settings cannot be read"),
        ({"settings": {"depth": 4}}, "its settings cannot be read"),
        ({"settings": None}, "its settings cannot be read"),
        ({"settings": ["rank"]}, "its settings cannot be read"),
        (
            {"settings": asdict(replace(SETTINGS, rank=5))},
            "for 2 blocks of rank 4, its settings say 2 of rank 5",
        ),
        ({"settings": asdict(replace(SETTINGS, last_blocks=1))}, "does not fit this base"),
        (
            {"settings": asdict(replace(SETTINGS, blocks=0))},
            "for 2 blocks of rank 4, its settings say 0 of rank 4",
        ),
    ],
)
def test_damaged_settings(base: Base, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(EditorError, match=said):
        find_ready(base, read_spec(None), save(tmp_path / "editor", base, **changes))


def test_damaged_tensors_and_a_folder_that_is_none(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "editor", base)
    data = bytearray((folder / "editor.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "editor.safetensors").write_bytes(bytes(data))
    with pytest.raises(EditorError, match="damaged"):
        find_ready(base, read_spec(None), folder)
    with pytest.raises(EditorError, match="not found"):
        find_ready(base, read_spec(None), tmp_path / "nowhere")


def test_an_editor_survives_saving_bitwise(base: Base, tmp_path: Path) -> None:
    ready = calibrated_identity(base, some_facts(), SETTINGS, seed=0, batch_size=4)
    said = {"base": {"fingerprint": base.fingerprint}, "method": "identity"}
    settings = asdict(ready.editor.settings)
    save_editor(tmp_path / "e", ready.editor.state(), said | {"settings": settings}, force=False)
    again = find_ready(base, Spec(), tmp_path / "e")
    assert again is not None
    one, other = (make_shift(base, r, some_facts(), batch_size=4) for r in (ready, again))
    for name, module in one.modules.items():
        assert torch.equal(module.matrix(), other.modules[name].matrix())


# ---------------------------------------------------------------- the identity network


def loss(base: Base, facts: Sequence[Fact]) -> float:
    edits = encode_edits(base, facts, end_of_text=True)
    total = 0.0
    with torch.no_grad():
        for one in edits:
            logits = base.model(torch.tensor([one.ids])).logits[0, one.n_prompt - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(one.answer)))
    return total / len(edits)


@pytest.mark.parametrize("probes", [True, False])
@pytest.mark.parametrize("count", [1, 8, 80])
def test_the_identity_network_makes_edits_stick(base: Base, probes: bool, count: int) -> None:
    """One fact, several, and more rows than dk (dense); with locality probes and without."""
    facts = some_facts(count, probes)
    ready = calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=8)
    assert (ready.method, ready.source, ready.record()) == ("identity", None, None)
    assert ready.editor.settings == replace(SETTINGS, network="identity")
    shift = make_shift(base, ready, facts, batch_size=8)
    assert all(0 < float(m.matrix().norm()) < 1e4 for m in shift.modules.values())
    before = loss(base, facts)
    with applied(base.model, shift):
        assert loss(base, facts) < before - 1


def test_the_step_is_calibrated_on_the_base_s_own_text_where_there_are_no_probes(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    true = identity.calibrate

    def calibrate(editor: Any, runner: Any, edits: Any, wordings: Any, references: Any, **options: Any) -> Any:
        seen.update(edits=edits, wordings=wordings, references=references)
        return true(editor, runner, edits, wordings, references, **options)

    monkeypatch.setattr(identity, "calibrate", calibrate)
    calibrated_identity(base, some_facts(100), SETTINGS, seed=0, batch_size=16)
    assert len(seen["edits"]) == 100  # the step has to suit the number of facts edited at once
    assert len(seen["references"]) == identity.JUDGED_FACTS
    assert len(seen["wordings"]) == 2 * identity.JUDGED_FACTS
    calibrated_identity(base, some_facts(3, probes=False), SETTINGS, seed=0, batch_size=16)
    assert len(seen["references"]) == 32
    bos = base.tokenizer.bos_token_id
    assert all(r.sequence.ids[0] == bos and r.sequence.n_prompt == 13 for r in seen["references"])


def test_preserved_keys_are_those_of_probes_alone(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token stands in for an answer: its key would be one of a text nobody wrote."""
    seen: list[Any] = []
    monkeypatch.setattr(identity, "preserve", lambda editor, runner, sequences, size: seen.extend(sequences))
    facts = some_facts(4)
    calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=4)
    wanted = {tuple(base.tokenizer(probe.prompt)["input_ids"]) for fact in facts for probe in fact.locality}
    assert wanted <= {sequence.ids for sequence in seen}
    assert len(seen) == 32 + 4


def difference(mine: Shift, theirs: Shift) -> float:
    """The largest distance of a module's two shifts, in units of the second."""
    pairs = [(mine.modules[name].matrix(), module.matrix()) for name, module in theirs.modules.items()]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def test_order_seed_and_repetition(base: Base) -> None:
    facts = some_facts(6)
    one = calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=4)
    other = calibrated_identity(base, facts[::-1], SETTINGS, seed=0, batch_size=4)
    assert one.calibration is not None
    assert other.calibration is not None
    assert other.calibration.step == one.calibration.step


@pytest.mark.parametrize("step", [1.0, 16.0])
@pytest.mark.parametrize("rounds", [1, ROUNDS])
def test_the_order_of_facts_changes_the_rounding_alone(base: Base, rounds: int, step: float) -> None:
    """In proportion to the shift, since a row's rounding is: a longer step or a further pass makes both larger.

    fp32 rounds to 6e-8, and which facts share a batch moves that by a few units, which later passes capture again:
    measured 3e-7 to 6e-7. In fp64 batches make no difference, and what is left is the shift's own fp32, captured again
    in every pass: 1e-7 to 3e-7 on one processor, up to 1.2e-6 on another.
    """
    facts = some_facts(6)
    ready = with_rounds(calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=4), rounds)
    ready.editor.groups[0].network.log_lr.data.add_(math.log(step))
    exact = replace(base, model=copy.deepcopy(base.model).double())
    for model in (base, exact):
        shift, again = (make_shift(model, ready, some, batch_size=4) for some in (facts, facts[::-1]))
        assert difference(again, shift) <= 2e-6
    alone = make_shift(exact, ready, facts, batch_size=1)
    assert difference(alone, shift) <= 2e-6


@pytest.mark.parametrize("settings", [{}, {"tokens": "answer"}, {"tokens": "all"}], ids=str)
def test_one_fact_of_one_token_moves_every_module(base: Base, settings: dict[str, Any]) -> None:
    """Behind the last block nothing reads the subject or the prompt: that must not hold the answer's row back."""
    fact = Fact("peru", "The capital of Peru is", "Rome", subject="Peru")
    chosen = replace(SETTINGS, end_of_text=False, **settings)
    (encoded,) = encode_edits(base, [fact], end_of_text=False)
    assert len(encoded.answer) == 1
    shift = make_shift(base, calibrated_identity(base, [fact], chosen, seed=0, batch_size=4), [fact], batch_size=4)
    assert all(float(module.matrix().norm()) > 1e-2 for module in shift.modules.values())


def with_rounds(ready: Ready, rounds: int) -> Ready:
    editor = ready.editor
    return replace(ready, editor=Editor(replace(editor.settings, rounds=rounds), editor.groups, editor.layouts))


def test_few_facts_have_half_as_many_passes_again(base: Base) -> None:
    """Few: a row for every four numbers of a key, at most. Unless the user says how many, or one is enough."""
    settings, passes = replace(SETTINGS, rounds=None), {}
    ready = Ready(Editor.fresh(base.model, settings), "malmen")
    assert [group.dk for group in ready.editor.groups] == [64]
    for count in (1, 2, 3, 4, 5, 8, 17, 90):
        rows = row_count(encode_edits(base, some_facts(count), end_of_text=True), settings.tokens)
        passes[rows] = finishing(base, ready, some_facts(count)).settings.passes
    assert passes == {rows: 6 if rows <= 16 else 4 for rows in passes}
    assert set(passes.values()) == {4, 6}
    assert (ready.finishing, finishing(base, ready, some_facts(1)).finishing) == (0, 2)
    asked = replace(ready, rounds_asked=True)
    assert finishing(base, asked, some_facts(1)) is asked
    once = Ready(Editor.fresh(base.model, replace(settings, rounds=1)), "malmen")
    assert finishing(base, once, some_facts(1)) is once
    assert ready.settings.rounds is None


def test_the_spec_says_how_many_passes_and_nobody_else(base: Base, tmp_path: Path) -> None:
    editor = Editor.fresh(base.model, replace(SETTINGS, rounds=4))
    said = {"base": {"fingerprint": base.fingerprint}, "method": "malmen", "settings": vars(editor.settings)}
    save_editor(tmp_path / "editor", editor.state(), said, force=False)
    for rounds, given, wanted in (
        (None, {}, 6),
        (None, {"rounds": None}, 6),
        (4, {"rounds": 4}, 4),
        (2, {"rounds": 2}, 2),
    ):
        spec = Spec(settings=replace(SETTINGS, rounds=rounds), given=given)
        told: dict[str, Any] = {"editor": tmp_path / "editor", "stats_from": None, "seed": 0, "batch_size": 4}
        assert ready_for(base, spec, some_facts(1), **told).settings.passes == wanted


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("count", [4, 90])
def test_progress_counts_every_fact_once_a_pass(base: Base, count: int, rounds: int) -> None:
    ready = with_rounds(calibrated_identity(base, some_facts(8), SETTINGS, seed=0, batch_size=4), rounds)
    counted: list[int] = []
    shift = make_shift(base, ready, some_facts(count), batch_size=4, progress=counted.append)
    assert sum(counted) == count * rounds
    found = plan(base, some_facts(count), ready.editor.settings, 4)
    assert [module.rank for module in shift.modules.values()] == [found.rank] * 2
    assert len(shift.row_facts) == (found.rank or 0)


@pytest.mark.parametrize("aggregation", ["ridge", "sum"])
@pytest.mark.parametrize("count", [4, 90])
def test_several_passes_are_single_ones_on_the_model_edited_so_far(base: Base, count: int, aggregation: str) -> None:
    """Factors and dense alike: a loop by hand that runs every block each time gives the same shift."""
    facts = some_facts(count)
    settings = replace(SETTINGS, last_blocks=1, rounds=3, aggregation=aggregation)
    ready = calibrated_identity(base, facts, settings, seed=0, batch_size=4)
    found = make_shift(base, ready, facts, batch_size=4)
    edits, ids = encode_edits(base, facts, end_of_text=True), [fact.id for fact in facts]
    method, runner = Malmen(ready.editor), Runner(base)
    assert not runner.replaying
    wanted = method.shift(runner, edits, ids, batch_size=4)
    for _ in range(2):
        with applied(base.model, wanted):
            more = method.shift(runner, edits, ids, batch_size=4)
        wanted = wanted.plus(more)
    assert difference(found, wanted) <= 2e-6  # rounding, as above: the same batches, but other blocks in one forward
    assert found.row_facts == wanted.row_facts
    assert [m.rank for m in found.modules.values()] == [m.rank for m in wanted.modules.values()]
    first = make_shift(base, with_rounds(ready, 1), facts, batch_size=4)
    assert difference(found, first) > 0.1


@pytest.mark.parametrize("count", [4, 90])
def test_what_is_kept_on_disk_gives_the_same_bits(base: Base, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = some_facts(count)
    settings = replace(SETTINGS, last_blocks=1, rounds=3)
    ready = calibrated_identity(base, facts, settings, seed=0, batch_size=4)
    spilled: list[int] = []
    keep = Spill.add
    monkeypatch.setattr(Spill, "add", lambda self, states: (keep(self, states), spilled.append(len(self))))
    wanted = make_shift(base, ready, facts, batch_size=4)
    assert max(spilled) == 0
    found = make_shift(base, ready, facts, batch_size=4, memory=0)
    assert max(spilled) == count - 1  # all but the one that stands in memory
    assert all(torch.equal(m.matrix(), wanted.modules[name].matrix()) for name, m in found.modules.items())


def test_memit_keeps_on_disk_what_memory_is_not_for(
    tiny_model_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_model_factory("gpt2", layers=3)), device="cpu")
    facts = [replace(fact, subject="Peru") for fact in some_facts(6)]
    given = {"blocks": (1,), "steps": 2, "prefixes": 0, "moment_weight": 10.0, "stats_tokens": 100}
    ready = prepare(base, "memit", MemitSettings(**given), facts, stats_from=None, seed=0, batch_size=4)
    spilled: list[int] = []
    keep = Spill.add
    monkeypatch.setattr(Spill, "add", lambda self, states: (keep(self, states), spilled.append(len(self))))
    wanted = make_shift(base, ready, facts, batch_size=4)
    assert max(spilled, default=0) == 0
    shutil.rmtree(cache_home() / "targets")  # else the second edit starts behind the part that spills
    found = make_shift(base, ready, facts, batch_size=4, memory=0)
    assert max(spilled) > 0
    assert all(torch.equal(m.matrix(), wanted.modules[name].matrix()) for name, m in found.modules.items())


def test_blocks_in_front_of_the_edited_ones_run_once_for_all_passes(base: Base) -> None:
    """Twelve facts in three batches; beyond those, only what a runner's own check of the replay takes."""
    facts, counted, runs = some_facts(12), [], {}
    ready = calibrated_identity(base, facts, replace(SETTINGS, last_blocks=1), seed=0, batch_size=4)
    handle = base.model.transformer.h[0].mlp.register_forward_hook(lambda *_: counted.append(1))
    try:
        Runner(base, 1)
        check = len(counted)
        for rounds in (2, 5):
            counted.clear()
            make_shift(base, with_rounds(ready, rounds), facts, batch_size=4)
            runs[rounds] = len(counted) - check
    finally:
        handle.remove()
    assert runs == {2: 3, 5: 3}


def test_a_further_pass_learns_what_the_first_did_not(base: Base) -> None:
    facts = some_facts(12)
    ready = calibrated_identity(base, facts, SETTINGS, seed=0, batch_size=4)
    losses = []
    for rounds in (1, 3):
        with applied(base.model, make_shift(base, with_rounds(ready, rounds), facts, batch_size=4)):
            losses.append(loss(base, facts))
    assert losses[1] < losses[0]


def test_a_base_of_nan_is_named(base: Base, tmp_path: Path) -> None:
    ready = calibrated_identity(base, some_facts(4), SETTINGS, seed=0, batch_size=4)
    weight = base.model.transformer.h[0].mlp.c_fc.bias
    kept = weight.detach().clone()
    try:
        weight.data[0] = torch.nan
        with pytest.raises(NumericsError, match=r"transformer\.h\.\d\.mlp\.c_proj: .* fact f\d"):
            make_shift(base, ready, some_facts(4), batch_size=4)
    finally:
        weight.data.copy_(kept)


@contextmanager
def spoilt(base: Base, facts: Sequence[Fact], which: int) -> Iterator[None]:
    """During the body, a word that only one of the facts has is NaN to the model."""
    mine, *others = (set(edit.ids) for edit in encode_edits(base, [facts[which], *facts], end_of_text=True))
    del others[which]
    word = min(mine.difference(*others))
    weight = base.model.get_input_embeddings().weight
    kept = weight[word].detach().clone()
    weight.data[word] = torch.nan
    try:
        yield
    finally:
        weight.data[word] = kept


@pytest.mark.parametrize("method", ["identity", "calibration", "finetune", "memit"])
def test_nan_on_one_fact_is_named_by_module_and_fact_id(tiny_llama: Path, method: str) -> None:
    """Whatever its place in a batch, and among the facts given."""
    base = load_base(str(tiny_llama), device="cpu")
    facts = [replace(fact, subject=fact.prompt[15:-3]) for fact in some_facts(8, probes=False)]
    options: dict[str, Any] = {"seed": 0, "batch_size": 3}
    memit = MemitSettings(blocks=(0,), steps=2, prefixes=0, stats_tokens=300)
    calibrate = partial(calibrated_identity, base, facts, SETTINGS, **options)
    ready: Any = {
        "identity": calibrate,
        "calibration": lambda: None,
        "finetune": lambda: Tuning(FinetuneSettings(epochs=2)),
        "memit": lambda: prepare(base, "memit", memit, facts, stats_from=None, **options),
    }[method]()
    run = calibrate if ready is None else partial(make_shift, base, ready, facts, batch_size=3)
    with spoilt(base, facts, 5), pytest.raises(NumericsError) as caught:
        run()
    assert "fact f5" in str(caught.value)
    assert "counting from 0" not in str(caught.value)
    assert "model.layers." in str(caught.value) or method == "memit"


# ---------------------------------------------------------------- fine-tuning

TUNING = Tuning(FinetuneSettings(epochs=40, lr=2e-2))


def test_fine_tuning_makes_edits_stick_in_one_matrix(base: Base) -> None:
    facts = some_facts(8)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    counted: list[int] = []
    notes: list[str] = []
    shift = make_shift(base, TUNING, facts, batch_size=4, progress=counted.append, note=notes.append)
    assert [list(shift.modules), [m.rank for m in shift.modules.values()]] == [["transformer.h.1.mlp.c_proj"], [None]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert sum(counted) == 8 * len(notes) > 0
    before_loss = loss(base, facts)
    with applied(base.model, shift):
        assert loss(base, facts) < before_loss - 1


def test_the_seed_of_fine_tuning_shuffles(base: Base) -> None:
    short = replace(TUNING, settings=replace(TUNING.settings, epochs=2, batch_facts=3))
    one, again, other = (
        make_shift(base, replace(short, seed=seed), some_facts(8), batch_size=4).modules["transformer.h.1.mlp.c_proj"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.matrix(), again.matrix())
    assert not torch.equal(one.matrix(), other.matrix())


@pytest.mark.parametrize("count", [1, 60])
def test_plan_of_fine_tuning(base: Base, count: int) -> None:
    facts = some_facts(count)
    found = plan(base, facts, replace(TUNING.settings, block=0), batch_size=4)
    tokens = sum(len(edit.ids) for edit in encode_edits(base, facts, end_of_text=True))
    assert found.modules == {"transformer.h.0.mlp.c_proj": (64, 32)}
    assert (found.facts, found.tokens, found.rows, found.passes, found.rank) == (count, tokens, tokens, 40, None)
    weights = sum(p.numel() * 4 for p in base.model.parameters())
    assert weights + 5 * 4 * 64 * 32 + 4 * 32 * tokens < found.memory < 4 * weights


def test_facts_that_cannot_be_encoded_are_named_by_fine_tuning(base: Base) -> None:
    with pytest.raises(FactsError, match="fact too-long:prompt"):
        make_shift(base, TUNING, [Fact("too-long", "a b c d e f " * 40, "Rome")], batch_size=4)


def test_the_manifest_of_fine_tuning(base: Base) -> None:
    found = manifest(base, TUNING, some_facts(4), "a" * 64, 7)
    assert found["method"] == {"name": "finetune"} | asdict(TUNING.settings)
    assert (found["editor"], found["calibration"], found["seed"]) == (None, None, 7)
    canonical(found)


# ---------------------------------------------------------------- MEMIT

MEMIT = MemitSettings(blocks=(0,), lr=0.3, clamp=4.0, steps=6, prefixes=2, moment_weight=1.0, stats_tokens=200)


def with_subjects(count: int = 8) -> list[Fact]:
    return [replace(fact, subject="Peru") for fact in some_facts(count)]


def inserting(base: Base, seed: int = 0) -> Insertion:
    return prepare(base, "memit", MEMIT, with_subjects(), stats_from=None, seed=seed, batch_size=4)


def test_memit_makes_edits_stick_in_its_blocks(base: Base) -> None:
    facts = with_subjects()
    counted: list[int] = []
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    shift = make_shift(base, inserting(base), facts, batch_size=8, progress=counted.append)
    assert {name: module.rank for name, module in shift.modules.items()} == {"transformer.h.0.mlp.c_proj": 8}
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert sum(counted) == 8
    before_loss = loss(base, facts)
    with applied(base.model, shift):
        assert loss(base, facts) < before_loss


def test_lambda_grows_with_the_facts_where_it_is_left_open(base: Base) -> None:
    """1,000, or 4 a fact where that is more; what is asked for stays. The manifest says which it was."""
    open_still = replace(MEMIT, moment_weight=None)
    assert [open_still.for_facts(n).moment_weight for n in (0, 1, 250, 251, 1024)] == [1000, 1000, 1000, 1004, 4096]
    assert MEMIT.for_facts(5000) is MEMIT
    facts, options = with_subjects(), {"stats_from": None, "seed": 0, "batch_size": 4}
    ready, asked = (
        prepare(base, "memit", s, facts, **options) for s in (open_still, replace(MEMIT, moment_weight=1e3))
    )
    assert manifest(base, ready, facts, "a" * 64, 0)["method"]["moment_weight"] == 1000.0
    one, other = (make_shift(base, each, facts, batch_size=8) for each in (ready, asked))
    assert all(torch.equal(one.modules[n].matrix(), other.modules[n].matrix()) for n in one.modules)
    many = replace(ready, settings=open_still.for_facts(10_000))
    assert float(make_shift(base, many, facts, batch_size=8).modules[ready.modules[0]].matrix().norm()) < float(
        one.modules[ready.modules[0]].matrix().norm()
    )


def test_the_seed_of_memit_is_its_prefixes(base: Base) -> None:
    one, again, other = (inserting(base, seed) for seed in (0, 0, 1))
    assert one.prefixes == again.prefixes != other.prefixes
    assert len(one.prefixes) == 2
    assert all("\n" not in prefix and prefix for prefix in one.prefixes)
    assert torch.equal(*(x.statistics.moments[x.modules[0]] for x in (one, other)))
    first, second = (make_shift(base, x, with_subjects(3), batch_size=8) for x in (one, again))
    name = one.modules[0]
    assert torch.equal(first.modules[name].matrix(), second.modules[name].matrix())


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (64, 64), (65, None)])
def test_plan_of_memit(base: Base, count: int, rank: int | None) -> None:
    found = plan(base, with_subjects(count), MEMIT, batch_size=4)
    assert found.modules == {"transformer.h.0.mlp.c_proj": (64, 32)}
    assert (found.facts, found.rows, found.passes, found.rank) == (count, count, 1, rank)
    assert found.memory > sum(p.numel() * 4 for p in base.model.parameters())


def test_facts_are_refused_before_statistics_are_built(base: Base) -> None:
    with pytest.raises(FactsError, match="fact f0:subject: missing"):
        prepare(base, "memit", MEMIT, some_facts(3), stats_from="nowhere.txt", seed=0, batch_size=4)


def test_the_manifest_of_memit(base: Base) -> None:
    found = manifest(base, inserting(base), with_subjects(4), "a" * 64, 7)
    assert found["method"] == {"name": "memit"} | asdict(MEMIT)
    assert (found["editor"], found["calibration"]) == (None, None)
    assert found["statistics"] == {"name": "sampled", "tokens": 200, "dtype": "float32"}
    canonical(found)


# ---------------------------------------------------------------- the record


@pytest.fixture
def untrained(base: Base) -> Ready:
    return calibrated_identity(base, some_facts(4), SETTINGS, seed=0, batch_size=4)


def test_the_manifest_of_an_untrained_editor(base: Base, untrained: Ready) -> None:
    found = manifest(base, untrained, some_facts(4), "a" * 64, 7)
    who = {"name": base.name, "revision": None, "fingerprint": base.fingerprint}
    assert found["base"] == who | {"dtype": "float32"}
    method = found["method"]
    assert isinstance(method, dict)
    assert method["name"] == "identity"
    assert method["last_blocks"] == 2
    assert found["editor"] is None
    assert found["facts"] == {"sha256": "a" * 64, "count": 4}
    assert found["seed"] == 7
    versions = found["versions"]
    assert isinstance(versions, dict)
    assert set(versions) == {"malmen", "python", "torch", "transformers"}
    assert untrained.calibration is not None
    assert found["calibration"] == asdict(untrained.calibration)
    canonical(found)


def test_the_manifest_of_a_trained_one(base: Base, tmp_path: Path) -> None:
    ready = find_ready(base, read_spec(None), save(tmp_path / "editor", base))
    assert ready is not None
    found = manifest(base, ready, [], "a" * 64, 0)
    assert found["editor"] == {"path": "editor", "sha256": ready.sha256}
    assert found["calibration"] is None
    canonical(found)
    assert str(tmp_path) not in canonical(found | {"base": None})


def test_make_shift_leaves_editor_and_base_bitwise_alone(base: Base, untrained: Ready) -> None:
    states = untrained.editor.state(), base.model.state_dict()
    kept = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    make_shift(base, untrained, some_facts(6), batch_size=4)
    for before, after in zip(kept, (untrained.editor.state(), base.model.state_dict()), strict=True):
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_spec_that_contradicts_a_trained_editor_is_refused(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "mine", base)
    agreeing = {"rank": SETTINGS.rank, "rounds": 2}
    spec = Spec(settings=replace(SETTINGS, rounds=2), given=agreeing)
    ready = find_ready(base, spec, folder)
    assert ready is not None
    assert ready.editor.settings.passes == 2
    for name, value in (("rank", SETTINGS.rank + 1), ("end_of_text", not SETTINGS.end_of_text)):
        other = Spec(settings=replace(SETTINGS, **{name: value}), given={name: value}, source="mine.yaml")
        with pytest.raises(EditorError, match=f"trained with {name}: .*mine.yaml says"):
            find_ready(base, other, folder)


@pytest.mark.parametrize("said", [0, -1])
def test_no_limit_in_the_config_is_no_limit(base: Base, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.model.config, base.model.config.attribute_map["max_position_embeddings"], said)
    assert base.room is None
    assert encode_edits(base, [Fact(id="a", prompt="Snow is in", target="Paris")], end_of_text=True)


def test_a_prompt_longer_than_the_model_reads_is_refused_by_name(base: Base) -> None:
    room = base.room
    assert room == 128
    long = Fact("too-long", "a b c d e f " * 40, "Rome")
    with pytest.raises(
        FactsError, match=r"fact too-long:prompt: \d+ tokens with its answer, but the model reads at most"
    ):
        encode_edits(base, [Fact("fine", "The capital of France is", "Rome"), long], end_of_text=True)
