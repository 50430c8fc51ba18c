"""Which arithmetic a device computes natively: the only place that asks."""

import torch


def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether ``device`` has instructions for bfloat16; others emulate it, many times slower than float32.

    On CPUs these are AVX-512 BF16, which PyTorch's convolutions and matrix products use; on CUDA, compute capability
    8.0 or higher.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 cannot tell
    return kind == "cpu" and bool(capabilities.get("avx512_bf16", False))


def check_precision(precision: str) -> None:
    """Refuse a trainer's precision in which deviations, small differences of large numbers, would be rounded away.

    Args:
        precision: As Lightning names it.

    Raises:
        ValueError: If the model's weights and statistics would not be kept in float32.
    """
    if precision != "32-true" and not precision.endswith("-mixed"):
        msg = (
            f"trainer.precision={precision} stores the model in another precision, in which its statistics lose what "
            "tells a deviation from none. Use bf16-mixed, or 32-true, which trains in bfloat16 where hardware has it."
        )
        raise ValueError(msg)
