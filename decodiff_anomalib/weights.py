"""The denoiser's weights: the authors' checkpoints, files of our own, and starting one network from another.

A checkpoint of the authors is a pickle, which can run code when read. It is therefore read with an allow-list (tensors,
plain values, ``argparse.Namespace``) once, by ``decodiff convert``; everything else uses the result: a folder with
``model.safetensors`` and ``config.json``, which can run nothing and can be published on a model hub as it is.
"""

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, build_denoiser
from decodiff_anomalib.paper import CATEGORY_ORDER

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

State = dict[str, torch.Tensor]

CATEGORY_TABLE = "cond_stage_model.embedding.weight"
LATENT_DIFFUSION_PREFIX = "model.diffusion_model."
DEFAULT_HEADS = 4

ACCEPTED = (
    "Accepted are checkpoints of the authors' training script ({'model': weights, 'args': argparse.Namespace}) and "
    f"class-conditional ones of latent-diffusion ({{'state_dict': weights}}, named {LATENT_DIFFUSION_PREFIX}*)."
)


@dataclass(frozen=True)
class DenoiserConfig:
    """What is to be known about a denoiser beside its weights.

    Attributes:
        size: Shape of the UNet.
        latent_channels: Channels of the latents, in and out.
        num_categories: Rows of the category table.
        categories: Names of the rows, where known.
        codec: Hub id of the codec whose latents it was trained on, where known.
        source: ``decodiff`` (the authors' script) or ``latent-diffusion``.
    """

    size: DenoiserSize
    latent_channels: int
    num_categories: int
    categories: tuple[str, ...] | None
    codec: str | None
    source: str

    @property
    def denoiser(self) -> str | dict[str, Any]:
        """The size's name, or its fields where it has none."""
        names = (name for name, size in DENOISER_SIZES.items() if size == self.size)
        return next(names, asdict(self.size))

    def to_json(self) -> str:
        """Write as JSON, which :meth:`from_json` reads."""
        return json.dumps({"_class_name": Denoiser.__name__} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "DenoiserConfig":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If it describes something else.
        """
        values = json.loads(text)
        kind = values.pop("_class_name", None) if isinstance(values, dict) else None
        if kind != Denoiser.__name__:
            msg = f"The configuration describes {kind!r}, not a {Denoiser.__name__!r} written by `decodiff convert`."
            raise ValueError(msg)
        size = {name: tuple(value) if isinstance(value, list) else value for name, value in values.pop("size").items()}
        categories = values.pop("categories")
        return cls(size=DenoiserSize(**size), categories=categories and tuple(categories), **values)


# ---------------------------------------------------------------- names of the weights

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
    """Name, in the authors' network, of the weight that is ``key`` in :class:`~decodiff_anomalib.denoiser.Denoiser`.

    The authors number the blocks of a side through and the parts of a block by position; diffusers numbers them within
    a resolution and by kind.

    Args:
        key: A key of the denoiser's ``state_dict``.
        layers: Residual blocks of each resolution, see :class:`~decodiff_anomalib.denoiser.DenoiserSize`.
        attention: Which resolutions attend, the finest first.
    """
    module, _, parameter = key.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{parameter}"
    side, *place = module.removeprefix("unet.").split(".")
    level = 0 if side == "mid_block" else int(place.pop(0))
    kind, index, *inside = place
    part = ".".join(inside)
    if kind == "resnets":
        part = _RESIDUAL[part]
    elif kind == "downsamplers":
        part = "op"

    if side == "mid_block":  # residual block, transformer, residual block
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        first = level * (layers + 1)
        number = first + (layers if kind.endswith("samplers") else int(index))
        attends = attention[::-1][level]  # matters on the way up only, where the upsampler follows the transformer
        position = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attends}[kind]
        # On the way down, the first convolution is block 0.
        block = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
        block = f"{block}.{position}"
    return f"{block}.{part}.{parameter}"


def to_official_state(denoiser: Denoiser) -> State:
    """The weights under the authors' names: the ``model`` of a checkpoint of theirs.

    Raises:
        ValueError: If their program has no such network.
    """
    unet = denoiser.unet.config
    if denoiser.unet.class_embedding is not None:
        msg = "The network is modulated by the category, which the authors' is not. Sizes XS to XL can be theirs."
        raise ValueError(msg)
    attention = [kind.startswith("CrossAttn") for kind in unet.down_block_types]
    state = denoiser.state_dict()
    return {official_key(key, unet.layers_per_block, attention): tensor for key, tensor in state.items()}


# ---------------------------------------------------------------- the authors' checkpoints


def load_official(path: str | Path, num_heads: int | None = None) -> tuple[Denoiser, DenoiserConfig]:
    """Load a checkpoint written by the authors' training script, or by latent-diffusion's.

    The shape of the network is read from the tensors, with one exception: the number of attention heads leaves no trace
    where the heads fill the width. It is that of the published size of this width; for other widths 4, or the
    least that fits, with a warning.

    Args:
        path: The file. It is read with an allow-list and cannot execute anything.
        num_heads: Attention heads at the finest resolution, where they are known better.

    Returns:
        tuple[Denoiser, DenoiserConfig]: The denoiser, in evaluation mode, and what else is known of it. Of a
        latent-diffusion checkpoint the category table is kept whole; :func:`transfer` takes its first rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    state, arguments, origin = _read_checkpoint(Path(path))
    try:
        size = _recognise_size(state, arguments.get("num_heads") if num_heads is None else num_heads)
    except LookupError as error:
        msg = f"{path} is not the authors' network: weight {error} is missing or of another rank. {ACCEPTED}"
        raise ValueError(msg) from error
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error

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
    denoiser = _empty_denoiser(config)
    expected = {official_key(key, size.layers, size.attention): key for key in denoiser.state_dict()}
    _refuse_other_weights(path, state, {name: denoiser.state_dict()[key] for name, key in expected.items()})
    return _fill(denoiser, {key: state[name].float() for name, key in expected.items()}), config


def _read_checkpoint(path: Path) -> tuple[State, dict[str, Any], str]:
    """Weights under the authors' names, arguments of their training script, and whose checkpoint it is."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        blocked = next((f" ({line.strip()})" for line in str(error).splitlines() if " GLOBAL " in line), "")
        msg = (
            f"{path} was not opened: it is no PyTorch checkpoint, or holds objects that could execute code{blocked}. "
            f"{ACCEPTED} If it is one of these with more objects in it, and you trust where it is from, "
            "store the named entries alone with torch.save."
        )
        raise ValueError(msg) from error

    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    if "model" in found and isinstance(found.get("args"), argparse.Namespace):
        state, arguments, origin = found["model"], vars(found["args"]), "decodiff"
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


def _recognise_size(state: State, num_heads: int | None) -> DenoiserSize:
    """Shape of the network from the shapes of its weights.

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
        attention=attention,
        layers=layers,
        multipliers=tuple(channels // width for channels in widths),
    )


def _recognise_head_channels(
    width: int, inner_widths: dict[int, int], num_heads: int | None, published: Sequence[int]
) -> int:
    """Channels of a head, which must explain the inner width of the transformers of each width."""

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


def _refuse_other_weights(source: str | Path, state: State, expected: State) -> None:
    """Raise a short account where names or shapes differ."""
    differences = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    counts = [f"{len(names)} {kind}, such as {names[0]!r}" for kind, names in differences.items() if names]
    if counts:
        msg = (
            f"{source} does not hold DeCo-Diff's network. Of its weights, {'; '.join(counts)}. "
            "Give an unchanged checkpoint of the authors' script, or what `decodiff convert` made of one."
        )
        raise ValueError(msg)


# ---------------------------------------------------------------- files of our own


def convert(path: Path, *, to: Path, num_heads: int | None = None) -> None:
    """Convert the authors' weights, or latent-diffusion's, to files that are safe to open and to publish.

    Args:
        path: Checkpoint of the authors' training script (.pt), or a class-conditional one of latent-diffusion (.ckpt).
        to: Folder for model.safetensors and config.json; made where it is missing.
        num_heads: Attention heads at the finest resolution. Only needed for sizes that were not published.
    """
    denoiser, config = load_official(path, num_heads)
    save_pretrained(denoiser, config, to)
    print(f"{to}: denoiser {config.denoiser}, {config.num_categories} categories, {config.latent_channels} channels.")


def save_pretrained(denoiser: Denoiser, config: DenoiserConfig, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` to ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in denoiser.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def load_pretrained(source: str | Path) -> tuple[Denoiser, DenoiserConfig]:
    """Load what :func:`convert` or :func:`save_pretrained` wrote.

    Args:
        source: The folder, or the hub id of its published copy, which is only asked for where no such folder exists.

    Returns:
        tuple[Denoiser, DenoiserConfig]: The denoiser, in evaluation mode, and what else is known of it.

    Raises:
        OSError: If the source is neither local nor reachable.
        ValueError: If it is something else.
    """
    folder = Path(source)
    if folder.is_file():
        msg = f"weights={str(source)!r} is a file. Run `decodiff convert {source} --to DIR` and give weights=DIR."
        raise ValueError(msg)
    if not folder.is_dir():
        folder = _download(str(source))
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if missing:
        msg = (
            f"weights={str(source)!r} has no {' and no '.join(missing)}. "
            "Give a folder or hub id of what `decodiff convert` writes."
        )
        raise ValueError(msg)
    config = DenoiserConfig.from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    denoiser, state = _empty_denoiser(config), load_file(folder / WEIGHTS_FILE)
    _refuse_other_weights(source, state, denoiser.state_dict())
    return _fill(denoiser, state), config


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    logger.info("Looking for the weights %s on the hub.", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except (OSError, ValueError) as error:  # no network or no such repository; not even the form of an id
        msg = (
            f"weights={hub_id!r} is neither a local folder nor in the local cache, and could not be fetched. "
            f"Where there is a network, run `hf download {hub_id} --local-dir DIR` and give weights=DIR."
        )
        raise OSError(msg) from error


def _empty_denoiser(config: DenoiserConfig) -> Denoiser:
    """Build the network without memory for its weights."""
    # Before the context: constants of modules that are first imported on the meta device would stay there.
    from diffusers import UNet2DConditionModel  # noqa: F401

    with torch.device("meta"):
        return build_denoiser(config.size, config.latent_channels, config.num_categories)


def _fill(denoiser: Denoiser, state: State) -> Denoiser:
    """Give the network its weights, not copied."""
    denoiser.load_state_dict(state, assign=True)
    return denoiser.eval()


# ---------------------------------------------------------------- starting from other weights

_STRUCTURE = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "attention_head_dim",
    "cross_attention_dim",
    "class_embed_type",
)


@torch.no_grad()
def transfer(
    source: Denoiser,
    target: Denoiser,
    source_categories: Sequence[str] | None = None,
    target_categories: Sequence[str] | None = None,
) -> None:
    """Start ``target`` from the weights of ``source``, which may know fewer or more categories.

    Where both sides name their categories, a category takes the row of its name; else rows keep their place. Categories
    that the source does not know keep the row they have.

    Args:
        source: Left as it is.
        target: Of the same shape but for the category table.
        source_categories: Names of the source's rows.
        target_categories: Names of the target's rows.

    Raises:
        ValueError: If the networks differ.
    """
    ours, theirs = target.unet.config, source.unet.config
    if ours.in_channels != theirs.in_channels:
        msg = (
            f"The weights are for latents of {theirs.in_channels} channels, the model's have {ours.in_channels}. "
            "Choose the codec the weights were trained with and no features that join the latents."
        )
        raise ValueError(msg)
    for name in _STRUCTURE:
        if ours[name] != theirs[name]:
            msg = f"{name}={theirs[name]} of the weights is {ours[name]} in the model; choose its denoiser to match."
            raise ValueError(msg)
    target.unet.load_state_dict(source.unet.state_dict())
    old, new = source.category_embedding.weight, target.category_embedding.weight
    if source_categories and target_categories:
        rows = {name: row for row, name in enumerate(source_categories)}
        pairs = [(rows[name], row) for row, name in enumerate(target_categories) if name in rows]
    else:
        pairs = [(row, row) for row in range(min(len(old), len(new)))]
    for from_row, to_row in pairs:
        new[to_row] = old[from_row]
