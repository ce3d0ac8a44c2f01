"""The course as assignments: notebooks in nbgrader's format, made from the committed ones.

    FOLDER/source/NN_name/NN_name.ipynb    for teachers: answers between ### BEGIN SOLUTION and ### END SOLUTION
    FOLDER/release/NN_name/NN_name.ipynb   for students: the same without the answers and without outputs

These are the folders of an nbgrader course, so `nbgrader autograde` and `feedback` work on what comes back.

What is left to write are the functions that a lesson builds (`CORE`) and its exercises. A check stays as it is, in a
locked cell that is worth a point: comparisons with the package where they depend on something left to write, and the
checks of the exercises. The section with the solutions is gone; its code is what stands between the two marks.

Whoever looks for answers finds them: the package that a lesson rebuilds is installed beside it, and so are the
committed notebooks. The points are for practice.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_e_lite import files
from nitro_e_lite.course import lessons, notebooks
from nitro_e_lite.errors import FileThere, Unusable

CORE = {  # by notebook: what a lesson builds and then checks; the exercises come on top
    "01_data_and_captions": ("scramble", "numbers", "draw"),
    "02_encoders": ("space_to_channel", "channel_to_space", "Down", "Up"),
    "03_flow_matching": ("interpolate", "both_ends"),
    "04_joint_attention": ("logits_of", "attend", "RMSNorm", "MyJointAttention", "MyMLP", "MyStream", "MyBlock"),
    "05_token_compression": ("gather", "MyCompressor", "scatter", "MyReconstructor"),
    "06_alternating_subregion_attention": ("group_of", "split", "merge", "attend", "grouped_attention"),
    "07_adaln_affine": ("waves", "TimeVector", "modulate", "steered_half", "AdaLN", "AdaLNSingle", "AdaLNAffine"),
    "08_emmdit_assembled": ("forward",),
    "09_repa_pretraining": ("alignment_loss", "make_projector", "stage_one"),
    "10_fine_tuning_ema": ("ema_update", "warm"),
    "11_grpo": ("my_advantages", "my_step", "my_clipped", "my_forward"),
    "12_step_distillation": ("my_segment_loss", "my_logistic_loss", "my_walk"),
    "13_sana_sprint": ("my_trig", "my_tangent", "my_target", "my_loss", "my_sample"),
    "14_fp8_inference": ("my_decode", "my_encode", "my_quantize"),
    "15_evaluation": ("my_score", "my_summary"),
    "16_demo_20_vs_4_steps": ("my_steps",),
    "17_full_run_8x_mi300x": ("sample_cost", "rows_of"),
}
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # nbgrader's own
GRADE = "from nitro_e_lite.course.assignment import grade\n\n"
NOTE = """**Assignment edition.** Write your code where it says `YOUR CODE HERE`. Cells with checks are locked; each is
worth a point. Run the notebook from the top: a check needs the functions above it."""
_SCOPES = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign


def write(folder: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
    """Writes both editions of notebooks.

    Args:
        folder: of the nbgrader course; its `source` and `release` may not hold these notebooks yet.
        names: file names with or without suffix, or their numbers; None: all.

    Yields:
        Name and points of each notebook that was written.

    Raises:
        FileNotFoundError: there are no notebooks here, because this is no checkout.
        FileExistsError: one of the files is there; nothing was written then.
        ValueError: an unknown name.
    """
    paths = notebooks.find_all(names)
    targets = {path: [folder / kind / path.stem / path.name for kind in ("source", "release")] for path in paths}
    if there := [str(target) for pair in targets.values() for target in pair if target.exists()]:
        raise FileThere(f"{there[0]}: is there already, perhaps with somebody's work in it; name another folder")
    files.check_output(folder, "folder")
    for path, (source, release) in targets.items():
        book = teachers(files.read_json(path), path)
        for target, one in ((source, book), (release, students(book))):
            files.write_atomically(target, json.dumps(one, indent=1, ensure_ascii=False) + "\n")
        yield path.stem, sum(cell["metadata"].get("nbgrader", {}).get("points", 0) for cell in book["cells"])


def grade(name: str, answer: Any, expected: Any, **tolerances: float) -> None:
    """Like `lessons.check`, but an exercise that was not attempted fails too.

    Raises:
        AssertionError: the answer is wrong or missing.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        lessons.check(name, answer, expected, **tolerances)
    if not said.getvalue().startswith("●"):
        raise AssertionError(f"{name}: not attempted yet")
    print(said.getvalue(), end="")


def teachers(book: dict[str, Any], path: Path) -> dict[str, Any]:
    """The edition with the answers marked.

    Args:
        book: a committed notebook.
        path: where it lies: its pictures are looked for from there.

    Raises:
        RuntimeError: the notebook has no section of exercises or solutions, or lacks a function of `CORE`.
    """
    cells = [copy.deepcopy(cell) | {"source": _text(cell)} for cell in book["cells"]]
    exercises, solutions, recap = (_place(cells, words, path) for words in ("Exercises", "Solutions", "Recap"))
    stubs = {name for cell in cells[exercises:solutions] for one in _statements(cell) for name in _stub(one)}
    answers = _Answers([_text(cell) for cell in cells[solutions:recap] if cell["cell_type"] == "code"], stubs)
    core, number = set(CORE.get(path.stem, ())), path.stem[:2]
    if missing := core - {name for cell in cells[:exercises] for one in _statements(cell) for name in _defines(one)}:
        raise Unusable(f"{path.name}: nothing in it defines {', '.join(sorted(missing))}")
    made, open_names, asked = [], set(core), set()
    for place, cell in enumerate(cells[:solutions] + cells[recap:]):
        _settle_links(cell, path)
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", []):
            made.append(cell)
            continue
        wanted = answers.names if place >= exercises else core - asked
        for part in _parts(_text(cell), wanted, place >= exercises):
            left = [name for statement in part.tree for name in _stub(statement) if name in wanted]
            if left:
                text = answers.marked(part) if place >= exercises else _marked_core(part, set(left))
                made.append(_cell(cell, text, {"grade_id": f"{number}-{left[0]}", "solution": True}))
                asked |= set(left)
                open_names |= set(left)
            elif _spread(part.tree, open_names) and part.checks:
                text = (GRADE if "lessons.check(" in part.text else "") + part.text.replace("lessons.check(", "grade(")
                marks = {"grade": True, "locked": True, "points": 1, "grade_id": f"{number}-check-{len(made)}"}
                made.append(_cell(cell, text, marks))
            else:
                made.append(_cell(cell, part.text))
    made.insert(1, {"cell_type": "markdown", "id": "assignment", "metadata": {}, "source": NOTE})
    for index, cell in enumerate(made):  # cells that were cut have one id between them
        cell["id"] = f"{cell['id'][:50]}-{index}"
    return book | {"cells": made}


def students(book: dict[str, Any]) -> dict[str, Any]:
    """A teachers' edition without what stands between the marks."""
    book = copy.deepcopy(book)
    for cell in book["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            cell["source"] = re.sub(
                rf"^( *){BEGIN}$.*?^ *{END}$",
                lambda found: "\n".join(found[1] + line for line in STUB),
                cell["source"],
                flags=re.DOTALL | re.MULTILINE,
            )
    return book


# Code as text and as a tree


@dataclass(frozen=True)
class _Part:
    """Some statements of a cell, one after the other."""

    text: str
    tree: list[ast.stmt]

    @property
    def checks(self) -> bool:
        return any(_is_check(statement) for statement in self.tree)


def _text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _statements(cell: dict[str, Any]) -> list[ast.stmt]:
    return ast.parse(_text(cell)).body if cell["cell_type"] == "code" else []


def _place(cells: list[dict[str, Any]], words: str, path: Path) -> int:
    for place, cell in enumerate(cells):
        if cell["cell_type"] == "markdown" and re.search(rf"^#+ .*\b{words}\b", _text(cell), flags=re.MULTILINE):
            return place
    raise Unusable(f"{path.name}: has no heading {words!r}")


def _defines(statement: ast.stmt) -> list[str]:
    """Names that a statement defines for the cells after it."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    kept = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    changed = [t for t in targets if isinstance(t, (ast.Attribute, ast.Subscript))]  # EMMDiT.forward = forward
    return [node.id for node in kept] + [ast.unparse(t).partition(".")[0].partition("[")[0] for t in changed]


def _uses(node: ast.AST) -> set[str]:
    """Names that a piece of code takes from outside of itself."""
    found = set().union(*(_uses(child) for child in ast.iter_child_nodes(node)))
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        found.add(node.id)
    bound = node.target if isinstance(node, ast.For) else node if isinstance(node, _SCOPES) else ast.Pass()
    own = {n.id for n in ast.walk(bound) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    arguments = {n.arg for n in ast.walk(bound) if isinstance(n, ast.arg)}
    return found - own - arguments


def _stub(statement: ast.stmt) -> list[str]:
    """Names that may be left to write: of a function, of a class, or of a value that is None."""
    left = isinstance(statement, (ast.FunctionDef, ast.ClassDef)) or (
        isinstance(statement, ast.Assign) and ast.unparse(statement.value) == "None"
    )
    return _defines(statement) if left else []


def _is_check(statement: ast.stmt) -> bool:
    calls = [ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)]
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(statement))
    inside = isinstance(statement, (ast.FunctionDef, ast.ClassDef))  # checks when it is called, not here
    return not inside and (asserts or any(call == "lessons.check" or call.endswith("assert_close") for call in calls))


def _spread(tree: list[ast.stmt], open_names: set[str]) -> bool:
    """Whether a check here rests on something left to write; `open_names` is brought up to date."""
    rests = False
    for statement in tree:
        if _uses(statement) & open_names:
            open_names |= set(_defines(statement))
            rests |= _is_check(statement)
        else:
            open_names -= set(_defines(statement))
    return rests


def _parts(text: str, wanted: set[str], each_check: bool) -> Iterator[_Part]:
    """Cuts a cell after the last definition that is wanted, and in exercises after each check."""
    body, lines, first = ast.parse(text).body, text.splitlines(), 0
    last = max((i for i, one in enumerate(body) if set(_stub(one)) & wanted), default=-1)
    ends = {last, len(body) - 1} | ({i for i, one in enumerate(body) if _is_check(one)} if each_check else set())
    line = 0
    for end in sorted(ends - {-1}):
        until = len(lines) if end == len(body) - 1 else body[end].end_lineno
        yield _Part("\n".join(lines[line:until]).strip("\n"), body[first : end + 1])
        line, first = until, end + 1


def _body(node: ast.FunctionDef, lines: list[str]) -> tuple[int, int]:
    """First and last line (from 0, the last one excluded) of what a function does, comments above it included."""
    has_doc = ast.get_docstring(node) is not None
    body = node.body[1:] if has_doc and len(node.body) > 1 else node.body
    first = body[0].lineno - 1
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    return first, node.end_lineno


def _functions(node: Definition) -> list[ast.FunctionDef]:
    """What is left to write of a definition: a function, or the methods of a class but for its constructor."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
    return [one for one in methods if one.name != "__init__"] or methods


def _between(lines: list[str], indent: str) -> list[str]:
    return [indent + BEGIN, *lines, indent + END]


def _marked_core(part: _Part, left: set[str]) -> str:
    """The text with the functions of a lesson marked as answers."""
    lines = part.text.splitlines()
    body = ast.parse(part.text).body
    for node in reversed([one for one in body if set(_stub(one)) & left]):
        for function in reversed(_functions(node)):
            first, last = _body(function, lines)
            indent = " " * function.body[0].col_offset
            lines[first:last] = _between(lines[first:last], indent)
    return "\n".join(lines)


class _Answers:
    """What the cells with solutions define.

    Args:
        cells: their texts.
        stubs: names that the cells with exercises define.
    """

    def __init__(self, cells: list[str], stubs: set[str]):
        self.found: dict[str, tuple[str, Definition]] = {}
        self.extras: dict[str, str] = {}  # by the name of a value: what is computed for it
        for text in cells:
            body = [one for one in ast.parse(text).body if not _is_check(one)]
            named = [one for one in body if set(_defines(one)) & stubs and not isinstance(one, ast.Expr)]
            for one in named:
                self.found |= {name: (text, one) for name in _defines(one) if name in stubs}
            needs = _uses(named[0]) if named and isinstance(named[0], ast.Assign) else set()
            if extras := [ast.get_source_segment(text, one) for one in body if set(_defines(one)) & needs]:
                self.extras[_defines(named[0])[0]] = "\n".join(extras)
        self.names = set(self.found)

    def marked(self, part: _Part) -> str:
        """The text of an exercise with the answer of each stub, marked."""
        text = part.text
        lines, body = text.splitlines(), ast.parse(text).body
        for stub in reversed(body):
            names = [name for name in _defines(stub) if name in self.found]
            if not names:
                continue
            source, answer = self.found[names[0]]
            if isinstance(stub, ast.FunctionDef):
                first, last = _body(stub, lines)
                hint = [f"    #{line.partition('#')[2]}" for line in lines[first:last] if "return None  #" in line]
                inner = source.splitlines()
                begin, end = _body(answer, inner)
                lines[first:last] = hint + _between(inner[begin:end], "    ")
            else:
                lines[stub.end_lineno : stub.end_lineno] = _between([ast.get_source_segment(source, answer)], "")
            if extra := self.extras.get(names[0]):
                lines[stub.lineno - 1 : stub.lineno - 1] = _between([extra], "")
        return "\n".join(lines)


# Cells


def _cell(old: dict[str, Any], text: str, marks: dict[str, Any] | None = None) -> dict[str, Any]:
    """A cell without outputs; `marks` are nbgrader's."""
    rest = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    metadata = {name: value for name, value in old["metadata"].items() if name != "jupyter"}
    metadata |= {"nbgrader": rest | marks} if marks else {}
    return old | {"metadata": metadata, "execution_count": None, "outputs": [], "source": text}


def _settle_links(cell: dict[str, Any], path: Path) -> None:
    """Embeds the pictures of a text; links to other lessons lead to their assignments, other local ones are dropped."""
    if cell["cell_type"] == "code":
        cell |= {"outputs": [], "execution_count": None}
        return

    def settled(found: re.Match) -> str:
        mark, words, target = found.groups()
        if mark and target.endswith(".png") and "://" not in target and not target.startswith("attachment:"):
            picture = (path.parent / target).read_bytes()
            name = target.rpartition("/")[2]
            cell.setdefault("attachments", {})[name] = {"image/png": base64.b64encode(picture).decode()}
            return f"![{words}](attachment:{name})"
        if "://" in target or target.startswith(("#", "attachment:")):
            return found[0]
        return f"[{words}](../{target[:-6]}/{target})" if re.fullmatch(r"\w+\.ipynb", target) else words

    cell["source"] = re.sub(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)", settled, _text(cell))
