"""Counting parameters and FLOPs, and the clock."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from nitro_e_lite.evaluation import benchmark
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
from nitro_e_lite.model.flops import build_on_meta, count_flops, count_parameters, model_config


def test_the_full_model_has_the_published_size():
    model = build_on_meta(model_config("full"))
    counts = count_parameters(model)
    assert sum(counts.values()) == 302_449_952
    assert set(counts) == {
        "embeddings", "group 1", "group 2", "group 3", "token compressor", "token reconstructor", "output",
    }  # fmt: skip


def test_the_full_model_takes_the_published_flops():
    count = count_flops(model_config("full"))
    assert count.weights / 1e12 == pytest.approx(0.0775, abs=5e-5)
    assert (count.weights + count.attention) / 1e12 == pytest.approx(0.08, abs=5e-3)
    assert sum(count.components.values()) == count.weights + count.attention


def test_flops_of_one_full_attention_block_by_hand():
    config = {
        "sample_size": 8, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
        "caption_channels": 24, "block_groups": (1, 1), "attention_pattern": ((1, 1),), "compression": False,
    }  # fmt: skip
    batch, image, text, width = 3, 64, 16, 32
    tokens = image + text
    attention = 2 * 2 * 2 * tokens * tokens * width  # two blocks, two products each
    first = (image + text) * (4 + 6) * width**2  # q, k, v, out and the MLP of ratio 3, in both streams
    last = first - text * (1 + 6) * width**2  # the text stream ends without output projection and MLP
    time = 256 * width + width * width + width * 6 * width
    outside = image * 4 * width * 2 + text * 24 * width + time
    count = count_flops(config, batch=batch, text_tokens=text)
    assert count.weights == 2 * batch * (first + last + outside)
    assert count.attention == batch * attention


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("text_tokens", 0), ("batch", 1.5)])
def test_count_flops_refuses(field, value):
    with pytest.raises((TypeError, ValueError), match=field):
        count_flops({}, **{field: value})


def test_unknown_size():
    with pytest.raises(ValueError, match="size: 'huge'"):
        model_config("huge")


def test_median_ignores_the_warm_up():
    calls = []
    assert benchmark.median_seconds(lambda: calls.append(1), repeats=3, warmup=2) < 0.01
    assert len(calls) == 5


def test_time_transformer_trains_and_draws():
    times = benchmark.time_transformer(model_config("smoke"), batch=1, text_tokens=16, device="cpu", repeats=1)
    assert 0 < times["products_seconds"] < times["forward_backward_seconds"]
    assert 0 < times["torch_products_seconds"] < times["forward_backward_seconds"]
    assert 0 < times["forward_seconds"] < times["forward_backward_seconds"]


def test_product_shapes_hold_all_counted_flops():
    config = model_config("smoke")
    inputs = torch.randn(2, 8, 16, 16), torch.randn(2, 16, 256), torch.rand(2)
    shapes = benchmark.product_shapes(EMMDiTTransformer2DModel(**config), inputs)
    flops = sum(2 * rows * width * out * count for (rows, width, out), count in shapes.items())
    assert flops == count_flops(config, batch=2, text_tokens=16).weights


def test_smoke_and_lite_sizes_build():
    for size in ("smoke", "lite"):
        model = build_on_meta(model_config(size))
        assert isinstance(model, EMMDiTTransformer2DModel)
        assert all(p.device == torch.device("meta") for p in model.parameters())


def test_models_beside_each_other_take_turns(monkeypatch):
    clock, order = [0.0], []

    class Timed:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def __call__(self, prompts, output_type):
            assert output_type == "pil"
            order.append(self.name)
            clock[0] += next(self.seconds)
            return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * len(prompts))

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    sampler = SimpleNamespace(arguments=dict)
    slow, fast = Timed("slow", [99, 8, 16, 8]), Timed("fast", [99, 2, 4, 1])  # the first round warms up
    rows = benchmark.time_side_by_side([(slow, sampler), (fast, sampler)], batch=2, repeats=3)
    assert order == ["slow", "fast"] * 4
    assert [row["seconds"] for row in rows] == [8, 2] and rows[1]["images_per_second"] == 1
    mean, low, high = rows[1]["ratio"]
    assert mean == pytest.approx((4 * 4 * 8) ** (1 / 3)) and low < 4 < 8 < high and low * high == pytest.approx(mean**2)
    assert rows[0]["ratio"] == [1, 1, 1]
    with pytest.raises(ValueError, match="repeats"):
        benchmark.time_side_by_side([(slow, sampler)], repeats=1)
