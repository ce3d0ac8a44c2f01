"""Eight trainings that went wrong, and one that did not: what notebook 18 diagnoses from curves.

A tiny network learns to draw one object of 16 x 16 pixels: three shapes in four colours, told by the features of the
shipped language model. Every run is the same but for one mistake (`RUNS`), takes seconds of one core, and leaves a log
of a few kilobytes, `NAME.json`, and a picture of what it draws for the twelve captions, `NAME.png`. The ones that the
notebook reads are in `course/lab/`; `nitro-e course lab FOLDER` makes them again.

A log holds, a row each twenty steps, the loss of both ranks (two halves of the batch) and the norm of the gradient
before it is clipped; each hundred steps the validation loss of the averaged weights under the right captions and under
those of other pictures; at the end how many of 48 drawn pictures show the colour and the shape of their caption. The
run that learns from a reward begins with the weights of the sound one and logs its reward in place of the losses.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nitro_e_lite import files
from nitro_e_lite.inference.arguments import as_integer
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.model import flow
from nitro_e_lite.model.blocks import TimeEmbedding
from nitro_e_lite.scenes.captions import noun_phrase
from nitro_e_lite.scenes.grammar import COLORS, Scene, SceneObject, sample_scene
from nitro_e_lite.scenes.render import render, signed_distance
from nitro_e_lite.training.weights import whiten_input

SIDE = 16  # pixels
RADIUS = 0.31  # of the object, as a share of the side
KINDS = [(shape, color) for shape in ("circle", "triangle", "cross") for color in ("red", "yellow", "green", "blue")]
CAPTIONS = [noun_phrase(shape, color) for shape, color in KINDS]
ALIKE = 0.03  # captions are drawn together to this share of their distances: what takes hours shows in seconds
EACH = 4  # pictures of a caption that are judged at the end


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. The defaults are sound; a mistake is one field that is not.

    Attributes:
        rate: learning rate of AdamW.
        normalized: latents have mean 0 and spread 1 in every channel.
        time_scale: what training multiplies a noise level t with; the sampler always hands over 1000 t.
        dropout: share of captions that are replaced by the empty one.
        average: decay of the average of the weights.
        white: the layer that takes the text features learns as if they were white.
        same_rows: both ranks read the same rows and draw the same noise.
        rewarded: goes on from the sound run, with a reward in place of the flow loss.
        steps: of the training.
    """

    rate: float = 4e-3
    normalized: bool = True
    time_scale: float = 1000.0
    dropout: float = 0.1
    average: float = 0.98
    white: bool = True
    same_rows: bool = False
    rewarded: bool = False
    steps: int = 600


RUNS = {  # by the names that students see; in this order they say nothing
    "sound": Run(),
    "run-1": Run(dropout=1.0),
    "run-2": Run(rate=0.1),
    "run-3": Run(average=0.9999),
    "run-4": Run(same_rows=True),
    "run-5": Run(normalized=False),
    "run-6": Run(rewarded=True, rate=1e-3, steps=60),
    "run-7": Run(time_scale=1.0),
    "run-8": Run(white=False),
}


def stored() -> Path:
    """The folder of the logs that the notebook reads."""
    return files.PACKAGE_DIR / "course" / "lab"


def read(name: str, folder: Path | None = None) -> tuple[dict[str, Any], Image.Image]:
    """Log and picture of a run.

    Args:
        name: one of `RUNS`.
        folder: of `write`; None: those in the package.
    """
    folder = folder or stored()
    with Image.open(folder / f"{name}.png") as image:
        return files.read_json(folder / f"{name}.json"), image.convert("RGB")


def write(folder: Path, runs: dict[str, Run] | None = None, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Makes the runs again and writes a log and a picture of each.

    Args:
        folder: where to; files of the same names are replaced.
        runs: by name; None: all of `RUNS`.
        seed: of weights, batches and noise.

    Yields:
        Name and log of each run when it has come to its end.

    Raises:
        ValueError: a seed that torch does not take.
    """
    as_integer("seed", seed, 0, 2**63 - 1)
    files.check_output(folder, "folder")
    with files.run_lock(folder, name="folder"):
        lab = Lab(seed)
        for name, run in (runs or RUNS).items():
            log, picture = lab.train(run)
            files.write_atomically(folder / f"{name}.json", json.dumps(log) + "\n")
            drawn = io.BytesIO()
            picture.save(drawn, "PNG", optimize=True)
            files.write_atomically(folder / f"{name}.png", drawn.getvalue())
            yield name, log


class Network(nn.Module):
    """v(x, text, 1000 t): two steered layers and, straight through, the noisy latents times a number that t decides.

    Args:
        size: numbers of a picture.
        text: width of the text features.
        width: of the layers.
    """

    def __init__(self, size: int, text: int, width: int = 256):
        super().__init__()
        self.text_embed, self.time_embed = nn.Linear(text, width), TimeEmbedding(width, "adaln")
        self.first, self.inner, self.last = nn.Linear(size, width), nn.Linear(width, width), nn.Linear(width, size)
        self.steer, self.through = nn.Linear(width, 4 * width), nn.Linear(width, 1)

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """Velocity (B, C, H, W) of latents (B, C, H, W), text features (B, Dc) and times 1000 t (B,)."""
        time = self.time_embed(timestep)  # (B, W)
        shift, scale, shift_2, scale_2 = self.steer(nn.functional.silu(time + self.text_embed(text))).chunk(4, 1)
        h = nn.functional.silu(self.first(x.flatten(1)) * (1 + scale) + shift)  # (B, W)
        h = h + nn.functional.silu(self.inner(h) * (1 + scale_2) + shift_2)
        return self.last(h).view_as(x) + self.through(time)[:, :, None, None] * x


class Lab:
    """Data, captions and trainings.

    Args:
        seed: of weights, batches and noise.
        scenes: pictures to train on; an eighth as many to validate on.
    """

    def __init__(self, seed: int = 0, scenes: int = 1024):
        self.seed = seed
        encoders = load_encoders("lite")
        text = encoders.encode_text([*CAPTIONS, ""])  # the last one stands for a caption that was dropped
        text = text[:, :8].float().mean(1)  # (13, Dc): of words, end and some padding
        self.text = text.mean(0) + ALIKE * (text - text.mean(0))
        self.kind = torch.arange(scenes + scenes // 8) % len(KINDS)
        drawn = np.stack([picture(number, *KINDS[number % len(KINDS)]) for number in range(len(self.kind))])
        raw = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 25.5  # (B, 3, 16, 16) in [0, 10]
        self.raw = nn.functional.pixel_unshuffle(raw, 2)  # (B, 12, 8, 8)
        self.mean, self.std = self.raw.mean((0, 2, 3), keepdim=True), self.raw.std((0, 2, 3), keepdim=True)
        self.count = scenes
        self._sound: dict[str, Tensor] | None = None

    def model(self, run: Run) -> Network:
        """A fresh network, as large for every run."""
        torch.manual_seed(self.seed)
        made = Network(self.raw[0].numel(), self.text.shape[1])
        if run.white:
            whiten_input(made.text_embed, self.text)
        return made

    def latents(self, run: Run) -> Tensor:
        """All pictures as this run sees them (B, 12, 8, 8)."""
        return (self.raw - self.mean) / self.std if run.normalized else self.raw

    def train(self, run: Run) -> tuple[dict[str, Any], Image.Image]:
        """One run, from its first step to its pictures."""
        if run.rewarded:
            return self._reward(run)
        model, latents = self.model(run), self.latents(run)
        average = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.0)
        draw, rows = torch.Generator().manual_seed(self.seed), []
        for step in range(run.steps):
            batch = self._batch(run, latents, draw)
            losses = _losses(model, *batch, run.time_scale).unflatten(0, (2, -1)).mean(1)  # of both ranks
            optimizer.param_groups[0]["lr"] = run.rate * min(1, (step + 1) / 20, 2 * (1 - step / run.steps))
            optimizer.zero_grad()
            losses.mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for kept, value in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(value, 1 - run.average)
            if step % 20 == 0 or step == run.steps - 1:
                row = {"step": step + 1, "loss rank 0": losses[0].item(), "loss rank 1": losses[1].item()}
                row |= {"gradient norm": norm.item()}
                if step % 100 == 0 or step == run.steps - 1:
                    row |= self._validate(average, latents, run.time_scale)
                rows.append(row)
        if run == RUNS["sound"]:
            self._sound = copy.deepcopy(average.state_dict())
        return self._finished(average, run, rows)

    def _batch(self, run: Run, latents: Tensor, draw: torch.Generator, size: int = 16) -> tuple[Tensor, ...]:
        half = [self._half(run, latents, draw, size // 2) for _ in range(1 if run.same_rows else 2)]
        return tuple(torch.cat(parts) for parts in zip(*(half * (2 // len(half))), strict=True))

    def _half(self, run: Run, latents: Tensor, draw: torch.Generator, size: int) -> tuple[Tensor, ...]:
        """What one rank reads: latents, noise, t and text features."""
        numbers = torch.randint(self.count, (size,), generator=draw)
        kinds = self.kind[numbers].masked_fill(torch.rand(size, generator=draw) < run.dropout, len(KINDS))
        noise = torch.randn(latents[numbers].shape, generator=draw)
        return latents[numbers], noise, flow.sample_timesteps(size, draw), self.text[kinds]

    @torch.no_grad()
    def _validate(self, model: nn.Module, latents: Tensor, scale: float = 1000.0) -> dict[str, float]:
        x0, kinds = latents[self.count :], self.kind[self.count :]
        draw = torch.Generator().manual_seed(1)
        noise, t = torch.randn(x0.shape, generator=draw), (torch.randperm(len(x0), generator=draw) + 0.5) / len(x0)
        wrong = (kinds + 5) % len(KINDS)  # another shape and another colour
        captions = {"validation loss": kinds, "with wrong captions": wrong}
        return {name: _losses(model, x0, noise, t, self.text[k], scale).mean().item() for name, k in captions.items()}

    def sample(self, model: nn.Module, run: Run, kinds: Tensor, steps: int = 10, guidance: float = 2.0) -> Tensor:
        """Pictures (B, 3, 16, 16) in [0, 1] for numbers of captions, by Euler steps with guidance."""
        sigmas = [*flow.linear_sigmas(steps), 0.0]
        x = torch.randn(len(kinds), *self.raw.shape[1:], generator=torch.Generator().manual_seed(2))
        none = self.text[-1:].expand(len(kinds), -1)
        for t, t_next in zip(sigmas, sigmas[1:], strict=False):
            time = torch.full((len(kinds),), 1000 * t)
            velocity = model(x, self.text[kinds], time)
            if guidance > 1:
                velocity = flow.guide(velocity, model(x, none, time), guidance)
            x = flow.euler_step(x, velocity, t, t_next)
        raw = x * self.std + self.mean if run.normalized else x
        return nn.functional.pixel_shuffle(raw, 2) / 10

    def _finished(self, model: nn.Module, run: Run, rows: list[dict[str, float]]) -> tuple[dict, Image.Image]:
        with torch.no_grad():
            pictures = self.sample(model, run, torch.arange(len(KINDS)).repeat(EACH)).clamp(0, 1).nan_to_num()
        seen = [read_picture(one) for one in (pictures.permute(0, 2, 3, 1) * 255).numpy()]
        shapes, colors = (np.array(seen) == np.array(KINDS * EACH)).sum(0).tolist()
        columns = sorted({name for row in rows for name in row}, key=lambda name: (name != "step", name))
        log = {name: [_short(row.get(name)) for row in rows] for name in columns}
        found = {"colours right": colors, "shapes right": shapes, "pictures": len(seen)}
        return {"log": log, "drawn": found}, montage(pictures[: len(KINDS)])

    def _reward(self, run: Run) -> tuple[dict[str, Any], Image.Image]:
        """Climbs a judge's opinion through the four steps of a drawing: how near all pixels are to the colour."""
        if self._sound is None:
            self.train(RUNS["sound"])
        model = self.model(run)
        model.load_state_dict(self._sound)
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.0)
        wanted = torch.tensor([COLORS[color] for _, color in KINDS]).float()[:, :, None, None] / 255  # (12, 3, 1, 1)
        kinds, rows = torch.arange(len(KINDS)), []
        for step in range(run.steps):
            reward = 1 - (self.sample(model, run, kinds, 4, 1.0) - wanted).abs().mean()
            optimizer.zero_grad()
            (-reward).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            row = {"step": step + 1, "reward": reward.item(), "gradient norm": norm.item()}
            if step % 10 == 0 or step == run.steps - 1:
                row |= self._validate(model, self.latents(run))
            rows.append(row)
        return self._finished(model, run, rows)


def _losses(model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, text: Tensor, scale: float = 1000.0) -> Tensor:
    """The flow loss of each sample (B,)."""
    velocity = model(flow.interpolate(x0, noise, t), text, scale * t)
    return (velocity - flow.velocity_target(x0, noise)).square().mean((1, 2, 3))


def _short(value: float | None) -> float | None:
    """Four digits; what is not finite has no number in JSON."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def picture(number: int, shape: str, color: str) -> np.ndarray:
    """One object in the middle of a soft background: (16, 16, 3) of uint8."""
    scene = sample_scene(0, number)
    thing = SceneObject(shape, color, "large", 0.5, 0.5, RADIUS, 0.0, COLORS[color])
    return render(Scene("single", (thing,), scene.background), SIDE)


def _covers() -> dict[str, np.ndarray]:
    centres = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE - 0.5
    x, y = np.meshgrid(centres / RADIUS, centres / RADIUS)
    return {shape: np.clip(0.5 - signed_distance(shape, x, y) * RADIUS * SIDE, 0, 1) for shape in dict(KINDS)}


def read_picture(image: np.ndarray) -> tuple[str, str]:
    """Shape and colour that a picture (16, 16, 3), 0 to 255, shows; "none" where no shape fits."""
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background, middle = np.median(edge, 0), np.median(image[6:10, 6:10].reshape(-1, 3), 0)
    color = min({color for _, color in KINDS}, key=lambda name: np.abs(middle - COLORS[name]).sum())
    contrast = middle - background
    cover = np.clip((image - background) @ contrast / max(contrast @ contrast, 400.0), 0, 1)
    fits = {shape: np.minimum(cover, c).sum() / np.maximum(cover, c).sum() for shape, c in _covers().items()}
    best = max(fits, key=fits.get)
    return (best if fits[best] > 0.6 else "none"), color


def montage(pictures: Tensor) -> Image.Image:
    """The twelve pictures (12, 3, 16, 16), a row a shape, side by side without a gap."""
    rows = (pictures * 255).round().byte().unflatten(0, (3, 4))  # (3, 4, 3, 16, 16)
    return Image.fromarray(rows.permute(0, 3, 1, 4, 2).reshape(3 * SIDE, 4 * SIDE, 3).numpy())


def describe(run: Run) -> str:
    """What is wrong with a run, as the field that differs from a sound one; "nothing" of the sound one."""
    fields = [one.name for one in dataclasses.fields(Run) if getattr(run, one.name) != getattr(Run(), one.name)]
    return "rewarded" if run.rewarded else ", ".join(fields) or "nothing"


def is_right(diagnosis: dict[str, str]) -> bool:
    """Whether every run that went wrong is given its own cause, by the field of `Run` that is not as it should be."""
    return all(diagnosis.get(name) == describe(run) for name, run in RUNS.items() if name != "sound")
