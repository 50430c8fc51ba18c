"""What a checkpoint states about its model, in plain data, and the checks when it is loaded.

Checkpoints are dictionaries that ``torch.load(..., weights_only=True)`` reads. The entry :data:`KEY` holds the
identity of the model, from which it is rebuilt before the weights are loaded.
"""

from __future__ import annotations

import inspect
import logging
import math
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn

from decodiff_anomalib.atomic_write import atomic_write
from decodiff_anomalib.presets import SHORTCUTS, merge_overrides
from decodiff_anomalib.settings import NONE, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from lightning.pytorch import Trainer

    from decodiff_anomalib.callbacks import PredictionTable, TrainingDuration
    from decodiff_anomalib.corruption import ReplayBuffer
    from decodiff_anomalib.torch_model import DeCoDiffModel

logger = logging.getLogger(__name__)

KEY = "decodiff"
PROGRESS = "decodiff_progress"  # of a training that has not ended
FROZEN = tuple(
    f"model.{part}" for part in ("codec.", "features.", "feature_latents.", "memory_banks.", "exemplars.", "ignored")
)
"""Parts that training does not change."""

CHOSEN_ANEW = {("maps", "levels"), ("correction", "num_steps")}
"""Settings beside those of training that a checkpoint can be loaded with."""

Checkpoint = dict[str, Any]


def identity(
    settings: Settings,
    image_size: tuple[int, int],
    codec: str | dict[str, Any] | None,
    categories: tuple[str, ...],
    white_level: float | None = None,
) -> dict[str, Any]:
    """What a checkpoint states about its model.

    Args:
        settings: All of them.
        image_size: Working height and width.
        codec: The codec's ``spec``, see :mod:`decodiff_anomalib.codec`.
        categories: Names in the order of their indices.
        white_level: The value of white in images of more than 8 bits; ``None`` if there were none.
    """
    return {
        "image_size": list(image_size),
        "codec": codec,
        "features": settings.latents.backbone,
        "denoiser": settings.denoiser.size,
        "categories": list(categories),
        "white_level": white_level,
        "settings": settings.to_dict(),
    }


def saved_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The identity in a checkpoint.

    Raises:
        ValueError: If the checkpoint is another model's.
    """
    if KEY not in checkpoint:
        msg = "The checkpoint is not DeCoDiff's. Give one that `anomalib train --model DeCoDiff` wrote."
        raise ValueError(msg)
    return checkpoint[KEY]


def check_arguments(saved: Mapping[str, Any], requested: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse arguments that contradict a checkpoint.

    Args:
        saved: The identity in the checkpoint.
        requested: The identity of the model that is to be loaded.
        given: Names of the arguments that the user gave.

    Raises:
        ValueError: If one of them differs; names it.
    """
    for name in ("image_size", "codec", "features", "denoiser"):
        if name in given and saved[name] != requested[name]:
            msg = (
                f"The checkpoint was trained with {name}={saved[name]!r}, the model is to have {requested[name]!r}. "
                f"Leave --model.{name} out, or give another checkpoint."
            )
            raise ValueError(msg)


def check_categories(saved: Mapping[str, Any], training: tuple[str, ...]) -> None:
    """Refuse to resume training with other categories.

    Raises:
        ValueError: If the checkpoint has others than ``training``.
    """
    categories = tuple(saved["categories"])
    if categories != training:
        msg = (
            f"The checkpoint was trained on the categories {', '.join(categories)}; training cannot go on with "
            f"{', '.join(training)}, because every category has its place in the weights. Resume with the "
            "same ones, or start anew."
        )
        raise ValueError(msg)


def loaded_settings(saved: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings of a checkpoint with those that can be chosen anew.

    These are the fused levels, the number of correction steps if all timesteps were trained, and how training goes on.

    Args:
        saved: The identity in the checkpoint.
        given: The settings given to the model, see :func:`decodiff_anomalib.presets.merge_overrides`.

    Raises:
        ValueError: If another one differs from the checkpoint's; names it.
    """
    settings = Settings.from_dict(saved["settings"])
    for group, values in given.items():
        for name, given_value in values.items():
            value = None if given_value == NONE else given_value
            trained = getattr(getattr(settings, group), name)
            if value == trained or (group, name) == ("latents", "codec"):  # whose weights are in the checkpoint
                continue
            if (group, name) == ("correction", "num_steps") and settings.corruption.timesteps == "used":
                msg = (
                    f"The checkpoint was trained for num_steps={trained} and no other "
                    f"(settings.corruption.timesteps='used'), not {value}. Leave --model.num_steps out, or train with "
                    "--model.settings.corruption.timesteps all."
                )
                raise ValueError(msg)
            if group != "training" and (group, name) not in CHOSEN_ANEW:
                msg = (
                    f"The checkpoint was trained with settings.{group}.{name}={trained!r}, the model is to have "
                    f"{value!r}. Leave it out, or train anew."
                )
                raise ValueError(msg)
            settings = replace(settings, **{group: replace(getattr(settings, group), **{name: value})})
    return settings


def reset_thresholds(checkpoint: Checkpoint) -> None:
    """Set thresholds to NaN, in the weights and in the post-processor's own state: Lightning restores both."""
    for state in (checkpoint["state_dict"], *checkpoint.get("callbacks", {}).values()):
        for name, value in state.items():
            if name.rpartition("_")[2] in {"threshold", "thresholds"}:
                state[name] = torch.full_like(value, math.nan)


def replace_metrics(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]) -> None:
    """Replace the state of metrics by the model's own: which there are depends on the data that are tested."""
    kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
    own = {name: value for name, value in state.items() if name.startswith("evaluator.")}
    checkpoint["state_dict"] = kept | own


def share_frozen(checkpoint: Checkpoint) -> None:
    """Store frozen parts once: weight averaging keeps a second state, which then refers to the same tensors."""
    frozen = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(FROZEN)}
    if "current_model_state" in checkpoint:
        checkpoint["current_model_state"].update(frozen)


# ---------------------------------------------------------------- the file


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Anomalib's reader and writer of checkpoints, which replaces a file only by a whole one.

    Lightning stages the file in the folder of temporary files; on another file system, the last step is a copy.
    """

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any | None = None) -> None:
        """Write the file.

        Raises:
            OSError: If it cannot be written; the file that was there before is then as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(Path(path)) as staged:
                torch.save(checkpoint, staged)
        except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into the latter
            msg = (
                f"The checkpoint '{path}' cannot be written: {error}. If it was there before, it is as it was. Make "
                "room, and go on from it with --ckpt_path."
            )
            raise OSError(msg) from error


def use_atomic_checkpoints(trainer: Trainer) -> None:
    """Write checkpoints by :class:`AtomicCheckpointIO`, unless the user chose another writer."""
    chosen = trainer.strategy.checkpoint_io
    if type(chosen) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(chosen.extra_safe_globals)


# ---------------------------------------------------------------- the hooks of Lightning


_BUILDS_MODEL = ContextVar("builds_model", default=True)


def builds_model() -> bool:
    """Whether a constructor builds its torch model; while a checkpoint is loaded, the checkpoint does."""
    return _BUILDS_MODEL.get()


class CheckpointMixin(LightningModule):
    """Saving and loading of :class:`decodiff_anomalib.DeCoDiff`, which has these attributes."""

    settings: Settings
    categories: tuple[str, ...]
    model: DeCoDiffModel
    _duration: TrainingDuration
    white_level: float | None
    _prediction_table: PredictionTable
    _image_size: tuple[int, int]
    _source_categories: tuple[str, ...] | None
    seed: int
    _generator: torch.Generator
    _replay: ReplayBuffer
    _resumed_from: str | Path | None = None
    _build_model: Callable[..., DeCoDiffModel]
    _fix_category: Callable[[], None]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        """As in torch: weights for a model of the same size, settings and number of categories.

        Raises:
            RuntimeError: If they are of another model; says how to build that.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            msg = (
                f"{error}\nA state_dict has weights only. DeCoDiff.load_from_checkpoint(FILE) builds the model that "
                "the checkpoint states, with its size, settings and categories, and loads them."
            )
            raise RuntimeError(msg) from error

    @classmethod
    def load_from_checkpoint(cls, *args, **kwargs) -> Any:
        """As in Anomalib; the torch model is built once, as the checkpoint states it."""
        token = _BUILDS_MODEL.set(False)
        try:
            return super().load_from_checkpoint(*args, **kwargs)
        finally:
            _BUILDS_MODEL.reset(token)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what rebuilds the model, so that a checkpoint alone restores it."""
        super().on_save_checkpoint(checkpoint)
        # The weights are in the checkpoint, and what rebuilds the network is in its identity.
        checkpoint["hyper_parameters"] |= {"codec": None, "weights": None, "init_from": None}
        checkpoint[KEY] = self._identity(self.model.codec.spec) | {"seed": self.seed}
        share_frozen(checkpoint)
        if self._is_training() and not self._is_complete():
            checkpoint[PROGRESS] = {"generator": self._generator.get_state(), "replay": self._replay.state_dict()}

    def _is_training(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    def _is_complete(self) -> bool:
        return self.trainer.global_step >= self._duration.total_steps(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model that was saved, whatever arguments this one was given.

        Only ``category``, ``white_level`` and what :func:`loaded_settings` names can be chosen anew.
        Thresholds are of the levels they were set with: with others, scores are raw and nothing is labelled.

        Raises:
            ValueError: If the checkpoint is another model's, contradicts an argument that was given, or training is to
                be resumed with other categories.
        """
        if self._is_tested_after_resuming():
            self._keep_what_was_trained(checkpoint)
            return
        super().on_load_checkpoint(checkpoint)
        saved = saved_identity(checkpoint)
        requested = self._identity(self._codec_spec())
        check_arguments(saved, requested, self._given_arguments())
        if self._is_training():
            check_categories(saved, self.categories)
            self._take_up(checkpoint)
        replace_metrics(checkpoint, self.state_dict())
        given = merge_overrides(self.hparams["settings"], {name: self.hparams[name] for name in SHORTCUTS})
        self.settings = loaded_settings(saved, given)
        self._duration.steps = self.settings.training.steps
        if self.settings.maps.levels != saved["settings"]["maps"]["levels"]:
            reset_thresholds(checkpoint)
        followed_anyway = {"settings": None, "white_level": None}
        if requested | followed_anyway != saved | followed_anyway:
            differing = {name: value for name, value in saved.items() if value != requested.get(name)}
            differing.pop("settings", None)  # more than a screen; what was asked for and differs is refused
            logger.info("The checkpoint was trained with %s; following it.", differing)
        self._image_size = tuple(saved["image_size"])
        if self.hparams["white_level"] is None:
            self.white_level = saved.get("white_level")  # older checkpoints have none
        if self._trainer is not None and self.trainer.predicting:
            self._prediction_table.leave_out_too_bright(self.white_level)
        self.categories = self._source_categories = tuple(saved["categories"])
        before: DeCoDiffModel | None = getattr(self, "model", None)
        codec = before.codec if before is not None and before.codec.spec == saved["codec"] else saved["codec"]
        self.model = self._build_model(codec, before).to(self.device)
        self._fix_category()
        if self._trainer is not None and self.trainer.datamodule is not None:
            # It was set up for the size of the model before, to which its images would be resized first.
            self.trainer.datamodule.setup(self.trainer.state.fn)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Go on with the random numbers and samples of an interrupted training.

        Raises:
            ValueError: If the seed is another one, and with it the images that are held out.
        """
        seed = checkpoint[KEY].get("seed", self.seed)
        if seed != self.seed:
            msg = (
                f"The checkpoint was trained with seed {seed}, which chose the images that set thresholds; training "
                f"cannot go on with seed {self.seed}. Resume with --model.seed {seed}."
            )
            raise ValueError(msg)
        self._resumed_from = self.trainer.ckpt_path
        progress = checkpoint.get(PROGRESS)
        if progress and self.trainer.world_size == 1:  # other processes drew other numbers than the first, which saved
            self._generator.set_state(progress["generator"].cpu())
            self._replay.load_state_dict(progress["replay"])

    def _is_tested_after_resuming(self) -> bool:
        if self._trainer is None or self._is_training() or self._resumed_from is None:
            return False
        return Path(self.trainer.ckpt_path) == Path(self._resumed_from)

    def _keep_what_was_trained(self, checkpoint: Checkpoint) -> None:
        """Test the weights of a resumed training, not those it began with: ``anomalib train --ckpt_path`` does both."""
        logger.warning(
            "Training went on from %s; what it ended with is tested, not that file. To test the file itself, load it "
            "with DeCoDiff.load_from_checkpoint.",
            self._resumed_from,
        )
        checkpoint["state_dict"], checkpoint["callbacks"] = self.state_dict(), {}

    def _identity(self, codec: str | dict[str, Any] | None) -> dict[str, Any]:
        return identity(self.settings, self._image_size, codec, self.categories, self.white_level)

    def _codec_spec(self) -> str | dict[str, Any] | None:
        """The spec of the codec that the arguments ask for; ``None`` if they ask for none."""
        if builds_model():
            return self.model.codec.spec
        from decodiff_anomalib.codec import build_codec

        codec = self.hparams["codec"]
        return codec if codec is None or isinstance(codec, dict) else build_codec(codec).spec

    def _given_arguments(self) -> set[str]:
        """Names of the constructor's arguments that differ from their defaults."""
        parameters = inspect.signature(type(self).__init__).parameters
        return {name for name, value in self.hparams.items() if value != parameters[name].default}
