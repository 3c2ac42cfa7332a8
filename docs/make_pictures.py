"""Make the pictures of README.md and docs/lab.md from the results of the demo.

    python train.py --demo
    python evaluate.py --demo
    python docs/make_pictures.py [--runs FOLDER] [--docs FOLDER]

For each category NAME in runs/ it writes NAME.png, the overview. Of all together it writes
nearest.png, defects.png, kinds.png (the three kinds of artificial defects), training.png (loss and
missing share over the steps), border.png (the average over neighbours) and histogram.png.
"""
import argparse
import csv
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
from evaluate import CELL, GAP, LINE  # noqa: E402
from patchae import PatchAE  # noqa: E402

BLUE, RED, GREY = (40, 100, 180), (190, 40, 40), (120, 120, 120)  # good or loss; bad or missing
BIG = 192                  # pixels of a picture in defects.png and kinds.png
SHOWN = 3                  # rows of each category in defects.png
ROWS = (0, 3)              # rows of nearest.png that the README shows: two types of defect
BARS = 30                  # bars of a histogram
WIDTH, HEIGHT = 640, 300   # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 40, 50  # its margins


# ---- sheets of pictures -------------------------------------------------------------------------
def text(draw, place, words, fill="black", anchor=None, size=15):
    """One line of text."""
    draw.text(place, words, fill=fill, font_size=size, anchor=anchor)


def stack(pictures):
    """One picture of several, one below the other, on white."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)),
                      "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def to_picture(pixels, size=BIG):
    """(3, H, W) or (1, H, W) in [0, 1] as a picture of size × size."""
    pixels = (255 * pixels.expand(3, -1, -1)).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def table(rows, titles):
    """Pictures in rows and columns with a title above each column."""
    size = (len(titles) * (BIG + GAP) - GAP, LINE + len(rows) * (BIG + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        text(draw, (x * (BIG + GAP) + BIG / 2, GAP), title, anchor="ma")
        for y, row in enumerate(rows):
            sheet.paste(row[x], (x * (BIG + GAP), LINE + y * (BIG + GAP)))
    return sheet


def defects_sheet(folders):
    """Normal, with artificial defects, their mask, rebuilt: other rows of each defects.png."""
    rows = []
    for number, folder in enumerate(folders):
        picture = Image.open(folder / "defects.png")
        columns = 4
        cell = (picture.width - 2) // columns                             # torchvision's grid: 2 px
        for row in range(number * SHOWN, (number + 1) * SHOWN):
            boxes = [(x * cell + 2, row * cell + 2, (x + 1) * cell, (row + 1) * cell)
                     for x in range(columns)]
            rows.append([picture.crop(box).resize((BIG, BIG), Image.Resampling.BICUBIC)
                         for box in boxes])
    return table(rows, ["normal image", "with artificial defects", "mask", "rebuilt from R"])


def kinds_sheet(image, other):
    """⊗ on one slide: for each kind of artificial defect its paint, its opacity α, the result."""
    rows = []
    side = image.shape[1]
    for draw in (patchae.altered_paste, patchae.scratch, patchae.stain):
        h = w = side // 3
        paint, alpha = draw(other, h, w)
        top = left = side // 3
        box = (slice(None), slice(top, top + h), slice(left, left + w))
        whole_paint, whole_alpha = torch.full_like(image, 1), torch.zeros_like(image[:1])
        whole_paint[box] = paint.expand(3, h, w)
        whole_alpha[box] = alpha
        result = (1 - whole_alpha) * image + whole_alpha * whole_paint
        rows.append([to_picture(one) for one in (image, whole_paint, whole_alpha, result)])
    return table(rows, ["I", "paint, in a box", "opacity alpha", "(1 - alpha) I + alpha paint"])


def nearest_rows(folders):
    """Of each category two rows of nearest.png."""
    height = 2 * LINE + CELL + GAP
    pictures = []
    for folder in folders:
        picture = Image.open(folder / "trained" / "nearest.png")
        pictures += [picture.crop((0, row * height, picture.width, (row + 1) * height))
                     for row in ROWS]
    return stack(pictures)


# ---- charts -------------------------------------------------------------------------------------
def chart(title, x_range, y_range, x_name, y_name, legend):
    """An empty chart with axes, five numbers on each, and a legend; a function to its pixels."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)

    def place(x, y):
        """The pixel of a point."""
        return (LEFT + (WIDTH - LEFT - RIGHT) * (x - x_range[0]) / (x_range[1] - x_range[0]),
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_range[0])
                / (y_range[1] - y_range[0]))

    draw.line([place(x_range[0], y_range[1]), place(x_range[0], y_range[0]),
               place(x_range[1], y_range[0])], fill="black")
    for part in np.linspace(0, 1, 5):
        x = x_range[0] + part * (x_range[1] - x_range[0])
        y = y_range[0] + part * (y_range[1] - y_range[0])
        text(draw, np.add(place(x, y_range[0]), (0, 5)).tolist(), f"{x:.4g}", anchor="ma")
        text(draw, np.add(place(x_range[0], y), (-6, 0)).tolist(), f"{y:.3g}", anchor="rm")
    text(draw, (LEFT, 8), title, size=17)
    text(draw, (WIDTH / 2, HEIGHT - 22), x_name, anchor="ma")
    text(draw, (8, TOP - 20), y_name)
    left = WIDTH - RIGHT
    for words, colour in reversed(legend):
        text(draw, (left, 10), words, fill=colour, anchor="ra")
        left -= draw.textlength(words, font_size=15) + 15
    return picture, draw, place


def read_rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def histogram(folder):
    """How many good and defective images have which score, and the threshold."""
    result, = read_rows(folder / "result.csv")
    threshold = float(result["threshold"])
    scores = read_rows(folder / "scores.csv")
    end = 1.05 * max([threshold, *(float(row["score"]) for row in scores)])
    counts = [np.histogram([float(row["score"]) for row in scores
                            if (row["folder"] == "good") == good], BARS, (0, end))[0]
              for good in (True, False)]
    picture, draw, place = chart(
        f"{result['category']}, {result['test_set']}", (0, end), (0, int(sum(counts).max())),
        "image score", "images",
        [("good", BLUE), ("defective", RED), (f"threshold {threshold:.2f}", "black")])
    below = np.zeros(BARS)
    for count, colour in zip(counts, (BLUE, RED)):
        for bar, (low, number) in enumerate(zip(below, count)):
            if number:
                draw.rectangle([*place(bar * end / BARS, low + number),
                                *place((bar + 1) * end / BARS, low)], fill=colour)
        below = below + count
    draw.line([place(threshold, 0), place(threshold, sum(counts).max())], fill="black", width=2)
    return picture


def training_curve(folder):
    """Loss, relative to its first value in train.csv, and missing share over the steps."""
    rows = read_rows(folder / "train.csv")
    steps = [float(row["step"]) for row in rows]
    losses = [float(row["loss"]) for row in rows]
    missing = [float(row["missing_share"]) for row in rows]
    top = max(1, *missing)
    picture, draw, place = chart(
        folder.name, (0, steps[-1]), (0, top), "training step", "",
        [("missing share", RED), (f"loss / {losses[0]:.3g}", BLUE)])
    for values, colour in ((missing, RED), ([loss / losses[0] for loss in losses], BLUE)):
        points = [place(*point) for point in zip(steps, values)]
        draw.line(points, fill=colour, width=3)
    return picture


def mean_maps(folder):
    """The mean anomaly map of the normal images with a plain mean and with k √n, side by side."""
    model = PatchAE.load(folder / "checkpoint.pt")
    model.config.neighbourhood = 5                                        # wide, to be seen
    divide_by_root, pictures = patchae.average_neighbours, []
    for average in (plain_mean, divide_by_root):
        patchae.average_neighbours = average
        model.build_memory("raw")
        maps = []
        for i, image in enumerate(model.images):
            r, = (model.vectors(batch, "raw") for batch in model.batches(image[None]))
            others = model.memory[:i] + model.memory[i + 1:]
            maps.append(patchae.nearest_distance(r.detach(), others))
        mean = torch.cat(maps).mean(dim=0, keepdim=True)                  # (1, H', W')
        pictures.append(mean / mean.mean())
    patchae.average_neighbours = divide_by_root
    low, high = (float(function(torch.stack(pictures))) for function in (torch.min, torch.max))
    return table([[to_picture((one - low) / (high - low)) for one in pictures]],
                 ["plain mean", "sum / (k root n)"])


def plain_mean(features, neighbourhood):
    """The mean over the neighbours that exist: what average_neighbours does not do."""
    return torch.nn.functional.avg_pool2d(features, neighbourhood, stride=1,
                                          padding=neighbourhood // 2, count_include_pad=False)


def main():
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    folders = sorted(path.parent.parent for path in args.runs.glob("*/trained/result.csv"))
    for folder in folders:
        shutil.copy(folder / "trained" / "overview.png", args.docs / f"{folder.name}.png")
    nearest_rows(folders).save(args.docs / "nearest.png")
    defects_sheet(folders).save(args.docs / "defects.png")
    model = PatchAE.load(folders[0] / "checkpoint.pt")
    random.seed(1)
    torch.manual_seed(1)
    kinds_sheet(model.images[0] / 255, model.images[1] / 255).save(args.docs / "kinds.png")
    stack([training_curve(folder) for folder in folders]).save(args.docs / "training.png")
    mean_maps(folders[0]).save(args.docs / "border.png")
    stack([histogram(folder / name) for folder in folders
           for name in ("trained", "trained-test_faint")]).save(args.docs / "histogram.png")


if __name__ == "__main__":
    main()
