"""Cached latents: what goes in comes out, foreign encoders are refused, the order is a pure function."""

import numpy as np
import pytest
import torch

from nitro_e_lite.shards import LatentBatch, LatentDataset, batch_indices, write_latents


def batches(count=10, size=4):
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, size):
        rows = range(first, min(first + size, count))
        latents = torch.randn(len(rows), 8, 4, 4, generator=generator).half().float()
        yield LatentBatch(latents, [[f"caption {i}", f"naïve 星 {i}"] for i in rows])


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path / "data", batches(), "abc", {"split": "train"})
    return tmp_path / "data"


def test_round_trip(folder):
    data, written = LatentDataset(folder, "abc"), list(batches())
    assert len(data) == 10 and data.card["split"] == "train"
    read = data.batch([9, 0, 5])
    everything = torch.cat([b.latents for b in written])
    assert torch.equal(read.latents, everything[[9, 0, 5]])
    assert read.captions[0] == ["caption 9", "naïve 星 9"]


def test_another_encoder_is_refused(folder):
    with pytest.raises(ValueError, match="encode the data again"):
        LatentDataset(folder, "xyz")
    assert len(LatentDataset(folder, None)) == 10


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent data set"):
        LatentDataset(tmp_path / "nothing", "abc")
    with pytest.raises(ValueError, match="no data"):
        write_latents(tmp_path / "data", [], "abc")


def test_a_killed_writer_leaves_no_data_set(tmp_path):
    def broken():
        yield from list(batches())[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path / "data", broken(), "abc")
    assert not (tmp_path / "data").exists()
    write_latents(tmp_path / "data", batches(), "abc")  # and the leftovers are in nobody's way
    assert len(LatentDataset(tmp_path / "data", "abc")) == 10


def test_every_row_once_an_epoch():
    steps = [batch_indices(3, 103, 10, step) for step in range(20)]
    first, second = np.concatenate(steps[:10]), np.concatenate(steps[10:])
    assert len(set(first)) == len(set(second)) == 100
    assert not np.array_equal(first, second)
    assert np.array_equal(batch_indices(3, 103, 10, 14), steps[14])
    assert not np.array_equal(batch_indices(4, 103, 10, 0), steps[0])
    with pytest.raises(ValueError, match="batch_size=200"):
        batch_indices(3, 103, 200, 0)
