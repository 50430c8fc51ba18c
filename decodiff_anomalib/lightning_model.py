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
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.utils.split import ValSplitMode, random_split
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib.data.images import check_folders, image_paths, inspect_images, restore_depth
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.presets import PRESETS, Preset
from decodiff_anomalib.torch_model import DeCoDiffModel
from decodiff_anomalib.visualizer import DeCoDiffVisualizer

logger = logging.getLogger(__name__)

LIGHTNING_DEFAULT_EPOCHS = 1000
VALIDATIONS_PER_FIT = 3
FINAL_LEARNING_RATE = 0.02
MAX_FIT_IMAGES = 128


class DeCoDiff(AnomalibModule):
    """DeCo-Diff: corrects deviations from normality in latent space (CVPR 2025).

    Trains on normal images only. Thresholds are set on normal images too: where the datamodule would validate on its
    test set (``MVTecAD`` and ``Visa`` do by default), a share of the training images is held out instead.

    Args:
        preset: ``balanced``, ``fast`` (less training, one step), or ``paper`` (as published; needs a GPU). Every
            argument below left at ``None`` takes the preset's value.
        image_size: Working size in pixels, one side or (height, width), multiples of 32. The whole image is resized to
            it; nothing is cropped.
        codec: ``bundled``, or a hub id, folder or file of a diffusers autoencoder.
        features: timm backbone whose features join the latents; ``none`` for none.
        denoiser: Size of the UNet: ``nano``, ``tiny``, ``XS``, ``S``, ``M``, ``L``, ``XL``.
        weights: Trained denoiser to use: a folder that `decodiff convert` wrote, or a hub id. It brings its size, its
            categories and, where known, its codec.
        init_from: The same, to start training from. The denoiser must be of its size; categories may be fewer or more.
        num_steps: Correction steps at inference, 1 to 10.
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
        given = {name: None if value == "none" else value for name, value in given.items() if value is not None}
        unknown = set(settings or {}) - {field.name for field in fields(Preset)}
        if unknown:
            msg = f"settings has no {', '.join(sorted(unknown))}; it has: {', '.join(f.name for f in fields(Preset))}."
            raise ValueError(msg)
        self.settings: Preset = replace(PRESETS[preset], **given, **(settings or {}))
        self.seed = seed
        self.calibration_split = calibration_split
        self._num_categories = config.num_categories if weights else 1
        self.model = self._build_model(codec)
        if weights or init_from:
            transfer(pretrained, self.model.denoiser)
        self._wide_paths: frozenset[str] = frozenset()
        self._lent: dict[str, Any] = {}

    def _build_model(self, codec: str | Path | dict[str, Any] | None) -> DeCoDiffModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DeCoDiffModel(self.settings, self._image_size, self._num_categories, codec=codec)

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
    def configure_evaluator() -> Evaluator:
        """The figures of the literature, all free of thresholds; pixel figures only where there are masks."""
        image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
        return Evaluator(
            test_metrics=[
                AUROC(fields=image, prefix="image_"),
                AUPR(fields=image, prefix="image_"),
                F1Max(fields=image, prefix="image_"),
                AUROC(fields=pixel, prefix="pixel_", strict=False),
                AUPR(fields=pixel, prefix="pixel_", strict=False),
                AUPRO(fields=pixel, prefix="pixel_", strict=False),
                F1Max(fields=pixel, prefix="pixel_", strict=False),
            ]
        )

    @classmethod
    def configure_visualizer(cls) -> DeCoDiffVisualizer:
        """Pictures with the correction."""
        return DeCoDiffVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, then weight averaging, which must swap weights back after they saw validation.

        Lightning calls this before the datamodule looks at its folders: the last moment to look at them first.
        """
        callbacks = list(super().configure_callbacks())
        if self._trainer is None:
            return callbacks
        if type(self.trainer.datamodule) is MVTecAD:
            check_folders(self.trainer.datamodule)
        if self.settings.ema_decay and self.trainer.state.fn == TrainerFn.FITTING:
            callbacks.append(WeightAveraging(decay=self.settings.ema_decay, use_buffers=False))
        return callbacks

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
                self._hold_out_normals(datamodule, stage)
        subsets = {"fit": ("train_data", "val_data"), "validate": ("val_data",), "test": ("test_data",)}
        self._inspect(*(getattr(datamodule, name, None) for name in subsets.get(stage, ())))

    def on_predict_start(self) -> None:
        """Look at every image file before work starts."""
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
        """Scale the latents to the training images, and set the duration where the user left it to the model."""
        if self.settings.scale_latents and self.trainer.ckpt_path is None:
            self._fit_latents()
        if self._chooses_duration:
            self._set_duration()
        self._began, self._began_at_step = time.monotonic(), self.trainer.global_step

    def _fit_latents(self) -> None:
        """Fit the scale of the latents to the first training batches."""
        images: list[torch.Tensor] = []
        for batch in self._prepared(self.trainer.train_dataloader):
            images.extend(batch.image)
            if len(images) >= MAX_FIT_IMAGES:
                break
        self.model.fit_latents(torch.stack(images[:MAX_FIT_IMAGES]).to(self.device), self._generator)
        self._same_everywhere()

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
        """Train for the preset's steps in whole epochs, and validate a few times rather than every epoch."""
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        epochs = math.ceil(self.settings.train_steps / steps_per_epoch)
        if self.trainer.check_val_every_n_epoch == 1:
            self.trainer.check_val_every_n_epoch = math.ceil(epochs / VALIDATIONS_PER_FIT)
            epochs = self.trainer.check_val_every_n_epoch * math.ceil(epochs / self.trainer.check_val_every_n_epoch)
        self.trainer.fit_loop.max_epochs = epochs

    @property
    def _chooses_duration(self) -> bool:
        trainer = self.trainer
        return trainer.max_epochs == LIGHTNING_DEFAULT_EPOCHS and trainer.max_steps == -1

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Predict the deviation of corrupted normal images."""
        del batch_idx
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._trains_in_bfloat16):
            loss = self.model.training_loss(batch.image, generator=self._generator)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.image))
        done = self.trainer.global_step - self._began_at_step
        if done and not math.isinf(self._total_steps):
            pace = (time.monotonic() - self._began) / 60 / done
            left = pace * max(0, self._total_steps - self.trainer.global_step)
            self.log("minutes_left", left, prog_bar=True, logger=False, batch_size=len(batch.image))
        return loss

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
        """Measure the correction of normal images, in whose unit anomalies are stated."""
        if not self.settings.scale_latents or self.trainer.sanity_checking:
            return
        images: list[torch.Tensor] = []
        for batch in self._prepared(self.trainer.val_dataloaders):
            normal = slice(None) if batch.gt_label is None else ~batch.gt_label.bool()
            images.extend(batch.image[normal])
        if images:
            spread = images[:: math.ceil(len(images) / MAX_FIT_IMAGES)]  # they come category by category
            self.model.fit_normal_deviation(torch.stack(spread).to(self.device))
            self._same_everywhere()

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Score normal images; the post-processor sets its thresholds on them."""
        del batch_idx
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the denoiser; linear warm-up and cosine, by steps."""
        settings = self.settings
        chosen = self._chooses_duration
        self._total_steps = settings.train_steps if chosen else self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            warm_up = min(1.0, (step + 1) / settings.warmup_steps)
            progress = min(1.0, step / max(1, self._total_steps))  # 0 where the end is not known: a constant rate
            cosine = (1 + math.cos(math.pi * progress)) / 2
            return warm_up * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)

        optimizer = torch.optim.AdamW(
            self.model.denoiser.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
        return self._score(batch, map_size=batch.image.shape[-2:])

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """As :meth:`test_step`, with maps at the size the images came in."""
        del batch_idx, dataloader_idx
        return self._score(batch, map_size=self._incoming_size)

    def _score(self, batch: Batch, map_size: torch.Size) -> Batch:
        inspected = self.model.inspect(batch.image)
        anomaly_map = F.interpolate(inspected.anomaly_map, size=map_size, mode="bilinear")
        batch.update(pred_score=inspected.pred_score, anomaly_map=anomaly_map)
        batch.correction = inspected.correction / 2 + 0.5  # in [0, 1], as images are
        return batch

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint enough to restore everything, and hold the frozen codec once."""
        super().on_save_checkpoint(checkpoint)
        # The weights are in the checkpoint, and their size is in what it says about the model.
        checkpoint["hyper_parameters"] |= {"codec": self.model.codec.spec, "weights": None, "init_from": None}
        checkpoint["decodiff"] = self._identity()
        unaveraged = checkpoint.get("current_model_state", {})
        for name in unaveraged:
            if name.startswith(("model.codec.", "model.features.")):
                unaveraged[name] = checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model that was saved, whatever the command line said besides the checkpoint.

        Only ``num_steps`` can be chosen anew.

        Raises:
            ValueError: If the checkpoint is another model's, or contradicts an argument that was given.
        """
        super().on_load_checkpoint(checkpoint)
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
        num_steps = {"num_steps": self.settings.num_steps} if self._was_given("num_steps") else {}
        self.settings = replace(Preset(**saved["settings"]), **num_steps)
        self._image_size, self._num_categories = tuple(saved["image_size"]), saved["num_categories"]
        if {**mine, "settings": None} != {**saved, "settings": None}:
            logger.info("The checkpoint was trained with %s; following it.", saved)
        self.model = self._build_model(saved["codec"]).to(self.device)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint says about the model that it holds, in plain data."""
        return {
            "image_size": list(self._image_size),
            "codec": self.model.codec.spec,
            "features": self.settings.features,
            "denoiser": self.settings.denoiser,
            "num_categories": self._num_categories,
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


def _as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one side or both."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width
