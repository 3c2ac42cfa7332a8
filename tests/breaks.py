"""Break it yourself: damage the code on purpose, one line at a time, and see which test notices.

    python tests/breaks.py                 all breaks, a table
    python tests/breaks.py --only NAME     one of them, with what the test says
    python tests/breaks.py --list          their names and what each would do to a user

Every break is made in a temporary copy; the project itself is never changed. By hand, not by pytest.
Exit code: the number of breaks that no test noticed.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EQUATIONS, MODEL, DATA, SCRIPTS = (
    f"tests/test_{name}.py" for name in ("equations", "model", "data", "scripts"))

# name, file, text to replace (it must stand there exactly once), replacement,
# what it would do to a user, tests that should notice
BREAKS = [
    # ---- equations
    ("E1-no-inner-relu", "patchae.py",
     "self.encoder = nn.Sequential(nn.Conv2d(c, c3, 1), nn.ReLU(),",
     "self.encoder = nn.Sequential(nn.Conv2d(c, c3, 1), nn.Identity(),",
     "the encoder is one linear layer: not the paper's", [EQUATIONS]),
    ("E1-no-outer-relu", "patchae.py",
     "nn.Conv2d(c3, c3, 1), nn.ReLU())\n", "nn.Conv2d(c3, c3, 1), nn.Identity())\n",
     "R may be negative: not the paper's encoder", [EQUATIONS]),
    ("E1-skipped", "patchae.py",
     "    return encoder(features)", "    return features",
     "training changes nothing that is scored", [EQUATIONS]),
    ("E2-relu-at-the-end", "patchae.py",
     "    return decoder(r)", "    return F.relu(decoder(r))",
     "nothing darker than the mean can be drawn", [EQUATIONS]),
    ("E2-no-activation", "patchae.py",
     "self.decoder = nn.Sequential(nn.Conv2d(c3, c3, 1), nn.ReLU(),",
     "self.decoder = nn.Sequential(nn.Conv2d(c3, c3, 1), nn.Identity(),",
     "the decoder is one linear layer", [EQUATIONS]),
    ("E2-sees-neighbours", "patchae.py",
     "nn.ReLU(), nn.Conv2d(c3, pixels, 1))", "nn.ReLU(), nn.Conv2d(c3, pixels, 3, padding=1))",
     "a neighbour's vector can draw a defect that this one hides: the thesis is gone", [MODEL]),
    ("E3-sum", "patchae.py",
     "    return (rebuilt - patches).square().mean()", "    return (rebuilt - patches).square().sum()",
     "the step size depends on how many patches there are", [EQUATIONS]),
    ("E3-absolute", "patchae.py",
     "    return (rebuilt - patches).square().mean()", "    return (rebuilt - patches).abs().mean()",
     "another loss than the formula says", [EQUATIONS]),
    ("E3-half", "patchae.py",
     "    return (rebuilt - patches).square().mean()", "    return (rebuilt - patches).square().mean() / 2",
     "numbers that do not compare with the formula's", [EQUATIONS]),
    ("E4-farthest", "patchae.py",
     "torch.cdist(queries, vectors).amin(dim=1)", "torch.cdist(queries, vectors).amax(dim=1)",
     "normal patches score like defects", [EQUATIONS]),
    ("E4-squared", "patchae.py",
     "torch.cdist(queries, vectors).amin(dim=1)", "torch.cdist(queries, vectors).amin(dim=1).square()",
     "scores that are no distances", [EQUATIONS]),
    ("E4-last-image-left-out", "patchae.py",
     "    for vectors in memory:", "    for vectors in memory[:-1] or memory:",
     "what only the last normal image shows is called a defect", [EQUATIONS]),
    ("E4-only-last-image", "patchae.py",
     "        nearest = torch.minimum(nearest, torch.cdist(queries, vectors).amin(dim=1))",
     "        nearest = torch.cdist(queries, vectors).amin(dim=1)",
     "one normal image is all that is remembered", [EQUATIONS]),
    ("E5-mean", "patchae.py",
     "anomaly_map.flatten(1).topk(highest).values.mean(dim=1)", "anomaly_map.mean(dim=(1, 2))",
     "small defects drown in the normal rest", [EQUATIONS]),
    ("E5-sum", "patchae.py",
     "topk(highest).values.mean(dim=1)", "topk(highest).values.sum(dim=1)",
     "scores that are no distances and stand above every threshold", [EQUATIONS]),
    ("E5-lowest", "patchae.py",
     "topk(highest)", "topk(highest, largest=False)",
     "the calmest patches decide", [EQUATIONS]),
    ("E5-maximum", "patchae.py",
     "highest=3)", "highest=1)",
     "one noisy place decides", [EQUATIONS]),
    # ---- artificial defects
    ("defects-no-blending", "patchae.py",
     "image[box] = (1 - alpha) * image[box] + alpha * paint", "image[box] = image[box] + alpha * paint",
     "every defect is brighter than the part", [EQUATIONS]),
    ("defects-wrong-mask", "patchae.py",
     "mask[box] |= alpha > 0", "mask[box] |= alpha <= 0",
     "the loss weighs the patches beside the defects", [EQUATIONS]),
    ("defects-always-one", "patchae.py",
     "for _ in range(random.randint(1, MOST_DEFECTS)):", "for _ in range(1):",
     "less to learn from in every image", [EQUATIONS]),
    ("defects-last-kind-never", "patchae.py",
     "random.choice((altered_paste, scratch, stain))", "random.choice((altered_paste, scratch))",
     "stains are never learned", [EQUATIONS]),
    ("defects-square-boxes", "patchae.py",
     "        w = math.ceil(width * random.uniform(*BOX_SIDE))", "        w = min(h, width)",
     "defects ignore the image's aspect", [EQUATIONS]),
    ("defects-change-the-input", "patchae.py",
     "    image = image.clone()\n", "",
     "the normal images fill up with defects while training runs", [EQUATIONS]),
    ("paste-from-itself", "train.py",
     "patchae.add_defects(images[i] / 255, images[other] / 255)",
     "patchae.add_defects(images[i] / 255, images[i] / 255)",
     "pasted patches come from the image itself and hide in textures", [MODEL]),
    ("paste-no-gain", "patchae.py",
     "return (patch * gain).clamp(0, 1)", "return patch.clamp(0, 1)",
     "pasted patches keep their colours and are hard to tell", [EQUATIONS]),
    ("paste-no-flip", "patchae.py",
     ".flip(random.choice((1, 2)))", "",
     "a paste at its own place changes nothing", [EQUATIONS]),
    ("scratch-thick", "patchae.py",
     "width = random.choice((1, 3))", "width = random.choice((1, 7))",
     "scratches become bands", [EQUATIONS]),
    ("scratch-opaque", "patchae.py",
     "return torch.rand(3, 1, 1), alpha * random.uniform(*OPACITY)", "return torch.rand(3, 1, 1), alpha",
     "faint scratches are never learned", [EQUATIONS]),
    ("stain-opaque", "patchae.py",
     "    return paint, alpha * random.uniform(*OPACITY)", "    return paint, alpha",
     "faint stains are never learned", [EQUATIONS]),
    ("stain-always-cut-out", "patchae.py",
     "random.choice((HARD, SOFT))", "HARD",
     "fading stains are never learned", [EQUATIONS]),
    ("stain-never-cut-out", "patchae.py",
     "random.choice((HARD, SOFT))", "SOFT",
     "stains with a sharp rim are never learned", [EQUATIONS]),
    ("stain-one-grain", "patchae.py",
     "grain = random.randint(*GRAIN)", "grain = GRAIN[0]",
     "only the finest noise is learned", [EQUATIONS]),
    ("stain-never-one-colour", "patchae.py",
     "math.ceil(h / grain), math.ceil(w / grain))", "2 + h // grain, 2 + w // grain)",
     "plain stains are never learned", [EQUATIONS]),
    ("stain-grey", "patchae.py",
     "cells = torch.rand(1, 3, ", "cells = torch.rand(1, 1, ",
     "coloured stains are never learned", [EQUATIONS]),
    ("blobs-round", "patchae.py",
     "disc * (1 + noise / 2)", "disc * (1 + 0 * noise)",
     "every blob is the same ellipse", [EQUATIONS]),
    # ---- features
    ("colours-not-imagenets", "patchae.py",
     "(0.485, 0.456, 0.406)", "(0.5, 0.5, 0.5)",
     "the backbone sees other colours than it was trained with", [MODEL]),
    ("drawing-starts-at-black", "patchae.py",
     "self.decoder[2].bias, 1 / 2)", "self.decoder[2].bias, 0)",
     "the first steps learn the mean colour, and less is rebuilt in the end", [MODEL]),
    ("rebuilt-unclipped", "train.py",
     "model.config.patch_size).clamp(0, 1)", "model.config.patch_size)",
     "the missing share counts what no picture can show", [MODEL]),
    ("border-zeros", "patchae.py",
     'module.padding_mode = "reflect"', 'module.padding_mode = "zeros"',
     "the backbone answers to an edge that no part has", [MODEL]),
    ("border-plain-mean", "patchae.py",
     "    return mean / share.sqrt()", "    return mean / share",
     "good textures score highest at their own border", [EQUATIONS]),
    ("border-too-quiet", "patchae.py",
     "    return mean / share.sqrt()", "    return mean",
     "defects at the border are missed", [EQUATIONS]),
    ("contrast-untempered", "patchae.py",
     "temper_contrast(m) for m in", "m for m in",
     "highlights outweigh defects in the dark", [MODEL]),
    ("contrast-gone", "patchae.py",
     "length.clamp(min=TINY).sqrt()", "length.clamp(min=TINY)",
     "the noise of a plain background scores like a defect", [EQUATIONS]),
    ("scales-nearest", "patchae.py",
     'mode = "area" if m.shape[-1] > grid else "bilinear"',
     'mode = "area" if m.shape[-1] > grid else "nearest"',
     "blocky maps", [EQUATIONS]),
    ("scales-skipping", "patchae.py",
     'mode = "area" if m.shape[-1] > grid else "bilinear"', 'mode = "nearest"',
     "three quarters of the finest stage are never looked at", [EQUATIONS]),
    ("scales-not-averaged", "patchae.py",
     "        m = average_neighbours(m, neighbourhood) ", "        m = m ",
     "a part that moved by a pixel scores as a defect", [EQUATIONS]),
    ("statistics-of-the-batch", "patchae.py",
     "    return backbone.eval()", "    return backbone",
     "what an image scores depends on its neighbours in the batch", [MODEL]),
    # ---- training
    ("start-inverted", "patchae.py",
     "        if not config.channels:", "        if config.channels:",
     "training starts with distances lost", [MODEL]),
    ("clean-target", "train.py",
     "patchae.training_loss(model, image.to(model.device), mask.to(model.device))",
     "patchae.reconstruction_loss(model(image.to(model.device)), patchae.patchify("
     "images[i:i + 1].to(model.device) / 255, config.patch_size))",
     "a denoising auto-encoder: it learns to remove defects, the paper's method turned round", [MODEL]),
    ("no-defects-in-training", "train.py",
     "if not config.defects:", "if config.defects:",
     "defects are never learned", [MODEL]),
    ("no-defects-has-no-effect", "train.py",
     "if not config.defects:", "if False:",
     "the experiment without defects trains with them", [SCRIPTS]),
    ("no-defects-keeps-the-mask", "train.py",
     "torch.zeros_like(mask)", "mask",
     "the experiment without defects weighs random patches more", [SCRIPTS]),
    ("backbone-thaws", "patchae.py",
     "requires_grad_(config.finetune_backbone)", "requires_grad_(True)",
     "every training moves the backbone, and takes twice as long", [MODEL]),
    ("backbone-always-frozen", "patchae.py",
     "requires_grad_(config.finetune_backbone)", "requires_grad_(False)",
     "--finetune-backbone does nothing", [MODEL]),
    ("defects-count-as-little-as-they-are", "patchae.py",
     "    if defective.any():\n", "    if False:\n",
     "defects are a small part of the loss and stay badly rebuilt", [MODEL]),
    ("other-patches-than-features", "patchae.py",
     "(rebuilt[defective], patches[defective])", "(rebuilt[defective], patches[defective].flip(0))",
     "a vector learns to draw another place's patch", [MODEL]),
    ("no-schedule", "train.py",
     "        schedule.step()\n", "",
     "the rate never falls and the last steps stay rough", [MODEL]),
    ("schedule-restarts", "train.py",
     "CosineAnnealingLR(optimizer, config.steps)",
     "CosineAnnealingWarmRestarts(optimizer, max(1, config.steps // 4))",
     "the rate jumps up again and again", [MODEL]),
    ("always-the-same-images", "train.py",
     "i = random.randrange(len(images))", "i = step % min(4, len(images))",
     "only the first images are learned", [MODEL]),
    ("one-rate-for-all", "train.py",
     '{"params": model.encoder.parameters(), "lr": config.encoder_lr}',
     '{"params": model.encoder.parameters(), "lr": config.lr}',
     "the encoder moves faster than distances bear", [MODEL]),
    ("loss-of-the-last-step", "train.py",
     "        losses.append(loss.item())", "        losses = [loss.item()] * (len(losses) + 1)",
     "a log of single steps, rough as they are", [SCRIPTS]),
    ("time-left-as-if-all-steps-were-to-come", "train.py",
     "(model.config.steps - step)", "model.config.steps",
     "one waits for nothing", [SCRIPTS]),
    ("divergence-unnoticed", "train.py",
     "if not loss + missing < DIVERGED:", "if loss + missing > DIVERGED:",
     "hours of training with a loss of nan", [DATA]),
    ("rebuilt-of-everything", "train.py",
     "missing = ((rebuild_images(model, defected) - defected).square() * masks).sum().item()",
     "missing = (rebuild_images(model, defected) - defected).square().sum().item()",
     "the missing share counts pixels without a defect", [SCRIPTS]),
    ("trains-on-test", "train.py",
     'list_images(args.data / name / "train" / "good")', "list_images(args.data / name)",
     "test images and masks become normal images", [SCRIPTS]),
    ("skips-what-has-other-options", "train.py",
     "if patchae.load_checkpoint(checkpoint)[0].config == config:", "if True:",
     "--skip-finished keeps results of another configuration", [SCRIPTS]),
    ("replaces-the-data-set", "train.py",
     'if folder.exists() and not (folder / "train.csv").exists():', "if False:",
     "--out DATA puts results in place of one's own images", [DATA]),
    ("one-failure-stops-all", "train.py",
     "patchae.exit_code(train_category, name, args, config, device)",
     "train_category(name, args, config, device) or 0",
     "a broken image ends a night's training of all categories", [DATA]),
    ("failure-is-success", "patchae.py",
     "        return 2\n", "        return 0\n",
     "a shell script goes on after bad input", [DATA]),
    ("floats-unchecked", "patchae.py",
     "0 <= v <= 1 if unit", "not v > 1 if unit",
     "--lr nan is accepted", [DATA]),
    ("patches-do-not-tile", "patchae.py",
     "        if self.image_size % self.patch_size:", "        if False:",
     "--patch-size 12 with --image-size 256 ends in a traceback", [DATA]),
    ("one-good-layer-is-enough", "patchae.py",
     "not all(0 <= v", "not any(0 <= v",
     "--layers 0 2 ends in a traceback", [DATA]),
    ("unfit-weights-are-accepted", "patchae.py",
     "        if missing:\n", "        if False:\n",
     "weights of another network are half loaded, the rest stays random", [DATA]),
    ("preview-mask-inverted", "train.py",
     "masks.expand_as(defected)", "(~masks).expand_as(defected)",
     "a picture that explains the opposite", [SCRIPTS]),
    # ---- memory, threshold
    ("memory-first-vectors", "patchae.py",
     "torch.randperm(P)[:n]", "torch.arange(P)[:n]",
     "--memory-fraction remembers the upper part of every image only", [MODEL]),
    ("memory-seed-ignored", "patchae.py",
     "torch.manual_seed(model.config.seed)", "torch.manual_seed(0)",
     "--seed does not change the memory", [MODEL]),
    ("memory-unseeded", "patchae.py",
     "    torch.manual_seed(model.config.seed)\n", "",
     "the same image has another score at each run", [MODEL]),
    ("vectors-transposed", "patchae.py",
     "nearest.view(len(r), *r.shape[2:])", "nearest.view(len(r), *r.shape[2:]).mT",
     "heatmaps glow at the mirrored place", [MODEL, SCRIPTS]),
    ("nothing-left-out", "train.py",
     "memory[:i] + memory[i + 1:]", "memory",
     "the threshold is zero and every new image is anomalous", [SCRIPTS]),
    ("all-images-for-the-threshold", "train.py",
     "math.ceil(len(images) / most)", "1",
     "--threshold-images saves no time", [SCRIPTS]),
    ("raw-is-trained", "evaluate.py",
     "        model.encoder = torch.nn.Identity()", "        model.eval()",
     "--score backbone shows trained R and hides what training brings", [SCRIPTS]),
    ("quantile-turned-round", "evaluate.py",
     "torch.quantile(normal_scores, args.quantile)", "torch.quantile(normal_scores, 1 - args.quantile)",
     "nearly all good images are called anomalous", [SCRIPTS]),
    # ---- numbers and pictures
    ("unmasked-defects-are-normal", "evaluate.py",
     'for n, (_, kind, mask) in enumerate(samples) if kind == "good" or mask]',
     "for n, (_, kind, mask) in enumerate(samples)]",
     "defects without a mask count as normal pixels", [SCRIPTS, DATA]),
    ("mean-over-all-kinds", "evaluate.py",
     "for row in table if row[1] == score]", "for row in table]",
     "the mean mixes the method with its baselines", [SCRIPTS]),
    ("mean-of-nan", "evaluate.py",
     "np.ma.masked_invalid(np.array(rows, dtype=float))", "np.ma.array(np.array(rows, dtype=float))",
     "one category without masks leaves no mean pixel AUROC", [SCRIPTS]),
    ("scores-unranked", "evaluate.py",
     "    rows.sort(key=lambda row: -row[2])\n", "",
     "the most anomalous images are anywhere in the table", [SCRIPTS]),
    ("is-anomalous-inverted", "evaluate.py",
     "else scores[n] > threshold", "else scores[n] < threshold",
     "good parts are thrown away, defective ones are sold", [SCRIPTS]),
    ("undecided-is-normal", "evaluate.py",
     'verdict = "" if math.isnan(threshold) else scores[n] > threshold', "verdict = scores[n] > threshold",
     "without a threshold every image is called normal", [SCRIPTS]),
    ("predict-needs-the-data-set", "evaluate.py",
     "if args.data or not (args.predict and names):", "if True:",
     "a checkpoint on another machine is of no use", [SCRIPTS]),
    ("heatmaps-of-others", "evaluate.py",
     "heat_pictures(path, maps[n], scale)", "heat_pictures(path, maps[-1 - n], scale)",
     "a good part glows in place of the defective one", [SCRIPTS]),
    ("heatmaps-by-name-alone", "evaluate.py",
     "name = path.relative_to(root).as_posix()", "name = path.name",
     "images of the same name in two folders share one heatmap", [SCRIPTS]),
    ("masks-of-other-columns", "evaluate.py",
     "read_truth(masks[n], paths[n], config.image_size) for n in shown]",
     "read_truth(masks[n], paths[n], config.image_size) for n in first]",
     "overview.png shows good parts with the mask of a defect", [SCRIPTS]),
    ("mask-in-the-heatmaps-row", "evaluate.py",
     "columns[n].insert(1, mask", "columns[n].insert(2, mask",
     "the second row of overview.png is no mask", [SCRIPTS]),
    ("scale-ignores-threshold", "evaluate.py",
     "scale = threshold if threshold > 0 else", "scale = 1.0 if threshold > 0 else",
     "good parts glow or defects stay dark", [SCRIPTS]),
    ("counts-swapped", "evaluate.py",
     "good, bad = (scores > threshold)[~defective], (scores > threshold)[defective]",
     "bad, good = (scores > threshold)[~defective], (scores > threshold)[defective]",
     "the printed counts blame the good images", [SCRIPTS]),
    ("opacity-fixed", "evaluate.py",
     "np.interp(level, OPACITY_RISES, (0, MOST_OPACITY))", "np.full_like(level, MOST_OPACITY)",
     "normal images are tinted all over", [SCRIPTS]),
    # ---- files
    ("cropped", "data/images.py",
     "read_image(path).resize((size, size), Image.Resampling.BILINEAR)",
     "ImageOps.fit(read_image(path), (size, size), Image.Resampling.BILINEAR)",
     "defects at the ends of a broad image are never seen", [SCRIPTS]),
    ("orientation-ignored", "data/images.py",
     "return ImageOps.exif_transpose(file)", "return file.copy()",
     "photographs lie on their side, and masks do not fit", [DATA]),
    ("transparent-is-black", "data/images.py",
     'return lay_on(image, "white")', 'return lay_on(image, "black")',
     "cut-out parts have another background than data/README.md says", [DATA]),
    ("hidden-files-count", "data/images.py",
     ' in SUFFIXES\n                   and not any(part.startswith(".") '
     "for part in path.relative_to(folder).parts))", " in SUFFIXES)",
     "a thumbnail folder is part of the normal images", [DATA]),
    ("clipped-16-bit", "data/images.py",
     'if image.mode[0] in "IF":', 'if image.mode[0] in "F":',
     "16-bit images are all white", [DATA]),
    ("mask-of-another-image", "data/images.py",
     'mask.stem in (path.stem, f"{path.stem}_mask")', "mask.stem.startswith(path.stem)",
     "image 1 is measured with the mask of image 10", [DATA]),
    ("mask-shrinks", "data/images.py",
     "defect.resize((size, size), Image.Resampling.NEAREST)",
     'defect.convert("L").resize((size, size), 2).point(lambda v: 255 * (v == 255)).convert("1")',
     "masks shrink by what a bilinear resize blurs", [DATA]),
    ("mask-only-255", "data/images.py",
     ".any(axis=2))", ".min(axis=2) == 255)",
     "masks with other values than 255 are empty", [DATA]),
    ("half-written", "patchae.py",
     "            unfinished = Path(folder) / path.name\n            yield unfinished\n"
     "            shutil.rmtree(path, ignore_errors=True)  # of a folder; a file is replaced\n"
     "            unfinished.replace(path)\n",
     "            shutil.rmtree(path, ignore_errors=True)\n            yield path\n",
     "Ctrl-C leaves half a result in place of the last one", [DATA]),
    # ---- toy set
    ("toy-masks-shifted", "data/make_toy.py",
     'save(np.asarray(mask), "ground_truth"', 'save(np.roll(np.asarray(mask), 8, axis=1), "ground_truth"',
     "pixel AUROC is measured at the wrong place", [DATA]),
    ("toy-chip-beyond-the-part", "data/make_toy.py",
     "disc(ImageDraw.Draw(mask), middle, SIZE, outline=0, width=round((1 - RIM) * SIZE))", "pass",
     "background is called a defect", [DATA]),
    ("toy-nothing-at-the-border", "data/make_toy.py",
     "n % BORDER_EVERY == 0", "n < 0",
     "defects at the border are never asked for", [DATA]),
]


def apply(copy, file, old, new, name):
    """Replace `old` by `new` in a file of the copy; a clear line where it no longer fits the code."""
    text = (copy / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{name}: the text to replace stands {text.count(old)} times in {file}, not once: {old!r}")
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")


def tried(name, file, old, new, tests):
    """What pytest prints for one break, made in a temporary copy of the project."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "toy", "__pycache__", ".pytest_cache", "*.png")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=ignored)
        apply(copy, file, old, new, name)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   "-k", "not readme and not README", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout


def main():
    """Try the breaks that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="this break alone, with pytest's output")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    args = parser.parse_args()
    chosen = [one for one in BREAKS if args.only in (None, one[0])]
    if not chosen:
        sys.exit(f"--only {args.only}: no such break; --list shows them")
    begin = time.monotonic()
    unnoticed = 0
    for name, file, old, new, effect, tests in chosen:
        if args.list:
            print(f"{name:30} {effect}")
            continue
        output = tried(name, file, old, new, tests)
        noticed = re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", output, re.M)
        unnoticed += not noticed
        verdict = f"noticed by {noticed[0]}" if noticed else "NOT NOTICED"
        print(f"{name:30} {verdict:70} {effect}", flush=True)
        if args.only:
            print(f"\n{file}\n- {old}\n+ {new}\n\n{output}")
    if not args.list:
        print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks noticed, "
              f"{time.monotonic() - begin:.0f} s")
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
