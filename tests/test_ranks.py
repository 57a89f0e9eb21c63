"""Several processes on one run: the same result as one to 1e-5, one voice, and a clear end when one of them dies."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several import malmen, on_ranks, run_all, start

from malmen_cli.artifact.editors import save_editor
from malmen_cli.base import ranks
from malmen_cli.base.families import block_index
from malmen_cli.base.locate import cache_home
from malmen_cli.base.model import Base, load_base
from malmen_cli.cli.errors import main
from malmen_cli.edit import Ready, Tuning, calibrated_identity, make_shift
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.stacked import Captured
from malmen_cli.exceptions import NumericsError, RankError
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.facts.files import write_facts
from malmen_cli.insertion import Insertion, prepare
from malmen_cli.scoring.protocols import collect
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

CLOSE = 1e-5  # relative, as the issue asks
PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy", "Bill Gates")
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris", "no", "krona")
SETTINGS = MalmenSettings(modules=("*.mlp.c_proj",), rank=4, rounds=2, preserved_rank=8)


def make_facts(count: int) -> list[Fact]:
    facts = []
    for i in range(count):
        place = f"{PLACES[i % 8]} number {i}"
        probe = Probe(f"The currency of {PLACES[(i + 1) % 8]} {i} is the", "krona")
        rephrases = (f"{place} has the capital",)
        facts.append(Fact(f"f{i}", f"The capital of {place} is", ANSWERS[i % 6], place, None, rephrases, (probe,)))
    return facts


# ---------------------------------------------------------------- the mechanism


def test_alone_everything_is_its_plain_counterpart() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert ranks.count() == 1
    assert ranks.first()
    assert list(ranks.share(3)) == [0, 1, 2]
    ranks.add_up(tensor)
    ranks.same(tensor)
    assert torch.equal(ranks.collected(tensor, 1), torch.arange(6.0).reshape(2, 3))
    assert ranks.spread([3, 1], lambda own: [(i, i) for i in own]) == [(3, 3), (1, 1)]


def test_sums_collections_and_shares() -> None:
    def work() -> Any:
        own = list(ranks.share(5))
        total = torch.tensor([float(len(own)), 1.0], dtype=torch.float64)
        ranks.add_up(total)
        rows = ranks.collected(torch.tensor([own, own]), 1)
        empty = ranks.collected(torch.ones(3 if ranks.first() else 0, 2))
        named = ranks.spread(["a", "b", "c"], lambda mine: [[letter, None, 0.1] for letter in mine])
        mine = torch.full((2,), float(len(own)))
        ranks.same(mine)
        whole = [torch.arange(2.0 * size).reshape(size, 2) for size in (5, 1)]
        back = [ranks.assembled(each[ranks.mine()], len(each)) for each in whole]
        assert all(torch.equal(one, other) for one, other in zip(back, whole, strict=True))
        assert ranks.worst(3.0 if ranks.first() else 2.0) == 3.0
        assert math.isnan(ranks.worst(3.0 if ranks.first() else math.nan))
        return [total.tolist(), rows.tolist(), list(empty.shape), named, mine.tolist()]

    one, other = on_ranks(work)
    assert one == other
    assert one[0] == [5.0, 2.0]
    assert one[1] == [[0, 2, 4, 1, 3]] * 2
    assert one[2:] == [[3, 2], [["a", None, 0.1], ["b", None, 0.1], ["c", None, 0.1]], [3.0, 3.0]]


@pytest.mark.parametrize("modules", [1, 5])
@pytest.mark.parametrize("count", [2, 3])
def test_dealt_rows_are_those_of_all_ranks_for_a_share_of_the_modules(modules: int, count: int) -> None:
    """Rank r has r rows, so the first has none; with one module only the first gets any."""
    whole = torch.arange(modules * 3.0 * 2).reshape(modules, 3, 2)
    sizes = list(range(count))
    rows = torch.cat([whole[:, :size] + 100 * size for size in sizes], 1)

    def work() -> Any:
        rank = ranks.mine().start
        dealt = ranks.dealt(whole[:, : sizes[rank]] + 100 * sizes[rank])
        return torch.equal(dealt, rows[ranks.mine()]), dealt.shape[0]

    found = on_ranks(work, count)
    assert all(same for same, _ in found)
    assert [own for _, own in found] == [len(range(rank, modules, count)) for rank in sizes]
    assert torch.equal(ranks.dealt(whole), whole)  # alone


# ---------------------------------------------------------------- the same result


def stirred(base: Base, settings: MalmenSettings) -> Editor:
    """Calibrated on a few facts, its network no longer the identity."""
    trainer = make_trainer(base, settings)
    trainer.prepare()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in trainer.editor.groups:
            for name in ("up", "bias", "shift"):
                parameter = getattr(group.network, name)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer.editor


def make_trainer(base: Base, settings: MalmenSettings) -> Trainer:
    editor = Editor.fresh(base.model, settings)
    runner = Runner(base, min(block_index(base.model, name) for name in editor.names))
    examples = encode_examples(base.task, make_facts(14), end_of_text=True)
    training = {"steps": 3, "facts_per_step": (7,), "meta_facts": 5, "validate_every": 2, "valid_facts": 3, "warmup": 0}
    training |= {"calibration_facts": 7, "continuation": 2, "preserved_prompts": 15}
    return Trainer(runner, editor, examples, examples[:3], TrainingSettings(**training), batch_size=3)


def matrices(base: Base, editor: Editor, facts: Sequence[Fact]) -> torch.Tensor:
    shift = make_shift(base, Ready(editor, "malmen"), facts, batch_size=3)
    return torch.cat([module.matrix().flatten() for module in shift.modules.values()])


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("count", [1, 9], ids=["one-fact", "nine-facts"])
@pytest.mark.parametrize("changes", [{"mlp": 128}, {"mlp": 8}, {"mlp": 8, "aggregation": "sum"}], ids=str)
def test_the_same_shift(tiny_model_factory: Callable, changes: dict[str, Any], count: int) -> None:
    """Factors, sums, and MEND's sums; with one fact the second rank has none."""
    base = load_base(str(tiny_model_factory("gpt2", layers=3, mlp=changes["mlp"])), device="cpu")
    settings = MalmenSettings(**{**vars(SETTINGS), "aggregation": changes.get("aggregation", "ridge")})
    editor = stirred(base, settings)
    wanted = matrices(base, editor, make_facts(count))
    one, other = on_ranks(lambda: matrices(base, editor, make_facts(count)).numpy())
    assert (one == other).all()
    assert apart(torch.from_numpy(one), wanted) <= CLOSE


@pytest.mark.parametrize("count", [1, 5], ids=["one-fact", "five-facts"])
@pytest.mark.parametrize("method", ["memit", "rome", "finetune"])
def test_the_same_shift_without_an_editor(tiny_model_factory: Callable, method: str, count: int) -> None:
    """Targets that are looked for by shares, and mini-batches of which each rank runs a part; the last has one fact."""
    base, facts = load_base(str(tiny_model_factory("gpt2", layers=3)), device="cpu"), make_facts(count)

    def shift() -> Any:
        ready: Insertion | Tuning = Tuning(FinetuneSettings(block=1, epochs=2, batch_facts=4, lr=1e-2))
        if method != "finetune":
            constraint = "equality" if method == "rome" else "least_squares"
            blocks = (1,) if method == "rome" else (0, 1)
            given = {"steps": 3, "prefixes": 1, "prefix_tokens": 2, "moment_weight": 10.0, "stats_tokens": 200}
            settings = MemitSettings(blocks=blocks, constraint=constraint, **given)
            ready = prepare(base, method, settings, facts, stats_from=None, seed=0, batch_size=3)
        found = make_shift(base, ready, facts, batch_size=3)
        return torch.cat([module.matrix().flatten() for module in found.modules.values()]).numpy()

    wanted = torch.from_numpy(shift())
    shutil.rmtree(cache_home() / "targets", ignore_errors=True)  # the ranks look for themselves
    one, other = on_ranks(shift)
    assert float(wanted.norm()) > 0
    assert (one == other).all()
    assert apart(torch.from_numpy(one), wanted) <= CLOSE


def test_the_same_calibration_training_and_validation(tiny_gpt2: Path) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")

    def trained() -> Any:
        trainer = make_trainer(base, SETTINGS)
        trainer.prepare()
        calibrated = {name: tensor.numpy() for name, tensor in trainer.editor.state().items()}
        steps: list[list[float]] = []
        trainer.run(lambda progress: steps.append([progress.learned, progress.moved]), lambda: None)
        scores = [str(progress.validation) for progress in trainer.history]
        # Adam divides by the gradient's size, so that parameters with none drift by rounding: gradients are compared.
        gradients = torch.cat([p.grad.flatten() for p in trainer.editor.parameters() if p.grad is not None])
        return calibrated, steps, scores, gradients.numpy()

    wanted = trained()
    one, other = on_ranks(trained)
    assert all((one[0][name] == other[0][name]).all() for name in one[0])
    assert one[1:3] == other[1:3]
    for name, tensor in wanted[0].items():
        if "preserved_basis" not in name:  # eigenvectors of one energy may turn; what they span shows in the steps
            torch.testing.assert_close(torch.from_numpy(one[0][name]), torch.from_numpy(tensor), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(one[1]), torch.tensor(wanted[1]), rtol=1e-4, atol=1e-6)
    assert one[2] == wanted[2]
    assert apart(torch.from_numpy(one[3]), torch.from_numpy(wanted[3])) <= 1e-3


@pytest.mark.parametrize("aggregation", ["ridge", "sum"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_same_step_with_fewer_rows_than_ranks(tiny_gpt2: Path, aggregation: str, rows: int) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")
    settings = replace(SETTINGS, aggregation=aggregation, rounds=1)

    def worked() -> Any:
        editor = Editor.fresh(base.model, settings)
        generator, (group,) = torch.Generator().manual_seed(0), editor.groups
        with torch.no_grad():
            for parameter in group.network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        sizes = [(len(group.names), rows, width) for width in (group.dk, group.dv)]
        keys, gradients = (torch.randn(size, generator=generator) for size in sizes)
        roles = torch.arange(rows) % group.network.roles
        captured, method = Captured(keys, gradients, torch.arange(rows), roles).own(), Malmen(editor)
        shift, (solution,) = method.joined([captured])
        upstream = torch.randn(len(group.names), group.dk, group.dv, generator=generator)
        method.pull_back(group, captured, upstream, solution)
        pulled = torch.cat([p.grad.flatten() for p in group.network.parameters() if p.grad is not None])
        return torch.stack([m.matrix() for m in shift.modules.values()]).numpy(), pulled.numpy()

    wanted = worked()
    for found in on_ranks(worked, 3):
        for mine, theirs in zip(found, wanted, strict=True):
            assert apart(torch.from_numpy(mine), torch.from_numpy(theirs)) <= CLOSE


def test_where_one_rank_has_to_solve_again_in_double_precision_all_do(tiny_gpt2: Path) -> None:
    """One module's keys are nearly alike; the gradients of lambda and mu of both ranks are then put together."""
    base = load_base(str(tiny_gpt2), device="cpu")
    settings = replace(SETTINGS, rounds=1, preserved_rank=0, ridge_lambda=1e-9)

    def worked() -> Any:
        editor = Editor.fresh(base.model, settings)
        generator, (group,) = torch.Generator().manual_seed(0), editor.groups
        keys, gradients = (torch.randn(2, 12, width, generator=generator) for width in (group.dk, group.dv))
        keys[0] = keys[0, :1] + 1e-3 * keys[0]
        group.network.log_lambda.data.fill_(math.log(1e-9))
        captured = Captured(keys, gradients, torch.arange(12), torch.zeros(12, dtype=torch.long)).own()
        method = Malmen(editor)
        shift, (solution,) = method.joined([captured])
        assert solution is not None
        upstream = torch.randn(2, group.dk, group.dv, generator=generator)
        method.pull_back(group, captured, upstream, solution)
        assert group.network.log_lambda.grad is not None
        whole = torch.stack([m.matrix() for m in shift.modules.values()])
        return str(solution.factor.dtype), whole.numpy(), group.network.log_lambda.grad.numpy()

    wanted = worked()
    assert wanted[0] == "torch.float64"
    for dtype, shift, by_lambda in on_ranks(worked):
        assert dtype == wanted[0]
        assert apart(torch.from_numpy(shift), torch.from_numpy(wanted[1])) <= CLOSE
        assert apart(torch.from_numpy(by_lambda), torch.from_numpy(wanted[2])) <= CLOSE


@pytest.mark.parametrize("count", [2, 3])
def test_what_one_rank_cannot_solve_ends_all_alike(tiny_gpt2: Path, count: int) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")

    def worked() -> str:
        editor = Editor.fresh(base.model, replace(SETTINGS, rounds=1))
        (group,) = editor.groups
        keys, gradients = (torch.randn(2, 5, width) for width in (group.dk, group.dv))
        keys[1] = math.nan
        captured = Captured(keys, gradients, torch.arange(5), torch.zeros(5, dtype=torch.long)).own()
        with pytest.raises(NumericsError) as raised:
            Malmen(editor).joined([captured])
        return "said: " + str(raised.value)

    found = [raised for (raised,) in on_ranks(lambda: [worked()], count)]
    assert len(set(found)) == 1
    assert "singular" in found[0]


def test_the_same_answers_and_calibrated_identity(tiny_gpt2: Path) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")

    def asked() -> Any:
        answers = collect(base, make_facts(5), batch_size=3)
        said = [(a.gold, a.argmax, a.text) for a in answers.by_question.values()]
        ready = calibrated_identity(base, make_facts(5), SETTINGS, seed=0, batch_size=3)
        assert ready.calibration is not None
        return said, ready.calibration.step

    wanted = asked()
    for said, step in on_ranks(asked):
        assert [(*map(tuple, one[:2]), one[2]) for one in said] == wanted[0]
        assert step == wanted[1]


# ---------------------------------------------------------------- the program


@pytest.fixture
def files(tmp_path: Path, tiny_gpt2: Path) -> Path:
    base = load_base(str(tiny_gpt2), device="cpu")
    write_facts(make_facts(6), tmp_path / "facts.jsonl")
    said = {"base": {"fingerprint": base.fingerprint}, "method": "malmen", "settings": vars(SETTINGS)}
    save_editor(tmp_path / "editor", stirred(base, SETTINGS).state(), said, force=False)
    return tmp_path


def test_apply_writes_what_one_process_writes_and_one_rank_speaks(
    tiny_gpt2: Path, files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def arguments(out: str) -> list[str]:
        given = ["apply", str(tiny_gpt2), str(files / "facts.jsonl"), "--editor", str(files / "editor")]
        return [*given, "--format", "delta", "-o", str(files / out), "--json", "--score", "2", "--device", "cpu"]

    assert main(arguments("alone")) == 0
    capfd.readouterr()
    assert run_all(arguments("shared"), files) == [0, 0]
    alone, shared = (load_file(files / name / "delta.safetensors") for name in ("alone", "shared"))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert apart(shared[name], tensor) <= CLOSE
    assert json.loads((files / "stdout.0").read_text())["output"] == str(files / "shared")
    assert (files / "stdout.1").read_text() == (files / "stderr.1").read_text() == ""
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(".malmen")) == []


def test_other_commands_are_the_first_rank_s_to_say(files: Path) -> None:
    assert run_all(["facts", "check", str(files / "facts.jsonl"), "--json"], files) == [0, 0]
    assert json.loads((files / "stdout.0").read_text())["count"] == 6
    assert (files / "stdout.1").read_text() == (files / "stderr.1").read_text() == ""


def test_a_rank_that_dies_ends_the_run_and_the_old_output_stays(tiny_gpt2: Path, files: Path) -> None:
    out = files / "out"
    given = ["apply", str(tiny_gpt2), str(files / "facts.jsonl"), "--editor", str(files / "editor")]
    arguments = [*given, "--format", "delta", "-o", str(out), "--score", "0", "--device", "cpu"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def work(rank: int) -> int:
        if rank == 1:
            share = ranks.share

            def die(size: int) -> range:
                if size == 6:  # its share of the facts is asked for: the first rank will wait for its rows
                    os._exit(9)
                return share(size)

            ranks.share = die
        return malmen(rank, [*arguments, "--force"], files)

    (first, pipe), (second, _) = start(work, 2)
    code = pipe.recv()
    first.join(60)
    second.join(60)
    assert second.exitcode == 9
    assert code == 70
    said = (files / "stderr.0").read_text()
    assert "another process of this run died" in said
    assert "internal error" not in said
    assert "Traceback" not in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in files.iterdir() if path.name.startswith(".malmen")] == []


def test_a_group_that_cannot_be_joined_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.distributed.DistNetworkError("The server socket has failed to listen\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(RankError, match=r"reached [(]The server socket has failed to listen[)]"), ranks.joined():
        raise AssertionError
