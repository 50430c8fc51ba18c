"""Temporary changes of a datamodule."""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

_ABSENT = object()


class DataOverrides(Callback):
    """Changes attributes of the datamodule for the duration of a fit and restores them afterwards."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] = {}

    def override(self, datamodule: LightningDataModule, **attributes: object) -> None:
        """Set attributes of the datamodule until the end of the fit."""
        own = vars(datamodule)
        self._restore = {name: own.get(name, _ABSENT) for name in attributes} | self._restore
        own.update(attributes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the datamodule, for the next model."""
        del pl_module
        if stage == "fit" and trainer.datamodule is not None:
            own = vars(trainer.datamodule)
            own.update(self._restore)
            for name in [name for name, value in self._restore.items() if value is _ABSENT]:
                del own[name]
            self._restore = {}
