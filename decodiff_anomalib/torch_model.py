"""DeCo-Diff from image to anomaly map, top to bottom."""

import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from decodiff_anomalib.calibration import CommonShift, NormalRange
from decodiff_anomalib.codec import Codec, build_codec
from decodiff_anomalib.conditioning import CategoryRouter
from decodiff_anomalib.corruption import ReplayBuffer, corrupt_latents, draw_defects
from decodiff_anomalib.denoiser import SPATIAL_DIVISOR, FoldedDenoiser, build_denoiser
from decodiff_anomalib.discrepancy import fuse, latent_discrepancy, pixel_discrepancy, resize_mirrored
from decodiff_anomalib.exemplars import Exemplars
from decodiff_anomalib.features import PACKAGED_BACKBONE, FeatureLatents, MemoryBank, VisualFeatures
from decodiff_anomalib.latent_groups import LatentGroup, LatentGroups
from decodiff_anomalib.schedule import DeviationSchedule
from decodiff_anomalib.settings import Settings

CODEC = "codec"  # the name of its group of latents; those of the features have the backbone's names
FEATURE = "feature"  # the level of distances from references
MIN_LATENT_STD = 0.2
GREY_LEVEL = 2 / 255  # of 8 bits, for images in [-1, 1]: what constant images vary by at least
MIN_DEVIATION = 1e-4  # of latents of unit variance; smaller units would make rounding errors visible
LEAST_DEVIATION = 0.02  # mean square, below which the relative loss does not grow further
CHUNK = 16  # images that are fitted or measured at once


class Observation(NamedTuple):
    """What the model knows of a batch of images before it corrects them.

    Attributes:
        images: ``(B, 3, H, W)`` in [-1, 1].
        features: Visual features of each of the backbone's groups; empty where the model has no backbone.
        category: Category index ``(B,)``; the number of categories means unknown.
        ood_score: Out-of-distribution score ``(B,)``, unknown above 1; 0 where the category was given.
        latents: ``(B, C, h, w)``, about unit variance.
        references: The nearest normal latents ``(B, C, h, w)``; ``None`` where the model has no memory banks.
    """

    images: torch.Tensor
    features: dict[str, torch.Tensor]
    category: torch.Tensor
    ood_score: torch.Tensor
    latents: torch.Tensor
    references: torch.Tensor | None


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
        ignored: Regions to ignore ``(K + 1, H, W)``, true where images of a category are not inspected, see
            :meth:`ignore`; last those of unknown images.

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
        self.ignored: torch.Tensor
        self.register_buffer("ignored", torch.zeros(rows, *image_size, dtype=torch.bool))

        self.codec = build_codec(settings.latents.codec if codec is None else codec)
        divisor = self.codec.downsample_factor * SPATIAL_DIVISOR
        if any(side < divisor or side % divisor for side in image_size):
            nearest = tuple(max(1, round(side / divisor)) * divisor for side in image_size)
            msg = f"image_size={tuple(image_size)} must be multiples of {divisor} pixels, such as {nearest}."
            raise ValueError(msg)
        channels = self.codec.latent_channels
        self.latent_mean: torch.Tensor
        self.latent_std: torch.Tensor
        self.register_buffer("latent_mean", torch.zeros(rows, channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(rows, channels, 1, 1))

        chosen = settings.latents
        self.features: VisualFeatures | None = None
        if chosen.backbone or num_categories > 1:
            self.features = features or VisualFeatures(
                chosen.backbone or PACKAGED_BACKBONE,
                chosen.backbone_weights,
                chosen.layers,
                chosen.normalization,
                chosen.magnification if chosen.backbone else 1.0,
                self.codec.downsample_factor,
            )
        self.router: CategoryRouter | None = None
        groups = {CODEC: LatentGroup(channels)}
        self.feature_latents = nn.ModuleDict()
        if self.features:
            self.router = CategoryRouter(num_categories, sum(self.features.groups["image"].layer_channels))
            for name, group in self.features.groups.items() if chosen.backbone else ():
                latents = FeatureLatents(group.layer_channels, num_categories)
                self.feature_latents[name] = latents
                groups[name] = LatentGroup(latents.channels, group.cells)
        self.latent_groups = LatentGroups(groups)
        self.normal_deviation: torch.Tensor
        self.register_buffer("normal_deviation", torch.ones(rows, self.latent_groups.channels, 1, 1))
        self.memory_banks = nn.ModuleDict()
        if chosen.references:
            for name, part in groups.items():
                self.memory_banks[name] = MemoryBank(part.channels, num_categories, chosen.references)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # here, so that weights do not depend on what else was built before
            build = partial(
                build_denoiser,
                settings.denoiser.size,
                num_categories=num_categories,
                sample_size=image_size[0] // self.codec.downsample_factor,
            )
            if self.memory_banks:
                self.denoiser = build(2 * self.latent_groups.channels, out_channels=self.latent_groups.gates)
            else:
                self.denoiser = build(self.latent_groups.channels)
        self.schedule = DeviationSchedule(
            num_inference_steps=settings.correction.num_steps, timestep_spacing=settings.correction.timestep_spacing
        )
        self._timesteps: list[int] = self.schedule.timesteps.tolist()

        self.normal_range = (
            NormalRange(settings.available_levels, num_categories) if settings.maps.normal_range else None
        )
        self.common_shift = (
            CommonShift(num_categories) if self.normal_range and FEATURE in settings.available_levels else None
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args, **kwargs) -> None:
        # Weights that were saved before regions could be ignored ignore none.
        state_dict.setdefault(f"{prefix}ignored", torch.zeros_like(self.ignored))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ---------------------------------------------------------------- from image to map

    def forward(self, images: torch.Tensor, category: torch.Tensor | None = None) -> ModelOutput:
        """Image -> latents -> correction -> discrepancy maps -> fused map -> score.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``; inferred where it is not given.
        """
        observed = self.observe(images, category)
        corrected = self.correct(observed.latents, observed.references, observed.category)
        both = self.decode(torch.cat([observed.latents, corrected]), observed.category.repeat(2))
        reconstruction, decoded = both.unflatten(0, (2, -1)).unbind()
        maps = self.level_maps(self.settings.maps.levels, observed, corrected, reconstruction, decoded)
        anomaly_map = self.fuse(maps, observed.category)
        pred_score = self.score(anomaly_map)
        category, ood_score = observed.category, observed.ood_score
        if self.exemplars is None:
            correction = self._ignore(decoded, category, reconstruction)
            return ModelOutput(pred_score, anomaly_map, category, ood_score, reconstruction, correction)
        # The difference of the two decoded images carries the correction without the loss of the codec.
        faded = images + (decoded - reconstruction)
        deviating = self.exemplars.deviating(self._cells(anomaly_map), category)
        correction = self._ignore(self.exemplars(faded, deviating, category), category, images)
        return ModelOutput(pred_score, anomaly_map, category, ood_score, images, correction)

    def observe(self, images: torch.Tensor, category: torch.Tensor | None = None) -> Observation:
        """Features, category and latents of a batch, each computed once; arguments as :meth:`forward`."""
        features = self.features(images) if self.features else {}
        index, ood_score = self.route(images, features, category)
        latents = self.encode(images, index, features)
        return Observation(images, features, index, ood_score, latents, self.refer(latents, index))

    def route(
        self, images: torch.Tensor, features: dict[str, torch.Tensor], category: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Category index ``(B,)`` and out-of-distribution score ``(B,)``: as given, else as fixed, else inferred."""
        zeros = torch.zeros_like(images[:, 0, 0, 0])
        if category is not None:
            return category, zeros
        if self.fixed_category is not None:
            return torch.full_like(zeros, self.fixed_category, dtype=torch.long), zeros
        if self.router is None:
            return zeros.long(), zeros
        return self.router(features["image"])

    def encode(
        self,
        images: torch.Tensor,
        category: torch.Tensor,
        features: dict[str, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Latents ``(B, C, h, w)``: those of the codec and the features, all in the units of :meth:`fit`.

        Args:
            images: ``(B, 3, H, W)`` in [-1, 1].
            category: Category index ``(B,)``, which selects the units.
            features: The images' features, where they have been computed already.
            generator: For codecs that sample, see :mod:`decodiff_anomalib.codec`.
        """
        with torch.autocast(images.device.type, enabled=False):  # deviations are small differences of latents
            latents = self.codec.encode(images, generator=generator)
            latents = (latents - self.latent_mean[category]) / self.latent_std[category]
        parts = {CODEC: latents}
        if self.features and self.feature_latents:
            features = features or self.features(images)
            parts |= {name: latents(features[name], category) for name, latents in self.feature_latents.items()}
        return self.latent_groups.join(parts)

    def refer(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor | None:
        """The nearest normal latents ``(B, C, h, w)``, searched for each position of each group in its memory bank."""
        if not self.memory_banks:
            return None
        parts = self.latent_groups.split(latents)
        return self.latent_groups.join({name: bank(parts[name], category) for name, bank in self.memory_banks.items()})

    def correct(self, latents: torch.Tensor, references: torch.Tensor | None, category: torch.Tensor) -> torch.Tensor:
        """Corrected latents; ``latents`` ``(B, C, h, w)`` are taken as the most deviated state, without added noise.

        The inference of the paper: ``z <- z - s_i d + s_{i-1} d``, with ``d`` the predicted deviation.
        """
        for index, timestep in enumerate(self._timesteps):
            deviation = self.predict_deviation(latents, references, timestep, category)
            latents = self.schedule.step(latents, deviation, index)
        return latents

    def predict_deviation(
        self,
        latents: torch.Tensor,
        references: torch.Tensor | None,
        timesteps: torch.Tensor | int,
        category: torch.Tensor,
    ) -> torch.Tensor:
        """The deviation ``(B, C, h, w)`` that the denoiser sees in ``latents``.

        With references it is a share of the difference from them, which the denoiser predicts for each position of each
        group of latents. Unusual parts of normal images differ from their references, too; the denoiser has learnt
        which differences are defects.
        """
        if references is None:
            return self.denoiser(latents, timesteps, category)
        difference = latents - references
        gates = self.denoiser(torch.cat([latents, difference], dim=1), timesteps, category)
        return self.latent_groups.spread(gates) * difference

    def decode(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)``, about [-1, 1], of the codec's channels of ``latents`` ``(B, C, h, w)``."""
        own = self.latent_groups.split(latents)[CODEC]
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
                unit = self.normal_deviation[category]
                before, after = (self.latent_groups.split(part / unit) for part in (observed.latents, corrected))
                discrepancy = partial(
                    latent_discrepancy, size=size, clip=settings.latent_clip, sigma=settings.latent_sigma
                )
                maps[level] = self._mean_over_groups({name: discrepancy(after[name], before[name]) for name in before})
            else:
                assert observed.references is not None, "the feature level exists only with references"
                difference = self.latent_groups.split(observed.latents - observed.references)
                lengths = {
                    name: torch.linalg.vector_norm(difference[name], dim=1)[:, None] for name in self.feature_latents
                }
                maps[level] = self._mean_over_groups(
                    {name: resize_mirrored(part, size) for name, part in lengths.items()}
                )
        return maps

    def _mean_over_groups(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Weighted mean ``(B, 1, H, W)`` of the maps of groups of latents; a grid twice as fine counts twice."""
        weights = {name: self.latent_groups.groups[name].cells for name in maps}
        return torch.stack([weights[name] * part for name, part in maps.items()]).sum(0) / sum(weights.values())

    def fuse(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> torch.Tensor:
        """Anomaly map ``(B, 1, H, W)`` from the maps of the levels; 0 in the regions to ignore."""
        maps = self._without_shift(maps, category)
        if self.normal_range:
            maps = {level: self.normal_range(values, level, category) for level, values in maps.items()}
        weights = [self.settings.maps.levels[level] for level in maps]
        fused = fuse(*maps.values(), weights=weights, mode=self.settings.maps.fusion)
        return self._ignore(fused, category, torch.zeros_like(fused))

    def _ignore(self, pictures: torch.Tensor, category: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
        """Pictures ``(B, C, H, W)`` with those of ``instead`` in the regions to ignore."""
        regions = self.ignored[category][:, None].to(pictures.dtype)
        return torch.where(F.interpolate(regions, size=pictures.shape[-2:]) > 0, instead, pictures)

    def ignore(self, category: int, regions: torch.Tensor) -> None:
        """Ignore regions of the images of a category from now on, in place of those before.

        The map is 0 there, so that they count for neither score nor mask, and the corrected image shows the image.
        Where there is one category, they hold for unknown images, too.

        Args:
            category: Its index.
            regions: ``(H, W)``, true where to ignore; of the working size.
        """
        rows = slice(None) if self.num_categories == 1 else category
        self.ignored[rows] = regions

    def _without_shift(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps of the levels as :class:`CommonShift` leaves them; what the denoiser corrects has no shift."""
        if self.common_shift is None or FEATURE not in maps:
            return maps
        return maps | {FEATURE: self.common_shift(maps[FEATURE], category)}

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
                references = self._refer_exactly(self.schedule.deviate(latents, deviation, timesteps), category)
            else:
                latents, deviation, references, category = self._defect_samples(images, category, replay, generator)
                timesteps = self._draw_timesteps(latents, generator)
            deviated = self.schedule.deviate(latents, deviation, timesteps)
            if noise_scale := self.settings.corruption.noise:
                deviated = deviated + noise_scale * torch.randn(deviated.shape, generator=generator).to(deviated)
        predicted = self.predict_deviation(deviated, references, timesteps, category)
        error = (deviation - predicted).square()
        if self.settings.training.loss == "absolute":
            return error.mean()
        energy = deviation.square().mean((1, 2, 3)) + LEAST_DEVIATION
        return (error.mean((1, 2, 3)) / energy).mean()

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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Clean latents, deviations and references ``(S, C, h, w)`` of drawn defects, and their category ``(S,)``.

        Fresh ones and replayed ones; references are those of the defective images, as in :meth:`correct`.
        """
        settings = self.settings.corruption
        fresh, own = images[: settings.fresh_per_step], category[: settings.fresh_per_step]
        drawn = draw_defects(fresh.repeat(settings.variants, 1, 1, 1), generator)
        encoded = self.encode(torch.cat([fresh, drawn]), own.repeat(1 + settings.variants))
        clean, defective = encoded[: len(fresh)].repeat(settings.variants, 1, 1, 1), encoded[len(fresh) :]
        own = own.repeat(settings.variants)
        references = self._refer_exactly(defective, own)
        sample = [clean, defective - clean, *([] if references is None else [references])]
        num_samples = max(len(clean), settings.samples_per_step)
        sample, category = replay.exchange(sample, own, num_samples, generator)
        return sample[0], sample[1], None if references is None else sample[2], category

    def _refer_exactly(self, latents: torch.Tensor, category: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`refer`, in full precision: entries of a bank differ by less than half precision tells apart."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.refer(latents.float(), category)

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
            self._fit_features(self.features, self.router, images, category)
        if self.memory_banks:
            self._fit_references(images, category, generator)
        if self.exemplars:
            for row, chosen in _rows(category):
                self.exemplars.fit(row, images[chosen])

    def _fit_scale(self, images: torch.Tensor, category: torch.Tensor) -> None:
        latents = torch.cat([self.codec.encode(chunk) for chunk in images.split(CHUNK)])
        for row, chosen in _rows(category):
            variance, mean = torch.var_mean(latents[chosen], dim=(0, 2, 3), keepdim=True)
            self.latent_mean[row] = mean[0]
            smallest = (MIN_LATENT_STD * variance.mean().sqrt()).clamp_min(GREY_LEVEL)
            self.latent_std[row] = variance[0].sqrt().maximum(smallest)

    def _fit_features(
        self,
        backbone: VisualFeatures,
        router: CategoryRouter,
        images: torch.Tensor,
        category: torch.Tensor,
    ) -> None:
        chunks = [backbone(chunk) for chunk in images.split(CHUNK)]
        features = {name: torch.cat([chunk[name] for chunk in chunks]) for name in backbone.groups}
        router.fit(router.pool(features["image"]), category)
        for name, latents in self.feature_latents.items():
            for row, chosen in _rows(category):
                latents.fit(row, features[name][chosen])  # type: ignore[operator] # a FeatureLatents

    def _fit_references(self, images: torch.Tensor, category: torch.Tensor, generator: torch.Generator | None) -> None:
        for row, chosen in _rows(category):
            index = category[chosen] if row >= 0 else torch.full_like(category, self.num_categories)
            chunks = zip(images[chosen].split(CHUNK), index.split(CHUNK), strict=True)
            parts = [self.latent_groups.split(self.encode(*chunk)) for chunk in chunks]
            for name, bank in self.memory_banks.items():
                bank.fit(row, torch.cat([part[name] for part in parts]), generator)  # type: ignore[operator]

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
            pooled = [self.router.pool(batch.features["image"]) for batch in observed]
            self.router.calibrate(torch.cat(pooled), category)
        if not self.settings.latents.scale:
            return
        corrected = [self.correct(batch.latents, batch.references, batch.category) for batch in observed]
        pairs = zip(corrected, observed, strict=True)
        corrections = torch.cat([(after - batch.latents).abs().mean((2, 3), keepdim=True) for after, batch in pairs])
        corrections = corrections.clamp_min(MIN_DEVIATION)
        for row, chosen in rows:
            self.normal_deviation[row] = corrections[chosen].mean(0)

        levels = self.settings.available_levels
        parts = []
        for batch, after in zip(observed, corrected, strict=True):
            decoded = (self.decode(latents, batch.category) for latents in (batch.latents, after))
            parts.append(self.level_maps(levels, batch, after, *decoded))
        maps = {level: torch.cat([part[level] for part in parts]) for level in levels}
        self._calibrate_maps(maps, category)

    def _calibrate_maps(self, maps: dict[str, torch.Tensor], category: torch.Tensor) -> None:
        """Measure shifts, normal ranges and the threshold of cells on the maps of the levels."""
        rows = _rows(category)
        if self.common_shift:
            for row, chosen in rows:
                self.common_shift.fit(row, maps[FEATURE][chosen])
        maps = self._without_shift(maps, category)
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
