"""The order of the training images, which a resumed training takes up where it was."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from decodiff_anomalib.callbacks.data_overrides import DataOverrides

SEEDS = 2**31  # epochs and images of all seeds must not meet


class EpochSampler(Sampler[int]):
    """The indices of another sampler, drawn anew in each epoch from the seed and the number of the epoch alone.

    Args:
        sampler: One of PyTorch's, with a ``generator`` that it draws from.
        seed: Of all epochs.

    Attributes:
        epoch: Number of the epoch; Lightning sets it through :meth:`set_epoch`.
        start: Indices of the epoch that were used before an interruption, left out the next time.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = self.start = 0
        self.sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from its beginning."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return len(self.sampler)  # of a whole epoch, also of one that goes on

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed * SEEDS + self.epoch)
        return islice(iter(self.sampler), self.start, None)


class SeededItems(Dataset):
    """A data set whose random augmentations depend on the seed, the epoch and the image, not on the worker.

    Args:
        dataset: Draws from the global random state of PyTorch.
        order: Knows seed and epoch.
    """

    def __init__(self, dataset: Dataset, order: EpochSampler) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.order.seed, self.order.epoch, index)))
            return self.dataset[index]


class ResumableLoader(DataLoader):
    """A loader that Lightning takes for resumable; where to go on is known to :class:`EpochSampler`."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class RepeatableOrder(DataOverrides):
    """Makes order and augmentation of the training images the same for any number of workers, and after a resume.

    Applies to the loader of a datamodule that shuffles its images. In distributed training Lightning shares out the
    indices; a training that is resumed in the middle of an epoch then begins that epoch anew.

    Args:
        seed: Of the order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._order: EpochSampler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the loader of the training images."""
        del pl_module
        datamodule = trainer.datamodule
        if stage != "fit" or datamodule is None:
            return
        build = datamodule.train_dataloader

        def train_dataloader() -> DataLoader:
            loader = build()
            if not isinstance(loader, DataLoader) or not hasattr(loader.sampler, "generator"):
                return loader
            self._order = EpochSampler(loader.sampler, self.seed)
            return ResumableLoader(
                SeededItems(loader.dataset, self._order),
                batch_size=loader.batch_size,
                sampler=self._order,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                drop_last=loader.drop_last,
                generator=torch.Generator(),  # of the workers' seeds, which must not draw from the global state
            )

        self.override(datamodule, train_dataloader=train_dataloader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on in the middle of an epoch with the images that it has left."""
        del pl_module
        loop = trainer.fit_loop
        batches = loop.epoch_loop.batch_progress
        if self._order is None or trainer.ckpt_path is None or trainer.world_size > 1:
            return
        self._order.set_epoch(loop.epoch_progress.current.processed)
        if not batches.is_last_batch:
            self._order.start = batches.current.processed * trainer.train_dataloader.batch_size
        iter(loop._data_fetcher)  # noqa: SLF001 - its iterator was made before the checkpoint was read
