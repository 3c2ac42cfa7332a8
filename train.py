"""Train Patch AE on the normal images of one or more categories. Never opens test/.

    python train.py --demo
    python train.py --data ROOT --category NAME [NAME ...]

Reads ROOT/NAME/train/good; writes OUT/NAME/checkpoint.pt, train.csv and defects.png, in place of
whatever an earlier training and its evaluations left in OUT/NAME.
"""
import argparse
import csv
import dataclasses
import math
import random
import sys
import time

import torch
from torchvision.utils import save_image

import patchae
from data import make_toy
from data.images import batches, choose_categories, list_images, progress, read_images
from patchae import Config, UserError

REPORTS = 10   # our choice: lines of the log
PREVIEWS = 6   # our choice: rows of defects.png, as many as a screen shows
HELD_OUT = 24  # our choice: images with defects that training never sees, for `rebuilt`
DIVERGED = 1e4  # our choice: drawing nothing but the mean colour has a loss of about 1
# our choice: no download. Random features fade with depth, so early stages, small patches and no
# average; there is less in them to preserve, so that higher rates rebuild more
DEMO = {"data": make_toy.ROOT, "category": ["all"], "backbone": "resnet18", "weights": "random",
        "layers": (1, 2), "image_size": 128, "patch_size": 4, "neighbourhood": 1, "lr": 5e-3,
        "encoder_lr": 1e-3}


def parse(argv):
    """The command line: args, and the Config that its options make."""
    parser = patchae.make_parser(__doc__)
    parser.add_argument("--skip-finished", action="store_true",
                        help="leave out categories whose checkpoint has this configuration")
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": int, "nargs": "+"}}
    for one in dataclasses.fields(Config):
        accepted = one.metadata["accepted"] or one.type.__name__
        parser.add_argument("--" + one.name.replace("_", "-"), default=one.default,
                            **kinds.get(one.type, {"type": one.type}),
                            help=f"{one.metadata['help']}; {accepted} (default: {one.default})")
    if parser.parse_args(argv).demo:  # an option that is given beside --demo still wins
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    args.layers = tuple(sorted(set(args.layers)))
    return args, Config(**{one.name: getattr(args, one.name) for one in dataclasses.fields(Config)})


def with_defects(images, i):
    """Image i of (N, 3, H, W) uint8 with defects: (1, 3, H, W) in [0, 1], and (1, 1, H, W) bool."""
    other = (i + random.randint(1, max(1, len(images) - 1))) % len(images)  # not i if N > 1
    image, mask = patchae.add_defects(images[i] / 255, images[other] / 255)
    return image[None], mask[None]


@torch.no_grad()
def rebuild_images(model, images):
    """What the decoder makes of R of (N, 3, H, W) in [0, 1]: likewise (N, 3, H, W), on the CPU."""
    patches = torch.cat([model(image.to(model.device)).cpu() for image in images.split(1)])
    return torch.pixel_shuffle(patches, model.config.patch_size).clamp(0, 1)


def fit(model, images, held_out, name):
    """Train on (N, 3, H, W) uint8; held_out: images, defected, masks. Returns rows for a log."""
    config = model.config
    optimizer = torch.optim.Adam([
        {"params": model.decoder.parameters(), "lr": config.lr},
        {"params": model.encoder.parameters(), "lr": config.encoder_lr},
        {"params": model.backbone.parameters(), "lr": config.encoder_lr}])  # frozen: unmoved
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    losses, log = [], []
    begin = time.monotonic()
    for step in range(1, config.steps + 1):
        i = random.randrange(len(images))
        image, mask = with_defects(images, i)
        if not config.defects:
            image, mask = images[i:i + 1] / 255, torch.zeros_like(mask)
        loss = patchae.training_loss(model, image.to(model.device), mask.to(model.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) == math.ceil(config.steps / REPORTS) or step == config.steps:
            log.append(report(model, held_out, name, step, losses, time.monotonic() - begin))
            losses = []
    return log


def report(model, held_out, name, step, losses, seconds):
    """Print how far training is; returns a row of the log. UserError where it diverged.

    missing: squared error inside the defects; 1 is that of the normal image (our choice).
    """
    normal, defected, masks = held_out
    loss = sum(losses) / len(losses)
    missing = ((rebuild_images(model, defected) - defected).square() * masks).sum().item()
    missing /= ((normal - defected).square() * masks).sum().item()
    if not loss + missing < DIVERGED:  # true of NaN, too
        raise UserError(f"{name}: the loss is {loss} at step {step}; use a smaller --lr "
                        "or --encoder-lr")
    print(f"{name}: step {step}/{model.config.steps}  loss {loss:.4f}  missing {missing:.3f}  "
          f"{seconds / step * (model.config.steps - step):.0f} s left", flush=True)
    return [step, loss, missing, seconds]


def normal_scores(model, images):
    """The scores (E5) (n,) of normal images, each against the memory of all the others.

    images: (N, 3, H, W) uint8. At most config.threshold_images are scored, evenly spread; none
    where there is no other.
    """
    most = model.config.threshold_images
    if not most or len(images) < 2:
        return torch.empty(0)
    parts = batches(images, model.config.batch_size, model.device, "memory")
    memory = patchae.build_memory(model, parts)
    scores = []
    for i in progress(range(0, len(images), math.ceil(len(images) / most)), "threshold"):
        image = images[i:i + 1].to(model.device) / 255
        anomaly_map = patchae.score_maps(model, image, memory[:i] + memory[i + 1:])
        scores.append(patchae.image_score(anomaly_map).item())
    return torch.tensor(scores)


def train_category(name, args, config, device):
    """Train on DATA/NAME/train/good and write the results to OUT/NAME."""
    folder = args.out / name
    checkpoint = folder / "checkpoint.pt"
    if args.skip_finished and checkpoint.exists():
        if patchae.load_checkpoint(checkpoint)[0].config == config:
            print(f"{name}: {checkpoint} has this configuration, left as it is")
            return
    if folder.exists() and not (folder / "train.csv").exists():
        raise UserError(f"--out {args.out}: {folder} holds other files than results and would be "
                        "replaced; choose another --out")
    images = read_images(list_images(args.data / name / "train" / "good"), config.image_size)
    model = patchae.build_model(config).to(device)
    first = [i % len(images) for i in range(HELD_OUT)]
    normal = images[first] / 255
    defected, masks = map(torch.cat, zip(*[with_defects(images, i) for i in first]))
    with patchae.whole(folder) as unfinished:
        unfinished.mkdir()
        log = fit(model, images, (normal, defected, masks), name)
        columns = (normal, defected, masks.expand_as(defected), rebuild_images(model, defected))
        cells = torch.stack([column[:PREVIEWS] for column in columns], dim=1)  # (n, 4, 3, H, W)
        save_image(cells.flatten(0, 1), unfinished / "defects.png", nrow=len(columns))
        with open(unfinished / "train.csv", "w", newline="") as file:
            csv.writer(file).writerows([["step", "loss", "rebuilt", "seconds"], *log])
        scores = normal_scores(model, images)
        patchae.save_checkpoint(unfinished / "checkpoint.pt", model, images, scores)
    print(f"{name}: wrote {checkpoint}")


def main(argv=None):
    """Train every category asked for; one that fails leaves the others. 0, or 2 then. UserError."""
    args, config = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        make_toy.draw_if_absent(args.data)
    names = choose_categories(args.data, args.category)
    return max([patchae.exit_code(train_category, name, args, config, device) for name in names])


if __name__ == "__main__":
    sys.exit(patchae.exit_code(main))
