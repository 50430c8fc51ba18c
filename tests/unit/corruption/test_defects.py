"""Drawn defects: local, varied, repeatable, at any size."""

import pytest
import torch

from decodiff_anomalib.corruption import defects


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


@pytest.mark.parametrize("shape", [defects.blobs, defects.scratch, defects.areas, defects.region])
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_shapes_have_an_inside_and_an_outside(shape, size: tuple[int, int]) -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    distances = torch.stack([shape(draw, images(*size)[0]) for _ in range(10)])
    assert distances.shape == (10, 1, *size)
    assert torch.isfinite(distances).all()
    inside = (distances > 0).float().mean((1, 2, 3))
    assert (inside > 0).float().mean() >= 0.7  # spots may lie across the border
    assert inside.max() < 0.7


def test_shapes_scale_with_the_image() -> None:
    """The same random numbers draw the same defect at every working size."""
    for shape in (defects.blobs, defects.areas, defects.region):
        shares = []
        for side in (64, 256):
            draw = defects.Draw(torch.Generator().manual_seed(1))
            inside = torch.stack([shape(draw, images(side, side)[0]) > 0 for _ in range(5)])
            shares.append(inside.float().mean().item())
        assert shares[0] == pytest.approx(shares[1], abs=0.02)


@pytest.mark.parametrize("content", sorted({c for k in defects.KINDS for c in k.contents}, key=lambda c: c.__name__))
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_contents_are_images(content, size: tuple[int, int]) -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    batch = images(*size)
    drawn = content(draw, batch[0], batch[1])
    assert torch.isfinite(drawn).all()
    assert drawn.expand(3, *size).shape == (3, *size)


def test_scratches_are_thin() -> None:
    draw = defects.Draw(torch.Generator().manual_seed(0))
    areas = torch.tensor([float((defects.scratch(draw, images(256, 256)[0]) > 0).float().mean()) for _ in range(20)])
    assert areas.median() < 0.05


def test_small_defects_are_several_and_small() -> None:
    kind = next(kind for kind in defects.KINDS if kind.number[1] > 1)
    assert kind.number == (2, 6)
    draw = defects.Draw(torch.Generator().manual_seed(0))
    for shape in set(kind.shapes):
        areas = torch.tensor([float((shape(draw, images(256, 256)[0]) > 0).float().mean()) for _ in range(40)])
        assert areas.max() < 0.01
        assert (areas > 0).float().mean() > 0.5
