"""The complete check of a data set: finds what was put in, and nothing in a good one; the reader's speed."""

import json

import pytest
import torch
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.data import check as check_module
from nitro_e_lite.data.check import FULL_SHAPES, NEEDED_SAMPLES_PER_SECOND, check, measure_decoding, measure_reading
from nitro_e_lite.data.shard_writer import ShardWriter, write_latents
from nitro_e_lite.data.shards import CARD, LatentBatch, LatentDataset, read_quarantine
from nitro_e_lite.experiments import plan

SHAPE = (3, 8, 8)


def batches(count=48, size=8, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, size):
        latents = torch.randn(size, *SHAPE, generator=generator) * scale + shift
        captions = [[f"caption {first + k}", "another"] for k in range(size)]
        yield LatentBatch(latents, captions, sources=["a" if first + k < 10 else "b" for k in range(size)])


def write(folder, written):
    write_latents(folder, written, "abc", shard_rows=16)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", batches())


def test_good_data_set(folder):
    found = check(folder)
    assert found["ok"] and not found["problems"] and not (folder / "quarantine.jsonl").exists()
    assert (found["rows"], found["captions"], found["sources"]) == (48, 96, {"a": 10, "b": 38})
    assert found["shards"] == {"all": 3, "quarantined": 0, "out_of_reach": 0} and found["parts"] is None
    everything = LatentDataset(folder, "abc").batch(range(48)).latents.double().transpose(0, 1).flatten(1)
    assert found["latent_mean"] == pytest.approx(everything.mean(1).tolist(), abs=1e-4)
    assert found["latent_std"] == pytest.approx(everything.std(1, correction=0).tolist(), abs=1e-4)
    json.dumps(found, allow_nan=False)


def test_bad_rows_are_counted_and_quarantined(tmp_path):
    written = list(batches())
    written[0].latents[3, 0, 0, 0] = float("nan")
    written[4].latents[1, 2, 7, 7] = float("inf")
    written[2].captions[5][:] = [" "]
    found = check(write(tmp_path / "data", written))
    assert not found["ok"] and (found["not_finite"], found["without_caption"]) == (2, 1)
    assert found["quarantined_rows"] == 3 and all(abs(mean) < 0.2 for mean in found["latent_mean"])
    lines = {(line["shard"], line["row"]) for line in read_quarantine(tmp_path / "data")}
    assert lines == {("000000", 3), ("000001", 5), ("000002", 1)}
    assert any("not finite" in text for text in found["problems"])
    assert any("1 rows have no caption" in text for text in found["problems"])


def test_a_changed_byte_is_found_and_kept_from_training(folder):
    path = folder / "shards" / "000001.arrow"
    before = LatentDataset(folder, "abc").batch(range(48))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit in the middle of the numbers
    path.write_bytes(bytes(data))
    assert len(LatentDataset(folder, "abc")) == 48  # opening does not read every byte
    found = check(folder)
    assert not found["ok"] and found["shards"]["quarantined"] == 1 and found["rows"] == 32
    assert "1 of 3 shards are damaged" in found["problems"]
    (line,) = read_quarantine(folder)
    assert line == {"shard": "000001", "row": None, "reason": "contents differ from the checksum"}
    with pytest.warns(UserWarning, match="1 of 3 shards, 16 of 48 rows"):
        after = LatentDataset(folder, "abc").batch(range(48))
    assert torch.equal(after.latents[:16], before.latents[:16]) and torch.equal(after.latents[32:], before.latents[32:])
    assert {text[0] for text in after.captions[16:32]} <= {
        text[0] for text in before.captions[:16] + before.captions[32:]
    }
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))  # the shard is copied again
    assert check(folder)["ok"] and not read_quarantine(folder)


def test_a_shard_cut_short_is_found(folder):
    path = folder / "shards" / "000002.arrow"
    path.write_bytes(path.read_bytes()[:-7])
    found = check(folder)
    assert found["rows"] == 32 and found["shards"] == {"all": 3, "quarantined": 1, "out_of_reach": 0}


def test_repeated_pictures_and_captions(tmp_path):
    written = list(batches())
    written[3].latents[:] = written[2].latents
    written[5].captions[0][:] = written[0].captions[0]
    found = check(write(tmp_path / "data", written))
    assert (found["repeated_pictures"], found["repeated_captions"]) == (8, 1)
    assert found["problems"] == ["8 pictures occur before"]
    assert check(tmp_path / "data", max_repeated=0.2)["ok"]


@pytest.mark.parametrize("scale, shift", [(1 / 0.41407, 0.0), (0.41407, 0.0), (1.0, 2.0)])
def test_latents_that_are_not_normalised(tmp_path, scale, shift):
    found = check(write(tmp_path / "data", batches(scale=scale, shift=shift)))
    assert any("normalised ones have 0 and 1" in text for text in found["problems"])


def test_one_odd_channel(tmp_path):
    written = list(batches())
    for batch in written:
        batch.latents[:, 1] *= 0.1
        batch.latents[:, 2] *= 1.9
    found = check(write(tmp_path / "data", written))
    (problem,) = found["problems"]
    assert problem.startswith("1 channels are far from mean 0, spread 1; first 1: ") and problem.endswith("0.10")


def test_unfinished_and_skipped(folder):
    card = json.loads((folder / CARD).read_text()) | {"parts": 5}
    (folder / CARD).write_text(json.dumps(card))
    writer = ShardWriter(folder, "000003", {"latents": SHAPE})
    writer.finish(skipped=[["x.jpg", "picture is missing", 1], ["archive 7", "archive was not downloaded", 40]])
    found = check(folder)
    assert found["skipped"] == {"archive was not downloaded": 40, "picture is missing": 1}
    assert found["parts"] == {"all": 5, "encoded": 4}
    lines = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == {"shard": "000003", "key": "x.jpg", "reason": "picture is missing", "count": 1}
    assert found["problems"] == ["4 of 5 parts are encoded: run the same command again"]


def test_command(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = CliRunner().invoke
    result = run(app, ["data", "check", str(folder)])
    assert result.exit_code == 0 and "Nothing is wrong." in result.stdout and "from a" in result.stdout
    monkeypatch.setattr("nitro_e_lite.data.shard_files.PAUSES", (0,))
    (folder / "shards" / "000000.arrow").unlink()
    result = run(app, ["data", "check", str(folder)])
    assert result.exit_code == 1 and "Wrong: 1 of 3 shards cannot be reached" in result.stderr
    assert not read_quarantine(folder)
    result = run(app, ["data", "check", str(folder), "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["rows"] == 32
    assert run(app, ["data", "check", "nowhere"]).exit_code == 2


def test_reader_reads_faster_than_the_full_run_needs():
    found = measure_reading(rows=1024, batch=128, seconds=0.3)
    assert found["needed_samples_per_second"] == NEEDED_SAMPLES_PER_SECOND == round(150_000 * 2048 / 1.5 / 86_400)
    assert FULL_SHAPES == {"latents": (32, 16, 16), "text": (128, 2048), "vision": (256, 768)}
    assert 16_384 < found["bytes_per_sample"] < 17_500  # and the caption
    assert 0 < found["samples_per_second_cold"] and found["needed_samples_per_second_per_process"] == 296
    assert found["cold_share_of_the_disk"] == pytest.approx(
        found["samples_per_second_cold"] / found["samples_per_second_of_the_disk"], rel=0.01
    )
    assert found["margin"] > 1 and found["margin"] == round(found["samples_per_second_per_core"] / 2370, 2)


def test_benchmark_says_what_the_node_needs(monkeypatch):
    read = check_module.measure_reading
    monkeypatch.setattr(check_module, "measure_reading", lambda columns, **_: read(columns, 4, 4, 0.01))
    decoding = {"source": "made", "bytes_per_picture": 10**6, "pictures_per_second_per_core": 20.0}
    monkeypatch.setattr(check_module, "measure_decoding", lambda *_: dict(decoding))
    monkeypatch.setattr(plan, "stated_mfus", lambda: [plan.Utilisation(0.4, "ours", "")])
    monkeypatch.setattr(plan, "pictures_encoded", lambda: [2630.2])
    found = CliRunner().invoke(app, ["data", "benchmark"])
    assert "20.0 pictures/s a core. 8 x mi300x encode" in found.stdout and "the full run needs 296" in found.stdout
    assert found.stdout.endswith("40.0% (ours) 2,630/s, 132 cores.\n")


def test_reading_with_features_and_bad_arguments(tmp_path):
    found = measure_reading(("latents", "text", "pictures"), rows=16, batch=8, seconds=0.05)
    assert found["columns"] == ["latents", "text", "pictures"] and found["bytes_per_sample"] > 16_384 + 524_288 + 5_000
    with pytest.raises(ValueError, match="columns are latents, text, vision, pictures"):
        measure_reading(("pixels",))
    assert measure_decoding(seconds=0.05)["pictures_per_second_per_core"] > 0
    with pytest.raises(FileNotFoundError, match="holds no JPEG"):
        measure_decoding(tmp_path)
    with pytest.raises(ValueError, match="batch is 1 to 4"):
        measure_reading(rows=4, batch=8)
