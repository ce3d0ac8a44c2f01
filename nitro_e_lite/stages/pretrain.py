"""Stages 1 and 2: E-MMDiT learns velocities, and with REPA to see what a vision model sees.

Each step takes the next batch of cached latents, mixes it with noise at a random `t`, and moves the model's velocity
towards `eps - x0`:

    loss = mean over a sample of (v(x_t, text, t) - (eps - x0))^2

**REPA.** A diffusion transformer has to find out what is in a picture before it can predict a velocity, and learns that
slowly from the velocity alone. A vision model that was trained without labels knows it already. So the tokens after the
first group of blocks are sent through a small MLP and compared with the vision model's patch features of the *clean*
picture:

    loss = flow loss - weight * mean over tokens of cos(projector(tokens), features)

Only directions count, and the vision model is frozen. Both have 256 tokens on the same 16x16 grid, so that token n of
one is compared with token n of the other.

"base" (stage 1) learns from everything, "finetune" (stage 2) goes on from its weights: better data, a lower rate, an
average (at full scale) or a longer one (at lite scale). With `lora.rank` only an adapter in the blocks learns:
a style or a subject from few pictures, in a file of its own. "1024px" goes on from stage 2 once more with four times
the tokens, twice as far from corner to corner, and with full attention in every block, as the published 1024 px model
has.

Source: Nitro-E training recipe (stage 1: REPA with weight 0.5 after group 1; stage 2: EMA); REPA arXiv 2410.06940; the
target and the timestep density are those of `flow.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from PIL.Image import Image
from torch import Tensor

from nitro_e_lite.config import TrainConfig, to_dict
from nitro_e_lite.data.batches import Batches, LocalBatch, check_folders, first_captions
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.hub import weights_hash
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.vision import load_vision
from nitro_e_lite.model import flow
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import model_flops
from nitro_e_lite.model.official_weights import lora_targets, save_lora
from nitro_e_lite.runtime import send
from nitro_e_lite.training import weights
from nitro_e_lite.training.distributed import fill_rows
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import build_optimizers, hidden_matrices, learning_rate_scale
from nitro_e_lite.viz import image_grid

LOSS_BINS = 5  # validation loss is reported in this many equal ranges of t
PROJECTOR = "projector."  # names of the REPA projector's weights: kept in checkpoints, not in the final weights


class Pretrain(Stage):
    """The transformer in stages 1 and 2.

    Args:
        config: settings of the run.
        placement: see there.

    All processes validate together, each on its part of the rows.

    Attributes:
        model: the transformer.
        encoders: the frozen encoders.
        batches: training and validation data.

    Raises:
        FileNotFoundError: a folder of `config.data` holds no shards.
        ValueError: model and encoders do not fit, or `start_from` is missing or of another shape.
    """

    validates_together = True

    def __init__(self, config: TrainConfig, placement: Placement):
        self.config, self.placement = config, placement
        if config.stage != "base" and not config.start_from:
            raise InvalidValue("start_from='': fine-tuning goes on from a base model; name a run folder or lite")
        if config.lora.rank and (config.repa.weight or not config.start_from):
            raise InvalidValue(f"lora.rank={config.lora.rank}: needs a model to adapt (start_from), and repa.weight=0")
        check_folders(config.data)
        self.encoders = load_encoders(config.data.encoders, device=placement.device, dtype=placement.dtype)
        self._check_encoders()
        self.batches = Batches(config, self.encoders, placement.rows, placement.device)
        self.vision = None
        self.model = self._build()
        matrices = set() if config.lora.rank else hidden_matrices(self.model)  # an adapter learns with AdamW alone
        optimizers = partial(build_optimizers, matrices=matrices, config=config.optimizer, dtype=placement.dtype)
        schedule = partial(learning_rate_scale, steps=config.steps, config=config.optimizer)
        self.modules = {"transformer": Trainable(self.model, optimizers, schedule, config.optimizer.clip)}
        self._no_text = self.encoders.encode_text([""]).to(placement.dtype)  # (1, L, Dc)
        self.flops = model_flops(self._model_arguments(), self.encoders.max_text_length)

    def _check_encoders(self) -> None:
        model = self.config.model
        for name, there in (("in_channels", self.encoders.latent_channels), ("caption_channels", self.encoders.width)):
            if getattr(model, name) != there:
                raise InvalidValue(f"model.{name}={getattr(model, name)}: the encoders in use give {there}")

    def _model_arguments(self) -> dict:
        """Constructor arguments of the model in training; with REPA it has a projector."""
        config, arguments = self.config, to_dict(self.config.model)
        if config.repa.weight:
            arguments |= {"repa_channels": self._vision_width, "repa_hidden": config.repa.hidden}
        return arguments

    def _open_vision(self) -> int:
        """Finds the vision features: stored ones, or a vision model that looks at pictures; returns their width."""
        stored = self.batches.training.batch([0]).vision
        if stored is not None:
            return stored.shape[-1]
        if self.config.data.folders and not self.batches.training.has_pictures:
            raise InvalidValue(
                f"repa.weight={self.config.repa.weight}: {self.config.data.folders[0]} holds no vision features and no "
                "pictures; encode the data with --pictures or --vision, or train with repa.weight=0"
            )
        self.vision = load_vision(self.config.repa.vision, self.placement.device, self.placement.dtype)
        self.batches.needs_images = True
        return self.vision.width

    def _build(self) -> EMMDiTTransformer2DModel:
        config = self.config
        torch.manual_seed(config.seed)
        self._vision_width = self._open_vision() if config.repa.weight else None
        model = EMMDiTTransformer2DModel(**self._model_arguments())
        if config.start_from:
            self._start(model)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.lora.rank:
            names = lora_targets(model, mlp=config.lora.targets == "attention_mlp")
            self._adapted = weights_hash({"transformer": model})
            peft = PeftConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=names)
            inject_adapter_in_model(peft, model)  # and freezes the rest
        elif config.optimizer.whiten_text_input:
            weights.whiten_input(model.text_embed, self._text_examples())
        return model

    def _start(self, model: EMMDiTTransformer2DModel) -> None:
        """Gives the model the weights that `start_from` names; another size of pictures is its own business."""
        start, reason = load_transformer(self.config.start_from), ""
        try:
            state = _with_projector(model, start.state_dict())
            if start.config.sample_size != model.config.sample_size:
                state["positions"] = model.positions  # the table belongs to the size
            model.load_state_dict(state)
        except RuntimeError as error:  # its first line says which class could not be loaded
            reason = str(error).splitlines()[1].strip()
        if start.config.dense_time:
            reason = "it is told the noise level as students of Sprint are"
        if reason:
            raise InvalidValue(f"start_from={self.config.start_from!r}: does not fit the model: {reason}")

    def _text_examples(self, count: int = 1024) -> Tensor:
        """Text features of tokens (N, Dc): of the first training captions and, where not stored, of the empty one."""
        batch = self.batches.training.batch(range(min(count, len(self.batches.training))))
        text = self.encoders.encode_text(first_captions(batch) + [""]) if batch.text is None else batch.text
        return text.float().cpu().flatten(0, 1)

    # -- one step

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """The loss of each sample (B,); with REPA also its two terms."""
        with self.placement.clock.measure("data"):
            batch = self.batches.microbatch(step, part, len(self.placement.microbatches)).to(self.placement.device)
        flow_loss, projected, cut = self._flow_loss(batch)
        losses = {"loss": flow_loss} if cut is None else {"loss": flow_loss, "captions_cut": cut}
        if projected is not None:
            target = batch.vision if self.vision is None else self.vision.encode(batch.images)
            alignment = repa_loss(projected, target)
            total = flow_loss + self.config.repa.weight * alignment
            losses |= {"loss": total, "flow_loss": flow_loss, "repa_loss": alignment}
        return {"transformer": losses}

    def _flow_loss(self, batch: LocalBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Squared velocity error of each sample, float32 (B,); projected tokens for REPA, if any; and see `_text`."""
        text, cut = self._text(batch)
        x_t = flow.interpolate(batch.latents, batch.noise, batch.t)
        output = self.model(x_t.to(self.placement.dtype), text, flow.TIMESTEP_SCALE * batch.t)
        error = output.sample.float() - flow.velocity_target(batch.latents, batch.noise)
        return error.square().flatten(1).mean(1), output.features, cut

    def _text(self, batch: LocalBatch) -> tuple[Tensor, Tensor | None]:
        """Text features (B, L, Dc) in the number type of the computation.

        Where they are computed here: also 1 for each caption longer than the encoder takes, else 0 (B,). Its mean, the
        share of captions that lose their end, is reported with the losses.
        """
        dtype, device = self.placement.dtype, self.placement.device
        if batch.text is None:
            places: list[int] = []
            text = self.encoders.encode_text(batch.captions, places).to(dtype)
            return text, send(torch.tensor([float(k in places) for k in range(len(batch.captions))]), device)
        dropped = send(torch.tensor([caption == "" for caption in batch.captions]), device)
        return torch.where(dropped[:, None, None], self._no_text, batch.text.to(dtype)), None

    # -- looking at the run

    def validate(self) -> dict[str, float]:
        """Flow loss on fixed pictures, captions, timesteps and noise: overall, and by range of t."""
        place, found = self.placement, [torch.empty(0, 2)]
        for batch in self.batches.validation_batches(place.rank, place.world):
            found.append(torch.stack([self._flow_loss(batch.to(place.device))[0].cpu(), batch.t], dim=1))
        mine = [row for rows in self.batches.validation_rows(place.rank, place.world) for row in rows]
        rows = fill_rows(torch.cat(found).to(place.device), mine, self.batches.validation_rows()[-1].stop)
        losses, times = rows.cpu().T.contiguous()  # (N,) each
        result = {"validation_loss": losses.mean().item()}
        for k in range(LOSS_BINS):
            inside = (times >= k / LOSS_BINS) & (times < (k + 1) / LOSS_BINS)
            if inside.any():
                result[f"validation_loss_{k / LOSS_BINS:.1f}_{(k + 1) / LOSS_BINS:.1f}"] = losses[inside].mean().item()
        return result

    def pipeline(self) -> NitroEPipeline:
        """A pipeline around the model as it stands; inside `Engine.averaged` that is the average."""
        scheduler, parts = FlowMatchEulerDiscreteScheduler(1000), self.encoders.parts()
        pipeline = NitroEPipeline(self.model, scheduler=scheduler, default_shift=self.config.shift, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def quality(self) -> tuple[dict[str, float], Image]:
        """Eight fixed captions from one noise: how much is in a picture, and how much captions change."""
        captions, shape = self.batches.validation_captions(8), self.batches.validation.shape
        one = torch.randn(1, *shape, generator=torch.Generator().manual_seed(self.config.seed))
        drawn = self.pipeline()(
            captions,
            num_inference_steps=20,
            guidance_scale=self.config.guidance,
            latents=one.repeat(len(captions), 1, 1, 1),
            output_type="np",
        )
        pictures = drawn.images  # (B, H, W, 3)
        numbers = {"contrast": float(pictures.std((1, 2)).mean()), "spread": float(pictures.std(0).mean())}
        return numbers, image_grid((255 * pictures).round().astype("uint8"), columns=4, labels=captions)

    def picture(self) -> Image:
        """A grid of eight pictures, of fixed validation captions."""
        captions, generator = self.batches.validation_captions(8), torch.Generator().manual_seed(self.config.seed)
        drawn = self.pipeline()(
            captions, num_inference_steps=20, guidance_scale=self.config.guidance, generator=generator
        )
        return image_grid(drawn.images, columns=4, labels=captions)

    # -- keeping the run

    def state(self) -> dict[str, Any]:
        """Which data and encoders the run reads, and the coordinates of a whitened layer."""
        facts = {"rows": self.batches.counts, "encoders": self.encoders.fingerprint}
        facts |= {"adapted": self._adapted} if self.config.lora.rank else {}
        return facts | weights.white_roots(self.model)

    def load_state(self, state: dict[str, Any]) -> None:
        """Compares data and encoders with those of the checkpoint and restores its whitening."""
        if state["encoders"] != self.encoders.fingerprint:
            raise InvalidValue(f"data.encoders={self.config.data.encoders}: the run was started with other encoders")
        if self.config.lora.rank and state.get("adapted", self._adapted) != self._adapted:
            raise InvalidValue(f"start_from={self.config.start_from}: the adapter was begun on another model")
        self.batches.compare(state["rows"])
        roots = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        if roots.keys() == weights.white_roots(self.model).keys():  # otherwise the engine's comparison raises
            weights.set_white_roots(self.model, roots)

    def data_digest(self) -> str:
        """Names the shards, their rows and which can be read."""
        return self.batches.digest

    def describe(self) -> dict[str, Any]:
        """The encoders' fingerprint, by which a loader knows whether it has the right ones."""
        return {"encoders": self.encoders.fingerprint}

    def export(self, averages: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The transformer in `save_pretrained` layout, without a REPA projector; or the adapter as a PEFT folder."""
        if self.config.lora.rank:
            lora = self.config.lora
            base = Path(self.config.start_from).name
            facts = {"r": lora.rank, "lora_alpha": lora.alpha, "base_model_name_or_path": base}
            return save_lora(averages["transformer"], folder, facts)
        model = EMMDiTTransformer2DModel(**to_dict(self.config.model))
        plain = weights.plain_weights(self.model, averages["transformer"])
        final = {name: value for name, value in plain.items() if not name.startswith(PROJECTOR)}
        model.load_state_dict({**model.state_dict(), **final})
        model.save_pretrained(folder)


def _with_projector(model: EMMDiTTransformer2DModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` to start from, with the model's own fresh projector in place of any that it has."""
    state = {name: value for name, value in state.items() if not name.startswith(PROJECTOR)}
    return {n: v for n, v in model.state_dict().items() if n.startswith(PROJECTOR)} | state


def repa_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity, averaged over tokens.

    Args:
        projected: the transformer's tokens after group 1, through the projector (B, N, C).
        target: features of the vision model (B, N, C).

    Returns:
        (B,), float32, in [-1, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if projected.shape != target.shape:
        raise InvalidValue(
            f"target={tuple(target.shape)}: must be shaped like the projected tokens {tuple(projected.shape)}; "
            "the vision model must see as many patches as there are tokens"
        )
    return -F.cosine_similarity(projected.float(), target.float(), dim=-1).mean(1)


def pretrain(config: TrainConfig, run_dir: str | Path, resume: bool = False, device: str | None = None) -> Path:
    """Runs stage 1 or 2; see `Engine` and `Pretrain`. Returns the folder with the final weights."""
    return Engine(config, Pretrain, run_dir, resume, device).fit()
