"""Repeat the README's tables "Results" and "Ablations": train and evaluate, recipe by recipe.

    python tests/recipes.py results   --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py ablations --data ROOT --category NAME ... [--weights FILE]

`results` scores ROOT's own test sets. `ablations` never opens them: it holds out a fifth of train/good,
draws defects on it with the code of data/make_toy.py, which training does not use, and scores those.
Everything goes to --out, one folder for each recipe and seed; what is there already is not run again.
Prints a Markdown table: mean ± standard deviation over the seeds, or the one value.
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
import patchae  # noqa: E402
import train  # noqa: E402
from data import make_toy  # noqa: E402

# name: (options of train.py, options of evaluate.py, folder whose checkpoint is used)
RESULTS = {
    "raw backbone features": ([], ["--score", "backbone"], "trained"),
    "untrained R (random 1×1)": (["--epochs", "0", "--encoder-start", "random"], [], "untrained"),
    "trained R": ([], [], "trained"),
    "reconstruction error": ([], ["--score", "reconstruction"], "trained"),
}
ABLATIONS = {
    "raw backbone features": ([], ["--score", "backbone"], "default"),
    "trained R, the defaults": ([], [], "default"),
    "encoder learning rate 1e-3": (["--encoder-lr", "1e-3"], [], "encoder-1e-3"),
    "random start, trained at 1e-3": (["--encoder-start", "random", "--encoder-lr", "1e-3"], [], "random"),
    "no artificial defects": (["--no-defects"], [], "no-defects"),
    "128 channels, principal axes": (["--channels", "128"], [], "128"),
    "16 channels, principal axes": (["--channels", "16"], [], "16"),
    "layers 1, 2, 3 on a 64 × 64 grid": (["--layers", "1", "2", "3"], ["--memory-fraction", "0.06"], "layers-123"),
    "layer 2 alone": (["--layers", "2"], [], "layer-2"),
    "no neighbourhood average": (["--neighbourhood", "1"], [], "neighbourhood-1"),
    "backbone fine-tuned at 1e-5": (["--finetune-backbone"], [], "finetuned"),
}
PARTS, VARIANTS = 5, (make_toy.scratch, make_toy.stain, make_toy.fibre)  # a fifth held out; defects


def hold_out(source, target, most):
    """Split source/train/good into target/train/good and a test set with drawn defects."""
    paths = patchae.list_images(source / "train" / "good")[:most]
    rng = np.random.default_rng(0)
    held = set(rng.permutation(len(paths))[::PARTS].tolist())

    def save(image, *place):
        path = target.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    for i, path in enumerate(paths):
        image = np.asarray(patchae.read_image(path).resize((make_toy.SIZE, make_toy.SIZE)))
        save(image, "test" if i in held else "train", "good", f"{i:03d}.png")
        for draw in VARIANTS if i in held else ():
            mask = Image.new("L", (make_toy.SIZE, make_toy.SIZE))
            defect = draw(image.astype(float), mask, rng).clip(0, 255).astype(np.uint8)
            save(defect, "test", draw.__name__, f"{i:03d}.png")
            save(np.asarray(mask), "ground_truth", draw.__name__, f"{i:03d}_mask.png")


def measured(out, kind):
    """{category: (image AUROC, pixel AUROC)} of one score kind in out/results.csv."""
    if not (out / "results.csv").exists():
        return {}
    with open(out / "results.csv", newline="") as file:
        return {row["category"]: (float(row["image_auroc"]), float(row["pixel_auroc"]))
                for row in csv.DictReader(file) if row["score"] == kind}


def run(name, recipe, args, data, seed):
    """Train (unless there is a checkpoint) and evaluate (unless there is a row); the row's numbers."""
    options, scoring, folder = recipe
    out = args.out / f"{folder}-{seed}"
    kind = scoring[1] if "--score" in scoring else "feature"
    for category in args.category:
        common = ["--data", str(data), "--category", category, "--out", str(out)]
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            code = 0
            if not (out / category / "checkpoint.pt").exists():
                code = train.main([*common, "--seed", str(seed), "--backbone", args.backbone,
                                   "--weights", args.weights, *options, *args.train])
            if not code and category not in measured(out, kind):
                fraction = [] if "--memory-fraction" in scoring else ["--memory-fraction", args.memory_fraction]
                code = evaluate.main([*common, "--no-threshold", *scoring, *fraction])
        if code:
            sys.exit(f"{name}, {category}: failed\n{log.getvalue()}")
        print(f"{name}, seed {seed}, {category}: {measured(out, kind)[category]}", file=sys.stderr, flush=True)
    return measured(out, kind)


def cell(values):
    """AUROCs as a cell: mean ± sd in per cent."""
    spread = f" ± {100 * np.std(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def main():
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("results", "ablations"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--category", nargs="+", required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--memory-fraction", default="1", help="use another --out for another one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows to run, from 0 (default: all)")
    parser.add_argument("--most", type=int, help="ablations: only the first of train/good, to save time")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args, args.train = parser.parse_known_args()
    data, recipes = args.data, RESULTS
    if args.table == "ablations":
        data, recipes = args.out / "held-out", ABLATIONS
        for category in args.category:
            if not (data / category).exists():
                hold_out(args.data / category, data / category, args.most)
    print("| | " + " | ".join(f"{c}: image AUROC | pixel AUROC" for c in args.category) + " |")
    print("|---|" + "---|---|" * len(args.category))
    for number, (name, recipe) in enumerate(recipes.items()):
        if args.rows and number not in args.rows:
            continue
        found = [run(name, recipe, args, data, seed) for seed in args.seeds]
        cells = [cell([f[c][i] for f in found]) for c in args.category for i in (0, 1)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
