"""Runs the notebooks of the course again and writes them back, clean.

Notebooks are committed with their outputs, so that they can be read without running anything. `refresh` executes
each from its first cell to its last in a process of its own and replaces the file only when that succeeded. What
belongs to a machine and not to the lesson is taken out: paths, timing metadata, widget state, progress bars. What a
notebook needs to stand alone is put in: its opening picture, and a line for those who have not installed anything.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import yaml
from PIL import Image

from nitro_e_lite import files
from nitro_e_lite.course.cells import needed
from nitro_e_lite.errors import InvalidValue, MissingFile, Unusable
from nitro_e_lite.runtime import StopRequest

MAX_BYTES, MAX_OPENING = 500_000, 30_000  # of a notebook; of its opening picture, as it is
OPENING_PIXELS = 180_000  # of a larger one
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
CELL_METADATA = ("tags", "jupyter")
GUARD = """import importlib.util

if importlib.util.find_spec("nitro_e_lite") is None:
    raise SystemExit("nitro_e_lite is missing: `pip install -e .` in a clone, or `pip install` its wheel; then restart")

"""
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.])(?:/(?:work|root|home|tmp|Users|private)/|[A-Z]:\\)\w+")


@dataclass(frozen=True)
class Refreshed:
    """One notebook that was run again.

    Attributes:
        name: file name without suffix.
        seconds: wall-clock time of the whole run.
        cpu_seconds: processor time over all cores; 0 where the system does not tell.
        size: bytes of the file.
    """

    name: str
    seconds: float
    cpu_seconds: float
    size: int


def notebooks_dir() -> Path:
    """The notebooks of the checkout.

    Raises:
        FileNotFoundError: the package does not run from a checkout.
    """
    root = files.repo_root()
    if root is None:
        raise MissingFile("notebooks/: only a checkout of the repository has it; clone it and install with -e")
    return root / "notebooks"


def refresh(names: Sequence[str] | None = None) -> Iterator[Refreshed]:
    """Executes notebooks in place, with their default parameters, and rewrites their figures.

    Args:
        names: file names with or without suffix, or their numbers ("08"); None: all, in order.

    Yields:
        A `Refreshed` after each notebook.

    Raises:
        ValueError: an unknown name, or a result that is too large or still names this machine.
        RuntimeError: a cell failed; the message holds its error. The file is unchanged then.
    """
    for path in find_all(names):
        start, cpu = time.perf_counter(), _children_seconds()
        figures = notebooks_dir().parent / "figures"
        notebook = stand_alone(clean(execute(path, figures=figures)), figures)
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if found := MACHINE_PATH.search(text):
            raise InvalidValue(f"{path.name}: an output names a path of this machine, {found[0]!r}; make it relative")
        size = len(text.encode())
        if size > MAX_BYTES:
            raise InvalidValue(f"{path.name}: {size:,} bytes with outputs, over {MAX_BYTES:,}; make figures smaller")
        files.write_atomically(path, text)
        yield Refreshed(path.stem, time.perf_counter() - start, _children_seconds() - cpu, size)


def store_lite(name: str, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Measures at lite scale what a notebook shows beside its smoke run, and stores it in `folder`, a file a lesson.

    Only the cells that the numbers need run, with `notebooks/params/NAME.lite.yaml`. What `Lesson.once` has measured
    lies below `runs/` until all is there, so that the same command goes on after a stop; changed cells begin anew.

    Args:
        name: of the notebook, or its number.
        folder: gets `NUMBER.json`.
        overrides: "name=value" changes of the lite settings.

    Raises:
        ValueError: an unknown name, or a notebook that measures nothing at lite scale.
        RuntimeError: a cell failed, or this process was asked to stop.
    """
    path = _find(name)
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in code]
    asked = [number for number, text in enumerate(texts) if ".beside_lite(" in text]
    if not asked:
        raise InvalidValue(f"notebook: {path.stem} has no lite results")
    wanted = sorted({number for last in asked for number in needed(texts, last)})
    book["cells"] = [code[number] for number in wanted]
    values = yaml.safe_load((path.parent / "params" / f"{path.stem}.lite.yaml").read_text(encoding="utf-8"))
    values["overrides"] = [*values.get("overrides", []), *overrides]
    digest = hashlib.sha256(json.dumps([texts[number] for number in wanted] + [values]).encode()).hexdigest()
    work = path.parent.parent / "runs" / "results" / f"{path.stem[:2]}-{digest[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    lesson, parameters = work / path.name, work / "parameters.yaml"
    lesson.write_text(json.dumps(book), encoding="utf-8")
    parameters.write_text(yaml.safe_dump(values), encoding="utf-8")
    execute(lesson, parameters, folder=path.parent, extra={"NITRO_E_RESULTS": str(work)})
    found = files.read_json(work / f"{path.stem[:2]}.json")
    rows = list(files.read_jsonl(work / "measured.jsonl"))
    found["measuring_minutes"] = round(sum(row["seconds"] for row in rows) / 60, 1)
    target = folder / f"{path.stem[:2]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(target, json.dumps(found) + "\n")
    shutil.rmtree(work)
    return target


def find_all(names: Sequence[str] | None = None) -> list[Path]:
    """The files of notebooks by name or number; None: all, in order.

    Raises:
        FileNotFoundError: the package does not run from a checkout.
        ValueError: an unknown name.
    """
    return [_find(name) for name in names] if names else sorted(notebooks_dir().glob("*.ipynb"))


def _find(name: str) -> Path:
    paths = sorted(notebooks_dir().glob("*.ipynb"))
    matches = [path for path in paths if path.name.startswith(Path(name).stem)]
    if len(matches) != 1:
        known = ", ".join(path.stem for path in paths)
        raise InvalidValue(f"notebook: {name!r} names {len(matches)} of them; there are {known}")
    return matches[0]


def execute(
    path: Path,
    parameters: Path | None = None,
    figures: Path | None = None,
    folder: Path | None = None,
    extra: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Runs a notebook with papermill.

    Args:
        path: the notebook; it is not changed.
        parameters: YAML file with values for its parameters cell.
        figures: folder that its figures go to; None: its own `run_dir`.
        folder: where it runs; None: in the folder it lies in.
        extra: environment variables.

    Returns:
        The notebook with outputs, as in its file.

    Raises:
        RuntimeError: a cell failed, or this process was asked to stop; what the notebook had started is stopped too.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {**extra} | ({"NITRO_E_FIGURES": str(figures)} if figures else {})
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / path.name
        command = [sys.executable, "-m", "papermill", str(path), str(output), "--cwd", str(folder or path.parent)]
        command += ["--kernel", "python3", "--no-progress-bar", "--log-level", "ERROR"]
        command += ["-f", str(parameters)] if parameters else []
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **pipes)
        with StopRequest(lambda: _stop_what_runs(process.pid)) as request:
            _, said = process.communicate()
        if request.name:
            raise Unusable(f"stopped by {request.name} while {path.name} ran; the same command begins it again")
        if process.returncode:
            where = said[-3000:].rpartition("Exception encountered at ")[2]  # before it: papermill's own calls
            raise Unusable(f"{path.name} failed:\n{where}")
        return json.loads(output.read_text(encoding="utf-8"))


def _stop_what_runs(pid: int) -> None:
    """SIGTERM to the kernel and to what it has started: a training saves and ends, and papermill with the cell.

    Without a kernel yet, papermill itself is ended.
    """
    try:
        papermill = psutil.Process(pid)
        for process in papermill.children(recursive=True) or [papermill]:
            process.terminate()
    except psutil.NoSuchProcess:
        pass


def clean(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook without what belongs to the run and not to the lesson. Changes its argument."""
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        tags = [tag for tag in cell["metadata"].pop("tags", []) if tag != "injected-parameters"]
        kept = {name: value for name, value in cell["metadata"].items() if name in CELL_METADATA and value}
        cell["metadata"] = kept | ({"tags": tags} if tags else {})
        if cell["cell_type"] == "code":
            cell["outputs"] = _clean_outputs(cell["outputs"])
    return notebook


def stand_alone(notebook: dict[str, Any], figures: Path) -> dict[str, Any]:
    """The notebook so that its file alone can be read and, beside an installed package, run. Changes its argument.

    Its opening picture is embedded, as it is in `figures` now, and the first cell that imports the package says in one
    line how to install it where it is missing. Doing so twice changes nothing.
    """
    opening = notebook["cells"][0]
    text = "".join(opening["source"])
    for target, name in re.findall(r"\]\(((?:\.\./figures/|attachment:)([\w-]+\.png))\)", text):
        if opening["cell_type"] == "markdown" and (figures / name).is_file():
            picture = _embedded(figures / name, _shown(notebook, name))
            opening["attachments"] = opening.get("attachments", {}) | {name: picture}
            opening["source"] = text.replace(target, f"attachment:{name}").splitlines(keepends=True)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^(from|import) nitro_e_lite\b", source, flags=re.MULTILINE):
            cell["source"] = (GUARD + source.removeprefix(GUARD)).splitlines(keepends=True)
            break
    return notebook


def _shown(notebook: dict[str, Any], name: str) -> bytes | None:
    """The picture as its cell shows it, with all its colours; None where that is no JPEG."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and f'"{Path(name).stem}"' in "".join(cell["source"]):
            for output in cell["outputs"]:
                if "image/jpeg" in output.get("data", {}):
                    return base64.b64decode("".join(output["data"]["image/jpeg"]))
    return None


def _embedded(path: Path, shown: bytes | None) -> dict[str, str]:
    """A picture as an attachment: as it is, or, where it is large, as JPEG of 180,000 pixels at most."""
    content, kind = path.read_bytes(), "image/png"
    if len(content) > MAX_OPENING:
        with Image.open(io.BytesIO(shown) if shown else path) as image:
            small, buffer = image.convert("RGB"), io.BytesIO()
        shrink = min(1.0, (OPENING_PIXELS / (small.width * small.height)) ** 0.5)
        small = small.resize((round(shrink * small.width), round(shrink * small.height)), Image.Resampling.LANCZOS)
        small.save(buffer, format="JPEG", quality=70)
        content, kind = buffer.getvalue(), "image/jpeg"
    return {kind: base64.b64encode(content).decode()}


def _clean_outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joined streams, no widget views, no progress bars, no paths of this machine."""
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stderr" and "\r" in "".join(output["text"]):
                continue
            if kept and kept[-1].get("name") == output["name"]:
                kept[-1]["text"] = _lines("".join([*kept[-1]["text"], *output["text"]]))
                continue
            output["text"] = _lines("".join(output["text"]))
        elif WIDGET_VIEW in output.get("data", {}):
            continue
        elif "text/plain" in output.get("data", {}):
            output["data"]["text/plain"] = _lines("".join(output["data"]["text/plain"]))
        kept.append(output)
    return kept


def _lines(text: str) -> list[str]:
    """Text as a notebook holds it, a list of lines, with paths relative to the checkout."""
    return text.replace(f"{notebooks_dir().parent}{os.sep}", "").splitlines(keepends=True)


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system
