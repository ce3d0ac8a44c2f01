"""One process of a training run with several: what `launch` starts through torchrun.

It reads the run from a JSON file (stage, configuration, folder, device), trains, and writes how it ended into another:
the launcher never reads meaning out of printed lines. `RUNS` says which stages there are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nitro_e_lite.config import DistillConfig, RewardConfig, RunConfig, SprintConfig, TrainConfig, from_dict
from nitro_e_lite.errors import InvalidType, UserError
from nitro_e_lite.runtime import RunStopped
from nitro_e_lite.stages.autoencoder import AutoencoderConfig, train_autoencoder
from nitro_e_lite.stages.distill import distill
from nitro_e_lite.stages.language_model import LanguageModelConfig, train_language_model
from nitro_e_lite.stages.pretrain import pretrain
from nitro_e_lite.stages.rewards_grpo import train_rewards
from nitro_e_lite.stages.sprint import sprint
from nitro_e_lite.stages.vision import VisionConfig, train_vision

RUNS: dict[str, tuple[type[RunConfig], Callable[..., Path]]] = {  # each called with config, run_dir, resume, device
    "transformer": (TrainConfig, pretrain),
    "rewards": (RewardConfig, train_rewards),
    "distill": (DistillConfig, distill),
    "sprint": (SprintConfig, sprint),
    "autoencoder": (AutoencoderConfig, train_autoencoder),
    "language-model": (LanguageModelConfig, train_language_model),
    "vision": (VisionConfig, train_vision),
}


def run_name(config: RunConfig) -> str:
    """The name in `RUNS` of what `config` is for.

    Raises:
        TypeError: there is none.
    """
    for name, (kind, _) in RUNS.items():
        if type(config) is kind:
            return name
    known = ", ".join(kind.__name__ for kind, _ in RUNS.values())
    raise InvalidType(f"config: {type(config).__name__} describes no run; there are {known}")


def main(request: str) -> None:
    """Trains what the file `request` asks for; the main process writes its outcome to the file named in it."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    kind, train = RUNS[asked["run"]]
    config = from_dict(kind, asked["config"])
    try:
        outcome = {"final": str(train(config, asked["run_dir"], asked["resume"], asked["device"]))}
    except RunStopped as stopped:
        outcome = {"stopped": str(stopped)}
    except UserError as error:
        outcome = {"mistake": str(error)}
    if os.environ.get("RANK", "0") == "0":
        Path(asked["outcome"]).write_text(json.dumps(outcome) + "\n", encoding="utf-8")
    if "mistake" in outcome:
        print(f"Error: {outcome['mistake']}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1])
