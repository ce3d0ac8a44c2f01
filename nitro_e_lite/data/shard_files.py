"""The bytes of one shard: Arrow says once where everything lies, plain reads fetch it row by row.

A file that is mapped into memory is comfortable, but each page that is not there costs a fault, one thread waits for
them one by one, and a file that somebody cuts short ends the process by SIGBUS without a word. So a file is mapped only
while its layout is read. After that a row is a few `pread` calls, which several threads make at once and which can fail
like any other call:

* **Damage** (`Damaged`): the bytes are not what was written. Trying again is of no use; it is remembered.
* **A passing error** (no memory, no permission, a file server that is away): tried again after `PAUSES`, then named. It
  is never remembered.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from nitro_e_lite.errors import InvalidValue

try:
    import resource
except ImportError:  # Windows
    resource = None

T = TypeVar("T")

PAUSES = (0.2, 1.0, 5.0)  # seconds between the attempts at something that may pass
FLOAT16, INT32 = 2, 4  # bytes


class Damaged(InvalidValue):
    """A shard does not hold what was written into it."""


class CutShort(Damaged):
    """Its end is missing."""


def is_passing(error: Exception) -> bool:
    """Whether an error is of the machine and not of the file; Arrow's own `OSError`s have no number."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno is not None


def patiently(action: Callable[[], T], pauses: tuple[float, ...] | None = None) -> T:
    """What `action` returns; errors that may pass are waited for."""
    for pause in PAUSES if pauses is None else pauses:
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
        time.sleep(pause)
    return action()


def explain(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


class ShardFile:
    """A file that several threads read at once, each from where it likes."""

    def __init__(self, path: Path):
        self._path, self._file, self._turn = path, open(path, "rb", buffering=0), threading.Lock()
        if hasattr(os, "posix_fadvise"):  # rows lie anywhere: what comes after one is not read along
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, place: Any, offset: int) -> None:
        """Fills a writable buffer with the bytes from `offset` on.

        Raises:
            ValueError: the file ends before.
        """
        left = memoryview(place).cast("B")
        while len(left):
            count = self._read_some(left, offset)
            if not count:
                end = os.fstat(self._file.fileno()).st_size
                raise CutShort(f"{self._path.name} was cut short: it ends at byte {end}")
            left, offset = left[count:], offset + count

    def _read_some(self, place: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [place], offset)
        with self._turn:  # Windows: one reader at a time
            self._file.seek(offset)
            return self._file.readinto(place)

    def read(self, offset: int, size: int) -> bytearray:
        """The same, as new bytes."""
        found = bytearray(size)
        self.read_into(found, offset)
        return found


@dataclass(frozen=True)
class Numbers:
    """A column of float16 arrays: row k has `width` numbers and begins at byte `offset + k * width * 2`."""

    offset: int
    width: int

    def read_into(self, file: ShardFile, row: int, place: np.ndarray) -> None:
        """Fills `place` (width,) with one row."""
        file.read_into(place, self.offset + row * self.width * FLOAT16)

    def read_all(self, file: ShardFile, rows: int) -> np.ndarray:
        """All rows (rows, width)."""
        found = np.empty((rows, self.width), np.float16)
        file.read_into(found, self.offset)
        return found


@dataclass(frozen=True)
class Strings:
    """A column of strings or bytes, or of lists of them.

    Arrow keeps where each row begins in one array, or two for lists. They are read on first use and kept: 8 bytes a
    row, and about 4 KB for each piece of `WRITE_BYTES` that a writer gathered. With text and vision features a piece
    has 143 rows: 0.7 GB a process for 25 million.

    Attributes:
        bounds: offset and number of the int32 values of each such array, the outermost first.
        data: offset and size of the characters of all rows.
    """

    bounds: tuple[tuple[int, int], ...]
    data: tuple[int, int]
    _kept: list[np.ndarray] = field(default_factory=list, compare=False)

    def read(self, file: ShardFile, row: int) -> list[bytes]:
        """The strings of one row: one, or as many as its list has.

        Raises:
            ValueError: the bounds lead nowhere.
        """
        if not self._kept:
            self._kept[:] = [np.frombuffer(file.read(at, n * INT32), np.int32) for at, n in self.bounds]
        *lists, ends = self._kept
        first, last = lists[0][row : row + 2].tolist() if lists else (row, row + 1)
        cuts = ends[first : last + 1].tolist() if 0 <= first <= last < len(ends) else [-1]
        if cuts != sorted(cuts) or cuts[0] < 0 or cuts[-1] > self.data[1]:
            raise Damaged("the bounds of its strings are damaged")
        found = bytes(file.read(self.data[0] + cuts[0], cuts[-1] - cuts[0]))
        return [found[a - cuts[0] : b - cuts[0]] for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Layout:
    """Where the columns of some consecutive rows of one file lie."""

    rows: int
    numbers: dict[str, Numbers]
    strings: dict[str, Strings]


def find_layouts(path: Path, shapes: dict[str, tuple[int, ...]]) -> list[Layout]:
    """The record batches of an Arrow file, without one of their rows being read.

    Args:
        path: of the file.
        shapes: of one row of each column of numbers.

    Raises:
        ValueError, OSError: Arrow cannot read it, or the columns are not as `shapes` says.
    """
    try:
        with pa.memory_map(str(path)) as file:
            start = file.read_buffer().address
            file.seek(0)
            return [_layout(batch, start, shapes) for batch in pa.ipc.open_stream(file)]
    except pa.ArrowInvalid as error:
        raise Damaged(explain(error)) from None


def _layout(batch: pa.RecordBatch, start: int, shapes: dict[str, tuple[int, ...]]) -> Layout:
    numbers, strings = {}, {}
    for name, shape in shapes.items():
        column, width = batch.column(name), prod(shape)
        if getattr(column.type, "list_size", None) != width or column.null_count:
            raise Damaged(f"{name}: {column.type}, {column.null_count} empty rows; expected {width} numbers a row")
        if column.values.type != pa.float16() or column.values.null_count:
            raise Damaged(f"{name}: {column.type}; expected numbers of type float16 and none empty")
        numbers[name] = Numbers(_place(column.values.buffers()[1], start, len(batch) * width * FLOAT16), width)
    needed = {"captions", "key"} if "states" in shapes else {"captions"}
    for name in needed | ({"source", "key", "picture"} & {*batch.schema.names}):
        column = batch.column(name)
        buffers, bounds = column.buffers(), []
        if pa.types.is_list(column.type):
            bounds.append((_place(buffers[1], start, (len(column) + 1) * INT32), len(column) + 1))
            buffers, column = buffers[2:], column.values
        if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
            raise Damaged(f"{name}: {column.type}; expected strings or bytes")
        bounds.append((_place(buffers[1], start, (len(column) + 1) * INT32), len(column) + 1))
        data = buffers[2]
        strings[name] = Strings(tuple(bounds), (data.address - start, data.size) if data else (0, 0))
    return Layout(len(batch), numbers, strings)


def _place(buffer: pa.Buffer, start: int, size: int) -> int:
    """Where a buffer begins in its file; a damaged one may be smaller than its rows need."""
    if buffer is None or buffer.size < size:
        raise Damaged(f"{buffer.size if buffer else 0} of {size} bytes of a column are there")
    return buffer.address - start


def files_to_keep_open() -> int:
    """Files that a data set may keep open: half of what this process may."""
    if resource is None:
        return 256
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**16 if limit == resource.RLIM_INFINITY else limit // 2
