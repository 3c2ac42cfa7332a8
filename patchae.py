"""Patch AE: patch-wise auto-encoder for visual anomaly detection (arXiv 2308.00429), top to bottom.

Train on normal images only. Each is given artificial defects (⊗) and must be rebuilt *with* them,
every patch from its own feature vector alone: a vector that has to draw a defect cannot hide it.
At test time a patch is as anomalous as its vector is far from all vectors of the normal images.

    image ⊗ defects → backbone → ⊕ → encoder → R → decoder → patches    (training: E1, E2, E3)
    image           → backbone → ⊕ → encoder → R → nearest in M → map → score   (test: E1, E4, E5)

The labels (E1) to (E5) are ours: match them to the numbered equations of your copy of the paper.
Defaults say `paper` where the paper is known to say so, and `our choice: reason` elsewhere.

Notation
    symbol  name in code  shape              meaning
    I       image         (B, 3, H, W)       normal image (in training with defects), [0, 1]
    α       alpha         (1, h, w)          opacity of an artificial defect in its box, [0, 1]
    p       patch_size                       side of a patch, pixels
    P       P                                patches of an image: H'·W' = (H/p)·(W/p)
    Φ       features      (B, C, H', W')     ⊕: the backbone's scales on the patch grid, joined; ≥ 0
    R       r             (B, C₃, H', W')    representation; r_ij, one vector for each patch
    I_ij    patches       (B, 3p², H', W')   the image cut into patches of p × p pixels
    Î_ij    rebuilt       (B, 3p², H', W')   the patches as the decoder draws them from R
    M       memory        N × (n, C₃)        a list: of each of the N normal images its vectors r_ij
    s_ij    anomaly_map   (B, H', W')        distance of each r_ij to its nearest vector in M
    S       score         (B,)               anomaly score of the image
"""
import argparse
import io
import math
import random
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import normalize

# ---- ⊗ artificial defects: drawn into a normal image in [0, 1], before normalising --------------
# paper: defects are added and must be rebuilt. Our choice, all of it: these kinds and numbers,
# wide enough for faint to glaring, since the test defects are unknown.
MOST_DEFECTS = 6              # per image: 1 to 6, so that every image trains on some defect
BOX_SIDE = (1 / 24, 1 / 4)    # of the image side: from about one patch to a large stain
BLOB_CELLS = 4                # noise cells that bend a blob's rim: few, so that lobes stay smooth
BLOB_RIM = 0.3                # level at which the blob ends inside its box
HARD, SOFT = 0.1, 1.0         # width of a blob's rim: cut-out or fading
GAIN = (0.6, 1.4)             # colour change of a pasted patch
OPACITY = (0.3, 1.0)          # of scratches and stains: from faint to opaque
GRAIN = (4, 40)               # pixels, of a stain's noise: finer noise is the sensor's, no defect
SOFTEN = 3                    # pixels: smoothing of a scratch, about what a lens does


def irregular_blob(h, w, softness):
    """α of a disc whose rim is bent by smooth noise, 0 at the box's border (our choice)."""
    noise = torch.randn(1, 1, BLOB_CELLS, BLOB_CELLS)
    noise = F.interpolate(noise, (h, w), mode="bicubic")[0]               # (1, h, w)
    y = torch.linspace(-1, 1, h)[:, None]                                 # (h, 1)
    x = torch.linspace(-1, 1, w)                                          # (w,)
    disc = (1 - x * x - y * y).clamp(min=0)                               # (h, w)
    return ((disc * (1 + noise / 2) - BLOB_RIM) / softness).clamp(0, 1)   # (1, h, w)


def altered_paste(other, h, w):
    """A patch of another normal image, flipped and with its colours changed (our choice)."""
    top = random.randint(0, other.shape[1] - h)
    left = random.randint(0, other.shape[2] - w)
    patch = other[:, top:top + h, left:left + w].flip(random.choice((1, 2)))  # (3, h, w)
    gain = torch.empty(3, 1, 1).uniform_(*GAIN)
    return (patch * gain).clamp(0, 1), irregular_blob(h, w, HARD)


def scratch(other, h, w):
    """A thin curve of one colour: dots along a quadratic Bézier curve, thickened (our choice)."""
    t = torch.linspace(0, 1, 2 * (h + w))      # dense enough to leave no gap
    start, bend, end = torch.rand(3, 2, 1)     # each (y, x) in parts of the box
    y, x = (1 - t)**2 * start + 2 * t * (1 - t) * bend + t**2 * end
    alpha = torch.zeros(1, h, w)
    alpha[0, (y * (h - 1)).round().long(), (x * (w - 1)).round().long()] = 1
    width = random.choice((1, 3))              # pixels, before it is softened
    alpha = F.max_pool2d(alpha, width, stride=1, padding=width // 2)      # (1, h, w)
    alpha = F.avg_pool2d(alpha, SOFTEN, stride=1, padding=SOFTEN // 2)    # (1, h, w)
    return torch.rand(3, 1, 1), alpha * random.uniform(*OPACITY)


def stain(other, h, w):
    """A spot of coloured noise or, if that is coarse, of one colour (our choice)."""
    grain = random.randint(*GRAIN)
    cells = torch.rand(1, 3, math.ceil(h / grain), math.ceil(w / grain))
    paint = F.interpolate(cells, (h, w), mode="bilinear")[0]              # (3, h, w)
    alpha = irregular_blob(h, w, random.choice((HARD, SOFT)))             # (1, h, w)
    return paint, alpha * random.uniform(*OPACITY)


def add_defects(image, other):
    """⊗: draw 1 to MOST_DEFECTS artificial defects, I ← (1 − α) I + α paint, each in a random box.

    image, other: (3, H, W) normal images in [0, 1]; altered_paste takes from `other`. Returns the
    defected image (3, H, W) in [0, 1] and its mask (1, H, W), True where α > 0.
    """
    image = image.clone()
    height, width = image.shape[1:]
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    for _ in range(random.randint(1, MOST_DEFECTS)):
        h = math.ceil(height * random.uniform(*BOX_SIDE))
        w = math.ceil(width * random.uniform(*BOX_SIDE))
        kind = random.choice((altered_paste, scratch, stain))
        paint, alpha = kind(other, h, w)       # (3, h, w) or (3, 1, 1); (1, h, w)
        top = random.randint(0, height - h)
        left = random.randint(0, width - w)
        box = (..., slice(top, top + h), slice(left, left + w))
        image[box] = (1 - alpha) * image[box] + alpha * paint
        mask[box] |= alpha > 0
    return image, mask


# ---- Config: everything that decides the result -------------------------------------------------
class UserError(Exception):
    """Bad input. Its text is one line that names the file or option and the remedy."""


def option(default, accepted, description):
    """A field of Config: its default, what it accepts (None: anything of its type), its help."""
    return field(default=default, metadata={"accepted": accepted, "help": description})


@dataclass
class Config:
    """The options of train.py, kept in the checkpoint. UserError where a value is not accepted."""
    backbone: str = option("wide_resnet50_2", ("resnet18", "resnet50", "wide_resnet50_2",
                           "wide_resnet101_2"), "our choice: that of most baselines")
    weights: str = option("imagenet", None, "imagenet, random or a file (paper: pre-trained)")
    finetune_backbone: bool = option(False, None, "our choice: frozen, few images spoil it")
    layers: tuple = option((1, 2, 3), range(1, 5), "joined by ⊕ (our choice: detail and context)")
    image_size: int = option(384, range(64, 2049, 32), "pixels (our choice: shows small defects)")
    patch_size: int = option(12, range(4, 33, 4), "pixels (our choice: 32 × 32 patches)")
    neighbourhood: int = option(3, range(1, 10, 2), "average's side (our choice: forgives shifts)")
    channels: int = option(0, range(8193), "C₃ of a random start (our choice, 0: C₃ = C and R = Φ)")
    defects: bool = option(True, None, "artificial defects in training (paper)")
    defect_share: float = option(0.5, "0 to 1", "λ of the loss (our choice: defects are rare)")
    steps: int = option(1000, range(10**6), "each on one image (our choice: the loss is flat then)")
    batch_size: int = option(8, range(1, 1025), "images scored at once (our choice: fits a GPU)")
    lr: float = option(2e-3, "0 to 1", "decoder: Adam, cosine (our choice: rebuilds well in time)")
    encoder_lr: float = option(1e-5, "0 to 1", "encoder, backbone (our choice: keeps distances)")
    memory_fraction: float = option(1.0, "0 to 1", "random part of M (our choice: all of it)")
    threshold_images: int = option(100, range(10**6), "for the threshold (our choice: saves time)")
    seed: int = option(0, range(2**31), "of every random choice (our choice: any)")

    def __post_init__(self):
        for one in fields(self):
            value, accepted = getattr(self, one.name), one.metadata["accepted"]
            values = value if one.type is tuple else (value,)
            unit = one.type is float                                      # from 0 to 1
            if accepted and not all(0 <= v <= 1 if unit else v in accepted for v in values):
                raise UserError(f"--{one.name.replace('_', '-')} {value}: must be in {accepted}")
        if self.image_size % self.patch_size:
            raise UserError(f"--patch-size {self.patch_size}: must divide --image-size; 8 does")


# ---- Φ: backbone and ⊕ --------------------------------------------------------------------------
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # colours of the images that the weights were made with
IMAGENET_STD = (0.229, 0.224, 0.225)
TINY = 1e-6  # length: keeps a vector of zeros from being divided by zero


def make_backbone(name, layers):
    """A torchvision ResNet, cut after the last stage in use: (B, 3, H, W) to {stage: map ≥ 0}.

    Our choice: its convolutions see the image mirrored at the border. To zeros, torchvision's way,
    they answer with an edge that no part has and that varies with it: normal borders stand out.
    """
    resnet = torchvision.models.get_model(name, weights=None)
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "reflect"
    backbone = create_feature_extractor(resnet, [f"layer{stage}" for stage in layers])
    backbone.to(memory_format=torch.channels_last)  # faster
    return backbone.eval()  # stored statistics in batch normalisation: never call model.train()


def temper_contrast(features):
    """Divide each vector by the square root of its length. (B, C, h, w) ≥ 0 to the same.

    Our choice: the same pattern at four times the contrast is then only twice as far from nothing.
    Highlights vary most between normal images, and would outweigh defects in the dark.
    """
    length = features.norm(dim=1, keepdim=True)                           # (B, 1, h, w)
    return features / length.clamp(min=TINY).sqrt()                       # (B, C, h, w)


def average_neighbours(features, k):
    """The sum over the n of k × k neighbours that exist, divided by k √n. (B, C, h, w) to the same.

    Our choice: a patch that moved a little still matches. Inside, n = k² and this is the mean. At
    the border a mean of fewer values is noisier, and normal images would score highest there; but
    the sum of n independent values has a deviation ∝ √n: divided by k √n it is alike everywhere.
    """
    mean = F.avg_pool2d(features, k, stride=1, padding=k // 2)            # (B, C, h, w): sum / k²
    ones = torch.ones_like(features[:1, :1])                              # (1, 1, h, w)
    share = F.avg_pool2d(ones, k, stride=1, padding=k // 2)               # (1, 1, h, w): n / k²
    return mean / share.sqrt()                                            # (B, C, h, w)


def concatenate_scales(maps, grid, neighbourhood):
    """⊕: Φ, every map averaged over its neighbours, brought to grid × grid patches, concatenated.

    paper: several scales at one size, concatenated. Our choice: a finer map is averaged within each
    patch, so that nothing of it is skipped; a coarser one is interpolated bilinearly.
    """
    joined = []
    for m in maps:
        m = average_neighbours(m, neighbourhood)                          # (B, C_l, H_l, W_l)
        mode = "area" if m.shape[-1] > grid else "bilinear"
        joined.append(F.interpolate(m, (grid, grid), mode=mode))          # (B, C_l, H', W')
    return torch.cat(joined, dim=1)                                       # (B, C, H', W')


def patchify(image, p):
    """Cut into P = H'·W' patches: (B, 3, H'p, W'p) to (B, 3p², H', W'). Undone by pixel_shuffle."""
    return F.pixel_unshuffle(image, p)                                    # (B, 3p², H', W')


# ---- the equations ------------------------------------------------------------------------------
def represent(features, encoder):
    """(E1) R = f_e(I; θ_e) = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂), Φ being ⊕ of I's backbone maps.

    paper. features: (B, C, H', W'); encoder: the two blocks of 1×1 convolution and ReLU. A 1×1
    convolution is one linear layer, applied at every place on its own.
    """
    return encoder(features)                                              # (B, C₃, H', W')


def rebuild(r, decoder):
    """(E2) Î_ij = f_d(r_ij; θ_d) = V₂ ReLU(V₁ r_ij + c₁) + c₂: one vector rebuilds one patch.

    paper; the activation (ReLU) is our choice: as in the encoder. r: (B, C₃, H', W').
    """
    return decoder(r)                                                     # (B, 3p², H', W')


def reconstruction_loss(rebuilt, patches):
    """(E3) L = 1/(P · 3p²) Σ_ij ‖Î_ij − I_ij‖², I being the image with artificial defects (paper).

    rebuilt, patches: all values of the patches of one image or of several, in the same order.
    """
    return (rebuilt - patches).square().mean()                            # ()


def nearest_distance(r, memory):
    """(E4) s_ij = min_{m∈M} ‖r_ij − m‖₂: the anomaly map (paper).

    r: (B, C₃, H', W'); memory: N ≥ 1 tensors (n, C₃). Our choice: one normal image at a time with a
    running minimum, so that however large M is, only B · P · n distances are held at once.
    """
    queries = r.movedim(1, -1).flatten(0, 2)                              # (B · P, C₃)
    nearest = torch.full((len(queries),), math.inf, device=r.device)
    for vectors in memory:
        nearest = torch.minimum(nearest, torch.cdist(queries, vectors).amin(dim=1))
    return nearest.view(len(r), *r.shape[2:])                             # (B, H', W')


def image_score(anomaly_map, highest=3):
    """(E5) S = 1/k Σ of the k = 3 largest s_ij: an image is as anomalous as its worst patches.

    paper: S comes from the map; our choice: how. Three are steadier than one, and still local
    (held-out scores of 1 to 20 tie). (B, H', W'), at least k places, to (B,).
    """
    return anomaly_map.flatten(1).topk(highest).values.mean(dim=1)        # (B,)


# ---- the model ----------------------------------------------------------------------------------
class PatchAE(nn.Module):
    """Backbone, ⊕, encoder and decoder; forward is (E1) and (E2)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grid = config.image_size // config.patch_size
        self.backbone = make_backbone(config.backbone, config.layers)
        self.backbone.requires_grad_(config.finetune_backbone)
        c = self.features(torch.zeros(1, 3, config.image_size, config.image_size)).shape[1]  # C
        c3 = config.channels or c                                         # C₃
        pixels = 3 * config.patch_size**2                                 # 3p²
        self.encoder = nn.Sequential(nn.Conv2d(c, c3, 1), nn.ReLU(),
                                     nn.Conv2d(c3, c3, 1), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(c3, c3, 1), nn.ReLU(), nn.Conv2d(c3, pixels, 1))
        nn.init.constant_(self.decoder[2].bias, 1 / 2)  # grey: no steps go into the mean colour
        if not config.channels:  # R = Φ exactly: Φ ≥ 0 passes both ReLUs unchanged
            for convolution in self.encoder[::2]:
                nn.init.dirac_(convolution.weight)
                nn.init.zeros_(convolution.bias)

    def features(self, image):
        """Φ: (B, 3, H, W) in [0, 1] to (B, C, H', W')."""
        maps = self.backbone(normalize(image, IMAGENET_MEAN, IMAGENET_STD))
        maps = [temper_contrast(m) for m in maps.values()]
        return concatenate_scales(maps, self.grid, self.config.neighbourhood)

    device = property(lambda self: self.decoder[0].weight.device)

    def forward(self, image):
        """Î (B, 3p², H', W') of (B, 3, H, W) in [0, 1]: each patch rebuilt from its own vector."""
        return rebuild(represent(self.features(image), self.encoder), self.decoder)


# ---- training -----------------------------------------------------------------------------------
def training_loss(model, image, mask):
    """(1 − λ) · (E3) over all patches + λ · (E3) over those with a defect; λ: config.defect_share.

    image: (B, 3, H, W) in [0, 1], with its defects, is input and target (paper); mask: (B, 1, H, W)
    bool, empty: (E3) alone. Our choice: few patches have a defect, and those are the hard ones.
    """
    p = model.config.patch_size
    share = model.config.defect_share                                     # λ
    patches = patchify(image, p).movedim(1, -1)                           # (B, H', W', 3p²)
    rebuilt = model(image).movedim(1, -1)                                 # (B, H', W', 3p²)
    loss = reconstruction_loss(rebuilt, patches)
    defective = F.max_pool2d(mask.float(), p)[:, 0] > 0                   # (B, H', W')
    if defective.any():
        on_defects = reconstruction_loss(rebuilt[defective], patches[defective])
        loss = (1 - share) * loss + share * on_defects
    return loss                                                           # ()


# ---- scoring ------------------------------------------------------------------------------------
@torch.inference_mode()
def build_memory(model, batches):
    """M: of each normal image its vectors, a list of N tensors (n, C₃), n = ⌈memory_fraction · P⌉.

    batches: an iterable of (B, 3, H, W) in [0, 1]. The n ≥ 1 places are drawn by config.seed.
    """
    torch.manual_seed(model.config.seed)
    P = model.grid**2
    n = max(1, math.ceil(P * model.config.memory_fraction))
    memory = []
    for image in batches:
        r = represent(model.features(image), model.encoder)               # (B, C₃, H', W')
        memory += [one[torch.randperm(P)[:n]] for one in r.flatten(2).mT]  # (n, C₃), from (P, C₃)
    return memory


@torch.inference_mode()
def score_maps(model, image, memory):
    """Anomaly maps (B, H', W') of (B, 3, H, W) in [0, 1]: (E1), then (E4)."""
    return nearest_distance(represent(model.features(image), model.encoder), memory)


# ==== nothing from the paper below: what both scripts share, then the model and its files ========
def exit_code(work, *arguments):
    """What work(*arguments) returns, or 0; after bad input or a full disk one line on stderr, 2."""
    try:
        return work(*arguments) or 0
    except (UserError, OSError) as error:  # an OSError names its file itself
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def make_parser(description):
    """argparse with the options that both scripts have; what it cannot read ends with one line."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="data set: a folder with NAME/train/good")
    add("--category", nargs="+", default=[], metavar="NAME", help="its categories, or all")
    add("--demo", action="store_true", help="the toy set, drawn if absent; needs no download")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/NAME (default: runs)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    return parser


def choose_device(name):
    """The torch device, printed; for "auto" the first of cuda, mps and cpu. UserError."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    kind = next(k for k in found if found[k]) if name == "auto" else name
    if not found[kind]:
        raise UserError(f"--device {name}: torch finds none on this machine; use --device auto")
    print(f"device: {kind} ({torch.get_num_threads()} CPU threads), torch {torch.__version__}")
    return torch.device(kind)


@contextmanager
def whole(path):
    """Yield a temporary path; the file or folder made there takes the place of `path` in the end.

    After an error or Ctrl-C `path` is as it was before. What cannot be written is a UserError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            yield unfinished
            shutil.rmtree(path, ignore_errors=True)  # of a folder; a file is replaced
            unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another --out") from error


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
        raise UserError(f"--weights {source}: does not serve --backbone {name} ({error!r:.99}); "
                        f"give a state-dict file, put the download into {torch.hub.get_dir()}"
                        "/checkpoints, or try random") from error


def build_model(config):
    """A PatchAE with its backbone's weights; all else is drawn by config.seed. UserError."""
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    model = PatchAE(config)
    if config.weights != "random":
        load_weights(model.backbone, config.backbone, config.weights)
    print(f"backbone: {config.backbone}, weights: {config.weights}")
    return model


def save_checkpoint(path, model, images, normal_scores):
    """All that scoring needs: config, weights, normal images (N, 3, H, W) uint8, their scores."""
    file = io.BytesIO()  # torch.save straight to a full disk fails in ways that hide the reason
    torch.save({"config": asdict(model.config), "model": model.state_dict(), "images": images,
                "normal_scores": normal_scores}, file)
    path.write_bytes(file.getbuffer())


def load_checkpoint(path):
    """(model, its normal images (N, 3, H, W) uint8, their leave-one-out scores (n,)). UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = PatchAE(Config(**content["config"]))
        model.load_state_dict(content["model"])
        return model, content["images"].byte(), content["normal_scores"].float()
    except Exception as error:  # absent, foreign or damaged: a dozen kinds, one remedy
        raise UserError(f"{path}: no checkpoint of this version ({error!r:.99}); make it with "
                        "train.py, without --skip-finished") from error
