"""What is kept of an interrupted training."""

import logging
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)


class Interruption(Callback):
    """Writes a checkpoint when a training is ended by SIGTERM or Ctrl+C, from which it can go on."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save ``interrupted.ckpt`` beside the checkpoints of the run."""
        del pl_module
        if not isinstance(exception, SIGTERMException | KeyboardInterrupt) or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.validating:  # which is not taken up in its middle: the next one sets all anew
            trainer.fit_loop.epoch_loop.val_loop.increment_progress_to_evaluation_end()
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        path = Path(folder) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        logger.warning("Interrupted after %d steps. To go on, repeat with --ckpt_path %s", trainer.global_step, path)
