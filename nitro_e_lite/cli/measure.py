"""The commands that look at a model or a machine: `nitro-e count`, `benchmark`, `geneval`, ..."""

import contextlib
import dataclasses
import io
import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite.cli.terminal import (
    Device,
    Dtype,
    Guidance,
    Json,
    Lora,
    Model,
    Shift,
    Steps,
    TextEncoder,
    Vae,
    Variant,
    command,
    console,
    errors,
    output,
    say,
    settings,
    show_table,
)
from nitro_e_lite.errors import InvalidValue, Unusable
from nitro_e_lite.files import check_output

MAX_SEEDS = 10_000
FID_PICTURES = 2048  # as many as the features have numbers

app = typer.Typer()
reward_app = typer.Typer(help="Judges that other programs can ask.", no_args_is_help=True)
app.add_typer(reward_app, name="reward")


@command(app, "count")
def count(
    size: Annotated[str, typer.Option(help="full (the published model), lite or smoke.")] = "full",
    batch: int = 1,
    text_tokens: Annotated[int | None, typer.Option(help="128 for full, 32 for the others.")] = None,
    json: Json = False,
) -> None:
    """Count the transformer's parameters and the FLOPs of one forward pass, without running it."""
    with output(json) as result:
        from nitro_e_lite.model.flops import build_on_meta, count_flops, count_parameters, model_config
        from nitro_e_lite.model.tokens import text_length

        config = model_config(size)
        tokens = text_length(size) if text_tokens is None else text_tokens
        flops = count_flops(config, batch, tokens)
        parameters = count_parameters(build_on_meta(config))
        result |= {
            "size": size,
            "batch": batch,
            "text_tokens": tokens,
            "parameters": sum(parameters.values()),
        }
        result |= {"tflops": flops.weights / 1e12, "tflops_attention_products": flops.attention / 1e12}
        result["parts"] = {
            part: {"parameters": n, "tflops": flops.components.get(part, 0) / 1e12} for part, n in parameters.items()
        }
        if not json:
            rows = [[k, f"{v['parameters']:,}", f"{v['tflops']:.5f}"] for k, v in result["parts"].items()]
            rows.append(["total", f"{result['parameters']:,}", f"{sum(flops.components.values()) / 1e12:.5f}"])
            show_table(f"{size} model, batch {batch}, {tokens} text tokens", ["", "parameters", "TFLOPs"], rows)
            console.print(
                f"{flops.weights / 1e12:.4f} TFLOPs are products with weights, counted as for the published model; "
                f"{flops.attention / 1e12:.4f} more are products inside attention. A multiply-add is two FLOPs.",
                soft_wrap=True,
            )


@command(app, "benchmark")
def benchmark_command(
    model: Model = "lite",
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    batch: Annotated[list[int] | None, typer.Option(help="Pictures drawn at once; may be given several times.")] = None,
    repeats: int = 3,
    transformer: Annotated[
        str | None, typer.Option(help="Time a transformer with random weights instead: full, lite or smoke.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Transformer in FP8, as far as the device can.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time E-MMDiT, Sana-0.6B, PixArt-alpha and SD3 with random weights.")
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL@STEPS[@GUIDANCE], may be given several times: timed in turn with the model, as ratios to it."
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the denoising step, or the peers.")] = False,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Measure what waits for an accelerator; none begins after eight minutes; cards go to --out.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="With --peers or --beside: also write a result card to this file; with --gpu: a folder of cards."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Time whole pictures and their parts, one pass of the transformer, or the models of Table 2 side by side."""
    if compiled and (transformer or beside):
        raise InvalidValue("compile: belongs to --peers, or to one whole model")
    if gpu:
        others = (peers, beside, transformer, compiled, fp8, batch, steps, guidance, shift, dtype, model != "lite")
        if out is None or any(one not in (None, False, []) for one in others):
            raise InvalidValue("gpu: measures all there is and needs --out FOLDER; only --repeats and --device fit it")
        return benchmark_gpu(repeats, out, device, json)
    if out and not (peers or beside):
        raise InvalidValue("out: belongs to --peers, --beside and --gpu")
    if beside and (peers or transformer):
        raise InvalidValue("beside: whole models are timed; it goes without --peers and --transformer")
    own = {"model": None if model == "lite" else model, "steps": steps, "guidance": guidance, "shift": shift}
    own |= {"fp8": fp8 or None if transformer else None, "transformer": transformer if peers else None}
    own |= {"dtype": dtype if peers and fp8 else None}
    of_their_own = (
        "peers are timed as Table 2 has them" if peers else "a transformer alone, with random weights, has none"
    )
    for name, value in own.items():
        if value is not None and (peers or transformer):
            raise InvalidValue(f"{name}={value}: {of_their_own}")
    if peers:
        if fp8:
            return benchmark_fp8(batch or [1], repeats, compiled, out, device, json)
        return benchmark_peers(batch or [1], repeats, compiled, out, device, dtype, json)
    if beside:
        sampler = {"steps": steps, "guidance": guidance, "shift": shift}
        return benchmark_side_by_side(model, sampler, beside, fp8, batch or [25], repeats, out, device, dtype, json)
    with output(json) as result:
        from nitro_e_lite import load_pipeline, runtime
        from nitro_e_lite.evaluation import benchmark
        from nitro_e_lite.model.flops import model_config

        batches = batch or ([4] if transformer else [1, 8])
        if transformer:
            config = model_config(transformer)
            rows = [
                {"batch": b} | benchmark.time_transformer(config, b, device=device, dtype=dtype, repeats=repeats)
                for b in batches
            ]
        else:
            pipeline = load_pipeline(model, device, dtype, quantization="fp8" if fp8 else None)
            pipeline.set_progress_bar_config(disable=True)
            if compiled:
                pipeline.compile()
            sampler = pipeline.sampler(steps, guidance, shift)
            result |= settings(pipeline, model, sampler) | {"compiled": compiled}
            rows = benchmark.time_pipeline(pipeline, sampler, batches, repeats)
        result |= {"rows": rows, "repeats": repeats, "environment": runtime.environment_report()}
        if not json:
            names = [name.replace("_", " ") for name in rows[0]]
            show_table(f"median of {repeats}", names, [[f"{v:.4g}" for v in row.values()] for row in rows])


def benchmark_gpu(repeats, out, device, json) -> None:
    """`nitro-e benchmark --gpu`: what README and the ledger lack of accelerators, a card after each measurement."""
    with output(json) as result:
        from nitro_e_lite import runtime
        from nitro_e_lite.evaluation import cards, gpu_cells

        check_output(out, "folder")
        place, command = runtime.pick_device(device), cards.command_line(sys.argv[1:])
        if place.type == "cpu" and device != "cpu":
            raise Unusable("gpu: there is no accelerator here; the cells of a CPU have commands of their own")
        cells = gpu_cells.Cells(out, place, repeats=repeats, command=command)
        result["cells"], before = [], cells.rows
        for line in gpu_cells.measure(cells):
            result["cells"].append(line)
            say(line, "yellow" if ": failed" in line else "green")
        result["cards"] = sorted(cells.written)
        if cells.rows == before and any(": failed" in line for line in result["cells"]):
            raise Unusable("gpu: no cell could be measured, see above")
        if not json:
            console.print(f"cards in {out}: {len(cells.written)}", soft_wrap=True)


def benchmark_peers(batches, repeats, compiled, out, device, dtype, json) -> None:
    """`nitro-e benchmark --peers`: seconds by parts, ratios to Sana-0.6B, share of the device's peak."""
    with output(json) as result:
        from nitro_e_lite import runtime
        from nitro_e_lite.evaluation import cards, peers

        if out is not None:
            check_output(out, "file")
        result |= {"rows": [], "ratios": {}, "repeats": repeats, "compiled": compiled}
        result |= {"environment": runtime.environment_report()}
        for batch in batches:
            rows = []
            for row in peers.time_peers(peers.load_peers(), batch, device, dtype, repeats, compiled):
                rows.append(row)
                say(f"{row['name']}, batch {batch}: {row['in_all']:.4g} s in all", "green")
            found = result["ratios"][str(batch)] = peers.ratios(rows)
            result["rows"] += rows
            if json:
                continue
            columns = ["", "steps", "text", "a pass", "decoder", "in all", "img/s", "end to end", "transformer", "peak"]
            lines = [
                [row["name"], str(row["steps"])]
                + [f"{row[part]:.4g}" for part in ("text", "pass", "decoder", "in_all", "images_per_second")]
                + [f"{found[row['key']][kind]:.2f}x" for kind in ("end_to_end", "transformer")]
                + [f"{row['peak_share']:.0%}" if row["peak_share"] else "-"]
                for row in rows
            ]
            title = f"seconds a batch of {batch}, random weights, median of {repeats}; x: times Sana-0.6B's speed"
            show_table(title, columns, lines)
    if out is not None:
        cards.write(out, "peers", result, cards.command_line(sys.argv[1:]))


def benchmark_fp8(batches, repeats, compiled, out, device, json) -> None:
    """`nitro-e benchmark --peers --fp8`: E-MMDiT and SD3.5 at its real size, bfloat16 beside FP8."""
    with output(json) as result:
        from nitro_e_lite import runtime
        from nitro_e_lite.evaluation import cards, peers

        if out is not None:
            check_output(out, "file")
        known = peers.load_peers()
        rows = [row for batch in batches for row in peers.time_fp8(known, batch, device, repeats, compiled)]
        result |= {"rows": rows, "repeats": repeats, "environment": runtime.environment_report()}
        if not json:
            lines = [
                [row["name"], str(row["batch"]), row["rung"]]
                + [f"{row[name]:.4g}" for name in ("pass", "pass_fp8", "ratio", "bytes")]
                for row in rows
            ]
            title = f"seconds of a pass, random weights, median of {repeats}"
            show_table(title, ["", "batch", "rung", "bf16", "FP8", "times as fast", "of its bytes"], lines)
    if out is not None:
        cards.write(out, "fp8_speed", result, cards.command_line(sys.argv[1:]))


def benchmark_side_by_side(model, sampler, beside, fp8, batches, repeats, out, device, dtype, json) -> None:
    """`nitro-e benchmark --beside`: models that take turns, from captions to PNG; with `--fp8` each also in FP8."""
    with output(json) as result:
        from nitro_e_lite import load_pipeline, runtime
        from nitro_e_lite.course.demo_protocol import parse_lane
        from nitro_e_lite.evaluation import benchmark, cards, tables

        if out is not None:
            check_output(out, "file")
        lanes = [(model, sampler)]
        for lane in map(parse_lane, beside):
            lanes.append((lane.model, {"steps": lane.steps, "guidance": lane.guidance}))
        models, about = [], []
        for (name, asked), quantization in itertools.product(lanes, (None, "fp8") if fp8 else (None,)):
            pipeline = load_pipeline(name, device, dtype, quantization=quantization)
            pipeline.set_progress_bar_config(disable=True)
            models.append((pipeline, pipeline.sampler(**asked)))
            about.append(settings(pipeline, name, models[-1][1]))
        rows = []
        for pipeline, _ in models:
            for number in batches:
                benchmark.check_room(pipeline, number)
        for number in batches:
            timed = benchmark.time_side_by_side(models, number, repeats)
            rows += [known | row for known, row in zip(about, timed, strict=True)]
        result |= {"rows": rows, "repeats": repeats, "environment": runtime.environment_report()}
        if not json:
            lines = [
                [tables.label(row) + f", guidance {row['guidance']:g}", str(row["batch"])]
                + [f"{row['seconds']:.4g}", f"{row['images_per_second']:.4g}"]
                + ["{:.2f}x ({:.2f} to {:.2f})".format(*row["ratio"])]
                for row in rows
            ]
            title = f"caption to PNG, in turn, {repeats} rounds; x: times the first one's speed, 95 % interval"
            show_table(title, ["", "batch", "seconds", "img/s", "ratio"], lines)
    if out is not None:
        cards.write(out, "speed", result, cards.command_line(sys.argv[1:]))


@command(app, "sensitivity")
def sensitivity(
    model: Model = "lite",
    pairs: Annotated[int, typer.Option(help="Minimal pairs for each fact.")] = 32,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure how much the loss rises when one fact of a caption is wrong: whether the model reads it at all."""
    with output(json) as result:
        from dataclasses import asdict

        from nitro_e_lite import load_pipeline
        from nitro_e_lite.evaluation.sensitivity import TIMES, caption_sensitivity

        readings = caption_sensitivity(load_pipeline(model, device, dtype), pairs)
        result |= {"model": model, "pairs": pairs, "readings": [asdict(one) for one in readings]}
        if not json:
            facts = {one.fact: f"{one.text:.3f}" for one in readings}
            rows = [
                [fact, change, *(f"{r.rise:+.4f} ± {r.margin:.4f}" for r in readings if r.fact == fact)]
                for fact, change in facts.items()
            ]
            title = f"Change of the text and rise of the loss (95 % interval) with a wrong fact; {pairs} pairs each"
            show_table(title, ["wrong", "text", *(f"t = {t:g}" for t in TIMES)], rows)


@command(app, "export")
def export_command(
    tool: Annotated[str, typer.Argument(help="geneval, dpg, hpsv2, image_reward or fid.")],
    prompts: Annotated[Path, typer.Argument(help="The tool's own prompts; see the notes on official tools.")],
    folder: Annotated[Path, typer.Argument(help="Where the pictures go; nothing else may lie there.")],
    model: Model = "lite",
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    size: Annotated[int | None, typer.Option(help="Side of each picture in pixels; as drawn when not given.")] = None,
    resize: Annotated[str, typer.Option(help="How it is resized to --size: bicubic or lanczos.")] = "none",
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 16,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    lora: Lora = None,
    variant: Variant = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Draw the pictures that GenEval, DPG-Bench, HPSv2.1, ImageReward or a FID tool reads; continues after a stop."""
    with output(json) as result:
        from nitro_e_lite import load_pipeline
        from nitro_e_lite.evaluation import official_tools
        from nitro_e_lite.inference.arguments import as_integer

        wanted = official_tools.targets(tool, prompts)
        as_integer("batch", batch, 1)
        check_output(folder, "folder")
        pipeline = load_pipeline(model, device, dtype, text_encoder=text_encoder, vae=vae, lora=lora, variant=variant)
        sampler = pipeline.sampler(steps, guidance, shift)
        files = official_tools.export(pipeline, tool, wanted, folder, sampler, size, resize, batch)
        result |= settings(pipeline, model, sampler) | {"tool": tool, "files": files}
        if not json:
            console.print(f"{files} files for {tool} in {folder}", soft_wrap=True)


@command(app, "scores")
def scores(
    tool: Annotated[str, typer.Argument(help="geneval, dpg, hpsv2, image_reward or fid.")],
    printed: Annotated[Path, typer.Argument(help="What the tool wrote or printed.")],
    prompts: Annotated[Path, typer.Argument(help="The prompts that the pictures were drawn from.")],
    folder: Annotated[Path, typer.Argument(help="The folder of the pictures.")],
    out: Annotated[Path | None, typer.Option(help="Also write a result card to this file.")] = None,
    json: Json = False,
) -> None:
    """Read the output of an official tool, count it, and make a result card of it."""
    with output(json) as result:
        from nitro_e_lite.evaluation import cards, official_tools

        if out is not None:
            check_output(out, "file")
        wanted = official_tools.targets(tool, prompts)
        found = official_tools.read_scores(tool, printed, wanted, folder)
        result |= official_tools.make_card(tool, wanted, found, folder)
        whole = cards.PICTURES.get(tool, 0)
        if found["images"] < whole:
            errors.print(f"Warning: {found['images']:,} pictures; {tool} has {whole:,}, and only they make its score.")
        if tool == "fid" and found["images"] < FID_PICTURES:
            errors.print(f"Warning: below {FID_PICTURES:,} pictures the covariance is singular; it says little.")
        if not json:
            rows = [[name, f"{value:.4f}"] for name, value in found.get("categories", {}).items()]
            show_table(f"{tool}, {found['images']} pictures", ["", ""], [*rows, ["overall", f"{found['overall']:.4f}"]])
    if out is not None:  # last, because it may fail: the score is told before
        cards.write(out, tool, result, cards.command_line(["scores", tool]))


@command(app, "tables")
def tables_command(
    recount: Annotated[bool, typer.Option("--count", help="Count parameters, FLOPs and bytes again first.")] = False,
    json: Json = False,
) -> None:
    """Build README's results table and the figure beside it from the result cards, and print Table 2."""
    with output(json) as result:
        from nitro_e_lite import files
        from nitro_e_lite.evaluation import cards, tables

        root = files.repo_root()
        if root is None:
            raise Unusable("README.md: only a checkout of the repository has it; clone it and install with -e")
        readme = root / "README.md"
        before = files.read_text(readme)
        if recount:
            from nitro_e_lite.experiments.plan import published_mfu

            check_output(cards.FOLDER / "counts.json", "file")
            tables.split(before)
            counts = tables.count_all() | {"mfu": published_mfu()}
            cards.write(cards.FOLDER / "counts.json", "counts", counts, "nitro-e tables --count")
        found = cards.load()
        after = tables.rebuild(before, found)
        if after != before:
            files.write_atomically(readme, after)
        figure = tables.save_figure(found)
        result |= {"cards": sorted(found), "readme_changed": after != before, "figure": figure.name}
        result |= {name: getattr(tables, name)(found).splitlines() for name in ("table2", "by_category")}
        if not json:
            print(tables.table2(found), tables.by_category(found), sep="\n\n")
            console.print(f"README.md {'rebuilt' if after != before else 'unchanged'}, {figure.name}", soft_wrap=True)


@command(reward_app, "serve")
def reward_serve(
    reward: Annotated[str, typer.Argument(help="geneval, partial, redness or preference.")] = "geneval",
    host: Annotated[str, typer.Option(help="Address it listens on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8901,
) -> None:
    """Serve a lite reward over HTTP until it is interrupted: the reference for servers of other judges."""
    from nitro_e_lite.course.demo_server import is_loopback
    from nitro_e_lite.evaluation.rewards import LITE_REWARDS, RewardServer

    if reward not in LITE_REWARDS:
        raise InvalidValue(f"reward={reward!r}: must be one of {', '.join(LITE_REWARDS)}")
    if not is_loopback(host):
        say(f"Warning: --host {host} lets everyone who reaches this machine ask; there is no password.", "yellow")
    try:
        server = RewardServer(LITE_REWARDS[reward](), host, port)
    except (OSError, OverflowError, TypeError, ValueError) as error:  # TypeError: a name that is none in DNS
        raise Unusable(
            f"host={host}, port={port}: cannot listen there ({getattr(error, 'strerror', None) or error})"
        ) from None
    with server:
        print(f"{reward} at {server.url}", flush=True)  # at once, for whoever started this and waits
        server.serve_forever()


@command(reward_app, "plot")
def reward_plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run of nitro-e train rewards.")],
    out: Annotated[Path, typer.Option(help="The picture, a PNG.")] = Path("rewards.png"),
) -> None:
    """Plot what a run was paid for beside what nobody pays for: judges, diversity, distances, picture statistics."""
    from nitro_e_lite import files
    from nitro_e_lite.evaluation.watch import reward_figure

    if out.suffix.lower() != ".png":
        raise InvalidValue(f"out: {out.name!r} must end in .png")
    files.check_output(out, "file")
    rows = list(files.read_jsonl(run / "metrics.jsonl"))
    if all(row.get("reward") is None for row in rows):
        raise InvalidValue(f"run={run}: its metrics.jsonl holds no reward")
    drawn = io.BytesIO()
    reward_figure(rows, run.name).savefig(drawn, dpi=120, format="png")
    files.write_atomically(out, drawn.getvalue())
    console.print(str(out), markup=False, soft_wrap=True)


@command(app, "doctor")
def doctor(json: Json = False) -> None:
    """Say what is installed, where things would run and what is missing; exit code 1 if something is."""
    from nitro_e_lite.cli.doctor import diagnose

    with output(json) as result:
        result |= diagnose()
        if not json:
            rows = [[r["name"], r["extra"] or "", r["wanted"], r["found"] or "missing"] for r in result["packages"]]
            show_table("Packages", ["name", "extra", "wanted", "found"], rows)
            facts = dict(result["environment"] or {})
            facts.pop("packages", None)
            facts |= {f"weights {name}": f"{size / 1e6:.1f} MB" for name, size in (result["weights"] or {}).items()}
            if found := result["fp8"]:
                facts["fp8"] = "; ".join([found["rung"], *found["reasons"]])
            show_table("This machine", ["", ""], [[name, str(value)] for name, value in facts.items()])
            for problem in result["problems"]:
                console.print(f"Missing: {problem}", style="red", markup=False, soft_wrap=True)
            console.print("All is there." if result["ok"] else "Something is missing.", soft_wrap=True)
    if not result["ok"]:
        raise typer.Exit(1)


@command(app, "evaluate")
def evaluate(
    model: Model = "lite",
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON-lines file in GenEval's schema.")] = None,
    split: Annotated[str, typer.Option(help="held_out_prompts or held_out_compositions.")] = "held_out_prompts",
    seeds: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 2,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 25,
    out: Annotated[Path | None, typer.Option(help="Also write the result card to this file.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Also write the first pictures of every category here.")] = None,
    review: Annotated[
        Path | None, typer.Option(help="Also write 200 pictures and a sheet here, to hold the verifier against eyes.")
    ] = None,
    appearance: Annotated[
        bool,
        typer.Option("--appearance", help="Also measure how pictures look and how alike they are."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Result card of the same prompts and seeds: also give the paired difference to it."),
    ] = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    lora: Lora = None,
    variant: Variant = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Transformer in FP8, as far as the device can.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Score a model on GenEval-lite: six categories, a 95 % interval and the whole recipe."""
    with contextlib.ExitStack() as afterwards, output(json) as result:
        from nitro_e_lite import load_pipeline, viz
        from nitro_e_lite.evaluation import cards
        from nitro_e_lite.evaluation.geneval_lite import describe, new_sheet, psnr_of
        from nitro_e_lite.evaluation.geneval_lite import evaluate as run
        from nitro_e_lite.files import read_json, run_lock
        from nitro_e_lite.inference.arguments import as_integer
        from nitro_e_lite.scenes.geneval import SPLITS, load_prompts, read_prompts
        from nitro_e_lite.scenes.verifier import VERSION

        if prompts and split != SPLITS[0]:
            raise InvalidValue(f"split={split!r}: {prompts} takes its place; name one of them")
        as_integer("seeds", seeds, 1, MAX_SEEDS)
        asked = read_prompts(prompts) if prompts else load_prompts(split)
        for path in (out, grid):
            if path is not None:
                check_output(path, "file")
        if review is not None:
            check_output(review, "folder")
            new_sheet(review)  # refuses a folder that holds one
        if grid and grid.suffix.lower() != ".png":
            raise InvalidValue(f"grid: {grid.name!r} must end in .png")
        about = {"prompt_list": prompts.name if prompts else split, "model": model}
        if prompts:
            about |= cards.own_list(asked)
        other = read_json(against) if against else None
        if other is not None:
            cards.check(other, against.name)
            recipe = {"seeds": [*range(seeds)], "prompts": len(asked), "verifier": VERSION, "verdicts": "to come"}
            cards.same_pictures(about | recipe, other)  # before hours of drawing
        parts = {"text_encoder": text_encoder, "vae": vae, "lora": lora, "variant": variant}
        pipeline = load_pipeline(model, device, dtype, quantization="fp8" if fp8 else None, **parts)
        sampler = {"steps": steps, "guidance": guidance, "shift": shift}
        if fp8 and other is not None and other["model"] == model:  # otherwise two things would differ
            if other.get("fp8"):
                raise InvalidValue(f"against: {against.name} was drawn in FP8 too; name a card of 16 bit")
            mine = dataclasses.asdict(pipeline.sampler(**sampler)) | {"dtype": describe(pipeline)["dtype"]}
            for name in ("dtype", "steps", "guidance", "shift"):
                if other[name] != mine[name]:
                    told = f"{against.name} was drawn with {name}={other[name]}, this with {name}={mine[name]}"
                    raise InvalidValue(f"against: {told}")
        kept = {"keep_images": bool(grid or review), "appearance": appearance}
        if review:
            afterwards.enter_context(run_lock(review, name="review"))
        found = run(pipeline, asked, seeds=range(seeds), batch_size=batch, **kept, **sampler)
        found.card.update(about, command=cards.command_line(sys.argv[1:]))
        if fp8:
            exact = load_pipeline(model, device, pipeline.transformer.dtype, **parts)
            if not hasattr(exact.transformer, "fp8_report"):  # as it is of a folder that was saved in FP8
                found.card["psnr"] = psnr_of(pipeline, exact, asked, **sampler)
        if other is not None:
            found.card["against"] = cards.difference(found.card, other)
        result |= found.card
        if not json:
            score = found.score
            rows = [[name, f"{value:.3f}"] for name, value in score.categories.items()]
            rows.append(["overall", f"{score.overall:.3f}  ({score.low:.3f} to {score.high:.3f})"])
            title = f"GenEval-lite, {score.images} pictures, {found.card['seconds']:.0f} s"
            show_table(title, ["category", "score"], rows)
            if appearance:
                show_table("How they look", ["", ""], looks_rows(found.card["appearance"]))
            if near := found.card.get("psnr"):
                told = "PSNR against 16 bit, {pictures} pictures: median {median:.1f} dB, 90 % {low:.1f} to {high:.1f}"
                console.print(told.format(**near), highlight=False, soft_wrap=True)
            if other is not None:
                mean, low, high = found.card["against"]["score"]
                told = f"Minus {against.name}, picture by picture: {mean:+.3f} ({low:+.3f} to {high:+.3f})"
                share = found.card["against"].get("diversity")
                told += "" if share is None else f"; diversity {share:.0%} of it"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
        # When the score is told, because they may fail; the last one first.
        if grid:
            afterwards.callback(lambda: viz.save_image(found.grid(), grid, {"model": model}))
        if review:
            afterwards.callback(found.review, review)
        if out:
            afterwards.callback(found.save, out)


def looks_rows(seen: dict) -> list[list[str]]:
    """Rows of a table of `evaluation/appearance.py`'s report."""
    rows = [[name, f"{seen[name]:.3f}"] for name in ("preference", "reader", "diversity") if seen[name] is not None]
    return rows + [
        [f"{name}, x 1000", " ± ".join(f"{1000 * x:.2f}" for x in seen[name])] for name in ("kid", "kid_floor")
    ]


@command(app, "eyes")
def eyes_command(
    sheet: Annotated[
        Path | None, typer.Argument(help="A filled-in review.jsonl; the repository's own when not given.")
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="Draw the repository's 200 pictures again into this folder, for other eyes.")
    ] = None,
    json: Json = False,
) -> None:
    """Hold the verifier of GenEval-lite against eyes that looked at its pictures."""
    with output(json) as result:
        from nitro_e_lite import load_pipeline
        from nitro_e_lite.evaluation import eyes
        from nitro_e_lite.evaluation.geneval_lite import read_sheet, tally

        if sheet and redraw:
            raise InvalidValue(f"--redraw: draws the repository's own pictures; {sheet} is not needed")
        found = {"pictures": read_sheet(sheet)} if sheet else eyes.load()
        if redraw:
            check_output(redraw, "folder")
            result["sheet"] = str(eyes.redraw(load_pipeline(found["model"]), found, redraw))
            if not json:
                console.print(f"Look at the pictures, then fill in {result['sheet']}", markup=False, soft_wrap=True)
            return
        result |= tally(found["pictures"], sheet or eyes.SHEET.name)
        if not json:
            show_table(found.get("about", str(sheet)), list(eyes.COLUMNS), eyes.table(found["pictures"]))
            for row in result["disagree"]:
                said = "right" if row["eyes"] else f"wrong; the verifier: {row['reason'] or 'right'}"
                console.print(f"{row['prompt']}: eyes say {said}. {row['why']}", markup=False, soft_wrap=True)
            if "fresh" in found:
                console.print(eyes.say_fresh(found), markup=False, soft_wrap=True)
