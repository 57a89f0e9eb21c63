"""Time and peak memory of an edit against the number of facts, as a table and a picture. Facts are made up.

    python benchmarks/scale.py smollm2-135m --sizes 100,1000,10000,100000 -o scale.jsonl --plot scale.png
    python benchmarks/scale.py --table scale.jsonl --plot scale.png

Every size is a process of its own, and its facts are of the same lengths as another's. Peak is resident memory while
editing, the facts themselves left out: what it was once they were read is taken away. Where it is flat, memory does not
limit how many facts can be edited. A fact's time is that of the processors, which other work on the machine hardly
changes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from madeup import made_up

from malmen_cli import __version__
from malmen_cli.artifact.atomic import write_file
from malmen_cli.exceptions import MalmenError
from malmen_cli.facts.files import write_facts
from malmen_cli.scoring.plot import plot_format, scale_plot

FLAT, STEADY = 1.1, 0.2  # goals: of peak memory, and of a fact's time, from the size in front on
HEAD = (
    "| facts | seconds | processor, ms a fact | peak, MB | of it facts, MB | peak without facts | |\n"
    + "|---" * 7
    + "|"
)
BIG = 1 << 20
LONG_NAMES = 100_000  # from where on made-up names are all of one length, up to 900,000 facts

Row = Mapping[str, Any]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One edit of the facts in a file, in this process: seconds, and resident bytes before, with facts, and at most."""
    from malmen_cli.base.model import load_base
    from malmen_cli.edit import calibrated_identity, find_ready, make_shift
    from malmen_cli.editing.settings import MalmenSettings
    from malmen_cli.editing.spec import Spec
    from malmen_cli.facts.files import read_facts

    base = load_base(options.base, device=options.device)
    bare = resident()
    facts = read_facts(str(options.child)).facts
    with_facts = resident()
    forget_peak()
    ready = None if options.rounds else find_ready(base, Spec("malmen"), options.editor)
    if ready is None:
        settings = MalmenSettings(rounds=options.rounds)
        # Of as many facts whatever the size, so that calibration's own memory is the same.
        ready = calibrated_identity(base, facts[:100], settings, seed=0, batch_size=options.batch_size)
    started, spent = time.perf_counter(), time.process_time()
    told = _Told(len(facts) * ready.settings.passes)
    make_shift(base, ready, facts, batch_size=options.batch_size, memory=options.max_memory, progress=told)
    seconds, processor = time.perf_counter() - started, time.process_time() - spent
    memory = {"bare": bare, "with_facts": with_facts, "peak": resident("VmHWM")}
    return {
        "facts": len(facts),
        "seconds": seconds,
        "processor": processor,
        "memory": memory,
        "method": ready.method,
        "passes": ready.settings.passes,
    }


class _Told:
    """Prints every tenth of the work that is done."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, more: int) -> None:
        before, self.done = 10 * self.done // self.total, self.done + more
        if 10 * self.done // self.total > before:
            print(f"{self.done:,} of {self.total:,} facts, in passes", file=sys.stderr, flush=True)


def resident(what: str = "VmRSS") -> int:
    """Resident bytes of this process now, or since `forget_peak` at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The largest resident size counts from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def own_peak(row: Row) -> int:
    """Peak bytes beyond the facts themselves."""
    memory = row["memory"]
    return int(memory["peak"] - (memory["with_facts"] - memory["bare"]))


def table(rows: Sequence[Row]) -> str:
    """Every row beside the one in front of it that has at least 1,000 facts, else the first."""
    ordered = sorted(rows, key=lambda row: row["facts"])
    against = next((row for row in ordered if row["facts"] >= 1000), ordered[0])
    lines = []
    for row in ordered:
        each, peak = row["processor"] / row["facts"], own_peak(row)
        ratio, pace = peak / own_peak(against), each / (against["processor"] / against["facts"])
        memory = row["memory"]
        kept = memory["with_facts"] - memory["bare"]
        cells = [f"{row['facts']:,}", f"{row['seconds']:.1f}", f"{1000 * each:.2f}", f"{memory['peak'] / BIG:.0f}"]
        cells += [f"{kept / BIG:.0f}", f"{peak / BIG:.0f} ({ratio:.2f}x)", f"time a fact {pace:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([HEAD, *lines])


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A child process a size; rows are appended as they come."""
    rows = []
    said = {
        "base": options.base,
        "machine": platform.machine(),
        "versions": {"malmen": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "command": shlex.join(["python", *sys.argv]),
    }
    with tempfile.TemporaryDirectory(prefix="malmen-scale-") as folder:
        for size in sorted(options.sizes):
            file = Path(folder) / f"{size}.jsonl"
            write_facts(made_up(size, start=LONG_NAMES), file)
            command = [sys.executable, __file__, options.base, "--child", str(file)]
            command += ["--batch-size", str(options.batch_size), "--device", options.device]
            command += ["--editor", str(options.editor)] if options.editor else []
            command += ["--rounds", str(options.rounds)] if options.rounds else []
            command += ["--max-memory", str(options.max_memory)] if options.max_memory is not None else []
            child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rows.append(json.loads(child.stdout.splitlines()[-1]) | said)
            if options.output is not None:
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    return rows


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="hub id, folder, .gguf file or alias")
    parser.add_argument(
        "--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[100, 1000, 10000]
    )
    parser.add_argument("--editor", type=Path, metavar="DIR")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="passes of an untrained editor, in place of a trained one"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-memory", type=int, metavar="BYTES")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON lines, added to")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: rows of an earlier run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument("--child", type=Path, metavar="FACTS", help="one measurement, in this process")
    options = parser.parse_args(arguments)
    if options.editor and options.rounds:
        parser.error("--rounds is for an untrained editor, not for --editor's")
    if (options.base is None) == (options.table is None):
        parser.error("give a base, or --table")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        if options.child is not None:
            print(json.dumps(measure(options)))
            return
        kind = plot_format(options.plot) if options.plot is not None else None
        rows = [json.loads(line) for line in options.table.open()] if options.table else run(options)
        print(table(rows))
        if kind is not None:
            write_file(options.plot, scale_plot([(r["facts"], r["seconds"], own_peak(r)) for r in rows], kind))
    except MalmenError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
