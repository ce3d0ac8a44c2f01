"""The lite model from nothing: every training of it, one after the other, in one folder.

    autoencoder, language-model, vision   runs of the three encoders
    encoders/                             the first two as one folder: what both stages read
    stage1/, stage2/                      runs of notebooks 09 and 10, weights in training/final
    notebooks/                            both notebooks as they were executed
    weights/                              encoders and transformer as a pipeline, for `nitro-e sample --model`
    evaluation.json, uncurated.png        GenEval-lite of these weights
    rewards/                              what these weights learned from rewards: an adapter
    drawn/, drawn-more/                   what they drew for students after that, more of it for the second
    distill/, sprint/                     the students of four steps, and of 1, 2 and 4
    students.json                         GenEval-lite after rewards and of both students, without guidance
    reproduce.json                        seconds of each step over all its attempts, on what, and where its result is

A step that came to its end is left out and a training goes on from its checkpoint, so the same command continues a
chain that was killed. Scale "smoke" does everything in a minute or two and learns nothing; "lite" is the real one. The
full model's encoders are published; its two stages are notebook 17.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from nitro_e_lite import config as configuration
from nitro_e_lite import presets, runtime
from nitro_e_lite.course import notebooks
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.geneval_lite import evaluate
from nitro_e_lite.experiments.compare import spread_prompts
from nitro_e_lite.experiments.launch import check_processes, child_environment, launch, run_processes
from nitro_e_lite.experiments.ship import ship
from nitro_e_lite.files import check_output, read_json, read_jsonl, run_lock, write_atomically
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.scenes.geneval import Prompt, load_prompts
from nitro_e_lite.stages.autoencoder import AutoencoderConfig
from nitro_e_lite.stages.language_model import LanguageModelConfig
from nitro_e_lite.stages.vision import VisionConfig
from nitro_e_lite.training.precision import faster_precision

SCALES = ("smoke", "lite")
STAGES = {"stage1": "09_repa_pretraining", "stage2": "10_fine_tuning_ema"}
DRAWN = {"smoke": {"drawn": 8, "drawn-more": 2}, "lite": {"drawn": 6000, "drawn-more": 14000}}
"""Pictures that students learn from, by folder: the first student from the first, the second from both."""
TEACHER = {"steps": 8, "guidance": 0.0}  # how they are drawn
JUDGED = {
    "pipeline": "stages 1 and 2",
    "stage 3, rewards": "rewards",
    "stage 4, distillation": "distill",
    "SANA-Sprint": "sprint",
}
"""Step after which there is something to draw with -> how its score is called."""
ENCODERS = {"autoencoder": AutoencoderConfig, "language-model": LanguageModelConfig, "vision": VisionConfig}
_SMALL = {  # overrides of the encoders at smoke scale
    "autoencoder": ["steps=2", "batch_size=2"],
    "language-model": ["steps=2", "batch_size=4"],
    "vision": ["steps=2", "batch_size=2", "width=32", "layers=1", "heads=2", "kinds_scenes=32", "probe_scenes=16"],
}


@dataclass(frozen=True)
class Step:
    """One link of the chain: `work` makes `result`, a path below the run folder."""

    name: str
    result: str
    work: Callable[[], Any]


class Chain:
    """The steps of one scale in one folder.

    Args:
        preset: "smoke" or "lite".
        run_dir: folder of the chain.
        seed: of everything.
        devices: processes of a training of the transformer.
        overrides: changes of both stages' training configuration.
        say: gets a line about a stage in training every minute; the encoders show bars of their own.

    Raises:
        FileNotFoundError: there are no notebooks here, because this is no checkout.
        ValueError: another preset, an unknown override, fewer than one process, or the folder holds a chain with other
            settings.
    """

    def __init__(
        self,
        preset: str,
        run_dir: str | Path,
        seed: int = 0,
        devices: int = 1,
        overrides: list[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ):
        if preset not in SCALES:
            raise InvalidValue(f"preset={preset!r}: must be smoke or lite; notebook 17 is for the full model")
        notebooks.notebooks_dir()
        check_processes(devices, None)
        for stage in ("base", "finetune"):  # now, and not after the encoders
            configuration.override(presets.preset(stage, preset), [*overrides, f"seed={seed}"])
        check_output(Path(run_dir), "folder")
        self.preset, self.seed, self.devices, self.say = preset, seed, devices, say
        self.overrides, self.run_dir = list(overrides), Path(run_dir).resolve()
        settings = {"preset": preset, "seed": seed, "overrides": self.overrides, "recipe": self._recipe()}
        self.report = {"settings": settings, "steps": {}}
        self._file = self.run_dir / "reproduce.json"
        if self._file.is_file():
            before = read_json(self._file)
            if before["settings"] != self.report["settings"]:
                now = self.report["settings"]
                told = f"holds a chain with {before['settings']}, this one has {now}"
                raise InvalidValue(f"run_dir={run_dir}: {told}; name another folder")
            self.report = before

    def steps(self) -> list[Step]:
        """The chain, in order."""
        return [
            Step("autoencoder", "autoencoder/final/vae/config.json", lambda: self._train_encoder("autoencoder")),
            Step(
                "language model",
                "language-model/final/text_encoder/config.json",
                lambda: self._train_encoder("language-model"),
            ),
            Step("vision model", "vision/final/probe.json", lambda: self._train_encoder("vision")),
            Step("encoders together", "encoders/tokenizer", self._join_encoders),
            Step("stage 1, REPA", "notebooks/09_repa_pretraining.ipynb", lambda: self._stage("stage1")),
            Step("stage 2, EMA", "notebooks/10_fine_tuning_ema.ipynb", lambda: self._stage("stage2")),
            Step("pipeline", "weights/SHA256SUMS", self._assemble),
            Step("evaluation", "evaluation.json", self._evaluate),
            Step("stage 3, rewards", "rewards/final/adapter_config.json", self._rewards),
            Step("drawn set", "drawn/done.json", lambda: self._draw("drawn")),
            Step("stage 4, distillation", "distill/final/config.json", lambda: self._student("distill", "drawn")),
            Step("more of it", "drawn-more/done.json", lambda: self._draw("drawn-more")),
            Step("SANA-Sprint", "sprint/final/config.json", lambda: self._student("sprint", "drawn", "drawn-more")),
            Step("students' evaluation", "students.json", self._evaluate_students),
        ]

    def run(self) -> Iterator[tuple[Step, float | None]]:
        """Works through the chain; yields each step with the seconds of all attempts, or None where it was done."""
        with run_lock(self.run_dir):
            for step in self.steps():
                cost = self.report["steps"].setdefault(step.name, {"seconds": 0.0})
                if "result" in cost and (self.run_dir / step.result).exists():
                    yield step, None
                    continue
                begin, before = time.perf_counter(), cost["seconds"]
                cost["on"] = sorted(
                    {*cost.get("on", []), f"{self.devices} x {runtime.device_name(runtime.pick_device(None))}"}
                )
                note = partial(self._note, cost, begin - before)
                try:
                    with repeated(note):  # a step that was killed has cost something too
                        step.work()
                    cost["result"] = step.result
                finally:
                    note()
                yield step, cost["seconds"]

    def _note(self, cost: dict[str, Any], begin: float) -> None:
        cost["seconds"] = round(time.perf_counter() - begin, 1)
        write_atomically(self._file, json.dumps(self.report, indent=1) + "\n")

    def scores(self) -> list[dict[str, Any]]:
        """What the chain came to, and after how long.

        Returns:
            For each of `JUDGED` in its order: `name`, `minutes` of all steps so far but for evaluations, and of its
            score `overall`, `low`, `high`, `images`, `steps` and `guidance`.
        """
        base = read_json(self.run_dir / "evaluation.json")
        found, minutes, rows = {"stages 1 and 2": base} | read_json(self.run_dir / "students.json"), 0.0, []
        for step in self.steps():
            if "evaluation" in step.name:
                continue
            minutes += self.report["steps"][step.name]["seconds"] / 60
            if name := JUDGED.get(step.name):
                card = {key: found[name][key] for key in ("overall", "low", "high", "images", "steps", "guidance")}
                rows.append({"name": name, "minutes": minutes} | card)
        return rows

    def machines(self) -> str:
        """Processes and devices that its steps ran on."""
        return " and ".join(sorted({one for cost in self.report["steps"].values() for one in cost.get("on", [])}))

    def _recipe(self) -> str:
        """Names all settings of all trainings: a chain that goes on with others would be a patchwork."""
        made = [self._encoder(run) for run in ENCODERS]
        made += [presets.preset(stage, self.preset) for stage in ("base", "finetune", "rewards", "distill", "sprint")]
        text = json.dumps([configuration.to_dict(one) for one in made])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _encoder(self, run: str) -> configuration.RunConfig:
        small = _SMALL[run] if self.preset == "smoke" else []
        return configuration.override(ENCODERS[run](seed=self.seed), small)

    def _train(self, run: str, settings: configuration.RunConfig) -> None:
        """A training in a folder of this name; it goes on from where it was."""
        with watched(self.run_dir / run, self.say):
            launch(settings, self.run_dir / run, processes=self.devices, resume=True)

    def _train_encoder(self, run: str) -> None:
        self._train(run, self._encoder(run))

    def _join_encoders(self) -> None:
        """In float16, as they ship: all that is trained on them later finds the same bits in shipped weights."""
        places = {"vae": "autoencoder", "text_encoder": "language-model", "tokenizer": "language-model"}
        for part, run in places.items():
            target = self.run_dir / "encoders" / part
            shutil.copytree(self.run_dir / run / "final" / part, target, dirs_exist_ok=True)
            for file in target.glob("*.safetensors"):
                half = {name: value.half() for name, value in load_file(file).items()}
                save_file(half, file, {"format": "pt"})

    def _stage(self, stage: str) -> None:
        """Executes the notebook of a stage with its lite parameters and the folders of this chain."""
        name = STAGES[stage]
        file = notebooks.notebooks_dir() / "params" / f"{name}.lite.yaml"
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values |= {"preset": self.preset, "seed": self.seed, "devices": self.devices, "overrides": self.overrides}
        values |= {"run_dir": str(self.run_dir / stage), "encoders": str(self.run_dir / "encoders")}
        if stage == "stage1":
            values["vision"] = str(self.run_dir / "vision" / "final")
        else:
            values["base"] = str(self.run_dir / "stage1" / "training")
        with tempfile.TemporaryDirectory() as folder:
            parameters = Path(folder) / file.name
            parameters.write_text(yaml.safe_dump(values), encoding="utf-8")
            with watched(self.run_dir / stage / "training", self.say):
                executed = notebooks.execute(notebooks.notebooks_dir() / f"{name}.ipynb", parameters)
        target = self.run_dir / "notebooks" / f"{name}.ipynb"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _assemble(self) -> None:
        shutil.copytree(self.run_dir / "encoders", self.run_dir / "weights", dirs_exist_ok=True)
        ship(self.run_dir / "stage2" / "training", str(self.run_dir / "weights"))

    def _rewards(self) -> None:
        changes = [f"seed={self.seed}", f"start_from={json.dumps(str(self.run_dir / 'weights'))}"]
        if self.preset == "smoke":  # its pictures show nothing yet, and a reward that is constant stops a run
            changes.append("rewards=[[redness, 1.0]]")
        self._train("rewards", configuration.override(presets.preset("rewards", self.preset), changes))

    def _draw(self, name: str) -> None:
        """The teacher's pictures, its states at the student's levels; a drawing that was killed goes on."""
        student, out, counts = presets.preset("distill", self.preset), self.run_dir / name, DRAWN[self.preset]
        seed = self.seed + list(counts).index(name)
        dtype = "bfloat16" if faster_precision(runtime.pick_device(None)) == "bf16" else "float32"
        options = TEACHER | {"shift": student.shift, "student_steps": student.sampler_steps, "seed": seed}
        options |= {"count": counts[name], "model": self.run_dir / "rewards", "dtype": dtype}
        words = ["-m", "nitro_e_lite.cli", "data", "draw", str(out)]
        words += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        run_processes(words, self.devices, child_environment(self.devices, None), self.say, log=out / "console.log")
        (out / "done.json").write_text(json.dumps({"dtype": dtype}) + "\n", encoding="utf-8")

    def _student(self, stage: str, *drawn: str) -> None:
        """Trains a student; its gate on the drawn set asks for what this chain's own model scores."""
        card = json.loads((self.run_dir / "evaluation.json").read_text(encoding="utf-8"))
        encoders = str(self.run_dir / "encoders")
        changes = [f"teacher={json.dumps(str(self.run_dir / 'rewards'))}", f"gate_card={card['overall']}"]
        changes += [
            f"data.folders={json.dumps([str(self.run_dir / name) for name in drawn])}",
            f"data.encoders={json.dumps(encoders)}",
        ]
        recipe = presets.preset(stage, self.preset)
        if recipe.start_from:  # a shipped student: here this chain's own
            changes.append(f"start_from={json.dumps(str(self.run_dir / 'distill'))}")
        self._train(stage, configuration.override(recipe, [f"seed={self.seed}", *changes]))

    def _evaluate_students(self) -> None:
        found = {}
        for stage in ("rewards", "distill", "sprint"):
            prompts, seeds = self._prompts()
            found[stage] = evaluate(load_pipeline(self.run_dir / stage), prompts, seeds=seeds).card
        (self.run_dir / "students.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _prompts(self) -> tuple[list[Prompt], tuple[int, ...]]:
        return (spread_prompts(load_prompts(), 1), (0,)) if self.preset == "smoke" else (load_prompts(), (0, 1))

    def _evaluate(self) -> None:
        prompts, seeds = self._prompts()
        found = evaluate(load_pipeline(self.run_dir / "weights"), prompts, seeds=seeds, keep_images=True)
        found.grid().save(self.run_dir / "uncurated.png")
        found.save(self.run_dir / "evaluation.json")


@contextmanager
def watched(training: Path, say: Callable[[str], None], every: float = 60.0) -> Iterator[None]:
    """Inside, `say` gets a line about the run in `training` every so many seconds, while it is under way."""
    last = None

    def look() -> None:
        nonlocal last
        line = progress(training)
        if line and line != last:
            say(line)
            last = line

    with repeated(look, every):
        yield


@contextmanager
def repeated(action: Callable[[], None], every: float = 60.0) -> Iterator[None]:
    """Inside, `action` is called every so many seconds."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(every):
            action()

    thread = threading.Thread(target=repeat, name="every minute", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress(training: Path) -> str | None:
    """One line about a training run: step, loss, speed, time left, newest picture; None before it begins.

    Args:
        training: folder of the run.
    """
    settings, metrics = training / "config.json", training / "metrics.jsonl"
    if not (settings.is_file() and metrics.is_file()):
        return None
    rows = [row for row in read_jsonl(metrics) if "samples_per_second" in row]
    if not rows:
        return None
    config, row = json.loads(settings.read_text(encoding="utf-8"))["config"], rows[-1]
    minutes = (config["steps"] - row["step"]) * config["batch_size"] / row["samples_per_second"] / 60
    losses = (row.get(name) for name in ("loss", "student_loss"))  # of what learns; none where it was not finite
    loss = next((f", loss {one:.3f}" for one in losses if one is not None), "")
    line = f"step {row['step']:,} of {config['steps']:,}{loss}"
    line += f", {row['samples_per_second']:.1f} samples/s, {minutes:,.0f} minutes left"
    pictures = sorted((training / "samples").glob("*.png"))
    return f"{line}; newest picture: {pictures[-1]}" if pictures else line
