"""``decodiff report``: the page of a run, made again from what the run left behind."""

import sys
from pathlib import Path

from decodiff_anomalib.report.records import ReportFolder
from decodiff_anomalib.report.writer import require_report


def report(run: Path) -> None:
    """Make the report of a test or prediction again, or that of an interrupted one.

    Args:
        run: Folder of a run with ``--model.report true``; ``report.html`` is written to it.

    Raises:
        SystemExit: With status 2, if there are no data of a report, they are damaged, or the page cannot be written.
    """
    try:
        require_report()
        from decodiff_anomalib.report.page import write_page

        print(write_page(ReportFolder(run)))
    except (ImportError, OSError, ValueError) as error:
        print(f"decodiff report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
