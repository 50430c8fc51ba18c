"""What ``import torch`` runs: it hands over to :mod:`decodiff_anomalib.plugin`, if the package is there.

Installing puts this file beside the package, as the module ``decodiff_anomalib_autoload`` (see ``pyproject.toml``),
which the entry point names; in an editable installation it is a copy. So it is there even when the package is not: an
entry point outlives a checkout that is moved or deleted, and PyTorch makes every exception of an entry point one of
``import torch``, in every program of the environment. Therefore this module needs only the standard library, looks
before it imports, and never raises.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec

PACKAGE = "decodiff_anomalib"

logger = logging.getLogger(__name__)


def register() -> None:
    """Let the package publish its classes in Anomalib, or warn that it cannot."""
    try:
        problem = _problem()
        if problem is None:
            import_module(f"{PACKAGE}.plugin").register()
    except Exception as error:  # noqa: BLE001 - whatever it is, `import torch` must work
        problem = f"the package fails with {type(error).__name__}: {error}; install it again"
    if problem:
        logger.warning(
            "Anomalib will not know DeCoDiff: %s. `pip uninstall %s` takes it out of this environment.",
            problem,
            PACKAGE,
        )


def _problem() -> str | None:
    """Why our package cannot be imported under its name, and what to do; ``None`` if it can.

    Nothing is imported to find out: what has the name may be any file in the working directory.
    """
    spec = find_spec(PACKAGE)
    if spec is None:
        return f"{PACKAGE} is installed, but the package is gone, as when a checkout was moved; install it again"
    folders = list(spec.submodule_search_locations or ())
    if spec.origin is None or PathFinder.find_spec(f"{PACKAGE}.plugin", folders) is None:
        return f"Python finds {spec.origin or folders[0]} in place of {PACKAGE}; rename that, or install ours again"
    return None
