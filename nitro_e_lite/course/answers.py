"""What the exercises of the notebooks are checked against, out of sight of their readers.

Each name is one exercise: the true function and inputs that the notebook does not show. Notebooks hand the
reader's function to `lessons.check` together with one of these.
"""

import math
import re

import torch
from torch import Tensor
from torch.nn import functional as F

from nitro_e_lite.course.lessons import Hidden
from nitro_e_lite.scenes import captions, grammar

_NUMBERS = {"a": 1, "an": 1, "one": 1}
_NUMBERS |= {said: count for count, word in grammar.COUNT_WORDS.items() for said in (word, str(count))}


# 00


def names_two_objects(text: str) -> bool:
    """Whether a caption has only known words and says at least two objects, each with an article or a number."""
    some = "|".join(grammar.SIZES) + "|" + "|".join(grammar.COLORS)
    shapes = "|".join(f"{shape}|{captions.plural(shape)}" for shape in grammar.SHAPES)
    found = re.findall(rf"\b({'|'.join(_NUMBERS)}) (?:(?:{some}) )*(?:{shapes})\b", text.lower())
    return captions.unknown_words(text) == [] and sum(_NUMBERS[word] for word in found) >= 2


equal_steps = Hidden(lambda n: [1 - k / n for k in range(n)], ((1,), (4,), (7,)))
bill = Hidden(
    lambda pictures, steps, guided: pictures * steps * (1 + guided), ((8, 20, True), (8, 4, False), (3, 50, True))
)


# 01

latent_gigabytes = Hidden(
    lambda pictures, channels, side: pictures * channels * side**2 * 2 / 1e9,
    ((13.9e6, 32, 16), (25e6, 32, 32), (1e6, 8, 16)),
)
ring = Hidden(
    lambda distance, w: distance.abs() - w,
    (
        (torch.linspace(-3, 3, 13), 1.0),
        (torch.linspace(-1, 5, 7), 0.25),
        (torch.tensor([[0.0, -2.0], [2.0, 0.5]]), 2.0),
    ),
)


# 02

fewer_numbers = Hidden(lambda f, c: 3 * f**2 / c, ((8, 4), (32, 32), (8, 8), (64, 128)))
shortcut_same_width = Hidden(
    lambda x: F.avg_pool2d(x, 2),
    tuple((torch.arange(float(math.prod(shape))).sin().view(shape),) for shape in ((2, 8, 6, 6), (1, 3, 4, 8))),
)
first_that_knows = Hidden(
    lambda tokens: [k for k, token in enumerate(tokens) if token.strip("Ġ") in grammar.SHAPES][1],
    tuple(
        ([f"Ġ{word}" for word in text.split()] + ["</s>"],)
        for text in (
            "a red circle above a blue square",
            "a small green star and a large red heart in the picture",  # the shape is not always the last word
            "a cross next to a black triangle",
        )
    ),
)


# 03


def _heun_step(x, velocity, t, t_next):
    here = velocity(x, t)
    return x + (t_next - t) * (here + velocity(x + (t_next - t) * here, t_next)) / 2


_POINTS = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
velocity_from_noise = Hidden(
    lambda x_t, eps, t: (eps - x_t) / (1 - t), tuple((_POINTS, _POINTS.flip(0).cos(), t) for t in (0.0, 0.25, 0.9))
)
heun_step = Hidden(
    _heun_step,
    (
        (_POINTS, lambda x, t: x * t, 1.0, 0.5),
        (_POINTS, lambda x, t: x.sin() + 3 * t**2, 0.75, 0.5),
        (_POINTS[0], lambda x, t: x * math.cos(5 * t) - t, 0.25, 0.0),
    ),
)
useful_steps = Hidden(lambda n: n - 1, ((2,), (4,), (20,), (50,)))


# 04


def _block_parameters(width, head_size):
    attention = 4 * width * (width + 1) + 2 * head_size  # q, k, v, out; two gains
    mlp = 3 * width * (width + 1) + width * (3 * width + 1)
    return 2 * (attention + mlp + 2 * width + 12 * width)  # first norm, modulation; two streams


largest_possible_logit = Hidden(lambda head_size: head_size**0.5, ((32,), (64,), (9,)))
text_share = Hidden(
    lambda weights, image_tokens: weights[:, :, :image_tokens, image_tokens:].sum(-1).mean((0, 2)),
    tuple(
        ((torch.arange(float(batch * heads * size**2)).sin() * 3).view(batch, heads, size, size).softmax(-1), image)
        for batch, heads, size, image in ((2, 4, 24, 20), (1, 3, 10, 4))
    ),
)
block_parameters = Hidden(_block_parameters, ((768, 32), (192, 32), (64, 16)))


# 05


def _compression_parameters(width):
    return sum(
        inputs * width + width + width**2 + width
        for inputs in (4 * width, 16 * width, width // 4, width // 16, 3 * width)
    )


def _mean_of_squares(x, height, width):
    grid = x.transpose(1, 2).unflatten(2, (height, width))  # (B, D, H, W)
    return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)


middle_tokens = Hidden(lambda height, width: height * width * 5 // 16, ((32, 48), (16, 16), (8, 32)))
compression_parameters = Hidden(_compression_parameters, ((768,), (192,), (64,)))
mean_of_squares = Hidden(
    _mean_of_squares,
    tuple(
        (torch.arange(float(height * width * 6)).sin().view(2, height * width, 3), height, width)
        for height, width in ((16, 16), (4, 8), (8, 4))
    ),
)


# 06

row_bands = Hidden(lambda side: (4, side * side // 4), ((16,), (8,), (32,)))
plateau = Hidden(lambda known, values: known + (1 - known) / values, ((1 / 4, 8), (1 / 4, 2), (1 / 16, 20)))
halving_length = Hidden(lambda width: 4 * width, ((768,), (192,), (64,)))


# 07

affine_parameters = Hidden(lambda dim, blocks: 12 * dim * (2 * blocks - 1), ((768, 24), (192, 10), (64, 1)))


def same_as_affine(answer) -> bool:
    """Whether the linear layer that `answer` makes gives the six vectors of AdaLN-affine."""
    for width in (64, 48, 32):
        weight, constant = torch.randn(6 * width, width) / width**0.5, torch.randn(6 * width)
        bias, scale, vector = torch.randn(6, width), torch.randn(6, width), torch.randn(3, width)
        six = F.linear(vector, weight, constant).unflatten(1, (6, width))
        found = F.linear(vector, *answer(weight, constant, bias, scale))
        if not torch.allclose(found, (bias + six * (1 + scale)).flatten(1), atol=1e-4):
            return False
    return True


# 08


def _joint_block_parameters(width: int, head_dim: int) -> int:
    attention = 4 * width * width + 4 * width
    mlp = 6 * width * width + 4 * width
    return 2 * (attention + mlp + 2 * width + 2 * head_dim + 12 * width)


tokens_at = Hidden(lambda grid: [grid * grid, grid * grid // 4 + grid * grid // 16], ((32,), (16,), (64,)))
joint_block_parameters = Hidden(_joint_block_parameters, ((768, 32), (192, 48), (64, 16)))


# 09


def _projector_cost(width: int, hidden: int, channels: int) -> list[int]:
    matrices = width * hidden + hidden * hidden + hidden * channels
    return [matrices + 2 * hidden + channels, 512 * matrices]


def _cosine_gradient(p: Tensor, f: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    return torch.autograd.grad(F.cosine_similarity(p, f, dim=-1).sum(), p)[0]


def _shuffled_loss(projected: Tensor, features: Tensor) -> Tensor:
    """The mean over all cyclic shifts of the places, (B,)."""
    count = features.shape[1]
    cosines = [F.cosine_similarity(projected, features.roll(k, 1), dim=-1).mean(1) for k in range(count)]
    return -sum(cosines) / count


def _draw(*shapes: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Pairs of tensors that lean to one side, as features do."""
    generator = torch.Generator().manual_seed(0)
    return tuple(tuple(torch.randn(2, *shape, generator=generator).double() + 0.3) for shape in shapes)


cosine_gradient = Hidden(_cosine_gradient, _draw((5, 16), (2, 3, 8), (4,)))
shuffled_loss = Hidden(_shuffled_loss, _draw((3, 64, 8), (2, 16, 4), (1, 5, 6)))
projector_cost = Hidden(_projector_cost, ((768, 2048, 768), (192, 256, 128), (64, 32, 16)))


# 10


def _forgotten(decay: float) -> list[int]:
    """Updates until the start weighs less than 1 %, without and with the warm-up."""
    left, count = 1.0, 0
    while left >= 0.01:
        left *= min(decay, (1 + count) / (10 + count))
        count += 1
    return [math.ceil(math.log(0.01) / math.log(decay)), count]


half_life_samples = Hidden(
    lambda decay, batch: batch * math.log(0.5) / math.log(decay), ((0.9999, 2048), (0.998, 32), (0.9, 1))
)
variance_left = Hidden(lambda decay: (1 - decay) / (1 + decay), ((0.5,), (0.9,), (0.999,)))
forgotten = Hidden(_forgotten, ((0.9999,), (0.99,), (0.2,)))


# 11


def _shares(rates: list[float]) -> list[float]:
    weights = [p * (1 - p) + 0.05 for p in rates]
    return [weight / sum(weights) for weight in weights]


def _add_rewards(scores: Tensor) -> Tensor:
    return ((scores - scores.mean(0)) / (scores.std(0, correction=0) + 1e-4)).sum(1)


flat_chance = Hidden(lambda p, group: p**group + (1 - p) ** group, ((0.9, 12), (0.5, 2), (0.2, 24)))
prompt_shares = Hidden(_shares, (([1.0, 0.5, 0.0],), ([0.3, 0.9],), ([0.25] * 4,)))
add_rewards = Hidden(
    _add_rewards,
    (
        (torch.tensor([[0.0, 0.29], [1.0, 0.27], [1.0, 0.28], [0.0, 0.28]], dtype=torch.float64),),
        (torch.tensor([[1.0, 30.0, 0.2], [2.0, 10.0, 0.2], [6.0, 20.0, 0.5]], dtype=torch.float64),),
    ),
)


# 12

passes_saved = Hidden(
    lambda steps, guided, student_steps: steps * (1 + guided) / student_steps,
    ((20, True, 4), (20, False, 4), (50, True, 1)),
)
state_between = Hidden(
    lambda x_a, x_b, a, b, level: x_a + (a - level) / (a - b) * (x_b - x_a),
    (
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]), 0.9, 0.4, 0.8),
        (torch.tensor([[3.0], [-1.0]]), torch.tensor([[0.5], [4.0]]), 1.0, 0.25, 0.3),
        (torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), 0.5, 0.0, 0.5),
    ),
)
blurred = Hidden(
    lambda p, a, b: [p * a + (1 - p) * b, p * (1 - p) * (a - b) ** 2],
    ((0.5, -1.0, 1.0), (0.2, 3.0, 1.0), (1.0, 2.0, 7.0)),
)


# 13

circle_time = Hidden(lambda s: math.atan2(s, 1 - s), ((0.0,), (0.2,), (0.75,), (1.0,)))
jump_from_noise = Hidden(lambda F: -F, ((torch.tensor([0.3, -1.0]),), (torch.arange(6.0).sin().view(2, 3),)))
tangent_strength = Hidden(
    lambda rare, usual, c: [rare / usual, (rare + rare * c / usual) / (rare + c)],
    ((30.0, 0.5, 0.1), (1000.0, 0.2, 0.1), (5.0, 2.0, 1.0)),
)


# 14

_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # all that are finite and not negative

step_at = Hidden(
    lambda x: (_E4M3[_E4M3 > x].min() - x).item(), ((20.0,), (1.0,), (15.0,), (240.0,), (2**-6,), (3 * 2**-9,), (0.0,))
)
bytes_ratio = Hidden(
    lambda p, group, scale_bytes: 1 - p / 2 * (1 - scale_bytes / group), ((0.95, 768, 4), (1.0, 32, 1), (0.5, 192, 2))
)
share_needed = Hidden(
    lambda gain, faster: (gain - 1) * faster / (gain * (faster - 1)), ((1.8, 2), (1.5, 4), (1.05, 2), (2.5, 3))
)


# 15

pictures_needed = Hidden(
    lambda p, half: (1.959964 / half) ** 2 * p * (1 - p), ((0.84, 0.01), (0.5, 0.03), (0.05, 0.002))
)
rise = Hidden(
    lambda right, count, lost, categories: right * lost / (count - lost) / categories,
    ((0.28, 100, 9, 6), (0.5, 40, 1, 3), (0.7, 99, 0, 6)),
)
diagonal = Hidden(lambda n, a, b: (a - b) / n, ((50, 8.0, 3.0), (2, 1.0, 0.5), (96, 2.0, 5.0)))


# 16

race_bill = Hidden(
    lambda lanes: sum(2 * steps if guided else steps for steps, guided in lanes),
    (([(20, True), (4, True), (1, True)],), ([(20, True), (4, False)],), ([(7, False)],)),
)
limit = Hidden(
    lambda a, b, c, count: (a + c + b * count) / (a + c + b),
    ((0.02, 0.05, 0.03, 20), (0.001, 1.0, 0.002, 50), (3.0, 0.5, 1.0, 4)),
)


# 17


def _hours(steps: int, work: float, devices: int, peak: float, share: float, gradient: float, link: float) -> float:
    exchange = 2 * (devices - 1) / devices * gradient / link
    return steps * (work / (devices * peak * share) + exchange) / 3600


def _parts(memory: float, samples: int, constant: float, each: float) -> int:
    return next(2**k for k in range(20) if constant + samples / 2**k * each <= memory)


hours = Hidden(
    _hours,
    (
        (150_000, 5.2e14, 8, 989.4e12, 0.3, 1.24e9, 450e9),
        (1000, 3e13, 1, 165e12, 0.5, 1.24e9, 32e9),
        (50_000, 2e14, 64, 1307.4e12, 0.2, 0.62e9, 50e9),
    ),
)
smallest_accumulate = Hidden(
    _parts,
    ((24e9, 512, 9.4e9, 0.249e9), (80e9, 256, 9.4e9, 0.249e9), (16e9, 2048, 6e9, 0.05e9), (48e9, 512, 30e9, 0.3e9)),
)
best_interval = Hidden(lambda save, between: (2 * save * between) ** 0.5, ((10.0, 86_400.0), (15.0, 6000.0)))


# 18

first_loss = Hidden(
    lambda means, spreads: sum(1 + m * m + s * s for m, s in zip(means, spreads, strict=True)) / len(means),
    (([0.0, 0.0], [1.0, 1.0]), ([6.4, -2.0, 0.5], [1.8, 1.0, 0.3]), ([0.0], [0.41])),
)
start_left = Hidden(lambda decay, steps: math.exp(steps * math.log(decay)), ((0.9999, 600), (0.98, 600), (0.5, 3)))
