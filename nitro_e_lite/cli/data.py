"""The commands for training data: `nitro-e data encode`, `draw`, `check` and `benchmark`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite.cli.terminal import (
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    Shift,
    Steps,
    command,
    console,
    errors,
    output,
    show_table,
)
from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.files import check_output

app = typer.Typer(help="Training data: encode, check, measure.", no_args_is_help=True)

Encoders = Annotated[str, typer.Option(help="Shipped name, folder, or full: DC-AE f32c32 and Llama-3.2-1B.")]


def local_device(name: str | None) -> str:
    """The device of this process: under torchrun each takes its own GPU."""
    import torch

    from nitro_e_lite.runtime import pick_device

    device = pick_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return str(device)


@command(app, "encode")
def encode(
    kind: Annotated[str, typer.Argument(help="sa1b, journeydb, fluxdb or folder.")],
    path: Annotated[Path, typer.Argument(help="The raw data; a file of prompts for fluxdb.")],
    out: Annotated[Path, typer.Argument(help="Folder of the data set; an unfinished one is continued.")],
    encoders: Encoders = "lite",
    size: Annotated[int | None, typer.Option(help="Pixels a side; by default what gives 16x16 latents.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Store text features too.")] = False,
    vision: Annotated[
        str | None, typer.Option(help="Store features of this vision model too; folder or hub id.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(help="Store pictures of this side in pixels for REPA to look at; DINOv2 takes 224.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="sa1b: folder of the caption files.")] = None,
    generator: Annotated[
        str | None, typer.Option(help="fluxdb: the pipeline that draws; FLUX.1-dev by default.")
    ] = None,
    draw: Annotated[list[str] | None, typer.Option(help="fluxdb: argument=value for the call of the pipeline.")] = None,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 32,
    shard_rows: Annotated[
        int, typer.Option(help="Rows in one shard at most; a tar file, or 2,000 lines of a list, end one too.")
    ] = 10_000,
    threads: Annotated[
        int | None, typer.Option(help="Threads that decode pictures; by default this process's share of the cores.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Encode raw pictures and captions into shards; run it again to continue, under torchrun to share the work."""
    with output(json) as result:
        from nitro_e_lite import config, runtime
        from nitro_e_lite.data import precompute
        from nitro_e_lite.inference.encoders import load_encoders
        from nitro_e_lite.inference.vision import load_vision

        rank, world = runtime.rank_and_world()
        check_output(out, "folder")
        if threads is None:
            threads = max(1, runtime.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        device = local_device(device)
        if encoders == "full" and device == "cpu":
            errors.print("Warning: the full encoders run on the CPU here, which is slow.")
        number_type = runtime.pick_dtype(dtype, runtime.pick_device(device))
        if kind == "fluxdb":
            pairs = [pair.partition("=") for pair in draw or []]
            if bad := [name for name, sign, _ in pairs if not (name and sign)]:
                raise InvalidValue(f"draw={bad[0]!r}: must read argument=value")
            settings = {name: config.read_value(name, value) for name, _, value in pairs}
            chosen = generator or precompute.GENERATOR
            options = {"settings": settings, "device": device, "dtype": number_type, "batch": batch, "size": size}
            source = precompute.drawn_source(path, chosen, **options)
        else:
            for name, value in (("generator", generator), ("draw", draw)):
                if value:
                    raise InvalidValue(f"{name}: {kind} has pictures of its own; only fluxdb is drawn")
            source = precompute.open_source(kind, path, captions)
        if out.resolve() == path.resolve():
            raise InvalidValue(f"out={out}: is the folder of the raw data; name another")
        models = load_encoders(encoders, device, number_type)
        eyes = load_vision(vision, device, number_type) if vision else None
        options = {"size": size, "pictures": pictures, "batch": batch, "shard_rows": shard_rows, "threads": threads}
        encoding = precompute.Encoding(source, models, out, text=text, vision=eyes, rank=rank, world=world, **options)
        result |= {"out": str(out), "rank": rank, "world": world} | encoding.run()
        if not json:
            line = f"Process {rank} of {world}: {result['rows']:,} rows in {result['seconds']:.1f} s, "
            line += f"{result['rows_per_second']:,.1f} a second on {device}"
            if result["skipped"]:
                line += f"; {result['skipped']:,} items gave no row, `nitro-e data check {out}` says why"
            console.print(line, markup=False, soft_wrap=True)


@command(app, "draw")
def draw(
    out: Annotated[Path, typer.Argument(help="Folder of the data set; an unfinished one is continued.")],
    count: Annotated[
        int | None,
        typer.Option(help="How many pictures: of a file's first prompts (default: all), or of the grammar (10,000)."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts (.txt, .jsonl, .parquet) in place of the grammar.")
    ] = None,
    model: Model = "lite",
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    student_steps: Annotated[int, typer.Option(help="Steps of the student, whose states on the way are kept.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of scenes and noise.")] = 0,
    text: Annotated[bool, typer.Option("--text", help="Store text features too.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 50,
    shard_rows: Annotated[int, typer.Option(help="Pictures in one shard.")] = 500,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Let a teacher draw what a student of few steps learns from; continues and shares the work as `encode` does."""
    with output(json) as result:
        from nitro_e_lite.data import drawn, sources
        from nitro_e_lite.inference.arguments import as_integer
        from nitro_e_lite.inference.loading import load_pipeline
        from nitro_e_lite.runtime import rank_and_world

        (rank, world), count = rank_and_world(), None if count is None else as_integer("count", count, 1, 10**9)
        check_output(out, "folder")
        if prompts is None:
            chosen = drawn.GrammarPrompts(seed, count or 10_000)
        else:
            chosen = sources.read_prompts(prompts)
            if count is not None and len(chosen) < count:
                raise InvalidValue(f"count={count}: {prompts} holds {len(chosen):,} prompts")
            chosen = chosen if count is None else chosen[:count]
        teacher = load_pipeline(model, local_device(device), dtype)
        options = {"steps": steps, "guidance": guidance, "shift": shift, "student_steps": student_steps, "seed": seed}
        options |= {"text": text, "batch": batch, "shard_rows": shard_rows}
        drawing = drawn.Drawing(teacher, chosen, out, rank=rank, world=world, **options)
        result |= {"out": str(out), "rank": rank, "world": world} | drawing.run()
        if not json:
            line = f"Process {rank} of {world}: {result['rows']:,} pictures in {result['seconds']:.1f} s, "
            line += f"{result['rows_per_second']:,.2f} a second"
            line += f"; {result['skipped']:,} prompts gave none" if result["skipped"] else ""
            console.print(line, markup=False, soft_wrap=True)


@command(app, "check")
def check(
    folder: Annotated[Path, typer.Argument(help="A data set.")],
    max_repeated: Annotated[float, typer.Option(help="Share of repeated pictures that is still accepted.")] = 0.01,
    json: Json = False,
) -> None:
    """Read every byte of a data set: checksums, numbers, captions, repetitions; exit code 1 when something is wrong."""
    with output(json) as result:
        from nitro_e_lite.data import check

        result |= check.check(folder, max_repeated)
        if not json:
            facts = {name: result[name] for name in ("rows", "captions", "repeated_pictures", "repeated_captions")}
            facts |= {f"from {name or 'no named source'}": count for name, count in result["sources"].items()}
            facts |= {f"shards {name}": count for name, count in result["shards"].items()}
            facts |= {f"parts {name}": count for name, count in (result["parts"] or {}).items()}
            facts |= {f"no row: {reason}": count for reason, count in result["skipped"].items()}
            facts |= result["notes"]
            show_table(str(folder), ["", "count"], [[name.replace("_", " "), f"{n:,}"] for name, n in facts.items()])
            numbers = enumerate(zip(result["latent_mean"], result["latent_std"], strict=True))
            rows = [[str(k), f"{mean:.3f}", f"{spread:.3f}"] for k, (mean, spread) in numbers]
            show_table("Latents, expected 0 and 1", ["channel", "mean", "std"], rows)
            for problem in result["problems"]:
                errors.print(f"Wrong: {problem}", style="red", markup=False, soft_wrap=True)
            if result["skipped"]:
                console.print(f"{folder / check.SKIPPED} names what gave no row.", markup=False, soft_wrap=True)
            if result["ok"]:
                console.print("Nothing is wrong.")
    if not result["ok"]:
        raise typer.Exit(1)


@command(app, "benchmark")
def benchmark(
    folder: Annotated[
        Path | None, typer.Option(help="A folder on the disk to measure; by default where temporary files go.")
    ] = None,
    jpegs: Annotated[Path | None, typer.Option(help="Folder of pictures to decode, instead of made-up ones.")] = None,
    batch: Annotated[int, typer.Option(help="Rows read at once.")] = 256,
    seconds: Annotated[float, typer.Option(help="How long each speed is measured.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Also write a result card to this file.")] = None,
    json: Json = False,
) -> None:
    """Measure how fast rows of the full model's shapes are read, cold and warm, and how fast pictures are decoded."""
    with output(json) as result:
        from nitro_e_lite import runtime
        from nitro_e_lite.data import check
        from nitro_e_lite.evaluation import cards
        from nitro_e_lite.experiments import plan

        if out is not None:
            check_output(out, "file")
        if folder is not None and not folder.is_dir():
            raise MissingFile(f"folder={str(folder)!r}: is no folder")
        sets = (("latents",), ("latents", "pictures"), ("latents", "text"), ("latents", "text", "vision"))
        options = {"batch": batch, "seconds": seconds, "folder": folder}
        check.check_room(sets[-1], batch, folder)  # the largest, before the first is measured
        result["rows"] = [check.measure_reading(columns, **options) for columns in sets]
        result["decoding"] = found = check.measure_decoding(jpegs, seconds)
        needed = zip(plan.stated_mfus(), plan.pictures_encoded(), strict=True)
        found["needed"] = [
            {"share": mfu.share, "whose": mfu.whose, "pictures_per_second": round(speed)} for mfu, speed in needed
        ]
        for one in found["needed"]:
            one["cores"] = round(one["pictures_per_second"] / found["pictures_per_second_per_core"], 1)
        result["environment"] = runtime.environment_report()
        if not json:
            process = result["rows"][0]["needed_samples_per_second_per_process"]
            show_table(
                f"Samples a second of one process; the full run needs {process:,} of each of eight",
                ["columns", "KB each", "cold", "disk, end to end", "cold / disk", "warm, a core", "GB/s of the node"],
                [
                    [
                        " + ".join(row["columns"]),
                        f"{row['bytes_per_sample'] / 1e3:,.1f}",
                        f"{row['samples_per_second_cold']:,.0f}",
                        f"{row['samples_per_second_of_the_disk']:,.0f}",
                        f"{row['cold_share_of_the_disk']:.0%}",
                        f"{row['samples_per_second_per_core']:,.0f}",
                        f"{row['gigabytes_per_second']:.2f}",
                    ]
                    for row in result["rows"]
                ],
            )
            line = f"Decoding JPEGs ({found['source']}, {found['bytes_per_picture'] / 1e3:,.0f} KB each) to 512 px: "
            line += f"{found['pictures_per_second_per_core']:,.1f} pictures/s a core. {plan.PUBLISHED_DEVICES} x "
            line += f"{plan.PUBLISHED_HARDWARE} encode, at this share of their peak, as many as these cores decode: "
            line += "; ".join(
                f"{one['share']:.1%} ({one['whose']}) {one['pictures_per_second']:,}/s, {one['cores']:,.0f} cores"
                for one in found["needed"]
            )
            console.print(f"{line}.", markup=False, soft_wrap=True)
    if out is not None:  # last, because it may fail: the speeds are told before
        cards.write(out, "reading", result, cards.command_line(sys.argv[1:]))
