"""EfficientAd trains without a network."""

from pathlib import Path

import numpy as np
import torch
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from PIL import Image
from safetensors.torch import load_file, save_file

from decodiff_anomalib.benchmark.baselines import equip_efficient_ad
from decodiff_anomalib.data import MultiCategory
from decodiff_anomalib.post_processor import DeCoDiffPostProcessor


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


def test_efficient_ad_trains_offline_and_its_checkpoint_loads(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    save_file(SmallPatchDescriptionNetwork(384).state_dict(), teacher)
    photographs = write_images(tmp_path / "photographs", 3)
    write_images(tmp_path / "data" / "part" / "train" / "good", 5)
    write_images(tmp_path / "data" / "part" / "test" / "good", 1)
    model = EfficientAd(post_processor=DeCoDiffPostProcessor(), visualizer=False)
    assert equip_efficient_ad(model, photographs, teacher, tmp_path / "equipment") == "given"
    data = MultiCategory(root=tmp_path / "data", train_batch_size=1, num_workers=0, val_split_ratio=0.3)
    engine = Engine(max_steps=2, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    engine.fit(model, datamodule=data)
    torch.testing.assert_close(model.model.teacher.state_dict(), load_file(teacher), check_stride=False)
    assert model.model.mean_std["std"].min() > 0

    loaded = EfficientAd.load_from_checkpoint(
        engine.best_model_path, weights_only=True, post_processor=DeCoDiffPostProcessor()
    ).eval()
    image = torch.rand(1, 3, 256, 256)
    torch.testing.assert_close(loaded.model(image).anomaly_map, model.eval().model(image).anomaly_map)
