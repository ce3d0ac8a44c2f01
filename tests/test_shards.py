"""Cached latents: what goes in comes out, damage costs only what it hits, the order is a pure function."""

import errno
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nitro_e_lite.data import shard_files, shards
from nitro_e_lite.data.batches import LocalBatch, batch_indices
from nitro_e_lite.data.shard_writer import ShardWriter, write_latents
from nitro_e_lite.data.shards import (
    QUARANTINE,
    LatentBatch,
    LatentDataset,
    array_shapes,
    quarantine,
    read_card,
    read_quarantine,
)
from nitro_e_lite.errors import Unusable
from nitro_e_lite.training.distributed import check_same_data


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


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(shard_files, "PAUSES", (0, 0))


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


def test_for_an_accelerator_nothing_is_converted_on_the_host(many, monkeypatch):
    """There is no page-locked memory without one: its switch is dropped here."""
    plain, empty = LatentDataset(many, "abc").batch([3, 1]), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **rest: empty(*shape, **rest))
    found = LatentDataset(many, "abc").batch([3, 1], pin=True)
    assert found.latents.dtype == torch.float16 and torch.equal(found.latents.float(), plain.latents)
    batch = LocalBatch(found.latents, ["", ""], torch.zeros(2), plain.latents)
    assert torch.equal(batch.to(torch.device("cpu")).latents, plain.latents)


def test_json_files_of_shards_are_read_side_by_side(many, monkeypatch):
    """One after the other, those of 25 million rows keep a start waiting for a slow file server."""
    gate, read = threading.Barrier(2, timeout=30), shards.read_json
    monkeypatch.setattr(shards, "read_json", lambda path: (gate.wait(), read(path))[1])
    found = shards.sidecars(many)
    assert [*found] == [f"{k:06d}" for k in range(10)] and sum(state["rows"] for state in found.values()) == 40


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
    quarantine(many, "000007", 3, "not finite")
    writer = ShardWriter(many, "000002", array_shapes(read_card(many)))
    writer.add(LatentBatch(before.latents[8:12], before.captions[8:12], sources=["x"] * 4, keys=list("abcd")))
    writer.finish()  # encoded again: it counts again
    assert [(line["shard"], line["row"]) for line in read_quarantine(many)] == [("000007", 3)]


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


# errors that pass, and files that change while they are read


def test_what_may_pass_is_tried_again_then_named_and_never_remembered(many, monkeypatch):
    """One moment without memory once cost 37 of 60 shards for ever; so did a shard that was away once."""
    before = LatentDataset(many, "abc").batch(range(40))
    failures = {"000002": [OSError(12, "Cannot allocate memory")], "000005": [MemoryError(), PermissionError(13, "no")]}
    find = shard_files.find_layouts

    def sometimes(path, shapes):
        if failures.get(path.stem):
            raise failures[path.stem].pop()
        return find(path, shapes)

    monkeypatch.setattr(shard_files, "find_layouts", sometimes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = LatentDataset(many, "abc")
    assert torch.equal(data.batch(range(40)).latents, before.latents) and not any(failures.values())
    away = many / "shards" / "000002.arrow"
    away.rename(many / "aside")
    with pytest.warns(UserWarning, match=r"4 of 40 rows, cannot be reached \(first: 000002, No such file"):
        without = LatentDataset(many, "abc")
    assert without.digest != data.digest and without.has_bad_rows
    assert torch.equal(without.batch(range(12, 40)).latents, before.latents[12:])
    (many / "aside").rename(away)
    again = LatentDataset(many, "abc")
    assert torch.equal(again.batch(range(40)).latents, before.latents) and again.digest == data.digest
    assert not (many / QUARANTINE).exists()


def test_a_file_cut_short_while_it_is_read_costs_its_rows_and_not_the_process(many):
    """Mapped into memory it ended the process by SIGBUS, without a word."""
    data = LatentDataset(many, "abc")
    before = data.batch(range(40))
    os.truncate(many / "shards" / "000002.arrow", 1000)
    with pytest.warns(UserWarning, match=r"bad rows found \(first: 000002.arrow was cut short: it ends at byte 1000"):
        after = data.batch(range(40))
    others = [i for i in range(40) if not 8 <= i < 12]
    assert torch.equal(after.latents[others], before.latents[others]) and all(after.captions)
    assert [data.batch([i]).captions[0] for i in range(8, 12)] == after.captions[8:12]
    assert [(line["shard"], line["row"]) for line in read_quarantine(many)] == [("000002", None)]


def test_files_are_opened_anew_where_a_server_has_forgotten_their_handles(many, monkeypatch):
    """All attempts went to the handle that was dead: other rows took the turns of whole shards."""
    monkeypatch.setattr(shard_files, "PAUSES", (0.0,))
    data = LatentDataset(many, "abc")
    before = data.batch(range(40))
    dead, honest = [data._open(shard.path) for shard in data.shards], shard_files.ShardFile._read_some

    def read(file, place, offset):
        if file in dead:
            raise OSError(errno.ESTALE, "Stale file handle")
        return honest(file, place, offset)

    monkeypatch.setattr(shard_files.ShardFile, "_read_some", read)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(data.batch(range(40)).latents, before.latents)


def test_a_reader_that_cannot_read_tries_again_then_names_the_file(many, monkeypatch):
    data, left, waits = LatentDataset(many, "abc"), [2], []
    before, pread = data.batch(range(40)), os.preadv

    def ill(*arguments):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(shard_files.time, "sleep", waits.append)
    monkeypatch.setattr(os, "preadv", ill)
    assert torch.equal(data.batch([9]).latents, before.latents[9:10]) and waits == [0, 0]  # two failures: it passed
    left[0] = 3
    with pytest.warns(UserWarning, match="000002.arrow: Input/output error, after 3 attempts"):
        other = data.batch([9])
    assert other.captions[0] != before.captions[9]
    assert torch.equal(data.batch([9]).latents, before.latents[9:10])  # it came back
    left[0] = 10**9
    with pytest.warns(UserWarning), pytest.raises(Unusable, match="99 others are bad .last: Input/output .*disk there"):
        data.batch([20])
    assert not (many / QUARANTINE).exists() and len(waits) < 50  # a shard that was named is waited for no more


def test_damaged_bounds_of_captions_cost_their_row(many):
    data = LatentDataset(many, "abc")
    chunk = data.chunks[2]
    at, count = chunk.layout.strings["captions"].bounds[1]
    with open(chunk.shard.path, "rb+") as file:
        file.seek(at + 4)
        file.write((2**31 - 1).to_bytes(4, "little"))
    with pytest.warns(UserWarning, match="bounds of its strings are damaged"):
        batch = data.batch(range(40))
    assert all(batch.captions) and count == 9
    assert {(line["shard"], line["row"]) for line in read_quarantine(many)} == {("000002", 0)}


def test_processes_that_see_other_shards_are_stopped(many):
    """They trained in different orders, and nobody noticed."""

    class Together:
        device = "cpu"

        def gather(self, mine):
            return torch.cat([mine, self.other if hasattr(self, "other") else mine])

    accelerator, data = Together(), LatentDataset(many, "abc")
    check_same_data(accelerator, data.digest)
    accelerator.other = torch.tensor([7])
    with pytest.raises(RuntimeError, match="the processes 1 see other shards"):
        check_same_data(accelerator, data.digest)


@pytest.mark.parametrize("readers", [1, shards.READERS])
def test_a_large_batch_is_the_same_for_any_number_of_readers(tmp_path, monkeypatch, readers):
    write_latents(tmp_path / "data", batches(300, 64, features=True), "abc", shard_rows=64)
    monkeypatch.setattr(shards, "READERS", readers)
    data, order = LatentDataset(tmp_path / "data", "abc"), torch.randperm(300).tolist()
    whole, single = data.batch(order), [data.batch([row]) for row in order]
    for name in ("latents", "text", "vision"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(one, name) for one in single]))
    assert whole.captions == [one.captions[0] for one in single]


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
