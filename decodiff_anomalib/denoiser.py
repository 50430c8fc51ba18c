"""The network that predicts deviations: diffusers' ``UNet2DConditionModel`` with one learned token per category.

The published sizes XS to XL are represented exactly. Cross-attention over a single token is a constant for each layer
and category, so ``nano`` and ``tiny`` do without it: the category modulates their residual blocks instead.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SPATIAL_DIVISOR = 4  # two downsamplings


@dataclass(frozen=True)
class DenoiserSize:
    """Shape of a UNet.

    Attributes:
        width: Channels at the finest resolution.
        head_channels: Channels of one attention head; their number grows with the width.
        context_width: Channels of the category token.
        attention: Which of the resolutions have attention.
        dropout: In the residual blocks.
        layers: Residual blocks of each resolution.
        norm_groups: Groups of the group normalisations; one channel a group would remove the brightness of an image.
        multipliers: Channels at each resolution, in units of ``width``.
        kernel: Size of the first and the last convolution; 1 suits latents of many channels.
        modulated: Whether timestep and category scale and shift the features of every residual block. As published, the
            timestep only shifts them, and the category enters through cross-attention.
    """

    width: int
    head_channels: int
    context_width: int
    attention: tuple[bool, ...] = (True, True, True)
    dropout: float = 0.4
    layers: int = 2
    norm_groups: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    kernel: int = 3
    modulated: bool = False


SMALL: dict[str, Any] = {
    "attention": (False, False),
    "dropout": 0.0,
    "layers": 1,
    "norm_groups": 8,
    "multipliers": (1, 2),
    "kernel": 1,
    "modulated": True,
}

DENOISER_SIZES = {
    # for CPUs
    "nano": DenoiserSize(48, 32, 64, **SMALL),
    "tiny": DenoiserSize(96, 32, 128, **SMALL),
    # as published
    "XS": DenoiserSize(64, 16, 128),
    "S": DenoiserSize(128, 32, 256),
    "M": DenoiserSize(192, 32, 384),
    "L": DenoiserSize(256, 32, 512),
    "XL": DenoiserSize(320, 26, 640),
}


class Denoiser(nn.Module):
    """A UNet over latents, conditioned on timestep and category.

    Args:
        size: Shape of the UNet.
        latent_channels: Channels in.
        num_categories: Rows of the category table.
        sample_size: Side of the latents the network is meant for; any side divisible by 4 works.
        out_channels: Channels out; by default as many as in.
    """

    def __init__(
        self,
        size: DenoiserSize,
        latent_channels: int,
        num_categories: int,
        sample_size: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel  # seconds to import: only when a network is built

        widths = [size.width * multiplier for multiplier in size.multipliers]
        down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in size.attention]
        up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(size.attention)]
        self.unet: Any = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=out_channels or latent_channels,
            conv_in_kernel=size.kernel,
            conv_out_kernel=size.kernel,
            flip_sin_to_cos=True,
            freq_shift=0,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            mid_block_type="UNetMidBlock2DCrossAttn" if any(size.attention) else "UNetMidBlock2D",
            block_out_channels=tuple(widths),
            layers_per_block=size.layers,
            dropout=size.dropout,
            norm_num_groups=size.norm_groups,
            cross_attention_dim=size.context_width,
            # diffusers' name is a misnomer: this is the *number* of heads; their width stays fixed across levels
            attention_head_dim=tuple(max(1, width // size.head_channels) for width in widths),
            resnet_time_scale_shift="scale_shift" if size.modulated else "default",
            class_embed_type="projection" if size.modulated else None,
            projection_class_embeddings_input_dim=size.context_width if size.modulated else None,
        )
        self.category_embedding = nn.Embedding(num_categories, size.context_width)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Zero the last convolution of every residual block and transformer, and of the network (published init)."""
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        last = [self.unet.conv_out]
        last += [block.conv2 for block in self.unet.modules() if isinstance(block, ResnetBlock2D)]
        last += [block.proj_out for block in self.unet.modules() if isinstance(block, Transformer2DModel)]
        for convolution in last:
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor | int, category: torch.Tensor) -> torch.Tensor:
        """Predict the deviation of ``latents``, or what it was built to predict.

        Args:
            latents: ``(B, C, h, w)``, ``h`` and ``w`` divisible by 4.
            timesteps: int64 ``(B,)``, original timesteps (not rescaled to 1000), or one of them for all.
            category: int64 ``(B,)``; the number of categories means unknown, which is the mean of their tokens.

        Returns:
            torch.Tensor: Deviation ``(B, C, h, w)``.
        """
        tokens = self.tokens()[category]
        context = tokens.unsqueeze(1)
        return self.unet(latents, timesteps, encoder_hidden_states=context, class_labels=tokens, return_dict=False)[0]

    def tokens(self) -> torch.Tensor:
        """Token of each category and of an unknown one, ``(K + 1, context_width)``."""
        tokens = self.category_embedding.weight
        return torch.cat([tokens, tokens.mean(0, keepdim=True)])


class FoldedDenoiser(nn.Module):
    """A denoiser for inference in which everything that does not depend on the latents is precomputed.

    Its predictions are the same. A timestep enters each residual block as a constant bias or, where the network is
    modulated, as a constant embedding. Cross-attention over a single token adds a constant vector for each category,
    because a softmax over one key is 1.

    Args:
        denoiser: The denoiser, whose weights are shared.
        timesteps: Those of the correction steps.
    """

    def __init__(self, denoiser: Denoiser, timesteps: Iterable[int]) -> None:
        super().__init__()
        self.unets = nn.ModuleDict({str(timestep): _fold(denoiser, timestep) for timestep in timesteps})

    def forward(self, latents: torch.Tensor, timesteps: int, category: torch.Tensor) -> torch.Tensor:
        """As :meth:`Denoiser.forward`, at one timestep for all."""
        unet = self.unets[str(timesteps)]
        return unet(latents, timesteps, encoder_hidden_states=category, class_labels=category, return_dict=False)[0]


class _Precomputed(nn.Module):
    """Holds the output of the module that it replaces."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output: torch.Tensor
        self.register_buffer("output", output)


class _Constant(_Precomputed):
    """Replaces a module whose output is constant."""

    def forward(self, *_: torch.Tensor | None) -> torch.Tensor:
        return self.output


class _ConstantOfCategory(_Precomputed):
    """Replaces a module whose output depends on the category alone, which is passed as its input; a row for each."""

    def forward(self, category: torch.Tensor) -> torch.Tensor:
        return self.output[category]


class _ConstantAttention(_Precomputed):
    """Replaces cross-attention over one token; receives the category index instead of the token; a row for each."""

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        del hidden_states
        return self.output[encoder_hidden_states]


@torch.no_grad()
def _fold(denoiser: Denoiser, timestep: int) -> nn.Module:
    """The UNet at one timestep, given the category index ``(B,)`` as ``encoder_hidden_states`` and ``class_labels``."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    tokens = denoiser.tokens()
    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    unet = copy.deepcopy(denoiser.unet, shared).eval()
    embedded = unet.time_embedding(unet.time_proj(torch.tensor([timestep], device=tokens.device)).to(tokens))
    unet.time_embedding = _Constant(embedded)
    modulated = unet.class_embedding is not None
    if modulated:
        unet.class_embedding = _ConstantOfCategory(unet.class_embedding(tokens))
    for block in list(unet.modules()):
        if isinstance(block, ResnetBlock2D) and not modulated:
            block.time_emb_proj = _Constant(block.time_emb_proj(block.nonlinearity(embedded)))
        elif isinstance(block, BasicTransformerBlock):
            queries = tokens.new_zeros(len(tokens), 1, block.attn2.query_dim)
            attended = block.attn2(queries, encoder_hidden_states=tokens.unsqueeze(1))
            block.attn2, block.norm2 = _ConstantAttention(attended), nn.Identity()
    return unet


def build_denoiser(
    size: str | dict[str, Any] | DenoiserSize,
    latent_channels: int = 4,
    num_categories: int = 1,
    sample_size: int = 32,
    out_channels: int | None = None,
) -> Denoiser:
    """Build the UNet of a named size.

    Args:
        size: A key of :data:`DENOISER_SIZES`, a :class:`DenoiserSize`, or a dictionary of its fields.
        latent_channels: Channels of the latents, in and out.
        num_categories: Number of product categories.
        sample_size: Side of the latents.
        out_channels: Channels out where they differ.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(size, str):
        if size not in DENOISER_SIZES:
            msg = f"denoiser={size!r} is unknown; valid: {', '.join(DENOISER_SIZES)}."
            raise ValueError(msg)
        size = DENOISER_SIZES[size]
    elif isinstance(size, dict):
        size = DenoiserSize(**size)
    return Denoiser(size, latent_channels, num_categories, sample_size, out_channels)
