"""Pictures in the layouts that GenEval, DPG-Bench, HPSv2.1, ImageReward and FID read, and their outputs read back.

Each tool lives in an environment of its own, with pins that do not go with ours; the two sides meet in files. What is
written, and the faults of the tools that it is written around:

- GenEval: `ROOT/00000/samples/0000.png`, four a prompt, and `ROOT/00000/metadata.jsonl`, the line of its prompt file.
  Names must be all digits: anything else is skipped in silence, and a missing prompt only shrinks the mean.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from nitro_e_lite.data.sources import read_prompts
from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.evaluation.cards import PICTURES
from nitro_e_lite.evaluation.geneval_lite import SEED_STRIDE, describe, draw, picture_seed
from nitro_e_lite.evaluation.official_geneval import declare, manifest_path, read_metadata, read_results
from nitro_e_lite.files import read_json, read_jsonl, read_text, run_lock, write_atomically
from nitro_e_lite.inference.arguments import as_integer, as_prompts
from nitro_e_lite.inference.pipeline import NitroEPipeline, Sampler
from nitro_e_lite.runtime import check_memory

TOOLS = ("geneval", "dpg", "hpsv2", "image_reward", "fid")
STYLES = ("anime", "concept-art", "paintings", "photo")
EACH = 4  # pictures of a prompt of GenEval or DPG
RESIZES = {"none": None, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True)
class Target:
    """One file that a tool reads.

    Attributes:
        path: inside of the folder.
        caption: what it shows.
        seeds: of its pictures; four stand in a square.
        metadata: for GenEval, the line of its prompt file.
    """

    path: str
    caption: str
    seeds: tuple[int, ...]
    metadata: dict[str, Any] | None = None

    @property
    def note(self) -> tuple[str, str] | None:
        """Path and text of the file in which GenEval reads what a picture is to show."""
        folder = self.path.partition("/")[0]
        return None if self.metadata is None else (f"{folder}/metadata.jsonl", json.dumps(self.metadata) + "\n")


def targets(tool: str, prompts: str | Path) -> list[Target]:
    """What a tool reads, from its own prompts.

    Args:
        tool: one of `TOOLS`.
        prompts: GenEval: its `evaluation_metadata.jsonl`. DPG: its folder of `.txt` files. HPSv2.1: its folder with a
            list for each style. ImageReward and FID: see `sources.read_prompts`.

    Raises:
        ValueError: not as many prompts as DPG or HPSv2.1 have, an empty one, or a file that holds something else. For
            GenEval a list may be one's own; a result card is made of its 553 prompts alone.
        FileNotFoundError: nothing there.
    """
    if tool not in TOOLS:
        raise InvalidValue(f"tool: {tool!r} is not one of {', '.join(TOOLS)}")
    path = Path(prompts)
    if not path.exists():
        raise MissingFile(f"{path}: there are no prompts")
    if tool == "geneval":
        return [
            Target(f"{place:05d}/samples/{k:04d}.png", entry["prompt"], (picture_seed(k, place),), entry)
            for place, entry in enumerate(read_metadata(path))
            for k in range(EACH)
        ]
    if tool == "dpg":
        texts = {f"{one.stem}.png": read_text(one).strip() for one in sorted(path.glob("*.txt"))}
    elif tool == "hpsv2":
        lists = {style: _list(path / f"{style}.json") for style in STYLES}
        texts = {f"{style}/{k:05d}.jpg": text for style, some in lists.items() for k, text in enumerate(some)}
        if len({len(some) for some in lists.values()}) != 1:
            raise InvalidValue(f"{path}: {', '.join(f'{style} has {len(x)}' for style, x in lists.items())} prompts")
    else:
        found = [text for text in read_prompts(path) if text and text.strip()]
        texts = {f"{k:05d}.png": text for k, text in enumerate(found)}
    if empty := [name for name, text in texts.items() if not text.strip()]:
        raise InvalidValue(f"{path}: the prompt of {empty[0]} is empty")
    wanted = PICTURES.get(tool, len(texts))
    if len(texts) != wanted or not texts:
        raise InvalidValue(f"{path}: {len(texts)} prompts; {tool} has {wanted or 'at least one'}")
    each = range(EACH if tool == "dpg" else 1)
    numbered = enumerate(texts.items())
    return [Target(name, text, tuple(picture_seed(k, place) for k in each)) for place, (name, text) in numbered]


def _list(path: Path) -> list[str]:
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidValue(f"{path}: no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InvalidValue(f"{path}: must hold a JSON list of prompts")
    return found


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
    if resize not in RESIZES or (size is None) != (resize == "none"):
        filters = ", ".join(list(RESIZES)[1:])
        raise InvalidValue(f"resize: {resize!r} for size {size}; name one of {filters} with a size, or neither")
    as_prompts("prompt", [one.caption for one in wanted])  # before anything is written
    if size is not None:
        check_memory(f"size={size}", 3 * batch * as_integer("size", size, 1) ** 2)
    about = {"tool": tool, "files": len(wanted), "prompts_sha256": _digest(wanted), "size": size, "resize": resize}
    seeds = {seed // SEED_STRIDE for one in wanted for seed in one.seeds}
    about |= asdict(sampler) | {"seeds": sorted(seeds)} | describe(pipeline)
    with _held(root):
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
        for name, text in {one.note for one in wanted if one.note}:
            write_atomically(root / name, text)
        if tool == "image_reward":
            rows = [{"path": one.path, "prompt": one.caption} for one in wanted]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(Path(f"{root}.prompts.jsonl"), text)
    return check(tool, wanted, root)


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """Locks a folder and leaves no lock in it: HPSv2.1 would take it for a style."""
    held = False
    try:
        with run_lock(root, name="folder"):
            held = True
            yield
    finally:
        if held:
            (root / ".lock").unlink(missing_ok=True)


def _digest(wanted: Sequence[Target]) -> str:
    return hashlib.sha256(json.dumps([(one.path, one.caption, one.note) for one in wanted]).encode()).hexdigest()


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
    present, names, notes = _present(root), [one.path for one in wanted], dict(one.note for one in wanted if one.note)
    if strangers := sorted(present - {*names, *notes}):
        raise InvalidValue(f"{root}: {strangers[0]} does not belong here, and {tool} would read it")
    if missing := [name for name in (*names, *notes) if name not in present]:
        raise InvalidValue(f"{root}: {missing[0]} is missing, the first of {len(missing)}; run the export again")
    if other := [name for name, text in notes.items() if (root / name).read_text(encoding="utf-8") != text]:
        raise InvalidValue(f"{root}: {other[0]} is of another prompt; delete it and run the export again")
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


def read_scores(
    tool: str, path: str | Path, wanted: Sequence[Target], root: str | Path | None = None
) -> dict[str, Any]:
    """The score in the output of a tool.

    Args:
        tool: one of `TOOLS`.
        path: GenEval: its JSON lines, one a picture. DPG: the file of `--res-path`. HPSv2.1: what it printed.
            ImageReward: JSON lines with `path` and `score`. FID: a JSON object with `fid`, `n`, `tool` and `resize`.
        wanted: what had to be scored.
        root: folder of the pictures; where the output names files, they must lie in a folder of this name.

    Returns:
        `overall`, `images`, `images_expected`, and `categories` where there are any.

    Raises:
        ValueError: output of another form, of another number of pictures, or of the pictures of another folder.
    """
    path, folder = Path(path), None if root is None else Path(root).resolve().name
    if tool == "geneval":
        return read_results(path, [one.metadata for one in wanted[::EACH]], EACH, folder)
    if tool == "fid":
        found = read_json(path)
        about = {name: found.get(name) for name in ("tool", "resize")}
        return _counted(path, _number(path, found, "fid"), _number(path, found, "n"), wanted) | about
    if tool == "image_reward":
        scored = [(str(row.get("path")), _number(path, row, "score")) for row in read_jsonl(path)]
        rows = dict(scored)
        if len(rows) < len(scored):
            raise InvalidValue(f"{path}: {len(scored)} scores of {len(rows)} pictures; each must be there once")
        _same_names(path, rows, [one.path for one in wanted])
        return _counted(path, fmean(rows.values()), len(rows), wanted)
    text, number = read_text(path), r"\d+(?:\.\d+)?"
    if tool == "hpsv2":
        lines = re.findall(rf"({'|'.join(STYLES)})\s+({number})\s+{number}", text)
        rows = {style: float(score) for style, score in lines}
        _same_names(path, rows, STYLES)
        styles = {style: rows[style] / (100 if rows[style] > 100 else 1) for style in STYLES}  # the hundredfold mode
        return _counted(path, fmean(styles.values()), len(wanted), wanted) | {"categories": styles}  # and see make_card
    rows = dict(re.findall(rf"^(\S.*?), (?:{number}, )+({number})$", text, flags=re.MULTILINE))
    for name in map(Path, rows):
        if folder and name.parent.name not in ("", folder):
            raise InvalidValue(f"{path}: scores {name}, which is not in {root}")
    by_name = {Path(name).name: float(score) for name, score in rows.items()}
    _same_names(path, by_name, [one.path for one in wanted])
    found = _counted(path, 100 * fmean(by_name.values()), len(by_name), wanted)
    return found | {"patched": True}  # as published, the script leaves a row out


def _number(path: Path, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValue(f"{path}: {name}={value!r:.80}: must be a number")
    return value


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


def make_card(tool: str, wanted: Sequence[Target], scores: Mapping[str, Any], root: str | Path) -> dict[str, Any]:
    """Scores with the recipe of the pictures: the values of a result card.

    Raises:
        FileNotFoundError: nobody exported into that folder.
        ValueError: its pictures were exported for another tool, or of other prompts, or are not all there any more:
            tools take fewer without a word.
    """
    path = manifest_path(root)
    if not path.is_file():
        raise MissingFile(f"{path}: is missing; it tells what the pictures are")
    about = read_json(path)
    if about.get("tool") != tool:
        raise InvalidValue(f"{root}: holds pictures for {about.get('tool')}, not for {tool}")
    if about.get("prompts_sha256") != _digest(wanted):
        raise InvalidValue(f"{root}: holds pictures of other prompts; name the file that they were exported with")
    check(tool, wanted, root)
    if tool == "fid":  # both resizes decide it: that of the files, and the tool's own
        about["export_resize"] = about.pop("resize")
    return about | dict(scores)
