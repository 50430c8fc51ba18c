"""What checkpoints state and refuse, on plain dictionaries."""

import math
from dataclasses import replace

import pytest
import torch

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib import checkpoint as checkpoints
from decodiff_anomalib.presets import PRESETS, resolve


def saved(preset: str = "balanced") -> dict:
    return checkpoints.identity(PRESETS[preset], (64, 96), "bundled", ("felt", "bolt"))


def test_the_identity_is_plain_data(tmp_path) -> None:
    torch.save({checkpoints.KEY: saved()}, tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoints.saved_identity(loaded) == saved()
    assert saved()["image_size"] == [64, 96]
    assert saved()["denoiser"] == "nano"


def test_checkpoints_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="The checkpoint is not DeCoDiff's"):
        checkpoints.saved_identity({"state_dict": {}})


def test_arguments_that_were_given_must_agree() -> None:
    other = checkpoints.identity(resolve("balanced", None, {"denoiser": "tiny"}), (64, 64), "bundled", ("felt",))
    checkpoints.check_arguments(saved(), other, given=set())
    checkpoints.check_arguments(saved(), other, given={"codec", "features", "learning_rate"})
    with pytest.raises(ValueError, match=r"trained with denoiser='nano', .* to have 'tiny'\. Leave --model\.denoiser"):
        checkpoints.check_arguments(saved(), other, given={"denoiser"})
    with pytest.raises(ValueError, match=r"trained with image_size=\[64, 96\], the model is to have \[64, 64\]"):
        checkpoints.check_arguments(saved(), other, given={"image_size"})


def test_training_resumes_with_the_same_categories_in_the_same_order() -> None:
    checkpoints.check_categories(saved(), ("felt", "bolt"))
    with pytest.raises(ValueError, match="on the categories felt, bolt; training cannot go on with bolt, felt"):
        checkpoints.check_categories(saved(), ("bolt", "felt"))


def test_levels_steps_and_the_training_can_be_chosen_anew() -> None:
    given = {"maps": {"levels": {"feature": 1.0}}, "training": {"learning_rate": 0.0, "steps": 9}}
    chosen, before = checkpoints.loaded_settings(saved(), given), PRESETS["balanced"]
    assert chosen.maps == replace(before.maps, levels={"feature": 1.0})
    assert chosen.training == replace(before.training, learning_rate=0.0, steps=9)
    assert (chosen.latents, chosen.correction, chosen.corruption) == (
        before.latents,
        before.correction,
        before.corruption,
    )
    assert checkpoints.loaded_settings(saved("paper"), {"correction": {"num_steps": 10}}).correction.num_steps == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maps": {"pixel_sigma": 9}}, r"trained with settings\.maps\.pixel_sigma=3\.0, the model is to have 9"),
        ({"corruption": {"kind": "patches"}}, r"settings\.corruption\.kind='defects', the model is to have 'patches'"),
        ({"latents": {"backbone": "none"}}, r"backbone='tf_efficientnet_lite0', the model is to have None"),
        ({"correction": {"exemplars": 0}}, r"settings\.correction\.exemplars=12, the model is to have 0"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoints.loaded_settings(saved(), given)


def test_settings_that_agree_are_accepted() -> None:
    given = {"maps": {"pixel_clip": "none", "pixel_sigma": 3}, "latents": {"codec": "moved.safetensors", "scale": True}}
    assert checkpoints.loaded_settings(saved(), given) == PRESETS["balanced"]


def test_steps_that_were_not_trained_are_refused() -> None:
    assert checkpoints.loaded_settings(saved(), {"correction": {"num_steps": 1}}) == PRESETS["balanced"]
    with pytest.raises(ValueError, match=r"trained for num_steps=1 and no other .*, not 5"):
        checkpoints.loaded_settings(saved(), {"correction": {"num_steps": 5}})


def test_thresholds_are_reset_wherever_they_are_stored() -> None:
    checkpoint = {
        "state_dict": {"post_processor.image_thresholds": torch.ones(3), "model.latent_mean": torch.ones(3)},
        "callbacks": {"PostProcessor": {"_pixel_threshold": torch.tensor(2.0)}, "Other": {}},
    }
    checkpoints.reset_thresholds(checkpoint)
    assert checkpoint["state_dict"]["post_processor.image_thresholds"].isnan().all()
    assert math.isnan(checkpoint["callbacks"]["PostProcessor"]["_pixel_threshold"])
    assert (checkpoint["state_dict"]["model.latent_mean"] == 1).all()


def test_metrics_are_those_of_the_model_that_loads() -> None:
    checkpoint = {"state_dict": {"model.a": torch.zeros(1), "evaluator.old": torch.zeros(1)}}
    checkpoints.replace_metrics(checkpoint, {"model.a": torch.ones(1), "evaluator.new": torch.ones(1)})
    assert set(checkpoint["state_dict"]) == {"model.a", "evaluator.new"}
    assert checkpoint["state_dict"]["model.a"] == 0


def test_frozen_parts_are_stored_once() -> None:
    state = {"model.codec.weight": torch.zeros(2), "model.denoiser.weight": torch.zeros(2)}
    unaveraged = {name: tensor.clone() for name, tensor in state.items()}
    checkpoints.share_frozen(checkpoint := {"state_dict": state, "current_model_state": unaveraged})
    assert checkpoint["current_model_state"]["model.codec.weight"] is state["model.codec.weight"]
    assert checkpoint["current_model_state"]["model.denoiser.weight"] is not state["model.denoiser.weight"]


def test_weights_of_another_model_are_refused_with_the_way_to_load_them() -> None:
    """A state_dict alone knows no size and no categories."""
    weights = DeCoDiff(preset="fast", image_size=64).state_dict()
    DeCoDiff(preset="fast", image_size=64).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"size mismatch(.|\n)*DeCoDiff\.load_from_checkpoint\(FILE\) builds"):
        DeCoDiff(preset="fast", image_size=96).load_state_dict(weights)
