"""The one-hour challenge: the best pictures that an hour of two cores can teach a new transformer.

The encoders are the shipped ones; the transformer begins with random weights. The recipe is the lite preset of stage 1
with what `overrides` change, cut to the hour: the speed of this machine is measured first, and the number of steps and
the fall of the learning rate follow from it. Then GenEval-lite decides: all held-out prompts once, seed 0, the sampler
of the model.

What a run leaves behind is an *entry*, `RUN_DIR/entry.json`: its settings, what it took, and the card of its score.
`board` ranks entries. Two whose intervals overlap share a place: a card that cannot tell them apart decides nothing.
The rules are in notebooks/CHALLENGE.md; `breaches` holds those that a program can check.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nitro_e_lite import config as configuration
from nitro_e_lite import files, presets
from nitro_e_lite.config import TrainConfig
from nitro_e_lite.errors import FileThere, InvalidValue, MissingFile
from nitro_e_lite.evaluation.geneval_lite import evaluate
from nitro_e_lite.experiments.compare import spread_prompts
from nitro_e_lite.experiments.launch import launch
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.scenes.geneval import load_prompts

RULES = 1  # a change of what is measured is a new number, and a new board
CORES = 2
SHARE = 0.85  # of the time goes into steps; the rest is for validation, pictures, checkpoints
TRIED = {"smoke": 2, "lite": 10}  # steps by which the speed is measured
SCALES = tuple(TRIED)


def settings(preset: str, overrides: list[str], steps: int) -> TrainConfig:
    """The run of an entry.

    Args:
        preset: "lite", or "smoke" to try the command.
        overrides: "field=value" strings of the participant; they count last.
        steps: that fit into the time.

    Raises:
        ValueError: another preset, an unknown field, or settings that the rules do not allow.
    """
    if preset not in SCALES:
        raise InvalidValue(f"preset={preset!r}: must be one of {', '.join(SCALES)}")
    if any(one.partition("=")[0].strip() == "steps" for one in overrides):
        raise InvalidValue("overrides: steps are as many as fit into the minutes; leave them out")
    fitted = [f"steps={steps}", f"optimizer.warmup_steps={min(100, steps // 10)}"]
    fitted += [f"optimizer.decay_steps={steps // 2}"]
    chosen = configuration.override(presets.preset("base", preset), [*fitted, *overrides])
    if found := breaches({"config": configuration.to_dict(chosen)}):
        raise InvalidValue(f"overrides: {found[0]}")
    return chosen


def breaches(entry: dict[str, Any]) -> list[str]:
    """Rules that an entry, or its settings alone, does not keep, in words."""
    config = entry["config"]
    rules = {
        "start_from must be empty: the transformer begins with random weights": not config["start_from"],
        "data.encoders must be 'lite': everybody reads the same latents": config["data"]["encoders"] == "lite",
        "data.folders must be empty: scenes are the data": not config["data"]["folders"],
        "lora.rank must be 0: there is nothing to adapt": not config["lora"]["rank"],
    }
    if "card" in entry:
        card = entry["card"]
        rules |= {
            f"rules {entry['rules']}, the board has {RULES}": entry["rules"] == RULES,
            f"it trained longer than {entry['minutes']:g} minutes": entry["seconds"] <= 60 * entry["minutes"],
            f"it had {entry['cores']} cores, not {CORES} at most": entry["cores"] <= CORES,
            "it trained on an accelerator": entry["device"] == "cpu",
            "it was judged on other prompts or seeds": (card["prompts"], card["seeds"]) == (len(load_prompts()), [0]),
        }
    return [rule for rule, kept in rules.items() if not kept]


def challenge(
    run_dir: Path,
    minutes: float = 60.0,
    name: str = "anonymous",
    preset: str = "lite",
    overrides: list[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains for some minutes, is judged, and leaves an entry.

    The clock runs while weights learn: from the first step to the weights on the disk. Drawing and encoding scenes,
    which is done once, and the judging come on top.

    Args:
        run_dir: folder of the entry; new or empty.
        minutes: for the training.
        name: of the entry.
        preset, overrides: see `settings`.
        say: gets a line now and then.

    Returns:
        The entry, as in its file.

    Raises:
        ValueError: settings that the rules do not allow, or no time.
        FileExistsError: the folder holds an entry or a training already.
        RuntimeError: another process makes one there.
    """
    if not 0 < minutes < math.inf:
        raise InvalidValue(f"minutes={minutes}: must be a number > 0")
    if (run_dir / "entry.json").exists() or (run_dir / "training").exists():
        raise FileThere(f"run_dir={run_dir}: holds an entry already; an entry is made in one go, name another folder")
    settings(preset, overrides, 1)
    files.check_output(run_dir, "folder")
    with files.run_lock(run_dir):
        return _make_entry(run_dir, minutes, name, preset, overrides, say)


def _make_entry(run_dir: Path, minutes: float, name: str, preset: str, overrides: list[str], say) -> dict[str, Any]:
    cores = _keep_cores()
    few = settings(preset, overrides, 1 + TRIED[preset])
    shared = preset == "lite" and cores == CORES and few.batch_size % CORES == 0
    processes = CORES if shared else 1  # two processes of one thread are faster than one of two
    each = seconds_a_step(few, run_dir / "speed", processes, say)
    chosen = settings(preset, overrides, max(1, int(SHARE * 60 * minutes / each)))
    say(f"{each:.3f} s a step on {cores} cores: {chosen.steps:,} steps in {minutes:g} minutes")
    begin = time.perf_counter()
    launch(chosen, run_dir / "training", processes=processes, device="cpu", on_line=say)
    seconds = time.perf_counter() - begin
    prompts = load_prompts() if preset == "lite" else spread_prompts(load_prompts(), 1)
    found = evaluate(load_pipeline(run_dir / "training", "cpu"), prompts, seeds=(0,))
    entry = {"rules": RULES, "name": name, "minutes": minutes, "seconds": round(seconds, 1), "cores": cores}
    changes = configuration.differences(presets.preset("base", preset), chosen)
    entry |= {"device": "cpu", "overrides": list(overrides), "changes": changes}
    entry |= {"config": configuration.to_dict(chosen), "card": found.card}
    say(f"GenEval-lite {found.score.overall:.3f}")  # a full disk may take the entry
    files.write_atomically(run_dir / "entry.json", json.dumps(entry, indent=1) + "\n")
    return entry


def _keep_cores() -> int:
    """Keeps this process and those it starts on two cores, where the system can; returns how many it has."""
    if not hasattr(os, "sched_setaffinity"):  # macOS and Windows: the entry says how many there were
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    return len(os.sched_getaffinity(0))


def seconds_a_step(config: TrainConfig, folder: Path, processes: int, say: Callable[[str], None] = print) -> float:
    """Mean seconds of the steps of a short run; the first, which may compile, does not count."""
    never = {name: 10**6 for name in ("validate_every", "sample_every", "checkpoint_every")}
    launch(replace(config, log_every=1, **never), folder, processes=processes, device="cpu", on_line=say)
    seconds = [row["seconds"] for row in files.read_jsonl(folder / "metrics.jsonl") if "seconds" in row]
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else seconds[0]


@dataclass(frozen=True)
class Row:
    """An entry on the board.

    Attributes:
        place: from 1; entries that the cards cannot tell apart share one. None: out of competition.
        entry: as in its file.
        breaches: rules that it does not keep.
    """

    place: int | None
    entry: dict[str, Any]
    breaches: list[str]


def board(paths: Iterable[Path]) -> list[Row]:
    """Ranks entries.

    Args:
        paths: entry files, folders of entries, or folders that hold those.

    Raises:
        FileNotFoundError: there is no entry.
        ValueError: a file holds something else.
    """
    found = []
    for path in paths:
        there = [path] if path.is_file() else sorted({*path.glob("entry.json"), *path.glob("*/entry.json")})
        if not there:
            raise MissingFile(f"{path}: no entry.json in it")
        found += [_read(file) for file in there]
    rows = [(entry, breaches(entry)) for entry in found]
    valid = [entry["card"] for entry, broken in rows if not broken]
    places = [None if b else 1 + sum(card["low"] > e["card"]["high"] for card in valid) for e, b in rows]
    made = [Row(place, entry, broken) for place, (entry, broken) in zip(places, rows, strict=True)]
    return sorted(made, key=lambda row: (row.place is None, -row.entry["card"]["overall"]))


def _read(file: Path) -> dict[str, Any]:
    entry = files.read_json(file)
    needed = {"rules", "name", "minutes", "seconds", "cores", "device", "config", "card"}
    if missing := sorted(needed - set(entry)):
        raise InvalidValue(f"{file}: is no entry of the challenge ({', '.join(missing)} missing)")
    try:
        breaches(entry)
        card = entry["card"]
        sound = 0 <= card["low"] <= card["overall"] <= card["high"] <= 1 and card["transformer_parameters"] > 0
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValue(f"{file}: is no entry of the challenge ({type(error).__name__}: {error})") from None
    if not sound or not isinstance(entry["name"], str):
        raise InvalidValue(f"{file}: is no entry of the challenge (its score or its name makes no sense)")
    return entry
