"""The paper's protocol against numbers recorded from the authors' program, at the tolerances stated beside them.

``python tests/parity/test_evaluation.py`` prints the table: fixture, largest difference, tolerance.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, roc_auc_score

from decodiff_anomalib.evaluation import (
    METRICS,
    anomalib_mask,
    anomalib_metrics,
    aupro,
    compare_protocols,
    paper_mask,
    paper_metrics,
)
from decodiff_anomalib.paper import (
    CATEGORY_ORDER,
    CROP,
    EPOCHS,
    HALF_TURN_PROBABILITY,
    RESIZE,
    WARMUP_EPOCHS,
    paper_learning_rate_factor,
    prepare_image,
    resize_and_crop,
)

Comparison = tuple[str, float, float]

METRIC_TOLERANCES = {"auroc": 1e-6, "f1max": 1e-6, "ap": 1e-9, "aupro": 1e-9}
SMALL = {"resize": (72, 72), "crop": (64, 64)}  # the sizes of preprocess.npz


def difference(found: torch.Tensor, recorded: np.ndarray) -> float:
    """Largest absolute difference."""
    return float((found.double() - torch.as_tensor(recorded).double()).abs().max())


def recorded_case(parity_dir: Path, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and masks of a case of ``metrics.npz``."""
    recorded = np.load(parity_dir / "metrics.npz")
    return torch.from_numpy(recorded[f"{case}_maps"]), torch.from_numpy(recorded[f"{case}_masks"]) > 0


def compare_metrics(parity_dir: Path) -> Iterator[Comparison]:
    for case, recorded in json.loads((parity_dir / "metrics.json").read_text()).items():
        metrics = paper_metrics(*recorded_case(parity_dir, case))
        for name in METRICS:
            scope, kind = name.split("_")
            found = abs(metrics[name] - recorded["reference"][name])
            yield f"metrics.json {case} {name}", found, METRIC_TOLERANCES[kind]
            if kind != "aupro":
                exact = recorded["float64_check"][scope][kind]
                tolerance = 1e-6 if kind == "f1max" else 1e-9  # the published F1 has 1e-10 in its denominator
                yield f"metrics.json {case} {name} float64", abs(metrics[name] - exact), tolerance
        with patch.object(aupro, "PAPER_THRESHOLDS", 50):
            found = paper_metrics(*recorded_case(parity_dir, case))["pixel_aupro"]
        yield f"metrics.json {case} aupro_num_th_50", abs(found - recorded["aupro_num_th_50"]), 1e-9


def compare_anomalib_metrics(parity_dir: Path) -> Iterator[Comparison]:
    """Metrics defined alike in both protocols are equal for the same masks; Anomalib computes in float32."""
    for case, recorded in json.loads((parity_dir / "metrics.json").read_text()).items():
        maps, masks = recorded_case(parity_dir, case)
        metrics = anomalib_metrics(maps, masks, masks.flatten(1).any(1))
        for name in METRICS[:-1]:
            yield f"metrics.json {case} {name} by Anomalib", abs(metrics[name] - recorded["reference"][name]), 1e-6


def compare_preprocessing(parity_dir: Path) -> Iterator[Comparison]:
    recorded = np.load(parity_dir / "preprocess.npz")
    pictures = [Image.fromarray(recorded[f"raw_{index}"]) for index in (0, 1)]
    mask = recorded["raw_mask"]
    for dataset, turns in (("mvtec", (False,)), ("visa", (False, True))):
        name = f"{dataset}_resized_uint8_0"
        resized = np.array(resize_and_crop(pictures[0], SMALL["resize"], SMALL["resize"]))
        yield f"preprocess.npz {name}", difference(torch.from_numpy(resized), recorded[name]), 0
        for index, picture in enumerate((*pictures, pictures[1])):
            image = prepare_image(picture, **SMALL)
            name = f"{dataset}_test_image_{index}"
            yield f"preprocess.npz {name}", difference(image, recorded[name]), 1e-6
        for index, stored in enumerate((0 * mask, 255 * mask, mask)):
            name = f"{dataset}_test_mask_{index}"
            cropped = paper_mask(Image.fromarray(stored), **SMALL)
            yield f"preprocess.npz {name}", difference(cropped, recorded[name]), 0

        # The augmentation has these variants and no others: each recorded one equals one, and all of them occur.
        variants = [
            prepare_image(pictures[0], **SMALL, shifted=shifted, turned=turned)
            for shifted in (False, True)
            for turned in turns
        ]
        matched = set()
        for index in range(int(recorded[f"{dataset}_train_variants"])):
            name = f"{dataset}_train_variant_{index}"
            found = [difference(variant, recorded[name]) for variant in variants]
            matched.add(int(np.argmin(found)))
            yield f"preprocess.npz {name}", min(found), 1e-6
        yield f"preprocess.npz {dataset}_train_variants", abs(len(matched) - len(variants)), 0


def compare_learning_rate(parity_dir: Path) -> Iterator[Comparison]:
    for run in json.loads((parity_dir / "lr_schedule.json").read_text()):
        epochs, warmup_epochs = run["epochs"], run["warmup_epochs"]
        rates = [run["lr"] * paper_learning_rate_factor(epoch, epochs, warmup_epochs) for epoch in range(epochs)]
        name = f"lr_schedule.json {epochs} epochs, {warmup_epochs} warm-up"
        yield name, float(np.abs(np.array(rates) - run["lr_used_in_epoch"]).max()), 1e-15


COMPARISONS = (compare_metrics, compare_anomalib_metrics, compare_preprocessing, compare_learning_rate)


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__.removeprefix("compare_"))
def test_equals_the_reference(compare, parity_dir: Path, assert_within_tolerance) -> None:
    assert_within_tolerance(compare(parity_dir))


def test_protocol_data(parity_dir: Path) -> None:
    recorded = json.loads((parity_dir / "class_index.json").read_text())
    for dataset, names in CATEGORY_ORDER.items():
        assert {name: row for row, name in enumerate(names)} == recorded[dataset]
    picture, augmentation = recorded["preprocessing"]["image"], recorded["preprocessing"]["train_augmentation"]
    assert list(RESIZE) == picture["resize"]
    assert (picture["crop"],) * 2 == CROP
    assert augmentation["rot180_probability"] == HALF_TURN_PROBABILITY
    published = json.loads((parity_dir / "lr_schedule.json").read_text())[0]
    assert (published["epochs"], published["warmup_epochs"]) == (EPOCHS, WARMUP_EPOCHS)


def test_published_shift_is_a_crop_at_12() -> None:
    ramp = Image.fromarray(np.add.outer(np.arange(288), np.arange(288)).astype(np.uint8)).convert("RGB")
    pixels = np.array(ramp)[12 : 12 + 256, 12 : 12 + 256]
    shown = (prepare_image(ramp, shifted=True) * 0.5 + 0.5) * 255
    assert difference(shown, np.moveaxis(pixels, -1, 0)) < 1e-4


def test_published_masks_grow_and_anomalibs_do_not() -> None:
    full = np.zeros((1024, 1024), np.uint8)
    full[480:562, 480:562] = 255
    true_area = 82**2 * (288 / 1024) ** 2
    areas = {
        "paper, 0/255": paper_mask(Image.fromarray(full)),
        "paper, 0/1": paper_mask(Image.fromarray(full // 255)),
        "anomalib": anomalib_mask(Image.fromarray(full)),
    }
    growth = {name: float(mask.sum()) / true_area for name, mask in areas.items()}
    assert growth["paper, 0/255"] > 1.15
    assert growth["paper, 0/1"] == pytest.approx(1, abs=0.01)
    assert growth["anomalib"] == pytest.approx(1, abs=0.09)  # 24 pixels a side for 23.06


def test_defect_outside_the_crop_is_normal_only_in_the_paper(tmp_path: Path) -> None:
    masks = np.zeros((2, 288, 288), np.uint8)
    masks[0, :8, :8] = 255
    masks[1, 100:140, 100:140] = 255
    paths: list[Path | None] = []
    for index, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / f"{index}.png")
        paths.append(tmp_path / f"{index}.png")
    maps = torch.rand(4, 256, 256, generator=torch.Generator().manual_seed(0)) / 2
    maps[1, 84:124, 84:124] += 0.5
    table = compare_protocols(maps, [*paths, None, None], ["part"] * 4, resize=(288, 288))
    assert table.loc[("part", "paper"), "image_auroc"] == 1
    assert table.loc[("part", "anomalib"), "image_auroc"] < 1


def test_metrics_equal_scikit_learn_where_scores_tie() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(8, (6, 32, 32), generator=generator) / 8
    masks = torch.rand(6, 32, 32, generator=generator) < maps / 4
    metrics = paper_metrics(maps, masks)
    arguments = masks.numpy().ravel(), maps.numpy().ravel()
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(*arguments), abs=1e-12)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(*arguments), abs=1e-12)


def test_aupro_equals_its_definition() -> None:
    """Computed threshold by threshold and region by region."""
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(3, 24, 24, generator=generator, dtype=torch.float64)
    masks = torch.zeros(3, 24, 24, dtype=torch.bool)
    regions = [(0, slice(2, 7), slice(3, 9)), (0, slice(15, 20), slice(12, 22)), (2, slice(0, 4), slice(0, 4))]
    for region in regions:
        masks[region] = True
        maps[region] += 0.3
    points = []
    for index in range(200):
        found = maps > maps.min() + index * (maps.max() - maps.min()) / 200
        rate = float(found[~masks].double().mean())
        if rate < 0.3:
            points.append((rate, np.mean([float(found[region].double().mean()) for region in regions])))
    rates, overlaps = np.array(points[::-1]).T
    assert paper_metrics(maps, masks)["pixel_aupro"] == pytest.approx(trapezoid(overlaps, rates / rates.max()))


def test_metrics_of_normal_images_alone_are_nan() -> None:
    metrics = paper_metrics(torch.rand(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool))
    assert np.isnan([metrics[name] for name in METRICS]).all()


def test_real_masks_side_by_side(data_dir: Path) -> None:
    """With maps that follow real masks, all metrics of both protocols are high; rows for each category and the mean."""
    paths: list[Path | None] = []
    categories = []
    for category in ("pcb", "magnetic_tile"):
        found = sorted((data_dir / category / "ground_truth").rglob("*.png"))[::12]
        paths += [*found, *[None] * len(found)]
        categories += [category] * 2 * len(found)
    maps = torch.rand(len(paths), 256, 256, generator=torch.Generator().manual_seed(0)) / 2
    for index, path in enumerate(paths):
        if path is not None:
            maps[index] += anomalib_mask(Image.open(path), (256, 256), (256, 256)) / 2
    table = compare_protocols(maps, paths, categories)
    assert list(table.columns) == list(METRICS)
    assert list(table.index) == [
        (name, kind) for name in (*dict.fromkeys(categories), "mean") for kind in ("paper", "anomalib")
    ]
    assert (table > 0.9).all(axis=None)
    assert (table <= 1 + 1e-6).all(axis=None)


def test_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="2 maps, 1 mask paths and 2 categories"):
        compare_protocols(torch.zeros(2, 8, 8), [None], ["part"] * 2)


def test_refuses_a_crop_larger_than_the_picture() -> None:
    with pytest.raises(ValueError, match=r"crop=\(256, 256\) must not be larger than resize=\(224, 224\)"):
        prepare_image(Image.new("RGB", (300, 300)), resize=(224, 224))


if __name__ == "__main__":
    for compare in COMPARISONS:
        for name, found, tolerance in compare(Path(__file__).parent / "data"):
            print(f"{name:60s} {found:9.2e}  {tolerance:9.2e}  {'ok' if found <= tolerance else 'FAIL'}")
