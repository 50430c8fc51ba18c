"""The authors' checkpoints: names of their weights, shape of the network, and loading.

Unpickling a checkpoint can execute code. Checkpoints are therefore read with an allow-list: tensors, plain values and
``argparse.Namespace``.
"""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize
from decodiff_anomalib.paper import CATEGORY_ORDER
from decodiff_anomalib.weights.denoiser_config import DenoiserConfig, State, empty_denoiser, fill, refuse_other_weights

logger = logging.getLogger(__name__)

CATEGORY_TABLE = "cond_stage_model.embedding.weight"
LATENT_DIFFUSION_PREFIX = "model.diffusion_model."
DEFAULT_HEADS = 4

ACCEPTED = (
    "Accepted are checkpoints of the authors' training script ({'model': weights, 'args': argparse.Namespace}) and "
    f"class-conditional ones of latent-diffusion ({{'state_dict': weights}}, named {LATENT_DIFFUSION_PREFIX}*)."
)


# --- Names of the weights ---

_OUTER = {
    "category_embedding": "cond_stage_model.embedding",
    "unet.time_embedding.linear_1": "time_embed.0",
    "unet.time_embedding.linear_2": "time_embed.2",
    "unet.conv_in": "input_blocks.0.0",
    "unet.conv_norm_out": "out.0",
    "unet.conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def official_key(key: str, layers: int, attention: Sequence[bool]) -> str:
    """Name of a weight of :class:`~decodiff_anomalib.denoiser.Denoiser` in the authors' network.

    The authors number all blocks of a path consecutively, and the parts of a block by position; diffusers numbers them
    per resolution and per kind.

    Args:
        key: Key of the denoiser's ``state_dict``.
        layers: Residual blocks of each resolution, see :class:`~decodiff_anomalib.denoiser.DenoiserSize`.
        attention: Which resolutions have attention, the finest first.
    """
    module, _, parameter = key.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{parameter}"
    path, *place = module.removeprefix("unet.").split(".")
    resolution = 0 if path == "mid_block" else int(place.pop(0))
    kind, index, *inside = place
    part = ".".join(inside)
    if kind == "resnets":
        part = _RESIDUAL[part]
    elif kind == "downsamplers":
        part = "op"

    if path == "mid_block":  # residual block, transformer, residual block
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        first = resolution * (layers + 1)
        number = first + (layers if kind.endswith("samplers") else int(index))
        attends = attention[::-1][resolution]  # only used on the up path, where the upsampler follows the transformer
        position = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attends}[kind]
        # On the down path, block 0 is the first convolution.
        block = f"input_blocks.{number + 1}" if path == "down_blocks" else f"output_blocks.{number}"
        block = f"{block}.{position}"
    return f"{block}.{part}.{parameter}"


def to_official_state(denoiser: Denoiser) -> State:
    """Weights under the authors' names, as under ``model`` in their checkpoints.

    Raises:
        ValueError: If the authors' program cannot build such a network.
    """
    unet = denoiser.unet.config
    if denoiser.unet.class_embedding is not None:
        msg = "The network is modulated by the category, which the authors' is not; their program has sizes XS to XL."
        raise ValueError(msg)
    attention = [kind.startswith("CrossAttn") for kind in unet.down_block_types]
    state = denoiser.state_dict()
    return {official_key(key, unet.layers_per_block, attention): tensor for key, tensor in state.items()}


# --- Checkpoints ---


def load_official(path: str | Path, num_heads: int | None = None) -> tuple[Denoiser, DenoiserConfig]:
    """Load a checkpoint written by the authors' training script or by latent-diffusion.

    The shape of the network is read from the shapes of the weights, except for the number of attention heads if these
    fill the width. That number is taken from the published size of the same width. For other widths it is 4, or the
    smallest possible number, with a warning.

    Args:
        path: The checkpoint. It is read with an allow-list and cannot execute code.
        num_heads: Attention heads at the finest resolution, to override the number found.

    Returns:
        tuple[Denoiser, DenoiserConfig]: The denoiser, in evaluation mode, and its description. The category table of a
        latent-diffusion checkpoint is complete; :func:`~decodiff_anomalib.weights.transfer.transfer` uses its first
        rows.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it contains anything else.
    """
    try:
        return _load(path, num_heads)
    except OSError:
        raise
    except LookupError as error:
        msg = f"{path} is not the authors' network: weight {error} is missing or of another rank. {ACCEPTED}"
        raise ValueError(msg) from error
    except Exception as error:  # weights of odd shapes and arguments of odd types can raise any exception
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        msg = f"{path}: {error}" if isinstance(error, ValueError) else f"{path} holds other values: {error}. {ACCEPTED}"
        raise ValueError(msg) from error


def _load(path: str | Path, num_heads: int | None) -> tuple[Denoiser, DenoiserConfig]:
    state, arguments, origin = _read_checkpoint(Path(path))
    size = recognise_size(state, arguments.get("num_heads") if num_heads is None else num_heads)
    categories = CATEGORY_ORDER.get(str(arguments.get("dataset")))
    rows = len(state[CATEGORY_TABLE])
    codec = arguments.get("vae_type")
    config = DenoiserConfig(
        size=size,
        latent_channels=state["input_blocks.0.0.weight"].shape[1],
        num_categories=rows,
        categories=categories if categories and len(categories) == rows else None,
        codec=f"stabilityai/sd-vae-ft-{codec}" if codec else None,
        source=origin,
    )
    denoiser = empty_denoiser(config)
    expected = {official_key(key, size.layers, size.attention): key for key in denoiser.state_dict()}
    refuse_other_weights(path, state, {name: denoiser.state_dict()[key] for name, key in expected.items()})
    return fill(denoiser, {key: state[name].float() for name, key in expected.items()}), config


def _read_checkpoint(path: Path) -> tuple[State, dict[str, Any], str]:
    """Weights under the authors' names, arguments of their training script, and ``DenoiserConfig.source``."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise any exception
        blocked = next((f" ({line.strip()})" for line in str(error).splitlines() if " GLOBAL " in line), "")
        msg = (
            f"{path} was not opened: it is no PyTorch checkpoint, or holds objects that could execute code{blocked}. "
            f"{ACCEPTED} If it is one of these with more objects in it, and you trust where it is from, "
            "store the named entries alone with torch.save."
        )
        raise ValueError(msg) from error

    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    state: Any
    arguments: dict[str, Any]
    if "model" in found and isinstance(found.get("args"), argparse.Namespace):
        state, arguments, origin = found["model"], dict(vars(found["args"])), "decodiff"
    elif "state_dict" in found and isinstance(found["state_dict"], Mapping):
        prefix = LATENT_DIFFUSION_PREFIX
        entries = found["state_dict"].items()
        state = {key.removeprefix(prefix): value for key, value in entries if key.startswith((prefix, CATEGORY_TABLE))}
        arguments, origin = {}, "latent-diffusion"
    else:
        state, arguments, origin = None, {}, ""
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        content = (
            f"a dictionary with {', '.join(map(repr, list(found)[:5]))}" if found else f"a {type(checkpoint).__name__}"
        )
        msg = f"{path} holds {content}. {ACCEPTED}"
        raise ValueError(msg)
    return dict(state), arguments, origin


# --- Shape of the network ---


def recognise_size(state: State, num_heads: int | None) -> DenoiserSize:
    """Shape of the network from the shapes of its weights.

    Args:
        state: Weights under the authors' names.
        num_heads: Attention heads at the finest resolution, if known.

    Raises:
        LookupError: If a weight is missing or of another rank.
        ValueError: If :class:`DenoiserSize` cannot express the network.
    """
    width, context_width = len(state["input_blocks.0.0.weight"]), state[CATEGORY_TABLE].shape[1]
    matches = (re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", key) for key in state)
    downsamplers = sorted(int(match[1]) for match in matches if match)
    if len(downsamplers) != 2:
        msg = f"The network has {len(downsamplers) + 1} resolutions; the authors' has 3."
        raise ValueError(msg)
    layers = downsamplers[0] - 1
    firsts = (1, *(block + 1 for block in downsamplers))
    widths = [len(state[f"input_blocks.{first}.0.out_layers.3.weight"]) for first in firsts]
    projections = [state.get(f"input_blocks.{first}.1.proj_in.weight") for first in firsts]
    inner_widths = {
        channels: len(weight) for channels, weight in zip(widths, projections, strict=True) if weight is not None
    }
    attention = tuple(weight is not None for weight in projections)
    published = [
        size.head_channels for size in DENOISER_SIZES.values() if (size.width, size.attention) == (width, attention)
    ]
    return DenoiserSize(
        width=width,
        head_channels=_recognise_head_channels(width, inner_widths, num_heads, published),
        context_width=context_width,
        attention=cast("tuple[bool, bool, bool]", attention),
        layers=layers,
        multipliers=cast("tuple[int, int, int]", tuple(channels // width for channels in widths)),
    )


def _recognise_head_channels(
    width: int, inner_widths: dict[int, int], num_heads: int | None, published: Sequence[int]
) -> int:
    """Channels of an attention head.

    Args:
        width: Channels at the finest resolution.
        inner_widths: Channels of each resolution with attention to the inner width of its transformers, which is the
            number of heads times the channels of a head.
        num_heads: Attention heads at the finest resolution, if known.
        published: Channels of a head in the named sizes of this width.

    Raises:
        ValueError: If no number of heads, or not the given one, results in the inner widths.
    """

    def fits(head_channels: int) -> bool:
        return all(
            (heads := channels // head_channels) and heads * (channels // heads) == inner
            for channels, inner in inner_widths.items()
        )

    if num_heads is not None:
        if not 1 <= num_heads <= width or not fits(width // num_heads):
            msg = f"num_heads={num_heads} does not give the widths inside the transformers, {inner_widths}."
            raise ValueError(msg)
        return width // num_heads
    for head_channels in published:
        if fits(head_channels):
            return head_channels
    for heads in (DEFAULT_HEADS, *range(1, width + 1)):
        if heads <= width and fits(width // heads):
            logger.warning(
                "The number of attention heads is not in the weights, and no published size is %d wide: took %d. "
                "num_heads=... sets it; a wrong one gives wrong results.",
                width,
                heads,
            )
            return width // heads
    msg = f"No number of attention heads gives the widths inside the transformers, {inner_widths}."
    raise ValueError(msg)
