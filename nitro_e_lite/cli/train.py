"""The commands that train and plan: `nitro-e train ...` and `nitro-e plan`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite.cli.terminal import (
    Device,
    Json,
    Overrides,
    Resume,
    RunDir,
    command,
    console,
    output,
    show_table,
)
from nitro_e_lite.errors import InvalidValue, Unusable
from nitro_e_lite.files import check_output

app = typer.Typer()
train_app = typer.Typer(help="Train one of the models of the course.", no_args_is_help=True)
app.add_typer(train_app, name="train")
Preset = Annotated[str, typer.Option(help="smoke, lite or full.")]
Processes = Annotated[int, typer.Option(help="Processes on a machine, one for each accelerator.")]
Canary = Annotated[
    bool, typer.Option("--canary", help="Look first, then only 500 steps, one kill, one resume: GO (0) or STOP (1).")
]
Nodes = Annotated[int, typer.Option(help="Machines; for more than one the commands are printed, not run.")]


def run_stage(stage, preset, overrides, run_dir, resume, device, processes, nodes, canary) -> None:
    """Trains one stage, tries its first steps, or prints how to start it on several machines."""
    from nitro_e_lite import config, presets
    from nitro_e_lite.experiments import launch

    chosen = config.override(presets.preset(stage, preset), overrides or [])
    run_dir = run_dir or Path("runs") / f"{stage}-{preset}"
    if nodes < 1 or processes < 1:
        raise InvalidValue(f"processes={processes}, nodes={nodes}: must be >= 1")
    for name, given in (("resume", resume), ("nodes", nodes > 1)):
        if canary and given:
            raise InvalidValue(f"{name}: a canary is a run of its own, on this machine; leave --{name} out")
    if nodes > 1:
        words = launch.train_arguments(chosen, run_dir, True, device)
        lines = ["# On each machine, HOST being the first:", *launch.torchrun_commands(words, nodes, processes)]
        lines += ["", "# Or as a Slurm job:", launch.slurm_script(words, nodes, processes)]
        typer.echo("\n".join(lines))
        return
    with stoppable():
        if canary:
            from nitro_e_lite.experiments import preflight
            from nitro_e_lite.experiments.canary import canary as run_canary

            preflight.require(preflight.preflight(chosen, run_dir, processes, device))
            bands = run_canary(chosen, run_dir, processes, device, typer.echo)
            raise typer.Exit(0 if all(band.fine for band in bands) else 1)
        finish(launch.launch(chosen, run_dir, processes=processes, resume=resume, device=device, on_line=typer.echo))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A run that was asked to stop ends with one line that says how to continue, whatever the number of processes."""
    from nitro_e_lite.runtime import RunStopped

    try:
        yield
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
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
    canary: Canary = False,
) -> None:
    """Train the text-to-image transformer (stage 1); `RUN_DIR/final` holds the weights at the end."""
    run_stage("base", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "finetune")
def train_finetune(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    canary: Canary = False,
) -> None:
    """Fine-tune a base model on the better part of the data (stage 2); `--set start_from=FOLDER` names the base."""
    run_stage("finetune", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "1024px")
def train_1024px(
    preset: Annotated[str, typer.Option(help="smoke or full.")] = "full",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    canary: Canary = False,
) -> None:
    """Teach a 512 px model pictures of twice the side; `--set start_from=FOLDER` names it."""
    run_stage("1024px", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "rewards")
def train_rewards(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    canary: Canary = False,
) -> None:
    """Learn from rewards (stage 3): `RUN_DIR/final` is an adapter for `--lora`; `--set method=grpo` is Flow-GRPO."""
    run_stage("rewards", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "distill")
def train_distill(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    canary: Canary = False,
) -> None:
    """Teach a student to draw in four steps without guidance (stage 4), from pictures of `nitro-e data draw`."""
    run_stage("distill", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "sprint")
def train_sprint(
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    canary: Canary = False,
) -> None:
    """Teach one student to draw in 1, 2 and 4 steps (SANA-Sprint), from pictures of `nitro-e data draw`."""
    run_stage("sprint", preset, overrides, run_dir, resume, device, processes, nodes, canary)


@command(train_app, "autoencoder")
def train_autoencoder(
    overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = False, device: Device = None
) -> None:
    """Train the lite autoencoder."""
    from nitro_e_lite import config
    from nitro_e_lite.stages import autoencoder

    chosen = config.override(autoencoder.AutoencoderConfig(), overrides or [])
    with stoppable():
        finish(autoencoder.train_autoencoder(chosen, run_dir or Path("runs/autoencoder"), resume, device))


@command(train_app, "language-model")
def train_language_model(
    overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = False, device: Device = None
) -> None:
    """Train the lite tokenizer and language model."""
    from nitro_e_lite import config
    from nitro_e_lite.stages import language_model

    chosen = config.override(language_model.LanguageModelConfig(), overrides or [])
    with stoppable():
        folder = run_dir or Path("runs/language-model")
        finish(language_model.train_language_model(chosen, folder, resume, device))


@command(train_app, "vision")
def train_vision(
    overrides: Overrides = None, run_dir: RunDir = None, resume: Resume = False, device: Device = None
) -> None:
    """Train the lite vision model for REPA, and probe its features for shape and colour."""
    import json

    from nitro_e_lite import config
    from nitro_e_lite.stages import vision

    chosen = config.override(vision.VisionConfig(), overrides or [])
    with stoppable():
        final = vision.train_vision(chosen, run_dir or Path("runs/vision"), resume, device)
        found = json.loads((final / "probe.json").read_text(encoding="utf-8"))
        rows = [[name, f"{row['shape']:.3f}", f"{row['color']:.3f}"] for name, row in found.items()]
        show_table("linear probe of single patches, held-out scenes", ["features", "shape", "color"], rows)
        finish(final)


@command(train_app, "judge")
def train_judge(
    judge: Annotated[str, typer.Argument(help="preference, which rewards, or reader, which never does.")],
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    device: Device = None,
) -> None:
    """Train a small judge of pictures for stage 3; `RUN_DIR/metrics.jsonl` says how often it is right."""
    from nitro_e_lite import config
    from nitro_e_lite.stages import judges

    if judge not in judges.RECIPES:
        raise InvalidValue(f"judge={judge!r}: must be one of {', '.join(judges.RECIPES)}")
    chosen = config.override(judges.RECIPES[judge], overrides or [])
    with stoppable():
        finish(judges.train_judge(chosen, run_dir or Path("runs") / judge, resume, device))


def transformer_run(stage, preset, overrides, also=()):
    """The configuration of a run of stages 1 or 2, which compare, overfit and plan are about, or of one in `also`."""
    from nitro_e_lite import config, presets

    if stage not in (known := (*config.STAGES, *also)):
        raise InvalidValue(f"stage={stage!r}: must be one of {', '.join(known)} here")
    return config.override(presets.preset(stage, preset), overrides or [])


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of "0,1,2"."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InvalidValue(f"{name}={text!r}: must be whole numbers with commas between, like 0,1,2") from None


@command(app, "compare")
def compare_command(
    variant: Annotated[list[str], typer.Option(help="'name: field=value field=value'; may be given several times.")],
    points: Annotated[str, typer.Option(help="Steps after which every run is measured.")] = "100,200,400",
    seeds: Annotated[str, typer.Option(help="Seeds; each variant is trained with each.")] = "0,1,2",
    prompts: Annotated[int, typer.Option(help="GenEval-lite prompts of each category drawn at each point.")] = 10,
    pairs: Annotated[
        int, typer.Option(help="Minimal pairs of each fact whose captions are exchanged; 0 or >= 2; not for rewards.")
    ] = 0,
    stage: Annotated[str, typer.Option(help="base, finetune or rewards.")] = "base",
    preset: Preset = "lite",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train variants of a stage on the same batches, over several seeds, and measure them along the way."""
    with output(json) as result:
        from nitro_e_lite.experiments import compare
        from nitro_e_lite.inference.arguments import as_integer
        from nitro_e_lite.scenes import geneval

        chosen = transformer_run(stage, preset, overrides, also=("rewards",))
        variants = dict(compare.read_variant(text) for text in variant)
        if len(variants) < len(variant):
            raise InvalidValue(f"variant: {len(variant)} variants with {len(variants)} names; give each its own")
        as_integer("prompts", prompts, 1 if stage == "rewards" else 0)
        as_integer("pairs", pairs, 2 if pairs else 0)
        steps, numbers = whole_numbers("points", points), whole_numbers("seeds", seeds)
        if stage == "rewards":
            chosen, drawn = dataclasses.replace(chosen, validation_prompts=prompts), []
        else:
            drawn = compare.spread_prompts(geneval.load_prompts(), prompts)
        folder = run_dir or Path("runs/comparison")
        result |= compare.compare(chosen, variants, numbers, steps, folder, drawn, device, pairs)
        if json:
            return
        rows = [[str(value) for value in row] for row in compare.summary(result)]
        columns = ["", "step", "seeds", "minutes", "validation loss", "shapes told", "GenEval-lite"]
        show_table("mean over seeds, 95 % interval", columns, rows)


@command(app, "overfit")
def overfit_command(
    stage: Annotated[str, typer.Option(help="base or finetune.")] = "base",
    preset: Preset = "lite",
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="How many samples the one batch holds.")] = 8,
    steps: Annotated[int, typer.Option(help="How many steps to train on it.")] = 60,
    device: Device = None,
    json: Json = False,
) -> None:
    """Learn one small batch by heart with the settings of a run, before it may take days. Fails when that fails."""
    with output(json) as result:
        from nitro_e_lite.experiments.overfit import overfit

        chosen = transformer_run(stage, preset, overrides)
        result |= overfit(chosen, samples, steps, device)
        if not json:
            marks = sorted({round(k * steps / 6) for k in range(7)})
            left = ["not finite" if x is None else f"{x:.1%}" for x in (result["left"][k] for k in marks)]
            rows = [[str(k), share] for k, share in zip(marks, left, strict=True)]
            show_table(f"{samples} samples by heart", ["after steps", "of the variance left"], rows)
            console.print(f"Spread of the latents {result['spread']:.2f}, steps skipped {result['skipped']}.")
            goal = f"{result['goal']:.0%} after {steps} steps"
            console.print(f"Passed: below {goal}." if result["ok"] else f"Failed: must be below {goal}, none skipped.")
    if not result["ok"]:
        raise typer.Exit(1)


@command(app, "reproduce")
def reproduce_command(
    preset: Annotated[str, typer.Option(help="lite: hours on a laptop; smoke: the same chain in minutes.")] = "lite",
    run_dir: RunDir = None,
    seed: int = 0,
    processes: Processes = 1,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Also write a result card to this file.")] = None,
    json: Json = False,
) -> None:
    """Make a lite model from nothing: encoders, all stages, evaluation. Continues where it stopped."""
    with output(json) as result:
        from nitro_e_lite.evaluation import cards
        from nitro_e_lite.experiments.reproduce import Chain
        from nitro_e_lite.runtime import RunStopped

        if out is not None:
            check_output(out, "file")
        folder = run_dir or Path("runs") / f"reproduce-{preset}"
        chain = Chain(preset, folder, seed, processes, overrides or [], say=lambda line: typer.echo(line, err=True))
        try:
            for step, seconds in chain.run():
                took = "was there" if seconds is None else f"{seconds:,.1f} s"
                console.print(f"{step.name}: {took}, {folder / step.result}", markup=False, soft_wrap=True)
        except RunStopped:
            raise Unusable("Stopped and saved. The same command goes on from here.") from None
        result |= chain.report
        rows = [[name, f"{cost['seconds'] / 60:,.1f}"] for name, cost in chain.report["steps"].items()]
        total = sum(cost["seconds"] for cost in chain.report["steps"].values())
        result["scores"] = scores = chain.scores()
        if not json:
            show_table("what it cost", ["", "minutes"], [*rows, ["in all", f"{total / 60:,.1f}"]])
            lines = [[r["name"], f"{r['minutes']:,.1f}", f"{r['overall']:.3f}"] for r in scores]
            show_table("what it came to", ["", "after minutes", "GenEval-lite"], lines)
        if out is not None:  # last, because it may fail: what it came to is told before
            card = {"rows": scores, "preset": preset, "machines": chain.machines()}
            cards.write(out, "chain", card, cards.command_line(sys.argv[1:]))


@command(app, "plan")
def plan_command(
    preset: Preset = "full",
    stage: Annotated[
        str, typer.Option(help="base, finetune, 1024px, rewards, or distill (and the drawing of its pictures).")
    ] = "base",
    hardware: Annotated[
        str, typer.Option(help="mi250, mi300x, mi325x, mi355x, h100, h200, a100, rtx4090, cpu.")
    ] = "mi300x",
    devices: Annotated[int, typer.Option(help="How many devices.")] = 8,
    mfu: Annotated[
        float | None,
        typer.Option(help="Model FLOPs utilisation; by default several stated values, for stages 3 and 4 one."),
    ] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Peak of one device, instead of the data sheet's.")] = None,
    pictures: Annotated[
        int | None,
        typer.Option(help="Pictures in the data set; when not given those in its folders, or the published number."),
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say what a training stage needs, before it is started: memory, hours, disk; nothing is trained."""
    if stage == "rewards" and pictures is not None:
        raise InvalidValue("pictures: the model draws them while it learns; set steps or batch_size")
    if stage in ("distill", "rewards"):
        more = {"pictures": pictures} if stage == "distill" else {}
        return plan_other_stage(stage, preset, hardware, devices, mfu, peak_tflops, overrides, json, **more)
    with output(json) as result:
        import dataclasses

        from nitro_e_lite.experiments import plan
        from nitro_e_lite.model.flops import HARDWARE

        chosen = transformer_run(stage, preset, overrides)
        found = plan.plan(chosen, hardware, devices, mfu, peak_tflops, pictures)
        result |= {"stage": stage, "preset": preset, "hardware": hardware, "devices": devices}
        result |= dataclasses.asdict(found) | {"published_mfu": plan.published_mfu()}
        asked = [] if mfu is None else [plan.Utilisation(mfu, "asked for", "--mfu")]
        outlooks = plan.outlook(chosen, found, devices, asked)
        result["outlook"] = [dataclasses.asdict(one) for one in outlooks]
        result["checkpoint"] = {"bytes": plan.checkpoint_bytes(chosen), "hours": plan.checkpoint_hours(chosen)}
        result["drawing_days"] = plan.drawing_days(chosen, devices, found.peak)
        if json:
            return
        rows = [["parameters", f"{found.parameters:,}"], ["forward pass, TFLOP", f"{found.forward_flops / 1e12:.4f}"]]
        rows += [[f"encoder of {name}, TFLOP", f"{e.flops / 1e12:.4f}"] for name, e in found.encoders.items()]
        rows += [[f"memory: {name}, GB", f"{size / 1e9:.2f}"] for name, size in found.memory.items()]
        rows.append(["memory in all / of the device, GB", f"{found.needed / 1e9:.1f} / {found.capacity / 1e9:.0f}"])
        rows += [[f"disk: {name}, GB", f"{size / 1e9:,.1f}"] for name, size in found.disk.items()]
        if "vision" in found.disk:
            size = plan.SMALL_PICTURE * found.disk["latents"] / found.encoders["latents"].stored
            rows.append(["disk: or pictures for it to look at, GB", f"{size / 1e9:,.1f}"])
        show_table(f"{stage}/{preset} on {devices} x {hardware}", ["", ""], rows)
        show_outlook(stage, chosen, found, devices, outlooks)
        source, published = HARDWARE[hardware].source, plan.published_mfu()
        bounds = "; ".join(f"{way}: {value:.1%}" for way, value in published.items())
        typer.echo(f"Peak: {source}. MFU that the published 1.5 days on 8 MI300X imply, {bounds}.")
        if found.needed > found.capacity:
            typer.echo("It does not fit: set accumulate, or gradient_checkpointing=true (not modelled here).")


def show_outlook(stage, chosen, found, devices, outlooks) -> None:
    """A stage at a range of utilisations: hours of its steps and of what comes with them."""
    from nitro_e_lite.experiments import plan

    rows = [
        [f"{way}, {flops / 1e12:.3f} TFLOP a sample", *(f"{one.hours[way]:,.1f}" for one in outlooks)]
        for way, flops in found.sample_flops.items()
    ]
    for way, flops in found.sample_flops.items():
        speeds = [f"{devices * found.peak * one.mfu.share / flops:,.4g}" for one in outlooks]
        rows.append([f"samples/s, {way}", *speeds])
    rows += [
        [f"GB/s to read, {way}", *(f"{one.reading[way] / 1e9:.2f}" for one in outlooks)]
        for way in ("all stored", "latents stored")
    ]
    rows.append(["hours of validation", *(f"{one.validation:.2f}" for one in outlooks)])
    rows.append(["hours to encode all pictures once", *(f"{one.encoding:,.1f}" for one in outlooks)])
    columns = [f"{one.mfu.share:.1%} ({one.mfu.whose})" for one in outlooks]
    title = f"hours of {stage} at this share of {found.peak / 1e12:,.4g} TFLOP/s a device"
    show_table(title, ["", *columns], rows)
    for one in outlooks:
        typer.echo(f"{one.mfu.share:.1%}, {one.mfu.whose}: {one.mfu.why}.")
    size, hours = plan.checkpoint_bytes(chosen), plan.checkpoint_hours(chosen)
    typer.echo(
        f"Checkpoints: {size / 1e9:.3g} GB each, {hours:.2g} h in all at {plan.DISK / 1e9:g} GB/s (ours), "
        "unless they are written beside the training."
    )
    if days := plan.drawing_days(chosen, devices, found.peak):
        speed = f"{plan.DRAWN_PER_SECOND} pictures/s on an MI300X (published)"
        typer.echo(f"Drawing {plan.DRAWN} first: {days:.1f} days of these {devices} devices at {speed}.")
    size = sum(bytes_ for name, bytes_ in found.disk.items() if name != "latents")
    saved = found.sample_flops["latents stored"] / found.sample_flops["all stored"]
    typer.echo(f"Storing more than latents divides the arithmetic by {saved:.2f} and takes {size / 1e12:.3g} TB.")
    typer.echo("With nothing stored: a price to compare with; training reads latents, and computes text and vision.")


def plan_other_stage(stage, preset, hardware, devices, mfu, peak_tflops, overrides, json, **more) -> None:
    """The plan of stage 3, roll-outs, rewards, updates, or of stage 4: the teacher's pictures, and training on them."""
    with output(json) as result:
        import dataclasses

        from nitro_e_lite import config, presets
        from nitro_e_lite.experiments.plan_distill import plan_distill
        from nitro_e_lite.experiments.plan_rewards import plan_rewards

        chosen = config.override(presets.preset(stage, preset), overrides or [])
        plan = {"distill": plan_distill, "rewards": plan_rewards}[stage]
        found = plan(chosen, presets.preset("base", preset), hardware, devices, mfu, peak_tflops, **more)
        result |= {"stage": stage, "preset": preset, "hardware": hardware, "devices": devices}
        result |= dataclasses.asdict(found)
        if json:
            return
        hours = [[f"hours: {name}", f"{value:,.2f}"] for name, value in found.hours.items()]
        rows = [["pictures", f"{found.pictures:,}"]]
        if stage == "distill":
            rows += [["a picture, TFLOP", f"{found.picture_flops / 1e12:.4f}"]]
            rows += [[f"a sample of {name}, TFLOP", f"{x / 1e12:.4f}"] for name, x in found.sample_flops.items()]
            rows += hours + [[f"disk: {name}, GB", f"{size / 1e9:,.3f}"] for name, size in found.disk.items()]
        else:
            rows += [["roll-outs", f"{found.iterations:,}"], *hours]
            rows += [["a reward judges, pictures/s, in a tenth of that", f"{found.judged_per_second:,.1f}"]]
        show_table(f"{stage}/{preset} on {devices} x {hardware}, at {found.mfu:.1%} of its peak", ["", ""], rows)


def finish(final: Path) -> None:
    """Prints where the weights of a finished run are."""
    console.print(f"Weights: {final}", markup=False, soft_wrap=True)


@command(app, "ship")
def ship(
    source: Annotated[Path, typer.Argument(help="A finished training run.")],
    name: Annotated[str, typer.Option(help="Shipped weights, or a folder with encoders.")] = "lite",
    steps: Annotated[int | None, typer.Option(help="Sampler steps when a call names none; 20 when not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance likewise; the run's own when not given.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift likewise; the run's own when not given.")] = None,
) -> None:
    """Put a trained transformer into the package (or a folder), in float16 and with fresh checksums."""
    from nitro_e_lite.experiments import ship
    from nitro_e_lite.files import STUDENTS

    if name in STUDENTS:
        for field, value in {"steps": steps, "guidance": guidance, "shift": shift}.items():
            if value is not None:
                raise InvalidValue(f"{field}: a student draws as it was trained to; leave it out")
        return finish(ship.ship_student(source, name))
    finish(ship.ship(source, name, steps=20 if steps is None else steps, guidance=guidance, shift=shift))
