"""The whole chain at smoke scale: encoders, both stages through their notebooks, a pipeline, a score."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from lesson_cells import write_stage_alone
from safetensors.torch import load_file
from typer.testing import CliRunner

import nitro_e_lite
from nitro_e_lite import presets
from nitro_e_lite.cli.app import app
from nitro_e_lite.course import notebooks
from nitro_e_lite.experiments import reproduce
from nitro_e_lite.training.checkpoints import load_latest

# Small, but with all that stage 2 does at lite scale and not at smoke scale: notebook 10 once broke on it after hours.
LITE = presets.preset("finetune", "lite")
OVERRIDES = ["steps=2", f"optimizer.whiten_text_input={json.dumps(LITE.optimizer.whiten_text_input)}"]
OVERRIDES += [f"data.{name}={json.dumps(getattr(LITE.data, name))}" for name in ("pairs", "pairs_every", "colorless")]


@pytest.mark.slow
def test_the_chain_leaves_weights_notebooks_and_metrics_and_knows_when_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    books, folder = tmp_path / "notebooks", notebooks.notebooks_dir()
    shutil.copytree(folder / "params", books / "params")
    for name in reproduce.STAGES.values():
        write_stage_alone(folder / f"{name}.ipynb", books / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: books)
    run_dir = tmp_path / "chain"
    chain = reproduce.Chain("smoke", run_dir, seed=3, overrides=OVERRIDES)
    assert all(seconds is not None for _, seconds in chain.run())

    pipeline = nitro_e_lite.load_pipeline(run_dir / "weights", "cpu")
    about = (run_dir / "weights" / "transformer" / "training.json").read_text(encoding="utf-8")
    first, settings = json.loads(about)["stages"]
    assert settings["stage"] == "finetune" and settings["seed"] == 3 and settings["steps"] == 2
    assert first["stage"] == "base" and settings["start_from"] == "stage1/training"
    assert settings["data"]["encoders"] == "chain/encoders" and str(tmp_path) not in about
    assert sum(p.numel() for p in pipeline.transformer.parameters()) < 1_000_000
    for part, run in {"vae/diffusion_pytorch_model": "autoencoder", "text_encoder/model": "language-model"}.items():
        half = load_file(run_dir / "encoders" / f"{part}.safetensors")
        for name, value in load_file(run_dir / run / "final" / f"{part}.safetensors").items():
            assert torch.equal(half[name], value.half())  # the bits that ship are those that both stages read
    for stage, book in reproduce.STAGES.items():
        _, state = load_latest(run_dir / stage / "training" / "checkpoints")
        assert state["step"] == 2
        cells = json.loads((run_dir / "notebooks" / f"{book}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
        assert list((run_dir / stage / "figures").glob("*.png"))
    card = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert card["images"] == 6 and 0 <= card["overall"] <= 1 and (run_dir / "uncurated.png").is_file()
    students = json.loads((run_dir / "students.json").read_text(encoding="utf-8"))
    assert {stage: (one["images"], one["steps"]) for stage, one in students.items()} == {
        "rewards": (6, 4),
        "distill": (6, 4),
        "sprint": (6, 2),
    }
    rows, costs = chain.scores(), chain.report["steps"]
    assert [row["name"] for row in rows] == ["stages 1 and 2", "rewards", "distill", "sprint"]
    assert rows[0]["overall"] == card["overall"] and rows[3]["overall"] == students["sprint"]["overall"]
    spent = sum(cost["seconds"] for name, cost in costs.items() if "evaluation" not in name)
    assert rows[3]["minutes"] == pytest.approx(spent / 60) and sorted(rows, key=lambda row: row["minutes"]) == rows
    probe = json.loads((run_dir / "vision" / "final" / "probe.json").read_text(encoding="utf-8"))
    assert set(probe) == {"trained", "pixels", "untrained"}

    again = reproduce.Chain("smoke", run_dir, seed=3, overrides=OVERRIDES)
    assert [seconds for _, seconds in again.run()] == [None] * 14
    report = json.loads((run_dir / "reproduce.json").read_text(encoding="utf-8"))
    assert list(report["steps"]) == [step.name for step in again.steps()]
    words = ["reproduce", "--preset=smoke", f"--run-dir={run_dir}", "--seed=3", f"--out={tmp_path / 'card.json'}"]
    words += [word for change in OVERRIDES for word in ("--set", change)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "what it came to" in shown.stdout, shown.output
    written = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert written["rows"] == rows and written["machines"].startswith("1 x ")
    with pytest.raises(ValueError, match="holds a chain with"):
        reproduce.Chain("smoke", run_dir, seed=4)
    with monkeypatch.context() as patch:  # presets of another version of the package
        patch.setitem(reproduce._SMALL, "vision", [*reproduce._SMALL["vision"], "batch_size=1"])
        with pytest.raises(ValueError, match="holds a chain with .*'recipe'"):
            reproduce.Chain("smoke", run_dir, seed=3, overrides=OVERRIDES)


def test_at_lite_scale_the_second_student_starts_as_the_first_of_this_chain(tmp_path, monkeypatch):
    chain, told = reproduce.Chain("lite", tmp_path), []
    (tmp_path / "evaluation.json").write_text('{"overall": 0.5}', encoding="utf-8")
    monkeypatch.setattr(reproduce, "launch", lambda config, *_, **__: told.append(config))
    steps = {step.name: step for step in chain.steps()}
    for name in ("stage 4, distillation", "SANA-Sprint"):
        steps[name].work()
    first, second = told
    assert first.start_from == "" and first.data.folders == (str(tmp_path / "drawn"),)
    assert second.start_from == str(tmp_path / "distill") and len(second.data.folders) == 2
    assert first.teacher == second.teacher == str(tmp_path / "rewards") and second.gate_card == 0.5


def test_a_step_killed_while_it_writes_its_result_is_not_done(tmp_path, monkeypatch):
    """The autoencoder's weights were there, the statistics of its latents not: stage 1 failed at every repeat."""
    chain = reproduce.Chain("smoke", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("nitro_e_lite.stages.autoencoder.measure_latents", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(chain.run())
    tried = reproduce.Chain("smoke", tmp_path).report["steps"]["autoencoder"]["seconds"]
    step, seconds = next(reproduce.Chain("smoke", tmp_path).run())
    assert step.name == "autoencoder" and seconds > tried > 0  # what both attempts took
    assert (tmp_path / "autoencoder" / "final" / "vae" / "latent_stats.json").is_file()


def test_a_stage_under_way_says_how_long_it_will_take(tmp_path):
    assert reproduce.progress(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"config": {"steps": 1000, "batch_size": 32}}), encoding="utf-8")
    rows = [
        {"step": 90, "loss": 2.0, "samples_per_second": 1.0},
        {"step": 100, "loss": 0.5, "samples_per_second": 16.0},
    ]
    rows.append({"step": 100, "validation_loss": 0.4})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert reproduce.progress(tmp_path) == "step 100 of 1,000, loss 0.500, 16.0 samples/s, 30 minutes left"
    for losses, told in (({"student_loss": 0.25, "heads_loss": 2.0}, ", loss 0.250"), ({"loss": None}, "")):
        row = {"step": 100, "samples_per_second": 16.0} | losses  # with a discriminator; a loss that was not finite
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert reproduce.progress(tmp_path) == f"step 100 of 1,000{told}, 16.0 samples/s, 30 minutes left"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = []
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000100.png").touch()
    with reproduce.watched(tmp_path, said.append, every=0.01):
        time.sleep(0.5)
    assert len(said) == 1 and said[0].endswith("newest picture: " + str(tmp_path / "samples" / "step-00000100.png"))


def test_what_cannot_be_reproduced_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="notebook 17"):
        reproduce.Chain("full", tmp_path)
    with pytest.raises(ValueError, match="processes=0"):
        reproduce.Chain("smoke", tmp_path, devices=0)
    with pytest.raises(ValueError, match="unknown field"):
        reproduce.Chain("smoke", tmp_path, overrides=["step=2"])
    monkeypatch.setattr(notebooks.files, "repo_root", lambda: None)
    with pytest.raises(FileNotFoundError, match="checkout"):
        reproduce.Chain("lite", tmp_path)


def _one_cell(path, source: str):
    """A notebook with one cell of code."""
    cell = {"cell_type": "code", "id": "only", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": notebooks.METADATA, "nbformat": 4, "nbformat_minor": 5}))


def test_a_signal_before_there_is_a_kernel_stops_too(tmp_path, monkeypatch):
    """It once found nothing to stop; the notebook then ran to its end, for hours, and further signals were ignored."""

    class Hasty(subprocess.Popen):
        def communicate(self, *arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().communicate(*arguments, **options)

    _one_cell(tmp_path / "long.ipynb", "import pathlib, time\ntime.sleep(30)\npathlib.Path('to the end').touch()")
    monkeypatch.setattr(notebooks.subprocess, "Popen", Hasty)
    with pytest.raises(RuntimeError, match="stopped by SIGTERM while long.ipynb ran"):
        notebooks.execute(tmp_path / "long.ipynb")
    assert not (tmp_path / "to the end").exists()


def test_a_stopped_execution_takes_down_what_the_notebook_had_started(tmp_path):
    """A killed `reproduce` once left its training running, and the next one wrote into the same folder."""
    cell = "import subprocess, pathlib\nchild = subprocess.Popen(['sleep', '600'])\n"
    cell += "pathlib.Path('pid').write_text(str(child.pid))\nchild.wait()\nraise SystemExit"
    _one_cell(tmp_path / "waits.ipynb", cell)
    script = f"from nitro_e_lite.course.notebooks import *; execute(Path({str(tmp_path / 'waits.ipynb')!r}))"
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.terminate()
    assert "stopped by SIGTERM while waits.ipynb ran" in parent.communicate(timeout=60)[1]
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
