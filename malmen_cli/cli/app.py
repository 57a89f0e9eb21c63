"""The command tree. Every subcommand's file is light: torch and transformers load when its body runs."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from malmen_cli import __version__
from malmen_cli.cli.apply import apply
from malmen_cli.cli.diff import diff
from malmen_cli.cli.eval import evaluate
from malmen_cli.cli.facts import app as facts
from malmen_cli.cli.stats import stats
from malmen_cli.cli.train_editor import train_editor

app = typer.Typer(
    name="malmen",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a gate or --exit-code said no, 2 usage, 3 facts or spec, 4 checkpoint or editor, "
    "5 numerics, 6 output, 7 out of memory, 70 internal, 130 interrupted.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"malmen {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Turn a file of facts into a small, checkable change of a Hugging Face checkpoint.

    Correct a model:         malmen apply smollm2-135m facts.yaml -o edited/
    See whether it worked:   malmen eval edited/ facts.yaml --base smollm2-135m
    See what changed:        malmen diff smollm2-135m edited/
    Do better next time:     malmen train-editor smollm2-135m many-facts.jsonl
    """


app.command("apply")(apply)
app.command("train-editor")(train_editor)
app.command("eval")(evaluate)
app.command("diff")(diff)
app.command("stats")(stats)
app.add_typer(facts, name="facts")


def _as_paragraphs(text: str) -> str:
    """A docstring with one line a paragraph, for the terminal to wrap; indented lines (examples) stay lines."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        if line and not line.startswith(" ") and lines and lines[-1]:
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


for _command in (*app.registered_commands, *facts.registered_commands):
    _command.help = _as_paragraphs(_command.callback.__doc__ or "")
