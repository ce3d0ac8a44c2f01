"""One process of a training run with several: what `launch` starts through torchrun.

It reads the run from a JSON file (configuration, folder, device), trains, and writes how it ended into another: the
launcher never reads meaning out of printed lines.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nitro_e_lite.config import TrainConfig, from_dict
from nitro_e_lite.errors import UserError
from nitro_e_lite.runtime import RunStopped
from nitro_e_lite.stages.pretrain import pretrain


def main(request: str) -> None:
    """Trains what the file `request` asks for; the main process writes its outcome to the file named in it."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    config = from_dict(TrainConfig, asked["config"])
    try:
        outcome = {"final": str(pretrain(config, asked["run_dir"], asked["resume"], asked["device"]))}
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
