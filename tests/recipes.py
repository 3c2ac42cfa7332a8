"""Repeat the tables of docs/results.md, and the map of docs/notebook.md. By hand, not by pytest.

    python tests/recipes.py results   --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py ablations --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py map       --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py demo

`results` scores ROOT's own test sets, `demo` the toy set. `ablations` never opens a test set: of
the first --most images of train/good it holds out a fifth, draws faint defects on it with the code
of data/make_toy.py, which training does not use, and scores those. `map` scores both: the test set
and, as test_held_out, the drawn defects. Everything goes to --out, one folder for each recipe and
seed; what is there already is not run again. Prints a Markdown table: image AUROC / pixel AUROC /
AUPRO in per cent, mean over the seeds, with the standard deviation of the three if it is 0.05 or
more; after a comma the missing share.
"""
import argparse
import contextlib
import csv
import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import train  # noqa: E402
from data import make_toy  # noqa: E402
from data.images import list_images, read_image  # noqa: E402

SMALL = "--image-size 256 --patch-size 8".split()
RANDOM = "--weights random".split()
FROZEN = [*SMALL, "--steps", "0"]
STAGES_12, STAGES_23, STAGES_123 = (f"--stages {stages}".split()
                                    for stages in ("1 2", "2 3", "1 2 3"))
TEXTURES = "--recipe textures --weights random".split()
IMAGENET_12 = "--recipe textures".split()  # with the weights that are given
SLOW = [*IMAGENET_12, "--encoder-lr", "1e-5"]
# name: (options of train.py, method of evaluate.py, folder whose checkpoint is used)
RESULTS = {
    "raw features Φ": ([], "raw", "default"),
    "trained R": ([], "trained", "default"),
    "reconstruction error": ([], "reconstruction", "default"),
    "textures: raw random Φ": (TEXTURES, "raw", "textures"),
    "textures: trained R": (TEXTURES, "trained", "textures"),
    "raw features Φ, stages 2 and 3": ([*STAGES_23, "--steps", "0"], "raw", "stages-23"),
    "slow: raw ImageNet Φ": (SLOW, "raw", "slow"),
    "slow: trained R": (SLOW, "trained", "slow"),
}
ABLATIONS = {
    "raw features Φ": ([], "raw", "default"),
    "trained R, the defaults": ([], "trained", "default"),
    "no artificial defects": (["--no-defects"], "trained", "no-defects"),
    "defects count like all else": (["--defect-weight", "0"], "trained", "weight-0"),
    "encoder rate 1e-3": (["--encoder-lr", "1e-3"], "trained", "encoder-1e-3"),
    "random start": (["--start", "random", "--encoder-lr", "2e-3"], "trained", "random-start"),
    "stages 1 and 2": (STAGES_12, "trained", "stages-12"),
    "no average, raw": (["--neighbourhood", "1", "--steps", "0"], "raw", "average-1"),
    "end to end from ImageNet": ([*IMAGENET_12, "--image-size", "384", "--patch-size", "12"],
                                 "trained", "end-to-end"),
    "end to end from random weights": (TEXTURES, "trained", "textures"),
}
MAP = {
    "ImageNet, stages 1 to 3, frozen: Φ": (FROZEN, "raw", "imagenet-123"),
    "ImageNet, stages 1 and 2, frozen: Φ": ([*FROZEN, *STAGES_12], "raw", "imagenet-12"),
    "random, stages 1 to 3, frozen: Φ": ([*FROZEN, *RANDOM], "raw", "random-123"),
    "random, stages 1 and 2, frozen: Φ": ([*FROZEN, *RANDOM, *STAGES_12], "raw", "random-12"),
    "random, stages 1 and 2, end to end at 1e-3": (TEXTURES, "trained", "random-12-1e-3"),
    "random at 1e-4": ([*TEXTURES, "--encoder-lr", "1e-4"], "trained", "random-12-1e-4"),
    "random, stages 1 to 3, end to end at 1e-3": ([*TEXTURES, *STAGES_123], "trained",
                                                  "random-123-1e-3"),
    "ImageNet, stages 1 and 2, end to end at 1e-3": (IMAGENET_12, "trained", "imagenet-12-1e-3"),
    "ImageNet at 1e-4": ([*IMAGENET_12, "--encoder-lr", "1e-4"], "trained", "imagenet-12-1e-4"),
    "ImageNet at 1e-5": (SLOW, "trained", "imagenet-12-1e-5"),
}
DEMO = {
    "raw random Φ": (["--demo"], "raw", "demo"),
    "trained R": (["--demo"], "trained", "demo"),
    "reconstruction error": (["--demo"], "reconstruction", "demo"),
}
HELD_OUT_PART = 5          # one image in five is held out
FAINT = (0.12, 0.5)        # strength of the drawn defects: hard enough that raw features miss some
HELD_OUT = "test_held_out"
DEFECTS = (make_toy.hole, make_toy.thread, make_toy.grease)


def save(image, path):
    """Write an array as an image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def hold_out(source, target, most):
    """Split source/train/good into target/train/good and a test set of faint drawn defects."""
    paths = list_images(source / "train" / "good")[:most]
    rng = np.random.default_rng(0)
    held = set(rng.permutation(len(paths))[::HELD_OUT_PART].tolist())
    side = make_toy.SIZE
    for i, path in enumerate(paths):
        image = np.asarray(read_image(path).resize((side, side)))
        save(image, target / (HELD_OUT if i in held else "train") / "good" / f"{i:03d}.png")
        for defect in DEFECTS if i in held else ():
            mask = Image.new("L", (side, side))
            place = make_toy.on_border if rng.random() < 1 / 4 else make_toy.inside
            drawn = defect(image.astype(float), mask, rng, place)
            faint = image + rng.uniform(*FAINT) * (drawn - image)
            kind = defect.__name__
            save(faint.clip(0, 255).astype(np.uint8), target / HELD_OUT / kind / f"{i:03d}.png")
            save(np.asarray(mask), target / "ground_truth_held_out" / kind / f"{i:03d}_mask.png")


def rows_of(path):
    """A CSV file as a list of dicts, empty if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(recipe, category, test, args, data, seed):
    """Train (unless there is a checkpoint) and evaluate (unless there is a row): its numbers."""
    options, method, folder = recipe
    out = args.out / f"{folder}-{seed}"

    def find():
        return [row for row in rows_of(out / "results.csv")
                if [row["category"], row["test_set"], row["method"]] == [category, test, method]]

    common = ["--data", str(data), "--category", category, "--out", str(out)]
    log, code = io.StringIO(), 0
    with contextlib.redirect_stdout(log):
        if not (out / category / "checkpoint.pt").exists():
            given = [] if args.table == "demo" else ["--backbone", args.backbone, "--weights",
                                                     args.weights]
            code = train.main([*common, "--seed", str(seed), *given, *options, *args.train])
        if not code and not find():
            code = evaluate.main([*common, "--method", method])
    if code:
        sys.exit(f"{folder}, {category}: failed\n{log.getvalue()}")
    row, = find()
    training = rows_of(out / category / "train.csv")
    missing = float(training[-1]["missing_share"]) if training else float("nan")
    found = [*(100 * float(row[name]) for name in ("image_auroc", "pixel_auroc", "aupro")), missing]
    print(f"{folder}, {method}, seed {seed}, {category}: {found}", file=sys.stderr, flush=True)
    return found


def cell(found, method):
    """One recipe on one category, over the seeds, as a cell of the table."""
    *metrics, missing = np.array(found).T
    texts = []
    for values in metrics:
        spread = f" ± {values.std():.1f}" if values.std() >= 0.05 else ""
        texts.append(f"{values.mean():.1f}{spread}")
    shown = method == "trained" and not np.isnan(missing).any()
    return " / ".join(texts) + (f", {missing.mean():.2f}" if shown else "")


def prepare(args):
    """The data folder, the recipes, and the columns (category, test set) of the table asked for."""
    if args.table == "demo":
        make_toy.draw_if_absent(make_toy.ROOT)
        return make_toy.ROOT, DEMO, [(name, test) for name in ("flange", "felt")
                                     for test in ("test", "test_faint")]
    columns = [(name, "test") for name in args.category]
    if args.table == "results":
        return args.data, RESULTS, columns
    held_out = args.out / "held-out"
    for category in args.category:
        if not (held_out / category).exists():
            hold_out(args.data / category, held_out / category, args.most)
    drawn = [(name, HELD_OUT) for name in args.category]
    if args.table == "ablations":
        return held_out, ABLATIONS, drawn
    for category in args.category:
        for folder in ("test", "ground_truth"):
            shutil.copytree(args.data / category / folder, held_out / category / folder,
                            dirs_exist_ok=True)
    return held_out, MAP, columns + drawn


def main():
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("results", "ablations", "map", "demo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--category", nargs="+", default=[])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, from 0")
    parser.add_argument("--most", type=int, default=60, help="ablations, map: first images")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args, args.train = parser.parse_known_args()  # what is left goes to every train.py
    if args.table != "demo" and not (args.data and args.category):
        parser.error("--data ROOT and --category NAME are missing")
    data, recipes, columns = prepare(args)
    print("| image / pixel AUROC / AUPRO, missing share | "
          + " | ".join(" ".join(column).removesuffix(" test") for column in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, (name, recipe) in enumerate(recipes.items()):
        if args.rows is None or number in args.rows:
            fixed = recipe[1] == "raw" and "random" not in recipe[0] and args.table != "demo"
            seeds = args.seeds[:1] if fixed else args.seeds  # ImageNet's features need no seed
            cells = [cell([run(recipe, *column, args, data, seed) for seed in seeds], recipe[1])
                     for column in columns]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
