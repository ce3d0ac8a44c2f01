"""Gates: measured before hours are spent and while they run; the first that fails stops the run.

Runs against an adversary or for a reward fail quietly, and cost hours before anyone looks. So each gate names itself,
says what was measured, and what to look at. Of students:

    drawn-set               the teacher's pictures are worth learning from: they score no less than the teacher's card
    teacher-fine-tuned      with another time embedding the teacher answers as before (`sprint.py`)
    discriminator-balance   it is right on a share of pictures between two bounds: too often, there is nothing to learn
                            from; too rarely, it says nothing
    student-below-teacher   from a quarter of the run on, the student is no worse than its teacher at as many steps: by
                            its score where that is measured, else by its distance to the teacher's pictures

`replay` holds the log of a run that is over against them. Of runs that learn from rewards (`EarlyStop`):

    diversity               the pictures of a group have not become alike
    held-out                the held-out score has not fallen far below its best, nor by chance: the best of many looks
                            at a few pictures is partly luck
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch

from nitro_e_lite.config import StudentConfig
from nitro_e_lite.data.drawn import DrawnSet, GrammarPrompts
from nitro_e_lite.errors import GateFailed, InvalidValue
from nitro_e_lite.files import write_atomically
from nitro_e_lite.inference.encoders import Encoders, decode_latents
from nitro_e_lite.scenes.geneval import CATEGORIES, Prompt, Score, Verdict, load_prompts, prompt_of, score, verify
from nitro_e_lite.scenes.grammar import sample_scene
from nitro_e_lite.scenes.verifier import VERSION
from nitro_e_lite.stats import paired_interval


def few_prompts(each: int) -> list[Prompt]:
    """The first held-out prompts of each category."""
    prompts = load_prompts()
    return [one for tag in CATEGORIES for one in [p for p in prompts if p.tag == tag][:each]]


def drawn_prompts(drawn: DrawnSet, rows: int) -> dict[str, Prompt]:
    """What the captions of the first rows ask for; nothing for folders whose prompts are not of the scene grammar."""
    found: dict[str, Prompt] = {}
    for card, count in drawn.cards():
        if card["prompts"].startswith(GrammarPrompts.NAME):
            prompts = GrammarPrompts(int(card["prompts"].removeprefix(GrammarPrompts.NAME)), min(count, rows))
            asked = (prompt_of(sample_scene(prompts.seed, row), prompts[row]) for row in range(len(prompts)))
            found |= {prompt.text: prompt for prompt in asked if prompt}
        rows = max(0, rows - count)
    return found


@torch.no_grad()
def judge_drawn(
    drawn: DrawnSet, encoders: Encoders, rows: int, batch: int = 50
) -> Iterator[tuple[int, Prompt, Verdict]]:
    """The verifier on those of the first rows that can be judged: row, what was asked for, verdict."""
    asked = drawn_prompts(drawn, rows)
    for first in range(0, rows, batch):
        found = drawn.batch(range(first, min(first + batch, rows)))
        some = [k for k, text in enumerate(found.captions) if text in asked]
        if some:
            latents = found.states[some, -1].to(encoders.vae.device)
            images = (decode_latents(encoders.vae, latents, encoders.stats) / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W)
            images = (images.float().permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
            for k, image in zip(some, images, strict=True):
                prompt = asked[found.captions[k]]
                yield first + k, prompt, verify(image, prompt)


def score_drawn(drawn: DrawnSet, encoders: Encoders, pictures: int) -> Score | None:
    """GenEval-lite of the first `pictures` that can be judged; None where there are none."""
    last = min(len(drawn), 2 * pictures)  # more than one caption in two asks for something that can be judged
    judged = list(islice(judge_drawn(drawn, encoders, last), pictures))
    return score([prompt for _, prompt, _ in judged], [verdict for _, _, verdict in judged]) if judged else None


def right_rows(drawn: DrawnSet, encoders: Encoders, rows: int) -> np.ndarray:
    """The first rows without those that the verifier finds wrong; what cannot be judged stays.

    The answer, minutes of a core for thousands of pictures, is kept beside the first folder's card.

    Raises:
        ValueError: it can judge none.
    """
    store = drawn.data.folders[0] / f"right-{VERSION}-{drawn.data.digest}-{rows}.json"
    if store.is_file():
        return np.array(json.loads(store.read_text(encoding="utf-8")), np.int64)
    right = {row: verdict.correct for row, _, verdict in judge_drawn(drawn, encoders, rows)}
    if not right:
        raise InvalidValue(
            f"data.verified=True: the verifier can judge no caption of {drawn.data.folders[0]}; set false"
        )
    kept = [row for row in range(rows) if right.get(row, True)]
    with suppress(OSError):  # a folder that cannot be written to keeps none
        write_atomically(store, json.dumps(kept) + "\n")
    return np.array(kept, np.int64)


def check_drawn(drawn: DrawnSet, encoders: Encoders, config: StudentConfig) -> None:
    """Gate drawn-set: fails where even the upper end of the interval is below the teacher's card.

    Raises:
        GateFailed: the drawn pictures are worse than the teacher's.
    """
    found = score_drawn(drawn, encoders, config.gate_pictures) if config.gate_pictures else None
    if found is None or found.high >= config.gate_card:
        return
    raise GateFailed(
        f"gate drawn-set: {drawn.data.folders[0]} scores {found.overall:.3f} ({found.low:.3f} to {found.high:.3f}) on "
        f"{found.images} pictures, the teacher's card says {config.gate_card:.3f}. Look at some of them; draw again "
        "with the teacher's own steps and guidance, or set gate_card to what this teacher scores"
    )


def check_fine_tuned(error: float, config: StudentConfig) -> None:
    """Gate teacher-fine-tuned.

    Args:
        error: squared distance of the fine-tuned teacher's velocities from before, over the teacher's own error; the
            same on all processes.
        config: with `gate_finetune`.

    Raises:
        GateFailed: the teacher is another than before.
    """
    if error <= config.gate_finetune:
        return
    raise GateFailed(
        f"gate teacher-fine-tuned, step {config.finetune_steps}: its answers are {error:.3f} of its own error away "
        f"from those before, may be {config.gate_finetune}. Raise embedding_steps, or finetune_share (is "
        f"{_losses(config)[0]} still falling?), or leave the old embedding: dense_time=false",
        everywhere=True,
    )


class Balance:
    """Gate discriminator-balance: the share of pictures that the discriminator was right on, over its last turns.

    Args:
        config: bounds and length of the window.
        device: where it is remembered; "cpu" when None.

    Attributes:
        right: that share, by turn, a ring.
        turns: so far.
    """

    def __init__(self, config: StudentConfig, device: torch.device | None = None):
        self.config, self.turns = config, 0
        self.right = torch.zeros(config.gate_window, device=device)

    def note(self, right: float | torch.Tensor, part: int, parts: int) -> None:
        """Remembers part `part` of a turn; a share on the device stays there."""
        place = self.turns % len(self.right)
        self.right[place] = (0.0 if part == 0 else self.right[place]) + right / parts
        self.turns += part == parts - 1

    def restore(self, turns: int, right: torch.Tensor) -> None:
        """What a checkpoint remembers; with another window the gate begins anew."""
        if len(right) == len(self.right):
            self.turns = turns
            self.right.copy_(right)

    def check(self, step: int) -> None:
        """Looks at a full window.

        Raises:
            GateFailed: the mean is outside of the bounds.
        """
        config = self.config
        if self.turns < config.gate_window:
            return
        right = self.right.mean().item()
        if config.gate_low <= right <= config.gate_high:
            return
        if right > config.gate_high:
            advice = "it is too strong and teaches nothing: lower heads.lr, judge at more noise, or, in a new run, "
            advice += "lower head_width or make the phase before it longer, so that the student begins nearer"
        else:
            advice = "it is too weak and says nothing: raise heads.lr, lower adversarial_weight, or raise head_width "
            advice += "in a new run"
        raise GateFailed(
            f"gate discriminator-balance, step {step}: right on {right:.3f} of pictures over its last "
            f"{config.gate_window} steps, must be {config.gate_low} to {config.gate_high}; {advice}",
            everywhere=True,
        )


def check_student(found: Mapping[str, float], step: int, sampler_steps: int, config: StudentConfig) -> None:
    """Gate student-below-teacher, after step `step`; `found` is what `Student.validate` measures.

    Where a score is measured it decides: a student that draws other good pictures than its teacher is far from the
    teacher's, and a blur, the mean of all good pictures, is near. Distance decides where there is no score, or where
    the teacher's own is so low that none could be worse.

    Raises:
        GateFailed: from a quarter of the run on, the student is worse.
    """
    if 4 * step < config.steps:
        return
    jump = config.stage == "sprint" or config.jumps  # `Student.ends`
    walk = "one jump" if jump else f"{sampler_steps} steps"
    distance = (
        f"distance to the teacher's pictures {{distance:.4f}}, its own {{teacher_distance:.4f}}, both after {walk}"
    )
    if found.get("teacher_geneval", 0.0) > config.gate_margin:
        worse = not found["geneval"] >= found["teacher_geneval"] - config.gate_margin  # what is no number is worse
        problem = f"GenEval-lite {{geneval:.3f}}, below its {{teacher_geneval:.3f}} ({distance})"
    else:
        worse, problem = not found["distance"] <= config.gate_distance * found["teacher_distance"], distance
    if worse:
        raise GateFailed(
            f"gate student-below-teacher, step {step}: the student is worse than its teacher in as many "
            f"steps without guidance: {problem.format(**found)}. Look at the pictures in samples/, at "
            f"{_losses(config)[0]} (still falling? train longer, raise optimizer.lr)"
            + "".join(f" and at {name} (rising? lower adversarial_weight)" for name in _losses(config)[1:]),
            found,
        )


def _losses(config: StudentConfig) -> list[str]:
    """What the log calls the student's loss, and the adversary's part of it where there is one."""
    return ["student_loss", "student_adversarial"] if config.adversarial_weight else ["loss"]


def replay(rows: Iterable[Mapping[str, float]], config: StudentConfig) -> GateFailed | None:
    """The first gate at which a run would have ended, from its metrics.

    Args:
        rows: of its `metrics.jsonl`; `heads_right` of a row is the mean over the discriminator's turns since the last.
        config: the gates' bounds, and the run's `steps`, `log_every` and `sampler_steps`.

    Returns:
        What the gate says; None where the run would have gone on to its end.
    """
    balance, turns = Balance(config), max(1, config.log_every // 2)  # every second step is the discriminator's
    try:
        for row in rows:
            row = {name: math.nan if value is None else value for name, value in row.items()}  # as JSON has it
            for _ in range(turns if "heads_right" in row else 0):
                balance.note(row["heads_right"], 0, 1)
            balance.check(int(row["step"]))
            if "teacher_distance" in row:
                check_student(row, int(row["step"]), config.sampler_steps, config)
    except GateFailed as failed:
        return failed
    return None


class EarlyStop:
    """Ends a run whose held-out score falls, or whose groups collapse.

    Args:
        drop: how far the held-out score may fall below its best; 0: any distance.
        diversity: the share of its first value that the distance inside groups must keep; 0: none.
        snapshots: steps between those that the run keeps; 0: none.

    Attributes:
        best: highest held-out score, and its step.
        of_best: its score of each picture; empty where nobody told.
        first, now: distance inside groups, at first and as a running mean.
    """

    def __init__(self, drop: float, diversity: float, snapshots: int = 0):
        self.drop, self.diversity, self.snapshots = drop, diversity, snapshots
        self.best: tuple[float, int] = (-np.inf, 0)
        self.of_best: list[float] = []
        self.first: float | None = None
        self.now = 0.0

    def rolled_out(self, step: int, distance: float, found: Mapping[str, float] | None = None) -> None:
        """Looks at a roll-out; `found` is all that was seen of it, for the log where it fails.

        Raises:
            GateFailed: the pictures of a group have become alike.
        """
        if self.first is None:
            self.first = self.now = distance
        self.now += 0.3 * (distance - self.now)
        if self.now < self.diversity * self.first:
            raise GateFailed(
                f"gate diversity: at step {step} the distance inside groups is {self.now:.3f}, "
                f"{self.now / self.first:.0%} of what it was; must stay above {self.diversity:.0%}. {self._advice()}",
                found,
                everywhere=True,
            )

    def held_out(
        self, step: int, score: float, found: Mapping[str, float] | None = None, each: Sequence[float] = ()
    ) -> None:
        """Looks at a held-out score; `found` as above.

        Args:
            step: after which it was measured.
            score: all in all.
            found: as above.
            each: the score of each picture, always of the same ones: the fall then counts when even the upper end of
                its paired interval is below `drop`.

        Raises:
            GateFailed: it has fallen.
        """
        fallen = bool(self.drop) and score < self.best[0] - self.drop
        if fallen and len(each) and len(each) == len(self.of_best):
            fallen = paired_interval(each, self.of_best, range(len(each)))[2] < -self.drop
        if fallen:
            raise GateFailed(
                f"gate held-out: at step {step} the held-out score is {score:.3f}, more than {self.drop} below its "
                f"best, {self.best[0]:.3f}. {self._advice()}",
                found,
            )
        if score > self.best[0]:
            self.best, self.of_best = (score, step), [float(one) for one in each]

    def _advice(self) -> str:
        step = self.best[1]
        where = f"its best was step {step}" if step else "nothing was better"
        if step and self.snapshots and step % self.snapshots == 0:
            where = f"the best adapter is that of step {step} in snapshots"
        return f"Look at the figure of the run (nitro-e reward plot); {where}"

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        best = list(self.best) if self.best[1] else None
        return {"best": best, "of_best": self.of_best, "first": self.first, "now": self.now}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.best = tuple(state["best"]) if state["best"] else self.best
        self.of_best = state.get("of_best", [])  # a checkpoint of before it was there
        self.first, self.now = state["first"], state["now"]
