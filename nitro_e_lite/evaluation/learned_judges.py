"""Two small networks that look at pictures: one says which of two is nicer, one reads what is in it.

**Preference.** People say which of two pictures they like better, not how good one is. Bradley and Terry turn such
choices into a score: `P(a is liked better than b) = sigmoid(s(a) - s(b))`. HPSv2 is that at full scale, with people;
here the pairs are a clean scene and the same scene with a fault, so that no one has to be asked. It rewards.

**The independent judge.** Where a verifier is the reward *and* the benchmark, a policy that has found its blind spot
looks perfect in both. `SceneReader` answers the verifier's question, which objects are where, but shares nothing with
it: a convolutional network that was trained on true scenes says for each cell of a 16 x 16 grid whether an object has
its centre there, of which shape and of which colour. It never rewards. While reward and reader rise together, pictures
get better; where the reward alone rises, it is being hacked.

Both are trained by `stages/judges.py`.

Source: Bradley and Terry, 1952; HPSv2 arXiv 2306.09341; CenterNet arXiv 1904.07850 (objects as points of a grid).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nitro_e_lite.errors import MissingFile
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.encoders import images_to_tensor
from nitro_e_lite.scenes.geneval import Prompt, judge
from nitro_e_lite.scenes.grammar import COLORS, SHAPES
from nitro_e_lite.scenes.verifier import Detection

SIZE, GRID = 128, 16  # pixels and cells a side
WIDTHS = (16, 32, 64)  # after each halving


class _Trunk(nn.Sequential):
    """Pixels (B, 3, 128, 128) to features (B, 64, 16, 16), each of which sees 63 pixels a side."""

    def __init__(self):
        layers, last = [], 3
        for width, stride in [*((w, 2) for w in WIDTHS), (WIDTHS[-1], 1), (WIDTHS[-1], 1), (WIDTHS[-1], 1)]:
            layers += [nn.Conv2d(last, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            last = width
        super().__init__(*layers)


def _pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) as (B, 3, 128, 128) in [-1, 1]."""
    pixels = images_to_tensor(np.ascontiguousarray(pictures))
    return pixels if pixels.shape[-1] == SIZE else F.interpolate(pixels, (SIZE, SIZE), mode="area")


class PreferenceModel(nn.Module):
    """How nice a picture is; differences between two are log-odds."""

    name = "preference"

    def __init__(self):
        super().__init__()
        self.trunk, self.head = _Trunk(), nn.Linear(2 * WIDTHS[-1], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (B,) of pixels (B, 3, H, W) in [-1, 1]."""
        features = self.trunk(pixels).flatten(2)  # (B, D, N)
        return self.head(torch.cat([features.mean(2), features.amax(2)], 1)).squeeze(1)  # a fault may be in one place

    @torch.no_grad()
    def score(self, pictures: np.ndarray) -> np.ndarray:
        """Scores (B,) of pictures, uint8 (B, H, W, 3)."""
        return self(_pixels(pictures)).double().numpy()


def preference_loss(better: Tensor, worse: Tensor) -> Tensor:
    """`-log sigmoid(s(better) - s(worse))`, (B,)."""
    return -F.logsigmoid(better - worse)


class SceneReader(nn.Module):
    """Which objects are where, from pixels; see the module's essay."""

    name = "reader"

    def __init__(self):
        super().__init__()
        self.trunk, self.head = _Trunk(), nn.Conv2d(WIDTHS[-1], 1 + len(SHAPES) + len(COLORS), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of centre (B, 16, 16), shape (B, 6, 16, 16) and colour (B, 10, 16, 16)."""
        centre, shape, color = self.head(self.trunk(pixels)).split([1, len(SHAPES), len(COLORS)], 1)
        return centre.squeeze(1), shape, color

    @torch.no_grad()
    def read(self, pictures: np.ndarray) -> list[list[Detection]]:
        """The objects of pictures, uint8 (B, H, W, 3)."""
        centre, shape, color = self(_pixels(pictures))
        chance = centre.sigmoid()
        around = F.max_pool2d(chance[:, None], 3, 1, 1)[:, 0]  # two objects are never in neighbouring cells
        found: list[list[Detection]] = [[] for _ in pictures]
        for b, y, x in ((chance == around) & (chance > 0.5)).nonzero().tolist():
            names = SHAPES[int(shape[b, :, y, x].argmax())], list(COLORS)[int(color[b, :, y, x].argmax())]
            place = (x + 0.5) / GRID, (y + 0.5) / GRID
            found[b].append(Detection(*names, *place, area=0.0, overlap=chance[b, y, x].item()))
        return found

    def right(self, pictures: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """GenEval-lite's verdict (B,) on what this network has read, 0 or 1."""
        pairs = zip(self.read(pictures), prompts, strict=True)
        return np.array([float(judge(found, prompt).correct) for found, prompt in pairs])


Judge = TypeVar("Judge", PreferenceModel, SceneReader)


def load_judge(kind: type[Judge], source: str | Path = "judges") -> Judge:
    """Loads a judge, frozen.

    Args:
        kind: `PreferenceModel` or `SceneReader`.
        source: the shipped name, or the folder of a run of `nitro-e train judge`.

    Raises:
        FileNotFoundError: there are no such weights.
    """
    name = f"{kind.name}.safetensors"
    try:
        folder = find_weights(source, name)
    except FileNotFoundError:
        raise MissingFile(f"{source}: holds no {name}; make it with: nitro-e train judge {kind.name}") from None
    model = kind()
    model.load_state_dict(load_file(folder / name))
    return model.eval().requires_grad_(False)
