"""Shards: what training reads instead of encoding the same images again and again.

A data set is a folder: `card.json` and any number of shards. A shard is an Arrow file, written and mapped into memory
by Hugging Face `datasets`, and a small JSON file beside it with its rows, size and SHA-256. The JSON file is written
last, so a shard without one does not exist: a writer killed at any moment loses the shard it was writing and no other.

=========  ============================================================================================
column     holds
=========  ============================================================================================
latents    float16 (C * h * w): normalised latents
captions   strings, at least one
text       float16 (L * Dc), optional: features of the first caption
vision     float16 (P * Dv), optional: features of the image for REPA
states     float16 (K * C * h * w), optional: where a teacher was on its way, see `drawn.py`
source     where the image is from, such as `sa1b`
key        its name there, so that a picture can be found again
=========  ============================================================================================

The card holds the fingerprint of the encoder that made the latents. Opening a folder made by another encoder is an
error: a model trained on it would learn nothing of use. The same holds for stored text features.

**Quarantine.** Files rot. A shard that is cut short or unreadable, a row with a NaN or without a caption, is put into
`quarantine.jsonl` with its reason, is said once, and never stops a run. Its turn goes to another row, chosen by
its number alone: the length and the place of every other row stay as they are, and with them the exact order.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.files import append_jsonl, read_json, read_jsonl

CARD, SHARDS, QUARANTINE = "card.json", "shards", "quarantine.jsonl"
ARRAYS = ("latents", "text", "vision", "states")  # columns of float16 numbers
SHARD_ROWS = 10_000
LARGEST_ROW = 2**31  # numbers; a card that says more is damaged, and nothing is made room for
LARGEST_FINITE = 0x7BFF  # bits of the largest finite float16, sign left out


@dataclass(frozen=True)
class LatentBatch:
    """`latents` float32 (B, C, h, w) and the captions of each image (at least one).

    `text` (B, L, Dc), `vision` (B, P, Dv) and `states` (B, K, C, h, w) are float16, or None when the data set has none.
    `sources` and `keys` are for writing; a reader leaves them None, but gives the keys of drawn pictures, which are the
    seeds of their noise.
    """

    latents: Tensor
    captions: list[list[str]]
    text: Tensor | None = None
    vision: Tensor | None = None
    states: Tensor | None = None
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
    """One shard as it was found; `reason` says what is wrong with it, if anything is."""

    folder: Path
    name: str
    rows: int
    reason: str = ""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one shard, in memory-mapped arrays; `arrays` is None in a shard that cannot be read."""

    shard: Shard
    first: int  # number of its first row within the shard
    rows: int
    arrays: dict[str, np.ndarray] | None = None  # float16 (rows, n) by column
    captions: Any = None  # Arrow column of lists of strings
    sources: Any = None  # Arrow column of strings, or None
    keys: Any = None  # likewise


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
        self._ends = np.cumsum([chunk.rows for chunk in self.chunks])
        self._good = [chunk for chunk in self.chunks if chunk.arrays is not None and chunk.rows]
        self._good_ends = np.cumsum([chunk.rows for chunk in self._good])
        self._warned = False
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
        if mixed or card["fingerprint"] != self.card["fingerprint"] or array_shapes(card) != self.shapes:
            raise InvalidValue(
                f"{path}: another encoder, or other columns or shapes, than {self.folders[0]}; encode both alike"
            )

    def _report_shards(self, cards: list[dict[str, Any]]) -> None:
        broken = [shard for shard in self.shards if shard.reason]
        for shard in broken:
            quarantine(shard.folder, shard.name, None, shard.reason)
        if not self._good:
            raise InvalidValue(
                f"{', '.join(map(str, self.folders))}: no row can be read ({len(broken)} shards are in {QUARANTINE}); "
                "encode the data again"
            )
        if broken:
            warnings.warn(
                f"{len(broken)} of {len(self.shards)} shards, {sum(s.rows for s in broken):,} of {len(self):,} rows, "
                f"are in quarantine (first: {broken[0].name}, {broken[0].reason}); other rows take their turns. "
                f"See {QUARANTINE} in {broken[0].folder}",
                stacklevel=3,
            )
        for path, card in zip(self.folders, cards, strict=True):
            done = sum(bool(state and state["end"]) for state in sidecars(path).values())
            if done < card.get("parts", 0):
                warnings.warn(f"{path}: only {done} of {card['parts']} parts are encoded yet", stacklevel=3)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def has_bad_rows(self) -> bool:
        """Whether a row was found that another takes the turns of."""
        return self._warned or len(self._good) < len(self.chunks)

    def batch(self, indices: Iterable[int]) -> LatentBatch:
        """The rows `indices` as one batch; a row in quarantine is replaced by another, always by the same one.

        Raises:
            IndexError: for a row that is not there.
            ValueError: when no good row is found in place of a bad one.
        """
        rows = [int(i) for i in indices]
        if not all(0 <= row < len(self) for row in rows):
            raise IndexError(f"indices: between {min(rows)} and {max(rows)}; there are {len(self)} rows")
        arrays = {name: np.empty((len(rows), prod(shape)), np.float16) for name, shape in self.shapes.items()}
        captions: list[list[str]] = [[]] * len(rows)
        keys: list[str] | None = [""] * len(rows) if "states" in self.shapes else None
        places = range(len(rows))
        for attempt in range(100):
            for place in places:
                chunk, within = self._locate(rows[place], attempt)
                for name, array in arrays.items():
                    array[place] = chunk.arrays[name][within]
                captions[place] = read_captions(chunk.captions[within])
                if keys is not None:
                    keys[place] = chunk.keys[within].as_py()
            places = self._bad(places, arrays, captions, rows, attempt)
            if not places:
                tensors = {name: torch.from_numpy(x).unflatten(1, self.shapes[name]) for name, x in arrays.items()}
                return LatentBatch(tensors.pop("latents").float(), captions, keys=keys, **tensors)
        raise InvalidValue(f"{self.folders[0]}: row {rows[places[0]]} and 99 others are bad; run `nitro-e data check`")

    def _locate(self, row: int, attempt: int) -> tuple[Chunk, int]:
        """Chunk and place in it of a row, or of the row that takes its turn: a pure function of its arguments."""
        k = int(np.searchsorted(self._ends, row, "right"))
        if attempt == 0 and self.chunks[k].arrays is not None:
            return self.chunks[k], row - int(self._ends[k]) + self.chunks[k].rows
        other = (row * 2_654_435_761 + attempt) % int(self._good_ends[-1])  # spreads a lost shard over all others
        k = int(np.searchsorted(self._good_ends, other, "right"))
        return self._good[k], other - int(self._good_ends[k]) + self._good[k].rows

    def _bad(self, places, arrays: dict[str, np.ndarray], captions: list, rows: list[int], attempt: int) -> list[int]:
        """Those of `places` that hold a row nobody should train on; the rows go into quarantine."""
        reasons = {place: "no caption" for place in places if not captions[place]}
        for name, array in arrays.items():
            reasons |= {int(place): f"{name} not finite" for place in np.flatnonzero(bad_rows(array))}
        for place, reason in reasons.items():
            chunk, within = self._locate(rows[place], attempt)
            quarantine(chunk.shard.folder, chunk.shard.name, chunk.first + within, reason)
        if reasons and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.folders[0]}: bad rows found (first: {next(iter(reasons.values()))}); other rows take their "
                f"turns, {QUARANTINE} lists them, `nitro-e data check` counts them",
                stacklevel=3,
            )
        return list(reasons)


def read_captions(value: Any) -> list[str]:
    """The captions of one row that say something; none where the bytes are no text."""
    with contextlib.suppress(ValueError):
        return [text for text in value.as_py() or () if text and text.strip()]
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


def sidecars(folder: Path, names: str = "*") -> dict[str, dict[str, Any] | None]:
    """Shard name -> what its JSON file says (None: unreadable), in the order of the rows."""
    found = {}
    for path in sorted((folder / SHARDS).glob(f"{names}.json")):
        try:
            state = read_json(path)
            whole = all(type(state.get(name)) is int and state[name] >= 0 for name in ("rows", "bytes"))
            found[path.stem] = {"end": True, "next": 0, "sha256": "", **state} if whole else None
        except ValueError:
            found[path.stem] = None
    return found


def open_shards(folder: Path, card: dict[str, Any], fresh: bool = False) -> list[Chunk]:
    """All shards of one folder, good and bad; checks sizes and layout, not every byte (`nitro-e data check` does).

    Args:
        folder: of the data set.
        card: its card.
        fresh: looks again at shards that are in quarantine.
    """
    held = [] if fresh else read_quarantine(folder)
    listed = {line["shard"]: line["reason"] for line in held if line["row"] is None}
    chunks: list[Chunk] = []
    for name, state in sidecars(folder).items():
        path, rows = folder / SHARDS / f"{name}.arrow", state["rows"] if state else 0
        try:
            if state is None:
                raise InvalidValue("its JSON file cannot be read")
            if name in listed:
                raise InvalidValue(listed[name])
            if rows == 0:
                continue
            if path.stat().st_size != state["bytes"]:
                raise InvalidValue(f"{path.stat().st_size} of {state['bytes']} bytes are there")
            table = datasets.Dataset.from_file(str(path)).data.table
            if table.num_rows != rows:
                raise InvalidValue(f"{table.num_rows} of {rows} rows are there")
            chunks += _chunks(table, Shard(folder, name, rows), array_shapes(card))
        except Exception as error:  # whatever Arrow says of a damaged file: it costs this shard, not the run
            shard = Shard(folder, name, rows, " ".join(str(error).split()))
            chunks.append(Chunk(shard, 0, rows))
    return chunks


def _chunks(table: Any, shard: Shard, shapes: dict[str, tuple[int, ...]]) -> list[Chunk]:
    """The record batches of an Arrow table as arrays that share its memory."""
    chunks, first = [], 0
    for batch in table.to_batches():
        arrays = {}
        for name, shape in shapes.items():
            column, width = batch.column(name), prod(shape)
            if getattr(column.type, "list_size", None) != width or column.null_count:
                raise InvalidValue(
                    f"{name}: {column.type}, {column.null_count} empty rows; expected {width} numbers a row"
                )
            values = column.values.to_numpy(zero_copy_only=True)
            arrays[name] = values[column.offset * width :][: len(column) * width].reshape(-1, width)
        named = [batch.column(name) if name in batch.schema.names else None for name in ("source", "key")]
        for column in (batch.column("captions"), *named):
            _check_places(column)
        chunks.append(Chunk(shard, first, len(batch), arrays, batch.column("captions"), *named))
        first += len(batch)
    return chunks


def _check_places(column: Any) -> None:
    """Whether all texts of an Arrow column lie within it: reading one that does not would end the process."""
    if column is None or not len(column):
        return
    inner, places = getattr(column, "values", None), column.buffers()[1]  # lists have values, texts have bytes
    kind = np.int64 if str(column.type).startswith("large") else np.int32
    ends = np.frombuffer(places, kind, len(column) + 1, column.offset * np.dtype(kind).itemsize)
    size = len(inner) if inner is not None else column.buffers()[2].size if column.buffers()[2] else 0
    if ends[0] < 0 or ends[-1] > size or (ends[1:] < ends[:-1]).any():
        raise InvalidValue("a text leads out of the file")
    _check_places(inner)


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


def quarantine(folder: Path, shard: str, row: int | None, reason: str) -> None:
    """Adds one line to the report, once; a folder that cannot be written to keeps none."""
    line = {"shard": shard, "row": row, "reason": reason}
    with contextlib.suppress(OSError):
        if line not in read_quarantine(folder):
            append_jsonl(folder / QUARANTINE, line)
