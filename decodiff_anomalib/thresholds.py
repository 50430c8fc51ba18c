"""``decodiff threshold``: thresholds of a trained or exported model are moved without training."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from decodiff_anomalib.calibration import FEWEST_NORMALS, normals_needed, prediction_limit
from decodiff_anomalib.conditioning import UNKNOWN
from decodiff_anomalib.image_io import image_files, read_image
from decodiff_anomalib.model_file import ModelFile, open_model

if TYPE_CHECKING:
    from decodiff_anomalib.post_processor import DeCoDiffPostProcessor

STANDS_OUT = 0.001  # of sets of normal images, one has a score so far above the others
MAX_NAMED = 5


def threshold(
    model: Path,
    rate: float | None = None,
    images: Path | None = None,
    score: float | None = None,
    category: str | None = None,
    output: Path | None = None,
) -> None:
    """Move the thresholds of a checkpoint (.ckpt) or of an exported file (.onnx, .xml); give one of three ways.

    Args:
        model: The file.
        rate: False-alarm rate, on the scores of the normal images that are kept with the model; pixels keep theirs.
        images: Folder of normal images, of a new camera or lamp for example, that image and pixel thresholds are set
            on, at the model's false-alarm rates.
        score: Present score, between 0 and 1, that becomes the threshold and is 0.5 from then on.
        category: The only one to set; by default all, and of ``images`` those that they are of.
        output: File to write; by default, the model's is replaced.

    Raises:
        SystemExit: With status 2, if an argument is not valid or an image cannot be read; nothing is written.
    """
    try:
        _check_one_given(rate=rate, images=images, score=score)
        opened = open_model(Path(model))
        post_processor = opened.post_processor
        _check_category(post_processor, category)
        before = post_processor.image_thresholds.clone()
        if rate is not None:
            _set_rate(post_processor, rate, category)
        elif score is not None:
            _set_score(post_processor, score, category)
        else:
            assert images is not None
            _set_on_images(opened, Path(images), category)
        opened.save(Path(output) if output else Path(model))
    except (ImportError, OSError, ValueError) as error:
        print(f"decodiff threshold: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rows = zip((*post_processor.categories, "unknown images"), before, post_processor.image_thresholds, strict=True)
    for name, old, new in rows:
        print(f"{name}: image threshold {old:.4g} -> {new:.4g} (raw score)")
    print(f"\nFalse alarms on images like those that the thresholds were set on:\n{post_processor.describe()}")


# ---------------------------------------------------------------- ways to set them


def _check_one_given(**ways: object) -> None:
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        msg = f"Give one of --rate, --images and --score; given: {', '.join(given) or 'none'}."
        raise ValueError(msg)


def _check_category(post_processor: "DeCoDiffPostProcessor", category: str | None) -> None:
    if category not in {None, *post_processor.categories}:
        msg = f"--category {category!r} is none of the model's; valid: {', '.join(post_processor.categories)}."
        raise ValueError(msg)


def _set_rate(post_processor: "DeCoDiffPostProcessor", rate: float, category: str | None) -> None:
    if not 0 < rate < 0.5:
        msg = f"--rate {rate} must be between 0 and 0.5; 0.01 calls one normal image in a hundred anomalous."
        raise ValueError(msg)
    chosen = [
        scores
        for name, scores in zip(post_processor.categories, post_processor.normal_scores, strict=True)
        if category in {None, name} and len(scores) >= FEWEST_NORMALS
    ]
    if not chosen:
        msg = "The scores of normal images are not kept with this model. Give --images, a folder of normal images."
        raise ValueError(msg)
    post_processor.set_rate(rate, category)


def _set_score(post_processor: "DeCoDiffPostProcessor", score: float, category: str | None) -> None:
    if not 0 < score < 1:
        msg = f"--score {score} must be between 0 and 1; it is a score as predictions give it, 0.5 at the threshold."
        raise ValueError(msg)
    thresholds = post_processor.image_thresholds
    lone = len(post_processor.categories) == 1
    rows = slice(None) if category is None or lone else post_processor.categories.index(category)
    thresholds[rows] *= score / (1 - score)  # the raw score s of s / (s + threshold) = score


def _set_on_images(opened: ModelFile, folder: Path, category: str | None) -> None:
    post_processor = opened.post_processor
    files = image_files(folder)
    if len(files) < FEWEST_NORMALS:
        msg = (
            f"{folder} has {len(files)} images; {FEWEST_NORMALS} set a threshold, and {normals_needed(0.1)} can "
            "promise a false-alarm rate of 10 %. Give a folder with more normal images."
        )
        raise ValueError(msg)
    scores, tails, found = [], [], []
    for file in tqdm(files, desc="Scoring", unit=" images", disable=None, leave=False):  # None: on terminals only
        outputs = opened.infer(read_image(file, opened.white_level)[None])
        scores.append(outputs["pred_score"].flatten())
        tails.append(post_processor.highest_pixels(outputs["anomaly_map"]))
        found.append(int(outputs["category_index"]))
    names = (*post_processor.categories, UNKNOWN)
    wanted = {category} if category else set(post_processor.categories)
    others = [file for file, index in zip(files, found, strict=True) if names[index] not in wanted]
    if others:
        msg = (
            f"{len(others)} of {len(files)} images are not of {' or '.join(sorted(wanted))}, such as "
            f"{', '.join(map(str, others[:MAX_NAMED]))}. An image of no trained category is anomalous whatever the "
            "threshold. Leave them out, or train with normal images like them."
        )
        raise ValueError(msg)
    for index in sorted(set(found)):
        chosen = [position for position, value in enumerate(found) if value == index]
        if len(chosen) < FEWEST_NORMALS:
            msg = f"{len(chosen)} of the images are of {names[index]}; {FEWEST_NORMALS} or more set its threshold."
            raise ValueError(msg)
        raw = torch.cat([scores[position] for position in chosen])
        _warn_if_one_stands_out(raw, [files[position] for position in chosen])
        post_processor.set_on_normals(names[index], raw, torch.cat([tails[position] for position in chosen]))


def _warn_if_one_stands_out(scores: torch.Tensor, files: list[Path]) -> None:
    """Name images far above the others: a defect among the normal images lifts the threshold over all defects."""
    order = scores.argsort(descending=True)
    for position in order.tolist()[: max(0, len(files) - FEWEST_NORMALS)]:
        others = scores[scores < scores[position]]
        if len(others) < FEWEST_NORMALS:
            return
        if scores[position] <= prediction_limit(others, STANDS_OUT / len(files)):
            return
        print(
            f"{files[position]} stands out: its score is {scores[position]:.4g}, the next {others.max():.4g}. Look at "
            "it; if it shows a defect, take it out of the folder and repeat the command.",
            file=sys.stderr,
        )
