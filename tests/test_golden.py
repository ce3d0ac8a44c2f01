"""The model against tensors of the published reference implementation, float32, 1e-5 relative."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nitro_e_lite.files import PACKAGE_DIR
from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.official_weights import load_official

FILES = ("emmdit_512_asa", "emmdit_512_repa", "emmdit_1024_full_attention")


def official_file(name, folder):
    """The weights of a golden file as an official file; its constructor arguments; all its tensors."""
    folders = (Path(__file__).parent / "golden", PACKAGE_DIR / "course" / "golden")  # notebook 08 reads the second
    path = next(file for folder in folders if (file := folder / f"{name}.safetensors").is_file())
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    prefix = "state_dict."
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    save_file(weights, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors", config, tensors


def load(name, folder):
    path, config, tensors = official_file(name, folder)
    return load_official(path, **config), tensors


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("context", [torch.no_grad, nullcontext, cpu_kernels.plain_operations])
def test_velocity_equals_the_reference(name, context, tmp_path):
    model, tensors = load(name, tmp_path)
    with context():
        output = model(tensors["input.latents"], tensors["input.prompt_embeds"], tensors["input.timestep"])
    close(output.sample, tensors["output.velocity"])
    if "output.repa_projection" in tensors:
        close(output.features, tensors["output.repa_projection"])
        tokens = output.sample.flatten(2).transpose(1, 2)  # the tokens before unpatchify, patch size 1
        close(tokens, tensors["output.train_tokens"])
    else:
        assert output.features is None


def close(mine, reference):
    assert mine.dtype == reference.dtype == torch.float32
    assert (mine - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert (mine - reference).norm() <= 1e-5 * reference.norm()


def test_the_tolerance_can_tell_models_apart(tmp_path):
    model, tensors = load(FILES[0], tmp_path)
    model.groups[1][7].attention.pattern = (4, 1)  # strided groups where the reference has blocks
    output = model(tensors["input.latents"], tensors["input.prompt_embeds"], tensors["input.timestep"])
    with pytest.raises(AssertionError):
        close(output.sample, tensors["output.velocity"])
