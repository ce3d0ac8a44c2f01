"""Hand-written backward passes against autograd through plain operations."""

import pytest
import torch
import torch.nn.functional as F

from nitro_e_lite.model import cpu_kernels

SHAPES = [(3, 10, 16), (1, 7, 8), (5, 1, 4)]


def check(function, *arguments, tolerance=1e-10):
    arguments = [x.requires_grad_() for x in arguments]
    output = function(*arguments)
    direction = torch.randn_like(output)
    mine = [output, *torch.autograd.grad(output, arguments, direction)]
    with cpu_kernels.plain_operations():
        output = function(*arguments)
        plain = [output, *torch.autograd.grad(output, arguments, direction)]
    torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(function(*arguments), plain[0], rtol=tolerance, atol=tolerance)


def tensors(shape):
    torch.manual_seed(0)
    sample = (shape[0], shape[2])
    return [torch.randn(s, dtype=torch.double) for s in (shape, sample, sample, shape)]


@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_norm(shape):
    tokens, scale, shift, _ = tensors(shape)
    check(lambda *x: cpu_kernels.modulated_norm(*x, 1e-5), tokens, scale, shift)
    expected = torch.stack(
        [F.layer_norm(t, shape[2:], w, b, 1e-5) for t, w, b in zip(tokens, scale, shift, strict=True)]
    )
    torch.testing.assert_close(cpu_kernels.modulated_norm(tokens, scale, shift, 1e-5), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "CACHE_ELEMENTS", 2 * shape[1] * shape[2])
    tokens, gate, _, update = tensors(shape)
    check(cpu_kernels.gated_residual, tokens, gate, update)
    torch.testing.assert_close(cpu_kernels.gated_residual(tokens, gate, update), tokens + gate[:, None] * update)


def test_gelu():
    values = torch.linspace(-12, 12, 4096).view(4, 16, 64)
    check(cpu_kernels.gelu, values, tolerance=3e-6)


def test_pieces_cover_the_batch_once(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "CACHE_ELEMENTS", 100)
    for batch, elements in [(1, 1000), (7, 30), (8, 50), (3, 0)]:
        covered = [i for piece in cpu_kernels.pieces(batch, elements) for i in range(batch)[piece]]
        assert covered == list(range(batch))
        assert all((p.stop - p.start) * elements <= max(100, elements) for p in cpu_kernels.pieces(batch, elements))


def test_plain_operations_end_with_the_block():
    tensor = torch.zeros(1)
    assert cpu_kernels.usable(tensor)
    with cpu_kernels.plain_operations():
        assert not cpu_kernels.usable(tensor)
    assert cpu_kernels.usable(tensor)
    assert not torch.func.jvp(lambda x: x * cpu_kernels.usable(x), (tensor,), (tensor,))[0].any()
