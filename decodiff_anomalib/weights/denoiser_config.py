"""Description of a denoiser, and building a denoiser from its description and weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from decodiff_anomalib.denoiser import DENOISER_SIZES, Denoiser, DenoiserSize, build_denoiser

State = dict[str, torch.Tensor]

MOST_LAYERS = 100  # a larger network, which takes for ever to build, is that of a damaged file


@dataclass(frozen=True)
class DenoiserConfig:
    """Description of a denoiser: what is known about it apart from the weights.

    Attributes:
        size: Shape of the UNet.
        latent_channels: Channels of the latents, input and output.
        num_categories: Rows of the category table.
        categories: Names of the rows, if known.
        codec: Hub id of the codec whose latents it was trained on, if known.
        source: ``decodiff`` (the authors' script) or ``latent-diffusion``.
        out_channels: Channels out where they differ from those in.
    """

    size: DenoiserSize
    latent_channels: int
    num_categories: int
    categories: tuple[str, ...] | None
    codec: str | None
    source: str
    out_channels: int | None = None

    @property
    def denoiser(self) -> str | dict[str, Any]:
        """Name of the size, or its fields if it has no name."""
        names = (name for name, size in DENOISER_SIZES.items() if size == self.size)
        return next(names, asdict(self.size))

    def to_json(self) -> str:
        """Serialise to JSON, which :meth:`from_json` reads."""
        return json.dumps({"_class_name": Denoiser.__name__} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "DenoiserConfig":
        """Parse the output of :meth:`to_json`.

        Raises:
            ValueError: If it describes something other than a denoiser.
        """
        values = json.loads(text)
        kind = values.pop("_class_name", None) if isinstance(values, dict) else None
        if kind != Denoiser.__name__:
            msg = f"The configuration describes {kind!r}, not a {Denoiser.__name__!r} written by `decodiff convert`."
            raise ValueError(msg)
        fields = values.pop("size").items()
        size: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields}
        if not (isinstance(size.get("layers", 1), int) and size.get("layers", 1) <= MOST_LAYERS):
            msg = f"The configuration has layers={size.get('layers')!r}; it must be a number up to {MOST_LAYERS}."
            raise ValueError(msg)
        categories = values.pop("categories")
        return cls(size=DenoiserSize(**size), categories=categories and tuple(categories), **values)


def empty_denoiser(config: DenoiserConfig) -> Denoiser:
    """Build the network on the meta device, without memory for its weights."""
    # Before the context: modules first imported inside it would create their constants on the meta device.
    from diffusers import UNet2DConditionModel  # noqa: F401

    with torch.device("meta"):
        return build_denoiser(
            config.size, config.latent_channels, config.num_categories, out_channels=config.out_channels
        )


def fill(denoiser: Denoiser, state: State) -> Denoiser:
    """Assign the weights, without a copy, to a network built by :func:`empty_denoiser`; in evaluation mode."""
    denoiser.load_state_dict(state, assign=True)
    return denoiser.eval()


def refuse_other_weights(source: str | Path, state: State, expected: State) -> None:
    """Compare names and shapes of the weights with the expected ones.

    Raises:
        ValueError: If any differs; counts the missing, unknown and misshapen weights and names one of each.
    """
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
