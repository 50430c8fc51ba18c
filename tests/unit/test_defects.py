"""Drawn defects: local, varied, repeatable, at any size."""

import pytest
import torch

from decodiff_anomalib import defects


def images(height: int = 128, width: int = 128) -> torch.Tensor:
    noise = torch.rand(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * 2 - 1) * 0.8


def test_defects_repeat_with_the_seed_and_stay_in_range() -> None:
    first, second = (defects.draw_defects(images(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, defects.draw_defects(images(), torch.Generator().manual_seed(4)))


def test_most_defects_are_local_and_none_leaves_the_whole_image() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([defects.draw_defects(images(), generator) - images() for _ in range(8)])
    touched = (drawn.abs().amax(1) > 0.05).float().mean((1, 2))
    assert (touched > 0).float().mean() > 0.9
    assert touched.median() < 0.2
    assert touched.max() < 0.95


@pytest.mark.parametrize("shape", [*set(defects.SHAPES), defects.region])
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_shapes_are_soft_masks(shape, size: tuple[int, int]) -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    masks = torch.stack([shape(draw, images(*size)[0]) for _ in range(10)])
    assert masks.shape == (10, 1, *size)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert (masks.amax((1, 2, 3)) > 0.5).float().mean() >= 0.7  # spots may lie across the border


@pytest.mark.parametrize("content", defects.CONTENTS)
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_contents_are_images(content, size: tuple[int, int]) -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    batch = images(*size)
    drawn = content(draw, batch[0], batch[1])
    assert torch.isfinite(drawn).all()
    assert drawn.expand(3, *size).shape == (3, *size)


def test_scratches_are_thin() -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    areas = torch.tensor([float((defects.scratch(draw, images(256, 256)[0]) > 0.5).float().mean()) for _ in range(20)])
    assert areas.median() < 0.05
