"""Matrix products by oneDNN: the same as torch's own, with gradients, compiled, and only where they are allowed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e_lite.model import cpu_kernels


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SMALL", 0)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gradients(function, *tensors):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    (out * numbers(*out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("narrow", [0, 100], ids=["wide", "narrow"])
@pytest.mark.parametrize("shape", [(5, 24), (3, 7, 24), (2, 3, 4, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients_are_those_of_torch(shape, bias, narrow, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "NARROW", narrow)
    arguments = numbers(*shape), numbers(16, 24), numbers(16) if bias else None
    for mine, theirs in zip(gradients(cpu_kernels.linear, *arguments), gradients(F.linear, *arguments), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_strided_rows_and_frozen_weights():
    rows, weight = numbers(24, 6).t().requires_grad_(), numbers(16, 24)
    cpu_kernels.linear(rows, weight).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(6, 24))


def test_stacks_of_matrices():
    left, right = numbers(4, 6, 5), numbers(4, 7, 5).mT
    torch.testing.assert_close(cpu_kernels.multiply(left, right), left @ right)


def test_one_graph_for_the_compiler():
    layer = cpu_kernels.Linear(24, 16)
    rows = numbers(5, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for mine, theirs in zip(gradients(compiled, rows), gradients(layer, rows), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_flops_are_counted(calls):
    layer = cpu_kernels.Linear(24, 16)
    with FlopCounterMode(display=False) as counter:
        layer(numbers(2, 5, 24)).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 24 * 16), "forward, and the gradient of the weight"


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN is asked from here on."""
    asked, product = [], cpu_kernels.product
    monkeypatch.setattr(cpu_kernels, "product", lambda *arguments: asked.append(1) or product(*arguments))
    monkeypatch.setattr(cpu_kernels, "ONEDNN", True)
    return asked


def test_who_is_asked(calls, monkeypatch):
    layer, rows = cpu_kernels.Linear(24, 16), numbers(5, 24)
    layer(rows)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16
    with cpu_kernels.plain_operations():
        layer(rows)
    torch.func.jvp(layer, (rows,), (rows,))
    cpu_kernels.Linear(24, 16, dtype=torch.bfloat16)(rows.bfloat16())
    monkeypatch.setattr(cpu_kernels, "SMALL", 10**6)
    layer(rows)
    assert len(calls) == 1, "autocast, plain operations, forward mode, bf16 and small products are torch's own"


@pytest.mark.parametrize(("narrow", "asked"), [(16, 3), (17, 2)])
def test_who_is_asked_for_gradients(calls, monkeypatch, narrow, asked):
    monkeypatch.setattr(cpu_kernels, "NARROW", narrow)
    cpu_kernels.linear(numbers(5, 24).requires_grad_(), numbers(16, 24).requires_grad_()).sum().backward()
    assert len(calls) == asked, "forward, rows, and the weight unless it is narrow"


def test_a_model_of_another_library_is_sped_up_in_place(calls):
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8))
    names, expected = list(model.state_dict()), model(numbers(5, 24))
    cpu_kernels.speed_up(model)
    torch.testing.assert_close(model(numbers(5, 24)), expected)
    assert len(calls) == 2 and list(model.state_dict()) == names
