"""The specs in edit_specs/families/ name the modules that the default rule finds, at the depth of real checkpoints.

The models are built on the meta device: names and shapes without weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from malmen_cli.base.families import block_index, chosen_modules, default_modules, edited_blocks, matrix_shape
from malmen_cli.editing.settings import from_mapping
from malmen_cli.editing.spec import Spec, read_spec
from malmen_cli.training.settings import TrainingSettings

FOLDER = Path(__file__).resolve().parents[1] / "edit_specs" / "families"
FILES = sorted(FOLDER.glob("*.yaml"))

_COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_GPT2 = ("n_layer", "n_embd", "n_head", "n_inner")
# name of the spec -> (config class, its names for depth, width, heads and MLP width, those of the checkpoint that the
# spec is for, and what else decides on shapes: in the checkpoint and where the width is 32)
CHECKPOINTS: dict[str, tuple[str, tuple[str, ...], tuple[int, ...], dict[str, int], dict[str, int]]] = {
    "gpt2": ("GPT2Config", _GPT2, (12, 768, 12, 3072), {}, {}),
    "gptj": ("GPTJConfig", _GPT2, (28, 4096, 16, 16384), {"rotary_dim": 64}, {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", _COMMON, (44, 6144, 64, 24576), {}, {}),
    "opt": (
        "OPTConfig",
        (*_COMMON[:3], "ffn_dim"),
        (32, 4096, 32, 16384),
        {"word_embed_proj_dim": 4096},
        {"word_embed_proj_dim": 32},
    ),
    "llama": ("LlamaConfig", _COMMON, (32, 4096, 32, 14336), {"num_key_value_heads": 8}, {"num_key_value_heads": 2}),
    "mistral": (
        "MistralConfig",
        _COMMON,
        (32, 4096, 32, 14336),
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 2},
    ),
    "qwen2": ("Qwen2Config", _COMMON, (28, 3584, 28, 18944), {"num_key_value_heads": 4}, {"num_key_value_heads": 2}),
    "qwen3": (
        "Qwen3Config",
        _COMMON,
        (36, 4096, 32, 12288),
        {"num_key_value_heads": 8, "head_dim": 128},
        {"num_key_value_heads": 2, "head_dim": 8},
    ),
    "gemma": (
        "Gemma3TextConfig",
        _COMMON,
        (26, 1152, 4, 6912),
        {"num_key_value_heads": 1, "head_dim": 256},
        {"num_key_value_heads": 1, "head_dim": 8},
    ),
    "phi": ("PhiConfig", _COMMON, (32, 2560, 32, 10240), {}, {}),
}
SECOND_MATRIX = {
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt-neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "phi": "mlp.fc2",
}


@cache
def built(name: str, *, tiny: bool) -> Any:
    """The family's model at its checkpoint's depth: 32 wide, or as wide as the checkpoint."""
    import transformers

    config_class, names, (depth, *shape), real, small = CHECKPOINTS[name]
    sizes = dict(zip(names, (depth, *((32, 4, 64) if tiny else shape)), strict=True))
    special = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # the defaults lie outside the vocabulary
    config = getattr(transformers, config_class)(vocab_size=64, **sizes, **special, **(small if tiny else real))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def editor_spec(path: Path) -> Spec:
    spec = read_spec(path)
    assert isinstance(spec, Spec)
    return spec


def test_every_supported_family_has_a_spec() -> None:
    assert {path.stem for path in FILES} == set(CHECKPOINTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_family_s_spec_loads_and_says_whom_it_is_for(path: Path) -> None:
    spec = editor_spec(path)
    text = path.read_text(encoding="utf-8")
    training = from_mapping(TrainingSettings, spec.training, str(path))
    assert spec.method == "malmen"
    assert set(spec.given) == {"modules", "rank"}  # the rest follows the defaults, whatever they become
    assert set(spec.training) == {"steps", "facts_per_step"}
    assert (training.steps, training.facts_per_step) == (2000, (64, 1024))
    depth, width, *_ = CHECKPOINTS[path.stem][2]
    assert f", depth {depth}, width {width}. " in text.splitlines()[0]
    base = text.split()[2].rstrip(",")
    assert f"#   malmen train-editor {base} train.jsonl --spec edit_specs/families/{path.name}\n" in text
    assert set(yaml.safe_load(text)) == {"method", "settings", "training"}


@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "full-width"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_patterns_and_rule_name_the_same_modules(path: Path, tiny: bool) -> None:
    model = built(path.stem, tiny=tiny)
    modules = chosen_modules(model, editor_spec(path).settings.modules)
    depth, width, _, mlp = CHECKPOINTS[path.stem][2]
    leaf = SECOND_MATRIX.get(path.stem, "mlp.down_proj")
    assert modules == default_modules(model)
    assert [block_index(model, name) for name in modules] == list(edited_blocks(depth))
    assert all(name.endswith(f".{leaf}") for name in modules)
    assert {matrix_shape(model.get_submodule(name)) for name in modules} == {(64, 32) if tiny else (mlp, width)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_pattern_is_idle(path: Path) -> None:
    model, patterns = built(path.stem, tiny=True), editor_spec(path).settings.modules
    assert patterns is not None
    each = [chosen_modules(model, [pattern]) for pattern in patterns]
    assert sum(map(len, each)) == len(chosen_modules(model, patterns))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_hyper_network_s_rank_grows_with_the_width(path: Path) -> None:
    """Near the known shares of a key and its gradient: 256 of smollm2-135m's 2,112, 1920 of GPT-J's 20,480."""
    _, width, _, mlp = CHECKPOINTS[path.stem][2]
    rank = editor_spec(path).settings.rank
    assert 0.05 < rank / (width + mlp) < 0.125
    narrower = [p for p in FILES if CHECKPOINTS[p.stem][2][1] < width]
    assert all(editor_spec(p).settings.rank <= rank for p in narrower)
