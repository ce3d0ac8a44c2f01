"""What a person did wrong is one line; everything else keeps its traceback."""

import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from nitro_e_lite import errors
from nitro_e_lite.cli.terminal import command

CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and one is not errors.UserError]


def run(error):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    @command(app, "fails")
    def fails() -> None:
        raise error

    return CliRunner().invoke(app, ["fails"])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_mistake_is_also_the_built_in_error(cls):
    assert issubclass(cls, errors.UserError) and issubclass(
        cls, (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)
    )
    found = run(cls("seed: -1 is below 0\nsecond line"))
    assert found.exit_code == 2 and found.output == "Error: seed: -1 is below 0 second line\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug of ours"),
        RuntimeError("NCCL error"),
        torch.OutOfMemoryError("CUDA out"),
        OSError(5, "x"),
    ],
    ids=["bug", "nccl", "memory", "no file"],
)
def test_everything_else_keeps_its_traceback(error):
    found = run(error)
    assert found.exit_code == 1 and found.exception is error


def test_a_file_that_cannot_be_opened_is_a_mistake(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "prompts.jsonl").read_text()
    found = run(missing.value)
    assert found.exit_code == 2 and "prompts.jsonl: No such file or directory" in " ".join(found.output.split())


def test_a_real_mistake_on_the_command_line():
    words = [sys.executable, "-m", "nitro_e_lite.cli", "train", "base", "--preset", "smoke", "--set", "guidance=-3"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("Error: guidance=-3") and found.stderr.count("\n") == 1
