"""Broken files are named, and 16-bit files are read at full depth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image

from decodiff_anomalib.data.images import inspect_images, restore_depth


def save(path: Path, array: np.ndarray) -> str:
    Image.fromarray(array).save(path)
    return str(path)


def test_broken_files_are_all_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", np.zeros((32, 32, 3), np.uint8))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(Path(save(tmp_path / "whole.png", noise)).read_bytes()[:3000])
    text = tmp_path / "text.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(ValueError, match="3 of 4 image files cannot be read") as caught:
        inspect_images([good, truncated, text, empty])
    assert all(str(path) in str(caught.value) for path in (truncated, text, empty))
    assert str(good) not in str(caught.value)
    assert "Replace or remove them" in str(caught.value)


def test_sixteen_bit_images_keep_their_depth(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    twelve = (ramp // 16).astype(np.uint16)
    colour = save(tmp_path / "colour.png", np.zeros((32, 32, 3), np.uint8))
    wide, camera = save(tmp_path / "wide.png", ramp), save(tmp_path / "camera.png", twelve)
    found = inspect_images([colour, wide, camera])
    assert found == {wide, camera}
    batch = ImageBatch(image=torch.ones(3, 3, 32, 32), image_path=[colour, wide, camera])
    restore_depth(batch, found)
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535).expand(3, -1, -1)
    assert (batch.image[0] == 1).all()
    torch.testing.assert_close(batch.image[1], expected)
    torch.testing.assert_close(batch.image[2], expected, atol=5e-4, rtol=0)
