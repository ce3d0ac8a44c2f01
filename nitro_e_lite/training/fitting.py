"""The training loop of the lite encoders: plain, resumable, on one device.

``fit`` asks a function for the loss of step k and takes the step. The function draws everything random from
(seed, k) alone, so that a killed run continues bit for bit from its last checkpoint: no sampler state, no
generator state.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nitro_e_lite.config import RunConfig
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.runtime import tune_cpu
from nitro_e_lite.training.checkpoints import load_latest, optimizer_tensors, restore_optimizer, save_checkpoint
from nitro_e_lite.training.metrics import MetricsWriter

# What this loop does not do: with another value the run would not be the one that its settings describe.
NOT_DONE = ("accumulate", "precision", "ema_decay", "max_skipped", "compile", "tracker", "peak_tflops")


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step, a function of (seed, step) alone."""
    return torch.Generator().manual_seed((seed << 32) + step)


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def fit(
    config: RunConfig,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    losses: Callable[[int], dict[str, Tensor]],
    run_dir: Path,
    resume: bool,
    title: str,
    stop_at: int | None = None,
) -> None:
    """Minimises ``losses(step)["loss"]``, with a progress bar, ``metrics.jsonl`` and ``checkpoints/``.

    Args:
        config: steps, intervals, ``warmup_steps`` and ``max_grad_norm`` of an encoder.
        module: every parameter to train.
        optimizers: optimisers over those parameters.
        losses: step -> scalar tensors by name, of which ``loss`` is minimised.
        run_dir: folder of the run.
        resume: continue from the newest checkpoint of ``run_dir`` when there is one.
        title: label of the progress bar.
        stop_at: ends early after this step (the tests' kill).

    Raises:
        ValueError: when ``run_dir`` holds a run and ``resume`` is false, or a setting that this loop does not follow.
        FloatingPointError: when the loss is not finite.
    """
    for name in NOT_DONE:
        if getattr(config, name) != getattr(RunConfig(), name):
            raise ValueError(f"{name}={getattr(config, name)!r}: the encoders are trained without; leave it as it is")
    tune_cpu()
    speed_up(module)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and not resume:
        raise ValueError(f"run_dir={run_dir}: holds a run already; pass resume=True or another folder")
    start = _restore(checkpoints, module, optimizers)
    rates = [[g.setdefault("initial_lr", g["lr"]) for g in o.param_groups] for o in optimizers]
    metrics = MetricsWriter(run_dir / "metrics.jsonl")
    metrics.truncate_after(start)
    end = min(config.steps, stop_at or config.steps)
    bar = tqdm(range(start, end), initial=start, total=config.steps, desc=title, mininterval=5)
    for step in bar:
        factor = learning_rate_factor(step, config.steps, config.warmup_steps)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        values = losses(step)
        values["loss"].backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            row = {name: round(value.item(), 6) for name, value in values.items()}
            metrics.write(step=done, **row, grad_norm=round(norm.item(), 5), lr_factor=round(factor, 6))
            bar.set_postfix({name: f"{value:.4f}" for name, value in row.items()})
        if done % config.checkpoint_every == 0 or done == end:
            _save(checkpoints, done, module, optimizers, config.keep_checkpoints)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _save(checkpoints: Path, step: int, module: nn.Module, optimizers: list[torch.optim.Optimizer], keep: int) -> None:
    names = {p: name for name, p in module.named_parameters()}
    entries: dict[str, Tensor] = {}
    for optimizer in optimizers:
        entries |= optimizer_tensors(optimizer, names)
    save_checkpoint(checkpoints, step, {"module": _tensors(module), "optimizer": entries}, {}, keep)


def _restore(checkpoints: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Loads the newest checkpoint and returns its step, 0 when there is none."""
    if (found := load_latest(checkpoints)) is None:
        return 0
    tensors, state = found
    with torch.no_grad():
        for name, value in _tensors(module).items():
            value.copy_(tensors["module"][name])
    for optimizer in optimizers:
        restore_optimizer(optimizer, tensors["optimizer"], dict(module.named_parameters()))
    return state["step"]
