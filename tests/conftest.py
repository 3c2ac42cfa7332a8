"""What the tests share: a tiny data set, a model trained on it, a check for errors of one line."""
import contextlib
import io
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import files  # noqa: E402

train.CHECKED = train.PREVIEWS  # to save time
OPTIONS = "--data data --out runs --category part --device cpu".split()  # of both scripts
TINY = ("--backbone resnet18 --weights random --image-size 64 --patch-size 4 --layers 1 2 "
        "--encoder-lr 1e-3 --steps 4").split()  # of train.py
GOOD, TEST = Path("data/part/train/good"), Path("data/part/test")
CHECKPOINT, SCORES = Path("runs/part/checkpoint.pt"), Path("runs/part/trained/scores.csv")
MEAN, STD = (np.array(values)[:, None, None]  # ImageNet's
             for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def random_states():
    """The states of all three global random generators, comparable by ==."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest)


def seed_all(seed):
    """Seed all three global random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def same_chance():
    """Every test begins with the same random numbers, alone or among others, and leaves none."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(0)
    yield
    for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states):
        restore(state)


def draw_dataset(root, name="part", train=6, good=2, bad=2):
    """A data set in the MVTec AD layout: a square on a ramp; defects are dark dents in it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]

    def save(image, folder, file):
        (root / name / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / folder / file)

    for folder, count in (("train/good", train), ("test/good", good), ("test/dent", bad)):
        for n in range(count):
            image = np.stack([60 + x, 60 + y, 90 + 0 * x], axis=2) + rng.normal(0, 2, (64, 64, 3))
            image[16:-16, 16:-16] += 80
            if folder == "test/dent":
                dent = np.hypot(x - rng.uniform(26, 38), y - rng.uniform(26, 38)) < 7
                image[dent] = 5
                save(255 * dent, "ground_truth/dent", f"{n:03d}_mask.png")
            save(image, folder, f"{n:03d}.png")


def fails(capsys, main, argv, *words):
    """main must end with the exit code 2 and one line on stderr that has all the words."""
    capsys.readouterr()
    code = files.exit_code(main, [str(argument) for argument in argv])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    assert all(str(word) in lines[0] for word in words), lines


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
