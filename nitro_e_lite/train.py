"""Training E-MMDiT: one loop for the laptop and the node.

Each step takes the next batch of cached latents, mixes it with noise at a random ``t``, and moves the model's velocity
towards ``eps - x0``. Around that line of mathematics stand the things that make a run trustworthy:

* **Masters and Muon.** See ``optimizers.py``.
* **Randomness from the step number.** Noise, timesteps, caption choice and caption dropout of step k come from a
  generator seeded with (seed, k); the batch from ``shards.batch_indices``. A resumed run needs no generator state and
  repeats an uninterrupted one bit for bit.

Source: Nitro-E training recipe; the target and the timestep density are those of ``flow.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from nitro_e_lite import flow
from nitro_e_lite.common import MetricsWriter, environment_report, tune_cpu
from nitro_e_lite.config import TrainConfig, to_dict
from nitro_e_lite.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.encoder_set import load_encoders
from nitro_e_lite.loading import load_transformer
from nitro_e_lite.optimizers import MasterWeights, build_optimizers, hidden_matrices, learning_rate_scale
from nitro_e_lite.pipeline import NitroEPipeline
from nitro_e_lite.shards import LatentBatch, batch_indices
from nitro_e_lite.training_data import cached_scenes
from nitro_e_lite.training_state import load_latest, optimizer_tensors, restore_optimizer, save_checkpoint
from nitro_e_lite.viz import image_grid

LOSS_BINS = 5  # validation loss is reported in this many equal ranges of t


class Trainer:
    """One run of one stage.

    Args:
        config: what to train.
        run_dir: folder of the run: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/``, ``final/``.
        resume: continue from the newest checkpoint in ``run_dir``; simply starts when there is none.
        device: "cpu", "cuda", ... or None for the best there is.

    Raises:
        FileExistsError: ``run_dir`` holds a run and ``resume`` is False.
        ValueError: a checkpoint of a differently shaped model is resumed, or model and encoders do not fit.
    """

    def __init__(self, config: TrainConfig, run_dir: str | Path, resume: bool = False, device: str | None = None):
        self.config, self.run_dir = config, Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        if not resume and (self.checkpoints.exists() or (self.run_dir / "final").exists()):
            raise FileExistsError(f"run_dir={self.run_dir}: holds a run already; resume it or name another folder")
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = self.accelerator.device
        world = self.accelerator.num_processes
        if config.batch_size % world:
            raise ValueError(f"batch_size={config.batch_size}: must be a multiple of the {world} processes")
        self.encoders = load_encoders(config.data.encoders, device=self.device, dtype=self._dtype())
        self._check_encoders()
        with self.accelerator.main_process_first():
            self.train_data = cached_scenes(self.encoders, config.data, "train")
            self.validation_data = cached_scenes(self.encoders, config.data, "validation")
        self._build()
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        if resume:
            self._restore()

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _check_encoders(self) -> None:
        model = self.config.model
        for name, there in (("in_channels", self.encoders.latent_channels), ("caption_channels", self.encoders.width)):
            if getattr(model, name) != there:
                raise ValueError(f"model.{name}={getattr(model, name)}: the encoders in use give {there}")

    def _build(self) -> None:
        torch.manual_seed(self.config.seed)
        tune_cpu()
        self.raw_model = EMMDiTTransformer2DModel(**to_dict(self.config.model))
        if self.config.start_from:
            self.raw_model.load_state_dict(load_transformer(self.config.start_from).state_dict())
        matrices = hidden_matrices(self.raw_model)
        self.raw_model.to(self.device)
        self.weights = MasterWeights(self.raw_model, self._dtype())
        self.masters = self.weights.masters
        self.ema = {name: p.detach().clone() for name, p in self.masters.items()}
        self.optimizers = build_optimizers(self.masters, matrices, self.config.optimizer)
        self.model = self.accelerator.prepare(self.raw_model)

    # -- one step

    def _draw(self, step: int) -> tuple[LatentBatch, list[str], Tensor, Tensor]:
        """The global batch of a step and its random choices: batch, captions, t (B,), noise (B, C, H, W)."""
        config = self.config
        batch = self.train_data.batch(batch_indices(config.seed, len(self.train_data), config.batch_size, step))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        which = torch.rand(config.batch_size, generator=generator).tolist()
        dropped = (torch.rand(config.batch_size, generator=generator) < config.caption_dropout).tolist()
        captions = [
            "" if drop else ways[int(u * len(ways))]
            for ways, u, drop in zip(batch.captions, which, dropped, strict=True)
        ]
        t = flow.sample_timesteps(config.batch_size, generator, config.timestep_mean, config.timestep_std)
        noise = torch.randn(batch.latents.shape, generator=generator)
        return batch, captions, t, noise

    def _loss(self, model: nn.Module, latents: Tensor, captions: list[str], t: Tensor, noise: Tensor) -> Tensor:
        """Squared velocity error of each sample (B,), float32."""
        dtype = self._dtype()
        latents, noise, t = (x.to(self.device) for x in (latents, noise, t))
        text = self.encoders.encode_text(captions).to(dtype)  # (B, L, Dc)
        x_t = flow.interpolate(latents, noise, t)
        output = model(x_t.to(dtype), text, flow.TIMESTEP_SCALE * t)
        error = output.sample.float() - flow.velocity_target(latents, noise)
        return error.square().flatten(1).mean(1)

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what it measured. A non-finite gradient leaves the weights as they are."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch, captions, t, noise = self._draw(self.step)
        mine = slice(rank * len(captions) // world, (rank + 1) * len(captions) // world)
        self.model.train()
        loss = self._loss(self.model, batch.latents[mine], captions[mine], t[mine], noise[mine]).mean()
        self.accelerator.backward(loss)
        self.weights.collect_gradients()
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.config.optimizer.clip)
        scale = learning_rate_scale(self.step, self.config.steps, self.config.optimizer)
        if math.isfinite(norm):
            self._update(scale)
        else:
            self._skip()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.step += 1
        return {"loss": loss.item(), "gradient_norm": norm.item(), "lr_scale": scale}

    def _update(self, scale: float) -> None:
        settings = self.config.optimizer
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = scale * (settings.muon_lr if name == "muon" else settings.lr)
            optimizer.step()
        if self.config.precision != "fp32":
            self.weights.publish()
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.masters.values()], 1 - decay)

    def _skip(self) -> None:
        self.skipped += 1
        if self.skipped > self.config.max_skipped:
            raise FloatingPointError(
                f"{self.skipped} steps had non-finite gradients (max_skipped={self.config.max_skipped}); "
                "lower the learning rate or train in fp32"
            )

    # -- looking at the run

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the EMA weights on fixed images, captions, timesteps and noise: in all, and by range of t."""
        self.model.eval()
        count = len(self.validation_data)
        generator = torch.Generator().manual_seed(2**31 + self.config.seed)
        t_all = (torch.randperm(count, generator=generator) + 0.5) / count  # every part of [0, 1] alike
        losses = []
        with self.weights.showing(self.ema):
            for first in range(0, count, 64):
                batch = self.validation_data.batch(range(first, min(first + 64, count)))
                noise = torch.randn(batch.latents.shape, generator=generator)
                t = t_all[first : first + 64]
                losses.append(
                    self._loss(self.raw_model, batch.latents, [ways[0] for ways in batch.captions], t, noise).cpu()
                )
        losses = torch.cat(losses)
        result = {"validation_loss": losses.mean().item()}
        for k in range(LOSS_BINS):
            inside = (t_all >= k / LOSS_BINS) & (t_all < (k + 1) / LOSS_BINS)
            if inside.any():
                result[f"validation_loss_{k / LOSS_BINS:.1f}_{(k + 1) / LOSS_BINS:.1f}"] = losses[inside].mean().item()
        return result

    def sample_grid(self) -> Path:
        """A picture of eight fixed validation captions drawn with the EMA weights."""
        captions = [ways[0] for ways in self.validation_data.batch(range(min(8, len(self.validation_data)))).captions]
        self.model.eval()
        with self.weights.showing(self.ema):
            pipeline = NitroEPipeline(
                self.raw_model, scheduler=FlowMatchEulerDiscreteScheduler(1000), **self.encoders.parts()
            )
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(
                captions,
                num_inference_steps=20,
                guidance_scale=self.config.guidance,
                generator=torch.Generator().manual_seed(self.config.seed),
            ).images
        path = self.run_dir / "samples" / f"step-{self.step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images, columns=4, labels=captions).save(path)
        return path

    # -- keeping the run

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        names = {p: name for name, p in self.masters.items()}
        optimizer: dict[str, Tensor] = {}
        for one in self.optimizers.values():
            optimizer |= optimizer_tensors(one, names)
        state = {"config": to_dict(self.config), "skipped": self.skipped, "seconds": self.seconds}
        tensors = {"weights": self.masters, "ema": self.ema, "optimizer": optimizer}
        return save_checkpoint(self.checkpoints, self.step, tensors, state, self.config.keep_checkpoints)

    def _restore(self) -> None:
        found = load_latest(self.checkpoints)
        if found is None:
            return
        tensors, state = found
        for field in ("model", "seed", "batch_size"):
            before, now = state["config"][field], json.loads(json.dumps(to_dict(self.config)))[field]
            if before != now:
                raise ValueError(f"{field}={now}: the run in {self.run_dir} was started with {before}")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors["weights"][name])
                self.ema[name].copy_(tensors["ema"][name])
        self.weights.publish()
        for optimizer in self.optimizers.values():
            restore_optimizer(optimizer, tensors["optimizer"], self.masters)
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]

    def finish(self) -> Path:
        """Writes the EMA weights to ``run_dir/final`` in ``save_pretrained`` layout."""
        final = self.run_dir / "final"
        model = EMMDiTTransformer2DModel(**to_dict(self.config.model))
        model.load_state_dict({**model.state_dict(), **{k: v.cpu() for k, v in self.ema.items()}})
        model.save_pretrained(final)
        return final

    def fit(self) -> Path:
        """Trains to ``config.steps`` and returns the folder of the final weights."""
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            about = {
                "config": to_dict(config),
                "environment": environment_report(),
                "encoders": self.encoders.fingerprint,
            }
            (self.run_dir / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        metrics = MetricsWriter(self.run_dir / "metrics.jsonl") if main else None
        if main:
            metrics.truncate_after(self.step)
        bar = tqdm(
            total=config.steps, initial=self.step, disable=not main, mininterval=1 if sys.stderr.isatty() else 30
        )
        while self.step < config.steps:
            started = time.perf_counter()
            row = self.train_step()
            self.seconds += time.perf_counter() - started
            bar.update()
            if main:
                self._report(row, metrics, bar, time.perf_counter() - started)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                if main:
                    self.save()
                self.accelerator.wait_for_everyone()
        if main:
            self.finish()
        self.accelerator.wait_for_everyone()
        return self.run_dir / "final"

    def _report(self, row: dict[str, float], metrics: MetricsWriter, bar: tqdm, seconds: float) -> None:
        config, due = self.config, lambda every: self.step % every == 0 or self.step == config.steps
        if due(config.log_every):
            speed = config.batch_size / seconds
            metrics.write(step=self.step, samples=self.step * config.batch_size, seconds=round(self.seconds, 3),
                          samples_per_second=round(speed, 2), skipped=self.skipped, **finite(row))  # fmt: skip
            bar.set_postfix(loss=f"{row['loss']:.3f}", speed=f"{speed:.0f}/s", refresh=False)
        if due(config.validate_every):
            metrics.write(step=self.step, samples=self.step * config.batch_size, **finite(self.validate()))
        if due(config.sample_every):
            self.sample_grid()


def finite(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: non-finite numbers become None."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def train(config: TrainConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs one training stage; see ``Trainer``. Returns the folder with the final weights."""
    return Trainer(dataclasses.replace(config), run_dir, resume, device).fit()
