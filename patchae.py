"""Patch AE: patch-wise auto-encoder for visual anomaly detection (arXiv 2308.00429), top to bottom.

Training sees normal images only. Each gets artificial defects (⊗), and the auto-encoder must
rebuild the image *with* its defects. The decoder draws every patch from one feature vector, r_ij,
and sees nothing else. So a defect that is rebuilt is contained in r_ij: no other vector can help.
At test time we compare each vector with the vectors of all normal images. The distance to the
nearest one is the anomaly score of the patch.

    image ⊗ defects → backbone → ⊕ → encoder → R → decoder → patches    (training: E1, E2, E3)
    image           → backbone → ⊕ → encoder → R → nearest in M → map → score   (test: E1, E4, E5)

The labels (E1) to (E5) are ours: match them to the numbered equations of your copy of the paper.
Where the paper is known to make a choice, a comment says `paper`. Elsewhere it says `our choice`,
with the reason.

Notation
    symbol   name in code   shape              meaning
    B                                          images at once; N: normal images; T: scored images
    I        image          (B, 3, H, W)       image in [0, 1]; in training with artificial defects
    α        alpha          (1, h, w)          opacity of an artificial defect in its box, [0, 1]
    p        patch_size                        side of a patch, in pixels
    H', W'   grid                              patches in a column and in a row, H/p = W/p
    i, j                                       row and column of a patch, and of its vector
    P        P                                 patches of an image, H'·W'
    Φ_l      stage_map      (B, C_l, H_l, W_l) output of stage l of the backbone, ≥ 0: one scale
    k        neighbourhood                     side of the neighbourhood that is averaged, in places
    n        count          (1, 1, H_l, W_l)   neighbours that exist: k² inside, fewer at the border
    Φ        features       (B, C, H', W')     all Φ_l on the patch grid, joined; C is c in the code
    R        r              (B, C₃, H', W')    vectors r_ij of C₃ numbers (the paper's name), c3
    f_e      represent                         backbone, ⊕, encoder; θ_e: their weights
    W₁, W₂   W1, W2                            the encoder's two layers, with biases b₁, b₂
    f_d      decoder                           decoder; θ_d: its weights
    V₁, V₂   V1, V2                            the decoder's two layers, with biases d₁, d₂
    I_ij     patches        (B, 3p², H', W')   the image cut into patches of p × p pixels
    Î_ij     rebuilt        (B, 3p², H', W')   the patches as the decoder draws them from R
    L        loss           ()                 reconstruction loss
    λ        defect_weight                     share of the loss of patches with a defect alone
    M        memory         N × (P, C₃)        for each normal image its vectors; m is one of them
    s_ij     anomaly_map    (B, H', W')        distance of each r_ij to its nearest vector in M
    S        scores         (B,)               anomaly score of each image
"""
import argparse
import csv
import io
import math
import random
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import normalize


# ---- ⊗ artificial defects: drawn into a normal image in [0, 1], before normalising --------------
# paper: artificial defects are added, and must be rebuilt. Their kinds and numbers are our choice.
# The ranges run from faint to obvious, because we do not know what real defects look like.
MOST_DEFECTS = 6              # per image: 1 to 6, so that every image has a defect to learn from
BOX_SIDE = (1 / 24, 1 / 4)    # of the image side: from about one patch to a large stain
BLOB_CELLS = 4                # noise cells that bend the rim of a blob: few, so that it is smooth
BLOB_RIM = 0.3                # level at which the blob ends inside its box
HARD = 0.1                    # width of a blob's rim that looks cut out
SOFT = 1.0                    # width of a blob's rim that fades
GAIN = (0.6, 1.4)             # factor on each colour of a pasted piece
OPACITY = (0.3, 1.0)          # factor on α of scratches and stains; thin ones are fainter still
GRAIN = (4, 40)               # pixels of a stain's noise; finer noise would look like sensor noise
SOFTEN = 3                    # pixels: smoothing of a scratch, about as much as a lens does


def irregular_blob(h, w, softness):
    """Draw the opacity α (1, h, w) of a disc whose rim is bent by noise; 0 at its box's border.

    softness: width of the rim, HARD to SOFT. Our choice: real stains have no straight edges.
    """
    noise = torch.randn(1, 1, BLOB_CELLS, BLOB_CELLS)
    noise = F.interpolate(noise, (h, w), mode="bicubic")[0]               # (1, h, w)
    y = torch.linspace(-1, 1, h)[:, None]                                 # (h, 1)
    x = torch.linspace(-1, 1, w)                                          # (w,)
    disc = (1 - x * x - y * y).clamp(min=0)                               # (h, w)
    return ((disc * (1 + noise / 2) - BLOB_RIM) / softness).clamp(0, 1)   # (1, h, w)


# Each of the next three functions returns paint (3, h, w) or (3, 1, 1) in [0, 1], and α (1, h, w).
# All take the other image, so that add_defects can call any of them; only altered_paste uses it.
def altered_paste(other, h, w):
    """Cut a piece out of another normal image, flip it and change its colours.

    Our choice: it has the texture of the part, so the decoder cannot learn that a defect is smooth.
    """
    top = random.randint(0, other.shape[1] - h)
    left = random.randint(0, other.shape[2] - w)
    piece = other[:, top:top + h, left:left + w].flip(random.choice((1, 2)))  # (3, h, w)
    gain = torch.empty(3, 1, 1).uniform_(*GAIN)
    return (piece * gain).clamp(0, 1), irregular_blob(h, w, HARD)


def scratch(other, h, w):
    """Draw a thin curve of one colour: dots along a quadratic Bézier curve.

    Our choice: scratches, cracks and fibres are thinner than a patch.
    """
    t = torch.linspace(0, 1, 2 * (h + w))      # (T,), dense enough to leave no gap
    start, bend, end = torch.rand(3, 2, 1)     # (2, 1) each: y and x, in parts of the box
    y, x = (1 - t)**2 * start + 2 * t * (1 - t) * bend + t**2 * end       # (T,) each
    alpha = torch.zeros(1, h, w)
    alpha[0, (y * (h - 1)).round().long(), (x * (w - 1)).round().long()] = 1
    width = random.choice((1, 3))              # pixels, before it is softened
    alpha = F.max_pool2d(alpha, width, stride=1, padding=width // 2)      # (1, h, w)
    alpha = F.avg_pool2d(alpha, SOFTEN, stride=1, padding=SOFTEN // 2)    # (1, h, w)
    return torch.rand(3, 1, 1), alpha * random.uniform(*OPACITY)


def stain(other, h, w):
    """Draw a spot of coloured noise. Where the noise is coarse the spot has one colour.

    Our choice: dirt, oil and rust have one colour or a grain of their own.
    """
    grain = random.randint(*GRAIN)
    cells = torch.rand(1, 3, math.ceil(h / grain), math.ceil(w / grain))
    paint = F.interpolate(cells, (h, w), mode="bilinear")[0]              # (3, h, w)
    alpha = irregular_blob(h, w, random.choice((HARD, SOFT)))             # (1, h, w)
    return paint, alpha * random.uniform(*OPACITY)


def add_defects(image, other):
    """⊗: draw 1 to 6 artificial defects, I ← (1 − α) I + α paint, each in a box at a random place.

    image, other: (3, H, W) normal images in [0, 1]. Returns the image with its defects, (3, H, W)
    in [0, 1], and the mask (1, H, W), True where α > 0. paper: defects are added.
    """
    image = image.clone()
    height, width = image.shape[1:]
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for _ in range(random.randint(1, MOST_DEFECTS)):
        h = math.ceil(height * random.uniform(*BOX_SIDE))
        w = math.ceil(width * random.uniform(*BOX_SIDE))
        draw = random.choice((altered_paste, scratch, stain))
        paint, alpha = draw(other, h, w)
        top = random.randint(0, height - h)
        left = random.randint(0, width - w)
        box = image[:, top:top + h, left:left + w]                        # (3, h, w), a view
        box[:] = (1 - alpha) * box + alpha * paint
        mask[:, top:top + h, left:left + w] |= alpha > 0
    return image, mask


# ---- Φ: the backbone and ⊕ ----------------------------------------------------------------------
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # colours of the images that the weights were trained on
IMAGENET_STD = (0.229, 0.224, 0.225)
TINY = 1e-6  # length: keeps a vector of zeros from being divided by zero


def make_backbone(name, stages):
    """Build a torchvision ResNet that ends after the last stage in use.

    It maps (B, 3, H, W) to a dict of maps Φ_l (B, C_l, H_l, W_l) ≥ 0, one for each of the stages.
    Our choice: every convolution mirrors its input at the border. Zero padding looks like an
    artificial edge to the network, so the border of a normal image would seem anomalous.
    """
    resnet = torchvision.models.get_model(name, weights=None)
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    return create_feature_extractor(resnet, [f"layer{stage}" for stage in stages]).eval()


def temper_contrast(stage_map):
    """Divide each vector by the square root of its length: (B, C_l, H_l, W_l) ≥ 0 to the same.

    Our choice: at four times the contrast the vector becomes only twice as long. Highlights differ
    most from one normal image to the next, and would count more than a defect in the dark.
    """
    length = stage_map.norm(dim=1, keepdim=True)                          # (B, 1, H_l, W_l)
    return stage_map / length.clamp(min=TINY).sqrt()                      # (B, C_l, H_l, W_l)


def average_neighbours(stage_map, neighbourhood):
    """Average the k × k places around each place: (B, C_l, H_l, W_l) to the same.

    Our choice: after the average a patch that moved a little still matches. At the border only n
    of the k² places exist. Their sum is divided by k √n, not by n, so that all places vary alike.
    """
    k = neighbourhood
    # avg_pool2d counts the zeros that it pads with, so k² times its answer is a sum
    total = k**2 * F.avg_pool2d(stage_map, k, stride=1, padding=k // 2)   # (B, C_l, H_l, W_l)
    # the same sum over a map of ones counts the neighbours that exist: n
    ones = torch.ones_like(stage_map[:1, :1])                             # (1, 1, H_l, W_l)
    count = k**2 * F.avg_pool2d(ones, k, stride=1, padding=k // 2)        # (1, 1, H_l, W_l)
    # inside n = k² and this is the mean. The standard deviation of a sum of n independent values
    # grows with √n. So a mean over fewer values would vary more, and the border would score high.
    return total / (k * count.sqrt())                                     # (B, C_l, H_l, W_l)


def concatenate_scales(maps, grid, neighbourhood):
    """⊕: average each map over its neighbours, bring it to grid × grid places, concatenate them: Φ.

    maps: (B, C_l, H_l, W_l) each, square. Returns (B, C, H', W'). paper: several scales, brought to
    one size and concatenated. Our choice: a finer map is averaged over each patch, so that nothing
    is skipped. Where its places do not fit into the patches (48 into 32), each place is repeated
    first (48 to 96), and then they do. A coarser map is interpolated.
    """
    joined = []
    for stage_map in maps:
        average = average_neighbours(stage_map, neighbourhood)            # (B, C_l, H_l, W_l)
        side = average.shape[-1]
        if side > grid:
            common = math.lcm(side, grid)
            fine = F.interpolate(average, (common, common), mode="nearest")  # (B, C_l, common, …)
            joined.append(F.avg_pool2d(fine, common // grid))             # (B, C_l, H', W')
        else:
            joined.append(F.interpolate(average, (grid, grid), mode="bilinear"))  # (B, C_l, H', W')
    return torch.cat(joined, dim=1)                                       # (B, C, H', W')


# ---- R: the encoder, and the decoder ------------------------------------------------------------
# A 1×1 convolution is one linear layer W x + b, applied to the vector x of each place on its own.
class Encoder(nn.Module):
    """Two blocks of 1×1 convolution and ReLU (paper). With the backbone and ⊕ it is f_e.

    start "identity": both layers begin as the identity. Φ ≥ 0 passes both ReLUs, so R = Φ exactly
    (our choice: training starts from useful distances). "random": torch's own initial weights.
    """

    def __init__(self, c, c3, start):
        super().__init__()
        self.W1 = nn.Conv2d(c, c3, 1)   # W₁, b₁
        self.W2 = nn.Conv2d(c3, c3, 1)  # W₂, b₂
        if start == "identity":  # then c3 = c
            for layer in (self.W1, self.W2):
                nn.init.dirac_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features):
        """(E1) R = f_e(I; θ_e) = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂), where Φ is ⊕ of the maps of I.

        (B, C, H', W') to (B, C₃, H', W'). paper.
        """
        hidden = F.relu(self.W1(features))                                # (B, C₃, H', W')
        return F.relu(self.W2(hidden))                                    # (B, C₃, H', W')


class Decoder(nn.Module):
    """1×1 convolution, ReLU, 1×1 convolution (paper; ReLU is our choice: as in the encoder): f_d.

    Our choice: its last bias is 1/2, so that it begins near grey, the middle of [0, 1], and spends
    no steps on learning that.
    """

    def __init__(self, c3, pixels):
        super().__init__()
        self.V1 = nn.Conv2d(c3, c3, 1)      # V₁, d₁
        self.V2 = nn.Conv2d(c3, pixels, 1)  # V₂, d₂; pixels: 3p²
        nn.init.constant_(self.V2.bias, 1 / 2)

    def forward(self, r):
        """(E2) Î_ij = f_d(r_ij; θ_d) = V₂ ReLU(V₁ r_ij + d₁) + d₂: one vector rebuilds one patch.

        (B, C₃, H', W') to (B, 3p², H', W'). paper.
        """
        hidden = F.relu(self.V1(r))                                       # (B, C₃, H', W')
        return self.V2(hidden)                                            # (B, 3p², H', W')


# ---- the loss -----------------------------------------------------------------------------------
def patchify(image, patch_size):
    """Cut images into P = H'·W' patches: (B, 3, H'p, W'p) to (B, 3p², H', W'). paper."""
    return F.pixel_unshuffle(image, patch_size)                           # (B, 3p², H', W')


def unpatchify(patches, patch_size):
    """Put patches together to images, the inverse of patchify: (B, 3p², H', W') to (B, 3, H, W)."""
    return F.pixel_shuffle(patches, patch_size)                           # (B, 3, H, W)


def patch_error(rebuilt, patches):
    """The term of each patch in (E3), ‖Î_ij − I_ij‖² / 3p².

    rebuilt, patches: (B, 3p², H', W'). Returns (B, H', W').
    """
    squared_norm = (rebuilt - patches).square().sum(dim=1)                # (B, H', W')
    return squared_norm / patches.shape[1]                                # (B, H', W')


def reconstruction_loss(rebuilt, patches):
    """(E3) L = 1/(P · 3p²) Σ_ij ‖Î_ij − I_ij‖², where I is the image with artificial defects.

    rebuilt, patches: (B, 3p², H', W'), the mean over the B images. paper.
    """
    return patch_error(rebuilt, patches).mean()                           # ()


def training_loss(rebuilt, image, mask, patch_size, defect_weight):
    """What training minimises: (1 − λ) · (E3) + λ · (E3) of the patches with a defect alone.

    rebuilt: (B, 3p², H', W'); image: (B, 3, H, W) in [0, 1] with its defects, which is the input
    and the target (paper); mask: (B, 1, H, W) bool. Without any defect it is (E3).
    Our choice: few patches have a defect, and those are the hard ones.
    """
    patches = patchify(image, patch_size)                                 # (B, 3p², H', W')
    loss = reconstruction_loss(rebuilt, patches)
    if not mask.any():
        return loss                                                       # ()
    defective = F.max_pool2d(mask.float(), patch_size)[:, 0]              # (B, H', W'), 1: defect
    errors = patch_error(rebuilt, patches) * defective                    # (B, H', W')
    return (1 - defect_weight) * loss + defect_weight * errors.sum() / defective.sum()  # ()


# ---- scoring ------------------------------------------------------------------------------------
def nearest_distance(r, memory):
    """(E4) s_ij = min_{m∈M} ‖r_ij − m‖₂: the anomaly map.

    r: (B, C₃, H', W'); memory: N ≥ 1 tensors (P, C₃) or smaller. Returns (B, H', W'). paper.
    Our choice: we take one normal image at a time and keep the smallest distance so far. So however
    large M is, only B · P · P distances are in memory at once.
    torch.cdist computes with matrix products and rounds. So the distance of a vector to itself is
    not 0 but about 0.01, more for longer vectors. The exact mode of cdist is many times slower.
    """
    queries = r.movedim(1, -1).flatten(0, 2)                              # (B · P, C₃)
    nearest = torch.full((len(queries),), math.inf, device=r.device)
    for vectors in memory:
        nearest = torch.minimum(nearest, torch.cdist(queries, vectors).amin(dim=1))
    return nearest.view(len(r), *r.shape[2:])                             # (B, H', W')


def image_score(anomaly_map, highest=3):
    """(E5) S = mean of the three largest s_ij: an image is as anomalous as its worst patches.

    (B, H', W') with at least three places, to (B,). paper: S comes from the map. Our choice: three
    are steadier than one, and still local.
    """
    return anomaly_map.flatten(1).topk(highest).values.mean(dim=1)        # (B,)


# ---- the model ----------------------------------------------------------------------------------
@dataclass
class Config:
    """All that decides the result. train.py has an option for each; the checkpoint keeps them."""
    backbone: str = "wide_resnet50_2"  # our choice: the one that most baselines use
    weights: str = "imagenet"          # paper: pre-trained; or "random", or a file
    finetune_backbone: bool = False    # our choice: ImageNet features carry defects already
    stages: tuple = (1, 2, 3)          # our choice: those that ⊕ joins, from detail to context
    image_size: int = 384              # our choice: pixels; small defects are still visible
    patch_size: int = 12               # our choice: pixels; gives 32 × 32 patches
    neighbourhood: int = 3             # our choice: a patch that moved a little still matches
    channels: int | None = None        # our choice: C₃ = C, as many as ⊕ has
    start: str = "identity"            # our choice: R = Φ at the start, or "random"
    defects: bool = True               # paper: training images get artificial defects
    defect_weight: float = 0.5         # our choice: λ; patches with a defect are few
    steps: int = 1000                  # our choice: one image each; then the loss is almost flat
    lr: float = 2e-3                   # our choice: Adam's rate for the decoder, with a cosine
    encoder_lr: float = 1e-5           # our choice: slower, because distances are good at the start
    memory_fraction: float = 1.0       # our choice: M keeps all vectors
    seed: int = 0                      # our choice: any number


RECIPES = {
    # ImageNet features, frozen: they carry the defects of most things already
    "parts": Config(),
    # fine textures such as paper or felt: random weights, and training makes the features
    "textures": Config(backbone="resnet18", weights="random", finetune_backbone=True, stages=(1, 2),
                       image_size=256, patch_size=8, steps=1500, lr=5e-3, encoder_lr=1e-3),
    # the same on small images and without an average: no download, and soon done
    "demo": Config(backbone="resnet18", weights="random", finetune_backbone=True, stages=(1, 2),
                   image_size=96, patch_size=4, neighbourhood=1, steps=1500, encoder_lr=1e-3),
}
MOST_SCORED = 100  # our choice: normal images scored for the threshold; more change it little
GPU_BATCH = 8      # our choice: images at once on a GPU; on a CPU it is one, which fits its cache


class PatchAE(nn.Module):
    """The detector: backbone, ⊕, encoder, decoder, and what it remembers of the normal images."""

    def __init__(self, config):
        super().__init__()
        size, patch = config.image_size, config.patch_size
        if size % 32 or size % patch:
            raise UserError(f"--image-size {size} --patch-size {patch}: the image size must be a "
                            "multiple of 32 and of the patch size, as 384 is of 12")
        self.config = config
        self.grid = size // patch                                         # H' = W'
        self.backbone = make_backbone(config.backbone, config.stages)
        self.backbone.requires_grad_(config.finetune_backbone)
        with torch.no_grad():
            c = self.features(torch.zeros(1, 3, size, size)).shape[1]     # C
        c3 = config.channels or c                                         # C₃
        if config.start == "identity" and c3 != c:
            raise UserError(f"--channels {c3}: the identity start needs {c}, as many as ⊕ has; "
                            "leave the option out, or use --start random")
        self.encoder = Encoder(c, c3, config.start)
        self.decoder = Decoder(c3, 3 * patch**2)
        self.forget()

    @property
    def device(self):
        """Where the weights are, and where all is computed."""
        return self.decoder.V1.weight.device

    def features(self, image):
        """Φ of images: (B, 3, H, W) in [0, 1] to (B, C, H', W').

        Our choice: batch normalisation always uses the stored statistics, also in training.
        Statistics of the one training image would let a defect change Φ at every place.
        """
        self.backbone.eval()
        # channels_last is faster by a third on a CPU; on GPUs some versions compute wrongly in it
        layout = torch.channels_last if image.device.type == "cpu" else torch.contiguous_format
        image = normalize(image, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=layout)
        maps = [temper_contrast(stage_map) for stage_map in self.backbone(image).values()]
        return concatenate_scales(maps, self.grid, self.config.neighbourhood)

    def represent(self, image):
        """R of images: (B, 3, H, W) in [0, 1] to (B, C₃, H', W'). The whole of f_e."""
        return self.encoder(self.features(image))

    def forward(self, image):
        """Î of images: (B, 3, H, W) in [0, 1] to (B, 3p², H', W'), patch by patch."""
        return self.decoder(self.represent(image))

    def loss(self, image, mask):
        """What training minimises: image (B, 3, H, W) with its defects, mask (B, 1, H, W) to ()."""
        return training_loss(self(image), image, mask, self.config.patch_size,
                             self.config.defect_weight)                   # ()

    def forget(self):
        """Forget the normal images and all that was computed from them, as after a training."""
        self.images = torch.empty(0, dtype=torch.uint8)  # (N, 3, H, W)
        self.names = []                                  # their N file names, if they are known
        self.normal_scores = torch.empty(0)              # S of each against M without itself
        self.memory = []                                 # M

    def check_images(self, images):
        """UserError unless images are (T, 3, H, W) uint8 of the model's size, T ≥ 1, on the CPU."""
        wanted = (3, self.config.image_size, self.config.image_size)
        if (images.dtype != torch.uint8 or images.shape[1:] != wanted or not len(images)
                or images.device.type != "cpu"):
            raise UserError(f"images: expected {('N', *wanted)} of torch.uint8 on the CPU, found "
                            f"{tuple(images.shape)} of {images.dtype} on {images.device}; use "
                            "read_images")

    def batches(self, images, progress=iter):
        """Yield images (T, 3, H, W) uint8 in parts (B, 3, H, W) in [0, 1] on the device.

        progress: wraps a sequence, as tqdm does. UserError: see check_images.
        """
        self.check_images(images)
        for part in progress(images.split(1 if self.device.type == "cpu" else GPU_BATCH)):
            yield part.to(self.device) / 255

    @torch.inference_mode()
    def build_memory(self, progress=iter):
        """Fill M with the vectors of the normal images, a tensor (P, C₃) for each.

        With config.memory_fraction < 1 only this share of them, at least one, drawn by config.seed.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        P = self.grid**2
        keep = max(1, math.ceil(P * self.config.memory_fraction))
        memory = []
        for image in self.batches(self.images, progress):
            for vectors in self.represent(image).flatten(2).mT:           # (P, C₃)
                kept = torch.randperm(P, generator=generator)[:keep].sort().values
                memory.append(vectors[kept.to(vectors.device)])           # (keep, C₃)
        self.memory = memory  # at once, so that nobody ever sees a half of it

    @torch.inference_mode()
    def remember(self, images, names=(), progress=iter):
        """Build M from normal images (N, 3, H, W) uint8, and score them for the threshold.

        Each is scored against the vectors of all the others; of more than MOST_SCORED images so
        many, evenly spread. Leave out copies before: they would score 0. names: the file names,
        which only pictures show. UserError for images of another form, or fewer than two.
        """
        self.check_images(images)
        if len(images) < 2:
            raise UserError("one normal image is not enough; two different ones are needed")
        self.forget()
        self.images, self.names = images, [str(name) for name in names]
        self.build_memory(progress)
        scores, count = [], min(len(images), MOST_SCORED)
        for i in progress([part * len(images) // count for part in range(count)]):
            if len(self.memory[i]) == self.grid**2:  # all vectors of the image are in M
                r = self.memory[i].mT.reshape(1, -1, self.grid, self.grid)  # (1, C₃, H', W')
            else:
                r = self.represent(*self.batches(images[i:i + 1]))        # (1, C₃, H', W')
            anomaly_map = nearest_distance(r, self.memory[:i] + self.memory[i + 1:])
            scores.append(image_score(anomaly_map).item())
        self.normal_scores = torch.tensor(scores)

    @torch.inference_mode()
    def anomaly_maps(self, images):
        """The anomaly maps (T, H', W'), on the CPU, of images (T, 3, H, W) uint8.

        UserError if there are no normal images to compare with, or for images of another form.
        """
        if not len(self.images):
            raise UserError("this model has no normal images to compare with: call remember")
        if not self.memory:  # it was loaded
            self.build_memory()
        self.memory = [vectors.to(self.device) for vectors in self.memory]  # if the model moved
        maps = [nearest_distance(self.represent(image), self.memory).cpu()
                for image in self.batches(images)]
        return torch.cat(maps)                                            # (T, H', W')

    def threshold(self, quantile=0.99):
        """The score above which an image counts as anomalous: this quantile of the normal scores.

        Our choice: 0.99. With 100 normal images expect about 2 % false alarms, with fewer images
        more. UserError if there are no scores.
        """
        if not len(self.normal_scores):
            raise UserError("this model has no threshold: call remember")
        return torch.quantile(self.normal_scores, quantile).item()

    def save(self, path):
        """Write all that scoring needs to one file, which load reads. OSError.

        A file that was there stays whole until the new one takes its place in one step.
        """
        images = self.images.clone()  # of a slice torch.save would write the whole
        config = {**asdict(self.config), "weights": str(self.config.weights)}  # it may be a Path
        content = {"config": config, "model": self.state_dict(), "images": images,
                   "names": self.names, "normal_scores": self.normal_scores}
        file = io.BytesIO()  # torch.save straight to a full disk fails in ways that hide the reason
        torch.save(content, file)
        replace_file(path, file.getbuffer())

    @classmethod
    def load(cls, path, device="cpu"):
        """A model from a file that save wrote. UserError if it is not one of this version."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; train it first, or copy a checkpoint there")
        try:
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch.load does not notice changed bytes
                    raise ValueError("damaged bytes")
            content = torch.load(path, map_location="cpu", weights_only=True)
            with torch.device("meta"):  # draws no weights, since those of the file take their place
                model = cls(Config(**content["config"]))
            model.load_state_dict(content["model"], assign=True)
            model.images = content["images"].byte()
            model.names = [str(name) for name in content["names"]]
            model.normal_scores = content["normal_scores"].float()
        except Exception as error:  # foreign or damaged: a dozen kinds, one remedy
            raise UserError(f"{path}: not a checkpoint of this version ({error!r:.99}); make it "
                            "with train.py") from error
        return model.to(device)


# ==== nothing from the paper below: chance, weights, device, what both scripts share =============
BACKBONES = ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2")
MEMORY_WORDS = ("out of memory", "not enough memory", "allocate memory")  # as torch says it


class UserError(Exception):
    """Bad input. Its text is one line that names the file or option and says what to do."""


@contextmanager
def seeded(seed):
    """Inside, the seed decides all random draws; afterwards the caller's state is as before."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def load_weights(backbone, name, source):
    """Fill the backbone by the download ("imagenet") or a file. UserError where it does not fit."""
    try:
        if source == "imagenet":
            published = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            source = published.url
            state = published.get_state_dict(check_hash=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        missing = backbone.load_state_dict(state, strict=False).missing_keys  # layer4, fc: unused
        if missing:
            raise KeyError(missing[0])
    except Exception as error:  # no network, foreign bytes, other shapes: a dozen kinds, one remedy
        raise UserError(f"--weights {source}: does not fit --backbone {name} ({error!r:.99}); "
                        f"give a state-dict file, put the download into {torch.hub.get_dir()}"
                        "/checkpoints, or try --weights random") from error


def build_model(config, device="cpu"):
    """A new PatchAE with the weights of its backbone; config.seed draws all others. UserError."""
    with seeded(config.seed):
        model = PatchAE(config)
    if config.weights != "random":
        load_weights(model.backbone, config.backbone, config.weights)
    return model.to(device)


def choose_device(name):
    """The torch device, printed. "auto": cuda if torch finds one, else the CPU. UserError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = "cuda" if found["cuda"] else "cpu"
    if not found[name]:
        raise UserError(f"--device {name}: torch finds none on this machine; use --device auto")
    # without these two lines newer NVIDIA cards round to 10 bits, so that R is not Φ at the start,
    # and may sum in another order every time
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    print(f"device: {name} ({torch.get_num_threads()} CPU threads), torch {torch.__version__}")
    return torch.device(name)


def make_parser(description):
    """An argparse parser with the options that both scripts have. Its errors are one line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"error: {text}; --help lists the options\n")
    add = parser.add_argument_group("data and results").add_argument
    add("--data", type=Path, metavar="ROOT", help="data set: a folder with NAME/train/good")
    add("--category", type=lambda text: text.rstrip("/\\"), nargs="+", default=[], metavar="NAME",
        help="its categories, or: all")
    add("--demo", action="store_true",
        help="use the toy set, which is drawn if it is not there, and the recipe of the demo")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/NAME (default: runs)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="auto takes cuda if there is one, else the CPU (default: auto)")
    return parser


def number(kind, low, high):
    """The type of an option: an int or a float from low to high."""
    def convert(text):
        """The number, or an error that argparse prints."""
        value = kind(text)
        if not low <= value <= high:  # true of NaN, too
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}")
        return value
    convert.__name__ = kind.__name__  # argparse names it in its errors
    return convert


def replace_file(path, content):
    """Write bytes beside path, then rename: the old file is there until the new one is whole."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_table(path, rows):
    """Write a CSV file in one step. A file name that is not UTF-8 is written with escapes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_file(path, text.getvalue().encode("utf-8", "backslashreplace"))


def progress(items):
    """Yield the items of a sequence; on a terminal, one line says how far and how long still."""
    begin = time.monotonic()
    terminal = getattr(sys.stderr, "isatty", bool)()  # stderr may be None, or a logger
    for done, item in enumerate(items, 1):
        yield item
        if terminal:
            left = (time.monotonic() - begin) / done * (len(items) - done)
            end = "\n" if done == len(items) else ""
            print(f"\r{100 * done // len(items):3} %, {left:.0f} s left   ", end=end,
                  file=sys.stderr, flush=True)


def exit_code(work, *arguments):
    """What work(*arguments) returns, or 0. After bad input or a full disk one line on stderr, 2."""
    try:
        return work(*arguments) or 0
    except (UserError, OSError) as error:  # an OSError names its file itself
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in MEMORY_WORDS):
            raise
        message = (f"{arguments[0]}: out of memory ({error!r:.99}); use --memory-fraction 0.1 in "
                   "train.py, or a smaller --image-size")
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def run(main):
    """End the process with the exit code of main; 130 after Ctrl-C. Any console shows any name."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not, and shows any name
            stream.reconfigure(errors="replace", line_buffering=True)  # a log file grows, too
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data and of many pixels
    try:
        sys.exit(exit_code(main))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
