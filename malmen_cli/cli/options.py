"""The arguments and options that several subcommands take, typed once.

A subcommand writes `revision: options.Revision = None`; defaults stand in its own signature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

_MODEL = "Model"
_OUTPUT = "Output"

_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


def _size(text: str) -> int:
    """Bytes of a size such as 512MB or 2GB."""
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = float(number) * _UNITS[unit]
        return int(size) if size >= 0 else _refuse(text)
    except (KeyError, ValueError, OverflowError):
        return _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise typer.BadParameter(f"{text!r} is not a size; write it as 512MB or 2GB")


Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        help="The checkpoint to start from: a hub id, a folder, a .gguf file or a built-in alias (smollm2-135m).",
        show_default=False,
    ),
]
Facts = Annotated[
    str,
    typer.Argument(
        metavar="FACTS",
        help="What should be true: JSON Lines, YAML, JSON, CSV, a data set of the hub, or - for standard input.",
        show_default=False,
    ),
]
StatsFrom = Annotated[
    str | None,
    typer.Option(
        "--stats-from",
        metavar="TEXT",
        help="Text for memit's key statistics: a file, or a data set with a column text; by default the base's own.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of a hub checkpoint.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:1 ..., or all: one model over all CUDA devices.",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        help="Run the model in this type; auto keeps the checkpoint's, but takes float32 on a CPU slow in that.",
        rich_help_panel=_MODEL,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        help="Prompts in one forward pass. Changes speed and memory, never the result.",
        rich_help_panel=_MODEL,
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=_size,
        help="Memory for what is kept between two passes over the facts (64MB, 2GB ...); what is more goes to disk.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, help="Same seed, same bytes out.", rich_help_panel=_MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that the checkpoint brings along.", rich_help_panel=_MODEL
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="DIR", help="The folder to write.", rich_help_panel=_OUTPUT, show_default=False
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an output that is already there.", rich_help_panel=_OUTPUT),
]
ForceEdit = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an output that is already there; write an edit even where it destroys the model.",
        rich_help_panel=_OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done and stop.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Nothing on stderr but errors.", rich_help_panel=_OUTPUT),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Say more on stderr.", rich_help_panel=_OUTPUT),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=_OUTPUT),
]
