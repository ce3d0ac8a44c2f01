"""Training E-MMDiT: one loop for the laptop and the node.

Each step takes the next batch of cached latents, mixes it with noise at a random ``t``, and moves the model's velocity
towards ``eps - x0``; with REPA it also turns the early tokens towards a vision model's features. Around these lines of
mathematics stand the things that make a run trustworthy:

* **Masters and Muon.** See ``optimizers.py``.
* **Randomness from the step number.** Everything random of step k comes from (seed, k), see ``batches.py``. A resumed
  run needs no generator state and repeats an uninterrupted one bit for bit.
* **Stops without loss.** SIGTERM ends the step and saves; SIGKILL costs the steps since the last checkpoint; a full
  disk ends the run and leaves the last checkpoint whole. See ``training_state.py``.
* **Processes.** Each works on its share of the batch; weights are the same everywhere, and the main process writes.
  A number of processes other than the launcher was asked for is an error.

Stage "base" learns from everything, stage "finetune" goes on from its weights: better data, lower rate, longer average.

Source: Nitro-E training recipe; the target and the timestep density are those of ``flow.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from nitro_e_lite import files, runtime
from nitro_e_lite.config import TrainConfig, to_dict
from nitro_e_lite.data.batches import Batches, Share, check_folders, first_captions
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.vision import load_vision, repa_loss
from nitro_e_lite.model import flow
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import model_flops
from nitro_e_lite.runtime import environment_report, tune_cpu
from nitro_e_lite.training import checkpoints, optimizers, weights
from nitro_e_lite.training.distributed import check_together, start_accelerator
from nitro_e_lite.training.metrics import Progress
from nitro_e_lite.viz import image_grid

LOSS_BINS = 5  # validation loss is reported in this many equal ranges of t
PROJECTOR = "projector."  # names of the REPA projector's weights: kept in checkpoints, not in the final weights


class Trainer:
    """One run of one stage.

    Args:
        config: what to train.
        run_dir: folder of the run: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/``, ``final/``.
        resume: continue from the newest checkpoint in ``run_dir``; simply starts when there is none.
        device: "cpu", "cuda", ... or None for the best there is.

    Raises:
        FileExistsError: ``run_dir`` holds a run and ``resume`` is False.
        FileNotFoundError: a folder of ``config.data`` holds no shards.
        RuntimeError: not as many processes found each other as were started, or not the same checkpoint.
        ValueError: a checkpoint of a differently shaped model is resumed, or model and encoders do not fit.
    """

    def __init__(self, config: TrainConfig, run_dir: str | Path, resume: bool = False, device: str | None = None):
        tune_cpu()  # first: threads that torch starts later inherit it
        self.config, self.run_dir = config, Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        if not resume and (self.checkpoints.exists() or (self.run_dir / "final").exists()):
            raise FileExistsError(f"run_dir={self.run_dir}: holds a run already; resume it or name another folder")
        if config.stage == "finetune" and not config.start_from:
            raise ValueError("start_from='': fine-tuning goes on from a base model; name its run folder")
        check_folders(config.data)
        self.accelerator = start_accelerator(config, self.run_dir, device)
        self.device, world = self.accelerator.device, self.accelerator.num_processes
        if config.batch_size % (world * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size}: must be a multiple of the {world} processes times "
                f"accumulate={config.accumulate}"
            )
        self.encoders = load_encoders(config.data.encoders, device=self.device, dtype=self._dtype())
        self._check_encoders()
        with self.accelerator.main_process_first():
            self.batches = Batches(config, self.encoders, self.accelerator.process_index, world)
        self.vision = None
        self._build()
        flops = model_flops(dict(self._model_arguments()), self.encoders.max_text_length)
        self.progress = Progress(self.accelerator, config, self.run_dir, flops)
        self.step, self.skipped = 0, 0
        if resume:
            self._restore()
            check_together(self.accelerator, self.step, self.run_dir)

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _check_encoders(self) -> None:
        model = self.config.model
        for name, there in (("in_channels", self.encoders.latent_channels), ("caption_channels", self.encoders.width)):
            if getattr(model, name) != there:
                raise ValueError(f"model.{name}={getattr(model, name)}: the encoders in use give {there}")

    def _model_arguments(self) -> dict:
        """Constructor arguments of the model in training; with REPA it has a projector."""
        config, arguments = self.config, to_dict(self.config.model)
        if config.repa.weight:
            arguments |= {"repa_channels": self._vision_width, "repa_hidden": config.repa.hidden}
        return arguments

    def _open_vision(self) -> int:
        """Finds the vision features: stored ones, or a vision model that looks at scenes; returns their width."""
        stored = self.batches.training.batch([0]).vision
        if stored is not None:
            return stored.shape[-1]
        if self.config.data.folders:
            raise ValueError(
                f"repa.weight={self.config.repa.weight}: {self.config.data.folders[0]} holds no vision features; "
                "encode the data with them, or train with repa.weight=0"
            )
        self.vision = load_vision(self.config.repa.vision, self.device, self._dtype())
        self.batches.needs_images = True
        return self.vision.width

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        if torch.version.hip:
            torch.backends.cudnn.benchmark = False  # MIOpen would search for minutes
        self._vision_width = self._open_vision() if config.repa.weight else None
        self.raw_model = EMMDiTTransformer2DModel(**self._model_arguments())
        if config.start_from:
            self._load_weights(load_transformer(config.start_from).state_dict())
        if config.gradient_checkpointing:
            self.raw_model.enable_gradient_checkpointing()
        if config.optimizer.white_text:
            weights.whiten_input(self.raw_model.text_embed, self._text_examples())
        matrices = optimizers.hidden_matrices(self.raw_model)
        self.raw_model.to(self.device)
        self.weights = weights.MasterWeights(self.raw_model, self._dtype())
        self.masters = self.weights.masters
        self.ema = {name: p.detach().clone() for name, p in self.masters.items()}
        self.optimizers = optimizers.build_optimizers(self.masters, matrices, config.optimizer)
        if config.compile:
            self.raw_model.compile(backend=config.compile)
        self.model = self.accelerator.prepare(self.raw_model)
        self._no_text = self.encoders.encode_text([""]).to(self._dtype())  # (1, L, Dc)

    def _text_examples(self, count: int = 1024) -> Tensor:
        """Text features (N, Dc) of the first training captions, and of the empty one."""
        batch = self.batches.training.batch(range(min(count, len(self.batches.training))))
        text = self.encoders.encode_text(first_captions(batch) + [""]) if batch.text is None else batch.text
        return text.float().cpu().flatten(0, 1)

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        """Starts from other weights; only a projector may be missing there or left over."""
        state = {name: value for name, value in state.items() if not name.startswith(PROJECTOR)}
        own = {n: v for n, v in self.raw_model.state_dict().items() if n.startswith(PROJECTOR)}
        self.raw_model.load_state_dict({**own, **state})

    # -- one step

    def _text(self, share: Share) -> Tensor:
        """Text features (B, L, Dc) in the number type of the computation."""
        if share.text is None:
            return self.encoders.encode_text(share.captions).to(self._dtype())
        dropped = torch.tensor([caption == "" for caption in share.captions], device=self.device)
        return torch.where(dropped[:, None, None], self._no_text, share.text.to(self.device, self._dtype()))

    def _losses(self, model: nn.Module, share: Share) -> dict[str, Tensor]:
        """Losses of each sample, float32 (B,): the squared velocity error, and with REPA the alignment."""
        dtype = self._dtype()
        latents, noise, t = (x.to(self.device) for x in (share.latents, share.noise, share.t))
        x_t = flow.interpolate(latents, noise, t)
        output = model(x_t.to(dtype), self._text(share), flow.TIMESTEP_SCALE * t)
        error = output.sample.float() - flow.velocity_target(latents, noise)
        losses = {"loss": error.square().flatten(1).mean(1)}
        if output.features is not None and model.training:
            features = share.vision.to(self.device) if self.vision is None else self.vision.encode(share.images)
            losses["repa_loss"] = repa_loss(output.features, features)
        return losses

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns what this process measured. A non-finite gradient leaves the weights as they are.

        The share of the process is worked off in ``accumulate`` parts. Their gradients are summed in float32.
        """
        config, totals = self.config, {}
        self.model.train()
        for part in self.batches.share(self.step).parts(config.accumulate):
            means = {name: values.mean() / config.accumulate for name, values in self._losses(self.model, part).items()}
            self.accelerator.backward(means["loss"] + config.repa.weight * means.get("repa_loss", 0.0))
            self.weights.collect_gradients()
            totals = {name: totals.get(name, 0.0) + mean.item() for name, mean in means.items()}
        norm = nn.utils.clip_grad_norm_(self.masters.values(), config.optimizer.clip)
        scale = optimizers.learning_rate_scale(self.step, config.steps, config.optimizer)
        if math.isfinite(norm):
            self._update(scale)
        else:
            self._skip()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.step += 1
        return {**totals, "gradient_norm": norm.item(), "lr_scale": scale}

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
        losses, times = [], []
        with self.weights.showing(self.ema):
            for share in self.batches.validation_shares():
                losses.append(self._losses(self.raw_model, share)["loss"].cpu())
                times.append(share.t)
        losses, times = torch.cat(losses), torch.cat(times)
        result = {"validation_loss": losses.mean().item()}
        for k in range(LOSS_BINS):
            inside = (times >= k / LOSS_BINS) & (times < (k + 1) / LOSS_BINS)
            if inside.any():
                result[f"validation_loss_{k / LOSS_BINS:.1f}_{(k + 1) / LOSS_BINS:.1f}"] = losses[inside].mean().item()
        return result

    @contextmanager
    def drawing(self) -> Iterator[NitroEPipeline]:
        """A pipeline with the EMA weights; training goes on afterwards."""
        self.model.eval()
        with self.weights.showing(self.ema):
            scheduler, parts = FlowMatchEulerDiscreteScheduler(1000), self.encoders.parts()
            pipeline = NitroEPipeline(self.raw_model, scheduler=scheduler, default_shift=self.config.shift, **parts)
            pipeline.set_progress_bar_config(disable=True)
            yield pipeline

    def sample_grid(self) -> Path:
        """A picture of eight fixed validation captions drawn with the EMA weights."""
        captions, generator = self.batches.validation_captions(8), torch.Generator().manual_seed(self.config.seed)
        guidance = self.config.guidance
        with self.drawing() as pipeline:
            images = pipeline(captions, num_inference_steps=20, guidance_scale=guidance, generator=generator).images
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
            optimizer |= checkpoints.optimizer_tensors(one, names)
        state = {"config": to_dict(self.config), "skipped": self.skipped, "seconds": self.progress.seconds}
        state |= {"rows": self.batches.counts, "encoders": self.encoders.fingerprint}
        tensors = {
            "weights": self.masters,
            "ema": self.ema,
            "optimizer": optimizer,
            "white": weights.white_roots(self.raw_model),
        }
        return checkpoints.save_checkpoint(self.checkpoints, self.step, tensors, state, self.config.keep_checkpoints)

    def _restore(self) -> None:
        found = checkpoints.load_latest(self.checkpoints)
        if found is None:
            return
        tensors, state = found
        say = self.accelerator.is_main_process
        checkpoints.compare_settings(state["config"], to_dict(self.config), state["step"], say)
        if state.get("encoders", self.encoders.fingerprint) != self.encoders.fingerprint:
            raise ValueError(f"data.encoders={self.config.data.encoders}: the run was started with other encoders")
        self.batches.compare(state.get("rows"))
        if tensors["weights"].keys() != self.masters.keys():
            raise ValueError(
                f"model: the run in {self.run_dir} has other weights; keep repa.weight and optimizer.white_text"
            )
        weights.set_white_roots(self.raw_model, tensors["white"])
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors["weights"][name])
                self.ema[name].copy_(tensors["ema"][name])
        self.weights.publish()
        for optimizer in self.optimizers.values():
            checkpoints.restore_optimizer(optimizer, tensors["optimizer"], self.masters)
        self.step, self.skipped, self.progress.seconds = state["step"], state["skipped"], state["seconds"]

    def finish(self) -> Path:
        """Writes the EMA weights to ``run_dir/final`` in ``save_pretrained`` layout, without a REPA projector."""
        final = self.run_dir / "final"
        model = EMMDiTTransformer2DModel(**to_dict(self.config.model))
        plain = weights.plain_weights(self.raw_model, self.ema)
        ema = {name: value for name, value in plain.items() if not name.startswith(PROJECTOR)}
        model.load_state_dict({**model.state_dict(), **ema})
        with files.whole_folder(final, "the checkpoints are intact") as partial:
            model.save_pretrained(partial)
        return final

    def fit(self) -> Path:
        """Trains to ``config.steps`` and returns the folder of the final weights.

        Raises:
            RunStopped: SIGTERM or SIGINT came; the checkpoint is written.
            OSError: a checkpoint could not be written; the one before it is intact.
            FloatingPointError: too many steps had non-finite gradients.
            RuntimeError: another process trains in this folder.
        """
        main = self.accelerator.is_main_process
        try:
            with files.sole_writer(self.run_dir, main), runtime.StopRequest() as request:
                if main:
                    self._describe()
                self.progress.start(self.step)
                while self.step < self.config.steps:
                    self.progress.begin_step()
                    row = self.train_step()
                    self.progress.end_step()
                    stop = self._agree(request.name is not None)
                    self._report(row)
                    if stop or self._due(self.config.checkpoint_every):
                        if main:
                            self.save()
                        self.accelerator.wait_for_everyone()
                    if stop and self.step < self.config.steps:
                        raise runtime.RunStopped(self._farewell(request.name))
        finally:
            self.progress.close()
        if main:
            self.finish()
        self.accelerator.wait_for_everyone()
        return self.run_dir / "final"

    def _describe(self) -> None:
        about = {
            "config": to_dict(self.config),
            "processes": self.accelerator.num_processes,
            "environment": environment_report(),
            "encoders": self.encoders.fingerprint,
        }
        (self.run_dir / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _agree(self, wish: bool) -> bool:
        """Whether any process wants to stop: the answer is the same on all of them."""
        if self.accelerator.num_processes == 1:
            return wish
        return self.accelerator.reduce(torch.tensor(float(wish), device=self.device), "sum").item() > 0

    def _farewell(self, name: str | None) -> str:
        return (
            f"Stopped by {name or 'a signal to another process'} after step {self.step} of {self.config.steps}; "
            f"the checkpoint is in {self.checkpoints}. The same command with --resume continues."
        )

    def _report(self, row: dict[str, float]) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if self._due(config.log_every):
            values = torch.tensor([row[name] for name in row], device=self.device)
            values = self.accelerator.reduce(values, "mean").tolist()  # over the processes
            self.progress.report(self.step, self.skipped, dict(zip(row, values, strict=True)))
        if main and self._due(config.validate_every):
            self.progress.write(self.step, self.validate())
        if main and self._due(config.sample_every):
            self.sample_grid()


def train(config: TrainConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs one training stage; see ``Trainer``. Returns the folder with the final weights."""
    return Trainer(dataclasses.replace(config), run_dir, resume, device).fit()
