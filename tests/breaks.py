"""Break it yourself: damage the code on purpose, one place at a time, and see which test notices.

    python tests/breaks.py                 all breaks, a table
    python tests/breaks.py --only NAME     one of them, with what the test says
    python tests/breaks.py --only NAME --demo   in place of the tests: what the demo prints then
    python tests/breaks.py --list          their names and what each would do to a user

Every break is made in a temporary copy; the project itself is not changed. Exit code: the number of
breaks that no test noticed.

    python tests/breaks.py --exercise E4   takes the body of nearest_distance out of patchae.py
    python tests/breaks.py --exercise E3   takes the body of patch_error out of it
    python tests/breaks.py --solution      puts both back, and keeps yours as patchae.py.mine

By hand, not by pytest.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EQUATIONS, MODEL, TRAIN, EVALUATE, DATA = (
    f"tests/test_{name}.py" for name in ("equations", "model", "train", "evaluate", "data"))

# name, file, text to replace (a short one, it must stand there exactly once), replacement,
# what it would do to a user, tests that should notice
BREAKS = [
    # ---- the equations
    ("E1-no-inner-relu", "patchae.py", "F.relu(self.W1(features))", "self.W1(features)",
     "the encoder is one linear layer: not the paper's", [EQUATIONS]),
    ("E1-no-outer-relu", "patchae.py", "F.relu(self.W2(hidden))", "self.W2(hidden)",
     "R may be negative: not the paper's encoder", [EQUATIONS]),
    ("E2-relu-at-the-end", "patchae.py", "return self.V2(hidden)", "return F.relu(self.V2(hidden))",
     "a pixel that should become darker stops learning at 0", [EQUATIONS]),
    ("E2-no-activation", "patchae.py", "F.relu(self.V1(r))", "self.V1(r)",
     "the decoder is one linear layer", [EQUATIONS]),
    ("E2-sees-neighbours", "patchae.py", "nn.Conv2d(c3, pixels, 1)",
     "nn.Conv2d(c3, pixels, 3, padding=1)",
     "a neighbour's vector can draw a defect that this one hides: the thesis is gone", [MODEL]),
    ("E3-sum", "patchae.py", "patch_error(rebuilt, patches).mean()",
     "patch_error(rebuilt, patches).sum()",
     "the loss depends on how many patches there are", [EQUATIONS]),
    ("E3-absolute", "patchae.py", "(rebuilt - patches).square()", "(rebuilt - patches).abs()",
     "another loss than the formula says", [EQUATIONS]),
    ("E4-farthest", "patchae.py", "vectors).amin(dim=1)", "vectors).amax(dim=1)",
     "normal patches score like defects", [EQUATIONS]),
    ("E4-last-image-left-out", "patchae.py", "for vectors in memory:",
     "for vectors in memory[:-1]:",
     "parts that look like the last normal image are called defective", [EQUATIONS]),
    ("E5-mean", "patchae.py", ".topk(highest).values.mean(dim=1)", ".mean(dim=1)",
     "a scratch on one patch of 1024 disappears in the mean", [EQUATIONS]),
    # ---- artificial defects and training
    ("defects-wrong-mask", "patchae.py", "|= alpha > 0", "|= alpha > 0.5",
     "faint parts of defects are no defect for the loss", [EQUATIONS]),
    ("paste-from-itself", "patchae.py", "draw(other, h, w)", "draw(image, h, w)",
     "what is pasted into an image comes from the same image", [EQUATIONS]),
    ("clean-target", "train.py",
     "loss = model.loss(image.to(model.device), mask.to(model.device))",
     "loss = patchae.training_loss(model(image.to(model.device)), images[i:i + 1].to(model.device)"
     " / 255, mask.to(model.device), config.patch_size, config.defect_weight)",
     "a denoising auto-encoder: it learns to remove defects, the opposite of the paper", [TRAIN]),
    ("defects-count-like-all-else", "patchae.py", "if not mask.any():", "if True:",
     "few patches have a defect, so they are rebuilt worst", [EQUATIONS]),
    ("start-random", "patchae.py", 'if start == "identity":  #', 'if start == "none":  #',
     "training starts with distances that mean little", [MODEL]),
    ("drawing-starts-at-black", "patchae.py", "self.V2.bias, 1 / 2", "self.V2.bias, 0",
     "steps are spent on learning the mean colour", [MODEL]),
    ("backbone-thaws", "patchae.py", "requires_grad_(config.finetune_backbone)",
     "requires_grad_(True)", "a frozen backbone is trained", [TRAIN]),
    ("statistics-of-the-batch", "patchae.py", "        self.backbone.eval()\n", "",
     "the features of an image depend on its own defects", [MODEL]),
    # ---- features
    ("colours-not-imagenets", "patchae.py", "normalize(image, IMAGENET_MEAN, IMAGENET_STD)",
     "image", "the backbone sees colours that it was not trained on", [MODEL]),
    ("border-plain-mean", "patchae.py", "total / (k * count.sqrt())", "total / count",
     "every good texture is most anomalous at its own edge", [EQUATIONS, MODEL]),
    ("border-zeros", "patchae.py", 'module.padding_mode = "reflect"',
     'module.padding_mode = "zeros"',
     "the border of a normal image looks like an edge that no part has", [MODEL]),
    ("scales-skipping", "patchae.py", "F.avg_pool2d(fine, common // grid)",
     'F.interpolate(fine, (grid, grid), mode="nearest")',
     "three quarters of the finest map are never looked at", [EQUATIONS]),
    # ---- the decision
    ("nothing-left-out", "patchae.py", "self.memory[:i] + self.memory[i + 1:])", "self.memory)",
     "each normal image is compared with itself: the threshold is nearly 0", [MODEL]),
    ("raw-is-trained", "evaluate.py", "model = patchae.build_model(model.config, model.device)",
     "pass", "the comparison with untrained features shows no gain", [EVALUATE]),
    ("is-anomalous-inverted", "evaluate.py", "one.score, one.score > threshold, heatmap",
     "one.score, one.score < threshold, heatmap", "good parts are thrown away", [EVALUATE]),
    ("counts-swapped", "evaluate.py", "above the threshold {false} of", "above the threshold "
     "{len(above) - false} of", "false alarms are reported as found defects", [EVALUATE]),
    ("small-defects-count-less", "evaluate.py", "1 / sizes[numbers], 1.0", "1.0, 1.0",
     "AUPRO is dominated by large defects, as pixel AUROC is", [EVALUATE]),
    ("cropped", "data/images.py", "image.resize((size, size), Image.Resampling.BILINEAR)",
     "image.resize((size, size), box=(4, 4, 60, 60))",
     "defects near the edge are never seen", [EVALUATE]),
    ("orientation-ignored", "data/images.py", "ImageOps.exif_transpose(image, in_place=True)",
     "pass", "photographs lie on their side", [DATA]),
    ("small-defects-vanish", "data/images.py", "Image.Resampling.BOX", "Image.Resampling.NEAREST",
     "a scratch of one pixel is no defect in a smaller mask, or falls into pieces", [DATA]),
    ("half-written", "patchae.py",
     "        part.write_bytes(content)\n        part.replace(path)\n",
     "        Path(path).write_bytes(content)\n", "a full disk loses the old checkpoint", [MODEL]),
    ("prediction-replaced", "evaluate.py", "free.mkdir(parents=True)",
     "free.mkdir(parents=True, exist_ok=True)", "a second prediction overwrites the first",
     [EVALUATE]),
]


EXERCISES = {"E3": "patch_error", "E4": "nearest_distance"}


def take_out(label):
    """Put an empty body into the function of an equation in patchae.py."""
    path = ROOT / "patchae.py"
    text = path.read_text(encoding="utf-8")
    node, = [node for node in ast.parse(text).body
             if getattr(node, "name", "") == EXERCISES[label]]
    lines = text.splitlines(keepends=True)
    first = node.body[1].lineno  # behind the docstring
    lines[first - 1:node.end_lineno] = [f"    raise NotImplementedError('{label}: write this')\n"]
    original = path.with_name("patchae.py.original")
    if not original.exists():
        shutil.copy(path, original)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{node.name} in patchae.py is empty from line {first} on. Write it, and try:\n"
          f"    python -m pytest -q {EQUATIONS} -k {label}\n"
          "    python tests/breaks.py --solution    puts the original back")


def put_back():
    """Put the original patchae.py back; keep the exercise beside it."""
    path = ROOT / "patchae.py"
    original = path.with_name("patchae.py.original")
    if not original.exists():
        sys.exit("error: no exercise was begun; patchae.py is as it is")
    path.replace(path.with_name("patchae.py.mine"))
    original.replace(path)
    print("patchae.py is the original again; yours is patchae.py.mine")


def apply(copy, file, old, new, name):
    """Replace `old` by `new` in a file of the copy; a clear line if it is not there once."""
    text = (copy / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{name}: the text to replace stands {text.count(old)} times in {file}, not once: "
                 f"{old!r}")
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")


def run_damaged(name, file, old, new, commands):
    """What the commands print, one after the other, in a damaged copy of the project."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "toy", "__pycache__", "*.png")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=ignored)
        apply(copy, file, old, new, name)
        return "".join(subprocess.run([sys.executable, *command], cwd=copy, capture_output=True,
                                      text=True).stdout for command in commands)


def main():
    """Try the breaks that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="this break alone, with pytest's output")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--demo", action="store_true", help="with --only: run the demo instead")
    parser.add_argument("--exercise", choices=EXERCISES, help="empty the function of an equation")
    parser.add_argument("--solution", action="store_true", help="put the original back")
    args = parser.parse_args()
    if args.exercise:
        return take_out(args.exercise)
    if args.solution:
        return put_back()
    chosen = [one for one in BREAKS if args.only in (None, one[0])]
    if not chosen:
        sys.exit(f"--only {args.only}: no such break; --list shows them")
    begin = time.monotonic()
    unnoticed = 0
    for name, file, old, new, effect, tests in chosen:
        if args.list:
            print(f"{name:30} {effect}")
            continue
        commands = [["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                     "-k", "not readme and not README", *tests]]
        if args.only and args.demo:
            commands = [["train.py", "--demo"], ["evaluate.py", "--demo"]]
        output = run_damaged(name, file, old, new, commands)
        if args.only:
            print(f"{file}\n- {old}\n+ {new}\n\n{output}")
        if args.only and args.demo:
            return 0
        noticed = re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", output, re.M)
        unnoticed += not noticed
        verdict = f"noticed by {noticed[0]}" if noticed else "NOT NOTICED"
        print(f"{name:30} {verdict:70} {effect}", flush=True)
    if not args.list:
        print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks noticed, "
              f"{time.monotonic() - begin:.0f} s")
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
