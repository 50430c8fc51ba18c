"""Exemplars where the truth is known: the image is a shifted exemplar with a defect."""

import pytest
import torch

from decodiff_anomalib.exemplars import REACH, STRIDE, Exemplars

SIZE = (96, 128)


@pytest.fixture
def scenes() -> torch.Tensor:
    """Six normal images of two categories, each of blocks of its own, as bytes are in [-1, 1]."""
    blocks = torch.rand(6, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    return (blocks * 100 + 50).round().repeat_interleave(4, -1).repeat_interleave(4, -2) / 127.5 - 1


@pytest.fixture
def exemplars(scenes: torch.Tensor) -> Exemplars:
    exemplars = Exemplars(3, SIZE, num_categories=2)
    for category in range(2):
        exemplars.fit(category, scenes[3 * category : 3 * category + 3, :, 32 : 32 + SIZE[0], 32 : 32 + SIZE[1]])
    return exemplars


def seen_from(scene: torch.Tensor, down: int, right: int) -> torch.Tensor:
    return scene[None, :, 32 + down : 32 + down + SIZE[0], 32 + right : 32 + right + SIZE[1]]


def on(*cells: tuple[slice, slice]) -> torch.Tensor:
    deviating = torch.zeros(1, 1, 12, 16)
    for rows, columns in cells:
        deviating[:, :, rows, columns] = 1
    return deviating


@pytest.mark.parametrize(("down", "right"), [(0, 0), (8, -12), (-32, 32), (STRIDE * REACH, 4)])
@pytest.mark.parametrize("index", [1, 5])
def test_a_defect_is_replaced_by_what_was_there(scenes, exemplars, down: int, right: int, index: int) -> None:
    """Within the cells all of it, brightness included; half a cell further it fades; elsewhere nothing changes."""
    truth = seen_from(scenes[index], down, right) + 0.15
    defective = truth.clone()
    defective[..., 42:54, 58:86] = 0.9
    found = exemplars(defective, on((slice(5, 7), slice(7, 11))), torch.tensor([index // 3]))
    torch.testing.assert_close(found[..., 44:52, 60:84], truth[..., 44:52, 60:84], atol=2e-3, rtol=0)
    assert (found - truth)[..., 42:54, 58:86].abs().mean() < 0.1 * (defective - truth)[..., 42:54, 58:86].abs().mean()
    untouched = torch.ones(SIZE, dtype=torch.bool)
    untouched[36:60, 52:92] = False
    assert torch.equal(found[..., untouched], truth[..., untouched])


def test_several_defects_and_images_at_once(scenes, exemplars) -> None:
    truths = torch.cat([seen_from(scenes[index], 4 * index, -4 * index) for index in (0, 2, 4)])
    deviating = torch.cat([on((slice(5, 7), slice(7, 9)), (slice(8, 9), slice(2, 5))), on(), on((slice(4, 8),) * 2)])
    hidden = torch.nn.functional.interpolate(deviating, size=SIZE)
    found = exemplars(truths * (1 - hidden), deviating, torch.tensor([0, 0, 1]))
    inside = torch.nn.functional.avg_pool2d(hidden, 9, stride=1, padding=4) > 0.99  # from half a cell inwards
    assert inside.any()
    assert ((found - truths) * inside).abs().max() < 2e-3
    assert torch.equal(found[1], truths[1])  # in which nothing deviates


def test_the_replacement_stays_in_the_range_of_images(exemplars) -> None:
    """However unlike the exemplars an image is, nothing is brighter than white."""
    white = torch.ones(1, 3, *SIZE)
    assert exemplars(white, on((slice(5, 7), slice(7, 11))), torch.tensor([0])).max() == 1


def test_other_categories_are_not_searched(scenes, exemplars) -> None:
    truth = seen_from(scenes[0], 0, 0)
    found = exemplars(truth, on((slice(5, 7), slice(7, 11))), torch.tensor([1]))
    assert (found - truth)[..., 44:52, 60:84].abs().mean() > 0.1


def test_nothing_is_taken_from_beyond_an_exemplar(scenes, exemplars) -> None:
    """What fits best does not reach as far as the image's edge, where the defect is."""
    truth = seen_from(scenes[0], 16, 0)
    found = exemplars(truth, on((slice(10, 12), slice(7, 11))), torch.tensor([0]))
    rows = found[..., 84:96, 60:84]
    assert (rows[..., 1:, :] - rows[..., :-1, :]).abs().amax((1, 2, 3)).min() > 0.05  # not the last row again and again


def test_few_images_serve_twice_and_are_kept_in_checkpoints(scenes) -> None:
    one, other = (Exemplars(3, SIZE, num_categories=1) for _ in range(2))
    one.fit(0, scenes[:2, :, : SIZE[0], : SIZE[1]])
    assert torch.equal(one.images[0, 0], one.images[0, 1])
    other.load_state_dict(one.state_dict())
    truth = scenes[1:2, :, : SIZE[0], : SIZE[1]]
    deviating = on((slice(5, 7), slice(7, 11)))
    assert torch.equal(other(truth, deviating, torch.tensor([0])), one(truth, deviating, torch.tensor([0])))
    torch.testing.assert_close(other(truth, deviating, torch.tensor([0])), truth, atol=2e-3, rtol=0)
