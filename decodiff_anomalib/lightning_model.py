"""DeCoDiff as an Anomalib model: its constructor, components, training and inference steps."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize
from torchvision.transforms.v2.functional import center_crop

from decodiff_anomalib import quiet
from decodiff_anomalib.callbacks import (
    DriftMonitor,
    HoldOutNormals,
    ImageFiles,
    Interruption,
    LoaderLimits,
    PredictionTable,
    RepeatableOrder,
    TrainingDuration,
    WeightAveraging,
)
from decodiff_anomalib.checkpoint import CheckpointMixin, builds_model, use_atomic_checkpoints
from decodiff_anomalib.conditioning import (
    GIVEN,
    INFERRED,
    UNKNOWN,
    category_indices,
    category_names,
    fixed_category_index,
    vocabulary,
)
from decodiff_anomalib.data import DemoTextures
from decodiff_anomalib.data.images import check_folders
from decodiff_anomalib.data.normal_images import collect_normal_images
from decodiff_anomalib.export.mixin import ExportMixin
from decodiff_anomalib.learning_rate import cosine_learning_rate_factor
from decodiff_anomalib.paper import EPOCHS, paper_learning_rate_factor
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.precision import check_precision, computes_bfloat16
from decodiff_anomalib.presets import SettingsOverrides, given_overrides, resolve
from decodiff_anomalib.report import ReportWriter
from decodiff_anomalib.visualizer import DeCoDiffVisualizer

if TYPE_CHECKING:
    from decodiff_anomalib.codec import Codec
    from decodiff_anomalib.torch_model import DeCoDiffModel

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 256  # pixels, of both sides
GLOBAL_SEED = "PL_GLOBAL_SEED"  # environment variable that ``seed_everything`` sets


class DeCoDiff(ExportMixin, CheckpointMixin, AnomalibModule):
    """DeCo-Diff: corrects deviations from normality in latent space (CVPR 2025).

    One model serves all categories of its datamodule, see :class:`decodiff_anomalib.data.MultiCategory`. It is given
    the category of an image in training; afterwards it infers it, and an image of none of them is anomalous and of
    category ``unknown``. Predictions name the category in ``pred_category``.

    Trains on normal images only. Thresholds are set on normal images too: where the datamodule would validate on its
    test set (``MVTecAD`` and ``Visa`` do by default), a share of the training images is held out instead.

    Args:
        preset: ``balanced``, ``fast`` (less training), or ``paper`` (as published; needs a GPU). Settings that are not
            given have its values.
        image_size: Working size in pixels, one side or (height, width), multiples of 32. The whole image is resized to
            it; nothing is cropped. By default 256, or what a ``pre_processor`` of yours makes.
        codec: ``bundled``, a file that ``decodiff_anomalib.codec.train`` wrote, or a hub id, folder or file of a
            diffusers autoencoder.
        features: timm backbone whose features join the latents; ``none`` for none.
        denoiser: Size of the UNet: ``nano``, ``tiny``, ``XS``, ``S``, ``M``, ``L``, ``XL``.
        weights: Trained denoiser to use: a folder that `decodiff convert` wrote, or a hub id. It brings its size, its
            categories and, where known, its codec.
        init_from: The same, to start training from. The denoiser must be of its size; categories may be fewer or more.
        category: Where tests, predictions and exports take the category of an image from: ``inferred`` from the image,
            ``given`` by the data, or the name of a category, or ``unknown``, for all images.
        num_steps: Correction steps, 1 to 10. A checkpoint can be loaded with others only if
            ``settings.corruption.timesteps`` is ``all``.
        corruption: ``defects`` drawn on images, or ``patches`` of the latents, as published.
        train_steps: Optimiser steps. A duration given to the trainer (``max_epochs``, ``max_steps``, ``max_time``)
            takes precedence.
        learning_rate: Peak learning rate.
        ema_decay: Decay of the averaged weights that are tested and saved; 0 for none.
        settings: All settings, see :class:`decodiff_anomalib.presets.Settings`; others have the preset's values.
            In Python, nested dictionaries serve as well: ``{"maps": {"pixel_sigma": 5}}``.
        calibration_split: Share of the training images held out to set thresholds where the datamodule would use test
            images; 0 lets it use them.
        false_alarm_rate: Share of normal images to be called anomalous, which sets the threshold.
        white_level: Value of white in images of more than 8 bits, integer or float. By default, the smallest of 1 (if
            all are floats), 255, 1023, 4095, 16383, 32767 and 65535 that covers the training images.
        seed: Makes training repeat: weights, order of images, corruption. By default ``seed_everything``'s, else 0.
        unreadable: What to do with image files that cannot be read in a prediction: ``skip`` leaves them out and lists
            them in its table with the reason, ``refuse`` raises an error. Training and testing always refuse them.
        predictions: CSV file that a prediction appends its scores to; images of a folder that it lists are left out,
            which lets an interrupted prediction go on. By default a new ``predictions.csv`` in the run's folder. See
            :class:`decodiff_anomalib.callbacks.PredictionTable`.
        report: Whether tests and predictions end with ``report.html``, a page with tables, plots and all images. See
            :class:`decodiff_anomalib.report.ReportWriter`.
        pre_processor: As in Anomalib.
        post_processor: As in Anomalib.
        evaluator: As in Anomalib.
        visualizer: As in Anomalib.

    Raises:
        ValueError: If a word is unknown, a value is out of range, or an argument and a setting contradict each other.
    """

    model: "DeCoDiffModel"
    evaluator: Evaluator | None

    def __init__(
        self,
        preset: str = "balanced",
        image_size: int | tuple[int, int] | None = None,
        codec: str | Path | dict[str, Any] | None = None,
        features: str | None = None,
        denoiser: str | dict[str, Any] | None = None,
        weights: str | Path | None = None,
        init_from: str | Path | None = None,
        category: str = INFERRED,
        num_steps: int | None = None,
        corruption: str | None = None,
        train_steps: int | None = None,
        learning_rate: float | None = None,
        ema_decay: float | None = None,
        settings: SettingsOverrides = SettingsOverrides(),  # noqa: B008 - never changed
        calibration_split: float = 0.15,
        false_alarm_rate: float = 0.01,
        white_level: float | None = None,
        seed: int | None = None,
        unreadable: str = "skip",
        predictions: str | Path | None = None,
        report: bool = False,
        pre_processor: PreProcessor | bool = True,
        post_processor: DeCoDiffPostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: DeCoDiffVisualizer | bool = True,
    ) -> None:
        quiet.begin()  # Lightning's trainer, which may come next, warns when it is made
        # Anomalib calls the configure_* methods inside super().__init__: what they need comes first.
        self._image_size = working_size(image_size, pre_processor)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(self._image_size)
        self._false_alarm_rate = false_alarm_rate
        self._default_evaluator = evaluator is True
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        if weights and (denoiser or init_from):
            msg = f"weights={str(weights)!r} brings its denoiser; leave denoiser and init_from out."
            raise ValueError(msg)
        if not 0 <= calibration_split < 1:
            msg = f"calibration_split={calibration_split} must be at least 0 and below 1."
            raise ValueError(msg)
        if white_level is not None and not 0 < white_level < math.inf:
            msg = f"white_level={white_level} must be above 0: the value of white in images of more than 8 bits."
            raise ValueError(msg)
        source = config = None
        pretrained = weights or init_from
        if pretrained and builds_model():
            from decodiff_anomalib.weights import load_pretrained

            source, config = load_pretrained(pretrained)
        arguments = {
            "codec": str(codec) if isinstance(codec, Path) else codec,
            "features": features,
            "denoiser": denoiser,
            "num_steps": num_steps,
            "corruption": corruption,
            "train_steps": train_steps,
            "learning_rate": learning_rate,
            "ema_decay": ema_decay,
        }
        if weights and config:
            arguments |= {"denoiser": config.denoiser, "codec": arguments["codec"] or config.codec}
        self.settings = resolve(preset, settings, arguments)
        self.hparams["settings"] = given_overrides(settings)  # plain data, as checkpoints need it
        self.hparams["predictions"] = None  # a file of this run, which checkpoints must not hand on
        self.hparams["report"] = False  # neither what was asked for this run
        self.seed = _global_seed() if seed is None else seed
        self.calibration_split = calibration_split
        self.white_level = white_level
        self.category = category
        self.categories: tuple[str, ...] = category_names(None)
        self._source_categories: tuple[str, ...] | None = None
        if config:
            self._source_categories = config.categories
            self.categories = config.categories or tuple(str(row) for row in range(config.num_categories))
        self._image_files = ImageFiles()
        self._prediction_table = PredictionTable(predictions, unreadable, self._image_files)
        self._report = [ReportWriter()] if report else []
        self._duration = TrainingDuration(self.settings.training.steps)
        if builds_model():
            self.model = self._build_model(self.settings.latents.codec)
        if source:
            from decodiff_anomalib.weights import transfer

            transfer(source, self.model.denoiser)

    def _build_model(
        self, codec: "Codec | str | dict[str, Any]", before: "DeCoDiffModel | None" = None
    ) -> "DeCoDiffModel":
        """The torch model, sharing the frozen backbone of the one ``before`` if it has the same."""
        from decodiff_anomalib.torch_model import DeCoDiffModel

        features = before.features if before is not None and before.settings.latents == self.settings.latents else None
        with torch.random.fork_rng(devices=[]):  # building a network draws weights, even if others are loaded then
            return DeCoDiffModel(self.settings, self._image_size, len(self.categories), codec, features, self.seed)

    # ---------------------------------------------------------------- components

    @property
    def learning_type(self) -> LearningType:
        """Trained on normal images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Only what no user would set: these override the user's. See :class:`TrainingDuration` for the duration."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize the whole image to the working size and scale it to [-1, 1]."""
        size = image_size or (DEFAULT_SIZE, DEFAULT_SIZE)
        return PreProcessor(Compose([Resize(size, antialias=True), Normalize(mean=[0.5] * 3, std=[0.5] * 3)]))

    def configure_post_processor(self) -> DeCoDiffPostProcessor:
        """Thresholds from normal images."""
        return DeCoDiffPostProcessor(false_alarm_rate=self._false_alarm_rate)

    @staticmethod
    def configure_evaluator(*, pixels: bool = True) -> Evaluator:
        """Threshold-free metrics; those of pixels only where there are masks.

        Args:
            pixels: Whether pixel metrics are among them. Anomalib's keep every map in memory.
        """
        image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
        of_images = [kind(fields=image, prefix="image_") for kind in (AUROC, AUPR, F1Max)]
        of_pixels = [kind(fields=pixel, prefix="pixel_", strict=False) for kind in (AUROC, AUPR, AUPRO, F1Max)]
        return Evaluator(test_metrics=of_images + of_pixels if pixels else of_images)

    @classmethod
    def configure_visualizer(cls) -> DeCoDiffVisualizer:
        """Pictures with the correction."""
        return DeCoDiffVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, then those of :mod:`decodiff_anomalib.callbacks`.

        Lightning calls this before the datamodule reads its folders, so that these are checked here. Weight averaging
        comes late: it must swap weights back after the others saw the validation, and before they are saved.
        """
        if self._trainer is None:
            return list(super().configure_callbacks())
        check_precision(str(self.trainer.precision))
        datamodule = self.trainer.datamodule
        quiet.begin(quiet.OF_RUNS + (quiet.OF_DEMO_TEXTURES if isinstance(datamodule, DemoTextures) else ()))
        if self._default_evaluator and self.evaluator is not None:
            # MultiCategory reports pixel metrics itself, by category and in bounded memory
            self.evaluator = self.configure_evaluator(pixels=not hasattr(datamodule, "categories"))
        components = list(super().configure_callbacks())
        if type(datamodule) is MVTecAD:
            check_folders(datamodule)
        if self.trainer.state.fn == TrainerFn.PREDICTING:
            return [*components, self._image_files, self._prediction_table, DriftMonitor(), *self._report]
        if self.trainer.state.fn != TrainerFn.FITTING:
            return [*components, self._image_files, *self._report]
        self._duration.prepare(self.trainer)
        use_atomic_checkpoints(self.trainer)
        self._follow_seed()
        self._adopt_categories(category_names(datamodule))
        settings = self.settings
        drawn_on = settings.corruption.fresh_per_step if settings.corruption.kind == "defects" else None
        decay = settings.training.ema_decay
        return [
            *components,
            LoaderLimits(drawn_on),
            HoldOutNormals(self.calibration_split, self.seed),
            RepeatableOrder(self.seed),
            self._image_files,
            self._duration,
            *([WeightAveraging(decay)] if decay else []),
            Interruption(),
        ]

    def teardown(self, stage: str) -> None:
        """Let in the messages that were left out, which may be another model's from now on."""
        super().teardown(stage)
        quiet.end()

    # ---------------------------------------------------------------- categories

    def _follow_seed(self) -> None:
        """Draw the initial weights anew, if no seed was given and ``seed_everything`` has set another since.

        Weights that come from elsewhere stay.
        """
        seed = _global_seed() if self.hparams["seed"] is None else self.seed
        if seed != self.seed:
            self.seed = seed
            if not (self._source_categories or self.hparams["weights"] or self.hparams["init_from"]):
                self.model = self._build_model(self.model.codec, self.model).to(self.device)

    def _adopt_categories(self, names: tuple[str, ...]) -> None:
        """Rebuild the model for the categories to train on.

        Of those it knows, it keeps the denoiser's weights and the regions to ignore.
        """
        if not set(names) <= set(self.categories):
            from decodiff_anomalib.weights import transfer

            before = self.model
            rows = {name: row for row, name in enumerate(self.categories)}
            self.categories = vocabulary(names, published_table=self.settings.training.published_table)
            self.model = self._build_model(before.codec, before).to(self.device)
            known = self.categories if self._source_categories else None
            transfer(before.denoiser, self.model.denoiser, self._source_categories, known)
            for row, name in enumerate(self.categories):
                if name in rows:
                    self.model.ignore(row, before.ignored[rows[name]])
        self._fix_category()

    def _fix_category(self) -> None:
        """Set the category that the model uses for all images, if ``category`` names one.

        Raises:
            ValueError: If the model does not know it.
        """
        self.model.fixed_category = fixed_category_index(self.category, self.categories)

    def check_category(self) -> None:
        """Check that categories can be inferred before they are.

        Raises:
            ValueError: If the model does not know ``category``, or was not trained to infer categories.
        """
        self._fix_category()
        router = self.model.router
        if self.category == INFERRED and router is not None and len(self.categories) > 1 and not router.trained.any():
            msg = (
                f"The model has seen no images of its {len(self.categories)} categories yet and cannot infer them. "
                "Train it, or choose category='given' or the name of a category."
            )
            raise ValueError(msg)

    def _named_category(self, batch: Batch) -> torch.Tensor:
        """Category index ``(B,)`` by the names that the data give."""
        names = getattr(batch, "category", None)
        if names is None:
            alone = category_names(self.trainer.datamodule)
            names = alone * len(batch.image) if len(alone) == 1 else [UNKNOWN] * len(batch.image)
        return category_indices(names, self.categories).to(self.device)

    def _given_category(self, batch: Batch) -> torch.Tensor | None:
        """Category index ``(B,)`` to test with; ``None`` leaves it to the model.

        Raises:
            ValueError: If ``category`` is ``given`` and the data give none that the model knows.
        """
        if self.category != GIVEN:
            return None
        category = self._named_category(batch)
        if (category == len(self.categories)).any():
            first = int((category == len(self.categories)).nonzero()[0])
            names = getattr(batch, "category", None)
            msg = (
                f"category='given', but the data give {names[first] if names else 'none'!r} for "
                f"{batch.image_path[first] if batch.image_path else 'an image'}; the model knows "
                f"{', '.join(self.categories)}. category='inferred' needs no label."
            )
            raise ValueError(msg)
        return category

    # ---------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Seed a training."""
        if stage == "fit":
            _seed_training(self.seed)
            from decodiff_anomalib.corruption import ReplayBuffer

            self._generator = torch.Generator().manual_seed(self.seed + self.global_rank)
            self._replay = ReplayBuffer()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Read images right that Anomalib reads wrong, and remember the size images came in."""
        del dataloader_idx
        self._image_files.reread(batch, self.white_level)
        self._incoming_size = batch.image.shape[-2:]
        return batch

    def on_train_start(self) -> None:
        """Fit latents, categories and memory banks to the training images; a resumed model has them."""
        if self.trainer.ckpt_path is None:
            self.model.fit(*self._normal_images("train"), self._generator)
            self._broadcast_buffers()

    def _normal_images(self, subset: Literal["train", "val"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Some normal images of each category, ``(N, 3, H, W)`` in [-1, 1], and their category index ``(N,)``."""
        datamodule = self.trainer.datamodule
        if self.trainer.world_size > 1 and datamodule is not None:
            loader = getattr(datamodule, f"{subset}_dataloader")()  # of all images, not of this process's share
        else:
            loader = self.trainer.train_dataloader if subset == "train" else self.trainer.val_dataloaders
        num_categories = len(category_names(datamodule))
        images, category = collect_normal_images(self._pre_processed(loader), self._named_category, num_categories)
        return images.to(self.device), category.to(self.device)

    def _pre_processed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of a loader as a step receives them, on the CPU."""
        for batch in loader:
            batch = self.on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: PLW2901
            if self.pre_processor:
                batch.image = self.pre_processor.transform(batch.image)
            yield batch

    def _broadcast_buffers(self) -> None:
        """Give every process the buffers of the first; of loaders that are no datamodule's, each saw a share."""
        for buffer in self.model.buffers():
            buffer.copy_(self.trainer.strategy.broadcast(buffer))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Predict the deviation of corrupted normal images."""
        del batch_idx
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._trains_in_bfloat16):
            loss = self.model.training_loss(batch.image, self._named_category(batch), self._replay, self._generator)
        self._check_loss(loss, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.image))
        return loss

    def _check_loss(self, loss: torch.Tensor, batch: Batch) -> None:
        if not loss.isfinite():
            paths = ", ".join(map(str, batch.image_path or ())) or "without a path"
            names = ", ".join(sorted({self.categories[index] for index in self._named_category(batch).tolist()}))
            msg = (
                f"The training loss is {loss.item()} in step {self.trainer.global_step + 1}, at images of {names}: "
                f"{paths}. The checkpoints of before are whole. Train with a smaller --model.learning_rate, or look at "
                "these images."
            )
            raise ValueError(msg)

    @property
    def _trains_in_bfloat16(self) -> bool:
        """Whether the settings ask for it, the user chose no precision, and the hardware computes it natively."""
        chosen = self.settings.training.mixed_precision and self.trainer.precision == "32-true"
        return chosen and computes_bfloat16(self.device)

    def on_validation_epoch_start(self) -> None:
        """Measure normal ranges on the images that thresholds will be set on, whose unit they are."""
        if not self.trainer.sanity_checking:
            images, category = self._normal_images("val")
            if len(images):
                self.model.calibrate(images, category)
            self._broadcast_buffers()  # every process takes part, with images or without

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Score normal images; the post-processor sets its thresholds on them."""
        del batch_idx
        outputs = self.model(batch.image, self._named_category(batch))
        return batch.update(pred_score=outputs.pred_score, anomaly_map=outputs.anomaly_map)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the denoiser; linear warm-up and cosine, by steps or, as published, by epochs."""
        settings = self.settings.training
        total_steps = self._duration.total_steps(self.trainer)

        def by_steps(step: int) -> float:
            return cosine_learning_rate_factor(step, total_steps, settings.warmup_steps)

        def by_epochs(epoch: int) -> float:
            steps = self._duration.steps_per_epoch(self.trainer)
            epochs = EPOCHS if math.isinf(total_steps) else math.ceil(total_steps / steps)
            return paper_learning_rate_factor(epoch, epochs, math.ceil(settings.warmup_steps / steps))

        self.trainer.fit_loop.setup_data()  # only the loader knows how long an epoch is
        factor, interval = (by_epochs, "epoch") if settings.learning_rate_schedule == "epochs" else (by_steps, "step")
        optimizer = torch.optim.AdamW(
            self.model.denoiser.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip at the trainer's value where the user gave one, else at the preset's."""
        value = gradient_clip_val or self.settings.training.gradient_clip
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")

    # ---------------------------------------------------------------- inference

    def on_test_start(self) -> None:
        """Check that categories can be inferred."""
        self.check_category()

    def on_predict_start(self) -> None:
        """Check that categories can be inferred."""
        self.check_category()

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> Batch:
        """Score a batch and keep its correction for the pictures."""
        del batch_idx, args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """As :meth:`test_step`, with maps at the size of the incoming images; 0 where a crop cut them off."""
        del batch_idx, dataloader_idx
        self._score(batch)
        resizes = extract_transforms_by_type(self.pre_processor and self.pre_processor.transform, Resize)
        if resizes:  # the size before a crop
            batch.anomaly_map, batch.correction = (
                center_crop(pictures, resizes[0].size) for pictures in (batch.anomaly_map, batch.correction)
            )
        batch.anomaly_map = F.interpolate(batch.anomaly_map[:, None], size=self._incoming_size, mode="bilinear")[:, 0]
        return batch

    def _score(self, batch: Batch) -> Batch:
        outputs = self.model(batch.image, self._given_category(batch))
        batch.update(pred_score=outputs.pred_score, anomaly_map=outputs.anomaly_map[:, 0])
        batch.category_index, batch.ood_score = outputs.category_index, outputs.ood_score
        names = (*self.categories, UNKNOWN)
        batch.pred_category = [names[index] for index in outputs.category_index.tolist()]
        batch.correction = outputs.correction / 2 + 0.5  # in [0, 1], as images are
        return batch


def _global_seed() -> int:
    """What ``seed_everything`` set, 0 by default."""
    return int(os.environ.get(GLOBAL_SEED, "0"))


def _seed_training(seed: int) -> None:
    """As ``seed_everything``, which would also make this the seed of every later model that is given none."""
    before = os.environ.get(GLOBAL_SEED)
    seed_everything(seed, workers=True)
    if before is None:
        del os.environ[GLOBAL_SEED]
    else:
        os.environ[GLOBAL_SEED] = before


def working_size(image_size: object, pre_processor: PreProcessor | bool) -> tuple[int, int]:
    """Height and width that a model works at.

    Args:
        image_size: One side, or both; ``None`` for those of the pre-processor, else 256.
        pre_processor: A pre-processor of the user's, whose last resizing or cropping decides.

    Raises:
        ValueError: If these are no two whole numbers, or contradict each other.
    """
    given = None if image_size is None else _as_size(image_size)
    made = _size_of(pre_processor) if isinstance(pre_processor, PreProcessor) else None
    if given and made and given != made:
        msg = f"image_size={image_size}, but the pre-processor makes images of {made}. Leave one of them out."
        raise ValueError(msg)
    return given or made or (DEFAULT_SIZE, DEFAULT_SIZE)


def _as_size(image_size: object) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        msg = f"image_size={image_size!r} must be one whole number, or two: height and width, such as (256, 320)."
        raise ValueError(msg)
    return sides[0], sides[1]


def _size_of(pre_processor: PreProcessor) -> tuple[int, int] | None:
    sized = extract_transforms_by_type(pre_processor.transform, (Resize, CenterCrop))
    if not sized:
        return None
    sides = sized[-1].size
    if len(sides) != 2:
        msg = (
            f"The pre-processor's {sized[-1]} keeps the aspect ratio of each image, and images of a model have one "
            f"size. Give both sides: ({sides[0]}, {sides[0]})."
        )
        raise ValueError(msg)
    return sides[0], sides[1]
