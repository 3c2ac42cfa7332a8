"""Make the README's pictures from the demo's results.

    python docs/make_pictures.py [--runs FOLDER] [--docs FOLDER]

Needs `python train.py --demo` and `python evaluate.py --demo` before it. Writes flange.png, felt.png
(the overviews), defects.png and histogram.png (of both categories, one above the other).
"""
import argparse
import shutil
from pathlib import Path

from PIL import Image

NAMES = ("flange", "felt")
ROWS = 3  # of each defects.png: enough to see every kind of defect


def stack(pictures):
    """One picture of several, one above the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def first_rows(picture, rows, columns=4):
    """The first rows of a grid of square cells."""
    return picture.crop((0, 0, picture.width, rows * (picture.width // columns)))


def main():
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    for name in NAMES:
        shutil.copy(args.runs / name / "feature" / "overview.png", args.docs / f"{name}.png")
    defects = [first_rows(Image.open(args.runs / name / "defects.png"), ROWS) for name in NAMES]
    stack(defects).save(args.docs / "defects.png")
    histograms = [Image.open(args.runs / name / "feature" / "histogram.png") for name in NAMES]
    stack(histograms).save(args.docs / "histogram.png")


if __name__ == "__main__":
    main()
