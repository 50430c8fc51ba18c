"""Messages of other packages that no user of DeCoDiff can act on, and where they are left out.

Those of imports are left out while Anomalib imports its models, those of runs from when a DeCoDiff is made until its
run ends. Other models keep theirs. ``python -W default`` or ``PYTHONWARNINGS=default`` shows all warnings.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast


class Notice(NamedTuple):
    """A warning that is left out.

    Attributes:
        message: Regular expression of its beginning.
        source: Regular expression of the module that warns.
        reason: Why users cannot act on it.
    """

    message: str
    source: str
    reason: str


OF_IMPORTS = (
    Notice(
        r"Importing from timm\.models\.layers is deprecated",
        r"timm\.models\.layers$",
        "Anomalib's CFM imports it.",
    ),
    Notice(
        r"The anomalib\.models\.components\.dinov2 package is deprecated",
        r"anomalib\.models\.image\.dinomaly\.",
        "Anomalib's Dinomaly imports it.",
    ),
)
"""Warnings while Anomalib's models are imported."""

_OURS = "'(WeightAveraging|RepeatableOrder)'"  # callbacks that a checkpoint holds the state of

OF_RUNS = (
    Notice(
        r"`max_epochs` was not set",
        r"lightning\.pytorch\.loops\.utilities$",
        "The model's `train_steps` is the duration, whatever Lightning takes instead.",
    ),
    Notice(
        r"Found \d+ module\(s\) in eval mode at the start of training",
        r"lightning\.pytorch\.loops\.fit_loop$",
        "Codec and backbone are frozen.",
    ),
    Notice(
        r"You have overridden `on_before_batch_transfer` in `LightningModule`",
        r"lightning\.pytorch\.trainer\.connectors\.data_connector$",
        "The model's own, which Lightning says it will use, is the right one.",
    ),
    Notice(
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"lightning\.pytorch\.utilities\._pytree$",
        "Lightning calls it.",
    ),
    Notice(
        rf"Be aware that when using `ckpt_path`, .*: \[{_OURS}(, {_OURS})*\]",
        r"lightning\.pytorch\.trainer\.call$",
        "The model brings these callbacks where they have something to do, which is in training.",
    ),
    Notice(
        r"The dirpath has changed from ",
        r"lightning\.pytorch\.callbacks\.model_checkpoint$",
        "Anomalib gives every run a folder of its own.",
    ),
    Notice(
        r"The 'predict_dataloader' does not have many workers",
        r"lightning\.pytorch\.trainer\.connectors\.data_connector$",
        "Anomalib makes the loader of `predict --data FOLDER`, and takes no number of workers.",
    ),
    Notice(
        r"'pin_memory' argument is set as true but no accelerator is found",
        r"torch\.utils\.data\.dataloader$",
        "Anomalib makes this loader so on computers without a GPU, too.",
    ),
)
"""Warnings of a run with DeCoDiff."""

OF_DEMO_TEXTURES = (
    Notice(
        r"The '\w+_dataloader' does not have many workers",
        r"lightning\.pytorch\.trainer\.connectors\.data_connector$",
        "For its few small images, starting workers takes longer than reading.",
    ),
)
"""Warnings of a run with our datamodule whose loaders have no workers."""

RECORDS = {
    r"The following callbacks returned in `LightningModule\.configure_callbacks` will override": (
        "A test after a training meets the callbacks that the model gave to the training."
    ),
    r"💡 Tip: ": "Advertisements of other products.",
    r"`weights_only` was not set": "Anomalib's engine chooses it.",
}
"""Beginnings of records of :data:`LOGGERS` during a run with DeCoDiff, and why users cannot act on them."""

LOGGERS = (
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    # Lightning's packages share one of these, that of the package which was imported last:
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
)


def begin(warned: Sequence[Notice] = OF_RUNS) -> None:
    """Leave out warnings, and the records of runs, until :func:`end`."""
    _leave_out(warned)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_wanted)


def end() -> None:
    """Undo every :func:`begin`."""
    _let_in(OF_RUNS + OF_DEMO_TEXTURES)
    for name in LOGGERS:
        logging.getLogger(name).removeFilter(_is_wanted)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Leave out the warnings of imports."""
    _leave_out(OF_IMPORTS)
    try:
        yield
    finally:
        _let_in(OF_IMPORTS)


def _leave_out(notices: Sequence[Notice]) -> None:
    if sys.warnoptions:  # the user chose which warnings to see
        return
    for notice in notices:
        warnings.filterwarnings("ignore", notice.message, module=notice.source)


def _let_in(notices: Sequence[Notice]) -> None:
    """Remove filters, instead of restoring those of before: what ran meanwhile may have added some."""
    ours = {(re.compile(notice.message, re.IGNORECASE), re.compile(notice.source)) for notice in notices}
    filters = cast("list[Any]", warnings.filters)
    filters[:] = [entry for entry in filters if (entry[1], entry[3]) not in ours]


def _is_wanted(record: logging.LogRecord) -> bool:
    return not any(re.match(beginning, record.getMessage()) for beginning in RECORDS)
