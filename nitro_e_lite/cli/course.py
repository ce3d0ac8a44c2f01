"""The commands of the course: `nitro-e course ...` and `nitro-e challenge`."""

from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite import files
from nitro_e_lite.cli.terminal import Json, Overrides, RunDir, command, console, output, show_table
from nitro_e_lite.cli.train import stoppable
from nitro_e_lite.errors import InvalidValue

app = typer.Typer(help="The course for classes: assignments and the debugging lab.", no_args_is_help=True)
challenge_app = typer.Typer()


@command(app, "assignment")
def assignment(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the nbgrader course; source/ and release/ are written there.")
    ],
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or numbers, such as 08; all when none is given.")
    ] = None,
    json: Json = False,
) -> None:
    """Write notebooks for students in nbgrader's format: functions left to write, checks kept, solutions cut."""
    with output(json) as result:
        from nitro_e_lite.course.assignment import write

        result["points"] = {}
        for name, points in write(folder, names):
            result["points"][name] = points
            console.print(f"{name}: {points} points", markup=False)


@command(app, "lab")
def lab(
    folder: Annotated[Path, typer.Argument(help="Where the log and the picture of each run go.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
    json: Json = False,
) -> None:
    """Make the eight failed trainings of notebook 18 again, and the sound one: seconds each."""
    with output(json) as result:
        from nitro_e_lite.course.debugging_lab import write

        result["drawn"] = {}
        for name, log in write(folder, seed=seed):
            result["drawn"][name] = log["drawn"]
            said = ", ".join(f"{value} {what}" for what, value in log["drawn"].items())
            console.print(f"{name}: {said}", markup=False, soft_wrap=True)


@command(app, "results")
def results(
    names: Annotated[list[str], typer.Argument(help="Names or numbers of notebooks, such as 02.")],
    folder: Annotated[Path | None, typer.Option(help="Where NUMBER.json goes; by default into the package.")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Measure at lite scale what a notebook shows beside its smoke run: minutes each; continues after a stop."""
    with output(json) as result:
        from nitro_e_lite.course import lessons, notebooks

        folder = folder or lessons.RESULTS
        files.check_output(folder, "folder")
        result["files"] = []
        with files.only_writer(folder):
            for name in names:
                result["files"].append(str(notebooks.store_lite(name, folder, overrides or [])))
                console.print(result["files"][-1], markup=False, soft_wrap=True)


@command(app, "playground")
def playground(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=RUN or NAME=RUN@STEPS, in the order of the page; without any, only arms are made again."
        ),
    ] = None,
    failed: Annotated[
        list[str] | None, typer.Option(help="NAME=RUN that was meant to fail; may be given several times.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="NAME=RUN of an ablation, once for each seed.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the data go; by default into the package.")] = None,
    moments: Annotated[
        int, typer.Option(min=2, help="Moments shown of each run: its start, some on the way, its end.")
    ] = 4,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts of each category scored at each moment; 0: no new scores.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    json: Json = False,
) -> None:
    """Put students of few steps side by side for notebook 13: pictures and scores over minutes of training."""
    with output(json) as result:
        from nitro_e_lite.course import playground

        folder = folder or playground.FOLDER
        files.check_output(folder, "folder")
        parts = [[playground.Shown.parse(text) for text in some or []] for some in (runs, failed, arm)]
        if not parts[0] and (parts[1] or not parts[2]):
            raise InvalidValue("runs: none; name some, or give --arm alone to make an ablation anew")
        if parts[0]:
            lines = playground.write(*parts, folder, moments, prompts, seed)
        else:
            lines = playground.write_arms(parts[2], folder, prompts, seed)
        result["said"] = []
        for line in lines:
            result["said"].append(line)
            console.print(line, markup=False, soft_wrap=True)


@command(challenge_app, "challenge")
def challenge(
    minutes: Annotated[float, typer.Option(help="Minutes of training; an entry has 60.")] = 60.0,
    name: Annotated[str, typer.Option(help="Name of the entry.")] = "anonymous",
    preset: Annotated[str, typer.Option(help="lite, or smoke to try the command.")] = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    board: Annotated[list[Path] | None, typer.Option(help="Rank the entries in these folders; train nothing.")] = None,
    json: Json = False,
) -> None:
    """Train a transformer from nothing for an hour on two cores and have it judged: notebooks/CHALLENGE.md."""
    with output(json) as result, stoppable():
        from nitro_e_lite.experiments import challenge

        if board:
            ranked = challenge.board(board)
        else:
            folder = run_dir or Path("runs/challenge")
            say = lambda line: typer.echo(line, err=True)  # noqa: E731
            entry = challenge.challenge(folder, minutes, name, preset, overrides or [], say)
            ranked = [challenge.Row(None, entry, challenge.breaches(entry))]
        result["entries"] = [{"place": row.place, "breaches": row.breaches, **row.entry} for row in ranked]
        rows = []
        for row in ranked:
            card = row.entry["card"]
            score = f"{card['overall']:.3f} ({card['low']:.3f} to {card['high']:.3f})"
            cost = f"{row.entry['seconds'] / 60:.1f} min, {card['transformer_parameters'] / 1e6:.2f}M"
            rows.append([row.entry["name"], str(row.place or "-"), score, cost, "; ".join(row.breaches) or "kept"])
        if not json:
            show_table("the one-hour challenge", ["entry", "place", "GenEval-lite", "cost", "rules"], rows)
