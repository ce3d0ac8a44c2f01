"""One process of a training run: what `launch` starts, through torchrun where there are several.

It reads the run from a JSON file (stage, configuration, folder, device), trains, and writes how it ended into another:
the launcher never reads meaning out of printed lines. `RUNS` says which stages there are. Nothing is ever written to
its standard input; when that closes, the launcher is gone and the run asks itself to stop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
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


def run_name(settings: RunConfig | str) -> str:
    """The name in `RUNS` of what these settings, or settings of the class of this name, are for.

    Raises:
        TypeError: there is none.
    """
    wanted = settings if isinstance(settings, str) else type(settings).__name__
    for name, (kind, _) in RUNS.items():
        if kind.__name__ == wanted:
            return name
    known = ", ".join(kind.__name__ for kind, _ in RUNS.values())
    raise InvalidType(f"config: {wanted} describes no run; there are {known}")


def stop_without_launcher() -> None:
    """From now on, SIGTERM to this process when its standard input closes: a run finishes its step, saves and ends."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(request: str) -> None:
    """Trains what the file `request` asks for; the main process writes its outcome to the file named in it."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun starts a run again that hung or crashed
        if Path(asked["outcome"]).is_file():
            raise SystemExit(2)  # over a mistake, which would be made again
        asked["resume"] = True
    try:
        kind, train = RUNS[run_name(asked["settings"])]
        config = from_dict(kind, asked["config"])
        outcome = {"final": str(train(config, asked["run_dir"], asked["resume"], asked["device"]))}
    except RunStopped as stopped:
        outcome = {"stopped": str(stopped)}
    except UserError as error:
        outcome = {"mistake": str(error)}
    except Exception:
        told = Path(asked["outcome"])
        if told.is_file() and "mistake" in json.loads(told.read_text(encoding="utf-8")):
            raise SystemExit(2) from None  # the first process has left over a mistake, and says which
        raise
    if os.environ.get("RANK", "0") == "0" and Path(asked["outcome"]).parent.is_dir():  # gone with the launcher
        Path(asked["outcome"]).write_text(json.dumps(outcome) + "\n", encoding="utf-8")
    if "mistake" in outcome:
        print(f"Error: {outcome['mistake']}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    stop_without_launcher()
    main(sys.argv[1])
