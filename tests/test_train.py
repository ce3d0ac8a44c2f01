"""The training loop at smoke scale: it learns, repeats bit for bit, and survives kills, with one process and two."""

import dataclasses
import json
import logging
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from ranks import ranks  # noqa: F401
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nitro_e_lite import config
from nitro_e_lite.cli.app import app
from nitro_e_lite.config import override, to_dict
from nitro_e_lite.data import scene_latents
from nitro_e_lite.data.batches import Batches
from nitro_e_lite.data.scene_latents import encode_scenes
from nitro_e_lite.errors import UserError
from nitro_e_lite.experiments.ship import record, ship
from nitro_e_lite.files import check_manifest, read_jsonl, run_lock, sha256_file, weights_dir
from nitro_e_lite.inference.encoders import LatentStats, load_encoders
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import count_flops
from nitro_e_lite.presets import preset
from nitro_e_lite.runtime import RunStopped
from nitro_e_lite.stages.pretrain import Pretrain, pretrain
from nitro_e_lite.training import distributed
from nitro_e_lite.training.checkpoints import list_checkpoints
from nitro_e_lite.training.engine import Engine
from nitro_e_lite.training.metrics import tracker_name
from nitro_e_lite.training.optimizers import build_optimizers, hidden_matrices, learning_rate_scale
from nitro_e_lite.training.weights import MasterWeights, plain_weights, white_roots

SMOKE = preset("base", "smoke")
SHORT = ["--preset", "smoke", "--set", "steps=2", "--set", "batch_size=4", "--set", "validate_every=2"]
TWO_PROCESSES = 1e-4  # largest relative difference of a weight tensor after ten steps; about 3e-6 is usual


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One latent cache for the whole file, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NITRO_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def engine(config, run_dir, resume=False):
    """A run of the transformer's stages on the CPU."""
    return Engine(config, Pretrain, run_dir, resume, "cpu")


def masters(run):
    """The float32 weights of a run by name."""
    return run.learners["transformer"].masters


def final_weights(run_dir):
    return load_file(run_dir / "final" / "diffusion_pytorch_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The smoke run in one go."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(SMOKE, run_dir, device="cpu")
    return run_dir


def test_a_run_leaves_what_it_promises(uninterrupted):
    rows = list(read_jsonl(uninterrupted / "metrics.jsonl"))
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, SMOKE.steps + 1))
    checks = [r for r in rows if "validation_loss" in r]
    assert [r["step"] for r in checks] == [5, 10]
    ranges = [k for k in range(5) if f"validation_loss_{k / 5:.1f}_{(k + 1) / 5:.1f}" in checks[0]]
    assert len(ranges) >= 3  # eight scenes need not reach all five
    assert (uninterrupted / "samples" / "step-00000010.png").is_file()
    about = json.loads((uninterrupted / "config.json").read_text())
    assert about["config"]["preset"] == "smoke" and about["environment"]["packages"]["torch"]
    model = EMMDiTTransformer2DModel.from_pretrained(uninterrupted / "final")
    assert tuple(model.config.block_groups) == SMOKE.model.block_groups


def test_a_run_can_be_shipped(uninterrupted, tmp_path):
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(weights_dir() / "lite" / part, tmp_path / part)
    encoder = sha256_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    ship(uninterrupted, str(tmp_path), steps=7)
    sums = check_manifest(tmp_path)
    assert sums["vae/diffusion_pytorch_model.safetensors"] == encoder
    (settings,) = json.loads((tmp_path / "transformer" / "training.json").read_text())["stages"]
    assert settings == json.loads((uninterrupted / "config.json").read_text())["config"]
    rows, own = (list(read_jsonl(folder / "metrics.jsonl")) for folder in (tmp_path / "transformer", uninterrupted))
    assert rows == [{"stage": "base"} | row for row in own]
    pipeline = load_pipeline(tmp_path, device="cpu")
    assert pipeline.config.default_steps == 7 and pipeline.stats == LatentStats.load(tmp_path / "vae")
    assert (pipeline.config.default_guidance, pipeline.shift) == (SMOKE.guidance, SMOKE.shift)  # of the run
    for name, value in final_weights(uninterrupted).items():
        assert torch.equal(pipeline.transformer.state_dict()[name], value.half().float()), name
    other = tmp_path / "other"  # trained on other latents: its pictures would be wrong
    shutil.copytree(uninterrupted, other, ignore=shutil.ignore_patterns("checkpoints"))
    about = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(about | {"encoders": "0" * 64}))
    with pytest.raises(ValueError, match="was trained with other encoders than those of"):
        ship(other, str(tmp_path))
    shutil.rmtree(other)
    with pytest.raises(ValueError, match="guidance: .*final does not say which"):  # nobody knows from where
        ship(uninterrupted / "final", str(tmp_path), shift=2.0)
    ship(uninterrupted / "final", str(tmp_path), guidance=1.5, shift=2.0)
    ship(tmp_path, str(tmp_path))  # a pipeline says it of itself
    pipeline = load_pipeline(tmp_path, device="cpu")
    assert (pipeline.config.default_guidance, pipeline.shift) == (1.5, 2)
    assert not (tmp_path / "transformer" / "training.json").exists()
    assert not (tmp_path / "transformer" / "metrics.jsonl").exists()


def test_a_model_of_two_stages_ships_with_the_record_of_both(uninterrupted, tmp_path, monkeypatch):
    run, encoders = tmp_path / "tuned", tmp_path / "chain" / "encoders"
    run.mkdir()
    first = json.loads((uninterrupted / "config.json").read_text())["config"]
    second = first | {"stage": "finetune", "start_from": str(uninterrupted)}
    second |= {"data": first["data"] | {"encoders": str(encoders)}}
    (run / "config.json").write_text(json.dumps({"config": second}))
    (run / "metrics.jsonl").write_text('{"step": 2, "samples": 16, "seconds": 1.5, "loss": 0.5}\n')
    stages, rows = record(run)
    assert [one["stage"] for one in stages] == ["base", "finetune"] and stages[0] == first
    assert stages[1]["start_from"] == "/".join(uninterrupted.parts[-2:])  # and nothing else of this machine
    assert stages[1]["data"]["encoders"] == "chain/encoders" and str(tmp_path) not in json.dumps(stages)
    own = list(read_jsonl(uninterrupted / "metrics.jsonl"))
    last = {name: max(row[name] for row in own if name in row) for name in ("step", "samples", "seconds")}
    assert rows[:-1] == [{"stage": "base"} | row for row in own]
    more = {"step": last["step"] + 2, "samples": last["samples"] + 16, "seconds": round(last["seconds"] + 1.5, 3)}
    assert rows[-1] == {"stage": "finetune", "loss": 0.5} | more
    (run / "config.json").write_text(json.dumps({"config": second | {"start_from": "lite"}}))
    stages, rows = record(run)  # the shipped model tells its own history
    shipped = list(read_jsonl(weights_dir() / "lite" / "transformer" / "metrics.jsonl"))
    assert len(stages) >= 2 and rows[: len(shipped)] == shipped and rows[-1]["step"] == shipped[-1]["step"] + 2
    (run / "config.json").write_text(json.dumps({"config": second | {"start_from": str(uninterrupted / "final")}}))
    assert len(record(run)[0]) == 2  # a run by its weights
    old = tmp_path / "pipeline" / "transformer"  # of before the record was kept, by a relative path
    old.mkdir(parents=True)
    (old / "training.json").write_text(json.dumps(first))
    (old / "metrics.jsonl").write_text('{"step": 7}\n')
    monkeypatch.chdir(tmp_path)
    (run / "config.json").write_text(json.dumps({"config": second | {"start_from": "pipeline"}}))
    stages, rows = record(run)
    assert stages[0] == first and [row["step"] for row in rows] == [7, 9]
    (old / "training.json").write_text(json.dumps({"stages": stages}))  # shipped, and shipped again
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert record(run) == (stages, rows)


def test_the_same_run_twice_is_the_same(uninterrupted, tmp_path):
    pretrain(SMOKE, tmp_path / "again", device="cpu")
    assert_same(final_weights(tmp_path / "again"), final_weights(uninterrupted))


def test_every_field_of_a_recipe_is_read_while_it_trains(uninterrupted, tmp_path, monkeypatch):
    """A hyper-parameter that nothing reads is a lie. Its own class and copies of it do not count as readers."""
    read, own = {}, ("dataclasses", "nitro_e_lite.config", "pydantic._internal._dataclasses")

    def spy(cls):
        def get(self, name):
            if sys._getframe(1).f_globals["__name__"] not in own:
                read.setdefault(cls.__name__, set()).add(name)
            return object.__getattribute__(self, name)

        return get

    for cls in (config.TrainConfig, config.DataConfig, config.OptimizerConfig, config.RepaConfig):
        monkeypatch.setattr(cls, "__getattribute__", spy(cls))
    changes = [f"start_from={uninterrupted}", "steps=2", "sample_every=2", "repa.weight=0.5"]
    pretrain(override(preset("finetune", "smoke"), changes), tmp_path / "run", device="cpu")
    described = {"TrainConfig": {"preset", "max_skipped"}}  # where the recipe began; read when a step is skipped
    for cls in (config.TrainConfig, config.DataConfig, config.OptimizerConfig, config.RepaConfig):
        fields = {field.name for field in dataclasses.fields(cls)} - described.get(cls.__name__, set())
        assert fields <= read[cls.__name__], fields - read[cls.__name__]


def test_a_run_stopped_and_resumed_equals_one_in_one_go(uninterrupted, tmp_path):
    run = engine(SMOKE, tmp_path)
    for _ in range(5):
        run.step()
    run.save()
    for _ in range(2):
        run.step()  # lost by the stop
    pretrain(SMOKE, tmp_path, resume=True, device="cpu")
    assert_same(final_weights(tmp_path), final_weights(uninterrupted))


# -- kills, one process


def words(run_dir, *assignments):
    """The command of a run that saves after every step."""
    every_step = ["checkpoint_every=1", "validate_every=1000", "sample_every=1000", *assignments]
    sets = [word for a in every_step for word in ("--set", a)]
    return ["train", "base", "--preset", "smoke", "--device", "cpu", *sets, "--resume", "--run-dir", str(run_dir)]


def newest_step(run_dir):
    folders = list_checkpoints(run_dir / "checkpoints")
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def test_sigkill_and_resume_equals_one_in_one_go(ranks, tmp_path):  # noqa: F811
    """Killed at random moments, among them the writing of a checkpoint, until it is through."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ranks.run(1, *words(whole, "steps=12"))
    draw = random.Random(0)
    for _ in range(2):
        before = newest_step(killed)
        ranks.start(1, *words(killed, "steps=12"))
        ranks.until(lambda before=before: newest_step(killed) > before)  # it has moved on
        time.sleep(draw.uniform(0, 0.1))
        ranks.kill()
    ranks.run(1, *words(killed, "steps=12"))
    assert_same(final_weights(killed), final_weights(whole))
    steps = [row["step"] for row in read_jsonl(killed / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 13))


def test_a_full_disk_ends_the_run_and_spares_the_checkpoint(ranks, tmp_path):  # noqa: F811
    ranks.start(1, *words(tmp_path, "steps=1000"))
    ranks.until(lambda: newest_step(tmp_path) >= 1)
    ranks.limit_files(30_000)
    assert ranks.wait() == [2]
    said = ranks.log.read_text()
    assert "could not be written" in said and "is intact" in said and "Traceback" not in said
    last = newest_step(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
    ranks.run(1, *words(tmp_path, f"steps={last + 1}"))
    assert newest_step(tmp_path) == last + 1


# -- two processes


@pytest.fixture(scope="module")
def two(ranks, tmp_path_factory):  # noqa: F811
    """The smoke run by two processes, in one go."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    ranks.run(2, *words(run_dir))
    return run_dir


def test_two_processes_equal_one(two, uninterrupted):
    """Same batch, same noise; only the order of summation differs, and ten steps let rounding grow."""
    largest, name = difference(final_weights(uninterrupted), final_weights(two))
    print(f"largest difference: {largest:.1e} in {name}")
    assert largest < TWO_PROCESSES, name
    losses = [[r["loss"] for r in read_jsonl(run / "metrics.jsonl") if "loss" in r] for run in (uninterrupted, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # the reported loss is the mean over the processes
    assert json.loads((two / "config.json").read_text())["processes"] == 2


def difference(one, other):
    """The largest relative difference of a weight tensor, and its name."""
    found = {name: ((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-3)).item() for name in one}
    largest = max(found, key=found.get)
    return found[largest], largest


def test_a_run_of_two_processes_goes_on_with_one(ranks, uninterrupted, tmp_path):  # noqa: F811
    ranks.start(2, *words(tmp_path))
    ranks.until(lambda: newest_step(tmp_path) >= 3)
    ranks.kill()
    assert newest_step(tmp_path) < SMOKE.steps
    ranks.run(1, *words(tmp_path))
    assert difference(final_weights(uninterrupted), final_weights(tmp_path)) < (TWO_PROCESSES,)
    rows = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in row]
    assert rows == list(range(1, SMOKE.steps + 1))


def test_two_processes_killed_while_writing_and_a_damaged_checkpoint(ranks, two, tmp_path):  # noqa: F811
    """Killed within an epoch (4 steps) with a checkpoint half written; the newest whole one is then damaged as well."""
    folder = tmp_path / "checkpoints"
    for after in (1, 5):
        ranks.start(2, *words(tmp_path))
        half = lambda after=after: newest_step(tmp_path) > after and [*folder.glob(".partial-*/weights*")]  # noqa: E731
        ranks.until(half, every=0.0005)
        ranks.kill()
        assert newest_step(tmp_path) % 4, "not within an epoch"
    newest = list_checkpoints(folder)[-1] / "weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert f"{newest}: missing or damaged" in ranks.run(2, *words(tmp_path))
    assert_same(final_weights(tmp_path), final_weights(two))


MUON = """
import os, sys, torch
import torch.distributed as dist
from safetensors.torch import save_file
from nitro_e_lite.training.optimizers import Muon

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
shapes = [(24, 8), (8, 24), (16, 16), (24, 8), (48, 16)]
values = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
muon = Muon(values, lr=0.02, momentum=0.95, weight_decay=0.1)
for _ in range(3):
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)
    muon.step()
save_file({str(k): v.detach() for k, v in enumerate(values)}, sys.argv[1] + os.environ.get("RANK", "alone"))
"""


def test_muon_of_two_processes_is_that_of_one(ranks, tmp_path):  # noqa: F811
    """Both hold the same weights, bit for bit; alone, matrices are stacked otherwise, which is worth rounding."""
    script = tmp_path / "muon.py"
    script.write_text(MUON)
    ranks.run(1, script, tmp_path / "weights-")
    ranks.run(2, script, tmp_path / "weights-")
    alone, first, second = (load_file(tmp_path / f"weights-{name}") for name in ("alone", "0", "1"))
    assert_same(first, second)
    for name in alone:
        assert torch.allclose(alone[name], first[name], rtol=0, atol=1e-6), name


TOGETHER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from nitro_e_lite.presets import preset
from nitro_e_lite.training.distributed import PATIENCE, check_together, start_accelerator

folder = Path(sys.argv[1])
accelerator = start_accelerator(preset("base", "smoke"), folder, "cpu")
assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == PATIENCE
check_together(accelerator, 5, folder)
try:
    check_together(accelerator, accelerator.process_index, folder)
except RuntimeError as error:
    assert "found checkpoints of steps [0, 1]" in str(error), error
else:
    raise SystemExit("not refused")
"""


def test_processes_wait_long_for_each_other_and_must_resume_from_one_step(ranks, tmp_path):  # noqa: F811
    """One encodes the scenes for all, longer than a process group waits by default; machines may see other folders."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    ranks.run(2, script, tmp_path)


def test_sigterm_to_one_of_two_saves_and_ends_well(ranks, two, tmp_path):  # noqa: F811
    pids = ranks.start(2, *words(tmp_path, "checkpoint_every=1000"))
    ranks.until(
        lambda: (tmp_path / "metrics.jsonl").is_file() and '"step": 2' in (tmp_path / "metrics.jsonl").read_text()
    )
    os.kill(pids[1], signal.SIGTERM)
    assert ranks.wait() == [0, 0]
    step = newest_step(tmp_path)
    lines = [line for line in ranks.log.read_text().splitlines() if line.startswith("Stopped by")]
    assert len(lines) == 1 and f"after step {step} of 10" in lines[0] and 2 <= step < 10
    assert not (tmp_path / "final").exists()
    ranks.run(2, *words(tmp_path))
    assert_same(final_weights(tmp_path), final_weights(two))


def test_sigint_in_place_saves_and_says_so(uninterrupted, tmp_path):
    run = engine(SMOKE, tmp_path)
    step = run.step
    run.step = lambda: (os.kill(os.getpid(), signal.SIGINT), step())[1]
    with pytest.raises(RunStopped, match="Stopped by SIGINT after step 1 of 10"):
        run.fit()
    pretrain(SMOKE, tmp_path, resume=True, device="cpu")
    assert_same(final_weights(tmp_path), final_weights(uninterrupted))


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with run_lock(tmp_path), pytest.raises(RuntimeError, match="another process is writing there"):
        pretrain(SMOKE, tmp_path, device="cpu")
    assert not (tmp_path / "metrics.jsonl").exists()
    with run_lock(tmp_path), run_lock(tmp_path, writes=False):  # the other processes of a run
        pass


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="device: 'cuda:7' is not usable on this machine"):
        Engine(SMOKE, Pretrain, tmp_path, device="cuda:7")


def test_resuming_on_other_data_is_said(uninterrupted, tmp_path):
    run = engine(SMOKE, tmp_path)
    run.step()
    run.save()
    fewer = override(SMOKE, [f"data.scenes={SMOKE.data.scenes - 8}"])
    with pytest.warns(UserWarning, match=r"data: \[32\] rows when the checkpoint was written, \[24\] now"):
        engine(fewer, tmp_path, resume=True)


def test_resuming_with_other_settings_or_encoders_is_said_or_refused(tmp_path, monkeypatch):
    run = engine(SMOKE, tmp_path)
    run.step()
    run.save()
    other = override(SMOKE, ["optimizer.lr=1e-5", "data.seed=4", "log_every=7"])
    said = r"from step 1 on other settings hold: data.seed 0 -> 4, optimizer.lr 0.002 -> 1e-05$"
    with pytest.warns(UserWarning, match=said):
        engine(other, tmp_path, resume=True)
    with pytest.raises(
        ValueError, match=r"optimizer.name=adamw: the run was started with muon, whose state is another"
    ):
        engine(override(SMOKE, ["optimizer.name=adamw"]), tmp_path, resume=True)
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    text = state.read_text(encoding="utf-8")
    state.write_text(text.replace(run.stage.encoders.fingerprint, "0" * 64), encoding="utf-8")
    with pytest.raises(ValueError, match="data.encoders=.*: the run was started with other encoders"):
        engine(SMOKE, tmp_path, resume=True)


def test_processes_that_did_not_find_each_other_are_refused(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2, but accelerate sees 1"):
        engine(SMOKE, tmp_path)


@pytest.fixture
def fresh_accelerate():
    """accelerate as in a new process: it keeps what the first run of a process chose."""

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def test_what_accelerate_reads_from_the_environment_changes_no_bit(plain, tmp_path, fresh_accelerate, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    rows, weights = after_three_steps(tmp_path)
    assert rows == plain[0]
    assert_same(weights, plain[1])


@pytest.mark.parametrize("name", distributed.FOREIGN)
def test_other_ways_to_train_are_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "TE" if name.endswith("BACKEND") else "true")
    with pytest.raises(ValueError, match=f"^{name}=.*: a run is data-parallel"):
        engine(SMOKE, tmp_path)
    monkeypatch.setenv(name, "NO" if name.endswith("BACKEND") else "")
    engine(SMOKE, tmp_path)


# -- one step


def test_a_run_that_would_silently_stay_on_the_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nitro_e_lite.training.distributed.pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(RuntimeError, match="chose the CPU"):
        Engine(SMOKE, Pretrain, tmp_path)


def test_bf16_computes_on_float32_masters(tmp_path):
    run = engine(override(SMOKE, ["precision=bf16"]), tmp_path)
    assert {p.dtype for p in run.stage.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in masters(run).values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in masters(run).items()}
    row = run.step()
    assert row["loss"] > 0 and any(not torch.equal(before[n], p) for n, p in masters(run).items())
    for name, parameter in run.stage.model.named_parameters():
        assert torch.equal(parameter, masters(run)[name].bfloat16()), name


def test_a_non_finite_gradient_changes_nothing_and_many_end_the_run(tmp_path):
    run = engine(override(SMOKE, ["max_skipped=1"]), tmp_path)
    before = {name: p.detach().clone() for name, p in masters(run).items()}
    run.stage.model.proj_out.weight.register_hook(lambda gradient: gradient * float("nan"))
    run.step()
    assert run.health.skipped == 1 and run.global_step == 1
    assert_same(before, {name: p.detach() for name, p in masters(run).items()})
    with pytest.raises(FloatingPointError, match="2 steps had non-finite gradients"):
        run.step()


def after_three_steps(run_dir, *assignments):
    run = engine(override(SMOKE, list(assignments)), run_dir)
    rows = [run.step() for _ in range(3)]
    return rows, {name: p.detach() for name, p in masters(run).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three steps as they are."""
    return after_three_steps(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("how", ["accumulate=4", "gradient_checkpointing=true", "compile=eager"])
def test_the_same_step_in_another_way(how, plain, tmp_path):
    """Accumulation sums in another order; checkpointing and compilation with no optimising change nothing else."""
    rows, weights = after_three_steps(tmp_path, how)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain[0]], rel=1e-4)
    for name, value in weights.items():
        assert (value - plain[1][name]).norm() <= 1e-3 * value.norm() + 1e-5, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_white_text_resumes_and_leaves_plain_weights(precision, tmp_path):
    config = override(SMOKE, ["optimizer.whiten_text_input=true", f"precision={precision}"])
    whole = pretrain(config, tmp_path / "whole", device="cpu")
    run = engine(config, tmp_path / "resumed")
    learned = "text_embed.parametrizations.weight.original"
    assert learned in masters(run) and "text_embed.weight" not in masters(run)
    for _ in range(3):
        run.step()
    run.save()
    assert_same(
        final_weights(pretrain(config, tmp_path / "resumed", resume=True, device="cpu").parent),
        final_weights(whole.parent),
    )
    with pytest.raises(ValueError, match="optimizer.whiten_text_input"):
        Engine(
            override(config, ["optimizer.whiten_text_input=false"]),
            Pretrain,
            tmp_path / "resumed",
            resume=True,
            device="cpu",
        )
    again = Engine(
        override(config, [f"start_from={whole}", "precision=fp32"]), Pretrain, tmp_path / "again", device="cpu"
    )
    assert torch.allclose(
        again.stage.model.text_embed.weight, final_weights(whole.parent)["text_embed.weight"], atol=1e-4
    )


def test_white_text_resumes_in_its_own_coordinates_on_other_data(tmp_path):
    config = override(SMOKE, ["optimizer.whiten_text_input=true"])
    run = engine(config, tmp_path)
    before = plain_weights(run.stage.model, masters(run))
    run.save()
    other = engine(override(config, ["data.seed=5"]), tmp_path / "other")
    root, changed = white_roots(run.stage.model)["text_embed"], white_roots(other.stage.model)["text_embed"]
    assert (root - changed).abs().max() > 0.1
    resumed = engine(override(config, ["data.seed=5"]), tmp_path, resume=True)
    assert torch.equal(white_roots(resumed.stage.model)["text_embed"], root)
    assert_same(plain_weights(resumed.stage.model, masters(resumed)), before)
    torch.testing.assert_close(resumed.stage.model.text_embed.weight, before["text_embed.weight"], atol=1e-5, rtol=1e-4)


def test_bf16_parts_are_summed_in_float32(tmp_path):
    run = engine(override(SMOKE, ["precision=bf16", "accumulate=2"]), tmp_path)
    sums, collect = [], run.learners["transformer"].weights.collect_gradients

    def watch():
        collect()
        sums.append({name: p.grad.clone() for name, p in masters(run).items() if p.grad is not None})

    run.learners["transformer"].weights.collect_gradients = watch
    run.step()
    assert len(sums) == 2 and all(g.dtype == torch.float32 for g in sums[1].values())
    assert any((g.bfloat16().float() != g).any() for g in sums[1].values())  # more digits than bfloat16 holds


def test_speed_and_utilisation(tmp_path):
    config = override(SMOKE, ["steps=4", "log_every=2", "validate_every=4", "sample_every=9", "peak_tflops=0.001"])
    pretrain(config, tmp_path, device="cpu")
    first, second = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if "mfu" in row]
    seconds = second["seconds"] - first["seconds"]  # both rows are over two steps
    assert second["samples_per_second"] == pytest.approx(2 * config.batch_size / seconds, rel=0.02)
    flops = count_flops(to_dict(config.model), 1, 32)
    expected = second["samples_per_second"] * 3 * (flops.weights + flops.attention) / 1e9
    assert second["mfu"] == pytest.approx(expected, rel=0.01)


def test_trackers(tmp_path):
    assert tracker_name("none") is None and tracker_name("auto") == "tensorboard"
    with pytest.raises(ValueError, match="tracker='swanlab': not installed"):
        tracker_name("swanlab")
    pretrain(override(SMOKE, ["steps=1", "tracker=auto", "sample_every=9"]), tmp_path, device="cpu")
    assert [*tmp_path.rglob("events.out.tfevents*")]


def test_fine_tuning_goes_on_from_the_base(uninterrupted, tmp_path):
    stage = override(preset("finetune", "smoke"), ["steps=2"])
    with pytest.raises(ValueError, match="start_from=''"):
        engine(stage, tmp_path)
    known = EMMDiTTransformer2DModel.from_pretrained(uninterrupted / "final")
    for change, said in [
        ({"num_attention_heads": 3}, "size mismatch for "),
        ({"dense_time": True}, "it is told the no"),
    ]:
        EMMDiTTransformer2DModel.like(known, **change).save_pretrained(tmp_path / "other")
        with pytest.raises(UserError, match=f"start_from=.*does not fit the model: {said}"):
            engine(override(stage, [f"start_from={tmp_path / 'other'}"]), tmp_path / "refused")
    run = engine(override(stage, [f"start_from={uninterrupted}"]), tmp_path)
    assert_same(
        {n: p.detach() for n, p in masters(run).items()},
        {n: v for n, v in final_weights(uninterrupted).items() if n in masters(run)},
    )
    assert 8 <= len(run.stage.batches.sources[0].rows) <= 32
    run.fit()
    assert (tmp_path / "final" / "config.json").is_file()
    for size in (24, 16):  # trained with the positions that its results will draw with
        larger = [f"start_from={uninterrupted}", f"model.sample_size={size}", "model.attention_pattern=[[1, 1]]"]
        model = engine(override(stage, larger), tmp_path / str(size)).stage.model
        assert torch.equal(model.positions, EMMDiTTransformer2DModel(**dict(model.config)).positions), size


def test_an_adapter_learns_and_is_loaded_by_pipelines(uninterrupted, tmp_path):
    plain = dataclasses.replace(SMOKE, steps=3, validate_every=3, sample_every=3, ema_decay=0.0)
    plain = dataclasses.replace(plain, stage="finetune", start_from=str(uninterrupted))
    config = override(plain, ["lora.rank=4", "lora.alpha=8", "repa.weight=0"])
    run = engine(config, tmp_path / "run")
    base = {name: p.clone() for name, p in run.stage.model.named_parameters() if ".lora_" not in name}
    run.fit()
    assert all(".lora_" in name for name in masters(run))
    assert all(torch.equal(p, base[name]) for name, p in run.stage.model.named_parameters() if name in base)
    rows = torch.randn(1, 8, 16, 16), torch.randn(1, 32, 256), torch.tensor([500.0])
    untouched, kept, merged = (
        load_pipeline(uninterrupted, "cpu", lora=lora) for lora in (None, None, tmp_path / "run")
    )
    kept.load_lora_weights(tmp_path / "run" / "final")
    with torch.no_grad():
        expected = run.stage.model.eval()(*rows).sample
        for pipeline in (kept, merged):
            torch.testing.assert_close(pipeline.transformer(*rows).sample, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(untouched.transformer(*rows).sample, expected, atol=1e-3)
    with pytest.raises(ValueError, match="lora.rank=4: needs a model to adapt"):
        engine(dataclasses.replace(config, stage="base", start_from=""), tmp_path / "other")


def test_a_lora_on_pictures_of_ones_own_by_the_commands_of_the_readme(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_pictures"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (128, 128), (30 * number, 90, 90)).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"my cat, picture {number}"}) for number in range(8)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for begin, more in [
        ("nitro-e data encode folder my_pictures", []),
        ("nitro-e train finetune --set lora.rank=16", [*SHORT, "--set", f"start_from={uninterrupted}"]),
    ]:
        (line,) = (line for line in readme.splitlines() if line.startswith(begin))
        found = CliRunner().invoke(app, [*shlex.split(line, comments=True)[1:], *more])
        assert found.exit_code == 0, (found.output, found.exception)
    pipeline = load_pipeline(uninterrupted, "cpu")
    pipeline.load_lora_weights(tmp_path / "runs" / "lora" / "final")
    added = [one for name, one in pipeline.transformer.named_parameters() if "lora_B" in name]
    assert pipeline.get_active_adapters() and added and all(one.abs().max() > 0 for one in added), "it has learned"


def test_an_adapter_does_not_go_on_upon_another_model(uninterrupted, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(uninterrupted / "final", base)
    changes = ["lora.rank=2", "steps=2", "checkpoint_every=1", "validate_every=10", "sample_every=10"]
    config = override(preset("finetune", "smoke"), [*changes, f"start_from={base}", "data.quality=all"])
    begun = engine(config, run)
    begun.step()
    begun.save()
    assert engine(config, run, resume=True).global_step == 1
    weights = load_file(base / "diffusion_pytorch_model.safetensors")
    save_file({name: 1.01 * value for name, value in weights.items()}, base / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="the adapter was begun on another model"):
        engine(config, run, resume=True)


def test_a_spike_is_one_of_the_flow_loss(tmp_path, monkeypatch):
    """The sum with REPA's cosine lies around zero at full scale, where twice its mean is nothing."""
    run, seen = engine(override(SMOKE, ["repa.weight=2"]), tmp_path), []
    monkeypatch.setattr(run.health, "judge", lambda norms, losses: seen.append(losses) or torch.tensor(0.0))
    row = run.step()
    assert seen == [{"transformer": pytest.approx(row["flow_loss"])}] and row["loss"] != row["flow_loss"]


def test_pictures_of_scenes_whose_latents_were_replaced_are_refused(tmp_path, monkeypatch):
    def with_a_bad_row(*arguments):
        for batch in encode_scenes(*arguments):
            batch.latents[3] = float("nan")
            yield batch

    monkeypatch.setenv("NITRO_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scene_latents, "encode_scenes", with_a_bad_row)
    config = override(SMOKE, ["data.scenes=8"])
    batches = Batches(config, load_encoders("lite"))
    with pytest.warns(UserWarning, match="bad rows found"):
        assert batches.local(0).latents.isfinite().all()
    batches.needs_images = True
    with pytest.raises(ValueError, match="holds bad rows"):
        batches.local(5)


def test_wrong_starts_are_refused(uninterrupted, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run already"):
        engine(SMOKE, uninterrupted)
    every = "data/sa1b, data/journeydb, data/fluxdb, data/validation: each holds no shards"
    with pytest.raises(FileNotFoundError, match=every):
        engine(preset("base", "full"), tmp_path)
    with pytest.raises(ValueError, match="batch_size=4"):
        engine(override(SMOKE, ["batch_size=4"]), uninterrupted, resume=True)
    with pytest.raises(ValueError, match="steps=3: the run has been trained to step 10"):
        engine(override(SMOKE, ["steps=3"]), uninterrupted, resume=True)
    tuned = override(preset("finetune", "smoke"), [f"start_from={uninterrupted}"])
    with pytest.raises(ValueError, match="stage=finetune: the run was started with base"):
        engine(tuned, uninterrupted, resume=True)
    with pytest.raises(ValueError, match="model.in_channels=3"):
        engine(override(SMOKE, ["model.in_channels=3"]), tmp_path)


def test_showing_other_weights_is_undone(tmp_path):
    model = torch.nn.Linear(3, 3)
    weights = MasterWeights(model, torch.bfloat16)
    before = model.weight.detach().clone()
    with weights.swapped_in({name: torch.zeros_like(p) for name, p in weights.masters.items()}):
        assert not model.weight.any()
    assert torch.equal(model.weight, before)


def test_changing_the_number_type_warns_of_nothing(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = EMMDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, block_groups=(1, 1, 1))
    MasterWeights(model, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not caplog.text


def test_every_parameter_has_one_optimizer_and_muon_gets_the_matrices():
    model = EMMDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, block_groups=(1, 1, 1)
    )
    named = dict(model.named_parameters())
    matrices = hidden_matrices(model)
    optimizers = build_optimizers(named, matrices, SMOKE.optimizer)
    owned = [p for o in optimizers.values() for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(named) and {id(p) for p in owned} == {id(p) for p in named.values()}
    assert all(named[name].ndim == 2 for name in matrices)
    assert not any("modulation" in name or "embed" in name or name.startswith("proj_out") for name in matrices)
    assert any("qkv" in name for name in matrices)


def test_learning_rate():
    settings = override(SMOKE, ["optimizer.warmup_steps=4", "optimizer.decay_steps=5"]).optimizer
    rates = [learning_rate_scale(step, 20, settings) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    short = [learning_rate_scale(step, 6, settings) for step in range(6)]  # three steps of decay, and not five
    assert short == pytest.approx([0.25, 0.5, 0.75, 1.0, 2 / 3, 1 / 3])
