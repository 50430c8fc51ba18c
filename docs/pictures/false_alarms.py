"""Draws how well false-alarm rates are kept: ``python docs/pictures/false_alarms.py docs/results/thresholds.csv``.

The columns of the table are those that ``tests/benchmarks/test_thresholds.py`` appends to ``DECODIFF_RESULTS``.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

COLUMNS = ["model", "category", "asked", "false_alarms_before", "detected_before", "false_alarms", "detected"]
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def draw(table: pd.DataFrame) -> Figure:
    """Realised over asked rates by category, before and after shifts were taken out: the mean and range over models."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, column, title in zip(
        panels, ("false_alarms_before", "false_alarms"), ("shifts left in", "shifts taken out"), strict=True
    ):
        for colour, (category, rows) in zip(COLOURS, table.groupby("category"), strict=False):
            rates = rows.groupby("asked")[column].agg(["mean", "min", "max"])
            axes.plot(rates.index, rates["mean"], "o-", color=colour, label=category)
            axes.fill_between(rates.index, rates["min"], rates["max"], color=colour, alpha=0.15, linewidth=0)
        asked = np.geomspace(0.005, 0.1)
        axes.plot(asked, asked, "k:", label="as asked")
        axes.set(title=title, xscale="log", xlabel="false-alarm rate asked for", ylim=(-0.02, 1))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks([0.005, 0.01, 0.05, 0.1], ["0.5 %", "1 %", "5 %", "10 %"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("normal test images above the threshold")
    panels[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    draw(pd.read_csv(sys.argv[1], names=COLUMNS, header=0)).savefig(Path(__file__).with_name("false-alarms.png"))
