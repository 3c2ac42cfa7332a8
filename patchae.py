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
    symbol  name in code   shape              meaning
    I       image          (B, 3, H, W)       image in [0, 1]; in training it has artificial defects
    α       alpha          (1, h, w)          opacity of an artificial defect in its box, [0, 1]
    p       patch_size                        side of a patch, in pixels
    H'      grid                              patches in a column and in a row, H/p
    P       P                                 patches of an image, H'·W'
    k       neighbourhood                     side of the neighbourhood that is averaged, in places
    n       count          (1, 1, h, w)       neighbours that exist: k² inside, fewer at the border
    C       c                                 channels of Φ
    Φ_l     stage_map      (B, C_l, h, w)     map of stage l of the backbone, ≥ 0
    Φ       features       (B, C, H', W')     these maps on the patch grid, joined
    C₃      c3                                channels of R
    R       r              (B, C₃, H', W')    representation; the vector r_ij belongs to one patch
    I_ij    patches        (B, 3p², H', W')   the image cut into patches of p × p pixels
    Î_ij    rebuilt        (B, 3p², H', W')   the patches as the decoder draws them from R
    θ       parameters                        of encoder and backbone, θ_e; of the decoder, θ_d
    λ       defect_weight                     share of the loss of patches with a defect alone
    N       N                                 number of normal images
    M       memory         N × (P, C₃)        a list: for each normal image its vectors r_ij
    s_ij    anomaly_map    (B, H', W')        distance of each r_ij to its nearest vector in M
    S       score          (B,)               anomaly score of the image
"""
import copy
import io
import math
import random
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


class UserError(Exception):
    """Bad input. Its text is one line that names the file or option and says what to do."""


# ---- ⊗ artificial defects: drawn into a normal image in [0, 1], before normalising --------------
# paper: artificial defects are added, and must be rebuilt. Their kinds and numbers are our choice.
# The ranges run from faint to obvious, because we do not know what real defects look like.
MOST_DEFECTS = 6              # per image: 1 to 6, so that every image has a defect to learn from
BOX_SIDE = (1 / 24, 1 / 4)    # of the image side: from about one patch to a large stain
BLOB_CELLS = 4                # noise cells that bend the rim of a blob: few, so that it is smooth
BLOB_RIM = 0.3                # level at which the blob ends inside its box
HARD = 0.1                    # width of a blob's rim that looks cut out
SOFT = 1.0                    # width of a blob's rim that fades
GAIN = (0.6, 1.4)             # factor on each colour of a pasted patch
OPACITY = (0.3, 1.0)          # of scratches and stains: from faint to opaque
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
    """Cut a patch from another normal image, flip it, change its colours (our choice: shapes)."""
    top = random.randint(0, other.shape[1] - h)
    left = random.randint(0, other.shape[2] - w)
    patch = other[:, top:top + h, left:left + w].flip(random.choice((1, 2)))  # (3, h, w)
    gain = torch.empty(3, 1, 1).uniform_(*GAIN)
    return (patch * gain).clamp(0, 1), irregular_blob(h, w, HARD)


def scratch(other, h, w):
    """Draw a thin curve of one colour: dots along a quadratic Bézier curve (our choice: thin)."""
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
    """Draw a spot of coloured noise; where that is coarse it has one colour (our choice: dirt)."""
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


def make_backbone(name, layers):
    """Build a torchvision ResNet that ends after the last stage in use.

    It maps (B, 3, H, W) to a dict of maps (B, C_l, H_l, W_l) ≥ 0, one for each stage in layers.
    Our choice: every convolution mirrors its input at the border. Zero padding looks like an
    artificial edge to the network, so the border of a normal image would seem anomalous.
    """
    resnet = torchvision.models.get_model(name, weights=None)
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    return create_feature_extractor(resnet, [f"layer{stage}" for stage in layers]).eval()


def temper_contrast(stage_map):
    """Divide each vector by the square root of its length: (B, C_l, h, w) ≥ 0 to the same.

    Our choice: at four times the contrast the vector becomes only twice as long. Highlights differ
    most from one normal image to the next, and would count more than a defect in the dark.
    """
    length = stage_map.norm(dim=1, keepdim=True)                          # (B, 1, h, w)
    return stage_map / length.clamp(min=TINY).sqrt()                      # (B, C_l, h, w)


def average_neighbours(stage_map, neighbourhood):
    """Add up the k × k places around each place and divide by k √n: (B, C_l, h, w) to the same.

    n of these places exist. Our choice: after the average a patch that moved a little still
    matches. Inside the image n = k², and this is the mean. At the border a plain mean has fewer
    values, so it varies more, and normal images would score highest there. The sum of n independent
    values has a standard deviation that grows with √n. So after the division by k √n all places
    vary alike. The price: the vectors at the border become shorter, by the factor √n / k.
    """
    k = neighbourhood
    ones = torch.ones_like(stage_map[:1, :1])                             # (1, 1, h, w)
    total = k**2 * F.avg_pool2d(stage_map, k, stride=1, padding=k // 2)   # (B, C_l, h, w): the sum
    count = k**2 * F.avg_pool2d(ones, k, stride=1, padding=k // 2)        # (1, 1, h, w): n
    return total / (k * count.sqrt())                                     # (B, C_l, h, w)


def concatenate_scales(maps, grid, neighbourhood):
    """⊕: average each map over its neighbours, bring it to grid × grid places, concatenate them: Φ.

    maps: (B, C_l, H_l, W_l) each, square. Returns (B, C, H', W'). paper: several scales, brought to
    one size and concatenated. Our choice: a finer map is averaged over each patch, so that nothing
    is skipped. Where its places do not fit into the patches (48 into 32), each place is repeated
    first (48 to 96), and then they do. A coarser map is interpolated.
    """
    joined = []
    for m in maps:
        m = average_neighbours(m, neighbourhood)                          # (B, C_l, H_l, W_l)
        side = m.shape[-1]
        if side > grid:
            common = math.lcm(side, grid)
            m = F.interpolate(m, (common, common), mode="nearest")        # (B, C_l, common, common)
            joined.append(F.avg_pool2d(m, common // grid))                # (B, C_l, H', W')
        else:
            joined.append(F.interpolate(m, (grid, grid), mode="bilinear"))  # (B, C_l, H', W')
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
        if start == "identity":
            if c != c3:
                raise UserError(f"channels = {c3} (option --channels): the identity needs as many "
                                f"as ⊕ has, {c}; leave the option out, or use --start random")
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
        self.V1 = nn.Conv2d(c3, c3, 1)      # V₁, c₁
        self.V2 = nn.Conv2d(c3, pixels, 1)  # V₂, c₂; pixels: 3p²
        nn.init.constant_(self.V2.bias, 1 / 2)

    def forward(self, r):
        """(E2) Î_ij = f_d(r_ij; θ_d) = V₂ ReLU(V₁ r_ij + c₁) + c₂: one vector rebuilds one patch.

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
    torch.cdist computes with matrix products and rounds: the distance of a vector to itself comes
    out as up to 0.005, not 0. The exact mode of cdist is many times slower.
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
    layers: tuple = (1, 2, 3)          # our choice: stages joined by ⊕, from detail to context
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
    threshold_images: int = 100        # our choice: more would take longer and change little
    seed: int = 0                      # our choice: any number


# The demo needs no download. Random weights give weak features, so here training must improve the
# backbone, too. Early stages, small patches, no average, more steps, and a high rate for encoder
# and backbone. The images are small, so that it is done in two minutes.
DEMO = Config(backbone="resnet18", weights="random", finetune_backbone=True, layers=(1, 2),
              image_size=96, patch_size=4, neighbourhood=1, steps=1500, encoder_lr=1e-3)

BACKBONES = ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2")


def check_config(config):
    """Raise a UserError that names the first field whose value cannot be used, and its range."""
    size, patch = config.image_size, config.patch_size
    rules = {
        "backbone": (config.backbone in BACKBONES, f"one of {', '.join(BACKBONES)}"),
        "layers": (config.layers and set(config.layers) <= {1, 2, 3, 4}, "stages from 1 to 4"),
        "image_size": (64 <= size <= 2048 and size % 32 == 0, "a multiple of 32 from 64 to 2048"),
        "patch_size": (4 <= patch <= 32 and patch % 4 == 0 and size % patch == 0,
                       f"a multiple of 4 from 4 to 32 that divides --image-size {size}; 8 does"),
        "neighbourhood": (config.neighbourhood in (1, 3, 5, 7, 9), "1, 3, 5, 7 or 9"),
        "channels": (config.channels is None or 1 <= config.channels <= 8192, "from 1 to 8192"),
        "start": (config.start in ("identity", "random"), "identity or random"),
        "defect_weight": (0 <= config.defect_weight <= 1, "from 0 to 1"),
        "steps": (0 <= config.steps < 10**6, "from 0 to 999999"),
        "lr": (0 <= config.lr <= 1, "from 0 to 1"),
        "encoder_lr": (0 <= config.encoder_lr <= 1, "from 0 to 1"),
        "memory_fraction": (0 <= config.memory_fraction <= 1, "from 0 to 1"),
        "threshold_images": (0 <= config.threshold_images < 10**6, "from 0 to 999999"),
        "seed": (0 <= config.seed < 2**31, "from 0 to 2147483647")}
    for field, (accepted, range_in_words) in rules.items():
        if not accepted:
            raise UserError(f"{field} = {getattr(config, field)} (option "
                            f"--{field.replace('_', '-')}): must be {range_in_words}")


METHODS = ("trained", "raw", "reconstruction")  # distance in R, distance in Φ, error of the decoder


class PatchAE(nn.Module):
    """The detector: backbone, ⊕, encoder, decoder, and what it remembers of the normal images."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.grid = config.image_size // config.patch_size                # H'
        self.backbone = make_backbone(config.backbone, config.layers)
        self.backbone.requires_grad_(config.finetune_backbone)
        self.raw_backbone = self.backbone                # as it was before training
        if config.finetune_backbone:
            self.raw_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        with torch.no_grad():
            c = self.features(torch.zeros(1, 3, config.image_size, config.image_size)).shape[1]  # C
        c3 = config.channels or c                                         # C₃
        self.encoder = Encoder(c, c3, config.start)
        self.decoder = Decoder(c3, 3 * config.patch_size**2)
        self.images = torch.empty(0, dtype=torch.uint8)  # (N, 3, H, W), the normal images
        self.names = []                                  # their N file names, if they are known
        self.normal_scores = torch.empty(0)              # (n,) of normal images, without themselves
        self.memory = []                                 # M
        self.places = []                                 # N × (P,): i · W' + j of each r_ij
        self.remembered = None                           # the method whose vectors are in M
        self.batch_size = None                           # images at once; None: 1 on a CPU, else 8

    @property
    def device(self):
        """Where the weights are, and where all is computed."""
        return self.decoder.V1.weight.device

    def features(self, image, backbone=None):
        """Φ of images: (B, 3, H, W) in [0, 1] to (B, C, H', W'), by the model's own backbone.

        Our choice: its batch normalisation always uses the stored statistics, also in training.
        Statistics of the one training image would let a defect change Φ at every place.
        """
        backbone = (backbone or self.backbone).eval()
        # channels_last is faster by a third on a CPU; on GPUs some versions compute wrongly in it
        layout = torch.channels_last if image.device.type == "cpu" else torch.contiguous_format
        image = normalize(image, IMAGENET_MEAN, IMAGENET_STD).contiguous(memory_format=layout)
        maps = [temper_contrast(m) for m in backbone(image).values()]
        return concatenate_scales(maps, self.grid, self.config.neighbourhood)

    def represent(self, image):
        """R of images: (B, 3, H, W) in [0, 1] to (B, C₃, H', W'). The whole of f_e."""
        return self.encoder(self.features(image))

    def forward(self, image):
        """Î of images: (B, 3, H, W) in [0, 1] to (B, 3p², H', W'), patch by patch."""
        return self.decoder(self.represent(image))

    def vectors(self, image, method):
        """What is compared: R for the method "trained"; for "raw" Φ, as it was before training."""
        if method == "raw":
            return self.features(image, self.raw_backbone)
        return self.represent(image)

    def check_images(self, images):
        """UserError unless images are (N, 3, H, W) uint8 of the model's size, N ≥ 1, on the CPU."""
        wanted = (3, self.config.image_size, self.config.image_size)
        if (images.dtype != torch.uint8 or images.shape[1:] != wanted or not len(images)
                or images.device.type != "cpu"):
            raise UserError(f"images: expected {('N', *wanted)} of torch.uint8 on the CPU, found "
                            f"{tuple(images.shape)} of {images.dtype} on {images.device}; use "
                            "read_images")

    def batches(self, images, progress=iter):
        """Yield images (N, 3, H, W) uint8 in parts (B, 3, H, W) in [0, 1] on the device."""
        size = self.batch_size or (1 if self.device.type == "cpu" else 8)  # 1 fits a CPU's cache
        for batch in progress(images.split(size)):
            yield batch.to(self.device) / 255

    @torch.inference_mode()
    def build_memory(self, method="trained", progress=iter):
        """Fill M: of each normal image keep the share config.memory_fraction of its P vectors.

        At least one is kept. config.seed draws their places.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        P = self.grid**2
        keep = max(1, math.ceil(P * self.config.memory_fraction))
        self.memory, self.places, self.remembered = [], [], None
        for image in self.batches(self.images, progress):
            for vectors in self.vectors(image, method).flatten(2).mT:     # (P, C₃)
                places = torch.randperm(P, generator=generator)[:keep].sort().values
                self.memory.append(vectors[places.to(vectors.device)])    # (keep, C₃)
                self.places.append(places)
        self.remembered = method  # only now: after an interruption M is not whole

    @torch.inference_mode()
    def score_normal_images(self, progress=iter):
        """The scores S (n,) of normal images, each against the memory of all the others.

        At most config.threshold_images are scored, evenly spread. An exact copy of an image would
        make its score 0, so copies are left out together with it.
        """
        N = len(self.images)
        scored = min(N, self.config.threshold_images)
        first = first_copies(self.images)
        scores = []
        for i in progress([n * N // scored for n in range(scored)]):
            others = [vectors for j, vectors in enumerate(self.memory) if first[j] != first[i]]
            if others:
                image, = self.batches(self.images[i:i + 1])
                anomaly_map = nearest_distance(self.represent(image), others)
                scores.append(image_score(anomaly_map).item())
        return torch.tensor(scores)

    def remember(self, images, names=(), progress=iter):
        """Build M from normal images (N, 3, H, W) uint8, and score them for the threshold.

        names: their file names, which only pictures show. progress: wraps a sequence, as tqdm does.
        UserError: see check_images.
        """
        self.check_images(images)
        self.images, self.names = images, [str(name) for name in names]
        self.normal_scores = torch.empty(0)  # after an interruption no old threshold is left
        self.build_memory("trained", progress)
        self.normal_scores = self.score_normal_images(progress)

    @torch.inference_mode()
    def anomaly_maps(self, images, method="trained"):
        """The anomaly maps (N, H', W'), on the CPU, of images (N, 3, H, W) uint8.

        method "trained": (E4) in R; "raw": (E4) in Φ; "reconstruction": the terms of (E3), by which
        a classical auto-encoder scores. UserError if there are no normal images to compare with,
        for another method, and as check_images says.
        """
        self.check_images(images)
        if method not in METHODS:
            raise UserError(f"method {method!r}: must be one of {', '.join(METHODS)}")
        if method != "reconstruction" and method != self.remembered:
            if not len(self.images):
                raise UserError("this model has no normal images to compare with: call remember")
            self.build_memory(method)
        self.memory = [vectors.to(self.device) for vectors in self.memory]  # if the model moved
        maps = []
        for image in self.batches(images):
            if method == "reconstruction":
                one = patch_error(self(image), patchify(image, self.config.patch_size))
            else:
                one = nearest_distance(self.vectors(image, method), self.memory)
            maps.append(one.cpu())
        return torch.cat(maps)                                            # (N, H', W')

    def threshold(self, quantile=0.99):
        """The score above which an image counts as anomalous: this quantile of the normal scores.

        Our choice: 0.99. With 100 normal images expect about 2 % false alarms, with fewer images
        more. UserError if there are no scores.
        """
        if not len(self.normal_scores):
            raise UserError("no threshold: call remember; it needs two different normal images and "
                            "--threshold-images above 0")
        return torch.quantile(self.normal_scores, quantile).item()

    def save(self, path):
        """Write all that scoring needs to one file, which load reads. OSError."""
        images = self.images.clone()  # of a slice torch.save would write the whole
        config = {**asdict(self.config), "weights": str(self.config.weights)}  # it may be a Path
        content = {"config": config, "model": self.state_dict(), "images": images,
                   "names": self.names, "normal_scores": self.normal_scores}
        file = io.BytesIO()  # torch.save straight to a full disk fails in ways that hide the reason
        torch.save(content, file)
        unfinished = Path(f"{path}.part")
        try:
            unfinished.write_bytes(file.getbuffer())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path, device="cpu"):
        """A model from a file that save wrote. UserError if it is not one of this version."""
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
        except Exception as error:  # absent, foreign or damaged: a dozen kinds, one remedy
            raise UserError(f"{path}: not a checkpoint of this version ({error!r:.99}); make it "
                            "with train.py, without --skip-finished") from error
        return model.to(device)


# ==== nothing from the paper below: chance, copies, weights, device ==============================
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


def fingerprints(images):
    """A number for each image of (N, 3, H, W) uint8; images with equal pixels have the same."""
    return [hash(image.numpy().tobytes()) for image in images]


def first_copies(images):
    """For each of the images (N, 3, H, W) uint8 the index of the first that has the same pixels."""
    first = {}
    return [first.setdefault(number, i) for i, number in enumerate(fingerprints(images))]


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
        if not all(weight.isfinite().all() for weight in backbone.state_dict().values()):
            raise ValueError("numbers that are not finite")
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
        model.raw_backbone.load_state_dict(model.backbone.state_dict())
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
