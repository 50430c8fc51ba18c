"""DeCo-Diff from image to anomaly map, top to bottom."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.codec import build_codec
from decodiff_anomalib.conditioning import CategoryRouter
from decodiff_anomalib.corruption import corrupt_latents
from decodiff_anomalib.defects import draw_defects
from decodiff_anomalib.denoiser import SPATIAL_DIVISOR, FoldedDenoiser, build_denoiser
from decodiff_anomalib.discrepancy import (
    NormalRange,
    fuse,
    latent_discrepancy,
    pixel_discrepancy,
    resize_mirrored,
)
from decodiff_anomalib.exemplars import Exemplars
from decodiff_anomalib.features import PACKAGED_BACKBONE, FeatureLatents, FeatureNovelty, VisualFeatures
from decodiff_anomalib.presets import Preset
from decodiff_anomalib.replay import Replay
from decodiff_anomalib.schedule import DeviationSchedule

MIN_LATENT_STD = 0.2
REPLAY_CAPACITY = 512


class Inspection(NamedTuple):
    """What the model makes of a batch of images.

    Attributes:
        pred_score: ``(B,)``, at least 0.
        anomaly_map: ``(B, 1, H, W)``, at least 0.
        category: Category index ``(B,)``; the number of categories means unknown.
        strangeness: How far the images are from all categories, ``(B,)``, unknown above 1; 0 where they were not asked.
        reconstruction: What the correction is where nothing was corrected, ``(B, 3, H, W)``, about [-1, 1]: the images
            through the codec, or themselves where there are exemplars.
        correction: What they should have looked like, ``(B, 3, H, W)``, about [-1, 1]: corrected by the denoiser and,
            where there are exemplars, with what deviates replaced by theirs.
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor
    category: torch.Tensor
    strangeness: torch.Tensor
    reconstruction: torch.Tensor
    correction: torch.Tensor


class DeCoDiffModel(nn.Module):
    """Corrects deviations from normality in the latents of images, and maps what it corrected.

    Args:
        preset: The settings of the method.
        image_size: Working height and width.
        num_categories: Product categories ``K`` the model is conditioned on. Where there are several, or visual
            features join the latents anyway, the category of an image is inferred from it.
        codec: Overrides the preset's codec, see :func:`decodiff_anomalib.codec.build_codec`.

    Attributes:
        fixed_category: Index that all images are taken to be of, ``K`` for unknown; ``None`` infers it.

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
        self.num_categories = num_categories
        self.fixed_category: int | None = None
        self.features = VisualFeatures(preset.features or PACKAGED_BACKBONE) if self._sees else None
        self.feature_latents = FeatureLatents(self.features.channels, num_categories) if preset.features else None
        self.novelty = nn.ModuleDict(
            {level: FeatureNovelty(self.features.level_channels, num_categories) for level in preset.magnifications}
        )
        self.router = CategoryRouter(num_categories, self.features.channels) if self.features else None
        latent_channels = self.codec.latent_channels + (self.feature_latents.channels if self.feature_latents else 0)
        self.denoiser = build_denoiser(
            preset.denoiser,
            latent_channels=latent_channels,
            num_categories=num_categories,
            sample_size=image_size[0] // self.codec.downsample_factor,
        )
        self.schedule = DeviationSchedule(
            num_inference_steps=preset.num_steps, timestep_spacing=preset.timestep_spacing
        )
        self._timesteps: list[int] = self.schedule.timesteps.tolist()
        self.normal_range = NormalRange(preset.available_levels, num_categories) if preset.calibrated else None
        self.exemplars = Exemplars(preset.exemplars, tuple(image_size), num_categories) if preset.exemplars else None
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.normal_deviation: torch.Tensor
        rows = num_categories + 1
        self.register_buffer("latent_mean", torch.zeros(rows, self.codec.latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(rows, self.codec.latent_channels, 1, 1))
        self.register_buffer("normal_deviation", torch.ones(rows, self.codec.latent_channels, 1, 1))
        self._replay = Replay(REPLAY_CAPACITY)

    @property
    def _sees(self) -> bool:
        """Whether visual features are of use: as latents, or to tell several categories apart."""
        return self.preset.features is not None or self.num_categories > 1

    def train(self, mode: bool = True) -> "DeCoDiffModel":
        """Set the mode of the denoiser; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        if self.features:
            self.features.eval()
        return self

    def forward(self, images: torch.Tensor, category: torch.Tensor | None = None) -> Inspection:
        """Image -> category, latents -> correction -> reconstruction -> discrepancy -> score -> corrected image.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``, where it is not to be inferred.
        """
        features = self.features(images) if self.features else None
        category, strangeness = self.route(images, features, category)
        latents = self.encode(images, category, features=features)
        corrected = self.correct(latents, category)
        decoded = self.decode(torch.cat([latents, corrected]), category.repeat(2))
        reconstruction, correction = decoded.unflatten(0, (2, -1)).unbind()

        discrepancies = self.discrepancies(images, features, category, latents, corrected, reconstruction, correction)
        anomaly_map = self.fuse({level: discrepancies[level]() for level in self.preset.levels}, category)
        pred_score = self.score(anomaly_map)
        if self.exemplars:
            # what the codec loses is not for the denoiser to take away
            reconstruction, correction = images, images + (correction - reconstruction)
            deviating = self.exemplars.deviating(self._cells(anomaly_map), category)
            correction = self.exemplars(correction, deviating, category)
        return Inspection(pred_score, anomaly_map, category, strangeness, reconstruction, correction)

    def route(
        self, images: torch.Tensor, features: torch.Tensor | None, category: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Category index ``(B,)`` and strangeness ``(B,)``: as given, as fixed, or as inferred, in this order."""
        ours = torch.zeros_like(images[:, 0, 0, 0])
        if category is not None:
            return category, ours
        if self.fixed_category is not None:
            return torch.full_like(ours, self.fixed_category, dtype=torch.long), ours
        if self.router is None:
            return ours.long(), ours
        return self.router(features)

    def encode(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        generator: torch.Generator | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents ``(B, C, h, w)``: the codec's, then the features, both in the units of :meth:`fit`.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: ``(B,)``, whose units they are.
            generator: For codecs that sample, see :mod:`decodiff_anomalib.codec`.
            features: The images' features, where they were extracted already.
        """
        with torch.autocast(images.device.type, enabled=False):  # deviations are small differences of latents
            latents = self.codec.encode(images, generator=generator)
            latents = (latents - self.latent_mean[category]) / self.latent_std[category]
        if not self.feature_latents:
            return latents
        features = self.features(images) if features is None else features
        return torch.cat([latents, self.feature_latents(features, category)], dim=1)

    def decode(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)`` of :meth:`encode`'s latents; the features are not needed for it."""
        latents = latents[:, : self.codec.latent_channels]
        return self.codec.decode(latents * self.latent_std[category] + self.latent_mean[category])

    def correct(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Undo deviations from ``latents`` ``(B, C, h, w)``, which are taken as the most deviated state: no noise."""
        for index, timestep in enumerate(self._timesteps):
            latents = self.schedule.step(latents, self.denoiser(latents, timestep, category), index)
        return latents

    def discrepancies(
        self,
        images: torch.Tensor,
        features: torch.Tensor | None,
        category: torch.Tensor,
        latents: torch.Tensor,
        corrected: torch.Tensor,
        reconstruction: torch.Tensor,
        correction: torch.Tensor,
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """Maps ``(B, 1, H, W)`` by level, for the asking: which are fused is the preset's matter."""
        preset, size = self.preset, reconstruction.shape[-2:]
        before, after = (self._in_normal_deviations(part, category) for part in (latents, corrected))
        return {
            "pixel": lambda: pixel_discrepancy(correction, reconstruction, preset.pixel_clip, preset.pixel_sigma),
            "latent": lambda: latent_discrepancy(after, before, size, preset.latent_clip, preset.latent_sigma),
            "feature": lambda: resize_mirrored(self.novelty["feature"](features, category), size),
            "detail": lambda: resize_mirrored(
                self.novelty["detail"](self.features(images, preset.magnification), category), size
            ),
        }

    def _in_normal_deviations(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """The codec's latents in units of what normal images of the category are corrected by."""
        return latents[:, : self.codec.latent_channels] / self.normal_deviation[category]

    def fuse(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> torch.Tensor:
        """Anomaly map ``(B, 1, H, W)`` of the maps of the preset's levels."""
        if self.normal_range:
            maps = {level: self.normal_range(values, level, category) for level, values in maps.items()}
        weights = [self.preset.levels[level] for level in maps]
        return fuse(*maps.values(), weights=weights, mode=self.preset.fusion)

    def score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Score ``(B,)`` of maps ``(B, 1, H, W)``: their maximum, or the mean of the highest cells of the latent grid.

        A defect covers several cells. One cell alone, which noise can raise, says less than they do.
        """
        if not self.preset.score_share:
            return anomaly_map.amax(dim=(1, 2, 3))
        cells = self._cells(anomaly_map).flatten(1)
        highest = math.ceil(self.preset.score_share * cells.shape[1])
        return cells.topk(highest, dim=1).values.mean(1)

    def _cells(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, 1, H, W)`` on the latent grid, ``(B, 1, h, w)``."""
        return F.avg_pool2d(anomaly_map, self.codec.downsample_factor)

    def folded(self) -> "DeCoDiffModel":
        """A copy for inference alone: what no image changes is worked out, see :class:`FoldedDenoiser`."""
        folded = copy.deepcopy(self, {id(self._replay): None})
        folded.denoiser = FoldedDenoiser(folded.denoiser, self._timesteps)
        return folded.eval()

    # ---------------------------------------------------------------- what normal images are like

    @torch.no_grad()
    def fit(self, images: torch.Tensor, category: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Learn the latent space and the categories of normal training images, and keep some as exemplars.

        Where the preset scales latents, each channel gets zero mean and unit variance, category by category: a codec
        serves any picture, the parts of one product use a small range of it. Channels that hardly vary are scaled less,
        so that their noise is not blown up.

        Args:
            images: ``(N, 3, H, W)`` in [-1, 1].
            category: ``(N,)``.
            generator: Source of randomness, on the CPU.
        """
        self._replay = Replay(REPLAY_CAPACITY)  # older samples are in other units
        if self.preset.scale_latents:
            latents = torch.cat([self.codec.encode(chunk) for chunk in images.split(16)])
            for row, chosen in self._rows(category):
                variance, mean = torch.var_mean(latents[chosen], dim=(0, 2, 3), keepdim=True)
                self.latent_mean[row] = mean[0]
                self.latent_std[row] = variance[0].sqrt().clamp_min(MIN_LATENT_STD * variance.mean().sqrt())
        if self.features:
            self._fit_features(images, category, generator)
        if self.exemplars:
            for row, chosen in self._rows(category):
                self.exemplars.fit(row, images[chosen])

    def _fit_features(self, images: torch.Tensor, category: torch.Tensor, generator: torch.Generator | None) -> None:
        """Learn from visual features how to tell categories apart, their latents, and what is not new."""
        features = torch.cat([self.features(chunk) for chunk in images.split(16)])
        self.router.fit(self.router.pool(features), category)
        if self.feature_latents:
            for row, chosen in self._rows(category):
                self.feature_latents.fit(row, features[chosen])
        for level, magnification in self.preset.magnifications.items():
            if magnification != 1:
                features = torch.cat([self.features(chunk, magnification) for chunk in images.split(16)])
            for row, chosen in self._rows(category):
                self.novelty[level].fit(row, features[chosen], generator)

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor, category: torch.Tensor) -> None:
        """Learn from normal images that were not trained on what is normal: strangeness, correction, maps.

        Where the preset scales latents, their discrepancies are stated in units of the mean correction of each channel,
        category by category, so that a channel which is always corrected a little drowns no other; then the maps have
        their range, and cells of the corrected image are replaced above a threshold.

        Args:
            images: ``(N, 3, H, W)`` in [-1, 1].
            category: ``(N,)``.
        """
        chunks = [
            (part, self.features(part) if self.features else None, index)
            for part, index in zip(images.split(16), category.split(16), strict=True)
        ]
        if self.router:
            self.router.calibrate(torch.cat([self.router.pool(features) for _, features, _ in chunks]), category)
        if not self.preset.scale_latents:
            return
        latents = [self.encode(part, index, features=features) for part, features, index in chunks]
        corrected = [self.correct(part, index) for part, (*_, index) in zip(latents, chunks, strict=True)]
        corrections = (torch.cat(corrected) - torch.cat(latents))[:, : self.codec.latent_channels].abs()
        corrections = corrections.mean(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
        for row, chosen in self._rows(category):
            self.normal_deviation[row] = corrections[chosen].mean(0)
        parts = [
            self.discrepancies(*chunk, before, after, *(self.decode(part, chunk[-1]) for part in (before, after)))
            for chunk, before, after in zip(chunks, latents, corrected, strict=True)
        ]
        maps = {level: torch.cat([part[level]() for part in parts]) for level in self.preset.available_levels}
        self._calibrate_maps(maps, category)

    def _calibrate_maps(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> None:
        """Learn the range of ``maps`` of normal images, and above what their fused cells deviate."""
        if self.normal_range:
            for level, values in maps.items():
                for row, chosen in self._rows(category):
                    self.normal_range.fit(row, level, values[chosen])
        if self.exemplars:
            cells = self._cells(self.fuse({level: maps[level] for level in self.preset.levels}, category))
            for row, chosen in self._rows(category):
                self.exemplars.calibrate(row, cells[chosen])

    @staticmethod
    def _rows(category: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Row of the tables by category, and which images it is of; the last row is of all."""
        every = torch.ones_like(category, dtype=torch.bool)
        return [*((int(index), category == index) for index in category.unique()), (-1, every)]

    # ---------------------------------------------------------------- training

    def training_loss(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted deviation of corrupted normal images, as published.

        Args:
            images: Normal images ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``.
            generator: Source of all randomness, on the CPU.
        """
        with torch.no_grad():
            category = self._forget(category, generator)
            if self.preset.corruption == "patches":
                latents = self.encode(images, category, generator=generator)
                timesteps = self._draw_timesteps(latents, generator)
                noise, mask = corrupt_latents(latents, generator=generator)
                deviation = self.schedule.target(latents, noise, mask, timesteps)
            else:
                fresh, category = images[: self.preset.fresh_per_step], category[: self.preset.fresh_per_step]
                both = torch.cat([fresh, draw_defects(fresh, generator)])
                latents, defective = self.encode(both, category.repeat(2)).chunk(2)
                num_samples = max(len(fresh), self.preset.samples_per_step)
                latents, deviation, category = self._replay.exchange(
                    latents, defective - latents, category, num_samples, generator
                )
                timesteps = self._draw_timesteps(latents, generator)
            deviated = self.schedule.deviate(latents, deviation, timesteps)
        predicted = self.denoiser(deviated, timesteps, category)
        return (deviation - predicted).square().mean()

    def _draw_timesteps(self, latents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Timesteps ``(B,)`` to learn from."""
        used = self.preset.train_timesteps == "used"
        choice = self.schedule.timesteps if used else torch.arange(self.schedule.num_train_timesteps)
        drawn = torch.randint(len(choice), (len(latents),), generator=generator)
        return choice.to(latents.device)[drawn.to(latents.device)]

    def _forget(self, category: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Make some categories unknown, so that the model can do without; where there are several."""
        if self.num_categories == 1 or not self.preset.category_dropout:
            return category
        forgotten = torch.rand(len(category), generator=generator) < self.preset.category_dropout
        return category.masked_fill(forgotten.to(category.device), self.num_categories)
