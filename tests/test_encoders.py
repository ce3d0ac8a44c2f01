"""Encoders: loading as from the hub, normalised latents, caption features, and what the shipped weights reach."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, LlamaModel

from nitro_e_lite import files
from nitro_e_lite.files import run_lock, weights_dir, write_manifest
from nitro_e_lite.inference import encoders, hub
from nitro_e_lite.inference.encoders import LatentStats, load_encoders
from nitro_e_lite.inference.hub import EncoderUnavailable
from nitro_e_lite.runtime import RunStopped
from nitro_e_lite.scenes.captions import caption, plural, words
from nitro_e_lite.scenes.geneval import load_prompts, true_scene, verify
from nitro_e_lite.scenes.grammar import COLORS, SHAPES, SIZES, sample_scene
from nitro_e_lite.scenes.render import render
from nitro_e_lite.stages import autoencoder, language_model
from nitro_e_lite.training.engine import Engine

LITE = weights_dir() / "lite"
NEW = 10_000  # a data set seed that no training used

TINY_VAE = autoencoder.AutoencoderConfig(
    steps=6, batch_size=2, image_size=32, latent_channels=4, encoder_widths=(8, 8, 16, 16),
    decoder_widths=(8, 8, 16, 16), decoder_layers=(0, 1, 1, 1), warmup_steps=2, log_every=1, checkpoint_every=2,
    statistics_scenes=4,
)  # fmt: skip
TINY_LM = language_model.LanguageModelConfig(
    steps=6, batch_size=4, tokenizer_scenes=50, width=32, layers=1, heads=2, key_value_heads=1, intermediate=32,
    decoder_layers=1, warmup_steps=2, log_every=1, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a smoke-scale autoencoder and language model, trained for six steps each."""
    folder = tmp_path_factory.mktemp("encoders")
    vae = autoencoder.train_autoencoder(TINY_VAE, folder / "vae_run")
    text = language_model.train_language_model(TINY_LM, folder / "text_run")
    return vae, text


@pytest.fixture(scope="module")
def lite():
    """The shipped encoders: autoencoder, latent statistics, tokenizer, language model."""
    vae = hub.load_autoencoder(LITE / "vae")
    tokenizer, model = hub.load_text_encoder(LITE)
    return vae, LatentStats.load(LITE / "vae"), tokenizer, model


def new_images(count: int) -> np.ndarray:
    return np.stack([render(sample_scene(NEW, i, "all")) for i in range(count)])


# Loading


def test_autoencoder_loads_from_a_local_folder(tiny):
    vae = hub.load_autoencoder(tiny[0], dtype=torch.bfloat16)
    assert isinstance(vae, AutoencoderDC) and vae.dtype == torch.bfloat16 and not vae.training
    assert not any(p.requires_grad for p in vae.parameters())


def hub_layout(cache, hub_id: str, revision: str, parts):
    """Copies folders into the layout in which the hub client keeps a downloaded repository."""
    root = cache / ("models--" + hub_id.replace("/", "--"))
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    for part in parts:
        for file in part.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())


def test_full_loading_code_on_models_in_the_hub_layout(tiny, tmp_path, monkeypatch):
    vae_id, text_id = hub.FULL_AUTOENCODER, hub.FULL_TEXT_ENCODER
    hub_layout(tmp_path, vae_id, hub.HUB_REVISIONS[vae_id], [tiny[0]])
    parts = [tiny[1] / "tokenizer", tiny[1] / "text_encoder"]
    hub_layout(tmp_path, text_id, hub.HUB_REVISIONS[text_id], parts)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    vae = hub.load_autoencoder(vae_id)
    tokenizer, model = hub.load_text_encoder(text_id)
    assert vae.config.latent_channels == 4
    assert isinstance(model, LlamaModel) and tokenizer.pad_token == tokenizer.eos_token
    assert encoders.encode_text(tokenizer, model, ["a red star"], 16).shape == (1, 16, 32)


def test_gated_model_offline_ends_in_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EncoderUnavailable) as caught:
        hub.load_text_encoder("meta-llama/Llama-3.2-1B")
    message = str(caught.value)
    assert "https://huggingface.co/meta-llama/Llama-3.2-1B" in message and "--text-encoder PATH" in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_unpinned_hub_id_needs_a_revision_and_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="revision=None: someone/model"):
        hub.load_autoencoder("someone/model")
    with pytest.raises(EncoderUnavailable, match="no such folder"):
        hub.load_autoencoder(tmp_path / "nothing")
    with pytest.raises(EncoderUnavailable, match="cannot be loaded"):
        hub.load_text_encoder(tmp_path)
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in hub.HUB_REVISIONS.values())


@pytest.mark.parametrize("size", [0, 100, -50])
def test_a_damaged_file_ends_in_one_clear_error(size, tiny, tmp_path):
    shutil.copytree(tiny[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(EncoderUnavailable, match="cannot be loaded .*header"):
        hub.load_text_encoder(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tiny_folder, tmp_path):
    """Libraries would leave them empty or fill them with noise."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    for file, load in [
        ("text_encoder/model.safetensors", hub.load_text_encoder),
        ("vae/diffusion_pytorch_model.safetensors", lambda folder: hub.load_autoencoder(folder / "vae")),
    ]:
        weights = load_file(tmp_path / file)
        name = sorted(weights)[0]
        save_file({other: weights[other] for other in weights if other != name}, tmp_path / file, {"format": "pt"})
        with pytest.raises(EncoderUnavailable, match=rf"1 weights are missing: {re.escape(name)}"):
            load(tmp_path)


def test_without_network_there_is_one_clear_error_and_no_noise(monkeypatch, caplog):
    def load(**_):
        logging.getLogger("huggingface_hub.utils._http").warning("thrown while requesting HEAD")
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(AutoencoderDC, "from_pretrained", load)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with pytest.raises(EncoderUnavailable, match="cannot be downloaded .Name or service not known.*--vae PATH"):
        hub.load_autoencoder(hub.FULL_AUTOENCODER)
    assert not caplog.messages
    logging.getLogger("huggingface_hub.utils._http").warning("as before")
    assert caplog.messages == ["as before"]


def test_loads_that_overlap_leave_the_hubs_warnings_as_they_were(tmp_path):
    """Two threads that looked for encoders at once once left them silent for good."""
    log = logging.getLogger("huggingface_hub")
    before, (first, second) = log.level, (hub.quiet_loading(tmp_path) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert log.level == logging.ERROR
    second.__exit__(None, None, None)
    assert log.level == before
    with pytest.raises(OSError, match="too long"), hub.quiet_loading("x" * 5000):  # fails before anything is loaded
        pass
    assert log.level == before


@pytest.mark.parametrize(
    "file",
    ["vae/diffusion_pytorch_model.safetensors", "vae/latent_stats.json", "text_encoder/model.safetensors",
     "tokenizer/tokenizer.json"],
)  # fmt: skip
def test_encoders_must_be_as_their_checksums_say(file, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "lite"
    shutil.copytree(tiny[1], folder)
    shutil.copytree(tiny[0], folder / "vae")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    write_manifest(folder)
    (folder / "transformer" / "config.json").write_text("not read, not checked")
    load_encoders(folder)
    (folder / file).write_bytes((folder / file).read_bytes() + b" ")
    monkeypatch.setattr(files, "weights_dir", lambda: tmp_path)
    for source in ("lite", folder):
        with pytest.raises(ValueError, match=f"{file}: contents differ from SHA256SUMS"):
            load_encoders(source)


# Latents


def test_latent_stats_check_their_input():
    with pytest.raises(ValueError, match="LatentStats"):
        LatentStats((0.0, 1.0), (1.0,))
    with pytest.raises(ValueError, match="above 0"):
        LatentStats((0.0,), (0.0,))
    stats = LatentStats.from_scaling_factor(0.41407, 32)
    latents = torch.randn(1, 32, 2, 2)
    mean, std = stats.tensors(latents)
    torch.testing.assert_close((latents - mean) / std, latents * 0.41407)
    with pytest.raises(ValueError, match="32"):
        stats.tensors(torch.randn(1, 8, 2, 2))


def test_images_of_the_wrong_type_or_size_are_refused(tiny):
    vae = hub.load_autoencoder(tiny[0])
    stats = LatentStats.load(tiny[0])
    with pytest.raises(ValueError, match="divisible by 8"):
        encoders.encode_images(vae, torch.zeros(1, 3, 30, 32), stats)
    with pytest.raises(ValueError, match="uint8"):
        encoders.encode_images(vae, np.zeros((32, 32, 3), np.uint8), stats)


def test_encoding_uint8_equals_encoding_floats(tiny):
    vae, stats = hub.load_autoencoder(tiny[0]), LatentStats.load(tiny[0])
    images = np.stack([render(sample_scene(0, i), 32) for i in range(2)])
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    a, b = encoders.encode_images(vae, images, stats), encoders.encode_images(vae, floats, stats)
    assert a.shape == (2, 4, 4, 4)
    torch.testing.assert_close(a, b)
    assert encoders.decode_latents(vae, a, stats).shape == (2, 3, 32, 32)


# Captions


def test_clean_caption():
    assert encoders.clean_caption("  A Red&amp;Blue\n star  https://x.org/a ") == "a red&blue star"


def test_caption_features_depend_on_their_caption_alone(tiny):
    tokenizer, model = hub.load_text_encoder(tiny[1])
    captions = ["a red star", "three small green circles above a blue square", "", "A  RED star"]
    together = encoders.encode_text(tokenizer, model, captions, 32)
    assert together.shape == (4, 32, 32)
    for row, text in zip(together, captions, strict=True):
        torch.testing.assert_close(row[None], encoders.encode_text(tokenizer, model, [text], 32), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[0], together[3], rtol=1e-4, atol=1e-4)
    short = encoders.encode_text(tokenizer, model, captions[:1], 16)
    torch.testing.assert_close(short, together[:1, :16], rtol=1e-4, atol=1e-4)


def test_padding_is_the_end_token_and_is_not_attended_to(tiny):
    tokenizer, model = hub.load_text_encoder(tiny[1])
    batch = tokenizer(["a red star"], padding="max_length", max_length=8)
    ids, mask = batch["input_ids"][0], batch["attention_mask"][0]
    assert sum(mask) == 4 and ids[3:] == [tokenizer.eos_token_id] * 5


def test_long_captions_are_cut_with_a_warning(tiny):
    tokenizer, model = hub.load_text_encoder(tiny[1])
    with pytest.warns(UserWarning, match="caption cut to 8 of .*a very long"):
        features = encoders.encode_text(tokenizer, model, ["a very long " + "red star " * 20], 8)
    assert features.shape == (1, 8, 32)
    with pytest.raises(TypeError, match="list of strings"):
        encoders.encode_text(tokenizer, model, "a red star", 8)


def test_fingerprint_changes_with_any_weight_and_any_setting(tiny):
    vae, (_, model) = hub.load_autoencoder(tiny[0]), hub.load_text_encoder(tiny[1])
    stats = LatentStats.load(tiny[0])
    base = encoders.fingerprint(vae, model, stats, 32)
    in_bf16 = hub.load_autoencoder(tiny[0], dtype=torch.bfloat16)
    assert base == encoders.fingerprint(in_bf16, model, stats, 32)  # encoded on a GPU, trained on in float32
    assert base == encoders.fingerprint(vae, model, stats, 32) and re.fullmatch("[0-9a-f]{64}", base)
    others = {
        encoders.fingerprint(vae, model, stats, 16),
        encoders.fingerprint(vae, model, stats, 32, image_size=64),
        encoders.fingerprint(vae, model, LatentStats(stats.mean, tuple(2 * s for s in stats.std)), 32),
        encoders.fingerprint(vae, None, stats, 32),
    }
    next(model.parameters()).data[0, 0] += 0.1
    others.add(encoders.fingerprint(vae, model, stats, 32))
    assert len(others | {base}) == 6


# Training


@pytest.mark.parametrize("name", ["autoencoder", "language_model"])
def test_training_resumes_bit_for_bit_and_learns(name, tmp_path):
    module = {"autoencoder": autoencoder, "language_model": language_model}[name]
    config = {"autoencoder": TINY_VAE, "language_model": TINY_LM}[name]
    train = getattr(module, f"train_{name}")
    whole = train(config, tmp_path / "whole")
    stage = {"autoencoder": autoencoder.Autoencoder, "language_model": language_model.LanguageModel}[name]
    stopped = Engine(config, stage, tmp_path / "parts", device="cpu")
    for _ in range(3):
        stopped.step()
    stopped.save()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config, tmp_path / "parts")
    parts = train(config, tmp_path / "parts", resume=True)
    files = sorted(whole.rglob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes()
    rows, later = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [(row["step"], row["loss"]) for row in later] == [(row["step"], row["loss"]) for row in rows[3:]]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_an_encoder_run_saves_on_sigterm_and_holds_its_folder(tmp_path):
    whole = autoencoder.train_autoencoder(TINY_VAE, tmp_path / "whole", device="cpu")
    run = Engine(TINY_VAE, autoencoder.Autoencoder, tmp_path / "stopped", device="cpu")
    step = run.step
    run.step = lambda: (os.kill(os.getpid(), signal.SIGTERM), step())[1]
    with pytest.raises(RunStopped, match="Stopped by SIGTERM after step 1 of 6"):
        run.fit()
    with run_lock(tmp_path / "stopped"), pytest.raises(RuntimeError, match="another process is writing there"):
        autoencoder.train_autoencoder(TINY_VAE, tmp_path / "stopped", resume=True, device="cpu")
    parts = autoencoder.train_autoencoder(TINY_VAE, tmp_path / "stopped", resume=True, device="cpu")
    name = "diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_language_model_goes_on_from_another_and_stays_near_it(tiny, tmp_path):
    lesson = {"start_from": str(tiny[1]), "next_word_weight": 0.0, "paraphrase_weight": 0.0, "related": 1.0}
    before = AutoModel.from_pretrained(tiny[1] / "text_encoder").state_dict()
    distance = {}
    for keep in (1.0, 100.0):
        config = dataclasses.replace(TINY_LM, **lesson, keep_weight=keep, steps=20)
        final = language_model.train_language_model(config, tmp_path / str(keep))
        rows = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
        assert rows[0]["keep"] == 0 < rows[-1]["keep"]
        if keep == 1.0:
            assert sum(row["place"] for row in rows[-5:]) < 0.9 * sum(row["place"] for row in rows[:5])
        assert not {"next_word", "paraphrase"} & rows[0].keys()
        after = AutoModel.from_pretrained(final / "text_encoder").state_dict()
        distance[keep] = rows[-1]["keep"]
        assert any(not torch.equal(after[name], before[name]) for name in before)
        same = [(part / "tokenizer" / "tokenizer.json").read_text() for part in (final, tiny[1])]
        assert same[0] == same[1]
    assert distance[100.0] < 0.5 * distance[1.0]


def test_bad_training_settings_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        autoencoder.AutoencoderConfig(steps=0)
    with pytest.raises(ValueError, match="keep_weight=1.0: there is nothing to keep"):
        language_model.LanguageModelConfig(keep_weight=1.0)


# The shipped weights


@torch.no_grad()
def test_shipped_autoencoder_reaches_34_db_on_new_scenes(lite):
    vae, stats, _, _ = lite
    images = new_images(64)
    latents = encoders.encode_images(vae, images, stats)
    assert latents.shape[2:] == (16, 16)
    spread = latents.std(dim=(0, 2, 3))
    assert ((0.9 < spread) & (spread < 1.1)).all() and latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    target = encoders.images_to_tensor(images)

    def psnr(latents: torch.Tensor) -> float:
        error = encoders.decode_latents(vae, latents, stats) - target
        return (-10 * (error.square().mean(dim=(1, 2, 3)) / 4).log10()).mean().item()

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    reached = {level: psnr(latents + level * noise) for level in (0.0, 0.1, 0.2)}
    print("PSNR in dB by latent noise: " + ", ".join(f"{level}: {value:.2f}" for level, value in reached.items()))
    assert reached[0.0] >= 34 and reached[0.1] >= 33


@torch.no_grad()
def test_verifier_passes_what_the_shipped_autoencoder_has_been_through(lite):
    vae, stats, _, _ = lite
    prompts = load_prompts("held_out_prompts")[::4]
    passed = 0
    for first in range(0, len(prompts), 32):
        part = prompts[first : first + 32]
        images = np.stack([render(true_scene(prompt, seed=1)) for prompt in part])
        decoded = encoders.decode_latents(vae, encoders.encode_images(vae, images, stats), stats)
        decoded = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()  # (B, H, W, 3)
        passed += sum(verify(image, prompt).correct for image, prompt in zip(decoded, part, strict=True))
    print(f"verifier passes {passed} of {len(prompts)} pictures after encode and decode")
    assert passed / len(prompts) >= 0.97


def test_shipped_tokenizer_holds_every_caption(lite):
    _, _, tokenizer, _ = lite
    captions = [caption(sample_scene(NEW, i, "all"), i) for i in range(2000)]
    lengths = np.array([len(ids) for ids in tokenizer(captions)["input_ids"]])
    assert lengths.max() <= 32 and np.median(lengths) <= 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoders.encode_text(tokenizer, lite[3], captions[:8], 32)


def test_shipped_text_encoder_loads_with_the_auto_classes(lite):
    tokenizer = AutoTokenizer.from_pretrained(LITE / "tokenizer")
    model = AutoModel.from_pretrained(LITE / "text_encoder")
    assert isinstance(model, LlamaModel) and tokenizer.eos_token == tokenizer.pad_token


SIDES = {"left": "left of", "right": "right of", "above": "above", "over": "above", "higher": "above", "top": "above"}
SIDES |= {word: "below" for word in ("below", "under", "underneath", "lower", "bottom")}


def read_caption(tokens: list[str]) -> list[dict]:
    """Each object mention of a caption: its place, its words, and the words said since the mention before."""
    mentions, since = [], []
    for place, token in enumerate(tokens):
        word = token.removeprefix("\u0120")
        shape = next((s for s in SHAPES if word in (s, plural(s))), None)
        since.append(word)
        if shape:
            color, size = (next((w for w in since if w in names), None) for names in (COLORS, SIZES))
            mentions.append({"place": place, "shape": shape, "color": color, "size": size, "since": since})
            since = []
    return mentions


def probe_samples(tokenizer, model, first: int, count: int) -> dict[str, list]:
    """Task -> (feature, answer) pairs: what a linear map should read off a single feature vector."""
    samples: dict[str, list] = {}
    for start in range(first, first + count, 100):
        texts = [encoders.clean_caption(caption(sample_scene(NEW, i), i)) for i in range(start, start + 100)]
        for text, states in zip(texts, encoders.encode_text(tokenizer, model, texts, 32), strict=True):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            mentions = read_caption(tokens)
            end = len(tokens) - 1
            asked = [
                (f"{a}, at its shape word", m["place"], m[a]) for m in mentions for a in ("shape", "color", "size")
            ]
            asked += [(f"first {a}, at the end token", end, mentions[0][a]) for a in ("shape", "color")]
            number = next((w for w in words(text) if w in ("two", "three", "four", "2", "3", "4")), None)
            asked += [("count, at the end token", end, number)]
            if len(mentions) == 2 and " that is " not in text and " first " not in text:
                side = next((SIDES[w] for w in mentions[1]["since"] if w in SIDES), None)
                asked += [("relation, at the second shape word", mentions[1]["place"], side)]
                asked += [("relation, at the last padding token", 31, side)]
            for task, place, answer in asked:
                if answer is not None:
                    samples.setdefault(task, []).append((states[place], answer))
    return samples


def probe_accuracy(known: list, new: list) -> float:
    """Accuracy on `new` of a linear classifier (ridge regression to one-hot targets) fitted on `known`."""
    answers = sorted({answer for _, answer in known})
    x, y = (torch.nn.functional.pad(torch.stack([f for f, _ in s]).double(), (0, 1), value=1.0) for s in (known, new))
    target = torch.tensor([[float(a == answer) for a in answers] for _, answer in known], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ target)
    chosen = [answers[k] for k in (y @ weight).argmax(dim=1)]
    return sum(c == answer for c, (_, answer) in zip(chosen, new, strict=True)) / len(new)


def test_linear_probes_read_the_scene_off_the_shipped_features(lite):
    known, new = (probe_samples(*lite[2:], *span) for span in ((0, 4000), (4000, 1000)))
    table = {task: probe_accuracy(known[task], new[task]) for task in sorted(known)}
    for task, accuracy in table.items():
        print(f"{task:40s} {accuracy:.3f}  ({len(known[task])} to fit, {len(new[task])} to test)")
    assert table["shape, at its shape word"] >= 0.97
    assert table["count, at the end token"] >= 0.97
    assert table["color, at its shape word"] >= 0.95
    assert table["relation, at the second shape word"] >= 0.97
    assert table["relation, at the last padding token"] >= 0.97
