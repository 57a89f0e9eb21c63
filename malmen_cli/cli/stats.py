"""`malmen stats`: key statistics of a base, ahead of the edits that need them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from malmen_cli.cli import options, show
from malmen_cli.cli.console import Console


def stats(
    base: options.Base,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="memit, rome or alphaedit; by default the spec's, else memit.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="FILE", help="The spec that apply will be given.", show_default=False),
    ] = None,
    stats_from: options.StatsFrom = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = 32,
    trust_remote_code: options.TrustRemoteCode = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Build again what is already there.", rich_help_panel="Output"),
    ] = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    json: options.Json = False,
) -> None:
    """Build the key statistics that memit, rome and alphaedit need, once for a base and a text.

    They are kept in the cache, where apply finds them when it is given the same --spec and --stats-from; without them
    it builds them itself. By default they are taken over text that the base writes, so that nothing is downloaded.

    Examples:
      malmen stats smollm2-135m --stats-from wikipedia.txt
      malmen stats EleutherAI/gpt-j-6b --spec edit_specs/memit/gptj.yaml --stats-from wikipedia.txt
      malmen stats gpt2 --method alphaedit --dry-run
    """
    from malmen_cli.artifact.statistics import statistics_folder
    from malmen_cli.base.families import matrix_shape
    from malmen_cli.base.model import load_base
    from malmen_cli.editing.methods.memit import memit_modules
    from malmen_cli.editing.spec import MemitSpec, read_spec
    from malmen_cli.exceptions import SpecError
    from malmen_cli.key_statistics import Text, counted, gather_statistics, missing_statistics

    started = time.monotonic()
    console = Console(quiet=quiet, verbose=verbose, json=json)
    chosen = read_spec(spec, method=method or ("memit" if spec is None else None))
    if not isinstance(chosen, MemitSpec):
        raise SpecError(f"{chosen.method} needs no statistics; memit, rome and alphaedit do")
    console.note(f"loading {base}")
    loaded = load_base(
        base, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code, note=console.note
    )
    names = memit_modules(loaded.model, chosen.settings)
    text = Text(loaded, stats_from, chosen.settings.stats_tokens)
    tokens = text.source["tokens"]
    assert isinstance(tokens, int)
    if dry_run:
        built = names if force else missing_statistics(loaded, names, text)
        size = sum(4 * matrix_shape(loaded.model.get_submodule(name))[0] ** 2 for name in built)
        console.note(f"would build {len(built)} of {counted(names)} over {tokens} tokens of {text.source['name']}")
        console.note(f"disk {show.size(size)}; nothing was written")
    else:
        with console.progress("key statistics, tokens", tokens) as progress:
            _, built = gather_statistics(
                loaded,
                names,
                text,
                batch_size=batch_size,
                again=force,
                must_keep=True,
                progress=progress.advance,
                note=console.debug,
            )
        seconds = time.monotonic() - started
        console.note(f"{len(built)} of {counted(names)} built in {seconds:.0f} s, the others were there")
    folders = {name: statistics_folder(loaded.fingerprint, name, text.source) for name in names}
    for name, folder in folders.items():
        console.debug(f"  {name}: {folder}")
    console.document(
        {
            "schema": 1,
            **({"dry_run": True} if dry_run else {}),
            "base": {"name": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint},
            "method": chosen.method,
            "text": text.source,
            "modules": {name: {"folder": str(folder), "built": name in built} for name, folder in folders.items()},
        }
    )
