"""Which cells of a notebook others need, so that a test runs those alone.

A cell is needed when it defines a name that a needed one uses.
"""

import ast
import re
from pathlib import Path

import nbformat


def stored(tree: ast.AST) -> set[str]:
    """Names that a piece of code defines, those inside its functions and classes left out."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            continue
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            found.add(node.value.id)  # Model.forward = forward
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.comprehension):  # its variable ends with it
            todo.append(node.iter)
            continue
        todo += ast.iter_child_nodes(node)
    return found


def loaded(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a cell takes from cells before it, when it runs and when its functions are called."""
    own, now, late = set(), set(), set()
    for statement in tree.body:
        inner = {name for n in ast.walk(statement) if isinstance(n, ast.comprehension) for name in stored(n.target)}
        for function in (n for n in ast.walk(statement) if isinstance(n, (ast.FunctionDef, ast.Lambda))):
            body = function.body if isinstance(function.body, list) else []
            inner |= {n.arg for n in ast.walk(function.args) if isinstance(n, ast.arg)}
            inner |= {name for line in body for name in stored(line)}
        uses = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - inner
        if isinstance(statement, ast.FunctionDef):
            late |= uses
        else:
            now |= uses - own
        own |= stored(statement)
    return now, late


def needed(cells: list[str], last: int) -> list[int]:
    """Numbers of the cells that cell `last` needs, itself included, in order."""
    trees = [ast.parse(cell) for cell in cells]
    late, kept = set(), {last}  # late: names that functions look up when they are called
    while True:
        wanted, before = set(), set(kept)
        for number in range(last, -1, -1):
            if number in kept or stored(trees[number]) & (wanted | late):
                kept.add(number)
                now, later = loaded(trees[number])
                wanted, late = wanted - stored(trees[number]) | now, late | later
        if kept == before:
            return sorted(kept)


def write_stage_alone(notebook: Path, target: Path) -> None:
    """Writes a notebook with its stage alone: the cells that use its runs or what training gave, and what they need.

    The other cells run with all the notebook, in `notebooks/`; they would take most of the time.
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
    kept = {numbers[one] for k in last for one in needed(cells, k)}
    book.cells = [cell for k, cell in enumerate(book.cells) if cell.cell_type != "code" or k in kept]
    nbformat.write(book, target)
