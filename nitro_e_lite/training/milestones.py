"""Is the run worth going on with? The average is looked at a few times, and kept.

A loss that falls says little about pictures. At a few steps of a long run (`milestones`; 5, 20, 50 and 100 thousand at
full scale) the averaged weights are validated and draw the same captions from the same noise. The picture goes into
`RUN_DIR/milestones`, the numbers into `RUN_DIR/milestones.jsonl`, and a rule warns where a person should look before
more is spent:

* a number is not finite;
* the validation loss is not below that of the milestone before;
* pictures are flat: less `contrast` (deviation of the pixels within a picture, of [0, 1]) than `FLAT`;
* captions change little: from one noise, eight captions draw pictures that deviate by less `spread` than `ALIKE`.

It warns and never stops: a rule that was right about other runs may be wrong about this one.

Beside them, every `snapshot_every` steps the average is kept for good, as a model that `--model` reads, in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nitro_e_lite.files import append_jsonl, read_jsonl

FLAT, ALIKE = 0.05, 0.02  # contrast and spread of the lite model are 0.104 and 0.058, of random weights 0.081 and 0.002


def concerns(found: Mapping[str, float], before: Mapping[str, float] | None) -> list[str]:
    """What the rule says of a milestone, in words; nothing when all is well.

    Args:
        found: its numbers; those that a stage does not measure are not judged.
        before: those of the milestone before.
    """
    said = [f"{name} is not finite" for name, value in found.items() if not math.isfinite(value)]
    now, then = found.get("validation_loss"), (before or {}).get("validation_loss")
    if now is not None and then is not None and now >= then:
        said.append(f"validation_loss {now:.4f} is not below the {then:.4f} of step {before['step']:.0f}")
    if found.get("contrast", 1.0) < FLAT:
        said.append(f"pictures are flat: contrast {found['contrast']:.3f}, below {FLAT}")
    if found.get("spread", 1.0) < ALIKE:
        said.append(f"captions change little: spread {found['spread']:.3f}, below {ALIKE}")
    return said


class Milestones:
    """The milestones of a run, in a file.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path):
        self.file = run_dir / "milestones.jsonl"

    def record(self, step: int, found: Mapping[str, float]) -> list[str]:
        """Writes a milestone down; returns what the rule says of it."""
        rows = list(read_jsonl(self.file)) if self.file.is_file() else []
        before = [row for row in rows if row["step"] < step]  # a resumed run passes a milestone again
        said = concerns(found, before[-1] if before else None)
        finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
        append_jsonl(self.file, {"step": step, **finite, "concerns": said})
        return said


def halve(folder: Path) -> None:
    """Rounds what is in float32 in the safetensors files of `folder` to bf16."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file({n: v.bfloat16() if v.dtype == torch.float32 else v for n, v in tensors.items()}, path, metadata)
