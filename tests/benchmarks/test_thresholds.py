"""How well false-alarm rates are kept on new normal images, and how soon changed images are noticed. Run with ``-s``.

A model is trained first, which takes minutes, unless ``DECODIFF_CHECKPOINT`` names one. ``DECODIFF_DATA`` names other
images than those of the tests, as a root of ``MultiCategory``; the model must have been trained on it.
``DECODIFF_RESULTS`` names a CSV file that the rates are appended to; ``docs/pictures/false_alarms.py`` draws them.
"""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from decodiff_anomalib import DeCoDiff, MultiCategory
from decodiff_anomalib.calibration import prediction_limit
from decodiff_anomalib.callbacks.drift_monitor import WINDOW, usual_ood_scores, usual_scores, warning_limit
from decodiff_anomalib.torch_model import FEATURE

pytestmark = pytest.mark.benchmarks

RATES = (0.005, 0.01, 0.05, 0.1)
BATCH = 8
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda images: images,
    "0.75 times as bright": lambda images: 0.75 * images,
    "0.7 times the contrast": lambda images: 0.5 + 0.7 * (images - 0.5),
    "blurred by 1 pixel": lambda images: gaussian_blur(images, [7, 7], [1.0, 1.0]),
    "blurred by 2 pixels": lambda images: gaussian_blur(images, [13, 13], [2.0, 2.0]),
}


class Scored(NamedTuple):
    """Images of a category.

    Attributes:
        scores: ``(N,)``.
        unshifted: What they would be if shifts of whole images were left in, ``(N,)``.
        ood_scores: Out-of-distribution scores ``(N,)``.
        defective: ``(N,)``.
    """

    scores: torch.Tensor
    unshifted: torch.Tensor
    ood_scores: torch.Tensor
    defective: torch.Tensor


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest) -> MultiCategory:
    given = os.environ.get("DECODIFF_DATA")
    data = MultiCategory(Path(given) if given else request.getfixturevalue("data_dir"), num_workers=0)
    data.setup()
    return data


@torch.inference_mode()
def score(model: DeCoDiff, images: torch.Tensor, defective: torch.Tensor, category: int) -> Scored:
    """Score images ``(N, 3, H, W)`` in [0, 1] as a prediction does, but of a known category."""
    net = model.model
    columns: list[list[torch.Tensor]] = [[], [], []]
    for part in images.split(BATCH):
        observed = net.observe(model.pre_processor.transform(part), torch.full((len(part),), category))
        corrected = net.correct(observed.latents, observed.references, observed.category)
        levels = net.settings.maps.levels
        maps = net.level_maps(levels, observed, corrected, observed.images, observed.images)
        limits, net.common_shift.limits = net.common_shift.limits, torch.full_like(net.common_shift.limits, torch.inf)
        unshifted = net.score(net.fuse(maps, observed.category))
        net.common_shift.limits = limits
        found = net.score(net.fuse(maps, observed.category)), unshifted, net.router(observed.features["image"])[1]
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    return Scored(*map(torch.cat, columns), defective)


def images_of(data: MultiCategory, subset: str, category: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = getattr(data, f"{subset}_data")
    chosen = (dataset.samples.category == category).to_numpy().nonzero()[0]
    items = [dataset[int(index)] for index in chosen]
    return torch.stack([item.image for item in items]), torch.tensor([bool(item.gt_label) for item in items])


def keep(category: str, rate: float, shares: list[float]) -> None:
    """Append a row to the file that was asked for."""
    if "DECODIFF_RESULTS" in os.environ:
        with Path(os.environ["DECODIFF_RESULTS"]).open("a", newline="") as file:
            model = os.environ.get("DECODIFF_CHECKPOINT", "")
            csv.writer(file).writerow([model, category, rate, *(f"{share:.6g}" for share in shares)])


def test_false_alarms_and_detections(model: DeCoDiff, data: MultiCategory) -> None:
    print("\n| category | asked for | false alarms before | detected before | false alarms | detected |")
    print("|---|---|---|---|---|---|")
    for index, category in enumerate(model.categories):
        held_out, tested = (score(model, *images_of(data, subset, category), index) for subset in ("val", "test"))
        assert FEATURE in model.settings.maps.levels
        for rate in RATES:
            shares = []
            for name in ("unshifted", "scores"):
                exceeding = getattr(tested, name) > prediction_limit(getattr(held_out, name), rate)
                kinds = (exceeding[~tested.defective], exceeding[tested.defective])
                shares += [float(kind.float().mean()) for kind in kinds]
            print(f"| {' | '.join([category, f'{rate:.1%}', *(f'{share:.0%}' for share in shares)])} |", flush=True)
            keep(category, rate, shares)


def test_how_soon_changed_images_are_noticed(model: DeCoDiff, data: MultiCategory) -> None:
    """Streams of 100 normal test images, then 200 changed ones, drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    print("\n| category | change | streams with a warning | images until then, median |\n|---|---|---|---|")
    for index, category in enumerate(model.categories):
        images, defective = images_of(data, "test", category)
        normal = images[~defective]
        usual = {"scores": usual_scores(model)[index], "ood_scores": usual_ood_scores(model)[index]}
        limit = warning_limit(WINDOW, min(count for _, _, count in usual.values()))
        changed = {name: score(model, change(normal), defective[~defective], index) for name, change in CHANGES.items()}
        for name, scored in changed.items():
            delays = []
            for _ in range(50):
                before, after = (torch.randint(len(normal), (count,), generator=generator) for count in (100, 200))
                first = []
                for kind, (mean, spread, _) in usual.items():
                    values = torch.cat([getattr(changed["nothing"], kind)[before], getattr(scored, kind)[after]])
                    medians = ((values.log() - mean) / spread).unfold(0, WINDOW, 1).median(1).values
                    first += ((medians > limit).nonzero()[:1, 0] + WINDOW - 100).tolist()
                delays += [min(first)] if first else []
            middle = f"{torch.tensor(delays).median()}" if delays else "–"
            print(f"| {category} | {name} | {len(delays) / 50:.0%} | {middle} |", flush=True)
