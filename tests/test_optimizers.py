"""Muon against torch's own, what its directions look like, and a layer that learns in white coordinates."""

import copy

import pytest
import torch

from nitro_e_lite.training.optimizers import Muon, orthogonalize
from nitro_e_lite.training.weights import plain_weights, whiten_input

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (48, 16)]
BFLOAT16 = 0.03  # torch's Muon iterates in bfloat16, ours in float32 on a CPU: 1 to 2 % of an update of this size


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer, values, number):
    generator = torch.Generator().manual_seed(100 + number)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)
    optimizer.step()


def test_muon_is_torchs_up_to_bfloat16():
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    one, other = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for number in range(5):
        before = [[p.detach().clone() for p in values] for values in (ours, theirs)]
        step(one, ours, number)
        step(other, theirs, number)
        for a, b, start, begun in zip(ours, theirs, *before, strict=True):
            assert ((a - start) - (b - begun)).norm() < BFLOAT16 * (a - start).norm()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(one.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])


def test_directions_are_nearly_orthogonal():
    """Singular values a hundred times apart come out alike; only far smaller ones would stay behind."""
    generator = torch.Generator().manual_seed(1)
    for rows, columns in SHAPES:
        u, _, v = torch.linalg.svd(torch.randn(3, rows, columns, generator=generator), full_matrices=False)
        spread = torch.logspace(-2, 0, min(rows, columns))
        values = torch.linalg.svdvals(orthogonalize(u * spread @ v))
        assert values.min() > 0.6 and values.max() < 1.3, (rows, columns)


def test_the_direction_keeps_the_singular_vectors():
    matrix = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = (u.mT @ orthogonalize(matrix) @ v.mT)[0]  # (6, 6)
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-4


# -- white coordinates


@pytest.fixture(scope="module")
def inputs():
    """Six numbers that vary a hundred times as much along one direction as along another."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    return torch.randn(4000, 6, generator=generator) * torch.logspace(-1, 1, 6) @ turn + 0.5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Linear(3, 2))


def test_a_whitened_layer_computes_the_same_and_is_kept_the_same(model, inputs):
    plain = copy.deepcopy(model)
    whiten_input(model[0], inputs)
    assert torch.allclose(model(inputs[:8]), plain(inputs[:8]), atol=1e-4)
    trained = {name: p.detach() for name, p in model.named_parameters()}
    assert "0.weight" not in trained
    kept = plain_weights(model, trained)
    assert kept.keys() == plain.state_dict().keys()
    plain.load_state_dict(kept)
    assert torch.equal(plain(inputs[:8]), model(inputs[:8]))


def test_its_trained_parameter_sees_white_inputs(model, inputs):
    whiten_input(model[0], inputs, floor=0.0)
    white = inputs.double() @ model[0].parametrizations.weight[0].root.double()
    assert torch.allclose(
        white.T @ white / len(white), inputs.double().square().mean() * torch.eye(6).double(), rtol=1e-3, atol=1e-3
    )


def test_a_direction_in_which_inputs_hardly_vary_is_learned_as_fast_as_the_others(inputs):
    """One step of gradient descent from zero goes the same share of the way in every direction."""
    target = torch.randn(6, 1, generator=torch.Generator().manual_seed(1))
    moment = inputs.T @ inputs / len(inputs)
    directions = torch.linalg.eigh(moment)[1]

    def progress(white):
        layer = torch.nn.Linear(6, 1, bias=False)
        torch.nn.init.zeros_(layer.weight)
        if white:
            whiten_input(layer, inputs, floor=0.0)
        (layer(inputs) - inputs @ target).square().mean().backward()
        with torch.no_grad():
            for p in layer.parameters():
                p.sub_(p.grad, alpha=1e-3)
        return (layer.weight.detach() @ directions)[0] / (target.T @ directions)[0]

    plain, white = progress(False), progress(True)
    assert plain.max() > 1000 * plain.min() > 0
    assert white.max() < 1.01 * white.min()


def test_rare_inputs_do_not_blow_up(model):
    whiten_input(model[0], torch.zeros(10, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0]))  # one direction only
    assert model[0].weight.isfinite().all()
    assert model[0].parametrizations.weight[0].root.abs().max() < 40
