"""One's own files: how they are read, what is refused without harm to older results; the toy set."""
import errno
import io
import math
import os
import shutil
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, draw_dataset, fails
from PIL import Image
from sklearn.metrics import roc_auc_score

import evaluate
import patchae
import train
from data import images, make_toy

OPTIONS = "--data data --out runs --category part --device cpu".split()
UNTRAINED = [*TINY, "--steps", "0", "--threshold-images", "0"]  # where only the files matter
GOOD, MASK = "data/part/train/good/", "data/part/ground_truth/hole/001_mask.png"
CHECKPOINT, SCORES = "runs/part/checkpoint.pt", "runs/part/feature/scores.csv"


def contents(root="."):
    """All that is below a folder: {path: bytes, or False for a folder}."""
    return {path: path.is_file() and path.read_bytes() for path in Path(root).rglob("*")}


def encoded(image, form):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format=form)
    return file.getvalue()


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """The current folder is a copy of the trained workspace that a test may change."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    monkeypatch.setattr(train, "HELD_OUT", 1)  # to save time


@pytest.fixture
def refused(workspace, capsys):
    """A check: exit code 2, one line with the words, and all files and folders as they were."""
    def check(main, argv, *words):
        before = contents()
        fails(capsys, main, [*OPTIONS, *(UNTRAINED if main is train.main else []), *argv], *words)
        assert contents() == before
    return check


# ---- what is read -------------------------------------------------------------------------------
def test_images_of_all_suffixes_are_found_at_any_depth_and_nothing_else(tmp_path):
    """Suffixes in lower and upper case; hidden files and folders and other files are skipped."""
    suffixes = ("png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp")
    wanted = [f"a.{s}" for s in suffixes] + [f"deep/er/b.{s.upper()}" for s in suffixes]
    root = tmp_path / ".cache"  # a hidden folder above hides nothing
    for name in (*wanted, ".a.png", "._a.png", ".thumbs/a.png", "deep/.er/a.png", "a.txt", "png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        form = Image.registered_extensions().get((root / name).suffix.lower(), "PNG")
        Image.new("RGB", (8, 8), (77, 77, 77)).save(root / name, format=form)
    found = images.list_images(root)
    assert [path.relative_to(root).as_posix() for path in found] == sorted(wanted)
    assert all(abs(np.array(images.read_image(path)) - 77.).max() <= 1 for path in found)


def halves(mode, left, right, size=(64, 64)):
    """An image with a colour in each half; of a palette the colours 0 and 1."""
    image = Image.new(mode, size, left)
    if mode == "P":
        image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("image, more, left, right", [
    (halves("L", 0, 100), {}, (0, 0, 0), (100, 100, 100)),
    (halves("1", 0, 1), {}, (0, 0, 0), (255, 255, 255)),
    (halves("P", 0, 1), {}, (10, 20, 30), (200, 100, 50)),
    (halves("P", 0, 1), {"transparency": 0}, (255, 255, 255), (200, 100, 50)),
    (halves("RGBA", (200, 0, 0, 51), (0, 9, 0, 255)), {}, (244, 204, 204), (0, 9, 0)),
    (halves("LA", (0, 0), (40, 255)), {}, (255, 255, 255), (40, 40, 40)),
    (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 128)), {"quality": 95}, (255, 0, 0), (127, 127, 127)),
], ids=lambda value: getattr(value, "mode", ""))
def test_every_kind_of_8_bit_image_becomes_the_rgb_that_one_sees(tmp_path, image, more, left, right):
    """Transparency is laid on white, by as much as it is transparent."""
    path = tmp_path / ("image.jpg" if image.mode == "CMYK" else "image.png")
    image.save(path, **more)
    pixels = np.array(images.read_image(path), dtype=float)
    assert pixels.shape == (64, 64, 3)
    assert abs(pixels[:, :24] - left).max() <= 3 and abs(pixels[:, -24:] - right).max() <= 3


def nearest(mask, size):
    """Nearest sampling by index arithmetic: the value at the middle of each target pixel."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in mask.shape)
    return mask[rows][:, columns]


UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_cameras_orientation_is_applied_to_images_and_masks(tmp_path, orientation):
    """EXIF orientations against numpy's rotations and mirrors."""
    stored = np.random.default_rng(0).integers(0, 2, (48, 64, 1)).repeat(3, axis=2).astype(np.uint8)
    exif, path = Image.Exif(), tmp_path / "image.png"
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    upright = UPRIGHT[orientation](stored)
    assert np.array_equal(images.read_image(path), upright)
    assert np.array_equal(images.read_mask(path, path, 64), nearest(upright[..., 0] > 0, 64))


def test_images_are_resized_whole(tmp_path):
    """Both ends of a broad image are in the network's input, an eighth each: no crop, no padding."""
    image = Image.new("RGB", (96, 40), (90, 90, 90))
    image.paste((200, 0, 0), (0, 0, 12, 40))
    image.paste((0, 0, 200), (84, 0, 96, 40))
    image.save(tmp_path / "broad.png")
    image, = images.read_images([tmp_path / "broad.png"], 64)
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
    for place, colour in ((np.s_[:7], (200, 0, 0)), (np.s_[9:-9], (90, 90, 90)), (np.s_[-7:], (0, 0, 200))):
        assert (image[:, :, place] == torch.tensor(colour)[:, None, None]).all()


MASKS = {"8-bit value 1": lambda mask: Image.fromarray(mask.astype(np.uint8)),
         "16-bit value 256": lambda mask: Image.fromarray(mask.astype(np.uint16) * 256),
         "palette": lambda mask: Image.fromarray(mask).convert("P"),
         "white, transparent but for the defect": lambda mask: Image.merge(
             "LA", [Image.new("L", mask.shape, 255), Image.fromarray(mask).convert("L")])}


@pytest.mark.parametrize("side", [64, 100, 256])
@pytest.mark.parametrize("kind", MASKS)
def test_any_value_but_zero_is_a_defect(tmp_path, kind, side):
    """The mask read is the disc drawn, resized by nearest sampling."""
    y, x = np.mgrid[:side, :side]
    disc = np.hypot(x - side * 0.4, y - side * 0.55) < side / 8
    MASKS[kind](disc).save(tmp_path / "mask.png")
    Image.new("RGB", (side, side)).save(tmp_path / "image.png")
    read = images.read_mask(tmp_path / "mask.png", tmp_path / "image.png", 64)
    assert read.dtype == torch.bool and np.array_equal(read, nearest(disc, 64))


@pytest.mark.parametrize("name", ["003_mask.png", "003.png", "003_mask.TIFF"])
def test_a_mask_is_found_by_the_name_of_its_image(tmp_path, name):
    """003 or 003_mask with any suffix, in the folder of the same type; no other file will do."""
    image, masks = tmp_path / "test/hole/003.jpg", tmp_path / "ground_truth/hole"
    for path in (image, masks / "0033.png", masks / "03.png", masks / "../scratch/003.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    (masks / "003.txt").write_text("a note")
    assert images.list_test(tmp_path) == [(image, "hole", None)]
    Image.new("L", (8, 8)).save(masks / name)
    assert images.list_test(tmp_path) == [(image, "hole", masks / name)]


def test_an_image_without_a_mask_is_no_part_of_pixel_auroc(workspace, capsys):
    """Left out, not counted as normal; with black masks or none it is undefined. All this is said."""
    part, kept, maps = Path("data/part"), [0, 1, 3], torch.rand(4, 16, 16)
    Path(MASK).with_name("000_mask.png").unlink()
    large = [Image.fromarray(maps[i].numpy()).resize((64, 64), Image.BILINEAR) for i in kept]
    truth = np.zeros((3, 64, 64), bool)
    truth[2] = np.array(Image.open(MASK)) > 0
    expected = roc_auc_score(truth.ravel(), np.stack(large).ravel())
    assert evaluate.pixel_auroc(images.list_test(part), maps, 64) == pytest.approx(expected, abs=1e-6)
    assert "1 defective images have no mask" in capsys.readouterr().out
    Image.new("L", (64, 64)).save(MASK)
    for remove in (False, True):
        if remove:
            shutil.rmtree("data/part/ground_truth")
        assert math.isnan(evaluate.pixel_auroc(images.list_test(part), maps, 64))
        assert "pixel AUROC: undefined" in capsys.readouterr().out


@pytest.mark.parametrize("gone, missing", [("good", "good"), ("hole", "defective")])
def test_auroc_of_test_images_of_one_kind_is_undefined(workspace, capsys, gone, missing):
    """Scores are written all the same, and the output says which images are missing."""
    shutil.rmtree(f"data/part/test/{gone}")
    assert evaluate.main(OPTIONS) == 0
    assert len(Path(SCORES).read_text().splitlines()) == 3
    assert f"image AUROC: undefined (test/ has no {missing} images)" in capsys.readouterr().out
    assert "part,feature,nan," in Path("runs/results.csv").read_text()


# ---- what is refused ----------------------------------------------------------------------------
NOISE = Image.effect_noise((64, 64), 50)


@pytest.mark.parametrize("main, argv, path, content, remedy", [
    *((main, argv, GOOD + name, content, remedy)
      for main, argv in ((train.main, ""), (evaluate.main, "--predict " + GOOD))
      for name, content, remedy in (
          ("cut.png", encoded(NOISE, "PNG")[:2000], "repair"), ("empty.png", b"", "repair"),
          ("cut.jpg", encoded(NOISE, "JPEG")[:1000], "repair"), ("text.png", b"text" * 99, "repair"),
          ("grey16.png", encoded(Image.new("I;16", (64, 64), 40000), "PNG"), "8 bits"),
          ("float.tif", encoded(Image.new("F", (64, 64), 0.5), "TIFF"), "8 bits"),
          ("tiny.png", encoded(NOISE.resize((64, 3)), "PNG"), "larger images"))),
    (evaluate.main, "", "data/part/test/stray.png", encoded(NOISE, "PNG"), "move"),
    (evaluate.main, "", MASK, encoded(NOISE.resize((32, 65)), "PNG"), "32 × 65 pixels, its image 64 × 64"),
    (train.main, "--weights junk.pth", "junk.pth", b"<html>not found</html>", "state-dict file"),
    (train.main, "--weights none.pth", "none.pth", None, "state-dict file"),
    (evaluate.main, "", CHECKPOINT, None, "train.py"), (evaluate.main, "", CHECKPOINT, 5000, "train.py"),
    (evaluate.main, "", CHECKPOINT, b"junk" * 99, "train.py"),
    (train.main, "--out file", "file", b"in the way", "--out"),
    (evaluate.main, "", "runs/part/feature", b"in the way", "--out"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_that_cannot_be_used(refused, main, argv, path, content, remedy):
    """It is named with the remedy. content: bytes, None for no file, a number of bytes to cut it to."""
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif content:
        os.truncate(path, content)
    else:
        Path(path).unlink(missing_ok=True)
    refused(main, argv.split(), path, remedy)


def test_foreign_weights_and_checkpoints(refused, monkeypatch):
    """Files of the right kind, but made by others or for another backbone; a failed download."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=urllib.error.URLError("offline")))
    monkeypatch.setenv("TORCH_HOME", "torch")
    Path("torch/hub/checkpoints").mkdir(parents=True)
    refused(train.main, ["--weights", "imagenet"], "https://download.pytorch.org/models/resnet18",
            "offline", Path("torch/hub/checkpoints"), "random")
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "layer1" in name}, "18.pth")
    refused(train.main, "--weights 18.pth --backbone resnet50".split(), "18.pth", "resnet50")
    refused(train.main, ["--weights", "18.pth"], "18.pth", "conv1.weight")
    torch.save({"epoch": 3}, CHECKPOINT)
    refused(evaluate.main, [], CHECKPOINT, "train.py")


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_wrong_folders(refused, main):
    """No such folder, a category in place of its parent, unknown categories, no images."""
    draw_dataset(Path("data"), "other", train=1, good=1, bad=1)
    refused(main, ["--data", "no"], "--data no", "NAME/train/good")
    refused(main, ["--data", "data/part"], "data/part", "parent")
    refused(main, ["--category", "part", "nix"], "nix", "other, part")
    folder = Path("data/part/train/good" if main is train.main else "data/part/test")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(main, [], folder, ".png")


@pytest.mark.parametrize("main, argv", [
    *((train.main, argv) for argv in (
        "--image-size 100", "--neighbourhood 2", "--layers 0 2", "--layers 7", "--patch-size 5",
        "--lr 2", "--lr nan", "--steps -1", "--batch-size 0", "--seed -1", "--steps many",
        "--memory-fraction 2", "--backbone vgg", "--device tpu", "--device cuda", "--none", "--out data")),
    *((evaluate.main, argv) for argv in (
        "--quantile 0", "--quantile 1.01", "--quantile nan", "--score nothing", "--device cuda"))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_options_out_of_range(refused, monkeypatch, main, argv):
    """Refused by name before anything is done; so are a device that is not there, and an --out where
    results would replace the data set itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(main, argv.split(), argv.split()[0])


FULL = {"side_effect": OSError(errno.ENOSPC, "No space left on device")}
DIVERGED = {"return_value": torch.tensor(math.nan, requires_grad=True)}


@pytest.mark.parametrize("main, owner, name, what, words", [
    (train.main, Path, "write_bytes", FULL, "No space left"),  # the checkpoint
    (train.main, Image.Image, "save", FULL, "No space left"),  # defects.png
    (evaluate.main, Image.Image, "save", FULL, "No space left"),  # a heatmap
    (train.main, patchae, "training_loss", DIVERGED, "the loss is nan at step 1; use a smaller --lr"),
    (train.main, patchae, "training_loss", {"side_effect": KeyboardInterrupt}, None),
    (evaluate.main, evaluate, "write_overview", {"side_effect": KeyboardInterrupt}, None)],
    ids=lambda value: value if isinstance(value, str) else "")
def test_what_stops_half_way_leaves_the_results_before(refused, monkeypatch, main, owner, name, what, words):
    """A full disk, a loss of nan, Ctrl-C: all is as it was, byte for byte, and nothing unfinished is left."""
    assert main is train.main or evaluate.main(OPTIONS) == 0
    before, argv = contents(), ["--steps", "1"] if main is train.main else []
    monkeypatch.setattr(owner, name, Mock(**what))
    if words:
        refused(main, argv, "part", words)
    else:
        with pytest.raises(KeyboardInterrupt):
            main([*OPTIONS, *(TINY if argv else []), *argv])
    assert contents() == before


def test_one_broken_category_of_three(tmp_path, monkeypatch, capsys):
    """The others are trained and scored, exit code 2, and the mean is of those that ran."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        draw_dataset(Path("data"), name, train=2)
    Path("data/b/train/good/001.png").write_bytes(b"")
    shutil.copy("data/c/test/hole/000.png", "data/c/test/good")  # so that c has another AUROC
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED, "--category", *"abc"], "data/b/train/good/001.png")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "c"]
    fails(capsys, evaluate.main, [*OPTIONS, "--category", *"abc"], "runs/b/checkpoint.pt")
    rows = [line.split(",") for line in Path("runs/results.csv").read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["a", "feature"], ["c", "feature"], ["mean", "feature"]]
    a, c, mean = (np.array(row[2:5], float) for row in rows)
    assert a[0] != c[0] and mean == pytest.approx((a + c) / 2)


@pytest.mark.parametrize("number", range(16))
def test_damaged_bytes_end_in_a_result_or_in_one_line(workspace, capsys, number):
    """Fuzzing: a PNG, JPEG or checkpoint cut, flipped or replaced; never a traceback."""
    main, path, result = [
        (train.main, GOOD + "000.png", CHECKPOINT), (evaluate.main, "data/part/test/hole/001.png", SCORES),
        (evaluate.main, MASK, SCORES), (evaluate.main, CHECKPOINT, SCORES)][number % 4]
    if number in (0, 4, 5, 13):  # Pillow looks at the content, not at the suffix
        Path(path).write_bytes(encoded(Image.open(path), "JPEG"))
    rng = np.random.default_rng([20230801, number])
    content = bytearray(Path(path).read_bytes())
    way = number // 4  # each way with each file
    if way == 0:
        content = content[:rng.integers(len(content))]
    elif way == 1:
        content = [b"", b"\0" * 500, b"GIF89a" + b"\xff" * 60, b"PK\x05\x06" + b"\0" * 18][number % 4]
    else:  # headers are small: half of the time only they are hit
        for i in rng.integers(len(content) if way == 2 else 100, size=8):
            content[i] ^= int(rng.integers(1, 256))
    Path(path).write_bytes(content)
    before = contents()
    code = main([*OPTIONS, *(UNTRAINED if main is train.main else [])])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if code == 0:
        assert not lines and contents()[Path(result)] != before.get(Path(result))
    else:
        assert code == 2 and len(lines) == 1 and path in lines[0] and contents() == before


# ---- the toy set --------------------------------------------------------------------------------
KINDS = {"flange": ("gouge", "oil", "chip", "fibre"), "felt": ("hole", "thread", "grease", "thin")}


def test_the_toy_set(tmp_path, monkeypatch):
    """Layout and counts as claimed; drawn by its seed, each category whatever else is drawn."""
    assert (make_toy.TRAIN, make_toy.GOOD, make_toy.PER_DEFECT) == (40, 20, 8)
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):  # to save time
        monkeypatch.setattr(make_toy, name, count)
    monkeypatch.chdir(tmp_path)
    make_toy.draw_if_absent(Path("set"))
    for folder, name, seed in (("same", "felt", 0), ("same", "flange", 0), ("other", "felt", 1)):
        make_toy.draw_category(Path(folder), name, seed)
    places = [f"{name}/{place}" for name in KINDS for place in (
        "train/good/000.png", "train/good/001.png", "test/good/000.png",
        *(f"test/{kind}/000.png" for kind in KINDS[name]),
        *(f"ground_truth/{kind}/000_mask.png" for kind in KINDS[name]))]
    assert sorted(path for path in Path("set").rglob("*.*")) == sorted(Path("set", p) for p in places)
    for place in places:
        drawn, same, other = (Path(folder, place) for folder in ("set", "same", "other"))
        assert Image.open(drawn).size == (256, 256) and same.read_bytes() == drawn.read_bytes()
        assert place.startswith("flange") or other.read_bytes() != drawn.read_bytes()


def test_a_toy_mask_is_where_the_defect_is(tmp_path, monkeypatch):
    """Saved files of defects on plain grey: 0 and 255; all of the mask is changed, and nothing is
    farther away than a soft rim reaches. A chip ends at the flange's rim; every fourth defect of
    felt is on the border of the image."""
    monkeypatch.setattr(make_toy, "TRAIN", 0)
    monkeypatch.setattr(make_toy, "GOOD", 0)
    monkeypatch.setattr(make_toy, "expose", lambda image, rng: image.round().clip(0, 255).astype(np.uint8))
    for name, (_, defects) in make_toy.CATEGORIES.items():
        drawing = (lambda rng: np.full((256, 256, 3), 148.), defects)
        monkeypatch.setitem(make_toy.CATEGORIES, name, drawing)
    for name in KINDS:
        make_toy.draw_category(tmp_path, name)
    samples = [sample for name in KINDS for sample in images.list_test(tmp_path / name)]
    assert len(samples) == 64
    for path, kind, mask_path in samples:
        change = abs(np.array(Image.open(path), dtype=int) - 148).max(axis=2)
        mask = np.array(Image.open(mask_path))
        assert set(np.unique(mask)) == {0, 255} and change[mask > 0].all()
        inside, outside = np.argwhere(mask), np.argwhere((change > 0) & (mask == 0))
        far = max(np.hypot(*(inside - place).T).min() for place in outside)
        assert 0 < far <= (5 if kind in ("oil", "grease", "thin") else 3)  # pixels
        fourth, on_border = int(path.stem) % 4 == 0, inside.min() == 0 or inside.max() == 255
        assert kind != "chip" or 102 < np.hypot(*(inside - 127.5).T).max() < 0.44 * 256 + 2
        assert kind not in KINDS["felt"] or not fourth or on_border
        assert kind not in ("hole", "thin") or fourth or not on_border


def test_an_interrupted_drawing_is_no_toy_set(tmp_path, monkeypatch):
    """A category is there whole or not at all; the next run draws what is missing and no more."""
    drawn = []

    def draw(folder, name):
        (folder / name).mkdir(parents=True)
        drawn.append(name)
        if drawn == ["flange", "felt"]:
            raise KeyboardInterrupt
    monkeypatch.setattr(make_toy, "draw_category", draw)
    with pytest.raises(KeyboardInterrupt):
        make_toy.draw_if_absent(tmp_path / "toy")
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["flange"]
    make_toy.draw_if_absent(tmp_path / "toy")
    assert drawn == ["flange", "felt", "felt"]
    assert sorted(contents(tmp_path)) == [tmp_path / p for p in ("toy", "toy/felt", "toy/flange")]
