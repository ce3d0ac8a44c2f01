"""Hand-written CPU kernels: the same as torch's own operations, with gradients, and only where they are allowed."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e_lite.model import cpu_kernels
from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel

# -- element-wise passes ---------------------------------------------------------------------------------

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


# -- matrix products --------------------------------------------------------------------------------------


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


# -- mixed precision -------------------------------------------------------------------------------------


any_or_own_size = pytest.mark.parametrize("small", [0, cpu_kernels.SMALL], ids=["any size", "large only"])


def small_model():
    torch.manual_seed(0)
    return EMMDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, caption_channels=8,
        block_groups=(1, 2, 1), attention_pattern=((1, 1), (4, 2)), pos_embed_max_size=16,
    )  # fmt: skip


def inputs():
    return numbers(2, 4, 16, 16), numbers(2, 16, 8), torch.tensor([10.0, 990.0])


def gradients_under(dtype):
    """Output and gradients of the small model under autocast to `dtype`, by name."""
    model = small_model()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(*inputs()).sample
    output.float().square().mean().backward()
    return {"output": output.detach()} | {name: p.grad for name, p in model.named_parameters()}


@any_or_own_size
def test_training_under_autocast_is_that_of_plain_operations(small, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SMALL", small)
    mine = gradients_under(torch.bfloat16)
    with cpu_kernels.plain_operations():
        plain = gradients_under(torch.bfloat16)
    assert mine["output"].dtype == torch.bfloat16
    assert [name for name in plain if not torch.equal(mine[name], plain[name])] == []
    for name, exact in gradients_under(None).items():
        assert (mine[name] - exact).norm() <= 0.1 * exact.norm(), name


@any_or_own_size
def test_accelerate_trains_in_bf16(small, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SMALL", small)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model = small_model()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = []
        for _ in range(3):
            loss = model(*inputs()).sample.square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[2] < losses[1] < losses[0]
