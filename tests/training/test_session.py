"""From facts to an editor folder: interrupted, killed, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import malmen_cli.training.loop as loop_module
import malmen_cli.training.session as session
from malmen_cli.artifact.editors import load_editor, save_editor
from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base
from malmen_cli.edit import find_ready
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.spec import Spec
from malmen_cli.exceptions import EditorError, OutputError
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.files import facts_sha256
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.objective import MetaLoss
from malmen_cli.training.session import Order, state_before, state_folder, train
from malmen_cli.training.settings import TrainingSettings

SETTINGS = MalmenSettings(last_blocks=1, rank=4, preserved_rank=8)
TRAINING = TrainingSettings(
    steps=5, facts_per_step=(4, 8), meta_facts=4, validate_every=2, valid_facts=4, warmup=2, calibration_facts=8,
    continuation=2,
)  # fmt: skip


@pytest.fixture
def order(make_facts: Callable[..., list[Fact]]) -> Order:
    facts = make_facts(20)
    sources = {"sources": ("/users/somebody/a.jsonl", "b.jsonl"), "valid_sources": ("../held/out.jsonl",)}
    return Order(Spec(settings=SETTINGS), TRAINING, facts[:16], facts[16:], batch_size=8, **sources)


def interrupt_at(step: int, how: Callable[[], None]) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == step:
            how()

    return report


def ctrl_c() -> None:
    raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------- what is left


def test_an_editor_folder_and_nothing_else(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    out = tmp_path / "editor"
    trained = train(tiny_base, order, out)
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]
    assert sorted(contents(out)) == ["README.md", "editor.json", "editor.safetensors"]
    tensors, said = load_editor(out, fingerprint=tiny_base.fingerprint)
    Editor.restored(tiny_base.model, SETTINGS, tensors)
    assert trained.folder == out
    assert said["base"]["fingerprint"] == tiny_base.fingerprint
    assert said["method"] == "malmen"
    assert said["settings"]["rank"] == 4
    assert said["training"]["facts_per_step"] == [4, 8]
    assert said["training"]["dtype"] == "torch.float32"
    facts = {"sha256": facts_sha256(order.train), "count": 16, "sources": ["a.jsonl", "b.jsonl"]}
    assert said["facts"] == facts
    assert said["validation_facts"] == {"sha256": facts_sha256(order.valid), "count": 4, "sources": ["out.jsonl"]}
    assert said["groups"][0]["modules"] == ["transformer.h.1.mlp.c_proj"]
    assert [at["step"] for at in said["scores"]["at"]] == [2, 4, 5]
    assert said["best_step"] in (2, 4, 5)
    assert said["calibration"]["step"] > 0


def test_a_base_narrower_than_the_preserved_rank(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    """Every default but the network's rank: 256 preserved keys of 64 numbers are all there are."""
    settings = MalmenSettings(rank=4)
    train(tiny_base, replace(order, spec=Spec(settings=settings)), tmp_path / "editor")
    tensors, said = load_editor(tmp_path / "editor")
    assert tensors["0.preserved_basis"].shape == (1, 64, 64)
    assert said["groups"][0]["modules"] == ["transformer.h.1.mlp.c_proj"]
    Editor.restored(tiny_base.model, settings, tensors)


def test_same_inputs_same_bytes(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    train(tiny_base, order, tmp_path / "one")
    train(tiny_base, order, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_best_editor_is_the_one_saved(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {2: 0.9, 4: 0.2, 5: 0.5}

    def validate(self: Any, parts: int = 1) -> Any:
        """By the editor that is validated: at the end it is the best again, whatever the step."""
        log_lr = self.editor.state()["0.log_lr"]
        known = [step for step, tensor in kept.items() if torch.equal(tensor, log_lr)]
        step = known[0] if known else self.step
        kept.setdefault(step, log_lr.clone())
        return loop_module.Validation(*[scores[step]] * 6)

    kept: dict[int, Any] = {}
    monkeypatch.setattr(loop_module.Trainer, "validate", validate)
    trained = train(tiny_base, order, tmp_path / "editor")
    assert trained.description["best_step"] == 2
    assert trained.description["scores"]["score"] == pytest.approx(0.9)
    assert set(trained.description["scores"]["saved"].values()) == {0.9}
    tensors, _ = load_editor(tmp_path / "editor")
    assert tensors["0.log_lr"].tolist() == kept[2].tolist() != kept[5].tolist()


def test_the_scores_are_those_of_the_editor_as_saved(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    """Restored from its folder by somebody else, it validates to the very figures that editor.json gives."""
    out = tmp_path / "editor"
    train(tiny_base, order, out)
    tensors, said = load_editor(out)
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16} == {
        "0.down", "0.up", "0.preserved_basis",
    }  # fmt: skip
    editor = Editor.restored(tiny_base.model, SETTINGS, tensors)
    runner = Runner(tiny_base, min(block_index(tiny_base.model, name) for name in editor.names))
    parts = (encode_examples(tiny_base.task, facts, end_of_text=True) for facts in (order.train, order.valid))
    found = Trainer(runner, editor, *parts, TRAINING, batch_size=order.batch_size).validate()
    assert asdict(found) == said["scores"]["saved"]
    assert found.score == said["scores"]["score"]


def test_an_editor_saved_in_fp32_still_loads(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    """As editors were before their large tensors were halved: bit for bit what was saved."""
    settings = replace(SETTINGS, preserved_rank=0)
    state = Editor.fresh(tiny_base.model, settings, seed=3).state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    said = {"base": {"fingerprint": tiny_base.fingerprint}, "method": "malmen", "settings": asdict(settings)}
    save_editor(tmp_path / "old", state, said, force=False)
    ready = find_ready(tiny_base, Spec(), tmp_path / "old")
    assert ready is not None
    assert all(torch.equal(tensor, state[name]) for name, tensor in ready.editor.state().items())


def test_the_card_names_data_and_tensors_but_no_folder(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    out = tmp_path / "editor"
    said = train(tiny_base, order, out).description
    card = (out / "README.md").read_text(encoding="utf-8")
    for told in (
        f"- facts: 16 of a.jsonl, b.jsonl, sha256 {facts_sha256(order.train)}",
        f"- validation facts: 4 of out.jsonl, sha256 {facts_sha256(order.valid)}",
        f"- sha256 of editor.safetensors: {contents(out)['editor.safetensors']}",
        f"es_greedy={json.dumps(said['scores']['saved']['es_greedy'])}",
        "preserved_rank=8",
        "steps=5",
    ):
        assert told in card
    for place in ("somebody", "held", "..", str(tmp_path), str(tiny_base.folder)):
        assert place not in card
        assert place not in json.dumps({key: said[key] for key in ("facts", "validation_facts")})


@pytest.mark.parametrize("name", ["editor", "a.b", "."])
def test_the_state_lies_beside_the_output(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = tmp_path / "here.training" if name == "." else tmp_path / "here" / f"{name}.training"
    assert state_folder(Path(name)) == expected


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("step", [1, 2, 3])
def test_ctrl_c_keeps_the_state_and_resuming_is_an_unbroken_run(
    tiny_base: Base, order: Order, tmp_path: Path, step: int
) -> None:
    """Every byte of the folder, and the state is gone at the end."""
    out, notes = tmp_path / "editor", []
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, out, report=interrupt_at(step, ctrl_c), note=notes.append)
    assert not out.exists()
    assert load_editor(state_folder(out))[1]["step"] == step
    assert "go on with --resume" in notes[-1]
    train(tiny_base, order, out, resume=True, note=notes.append)
    assert f"going on after step {step}" in notes
    assert not state_folder(out).exists()
    train(tiny_base, order, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state saved between the update and the count of a step would take the step twice."""
    out, true, seen = tmp_path / "editor", loop_module.meta_loss, []

    def meta_loss(*arguments: Any, **options: Any) -> MetaLoss:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return true(*arguments, **options)

    monkeypatch.setattr(loop_module, "meta_loss", meta_loss)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, out)
    assert load_editor(state_folder(out))[1]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(loop_module, "meta_loss", true)
    train(tiny_base, order, out, resume=True)
    train(tiny_base, order, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_signal_does_not_wait_and_leaves_the_last_whole_state(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, true, seen = tmp_path / "editor", loop_module.meta_loss, []

    def meta_loss(*arguments: Any, **options: Any) -> MetaLoss:
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return true(*arguments, **options)

    monkeypatch.setattr(loop_module, "meta_loss", meta_loss)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, out)
    assert load_editor(state_folder(out))[1]["step"] == 2


def test_in_a_thread_signals_are_left_alone(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    done: list[session.Trained] = []
    thread = threading.Thread(target=lambda: done.append(train(tiny_base, order, tmp_path / "editor")))
    thread.start()
    thread.join()
    assert done[0].folder == tmp_path / "editor"


def test_killed_between_saving_the_editor_and_dropping_the_state(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "editor"
    true = session.shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **options: Any) -> None:
        ctrl_c() if Path(path) == state_folder(out) else true(path, *arguments, **options)

    monkeypatch.setattr(session.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, out)
    monkeypatch.undo()
    before = contents(out)
    train(tiny_base, order, out, resume=True)
    assert contents(out) == before
    assert not state_folder(out).exists()


def test_bad_steps_are_kept_as_null_and_come_back(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite is no reason to lose the training: JSON has no NaN."""
    out, true, seen = tmp_path / "editor", loop_module.meta_loss, []

    def meta_loss(*arguments: Any, **options: Any) -> MetaLoss:
        found = true(*arguments, **options)
        seen.append(1)
        return MetaLoss(math.nan, found.moved, found.gradients) if len(seen) in (1, 2) else found

    monkeypatch.setattr(loop_module, "meta_loss", meta_loss)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, out, report=interrupt_at(3, ctrl_c))
    history = load_editor(state_folder(out))[1]["history"]
    assert [item["learned"] is None for item in history] == [True, True, False]
    trained = train(tiny_base, order, out, resume=True)
    assert trained.description["scores"]["at"][0]["learned"] is None
    json.dumps(trained.description, allow_nan=False)


# ---------------------------------------------------------------- refused


@pytest.fixture
def unfinished(tiny_base: Base, order: Order, tmp_path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, order, tmp_path / "editor", report=interrupt_at(1, ctrl_c))
    return tmp_path / "editor"


def test_an_unfinished_training_is_not_started_over_unasked(tiny_base: Base, order: Order, unfinished: Path) -> None:
    before = contents(state_folder(unfinished))
    for replace_output in (False, True):
        with pytest.raises(OutputError, match="--resume, or start over with --force"):
            train(tiny_base, order, unfinished, replace=replace_output)
    assert contents(state_folder(unfinished)) == before
    assert train(tiny_base, order, unfinished, force=True).folder == unfinished
    assert not state_folder(unfinished).exists()


@pytest.mark.parametrize(
    "changed",
    [
        lambda order: replace(order, seed=1),
        lambda order: replace(order, batch_size=4),
        lambda order: replace(order, train=order.train[1:]),
        lambda order: replace(order, valid=order.valid[1:]),
        lambda order: replace(order, training=replace(TRAINING, steps=6)),
        lambda order: replace(order, spec=Spec(settings=replace(SETTINGS, ridge_lambda=2.0))),
        lambda order: replace(order, spec=Spec("mend", replace(SETTINGS, aggregation="sum"))),
    ],
)
def test_resuming_something_else_is_refused(
    tiny_base: Base, order: Order, unfinished: Path, changed: Callable[[Order], Order]
) -> None:
    with pytest.raises(EditorError, match="other facts, settings, seed or base"):
        train(tiny_base, changed(order), unfinished, resume=True)
    assert state_folder(unfinished).exists()


def test_resuming_on_another_base_is_refused(tiny_base: Base, order: Order, unfinished: Path) -> None:
    with pytest.raises(EditorError, match="other facts, settings, seed or base"):
        train(replace(tiny_base, fingerprint="f" * 64), order, unfinished, resume=True)


def test_a_damaged_state_is_refused(tiny_base: Base, order: Order, unfinished: Path) -> None:
    file = state_folder(unfinished) / "editor.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(EditorError, match="damaged"):
        train(tiny_base, order, unfinished, resume=True)


def test_nothing_to_resume_starts_from_the_beginning_but_spares_an_old_editor(
    tiny_base: Base, order: Order, tmp_path: Path
) -> None:
    out, notes = tmp_path / "editor", []
    train(tiny_base, order, out, resume=True, note=notes.append)
    assert "nothing to resume: starting from the beginning" in notes
    with pytest.raises(OutputError, match="--force"):
        train(tiny_base, order, out, resume=True)


def test_a_model_that_cannot_be_replayed_is_said_so(
    tiny_base: Base, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("malmen_cli.editing.replay.Runner._verify", lambda self: False)
    notes: list[str] = []
    train(tiny_base, replace(order, training=replace(TRAINING, steps=1)), tmp_path / "editor", note=notes.append)
    assert any("cannot be replayed" in note for note in notes)


# ---------------------------------------------------------------- a damaged state


def saved_twice(base: Base, order: Order, out: Path) -> None:
    """A training stopped behind its second save: states of step 2 and step 3 lie beside the output."""
    with pytest.raises(KeyboardInterrupt):
        train(base, order, out, report=interrupt_at(3, ctrl_c))


@pytest.mark.parametrize("file", ["editor.safetensors", "editor.json"])
@pytest.mark.parametrize("left", [0.0, 0.5, None])
def test_a_truncated_state_falls_back_to_the_one_before(
    tiny_base: Base, order: Order, tmp_path: Path, file: str, left: float | None
) -> None:
    """Cut to nothing, cut in half, or gone: the result is that of an unbroken run, bit for bit."""
    out, notes = tmp_path / "editor", []
    saved_twice(tiny_base, order, out)
    assert [load_editor(folder)[1]["step"] for folder in (state_folder(out), state_before(out))] == [3, 2]
    damaged = state_folder(out) / file
    if left is None:
        damaged.unlink()
    else:
        os.truncate(damaged, int(left * damaged.stat().st_size))
    train(tiny_base, order, out, resume=True, note=notes.append)
    assert any("going on with the state before" in note for note in notes)
    assert "going on after step 2" in notes
    train(tiny_base, order, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["editor", "whole"]


def test_when_both_are_damaged_nothing_is_believed(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    out = tmp_path / "editor"
    saved_twice(tiny_base, order, out)
    for folder in (state_folder(out), state_before(out)):
        os.truncate(folder / "editor.json", 10)
    with pytest.raises(EditorError, match="damaged"):
        train(tiny_base, order, out, resume=True)


def test_the_state_before_alone_is_an_unfinished_training(tiny_base: Base, order: Order, tmp_path: Path) -> None:
    out, notes = tmp_path / "editor", []
    saved_twice(tiny_base, order, out)
    shutil.rmtree(state_folder(out))
    with pytest.raises(OutputError, match="--resume, or start over with --force"):
        train(tiny_base, order, out)
    train(tiny_base, order, out, resume=True, note=notes.append)
    assert "going on after step 2" in notes
