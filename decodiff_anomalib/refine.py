"""``decodiff refine``: what the model took for defects and is none becomes normal, without training anew."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.calibration import FEWEST_NORMALS
from decodiff_anomalib.image_io import image_files, read_image
from decodiff_anomalib.model_file import load_checkpoint, save_checkpoint
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
from decodiff_anomalib.torch_model import DeCoDiffModel

SLACK = 1.05  # of the limit of the out-of-distribution score over the images that are stated to be normal


class Scored(NamedTuple):
    """Images as a model of a known category scores them.

    Attributes:
        scores: Raw scores ``(N,)``.
        tails: Their highest pixels ``(N, T)``, see :meth:`DeCoDiffPostProcessor.highest_pixels`.
        ood_scores: ``(N,)``.
    """

    scores: torch.Tensor
    tails: torch.Tensor
    ood_scores: torch.Tensor


def refine(
    model: Path,
    normal: Path | None = None,
    defective: Path | None = None,
    category: str | None = None,
    tolerance: float = 0.05,
    force: bool = False,
    output: Path | None = None,
) -> None:
    """Add normal images to a checkpoint, such as false alarms that were marked in a report, and set thresholds anew.

    Their latents join the memory bank of their category, and their scores those that its threshold is set on; each is
    scored by a bank that has the other half of them only. The denoiser is not trained further. Other categories stay
    as they are. A table shows what it changes.

    Args:
        model: The checkpoint (.ckpt). Exported files are made anew from the refined one.
        normal: Folder of normal images, or a text file with a path in each line, as a report writes it. 8 or more.
        defective: The same of defective images, which must still be detected.
        category: Of the images; needed where the model has several.
        tolerance: Largest share of the defective images that may be lost; if more are, nothing is saved.
        force: Saves all the same.
        output: File to write; by default, ``refined-`` before the model's name. The model's own file is kept.

    Raises:
        SystemExit: With status 2, if an argument is not valid or an image cannot be read; with 1, if more defective
            images are lost than ``tolerance`` allows. Nothing is written then.
    """
    target = Path(output) if output else Path(model).with_name(f"refined-{Path(model).name}")
    try:
        sources = _files(normal, at_least=2 * FEWEST_NORMALS), _files(defective, at_least=1) if defective else []
        module, index = _open(Path(model), category)
        normals = _read(module, sources[0])
        defects = _read(module, sources[1]) if sources[1] else normals[:0]
        lost = _learn(module, normals, defects, index)
        if lost <= tolerance or force:
            save_checkpoint(module, Path(model), target)
    except (ImportError, OSError, ValueError) as error:
        print(f"decodiff refine: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if lost > tolerance and not force:
        print(
            f"Not saved: {lost:.0%} of the defective images are no longer detected, --tolerance {tolerance:g} allows "
            f"{tolerance:.0%}. Leave normal images out that resemble them, or give --force true.",
            file=sys.stderr,
        )
        raise SystemExit(1)
    print(f"Written to {target}.")


def _learn(module: DeCoDiff, normals: torch.Tensor, defects: torch.Tensor, index: int) -> float:
    """Make images normal, print what it changes, and return the share of ``defects`` that are lost by it."""
    before = [_share_above(module, index, _score(module, images, index)) for images in (normals, defects)]

    scored = _score_by_the_other_half(module, normals, index)
    _add(module.model, normals, index)
    module.post_processor.add_normals(module.categories[index], scored.scores, scored.tails)
    scored = scored._replace(ood_scores=_raise_ood_limit(module, index, scored.ood_scores))
    after = [_share_above(module, index, part) for part in (scored, _score(module, defects, index))]

    print(f"{module.categories[index]}: images above the threshold")
    counts = len(normals), len(defects)
    for name, count, old, new in zip(("normal", "defective"), counts, before, after, strict=True):
        if count:
            print(f"  {count} {name}: {old:.0%} before, {new:.0%} after")
    print(module.post_processor.describe())
    return before[1] - after[1]


def _open(file: Path, category: str | None) -> tuple[DeCoDiff, int]:
    """The model of a checkpoint and the index of the category to refine."""
    if file.suffix != ".ckpt" or not file.is_file():
        msg = f"{file} is no checkpoint (.ckpt). Refine the one that a file was exported from, and export it again."
        raise ValueError(msg)
    module = load_checkpoint(file)
    if not isinstance(module.post_processor, DeCoDiffPostProcessor) or not module.post_processor.has_thresholds:
        msg = f"{file} has no thresholds. Train the model to the end."
        raise ValueError(msg)
    if not module.model.memory_banks:
        msg = f"{file} has no memory banks (settings.latents.references=0), which new normal images would join."
        raise ValueError(msg)
    names = module.categories
    chosen = names[0] if category is None and len(names) == 1 else category
    if chosen not in names:
        msg = f"--category {chosen} must be one of {', '.join(names)}: the one that the images are of."
        raise ValueError(msg)
    return module, names.index(chosen)


def _files(source: Path | None, *, at_least: int) -> list[Path]:
    """The images of a folder or a list."""
    if source is None:
        msg = "Give --normal, a folder of normal images or a list of them."
        raise ValueError(msg)
    if source.is_dir():
        files = image_files(source)
    else:
        files = [Path(line.strip()) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(files) < at_least:
        msg = f"{source} has {len(files)} images; {at_least} or more are needed. Add images like them."
        raise ValueError(msg)
    return files


def _read(module: DeCoDiff, files: Sequence[Path]) -> torch.Tensor:
    """Images ``(N, 3, H, W)`` as the model takes them."""
    transform = module.pre_processor.transform
    return torch.stack([transform(read_image(file, module.white_level)) for file in files])


@torch.inference_mode()
def _score(module: DeCoDiff, images: torch.Tensor, index: int) -> Scored:
    """Score images of a category, whatever they are taken for."""
    net, columns = module.model, []
    for image in images[:, None]:
        outputs = net(image, torch.tensor([index]))
        ood_score = torch.zeros(1) if net.features is None else net.route(image, net.features(image), None)[1]
        columns.append((outputs.pred_score, module.post_processor.highest_pixels(outputs.anomaly_map), ood_score))
    if not columns:
        return Scored(torch.empty(0), torch.empty(0, 1), torch.empty(0))
    return Scored(*map(torch.cat, zip(*columns, strict=True)))


def _share_above(module: DeCoDiff, index: int, scored: Scored) -> float:
    """Share of images that are called anomalous; 0 of none."""
    above = (scored.scores > module.post_processor.image_thresholds[index]) | (scored.ood_scores > 1)
    return float(above.float().mean()) if len(above) else 0.0


def _score_by_the_other_half(module: DeCoDiff, images: torch.Tensor, index: int) -> Scored:
    """Score each image by banks that have every second of the others, so that it does not meet itself there."""
    halves = [images[::2], images[1::2]]
    banks = module.model.memory_banks
    before = {name: values.clone() for name, values in banks.state_dict().items()}
    scored = []
    for half, other in zip(halves, reversed(halves), strict=True):
        _add(module.model, other, index)
        scored.append(_score(module, half, index))
        banks.load_state_dict(before)
    return Scored(*map(torch.cat, zip(*scored, strict=True)))


@torch.inference_mode()
def _add(net: DeCoDiffModel, images: torch.Tensor, index: int) -> None:
    """Add the latents of normal images to the banks of their category and of all categories."""
    generator = torch.Generator().manual_seed(0)
    for row in (index, -1):
        category = torch.full((1,), index if row >= 0 else net.num_categories)
        parts = [net.latent_groups.split(net.encode(image, category)) for image in images.split(1)]
        for name, bank in net.memory_banks.items():
            bank.add(row, torch.cat([part[name] for part in parts]), generator)  # type: ignore[operator]


def _raise_ood_limit(module: DeCoDiff, index: int, ood_scores: torch.Tensor) -> torch.Tensor:
    """Let the images that are stated to be normal be of their category; returns their scores from then on."""
    factor = max(1.0, SLACK * float(ood_scores.max()))
    if module.model.router is not None:
        module.model.router.limits[index] *= factor
    return ood_scores / factor
