"""Score images with a trained Patch AE: a labelled test set, or with --predict any images.

    python evaluate.py --demo
    python evaluate.py --data ROOT --category NAME [NAME ...]
    python evaluate.py --data ROOT --category NAME --predict IMAGE_OR_FOLDER

Reads OUT/NAME/checkpoint.pt, which holds the normal images too, and ROOT/NAME/test or the images
to predict. Writes tables and pictures to OUT/NAME/SCORE or to OUT/NAME/predictions, and a line to
OUT/results.csv.
"""
import csv
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from sklearn.metrics import roc_auc_score

import patchae
from data import make_toy
from data.images import (batches, choose_categories, list_images, list_test, progress, read_image,
                         read_images, read_mask)
from patchae import UserError

RESULTS = ["category", "score", "image_auroc", "pixel_auroc", "seconds_per_image", "seed",
           "backbone", "weights"]
# our choice: dark to glowing, evenly brighter, so that grey prints show the same
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])
SCALE = (0.5, 1.5)          # our choice: darkest and brightest, in thresholds
OPACITY_RISES = (0.9, 1.1)  # our choice: in thresholds
MOST_OPACITY = 0.6          # our choice: the image shines through
LARGEST_HEATMAP = 1024      # our choice: pixels of the longer side, so that photographs stay handy
PER_TYPE = 2                # our choice: columns of each type in overview.png
RANKED = 12                 # our choice: columns of the predictions' overview.png
NAME_END = 12               # our choice: letters of a file name that fit above a column
CELL, GAP, TITLE = 160, 4, 24  # pixels of overview.png
BARS = 40                   # our choice: bars of histogram.png
HISTOGRAM = (640, 240)      # pixels
MARGIN = 24                 # pixels


def parse(argv):
    """The command line."""
    parser = patchae.Parser(__doc__)
    add = parser.add_argument
    add("--predict", type=Path, metavar="PATH", help="score this image or folder; needs no labels")
    add("--score", choices=patchae.SCORES, default="feature",
        help="distance in R (default), in the raw backbone features, or reconstruction error")
    add("--quantile", type=float, default=0.99, metavar="Q",
        help="the threshold is this quantile of the normal images' scores, each against the\n"
             "memory without itself (default: 0.99; our choice: a false alarm in a hundred)")
    if parser.parse_args(argv).demo:
        parser.set_defaults(data=make_toy.ROOT, category=["all"])
    args = parser.parse_args(argv)
    if not 0 < args.quantile <= 1:
        raise UserError(f"--quantile {args.quantile}: must be above 0 and at most 1")
    return args


# ---- scores and metrics -------------------------------------------------------------------------
def prepare(name, args, device):
    """The model, the memory (None for reconstruction) and the threshold (NaN if there is none)."""
    model, images, normal_scores = patchae.load_checkpoint(args.out / name / "checkpoint.pt")
    model.to(device).eval()
    memory = None
    if args.score != "reconstruction":
        known = batches(images, model.config.batch_size, device, "memory")
        memory = patchae.build_memory(model, known, args.score)
    threshold = math.nan
    if args.score == "feature" and len(normal_scores):  # training stored those of no other score
        threshold = torch.quantile(normal_scores, args.quantile).item()
        print(f"{name}: threshold {threshold:.4f}, the {args.quantile:g} quantile of the scores of "
              f"{len(normal_scores)} normal images")
    return model, memory, threshold


def score_images(paths, model, memory, args):
    """The anomaly maps (N, H', W') of image files, on the CPU, and the seconds for each."""
    images = read_images(paths, model.config.image_size)
    device = next(model.parameters()).device
    at_once = 1 if device.type == "cpu" else model.config.batch_size  # so the cache holds it
    begin = time.monotonic()
    maps = [patchae.score_maps(model, image, memory, args.score).cpu()
            for image in batches(images, at_once, device, "scoring")]
    return torch.cat(maps), (time.monotonic() - begin) / len(paths)


def auroc(labels, scores):
    """Area under the ROC curve, exact; NaN where one of the two classes is empty."""
    labels = np.asarray(labels)
    return roc_auc_score(labels, scores) if labels.any() and not labels.all() else math.nan


def upsample(maps, size):
    """Maps (N, H', W') to (N, *size), bilinear (our choice: smooth)."""
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]      # (N, *size)


def pixel_auroc(samples, maps, size):
    """AUROC of all pixels at the network's size; a defective image without a mask is left out."""
    labels, scores = [], []
    absent = 0
    for (path, kind, mask), anomaly_map in zip(samples, maps):
        if kind != "good" and mask is None:
            absent += 1
            continue
        labels.append(read_mask(mask, path, size) if mask else torch.zeros(size, size, dtype=bool))
        scores.append(upsample(anomaly_map[None], (size, size))[0])
    if absent:
        print(f"pixel AUROC: {absent} defective images have no mask and are left out")
    if not any(label.any() for label in labels):
        print("pixel AUROC: undefined (no masks under ground_truth/)")
        return math.nan
    return auroc(torch.stack(labels).flatten(), torch.stack(scores).flatten())


# ---- pictures -----------------------------------------------------------------------------------
def heat(anomaly_map, size, scale):
    """Colours (H, W, 3) and opacity (H, W, 1) of a map; `scale` (the threshold) is half-way.

    Half the threshold and less is dark, 1.5 times and more is brightest: the same in every picture
    of a run. Opacity rises around the threshold, so that what is normal does not glow.
    """
    level = upsample(anomaly_map[None], size)[0].numpy() / scale          # (H, W)
    stops = np.linspace(*SCALE, len(COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)
    return colour, np.interp(level, OPACITY_RISES, (0, MOST_OPACITY))[..., None]


def heat_pictures(path, anomaly_map, scale):
    """The image, its anomaly map and the overlay, in the image's own aspect."""
    image = read_image(path)
    image.thumbnail((LARGEST_HEATMAP, LARGEST_HEATMAP))
    colour, opacity = heat(anomaly_map, (image.height, image.width), scale)
    overlay = np.asarray(image) * (1 - opacity) + colour * opacity
    return [image, *(Image.fromarray(pixels.astype(np.uint8)) for pixels in (colour, overlay))]


def colour_scale(threshold, maps):
    """What is half-way on the colour scale: the threshold; else the largest score ends it."""
    return threshold if threshold > 0 else maps.max().item() / SCALE[1] or 1.0


def write_heatmaps(folder, root, paths, maps, scale):
    """An overlay for each image file, under the name that the file has below root."""
    for path, anomaly_map in progress(list(zip(paths, maps)), "heatmaps"):
        name = path.relative_to(root).as_posix()
        target = folder / (name if path.suffix == ".png" else name + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        heat_pictures(path, anomaly_map, scale)[2].save(target)


def write_histogram(path, scores, labels, threshold):
    """Bars of the scores of good (blue) and defective (red) images, with the threshold (black)."""
    picture = Image.new("RGB", HISTOGRAM, "white")
    draw = ImageDraw.Draw(picture)
    width, height = HISTOGRAM
    scores, labels = np.asarray(scores), np.asarray(labels)
    top = max(scores.max(), 0 if math.isnan(threshold) else threshold) * (1 + 1 / BARS) or 1
    good = np.histogram(scores[~labels], BARS, (0, top))[0]
    bad = np.histogram(scores[labels], BARS, (0, top))[0]
    unit = (height - 2 * MARGIN) / max(1, (good + bad).max())  # pixels for an image
    step = (width - 2 * MARGIN) / BARS                         # pixels for a bar
    floor = height - MARGIN
    for bar in range(BARS):
        left = MARGIN + bar * step
        middle = floor - good[bar] * unit
        draw.rectangle([left, middle, left + step - 1, floor], fill="steelblue")
        if bad[bar]:
            top_left = (left, middle - bad[bar] * unit)
            draw.rectangle([*top_left, left + step - 1, middle], fill="firebrick")
    draw.text((MARGIN, floor + 2), f"image score, 0 to {top:.2f}", fill="black")
    draw.text((MARGIN, 2), "good images (blue), defective (red), threshold (line)", fill="black")
    if not math.isnan(threshold):
        x = MARGIN + (width - 2 * MARGIN) * threshold / top
        draw.line([x, MARGIN, x, floor], fill="black", width=2)
    picture.save(path)


def write_overview(path, columns, titles, scale, threshold):
    """Columns of pictures with a title above each, and the colour scale under them."""
    rows = len(columns[0])
    size = (len(columns) * (CELL + GAP), rows * (CELL + GAP) + TITLE + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, (column, title) in enumerate(zip(columns, titles)):
        draw.text((x * (CELL + GAP) + GAP, GAP), title, fill="black", font_size=TITLE / 2)
        for y, picture in enumerate(column):
            cell = ImageOps.contain(picture, (CELL, CELL))
            sheet.paste(cell, (x * (CELL + GAP), TITLE + y * (CELL + GAP)))
    ramp = torch.linspace(*SCALE, BARS).expand(2, BARS) * scale
    colour, _ = heat(ramp, (MARGIN // 2, sheet.width // 2), scale)
    top = sheet.height - MARGIN + GAP
    sheet.paste(Image.fromarray(colour.astype(np.uint8)), (0, top))
    middle = "no threshold" if math.isnan(threshold) else "the threshold"
    text = f"{SCALE[0] * scale:.2f} to {SCALE[1] * scale:.2f}; half-way {scale:.2f}, {middle}"
    draw.text((sheet.width // 2 + GAP, top), text, fill="black")
    sheet.save(path)


# ---- a category, whole --------------------------------------------------------------------------
def write_csv(path, header, rows):
    """A table with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def overview_columns(samples, maps, scores, scale, size):
    """Pictures and titles of the first images of each type, the good ones first."""
    columns, titles, shown = [], [], []
    for (path, kind, mask), anomaly_map, score in zip(samples, maps, scores):
        if shown.count(kind) < PER_TYPE:
            shown.append(kind)
            image, *heated = heat_pictures(path, anomaly_map, scale)
            truth = read_mask(mask, path, size) if mask else torch.zeros(size, size, dtype=bool)
            truth = Image.fromarray(truth.numpy()).convert("RGB").resize(image.size)
            place = shown.count("good") - 1 if kind == "good" else len(columns)
            columns.insert(place, [image, truth, *heated])
            titles.insert(place, f"{kind} {score:.2f}")
    return columns, titles


def evaluate_category(name, args, device, rows):
    """Score DATA/NAME/test, write tables and pictures; appends the row for results.csv."""
    samples = list_test(args.data / name)
    model, memory, threshold = prepare(name, args, device)
    size = model.config.image_size
    paths = [path for path, _, _ in samples]
    labels = [kind != "good" for _, kind, _ in samples]
    maps, seconds = score_images(paths, model, memory, args)
    scores = patchae.image_score(maps).tolist()
    image = auroc(labels, scores)
    pixel = pixel_auroc(samples, maps, size)
    if math.isnan(image):
        absent = "good" if all(labels) else "defective"
        print(f"image AUROC: undefined (test/ has no {absent} images)")
    if not math.isnan(threshold):
        above = [defective for defective, score in zip(labels, scores) if score > threshold]
        print(f"{name}: above the threshold {above.count(False)} of {labels.count(False)} good and "
              f"{above.count(True)} of {labels.count(True)} defective images")
    scale = colour_scale(threshold, maps)
    with patchae.whole(args.out / name / args.score) as folder:
        folder.mkdir()
        write_csv(folder / "scores.csv", ["path", "label", "score"],
                  [(path.relative_to(args.data), kind, score)
                   for (path, kind, _), score in zip(samples, scores)])
        write_heatmaps(folder / "heatmaps", args.data / name / "test", paths, maps, scale)
        write_histogram(folder / "histogram.png", scores, labels, threshold)
        write_overview(folder / "overview.png",
                       *overview_columns(samples, maps, scores, scale, size), scale, threshold)
    config = model.config
    rows.append([name, args.score, image, pixel, seconds, config.seed, config.backbone,
                 Path(config.weights).name])


def predict_category(name, args, device):
    """Score the images of --predict; write predictions.csv, overview.png and heatmaps."""
    paths = [args.predict] if args.predict.is_file() else list_images(args.predict)
    model, memory, threshold = prepare(name, args, device)
    maps, _ = score_images(paths, model, memory, args)
    scores = patchae.image_score(maps).tolist()
    rows = []
    for path, score, anomaly_map in sorted(zip(paths, scores, maps), key=lambda row: -row[1]):
        verdict = "" if math.isnan(threshold) else score > threshold
        rows.append((path, score, verdict, anomaly_map))
    scale = colour_scale(threshold, maps)
    root = args.predict.parent if args.predict.is_file() else args.predict
    with patchae.whole(args.out / name / "predictions") as folder:
        folder.mkdir()
        write_csv(folder / "predictions.csv", ["path", "score", "is_anomalous"],
                  [row[:3] for row in rows])
        write_heatmaps(folder / "heatmaps", root, paths, maps, scale)
        columns = [heat_pictures(row[0], row[3], scale) for row in rows[:RANKED]]
        titles = [f"{path.name[-NAME_END:]} {score:.2f}" for path, score, _, _ in rows[:RANKED]]
        write_overview(folder / "overview.png", columns, titles, scale, threshold)
    for path, score, verdict, _ in rows[:RANKED]:
        word = {True: "anomalous", False: "normal", "": "undecided"}[verdict]
        print(f"{score:10.4f}  {word:9}  {path}")
    print(f"{name}: {len(rows)} images, {sum(row[2] is True for row in rows)} anomalous; "
          f"wrote {args.out / name / 'predictions'}")


def update_results(path, rows):
    """Replace the rows of the same category and score in results.csv; end with the mean per score.

    A metric that is undefined is nan, and no part of the mean. Returns the rows of means.
    """
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            header, *kept = [*csv.reader(file)] or [[]]
        if header != RESULTS or any(len(row) != len(RESULTS) for row in kept):
            raise UserError(f"{path}: not a table of evaluate.py; move it away")
    new = {(row[0], row[1]) for row in rows}
    table = [row for row in kept if row[5] and (row[0], row[1]) not in new] + rows
    means = []
    for kind in dict.fromkeys(row[1] for row in table):
        numbers = np.array([row[2:5] for row in table if row[1] == kind], dtype=float)
        known = [column[~np.isnan(column)] for column in numbers.T]
        means.append(["mean", kind, *(c.mean() if len(c) else math.nan for c in known), "", "", ""])
    with patchae.whole(path) as unfinished:
        write_csv(unfinished, RESULTS, table + means)
    return means


def print_table(rows):
    """Category, score kind, metrics in per cent and time, a line each."""
    print(f"\n{'category':16} {'score':14} {'image AUROC':>12} {'pixel AUROC':>12} {'s/image':>8}")
    for name, kind, image, pixel, seconds, *_ in rows:
        shown = ["undefined" if math.isnan(value) else f"{value:.1%}" for value in (image, pixel)]
        print(f"{name:16} {kind:14} {shown[0]:>12} {shown[1]:>12} {seconds:8.3f}")


def run(argv):
    """Evaluate or predict every category that was asked for; one that fails leaves the others."""
    args = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        make_toy.draw_if_absent(args.data)
    names = choose_categories(args.data, args.category)
    if args.predict:
        return max(patchae.exit_code(predict_category, name, args, device) for name in names)
    rows = []
    code = max(patchae.exit_code(evaluate_category, name, args, device, rows) for name in names)
    if rows:
        means = update_results(args.out / "results.csv", rows)
        print_table(rows + [mean for mean in means if mean[1] == args.score])
    return code


def main(argv=None):
    """Returns the exit code: 0, or 2 where the input was at fault."""
    return patchae.exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
