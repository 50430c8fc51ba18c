"""The three presets, and overriding their settings.

Every setting can be overridden by name: ``--model.settings.GROUP.NAME VALUE`` on the command line, ``settings:`` in
YAML, ``DeCoDiff(settings={"GROUP": {"NAME": value}})`` in Python.
"""

from collections.abc import Mapping
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_type_hints

from decodiff_anomalib.settings import (
    GROUPS,
    NONE,
    CorrectionSettings,
    CorruptionSettings,
    DenoiserSettings,
    LatentsSettings,
    MapsSettings,
    ScoringSettings,
    Settings,
    TrainingSettings,
)

_BALANCED = Settings(
    latents=LatentsSettings(
        codec="bundled", backbone="tf_efficientnet_lite0", magnification=2.0, scale=True, references=1000
    ),
    denoiser=DenoiserSettings(size="nano"),
    correction=CorrectionSettings(num_steps=1, timestep_spacing="trailing", exemplars=12),
    maps=MapsSettings(
        levels={"latent": 1.0, "feature": 1.0},
        pixel_clip=None,
        latent_clip=None,
        latent_sigma=0.0,
        fusion="arithmetic",
        normal_range=True,
    ),
    scoring=ScoringSettings(top_share=0.01),
    corruption=CorruptionSettings(kind="defects", timesteps="used", fresh_per_step=2, variants=2, noise=4.0),
    training=TrainingSettings(
        steps=600,
        warmup_steps=50,
        learning_rate_schedule="steps",
        learning_rate=2e-3,
        loss="relative",
        weight_decay=1e-2,
        ema_decay=0.99,
        gradient_clip=1.0,
        mixed_precision=True,
        category_dropout=0.1,
        published_table=False,
    ),
)

PRESETS: dict[str, Settings] = {
    "paper": Settings(),
    "balanced": _BALANCED,
    "fast": replace(
        _BALANCED,
        latents=replace(_BALANCED.latents, magnification=1.0),
        training=replace(_BALANCED.training, steps=200),
    ),
}


# ---------------------------------------------------------------- overrides


def _overrides_type(kind: type) -> type:
    """The fields of a group, each optional: ``None`` keeps the preset's value.

    Where ``None`` is a value of the setting, the word ``none`` stands for it.
    """
    optional = []
    for name, hint in get_type_hints(kind).items():
        word = Literal["none"] if type(None) in get_args(hint) and str not in get_args(hint) else None
        optional.append((name, hint | word | None, None))
    return make_dataclass(
        kind.__name__.replace("Settings", "Overrides"),
        optional,
        namespace={"__doc__": kind.__doc__, "__module__": __name__},
        eq=False,
        repr=False,
    )


if TYPE_CHECKING:
    SettingsOverrides: TypeAlias = Any
else:
    _OVERRIDES = {name: _overrides_type(kind) for name, kind in GROUPS.items()}
    globals().update({kind.__name__: kind for kind in _OVERRIDES.values()})  # where pickle looks for them
    SettingsOverrides = make_dataclass(
        "SettingsOverrides",
        [(name, kind, field(default_factory=kind)) for name, kind in _OVERRIDES.items()],
        namespace={"__doc__": Settings.__doc__, "__module__": __name__},
        eq=False,
        repr=False,
    )
    """Settings that differ from the preset; those left at ``None`` take its value."""

SHORTCUTS: dict[str, tuple[str, str]] = {
    "codec": ("latents", "codec"),
    "features": ("latents", "backbone"),
    "denoiser": ("denoiser", "size"),
    "num_steps": ("correction", "num_steps"),
    "corruption": ("corruption", "kind"),
    "train_steps": ("training", "steps"),
    "learning_rate": ("training", "learning_rate"),
    "ema_decay": ("training", "ema_decay"),
}
"""Arguments of :class:`decodiff_anomalib.DeCoDiff` that are settings: their group and name."""


def given_overrides(overrides: object) -> dict[str, dict[str, Any]]:
    """The overrides that were given, by group: plain data from a ``SettingsOverrides`` or nested mappings.

    Raises:
        ValueError: If a group or a name is unknown.
    """
    groups = asdict(overrides) if is_dataclass(overrides) and not isinstance(overrides, type) else (overrides or {})
    if not isinstance(groups, Mapping):
        msg = f"settings={overrides!r} must be groups with their settings, such as {{'maps': {{'pixel_sigma': 5}}}}."
        raise TypeError(msg)
    given: dict[str, dict[str, Any]] = {}
    for group, entries in groups.items():
        if group not in GROUPS:
            homes = [f"{home}.{group}" for home, kind in GROUPS.items() if group in {f.name for f in fields(kind)}]
            hint = f" Did you mean {' or '.join(homes)}?" if homes else ""
            msg = f"settings has no group {group!r}; it has: {', '.join(GROUPS)}.{hint}"
            raise ValueError(msg)
        known = [entry.name for entry in fields(GROUPS[group])]
        if not isinstance(entries, Mapping):
            msg = f"settings.{group}={entries!r} must be settings by name; it has: {', '.join(known)}."
            raise TypeError(msg)
        unknown = [name for name in entries if name not in known]
        if unknown:
            msg = f"settings.{group} has no {', '.join(unknown)}; it has: {', '.join(known)}."
            raise ValueError(msg)
        chosen = {name: value for name, value in entries.items() if value is not None}
        if chosen:
            given[group] = chosen
    return given


def merge_overrides(overrides: object, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that were given, as overrides or as arguments, by group.

    Args:
        overrides: A ``SettingsOverrides`` or nested mappings, see :func:`given_overrides`.
        arguments: Values of :data:`SHORTCUTS`, ``None`` where they were not given.

    Raises:
        ValueError: If a name is unknown, or an argument and an override contradict each other.
    """
    merged = given_overrides(overrides)
    for argument, value in arguments.items():
        if value is None:
            continue
        group, name = SHORTCUTS[argument]
        other = merged.setdefault(group, {}).setdefault(name, value)
        if other != value:
            msg = f"{argument}={value!r} and settings.{group}.{name}={other!r} contradict each other; give one of them."
            raise ValueError(msg)
    return merged


def resolve(preset: str, overrides: object = None, arguments: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a preset with what was given instead; arguments as :func:`merge_overrides`.

    Args:
        preset: A key of :data:`PRESETS`.
        overrides: See there.
        arguments: See there.

    Raises:
        ValueError: If a word is unknown, a number is out of range, or an argument and an override contradict.
    """
    if preset not in PRESETS:
        msg = f"preset={preset!r} is unknown; valid: {', '.join(PRESETS)}."
        raise ValueError(msg)
    chosen, base = merge_overrides(overrides, arguments or {}), PRESETS[preset]
    if chosen.get("latents", {}).get("backbone") == NONE and "levels" not in chosen.get("maps", {}):
        levels = {name: weight for name, weight in base.maps.levels.items() if name != "feature"}
        chosen.setdefault("maps", {})["levels"] = levels
    groups = {
        group: replace(
            getattr(base, group), **{name: None if value == NONE else value for name, value in values.items()}
        )
        for group, values in chosen.items()
    }
    return replace(base, **groups)


def show_settings(
    preset: Literal["balanced", "fast", "paper"] = "balanced",
    settings: SettingsOverrides = SettingsOverrides(),  # noqa: B008 - never changed
) -> None:
    """Print all settings that a model would be made with, as YAML for ``settings:``.

    Args:
        preset: Whose values are overridden.
        settings: Overrides by group.
    """
    import yaml

    groups = {
        group: {name: NONE if value is None else value for name, value in values.items()}
        for group, values in resolve(preset, settings).to_dict().items()
    }
    print(yaml.safe_dump(groups, sort_keys=False), end="")
