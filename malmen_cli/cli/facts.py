"""`malmen facts`: look at a facts file, or rewrite it in the canonical form."""

from __future__ import annotations

import sys
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from malmen_cli.cli import options
from malmen_cli.cli.console import Console
from malmen_cli.exceptions import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from malmen_cli.facts.fact import Fact
    from malmen_cli.facts.files import FactFile

app = typer.Typer(
    name="facts",
    help="Check a facts file, or convert it to JSON Lines.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Dialect = Annotated[
    str | None,
    typer.Option(
        "--dialect",
        metavar="NAME",
        help="Read records of another project in this form; by default it is recognised by its keys.",
        show_default=False,
    ),
]
_OPTIONAL = ("subject", "old_target", "rephrases", "locality", "portability", "tags")
_CONVERTED = ("schema", "source", "sha256", "dialect", "count")  # of the summary, in convert's document
_MOST_TAGS = 8


@app.command("check")
def check(
    facts: options.Facts,
    dialect: Dialect = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Read a facts file as every other command would, and say what is in it.

    Mistakes are printed as file:line:field, up to 20 at once, and the exit code is 3.

    Examples:
      malmen facts check facts.yaml
      malmen facts check --json facts.jsonl | jq .count
      grep -v draft facts.jsonl | malmen facts check -
    """
    console = Console(quiet=quiet, json=json)
    read = _read(facts, dialect)
    summary = _summary(read)
    console.note(_prose(summary))
    _warn_contradictions(console, read.facts)
    console.document(summary)


@app.command("convert")
def convert(
    facts: options.Facts,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write here, whole or not at all; by default to stdout."),
    ] = None,
    dialect: Dialect = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Rewrite any facts file, of ours or of another project, as canonical JSON Lines.

    With --json, the document says what was converted, and the facts need a file of their own (-o).

    Examples:
      malmen facts convert zsre_mend_eval.json -o facts.jsonl
      malmen facts convert facts.yaml | head -3
    """
    from malmen_cli.artifact.atomic import write_file
    from malmen_cli.facts.files import write_facts

    if json and output is None and not dry_run:
        raise typer.BadParameter("--json needs -o FILE: the facts and the document cannot share stdout")
    if output is not None:
        _refuse(output, force)
    read = _read(facts, dialect)
    console, lines = Console(quiet=quiet, json=json), StringIO()
    write_facts(read.facts, lines)
    counted = f"{len(read.facts)} facts from {read.source}"
    if dry_run:
        console.note(f"would write {counted} to {output or 'stdout'}")
    elif output is None:
        console.data(lines.getvalue().removesuffix("\n"))
    else:
        write_file(output, lines.getvalue().encode(), force=force)
        console.note(f"{output}: {counted}")
    said = {key: value for key, value in _summary(read).items() if key in _CONVERTED}
    place = {"output": str(output) if output is not None else None}
    console.document(said | place | ({"dry_run": True} if dry_run else {}))


def _read(facts: str, dialect: str | None) -> FactFile:
    from malmen_cli.facts.files import read_facts

    return read_facts(facts, dialect=dialect, stdin=sys.stdin.buffer)


def _summary(read: FactFile) -> dict[str, Any]:
    facts = read.facts
    tags = Counter(tag for fact in facts for tag in fact.tags)
    return {
        "schema": 1,
        "source": read.source,
        "sha256": read.sha256,
        "dialect": read.dialect,
        "count": len(facts),
        "subjects": len({fact.subject for fact in facts if fact.subject}),
        "with": {name: sum(bool(getattr(fact, name)) for fact in facts) for name in _OPTIONAL},
        "tags": dict(sorted(tags.items(), key=lambda item: (-item[1], item[0]))),
    }


def _prose(summary: dict[str, Any]) -> str:
    """The summary for a person: a line for the count, one for the fields, one for the tags."""
    having = [f"{count} with {name.replace('_', ' ')}" for name, count in summary["with"].items() if count]
    tags = list(summary["tags"].items())
    lines = [f"{summary['source']}: {summary['count']} facts ({summary['dialect']}), no mistakes"]
    if having:
        lines.append(f"  {', '.join(having)}")
    if tags:
        shown = ", ".join(f"{tag} {count}" for tag, count in tags[:_MOST_TAGS])
        lines.append(f"  tags: {shown}" + (f" and {len(tags) - _MOST_TAGS} more" if len(tags) > _MOST_TAGS else ""))
    return "\n".join(lines)


def _warn_contradictions(console: Console, facts: Sequence[Fact]) -> None:
    """No mistake, as two wordings may differ in earnest; but no model can learn both."""
    from malmen_cli.facts.contradictions import contradictions

    pairs = list(contradictions(facts))
    if pairs:
        one, other = pairs[0]
        console.warn(f"{len(pairs)} facts contradict another in other words, the first: {one.id} and {other.id}")


def _refuse(output: Path, force: bool) -> None:
    from malmen_cli.artifact.placing import refuse_existing_file

    if output.is_dir() or not output.parent.is_dir():
        raise OutputError(f"{output}: not a file in an existing folder")
    refuse_existing_file(output, force=force)
