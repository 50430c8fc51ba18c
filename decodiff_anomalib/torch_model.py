"""DeCo-Diff from image to anomaly map, top to bottom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn

from decodiff_anomalib.codec import build_codec
from decodiff_anomalib.corruption import corrupt_latents
from decodiff_anomalib.defects import draw_defects
from decodiff_anomalib.denoiser import SPATIAL_DIVISOR, build_denoiser
from decodiff_anomalib.discrepancy import (
    fuse,
    gaussian_blur,
    latent_discrepancy,
    pixel_discrepancy,
    resize_mirrored,
)
from decodiff_anomalib.features import VisualFeatures
from decodiff_anomalib.presets import Preset
from decodiff_anomalib.replay import Replay
from decodiff_anomalib.schedule import DeviationSchedule

MIN_LATENT_STD = 0.2
REPLAY_CAPACITY = 512


class Correction(NamedTuple):
    """What the model makes of a batch of images.

    Attributes:
        reconstruction: The images through the codec alone, ``(B, 3, H, W)``, about [-1, 1].
        correction: What they should have looked like, ``(B, 3, H, W)``, about [-1, 1].
        anomaly_map: ``(B, 1, H, W)``, at least 0.
        pred_score: ``(B,)``, at least 0.
    """

    reconstruction: torch.Tensor
    correction: torch.Tensor
    anomaly_map: torch.Tensor
    pred_score: torch.Tensor


class DeCoDiffModel(nn.Module):
    """Corrects deviations from normality in the latents of images, and maps what it corrected.

    Args:
        preset: The settings of the method.
        image_size: Working height and width.
        num_categories: Product categories the denoiser is conditioned on.
        codec: Overrides the preset's codec, see :func:`decodiff_anomalib.codec.build_codec`.

    Raises:
        ValueError: If the image size does not fit the codec and the denoiser.
    """

    def __init__(
        self,
        preset: Preset,
        image_size: Sequence[int] = (256, 256),
        num_categories: int = 1,
        codec: str | Path | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.preset = preset
        self.codec = build_codec(preset.codec if codec is None else codec)
        divisor = self.codec.downsample_factor * SPATIAL_DIVISOR
        if any(side < divisor or side % divisor for side in image_size):
            nearest = tuple(max(1, round(side / divisor)) * divisor for side in image_size)
            msg = f"image_size={tuple(image_size)} must be multiples of {divisor} pixels, such as {nearest}."
            raise ValueError(msg)
        self.features = VisualFeatures(preset.features) if preset.features else None
        latent_channels = self.codec.latent_channels + (self.features.channels if self.features else 0)
        self.denoiser = build_denoiser(
            preset.denoiser,
            latent_channels=latent_channels,
            num_categories=num_categories,
            sample_size=image_size[0] // self.codec.downsample_factor,
        )
        self.schedule = DeviationSchedule(
            num_inference_steps=preset.num_steps, timestep_spacing=preset.timestep_spacing
        )
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.register_buffer("latent_mean", torch.zeros(self.codec.latent_channels, 1, 1))
        self.normal_deviation: torch.Tensor
        self.register_buffer("latent_std", torch.ones(self.codec.latent_channels, 1, 1))
        self.register_buffer("normal_deviation", torch.ones(latent_channels, 1, 1))
        self._replay = Replay(REPLAY_CAPACITY)

    def train(self, mode: bool = True) -> "DeCoDiffModel":
        """Set the mode of the denoiser; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        if self.features:
            self.features.eval()
        return self

    def forward(self, images: torch.Tensor, category: torch.Tensor | None = None) -> InferenceBatch:
        """Detect anomalies in ``images`` ``(B, 3, H, W)`` in [-1, 1], of category index ``(B,)``."""
        inspected = self.inspect(images, category)
        return InferenceBatch(pred_score=inspected.pred_score, anomaly_map=inspected.anomaly_map)

    def inspect(self, images: torch.Tensor, category: torch.Tensor | None = None) -> Correction:
        """Image -> latents -> correction -> reconstruction -> discrepancy -> score; arguments as :meth:`forward`."""
        features = self.features.extract(images) if self.features else None
        latents = self.encode(images, features=features)
        corrected = self.correct(latents, category)
        decoded = self.decode(torch.cat([latents, corrected]))
        reconstruction, correction = decoded.unflatten(0, (2, -1)).unbind()

        preset, size, scale = self.preset, images.shape[-2:], self.normal_deviation
        maps = [
            pixel_discrepancy(correction, reconstruction, preset.pixel_clip, preset.pixel_sigma),
            latent_discrepancy(corrected / scale, latents / scale, size, preset.latent_clip, preset.latent_sigma),
        ]
        if self.features:
            maps.append(resize_mirrored(gaussian_blur(self.features.novelty(features), preset.latent_sigma), size))
        anomaly_map = fuse(*maps, mode=preset.fusion)
        return Correction(reconstruction, correction, anomaly_map, anomaly_map.amax(dim=(1, 2, 3)))

    def encode(
        self,
        images: torch.Tensor,
        generator: torch.Generator | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents ``(B, C, h, w)``: the codec's, then the features, both scaled by :meth:`fit_latents`.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            generator: For codecs that sample, see :mod:`decodiff_anomalib.codec`.
            features: The images' features, where they were extracted already.
        """
        with torch.autocast(images.device.type, enabled=False):  # deviations are small differences of latents
            latents = (self.codec.encode(images, generator=generator) - self.latent_mean) / self.latent_std
        if not self.features:
            return latents
        features = self.features.extract(images) if features is None else features
        return torch.cat([latents, self.features(features)], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)`` of :meth:`encode`'s latents; the features are not needed for it."""
        return self.codec.decode(latents[:, : self.codec.latent_channels] * self.latent_std + self.latent_mean)

    @torch.no_grad()
    def fit_latents(self, images: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Scale each latent channel to zero mean and unit variance on normal ``images`` ``(N, 3, H, W)``.

        A codec serves any picture; the parts of one product use a small range of it. Channels that hardly vary are
        scaled less, so that their noise is not blown up.
        """
        latents = self.codec.encode(images)
        variance, mean = torch.var_mean(latents, dim=(0, 2, 3), keepdim=True)
        floor = MIN_LATENT_STD * variance.mean().sqrt()
        self.latent_mean.copy_(mean[0])
        self.latent_std.copy_(variance[0].sqrt().clamp_min(floor))
        if self.features:
            self.features.fit(images, generator)

    @torch.no_grad()
    def fit_normal_deviation(self, images: torch.Tensor) -> None:
        """Measure how much each latent channel of normal ``images`` ``(N, 3, H, W)`` is corrected, on average.

        Discrepancies are stated in this unit, so that a channel which is always corrected a little drowns no other.
        """
        latents = self.encode(images)
        deviation = (self.correct(latents) - latents).abs().mean(dim=(0, 2, 3))
        self.normal_deviation.copy_(deviation.clamp_min(torch.finfo(deviation.dtype).tiny).view(-1, 1, 1))

    def correct(self, latents: torch.Tensor, category: torch.Tensor | None = None) -> torch.Tensor:
        """Undo deviations from ``latents`` ``(B, C, h, w)``, which are taken as the most deviated state: no noise."""
        category = self._category_of(latents, category)
        for index in range(self.schedule.num_inference_steps):
            timesteps = self.schedule.timesteps[index].expand(latents.shape[0])
            latents = self.schedule.step(latents, self.denoiser(latents, timesteps, category), index)
        return latents

    def training_loss(
        self,
        images: torch.Tensor,
        category: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted deviation of corrupted normal images, as published.

        Args:
            images: Normal images ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``.
            generator: Source of all randomness, on the CPU.
        """
        steps = self.schedule.num_train_timesteps
        with torch.no_grad():
            if self.preset.corruption == "patches":
                latents = self.encode(images, generator=generator)
                timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
                noise, mask = corrupt_latents(latents, generator=generator)
                deviation = self.schedule.target(latents, noise, mask, timesteps)
            else:
                fresh = images[: self.preset.fresh_per_step]
                latents, defective = self.encode(torch.cat([fresh, draw_defects(fresh, generator)])).chunk(2)
                num_samples = max(len(fresh), self.preset.samples_per_step)
                latents, deviation = self._replay.exchange(latents, defective - latents, num_samples, generator)
                timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
            deviated = self.schedule.deviate(latents, deviation, timesteps)
        predicted = self.denoiser(deviated, timesteps, self._category_of(latents, category))
        return (deviation - predicted).square().mean()

    @staticmethod
    def _category_of(latents: torch.Tensor, category: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(latents[:, 0, 0, 0], dtype=torch.long) if category is None else category
