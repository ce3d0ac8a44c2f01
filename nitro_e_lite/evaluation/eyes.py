"""The verifier held against eyes: 200 pictures of the lite model that were looked at, one by one.

`eyes.json` has each picture's prompt, steps and seed, what the verifier says and what eyes said. One reader looked, a
model that looks at pictures, not a panel of people. It saw pictures with their prompts and wrote down right, wrong or
unsure with a reason before it saw any verdict. Half of the pictures were right by version 1 of the verifier, half
wrong; within each half the categories stand as evenly as there were pictures: the share that agrees belongs to this
mixture.

Version 2 of the verifier was chosen on these pictures. So `fresh` holds others, of the first "lite-grpo" (all of its
3,360) and of "lite-4step" in one step (of 600): those that version 1 refused and 2 accepts. Who looked knew that.

`redraw` draws any of them again and writes an empty sheet, so that other eyes can look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.geneval_lite import draw, new_sheet, tally, write_sheet
from nitro_e_lite.files import read_json, run_lock
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.scenes.geneval import CATEGORIES, load_prompts, verify
from nitro_e_lite.scenes.verifier import VERSION

SHEET = Path(__file__).with_suffix(".json")
COLUMNS = ("", "looked at", "both right", "both wrong", "only eyes: right", "only verifier: right", "unsure", "agree")


def load(path: str | Path = SHEET) -> dict[str, Any]:
    """The sheet: `about`, the recipe, and `pictures`.

    Raises:
        ValueError: verdicts of another version of the verifier, or a disagreement without a reason.
    """
    sheet, name = read_json(path), Path(path).name
    if sheet["verifier"] != VERSION:
        raise InvalidValue(f"{name}: judged by version {sheet['verifier']} of the verifier, this is {VERSION}")
    tally(sheet["pictures"], name)
    return sheet


def say_fresh(sheet: dict[str, Any]) -> str:
    """What eyes say of the pictures that only the new version of the verifier accepts."""
    fresh, version = sheet["fresh"], sheet["verifier"]
    said = Counter(row["eyes"] for row in fresh)
    models = " and ".join(dict.fromkeys(row["model"] for row in fresh))
    what = f"{len(fresh)} pictures of {models} that version {version} of the verifier accepts"
    eyes = f"eyes accept {said[True]}, refuse {said[False]} and are unsure of {said['unsure']}"
    return f"Of {what} and the one before refused, {eyes}."


def table(pictures: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of `COLUMNS`: each category, each number of steps, and all; shares with their 95 % interval."""
    groups = {tag: [row for row in pictures if row["tag"] == tag] for tag in CATEGORIES}
    for steps in sorted({row["steps"] for row in pictures if "steps" in row}):
        groups[f"{steps} steps"] = [row for row in pictures if row["steps"] == steps]
    lines = []
    for name, rows in (groups | {"all": list(pictures)}).items():
        if not rows:
            continue
        said = [(row["eyes"], row["verifier"]) for row in rows]
        found = tally(rows)
        cells = [said.count(pair) for pair in ((True, True), (False, False), (True, False), (False, True))]
        share = found["agree"] / max(1, found["looked"] - found["unsure"])
        shown = f"{share:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        lines.append([name, *map(str, [found["looked"], *cells, found["unsure"]]), shown])
    return lines


def redraw(pipeline: NitroEPipeline, sheet: dict[str, Any], folder: str | Path) -> Path:
    """Draws the pictures of a sheet again, for other eyes: `geneval_lite.write_sheet`, then `agreement`.

    Look at the pictures before you look at the verdicts in the new sheet.

    Args:
        pipeline: the model of the sheet.
        sheet: as `load` gives it.
        folder: to write to.

    Raises:
        FileExistsError: a sheet is there already.
        RuntimeError: another process is drawing one there.
    """
    new_sheet(folder)  # before any drawing
    with run_lock(Path(folder), name="folder"):
        return _redraw(pipeline, sheet, folder)


def _redraw(pipeline: NitroEPipeline, sheet: dict[str, Any], folder: str | Path) -> Path:
    pictures, images = sheet["pictures"], {}
    for steps in sorted({row["steps"] for row in pictures}):
        numbers = [k for k, row in enumerate(pictures) if row["steps"] == steps]
        sampler = pipeline.sampler(steps, sheet["guidance"], sheet["shift"])
        for first in range(0, len(numbers), 25):
            some = numbers[first : first + 25]
            jobs = [(pictures[k]["prompt"], pictures[k]["seed"]) for k in some]
            images |= dict(zip(some, draw(pipeline, jobs, sampler), strict=True))
    by_text = {prompt.text: prompt for prompt in load_prompts()}
    prompts = [by_text[row["prompt"]] for row in pictures]
    ordered = [images[k] for k in range(len(pictures))]
    return write_sheet(folder, ordered, prompts, [verify(*pair) for pair in zip(ordered, prompts, strict=True)])
