"""Looks at every byte of a data set before a long run does, and measures how fast it can be read.

`check` reads all shards once: checksums, numbers that are not finite, captions that say nothing, repeated pictures
and captions, the mean and spread of each latent channel. Latents are normalised, so mean 0 and spread 1 are expected: a
forgotten scaling factor, which no loss curve shows before hours have gone, is off by more than a factor of two. What is
wrong with single rows and shards goes into `quarantine.jsonl`, what gave no row at all into `skipped.jsonl`.

`measure_reading` fills a folder with random rows and reads them in training order, from the disk and from memory;
`measure_decoding` decodes pictures as `nitro-e data encode` does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import Dinov2Config

from nitro_e_lite.data.batches import batch_indices
from nitro_e_lite.data.shard_files import Damaged, ShardFile, explain
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import (
    QUARANTINE,
    SHARDS,
    Chunk,
    LatentBatch,
    LatentDataset,
    array_shapes,
    bad_rows,
    open_shards,
    read_captions,
    read_card,
    sidecars,
)
from nitro_e_lite.data.sources import square, to_jpeg
from nitro_e_lite.errors import InvalidValue, MissingFile
from nitro_e_lite.files import sha256_file, write_atomically
from nitro_e_lite.inference.vision import FULL_VISION_SIZES, GRID
from nitro_e_lite.model.flops import PUBLISHED_DEVICES, published_samples_per_second
from nitro_e_lite.model.tokens import FULL_TEXT_LENGTH
from nitro_e_lite.presets import preset
from nitro_e_lite.runtime import check_memory, tune_cpu

MEAN_LIMIT, SPREAD_LIMITS = 0.5, (0.7, 1.4)  # of the mean over channels, in absolute value
FULL_PIXELS = 512  # a side
CHANNEL_MEAN_LIMIT, CHANNEL_SPREAD_LIMITS = 1.5, (0.2, 5.0)
SKIPPED = "skipped.jsonl"
MUCH = 0.2  # a share of all items that is not left out for one reason unless something is wrong
NEEDED_SAMPLES_PER_SECOND = round(published_samples_per_second())
_FULL = preset("base", "full").model
FULL_SHAPES = {
    "latents": (_FULL.in_channels, _FULL.sample_size, _FULL.sample_size),
    "text": (FULL_TEXT_LENGTH, _FULL.caption_channels),
    "vision": (GRID**2, Dinov2Config(**FULL_VISION_SIZES).hidden_size),
}


def check(folder: str | Path, max_repeated: float = 0.01) -> dict[str, Any]:
    """Checks a data set completely.

    Args:
        folder: of the data set.
        max_repeated: share of pictures that occur before in the set, above which that is a problem.

    Returns:
        JSON-able facts; `problems` lists in words what is wrong, `ok` says that nothing is.

    Raises:
        FileNotFoundError: when the folder holds no data set.
    """
    folder = Path(folder)
    if not 0 <= max_repeated <= 1:
        raise InvalidValue(f"max_repeated={max_repeated}: must be a share, 0 to 1")
    card, states = read_card(folder), sidecars(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # terabytes: what a disk gives, and not what a core can hash
        same = pool.map(lambda name: _same_bytes(folder, name, states[name]), states)
        checked = zip(states, tqdm(same, total=len(states), desc="checksums", disable=None), strict=True)
        differ = [name for name, fine in checked if not fine]
    lines = [{"shard": name, "row": None, "reason": "contents differ from the checksum"} for name in differ]
    damaged = {line["shard"] for line in lines}
    chunks = [chunk for chunk in open_shards(folder, card, fresh=True) if chunk.shard.name not in damaged]
    broken = {chunk.shard.name: chunk.shard for chunk in chunks if chunk.shard.reason}
    lines += [{"shard": s.name, "row": None, "reason": s.reason} for s in broken.values() if not s.passing]
    survey = _Survey(card)
    for chunk in tqdm([c for c in chunks if c.layout is not None], desc="rows", disable=None):
        try:
            lines += survey.look_at(chunk)
        except Damaged as error:
            damaged.add(chunk.shard.name)
            lines.append({"shard": chunk.shard.name, "row": None, "reason": explain(error)})
    left_out = [[name, *item] for name, state in states.items() for item in (state or {}).get("skipped", ())]
    if left_out:
        named = [dict(zip(("shard", "key", "reason", "count"), item, strict=True)) for item in left_out]
        _keep(folder / SKIPPED, named)
    _keep(folder / QUARANTINE, lines)
    facts = survey.facts() | _account(card, states)
    facts["shards"] = {
        "all": len(states) or 1,
        "quarantined": len(damaged) + sum(not shard.passing for shard in broken.values()),
        "out_of_reach": sum(shard.passing for shard in broken.values()),
    }
    facts["quarantined_rows"] = sum(line["row"] is not None for line in lines)
    facts["problems"] = _problems(facts, max_repeated)
    return {"folder": str(folder), "fingerprint": card["fingerprint"], **facts, "ok": not facts["problems"]}


def _keep(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes a report beside the data, or takes an old one away; a folder that cannot be written to keeps none."""
    try:
        if lines:
            write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: not written ({error})", stacklevel=3)


def _same_bytes(folder: Path, name: str, state: dict[str, Any] | None) -> bool:
    path = folder / SHARDS / f"{name}.arrow"
    if state is None or not state["rows"] or not path.is_file() or path.stat().st_size != state["bytes"]:
        return True  # nothing to compare; what is wrong is said when the shard is opened
    return sha256_file(path) == state["sha256"]


class _Survey:
    """What is counted while the rows go by."""

    def __init__(self, card: dict[str, Any]):
        self.channels = array_shapes(card)["latents"][0]
        self.total, self.squares, self.count = np.zeros(self.channels), np.zeros(self.channels), 0
        self.rows, self.not_finite, self.no_caption, self.captions = 0, 0, 0, 0
        self.sources: Counter[str] = Counter()
        self.pictures, self.texts = [], []  # 64-bit digests of all rows, in arrays

    def look_at(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Counts a chunk; returns the lines for the quarantine."""
        file, strings = ShardFile(chunk.shard.path), chunk.layout.strings
        arrays = {name: column.read_all(file, chunk.rows) for name, column in chunk.layout.numbers.items()}
        texts = [read_captions(strings["captions"].read(file, k)) for k in range(chunk.rows)]
        bad = {int(k): f"{name} not finite" for name, x in arrays.items() for k in np.flatnonzero(bad_rows(x))}
        silent = [k for k, captions in enumerate(texts) if not captions]
        self.rows += chunk.rows
        self.not_finite += len(bad)
        self.no_caption += len(silent)
        self.captions += sum(map(len, texts))
        if "source" in strings:
            self.sources.update(
                strings["source"].read(file, k)[0].decode("utf-8", "replace") for k in range(chunk.rows)
            )
        else:
            self.sources[""] += chunk.rows
        good = [k for k in range(chunk.rows) if k not in bad]
        latents = arrays["latents"][good].astype(np.float64).reshape(len(good), self.channels, -1)  # (B, C, h*w)
        self.total += latents.sum((0, 2))
        self.squares += np.square(latents).sum((0, 2))
        self.count += latents.shape[0] * latents.shape[2]
        self.pictures.append(_digests(row.tobytes() for row in arrays["latents"]))
        self.texts.append(_digests("\n".join(captions).encode() for captions in texts if captions))
        reasons = dict.fromkeys(silent, "no caption") | bad
        return [{"shard": chunk.shard.name, "row": chunk.first + k, "reason": r} for k, r in sorted(reasons.items())]

    def facts(self) -> dict[str, Any]:
        """The counts in words."""
        mean = self.total / max(self.count, 1)
        spread = np.sqrt(np.maximum(self.squares / max(self.count, 1) - mean**2, 0))
        return {
            "rows": self.rows,
            "captions": self.captions,
            "sources": dict(self.sources),
            "latent_mean": [round(float(x), 4) for x in mean],
            "latent_std": [round(float(x), 4) for x in spread],
            "not_finite": self.not_finite,
            "without_caption": self.no_caption,
            "repeated_pictures": _repeated(self.pictures),
            "repeated_captions": _repeated(self.texts),
        }


def _digests(rows: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows), np.uint64)


def _repeated(digests: list[np.ndarray]) -> int:
    every = np.concatenate(digests) if digests else np.empty(0)
    return len(every) - len(np.unique(every))


def _account(card: dict[str, Any], states: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What the JSON files of the shards say of items that gave no row, and of parts."""
    skipped, notes, ended = Counter(), Counter(), 0
    for state in states.values():
        for _, reason, count in (state or {}).get("skipped", ()):
            skipped[reason] += count
        notes.update((state or {}).get("notes", {}))
        ended += bool(state and state["end"])
    parts = card.get("parts")
    return {
        "skipped": dict(skipped.most_common()),
        "notes": {reason: count for reason, count in notes.items() if count},
        "parts": None if parts is None else {"all": parts, "encoded": ended},
    }


def _problems(facts: dict[str, Any], max_repeated: float) -> list[str]:
    """What is wrong, in words."""
    mean, spread = np.array(facts["latent_mean"]), np.array(facts["latent_std"])
    rows, parts, shards = facts["rows"], facts["parts"], facts["shards"]
    scaled = abs(mean.mean()) <= MEAN_LIMIT and SPREAD_LIMITS[0] <= spread.mean() <= SPREAD_LIMITS[1]
    found = {
        "there is no row that can be read": not rows,
        f"{shards['quarantined']} of {shards['all']} shards are damaged": shards["quarantined"],
        f"{shards['out_of_reach']} of {shards['all']} shards cannot be reached": shards["out_of_reach"],
        f"{facts['not_finite']} rows hold numbers that are not finite": facts["not_finite"],
        f"{facts['without_caption']} rows have no caption": facts["without_caption"],
        f"{facts['repeated_pictures']} pictures occur before": facts["repeated_pictures"] > max_repeated * rows,
        f"latents have mean {mean.mean():.2f}, spread {spread.mean():.2f}; normalised ones have 0 and 1": (
            rows and not scaled
        ),
    }
    if parts and parts["encoded"] < parts["all"]:
        found[f"{parts['encoded']} of {parts['all']} parts are encoded: run the same command again"] = True
    items = rows + sum(facts["skipped"].values())
    for reason, count in facts["skipped"].items():
        if count > MUCH * items and reason.startswith(("caption", "picture")):
            found[f"{count:,} of {items:,} items were left out: {reason}"] = True
    low, high = CHANNEL_SPREAD_LIMITS
    odd = np.flatnonzero((abs(mean) > CHANNEL_MEAN_LIMIT) | (spread < low) | (spread > high))
    if rows and len(odd):
        k = int(odd[0])
        found[f"{len(odd)} channels are far from mean 0, spread 1; first {k}: {mean[k]:.2f}, {spread[k]:.2f}"] = True
    return [text for text, holds in found.items() if holds]


# -----------------------------------------------------------------------------------------------------------
# Speed
# -----------------------------------------------------------------------------------------------------------


def measure_reading(
    columns: Sequence[str] = ("latents",),
    rows: int | None = None,
    batch: int = 256,
    seconds: float = 3.0,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Samples a second that one process reads in training order, at the shapes of the full model: cold and warm.

    A data set is written to a temporary folder first: random latents, captions of 128 words and, if named, text and
    vision features or pictures. **Cold**: the operating system is told to forget the files, then each row is read once
    at most, in turns with the same files read from end to end, which is the disk's raw speed. **Warm**: what is left in
    memory is read again, which measures the reader alone, by its processor time. Where the folder is in memory, or the
    disk has a memory of its own (a virtual one often does), cold is not quite cold.

    Args:
        columns: of "latents", "text", "vision", "pictures"; latents are always there.
        rows: size of the data set; by default what makes half a gigabyte, more than a processor keeps.
        batch: rows read at once; 256 is one GPU's share of the full batch.
        seconds: how long to measure each.
        folder: on the disk to be measured; the system's folder for temporary files when None.

    Returns:
        Samples a second, what the full run needs of a node and of one of its eight processes, and the sizes.

    Raises:
        ValueError: an unknown column, fewer rows than one batch, more than fit into memory or onto the disk, or no time
            to measure.
    """
    if not 0 < seconds < math.inf:
        raise InvalidValue(f"seconds={seconds}: must be a number above 0")
    shapes, pictures = _shapes(columns), "pictures" in columns
    size = _row_bytes(columns)
    rows = max(batch, 2**29 // size) if rows is None else rows
    known = (*FULL_SHAPES, "pictures")
    if not set(columns) <= set(known) or not 1 <= batch <= rows:
        raise InvalidValue(f"columns={columns}, batch={batch}: columns are {', '.join(known)}; batch is 1 to {rows}")
    check_room(columns, rows, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tune_cpu()  # as every training run does: memory of a batch is used again for the next
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            write_latents(Path(place) / "data", _random_rows(shapes, rows, pictures), "")
            files = sorted((Path(place) / "data" / SHARDS).glob("*.arrow"))
            stored = sum(path.stat().st_size for path in files)
            data = LatentDataset(Path(place) / "data", "")

            def steps(first: int, last: int, limit: float) -> tuple[int, float]:
                """Samples and seconds of the steps of training from `first` to `last`, or till the time is over."""
                started, count = time.perf_counter(), 0
                for step in range(first, last):
                    count += len(data.batch(batch_indices(0, rows, batch, step), images=pictures).captions)
                    if time.perf_counter() - started > limit:
                        break
                return count, time.perf_counter() - started

            cold, raw = np.zeros(2), np.zeros(2)
            turns = min(3, rows // batch)
            for turn in range(turns):
                forget(files)
                raw += read_through(files, seconds / turns)
                forget(files)
                cold += steps(turn * (rows // batch) // turns, (turn + 1) * (rows // batch) // turns, seconds / turns)
            data.batch(range(rows), images=pictures)  # every page once
            cpu = time.process_time()
            samples, wall = steps(0, 2**40, seconds)
            cpu = time.process_time() - cpu
    finally:
        torch.set_num_threads(threads)
    size, warm, read, disk = stored / rows, samples / cpu, float(cold[0] / cold[1]), float(raw[0] / raw[1])
    return {
        "columns": [*shapes, *(["pictures"] if pictures else [])],
        "rows": rows,
        "samples_per_second_per_core": round(warm, 1),
        "samples_per_second_wall": round(samples / wall, 1),
        "samples_per_second_cold": round(read, 1),
        "samples_per_second_of_the_disk": round(disk / size, 1),
        "cold_share_of_the_disk": round(read * size / disk, 3),
        "disk_gigabytes_per_second": round(disk / 1e9, 3),
        "needed_samples_per_second": NEEDED_SAMPLES_PER_SECOND,
        "needed_samples_per_second_per_process": round(NEEDED_SAMPLES_PER_SECOND / PUBLISHED_DEVICES),
        "margin": round(warm / NEEDED_SAMPLES_PER_SECOND, 2),
        "bytes_per_sample": round(size),
        "gigabytes_per_second": round(size * NEEDED_SAMPLES_PER_SECOND / 1e9, 3),
    }


def check_room(columns: Sequence[str], batch: int, folder: str | Path | None = None) -> None:
    """Refuses a measurement of `batch` rows at once that fits neither into memory nor onto the disk, before it begins.

    Raises:
        ValueError: naming what there is.
    """
    needed = batch * _row_bytes(columns)
    check_memory(f"batch={batch}", needed)
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if needed > free:
        raise InvalidValue(f"batch={batch}: needs about {needed / 1e9:,.0f} GB of the disk; {free / 1e9:,.0f} are free")


def _shapes(columns: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in FULL_SHAPES.items() if name == "latents" or name in columns}


def _row_bytes(columns: Sequence[str]) -> int:
    """Bytes of a row's numbers."""
    return sum(2 * prod(shape) for shape in _shapes(columns).values())


def forget(files: Iterable[Path]) -> None:
    """Asks the operating system to drop files from its memory, so that the disk has to read them."""
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files: Iterable[Path], limit: float) -> tuple[int, float]:
    """Bytes and seconds of reading files from end to end, or till the time is over."""
    buffer, count, started = bytearray(2**23), 0, time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                count += got
                if time.perf_counter() - started > limit:
                    return count, time.perf_counter() - started
    return count, time.perf_counter() - started


def _random_rows(
    shapes: dict[str, tuple[int, ...]], rows: int, pictures: bool = False, size: int = 64
) -> Iterator[LatentBatch]:
    generator = torch.Generator().manual_seed(0)
    stored = [to_jpeg(cloudy_picture(224, 224, seed), 224) for seed in range(8)] if pictures else None
    for first in range(0, rows, size):
        count = min(size, rows - first)
        arrays = {n: torch.randn(count, *shape, generator=generator).half() for n, shape in shapes.items()}
        captions = [
            [f"row {first + k}: " + "a caption of one hundred and twenty-six words " * 14] for k in range(count)
        ]
        jpegs = [stored[k % len(stored)] for k in range(count)] if stored else None
        yield LatentBatch(captions=captions, pictures=jpegs, **arrays)


def cloudy_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise as smooth as photographs, by the bytes that a JPEG of it takes: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # (H, W // 2 + 1)
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((3, height, width)), axes=(1, 2)) / frequency**1.5
    values = np.fft.irfft2(noise, (height, width), axes=(1, 2))  # (3, H, W)
    values = values.mean(0) + 0.3 * values  # colours go together
    return (128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def measure_decoding(folder: str | Path | None = None, seconds: float = 3.0, count: int = 8) -> dict[str, Any]:
    """Pictures a second that one core decodes and cuts to 512 px: the bottleneck of encoding.

    Args:
        folder: of JPEG files; None: made ones of 1,500 x 2,250 px, as in SA-1B.
        seconds: how long to measure.
        count: files that are taken.

    Returns:
        The speed and the mean bytes of a file.

    Raises:
        FileNotFoundError: the folder holds no JPEG.
    """
    if folder is None:
        files = [to_jpeg(cloudy_picture(1500, 2250, seed)) for seed in range(2)]
    else:
        files = [p.read_bytes() for p in itertools.islice(sorted(Path(folder).rglob("*.jp*g")), count)]
    if not files:
        raise MissingFile(f"{folder}: holds no JPEG")
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        square(files[done % len(files)], FULL_PIXELS)
        done += 1
    speed = done / (time.process_time() - cpu)
    return {
        "source": "made, 1500 x 2250" if folder is None else str(folder),
        "bytes_per_picture": round(sum(map(len, files)) / len(files)),
        "pictures_per_second_per_core": round(speed, 1),
    }
