"""The deviation schedule: the forward corruption of latents, the training target and the correction step.

Notation of the paper: ``z_0`` clean latents, ``A_t`` the cumulative signal (``alphas_cumprod``), ``a_t = sqrt(A_t)``,
``s_t = sqrt(1 - A_t)``, ``c_t = (1 - a_t) / s_t``, ``n`` the corrupting content, ``m`` the mask (1 keeps), and

    eta = (1 - m) (n - c_t z_0)          the deviation, the network's target
    z_t = z_0 + s_t eta                  = m z_0 + (1 - m) (a_t z_0 + s_t n)

The correction inverts the second line in deterministic steps (DDIM, Song et al. 2021, with the deviation in place of
the noise), from the latents of the image itself and without added noise:

    z_{t-1} = z_t - s_t d + s_{t-1} d,   d = network(z_t, t, category)

Reference: "Correcting Deviations from Normality: A Reformulated Diffusion Model for Multi-Class Unsupervised Anomaly
Detection", CVPR 2025, arXiv 2503.19357: the masked forward process, the Direction of Deviation that the network
predicts, and the correction at inference.
"""

import math
from typing import Literal

import torch
from torch import nn

from decodiff_anomalib.paper import NUM_TRAIN_TIMESTEPS

MAX_BETA = 0.999


def cosine_alphas_cumprod(num_train_timesteps: int) -> torch.Tensor:
    """Cosine schedule of Nichol & Dhariwal (2021, eq. 17): float64 ``(num_train_timesteps,)``, decreasing."""

    def signal(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_train_timesteps)
    betas = [min(1 - signal((i + 1) / num_train_timesteps) / signal(i / num_train_timesteps), MAX_BETA) for i in steps]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def spaced_timesteps(num_train_timesteps: int, num_inference_steps: int, spacing: str) -> list[int]:
    """Timesteps kept for inference, in order of use (descending).

    ``leading`` keeps ``0, k, 2k, ...`` with the smallest stride that gives ``num_inference_steps`` of them, as the
    authors do; counts that no stride gives (6 to 9 of 10) are spread evenly over the whole range instead.
    ``trailing`` starts at the last timestep, so that even a single step undoes the whole deviation.
    """
    if spacing == "trailing":
        stride = num_train_timesteps / num_inference_steps
        return [round(num_train_timesteps - i * stride) - 1 for i in range(num_inference_steps)]
    stride = math.ceil(num_train_timesteps / num_inference_steps)
    if (num_inference_steps - 1) * stride < num_train_timesteps:
        return [i * stride for i in reversed(range(num_inference_steps))]
    spread = (num_train_timesteps - 1) / (num_inference_steps - 1)
    return [round(i * spread) for i in reversed(range(num_inference_steps))]


class DeviationSchedule(nn.Module):
    """Forward corruption, training target and deterministic correction step.

    Args:
        num_train_timesteps: Number of corruption strengths ``T`` the network is trained on.
        num_inference_steps: Number of correction steps, 1 to ``num_train_timesteps``.
        timestep_spacing: ``"leading"`` (the paper) or ``"trailing"``, see :func:`spaced_timesteps`.

    Attributes:
        alphas_cumprod: float64 ``(T,)``.
        timesteps: int64 ``(num_inference_steps,)``, what the network receives, in order of use.

    Raises:
        ValueError: If the number of inference steps or the spacing is out of range.
    """

    def __init__(
        self,
        num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
        num_inference_steps: int = NUM_TRAIN_TIMESTEPS,
        timestep_spacing: Literal["leading", "trailing"] = "leading",
    ) -> None:
        super().__init__()
        if not 1 <= num_inference_steps <= num_train_timesteps:
            msg = f"num_inference_steps={num_inference_steps} must be between 1 and {num_train_timesteps}."
            raise ValueError(msg)
        if timestep_spacing not in {"leading", "trailing"}:
            msg = f"timestep_spacing={timestep_spacing!r} is unknown; valid: 'leading', 'trailing'."
            raise ValueError(msg)
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.alphas_cumprod = cosine_alphas_cumprod(num_train_timesteps)
        timesteps = torch.tensor(spaced_timesteps(num_train_timesteps, num_inference_steps, timestep_spacing))

        # Tables are float64; each coefficient is rounded to float32 before it meets a tensor, as in the reference.
        signal, scale = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.timesteps: torch.Tensor
        self.scales: torch.Tensor
        self.deviation_coefficients: torch.Tensor
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.register_buffer("scales", scale.float(), persistent=False)
        self.register_buffer("deviation_coefficients", ((1 - signal) / scale).float(), persistent=False)

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Deviation ``eta = (1 - m)(n - c_t z_0)``, exactly 0 where the mask keeps.

        Args:
            latents: Clean latents ``(B, C, h, w)``.
            noise: Corrupting content ``(B, C, h, w)``.
            mask: ``(B, h, w)`` or ``(B, 1, h, w)``; 1 keeps, 0 corrupts.
            timesteps: int64 ``(B,)`` in ``[0, num_train_timesteps)``.
        """
        if mask.ndim == latents.ndim - 1:
            mask = mask.unsqueeze(1)
        coefficient = self.deviation_coefficients[timesteps].view(-1, 1, 1, 1)
        return (1 - mask.to(latents.dtype)) * (noise - coefficient * latents)

    def deviate(self, latents: torch.Tensor, deviation: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Push clean ``latents`` along ``deviation``: ``z_t = z_0 + s_t eta``, all ``(B, C, h, w)``."""
        return latents + self.scales[timesteps].view(-1, 1, 1, 1) * deviation

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noisy latents ``z_t``; arguments as :meth:`target`."""
        return self.deviate(latents, self.target(latents, noise, mask, timesteps), timesteps)

    def step(self, latents: torch.Tensor, deviation: torch.Tensor, step_index: int) -> torch.Tensor:
        """One deterministic correction: ``x - s_i d + s_{i-1} d``, and ``x - s_i d`` at the last step.

        Args:
            latents: Latents at ``timesteps[step_index]``, ``(B, C, h, w)``.
            deviation: The network's prediction there, ``(B, C, h, w)``.
            step_index: 0 for the first step of inference.
        """
        corrected = latents - self.scales[self.timesteps[step_index]] * deviation
        if step_index + 1 < self.num_inference_steps:
            corrected = corrected + self.scales[self.timesteps[step_index + 1]] * deviation
        return corrected
