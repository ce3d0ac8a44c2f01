"""The commands, on a tiny pipeline in the place of the shipped weights, and once for real in a fresh process."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny import build_tiny_pipeline
from typer.testing import CliRunner

import nitro_e_lite
from nitro_e_lite import load_pipeline
from nitro_e_lite.cli.app import app
from nitro_e_lite.cli.draw import DEMO_CAPTIONS, picture_paths
from nitro_e_lite.config import FACTS
from nitro_e_lite.evaluation.sensitivity import TIMES
from nitro_e_lite.model import flow
from nitro_e_lite.scenes.captions import unknown_words
from nitro_e_lite.scenes.geneval import load_prompts

PACKAGE = Path(nitro_e_lite.__file__).parent
FAST = ["--steps", "1", "--guidance", "0"]


@pytest.fixture
def run(monkeypatch, tmp_path, shipped):
    """Runs a command in an empty folder; checks the exit code."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str, code: int = 0):
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result

    return invoke


def only_json(result) -> dict:
    """The one object on standard output."""
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def test_help_names_every_command(run):
    text = run("--help").stdout
    for name in ("demo", "sample", "evaluate", "train", "doctor", "count", "benchmark"):
        assert f" {name} " in text
    text = run("train", "--help").stdout
    for name in ("base", "autoencoder", "language-model"):
        assert f" {name} " in text


# demo


def test_demo_saves_one_labelled_picture_and_says_where(run):
    text = run("demo", *FAST).stdout
    assert "Picture: outputs/demo.png" in text
    for part in ("load libraries", "sample", "decode", "total"):
        assert part in text
    with Image.open("outputs/demo.png") as picture:
        assert picture.text["steps"] == "1" and DEMO_CAPTIONS[0] in picture.text["captions"]
        assert picture.width > 4 * 64


def test_demo_json(run):
    result = only_json(run("demo", "--out", "a.png", "--json", *FAST))
    assert result["path"] == "a.png" and Path("a.png").is_file()
    assert result["total_seconds"] == pytest.approx(sum(result["seconds"].values()), abs=0.01)


def test_demo_refuses_other_formats_before_it_draws(run, shipped):
    shutil.rmtree(shipped)  # had it looked for weights first, the error would be another one
    assert "out: 'a.jpg' is no PNG" in run("demo", "--out", "a.jpg", code=2).stderr


def test_demo_captions_are_words_the_lite_model_knows():
    assert [word for caption in DEMO_CAPTIONS for word in unknown_words(caption)] == []


def test_first_demo_in_a_fresh_process_takes_less_than_a_minute(tmp_path):
    command = [sys.executable, "-m", "nitro_e_lite.cli", "demo", "--json"]
    before = os.times()
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    after = os.times()
    with Image.open(tmp_path / json.loads(output)["path"]) as picture:
        assert picture.width > 4 * 128
    # processor time, so that a busy machine does not fail the test
    assert after.children_user + after.children_system - before.children_user - before.children_system < 60


# sample


def test_sample_draws_what_the_library_draws(run):
    out = run("sample", "a red star", "--seed", "5", "--num", "2", "--shift", "2", *FAST).stdout.split()
    assert out == ["outputs/a-red-star-5.png", "outputs/a-red-star-6.png"]
    image = load_pipeline("lite", "cpu")("a red star", 1, 0, generator=torch.Generator().manual_seed(6)).images[0]
    with Image.open(out[1]) as saved:
        assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1
        assert saved.text["prompt"] == "a red star" and saved.text["seed"] == "6" and saved.text["model"] == "lite"
        assert saved.text["shift"] == "2.0"


def test_sample_json(run):
    result = only_json(run("sample", "a red star", "two blue hearts", "--out", "x.png", "--json", *FAST))
    assert [image["path"] for image in result["images"]] == ["x-0.png", "x-1.png"]
    assert result["steps"] == 1 and result["guidance"] == 0 and result["seconds"] > 0
    assert all(Path(image["path"]).is_file() for image in result["images"])


def test_sample_names_words_the_model_does_not_know(run):
    result = run("sample", "a red dog on a beach", *FAST)
    note = next(line for line in result.stderr.splitlines() if line.startswith("Note:"))
    assert "dog, beach" in note and "circle" in note
    assert "Note:" not in run("sample", "a red star", *FAST).stderr
    assert "never read: 圆, fog." in run("sample", "a red 圆", "--negative", "fog, a star", *FAST).stderr


def test_sample_keeps_pictures_whose_captions_are_alike(run):
    result = only_json(run("sample", "a red star", "A red star!", "--json", *FAST))
    paths = [image["path"] for image in result["images"]]
    assert paths == ["outputs/a-red-star-0.png", "outputs/a-red-star-0-2.png"]
    for path, prompt in zip(paths, ["a red star", "A red star!"], strict=True):
        with Image.open(path) as saved:
            assert saved.text["prompt"] == prompt


def test_sample_keeps_what_a_folder_holds(run):
    for _ in range(2):
        run("sample", "a red star", *FAST)
    other = run("sample", "a red star", "--steps", "2", "--guidance", "0").stdout.split()
    assert other == ["outputs/a-red-star-0-3.png"] and len(list(Path("outputs").iterdir())) == 3
    with Image.open("outputs/a-red-star-0.png") as first:
        assert first.text["steps"] == "1"


def test_sample_warns_of_a_caption_that_is_cut(run):
    result = run("sample", "a red star and " * 10 + "a blue square", *FAST)
    assert "Warning: caption cut to 16" in result.stderr and ".py" not in result.stderr


def test_picture_paths():
    assert picture_paths(Path("a.png"), ["x"], [3]) == [Path("a.png")]
    assert picture_paths(Path("a.png"), ["x", "x"], [3, 4]) == [Path("a-0.png"), Path("a-1.png")]
    assert picture_paths(Path("d"), ["A red, *big* star!", "!"], [3, 4]) == [
        Path("d/a-red-big-star-3.png"),
        Path("d/picture-4.png"),
    ]
    assert picture_paths(Path("v1.5"), ["红", "圆", "picture 0"], [0, 0, 2]) == [
        Path("v1.5/picture-0.png"),
        Path("v1.5/picture-0-2.png"),
        Path("v1.5/picture-0-2-2.png"),
    ]
    long = "a red star and " * 5
    assert len(set(picture_paths(Path("d"), [long + "a cross", long + "a heart", long], [0, 0, 0]))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a star", "--steps", "0"], "num_inference_steps: 0 is below 1"),
        (["a star", "--guidance", "-1"], "guidance_scale: -1"),
        (["a star", "--num", "0"], "num: 0 is below 1"),
        (["a star", "--seed", str(10**23)], f"seed: {10**23} is above {2**64 - 1}"),
        (["a star", "--seed", str(-(2**63) - 1)], f"seed: {-(2**63) - 1} is below {-(2**63)}"),
        (["a star", "--out", "pic.jpg"], "out: 'pic.jpg' is no PNG"),
        (["a star", "--out", "d/PIC.WebP"], "out: 'PIC.WebP' is no PNG"),
        (["a star", "--height", "30"], "height: 30 px does not fit"),
        (["a star", "--model", "heavy"], "model: 'heavy'"),
        (["a star", "--device", "tpuu"], "device: 'tpuu'"),
        (["a star", "--dtype", "int3"], "dtype: 'int3'"),
        (["a star", "--text-encoder", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(run, arguments, message):
    result = run("sample", *arguments, code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert not result.stdout and not list(Path().iterdir())


def test_damaged_weights_end_in_one_line(run, shipped):
    (shipped / "vae" / "config.json").write_text("{}")
    assert "contents differ" in run("sample", "a star", code=2).stderr


def test_debug_variable_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("NITRO_E_DEBUG", "1")
    result = CliRunner().invoke(app, ["sample", "a star", "--steps", "0"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("arguments", [["demo"], ["benchmark", "--batch", "1", "--repeats", "1"], ["export"]])
def test_every_command_that_draws_takes_a_shift(run, prompt_file, arguments, monkeypatch):
    """`demo`, `benchmark` and `export` could not be told one, so they drew other pictures than `sample --shift`."""
    drawn = []
    monkeypatch.setattr(flow, "shift_sigmas", lambda sigmas, shift: drawn.append(shift) or sigmas)
    more = ["geneval", prompt_file, "pictures"] if arguments == ["export"] else []
    found = only_json(run(*arguments, *more, "--shift", "2.5", "--json", *FAST))
    assert found["shift"] == 2.5 and drawn and set(drawn) == {2.5}


# evaluate


@pytest.fixture
def prompt_file(tmp_path):
    lines = [json.dumps(prompt.metadata()) for prompt in load_prompts()[::100]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "prompts.jsonl")


def test_evaluate_json(run, prompt_file):
    result = only_json(run("evaluate", "--prompts", prompt_file, "--json", "--out", "card.json", *FAST))
    assert {"overall", "low", "high", "categories", "images", "seconds"} <= set(result)
    assert result["images"] == 2 * 3 and result["prompt_list"] == "prompts.jsonl"
    assert json.loads(Path("card.json").read_text()) == result
    again = run("evaluate", "--prompts", prompt_file, "--against", "card.json", *FAST).stdout
    assert "picture by picture: +0.000 (+0.000 to +0.000)" in again
    other = run("evaluate", "--prompts", prompt_file, "--fp8", "--against", "card.json", *FAST, code=2).stderr
    assert "card.json was drawn with dtype=float32, this with dtype=bfloat16" in other  # two things would differ
    half = [*FAST, "--dtype", "bfloat16"]
    run("evaluate", "--prompts", prompt_file, "--out", "half.json", *half)
    other = run("evaluate", "--prompts", prompt_file, "--fp8", "--against", "half.json", *half, "--shift", "2", code=2)
    assert "half.json was drawn with shift=1.0, this with shift=2.0" in other.stderr
    Path("half.json").write_text(json.dumps(json.loads(Path("half.json").read_text()) | {"fp8": "weight_only"}))
    other = run("evaluate", "--prompts", prompt_file, "--fp8", "--against", "half.json", *half, code=2).stderr
    assert "half.json was drawn in FP8 too" in other
    few = run("evaluate", "--prompts", prompt_file, "--against", "card.json", *FAST, "--seeds", "1").stdout
    assert "picture by picture: +0.000 (+0.000 to +0.000)" in few  # the pictures that both have
    Path("other.json").write_text(json.dumps(json.loads(Path("card.json").read_text()) | {"seeds": [4, 5]}))
    other = run("evaluate", "--prompts", prompt_file, "--against", "other.json", *FAST, code=2).stderr
    assert "seeds differs, [0, 1] and [4, 5]" in other


def test_evaluate_table(run, prompt_file):
    text = run("evaluate", "--prompts", prompt_file, "--seeds", "1", *FAST).stdout
    assert "overall" in text and "single_object" in text and "3 pictures" in text


def test_evaluate_takes_other_encoders(run, prompt_file, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "same")
    other = load_pipeline("lite", "cpu")
    other.text_encoder.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    hashes = []
    for encoder in ("same", "other"):
        where = ["--text-encoder", str(tmp_path / encoder), "--vae", str(tmp_path / encoder / "vae")]
        card = only_json(run("evaluate", *where, "--prompts", prompt_file, "--seeds", "1", "--json", *FAST))
        hashes.append(card["weights_sha256"])
    assert hashes[0] != hashes[1]
    assert "nowhere" in run("evaluate", "--text-encoder", "nowhere", code=2).stderr


def test_evaluate_names_the_line_that_is_wrong(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a star"}\n')
    assert "bad.jsonl, line 1" in run("evaluate", "--prompts", str(tmp_path / "bad.jsonl"), code=2).stderr
    assert "split='nonsense'" in run("evaluate", "--split", "nonsense", code=2).stderr
    missing = run("evaluate", "--prompts", "nowhere.jsonl", code=2).stderr.strip()
    assert missing == "Error: nowhere.jsonl: No such file or directory"


# count, benchmark, doctor


def test_count_json(run):
    result = only_json(run("count", "--json"))
    assert result["parameters"] == 302_449_952 and round(result["tflops"], 4) == 0.0775
    assert sum(part["parameters"] for part in result["parts"].values()) == result["parameters"]


def test_count_table(run):
    text = run("count").stdout
    assert "302,449,952" in text and "0.0775" in text
    assert "size: 'huge'" in run("count", "--size", "huge", code=2).stderr


def test_benchmark_times_the_pipeline_and_the_transformer(run):
    result = only_json(run("benchmark", "--batch", "2", "--repeats", "1", "--json", *FAST))
    (row,) = result["rows"]
    assert row["batch"] == 2 and row["images_per_second"] == pytest.approx(2 / row["seconds"])
    text = run("benchmark", "--transformer", "smoke", "--batch", "1", "--repeats", "1").stdout
    assert "forward backward seconds" in text


def test_sensitivity_json_and_table(run, shipped):
    result = json.loads(run("sensitivity", "--pairs", "2", "--json").stdout)
    assert result["pairs"] == 2 and len(result["readings"]) == len(FACTS) * len(TIMES)
    assert "rise" in result["readings"][0]
    assert "places" in run("sensitivity", "--pairs", "2").stdout


def test_doctor_is_content_with_this_installation(run):
    result = only_json(run("doctor", "--json"))
    assert result["ok"] and not result["problems"]
    assert result["weights"]["lite"] > 1000
    assert {row["name"] for row in result["packages"] if row["ok"]} >= {"torch", "diffusers", "pytest"}
    assert "All is there." in run("doctor").stdout


def test_doctor_names_damaged_weights(run, shipped):
    (shipped / "vae" / "config.json").write_text("{}")
    result = run("doctor", code=1)
    assert "config.json: contents differ" in result.stdout


# train


def test_train_refuses_what_it_does_not_know(run):
    assert "preset=base/huge: unknown" in run("train", "base", "--preset", "huge", code=2).stderr
    assert "unknown field 'stepps'" in run("train", "base", "--set", "stepps=3", code=2).stderr
    assert "unknown field 'stepps'" in run("train", "autoencoder", "--set", "stepps=3", code=2).stderr
    assert "unknown field 'stepps'" in run("train", "language-model", "--set", "stepps=3", code=2).stderr


def test_train_autoencoder_leaves_weights(run):
    small = ["steps=1", "batch_size=2", "statistics_scenes=2", "image_size=32"]
    arguments = [word for one in small for word in ("--set", one)]
    text = run("train", "autoencoder", "--run-dir", "ae", *arguments).stdout
    assert "Weights: ae/final/vae" in text and Path("ae/final/vae/config.json").is_file()


def test_folder_names_are_free_in_diffusers():
    """diffusers' loader looks for a class's folder among its own pipelines first."""
    from diffusers import pipelines

    rooms = PACKAGE.glob("*/__init__.py")
    assert [room.parent.name for room in rooms if hasattr(pipelines, room.parent.name)] == []


def test_importing_the_package_imports_no_torch():
    code = "import sys, nitro_e_lite, nitro_e_lite.cli.app, nitro_e_lite.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def readme_commands() -> list[str]:
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", readme, flags=re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("nitro-e ")]


@pytest.mark.parametrize("line", readme_commands())
def test_readme_command_exists(line):
    found, words = typer.main.get_command(app), shlex.split(line)[1:]
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    assert not hasattr(found, "commands"), f"{line!r} names no command"
    options = {option for parameter in found.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options
