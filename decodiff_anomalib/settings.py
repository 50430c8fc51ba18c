"""Settings of the method in groups. Words and ranges are checked when settings are made, before any work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from decodiff_anomalib.paper import LATENT_CLIP, LATENT_SIGMA, NUM_TRAIN_TIMESTEPS, PIXEL_CLIP, PIXEL_SIGMA

NONE = "none"
"""The word that overrides an optional setting by ``None``."""

SizeName = Literal["nano", "tiny", "XS", "S", "M", "L", "XL"]
"""Keys of :data:`decodiff_anomalib.denoiser.DENOISER_SIZES`."""


def _check(
    group: object,
    *,
    at_least: Mapping[str, float] | None = None,
    within: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Check the words of a group, which its ``Literal`` annotations list, and its ranges.

    Raises:
        ValueError: If a word is unknown or a number out of range.
    """
    name = type(group).__name__.removesuffix("Settings").lower()
    for field_name, hint in get_type_hints(type(group)).items():
        value = getattr(group, field_name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            msg = f"settings.{name}.{field_name}={value!r} is unknown; valid: {', '.join(get_args(hint))}."
            raise ValueError(msg)
    ranges = {key: (lowest, float("inf")) for key, lowest in (at_least or {}).items()} | dict(within or {})
    for field_name, (lowest, highest) in ranges.items():
        value = getattr(group, field_name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not lowest <= value <= highest:
            limits = f"at least {lowest:g}" if highest == float("inf") else f"between {lowest:g} and {highest:g}"
            msg = f"settings.{name}.{field_name}={value!r} must be {limits}."
            raise ValueError(msg)


@dataclass(frozen=True)
class LatentsSettings:
    """What the latents of an image are.

    Attributes:
        codec: ``bundled``, a file that ``decodiff_anomalib.codec.train`` wrote, or a hub id, folder or file of a
            diffusers autoencoder.
        backbone: timm backbone whose features join the latents, convolutional or a vision transformer; timm's
            ``local-dir:FOLDER`` reads a folder; ``none`` for none.
        backbone_weights: A ``.safetensors`` file with its weights; ``none`` for the packaged or published ones.
        layers: timm's ``out_indices`` of its layers; ``none`` for those of strides 8 and 16 or, of a transformer, four
            evenly spaced blocks.
        normalization: Of its input: ``backbone`` (as it was trained), ``imagenet``, or ``half`` (mean and deviation
            0.5).
        magnification: Enlargement of the image whose features join the latents, too; 1 for none.
        scale: Whether latents are normalised to zero mean and unit variance on the training images of each category.
        references: Normal latents kept of each category, in a memory bank for each kind of latents. The nearest one is
            the reference of a position, and the denoiser predicts how much of the difference from it is a deviation; 0
            lets it predict the deviation itself.
    """

    codec: str | dict[str, Any] = "stabilityai/sd-vae-ft-ema"
    backbone: str | None = None
    backbone_weights: str | None = None
    layers: list[int] | None = None
    normalization: Literal["backbone", "imagenet", "half"] = "backbone"
    magnification: float = 1.0
    scale: bool = False
    references: int = 0

    def __post_init__(self) -> None:
        """Check words and ranges."""
        _check(self, at_least={"magnification": 1, "references": 0})


@dataclass(frozen=True)
class DenoiserSettings:
    """The network that predicts deviations.

    Attributes:
        size: Size of the UNet: ``nano``, ``tiny``, ``XS``, ``S``, ``M``, ``L``, ``XL``, or the fields of a
            :class:`decodiff_anomalib.denoiser.DenoiserSize`.
    """

    size: SizeName | dict[str, Any] = "L"

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            ValueError: If its name or one of its fields is unknown.
        """
        if isinstance(self.size, str) and self.size not in get_args(SizeName):
            msg = f"denoiser={self.size!r} is unknown; valid: {', '.join(get_args(SizeName))}."
            raise ValueError(msg)
        if isinstance(self.size, dict):
            from decodiff_anomalib.denoiser import DenoiserSize

            known = {entry.name for entry in fields(DenoiserSize)}
            unknown = set(self.size) - known
            if unknown:
                msg = f"denoiser has no {', '.join(sorted(unknown))}; valid: {', '.join(sorted(known))}."
                raise ValueError(msg)


@dataclass(frozen=True)
class CorrectionSettings:
    """How latents are corrected.

    Attributes:
        num_steps: Correction steps, 1 to 10.
        timestep_spacing: Which timesteps they use, see :class:`decodiff_anomalib.schedule.DeviationSchedule`.
        exemplars: Normal images of each category kept to fill deviating regions of the corrected image, see
            :class:`decodiff_anomalib.exemplars.Exemplars`; 0 for none.
    """

    num_steps: int = 5
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    exemplars: int = 0

    def __post_init__(self) -> None:
        """Check words and ranges."""
        _check(self, at_least={"exemplars": 0}, within={"num_steps": (1, NUM_TRAIN_TIMESTEPS)})


@dataclass(frozen=True)
class MapsSettings:
    """The anomaly maps and their fusion.

    Attributes:
        levels: Weights of the fused maps: ``pixel`` and ``latent`` (what the correction changes), ``feature`` (how far
            features are from their references; needs a backbone and references).
        pixel_clip: Saturation of the pixel map; ``none`` for none.
        latent_clip: Saturation of the latent map; ``none`` for none.
        pixel_sigma: Blur of the pixel map, in pixels of the working size.
        latent_sigma: Blur of the latent map, in latent pixels; 0 for none.
        fusion: Mean of the maps, ``geometric`` or ``arithmetic``.
        normal_range: Whether each map is expressed by how much it exceeds its range on normal images before the fusion,
            see :class:`decodiff_anomalib.calibration.NormalRange`.
    """

    levels: dict[str, float] = field(default_factory=lambda: {"pixel": 1.0, "latent": 1.0})
    pixel_clip: float | None = PIXEL_CLIP
    latent_clip: float | None = LATENT_CLIP
    pixel_sigma: float = PIXEL_SIGMA
    latent_sigma: float = LATENT_SIGMA
    fusion: Literal["geometric", "arithmetic"] = "geometric"
    normal_range: bool = False

    def __post_init__(self) -> None:
        """Check words and ranges.

        Raises:
            ValueError: If a word is unknown or a number out of range.
        """
        _check(self, at_least={"pixel_sigma": 0, "latent_sigma": 0})
        for name in ("pixel_clip", "latent_clip"):
            clip = getattr(self, name)
            if clip is not None and not clip > 0:
                msg = f"settings.maps.{name}={clip!r} must be above 0; {NONE!r} leaves the map as it is."
                raise ValueError(msg)


@dataclass(frozen=True)
class ScoringSettings:
    """The score of an image.

    Attributes:
        top_share: Share of the map's cells, its highest, whose mean is the score; 0 takes the maximum.
    """

    top_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the range."""
        _check(self, within={"top_share": (0, 1)})


@dataclass(frozen=True)
class CorruptionSettings:
    """How normal images are corrupted in training.

    Attributes:
        kind: ``patches`` of the latents (the paper) or ``defects`` drawn on the images.
        timesteps: Strengths of the deviation to learn: ``all`` ten (the paper), or only those ``used`` in correction.
        fresh_per_step: Images that defects are drawn on in each training step; fewer if the batches are smaller.
        variants: Defective versions of each of them.
        noise: Standard deviation of noise added to the latents that the denoiser sees in training, in the latents'
            units. It is not part of the deviation, so that small details of the training images do not give them away.
        samples_per_step: Samples the denoiser learns from in a step: the fresh ones and ones of the replay buffer.
    """

    kind: Literal["patches", "defects"] = "patches"
    timesteps: Literal["all", "used"] = "all"
    fresh_per_step: int = 4
    variants: int = 1
    noise: float = 0.0
    samples_per_step: int = 16

    def __post_init__(self) -> None:
        """Check words and ranges."""
        _check(self, at_least={"fresh_per_step": 1, "variants": 1, "noise": 0, "samples_per_step": 1})


@dataclass(frozen=True)
class TrainingSettings:
    """How the denoiser is trained.

    Attributes:
        steps: Optimiser steps, unless the trainer is given a duration.
        warmup_steps: Steps until the full learning rate.
        learning_rate_schedule: ``epochs`` (the paper): constant within an epoch, see
            :func:`decodiff_anomalib.paper.paper_learning_rate_factor`, with the warm-up rounded up to whole epochs;
            ``steps``: a cosine by steps, down to a fiftieth.
        learning_rate: Peak of the cosine.
        loss: Squared error of the deviation: ``absolute`` (the paper), or ``relative`` to the mean square of the
            deviation of the sample, so that small defects count as much as large ones.
        weight_decay: Of AdamW.
        ema_decay: Decay of the averaged weights that are validated, tested and saved; 0 for none.
        gradient_clip: Largest gradient norm, unless the trainer is given one; 0 for none.
        mixed_precision: Whether training computes in bfloat16 where the hardware does so natively.
        category_dropout: Share of the samples whose category is replaced by unknown; with one category, none.
        published_table: Whether models of categories of MVTec AD or VisA have a row for each category of the data set,
            see :func:`decodiff_anomalib.conditioning.vocabulary`.
    """

    steps: int = 10_400
    warmup_steps: int = 130
    learning_rate_schedule: Literal["steps", "epochs"] = "epochs"
    learning_rate: float = 1e-4
    loss: Literal["absolute", "relative"] = "absolute"
    weight_decay: float = 1e-4
    ema_decay: float = 0.0
    gradient_clip: float = 0.0
    mixed_precision: bool = False
    category_dropout: float = 0.0
    published_table: bool = True

    def __post_init__(self) -> None:
        """Check words and ranges.

        Raises:
            ValueError: If a word is unknown or a number out of range.
        """
        _check(
            self,
            at_least={"steps": 1, "warmup_steps": 0, "learning_rate": 0, "weight_decay": 0, "gradient_clip": 0},
            within={"ema_decay": (0, 1), "category_dropout": (0, 1)},
        )
        if self.ema_decay == 1:
            msg = "settings.training.ema_decay=1 would keep the initial weights; give a value below 1, or 0 for none."
            raise ValueError(msg)


@dataclass(frozen=True)
class Settings:
    """All settings of the method. The defaults are the paper's.

    Attributes:
        latents: What the latents of an image are.
        denoiser: The network that predicts deviations.
        correction: How latents are corrected.
        maps: The anomaly maps and their fusion.
        scoring: The score of an image.
        corruption: How normal images are corrupted in training.
        training: How the denoiser is trained.
    """

    latents: LatentsSettings = field(default_factory=LatentsSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    maps: MapsSettings = field(default_factory=MapsSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    corruption: CorruptionSettings = field(default_factory=CorruptionSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        """Check what concerns several groups.

        Raises:
            ValueError: If settings exclude each other.
        """
        levels, available = self.maps.levels, self.available_levels
        if not levels or set(levels) - set(available) or min(levels.values()) <= 0:
            msg = (
                f"settings.maps.levels={levels} must be one or more of {', '.join(available)}, each with a weight "
                f"above 0; feature needs settings.latents.backbone, which is {self.latents.backbone!r}, and "
                f"settings.latents.references above 0, which is {self.latents.references}."
            )
            raise ValueError(msg)
        fitted = self.maps.normal_range, self.correction.exemplars, self.latents.references
        if not self.latents.scale and any(fitted):
            msg = (
                f"settings.maps.normal_range={fitted[0]}, settings.correction.exemplars={fitted[1]} and "
                f"settings.latents.references={fitted[2]} are fitted together with the scale of latents; "
                "settings.latents.scale=False needs normal_range=False, exemplars=0 and references=0."
            )
            raise ValueError(msg)

    @property
    def available_levels(self) -> tuple[str, ...]:
        """Levels that the latents allow."""
        has_distance = self.latents.backbone is not None and self.latents.references
        return ("pixel", "latent", "feature") if has_distance else ("pixel", "latent")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data by group, which :meth:`from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> "Settings":
        """Settings from :meth:`to_dict`.

        Raises:
            TypeError: If a group or a name is unknown.
            ValueError: If a value is out of range.
        """
        return cls(**{group: GROUPS[group](**entries) for group, entries in values.items()})


GROUPS: dict[str, type] = {
    "latents": LatentsSettings,
    "denoiser": DenoiserSettings,
    "correction": CorrectionSettings,
    "maps": MapsSettings,
    "scoring": ScoringSettings,
    "corruption": CorruptionSettings,
    "training": TrainingSettings,
}
