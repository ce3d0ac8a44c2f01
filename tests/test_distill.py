"""Four steps from twenty: the teacher's drawn set, the discriminator, the stage, and the folder that it leaves."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import DRAWN_ROWS as ROWS
from tiny import TEACHER_SHIFT as SHIFT
from tiny import TEACHER_STEPS, build_tiny_pipeline, draw

from nitro_e_lite.cli.app import app
from nitro_e_lite.config import DrawnConfig, OptimizerConfig
from nitro_e_lite.course import demo_protocol
from nitro_e_lite.data import drawn
from nitro_e_lite.data.shards import read_card, sidecars
from nitro_e_lite.errors import GateFailed
from nitro_e_lite.experiments.ship import ship_student
from nitro_e_lite.files import read_jsonl
from nitro_e_lite.inference import schedules
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.model import flow
from nitro_e_lite.presets import preset
from nitro_e_lite.scenes.captions import is_reserved
from nitro_e_lite.scenes.grammar import is_held_out, sample_scene
from nitro_e_lite.stages import discriminator, gates
from nitro_e_lite.stages.distill import Distill, distill
from nitro_e_lite.training.engine import Engine, Placement


@pytest.fixture(scope="module")
def config(teacher_folder, cache):
    """The smoke preset on the tiny teacher."""
    data = DrawnConfig(folders=(str(cache),), encoders=str(teacher_folder), validation_rows=2)
    fast = OptimizerConfig(name="adamw", lr=1e-3, warmup_steps=0, decay_steps=0)
    smoke = preset("distill", "smoke")
    return replace(smoke, teacher=str(teacher_folder), data=data, optimizer=fast, heads=fast, gate_window=100)


def files_of(folder):
    """What the shards hold, without what is about the writing of them."""
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


# -- the drawn set


def test_a_drawn_row_is_the_teachers_own_picture(teacher, teacher_folder, cache):
    """Seed, prompt and settings of a row draw its latents again; its states lie on the teacher's grid."""
    found = drawn.DrawnSet(cache, load_encoders(teacher_folder))
    assert len(found) == ROWS and found.levels == [1.0, 0.9, 0.75, 0.5]
    batch = found.batch([7])
    walk = []
    again = teacher(
        batch.captions,
        num_inference_steps=TEACHER_STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(drawn.noise_seed(0, 7)),
        output_type="latent",
        callback_on_step_end=lambda p, k, t, values: walk.append(values["latents"]) or {},
    ).images
    near = {"rtol": 2e-3, "atol": 2e-3}  # float16
    torch.testing.assert_close(batch.states[:, -1], again, **near)
    torch.testing.assert_close(batch.states[:, 0], drawn.noise_of([str(drawn.noise_seed(0, 7))], again.shape[1:]))
    for place, step in ((1, 2), (2, 4), (3, 6)):  # every second node of eight
        torch.testing.assert_close(batch.states[:, place], walk[step - 1], **near)


def test_states_lie_on_the_teachers_polygon():
    walk = [torch.full((1, 1, 1, 1), value) for value in (0.0, 1.0, 3.0, 4.0)]
    found = drawn.states_at([1.0, 0.9, 0.6, 0.3, 0.0], walk, [1.0, 0.6, 0.2, 0.0]).flatten().tolist()
    assert found == pytest.approx([0.0, 0.25, 1.0, 2.5, 4.0])
    with pytest.raises(ValueError, match="levels=.*outside"):
        drawn.states_at([1.2], walk, [1.0, 0.6, 0.2, 0.0])


def test_levels_are_those_of_both_samplers(teacher):
    for steps in (2, 4):
        walked = schedules.grid(teacher.scheduler, "linear", teacher.sampler(steps, 1.0, SHIFT))
        mine = drawn.sampler_levels(steps, SHIFT, "linear")
        assert mine == pytest.approx(walked)
    official = drawn.sampler_levels(4, 1.0, "scheduler")
    assert official == pytest.approx([1.0, 0.667, 0.334, 0.001], abs=1e-6)


def test_prompts_are_neither_reserved_nor_held_out():
    prompts = drawn.GrammarPrompts(3, 300)
    assert not any(is_reserved(prompts[row]) for row in range(300))
    assert not any(is_held_out(sample_scene(3, row).objects) for row in range(300))


def test_a_killed_drawing_goes_on_and_two_processes_are_one(teacher, cache, tmp_path, monkeypatch):
    whole = files_of(cache)
    assert len(whole) == 6
    shared = tmp_path / "shared"
    for rank in (1, 0):
        draw(teacher, shared, rank=rank, world=2).run()
    assert files_of(shared) == whole and read_card(shared) == read_card(cache)
    killed, calls = draw(teacher, tmp_path / "killed"), []
    honest = killed.draw

    def dies(prompts):
        calls.append(prompts)
        if len(calls) == 4:  # within the second shard
            raise KeyboardInterrupt
        return honest(prompts)

    monkeypatch.setattr(killed, "draw", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert len(sidecars(tmp_path / "killed")) == 1
    assert draw(teacher, tmp_path / "killed").run()["rows"] == ROWS - 5
    left = {name: value for name, value in files_of(tmp_path / "killed").items() if "partial" not in name}
    assert left == whole
    assert draw(teacher, tmp_path / "killed").run()["rows"] == 0  # all is there
    with pytest.raises(ValueError, match="seed was 0 and is 1 now"):
        draw(teacher, tmp_path / "killed", seed=1)
    for fewer in (7, ROWS - 1):
        with pytest.raises(ValueError, match=f"prompts={fewer}: .*killed holds the pictures of {ROWS} already"):
            draw(teacher, tmp_path / "killed", fewer)
    assert files_of(tmp_path / "killed") == whole and read_card(tmp_path / "killed") == read_card(cache)
    assert draw(teacher, tmp_path / "killed", ROWS + 1).run()["rows"] >= 1  # more may be added


def test_what_no_student_could_read_is_not_drawn(teacher, tmp_path):
    with pytest.raises(ValueError, match="student_steps: 1 is below 2"):
        draw(teacher, tmp_path / "one", student_steps=1)
    half = build_tiny_pipeline()
    half.transformer.to(torch.float16)
    with pytest.raises(ValueError, match="dtype=float16: must be float32 or bfloat16"):
        draw(half, tmp_path / "half")
    assert not list(tmp_path.iterdir())


def test_prompts_from_a_file_text_stored_and_empty_lines_left_out(teacher, teacher_folder, tmp_path):
    prompts = ["a red circle", "  ", "two blue stars"]
    drawn.Drawing(teacher, prompts, tmp_path / "set", steps=4, text=True, batch=2).run()
    (state,) = sidecars(tmp_path / "set").values()
    assert state["rows"] == 2 and state["skipped"] == [["prompt 1", "prompt is empty", 1]]
    batch = drawn.DrawnSet(tmp_path / "set", load_encoders(teacher_folder)).batch([0, 1])
    assert batch.captions == ["a red circle", "two blue stars"]
    features = load_encoders(teacher_folder).encode_text(batch.captions)
    torch.testing.assert_close(batch.text.float(), features, rtol=2e-3, atol=2e-3)
    assert len(drawn.DrawnSet([tmp_path / "set"] * 2, load_encoders(teacher_folder))) == 4


# -- the discriminator


def test_blocks_at_the_depths_of_both_models():
    depths = (0.1, 0.4, 0.7, 0.95)
    assert discriminator.chosen_blocks(24, depths) == [2, 9, 16, 22]
    assert discriminator.chosen_blocks(10, depths) == [1, 4, 7, 9]
    assert discriminator.chosen_blocks(3, (0.0, 0.5, 0.6, 1.0)) == [0, 1, 2]


def test_features_are_those_of_the_blocks_and_know_their_paths(teacher):
    features = discriminator.FrozenFeatures(teacher.transformer, (0.0, 0.3, 0.9))
    latents, text, t = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 32), torch.tensor([300.0, 700.0])
    heard = features(latents, text, t)
    assert features.blocks == [0, 1, 3] and features.paths == [[256], [64, 16], [256]]
    assert [x.shape[1] for x in heard] == [sum(sizes) for sizes in features.paths]
    velocity = teacher.transformer.proj_out(teacher.transformer.norm_out(heard[-1])).mT.unflatten(2, (16, 16))
    torch.testing.assert_close(velocity, teacher.transformer(latents, text, t).sample)
    assert not any(block._forward_hooks for group in teacher.transformer.groups for block in group)


@pytest.mark.parametrize("batch", [1, 3, 8, 11, 16])
def test_local_batch_norm_takes_any_batch(batch):
    """Groups of at most eight are each brought to mean 0 and spread 1: torch's own norm, group by group."""
    norm = discriminator.LocalBatchNorm(4)
    tokens = 3 + 2 * torch.randn(batch, 4, 9, generator=torch.Generator().manual_seed(batch))
    found = norm(tokens).tensor_split(math.ceil(batch / 8))
    assert max(map(len, found)) <= 8
    for group, given in zip(found, tokens.tensor_split(math.ceil(batch / 8)), strict=True):
        expected = torch.nn.functional.batch_norm(given, None, None, training=True)
        torch.testing.assert_close(group, expected, rtol=1e-4, atol=1e-5)


def test_the_ring_does_not_mix_the_two_compressed_pictures(teacher):
    features = discriminator.FrozenFeatures(teacher.transformer, (0.3,))
    heads = discriminator.Heads(features, 8).eval()
    tokens = torch.randn(2, 80, 32)
    changed = torch.cat([tokens[:, :64], torch.randn(2, 16, 32)], dim=1)
    (before,), (after,) = heads([tokens]), heads([changed])
    assert torch.equal(before[:, :64], after[:, :64]) and not torch.allclose(before[:, 64:], after[:, 64:])
    head = heads.heads[0]
    rolled = head(tokens[:, :64].roll(5, dims=1))  # within a picture the ring is closed
    torch.testing.assert_close(rolled, head(tokens[:, :64]).roll(5, dims=1), rtol=1e-4, atol=1e-5)


def test_logistic_loss_is_a_cross_entropy_and_every_depth_counts_the_same():
    logits = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.1, 3.0]])]
    for real in (True, False):
        cross = [
            torch.nn.functional.binary_cross_entropy_with_logits(x, torch.full_like(x, float(real))) for x in logits
        ]
        torch.testing.assert_close(discriminator.logistic_loss(logits, real), torch.stack(cross).mean()[None])
    assert discriminator.verdict(logits).item() == pytest.approx((-0.5 + 1.2) / 2)


# -- the stage


def stage_of(config, rows=4):
    return Distill(config, Placement(torch.device("cpu"), torch.float32, (range(rows),)))


def test_a_student_that_knows_the_road_has_no_loss(config):
    """Closed forms: with the true velocities all losses but the adversary's are zero, up to float16."""
    stage = stage_of(replace(config, own_rollouts=0.0))
    batch = stage.batch(0, 0)
    assert set(batch.level.tolist()) <= {0, 1, 2, 3}
    states, which = batch.states, torch.arange(4)
    step = stage._levels[batch.level] - stage._levels[batch.level + 1]
    road = (states[which, batch.level] - states[which, batch.level + 1]) / flow.expand_like(step, states[:, 0])
    stage._velocity = lambda model, x, text, t: road
    assert stage.segment_loss(batch)["loss"].max() < 1e-10
    stage._velocity = lambda model, x, text, t: states[:, 0] - states[:, -1]
    losses = stage._student_loss(batch)
    assert losses["regression"].max() < 1e-10
    torch.testing.assert_close(losses["loss"], config.adversarial_weight * losses["adversarial"])


def test_segments_cost_what_their_velocity_misses(config):
    stage = stage_of(config)
    batch = replace(stage.batch(0, 0), level=torch.tensor([0, 1, 2, 3]))
    which, level = torch.arange(4), batch.level
    missed = torch.randn_like(batch.states[:, 0])
    step = flow.expand_like(stage._levels[level] - stage._levels[level + 1], missed)
    road = (batch.states[which, level] - batch.states[which, level + 1]) / step
    stage._velocity = lambda model, x, text, t: road + missed
    found = stage.segment_loss(batch)["loss"]
    torch.testing.assert_close(found, missed.square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_roll_outs_are_the_sampler(config, teacher):
    """The student's walk to the end is what the pipeline draws from the same noise; its later inputs lie on it."""
    stage = stage_of(config)
    batch = replace(stage.batch(0, 0), level=torch.tensor([3, 0, 2, 1]), own=torch.tensor([True, True, True, False]))
    ends = stage.walk(stage.student, batch.states[:, 0], batch.text, torch.full((4,), 4))
    passed = {}
    pipeline_latents = stage.pipeline()(
        prompt_embeds=batch.text,
        latents=batch.states[:, 0],
        output_type="latent",
        callback_on_step_end=lambda p, k, t, values: passed.update({k: values["latents"]}) or {},
    ).images
    torch.testing.assert_close(ends, pipeline_latents, rtol=1e-4, atol=1e-4)
    asked = []
    stage._velocity = lambda model, x, text, t: (asked.append((x, t)), model(x, text, 1000 * t).sample)[1]
    stage._guess(batch)
    x_t, t = asked[-1]
    torch.testing.assert_close(t, torch.tensor([0.5, 1.0, 0.75, 0.9]))
    torch.testing.assert_close(x_t[0], passed[2][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_t[2], passed[1][2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_t[1], batch.states[1, 0])
    torch.testing.assert_close(x_t[3], torch.lerp(batch.states[3, -1], batch.states[3, 0], 0.9))


def test_gradients_reach_only_their_own_side(config, tmp_path):
    engine = Engine(config, Distill, tmp_path, device="cpu")
    stage, kept = engine.stage, engine.stage.heads.kept()
    teacher = {name: value.clone() for name, value in stage.teacher.state_dict().items()}
    for step, (learning, resting) in enumerate(
        [("student", "heads")] * 4 + [("heads", "student"), ("student", "heads")]
    ):
        before = {name: p.detach().clone() for name, p in engine.learners[resting].masters.items()}
        own = {name: p.detach().clone() for name, p in engine.learners[learning].masters.items()}
        memory = {name: value.clone() for name, value in kept.items()}
        row = engine.step()
        assert all(torch.equal(before[name], p) for name, p in engine.learners[resting].masters.items())
        assert all(p.grad is None for p in engine.learners[resting].masters.values())
        assert not all(torch.equal(own[name], p) for name, p in engine.learners[learning].masters.items())
        moved = not all(torch.equal(memory[name], value) for name, value in stage.heads.kept().items())
        assert moved == (learning == "heads"), step
        assert not any(name.startswith(resting) for name in row)
    assert {"student_adversarial", "student_regression"} <= row.keys()
    assert all(torch.equal(value, teacher[name]) for name, value in stage.teacher.state_dict().items())
    assert all(p.grad is None for p in stage.teacher.parameters())


@pytest.mark.parametrize("changes, turns", [({}, [4, 6]), ({"misaligned": 0.0}, []), ({"adversarial_weight": 0.0}, [])])
def test_other_captions_are_read_in_the_heads_turn_alone(config, changes, turns):
    """They were read and encoded in every step, also of a student without heads."""
    stage, read = stage_of(replace(config, steps=8, regression_share=0.5, **changes)), []
    honest = stage.text
    stage.text = lambda captions: read.append(captions) or honest(captions)
    for step in range(8):
        read.clear()
        batch = stage.place(stage.read(step))
        assert len(read) == 1 + (step in turns)
        assert torch.equal(batch.wrong, batch.text) == (step not in turns)
        assert batch.differs.tolist() == [a != b for a, b in zip(read[0], read[-1], strict=True)]


def test_misaligned_pairs_count_as_fake_where_the_caption_differs(config):
    stage = stage_of(replace(config, misaligned=1.0))
    batch = stage.batch(4, 0)
    assert batch.differs.any()
    batch = replace(batch, differs=torch.tensor([True, False, True, True]))
    asked = []
    stage.heads.eval()
    honest = stage.judge

    def judge(latents, text, one):
        asked.append((latents, text))
        return honest(latents, text, one)

    stage.judge = judge
    guess = stage._guess(batch).detach()
    loss = stage.heads_loss(guess, batch, 0, discriminator.logistic_loss, discriminator.verdict)["loss"]
    (real, text), (fake, _), (again, wrong) = asked
    assert again is real and wrong is batch.wrong and text is batch.text
    as_real = discriminator.logistic_loss(honest(real, batch.text, batch), True)
    as_wrong = discriminator.logistic_loss(honest(real, batch.wrong, batch), False)
    as_fake = discriminator.logistic_loss(honest(fake, batch.text, batch), False)
    torch.testing.assert_close(loss, as_real + torch.where(batch.differs, as_wrong, as_fake))


@pytest.mark.parametrize("without", ["adversarial_weight", "regression_weight"])
def test_each_loss_alone(config, tmp_path, without):
    run = replace(config, steps=6, regression_share=1 / 3, validate_every=100, sample_every=100, **{without: 0.0})
    engine = Engine(run, Distill, tmp_path, device="cpu")
    rows = [engine.step() for _ in range(4)]
    assert ("heads" in engine.learners) == (without == "regression_weight")
    assert all(math.isfinite(value) for row in rows for value in row.values())


def weights_of(run):
    return load_file(run / "final" / "diffusion_pytorch_model.safetensors")


def test_killed_and_resumed_it_has_the_same_bits_and_its_folder_draws_in_four_steps(config, tmp_path):
    run = replace(config, validate_every=100, sample_every=8)
    final = distill(run, tmp_path / "whole", device="cpu")
    killed = Engine(run, Distill, tmp_path / "parts", device="cpu")
    for step in range(7):  # the checkpoint is within phase 2, two steps are lost
        killed.step()
        if step == 5:
            killed.save()
    resumed = Engine(run, Distill, tmp_path / "parts", resume=True, device="cpu")
    assert resumed.global_step == 6 and resumed.stage.balance.turns == 1
    resumed.fit()
    one, two = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    rows = list(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))
    assert {"distance", "teacher_distance"} <= rows[-1].keys()
    assert (tmp_path / "whole" / "samples" / "step-00000008.png").is_file()
    pipeline = load_pipeline(final, "cpu")
    assert pipeline.sampler() == pipeline.sampler(4, 0.0, SHIFT)
    asked = []
    pipeline.transformer.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    pipeline("a red circle", generator=torch.Generator().manual_seed(0))
    assert asked == [1] * 4  # four forward passes, none without the caption
    about = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert about["drawn"]["levels"] == [1.0, 0.9, 0.75, 0.5] and about["drawn"]["folders"][0]["pictures"] == ROWS


def test_a_students_folder_beside_the_shipped_encoders_and_shipped_itself(shipped, tmp_path, monkeypatch):
    """Encoders "lite": the rest of the pipeline is the shipped one, the sampler the student's."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    runner, words = CliRunner(), ["sample", "a red circle", "--model", "lite-4step", "--device", "cpu", "--json"]
    early = runner.invoke(app, words)
    assert early.exit_code == 2 and "nitro-e train distill" in early.output and "\n" not in early.output.strip()
    load_pipeline("lite", "cpu").transformer.save_pretrained(tmp_path / "final")
    settings = {"guidance": 0.0, "shift": 3.0, "sampler_steps": 4, "sigma_grid": "linear", "data": {"encoders": "lite"}}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
    for name in (tmp_path, tmp_path / "final"):
        pipeline = load_pipeline(name, "cpu")
        assert pipeline.sampler() == pipeline.sampler(4, 0.0, 3.0) and pipeline.config.sigma_grid == "linear"
    with pytest.raises(ValueError, match="is no run of distill or sprint with encoders lite"):
        ship_student(tmp_path, "lite-4step")
    data = {"encoders": "lite", "folders": ["/a/machine/drawn", "/b/more"]}
    about = {"config": settings | {"stage": "distill", "data": data}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "metrics.jsonl").write_text("")
    folder = ship_student(tmp_path, "lite-4step")
    assert json.loads((folder / "config.json").read_text())["config"]["data"]["folders"] == ["data/drawn", "data/more"]
    for file in ("config.json", "final/config.json"):  # no paths of a machine
        assert "machine" not in (text := (folder / file).read_text()) and str(tmp_path) not in text
    found = runner.invoke(app, words)
    assert found.exit_code == 0, found.output
    drawn_ = json.loads(found.stdout)
    assert (drawn_["steps"], drawn_["guidance"]) == (4, 0.0)
    assert demo_protocol.default_lanes()[1] == demo_protocol.Lane("lite-4step", 4, 0.0)
    chain = {"encoders": str(shipped), "folders": ["/a/machine/drawn"]}  # as `reproduce` names them
    taught = tmp_path / "rewards"
    taught.mkdir()
    (taught / "config.json").write_text(json.dumps({"config": {"stage": "rewards"}}))
    own = about["config"] | {"data": chain, "teacher": str(taught), "start_from": ""}
    monkeypatch.setattr(
        "nitro_e_lite.experiments.ship.load_encoders", lambda name: SimpleNamespace(fingerprint="lite's")
    )
    (tmp_path / "config.json").write_text(json.dumps({"config": own, "encoders": "another's"}))
    with pytest.raises(ValueError, match="is no run of distill or sprint with encoders lite"):
        ship_student(tmp_path, "lite-4step")
    (tmp_path / "config.json").write_text(json.dumps({"config": own, "encoders": "lite's"}))
    said = json.loads((ship_student(tmp_path, "lite-4step") / "config.json").read_text())["config"]
    assert said["teacher"] == "lite-grpo" and said["start_from"] == "" and said["data"]["encoders"] == "lite"
    weights = load_file(folder / "final" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}


def test_jumps_aim_at_the_picture_from_every_state_and_the_sampler_puts_fresh_noise_back(config, tmp_path):
    """In phase 1 and 2 a student that answers what leads to the end has no loss; its folder draws as it does."""
    stage = stage_of(replace(config, jumps=True, adversarial_weight=0.0))
    batch = stage.batch(0, 0)
    expected = stage.segment_loss(batch)["loss"]
    ends = batch.states[:, -1]
    for row, level in enumerate(batch.level):  # by hand
        t, here = stage.levels[level], batch.states[row, level]
        with torch.no_grad():
            v = stage.student(here[None], batch.text[row : row + 1], torch.tensor([1000 * t])).sample[0]
        mine = (here - t * v - ends[row]).square().mean() / t**2
        torch.testing.assert_close(expected[row], mine, rtol=1e-3, atol=1e-4)
    t = flow.expand_like(stage._levels[batch.level], ends)
    here = torch.stack([batch.states[row, level] for row, level in enumerate(batch.level)])
    stage._velocity = lambda *given: (here - ends) / t
    assert stage.segment_loss(batch)["loss"].max() < 1e-9 and stage._student_loss(batch)["regression"].max() < 1e-9
    del stage._velocity
    pipeline, words = stage.pipeline(), batch.text[:2]
    seeds = lambda: [torch.Generator().manual_seed(k) for k in (3, 4)]  # noqa: E731
    found = pipeline(prompt_embeds=words, generator=seeds(), output_type="latent").images
    made = seeds()
    x = torch.stack([torch.randn(found.shape[1:], generator=one) for one in made])
    for here, there in zip(stage.levels, stage.levels[1:], strict=False):
        with torch.no_grad():
            x0 = x - here * stage.student(x, words, torch.full((2,), 1000 * here)).sample
        x = (1 - there) * x0 + there * torch.stack([torch.randn(found.shape[1:], generator=one) for one in made])
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    stage.export({"student": stage.student.state_dict()}, tmp_path / "final")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"jumps": True, "data": {"encoders": config.teacher}}}))
    assert load_pipeline(tmp_path, "cpu").scheduler.config.stochastic_sampling
    assert not stage.reference().scheduler.config.stochastic_sampling  # the teacher walks as always


def test_a_student_learns_one_caption(teacher, teacher_folder, tmp_path):
    """Toy: one caption, a few noises. The segments' loss falls, and four steps end nearer to the teacher's pictures."""
    drawn.Drawing(teacher, ["a red circle"] * 6, tmp_path / "set", steps=TEACHER_STEPS, guidance=3.0, batch=6).run()
    data = DrawnConfig(folders=(str(tmp_path / "set"),), encoders=str(teacher_folder), validation_rows=2)
    fast = OptimizerConfig(name="adamw", lr=2e-3, warmup_steps=0, decay_steps=0)
    config = replace(
        preset("distill", "smoke"),
        teacher=str(teacher_folder),
        data=data,
        optimizer=fast,
        steps=30,
        regression_share=1.0,
    )
    config = replace(config, ema_decay=0.0)
    engine = Engine(config, Distill, tmp_path / "run", device="cpu")
    before = engine.validate()
    assert before["distance"] == before["teacher_distance"]  # it starts as the teacher
    losses = [engine.step()["student_loss"] for _ in range(30)]
    after = engine.validate()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert after["distance"] < 0.8 * after["teacher_distance"]  # on noises it never trained on


# -- the gates


@pytest.mark.parametrize("right, words", [(0.99, "too strong.*lower heads.lr"), (0.5, "too weak.*raise heads.lr")])
def test_an_unbalanced_discriminator_stops_the_run(config, right, words):
    stage = stage_of(replace(config, gate_window=3))
    for _ in range(3):
        stage.balance.check(0)
        stage.balance.note(right, 0, 1)
    said = f"gate discriminator-balance, step 0: right on {right:.3f}.*{words}"
    with pytest.raises(GateFailed, match=said) as failed:
        stage.losses(0, 0)
    assert failed.value.everywhere  # the share is that of all processes
    stage.balance.right.fill_(0.8)
    stage.balance.check(0)


def test_a_student_below_its_teacher_stops_the_run(config, tmp_path):
    """From a quarter of the run on, and not before."""
    spoiled = replace(config, optimizer=replace(config.optimizer, lr=1.0), gate_distance=1.0, validate_every=1)
    with pytest.raises(GateFailed, match="gate student-below-teacher, step 2: .* worse .* both after 4 steps. Look at"):
        Engine(spoiled, Distill, tmp_path, device="cpu").fit()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if "distance" in row] == [1, 2]


AS_GOOD = {"distance": 0.5, "teacher_distance": 0.5, "geneval": 0.7, "teacher_geneval": 0.7}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"distance": 0.6, "geneval": 0.78}, None),  # far from the teacher's pictures and better ones
        ({"distance": 0.1, "geneval": 0.64}, "GenEval-lite 0.640, below its 0.700 .*0.1000, its own 0.5000"),
        ({"geneval": 0.66}, None),  # within the margin
        ({"geneval": math.nan}, "GenEval-lite nan"),
        ({"distance": 0.6, "geneval": 0.0, "teacher_geneval": 0.05}, "pictures 0.6000, its own 0.5000"),
        ({"distance": math.nan, "teacher_geneval": 0.0}, "pictures nan"),
    ],
)
def test_the_score_decides_where_it_can(config, changes, says):
    """A score that no student could be below, the margin being what it is, leaves it to the distance."""
    found = AS_GOOD | changes
    gates.check_student(found, config.steps // 4 - 1, 4, replace(config, gate_distance=1.0))
    if says is None:
        gates.check_student(found, config.steps, 4, replace(config, gate_distance=1.0))
        return
    with pytest.raises(GateFailed, match=f"student-below-teacher, step {config.steps}: .*{says}"):
        gates.check_student(found, config.steps, 4, replace(config, gate_distance=1.0))


@pytest.mark.parametrize("stage, changes", [("sprint", {}), ("distill", {"jumps": True, "adversarial_weight": 0.0})])
def test_the_distance_of_jumps_is_that_of_one(stage, changes):
    """And the losses to look at are those that the log has."""
    config = replace(preset(stage, "smoke"), gate_distance=1.0, **changes)
    with pytest.raises(GateFailed, match="pictures 0.6000, its own 0.5000, both after one jump") as failed:
        gates.check_student({"distance": 0.6, "teacher_distance": 0.5}, config.steps, 2, config)
    assert ("student_loss (still falling" in str(failed.value)) == bool(config.adversarial_weight)
    assert ("student_adversarial (rising" in str(failed.value)) == bool(config.adversarial_weight)


def test_a_student_goes_on_as_what_it_was(config, tmp_path):
    """What would make another run of it is named; a reference that was measured otherwise is measured again."""
    run = replace(config, steps=8, regression_share=0.5, gate_prompts=0, gate_pictures=0, validate_every=100)
    started = stage_of(run)
    started.step, started._reference = 5, {"teacher_distance": 1.0}
    state = started.state()
    for changes, said in (
        ({"steps": 12}, "steps=12: a phase would begin with step 6 in place of 4, and the run is at step 5"),
        ({"regression_share": 1.0}, "a phase would begin with step 8 in place of 4"),
        ({"head_width": 4}, "adversarial_weight, head_width, depths: the run was started with other heads"),
    ):
        with pytest.raises(ValueError, match=said):
            stage_of(replace(run, **changes)).load_state(state)
    early = dict(state, step=3)  # both phases are still to come
    stage_of(replace(run, steps=12)).load_state(early)
    without = stage_of(replace(run, adversarial_weight=0.0)).state()
    with pytest.raises(ValueError, match="adversarial_weight, head_width, depths"):
        stage_of(run).load_state(without)
    for changes, kept in (({}, True), ({"gate_prompts": 1}, False)):
        again = stage_of(replace(run, **changes))
        again.load_state(state)
        assert bool(again._reference) == kept


def test_a_log_is_held_against_the_gates_afterwards(config):
    """A row is the mean over several turns of the discriminator; the first gate that would have ended it is named."""
    bounds = replace(config, steps=100, log_every=10, gate_window=20)  # five turns a row
    rows = [{"step": 10 * k, "heads_right": 0.8 if k < 5 else 1.0} for k in range(1, 9)]
    assert gates.replay(rows[:7], bounds) is None
    found = gates.replay([*rows, {"step": 80, **AS_GOOD, "geneval": 0.0}], bounds)
    assert "discriminator-balance, step 80: right on 1.000" in str(found) and "last 20 steps" in str(found)
    found = gates.replay([*rows[:7], {"step": 70, **AS_GOOD, "geneval": 0.0}, rows[7]], bounds)
    assert "student-below-teacher, step 70" in str(found)


# -- what does not belong together


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sampler_steps": 2}, r"sampler_steps=2: .*visit \[1.0, 0.75\].*holds states at"),
        ({"shift": 1.0}, "sampler_steps=4: with this shift"),
        ({"batch_size": 13}, "batch_size=13: only 12 of 14"),
    ],
)
def test_what_does_not_belong_together_is_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        stage_of(replace(config, **changes))


def test_another_teacher_is_refused(config, teacher, teacher_folder, tmp_path):
    other = build_tiny_pipeline().transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="drawn by other weights"):
        stage_of(replace(config, teacher=str(tmp_path / "other")))
    started = stage_of(replace(config, start_from=str(tmp_path / "other")))  # a student may start from anything
    assert torch.equal(started.student.proj_out.weight, other.proj_out.weight)


def test_commands_draw_and_distil(config, teacher_folder, tmp_path):
    from typer.testing import CliRunner

    runner = CliRunner()
    words = ["data", "draw", str(tmp_path / "set"), "--model", str(teacher_folder), "--count", "6", "--steps", "4"]
    found = runner.invoke(app, [*words, "--batch", "6", "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    (tmp_path / "prompts.txt").write_text("a star\na heart\ntwo circles\n")
    for count, rows in (("2", 2), ("9", None)):
        words = ["data", "draw", str(tmp_path / count), "--model", str(teacher_folder), "--count", count]
        words += ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "4", "--device", "cpu"]
        found = runner.invoke(app, [*words, "--json"])
        if rows:
            assert json.loads(found.stdout)["rows"] == rows
        else:
            assert found.exit_code == 2 and "prompts.txt holds 3 prompts" in found.stderr
    settings = [f"data.folders=[{tmp_path / 'set'}]", f"data.encoders={teacher_folder}", f"teacher={teacher_folder}"]
    settings += ["steps=2", "validate_every=100", "sample_every=100"]
    words = ["train", "distill", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    found = runner.invoke(app, [*words, *(word for one in settings for word in ("--set", one))])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    wrong = runner.invoke(app, ["train", "distill", "--preset", "huge"])
    assert wrong.exit_code == 2


def test_plan_by_hand():
    """Counts of forward passes, from the essay of the module."""
    from typer.testing import CliRunner

    from nitro_e_lite.experiments.plan import forward_flops, frozen_encoders
    from nitro_e_lite.experiments.plan_distill import plan_distill

    chosen, base = preset("distill", "smoke"), preset("base", "smoke")
    found = plan_distill(chosen, base, "h100", devices=2, mfu=0.5, pictures=100)
    one, caption = forward_flops(base), frozen_encoders(base)["text"].flops
    assert found.picture_flops == pytest.approx(40 * one + caption)
    assert found.sample_flops["phase 1"] == pytest.approx(3 * one)
    assert found.sample_flops["phase 2"] == pytest.approx((3 + 0.75 + 2 + 1 + 0.75 + 3) / 2 * one)
    speed = 2 * 0.5 * found.peak
    assert found.hours["draw"] == pytest.approx(100 * found.picture_flops / speed / 3600)
    assert found.hours["phase 1"] == pytest.approx(4 * 4 * (3 * one + caption) / speed / 3600)
    later = found.sample_flops["phase 2"] + 1.5 * caption  # another's caption in the heads' turns
    assert found.hours["phase 2"] == pytest.approx(4 * 4 * later / speed / 3600)
    assert found.disk == {"latents": 100 * 2 * 8 * 256, "states": 3 * 100 * 2 * 8 * 256}
    for wrong in ({"hardware": "abacus"}, {"devices": 0}, {"pictures": 0}, {"mfu": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            plan_distill(chosen, base, **wrong)
    lite = plan_distill(preset("distill", "lite"), preset("base", "lite"), "h100")
    one, caption = forward_flops(preset("base", "lite")), frozen_encoders(preset("base", "lite"))["text"].flops
    assert lite.picture_flops == pytest.approx(8 * one + caption) and lite.pictures == 6000  # as it is drawn
    assert lite.sample_flops["phase 2"] == pytest.approx(3 * one)  # jumps have no roll-outs
    words = ["plan", "--stage", "distill", "--preset", "smoke", "--hardware", "h100", "--mfu", "0.5", "--json"]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0 and json.loads(printed.stdout)["pictures"] == 100


def test_on_the_official_grid_in_bf16_and_the_official_layout(teacher_folder, config, tmp_path):
    """Full scale in small: states between the teacher's nodes, stored text, half precision, a published file."""
    pipeline = load_pipeline(teacher_folder, "cpu")
    pipeline.register_to_config(sigma_grid="scheduler")
    drawn.Drawing(pipeline, drawn.GrammarPrompts(0, 6), tmp_path / "set", steps=6, text=True, batch=6).run()
    data = replace(config.data, folders=(str(tmp_path / "set"),))
    config = replace(
        config, data=data, shift=1.0, sigma_grid="scheduler", precision="bf16", steps=4, validate_every=100
    )
    final = distill(replace(config, sample_every=100, accumulate=2), tmp_path / "run", device="cpu")
    student = load_pipeline(final, "cpu")
    assert student.sampler() == student.sampler(4, 0.0, 1.0) and student.config.sigma_grid == "scheduler"
    rows = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (final / "nitro-e-512px-dist.safetensors").is_file()
