"""The report of a test or a prediction: one HTML page that needs nothing else, and the data it is made from."""

from decodiff_anomalib.report.command import report
from decodiff_anomalib.report.writer import ReportWriter

__all__ = ["ReportWriter", "report"]
