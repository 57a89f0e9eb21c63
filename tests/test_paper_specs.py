"""The specs in edit_specs/paper/ name the modules of the papers, in checkpoints of those shapes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from malmen_cli.base.families import block_index, chosen_modules, matrix_shape
from malmen_cli.editing.settings import from_mapping
from malmen_cli.editing.spec import Spec, read_spec
from malmen_cli.training.settings import TrainingSettings

FOLDER = Path(__file__).resolve().parents[1] / "edit_specs" / "paper"
_BERT = ("BertConfig", "AutoModelForSequenceClassification")
_T5 = ("T5Config", "AutoModelForSeq2SeqLM")
_GPT = "AutoModelForCausalLM"
_V11 = {"feed_forward_proj": "gated-gelu"}

# name -> config and auto class, shape of the checkpoint, the blocks edited in the order they run, the matrices of each
CHECKPOINTS: dict[str, tuple[tuple[str, str], dict[str, Any], list[int], list[str]]] = {
    "bert-base": (_BERT, {"num_hidden_layers": 12, "hidden_size": 768}, [*range(6, 12)], ["output.dense"]),
    "bert-large": (
        _BERT,
        {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
        [*range(18, 24)],
        ["output.dense"],
    ),
    "t5-small": (_T5, {"num_layers": 6, "d_model": 512, "d_ff": 2048}, [4, 5, 10, 11], ["wi", "wo"]),
    "t5-xl": (
        _T5,
        {"num_layers": 24, "d_model": 2048, "d_ff": 5120, "num_heads": 32} | _V11,
        [22, 23, 46, 47],
        ["wi_0", "wo"],
    ),
    "flan-t5": (
        _T5,
        {"num_layers": 8, "d_model": 512, "d_ff": 1024, "num_heads": 6} | _V11,
        [6, 7, 14, 15],
        ["wi_0", "wo"],
    ),
    "gpt2": (("GPT2Config", _GPT), {"n_layer": 12, "n_embd": 768}, [*range(6, 12)], ["mlp.c_proj"]),
    "gpt-j": (("GPTJConfig", _GPT), {"n_layer": 28, "n_embd": 4096}, [*range(22, 28)], ["mlp.fc_out"]),
}


def built(name: str) -> Any:
    import transformers

    (config, auto), shape, *_ = CHECKPOINTS[name]
    special = {"bos_token_id": 0, "eos_token_id": 0} if auto == _GPT else {}
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(getattr(transformers, config)(vocab_size=64, **shape, **special))


def test_every_one_is_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CHECKPOINTS)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_paper_s_spec_has_its_hyper_parameters_and_modules(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    spec, (_, _, blocks, leaves) = read_spec(path), CHECKPOINTS[name]
    assert isinstance(spec, Spec)
    settings, training = spec.settings, from_mapping(TrainingSettings, spec.training, str(path))
    assert (spec.method, settings.rank, settings.blocks, settings.tokens) == ("malmen", 1920, 2, "answer")
    assert (settings.passes, settings.preserved_rank) == (1, 0)
    assert (training.meta_lr, training.locality_weight, training.clip) == (1e-5, 1.0, 1.0)
    model = built(name)
    modules = chosen_modules(model, settings.modules, settings.last_blocks)
    assert [block_index(model, module) for module in modules] == [block for block in blocks for _ in leaves]
    assert all(module.endswith(tuple(f".{leaf}" for leaf in leaves)) for module in modules)
    assert len({matrix_shape(model.get_submodule(module)) for module in modules}) == len(leaves)
    assert f"--spec edit_specs/paper/{name}.yaml\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if not name.startswith("gpt")])
def test_no_pattern_is_idle(name: str) -> None:
    spec = read_spec(FOLDER / f"{name}.yaml")
    assert isinstance(spec, Spec)
    assert spec.settings.modules is not None
    model = built(name)
    each = [chosen_modules(model, [pattern]) for pattern in spec.settings.modules]
    assert sum(map(len, each)) == len(chosen_modules(model, spec.settings.modules))
