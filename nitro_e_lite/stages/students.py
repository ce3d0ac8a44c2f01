"""What every student of few steps shares: its teacher, the teacher's pictures, a discriminator, gates, a folder.

`distill.py` and `sprint.py` differ in what a step of the student is asked for. Both read the drawn set (`drawn.py`),
both may have their pictures judged by heads on the frozen teacher's features (`discriminator.py`), and both are held
against the teacher at as many steps without guidance (`gates.py`).
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from nitro_e_lite.config import OptimizerConfig, StudentConfig
from nitro_e_lite.data.batches import Ahead, Rows, batch_indices
from nitro_e_lite.data.drawn import DrawnBatch, DrawnSet, teacher_hash
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.geneval_lite import evaluate
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.model import flow
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.runtime import generator
from nitro_e_lite.stages.discriminator import FrozenFeatures, Heads
from nitro_e_lite.stages.gates import Balance, check_drawn, check_student, few_prompts, right_rows
from nitro_e_lite.training.distributed import mean_over_processes
from nitro_e_lite.training.engine import Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import build_optimizers, learning_rate_scale
from nitro_e_lite.viz import image_grid


@dataclass(frozen=True)
class StudentBatch(Rows):
    """What one process works on: pictures of the teacher and what is drawn at random for all students.

    Attributes:
        states: (B, K + 1, C, H, W), from the noise to the picture.
        text: features (B, L, Dc); as `read`, captions where no features are stored.
        wrong: the same of another picture's caption; as `read`, None without the heads' turn, then the picture's own.
        differs: whether that caption is another (B,).
        t, noise: at which pictures are judged, (B,) in flow time, and (B, C, H, W).
    """

    states: Tensor
    text: Tensor | list[str]
    wrong: Tensor | list[str] | None
    differs: Tensor
    t: Tensor
    noise: Tensor


class Student(Stage):
    """A student of few steps, its teacher, and who tells their pictures apart.

    Subclasses set `student`, put what learns into `modules`, and write `losses`, `ends`, `pipeline` and `export`.

    Args:
        config: what to train.
        placement: where.

    Attributes:
        encoders: the frozen encoders.
        drawn: the teacher's pictures.
        rows: how many of them are trained on; the rest are for validation.
        kept: the numbers of those; with `data.verified` without what the verifier finds wrong.
        teacher: frozen.
        features: its blocks, to look at pictures with.
        heads: the discriminator's; None without one.
        balance: the gate on it.

    Raises:
        FileNotFoundError: a folder of `config.data` holds no drawn pictures.
        ValueError: teacher, encoders and pictures do not belong together.
        GateFailed: the pictures score below the teacher's card.
    """

    student: EMMDiTTransformer2DModel

    def __init__(self, config: StudentConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.encoders = load_encoders(config.data.encoders, device=placement.device, dtype=placement.dtype)
        self.drawn = DrawnSet(config.data.folders, self.encoders)
        self.rows = len(self.drawn) - config.data.validation_rows
        self.teacher = load_transformer(config.teacher)
        self.teacher_hash = teacher_hash(self.teacher)
        self._check(self.teacher)
        check_drawn(self.drawn, self.encoders, config)
        verified = config.data.verified
        self.kept = right_rows(self.drawn, self.encoders, self.rows) if verified else np.arange(self.rows)
        if len(self.kept) < config.batch_size:
            raise InvalidValue(
                f"batch_size={config.batch_size}: the verifier finds only {len(self.kept)} of {self.rows} pictures "
                "right; look at some of them, or set data.verified=false"
            )
        torch.manual_seed(config.seed)
        self.features = FrozenFeatures(self.teacher, config.depths)
        self.modules: dict[str, Trainable] = {}
        self.heads = Heads(self.features, config.head_width) if config.adversarial_weight else None
        if self.heads is not None:
            self.modules["heads"] = self.trained(self.heads, config.heads, set())
        speed_up(self.teacher)
        nn.Module.to(self.teacher, placement.device, placement.dtype)
        self.balance = Balance(config, placement.device)
        self.step = 0
        self._reference: dict[str, float] = {}  # what the teacher reaches without guidance
        self._next = Ahead(self.read, config.steps)
        self._current: tuple[int, list] = (-1, [])

    def trained(self, module: nn.Module, config: OptimizerConfig, matrices: set[str]) -> Trainable:
        """A module as the engine takes it."""
        optimizers = partial(build_optimizers, matrices=matrices, config=config, dtype=self.placement.dtype)
        schedule = partial(learning_rate_scale, steps=self.config.steps, config=config)
        return Trainable(module, optimizers, schedule, config.clip)

    def start(self, *told: str) -> EMMDiTTransformer2DModel:
        """What the student starts as, not rounded and on the CPU: the teacher, or what `start_from` names.

        Args:
            *told: arguments of the network in which this kind of student may differ from both.

        Raises:
            ValueError: it is of another shape than the teacher, or is told what this student is not.
        """
        config = self.config
        found = load_transformer(config.start_from or config.teacher)
        before, wanted = (json.loads(model.to_json_string()) for model in (found, self.teacher))
        wanted |= {name: getattr(config, name) and before[name] for name in told}
        for name in wanted:
            if before.get(name) != wanted[name] and not name.startswith("_"):
                rule = (
                    f"has {name}={before.get(name)}, this student {wanted[name]}; start as another, or as the teacher"
                )
                raise InvalidValue(f"start_from={config.start_from!r}: {rule}")
        return found

    def _check(self, teacher: EMMDiTTransformer2DModel) -> None:
        config, card, size = self.config, self.drawn.card, teacher.config
        for name, there in (("in_channels", self.encoders.latent_channels), ("caption_channels", self.encoders.width)):
            if size[name] != there:
                raise InvalidValue(
                    f"data.encoders={config.data.encoders!r}: give {there}, the teacher's {name} is {size[name]}"
                )
        if self.drawn.data.shape[-1] != size.sample_size:
            raise InvalidValue(
                f"teacher={config.teacher!r}: draws {size.sample_size} latents a side, "
                f"{self.drawn.data.folders[0]} holds {self.drawn.data.shape[-1]}"
            )
        if card["teacher"] != self.teacher_hash:
            raise InvalidValue(
                f"teacher={config.teacher!r}: {self.drawn.data.folders[0]} was drawn by other weights; name those, "
                "or draw again"
            )
        if self.rows < config.batch_size:
            raise InvalidValue(
                f"batch_size={config.batch_size}: only {max(self.rows, 0)} of {len(self.drawn)} pictures are left "
                f"beside data.validation_rows={config.data.validation_rows}"
            )

    # -- what a step reads

    def batch(self, step: int, part: int) -> Any:
        """Part `part` of this process's rows of step `step`."""
        if self._current[0] != step:
            with self.placement.clock.measure("data"):
                read = self._next(step)
            self._current = (step, self.place(read).microbatches(len(self.placement.microbatches)))
        return self._current[1][part]

    def read(self, step: int) -> StudentBatch:
        """This process's rows of step `step`, in the host's memory: a function of seed, step and row alone."""
        rows = self.kept[batch_indices(self.config.seed, len(self.kept), self.config.batch_size, step)]
        found, wrong = self.drawn.batch(rows[self.mine]), None
        differs = torch.zeros(len(found.captions), dtype=torch.bool)
        if self.judges(step) and self.config.misaligned:
            others = self.drawn.batch(np.roll(rows, -1)[self.mine])
            differs = torch.tensor([a != b for a, b in zip(found.captions, others.captions, strict=True)])
            wrong = words_of(others)
        t, noise = self.judged_at(step)[self.mine], self.noise(step, "renoise")
        return self._pinned(StudentBatch(found.states, words_of(found), wrong, differs, t, noise))

    def _pinned(self, batch: Any) -> Any:
        """Where an accelerator copies from it, in memory from which that needs no waiting."""
        return batch.pinned() if self.placement.device.type == "cuda" else batch

    def place(self, batch: StudentBatch) -> StudentBatch:
        """What was `read`, on the device, its captions by the language model."""
        moved = batch.to(self.placement.device)
        text = self.text(moved.text)
        return replace(moved, text=text, wrong=text if moved.wrong is None else self.text(moved.wrong))

    @property
    def mine(self) -> slice:
        """This process's rows of a batch."""
        return slice(self.placement.rows.start, self.placement.rows.stop)

    def stream(self, step: int, purpose: str) -> torch.Generator:
        """Randomness of the whole batch."""
        return generator(self.config.seed, step, purpose)

    def noise(self, step: int, purpose: str) -> Tensor:
        """Noise of this process's rows (B, C, H, W)."""
        rows = [generator(self.config.seed, step, purpose, row) for row in self.placement.rows]
        return torch.stack([torch.randn(self.drawn.data.shape, generator=one) for one in rows])

    def text(self, words: Tensor | list[str]) -> Tensor:
        """Features (B, L, Dc), stored ones or of captions, in the number type of the computation."""
        cut: list[int] = []  # the teacher lost the same ends and said so when it drew
        text = words if isinstance(words, Tensor) else self.encoders.encode_text(words, cut)
        return text.to(self.placement.device, self.placement.dtype)

    @abstractmethod
    def judged_at(self, step: int) -> Tensor:
        """The noise levels, in flow time, at which pictures of the whole batch are judged."""

    # -- the discriminator

    def check_balance(self, step: int) -> None:
        """The gate; an accelerator would wait for each look, so there it is one a logging interval."""
        if self.placement.device.type == "cpu" or step % self.config.log_every == 0:
            self.balance.check(step)

    def judges(self, step: int) -> bool:
        """Whether step `step` is the heads' turn."""
        joined = step - self.joining
        return self.heads is not None and joined >= 0 and joined % 2 == 0

    @property
    @abstractmethod
    def joining(self) -> int:
        """The step from which on heads and student take turns."""

    def look(self, latents: Tensor, text: Tensor, batch: StudentBatch) -> list[Tensor]:
        """What the heads say of latents (B, C, H, W), noisy again; logits (B, N) of each depth."""
        noisy = flow.interpolate(latents, batch.noise, batch.t).to(self.placement.dtype)
        return self.heads(self.features(noisy, text, flow.TIMESTEP_SCALE * batch.t))

    def judge(self, latents: Tensor, text: Tensor, batch: StudentBatch) -> list[Tensor]:
        """As `look`, for the heads to learn from: no gradient beyond them."""
        with torch.no_grad():
            noisy = flow.interpolate(latents, batch.noise, batch.t).to(self.placement.dtype)
            heard = self.features(noisy, text, flow.TIMESTEP_SCALE * batch.t)
        return self.heads(heard)

    def heads_loss(self, guess: Tensor, batch: StudentBatch, part: int, loss, verdict) -> dict[str, Tensor]:
        """The teacher's pictures are real; the student's, and the teacher's with another caption, are not.

        Args:
            guess: the student's pictures (B, C, H, W).
            batch: with the teacher's.
            part: of the step.
            loss: logits and whether they should count as real to (B,).
            verdict: logits to one number a picture, above 0 where it is taken for real.
        """
        latents, share = batch.states[:, -1], self.config.misaligned
        with self.heads.once():
            real, fake = self.judge(latents, batch.text, batch), self.judge(guess, batch.text, batch)
            told, found = loss(fake, real=False), {}
            if share:
                wrong = self.judge(latents, batch.wrong, batch)
                found["right_misaligned"] = (verdict(wrong) < 0).float()
                told = torch.lerp(told, torch.where(batch.differs, loss(wrong, real=False), told), share)
            total = loss(real, real=True) + told
        right = ((verdict(real) > 0).float() + (verdict(fake) < 0).float()) / 2  # (B,)
        everyone = mean_over_processes(right.mean())  # all of them pass the gate, or none
        self.balance.note(everyone, part, len(self.placement.microbatches))
        return {"loss": total, "right": right, **found}

    # -- looking at the run

    def validate(self) -> dict[str, float]:
        """Student and teacher at the same few steps without guidance; stops the run where the student is worse."""
        if not self._reference:
            self._reference = {f"teacher_{name}": value for name, value in self._measure(teacher=True).items()}
        found = self._measure(teacher=False) | self._reference
        check_student(found, self.step + 1, self.config.sampler_steps, self.config)
        return found

    @torch.no_grad()
    def _measure(self, teacher: bool) -> dict[str, float]:
        """Squared distance to the teacher's pictures never trained on and, where asked, the GenEval-lite score."""
        distances = []
        for first in range(self.rows, len(self.drawn), 32):
            batch = self.drawn.batch(range(first, min(first + 32, len(self.drawn))))
            states = batch.states.to(self.placement.device)
            ends = self.ends(states[:, 0], self.text(words_of(batch)), teacher)
            distances.append((ends - states[:, -1]).square().flatten(1).mean(1).cpu())
        found = {"distance": torch.cat(distances).mean().item()}
        if self.config.gate_prompts:
            prompts = few_prompts(self.config.gate_prompts)
            pipeline = self.reference() if teacher else self.pipeline()
            found["geneval"] = evaluate(pipeline, prompts, seeds=(0,), progress=False).score.overall
        return found

    @abstractmethod
    def ends(self, noise: Tensor, text: Tensor, teacher: bool) -> Tensor:
        """What student or teacher make of noise (B, C, H, W) in the student's steps."""

    @abstractmethod
    def pipeline(self) -> NitroEPipeline:
        """Draws as the student does, in few steps."""

    @abstractmethod
    def reference(self) -> NitroEPipeline:
        """Draws as the teacher does in as many steps without guidance."""

    def picture(self) -> Image:
        """The captions of up to eight pictures never trained on."""
        rows = range(self.rows, min(self.rows + 8, len(self.drawn)))
        captions, seeds = self.drawn.batch(rows).captions, torch.Generator().manual_seed(self.config.seed)
        return image_grid(self.pipeline()(captions, generator=seeds).images, columns=4, labels=captions)

    # -- keeping the run

    def state(self) -> dict[str, Any]:
        """What was drawn by whom, the gates' memory, and what spectral norms remember."""
        facts = {**self._facts(), "step": self.step, "phases": list(self.phases)}
        facts |= {"turns": self.balance.turns, "right": self.balance.right}
        facts |= {"reference": self._reference, "reference_of": self._measured()}
        return facts | (self.heads.kept() if self.heads is not None else {})

    def _facts(self) -> dict[str, Any]:
        kept = hashlib.blake2b(self.kept.astype(np.int64).tobytes(), digest_size=8).hexdigest()
        facts = {"encoders": self.encoders.fingerprint, "teacher": self.teacher_hash, "rows": self.rows}
        return facts | ({"verified": kept} if self.config.data.verified else {})

    def _measured(self) -> list[int]:
        """What the teacher's reference depends on, among what may change."""
        return [self.config.gate_prompts, self.config.sampler_steps]

    @property
    @abstractmethod
    def phases(self) -> tuple[int, ...]:
        """The steps with which the later phases begin."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Compares pictures and encoders with those of the checkpoint, and remembers what it remembered."""
        for name, value in self._facts().items():
            if state.get(name, value) != value:  # a checkpoint of an older version names fewer
                raise InvalidValue(f"{name}={value!r}: the run was started with {state[name]!r}; name another folder")
        for before, now in zip(state.get("phases", self.phases), self.phases, strict=True):
            if before != now and min(before, now) <= state["step"]:
                raise InvalidValue(
                    f"steps={self.config.steps}: a phase would begin with step {now} in place of {before}, and the run "
                    f"is at step {state['step']}; keep steps and shares, or name another folder"
                )
        if state.get("reference_of", self._measured()) == self._measured():
            self._reference = state["reference"]
        self.balance.restore(state["turns"], state["right"])
        if self.heads is not None:
            try:
                self.heads.restore(state)
            except (KeyError, RuntimeError):
                raise InvalidValue(
                    "adversarial_weight, head_width, depths: the run was started with other heads, or none; "
                    "name another folder"
                ) from None

    def data_digest(self) -> str:
        """Names the shards, their rows and which can be read."""
        return self.drawn.data.digest

    def describe(self) -> dict[str, Any]:
        """The encoders' fingerprint, by which a loader knows whether it has the right ones; who drew, and how."""
        drawn = {name: self.drawn.card[name] for name in ("teacher", "sampler", "levels")}
        folders = [
            {"prompts": card["prompts"], "seed": card["seed"], "pictures": count} for card, count in self.drawn.cards()
        ]
        return {"encoders": self.encoders.fingerprint, "drawn": drawn | {"folders": folders}}

    def save_student(self, averages: dict[str, Tensor], folder: Path) -> EMMDiTTransformer2DModel:
        """Writes the student in `save_pretrained` layout, and returns it."""
        model = EMMDiTTransformer2DModel.from_config(self.student.config)
        model.load_state_dict({**model.state_dict(), **{name: value.cpu() for name, value in averages.items()}})
        model.save_pretrained(folder)
        return model


def words_of(batch: DrawnBatch) -> Tensor | list[str]:
    """Stored features of the captions, or else these."""
    return batch.captions if batch.text is None else batch.text


@contextmanager
def resting(module: nn.Module) -> Iterator[None]:
    """What is computed within has no gradient for the module's own parameters, and leaves its buffers as they are."""
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train().requires_grad_(True)
