"""The engine of every training run: files, processes, signals, master weights, averages, checkpoints; no losses.

A *stage* says what is trained and how its losses are computed (one file in `stages/`); the engine does everything that
makes a run trustworthy, the same for all of them:

* **Masters.** Optimisers and averages work on float32 masters, see `weights.py`.
* **Randomness from the step number.** Everything random of step k comes from (seed, k), see `runtime.generator`. A
  resumed run needs no generator state and repeats an uninterrupted one: on a CPU bit for bit, on an accelerator up to
  the order of its sums.
* **Stops without loss.** At SIGTERM or SIGINT the step in progress is finished and saved; SIGKILL costs the steps since
  the last checkpoint; a full disk ends the run and leaves the last checkpoint whole. See `checkpoints.py`.
* **Processes.** Each works on its rows of the batch; gradients are averaged once a step, weights are the same
  everywhere, and the main process writes.
* **An accelerator never waits for the host.** Losses, norms, and whether a step is to be left out (`health.py`) stay on
  the device and are looked at once a logging interval. On a CPU that would save nothing: there every step is looked at.

What happens beside the steps has modules of its own: where the time goes (`clock.py`), what is written down
(`metrics.py`, `checkpoints.py`), whether the run is worth going on with (`milestones.py`).

A stage may train several modules, each with its own optimisers and schedule: a loss reaches the parameters of its own
module only, so that a generator and a discriminator can take turns in one run.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from torch import Tensor, nn

from nitro_e_lite.config import RunConfig, to_dict
from nitro_e_lite.errors import FileThere, GateFailed, InvalidValue, NotFinite, Unusable
from nitro_e_lite.files import atomic_folder, check_output, run_lock, write_atomically
from nitro_e_lite.model.cpu_kernels import speed_up
from nitro_e_lite.runtime import RunStopped, StopRequest, environment_report, tune_cpu
from nitro_e_lite.training import checkpoints
from nitro_e_lite.training.clock import Clock
from nitro_e_lite.training.distributed import (
    any_rank,
    average_gradients,
    check_same_data,
    check_together,
    mean_over_processes,
    set_patience,
    start_accelerator,
)
from nitro_e_lite.training.health import Health
from nitro_e_lite.training.metrics import Progress
from nitro_e_lite.training.milestones import Milestones, halve
from nitro_e_lite.training.optimizers import FUSED
from nitro_e_lite.training.precision import PRECISIONS, settle_precision
from nitro_e_lite.training.weights import MasterWeights

# A run that is killed while it compiles may leave half a file there, which fails every run after it.
_COMPILER = "compile={}: was an earlier run killed while it compiled? Delete {} and go on; --set compile= does without"


@dataclass(frozen=True)
class Placement:
    """Device, number type and rows of the batch that this process works with: all a stage is told of it.

    Attributes:
        device: of the trained modules and of the batch.
        dtype: number type of the computation.
        microbatches: the rows of the global batch that this process works on, one range for each part of a step.
        clock: measures the waiting for data: `with placement.clock.measure("data")`.
        rank: number of this process, from 0.
        world: how many there are.
    """

    device: torch.device
    dtype: torch.dtype
    microbatches: tuple[range, ...]
    clock: Clock = field(default_factory=Clock)
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> range:
        """All rows of the global batch that this process works on."""
        return range(self.microbatches[0].start, self.microbatches[-1].stop)


@dataclass(frozen=True)
class Trainable:
    """One module of a stage, and how it learns.

    Attributes:
        module: in float32; the engine moves it to the device and to the number type of the computation.
        optimizers: called with {name: float32 master}, returns {name: optimiser}; every master is in exactly one.
        schedule: maps a step (from 0) to a factor on all learning rates.
        clip: the gradient's norm is clipped to this.

    Parameters are averaged and kept in checkpoints, buffers are not: those that change belong into `Stage.state`.
    """

    module: nn.Module
    optimizers: Callable[[dict[str, Tensor]], dict[str, torch.optim.Optimizer]]
    schedule: Callable[[int], float]
    clip: float = 1.0


class Stage:
    """The mathematics of a run. Subclasses set `modules` and write `losses` and `export`.

    A stage knows nothing of run folders, checkpoints, ranks and signals. It is made from its configuration and a
    `Placement`.

    Attributes:
        modules: name -> what is trained.
        flops: of one forward pass of one sample, to report the utilisation; None: unknown.
        validates_together: all processes call `validate`, not the main one alone.
    """

    modules: dict[str, Trainable]
    flops: float | None = None
    validates_together: bool = False

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """Losses of part `part` of step `step`, by module; each a scalar or one number a sample (B,).

        "loss" is what is minimised, over the parameters of its own module; further entries are only reported. Modules
        that are left out rest in this step. Everything random must be a function of (seed, step, row). All processes
        must return the same modules and names, and losses of two modules in one step must not share a graph: each gets
        a backward pass of its own.
        """
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Validation metrics, with the averaged weights already in place."""
        return {}

    def picture(self) -> Image | None:
        """A picture drawn with the averaged weights, or None; called in the main process alone."""
        return None

    def quality(self) -> tuple[dict[str, float], Image | None]:
        """What the averaged weights draw at a milestone, in numbers and as a picture; see `milestones.py`."""
        return {}, self.picture()

    def state(self) -> dict[str, Any]:
        """What a resume needs besides weights and optimisers: JSON values, and tensors at the top level.

        It is asked of the main process alone.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; called before the weights are restored.

        Raises:
            ValueError: the run cannot go on with these settings, for example with other encoders.
        """

    def data_digest(self) -> str:
        """Names the data that this process reads; it must be the same on all of them."""
        return ""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for the run's `config.json`."""
        return {}

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Writes the results of a finished run.

        Args:
            weights: module -> its averaged float32 weights by name.
            folder: empty; it becomes the run's `final`.
        """
        raise NotImplementedError


class _Learner:
    """One trained module on its device: masters, average, optimisers."""

    def __init__(self, spec: Trainable, placement: Placement, config: RunConfig):
        self.spec, self.module = spec, spec.module
        speed_up(self.module)
        self.module.to(placement.device)
        self.weights = MasterWeights(self.module, placement.dtype)
        self.masters = self.weights.masters
        averaged = config.ema_decay > 0  # otherwise the average is the weights themselves
        self.ema = {name: p.detach().clone() for name, p in self.masters.items()} if averaged else self.masters
        self.optimizers = spec.optimizers(self.masters)
        self.rates = {o: [group["lr"] for group in o.param_groups] for o in self.optimizers.values()}
        if config.compile:
            self.module.compile(backend=config.compile)

    @property
    def leaves_out(self) -> bool:
        """Whether the optimisers can leave a step out by themselves, told by a tensor on the device."""
        able = (getattr(one, "_step_supports_amp_scaling", False) for one in self.optimizers.values())
        return next(iter(self.masters.values())).device.type in FUSED and all(able)

    def update(self, step: int, ema_decay: float, left_out: Tensor | None = None) -> None:
        """One step of the optimisers; copies masters to the network and updates their average.

        The average forgets faster at first: its decay is `min(ema_decay, (1 + step) / (10 + step))`.

        Args:
            step: its number.
            ema_decay: of the average.
            left_out: (), 1 where all must stay as it is; for optimisers that `leaves_out`.
        """
        scale = self.spec.schedule(step)
        for optimizer, rates in self.rates.items():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = scale * rate
            optimizer.found_inf = left_out
            optimizer.step()
        self.weights.copy_to_model()
        if self.ema is not self.masters:
            share = 1 - min(ema_decay, (1 + step) / (10 + step))
            if left_out is not None:
                share = [share * (1 - left_out)] * len(self.ema)
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.masters.values()], share)


class Engine:
    """One run of one stage.

    Args:
        config: of the run; the stage reads its own fields from it.
        stage: makes the stage, from `config` and a `Placement`.
        run_dir: folder of the run: `config.json`, `metrics.jsonl`, `checkpoints/`, `samples/`, `final/`, and, when
            asked for, `milestones/` and `snapshots/`. When a finished run is made longer, its `final/` is put aside as
            `final-before/`.
        resume: continue from the newest checkpoint in `run_dir`; simply starts when there is none.
        device: "cpu", "cuda", ... or None for the best there is.

    Attributes:
        stage: the stage.
        global_step: steps done, those that were left out included.
        health: counts those.

    Raises:
        FileExistsError: `run_dir` holds a run and `resume` is False.
        RuntimeError: fewer processes found each other than were started, or they found different checkpoints or data.
        ValueError: a checkpoint of a differently shaped model is resumed, or the batch cannot be divided.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Callable[[Any, Placement], Stage],
        run_dir: str | Path,
        resume: bool = False,
        device: str | None = None,
    ):
        tune_cpu()  # first: threads that torch starts later inherit it
        self.config, self.run_dir = config, Path(run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        if not resume and (self.checkpoints.exists() or (self.run_dir / "final").exists()):
            raise FileThere(f"run_dir={self.run_dir}: holds a run already; resume it or name another folder")
        check_output(self.run_dir, "folder")
        self.accelerator = start_accelerator(config, self.run_dir, device)
        self.device = self.accelerator.device
        self.config = config = settle_precision(config, self.run_dir, resume, self.accelerator)
        self.clock, self.health = Clock(self.device), Health(config, self.device)
        place = self.accelerator.process_index, self.accelerator.num_processes
        placement = Placement(self.device, PRECISIONS[config.precision], self._microbatches(), self.clock, *place)
        if torch.version.hip:
            torch.backends.cudnn.benchmark = False  # MIOpen would search for minutes
        with self.accelerator.main_process_first():  # it fills the caches that the others read
            self.stage = stage(config, placement)
        check_same_data(self.accelerator, self.stage.data_digest())
        self.learners = {name: _Learner(one, placement, config) for name, one in self.stage.modules.items()}
        self.host_decides = not all(one.leaves_out for one in self.learners.values())
        self.progress = Progress(self.accelerator, config, self.run_dir, self.stage.flops, self.clock)
        self.writer = checkpoints.CheckpointWriter(self.checkpoints, config.keep_checkpoints)
        self.global_step = 0
        self._request, self._stop = StopRequest(), torch.zeros((), device=self.device)
        if resume:
            self._restore()
            check_together(self.accelerator, self.global_step, self.run_dir)

    def _microbatches(self) -> tuple[range, ...]:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        if config.batch_size % (world * config.accumulate):
            raise InvalidValue(
                f"batch_size={config.batch_size}: must be a multiple of the {world} processes times "
                f"accumulate={config.accumulate}"
            )
        size = config.batch_size // (world * config.accumulate)
        first = rank * config.accumulate
        return tuple(range(k * size, (k + 1) * size) for k in range(first, first + config.accumulate))

    # -- one step

    def step(self) -> dict[str, float | Tensor]:
        """One optimiser step; returns what this process measured, on an accelerator as tensors that nobody waits for.

        The rows of the process are processed in `accumulate` parts, whose gradients are summed in float32. A step that
        `health` finds bad leaves all weights as they are.
        """
        row: dict[str, float | Tensor] = {}
        for learner in self.learners.values():
            learner.module.train()
        for part in range(self.config.accumulate):
            for name, losses in self.stage.losses(self.global_step, part).items():
                means = {key: value.mean() / self.config.accumulate for key, value in losses.items()}
                self._backward(self.learners[name], means["loss"])
                for key, mean in means.items():
                    key = self._named(name, key)
                    row[key] = row.get(key, 0.0) + mean.detach()
        learning = {name: one for name, one in self.learners.items() if self._named(name, "loss") in row}
        # what may jump is the error of the answer: with REPA's cosine the sum may lie anywhere around zero
        watched = {name: row.get(self._named(name, "flow_loss"), row[self._named(name, "loss")]) for name in learning}
        losses, norms = self._agree(watched), []
        for name, learner in learning.items():
            with self.clock.measure("communication"):
                average_gradients(list(learner.masters.values()), self.config.reduction)
            norms.append(nn.utils.clip_grad_norm_(learner.masters.values(), learner.spec.clip))
            row[self._named(name, "gradient_norm")] = norms[-1]
            row[self._named(name, "lr_scale")] = learner.spec.schedule(self.global_step)
        left_out = self.health.judge(norms, losses)
        if not self.host_decides or not left_out:
            for learner in learning.values():
                learner.update(self.global_step, self.config.ema_decay, None if self.host_decides else left_out)
        for learner in learning.values():
            for optimizer in learner.optimizers.values():
                optimizer.zero_grad()
        self.global_step += 1
        if self.host_decides:
            self.health.check()
        return row if self.device.type != "cpu" else {name: float(value) for name, value in row.items()}

    def _agree(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses, meant over the processes; also tells everyone who was asked to stop. Nothing waits for it."""
        stop = torch.full((), float(self._request.name is not None), device=self.device)
        self._stop, *means = mean_over_processes(torch.stack([stop, *losses.values()]))
        return dict(zip(losses, means, strict=True))

    def _named(self, module: str, key: str) -> str:
        """The name of a number in the metrics: with the module's where there are several."""
        return key if len(self.learners) == 1 else f"{module}_{key}"

    @staticmethod
    def _backward(learner: _Learner, loss: Tensor) -> None:
        """Gradients of `loss` for the learner's own parameters, and for no others that it depends on."""
        loss.backward(inputs=learner.weights.parameters)
        learner.weights.collect_gradients()

    # -- looking at the run

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the stage's modules hold their averaged weights, in evaluation mode; then the trained ones again."""
        with ExitStack() as stack:
            for learner in self.learners.values():
                learner.module.eval()
                if learner.ema is not learner.masters:
                    stack.enter_context(learner.weights.swapped_in(learner.ema))
            yield

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """What the stage measures with the averaged weights; all processes call it where they `validates_together`."""
        with self.averaged():
            return self.stage.validate()

    def save_picture(self) -> Path | None:
        """What the averaged weights draw, in `samples/`. What goes wrong there is said, and ends no run."""
        with self._guarded("picture"), torch.no_grad(), self.averaged():
            return self._keep_picture(self.stage.picture(), "samples")

    def _keep_picture(self, picture: Image | None, folder: str) -> Path | None:
        if picture is None:
            return None
        path = self.run_dir / folder / f"step-{self.global_step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return path

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: days of training must not end over it
            reason = "".join(str(error).strip().splitlines()[:1])
            said = f"no {what} at step {self.global_step} ({type(error).__name__}: {reason}); training goes on"
            warnings.warn(said, stacklevel=3)

    def _judge_milestone(self, found: dict[str, float]) -> None:
        """Draws, writes down and judges, see `milestones.py`."""
        with self._guarded("milestone"):
            with torch.no_grad(), self.averaged():
                numbers, picture = self.stage.quality()
            self._keep_picture(picture, "milestones")
            for concern in Milestones(self.run_dir).record(self.global_step, found | numbers):
                warnings.warn(f"milestone, step {self.global_step}: {concern}; look before going on", stacklevel=2)

    # -- keeping the run

    def save(self, wait: bool = True) -> Path | None:
        """Writes a checkpoint of the current step; `wait`: until it stands, and returns its folder.

        Raises:
            OSError: this one or the one before could not be written.
        """
        tensors: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
        for name, learner in self.learners.items():
            tensors["weights"] |= {f"{name}.{key}": value for key, value in learner.masters.items()}
            if learner.ema is not learner.masters:
                averages = {f"{name}.{key}": value for key, value in learner.ema.items()}
                tensors["ema"] = tensors.get("ema", {}) | averages
            names = {value: f"{name}.{key}" for key, value in learner.masters.items()}
            for optimizer in learner.optimizers.values():
                tensors["optimizer"] |= checkpoints.optimizer_tensors(optimizer, names)
        kept = self.stage.state()
        tensors["stage"] = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        state = {"config": to_dict(self.config), "health": self.health.state(), "seconds": self.progress.seconds}
        state["validation_seconds"] = self.progress.validation_seconds
        state["stage"] = {key: value for key, value in kept.items() if not isinstance(value, Tensor)}
        self.writer.save(self.global_step, tensors, state)
        return self.writer.wait() if wait else None

    def _restore(self) -> None:
        found = checkpoints.load_latest(self.checkpoints)
        if found is None:
            return
        tensors, state = found
        say = self.accelerator.is_main_process
        checkpoints.compare_settings(state["config"], to_dict(self.config), state["step"], say)
        self.stage.load_state(state["stage"] | tensors["stage"])
        masters = {f"{name}.{key}": value for name, one in self.learners.items() for key, value in one.masters.items()}
        if {k: v.shape for k, v in tensors["weights"].items()} != {k: v.shape for k, v in masters.items()}:
            raise InvalidValue(
                f"{self.run_dir}: the weights of its checkpoint differ in name or shape from those of this model; "
                "keep the settings that decide them (model.*, repa.weight, optimizer.whiten_text_input)"
            )
        with torch.no_grad():
            for name, learner in self.learners.items():
                for key, master in learner.masters.items():
                    master.copy_(tensors["weights"][f"{name}.{key}"])
                    if learner.ema is not learner.masters:
                        source = tensors["ema" if "ema" in tensors else "weights"]
                        learner.ema[key].copy_(source[f"{name}.{key}"])
                learner.weights.copy_to_model()
                for optimizer in learner.optimizers.values():
                    checkpoints.restore_optimizer(optimizer, tensors["optimizer"], masters)
        self.global_step, self.progress.seconds = state["step"], state["seconds"]
        self.progress.validation_seconds = state.get("validation_seconds", 0.0)
        self.health.load_state(state.get("health") or {"counts": [state["skipped"], 0, 0], "means": {}})

    def export(self) -> Path:
        """Writes the results, from the averaged weights, to `run_dir/final`."""
        final = self.run_dir / "final"
        weights = {name: learner.ema for name, learner in self.learners.items()}
        with self.averaged(), atomic_folder(final, "the checkpoints are intact") as partial:
            self.stage.export(weights, partial)
        return final

    def keep_snapshot(self) -> Path:
        """Writes the averaged weights in bf16 to `run_dir/snapshots`, where they stay."""
        folder = self.run_dir / "snapshots" / f"step-{self.global_step:08d}"
        weights = {name: learner.ema for name, learner in self.learners.items()}
        with self.averaged(), atomic_folder(folder, "the checkpoints are intact") as partial:
            self.stage.export(weights, partial)
            halve(partial)
        return folder

    # -- the whole run

    def fit(self) -> Path:
        """Trains to `config.steps` and returns the folder of the results.

        Raises:
            RunStopped: SIGTERM or SIGINT came before the last step; the checkpoint is written.
            OSError: a checkpoint could not be written; the one before it is intact.
            FloatingPointError: too many steps in a row were left out; the checkpoint is written.
            RuntimeError: another process trains in this folder, or what the stage needs failed, such as a judge on
                another machine; what the first process knows of it then, it saves.
        """
        main = self.accelerator.is_main_process
        try:
            with run_lock(self.run_dir, main), StopRequest() as self._request:
                self._describe()
                if main and self.global_step < self.config.steps:
                    self._put_final_aside()
                self.progress.start(self.global_step)
                set_patience(timedelta(minutes=self.config.patience))
                try:
                    self._train()
                except (NotFinite, Unusable) as error:  # before or after an update, never within one
                    said = f"{error}; step {self.global_step} is saved in {self.save().parent}" if main else str(error)
                    if error.everywhere:
                        self.accelerator.wait_for_everyone()  # until it is saved: the first to end ends the others
                    raise type(error)(said) from None
                except GateFailed as failed:
                    if main:
                        if failed.found:
                            self.progress.write(self.global_step, failed.found)
                        self.save()
                        self.save_picture()  # of what failed
                    if failed.everywhere:
                        self.accelerator.wait_for_everyone()
                    raise
                if main:
                    self.writer.wait()
        finally:
            self.writer.close()  # whatever has ended the run, the checkpoint that is being written shall stand
            self.progress.close()
        if main:
            self.export()
        self.accelerator.wait_for_everyone()
        return self.run_dir / "final"

    def _put_final_aside(self) -> None:
        """What a run left that is now made longer: whoever looks whether it is finished must not find it."""
        final, before = self.run_dir / "final", self.run_dir / "final-before"
        if final.is_dir():
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)

    def _train(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        while self.global_step < config.steps:
            self.progress.begin_step()
            try:
                row = self.step()
            except RuntimeError as error:
                if type(error).__module__.startswith("torch._dynamo"):
                    from torch._inductor.runtime.cache_dir_utils import cache_dir  # seconds, seldom needed

                    error.add_note(_COMPILER.format(config.compile, cache_dir()))
                raise
            looked_at = self.host_decides or self._due(
                config.log_every, config.validate_every, config.sample_every, config.checkpoint_every
            )
            self.progress.end_step(self.global_step, row, wait=looked_at)
            stop = looked_at and bool(self._stop)
            if looked_at:
                self.health.check()
            self._report()
            late = config.checkpoint_minutes and self.writer.minutes >= config.checkpoint_minutes
            if main and (stop or late or self._due(config.checkpoint_every)):
                self.save(wait=stop)
            if main:
                self.writer.check()
            if stop and self.global_step < config.steps:
                self.accelerator.wait_for_everyone()
                raise RunStopped(self._stop_message(self._request.name))

    def _describe(self) -> None:
        about = {
            "config": to_dict(self.config),
            "processes": self.accelerator.num_processes,
            "hosts": gather_object([socket.gethostname()]),  # by rank
            "environment": environment_report(),
            **self.stage.describe(),
        }
        if self.accelerator.is_main_process:
            write_atomically(self.run_dir / "config.json", json.dumps(about, indent=1) + "\n")

    def _due(self, *every: int) -> bool:
        return self.global_step == self.config.steps or any(self.global_step % one == 0 for one in every)

    def _stop_message(self, name: str | None) -> str:
        return (
            f"Stopped by {name or 'a signal to another process'} after step {self.global_step} of {self.config.steps}; "
            f"the checkpoint is in {self.checkpoints}. The same command with --resume continues."
        )

    def _report(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if self._due(config.log_every):
            means = self.progress.means()
            values = mean_over_processes(torch.tensor(list(means.values()), device=self.device)).tolist()
            counts = {"skipped": self.health.skipped, "spikes": self.health.spikes}
            self.progress.report(self.global_step, counts | dict(zip(means, values, strict=True)))
        milestone = self.global_step in config.milestones
        found = self._validate_in_time(must=milestone) if milestone or self._due(config.validate_every) else {}
        if main and milestone:
            self._judge_milestone(found)
        if main and self._due(config.sample_every):
            self.save_picture()
        if main and config.snapshot_every and self.global_step % config.snapshot_every == 0:
            self.keep_snapshot()

    def _validate_in_time(self, must: bool) -> dict[str, float]:
        """Validates where that is due and, unless it `must`, leaves the run its share of the time."""
        main, progress, begin = self.accelerator.is_main_process, self.progress, time.perf_counter()
        allowed = self.config.validation_share * (progress.seconds + progress.validation_seconds)
        if self.config.validation_share < 1 and not must:
            if any_rank(main and progress.validation_seconds > allowed, self.device):
                return {}
        found = self.validate() if main or self.stage.validates_together else {}
        progress.validation_seconds += time.perf_counter() - begin
        if main and found:
            progress.write(self.global_step, found)
        return found
