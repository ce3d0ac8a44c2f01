"""The training loop at smoke scale: it learns, repeats bit for bit, and survives kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nitro_e_lite.common import check_manifest, read_jsonl, sha256_file, weights_dir
from nitro_e_lite.config import override, preset
from nitro_e_lite.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.encoders import LatentStats
from nitro_e_lite.loading import load_pipeline
from nitro_e_lite.optimizers import MasterWeights, build_optimizers, hidden_matrices, learning_rate_scale
from nitro_e_lite.shipping import ship
from nitro_e_lite.train import Trainer, train

SMOKE = preset("base", "smoke")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One latent cache for the whole file, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NITRO_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    train(SMOKE, run_dir, device="cpu")
    return run_dir


def test_a_run_leaves_what_it_promises(uninterrupted):
    rows = list(read_jsonl(uninterrupted / "metrics.jsonl"))
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, SMOKE.steps + 1))
    assert [r["step"] for r in rows if "validation_loss" in r] == [5, 10]
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
    assert json.loads((tmp_path / "transformer" / "training.json").read_text())["preset"] == "smoke"
    pipeline = load_pipeline(tmp_path, device="cpu")
    assert pipeline.config.default_steps == 7 and pipeline.stats == LatentStats.load(tmp_path / "vae")
    for name, value in final_weights(uninterrupted).items():
        assert torch.equal(pipeline.transformer.state_dict()[name], value.half().float()), name


def test_the_same_run_twice_is_the_same(uninterrupted, tmp_path):
    train(SMOKE, tmp_path / "again", device="cpu")
    assert_same(final_weights(tmp_path / "again"), final_weights(uninterrupted))


def test_a_run_stopped_and_resumed_equals_one_in_one_go(uninterrupted, tmp_path):
    trainer = Trainer(SMOKE, tmp_path, device="cpu")
    for _ in range(5):
        trainer.train_step()
    trainer.save()
    for _ in range(2):
        trainer.train_step()  # lost by the stop
    train(SMOKE, tmp_path, resume=True, device="cpu")
    assert_same(final_weights(tmp_path), final_weights(uninterrupted))


def test_sigkill_and_resume_equals_one_in_one_go(tmp_path):
    """Killed at random moments, also while writing a checkpoint, until it is through."""
    settings = ["steps=30", "checkpoint_every=1", "validate_every=30", "sample_every=30"]
    command = [sys.executable, "-m", "nitro_e_lite.cli", "train", "base", "--preset", "smoke", "--device", "cpu"]
    command += [*(x for s in settings for x in ("--set", s)), "--resume", "--run-dir"]
    draw, kills = random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)
    command.append(str(tmp_path / "killed"))
    while kills < 3:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        checkpoints, seen = tmp_path / "killed" / "checkpoints", None
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 120:
            newest = sorted(checkpoints.glob("step-*"))[-1:]
            seen = newest if seen is None else seen
            if newest != seen:  # it has moved on since this process started
                time.sleep(draw.uniform(0, 0.2))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        assert process.wait(timeout=120) == -signal.SIGKILL, "the run ended before it could be killed"
        kills += 1
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same(final_weights(tmp_path / "killed"), final_weights(tmp_path / "whole"))
    steps = [row["step"] for row in read_jsonl(tmp_path / "killed" / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 31))


def test_one_batch_is_learned_by_heart(tmp_path):
    config = override(SMOKE, ["data.scenes=8", "caption_dropout=0", "optimizer.decay_steps=0", "steps=1000"])
    trainer = Trainer(config, tmp_path, device="cpu")
    batch, captions, t, noise = trainer._draw(0)
    trainer._draw = lambda step: (batch, captions, t, noise)
    losses = [trainer.train_step()["loss"] for _ in range(120)]
    assert losses[-1] < 0.25 * losses[0]


def test_bf16_computes_on_float32_masters(tmp_path):
    trainer = Trainer(override(SMOKE, ["precision=bf16"]), tmp_path, device="cpu")
    assert {p.dtype for p in trainer.raw_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.masters.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trainer.masters.items()}
    row = trainer.train_step()
    assert row["loss"] > 0 and any(not torch.equal(before[n], p) for n, p in trainer.masters.items())
    for name, parameter in trainer.raw_model.named_parameters():
        assert torch.equal(parameter, trainer.masters[name].bfloat16()), name


def test_a_non_finite_gradient_changes_nothing_and_many_end_the_run(tmp_path):
    trainer = Trainer(override(SMOKE, ["max_skipped=1"]), tmp_path, device="cpu")
    before = {name: p.detach().clone() for name, p in trainer.masters.items()}
    trainer.raw_model.proj_out.weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer.train_step()
    assert trainer.skipped == 1 and trainer.step == 1
    assert_same(before, {name: p.detach() for name, p in trainer.masters.items()})
    with pytest.raises(FloatingPointError, match="2 steps had non-finite gradients"):
        trainer.train_step()


def test_wrong_starts_are_refused(uninterrupted, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run already"):
        Trainer(SMOKE, uninterrupted, device="cpu")
    with pytest.raises(ValueError, match="batch_size=4"):
        Trainer(override(SMOKE, ["batch_size=4"]), uninterrupted, resume=True, device="cpu")
    with pytest.raises(ValueError, match="model.in_channels=3"):
        Trainer(override(SMOKE, ["model.in_channels=3"]), tmp_path, device="cpu")


def test_showing_other_weights_is_undone(tmp_path):
    model = torch.nn.Linear(3, 3)
    weights = MasterWeights(model, torch.bfloat16)
    before = model.weight.detach().clone()
    with weights.showing({name: torch.zeros_like(p) for name, p in weights.masters.items()}):
        assert not model.weight.any()
    assert torch.equal(model.weight, before)


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
