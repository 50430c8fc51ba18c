"""The ``decodiff`` command: verbs that Anomalib's command line cannot hold. Training stays ``anomalib train``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, auto_cli

from decodiff_anomalib import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

VERBS: dict[str, str] = {
    "benchmark": "decodiff_anomalib.benchmark.command:benchmark",
    "convert": "decodiff_anomalib.weights:convert",
    "demo": "decodiff_anomalib.demo:demo",
    "refine": "decodiff_anomalib.refine:refine",
    "report": "decodiff_anomalib.report:report",
    "threshold": "decodiff_anomalib.thresholds:threshold",
    "settings": "decodiff_anomalib.presets:show_settings",
    "reproduce": "decodiff_anomalib.benchmark.reproduce:reproduce",
}
"""Verb to ``module:function``. Only the chosen verb is imported; its signature defines its command line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb, or print the list of verbs.

    Args:
        arguments: Command line without the program's name. Defaults to that of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in VERBS:
        verb, *rest = arguments
        module, _, function = VERBS[verb].partition(":")
        try:
            auto_cli(getattr(import_module(module), function), args=rest, prog=f"decodiff {verb}")
        except UnicodeDecodeError as error:
            print(f"decodiff {verb}: a file that was given is no text in UTF-8: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return

    parser = ArgumentParser(
        prog="decodiff",
        description="Tools around the DeCoDiff model; `decodiff VERB --help` explains each verb.",
        version=__version__,
    )
    parser.add_argument("verb", nargs="?", choices=sorted(VERBS), metavar="VERB", help=", ".join(sorted(VERBS)))
    parser.parse_args(arguments)
    parser.print_help()


if __name__ == "__main__":
    main()
