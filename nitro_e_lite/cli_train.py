"""The commands that train and plan: `nitro-e train ...` and `nitro-e plan`."""

from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite.terminal import Device, Overrides, Resume, RunDir, command, console

app = typer.Typer()
train_app = typer.Typer(help="Train one of the models of the course.", no_args_is_help=True)
app.add_typer(train_app, name="train")

Preset = Annotated[str, typer.Option(help="smoke, lite or full.")]
Processes = Annotated[int, typer.Option(help="Processes on a machine, one for each accelerator.")]
Nodes = Annotated[int, typer.Option(help="Machines; for more than one the commands are printed, not run.")]


def run_stage(stage, preset, overrides, run_dir, resume, device, processes, nodes) -> None:
    """Trains one stage, or prints how to start it on several machines."""
    from nitro_e_lite import config, launch
    from nitro_e_lite.training_state import RunStopped

    chosen = config.override(config.preset(stage, preset), overrides or [])
    run_dir = run_dir or Path("runs") / f"{stage}-{preset}"
    if nodes > 1:
        words = launch.train_arguments(chosen, run_dir, True, device)
        lines = ["# On each machine, HOST being the first:", *launch.torchrun_commands(words, nodes, processes)]
        lines += ["", "# Or as a Slurm job:", launch.slurm_script(words, nodes, processes)]
        typer.echo("\n".join(lines))
        return
    try:
        finish(launch.launch(chosen, run_dir, processes=processes, resume=resume, device=device, on_line=typer.echo))
    except RunStopped as stopped:
        typer.echo(str(stopped))


@command(train_app, "base")
def train_base(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Train the text-to-image transformer (stage 1); `RUN_DIR/final` holds the weights at the end."""
    run_stage("base", preset, overrides, run_dir, resume, device, processes, nodes)


@command(train_app, "finetune")
def train_finetune(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Fine-tune a base model on the better part of the data (stage 2); `--set start_from=FOLDER` names the base."""
    run_stage("finetune", preset, overrides, run_dir, resume, device, processes, nodes)


@command(train_app, "autoencoder")
def train_autoencoder(overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = False) -> None:
    """Train the lite autoencoder."""
    from nitro_e_lite import config, encoder_training

    chosen = config.override(encoder_training.AutoencoderConfig(), overrides or [])
    finish(encoder_training.train_autoencoder(chosen, run_dir or Path("runs/autoencoder"), resume))


@command(train_app, "language-model")
def train_language_model(overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = False) -> None:
    """Train the lite tokenizer and language model."""
    from nitro_e_lite import config, encoder_training

    chosen = config.override(encoder_training.LanguageModelConfig(), overrides or [])
    finish(encoder_training.train_language_model(chosen, run_dir or Path("runs/language-model"), resume))


def finish(final: Path) -> None:
    """Prints where the weights of a finished run are."""
    console.print(f"Weights: {final}", markup=False, soft_wrap=True)
