"""The training curve of an editor: ES, GS, LS and score at every validation, the step that was kept marked.

    python benchmarks/plots.py curve my-editor/ -o curve.png

Quality against the number of facts is drawn by quality.py --plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from malmen_cli.artifact.atomic import write_file
from malmen_cli.artifact.editors import DESCRIPTION
from malmen_cli.artifact.manifest import read_sealed
from malmen_cli.exceptions import MalmenError
from malmen_cli.scoring.plot import curve_plot, plot_format


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    curve = commands.add_parser("curve", help="the training curve of an editor")
    curve.add_argument("editor", type=Path, metavar="EDITOR_DIR")
    curve.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    options = parser.parse_args(arguments)
    try:
        kind = plot_format(options.output)
        write_file(options.output, curve_plot(read_sealed(options.editor / DESCRIPTION), kind))
    except MalmenError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
