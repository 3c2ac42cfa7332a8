"""Make the pictures of README.md and docs/lab.md from the demo's results.

    python docs/make_pictures.py [--runs FOLDER] [--docs FOLDER]

Needs `python train.py --demo` and `python evaluate.py --demo` before it. Of each category NAME in
runs/ it writes NAME.png (the overview); of all together defects.png, and histogram.png: the scores
of good images (blue) and defective ones (red), with the threshold (black).
"""
import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROWS, COLUMNS = 3, 4  # of each defects.png: enough to see every kind of defect; all
BARS = 40
BLUE, RED, WHITE = (70, 130, 180), (178, 34, 34), (255, 255, 255)
WIDTH, HEIGHT, TEXT = 640, 240, 20  # pixels of a histogram; of its line of text


def stack(pictures):
    """One picture of several, one above the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), WHITE)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def first_rows(picture):
    """The first rows of a grid of square cells."""
    return picture.crop((0, 0, picture.width, ROWS * (picture.width // COLUMNS)))


def rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def histogram(folder):
    """A histogram (HEIGHT, WIDTH) of the scores in a folder that evaluate.py wrote."""
    result, = rows(folder / "result.csv")
    threshold = float(result["threshold"])
    scores = rows(folder / "scores.csv")
    end = max([threshold, *(float(row["score"]) for row in scores)]) * (1 + 1 / BARS)
    good, bad = (np.histogram([float(row["score"]) for row in scores if (row["folder"] == "good") == kind],
                              BARS, (0, end))[0] for kind in (True, False))
    tallest = (good + bad).max()
    image_rows = np.arange(tallest)[::-1, None, None]                     # an image's height each
    bars = np.where(image_rows < good[:, None], BLUE, np.where(image_rows < (good + bad)[:, None], RED, WHITE))
    bars = Image.fromarray(bars.astype(np.uint8)).resize((WIDTH, HEIGHT - TEXT), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
    picture.paste(bars, (0, TEXT))
    draw = ImageDraw.Draw(picture)
    draw.line([WIDTH * threshold / end, TEXT, WIDTH * threshold / end, HEIGHT], fill="black", width=2)
    draw.text((0, 0), f"{result['category']}: image score, 0 to {end:.2f}; good (blue), defective (red), "
              "threshold (line)", fill="black")
    return picture


def main():
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    folders = sorted(path.parent for path in args.runs.glob("*/feature/result.csv"))
    for folder in folders:
        shutil.copy(folder / "overview.png", args.docs / f"{folder.parent.name}.png")
    defects = [first_rows(Image.open(folder.parent / "defects.png")) for folder in folders]
    stack(defects).save(args.docs / "defects.png")
    stack([histogram(folder) for folder in folders]).save(args.docs / "histogram.png")


if __name__ == "__main__":
    main()
