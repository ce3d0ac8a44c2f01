"""Pictures in the layouts that DPG-Bench, HPSv2.1, ImageReward and FID read, and what those tools print, read back.

Each tool lives in an environment of its own, with pins that do not go with ours; the two sides meet in files. GenEval's
layout is in `official_geneval.py`. What is written, and the faults of the tools that it is written around:

- DPG-Bench: `ROOT/NAME.png` for each `prompts/NAME.txt` (1,065), four pictures in a square. Whatever else lies in ROOT
  is scored, a picture that fails shrinks the mean, and the first row of its table is skipped, so that `partiprompts97`
  fails unless the script is patched. Scores of categories hold the last of the four pictures only.
- HPSv2.1: `ROOT/STYLE/00000.jpg`, four styles of 800. Other folders in ROOT are taken for styles, a missing picture is
  replaced by the next one, and one of its modes prints a hundredfold.
- ImageReward: `ROOT/00000.png` and `ROOT.prompts.jsonl`. Prompts are cut at 35 tokens.
- FID: `ROOT/00000.png`, squares, resized here by the named filter. Everything in ROOT counts; below 2,048 pictures the
  covariance is singular.

So ROOT holds pictures and nothing else. What they are is told by `ROOT.export.json` beside it, which is also why a
second run with other weights or settings is refused. A run that was stopped continues.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.evaluation.cards import PICTURES
from nitro_e_lite.evaluation.geneval_lite import describe, draw, picture_seed
from nitro_e_lite.evaluation.official_geneval import declare, manifest_path
from nitro_e_lite.files import read_json, read_jsonl, run_lock, write_atomically
from nitro_e_lite.inference.pipeline import NitroEPipeline, Sampler

TOOLS = ("dpg", "hpsv2", "image_reward", "fid")
STYLES = ("anime", "concept-art", "paintings", "photo")
EACH = 4  # pictures of a DPG prompt
RESIZES = {"none": None, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Target:
    """One file that a tool reads.

    Attributes:
        path: inside of the folder.
        caption: what it shows.
        seeds: of its pictures; four stand in a square.
    """

    path: str
    caption: str
    seeds: tuple[int, ...]


def targets(tool: str, prompts: str | Path) -> list[Target]:
    """What a tool reads, from its own prompts.

    Args:
        tool: one of `TOOLS`.
        prompts: DPG: its folder of `.txt` files. HPSv2.1: its folder with a list for each style. ImageReward and FID:
            a file with a prompt a line, or JSON lines with `prompt`.

    Raises:
        ValueError: not as many prompts as the benchmark has, an empty one, or a file that holds something else.
        FileNotFoundError: nothing there.
    """
    if tool not in TOOLS:
        raise InvalidValue(f"tool: {tool!r} is not one of {', '.join(TOOLS)}")
    path = Path(prompts)
    if not path.exists():
        raise MissingFile(f"{path}: there are no prompts")
    if tool == "dpg":
        texts = {f"{one.stem}.png": one.read_text(encoding="utf-8").strip() for one in sorted(path.glob("*.txt"))}
    elif tool == "hpsv2":
        lists = {style: json.loads((path / f"{style}.json").read_text(encoding="utf-8")) for style in STYLES}
        texts = {f"{style}/{k:05d}.jpg": text for style, some in lists.items() for k, text in enumerate(some)}
        if len({len(some) for some in lists.values()}) != 1:
            raise InvalidValue(f"{path}: {', '.join(f'{style} has {len(x)}' for style, x in lists.items())} prompts")
    else:
        lines = read_jsonl(path) if path.suffix == ".jsonl" else path.read_text(encoding="utf-8").splitlines()
        found = [line["prompt"] if isinstance(line, dict) else line for line in lines]
        texts = {f"{k:05d}.png": text for k, text in enumerate(text for text in found if text.strip())}
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        raise InvalidValue(f"{path}: the prompt of {empty[0]} is empty")
    wanted = PICTURES.get(tool, len(texts))
    if len(texts) != wanted or not texts:
        raise InvalidValue(f"{path}: {len(texts)} prompts; {tool} has {wanted or 'at least one'}")
    each = range(EACH if tool == "dpg" else 1)
    numbered = enumerate(texts.items())
    return [Target(name, text, tuple(picture_seed(k, place) for k in each)) for place, (name, text) in numbered]


def export(
    pipeline: NitroEPipeline,
    tool: str,
    wanted: Sequence[Target],
    root: str | Path,
    sampler: Sampler | None = None,
    size: int | None = None,
    resize: str = "none",
    batch: int = 16,
) -> int:
    """Draws what a tool reads; files that are there already are left alone.

    Args:
        pipeline: what draws.
        tool, wanted: see `targets`.
        root: the folder.
        sampler: to draw with; the pipeline's own when not given.
        size: side of each picture; as it is drawn when not given.
        resize: filter by which it gets there, one of `RESIZES`; kept in the manifest, for it decides a FID.
        batch: pictures at once.

    Returns:
        The number of files.

    Raises:
        ValueError: the folder holds pictures of other weights, settings or prompts, or something else.
    """
    root, sampler = Path(root), sampler or pipeline.sampler()
    if resize not in RESIZES or (size is not None and resize == "none"):
        raise InvalidValue(
            f"resize: {resize!r} for size {size}; name one of {', '.join(list(RESIZES)[1:])} with a size"
        )
    about = {"tool": tool, "files": len(wanted), "prompts_sha256": _digest(wanted), "size": size, "resize": resize}
    about |= asdict(sampler) | {"seeds": list(range(len(wanted[0].seeds)))} | describe(pipeline)
    with run_lock(root, name="folder"):
        if not manifest_path(root).is_file() and (found := _present(root) - {".lock"}):
            raise InvalidValue(f"{root}: {sorted(found)[0]} is there and nothing says what it is; name another folder")
        declare(root, about)
        for torn in root.rglob(".*.tmp"):  # of a run that was killed
            torn.unlink()
        missing = [one for one in wanted if not (root / one.path).is_file()]
        at_once = max(1, batch // len(wanted[0].seeds))
        for first in tqdm(range(0, len(missing), at_once), desc="drawing", disable=None):
            some = missing[first : first + at_once]
            pictures = iter(draw(pipeline, [(one.caption, seed) for one in some for seed in one.seeds], sampler))
            for one in some:
                drawn = [_resized(next(pictures), size, resize) for _ in one.seeds]
                _write(root / one.path, drawn)
        if tool == "image_reward":
            rows = [{"path": one.path, "prompt": one.caption} for one in wanted]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(Path(f"{root}.prompts.jsonl"), text)
    (root / ".lock").unlink(missing_ok=True)  # HPSv2.1 would take it for a style
    return check(tool, wanted, root)


def _digest(wanted: Sequence[Target]) -> str:
    return hashlib.sha256(json.dumps([(one.path, one.caption) for one in wanted]).encode()).hexdigest()


def _resized(picture: np.ndarray, size: int | None, resize: str) -> Image.Image:
    image = Image.fromarray(picture)
    return image if size is None or image.size == (size, size) else image.resize((size, size), RESIZES[resize])


def _write(path: Path, pictures: Sequence[Image.Image]) -> None:
    """One picture, or four in a square: top left, top right, bottom left, bottom right; whole or not at all."""
    side, columns = pictures[0].width, math.isqrt(len(pictures))
    square = Image.new("RGB", (columns * side, columns * side))
    for k, picture in enumerate(pictures):
        square.paste(picture, (k % columns * side, k // columns * side))
    buffer = io.BytesIO()
    square.save(buffer, **({"format": "JPEG", "quality": 95} if path.suffix == ".jpg" else {"format": "PNG"}))
    write_atomically(path, buffer.getvalue())


def _present(root: Path) -> set[str]:
    return {one.relative_to(root).as_posix() for one in root.rglob("*") if one.is_file()}


def check(tool: str, wanted: Sequence[Target], root: str | Path) -> int:
    """Checks that a folder is what a tool reads, whole.

    Returns:
        The number of files.

    Raises:
        ValueError: naming the first thing wrong: a stranger, a missing file, one that cannot be read or has another
            size than the rest.
    """
    root = Path(root)
    present, names = _present(root), [one.path for one in wanted]
    if strangers := sorted(present - set(names)):
        raise InvalidValue(f"{root}: {strangers[0]} does not belong here, and {tool} would read it")
    if missing := [name for name in names if name not in present]:
        raise InvalidValue(f"{root}: {missing[0]} is missing, the first of {len(missing)}; run the export again")
    first: tuple[str, tuple[int, int]] | None = None
    for name in names:
        try:
            with Image.open(root / name) as image:
                image.load()
                size, kind = image.size, image.format
        except (OSError, SyntaxError) as error:
            raise InvalidValue(f"{root}: {name} cannot be read ({error}); delete it and run the export again") from None
        if (kind == "JPEG") != name.endswith(".jpg"):
            raise InvalidValue(f"{root}: {name} is a {kind}")
        if size[0] != size[1] or (tool == "dpg" and size[0] % 2):
            shape = "a square of four" if tool == "dpg" else "a square"
            raise InvalidValue(f"{root}: {name} has {size[0]} x {size[1]} pixels; must be {shape}")
        first = first or (name, size)
        if size != first[1]:
            raise InvalidValue(f"{root}: {name} has {size[0]} pixels a side, {first[0]} has {first[1][0]}")
    return len(names)


# -- what the tools print


def read_scores(tool: str, path: str | Path, wanted: Sequence[Target]) -> dict[str, Any]:
    """The score in the output of a tool.

    Args:
        tool: one of `TOOLS`.
        path: DPG: the file of `--res-path`. HPSv2.1: what it printed. ImageReward: JSON lines with `path` and `score`.
            FID: a JSON object with `fid`, `n`, `tool` and `resize`.
        wanted: what had to be scored.

    Returns:
        `overall`, `images`, `images_expected`, and `categories` where there are any.

    Raises:
        ValueError: output of another form, or of another number of pictures.
    """
    path = Path(path)
    if tool == "fid":
        found = read_json(path)
        about = {name: found.get(name) for name in ("tool", "resize")}
        return _counted(path, float(found["fid"]), int(found["n"]), wanted) | about
    if tool == "image_reward":
        rows = {row["path"]: float(row["score"]) for row in read_jsonl(path)}
        _same_names(path, rows, [one.path for one in wanted])
        return _counted(path, fmean(rows.values()), len(rows), wanted)
    text = path.read_text(encoding="utf-8")
    if tool == "hpsv2":
        rows = {style: float(score) for style, score in re.findall(rf"({'|'.join(STYLES)})\s+([\d.]+)\s+[\d.]+", text)}
        _same_names(path, rows, STYLES)
        styles = {style: rows[style] / (100 if rows[style] > 100 else 1) for style in STYLES}  # the hundredfold mode
        return _counted(path, fmean(styles.values()), len(wanted), wanted) | {"categories": styles}
    rows = dict(re.findall(r"^(\S.*?), (?:[\d.]+, )+([\d.]+)$", text, flags=re.MULTILINE))
    by_name = {Path(name).name: float(score) for name, score in rows.items()}
    _same_names(path, by_name, [one.path for one in wanted])
    return _counted(path, 100 * fmean(by_name.values()), len(by_name), wanted)


def _same_names(path: Path, found: Mapping[str, float], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise InvalidValue(f"{path}: no score of {missing[0]}, the first of {len(missing)}; the mean would be of fewer")
    if strangers := sorted(set(found) - set(wanted)):
        raise InvalidValue(f"{path}: scores {strangers[0]}, which was not exported")


def _counted(path: Path, overall: float, images: int, wanted: Sequence[Target]) -> dict[str, Any]:
    if not math.isfinite(overall):
        raise InvalidValue(f"{path}: the score is {overall}")
    if images != len(wanted):
        raise InvalidValue(f"{path}: {images} pictures were scored, {len(wanted)} exported")
    return {"overall": overall, "images": images, "images_expected": len(wanted)}


def make_card(tool: str, scores: Mapping[str, Any], root: str | Path) -> dict[str, Any]:
    """Scores with the recipe of the pictures: the values of a result card.

    Raises:
        FileNotFoundError: nobody exported into that folder.
    """
    path = manifest_path(root)
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; it tells what the pictures are")
    return read_json(path) | dict(scores)
