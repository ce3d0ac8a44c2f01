"""Every cell of the tables that waits for an accelerator: one command, ten minutes, random weights, no network.

    nitro-e benchmark --gpu --out FOLDER

measures in the order of `CELLS`, the most wanted first and what must be compiled last, and writes a card after each
row: what a machine that is gone too early has measured is there all the same. No row begins after eight minutes, and
the same command goes on with the rows that the cards in FOLDER lack. Copied to `evaluation/cards`, they fill README's
table and the ledger of claims (`nitro-e tables`).

The full model is drawn with from caption to pixels with random weights of the published shapes, and a tokenizer of this
package: what a text says costs no time. Rows that fail, by memory or by a compiler, say so and leave the others alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nitro_e_lite import runtime
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation import cards, peers
from nitro_e_lite.evaluation.benchmark import time_pipeline
from nitro_e_lite.evaluation.peers import Peer
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.arguments import as_integer
from nitro_e_lite.inference.hub import load_text_encoder
from nitro_e_lite.inference.pipeline import NitroEPipeline

MINUTES = 8.0  # a row that is compiled can take two more
WAYS = ({"steps": 20, "guidance": 4.5}, {"steps": 4, "guidance": 0.0})  # of the published models
DRAWN = ("e_mmdit", "llama_3_2_1b", "dc_ae_f32")  # transformer, text encoder, decoder
SAME = ("device_name", "packages", "rocm", "commit")  # of the environment: rows of one card are compared
CARDS = ("drawing_gpu", "peers_gpu", "peers_gpu_compiled", "fp8_gpu")


@dataclass
class Cells:
    """What is measured, and where it is written.

    Args:
        folder: gets the cards; rows of cards that are there are not measured again.
        device: the accelerator.
        known: the models, see `peers.load_peers`; tests give small ones.
        repeats: runs of which the median counts.
        command: for the cards.
        minutes: no row begins later.

    Attributes:
        written: what each card holds so far, by name.
        left_out: whether there was no time for a row.

    Raises:
        ValueError: the folder holds cards of another device.
    """

    folder: Path
    device: torch.device
    known: Mapping[str, Peer] = field(default_factory=lambda: peers.load_peers())
    repeats: int = 5
    command: str = "nitro-e benchmark --gpu"
    minutes: float = MINUTES
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: bool = False

    def __post_init__(self):
        as_integer("repeats", self.repeats, 1)
        self._end = time.monotonic() + 60 * self.minutes
        self.environment = runtime.environment_report() | {"device_name": runtime.device_name(self.device)}
        self.written = {name: card for name, card in cards.load(self.folder).items() if name in CARDS}
        for name, card in self.written.items():
            before = {field: card["environment"].get(field) for field in SAME} | {"repeats": card["repeats"]}
            now = {field: self.environment[field] for field in SAME} | {"repeats": self.repeats}
            for item, was in before.items():
                if was != now[item]:
                    told = f"{name}.json has {item}={was!r}, this run {now[item]!r}"
                    raise InvalidValue(f"{self.folder}: {told}; name another folder or delete it")

    @property
    def rows(self) -> int:
        """How many there are so far."""
        return sum(len(card["rows"]) for card in self.written.values())

    def wanted(self, name: str, **row: Any) -> bool:
        """Whether a card has no such row yet, and there is time for it."""
        rows = self.written.get(name, {"rows": []})["rows"]
        missing = not any(row.items() <= one.items() for one in rows)
        self.left_out |= missing and time.monotonic() > self._end
        return missing and time.monotonic() <= self._end

    def add(self, name: str, kind: str, row: dict[str, Any], **more: Any) -> None:
        """Adds a row to a card and writes it."""
        card = self.written.setdefault(name, {"rows": [], "repeats": self.repeats, "environment": self.environment})
        card["rows"].append(row)
        for key, value in more.items():
            card[key] = card.get(key, {}) | value if isinstance(value, dict) else value
        cards.write(self.folder / f"{name}.json", kind, card, self.command)

    def draw(self, batch: int, compiled: bool) -> None:
        """Caption to pixels with the full model, both ways."""
        pipeline = None
        for way in WAYS:
            cell = f"batch {batch}, {way['steps']} steps{', compiled' * compiled}"
            if not self.wanted("drawing_gpu", cell=cell):
                continue
            peers.forget(self.device)
            if pipeline is None:
                pipeline = random_pipeline(self.known, self.device)
                if compiled:
                    pipeline.compile()
            (row,) = time_pipeline(pipeline, pipeline.sampler(**way, shift=1.0), [batch], self.repeats)
            self.add("drawing_gpu", "drawing", {"cell": cell} | way | {"compiled": compiled} | row)

    def beside(self, batch: int, compiled: bool) -> None:
        """The models of Table 2, each by itself: the one that all are compared with comes first."""
        name, failed = f"peers_gpu{'_compiled' * compiled}", []
        drawn = [key for key, peer in self.known.items() if peer.draws]
        first = (peers.REFERENCE, *peers.FEW)  # all that README's table needs
        for key in sorted(drawn, key=lambda key: first.index(key) if key in first else len(first)):
            if not self.wanted(name, key=key, batch=batch):
                continue
            alone = {k: peer if k == key else replace(peer, draws=None) for k, peer in self.known.items()}
            try:
                (row,) = peers.time_peers(alone, batch, self.device, "bfloat16", self.repeats, compiled)
            except Exception as error:  # the others are worth having
                failed.append(error)
                peers.forget(self.device)
                continue
            rows = [one for one in self.written.get(name, {"rows": []})["rows"] if one["batch"] == batch] + [row]
            there = any(one["key"] == peers.REFERENCE for one in rows)
            found = {str(batch): peers.ratios(rows)} if there else {}
            self.add(name, "peers", row, ratios=found, compiled=compiled)
        if failed:
            raise failed[0]

    def in_fp8(self, batch: int, compiled: bool) -> None:
        """E-MMDiT and SD3.5 in bfloat16 and in FP8."""
        for key in peers.IN_FP8:
            cell = f"{key}, batch {batch}{', compiled' * compiled}"
            if self.wanted("fp8_gpu", cell=cell):
                (row,) = peers.time_fp8(self.known, batch, self.device, self.repeats, compiled, [key])
                self.add("fp8_gpu", "fp8_speed", {"cell": cell} | row)


CELLS: tuple[tuple[Callable[..., None], int, bool], ...] = (
    (Cells.draw, 32, False),
    (Cells.draw, 1, False),
    (Cells.beside, 32, False),
    (Cells.in_fp8, 8, False),
    (Cells.beside, 1, False),
    (Cells.in_fp8, 1, False),
    (Cells.in_fp8, 32, False),
    (Cells.in_fp8, 8, True),  # each row from here on compiles for a minute or more
    (Cells.draw, 32, True),
    (Cells.draw, 1, True),
    (Cells.beside, 32, True),
    (Cells.in_fp8, 1, True),
    (Cells.in_fp8, 32, True),
    (Cells.beside, 1, True),
)
"""What is measured, at which batch, compiled or as written; in this order."""


def measure(cells: Cells) -> Iterator[str]:
    """Measures; yields a line about each cell: done, failed and why, or left out for want of time."""
    for work, batch, compiled in CELLS:
        name, begin = f"{work.__name__}, batch {batch}{', compiled' * compiled}", time.monotonic()
        cells.left_out = False
        try:
            peers.forget(cells.device)
            work(cells, batch, compiled)
            late = f", not all of it: {cells.minutes:g} minutes are over" if cells.left_out else ""
            yield f"{name}: {time.monotonic() - begin:.0f} s{late}"
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
