"""Train Patch AE on the normal images of one or more categories. Never opens test/.

    python train.py --demo
    python train.py --data ROOT --category NAME [NAME ...]

Reads ROOT/NAME/train/good; writes OUT/NAME/checkpoint.pt, train.csv and defects.png.
"""
import argparse
import math
import sys
import time
from dataclasses import fields

import torch
from torch.utils.data import DataLoader, Dataset

import patchae
from data import make_toy
from patchae import Config, UserError, seeded

PREVIEWS = 6        # our choice: rows of defects.png, as many as a screen shows
LOG = ["epoch", "loss", "images_per_second"]
START_PLACES = 256  # our choice: vectors of each image that preserve_distances looks at
# our choice: no download; random features fade with depth, so the early stages, on 4-pixel patches
DEMO = {"data": make_toy.ROOT, "category": [make_toy.CATEGORY], "backbone": "resnet18",
        "weights": "random", "layers": (1, 2), "image_size": 128}


def parse(argv):
    """The command line: args, and the Config that its options make."""
    parser = patchae.Parser(__doc__)
    add = parser.add_argument
    add("--workers", type=int, default=0, help="processes that draw defects (default: 0)")
    add("--resume", action="store_true", help="go on with an interrupted training")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        kind = {"type": int, "nargs": "+"} if f.type is tuple else kind
        add("--" + f.name.replace("_", "-"), default=f.default, **kind,
            help=f"{f.metadata['help']} (default: {f.default})")
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if not 0 <= args.workers <= patchae.MOST_WORKERS:
        raise UserError(f"--workers {args.workers}: must be from 0 to {patchae.MOST_WORKERS}")
    args.layers = tuple(sorted(set(args.layers)))
    return args, patchae.check(Config(**{f.name: getattr(args, f.name) for f in fields(Config)}))


class DefectedImages(Dataset):
    """(epoch, i) → normal image i with artificial defects, and their mask.

    Each draw has its own seed, so that it is the same whichever worker process makes it.
    """

    def __init__(self, images, config):
        self.images, self.config = images, config  # (N, 3, H, W) uint8

    def __getitem__(self, key):
        epoch, i = key
        rng = seeded(self.config.seed, epoch, i)
        other = patchae.integer(0, len(self.images) - 1, rng)
        image, other = self.images[i] / 255, self.images[other] / 255
        if not self.config.defects:
            return image, torch.zeros_like(image[:1], dtype=torch.bool)
        return patchae.add_defects(image, other, rng)


def batch_keys(config, count, first_epoch):
    """Lists of (epoch, i): every epoch all images, in an order drawn for that epoch."""
    for epoch in range(first_epoch, config.epochs):
        order = torch.randperm(count, generator=seeded(config.seed, epoch)).tolist()
        for start in range(0, count, config.batch_size):
            yield [(epoch, i) for i in order[start:start + config.batch_size]]


def start(model, images):
    """Set what depends on the training images: batch statistics and the start of the encoder."""
    config, device = model.config, next(model.parameters()).device
    batches = [batch.to(device) for batch in images.split(config.batch_size)]
    if config.weights == "random":
        patchae.calibrate_batch_norm(model.backbone, (batch / 255 for batch in batches))
    if config.encoder_start == "random":
        return
    features = None
    if model.encoder[0].out_channels < model.in_channels:  # else the identity
        rng = seeded(config.seed, "start")
        places = torch.randperm(model.grid**2, generator=rng)[:START_PLACES].to(device)
        sample = [model.features(batch / 255).flatten(2)[:, :, places] for batch in batches]
        features = torch.cat(sample).transpose(1, 2).flatten(0, 1)  # (n, C)
    patchae.preserve_distances(model.encoder, model.decoder, features)


def make_optimizer(model):
    """Adam with a learning rate for the decoder, the encoder and a fine-tuned backbone each."""
    config = model.config
    groups = [(model.decoder, config.lr), (model.encoder, config.encoder_lr)]
    if config.finetune_backbone:
        groups.append((model.backbone, config.backbone_lr))
    return torch.optim.Adam([{"params": list(part.parameters()), "lr": lr, "full_lr": lr}
                             for part, lr in groups])


def train_epoch(model, optimizer, batches, epoch, steps):
    """One pass over the normal images; returns the mean loss (E3) per image."""
    config, device = model.config, next(model.parameters()).device
    total, count = torch.zeros((), device=device), 0  # read once, so that a GPU need not wait
    for step in range(steps):
        image, _ = next(batches)
        done = (epoch * steps + step) / (config.epochs * steps)
        for group in optimizer.param_groups:  # cosine: from the full rate to nearly none
            group["lr"] = group["full_lr"] * (1 + math.cos(math.pi * done)) / 2
        rng = seeded(config.seed, epoch, step, "part")
        loss = patchae.training_loss(model, image.to(device, non_blocking=True), rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.detach() * len(image), count + len(image)
    return total.item() / count


@torch.no_grad()
def write_preview(path, model, images):
    """Rows of normal image, the same with artificial defects, its mask, its reconstruction."""
    device = next(model.parameters()).device
    dataset, rows = DefectedImages(images, model.config), []
    for i in range(min(PREVIEWS, len(images))):
        image, mask = dataset[model.config.epochs, i]
        rebuilt = patchae.unpatchify(model(image[None].to(device))[1], model.p)[0].cpu()
        row = (images[i] / 255, image, mask.expand_as(image), patchae.denormalise(rebuilt))
        rows.append([patchae.picture(cell) for cell in row])
    titles = ["normal image", "with artificial defects", "their mask", "rebuilt from R"]
    patchae.write_picture(path, patchae.picture_grid(rows, titles))


def resume(path, model, optimizer, count):
    """Fill model and optimizer from an unfinished training; returns its log. UserError."""
    remedy = "leave out --resume to train anew"
    content = patchae.load_checkpoint(path)
    if content["config"] != model.config or content.get("images") != count:
        raise UserError(f"{path}: made with other options or images; {remedy}")
    names = patchae.checkpoint_names(model)
    patchae.load_tensors(model, names, content.get("tensors"), path, remedy)
    try:
        optimizer.load_state_dict(content["optimizer"])
        return [[int(epoch), float(loss), float(speed)] for epoch, loss, speed in content["log"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its state of training is damaged ({error}); {remedy}") from error


def train_category(name, args, config, device):
    """Train on DATA/NAME/train/good and write the results to OUT/NAME."""
    folder = args.out / name
    unfinished, finished = folder / "unfinished.pt", folder / "checkpoint.pt"
    resuming = args.resume and unfinished.exists()
    if args.resume and not resuming and finished.exists():
        if patchae.load_checkpoint(finished)["config"] == config:
            print(f"{name}: {finished} is complete, nothing to resume")
            return
    model, fingerprint = patchae.build_model(config)
    model.to(device)
    paths = patchae.list_images(args.data / name / "train" / "good")
    images = torch.cat(list(patchae.read_batches(paths, model, f"{name}: reading")))
    facts = {"fingerprint": fingerprint, "images": len(images)}
    steps, optimizer, log = math.ceil(len(images) / config.batch_size), make_optimizer(model), []
    if resuming:
        log = resume(unfinished, model, optimizer, len(images))
        print(f"{name}: resuming after epoch {len(log)}")
    else:
        start(model, images)
    patchae.write_csv(folder / "train.csv", LOG, log)  # a folder that cannot be written fails now
    keys = list(batch_keys(config, len(images), len(log)))
    batches = iter(DataLoader(DefectedImages(images, config), batch_sampler=keys,
                              num_workers=args.workers, pin_memory=device.type == "cuda"))
    for epoch in range(len(log), config.epochs):
        begin = time.monotonic()
        loss = train_epoch(model, optimizer, batches, epoch, steps)
        seconds = time.monotonic() - begin
        if not math.isfinite(loss):
            raise UserError(f"{name}: the loss is {loss} in epoch {epoch + 1}; use a smaller --lr, "
                            "--encoder-lr or --backbone-lr")
        speed, left = len(images) / seconds, seconds * (config.epochs - epoch - 1)
        print(f"{name}: epoch {epoch + 1}/{config.epochs}  loss {loss:.4f}  {speed:.1f} images/s  "
              f"{left:.0f} s left", flush=True)
        log.append([epoch + 1, loss, round(speed, 2)])
        patchae.write_csv(folder / "train.csv", LOG, log)
        patchae.save_checkpoint(unfinished, model,
                                {**facts, "optimizer": optimizer.state_dict(), "log": log})
    write_preview(folder / "defects.png", model, images)
    patchae.save_checkpoint(finished, model, facts)
    unfinished.unlink(missing_ok=True)
    print(f"{name}: wrote {finished}")


@patchae.script
def main(argv=None):
    """Returns the exit code: 0, or 2 where the input was at fault."""
    args, config = parse(argv)
    device = patchae.choose_device(args.device)
    if args.demo:
        layers = " ".join(map(str, config.layers))
        print(f"demo: --backbone {config.backbone} --weights {config.weights} --layers {layers} "
              f"--image-size {config.image_size}, all else as always")
        make_toy.draw_if_absent(args.data)
    names = patchae.choose_categories(args.data, args.category)
    return patchae.each_category(
        names, lambda name: train_category(name, args, config, device))


if __name__ == "__main__":
    sys.exit(main())
