"""Train Patch AE on the normal images of one or more categories. Never opens a test set.

    python train.py --demo
    python train.py --data ROOT --category NAME [NAME ...]

Reads ROOT/NAME/train/good. Writes train.csv, defects.png and at last checkpoint.pt to OUT/NAME.
"""
import argparse
import math
import random
import time
from dataclasses import asdict, fields

import torch
from torchvision.utils import save_image

import patchae
from data.images import choose_categories, read_normal_images
from patchae import RECIPES, Config, UserError, exit_code, number, progress, write_table

REPORTS = 10     # our choice: lines of the log
PREVIEWS = 6     # our choice: rows of defects.png, as many as fit on a screen
CHECKED = 24     # our choice: images with new artificial defects, for the missing share
DIVERGED = 1e4   # our choice: loss and missing share together; grey patches stay far below it
CHECK_SEED = 2**31  # added to the seed, so that the new defects are not those of training


# ---- options ------------------------------------------------------------------------------------
def parse(argv=None):
    """The command line: (args, the Config that its recipe and options make)."""
    parser = patchae.make_parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, help="defaults of all options below: parts, "
                        "textures (fine ones such as paper or felt), or demo (default: parts, with "
                        "--demo demo)")
    add_method_options(parser.add_argument_group("method (defaults of the recipe parts)"))
    add_training_options(parser.add_argument_group("training (defaults of the recipe parts)"))
    parser.set_defaults(**asdict(RECIPES["parts"]))  # those that --help shows
    args, _ = parser.parse_known_args(argv)
    parser.set_defaults(**asdict(RECIPES[args.recipe or ("demo" if args.demo else "parts")]))
    args = parser.parse_args(argv)
    args.stages = tuple(sorted(set(args.stages)))
    return args, Config(**{field.name: getattr(args, field.name) for field in fields(Config)})


def add_method_options(group):
    """The options that decide how an image becomes vectors."""
    add = group.add_argument
    add("--backbone", choices=patchae.BACKBONES,
        help="network that gives the features (default: %(default)s)")
    add("--weights", help="its weights: imagenet (downloaded once), random, or a file with a "
        "torchvision state dict (default: %(default)s)")
    add("--stages", type=int, nargs="+", choices=(1, 2, 3, 4), metavar="STAGE",
        help="stages of the backbone to join, from 1 to 4 (default: 1 2 3)")
    add("--image-size", type=number(int, 64, 2048), metavar="PIXELS", help="side to which every "
        "image is resized: a multiple of 32 from 64 to 2048 (default: %(default)s)")
    add("--patch-size", type=number(int, 4, 32), metavar="PIXELS", help="side of a patch, from 4 "
        "to 32; it must divide the image size (default: %(default)s)")
    add("--neighbourhood", type=int, choices=(1, 3, 5, 7, 9), help="side of the square of places "
        "that are averaged; 1 is no average (default: %(default)s)")
    add("--channels", type=number(int, 1, 8192), metavar="N", help="length of the vectors R, from "
        "1 to 8192 (default: as many as the joined stages have)")
    add("--start", choices=("identity", "random"), help="how the encoder begins: as the identity, "
        "so that R equals the features, or with random weights (default: %(default)s)")
    add("--memory-fraction", type=number(float, 0, 1), metavar="F", help="part of each normal "
        "image's vectors that is kept, drawn at random, from 0 to 1 (default: %(default)s)")


def add_training_options(group):
    """The options of the training loop."""
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--finetune-backbone", action=switch, help="train the backbone, too (default: no)")
    add("--defects", action=switch,
        help="draw artificial defects into the training images (default: yes)")
    add("--defect-weight", type=number(float, 0, 1), metavar="W", help="share of the loss that "
        "counts only patches with a defect, from 0 to 1 (default: %(default)s)")
    add("--steps", type=number(int, 0, 10**6), metavar="N",
        help="training steps, one image each, up to a million (default: %(default)s)")
    add("--lr", type=number(float, 0, 1), metavar="RATE",
        help="learning rate of the decoder, from 0 to 1 (default: %(default)s)")
    add("--encoder-lr", type=number(float, 0, 1), metavar="RATE", help="learning rate of the "
        "encoder, and of the backbone if it is trained, from 0 to 1 (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**31 - 1), metavar="N",
        help="decides every random choice, from 0 (default: %(default)s)")


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
    changes: call remember afterwards. UserError for images of another form.
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
    model.forget()
    with patchae.seeded(config.seed):
        for step in range(1, config.steps + 1):
            i = random.randrange(len(images))
            if config.defects:
                image, mask = with_defects(images, i)                     # (1, 3 or 1, H, W)
            else:
                image = images[i:i + 1] / 255                             # (1, 3, H, W)
                mask = torch.zeros_like(image[:, :1], dtype=torch.bool)   # (1, 1, H, W)
            loss = model.loss(image.to(model.device), mask.to(model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report(step, loss.item())


@torch.no_grad()
def rebuild_images(model, images):
    """What the decoder draws of images (T, 3, H, W) in [0, 1]; the same shape, on the CPU."""
    patches = torch.cat([model(image.to(model.device)).cpu() for image in images.split(1)])
    return patchae.unpatchify(patches, model.config.patch_size).clamp(0, 1)  # (T, 3, H, W)


def missing_share(drawn, defected, normal, masks):
    """The squared error inside the defects, divided by that of the images without them.

    0 if every defect is rebuilt, 1 if none is. All (T, 3, H, W) in [0, 1], masks (T, 1, H, W) bool.
    Our choice: a number that compares defects of any size and colour.
    """
    error = ((drawn - defected).square() * masks).sum()
    return (error / ((normal - defected).square() * masks).sum()).item()


class Log:
    """Reports of a training: about ten lines on the console, which are the rows of train.csv.

    It draws new artificial defects into CHECKED training images. No training step sees these
    defects; how well they are rebuilt is the missing share.
    """

    def __init__(self, model, images, folder, clock=time.monotonic):
        self.model, self.folder, self.clock = model, folder, clock
        self.rows, self.losses = [["step", "loss", "missing_share", "seconds"]], []
        write_table(folder / "train.csv", self.rows)
        chosen = [i % len(images) for i in range(CHECKED)]
        with patchae.seeded(model.config.seed + CHECK_SEED):
            pairs = [with_defects(images, i) for i in chosen]
        self.normal = images[chosen] / 255                                # (CHECKED, 3, H, W)
        self.defected = torch.cat([image for image, _ in pairs])          # (CHECKED, 3, H, W)
        self.masks = torch.cat([mask for _, mask in pairs])               # (CHECKED, 1, H, W)
        self.begin = clock()

    def __call__(self, step, loss):
        """Take the loss of a step; now and then report. UserError where it diverged."""
        steps = self.model.config.steps
        self.losses.append(loss)
        if step % math.ceil(steps / REPORTS) and step < steps:
            return
        drawn = rebuild_images(self.model, self.defected)
        missing = missing_share(drawn, self.defected, self.normal, self.masks)
        loss = sum(self.losses) / len(self.losses)
        if not loss + missing < DIVERGED:  # true of NaN, too
            raise UserError(f"{self.folder}: the loss is {loss} at step {step}; use a smaller --lr "
                            "or --encoder-lr")
        seconds = self.clock() - self.begin
        self.rows.append([step, loss, missing, seconds])
        self.losses = []
        write_table(self.folder / "train.csv", self.rows)
        print(f"{self.folder.name}: step {step}/{steps}  loss {loss:.4f}  missing_share "
              f"{missing:.3f}  {seconds / step * (steps - step):.0f} s left")

    def draw(self):
        """Write defects.png: normal images, with defects, their mask, rebuilt."""
        columns = (self.normal, self.defected, self.masks.expand_as(self.normal),
                   rebuild_images(self.model, self.defected[:PREVIEWS]))
        cells = torch.stack([column[:PREVIEWS] for column in columns], dim=1)  # (n, 4, 3, H, W)
        save_image(cells.flatten(0, 1), self.folder / "defects.png", nrow=len(columns))


# ---- a category, whole --------------------------------------------------------------------------
def train_category(name, args, config, device):
    """Train on DATA/NAME/train/good and write the results to OUT/NAME."""
    folder = args.out / name
    paths, images = read_normal_images(args.data / name, config.image_size, progress)
    print(f"{name}: {len(images)} normal images")
    folder.mkdir(parents=True, exist_ok=True)
    model = patchae.build_model(config, device)
    log = Log(model, images, folder)
    vectors = len(images) * model.grid**2 * config.memory_fraction
    size = vectors * model.encoder.W2.out_channels * 4 / 2**20  # numbers of 4 bytes
    print(f"{name}: backbone {config.backbone}, weights {config.weights}; the memory M will take "
          f"{size:.0f} MiB")
    fit(model, images, log)
    log.draw()
    model.remember(images, [path.name for path in paths], progress)
    model.save(folder / "checkpoint.pt")
    print(f"{name}: wrote {folder / 'checkpoint.pt'}")
    if any(folder.glob("*/scores.csv")):
        print(f"{name}: the evaluations in {folder} are of the checkpoint before; evaluate again")


def main(argv=None):
    """Train each category. After a failure continue with the rest; return 2 then, else 0."""
    args, config = parse(argv)
    device = patchae.choose_device(args.device)
    args.data, names = choose_categories(args.data, args.category, args.demo)
    return max([exit_code(train_category, name, args, config, device) for name in names])


if __name__ == "__main__":
    patchae.run(main)
