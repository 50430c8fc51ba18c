"""DeCoDiff as Anomalib's users know their models."""

import inspect
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils.split import ValSplitMode, random_split
from anomalib.deploy.export import CompressionType
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchvision.transforms.v2 import Compose, Normalize, Resize
from torchvision.transforms.v2.functional import center_crop

from decodiff_anomalib.conditioning import (
    GIVEN,
    INFERRED,
    RESERVED,
    UNKNOWN,
    category_indices,
    category_names,
    vocabulary,
)
from decodiff_anomalib.data.images import check_folders, image_paths, inspect_images, restore_depth
from decodiff_anomalib.paper import EPOCHS, paper_learning_rate_factor
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.presets import PRESETS, Preset
from decodiff_anomalib.torch_model import DeCoDiffModel
from decodiff_anomalib.visualizer import DeCoDiffVisualizer

logger = logging.getLogger(__name__)

LIGHTNING_DEFAULT_EPOCHS = 1000
VALIDATIONS_PER_FIT = 3
FINAL_LEARNING_RATE = 0.02
FIT_IMAGES, FIT_IMAGES_OF_CATEGORY = 128, 24


class DeCoDiff(AnomalibModule):
    """DeCo-Diff: corrects deviations from normality in latent space (CVPR 2025).

    One model serves all categories of its datamodule, see :class:`decodiff_anomalib.data.MultiCategory`. It is told the
    category of an image in training; afterwards it infers it, and calls an image of none of them anomalous and its
    category ``unknown``. Predictions name it in ``pred_category``.

    Trains on normal images only. Thresholds are set on normal images too: where the datamodule would validate on its
    test set (``MVTecAD`` and ``Visa`` do by default), a share of the training images is held out instead.

    Args:
        preset: ``balanced``, ``fast`` (less training, one step), or ``paper`` (as published; needs a GPU). Every
            argument below left at ``None`` takes the preset's value.
        image_size: Working size in pixels, one side or (height, width), multiples of 32. The whole image is resized to
            it; nothing is cropped.
        codec: ``bundled``, a file that ``decodiff_anomalib.codec.train`` wrote, or a hub id, folder or file of a
            diffusers autoencoder.
        features: timm backbone whose features join the latents; ``none`` for none.
        denoiser: Size of the UNet: ``nano``, ``tiny``, ``XS``, ``S``, ``M``, ``L``, ``XL``.
        weights: Trained denoiser to use: a folder that `decodiff convert` wrote, or a hub id. It brings its size, its
            categories and, where known, its codec.
        init_from: The same, to start training from. The denoiser must be of its size; categories may be fewer or more.
        category: What tests, predictions and exports take the images' category from: ``inferred`` from the image,
            ``given`` by the data, or a category's name, ``unknown`` included, for all of them.
        num_steps: Correction steps, 1 to 10; later on others only where ``train_timesteps`` of the settings is ``all``.
        corruption: ``defects`` drawn on images, or ``patches`` of the latents, as published.
        train_steps: Optimiser steps. A duration given to the trainer (``max_epochs``, ``max_steps``, ``max_time``)
            goes first.
        learning_rate: Peak learning rate.
        ema_decay: Decay of the weight average that is tested and saved; 0 keeps the last weights.
        settings: Any other fields of :class:`decodiff_anomalib.presets.Preset`, such as ``{pixel_sigma: 5}``.
        calibration_split: Share of the training images held out to set thresholds where the datamodule would use test
            images; 0 lets it use them.
        false_alarm_rate: Share of normal images to be called anomalous, which sets the threshold.
        seed: Makes training repeat: weights, order of images, corruption.
        pre_processor: As in Anomalib.
        post_processor: As in Anomalib.
        evaluator: As in Anomalib.
        visualizer: As in Anomalib.

    Raises:
        ValueError: If the preset is unknown or an argument out of range.
    """

    def __init__(
        self,
        preset: str = "balanced",
        image_size: int | tuple[int, int] = 256,
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
        settings: dict[str, Any] | None = None,
        calibration_split: float = 0.15,
        false_alarm_rate: float = 0.01,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: DeCoDiffPostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: DeCoDiffVisualizer | bool = True,
    ) -> None:
        # Anomalib calls the configure_* methods inside super().__init__: what they need comes first.
        self._image_size = _as_size(image_size)
        self._false_alarm_rate = false_alarm_rate
        self._default_evaluator = evaluator is True
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        if preset not in PRESETS:
            msg = f"preset={preset!r} is unknown; valid: {', '.join(PRESETS)}."
            raise ValueError(msg)
        if weights and (denoiser or init_from):
            msg = f"weights={str(weights)!r} brings its denoiser; leave denoiser and init_from out."
            raise ValueError(msg)
        if weights or init_from:
            from decodiff_anomalib.weights import load_pretrained, transfer

            pretrained, config = load_pretrained(weights or init_from)
        if weights:
            denoiser, codec = config.denoiser, codec or config.codec
        if corruption not in {None, "patches", "defects"}:
            msg = f"corruption={corruption!r} is unknown; valid: patches, defects."
            raise ValueError(msg)
        if not 0 <= calibration_split < 1:
            msg = f"calibration_split={calibration_split} must be at least 0 and below 1."
            raise ValueError(msg)
        given = {
            "features": features,
            "denoiser": denoiser,
            "num_steps": num_steps,
            "corruption": corruption,
            "train_steps": train_steps,
            "learning_rate": learning_rate,
            "ema_decay": ema_decay,
        }
        self.settings = _as_settings(preset, given, settings or {})
        self.seed = seed
        self.calibration_split = calibration_split
        self.category = category
        self._source_categories: tuple[str, ...] | None = None
        self.categories: tuple[str, ...] = category_names(None)
        if weights or init_from:
            self._source_categories = config.categories
            self.categories = config.categories or tuple(str(row) for row in range(config.num_categories))
        self.model = self._build_model(codec)
        if weights or init_from:
            transfer(pretrained, self.model.denoiser)
        self._wide_paths: frozenset[str] = frozenset()
        self._lent: dict[str, Any] = {}

    def _build_model(self, codec: str | Path | dict[str, Any] | None) -> DeCoDiffModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DeCoDiffModel(self.settings, self._image_size, len(self.categories), codec=codec)

    # ---------------------------------------------------------------- what Anomalib asks for

    @property
    def learning_type(self) -> LearningType:
        """Normal images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Only what no user would set: these override the user's. The duration is set in :meth:`on_train_start`."""
        return {"num_sanity_val_steps": 0}

    def configure_pre_processor(self, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize the whole image to the working size and scale it to [-1, 1]."""
        size = image_size or self._image_size
        return PreProcessor(Compose([Resize(size, antialias=True), Normalize(mean=[0.5] * 3, std=[0.5] * 3)]))

    def configure_post_processor(self) -> DeCoDiffPostProcessor:
        """Thresholds from normal images."""
        return DeCoDiffPostProcessor(false_alarm_rate=self._false_alarm_rate)

    @staticmethod
    def configure_evaluator(*, pixels: bool = True) -> Evaluator:
        """The figures of the literature, all free of thresholds; pixel figures only where there are masks.

        Args:
            pixels: Whether pixel figures are among them. Anomalib's keep every map in memory.
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
        """Anomalib's components, then weight averaging, which must swap weights back after they saw validation.

        Lightning calls this before the datamodule looks at its folders: the last moment to look at them first.
        """
        if self._trainer is not None and self._default_evaluator and self.evaluator is not None:
            # MultiCategory reports pixel figures itself, by category and in bounded memory
            self.evaluator = self.configure_evaluator(pixels=not hasattr(self.trainer.datamodule, "categories"))
        callbacks = list(super().configure_callbacks())
        if self._trainer is None:
            return callbacks
        if type(self.trainer.datamodule) is MVTecAD:
            check_folders(self.trainer.datamodule)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._adopt_categories(category_names(self.trainer.datamodule))
            if self.settings.ema_decay:
                callbacks.append(WeightAveraging(decay=self.settings.ema_decay, use_buffers=False))
        return callbacks

    # ---------------------------------------------------------------- categories

    def _adopt_categories(self, names: tuple[str, ...]) -> None:
        """Be a model of the categories that are to be trained on, keeping what is known of them."""
        if not set(names) <= set(self.categories):
            from decodiff_anomalib.weights import transfer

            before = self.model
            self.categories = vocabulary(names, published_table=self.settings.published_table)
            self.model = self._build_model(before.codec.spec).to(self.device)
            self.model.codec = before.codec
            ours = self.categories if self._source_categories else None
            transfer(before.denoiser, self.model.denoiser, self._source_categories, ours)
        self._fix_category()

    def _fix_category(self) -> None:
        """Have the model take all images to be of the category that was asked for, if one was.

        Raises:
            ValueError: If the model does not know it.
        """
        known = (*self.categories, UNKNOWN)
        if self.category in {INFERRED, GIVEN}:
            self.model.fixed_category = None
        elif self.category in known:
            self.model.fixed_category = known.index(self.category)
        else:
            msg = (
                f"category={self.category!r} is none that the model was trained on; "
                f"valid: {', '.join((*self.categories, *RESERVED))}."
            )
            raise ValueError(msg)

    def _check_category(self) -> None:
        """Refuse to infer categories before any were learnt.

        Raises:
            ValueError: If that is asked for.
        """
        self._fix_category()
        router = self.model.router
        if self.category == INFERRED and len(self.categories) > 1 and not router.trained.any():
            msg = (
                f"The model has seen no images of its {len(self.categories)} categories yet and cannot infer them. "
                "Train it, or choose category='given' or the name of a category."
            )
            raise ValueError(msg)

    def _named_category(self, batch: Batch) -> torch.Tensor:
        """Category index ``(B,)`` of images whose data name it."""
        names = getattr(batch, "category", None)
        if names is None:
            alone = category_names(self.trainer.datamodule)
            names = alone * len(batch.image) if len(alone) == 1 else [UNKNOWN] * len(batch.image)
        return category_indices(names, self.categories).to(self.device)

    def _given_category(self, batch: Batch) -> torch.Tensor | None:
        """Category index ``(B,)`` to test with; ``None`` leaves it to the model.

        Raises:
            ValueError: If the data are to give it and give none that the model knows.
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

    # ---------------------------------------------------------------- data

    def setup(self, stage: str) -> None:
        """Look at every image file before work starts, and hold normal images out where thresholds need them."""
        datamodule = self.trainer.datamodule
        if stage == "fit":
            seed_everything(self.seed, workers=True)
            self._generator = torch.Generator().manual_seed(self.seed + self.global_rank)
            if datamodule is not None:
                # more processes than cores only cost time, every epoch anew
                self._lend(datamodule, num_workers=min(datamodule.num_workers, os.cpu_count() or 1))
                if self.settings.corruption == "defects":
                    # more images than defects are drawn on would be read for nothing
                    fresh = min(datamodule.train_batch_size, self.settings.fresh_per_step)
                    self._lend(datamodule, train_batch_size=fresh)
                self._hold_out_normals(datamodule, stage)
        subsets = {"fit": ("train_data", "val_data"), "validate": ("val_data",), "test": ("test_data",)}
        self._inspect(*(getattr(datamodule, name, None) for name in subsets.get(stage, ())))

    def on_test_start(self) -> None:
        """Refuse what cannot be tested."""
        self._check_category()

    def on_predict_start(self) -> None:
        """Refuse what cannot be predicted; look at every image file before work starts."""
        self._check_category()
        loaders = self.trainer.predict_dataloaders
        self._inspect(*(loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])))

    def _inspect(self, *datasets: Dataset | None) -> None:
        paths = [path for dataset in datasets if dataset is not None for path in image_paths(dataset)]
        self._wide_paths |= inspect_images(paths)

    def _hold_out_normals(self, datamodule: AnomalibDataModule, stage: str) -> None:
        """Validate on held-out training images where the datamodule would validate on test images or not at all."""
        on_test = {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST, ValSplitMode.NONE}
        if not self.calibration_split or getattr(datamodule, "val_split_mode", None) not in on_test:
            return
        train_data = datamodule.train_data
        if round(len(train_data) * self.calibration_split) < 2:
            msg = (
                f"{len(train_data)} training images leave fewer than 2 to set thresholds at "
                f"calibration_split={self.calibration_split}. Give more images or a larger share; "
                "calibration_split=0 uses the datamodule's own validation images."
            )
            raise ValueError(msg)
        remaining, held_out = random_split(train_data, self.calibration_split, seed=self.seed)
        self._lend(datamodule, train_data=remaining, val_data=held_out)
        datamodule.setup(stage)  # gives the held-out images the augmentations of validation
        logger.info(
            "Held out %d of %d training images to set thresholds; test images are not used for it.",
            len(held_out),
            len(train_data),
        )

    def _lend(self, datamodule: AnomalibDataModule, **attributes: object) -> None:
        """Change attributes of the datamodule for the duration of the fit."""
        self._lent |= {name: getattr(datamodule, name, None) for name in attributes}
        vars(datamodule).update(attributes)

    def teardown(self, stage: str) -> None:
        """Give the datamodule back as it was, for the next model."""
        if stage == "fit" and self.trainer.datamodule is not None:
            vars(self.trainer.datamodule).update(self._lent)
            self._lent = {}

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Read 16-bit images at their depth, and remember the size images came in."""
        del dataloader_idx
        self._incoming_size = batch.image.shape[-2:]
        if self._wide_paths:
            restore_depth(batch, self._wide_paths)
        return batch

    # ---------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Learn latents and categories of the training images; set the duration where the user left it to the model."""
        if self.trainer.ckpt_path is None:
            self.model.fit(*self._normal_images(self.trainer.train_dataloader), self._generator)
            self._same_everywhere()
        if self._chooses_duration:
            self._set_duration()
        self._began, self._began_at_step = time.monotonic(), self.trainer.global_step

    def _normal_images(self, loader: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Some normal images of each category, ``(N, 3, H, W)`` as the model takes them, and their category index."""
        num_categories = len(category_names(self.trainer.datamodule))
        enough = max(math.ceil(FIT_IMAGES / num_categories), FIT_IMAGES_OF_CATEGORY)
        kept: dict[int, list[torch.Tensor]] = {}
        for batch in self._prepared(loader):
            normal = slice(None) if batch.gt_label is None else ~batch.gt_label.bool()
            for image, category in zip(batch.image[normal], self._named_category(batch)[normal].tolist(), strict=True):
                if len(kept.setdefault(category, [])) < enough:
                    kept[category].append(image)
            if len(kept) == num_categories and all(len(images) == enough for images in kept.values()):
                break
        category = [index for index, images in kept.items() for _ in images]
        images = [image for of_category in kept.values() for image in of_category]
        if not images:
            return torch.empty(0), torch.empty(0)
        return torch.stack(images).to(self.device), torch.tensor(category, device=self.device)

    def _prepared(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of a loader as a step receives them, on the CPU."""
        for batch in loader:
            batch = self.on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: PLW2901
            if self.pre_processor:
                batch.image = self.pre_processor.transform(batch.image)
            yield batch

    def _same_everywhere(self) -> None:
        """Give every process the buffers of the first: each saw its own share of the images."""
        for buffer in self.model.buffers():
            buffer.copy_(self.trainer.strategy.broadcast(buffer))

    def _set_duration(self) -> None:
        """Train for the preset's steps, and validate a few times rather than every epoch, unless told when to."""
        trainer, steps = self.trainer, self.settings.train_steps
        trainer.fit_loop.max_epochs = math.ceil(steps / self._steps_per_epoch)
        trainer.fit_loop.epoch_loop.max_steps = steps
        if trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0:  # Lightning's defaults
            trainer.check_val_every_n_epoch = None  # then Lightning counts batches, over epochs
            trainer.val_check_batch = math.ceil(steps / VALIDATIONS_PER_FIT) * trainer.accumulate_grad_batches

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    @property
    def _chooses_duration(self) -> bool:
        trainer = self.trainer
        return trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS and trainer.max_steps == -1

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Predict the deviation of corrupted normal images."""
        del batch_idx
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._trains_in_bfloat16):
            loss = self.model.training_loss(batch.image, self._named_category(batch), self._generator)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.image))
        done = self.trainer.global_step - self._began_at_step
        if done and not math.isinf(self._total_steps):
            pace = (time.monotonic() - self._began) / 60 / done
            left = pace * max(0, self._total_steps - self.trainer.global_step)
            self.log("minutes_left", left, prog_bar=True, logger=False, batch_size=len(batch.image))
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """End at ``max_steps`` as one stops early: validated first, because thresholds of earlier weights are wrong."""
        if 0 < self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    @property
    def _trains_in_bfloat16(self) -> bool:
        """Whether the preset asks for it, the user did not choose a precision, and the hardware computes it."""
        if not self.settings.mixed_precision or self.trainer.precision != "32-true":
            return False
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return self.device.type == "cpu" and capabilities.get("avx512_bf16", False)

    def on_validation_epoch_start(self) -> None:
        """Measure what is normal on the images that thresholds will be set on, in whose unit anomalies are stated."""
        if not self.trainer.sanity_checking:
            images, category = self._normal_images(self.trainer.val_dataloaders)
            if len(images):
                self.model.calibrate(images, category)
            self._same_everywhere()  # every process takes part, with images or without

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Score normal images; the post-processor sets its thresholds on them."""
        del batch_idx
        seen = self.model(batch.image, self._named_category(batch))
        return batch.update(pred_score=seen.pred_score, anomaly_map=seen.anomaly_map)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the denoiser; linear warm-up and cosine, by steps or, as published, by epochs."""
        settings = self.settings
        chosen = self._chooses_duration
        self._total_steps = settings.train_steps if chosen else self.trainer.estimated_stepping_batches

        def by_steps(step: int) -> float:
            warm_up = min(1.0, (step + 1) / max(1, settings.warmup_steps))
            progress = min(1.0, step / max(1, self._total_steps))  # 0 where the end is not known: a constant rate
            cosine = (1 + math.cos(math.pi * progress)) / 2
            return warm_up * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)

        def by_epochs(epoch: int) -> float:
            steps = self._steps_per_epoch
            epochs = EPOCHS if math.isinf(self._total_steps) else math.ceil(self._total_steps / steps)
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
        value = gradient_clip_val or self.settings.gradient_clip
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")

    # ---------------------------------------------------------------- inference

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> Batch:
        """Score a batch and keep its correction for the pictures."""
        del batch_idx, args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """As :meth:`test_step`, with maps of the images as they came in; nothing is found where they were cut off."""
        del batch_idx, dataloader_idx
        self._score(batch)
        resizes = extract_transforms_by_type(self.pre_processor and self.pre_processor.transform, Resize)
        if resizes:  # before it cut, if it did
            batch.anomaly_map, batch.correction = (
                center_crop(pictures, resizes[0].size) for pictures in (batch.anomaly_map, batch.correction)
            )
        batch.anomaly_map = F.interpolate(batch.anomaly_map[:, None], size=self._incoming_size, mode="bilinear")[:, 0]
        return batch

    def _score(self, batch: Batch) -> Batch:
        seen = self.model(batch.image, self._given_category(batch))
        batch.update(pred_score=seen.pred_score, anomaly_map=seen.anomaly_map[:, 0])
        batch.category_index, batch.strangeness = seen.category, seen.strangeness
        names = (*self.categories, UNKNOWN)
        batch.pred_category = [names[index] for index in seen.category.tolist()]
        batch.correction = seen.correction / 2 + 0.5  # in [0, 1], as images are
        return batch

    # ---------------------------------------------------------------- exports

    def forward(self, batch: torch.Tensor, *args, **kwargs) -> InferenceBatch:
        """Predictions on images ``(B, 3, H, W)`` in [0, 1], as tests make them; Anomalib's drops the antialiasing.

        Maps are of the working size. Without thresholds, scores and maps are raw and there are no labels.
        """
        from decodiff_anomalib.export import as_predicting

        del args, kwargs
        return as_predicting(self)(batch)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Write ``weights/torch/<name>.pt`` for Anomalib's ``TorchInferencer``.

        The file is a pickle, the only kind that ``TorchInferencer`` reads: whoever loads it lets it run code, which is
        why ``TRUST_REMOTE_CODE=1`` must be set, and needs this package. Load only files of your own making. ONNX and
        OpenVINO files, and checkpoints (``DeCoDiff.load_from_checkpoint``), are read without running code.

        Raises:
            ParityError: If the file does not give what the model gives, as for all exports.
        """
        from decodiff_anomalib.export import write_torch

        self._check_category()
        return write_torch(self, export_root, model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *,
        datamodule: AnomalibDataModule | None = None,
        output_names: Sequence[str] | None = None,
        **kwargs,
    ) -> Path:
        """Write ``weights/onnx/<name>.onnx``, proven on ONNX Runtime, and ``parity.json`` with what differs.

        Through ``engine.export`` or the command line, arguments after ``input_size`` go into ``onnx_kwargs``.

        Args:
            export_root: Folder for ``weights/onnx``.
            model_file_name: The file's name.
            input_size: Fixes height and width; by default images of any size are taken.
            datamodule: Its test images prove the file; otherwise drawn ones do.
            output_names: Of ``pred_score``, ``pred_label``, ``anomaly_map``, ``pred_mask`` (these by default),
                ``correction`` ``(B, 3, H, W)`` about [-1, 1], ``category`` and ``strangeness``. Anomalib's inferencers
                read no file with one of the latter three.
            kwargs: For ``torch.onnx.export``.

        Raises:
            ModuleNotFoundError: If the extra ``openvino`` is not installed.
            OSError: If the folder cannot be written to.
            ParityError: If the file does not give what the model gives; it is not written then.
            ValueError: If an output is unknown.
        """
        from decodiff_anomalib.export import write_onnx

        self._check_category()
        return write_onnx(self, export_root, model_file_name, input_size, datamodule, output_names, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write ``weights/openvino/<name>.xml`` and ``.bin``, and ``parity.json`` with what differs.

        ``category`` and ``strangeness`` are in the graph as named tensors, which ``add_outputs`` of a model that
        OpenVINO has read makes outputs. ``correction`` is computed only where ``output_names`` of ``onnx_kwargs`` ask
        for it, and Anomalib's inferencer reads no file with it.

        Args:
            export_root: Folder for ``weights/openvino``.
            model_file_name: The files' name.
            input_size: Fixes height and width; by default images of any size are taken.
            compression_type: ``FP16`` and ``INT8`` store weights smaller and compute as before; ``INT8_PTQ`` computes
                the denoiser and the search for the nearest feature in integers, ``INT8_ACQ`` so much of them that
                ``metric`` drops by ``max_drop`` at most.
            datamodule: Its test images prove the files, and measure ``metric``; its training images, normal and of all
                categories, calibrate the integers.
            metric: One of Anomalib's, by default the F1 score of the labels.
            task: As in Anomalib; not needed.
            max_drop: Of the metric.
            ov_kwargs: For ``openvino.convert_model``.
            onnx_kwargs: As the further arguments of :meth:`to_onnx`.

        Raises:
            ModuleNotFoundError: If the extra ``openvino`` is not installed.
            OSError: If the folder cannot be written to.
            ParityError: If the files do not give what the model gives, up to 1e-3 of maps and scores and 5e-2 with
                ``FP16``; they are not written then. With integers, the difference is measured only.
            ValueError: If there is no datamodule to calibrate on, or an output is unknown.
        """
        del task
        from decodiff_anomalib.export import write_openvino

        self._check_category()
        return write_openvino(
            self,
            export_root,
            model_file_name,
            input_size,
            compression_type,
            datamodule,
            metric,
            max_drop,
            ov_kwargs,
            onnx_kwargs,
        )

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint enough to restore everything, and hold the frozen codec once."""
        super().on_save_checkpoint(checkpoint)
        # The weights are in the checkpoint, and their size is in what it says about the model.
        checkpoint["hyper_parameters"] |= {"codec": self.model.codec.spec, "weights": None, "init_from": None}
        checkpoint["decodiff"] = self._identity()
        unaveraged = checkpoint.get("current_model_state", {})
        for name in unaveraged:
            if name.startswith(
                ("model.codec.", "model.features.", "model.feature_latents.", "model.novelty.", "model.exemplars.")
            ):
                unaveraged[name] = checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was saved, whatever the command line said besides the checkpoint.

        Only ``category`` can be chosen anew, ``num_steps`` where all timesteps were trained, and the ``levels`` of the
        settings. Thresholds are of the levels they were set with: with others, scores are raw and nothing is labelled.

        Raises:
            ValueError: If the checkpoint is another model's, contradicts an argument that was given, or training is to
                go on with other categories.
        """
        super().on_load_checkpoint(checkpoint)
        # Metrics are of a run and not of the model: which there are depends on the datamodule.
        ours = {name: value for name, value in self.state_dict().items() if name.startswith("evaluator.")}
        kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
        checkpoint["state_dict"] = _of_today(kept) | ours
        saved = checkpoint.get("decodiff")
        if saved is None:
            msg = "The checkpoint is not DeCoDiff's. Give one that `anomalib train --model DeCoDiff` wrote."
            raise ValueError(msg)
        mine = self._identity()
        for name in ("image_size", "codec", "features", "denoiser"):
            if self._was_given(name) and saved[name] != mine[name]:
                msg = (
                    f"The checkpoint was trained with {name}={saved[name]!r}, the model is to have {mine[name]!r}. "
                    f"Leave --model.{name} out, or give another checkpoint."
                )
                raise ValueError(msg)
        categories = tuple(saved["categories"])
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and categories != self.categories:
            msg = (
                f"The checkpoint was trained on the categories {', '.join(categories)}; training cannot go on with "
                f"{', '.join(self.categories)}, because every category has its place in the weights. Resume with the "
                "same ones, or start anew."
            )
            raise ValueError(msg)
        settings = Preset(**saved["settings"])
        self.settings = self._with_choices(settings)
        if self.settings.levels != settings.levels:
            _forget_thresholds(checkpoint)
        self._image_size = tuple(saved["image_size"])
        self.categories = self._source_categories = categories
        if {**mine, "settings": None} != {**saved, "settings": None}:
            logger.info("The checkpoint was trained with %s; following it.", saved)
        self.model = self._build_model(saved["codec"]).to(self.device)
        self._fix_category()
        if self._trainer is not None and self.trainer.datamodule is not None:
            # it was set up for the model of the command line, whose size its images would be resized to first
            self.trainer.datamodule.setup(self.trainer.state.fn)

    def _with_choices(self, saved: Preset) -> Preset:
        """The settings of a checkpoint with what can be chosen anew.

        Raises:
            ValueError: If the denoiser did not learn the steps that are asked for.
        """
        levels = (self.hparams["settings"] or {}).get("levels", saved.levels)
        if not self._was_given("num_steps"):
            return replace(saved, levels=levels)
        num_steps = self.settings.num_steps
        if num_steps != saved.num_steps and saved.train_timesteps == "used":
            msg = (
                f"The checkpoint was trained for num_steps={saved.num_steps} and no other (train_timesteps='used'), "
                f"not {num_steps}. Leave --model.num_steps out, or train with settings={{train_timesteps: all}}."
            )
            raise ValueError(msg)
        return replace(saved, levels=levels, num_steps=num_steps)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint says about the model that it holds, in plain data."""
        return {
            "image_size": list(self._image_size),
            "codec": self.model.codec.spec,
            "features": self.settings.features,
            "denoiser": self.settings.denoiser,
            "categories": list(self.categories),
            "settings": asdict(self.settings),
        }

    def _was_given(self, name: str) -> bool:
        default = inspect.signature(DeCoDiff.__init__).parameters[name].default
        return self.hparams[name] != default


class WeightAveraging(EMAWeightAveraging):
    """Lightning's moving average, which swaps weights and buffers for validation and back.

    What validation measured (thresholds, normal deviation) is kept by the averaged and by the trained model: Lightning
    saves the first as the model and the second as its callbacks, of which the post-processor is one.
    """

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap weights back, keep the buffers."""
        measured = [buffer.clone() for buffer in pl_module.buffers()]
        super().on_validation_epoch_end(trainer, pl_module)
        for buffer, value in zip(pl_module.buffers(), measured, strict=True):
            buffer.copy_(value)


def _forget_thresholds(checkpoint: dict[str, Any]) -> None:
    """Make thresholds NaN, in the model and in the post-processor's own state: Lightning restores both."""
    for state in (checkpoint["state_dict"], *checkpoint.get("callbacks", {}).values()):
        for name, value in state.items():
            if name.rpartition("_")[2] in {"threshold", "thresholds"}:
                state[name] = torch.full_like(value, math.nan)


def _as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one side or both."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def _as_settings(preset: str, given: dict[str, Any], others: dict[str, Any]) -> Preset:
    """The preset with what was given instead: arguments, ``None`` where they were not, and any others of its fields.

    Raises:
        ValueError: If there are no such fields, or their values do not fit.
    """
    unknown = set(others) - {field.name for field in fields(Preset)}
    if unknown:
        msg = f"settings has no {', '.join(sorted(unknown))}; it has: {', '.join(f.name for f in fields(Preset))}."
        raise ValueError(msg)
    chosen = {name: None if value == "none" else value for name, value in given.items() if value is not None}
    if given["features"] == "none":
        levels, of_features = PRESETS[preset].levels, PRESETS[preset].magnifications
        chosen["levels"] = {name: weight for name, weight in levels.items() if name not in of_features}
    return replace(PRESETS[preset], **chosen | others)


def _of_today(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names they have now: the bank of the feature level was the feature latents' once."""
    moved = {f"model.feature_latents.{name}" for name in ("direction_center", "whitening", "bank")}
    return {
        name.replace("feature_latents", "novelty.feature") if name in moved else name: values
        for name, values in weights.items()
    }
