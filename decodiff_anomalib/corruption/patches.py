"""The paper's corruption: random patches of the latents replaced by Gaussian noise or by shuffled patches.

With the mask ``m`` (1 keeps), a second mask ``q``, Gaussian noise ``g`` and the batch's own shuffled patches:

    n = q g + (1 - q) shuffle(z_0)       the corrupting content

:class:`decodiff_anomalib.schedule.DeviationSchedule` turns ``n`` and ``m`` into noisy latents and target. Ratios and
patch sizes are those of the authors' program.

Random choices come from the given :class:`torch.Generator`, which lives on the CPU, so that a run repeats on any
device.
"""

import torch

MAX_MASK_RATIO, MAX_NOISE_RATIO = 0.7, 0.3


def patch_size_probabilities(height: int, width: int) -> dict[int, float]:
    """Patch sides in latent pixels and their probabilities (as published).

    The published table for 28 to 64 latents, continued by its own rule; sides that do not divide the latents are left
    out and the rest renormalised (the published program stops there).

    Raises:
        ValueError: If the latents are smaller than 2x2.
    """
    side = min(height, width)
    if side < 2:
        msg = f"Latents of {height}x{width} are too small to corrupt by patches; use a larger image_size."
        raise ValueError(msg)
    if side < 48:
        table = {1: 0.30, 2: 0.25, 4: 0.20, 8: 0.15, min(16, side // 2): 0.10}
    else:
        table = {1: 0.25, 2: 0.20, 4: 0.20, 8: 0.15, 16: 0.10, side // 2: 0.10}
    table = {patch: weight for patch, weight in table.items() if height % patch == 0 and width % patch == 0}
    total = sum(table.values())
    return {patch: weight / total for patch, weight in table.items()}


def random_patch_mask(
    batch_size: int,
    size: tuple[int, int],
    patch_size: int,
    max_ratio: float = MAX_MASK_RATIO,
    *,
    ratios: torch.Tensor | None = None,
    permutations: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Keep-masks of random patches (as published): 1 keeps, 0 corrupts.

    A share ``r ~ U(0, max_ratio)`` of the patches of each sample is corrupted: the first ``int(N (1 - r))`` patches of
    a random order are kept, so at least one is corrupted whenever ``r > 0``.

    Args:
        batch_size: Number of masks ``B``.
        size: Latent height and width, divisible by ``patch_size``.
        patch_size: Side of a patch in latent pixels.
        max_ratio: Largest corrupted share.
        ratios: The shares ``(B,)``, instead of random ones.
        permutations: Orders of the patches, int64 ``(B, N)``, row-major, instead of random ones.
        generator: Source of randomness.

    Returns:
        torch.Tensor: float32 ``(B, 1, h, w)``.
    """
    rows, columns = size[0] // patch_size, size[1] // patch_size
    num_patches = rows * columns
    if ratios is None:
        ratios = max_ratio * torch.rand(batch_size, dtype=torch.float64, generator=generator)
    if permutations is None:
        permutations = torch.rand(batch_size, num_patches, generator=generator).argsort(dim=1)
    num_kept = (num_patches * (1 - ratios.double())).long()  # truncation toward zero, in float64
    kept_first = (torch.arange(num_patches) < num_kept[:, None]).float()
    mask = torch.zeros(batch_size, num_patches).scatter(1, permutations, kept_first)
    mask = mask.view(batch_size, 1, rows, columns)
    return mask.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


def shuffle_patches(
    latents: torch.Tensor,
    patch_size: int,
    permutation: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Exchange the patches of a whole batch (as published): they come from other samples and positions.

    Args:
        latents: ``(B, C, h, w)``.
        patch_size: Side of a patch, dividing ``h`` and ``w``.
        permutation: int64 ``(B * N,)``; output patch ``j`` (sample-major, then row-major) is patch ``permutation[j]``.
        generator: Source of randomness where no permutation is given.
    """
    batch_size, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    patches = latents.view(batch_size, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    if permutation is None:
        permutation = torch.randperm(len(patches), generator=generator)
    patches = patches[permutation.to(latents.device)].unflatten(0, (batch_size, rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def corrupt_latents(
    latents: torch.Tensor,
    max_mask_ratio: float = MAX_MASK_RATIO,
    max_noise_ratio: float = MAX_NOISE_RATIO,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the paper's corruption for a batch: content and where it goes (as published).

    Args:
        latents: Clean latents ``(B, C, h, w)``.
        max_mask_ratio: Largest corrupted share of a sample.
        max_noise_ratio: Largest share of shuffled (not Gaussian) content.
        generator: Source of randomness.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Noise ``(B, C, h, w)``, Gaussian or shuffled patch by patch, and the
        keep-mask ``(B, 1, h, w)``.
    """
    batch_size, size = len(latents), (latents.shape[-2], latents.shape[-1])
    table = patch_size_probabilities(*size)
    drawn = int(torch.multinomial(torch.tensor(list(table.values())), 1, generator=generator))
    patch_size = list(table)[drawn]
    mask = random_patch_mask(batch_size, size, patch_size, max_mask_ratio, generator=generator).to(latents)
    gaussian_mask = random_patch_mask(batch_size, size, patch_size, max_noise_ratio, generator=generator).to(latents)
    gaussian = torch.randn(latents.shape, generator=generator).to(latents)
    shuffled = shuffle_patches(latents, patch_size, generator=generator)
    return gaussian_mask * gaussian + (1 - gaussian_mask) * shuffled, mask
