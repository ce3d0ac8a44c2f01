"""Cached latents: what goes in comes out, damage costs only what it hits, the order is a pure function."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nitro_e_lite.data.batches import batch_indices
from nitro_e_lite.data.shard_writer import ShardWriter, write_latents
from nitro_e_lite.data.shards import QUARANTINE, LatentBatch, LatentDataset, quarantine, read_quarantine


def batches(count=10, size=4, features=False):
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, size):
        rows = range(first, min(first + size, count))
        latents = torch.randn(len(rows), 8, 4, 4, generator=generator).half().float()
        more = {}
        if features:
            more["text"] = torch.randn(len(rows), 3, 6, generator=generator).half()
            more["vision"] = torch.randn(len(rows), 16, 5, generator=generator).half()
        yield LatentBatch(latents, [[f"caption {i}", f"naïve 星 {i}"] for i in rows], **more)


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path / "data", batches(), "abc", {"split": "train"})
    return tmp_path / "data"


@pytest.fixture
def many(tmp_path):
    """Forty rows in ten shards."""
    write_latents(tmp_path / "many", batches(40), "abc", shard_rows=4)
    return tmp_path / "many"


def names(data, indices):
    return [captions[0] for captions in data.batch(indices).captions]


def test_round_trip(folder):
    data, written = LatentDataset(folder, "abc"), list(batches())
    assert len(data) == 10 and data.card["split"] == "train"
    read = data.batch([9, 0, 5])
    everything = torch.cat([b.latents for b in written])
    assert torch.equal(read.latents, everything[[9, 0, 5]])
    assert read.captions[0] == ["caption 9", "naïve 星 9"]
    assert read.text is None and read.vision is None


def test_many_shards_with_features_are_one_data_set(tmp_path):
    write_latents(tmp_path / "data", batches(20, features=True), "abc", shard_rows=8)
    data, written = LatentDataset(tmp_path / "data", "abc"), list(batches(20, features=True))
    assert len(list((tmp_path / "data" / "shards").glob("*.arrow"))) == 3 and len(data) == 20
    order = [19, 3, 7, 8, 0, 12]
    read = data.batch(order)
    assert read.text.dtype == read.vision.dtype == torch.float16
    for name in ("latents", "text", "vision"):
        assert torch.equal(getattr(read, name), torch.cat([getattr(b, name) for b in written])[order])
    assert names(data, order) == [f"caption {i}" for i in order]


def test_several_folders_are_one_data_set(folder, many, tmp_path):
    data = LatentDataset([folder, many], "abc")
    assert len(data) == 50 and names(data, [9, 10, 49]) == ["caption 9", "caption 0", "caption 39"]
    write_latents(tmp_path / "other", batches(4, features=True), "abc")
    with pytest.raises(ValueError, match="other columns or shapes"):
        LatentDataset([folder, tmp_path / "other"], "abc")


def test_another_encoder_is_refused(folder):
    with pytest.raises(ValueError, match="encode the data again"):
        LatentDataset(folder, "xyz")
    assert len(LatentDataset(folder, None)) == 10


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent data set"):
        LatentDataset(tmp_path / "nothing", "abc")
    with pytest.raises(ValueError, match="no data"):
        write_latents(tmp_path / "data", [], "abc")


def test_rows_that_are_not_there(folder):
    data = LatentDataset(folder, "abc")
    for row in (-1, 10):
        with pytest.raises(IndexError, match="there are 10 rows"):
            data.batch([row])


def test_a_killed_writer_leaves_no_data_set(tmp_path):
    def broken():
        yield from list(batches())[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "data", broken(), "abc")
    assert not (tmp_path / "data").exists()
    (left,) = tmp_path.glob("data.*.partial")
    os.utime(left, (0, 0))
    write_latents(tmp_path / "data", batches(), "abc")  # and the leftovers are in nobody's way
    assert len(LatentDataset(tmp_path / "data", "abc")) == 10 and os.listdir(tmp_path) == ["data"]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    """Two comparisons that start on a cold cache: the second once deleted what the first was writing."""

    def interrupted():
        first, *rest = batches()
        yield first
        write_latents(tmp_path / "data", batches(), "abc")
        yield from rest

    write_latents(tmp_path / "data", interrupted(), "abc", shard_rows=4)
    assert len(LatentDataset(tmp_path / "data", "abc")) == 10 and os.listdir(tmp_path) == ["data"]


# quarantine


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def scramble_header(path):
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(range(32))
    path.write_bytes(bytes(data))


DAMAGE = {
    "cut short": lambda shards: cut(shards / "000002.arrow"),
    "deleted": lambda shards: (shards / "000002.arrow").unlink(),
    "header overwritten": lambda shards: scramble_header(shards / "000002.arrow"),
    "of another size": lambda shards: (shards / "000002.arrow").write_bytes(b""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_costs_its_own_rows_and_nothing_else(many, what):
    whole = LatentDataset(many, "abc")
    before = whole.batch(range(40))
    del whole
    DAMAGE[what](many / "shards")
    with pytest.warns(UserWarning, match=r"1 of 10 shards, 4 of 40 rows, are in quarantine \(first: 000002"):
        data = LatentDataset(many, "abc")
    assert len(data) == 40
    after = data.batch(range(40))
    others = [i for i in range(40) if not 8 <= i < 12]
    assert torch.equal(after.latents[others], before.latents[others])
    assert [after.captions[i] for i in others] == [before.captions[i] for i in others]
    substitutes = {after.captions[i][0] for i in range(8, 12)}
    assert len(substitutes) == 4 and substitutes <= {before.captions[i][0] for i in others}
    assert [data.batch([i]).captions[0] for i in range(8, 12)] == after.captions[8:12]  # whoever asks, whenever
    (line,) = read_quarantine(many)
    assert line["shard"] == "000002" and line["row"] is None and line["reason"]


def test_an_unreadable_json_file_of_a_shard_is_reported(many):
    (many / "shards" / "000003.json").write_text('{"rows": 4, "by')
    with pytest.warns(UserWarning, match="000003, its JSON file cannot be read"):
        assert len(LatentDataset(many, "abc")) == 36


def test_a_shard_of_another_shape_is_reported(many):
    writer = ShardWriter(many, "000010", {"latents": (8, 2, 2)})
    writer.add(LatentBatch(torch.zeros(3, 8, 2, 2), [["a"], ["b"], ["c"]]))
    writer.finish()
    with pytest.warns(UserWarning, match="expected 128 numbers a row"):
        assert len(LatentDataset(many, "abc")) == 43


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_rows_are_replaced_and_reported_once(tmp_path, value):
    written = list(batches(12))
    written[1].latents[2, 5, 3, 3] = value
    written[2].captions[1][:] = ["", "  "]
    write_latents(tmp_path / "data", written, "abc", shard_rows=8)
    data = LatentDataset(tmp_path / "data", "abc")
    with pytest.warns(UserWarning, match="bad rows found") as caught:
        first = data.batch(range(12))
        again = data.batch([6, 9])
    assert len(caught) == 1 and torch.isfinite(first.latents).all() and all(first.captions)
    assert first.captions[6] == again.captions[0] != ["caption 6", "naïve 星 6"]
    assert torch.equal(first.latents[9], again.latents[1])
    assert first.captions[5] == ["caption 5", "naïve 星 5"]
    lines = {(line["shard"], line["row"], line["reason"]) for line in read_quarantine(tmp_path / "data")}
    assert lines == {("000000", 6, "latents not finite"), ("000001", 1, "no caption")}
    assert len((tmp_path / "data" / QUARANTINE).read_text().splitlines()) == 2


def test_a_torn_line_in_quarantine_stops_nothing(many):
    """A kill left half a line, the next line was glued to it, and no folder with such a list could be opened again."""
    (many / QUARANTINE).write_text(
        '{"shard": "000004", "row": null, "reason": "x"}\n{"shard": "000001", "row": 2, "rea'
    )
    quarantine(many, "000002", None, "contents differ")
    with pytest.warns(UserWarning, match="quarantine.jsonl, line 2: no JSON.*nitro-e data check"):
        lines = read_quarantine(many)
    assert [(line["shard"], line["reason"]) for line in lines] == [("000004", "x"), ("000002", "contents differ")]
    with pytest.warns(UserWarning, match="2 of 10 shards"):
        assert len(LatentDataset(many, "abc")) == 40
    (many / QUARANTINE).write_text(
        '{"shard": "000001", "row": 2, "rea{"shard": "000002", "row": null, "reason": "x"}\n{}\n'
    )
    with pytest.warns(UserWarning, match="line 2: needs shard"):
        assert len(LatentDataset(many, "abc")) == 40


def test_bad_features_are_found_too(tmp_path):
    written = list(batches(8, features=True))
    written[0].text[1, 2, 3], written[1].vision[3, 0, 0] = float("nan"), float("inf")
    write_latents(tmp_path / "data", written, "abc")
    with pytest.warns(UserWarning, match="bad rows found"):
        batch = LatentDataset(tmp_path / "data", "abc").batch(range(8))
    assert torch.isfinite(batch.text).all() and torch.isfinite(batch.vision).all()
    assert {line["reason"] for line in read_quarantine(tmp_path / "data")} == {"text not finite", "vision not finite"}


def test_a_data_set_with_nothing_left_is_an_error(many, folder, tmp_path):
    for path in (many / "shards").glob("*.arrow"):
        path.unlink()
    with pytest.raises(ValueError, match="no row can be read"):
        LatentDataset(many, "abc")
    (batch,) = batches(4)
    batch.latents[:] = float("nan")
    write_latents(tmp_path / "bad", [batch], "abc")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="and 99 others are bad"):
        LatentDataset(tmp_path / "bad", "abc").batch([0])


# order


def test_every_row_once_an_epoch():
    steps = [batch_indices(3, 103, 10, step) for step in range(20)]
    first, second = np.concatenate(steps[:10]), np.concatenate(steps[10:])
    assert len(set(first)) == len(set(second)) == 100
    assert not np.array_equal(first, second)
    assert np.array_equal(batch_indices(3, 103, 10, 14), steps[14])
    assert not np.array_equal(batch_indices(4, 103, 10, 0), steps[0])
    with pytest.raises(ValueError, match="batch_size=200"):
        batch_indices(3, 103, 200, 0)


def read_steps(data, first, count, world, workers):
    """Captions of `count` global steps, each process reading its share in one of `workers` threads."""

    def share(step, rank):
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        return names(data, batch_indices(7, len(data), 8, step)[mine])

    with ThreadPoolExecutor(workers) as pool:
        steps = [[pool.submit(share, first + k, rank) for rank in range(world)] for k in range(count)]
        return [[name for future in step for name in future.result()] for step in steps]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_order_does_not_depend_on_processes_or_threads(many, world, workers):
    data = LatentDataset(many, "abc")
    wanted = [names(data, batch_indices(7, 40, 8, step)) for step in range(12)]  # five steps are an epoch
    assert read_steps(data, 0, 12, world, workers) == wanted


def test_order_survives_other_numbers_of_processes_in_the_middle_of_an_epoch(many):
    data = LatentDataset(many, "abc")
    wanted = read_steps(data, 0, 12, 1, 1)
    parts = [(0, 3, 4, 2), (3, 4, 1, 1), (7, 1, 2, 3), (8, 4, 4, 1)]  # first step, steps, processes, threads
    assert [step for part in parts for step in read_steps(data, *part)] == wanted
