"""Shards: what training reads instead of encoding the same images again and again.

A data set is a folder: `card.json` and any number of shards. A shard is an Arrow file, written by Hugging Face
`datasets`, and a small JSON file beside it with its rows, size and SHA-256. The JSON file is written last, so a shard
without one does not exist: a writer killed at any moment loses the shard it was writing and no other.

=========  ============================================================================================
column     holds
=========  ============================================================================================
latents    float16 (C * h * w): normalised latents
captions   strings, at least one
text       float16 (L * Dc), optional: features of the first caption
vision     float16 (P * Dv), optional: features of the image for REPA
picture    bytes of a JPEG, optional: the image itself, for a vision model that looks at it in training
states     float16 (K * C * h * w), optional: where a teacher was on its way, see `drawn.py`
source     where the image is from, such as `sa1b`
key        its name there, so that a picture can be found again
=========  ============================================================================================

The card holds the fingerprint of the encoder that made the latents. Opening a folder made by another encoder is an
error: a model trained on it would learn nothing of use. The same holds for stored text features.

**Reading.** Rows are read in random order by `READERS` threads at once, with plain reads of just their bytes, see
`shard_files.py`: a disk with a queue is far faster when the queue is full.

**Quarantine.** Files rot. A shard that is cut short or unreadable, a row with a NaN or without a caption, is put into
`quarantine.jsonl` with its reason, is said once, and never stops a run. Its turn goes to another row, chosen by
its number alone: the length and the place of every other row stay as they are, and with them the exact order. What may
pass (a shard that is away, no permission, no memory) is tried again, then named and replaced in the same way, but not
remembered: the next run finds it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nitro_e_lite.data import shard_files
from nitro_e_lite.data.shard_files import CutShort, Damaged, Layout, ShardFile, explain, is_passing, patiently
from nitro_e_lite.errors import InvalidValue, MissingFile, Unusable
from nitro_e_lite.files import append_jsonl, read_json, read_jsonl, write_atomically

CARD, SHARDS, QUARANTINE = "card.json", "shards", "quarantine.jsonl"
READERS, ROWS_EACH = 8, 8  # threads that read a batch, and the rows that one of them takes at a time
ARRAYS = ("latents", "text", "vision", "states")  # columns of float16 numbers
SHARD_ROWS = 10_000
LARGEST_ROW = 2**31  # numbers; a card that says more is damaged, and nothing is made room for
LARGEST_FINITE = 0x7BFF  # bits of the largest finite float16, sign left out


@dataclass(frozen=True)
class LatentBatch:
    """`latents` float32 or float16 (B, C, h, w) and the captions of each image (at least one).

    `text` (B, L, Dc), `vision` (B, P, Dv) and `states` (B, K, C, h, w) are float16, or None when the data set has none.
    `images` uint8 (B, H, W, 3) is what a reader makes of `pictures`, the JPEG files that were written. `sources` and
    `keys` are for writing; a reader leaves them None, but gives the keys of drawn pictures, which are the seeds of
    their noise.
    """

    latents: Tensor
    captions: list[list[str]]
    text: Tensor | None = None
    vision: Tensor | None = None
    states: Tensor | None = None
    images: Tensor | None = None
    pictures: list[bytes] | None = None
    sources: list[str] | None = None
    keys: list[str] | None = None


def bad_rows(values: np.ndarray) -> np.ndarray:
    """Which rows of float16 (B, n) hold a NaN or an infinity: bool (B,)."""
    positive, negative = values.view(np.int16).max(1), values.view(np.uint16).max(1)  # the sign is the highest bit
    return (positive > LARGEST_FINITE) | (negative > 0x8000 + LARGEST_FINITE)


# -----------------------------------------------------------------------------------------------------------
# Reading
# -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One shard as it was found; `reason` says what is wrong with it, if anything is, and `passing` if it may pass."""

    folder: Path
    name: str
    rows: int
    reason: str = ""
    passing: bool = False

    @cached_property
    def path(self) -> Path:
        """Its Arrow file."""
        return self.folder / SHARDS / f"{self.name}.arrow"


@dataclass(frozen=True)
class Trouble:
    """Why a row cannot be trained on: its own fault, or that of its whole shard; damage or something that may pass."""

    chunk: Chunk
    row: int  # within the chunk
    reason: str
    of_shard: bool = False
    passing: bool = False


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one shard; `layout` says where in its file, and is None in a shard that cannot be read."""

    shard: Shard
    first: int  # number of its first row within the shard
    rows: int
    layout: Layout | None = None


class LatentDataset:
    """One or more folders of shards, read as one data set.

    Args:
        folder: what `write_latents` or `nitro-e data encode` made; several are joined in the order given.
        fingerprint: of the encoder in use; None skips the check (for inspection only).
        text: fingerprint of language model and autoencoder in use, for stored text features; None: as above.

    Raises:
        FileNotFoundError: when a folder holds no data set.
        ValueError: when the latents or text features were made by another encoder, the folders do not fit together, or
            no row is left.
    """

    def __init__(self, folder: str | Path | Sequence[str | Path], fingerprint: str | None, text: str | None = None):
        self.folders = [Path(f) for f in ([folder] if isinstance(folder, str | Path) else folder)]
        cards = [read_card(path) for path in self.folders]
        self.card = cards[0]
        self.shapes = array_shapes(self.card)
        for path, card in zip(self.folders, cards, strict=True):
            self._check_card(path, card, {"latents": fingerprint, "text features": text})
        self.shape = self.shapes["latents"]
        found = [open_shards(path, card) for path, card in zip(self.folders, cards, strict=True)]
        self.chunks = [chunk for chunks in found for chunk in chunks]
        self.shards = list(dict.fromkeys(chunk.shard for chunk in self.chunks))
        self._ends = [*accumulate(chunk.rows for chunk in self.chunks)]
        self._good = [chunk for chunk in self.chunks if chunk.layout is not None and chunk.rows]
        self._good_ends = [*accumulate(chunk.rows for chunk in self._good)]
        self._warned, self._named = False, set()  # of bad rows; shards that a passing error was told of
        self._open = lru_cache(shard_files.files_to_keep_open())(ShardFile)
        self._readers, self._reporting = ThreadPoolExecutor(READERS, "rows"), threading.Lock()
        self._report_shards(cards)

    def _check_card(self, path: Path, card: dict[str, Any], wanted: dict[str, str | None]) -> None:
        features, first = (  # what made them, where `data encode` did
            {name: made for name, made in one.get("features", {}).items() if made} for one in (card, self.card)
        )
        made_by = {"latents": card["fingerprint"], "text features": features.get("text")}
        for name, made in made_by.items():
            if made and wanted[name] and made != wanted[name]:
                raise InvalidValue(
                    f"{path}: {name} were made by encoder {made[:12]}, this run uses {wanted[name][:12]}; "
                    "encode the data again (delete the folder) or name the matching encoder"
                )
        mixed = any(first.get(name, made) != made for name, made in features.items())
        mixed |= card.get("pictures") != self.card.get("pictures")
        if mixed or card["fingerprint"] != self.card["fingerprint"] or array_shapes(card) != self.shapes:
            raise InvalidValue(
                f"{path}: another encoder, or other columns or shapes, than {self.folders[0]}; encode both alike"
            )

    def _report_shards(self, cards: list[dict[str, Any]]) -> None:
        broken = [shard for shard in self.shards if shard.reason]
        damaged, away = ([shard for shard in broken if shard.passing is passing] for passing in (False, True))
        for shard in damaged:
            quarantine(shard.folder, shard.name, None, shard.reason)
        if not self._good:
            first = f"; first: {broken[0].name}, {broken[0].reason}" if broken else ""
            raise InvalidValue(
                f"{', '.join(map(str, self.folders))}: no row can be read ({len(damaged)} shards are in {QUARANTINE}, "
                f"{len(away)} cannot be reached{first}); encode the data again, or make it readable"
            )
        for shards, what, where in (
            (damaged, "are in quarantine", f"See {QUARANTINE} in {{}}"),
            (away, "cannot be reached", "Nothing is remembered of it: the next start tries again in {}"),
        ):
            if shards:
                warnings.warn(
                    f"{len(shards)} of {len(self.shards)} shards, {sum(s.rows for s in shards):,} of {len(self):,} "
                    f"rows, {what} (first: {shards[0].name}, {shards[0].reason}); other rows take their turns. "
                    f"{where.format(shards[0].folder)}",
                    stacklevel=3,
                )
        for path, card in zip(self.folders, cards, strict=True):
            done = sum(bool(state and state["end"]) for state in sidecars(path).values())
            if done < card.get("parts", 0):
                warnings.warn(f"{path}: only {done} of {card['parts']} parts are encoded yet", stacklevel=3)

    def __len__(self) -> int:
        return self._ends[-1]

    def leave_out(self, column: str) -> None:
        """From here on batches come without a column of features, and it is not read."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if name != column}

    @property
    def has_bad_rows(self) -> bool:
        """Whether a row was found that another takes the turns of."""
        return self._warned or bool(self._named) or len(self._good) < len(self.chunks)

    @property
    def has_pictures(self) -> bool:
        """Whether the pictures themselves are stored."""
        return self.card.get("pictures") is not None

    @property
    def digest(self) -> str:
        """Names the shards, their rows and which can be read: with a seed, the order of training."""
        found = [[s.name, s.rows, bool(s.reason)] for s in self.shards]
        return hashlib.blake2b(json.dumps(found).encode(), digest_size=8).hexdigest()

    def batch(self, indices: Iterable[int], images: bool = False, pin: bool = False) -> LatentBatch:
        """The rows `indices` as one batch; a row in quarantine is replaced by another, always by the same one.

        Args:
            indices: numbers of the rows.
            images: decode the stored pictures too.
            pin: into memory from which an accelerator copies without waiting; latents stay float16, which it converts.

        Raises:
            IndexError: for a row that is not there.
            ValueError: when no good row is found in place of a bad one.
        """
        rows = [int(i) for i in indices]
        if not all(0 <= row < len(self) for row in rows):
            raise IndexError(f"indices: between {min(rows)} and {max(rows)}; there are {len(self)} rows")
        batch = _Draft.empty(len(rows), self, images, pin)
        parts = [range(k, min(k + ROWS_EACH, len(rows))) for k in range(0, len(rows), ROWS_EACH)]
        for attempt in range(100):

            def read(places: range, attempt: int = attempt) -> dict[int, Trouble]:
                return self._read(batch, rows, places, attempt)

            found = self._readers.map(read, parts) if len(parts) > 1 else map(read, parts)
            troubles = {place: trouble for part in found for place, trouble in part.items()}
            if not troubles:
                return batch.finish(self.shapes, torch.float16 if pin else torch.float32)
            self._report(troubles.values())
            parts = [range(place, place + 1) for place in troubles]
        place, trouble = next(iter(troubles.items()))
        told = f"{self.folders[0]}: row {rows[place]} and 99 others are bad (last: {trouble.reason}); "
        if trouble.passing:
            raise Unusable(f"{told}is its disk there?")
        raise InvalidValue(f"{told}run `nitro-e data check`")

    def _read(self, batch: _Draft, rows: list[int], places: range, attempt: int) -> dict[int, Trouble]:
        """Reads the rows of neighbouring `places`; returns what is wrong, by place."""
        troubles = {}
        for place in places:
            chunk, within = self._locate(rows[place], attempt)

            def read(chunk: Chunk = chunk, within: int = within, place: int = place) -> str:
                try:
                    return batch.read(self._open(chunk.shard.path), chunk, within, place)
                except OSError as error:
                    if is_passing(error):
                        self._open.cache_clear()  # a file server that was away may know its old handles no more
                    raise

            try:
                reason = patiently(read, () if chunk.shard in self._named else shard_files.PAUSES)
                if reason:
                    troubles[place] = Trouble(chunk, within, reason)
            except (Damaged, OSError, MemoryError) as error:
                of_shard, passing = not isinstance(error, Damaged) or isinstance(error, CutShort), is_passing(error)
                troubles[place] = Trouble(chunk, within, explain(error), of_shard, passing)
        for name, array in batch.arrays.items():
            for k in np.flatnonzero(bad_rows(array[places.start : places.stop])):
                place = places.start + int(k)
                if place not in troubles or not troubles[place].of_shard:
                    troubles[place] = Trouble(*self._locate(rows[place], attempt), f"{name} not finite")
        return troubles

    def _report(self, troubles: Iterable[Trouble]) -> None:
        """Damage goes into quarantine; a passing error is told once for each shard."""
        with self._reporting:
            self._report_alone(troubles)

    def _report_alone(self, troubles: Iterable[Trouble]) -> None:
        for trouble in troubles:
            shard = trouble.chunk.shard
            if trouble.passing and shard not in self._named:
                self._named.add(shard)
                warnings.warn(
                    f"{shard.path}: {trouble.reason}, after {len(shard_files.PAUSES) + 1} attempts; other rows take "
                    "its rows' turns as long as it cannot be read",
                    stacklevel=3,
                )
            if not trouble.passing:
                row = None if trouble.of_shard else trouble.chunk.first + trouble.row
                quarantine(shard.folder, shard.name, row, trouble.reason)
        first = next((t for t in troubles if not t.passing), None)
        if first and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.folders[0]}: bad rows found (first: {first.reason}); other rows take their "
                f"turns, {QUARANTINE} lists them, `nitro-e data check` counts them",
                stacklevel=3,
            )

    def _locate(self, row: int, attempt: int) -> tuple[Chunk, int]:
        """Chunk and place in it of a row, or of the row that takes its turn: a pure function of its arguments."""
        k = bisect_right(self._ends, row)
        if attempt == 0 and self.chunks[k].layout is not None:
            return self.chunks[k], row - self._ends[k] + self.chunks[k].rows
        other = (row * 2_654_435_761 + attempt) % self._good_ends[-1]  # spreads a lost shard over all others
        k = bisect_right(self._good_ends, other)
        return self._good[k], other - self._good_ends[k] + self._good[k].rows


@dataclass(frozen=True)
class _Draft:
    """A batch while it is read, several rows at once."""

    tensors: dict[str, Tensor]
    arrays: dict[str, np.ndarray]  # the same memory: float16 (B, n)
    captions: list[list[str]]
    keys: list[str] | None
    images: Tensor | None

    @classmethod
    def empty(cls, count: int, data: LatentDataset, images: bool, pin: bool) -> _Draft:
        tensors = {
            name: torch.empty(count, prod(shape), dtype=torch.float16, pin_memory=pin)
            for name, shape in data.shapes.items()
        }
        side = data.card.get("pictures")
        if images and side is None:
            raise InvalidValue(f"{data.folders[0]}: holds no pictures; nitro-e data encode --pictures stores them")
        pixels = torch.empty(count, side, side, 3, dtype=torch.uint8, pin_memory=pin) if images else None
        keys = [""] * count if "states" in data.shapes else None
        return cls(tensors, {name: x.numpy() for name, x in tensors.items()}, [[]] * count, keys, pixels)

    def read(self, file: ShardFile, chunk: Chunk, row: int, place: int) -> str:
        """Reads one row; returns what is wrong with it, besides its numbers."""
        layout = chunk.layout
        for name, array in self.arrays.items():
            layout.numbers[name].read_into(file, row, array[place])
        self.captions[place] = read_captions(layout.strings["captions"].read(file, row))
        if self.keys is not None:
            (key,) = layout.strings["key"].read(file, row)
            self.keys[place] = key.decode("utf-8", "replace")
        if self.images is not None:
            (picture,) = layout.strings["picture"].read(file, row)
            try:
                self.images[place] = torch.from_numpy(np.array(Image.open(io.BytesIO(picture)).convert("RGB")))
            except MemoryError:
                raise
            except Exception:  # Pillow's readers raise many kinds on damaged bytes
                return "picture cannot be read"
        return "" if self.captions[place] else "no caption"

    def finish(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> LatentBatch:
        """The batch itself, latents in `dtype`."""
        tensors = {name: x.unflatten(1, shapes[name]) for name, x in self.tensors.items()}
        latents = tensors.pop("latents").to(dtype)
        return LatentBatch(latents, self.captions, keys=self.keys, images=self.images, **tensors)


def read_captions(texts: Iterable[bytes]) -> list[str]:
    """The captions of one row that say something; none where the bytes are no text."""
    with contextlib.suppress(UnicodeDecodeError):
        return [text for text in (found.decode("utf-8") for found in texts) if text.strip()]
    return []


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a data set.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = folder / CARD
    if not path.is_file():
        raise MissingFile(f"{folder}: no latent data set ({CARD} is missing)")
    card = read_json(path)
    if not isinstance(card.get("fingerprint"), str) or not isinstance(card.get("features", {}), dict):
        raise InvalidValue(f"{path}: is no card of a data set; needs a fingerprint (a string)")
    arrays = card.get("arrays", {})
    named = arrays if isinstance(arrays, dict) else {"arrays": arrays}
    for name, shape in {"shape": card.get("shape"), **named}.items():
        whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        if not whole or not 1 <= prod(shape) <= LARGEST_ROW or (name == "shape" and len(shape) != 3):
            raise InvalidValue(f"{path}: {name}={shape!r} is no shape of at most {LARGEST_ROW:,} numbers a row")
    return card


def array_shapes(card: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each column of numbers: `{"latents": (C, h, w), ...}`."""
    shapes = {"latents": card["shape"], **card.get("arrays", {})}
    return {name: tuple(shape) for name, shape in shapes.items()}


def sidecars(
    folder: Path, names: str = "*", keep: Callable[[str], bool] = lambda name: True
) -> dict[str, dict[str, Any] | None]:
    """Shard name -> what its JSON file says (None: damaged), in the order of the rows; of names that `keep` wants.

    Raises:
        RuntimeError: a file cannot be reached; without it nobody knows how many rows there are.
    """
    paths = sorted(path for path in (folder / SHARDS).glob(f"{names}.json") if keep(path.stem))
    with ThreadPoolExecutor(READERS) as pool:  # thousands, on a file server that takes its time for each
        return dict(zip([path.stem for path in paths], pool.map(_sidecar, paths), strict=True))


def _sidecar(path: Path) -> dict[str, Any] | None:
    try:
        state = patiently(lambda: read_json(path))
        whole = all(type(state.get(name)) is int and state[name] >= 0 for name in ("rows", "bytes"))
        return {"end": True, "next": 0, "sha256": "", **state} if whole else None
    except ValueError:
        return None
    except (OSError, MemoryError) as error:
        raise Unusable(f"{path}: cannot be read ({explain(error)}); make it readable and start again") from None


def open_shards(folder: Path, card: dict[str, Any], fresh: bool = False) -> list[Chunk]:
    """All shards of one folder, good and bad; checks sizes and layout, not every byte (`nitro-e data check` does).

    Args:
        folder: of the data set.
        card: its card.
        fresh: looks again at shards that are in quarantine.
    """
    held = [] if fresh else read_quarantine(folder)
    listed = {line["shard"]: line["reason"] for line in held if line["row"] is None}
    states = sidecars(folder)
    shards = {name: Shard(folder, name, state["rows"] if state else 0) for name, state in states.items()}
    found: dict[str, list[Chunk]] = {}
    for pause in (*shard_files.PAUSES, None):
        for name, shard in shards.items():
            if name not in found or found[name] and found[name][0].shard.passing:
                found[name] = _open_shard(shard, states[name], listed.get(name), card)
        away = any(chunk.shard.passing for chunks in found.values() for chunk in chunks)
        if not away or pause is None:
            break
        time.sleep(pause)  # all that are away are tried again, together
    return [chunk for name in shards for chunk in found[name]]


def _open_shard(shard: Shard, state: dict[str, Any] | None, listed: str | None, card: dict[str, Any]) -> list[Chunk]:
    """The chunks of one shard; one without a layout when it cannot be read."""
    try:
        if state is None:
            raise Damaged("its JSON file cannot be read")
        if listed is not None:
            raise Damaged(listed)
        if not shard.rows:
            return []
        if (size := shard.path.stat().st_size) != state["bytes"]:
            raise Damaged(f"{size} of {state['bytes']} bytes are there")
        layouts = shard_files.find_layouts(shard.path, array_shapes(card))
        rows = [layout.rows for layout in layouts]
        if sum(rows) != shard.rows:
            raise Damaged(f"{sum(rows)} of {shard.rows} rows are there")
        firsts = np.cumsum([0, *rows]).tolist()
        return [Chunk(shard, *place) for place in zip(firsts[:-1], rows, layouts, strict=True)]
    except Exception as error:  # whatever Arrow says of a damaged file: it costs this shard, not the run
        broken = replace(shard, reason=explain(error), passing=is_passing(error))
        return [Chunk(broken, 0, shard.rows)]


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    """What is in quarantine: `{"shard", "row", "reason"}`, with row None for a whole shard.

    Several processes write there and each may be killed, so a line that cannot be read stops nothing; it is said.
    """
    path = folder / QUARANTINE
    return list(read_jsonl(path, parse=_check_line, damaged=_warn_of_line)) if path.is_file() else []


def _check_line(line: dict[str, Any]) -> dict[str, Any]:
    fields = (line.get("shard"), line.get("row", ""), line.get("reason"))
    if not all(isinstance(value, kind) for value, kind in zip(fields, (str, int | None, str), strict=True)):
        raise InvalidValue("needs shard and reason (strings) and row (a number or null)")
    return line


def _warn_of_line(problem: ValueError) -> None:
    warnings.warn(f"{problem}; this line is left out. `nitro-e data check` writes the list again", stacklevel=4)


def release(folder: Path, shard: str) -> None:
    """Takes a shard that was written again, and its rows, out of quarantine."""
    held = read_quarantine(folder)
    if others := [line for line in held if line["shard"] != shard]:
        if len(others) < len(held):
            write_atomically(folder / QUARANTINE, "".join(json.dumps(line) + "\n" for line in others))
    else:
        (folder / QUARANTINE).unlink(missing_ok=True)


def quarantine(folder: Path, shard: str, row: int | None, reason: str) -> None:
    """Adds one line to the report, once; a folder that cannot be written to keeps none."""
    line = {"shard": shard, "row": row, "reason": reason}
    with contextlib.suppress(OSError):
        if line not in read_quarantine(folder):
            append_jsonl(folder / QUARANTINE, line)
