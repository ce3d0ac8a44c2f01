"""The commands that draw: `nitro-e demo` and `sample`.

`demo` has three forms: a picture of eight captions, the page (`--web`), and the README's first picture (`--teaser`).
"""

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from nitro_e_lite.cli.terminal import (
    Device,
    Dtype,
    Guidance,
    Json,
    Lora,
    Shift,
    Steps,
    TextEncoder,
    Vae,
    Variant,
    command,
    console,
    output,
    say,
    settings,
    show_table,
)
from nitro_e_lite.course.demo_protocol import LITE_VOCABULARY
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import best_shipped, check_output

app = typer.Typer()

MAX_PICTURES = 100_000  # of one caption in one command
AT_ONCE = 64  # pictures
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

DEMO_CAPTIONS = (
    "a red circle to the left of a blue square",
    "two orange triangles",
    "a photo of a pink heart and a green square",
    "a yellow star above a purple heart",
    "three small white circles",
    "a large brown heart",
    "a black cross below a red triangle",
    "four blue stars",
)


@command(app, "demo")
def demo(
    out: Annotated[Path | None, typer.Option(help="The picture to write.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; 0 when not given.")] = None,
    web: Annotated[bool, typer.Option("--web", help="Serve a page on which lanes race as you watch.")] = False,
    teaser: Annotated[bool, typer.Option("--teaser", help="Draw figures/teaser.png: 20 steps, 4 and 1.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="For the page: a model to draw in 20, 4 and 1 steps; lite: what the package has for each."),
    ] = None,
    lane: Annotated[
        list[str] | None, typer.Option(help="For the page: MODEL@STEPS or MODEL@STEPS@GUIDANCE; up to four times.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the page.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of the page; any but a loopback address lets other machines in.")
    ] = None,
    browser: Annotated[bool | None, typer.Option(help="Open a browser with the page, as is usual.")] = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Draw a handful of captions with the shipped weights; `--web`: the same as a page, twenty steps beside four."""
    loading = {"text_encoder": text_encoder, "vae": vae, "device": device, "dtype": dtype}
    of_page = {"port": port, "host": host, "browser": browser, "lane": lane, "model": model, **loading}
    of_picture = {"out": out, "steps": steps, "guidance": guidance, "shift": shift, "json": json or None}
    if web and teaser:
        raise InvalidValue("web, teaser: two forms of the demo; name one")
    if web:
        refused, why = of_picture | {"seed": seed}, "the page has its own dials for that"
    elif teaser:
        refused, why = of_picture | of_page, "the teaser is always drawn alike"
    else:
        refused, why = of_page, "only --web takes it"
    for name, value in refused.items():
        if value is not None:
            raise InvalidValue(f"{name}: {why}")
    if lane and model is not None:
        raise InvalidValue("model: each lane names its own")
    if web:
        _serve_page(model or "lite", lane, port, host or "127.0.0.1", browser is not False, loading)
    elif teaser:
        _draw_teaser(seed or 0)
    else:
        _draw_eight(out or Path("outputs/demo.png"), steps, guidance, shift, seed or 0, json)


def _serve_page(
    model: str, lane: list[str] | None, port: int | None, host: str, browser: bool, loading: dict[str, str | None]
) -> None:
    """`nitro-e demo --web`."""
    from nitro_e_lite.course import demo_protocol, demo_server

    lanes = [demo_protocol.parse_lane(text) for text in lane] if lane else demo_protocol.default_lanes(model)
    if len(lanes) > demo_protocol.MAX_LANES:
        raise InvalidValue(f"lane: {len(lanes)} lanes; {demo_protocol.MAX_LANES} fit beside each other")
    if not demo_server.is_loopback(host):
        say(
            f"Warning: --host {host} lets everyone who reaches this machine draw on it; there is no password.", "yellow"
        )

    def tell(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    port = demo_server.PORT if port is None else port
    demo_server.serve(lanes, port=port, host=host, browser=browser, say=tell, **loading)


def _draw_teaser(seed: int) -> None:
    """`nitro-e demo --teaser`."""
    from nitro_e_lite.course import demo_teaser

    console.print(f"Picture: {demo_teaser.save(seed)}", markup=False, soft_wrap=True)


def _draw_eight(
    out: Path, steps: int | None, guidance: float | None, shift: float | None, seed: int, json: bool
) -> None:
    """`nitro-e demo`: one labelled picture and a timing table."""
    with output(json) as result:
        clock = [time.perf_counter()]
        from nitro_e_lite import load_pipeline, viz
        from nitro_e_lite.inference.arguments import seeded_generators

        captions, count = list(DEMO_CAPTIONS), len(DEMO_CAPTIONS)
        [out] = picture_paths(out, ["demo"], [seed])
        generators = seeded_generators(range(seed, seed + count))
        model, steps = best_shipped(steps)
        pipeline = load_pipeline(model)
        sampler = pipeline.sampler(steps, guidance, shift)
        pipeline.set_progress_bar_config(disable=None)  # None: shown on a terminal only
        clock.append(time.perf_counter())
        features = pipeline.encode_captions([""] * count + captions)
        clock.append(time.perf_counter())
        latents = pipeline(
            **sampler.arguments(),
            generator=generators,
            negative_prompt_embeds=features[:count],
            prompt_embeds=features[count:],
            output_type="latent",
        ).images
        clock.append(time.perf_counter())
        images = pipeline.decode(latents)
        clock.append(time.perf_counter())
        facts = settings(pipeline, model, sampler)
        picture = viz.image_grid(images, 4, captions, f"Nitro-E Lite, {facts['steps']} steps, seeds {seed} and up")
        viz.save_image(picture, out, {"captions": " | ".join(captions), "first seed": seed} | facts)
        clock.append(time.perf_counter())
        names = ["load libraries and weights", "read the captions", "sample", "decode", "draw and save"]
        seconds = {name: round(b - a, 3) for name, a, b in zip(names, clock, clock[1:], strict=False)}
        result |= {"path": str(out), "captions": captions, "seed": seed, "seconds": seconds} | facts
        result["total_seconds"] = round(clock[-1] - clock[0], 3)
        if not json:
            title = f"{count} pictures of {images[0].width} px on {facts['device']}"
            rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
            show_table(title, ["", "seconds"], [*rows, ["total", f"{result['total_seconds']:.2f}"]])
            console.print(f"Picture: {out}", markup=False, soft_wrap=True)


def warn_unknown_words(prompts: list[str]) -> None:
    """Says which words the lite model has never seen, and which it knows."""
    from nitro_e_lite.scenes import grammar
    from nitro_e_lite.scenes.captions import unknown_words

    unknown = dict.fromkeys(word for prompt in prompts for word in unknown_words(prompt))
    if unknown:
        say(
            f"Note: the lite model was trained on pictures of simple shapes and has never read: "
            f"{', '.join(unknown)[:500]}. It knows {', '.join(grammar.SHAPES)}; {', '.join(grammar.COLORS)}; "
            f"{', '.join(grammar.SIZES)}; one to four of a kind; {', '.join(grammar.RELATIONS)}.",
            "yellow",
        )


def picture_paths(out: Path, prompts: list[str], seeds: list[int]) -> list[Path]:
    """A file for each picture: `out` for one, numbered for more, or named after its caption in a folder.

    A named file is replaced; in a folder, a picture that is there already stays, whatever settings it was drawn with.

    Raises:
        ValueError: `out` is a picture of another format than PNG.
        OSError: nothing can be written there.
    """
    if out.suffix.lower() in OTHER_PICTURES:
        rule = "prompt and settings are kept in PNG text chunks; name a .png file or a folder"
        raise InvalidValue(f"out: {out.name!r} is no PNG; {rule}")
    if out.suffix.lower() == ".png":
        count = len(prompts)
        paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{index}") for index in range(count)]
        for path in (paths[0], paths[-1]):
            check_output(path, "file")
        return paths
    check_output(out, "folder")
    names = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture" for prompt in prompts]
    paths: list[Path] = []
    for name, seed in zip(names, seeds, strict=True):
        path, repeat = out / f"{name}-{seed}.png", 1
        while path in paths or path.exists():
            repeat += 1
            path = out / f"{name}-{seed}-{repeat}.png"
        paths.append(path)
    return paths


def claim(path: Path) -> Path:
    """The first free name like `path`, taken at once: two runs in one folder never choose the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, repeat = path, 1
    while True:
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            repeat += 1
            path = first.with_stem(f"{first.stem}-{repeat}")


@command(app, "sample")
def sample(
    captions: Annotated[list[str], typer.Argument(help="What to draw; each caption in quotes.")],
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture of a caption; the next has seed + 1.")] = 0,
    num: Annotated[int, typer.Option(help="Pictures for each caption.")] = 1,
    out: Annotated[Path, typer.Option(help="A .png file, or a folder.")] = Path("outputs"),
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    height: int | None = None,
    width: int | None = None,
    model: Annotated[
        str | None,
        typer.Option(help="As in `evaluate`; when not given lite-4step, in 10 steps by default; with --lora: lite."),
    ] = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    lora: Lora = None,
    variant: Variant = None,
    device: Device = None,
    dtype: Dtype = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Transformer in FP8, as far as the device can.")] = False,
    prompt_switch: Annotated[
        bool, typer.Option("--prompt-switch", help="With --fp8: draw portraits, text and logos in 16 bit.")
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="One picture and one part of the model at a time; large pictures in tiles."),
    ] = False,
    json: Json = False,
) -> None:
    """Draw captions and save PNG files that hold prompt, seed and settings in their text chunks."""
    with output(json) as result:
        from nitro_e_lite import load_pipeline, viz
        from nitro_e_lite.inference.arguments import as_integer, seeded_generators
        from nitro_e_lite.inference.low_memory import draw_one_by_one

        if model is None:
            model, steps = ("lite", steps) if lora else best_shipped(steps)  # adapters are learned on the base
        as_integer("num", num, 1, MAX_PICTURES)
        prompts = [caption for caption in captions for _ in range(num)]
        seeds = [seed + index for _ in captions for index in range(num)]
        paths, generators = picture_paths(out, prompts, seeds), seeded_generators(seeds)
        if prompt_switch and not fp8:
            raise InvalidValue("prompt_switch: chooses between FP8 and 16 bit; give --fp8 as well")
        if low_memory and fp8:
            raise InvalidValue("low_memory: draws in 16 or 32 bit; leave --fp8 out")
        parts = {"text_encoder": text_encoder, "vae": vae, "lora": lora, "variant": variant}
        named = {name: str(value) for name, value in parts.items() if value is not None}
        if prompt_switch:
            from nitro_e_lite.inference.fp8_pipeline import PromptSwitch

            pipeline = load_pipeline(model, device, dtype or "bfloat16", **parts)
            draw = PromptSwitch(pipeline)
        else:
            parts |= {"quantization": "fp8" if fp8 else None, "low_memory": low_memory}
            draw = pipeline = load_pipeline(model, device, dtype, **parts)
        pipeline.set_progress_bar_config(disable=None)
        sampler = pipeline.sampler(steps, guidance, shift)
        if len(pipeline.tokenizer) < LITE_VOCABULARY:
            warn_unknown_words([*captions, negative or ""])
        call = sampler.arguments() | {"negative_prompt": negative, "height": height, "width": width}

        def drawing():
            """Each picture, and the rule by which it was drawn in 16 bits."""
            if low_memory:
                yield from ((image, None) for image in draw_one_by_one(pipeline, prompts, generators, **call))
                return
            for first in range(0, len(prompts), AT_ONCE):
                some = slice(first, first + AT_ONCE)
                images = draw(prompts[some], **call, generator=generators[some]).images
                yield from zip(images, draw.drawn if prompt_switch else [None] * len(images), strict=True)

        facts, seconds, exact, pictures = settings(pipeline, model, sampler) | named, 0.0, [], drawing()
        for k, prompt in enumerate(prompts):  # what is drawn is saved before more is drawn or anything said
            start = time.perf_counter()
            image, rule = next(pictures)
            seconds += time.perf_counter() - start
            own = {"prompt": prompt, "negative prompt": negative or "", "seed": seeds[k]}
            paths[k] = paths[k] if out.suffix.lower() == ".png" else claim(paths[k])
            try:
                viz.save_image(image, paths[k], own | ({"16 bit": rule} if rule else {}) | facts)
            except OSError:
                if out.suffix.lower() != ".png":
                    paths[k].unlink()  # the name that was taken
                raise
            exact.append(rule)
        for path in () if json else paths:
            console.print(str(path), markup=False, soft_wrap=True)
        rows = zip(paths, prompts, seeds, strict=True)
        result |= {"images": [{"path": str(a), "prompt": b, "seed": c} for a, b, c in rows]}
        result |= {"seconds": round(seconds, 3)} | facts
        result |= {"exact": exact} if prompt_switch else {}
