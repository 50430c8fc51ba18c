"""What Anomalib's own models need to run without a model hub, so that a benchmark can compare with them anywhere.

Backbones get ImageNet weights from a package or a local file. EfficientAd gets its teacher, distilled on the spot from
such a backbone where the published one is not at hand, and photographs in place of ImageNette.
"""

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from anomalib.models.image.efficient_ad.torch_model import (
    EfficientAdModelSize,
    MediumPatchDescriptionNetwork,
    SmallPatchDescriptionNetwork,
)
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_pretrained_weights_dir
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Compose, Normalize
from torchvision.transforms.v2.functional import (
    center_crop,
    crop,
    pil_to_tensor,
    resize,
    rgb_to_grayscale,
)

from decodiff_anomalib.data.images import inspect_images
from decodiff_anomalib.features import PACKAGED_BACKBONE, VisualFeatures, packaged_state_dict

logger = logging.getLogger(__name__)

PACKAGED = "packaged"

NETWORKS = {
    EfficientAdModelSize.S.value: SmallPatchDescriptionNetwork,
    EfficientAdModelSize.M.value: MediumPatchDescriptionNetwork,
}
TEACHER_CHANNELS = 384
PUBLISHED_TEACHERS = "efficientad_pretrained_weights"

# Chosen for seven minutes on one thread.
PHOTOGRAPH_SIDE, CROP_SIDE, GREY_SHARE = 256, 128, 0.3
STANDARDISING_CROPS, MEASURING_CROPS = 60, 100
REGRESSION_BATCH, PATCHES_OF_CROP, RIDGE = 12, 48, 10_000
DISTILLATION_STEPS, BATCH, LEARNING_RATE = 500, 4, 2e-4


# ---------------------------------------------------------------- backbones


def load_backbone_weights(model: AnomalibModule, weights: str | Path) -> None:
    """Put ImageNet weights into the timm backbone of a model built with ``pre_trained=False``.

    The model's pre-processor is made to normalise as the backbone was trained.

    Args:
        model: Any of Anomalib's models that extracts features with timm.
        weights: ``packaged`` for those of ``tf_efficientnet_lite0`` from the package index, or a ``.safetensors`` or
            ``.pth`` file with timm's names.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package with the weights is missing.
        ValueError: If the model has no such backbone, or the weights are another's.
    """
    extractors = [
        part for part in model.modules() if isinstance(part, TimmFeatureExtractor) and isinstance(part.backbone, str)
    ]
    names = {part.backbone for part in extractors}
    if len(names) != 1:
        msg = f"{model.name} has {len(names)} kinds of timm backbones; only one can take weights={str(weights)!r}."
        raise ValueError(msg)
    backbone = names.pop()
    state = _read_weights(weights, backbone)
    for extractor in extractors:
        _fill(extractor.feature_extractor, state, f"weights={str(weights)!r} for backbone={backbone!r}")
    _normalise_as_trained(model, backbone)


def _read_weights(weights: str | Path, backbone: str) -> dict[str, torch.Tensor]:
    if weights == PACKAGED:
        if backbone != PACKAGED_BACKBONE:
            msg = (
                f"weights={PACKAGED!r} are of {PACKAGED_BACKBONE!r}, the model has backbone={backbone!r}. Choose that "
                f"backbone, or give a file with weights of {backbone!r}."
            )
            raise ValueError(msg)
        return packaged_state_dict()
    file = Path(weights)
    if not file.is_file():
        msg = (
            f"weights={str(weights)!r} is no file. Save timm.create_model({backbone!r}, pretrained=True).state_dict() "
            f"there with safetensors or torch.save, or use weights={PACKAGED!r} with backbone={PACKAGED_BACKBONE!r}."
        )
        raise FileNotFoundError(msg)
    return _read_tensors(file)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """What a .safetensors or .pth file holds.

    Raises:
        ValueError: If it is something else than named tensors.
    """
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        msg = f"{file} cannot be read as weights: {error}. Give a .safetensors or .pth file of a state dict."
        raise ValueError(msg) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        msg = f"{file} does not hold a state dict, names with their tensors. Save model.state_dict() alone."
        raise ValueError(msg)
    return dict(state)


def _fill(network: nn.Module, state: Mapping[str, torch.Tensor], subject: str) -> None:
    """Load what ``network`` needs of ``state``.

    timm renames ``stages.0`` to ``stages_0`` where it takes a network apart for its features, or wraps it, and drops
    the rest.
    """
    known = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    chosen = {}
    for name, own in network.state_dict().items():
        tensor = known.get(name.removeprefix("model.").removeprefix("body.").replace(".", "_"))
        if tensor is None or tensor.shape != own.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, not {tuple(own.shape)}"
            msg = f"{subject} do not fit: {name} {found}. Give the weights of this very network, by timm's names."
            raise ValueError(msg)
        chosen[name] = tensor
    network.load_state_dict(chosen)


def _normalise_as_trained(model: AnomalibModule, backbone: str) -> None:
    if model.pre_processor is None:
        msg = f"{model.name} has no pre_processor to normalise images for {backbone!r}. Leave pre_processor=True."
        raise ValueError(msg)
    config = timm.get_pretrained_cfg(backbone)
    transform = model.pre_processor.transform
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    kept = [step for step in steps if step and not isinstance(step, Normalize)]
    model.pre_processor = PreProcessor(Compose([*kept, Normalize(mean=config.mean, std=config.std)]))


# ---------------------------------------------------------------- EfficientAd


def equip_efficient_ad(model: EfficientAd, photographs: Path, teacher: Path | None, folder: Path) -> str:
    """Give EfficientAd a teacher and photographs, so that it trains without fetching anything.

    Anomalib's cache is read and left as it is. A teacher of our own is already in the model when training starts.

    Args:
        model: As built by its constructor.
        photographs: Folder of photographs of anything, flat or with sub-folders such as ImageNette's.
        teacher: Weights of the teacher, ``.safetensors`` or ``.pth``. Defaults to the published ones where Anomalib's
            cache has them, else to ones that :func:`distil_teacher` makes, which takes minutes.
        folder: Where the distilled teacher and a view of ``photographs`` are kept for later runs.

    Returns:
        str: Where the teacher comes from: ``given``, ``published`` or ``distilled``.

    Raises:
        FileNotFoundError: If there are no photographs, or there is no such teacher.
        ImportError: If the package with the weights to distil is missing.
        ValueError: If photographs are broken, or the teacher is another network's.
    """
    model.imagenet_dir = _one_class(photographs, folder / "photographs")
    size = model.model_size.value
    source = "given"
    if teacher is None:
        if (get_pretrained_weights_dir() / PUBLISHED_TEACHERS / f"pretrained_teacher_{size}.pth").is_file():
            return "published"
        source, teacher = "distilled", distil_teacher(photographs, folder / f"teacher_{size}.safetensors", size=size)
    elif not teacher.is_file():
        msg = f"teacher={str(teacher)!r} is no file. Give one that `distil_teacher` wrote, or None to have it made."
        raise FileNotFoundError(msg)
    _fill(model.model.teacher, _read_tensors(teacher), f"teacher={str(teacher)!r} for model_size={size!r}")
    model.prepare_pretrained_model = _keep_teacher
    return source


def _keep_teacher() -> None:
    """Stand in for EfficientAd's download: the teacher is there. A function by name, so that models can be pickled."""


def _one_class(photographs: Path, view: Path) -> Path:
    """Folder that ImageFolder can read, which wants a sub-folder for each class."""
    if any(file.parent != photographs for file in _find_photographs(photographs)):
        return photographs
    view.mkdir(parents=True, exist_ok=True)
    link = view / "0"
    link.unlink(missing_ok=True)
    link.symlink_to(photographs.resolve(), target_is_directory=True)
    return view


# ---------------------------------------------------------------- the teacher


def distil_teacher(
    photographs: Path, output: Path, *, size: str = "small", steps: int = DISTILLATION_STEPS, seed: int = 0
) -> Path:
    """Make EfficientAd's teacher: its patch network, taught the features of EfficientNet-Lite0 on photographs.

    As in the paper (section 3.1), features of images twice as large, standardised and brought to 384 channels, are the
    target. The paper takes WideResNet-101, ImageNet and 60,000 steps of 16 images; to come near in minutes, the last
    layer starts from the least-squares solution for a random body. A tenth of the photographs only measures, see
    ``explained_variance`` in the file's metadata.

    Args:
        photographs: Folder of photographs, with or without sub-folders; hundreds are good.
        output: The ``.safetensors`` file to write. One that was made alike is kept as it is.
        size: ``small`` or ``medium``, as EfficientAd's ``model_size``.
        steps: Training steps of 4 crops of 128x128 pixels.
        seed: Makes the same teacher again.

    Returns:
        Path: ``output``.

    Raises:
        FileNotFoundError: If there are fewer than two photographs.
        ImportError: If the package with the weights is missing.
        ValueError: If a photograph is broken, or the size is unknown.
    """
    if size not in NETWORKS:
        msg = f"size={size!r} is unknown; valid: {', '.join(NETWORKS)}."
        raise ValueError(msg)
    files = _find_photographs(photographs)
    made = {
        "size": size,
        "steps": str(steps),
        "seed": str(seed),
        "photographs": str(len(files)),
        "backbone": PACKAGED_BACKBONE,
    }
    if output.is_file() and made.items() <= _read_metadata(output).items():
        return output
    logger.info("Distilling EfficientAd's teacher from %d photographs, which takes minutes.", len(files))
    held_out, rest = files[::10], [file for index, file in enumerate(files) if index % 10]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = PatchTarget(_draw_crops(rest, min(STANDARDISING_CROPS, len(rest)), generator), generator)
        network = NETWORKS[size](TEACHER_CHANNELS).to(memory_format=torch.channels_last)
        for convolution in _convolutions(network):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
    regression_batches = max(1, steps // 8)
    _solve_head(network, target, rest, regression_batches, generator)
    _imitate(network, target, rest, steps, generator)
    _solve_head(network, target, rest, regression_batches, generator)
    made["explained_variance"] = f"{_explained_variance(network, target, held_out, generator):.4f}"
    logger.info("The teacher explains %s of the variance on held-out photographs.", made["explained_variance"])
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, output, metadata=made)
    return output


class PatchTarget:
    """What the teacher is to say of each patch: ImageNet features, standardised, in as many channels as it has.

    Args:
        crops: ``(N, 3, S, S)`` in [0, 1], to standardise by.
        generator: Draws the projection.
    """

    def __init__(self, crops: torch.Tensor, generator: torch.Generator) -> None:
        self.backbone = VisualFeatures()
        features = self._extract(crops)
        self.mean, self.std = features.mean((0, 2, 3)), features.std((0, 2, 3))
        # orthonormal, so that distances stay those of the features
        random = torch.randn(TEACHER_CHANNELS, self.backbone.channels, generator=generator)
        self.projection = torch.linalg.qr(random).Q * (TEACHER_CHANNELS / self.backbone.channels) ** 0.5

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """Target ``(B, 384, S/4 - 8, S/4 - 8)`` for ``crops`` ``(B, 3, S, S)`` in [0, 1]."""
        features = (self._extract(crops).movedim(1, -1) - self.mean) / self.std
        return (features @ self.projection.T).movedim(-1, 1)

    @torch.no_grad()
    def _extract(self, crops: torch.Tensor) -> torch.Tensor:
        """Features at the centres of the patches of 33 pixels, every 4 pixels, that the unpadded teacher sees."""
        enlarged = F.interpolate(crops, scale_factor=2, mode="bilinear")
        # padding on two sides only puts the backbone's cells 3.2 before the patches, not 3.6
        with _half_precision():
            return self.backbone(2 * enlarged - 1)[:, :, 3:-5, 3:-5].float()


def _half_precision() -> torch.autocast:
    """Bfloat16 where the processor computes in it, twice as fast; others only emulate it, slowly."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False))


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def _find_photographs(folder: Path) -> list[Path]:
    """All images below ``folder``, every one readable.

    Raises:
        FileNotFoundError: If there are fewer than two.
        ValueError: If some are broken.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if len(files) < 2:
        msg = f"{len(files)} images below {folder}; give a folder of photographs of anything, hundreds are good."
        raise FileNotFoundError(msg)
    inspect_images(files)
    return files


def _read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _draw_crops(files: Sequence[Path], count: int, generator: torch.Generator) -> torch.Tensor:
    """Crops ``(count, 3, 128, 128)`` in [0, 1] of random photographs at 256 pixels, every third of them grey."""
    crops = []
    for index in torch.randint(len(files), (count,), generator=generator).tolist():
        with Image.open(files[index]) as image:
            side = PHOTOGRAPH_SIDE
            picture = center_crop(resize(pil_to_tensor(image.convert("RGB")), [side], antialias=True), [side, side])
        top, left = torch.randint(side - CROP_SIDE + 1, (2,), generator=generator).tolist()
        picture = crop(picture, top, left, CROP_SIDE, CROP_SIDE)
        grey = torch.rand((), generator=generator) < GREY_SHARE
        crops.append(rgb_to_grayscale(picture, num_output_channels=3) if grey else picture)
    return torch.stack(crops).float() / 255


@torch.no_grad()
def _solve_head(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], batches: int, generator: torch.Generator
) -> None:
    """Set the last convolution to the ridge regression of the target on what it sees."""
    head = _convolutions(network)[-1]
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    products = moments = 0.0
    for _ in range(batches):
        crops = _draw_crops(files, REGRESSION_BATCH, generator)
        wanted = target(crops).flatten(2).mT
        with _half_precision():
            network(crops)
        patches = F.unfold(seen.pop().contiguous(), head.kernel_size).mT
        # neighbours say almost the same: a few of many crops are worth more than all of few
        drawn = torch.randperm(patches.shape[1], generator=generator)[:PATCHES_OF_CROP]
        rows = F.pad(patches[:, drawn].flatten(0, 1), (0, 1), value=1.0)
        products = products + rows.T @ rows
        moments = moments + rows.T @ wanted[:, drawn].flatten(0, 1)
    handle.remove()
    count = products[-1, -1]
    variance = (products.diagonal() / count - (products[-1] / count).square())[:-1].mean()
    products.diagonal()[:-1] += RIDGE * variance  # as if so many patches of no meaning had been seen
    solution = torch.linalg.solve(products, moments)
    head.weight.copy_(solution[:-1].T.reshape(head.weight.shape))
    head.bias.copy_(solution[-1])


def _imitate(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], steps: int, generator: torch.Generator
) -> None:
    """Train by Adam to give the target."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.05 * steps), (1 - step / steps) / 0.6)
    )
    for _ in range(steps):
        crops = _draw_crops(files, BATCH, generator)
        with _half_precision():
            described = network(crops)
        loss = F.mse_loss(described.float(), target(crops))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _explained_variance(
    network: nn.Module, target: PatchTarget, files: Sequence[Path], generator: torch.Generator
) -> float:
    """Share of the target's variance about the mean it is standardised by that the network explains on ``files``."""
    crops = _draw_crops(files, min(MEASURING_CROPS, len(files)), generator)
    wanted = target(crops)
    described = torch.cat([network(crop[None]) for crop in crops])
    return 1 - (F.mse_loss(described, wanted) / wanted.square().mean()).item()
