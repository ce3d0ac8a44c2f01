"""Learning from rewards: what both methods of stage 3 share, from the prompt to the advantage of a picture.

The model draws a *group* of pictures for each prompt, rewards judge them, and the better ones of a group should become
likelier. A reward alone says little: an easy prompt gets high ones whatever the model does. So each is compared with
its own group, and divided by a deviation so that the scale of the rewards does not matter:

    A = clip((r - mean of the group) / (std + 1e-4), -5, 5)

A *roll-out* (pictures and their advantages) is made every `updates` steps; the steps between learn from it. Everything
random in it is a function of seed, step and place, and it belongs to the state of the run: a run that was killed in
the middle of an iteration goes on with the same pictures.

**Flat groups.** Where all pictures of a group are equally good there is nothing to prefer. Such groups are counted and
left out of the mean, so that the others keep their weight. To have fewer of them, kinds of prompt are drawn in
proportion to `p (1 - p) + 0.05`, p being the running share of pictures that pass: what always or never works is rare.

**An adapter learns, the model stays.** A LoRA on the matrices of the blocks is all that moves. With its `B` at zero
the model is the reference, with other values an older policy: one copy of the big weights serves for all three.

How a policy moves is in `rewards_forward.py` and `rewards_grpo.py`; this module draws, judges and keeps.

Source: Flow-GRPO arXiv 2505.05470 (groups, advantages, LoRA); Nitro-E stage 3 (LoRA in the official layout). Differs:
one LoRA on the fused query-key-value matrix, whose three parts share `A`; flat groups can be left out; kinds of prompt
are drawn by how much they can still teach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL.Image import Image
from torch import Tensor

from nitro_e_lite.config import RewardConfig
from nitro_e_lite.errors import InvalidValue, NotFinite, Unusable
from nitro_e_lite.evaluation.geneval_lite import draw, picture_seed
from nitro_e_lite.evaluation.learned_judges import SceneReader, load_judge
from nitro_e_lite.evaluation.official_geneval import read_metadata
from nitro_e_lite.evaluation.rewards import (
    EPS,
    FilePrompt,
    add_rewards,
    check_prompts,
    check_scores,
    open_rewards,
    preflight,
)
from nitro_e_lite.evaluation.watch import STATISTICS, picture_statistics
from nitro_e_lite.inference.loading import base_hash, load_pipeline
from nitro_e_lite.inference.pipeline import NitroEPipeline
from nitro_e_lite.inference.schedules import draws_noise
from nitro_e_lite.model import flow
from nitro_e_lite.model.official_weights import lora_targets, save_lora
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.geneval import CATEGORIES, Prompt, score, training_prompt, verify
from nitro_e_lite.scenes.grammar import Stream
from nitro_e_lite.stages.gates import EarlyStop, few_prompts
from nitro_e_lite.training.distributed import any_rank, fill_rows
from nitro_e_lite.training.engine import Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import build_optimizers, learning_rate_scale
from nitro_e_lite.viz import image_grid

PASSES = 0.5  # a picture passes when the first reward gives it more
UNSEEN = 0.5  # pass rate of a kind of prompt before the first picture


class Prompts:
    """What a run asks for, and how often each kind of it.

    Args:
        seed: of the run.
        path: JSON lines in GenEval's schema; "": new ones from the caption grammar, never reserved sentences and never
            held-out compositions.
        floor: what is added to `p (1 - p)`.
        memory: what a pass rate keeps of itself at each roll-out.
        held_out: prompts of each kind of a file that no roll-out asks for, a tenth of them at most.

    Attributes:
        pass_rates: by kind.
        held_out: of a file, the first ones of each kind.

    Raises:
        ValueError: a file without prompts, or with a line that is none.
    """

    def __init__(self, seed: int, path: str, floor: float, memory: float, held_out: int = 0):
        self.seed, self.floor, self.memory = seed, floor, memory
        self.of_file: dict[str, list[FilePrompt]] | None = None
        self.held_out: list[FilePrompt] = []
        kinds: Sequence[str] = CATEGORIES
        if path:
            self.of_file = {}
            for entry in read_metadata(path):
                self.of_file.setdefault(entry["tag"], []).append(FilePrompt(entry))
            kinds = sorted(self.of_file)
            for kind in kinds:
                count = min(held_out, len(self.of_file[kind]) // 10)
                self.held_out += self.of_file[kind][:count]
                self.of_file[kind] = self.of_file[kind][count:]
        self.pass_rates = dict.fromkeys(kinds, UNSEEN)

    def all_of_file(self) -> list[FilePrompt]:
        """Every prompt of the file, held out or not; none without a file."""
        return [*self.held_out, *(one for some in (self.of_file or {}).values() for one in some)]

    def shares(self) -> dict[str, float]:
        """How often each kind is drawn; they sum to one."""
        weights = {kind: p * (1 - p) + self.floor for kind, p in self.pass_rates.items()}
        return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}

    def draw(self, step: int, count: int) -> list[Prompt | FilePrompt]:
        """The prompts of the roll-out at `step`."""
        found, shares = [], self.shares()
        for place in range(count):
            stream = Stream(self.seed, step, place)
            kind = stream.weighted(shares)
            if self.of_file is None:
                found.append(training_prompt(kind, self.seed, step, place))
            else:
                found.append(stream.choice(self.of_file[kind]))
        return found

    def learn(self, prompts: Sequence[Prompt | FilePrompt], passed: np.ndarray) -> None:
        """Moves the pass rates after a roll-out; `passed` (prompts, group) is true or false for each picture."""
        for kind in self.pass_rates:
            mine = [bool(x) for one, row in zip(prompts, passed, strict=True) if one.tag == kind for x in row]
            if mine:
                kept = self.memory * self.pass_rates[kind]
                self.pass_rates[kind] = kept + (1 - self.memory) * sum(mine) / len(mine)

    def read(self, entries: Sequence[dict[str, Any]]) -> list[Prompt | FilePrompt]:
        """Prompts from their metadata."""
        return [Prompt.from_metadata(x) if self.of_file is None else FilePrompt(x) for x in entries]


def group_advantages(rewards: Tensor, group: int, clip: float = 5.0, deviation: str = "batch") -> tuple[Tensor, Tensor]:
    """How much better a picture is than its group.

    Args:
        rewards: (P * G,), group after group.
        group: G.
        clip: largest advantage.
        deviation: what it is divided by: the deviation of the whole "batch", as published, or of the own "group".

    Returns:
        Advantages (P * G,), and whether a picture's group is flat, all of its rewards being equal; they are zero there.
    """
    grouped = rewards.double().view(-1, group)  # (P, G)
    flat = (grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True)).expand_as(grouped)  # (P, G)
    std = grouped.std(correction=0) if deviation == "batch" else grouped.std(1, correction=0, keepdim=True)
    advantages = (grouped - grouped.mean(1, keepdim=True)) / (std + EPS)
    return advantages.masked_fill(flat, 0.0).clamp(-clip, clip).flatten().float(), flat.flatten()


def row_weights(flat: Tensor, batch_size: int, drop: bool) -> Tensor:
    """Weights (n,) with which the mean over an update's pictures is that over those that are kept; `flat` (n,)."""
    kept = (~flat if drop else torch.ones_like(flat)).float().view(-1, batch_size)  # (updates, B)
    return (kept * batch_size / kept.sum(1, keepdim=True).clamp(min=1)).flatten()


def group_distance(latents: Tensor, group: int) -> float:
    """Mean distance between two pictures of a group, root mean square over numbers; falls when a policy collapses."""
    grouped = latents.float().flatten(1).unflatten(0, (-1, group))  # (P, G, n)
    squares = 2 * grouped.var(1, correction=1).mean(1)  # (P,): the mean squared distance of two is twice the variance
    return squares.sqrt().mean().item()


def _check_ode(source: str, pipeline: NitroEPipeline) -> None:
    """Refuses a model that does not draw along the ODE: it would learn by one sampler and be used with another."""
    if draws_noise(pipeline.scheduler):
        raise InvalidValue(
            f"start_from={source}: is a student that draws noise in every step; rewards teach models that follow the "
            "ODE, such as its teacher"
        )


class Rewards(Stage):
    """What both methods are: a model with an adapter, roll-outs, rewards. Subclasses write `roll_out` and `losses`.

    Args:
        config: of the run.
        placement: where.

    Attributes:
        model: the transformer with its adapter.
        adapter: the adapter's parameters by name, in the number type of the computation.
        rollout: what is kept of the current roll-out, tensors (updates * batch_size, ...), the same on all processes.
        rollout_step: the step at which it was made; -1 before the first.

    Raises:
        ValueError: a source, a reward or a file of prompts that is not what it should be.
        RuntimeError: a reward that fails its preflight.
    """

    def __init__(self, config: RewardConfig, placement: Placement):
        self.config, self.placement = config, placement
        held_out = config.validation_prompts
        self.prompts = Prompts(config.seed, config.prompts, config.prompt_floor, config.pass_memory, held_out)
        servers = {"timeout": config.reward_timeout, "retries": config.reward_retries, "batch": config.reward_batch}
        names, self.reward_weights = zip(*config.rewards, strict=True)
        self.rewards, self.watched = open_rewards(names, **servers), open_rewards(config.watch, **servers)
        self.reader = load_judge(SceneReader) if self.prompts.of_file is None else None  # it never rewards
        check_prompts([*self.rewards, *self.watched], self.prompts.all_of_file())
        self.early_stop = EarlyStop(config.stop_drop, config.stop_diversity, config.snapshot_every)
        self.pipeline = load_pipeline(config.start_from, placement.device, torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        _check_ode(config.start_from, self.pipeline)
        self.model = self.pipeline.transformer
        side = self.model.config.sample_size * self.pipeline.vae_scale_factor
        self.examples = preflight([*self.rewards, *self.watched], side)
        self.base = base_hash(self.pipeline)
        for part in (self.pipeline.vae, self.pipeline.text_encoder):
            torch.nn.Module.to(part, placement.dtype)  # diffusers' own warns of layers that are not there
        self.adapter = self._adapt()
        optimizers = partial(build_optimizers, matrices=set(self.adapter), config=config.optimizer)
        schedule = partial(learning_rate_scale, steps=config.steps, config=config.optimizer)
        self.modules = {"transformer": Trainable(self.model, optimizers, schedule, config.optimizer.clip)}
        self.sigmas = self._grid()  # (K + 1) numbers from 1 to 0
        self.rollout: dict[str, Tensor] = {}
        self.teaches: list[bool] = []  # by row: whether it counts
        self.rollout_step, self.asked, self.report = -1, [], {}
        self.done = 0  # steps
        self.no_text = self.pipeline.encode_captions([""])  # (1, L, Dc)

    def _adapt(self) -> dict[str, Tensor]:
        """Puts a fresh adapter on the model, `B` zero, and freezes everything else."""
        adapter = self.config.adapter
        torch.manual_seed(self.config.seed)
        names = lora_targets(self.model, mlp=adapter.targets == "attention_mlp")
        inject_adapter_in_model(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=names), self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _grid(self) -> list[float]:
        steps = self.config.rollout_steps
        if self.pipeline.config.sigma_grid == "scheduler":  # official weights: `shift` must be theirs
            self.pipeline.sampler(steps, self.config.guidance, self.config.shift)
            self.pipeline.scheduler.set_timesteps(steps)
            return self.pipeline.scheduler.sigmas.tolist()
        return [*flow.shift_sigmas(flow.linear_sigmas(steps), self.config.shift), 0.0]

    # -- the policy

    def velocity(self, x: Tensor, features: Tensor, t: Tensor) -> Tensor:
        """The policy's velocity, float32 (B, C, h, w), at latents `x` (B, C, h, w) and noise levels `t` (B,).

        With guidance the part without text has no gradient.
        """
        dtype, guidance = self.placement.dtype, self.config.guidance
        x, t = x.to(dtype), flow.TIMESTEP_SCALE * t
        velocity = self.model(x, features.to(dtype), t).sample.float()
        if guidance <= 1:
            return velocity
        with torch.no_grad():
            without = self.model(x, self.no_text.to(dtype).expand(len(x), -1, -1), t).sample.float()
        return flow.guide(velocity, without, guidance)

    def levels(self, k: int, count: int) -> Tensor:
        """Noise level number `k` of the grid, (count,)."""
        return torch.full((count,), self.sigmas[k], device=self.placement.device)

    @torch.no_grad()
    def walk(self, x: Tensor, features: Tensor, first: int, last: int) -> Tensor:
        """`x` (B, C, h, w) along the ODE, from level number `first` of the grid to number `last`."""
        for k in range(first, last):
            velocity = self.velocity(x, features, self.levels(k, len(x)))
            x = flow.euler_step(x, velocity, self.sigmas[k], self.sigmas[k + 1])
        return x

    @contextmanager
    def policy(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The adapter holds other `values` for a while; not while a gradient through it is still to come."""
        kept = {name: p.detach().clone() for name, p in self.adapter.items()}
        self._fill(values)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        torch._foreach_copy_([self.adapter[name] for name in values], list(values.values()))

    def reference(self) -> dict[str, Tensor]:
        """Values with which the adapter does nothing, for `policy`."""
        return {name: torch.zeros_like(p) for name, p in self.adapter.items() if ".lora_B." in name}

    def noise(self, step: int, purpose: str, places: Sequence[int]) -> Tensor:
        """Normal numbers (n, C, h, w) of pictures `places`; each depends on its own place alone."""
        shape = (self.model.config.in_channels, *[self.model.config.sample_size] * 2)
        drawn = [torch.randn(shape, generator=generator(self.config.seed, step, purpose, k)) for k in places]
        return torch.stack(drawn).to(self.placement.device)  # (n, C, h, w)

    # -- roll-outs

    def roll_out(self, step: int, places: Sequence[int], features: Tensor) -> dict[str, Tensor]:
        """Draws pictures; what is returned (n, ...) is kept for the updates and holds the clean latents "x0".

        Args:
            step: at which it happens.
            places: of the pictures in the roll-out.
            features: of their prompts, (n, L, Dc).
        """
        raise NotImplementedError

    def before_rollout(self, step: int) -> None:
        """What a method does at the start of an iteration."""

    def batch(self, step: int, part: int, taught: bool = False) -> tuple[dict[str, Tensor], Tensor, list[int]]:
        """What part `part` of a step learns from: rows of the roll-out, their text features (n, L, Dc), their places.

        The first step of an iteration makes the roll-out.

        Args:
            step, part: see `Stage.losses`.
            taught: leave out rows that would count for nothing, and with them their cost; "weight" makes up for it.
        """
        first, self.done = step - step % self.config.updates, step + 1
        if self.rollout_step != first:
            self.before_rollout(first)
            self._roll_out(first)
        places = every = self._places(step - first, part)
        if taught:
            places = [place for place in every if self.teaches[place]] or every[:1]
        rows = {name: value[places].to(self.placement.device) for name, value in self.rollout.items()}
        rows["weight"] = rows["weight"] * (len(places) / len(every))  # the mean over rows stays what it was
        return rows, self.features[self._groups(places)], places

    def _places(self, update: int, part: int) -> list[int]:
        first = update * self.config.batch_size
        return [first + row for row in self.placement.microbatches[part]]

    def _groups(self, places: Sequence[int]) -> list[int]:
        return [place // self.config.group for place in places]

    def _ask(self, prompts: Sequence[Prompt | FilePrompt]) -> None:
        self.asked = list(prompts)
        self.features = self.pipeline.encode_captions([one.text for one in prompts]).to(self.placement.device)

    def _roll_out(self, step: int) -> None:
        """Draws and judges; each process its own rows, in the very parts in which it will learn from them."""
        config = self.config
        count = config.updates * config.batch_size
        self._ask(self.prompts.draw(step, count // config.group))
        kept, places, failed = [], [], None
        try:
            for update in range(config.updates):
                for part in range(len(self.placement.microbatches)):
                    some = self._places(update, part)
                    found = self.roll_out(step, some, self.features[self._groups(some)])
                    if not found["x0"].isfinite().all():
                        raise NotFinite(f"roll-out of step {step}: gave NaN or infinity; lower optimizer.lr")
                    asked = [self.asked[group] for group in self._groups(some)]
                    found["scores"], found["seen"] = self._judge(found["x0"], asked)
                    kept.append(found)
                    places += some
        except (NotFinite, Unusable) as error:
            failed = error
        if any_rank(failed is not None, self.placement.device):
            failed = failed or Unusable(f"roll-out of step {step}: another process failed, its own message says why")
            failed.everywhere = True
            raise failed
        rollout = {name: fill_rows(torch.cat([one[name] for one in kept]), places, count) for name in kept[0]}
        seen = rollout.pop("seen").cpu().double().mean(0).tolist()  # Apple's GPUs have no float64
        scores = rollout["scores"].cpu().double().numpy()  # (n, R)
        try:
            for reward, column in zip(self.rewards, scores.T, strict=True):
                check_scores(reward.name, column, count)
        except (NotFinite, Unusable) as error:
            error.everywhere = True
            raise
        total = torch.from_numpy(add_rewards(scores, self.reward_weights, config.normalize_rewards))
        advantages, flat = group_advantages(total, config.group, config.advantage_clip, config.deviation)
        weights = row_weights(flat, config.batch_size, config.drop_flat_groups)
        device = self.placement.device
        self.rollout = rollout | {"advantage": advantages.to(device), "weight": weights.to(device)}
        self.rollout_step, self.teaches = step, (weights > 0).tolist()
        self.prompts.learn(self.asked, scores[:, 0].reshape(-1, config.group) > PASSES)
        self.report = {"reward": float(add_rewards(scores, self.reward_weights, False).mean())}
        self.report |= {f"reward_{r.name}": float(x.mean()) for r, x in zip(self.rewards, scores.T, strict=True)}
        self.report |= {
            "flat_groups": flat.float().mean().item(),
            "group_distance": group_distance(rollout["x0"], config.group),
        }
        names = STATISTICS if self.reader is None else (*STATISTICS, "reader")
        self.report |= dict(zip(names, seen, strict=True))
        self.early_stop.rolled_out(step, self.report["group_distance"], self.report)

    def _judge(self, latents: Tensor, prompts: Sequence[Prompt | FilePrompt]) -> tuple[Tensor, Tensor]:
        """What each reward says of the pictures (n, R), and what is seen in them that is not paid for (n, S)."""
        with torch.no_grad():
            images = self.pipeline.decode(latents, "np")  # (n, H, W, 3)
        pictures = (images * 255).round().astype(np.uint8)
        said = [check_scores(r.name, r.score(pictures, prompts), len(prompts), constant=False) for r in self.rewards]
        seen = [*picture_statistics(pictures).T]
        if self.reader is not None:
            seen.append(self.reader.right(pictures, prompts))
        return tuple(torch.from_numpy(np.stack(x, 1)).to(latents.device, torch.float32) for x in (said, seen))

    def reported(self) -> dict[str, Tensor]:
        """What the roll-out showed, for the metrics of each of its steps."""
        return {name: torch.tensor(value) for name, value in self.report.items()}

    # -- looking at the run

    def validate(self) -> dict[str, float]:
        """GenEval-lite of fixed held-out prompts, drawn as in roll-outs, and what all judges say of the pictures.

        With a file its held-out prompts are drawn, and only its rewards and `watch` are asked.

        Nothing where no kind of the file has ten prompts: then nothing is held out.

        The score that `EarlyStop` watches is GenEval-lite's, or the first reward's mean.

        Raises:
            GateFailed: the score has fallen and there are steps left, see `EarlyStop`.
        """
        if self.prompts.of_file is not None:
            return self._validate_on_file()
        prompts = few_prompts(self.config.validation_prompts)
        pictures = self._draw(prompts)
        verdicts = [verify(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        found = score(prompts, verdicts)
        by_kind = {f"geneval_{kind}": value for kind, value in found.categories.items()}
        by_kind["held_out_reader"] = float(self.reader.right(np.stack(pictures), prompts).mean())
        by_kind |= {name: float(said.mean()) for name, said in self._asked(np.stack(pictures), prompts).items()}
        measured = {"geneval": found.overall, "geneval_low": found.low, "geneval_high": found.high, **by_kind}
        self._watch(found.overall, measured, [float(one.correct) for one in verdicts])
        return measured

    def _validate_on_file(self) -> dict[str, float]:
        prompts = self.prompts.held_out
        if not prompts:
            return {}
        said = self._asked(np.stack(self._draw(prompts)), prompts)
        found = {name: float(scores.mean()) for name, scores in said.items()}
        first = next(iter(said))
        self._watch(found[first], found, said[first])
        return found

    def _asked(self, pictures: np.ndarray, prompts: Sequence[Prompt | FilePrompt]) -> dict[str, np.ndarray]:
        """What each reward, and each judge that never pays, says of held-out pictures, (B,) each."""
        found = {}
        for judge in (*self.rewards, *self.watched):
            said = judge.score(pictures, prompts)
            found[f"held_out_{judge.name}"] = check_scores(judge.name, said, len(prompts), constant=False)
        return found

    def _watch(self, score: float, measured: dict[str, float], each: Sequence[float] = ()) -> None:
        if self.done < self.config.steps:
            self.early_stop.held_out(self.done, score, measured, each)

    def _draw(self, prompts: Sequence[Prompt | FilePrompt], batch: int = 16) -> list[np.ndarray]:
        sampler = self.pipeline.sampler(self.config.rollout_steps, self.config.guidance, self.config.shift)
        jobs = [(prompt.text, picture_seed(0, place)) for place, prompt in enumerate(prompts)]
        parts = [jobs[first : first + batch] for first in range(0, len(jobs), batch)]
        return [picture for part in parts for picture in draw(self.pipeline, part, sampler)]

    def picture(self) -> Image | None:
        """Two held-out prompts of each kind; of a file that holds none out, nothing."""
        prompts = few_prompts(2)
        if self.prompts.of_file is not None:
            held = self.prompts.held_out
            prompts = [one for kind in self.prompts.of_file for one in [p for p in held if p.tag == kind][:2]]
        if not prompts:
            return None
        return image_grid(self._draw(prompts), columns=4, labels=[prompt.text for prompt in prompts])

    # -- keeping the run

    def state(self) -> dict[str, Any]:
        """The roll-out with the step it was made at, its prompts, the pass rates and the name of the base model."""
        tensors = {f"rollout.{name}": value for name, value in self.rollout.items()}
        asked = [prompt.metadata() for prompt in self.asked]
        facts = {"base": self.base, "rollout_step": self.rollout_step, "done": self.done}
        facts |= {"asked": asked, "report": self.report}
        return tensors | facts | {"pass_rates": self.prompts.pass_rates, "early_stop": self.early_stop.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on with the roll-out of the checkpoint.

        Raises:
            ValueError: the run was started from another model, or with other kinds of prompt.
        """
        if state["base"] != self.base:
            raise InvalidValue(f"start_from={self.config.start_from}: the run was started from another model")
        if state["pass_rates"].keys() != self.prompts.pass_rates.keys():
            raise InvalidValue(f"prompts={self.config.prompts!r}: the run was started with other kinds of prompt")
        self.prompts.pass_rates = {kind: state["pass_rates"][kind] for kind in self.prompts.pass_rates}
        self.rollout_step, self.report = state["rollout_step"], state["report"]
        self.done = state.get("done", 0)  # a checkpoint of before it was there
        if "early_stop" in state:  # a checkpoint of before it was there
            self.early_stop.load_state(state["early_stop"])
        device = self.placement.device
        mine = {name: value for name, value in state.items() if name.startswith("rollout.")}
        self.rollout = {name.removeprefix("rollout."): value.to(device) for name, value in mine.items()}
        self.teaches = (self.rollout["weight"] > 0).tolist() if mine else []
        if state["asked"]:
            self._ask(self.prompts.read(state["asked"]))

    def describe(self) -> dict[str, Any]:
        """The base model's name, and what each reward said of its good and bad picture."""
        return {"base": self.base, "preflight": self.examples}

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """The adapter as a PEFT folder in the official naming: `load_pipeline(..., lora=folder)` merges it."""
        adapter, source = self.config.adapter, self.config.start_from
        facts = {"r": adapter.rank, "lora_alpha": adapter.alpha, "base_model_name_or_path": Path(source).name}
        save_lora(weights["transformer"], folder, facts)
