"""The playground of notebook 13: students of few steps side by side, on the same noises, by minutes of training.

`nitro-e course playground` reads runs, draws and scores each at a few moments of its training, and keeps what a page
without any weights can show. In `course/playground/` lie

    playground.json    captions; by method the scores and moments; by stage the arms of its ablation with the scores of
                       their seeds; of runs that failed on purpose the settings that the gates need
    METHOD-NUMBER.jpg  what a method drew at one moment of its training: the captions, two in a row
    FAILED.jsonl       the metrics of such a run, as far as gates and figures read them

A *moment* is a place where a run has left weights: before its first step, a snapshot, a checkpoint, its end. All
methods draw the same captions from the same noises and are judged on the same prompts. The minutes of a run that goes
on from another one of the page begin where that one ended.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from nitro_e_lite import config, files, presets, viz
from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.evaluation import cards, tables
from nitro_e_lite.evaluation.geneval_lite import draw, evaluate
from nitro_e_lite.inference.loading import load_pipeline, load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.schedules import Sampler
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.scenes.geneval import Score
from nitro_e_lite.scenes.verifier import VERSION
from nitro_e_lite.stages.gates import few_prompts, replay
from nitro_e_lite.stats import share_interval

FOLDER, INDEX = Path(__file__).with_suffix(""), "playground.json"
CAPTIONS = (
    "three small red stars",
    "a blue heart above a red square",
    "a green circle",
    "a yellow star and a purple circle",
)
SIDE = 128  # pixels of a picture in a frame
FINAL, CHECKPOINT = "final", "weights.safetensors"
LOGGED = ("step", "seconds", "loss", "student_loss", "student_tangent_norm", "student_adversarial", "heads_right")
JUDGED = ("distance", "teacher_distance", "geneval", "teacher_geneval")


@dataclass(frozen=True)
class Shown:
    """A training run and how it is asked to draw.

    Attributes:
        name: of the method.
        run: folder.
        steps: that it draws in; None: its own.
    """

    name: str
    run: Path
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Shown:
        """`NAME=RUN` or `NAME=RUN@STEPS`.

        Raises:
            ValueError: another text, or a folder that is no run of a student, or one that says too little of itself.
        """
        found = re.fullmatch(r"([^=]+)=(.+?)(?:@(\d+))?", text)
        if not found or found[3] == "0":
            raise InvalidValue(f"{text!r}: must read NAME=RUN or NAME=RUN@STEPS")
        shown = cls(found[1].strip(), Path(found[2]), int(found[3]) if found[3] else None)
        if (stage := shown.trained.get("stage")) not in ("distill", "sprint", "rewards"):
            raise InvalidValue(f"{found[2]}: is no run of distill, sprint or rewards")
        needed = {"guidance", "rollout_steps", "start_from"} if stage == "rewards" else {"sampler_steps", "teacher"}
        if missing := (needed | {"log_every", "steps"}) - shown.trained.keys():
            raise InvalidValue(f"{found[2]}: its config.json does not say {', '.join(sorted(missing))}")
        shown.rows()
        return shown

    @property
    def about(self) -> dict[str, Any]:
        """What the run says of itself."""
        return files.read_run(self.run / "config.json")

    @property
    def trained(self) -> dict[str, Any]:
        """Its settings."""
        return self.about.get("config") or {}

    @property
    def sampler(self) -> Sampler:
        """How the model that it begins with draws beside it: in as many steps, guided only where its roll-outs are."""
        own = self.trained.get("sampler_steps") or self.trained.get("rollout_steps")
        guidance = self.trained["guidance"] if self.trained["stage"] == "rewards" else 0.0
        drawn = self.about.get("drawn", {}).get("sampler", {})
        return Sampler(self.steps or own, guidance, self.trained.get("shift", drawn.get("shift", 1.0)))

    def rows(self) -> list[dict[str, Any]]:
        """Its metrics; `minute` is added, of training, all processes together.

        Raises:
            ValueError: there are none, or what should be a number is something else.
        """
        path = self.run / "metrics.jsonl"
        rows = list(files.read_jsonl(path))
        if not rows:
            raise InvalidValue(f"{path}: is empty; the run has taken no step")
        for row in rows:
            for name in ("step", *(name for name in (*LOGGED, *JUDGED) if name in row)):
                value = row.get(name)
                if not isinstance(value, int if name == "step" else int | float | None):
                    raise InvalidValue(f"{path}: {name}={value!r:.80}: must be a number")
        each = self.about.get("processes", 1) / 60
        known = [(0, 0.0)] + [(row["step"], row["seconds"] * each) for row in rows if "seconds" in row]
        minutes = np.interp([row["step"] for row in rows], *zip(*known, strict=True))
        return [row | {"minute": float(minute)} for row, minute in zip(rows, minutes, strict=True)]

    def moments(self, count: int) -> list[tuple[int, Path | None]]:
        """Up to `count` steps at which weights are there, spread over the run, and where; None: before the first."""
        found = {
            int(path.name.removeprefix("step-")): path
            for path in sorted(self.run.glob("*/step-*"))
            if path.is_dir() and not (self.trained["stage"] == "rewards" and (path / CHECKPOINT).is_file())
        }
        if (self.run / FINAL).is_dir():
            found[self.rows()[-1]["step"]] = self.run / FINAL
        if not found:
            raise MissingFile(f"{self.run}: holds no snapshot, checkpoint or final weights to draw with")
        steps = [0, *sorted(found)]
        chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int))
        return [(steps[k], found.get(steps[k])) for k in chosen]

    def pipeline(self, weights: Path | None) -> tuple[NitroEPipeline, Sampler]:
        """What draws with these weights, and how."""
        if weights is None:  # the model that the run began with, in as many steps
            pipeline = load_pipeline(self.trained.get("start_from") or self.trained["teacher"], "cpu")
            return pipeline, pipeline.sampler(*vars(self.sampler).values())
        if not (weights / CHECKPOINT).is_file():
            pipeline = load_pipeline(weights, "cpu")
        else:
            with tempfile.TemporaryDirectory() as folder:  # a checkpoint as the run that it would end as
                shutil.copy(self.run / "config.json", folder)
                self._student(weights).save_pretrained(Path(folder) / FINAL)
                pipeline = load_pipeline(folder, "cpu")
        return pipeline, pipeline.sampler(self.sampler.steps)

    def _student(self, checkpoint: Path) -> EMMDiTTransformer2DModel:
        named = {name: self.trained.get(name, False) for name in ("dense_time", "guidance_embedding")}
        student = EMMDiTTransformer2DModel.like(load_transformer(self.trained["teacher"]), **named)
        average = checkpoint / "ema.safetensors"
        weights = load_file(average if average.is_file() else checkpoint / CHECKPOINT)
        mine = {re.sub(r"^student\.(transformer\.)?", "", name): value for name, value in weights.items()}
        own = {name: mine[name] for name, _ in student.named_parameters()}
        student.load_state_dict(student.state_dict() | own)
        return student


def write(
    shown: Sequence[Shown],
    failed: Sequence[Shown] = (),
    arms: Sequence[Shown] = (),
    folder: Path = FOLDER,
    moments: int = 4,
    prompts: int = 20,
    seed: int = 0,
) -> Iterator[str]:
    """Draws, scores and writes the page's data; what is in the folder is replaced.

    Args:
        shown: methods in the order of the page; one that goes on from another comes after it.
        failed: runs that were meant to fail.
        arms: finished runs of an ablation; those of one name are its seeds.
        folder: where to.
        moments: of a method.
        prompts: held-out prompts of each category at each moment; the scores of a run's own metrics count where they
            are of as many. 0: those alone; then there can be no arms.
        seed: of the noises.

    Yields:
        A line on what was done, one after the other.

    Raises:
        FileNotFoundError: a run without weights.
        FileExistsError: the folder holds something else than such data.
        ValueError: two methods of one name, a failed run without gates, or arms without scores.
    """
    folder = Path(folder).resolve()
    files.check_replaceable(folder, INDEX)
    for some in (shown, failed):
        names = [_slug(one) for one in some]
        if twice := sorted(name for name in set(names) if names.count(name) > 1):
            raise InvalidValue(f"{twice[0]}: two names are one as the name of a file; give each its own")
    if unfit := [one for one in failed if one.trained["stage"] == "rewards"]:
        raise InvalidValue(f"failed: {unfit[0].run} is a run of rewards; the gates of distill and sprint are shown")
    found: dict[str, Any] = {"captions": CAPTIONS, "seed": seed, "verifier": VERSION}
    found |= {"methods": [], "arms": {}, "failed": []}
    ends: dict[Path, float] = {}
    with files.atomic_folder(folder, "what was there is intact") as partial:
        for one in shown:
            before = ends.get(Path(str(one.trained.get("start_from"))).absolute(), 0.0)
            method = _method(one, partial, before, moments, prompts, seed)
            ends[one.run.absolute()] = method["frames"][-1]["minute"]
            found["methods"].append(method)
            yield f"{one.name}: {len(method['frames'])} moments, {len(method['points'])} scores"
        yield from _add_arms(arms, found["arms"], prompts, seed)
        for one in failed:
            found["failed"].append(_failed(one, partial))
            yield f"{one.name}: kept"
        files.write_atomically(partial / INDEX, json.dumps(found, indent=1) + "\n")
    for name, said in diagnoses(found, folder).items():
        yield f"{name}: {said}"


def write_arms(arms: Sequence[Shown], folder: Path = FOLDER, prompts: int = 20, seed: int = 0) -> Iterator[str]:
    """Scores an ablation anew for data that is there; the arms of other stages and all else stay.

    Args, yields and errors are those of `write`; also

    Raises:
        FileNotFoundError: there is no data.
    """
    folder = Path(folder).resolve()
    found = files.read_json(folder / INDEX)
    anew = {one.trained["stage"] for one in arms}
    known = {stage: some for stage, some in found["arms"].items() if stage not in anew}
    with files.only_writer(folder):
        yield from _add_arms(arms, known, prompts, seed)
        files.write_atomically(folder / INDEX, json.dumps(found | {"arms": known}, indent=1) + "\n")


def _add_arms(arms: Sequence[Shown], found: dict[str, Any], prompts: int, seed: int) -> Iterator[str]:
    """Scores the end of each run: GenEval-lite and KID, floor beside it; one asked for its steps says them."""
    if arms and not prompts:
        raise InvalidValue("prompts=0: arms are told apart by their scores; leave the arms out, or have some drawn")
    for one in arms:
        step, weights = one.moments(10**6)[-1]
        pipeline, sampler = one.pipeline(weights)
        card = evaluate(
            pipeline, few_prompts(prompts), seeds=(seed,), **vars(sampler), appearance=True, progress=False
        ).card
        name = _name({"name": one.name, "steps": one.steps}) if one.steps else one.name
        floor = _short(card["appearance"]["kid_floor"][0])
        new = {"n": card["images"], "scores": [], "minutes": [], "kid": [], "kid_floor": floor}
        arm = found.setdefault(one.trained["stage"], {}).setdefault(name, new)
        arm["scores"].append(_short(card["overall"]))
        arm["minutes"].append(_short(one.rows()[-1]["minute"]))
        arm["kid"].append(_short(card["appearance"]["kid"][0]))
        yield f"{name}: {card['overall']:.3f} after {step} steps"


def _method(one: Shown, folder: Path, before: float, moments: int, prompts: int, seed: int) -> dict[str, Any]:
    rows, trained = one.rows(), one.trained
    minute_of = {0: 0.0} | {row["step"]: row["minute"] for row in rows}
    each = trained.get("gate_prompts") or trained.get("validation_prompts", 0)
    own = one.sampler.steps == (trained.get("sampler_steps") or trained.get("rollout_steps")) and prompts in (0, each)
    points, frames = {}, []
    if own and (start := next((row["teacher_geneval"] for row in rows if "teacher_geneval" in row), None)) is not None:
        points[0] = _point(before, start, 6 * each)
    for row in rows:
        if own and "geneval" in row:
            points[row["step"]] = _point(before + row["minute"], row["geneval"], 6 * each)
    for step, weights in one.moments(moments):
        pipeline, sampler = one.pipeline(weights)
        minute = before + minute_of.get(step, rows[-1]["minute"])
        pictures = draw(pipeline, [(caption, seed + k) for k, caption in enumerate(CAPTIONS)], sampler)
        name = f"{_slug(one)}-{len(frames)}.jpg"
        _tile(pictures).save(folder / name, quality=82, optimize=True)
        frames.append({"minute": _short(minute), "picture": name})
        if prompts:
            score = _score(pipeline, sampler, prompts, seed)
            points[step] = _point(minute, score.overall, score.images)
    said = {"name": one.name, "stage": trained["stage"], "steps": one.sampler.steps}
    return said | {"points": [points[step] for step in sorted(points)], "frames": frames}


def _score(pipeline: NitroEPipeline, sampler: Sampler, prompts: int, seed: int) -> Score:
    return evaluate(pipeline, few_prompts(prompts), seeds=(seed,), **vars(sampler), progress=False).score


def _point(minute: float, score: float, count: int) -> dict[str, float]:
    low, high = share_interval(round(score * count), count)
    values = {"minute": minute, "score": score, "low": low, "high": high}
    return {name: _short(value) for name, value in values.items()} | {"n": count}


def _failed(one: Shown, folder: Path) -> dict[str, Any]:
    """Copies its log and notes the lite preset's bounds for a run of its length: a window of half of its turns."""
    trained = one.trained
    rows = [{name: _short(row[name]) for name in (*LOGGED, *JUDGED) if name in row} for row in one.rows()]
    log = f"{_slug(one)}.jsonl"
    files.write_atomically(folder / log, "".join(json.dumps(row) + "\n" for row in rows))
    turns = sum("heads_right" in row for row in rows) * max(1, trained["log_every"] // 2)
    usual = presets.preset(trained["stage"], "lite").gate_window
    settings = [f"{name}={trained[name]}" for name in ("steps", "log_every", "sampler_steps")]
    settings.append(f"gate_window={max(1, min(usual, turns // 2))}")
    return {"name": one.name, "stage": trained["stage"], "settings": settings, "log": log}


def _slug(one: Shown) -> str:
    """Its name as part of the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", one.name.lower())


def _short(value: float | None) -> float | None:
    """Four digits; what is no finite number has none in JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _tile(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Four pictures, two in a row."""
    small = [Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for one in pictures]
    tile = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for k, one in enumerate(small):
        tile.paste(one, (k % 2 * SIDE, k // 2 * SIDE))
    return tile


# -- the page


def read(folder: Path = FOLDER) -> dict[str, Any]:
    """What `write` found; no methods where there is none yet."""
    path = folder / INDEX
    return files.read_json(path) if path.is_file() else {"captions": CAPTIONS, "methods": [], "arms": {}, "failed": []}


def curves(found: Mapping[str, Any]) -> Figure:
    """Score against minutes of training; the first point of a method is the model that it began with."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for color, style, method in zip(viz.COLORS, viz.LINE_STYLES, found["methods"], strict=False):
        minute, score, low, high = (
            np.array([point[name] for point in method["points"]]) for name in ("minute", "score", "low", "high")
        )
        axis.plot(minute, score, color=color, linestyle=style, marker="o", markersize=3, label=_name(method))
        axis.fill_between(minute, low, high, color=color, alpha=0.1, linewidth=0)
    axis.set(xlabel="core-minutes of training", ylabel="GenEval-lite", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _name(method: Mapping[str, Any]) -> str:
    return f"{method['name']}, {method['steps']} step{'s' * (method['steps'] > 1)}"


def shipped_run(name: str) -> Figure | None:
    """How a student of the package was trained, and what it scores beside the others: loss, held-out score, cards.

    Args:
        name: such as "lite-4step".

    Returns:
        None where the package does not ship it.
    """
    folder = files.weights_dir() / name
    if not (folder / "metrics.jsonl").is_file():
        return None
    rows = Shown(name, folder).rows()
    losses = [(row["minute"], row[name]) for row in rows for name in ("loss", "student_loss") if name in row]
    figure = Figure(figsize=(10.5, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    minutes, raw = zip(*losses, strict=True)
    axes[0].plot(minutes, raw, color="0.8", linewidth=0.8, linestyle="-")
    smooth = [np.mean(raw[max(0, k - 2) : k + 3]) for k in range(len(raw))]
    axes[0].plot(minutes, smooth, color=viz.COLORS[0], linestyle="-")
    axes[0].set(xlabel="core-minutes of training", title="loss")
    about = Shown(name, folder).about
    scored = [(row["minute"], row["geneval"]) for row in rows if "geneval" in row]
    if scored:
        (line,) = axes[1].plot(*zip(*scored, strict=True), marker=".", label="the student")
    if scored and (asked := 6 * about.get("config", {}).get("gate_prompts", 0)):
        bounds = [share_interval(round(asked * score), asked) for _, score in scored]
        shade = {"color": line.get_color(), "alpha": 0.12, "linewidth": 0}
        axes[1].fill_between([minute for minute, _ in scored], *zip(*bounds, strict=True), **shade)
    start = next((row["teacher_geneval"] for row in rows if "teacher_geneval" in row), None)
    if start is not None:
        axes[1].axhline(start, color="grey", linestyle=":", label="its teacher, as many steps")
    axes[1].legend(frameon=False, fontsize=7, loc=(0.35, 0.2))
    axes[1].set(xlabel="core-minutes of training", title="GenEval-lite on the way", xlim=(0, None), ylim=(0, 1))
    found = scores()
    for place, card in enumerate(found.values()):
        error = [[card["overall"] - card["low"]], [card["high"] - card["overall"]]]
        color = viz.COLORS[3 if card["model"] == name else 0]
        axes[2].errorbar(card["overall"], -place, xerr=error, fmt="o", color=color, capsize=2)
    axes[2].set(yticks=range(0, -len(found), -1), yticklabels=list(found), title="GenEval-lite, 2,400 pictures")
    return figure


def scores() -> dict[str, dict[str, Any]]:
    """The cards of 2,400 pictures, by model and passes of the transformer a picture, the most passes first."""
    every = [
        card
        for card in tables.lite_cards(cards.load()).values()
        if card["images"] == 2400 and card["dtype"] == "float32" and not card.get("fp8")
    ]
    ordered = sorted(every, key=tables.passes, reverse=True)
    counts = [tables.passes(card) for card in ordered]
    return {f"{card['model']}, {n} pass{'es' * (n > 1)}": card for card, n in zip(ordered, counts, strict=True)}


def film(found: Mapping[str, Any], folder: Path = FOLDER) -> Image.Image:
    """A row a method: before its training, on the way, at its end; each frame holds the captions, two in a row."""
    pictures, labels = [], []
    for method in found["methods"]:
        frames = method["frames"]
        for frame in [frames[0], frames[len(frames) // 2], frames[-1]]:
            pictures.append(_open(folder / frame["picture"]))
            labels.append(f"{_name(method)}: {_when(method, frame)}")
    whole = viz.image_grid(pictures, 3, labels)
    return whole.resize((3 * whole.width // 4, 3 * whole.height // 4), Image.Resampling.LANCZOS)


def slider(found: Mapping[str, Any], folder: Path = FOLDER) -> widgets.VBox:
    """The same page with a slider over the minutes: of each method what it drew last by then."""
    last = max(frame["minute"] for method in found["methods"] for frame in method["frames"])
    minute = widgets.IntSlider(0, 0, math.ceil(last), description="minute", continuous_update=True)
    frames = [widgets.Image(format="jpeg", width=2 * SIDE) for _ in found["methods"]]
    texts = [widgets.HTML() for _ in found["methods"]]

    def show(change: Mapping[str, Any] | None = None) -> None:
        for method, image, text in zip(found["methods"], frames, texts, strict=True):
            frame = [one for one in method["frames"] if one["minute"] <= minute.value or one is method["frames"][0]][-1]
            image.value = (folder / frame["picture"]).read_bytes()
            text.value = f"{_name(method)}<br>{_when(method, frame)}"

    minute.observe(show, "value")
    show()
    return widgets.VBox([minute, widgets.HBox([widgets.VBox(pair) for pair in zip(frames, texts, strict=True)])])


def diagnoses(found: Mapping[str, Any], folder: Path = FOLDER) -> dict[str, str]:
    """What the gates of the lite preset say of each run that was meant to fail."""
    said = {}
    for one in found["failed"]:
        bounds = config.override(presets.preset(one["stage"], "lite"), one["settings"])
        said[one["name"]] = str(replay(files.read_jsonl(folder / one["log"]), bounds) or "no gate failed")
    return said


def _when(method: Mapping[str, Any], frame: Mapping[str, Any]) -> str:
    return "before" if frame is method["frames"][0] else f"{frame['minute']:.0f} min"


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
