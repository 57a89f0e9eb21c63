"""A subcommand as a user types it: how tests run one, and what they hold what it leaves to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import typer
from typer.testing import CliRunner, Result

from malmen_cli.cli import errors

_ROOMS = {"eval": "malmen_cli.scoring"}  # of the schemas; the others lie beside their commands


def invoke(command: Callable[..., None], *argv: object, stdin: str | None = None) -> Result:
    """Run one subcommand; what it raised is in `exception`."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in argv], input=stdin)


def code(result: Result) -> int:
    """The exit code with the console entry's table applied."""
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code
    return errors.exit_code(result.exception)


def schema(name: str) -> dict[str, Any]:
    """The committed schema of what a command says under --json."""
    text = (files(_ROOMS.get(name, "malmen_cli.cli")) / f"{name}.schema.json").read_text(encoding="utf-8")
    found = dict(json.loads(text))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def valid(name: str, text: str) -> dict[str, Any]:
    """The one document in `text`, held to the schema `name`."""
    found = json.loads(text)
    jsonschema.Draft202012Validator(schema(name)).validate(found)
    assert isinstance(found, dict)
    return found


def document_of(name: str, result: Result, *, codes: Collection[int] = (0,)) -> dict[str, Any]:
    """The document on stdout of a command that ended with one of `codes`."""
    assert code(result) in codes, (result.output, result.exception)
    return valid(name, result.stdout)


def contents(folder: Path) -> dict[str, str]:
    """sha256 by path of every file below `folder`; folders, and links to nothing, are there too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in sorted(folder.rglob("*"))
    }
