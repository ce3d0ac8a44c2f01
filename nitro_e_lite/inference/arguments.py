"""What a person hands to the sampler, checked before any work is done, and the noise drawn from it.

Every function here either returns its argument in the one form the sampler works with or raises an error that
names the field, the value and the rule. Nothing is clamped, rounded or guessed.

Noise is drawn picture by picture, on the generator's device and then moved. With generators on the CPU,
picture i is the same in a batch of one and in a batch of eight, and the same whatever device the model is
on.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from nitro_e_lite.errors import InvalidType, InvalidValue
from nitro_e_lite.model.attention import group_multiple
from nitro_e_lite.model.tokens import RATIOS, compressed_sizes

MAX_STEPS = 1000  # noise levels that timesteps of 1000 can tell apart
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def as_integer(name: str, value: object, minimum: int, maximum: int = 2**63 - 1) -> int:
    """`value` as an int that is at least `minimum` and at most `maximum`.

    Raises:
        TypeError, ValueError: not an integer, below `minimum` or above `maximum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidType(f"{name}: expected an integer, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise InvalidValue(f"{name}: {value} is below {minimum}")
    if value > maximum:
        raise InvalidValue(f"{name}: {value} is above {maximum}")
    return int(value)


def as_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> float:
    """`value` as a finite float that is at least `minimum` and at most `maximum`.

    Raises:
        TypeError, ValueError: not a number, not finite, below `minimum` or above `maximum`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if value > maximum:
        raise InvalidValue(f"{name}: {value} is above {maximum:g}")
    if not minimum <= value <= torch.finfo(torch.float32).max:  # beyond, it is infinite to the model
        raise InvalidValue(f"{name}: {value} is not a finite number of at least {minimum}")
    return float(value)


def as_prompts(name: str, value: object, count: int | None = None) -> list[str]:
    """A string or a list of strings as a list; with `count`, a single string serves for all.

    Raises:
        TypeError: not a string and not a list or tuple of strings.
        ValueError: an empty list, not `count` strings, or half of a surrogate pair in one, which no encoding can hold.
    """
    if isinstance(value, str):
        _check_unicode(name, value)
        return [value] * (count or 1)
    if not isinstance(value, (list, tuple)):
        raise InvalidType(f"{name}: expected a string or a list of strings, got {type(value).__name__}")
    if not value:
        raise InvalidValue(f"{name}: the list is empty; expected at least one string")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise InvalidType(f"{name}[{index}]: expected a string, got {item!r} ({type(item).__name__})")
        _check_unicode(f"{name}[{index}]", item)
    if count is not None and len(value) != count:
        raise InvalidValue(f"{name}: {len(value)} strings for {count} prompts; expected one string or {count}")
    return list(value)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.end + 20])
        raise InvalidValue(f"{name}: {near} is no valid Unicode (half of a surrogate pair); write it again") from None


def as_tensor(name: str, value: object, shape: tuple[int | None, ...]) -> Tensor:
    """A finite floating-point tensor of the given shape; None in `shape` stands for any length.

    Raises:
        TypeError, ValueError: no tensor, no floating-point numbers, another shape, or NaN or infinity inside.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InvalidType(f"{name}: expected a floating-point tensor, got {kind}")
    fits = value.ndim == len(shape) and all(w in (None, s) for w, s in zip(shape, value.shape, strict=True))
    if not fits or value.shape[0] == 0:
        wanted = "(" + ", ".join("any" if w is None else str(w) for w in shape) + ")"
        raise InvalidValue(f"{name}: shape {tuple(value.shape)} does not fit; expected {wanted}")
    if not value.isfinite().all():
        raise InvalidValue(f"{name}: holds NaN or infinity; every number must be finite")
    return value


def as_sigmas(sigmas: object, steps: int | None) -> list[float]:
    """Noise levels as floats that fall strictly from at most 1 and stay above 0 (the final 0 is implied).

    Raises:
        TypeError, ValueError: not numbers, not in that order, or not `steps` of them when that is given too.
    """
    if isinstance(sigmas, str) or not isinstance(sigmas, (Sequence, Tensor)) and not hasattr(sigmas, "tolist"):
        raise InvalidType(f"sigmas: expected a list of numbers, got {type(sigmas).__name__}")
    values = sigmas.tolist() if hasattr(sigmas, "tolist") else list(sigmas)
    if not isinstance(values, list) or not values:
        raise InvalidValue("sigmas: empty; expected at least one noise level")
    values = [as_number(f"sigmas[{index}]", value, 0.0) for index, value in enumerate(values)]
    if values[0] > 1 or values[-1] <= 0 or any(b >= a for a, b in zip(values, values[1:], strict=False)):
        raise InvalidValue(f"sigmas: {values} must fall strictly, from at most 1 to above 0")
    if steps is not None and steps != len(values):
        raise InvalidValue(f"num_inference_steps: {steps} steps for {len(values)} sigmas; give one of the two")
    return values


def as_grid(height: object, width: object, transformer_config: dict, vae_scale_factor: int) -> tuple[int, int]:
    """Picture size in pixels to latent size; None is the size the model was trained at.

    Args:
        height, width: pixels, or None.
        transformer_config: the transformer's configuration.
        vae_scale_factor: pixels a side of one latent.

    Raises:
        TypeError, ValueError: no integer, not a multiple of the patch, larger than the position table, or a
            number of tokens that compression or subregion attention cannot divide.
    """
    config, sides = transformer_config, []
    token = vae_scale_factor * config["patch_size"]  # pixels a side
    step = max(RATIOS) if config["compression"] else 1  # tokens; so that the grid can be compressed
    unit, limit = token * step, token * config["pos_embed_max_size"]
    for name, value in (("height", height), ("width", width)):
        value = config["sample_size"] * vae_scale_factor if value is None else as_integer(name, value, unit)
        if value % unit or value > limit:
            raise InvalidValue(f"{name}: {value} px does not fit; expected a multiple of {unit} up to {limit}")
        sides.append(value)
    groups = group_multiple(config["attention_pattern"])

    def counts(rows: int, columns: int) -> list[int]:
        tokens = rows * columns
        return [tokens, sum(compressed_sizes(rows, columns)) if config["compression"] else tokens]

    tokens, inner = counts(*(side // token for side in sides))
    if tokens % groups or inner % groups:
        fits = next(side for side in itertools.count(step, step) if not any(n % groups for n in counts(side, side)))
        raise InvalidValue(
            f"height, width: {sides[0]} x {sides[1]} px gives {tokens} tokens ({inner} in the middle), which attention "
            f"cannot split in {groups}; try multiples of {fits * token} px"
        )
    return sides[0] // vae_scale_factor, sides[1] // vae_scale_factor


def as_generators(generator: object, count: int) -> list[torch.Generator]:
    """The generator of each picture.

    A list is used as it is, one a picture. A single generator serves all pictures in turn: eight pictures
    at once are the eight that eight calls with that generator would draw, and the first is the one its
    seed alone gives; not so with samplers that draw noise in every step, where only a list gives each picture
    its own. None makes a generator, seeded from torch's global one.

    Raises:
        TypeError, ValueError: something else, or a list of another length than `count`.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
    many = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
    for item in many:
        if not isinstance(item, torch.Generator):
            raise InvalidType(f"generator: expected a torch.Generator or a list of them, got {type(item).__name__}")
    if len(many) != count:
        raise InvalidValue(f"generator: {len(many)} generators for {count} pictures; expected one each")
    return many


def seeded_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator for each seed.

    Raises:
        TypeError, ValueError: a seed that is no integer or that torch does not take.
    """
    return [torch.Generator().manual_seed(as_integer("seed", seed, -(2**63), 2**64 - 1)) for seed in seeds]


def draw_noise(generators: list[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise `(len(generators), *shape)`, float32 on the CPU, drawn picture after picture."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])  # (B, C, H, W)
