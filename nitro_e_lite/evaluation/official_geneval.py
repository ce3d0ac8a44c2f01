"""GenEval's prompts and what its official scorer wrote, and the note beside a folder that tells what its pictures are.

The scorer needs an environment of its own, with old releases of torch and an object detector, so it runs elsewhere and
the two sides meet in files. The layout that it reads is written by `official_tools.py`, as those of the other tools.

Source: Ghosh et al., GenEval, 2023, evaluation script and README.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import read_json, read_jsonl, write_atomically

KEYS = {"tag": str, "include": list, "prompt": str}


def read_metadata(path: str | Path) -> list[dict]:
    """The prompts of a benchmark file, one JSON object a line.

    Raises:
        ValueError: naming the line that is not one or lacks one of `KEYS`; or no lines.
    """
    found = list(read_jsonl(path, torn_last_line="counts", parse=check_entry))
    if not found:
        raise InvalidValue(f"{path}: holds no prompts")
    return found


def read_results(
    path: str | Path, metadata: Sequence[dict], images_per_prompt: int = 4, folder: str | None = None
) -> dict[str, Any]:
    """The official scorer's `results.jsonl`, summed up as its `summary_scores.py` does.

    Args:
        path: the file, one JSON object a picture.
        metadata: the benchmark's prompts.
        images_per_prompt: pictures that each must have.
        folder: name of the one that they lie in, where lines have a `filename`; None: of any.

    Returns:
        `overall`, the mean of `categories`, which are means over pictures by tag in order of appearance; `images`,
        `images_expected`, `prompts`, and the shares `correct_images` and `correct_prompts` (any picture of a prompt).

    Raises:
        ValueError: a line of another form, prompts that are missing, too many or not the benchmark's, a picture of
            another folder, or one that is there twice.
    """
    rows = list(read_jsonl(path, parse=_check_result))
    files = [Path(row["filename"]) for row in rows if "filename" in row]
    if len(set(files)) < len(files):
        twice = Counter(files).most_common(1)[0][0]
        raise InvalidValue(f"{path}: {twice} is there more than once; were results added to an older file?")
    for file in files:  # folder/00000/samples/0000.png
        if folder and len(file.parts) > 3 and file.parts[-4] != folder:
            raise InvalidValue(f"{path}: scores {file}, which is not in a folder {folder}")
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, list[bool]] = {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(bool(row["correct"]))
        prompts.setdefault(str(row["metadata"]), []).append(bool(row["correct"]))
    found = Counter(row["prompt"] for row in rows)
    wanted = Counter(entry["prompt"] for entry in metadata for _ in range(images_per_prompt))
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


def _check_result(row: dict) -> dict:
    texts = all(isinstance(text, str) for text in (row.get("tag"), row.get("prompt"), row.get("filename", "")))
    if not texts or "metadata" not in row or row.get("correct") not in (True, False):
        raise InvalidValue("must be an object with correct (true or false), metadata, tag, prompt (strings)")
    return row


def check_entry(entry: dict) -> dict:
    """The metadata of one prompt, as they are.

    Raises:
        ValueError: one of `KEYS` is missing or of another type.
    """
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
