"""`course/notebooks.py`: what it leaves in a committed notebook, runs again, cleans, and makes stand alone."""

import base64
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from test_notebooks import BOOKS, FOLDER, ROOT, cells, every_notebook, source

from nitro_e_lite.course import notebooks


@every_notebook
def test_holds_nothing_of_the_machine_it_ran_on(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) <= notebooks.MAX_BYTES
    assert BOOKS[name]["metadata"] == notebooks.METADATA
    assert "application/vnd.jupyter.widget" not in text
    assert notebooks.MACHINE_PATH.search(text) is None
    assert re.search(r" at 0x[0-9a-f]{6}", text) is None, "an output shows the address of an object"
    assert {key for cell in BOOKS[name]["cells"] for key in cell["metadata"]} <= set(notebooks.CELL_METADATA)


# Alone


@every_notebook
def test_a_notebook_stands_alone(name):
    """Its picture is the one in figures/, embedded; without the package its first line says what to do."""
    book = BOOKS[name]
    assert notebooks.stand_alone(copy.deepcopy(book), ROOT / "figures") == book
    (picture,) = re.findall(r"\(attachment:(.+?\.png)\)", source(book["cells"][0]))
    ((kind, stored),) = book["cells"][0]["attachments"][picture].items()
    file = ROOT / "figures" / picture
    assert kind == ("image/png" if file.stat().st_size <= notebooks.MAX_OPENING else "image/jpeg")
    assert kind == "image/jpeg" or base64.b64decode(stored) == file.read_bytes()
    imports = next(source(cell) for cell in cells(name) if "from nitro_e_lite" in source(cell))
    assert imports.startswith(notebooks.GUARD)


@every_notebook
def test_any_notebook_can_be_made_to_stand_alone(name):
    book = notebooks.stand_alone(copy.deepcopy(BOOKS[name]), ROOT / "figures")
    assert len(json.dumps(book, indent=1, ensure_ascii=False)) <= notebooks.MAX_BYTES
    assert "attachments" in book["cells"][0]
    assert sum(source(cell).startswith(notebooks.GUARD) for cell in book["cells"]) == 1


def test_the_first_cell_says_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install") as found:
        exec(notebooks.GUARD, {})
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as `pip install` gets it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "nitro_e_lite", folder / "copy" / "nitro_e_lite", ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "copy")
    subprocess.run([*command, str(folder / "copy")], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_what_notebooks_read(wheel):
    """Everything below the package is in the wheel, and notebooks look nowhere else."""
    inside, folder = set(zipfile.ZipFile(wheel).namelist()), wheel.parent / "copy"
    there = {path.relative_to(folder).as_posix() for path in (folder / "nitro_e_lite").rglob("*") if path.is_file()}
    assert there - inside == set()
    # a checkout is asked for only where there is another way
    look = {name: re.findall(r"repo_root\(\) /", "".join(source(c) for c in cells(name))) for name in BOOKS}
    assert {name for name, found in look.items() if found} <= {"17_full_run_8x_mi300x"}


@pytest.mark.slow
def test_a_notebook_alone_runs_beside_an_installed_wheel(wheel, tmp_path):
    """One file in an empty folder; the package comes from its wheel and not from this checkout."""
    site, alone = tmp_path / "site", tmp_path / "alone"
    alone.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    shutil.copy(FOLDER / "08_emmdit_assembled.ipynb", alone)  # it reads a golden file of the package
    environment = os.environ | {"PYTHONPATH": str(site)}
    environment.pop("NITRO_E_FIGURES", None)
    where = [sys.executable, "-c", "import nitro_e_lite; print(nitro_e_lite.__file__)"]
    said = subprocess.run(where, cwd=alone, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(said.strip()).is_relative_to(site)
    run = ["papermill", "08_emmdit_assembled.ipynb", "out.ipynb", "--kernel", "python3", "--no-progress-bar"]
    subprocess.run([sys.executable, "-m", *run], cwd=alone, env=environment, check=True)


# Running


def notebook_of(*sources: str) -> str:
    made = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
        for i, text in enumerate(sources)
    ]
    return json.dumps({"cells": made, "metadata": notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of notebooks in place of the checkout's."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: folder)
    return folder


def test_refresh_stores_clean_outputs(shelf):
    messy = "import os, sys\nprint(os.getcwd())\nprint('\\r5 %', file=sys.stderr)\nprint(os.environ['NITRO_E_FIGURES'])"
    (shelf / "01_one.ipynb").write_text(notebook_of(messy, "1 + 1"))
    (done,) = notebooks.refresh(["01"])
    book = json.loads((shelf / "01_one.ipynb").read_text(encoding="utf-8"))
    first, second = book["cells"]
    assert first["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["notebooks\n", "figures\n"]}]
    assert (first["metadata"], book["metadata"]) == ({}, notebooks.METADATA)
    assert second["outputs"][0]["data"]["text/plain"] == ["2"] and second["execution_count"] == 2
    assert done.name == "01_one" and done.seconds > 0 and done.size == (shelf / "01_one.ipynb").stat().st_size


def test_refresh_leaves_a_notebook_that_fails_as_it_was(shelf):
    text = notebook_of("raise RuntimeError('lost the plot')")
    (shelf / "01_one.ipynb").write_text(text)
    with pytest.raises(RuntimeError, match="lost the plot"):
        list(notebooks.refresh())
    assert (shelf / "01_one.ipynb").read_text() == text


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output_type": "stream", "name": "stdout", "text": ["/home/ada/data\n"]}, "path of this machine"),
        ({"output_type": "stream", "name": "stdout", "text": ["x" * 600_000]}, "bytes"),
    ],
)
def test_refresh_refuses_what_should_not_be_committed(shelf, monkeypatch, output, message):
    text = notebook_of("1")
    (shelf / "01_one.ipynb").write_text(text)
    book = json.loads(text)
    book["cells"][0]["outputs"] = [output]
    monkeypatch.setattr(notebooks, "execute", lambda path, figures: book)
    with pytest.raises(ValueError, match=message):
        list(notebooks.refresh())
    assert (shelf / "01_one.ipynb").read_text() == text


def test_refresh_names_the_notebooks_there_are(shelf):
    (shelf / "01_one.ipynb").write_text(notebook_of("1"))
    with pytest.raises(ValueError, match="01_one"):
        list(notebooks.refresh(["02"]))


LESSON = (
    "preset = 'smoke'\nseed = 0\noverrides = []",
    "from nitro_e_lite.course import lessons\n"
    "lesson = lessons.start('01_one', preset=preset, seed=seed, devices=1, run_dir=run_dir, overrides=overrides)\n"
    "sizes = dict(steps=3)\ndials = lesson.settings(smoke=dict(steps=1), lite=sizes, full=sizes)",
    "raise RuntimeError('this cell only shows something')",
    "from pathlib import Path\n"
    "def measure(run):\n"
    "    with open(Path(run_dir) / 'log', 'a') as log:\n        log.write(f'{run} ')\n"
    "    if run == 1 and not (Path(run_dir) / 'again').exists():\n        raise RuntimeError('stopped')\n"
    "    return {'loss': run + dials.steps}",
    "runs = lesson.beside_lite(vars(dials), losses=[lesson.once(measure, run) for run in range(3)])",
)


@pytest.fixture
def here(monkeypatch):
    """Cells run in this process, which takes no seconds."""

    def execute(path, parameters, folder, extra):
        cells = [source(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        names = {}
        with monkeypatch.context() as patch:
            for name, value in extra.items():
                patch.setenv(name, value)
            exec(cells[0], names)
            names |= yaml.safe_load(parameters.read_text(encoding="utf-8"))
            for cell in cells[1:]:
                exec(cell, names)

    monkeypatch.setattr(notebooks, "execute", execute)


def test_lite_results_are_measured_once_and_only_by_the_cells_they_need(shelf, here, tmp_path):
    (shelf / "01_one.ipynb").write_text(notebook_of(*LESSON))
    (shelf / "params").mkdir()
    run_dir = tmp_path / "run"
    (shelf / "params" / "01_one.lite.yaml").write_text(f"preset: lite\nrun_dir: {run_dir}\n")
    with pytest.raises(RuntimeError, match="stopped"):
        notebooks.store_lite("01", tmp_path / "stored")
    assert not (tmp_path / "stored" / "01.json").exists()
    (run_dir / "again").touch()
    found = json.loads(notebooks.store_lite("01", tmp_path / "stored").read_text(encoding="utf-8"))
    assert (found["losses"], found["dials"]) == ([{"loss": 3}, {"loss": 4}, {"loss": 5}], {"steps": 3})
    assert (run_dir / "log").read_text() == "0 1 1 2 ", "what was measured before the stop is kept"
    notebooks.store_lite("01", tmp_path / "stored", ["steps=4"])
    found = json.loads((tmp_path / "stored" / "01.json").read_text(encoding="utf-8"))
    assert found["losses"][0] == {"loss": 4}, "other settings begin anew"
    (shelf / "02_two.ipynb").write_text(notebook_of("1"))
    with pytest.raises(ValueError, match="no lite results"):
        notebooks.store_lite("02", tmp_path)


def test_clean_takes_out_widgets_timing_and_split_streams():
    stream = {"output_type": "stream", "name": "stdout"}
    view = {"output_type": "display_data", "metadata": {}, "data": {notebooks.WIDGET_VIEW: {}, "text/plain": "HBox()"}}
    cell = {
        "cell_type": "code",
        "metadata": {"papermill": {"duration": 1}, "tags": ["solution"], "jupyter": {"source_hidden": True}},
        "outputs": [{**stream, "text": "a\n"}, view, {**stream, "text": ["b\n"]}],
    }
    book = notebooks.clean({"metadata": {"widgets": {}, "kernelspec": {}}, "cells": [cell]})
    assert book["metadata"] == notebooks.METADATA
    assert book["cells"][0]["metadata"] == {"tags": ["solution"], "jupyter": {"source_hidden": True}}
    assert book["cells"][0]["outputs"] == [{**stream, "text": ["a\n", "b\n"]}]
