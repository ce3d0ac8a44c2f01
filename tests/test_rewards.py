"""Learning from rewards: formulae against independent ones, judges that fail, runs that are killed, and learning."""

import base64
import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from ranks import ranks  # noqa: F401
from safetensors.torch import load_file
from test_engine import same, weights_of
from torch.distributions import Normal, kl_divergence
from typer.testing import CliRunner

from nitro_e_lite import config as settings
from nitro_e_lite import files
from nitro_e_lite.cli.app import app
from nitro_e_lite.config import override
from nitro_e_lite.errors import GateFailed, NotFiniteScores, Unusable
from nitro_e_lite.evaluation import judge_server, learned_judges, watch
from nitro_e_lite.evaluation import rewards as judges
from nitro_e_lite.evaluation.rewards import FilePrompt, RemoteReward, RewardServer
from nitro_e_lite.experiments.launch import train_arguments
from nitro_e_lite.experiments.ship import ship_student
from nitro_e_lite.experiments.worker import run_name
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.inference.loading import load_pipeline, load_transformer
from nitro_e_lite.model import flow
from nitro_e_lite.presets import preset
from nitro_e_lite.scenes import captions, degrade, geneval, grammar
from nitro_e_lite.scenes.render import render
from nitro_e_lite.scenes.verifier import Detection, detect
from nitro_e_lite.stages import gates
from nitro_e_lite.stages import judges as judge_stage
from nitro_e_lite.stages.rewards_forward import ForwardRewards, forward_loss, old_decay, optimality
from nitro_e_lite.stages.rewards_grpo import (
    GrpoRewards,
    clipped_loss,
    cps_step,
    kl_to,
    log_probability,
    noisy_step,
    sde_step,
    train_rewards,
)
from nitro_e_lite.stages.rollouts import Prompts, Rewards, group_advantages, group_distance, row_weights
from nitro_e_lite.training.checkpoints import list_checkpoints, load_latest
from nitro_e_lite.training.engine import Engine, Placement

GOLDEN = Path(__file__).parent / "golden" / "flow_grpo_sde_step.safetensors"
STAGES = {"grpo": GrpoRewards, "forward": ForwardRewards, "positive": ForwardRewards}
pytestmark = pytest.mark.filterwarnings("ignore::nitro_e_lite.inference.encoders.CaptionCut")  # 16 tokens are few


@pytest.fixture(scope="module")
def cache():
    """What `ranks` asks of a test module; nothing is cached here."""


@pytest.fixture(scope="module")
def small(tiny_folder):
    """Makes a run of four steps, two for each roll-out of eight pictures, that is paid in redness."""

    def make(method, *changes):
        common = [
            f"method={method}",
            f"start_from={tiny_folder}",
            "rewards=[[redness, 1.0]]",
            "shift=1",
            "batch_size=4",
        ]
        common += ["group=4", "rollout_steps=3", "grpo.window=1", "grpo.window_range=2", "checkpoint_every=1"]
        return override(preset("rewards", "smoke"), [*common, "validate_every=99", "sample_every=99", *changes])

    return make


@pytest.fixture(scope="module", autouse=True)
def unwatched():
    """Runs in this process draw and validate nothing at their end: a third of the seconds of such short ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewards, "picture", lambda self: None)
        patch.setattr(Rewards, "validate", lambda self: {})
        yield


LOOKS = {name: getattr(Rewards, name) for name in ("picture", "validate")}


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """Configuration and run folder of a run of each method without accident, each process working in two parts."""
    found = {}
    for method in ("forward", "grpo"):
        found[method] = small(method, "accumulate=2"), tmp_path_factory.mktemp("whole") / method
        train_rewards(*found[method], device="cpu")
    return found


def start(config, run_dir, **options):
    return Engine(config, STAGES[config.method], run_dir, device="cpu", **options)


# -- the steps of the sampler


def test_sde_step_is_the_reference():
    golden = load_file(GOLDEN)
    sigmas = golden["sigmas"].tolist()
    for row, k in enumerate(golden["step_index"].tolist()):
        x, velocity, x_next = (golden[name][row : row + 1] for name in ("sample", "velocity", "next_sample"))
        one = noisy_step("sde", x, velocity, sigmas, k, 0.7)
        torch.testing.assert_close(one.mean[0], golden["mean"][row], rtol=1e-6, atol=1e-6)
        assert one.std == pytest.approx(golden["std"][row].item(), rel=1e-6)
        assert log_probability("sde", x_next, one).item() == pytest.approx(golden["log_prob"][row].item(), abs=1e-6)


@pytest.mark.parametrize("rule", settings.NOISE_RULES)
def test_without_noise_a_step_is_the_odes(rule):
    sigmas = [*flow.linear_sigmas(5), 0.0]
    x, velocity = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for k in range(4):
        one = noisy_step(rule, x, velocity, sigmas, k, 0.0)
        torch.testing.assert_close(one.mean, flow.euler_step(x, velocity, sigmas[k], sigmas[k + 1]))
        assert one.spread == 0  # so that the sample is the mean


def test_cps_keeps_the_coefficients_of_signal_and_noise():
    x0, eps = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = cps_step(0.4 * x0 + 0.6 * eps, eps - x0, 0.6, 0.5, 0.8)
    assert one.std == pytest.approx(0.5 * math.sin(0.4 * math.pi))
    rest = one.mean - 0.5 * x0  # the rest is noise, less of it than 0.5 by just what the step adds
    assert rest.std().item() ** 2 + one.spread**2 == pytest.approx(0.25, rel=0.01)


def test_density_clip_and_kl():
    x, velocity, x_next = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    one, other = (sde_step(x, v, 0.6, 0.5, 0.9, 0.7) for v in (velocity, velocity + 0.1))
    density = Normal(one.mean, one.spread).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(log_probability("sde", x_next, one), density)
    exact = kl_divergence(Normal(one.mean, one.std), Normal(other.mean, one.std)).flatten(1).mean(1)
    torch.testing.assert_close(kl_to(one.mean, other.mean, one.std), exact, rtol=1e-4, atol=1e-7)
    ratio, advantage = torch.tensor([0.9, 1.1, 0.9, 1.1]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    expected = torch.tensor([-0.9, -1.01, 0.99, 1.1])  # nothing is gained by going further than the clip
    torch.testing.assert_close(clipped_loss(ratio, advantage, 0.01), expected)


# -- advantages and prompts


def test_advantages_and_flat_groups():
    rewards = torch.tensor([0.0, 1.0, 0.7, 0.7, 3.0, 5.0], dtype=torch.float64)
    advantages, flat = group_advantages(rewards, 2, 5.0, "batch")
    spread = np.std(rewards.numpy()) + 1e-4
    expected = np.array([-0.5, 0.5, 0, 0, -1, 1]) / spread
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    assert flat.tolist() == [False, False, True, True, False, False]
    own, _ = group_advantages(rewards, 2, 5.0, "group")
    np.testing.assert_allclose(own, [-1, 1, 0, 0, -1, 1], rtol=1e-3)
    assert group_advantages(rewards, 2, 0.5, "group")[0].abs().max() == 0.5
    weights, losses = row_weights(flat, 3, True), torch.arange(6.0)  # two updates of three pictures
    assert (weights * losses)[:3].mean() == losses[:2].mean() and (weights * losses)[3:].mean() == losses[4:].mean()
    assert torch.equal(row_weights(flat, 3, False), torch.ones(6))
    assert row_weights(torch.ones(4, dtype=torch.bool), 4, True).sum() == 0
    points = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    pairs = [((a - b) ** 2).mean() for group in points for i, a in enumerate(group) for b in group[:i]]
    assert group_distance(points[:1].flatten(0, 1), 4) ** 2 == pytest.approx(np.mean(pairs[:6]), rel=1e-5)


def test_prompts_are_never_reserved_or_held_out():
    evaluation = {prompt.text for split in geneval.SPLITS for prompt in geneval.load_prompts(split)}
    for kind in geneval.CATEGORIES:
        found = [geneval.training_prompt(kind, 0, step, 3) for step in range(150)]
        assert len({prompt.text for prompt in found}) > 60 and found[7] == geneval.training_prompt(kind, 0, 7, 3)
        for prompt in found:
            assert prompt.tag == kind and not captions.is_reserved(prompt.text) and prompt.text not in evaluation
            assert not grammar.is_held_out(geneval.true_scene(prompt).objects) or None in dict(prompt.objects).values()
            assert not grammar.is_held_out(geneval._placeholders(prompt.objects))
            assert geneval.Prompt.from_metadata(prompt.metadata()) == prompt
    with pytest.raises(ValueError, match="tag='cats'"):
        geneval.training_prompt("cats", 0)


def test_a_run_on_a_file_of_prompts(small, tmp_path):
    """Two rewards, one of them remote, each brought to one spread; a server that dies on the way changes no bit.

    The first prompt of a kind with ten is never asked for: it is held out.
    """
    kinds = {"many": 12, "few": 3}
    entries = [{"tag": k, "include": [], "prompt": f"{k} {i}"} for k, count in kinds.items() for i in range(count)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    class Judge(Odd):
        name = "judge"

        def __init__(self):
            super().__init__()
            self.asked, self.stop = set(), None

        def score(self, pictures, prompts):
            mine = prompts[0]["tag"] in kinds
            self.asked |= {prompt["prompt"] for prompt in prompts if mine}
            if self.calls == self.stop:
                raise RuntimeError("gone")
            return (-1 if mine else 1) * super().score(pictures, prompts)

    found = {}
    for name, stop in (("whole", None), ("parts", 4)):
        reward = Judge()
        reward.stop = stop
        with served(reward, read_prompt=lambda entry: entry) as server:
            changes = [f"prompts={tmp_path / 'prompts.jsonl'}", f"rewards=[[redness, 1.0], ['{server.url}', 0.5]]"]
            changes += ["normalize_rewards=true", "reward_retries=0", "validation_prompts=2", "group=2"]
            config = small("forward", *changes)
            if stop is not None:
                with pytest.raises(RuntimeError, match="reward judge@.*gone"):
                    train_rewards(config, tmp_path / name, device="cpu")
                reward.stop = None
            train_rewards(config, tmp_path / name, resume=True, device="cpu")
            found[name] = weights_of(tmp_path / name)
            rolled = set(reward.asked)
            assert rolled and "many 0" not in rolled and rolled <= {entry["prompt"] for entry in entries}
            held = LOOKS["validate"](start(config, tmp_path / name, resume=True).stage)
            assert held["held_out_redness"] == pytest.approx(-held[f"held_out_judge@{server.url}"])
            assert reward.asked - rolled == {"many 0"}
    assert same(found["whole"], found["parts"])


def test_a_judge_that_never_pays_watches_the_held_out_pictures(small, tmp_path):
    stage = start(small("forward", "watch=[preference, partial]"), tmp_path).stage
    found = LOOKS["validate"](stage)
    assert (
        found["held_out_redness"] != 0 and math.isfinite(found["held_out_preference"]) and "held_out_partial" in found
    )
    assert [reward.name for reward in stage.rewards] == ["redness"] and "preference" in stage.examples
    for wrong in ("watch=[redness]", "watch=[partial, partial]"):
        with pytest.raises(ValueError, match="watch=.*: must be judges that are no rewards"):
            small("forward", wrong)


def test_rewards_of_scenes_read_a_file_about_scenes_and_refuse_another(small, tmp_path):
    asked, file = geneval.load_prompts()[:100:5], tmp_path / "prompts.jsonl"
    pictures = np.stack([render(geneval.true_scene(prompt)) for prompt in asked[:4]])
    for kind in (judges.GenEvalReward, judges.PartialCredit):
        of_file = [judges.FilePrompt(prompt.metadata()) for prompt in asked[:4]]
        assert kind().score(pictures, of_file).tolist() == kind().score(pictures, asked[:4]).tolist()
    file.write_text("".join(json.dumps(prompt.metadata()) + "\n" for prompt in asked))
    paid = ["rewards=[[redness, 1.0], [partial, 0.1]]", f"prompts={file}", "validation_prompts=3"]
    stage = start(small("forward", *paid), tmp_path / "run").stage
    assert stage.losses(0, 0)["transformer"]["loss"].isfinite().all()
    with pytest.MonkeyPatch.context() as patch:  # the grid shows what the file holds out, if anything
        drawn = []
        patch.setattr(Rewards, "_draw", lambda self, prompts: drawn.extend(prompts) or [pictures[0]] * len(prompts))
        LOOKS["picture"](stage)
        assert drawn == [one for k in stage.prompts.of_file for one in stage.prompts.held_out if one.tag == k]
        stage.prompts.held_out = []
        assert LOOKS["picture"](stage) is None
    with file.open("a") as more:
        more.write(json.dumps({"tag": "dogs", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}) + "\n")
    with pytest.raises(ValueError, match="the reward partial reads lite scenes alone; .*dog"):
        start(small("forward", *paid), tmp_path / "other")


def test_kinds_that_can_still_teach_are_drawn_more_often():
    prompts = Prompts(0, "", 0.05, 0.5)
    prompts.pass_rates |= dict.fromkeys(prompts.pass_rates, 1.0) | {"counting": 0.5, "position": 0.0}
    assert prompts.shares()["counting"] == pytest.approx(0.3 / (0.3 + 5 * 0.05))
    kinds = [prompt.tag for prompt in prompts.draw(0, 400)]
    assert kinds.count("counting") / 400 == pytest.approx(0.545, abs=0.08) and kinds.count("position") > 10
    again = Prompts(0, "", 0.05, 0.5)
    again.pass_rates |= prompts.pass_rates
    assert prompts.draw(4, 5) == again.draw(4, 5) != prompts.draw(6, 5)
    asked = [geneval.training_prompt("position", 1), geneval.training_prompt("colors", 1)]
    prompts.learn(asked, np.array([[True, False], [False, False]]))
    assert (prompts.pass_rates["position"], prompts.pass_rates["colors"]) == (0.25, 0.5)  # from 0 and 1, halfway
    assert prompts.pass_rates["counting"] == 0.5  # not asked for


# -- the forward process


def test_forward_loss_is_the_flow_loss():
    x0, noise, velocity, old = torch.randn(4, 6, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    t, ones = torch.linspace(0.1, 1, 6), torch.ones(6)
    x_t = flow.interpolate(x0, noise, t)
    loss = forward_loss(velocity, old, x_t, x0, t, ones, 0 * ones, beta=1.0, factor=1.0, weight=1 / t**2)
    plain = (velocity - flow.velocity_target(x0, noise)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.5])
def test_gradient_at_the_old_policy(beta):
    x0, noise, old = torch.randn(3, 6, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    r = optimality(torch.tensor([-9.0, -2.5, -1.0, 0.0, 2.5, 9.0], dtype=torch.float64))
    assert r.tolist() == [0, 0.25, 0.4, 0.5, 0.75, 1]
    velocity = old.clone().requires_grad_()
    forward_loss(velocity, old, flow.interpolate(x0, noise, t), x0, t, r, 1 - r, beta).sum().backward()
    d = old - (noise - x0)
    scale = 10 * t * (2 * r - 1) / (d.abs().flatten(1).mean(1) * d[0].numel())
    torch.testing.assert_close(velocity.grad, flow.expand_like(scale, d) * d)


def test_schedules_of_the_old_policy():
    assert [old_decay(i) for i in (0, 100, 499, 500, 9000)] == [0, 0.1, 0.499, 0.5, 0.5]
    assert [old_decay(i, "careful") for i in (0, 74, 75, 175, 9000)] == [0, 0, 0, 0.75, 0.999]
    assert old_decay(40, "fast", length=1000, steps=80) == old_decay(500) == 0.5
    assert old_decay(12, "careful", length=1000, steps=80) == pytest.approx(0.0075 * 75)


def test_old_policy_follows_after_each_iteration(small, tmp_path):
    engine = start(small("forward", "steps=10", "forward.old_length=1000"), tmp_path)
    stage, first = engine.stage, None
    first = {name: value.clone() for name, value in stage.old.items()}
    for _ in range(2):
        engine.step()
    assert all(torch.equal(first[name], value) for name, value in stage.old.items())  # of the first iteration
    new = {name: p.detach().clone() for name, p in stage.adapter.items()}
    engine.step()
    decay = min(0.001 * 2 * 1000 / 10, 0.5)
    for name, value in stage.old.items():
        torch.testing.assert_close(value, decay * first[name] + (1 - decay) * new[name])
    assert any(not torch.equal(first[name], value) for name, value in stage.old.items())


# -- its own roll-out


@pytest.mark.parametrize("changes", [[], ["precision=bf16"], ["grpo.branch=true", "grpo.rule=sde", "guidance=3"]])
def test_ratio_is_one_on_its_own_rollout(changes, small, tmp_path):
    changes = [*changes, "batch_size=8", "accumulate=2", "updates=1", "grpo.window=2", "grpo.kl=0.04"]
    engine = start(small("grpo", *changes), tmp_path)
    rows = [engine.step() for _ in range(2)]  # the second one of a policy that has moved
    for row in rows:
        assert row["ratio"] == 1 and row["ratio_off"] == 0 and row["clip_share"] == 0
        assert math.isfinite(row["gradient_norm"])
    assert rows[0]["kl"] < 1e-6 < 1e3 * rows[1]["kl"]  # the reference is computed by the kernels without gradient
    path = engine.stage.rollout["path"].unflatten(0, (-1, 4))  # (P, G, window + 1, C, h, w)
    shared = (path[:, :1, 0] == path[:, :, 0]).all().item()
    assert shared == engine.config.grpo.branch and not torch.equal(path[:, 0, 1], path[:, 1, 1])


def test_window_leaves_out_the_last_step(small, tmp_path):
    stage = start(small("grpo", "rollout_steps=6", "grpo.window=2", "grpo.window_range=5"), tmp_path).stage
    windows = {stage.window(step) for step in range(60)}
    assert windows == {range(k, k + 2) for k in range(4)}  # step 5 is the last


def test_a_model_of_one_step_learns_from_its_one_jump(small, tmp_path):
    """The forward process needs no step but the jump from pure noise; Flow-GRPO has none left that adds noise."""
    engine = start(small("forward", "rollout_steps=1"), tmp_path)
    assert math.isfinite(engine.step()["loss"])
    stage = engine.stage
    assert stage.sigmas == [1.0, 0.0]
    features = stage.pipeline.encode_captions(["a red circle"])
    noise = stage.noise(0, "start", [0])
    with torch.no_grad():
        jump = noise - stage.velocity(noise, features, torch.ones(1))
    torch.testing.assert_close(stage.walk(noise, features, 0, 1), jump)
    with pytest.raises(ValueError, match="grpo.window_range=1: must be below rollout_steps=1"):
        small("grpo", "rollout_steps=1", "grpo.window_range=1")


def test_what_does_not_fit_together_is_refused(small, tmp_path):
    for changes, words in [
        (["group=3"], "group=3: must be a divisor of updates . batch_size = 8"),
        (["grpo.window_range=3"], "grpo.window_range=3: must be below rollout_steps=3"),
        (["grpo.window=3"], "grpo.window=3: must be at most"),
        (["grpo.noise=0"], "grpo.noise=0.0: must be > 0"),
        (["rewards=[[redness, 1.0], [redness, 2.0]]"], "each there once"),
        (["rewards=[[beauty, 1.0]]"], "'beauty' is unknown; there are geneval"),
        (["optimizer.whiten_text_input=true"], "whiten_text_input"),
        (["spike_factor=2.0"], "spike_factor=2.0: must be 0 with method='grpo'"),
    ]:
        with pytest.raises(ValueError, match=words):
            start(small("grpo", *changes), tmp_path / "run")
    for student in ("lite-4step", "lite-sprint"):
        with pytest.raises(ValueError, match=f"start_from={student}: is a student that draws noise"):
            start(small("forward", f"start_from={student}"), tmp_path / "run")


# -- judges


def test_partial_credit_is_one_exactly_for_what_is_correct():
    for prompt in geneval.load_prompts()[::6]:
        found = detect(render(geneval.true_scene(prompt)))
        for seen in (found, found[:-1], found + found[:1], found[::-1]):
            assert (judges.partial_credit(seen, prompt) == 1) == geneval.judge(seen, prompt).correct
    two = geneval.Prompt("a red circle and a blue star", "color_attr", (("circle", "red"), ("star", "blue")))
    circle, star = (Detection(s, "red", x, 0.5, 0.1, 1.0) for s, x in (("circle", 0.2), ("star", 0.8)))
    assert judges.partial_credit([], two) == 0
    assert judges.partial_credit([circle], two) == pytest.approx(0.5)
    assert judges.partial_credit([circle, star], two) == pytest.approx((1 + 1 + 0.5) / 3)
    assert judges.partial_credit([circle, circle], two) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_rewards_are_brought_to_one_spread_before_they_are_added():
    scores = np.array([[0.0, 0.29], [1.0, 0.27], [1.0, 0.28], [0.0, 0.28]])
    total = judges.add_rewards(scores, (1.0, 1.0), True)
    expected = sum((x - x.mean()) / (x.std() + 1e-4) for x in scores.T)
    np.testing.assert_allclose(total, expected)
    np.testing.assert_allclose(judges.add_rewards(scores, (0.7, 0.3), False), scores @ [0.7, 0.3])
    constant = np.array([[0.5, 0.0], [0.5, 1.0]])
    assert np.isfinite(judges.add_rewards(constant, (1.0, 1.0), True)).all()


DOG = {"prompt": "a dog", "tag": "x", "include": []}


def test_the_preference_is_shown_a_clean_picture_and_a_blurred_one():
    """It used to see a circle and a square, both clean: whether a run began was chance."""
    here = judges.Preference()
    with served(here) as server:
        found = judges.preflight([here, RemoteReward(server.url, retries=0)])
    near, far = found.values()
    assert near[0] > near[1] + 5 and far == pytest.approx(near)
    here.score = lambda pictures, prompts: np.zeros(2)
    with pytest.raises(RuntimeError, match="reward preference: gives its good picture 0 and its bad one 0"):
        judges.preflight([here])


def test_preflight_and_bad_batches_name_the_reward():
    good = judges.open_rewards(["geneval", "partial", "redness"])
    found = judges.preflight(good)
    assert found["geneval"] == (1, 0) and list(found) == ["geneval", "partial", "redness"]

    class Backwards(judges.Redness):
        name = "backwards"

        def score(self, pictures, prompts):
            return -super().score(pictures, prompts)

    with pytest.raises(RuntimeError, match="reward backwards: gives a red circle .* it must prefer the first"):
        judges.preflight([Backwards()])

    class Dogs(Backwards):  # it knows no circles, and has pictures of its own
        name, examples = "dogs", (judges.FilePrompt(DOG), np.zeros((2, 8, 8, 3), np.uint8))

        def score(self, pictures, prompts):
            return np.arange(2, 0, -1) if prompts[0].text == "a dog" else np.zeros(2)

    assert judges.preflight([Dogs()]) == {"dogs": (2, 1)}
    with served(Dogs()) as server:  # it says so, over the wire too
        assert server.health()["examples"]["prompt"]["prompt"] == "a dog"
        server.read_prompt = judges.FilePrompt
        assert list(judges.preflight([RemoteReward(server.url, retries=0)]).values()) == [(2, 1)]
    Dogs.score = lambda self, pictures, prompts: np.ones(2)
    with pytest.raises(RuntimeError, match="reward dogs: gives its good picture 1 and its bad one 1 .*'a dog'"):
        judges.preflight([Dogs()])
    for scores, error, words in [
        ([1.0, math.nan, 0.0], FloatingPointError, "reward mine: 1 of 3 scores are NaN or infinite"),
        ([1.0, None, math.inf], FloatingPointError, "reward mine: 2 of 3"),
        ([0.5, 0.5, 0.5], RuntimeError, "reward mine: all 3 scores are 0.5"),
        ([0.5, 0.4], RuntimeError, "reward mine: .2,. scores for 3 pictures"),
        (["a", "b", "c"], RuntimeError, "reward mine: .* are no numbers"),
    ]:
        with pytest.raises(error, match=words):
            judges.check_scores("mine", scores, 3)


class Odd(judges.Redness):
    """A judge that fails in one of several ways."""

    def __init__(self, way=""):
        self.way, self.calls = way, 0

    def score(self, pictures, prompts):
        self.calls += 1
        scores = super().score(pictures, prompts)
        if self.way == "slow":
            time.sleep(0.6)
        if self.way == "breaks" or (self.way == "breaks once" and self.calls == 1):
            raise RuntimeError("out of memory")
        return {"nan": scores * math.nan, "few": scores[:-1]}.get(self.way, scores)


@contextmanager
def served(reward, port=0, **options):
    with RewardServer(reward, port=port, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_remote_reward_says_what_the_local_one_says():
    prompts = geneval.load_prompts()[::60]
    pictures = np.stack([render(geneval.true_scene(prompts[0])) for _ in prompts])
    entry = prompts[0].metadata()
    many = entry | {"include": [{"class": "star", "count": 10**12}]}
    small = judges._to_png(pictures[0])
    png = base64.b64decode(small)
    header = b"IHDR" + (2**15).to_bytes(4, "big") * 2 + png[24:29]  # a small file that says it has a billion pixels
    huge = base64.b64encode(png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]).decode()
    with served(judges.PartialCredit()) as server:
        remote = RemoteReward(server.url + "/", batch=2)
        assert remote.name == f"partial@{server.url}" and remote._ask("/health", None) == {
            "name": "partial",
            "ready": True,
        }
        np.testing.assert_array_equal(remote.score(pictures, prompts), judges.PartialCredit().score(pictures, prompts))
        for path, body, words in [
            ("/other", b"{}", "404"),
            ("/score", b"{}", "400 .*needs images"),
            ("/score", b"no json", "400"),
            ("/score", b'{"images": ["AAAA"], "prompts": []}', "400 .*needs images"),
            ("/score", b"[" * 100_000, "400 .*too deep"),
            ("/score", b'"abc"', "400 .*must be a JSON object"),
            ("/score", json.dumps({"images": [huge], "prompts": [entry]}).encode(), "400 .*pixels"),
            ("/score", json.dumps({"images": [small], "prompts": [many]}).encode(), "400 .*more than 8 objects"),
        ]:
            with pytest.raises(RuntimeError, match=words):
                remote._ask(path, body)
        assert judges.preflight([remote])


def test_a_served_judge_reads_no_more_of_a_prompt_than_it_does_here():
    """A prompt about dogs was refused to judges that look at the pictures alone."""
    entry = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a red dog"}
    prompts, pictures = [FilePrompt(entry)], np.full((1, 64, 64, 3), (200, 20, 20), np.uint8)
    with served(judges.Redness()) as server:
        np.testing.assert_array_equal(
            RemoteReward(server.url).score(pictures, prompts), judges.Redness().score(pictures, prompts)
        )
    with served(judges.GenEvalReward()) as server, pytest.raises(RuntimeError, match="400 .*dog"):
        RemoteReward(server.url).score(pictures, prompts)


STAND_INS = {  # what `judge_server.py` uses of the two tools
    "evaluate_images.py": """
import argparse
from PIL import Image

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("imagedir")
    parser.add_argument("--model-path")
    return parser.parse_args()

def load_models(args):
    return args.model_path, (1, 2, 3), ["dog"]

def evaluate_image(path, metadata):
    assert (object_detector, clip_model, transform, tokenizer, classnames) == ("detector", 1, 2, 3, ["dog"])
    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, NMS_THRESHOLD, POSITION_THRESHOLD) == (0.3, 0.9, 16, 1.0, 0.1)
    red, green, blue = Image.open(path).getpixel((0, 0))
    if metadata["prompt"] == "breaks":
        raise ValueError("out of memory")
    return {"correct": red > blue, "tag": metadata["tag"]}
""",
    "huggingface_hub.py": """
def hf_hub_download(repository, name):
    assert (repository, name) == ("xswu/HPSv2", "HPS_v2.1.pt")
    return __file__.replace("huggingface_hub.py", "weights.pt")
""",
    "hpsv2/__init__.py": "",
    "hpsv2/utils.py": 'hps_version_map = {"v2.1": "HPS_v2.1.pt"}',
    "hpsv2/img_score.py": """
import numpy as np
import torch

device, model_dict = "cpu", {}

class Model(torch.nn.Linear):
    def forward(self, images, texts):
        return {"image_features": super().forward(images), "text_features": texts}

def initialize_model():
    model_dict["model"] = Model(3, 3)
    model_dict["preprocess_val"] = lambda picture: torch.from_numpy(np.asarray(picture, np.float32) / 255).mean((0, 1))

def get_tokenizer(name):
    return lambda texts: torch.tensor([[float(text == "red"), 0.0, float(text == "blue")] for text in texts])
""",
}


@pytest.mark.parametrize("judge", ["geneval", "hpsv2"])
def test_the_tools_own_judges_are_served(judge, tmp_path, monkeypatch):
    """With stand-ins for both: what the tools are given, what they say, and the examples of one without circles."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    torch.save({"state_dict": {"weight": torch.eye(3), "bias": torch.zeros(3)}}, tmp_path / "weights.pt")
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    pictures[0, ..., 0] = pictures[1, ..., 2] = 200  # red, blue
    for name, picture in zip(("good", "bad"), pictures, strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    red = judges.FilePrompt({"tag": "colors", "include": [], "prompt": "red"})
    words = [sys.executable, judge_server.__file__, judge, "--port", "0"]
    shown = [
        "--good",
        str(tmp_path / "good.png"),
        "--bad",
        str(tmp_path / "bad.png"),
        "--prompt",
        json.dumps(red.entry),
    ]
    tool = ["--script", str(tmp_path / "evaluate_images.py"), "--models", "detector"]
    words += [*tool, *shown] if judge == "geneval" else []
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            remote = RemoteReward(re.search(r"http://\S+", server.stdout.readline())[0], batch=2, retries=0)
            assert remote.name.startswith(f"{judge}@")
            blue = judges.FilePrompt(red.entry | {"prompt": "blue"})
            said = remote.score(np.concatenate([pictures, pictures]), [red, red, blue, blue])
            expected = [1, 0, 1, 0] if judge == "geneval" else [200 / 255, 0, 0, 200 / 255]
            np.testing.assert_allclose(said, expected, atol=1e-6)
            if judge == "geneval":
                assert judges.preflight([remote]) == {remote.name: (1, 0)}
                with pytest.raises(RuntimeError, match="500 .*ValueError: out of memory"):
                    remote.score(pictures, [judges.FilePrompt(red.entry | {"prompt": "breaks"})] * 2)
            two = json.dumps({"images": [judges._to_png(one) for one in pictures], "prompts": [red.entry]}).encode()
            for path, body, reason in [
                ("/score", b'{"images": ["AAAA"], "prompts": []}', "400 .*needs images"),
                ("/score", two, "400 .*2 images, 1 prompts"),
                ("/other", None, "404 .*GET /health"),
            ]:
                with pytest.raises(RuntimeError, match=reason):
                    remote._ask(path, body)
        finally:
            server.terminate()
    if judge == "geneval":
        lacks = subprocess.run(words[:5], capture_output=True, text=True)
        assert lacks.returncode == 2 and "geneval needs --script" in lacks.stderr
        Image.new("RGB", (8, 8)).save(tmp_path / "bad.png")
        odd = subprocess.run(words, capture_output=True, text=True)
        assert odd.returncode == 2 and "--good and --bad must be of the same size" in odd.stderr
    monkeypatch.setattr(judge_server, "LARGEST_PICTURES", 2 * 16 * 16 - 1)
    with pytest.raises(ValueError, match="more than 511 pixels"):
        judge_server.open_pictures([judges._to_png(one) for one in pictures])


def test_a_request_of_a_length_that_is_not_true_is_answered(monkeypatch, capfd):
    monkeypatch.setattr(judges._Handler, "timeout", 0.2)
    whole = json.dumps({"images": [], "prompts": []}).encode()
    with served(judges.Redness()) as server:
        for told, ends, code in [
            ("", True, 411),
            ("-5", False, 400),
            ("many", False, 400),
            ("1_0", False, 400),
            ("0", False, 400),
            ("9" * 5000, False, 400),
            (str(judges.LARGEST_REQUEST + 1), False, 413),
            (str(len(whole) + 5), True, 400),  # it ends before
            (str(len(whole) + 5), False, 408),  # it never ends
        ]:
            with socket.create_connection(server.server_address, timeout=5) as client:
                line = f"Content-Length: {told}\r\n" if told else ""
                client.sendall(f"POST /score HTTP/1.1\r\n{line}\r\n".encode() + whole)
                if ends:
                    client.shutdown(socket.SHUT_WR)
                assert client.recv(100).startswith(f"HTTP/1.0 {code} ".encode()), told[:20]
        assert RemoteReward(server.url).score(np.zeros((1, 64, 64, 3), np.uint8), [judges.PREFLIGHT]) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("way", "error", "words"),
    [
        ("slow", RuntimeError, r"no answer within 0\.3 s; tried 2 times"),
        ("breaks", RuntimeError, "500 .*out of memory.*tried 2 times"),
        ("nan", FloatingPointError, "2 of 2 scores are NaN"),
        ("few", RuntimeError, "scores for 2 pictures"),
    ],
)
def test_a_server_that_fails_is_named(way, error, words):
    pictures, prompts = np.zeros((2, 8, 8, 3), np.uint8), [judges.PREFLIGHT] * 2
    with served(Odd(way)) as server:
        remote = RemoteReward(server.url, timeout=0.3, retries=1, wait=0.01)
        with pytest.raises(error, match=f"(?s)reward redness@{re.escape(server.url)}: .*{words}"):
            remote.score(pictures, prompts)


@pytest.mark.parametrize(
    "begin",
    [
        b'HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{"name": "drip", "ready": true',
        b"HTTP/1.1 500 Oh\r\nContent-Length: 999\r\n\r\nno",
        b"HTTP/1.0 200 OK\r\nServer:",
        b"",
    ],
    ids=["body", "error", "header", "nothing"],
)
def test_a_server_that_sends_byte_by_byte_is_late(begin):
    """Each byte comes in time and the answer never does: it once held a run up for as long as it liked."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            client, _ = server.accept()
            with client, suppress(OSError):
                client.recv(2**16)
                client.sendall(begin)
                for _ in range(100):
                    time.sleep(0.05)
                    client.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        start_time = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no answer within 0\.3 s"):
            RemoteReward(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.3, retries=0)
        assert time.monotonic() - start_time < 2
        thread.join()


def test_servers_of_one_judge_share_the_work_and_stand_in_for_each_other(monkeypatch):
    pictures, prompts = np.zeros((2, 8, 8, 3), np.uint8), [judges.PREFLIGHT] * 2
    two = [Odd(), Odd()]
    with served(two[1]) as second:
        with served(two[0]) as first:
            urls = f"{first.url},{second.url}"
            remotes = []
            for rank in "0123":
                monkeypatch.setenv("RANK", rank), monkeypatch.setenv("WORLD_SIZE", "4")
                remotes.append(RemoteReward(urls, retries=1, wait=0.01))
                assert remotes[-1].score(pictures, prompts).tolist() == [0, 0]
            assert [one.calls for one in two] == [2, 2] and remotes[0].name == f"redness@{first.url} and 1 more"
        assert remotes[0].score(pictures, prompts).tolist() == [0, 0] and [one.calls for one in two] == [2, 3]
        with pytest.raises(
            RuntimeError, match=f"reward {first.url}: cannot be asked"
        ):  # at the start all must be there
            RemoteReward(urls, retries=0)
        with served(judges.PartialCredit()) as other, pytest.raises(RuntimeError, match="judges, partial, redness"):
            RemoteReward(f"{other.url},{second.url}")
    with pytest.raises(RuntimeError, match=f"redness@{first.url} and 1 more: http.* cannot be asked .*--resume"):
        remotes[0].score(pictures, prompts)
    with served(Odd()) as first, served(Odd("nan")) as second:
        remote = RemoteReward(f"{first.url},{second.url}")
        remote.turn = 1
        with pytest.raises(NotFiniteScores, match=f"reward redness@{second.url}: 2 of 2 scores are NaN"):
            remote.score(pictures, prompts)


def test_one_failure_is_tried_again_and_a_dead_server_is_named():
    pictures, prompts = np.zeros((2, 8, 8, 3), np.uint8), [judges.PREFLIGHT] * 2
    with served(Odd("breaks once")) as server:
        remote = RemoteReward(server.url, retries=1, wait=0.01)
        assert remote.score(pictures, prompts).tolist() == [0, 0]
    for ask in (lambda: remote.score(pictures, prompts), lambda: RemoteReward(server.url, retries=0)):
        with pytest.raises(RuntimeError, match=f"reward .*{re.escape(server.url)}: cannot be asked .*--resume"):
            ask()


# -- runs


@pytest.mark.parametrize(("method", "needed"), [("grpo", 0.1), ("forward", 0.015)])
def test_an_easy_reward_rises_within_fifteen_iterations(method, needed, small, tmp_path):
    """The redness of one group of eight pictures; measured: 0.246 to 0.471, and 0.238 to 0.273."""
    changes = ["steps=14", "updates=1", "batch_size=8", "group=8", "optimizer.lr=1e-2", "grpo.window=2"]
    engine = start(small(method, *changes), tmp_path)
    rewards = [engine.step()["reward"] for _ in range(engine.config.steps)]
    print(f"{method}: {rewards[0]:.4f} to {rewards[-1]:.4f}")
    assert np.mean(rewards[-3:]) - np.mean(rewards[:3]) > needed


def test_a_constant_reward_stops_the_run_by_name(small, tmp_path, monkeypatch):
    """It prefers the good picture of the preflight and after that says always the same."""

    class Stuck(judges.Redness):
        name = "stuck"

        def score(self, pictures, prompts):
            return super().score(pictures, prompts) if prompts[0] is judges.PREFLIGHT else np.full(len(prompts), 0.5)

    monkeypatch.setitem(judges.LITE_REWARDS, "stuck", Stuck)
    with pytest.raises(RuntimeError, match=r"reward stuck: all 8 scores are 0\.5; .*step 0 is saved"):
        train_rewards(small("forward", "rewards=[[stuck, 1.0]]"), tmp_path, device="cpu")
    with pytest.raises(Unusable) as failed:
        start(small("forward", "rewards=[[stuck, 1.0]]"), tmp_path / "again").step()
    assert failed.value.everywhere  # each process has the scores of all: the others wait until the first has saved


def test_a_collapsing_run_is_stopped(small, tmp_path, monkeypatch):
    """Pictures of a group that are all alike from the fifth roll-out on: the gate ends the run and names its step."""
    config, drawn = small("grpo", "steps=12", "updates=1", "stop_diversity=0.7"), []
    plain = GrpoRewards.roll_out

    def alike(self, step, places, features):
        found = plain(self, step, places, features)
        drawn.append(step)
        if step >= 4:
            found["x0"] = found["x0"][:1] + 1e-3 * (found["x0"] - found["x0"][:1])
        return found

    monkeypatch.setattr(GrpoRewards, "roll_out", alike)
    with pytest.raises(GateFailed, match="gate diversity: ") as failed:
        train_rewards(config, tmp_path, device="cpu")
    assert failed.value.everywhere  # all processes look at the whole roll-out
    assert 4 <= drawn[-1] < 11 and not (tmp_path / "final").exists()
    distances = [row["group_distance"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert distances[-1] < 0.1 * distances[0]  # what it was stopped by is in the log


def test_what_a_run_was_stopped_by_is_in_its_log_under_the_step_that_was_measured(small, tmp_path, monkeypatch):
    """Also where a validation comes in the middle of an iteration."""
    scores = iter([0.5, 0.8, 0.6])

    def validate(self):
        found = {"geneval": next(scores)}
        self._watch(found["geneval"], found)
        return found

    monkeypatch.setattr(Rewards, "validate", validate)
    config = small("forward", "steps=12", "updates=4", "validate_every=2", "stop_drop=0.1")
    with pytest.raises(RuntimeError, match=r"gate held-out: at step 6 .* 0\.600, .*its best was step 4"):
        train_rewards(config, tmp_path, device="cpu")
    rows = [(row["step"], row["geneval"]) for row in read_jsonl(tmp_path / "metrics.jsonl") if "geneval" in row]
    assert rows == [(2, 0.5), (4, 0.8), (6, 0.6)]
    with pytest.warns(UserWarning, match="other settings hold: guidance 0.0 -> 2.0"):
        start(small("forward", "steps=12", "updates=4", "guidance=2.0"), tmp_path, resume=True)


class Killed(BaseException):
    """A process that is not there any more writes nothing."""


@pytest.mark.parametrize(
    ("method", "where", "call"),
    [
        ("forward", "walk", 6),  # in the second roll-out, of four parts
        ("grpo", "_judge", 7),  # while the second roll-out is judged
        ("forward", "losses", 4),  # between the parts of the second update
        ("grpo", "losses", 4),
    ],
)
def test_killed_anywhere_and_resumed_it_has_the_same_bits(method, where, call, whole, tmp_path, monkeypatch):
    (config, undisturbed), calls = whole[method], []
    plain = getattr(STAGES[method], where)

    def dies(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[method], where, dies)
        with pytest.raises(Killed):
            train_rewards(config, tmp_path, device="cpu")
    assert list_checkpoints(tmp_path / "checkpoints") and not (tmp_path / "final").exists()
    train_rewards(config, tmp_path, resume=True, device="cpu")
    assert same(weights_of(undisturbed), weights_of(tmp_path))


@pytest.mark.parametrize(
    ("method", "way", "error", "words"),
    [
        ("forward", "breaks", RuntimeError, "answered 500"),
        ("forward", "slow", RuntimeError, "no answer within 0.5 s"),
        ("forward", "nan", FloatingPointError, "scores are NaN"),
        ("grpo", "nan", FloatingPointError, "scores are NaN"),
        ("grpo", "few", RuntimeError, "scores for 2 pictures"),
    ],
)
def test_nothing_is_lost_when_a_reward_server_fails(method, way, error, words, whole, tmp_path):
    """The run ends with the server's name and saves its step; with the server well again it goes on to the same bits.

    The old policy once followed twice: before the roll-out that failed, and before the one that took its place.
    """

    class Ill(Odd):
        last = 7  # the preflight, the first roll-out in four parts, half of the second

        def score(self, pictures, prompts):
            self.way = way if self.calls >= self.last else ""
            return super().score(pictures, prompts)

    reward = Ill()
    with served(reward) as server:
        alone = [f"rewards=[['{server.url}', 1.0]]", "reward_retries=0", "checkpoint_every=99", "reward_timeout=0.5"]
        config = override(whole[method][0], alone)
        with pytest.raises(error, match=f"reward redness@{re.escape(server.url)}: .*{words}.*step 2 is saved"):
            train_rewards(config, tmp_path, device="cpu")
        assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
        reward.last = 99
        train_rewards(config, tmp_path, resume=True, device="cpu")
    assert same(weights_of(whole[method][1]), weights_of(tmp_path))  # which was paid by the reward in this process
    here, there = (
        [row["reward"] for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row]
        for folder in (whole[method][1], tmp_path)
    )
    assert here == there and len(here) == 4


def test_all_processes_end_when_the_judge_of_one_fails(ranks, small, tmp_path):  # noqa: F811
    """Each asks for its own pictures. One that failed alone left the other waiting, and nothing was saved."""

    class Picky(Odd):
        def score(self, pictures, prompts):
            with lock:  # both preflights, both parts of the first roll-out twice; then the first answer is NaN
                self.way = "nan" if self.calls == 6 else ""
                return super().score(pictures, prompts)

    lock = threading.Lock()
    with served(Picky()) as server:
        config = small("forward", f"rewards=[['{server.url}', 1.0]]", "reward_retries=0", "checkpoint_every=99")
        ranks.start(2, *words_of(config, tmp_path))
        assert any(ranks.wait())
    log = ranks.log.read_text()
    assert "scores are NaN" in log and "another process failed" in log and "step 2 is saved" in log
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_another_base_is_refused_on_resume(small, tmp_path):
    run = start(small("forward"), tmp_path)
    run.step()
    run.save()
    run.stage.base = "another"
    with pytest.raises(ValueError, match="start_from=.*started from another model"):
        tensors, state = load_latest(run.checkpoints)
        run.stage.load_state(state["stage"] | tensors["stage"])


def words_of(config, run_dir):
    return [*train_arguments(config, run_dir, True, "cpu")]


def test_killed_by_the_system_and_resumed(ranks, small, tmp_path):  # noqa: F811
    """The whole way from the command line, SIGKILL between a roll-out and its second update."""
    config = small("grpo")
    ranks.run(1, *words_of(config, tmp_path / "whole"))
    ranks.start(1, *words_of(config, tmp_path / "parts"))
    ranks.until(lambda: (tmp_path / "parts" / "checkpoints" / "step-00000003").exists(), every=0.0005)
    ranks.kill()
    ranks.run(1, *words_of(config, tmp_path / "parts"))
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


@pytest.mark.parametrize("method", ["forward", "grpo"])
def test_two_processes_are_one(method, ranks, whole, tmp_path):  # noqa: F811
    """Within 1e-4 of the adapter's largest number: gradients are summed in another order, and Adam divides by them."""
    config, undisturbed = whole[method]
    ranks.run(2, *words_of(dataclasses.replace(config, accumulate=1), tmp_path))
    one, two = weights_of(undisturbed), weights_of(tmp_path)
    largest = max(value.abs().max() for value in one.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4 * largest.item())
    assert any(value.abs().max() > 1e-4 for name, value in one.items() if "lora_B" in name)


def test_a_reward_is_served_from_the_command_line(ranks, tmp_path):  # noqa: F811
    ranks.start(1, "reward", "serve", "geneval", "--port", "0")
    ranks.until(lambda: "http://" in ranks.log.read_text())
    remote = RemoteReward(re.search(r"http://\S+", ranks.log.read_text())[0])
    assert judges.preflight([remote])[remote.name] == (1, 0)
    ranks.kill()


def test_the_adapter_is_what_was_trained(small, tiny_folder, tmp_path, monkeypatch):
    """Merged from the exported folder, the plain model draws what the run's average draws."""
    run = start(small("forward", "optimizer.lr=1e-2"), tmp_path)
    final = run.fit()
    inputs = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 32), torch.tensor([900.0, 100.0])
    merged = load_pipeline(tiny_folder, "cpu", lora=final).transformer
    with torch.no_grad(), run.averaged():
        expected, found = run.stage.model(*inputs).sample, merged(*inputs).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with run.stage.policy(run.stage.reference()):
            plain = load_pipeline(tiny_folder, "cpu").transformer(*inputs).sample
            assert torch.equal(run.stage.model(*inputs).sample, plain)
    assert (found - plain).abs().max() > 1e-4
    half = load_pipeline(tiny_folder, "cpu", "bfloat16", lora=final).transformer.state_dict()  # rounded once
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in merged.state_dict().items())
    adapter = LoraConfig.from_pretrained(final)
    assert (adapter.r, adapter.lora_alpha) == (4, 8) and {"attn.to_q", "ff.net.2"} <= set(adapter.target_modules)
    names = set(load_file(final / "adapter_model.safetensors"))
    assert "base_model.model.block_groups.0.0.attn.add_k_proj.lora_B.weight" in names
    with pytest.raises(ValueError, match="or of rewards that started from lite"):
        ship_student(tmp_path, str(tmp_path / "shipped"))
    run_file = tmp_path / "config.json"
    about = json.loads(run_file.read_text())
    with monkeypatch.context() as patch:  # shipped, it is a name: the base merged, drawn as in its roll-outs
        patch.setattr("nitro_e_lite.files.weights_dir", lambda: tmp_path / "weights")
        shutil.copytree(tiny_folder, tmp_path / "weights" / "lite")
        assert files.best_shipped() == ("lite", None) and files.best_shipped(3) == ("lite", 3)
        with pytest.raises(ValueError, match="'lite-grpo'.*nitro-e train rewards"):
            load_pipeline("lite-grpo", "cpu")
        folder = ship_student(tmp_path, "lite-grpo")  # from a folder with the same weights
        assert files.read_json(folder / "config.json")["config"]["start_from"] == "lite"
        run_file.write_text(json.dumps(about | {"config": about["config"] | {"start_from": "lite"}, "base": "0" * 64}))
        folder = ship_student(tmp_path, "lite-grpo")
        assert folder.name == "lite-grpo" and "hosts" not in (folder / "config.json").read_text()
        patch.setattr("nitro_e_lite.files.BEST", "lite-grpo")
        assert files.best_shipped() == ("lite-grpo", 10) and files.best_shipped(1) == ("lite-grpo", 1)
        wanted = [([], "lite-grpo", 10), (["--steps", "1"], "lite-grpo", 1)]
        wanted += [(["--lora", str(final), "--steps", "1"], "lite", 1)]  # an adapter wants the base
        for more, *which in wanted:
            words = ["sample", "a star", "--json", "--out", str(tmp_path / "star.png"), *more]
            said = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
            assert [said["model"], said["steps"]] == which
        named = load_pipeline("lite-grpo", "cpu")
        assert named.sampler() == named.sampler(3, 0.0, 1.0)
        with torch.no_grad():
            torch.testing.assert_close(named.transformer(*inputs).sample, found, rtol=1e-2, atol=1e-2)  # float16
        mine, theirs = load_transformer("lite-grpo").state_dict(), named.transformer.state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        with pytest.raises(ValueError, match="lora: lite-grpo is an adapter itself"):
            load_pipeline("lite-grpo", "cpu", lora=final)
    run_file.write_text(json.dumps(about))
    torch.testing.assert_close(load_pipeline(tmp_path, "cpu").transformer(*inputs).sample, found)
    only = small("forward", "adapter.targets=attention")
    assert not any(".mlp." in name for name in start(only, tmp_path / "attention").stage.adapter)


def test_positive_only_learns_from_the_better_half(small, tmp_path):
    engine = start(small("positive", "forward.reference_weight=0"), tmp_path)
    losses = engine.stage.losses(0, 0)["transformer"]["loss"].view(4, -1)  # (B, times)
    advantages = engine.stage.rollout["advantage"][:4]
    assert ((losses != 0).all(1) == (advantages > 0)).all() and (advantages > 0).any()
    assert math.isfinite(engine.step()["gradient_norm"])


def test_it_reports_and_every_field_is_read(small, tmp_path, monkeypatch, tiny_folder):
    """A hyper-parameter that nothing reads is a lie, see `test_train.py`."""
    read, own = {}, ("dataclasses", "nitro_e_lite.config", "pydantic._internal._dataclasses")
    classes = [settings.RewardConfig, settings.AdapterConfig, settings.ForwardConfig, settings.GrpoConfig]

    def spy(cls):
        def get(self, name):
            frame = sys._getframe(1)
            if frame.f_globals["__name__"] not in own or frame.f_code.co_name == "check":
                read.setdefault(cls.__name__, set()).add(name)
            return object.__getattribute__(self, name)

        return get

    for name, look in LOOKS.items():
        monkeypatch.setattr(Rewards, name, look)
    for cls in classes:
        monkeypatch.setattr(cls, "__getattribute__", spy(cls))
    changes = ["steps=3", "validate_every=3", "sample_every=3", "batch_size=2", "group=2", "rollout_steps=3"]
    for method in ("forward", "grpo"):
        train_rewards(small(method, *changes), tmp_path / method, device="cpu")
    for cls in classes:
        fields = {field.name for field in dataclasses.fields(cls)} - {"preset", "max_skipped"}
        if cls is settings.RewardConfig:
            fields -= {"stage"}  # read by the launcher
        assert fields <= read[cls.__name__], fields - read[cls.__name__]
    rows = list(read_jsonl(tmp_path / "forward" / "metrics.jsonl"))
    assert {"reward", "reward_redness", "flat_groups", "group_distance", "old_distance"} <= rows[0].keys()
    assert "geneval" in {key for row in rows for key in row}
    assert list((tmp_path / "grpo" / "samples").glob("*.png"))


def test_words_of_a_run_are_its_configuration():
    config = override(preset("rewards", "full"), ["method=grpo", "grpo.kl=0.04", "rewards=[[geneval, 1.0]]"])
    words = train_arguments(config, "runs/rewards", True, None)
    sets = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
    assert override(preset("rewards", "full"), sets) == config and words[:2] == ["train", "rewards"]
    assert run_name(config) == "rewards" and run_name(preset("base", "lite")) == "transformer"
    with pytest.raises(TypeError, match="RunConfig describes no run"):
        run_name(settings.RunConfig())


# -- learned judges


def test_preference_is_bradley_and_terry():
    better, worse = torch.randn(2, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    chance = better.exp() / (better.exp() + worse.exp())
    torch.testing.assert_close(learned_judges.preference_loss(better, worse), -chance.log())


def test_a_fault_is_one(tmp_path):
    scene = grammar.sample_scene(3, 5)
    clean, rows = render(scene), {}
    for fault in degrade.FAULTS:
        rows[fault] = degrade.degrade(scene, fault, np.random.default_rng(1))
        assert rows[fault].shape == clean.shape and rows[fault].dtype == np.uint8
        assert np.array_equal(rows[fault], degrade.degrade(scene, fault, np.random.default_rng(1)))
        assert not np.array_equal(rows[fault], clean)
    seen = dict(zip(rows, watch.picture_statistics(np.stack(list(rows.values()))), strict=True))
    edges, entropy, background = watch.picture_statistics(clean[None])[0]
    assert seen["noise"][0] > 3 * edges and seen["blur"][0] < edges and seen["background"][2] > 3 * background
    flat = np.full((1, 16, 16, 3), 200, np.uint8)
    assert watch.picture_statistics(flat)[0].tolist() == [0, 0, 0] and entropy > 0
    with pytest.raises(ValueError, match="fault='ugly'"):
        degrade.degrade(scene, "ugly", np.random.default_rng(0))


def test_judges_learn_and_are_loaded_as_they_were(tmp_path):
    for kind, model in judge_stage.KINDS.items():
        recipe = override(judge_stage.RECIPES[kind], ["steps=2", "batch_size=5", "validation_scenes=5"])
        final = judge_stage.train_judge(recipe, tmp_path / kind, device="cpu")
        rows = list(read_jsonl(tmp_path / kind / "metrics.jsonl"))
        assert any("held_out_right" in row for row in rows)
        found, torch_input = learned_judges.load_judge(model, tmp_path / kind), torch.zeros(1, 3, 128, 128)
        engine = Engine(recipe, judge_stage.Judges, tmp_path / kind, resume=True, device="cpu")
        for one, two in zip(found(torch_input), engine.stage.model.eval()(torch_input), strict=True):
            torch.testing.assert_close(one, two)
        assert [path.name for path in final.iterdir()] == [f"{kind}.safetensors"]
    with pytest.raises(FileNotFoundError, match="nitro-e train judge reader"):
        learned_judges.load_judge(learned_judges.SceneReader, tmp_path / "preference")


def test_shipped_judges_are_right_on_scenes_they_never_saw(tmp_path):
    """Forty pairs through the autoencoder; the reader on true scenes of held-out prompts and on wrong ones."""
    stage = judge_stage.Judges(judge_stage.RECIPES["preference"], Placement(torch.device("cpu"), torch.float32, ()))
    stage.model = learned_judges.load_judge(learned_judges.PreferenceModel)
    with torch.no_grad():
        right = stage.pair_losses(judge_stage.HELD_OUT_SEED, list(range(500, 540)))["right"].mean().item()
    reader, prompts = learned_judges.load_judge(learned_judges.SceneReader), geneval.load_prompts()[::6]
    pictures = np.stack([render(geneval.true_scene(prompt)) for prompt in prompts])
    found, wrong = reader.right(pictures, prompts).mean(), reader.right(pictures, prompts[::-1]).mean()
    print(f"preference right on {right:.3f} of pairs; reader right on {found:.3f} of true scenes, {wrong:.3f} of wrong")
    assert right >= 0.9 and found >= 0.9 and wrong < 0.1


def test_a_run_that_is_hacked_is_stopped():
    stop = gates.EarlyStop(0.1, 0.7)
    for step, distance in enumerate([1.0, 1.1, 0.9, 0.8]):
        stop.rolled_out(step, distance)
    stop.held_out(20, 0.8)
    stop.held_out(40, 0.75)
    again = gates.EarlyStop(0.1, 0.7)
    again.load_state(json.loads(json.dumps(stop.state())))
    for snapshots, said in [(0, "its best was step 20"), (15, "its best was step 20"), (10, "that of step 20 in snap")]:
        again.snapshots = snapshots
        with pytest.raises(RuntimeError, match=r"gate held-out: at step 60 .* 0\.690.*best, 0\.800.*" + said):
            again.held_out(60, 0.69)
    with pytest.raises(RuntimeError, match=r"gate diversity: .* 0\.\d+, 6\d% of what it was"):
        for step in range(8):
            again.rolled_out(step, 0.5)
    gates.EarlyStop(0, 0).held_out(1, 0.5)


def test_a_held_out_score_must_fall_by_more_than_chance():
    """The best of many looks at fifty pictures is partly luck: healthy runs were ended in two cases of three."""
    chance = np.random.default_rng(0)
    ended = 0
    for _ in range(50):
        stop, truth = gates.EarlyStop(0.1, 0.0), chance.random(50) < 0.6
        with suppress(GateFailed):
            for look in range(20):
                truth = truth ^ ((chance.random(50) < 0.2) & (~truth | (chance.random(50) < 2 / 3)))  # stays near 0.6
                stop.held_out(look, truth.mean(), None, truth)
            continue
        ended += 1
    assert ended <= 3, ended
    stop = gates.EarlyStop(0.1, 0.0)
    stop.held_out(1, 0.8, None, [1.0] * 40 + [0.0] * 10)
    again = gates.EarlyStop(0.1, 0.0)
    again.load_state(json.loads(json.dumps(stop.state())))
    with pytest.raises(GateFailed, match="gate held-out: at step 2"):
        again.held_out(2, 0.3, None, [1.0] * 15 + [0.0] * 35)


def test_a_request_that_was_left_is_not_judged():
    """Each that timed out was judged for nobody, while its client asked again: one stall could end all of them."""
    judged, go = [], threading.Event()

    class Slow(judge_server.Handler):
        health = {}
        one_at_a_time = threading.Lock()

        @staticmethod
        def score(pictures, prompts):
            judged.append(prompts[0]["prompt"])
            go.wait(20)
            return [1.0] * len(pictures)

    with judge_server.Server(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        picture = judges._to_png(np.zeros((8, 8, 3), np.uint8))

        def ask(prompt):
            body = json.dumps({"images": [picture], "prompts": [{"prompt": prompt}]}).encode()
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            client = socket.create_connection(server.server_address)
            client.sendall(head + body)
            return client

        def waiting():
            return sum(thread.name.startswith("Thread") and "process_request" in thread.name for thread in threads())

        threads = threading.enumerate
        first = ask("first")
        while judged != ["first"]:
            time.sleep(0.01)
        left, last = ask("left"), ask("last")
        while waiting() < 3:
            time.sleep(0.01)
        time.sleep(0.2)  # until both have been read
        left.close()
        go.set()
        for client in (first, last):
            assert b'"scores": [1.0]' in client.makefile("rb").read()
            client.close()
        server.shutdown()
    assert sorted(judged) == ["first", "last"]


def test_the_figure_of_a_run_refuses_what_is_no_number():
    rows = [{"step": k, "reward": k / 3, "geneval": 0.5, "geneval_low": 0.4, "geneval_high": 0.6} for k in (2, 4)]
    assert [len(axis.lines) for axis in watch.reward_figure(rows, "a run").axes] == [2, 0, 0, 0, 0, 0]
    for row, said in [({"reward": 1.0}, "step='missing'"), ({"step": 1, "reward": {}}, "reward={}")]:
        with pytest.raises(ValueError, match=f"metrics.jsonl: {said}: must be a number"):
            watch.reward_figure([row])


def test_the_reference_holds_back_by_its_distance(small, tmp_path):
    """With and without its term the loss differs by weight times the squared distance of the velocities."""
    stage = start(small("forward"), tmp_path).stage
    for value in stage.adapter.values():
        value.data.normal_(0, 0.05)
    found = {}
    for weight in (0.0, 0.25):
        forward = dataclasses.replace(stage.config.forward, reference_weight=weight)
        stage.config = dataclasses.replace(stage.config, forward=forward)
        found[weight] = stage.losses(0, 0)["transformer"]
    distance = found[0.25]["reference_distance"]
    assert "reference_distance" not in found[0.0] and distance.min() > 0
    torch.testing.assert_close(found[0.25]["loss"] - found[0.0]["loss"], 0.25 * distance, rtol=1e-4, atol=1e-5)


def test_rows_that_teach_nothing_change_nothing_but_the_cost(small, tmp_path):
    """The gradient of a step with a flat group is that of the same step with all rows in it."""
    stage = start(small("forward", "forward.reference_weight=0", "batch_size=8"), tmp_path).stage
    stage.losses(0, 0)
    flat = torch.arange(8) < 4
    stage.rollout["advantage"][:8].masked_fill_(flat, 0.0)
    stage.rollout["weight"][:8] = row_weights(flat, 8, True)
    found = []
    for teaches in ((stage.rollout["weight"] > 0).tolist(), [True] * 16):
        stage.teaches = teaches
        loss = stage.losses(0, 0)["transformer"]["loss"]
        grads = torch.autograd.grad(loss.mean(), [p for n, p in stage.adapter.items() if "lora_B" in n])
        found.append((len(loss), loss.mean(), torch.cat([g.flatten() for g in grads])))
    assert (found[0][0], found[1][0]) == (8, 16)  # each at two noise levels
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-7)
