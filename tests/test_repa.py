"""REPA: the loss, the vision model, features stored and on-line, and the training of the lite vision model."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from nitro_e_lite.config import override
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch
from nitro_e_lite.data.sources import to_jpeg
from nitro_e_lite.experiments.ship import ship
from nitro_e_lite.files import check_manifest, write_manifest
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.inference.vision import MEAN, STD, load_vision, prepare_pixels
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.presets import preset
from nitro_e_lite.scenes.grammar import SHAPES, sample_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.stages.autoencoder import scene_images
from nitro_e_lite.stages.pretrain import Pretrain, pretrain, repa_loss
from nitro_e_lite.stages.vision import (
    HELD_OUT_SEED,
    Vision,
    VisionConfig,
    baselines,
    cut_patches,
    find_kinds,
    patch_outlines,
    patches_of_objects,
    train_vision,
)
from nitro_e_lite.training.engine import Engine

REPA = ["repa.weight=0.5", "repa.hidden=32", "steps=4", "sample_every=9", "validate_every=9", "checkpoint_every=2"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NITRO_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A vision model with random weights, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 128}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    return folder


# -- loss and features


def test_the_loss_is_minus_one_for_the_same_direction():
    features = torch.randn(3, 256, 24)
    for scale, expected in ((1.0, -1.0), (7.0, -1.0), (-2.0, 1.0)):
        assert torch.allclose(repa_loss(scale * features, features), torch.full((3,), expected), atol=1e-5)
    half = torch.cat([features[:, :128], -features[:, 128:]], 1)
    assert torch.allclose(repa_loss(half, features), torch.zeros(3), atol=1e-5)
    with pytest.raises(ValueError, match="as many patches"):
        repa_loss(features[:, :80], features)


def test_alignment_teaches_only_what_lies_before_the_tap():
    """Embeddings, group 1 and the projector; of group 1's last block not even the way its text goes on."""
    size = dict(in_channels=4, num_attention_heads=2, attention_head_dim=16, caption_channels=8, block_groups=(2, 1, 1))
    model = EMMDiTTransformer2DModel(**size, repa_channels=24, repa_hidden=16)
    output = model(torch.randn(2, 4, 16, 16), torch.randn(2, 16, 8), 500.0)
    repa_loss(output.features, torch.randn(2, 256, 24)).mean().backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    places = {name.split(".")[0] if not name.startswith("groups") else name[:10] for name in taught}
    assert places == {"patch_embed", "text_embed", "time_embed", "groups.0.0", "groups.0.1", "projector"}
    assert any(name.startswith("groups.0.0.text.mlp") for name in taught)
    assert not any(name.startswith("groups.0.1.text.mlp") for name in taught)


def test_pictures_are_cut_scaled_and_normalised_as_dinov2_expects():
    pixels = torch.rand(2, 3, 40, 60) * 2 - 1
    prepared = prepare_pixels(pixels, 40)
    middle = pixels[:, :, :, 10:50] / 2 + 0.5
    for channel in range(3):
        assert torch.allclose(prepared[:, channel], (middle[:, channel] - MEAN[channel]) / STD[channel], atol=1e-6)
    flat = prepare_pixels(torch.zeros(1, 3, 512, 700), 224)
    assert flat.shape == (1, 3, 224, 224) and torch.allclose(flat[0, 0], torch.tensor((0.5 - MEAN[0]) / STD[0]))


def test_features_are_those_of_the_library(vision):
    encoder = load_vision(vision)
    images = np.stack([render(sample_scene(0, index)) for index in range(2)])
    features = encoder.encode(images)
    assert features.shape == (2, 256, encoder.width) and encoder.size == 128
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    expected = Dinov2Model.from_pretrained(vision).eval()(pixels).last_hidden_state[:, 1:]
    assert torch.allclose(features, expected, atol=1e-4)
    assert len(encoder.fingerprint) == 64 and not any(p.requires_grad for p in encoder.model.parameters())
    with pytest.raises(EncoderUnavailable, match="nitro-e train vision"):
        load_vision("nowhere")


def test_a_vision_model_is_shipped_beside_what_is_there(vision, tmp_path):
    shutil.copytree(vision, tmp_path / "run" / "final")
    (tmp_path / "run" / "final" / "probe.json").write_text("{}")
    (tmp_path / "weights" / "vae").mkdir(parents=True)
    (tmp_path / "weights" / "vae" / "kept").write_bytes(b"as it was")
    (tmp_path / "weights" / "vision").mkdir()
    (tmp_path / "weights" / "vision" / "README.md").write_text("a card")
    assert {"vae/kept", "vision/README.md"} < check_manifest(ship(tmp_path / "run", str(tmp_path / "weights"))).keys()
    there, shipped = load_vision(vision).model.state_dict(), load_vision(tmp_path / "weights" / "vision").model
    assert all(torch.equal(value, there[name].half().float()) for name, value in shipped.state_dict().items())
    assert (tmp_path / "weights" / "vision" / "probe.json").is_file()


def test_a_vision_model_must_be_as_its_checksums_say(vision, tmp_path):
    shutil.copytree(vision, tmp_path / "vision")
    write_manifest(tmp_path)
    weights = tmp_path / "vision" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    for source in (tmp_path, tmp_path / "vision"):
        with pytest.raises(ValueError, match="vision/model.safetensors: contents differ from SHA256SUMS"):
            load_vision(source)
    (tmp_path / "SHA256SUMS").unlink()
    load_vision(tmp_path / "vision")
    weights.write_bytes(b"")
    with pytest.raises(EncoderUnavailable, match="vision: cannot be loaded .*header"):
        load_vision(tmp_path / "vision")


@pytest.mark.parametrize("part", ["transformer", "vision"])
@pytest.mark.parametrize("damaged", ["vae/config.json", "text_encoder/config.json", "{other}/config.json"])
def test_nothing_is_shipped_beside_damaged_files(part, damaged, vision, tiny_folder, tmp_path):
    """It would get a fresh list of checksums, and the damage with it."""
    source = {"transformer": tiny_folder / "transformer", "vision": vision}
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vae" / "latent_stats.json").write_text('{"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 1]}')
    shutil.copytree(vision, tmp_path / "vision")
    write_manifest(tmp_path)
    other = ({"transformer", "vision"} - {part}).pop()
    file = tmp_path / damaged.format(other=other)
    intact = file.read_bytes()
    file.write_bytes(intact + b" ")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="config.json: contents differ from SHA256SUMS"):
        ship(source[part], str(tmp_path), guidance=3.0, shift=1.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    file.write_bytes(intact)
    (tmp_path / part / "README.md").write_text("of what is replaced, the card may be new")
    check_manifest(ship(source[part], str(tmp_path), guidance=3.0, shift=1.0))


# -- in training


def test_training_aligns_and_the_final_weights_have_no_projector(vision, tmp_path):
    config = override(
        preset("base", "smoke"), [*REPA, f"repa.vision={vision}", "steps=1000", "optimizer.decay_steps=0"]
    )
    trainer = Engine(config, Pretrain, tmp_path / "long", device="cpu")
    share = trainer.stage.batches.local(0)
    assert share.images.shape == (8, 128, 128, 3)
    trainer.stage.batches.local = lambda step: share
    rows = [trainer.step() for _ in range(40)]
    assert rows[-1]["repa_loss"] < rows[0]["repa_loss"] - 0.2 and rows[-1]["loss"] < rows[0]["loss"]
    assert "projector.0.weight" in trainer.learners["transformer"].masters
    final = EMMDiTTransformer2DModel.from_pretrained(trainer.export())
    assert final.projector is None


def test_a_run_with_repa_resumes_and_fine_tuning_leaves_the_projector(vision, tmp_path):
    config = override(preset("base", "smoke"), [*REPA, f"repa.vision={vision}"])
    whole = pretrain(config, tmp_path / "whole", device="cpu")
    trainer = Engine(config, Pretrain, tmp_path / "resumed", device="cpu")
    for _ in range(2):
        trainer.step()
    trainer.save()
    resumed = pretrain(config, tmp_path / "resumed", resume=True, device="cpu")
    one, other = (EMMDiTTransformer2DModel.from_pretrained(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="keep the settings that decide them"):
        Engine(override(config, ["repa.weight=0"]), Pretrain, tmp_path / "whole", resume=True, device="cpu")
    stage = override(preset("finetune", "smoke"), [f"start_from={whole}", "data.quality=all"])
    assert Engine(stage, Pretrain, tmp_path / "finetune", device="cpu").stage.model.projector is None
    again = Engine(override(config, [f"start_from={whole}"]), Pretrain, tmp_path / "again", device="cpu")
    assert torch.equal(again.learners["transformer"].masters["proj_out.weight"], one["proj_out.weight"])


@pytest.fixture(scope="module")
def shards(vision, tmp_path_factory):
    """Scenes with stored text and vision features: what the full run reads."""
    encoders, teacher = load_encoders("lite"), load_vision(vision)
    images = np.stack([render(sample_scene(0, index)) for index in range(16)])
    captions = [[f"scene number {index}"] for index in range(16)]
    batch = LatentBatch(
        encoders.encode_images(images),
        captions,
        encoders.encode_text([ways[0] for ways in captions]).half(),
        teacher.encode(images).half(),
    )
    folder = tmp_path_factory.mktemp("shards")
    write_latents(folder / "with", [batch], encoders.image_fingerprint)
    pictures = [to_jpeg(image, 128) for image in images]
    seen = LatentBatch(batch.latents, captions, batch.text, pictures=pictures)
    write_latents(folder / "pictures", [seen], encoders.image_fingerprint)
    write_latents(folder / "without", [LatentBatch(batch.latents, captions)], encoders.image_fingerprint)
    return folder


def test_stored_features_train_as_on_line_ones_do(shards, vision, tmp_path):
    """The same pictures and captions once with features from shards (float16), once with text computed on the way."""
    where = [f"data.folders=[{shards / 'with'}]", f"data.validation_folders=[{shards / 'with'}]"]
    stored = Engine(override(preset("base", "smoke"), [*REPA, *where]), Pretrain, tmp_path / "stored", device="cpu")
    assert stored.stage.vision is None
    row = stored.step()
    assert -1 <= row["repa_loss"] <= 1
    share = stored.stage.batches.local(0)
    assert share.text is not None and share.vision is not None and share.images is None
    dropped = [k for k, caption in enumerate(share.captions) if caption == ""]
    text, _ = stored.stage._text(share)
    for k, caption in enumerate(share.captions):
        assert torch.allclose(text[k], stored.stage.encoders.encode_text([caption])[0], atol=2e-2), caption
    second = Engine(override(preset("base", "smoke"), where), Pretrain, tmp_path / "second", device="cpu")
    unread = second.stage.batches.local(0)  # stage 2 reads no features that only REPA looks at
    assert unread.vision is None and torch.equal(unread.latents, share.latents) and torch.equal(unread.text, share.text)
    where = [line.replace("with", "without") for line in where]
    with pytest.raises(ValueError, match="holds no vision features"):
        Engine(override(preset("base", "smoke"), [*REPA, *where]), Pretrain, tmp_path / "none", device="cpu")
    with pytest.raises(ValueError, match="data.validation_folders"):
        Engine(override(preset("base", "smoke"), where[:1]), Pretrain, tmp_path / "none", device="cpu")
    plain = Engine(override(preset("base", "smoke"), [*where, "steps=4"]), Pretrain, tmp_path / "plain", device="cpu")
    assert plain.stage.batches.local(0).text is None and len(dropped) < 8
    assert plain.step()["loss"] == pytest.approx(row["loss"], rel=0.5)


def test_the_vision_model_looks_at_pictures_from_shards(shards, vision, tmp_path):
    """The way of the published code: nothing of it is stored but small pictures. It equals stored features."""
    rows, stages = {}, {}
    for kind in ("with", "pictures"):
        where = [f"data.folders=[{shards / kind}]", f"data.validation_folders=[{shards / kind}]"]
        config = override(preset("base", "smoke"), [*REPA, *where, f"repa.vision={vision}"])
        engine = Engine(config, Pretrain, tmp_path / kind, device="cpu")
        stages[kind], rows[kind] = engine.stage, [engine.step() for _ in range(2)]
    share = stages["pictures"].batches.local(1)
    assert stages["pictures"].vision is not None and share.images.shape == (8, 128, 128, 3) and share.vision is None
    assert stages["with"].vision is None and stages["with"].batches.local(1).images is None
    seen, stored = stages["pictures"].vision.encode(share.images), stages["with"].batches.local(1).vision
    alike = torch.nn.functional.cosine_similarity(seen, stored.float(), dim=-1)
    print(f"features of stored pictures and stored features: cosine {alike.mean():.5f}, smallest {alike.min():.5f}")
    assert alike.mean() > 0.99
    for one, other in zip(rows["with"], rows["pictures"], strict=True):
        assert one["flow_loss"] == pytest.approx(other["flow_loss"], rel=1e-3)
        assert one["repa_loss"] == pytest.approx(other["repa_loss"], abs=0.02)


def test_captions_that_are_too_long_are_counted_not_told_one_by_one(shards, tmp_path):
    """Each was a line in the log with its text, kept for ever."""
    where = [f"data.folders=[{shards / 'without'}]", f"data.validation_folders=[{shards / 'without'}]"]
    config = override(preset("base", "smoke"), [*where, "steps=4", "caption_dropout=0"])
    stage = Engine(config, Pretrain, tmp_path / "run", device="cpu").stage
    batch = stage.batches.local(0)
    long = dataclasses.replace(batch, captions=["a red star " * 40, *batch.captions[1:]])
    stage.batches.microbatch = lambda step, part, count: long
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = stage.losses(0, 0)["transformer"]
    assert losses["captions_cut"].tolist() == [1.0] + [0.0] * 7  # its mean is in the metrics, once an interval


# -- the lite vision model


TINY = VisionConfig(
    steps=24, batch_size=8, width=32, layers=1, heads=2, warmup_steps=4, kinds_scenes=32, probe_scenes=64, log_every=1
)


def test_vision_training_learns_and_repeats_after_a_stop(tmp_path):
    whole = train_vision(TINY, tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["pixel_loss"] < 0.8 * rows[0]["pixel_loss"]
    assert rows[0]["kind_loss"] == pytest.approx(np.log(TINY.kinds), rel=0.2)  # knows nothing yet
    stopped = Engine(TINY, Vision, tmp_path / "stopped", device="cpu")
    for _ in range(10):
        stopped.step()
    stopped.save()
    again = train_vision(TINY, tmp_path / "stopped", resume=True)
    one, other = (load_vision(path).model.state_dict() for path in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = json.loads((whole / "probe.json").read_text())
    assert set(found) == {"trained", "pixels", "untrained"} and found["trained"]["patches"] > 100
    assert load_vision(tmp_path / "whole").width == 32


def scene_with_apart_objects(count: int) -> int:
    """The first held-out scene of `count` objects: objects of scenes never touch."""
    return next(n for n in range(200) if len(sample_scene(HELD_OUT_SEED, n).objects) == count)


def test_segments_are_the_objects_of_a_scene():
    numbers = [scene_with_apart_objects(count) for count in (1, 3)]
    images = torch.cat([scene_images(HELD_OUT_SEED, range(n, n + 1), 128) for n in numbers])
    outlines, owner = patch_outlines(images, 8)
    assert outlines.shape == (4, 256) and owner.shape == (2, 256) and set(owner.unique().tolist()) == {-1, 0, 1, 2, 3}
    for row, number in enumerate(numbers):
        inside = {}
        for patch, item in patches_of_objects(number):
            inside.setdefault(item, set()).add(owner[row, patch].item())
        assert all(len(found) == 1 for found in inside.values())  # an object is one segment
        assert len(set.union(*inside.values())) == len(inside)  # and no two objects share one
    area = outlines.sum(1) / 256 * 2.2**2  # cells of an outline are in units of the square root of the segment's area
    torch.testing.assert_close(area, torch.ones(4), rtol=0.05, atol=0)


def test_kinds_of_outlines_are_shapes_that_nobody_named():
    kinds = find_kinds(VisionConfig(kinds_scenes=256))
    shapes = {kind: [] for kind in range(len(kinds))}
    for number in range(96):
        outlines, owner = patch_outlines(scene_images(HELD_OUT_SEED, range(number, number + 1), 128), 8)
        of_segment = {owner[0, patch].item(): item.shape for patch, item in patches_of_objects(number)}
        for segment, shape in of_segment.items():
            if segment >= 0:  # the centre of a patch may lie between the arms of a star
                shapes[torch.cdist(outlines[segment : segment + 1], kinds).argmin().item()].append(shape)
    assert {max(set(found), key=found.count) for found in shapes.values() if found} == set(SHAPES)
    assert sum(max(map(found.count, set(found))) for found in shapes.values() if found) >= 0.95 * sum(
        map(len, shapes.values())
    )
    with pytest.raises(ValueError, match="hold fewer outlines"):
        find_kinds(VisionConfig(kinds_scenes=2))
    with pytest.raises(ValueError, match="kinds=1: must be >= 2"):
        VisionConfig(kinds=1)


def test_the_probe_reads_colour_from_pixels():
    """A single patch of an object is all of one colour, and says little of the shape."""
    found = baselines(TINY)["pixels"]
    assert found["color"] > 0.45 and found["shape"] < 0.45  # chance: 0.1 and 0.17


def test_patches_are_cut_row_by_row():
    pixels = torch.arange(3 * 128 * 128.0).view(1, 3, 128, 128)
    assert torch.equal(cut_patches(pixels, 8)[0, 17].view(3, 8, 8), pixels[0, :, 8:16, 8:16])
    scene = sample_scene(20_000, 3)
    assert {item for _, item in patches_of_objects(3)} <= set(scene.objects)
