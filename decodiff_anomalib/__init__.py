"""DeCo-Diff, multi-class anomaly detection by deviation correction in latent diffusion, for Anomalib.

Once installed, Anomalib knows ``DeCoDiff`` and ``MultiCategory`` without this package being imported; see
:mod:`decodiff_anomalib.plugin`. The public names below load on first use, because ``import torch`` imports this module
in every program of the environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from decodiff_anomalib.plugin import register

if TYPE_CHECKING:
    from decodiff_anomalib.data import MultiCategory
    from decodiff_anomalib.lightning_model import DeCoDiff
    from decodiff_anomalib.post_processor import DeCoDiffPostProcessor
    from decodiff_anomalib.torch_model import DeCoDiffModel

__all__ = ["DeCoDiff", "DeCoDiffModel", "DeCoDiffPostProcessor", "MultiCategory", "__version__"]
__version__ = "0.1.0"

_HOMES = {
    "DeCoDiff": "lightning_model",
    "DeCoDiffModel": "torch_model",
    "DeCoDiffPostProcessor": "post_processor",
    "MultiCategory": "data",
}


def __getattr__(name: str) -> type:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}."
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


register()
