"""How sure a mean of a few repeats is, or a share of a few trials.

Three runs with three seeds give three numbers. Their mean has an interval that Student's t knows, and a difference that
is smaller than the interval is noise.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, t

from nitro_e_lite.errors import InvalidValue


def interval(values: Sequence[float], together: int = 1) -> tuple[float, float]:
    """Mean of independent repeats and half the width of its 95 % interval (Student's t).

    Args:
        values: one number a repeat.
        together: intervals that are read side by side; each is widened (Bonferroni), so that all of them hold at 95 %.

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise InvalidValue(f"values: {count} given; an interval needs at least two repeats")
    quantile = float(t.ppf(1 - 0.025 / together, count - 1))
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)


def share_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson): unlike mean ± error it stays in [0, 1] and is never of width zero.

    Raises:
        ValueError: `right` is not in 0 .. `count`, or there are none.
    """
    if count < 1 or not 0 <= right <= count:
        raise InvalidValue(f"right={right}, count={count}: must be 0 <= right <= count, count >= 1")
    low, high = binomtest(int(right), int(count)).proportion_ci(method="wilson")
    return float(low), float(high)


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[object],
    kinds: Sequence[object] | None = None,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of `first - second` and its 95 % interval, bootstrapped over groups: pictures of one prompt are alike.

    Args:
        first, second: one number a picture, in the same order.
        groups: what each picture belongs to, such as its prompt.
        kinds: of each picture, such as its prompt's category; the mean is then that of the kinds' means, and groups are
            drawn within each kind.
        resamples: of the bootstrap, the same ones every time.

    Returns:
        Mean, low, high.

    Raises:
        ValueError: not equally many, or none.
    """
    if not len(first) == len(second) == len(groups) or not len(first):
        raise InvalidValue(f"{len(first)}, {len(second)} and {len(groups)} values: must be equally many, > 0")
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    rng, means, drawn = np.random.default_rng(0), [], []
    kinds = [None] * len(groups) if kinds is None else kinds
    for kind in dict.fromkeys(kinds):
        mine = [k for k, own in enumerate(kinds) if own == kind]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups[k] for k in mine))}
        place = np.array([numbers[groups[k]] for k in mine])
        sums, counts = (np.bincount(place, weights=w) for w in (differences[mine], np.ones(len(mine))))
        chosen = rng.integers(len(numbers), size=(resamples, len(numbers)))
        means.append(differences[mine].mean())
        drawn.append(sums[chosen].sum(1) / counts[chosen].sum(1))  # (resamples,)
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return float(np.mean(means)), float(low), float(high)
