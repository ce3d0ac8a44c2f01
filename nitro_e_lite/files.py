"""Where things live on disk, and how files are read and written so that a kill leaves them whole.

The rule for anything that matters: written aside, flushed to the disk, renamed into place. Nothing here imports torch.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from nitro_e_lite.errors import FileThere, InvalidValue, MissingFile, NotWritten, Unusable, UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file whole or not at all, also when the machine goes down; makes its folder.

    Raises:
        OSError: it could not be written, for example because the disk is full; what was there before is intact.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe, which nothing can take the place of
            path.write_bytes(content)
            return
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise NotWritten(f"{path}: could not be written ({error.strerror or error})") from error


def check_output(path: Path, kind: Literal["file", "folder"]) -> None:
    """Refuses a place that cannot be written to, before hours of work are lost there. It is left as it was.

    Args:
        path: what will be written; it and its folders may be missing.
        kind: what it will be.

    Raises:
        OSError: something else is there or in the way, or the system does not allow it.
    """
    try:
        path.lstat()  # a name that is too long is found out here
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise NotWritten(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None
    if path.exists() and path.is_dir() == (kind == "file"):
        raise NotWritten(f"{path}: is a {'folder; name a file' if kind == 'file' else 'file; name a folder'}")
    place = path if kind == "folder" or path.exists() else path.parent
    while not os.path.lexists(place):
        place = place.parent
    try:
        if place == path and kind == "file":
            open(path, "ab").close()
        else:
            tempfile.TemporaryFile(dir=place).close()
    except NotADirectoryError:
        raise NotWritten(f"{path}: cannot be written ({place} is a file)") from None
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written ({error.strerror or error})") from None


def check_replaceable(folder: Path, mark: str) -> None:
    """Refuses to put a folder in the place of one with somebody's work: what may be replaced holds the file `mark`.

    Raises:
        FileExistsError: it holds other things.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise FileThere(f"{folder}: holds other things, which would be lost; name another folder")


PACKAGE_DIR = Path(__file__).resolve().parent
MANIFEST = "SHA256SUMS"
WINDOWS = os.name == "nt"


# Names of models made from "lite", and the stages that make them.
STUDENTS = {"lite-4step": "distill", "lite-sprint": "sprint", "lite-grpo": "rewards"}
BEST, BEST_STEPS = "lite-4step", 10  # as many as its teacher takes: better than in the 4 it learned


def weights_dir() -> Path:
    """Folder of the weights shipped inside the package."""
    return PACKAGE_DIR / "weights"


def best_shipped(steps: int | None = None) -> tuple[str, int | None]:
    """The model that draws when none is named, and in how many steps: those given, else `BEST_STEPS`."""
    if (weights_dir() / BEST / MANIFEST).is_file():
        return BEST, BEST_STEPS if steps is None else steps
    return "lite", steps


def find_weights(source: str | Path, *parts: str) -> Path:
    """The folder that holds weights: the one answer to where they are. What lies there agrees with its checksums.

    Args:
        source: a name of weights shipped in the package, a folder, or the folder of a training run, of which `final/`
            counts as well.
        *parts: files by which the right folder is known, patterns of `glob` such as "vision/model*.safetensors". The
            first that is found in `source` counts, and the folder in which it lies is returned, its checksums compared
            when `SHA256SUMS` lies in it or beside it. None: the folder of `source` as it is.

    Raises:
        FileNotFoundError: there is no such folder or none of the files in it; the message says what was looked for.
        ValueError: a file differs from its checksum, or one with a checksum is missing.
    """
    shipped = sorted(path.name for path in weights_dir().glob("*") if path.is_dir())
    name = str(source)
    root = weights_dir() / name if name in shipped else Path(source)
    roots = [root, root / "final"]  # a student is shipped as its run
    if not parts and root.is_dir():
        return roots[0]
    for file in (file for root in roots if root.is_dir() for part in parts for file in sorted(root.glob(part))):
        check_weights(file.parent)
        return file.parent
    looked_for = f" that holds {' or '.join(parts)}" if parts else ""
    models = [one for one in shipped if one in STUDENTS or (weights_dir() / one / "model_index.json").is_file()]
    known = ", ".join(models) or "none here"
    if name in STUDENTS and name not in shipped:
        raise MissingFile(
            f"{name!r}: this model is not among the shipped weights ({known}) yet; train "
            f"it (nitro-e train {STUDENTS[name]}) and name the folder of the run"
        )
    if name in shipped:
        raise MissingFile(f"{name!r} is no name of shipped weights{looked_for}")
    raise MissingFile(f"{name!r} is no folder or training run{looked_for}, and no shipped weights ({known})")


def check_weights(folder: Path) -> None:
    """Compares a folder with the `SHA256SUMS` in it and beside it, where there are any.

    Raises:
        ValueError: a file is missing or differs; not `FileNotFoundError`, which says that there are no weights at all.
    """
    try:
        if (folder / MANIFEST).is_file():
            check_manifest(folder)
        if (folder.parent / MANIFEST).is_file():
            check_manifest(folder.parent, folder.name)
    except FileNotFoundError as error:
        raise InvalidValue(str(error)) from None


def cache_dir() -> Path:
    """Folder for what can be made again (latent caches); `NITRO_E_CACHE` moves it. Not created here.

    A user without a home, as containers have, keeps it in the folder for temporary files.
    """
    if own := os.environ.get("NITRO_E_CACHE"):
        return Path(own)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        base = tempfile.gettempdir()
    return Path(base) / "nitro-e-lite"


def repo_root() -> Path | None:
    """The checkout this package runs from, or None when it is installed elsewhere."""
    root = PACKAGE_DIR.parent
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> Path:
    """Writes `SHA256SUMS` (the format of `sha256sum`) for every file below `folder` and returns its path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    lines = [f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    path = folder / MANIFEST
    write_atomically(path, "".join(lines))
    return path


def check_manifest(folder: str | Path, *parts: str) -> dict[str, str]:
    """Compares the files named in `folder/SHA256SUMS` with their checksums.

    Args:
        folder: holds the manifest.
        *parts: names of files and folders in it; only they are compared. All when none is given.

    Returns:
        Relative path -> sha256.

    Raises:
        FileNotFoundError: the manifest, or a file it names, is missing.
        ValueError: a file's contents differ, or a line cannot be read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFile(f"{path}: checksum file is missing")
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="backslashreplace").splitlines():
        digest, name = line[:64], line[66:]
        separator = line[64:66] in ("  ", " *")  # `sha256sum` marks files that it read as binary
        if not separator or not name or "\0" in name:
            if parts:  # another program's checksums beside a model are not about it
                continue
            raise InvalidValue(f"{path}: cannot read the line {line!r}; expected '<sha256>  <file>'")
        if parts and name.split("/")[0] not in parts:
            continue
        if not os.path.isfile(folder / name):  # False for a name that is too long, too
            raise MissingFile(f"{folder / name}: listed in {MANIFEST} but missing; get the folder again")
        if sha256_file(folder / name) != digest:
            raise InvalidValue(f"{folder / name}: contents differ from {MANIFEST}; get the file again")
        sums[name] = digest
    return sums


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        ValueError: it is in another encoding; the message names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{path}: {explain_json(error)}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object that is all of a file.

    Raises:
        ValueError: it holds something else; the message names the file.
    """
    try:
        found = read_json_line(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise InvalidValue(f"{path}: {explain_json(error)}") from None
    if found is None:
        raise InvalidValue(f"{path}: is empty; must hold a JSON object")
    return found


def read_run(path: str | Path) -> dict[str, Any]:
    """What the `config.json` of a training run says of it: `config` are its settings. Nothing where there is none.

    Raises:
        ValueError: it holds something else; the message names the file.
    """
    about = read_json(path) if Path(path).is_file() else {}
    if not isinstance(about.get("config") or {}, dict):
        raise InvalidValue(f"{path}: config={about['config']!r:.80}: must be a JSON object")
    return about


def read_jsonl(
    path: str | Path,
    *,
    torn_last_line: Literal["dropped", "counts"] = "dropped",
    parse: Callable[[dict[str, Any]], Any] = lambda row: row,
    damaged: Callable[[ValueError], None] | None = None,
) -> Iterator[Any]:
    r"""Yields the rows of a file with one JSON object a line, one after the other.

    Lines end at `"\n"` alone, not at the other line ends of Unicode, which may stand in a text. Blank lines are passed
    over, and so is a byte-order mark at the start.

    Args:
        path: the file, UTF-8.
        torn_last_line: what becomes of a last line that ends neither in `"\n"` nor as JSON: "dropped" in a log, where a
            kill leaves one; in a file that a person hands in it "counts", as an error.
        parse: makes of a row what is yielded; raises `ValueError` when the row will not do.
        damaged: is told of each line that cannot be read, which is then left out; None: it is an error.

    Raises:
        ValueError: a line is no JSON object, or not what `parse` takes; the message names file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            torn = not line.endswith(b"\n") and torn_last_line == "dropped"
            try:
                found = read_json_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                row = None if found is None else parse(found)
            except ValueError as error:
                if torn and isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)):
                    return
                problem = InvalidValue(f"{path}, line {number}: {explain_json(error)}")
                if damaged is None:
                    raise problem from None
                damaged(problem)
                continue
            if found is not None:
                yield row


def read_json_line(line: bytes) -> dict[str, Any] | None:
    """One line of a file of JSON lines; None for a blank one.

    Raises:
        ValueError: it is not UTF-8, no JSON or no object; see `explain_json` for words.
    """
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode("utf-8"), parse_int=_whole)
    except RecursionError:
        raise InvalidValue("no JSON (brackets within brackets, too deep to read)") from None
    if not isinstance(row, dict):
        raise InvalidValue(f"must be a JSON object, is of type {type(row).__name__}")
    return row


def _whole(digits: str) -> int:
    if len(digits) > 300:  # more than a float holds
        raise InvalidValue(f"a number of {len(digits)} digits")
    return int(digits)


def explain_json(error: ValueError) -> str:
    """In words what is wrong with a line of JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start + 1})"
    return f"no JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Adds one row to a file of JSON lines, in one write; a line that a kill has torn is closed first."""
    with open(path, "ab+") as file:
        torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")


try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


def _fsync(path: Path) -> None:
    """Flushes a file or folder to the disk. Windows opens no folders; there the rename is flushed by itself."""
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(final: Path, otherwise: str) -> Iterator[Path]:
    """An empty folder to write that becomes `final` at the end, in place of one that is there, or is gone.

    Args:
        final: the folder.
        otherwise: for the message, what is left when it cannot be written.

    Raises:
        OSError: it could not be written, for example because the disk is full.
        RuntimeError: another process is writing it.
        Exception: what went wrong within, as it is.
    """
    partial, before = (final.with_name(f".{kind}-{final.name}") for kind in ("partial", "before"))
    with only_writer(final):
        shutil.rmtree(partial, ignore_errors=True)
        if before.exists() and not final.exists():  # a kill came between the two renamings below
            os.replace(before, final)
        try:
            partial.mkdir()
            yield partial
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            mistake = isinstance(error, UserError) and not isinstance(error, NotWritten)  # in what was read for it
            if mistake or not isinstance(error, (OSError, SafetensorError)):
                raise
            free = shutil.disk_usage(final.parent).free / 1e9
            raise NotWritten(
                f"{final}: could not be written ({error}); {otherwise}; make room ({free:.1f} GB are free) and resume"
            ) from error
        shutil.rmtree(before, ignore_errors=True)
        if final.exists():
            os.replace(final, before)  # removed only when the new one is in its place
        os.replace(partial, final)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds a folder that is about to be replaced, by a lock beside it; a kill frees it too.

    Raises:
        OSError: the lock could not be made.
        RuntimeError: another process holds it.
    """
    folder = folder.resolve()
    path = folder.parent / f".partial-{folder.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")
    except OSError as error:
        raise NotWritten(f"{folder}: could not be written ({error.strerror})") from error
    if not try_lock(lock):
        lock.close()
        raise Unusable(f"{folder}: another process is writing there; stop it or let it end")
    try:
        yield
    finally:
        lock.close()  # first: Windows removes no open file
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def run_lock(run_dir: Path, writes: bool = True, name: str = "run_dir") -> Iterator[None]:
    """Holds a folder that two processes at once would spoil; a kill frees it too.

    Args:
        run_dir: made when missing.
        writes: whether this process is the one that writes; the others of the run hold nothing.
        name: what the folder is called in the message.

    Raises:
        RuntimeError: another run holds it.
    """
    if not writes:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        if not try_lock(file):
            raise Unusable(f"{name}={run_dir}: another process is writing there; stop it or let it end")
        yield


def try_lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed; False when somebody else holds it. A kill frees it too."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # of Linux and macOS; of Windows
        return False
    except OSError:  # a file system without locks
        pass
    return True


@contextmanager
def share_lock(folder: Path, rank: int, world: int) -> Iterator[None]:
    """Holds one process's share of a folder that `world` processes write; who shares it otherwise is refused.

    Raises:
        RuntimeError: this share is held already, or another number of processes is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".writer-{rank}-of-{world}.lock"
    with open(mine, "w") as file:
        if not try_lock(file):
            raise Unusable(f"out={folder}: process {rank} of {world} is writing there already; stop it or let it end")
        for path in sorted(folder.glob(".writer-*-of-*.lock")):
            if not path.stem.endswith(f"-of-{world}"):
                with open(path, "a") as other:
                    if not try_lock(other):
                        others = path.stem.rpartition("-of-")[2]
                        raise Unusable(
                            f"out={folder}: {others} processes share the work there, this is one of {world}; they "
                            "would write the same parts. Let them end, or stop them"
                        )
        yield
