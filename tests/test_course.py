"""The course for classes: assignments, pages, the challenge, the debugging lab."""

import ast
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.course import assignment, notebooks, playground
from nitro_e_lite.course import debugging_lab as lab
from nitro_e_lite.errors import UserError
from nitro_e_lite.experiments import challenge
from nitro_e_lite.presets import preset

SLOW = ("load_pipeline(", "load_encoders(", "load_transformer(", "train(", "Engine(", "race(", "prepare(", "to_empty(")
RUN = os.environ.get("NITRO_E_ASSIGNMENTS", "02 05 07").split()  # enough for a proof within seconds


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    """Both editions of all notebooks, as the command writes them."""
    folder = tmp_path_factory.mktemp("classroom")
    assert CliRunner().invoke(app, ["course", "assignment", str(folder)]).exit_code == 0
    return {
        kind: {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{kind}/*/*"))}
        for kind in ("source", "release")
    }


def marks(cell: dict) -> dict:
    return cell["metadata"].get("nbgrader", {})


def needed(cells: list[str], targets: set[int]) -> set[int]:
    """Cells that others need: those that define what they use, the last ones before them."""
    trees = [ast.parse(cell).body for cell in cells]
    uses = [set().union(*map(assignment._uses, tree)) for tree in trees]
    defines = [{name for one in tree for name in imported(one) or assignment._defines(one)} for tree in trees]
    kept, todo = set(), list(targets)
    while todo:
        number = todo.pop()
        kept.add(number)
        for name in uses[number]:
            before = [k for k in range(number - 1, -1, -1) if name in defines[k]]
            todo += [k for k in before[:1] if k not in kept]
    return kept


def imported(one: ast.stmt) -> list[str]:
    names = one.names if isinstance(one, (ast.Import, ast.ImportFrom)) else []
    return [(alias.asname or alias.name).split(".")[0] for alias in names]


def execute(cells: list[dict], kept: set[int]) -> dict[str, Exception | None]:
    """Runs cells in order, over errors as nbgrader does; returns how each graded one ended."""
    space, ended = {"__name__": "lesson"}, {}
    for number in sorted(kept):
        try:
            exec(compile(cells[number]["source"], str(number), "exec"), space)
            error = None
        except Exception as found:
            error = found
        if marks(cells[number]).get("grade"):
            ended[marks(cells[number])["grade_id"]] = error
    return ended


def test_with_answers_all_checks_pass_and_without_all_fail(classroom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for name in (one for one in classroom["source"] if one[:2] in RUN):
        full, bare = (
            [c for c in classroom[kind][name]["cells"] if c["cell_type"] == "code"] for kind in ("source", "release")
        )
        texts = [cell["source"] for cell in full]
        graded = {k for k, cell in enumerate(full) if marks(cell).get("grade")}
        quick = {k for k in graded if not any(word in texts[n] for n in needed(texts, {k}) for word in SLOW)}
        kept = needed(texts, quick)
        with_answers, without = execute(full, kept), execute(bare, kept)
        assert {one: repr(error) for one, error in with_answers.items() if error} == {}, name
        assert [one for one, error in without.items() if error is None] == [], name
        tried += len(quick)
    print(f"{tried} checks")
    assert tried >= 12


def test_students_get_the_lesson_without_answers(classroom):
    assert list(classroom["release"]) == list(classroom["source"]) == [p.stem for p in notebooks.find_all()]
    for name, book in classroom["release"].items():
        cells, full = book["cells"], classroom["source"][name]["cells"]
        ids = [marks(cell)["grade_id"] for cell in cells if marks(cell)]
        assert len(set(ids)) == len(ids) and len({cell["id"] for cell in cells}) == len(cells), name
        assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code"), name
        text = "".join(cell["source"] for cell in cells)
        assert assignment.BEGIN not in text and "## Solutions" not in text and "](../figures" not in text, name
        left = [cell for cell in cells if marks(cell).get("solution")]
        assert all("raise NotImplementedError()" in cell["source"] for cell in left), name
        assert {name for cell in left for name in defined(cell)} >= set(assignment.CORE.get(name, ())), name
        assert sum(marks(cell).get("grade", False) for cell in cells) >= 3, name
        assert [c["source"] for c in cells if marks(c).get("grade")] == [
            c["source"] for c in full if marks(c).get("grade")
        ], "checks are kept"


def defined(cell: dict) -> list[str]:
    return [name for one in ast.parse(cell["source"]).body for name in assignment._defines(one)]


def test_a_missing_answer_gets_no_point(capsys):
    with pytest.raises(AssertionError, match="bill: not attempted yet"):
        assignment.grade("bill", None, 3)
    assignment.grade("bill", 3, 3)
    assert capsys.readouterr().out == "● bill: correct\n"


def test_an_assignment_is_never_written_over(tmp_path):
    there = tmp_path / "release" / "02_encoders" / "02_encoders.ipynb"
    there.parent.mkdir(parents=True)
    there.write_text("a student's work")
    result = CliRunner().invoke(app, ["course", "assignment", str(tmp_path), "02"])
    assert result.exit_code == 2 and there.read_text() == "a student's work" and not (tmp_path / "source").exists()


# Pages


PAGES = ("SYLLABUS", "NOTATION", "ARTICLES", "EXAM", "EXAM_ANSWERS", "CHALLENGE")
ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    return (ROOT / "notebooks" / f"{name}.md").read_text(encoding="utf-8")


def exists(dotted: str) -> bool:
    """Whether a name below the package is there: a module, or something that one defines, or what a class holds."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        file = ROOT.joinpath("nitro_e_lite", *parts[:cut]).with_suffix(".py")
        if file.is_file():
            body = ast.parse(file.read_text(encoding="utf-8")).body
            for name in parts[cut:]:
                found = [one for one in body if getattr(one, "name", None) == name]
                if not found:
                    return False
                body = getattr(found[0], "body", [])
            return True
    return False


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_files_and_code_that_exist(name):
    text = page(name)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not t.startswith("http")]
    assert [t for t in targets if not (ROOT / "notebooks" / t).exists()] == []
    rooms = "scenes|model|inference|data|evaluation|training|stages|course|experiments|cli"
    code = re.findall(rf"`((?:{rooms})\.[\w.]+)`", text)
    assert [dotted for dotted in code if not exists(dotted)] == []
    assert name != "ARTICLES" or len(code) > 30
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    assert [line for line in lines if CliRunner().invoke(app, [*shlex.split(line)[1:], "--help"]).exit_code] == []


def test_syllabus_has_every_lesson_and_exam_every_answer():
    lessons_there = [path.name for path in notebooks.find_all()]
    assert sorted(set(re.findall(r"\((\d\d_\w+\.ipynb)\)", page("SYLLABUS")))) == lessons_there
    numbers = [re.findall(r"^(\d+)\. ", page(name), flags=re.MULTILINE) for name in ("EXAM", "EXAM_ANSWERS")]
    assert numbers[0] == numbers[1] == [str(k + 1) for k in range(len(numbers[0]))]


# The challenge


def test_an_entry_is_trained_judged_and_ranked(tmp_path, monkeypatch):
    monkeypatch.setattr(challenge, "_keep_cores", lambda: 2)
    arguments = ["--preset", "smoke", "--minutes", "0.05", "--name", "one", "--run-dir", str(tmp_path / "one")]
    arguments += ["--set", "batch_size=4", "--set", "validate_every=1000", "--set", "sample_every=1000"]
    result = CliRunner().invoke(app, ["challenge", *arguments])
    assert result.exit_code == 0, result.output
    entry = json.loads((tmp_path / "one" / "entry.json").read_text(encoding="utf-8"))
    assert entry["name"] == "one" and entry["config"]["steps"] > 1 and entry["card"]["images"] == 6
    assert "it was judged on other prompts or seeds" in challenge.breaches(entry)
    assert CliRunner().invoke(app, ["challenge", *arguments]).exit_code == 2, "an entry is made in one go"
    with pytest.raises(ValueError, match="steps are as many as fit"):  # the speed was measured over all of them
        challenge.settings("lite", ["steps=5000"], 11)
    assert challenge.settings("lite", [], 11).repa == preset("base", "lite").repa  # the preset as it is

    def put(name, overall, **changes):
        card = entry["card"] | {"prompts": 300, "overall": overall, "low": overall - 0.03, "high": overall + 0.03}
        text = json.dumps(entry | {"name": name, "card": card, "seconds": 1.0} | changes)
        (tmp_path / "board" / name).mkdir(parents=True)
        (tmp_path / "board" / name / "entry.json").write_text(text)

    put("best", 0.50)
    put("as good", 0.46)
    put("behind", 0.40)
    put("too long", 0.90, seconds=1e6)
    put("more cores", 0.80, cores=8)
    found = [(row.entry["name"], row.place) for row in challenge.board([tmp_path / "board"])]
    assert found == [("best", 1), ("as good", 1), ("behind", 2), ("too long", None), ("more cores", None)]
    put("[bold]x", 0.3)  # a name is no markup
    assert "[bold]x" in CliRunner().invoke(app, ["challenge", "--board", str(tmp_path / "board")]).stdout
    shutil.rmtree(tmp_path / "board" / "[bold]x")
    for number, change in enumerate(
        [{"card": 5}, {"card": {}}, {"config": {}}, {"minutes": "x"}, {"cores": "two"}, {"name": 5}]
        + [{"card": entry["card"] | one} for one in ({"low": "x"}, {"overall": float("nan")})]
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps(entry | change))
        with pytest.raises(ValueError, match="is no entry of the challenge"):
            challenge.board([tmp_path / f"{number}.json"])
    shown = CliRunner().invoke(app, ["challenge", "--board", str(tmp_path / "board"), "--json"])
    assert [row["place"] for row in json.loads(shown.stdout)["entries"]] == [1, 1, 2, None, None]


def test_the_page_shows_the_board():
    page = (notebooks.notebooks_dir() / "CHALLENGE.md").read_text(encoding="utf-8")
    for row in challenge.board([notebooks.notebooks_dir() / "challenge"]):
        card, words = row.entry["card"], " ".join(f"--set {one}" for one in row.entry["overrides"])
        score = f"{card['overall']:.3f} ({card['low']:.3f} to {card['high']:.3f})"
        cost = f"{row.entry['seconds'] / 60:.1f} | {card['transformer_parameters'] / 1e6:.2f}M"
        assert row.breaches == [] and f"| {row.place} | {row.entry['name']} | {score} | {cost} | `{words}` |" in page


@pytest.mark.parametrize("wrong", ["start_from=lite", "data.folders=[x]", "lora.rank=4", "data.encoders=full"])
def test_the_rules_hold_before_any_work(tmp_path, wrong):
    with pytest.raises(ValueError, match=wrong.partition("=")[0]):
        challenge.challenge(tmp_path / "run", overrides=[wrong])
    assert not (tmp_path / "run").exists()


# The debugging lab


def test_stored_logs_show_what_notebook_18_says():
    runs = {name: lab.read(name)[0] for name in lab.RUNS}
    assert all((lab.stored() / f"{name}.{end}").stat().st_size < 10_000 for name in runs for end in ("json", "png"))
    log, drawn = ({name: run[part] for name, run in runs.items()} for part in ("log", "drawn"))
    sound, last = log["sound"], {name: one["validation loss"][-1] for name, one in log.items()}
    assert drawn["sound"] == {"colours right": 48, "shapes right": 48, "pictures": 48}
    costs = {name: one["with wrong captions"][-1] - last[name] for name, one in log.items()}
    assert last["run-1"] > 10 > 0.2 > log["run-1"]["loss rank 0"][-1] and costs["run-1"] < 0
    assert max(log["run-2"]["loss rank 0"][:6]) > 1e5
    assert log["run-3"]["loss rank 0"] == sound["loss rank 0"] and last["run-3"] > 1.8
    assert log["run-4"]["loss rank 0"] == log["run-4"]["loss rank 1"] and drawn["run-4"] == drawn["sound"]
    assert 40 < log["run-5"]["loss rank 0"][0] and 1.9 < sound["loss rank 0"][0] < 2.2
    assert log["run-6"]["reward"][-1] > 0.99 and last["run-6"] > 15 * log["run-6"]["validation loss"][0]
    assert drawn["run-6"]["colours right"] == 48 and drawn["run-6"]["shapes right"] < 24
    assert abs(last["run-7"] / last["sound"] - 1) < 0.05 and drawn["run-7"]["shapes right"] < 5
    assert abs(costs["run-8"]) < 0.001 and last["run-8"] < 0.3 and costs["sound"] > 1


def test_the_lab_is_made_again_by_a_command(tmp_path, monkeypatch):
    few = {"sound": lab.Run(steps=2), "run-4": lab.Run(steps=2, same_rows=True)}
    monkeypatch.setattr(lab, "RUNS", few | {"run-6": lab.Run(rewarded=True, steps=2)})
    made, build = [], lab.Lab.__init__
    monkeypatch.setattr(lab.Lab, "__init__", lambda self, seed: made.append(self) or build(self, seed, scenes=96))
    result = CliRunner().invoke(app, ["course", "lab", str(tmp_path / "lab"), "--json"])
    assert result.exit_code == 0 and set(json.loads(result.stdout)["drawn"]) == set(lab.RUNS)
    stored, again = (lab.read("sound", folder)[0]["log"] for folder in (None, tmp_path / "lab"))
    assert set(stored) == set(again) and len(made) == 1
    log = lab.read("run-4", tmp_path / "lab")[0]["log"]
    assert log["loss rank 0"] == log["loss rank 1"] != again["loss rank 1"]


def test_a_diagnosis_needs_all_eight():
    causes = {name: lab.describe(run) for name, run in lab.RUNS.items() if name != "sound"}
    assert len(set(causes.values())) == 8 and lab.is_right(causes)
    assert not lab.is_right(causes | {"run-1": causes["run-2"]}) and not lab.is_right({})


# The playground


def test_the_playground_shows_a_run_at_its_moments_and_what_gates_say_of_a_failed_one(teacher_folder, cache, tmp_path):
    """One run stands for all: before, at a checkpoint and at its end, the same noises; then a copy whose log is bad."""
    from nitro_e_lite.config import DrawnConfig, override
    from nitro_e_lite.stages.distill import distill

    run, bad = tmp_path / "run", tmp_path / "bad"
    data = DrawnConfig(folders=(str(cache),), encoders=str(teacher_folder), validation_rows=2)
    words = ["steps=4", "checkpoint_every=2", "keep_checkpoints=9", "validate_every=2", "optimizer.lr=0.01"]
    smoke = replace(preset("distill", "smoke"), teacher=str(teacher_folder), data=data, head_width=8)
    distill(override(smoke, words), run, device="cpu")
    shown = playground.Shown.parse(f"regression={run}")
    assert [step for step, _ in shown.moments(9)] == [0, 2, 4] and [step for step, _ in shown.moments(2)] == [0, 4]
    ends = [shown.pipeline(weights) for weights in (run / "checkpoints" / "step-00000004", run / "final")]
    drawn = [
        pipeline("a red circle", generator=torch.Generator().manual_seed(0), **how.arguments())
        for pipeline, how in ends
    ]
    assert ends[0][1].steps == 4 and ends[0][1].guidance == 0 and np.array_equal(*(one.images[0] for one in drawn))
    shutil.copytree(run, bad)
    rows = [{"step": k, "heads_right": 1.0, "seconds": float(k)} for k in range(1, 5)]
    (bad / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["course", "playground", f"regression={run}", "--failed", f"too strong={bad}", "--prompts", "0", "--json"]
    result = CliRunner().invoke(app, [*words, "--folder", str(tmp_path / "page"), "--moments", "3"])
    assert result.exit_code == 0, result.output
    found = playground.read(tmp_path / "page")
    (method,) = found["methods"]
    assert method["steps"] == 4 and len(method["frames"]) == 3 and method["points"] == []
    first, _, last = ((tmp_path / "page" / frame["picture"]).read_bytes() for frame in method["frames"])
    assert first != last
    said = playground.diagnoses(found, tmp_path / "page")["too strong"]
    assert "gate discriminator-balance" in said and said in result.stdout
    page = playground.slider(found, tmp_path / "page")
    minute, (column,) = page.children[0], page.children[1].children
    assert column.children[0].value == first and "before" in column.children[1].value
    minute.max, minute.value = 99, 99
    assert column.children[0].value == last and "before" not in column.children[1].value
    assert playground.film(found, tmp_path / "page").width > 2 * playground.SIDE
    words = ["course", "playground", "--arm", f"both={run}", "--arm", f"both={run}", "--arm", f"both={run}@1"]
    result = CliRunner().invoke(app, [*words, "--folder", str(tmp_path / "page"), "--prompts", "1"])
    assert result.exit_code == 0, result.output
    arms = playground.read(tmp_path / "page")
    assert arms | {"arms": {}} == found, "all but the arms stays"
    assert set(arms["arms"]["distill"]) == {"both", "both, 1 step"}
    both, one = arms["arms"]["distill"].values()
    assert both["n"] == 6 and len(set(both["scores"])) == len(set(both["kid"])) == 1 and len(both["minutes"]) == 2
    assert one["kid"] != both["kid"][:1] and one["kid_floor"] == both["kid_floor"]
    with pytest.raises(ValueError, match="must read NAME=RUN"):
        playground.Shown.parse("regression")
    with pytest.raises(ValueError, match="is no run of distill, sprint or rewards"):
        playground.Shown.parse(f"a={tmp_path}")
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    for words, said in [
        ([f"a={run}", "--folder", str(own)], "holds other things, which would be lost"),
        ([f"a={run}", "--folder", str(run)], "holds other things, which would be lost"),
        ([f"a b={run}", f"a-b={bad}"], "a-b: two names are one as the name of a file"),
        ([f"a={run}", "--arm", f"b={run}", "--prompts", "0"], "prompts=0: arms are told apart by their scores"),
        (["--failed", f"b={bad}"], "runs: none; name some"),
        (["--arm", f"b={run}"], "playground.json"),
        ([f"a={run}@1000000000", "--prompts", "0"], "num_inference_steps: 1000000000 is above 1000"),
    ]:
        words = [*words, *([] if "--folder" in words else ["--folder", str(tmp_path / "second")])]
        result = CliRunner().invoke(app, ["course", "playground", *words])
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("Error: ") == 1, result.output
    assert own.joinpath("thesis.txt").is_file() and (run / "checkpoints").is_dir()
    assert not (tmp_path / "second").exists() and not list(tmp_path.glob(".partial-*"))
    about = json.loads((bad / "config.json").read_text())
    for file, text, said in [
        ("metrics.jsonl", "", "metrics.jsonl: is empty"),
        ("metrics.jsonl", '{"step": "x"}\n', "step='x': must be a number"),
        (
            "config.json",
            json.dumps({"config": {"stage": "distill"}}),
            "does not say log_every, sampler_steps, steps, te",
        ),
        ("config.json", json.dumps(about | {"config": [1]}), r"config=\[1\]: must be a JSON object"),
    ]:
        (bad / file).write_text(text)
        with pytest.raises(UserError, match=said):
            playground.Shown.parse(f"a={bad}")
        (bad / "metrics.jsonl").write_text('{"step": 1}\n')


def test_the_log_of_a_shipped_student_is_drawn_by_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(playground.files, "weights_dir", lambda: tmp_path)
    assert playground.shipped_run("lite-4step") is None
    (tmp_path / "lite-4step").mkdir()
    rows = [{"step": k, "seconds": 60.0 * k, "loss": 1.0} for k in (1, 2)]
    rows.append({"step": 2, "geneval": 0.8, "teacher_geneval": 0.7})
    (tmp_path / "lite-4step" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, score, cards = playground.shipped_run("lite-4step").axes
    assert score.lines[0].get_xydata().tolist() == [[2.0, 0.8]] and score.lines[1].get_ydata()[0] == 0.7
    found = playground.scores()
    assert [text.get_text() for text in cards.get_yticklabels()] == list(found)
    assert {card["images"] for card in found.values()} == {2400} and next(iter(found)) == "lite, 40 passes"


def test_the_shipped_playground_is_small_and_whole():
    found, files_ = playground.read(), [path for path in playground.FOLDER.glob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files_) < 400_000
    named = {frame["picture"] for method in found["methods"] for frame in method["frames"]}
    named |= {one["log"] for one in found["failed"]} | {playground.INDEX}
    assert {path.name for path in files_} == named
    for method in found["methods"]:
        minutes = [frame["minute"] for frame in method["frames"]]
        assert minutes == sorted(minutes) and all(p["low"] <= p["score"] <= p["high"] for p in method["points"])
    for said in playground.diagnoses(found).values():
        assert said.startswith("gate ")
