"""The grid of runs; what it refuses is in ``test_command``."""

from pathlib import Path

import yaml

from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import Run
from decodiff_anomalib.presets import SHORTCUTS, Settings, resolve

CONFIG = Path(__file__).parents[3] / "configs" / "benchmark.yaml"


def test_the_configuration_file_is_valid(root: Path) -> None:
    grid = make_grid(yaml.safe_load(CONFIG.read_text())["benchmark"], root)
    assert len(grid) == 4 * 3 * 3  # models, seeds, both categories and each
    assert list(dict.fromkeys(run.model for run in grid)) == ["DeCoDiff", "DeCoDiff fast", "PatchCore", "EfficientAd"]
    assert {run.data["train_batch_size"] for run in grid if run.model == "EfficientAd"} == {1}
    assert {run.trainer["precision"] for run in grid if run.model == "EfficientAd"} == {"auto"}


def test_the_configurations_are_valid(root: Path) -> None:
    for config in sorted(CONFIG.parent.glob("*.yaml")):
        settings = yaml.safe_load(config.read_text())
        if "benchmark" in settings:
            assert len(make_grid(settings["benchmark"], root)) >= 8, config


def resolved(run: Run) -> Settings:
    """Settings that the constructor of DeCoDiff makes of a run's arguments."""
    arguments = {name: run.init_args[name] for name in SHORTCUTS if name in run.init_args}
    return resolve(run.init_args.get("preset", "balanced"), run.init_args.get("settings"), arguments)


def test_ablations_differ_from_the_line_before_them_as_named(root: Path) -> None:
    grid = make_grid(yaml.safe_load((CONFIG.parent / "ablation.yaml").read_text())["benchmark"], root)
    settings = {run.model: resolved(run) for run in grid}
    assert {each.training.steps for each in settings.values()} == {200}
    default = settings.pop("default")
    changed = {
        name: [
            f"{group}.{key}"
            for group, values in each.to_dict().items()
            for key, value in values.items()
            if value != getattr(getattr(default, group), key)
        ]
        for name, each in settings.items()
    }
    assert changed == {
        "no enlarged image": ["latents.magnification"],
        "no references": ["latents.references", "maps.levels"],
        "no noise": ["corruption.noise"],
        "absolute loss": ["training.loss"],
        "paper's corruption": ["corruption.kind"],
        "5 steps": ["correction.num_steps", "corruption.timesteps"],
        "no features": ["latents.backbone", "maps.levels"],
    }


def test_grids_of_arguments_make_models_that_are_told_apart(layout) -> None:
    entry = {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": {"grid": [4, 8]}}}
    grid = make_grid(layout() | {"model": entry})
    assert {run.model: run.init_args["n_features"] for run in grid} == {
        "Padim n_features=4": 4,
        "Padim n_features=8": 8,
    }
    assert len({run.folder(Path()) for run in grid}) == len(grid) == 6
