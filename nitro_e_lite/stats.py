"""How sure a mean of a few repeats is, or a share of a few trials.

Three runs with three seeds give three numbers. Their mean has an interval that Student's t knows, and a difference that
is smaller than the interval is noise.
"""

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % points of Student's t for 1 to 10 degrees of freedom; above, a series is exact to three digits.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent repeats and half the width of its 95 % interval (Student's t).

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"values: {count} given; an interval needs at least two repeats")
    return statistics.fmean(values), _t_95(count - 1) * statistics.stdev(values) / math.sqrt(count)


def share_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson): unlike mean ± error it stays in [0, 1] and is never of width zero.

    Raises:
        ValueError: ``right`` is not in 0 .. ``count``, or there are none.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"right={right}, count={count}: must be 0 <= right <= count, count >= 1")
    z2 = 1.959964**2
    centre, half = right + z2 / 2, math.sqrt(z2 * (right * (count - right) / count + z2 / 4))
    return max(0.0, (centre - half) / (count + z2)), min(1.0, (centre + half) / (count + z2))


def _t_95(freedom: int) -> float:
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
