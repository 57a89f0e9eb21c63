"""Edit quality in one table: methods x numbers of facts, each edited at once, with what the edit cost.

    python benchmarks/quality.py smollm2-135m --facts $MALMEN_DATA/counterfact-eval.jsonl --sizes 1,64,1024,all \
        --facts $MALMEN_DATA/zsre-eval.jsonl --sizes 200 \
        --editor malmen --editor mend=editor-mend --editor finetune --editor memit --editor identity -o quality.jsonl
    python benchmarks/quality.py --table quality.jsonl --plot quality.png

ES, GS, LS and, where the facts have it, PS in both protocols; score with its 95% interval; seconds from facts to shift
(the untrained network's calibration included; none where MEMIT's targets were found by an earlier run) and of the
editor's training; the largest relative norm of a module's shift; perplexity of text that the base itself wrote, before
and after. Every row is what `malmen apply` would do.

Size 1 edits facts one by one, each from the untouched base and scored on itself: figures over all of them, the median
of the seconds, the largest of the norms. More facts than --scored are all edited, and a part of them, chosen by
content, is scored. Rows go to the JSON lines file as they are finished, and a run that was killed goes on behind them.
"""

from __future__ import annotations

import argparse
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quality_methods import Method, method_of, shift_of
from quality_table import BASE, HEAD, Row, append_row, draw, heading, key, label_of, line, read_rows, table

from malmen_cli import __version__
from malmen_cli.artifact.merged import measure
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.sampling import sampled_answers
from malmen_cli.cli.console import Console, Progress
from malmen_cli.editing.methods.memit import EARLIER
from malmen_cli.editing.shift import applied
from malmen_cli.exceptions import MalmenError, MemoryLimitError, NumericsError
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.files import FactFile, facts_sha256, read_facts
from malmen_cli.scoring.decoder import Asker
from malmen_cli.scoring.judge import judge
from malmen_cli.scoring.metrics import bootstrap, harmonic_mean, mean_over_facts
from malmen_cli.scoring.plot import plot_format
from malmen_cli.scoring.protocols import Answers, collect
from malmen_cli.scoring.report import SCORED

TEXTS, TOKENS = 64, 48  # of the base's own, whose perplexity tells what an edit did to everything else
TEXTS_AT_ONCE = 16  # logits of every token times a large vocabulary: more would be gigabytes


@dataclass(frozen=True)
class Task:
    """One row to measure. Every one of `edits` is a set of facts edited at once and the part of it that is scored."""

    facts: FactFile
    edits: Sequence[tuple[Sequence[Fact], Sequence[Fact]]]
    method: Method

    def record(self) -> dict[str, Any]:
        one_by_one = len(self.edits) > 1 or len(self.edits[0][0]) == 1
        scored = sum(len(scored) for _, scored in self.edits)
        name = Path(self.facts.source).name
        edited = {"edited": len(self.edits[0][0]), "scored": scored, "one_by_one": one_by_one}
        return {"name": name, "sha256": self.facts.sha256} | edited


@dataclass
class Bench:
    """One base and what it says by itself, asked once for every set of facts."""

    base: Base
    seed: int
    batch_size: int
    console: Console
    _answers: dict[str, Answers] = field(default_factory=dict)

    def row(self, task: Task) -> Row:
        """Edit, score, and say under what circumstances. An edit that breaks the model is a row with an `error`."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            measured = self._measured(task)
        except (NumericsError, MemoryLimitError) as error:
            measured = {"error": str(error)}
        versions = {"malmen": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return self.head(task) | {
            **measured,
            "training_seconds": task.method.training_seconds,
            "batch_size": self.batch_size,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "versions": versions | {"python": platform.python_version()},
            "date": started,
            "command": shlex.join(["python", *sys.argv]),
        }

    def head(self, task: Task) -> Row:
        """What is known of a row before it is measured, its `key` included."""
        base = {"name": self.base.name, "revision": self.base.revision, "fingerprint": self.base.fingerprint}
        base["dtype"] = str(self.base.dtype).removeprefix("torch.")
        return {"base": base, "facts": task.record(), "method": task.method.record(), "seed": self.seed}

    @property
    def device(self) -> str:
        """As torch names it: the accelerator's name, or cpu."""
        place = self.base.device
        return torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)

    @cached_property
    def texts(self) -> list[Encoded]:
        """Text of the base's own; what it wrote is the answer, the random words it started from are the prompt."""
        return sampled_answers(self.base, TEXTS, TOKENS, seed=self.seed)

    @cached_property
    def own_loss(self) -> float:
        """`loss` of the base itself."""
        return self.loss()

    def loss(self) -> float:
        """Mean negative log-likelihood of the texts under the model as it stands, in nats a token."""
        asker = Asker(self.base, min(self.batch_size, TEXTS_AT_ONCE), lambda count: None)
        logprobs = [logprob for forced in asker.teacher_forced(self.texts) for logprob in forced.logprobs]
        return -math.fsum(logprobs) / len(logprobs)

    def before(self, facts: Sequence[Fact]) -> Answers:
        """The base's answers, from memory where these facts were asked before."""
        known = facts_sha256(facts)
        if known not in self._answers:
            self._answers[known] = self._asked(facts, "asking the base")
        return self._answers[known]

    def _measured(self, task: Task) -> dict[str, Any]:
        judged, seconds, norms, losses = [], [], [], []
        own = self.own_loss  # of the base, before anything is edited
        count = len(task.edits)  # of one edit, its questions are counted instead
        with self.console.progress("edits", count) if count > 1 else nullcontext(Progress()) as progress:
            for edited, scored in task.edits:
                before = self.before(scored)
                after, loss = before, own
                if task.method.name != BASE:
                    said = [""]
                    started = time.perf_counter()
                    options = {"seed": self.seed, "batch_size": self.batch_size, "note": said.append}
                    shift = shift_of(self.base, task.method, edited, **options)
                    if self.base.device.type == "cuda":
                        torch.cuda.synchronize(self.base.device)
                    if EARLIER not in said[-1]:  # else the seconds are not those of the whole edit
                        seconds.append(time.perf_counter() - started)
                    norms += [figures["relative_norm"] for figures in measure(self.base.folder, shift).values()]
                    with applied(self.base.model, shift, stored=self.base.stored):
                        after, loss = self._asked(scored, "asking the edited model"), self.loss()
                judged += [judge(fact, before, after) for fact in scored]
                losses.append(loss)
                progress.advance()
        perplexity = {"before": _exp(own), "after": _exp(math.fsum(losses) / len(losses))}
        return summary(judged, self.seed) | {
            "seconds": statistics.median(seconds) if len(seconds) == len(task.edits) else None,
            "relative_norm": max(norms) if norms else None,
            "perplexity": perplexity | {"texts": TEXTS, "tokens": TOKENS},
        }

    def _asked(self, facts: Sequence[Fact], said: str) -> Answers:
        if len(facts) == 1:
            return collect(self.base, facts, batch_size=self.batch_size)
        with self.console.progress(said) as progress:
            return collect(self.base, facts, batch_size=self.batch_size, progress=progress.report)


def summary(judged: Sequence[Mapping[str, float]], seed: int) -> dict[str, Any]:
    """Figures over facts and their 95% intervals, as in a report, of facts that need not share an edited model."""
    names = list(dict.fromkeys(name for one in judged for name in one))
    columns = {name: np.array([one.get(name, math.nan) for one in judged]) for name in names}
    figures = {name: mean_over_facts(column) for name, column in columns.items()}
    figures["score"] = harmonic_mean([figures[name] for name in SCORED])
    return {"figures": figures, "ci95": bootstrap(columns, {"score": SCORED}, seed=seed)}


def _exp(loss: float) -> float:
    """Perplexity of a loss; of a model wrecked beyond what a float holds, its largest power."""
    return math.exp(min(loss, 700.0))


def spread(facts: Sequence[Fact], size: int, seed: int) -> list[Fact]:
    """`size` of the facts in their order, chosen by content so that neither order nor neighbours decide."""

    def drawn(place: int) -> bytes:
        return sha256(f"{seed}\0{facts[place].prompt}\0{facts[place].target}".encode()).digest()

    return [facts[place] for place in sorted(sorted(range(len(facts)), key=drawn)[:size])]


def tasks(facts: FactFile, sizes: str, methods: Sequence[Method], options: argparse.Namespace) -> list[Task]:
    """A row for every size and method, the base's own first; sizes beyond the file are the whole file."""
    there = len(facts.facts)
    wanted = dict.fromkeys(there if size == "all" else min(int(size), there) for size in sizes.split(","))
    found = []
    for size in wanted:
        chosen = facts.facts[:size]
        edits = [(chosen, spread(chosen, options.scored, options.seed))]
        if size == 1:
            edits = [([fact], [fact]) for fact in spread(facts.facts, options.singles, options.seed)]
        found += [Task(facts, edits, method) for method in (Method(BASE), *methods)]
    return found


def run(options: argparse.Namespace) -> None:
    """Measure what the output does not hold yet, printing every row."""
    console = Console()
    sizes = options.sizes * len(options.facts) if len(options.sizes) == 1 else options.sizes
    files = [read_facts(file) for file in options.facts]
    base = load_base(options.base, device=options.device, dtype=options.dtype)
    trained_in = {name: float(seconds) for name, _, seconds in (item.partition("=") for item in options.trained_in)}
    methods = [method_of(base, editor, options.seed, trained_in) for editor in options.editor]
    bench = Bench(base, options.seed, options.batch_size, console)
    rows = {key(row): row for row in read_rows(options.output)}
    for facts, wanted in zip(files, sizes, strict=True):
        todo = tasks(facts, wanted, methods, options)
        heads = [bench.head(task) for task in todo]
        print(heading(heads[0] | {"device": bench.device}) + "\n" + HEAD, flush=True)
        for task, head in zip(todo, heads, strict=True):
            label, known = label_of(head, [*rows.values(), *heads]), rows.get(key(head))
            if known is None or "error" in known:
                console.note(f"{facts.source}: {label}, {head['facts']['edited']:,} at once")
                known = rows[key(head)] = bench.row(task)
                append_row(options.output, known)
            print(line(known, label), flush=True)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="hub id, folder, .gguf file or alias")
    parser.add_argument("--facts", action="append", default=[], metavar="FILE")
    parser.add_argument(
        "--sizes", action="append", default=[], metavar="N,...,all", help="for the --facts in its place"
    )
    parser.add_argument("--editor", action="append", default=[], metavar="METHOD[=DIR]|METHOD[=SPEC]")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON lines; what it holds is not done again")
    parser.add_argument("--scored", type=int, default=1024, metavar="N", help="most facts that are scored")
    parser.add_argument("--singles", type=int, default=50, metavar="N", help="facts edited one by one for size 1")
    parser.add_argument("--trained-in", action="append", default=[], metavar="METHOD=SECONDS", help="for the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows: .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or ["1,64,1024,all"]
    numbers = [size for sizes in options.sizes for size in sizes.split(",") if size != "all"]
    if not all(size.isdecimal() and int(size) for size in numbers):
        parser.error("--sizes takes numbers from 1 and `all`, with commas between them")
    if options.table is None and not (options.base and options.facts and options.output):
        parser.error("give a base, --facts and -o, or --table")
    if len(options.sizes) not in (1, len(options.facts)) and options.table is None:
        parser.error("give one --sizes for all, or one for each --facts")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        if options.plot is not None:
            plot_format(options.plot)  # before anything is measured
        if options.table is None:
            run(options)
        else:
            print(table(read_rows(options.table)))
        if options.plot is not None:
            draw(read_rows(options.table or options.output), options.plot)
    except MalmenError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
