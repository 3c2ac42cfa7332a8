"""Repeat the tables of docs/results.md: train and evaluate, recipe by recipe. By hand, not by pytest.

    python tests/recipes.py results   --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py ablations --data ROOT --category NAME ... [--weights FILE]

`results` scores ROOT's own test sets. `ablations` never opens them: of the first --most images of
train/good it holds out a fifth, draws faint defects on it with the code of data/make_toy.py, which
training does not use, and scores those. Everything goes to --out, one folder for each recipe and
seed; what is there already is not run again. Prints a Markdown table: image AUROC / pixel AUROC, in
per cent, as mean ± standard deviation over the seeds, and what is missing of the artificial defects.
"""
import argparse
import contextlib
import csv
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import train  # noqa: E402
from data import make_toy  # noqa: E402
from data.images import list_images, read_image  # noqa: E402

# name: (options of train.py, score kind of evaluate.py, folder whose checkpoint is used)
RESULTS = {
    "raw backbone features Φ": ([], "backbone", "trained"),
    "untrained R (random 1×1)": (["--steps", "0", "--channels", "448"], "feature", "untrained"),
    "trained R": ([], "feature", "trained"),
    "reconstruction error": ([], "reconstruction", "trained"),
}
ABLATIONS = {
    "raw backbone features Φ": ([], "backbone", "default"),
    "trained R, the defaults": ([], "feature", "default"),
    "no artificial defects": (["--no-defects"], "feature", "no-defects"),
    "defects count like all else": (["--defect-share", "0"], "feature", "share-0"),
    "nothing but defects counts": (["--defect-share", "1"], "feature", "share-1"),
    "200 steps": (["--steps", "200"], "feature", "steps-200"),
    "encoder learning rate 1e-3": (["--encoder-lr", "1e-3"], "feature", "encoder-1e-3"),
    "random start": (["--channels", "448"], "feature", "random"),
    "narrow: 64 channels, random start": (["--channels", "64"], "feature", "narrow"),
    "wide: 896 channels, random start": (["--channels", "896"], "feature", "wide"),
    "stages 2 and 3, trained": (["--layers", "2", "3"], "feature", "stages-23"),
    "stages 2 and 3, raw": (["--layers", "2", "3"], "backbone", "stages-23"),
    "no average, raw": (["--neighbourhood", "1", "--steps", "0"], "backbone", "average-1"),
    "5 × 5 average, raw": (["--neighbourhood", "5", "--steps", "0"], "backbone", "average-5"),
    "fine-tuned backbone": (["--finetune-backbone"], "feature", "finetuned"),
}
HELD_OUT_PART = 5          # one image in five is held out
FAINT = (0.12, 0.5)        # strength of the drawn defects: hard enough that raw features miss some
DEFECTS = (make_toy.hole, make_toy.thread, make_toy.grease)


def save(image, path):
    """Write an array as an image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def hold_out(source, target, most):
    """Split source/train/good into target/train/good and a test set with faint drawn defects."""
    paths = list_images(source / "train" / "good")[:most]
    rng = np.random.default_rng(0)
    held = set(rng.permutation(len(paths))[::HELD_OUT_PART].tolist())
    side = make_toy.SIZE
    for i, path in enumerate(paths):
        image = np.asarray(read_image(path).resize((side, side)))
        save(image, target / ("test" if i in held else "train") / "good" / f"{i:03d}.png")
        for defect in DEFECTS if i in held else ():
            mask = Image.new("L", (side, side))
            place = make_toy.on_border if rng.random() < 1 / 4 else make_toy.inside
            drawn = defect(image.astype(float), mask, rng, place)
            faint = image + rng.uniform(*FAINT) * (drawn - image)
            kind = defect.__name__
            save(faint.clip(0, 255).astype(np.uint8), target / "test" / kind / f"{i:03d}.png")
            save(np.asarray(mask), target / "ground_truth" / kind / f"{i:03d}_mask.png")


def rows_of(path):
    """A CSV file as a list of dicts, empty if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured(out, category, kind):
    """[image AUROC, pixel AUROC] in out/category/kind/result.csv, or None."""
    rows = rows_of(out / category / kind / "result.csv")
    return [float(rows[0]["image_auroc"]), float(rows[0]["pixel_auroc"])] if rows else None


def run(recipe, category, args, data, seed):
    """Train (unless there is a checkpoint) and evaluate (unless there is a row): its numbers."""
    options, kind, folder = recipe
    out = args.out / f"{folder}-{seed}"
    common = ["--data", str(data), "--category", category, "--out", str(out)]
    if measured(out, category, kind) is None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            code = 0
            if not (out / category / "checkpoint.pt").exists():
                code = train.main([*common, "--seed", str(seed), "--backbone", args.backbone,
                                   "--weights", args.weights, "--threshold-images", "0",
                                   *options, *args.train])
            code = code or evaluate.main([*common, "--score", kind])
        if code:
            sys.exit(f"{folder}, {category}: failed\n{log.getvalue()}")
    log = rows_of(out / category / "train.csv")
    rebuilt = float(log[-1]["rebuilt"]) if log else float("nan")
    found = [*measured(out, category, kind), rebuilt]
    print(f"{folder}, {kind}, seed {seed}, {category}: {found}", file=sys.stderr, flush=True)
    return found


def cell(found):
    """One recipe on one category, over the seeds, as a cell of the table."""
    image, pixel, rebuilt = np.array(found).T
    texts = []
    for values in (100 * image, 100 * pixel):
        spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
        texts.append(f"{values.mean():.1f}{spread}")
    missing = "" if np.isnan(rebuilt).any() else f", {rebuilt.mean():.2f}"  # none without training
    return " / ".join(texts) + missing


def main():
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("results", "ablations"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--category", nargs="+", required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, from 0 (default: all)")
    parser.add_argument("--most", type=int, default=60, help="ablations: first images (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args, args.train = parser.parse_known_args()  # what is left goes to every train.py
    data, recipes = args.data, RESULTS
    if args.table == "ablations":
        data, recipes = args.out / "held-out", ABLATIONS
        for category in args.category:
            if not (data / category).exists():
                hold_out(args.data / category, data / category, args.most)
    print("| image / pixel AUROC, missing share | " + " | ".join(args.category) + " |")
    print("|---" * (len(args.category) + 1) + "|")
    for number, (name, recipe) in enumerate(recipes.items()):
        if args.rows is None or number in args.rows:
            # raw features of the whole memory do not depend on the seed
            seeds = args.seeds[:1] if recipe[1] == "backbone" else args.seeds
            cells = [cell([run(recipe, category, args, data, seed) for seed in seeds])
                     for category in args.category]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
