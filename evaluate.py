"""Score images with a trained Patch AE: a labelled test set, or with --predict any images.

    python evaluate.py --demo
    python evaluate.py --data ROOT --category NAME [NAME ...]
    python evaluate.py --category NAME --predict IMAGE_OR_FOLDER [...]

Reads OUT/NAME/checkpoint.pt, which holds the normal images too. For a test set it reads
ROOT/NAME/test, writes tables and pictures to OUT/NAME/METHOD (of another test set to
OUT/NAME/METHOD-TESTSET), and gathers the results of all categories in OUT/results.csv. With
--predict it writes to OUT/NAME/predictions, for other methods than trained to
OUT/NAME/predictions-METHOD.
"""
import csv
import math
import os
import time
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.metrics import auc, roc_auc_score, roc_curve

import patchae
from data import make_toy
from data.files import (check_replaceable, exit_code, folder_name, make_parser, parse_args, run,
                        whole)
from data.images import (MASK_NAMES, all_errors, choose_categories, list_images, list_test,
                         progress, read_image, read_images, read_mask, read_readable, real)
from patchae import METHODS, PatchAE, UserError

RESULT = ["category", "test_set", "method", "image_auroc", "pixel_auroc", "aupro",
          "seconds_per_image", "threshold", "seed", "backbone", "weights"]
METRICS = slice(3, 7)       # of them those that have a mean
PART = 32                   # our choice: images that are read at once
MOST_FALSE = 0.3            # false-positive rate at which AUPRO ends (Bergmann et al., IJCV 2021)
# our choice: dark to glowing, evenly brighter, so that a grey print shows the same
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])
RANGE = (0.5, 1.5)          # our choice: the darkest and the brightest colour, in thresholds
OPACITY_RISES = (0.9, 1.1)  # our choice: in thresholds
MOST_OPACITY = 0.6          # our choice: the image shines through
LARGEST_HEATMAP = 1024      # our choice: pixels of the longer side, so that the files stay small
PER_TYPE = 2                # our choice: columns of each type in overview.png
RANKED = 12                 # our choice: lines printed, and columns, of predictions
EXPLAINED = 6               # our choice: rows of nearest.png
CONTEXT = 3                 # our choice: patches shown on each side of the worst one
NAME_END = 16               # our choice: letters of a file name that fit above a column
LONGEST_NAME = 50           # our choice: letters, up to 4 bytes each
MOST_BYTES = 250            # of a name to which .png is added; file systems allow 255
LEAST = 3                   # columns for which overview.png has room: the legend needs it
CELL = 160                  # pixels of a picture in overview.png and nearest.png
GAP = 4                     # pixels between two pictures
LINE = 24                   # pixels of a line of text


def parse(argv=None):
    """The command line. UserError."""
    parser, _ = make_parser(__doc__)
    add = parser.add_argument_group("scoring").add_argument
    add("--predict", type=Path, nargs="+", metavar="PATH",
        help="score these images or folders; needs no labels and no --data")
    add("--method", nargs="+", choices=METHODS, help="trained: distance in R, the only one with a "
        "threshold; raw: distance between the backbone's features; reconstruction: error of the "
        "decoder (default: trained; with --demo raw and trained)")
    add("--test", type=folder_name, nargs="+", metavar="FOLDER",
        help="test sets in ROOT/NAME (default: test; with --demo test and test_faint)")
    add("--quantile", type=float, default=0.99, metavar="Q",
        help="the threshold is this quantile of the scores of normal images, each compared with "
        "all others, above 0 and up to 1 (default: 0.99; the expected rate of false alarms is "
        "printed)")
    args = parse_args(parser, argv)
    if args.predict and args.test:
        raise UserError("--test: belongs to labelled test sets, not to --predict; leave it out")
    method = args.method or (["raw", "trained"] if args.demo else ["trained"])
    test = args.test or (["test", "test_faint"] if args.demo else ["test"])
    args.method, args.test = list(dict.fromkeys(method)), list(dict.fromkeys(test))
    for name in args.test:
        if not name or set(name) & set("/\\"):
            raise UserError(f"--test {name}: must be the name of a folder in ROOT/NAME")
    if not 0 < args.quantile <= 1:
        raise UserError(f"--quantile {args.quantile}: must be above 0 and at most 1")
    return args


# ---- scores -------------------------------------------------------------------------------------
def load_model(name, args, device):
    """The model of a category, and its threshold (NaN if there is none)."""
    model = PatchAE.load(args.out / name / "checkpoint.pt", device)
    model.batch_size = args.batch_size
    n = len(model.normal_scores)
    if not n or "trained" not in args.method:
        return model, math.nan
    threshold = model.threshold(args.quantile)
    # the k-th smallest of n independent scores leaves a share of 1 − k / (n + 1) above it
    above = 1 - (args.quantile * (n - 1) + 1) / (n + 1)
    print(f"{name}: threshold {threshold:.4f}, the {args.quantile:g} quantile of the scores of {n} "
          f"normal images; if they are independent, expect {above:.1%} false alarms")
    return model, threshold


def score_files(paths, model, method, watch):
    """Read and score image files in parts; only the anomaly maps are kept.

    Returns the paths that could be read, their anomaly maps (N, H', W'), the texts of the errors,
    the seconds for each image after reading, and how many equal a normal training image.
    """
    known = set(patchae.fingerprints(model.images))
    readable, maps, errors, seconds, equal = [], [], [], 0, 0
    if method not in ("reconstruction", model.remembered):
        model.build_memory(method, watch)
    for part in watch([paths[n:n + PART] for n in range(0, len(paths), PART)]):
        found, images, bad = read_readable(part, model.config.image_size)
        readable += found
        errors += bad
        equal += sum(number in known for number in patchae.fingerprints(images))
        begin = time.monotonic()
        maps += [model.anomaly_maps(images, method)] if found else []
        seconds += time.monotonic() - begin
    if not readable:
        raise all_errors(errors)
    return readable, torch.cat(maps), errors, seconds / len(readable), equal


def upsample(maps, size):
    """Maps (N, H', W') to (N, *size), bilinear (our choice: smooth)."""
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]      # (N, *size)


# ---- metrics ------------------------------------------------------------------------------------
def auroc(labels, scores):
    """Area under the ROC curve, exact; NaN where one of the two classes is empty."""
    labels = np.asarray(labels)
    return roc_auc_score(labels, scores) if labels.any() and not labels.all() else math.nan


def region_weights(truth):
    """1 / (size of its region) for each defective pixel of a mask (h, w) bool, 1 elsewhere: (h, w).

    A region is a set of defective pixels that touch, corners included. Each pixel gets a number,
    and the largest of a region spreads over it, one pixel at a time, until nothing changes.
    """
    numbers = torch.arange(1, truth.numel() + 1, dtype=torch.float32).view(1, *truth.shape) * truth
    while True:
        spread = F.max_pool2d(numbers, 3, stride=1, padding=1) * truth    # (1, h, w)
        if torch.equal(spread, numbers):
            break
        numbers = spread
    numbers = numbers[0].long()                                           # (h, w)
    sizes = torch.bincount(numbers.flatten())                             # (largest number + 1,)
    return torch.where(truth, 1 / sizes[numbers], 1.0)                    # (h, w)


def aupro(truths, maps):
    """Area under the per-region overlap curve up to a false-positive rate of 0.3, divided by 0.3.

    truths: (N, h, w) bool; maps: (N, h, w). Source: Bergmann et al., IJCV 2021. The overlap of a
    region is the part of its pixels above a threshold. The mean over all regions is a true-positive
    rate in which a pixel weighs 1 / (size of its region), so that small defects count as much as
    large ones. NaN without a defect or without a normal pixel.
    """
    if not truths.any() or truths.all():
        return math.nan
    weights = torch.stack([region_weights(truth) for truth in truths])    # (N, h, w)
    false, overlap, _ = roc_curve(truths.flatten(), maps.flatten(), sample_weight=weights.flatten())
    inside = false <= MOST_FALSE
    at_end = np.interp(MOST_FALSE, false, overlap)
    return auc([*false[inside], MOST_FALSE], [*overlap[inside], at_end]) / MOST_FALSE


def pixel_metrics(samples, maps, size):
    """Pixel AUROC and AUPRO at the network's size; a defective image without a mask is left out."""
    known = [n for n, (_, kind, masks) in enumerate(samples) if kind == "good" or masks]
    if len(known) < len(samples):
        print(f"pixel metrics: {len(samples) - len(known)} defective images have no mask, left "
              f"out; looked for ground_truth/TYPE/{MASK_NAMES}")
    truths = [read_mask(samples[n][2], samples[n][0], size) for n in known]
    for n, truth in zip(known, truths):
        if truth.float().mean() > 1 / 2:
            print(f"{samples[n][2][0]}: more than half of the image is a defect; is it inverted?")
    if not any(truth.any() for truth in truths):
        print("pixel metrics: undefined (no mask shows a defect)")
        return math.nan, math.nan
    truths, maps = torch.stack(truths), upsample(maps[known], (size, size))  # (N, size, size)
    return auroc(truths.flatten(), maps.flatten()), aupro(truths, maps)


# ---- pictures -----------------------------------------------------------------------------------
def heat(anomaly_map, size, scale):
    """Colours (H, W, 3) and opacity (H, W, 1) of a map; `scale`, the threshold, is half-way.

    Half the threshold and less is dark, 1.5 times and more is brightest: the same in every picture
    of a run. Opacity rises around the threshold, so that what is normal does not glow.
    """
    level = upsample(anomaly_map[None], size)[0].numpy() / scale          # (H, W)
    stops = np.linspace(*RANGE, len(COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)
    return colour, np.interp(level, OPACITY_RISES, (0, MOST_OPACITY))[..., None]


def heat_pictures(path, anomaly_map, scale):
    """The image, its anomaly map and the overlay, in the image's own aspect."""
    image = read_image(path, LARGEST_HEATMAP)
    image.thumbnail((LARGEST_HEATMAP, LARGEST_HEATMAP))
    colour, opacity = heat(anomaly_map, (image.height, image.width), scale)
    overlay = np.asarray(image) * (1 - opacity) + colour * opacity
    return [image, *(Image.fromarray(pixels.astype(np.uint8)) for pixels in (colour, overlay))]


def write_text(draw, x, y, text, anchor=None):
    """One line of text. Bytes of a file name that are no UTF-8 become question marks."""
    text = text.encode("utf-8", "replace").decode()
    draw.text((x, y), text, fill="black", font_size=LINE / 2, anchor=anchor)


def write_overview(path, columns, titles, scale, unit):
    """A sheet of columns of pictures with their titles; below it the colour scale with numbers."""
    bottom = LINE + len(columns[0]) * (CELL + GAP)
    width = max(len(columns), LEAST) * (CELL + GAP)
    sheet = Image.new("RGB", (width, bottom + 2 * LINE), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (column, title) in enumerate(zip(columns, titles)):
        write_text(draw, x * (CELL + GAP) + GAP, GAP, title)
        for y, picture in enumerate(column):
            cell = picture.resize([max(1, round(side * CELL / max(picture.size)))
                                   for side in picture.size])
            sheet.paste(cell, (x * (CELL + GAP), LINE + y * (CELL + GAP)))
    legend = 2 * CELL
    ramp = torch.linspace(*RANGE, legend).expand(LINE, legend) * scale
    colour, _ = heat(ramp, (LINE, legend), scale)
    sheet.paste(Image.fromarray(colour.astype(np.uint8)), (LINE, bottom))
    for place, factor in ((LINE, RANGE[0]), (LINE + CELL, 1), (LINE + legend, RANGE[1])):
        draw.line([place, bottom + LINE, place, bottom + LINE + GAP], fill="black")
        write_text(draw, place, bottom + LINE + GAP, f"{factor * scale:.3g}", "ma")
    write_text(draw, LINE + legend + GAP, bottom + GAP, unit)
    sheet.save(path)


# ---- why: the nearest normal patch --------------------------------------------------------------
def find_nearest(model, image, anomaly_map, method):
    """The most anomalous patch of an image (3, H, W) uint8, and the normal patch nearest to it.

    Returns the place of the worst patch, the number of the normal image, the place in it, and the
    distance; places count row by row.
    """
    place = anomaly_map.argmax().item()
    batch, = model.batches(image[None])
    with torch.inference_mode():
        query = model.vectors(batch, method).flatten(2)[:, :, place]      # (1, C₃)
        found = [torch.cdist(query, vectors)[0].min(dim=0) for vectors in model.memory]
    number = min(range(len(found)), key=lambda n: found[n].values.item())
    return (place, number, model.places[number][found[number].indices.item()].item(),
            found[number].values.item())


def framed(pixels, place, model):
    """An image (3, H, W) in [0, 1], and the surroundings of a patch; both frame the patch."""
    p, grid = model.config.patch_size, model.grid
    shown = min(2 * CONTEXT + 1, grid)
    top, left = (max(0, min(i - CONTEXT, grid - shown)) for i in divmod(place, grid))
    image = Image.fromarray((255 * pixels).byte().permute(1, 2, 0).numpy())
    side = shown * p
    part = image.crop((left * p, top * p, left * p + side, top * p + side))
    pictures = []
    for picture, y, x, span in ((image, *divmod(place, grid), grid),
                                (part, place // grid - top, place % grid - left, shown)):
        picture = picture.resize((CELL, CELL))
        step = CELL / span
        box = [x * step - 1, y * step - 1, (x + 1) * step, (y + 1) * step]
        ImageDraw.Draw(picture).rectangle(box, outline="red")
        pictures.append(picture)
    return pictures


def write_nearest(path, model, paths, maps, method):
    """A sheet with a row for each image: why is it called anomalous?

    The image with a frame around its worst patch; that place; what the decoder draws there from R
    (not for method "raw", which has no decoder); the nearest normal patch; its normal image.
    Nothing is written without images, or for method "reconstruction", which compares no vectors.
    """
    if not paths or method == "reconstruction":
        return
    images = read_images(paths, model.config.image_size)
    columns = ["image", "worst patch", "drawn from R", "nearest normal", "in its image"]
    if method == "raw":
        columns.remove("drawn from R")
    height = 2 * LINE + CELL + GAP
    sheet = Image.new("RGB", (len(columns) * (CELL + GAP), len(paths) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (file, image, anomaly_map) in enumerate(zip(paths, images, maps)):
        place, number, normal_place, distance = find_nearest(model, image, anomaly_map, method)
        cells = framed(image / 255, place, model)
        if method != "raw":
            batch, = model.batches(image[None])
            with torch.inference_mode():
                drawn = patchae.unpatchify(model(batch), model.config.patch_size)[0]
            cells.append(framed(drawn.clamp(0, 1).cpu(), place, model)[1])
        cells += reversed(framed(model.images[number] / 255, normal_place, model))
        name = model.names[number] if model.names else f"image {number}"
        write_text(draw, GAP, row * height + GAP, f"{'/'.join(file.parts[-2:])}: worst patch at "
                   f"distance {distance:.3g} from normal {name}")
        for x, (cell, title) in enumerate(zip(cells, columns)):
            write_text(draw, x * (CELL + GAP) + GAP, row * height + LINE, title)
            sheet.paste(cell, (x * (CELL + GAP), row * height + 2 * LINE))
    sheet.save(path)


# ---- a category, whole --------------------------------------------------------------------------
def write_csv(path, header, rows):
    """A table with a header line. A file name that is not UTF-8 is written with escapes."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def shorten(name):
    """A name of which LONGEST_NAME letters are left, with a number that tells it from others."""
    return f"{name[:LONGEST_NAME]}-{zlib.crc32(os.fsencode(name)):08x}"


def heatmap_names(paths):
    """A name for the heatmap of each image, below the folder that all have in common.

    a.png keeps its name; a.jpg becomes a.jpg.png, and an a.jpg.png beside it a.jpg.png.png.
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    full = [path.relative_to(path.anchor) for path in full]  # on Windows they may lie on two drives
    root = os.path.commonpath([path.parent for path in full])
    names, taken = [], set()
    for path in full:
        name = path.relative_to(root)
        if len(os.fsencode(name.name)) > MOST_BYTES:
            name = name.with_name(shorten(name.name))
        while name.suffix != ".png" or name in taken:
            name = Path(f"{name}.png")
        names.append(name)
        taken.add(name)
    return names


def write_results(folder, paths, maps, threshold, shown, truths, watch):
    """Write scores.csv, a heatmap of each image, and overview.png.

    shown: which of paths the overview shows; truths: their masks, or none. Returns the rows of the
    table, most anomalous first; is_anomalous is empty without a threshold.
    """
    scores = patchae.image_score(maps).tolist()
    decided = not math.isnan(threshold)
    # without a threshold the colours end at the largest score; 1 where all scores are 0
    scale = threshold if decided else maps.max().item() / RANGE[1]
    scale = scale if scale > 0 else 1.0
    rows, columns = [], {}
    for n, (path, name) in enumerate(zip(watch(paths), heatmap_names(paths))):
        verdict = scores[n] > threshold if decided else ""
        rows.append([path, path.parent.name, scores[n], verdict])
        pictures = heat_pictures(path, maps[n], scale)
        target = folder / "heatmaps" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures[-1].save(target, compress_level=1)  # faster; the files grow by 4 %
        if n in shown:
            columns[n] = pictures
    for n, truth in zip(shown, truths):
        mask = Image.fromarray(truth.numpy()).convert("RGB")
        columns[n].insert(1, mask.resize(columns[n][0].size))
    titles = [f"{'/'.join(paths[n].parts[-2:])[-NAME_END:]} {scores[n]:.3g}" for n in shown]
    unit = "threshold in the middle" if decided else "no threshold"
    write_overview(folder / "overview.png", [columns[n] for n in shown], titles, scale, unit)
    rows.sort(key=lambda row: -row[2])
    write_csv(folder / "scores.csv", ["path", "folder", "score", "is_anomalous"], rows)
    return rows


def evaluate_category(name, args, device):
    """Score the test sets of DATA/NAME by each method; write to OUT/NAME/METHOD."""
    tests = {test: list_test(args.data / name, test) for test in args.test}
    model, threshold = load_model(name, args, device)
    for method in args.method:
        for test, samples in tests.items():
            limit = threshold if method == "trained" else math.nan
            evaluate_test(name, args, model, method, test, samples, limit)


def choose_explained(scores, kinds, threshold):
    """The images for nearest.png: the most anomalous of each type of defect, then the others.

    Behind them the good ones above the threshold: why are they called anomalous?
    """
    ranked = np.argsort(-scores, kind="stable").tolist()
    bad = [n for n in ranked if kinds[n] != "good"]
    worst = {}  # of each type
    for n in bad:
        worst.setdefault(kinds[n], n)
    others = [n for n in bad if n not in worst.values()]
    false_alarms = [n for n in ranked if kinds[n] == "good" and scores[n] > threshold]
    return [*worst.values(), *others][:EXPLAINED] + false_alarms[:EXPLAINED]


def method_folder(method, test):
    """The name of the folder for the results of a method on a test set."""
    return method if test == "test" else f"{method}-{test}"


def evaluate_test(name, args, model, method, test, samples, threshold):
    """Score one test set by one method; write tables and pictures."""
    config, watch = model.config, partial(progress, f"{name} {test} {method}")
    target = args.out / name / method_folder(method, test)
    check_replaceable(target, args.out)
    paths, kinds, masks = zip(*samples)
    defective = np.array([kind != "good" for kind in kinds])
    _, maps, errors, seconds, equal = score_files(paths, model, method, watch)
    if errors:
        raise all_errors(errors)
    if equal:
        print(f"{name}: {equal} images of {test}/ are identical to normal training images")
    scores = patchae.image_score(maps).numpy()
    by_image = auroc(defective, scores)
    by_pixel, by_region = pixel_metrics(samples, maps, config.image_size)
    if math.isnan(by_image):
        absent = "good" if defective.all() else "defective"
        print(f"image AUROC: undefined ({test}/ has no {absent} images)")
    if not math.isnan(threshold):
        good, bad = (scores > threshold)[~defective], (scores > threshold)[defective]
        print(f"{name} {test}: above the threshold {good.sum()} of {len(good)} good and "
              f"{bad.sum()} of {len(bad)} defective images")
    first = [n for n, kind in enumerate(kinds) if kinds[:n].count(kind) < PER_TYPE]
    shown = sorted(first, key=lambda n: defective[n])  # the good ones first
    truths = [read_mask(masks[n], paths[n], config.image_size) for n in shown]
    explained = choose_explained(scores, kinds, threshold)
    with whole(target) as folder:
        folder.mkdir()
        write_results(folder, paths, maps, threshold, shown, truths, watch)
        write_nearest(folder / "nearest.png", model, [paths[n] for n in explained],
                      maps[explained], method)
        write_csv(folder / "result.csv", RESULT, [
            [name, test, method, by_image, by_pixel, by_region, seconds, threshold, config.seed,
             config.backbone, Path(config.weights).name]])


def prediction_name(paths):
    """The name of the folder for the results of these paths: a/b and c become a-b+c.

    Paths are seen from the current folder, if they lie in it. A long name ends in a number.
    """
    here, names = Path.cwd(), []
    for path in map(Path.resolve, paths):
        path = path.relative_to(here if here in path.parents else path.anchor)
        names.append("-".join(path.parts) or "root")
    name = "+".join(names)
    return shorten(name) if len(name) > LONGEST_NAME else name


def name_closed(error):
    """Say which folder may not be read. It stops no prediction of what can be read."""
    print(f"left out: {error}")


def predict_category(name, args, device):
    """Score the images of --predict; write to OUT/NAME/predictions. UserError names bad files."""
    paths = []
    for path in args.predict:
        if not path.exists():
            raise UserError(f"--predict {path}: no such file or folder")
        paths += [path] if path.is_file() else list_images(path, args.out, name_closed)
    paths = list({real(path.parent) / path.name: path for path in paths}.values())  # each once
    model, threshold = load_model(name, args, device)
    for method in args.method:
        limit = threshold if method == "trained" else math.nan
        watch = partial(progress, f"{name} {method}")
        suffix = "" if method == "trained" else f"-{method}"
        target = args.out / name / f"predictions{suffix}" / prediction_name(args.predict)
        check_replaceable(target, args.out)
        readable, maps, errors, _, equal = score_files(paths, model, method, watch)
        if equal:
            print(f"{name}: {equal} images are identical to normal training images")
        shown = patchae.image_score(maps).argsort(descending=True, stable=True)[:RANKED].tolist()
        with whole(target) as folder:
            folder.mkdir()
            rows = write_results(folder, readable, maps, limit, shown, [], watch)
            worst = shown[:EXPLAINED]
            write_nearest(folder / "nearest.png", model, [readable[n] for n in worst],
                          maps[worst], method)
        for path, _, score, verdict in rows[:RANKED]:
            word = {True: "anomalous", False: "normal", "": "undecided"}[verdict]
            print(f"{score:10.4f}  {word:9}  {path}")
        found = "undecided" if math.isnan(limit) else f"{sum(row[3] for row in rows)} anomalous"
        print(f"{name}: {len(rows)} images, {found}; wrote {target}")
    if errors:  # the same for each method
        raise all_errors(errors)


# ---- all categories -----------------------------------------------------------------------------
def mean_row(rows):
    """The mean of each metric over rows of result.csv that have one test set and one method.

    A metric that is undefined is nan, and no part of the mean.
    """
    numbers = np.ma.masked_invalid(np.array([row[METRICS] for row in rows], dtype=float))
    return ["mean", *rows[0][1:3], *numbers.mean(axis=0).filled(math.nan)]


def written(name):
    """A name as write_csv writes it: bytes that are no UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def gather_results(out, names, tests, methods):
    """Write every OUT/NAME/*/result.csv to OUT/results.csv; print what was asked for.

    Damaged files and those of others are left out, and so is the copy of a folder, whose rows name
    another category or another method.
    """
    rows, asked = [], [written(name) for name in names]
    for path in sorted(out.glob("[!.]*/[!.]*/result.csv")):
        place = [written(folder.name) for folder in (path.parent.parent, path.parent)]
        with (open(path, newline="", encoding="utf-8", errors="replace") as file,
              suppress(csv.Error)):
            header, *found = [*csv.reader(file)] or [[]]
            if header == RESULT:
                rows += [row for row in found if len(row) == len(RESULT)
                         and [row[0], method_folder(row[2], row[1])] == place]
    with whole(out / "results.csv") as unfinished:
        write_csv(unfinished, RESULT, rows)
    print(f"\n{'category':16} {'test set':11} {'method':15} {'image AUROC':>11} "
          f"{'pixel AUROC':>11} {'AUPRO':>9} {'s/image':>8}")
    for test in tests:
        for method in methods:
            found = [row for row in rows if row[0] in asked and row[1:3] == [test, method]]
            for row in [*found, mean_row(found)] if len(found) > 1 else found:
                *metrics, seconds = (float(value) for value in row[METRICS])
                shown = [f"{value:.1%}".replace("nan%", "undefined") for value in metrics]
                print(f"{row[0]:16} {test:11} {method:15} {shown[0]:>11} {shown[1]:>11} "
                      f"{shown[2]:>9} {seconds:8.3f}")


def main(argv=None):
    """Score each category. After a failure continue with the rest; return 2 then, else 0."""
    args = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        make_toy.draw_if_absent(args.data)
    names = list(dict.fromkeys(args.category))
    if args.predict and not names:
        raise UserError("--category NAME is missing: whose model shall score the images?")
    if args.predict and "all" in names:
        names = sorted(path.parent.name for path in args.out.glob("[!.]*/checkpoint.pt"))
        if not names:
            raise UserError(f"--out {args.out}: no NAME/checkpoint.pt in it; run train.py first")
    if not args.predict:
        names = choose_categories(args.data, names)
    work = predict_category if args.predict else evaluate_category
    codes = [exit_code(work, name, args, device) for name in names]
    if not args.predict and 0 in codes:
        gather_results(args.out, [name for name, code in zip(names, codes) if code == 0],
                       args.test, args.method)
    return max(codes)


if __name__ == "__main__":
    run(main)
