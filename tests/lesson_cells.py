"""The stage of a notebook alone, without what it only shows."""

import ast
import re
from pathlib import Path

import nbformat

from nitro_e_lite.course.cells import loaded, needed, stored


def write_stage_alone(notebook: Path, target: Path) -> None:
    """Writes a notebook with its stage alone: the cells that use its runs or what training gave, and what they need.

    A figure is among them. The other cells run with all the notebook, in `notebooks/`; they would take most of the
    time.
    """
    book = nbformat.read(notebook, as_version=4)
    numbers = [k for k, cell in enumerate(book.cells) if cell.cell_type == "code"]
    cells = [book.cells[k].source for k in numbers]
    trees = [ast.parse(cell) for cell in cells]
    runs = {name for cell in cells for name in re.findall(r"(\w+)(?:\[\w+\])? = stage_run\.StageRun\(", cell)}
    trains = [k for k, cell in enumerate(cells) if ".train(" in cell]
    gave = {name for k in trains for name in stored(trees[k])}
    last = [k for k, tree in enumerate(trees) if loaded(tree)[0] & (runs | gave if k > trains[0] else runs)]
    last += [k for k, cell in enumerate(cells) if "Drawing(" in cell]  # what a student learns from
    kept = {one for k in last for one in needed(cells, k)}
    if not any("save_figure(" in cells[k] for k in kept):
        kept |= set(min((needed(cells, k) for k, cell in enumerate(cells) if "save_figure(" in cell), key=len))
    kept = {numbers[k] for k in kept}
    book.cells = [cell for k, cell in enumerate(book.cells) if cell.cell_type != "code" or k in kept]
    nbformat.write(book, target)
