"""How sure a mean of a few repeats is, or a share of a few trials.

Three runs with three seeds give three numbers. Their mean has an interval that Student's t knows, and a difference that
is smaller than the interval is noise.
"""

import math
import statistics
from collections.abc import Sequence

from scipy.stats import binomtest, t

from nitro_e_lite.errors import InvalidValue


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent repeats and half the width of its 95 % interval (Student's t).

    Raises:
        ValueError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise InvalidValue(f"values: {count} given; an interval needs at least two repeats")
    return statistics.fmean(values), float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def share_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson): unlike mean ± error it stays in [0, 1] and is never of width zero.

    Raises:
        ValueError: `right` is not in 0 .. `count`, or there are none.
    """
    if count < 1 or not 0 <= right <= count:
        raise InvalidValue(f"right={right}, count={count}: must be 0 <= right <= count, count >= 1")
    low, high = binomtest(int(right), int(count)).proportion_ci(method="wilson")
    return float(low), float(high)
