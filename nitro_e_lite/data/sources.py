"""Raw data sets as they are downloaded: layouts on disk to pictures with captions.

Every data set comes in its own shape: a thousand tar files and ten million text files, one long list of JSON lines
beside two hundred folders, a list of prompts with no pictures at all. A *source* hides that. It names its **parts**,
independent pieces of work in a fixed order, and gives the **items** of a part from any position on. That is all that
`precompute.py` needs to share the work among processes and to carry on after a kill.

============  ==========================================================================================
kind          layout
============  ==========================================================================================
`sa1b`      `sa_*.tar` (or unpacked folders `sa_*/`) and `captions/sa_<number>.txt`
`journeydb` `data/train/train_anno_realease_repath.jsonl` beside `data/train/imgs/<000..199>/*.jpg`
`fluxdb`    a file of prompts (.txt, .jsonl, .parquet); a diffusers pipeline draws the pictures
`folder`    `captions.jsonl` with `{"file_name": ..., "text": ...}` lines beside the pictures
============  ==========================================================================================

An item is a `Record` or, where something is wrong with it, a `Problem` with the reason. Nothing is left out without
one. Source: the layouts are those that the published preparation code of Nitro-E reads.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import logging
import os
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from nitro_e_lite.data.shard_files import explain, patiently
from nitro_e_lite.errors import InvalidValue, MissingFile, Unusable
from nitro_e_lite.files import explain_json, read_json_line, read_jsonl

warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of odd files that it can read

JPEG_QUALITY = 90  # of stored pictures
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LINES = 2_000  # of a list of captions that make one part: the grain in which processes share the work
NAMED = 1_000  # pictures without a line that are reported by name
FLUX = {"height": 512, "width": 512, "num_inference_steps": 20, "guidance_scale": 3.5, "max_sequence_length": 512}
"""How the published FLUXDB was drawn with FLUX.1-dev."""
NO_CAPTION, NO_PICTURE = "caption is missing or empty", "picture is missing"
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
"""Errors of a file's name. All others are of the moment: they are waited for and then stop the work, since what they
cost would never be looked for again."""
PADDING = 2**20  # empty bytes that may follow the end of a tar file; 10,240 are usual


@dataclass(frozen=True)
class Record:
    """A picture, not decoded yet (file contents, path or PIL image), with its captions."""

    key: str
    image: bytes | Path | Image.Image
    captions: list[str]


@dataclass(frozen=True)
class Problem:
    """Why an item gives no picture.

    `cut_at`: the part ends here too early; what `Source.stamp` said of its file, which is read on when that changes.
    """

    key: str
    reason: str
    cut_at: list[int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "key", _printable(self.key))


# -----------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: turned as its EXIF entry says, transparent parts over white, the first frame only."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which Pillow would cut off at 255
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.max() > 65535:
            raise InvalidValue("picture holds numbers that are not finite, or beyond 16 bits")
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        top = 1.0 if image.mode == "F" and values.max() <= 1 else top
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image: bytes | Path | Image.Image, size: int) -> np.ndarray:
    """A picture as training sees it: centre crop, shorter side resized to `size` (bicubic).

    Returns:
        uint8 (size, size, 3).

    Raises:
        ValueError: a file that is no picture, is cut short, or has a side below half of `size`.
        RuntimeError: it cannot be read just now.
    """
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image if isinstance(image, bytes) else read_now(image)))
        if min(image.size) >= size // 2:
            return np.asarray(ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC))
        reason = f"picture is smaller than {size // 2} px"
    except FileNotFoundError:
        reason = NO_PICTURE
    except (Unusable, MemoryError):
        raise
    except InvalidValue as error:
        reason = str(error)
    except Exception as error:  # Pillow's readers raise many kinds on damaged files; each costs one picture
        reason = f"picture cannot be read ({type(error).__name__})"
    raise InvalidValue(reason)


def read_now(path: Path) -> bytes:
    """What a file holds; errors of the moment are waited for.

    Raises:
        OSError: there is no such file.
        RuntimeError: it cannot be read just now.
    """

    def read() -> bytes | OSError:
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno in LASTING:
                return error
            raise

    try:
        found = patiently(read)
    except OSError as error:
        raise Unusable(f"{path}: cannot be read ({explain(error)}); make it readable and start again") from None
    if isinstance(found, OSError):
        raise found
    return found


def to_jpeg(pixels: np.ndarray, size: int | None = None) -> bytes:
    """Pixels uint8 (H, W, 3) as a JPEG, of `size` a side if given; colours at full resolution."""
    buffer, picture = io.BytesIO(), Image.fromarray(pixels)
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


# -----------------------------------------------------------------------------------------------------------
# Layouts
# -----------------------------------------------------------------------------------------------------------


class Source:
    """A raw data set. Subclasses give `kind`, `folders`, `parts` and `items`.

    Attributes:
        folders: those that its files lie in.
    """

    kind: str
    folders: Sequence[Path] = ()

    def parts(self) -> list[str]:
        """Names of independent pieces of work, in the order of the data set."""
        raise NotImplementedError

    def share(self, rank: int, world: int) -> list[str]:
        """The parts of process `rank` of `world`."""
        return self.parts()[rank::world]

    def items(self, part: str, start: int = 0) -> Iterator[Record | Problem]:
        """The items of a part from number `start` on; always the same ones in the same order."""
        raise NotImplementedError

    def stamp(self, part: str) -> list[int] | None:
        """Bytes and time of the part's file where it may still change: a download that goes on; None elsewhere."""
        return None

    def check_there(self) -> None:
        """Looks whether the data set itself is still there; asked where one of its files is missing.

        Raises:
            RuntimeError: a folder is gone or empty, as when its disk is away.
        """
        for folder in self.folders:
            try:
                with os.scandir(folder) as entries:
                    there = next(entries, None) is not None
            except OSError:
                there = False
            if not there:
                raise Unusable(f"{folder}: is gone or empty; is its disk there? Nothing of it is left out, start again")

    def describe(self) -> dict[str, Any]:
        """Facts for the data set's card; a run that resumes must find the same."""
        return {"source": self.kind}


def record(key: str, image: bytes | Path | Image.Image, captions: Any) -> Record | Problem:
    """A record, or a problem where `captions` (a text or a list of texts) is missing, empty or something else."""
    texts = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    whole = [text for text in texts if _printable(text) == text]
    if whole:
        return Record(_printable(key), image, whole)
    return Problem(key, "caption is no valid Unicode" if texts else NO_CAPTION)


def _printable(text: str) -> str:
    r"""The text with what no file can hold spelled out as `\ud83d`.

    That is halves of surrogate pairs, which JSON allows, and bytes of a file's name that are not UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class SA1B(Source):
    """Tar files of SA-1B as Meta serves them, captions of SAM-LLaVA-Captions10M unpacked into `captions`.

    Tar files may also be unpacked, a folder each. Masks are skipped over. A part is a tar file.

    Args:
        path: folder with `sa_*.tar` or `sa_*/`.
        captions: folder with `sa_<number>.txt`; `path/captions` when None.

    Raises:
        FileNotFoundError: no tar files or no captions there.
    """

    kind = "sa1b"

    def __init__(self, path: str | Path, captions: str | Path | None = None):
        self.path, self.captions = Path(path), Path(captions or Path(path) / "captions")
        self._parts = {p.stem: p for p in sorted(self.path.glob("sa_*")) if p.suffix == ".tar" or p.is_dir()}
        if not self._parts:
            raise MissingFile(f"{path}: no sa_*.tar and no folders sa_*; see data_cards/sa1b.md")
        if not self.captions.is_dir():
            raise MissingFile(f"{self.captions}: unpack SA1B_caption.tar.gz here; see data_cards/sa1b.md")
        inside = [p for p in itertools.islice(self.captions.iterdir(), 2)]
        if len(inside) == 1 and inside[0].is_dir():  # the archive packed its folder too
            self.captions = inside[0]
        self.folders = (self.path, self.captions)

    def parts(self) -> list[str]:
        return list(self._parts)

    def share(self, rank: int, world: int) -> list[str]:
        """By name: more files may arrive while processes start, and each of these must find the same owner."""
        number = {part: int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest()) for part in self._parts}
        return [part for part in self._parts if number[part] % world == rank]

    def items(self, part: str, start: int = 0) -> Iterator[Record | Problem]:
        path = self._parts[part]
        if path.is_dir():
            for file in sorted(path.rglob("*.jpg"))[start:]:
                yield self._with_caption(file.stem, file)
            return
        stamp = self.stamp(part)  # now: a download may add to the file while it is read
        for key, picture in _pictures(path, start, stamp[0]):
            if picture is None:
                return
            yield self._with_caption(key, picture)
            start += 1
        reason = "tar file was cut short or damaged; get it again"
        yield Problem(f"{path.name} after {start} pictures", reason, cut_at=stamp)

    def stamp(self, part: str) -> list[int] | None:
        path = self._parts[part]
        if not path.is_file():
            return None
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]

    def _with_caption(self, key: str, image: bytes | Path) -> Record | Problem:
        try:
            return record(key, image, (self.captions / f"{key}.txt").read_text(encoding="utf-8-sig"))
        except (FileNotFoundError, IsADirectoryError):
            return Problem(key, NO_CAPTION)
        except ValueError:
            return Problem(key, "caption is not UTF-8")


def _pictures(path: Path, start: int, size: int) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of each picture of a tar file of `size` bytes from number `start` on, as far as they go.

    A file that is whole ends with ("", None). Two empty blocks and some padding end a tar file; the same bytes at the
    end of a longer hole, which a download leaves that takes its room beforehand, do not. Nor does a damaged header,
    at which `tarfile` stops without a word. A picture is given when what follows it is sound: before a hole it may have
    one too.
    """
    number, held = 0, None
    with contextlib.suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            if held:
                yield held
                held = None
            if member.offset_data + member.size > size:
                return
            if member.isfile() and member.name.endswith(".jpg"):
                if number >= start:
                    held = PurePosixPath(member.name).stem, tar.extractfile(member).read()
                number += 1
        left = size - tar.offset
        tar.fileobj.seek(tar.offset)
        if 1024 <= left <= 1024 + PADDING and not any(tar.fileobj.read(left)):
            if held:
                yield held
            yield "", None


class JsonLines(Source):
    """A file with one JSON object a line, by the rules of `files.read_jsonl`.

    A part is `LINES` lines, found by its place in the file. Here a line that cannot be read costs one item.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds one JSON list instead of lines, or no JSON object at all.
    """

    names: tuple[str, ...]

    def __init__(self, path: str | Path):
        self.file = self._find(Path(path))
        self._offsets, self._lines, offset, texts, objects = [], 0, 0, 0, 0
        digest = hashlib.blake2b(digest_size=8)
        with open(self.file, "rb") as file:
            for line in file:
                text = (line if self._lines else line.removeprefix(codecs.BOM_UTF8)).strip()
                if not self._lines and text.startswith(b"["):
                    raise InvalidValue(f"{self.file}: is one JSON list; must hold one JSON object a line")
                if self._lines % LINES == 0:
                    self._offsets.append(offset)
                digest.update(line)
                offset += len(line)
                texts, objects = texts + bool(text), objects + text.startswith(b"{")
                self._lines += 1
        if texts and not objects:  # a picture, for example
            raise InvalidValue(f"{self.file}: holds no JSON object; must hold one a line")
        self._digest = digest.hexdigest()

    def _find(self, path: Path) -> Path:
        for candidate in (path, *(path / name for name in self.names)):
            if candidate.is_file():
                return candidate
        raise MissingFile(f"{path}: holds none of {', '.join(self.names)}; see the data card of {self.kind!r}")

    def parts(self) -> list[str]:
        return [f"lines-{k * LINES:09d}" for k in range(len(self._offsets))]

    def describe(self) -> dict[str, Any]:
        return {"source": self.kind, "lines": self._lines, "digest": self._digest}

    def items(self, part: str, start: int = 0) -> Iterator[Record | Problem]:
        first = int(part.removeprefix("lines-"))
        with open(self.file, "rb") as file:
            file.seek(self._offsets[first // LINES])
            lines = enumerate(itertools.islice(file, LINES), start=first + 1)
            told = ((number, line) for number, line in lines if line.strip() not in (b"", codecs.BOM_UTF8))
            for number, line in itertools.islice(told, start, None):
                yield self._item(number, line)

    def _item(self, number: int, line: bytes) -> Record | Problem:
        try:
            return self.read(read_json_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line) or {})
        except UnicodeDecodeError:
            reason = "line is not UTF-8"
        except ValueError:
            reason = "line is no JSON object"
        return Problem(f"{self.file.name}, line {number}", reason)

    def read(self, entry: dict[str, Any]) -> Record | Problem:
        """One line to an item."""
        raise NotImplementedError

    @staticmethod
    def inside(name: Any) -> PurePosixPath | None:
        """A relative path that stays in its folder, or None."""
        if not isinstance(name, str) or not name or "\0" in name:
            return None
        path, elsewhere = PurePosixPath(name), PureWindowsPath(name)  # on Windows, backslashes and drives lead out too
        leads_out = path.is_absolute() or elsewhere.drive or elsewhere.root or ".." in elsewhere.parts
        return None if leads_out or not path.parts else path


class JourneyDB(JsonLines):
    """JourneyDB as its hub repository unpacks: a list of lines beside one folder for each archive of pictures.

    The caption is the prompt, as in the published preparation. Archives that were not downloaded cost one count each.
    """

    kind = "journeydb"
    names = tuple(
        f"{folder}{name}"
        for folder in ("", "train/", "data/train/")
        for name in ("train_anno_realease_repath.jsonl", "train_anno.jsonl", "valid_anno_repath.jsonl")
    )

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.images = self.file.parent / "imgs"
        self.folders = (self.images,)
        self._archives = {p.name for p in self.images.iterdir() if p.is_dir()} if self.images.is_dir() else set()
        if not self._archives:
            raise MissingFile(f"{self.images}: no folders of pictures; unpack 000.tgz and others here")

    def read(self, entry: dict[str, Any]) -> Record | Problem:
        path = self.inside(entry.get("img_path"))
        if path is None:
            return Problem(str(entry.get("img_path")), "img_path is missing or leads out of the folder")
        if path.parts[0] not in self._archives:
            return Problem(f"archive {path.parts[0]}", "archive was not downloaded")
        return record(str(path), self.images / path, entry.get("prompt"))


class Folder(JsonLines):
    """Your own pictures: a folder with `captions.jsonl` (or `metadata.jsonl`, as Hugging Face names it).

    A line is `{"file_name": "a.jpg", "text": "..."}`; `captions` with a list in place of `text` gives several. A name
    may be spelled as another system does: é as one character or as two, folders with a backslash between them.
    """

    kind = "folder"
    names = ("captions.jsonl", "metadata.jsonl")

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.folders = (self.file.parent,)
        self._spellings = functools.lru_cache(16)(self._look_into)  # folders, one after the other as lines have them

    def parts(self) -> list[str]:
        """As of any list, and one more for pictures without a line."""
        return [*super().parts(), "unlisted"]

    def items(self, part: str, start: int = 0) -> Iterator[Record | Problem]:
        if part != "unlisted":
            yield from super().items(part, start)
            return
        yield from itertools.islice(self._unlisted(), start, None)

    def _unlisted(self) -> Iterator[Problem]:
        """Pictures without a line: the first by name, the others as a number."""
        named, reason = self._named(), f"no line in {self.file.name} names this picture"
        count = 0
        for folder, folders, files in os.walk(self.file.parent):
            folders.sort()
            place = PurePosixPath(Path(folder).relative_to(self.file.parent).as_posix())
            pictures = [str(place / name) for name in sorted(files) if PurePosixPath(name).suffix.lower() in PICTURES]
            missing = ~np.isin(np.array([hash(_plain_name(name)) for name in pictures], np.int64), named)
            for k in np.flatnonzero(missing):
                count += 1
                yield Problem(pictures[k] if count <= NAMED else "others", reason)

    def _named(self) -> np.ndarray:
        """What the lines name, as hashes of the plain names, sorted: of millions of names 8 bytes each."""
        with open(self.file, "rb") as file:
            entries = (self._entry(number, line) for number, line in enumerate(file, start=1))
            names = (self.inside(self._name(entry)) for entry in entries if entry)
            return np.unique(np.fromiter((hash(_plain_name(str(name))) for name in names if name), np.int64))

    @staticmethod
    def _entry(number: int, line: bytes) -> dict[str, Any] | None:
        try:
            return read_json_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except ValueError:
            return None

    @staticmethod
    def _name(entry: dict[str, Any]) -> Any:
        return next((entry[field] for field in ("file_name", "image") if entry.get(field) is not None), None)

    def _look_into(self, folder: PurePosixPath) -> dict[str, str]:
        """The names in a folder by their plain spelling."""
        with contextlib.suppress(OSError), os.scandir(self.file.parent / folder) as entries:
            return {_plain_name(entry.name): entry.name for entry in entries}
        return {}

    def _spelled(self, path: PurePosixPath) -> PurePosixPath:
        """The file that `path` means, as its folders spell it; `path` itself where there is none."""
        found = PurePosixPath()
        for part in PurePosixPath(_plain_name(str(path))).parts:
            if (name := self._spellings(found).get(part)) is None:
                return path
            found /= name
        return found

    def read(self, entry: dict[str, Any]) -> Record | Problem:
        name = self._name(entry)
        path = self.inside(name)
        if path is None:
            return Problem(str(name), "file_name is missing or leads out of the folder")
        fields = ("text", "caption", "captions")
        texts = next((entry[field] for field in fields if entry.get(field) is not None), None)
        if not os.path.isfile(self.file.parent / path):  # False for a name that is too long, too
            path = self._spelled(path)
        return record(str(path), self.file.parent / path, texts)


def _plain_name(name: str) -> str:
    """A file's name in the one spelling by which names of several systems are compared."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def read_prompts(path: str | Path, column: str | None = None) -> Sequence[str]:
    """A list of prompts. One that is missing is None or ""; whoever draws leaves it out and counts it.

    Args:
        path: `.txt` (a prompt a line), `.jsonl` (field `prompt`) or `.parquet`, or a folder of one of them,
            which are read in the order of their names.
        column: field that holds the prompt; None finds `prompt`, `re_caption`, `caption` or `text`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, several kinds in a folder, no such column, no prompt, or a line that cannot be
            read; the message names file and line.
    """
    path, kinds = Path(path), (".txt", ".jsonl", ".parquet")
    files = sorted(p for p in path.iterdir() if p.suffix in kinds) if path.is_dir() else [path]
    found = {file.suffix for file in files}
    if len(found) != 1 or not found <= set(kinds):
        raise InvalidValue(
            f"path={str(path)!r}: must be a file that ends in {', '.join(kinds)}, or a folder of one kind"
        )
    if not path.exists():
        raise MissingFile(f"{path}: no such file of prompts")
    columns = [column] if column else ["prompt", "re_caption", "caption", "text"]
    if found == {".parquet"}:
        return _parquet_column(path, files, columns)
    read = {".txt": _text_lines, ".jsonl": functools.partial(_json_lines, columns=columns)}[found.pop()]
    prompts = [prompt for file in files for prompt in read(file)]
    if not any(prompt and prompt.strip() for prompt in prompts):
        raise InvalidValue(f"{path}: holds no prompts")
    return prompts


def _text_lines(file: Path) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InvalidValue(f"{file}, line {number}: {explain_json(error)}") from None


def _json_lines(file: Path, columns: Sequence[str]) -> Iterator[str | None]:
    fields: set[str] = set()

    def prompt(row: dict[str, Any]) -> str | None:
        fields.update(row)
        name = next((name for name in columns if name in fields), None)
        value = row.get(name)
        if not isinstance(value, str | None):
            raise InvalidValue(f"{name}={value!r}: must be a text")
        if value is not None and _printable(value) != value:
            raise InvalidValue(f"{name} is no valid Unicode: {_printable(value)}")
        return value

    yield from read_jsonl(file, torn_last_line="counts", parse=prompt)
    if fields and not fields & set(columns):
        raise InvalidValue(f"column: {file} has {', '.join(fields)}, none of {', '.join(columns)}")


def _parquet_column(path: Path, files: Sequence[Path], columns: Sequence[str]) -> Sequence[str]:
    """Read from disk as it is asked for."""
    import datasets  # takes most of a second, and every training would wait for it

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it would say is the error below
    try:
        rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # Arrow and `datasets` raise many kinds on a damaged file
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidValue(f"{path}: cannot be read ({reason})") from None
    column = next((name for name in columns if name in rows.column_names), None)
    if column is None:
        raise InvalidValue(f"column: {path} has {', '.join(rows.column_names)}, none of {', '.join(columns)}")
    if getattr(rows.features[column], "dtype", "") not in ("string", "large_string"):
        raise InvalidValue(f"{path}: column {column} holds {rows.features[column]}, no texts")
    return rows[column]


class Prompts(Source):
    """Pictures drawn from a list of prompts: how FLUXDB was made. The prompt is the caption.

    The picture of a prompt depends on the prompt's number and `seed` alone, not on the batch or the process.

    Args:
        prompts: the list, or where `read_prompts` finds it.
        pipeline: any diffusers text-to-image pipeline, ready on its device.
        settings: arguments of its call; `FLUX` for FLUX.1-dev.
        column: field that holds the prompt; None finds `prompt`, `re_caption`, `caption` or `text`.
        batch: prompts drawn at once.
        seed: of the noise.
        generator: name of the pipeline's weights, for the card.

    Raises:
        ValueError: see `read_prompts`.
    """

    kind = "fluxdb"

    def __init__(
        self,
        prompts: str | Path | Sequence[str],
        pipeline: Callable[..., Any],
        settings: dict[str, Any],
        column: str | None = None,
        batch: int = 8,
        seed: int = 0,
        generator: str = "",
    ):
        self._prompts = read_prompts(prompts, column) if isinstance(prompts, str | Path) else prompts
        self._pipeline, self._settings, self._batch, self._seed = pipeline, settings, batch, seed
        self._generator = generator
        digests = b"".join(
            hashlib.blake2b(_printable(str(text)).encode(), digest_size=8).digest() for text in self._prompts
        )
        self._digest = hashlib.blake2b(digests, digest_size=8).hexdigest()
        self._first = np.zeros(len(self._prompts), bool)  # whether a prompt occurs for the first time
        self._first[np.unique(np.frombuffer(digests, np.uint64), return_index=True)[1]] = True

    def parts(self) -> list[str]:
        return [f"prompts-{first:09d}" for first in range(0, len(self._prompts), LINES)]

    def describe(self) -> dict[str, Any]:
        drawn = {"pipeline": type(self._pipeline).__name__, "settings": self._settings, "seed": self._seed}
        told = {"prompts": len(self._prompts), "digest": self._digest, "generator": self._generator}
        return {"source": self.kind, **told, **drawn}

    def items(self, part: str, start: int = 0) -> Iterator[Record | Problem]:
        first = int(part.removeprefix("prompts-"))
        end = min(first + LINES, len(self._prompts))
        for begin in range(first + start, end, self._batch):
            chunk = range(begin, min(begin + self._batch, end))
            drawn = [n for n in chunk if self._first[n] and self._prompts[n] and self._prompts[n].strip()]
            images = dict(zip(drawn, self._draw(drawn), strict=True))
            for n in chunk:
                yield self._item(n, images.get(n))

    def _draw(self, numbers: list[int]) -> list[Image.Image]:
        if not numbers:
            return []
        generators = [torch.Generator().manual_seed(self._seed * 1_000_003 + n) for n in numbers]
        return self._pipeline([self._prompts[n] for n in numbers], generator=generators, **self._settings).images

    def try_settings(self) -> None:
        """Draws the first prompt, in one step where that is possible, so that a wrong setting is found before any work.

        Raises:
            ValueError: the pipeline cannot draw with the settings, or does not give one picture for a prompt.
        """
        number = next((n for n, text in enumerate(self._prompts) if text and text.strip()), None)
        if number is None:
            return
        settings, whole = dict(self._settings), self._settings
        if type(steps := settings.get("num_inference_steps")) is int and steps > 1 and "sigmas" not in settings:
            settings["num_inference_steps"] = 1
        try:
            self._settings = settings
            images = self._draw([number])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # pipelines raise many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidValue(f"draw: {type(self._pipeline).__name__} refuses its settings: {reason}") from None
        finally:
            self._settings = whole
        if not (isinstance(images, list) and len(images) == 1 and isinstance(images[0], Image.Image)):
            raise InvalidValue(f"draw: with {self._settings} one prompt does not give one picture")

    def _item(self, number: int, image: Image.Image | None) -> Record | Problem:
        key = f"prompt {number}"
        if image is None:
            return Problem(key, "prompt is missing or empty" if self._first[number] else "prompt was there before")
        if len(set(image.convert("L").getextrema())) == 1:
            return Problem(key, "picture of one colour: the pipeline's numbers overflowed")
        return record(key, image, self._prompts[number])
