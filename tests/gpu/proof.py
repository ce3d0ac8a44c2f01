"""What two CPU cores cannot show of a full run, measured by the engine itself; `test_proof.py` runs it.

Every check takes a `Scale` and an empty folder, raises `AssertionError` where something is wrong, and returns what it
measured. At `FULL` it uses the full model, with random weights and random data, on the accelerator; at `TINY` the same
lines run on a CPU, so that they still work on the day when there is an accelerator.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel

from nitro_e_lite.config import TrainConfig, override
from nitro_e_lite.evaluation.benchmark import median_seconds
from nitro_e_lite.experiments.launch import child_environment, run_processes
from nitro_e_lite.experiments.plan import DC_AE_F32, LLAMA_1B, activation_bytes
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.inference.low_memory import draw_one_by_one, save_memory
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.vision import FULL_VISION_SIZES, GRID
from nitro_e_lite.model import flow, fp8
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import TRAINING_PASSES, find_peak, model_flops
from nitro_e_lite.model.fp8_ladder import Choice, choose_rung
from nitro_e_lite.presets import preset
from nitro_e_lite.runtime import attention_backend, device_name, generator
from nitro_e_lite.stages.distill import Distill
from nitro_e_lite.stages.pretrain import repa_loss
from nitro_e_lite.stages.rewards_forward import ForwardRewards
from nitro_e_lite.stages.rewards_grpo import GrpoRewards
from nitro_e_lite.stages.sprint import Sprint
from nitro_e_lite.training.checkpoints import load_latest
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import build_optimizers
from nitro_e_lite.training.weights import MasterWeights


@dataclass(frozen=True)
class Scale:
    """What is measured, and on what.

    Attributes:
        device: "cpu", or None for the accelerator.
        model: arguments of the transformer.
        batches: rows at once, from few to many.
        steps: to time.
        text, vision: configurations of the on-line encoders.
        autoencoder: arguments of the decoder.
        tokens: of a caption.
        projector: inner width of the one for REPA.
        compile: back end; "" at tiny size, where other tests compile.
    """

    device: str | None
    model: dict[str, Any]
    batches: tuple[int, ...]
    steps: int
    text: LlamaConfig
    vision: Dinov2Config
    autoencoder: dict[str, Any]
    tokens: int
    projector: int
    compile: str

    @property
    def precision(self) -> str:
        return "fp32" if self.device == "cpu" else "bf16"


FULL = Scale(
    device=None,
    model={},
    batches=(32, 64, 128, 256),
    steps=10,
    text=LlamaConfig(**LLAMA_1B),
    vision=Dinov2Config(**FULL_VISION_SIZES),
    autoencoder=DC_AE_F32,
    tokens=128,
    projector=2048,
    compile="inductor",
)
_SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
TINY = Scale(
    device="cpu",
    model=dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, caption_channels=32, block_groups=(1, 1, 1)
    ),
    batches=(2, 4),
    steps=2,
    text=LlamaConfig(vocab_size=64, intermediate_size=32, num_key_value_heads=2, **_SMALL),
    vision=Dinov2Config(patch_size=4, image_size=16, mlp_ratio=1, **_SMALL),
    autoencoder=dict(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ),
    tokens=16,
    projector=32,
    compile="",
)
SCALES = {"full": FULL, "tiny": TINY}


class RandomData(Stage):
    """Stage 1 on random latents: the transformer with REPA, fed by stored features or by encoders beside it."""

    scale: Scale
    online = False

    def __init__(self, config: TrainConfig, placement: Placement):
        scale, self.config, self.placement = self.scale, config, placement
        torch.manual_seed(0)
        arguments = scale.model | {"repa_channels": scale.vision.hidden_size, "repa_hidden": scale.projector}
        self.model = EMMDiTTransformer2DModel(**arguments)
        adam = lambda masters: build_optimizers(masters, set(), config.optimizer)  # noqa: E731
        self.modules = {"transformer": Trainable(self.model, adam, lambda step: 1.0, config.optimizer.clip)}
        self.flops = model_flops(arguments, scale.tokens)
        self.text = self.vision = None
        if self.online:
            with placement.device:
                self.text = LlamaModel(scale.text).to(placement.dtype).eval().requires_grad_(False)
                self.vision = Dinov2Model(scale.vision).to(placement.dtype).eval().requires_grad_(False)

    def _random(self, step: int, what: str, *shape: int) -> torch.Tensor:
        """The same numbers for any number of processes, in host memory as a reader would have them."""
        rows = [torch.randn(shape, generator=generator(0, step, what, row)) for row in self.placement.rows]
        values = torch.stack(rows)
        on_host = self.placement.device.type != "cpu"
        return (values.pin_memory() if on_host else values).to(self.placement.device, non_blocking=True)

    @torch.no_grad()
    def _features(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale, dtype, count = self.scale, self.placement.dtype, len(self.placement.rows)
        if not self.online:
            text = self._random(step, "text", scale.tokens, self.model.config.caption_channels)
            return text.to(dtype), self._random(step, "vision", GRID**2, scale.vision.hidden_size)
        ids = torch.zeros(count, scale.tokens, dtype=torch.long, device=self.placement.device)
        text = self.text(ids).last_hidden_state
        side = GRID * scale.vision.patch_size
        pictures = torch.zeros(count, 3, side, side, device=self.placement.device, dtype=dtype)
        return text, self.vision(pictures).last_hidden_state[:, 1:]

    def losses(self, step: int, part: int) -> dict[str, dict[str, torch.Tensor]]:
        size = self.model.config
        with self.placement.clock.measure("data"):
            shape = size.in_channels, size.sample_size, size.sample_size
            latents, noise = (self._random(step, name, *shape) for name in ("latents", "noise"))
            t = torch.sigmoid(self._random(step, "t", 1)).flatten()
        text, vision = self._features(step)
        x_t = flow.interpolate(latents, noise, t)
        output = self.model(x_t.to(self.placement.dtype), text, flow.TIMESTEP_SCALE * t)
        error = (output.sample.float() - flow.velocity_target(latents, noise)).square().flatten(1).mean(1)
        return {"transformer": {"loss": error + 0.5 * repa_loss(output.features, vision), "flow_loss": error}}

    def export(self, weights: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
        save_file({name: value.cpu() for name, value in weights["transformer"].items()}, folder / "model.safetensors")


def settings(scale: Scale, batch: int, **changes: Any) -> TrainConfig:
    """The recipe of stage 1, for a run on random data."""
    few = {"validate_every": 10**6, "sample_every": 10**6, "checkpoint_every": 10**6, "milestones": ()}
    few |= {"snapshot_every": 0, "tracker": "none", "log_every": scale.steps, "steps": 2 * scale.steps}
    full = preset("base", "full")
    return dataclasses.replace(full, precision=scale.precision, batch_size=batch, **(few | changes))


def start(scale: Scale, folder: Path, config: TrainConfig, online: bool = False, resume: bool = False) -> Engine:
    """An engine on random data."""
    stage = type("RandomData", (RandomData,), {"scale": scale, "online": online})
    return Engine(config, stage, folder, resume, scale.device)


def steps_per_second(run: Engine, steps: int) -> float:
    """Of a run, after two steps that nobody times."""
    for _ in range(2):
        run.step()
    wait(run.device)
    begin = time.perf_counter()
    for _ in range(steps):
        run.step()
    wait(run.device)
    return steps / (time.perf_counter() - begin)


def wait(device: torch.device) -> None:
    """Until the device has caught up."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_gigabytes(device: torch.device) -> float:
    """Most memory since the last call; 0 on a CPU, which does not count it."""
    if device.type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated(device) / 1e9
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return found


# -- the checks


def bf16_step_equals_cpu(scale: Scale, folder: Path) -> dict[str, float]:
    """Loss and gradient of one batch: in bf16 on the device, in float32 on the CPU."""
    device = torch.device(scale.device or "cuda")
    found = []
    for dtype, place in ((torch.float32, torch.device("cpu")), (torch.bfloat16, device)):
        torch.manual_seed(0)
        model = EMMDiTTransformer2DModel(**scale.model).to(place).train()
        weights, size = MasterWeights(model, dtype), model.config
        drawn = torch.Generator().manual_seed(1)
        latents, noise = torch.randn(2, 2, size.in_channels, size.sample_size, size.sample_size, generator=drawn)
        text, t = torch.randn(2, scale.tokens, size.caption_channels, generator=drawn), torch.tensor([0.3, 0.7])
        x_t, target = flow.interpolate(latents, noise, t), flow.velocity_target(latents, noise)
        output = model(x_t.to(place, dtype), text.to(place, dtype), flow.TIMESTEP_SCALE * t.to(place)).sample
        loss = (output.float() - target.to(place)).square().mean()
        loss.backward()
        weights.collect_gradients()
        gradient = torch.cat([p.grad.flatten().cpu() for p in weights.masters.values() if p.grad is not None])
        found.append((loss.item(), gradient))
    (loss, gradient), (other, rounded) = found
    result = {
        "loss_cpu": loss,
        "loss_device": other,
        "gradient_cosine": F.cosine_similarity(gradient, rounded, dim=0).item(),
        "gradient_norm_ratio": (rounded.norm() / gradient.norm()).item(),
    }
    assert abs(other / loss - 1) < 0.01 and result["gradient_cosine"] > 0.99, result
    assert abs(result["gradient_norm_ratio"] - 1) < 0.02, result
    return result


def resume_equals_one_go(scale: Scale, folder: Path) -> dict[str, float]:
    """Half a run, then the rest from its checkpoint, beside a run in one go; two processes where there are two."""
    ranks = 1 if scale.device == "cpu" else min(2, torch.accelerator.device_count())
    name = next(name for name, one in SCALES.items() if one is scale)
    for run, stop in (("whole", 0), ("parts", scale.steps), ("parts", 0)):
        if ranks == 1:
            train_some(name, folder / run, stop)
        else:
            words = [__file__, name, str(folder / run), str(stop)]
            run_processes(words, ranks, child_environment(ranks, scale.device))
    one, other = (load_file(folder / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    largest = max(((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-3)).item() for name in one)
    assert largest < (1e-6 if scale.device == "cpu" else 1e-3), largest  # atomic additions may come in another order
    rows = list(read_jsonl(folder / "parts" / "metrics.jsonl"))
    return {"ranks": ranks, "largest_difference": largest} | {
        name: value for name, value in rows[-1].items() if name.endswith("_seconds") or name == "mfu"
    }


def train_some(scale: str, folder: str | Path, stop: str | int) -> None:
    """A run of `2 * steps` steps, or its first `stop` with a checkpoint; also the worker of several processes."""
    chosen = SCALES[scale]
    run = start(chosen, Path(folder), settings(chosen, 2 * chosen.batches[0]), resume=True)
    if not int(stop):
        run.fit()
        return
    while run.global_step < int(stop):
        run.step()
    if run.accelerator.is_main_process:
        run.save()
    run.accelerator.wait_for_everyone()


def no_step_waits_for_the_host(scale: Scale, folder: Path) -> dict[str, float]:
    """Synchronisations in steps between two looks, as torch's own debug mode sees them."""
    run = start(scale, folder, settings(scale, scale.batches[0]))
    run.step(), run.step()
    return {"steps": scale.steps, "waits": count_waits(run, scale.steps)}


def count_waits(run: Engine, steps: int) -> int:
    """How often steps of a run wait for the device; on CUDA, never."""
    watched = run.device.type == "cuda"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if watched:
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            run.step()
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in heard if "synchroniz" in str(one.message)]
    assert not watched or (not run.host_decides and not waits), waits[:3]
    return len(waits)


def later_stages_learn(scale: Scale, folder: Path) -> dict[str, float]:
    """Both students and both ways to learn from rewards, of a tiny model in the number type of full runs."""
    from tiny import draw, save_tiny_teacher

    save_tiny_teacher(folder / "teacher")
    draw(load_pipeline(folder / "teacher", scale.device), folder / "drawn").run()
    model = [f"teacher={folder / 'teacher'}", f"data.encoders={folder / 'teacher'}"]
    model += [f"data.folders=[{folder / 'drawn'}]", "data.validation_rows=2", "gate_window=100"]
    paid = [f"start_from={folder / 'teacher'}", "rewards=[[redness, 1.0]]", "rollout_steps=3", "grpo.window_range=2"]
    runs = {
        "distill": (Distill, "distill", model),
        "sprint": (Sprint, "sprint", [*model, "dense_time=false"]),
        "forward": (ForwardRewards, "rewards", [*paid, "method=forward"]),
        "grpo": (GrpoRewards, "rewards", [*paid, "method=grpo", "grpo.window=1"]),
    }
    found = {}
    for name, (stage, kind, changes) in runs.items():
        config = override(preset(kind, "smoke"), [f"precision={scale.precision}", *changes])
        run = Engine(config, stage, folder / name, False, scale.device)
        rows = [run.step() for _ in range(config.steps - 2)]  # its last two look for waits
        found[name] = float(rows[-1].get("student_loss", rows[-1].get("loss", 0.0)))
        assert all(torch.isfinite(torch.as_tensor(value)) for row in rows for value in row.values()), rows
        if kind != "rewards":  # which draw and judge
            count_waits(run, 2)
    return found


def compiled_step(scale: Scale, folder: Path) -> dict[str, float]:
    """Speed of a step as written and compiled, and that they compute the same loss."""
    found = {}
    for name, backend in (("as written", ""), ("compiled", scale.compile)):
        run = start(scale, folder / name, settings(scale, scale.batches[0], compile=backend))
        found[f"{name}, loss"] = float(run.step()["loss"])
        found[f"{name}, images/s"] = scale.batches[0] * steps_per_second(run, scale.steps)
        del run
    assert abs(found["compiled, loss"] / found["as written, loss"] - 1) < 0.01, found
    return found


def memory_by_batch(scale: Scale, folder: Path) -> dict[str, float]:
    """Peak memory of a step, beside what the planner says of its activations."""
    sample = activation_bytes(scale.model, scale.tokens, scale.precision, on_cpu=scale.device == "cpu")
    found = {"planned activations of a sample, GB": sample / 1e9}
    for batch in scale.batches:
        run = start(scale, folder / str(batch), settings(scale, batch))
        peak_gigabytes(run.device)
        try:
            run.step(), run.step()
        except torch.OutOfMemoryError:
            found[f"batch {batch}"] = float("inf")
            break
        found[f"batch {batch}, GB"] = peak_gigabytes(run.device)
        del run
    return found


def images_per_second(scale: Scale, folder: Path) -> dict[str, float]:
    """Stage 1 with stored features, and with the encoders beside it."""
    found, batch = {}, scale.batches[-2]
    for name, online in (("stored", False), ("on-line encoders", True)):
        run = start(scale, folder / name, settings(scale, batch), online)
        speed = batch * steps_per_second(run, scale.steps)
        found[f"{name}, images/s"] = speed
        if peak := find_peak(device_name(run.device)):
            found[f"{name}, MFU"] = speed * TRAINING_PASSES * run.stage.flops / peak
        del run
        gc.collect()
    assert all(value > 0 for value in found.values())
    return found


def attention_back_ends(scale: Scale, folder: Path) -> dict[str, Any]:
    """Which back end attention takes by itself, and the milliseconds of each that can."""
    device = torch.device(scale.device or "cuda")
    heads, width = scale.model.get("num_attention_heads", 24), scale.model.get("attention_head_dim", 32)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = torch.randn(3, scale.batches[0], heads, 256 + scale.tokens, width, device=device, dtype=dtype)
    found: dict[str, Any] = {"chosen": attention_backend(device)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend), warnings.catch_warnings(action="ignore"):
                run = lambda: F.scaled_dot_product_attention(query, key, value)  # noqa: E731
                found[f"{backend.name}, ms"] = 1000 * median_seconds(run)
        except RuntimeError:
            found[f"{backend.name}, ms"] = "cannot"
    assert device.type == "cpu" or found["chosen"] != "MATH", found
    return found


def checkpoint_time(scale: Scale, folder: Path) -> dict[str, float]:
    """How long a checkpoint holds the training up, and how long its writing takes beside it."""
    run = start(scale, folder, settings(scale, scale.batches[0], ema_decay=0.999))
    run.step()
    run.save()  # page-locked memory is got once
    run.step()
    wait(run.device)
    begin = time.perf_counter()
    run.save(wait=False)
    held_up = time.perf_counter() - begin
    run.writer.wait()
    size = sum(path.stat().st_size for path in folder.rglob("step-00000002/*"))
    assert load_latest(folder / "checkpoints")[1]["step"] == 2
    return {"held up, s": held_up, "in all, s": time.perf_counter() - begin, "GB": size / 1e9}


def drawing_memory(scale: Scale, folder: Path) -> dict[str, float]:
    """Peak memory of drawing at once as usual, and one by one in little memory."""
    device, found = torch.device(scale.device or "cuda"), {}
    for name in ("as usual", "low memory"):
        pipeline = random_pipeline(scale, device)
        seeds, prompts = [torch.Generator().manual_seed(k) for k in range(4)], ["a red circle"] * 4
        peak_gigabytes(device)
        if name == "low memory":
            save_memory(pipeline, device)
            pictures = list(draw_one_by_one(pipeline, prompts, seeds, num_inference_steps=2))
        else:
            pictures = pipeline.to(device)(prompts, 2, generator=seeds).images
        assert len(pictures) == 4
        found[f"{name}, GB"] = peak_gigabytes(device)
        del pipeline
    return found


def random_pipeline(scale: Scale, device: torch.device) -> NitroEPipeline:
    """A pipeline with random weights in main memory, in the number type of the device."""
    from tiny import build_tiny_pipeline

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    parts = (EMMDiTTransformer2DModel(**scale.model), AutoencoderDC(**scale.autoencoder), LlamaModel(scale.text))
    parts = [torch.nn.Module.to(one, dtype).eval() for one in parts]
    scheduler, tokenizer = FlowMatchEulerDiscreteScheduler(1000, shift=1.0), build_tiny_pipeline().tokenizer
    pipeline = NitroEPipeline(*parts, tokenizer, scheduler, max_text_length=scale.tokens)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compiled_drawing_equals_written(scale: Scale, folder: Path) -> dict[str, float]:
    """Latents of the compiled pipeline beside those of the plain one, at two batch sizes, one after the other twice."""
    pipeline, found = random_pipeline(scale, torch.device("cpu")).to(scale.device or "cuda"), {}

    def draw(batch: int) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(k) for k in range(batch)]
        return pipeline(["a red circle"] * batch, 2, generator=seeds, output_type="latent").images.float()

    plain = {batch: draw(batch) for batch in (1, 3)}
    pipeline.compile(**({} if scale.compile else {"backend": "eager"}))
    for turn in range(2):  # a graph writes to one place: the second turn must not change what the first has drawn
        for batch, expected in plain.items():
            off = ((draw(batch) - expected).norm() / expected.norm()).item()
            assert off < (0.02 if scale.compile else 1e-5), (batch, turn, off)
            found[f"batch {batch}, turn {turn + 1}"] = off
    return found


@torch.no_grad()
def fp8_is_near_16_bit(scale: Scale, folder: Path) -> dict[str, float]:
    """A pass on each rung that the device has, as written and compiled, beside the same in bfloat16."""
    device, found = torch.device(scale.device or "cuda"), {}
    torch.manual_seed(0)
    model = torch.nn.Module.to(EMMDiTTransformer2DModel(**scale.model), device, torch.bfloat16).eval()
    size = model.config
    latents = torch.randn(2, size.in_channels, size.sample_size, size.sample_size)
    inputs = latents.to(model.dtype), torch.randn(2, scale.tokens, size.caption_channels).to(model.dtype)
    inputs = [one.to(device) for one in (*inputs, torch.full((2,), 500.0))]
    exact, best = model(*inputs).sample.float(), choose_rung(device, torch.bfloat16)
    for choice in dict.fromkeys((best, Choice("weight_only"))):
        rounded = copy.deepcopy(model)
        assert fp8.quantize_model(rounded, choice=choice).converted
        ways = {"as written": rounded} | ({"compiled": torch.compile(rounded)} if scale.compile else {})
        for name, way in ways.items():
            off = ((way(*inputs).sample.float() - exact).norm() / exact.norm()).item()
            assert 0 < off < 0.1, (choice.rung, name, off)
            found[f"{choice.rung}, {name}"] = off
    return found


CHECKS: tuple[Callable[[Scale, Path], dict[str, Any]], ...] = (
    bf16_step_equals_cpu,
    resume_equals_one_go,
    no_step_waits_for_the_host,
    later_stages_learn,
    compiled_step,
    memory_by_batch,
    images_per_second,
    attention_back_ends,
    checkpoint_time,
    drawing_memory,
    compiled_drawing_equals_written,
    fp8_is_near_16_bit,
)

if __name__ == "__main__":
    train_some(*sys.argv[1:])
