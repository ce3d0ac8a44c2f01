"""Muon against torch's own, and what its directions look like."""

import torch

from nitro_e_lite.optimizers import Muon, orthogonalize

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
