"""The processes of a run: how they find each other, and what they must agree on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch import Tensor

from nitro_e_lite.config import RunConfig
from nitro_e_lite.errors import InvalidValue, Unusable
from nitro_e_lite.runtime import pick_device, rank_and_world
from nitro_e_lite.training.metrics import tracker_name
from nitro_e_lite.training.precision import PRECISIONS

BUCKET = 2**25  # numbers after which a bucket of gradients is full: 128 MB
PATIENCE = timedelta(hours=6)  # the first run of several processes encodes all scenes in one: an hour on two cores
RECORDED = 2000  # collectives that the flight recorder remembers

# Variables by which accelerate would train in another way, in another precision or elsewhere than the settings say,
# and that no argument of ours overrules.
FOREIGN = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_FP8_BACKEND",
    "ACCELERATE_TORCH_DEVICE",
)
OFF = ("", "no", "false", "off", "n", "f", "0")


def start_accelerator(config: RunConfig, run_dir: Path, device: str | None) -> Accelerator:
    """The processes of the run, joined. They wait for each other up to `PATIENCE`: one encodes scenes for all.

    On accelerators torch's flight recorder is on: when processes have waited in vain, each writes which collectives it
    was in to `RUN_DIR/flight`, for torch's `torchfrtrace`.

    Precision, accumulation and compilation are those of `config`, and accelerate does nothing about them, whatever
    `ACCELERATE_MIXED_PRECISION`, `ACCELERATE_GRADIENT_ACCUMULATION_STEPS` or `ACCELERATE_DYNAMO_...` say; what
    `accelerate config` once wrote must not change a run.

    Raises:
        RuntimeError: the launcher (torchrun) was asked for another number of processes than found each other, or an
            earlier run of this process was on the CPU and this one should not be.
        ValueError: a tracker that is not installed or unknown, a device that is not there, or one with a number for
            several processes; or the environment asks accelerate for one of `FOREIGN`.
    """
    for name in FOREIGN:
        if (value := os.environ.get(name, "")).lower() not in OFF:
            raise InvalidValue(
                f"{name}={value}: a run is data-parallel, in the precision of its settings and on the device it is "
                "told; unset it"
            )
    chosen, (_, asked) = pick_device(device), rank_and_world()
    cpu = chosen.type == "cpu"
    if chosen.index is not None and not cpu:
        if asked > 1:
            raise InvalidValue(f"device={device}: each of the {asked} processes takes one of its own; name no number")
        torch.accelerator.set_device_index(chosen.index)
    if asked > 1 and not cpu:
        (run_dir / "flight").mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(run_dir / "flight" / "rank_"))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        # as a plugin: ACCELERATE_GRADIENT_ACCUMULATION_STEPS wins over the argument gradient_accumulation_steps
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no", mode="default", fullgraph=False, use_regional_compilation=False),
        log_with=tracker_name(config.tracker),
        project_dir=run_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes != asked:
        raise Unusable(
            f"WORLD_SIZE={asked}, but accelerate sees {accelerator.num_processes}: the processes would train "
            f"separate models; start them with torchrun, on a machine without accelerator with ACCELERATE_USE_CPU=true"
        )
    if not cpu and accelerator.device.type == "cpu":
        raise Unusable(
            f"device={device}: an earlier run of this process chose the CPU, and accelerate keeps it; restart"
        )
    set_patience(PATIENCE)  # an earlier run of this process may have shortened it
    return accelerator


def set_patience(patience: timedelta) -> None:
    """From now on processes wait this long for one another; then those on accelerators end, and torchrun notices."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(patience)


def any_rank(wish: bool, device: torch.device) -> bool:
    """Whether any process wishes it: the answer is the same on all of them, and the host waits for it."""
    return mean_over_processes(torch.tensor(float(wish), device=device)).item() > 0


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of `values` over the processes, in place, the same on each of them; no host waits for it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def fill_rows(rows: Tensor, places: Sequence[int], count: int) -> Tensor:
    """The rows of all processes in one tensor, the same on each of them, bit for bit.

    Args:
        rows: `(n, ...)`, what this process has.
        places: where each of them belongs.
        count: rows in all; each process has others, and together they have every one.

    Returns:
        `(count, ...)`. Other processes' rows are added to zeros, which is exact; NaN stays NaN.
    """
    whole = rows.new_zeros(count, *rows.shape[1:])
    whole[list(places)] = rows
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(whole)
    return whole


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], reduction: str = "fp32") -> None:
    """Replaces the gradients of `parameters` by their mean over the processes.

    Nothing else travels, no buffer either, and only once a step, whatever `accumulate` is. A parameter without a
    gradient on this process counts as zero, so that all processes send the same.

    Args:
        parameters: with gradients in float32.
        reduction: number type in which they travel, in a few large buckets: "bf16" halves what is sent and rounds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buckets: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if sum(map(Tensor.numel, buckets[-1])) > BUCKET:
            buckets.append([])
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket]).to(PRECISIONS[reduction])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        pieces = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(one) for piece, one in zip(pieces, bucket, strict=True)])


def check_together(accelerator: Accelerator, step: int, run_dir: Path) -> None:
    """All processes must have found the same checkpoint.

    Raises:
        RuntimeError: they stand at different steps: the machines do not see the same folder.
    """
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise Unusable(
            f"run_dir={run_dir}: the processes found checkpoints of steps {steps}; "
            "all machines must see the same folder"
        )


def check_same_data(accelerator: Accelerator, digest: str) -> None:
    """All processes must see the same shards; others would give them another order of training.

    Raises:
        RuntimeError: they do not; the message names the processes that differ from the first.
    """
    number = int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=7).digest(), "big")
    seen = accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()
    others = [rank for rank, one in enumerate(seen) if one != seen[0]]
    if others:
        raise Unusable(
            f"data: the processes {', '.join(map(str, others))} see other shards, or fewer that they can read, than "
            "process 0; all machines must see the same folders, see the warnings above"
        )
