"""The model, the trainer and the shown images of a run; whole runs are in the integration tests."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from decodiff_anomalib.benchmark import run as run_module
from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.record import Run
from decodiff_anomalib.benchmark.run import build_model, perform, shown_samples, trainer_arguments, whole_images

PADIM = {"class_path": "Padim", "init_args": {"pre_trained": False}}


@pytest.fixture
def padim(layout) -> Run:
    return make_grid(layout(PADIM), accelerator="cpu")[0]


def test_models_get_whole_images_of_one_size(layout) -> None:
    entry = {
        "class_path": "Patchcore",
        "init_args": {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False},
    }
    model = build_model(make_grid(layout(entry), image_size=96)[0])
    resize, normalize = model.pre_processor.transform.transforms
    assert resize.size == [96, 96]
    assert normalize.mean == [0.485, 0.456, 0.406]
    assert model.evaluator is None
    assert model.visualizer is None
    assert type(model.post_processor).__name__ == "DeCoDiffPostProcessor"

    cropping = Patchcore.configure_pre_processor((256, 256), center_crop_size=(224, 224))
    nested = PreProcessor(Compose([cropping.transform, Normalize([0.5] * 3, [0.5] * 3)]))
    kept = whole_images(nested, 64).transform.transforms
    assert [type(step) for step in kept] == [Resize, Normalize, Normalize]
    image = torch.zeros(1, 3, 80, 80)
    image[..., 0, 0] = 1  # what a crop would lose
    assert whole_images(cropping, 80).transform(image)[0, 0, 0, 0] > 2

    decodiff = build_model(make_grid(layout({"class_path": "DeCoDiff"}, seed=3), image_size=64)[0])
    assert decodiff.pre_processor.transform.transforms[0].size == [64, 64]
    assert decodiff.seed == 3


def test_all_runs_share_one_folder_for_the_teacher_whatever_they_are_called(
    layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()

    def equip(model: object, run: Run, folder: Path) -> None:
        folders.add(folder)
        raise KeyboardInterrupt  # the rest of the run is of no interest

    monkeypatch.setattr(run_module, "_equip", equip)
    monkeypatch.setattr(run_module, "build_model", lambda run: None)
    output = tmp_path / "runs" / "benchmark"
    for run in make_grid(layout(PADIM, PADIM | {"name": "runs"})):
        with pytest.raises(KeyboardInterrupt):
            perform(run, run.folder(output), timing_seconds=0)
    assert folders == {output / "teacher"}


def test_a_model_without_pre_processor_is_refused(layout) -> None:
    entry = {"class_path": "DeCoDiff", "init_args": {"pre_processor": False}}
    with pytest.raises(TypeError, match=r"DeCoDiff has no pre_processor .* Leave pre_processor=True"):
        build_model(make_grid(layout(entry), image_size=64)[0])


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_automatic_precision_is_what_the_device_computes(
    padim: Run, monkeypatch: pytest.MonkeyPatch, native: bool, precision: str
) -> None:
    asked = []
    monkeypatch.setattr(run_module, "computes_bfloat16", lambda device: asked.append(device) or native)
    automatic = replace(padim, trainer={"max_steps": 2, "precision": "auto"})
    assert trainer_arguments(automatic) == {
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "max_steps": 2,
        "precision": precision,
    }
    assert asked == [torch.device("cpu")]


def test_given_precision_is_kept(padim: Run) -> None:
    assert trainer_arguments(replace(padim, trainer={"precision": "bf16-mixed"}))["precision"] == "bf16-mixed"
    assert "precision" not in trainer_arguments(padim)


def test_the_contact_sheet_shows_several_defects_and_the_same_images_with_any_other_categories() -> None:
    def samples(category: str) -> pd.DataFrame:
        kinds = ["good"] * 5 + ["dent"] * 4 + ["scratch"] * 9
        return pd.DataFrame(
            {
                "image_path": [f"{category}/{kind}/{index}" for index, kind in enumerate(kinds)],
                "label": kinds,
                "label_index": [int(kind != "good") for kind in kinds],
                "category": category,
            }
        )

    alone = samples("felt")
    both = pd.concat([samples("bolt"), alone], ignore_index=True)
    shown = both.loc[shown_samples(both)]
    assert shown.groupby("category").label.value_counts().loc["felt"].to_dict() in (
        {"good": 1, "dent": 1, "scratch": 2},
        {"good": 1, "dent": 2, "scratch": 1},
    )
    shown_alone = alone.loc[shown_samples(alone)].image_path
    assert set(shown_alone) == set(shown[shown.category == "felt"].image_path)
