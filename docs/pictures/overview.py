"""Joins two pictures of a run of ``configs/quickstart.yaml`` to ``overview.jpg`` beside this file.

``python docs/pictures/overview.py results/DeCoDiff/DemoTextures/gravel/latest/images``
"""

import sys
from pathlib import Path

from PIL import Image

PARTS = ("foreign/003", "wire/003")


def main(pictures: Path) -> None:
    """Read the pictures that ``anomalib train`` or ``anomalib test`` drew, and save them one above the other."""
    rows = [Image.open(pictures / f"{part}.png").convert("RGB") for part in PARTS]
    together = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        together.paste(row, (0, top))
        top += row.height
    together.save(Path(__file__).with_name("overview.jpg"), quality=88, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
