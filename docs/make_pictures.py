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
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import center_crop, to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
from evaluate import CELL, GAP, LINE, RANGE, heat  # noqa: E402

NAMES = ("felt", "flange")  # the categories of the demo
TESTS = {"trained": "clear", "trained-test_faint": "faint"}  # their folders: how their defects look
ROWS = (1, 2, 5, 7, 9)      # of sheet.png: one of each type; a felt's defect touches the border
SHOWN = 3                   # rows of each category in defects.png
PADDING = 2                 # pixels between the images of a run's defects.png
SEED = 87                   # of kinds.png: with it all three kinds are easy to see
WIDE = 5                    # neighbourhood of border.png: wide, so that the effect is large
BIG, MAP, SPACE = 256, 480, 8  # pixels of an image, of a map in border.png, between two of them
BARS = 5                    # bars below the threshold, so that none stands on both sides of it
PANEL = (600, 390)          # pixels of a panel of a chart, and its margins
LEFT, RIGHT, TOP, BOTTOM = 82, 82, 80, 70
LETTERS = 22                # pixels; large, because pages and projectors shrink the picture
COLOURS = ((40, 100, 180), (200, 60, 30))  # blue: good, or the loss; red: defective, or missing


# ---- sheets of images ---------------------------------------------------------------------------
def text(draw, place, words, anchor="la", fill="black"):
    """One line of text; Pillow explains the anchor."""
    draw.text(place, words, fill=fill, font_size=LETTERS, anchor=anchor)


def table(pictures, titles, size, below=0):
    """Pictures of size × size in rows, a title above each column, and so many free pixels below."""
    step = size + SPACE
    width, height = len(titles) * step - SPACE, len(pictures) // len(titles) * step - SPACE
    sheet = Image.new("RGB", (width, 2 * LETTERS + height + below), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        text(draw, (column * step + size / 2, LETTERS), title, "mm")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(titles))
        sheet.paste(picture.resize((size, size)), (column * step, 2 * LETTERS + row * step))
    return sheet, draw


def cut_sheet(folder):
    """Of sheet.png the line with the titles, one row of each type, and the scale of the colours."""
    pixels = np.asarray(Image.open(folder / "trained" / "sheet.png"))
    height = LINE + CELL + 2 * GAP
    rows = [pixels[LINE + row * height:LINE + (row + 1) * height] for row in ROWS]
    return Image.fromarray(np.concatenate([pixels[:LINE], *rows, pixels[-LINE:]]))


def draw_defects(folders):
    """Rows of the defects.png of each category. They are other rows, with other defects."""
    titles = ("normal", "artificial defects", "their mask", "rebuilt from R")
    pictures = []
    for number, folder in enumerate(folders):
        preview = Image.open(folder / "defects.png")
        step = (preview.width - PADDING) // len(titles)
        for row in range(number * SHOWN, (number + 1) * SHOWN):
            pictures += [preview.crop((column * step + PADDING, row * step + PADDING,
                                       (column + 1) * step, (row + 1) * step))
                         for column in range(len(titles))]
    return table(pictures, titles, BIG)[0]


def draw_kinds(image, other):
    """⊗ step by step, in the largest box that add_defects draws, in the middle of (3, H, W)."""
    middle = center_crop(image, [image.shape[1] // 2])                    # (3, H/2, W/2)
    side = int(image.shape[1] * patchae.BOX_SIDE[1])
    edge = [(middle.shape[1] - side) // 2] * 4
    pictures, kinds = [], (patchae.altered_paste, patchae.scratch, patchae.stain)
    for draw_kind in kinds:
        paint, alpha = draw_kind(other, side, side)
        paint = F.pad(paint.expand(3, side, side), edge, value=1)         # (3, H/2, W/2)
        alpha = F.pad(alpha, edge).expand(3, -1, -1)                      # (3, H/2, W/2)
        result = (1 - alpha) * middle + alpha * paint                     # (3, H/2, W/2)
        pictures += [to_pil_image(one) for one in (middle, paint, alpha, result)]
    titles = ("I", "paint, in a box", "opacity alpha", "(1 - alpha) I + alpha paint")
    sheet, draw = table(pictures, titles, BIG)
    for row, draw_kind in enumerate(kinds):
        text(draw, (SPACE, 2 * LETTERS + row * (BIG + SPACE) + SPACE),
             draw_kind.__name__.replace("_", " "), fill="white")
    return sheet


# ---- charts -------------------------------------------------------------------------------------
def ticks(highest):
    """Round numbers from 0 to highest or a little more, at most six."""
    power = 10.0 ** np.floor(np.log10(highest))
    step = next(part * power for part in (0.2, 0.5, 1, 2) if highest <= 5 * part * power)
    return np.arange(np.ceil(highest / step) + 1) * step


def panel(sheet, number, title, x_name, y_name, x_ticks, y_ticks):
    """An empty chart, axes from 0. Returns what draws on it, and the function to its pixels."""
    draw, (row, column) = ImageDraw.Draw(sheet), divmod(number, 2)
    left, right = column * PANEL[0] + LEFT, (column + 1) * PANEL[0] - RIGHT
    top, bottom = row * PANEL[1] + TOP, (row + 1) * PANEL[1] - BOTTOM

    def place(x, y):
        return (left + (right - left) * x / x_ticks[-1], bottom - (bottom - top) * y / y_ticks[-1])

    for y in y_ticks:
        draw.line([place(0, y), (right, place(0, y)[1])], fill="lightgrey", width=1)
        text(draw, (left - 8, place(0, y)[1]), f"{y:.4g}", "rm")
    for x in x_ticks:
        text(draw, (place(x, 0)[0], bottom + 8), f"{x:.4g}", "ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black", width=2)
    text(draw, ((left + right) / 2, bottom + BOTTOM - 8), x_name, "md")
    text(draw, (left - LEFT + 8, top - 12), y_name, "ld")
    text(draw, ((left + right) / 2, top - TOP + 8), title, "ma")
    return draw, place


def read_rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_histograms(runs):
    """How many good and defective images have which score, on both sides of the threshold."""
    thresholds = {row["category"]: float(row["threshold"])  # the same for both test sets
                  for row in read_rows(runs / "results.csv") if row["method"] == "trained"}
    charts, sheet = [], Image.new("RGB", (2 * PANEL[0], 2 * PANEL[1]), "white")
    for name in NAMES:
        tests = [read_rows(runs / name / folder / "scores.csv") for folder in TESTS]
        end = max(float(row["score"]) for rows in tests for row in rows)
        edges = np.arange(0, end + thresholds[name] / BARS, thresholds[name] / BARS)
        for rows, looks in zip(tests, TESTS.values()):
            scores = [[float(row["score"]) for row in rows if (row["type"] == "good") == good]
                      for good in (True, False)]
            counts = [np.histogram(some, edges)[0] for some in scores]
            charts.append((f"{name}, {looks} defects", thresholds[name], counts, ticks(end)))
    y_ticks = ticks(max(np.max(counts) for *_, counts, _ in charts))
    for number, (title, threshold, counts, x_ticks) in enumerate(charts):
        draw, place = panel(sheet, number, title, "image score", "images", x_ticks, y_ticks)
        x, top = place(threshold, y_ticks[-1])
        draw.line([(x, top), place(threshold, 0)], fill="black", width=3)
        text(draw, (x + 8, top), f"threshold {threshold:.2f}")
        for count, kind, colour, begin in zip(counts, ("good", "defective"), COLOURS, (0.1, 0.5)):
            for bar in np.flatnonzero(count):
                ends = (bar + np.array([begin, begin + 0.4])) * threshold / BARS
                draw.rectangle([place(ends[0], count[bar]), place(ends[1], 0)], fill=colour)
            text(draw, (place(x_ticks[-1], 0)[0], top + (2 + 3 * begin) * LETTERS),
                 f"{count.sum()} {kind}", "ra", colour)
    return sheet


def draw_training(folders):
    """Loss and missing share over the steps, with their last values."""
    sheet = Image.new("RGB", (2 * PANEL[0], 2 * PANEL[1]), "white")
    for row, folder in enumerate(folders):
        rows = read_rows(folder / "train.csv")
        for column, (key, colour) in enumerate(zip(("loss", "missing_share"), COLOURS)):
            steps, values = ([float(one[name]) for one in rows] for name in ("step", key))
            draw, place = panel(sheet, 2 * row + column, folder.name, "training step",
                                key.replace("_", " "), ticks(steps[-1]), ticks(max(values)))
            points = [place(*point) for point in zip(steps, values)]
            draw.line(points, fill=colour, width=4, joint="curve")
            for x, y in points:
                draw.circle((x, y), 6, fill=colour)
            text(draw, (x + 10, y), f"{values[-1]:.2g}", "lm", colour)
    return sheet


# ---- the border ---------------------------------------------------------------------------------
def plain_mean(stage_map, k):
    """The mean over the neighbours that exist: what average_neighbours does not do."""
    return F.avg_pool2d(stage_map, k, stride=1, padding=k // 2, count_include_pad=False)


def mean_map(config, images, average):
    """The mean anomaly map (H', W') of normal images, each against all others, before training."""
    with mock.patch.object(patchae, "average_neighbours", average):
        model = patchae.build_model(replace(config, neighbourhood=WIDE))
        model.images = images
        model.build_memory()
    shape, memory = (1, -1, model.grid, model.grid), model.memory         # (1, C₃, H', W')
    maps = [patchae.nearest_distance(vectors.mT.reshape(shape), memory[:i] + memory[i + 1:])
            for i, vectors in enumerate(memory)]
    return torch.cat(maps).mean(dim=0).numpy()                            # (H', W')


def draw_border(model):
    """The mean maps with a plain mean and with k √n, in the colours of evaluate.heat."""
    maps = [mean_map(model.config, model.images, average)
            for average in (plain_mean, patchae.average_neighbours)]
    ends = np.min(maps), np.max(maps)
    ramp = np.linspace(*ends, MAP)[None].repeat(LETTERS, axis=0)
    *maps, ramp = [Image.fromarray(heat(np.interp(one, ends, RANGE))[0].astype(np.uint8))
                   for one in (*maps, ramp)]
    sheet, draw = table(maps, ("plain mean", "sum / (k root n)"), MAP, below=4 * LETTERS)
    left, top = MAP - 2 * LETTERS, sheet.height - 3 * LETTERS
    sheet.paste(ramp, (left, top))
    text(draw, (left - LETTERS, top), "mean distance to nearest vector", "ra")
    for x, distance in zip(np.linspace(0, MAP, 5), np.linspace(*ends, 5)):
        text(draw, (left + x, top + 1.5 * LETTERS), f"{distance:.2f}", "ma")
    return sheet


def main():
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="results (default: runs)")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent, help="pictures go here")
    args = parser.parse_args()
    folders = [args.runs / name for name in NAMES]
    felt = patchae.PatchAE.load(folders[0] / "checkpoint.pt")
    pictures = {folder.name: cut_sheet(folder) for folder in folders}
    pictures |= {"defects": draw_defects(folders), "training": draw_training(folders),
                 "histogram": draw_histograms(args.runs), "border": draw_border(felt)}
    with patchae.seeded(SEED):
        pictures["kinds"] = draw_kinds(felt.images[0] / 255, felt.images[1] / 255)
    for name, picture in pictures.items():
        picture.save(args.docs / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
