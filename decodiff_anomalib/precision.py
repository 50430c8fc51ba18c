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
