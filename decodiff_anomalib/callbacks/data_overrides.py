"""Temporary changes of a datamodule."""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer


class DataOverrides(Callback):
    """Changes attributes of the datamodule for the duration of a fit and restores them afterwards."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] = {}

    def override(self, datamodule: LightningDataModule, **attributes: object) -> None:
        """Set attributes of the datamodule until the end of the fit."""
        self._restore |= {name: getattr(datamodule, name, None) for name in attributes}
        vars(datamodule).update(attributes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the datamodule, for the next model."""
        del pl_module
        if stage == "fit" and trainer.datamodule is not None:
            vars(trainer.datamodule).update(self._restore)
            self._restore = {}
