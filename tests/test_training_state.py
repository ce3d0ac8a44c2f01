"""Checkpoints: whole or absent, checked, and the newest good one wins."""

import os
import shutil

import pytest
import torch

from nitro_e_lite import files
from nitro_e_lite.files import atomic_folder
from nitro_e_lite.training.checkpoints import (
    compare_settings,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def save(folder, step, keep=3):
    return save_checkpoint(folder, step, {"weights": {"w": torch.full((4,), float(step))}}, {"seed": 1}, keep)


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    tensors, state = load_latest(tmp_path)
    assert state["step"] == 4 and state["seed"] == 1
    assert torch.equal(tensors["weights"]["w"], torch.full((4,), 4.0))


def test_nothing_to_load(tmp_path):
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_damage_is_found_and_the_previous_one_used(tmp_path, file):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="checkpoint skipped"):
        _, state = load_latest(tmp_path)
    assert state["step"] == 1


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    final = tmp_path / "run" / "final"
    with atomic_folder(final, "nothing") as partial:
        (partial / "a").write_text("one")
    said = "final: could not be written .*No space left.*; the checkpoints are intact; make room"
    with pytest.raises(OSError, match=said), atomic_folder(final, "the checkpoints are intact") as partial:
        (partial / "a").write_text("two")
        raise OSError(28, "No space left on device")
    assert (final / "a").read_text() == "one" and [path.name for path in final.parent.iterdir()] == ["final"]


def test_a_kill_between_the_two_renamings_loses_neither_folder(tmp_path, monkeypatch):
    """The old folder used to be removed before the new one took its name."""
    final, renamed = tmp_path / "final", []

    def killed_at_the_second(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    with atomic_folder(final, "nothing") as partial:
        (partial / "a").write_text("one")
    monkeypatch.setattr(files.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt), atomic_folder(final, "nothing") as partial:
        (partial / "a").write_text("two")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".before-final", ".partial-final"]
    with pytest.raises(ZeroDivisionError), atomic_folder(final, "nothing"):
        1 / 0  # noqa: B018
    assert (final / "a").read_text() == "one"  # whoever writes next puts it back
    with atomic_folder(final, "nothing") as partial:
        (partial / "a").write_text("three")
    assert (final / "a").read_text() == "three" and not list(tmp_path.glob(".*-final"))


def test_a_flipped_bit_is_found(tmp_path):
    path = save(tmp_path, 1) / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path.parent)


def test_what_makes_it_another_network_is_another_run():
    """A changed strength of an adapter was multiplied into what had been trained with the old one."""
    before = {"steps": 8, "lora": {"rank": 4, "alpha": 8.0}, "dense_time": True, "depths": [0.1, 0.4]}
    compare_settings(before, before, 4)
    for name, value in (("lora", {"rank": 4, "alpha": 64.0}), ("dense_time", False), ("depths", [0.2, 0.4])):
        with pytest.raises(ValueError, match=f"{name}=.*: the run was started with .*; name another folder"):
            compare_settings(before, before | {name: value}, 4)


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch):
    """Somebody reads it on a network file system; the run ended although the new one stood."""
    save(tmp_path, 100, keep=1)
    honest = shutil.rmtree

    def busy(path, *words, **more):
        if path.name == "step-00000100":
            raise OSError(39, "Directory not empty")
        return honest(path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        with pytest.warns(UserWarning, match="step-00000100: not removed .Directory not empty"):
            assert save(tmp_path, 200, keep=1).is_dir()
    save(tmp_path, 300, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000300"]


def test_a_partial_folder_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".partial-00000002").mkdir()
    (tmp_path / ".partial-00000002" / "weights.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path)[1]["step"] == 1
    save(tmp_path, 2)
    assert load_latest(tmp_path)[1]["step"] == 2


def test_saving_the_same_step_again(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert len(list_checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_optimizer_state_round_trip(kind):
    """After restoring, the next update equals that of the optimiser which was never stopped."""

    def make():
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(6, 4))
        return {"p": parameter}, kind([parameter], lr=0.1)

    def step(parameters, optimizer, seed):
        parameters["p"].grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    parameters, optimizer = make()
    step(parameters, optimizer, 1)
    saved = {k: v.clone() for k, v in optimizer_tensors(optimizer, {parameters["p"]: "p"}).items()}
    assert saved
    value = parameters["p"].detach().clone()
    step(parameters, optimizer, 2)

    again, other = make()
    with torch.no_grad():
        again["p"].copy_(value)
    restore_optimizer(other, saved, again)
    step(again, other, 2)
    assert torch.equal(again["p"], parameters["p"])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_optimizer_state_returns_to_the_device_of_its_parameters(kind):
    """A file is read to the CPU. With weights elsewhere the first step after a stop would fail."""
    named = {"p/exp_avg": torch.ones(6, 4), "p/exp_avg_sq": torch.ones(6, 4), "p/step": torch.tensor(3.0)}
    if kind is torch.optim.Muon:
        named = {"p/momentum_buffer": torch.ones(6, 4)}
    parameter = torch.nn.Parameter(torch.empty(6, 4, device="meta"))
    optimizer = kind([parameter], lr=0.1)
    restore_optimizer(optimizer, named, {"p": parameter})
    state = optimizer.state[parameter]
    assert {name: value.device.type for name, value in state.items() if name != "step"} == {
        key.split("/")[1]: "meta" for key in named if key != "p/step"
    }
    assert kind is torch.optim.Muon or state["step"].device.type == "cpu"  # AdamW counts there
    parameter.grad = torch.empty_like(parameter)
    optimizer.step()


def damage(path):
    (path / "weights.safetensors").write_bytes(b"damaged")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    damage(save(tmp_path, 1))
    damage(save(tmp_path, 2))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="all checkpoints are damaged .step-00000001, step-0"),
    ):
        load_latest(tmp_path)


def test_a_run_that_went_back_keeps_its_new_checkpoints(tmp_path):
    """With the two newest damaged and keep=2, every new checkpoint was once deleted as the oldest."""
    for step in (800, 900, 1000):
        save(tmp_path, step)
    damage(tmp_path / "step-00000900")
    damage(tmp_path / "step-00001000")
    assert save(tmp_path, 850, keep=2).is_dir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000800", "step-00000850"]
