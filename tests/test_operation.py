"""A run that lasts days: bad steps, milestones, checkpoints beside the training, time by rank, patience."""

import json
import math
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_engine import RUN, TwoPlayers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Model, LlamaModel

from nitro_e_lite.config import RunConfig, override, to_dict
from nitro_e_lite.data.batches import Batches
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch
from nitro_e_lite.errors import NotFinite
from nitro_e_lite.experiments import launch, plan, worker
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import load_pipeline, load_transformer
from nitro_e_lite.inference.vision import VisionEncoder, load_vision
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.presets import preset
from nitro_e_lite.stages.pretrain import Pretrain, pretrain
from nitro_e_lite.training import checkpoints, engine, optimizers
from nitro_e_lite.training.checkpoints import CheckpointWriter, list_checkpoints, load_latest
from nitro_e_lite.training.clock import straggler
from nitro_e_lite.training.engine import Engine, Placement
from nitro_e_lite.training.health import Health
from nitro_e_lite.training.milestones import concerns

SMOKE = preset("base", "smoke")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NITRO_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# -- bad steps


def judged(health, losses, norm=1.0):
    return [health.judge([torch.tensor(norm)], {"a": torch.tensor(loss)}).item() for loss in losses]


def test_spikes_are_left_out_and_do_not_move_the_mean():
    health = Health(RunConfig(spike_factor=2.0, max_skipped=2), torch.device("cpu"))
    assert judged(health, [5.0] * 60 + [20.0]) == [0] * 61, "too early to tell"
    assert judged(health, [5.0] * 60 + [9.0, 11.0, 5.0, 11.0]) == [0] * 61 + [1, 0, 1]
    assert (health.spikes, health.skipped) == (2, 0)
    again = Health(RunConfig(spike_factor=2.0, max_skipped=2), torch.device("cpu"))
    again.load_state(json.loads(json.dumps(health.state())))
    judged(health, [11.0])
    health.check()
    judged(again, [11.0, 11.0])
    with pytest.raises(NotFinite, match="3 steps had .* jumped, one after the other .max_skipped=2") as raised:
        again.check()
    assert raised.value.everywhere  # so the main process may take its time to save


def test_without_a_bound_every_finite_loss_passes():
    health = Health(RunConfig(), torch.device("cpu"))
    assert judged(health, [1.0] * 200 + [1e9]) == [0] * 201


def broken(run, steps):
    """Gradients of these steps are not finite."""
    hook = lambda gradient: gradient * (math.nan if run.global_step in steps else 1.0)  # noqa: E731
    for player in (run.stage.player, run.stage.critic[0]):
        player.weight.register_hook(hook)


def test_bad_steps_count_in_a_row_and_the_run_is_saved_before_it_gives_up(tmp_path):
    run = Engine(replace(RUN, max_skipped=1, checkpoint_every=100), TwoPlayers, tmp_path, device="cpu")
    broken(run, {1, 3, 5, 8, 9})  # five in all; two of them in a row
    with pytest.raises(NotFinite, match=r"2 steps had non-finite gradients.*step 10 is saved in .*checkpoints"):
        run.fit()
    assert load_latest(tmp_path / "checkpoints")[1]["step"] == 10
    again = Engine(RUN, TwoPlayers, tmp_path, resume=True, device="cpu")
    assert (again.health.skipped, again.global_step) == (5, 10)
    again.fit()
    assert list(read_jsonl(tmp_path / "metrics.jsonl"))[-1]["skipped"] == 5


class Fused(TwoPlayers):
    """The same players with torch's fused AdamW, which can leave steps out by itself."""

    def __init__(self, config, placement):
        super().__init__(config, placement)
        for name, one in self.modules.items():
            adam = lambda masters: {"adamw": torch.optim.AdamW(masters.values(), lr=1e-2, fused=True)}  # noqa: E731
            self.modules[name] = replace(one, optimizers=adam)


def test_a_step_left_out_by_the_device_is_one_left_out_by_the_host(tmp_path, monkeypatch):
    """What an accelerator does, done on the CPU: nobody asks, and weights, moments and average have the same bits."""
    found = []
    for name, fused in (("host", ()), ("device", ("cpu",))):
        monkeypatch.setattr(engine, "FUSED", fused)
        run = Engine(replace(RUN, max_skipped=9), Fused, tmp_path / name, device="cpu")
        assert run.host_decides == (name == "host")
        broken(run, {2, 3, 7})
        for _ in range(10):
            run.step()
        assert run.health.skipped == 3
        run.save()
        found.append(load_latest(tmp_path / name / "checkpoints")[0])
    for stem in ("weights", "ema", "optimizer"):
        for name, value in found[0][stem].items():
            assert torch.equal(value, found[1][stem][name]), (stem, name)


def test_adamw_is_fused_on_accelerators(monkeypatch):
    plain = optimizers.adamw([torch.nn.Parameter(torch.ones(2))], lr=0.1, foreach=True)
    monkeypatch.setattr(optimizers, "FUSED", ("cpu",))
    fused = optimizers.adamw([torch.nn.Parameter(torch.ones(2))], lr=0.1, foreach=True)
    assert [o.param_groups[0]["fused"] for o in (plain, fused)] == [None, True]


class Copies(TorchDispatchMode):
    """Notes copies from the host that wait until the device has done all it was given before."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given, made = arguments[0], function(*arguments, **(options or {}))
        if function == torch.ops.aten._to_copy.default and given.device != made.device:
            self.waits += [tuple(given.shape)] * (not (options or {}).get("non_blocking"))
        return made


def test_a_step_with_all_encoders_beside_it_never_asks_the_device(tmp_path):
    """On torch's meta device, which has no numbers to give: whoever asks for one is found out without a GPU.

    The library asked whether captions are padded, and the count of cut captions waited for its own copy.
    """
    config = override(SMOKE, ["repa.weight=0.5"])
    meta, encoders, rows = torch.device("meta"), load_encoders("lite"), range(config.batch_size)
    sees = load_vision("lite").model.config
    with meta:
        text, eyes = LlamaModel(encoders.text_encoder.config), Dinov2Model(sees)
        sizes = {"repa_channels": eyes.config.hidden_size, "repa_hidden": config.repa.hidden}
        model = EMMDiTTransformer2DModel(**to_dict(config.model), **sizes)
    stage = Pretrain.__new__(Pretrain)
    stage.config, stage.placement, stage.model = config, Placement(meta, torch.float32, (rows,)), model
    stage.encoders, stage.vision = replace(encoders, text_encoder=text), VisionEncoder(eyes)
    stage.batches = Batches(config, encoders, rows)
    stage.batches.needs_images = True
    with Copies() as copies:
        losses = stage.losses(0, 0)["transformer"]
        losses["loss"].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        Health(config, meta).judge([norm], {"loss": losses["loss"].mean()})
    assert {value.device for value in losses.values()} == {meta} and losses.keys() >= {"captions_cut", "repa_loss"}
    assert copies.waits == []
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses["loss"].mean().item()


# -- checkpoints, snapshots, milestones


def test_checkpoints_are_written_beside_the_training_from_what_was_there(tmp_path, monkeypatch):
    begin, write, gate = [], checkpoints.save_checkpoint, threading.Event()

    def slow(*arguments):
        gate.wait(10)
        begin.append(arguments[1])
        return write(*arguments)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    writer, value, state = CheckpointWriter(tmp_path, keep=2), torch.zeros(4), {"seen": []}
    writer.save(1, {"weights": {"w": value}}, state)
    value += 1
    state["seen"].append("later")
    writer.check()
    assert not begin and not list_checkpoints(tmp_path), "saving must not have waited"
    gate.set()
    assert writer.wait().name == "step-00000001" and writer.wait() is None
    tensors, kept = load_latest(tmp_path)
    assert not tensors["weights"]["w"].any() and kept["seen"] == []
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    writer.save(2, {"weights": {"w": value}}, state)
    with pytest.raises(OSError, match="No space"):
        writer.wait()


def test_a_checkpoint_is_due_by_minutes_too_and_holds_no_average_that_is_the_weights(tmp_path, monkeypatch):
    config = replace(RUN, steps=6, checkpoint_every=100, keep_checkpoints=9, checkpoint_minutes=2.0, ema_decay=0.0)
    run = Engine(config, TwoPlayers, tmp_path, device="cpu")
    monkeypatch.setattr(CheckpointWriter, "minutes", property(lambda writer: 2.5 * (run.global_step == 4)))
    run.fit()
    names = [path.name for path in list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    assert not list(tmp_path.glob("checkpoints/*/ema*"))


@pytest.fixture(scope="module")
def operated(tmp_path_factory):
    """A smoke run with everything that a long one has."""
    run_dir = tmp_path_factory.mktemp("runs") / "operated"
    changes = ["steps=4", "snapshot_every=2", "milestones=[2]", "ema_decay=0.9", "data.validation_rows=6"]
    with pytest.warns(UserWarning, match="milestone, step 2: captions change little"):
        pretrain(override(SMOKE, [*changes, "validate_every=3", "sample_every=100"]), run_dir, device="cpu")
    return run_dir


def test_milestones_and_snapshots_of_the_average(operated):
    rows = list(read_jsonl(operated / "milestones.jsonl"))
    assert [row["step"] for row in rows] == [2]
    assert all({"validation_loss", "contrast", "spread", "concerns"} <= row.keys() for row in rows)
    assert [path.name for path in (operated / "milestones").iterdir()] == ["step-00000002.png"]
    assert sorted(path.name for path in (operated / "snapshots").iterdir()) == ["step-00000002", "step-00000004"]
    snapshot = operated / "snapshots" / "step-00000002"
    values = load_file(snapshot / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in values.values()} == {torch.bfloat16}
    assert sum(v.nbytes for v in values.values()) == plan.snapshot_bytes(SMOKE)
    assert EMMDiTTransformer2DModel.from_pretrained(snapshot, torch_dtype=torch.float32).dtype == torch.float32
    checks = [row for row in read_jsonl(operated / "metrics.jsonl") if "validation_loss" in row]
    assert [row["step"] for row in checks] == [2, 3, 4]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"validation_loss": 0.5, "contrast": 0.2, "spread": 0.1}, []),
        ({"validation_loss": 0.9}, ["validation_loss 0.9000 is not below the 0.8000 of step 5"]),
        ({"validation_loss": math.nan}, ["validation_loss is not finite"]),
        ({"contrast": 0.01, "spread": 0.001}, ["pictures are flat", "captions change little"]),
    ],
)
def test_the_rule_of_milestones(found, said):
    heard = concerns(found, {"step": 5, "validation_loss": 0.8})
    assert len(heard) == len(said) and all(one.startswith(words) for one, words in zip(heard, said, strict=True))


def test_a_picture_that_fails_is_said_and_ends_nothing(tmp_path, monkeypatch):
    def fails(stage):
        raise RuntimeError("HIP out of memory\nTried to allocate 2 GiB")

    monkeypatch.setattr(Pretrain, "picture", fails)
    run = Engine(override(SMOKE, ["steps=2", "sample_every=1"]), Pretrain, tmp_path, device="cpu")
    with pytest.warns(
        UserWarning, match=r"^no picture at step 1 \(RuntimeError: HIP out of memory\); training goes on"
    ):
        run.fit()
    assert (tmp_path / "final").is_dir() and not list(tmp_path.glob("samples/*"))


def test_validation_is_capped_and_split_without_changing_it(tmp_path):
    batches = Batches(override(SMOKE, ["data.validation_scenes=8"]), load_encoders("lite"))
    whole = [row for rows in batches.validation_rows(size=3) for row in rows]
    split = [[row for rows in batches.validation_rows(rank, 2, size=3) for row in rows] for rank in (0, 1)]
    assert whole == list(range(8)) and split == [[0, 1, 2, 6, 7], [3, 4, 5]]
    capped = Batches(override(SMOKE, ["data.validation_rows=5"]), load_encoders("lite"))
    assert sum(map(len, capped.validation_rows())) == 5
    assert [len(one.captions) for one in capped.validation_batches()] == [5]


def test_validation_keeps_to_its_share_of_the_time(tmp_path, monkeypatch):
    run = Engine(override(SMOKE, ["validation_share=0.02", "milestones=[3]"]), Pretrain, tmp_path, device="cpu")
    monkeypatch.setattr(run, "validate", lambda: {"validation_loss": 1.0})
    run.progress.seconds, run.progress.validation_seconds = 97.0, 2.0  # 2 % of 99 s are 1.98
    assert run._validate_in_time(must=False) == {}
    assert run._validate_in_time(must=True) == {"validation_loss": 1.0}
    run.progress.seconds = 99.0
    assert run._validate_in_time(must=False) == {"validation_loss": 1.0}


def test_a_snapshot_is_drawn_from_with_the_settings_of_its_run(operated):
    pipeline = load_pipeline(operated / "snapshots" / "step-00000002", "cpu")
    assert (pipeline.config.default_guidance, pipeline.shift) == (SMOKE.guidance, SMOKE.shift)


def test_1024_px_goes_on_from_a_smaller_grid(operated, tmp_path):
    """All weights are taken over; the table of positions in the file is also that of the larger grid."""
    encoders = load_encoders("lite")
    latents = torch.randn(16, encoders.latent_channels, 32, 32, generator=torch.Generator().manual_seed(0)).half()
    rows = LatentBatch(latents, [[f"scene number {k}"] for k in range(16)])
    write_latents(tmp_path / "large", [rows], encoders.image_fingerprint)
    folders = [f"data.folders=[{tmp_path / 'large'}]", f"data.validation_folders=[{tmp_path / 'large'}]"]
    config = override(preset("1024px", "smoke"), [*folders, "steps=1", "sample_every=9", f"start_from={operated}"])
    with pytest.raises(ValueError, match="start_from=''"):
        Engine(override(config, ["start_from="]), Pretrain, tmp_path / "run", device="cpu")
    run = Engine(config, Pretrain, tmp_path / "run", device="cpu")
    model, small = run.stage.model, load_transformer(operated)
    fresh = EMMDiTTransformer2DModel(**to_dict(config.model))
    assert torch.equal(model.positions, fresh.positions)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())
    assert {tuple(block.attention.pattern) for group in model.groups for block in group} == {(1, 1)}
    assert math.isfinite(run.step()["loss"])
    full = preset("1024px", "full")
    assert (full.model.sample_size, full.model.attention_pattern) == (32, ((1, 1),)) and full.start_from


# -- who is slow, and what is started again


def test_the_one_that_the_others_wait_for_is_named():
    assert straggler({"data": [0.1, 0.1, 0.4], "compute": [1.0, 1.1, 1.0], "communication": [0.3, 0.2, 0.0]}) == 2


def test_a_restarted_worker_goes_on_and_repeats_no_mistake(tmp_path, monkeypatch):
    asked = {"settings": type(SMOKE).__name__, "config": {}, "run_dir": "r", "resume": False, "device": "cpu"}
    request, outcome = tmp_path / "request.json", tmp_path / "outcome.json"
    request.write_text(json.dumps(asked | {"outcome": str(outcome)}))
    seen = []
    monkeypatch.setitem(worker.RUNS, "transformer", (type(SMOKE), lambda *given: seen.append(given[2]) or "final"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    worker.main(str(request))
    assert seen == [True]
    with pytest.raises(SystemExit):  # an outcome was written: a mistake, which would be made again
        worker.main(str(request))
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: True)
    assert "--max-restarts 3" in " ".join(launch.torchrun_words([sys.executable], 8))
    assert "--max-restarts 0" in " ".join(launch.torchrun_words([sys.executable], 8, restarts=0))
