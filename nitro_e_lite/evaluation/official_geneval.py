"""The folder layout that the official GenEval scorer reads.

`nitro-e geneval` fills it. The scorer needs an environment of its own, with old releases of torch and an
object detector, so it runs elsewhere and the two sides meet in files:

    ROOT/00000/metadata.jsonl      one JSON object: the line of the benchmark's prompt file
    ROOT/00000/samples/0000.png    the first image of that prompt

Folder names must be all digits and images must be `.png` with all-digit names: the scorer skips anything
else in silence, and a missing prompt only makes the mean one over fewer prompts. `check_folder` therefore
counts.

Source: Ghosh et al., GenEval, 2023, evaluation script and README.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import read_json, read_jsonl, write_atomically

KEYS = {"tag": str, "include": list, "prompt": str}


def write_sample(root: str | Path, index: int, metadata: dict, images: Sequence[np.ndarray]) -> Path:
    """Writes the folder of one prompt.

    Args:
        root: folder of the whole benchmark; made when absent.
        index: position of the prompt in the benchmark, >= 0.
        metadata: the prompt in GenEval's schema: an official line, or `Prompt.metadata()`.
        images: uint8 (H, W, 3) each.

    Returns:
        The folder `root/00000` of the prompt, which appears when all is in it and replaces one that was there.

    Raises:
        ValueError: for a negative index, missing metadata keys, no images, or one not uint8 (H, W, 3).
    """
    missing = [key for key in KEYS if key not in metadata]
    if index < 0:
        raise InvalidValue(f"index={index}: must be >= 0")
    if missing or not len(images):
        raise InvalidValue(f"prompt {index}: missing keys {missing}, {len(images)} images; must be none and > 0")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InvalidValue(f"image {image.dtype} {image.shape}: must be uint8 (H, W, 3)")
    folder = Path(root) / f"{index:05d}"
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "samples").mkdir(parents=True)
    (unfinished / "metadata.jsonl").write_text(json.dumps(metadata) + "\n", encoding="utf-8")
    for number, image in enumerate(images):
        Image.fromarray(image).save(unfinished / "samples" / f"{number:04d}.png")
    if folder.exists():
        shutil.rmtree(folder)
    return unfinished.rename(folder)


def read_metadata(path: str | Path) -> list[dict]:
    """The prompts of a benchmark file, one JSON object a line.

    Raises:
        ValueError: naming the line that is not one or lacks one of `KEYS`; or no lines.
    """
    found = list(read_jsonl(path, torn_last_line="counts", parse=_check_entry))
    if not found:
        raise InvalidValue(f"{path}: holds no prompts")
    return found


def read_results(path: str | Path, metadata: Sequence[dict], images_per_prompt: int = 4) -> dict[str, Any]:
    """The official scorer's `results.jsonl`, summed up as its `summary_scores.py` does.

    Args:
        path: the file, one JSON object a picture.
        metadata: the benchmark's prompts.
        images_per_prompt: pictures that each must have.

    Returns:
        `overall`, the mean of `categories`, which are means over pictures by tag in order of appearance; `images`,
        `images_expected`, `prompts`, and the shares `correct_images` and `correct_prompts` (any picture of a prompt).

    Raises:
        ValueError: a line of another form, or prompts that are missing, too many or not the benchmark's.
    """
    rows = list(read_jsonl(path))
    if bad := [k for k, row in enumerate(rows, 1) if not {"tag", "prompt", "correct", "metadata"} <= set(row)]:
        raise InvalidValue(f"{path}, line {bad[0]}: lacks one of tag, prompt, correct, metadata")
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, list[bool]] = {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(bool(row["correct"]))
        prompts.setdefault(str(row["metadata"]), []).append(bool(row["correct"]))
    found = Counter(row["prompt"] for row in rows)
    wanted = Counter({entry["prompt"]: images_per_prompt for entry in metadata})
    if wrong := sorted((wanted - found) + (found - wanted)):
        rule = f"{found[wrong[0]]} results of {wrong[0]!r}, must be {wanted[wrong[0]]}"
        raise InvalidValue(f"{path}: {rule}; the first of {len(wrong)} prompts")
    categories = {tag: fmean(marks) for tag, marks in tags.items()}
    return {
        "overall": fmean(categories.values()),
        "categories": categories,
        "images": len(rows),
        "images_expected": len(metadata) * images_per_prompt,
        "prompts": len(prompts),
        "correct_images": fmean(bool(row["correct"]) for row in rows),
        "correct_prompts": fmean(any(marks) for marks in prompts.values()),
    }


def _check_entry(entry: dict) -> dict:
    if any(not isinstance(entry.get(key), kind) for key, kind in KEYS.items()):
        kinds = ", ".join(f"{key} (a {'list' if kind is list else 'string'})" for key, kind in KEYS.items())
        raise InvalidValue(f"must be an object with {kinds}")
    return entry


def manifest_path(root: str | Path) -> Path:
    """Where it is told what the pictures in a folder are: beside it, since tools read all that is inside."""
    return Path(f"{str(root).rstrip('/')}.export.json")


def declare(root: str | Path, about: dict[str, Any], free: Sequence[str] = ("environment",)) -> None:
    """Writes down what the pictures in a folder are, or compares it with what was written before the first of them.

    Raises:
        ValueError: the folder holds pictures of other weights or settings; fields in `free` may differ.
    """
    path = manifest_path(root)
    if path.is_file():
        known = read_json(path)
        if differ := [name for name in about if name not in free and known.get(name) != about[name]]:
            was, now = known.get(differ[0]), about[differ[0]]
            raise InvalidValue(f"{root}: holds pictures with {differ[0]} {was}, not {now}; name another folder")
    else:
        write_atomically(path, json.dumps(about, indent=1) + "\n")


def check_names(root: str | Path, prompts: int) -> None:
    """Refuses a folder in which something lies that is no picture of a benchmark of `prompts` prompts.

    Raises:
        ValueError: naming what does not belong there.
    """
    names = {f"{index:05d}{ending}" for index in range(prompts) for ending in ("", ".unfinished")}
    odd = sorted(_present(Path(root)) - names)
    if odd:
        raise InvalidValue(f"{root}: {', '.join(odd[:5])}: does not belong here; name another folder")


def _present(root: Path) -> set[str]:
    return {p.name for p in root.iterdir() if not p.name.startswith(".")} if root.is_dir() else set()


def check_folder(root: str | Path, metadata: Sequence[dict], images_per_prompt: int = 4) -> int:
    """Checks that a folder is complete and that the official scorer would read all of it.

    Args:
        root: folder of the whole benchmark.
        metadata: the benchmark's prompts, in order.
        images_per_prompt: how many images each prompt must have (GenEval: 4).

    Returns:
        The number of images.

    Raises:
        ValueError: listing the first problems.
    """
    root = Path(root)
    names = {f"{index:05d}" for index in range(len(metadata))}
    present = _present(root)
    problems = [f"{name}: missing" for name in sorted(names - present)]
    problems += [f"{name}: does not belong here" for name in sorted(present - names)]
    wanted = [f"{number:04d}.png" for number in range(images_per_prompt)]
    for index, entry in enumerate(metadata):
        folder = root / f"{index:05d}"
        if folder.name not in present:
            continue
        try:
            if read_json(folder / "metadata.jsonl") != entry:
                problems.append(f"{folder.name}/metadata.jsonl: another prompt")
        except (OSError, ValueError) as error:
            problems.append(f"{folder.name}/metadata.jsonl: not one JSON object ({error})")
        found = sorted(p.name for p in (folder / "samples").glob("*"))
        if found != wanted:
            problems.append(f"{folder.name}/samples: holds {found}, must hold {wanted}")
    if problems:
        raise InvalidValue(f"{root}: {len(problems)} problems, first: " + "; ".join(problems[:5]))
    return len(metadata) * images_per_prompt
