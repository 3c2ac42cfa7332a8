"""Score images with a trained Patch AE: labelled test sets, or with --predict any images.

    python evaluate.py --demo
    python evaluate.py --data ROOT --category NAME [NAME ...]
    python evaluate.py --category NAME --predict IMAGE_OR_FOLDER [...]

Reads OUT/NAME/checkpoint.pt, which holds the normal images, too. It scores each test set
ROOT/NAME/test* and writes scores.csv, sheet.png and heatmaps/ to OUT/NAME/METHOD (of a set test_X
to OUT/NAME/METHOD-test_X) and a row to OUT/results.csv. A prediction goes to a new folder,
OUT/NAME/predictions or the one of --to.
"""
import csv
import itertools
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.metrics import auc, roc_auc_score, roc_curve
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

import patchae
from data.images import (choose_categories, fingerprints, join_errors, list_images, list_test_sets,
                         name_some, read_each, read_image, read_mask, to_tensor)
from patchae import PatchAE, UserError, exit_code, progress, write_table

METHODS = ("raw", "trained", "reconstruction")  # before training, after it, error of decoder
RESULT = ["category", "test_set", "method", "image_auroc", "pixel_auroc", "aupro",
          "seconds_per_image", "threshold", "seed", "backbone", "weights"]
PART = 32                   # our choice: images that are read at once
MOST_FALSE = 0.3            # false-positive rate at which AUPRO ends (Bergmann et al., IJCV 2021)
# our choice: dark to glowing, evenly brighter, so that a grey print shows the same
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])
RANGE = (0.5, 1.5)          # our choice: the darkest and the brightest colour, in thresholds
OPACITY_RISES = (0.9, 1.1)  # our choice: in thresholds
MOST_OPACITY = 0.6          # our choice: the image shines through
LARGEST_HEATMAP = 1024      # our choice: pixels of the longer side, so that the files stay small
LONGEST_NAME = 60           # our choice: letters of a heatmap's name; a file system takes 255 bytes
PER_TYPE = 2                # our choice: rows of each type in sheet.png
RANKED = 12                 # our choice: rows of predictions, and of false alarms
CONTEXT = 7                 # our choice: patches along the side of what is shown around one
CELL, GAP, LINE = 160, 4, 20  # pixels of a picture in sheet.png, between two, of a line of text
COLUMNS = ("image", "true defect, if known", "anomaly map", "worst patch", "drawn from R",
           "nearest normal", "in its image")


def parse(argv=None):
    """The command line. UserError."""
    parser = patchae.make_parser(__doc__)
    add = parser.add_argument_group("scoring").add_argument
    add("--predict", type=Path, nargs="+", metavar="PATH",
        help="score these images or folders; needs no labels and no --data")
    add("--to", type=lambda text: Path(text).resolve(), metavar="FOLDER",
        help="where a prediction goes; if the folder exists, FOLDER-2 and so on (default: "
        "OUT/NAME/predictions)")
    add("--method", nargs="+", choices=METHODS, help="trained: distance in R; raw: the same before "
        "training; reconstruction: error of the decoder (default: trained; with --demo raw and "
        "trained)")
    add("--quantile", type=patchae.number(float, 0, 1), default=0.99, metavar="Q",
        help="the threshold is this quantile of the scores of normal images, each compared with "
        "all others, from 0 to 1 (default: 0.99)")
    args = parser.parse_args(argv)
    if args.to and not args.predict:
        raise UserError("--to: belongs to --predict; labelled test sets go to --out")
    asked = args.method or (["raw", "trained"] if args.demo else ["trained"])
    args.method = [method for method in METHODS if method in asked]  # each once
    return args


# ---- scores -------------------------------------------------------------------------------------
@torch.inference_mode()
def error_maps(model, images, progress=iter):
    """The terms of (E3) of images (T, 3, H, W) uint8: (T, H', W') on the CPU.

    A classical auto-encoder scores by this reconstruction error.
    """
    p = model.config.patch_size
    maps = [patchae.patch_error(model(image), patchae.patchify(image, p)).cpu()
            for image in model.batches(images, progress)]
    return torch.cat(maps)                                                # (T, H', W')


def prepare(name, model, method, quantile):
    """What scores by a method: (a PatchAE, its function from images to maps, the threshold).

    "raw" is the model as it was before training, built again from its Config.
    """
    if method == "raw":
        names, images = model.names, model.images
        model = patchae.build_model(model.config, model.device)
        model.remember(images, names, progress)
    elif not model.memory:
        model.build_memory(progress)
    if method == "reconstruction":
        maps_of = partial(error_maps, model)
        scores = patchae.image_score(error_maps(model, model.images, progress))
        note = "training saw them: their error is too low, and so is the threshold"
    else:
        maps_of, scores = model.anomaly_maps, model.normal_scores
        n = len(scores)
        # the k-th smallest of n independent scores leaves a share of 1 − k / (n + 1) above it
        above = 1 - (quantile * (n - 1) + 1) / (n + 1)
        note = f"if they are independent, expect {above:.1%} false alarms"
    threshold = torch.quantile(scores, quantile).item()
    print(f"{name} {method}: threshold {threshold:.4f}, the {quantile:g} quantile of the scores of "
          f"{len(scores)} normal images; {note}")
    return model, maps_of, threshold


@dataclass(eq=False)
class Scored:
    """An image that was scored."""
    path: Path
    kind: str                  # "good" or a type of defect; of a prediction its folder's name
    masks: list                # paths
    size: tuple                # (width, height) of the upright image
    anomaly_map: torch.Tensor  # (H', W')

    @property
    def score(self):
        """(E5)"""
        return patchae.image_score(self.anomaly_map[None]).item()


def score_files(name, samples, model, maps_of):
    """Read and score image files (path, kind, masks) in parts; only their maps are kept.

    Returns the Scored ones, the errors of the others, and the seconds for each after reading.
    """
    known = set(fingerprints(model.images))
    scored, errors, seconds, equal = [], [], 0, 0
    for part in progress([samples[n:n + PART] for n in range(0, len(samples), PART)]):
        found = read_each([path for path, *_ in part], model.config.image_size)
        errors += [one for one in found if isinstance(one, UserError)]
        part = [(sample, *one) for sample, one in zip(part, found) if isinstance(one, tuple)]
        if part:
            images = torch.stack([image for _, image, _ in part])         # (PART, 3, H, W)
            equal += len([number for number in fingerprints(images) if number in known])
            begin = time.monotonic()
            maps = maps_of(images)                                        # (PART, H', W')
            seconds += time.monotonic() - begin
            scored += [Scored(*sample, size, anomaly_map)
                       for (sample, _, size), anomaly_map in zip(part, maps)]
    if equal:
        print(f"{name}: {equal} images are identical to normal training images")
    return scored, errors, seconds / max(1, len(scored))


def upsample(maps, size):
    """Maps (T, H', W') to (T, *size), bilinear (our choice: smooth)."""
    return F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]      # (T, *size)


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

    truths: (T, h, w) bool; maps: (T, h, w). Source: Bergmann et al., IJCV 2021. The overlap of a
    region is the part of its pixels above a threshold. The mean over all regions is a true-positive
    rate in which a pixel weighs 1 / (size of its region), so that small defects count as much as
    large ones. NaN without a defect or without a normal pixel.
    """
    if not truths.any() or truths.all():
        return math.nan
    weights = torch.stack([region_weights(truth) for truth in truths])    # (T, h, w)
    false, overlap, _ = roc_curve(truths.flatten(), maps.flatten(), sample_weight=weights.flatten())
    inside = false <= MOST_FALSE
    at_end = np.interp(MOST_FALSE, false, overlap)
    return auc([*false[inside], MOST_FALSE], [*overlap[inside], at_end]) / MOST_FALSE


def read_truths(title, scored, size):
    """{image path: mask (size, size) bool}; a defective image without a mask is left out."""
    known = [one for one in scored if one.kind == "good" or one.masks]
    if len(known) < len(scored):
        print(f"{title}: {len(scored) - len(known)} defective images have no mask, left out of "
              "pixel metrics; expected ground_truth/TYPE/STEM.* or STEM_mask*.*")
    truths = {one.path: read_mask(one.masks, one.size, size) for one in known}
    empty = [one.masks[0] for one in known if one.kind != "good" and not truths[one.path].any()]
    if empty:
        print(f"{title}: {len(empty)} masks show no defect: {name_some(empty)}")
    return truths


def measure(scored, truths):
    """Image AUROC, pixel AUROC and AUPRO of Scored images; NaN where one is undefined."""
    by_image = auroc([one.kind != "good" for one in scored], [one.score for one in scored])
    if not truths:
        return by_image, math.nan, math.nan
    maps = torch.stack([one.anomaly_map for one in scored if one.path in truths])
    truths = torch.stack(list(truths.values()))                           # (T, H, W)
    maps = upsample(maps, truths.shape[1:])                               # (T, H, W)
    return by_image, auroc(truths.flatten(), maps.flatten()), aupro(truths, maps)


# ---- pictures -----------------------------------------------------------------------------------
def heat(level):
    """Colours (H, W, 3) and opacity (H, W, 1) of a map (H, W) in thresholds, a NumPy array.

    Half the threshold and less is dark, 1.5 times and more is brightest: the same in every picture
    of a run. Opacity rises around the threshold, so that what is normal does not glow.
    """
    stops = np.linspace(*RANGE, len(COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)
    return colour, np.interp(level, OPACITY_RISES, (0, MOST_OPACITY))[..., None]


def lay_over(image, anomaly_map, threshold):
    """Pillow's image with the colours of its anomaly map (H', W') laid over it, in its own aspect.
    """
    level = upsample(anomaly_map[None], (image.height, image.width))[0].numpy()
    colour, opacity = heat(level / max(threshold, patchae.TINY))
    pixels = np.asarray(image) * (1 - opacity) + colour * opacity
    return Image.fromarray(pixels.astype(np.uint8))


def framed(pixels, place, model, shown=None):
    """A cell of the sheet (3, CELL, CELL): an image (3, H, W) uint8, a red frame around a patch.

    place: i · W' + j of the patch. shown: patches along the side of a part of the image around it.
    """
    p, grid = model.config.patch_size, model.grid
    i, j = divmod(place, grid)
    shown = min(shown or grid, grid)
    top, left = (max(0, min(number - shown // 2, grid - shown)) for number in (i, j))
    part = pixels[:, top * p:(top + shown) * p, left * p:(left + shown) * p]
    box = torch.tensor([[j - left, i - top, j - left + 1, i - top + 1]]) * (CELL - 1) / shown
    return draw_bounding_boxes(resize(part, [CELL, CELL]), box, colors="red", width=2)


@torch.inference_mode()
def explain(one, image, model, threshold, truth):
    """A row of the sheet for a Scored image, given as Pillow's: its title, its cells.

    It shows the worst patch of the map beside the normal patch whose vector is nearest to its own.
    truth: the mask, or None.
    """
    pixels = to_tensor(image, model.config.image_size)                    # (3, H, W)
    r = model.represent(*model.batches(pixels[None]))                     # (1, C₃, H', W')
    place = one.anomaly_map.argmax().item()
    query = r.flatten(2)[:, :, place]                                     # (1, C₃)
    found = [torch.cdist(query, vectors)[0].min(dim=0) for vectors in model.memory]
    number = min(range(len(found)), key=lambda n: found[n].values.item())
    vector = model.memory[number][found[number].indices]                  # (C₃,)
    normal = model.represent(*model.batches(model.images[number:number + 1]))  # (1, C₃, H', W')
    there = (normal[0].flatten(1).mT - vector).norm(dim=1).argmin().item()
    drawn = patchae.unpatchify(model.decoder(r), model.config.patch_size)[0]  # (3, H, W)
    drawn = (255 * drawn.clamp(0, 1)).byte().cpu()
    blank = torch.full((3, CELL, CELL), 255, dtype=torch.uint8)
    overlay = pil_to_tensor(lay_over(to_pil_image(pixels), one.anomaly_map, threshold))
    cells = [framed(pixels, place, model),
             blank if truth is None else blank * resize(truth.byte()[None], [CELL, CELL]),
             resize(overlay, [CELL, CELL]),
             framed(pixels, place, model, CONTEXT), framed(drawn, place, model, CONTEXT),
             framed(model.images[number], there, model, CONTEXT),
             framed(model.images[number], there, model)]
    name = model.names[number] if model.names else f"image {number}"
    return (f"{one.kind}/{one.path.name}: score {one.score:.3g}; its worst patch is at distance "
            f"{found[number].values:.3g} from normal {name}"), cells


def text_line(width, texts):
    """A white line (3, LINE, width) with texts (x, text). Bytes that are no UTF-8 become "?"."""
    line = Image.new("RGB", (width, LINE), "white")
    for x, text in texts:
        text = text.encode("utf-8", "replace").decode()
        ImageDraw.Draw(line).text((x, 2), text, fill="black", font_size=14)
    return pil_to_tensor(line)                                            # (3, LINE, width)


def write_sheet(path, rows, threshold):
    """sheet.png: the rows of explain, one below the other; below them the scale of the colours."""
    width = len(COLUMNS) * (CELL + GAP) + GAP
    lines = [text_line(width, [(GAP + x * (CELL + GAP), name) for x, name in enumerate(COLUMNS)])]
    for title, cells in rows:
        lines += [text_line(width, [(GAP, title)]),
                  make_grid(cells, nrow=len(COLUMNS), padding=GAP, pad_value=255)]
    ramp, _ = heat(np.linspace(*RANGE, 2 * CELL)[None].repeat(LINE, axis=0))
    low, high = (f"{factor * threshold:.3g}" for factor in RANGE)
    legend = text_line(width, [(CELL - 3 * LINE, f"{low:>6}"), (
        3 * CELL + GAP, f"{high}; in the middle the threshold, {threshold:.3g}")])
    legend[:, :, CELL:3 * CELL] = torch.from_numpy(ramp).permute(2, 0, 1)  # (3, LINE, 2 · CELL)
    sheet = to_pil_image(torch.cat([*lines, legend], dim=1))              # (3, height, width)
    sheet.save(path, compress_level=1)


# ---- a category, whole --------------------------------------------------------------------------
def new_folder(folder):
    """Make the folder of a prediction: FOLDER, or the first of FOLDER-2 and so on that is free."""
    for number in itertools.count(1):
        free = folder if number == 1 else Path(f"{folder}-{number}")
        with suppress(FileExistsError):
            free.mkdir(parents=True)
            return free


def choose_shown(scored, ranked, threshold, labelled):
    """The images of sheet.png. Of predictions these are the first of the ranking.

    Of a test set some of each type, the good ones first; then good images above the threshold.
    """
    if not labelled:
        return ranked[:RANKED]
    kinds = sorted({one.kind for one in scored}, key=lambda kind: (kind != "good", kind))
    first = [one for kind in kinds
             for one in [other for other in scored if other.kind == kind][:PER_TYPE]]
    alarms = [one for one in ranked
              if one.kind == "good" and one.score > threshold and one not in first]
    return first + alarms[:RANKED]


def write_results(folder, scored, model, threshold, truths, labelled):
    """Write a heatmap of each image, the most anomalous first, sheet.png, and at last scores.csv.

    Returns the ranked images. UserError if an image cannot be read any more.
    """
    ranked = sorted(scored, key=lambda one: -one.score)
    shown = choose_shown(scored, ranked, threshold, labelled)
    table, rows = [["path", "type", "score", "is_anomalous", "heatmap"]], {}
    for rank, one in enumerate(progress(ranked), 1):
        image = read_image(one.path)
        if one in shown:
            rows[one] = explain(one, image, model, threshold, truths.get(one.path))
        image.thumbnail((LARGEST_HEATMAP, LARGEST_HEATMAP))
        heatmap = f"{rank:04d}_{one.kind}_{one.path.stem}"[:LONGEST_NAME] + ".png"
        overlay = lay_over(image, one.anomaly_map, threshold)
        overlay.save(folder / "heatmaps" / heatmap, compress_level=1)  # faster, 4 % larger
        table.append([one.path, one.kind, one.score, one.score > threshold, heatmap])
    write_sheet(folder / "sheet.png", [rows[one] for one in shown], threshold)
    write_table(folder / "scores.csv", table)
    return ranked


def print_found(title, ranked, threshold, labelled):
    """Say how many images are above the threshold; of predictions name the first ones."""
    above = [one for one in ranked if one.score > threshold]
    if labelled:
        false, good = (sum(one.kind == "good" for one in some) for some in (above, ranked))
        print(f"{title}: above the threshold {false} of {good} good and {len(above) - false} of "
              f"{len(ranked) - good} defective images")
        return
    for one in ranked[:RANKED]:
        print(f"{one.score:10.4f}  {'anomalous' if one in above else 'normal':9}  {one.path}")
    print(f"{title}: {len(ranked)} images, {len(above)} anomalous")


def score_set(title, folder, samples, detector, labelled):
    """Score samples (path, kind, masks) and write their folder.

    Returns the Scored images, their masks, seconds for each, and the errors of bad images. A bad
    image ends the evaluation of a labelled set; a prediction goes on without it.
    """
    model, maps_of, threshold = detector
    (folder / "heatmaps").mkdir(parents=True, exist_ok=True)
    (folder / "scores.csv").unlink(missing_ok=True)
    for path in (folder / "heatmaps").glob("[0-9][0-9][0-9][0-9]*_*.png"):
        path.unlink()
    scored, errors, seconds = score_files(title, samples, model, maps_of)
    if errors and labelled or not scored:
        raise join_errors(errors)
    truths = read_truths(title, scored, model.config.image_size) if labelled else {}
    ranked = write_results(folder, scored, model, threshold, truths, labelled)
    print_found(title, ranked, threshold, labelled)
    return scored, truths, seconds, errors


def predict_category(name, args, device, table):
    """Score the images of --predict by each method. UserError names the bad ones in the end."""
    paths = []
    for path in args.predict:
        if not path.is_file() and not path.is_dir():
            raise UserError(f"--predict {path}: no such file or folder")
        paths += [path] if path.is_file() else list_images(path)
    once = {path.absolute(): path for path in reversed(paths)}  # of equal ones the first
    samples = [(path, place.parent.name, []) for place, path in once.items()]
    trained = PatchAE.load(args.out / name / "checkpoint.pt", device)
    for method in args.method:
        detector = prepare(name, trained, method, args.quantile)
        folder = new_folder(args.to or args.out / name / "predictions")
        *_, errors = score_set(f"{name} {method}", folder, samples, detector, False)
        print(f"{name} {method}: wrote {folder}")
    if errors:  # the same for each method
        raise join_errors(errors)


def evaluate_category(name, args, device, table):
    """Score the test sets of DATA/NAME by each method; put the rows of results.csv into the table.
    """
    sets = list_test_sets(args.data / name)
    trained = PatchAE.load(args.out / name / "checkpoint.pt", device)
    config = trained.config
    for method in args.method:
        detector = prepare(name, trained, method, args.quantile)
        for test, samples in sets.items():
            folder = args.out / name / (method if test == "test" else f"{method}-{test}")
            scored, truths, seconds, _ = score_set(
                f"{name} {test} {method}", folder, samples, detector, True)
            table.append([name, test, method, *measure(scored, truths), seconds, detector[2],
                          config.seed, config.backbone, Path(config.weights).name])
            add_result(args.out / "results.csv", table[-1])


# ---- all categories -----------------------------------------------------------------------------
def add_result(path, row):
    """Put a row into results.csv in place of that of the same category, test set and method."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        if header != RESULT:
            raise UserError(f"{path}: not a table of this version; move it away")
    others = [other for other in rows if other[:3] != row[:3]]
    write_table(path, [RESULT, *sorted([*others, row], key=lambda row: row[:3])])


def print_table(rows):
    """Print rows of results.csv, with the mean over the categories of each test set and method."""
    print(f"\n{'category':16} {'test set':11} {'method':15} {'image AUROC':>11} "
          f"{'pixel AUROC':>11} {'AUPRO':>9} {'s/image':>8}")
    for test, method in sorted({(row[1], METHODS.index(row[2])) for row in rows}):
        found = [row for row in rows if row[1:3] == [test, METHODS[method]]]
        numbers = np.ma.masked_invalid(np.array([row[3:7] for row in found], dtype=float))
        mean = ["mean", *found[0][1:3], *numbers.mean(axis=0).filled(math.nan)]
        for row in [*found, mean] if len(found) > 1 else found:
            shown = [f"{value:.1%}".replace("nan%", "undefined") for value in row[3:6]]
            print(f"{row[0]:16} {row[1]:11} {row[2]:15} {shown[0]:>11} {shown[1]:>11} "
                  f"{shown[2]:>9} {row[6]:8.3f}")


def main(argv=None):
    """Score each category. After a failure continue with the rest; return 2 then, else 0."""
    args = parse(argv)
    device = patchae.choose_device(args.device)
    work, table, names = evaluate_category, [], list(dict.fromkeys(args.category))
    if args.predict:
        work = predict_category
        if not names:
            raise UserError("--category NAME is missing: whose model shall score the images?")
        if "all" in names:
            names = sorted(path.parent.name for path in args.out.glob("[!.]*/checkpoint.pt"))
        if not names:
            raise UserError(f"--out {args.out}: no NAME/checkpoint.pt in it; run train.py first")
    else:
        args.data, names = choose_categories(args.data, names, args.demo)
    codes = [exit_code(work, name, args, device, table) for name in names]
    if table:
        print_table(table)
    return max(codes)


if __name__ == "__main__":
    patchae.run(main)
