"""Damaged files of every kind: a loader reads them or says in one message what is wrong, and never does anything else.

Two seconds here; `NITRO_E_FUZZ_SECONDS=30` in CI. A failure names the seed that repeats it.
"""

import io
import json
import os
import random
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nitro_e_lite.data.shard_writer import write_latents
from nitro_e_lite.data.shards import LatentBatch, LatentDataset, read_quarantine
from nitro_e_lite.data.sources import Folder, read_prompts, square
from nitro_e_lite.errors import UserError
from nitro_e_lite.files import check_manifest, read_json, read_jsonl
from nitro_e_lite.inference.encoders import LatentStats
from nitro_e_lite.model.official_weights import load_official, merge_lora
from nitro_e_lite.scenes.geneval import read_prompts as read_geneval
from nitro_e_lite.training.checkpoints import load_checkpoint, save_checkpoint

SECONDS = float(os.environ.get("NITRO_E_FUZZ_SECONDS", "2"))
SEED = int(os.environ.get("NITRO_E_FUZZ_SEED", "0"))
LARGE = [2**k - d for k in (15, 16, 31, 32, 63, 64) for d in (0, 1)]


def damage(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few faults: bytes changed, cut off, repeated, exchanged, or numbers grown large."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        kind, at = chance.randrange(6), chance.randrange(len(data) or 1)
        if kind == 0 and data:
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.choice((1, 8, 64)))
        elif kind == 3:
            data[at : at + 8] = (chance.choice(LARGE) % 2**64).to_bytes(8, "little")
        elif kind == 4:
            data[at:at] = data[at // 2 : at] * chance.choice((1, 3))
        else:
            data[at : at + 1] = chance.choice((b"[", b"{", b'"', b"\x00", b"\xff", b"-1e999", b"null", b"[" * 100_000))
    return bytes(data)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Name -> (file to damage, what reads it)."""
    root, tensors = tmp_path_factory.mktemp("fuzz"), {"a": torch.ones(4, 4), "b": torch.zeros(2)}
    save_file(tensors, root / "official.safetensors")
    lora = root / "lora"
    lora.mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 4)}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "use_rslora": false}')
    kept = root / "kept"
    kept.mkdir()
    about = {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "rank_pattern": {"x": 2}, "use_rslora": true}'}
    save_file({"x.lora_A.weight": torch.ones(1, 4)}, kept / "pytorch_lora_weights.safetensors", about)
    (root / "latent_stats.json").write_text('{"latents_mean": [0.0, 0.5], "latents_std": [1.0, 2.0]}')
    step = save_checkpoint(root / "checkpoints", 1, {"weights": tensors}, {"note": "x"}, keep=1)
    write_latents(root / "set", [LatentBatch(torch.randn(6, 4, 4, 4), [["a star"]] * 6)], "f", shard_rows=3)
    shutil.copytree(root / "set", root / "sidecar")
    shutil.copytree(root / "set", root / "card")
    (root / "set" / "quarantine.jsonl").write_text('{"shard": "000009", "row": null, "reason": "x"}\n')
    (root / "SHA256SUMS").write_text(f"{'0' * 64}  official.safetensors\n")
    prompt = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"}
    (root / "prompts.jsonl").write_text((json.dumps(prompt) + "\n") * 2)
    (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a star"}\n' * 2)
    pictures = {}
    for mode, suffix in (("RGB", "png"), ("P", "gif"), ("RGB", "jpg"), ("F", "tiff")):
        buffer = io.BytesIO()
        picture = Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)).convert(mode)
        picture.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        (root / f"picture.{suffix}").write_bytes(buffer.getvalue())
        pictures[suffix] = (root / f"picture.{suffix}", lambda path: square(path.read_bytes(), 16))
    model = torch.nn.Linear(2, 2)

    def items(path):
        source = Folder(path)
        return [item for part in source.parts() for item in source.items(part)]

    def rows(folder):
        data = LatentDataset(folder, None)
        return data.batch(range(len(data)))

    arrow = root / "set" / "shards" / "000000.arrow"
    return pictures | {
        "official weights": (root / "official.safetensors", load_official),
        "adapter": (lora / "adapter_model.safetensors", lambda path: merge_lora(model, path.parent)),
        "adapter settings": (lora / "adapter_config.json", lambda path: merge_lora(model, path.parent)),
        "adapter with settings": (kept / "pytorch_lora_weights.safetensors", lambda path: merge_lora(model, path)),
        "statistics": (root / "latent_stats.json", lambda path: LatentStats.load(path.parent)),
        "json": (root / "latent_stats.json", read_json),
        "checkpoint": (step / "state.json", lambda path: load_checkpoint(path.parent)),
        "checkpoint weights": (step / "weights.safetensors", lambda path: load_checkpoint(path.parent)),
        "card": (root / "card" / "card.json", lambda path: rows(path.parent)),
        "shard's facts": (root / "sidecar" / "shards" / "000000.json", lambda path: rows(path.parents[1])),
        "arrow": (arrow, lambda path: rows(path.parents[1])),
        "quarantine": (root / "set" / "quarantine.jsonl", lambda path: read_quarantine(path.parent)),
        "checksums": (root / "SHA256SUMS", lambda path: check_manifest(path.parent)),
        "prompts": (root / "prompts.jsonl", read_prompts),
        "lines": (root / "prompts.jsonl", lambda path: list(read_jsonl(path))),
        "GenEval prompts": (root / "prompts.jsonl", read_geneval),
        "captions": (root / "captions.jsonl", items),
    }


def test_damaged_files_are_read_or_refused(targets):
    chance, until, refused = random.Random(SEED), time.monotonic() + SECONDS, dict.fromkeys(targets, 0)
    whole = {name: path.read_bytes() for name, (path, _) in targets.items()}
    rounds = 0
    while time.monotonic() < until or rounds < 3:
        rounds += 1
        for name, (path, read) in targets.items():
            seed = chance.randrange(2**32)
            data = damage(whole[name], random.Random(seed))
            path.unlink()  # what a run has mapped into memory is left alone
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(path)
            except UserError as error:
                assert str(error), name
                refused[name] += 1
            except Exception as error:
                raise AssertionError(f"{name}, damage {seed}: {type(error).__name__}: {error}") from error
            finally:
                path.write_bytes(whole[name])
                for left in path.parent.glob("quarantine.jsonl"):
                    if left != path:
                        left.unlink()
    print(f"{rounds} rounds; refused {refused}")
    assert sum(refused.values()) > rounds
