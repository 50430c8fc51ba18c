"""Metrics of anomaly maps by the paper's and by Anomalib's protocol, and a report of each category after a test."""

from decodiff_anomalib.evaluation.category_metrics import BIN_COLUMNS, MAX_BINS, CategoryMetrics
from decodiff_anomalib.evaluation.metrics import COUNTS, METRICS, RATES
from decodiff_anomalib.evaluation.protocols import (
    anomalib_mask,
    anomalib_metrics,
    compare_protocols,
    paper_mask,
    paper_metrics,
)
from decodiff_anomalib.evaluation.report import HEADINGS, CategoryReport, category_table

__all__ = [
    "BIN_COLUMNS",
    "COUNTS",
    "HEADINGS",
    "MAX_BINS",
    "METRICS",
    "RATES",
    "CategoryMetrics",
    "CategoryReport",
    "anomalib_mask",
    "anomalib_metrics",
    "category_table",
    "compare_protocols",
    "paper_mask",
    "paper_metrics",
]
