"""The planner against published figures, numbers known from elsewhere, and tensors that were really kept."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from typer.testing import CliRunner

from nitro_e_lite.cli.app import app
from nitro_e_lite.config import override, to_dict
from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch
from nitro_e_lite.experiments.plan import (
    STORED,
    Utilisation,
    activation_bytes,
    checkpoint_bytes,
    checkpoint_hours,
    count_pictures,
    decoder_flops,
    drawing_days,
    forward_flops,
    frozen_encoders,
    outlook,
    pictures_encoded,
    plan,
    published_mfu,
    snapshot_bytes,
)
from nitro_e_lite.experiments.plan_rewards import plan_rewards
from nitro_e_lite.files import weights_dir
from nitro_e_lite.inference.encoders import load_encoders
from nitro_e_lite.inference.vision import load_vision
from nitro_e_lite.model.cpu_kernels import plain_operations
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.official_weights import lora_targets
from nitro_e_lite.presets import preset
from nitro_e_lite.stages.pretrain import Pretrain
from nitro_e_lite.training.engine import Engine

FULL = preset("base", "full")


@pytest.fixture(scope="module")
def full():
    return plan(FULL, "mi300x", 8)


def test_published_days(full):
    """At the MFU that the published run implies, both stages take its 1.5 days, at its 2,370 samples a second."""
    finetune = plan(preset("finetune", "full"), "mi300x", 8)
    assert finetune.disk["latents"] == 13_900_000 * 2 * 32 * 16 * 16  # without SA1B
    hours = full.hours["all stored"] + finetune.hours["all stored"]
    assert hours == pytest.approx(36)
    steps = FULL.steps + preset("finetune", "full").steps
    assert steps * FULL.batch_size / (hours * 3600) == pytest.approx(2370, rel=1e-3)
    mfu = published_mfu()
    print({way: round(value, 4) for way, value in mfu.items()})
    by_hand = 2370 * 3 * 0.0804e12 / (8 * 1307.4e12)  # method: 0.0775 with weights, 0.0029 in attention; no projector
    assert mfu["all stored"] == pytest.approx(by_hand, rel=0.04)
    assert mfu["all stored"] < mfu["latents stored"] < mfu["nothing stored"] < 1


def test_known_sizes(full):
    sizes = {name: encoder.parameters for name, encoder in full.encoders.items()}
    assert sizes["text"] == 1_235_814_400  # Llama-3.2-1B, from its model card
    assert sizes["vision"] == pytest.approx(86.6e6, rel=1e-3)  # DINOv2 ViT-B/14
    assert sizes["latents"] == pytest.approx(312e6, rel=1e-2)  # DC-AE f32c32
    assert full.encoders["text"].flops == pytest.approx(0.26e12, rel=0.05)
    assert full.encoders["vision"].flops == pytest.approx(0.046e12, rel=0.1)
    assert full.parameters == 302_449_952 + 768 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert full.disk["latents"] == pytest.approx(400e9, rel=0.03)
    assert full.needed < full.capacity


def test_what_storing_saves(full):
    savings = {way: full.sample_flops[way] / full.sample_flops["all stored"] for way in STORED}
    assert savings["latents stored"] > 2  # text and vision encoders cost more than the model
    for way in STORED:
        speed = 8 * full.peak * full.mfu / full.sample_flops[way]
        assert full.samples_per_second[way] == pytest.approx(speed)


@pytest.mark.parametrize(("on_cpu", "operations"), [(True, nullcontext), (False, plain_operations)])
def test_activations_are_those_that_a_real_pass_keeps(on_cpu, operations):
    """With the hand-written passes of a CPU, and with the ordinary ones that a GPU runs."""
    arguments = to_dict(preset("base", "smoke").model)
    model = EMMDiTTransformer2DModel(**arguments).train()
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    totals = []
    for batch in (1, 2):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), operations():
            output = model(torch.randn(batch, 8, 16, 16), torch.randn(batch, 32, 256), torch.rand(batch))
        totals.append(sum(s.nbytes() for address, s in kept.items() if address not in weights))
        del output
    assert activation_bytes(arguments, 32, "fp32", on_cpu) == pytest.approx(totals[1] - totals[0], rel=0.15)


def test_memory_by_hand():
    memory = plan(override(preset("base", "smoke"), ["optimizer.name=adamw", "precision=bf16"]), "rtx4090").memory
    count = sum(p.numel() for p in EMMDiTTransformer2DModel(**to_dict(preset("base", "smoke").model)).parameters())
    assert memory["weights and gradients"] == 12 * count  # float32 masters and gradients, bf16 copies of both
    assert memory["optimizer"] == 8 * count and memory["average of the weights"] == 4 * count
    assert memory["gradient bucket"] == 4 * count  # one bucket holds all of so small a model
    assert plan(FULL, "mi300x", 8).memory["gradient bucket"] == 2**27  # a full bucket, 128 MB: not the whole gradient
    assert set(frozen_encoders(override(preset("base", "lite"), ["repa.weight=0"]))) == {"latents", "text"}


def test_a_range_of_hours_and_all_that_comes_with_them(full):
    """The hours once were the published ones fed back, and encoding, drawing, reading and saving were not counted."""
    slow, _, fast = outlook(FULL, full, 8)
    assert (slow.mfu.whose, fast.mfu.whose, fast.mfu.share) == ("published", "ours", 0.4)
    assert slow.hours == pytest.approx(full.hours)
    assert fast.encoding == pytest.approx(2.64, rel=0.01)  # 25 million x 1.5925 TFLOP at 40 % of 8 x 1307.4
    assert pictures_encoded()[-1] == pytest.approx(25e6 / 3600 / fast.encoding)
    assert fast.hours["all stored"] == pytest.approx(24.4 * 0.056 / 0.4, rel=0.02)
    row = 2 * (32 * 256 + 128 * 2048 + 256 * 768)
    assert fast.reading["all stored"] == pytest.approx(8 * full.peak * 0.4 / full.sample_flops["all stored"] * row)
    seen = 8 * full.peak * 0.4 / full.sample_flops["latents stored"] * (2 * 32 * 256 + 22_000)  # and pictures for REPA
    assert fast.reading["latents stored"] == pytest.approx(seen)
    assert fast.reading["nothing stored"] == 0 and 0 < fast.validation < slow.validation < 0.02 * 24.4
    assert drawing_days(FULL, 8, full.peak) == pytest.approx(25, rel=0.03)  # data_cards/fluxdb.md
    assert drawing_days(override(FULL, ["data.folders=[data/sa1b]"]), 8, full.peak) == 0
    assert checkpoint_bytes(FULL) == 12 * full.parameters  # masters and two moments: stage 1 has no average
    assert checkpoint_bytes(override(FULL, ["ema_decay=0.9999"])) == 16 * full.parameters
    assert checkpoint_hours(FULL) == pytest.approx(100 * checkpoint_bytes(FULL) / 1e9 / 3600)


def test_memory_and_hours_of_1024_px_are_those_in_readme():
    config = preset("1024px", "full")
    found = plan(config, "mi300x", 8)
    (one,) = outlook(config, found, 8, [Utilisation(0.2, "ours", "")])
    said = f"{found.needed / 1e9:.0f} GB a GPU, {one.hours['all stored']:.1f} h on 8 MI300X at 20 % of the peak"
    assert said in (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert found.needed < found.capacity


def test_of_a_lora_its_own_numbers_alone_are_kept():
    """A fine-tuning with an adapter was refused for want of 20 GB that it never writes."""
    config = override(
        preset("finetune", "smoke"), ["lora.rank=4", "lora.targets=attention_mlp", "optimizer.name=adamw"]
    )
    model = EMMDiTTransformer2DModel(**to_dict(config.model))
    peft = LoraConfig(r=4, target_modules=lora_targets(model, mlp=True))
    inject_adapter_in_model(peft, model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert checkpoint_bytes(config) == (16 if config.ema_decay else 12) * count
    assert snapshot_bytes(config) == 2 * count
    full = override(preset("finetune", "full"), ["lora.rank=16"])
    assert checkpoint_bytes(full) < 0.02 * checkpoint_bytes(preset("finetune", "full"))
    assert plan(full, "mi300x").needed < plan(preset("finetune", "full"), "mi300x").needed


def test_a_checkpoint_is_as_large_as_planned(tmp_path):
    config = override(preset("base", "smoke"), ["optimizer.name=adamw", "repa.weight=0.5"])
    engine = Engine(config, Pretrain, tmp_path / "run", device="cpu")
    engine.step()
    files = [*engine.save().glob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) == pytest.approx(checkpoint_bytes(config), rel=0.15)  # headers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hardware": "b200"}, "hardware='b200'"),
        ({"devices": 3}, "devices=3"),
        ({"mfu": 1.5}, "mfu=1.5"),
        ({"mfu": 1e-300}, "mfu=1e-300"),
        ({"peak_tflops": 1e300}, r"peak_tflops=1e\+300"),
        ({"devices": 10**400}, "devices=1000"),
        ({"pictures": 10**400}, "pictures=1000"),
    ],
)
def test_bad_plans_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        plan(FULL, **arguments)


def test_command():
    arguments = ["plan", "--preset", "smoke", "--hardware", "h100", "--devices", "2", "--mfu", "0.3"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["mfu"] == 0.3 and found["peak"] == 989.4e12 and found["hours"]["all stored"] > 0
    shown = CliRunner().invoke(app, arguments).stdout
    assert "samples/s" in shown and "NVIDIA H100 data sheet" in shown and "30.0% (asked" in shown
    assert [one["mfu"]["share"] for one in found["outlook"]] == [0.3] and found["drawing_days"] == 0


def test_lite_encoders_are_those_that_a_run_loads():
    """The planner had sizes of its own for the vision model, and counted a mask token that it does not have."""
    planned = frozen_encoders(override(preset("base", "lite"), ["repa.weight=0.5"]))
    encoders, vision = load_encoders("lite"), load_vision("lite")
    loaded = {"latents": encoders.vae, "text": encoders.text_encoder, "vision": vision.model}
    assert {name: one.parameters for name, one in planned.items()} == {
        name: sum(p.numel() for p in model.parameters()) for name, model in loaded.items()
    }
    features = encoders.encode_text([""]), vision.encode(torch.zeros(1, 3, 128, 128))
    assert [planned[name].stored for name in ("text", "vision")] == [2 * one.numel() for one in features]


def test_encoders_may_lie_in_any_folder(tmp_path, monkeypatch):
    """A folder named as seen from here was once looked for among the shipped weights."""
    lite = preset("base", "lite")
    monkeypatch.chdir(weights_dir())
    assert frozen_encoders(override(lite, ["data.encoders=./lite"])) == frozen_encoders(lite)
    with pytest.raises(FileNotFoundError, match="'nowhere' is no folder.*vae/config.json"):
        frozen_encoders(override(lite, ["data.encoders=nowhere"]))
    for count in (frozen_encoders, decoder_flops):
        with pytest.raises(ValueError, match="model.in_channels=5: the autoencoder of data.encoders='lite' has 8"):
            count(override(lite, ["model.in_channels=5"]))
    (tmp_path / "odd" / "vae").mkdir(parents=True)
    (tmp_path / "odd" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC", "latent_channels": "x"}')
    with pytest.raises(ValueError, match="data.encoders: .*odd cannot be loaded"):
        frozen_encoders(override(lite, [f"data.encoders={tmp_path / 'odd'}"]))


def test_pictures_are_those_of_the_folders(tmp_path):
    """Any other folder than the paper's once counted as the 40,000 scenes of the lite preset."""
    full = preset("base", "full")
    assert count_pictures(full.data) == 25_000_000
    lite = preset("base", "lite")
    assert count_pictures(lite.data) == 2 * lite.data.scenes  # pairs, and the plain scenes in between
    assert count_pictures(override(lite, ["data.pairs_every=1"]).data) == lite.data.scenes
    looked_at = {n: override(lite, [f"data.validation_scenes={n}"]) for n in (128, 256, 512)}
    hours = [outlook(one, plan(one, "mi300x", 8), 8)[0].validation for one in looked_at.values()]
    assert hours == pytest.approx([hours[0], 2 * hours[0], 4 * hours[0]])
    elsewhere = override(full, ["data.folders=[/mnt/sa1b, /mnt/fluxdb]"])
    assert count_pictures(elsewhere.data) == 20_600_000
    rows = LatentBatch(torch.zeros(3, 4, 16, 16), [["a"], ["b"], ["c"]])
    write_latents(tmp_path / "mine", [rows], "fingerprint")
    mine = override(full, [f"data.folders=[/mnt/sa1b, {tmp_path / 'mine'}]"])
    assert count_pictures(mine.data) == 11_100_003
    with pytest.raises(ValueError, match="yours is not here; say with --pictures"):
        count_pictures(override(full, ["data.folders=[/mnt/yours]"]).data)
    with pytest.raises(ValueError, match="pictures=0: must be at least 1"):
        plan(full, pictures=0)
    disk = {n: plan(full, "mi300x", 8, pictures=n).disk["latents"] for n in (1000, 2000)}
    assert disk[2000] == 2 * disk[1000]


def test_learning_from_rewards_by_hand():
    """Passes from the essay of the module; an adapter's way back costs one pass."""
    model = override(preset("base", "smoke"), ["repa.weight=0"])
    chosen = override(preset("rewards", "smoke"), ["steps=5"])  # two updates an iteration: three roll-outs of 16
    one, caption, decoder = forward_flops(model), frozen_encoders(model)["text"].flops, decoder_flops(model)
    found = plan_rewards(chosen, preset("base", "smoke"), "h100", devices=2, mfu=0.5)
    assert (found.iterations, found.pictures) == (3, 48)
    assert found.flops["roll-outs"] == pytest.approx(16 * (4 * one + decoder) + 16 / 4 * caption)
    assert found.flops["updates"] == pytest.approx(16 * 2 * 4 * one)
    assert found.hours["updates"] == pytest.approx(3 * found.flops["updates"] / found.peak / 3600)
    assert found.judged_per_second == pytest.approx(48 / (0.1 * 3600 * sum(found.hours.values())))
    guided = plan_rewards(override(chosen, ["guidance=3"]), model, "h100").flops
    assert guided["updates"] == pytest.approx(16 * 2 * (1 + 2 + 4) * one)
    grpo = override(chosen, ["method=grpo"])
    for extra, passes in (([], 2), (["grpo.kl=0.04"], 3), (["grpo.kl=0.04", "guidance=3"], 5)):
        updates = plan_rewards(override(grpo, extra), model, "h100").flops["updates"]
        assert updates == pytest.approx(16 * 2 * passes * one), extra  # the smoke preset's window is 2
    words = ["plan", "--stage", "rewards", "--preset", "smoke", "--hardware", "h100"]
    printed = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(printed.stdout)["iterations"] == 2
    assert CliRunner().invoke(app, [*words, "--pictures", "5"]).exit_code == 2
