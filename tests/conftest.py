"""What the tests share: a tiny data set, a model trained on it, a check for errors of one line."""
import contextlib
import copy
import csv
import io
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import NearestNeighbors

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import patchae  # noqa: E402
import train  # noqa: E402

assert train.CHECKED == 24  # as docs/cost.md says
train.CHECKED = train.PREVIEWS  # to save time
OPTIONS = "--data data --out runs --category part --device cpu".split()  # of both scripts
TINY = ("--backbone resnet18 --weights random --image-size 64 --patch-size 4 --stages 1 2 "
        "--encoder-lr 1e-3 --steps 4").split()  # of train.py
GOOD, TEST = Path("data/part/train/good"), Path("data/part/test")
MASKS, CHECKPOINT = Path("data/part/ground_truth/dent"), Path("runs/part/checkpoint.pt")
NOISE = Image.effect_noise((64, 64), 50)


def pytest_configure(config):
    """A warning that nobody sees is a failure."""
    for line in ("error", "ignore::ResourceWarning"):  # files that a test leaves open
        config.addinivalue_line("filterwarnings", line)


def random_states():
    """The states of all three global random generators, comparable by ==."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest)


def seed_all(seed):
    """Seed all three global random generators."""
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)


@pytest.fixture(autouse=True)
def same_chance():
    """Every test begins with the same random numbers, alone or among others."""
    seed_all(0)


def make_model(**options):
    """A PatchAE of 64 × 64 pixels, 16 × 16 patches, with random weights; Φ has 64 channels."""
    return patchae.build_model(patchae.Config(**{
        "backbone": "resnet18", "weights": "random", "image_size": 64, "stages": (1,),
        "patch_size": 4, **options}))


def draw_images(count, cells, seed=0):
    """Smooth random textures (count, 3, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    colours = 51 + 153 * torch.rand(count, 3, cells, cells, generator=generator)
    return F.interpolate(colours, (64, 64), mode="bilinear").byte()


def draw_dataset(root, name="part", train=6, good=2, bad=2):
    """A data set in the MVTec AD layout: a square on a ramp; defects are dark dents in it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for folder, count in (("train/good", train), ("test/good", good), ("test/dent", bad)):
        for n in range(count):
            image = np.stack([60 + x, 60 + y, 90 + 0 * x], axis=2) + rng.normal(0, 2, (64, 64, 3))
            image[16:-16, 16:-16] += 80
            if folder == "test/dent":
                dent = np.hypot(x - rng.uniform(26, 38), y - rng.uniform(26, 38)) < 7
                image[dent] = 5
                save(255 * dent, root / name / f"ground_truth/dent/{n:03d}_mask.png")
            save(image.clip(0, 255), root / name / folder / f"{n:03d}.png")


def save(image, path, **options):
    """Save an image (Pillow's, or an array) where no folder need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image.astype(np.uint8)) if isinstance(image, np.ndarray) else image
    image.save(path, **options)


def pixels(path, size=None):
    """An image file by Pillow alone, (H, W, 3) in 0 to 255."""
    image = Image.open(path).convert("RGB")
    return np.array(image.resize(size, Image.BILINEAR) if size else image, dtype=float)


def rows(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))


def contents(root="."):
    """All that is below a folder: {path: bytes, or False for a folder}."""
    return {path: path.is_file() and path.read_bytes() for path in Path(root).rglob("*")}


def distances(queries, memory):
    """(N, 16, 16): of N · 256 vectors the distance to the nearest in the memory, by
    scikit-learn."""
    nearest = NearestNeighbors(n_neighbors=1).fit(memory.reshape(-1, memory.shape[-1]))
    return nearest.kneighbors(queries.reshape(-1, memory.shape[-1]))[0].reshape(-1, 16, 16)


def fails(capsys, main, argv, *words):
    """main must end with the exit code 2 and one line on stderr that has all the words."""
    capsys.readouterr()
    try:
        code = patchae.exit_code(main, [str(argument) for argument in argv])
    except SystemExit as end:  # argparse
        code = end.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    assert all(str(word) in lines[0] for word in words), (lines, words)


def watch(patch, owner, name):
    """A list of all calls of owner.name from now on: (arguments, result)."""
    function, calls = getattr(owner, name), []

    def watching(*arguments, **named):
        result = function(*arguments, **named)
        calls.append((arguments, result))
        return result

    patch.setattr(owner, name, watching)
    return calls


@pytest.fixture(scope="session")
def learned():
    """A training of 38 steps on 6 images, also of the backbone, and the model as it was before.

    With all calls of add_defects and of training_loss.
    """
    seed_all(0)
    model, images = make_model(steps=38, lr=3e-2, encoder_lr=1e-3, finetune_backbone=True,
                               defect_weight=0.25), draw_images(6, 3)
    before = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        defects, losses = (watch(patch, patchae, name) for name in ("add_defects", "training_loss"))
        train.fit(model, images)
    return SimpleNamespace(model=model, before=before, images=images, defects=defects,
                           losses=losses)


@pytest.fixture
def model(learned):
    """A copy of the trained model, for a test to change. It remembers nothing."""
    return copy.deepcopy(learned.model)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/part and runs/part/checkpoint.pt; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("trained")
    draw_dataset(folder / "data")
    paths = ["--data", str(folder / "data"), "--out", str(folder / "runs")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*OPTIONS, *TINY, *paths]) == 0
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """The current folder is a copy of the trained one that a test may change."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
