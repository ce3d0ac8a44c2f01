"""The command line: `nitro-e demo`, `sample`, `evaluate`, `train`, `doctor`, `count`, `benchmark`.

Each command is a thin layer over a function that a notebook can call too. Three rules hold for all: what
a person did wrong ends in one clear line and exit code 2, not in a traceback (`NITRO_E_DEBUG=1` shows
it); with `--json` standard output holds one JSON object and nothing else; progress and warnings go to
standard error.

Heavy libraries are imported inside the commands, so that `nitro-e --help` answers at once. The commands that
draw are in `draw.py`, those that score and measure in `measure.py`, those that train and plan in `train.py`, those for
data in `data.py`, those for classes in `course.py`.
"""

from typing import Annotated

import typer

from nitro_e_lite.cli import course, data, draw, measure, train
from nitro_e_lite.cli.terminal import (
    Json,
    command,
    console,
    output,
)

app = typer.Typer(
    help="Nitro-E Lite: pictures from captions, and everything behind them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

notebooks_app = typer.Typer(help="The notebooks of the course.", no_args_is_help=True)
app.add_typer(draw.app)
app.add_typer(measure.app)
app.add_typer(data.app, name="data")
app.add_typer(train.app)
app.add_typer(notebooks_app, name="notebooks")
app.add_typer(course.app, name="course")
app.add_typer(course.challenge_app)


@command(notebooks_app, "refresh")
def notebooks_refresh(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or numbers, such as 08; all when none is given.")
    ] = None,
    json: Json = False,
) -> None:
    """Run notebooks again with their default parameters and store outputs and figures in the checkout."""
    with output(json) as result:
        from nitro_e_lite.course.notebooks import refresh

        result["notebooks"] = []
        for done in refresh(names):
            result["notebooks"].append(vars(done))
            text = f"{done.name}: {done.seconds:.0f} s, {done.cpu_seconds:.0f} s of processor time, {done.size:,} bytes"
            console.print(text, markup=False, soft_wrap=True)
