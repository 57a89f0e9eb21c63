"""A model whose blocks lie on two devices: the same edits, training and answers as on one.

PyTorch's lazy device computes on the CPU, but is a device of its own: a sum of tensors of both is refused, as between a
GPU and the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from malmen_cli.base.families import block_index, stacks
from malmen_cli.base.model import Base, load_base
from malmen_cli.edit import Ready, Tuning, make_shift
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.identity import untrained_editor
from malmen_cli.insertion import prepare
from malmen_cli.scoring.decoder import Asker
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow  # the lazy device compiles what it runs
FAMILIES = ("llama", "t5", "bert")  # the lazy device cannot run GPT-2 and GPT-J
FACTS = [
    Fact("a", "The capital of Australia is", "Rome", subject="Australia", rephrases=("Australia has its capital in",),
         locality=(Probe("The capital of France is"),)),
    Fact("b", "In Sweden the currency of Sweden is the", "Paris", subject="Sweden", rephrases=("Sweden pays in",),
         locality=(Probe("The founder of Apple is"),)),
    Fact("c", "The chief executive of Apple is", "Bill Gates", subject="Apple", rephrases=("Apple is led by",),
         locality=(Probe("The founder of Microsoft is"),)),
    Fact("d", "Hamlet was written by", "no", subject="Hamlet", rephrases=("Hamlet is a work of",),
         locality=(Probe("The currency of Sweden is"),)),
]  # fmt: skip
CLAIMS = [
    replace(f, prompt=f"{f.prompt} {f.target}.", target=("SUPPORTS", "REFUTES")[i % 2]) for i, f in enumerate(FACTS)
]
# fp32 sums in another order, and the lazy device's fused operations; through several steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}

Factory = Callable[..., Path]


@pytest.fixture(scope="session")
def backend() -> str:
    pytest.importorskip("torch._lazy.ts_backend").init()
    return "lazy:0"


@pytest.fixture
def lazy(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A second device where there is no accelerator. It has no views in inference mode."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    return backend


def spread(base: Base, device: str) -> Base:
    """The second half of the blocks of every stack, and the rest behind them, on `device`: with the hooks by which
    accelerate moves what they are given."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = base.model
    shared = {id(p) for p in model.get_input_embeddings().parameters()}
    for stack in stacks(model):
        for block in stack.blocks[len(stack.blocks) // 2 :]:
            add_hook_to_module(block, AlignDevicesHook(execution_device=device, place_submodules=True))
    head = model.get_output_embeddings()
    if head is not None and not shared & {id(p) for p in head.parameters()}:
        add_hook_to_module(head, AlignDevicesHook(execution_device=device, place_submodules=True))
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not hasattr(module, "_hf_hook") and own[0].device.type == "cpu":
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return base


def pair(factory: Factory, family: str, lazy: str) -> tuple[Base, Base, list[Fact]]:
    """The same base on one device and on two, and facts for it. Loaded here, as nobody else may get the second one."""
    folder = str(factory(family, layers=4))
    alone, apart = load_base(folder, device="cpu"), spread(load_base(folder, device="cpu"), lazy)
    for base in (alone, apart):
        base.model.set_attn_implementation("eager")  # the lazy device cannot do PyTorch's fused one
    places = [{parameter.device.type for parameter in base.model.parameters()} for base in (alone, apart)]
    assert places == [{"cpu"}, {"cpu", "lazy"}]
    assert apart.device.type == "cpu"
    return alone, apart, CLAIMS if alone.task.kind == "classifier" else FACTS


def same(one: Shift, other: Shift) -> None:
    assert one.modules.keys() == other.modules.keys()
    for name, module in one.modules.items():
        assert float(module.matrix().norm()) > 0
        torch.testing.assert_close(other.modules[name].matrix().cpu(), module.matrix(), **CLOSE)


def test_the_two_devices_do_not_mix(lazy: str) -> None:
    """What these tests rest on."""
    with pytest.raises(RuntimeError):
        torch.ones(2, 2, device=lazy) @ torch.ones(2, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_editor_is_calibrated_and_makes_the_same_shift(
    tiny_model_factory: Factory, family: str, lazy: str
) -> None:
    alone, apart, facts = pair(tiny_model_factory, family, lazy)
    shifts = []
    for base in (alone, apart):
        blocks = len(stacks(base.model)[-1].blocks)
        settings = MalmenSettings(network="identity", last_blocks=blocks - 1, rounds=2)
        editor, found = untrained_editor(base, facts, settings, seed=0, batch_size=3)
        shifts.append((make_shift(base, Ready(editor, "identity"), facts, batch_size=3), found))
    assert shifts[1][1].step == pytest.approx(shifts[0][1].step, rel=1e-3)
    same(shifts[0][0], shifts[1][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_before_and_after_an_edit(tiny_model_factory: Factory, family: str, lazy: str) -> None:
    alone, apart, facts = pair(tiny_model_factory, family, lazy)
    facts, answers = facts[:2], []
    for base in (alone, apart):
        tuned = Tuning(FinetuneSettings(epochs=1, batch_facts=4, lr=0.01))
        shift = make_shift(base, tuned, facts, batch_size=3)
        asker = Asker(base, 3, lambda count: None)
        asked = [base.task.encode(f.prompt, f.target, end_of_text=False) for f in facts]
        questions = [base.task.question(f.prompt) for f in facts]
        before = asker.teacher_forced(asked), asker.greedy(questions, [2] * len(facts))
        with applied(base.model, shift):
            after = asker.teacher_forced(asked), asker.greedy(questions, [2] * len(facts))
        answers.append((shift, before, after))
    same(answers[0][0], answers[1][0])
    for (forced, greedy), (other_forced, other_greedy) in zip(answers[0][1:], answers[1][1:], strict=True):
        assert greedy == other_greedy
        assert [one.argmax for one in forced] == [one.argmax for one in other_forced]
        for one, other in zip(forced, other_forced, strict=True):
            assert other.logprobs == pytest.approx(one.logprobs, rel=1e-3, abs=1e-4)


def test_memit(tiny_model_factory: Factory, lazy: str, tmp_path: Path) -> None:
    alone, apart, facts = pair(tiny_model_factory, "llama", lazy)
    text, shifts = tmp_path / "text.txt", []
    text.write_text("The capital of Sweden is where Hamlet was written by Bill Gates. " * 3)
    for base in (alone, apart):
        settings = MemitSettings(blocks=(1, 2), steps=3, stats_tokens=20, moment_weight=10.0, clamp=2.0)
        ready = prepare(base, "memit", settings, facts[:2], stats_from=str(text), seed=0, batch_size=4)
        shifts.append(make_shift(base, ready, facts[:2], batch_size=4))
    same(*shifts)


@pytest.mark.parametrize("family", FAMILIES)
def test_training(tiny_model_factory: Factory, family: str, lazy: str) -> None:
    alone, apart, facts = pair(tiny_model_factory, family, lazy)
    states = []
    for base in (alone, apart):
        settings = MalmenSettings(last_blocks=3, rank=8, preserved_rank=8)
        editor = Editor.fresh(base.model, settings)
        runner = Runner(base, min(block_index(base.model, name) for name in editor.names))
        training = TrainingSettings(
            steps=2,
            facts_per_step=(2,),
            meta_facts=2,
            calibration_facts=2,
            continuation=2,
            validate_every=1,
            valid_facts=2,
        )
        parts = (encode_examples(base.task, some, end_of_text=settings.end_of_text) for some in (facts[:2], facts[2:]))
        trainer = Trainer(runner, editor, *parts, training, batch_size=3)
        trainer.prepare()
        before = {name: tensor.clone() for name, tensor in editor.state().items()}
        losses: list[Any] = []
        trainer.run(losses.append, lambda: None)
        states.append((before, trainer.editor.state(), [(p.learned, p.moved) for p in losses]))
    assert states[1][2] == [pytest.approx(loss, rel=1e-3, abs=1e-4) for loss in states[0][2]]
    moved = [name for name, tensor in states[0][1].items() if not torch.equal(tensor, states[0][0][name])]
    assert moved
    # Adam's first steps follow a gradient's sign, which rounding decides where it is next to nothing.
    for name, tensor in states[0][0].items():
        torch.testing.assert_close(states[1][0][name].cpu(), tensor, **CLOSE)
