"""Score images with a trained Patch AE: a labelled test set, or with --predict any images.

    python evaluate.py --demo
    python evaluate.py --data ROOT --category NAME [NAME ...]
    python evaluate.py --data ROOT --category NAME --predict IMAGE_OR_FOLDER

Reads OUT/NAME/checkpoint.pt and ROOT/NAME/train/good (the memory), then ROOT/NAME/test or the
images to predict. Writes pictures and tables to OUT/NAME and a line to OUT/results.csv.
"""
import csv
import hashlib
import json
import math
import shutil
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
from patchae import UserError

KINDS = ("feature", "backbone", "reconstruction")
RESULTS = ["category", "score", "image_auroc", "pixel_auroc", "seconds_per_image", "seed",
           "backbone", "weights"]
# our choice: dark to glowing, evenly brighter, so that grey prints show the same
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])
SCALE = (0.5, 1.5)            # our choice: darkest and brightest, in thresholds
OPACITY_RISES = (0.9, 1.1)    # our choice: in thresholds
MOST_OPACITY = 0.6            # our choice: the image shines through
HISTOGRAM, MARGIN = (640, 240), 24  # pixels
LARGEST_HEATMAP = 1024  # our choice: pixels of the longer side, so that photographs stay handy
PER_TYPE = 2            # our choice: columns of each kind in overview.png
RANKED = 12             # our choice: columns of predictions.png
NAME_END = 12           # our choice: letters of a file name that fit above a column
BARS = 40               # our choice: bars of histogram.png


def parse(argv):
    """The command line."""
    parser = patchae.Parser(__doc__)
    add = parser.add_argument
    add("--predict", type=Path, metavar="PATH", help="score this image or folder; needs no labels")
    add("--score", choices=KINDS, default="feature",
        help="distance in R (default), in the raw backbone features, or reconstruction error")
    add("--weights", help="where the backbone's weights are now (default: as in training)")
    add("--quantile", type=float, default=0.99, metavar="Q",
        help="the threshold is this quantile of the normal images' scores, each against the\n"
             "memory without itself (default: 0.99; our choice: a false alarm in a hundred)")
    add("--no-threshold", action="store_true", help="save the time that the threshold takes")
    add("--memory-fraction", type=float, default=1.0, metavar="F",
        help="random part of the memory (default: 1; less is our choice, not the paper's)")
    add("--memory-images", type=int, metavar="N", help="only the first N of train/good")
    if parser.parse_args(argv).demo:
        parser.set_defaults(data=make_toy.ROOT, category=[make_toy.CATEGORY])
    args = parser.parse_args(argv)
    for name in ("quantile", "memory_fraction"):
        if not 0 < getattr(args, name) <= 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: must be above 0 and at most 1")
    if args.memory_images is not None and args.memory_images < 1:
        raise UserError(f"--memory-images {args.memory_images}: must be at least 1")
    return args


# ---- memory, scores, threshold ------------------------------------------------------------------
def batches_of(paths, model, what):
    """Yield (B, 3, H, W) in [0, 1] on the model's device."""
    device = next(model.parameters()).device
    for batch in patchae.read_batches(paths, model, what):
        yield batch.to(device) / 255


def score_images(paths, model, memory, args, what):
    """The anomaly maps (N, H', W') of image files, on the CPU."""
    maps = [patchae.score_maps(model, image, memory, args.score).cpu()
            for image in batches_of(paths, model, what)]
    return torch.cat(maps)


def normal_scores(paths, model, memory, args):
    """The score (E5) of each normal image against the memory without itself, a list."""
    scores = []
    for image in batches_of(paths, model, "threshold"):
        for one in image.split(1):
            anomaly_map = patchae.score_maps(model, one, memory, args.score, own=len(scores))
            scores.append(patchae.image_score(anomaly_map).item())
    return scores


def kept_scores(path, digest, count):
    """The normal scores that an earlier run stored for the same memory, or None."""
    try:
        kept = json.loads(path.read_text())
        if digest and kept["memory"] == digest and len(kept["normal_scores"]) == count:
            return [float(score) for score in kept["normal_scores"]]
    except (OSError, ValueError, TypeError, LookupError):
        pass  # absent, or not one of ours
    return None


def find_threshold(paths, model, memory, args, folder):
    """The --quantile of the normal images' scores, or NaN where there is none; printed and stored.

    The scores depend on the memory alone and cost as much as scoring that many images: those that
    are stored with the memory's digest are taken again.
    """
    if args.no_threshold or (memory is not None and len(paths) < 2):
        reason = "--no-threshold" if args.no_threshold else "one normal image"
        print(f"threshold: undefined ({reason})")
        return math.nan
    path = folder / f"threshold_{args.score}.json"
    digest = None if memory is None else hashlib.sha256(memory.cpu().numpy()).hexdigest()
    scores = kept_scores(path, digest, len(paths)) or normal_scores(paths, model, memory, args)
    threshold = float(np.quantile(scores, args.quantile))
    print(f"threshold: {threshold:.4f}, the {args.quantile:g} quantile of the scores of "
          f"{len(scores)} normal images")
    text = json.dumps({"threshold": threshold, "quantile": args.quantile, "memory": digest,
                       "normal_scores": scores}, indent=0)
    patchae.write_whole(path, lambda temporary: temporary.write_text(text))
    return threshold


def prepare(name, args, device):
    """The model, the memory (None for reconstruction) and the threshold of a category."""
    path = args.out / name / "checkpoint.pt"
    model = patchae.restore(patchae.load_checkpoint(path), path, args.weights).to(device).eval()
    paths = patchae.list_images(args.data / name / "train" / "good")[:args.memory_images]
    memory = None
    if args.score != "reconstruction":
        batches = batches_of(paths, model, f"{name}: memory")
        memory = patchae.build_memory(model, batches, len(paths), args.score, args.memory_fraction)
    return model, memory, find_threshold(paths, model, memory, args, args.out / name)


# ---- labels, masks, metrics ---------------------------------------------------------------------
def list_test(folder):
    """The test set as (image path, type, mask path or None); type: the parent folder's name."""
    samples = []
    for path in patchae.list_images(folder / "test"):
        if path.parent.parent != folder / "test":
            raise UserError(f"{path}: expected in {folder / 'test'}/TYPE; move it there")
        masks = folder / "ground_truth" / path.parent.name
        found = [m for m in sorted(masks.glob("*")) if m.stem in (path.stem, path.stem + "_mask")
                 and m.suffix.lower() in patchae.IMAGE_SUFFIXES]
        samples.append((path, path.parent.name, found[0] if found else None))
    return samples


def read_mask(path, image_path, size):
    """A (size, size) bool mask, True on the defect: nearest resize, then any value but 0.

    Transparent places of a mask are no defect. UserError unless it is as large as its image.
    """
    with patchae.opened(path) as file:
        mask = ImageOps.exif_transpose(file)
        if mask.has_transparency_data or mask.mode == "P":
            mask = patchae.lay_on(mask, "black")
        values = np.asarray(mask)
    wanted = patchae.read_image(image_path).size
    if mask.size != wanted:
        raise UserError(f"{path}: the mask has {mask.width} × {mask.height} pixels, its image "
                        f"{wanted[0]} × {wanted[1]}; make them alike")
    defect = Image.fromarray(values.reshape(*values.shape[:2], -1).any(axis=2).astype(np.uint8))
    return np.asarray(defect.resize((size, size), Image.Resampling.NEAREST)) > 0


def auroc(labels, scores):
    """Area under the ROC curve, exact; NaN where one of the two classes is empty."""
    labels = np.asarray(labels)
    return roc_auc_score(labels, scores) if labels.any() and not labels.all() else math.nan


def pixel_auroc(samples, maps, size):
    """AUROC of all pixels at the network's size; a defective image without a mask is left out."""
    rows = [i for i, (_, kind, mask) in enumerate(samples) if kind == "good" or mask]
    absent = len(samples) - len(rows)
    if absent:
        print(f"pixel AUROC: {absent} defective images have no mask and are left out")
    masks = [read_mask(samples[i][2], samples[i][0], size) if samples[i][1] != "good"
             else np.zeros((size, size), bool) for i in rows]
    if not any(mask.any() for mask in masks):
        print("pixel AUROC: undefined (no masks under ground_truth/)")
        return math.nan
    return auroc(np.stack(masks).ravel(), upsample(maps[rows], (size, size)).ravel())


def upsample(maps, size):
    """Maps (N, H', W') to a float array (N, *size), bilinear (our choice: smooth)."""
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0].numpy()  # (N, *size)


# ---- pictures -----------------------------------------------------------------------------------
def heat(anomaly_map, size, scale):
    """Colours (H, W, 3) and opacity (H, W, 1) of a map; `scale` (the threshold) is half-way.

    Half the threshold and less is dark, 1.5 times and more is brightest: the same in every picture
    of a run. Opacity rises around the threshold, so that what is normal does not glow.
    """
    level = upsample(anomaly_map[None], size)[0] / scale
    stops = np.linspace(*SCALE, len(COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)
    return colour, np.interp(level, OPACITY_RISES, (0, MOST_OPACITY))[..., None]


def heat_pictures(path, anomaly_map, scale):
    """The image, its anomaly map and the overlay, in the image's own aspect."""
    image = patchae.read_image(path)
    image.thumbnail((LARGEST_HEATMAP, LARGEST_HEATMAP))
    colour, opacity = heat(anomaly_map, (image.height, image.width), scale)
    overlay = np.asarray(image) * (1 - opacity) + colour * opacity
    return [image, *(Image.fromarray(a.astype(np.uint8)) for a in (colour, overlay))]


def write_heatmaps(folder, items, scale):
    """An overlay for each (name, image path, map); the folder is replaced as a whole."""
    unfinished = folder.with_name(f".part-{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, path, anomaly_map in patchae.progress(items, "heatmaps", len(items)):
            patchae.write_picture(unfinished / name, heat_pictures(path, anomaly_map, scale)[2])
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error}); choose another --out") from error


def colour_scale(threshold, maps):
    """What is half-way on the colour scale: the threshold; else the largest score ends it."""
    return threshold if threshold > 0 else maps.max().item() / SCALE[1] or 1.0


def write_histogram(path, scores, labels, threshold):
    """Bars of the scores of good (blue) and defective (red) images, with the threshold (black)."""
    picture = Image.new("RGB", HISTOGRAM, "white")
    draw, (width, height) = ImageDraw.Draw(picture), HISTOGRAM
    top = max(*scores, 0 if math.isnan(threshold) else threshold) * (1 + 1 / BARS) or 1
    counts = [np.histogram([s for s, d in zip(scores, labels) if d == defect], BARS, (0, top))[0]
              for defect in (False, True)]
    unit = (height - 2 * MARGIN) / max(1, (counts[0] + counts[1]).max())
    for bar, (good, bad) in enumerate(zip(*counts)):
        left, right = (MARGIN + (width - 2 * MARGIN) * (bar + side) / BARS for side in (0, 1))
        floor, middle = height - MARGIN, height - MARGIN - good * unit
        draw.rectangle([left, middle, right - 1, floor], fill="steelblue" if good else None)
        draw.rectangle([left, middle - bad * unit, right - 1, middle],
                       fill="firebrick" if bad else None)
    draw.line([MARGIN, height - MARGIN, width - MARGIN, height - MARGIN], fill="black")
    draw.text((MARGIN, height - MARGIN + 2), f"image score, 0 to {top:.2f}", fill="black")
    draw.text((MARGIN, 2), "good images (blue), defective (red), threshold (line)", fill="black")
    if not math.isnan(threshold):
        x = MARGIN + (width - 2 * MARGIN) * threshold / top
        draw.line([x, MARGIN, x, height - MARGIN], fill="black", width=2)
    patchae.write_picture(path, picture)


def write_overview(path, columns, titles, scale, threshold):
    """A grid with a picture of the colour scale under it; columns: lists of pictures."""
    grid = patchae.picture_grid(list(zip(*columns)), titles)
    sheet = Image.new("RGB", (grid.width, grid.height + MARGIN), "white")
    sheet.paste(grid)
    ramp = torch.linspace(SCALE[0], SCALE[1], BARS).expand(2, BARS) * scale
    colour, _ = heat(ramp, (MARGIN // 2, grid.width // 2), scale)
    sheet.paste(Image.fromarray(colour.astype(np.uint8)), (0, grid.height + MARGIN // 4))
    place = (grid.width // 2 + MARGIN // 2, grid.height + MARGIN // 4)
    middle = "no threshold" if math.isnan(threshold) else "the threshold"
    text = f"{SCALE[0] * scale:.2f} to {SCALE[1] * scale:.2f}; half-way {scale:.2f}, {middle}"
    ImageDraw.Draw(sheet).text(place, text, fill="black")
    patchae.write_picture(path, sheet)


# ---- a category, whole --------------------------------------------------------------------------
def heatmap_name(path, root):
    """Where the heatmap of an image goes, below its folder of heatmaps; one name for one image."""
    name = path.relative_to(root).as_posix()
    return name if path.suffix == ".png" else name + ".png"


def evaluate_category(name, args, device):
    """Score DATA/NAME/test, write tables and pictures; returns the row for results.csv."""
    folder, samples = args.out / name, list_test(args.data / name)
    model, memory, threshold = prepare(name, args, device)
    paths, begin = [path for path, _, _ in samples], time.monotonic()
    maps = score_images(paths, model, memory, args, f"{name}: scoring")
    seconds = (time.monotonic() - begin) / len(paths)
    scores = patchae.image_score(maps).tolist()
    labels = [kind != "good" for _, kind, _ in samples]
    patchae.write_csv(folder / "scores.csv", ["path", "label", "score"],
                      [(path.relative_to(args.data), kind, score)
                       for (path, kind, _), score in zip(samples, scores)])
    size = model.config.image_size
    image, pixel = auroc(labels, scores), pixel_auroc(samples, maps, size)
    if math.isnan(image):
        absent = "good" if all(labels) else "defective"
        print(f"image AUROC: undefined (test/ has no {absent} images)")
    if not math.isnan(threshold):
        above = [defective for defective, score in zip(labels, scores) if score > threshold]
        print(f"{name}: above the threshold {above.count(False)} of {labels.count(False)} good and "
              f"{above.count(True)} of {labels.count(True)} defective images")
    scale, base = colour_scale(threshold, maps), args.data / name / "test"
    write_heatmaps(folder / "heatmaps", [(heatmap_name(path, base), path, anomaly_map)
                                         for path, anomaly_map in zip(paths, maps)], scale)
    write_histogram(folder / "histogram.png", scores, labels, threshold)
    kinds = [kind for _, kind, _ in samples]
    shown = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < PER_TYPE]
    columns = []
    for i in sorted(shown, key=lambda i: labels[i]):
        path, kind, mask = samples[i]
        pictures = heat_pictures(path, maps[i], scale)
        truth = read_mask(mask, path, size) if mask else np.zeros((size, size), bool)
        pictures.insert(1, Image.fromarray(truth).convert("RGB").resize(pictures[0].size))
        columns.append((f"{kind} {scores[i]:.2f}", pictures))
    titles, pictures = zip(*columns)
    write_overview(folder / "overview.png", pictures, titles, scale, threshold)
    config = model.config
    return [name, args.score, image, pixel, seconds, config.seed, config.backbone,
            Path(config.weights).name]


def predict_category(name, args, device):
    """Score the images of --predict; write predictions.csv, .png and a heatmap for each image."""
    folder, path = args.out / name, args.predict
    paths = [path] if path.is_file() else patchae.list_images(path)
    model, memory, threshold = prepare(name, args, device)
    maps = score_images(paths, model, memory, args, f"{name}: scoring")
    scores = patchae.image_score(maps).tolist()
    ranked = sorted(range(len(paths)), key=lambda i: -scores[i])
    decided = ["" if math.isnan(threshold) else score > threshold for score in scores]
    scale, base = colour_scale(threshold, maps), path.parent if path.is_file() else path
    write_heatmaps(folder / "predictions", [(heatmap_name(paths[i], base), paths[i], maps[i])
                                            for i in ranked], scale)
    columns = [heat_pictures(paths[i], maps[i], scale) for i in ranked[:RANKED]]
    titles = [f"{paths[i].name[-NAME_END:]} {scores[i]:.2f}" for i in ranked[:RANKED]]
    write_overview(folder / "predictions.png", columns, titles, scale, threshold)
    patchae.write_csv(folder / "predictions.csv", ["path", "score", "is_anomalous"],
                      [(paths[i], scores[i], decided[i]) for i in ranked])
    for i in ranked[:RANKED]:
        word = {True: "anomalous", False: "normal", "": "undecided"}[decided[i]]
        print(f"{scores[i]:10.4f}  {word:9}  {paths[i]}")
    print(f"{name}: {len(paths)} images, {sum(d is True for d in decided)} anomalous; "
          f"wrote {folder / 'predictions.csv'}")


def update_results(path, rows):
    """Replace the rows of the same category and score in results.csv; end with the mean per score.

    A metric that is undefined is nan, and no part of the mean.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            kept = [[row[key] for key in RESULTS] for row in csv.DictReader(file)]
        kept = [[*r[:2], *map(float, r[2:5]), *r[5:]] for r in kept if r[0] != "mean"]
    except (OSError, LookupError, ValueError, TypeError, csv.Error):
        kept = []  # absent, or not one of ours
    new = {(row[0], row[1]) for row in rows}
    table, means = [row for row in kept if (row[0], row[1]) not in new] + rows, []
    for kind in dict.fromkeys(row[1] for row in table):
        columns = list(zip(*(row for row in table if row[1] == kind)))
        known = [[value for value in column if not math.isnan(value)] for column in columns[2:5]]
        facts = [c[0] if len(set(map(str, c))) == 1 else "several" for c in columns[5:]]
        means.append(["mean", kind, *(sum(v) / len(v) if v else math.nan for v in known), *facts])
    patchae.write_csv(path, RESULTS, table + means)
    return means


def print_table(rows):
    """Category, score kind, metrics and time, a line each."""
    print(f"\n{'category':16} {'score':14} {'image AUROC':>12} {'pixel AUROC':>12} {'s/image':>8}")
    for name, kind, image, pixel, seconds, *_ in rows:
        shown = ["undefined" if math.isnan(value) else f"{value:.4f}" for value in (image, pixel)]
        print(f"{name:16} {kind:14} {shown[0]:>12} {shown[1]:>12} {seconds:8.3f}")


@patchae.script
@torch.inference_mode()
def main(argv=None):
    """Returns the exit code: 0, or 2 where the input was at fault."""
    args, rows = parse(argv), []
    if args.demo:
        make_toy.draw_if_absent(args.data)
    device = patchae.choose_device(args.device)
    names = patchae.choose_categories(args.data, args.category)
    if args.predict:
        return patchae.each_category(names, lambda name: predict_category(name, args, device))
    code = patchae.each_category(
        names, lambda name: rows.append(evaluate_category(name, args, device)))
    if rows:
        means = update_results(args.out / "results.csv", rows)
        print_table(rows + [mean for mean in means if mean[1] == args.score])
    return code


if __name__ == "__main__":
    sys.exit(main())
