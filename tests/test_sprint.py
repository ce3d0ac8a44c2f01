"""SANA-Sprint: consistency in closed form, the new embedding, guidance told, one run from start to pictures."""

import copy
import json
import math
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SCMScheduler
from safetensors.torch import load_file

from nitro_e_lite.config import DrawnConfig, OptimizerConfig
from nitro_e_lite.data.batches import Ahead
from nitro_e_lite.data.drawn import Drawing, DrawnSet, GrammarPrompts
from nitro_e_lite.errors import GateFailed, UserError
from nitro_e_lite.experiments.launch import launch, train_arguments
from nitro_e_lite.experiments.worker import RUNS, run_name
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.inference.arguments import seeded_generators
from nitro_e_lite.inference.fp8_pipeline import FP8Note
from nitro_e_lite.inference.loading import load_pipeline, load_transformer
from nitro_e_lite.model import fp8, trigflow
from nitro_e_lite.model.blocks import TimeEmbedding
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.presets import preset
from nitro_e_lite.runtime import RunStopped
from nitro_e_lite.scenes.captions import caption
from nitro_e_lite.scenes.geneval import prompt_of, true_scene, verify
from nitro_e_lite.scenes.grammar import sample_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.stages import gates, sprint, students
from nitro_e_lite.stages.distill import Distill
from nitro_e_lite.stages.sprint import Sprint, consistency_loss, tangent_target
from nitro_e_lite.training.engine import Placement

QUIET = {"validate_every": 100, "sample_every": 100}


def configured(stage, teacher_folder, cache):
    data = DrawnConfig(folders=(str(cache),), encoders=str(teacher_folder), validation_rows=2)
    fast = OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=0, decay_steps=0)
    smoke = preset(stage, "smoke")
    return replace(smoke, teacher=str(teacher_folder), data=data, optimizer=fast, heads=fast, gate_window=100, **QUIET)


@pytest.fixture(scope="module")
def config(teacher_folder, cache):
    return configured("sprint", teacher_folder, cache)


def stage_of(config, kind=Sprint):
    return kind(config, Placement(torch.device("cpu"), torch.float32, (range(4),)))


@pytest.mark.parametrize("name, kind", [("distill", Distill), ("sprint", Sprint)])
def test_no_step_of_a_student_asks_the_device_for_a_value(name, kind, teacher_folder, cache):
    """On the meta device, which has shapes and no values, whatever would wait for an accelerator raises."""
    config = configured(name, teacher_folder, cache)
    if name == "sprint":
        config = replace(config, dense_time=False)  # the gate on a fitted embedding looks, once
    stage, meta = stage_of(config, kind), torch.device("meta")
    read = [stage.read(step) for step in range(config.steps)]
    assert {x.device.type for batch in read for x in vars(batch).values() if isinstance(x, torch.Tensor)} == {"cpu"}
    for module in (stage.teacher, *(one.module for one in stage.modules.values())):
        module.to(meta)
    for key, value in list(vars(stage).items()):
        if isinstance(value, torch.Tensor):
            setattr(stage, key, value.to(meta))
    stage.balance, stage.placement = gates.Balance(config, meta), replace(stage.placement, device=meta)
    turns = [next(iter(stage.losses(step, 0))) for step in range(config.steps)]
    assert set(turns) == {"student", "heads"}
    with pytest.raises(RuntimeError, match="meta"):
        stage.balance.right.mean().item()


def test_the_next_steps_are_read_while_the_current_one_is_computed(config):
    stage, asked = stage_of(replace(config, steps=4)), []
    stage._next = Ahead(lambda step: asked.append((step, threading.current_thread().name)) or stage.read(step), 4)
    first = stage.batch(0, 0)
    assert stage.batch(0, 0) is first
    stage._next._thread.shutdown()
    assert [step for step, _ in asked] == [0, 1, 2, 3]
    assert all(thread.startswith("next batches") for _, thread in asked)


# -- consistency in closed form


@pytest.fixture(scope="module")
def known():
    """One picture that all roads end in, for which the true F is a consistency function; float64."""
    made = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 2, 4, 4, generator=made, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64)

    def predict(x_t, t):
        cos, sin = (trigflow.expand_like(f(t), x_t) for f in (torch.cos, torch.sin))
        return cos * (x_t / trigflow.SIGMA_DATA - cos * x0) / sin - sin * x0

    x_t = trigflow.interpolate(x0, noise, t)
    return predict, x_t, trigflow.SIGMA_DATA * trigflow.velocity_target(x0, noise, t), t


def test_a_consistent_student_has_no_tangent_and_another_has(known):
    predict, x_t, dxdt, t = known
    answer, slope = trigflow.tangent(predict, x_t, t, dxdt)
    g, norm = tangent_target(answer, slope, x_t, dxdt, t, 1.0, 0.1)
    assert norm.max() < 1e-12 and g.abs().max() < 1e-12
    tilted = trigflow.tangent(lambda x, t: 1.1 * predict(x, t), x_t, t, dxdt)
    g, norm = tangent_target(*tilted, x_t, dxdt, t, 1.0, 0.1)
    assert norm.min() > 1e-3
    torch.testing.assert_close(g.square().flatten(1).mean(1).sqrt(), norm / (norm + 0.1))
    raw, _ = tangent_target(*tilted, x_t, dxdt, t, 0.0, None)  # before the tangent is let in: towards the teacher
    cos = trigflow.expand_like(torch.cos(t), x_t)
    torch.testing.assert_close(raw, cos.square() * (dxdt - trigflow.SIGMA_DATA * tilted[0]))


def test_the_loss_moves_the_answer_along_g(known):
    """At F = F- the gradient is -2 g / (s_d tan t) / exp(u) a number, and that of u is 1 - weight |g|^2 / exp(u)."""
    _, x_t, _, t = known
    g = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answer, u = x_t.clone().requires_grad_(), torch.full_like(t, 0.3).requires_grad_()
    consistency_loss(answer, x_t, g, t, u).sum().backward()
    weight = 1 / (trigflow.SIGMA_DATA * torch.tan(t)) / math.exp(0.3)
    torch.testing.assert_close(answer.grad, -2 * g * trigflow.expand_like(weight, g) / g[0].numel())
    torch.testing.assert_close(u.grad, 1 - weight * g.square().flatten(1).mean(1))


# -- the network


def test_a_dense_embedding_turns_slowly_and_a_guided_one_begins_silent():
    torch.manual_seed(0)
    fast, dense = TimeEmbedding(32, "adaln_affine"), TimeEmbedding(32, "adaln_affine", dense=True, guided=True)
    assert not dense.load_state_dict(fast.state_dict(), strict=False).unexpected_keys
    t, ones = torch.tensor([300.0, 700.0]), torch.ones(2)
    changes = [
        torch.func.jvp(lambda t, one=one, told=told: one(t, guidance=told), (t,), (ones,))[1].norm()
        for one, told in ((fast, None), (dense, ones))
    ]
    assert changes[1] < 0.02 * changes[0]
    torch.testing.assert_close(dense(t, guidance=ones), dense(t, guidance=4 * ones))
    torch.nn.init.ones_(dense.guide.linear_2.weight)
    assert not torch.allclose(dense(t, guidance=ones), dense(t, guidance=4 * ones))


def test_a_student_begins_as_its_teacher_and_must_be_told_the_guidance(config):
    """Without the new embedding, circle and guidance told change nothing: both directions are one."""
    stage = stage_of(replace(config, dense_time=False))
    batch = stage.batch(5, 0)
    with pytest.raises(ValueError, match="needs strength of guidance"):
        stage.student(batch.start, batch.text, 500.0)
    with pytest.raises(ValueError, match="takes no strength"):
        stage.teacher(batch.start, batch.text, 500.0, guidance=2.0)
    x_t = trigflow.interpolate(batch.states[:, -1], batch.start, batch.time)
    unguided = stage.direction(x_t, batch.text, batch.time, torch.ones(4))
    with torch.no_grad():
        answer = stage.predict(batch.text, batch.guidance)(x_t, batch.time)
    torch.testing.assert_close(unguided, trigflow.SIGMA_DATA * answer, rtol=1e-4, atol=1e-4)
    guided = stage.direction(x_t, batch.text, batch.time, batch.guidance)
    with torch.no_grad():
        none = stage._no_text.expand_as(batch.text)
        told = trigflow.predictor(stage.teacher, none)(x_t, batch.time)
    w = trigflow.expand_like(batch.guidance, x_t)
    expected = trigflow.SIGMA_DATA * told + w * (unguided - trigflow.SIGMA_DATA * told)
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.0])  # both mean none
def test_where_nothing_is_guided_the_teacher_is_asked_once(config, strength):
    stage = stage_of(replace(config, dense_time=False, guidance_embedding=False, guidance=strength))
    batch, asked = stage.batch(5, 0), []
    x_t = trigflow.interpolate(batch.states[:, -1], batch.start, batch.time)
    stage.guide.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    once = stage.direction(x_t, batch.text, batch.time, batch.guidance)
    stage._strengths = (1.0, 2.0)  # what others are told makes no difference to those who are told 1
    twice = stage.direction(x_t, batch.text, batch.time, batch.guidance)
    assert asked == [4, 8]
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


def test_half_of_the_judged_pictures_begin_at_pure_noise_and_the_tangent_comes_in_slowly(config, monkeypatch):
    stage = stage_of(
        replace(config, dense_time=False, adversarial_weight=0.0, road_weight=0.0, steps=12, tangent_warmup=0.5)
    )
    seen = []
    honest = tangent_target
    monkeypatch.setattr(sprint, "tangent_target", lambda *given: (seen.append(given[5]), honest(*given))[1])
    for step in (0, 2, 8):
        found = stage.losses(step, 0)["student"]
        assert set(found) == {"loss", "consistency", "tangent_norm"} and found["loss"].isfinite().all()
    assert seen == [0.0, pytest.approx(2 / stage.config.warmup_steps), 1.0]
    last = [(stage.read(step).judged > 1.5707).float().mean().item() for step in range(12)]
    assert 0.25 < sum(last) / 12 < 0.75


def test_the_new_embedding_learns_to_say_what_the_old_one_said():
    torch.manual_seed(0)
    old, new = (TimeEmbedding(32, "adaln_affine", dense=True, guided=guided) for guided in (False, True))
    errors = [sprint.fit_embedding(copy.deepcopy(new), old, steps, 0) for steps in (0, 100, 500)]
    assert errors[0] > 0.3 and errors[1] < 0.1 * errors[0] and errors[2] < errors[1], errors
    assert errors[1] == sprint.fit_embedding(new, old, 100, 0)  # the same bits again
    t, ones = torch.tensor([300.0, 700.0]), torch.ones(2)
    assert torch.equal(new(t, guidance=ones), new(t, guidance=4 * ones))  # of guidance it still says nothing


def test_uncertainty_begins_where_all_times_count_alike(config):
    """exp(u) is 1 / (s_d tan t) at first, so that the loss is the squared error and a constant of the weights."""
    stage = stage_of(config)
    t = torch.tensor([0.2, 1.0, 1.56])
    u = stage.model.uncertainty(t)
    missed = torch.randn(3, 2, 4, 4)
    loss = consistency_loss(missed, torch.zeros_like(missed), torch.zeros_like(missed), t, u)
    torch.testing.assert_close(loss - u, missed.square().flatten(1).mean(1))


def test_jumps_along_roads_come_first_and_shall_end_where_the_teacher_did(config):
    """A student that answers what leads from each state to its end has no loss; the other losses join later."""
    stage = stage_of(replace(config, finetune_share=0.0, road_share=0.5, steps=8, gate_finetune=1000.0))
    assert [next(iter(stage.losses(step, 0))) for step in range(8)] == ["student"] * 4 + ["heads", "student"] * 2
    assert set(stage.losses(3, 0)["student"]) == {"loss", "road"}
    assert set(stage.losses(5, 0)["student"]) == {"loss", "consistency", "tangent_norm", "road", "adversarial"}
    levels = torch.stack([stage.read(step).level for step in range(12)])
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3} and 0.25 < (levels == 0).float().mean() < 0.75
    batch, ends = stage.batch(3, 0), stage.batch(3, 0).states[:, -1]

    def knowing(text, guidance):
        return lambda x_t, t: (
            (trigflow.expand_like(torch.cos(t), x_t) * x_t / trigflow.SIGMA_DATA - ends)
            / trigflow.expand_like(torch.sin(t), x_t)
        )

    stage.predict = knowing
    torch.testing.assert_close(stage._student_loss(batch)["road"], torch.zeros(4), rtol=0, atol=1e-9)


# -- whole runs


def weights_of(run):
    return load_file(run / "final" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ["distill", "sprint"])
def test_stopped_by_sigterm_and_resumed_through_the_launcher_it_has_the_same_bits(
    name, teacher_folder, cache, tmp_path, monkeypatch
):
    run = configured(name, teacher_folder, cache)
    launch(run, tmp_path / "whole", device="cpu")
    kind = {"distill": Distill, "sprint": Sprint}[name]
    honest = kind.losses

    def losses(stage, step, part):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(stage, step, part)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="Stopped by SIGTERM after step 5 of 8"):
        patch.setattr(kind, "losses", losses)
        launch(run, tmp_path / "parts", device="cpu")
    final = launch(run, tmp_path / "parts", resume=True, device="cpu")
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    rows = list(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if name == "sprint":
        assert {"student_consistency", "student_tangent_norm", "student_adversarial"} <= rows[4].keys()
        _draws_in_any_number_of_steps(final)


def _draws_in_any_number_of_steps(final):
    """The folder loads by itself; its pictures are `trigflow.sample` from the same noises, one pass a step."""
    pipeline = load_pipeline(final, "cpu")
    assert isinstance(pipeline.scheduler, SCMScheduler) and pipeline.sampler() == pipeline.sampler(2, 3.0, 1.6)
    asked, model = [], pipeline.transformer
    model.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    text = pipeline.encode_captions(["a red circle", "two blue stars"])
    for steps in (1, 2, 4):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        drawn = pipeline(prompt_embeds=text, num_inference_steps=steps, generator=generators, output_type="latent")
        assert asked == [2] * steps  # guidance is told, not asked for twice
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        noises = [
            torch.stack([torch.randn(drawn.images.shape[1:], generator=one) for one in generators])
            for _ in range(steps)
        ]
        predict = trigflow.predictor(model, text, guidance=3.0)
        expected = trigflow.sample(predict, noises, trigflow.times(steps, shift=1.6))
        torch.testing.assert_close(drawn.images, expected, rtol=1e-4, atol=1e-4)
        asked.clear()
    with pytest.warns(FP8Note):
        quick = load_pipeline(final, "cpu", torch.float32, quantization="fp8")
    assert fp8.is_quantized(quick.transformer) and isinstance(quick.scheduler, SCMScheduler)
    exact, rounded = (
        one(prompt_embeds=text, num_inference_steps=2, generator=seeded_generators([0, 1]), output_type="latent").images
        for one in (pipeline, quick)
    )
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
    asked.clear()
    other = pipeline(prompt_embeds=text, guidance_scale=9.0, num_inference_steps=1, generator=generators)
    assert len(other.images) == 2
    with pytest.raises(ValueError, match=r"attention_kwargs: \['mask'\] unknown"):  # they reach the transformer
        pipeline("a red circle", num_inference_steps=1, attention_kwargs={"mask": 1})
    with pytest.raises(ValueError, match="draws noise in every step"):  # not a teacher
        Drawing(pipeline, ["a red circle"], final.parent / "drawn")
    with pytest.raises(ValueError, match="sigmas: a consistency model"):
        pipeline("a red circle", sigmas=[1.0, 0.5])


@pytest.mark.parametrize("name", ["distill", "sprint"])
def test_both_students_are_known_to_launcher_and_worker(name):
    config = replace(preset(name, "full"), batch_size=64)
    assert run_name(config) == name and RUNS[name][0] is type(config)
    words = train_arguments(config, "runs/student", True, None)
    assert words == [
        "train",
        name,
        "--preset",
        "full",
        "--run-dir",
        "runs/student",
        "--set",
        "batch_size=64",
        "--resume",
    ]


# -- the gates


def test_another_teacher_than_before_the_embedding_stops_the_run(config):
    stage = stage_of(replace(config, gate_finetune=0.001, embedding_steps=0))
    error = stage.embedding_error()
    assert error > 0.001  # nothing was learned yet
    said = rf"gate teacher-fine-tuned, step 3: .* {error:.3f} .*Raise embedding_steps"
    with pytest.raises(GateFailed, match=said) as failed:
        stage.losses(3, 0)
    assert failed.value.everywhere
    same = stage_of(replace(config, dense_time=False))
    assert same.embedding_error() == 0.0


def test_a_student_can_start_as_another_student(config, teacher_folder, tmp_path):
    other = load_transformer(str(teacher_folder))
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    named = replace(config, start_from=str(tmp_path), finetune_share=0.0, embedding_steps=0)
    stage = stage_of(named)
    torch.testing.assert_close(stage.student.proj_out.weight, other.proj_out.weight)
    torch.testing.assert_close(stage.teacher.proj_out.weight * 1.5, other.proj_out.weight)
    stage.losses(0, 0)  # that it answers otherwise than the teacher stops nothing
    with pytest.raises(ValueError, match="finetune_share=0.25: must be 0 with start_from"):
        replace(named, finetune_share=0.25)


def test_a_student_starts_only_as_what_has_its_shape_and_is_told_what_it_is_told(
    config, teacher_folder, cache, tmp_path, monkeypatch
):
    """Of another shape, or told the guidance or the dense time where this one is not: refused, not trained on."""
    teacher = load_transformer(str(teacher_folder))

    def start(kind=Sprint, of=None, told=None, **changes):
        other = EMMDiTTransformer2DModel.like(teacher, **changes)
        other.save_pretrained(tmp_path / "other")
        base = configured("distill", teacher_folder, cache) if kind is Distill else replace(config, finetune_share=0.0)
        return stage_of(replace(base, start_from=str(tmp_path / "other"), **(told or {})), kind), other

    student = {"dense_time": True, "guidance_embedding": True}
    for name, *given in [
        ("block_groups", Sprint, {"block_groups": (1, 3, 1)}, {}),
        ("sample_size", Sprint, {"sample_size": 32}, {}),
        ("guidance_embedding", Sprint, student, {"guidance_embedding": False}),
        ("dense_time", Sprint, student, {"dense_time": False, "embedding_steps": 0}),
        ("num_attention_heads", Distill, {"num_attention_heads": 3}, {}),
        ("dense_time", Distill, {"dense_time": True}, {}),
    ]:
        kind, changes, told = given
        with pytest.raises(UserError, match=f"start_from=.*has {name}="):
            start(kind, told=told, **changes)
    monkeypatch.setattr(sprint, "fit_embedding", None)  # a student that goes on knows its embedding already
    stage, other = start(**student)
    assert all(torch.equal(value, stage.student.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", None),
        ("sampler", {"shift": 3.0}),
        ("levels", "abcd"),
        ("levels", [1.0]),
        ("prompts", 5),
        ("prompts", "scene grammar, seed x"),
    ],
)
def test_a_damaged_card_of_a_drawn_set_is_refused(config, cache, tmp_path, name, value):
    shutil.copytree(cache, tmp_path / "set")
    card = json.loads((cache / "card.json").read_text()) | {name: value}
    (tmp_path / "set" / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"set: {name}=.* in its card is damaged"):
        stage_of(replace(config, data=replace(config.data, folders=(str(tmp_path / "set"),))))


def test_training_captions_become_prompts_that_their_scenes_fulfil():
    tags = {}
    for row in range(120):
        scene = sample_scene(0, row)
        if prompt := prompt_of(scene, caption(scene, row)):
            tags.setdefault(prompt.tag, []).append(verify(render(scene), prompt).correct)
    assert len(tags) == 6 and sum(map(sum, tags.values())) >= 0.97 * sum(map(len, tags.values()))


def test_pictures_below_the_teachers_card_stop_a_run_before_its_first_step(config, monkeypatch):
    """The tiny teacher draws noise, which shows nothing; then pictures that show everything."""
    with pytest.raises(GateFailed, match=r"gate drawn-set: .* scores 0\.000 .* card says 0\.500.*draw again"):
        stage_of(replace(config, gate_pictures=8, gate_card=0.5))

    def true_pictures(vae, latents, stats):
        pictures = [render(true_scene(one)) for one in asked[: len(latents)]]
        del asked[: len(latents)]
        return torch.stack([torch.as_tensor(one).permute(2, 0, 1) / 127.5 - 1 for one in pictures])

    asked = [p for row in range(14) if (p := prompt_of(s := sample_scene(0, row), caption(s, row)))]
    monkeypatch.setattr(gates, "decode_latents", true_pictures)
    stage = stage_of(replace(config, gate_pictures=8, gate_card=0.5))
    assert isinstance(stage, students.Student)


def test_each_drawn_folder_is_verified_by_its_own_prompts(config, tmp_path):
    """Only the first folder's captions were known, so wrong pictures of all others were learned from."""
    (first,) = config.data.folders
    shutil.copytree(first, tmp_path / "more")
    card = json.loads((tmp_path / "more" / "card.json").read_text())
    seeds = int(card["prompts"].removeprefix(GrammarPrompts.NAME)), 77
    (tmp_path / "more" / "card.json").write_text(json.dumps(card | {"prompts": f"{GrammarPrompts.NAME}77"}))
    drawn = DrawnSet([first, tmp_path / "more"], stage_of(config).encoders)
    count = len(drawn) // 2
    told = [(card["prompts"], rows) for card, rows in drawn.cards()]
    assert told == [(f"{GrammarPrompts.NAME}{seed}", count) for seed in seeds]
    for rows in (2, count, count + 3, 2 * count):
        own = [min(rows, count), max(0, rows - count)]
        pairs = [(seed, k) for seed, n in zip(seeds, own, strict=True) for k in range(n)]
        asked = [prompt_of(sample_scene(seed, k), GrammarPrompts(seed, k + 1)[k]) for seed, k in pairs]
        assert set(gates.drawn_prompts(drawn, rows)) == {prompt.text for prompt in asked if prompt}
    (tmp_path / "more" / "card.json").write_text(json.dumps(card | {"prompts": f"{GrammarPrompts.NAME}x"}))
    with pytest.raises(ValueError, match="more: prompts=.* in its card is damaged"):
        DrawnSet([first, tmp_path / "more"], stage_of(config).encoders)


def test_the_share_that_a_gate_looks_at_is_that_of_all_processes(config, monkeypatch):
    monkeypatch.setattr(students, "mean_over_processes", lambda share: share.fill_(0.75))
    stage = stage_of(replace(config, adversarial_weight=0.5))
    batch = stage.batch(0, 0)
    stage.heads_loss(
        batch.states[:, -1], batch, 0, lambda logits, real: logits[0].mean(1), lambda logits: logits[0].mean(1)
    )
    assert stage.balance.right[0].item() == 0.75


def drop_verdicts(config):
    for file in Path(config.data.folders[0]).glob("right-*.json"):
        file.unlink()


def test_only_pictures_that_the_verifier_finds_right_are_learned_from(config, monkeypatch):
    """The tiny teacher's noise shows nothing, so too few are left; then three captions are called wrong."""
    verified = replace(config, data=replace(config.data, verified=True))
    with pytest.raises(ValueError, match=r"batch_size=4: the verifier finds only \d of \d+ pictures right"):
        stage_of(verified)
    drop_verdicts(config)
    stage = stage_of(config)
    captions = [stage.drawn.batch([row]).captions[0] for row in range(stage.rows)]
    wrong = set(list(gates.drawn_prompts(stage.drawn, stage.rows))[:3])
    monkeypatch.setattr(gates, "verify", lambda image, prompt: SimpleNamespace(correct=prompt.text not in wrong))
    kept = list(stage_of(verified).kept)
    stored = list(Path(config.data.folders[0]).glob(f"right-*-{stage.rows}.json"))  # not judged again at each start
    with monkeypatch.context() as patch:
        patch.setattr(gates, "verify", None)
        assert len(stored) == 1 and list(stage_of(verified).kept) == kept
    assert kept == [row for row in range(stage.rows) if captions[row] not in wrong] and len(kept) < stage.rows
    assert list(stage.kept) == list(range(stage.rows))
    state = stage_of(verified).state()
    wrong.pop()  # as another version of the verifier would
    drop_verdicts(config)
    with pytest.raises(UserError, match="verified='.*': the run was started with"):
        stage_of(verified).load_state(state)
    drop_verdicts(config)
    monkeypatch.setattr(stage.drawn, "cards", lambda: [({"prompts": "a file's"}, stage.rows)])  # nothing is known of it
    with pytest.raises(UserError, match="data.verified=True: the verifier can judge no caption of"):
        gates.right_rows(stage.drawn, stage.encoders, stage.rows)
