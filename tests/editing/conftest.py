"""Tiny bases loaded once, facts to edit them with, and editors that are not at their trivial start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded, encode
from malmen_cli.editing.capture import edit_rows
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.hypernetwork import Moments
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import Preserved
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.stacked import gather

# Named, since an MLP narrower than the model is not what the default looks for.
SECOND_MATRICES = ("*.mlp.[cd]*_proj",)
_PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy", "x", "Bill Gates")
_ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris", "no", "William Shakespeare", "krona")


def _facts(tokenizer, count: int) -> list[Encoded]:
    """`count` distinct facts whose prompts and answers differ in length; every third has no subject."""
    prompts = [f"The capital of {_PLACES[i % 9]} {'is' if i % 2 else 'number ' + str(i) + ' is'}" for i in range(count)]
    subjects = [_PLACES[i % 9] if i % 3 < 2 else None for i in range(count)]
    return [
        encode(tokenizer, p, _ANSWERS[i % 7], subject=s) for i, (p, s) in enumerate(zip(prompts, subjects, strict=True))
    ]


@pytest.fixture(scope="session")
def facts() -> Callable[..., list[Encoded]]:
    return _facts


@pytest.fixture(scope="session")
def load(tiny_model_factory) -> Callable[..., Base]:
    """`load(family, **options)`: a tiny base on the CPU, shared; leave its weights as they are."""
    loaded: dict[str, Base] = {}

    def build(family: str, **options) -> Base:
        folder = str(tiny_model_factory(family, **options))
        if folder not in loaded:
            loaded[folder] = load_base(folder, device="cpu")
        return loaded[folder]

    return build


@torch.no_grad()
def _stir(editor: Editor, runner: Runner, edits: Sequence[Encoded], *, preserved: bool = True) -> Editor:
    generator = torch.Generator().manual_seed(3)
    parts = list(edit_rows(runner, edits, editor.names, 4, editor.settings.tokens))
    for group in editor.groups:
        captured = gather(group, parts)
        for role in range(group.network.roles):
            moments, mine = Moments(len(group.names), group.dk + group.dv), captured.roles == role
            moments.add(torch.cat([captured.keys[:, mine], captured.gradients[:, mine]], -1))
            group.network.normalise_by(moments, centre=editor.settings.centre, role=role)
        for parameter in group.network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        group.network.log_lr -= 3
        if preserved:
            keys = captured.keys + 0.1 * torch.randn(captured.keys.shape, generator=generator)
            group.preserved = Preserved.of(keys.mT @ keys / keys.shape[1], 5)
    return editor


@pytest.fixture(scope="session")
def make_editor(load) -> Callable[..., tuple[Editor, Runner]]:
    """`make_editor(family, settings={...}, **options)`: an editor with a random network, normaliser and C0."""

    def build(family: str, settings: dict | None = None, preserved: bool = True, **options) -> tuple[Editor, Runner]:
        base = load(family, **options)
        runner = Runner(base)
        editor = Editor.fresh(
            base.model, MalmenSettings(**({"modules": SECOND_MATRICES, "rank": 4} | (settings or {})))
        )
        return _stir(editor, runner, _facts(base.tokenizer, 12), preserved=preserved), runner

    return build
