"""The notebooks as documents: anatomy, parameters, outputs, links and figures. That their cells run is nbval's part.

Nothing of the package is imported here: what a document says can be read by a Python without torch.
"""

import ast
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
LEDGER = json.loads((ROOT / "figures" / "ledger.json").read_text(encoding="utf-8"))
BOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}
COURSE = [
    "00_start_here",
    "01_data_and_captions",
    "02_encoders",
    "03_flow_matching",
    "04_joint_attention",
    "05_token_compression",
    "06_alternating_subregion_attention",
    "07_adaln_affine",
    "08_emmdit_assembled",
    "09_repa_pretraining",
    "10_fine_tuning_ema",
    "11_grpo",
    "12_step_distillation",
    "13_sana_sprint",
    "14_fp8_inference",
    "15_evaluation",
    "16_demo_20_vs_4_steps",
    "17_full_run_8x_mi300x",
    "18_debugging_lab",
]
STAGES = ["09_repa_pretraining", "10_fine_tuning_ema", "17_full_run_8x_mi300x"]  # they look before they train
REWARDS = "11_grpo"  # so does it
STUDENTS = ["12_step_distillation", "13_sana_sprint"]  # so do they, after they have drawn what they learn from
HEADINGS = ["able to", "Check", "Measure", "Full scale", "Exercises", "Solutions", "Recap"]
COMMON = ["preset", "seed", "devices", "run_dir", "overrides"]
MAX_CELLS, MAX_MEDIAN, MAX_LINES, MAX_IDEA_WORDS, MAX_FIGURE_BYTES = 45, 8, 30, 120, 250_000
GUARD = r"\Aimport importlib\.util\n\nif .*\n    raise SystemExit\(.*\n\n"  # whether the package is installed

every_notebook = pytest.mark.parametrize("name", BOOKS)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cells(name: str, kind: str = "code") -> list[dict]:
    return [cell for cell in BOOKS[name]["cells"] if cell["cell_type"] == kind]


def tagged(name: str, tag: str) -> list[dict]:
    return [cell for cell in cells(name) if tag in cell["metadata"].get("tags", [])]


def prose(name: str) -> str:
    return "\n\n".join(source(cell) for cell in cells(name, "markdown"))


def between(name: str, heading: str, end: str) -> list[dict]:
    """The cells from one heading to another."""
    titles = [source(cell) if cell["cell_type"] == "markdown" else "" for cell in BOOKS[name]["cells"]]
    first, last = (next(i for i, title in enumerate(titles) if has_heading(title, h)) for h in (heading, end))
    return BOOKS[name]["cells"][first:last]


def has_heading(text: str, words: str) -> bool:
    return re.search(rf"^#+ .*\b{words}\b", text, flags=re.MULTILINE) is not None


def parameters(name: str) -> dict:
    body = ast.parse(source(tagged(name, "parameters")[0])).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body}


def outputs(name: str) -> list[dict]:
    return [output for cell in cells(name) for output in cell["outputs"]]


def printed(some: list[dict]) -> str:
    return "".join("".join(out.get("text", [])) for cell in some for out in cell.get("outputs", []))


def test_course_is_complete():
    assert set(COURSE) <= set(BOOKS)


# Anatomy


@every_notebook
def test_begins_with_title_figure_and_table(name):
    first = source(BOOKS[name]["cells"][0])
    assert first.startswith(f"# {name[:2]} ")
    assert re.search(r"!\[.+\]\((\.\./figures/|attachment:).+\.png\)", first)
    rows = " ".join(re.findall(r"^\| *\**(\w+)", first, flags=re.MULTILINE)).lower()
    assert all(word in rows for word in ("needs", "time", "writes", "papers")), rows


@every_notebook
def test_has_its_parts_in_order(name):
    texts = [source(cell) if cell["cell_type"] == "markdown" else "" for cell in BOOKS[name]["cells"]]
    places = [next((i for i, text in enumerate(texts) if has_heading(text, part)), part) for part in HEADINGS]
    assert places == sorted(places, key=int)
    goals = next(text for text in texts if has_heading(text, "able to"))
    assert 3 <= len(re.findall(r"^- ", goals, flags=re.MULTILINE)) <= 4
    assert prose(name).count("**Notice") >= 3
    assert len(re.findall(r"^- ", texts[places[-1]], flags=re.MULTILINE)) >= 3, "recap in three bullets"


@every_notebook
def test_shows_the_problem_before_the_first_formula(name):
    code = 0
    for cell in BOOKS[name]["cells"]:
        code += cell["cell_type"] == "code"
        if cell["cell_type"] == "markdown" and "$" in source(cell):
            break
    assert code >= 3, "parameters, start and a picture or cost come first"


@every_notebook
def test_cells_are_few_and_short(name):
    lengths = [len(re.sub(GUARD, "", source(cell)).splitlines()) for cell in cells(name)]
    assert len(lengths) <= MAX_CELLS
    assert statistics.median(lengths) <= MAX_MEDIAN
    assert max(lengths) <= MAX_LINES


@every_notebook
def test_ideas_are_short(name):
    inner = between(name, "able to", "Full scale")
    texts = [source(cell) for cell in inner if cell["cell_type"] == "markdown" and "\n|" not in source(cell)]
    assert {text[:60]: n for text in texts if (n := len(text.split())) > MAX_IDEA_WORDS} == {}


@every_notebook
def test_every_displayed_formula_is_followed_by_code(name):
    pairs = itertools.pairwise(BOOKS[name]["cells"])
    assert [source(cell)[:60] for cell, after in pairs if "$$" in source(cell) and after["cell_type"] != "code"] == []


@every_notebook
def test_says_how_to_run_at_full_scale(name):
    text = "\n".join(source(cell) for cell in between(name, "Full scale", "Exercises"))
    missing = [word for word in ("memory", "not run") if word not in text.lower()]
    assert missing == [], "say what it needs and whether it was run"
    command = f"papermill notebooks/{name}.ipynb runs/{name}.ipynb -f notebooks/params/{name}.full.yaml"
    assert f"mkdir -p runs && {command}" in text, "a fresh clone has no folder runs"
    whole = "\n".join(map(source, BOOKS[name]["cells"]))  # notebook 17 prints those of others too
    alike = r"mkdir -p runs && papermill notebooks/(\w+)\.ipynb runs/\1\.ipynb -f notebooks/params/\1\.full\.yaml\b"
    assert len(re.findall(alike, whole)) == whole.count("papermill notebooks/")


@every_notebook
def test_exercises_are_untouched_and_solutions_pass_the_same_checks(name):
    solutions, stubs = tagged(name, "solution"), between(name, "Exercises", "Solutions")
    code = cells(name)
    assert solutions and code[-len(solutions) :] == solutions, "solutions are the last code cells"
    assert all(cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in solutions)
    asked = re.findall(r"^○ (.+): not attempted yet$", printed(stubs), flags=re.MULTILINE)
    assert 2 <= len(asked) <= 3
    assert re.findall(r"^● (.+): correct$", printed(solutions), flags=re.MULTILINE) == asked
    text = "\n".join(source(cell) for cell in stubs if cell["cell_type"] == "markdown")
    assert len(re.findall(r"\d+ min", text)) >= len(asked), "each exercise says how long it takes"


# Parameters


@every_notebook
def test_parameters_are_commented_literals_and_all_are_used(name):
    (cell,) = tagged(name, "parameters")
    found = parameters(name)
    assert list(found)[:5] == COMMON and len(found) <= 8
    assert all("  # " in line for line in source(cell).splitlines() if line.strip())
    assert found["run_dir"] == f"runs/{name}"
    assert found["devices"] == 1 and found["overrides"] == []
    rest = "\n".join(source(other) for other in cells(name) if other is not cell)
    assert all(re.search(rf"\b{parameter}\b", rest) for parameter in found)
    assert "lesson.settings(" in rest or "lesson.overrides" in rest, "nothing reads overrides"


@every_notebook
@pytest.mark.parametrize("scale", ["lite", "full"])
def test_parameter_files_use_only_names_the_notebook_has(name, scale):
    values = yaml.safe_load((FOLDER / "params" / f"{name}.{scale}.yaml").read_text(encoding="utf-8"))
    known = parameters(name)
    assert {key: type(value) for key, value in values.items()} == {key: type(known[key]) for key in values}
    assert values["preset"] == scale


def test_no_parameter_file_is_left_over():
    assert {path.name.split(".")[0] for path in (FOLDER / "params").iterdir()} <= set(BOOKS)


# Outputs


@every_notebook
def test_was_executed_from_top_to_bottom(name):
    assert [cell["execution_count"] for cell in cells(name)] == list(range(1, len(cells(name)) + 1))
    assert [output for output in outputs(name) if output["output_type"] == "error"] == []
    assert printed([{"outputs": [o for o in outputs(name) if o.get("name") == "stderr"]}]) == ""


@every_notebook
def test_runs_no_shell_or_magic_lines(name):
    assert [line for cell in cells(name) for line in source(cell).splitlines() if re.match(r"\s*[!%]", line)] == []


@every_notebook
def test_saved_figures_are_in_the_ledger(name):
    code = "\n".join(source(cell) for cell in cells(name))
    saved = re.findall(r"save_figure\(.*?\"(\d\d_[\w-]+)\"", code, flags=re.DOTALL)
    assert len(saved) == code.count("save_figure(") and all(figure.startswith(name[:2]) for figure in saved)
    entries = {f"{figure}.png": LEDGER.get(f"{figure}.png", {}).get("source") for figure in saved}
    assert entries == dict.fromkeys(entries, f"notebooks/{name}.ipynb")
    assert [figure for figure in entries if (ROOT / "figures" / figure).stat().st_size > MAX_FIGURE_BYTES] == []


# Links


@every_notebook
def test_links_lead_somewhere(name):
    outside = ("http", "attachment:")  # what is embedded has a test of its own
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", prose(name)) if not target.startswith(outside)]
    assert [target for target in targets if not (FOLDER / target).resolve().exists()] == []


@every_notebook
def test_pictures_have_a_description_and_an_origin(name):
    for alt, target in re.findall(r"!\[(.*?)\]\(([^)\s]+)", prose(name)):
        assert len(alt) > 20, f"{target}: say what there is to see"
        assert Path(target.removeprefix("attachment:")).name in LEDGER, target


def test_notebooks_link_to_the_next_one():
    for name, following in itertools.pairwise(BOOKS):
        assert f"({following}.ipynb)" in source(cells(name, "markdown")[-1])


# Running


def two_steps(name: str, scale: str) -> dict:
    """Every value of a parameter file but its size and what is not on this machine."""
    values = yaml.safe_load((FOLDER / "params" / f"{name}.{scale}.yaml").read_text(encoding="utf-8"))
    values |= {key: value for key, value in parameters(name).items() if key in ("encoders", "vision", "base", "drawn")}
    return values | {"preset": "smoke", "devices": 1, "overrides": ["steps=2"], "seed": 5, "run_dir": "run"}


@pytest.mark.parametrize("name", [*STAGES, REWARDS])
def test_both_parameter_files_of_a_stage_are_the_same_run_at_smoke_size(name):
    """So that running one of them is running both: the full one as it is printed, in test_runbook.py."""
    lite, full = two_steps(name, "lite"), two_steps(name, "full")
    assert {key: value for key, value in lite.items() if parameters(name)[key] != value} == {
        key: value for key, value in full.items() if parameters(name)[key] != value
    }


@pytest.mark.parametrize("name", [*STAGES, REWARDS, *STUDENTS])
def test_a_stage_looks_first_and_trains_with_as_many_processes_as_asked_for(name):
    """Without accelerators all three once started one process, whatever `devices` said."""
    code = [source(cell) for cell in cells(name)]
    made = [
        call for text in code for call in re.findall(r"= stage_run\.StageRun\((.+)\)", text) if '"stage1"' not in call
    ]
    assert made and all(re.search(r"(processes=|, )devices\b", call) for call in made)
    looks = next(k for k, text in enumerate(code) if "stage_run.prepare(" in text)
    assert "save_figure" not in "".join(code[: looks + 1]), "a demonstration comes before the preflight"


def lite_dials(name: str) -> dict:
    """The lite settings, as the notebook's cells have them now."""
    for node in (node for cell in cells(name) for node in ast.walk(ast.parse(source(cell)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "settings":
            (given,) = (word.value for word in node.keywords if word.arg == "lite")
        elif isinstance(node, ast.Dict) and "lite" in (keys := [getattr(key, "value", None) for key in node.keys]):
            given = node.values[keys.index("lite")]
        else:
            continue
        if isinstance(given, ast.Call):
            return {word.arg: ast.literal_eval(word.value) for word in given.keywords}
    raise AssertionError(f"{name}: no lite settings")


@every_notebook
def test_lite_results_belong_to_the_settings_of_today(name):
    """A notebook that shows them has them, with three seeds or more, from its own lite settings and seed."""
    shows = any(".beside_lite(" in source(cell) for cell in cells(name))
    file = ROOT / "nitro_e_lite" / "course" / "results" / f"{name[:2]}.json"
    assert file.is_file() == shows
    if shows:
        stored, dials = json.loads(file.read_text(encoding="utf-8")), lite_dials(name)
        assert (stored["notebook"], stored["dials"], stored["seed"]) == (name, dials, parameters(name)["seed"])
        assert max(dials.get(repeats, 0) for repeats in ("seeds", "repeats", "copies")) >= 3
        assert file.stat().st_size < 30_000
