"""A small `.gguf` file, for the test files that share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

WIDTH, MLP, WORDS = 64, 96, ["<s>", "</s>", "a", "b", "c", "d", "Ġ", "ab", "cd", "Ġa", "Ġb", "Ġc"]


def write_gguf(path: Path, *, without: str = "", layers: int = 1) -> dict[str, Any]:
    """A llama of one layer with Q4_1 matrices, as llama.cpp writes them; returns the values its blocks stand for."""
    import numpy as np

    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    writer.add_token_merges(["a b", "c d", "Ġ a", "Ġ b", "Ġ c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH)}
    block |= {"ffn_down": (WIDTH, MLP)} | {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    values = {}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        value = random.standard_normal(shape).astype(np.float32)
        if name == without:
            continue
        if len(shape) == 2:
            packed = gguf.quants.quantize(value, kind)
            writer.add_tensor(name + ".weight", packed, raw_dtype=kind)
            value = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name + ".weight", value)
        values[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
