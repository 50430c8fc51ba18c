"""Categories: their order, and inferring them from images."""

from types import SimpleNamespace

import pytest
import torch

from decodiff_anomalib.conditioning import CategoryRouter, category_indices, category_names, vocabulary
from decodiff_anomalib.paper import CATEGORY_ORDER


def test_names_come_from_any_datamodule() -> None:
    assert category_names(SimpleNamespace(categories=["pcb", "tile"], category="x", name="y")) == ("pcb", "tile")
    assert category_names(SimpleNamespace(category="pcb", name="mvtec")) == ("pcb",)
    assert category_names(SimpleNamespace(name="parts")) == ("parts",)
    assert category_names(None) == ("product",)


@pytest.mark.parametrize("name", ["unknown", "inferred", "given"])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"A category cannot be called '{name}'"):
        category_names(SimpleNamespace(categories=["pcb", name]))


def test_published_categories_keep_the_authors_order() -> None:
    assert vocabulary(("wood", "bottle", "capsule")) == ("capsule", "bottle", "wood")
    assert vocabulary(("bottle",), published_table=True) == CATEGORY_ORDER["mvtec"]
    assert vocabulary(("pcb1", "candle"), published_table=True) == CATEGORY_ORDER["visa"]
    assert vocabulary(("wood", "candle")) == ("wood", "candle")  # of two data sets
    assert vocabulary(("b", "a"), published_table=True) == ("b", "a")


def test_unknown_names_have_the_index_after_the_last() -> None:
    assert category_indices(["b", "c", "a"], ("a", "b")).tolist() == [1, 2, 0]


CHANNELS = 6


def features_of(category: int, count: int, generator: torch.Generator, spread: float = 0.3) -> torch.Tensor:
    """Feature maps of a category that has its own mean; images differ, and so do the places of one."""
    mean = torch.eye(CHANNELS)[category] * 3
    images = spread * torch.randn(count, CHANNELS, generator=generator) + mean
    return images[..., None, None] + torch.randn(count, CHANNELS, 16, 16, generator=generator)


@pytest.fixture(scope="module")
def router() -> CategoryRouter:
    router = CategoryRouter(num_categories=4, channels=CHANNELS)  # the last is never trained on
    category = torch.arange(3).repeat_interleave(40)
    for learn, seed in ((router.fit, 0), (router.calibrate, 1)):
        generator = torch.Generator().manual_seed(seed)
        learn(router.pool(torch.cat([features_of(index, 40, generator) for index in range(3)])), category)
    return router


def test_images_are_routed_to_their_category(router: CategoryRouter) -> None:
    generator = torch.Generator().manual_seed(2)
    for index in range(3):
        category, ood_score = router(features_of(index, 200, generator))
        assert (category == index).float().mean() >= 0.99
        assert (ood_score > 1).float().mean() <= 0.01


def test_a_defect_on_a_quarter_of_the_image_does_not_change_its_category(router: CategoryRouter) -> None:
    features = features_of(1, 50, torch.Generator().manual_seed(3))
    features[:, :, :8, :8] = 20.0
    assert (router(features)[0] == 1).all()


def test_images_of_no_category_are_unknown(router: CategoryRouter) -> None:
    category, ood_score = router(features_of(4, 100, torch.Generator().manual_seed(4)))
    assert (category == 4).all()
    assert (ood_score > 1).all()


def test_small_changes_are_not_unknown_where_all_images_are_alike(router: CategoryRouter) -> None:
    """The covariance includes the variation between the patches of one image."""
    generator = torch.Generator().manual_seed(5)
    alike = CategoryRouter(1, CHANNELS)
    zeros = torch.zeros(20, dtype=torch.long)
    alike.fit(alike.pool(features_of(0, 20, generator, spread=0)), zeros)
    alike.calibrate(alike.pool(features_of(0, 20, generator, spread=0)), zeros)
    shifted = features_of(0, 50, generator, spread=0) + 0.1
    assert (alike(shifted)[0] == 0).all()


def test_before_calibration_nothing_is_unknown() -> None:
    router = CategoryRouter(2, CHANNELS)
    generator = torch.Generator().manual_seed(0)
    cells = router.pool(torch.cat([features_of(index, 10, generator) for index in range(2)]))
    router.fit(cells, torch.arange(2).repeat_interleave(10))
    category, ood_score = router(features_of(4, 10, generator))
    assert set(category.tolist()) <= {0, 1}
    assert (ood_score == 0).all()
