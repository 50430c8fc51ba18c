"""The limit that normal images exceed at a stated rate, from a few dozen of them."""

import math

import torch
from scipy import stats


def prediction_limit(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Upper prediction limit of one more of the log-normal ``values``.

    Student's t on their logarithms: unlike a quantile, it stays honest on a few dozen values, of which one in a hundred
    cannot be read off.

    Args:
        values: ``(N,)``, at least 0, of normal images; 2 or more.
        rate: Share of further values that may exceed the limit, in (0, 1).

    Returns:
        torch.Tensor: The limit, float64 scalar.
    """
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).double().log()
    count = len(logs)
    quantile = float(stats.t.ppf(1 - rate, df=count - 1))
    return (logs.mean() + quantile * logs.std() * math.sqrt(1 + 1 / count)).exp()
