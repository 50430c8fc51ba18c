"""Makes Anomalib know this package's classes without the user importing anything.

Anomalib has no plugin mechanism. It knows a model once the class exists (``get_model``, ``list_models`` and the command
line read ``AnomalibModule.__subclasses__()``) and once it is an attribute of ``anomalib.models``; datamodules live in
``anomalib.data`` likewise. PyTorch does have one: ``import torch`` calls each entry point of the group
``torch.backends``, and Anomalib always imports torch. Ours, :mod:`decodiff_anomalib.torch_autoload`, calls
:func:`register`; that imports nothing, but watches for Anomalib's packages and hands them our classes when they arrive.

Three rules follow for this package:

* A class that does not exist is no subclass, so publication cannot wait until DeCoDiff is asked for: our modules are
  imported with Anomalib's. They must therefore be cheap beyond what Anomalib has loaded already; diffusers, above all,
  is imported inside functions.
* Our modules are imported while Anomalib's package is in its last import. They may use its submodules
  (``anomalib.models.components``, ``anomalib.data.datamodules``), never what the package defines further down, such as
  ``anomalib.models.get_model``. ``decodiff_anomalib.data`` must not import ``anomalib.models``, which comes after it.
* What fails here must break neither ``import torch`` nor Anomalib for the whole environment: this module needs only
  the standard library, and what fails is logged.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, NamedTuple

from decodiff_anomalib.quiet import quiet_imports

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "DECODIFF_ANOMALIB_PLUGIN"
"""Environment variable that keeps the plugin out when set to ``0``."""

logger = logging.getLogger(__name__)


class Publication(NamedTuple):
    """A class of ours that one of Anomalib's packages is to show.

    Attributes:
        name: The class.
        home: Our module that defines it.
        package: Anomalib's package.
        cue: The submodule that the package imports last. The package itself cannot be waited for: its own import is
            what imports torch, and thereby starts us half-way through.
    """

    name: str
    home: str
    package: str
    cue: str


PUBLICATIONS = (
    Publication("DeCoDiff", "decodiff_anomalib.lightning_model", "anomalib.models", "anomalib.models.video"),
    Publication("MultiCategory", "decodiff_anomalib.data", "anomalib.data", "anomalib.data.predict"),
    Publication("DemoTextures", "decodiff_anomalib.data", "anomalib.data", "anomalib.data.predict"),
)
_CUES = {publication.cue for publication in PUBLICATIONS}
_MODELS = "anomalib.models.image"  # the package that imports every model, some of which warn


def register() -> None:
    """Publish our classes in Anomalib as soon as it is imported, or now if it already is.

    Called by ``import torch`` and by ``import decodiff_anomalib``; every call after the first has no effect.
    """
    if os.environ.get(SWITCH) == "0" or _WATCH in sys.meta_path:
        return
    sys.meta_path.insert(0, _WATCH)
    for cue in _CUES & sys.modules.keys():
        _WATCH.completed(cue)


def _publish(publication: Publication) -> None:
    """Set one class on Anomalib's package, unless that has its own: the command line refuses two models of one name."""
    package = sys.modules[publication.package]
    if hasattr(package, publication.name):
        return
    try:
        setattr(package, publication.name, getattr(import_module(publication.home), publication.name))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with our modules, Anomalib itself must work
        logger.warning(
            "Anomalib will not know %s: %s: %s. `python -c 'from %s import %s'` shows where; %s=0 keeps us out.",
            publication.name,
            type(error).__name__,
            error,
            publication.home,
            publication.name,
            SWITCH,
        )


class _Watch(MetaPathFinder):
    """Learns when the cues and our own modules are imported; leaves finding and loading them to others.

    Our own modules matter because any of them may be what imports Anomalib first. The cue then comes while that module
    is half done, and a home that needs it would fail: publication waits until none of ours is under way.
    """

    def __init__(self) -> None:
        self._under_way: set[str] = set()
        self._due: list[Publication] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in {*_CUES, _MODELS} and not fullname.startswith("decodiff_anomalib."):
            return None
        for finder in list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _WatchedLoader(spec.loader, self)
                return spec
        return None

    def execute(self, module: ModuleType, loader: Loader) -> None:
        """Run a module through its own loader."""
        if module.__name__ == _MODELS:
            with quiet_imports():
                loader.exec_module(module)
            return
        self._under_way.add(module.__name__)
        try:
            loader.exec_module(module)
        finally:
            self._under_way.discard(module.__name__)
        self.completed(module.__name__)

    def completed(self, module: str) -> None:
        """Note what the module gives the cue for, and publish what can be."""
        self._due += [publication for publication in PUBLICATIONS if publication.cue == module]
        if not self._under_way:
            due, self._due = self._due, []
            for publication in due:
                _publish(publication)


class _WatchedLoader(Loader):
    """Stands in for a module's own loader until the module runs, and leaves no trace on it."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self._loader = loader
        self._watch = watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watch.execute(module, self._loader)

    def __getattr__(self, name: str) -> Any:  # tools ask loaders for more: get_code, get_source, …
        return getattr(self._loader, name)


_WATCH = _Watch()
