"""Settings: presets, overrides, and what is refused before any work."""

from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.__main__ import main
from decodiff_anomalib.codec import BUNDLED
from decodiff_anomalib.denoiser import DENOISER_SIZES
from decodiff_anomalib.features import PACKAGED_BACKBONE
from decodiff_anomalib.presets import PRESETS, SHORTCUTS, SettingsOverrides, given_overrides, resolve
from decodiff_anomalib.settings import GROUPS, Settings, SizeName


def test_the_presets_differ_where_they_should() -> None:
    paper, balanced, fast = (PRESETS[name] for name in ("paper", "balanced", "fast"))
    assert paper == Settings()
    assert (paper.denoiser.size, paper.correction.num_steps, paper.corruption.kind) == ("L", 5, "patches")
    assert (paper.maps.pixel_clip, paper.maps.latent_clip) == (0.4, 0.2)
    latents, training = replace(balanced.latents, magnification=1.0), replace(balanced.training, steps=200)
    assert fast == replace(balanced, latents=latents, training=training)
    assert balanced.available_levels == ("pixel", "latent", "feature")
    assert paper.available_levels == ("pixel", "latent")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_settings_are_plain_data_in_checkpoints(preset: str, tmp_path) -> None:
    torch.save(PRESETS[preset].to_dict(), tmp_path / "settings.pt")
    assert Settings.from_dict(torch.load(tmp_path / "settings.pt", weights_only=True)) == PRESETS[preset]


def test_words_are_those_of_the_modules_they_name() -> None:
    assert get_args(SizeName) == tuple(DENOISER_SIZES)
    assert PRESETS["balanced"].latents.backbone == PACKAGED_BACKBONE
    assert PRESETS["balanced"].latents.codec == BUNDLED


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["paper"].maps.fusion = "arithmetic"


def test_overrides_replace_only_what_they_name() -> None:
    settings = resolve("fast", {"maps": {"pixel_sigma": 5}, "training": {"steps": 7}})
    expected = replace(PRESETS["fast"], maps=replace(PRESETS["fast"].maps, pixel_sigma=5))
    assert settings == replace(expected, training=replace(expected.training, steps=7))
    assert resolve("fast") == resolve("fast", SettingsOverrides()) == resolve("fast", {}) == PRESETS["fast"]


def test_none_is_a_word_where_a_setting_is_optional() -> None:
    assert resolve("paper", {"maps": {"pixel_clip": "none"}}).maps.pixel_clip is None
    without = resolve("balanced", {"latents": {"backbone": "none"}})
    assert without.latents.backbone is None
    assert without.maps.levels == {"latent": 1.0}


def test_every_shortcut_is_a_setting() -> None:
    for group, name in SHORTCUTS.values():
        assert name in {entry.name for entry in fields(GROUPS[group])}
    assert resolve("fast", None, {"train_steps": 3, "num_steps": None}).training.steps == 3
    assert resolve("fast", {"training": {"steps": 3}}, {"train_steps": 3}).training.steps == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"corruption": {"kind": "typo"}}, r"settings\.corruption\.kind='typo' is unknown; valid: patches, defects"),
        ({"corruption": {"timesteps": "some"}}, r"timesteps='some' is unknown; valid: all, used"),
        ({"maps": {"fusion": "maximum"}}, r"settings\.maps\.fusion='maximum' is unknown; valid: geometric, arithmetic"),
        ({"correction": {"timestep_spacing": "even"}}, r"timestep_spacing='even' is unknown; valid: leading, trailing"),
        ({"training": {"learning_rate_schedule": "days"}}, r"'days' is unknown; valid: steps, epochs"),
        ({"denoiser": {"size": "huge"}}, r"denoiser='huge' is unknown; valid: nano, tiny, XS, S, M, L, XL"),
        ({"denoiser": {"size": {"breadth": 8}}}, r"denoiser has no breadth; valid: attention, "),
        ({"correction": {"num_steps": 11}}, r"settings\.correction\.num_steps=11 must be between 1 and 10"),
        ({"correction": {"exemplars": -1}}, r"settings\.correction\.exemplars=-1 must be at least 0"),
        ({"latents": {"normalization": "mine"}}, r"normalization='mine' is unknown; valid: backbone, imagenet, half"),
        ({"latents": {"references": -1}}, r"settings\.latents\.references=-1 must be at least 0"),
        ({"corruption": {"variants": 0}}, r"settings\.corruption\.variants=0 must be at least 1"),
        ({"corruption": {"noise": -1}}, r"settings\.corruption\.noise=-1 must be at least 0"),
        ({"training": {"loss": "both"}}, r"settings\.training\.loss='both' is unknown; valid: absolute, relative"),
        ({"latents": {"magnification": 0.5}}, r"settings\.latents\.magnification=0.5 must be at least 1"),
        ({"maps": {"pixel_sigma": -1}}, r"settings\.maps\.pixel_sigma=-1 must be at least 0"),
        ({"maps": {"latent_clip": 0}}, r"settings\.maps\.latent_clip=0 must be above 0; 'none' leaves the map"),
        ({"scoring": {"top_share": 2}}, r"settings\.scoring\.top_share=2 must be between 0 and 1"),
        ({"scoring": {"top_share": "all"}}, r"settings\.scoring\.top_share='all' must be between 0 and 1"),
        ({"corruption": {"fresh_per_step": 0}}, r"settings\.corruption\.fresh_per_step=0 must be at least 1"),
        ({"corruption": {"samples_per_step": 0}}, r"settings\.corruption\.samples_per_step=0 must be at least 1"),
        ({"training": {"steps": 0}}, r"settings\.training\.steps=0 must be at least 1"),
        ({"training": {"ema_decay": 1}}, r"ema_decay=1 would keep the initial weights"),
        ({"training": {"category_dropout": 1.5}}, r"category_dropout=1.5 must be between 0 and 1"),
        ({"pixel_sigma": 5}, r"settings has no group 'pixel_sigma'; .* Did you mean maps\.pixel_sigma\?"),
        ({"maps": {"sigma": 5}}, r"settings\.maps has no sigma; it has: levels, pixel_clip"),
    ],
)
def test_what_no_later_step_would_refuse_is_refused_at_once(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("balanced", overrides)
    with pytest.raises(ValueError, match=message):
        DeCoDiff(settings=overrides)


@pytest.mark.parametrize(
    ("overrides", "message"), [({"maps": 5}, "must be settings by name"), ("fast", "must be groups")]
)
def test_settings_of_another_shape(overrides: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        given_overrides(overrides)


def test_an_argument_that_contradicts_a_setting_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"num_steps=2 and settings\.correction\.num_steps=3 contradict each other"):
        DeCoDiff(num_steps=2, settings={"correction": {"num_steps": 3}})


def test_the_command_line_has_every_setting_with_its_type_and_help() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DeCoDiff, "model")
    text = " ".join(parser.format_help().split())
    for group, kind in GROUPS.items():
        for entry in fields(kind):
            assert f"--model.settings.{group}.{entry.name} " in text, (group, entry.name)
    assert "Blur of the pixel map, in pixels of the working size. (type: float | None, default: null)" in text
    given = ["--model.settings.maps.pixel_sigma", "5", "--model.settings.maps.pixel_clip", "none"]
    parsed = parser.parse_args([*given, "--model.settings.maps.levels", "{latent: 1, feature: 2}"])
    assert given_overrides(parsed.model.settings.as_dict()) == {
        "maps": {"pixel_sigma": 5.0, "pixel_clip": "none", "levels": {"latent": 1.0, "feature": 2.0}}
    }
    for words in (["--model.settings.maps.fusion", "maximum"], ["--model.settings.maps.sigma", "1"]):
        with pytest.raises(Exception, match=r"fusion|sigma"):
            parser.parse_args(words)


def test_printed_settings_are_complete_and_can_be_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    main(["settings", "--preset", "paper", "--settings.maps.pixel_clip", "none", "--settings.scoring.top_share", "0.1"])
    printed = yaml.safe_load(capsys.readouterr().out)
    expected = resolve("paper", {"maps": {"pixel_clip": "none"}, "scoring": {"top_share": 0.1}})
    assert resolve("balanced", printed) == expected
    assert {group: set(values) for group, values in printed.items()} == {
        group: {entry.name for entry in fields(kind)} for group, kind in GROUPS.items()
    }
