"""What Anomalib's own models need to train without a model hub, so that a benchmark can compare with them anywhere.

Backbones get ImageNet weights from a package or a local file. EfficientAd gets a teacher, distilled on the spot where
the published one is not in Anomalib's cache, and photographs in place of ImageNette.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from anomalib.models import EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_pretrained_weights_dir
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg_value
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize

from decodiff_anomalib.benchmark.teacher import distil_teacher, find_photographs
from decodiff_anomalib.features import PACKAGED_BACKBONE, packaged_state_dict

PACKAGED = "packaged"
PUBLISHED_TEACHERS = "efficientad_pretrained_weights"


# ---------------------------------------------------------------- backbones


def load_backbone_weights(model: AnomalibModule, weights: str | Path) -> None:
    """Load ImageNet weights into the timm backbone of a model built with ``pre_trained=False``.

    The model's pre-processor is changed to normalise images as in the backbone's training.

    Args:
        model: Any of Anomalib's models that extracts features with timm.
        weights: ``packaged`` for those of ``tf_efficientnet_lite0`` from the package index, or a ``.safetensors`` or
            ``.pth`` file with timm's names.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package with the weights is missing.
        ValueError: If the model has no such backbone, or the weights are those of another network.
    """
    extractors = [
        part for part in model.modules() if isinstance(part, TimmFeatureExtractor) and isinstance(part.backbone, str)
    ]
    names = {str(part.backbone) for part in extractors}
    if len(names) != 1:
        msg = f"{model.name} has {len(names)} kinds of timm backbones; only one can take weights={str(weights)!r}."
        raise ValueError(msg)
    backbone = names.pop()
    state = _read_backbone(weights, backbone)
    for extractor in extractors:
        _load_into(extractor.feature_extractor, state, f"weights={str(weights)!r} for backbone={backbone!r}")
    _normalise_as_trained(model, backbone)


def _read_backbone(weights: str | Path, backbone: str) -> dict[str, torch.Tensor]:
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
    """State dict in a ``.safetensors`` or ``.pth`` file.

    Raises:
        ValueError: If the file holds anything else.
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


def _load_into(network: nn.Module, state: Mapping[str, torch.Tensor], subject: str) -> None:
    """Load the part of ``state`` that ``network`` has.

    A network that timm built for its features has ``stages_0`` where the whole network has ``stages.0``, may be wrapped
    in another module, and lacks the last layers.

    Raises:
        ValueError: If a tensor is missing or has another shape; the message begins with ``subject``.
    """
    known = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    chosen = {}
    for name, expected in network.state_dict().items():
        tensor = known.get(name.removeprefix("model.").removeprefix("body.").replace(".", "_"))
        if tensor is None or tensor.shape != expected.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, not {tuple(expected.shape)}"
            msg = f"{subject} do not fit: {name} {found}. Give the weights of this very network, by timm's names."
            raise ValueError(msg)
        chosen[name] = tensor
    network.load_state_dict(chosen)


def _normalise_as_trained(model: AnomalibModule, backbone: str) -> None:
    if model.pre_processor is None:
        msg = f"{model.name} has no pre_processor to normalise images for {backbone!r}. Leave pre_processor=True."
        raise ValueError(msg)
    transform = model.pre_processor.transform
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    mean, std = (get_pretrained_cfg_value(backbone, name) for name in ("mean", "std"))
    kept = [step for step in steps if step and not isinstance(step, Normalize)]
    model.pre_processor = PreProcessor(Compose([*kept, Normalize(mean=mean, std=std)]))


# ---------------------------------------------------------------- EfficientAd


def equip_efficient_ad(model: EfficientAd, photographs: Path, teacher: Path | None, folder: Path) -> str:
    """Give EfficientAd a teacher and photographs, so that it trains without downloading anything.

    Anomalib's cache is read, never written.

    Args:
        model: As built by its constructor.
        photographs: Folder of any photographs, directly or in sub-folders such as ImageNette's.
        teacher: Weights of the teacher, ``.safetensors`` or ``.pth``. Defaults to the published ones if they are in
            Anomalib's cache, else to the result of :func:`~decodiff_anomalib.benchmark.teacher.distil_teacher`, which
            takes minutes.
        folder: Where the distilled teacher and a link to ``photographs`` are kept for later runs.

    Returns:
        str: Source of the teacher: ``given``, ``published`` (training will load it) or ``distilled``.

    Raises:
        FileNotFoundError: If there are no photographs, or there is no such teacher.
        ImportError: If the package with the weights to distil is missing.
        ValueError: If photographs are broken, or the teacher is another network.
    """
    model.imagenet_dir = _image_folder(photographs, folder / "photographs")
    size = model.model_size.value
    source = "given"
    if teacher is None:
        if (get_pretrained_weights_dir() / PUBLISHED_TEACHERS / f"pretrained_teacher_{size}.pth").is_file():
            return "published"
        source, teacher = "distilled", distil_teacher(photographs, folder / f"teacher_{size}.safetensors", size=size)
    elif not teacher.is_file():
        msg = f"teacher={str(teacher)!r} is no file. Give one that `distil_teacher` wrote, or None to have it made."
        raise FileNotFoundError(msg)
    _load_into(model.model.teacher, _read_tensors(teacher), f"teacher={str(teacher)!r} for model_size={size!r}")
    model.prepare_pretrained_model = _keep_teacher
    return source


def _keep_teacher() -> None:
    """Replaces EfficientAd's download, as the teacher is loaded already; a named function, so that pickling works."""


def _image_folder(photographs: Path, link_folder: Path) -> Path:
    """A folder that torchvision's ``ImageFolder`` reads: one with a sub-folder for each class.

    Photographs that lie in no sub-folder are linked as the only class of ``link_folder``.
    """
    if any(file.parent != photographs for file in find_photographs(photographs)):
        return photographs
    link_folder.mkdir(parents=True, exist_ok=True)
    link = link_folder / "0"
    link.unlink(missing_ok=True)
    link.symlink_to(photographs.resolve(), target_is_directory=True)
    return link_folder
