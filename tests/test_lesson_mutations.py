"""Checks that can fail: each wrong version below is caught by the notebook's own check.

A row names the notebook, the cell that checks (by a piece of its text), and what is written wrongly in that cell or
in one it needs. Only those cells run: a cell is needed when it defines a name that a needed one uses.
"""

import ast
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
QUICK = {}
WRONG = []


def names(tree: ast.AST, context: type, inside: bool) -> set[str]:
    """Names that a cell stores or loads: at its own level, or inside its functions and classes."""
    found, todo = set(), [(node, False) for node in ast.iter_child_nodes(tree)]
    while todo:
        node, deep = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, context) and deep == inside:
            found.add(node.id)
        scope = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
        if context is ast.Store and deep == inside:
            found |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
            found |= {(node.asname or node.name).split(".")[0]} if isinstance(node, ast.alias) else set()
        todo += [(child, deep or scope) for child in ast.iter_child_nodes(node)]
    return found


def needed(cells: list[str], last: int) -> list[int]:
    """Numbers of the cells that cell `last` needs, itself included, in order."""
    trees = [ast.parse(cell) for cell in cells]
    late, kept = set(), {last}  # late: names that functions look up when they are called
    while True:
        open_names, before = set(), set(kept)
        for number in range(last, -1, -1):
            defined = names(trees[number], ast.Store, inside=False)
            if number in kept or defined & (open_names | late):
                kept.add(number)
                open_names = (open_names - defined) | names(trees[number], ast.Load, inside=False)
                late |= names(trees[number], ast.Load, inside=True)
        if kept == before:
            return sorted(kept)


def run(number: str, check: str, old: str = "", new: str = "") -> None:
    """Executes the cells that a check needs, with `old` written as `new`."""
    book = json.loads(next(FOLDER.glob(f"{number}_*.ipynb")).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    (last,) = (k for k, cell in enumerate(cells) if check in cell)
    kept = [cells[k] for k in needed(cells, last)]
    assert not old or any(old in cell for cell in kept), f"{old!r} is in no cell that the check needs"
    namespace = {"__name__": "lesson"}
    for cell in kept:
        for long, short in QUICK.get(number, ()):
            cell = cell.replace(long, short)
        exec(compile(cell.replace(old, new) if old else cell, f"notebook {number}", "exec"), namespace)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a lesson writes goes to a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NITRO_E_FIGURES", raising=False)


@pytest.mark.parametrize(("number", "check"), sorted({row[:2] for row in WRONG}))
def test_a_check_accepts_what_the_lesson_builds(number, check):
    run(number, check)


@pytest.mark.parametrize(("number", "check", "old", "new"), WRONG)
def test_a_check_catches_a_wrong_version(number, check, old, new):
    with pytest.raises(AssertionError):
        run(number, check, old, new)
