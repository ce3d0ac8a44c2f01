"""The teacher's own pictures: what a student of few steps learns from.

A student does not need photographs. What it has to learn is where the teacher ends, so the teacher draws: prompt after
prompt, with its own steps and guidance, and three things are kept of each picture:

* the **seed of the noise** that it began with. Teacher and student are deterministic maps from noise to picture; only
  with the noise is there a pair that says what this point has to become;
* the **latents** at the end;
* the **states on the way**, at the noise levels that the student's sampler will visit. The road from each to the next
  is what one step of the student has to do.

The Euler sampler walks on straight pieces. A state between two nodes of the teacher's grid is therefore read off the
piece it lies on, and nothing is computed for it: with levels `a > l >= b` of the nodes,

    x_l = x_a + (a - l) / (a - b) (x_b - x_a).

At lite scale every level of four steps is a node of twenty; on the grid of the official weights none but the ends are.

Prompts come from the grammar of the scenes (never a reserved sentence, never a held-out composition: `captions.py`,
`grammar.py`), or from a file. Restarted, a run goes on with the next shard; shards and batches are cut at fixed places,
so one process and eight write the same data set.

Source: Nitro-1 and LADD (arXiv 2403.12015): data of the teacher alone. Differs: the states on the way are ours.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm.auto import tqdm

from nitro_e_lite.data.shard_writer import ShardWriter, keep_card, remove_leftovers
from nitro_e_lite.data.shards import SHARDS, LatentBatch, LatentDataset, array_shapes, bad_rows, read_card, sidecars
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import share_lock
from nitro_e_lite.inference.arguments import MAX_STEPS, as_integer, draw_noise, seeded_generators
from nitro_e_lite.inference.encoders import Encoders
from nitro_e_lite.inference.hub import weights_hash
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.schedules import draws_noise
from nitro_e_lite.model import flow
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.captions import caption
from nitro_e_lite.scenes.grammar import sample_scene

KIND = "drawn"  # what the column `source` and the card say
_CARD = {"teacher": str, "encoders": str, "prompts": str, "sampler": dict, "levels": list, "seed": int}
_NEAR = 1e-6  # two noise levels that differ by less are one


def sampler_levels(steps: int, shift: float, grid: str) -> list[float]:
    """The noise levels at which a sampler asks the model: `steps` falling numbers from 1; the 0 at the end is implied.

    Args:
        steps: number of steps `K`.
        shift: how far the levels lean towards noise.
        grid: one of `config.SIGMA_GRIDS`.
    """
    if grid == "linear":
        return flow.shift_sigmas(flow.linear_sigmas(steps), shift)
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1].tolist()


def noise_seed(seed: int, row: int) -> int:
    """The seed of the noise of picture `row` of the data set `seed`: 32 bits."""
    return generator(seed, row, "noise of a drawn picture").initial_seed()


def noise_of(keys: Iterable[str], shape: tuple[int, int, int]) -> Tensor:
    """The noise that drawn pictures began with, from their keys: (B, C, h, w)."""
    return draw_noise(seeded_generators(int(key) for key in keys), shape)


def states_at(levels: Sequence[float], walk: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """Where a sampler was at some noise levels.

    Args:
        levels: falling, within those of the walk.
        walk: its states, (B, C, h, w) each, from the noise to the end.
        sigmas: their noise levels, from 1 to 0.

    Returns:
        (B, levels, C, h, w).

    Raises:
        ValueError: a level that the walk does not pass.
    """
    found = []
    for level in levels:
        after = next((k for k in range(1, len(sigmas)) if sigmas[k] <= level + _NEAR), None)
        if after is None or level > sigmas[0] + _NEAR:
            raise InvalidValue(f"levels={list(levels)}: {level} lies outside of {sigmas[0]} to {sigmas[-1]}")
        before, at = sigmas[after - 1], max(level, sigmas[after])
        share = 0.0 if abs(before - at) < _NEAR else (before - at) / (before - sigmas[after])
        exact = after if abs(at - sigmas[after]) < _NEAR else after - 1 if share == 0.0 else None
        found.append(torch.lerp(walk[after - 1], walk[after], share) if exact is None else walk[exact])
    return torch.stack(found, dim=1)  # (B, K, C, h, w)


@dataclass(frozen=True)
class GrammarPrompts:
    """Prompts of the scene grammar: one caption of each of `count` training scenes of the data set `seed`."""

    NAME: ClassVar[str] = "scene grammar, seed "  # what a card says of them, before the seed
    seed: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> str:
        return caption(sample_scene(self.seed, row), row)


class Drawing:
    """The drawing of one data set, or this process's share of it.

    Args:
        pipeline: the teacher.
        prompts: one a picture; anything with a length and places.
        out: folder of the data set; an unfinished one is continued.
        steps, guidance, shift: of the teacher's sampler; the pipeline's own when not given.
        student_steps: steps of the student, at whose noise levels the states are kept.
        seed: of the noises.
        text: store the features of the prompts too.
        batch: pictures drawn at once.
        shard_rows: pictures in one shard: what a kill may cost each process.
        rank: number of this process.
        world: number of processes.

    Raises:
        ValueError: `out` holds another data set, or a number makes no sense.
    """

    def __init__(
        self,
        pipeline: NitroEPipeline,
        prompts: Sequence[str],
        out: str | Path,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        student_steps: int = 4,
        seed: int = 0,
        text: bool = False,
        batch: int = 50,
        shard_rows: int = 500,
        rank: int = 0,
        world: int = 1,
    ):
        if draws_noise(pipeline.scheduler):
            raise InvalidValue("model: draws noise in every step; a student learns from a teacher that follows the ODE")
        if pipeline.transformer.dtype == torch.float16:
            raise InvalidValue("dtype=float16: must be float32 or bfloat16; these name the teacher by the same hash")
        for name, value in (("batch", batch), ("shard_rows", shard_rows), ("world", world), ("prompts", len(prompts))):
            as_integer(name, value, 1)
        self.pipeline, self.prompts, self.out = pipeline, prompts, Path(out)
        self.sampler = pipeline.sampler(steps, guidance, shift)
        self.seed, self.text, self.batch, self.shard_rows = as_integer("seed", seed, 0), text, batch, shard_rows
        self.levels = sampler_levels(
            as_integer("student_steps", student_steps, 2, MAX_STEPS), self.sampler.shift, pipeline.config.sigma_grid
        )
        self.encoders = encoders_of(pipeline)
        firsts = range(0, len(prompts), shard_rows)
        self.parts, self._share = firsts[rank::world], (rank, world)
        card = self._card(len(firsts))
        self.shapes = array_shapes(card)
        self._check_none_is_lost()
        keep_card(self.out, card)
        self._bar = tqdm(
            desc="drawing", unit=" pictures", disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30
        )

    def _check_none_is_lost(self) -> None:
        there = max((state["next"] for state in sidecars(self.out).values() if state), default=0)
        if there > len(self.prompts):
            wanted = "as many or more" if isinstance(self.prompts, GrammarPrompts) else "the same ones"
            raise InvalidValue(
                f"prompts={len(self.prompts)}: {self.out} holds the pictures of {there} already; ask for {wanted}, or "
                "name another folder"
            )

    def _card(self, parts: int) -> dict[str, Any]:
        config, grammar = self.pipeline.transformer.config, isinstance(self.prompts, GrammarPrompts)
        shape = [config.in_channels, config.sample_size, config.sample_size]
        arrays = {"states": [len(self.levels) - 1, *shape]}  # the first is the noise
        if self.text:
            arrays["text"] = [self.encoders.max_text_length, self.encoders.width]
        digest = hashlib.blake2b(digest_size=8)
        for prompt in () if grammar else self.prompts:
            digest.update(f"{prompt}\n".encode())
        return {
            "fingerprint": self.encoders.image_fingerprint,
            "shape": shape,
            "arrays": arrays,
            "features": {"text": self.encoders.fingerprint if self.text else None, "vision": None},
            "kind": KIND,
            "encoders": self.encoders.fingerprint,
            "prompts": f"{self.prompts.NAME}{self.prompts.seed}" if grammar else digest.hexdigest(),
            "teacher": teacher_hash(self.pipeline.transformer),
            "sampler": {**self.sampler.arguments(), "sigma_grid": self.pipeline.config.sigma_grid},
            "levels": self.levels,
            "seed": self.seed,
            "batch": self.batch,
            "shard_rows": self.shard_rows,
            "parts": parts,
        }

    def run(self) -> dict[str, Any]:
        """Draws this process's shards; returns what it did: pictures, prompts left out, seconds, pictures a second."""
        started, rows, skipped = time.perf_counter(), 0, 0
        with self._bar, share_lock(self.out, *self._share):
            mine = {self._name(first) for first in self.parts}
            remove_leftovers(self.out, lambda shard: shard in mine)
            for first in self.parts:
                if not self._finished(first):
                    drawn = self._draw_shard(first)
                    rows, skipped = rows + drawn[0], skipped + drawn[1]
        seconds = time.perf_counter() - started
        speed = round(rows / seconds, 3)
        return {"rows": rows, "skipped": skipped, "seconds": round(seconds, 3), "rows_per_second": speed}

    def _rows(self, first: int) -> range:
        return range(first, min(first + self.shard_rows, len(self.prompts)))

    @staticmethod
    def _name(first: int) -> str:
        return f"{KIND}-{first:09d}"

    def _finished(self, first: int) -> bool:
        """Whether a shard is there, whole, with as many pictures as there are prompts for it now."""
        state = sidecars(self.out, self._name(first)).get(self._name(first))
        if not state or state["next"] != self._rows(first).stop:
            return False
        path = self.out / SHARDS / f"{self._name(first)}.arrow"
        return not state["rows"] or (path.is_file() and path.stat().st_size == state["bytes"])

    def _draw_shard(self, first: int) -> tuple[int, int]:
        """Draws one shard; returns its pictures and the prompts that gave none."""
        writer, skipped, rows = ShardWriter(self.out, self._name(first), self.shapes), [], self._rows(first)
        for start in range(rows.start, rows.stop, self.batch):
            chosen = range(start, min(start + self.batch, rows.stop))
            prompts = {row: str(self.prompts[row] or "").strip() for row in chosen}
            skipped += [[f"prompt {row}", "prompt is empty", 1] for row, prompt in prompts.items() if not prompt]
            batch = self.draw({row: prompt for row, prompt in prompts.items() if prompt})
            if batch is not None:
                good = self._good(batch)
                skipped += [[batch.keys[k], "drawn to numbers too large for float16", 1] for k in np.flatnonzero(~good)]
                if good.any():
                    writer.add(batch if good.all() else _chosen(batch, np.flatnonzero(good).tolist()))
            self._bar.update(len(chosen))
        writer.finish(part=self._name(first), start=rows.start, next=rows.stop, skipped=skipped, notes={})
        return writer.rows, len(skipped)

    def _good(self, batch: LatentBatch) -> np.ndarray:
        arrays = [getattr(batch, name).to(torch.float16).flatten(1).numpy() for name in self.shapes]
        return ~np.logical_or.reduce([bad_rows(array) for array in arrays])

    def draw(self, prompts: dict[int, str]) -> LatentBatch | None:
        """Pictures by row; None for no prompts. On the CPU, float32."""
        if not prompts:
            return None
        keys = [str(noise_seed(self.seed, row)) for row in prompts]
        noise = noise_of(keys, self.shapes["latents"])
        features = self.pipeline.encode_captions(list(prompts.values()))  # (B, L, Dc)
        steps = self.pipeline.steps(
            prompt_embeds=features,
            negative_prompt_embeds=self.pipeline.encode_captions([""] * len(prompts)),
            **self.sampler.arguments(),
            latents=noise,
        )
        walk, sigmas = [noise], []
        for step in steps:
            walk.append(step.latents.float().cpu())
            sigmas.append(step.sigma)
        states = states_at(self.levels, walk, [*sigmas, 0.0])
        return LatentBatch(
            walk[-1],
            [[prompt] for prompt in prompts.values()],
            text=features.cpu() if self.text else None,
            states=states[:, 1:],
            sources=[KIND] * len(prompts),
            keys=keys,
        )


def _chosen(batch: LatentBatch, rows: list[int]) -> LatentBatch:
    """Some rows of a batch."""

    def pick(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) else value and [value[k] for k in rows]

    return LatentBatch(**{name: pick(value) for name, value in vars(batch).items()})


def encoders_of(pipeline: NitroEPipeline) -> Encoders:
    """The frozen encoders of a pipeline."""
    stats, length = pipeline.stats, pipeline.config.max_text_length
    return Encoders(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, stats, length)


def teacher_hash(transformer: torch.nn.Module) -> str:
    """Names a teacher by its weights, loaded in float32 or bfloat16."""
    return weights_hash({"transformer": transformer}, rounded_to=torch.bfloat16)


@dataclass(frozen=True)
class DrawnBatch:
    """Pictures of the teacher.

    Attributes:
        states: float32 (B, K + 1, C, h, w): at the student's K noise levels, the noise first, and the latents last.
        captions: one a picture.
        text: stored features float16 (B, L, Dc), or None.
    """

    states: Tensor
    captions: list[str]
    text: Tensor | None


class DrawnSet:
    """Reads what `Drawing` wrote.

    Args:
        folders: of `nitro-e data draw`, one or more.
        encoders: of the student; those of the teacher.

    Attributes:
        card: of the first folder.
        levels: the student's noise levels, without the 0 at the end.

    Raises:
        FileNotFoundError: a folder holds no data set.
        ValueError: it was not drawn, its card is damaged, or with other encoders, or by different teachers.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path], encoders: Encoders):
        self.data = LatentDataset(folders, encoders.image_fingerprint, encoders.fingerprint)
        self.card, self.levels = self.data.card, self.data.card.get("levels", [])
        if self.card.get("kind") != KIND:
            raise InvalidValue(f"{self.data.folders[0]}: was not drawn by a teacher; nitro-e data draw makes such sets")
        self._check_card(self.data.folders[0], self.card)
        if self.card["encoders"] != encoders.fingerprint:
            raise InvalidValue(f"{self.data.folders[0]}: the teacher read its captions with another language model")
        for folder in self.data.folders[1:]:
            other = read_card(folder)
            self._check_card(folder, other)
            for name in ("encoders", "teacher", "sampler", "levels"):
                if other.get(name) != self.card[name]:
                    raise InvalidValue(
                        f"{folder}: {name} is another than in {self.data.folders[0]}; one teacher, one run"
                    )

    @staticmethod
    def _check_card(folder: Path, card: dict[str, Any]) -> None:
        grammar = GrammarPrompts.NAME
        fine = {name: isinstance(card.get(name), kind) for name, kind in _CARD.items()}
        fine["levels"] = fine["levels"] and len(card["levels"]) > 1  # each picture has states on its way
        fine["levels"] = fine["levels"] and all(isinstance(level, float) for level in card["levels"])
        fine["sampler"] = fine["sampler"] and {"shift", "sigma_grid"} <= card["sampler"].keys()
        if fine["prompts"] and card["prompts"].startswith(grammar):
            fine["prompts"] = card["prompts"].removeprefix(grammar).isdecimal()  # the seed
        for name in (name for name, good in fine.items() if not good):
            damaged = f"{name}={card.get(name)!r:.80} in its card is damaged"
            raise InvalidValue(f"{folder}: {damaged}; draw it again")

    def cards(self) -> list[tuple[dict[str, Any], int]]:
        """Of each folder in the order of the rows: its card, and how many rows it has."""
        rows = {folder: 0 for folder in self.data.folders}
        for chunk in self.data.chunks:
            rows[chunk.shard.folder] += chunk.rows
        return [(read_card(folder), count) for folder, count in rows.items()]

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: Iterable[int]) -> DrawnBatch:
        """The pictures `rows`."""
        found = self.data.batch(rows)
        noise = noise_of(found.keys, self.data.shape)  # (B, C, h, w)
        states = torch.cat([noise[:, None], found.states.float(), found.latents[:, None]], dim=1)  # (B, K+1, C, h, w)
        return DrawnBatch(states, [ways[0] for ways in found.captions], found.text)
