"""``decodiff refine``: what is taken for a defect and is none becomes normal, or is ignored, without training anew."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from decodiff_anomalib import DeCoDiff
from decodiff_anomalib.calibration import FEWEST_FURTHER_NORMALS
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
    ignore: Path | None = None,
    defective: Path | None = None,
    category: str | None = None,
    tolerance: float = 0.05,
    force: bool = False,
    output: Path | None = None,
) -> None:
    """Add normal images to a checkpoint, such as marked false alarms, or regions to ignore; give one or both.

    The latents of normal images join the memory bank of their category, and their scores those that its threshold is
    set on; each is scored by a bank that has the other half of them only. Regions to ignore are inspected no more:
    there, the map is 0. They leave thresholds as they are. The denoiser is not trained further. Other categories stay
    as they are. A table shows what it changes.

    Args:
        model: The checkpoint (.ckpt). Exported files are made anew from the refined one.
        normal: Folder of normal images, or a text file with a path in each line, as a report writes it. 8 or more.
        ignore: Image of the regions to ignore in all images of the category, white on black, of any size: it is scaled
            as they are. It takes the place of an earlier one; if it is black, nothing is ignored any more.
        defective: As ``normal``, of defective images, which must still be detected; one or more.
        category: Of the images and regions; needed where the model has several.
        tolerance: Largest share of the defective images that may be lost; if more are, nothing is saved.
        force: Saves all the same.
        output: File to write; by default, ``refined-`` before the model's name. The model's own file is kept.

    Raises:
        SystemExit: With status 2, if an argument is not valid or an image cannot be read; with 1, if more defective
            images are lost than ``tolerance`` allows. Nothing is written then.
    """
    target = Path(output) if output else Path(model).with_name(f"refined-{Path(model).name}")
    try:
        if normal is None and ignore is None:
            msg = "Give --normal, a folder of normal images or a list of them, or --ignore, an image of regions."
            raise ValueError(msg)  # noqa: TRY301 - as all errors of arguments end
        files = _files(normal, at_least=FEWEST_FURTHER_NORMALS), _files(defective, at_least=1)
        module, index = _open(Path(model), category)
        if normal is not None and not module.model.memory_banks:
            msg = f"{model} has no memory banks (settings.latents.references=0), which new normal images would join."
            raise ValueError(msg)  # noqa: TRY301
        regions = None if ignore is None else _read_regions(module, Path(ignore))
        normals, defects = (_read(module, part) for part in files)
        lost = _learn(module, index, normals, defects, regions)
        if lost <= tolerance or force:
            save_checkpoint(module, Path(model), target)
    except (ImportError, OSError, ValueError) as error:
        print(f"decodiff refine: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if lost > tolerance and not force:
        print(
            f"Not saved: {lost:.0%} of the defective images are no longer detected, --tolerance {tolerance:g} allows "
            f"{tolerance:.0%}. Leave normal images out that resemble them, ignore less, or give --force true.",
            file=sys.stderr,
        )
        raise SystemExit(1)
    print(f"Written to {target}.")


def _learn(
    module: DeCoDiff, index: int, normals: torch.Tensor, defects: torch.Tensor, regions: torch.Tensor | None
) -> float:
    """Ignore regions, make images normal, print what it changes, and return the share of ``defects`` that are lost.

    Args:
        module: The model, which is changed.
        index: Of the category.
        normals: Images ``(N, 3, H, W)`` as the model takes them; none if ``N`` is 0.
        defects: The same of defective images.
        regions: Regions to ignore ``(H, W)``; ``None`` leaves those that the model has.
    """
    name = module.categories[index]
    before = [_share_above(module, index, _score(module, images, index)) for images in (normals, defects)]
    if regions is not None:
        module.model.ignore(index, regions)
        print(f"{name}: {regions.float().mean():.2%} of each image ignored")
    after = _make_normal(module, index, normals), _share_above(module, index, _score(module, defects, index))

    counts = len(normals), len(defects)
    if any(counts):
        print(f"{name}: images above the threshold")
    for kind, count, old, new in zip(("normal", "defective"), counts, before, after, strict=True):
        if count:
            print(f"  {count} {kind}: {old:.0%} before, {new:.0%} after")
    print(module.post_processor.describe())
    return before[1] - after[1]


def _make_normal(module: DeCoDiff, index: int, normals: torch.Tensor) -> float:
    """Make images normal; returns the share of them that are called anomalous all the same."""
    if not len(normals):
        return 0.0
    scored = _score_by_the_other_half(module, normals, index)
    _add(module.model, normals, index)
    module.post_processor.add_normals(module.categories[index], scored.scores, scored.tails)
    scored = scored._replace(ood_scores=_raise_ood_limit(module, index, scored.ood_scores))
    return _share_above(module, index, scored)


def _open(file: Path, category: str | None) -> tuple[DeCoDiff, int]:
    """The model of a checkpoint and the index of the category to refine."""
    if file.suffix != ".ckpt" or not file.is_file():
        msg = f"{file} is no checkpoint (.ckpt). Refine the one that a file was exported from, and export it again."
        raise ValueError(msg)
    module = load_checkpoint(file)
    if not isinstance(module.post_processor, DeCoDiffPostProcessor) or not module.post_processor.has_thresholds:
        msg = f"{file} has no thresholds. Train the model to the end."
        raise ValueError(msg)
    names = module.categories
    chosen = names[0] if category is None and len(names) == 1 else category
    if chosen not in names:
        msg = f"--category {chosen} must be one of {', '.join(names)}: the one that images or regions are of."
        raise ValueError(msg)
    return module, names.index(chosen)


def _files(source: Path | None, *, at_least: int) -> list[Path]:
    """The images of a folder or a list; none without one."""
    if source is None:
        return []
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
    if not files:
        return torch.empty(0, 3, *module.model.ignored.shape[-2:])
    transform = module.pre_processor.transform
    return torch.stack([transform(read_image(file, module.white_level)) for file in files])


def _read_regions(module: DeCoDiff, file: Path) -> torch.Tensor:
    """Regions to ignore ``(H, W)`` of the working size, true where the image in ``file`` is more white than black.

    They are resized and cropped as images are, to the nearest pixel.

    Raises:
        ValueError: If the file cannot be read, if all its white is lost by this, or if less is left than the share of
            the map that the score is the mean of.
    """
    white = read_image(file, module.white_level).mean(0, keepdim=True) > 0.5
    size = list(module.model.ignored.shape[-2:])
    scaled = module.pre_processor.transform(tv_tensors.Mask(white)) if module.pre_processor else white
    regions = resize(scaled, size, InterpolationMode.NEAREST).as_subclass(torch.Tensor)[0]
    if white.any() and not regions.any():
        msg = f"--ignore {file}: nothing white is left at the model's {size[0]} x {size[1]} pixels. Draw it larger."
        raise ValueError(msg)
    left, needed = 1 - float(regions.float().mean()), module.settings.scoring.top_share
    if left == 0 or left < needed:
        msg = (
            f"--ignore {file} leaves {left:.2%} of the image. The score is the mean of the highest {needed:.0%} of the "
            "map, which must be left: make less of it white."
        )
        raise ValueError(msg)
    return regions


def _with_progress(images: torch.Tensor, doing: str) -> Iterable[torch.Tensor]:
    """Each image as ``(1, 3, H, W)``; on a terminal, a line says how many are left and how long that takes."""
    disabled = None if len(images) else True  # None disables it where there is no terminal
    return tqdm(images[:, None], desc=doing, unit=" images", disable=disabled, leave=False)


@torch.inference_mode()
def _score(module: DeCoDiff, images: torch.Tensor, index: int) -> Scored:
    """Score images of a category, whatever they are taken for."""
    net, columns = module.model, []
    for image in _with_progress(images, "Scoring"):
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
        parts = [net.latent_groups.split(net.encode(image, category)) for image in _with_progress(images, "Adding")]
        for name, bank in net.memory_banks.items():
            bank.add(row, torch.cat([part[name] for part in parts]), generator)  # type: ignore[operator]


def _raise_ood_limit(module: DeCoDiff, index: int, ood_scores: torch.Tensor) -> torch.Tensor:
    """Let the images that are stated to be normal be of their category; returns their scores from then on."""
    factor = max(1.0, SLACK * float(ood_scores.max()))
    if module.model.router is not None:
        module.model.router.limits[index] *= factor
    return ood_scores / factor
