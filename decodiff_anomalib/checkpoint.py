"""What a checkpoint states about its model, in plain data, and the checks when it is loaded.

Checkpoints are dictionaries that ``torch.load(..., weights_only=True)`` reads. The entry :data:`KEY` holds the
identity of the model, from which it is rebuilt before the weights are loaded.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from decodiff_anomalib.presets import given_overrides
from decodiff_anomalib.settings import Settings

KEY = "decodiff"
FROZEN = ("model.codec.", "model.features.", "model.feature_latents.", "model.memory_banks.", "model.exemplars.")
"""Parts that training does not change."""

Checkpoint = dict[str, Any]


def identity(
    settings: Settings, image_size: tuple[int, int], codec: str | dict[str, Any] | None, categories: tuple[str, ...]
) -> dict[str, Any]:
    """What a checkpoint states about its model.

    Args:
        settings: All of them.
        image_size: Working height and width.
        codec: The codec's ``spec``, see :mod:`decodiff_anomalib.codec`.
        categories: Names in the order of their indices.
    """
    return {
        "image_size": list(image_size),
        "codec": codec,
        "features": settings.latents.backbone,
        "denoiser": settings.denoiser.size,
        "categories": list(categories),
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


def loaded_settings(saved: Mapping[str, Any], overrides: object, num_steps: int | None) -> Settings:
    """The settings of a checkpoint with those that can be chosen anew: the fused levels and the number of steps.

    Args:
        saved: The identity in the checkpoint.
        overrides: The ``settings`` given to the model.
        num_steps: The correction steps given to the model.

    Raises:
        ValueError: If the denoiser was not trained for the steps that are asked for.
    """
    settings = Settings.from_dict(saved["settings"])
    chosen = given_overrides(overrides)
    levels = chosen.get("maps", {}).get("levels", settings.maps.levels)
    settings = replace(settings, maps=replace(settings.maps, levels=levels))
    num_steps = chosen.get("correction", {}).get("num_steps") if num_steps is None else num_steps
    if num_steps is None or num_steps == settings.correction.num_steps:
        return settings
    if settings.corruption.timesteps == "used":
        msg = (
            f"The checkpoint was trained for num_steps={settings.correction.num_steps} and no other "
            f"(settings.corruption.timesteps='used'), not {num_steps}. Leave --model.num_steps out, or train with "
            "--model.settings.corruption.timesteps all."
        )
        raise ValueError(msg)
    return replace(settings, correction=replace(settings.correction, num_steps=num_steps))


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
    unaveraged = checkpoint.get("current_model_state", {})
    for name in unaveraged:
        if name.startswith(FROZEN):
            unaveraged[name] = checkpoint["state_dict"][name]
