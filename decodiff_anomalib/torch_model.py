"""DeCo-Diff from image to anomaly map, top to bottom."""

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.calibration import NormalRange
from decodiff_anomalib.codec import Codec, build_codec
from decodiff_anomalib.conditioning import CategoryRouter
from decodiff_anomalib.corruption import ReplayBuffer, corrupt_latents, draw_defects
from decodiff_anomalib.denoiser import SPATIAL_DIVISOR, FoldedDenoiser, build_denoiser
from decodiff_anomalib.discrepancy import fuse, latent_discrepancy, pixel_discrepancy, resize_mirrored
from decodiff_anomalib.exemplars import Exemplars
from decodiff_anomalib.features import PACKAGED_BACKBONE, FeatureLatents, MemoryBank, VisualFeatures
from decodiff_anomalib.schedule import DeviationSchedule
from decodiff_anomalib.settings import Settings

MIN_LATENT_STD = 0.2
CHUNK = 16  # images that are fitted or measured at once


class Observation(NamedTuple):
    """What the model knows of a batch of images before it corrects them.

    Attributes:
        images: ``(B, 3, H, W)`` in [-1, 1].
        features: Visual features ``(B, F, h, w)``; ``None`` where the model has no backbone.
        category: Category index ``(B,)``; the number of categories means unknown.
        ood_score: Out-of-distribution score ``(B,)``, unknown above 1; 0 where the category was given.
        latents: ``(B, C, h, w)``, about unit variance.
    """

    images: torch.Tensor
    features: torch.Tensor | None
    category: torch.Tensor
    ood_score: torch.Tensor
    latents: torch.Tensor


class ModelOutput(NamedTuple):
    """Predictions for a batch of images.

    Attributes:
        pred_score: ``(B,)``, at least 0.
        anomaly_map: ``(B, 1, H, W)``, at least 0.
        category_index: ``(B,)``; the number of categories means unknown.
        ood_score: Out-of-distribution score ``(B,)``, unknown above 1; 0 where the category was given.
        reconstruction: The correction of an image without deviation, ``(B, 3, H, W)``, about [-1, 1]: the image through
            the codec or, with exemplars, the image itself.
        correction: The corrected image ``(B, 3, H, W)``, about [-1, 1]; with exemplars, they fill what deviates.
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor
    category_index: torch.Tensor
    ood_score: torch.Tensor
    reconstruction: torch.Tensor
    correction: torch.Tensor


class DeCoDiffModel(nn.Module):
    """Corrects deviations from normality in the latents of images, and maps what was corrected.

    Args:
        settings: The settings of the method.
        image_size: Working height and width.
        num_categories: Product categories ``K`` the model is conditioned on. The category of an image is inferred from
            visual features where there are several, or where features are latents anyway.
        codec: Overrides ``settings.latents.codec``, see :func:`decodiff_anomalib.codec.build_codec`.
        features: A backbone to share, which must be that of the settings; built by default.
        seed: Of the denoiser's initial weights.

    Attributes:
        fixed_category: Index used for all images, ``K`` for unknown; ``None`` infers it.

    Raises:
        ValueError: If the image size does not fit the codec and the denoiser.
    """

    def __init__(
        self,
        settings: Settings,
        image_size: Sequence[int] = (256, 256),
        num_categories: int = 1,
        codec: Codec | str | Path | dict[str, Any] | None = None,
        features: VisualFeatures | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_categories = num_categories
        self.fixed_category: int | None = None
        rows = num_categories + 1

        self.codec = build_codec(settings.latents.codec if codec is None else codec)
        divisor = self.codec.downsample_factor * SPATIAL_DIVISOR
        if any(side < divisor or side % divisor for side in image_size):
            nearest = tuple(max(1, round(side / divisor)) * divisor for side in image_size)
            msg = f"image_size={tuple(image_size)} must be multiples of {divisor} pixels, such as {nearest}."
            raise ValueError(msg)
        latent_channels = self.codec.latent_channels
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.normal_deviation: torch.Tensor
        self.register_buffer("latent_mean", torch.zeros(rows, latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(rows, latent_channels, 1, 1))
        self.register_buffer("normal_deviation", torch.ones(rows, latent_channels, 1, 1))

        backbone = settings.latents.backbone
        self.features: VisualFeatures | None = None
        if backbone or num_categories > 1:
            self.features = features or VisualFeatures(backbone or PACKAGED_BACKBONE)
        self.router = CategoryRouter(num_categories, self.features.channels) if self.features else None
        self.feature_latents: FeatureLatents | None = None
        self.memory_banks = nn.ModuleDict()
        if self.features and backbone:
            self.feature_latents = FeatureLatents(self.features.channels, num_categories)
            latent_channels += self.feature_latents.channels
            for level in settings.magnifications:
                self.memory_banks[level] = MemoryBank(self.features.stride_channels, num_categories)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # here, so that weights do not depend on what else was built before
            self.denoiser = build_denoiser(
                settings.denoiser.size,
                latent_channels=latent_channels,
                num_categories=num_categories,
                sample_size=image_size[0] // self.codec.downsample_factor,
            )
        self.schedule = DeviationSchedule(
            num_inference_steps=settings.correction.num_steps, timestep_spacing=settings.correction.timestep_spacing
        )
        self._timesteps: list[int] = self.schedule.timesteps.tolist()

        self.normal_range = (
            NormalRange(settings.available_levels, num_categories) if settings.maps.normal_range else None
        )
        exemplars = settings.correction.exemplars
        self.exemplars = Exemplars(exemplars, (image_size[0], image_size[1]), num_categories) if exemplars else None

    def train(self, mode: bool = True) -> "DeCoDiffModel":
        """Set the mode of the denoiser; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.codec.eval()
        if self.features:
            self.features.eval()
        return self

    # ---------------------------------------------------------------- from image to map

    def forward(self, images: torch.Tensor, category: torch.Tensor | None = None) -> ModelOutput:
        """Image -> latents -> correction -> discrepancy maps -> fused map -> score.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``; inferred where it is not given.
        """
        observed = self.observe(images, category)
        corrected = self.correct(observed.latents, observed.category)
        both = self.decode(torch.cat([observed.latents, corrected]), observed.category.repeat(2))
        reconstruction, decoded = both.unflatten(0, (2, -1)).unbind()
        maps = self.level_maps(self.settings.maps.levels, observed, corrected, reconstruction, decoded)
        anomaly_map = self.fuse(maps, observed.category)
        pred_score = self.score(anomaly_map)
        category, ood_score = observed.category, observed.ood_score
        if self.exemplars is None:
            return ModelOutput(pred_score, anomaly_map, category, ood_score, reconstruction, decoded)
        # The difference of the two decoded images carries the correction without the loss of the codec.
        faded = images + (decoded - reconstruction)
        deviating = self.exemplars.deviating(self._cells(anomaly_map), category)
        correction = self.exemplars(faded, deviating, category)
        return ModelOutput(pred_score, anomaly_map, category, ood_score, images, correction)

    def observe(self, images: torch.Tensor, category: torch.Tensor | None = None) -> Observation:
        """Features, category and latents of a batch, each computed once; arguments as :meth:`forward`."""
        features = self.features(images) if self.features else None
        index, ood_score = self.route(images, features, category)
        return Observation(images, features, index, ood_score, self.encode(images, index, features))

    def route(
        self, images: torch.Tensor, features: torch.Tensor | None, category: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Category index ``(B,)`` and out-of-distribution score ``(B,)``: as given, else as fixed, else inferred."""
        zeros = torch.zeros_like(images[:, 0, 0, 0])
        if category is not None:
            return category, zeros
        if self.fixed_category is not None:
            return torch.full_like(zeros, self.fixed_category, dtype=torch.long), zeros
        if self.router is None or features is None:
            return zeros.long(), zeros
        return self.router(features)

    def encode(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        features: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Latents ``(B, C, h, w)``: those of the codec, then the features, both in the units of :meth:`fit`.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``, which selects the units.
            features: The images' features, where they have been computed already.
            generator: For codecs that sample, see :mod:`decodiff_anomalib.codec`.
        """
        with torch.autocast(images.device.type, enabled=False):  # deviations are small differences of latents
            latents = self.codec.encode(images, generator=generator)
            latents = (latents - self.latent_mean[category]) / self.latent_std[category]
        if self.features is None or self.feature_latents is None:
            return latents
        features = self.features(images) if features is None else features
        return torch.cat([latents, self.feature_latents(features, category)], dim=1)

    def correct(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Corrected latents; ``latents`` ``(B, C, h, w)`` are taken as the most deviated state, without added noise.

        The inference of the paper: ``z <- z - s_i d + s_{i-1} d``, with ``d`` the predicted deviation.
        """
        for index, timestep in enumerate(self._timesteps):
            latents = self.schedule.step(latents, self.denoiser(latents, timestep, category), index)
        return latents

    def decode(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)``, about [-1, 1], of the codec's channels of ``latents`` ``(B, C, h, w)``."""
        own = latents[:, : self.codec.latent_channels]
        return self.codec.decode(own * self.latent_std[category] + self.latent_mean[category])

    def level_maps(
        self,
        levels: Iterable[str],
        observed: Observation,
        corrected: torch.Tensor,
        reconstruction: torch.Tensor,
        decoded: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Discrepancy map ``(B, 1, H, W)`` of each of ``levels``.

        Args:
            levels: Names of the maps.
            observed: The batch.
            corrected: Corrected latents ``(B, C, h, w)``.
            reconstruction: Decoded latents ``(B, 3, H, W)``.
            decoded: Decoded corrected latents ``(B, 3, H, W)``.
        """
        settings, category = self.settings.maps, observed.category
        size = reconstruction.shape[-2], reconstruction.shape[-1]
        maps = {}
        for level in levels:
            if level == "pixel":
                maps[level] = pixel_discrepancy(decoded, reconstruction, settings.pixel_clip, settings.pixel_sigma)
            elif level == "latent":
                before, after = (self._in_normal_deviations(part, category) for part in (observed.latents, corrected))
                maps[level] = latent_discrepancy(after, before, size, settings.latent_clip, settings.latent_sigma)
            else:
                features = self._magnified_features(observed, self.settings.magnifications[level])
                maps[level] = resize_mirrored(self.memory_banks[level](features, category), size)
        return maps

    def _magnified_features(self, observed: Observation, magnification: float) -> torch.Tensor:
        """Features ``(B, F, h, w)`` of the enlarged images; those at their own size have been computed already."""
        assert self.features is not None, "levels of features exist only with a backbone"
        assert observed.features is not None
        return observed.features if magnification == 1 else self.features(observed.images, magnification)

    def _in_normal_deviations(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """The codec's latents in units of the mean correction of normal images of the category."""
        return latents[:, : self.codec.latent_channels] / self.normal_deviation[category]

    def fuse(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> torch.Tensor:
        """Anomaly map ``(B, 1, H, W)`` from the maps of the levels."""
        if self.normal_range:
            maps = {level: self.normal_range(values, level, category) for level, values in maps.items()}
        weights = [self.settings.maps.levels[level] for level in maps]
        return fuse(*maps.values(), weights=weights, mode=self.settings.maps.fusion)

    def score(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Score ``(B,)`` of maps ``(B, 1, H, W)``: their maximum, or the mean of the highest cells of the latent grid.

        A defect covers several cells, so that their mean is less sensitive to noise in a single one.
        """
        if not self.settings.scoring.top_share:
            return anomaly_map.amax(dim=(1, 2, 3))
        cells = self._cells(anomaly_map).flatten(1)
        highest = math.ceil(self.settings.scoring.top_share * cells.shape[1])
        return cells.topk(highest, dim=1).values.mean(1)

    def _cells(self, anomaly_map: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, 1, H, W)`` averaged over the cells of the latent grid, ``(B, 1, h, w)``."""
        return F.avg_pool2d(anomaly_map, self.codec.downsample_factor)

    def folded(self) -> "DeCoDiffModel":
        """A copy for inference with a :class:`~decodiff_anomalib.denoiser.FoldedDenoiser`."""
        folded = copy.deepcopy(self)
        folded.denoiser = FoldedDenoiser(folded.denoiser, self._timesteps)  # type: ignore[assignment] # called alike
        return folded.eval()

    # ---------------------------------------------------------------- training

    def training_loss(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        replay: ReplayBuffer,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the predicted deviation of corrupted normal images: the paper's training loss.

        Args:
            images: Normal images ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``.
            replay: Earlier samples, exchanged with those of this batch; used for drawn defects only.
            generator: Source of all randomness, on the CPU.
        """
        with torch.no_grad():
            category = self._drop_categories(category, generator)
            if self.settings.corruption.kind == "patches":
                latents = self.encode(images, category, generator=generator)
                timesteps = self._draw_timesteps(latents, generator)
                noise, mask = corrupt_latents(latents, generator=generator)
                deviation = self.schedule.target(latents, noise, mask, timesteps)
            else:
                latents, deviation, category = self._defect_samples(images, category, replay, generator)
                timesteps = self._draw_timesteps(latents, generator)
            deviated = self.schedule.deviate(latents, deviation, timesteps)
        predicted = self.denoiser(deviated, timesteps, category)
        return (deviation - predicted).square().mean()

    def _drop_categories(self, category: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Category index ``(B,)`` with some replaced by unknown, so that the denoiser learns unknown images, too.

        As in classifier-free guidance (Ho & Salimans, 2022, algorithm 1); with one category, none are.
        """
        if self.num_categories == 1 or not self.settings.training.category_dropout:
            return category
        dropped = torch.rand(len(category), generator=generator) < self.settings.training.category_dropout
        return category.masked_fill(dropped.to(category.device), self.num_categories)

    def _defect_samples(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        replay: ReplayBuffer,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean latents and deviations ``(S, C, h, w)`` of drawn defects, and their category: fresh and replayed."""
        settings = self.settings.corruption
        fresh, own = images[: settings.fresh_per_step], category[: settings.fresh_per_step]
        pairs = torch.cat([fresh, draw_defects(fresh, generator)])
        clean, defective = self.encode(pairs, own.repeat(2)).chunk(2)
        num_samples = max(len(fresh), settings.samples_per_step)
        return replay.exchange(clean, defective - clean, own, num_samples, generator)

    def _draw_timesteps(self, latents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Random timesteps ``(B,)`` of those to learn."""
        used = self.settings.corruption.timesteps == "used"
        choice = self.schedule.timesteps if used else torch.arange(self.schedule.num_train_timesteps)
        drawn = torch.randint(len(choice), (len(latents),), generator=generator)
        return choice.to(latents.device)[drawn.to(latents.device)]

    # ---------------------------------------------------------------- statistics of normal images

    @torch.no_grad()
    def fit(self, images: torch.Tensor, category: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Fit everything that is not trained by gradient to normal training images.

        These are the scale of the latents (zero mean and unit variance of each channel, by category; channels that
        hardly vary are scaled less, so that their noise is not amplified), the categories, the feature latents, the
        memory banks and the exemplars.

        Args:
            images: ``(N, 3, H, W)`` in [-1, 1].
            category: Category index ``(N,)``.
            generator: Source of randomness, on the CPU.
        """
        if self.settings.latents.scale:
            self._fit_scale(images, category)
        if self.features and self.router:
            self._fit_features(self.features, self.router, images, category, generator)
        if self.exemplars:
            for row, chosen in _rows(category):
                self.exemplars.fit(row, images[chosen])

    def _fit_scale(self, images: torch.Tensor, category: torch.Tensor) -> None:
        latents = torch.cat([self.codec.encode(chunk) for chunk in images.split(CHUNK)])
        for row, chosen in _rows(category):
            variance, mean = torch.var_mean(latents[chosen], dim=(0, 2, 3), keepdim=True)
            self.latent_mean[row] = mean[0]
            self.latent_std[row] = variance[0].sqrt().clamp_min(MIN_LATENT_STD * variance.mean().sqrt())

    def _fit_features(
        self,
        backbone: VisualFeatures,
        router: CategoryRouter,
        images: torch.Tensor,
        category: torch.Tensor,
        generator: torch.Generator | None,
    ) -> None:
        rows = _rows(category)
        features = torch.cat([backbone(chunk) for chunk in images.split(CHUNK)])
        router.fit(router.pool(features), category)
        if self.feature_latents:
            for row, chosen in rows:
                self.feature_latents.fit(row, features[chosen])
        for level, magnification in self.settings.magnifications.items():
            enlarged = features
            if magnification != 1:
                enlarged = torch.cat([backbone(chunk, magnification) for chunk in images.split(CHUNK)])
            bank: Any = self.memory_banks[level]
            for row, chosen in rows:
                bank.fit(row, enlarged[chosen], generator)

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor, category: torch.Tensor) -> None:
        """Measure limits and ranges on held-out normal images.

        These are the limits of the out-of-distribution score and, where latents are scaled, the mean correction of each
        channel (the unit of the latent map, so that channels which are always corrected do not hide the others), the
        normal range of each map, and the threshold of deviating cells.

        Args:
            images: ``(N, 3, H, W)`` in [-1, 1].
            category: Category index ``(N,)``.
        """
        rows = _rows(category)
        chunks = zip(images.split(CHUNK), category.split(CHUNK), strict=True)
        observed = [self.observe(part, index) for part, index in chunks]
        if self.router:
            pooled = [self.router.pool(batch.features) for batch in observed if batch.features is not None]
            self.router.calibrate(torch.cat(pooled), category)
        if not self.settings.latents.scale:
            return
        corrected = [self.correct(batch.latents, batch.category) for batch in observed]
        corrections = (torch.cat(corrected) - torch.cat([batch.latents for batch in observed])).abs()
        corrections = corrections[:, : self.codec.latent_channels].mean(dim=(2, 3), keepdim=True)
        corrections = corrections.clamp_min(torch.finfo(images.dtype).tiny)
        for row, chosen in rows:
            self.normal_deviation[row] = corrections[chosen].mean(0)

        levels = self.settings.available_levels
        parts = []
        for batch, after in zip(observed, corrected, strict=True):
            decoded = (self.decode(latents, batch.category) for latents in (batch.latents, after))
            parts.append(self.level_maps(levels, batch, after, *decoded))
        maps = {level: torch.cat([part[level] for part in parts]) for level in levels}
        if self.normal_range:
            for level, values in maps.items():
                for row, chosen in rows:
                    self.normal_range.fit(row, level, values[chosen])
        if self.exemplars:
            cells = self._cells(self.fuse({level: maps[level] for level in self.settings.maps.levels}, category))
            for row, chosen in rows:
                self.exemplars.calibrate(row, cells[chosen])


def _rows(category: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Each category's row of the tables and a mask of its images; then -1, the row of all images."""
    every = torch.ones_like(category, dtype=torch.bool)
    return [*((int(index), category == index) for index in category.unique()), (-1, every)]
