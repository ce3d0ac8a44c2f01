"""How commands speak and the options they share.

Results go to standard output, everything else to standard error; a foreseeable error is one line.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nitro_e_lite.errors import UserError

PLAIN = {"markup": False, "emoji": False}  # names that people gave may hold brackets and colons
console, errors = Console(**PLAIN), Console(stderr=True, **PLAIN)
LONG = 2000  # characters of a line that are shown
NO_ROOM = [getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")]  # Windows has not all

Model = Annotated[
    str, typer.Option(help="Shipped name, folder, training run, official .safetensors file or amd/Nitro-E.")
]
Steps = Annotated[int | None, typer.Option(help="Sampler steps; the model's own default when not given.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; up to 1 switches it off.")]
Shift = Annotated[float | None, typer.Option(help="How far the noise levels lean towards noise; 1: even steps.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the accelerator when there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
TextEncoder = Annotated[str | None, typer.Option(help="Folder of a text encoder, for official weights.")]
Vae = Annotated[str | None, typer.Option(help="Folder of an autoencoder, for official weights.")]
Variant = Annotated[
    str | None,
    typer.Option(help="Variant of official weights: 512px, 512px-dist, 1024px, 1024px-dist; guessed when not given."),
]
Lora = Annotated[
    Path | None, typer.Option(help="LoRA to merge into the weights: a PEFT folder, or a run that trained one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="field=value; may be given several times.")]
RunDir = Annotated[Path | None, typer.Option(help="Folder of the run.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder; starts it when empty.")]


def command(group: typer.Typer, name: str) -> Callable:
    """Registers a command: what a person did wrong becomes one line on standard error and exit code 2.

    That is a `UserError`, a file that the system cannot open, or a full disk. Any other error keeps its traceback. What
    the terminal's encoding cannot show is spelled out, and who has stopped listening (`| head`) is told nothing more.
    """

    def register(function: Callable) -> Callable:
        @group.command(name)
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            warnings.showwarning = show_warning
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="backslashreplace")
            try:
                function(*arguments, **options)
            except (typer.Exit, typer.Abort):
                raise
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds and writes when it ends
                raise typer.Exit(1) from None
            except (UserError, OSError) as error:
                message = explain(error)
                if os.environ.get("NITRO_E_DEBUG") or message is None:
                    raise
                say(f"Error: {message}", "bold red")
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                raise typer.Exit(130) from None

        return run

    return register


def explain(error: UserError | OSError) -> str | None:
    """One line for the person at the terminal; None for an error that is nobody's mistake here."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UserError):
        return " ".join(str(error).split()) or type(error).__name__
    full = error.errno in NO_ROOM
    return f"a file could not be written ({error.strerror}); make room and run the command again" if full else None


def show_warning(message: Warning | str, *origin: Any, **more: Any) -> None:
    """A warning as one line, without the place in the code that it came from."""
    say(f"Warning: {message}", "yellow")


def say(text: str, style: str) -> None:
    """A line on standard error; of what fills screens, such as an endless caption, the beginning and the end."""
    if len(text) > LONG:
        text = f"{text[: LONG // 2]} ... {text[-LONG // 4 :]}"
    errors.print(text, style=style, markup=False, soft_wrap=True)


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[dict[str, Any]]:
    """Collects the result of a command; with `--json` prints it alone on standard output at the end."""
    result: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield result
    if as_json:
        print(json.dumps(result))


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; all columns but the first are numbers, which a narrow terminal never cuts."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    least = console.measure(table, options=console.options.update(max_width=10_000)).minimum
    (console if least <= console.width else Console(width=least, **PLAIN)).print(table)


def settings(pipeline: Any, model: str, sampler: Any) -> dict[str, Any]:
    """The settings in force, for a file's text chunks and for `--json`; `sampler` is one of the pipeline's."""
    return {
        "model": str(model),
        **dataclasses.asdict(sampler),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        **({"fp8": report.rung} if (report := getattr(pipeline.transformer, "fp8_report", None)) else {}),
    }
