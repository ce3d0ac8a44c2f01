"""Raw pictures to shards: what is stored, what is reported, and that a kill or another number of processes changes
nothing."""

import copy
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_flux import build_tiny_flux
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.cli.data import local_device
from nitro_e_lite.data.check import check
from nitro_e_lite.data.precompute import Encoding, drawn_source, open_source
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch, LatentDataset, sidecars
from nitro_e_lite.data.sources import Folder, square
from nitro_e_lite.errors import Unusable, UserError
from nitro_e_lite.inference import encoders
from nitro_e_lite.inference.encoders import Encoders, LatentStats
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.inference.vision import VisionEncoder

SIZE, COUNT = 64, 22


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Own pictures, two of them broken, one without a caption."""
    folder, lines = tmp_path_factory.mktemp("raw"), []
    for k in range(COUNT):
        pixels = np.random.default_rng(k).integers(0, 255, (70 + k, 66, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
        lines.append({"file_name": f"{k:02d}.png", "captions": [f"a red star {k}", f"ein Stern № {k}"]})
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:500])
    (folder / "11.png").unlink()
    lines[17]["captions"] = []
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


GOOD = [k for k in range(COUNT) if k not in (5, 11, 17)]


@pytest.fixture(scope="module")
def models(tiny_pipeline):
    p = tiny_pipeline
    stats = LatentStats(p.config.latents_mean, p.config.latents_std)
    return Encoders(p.vae, p.tokenizer, p.text_encoder, stats, 16)


@pytest.fixture(scope="module")
def vision():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Dinov2Config(patch_size=4, image_size=64, mlp_ratio=2, **sizes)
    return VisionEncoder(Dinov2Model(config).eval().requires_grad_(False))


def encode(raw, models, out, **options):
    options = {"size": SIZE, "batch": 3, "shard_rows": 6, "threads": 2} | options
    return Encoding(Folder(raw), models, out, **options).run()


def files(folder):
    """Contents of the data set's files."""
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module")
def whole(raw, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "whole"
    result = encode(raw, models, out)
    assert result["rows"] == len(GOOD) and result["skipped"] == 3 and result["rows_per_second"] > 0
    return out


def test_rows_are_the_encoded_pictures(raw, models, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = LatentDataset(whole, models.image_fingerprint)
        batch = data.batch(range(len(GOOD)))
    assert len(data) == len(GOOD) and data.shape == (4, 16, 16)
    assert batch.captions == [[f"a red star {k}", f"ein Stern № {k}"] for k in GOOD]
    pictures = np.stack([square(raw / f"{k:02d}.png", SIZE) for k in GOOD])
    torch.testing.assert_close(batch.latents, models.encode_images(pictures), rtol=2e-3, atol=2e-3)


def test_what_gives_no_row_is_reported_with_its_reason(whole):
    states = sidecars(whole)
    left_out = {key: (reason, count) for state in states.values() for key, reason, count in state["skipped"]}
    assert left_out == {
        "05.png": ("picture cannot be read (OSError)", 1),
        "11.png": ("picture is missing", 1),
        "17.png": ("caption is missing or empty", 1),
    }
    assert sum(state["sources"].get("folder", 0) for state in states.values()) == len(GOOD)
    assert [state["end"] for name, state in states.items() if name.startswith("lines")] == [False, False, False, True]


def test_any_number_of_processes_writes_the_same(raw, models, whole, tmp_path, monkeypatch):
    world = 3
    monkeypatch.setattr("nitro_e_lite.data.sources.LINES", 8)
    encode(raw, models, tmp_path / "one")
    for rank in reversed(range(world)):
        encode(raw, models, tmp_path / "many", rank=rank, world=world)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    for rank in range(world):  # nothing is left to do, for another number of processes either
        assert encode(raw, models, tmp_path / "many", rank=rank, world=4)["rows"] == 0


def test_features_are_those_of_the_encoders(raw, models, vision, tmp_path):
    encode(raw, models, tmp_path / "out", text=True, vision=vision)
    batch = LatentDataset(tmp_path / "out", models.image_fingerprint).batch(range(len(GOOD)))
    assert batch.captions == [[f"a red star {k}"] for k in GOOD]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = models.encode_text([texts[0] for texts in batch.captions])
    torch.testing.assert_close(batch.text.float(), text, rtol=2e-3, atol=2e-3)
    pictures = np.stack([square(raw / f"{k:02d}.png", SIZE) for k in GOOD])
    torch.testing.assert_close(batch.vision.float(), vision.encode(pictures), rtol=2e-3, atol=2e-3)
    notes = [
        state["notes"]["further caption left out"] for state in sidecars(tmp_path / "out").values() if state["rows"]
    ]
    assert sum(notes) == len(GOOD)
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    data.leave_out("vision")
    less = data.batch(range(len(GOOD)))
    assert less.vision is None and torch.equal(less.text, batch.text) and torch.equal(less.latents, batch.latents)


def test_pictures_that_encode_to_nan_are_left_out(raw, models, tmp_path):
    class Overflowing(Encoders):
        def encode_images(self, images):
            latents = super().encode_images(images)
            latents[0] = float("inf")
            return latents

    broken = Overflowing(**{name: getattr(models, name) for name in Encoders.__dataclass_fields__})
    result = encode(raw, broken, tmp_path / "out", batch=6, shard_rows=99)
    assert result["rows"] == len(GOOD) - 4 and result["skipped"] == 3 + 4
    reasons = [r for state in sidecars(tmp_path / "out").values() for _, r, _ in state["skipped"]]
    assert reasons.count("encoded to numbers that are not finite") == 4


def test_another_recipe_is_not_mixed_in(raw, models, vision, whole, tmp_path):
    with pytest.raises(ValueError, match=r"shape was \[4, 16, 16\] and is \[4, 32, 32\] now"):
        encode(raw, models, whole, size=128)
    with pytest.raises(ValueError, match="arrays was"):
        encode(raw, models, whole, text=True)
    other = tmp_path / "captions.jsonl"  # another list of as many lines: it was taken for this one, and "done"
    other.write_text((raw / "captions.jsonl").read_text(encoding="utf-8").replace("Stern", "Kreis"), encoding="utf-8")
    with pytest.raises(ValueError, match="digest was"):
        encode(other, models, whole)
    with pytest.raises(ValueError, match="size=65: must be a multiple of 4"):
        encode(raw, models, whole, size=65)
    with pytest.raises(ValueError, match="batch=0"):
        encode(raw, models, whole, batch=0)


def test_a_lost_or_cut_shard_is_made_again(raw, models, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    path = tmp_path / "copy" / "shards" / "lines-000000000-00001.arrow"
    path.write_bytes(path.read_bytes()[:-10])
    encode(raw, models, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(whole)


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from tiny import build_tiny_pipeline
from nitro_e_lite.data.precompute import Encoding
from nitro_e_lite.inference.encoders import Encoders
from nitro_e_lite.inference.encoders import LatentStats
from nitro_e_lite.data.sources import Folder

p = build_tiny_pipeline()
models = Encoders(p.vae, p.tokenizer, p.text_encoder, LatentStats(p.config.latents_mean, p.config.latents_std), 16)
encoding = Encoding(Folder(sys.argv[2]), models, sys.argv[3], size=64, batch=3, shard_rows=6, threads=2)
fast = encoding._encode
def slow(*arguments):
    rows = fast(*arguments)
    time.sleep(0.5)
    return rows
encoding._encode = slow
encoding.run()
"""


def test_kill_loses_the_unfinished_shard_only(raw, models, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(raw), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    shards = out / "shards"
    deadline = time.monotonic() + 300
    while not [*shards.glob("*-00000.json"), *shards.glob("*-00001.*.partial")][1:] and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = sidecars(out)
    assert list(done) == ["lines-000000000-00000"]
    stamp = (shards / "lines-000000000-00000.arrow").stat().st_mtime_ns
    with pytest.warns(UserWarning, match="0 of 2 parts"):
        assert len(LatentDataset(out, models.image_fingerprint)) == 6  # what is there can be read
    result = encode(raw, models, out)
    assert result["rows"] == len(GOOD) - 6
    assert (shards / "lines-000000000-00000.arrow").stat().st_mtime_ns == stamp
    assert LatentDataset(out, models.image_fingerprint).batch(range(len(GOOD))).captions[6:] == [
        [f"a red star {k}", f"ein Stern № {k}"] for k in GOOD[6:]
    ]
    assert not list(shards.glob("*.partial"))


def test_two_at_once_do_not_write_the_same_parts(raw, models, tmp_path):
    class Slow(Encoders):
        """While it encodes, others try."""

        def encode_images(self, images):
            for rank, world in () if said else ((0, 2), (0, 1), (1, 3)):
                with pytest.raises(UserError) as found:
                    encode(raw, models, out, rank=rank, world=world)
                said.append(str(found.value))
            encode(raw, models, out, rank=1, world=2)  # the other half is the other process's
            return super().encode_images(images)

    out, said = tmp_path / "out", []
    slow = Slow(**{name: getattr(models, name) for name in Encoders.__dataclass_fields__})
    assert encode(raw, slow, out, world=2)["rows"] == len(GOOD)
    assert said[0].endswith("process 0 of 2 is writing there already; stop it or let it end")
    assert "2 processes share the work there, this is one of 1" in said[1] and "one of 3" in said[2]
    assert encode(raw, models, out)["rows"] == 0  # it ended, and with it what it held


def test_a_whole_batch_is_decoded_while_the_one_before_is_encoded(raw, models, tmp_path, monkeypatch):
    begun, ready = [], []

    class Watching(Encoders):
        def encode_images(self, images):
            deadline = time.monotonic() + 5
            while not ready and len(begun) < 16 and time.monotonic() < deadline:
                time.sleep(0.01)
            ready.append(len(begun))
            return super().encode_images(images)

    monkeypatch.setattr("nitro_e_lite.data.precompute.square", lambda *a: [begun.append(1), square(*a)][1])
    watching = Watching(**{name: getattr(models, name) for name in Encoders.__dataclass_fields__})
    encode(raw, watching, tmp_path / "out", batch=8, shard_rows=99, threads=1)
    assert ready[0] >= 16  # it was 13


def test_pictures_are_stored_for_a_vision_model_to_look_at(raw, models, vision, tmp_path):
    encode(raw, models, tmp_path / "out", pictures=48)
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    batch = data.batch([7, 0, 7], images=True)
    assert data.has_pictures and batch.images.shape == (3, 48, 48, 3) and torch.equal(batch.images[0], batch.images[2])
    assert data.batch([0]).images is None
    for place, k in ((0, GOOD[7]), (1, GOOD[0])):
        wanted = Image.fromarray(square(raw / f"{k:02d}.png", SIZE)).resize((48, 48), Image.Resampling.BICUBIC)
        off = np.abs(batch.images[place].numpy().astype(int) - np.asarray(wanted))
        assert off.mean() < 10  # of noise, which JPEG likes least; another picture is 60 off
    with pytest.raises(ValueError, match="holds no pictures; nitro-e data encode --pictures"):
        encode(raw, models, tmp_path / "none")
        LatentDataset(tmp_path / "none", None).batch([0], images=True)
    with pytest.raises(ValueError, match="other columns"):
        LatentDataset([tmp_path / "out", tmp_path / "none"], None)
    with pytest.raises(ValueError, match="pictures=99: must be 1 to size=64"):
        encode(raw, models, tmp_path / "large", pictures=99)
    shard = data.chunks[0]
    at, _ = shard.layout.strings["picture"].data
    with open(shard.shard.path, "rb+") as file:
        file.seek(at)
        file.write(b"?" * 9)  # where the first picture begins
    with pytest.warns(UserWarning, match="picture cannot be read"):
        again = data.batch([7, 0], images=True)
    assert torch.equal(again.images[0], batch.images[0]) and again.captions[1] != batch.captions[1]


# the command


def test_command_encodes_and_continues(raw, tiny_folder, shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copy(save_stats(tiny_folder, tmp_path), shipped / "vae" / "latent_stats.json")
    arguments = [
        "data",
        "encode",
        "folder",
        str(raw),
        str(tmp_path / "out"),
        "--size",
        "64",
        "--text",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == len(GOOD) and found["skipped"] == 3 and found["world"] == 1
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, arguments)
    assert "Process 1 of 2: 0 rows" in result.stdout
    result = CliRunner().invoke(app, ["data", "encode", "tapes", str(raw), str(tmp_path / "x")])
    assert result.exit_code == 2 and "kind='tapes'" in result.stderr


def save_stats(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "model_index.json").read_text())
    stats = LatentStats(config["latents_mean"], config["latents_std"])
    (tmp_path / "latent_stats.json").write_text(stats.to_json())
    return tmp_path / "latent_stats.json"


def test_fluxdb_from_prompts_to_rows(models, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    build_tiny_flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue heart\na red star\na star\n")
    small = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
    source = drawn_source(tmp_path / "prompts.txt", tmp_path / "flux", settings=small)
    encoding = Encoding(source, models, tmp_path / "out", size=SIZE)
    assert encoding.run()["rows"] == 3
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    assert data.batch(range(3)).captions == [["a red star"], ["a blue heart"], ["a star"]]
    assert data.card["pipeline"] == "FluxPipeline" and data.card["generator"] == "flux"
    assert data.card["settings"]["guidance_scale"] == 3.5
    large = drawn_source(tmp_path / "prompts.txt", tmp_path / "flux", settings=small | {"height": 48}, size=64)
    assert large._settings["height"] == 48 and large._settings["width"] == 32  # what is named wins
    del small["height"], small["width"]
    large = drawn_source(tmp_path / "prompts.txt", tmp_path / "flux", settings=small, size=64)
    assert large._settings["height"] == large._settings["width"] == 64  # drawn so large, and not enlarged
    with pytest.raises(ValueError, match="FluxPipeline does not know steps"):
        drawn_source(tmp_path / "prompts.txt", tmp_path / "flux", settings={"steps": 1})


def test_sa1b_from_tar_files_to_checked_rows(models, tmp_path):
    (tmp_path / "captions").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"sa_{number:06d}.tar", "w") as tar:
            for k in range(4):
                name, buffer = f"sa_{10 * number + k}", io.BytesIO()
                pixels = np.random.default_rng(10 * number + k).integers(0, 255, (80, 70 + k, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "JPEG")
                member = tarfile.TarInfo(f"./{name}.jpg")
                member.size = buffer.tell()
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
                (tmp_path / "captions" / f"{name}.txt").write_text(f"photo {name}")
    (tmp_path / "captions" / "sa_2.txt").unlink()
    cut = tmp_path / "sa_000001.tar"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    Encoding(open_source("sa1b", tmp_path), models, tmp_path / "out", size=SIZE).run()
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    texts = [text for (text,) in data.batch(range(len(data))).captions]
    assert texts[:3] == ["photo sa_0", "photo sa_1", "photo sa_3"] and set(texts[3:]) < {
        f"photo sa_1{k}" for k in range(4)
    }
    found = check(tmp_path / "out")
    assert found["sources"] == {"sa1b": len(data)} and found["parts"] == {"all": 2, "encoded": 1}
    wanted = {"caption is missing or empty": 1, "tar file was cut short or damaged; get it again": 1}
    assert found["skipped"] == wanted
    again = Encoding(open_source("sa1b", tmp_path), models, tmp_path / "out", size=SIZE).run()
    assert again["rows"] == again["skipped"] == 0  # nothing new, nothing counted twice
    cut.write_bytes(whole)  # got again
    assert Encoding(open_source("sa1b", tmp_path), models, tmp_path / "out", size=SIZE).run()["rows"] == 7 - len(data)
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    assert [text for (text,) in data.batch(range(len(data))).captions] == [
        f"photo sa_{k}" for k in (0, 1, 3, 10, 11, 12, 13)
    ]
    assert check(tmp_path / "out")["parts"] == {"all": 2, "encoded": 2}


def test_prompts_are_shared_and_taken_up_again(models, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("nitro_e_lite.data.sources.LINES", 2)
    build_tiny_flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("".join(f"a star, number {k}\n" for k in range(7)))
    small = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}

    def draw(out, **options):
        source = drawn_source(tmp_path / "prompts.txt", tmp_path / "flux", settings=small)
        return Encoding(source, models, tmp_path / out, size=SIZE, **options).run()["rows"]

    assert draw("one") == 7 and len(files(tmp_path / "one")) == 8  # four parts, each a shard and what it says
    assert (draw("two", rank=1, world=2), draw("two", rank=0, world=2)) == (3, 4)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for path in (tmp_path / "two" / "shards").glob("prompts-000000002-*"):
        path.unlink()  # as if killed before this part was done
    assert draw("two") == 2 and files(tmp_path / "two") == files(tmp_path / "one")


def picture(mode, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 70, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = {mode: picture(mode, seed) for seed, mode in enumerate(("RGB", "L", "CMYK"))} | {
    "cut": picture("RGB", 3)[:90]
}


@pytest.mark.parametrize("kind", ["sa1b", "journeydb"])
def test_odd_and_broken_pictures_in_the_published_layouts(kind, models, tmp_path):
    if kind == "sa1b":
        (tmp_path / "captions").mkdir()
        with tarfile.open(tmp_path / "sa_000000.tar", "w") as tar:
            for name, content in PICTURES.items():
                member = tarfile.TarInfo(f"./sa_{name}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                (tmp_path / "captions" / f"sa_{name}.txt").write_text(f"ein Bild, № {name}", encoding="utf-8")
    else:
        (tmp_path / "imgs" / "000").mkdir(parents=True)
        for name, content in PICTURES.items():
            (tmp_path / "imgs" / "000" / f"{name}.jpg").write_bytes(content)
        lines = [{"img_path": f"./000/{name}.jpg", "prompt": f"ein Bild, № {name}"} for name in PICTURES]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "train_anno_realease_repath.jsonl").write_text(text, encoding="utf-8")
    assert Encoding(open_source(kind, tmp_path), models, tmp_path / "out", size=SIZE).run()["rows"] == 3
    data = LatentDataset(tmp_path / "out", models.image_fingerprint)
    names = sorted(text.split()[-1] for (text,) in data.batch(range(3)).captions)
    assert names == ["CMYK", "L", "RGB"]
    (reason,) = check(tmp_path / "out")["skipped"]
    assert reason.startswith("picture cannot be read")


def test_a_data_set_that_is_away_stops_the_work_and_costs_nothing(raw, models, whole, tmp_path):
    """Its pictures were left out as missing, and never looked for again."""
    moved, away = tmp_path / "raw", tmp_path / "away"
    shutil.copytree(raw, moved)
    source, honest = Folder(moved), Folder._item

    def item(self, number, line):
        if number == 10:
            moved.rename(away)
            moved.mkdir()  # where a disk was mounted
        return honest(self, number, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "_item", item)
        with pytest.raises(Unusable, match="raw: is gone or empty; is its disk there"):
            Encoding(source, models, tmp_path / "out", size=SIZE, batch=3, shard_rows=6, threads=2).run()
    moved.rmdir()
    away.rename(moved)
    encode(moved, models, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_a_part_without_one_picture_is_not_taken_for_done(raw, models, tmp_path, monkeypatch):
    monkeypatch.setattr("nitro_e_lite.data.precompute.ALL_MISSING", 20)
    moved = tmp_path / "raw"
    shutil.copytree(raw, moved)
    for picture in moved.glob("*.png"):
        picture.rename(picture.with_suffix(".away"))
    with pytest.raises(Unusable, match="lines-000000000: not one of 22 items has its picture and its caption; is all"):
        encode(moved, models, tmp_path / "out")
    for picture in moved.glob("*.away"):
        picture.rename(picture.with_suffix(".png"))
    assert encode(moved, models, tmp_path / "out")["rows"] == len(GOOD)


def test_check_names_a_reason_that_much_was_left_out_for(raw, models, tmp_path):
    moved = tmp_path / "raw"
    shutil.copytree(raw, moved)
    for k in range(12, 17):
        (moved / f"{k}.png").unlink()
    encode(moved, models, tmp_path / "out")
    assert "6 of 22 items were left out: picture is missing" in check(tmp_path / "out")["problems"]


def test_each_process_of_torchrun_encodes_on_its_own_gpu(monkeypatch):
    monkeypatch.setattr("nitro_e_lite.runtime.pick_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert local_device(None) == local_device("cuda") == "cuda:2"  # all eight went to the first when it was named
    assert local_device("cuda:1") == "cuda:1" and local_device("cpu") == "cpu"


def test_a_gated_generator_says_what_to_do(tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n")  # read first, before anything is loaded
    with pytest.raises(EncoderUnavailable, match="accept its licence at https://huggingface.co/black-forest-labs"):
        drawn_source(tmp_path / "prompts.txt")


def test_kinds_and_their_options(raw):
    assert isinstance(open_source("folder", raw), Folder)
    with pytest.raises(ValueError, match="there are sa1b, journeydb, folder, fluxdb"):
        open_source("imagenet", raw)
    with pytest.raises(ValueError, match="only 'sa1b'"):
        open_source("folder", raw, captions=raw)


def test_stored_features_of_another_model_are_refused(raw, models, vision, tmp_path):
    """A run once took text features of one language model and gave dropped captions and samples to another."""
    encode(raw, models, tmp_path / "a", text=True, vision=vision)
    LatentDataset(tmp_path / "a", models.image_fingerprint, models.fingerprint)
    other_text, other_eyes = copy.deepcopy(models.text_encoder), copy.deepcopy(vision.model)
    for model in (other_text, other_eyes):
        next(model.parameters()).data += 1
    other = dataclasses.replace(models, text_encoder=other_text)
    with pytest.raises(ValueError, match="text features were made by encoder"):
        LatentDataset(tmp_path / "a", other.image_fingerprint, other.fingerprint)
    encode(raw, models, tmp_path / "b", text=True, vision=VisionEncoder(other_eyes))
    with pytest.raises(ValueError, match="another encoder, or other columns"):
        LatentDataset([tmp_path / "a", tmp_path / "b"], models.image_fingerprint, models.fingerprint)
    encode(raw, models, tmp_path / "c")  # without features, beside a folder that says nothing of any
    write_latents(tmp_path / "d", [LatentBatch(torch.zeros(1, 4, 16, 16), [["a"]])], models.image_fingerprint)
    joined = LatentDataset([tmp_path / "c", tmp_path / "d"], models.image_fingerprint, models.fingerprint)
    assert len(joined) == len(GOOD) + 1


def test_fingerprint_is_that_of_the_encoder(models, whole):
    stats = models.stats
    assert LatentDataset(whole, None).card["fingerprint"] == encoders.fingerprint(models.vae, None, stats, 0)
