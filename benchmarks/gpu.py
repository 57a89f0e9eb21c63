"""Everything that wants an accelerator, in one call, at the shapes of published models with random weights.

    python benchmarks/gpu.py --shape gpt-j-6b --shape llama-8b -o gpu.jsonl

For each shape: a plain forward over the edit prompts, one edit of all facts, one training pass over as many, the share
of the card's bf16 peak that the forward and the edit's passes reach, and peak device memory. First of all, whether a
small model's shift is the same on the CPU and on the device. Facts are made up of random words: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from speed import plain_forward

from malmen_cli import __version__
from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base, exact_sums
from malmen_cli.edit import Ready, encode_edits, make_shift
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

# Dense bf16 peak, FLOP/s, of NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
# Config class and its fields. tiny: for a test on the CPU.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-j-6b": (
        "GPTJConfig",
        {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": 16384, "rotary_dim": 64},
    ),
    "llama-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
        },
    ),
    "tiny": (
        "GPTJConfig",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 64, "rotary_dim": 4},
    ),
}
AGREE = 1e-4  # relative difference of a shift between CPU and CUDA, in fp32
APPLY_GOAL, PASS_GOAL = 60.0, 600.0  # seconds for 16,384 facts at GPT-J's shape on an H200-class card
JUDGED = 64


@dataclass(frozen=True)
class Measured:
    """Seconds, the operations that the language model needs for that at least, and peak bytes on the device."""

    what: str
    seconds: float
    flop: float
    memory: int
    facts: int

    def record(self, peak: float | None) -> dict[str, Any]:
        share = self.flop / self.seconds / peak if peak else None
        return vars(self) | {"flop_per_second": self.flop / self.seconds, "share_of_peak": share}


def random_base(shape: str, device: torch.device, dtype: torch.dtype) -> Base:
    """A model of this shape with random weights, and a tokenizer whose words are w0, w1, ..."""
    name, fields = SHAPES[shape]
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, name)(**fields, **ends, tie_word_embeddings=False)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Base(shape, Path(shape), None, "0" * 64, model.eval().requires_grad_(False), _words(fields["vocab_size"]))


def _words(count: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", unk_token="w1")


def random_facts(count: int, vocabulary: int) -> list[Fact]:
    """Prompts of 6 to 14 words, answers of 1 to 3, one rephrase, one probe: of about CounterFact's lengths."""
    chooser = Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{chooser.randrange(2, vocabulary)}" for _ in range(chooser.randint(least, most)))

    facts = []
    for i in range(count):
        subject = words(2, 2)
        prompts = [f"{words(2, 6)} {subject} {words(2, 6)}" for _ in range(2)]
        facts.append(Fact(f"f{i}", prompts[0], words(1, 3), subject, None, (prompts[1],), (Probe(words(6, 12)),)))
    return facts


def forward_flop(base: Base, tokens: int) -> float:
    """2 operations a weight and token, embeddings left out: what one forward needs at least."""
    embedded = base.model.get_input_embeddings().weight.numel()
    return 2.0 * tokens * (sum(p.numel() for p in base.model.parameters()) - embedded)


@dataclass
class Bench:
    """One shape on one device."""

    base: Base
    facts: Sequence[Fact]
    batch_size: int
    step_facts: int
    rounds: int

    def rows(self) -> Iterator[Measured]:
        edits = encode_edits(self.base, self.facts, end_of_text=True)
        once = forward_flop(self.base, sum(len(edit.ids) for edit in edits))
        yield self._measured("plain forward", once, lambda: plain_forward(self.base, edits, self.batch_size))
        settings = MalmenSettings(rounds=self.rounds)
        trainer = self._trainer(settings)
        trainer.prepare()
        ready = Ready(trainer.editor, "malmen")
        # A pass needs one forward, and one backward by activations of the edited blocks and those behind them.
        share = 1 - trainer.runner.first / len(trainer.runner.blocks)
        needed = once * (1 + (2 * self.rounds - 1) * share)
        yield self._measured(
            "apply", needed, lambda: make_shift(self.base, ready, self.facts, batch_size=self.batch_size)
        )
        judged = min(JUDGED, self.step_facts) / self.step_facts  # their rephrases and probes: forward and backward
        yield self._measured("training pass", needed + 2 * judged * once * (1 + share), lambda: _all_steps(trainer))

    def _measured(self, what: str, flop: float, work: Callable[[], object]) -> Measured:
        with _device_memory(self.base.device) as memory:
            started = time.perf_counter()
            work()
            _wait(self.base.device)
            seconds = time.perf_counter() - started
        return Measured(what, seconds, flop, memory[0], len(self.facts))

    def _trainer(self, settings: MalmenSettings) -> Trainer:
        steps = max(1, len(self.facts) // self.step_facts)
        training = TrainingSettings(
            steps=steps,
            facts_per_step=(self.step_facts,),
            meta_facts=min(JUDGED, self.step_facts),
            validate_every=steps + 1,
            valid_facts=1,
            calibration_facts=min(JUDGED, len(self.facts)),
            preserved_prompts=min(1000, len(self.facts)),
        )
        editor = Editor.fresh(self.base.model, settings)
        runner = Runner(self.base, min(block_index(self.base.model, name) for name in editor.names))
        examples = encode_examples(self.base.task, self.facts, end_of_text=True)
        return Trainer(runner, editor, examples, examples[:1], training, batch_size=self.batch_size)


def agreement(device: torch.device) -> float:
    """Relative difference of the tiny shape's shift in fp32 between the CPU and `device`."""
    shifts = []
    for place in (torch.device("cpu"), device):
        base = random_base("tiny", torch.device("cpu"), torch.float32)
        base.model.to(place)
        editor = Editor.fresh(base.model, MalmenSettings(rounds=1, rank=8))
        shift = make_shift(base, Ready(editor, "malmen"), random_facts(24, 300), batch_size=8)
        shifts.append(torch.cat([module.matrix().flatten() for module in shift.modules.values()]))
    return float((shifts[1] - shifts[0]).norm() / shifts[0].norm())


def _all_steps(trainer: Trainer) -> None:
    seen: list[Progress] = []
    trainer.run(seen.append, lambda: None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _device_memory(device: torch.device) -> Iterator[list[int]]:
    """Peak bytes allocated on the device during the body; 0 on the CPU."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device)


def peak_of(device: torch.device) -> float | None:
    """The device's bf16 peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def line(row: dict[str, Any]) -> str:
    share = f"{row['share_of_peak']:.1%}" if row["share_of_peak"] is not None else "-"
    cells = [row["shape"], row["what"], f"{row['facts']:,}", f"{row['seconds']:.2f}"]
    return "| " + " | ".join([*cells, f"{row['flop_per_second']:.3g}", share, f"{row['memory'] / 1e9:.1f}"]) + " |"


HEAD = "| shape | what | facts | seconds | FLOP/s of the LM | of bf16 peak | peak memory, GB |\n" + "|---" * 7 + "|"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="default: gpt-j-6b and llama-8b")
    parser.add_argument("--count", type=int, default=16384, help="facts")
    parser.add_argument("--step-facts", type=int, default=1024, help="facts of a training step")
    parser.add_argument("--rounds", type=int, default=1, help="passes of an edit")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON lines, added to")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --shape tiny tries the script out")
    exact_sums()
    apart = agreement(device)
    print(f"CPU and {device}: shifts differ by {apart:.1e} (at most {AGREE:.0e} allowed)")
    print(HEAD, flush=True)
    said = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"malmen": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "command": shlex.join(["python", *sys.argv]),
        "agreement": apart,
    }
    for shape in options.shape or ["gpt-j-6b", "llama-8b"]:
        base = random_base(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        facts = random_facts(options.count, SHAPES[shape][1]["vocab_size"])
        bench = Bench(base, facts, options.batch_size, options.step_facts, options.rounds)
        for measured in bench.rows():
            row = {"shape": shape} | measured.record(peak_of(device)) | said
            print(line(row), flush=True)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
        del base, bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if apart > AGREE:
        sys.exit("CPU and device disagree")


if __name__ == "__main__":
    main()
