"""Repeat the tables of docs/results.md. By hand, not by pytest.

    python tests/recipes.py results --data ROOT --category NAME ... [--weights FILE]
    python tests/recipes.py demo

`results` scores ROOT's own test sets, `demo` the toy set. Everything goes to --out, one folder for
each recipe and seed; what is there already is not run again. Prints a Markdown table: image AUROC /
pixel AUROC / AUPRO in per cent, mean over the seeds, with the standard deviation of the three if it
is 0.05 or more; after a comma the missing share.
"""
import argparse
import contextlib
import csv
import io
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import train  # noqa: E402
from data import make_toy  # noqa: E402

TEXTURES = "--recipe textures --weights random".split()
SLOW = "--recipe textures --encoder-lr 1e-5".split()  # with the weights that are given
STAGES_23 = "--stages 2 3 --steps 0".split()
# name: (options of train.py, method of evaluate.py, folder whose checkpoint is used)
RESULTS = {
    "raw features Φ": ([], "raw", "default"),
    "trained R": ([], "trained", "default"),
    "reconstruction error": ([], "reconstruction", "default"),
    "textures: raw random Φ": (TEXTURES, "raw", "textures"),
    "textures: trained R": (TEXTURES, "trained", "textures"),
    "raw features Φ, stages 2 and 3": (STAGES_23, "raw", "stages-23"),
    "slow: raw ImageNet Φ": (SLOW, "raw", "slow"),
    "slow: trained R": (SLOW, "trained", "slow"),
}
DEMO = {
    "raw random Φ": (["--demo"], "raw", "demo"),
    "trained R": (["--demo"], "trained", "demo"),
    "reconstruction error": (["--demo"], "reconstruction", "demo"),
}


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


def main():
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=("results", "demo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--category", nargs="+", default=[])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args, args.train = parser.parse_known_args()  # what is left goes to every train.py
    data, recipes, columns = args.data, RESULTS, [(name, "test") for name in args.category]
    if args.table == "demo":
        make_toy.draw_if_absent(make_toy.ROOT)
        data, recipes = make_toy.ROOT, DEMO
        columns = list(itertools.product(("flange", "felt"), ("test", "test_faint")))
    elif not (args.data and args.category):
        parser.error("--data ROOT and --category NAME are missing")
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
