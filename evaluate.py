"""Score images with a trained Patch AE: a labelled test set, or with --predict any images.

    python evaluate.py --demo
    python evaluate.py --data ROOT --category NAME [NAME ...]
    python evaluate.py --category NAME --predict IMAGE_OR_FOLDER

Reads OUT/NAME/checkpoint.pt, which holds the normal images too, and ROOT/NAME/test or the images
to predict. Writes tables and pictures to OUT/NAME/SCORE or to OUT/NAME/predictions, and gathers
what all categories reached in OUT/results.csv.
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

SCORES = ("feature", "backbone", "reconstruction")  # distance in R, in Φ; error of the decoder
RESULT = ["category", "score", "image_auroc", "pixel_auroc", "seconds_per_image", "threshold",
          "seed", "backbone", "weights"]
# our choice: dark to glowing, evenly brighter, so that grey prints show the same
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])
SCALE = (0.5, 1.5)          # our choice: darkest and brightest, in thresholds
OPACITY_RISES = (0.9, 1.1)  # our choice: in thresholds
MOST_OPACITY = 0.6          # our choice: the image shines through
LARGEST_HEATMAP = 1024      # our choice: pixels of the longer side, so that photographs stay handy
PER_TYPE = 2                # our choice: columns of each type in overview.png
RANKED = 12                 # our choice: lines printed, and columns, of predictions
NAME_END = 16               # our choice: letters of a file name that fit above a column
LEAST = 3                   # columns that overview.png has room for: the scale needs it
CELL, GAP, LINE = 160, 4, 24  # pixels of overview.png: a picture, a gap, a line of text


def parse(argv):
    """The command line."""
    parser = patchae.make_parser(__doc__)
    add = parser.add_argument
    add("--predict", type=Path, metavar="PATH", help="score this image or folder; needs no labels")
    add("--score", choices=SCORES, default="feature",
        help="distance in R (default; it alone has a threshold), in Φ, or reconstruction error")
    add("--quantile", type=float, default=0.99, metavar="Q",
        help="the threshold is this quantile of the normal images' scores, each against the memory "
        "without itself (default: 0.99; our choice: a false alarm in a hundred)")
    if parser.parse_args(argv).demo:  # an option that is given beside --demo still wins
        parser.set_defaults(data=make_toy.ROOT, category=["all"])
    args = parser.parse_args(argv)
    if not 0 < args.quantile <= 1:
        raise UserError(f"--quantile {args.quantile}: must be above 0 and at most 1")
    return args


# ---- scores and metrics -------------------------------------------------------------------------
def prepare(name, args, device):
    """The model, the memory (None for reconstruction) and the threshold (NaN if there is none)."""
    model, images, normal_scores = patchae.load_checkpoint(args.out / name / "checkpoint.pt")
    model.to(device)
    memory = None
    if args.score == "backbone":
        model.encoder = torch.nn.Identity()  # R = Φ: what training must beat
    if args.score != "reconstruction":
        memory = patchae.build_memory(
            model, batches(images, model.config.batch_size, device, "memory"))
    threshold = math.nan
    if args.score == "feature" and len(normal_scores):  # training stored those of no other score
        threshold = torch.quantile(normal_scores, args.quantile).item()
        print(f"{name}: threshold {threshold:.4f}, the {args.quantile:g} quantile of the scores of "
              f"{len(normal_scores)} normal images")
    return model, memory, threshold


@torch.inference_mode()
def score_images(paths, model, memory):
    """The anomaly maps (N, H', W') of image files, and the seconds for each after reading."""
    images = read_images(paths, model.config.image_size)
    at_once = 1 if model.device.type == "cpu" else model.config.batch_size  # so the cache holds it
    begin = time.monotonic()
    maps = []
    for image in batches(images, at_once, model.device, "scoring"):
        if memory is None:  # (E3) patch by patch: what a classical auto-encoder scores by
            patches = patchae.patchify(image, model.config.patch_size)    # (B, 3p², H', W')
            maps.append((model(image) - patches).square().mean(dim=1).cpu())
        else:
            maps.append(patchae.score_maps(model, image, memory).cpu())
    return torch.cat(maps), (time.monotonic() - begin) / len(paths)


def auroc(labels, scores):
    """Area under the ROC curve, exact; NaN where one of the two classes is empty."""
    labels = np.asarray(labels)
    return roc_auc_score(labels, scores) if labels.any() and not labels.all() else math.nan


def upsample(maps, size):
    """Maps (N, H', W') to (N, *size), bilinear (our choice: smooth)."""
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]      # (N, *size)


def read_truth(mask, path, size):
    """The mask (size, size) of an image file, empty where it has none."""
    return read_mask(mask, path, size) if mask else torch.zeros(size, size, dtype=bool)


def pixel_auroc(samples, maps, size):
    """AUROC of all pixels at the network's size; a defective image without a mask is left out."""
    known = [n for n, (_, kind, mask) in enumerate(samples) if kind == "good" or mask]
    if len(known) < len(samples):
        print(f"pixel AUROC: {len(samples) - len(known)} defective images have no mask, left out")
    truths = [read_truth(samples[n][2], samples[n][0], size) for n in known]
    if not any(truth.any() for truth in truths):
        print("pixel AUROC: undefined (no mask under ground_truth/ shows a defect)")
        return math.nan
    return auroc(torch.stack(truths).flatten(), upsample(maps[known], (size, size)).flatten())


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


def write_overview(path, columns, titles, scale):
    """A sheet of columns of pictures with their titles; the last line shows the colour scale."""
    bottom = LINE + len(columns[0]) * (CELL + GAP)
    width = max(len(columns), LEAST) * (CELL + GAP)
    sheet = Image.new("RGB", (width, bottom + LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (column, title) in enumerate(zip(columns, titles)):
        draw.text((x * (CELL + GAP) + GAP, GAP), title, fill="black", font_size=LINE / 2)
        for y, picture in enumerate(column):
            cell = ImageOps.contain(picture, (CELL, CELL))
            sheet.paste(cell, (x * (CELL + GAP), LINE + y * (CELL + GAP)))
    ramp = torch.linspace(*SCALE, CELL).expand(LINE, CELL) * scale
    colour, _ = heat(ramp, (LINE, CELL), scale)
    sheet.paste(Image.fromarray(colour.astype(np.uint8)), (0, bottom))
    draw.text((CELL + GAP, bottom + GAP), f"half-way {scale:.2f}: threshold, if any", fill="black")
    sheet.save(path)


# ---- a category, whole --------------------------------------------------------------------------
def write_csv(path, header, rows):
    """A table with a header line."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_results(folder, root, paths, maps, threshold, shown, truths):
    """A table, a heatmap of each image under the name that it has below root, an overview.

    shown: which of paths the overview shows; truths: their masks, or none. Returns the rows of the
    table, most anomalous first; is_anomalous is empty without a threshold.
    """
    scores = patchae.image_score(maps).tolist()
    # half-way on the colour scale is the threshold; without one, the largest score is its end
    scale = threshold if threshold > 0 else maps.max().item() / SCALE[1] or 1.0
    rows, columns = [], {}
    for n, path in enumerate(progress(paths, "heatmaps")):
        verdict = "" if math.isnan(threshold) else scores[n] > threshold
        rows.append([path, path.parent.name, scores[n], verdict])
        pictures = heat_pictures(path, maps[n], scale)
        name = path.relative_to(root).as_posix()
        target = folder / "heatmaps" / (name if path.suffix == ".png" else name + ".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures[-1].save(target)
        if n in shown:
            columns[n] = pictures
    for n, truth in zip(shown, truths):
        mask = Image.fromarray(truth.numpy()).convert("RGB")
        columns[n].insert(1, mask.resize(columns[n][0].size))
    titles = [f"{'/'.join(paths[n].parts[-2:])[-NAME_END:]} {scores[n]:.2f}" for n in shown]
    write_overview(folder / "overview.png", [columns[n] for n in shown], titles, scale)
    rows.sort(key=lambda row: -row[2])
    write_csv(folder / "scores.csv", ["path", "folder", "score", "is_anomalous"], rows)
    return rows


def evaluate_category(name, args, device):
    """Score DATA/NAME/test; write tables and pictures to OUT/NAME/SCORE."""
    samples = list_test(args.data / name)
    model, memory, threshold = prepare(name, args, device)
    config = model.config
    paths, kinds, masks = zip(*samples)
    defective = np.array([kind != "good" for kind in kinds])
    maps, seconds = score_images(paths, model, memory)
    scores = patchae.image_score(maps).numpy()
    by_image = auroc(defective, scores)
    by_pixel = pixel_auroc(samples, maps, config.image_size)
    if math.isnan(by_image):
        absent = "good" if defective.all() else "defective"
        print(f"image AUROC: undefined (test/ has no {absent} images)")
    if not math.isnan(threshold):
        good, bad = (scores > threshold)[~defective], (scores > threshold)[defective]
        print(f"{name}: above the threshold {good.sum()} of {len(good)} good and {bad.sum()} of "
              f"{len(bad)} defective images")
    first = [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < PER_TYPE]
    shown = sorted(first, key=lambda n: defective[n])  # the good ones first
    truths = [read_truth(masks[n], paths[n], config.image_size) for n in shown]
    with patchae.whole(args.out / name / args.score) as folder:
        folder.mkdir()
        write_results(folder, args.data / name / "test", paths, maps, threshold, shown, truths)
        write_csv(folder / "result.csv", RESULT, [
            [name, args.score, by_image, by_pixel, seconds, threshold, config.seed, config.backbone,
             Path(config.weights).name]])


def predict_category(name, args, device):
    """Score the images of --predict; write a table and pictures to OUT/NAME/predictions."""
    one = args.predict.is_file()
    paths = [args.predict] if one else list_images(args.predict)
    root = args.predict.parent if one else args.predict
    model, memory, threshold = prepare(name, args, device)
    maps, _ = score_images(paths, model, memory)
    shown = patchae.image_score(maps).argsort(descending=True)[:RANKED].tolist()
    target = args.out / name / "predictions"
    with patchae.whole(target) as folder:
        folder.mkdir()
        rows = write_results(folder, root, paths, maps, threshold, shown, [])
    for path, _, score, verdict in rows[:RANKED]:
        word = {True: "anomalous", False: "normal", "": "undecided"}[verdict]
        print(f"{score:10.4f}  {word:9}  {path}")
    print(f"{name}: {len(rows)} images, {sum(row[3] is True for row in rows)} anomalous; "
          f"wrote {target}")


def gather_results(out, kind):
    """Write OUT/results.csv: every OUT/NAME/SCORE/result.csv and a mean for each score; print one.

    A metric that is undefined is nan, and no part of the mean.
    """
    table = []
    for path in sorted(out.glob("*/*/result.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            table += list(csv.reader(file))[1:]
    for score in SCORES:
        rows = [row[2:5] for row in table if row[1] == score]
        if rows:
            numbers = np.ma.masked_invalid(np.array(rows, dtype=float))
            table.append(["mean", score, *numbers.mean(axis=0).filled(math.nan), "", "", "", ""])
    with patchae.whole(out / "results.csv") as unfinished:
        write_csv(unfinished, RESULT, table)
    print(f"\n{'category':16} {'score':14} {'image AUROC':>12} {'pixel AUROC':>12} {'s/image':>8}")
    for name, score, *metrics, seconds in [row[:5] for row in table if row[1] == kind]:
        shown = [f"{float(value):.1%}".replace("nan%", "undefined") for value in metrics]
        print(f"{name:16} {score:14} {shown[0]:>12} {shown[1]:>12} {float(seconds):8.3f}")


def main(argv=None):
    """Score every category asked for; one that fails leaves the others. 0, or 2 then. UserError."""
    args = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        make_toy.draw_if_absent(args.data)
    names = args.category  # to predict, their checkpoints are enough
    if args.data or not (args.predict and names):
        names = choose_categories(args.data, names)
    work = predict_category if args.predict else evaluate_category
    codes = [patchae.exit_code(work, name, args, device) for name in names]
    if not args.predict and 0 in codes:
        gather_results(args.out, args.score)
    return max(codes)


if __name__ == "__main__":
    sys.exit(patchae.exit_code(main))
