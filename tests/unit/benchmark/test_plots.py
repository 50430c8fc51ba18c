"""Pictures of few or missing values; those of real runs are in the integration tests."""

from pathlib import Path

from decodiff_anomalib.benchmark.grid import make_grid
from decodiff_anomalib.benchmark.plots import accuracy_and_speed
from decodiff_anomalib.benchmark.report import collect, display_names, summarise

PADIM = {"class_path": "Padim", "init_args": {"pre_trained": False}}


def test_missing_metrics_leave_a_picture(layout, finish, tmp_path: Path) -> None:
    """Without masks there are no pixel metrics."""
    grid = make_grid(layout(PADIM))
    finish(grid[0], {"bolt": float("nan"), "felt": float("nan")}, seconds=1)
    table = summarise(*collect(grid, display_names(grid, tmp_path), tmp_path), ["Padim"], ["bolt", "felt"])
    (axes,) = accuracy_and_speed(table[table.error.isna()]).axes
    assert axes.get_ylim() == (0, 1)
    assert axes.get_xlim() == (0, 1.15)
