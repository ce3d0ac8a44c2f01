"""What right and wrong do not say of pictures: how they look, and how alike those of one caption are.

    preference   how clean they are, by the lite preference model; differences are log-odds, larger is better
    reader       share that is right by a small network that reads scenes and never rewards
    diversity    distance of two pictures of one caption that are both right: root mean square over features
    KID          distance from true scenes of the same prompts; its floor: true scenes from other true scenes

Students that learn from an adversary, and policies that learn from rewards, may draw the same picture again and again
without losing a point. So diversity is counted among pictures that are right, caption by caption, and two models are
compared on the captions for which both have at least two.

KID is the squared maximum mean discrepancy with the kernel `(x . y / D + 1)^3`, unbiased: zero on average for two sets
from one source, so that small ones may be negative. Features are those of the lite vision model: for KID the mean over
patches (D = 128), for diversity the means of 4 x 4 regions, so that places count too.

Source: KID arXiv 1801.01401. Differs: features; the interval is that of ten disjoint parts in place of random subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation.learned_judges import PreferenceModel, SceneReader, load_judge
from nitro_e_lite.inference.vision import GRID, load_vision
from nitro_e_lite.scenes.geneval import Prompt, true_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.stats import interval

REGIONS = 4  # a side, of a picture's features
PARTS = 10  # of the pictures, for KID's interval
TRUE = 1200  # true scenes, at most


def kid(first: Tensor, second: Tensor) -> float:
    """Kernel inception distance of features (n, D) and (m, D), unbiased.

    Raises:
        ValueError: fewer than two of either.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise InvalidValue(f"features: {n} and {m} pictures; KID needs at least two of each")
    x, y = first.double(), second.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    same = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(same - 2 * kernel(x, y).mean())


def diversity(features: Tensor, groups: Sequence[int], right: Sequence[bool]) -> list[float | None]:
    """For each group the mean distance between two of its right pictures; None where there are not two.

    Args:
        features: (n, ...), one a picture.
        groups: 0 .. G - 1, the caption of each picture.
        right: which pictures count.
    """
    flat, found = features.double().flatten(1), []
    for group in range(max(groups) + 1):
        mine = flat[[k for k, (g, ok) in enumerate(zip(groups, right, strict=True)) if g == group and ok]]
        found.append(float(F.pdist(mine).mean()) / flat.shape[1] ** 0.5 if len(mine) > 1 else None)
    return found


class Appearance:
    """Looks at pictures as they are drawn, and says at the end what it has seen.

    Attributes:
        features: of the pictures, (B, 16, D) a batch.
        preference, reader: one number a picture.
    """

    def __init__(self):
        self.vision, self.judge, self.readers = load_vision(), load_judge(PreferenceModel), load_judge(SceneReader)
        self.features: list[Tensor] = []
        self.preference: list[float] = []
        self.reader: list[float] = []

    def regions(self, pictures: np.ndarray) -> Tensor:
        """Features (B, 16, D) of pictures, uint8 (B, H, W, 3)."""
        patches = self.vision.encode(pictures).unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)  # (B, D, 16, 16)
        return F.adaptive_avg_pool2d(patches, REGIONS).flatten(2).mT

    def look(self, pictures: np.ndarray, prompts: Sequence[Prompt]) -> None:
        """At pictures, uint8 (B, H, W, 3), of these prompts."""
        self.features.append(self.regions(pictures))
        self.preference += self.judge.score(pictures).tolist()
        self.reader += self.readers.right(pictures, prompts).tolist()

    def found(self, prompts: Sequence[Prompt], repeats: int, right: Sequence[bool], batch: int = 50) -> dict[str, Any]:
        """What a card holds: means, KID with interval and floor, diversity by prompt.

        Args:
            prompts: the list, once; pictures came `repeats` times in its order.
            repeats: pictures of each prompt.
            right: the verdict on each picture.
            batch: true scenes looked at together.
        """
        features = torch.cat(self.features)
        report = {"preference": float(np.mean(self.preference)), "reader": float(np.mean(self.reader))}
        by_prompt = diversity(features, [k % len(prompts) for k in range(len(features))], right)
        known = [one for one in by_prompt if one is not None]
        report |= {"diversity": float(np.mean(known)) if known else None}
        report |= {"diversity_by_prompt": [None if one is None else round(one, 4) for one in by_prompt]}
        jobs = [(prompt, seed) for seed in range(repeats) for prompt in prompts][:TRUE]
        true = [self._true(jobs, first_seed, batch) for first_seed in (0, repeats)]
        parts = max(1, min(PARTS, len(jobs) // 2))
        for name, these in (("kid", features.mean(1)), ("kid_floor", true[1])):
            values = [kid(these[part::parts], true[0][part::parts]) for part in range(parts)]
            report[name] = [*interval(values)] if parts > 1 else values
        return report

    def _true(self, jobs: Sequence[tuple[Prompt, int]], first_seed: int, batch: int) -> Tensor:
        """Features (n, D) of true scenes."""
        parts = []
        for start in range(0, len(jobs), batch):
            scenes = [true_scene(prompt, first_seed + seed) for prompt, seed in jobs[start : start + batch]]
            parts.append(self.regions(np.stack([render(scene) for scene in scenes])).mean(1))
        return torch.cat(parts)


def check_report(report: Mapping[str, Any], name: str, prompts: int | None) -> None:
    """Refuses a report that is not as `Appearance.found` makes it, for so many prompts.

    Raises:
        ValueError: the first field that is wrong is named.
    """
    for field in ("preference", "reader", "diversity", "kid", "kid_floor", "diversity_by_prompt"):
        value, listed = report.get(field), field not in ("preference", "reader", "diversity")
        numbers = value if listed and isinstance(value, list) else [] if listed else [value]
        kinds = (int, float, type(None)) if field.startswith("diversity") else (int, float)
        if not numbers or not all(isinstance(one, kinds) for one in numbers):
            raise InvalidValue(f"{name}: {field}={value!r:.80}: must be {'numbers' if listed else 'a number'}")
    if len(report["diversity_by_prompt"]) != prompts:
        raise InvalidValue(
            f"{name}: diversity_by_prompt has {len(report['diversity_by_prompt'])} for {prompts} prompts"
        )


def kept_diversity(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    """Diversity of `first` as a share of that of `second`, over the prompts that both have; None without any of it."""
    pairs = zip(first["diversity_by_prompt"], second["diversity_by_prompt"], strict=True)
    both = np.array([pair for pair in pairs if None not in pair], float).reshape(-1, 2)
    return float(both[:, 0].mean() / both[:, 1].mean()) if both[:, 1].any() else None
