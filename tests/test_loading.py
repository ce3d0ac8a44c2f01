"""A training run is drawn from with what it was trained with: encoders, their statistics, guidance and shift."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import build_tiny_pipeline

from nitro_e_lite import files
from nitro_e_lite.inference import hub, loading
from nitro_e_lite.inference.encoders import LatentStats, load_encoders
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.inference.loading import load_pipeline
from nitro_e_lite.inference.low_memory import draw_one_by_one
from nitro_e_lite.model.official_weights import save_official

STATS = LatentStats((0.5, 0.0, -0.5, 0.1), (2.0, 1.0, 1.0, 3.0))


@pytest.fixture
def encoders(tiny_folder, tmp_path):
    """Encoders with four latent channels, which lite's eight do not fit."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_folder / part, tmp_path / "encoders" / part)
    (tmp_path / "encoders" / "vae" / "latent_stats.json").write_text(STATS.to_json())
    return tmp_path / "encoders"


@pytest.fixture
def run(encoders, tmp_path):
    """What a training run with these encoders leaves."""
    build_tiny_pipeline().transformer.save_pretrained(tmp_path / "run" / "final")
    config = {"data": {"encoders": str(encoders)}, "guidance": 2.5, "shift": 1.5}
    about = {"config": config, "encoders": load_encoders(encoders).fingerprint}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    return tmp_path / "run"


def test_a_run_is_drawn_with_its_own_encoders_guidance_and_shift(run):
    pipeline = load_pipeline(run, "cpu")
    assert pipeline.stats == STATS and pipeline.config.max_text_length == 32
    assert (pipeline.config.default_guidance, pipeline.shift) == (2.5, 1.5)
    assert pipeline("a red circle", 1, output_type="np").images.shape == (1, 64, 64, 3)


def test_other_encoders_than_the_runs_are_refused(run, encoders):
    (encoders / "vae" / "latent_stats.json").write_text(LatentStats((0.0,) * 4, (1.0,) * 4).to_json())
    with pytest.raises(ValueError, match="trained with other encoders than these.*--text-encoder PATH --vae PATH"):
        load_pipeline(run, "cpu")
    with pytest.warns(
        UserWarning, match="the pictures would be wrong"
    ):  # named by hand: as one likes, but not silently
        load_pipeline(run, "cpu", vae=encoders / "vae")


def test_encoders_that_moved_can_be_named(run, encoders, tmp_path):
    encoders.rename(tmp_path / "moved")
    with pytest.raises(EncoderUnavailable, match="was trained with the encoders .*encoders.*--vae PATH"):
        load_pipeline(run, "cpu")
    pipeline = load_pipeline(run, "cpu", text_encoder=tmp_path / "moved", vae=tmp_path / "moved" / "vae")
    assert pipeline.stats == STATS


def test_a_full_run_has_the_text_length_and_the_scaling_factor_of_the_full_model(run, encoders):
    about = json.loads((run / "config.json").read_text())
    about["config"]["data"]["encoders"] = "full"
    (run / "config.json").write_text(json.dumps({"config": about["config"]}))
    (encoders / "vae" / "latent_stats.json").unlink()
    pipeline = load_pipeline(run, "cpu", text_encoder=encoders, vae=encoders / "vae")
    assert pipeline.config.max_text_length == 128
    assert pipeline.stats.std == pytest.approx([1 / pipeline.vae.config.scaling_factor] * 4)


def test_the_statistics_of_another_autoencoder_come_with_it(tiny_folder, encoders):
    assert load_pipeline(tiny_folder, "cpu", vae=encoders / "vae").stats == STATS
    assert load_pipeline(tiny_folder, "cpu").stats != STATS


def test_a_lite_run_is_drawn_like_the_shipped_model(tmp_path):
    shipped = load_pipeline("lite", "cpu")
    shipped.transformer.save_pretrained(tmp_path / "run" / "final")
    about = {"config": {"data": {"encoders": "lite"}, "guidance": 2.0}, "encoders": load_encoders("lite").fingerprint}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    pipeline = load_pipeline(tmp_path / "run", "cpu")
    assert pipeline.stats == shipped.stats and pipeline.config.default_guidance == 2.0
    assert pipeline.shift == shipped.shift, "a run from before there was a shift"
    draw = [
        p("a red circle", 2, 2.0, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipeline, shipped)
    ]
    assert (draw[0] == draw[1]).all()


# Where the weights are: one answer


def test_weights_are_found_by_name_in_folders_and_in_the_final_folder_of_a_run(shipped, run, encoders):
    weights = "diffusion_pytorch_model*.safetensors"
    assert files.find_weights("lite") == files.find_weights(shipped) == shipped
    assert files.find_weights("lite", "model_index.json", f"transformer/{weights}") == shipped
    assert files.find_weights("lite", weights, f"transformer/{weights}") == shipped / "transformer"
    assert files.find_weights(run, weights) == files.find_weights(run / "final", weights) == run / "final"
    assert files.find_weights(str(encoders), "vae/latent_stats.json") == encoders / "vae"


def test_what_was_looked_for_is_named(shipped, tmp_path):
    wanted = r"'{}' is no folder or training run that holds vision/x\* or x\*, and no shipped weights \(lite\)"
    for source in ("heavy", tmp_path):
        with pytest.raises(FileNotFoundError, match=wanted.format(source)):
            files.find_weights(source, "vision/x*", "x*")
    with pytest.raises(FileNotFoundError, match="'lite' is no name of shipped weights that holds vision/x"):
        files.find_weights("lite", "vision/x*")
    with pytest.raises(FileNotFoundError, match="'heavy' is no folder or training run, and no"):
        files.find_weights("heavy")


def test_weights_in_a_part_are_compared_with_their_checksums(shipped):
    (shipped / "vae" / "config.json").write_text("{}")
    assert files.find_weights("lite") == shipped, "nothing is asked of the folder alone: shipping writes into it"
    assert files.find_weights("lite", "text_encoder/config.json") == shipped / "text_encoder"
    for source, part in (("lite", "model_index.json"), ("lite", "vae/config.json"), (shipped / "vae", "config.json")):
        with pytest.raises(ValueError, match="vae/config.json: contents differ"):
            files.find_weights(source, part)


def test_a_missing_file_of_weights_is_not_taken_for_weights_that_are_not_there(shipped):
    """Not for a hub id, then: the folder is there and not whole."""
    (shipped / "text_encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="text_encoder/config.json: listed in SHA256SUMS but missing"):
        files.find_weights("lite", "text_encoder/model*.safetensors")
    with pytest.raises(
        ValueError, match="text_encoder/config.json: listed in SHA256SUMS but missing; get the folder again$"
    ):
        load_pipeline("lite", "cpu")


def test_encoders_are_found_in_the_folder_one_stands_in_and_in_a_run(encoders, tmp_path, monkeypatch):
    """ "." was once the folder of all shipped weights."""
    shutil.copytree(encoders, tmp_path / "finished" / "final")
    monkeypatch.chdir(encoders)
    found = [load_encoders(source).fingerprint for source in (encoders, ".", "../finished", tmp_path / "finished")]
    assert len(set(found)) == 1


@pytest.mark.parametrize("part", ["text_encoder/model", "transformer/diffusion_pytorch_model"])
def test_a_damaged_part_of_a_pipeline_is_one_readable_error(tiny_folder, tmp_path, part):
    file = shutil.copytree(tiny_folder, tmp_path / "cut") / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises((ValueError, OSError), match="damaged|Unable to load weights"):
        load_pipeline(tmp_path / "cut", "cpu")


def test_a_wrong_official_file_is_found_out_before_encoders_are_fetched(tmp_path):
    (tmp_path / "Nitro-E-512px.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="Nitro-E-512px.safetensors is damaged"):
        load_pipeline(tmp_path / "Nitro-E-512px.safetensors", "cpu")


# The published repository, and little memory

TINY_OFFICIAL = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "caption_channels": 32, "caption_projection_dim": 32,
}  # fmt: skip


@pytest.fixture
def published(tiny_pipeline, tmp_path, monkeypatch):
    """What the hub's client has downloaded of the published repository, with a tiny model in its file."""
    folder = tmp_path / "models--amd--Nitro-E" / "snapshots" / hub.HUB_REVISIONS["amd/Nitro-E"]
    folder.mkdir(parents=True)
    small = type(tiny_pipeline.transformer).from_config(tiny_pipeline.transformer.config, block_groups=(4, 16, 4))
    for name in ("512px", "1024px"):
        save_official(small, folder / f"Nitro-E-{name}.safetensors")
        monkeypatch.setitem(hub.OFFICIAL_SUMS, name, files.sha256_file(folder / f"Nitro-E-{name}.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return folder


def test_the_published_repository_is_a_model_at_its_pinned_commit(published, tiny_folder):
    parts = {"text_encoder": tiny_folder, "vae": tiny_folder / "vae"}
    pipeline = load_pipeline("amd/Nitro-E", "cpu", **parts, **TINY_OFFICIAL)
    assert pipeline.config.sigma_grid == "scheduler" and pipeline.config.default_steps == 20
    assert load_pipeline("amd/Nitro-E", "cpu", variant="1024px", **parts, **TINY_OFFICIAL)
    with pytest.raises(ValueError, match="variant=1024px-dist: amd/Nitro-E has 512px, 512px-dist, 1024px at"):
        load_pipeline("amd/Nitro-E", "cpu", variant="1024px-dist")
    with pytest.raises(EncoderUnavailable, match=r"amd/Nitro-E: cannot be downloaded .*--model FILE"):
        load_pipeline("amd/Nitro-E", "cpu", variant="512px-dist")
    with open(published / "Nitro-E-512px.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="contents differ from what amd/Nitro-E published"):
        load_pipeline("amd/Nitro-E", "cpu")


def test_the_name_of_an_official_file_says_which_network_a_teacher_is(published, monkeypatch):
    read = []
    monkeypatch.setattr(loading, "load_official", lambda path, **network: read.append((path.name, network)))
    for name, network in (("512px", {}), ("1024px", loading.VARIANTS["1024px"]["network"])):
        loading.load_transformer(published / f"Nitro-E-{name}.safetensors")
        assert read.pop() == (f"Nitro-E-{name}.safetensors", network)


def test_a_configuration_beside_an_official_file_decides_its_variant(published, recwarn):
    file = published / "Nitro-E-512px.safetensors"
    for size, variant in ((32, "1024px"), (16, "512px")):
        (published / "config.json").write_text(f'{{"_class_name": "EMMDiTTransformer2DModel", "sample_size": {size}}}')
        with pytest.raises(ValueError):  # the shapes are not the published ones
            load_pipeline(file, "cpu")
        assert loading._published_as(file) == variant
    assert not [one for one in recwarn if "because of its name" in str(one.message)]


def test_little_memory_draws_the_same_pictures_and_lets_the_text_encoder_go(tiny_folder):
    prompts, settings = ["a red circle", "two blue hearts"], {"num_inference_steps": 2, "guidance_scale": 3.0}
    seeds = [[torch.Generator().manual_seed(k) for k in range(2)] for _ in range(2)]
    whole = load_pipeline(tiny_folder, "cpu")(prompts, generator=seeds[0], output_type="np", **settings).images
    pipeline = load_pipeline(tiny_folder, "cpu", low_memory=True)
    assert pipeline.vae.use_tiling
    drawn = draw_one_by_one(pipeline, prompts, seeds[1], output_type="np", **settings)
    first = next(drawn)
    assert pipeline.text_encoder is None and pipeline.tokenizer is None, "gone before the first decode is over"
    assert np.allclose([first, *drawn], whole, atol=1e-5)


def test_no_file_of_a_text_encoder_is_run_as_code(tiny_folder, tmp_path, monkeypatch):
    """transformers asked at the terminal whether it may; who said yes ran what the folder brought."""
    shutil.copytree(tiny_folder / "text_encoder", tmp_path / "both")
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "both", dirs_exist_ok=True)
    for file, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((tmp_path / "both" / file).read_text()) | {"model_type": "evil"}
        names = {kind: ["evil.Evil", None] if kind == "AutoTokenizer" else "evil.Evil", "AutoModel": "evil.Evil"}
        (tmp_path / "both" / file).write_text(json.dumps(settings | {"auto_map": names}))
    (tmp_path / "both" / "evil.py").write_text("raise SystemExit('was run')\nclass Evil: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    with pytest.raises(EncoderUnavailable, match="cannot be loaded"):
        hub.load_text_encoder(tmp_path / "both")
    assert not asked
