"""Three words for thirty numbers."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from decodiff_anomalib.discrepancy import LATENT_CLIP, LATENT_SIGMA, PIXEL_CLIP, PIXEL_SIGMA
from decodiff_anomalib.features import PACKAGED_BACKBONE


@dataclass(frozen=True)
class Preset:
    """Settings of the method that belong together. The defaults are the paper's.

    Attributes:
        codec: See :func:`decodiff_anomalib.codec.build_codec`.
        features: A timm backbone whose features join the latents, see
            :class:`decodiff_anomalib.features.VisualFeatures`; ``None`` for none.
        magnification: How much images are enlarged for the ``detail`` level; at 1 there is none.
        denoiser: See :func:`decodiff_anomalib.denoiser.build_denoiser`.
        num_steps: Correction steps.
        timestep_spacing: Which timesteps they use, see :class:`decodiff_anomalib.schedule.DeviationSchedule`.
        train_timesteps: Strengths of deviation to learn from: ``all`` ten (the paper), or only those ``used`` in the
            correction steps, which a short training learns far sooner.
        corruption: ``patches`` of the latents (the paper) or ``defects`` drawn on the images.
        fresh_per_step: Images read in a training step, each to draw a new defect on, with ``corruption="defects"``;
            the datamodule's batches where those are smaller.
        samples_per_step: Samples the denoiser learns from in one step: the fresh ones and recent ones.
        scale_latents: Whether latents are scaled to the training images, see
            :meth:`decodiff_anomalib.torch_model.DeCoDiffModel.fit`; features, ``calibrated`` and ``exemplars`` need it.
        levels: The maps that are fused and how much each counts: ``pixel``, ``latent``, ``feature`` (which needs
            features) and ``detail`` (which needs ``magnification``, too).
        pixel_clip: Saturation of the pixel map; ``None`` for none.
        latent_clip: Saturation of the latent map; ``None`` for none.
        pixel_sigma: Blur of the pixel map in pixels of the working size.
        latent_sigma: Blur of the latent map in latent pixels; 0 for none.
        fusion: ``geometric`` or ``arithmetic`` mean of the maps.
        calibrated: Whether the maps that are fused state by how much each level exceeds what is normal, see
            :class:`decodiff_anomalib.discrepancy.NormalRange`, rather than what it measures.
        exemplars: Normal images of each category that are kept, to replace in the corrected image what deviates, see
            :class:`decodiff_anomalib.exemplars.Exemplars`; 0 for none.
        score_share: Share of the map, its highest cells, whose mean is the score of an image; 0 for its maximum.
        train_steps: Optimiser steps, unless the trainer is given a duration.
        warmup_steps: Steps until the full learning rate.
        learning_rate_schedule: ``epochs`` (the paper): constant within an epoch, see
            :func:`decodiff_anomalib.paper.paper_learning_rate_factor`, the warm-up rounded up to whole epochs;
            ``steps``: a new rate at each step, down to almost nothing.
        category_dropout: Share of the samples whose category the denoiser is not told, so that it can do without;
            where there are several.
        published_table: Whether models of MVTec AD's or VisA's categories have a row for each of their data set, see
            :func:`decodiff_anomalib.conditioning.vocabulary`.
        learning_rate: Peak of the cosine.
        weight_decay: Of AdamW.
        ema_decay: Of the averaged weights that are validated, tested and saved; 0 for none.
        gradient_clip: Largest gradient norm, unless the trainer is given one; 0 for none.
        mixed_precision: Whether training computes in bfloat16 where the hardware does; inference never does by itself.
    """

    codec: str = "stabilityai/sd-vae-ft-ema"
    features: str | None = None
    magnification: float = 1.0
    denoiser: str | dict[str, Any] = "L"
    num_steps: int = 5
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    train_timesteps: Literal["all", "used"] = "all"
    corruption: Literal["patches", "defects"] = "patches"
    fresh_per_step: int = 4
    samples_per_step: int = 16
    scale_latents: bool = False
    levels: dict[str, float] = field(default_factory=lambda: {"pixel": 1.0, "latent": 1.0})
    pixel_clip: float | None = PIXEL_CLIP
    latent_clip: float | None = LATENT_CLIP
    pixel_sigma: float = PIXEL_SIGMA
    latent_sigma: float = LATENT_SIGMA
    fusion: Literal["geometric", "arithmetic"] = "geometric"
    calibrated: bool = False
    exemplars: int = 0
    score_share: float = 0.0
    train_steps: int = 10_400
    warmup_steps: int = 130
    learning_rate_schedule: Literal["steps", "epochs"] = "epochs"
    category_dropout: float = 0.0
    published_table: bool = True
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    ema_decay: float = 0.0
    gradient_clip: float = 0.0
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        """Refuse what no later step would.

        Raises:
            ValueError: If a word is unknown, settings exclude each other, or a number is out of range.
        """
        words = {"learning_rate_schedule": ("steps", "epochs"), "train_timesteps": ("all", "used")}
        for name, valid in words.items():
            if getattr(self, name) not in valid:
                msg = f"{name}={getattr(self, name)!r} is unknown; valid: {', '.join(valid)}."
                raise ValueError(msg)
        available = self.available_levels
        if not self.levels or set(self.levels) - set(available) or min(self.levels.values()) <= 0:
            msg = (
                f"levels={self.levels} must be one or more of {', '.join(available)}, each with its weight above 0; "
                f"feature is one of them where features={self.features!r} names a backbone, and detail where besides "
                f"magnification={self.magnification} is above 1."
            )
            raise ValueError(msg)
        if not 0 <= self.score_share <= 1:
            msg = f"score_share={self.score_share} must be from 0, the map's maximum, to 1, its mean."
            raise ValueError(msg)
        if self.magnification < 1:
            msg = f"magnification={self.magnification} must be at least 1, for images as they are."
            raise ValueError(msg)
        if self.exemplars < 0:
            msg = f"exemplars={self.exemplars} must be at least 0, for none."
            raise ValueError(msg)
        if not self.scale_latents and (self.calibrated or self.exemplars):
            msg = (
                f"calibrated={self.calibrated} and exemplars={self.exemplars} are learnt with the scale of latents; "
                "scale_latents=False needs calibrated=False and exemplars=0."
            )
            raise ValueError(msg)

    @property
    def magnifications(self) -> dict[str, float]:
        """How much images are enlarged for each level that compares visual features."""
        if self.features is None:
            return {}
        return {"feature": 1.0} | ({"detail": self.magnification} if self.magnification > 1 else {})

    @property
    def available_levels(self) -> tuple[str, ...]:
        """Levels there can be."""
        return ("pixel", "latent", *self.magnifications)


BALANCED = Preset(
    codec="bundled",
    features=PACKAGED_BACKBONE,
    magnification=2.0,
    denoiser="nano",
    num_steps=1,
    timestep_spacing="trailing",
    train_timesteps="used",
    corruption="defects",
    scale_latents=True,
    levels={"latent": 1.0, "feature": 1.0, "detail": 2.0},
    pixel_clip=None,
    latent_clip=None,
    latent_sigma=0.0,
    fusion="arithmetic",
    calibrated=True,
    exemplars=12,
    score_share=0.01,
    train_steps=600,
    warmup_steps=50,
    learning_rate_schedule="steps",
    category_dropout=0.1,
    published_table=False,
    learning_rate=1e-3,
    weight_decay=1e-2,
    ema_decay=0.99,
    gradient_clip=1.0,
    mixed_precision=True,
)

PRESETS = {"paper": Preset(), "balanced": BALANCED, "fast": replace(BALANCED, train_steps=200)}
