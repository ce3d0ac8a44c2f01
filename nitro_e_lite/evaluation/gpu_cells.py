"""Every cell of the tables that waits for an accelerator: one command, ten minutes, random weights, no network.

    nitro-e benchmark --gpu --out FOLDER

measures in the order of `CELLS`, the most wanted first, and writes a card after each cell: what a machine that is gone
too early has measured is there all the same. No cell begins after nine minutes. Copied to `evaluation/cards`, the
cards fill README's table and the ledger of claims (`nitro-e tables`).

The full model is drawn with from caption to pixels with random weights of the published shapes, and a tokenizer of this
package: what a text says costs no time. Cells that fail, by memory or by a compiler, say so and leave the others alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nitro_e_lite import runtime
from nitro_e_lite.evaluation import cards, peers
from nitro_e_lite.evaluation.benchmark import time_pipeline
from nitro_e_lite.evaluation.peers import Peer
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.arguments import as_integer
from nitro_e_lite.inference.hub import load_text_encoder
from nitro_e_lite.inference.pipeline import NitroEPipeline

MINUTES = 9.0
WAYS = ({"steps": 20, "guidance": 4.5}, {"steps": 4, "guidance": 0.0})  # of the published models
DRAWN = ("e_mmdit", "llama_3_2_1b", "dc_ae_f32")  # transformer, text encoder, decoder


@dataclass
class Cells:
    """What is measured, and where it is written.

    Args:
        folder: gets the cards.
        device: the accelerator.
        known: the models, see `peers.load_peers`; tests give small ones.
        repeats: runs of which the median counts.
        command: for the cards.

    Attributes:
        written: what each card holds so far, by name.
    """

    folder: Path
    device: torch.device
    known: Mapping[str, Peer] = field(default_factory=lambda: peers.load_peers())
    repeats: int = 5
    command: str = "nitro-e benchmark --gpu"
    written: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        as_integer("repeats", self.repeats, 1)
        self.environment = runtime.environment_report() | {"device_name": runtime.device_name(self.device)}

    def add(self, name: str, kind: str, rows: list[dict[str, Any]], **more: Any) -> None:
        """Adds rows to a card and writes it."""
        card = self.written.setdefault(name, {"rows": [], "repeats": self.repeats, "environment": self.environment})
        card["rows"] += rows
        for key, value in more.items():
            card[key] = card.get(key, {}) | value if isinstance(value, dict) else value
        cards.write(self.folder / f"{name}.json", kind, card, self.command)

    def draw(self, batch: int, compiled: bool) -> None:
        """Caption to pixels with the full model, both ways."""
        pipeline = random_pipeline(self.known, self.device)
        if compiled:
            pipeline.compile()
        for way in WAYS:
            (row,) = time_pipeline(pipeline, pipeline.sampler(**way, shift=1.0), [batch], self.repeats)
            cell = f"batch {batch}, {way['steps']} steps{', compiled' * compiled}"
            self.add("drawing_gpu", "drawing", [{"cell": cell} | way | {"compiled": compiled} | row])
            runtime.forget_memory(self.device)

    def beside(self, batch: int, compiled: bool) -> None:
        """The models of Table 2."""
        name = f"peers_gpu{'_compiled' * compiled}"
        rows = list(peers.time_peers(self.known, batch, self.device, "bfloat16", self.repeats, compiled))
        self.add(name, "peers", rows, ratios={str(batch): peers.ratios(rows)}, compiled=compiled)

    def in_fp8(self, batch: int, compiled: bool) -> None:
        """E-MMDiT and SD3.5 in bfloat16 and in FP8, each row as soon as it is there."""
        for row in peers.time_fp8(self.known, batch, self.device, self.repeats, compiled):
            self.add("fp8_gpu", "fp8_speed", [{"cell": f"{row['key']}, batch {batch}{', compiled' * compiled}"} | row])


CELLS: tuple[tuple[Callable[..., None], int, bool], ...] = (
    (Cells.draw, 32, False),
    (Cells.draw, 1, False),
    (Cells.beside, 32, False),
    (Cells.in_fp8, 8, False),
    (Cells.draw, 32, True),
    (Cells.draw, 1, True),
    (Cells.in_fp8, 8, True),
    (Cells.beside, 1, False),
    (Cells.in_fp8, 1, False),
    (Cells.in_fp8, 32, False),
    (Cells.in_fp8, 1, True),
    (Cells.in_fp8, 32, True),
    (Cells.beside, 32, True),
    (Cells.beside, 1, True),
)
"""What is measured, at which batch, compiled or as written; in this order."""


def measure(cells: Cells, minutes: float = MINUTES) -> Iterator[str]:
    """Measures; yields a line about each cell: done, failed and why, or left out for want of time."""
    end = time.monotonic() + 60 * minutes
    for work, batch, compiled in CELLS:
        name, begin = f"{work.__name__}, batch {batch}{', compiled' * compiled}", time.monotonic()
        runtime.forget_memory(cells.device)
        if begin > end:
            yield f"{name}: left out, {minutes:g} minutes are over"
            continue
        try:
            work(cells, batch, compiled)
            yield f"{name}: {time.monotonic() - begin:.0f} s"
        except Exception as error:  # out of memory, a compiler: the next cells are worth having
            yield f"{name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:200]}"


@torch.no_grad()
def random_pipeline(known: Mapping[str, Peer], device: torch.device) -> NitroEPipeline:
    """The pipeline of `DRAWN` at random weights in bfloat16."""
    build = partial(peers.build, device=device, dtype=torch.bfloat16)
    transformer, text, vae = (build(known[key]) for key in DRAWN)
    tokens = known[DRAWN[1]].inputs["input_ids"][1]
    scheduler, (tokenizer, _) = FlowMatchEulerDiscreteScheduler(1000), load_text_encoder(find_weights("lite"))
    pipeline = NitroEPipeline(transformer, vae, text, tokenizer, scheduler, max_text_length=tokens)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
