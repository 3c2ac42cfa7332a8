"""Train Patch AE on the normal images of one or more categories. Never opens test/.

    python train.py --demo
    python train.py --data ROOT --category NAME [NAME ...]

Reads ROOT/NAME/train/good. Writes OUT/NAME/checkpoint.pt, train.csv and defects.png, which replace
all that an earlier training and its evaluations left in OUT/NAME.
"""
import argparse
import csv
import dataclasses
import math
import random
import time
from functools import partial

import torch
from torchvision.utils import save_image

import patchae
from data import make_toy
from data.files import (check_replaceable, check_writable, exit_code, make_parser, parse_args, run,
                        whole)
from data.images import choose_categories, list_images, progress, read_images
from patchae import DEMO, Config, PatchAE, UserError

REPORTS = 10     # our choice: lines of the log
PREVIEWS = 6     # our choice: rows of defects.png, as many as fit on a screen
CHECKED = 24     # our choice: images with new artificial defects, for the missing share
DIVERGED = 1e4   # our choice: loss and missing share together; grey patches stay far below it
CHECK_SEED = 2**31  # added to the seed, so that the new defects are not those of training


# ---- options ------------------------------------------------------------------------------------
def parse(argv=None):
    """The command line: (args, the Config that its options make). UserError."""
    parser, group = make_parser(__doc__)
    group.add_argument("--skip-finished", action="store_true",
                       help="leave out what was trained before with the same images and options "
                       "(of --weights FILE only the name is compared)")
    add_method_options(parser.add_argument_group("method"))
    add_training_options(parser.add_argument_group("training"))
    args = parse_args(parser, argv)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)
             if hasattr(args, field.name)}
    if "layers" in given:
        given["layers"] = tuple(sorted(set(given["layers"])))
    config = dataclasses.replace(DEMO if args.demo else Config(), **given)
    patchae.check_config(config)
    return args, config


def option(group, name, kind, text):
    """Add an option that is absent from the parsed arguments unless it is given."""
    group.add_argument(name, type=kind, metavar=kind.__name__.upper(), default=argparse.SUPPRESS,
                       help=text)


def switch(group, name, text):
    """Add an option --NAME with its opposite --no-NAME, likewise."""
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       help=text)


def add_method_options(group):
    """The options that decide how an image becomes vectors."""
    group.add_argument("--backbone", choices=patchae.BACKBONES, default=argparse.SUPPRESS,
                       help="network that gives the features (default: wide_resnet50_2)")
    option(group, "--weights", str, "its weights: imagenet (downloaded once), random, or a file "
           "with a torchvision state dict (default: imagenet)")
    group.add_argument("--layers", type=int, nargs="+", metavar="STAGE", default=argparse.SUPPRESS,
                       help="stages of the backbone to join, 1 to 4 (default: 1 2 3)")
    option(group, "--image-size", int, "side to which every image is resized, in pixels: a "
           "multiple of 32 from 64 to 2048 (default: 384)")
    option(group, "--patch-size", int, "side of a patch, in pixels: a multiple of 4 from 4 to 32 "
           "that divides the image size (default: 12)")
    option(group, "--neighbourhood", int, "side of the square of places that are averaged: 1 (no "
           "average), 3, 5, 7 or 9 (default: 3)")
    option(group, "--channels", int, "length of the vectors R, from 1 to 8192 (default: as many "
           "as the joined stages have)")
    group.add_argument("--start", choices=("identity", "random"), default=argparse.SUPPRESS,
                       help="how the encoder begins: as the identity, so that R equals the "
                       "features, or with random weights (default: identity)")
    option(group, "--memory-fraction", float, "part of each normal image's vectors that is kept, "
           "drawn at random, from 0 to 1 (default: 1, all)")


def add_training_options(group):
    """The options of the training loop and of the threshold."""
    switch(group, "--finetune-backbone", "train the backbone, too (default: no)")
    switch(group, "--defects", "draw artificial defects into the training images (default: yes)")
    option(group, "--defect-weight", float, "share of the loss that counts only patches with a "
           "defect, from 0 to 1 (default: 0.5)")
    option(group, "--steps", int, "training steps, one image each (default: 1000)")
    option(group, "--lr", float, "learning rate of the decoder, from 0 to 1 (default: 0.002)")
    option(group, "--encoder-lr", float, "learning rate of the encoder, and of the backbone if it "
           "is trained, from 0 to 1 (default: 1e-05)")
    option(group, "--threshold-images", int, "normal images that are scored for the threshold; 0 "
           "leaves it out (default: 100)")
    option(group, "--seed", int, "decides every random choice (default: 0)")


# ---- training -----------------------------------------------------------------------------------
def with_defects(images, i):
    """Image i of (N, 3, H, W) uint8 with defects: (1, 3, H, W) in [0, 1], and (1, 1, H, W) bool."""
    other = random.choice([j for j in range(len(images)) if j != i] or [i])  # a single one: itself
    image, mask = patchae.add_defects(images[i] / 255, images[other] / 255)
    return image[None], mask[None]                                        # (1, …, H, W)


@torch.enable_grad()
def fit(model, images, report=lambda step, loss: None):
    """Train a PatchAE on normal images (N, 3, H, W) uint8; report is called after each step.

    Each step takes one random image with new artificial defects, as the input and as the target.
    config.seed decides all random choices. The model forgets its memory and its threshold, since R
    changes: call remember afterwards. UserError: see PatchAE.check_images.
    """
    model.check_images(images)
    config = model.config
    # one call for all weights is faster on a CPU; for a GPU, None lets torch choose
    fused = True if model.device.type == "cpu" else None
    optimizer = torch.optim.Adam([
        {"params": model.decoder.parameters(), "lr": config.lr},
        {"params": model.encoder.parameters(), "lr": config.encoder_lr},
        {"params": model.backbone.parameters(), "lr": config.encoder_lr}],  # no gradient if frozen
        fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    model.memory, model.remembered, model.normal_scores = [], None, torch.empty(0)
    with patchae.seeded(config.seed):
        for step in range(1, config.steps + 1):
            i = random.randrange(len(images))
            if config.defects:
                image, mask = with_defects(images, i)                     # (1, 3 or 1, H, W)
            else:
                image = images[i:i + 1] / 255                             # (1, 3, H, W)
                mask = torch.zeros_like(image[:, :1], dtype=torch.bool)   # (1, 1, H, W)
            image, mask = image.to(model.device), mask.to(model.device)
            rebuilt = model(image)                                        # (1, 3p², H', W')
            loss = patchae.training_loss(rebuilt, image, mask, config.patch_size,
                                         config.defect_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report(step, loss.item())


@torch.no_grad()
def rebuild_images(model, images):
    """What the decoder draws of images (N, 3, H, W) in [0, 1]; the same shape, on the CPU."""
    patches = torch.cat([model(image.to(model.device)).cpu() for image in images.split(1)])
    return patchae.unpatchify(patches, model.config.patch_size).clamp(0, 1)  # (N, 3, H, W)


def missing_share(drawn, defected, normal, masks):
    """The squared error inside the defects, divided by that of the images without them.

    0 if every defect is rebuilt, 1 if none is. All (N, 3, H, W) in [0, 1], masks (N, 1, H, W) bool.
    Our choice: a number that compares defects of any size and colour.
    """
    error = ((drawn - defected).square() * masks).sum()
    return (error / ((normal - defected).square() * masks).sum()).item()


class Log:
    """Reports of a training: about ten lines on the console, which are the rows of train.csv.

    It draws new artificial defects into CHECKED training images. No training step sees these
    defects; how well they are rebuilt is the missing share.
    """

    def __init__(self, model, images, name, clock=time.monotonic):
        self.model, self.name, self.clock = model, name, clock
        self.rows, self.losses, self.begin = [], [], clock()
        chosen = [i % len(images) for i in range(CHECKED)]
        with patchae.seeded(model.config.seed + CHECK_SEED):
            pairs = [with_defects(images, i) for i in chosen]
        self.normal = images[chosen] / 255                                # (CHECKED, 3, H, W)
        self.defected = torch.cat([image for image, _ in pairs])          # (CHECKED, 3, H, W)
        self.masks = torch.cat([mask for _, mask in pairs])               # (CHECKED, 1, H, W)

    def __call__(self, step, loss):
        """Take the loss of a step; now and then print a line. UserError where it diverged."""
        steps = self.model.config.steps
        self.losses.append(loss)
        if step % math.ceil(steps / REPORTS) and step < steps:
            return
        drawn = rebuild_images(self.model, self.defected)
        missing = missing_share(drawn, self.defected, self.normal, self.masks)
        loss = sum(self.losses) / len(self.losses)
        if not loss + missing < DIVERGED:  # true of NaN, too
            raise UserError(f"{self.name}: the loss is {loss} at step {step}; use a smaller --lr "
                            "or --encoder-lr")
        seconds = self.clock() - self.begin
        self.rows.append([step, loss, missing, seconds])
        self.losses = []
        print(f"{self.name}: step {step}/{steps}  loss {loss:.4f}  missing_share {missing:.3f}  "
              f"{seconds / step * (steps - step):.0f} s left")

    def write(self, folder):
        """Write train.csv and defects.png: normal, with defects, their mask, rebuilt."""
        with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "loss", "missing_share", "seconds"], *self.rows])
        columns = (self.normal, self.defected, self.masks.expand_as(self.normal),
                   rebuild_images(self.model, self.defected[:PREVIEWS]))
        cells = torch.stack([column[:PREVIEWS] for column in columns], dim=1)  # (n, 4, 3, H, W)
        save_image(cells.flatten(0, 1), folder / "defects.png", nrow=len(columns))


# ---- a category, whole --------------------------------------------------------------------------
def trained_before(folder, config, images):
    """The model in a results folder if its weights came from these images and options, else None.

    What only decides the memory and the threshold may differ, since it needs no training.
    """
    if not (folder / "checkpoint.pt").exists():
        return None
    model = PatchAE.load(folder / "checkpoint.pt")
    same = dataclasses.replace(model.config, memory_fraction=config.memory_fraction,
                               threshold_images=config.threshold_images)
    return model if same == config and torch.equal(model.images, images) else None


def name_copies(name, paths, first):
    """Say which normal images are exact copies of others; first: see patchae.first_copies."""
    copies = [f"{paths[i].name} = {paths[j].name}" for i, j in enumerate(first) if i != j]
    if copies:
        print(f"{name}: {len(copies)} copies, left out of each other's scores: {', '.join(copies)}")


def write_folder(folder, model, log, kept):
    """Write a results folder, with its log, or without one with the files kept, {name: bytes}."""
    with whole(folder) as unfinished:
        unfinished.mkdir()
        for file, content in kept.items():
            (unfinished / file).write_bytes(content)
        if log:
            log.write(unfinished)
        model.save(unfinished / "checkpoint.pt")


def train_category(name, args, config, device):
    """Train on DATA/NAME/train/good and write the results to OUT/NAME."""
    folder, watch = args.out / name, partial(progress, name)
    paths = list_images(args.data / name / "train" / "good")
    images = read_images(paths, config.image_size, watch)
    print(f"{name}: {len(images)} normal images")
    first = patchae.first_copies(images)
    name_copies(name, paths, first)
    before = trained_before(folder, config, images) if args.skip_finished else None
    finished = before and before.config == config
    scorable = config.threshold_images and len(set(first)) > 1
    if finished and (len(before.normal_scores) or not scorable):
        print(f"{name}: {folder} has these images and options, left as it is")
        return
    check_replaceable(folder, args.out)
    check_writable(args.out)
    model = before or patchae.build_model(config)
    model.config, model.batch_size = config, args.batch_size
    model.images, model.names = images, [path.name for path in paths]
    model.normal_scores = torch.empty(0)  # those of `before` may belong to another memory
    model.to(device)
    log, kept = None, {}
    if before:
        kept = {path.name: path.read_bytes()
                for path in (folder / "train.csv", folder / "defects.png") if path.exists()}
    else:
        log = Log(model, images, name)
        print(f"{name}: backbone {config.backbone}, weights {config.weights}")
        fit(model, images, log)
        write_folder(folder, model, log, kept)  # before what may need too much memory
    model.remember(images, model.names, watch)
    write_folder(folder, model, log, kept)  # all of it: another process may have replaced it
    print(f"{name}: wrote {folder / 'checkpoint.pt'}")


def main(argv=None):
    """Train each category. After a failure continue with the rest; return 2 then, else 0."""
    args, config = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        make_toy.draw_if_absent(args.data)
    names = choose_categories(args.data, args.category)
    return max([exit_code(train_category, name, args, config, device) for name in names])


if __name__ == "__main__":
    run(main)
