"""An editor's groups, and its state as named tensors: out and in again, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from malmen_cli.editing.editor import Editor, compact
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.shift import IN_OUT, OUT_IN
from malmen_cli.exceptions import EditorError, NumericsError

BOTH = {"modules": ("*.mlp.c_fc", "*.mlp.c_proj")}


def restored(editor: Editor, model, state: dict[str, Tensor]) -> Editor:
    return Editor.restored(model, editor.settings, state, where="my-editor")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("network", ["mlp", "identity"])
def test_state_goes_out_and_in_again(make_editor: Callable, family: str, network: str) -> None:
    editor, runner = make_editor(family, {"network": network})
    again = restored(editor, runner.model, editor.state())
    assert again.names == editor.names
    assert again.layouts == editor.layouts
    assert again.description() == editor.description()
    assert list(again.state()) == list(editor.state())
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in editor.state().items())


def test_a_restored_editor_gives_the_same_shift_and_shares_no_memory(make_editor: Callable, facts: Callable) -> None:
    editor, runner = make_editor("gpt2", BOTH)
    state = {name: tensor.clone() for name, tensor in editor.state().items()}
    again = restored(editor, runner.model, state)
    edits = facts(runner.base.tokenizer, 3)
    mine, theirs = (Malmen(e).shift(runner, edits, ["a", "b", "c"], batch_size=2) for e in (editor, again))
    assert all(torch.equal(mine.modules[name].matrix(), theirs.modules[name].matrix()) for name in editor.names)
    for parameter in again.parameters():
        parameter.data.zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in editor.state().items())


def test_modules_of_two_shapes_are_two_groups(make_editor: Callable) -> None:
    editor, _ = make_editor("gpt2", BOTH)
    assert [(g.dk, g.dv) for g in editor.groups] == [(32, 64), (64, 32)]
    assert editor.groups[0].names == ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")
    assert editor.groups[1].names == ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
    assert set(editor.layouts.values()) == {IN_OUT}
    assert editor.description() == {
        "groups": [
            {"modules": list(editor.groups[0].names), "dk": 32, "dv": 64},
            {"modules": list(editor.groups[1].names), "dk": 64, "dv": 32},
        ]
    }
    assert {name.split(".")[0] for name in editor.state()} == {"0", "1"}


def test_square_matrices_of_both_kinds_share_a_group(make_editor: Callable) -> None:
    editor, _ = make_editor("llama", {"modules": ("*.self_attn.q_proj", "*.mlp.down_proj")}, mlp=32)
    (group,) = editor.groups
    assert (group.dk, group.dv, len(group.names)) == (32, 32, 4)
    assert set(editor.layouts.values()) == {OUT_IN}


def test_a_fresh_editor_follows_its_settings(load: Callable) -> None:
    model = load("gpt2").model
    editor = Editor.fresh(model, MalmenSettings(rank=3, blocks=2, last_blocks=1), seed=4)
    (group,) = editor.groups
    assert group.names == ("transformer.h.1.mlp.c_proj",)
    assert tuple(group.network.down.shape) == (2, 96, 3)
    assert group.preserved.energies.shape == (1, 0)
    again = Editor.fresh(model, MalmenSettings(rank=3, blocks=2, last_blocks=1), seed=4)
    other = Editor.fresh(model, MalmenSettings(rank=3, blocks=2, last_blocks=1), seed=5)
    assert torch.equal(group.network.down, again.groups[0].network.down)
    assert not torch.equal(group.network.down, other.groups[0].network.down)
    identity = Editor.fresh(model, MalmenSettings(network="identity"))
    assert identity.groups[0].network.down.shape[0] == 0


@pytest.mark.parametrize(("tokens", "roles"), [("answer", 2), ("subject", 3), ("all", 4)])
def test_an_editor_tells_apart_the_roles_of_its_tokens(load: Callable, tokens: str, roles: int) -> None:
    model = load("gpt2").model
    editor = Editor.fresh(model, MalmenSettings(rank=3, last_blocks=2, tokens=tokens))
    shapes = {name: tuple(tensor.shape) for name, tensor in editor.state().items()}
    assert shapes["0.log_lr"] == (2, roles)
    assert shapes["0.mean"] == shapes["0.std"] == (2, roles, 96)
    assert shapes["0.scale"] == shapes["0.shift"] == (2, 2, roles, 96)
    assert shapes["0.log_lambda"] == shapes["0.log_mu"] == (2,)
    for other in {"answer", "subject", "all"} - {tokens}:
        with pytest.raises(EditorError, match="does not fit this base"):
            Editor.restored(model, MalmenSettings(rank=3, last_blocks=2, tokens=other), editor.state())


@pytest.mark.parametrize("rows", [1, 70])
def test_the_penalty_is_the_exponential_of_what_is_learned(make_editor: Callable, rows: int) -> None:
    editor, _ = make_editor("gpt2")
    (group,) = editor.groups
    penalty = group.penalty(rows, torch.float64)
    assert penalty.lam.dtype == penalty.preserved.basis.dtype == torch.float64
    assert not penalty.lam.requires_grad
    torch.testing.assert_close(penalty.lam, group.network.log_lambda.detach().exp().double())
    torch.testing.assert_close(penalty.mu, rows * group.network.log_mu.detach().exp().double())


# ---------------------------------------------------------------- as it is saved


def test_the_large_tensors_are_saved_in_half_the_digits(make_editor: Callable) -> None:
    editor, runner = make_editor("gpt2", BOTH)
    state = editor.state()
    saved = compact(state)
    assert list(saved) == list(state)
    for name, tensor in saved.items():
        halved = name.split(".")[1] in ("down", "up", "preserved_basis")
        assert tensor.dtype == (torch.bfloat16 if halved else torch.float32), name
        assert halved or torch.equal(tensor, state[name])
        # bfloat16 keeps eight binary digits and rounds to the nearest.
        assert float((tensor.float() - state[name]).abs().div(state[name].abs().clamp(min=1e-30)).max()) <= 2**-8
    assert compact(saved).keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in compact(saved).items())
    again = restored(editor, runner.model, saved)
    assert {tensor.dtype for tensor in again.state().values()} == {torch.float32}
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in again.state().items())


def test_a_compact_editor_s_shift_is_near_the_exact_one_s(make_editor: Callable, facts: Callable) -> None:
    editor, runner = make_editor("gpt2", BOTH)
    again = restored(editor, runner.model, compact(editor.state()))
    edits = facts(runner.base.tokenizer, 3)
    mine, theirs = (Malmen(e).shift(runner, edits, ["a", "b", "c"], batch_size=2) for e in (again, editor))
    for name in editor.names:
        wanted = theirs.modules[name].matrix()
        distance = float((mine.modules[name].matrix() - wanted).norm() / wanted.norm())
        assert 0 < distance < 2e-2  # 2**-8 a number, summed with random signs over the network's layers


def test_a_file_of_compact_tensors_is_half_as_large(load: Callable, tmp_path: Path) -> None:
    """At ranks as in practice, where the halved tensors are nearly all of an editor."""
    editor = Editor.fresh(load("gpt2").model, MalmenSettings(last_blocks=2, rank=256))
    sizes = []
    for state in (editor.state(), compact(editor.state())):
        save_file(state, tmp_path / "editor.safetensors")
        sizes.append((tmp_path / "editor.safetensors").stat().st_size)
    assert 0.5 < sizes[1] / sizes[0] < 0.55


# ---------------------------------------------------------------- refused


def change(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    state = dict(state)
    match how:
        case "missing":
            del state["0.up"]
        case "missing preserved":
            del state["0.preserved_rest"]
        case "extra":
            state["0.extra"] = torch.zeros(1)
        case "extra group":
            state["1.up"] = state["0.up"]
        case "rank":
            state["0.up"] = state["0.up"][:, :-1]
        case "width":
            state["0.mean"] = state["0.mean"][..., :-1]
        case "modules":
            state["0.log_lr"] = state["0.log_lr"][:1]
        case "roles":
            state["0.std"] = state["0.std"][:, :2]
        case "no roles":
            state["0.mean"] = state["0.mean"][:, 0]
        case "basis":
            state["0.preserved_basis"] = state["0.preserved_basis"][:, :-1]
        case "basis rank":
            state["0.preserved_basis"] = state["0.preserved_basis"][..., :-1]
        case "energies":
            state["0.preserved_energies"] = torch.tensor(1.0)
        case "rest":
            state["0.preserved_rest"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "tensor 0.up is missing"),
        ("missing preserved", "tensor 0.preserved_rest is missing"),
        ("extra", "tensor 0.extra is not known"),
        ("extra group", "tensor 1.up is not known"),
        ("rank", r"tensor 0.up is \(2, 3, 96\), not \(2, 4, 96\)"),
        ("width", r"tensor 0.mean is \(2, 3, 95\), not \(2, 3, 96\)"),
        ("modules", r"tensor 0.log_lr is \(1, 3\), not \(2, 3\)"),
        ("roles", r"tensor 0.std is \(2, 2, 96\), not \(2, 3, 96\)"),
        ("no roles", r"tensor 0.mean is \(2, 96\), not \(2, 3, 96\)"),
        ("basis", r"tensor 0.preserved_basis is \(2, 63, 5\), not \(2, 64, 5\)"),
        ("basis rank", r"tensor 0.preserved_basis is \(2, 64, 4\), not \(2, 64, 5\)"),
        ("energies", r"tensor 0.preserved_energies is \(\), not "),
        ("rest", r"tensor 0.preserved_rest is \(3,\), not \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(make_editor: Callable, how: str, message: str) -> None:
    editor, runner = make_editor("gpt2")
    with pytest.raises(EditorError, match=rf"^my-editor: {message}.*does not fit this base"):
        restored(editor, runner.model, change(editor.state(), how))


@pytest.mark.parametrize("name", ["0.down", "0.std", "0.log_lambda", "0.preserved_basis", "0.preserved_rest"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused(make_editor: Callable, name: str, value: float) -> None:
    editor, runner = make_editor("gpt2")
    state = {n: tensor.clone() for n, tensor in editor.state().items()}
    state[name].view(-1)[0] = value
    with pytest.raises(NumericsError, match=rf"^my-editor: tensor {name} is not finite"):
        restored(editor, runner.model, state)


def test_the_state_of_another_base_or_rank_is_refused(make_editor: Callable, load: Callable) -> None:
    editor, runner = make_editor("gpt2")
    with pytest.raises(EditorError):
        restored(editor, load("gpt2", mlp=48).model, editor.state())
    with pytest.raises(EditorError):
        Editor.restored(runner.model, MalmenSettings(rank=5), editor.state())
