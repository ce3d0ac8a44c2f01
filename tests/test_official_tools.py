"""Layouts of the official tools, how an export continues, what is wrong first, and the tools' outputs read back."""

import json

import numpy as np
import pytest
from PIL import Image

from nitro_e_lite.errors import NotWritten, UserError
from nitro_e_lite.evaluation import cards, geneval_lite, official_geneval, official_tools
from nitro_e_lite.evaluation.official_tools import STYLES, check, export, read_scores, targets


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Benchmarks of a few prompts in the form of the real ones."""
    monkeypatch.setattr(official_tools, "PICTURES", {"dpg": 2, "hpsv2": 8})
    (tmp_path / "dpg").mkdir()
    (tmp_path / "hpsv2").mkdir()
    for name in ("0", "partiprompts97"):
        (tmp_path / "dpg" / f"{name}.txt").write_text("two red stars\n")
    for style in STYLES:
        (tmp_path / "hpsv2" / f"{style}.json").write_text(json.dumps(["a red star", "a blue square"]))
    (tmp_path / "image_reward.txt").write_text("a red star\n\na blue square\n")
    (tmp_path / "fid.txt").write_text("a red star\na blue square\n")
    return tmp_path


@pytest.fixture
def quick(tiny_pipeline):
    return tiny_pipeline, tiny_pipeline.sampler(steps=1, guidance=1)


def test_layouts_are_exact_and_a_stopped_export_continues(prompts, quick, tmp_path):
    pipeline, sampler = quick
    root, wanted = tmp_path / "out", targets("dpg", prompts / "dpg")
    assert export(pipeline, "dpg", wanted, root, sampler, size=32, resize="lanczos") == 2
    assert sorted(path.name for path in root.iterdir()) == ["0.png", "partiprompts97.png"]  # and no lock, no manifest
    kept = (root / "0.png").stat().st_mtime_ns
    before = (root / "partiprompts97.png").read_bytes()
    (root / "partiprompts97.png").unlink()
    (root / ".torn.tmp").write_bytes(b"half")
    assert export(pipeline, "dpg", wanted, root, sampler, size=32, resize="lanczos") == 2
    assert (root / "0.png").stat().st_mtime_ns == kept and (root / "partiprompts97.png").read_bytes() == before
    square = Image.open(root / "0.png")
    assert square.size == (64, 64) and square.crop((0, 0, 32, 32)).tobytes() != square.crop((32, 0, 64, 32)).tobytes()
    official_tools._write(tmp_path / "square.png", [Image.new("RGB", (4, 4), (50 * k, 0, 0)) for k in range(4)])
    square = Image.open(tmp_path / "square.png")  # row by row, as the tool cuts it
    assert [square.getpixel(place)[0] for place in ((0, 0), (7, 3), (3, 7), (7, 7))] == [0, 50, 100, 150]
    with pytest.raises(ValueError, match="holds pictures with steps 1, not 2"):
        export(pipeline, "dpg", wanted, root, pipeline.sampler(steps=2, guidance=1), size=32, resize="lanczos")
    for odd in ({"size": 32}, {"resize": "lanczos"}):
        with pytest.raises(ValueError, match="name one of bicubic, lanczos with a size, or neither"):
            export(pipeline, "dpg", wanted, root, sampler, **odd)

    styles = targets("hpsv2", prompts / "hpsv2")
    assert export(pipeline, "hpsv2", styles, tmp_path / "hps", sampler) == 8
    assert sorted(path.name for path in (tmp_path / "hps").iterdir()) == sorted(STYLES)
    assert Image.open(tmp_path / "hps" / "photo" / "00001.jpg").format == "JPEG"
    asked = targets("image_reward", prompts / "image_reward.txt")
    assert export(pipeline, "image_reward", asked, tmp_path / "ir", sampler) == 2
    rows = [json.loads(line) for line in (tmp_path / "ir.prompts.jsonl").read_text().splitlines()]
    assert rows == [{"path": "00000.png", "prompt": "a red star"}, {"path": "00001.png", "prompt": "a blue square"}]


def test_the_layout_of_geneval_is_exact_and_a_stopped_export_continues(quick, tmp_path):
    pipeline, sampler = quick
    metadata = [{"tag": "colors", "include": [], "prompt": f"a {color} star"} for color in ("red", "blue", "green")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metadata))
    root, wanted = tmp_path / "out", targets("geneval", tmp_path / "prompts.jsonl")
    assert export(pipeline, "geneval", wanted, root, sampler) == 12
    samples = [f"{place:05d}/samples/{k:04d}.png" for place in range(3) for k in range(4)]
    notes = {f"{place:05d}/metadata.jsonl": entry for place, entry in enumerate(metadata)}
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*")) == sorted([*samples, *notes])
    assert all(json.loads((root / name).read_text()) == entry for name, entry in notes.items())
    assert json.loads((tmp_path / "out.export.json").read_text())["seeds"] == [0, 1, 2, 3]
    kept, gone = root / samples[1], root / samples[5]
    before, drawn_at = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    assert export(pipeline, "geneval", wanted, root, sampler) == 12
    assert gone.read_bytes() == before and kept.stat().st_mtime_ns == drawn_at
    (one,) = geneval_lite.draw(pipeline, [(metadata[1]["prompt"], geneval_lite.picture_seed(1, 1))], sampler)
    assert np.array_equal(np.asarray(Image.open(gone)), one)
    metadata[2]["tag"] = "counting"  # the same words, judged otherwise
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metadata))
    with pytest.raises(ValueError, match="holds pictures with prompts_sha256"):
        export(pipeline, "geneval", targets("geneval", tmp_path / "prompts.jsonl"), root, sampler)
    (root / "00001" / "metadata.jsonl").write_text((root / "00000" / "metadata.jsonl").read_text())
    with pytest.raises(ValueError, match="00001/metadata.jsonl is of another prompt"):
        check("geneval", wanted, root)
    (root / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="00001/metadata.jsonl is missing"):
        check("geneval", wanted, root)


@pytest.fixture
def folder(prompts, tmp_path):
    """A whole folder for a FID, drawn by nobody."""
    wanted = targets("fid", prompts / "fid.txt")
    for k, one in enumerate(wanted):
        (tmp_path / "whole").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (k, 0, 0)).save(tmp_path / "whole" / one.path)
    assert check("fid", wanted, tmp_path / "whole") == 2
    return tmp_path / "whole", wanted


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "notes.txt").write_text(""), "notes.txt does not belong here, and fid would read it"),
        (lambda root: (root / ".lock").write_text(""), ".lock does not belong here"),
        (lambda root: (root / "00001.png").unlink(), "00001.png is missing, the first of 1"),
        (lambda root: (root / "00001.png").write_bytes(b"\x89PNG half"), "00001.png cannot be read"),
        (lambda root: Image.new("RGB", (16, 8)).save(root / "00000.png"), "00000.png has 16 x 8 pixels"),
        (
            lambda root: Image.new("RGB", (8, 8)).save(root / "00001.png"),
            "00001.png has 8 pixels a side, 00000.png has 16",
        ),
        (lambda root: Image.new("RGB", (16, 16)).save(root / "00001.png", "JPEG"), "00001.png is a JPEG"),
    ],
)
def test_the_first_thing_wrong_is_named(folder, spoil, message):
    root, wanted = folder
    spoil(root)
    with pytest.raises(ValueError, match=message):
        check("fid", wanted, root)


def test_prompts_are_counted(prompts):
    (prompts / "dpg" / "0.txt").unlink()
    with pytest.raises(ValueError, match="1 prompts; dpg has 2"):
        targets("dpg", prompts / "dpg")
    (prompts / "hpsv2" / "photo.json").write_text('["a red star"]')
    with pytest.raises(ValueError, match="photo has 1"):
        targets("hpsv2", prompts / "hpsv2")
    with pytest.raises(FileNotFoundError, match="there are no prompts"):
        targets("fid", prompts / "nothing")


def test_files_that_hold_something_else_are_named(prompts, quick, tmp_path):
    def written(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    for name, data, message in [
        ("p.jsonl", b'{"prompt": 5}\n', "line 1: prompt=5: must be a text"),
        ("p.jsonl", b'{"words": "a star"}\n', "has words, none of"),
        ("p.txt", b"caf\xe9", "line 1: not UTF-8"),
    ]:
        with pytest.raises(UserError, match=message):
            targets("fid", written(name, data))
    for data, message in [(b'["a', "no JSON"), (b"[5]", "a JSON list of prompts"), (b"caf\xe9", "not UTF-8")]:
        written("hpsv2/anime.json", data)
        with pytest.raises(UserError, match=f"anime.json: .*{message}"):
            targets("hpsv2", prompts / "hpsv2")
    fid, asked = targets("fid", prompts / "fid.txt"), targets("image_reward", prompts / "image_reward.txt")
    for tool, wanted, data, message in [
        ("fid", fid, b"{}", "fid=None: must be a number"),
        ("fid", fid, b'{"fid": 1.5, "n": "2"}', "n='2': must be a number"),
        ("image_reward", asked, b'{"path": "00000.png", "score": "good"}\n', "score='good': must be a number"),
        ("image_reward", asked, b"", "no score of 00000.png"),
        ("dpg", targets("dpg", prompts / "dpg"), b"caf\xe9", "not UTF-8"),
        ("geneval", [], b'{"tag": [1], "prompt": "a", "correct": true, "metadata": 1}\n', "line 1: .* tag"),
    ]:
        with pytest.raises(UserError, match=message):
            read_scores(tool, written("printed", data), wanted)
    for size in (0, 10**9):
        with pytest.raises(UserError, match=f"size.*{size}"):
            export(quick[0], "fid", fid, tmp_path / "out", quick[1], size, "bicubic")
    assert not (tmp_path / "out").exists()


DPG = """/x/0.png, 1.0, 0.5, 0.5, 1.0, 0.75
/x/partiprompts97.png, 0.0, 0.5, 0.0, 0.5, 0.25
Model: x
L1 category scores:
\tentity: 50.0
DPG-Bench score: 50.0
"""
HPS = "-----------benchmark score ---------------- \n" + "".join(
    f"runs {style:<15} {score} \t 0.1234\n" for style, score in zip(STYLES, (28.0, 27.0, 26.0, 2700.0), strict=True)
)


def test_outputs_of_the_tools_are_read_and_counted(prompts, tmp_path):
    (tmp_path / "dpg.txt").write_text(DPG)
    wanted = targets("dpg", prompts / "dpg")
    whole = {"overall": 50, "images": 2, "images_expected": 2, "patched": True}
    assert read_scores("dpg", tmp_path / "dpg.txt", wanted) == whole
    assert read_scores("dpg", tmp_path / "dpg.txt", wanted, tmp_path / "x") == whole
    with pytest.raises(ValueError, match="scores /x/0.png, which is not in .*other"):
        read_scores("dpg", tmp_path / "dpg.txt", wanted, tmp_path / "other")
    (tmp_path / "dpg.txt").write_text(DPG.split("\n", 1)[1])  # the row that the tool drops as published
    with pytest.raises(ValueError, match=r"no score of 0.png, the first of 1; the mean would be of fewer"):
        read_scores("dpg", tmp_path / "dpg.txt", wanted)
    (tmp_path / "hps.txt").write_text(HPS)
    found = read_scores("hpsv2", tmp_path / "hps.txt", targets("hpsv2", prompts / "hpsv2"))
    assert found["overall"] == 27 and found["categories"]["photo"] == 27 and found["images"] == 8
    (tmp_path / "ir.jsonl").write_text('{"path": "00000.png", "score": 1.5}\n{"path": "00001.png", "score": -0.5}\n')
    asked = targets("image_reward", prompts / "image_reward.txt")
    assert read_scores("image_reward", tmp_path / "ir.jsonl", asked)["overall"] == 0.5
    with open(tmp_path / "ir.jsonl", "a") as file:
        file.write('{"path": "00000.png", "score": 9}\n')
    with pytest.raises(ValueError, match="3 scores of 2 pictures; each must be there once"):
        read_scores("image_reward", tmp_path / "ir.jsonl", asked)
    (tmp_path / "fid.json").write_text('{"fid": 12.5, "n": 3, "tool": "clean-fid 0.1.35", "resize": "clean"}')
    with pytest.raises(ValueError, match="3 pictures were scored, 2 exported"):
        read_scores("fid", tmp_path / "fid.json", targets("fid", prompts / "fid.txt"))


def test_geneval_is_summed_up_as_its_own_script_does(tmp_path):
    """By hand after summary_scores.py: tags in order of appearance, means over pictures, overall over tags."""
    metadata = [
        {"tag": tag, "include": [], "prompt": prompt}
        for tag, prompt in (("colors", "a red dog"), ("counting", "two cats"), ("counting", "three cats"))
    ]
    marks = {"a red dog": [1, 1], "two cats": [0, 1], "three cats": [0, 0]}
    rows = [
        {"tag": one["tag"], "prompt": one["prompt"], "correct": bool(mark), "metadata": json.dumps(one)}
        for one in metadata
        for mark in marks[one["prompt"]]
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text("".join(json.dumps(row | {"correct": "no"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"line 1: must be an object with correct \(true or false\)"):
        official_geneval.read_results(path, metadata, 2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = official_geneval.read_results(path, metadata, 2)
    assert found["categories"] == {"colors": 1.0, "counting": 0.25} and found["overall"] == 0.625
    assert found["correct_images"] == 0.5 and found["correct_prompts"] == pytest.approx(2 / 3)
    assert found["images"] == found["images_expected"] == 6 and found["prompts"] == 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(ValueError, match="1 results of 'three cats', must be 2"):
        official_geneval.read_results(path, metadata, 2)
    for k, row in enumerate(rows):
        row["filename"] = f"../runs/A/{k // 2:05d}/samples/{k % 2:04d}.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert official_geneval.read_results(path, metadata, 2, "A") == found
    with pytest.raises(ValueError, match="scores ../runs/A/00000/samples/0000.png, which is not in a folder B"):
        official_geneval.read_results(path, metadata, 2, "B")
    path.write_text("".join(json.dumps(row | {"filename": rows[0]["filename"]}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="0000.png is there more than once; were results added to an older file"):
        official_geneval.read_results(path, metadata, 2, "A")
    entry = {"tag": "counting", "include": [], "prompt": "two cats"}  # asked twice, as a list of one's own may
    rows = [{"tag": "counting", "prompt": "two cats", "correct": k < 3, "metadata": "{}"} for k in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert official_geneval.read_results(path, [entry] * 2, 2)["overall"] == 0.75


def test_scores_become_a_card_with_the_recipe_of_the_pictures(prompts, quick, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from nitro_e_lite.cli.app import app

    pipeline, sampler = quick
    wanted = targets("fid", prompts / "fid.txt")
    export(pipeline, "fid", wanted, tmp_path / "pictures", sampler)
    (tmp_path / "fid.json").write_text('{"fid": 12.5, "n": 2, "tool": "clean-fid 0.1.35", "resize": "clean"}')
    places = [str(tmp_path / name) for name in ("fid.json", "fid.txt", "pictures")]
    found = CliRunner().invoke(app, ["scores", "fid", *places, "--out", str(tmp_path / "card.json")])
    assert found.exit_code == 0, found.output
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["overall"] == 12.5 and card["images"] == 2 and card["steps"] == 1 and card["resize"] == "clean"
    assert card["export_resize"] == "none"  # it decides a FID too
    assert "below 2,048 pictures the covariance is singular" in found.stderr
    cards.check(card)
    with monkeypatch.context() as patch:  # the score is told before a full disk takes the card
        patch.setattr(cards, "write", lambda *_: (_ for _ in ()).throw(NotWritten("card.json: could not be written")))
        found = CliRunner().invoke(app, ["scores", "fid", *places, "--out", str(tmp_path / "card.json")])
    assert found.exit_code == 2 and "overall" in found.stdout and "12.5" in found.stdout
    with pytest.raises(ValueError, match="made from 1 pictures, 2 asked for"):
        cards.check(card | {"images": 1})
    (tmp_path / "pictures" / "00001.png").unlink()  # a tool would sum up what is left
    with pytest.raises(ValueError, match="00001.png is missing, the first of 1"):
        official_tools.make_card("fid", wanted, {}, tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match="it tells what the pictures are"):
        official_tools.make_card("fid", wanted, {}, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds pictures for fid, not for dpg"):
        official_tools.make_card("dpg", wanted, {}, tmp_path / "pictures")
    with pytest.raises(ValueError, match="pictures of other prompts"):
        official_tools.make_card("fid", wanted[::-1], {}, tmp_path / "pictures")
