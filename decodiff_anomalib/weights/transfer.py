"""Transfer of weights between networks with different category tables."""

from collections.abc import Sequence

import torch

from decodiff_anomalib.denoiser import Denoiser

# Entries of diffusers' configuration that must be equal. Different heads would not show in the shapes of the weights.
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
    """Initialise ``target`` with the weights of ``source``, which may have fewer or more categories.

    If the categories of both are named, the row of a category is the one with its name in the source, and rows of other
    names stay unchanged. Otherwise rows are copied by position, as many as both have.

    Args:
        source: Not changed.
        target: Of the same shape except for the number of categories.
        source_categories: Names of the source's rows.
        target_categories: Names of the target's rows.

    Raises:
        ValueError: If the shapes differ.
    """
    to_config, from_config = target.unet.config, source.unet.config
    if to_config.in_channels != from_config.in_channels:
        msg = (
            f"The weights are for latents of {from_config.in_channels} channels, the model's have "
            f"{to_config.in_channels}. Choose the codec the weights were trained with and no features that join the "
            "latents."
        )
        raise ValueError(msg)
    for name in _STRUCTURE:
        if to_config[name] != from_config[name]:
            msg = (
                f"{name}={from_config[name]} of the weights is {to_config[name]} in the model; choose its denoiser to "
                "match."
            )
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
