"""The engine with stages of other kinds than the project's own: two players in turn, and data that the model makes."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image
from ranks import ranks  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn

from nitro_e_lite.config import RunConfig
from nitro_e_lite.errors import GateFailed
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.runtime import generator
from nitro_e_lite.training import distributed
from nitro_e_lite.training.checkpoints import load_latest
from nitro_e_lite.training.engine import Engine, Stage, Trainable

RUN = RunConfig(steps=12, batch_size=8, log_every=1, checkpoint_every=5, ema_decay=0.9, keep_checkpoints=2)


@pytest.fixture(scope="module")
def cache():
    """What `ranks` asks of a test module; these stages cache nothing."""


def adam(rate):
    return lambda masters: {"adamw": torch.optim.AdamW(masters.values(), lr=rate)}


class TwoPlayers(Stage):
    """A generator of one number and a critic, in turn: the generator learns where the data lie."""

    def __init__(self, config, placement):
        self.config, self.placement = config, placement
        torch.manual_seed(config.seed)
        self.player, self.critic = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.modules = {
            "generator": Trainable(self.player, adam(1e-2), lambda step: 1.0),
            "critic": Trainable(self.critic, adam(2e-2), lambda step: 1.0),
        }

    def losses(self, step, part):
        rows = self.placement.microbatches[part]
        noise, data = (
            torch.stack([torch.randn(1, generator=generator(0, step, what, row)) for row in rows])
            for what in ("noise", "data")
        )
        drawn = self.player(noise)
        if step % 2:
            return {"generator": {"loss": -self.critic(drawn).flatten()}}
        wrong = self.critic(drawn) - self.critic(data + 3)  # no gradient reaches the generator
        return {"critic": {"loss": wrong.flatten(), "gap": wrong.detach().mean()}}

    def export(self, weights, folder):
        save_file(
            {f"{m}.{n}": v for m, named in weights.items() for n, v in named.items()}, folder / "both.safetensors"
        )


class OwnSamples(Stage):
    """Learns from what it has drawn itself a few steps ago, kept with its reward: roll-outs are part of the state."""

    def __init__(self, config, placement):
        self.config, self.placement, self.rollouts = config, placement, torch.zeros(config.batch_size, 2)
        torch.manual_seed(config.seed)
        self.policy = nn.Linear(2, 2)
        self.modules = {"policy": Trainable(self.policy, adam(3e-3), lambda step: 1.0)}

    def losses(self, step, part):
        rows = self.placement.microbatches[part]
        if step % 4 == 0:  # a roll-out of the policy as it is now, for four steps
            draws = [torch.randn(2, generator=generator(self.config.seed, step, "rollout", row)) for row in rows]
            with torch.no_grad():
                self.rollouts[rows.start : rows.stop] = self.policy(torch.stack(draws))
        mine = self.rollouts[rows.start : rows.stop]
        return {"policy": {"loss": (self.policy(mine) - mine.sin()).square().mean(1), "reward": mine.mean()}}

    def state(self):
        return {"rollouts": self.rollouts, "kept_since": "the last multiple of four"}

    def load_state(self, state):
        self.rollouts.copy_(state["rollouts"])

    def export(self, weights, folder):
        save_file(dict(weights["policy"]), folder / "policy.safetensors")


def weights_of(run):
    """All tensors that a run exported."""
    return {name: value for file in sorted(run.glob("final/*.safetensors")) for name, value in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", [TwoPlayers, OwnSamples])
def test_killed_and_resumed_it_has_the_same_bits(stage, tmp_path):
    Engine(RUN, stage, tmp_path / "whole", device="cpu").fit()
    killed = Engine(RUN, stage, tmp_path / "parts", device="cpu")
    killed.progress.validation_seconds = 3.5
    for step in range(7):  # the last checkpoint is within a roll-out and within a turn; two steps are lost
        killed.step()
        if step == 4:
            killed.save()
    resumed = Engine(RUN, stage, tmp_path / "parts", resume=True, device="cpu")
    assert resumed.global_step == 5 and resumed.progress.validation_seconds == 3.5  # its share is that of the whole run
    resumed.fit()
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_players_take_turns_and_a_loss_reaches_its_own_module_only(tmp_path):
    engine = Engine(RUN, TwoPlayers, tmp_path, device="cpu")
    for turn, resting in enumerate(("generator", "critic")):
        before = {name: p.detach().clone() for name, p in engine.learners[resting].masters.items()}
        row = engine.step()
        assert all(torch.equal(before[name], p) for name, p in engine.learners[resting].masters.items())
        assert all(p.grad is None for p in engine.learners[resting].masters.values())
        learning = ("critic", "generator")[turn]
        assert {f"{learning}_loss", f"{learning}_gradient_norm", f"{learning}_lr_scale"} <= row.keys()
        assert not any(name.startswith(resting) for name in row)


def test_two_players_learn(tmp_path):
    engine = Engine(replace(RUN, steps=600, batch_size=32), TwoPlayers, tmp_path, device="cpu")
    distances = []
    for _ in range(600):
        engine.step()
        distances.append(abs(engine.stage.player.bias.item() - 3))
    assert min(distances) < 0.5 < distances[0]


def test_every_module_is_in_the_metrics(tmp_path):
    Engine(RUN, TwoPlayers, tmp_path, device="cpu").fit()
    rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [("critic_loss" in row, "generator_loss" in row) for row in rows] == [(True, False), (False, True)] * 6
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_players_that_alternate_are_both_reported_whatever_the_interval(tmp_path):
    Engine(replace(RUN, log_every=4), TwoPlayers, tmp_path, device="cpu").fit()
    rows = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert all({"critic_loss", "generator_loss"} <= row.keys() for row in rows)


def test_a_non_finite_gradient_of_one_player_stops_nobody_for_good(tmp_path):
    engine = Engine(replace(RUN, max_skipped=1), TwoPlayers, tmp_path, device="cpu")
    before = {name: p.detach().clone() for name, p in engine.learners["critic"].masters.items()}
    handle = engine.stage.critic[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    engine.step()
    handle.remove()
    assert engine.health.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in engine.learners["critic"].masters.items())
    engine.step()
    engine.step()
    assert engine.health.skipped == 1 and engine.global_step == 3


SCRIPT = """
import sys
from pathlib import Path
from test_engine import RUN, OwnSamples, TwoPlayers
from nitro_e_lite.training.engine import Engine

for stage in (TwoPlayers, OwnSamples):
    Engine(RUN, stage, Path(sys.argv[1]) / stage.__name__, device="cpu").fit()
"""


def test_two_processes_are_one(ranks, tmp_path):  # noqa: F811
    """Gradients are averaged, noise is drawn by row: only the order of summation differs."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    ranks.run(2, script, tmp_path / "two")
    for stage in (TwoPlayers,):  # the other keeps the roll-outs of its own rows only
        Engine(RUN, stage, tmp_path / "one" / stage.__name__, device="cpu").fit()
        one, two = (weights_of(tmp_path / which / stage.__name__) for which in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


TWO = """
import sys, json, torch
from pathlib import Path
import torch.distributed as dist
from test_engine import RUN, TwoPlayers
from dataclasses import replace
from nitro_e_lite.training.engine import Engine

sent, reduce = [], dist.all_reduce
def watch(tensor, *arguments, **options):
    sent.append([tensor.numel(), str(tensor.dtype)])
    return reduce(tensor, *arguments, **options)
dist.all_reduce = watch
waits, set_timeout = [], dist.distributed_c10d._set_pg_timeout
dist.distributed_c10d._set_pg_timeout = lambda wait: (waits.append(wait.total_seconds()), set_timeout(wait))

folder, found = Path(sys.argv[1]), {}
for reduction in ("fp32", "bf16"):
    config = replace(RUN, accumulate=4, reduction=reduction, steps=4, log_every=2, patience=7.0)
    run = Engine(config, TwoPlayers, folder / reduction, device="cpu")
    sent.clear()
    run.step()
    found[reduction] = list(sent)
    run.fit()
found["waits"] = waits
if dist.get_rank() == 0:
    (folder / "found.json").write_text(json.dumps(found))
"""


def test_gradients_travel_once_a_step_in_the_stated_type_and_the_log_names_the_slowest(ranks, tmp_path):  # noqa: F811
    script = tmp_path / "two.py"
    script.write_text(TWO)
    ranks.run(2, script, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for reduction, kind in (("fp32", "torch.float32"), ("bf16", "torch.bfloat16")):
        # losses and the wish to stop; then 25 gradients of the critic, once for four parts, and no buffer
        assert found[reduction] == [[2, "torch.float32"], [25, kind]], found
        weights = [load_file(tmp_path / name / "final" / "both.safetensors") for name in ("fp32", reduction)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-3) for name in weights[0])
    assert found["waits"] == [6 * 3600, 7 * 60] * 2  # seconds, in setting up and in training
    rows = list(read_jsonl(tmp_path / "fp32" / "metrics.jsonl"))
    assert all(len(row["seconds_by_rank"][what]) == 2 for row in rows for what in ("data", "compute", "communication"))
    assert all(row["slowest_rank"] in (0, 1) and row["communication_seconds"] > 0 for row in rows)
    assert len(json.loads((tmp_path / "fp32" / "config.json").read_text())["hosts"]) == 2
    beats = [json.loads(path.read_text()) for path in sorted((tmp_path / "fp32" / "heartbeat").iterdir())]
    assert len(beats) == 2 and all(beat["step"] >= 1 and beat["pid"] for beat in beats)


def test_a_run_that_is_made_longer_is_not_finished_before_its_end(tmp_path):
    """Whoever asked found the old results, and went on with them; beside them lay heartbeats of processes long gone."""
    short = replace(RUN, steps=5)
    Engine(short, OwnSamples, tmp_path, device="cpu").fit()
    old = weights_of(tmp_path)
    (tmp_path / "heartbeat" / "rank-00009.json").write_text("{}")
    longer, seen = Engine(RUN, OwnSamples, tmp_path, resume=True, device="cpu"), []
    honest = longer.step
    longer.step = lambda: seen.append((tmp_path / "final").exists()) or honest()
    longer.fit()
    assert not any(seen) and len(seen) == 7 and not same(weights_of(tmp_path), old)
    assert same(load_file(tmp_path / "final-before" / "policy.safetensors"), old)
    assert [path.name for path in (tmp_path / "heartbeat").iterdir()] == ["rank-00000.json"]


def test_a_gate_that_fails_leaves_a_checkpoint_and_a_picture_of_what_failed(tmp_path, monkeypatch):
    def fails(stage):
        if stage.looks == 2:
            raise GateFailed("gate of a test: failed", {"distance": 9.0})
        stage.looks += 1
        return {}

    monkeypatch.setattr(OwnSamples, "looks", 0, raising=False)
    monkeypatch.setattr(OwnSamples, "validate", fails)
    monkeypatch.setattr(OwnSamples, "picture", lambda stage: Image.new("RGB", (8, 8)))
    with pytest.raises(GateFailed, match="gate of a test"):
        Engine(replace(RUN, validate_every=3, sample_every=100), OwnSamples, tmp_path, device="cpu").fit()
    assert (tmp_path / "samples" / "step-00000009.png").is_file()
    assert load_latest(tmp_path / "checkpoints")[1]["step"] == 9


GATE = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from test_engine import RUN, TwoPlayers
from nitro_e_lite.errors import GateFailed
from nitro_e_lite.training.engine import Engine

run = Engine(RUN, TwoPlayers, Path(sys.argv[1]), device="cpu")
honest, step = run.save, run.step
def fails():
    if run.global_step == 3:
        raise GateFailed("gate of a test: failed", everywhere=True)
    return step()
run.step, run.save = fails, lambda **options: time.sleep(1) or honest(**options)
try:
    run.fit()
except GateFailed:
    there = (run.run_dir / "checkpoints" / "step-00000003").is_dir()
    (run.run_dir / f"there-{dist.get_rank()}").write_text(str(there))
"""


def test_no_process_ends_before_the_failed_run_is_saved(ranks, tmp_path):  # noqa: F811
    """The first that ended had torchrun end the others, and with them the one that was saving."""
    script = tmp_path / "gate.py"
    script.write_text(GATE)
    ranks.run(2, script, tmp_path / "run")
    assert [(tmp_path / "run" / f"there-{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_a_compiler_that_fails_says_where_its_files_are(tmp_path, monkeypatch):
    """Half a file, left by a killed run, failed every run after it, and nothing said where it was."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))

    def broken(graph, inputs):
        raise OSError("file too short")

    honest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, backend: honest(module, backend=broken))
    with pytest.raises(RuntimeError, match="file too short") as failed:
        Engine(replace(RUN, compile="inductor"), OwnSamples, tmp_path / "run", device="cpu").fit()
    (said,) = [note for note in failed.value.__notes__ if "compile=inductor" in note]
    assert f"Delete {tmp_path / 'compiled'} and go on" in said


def test_accelerators_have_a_flight_recorder(tmp_path, monkeypatch):
    class Joined(Exception):
        pass

    def join(**_):
        raise Joined

    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "8"})
    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(distributed, "Accelerator", join)
    with pytest.raises(Joined):
        distributed.start_accelerator(RUN, tmp_path, None)
    told = {name: value for name, value in os.environ.items() if name.startswith(("TORCH_FR_", "TORCH_NCCL_D"))}
    assert told == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "flight" / "rank_"),
    }
    assert (tmp_path / "flight").is_dir()


def test_streams_differ_in_everything_that_names_them():
    names = [(0, 0, "noise", 0), (1, 0, "noise", 0), (0, 1, "noise", 0), (0, 0, "order", 0), (0, 0, "noise", 1)]
    drawn = {tuple(torch.rand(3, generator=generator(*name)).tolist()) for name in names}
    assert len(drawn) == len(names)
    assert torch.equal(torch.rand(3, generator=generator(*names[0])), torch.rand(3, generator=generator(0, 0, "noise")))
