"""How sure a mean of a few repeats is.

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


def _t_95(freedom: int) -> float:
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
