"""The two plots of a report. The page's script fills them with the figures of a category, by the names given here."""

from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, HoverTool, Span
from bokeh.plotting import figure
from bokeh.resources import Resources

COLOURS = {"normal": "#3D8BD4", "defective": "#E2711D", "unlabelled": "#8A8F98"}
"""Of images by label, in plots and badges; told apart in every kind of colour vision, on light and dark ground."""
PATTERNS = {"normal": "blank", "defective": "right_diagonal_line", "unlabelled": "blank"}
HEIGHT = 280  # pixels


def library() -> str:
    """The plotting library as script elements, which need no network."""
    return Resources(mode="inline", components=["bokeh"], log_level="error").render_js()


def _frame(x_label: str, y_label: str, **options: Any) -> Any:
    """An empty plot that fills its column; the page's script gives it the colours of the text around it."""
    frame = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        x_axis_label=x_label,
        y_axis_label=y_label,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    frame.xgrid.visible = False
    frame.axis.minor_tick_line_color = None
    frame.axis.axis_label_text_font_style = "normal"
    frame.axis.major_label_text_font_size = "12px"
    return frame


def histogram(edges: np.ndarray) -> dict[str, Any]:
    """Scores by label; the source of each label and the line of the threshold are named.

    Args:
        edges: Of the bins, ascending.
    """
    frame = _frame("score", "images", x_range=(float(edges[0]), float(edges[-1])), name="histogram")
    frame.y_range.start = 0
    frame.yaxis.ticker.min_interval = 1
    for label, colour in COLOURS.items():
        bins = {"left": edges[:-1].tolist(), "right": edges[1:].tolist(), "images": [0] * (len(edges) - 1)}
        source = ColumnDataSource(bins, name=label)
        bars = frame.quad(
            left="left", right="right", bottom=0, top="images", source=source, name=f"{label} bars",
            fill_color=colour, fill_alpha=0.45, line_color=colour, hatch_pattern=PATTERNS[label], hatch_color=colour,
            hatch_alpha=0.9, hatch_scale=8, hatch_weight=1.2,
        )  # fmt: skip
        tips = [(label, "@images"), ("score", "@left{0.000} to @right{0.000}")]
        frame.add_tools(HoverTool(renderers=[bars], tooltips=tips))
    frame.add_layout(Span(location=0.5, dimension="height", line_width=2, line_dash="dashed", name="threshold"))
    return json_item(frame, "histogram")


def precision_recall() -> dict[str, Any]:
    """Precision over recall of the images, and the point of the threshold."""
    frame = _frame("recall", "precision", x_range=(-0.02, 1.02), y_range=(0, 1.04), name="precision-recall")
    curve = ColumnDataSource({"recall": [], "precision": []}, name="curve")
    line = frame.line("recall", "precision", source=curve, line_width=2.5, color=COLOURS["normal"])
    point = ColumnDataSource({"recall": [], "precision": []}, name="point")
    frame.scatter("recall", "precision", source=point, size=12, color=COLOURS["defective"], line_color=None)
    tips = [("recall", "@recall{0.000}"), ("precision", "@precision{0.000}")]
    frame.add_tools(HoverTool(renderers=[line], tooltips=tips, mode="vline"))
    return json_item(frame, "curve")
