"""Which of several recipes learns more from the same data: runs that differ in one thing, over several seeds.

A variant is a name and the fields it changes. For each seed, all variants see the same batches, noise and timesteps; at
each of a few points of the training the averaged weights are validated, asked which of two captions fits a noisy
picture, and asked to draw. What remains is the spread over seeds, so that a difference can be told from luck. Learning
rates stay constant: a point half-way is then a run of its own, and not one that was cut before its end.

Ways of learning from rewards are compared in the same manner: at each point the pictures of the averaged policy, drawn
as in its roll-outs, are judged by GenEval-lite. No run is ended early, and the clock of each is kept, so that ways can
be compared after as many pictures or after as many minutes. Such a run has a length, by which the forward process plans
how closely its old policy follows: points half-way are cut from it, and none can be added after its end.

Each run keeps its rows in a folder of its own. A comparison that was stopped goes on with the run it was in, and two
processes may share the work by taking different seeds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nitro_e_lite.config import FACTS, RewardConfig, TrainConfig, override, to_dict
from nitro_e_lite.errors import InvalidValue, NotFinite, NotFiniteScores
from nitro_e_lite.evaluation.geneval_lite import evaluate
from nitro_e_lite.evaluation.sensitivity import caption_sensitivity
from nitro_e_lite.files import check_output, read_jsonl, run_lock, write_atomically
from nitro_e_lite.scenes.geneval import CATEGORIES, Prompt
from nitro_e_lite.stages.pretrain import Pretrain
from nitro_e_lite.stages.rewards_grpo import learner
from nitro_e_lite.stats import interval
from nitro_e_lite.training.engine import Engine
from nitro_e_lite.training.metrics import MetricsWriter

RESULT = "comparison.json"
TOLD_AT = (0.6, 0.7, 0.8, 0.9)  # noise levels at which a caption's facts are read: where shapes are decided


def read_variant(text: str) -> tuple[str, list[str]]:
    """`"REPA: repa.weight=0.5 repa.hidden=256"` as a name and `config.override` strings.

    Raises:
        ValueError: there is no name.
    """
    name, colon, changes = text.partition(":")
    if not colon or not name.strip():
        raise InvalidValue(f"variant={text!r}: must read 'name: field=value field=value'")
    return name.strip(), changes.split()


def compare(
    config: TrainConfig | RewardConfig,
    variants: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    points: Sequence[int],
    run_dir: str | Path,
    prompts: Sequence[Prompt] = (),
    device: str | None = None,
    pairs: int = 0,
) -> dict[str, Any]:
    """Trains every variant with every seed and measures at each point.

    Args:
        config: what all runs share; its `steps` and `optimizer.decay_steps` are replaced.
        variants: name -> `config.override` strings.
        seeds: of weights, order, noise and pictures.
        points: steps after which a run is measured, ascending.
        run_dir: gets a folder for each run and `comparison.json`.
        prompts: GenEval-lite prompts, drawn once each in 20 steps; none: only losses are measured. A run of rewards has
            its own, `validation_prompts` of each category.
        device: of the training.
        pairs: minimal pairs of each fact whose captions are exchanged (see `evaluation/sensitivity.py`); 0: none.

    Returns:
        What `comparison.json` holds: `points`, `batch_size`, `variants`, `prompts`, `pairs`, `config` and `runs`.
        These are a list with a row for each variant, seed and point: `step`, `samples`, `trained_steps` since the
        point before or, if it was stopped on the way, since it went on, and their `seconds`, the fields of
        the stage's `validate`, with pairs `told`, the share of noisy pictures that their own caption fits better than
        the other, for each fact, and with prompts `geneval` and `categories`; of rewards what the last roll-out showed.

    Raises:
        ValueError: no variants, seeds or points, points out of order, an unknown field, or a folder that holds another
            comparison.
    """
    if not variants or not seeds or not points or list(points) != sorted(set(points)) or points[0] < 1:
        raise InvalidValue(f"points={list(points)}: need variants, seeds and ascending steps from 1 on")
    places = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in variants}
    if len(set(places.values())) < len(variants) or "" in places.values():
        raise InvalidValue(f"variant: {', '.join(variants)} need letters or digits that tell their folders apart")
    if len(set(seeds)) < len(seeds):
        raise InvalidValue(f"seeds={list(seeds)}: each once; a run counted twice would look like certainty")
    rewarded = isinstance(config, RewardConfig)
    if rewarded and (prompts or pairs):
        raise InvalidValue("prompts, pairs: a run of rewards is measured on its own held-out prompts alone")
    optimizer = dataclasses.replace(config.optimizer, decay_steps=0)
    config = dataclasses.replace(config, steps=points[-1], optimizer=optimizer, tracker="none")
    if rewarded:
        config = dataclasses.replace(config, stop_drop=0.0, stop_diversity=0.0)
    chosen = {name: override(config, list(changes)) for name, changes in variants.items()}
    runs = [(name, dataclasses.replace(one, seed=seed)) for seed in seeds for name, one in chosen.items()]
    run_dir = Path(run_dir)
    check_output(run_dir, "folder")
    for name, one in runs:
        folder = run_dir / f"{places[name]}-seed{one.seed}"
        with run_lock(folder):
            _run(one, points, folder, prompts, pairs, device, name)
    about = {"points": list(points), "batch_size": config.batch_size, "prompts": len(prompts), "pairs": pairs}
    about |= {"variants": {name: list(changes) for name, changes in variants.items()}, "config": to_dict(config)}
    return _collect(run_dir, about)


def _run(
    config: TrainConfig | RewardConfig, points, folder: Path, prompts, pairs: int, device: str | None, variant: str
) -> None:
    """One run; goes on from its last checkpoint."""
    file, recipe = folder / "rows.jsonl", folder / "recipe.json"
    rewarded = isinstance(config, RewardConfig)
    told = {"variant": variant, **to_dict(config), "prompts": len(prompts), "pairs": pairs}
    text = json.dumps(told if rewarded else told | {"steps": None})  # only rewards have a schedule that knows the end
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != text:
        raise InvalidValue(f"run_dir={folder}: holds a run with other settings; name another folder")
    rows = _rows(file)
    missing = [point for point in points if point not in {row["step"] for row in rows}]
    if not missing:
        return
    engine = Engine(config, learner(config) if rewarded else Pretrain, folder, resume=True, device=device)
    if engine.global_step > missing[0]:
        raise InvalidValue(
            f"points: {folder} has been trained to step {engine.global_step}; only later points can be added"
        )
    write_atomically(recipe, text)  # after all that a person can mend
    for point in missing:
        begin, before = time.perf_counter(), engine.global_step
        while engine.global_step < point:
            try:
                engine.step()
                if engine.global_step % config.log_every == 0 or engine.global_step == point:
                    engine.health.check()  # an accelerator's steps do not look themselves
            except NotFiniteScores:  # a judge has: that says nothing of the variant
                raise
            except NotFinite as error:  # this variant has come to nothing, which is a result; the others go on
                warnings.warn(f"{folder}: {error}", stacklevel=2)
                with MetricsWriter(file) as kept:
                    for one in missing[missing.index(point) :]:
                        row = {"variant": variant, "seed": config.seed, "step": one, "samples": one * config.batch_size}
                        kept.write(**row, trained_steps=0, seconds=0.0, validation_loss=None)
                return
            if engine.global_step % config.checkpoint_every == 0 and engine.global_step < point:
                engine.save()
        trained = {"trained_steps": engine.global_step - before, "seconds": round(time.perf_counter() - begin, 2)}
        row = {"variant": variant, "seed": config.seed, "step": point, "samples": point * config.batch_size}
        row |= trained | engine.validate()
        if rewarded:
            row |= engine.stage.report
        if pairs:
            with engine.averaged():
                readings = caption_sensitivity(engine.stage.pipeline(), pairs, TOLD_AT)
            own = ([one.right for one in readings if one.fact == fact] for fact in FACTS)
            row |= {"told": {fact: sum(some) / len(some) for fact, some in zip(FACTS, own, strict=True)}}
        if prompts:
            with engine.averaged():
                options = {"seeds": [config.seed], "steps": 20, "guidance": config.guidance, "progress": False}
                found = evaluate(engine.stage.pipeline(), prompts, **options).score
            row |= {"geneval": found.overall, "categories": found.categories}
        engine.save()
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # a run blew up
        with MetricsWriter(file) as kept:
            kept.write(**row)


def _rows(file: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(file)) if file.is_file() else []


def _collect(run_dir: Path, about: dict[str, Any]) -> dict[str, Any]:
    """All rows of the folder, those of other processes too, in one file."""
    rows = [row for file in sorted(run_dir.glob("*/rows.jsonl")) for row in _rows(file)]
    result = about | {"runs": [row for row in rows if row["variant"] in about["variants"]]}
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(run_dir / RESULT, text)
    return json.loads(text)


def summary(result: Mapping[str, Any]) -> list[tuple[str, int, int, str, str, str, str]]:
    """Rows (variant, step, seeds, minutes, loss, shapes told, GenEval-lite): means over seeds with intervals."""
    table = []
    for name in result["variants"]:
        minutes = 0.0
        for before, step in zip([0, *result["points"]], result["points"], strict=False):
            own = [row for row in result["runs"] if (row["variant"], row["step"]) == (name, step)]
            paces = [row["seconds"] / row["trained_steps"] for row in own if row["trained_steps"]]
            minutes += (step - before) * (sum(paces) / len(paces) if paces else math.nan) / 60
            told = [row.get("told", {}).get("shapes") for row in own]
            found = [row.get("validation_loss") for row in own], told, [row.get("geneval") for row in own]
            shown = (_shown([value for value in values if value is not None]) for values in found)
            table.append((name, step, len(own), f"{minutes:.1f}", *shown))
    return table


def _shown(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    mean, half = interval(values)
    return f"{mean:.4f} ± {half:.4f}"


def spread_prompts(prompts: Sequence[Prompt], each: int) -> list[Prompt]:
    """`each` prompts of every category, spread evenly over its list."""
    chosen = []
    for category in CATEGORIES:
        own = [prompt for prompt in prompts if prompt.tag == category]
        chosen += [own[math.floor(k * len(own) / each)] for k in range(min(each, len(own)))]
    return chosen
