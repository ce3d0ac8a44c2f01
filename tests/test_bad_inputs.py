"""Bad inputs, full disks and impossible places, by every command: one line that says what is wrong, and nothing lost.

The table of commands is walked over: a command that is new has to say here what it writes.
"""

import contextlib
import json
import os
import shutil
import unicodedata
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nitro_e_lite import files
from nitro_e_lite.cli import terminal
from nitro_e_lite.cli.app import app
from nitro_e_lite.cli.draw import claim
from nitro_e_lite.course import debugging_lab, notebooks
from nitro_e_lite.data import check
from nitro_e_lite.data.sources import Folder, Problem, read_prompts, square
from nitro_e_lite.errors import UserError
from nitro_e_lite.evaluation import eyes
from nitro_e_lite.experiments import plan
from nitro_e_lite.inference.encoders import LatentStats
from nitro_e_lite.model.official_weights import merge_lora
from nitro_e_lite.runtime import rank_and_world
from nitro_e_lite.scenes.geneval import load_prompts
from nitro_e_lite.training.checkpoints import load_checkpoint
from nitro_e_lite.training.precision import _recorded

FAST = ["--steps", "1", "--guidance", "0"]
SMALL = ["--preset", "smoke"]
OUTPUTS = {  # command -> words, with PLACE for what it writes
    "demo": [["--out", "PLACE.png", *FAST]],
    "sample": [["a star", "--out", "PLACE", *FAST], ["a star", "--out", "PLACE.png", *FAST]],
    "evaluate": [
        ["--prompts", "prompts.jsonl", "--seeds", "1", *FAST, name, "PLACE.png"] for name in ("--out", "--grid")
    ],
    "export": [["geneval", "prompts.jsonl", "PLACE", *FAST]],
    "scores": [["fid", "fid.json", "prompts.jsonl", "pictures", "--out", "PLACE.png"]],
    "eyes": [["--redraw", "PLACE"]],
    "benchmark": [["--peers", "--out", "PLACE.png"], ["--beside", "lite@1", "--out", "PLACE.png"]],
    "data benchmark": [["--out", "PLACE.png"]],
    "data encode": [["folder", "pictures", "PLACE"]],
    "data draw": [["PLACE", "--count", "1", *FAST]],
    "compare": [[*SMALL, "--variant", "a: guidance=2", "--points", "1", "--seeds", "0", "--run-dir", "PLACE"]],
    "reproduce": [[*SMALL, "--run-dir", "PLACE"]],
    "train base": [[*SMALL, "--run-dir", "PLACE"]],
    "train finetune": [[*SMALL, "--run-dir", "PLACE"]],
    "train rewards": [[*SMALL, "--run-dir", "PLACE"]],
    "train distill": [[*SMALL, "--run-dir", "PLACE"]],
    "train 1024px": [[*SMALL, "--run-dir", "PLACE"]],
    "train sprint": [[*SMALL, "--run-dir", "PLACE"]],
    "train autoencoder": [["--run-dir", "PLACE"]],
    "train language-model": [["--run-dir", "PLACE"]],
    "train vision": [["--run-dir", "PLACE"]],
    "train judge": [["preference", "--run-dir", "PLACE"]],
    "reward plot": [["run", "--out", "PLACE.png"]],
    "challenge": [[*SMALL, "--run-dir", "PLACE"]],
    "course assignment": [["PLACE"]],
    "course lab": [["PLACE"]],
    "course playground": [["regression=run", "--folder", "PLACE"]],
    "course results": [["02", "--folder", "PLACE"]],
}
ELSEWHERE = {  # they write beside what they are given, or nothing
    "ship": "into a folder that must hold weights, tested below",
    "notebooks refresh": "the notebooks of a checkout",
    "tables": "README and a figure of a checkout",
    "data check": "reports beside the data, or a warning",
    **dict.fromkeys(["count", "sensitivity", "reward serve", "doctor", "overfit", "plan"], "nothing"),
}
CASES = [(name, words) for name, ways in OUTPUTS.items() for words in ways]


def leaves(command, path=()):
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path)


@pytest.fixture
def here(tmp_path, monkeypatch, shipped):
    """An empty folder with small inputs, and weights whose encoders training and data sets can use."""
    (shipped / "vae" / "latent_stats.json").write_text(LatentStats((0.0,) * 4, (1.0,) * 4).to_json())
    files.write_manifest(shipped)
    folder = tmp_path / "here"
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (128, 128), "red").save(folder / "pictures" / "a.png")
    (folder / "pictures" / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a star"}\n')
    lines = [json.dumps(prompt.metadata()) for prompt in load_prompts()[::150]]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    return folder


def refused(*words: str, runner: CliRunner | None = None) -> str:
    """The one line with which a command refuses."""
    found = (runner or CliRunner()).invoke(app, list(words))
    assert found.exit_code == 2, (words, found.output, found.exception)
    lines = [line for line in found.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in found.output, found.output
    return lines[0]


def test_every_command_says_what_it_writes():
    """And what becomes of that on a full disk, and when two do it at once."""
    assert sorted(leaves(typer.main.get_command(app))) == sorted([*OUTPUTS, *ELSEWHERE])
    writing = sorted([*OUTPUTS, *(name for name, where in ELSEWHERE.items() if where != "nothing")])
    assert sorted([*FULL, *FULL_ELSEWHERE]) == sorted([*HELD, *SHARED]) == writing


# ------------------------------------------------------------------------------------------------------------
# Places that cannot be written, before any work: there are no weights, and nobody asks for them
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obstacle", ["something else is there", "a file is in the way", "read-only"])
def test_impossible_output_is_refused_before_any_work(here, monkeypatch, obstacle):
    monkeypatch.setattr(files, "weights_dir", lambda: here / "no weights")
    for name, words in CASES:
        place = here / "sealed" / "out"
        with contextlib.ExitStack() as after:
            file = any(word.startswith("PLACE.") for word in words)
            target = place.with_suffix(".png") if file else place
            (here / "sealed").mkdir()
            if obstacle == "something else is there":
                target.mkdir() if file else target.write_text("mine")
            elif obstacle == "a file is in the way":
                target.parent.rmdir()
                target.parent.write_text("mine")
            else:
                after.enter_context(sealed(here / "sealed"))
            said = refused(*name.split(), *(word.replace("PLACE", str(place)) for word in words))
            assert str(target) in said, (name, said)
        before = here / "sealed"
        before.unlink() if before.is_file() else None
        for left in before.rglob("*") if before.exists() else ():
            assert left == target and (left.is_dir() or left.read_text() == "mine"), (name, left)
            left.rmdir() if left.is_dir() else left.unlink()
        before.rmdir() if before.exists() else None


@contextlib.contextmanager
def sealed(folder: Path):
    """A folder that the system lets nobody write to (the super-user, who runs many containers, may do everything)."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mkdir"):
            real = getattr(os, name)

            def guarded(path, *rest, real=real, name=name, **more):
                if str(path).startswith(str(folder)) and (name == "mkdir" or rest and rest[0] & os.O_RDWR):
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *rest, **more)

            patch.setattr(os, name, guarded)
        yield


# ------------------------------------------------------------------------------------------------------------
# A disk that is full while a command works
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size: int = 600):
    """No file grows beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


ENGINE = "the one engine: test_train.py::test_a_full_disk_ends_the_run_and_spares_the_checkpoint"
FULL = {  # command -> what it says before it is told that the disk is full
    **dict.fromkeys(["demo", "sample", "export", "reward plot", "data encode", "data draw", "compare", "ship"], ""),
    **dict.fromkeys(["course assignment", "course lab", "eyes", "notebooks refresh"], ""),
    "evaluate": "overall",
    "benchmark": "in turn",
    "data benchmark": "Decoding JPEGs",
}
FULL_ELSEWHERE = {  # command -> where that is shown, or why it is left out
    **{f"train {stage}": ENGINE for stage in ("base", "finetune", "rewards", "distill", "1024px", "sprint")},
    **{f"train {model}": ENGINE for model in ("autoencoder", "language-model", "vision", "judge")},
    "challenge": ENGINE + "; it tells the score before it writes the entry",
    "reproduce": "its steps are these commands",
    "course playground": "test_training_state.py::test_a_folder_is_whole_or_as_it_was",
    "course results": "its file is written whole; what was measured lies in runs/ until then",
    "scores": "test_official_tools.py::test_scores_become_a_card_with_the_recipe_of_the_pictures",
    "data check": "a warning; what it found is printed",
    "tables": "README and figure are whole or as they were (write_atomically), and can be made again",
}


@pytest.mark.parametrize("name", FULL)
def test_full_disk_is_one_line_and_loses_nothing(here, shipped, monkeypatch, name):
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    words = OUTPUTS.get(name, [[]])[0]
    if name == "ship":
        words = [str(shipped), "--name", str(shipped)]
    elif name == "compare":  # else it ends before it writes: its preset goes with other encoders
        words = [*words, "--set", "model.in_channels=4", "--set", "model.caption_channels=32"]
    elif name == "benchmark":
        words = [*OUTPUTS[name][1], *FAST, "--batch", "1", "--repeats", "2"]
    elif name == "data benchmark":  # measured on a disk with room, full when the card is written
        measured = defaultdict(lambda: 1, columns=["latents"], source="")
        monkeypatch.setattr(check, "measure_reading", lambda *_, **__: measured)
        monkeypatch.setattr(check, "measure_decoding", lambda *_: measured)
        for counted in ("stated_mfus", "pictures_encoded"):  # which takes 10 s
            monkeypatch.setattr(plan, counted, list)
    elif name == "eyes":
        few = eyes.load()
        monkeypatch.setattr(eyes, "load", lambda: few | {"pictures": few["pictures"][:2]})
    elif name == "course lab":
        trained = {"drawn": {}, "log": [0] * 600}, None
        monkeypatch.setattr(debugging_lab, "Lab", lambda seed: SimpleNamespace(train=lambda run: trained))
    elif name == "notebooks refresh":
        book = json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["a" * 600]}], "metadata": {}})
        (here / "00.ipynb").write_text(book)
        monkeypatch.setattr(notebooks, "notebooks_dir", lambda: here)
        monkeypatch.setattr(notebooks, "execute", lambda *_, **__: json.loads(book))
    whole = {path: path.read_bytes() for folder in (here, shipped) for path in folder.rglob("*") if path.is_file()}
    with full_disk():
        found = CliRunner().invoke(app, [*name.split(), *(word.replace("PLACE", "out") for word in words)])
    assert found.exit_code == 2 and found.stderr.count("Error: ") == 1, (found.output, found.exception)
    assert "could not be written" in found.stderr and FULL[name] in found.stdout
    left = [path for path in here.rglob("*.png") if path.parent.name != "pictures"]
    assert not left and not list(here.rglob("*.tmp"))
    assert whole == {path: path.read_bytes() for path in whole}


# ------------------------------------------------------------------------------------------------------------
# Two at once
# ------------------------------------------------------------------------------------------------------------


ONE_ENGINE = "the lock of the one engine: test_train.py::test_two_trainings_in_one_folder_are_refused"
ONE_FILE = "a file, written whole: the last one stays"
HELD = {  # command -> what a run holds, which the next one is refused
    **dict.fromkeys(["export", "reproduce", "challenge", "course lab", "eyes", "evaluate"], files.run_lock),
    "compare": lambda out: files.run_lock(out / "a-seed0"),
    **dict.fromkeys(["data encode", "data draw"], lambda out: files.share_lock(out, 0, 1)),
    **dict.fromkeys(["course playground", "course results", "ship"], files.only_writer),
}
SHARED = {  # command -> why two may do it at once
    **{name: ONE_ENGINE for name in OUTPUTS if name.startswith("train ")},
    **dict.fromkeys(["demo", "scores", "benchmark", "data benchmark", "reward plot"], ONE_FILE),
    "sample": "each picture takes a free name: test_two_samples_never_take_one_name",
    "course assignment": "both write the same files, whole; one that is there is refused",
    "notebooks refresh": ONE_FILE,
    "tables": ONE_FILE,
    "data check": ONE_FILE,
}


@pytest.mark.parametrize("name", HELD)
def test_two_runs_in_one_folder(here, shipped, name):
    words = [word.replace("PLACE", "out") for word in OUTPUTS.get(name, [[]])[0]]
    if name == "evaluate":
        words += ["--review", "out"]
    elif name == "ship":
        words = [str(shipped), "--name", str(shipped)]
    elif name == "course playground":
        (here / "run").mkdir()
        config = {"stage": "distill", "sampler_steps": 4, "teacher": "lite", "log_every": 1, "steps": 1}
        (here / "run" / "config.json").write_text(json.dumps({"config": config}))
        (here / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with HELD[name](shipped if name == "ship" else here / "out"):
        assert "is writing there" in refused(*name.split(), *words)


def test_two_samples_never_take_one_name(tmp_path):
    names = [claim(tmp_path / "new" / "a-star-0.png").name for _ in range(3)]
    assert names == ["a-star-0.png", "a-star-0-2.png", "a-star-0-3.png"]


# ------------------------------------------------------------------------------------------------------------
# What a person or a surrounding hands in
# ------------------------------------------------------------------------------------------------------------


def test_mistakes_of_all_kinds(here, shipped):
    (here / "card").mkdir()
    (here / "card" / "card.json").write_text("[" * 200_000)
    (here / "huge").mkdir()
    (here / "huge" / "card.json").write_text('{"fingerprint": "f", "shape": [1000000000, 1000000000, 1]}')
    (here / "index").mkdir()
    (here / "index" / "model_index.json").write_text('{"_class_name": "NitroEPipeline", "vae": ["os", "system"]}')
    (here / "digits").mkdir()
    (here / "digits" / "card.json").write_text('{"rows": 1' + "0" * 400 + "}")
    (here / "looked").mkdir()
    (here / "looked" / "review.jsonl").write_text("{}")
    (here / "drawn").mkdir()
    (here / "drawn" / "000.png").write_text("mine")
    row = {"path": "000.png", "prompt": "a star", "tag": "colors", "verifier": True, "reason": "", "why": ""}
    (here / "sheet.jsonl").write_text(2 * (json.dumps(row | {"eyes": True}) + "\n"))
    (here / "half.jsonl").write_text(json.dumps(load_prompts()[0].metadata() | {"prompt": "a \ud83d star"}) + "\n")
    (here / "lora").mkdir()
    save_file({"any": torch.zeros(1)}, here / "lora" / "adapter_model.safetensors")
    (here / "lora" / "adapter_config.json").write_text('{"r": 0, "lora_alpha": 4}')
    shutil.copytree(shipped, here / "odd")
    (here / "odd" / "SHA256SUMS").unlink()
    (here / "odd" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC", "latent_channels": "x"}')
    own = [f"--draw={name}=null" for name in ("height", "width", "max_sequence_length")]  # others than FLUX's
    drawn = ["fluxdb", "prompts.jsonl", "out", "--generator", str(shipped), *own, "--draw"]
    for words, said in [
        (["sample", "a star", "a \ud83d star"], "prompt[1]: 'a \\ud83d star' is no valid Unicode"),
        (["sample", "a star", "--negative", "\ud83d"], "negative_prompt: "),
        (["sample", "a star", "--steps", "1000000000"], "num_inference_steps: 1000000000 is above 1000"),
        (["sample", "a star", "--num", "1000000000"], "num: 1000000000 is above"),
        (["sample", "a star", "--shift", "1e300"], "shift: 1e+300 is above 1000"),
        (["train", "base", *SMALL, "--set", "shift=1e300"], "shift=1e+300: must be <= 1000"),
        (["sample", "a star", "--device", "meta"], "its tensors hold no numbers"),
        (["sample", "a star", "--model", "index"], "index cannot be loaded"),
        (["sample", "a star", "--lora", "lora"], "r=0: must be a number above 0"),
        (["demo", "--teaser", "--out", "a.png"], "the teaser is always drawn alike"),
        (["demo", "--web", "--port", "99999999"], "port: 99999999"),
        (["evaluate", "--prompts", "prompts.jsonl", "--split", "held_out_compositions"], "name one of them"),
        (["evaluate", "--grid", "grid.xyz"], "must end in .png"),
        (["export", "geneval", "prompts.jsonl", "pictures", "--model", str(shipped)], "nothing says what it is"),
        (["data", "encode", "folder", "pictures", "pictures"], "is the folder of the raw data"),
        (["data", "encode", "fluxdb", "prompts.jsonl", "out", "--draw", "steps"], "must read argument=value"),
        (["data", "encode", "fluxdb", "prompts.jsonl", "out", "--draw", "steps=[1"], "steps=[1: cannot be read"),
        (["data", "encode", *drawn, "num_inference_steps=x"], "num_inference_steps: expected an integer, got 'x'"),
        (["data", "encode", *drawn, "num_images_per_prompt=2"], "1 generators for 2 pictures"),
        (["data", "encode", *drawn, "output_type=latent"], "one prompt does not give one picture"),
        (["data", "encode", "folder", "pictures/a.png", "out"], "a.png: holds no JSON object"),
        (["data", "encode", "folder", "pictures", "out", "--encoders", "odd"], "cannot be loaded"),
        (["data", "draw", "out", "--count", "-1"], "count: -1 is below 1"),
        (["data", "draw", "out", "--student-steps", "1000000000"], "student_steps: 1000000000 is above 1000"),
        (["data", "check", "card"], "too deep to read"),
        (["data", "check", "huge"], "is no shape of at most"),
        (["data", "check", "card", "--max-repeated", "nan"], "max_repeated=nan"),
        (["data", "benchmark", "--seconds", "nan"], "seconds=nan"),
        (["data", "benchmark", "--folder", "nosuch"], "folder='nosuch': is no folder"),
        (["data", "benchmark", "--batch", "99999999999"], "batch=99999999999: needs about"),
        (["sensitivity", "--pairs", "99999999999", "--model", str(shipped)], "pairs=99999999999: needs about"),
        (["reward", "plot", "pictures", "--out", "a.pdf"], "must end in .png"),
        (["scores", "nosuch", "a", "prompts.jsonl", "pictures"], "is not one of geneval, dpg"),
        (["train", "base", *SMALL, "--set", "steps=!!python/object:os.system x"], "cannot be read"),
        (["train", "base", *SMALL, "--set", "steps=" + "[" * 5000], "too deep to read"),
        (["train", "base", *SMALL, "--nodes", "0"], "nodes=0"),
        (["train", "base", *SMALL, "--canary", "--nodes", "2"], "leave --nodes out"),
        (["compare", *SMALL, "--variant", "a: seed=1", "--variant", "a: seed=2"], "give each its own"),
        (["compare", *SMALL, "--variant", "A: seed=1", "--variant", "a: seed=2"], "tell their folders apart"),
        (["compare", *SMALL, "--variant", "a: seed=1", "--seeds", "0,0"], "each once"),
        (["compare", *SMALL, "--variant", "a: seed=1", "--pairs", "1"], "pairs: 1 is below 2"),
        (["plan", "--preset", "lite", "--peak-tflops", "nan"], "peak_tflops=nan"),
        (["plan", "--preset", "lite", "--pictures", "-5"], "pictures=-5"),
        (["challenge", *SMALL, "--minutes", "inf"], "minutes=inf: must be a number > 0"),
        (["course", "lab", "out", "--seed", str(2**70)], f"seed: {2**70} is above"),
        (["count", "--text-tokens", "100000000000"], "above 1000000"),
        (["benchmark", "--transformer", "smoke", "--batch", "0"], "batch: 0 is below 1"),
        (["benchmark", "--transformer", "smoke", "--batch", str(10**11)], f"batch={10**11}: needs about"),
        (["benchmark", "--model", str(shipped), "--batch", str(10**11)], f"batch={10**11}: needs about"),
        (["benchmark", "--peers", "--repeats", "0"], "repeats: 0 is below 1"),
        (["data", "draw", "out", "--count", str(10**23)], "is above 1000000000"),
        (["benchmark", "--transformer", "smoke", "--model", "lite2"], "a transformer alone"),
        (["benchmark", "--beside", "lite@x"], "MODEL@STEPS"),
        (["benchmark", "--beside", "lite@1", "--peers"], "goes without --peers"),
        (["benchmark", "--beside", "lite@1", "--repeats", "1"], "repeats: 1 is below 2"),
        (["benchmark", "--beside", f"{shipped}@1", "--model", str(shipped), "--batch", str(10**11)], "needs about"),
        (["benchmark", "--peers", "--batch", str(10**11)], f"batch={10**11}: needs about"),
        (["evaluate", "--seeds", "1000000000"], "seeds: 1000000000 is above"),
        (["evaluate", "--review", "looked"], "review.jsonl: is there already"),
        (["eyes", "--redraw", "drawn"], "000.png: is there already"),
        (["eyes", "sheet.jsonl"], "000.png: is there twice"),
        (["reward", "serve", "geneval", "--host", "a\0b"], "cannot listen there (host name must not contain null"),
        (["export", "geneval", "half.jsonl", "out", *FAST], "is no valid Unicode"),
        (["plan", "--preset", "lite", "--set", "steps=1" + "0" * 400], "must be <= "),
        (["demo", "--teaser", "--seed", str(2**32 - 1)], "seed: "),
        (["course", "assignment", "out", "**"], "names 0 of them"),
        (["ship", "odd", "--name", str(shipped), "--steps", "1000000000"], "default_steps: 1000000000 is above 1000"),
        (["data", "check", "digits"], "a number of 401 digits"),
        (["data", "benchmark", "--batch", "1" + "0" * 400], "GB of memory"),
        (["data", "encode", "folder", "pictures", "out", "--size", "8000000"], "up to 65536"),
    ]:
        assert said in refused(*words), words
    assert sorted(path.name for path in here.iterdir()) == sorted(
        ["pictures", "prompts.jsonl", "card", "huge", "index", "digits", "looked", "lora", "odd"]
        + ["drawn", "sheet.jsonl", "half.jsonl"]
    )


def test_adapters_that_say_nonsense(tiny_pipeline, tmp_path):
    sides = [f"block_groups.0.0.attn.to_q.lora_{side}.weight" for side in "AB"]
    good = {"r": 2, "lora_alpha": 4}

    def write(folder, settings, a=(2, 32), b=(32, 2), inside=False):
        (tmp_path / folder).mkdir()
        weights = dict(zip(sides, [torch.zeros(a), torch.zeros(b)], strict=True))
        name = "pytorch_lora_weights" if inside else "adapter_model"
        save_file(weights, tmp_path / folder / f"{name}.safetensors", {"lora_adapter_metadata": settings})
        if not inside:
            (tmp_path / folder / "adapter_config.json").write_text(settings)

    for number, (settings, options, said) in enumerate(
        [
            ("{", {"inside": True}, "lora_adapter_metadata in its header: no JSON"),
            ("{}", {"inside": True}, "r=None: must be a number above 0"),
            ("[1]", {"inside": True}, "must be a JSON object, is of type list"),
            ("[" * 100_000, {"inside": True}, "too deep to read"),
            (json.dumps(good | {"rank_pattern": "x"}), {}, "rank_pattern='x': must be an object"),
            (json.dumps(good | {"rank_pattern": {"to_q": "x"}}), {}, "rank_pattern.to_q='x': must be a number above 0"),
            (json.dumps(good | {"alpha_pattern": {"to_q": -1}}), {"inside": True}, "alpha_pattern.to_q=-1: must be"),
            (json.dumps(good | {"rank_pattern": {"(": 2}}), {}, r"rank_pattern: '\(' is no pattern"),
            (json.dumps(good), {"a": (3, 32)}, "wrong shape"),  # B A has no value
            (json.dumps(good | {"r": 9}), {}, "wrong shape.*to_q: r=9"),  # another strength than it was trained with
            (json.dumps(good), {"a": (32,), "b": (32,)}, "wrong shape"),
            (json.dumps(good), {"a": (), "b": ()}, "wrong shape"),
        ]
    ):
        write(str(number), settings, **options)
        with pytest.raises(UserError, match=said):
            merge_lora(tiny_pipeline.transformer, tmp_path / str(number))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_checkpoint_that_names_impossible_files_is_damaged(tmp_path, name):
    (tmp_path / "state.json").write_text(json.dumps({"sha256": {name: "0"}}))
    with pytest.raises(UserError, match="missing or damaged"):
        load_checkpoint(tmp_path)


def test_runs_that_say_nonsense_are_not_shipped(here, shipped):
    for number, (config, said) in enumerate(
        [
            ("{", "no JSON"),
            ("[]", "must be a JSON object"),
            ('{"config": "x"}', "config='x': must be a JSON object"),
            ('{"config": {"stage": "distill"}}', "is no run of distill or sprint"),
            ('{"config": {"stage": "distill", "data": {"encoders": "lite"}}}', "metrics.jsonl is missing"),
        ]
    ):
        run = here / str(number)
        run.mkdir()
        (run / "config.json").write_text(config)
        assert said in refused("ship", str(run), "--name", "lite-4step"), config
        if number < 3:
            assert said in refused("ship", str(run), "--name", str(shipped)), config
    shutil.copytree(shipped / "transformer", run / "final")
    (run / "config.json").write_text('{"config": {"guidance": 2}}')
    assert f"shift: {run} does not say which" in refused("ship", str(run), "--name", str(shipped))
    assert "steps: a student draws as it was" in refused("ship", str(run), "--name", "lite-4step", "--steps", "3")
    assert not (shipped.parent / "lite-4step").exists()
    students = {"stage": "sprint", "data": {"encoders": "lite"}}
    (run / "config.json").write_text(json.dumps({"config": students}))
    (run / "metrics.jsonl").write_text("")
    assert "is of the stage distill" in refused("ship", str(run), "--name", "lite-4step")
    assert "needs a sampler of its own" in refused("ship", str(run), "--name", str(shipped))
    (run / "config.json").write_text(json.dumps({"config": students | {"stage": "distill", "jumps": False}}))
    assert "ship it as lite-4step" in refused("ship", str(run), "--name", str(shipped))
    (run / "config.json").write_text(json.dumps({"config": students}))
    weights = run / "final" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1e38 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert "is not finite in float16" in refused("ship", str(run), "--name", "lite-sprint")
    before = (shipped / "transformer" / weights.name).read_bytes()
    (run / "config.json").write_text('{"config": {"guidance": 2, "shift": 1, "data": {"encoders": "lite"}}}')
    assert "is not finite in float16" in refused("ship", str(run), "--name", str(shipped))
    assert before == (shipped / "transformer" / weights.name).read_bytes()
    assert not list(shipped.parent.glob("lite-*")) and not list(shipped.parent.glob(".partial-*"))
    (run / "config.json").write_text('{"config": {"stage": "distill"}}')
    assert "does not say data.encoders" in refused("sample", "a star", "--model", str(run))
    (run / "checkpoints").mkdir()
    for config in ("{", "[]"):
        (run / "config.json").write_text(config)
        with pytest.raises(UserError, match="config.json"):
            _recorded(run)
    (run / "config.json").write_text('{"config": {"precision": [1]}}')
    assert _recorded(run) is None


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("p.jsonl", '{"prompt": "a café"}\n'.encode("latin-1"), "line 1: not UTF-8"),
        ("p.txt", "a star\na café\n".encode("latin-1"), "line 2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a star"}\n{"prompt": "a blue', "line 2: no JSON"),
        ("p.jsonl", b'[{"prompt": "a star"}]\n', "line 1: must be a JSON object, is of type list"),
        ("p.jsonl", b"[" * 200_000, "line 1: no JSON (brackets within brackets"),
        ("p.jsonl", b'{"prompt": "a star"}\n{"prompt": 5}\n', "line 2: prompt=5: must be a text"),
        ("p.jsonl", b'{"prompt": "a \\ud83d star"}\n', r"line 1: prompt is no valid Unicode: a \ud83d star"),
        ("p.jsonl", b"", "holds no prompts"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_lists_of_prompts_that_cannot_be_read(here, name, data, said):
    (here / name).write_bytes(data)
    for words in (["data", "draw", "out", "--prompts", name], ["data", "encode", "fluxdb", name, "out"]):
        found = refused(*words)
        assert said in found and name in found
    assert not (here / "out").exists()


def test_lists_of_prompts_as_other_systems_write_them(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa star\r\n\r\na\u2028circle".encode())
    assert list(read_prompts(tmp_path / "p.txt")) == ["a star", "", "a\u2028circle"]
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a\u2028star"}\n{"prompt": null}\n\n{"id": 3}\n'.encode())
    assert list(read_prompts(tmp_path / "p.jsonl")) == ["a\u2028star", None, None]


def test_pictures_are_found_by_names_as_other_systems_spell_them(tmp_path):
    apart = unicodedata.normalize("NFD", "café.png")
    (tmp_path / "sub").mkdir()
    for name in (apart, "sub/a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    names = ["café.png", "sub\\a.png", "..\\a.png", "C:\\a.png", "x" * 300]
    lines = [json.dumps({"file_name": name, "text": "a star"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = Folder(tmp_path)
    items = [item for part in source.parts() for item in source.items(part)]
    assert [item.key for item in items if not isinstance(item, Problem)] == [apart, "sub/a.png", "x" * 300]
    assert all("leads out" in item.reason for item in items if isinstance(item, Problem)) and len(items) == 5


@pytest.mark.parametrize("values", [np.float32([[0, np.nan]] * 2), np.int32([[0, 2**20]] * 2)])
def test_tiff_pictures_with_odd_numbers(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match="not finite, or beyond 16 bits"):
        square(tmp_path / "a.tiff", 2)


@pytest.mark.parametrize(
    ("rank", "world"), [("1", ""), ("", "2"), ("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "x")]
)
def test_a_rank_without_a_world_is_refused(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world}: torchrun sets both"):
        rank_and_world()


def test_ranks_that_torchrun_tells(monkeypatch):
    for rank, world, found in (("", "", (0, 1)), ("", "1", (0, 1)), ("1", "2", (1, 2))):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert rank_and_world() == found
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "RANK=1" in refused("data", "encode", "folder", "pictures", "out")


# ------------------------------------------------------------------------------------------------------------
# Terminals
# ------------------------------------------------------------------------------------------------------------


def test_narrow_terminals_never_cut_numbers(monkeypatch):
    for width in (1, 20):
        monkeypatch.setattr(terminal.console, "_width", width)
        text = CliRunner().invoke(app, ["count", "--size", "lite"]).stdout
        assert "…" not in text and json.loads(CliRunner().invoke(app, ["count", "--size", "lite", "--json"]).stdout)
        assert [line for line in text.splitlines() if "total" in line][0].count(",") == 2


def test_pictures_are_saved_before_a_terminal_fails_to_name_them(here):
    found = CliRunner(charset="ascii").invoke(app, ["sample", "a star", "--num", "2", "--out", "Ж", *FAST])
    assert found.exit_code == 0 and r"\u0416/a-star-1.png" in found.stdout
    assert sorted(path.name for path in (here / "Ж").iterdir()) == ["a-star-0.png", "a-star-1.png"]


def test_whoever_stops_listening_is_told_nothing(monkeypatch):
    inner, closed = typer.Typer(), []
    inner.callback()(lambda: None)

    @terminal.command(inner, "speak")
    def speak() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(os, "dup2", lambda *handles: closed.append(handles))
    found = CliRunner().invoke(inner, ["speak"])
    assert found.exit_code == 1 and not found.output and closed[0][1] == 1


def test_endless_captions_do_not_fill_the_screen(here):
    found = CliRunner().invoke(app, ["sample", "a" * 100_000, *FAST])
    assert found.exit_code == 0 and len(found.stderr) < 10_000


def test_a_user_without_a_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_CACHE_HOME", "NITRO_E_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert files.cache_dir().name == "nitro-e-lite"
