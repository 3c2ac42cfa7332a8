"""Patch AE: patch-wise auto-encoder for visual anomaly detection (arXiv 2308.00429), top to bottom.

Train on normal images only. Each is given artificial defects (⊗) and must be rebuilt *with* them,
every patch from its own feature vector alone: a vector that has to draw a defect cannot hide it.
At test time a patch is as anomalous as its vector is far from all vectors of the normal images.

    image ⊗ defect → backbone → ⊕ → encoder → R → decoder → patches     (training: E1, E2, E3)
    image          → backbone → ⊕ → encoder → R → nearest in M → map → score    (test: E1, E4, E5)

The labels (E1) to (E5) are ours: match them to the numbered equations of your copy of the paper.
Defaults say `paper` where the paper is known to say so, and `our choice: reason` elsewhere.

Notation
    symbol  name in code  shape              meaning
    I       image         (B, 3, H, W)       normal image (in training with defects), [0, 1]
    α       alpha         (1, h, w)          opacity of an artificial defect in its box, [0, 1]
    Φ       features      (B, C, H', W')     ⊕: the backbone's scales on one grid, joined; ≥ 0
    R       r             (B, C₃, H', W')    representation; r_ij, one vector for each patch
    I_ij    patches       (B, 3p², H', W')   the image cut into patches of p × p pixels, normalised
    Î_ij    rebuilt       (B, 3p², H', W')   the patches as the decoder draws them from R
    M       memory        (M, C₃)            vectors r_ij of all normal training images
    s_ij    anomaly_map   (B, H', W')        distance of each r_ij to its nearest vector in M
    S       score         (B,)               anomaly score of the image
"""
import argparse
import csv
import dataclasses
import functools
import hashlib
import io
import math
import os
import pickle
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn


class UserError(Exception):
    """Bad input. Its text is one line that names the file or option and the remedy."""


def option(default, description, low=None, high=None, choices=None):
    """A Config field that carries its help text and the values it accepts."""
    limits = {"help": description, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=limits)


BACKBONES = ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2")
LARGEST_STRIDE = 32  # of a ResNet: sides that it divides make every scale's grid come out even


@dataclass
class Config:
    """Everything that decides the result; also the options of train.py and part of a checkpoint."""
    backbone: str = option(
        "wide_resnet50_2", "torchvision ResNet (our choice: most published baselines use it)",
        choices=BACKBONES)
    weights: str = option(
        "imagenet", "imagenet, random or a state-dict file (paper: pre-trained parameters)")
    finetune_backbone: bool = option(
        False, "train the backbone too (our choice: off, it hurt on 40 images)")
    layers: tuple = option(
        (2, 3), "ResNet stages that ⊕ joins (our choice: as PatchCore; see Ablations)", 1, 4)
    image_size: int = option(
        256, "side of the square input, pixels (our choice: a grid of 32 × 32 patches)",
        LARGEST_STRIDE, 2048)
    neighbourhood: int = option(
        3, "side of the average over near features, odd (our choice: see Ablations)", 1, 9)
    channels: int = option(
        0, "C₁ = C₂ = C₃; 0: as many as ⊕ has (our choice: keeps all distances)", 0, 8192)
    encoder_start: str = option(
        "preserve", "preserve distances or random (our choice: see Ablations)",
        choices=("preserve", "random"))
    defects: bool = option(True, "artificial defects in training (paper)")
    patch_fraction: float = option(
        0.125, "part of the patches in a step (our choice: saves time; each learns alone)", 0.01, 1)
    epochs: int = option(20, "passes over the images (our choice: the loss is flat then)", 0, 10000)
    batch_size: int = option(8, "images per step (our choice: fits any machine)", 1, 4096)
    lr: float = option(2e-3, "decoder, Adam and cosine (our choice: rebuilds well by then)", 0, 1)
    encoder_lr: float = option(
        1e-4, "encoder (our choice: slower than the decoder; see Ablations)", 0, 1)
    backbone_lr: float = option(1e-5, "fine-tuned backbone (our choice: a tenth of that)", 0, 1)
    seed: int = option(0, "of every random choice (our choice: any)", 0, 2**31)


# ---- ⊗ artificial defects: drawn into a normal image in [0, 1], before normalising --------------
# paper: defects are added and must be rebuilt. Our choice, all of it: these four kinds and numbers,
# wide enough for faint to glaring, since the test defects are unknown.
MOST_DEFECTS = 6              # per image: 1 to 6, so that every image trains on some defect
BOX_SIDE = (1 / 24, 1 / 4)    # of the image side: from about one patch to a large stain
BLOB_CELLS = 4                # noise cells that bend a blob's rim: few, so that lobes stay smooth
BLOB_RIM = 0.3                # level at which the blob ends inside its box
HARD, SOFT = 0.1, 1.0         # width of a blob's rim: cut-out or fading
GAIN = (0.6, 1.4)             # colour change of a pasted patch
OPACITY = (0.3, 1.0)          # of scratches, stains and noise
MAX_GRAIN = 4                 # pixels: the coarsest grain of a noise blob
SOFTEN = 3                    # pixels: smoothing of a scratch, about what a lens does


def seeded(*numbers):
    """A CPU generator of its own for, say, (seed, epoch, image): no draw depends on another's."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def uniform(low, high, rng):
    """A random float in [low, high)."""
    return low + (high - low) * torch.rand((), generator=rng).item()


def integer(low, high, rng):
    """A random integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def irregular_blob(h, w, softness, rng):
    """α of a disc whose rim is bent by smooth noise, 0 at the box's border (our choice)."""
    noise = torch.randn(1, 1, BLOB_CELLS, BLOB_CELLS, generator=rng)
    noise = F.interpolate(noise, (h, w), mode="bicubic")[0]               # (1, h, w)
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    disc = 1 - x * x - y * y                                              # (h, w)
    return ((disc * (1 + noise / 2) - BLOB_RIM) / softness).clamp(0, 1)   # (1, h, w)


def altered_paste(other, h, w, rng):
    """A patch of another normal image, flipped and with its colours changed (our choice)."""
    top, left = integer(0, other.shape[1] - h, rng), integer(0, other.shape[2] - w, rng)
    patch = other[:, top:top + h, left:left + w].flip(integer(1, 2, rng))  # (3, h, w)
    gain = torch.empty(3, 1, 1).uniform_(*GAIN, generator=rng)
    return (patch * gain).clamp(0, 1), irregular_blob(h, w, HARD, rng)


def scratch(other, h, w, rng):
    """A thin curve of one colour: dots along a quadratic Bézier curve, thickened (our choice)."""
    t = torch.linspace(0, 1, 2 * (h + w))                  # dense enough to leave no gap
    start, bend, end = torch.rand(3, 2, 1, generator=rng)
    y, x = (1 - t)**2 * start + 2 * t * (1 - t) * bend + t**2 * end
    alpha = torch.zeros(1, h, w)
    alpha[0, (y * (h - 1)).round().long(), (x * (w - 1)).round().long()] = 1
    width = 2 * integer(0, 1, rng) + 1
    alpha = F.max_pool2d(alpha, width, stride=1, padding=width // 2)      # (1, h, w)
    alpha = F.avg_pool2d(alpha, SOFTEN, stride=1, padding=SOFTEN // 2)    # (1, h, w)
    return torch.rand(3, 1, 1, generator=rng), alpha * uniform(*OPACITY, rng)


def stain(other, h, w, rng):
    """A soft spot of one colour (our choice)."""
    alpha = irregular_blob(h, w, SOFT, rng) * uniform(*OPACITY, rng)
    return torch.rand(3, 1, 1, generator=rng), alpha


def noise_blob(other, h, w, rng):
    """Coloured noise of random grain inside an irregular outline (our choice)."""
    grain = integer(1, MAX_GRAIN, rng)
    cells = torch.rand(1, 3, -(-h // grain), -(-w // grain), generator=rng)
    texture = F.interpolate(cells, (h, w), mode="bilinear")[0]            # (3, h, w)
    return texture, irregular_blob(h, w, HARD, rng) * uniform(*OPACITY, rng)


DEFECT_KINDS = (altered_paste, scratch, stain, noise_blob)


def add_defects(image, other, rng):
    """⊗: draw 1 to MOST_DEFECTS artificial defects, I ← (1 − α) I + α paint, each in a random box.

    image, other: (3, H, W) normal images in [0, 1]; `other` is what altered_paste takes from.
    Returns the defected image (3, H, W) in [0, 1] and its mask (1, H, W), True where α > 0.
    """
    image, (height, width) = image.clone(), image.shape[1:]
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for _ in range(integer(1, MOST_DEFECTS, rng)):
        h, w = (math.ceil(side * uniform(*BOX_SIDE, rng)) for side in (height, width))
        kind = DEFECT_KINDS[integer(0, len(DEFECT_KINDS) - 1, rng)]
        paint, alpha = kind(other, h, w, rng)
        top, left = integer(0, height - h, rng), integer(0, width - w, rng)
        box = (..., slice(top, top + h), slice(left, left + w))
        image[box] = (1 - alpha) * image[box] + alpha * paint
        mask[box] |= alpha > 0
    return image, mask


# ---- features: backbone and ⊕ -------------------------------------------------------------------
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the weights


def normalise(image):
    """Subtract ImageNet's mean colour and divide by its deviation. (B, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(v, device=image.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean[:, None, None]) / std[:, None, None]


def denormalise(image):
    """The inverse of normalise, clipped to [0, 1]."""
    mean, std = (torch.tensor(v, device=image.device) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


class Backbone(nn.Module):
    """A torchvision ResNet, cut after the last stage in use; its parameters keep their names."""

    def __init__(self, name, layers):
        super().__init__()
        resnet = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.layers = resnet.conv1, resnet.bn1, tuple(layers)
        for stage in range(1, max(layers) + 1):
            self.add_module(f"layer{stage}", getattr(resnet, f"layer{stage}"))
        self.eval()  # batch normalisation always uses its stored statistics

    def forward(self, image):
        """The maps of the stages in use, each (B, C_l, H_l, W_l) and ≥ 0, from a (B, 3, H, W)."""
        x = normalise(image).contiguous(memory_format=torch.channels_last)  # faster convolutions
        x = F.relu(self.bn1(self.conv1(x)))                               # (B, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)                       # (B, 64, H/4, W/4)
        maps = {}
        for stage in range(1, max(self.layers) + 1):
            x = maps[stage] = getattr(self, f"layer{stage}")(x)
        return [maps[stage] for stage in self.layers]


def concatenate_scales(maps, neighbourhood):
    """⊕: Φ, every map averaged over a neighbourhood, brought to the finest grid, concatenated.

    paper: several scales at one size, concatenated. Our choice: bilinear, and the average, which
    lets a vector see a little beyond its patch and forgive small shifts.
    """
    grid, k = max(m.shape[-2:] for m in maps), neighbourhood
    joined = []
    for m in maps:
        m = F.avg_pool2d(m, k, stride=1, padding=k // 2, count_include_pad=False)  # (B, C_l, ...)
        joined.append(F.interpolate(m, grid, mode="bilinear"))            # (B, C_l, H', W')
    return torch.cat(joined, dim=1)                                       # (B, C, H', W')


def patchify(image, p):
    """Cut into P = H'·W' patches of p × p pixels: (B, 3, H'p, W'p) to (B, 3p², H', W')."""
    return F.pixel_unshuffle(image, p)                                    # (B, 3p², H', W')


def unpatchify(patches, p):
    """The inverse of patchify: (B, 3p², H', W') to (B, 3, H'p, W'p)."""
    return F.pixel_shuffle(patches, p)                                    # (B, 3, H'p, W'p)


# ---- the patch auto-encoder and its equations ---------------------------------------------------
def represent(features, encoder):
    """(E1) R = f_e(I; θ_e) = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂), Φ being ⊕ of I's backbone maps.

    paper. features: (B, C, H', W'), encoder: the two 1×1 convolutions (W₁, b₁) and (W₂, b₂).
    A 1×1 convolution is one linear layer, applied at every place on its own.
    """
    return F.relu(encoder[1](F.relu(encoder[0](features))))               # (B, C₃, H', W')


def rebuild(r, decoder):
    """(E2) Î_ij = f_d(r_ij; θ_d) = V₂ ReLU(V₁ r_ij + c₁) + c₂: one vector rebuilds one patch.

    paper; the activation (ReLU) is our choice: as in the encoder. r: (B, C₃, H', W').
    """
    return decoder[1](F.relu(decoder[0](r)))                              # (B, 3p², H', W')


class PatchAE(nn.Module):
    """The backbone and the weights of encoder and decoder; the equations below use them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.layers)
        blank = torch.zeros(1, 3, config.image_size, config.image_size)
        _, self.in_channels, self.grid, _ = self.features(blank).shape
        self.p = config.image_size // self.grid
        c = config.channels or self.in_channels
        if c > self.in_channels and config.encoder_start == "preserve":
            raise UserError(f"--channels {c}: ⊕ has only {self.in_channels}, more would stay 0; "
                            "give at most that, or --encoder-start random")
        self.encoder = nn.ModuleList([nn.Conv2d(self.in_channels, c, 1), nn.Conv2d(c, c, 1)])
        self.decoder = nn.ModuleList([nn.Conv2d(c, c, 1), nn.Conv2d(c, 3 * self.p**2, 1)])

    def features(self, image):
        """Φ: (B, 3, H, W) in [0, 1] to (B, C, H', W'); no gradient reaches a frozen backbone."""
        with torch.set_grad_enabled(self.config.finetune_backbone and torch.is_grad_enabled()):
            return concatenate_scales(self.backbone(image), self.config.neighbourhood)

    def forward(self, image):
        """R (B, C₃, H', W') and the rebuilt patches (B, 3p², H', W') of (B, 3, H, W) in [0, 1]."""
        r = represent(self.features(image), self.encoder)
        return r, rebuild(r, self.decoder)


def patch_errors(rebuilt, patches):
    """‖Î_ij − I_ij‖² averaged over the 3p² values of a patch: (B, 3p², H', W') to (B, H', W')."""
    return (rebuilt - patches).square().mean(dim=1)                       # (B, H', W')


def reconstruction_loss(rebuilt, patches):
    """(E3) L = (1/P) Σ_ij ‖Î_ij − I_ij‖², averaged over a patch's pixels and the batch (paper).

    rebuilt, patches: (B, 3p², H', W'), normalised (our choice: unit variance suits the step size).
    """
    return patch_errors(rebuilt, patches).mean()


# our choice: on a CPU 4 MiB of float32, of the sizes tried among the fastest, for they stay in its
# cache; elsewhere 128 MiB, enough to keep a GPU busy (not measured)
DISTANCES_AT_ONCE = {"cpu": 2**20, "cuda": 2**25, "mps": 2**25}


def nearest_distance(r, memory):
    """(E4) s_ij = min_{m∈M} ‖r_ij − m‖₂, in blocks of the memory with a running minimum (paper).

    r: (P, C₃), memory: (M, C₃), float32, M ≥ 1. Returns (P,). Holds DISTANCES_AT_ONCE distances,
    or one for each vector of r, however large the memory is.
    """
    nearest = torch.full((len(r),), math.inf, device=r.device)
    for block in memory.split(max(1, DISTANCES_AT_ONCE[r.device.type] // len(r))):
        nearest = torch.minimum(nearest, torch.cdist(r, block).amin(dim=1))
    return nearest                                                        # (P,)


def image_score(anomaly_map):
    """(E5) S = max_ij s_ij: an image is as anomalous as its worst patch. (B, H', W') to (B,)."""
    score = anomaly_map.amax(dim=(1, 2))                                  # (B,)
    return score


# ---- what training and scoring make of them -----------------------------------------------------
@torch.no_grad()
def calibrate_batch_norm(backbone, batches):
    """Set the statistics of random weights from normal images: without it they are of no use.

    batches: an iterable of (B, 3, H, W) in [0, 1]. Our choice: needed for runs without a download.
    """
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # the plain average over all batches
    for image in batches:
        backbone(image)
    backbone.eval()


@torch.no_grad()
def preserve_distances(encoder, decoder, features=None):
    """Start the encoder so that distances in R are those between the features (our choice).

    As many channels as features: both layers the identity, and features ≥ 0 pass both ReLUs, so R
    *is* Φ. Fewer: the first layer projects on the principal axes of `features` (n, C; needed only
    then), shifted by twice their range to stay positive; of all projections it keeps the most
    squared distance. The decoder's first layer takes the mean off again, or the shift would be
    all that it sees.
    """
    for layer in encoder:
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    c, in_channels = encoder[0].weight.shape[:2]
    if c < in_channels:
        axes = torch.linalg.eigh(torch.cov(features.T)).eigenvectors[:, -c:]  # (C, C₃)
        low, high = (features @ axes).aminmax(dim=0)
        encoder[0].weight.copy_(axes.T[:, :, None, None])                 # (C₃, C, 1, 1)
        encoder[0].bias.copy_(2 * (high - low) - low)
        mean = (features @ axes).mean(dim=0) + encoder[0].bias
        decoder[0].bias.sub_(decoder[0].weight.flatten(1) @ mean)  # (C₃,)


def training_loss(model, image, rng):
    """The loss (E3) over a random part of the patches, the same for all images of the batch.

    image: (B, 3, H, W) in [0, 1], with artificial defects: both the input and the target (paper).
    """
    features = model.features(image).flatten(2)                           # (B, C, P)
    patches = patchify(normalise(image), model.p).flatten(2)              # (B, 3p², P)
    count = math.ceil(features.shape[2] * model.config.patch_fraction)
    part = torch.randperm(features.shape[2], generator=rng)[:count].to(image.device)
    r = represent(features[:, :, part, None], model.encoder)              # (B, C₃, n, 1)
    return reconstruction_loss(rebuild(r, model.decoder), patches[:, :, part, None])


def patch_vectors(model, image, kind):
    """What is compared with the memory, (B, P, C): R, or Φ itself for kind "backbone"."""
    features = model.features(image)
    vectors = features if kind == "backbone" else represent(features, model.encoder)
    return vectors.flatten(2).transpose(1, 2).contiguous()                # (B, P, C)


def build_memory(model, batches, count, kind, fraction):
    """M as (N, n, C): a slice for each of `count` normal images, n = ⌈fraction · P⌉ of its vectors.

    batches: an iterable of (B, 3, H, W). A fraction < 1 is drawn by config.seed: our choice, not
    the paper's, for less memory and time. UserError where M does not fit.
    """
    places = model.grid**2
    kept, device = math.ceil(places * fraction), next(model.parameters()).device
    channels = model.in_channels if kind == "backbone" else model.encoder[1].out_channels
    size = count * kept * channels * torch.float32.itemsize / 2**30
    print(f"memory: {count} images × {kept} vectors × {channels} channels = {size:.2f} GiB")
    try:
        memory, n = torch.empty(count, kept, channels, device=device), 0
    except RuntimeError as error:
        raise UserError(f"{size:.1f} GiB do not fit on {device}; use --memory-fraction") from error
    for image in batches:
        for vectors in patch_vectors(model, image, kind):
            rng = seeded(model.config.seed, "memory", n)
            memory[n] = vectors[torch.randperm(places, generator=rng)[:kept].to(device)]  # (n, C)
            n += 1
    return memory                                                         # (N, n, C)


def score_maps(model, image, memory, kind, own=None):
    """Anomaly maps (B, H', W') of (B, 3, H, W): (E4), or (E3)'s error for kind "reconstruction".

    memory: (N, n, C). own: leave out the slice of that number; so a normal image of the memory
    gets the score that it would have had as a new one.
    """
    if kind == "reconstruction":
        return patch_errors(model(image)[1], patchify(normalise(image), model.p))
    rest = [memory] if own is None else [memory[:own], memory[own + 1:]]
    rest = [part.flatten(0, 1) for part in rest if len(part)]             # (M, C) each
    nearest = [torch.stack([nearest_distance(r, part) for part in rest]).amin(dim=0)
               for r in patch_vectors(model, image, kind)]
    return torch.stack(nearest).unflatten(1, (model.grid, model.grid))    # (B, H', W')


# ==== nothing from the paper below: errors, options, files, images, weights, checkpoint ==========
MOST_WORKERS = 64
DEVICES = ("cuda", "mps", "cpu")  # in the order of --device auto
CELL, GAP, TITLE = 160, 4, 28  # pixels of picture_grid
CHECKPOINT_FORMAT = "patch-ae 1"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
DAMAGED = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
           RuntimeError, SyntaxError, AssertionError, MemoryError, struct.error, zlib.error,
           pickle.UnpicklingError, zipfile.BadZipFile, Image.DecompressionBombError,
           Image.DecompressionBombWarning)  # what Pillow and torch.load throw at a damaged file


def report(error):
    """One line on stderr."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)


def script(main):
    """Turn main(argv) into a script: a UserError becomes one line on stderr and exit code 2."""
    @functools.wraps(main)
    def run(argv=None):
        """main(argv), or the exit code of its error; help() shows main's own text."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of a damaged file we speak once
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return main(argv)
            except UserError as error:
                report(error)
                return 2
            except KeyboardInterrupt:
                print("interrupted; train.py goes on with --resume", file=sys.stderr)
                return 130
    return run


class Parser(argparse.ArgumentParser):
    """argparse with the options that both scripts have; its errors are UserErrors."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawTextHelpFormatter)
        add = self.add_argument
        add("--data", type=Path, help="data set: a folder with NAME/train/good")
        add("--category", nargs="+", default=[], metavar="NAME", help="its categories, or all")
        add("--demo", action="store_true", help="the toy set, drawn if absent; needs no download")
        add("--out", type=Path, default=Path("runs"), help="results go to OUT/NAME (default: runs)")
        add("--device", default="auto", choices=("auto", *DEVICES), help="(default: auto)")

    def error(self, message):
        """Called by argparse for options that it cannot read."""
        raise UserError(f"{message}; see --help")


def choose_device(name):
    """The torch device for "auto" (cuda, else mps, else cpu) or a name; printed. UserError."""
    accelerators = zip(DEVICES, (torch.cuda, torch.backends.mps))
    there = [device for device, backend in accelerators if backend.is_available()] + ["cpu"]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name}: torch finds none on this machine; use --device auto")
    torch.set_float32_matmul_precision("highest")  # TF32 would blur the distances of (E4)
    title = torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device: {name} ({title}), torch {torch.__version__}")
    return torch.device(name)


def choose_categories(root, names):
    """The categories of a data set that were asked for. UserError with a list of those there."""
    if root is None or not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one with NAME/train/good, or --demo")
    there = sorted(path.parent.parent.name for path in root.glob("*/train/good"))
    if not there:
        raise UserError(f"--data {root}: no NAME/train/good in it; of a category give the parent")
    unknown = [name for name in names if name not in (*there, "all")]
    if unknown or not names:
        raise UserError(f"--category {' '.join(unknown)}: not in {root}; in it: {', '.join(there)}")
    chosen = there if "all" in names else list(dict.fromkeys(names))
    if "mean" in chosen:
        raise UserError(f"{root / 'mean'}: results.csv calls the means so; rename the folder")
    return chosen


def each_category(names, work):
    """work(name) for each; a UserError is reported and the others go on. Returns the exit code."""
    code = 0
    for name in names:
        try:
            work(name)
        except UserError as error:
            report(error)
            code = 2
    return code


def progress(items, what, total):
    """Yield the items; on a terminal, keep one line with the percentage and the time left."""
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = (time.monotonic() - start) / done * (total - done)
            end = "\n" if done == total else ""
            print(f"\r{what}: {100 * done // total} %, {left:.0f} s left   ", end=end,
                  file=sys.stderr, flush=True)


def write_whole(path, write):
    """write(temporary path), then rename: `path` is complete, or as it was before. UserError."""
    temporary = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error}); choose another --out") from error


def write_csv(path, header, rows):
    """A table with a header line, written whole."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    write_whole(path, lambda temporary: temporary.write_text(table.getvalue(), encoding="utf-8"))


def list_images(folder):
    """The image files in and below a folder, sorted, without hidden ones. UserError if none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise UserError(f"{folder}: no images there; expected {', '.join(IMAGE_SUFFIXES)}")
    for path in found:
        if re.search("[\ud800-\udfff]", str(path)):  # what Python makes of bytes that are not UTF-8
            raise UserError(f"{ascii(str(path))}: its name is not UTF-8; rename it")
    return found


@contextmanager
def opened(path):
    """Pillow's image at `path`; whatever is wrong with the file becomes a UserError."""
    try:
        with Image.open(path) as file:
            yield file
    except DAMAGED as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error


def lay_on(image, colour):
    """The image as RGB; where it is transparent, the colour shows."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def read_image(path):
    """An upright RGB image of 8 bits. Transparency is laid on white (our choice: like paper)."""
    with opened(path) as file:
        if file.mode[0] in "IF" or re.search(";16[BLNS]", str(file.tile)):
            raise UserError(f"{path}: 16-bit or float pixels would be clipped; scale all images "
                            "alike to 8 bits and save them as PNG")
        return lay_on(ImageOps.exif_transpose(file), "white")


def read_batches(paths, model, what):
    """Yield (B, 3, size, size) uint8, decoded by several threads, resized whole without a crop."""
    size, smallest = model.config.image_size, model.p

    def read(path):
        """One (3, size, size) uint8."""
        image = read_image(path)
        if min(image.size) < smallest:
            raise UserError(f"{path}: {image.width} × {image.height} pixels are smaller than a "
                            f"patch ({smallest}); use larger images")
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1)                  # (3, size, size)

    steps = range(0, len(paths), model.config.batch_size)
    with ThreadPoolExecutor() as pool:
        for start in progress(steps, what, len(steps)):
            yield torch.stack(list(pool.map(read, paths[start:start + model.config.batch_size])))


def picture(image):
    """A Pillow image of a (3, H, W) tensor in [0, 1]."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())  # (H, W, 3)


def picture_grid(rows, titles, side=CELL):
    """One Pillow image of equally long rows of pictures, fitted into squares, titles above them."""
    grid = Image.new("RGB", (len(titles) * (side + GAP), len(rows) * (side + GAP) + TITLE), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        draw.text((column * (side + GAP) + GAP, GAP), title, fill="black", font_size=TITLE / 2)
        for row, cells in enumerate(rows):
            cell = ImageOps.contain(cells[column], (side, side))
            grid.paste(cell, (column * (side + GAP), TITLE + row * (side + GAP)))
    return grid


def write_picture(path, image):
    """Save a Pillow image as PNG, written whole."""
    write_whole(path, lambda temporary: image.save(temporary, format="PNG"))


def check(config):
    """Return the config, or raise a UserError that names the first option out of its range."""
    for f in fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        values, choices = value if f.type is tuple else (value,), f.metadata["choices"]
        fits = type(value) is f.type and (f.type is not tuple or {type(v) for v in value} == {int})
        fits = fits and (low is None or all(low <= v <= high for v in values))
        if not fits or (choices and value not in choices):
            wanted = ", ".join(choices) if choices else f"{f.type.__name__}, {low} to {high}"
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be {wanted}")
    if not config.weights:
        raise UserError("--weights: empty; give imagenet, random or a file")
    if config.image_size % LARGEST_STRIDE:
        raise UserError(f"--image-size {config.image_size}: must be a multiple of {LARGEST_STRIDE}")
    if config.neighbourhood % 2 == 0:
        raise UserError(f"--neighbourhood {config.neighbourhood}: must be odd")
    return config


def read_tensors(path, remedy):
    """torch.load of plain tensors and values; a damaged file is a UserError."""
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes; torch.load skips its checksums
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise UserError(f"{path}: damaged (the checksum of {damaged}); {remedy}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def load_tensors(module, names, state, path, remedy):
    """Fill a module's tensors of these names; one missing or misshapen is a UserError naming it."""
    own, state = module.state_dict(), state if isinstance(state, dict) else {}
    for name in names:
        given, wanted = state.get(name), own[name]
        if not isinstance(given, torch.Tensor) or given.shape != wanted.shape:
            given = tuple(given.shape) if isinstance(given, torch.Tensor) else "missing"
            raise UserError(f"{path}: {name} is {given}, expected {tuple(wanted.shape)}; {remedy}")
        dense = given.layout == torch.strided and not given.is_meta and given.is_floating_point()
        if not dense or not given.isfinite().all():
            raise UserError(f"{path}: {name} is no tensor of finite numbers; {remedy}")
    module.load_state_dict({name: state[name] for name in names}, strict=False)


def build_model(config):
    """A PatchAE with its backbone's weights, and their fingerprint. UserError where none fit."""
    torch.manual_seed(config.seed)
    model, path = PatchAE(config), config.weights
    remedy = f"give --weights a state dict of --backbone {config.backbone}"
    if config.weights == "imagenet":
        weights = torchvision.models.get_model_weights(config.backbone)["IMAGENET1K_V1"]
        path, folder = weights.url, Path(torch.hub.get_dir()) / "checkpoints"
        try:
            state = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except DAMAGED as error:
            raise UserError(f"cannot download or read {path} ({error}): put that file into "
                            f"{folder}, give --weights FILE, or try --weights random") from error
    elif config.weights != "random":
        state = read_tensors(path, remedy)
    if config.weights != "random":
        names = [name for name in model.backbone.state_dict() if "num_batches" not in name]
        load_tensors(model.backbone, names, state, path, remedy)
    print(f"backbone: {config.backbone}, weights: {path}")
    digest = hashlib.sha256()
    for name, tensor in model.backbone.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return model, digest.hexdigest()


def checkpoint_names(model):
    """Names of the tensors that a checkpoint holds: those that the weights' source does not."""
    config, names = model.config, [n for n in model.state_dict() if "num_batches" not in n]
    return [name for name in names if not name.startswith("backbone.") or config.finetune_backbone
            or (config.weights == "random" and "running_" in name)]


def save_checkpoint(path, model, facts):
    """Write config, tensors and, beside them, a dict of plain values; see load_checkpoint."""
    state, config = model.state_dict(), asdict(model.config)
    tensors = {name: state[name].cpu() for name in checkpoint_names(model)}
    content = {"format": CHECKPOINT_FORMAT, "config": config, "tensors": tensors, **facts}
    write_whole(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path):
    """The content of a checkpoint, its config checked. UserError if it is none or damaged."""
    remedy = "make it anew with train.py"
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; {remedy}")
    content = read_tensors(path, remedy)
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: not a checkpoint of format {CHECKPOINT_FORMAT!r}; {remedy}")
    try:
        content["config"] = check(Config(**content["config"]))
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: its config does not fit ({error}); {remedy}") from error
    return content


def restore(content, path, weights=None):
    """The trained PatchAE of a checkpoint; `weights` overrides where the backbone's come from."""
    config = content["config"]
    model, fingerprint = build_model(dataclasses.replace(config, weights=weights or config.weights))
    if fingerprint != content.get("fingerprint"):
        raise UserError(f"{path}: made with other backbone weights than "
                        f"{weights or config.weights}; give those of its training with --weights")
    model.config = config
    load_tensors(model, checkpoint_names(model), content.get("tensors"), path, "train again")
    return model
