"""Make the pictures of README.md and docs/lab.md from the results of the demo.

    python train.py --demo
    python evaluate.py --demo
    python docs/make_pictures.py [--runs FOLDER] [--docs FOLDER]

It writes felt.png and flange.png (rows of sheet.png), defects.png (rebuilt images), kinds.png (the
three kinds of artificial defects), training.png (loss and missing share over the steps), border.png
(the average over neighbours) and histogram.png (the scores of good and defective images).
"""
import argparse
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.v2.functional import center_crop, to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
from evaluate import CELL, GAP, LINE, PER_TYPE, RANGE, heat  # noqa: E402
from patchae import PatchAE  # noqa: E402

NAMES = ("felt", "flange")  # the categories of the demo
TYPES = 5                   # good and four types of defect
ROW = 1                     # which of the PER_TYPE rows of each type is shown
SHOWN = 3                   # rows of each category in defects.png
PADDING = 2                 # pixels between the images of a run's defects.png
SEED = 1                    # of kinds.png: all three kinds show well
WIDE = 5                    # neighbourhood of border.png: wide, so that the effect is large
BIG = 256                   # pixels of an image in defects.png and kinds.png
MAP = 480                   # pixels of a map in border.png
BARS = 30                   # bars of a histogram for good images, and as many for defective ones
PANEL = (600, 390)          # pixels of a panel of a chart
LEFT, RIGHT, TOP, BOTTOM = 90, 80, 80, 70  # its margins
LETTERS = 22                # pixels; large, because pages and projectors shrink the picture
BLUE, RED = (40, 100, 180), (200, 60, 30)  # good, defective
THIN, THICK = 1, 3          # pixels of a line


# ---- sheets of images ---------------------------------------------------------------------------
def text(draw, place, words, anchor="la", fill="black", **options):
    """One line of text."""
    draw.text(place, words, fill=fill, font_size=LETTERS, anchor=anchor, **options)


def grid(pictures, columns, top=0, gap=0):
    """Pictures of one size in rows, on white, with room for a line above; and what draws on it."""
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, top + rows * (height + gap) - gap),
                      "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + gap), top + row * (height + gap)))
    return sheet, ImageDraw.Draw(sheet)


def table(pictures, titles, size):
    """Pictures, enlarged to size × size, with a title above each column."""
    pictures = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
    sheet, draw = grid(pictures, len(titles), top=2 * LETTERS, gap=2 * GAP)
    for column, title in enumerate(titles):
        text(draw, (column * (size + 2 * GAP) + size / 2, LETTERS), title, "mm")
    return sheet, draw


def cut_sheet(folder):
    """Of sheet.png: its first line, one row of each type, and the scale of the colours."""
    pixels = np.asarray(Image.open(folder / "trained" / "sheet.png"))
    height = LINE + CELL + 2 * GAP
    rows = [pixels[LINE + row * height:LINE + (row + 1) * height]
            for row in range(ROW, TYPES * PER_TYPE, PER_TYPE)]
    return Image.fromarray(np.concatenate([pixels[:LINE], *rows, pixels[-LINE:]]))


def draw_defects(folders):
    """Normal, with artificial defects, their mask, rebuilt: of each defects.png other rows."""
    titles = ("normal", "artificial defects", "their mask", "rebuilt from R")
    pictures = []
    for number, folder in enumerate(folders):
        preview = Image.open(folder / "defects.png")
        step = (preview.width - PADDING) // len(titles)
        for row in range(number * SHOWN, (number + 1) * SHOWN):
            pictures += [preview.crop((x * step + PADDING, row * step + PADDING,
                                       (x + 1) * step, (row + 1) * step))
                         for x in range(len(titles))]
    return table(pictures, titles, BIG)[0]


def draw_kinds(image, other):
    """⊗ step by step in the middle of an image (3, H, W): its paint, its opacity α, the result.

    The box has the largest side that add_defects draws.
    """
    middle = center_crop(image, [image.shape[1] // 2])                    # (3, H/2, W/2)
    side = int(image.shape[1] * patchae.BOX_SIDE[1])
    edge = (middle.shape[1] - side) // 2
    around = (edge, middle.shape[1] - side - edge) * 2
    kinds = {"pasted piece": patchae.altered_paste, "scratch": patchae.scratch,
             "stain": patchae.stain}
    pictures = []
    for draw_kind in kinds.values():
        paint, alpha = draw_kind(other, side, side)
        paint = F.pad(paint.expand(3, side, side), around, value=1)       # (3, H/2, W/2)
        alpha = F.pad(alpha, around)                                      # (1, H/2, W/2)
        result = (1 - alpha) * middle + alpha * paint                     # (3, H/2, W/2)
        pictures += [to_pil_image(one) for one in (middle, paint, alpha.expand(3, -1, -1), result)]
    sheet, draw = table(pictures, ("I", "paint, in a box", "opacity alpha",
                                   "(1 - alpha) I + alpha paint"), BIG)
    for row, name in enumerate(kinds):
        text(draw, (2 * GAP, 2 * LETTERS + row * (BIG + 2 * GAP) + 2 * GAP), name, fill="white",
             stroke_width=THICK, stroke_fill="black")
    return sheet


# ---- charts -------------------------------------------------------------------------------------
def ticks(highest):
    """Round numbers from 0 to highest or a little more, at most six."""
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(part * power for part in (0.2, 0.5, 1, 2) if highest <= 5 * part * power)
    return np.arange(math.ceil(highest / step) + 1) * step


def panel(title, x_name, y_name, x_highest, y_highest):
    """An empty chart whose axes begin at 0: the picture, what draws on it, a function to its pixels.
    """
    picture = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(picture)
    x_ticks, y_ticks = ticks(x_highest), ticks(y_highest)

    def place(x, y):
        """The pixel of a point."""
        return (LEFT + (PANEL[0] - LEFT - RIGHT) * x / x_ticks[-1],
                PANEL[1] - BOTTOM - (PANEL[1] - TOP - BOTTOM) * y / y_ticks[-1])

    for y in y_ticks:
        draw.line([place(0, y), place(x_ticks[-1], y)], fill="lightgrey", width=THIN)
        text(draw, np.subtract(place(0, y), (8, 0)).tolist(), f"{y:.4g}", "rm")
    for x in x_ticks:
        text(draw, np.add(place(x, 0), (0, 8)).tolist(), f"{x:.4g}", "ma")
    draw.line([place(0, y_ticks[-1]), place(0, 0), place(x_ticks[-1], 0)], fill="black", width=2)
    text(draw, ((LEFT + PANEL[0] - RIGHT) / 2, 8), title, "ma", stroke_width=0.5)
    text(draw, ((LEFT + PANEL[0] - RIGHT) / 2, PANEL[1] - 8), x_name, "md")
    text(draw, (8, TOP - 12), y_name, "ld")
    return picture, draw, place


def read_rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_histograms(runs):
    """How many good and defective images have which score: each part with clear and faint defects.
    """
    thresholds = {(row["category"], row["test_set"]): float(row["threshold"])
                  for row in read_rows(runs / "results.csv") if row["method"] == "trained"}
    charts, panels = [], []
    for name in NAMES:
        scores = [[[float(row["score"]) for row in read_rows(runs / name / folder / "scores.csv")
                    if (row["type"] == "good") == good] for good in (True, False)]
                  for folder in ("trained", "trained-test_faint")]
        end = ticks(max(score for both in scores for some in both for score in some))[-1]
        for both, test, title in zip(scores, ("test", "test_faint"), ("clear", "faint")):
            counts = [np.histogram(some, BARS, (0, end))[0] for some in both]
            charts.append((f"{name}, {title} defects", end, thresholds[name, test], counts))
    highest = max(count.max() for *_, counts in charts for count in counts)
    for title, end, threshold, counts in charts:
        picture, draw, place = panel(title, "image score", "images", end, highest)
        for side, (count, colour) in enumerate(zip(counts, (BLUE, RED))):
            for bar in np.flatnonzero(count):
                left, right = (bar + side / 2) * end / BARS, (bar + (side + 1) / 2) * end / BARS
                draw.rectangle([*place(left, count[bar]), *place(right, 0)], fill=colour)
        x, top = place(threshold, ticks(highest)[-1])
        draw.line([(x, top), place(threshold, 0)], fill="black", width=THICK)
        text(draw, (x + 8, top), f"threshold {threshold:.2f}")
        text(draw, (PANEL[0] - RIGHT, top + 2 * LETTERS), "good", "ra", BLUE)
        text(draw, (PANEL[0] - RIGHT, top + 4 * LETTERS), "defective", "ra", RED)
        panels.append(picture)
    return grid(panels, 2)[0]


def draw_training(folders):
    """Loss and missing share over the steps, with their last values."""
    tables = [read_rows(folder / "train.csv") for folder in folders]
    most_missing = max(float(row["missing_share"]) for rows in tables for row in rows)
    panels = []
    for folder, rows in zip(folders, tables):
        for column, colour in (("loss", BLUE), ("missing_share", RED)):
            steps, values = ([float(row[key]) for row in rows] for key in ("step", column))
            name = column.replace("_", " ")
            picture, draw, place = panel(f"{folder.name}: {name}", "training step", name, steps[-1],
                                         max(values) if column == "loss" else most_missing)
            points = [place(*point) for point in zip(steps, values)]
            draw.line(points, fill=colour, width=THICK, joint="curve")
            for point in points:
                draw.circle(point, 2 * THICK, fill=colour)
            text(draw, np.add(points[-1], (12, 0)).tolist(), f"{values[-1]:.2g}", "lm", colour)
            panels.append(picture)
    return grid(panels, 2)[0]


# ---- the border ---------------------------------------------------------------------------------
def plain_mean(stage_map, neighbourhood):
    """The mean over the neighbours that exist: what average_neighbours does not do."""
    return F.avg_pool2d(stage_map, neighbourhood, stride=1, padding=neighbourhood // 2,
                        count_include_pad=False)


def mean_map(config, images, average):
    """The mean anomaly map (H', W') of normal images, each against all others, before training."""
    with mock.patch.object(patchae, "average_neighbours", average):
        model = patchae.build_model(replace(config, neighbourhood=WIDE))
        model.images = images
        model.build_memory()
    maps = []
    for i, vectors in enumerate(model.memory):
        r = vectors.mT.reshape(1, -1, model.grid, model.grid)             # (1, C₃, H', W')
        maps.append(patchae.nearest_distance(r, model.memory[:i] + model.memory[i + 1:]))
    return torch.cat(maps).mean(dim=0).numpy()                            # (H', W')


def draw_border(model):
    """The mean maps with a plain mean and with k √n, in the colours of evaluate.heat."""
    maps = [mean_map(model.config, model.images, average)
            for average in (plain_mean, patchae.average_neighbours)]
    low, high = np.min(maps), np.max(maps)
    ramp = np.linspace(low, high, MAP)[None].repeat(LETTERS, axis=0)
    *maps, ramp = [Image.fromarray(heat(np.interp(one, (low, high), RANGE))[0].astype(np.uint8))
                   for one in (*maps, ramp)]
    sheet, _ = table(maps, ("plain mean", "sum / (k root n)"), MAP)
    sheet = ImageOps.expand(sheet, (0, 0, 0, 5 * LETTERS), "white")
    draw, left, top = ImageDraw.Draw(sheet), sheet.width - MAP - 2 * LETTERS, sheet.height - 4 * LETTERS
    sheet.paste(ramp, (left, top))
    text(draw, (left - LETTERS, top), "mean distance to the nearest vector", "ra")
    for part in np.linspace(0, 1, 5):
        text(draw, (left + part * MAP, top + 1.5 * LETTERS), f"{low + part * (high - low):.3f}", "ma")
    return sheet


def main():
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    folders = [args.runs / name for name in NAMES]
    model = PatchAE.load(folders[0] / "checkpoint.pt")
    pictures = {folder.name: cut_sheet(folder) for folder in folders}
    pictures["defects"] = draw_defects(folders)
    with patchae.seeded(SEED):
        pictures["kinds"] = draw_kinds(model.images[0] / 255, model.images[1] / 255)
    pictures["training"] = draw_training(folders)
    pictures["histogram"] = draw_histograms(args.runs)
    pictures["border"] = draw_border(model)
    for name, picture in pictures.items():
        picture.save(args.docs / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
