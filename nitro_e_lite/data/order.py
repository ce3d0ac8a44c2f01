"""The order in which training reads its data: a pure function of seed and step.

No sampler state exists, so a resumed run continues with the exact next batch, with any number of processes and threads.
"""

from functools import lru_cache

import numpy as np
import torch


def batch_indices(seed: int, length: int, batch_size: int, step: int) -> np.ndarray:
    """Which rows step ``step`` (counted from 0) reads: a fresh permutation each epoch, the incomplete rest left out.

    Args:
        seed: of the order.
        length: rows in the data set.
        batch_size: rows a step, over all processes.
        step: global step.

    Returns:
        int64 (batch_size,).

    Raises:
        ValueError: when a batch is larger than the data set.
    """
    if batch_size > length:
        raise ValueError(f"batch_size={batch_size}: larger than the data set ({length} rows)")
    epoch, position = divmod(step, length // batch_size)
    return _permutation(seed, epoch, length)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch; remembered, because every step of the epoch asks for it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator).numpy()
