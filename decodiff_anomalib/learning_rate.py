"""The learning rate of short trainings; the published one is in :mod:`decodiff_anomalib.paper`."""

import math

FINAL_FACTOR = 0.02


def cosine_learning_rate_factor(step: int, total_steps: float, warmup_steps: int) -> float:
    """Learning rate of a step, in units of its peak: linear warm-up times a cosine (SGDR, Loshchilov & Hutter, 2017).

    Args:
        step: Counted from 0.
        total_steps: Of the whole training; infinite where the end is not known, which leaves the cosine at its peak.
        warmup_steps: Steps until the full rate.

    Returns:
        float: In [0, 1]; the cosine ends at :data:`FINAL_FACTOR`.
    """
    warm_up = min(1.0, (step + 1) / max(1, warmup_steps))
    progress = min(1.0, step / max(1, total_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return warm_up * (FINAL_FACTOR + (1 - FINAL_FACTOR) * cosine)
