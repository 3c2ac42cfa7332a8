"""The claims about one's own data, options, weights and checkpoints: what is read and refused."""
import csv
import dataclasses
import errno
import io
import math
import os
import shutil
import struct
import sys
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, draw_dataset, fails
from PIL import Image

import evaluate
import patchae
import train
from data import make_toy
from patchae import Config, UserError, check

UNTRAINED = [*TINY, "--epochs", "0"]  # where only the files matter


def options(root, *names):
    """The options that train.py and evaluate.py share."""
    return ["--data", str(root / "data"), "--out", str(root / "runs"), "--device", "cpu",
            "--category", *(names or ["part"])]


def run(main, argv):
    """main must return 0."""
    assert main([str(a) for a in argv]) == 0


def rows_of(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def leftovers(root):
    """Unfinished files below a folder."""
    return [path for path in root.rglob("*") if path.name.startswith(".part-")]


def contents(root):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def grey(size=(64, 64), mode="RGB", value=100):
    """An image of one grey level."""
    return Image.new("L", size, value).convert(mode)


def png(size, depth, colour, row):
    """A PNG file made by hand, all rows alike: Pillow cannot write 16-bit colours."""
    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * size[1])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b""))


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy of the trained workspace that a test may change."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory):
    """A state-dict file of a ResNet-18 with other weights than --weights random draws."""
    torch.manual_seed(123)
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save({k: v for k, v in state.items() if not k.startswith(("layer3", "layer4"))}, path)
    return path


# ---- finding images -----------------------------------------------------------------------------
def test_any_category_name(tmp_path):
    """Folders may be called anything: spaces, umlauts, other scripts, even `good`."""
    names = ["two words", "Prüfgröße ß", "部品", "good", "a.b"]
    for name in names:
        draw_dataset(tmp_path / "data", name, train=2, good=1, bad=1)
    run(train.main, [*options(tmp_path, *names), *UNTRAINED])
    run(evaluate.main, options(tmp_path, "all"))
    rows = rows_of(tmp_path / "runs" / "results.csv")
    assert {row["category"] for row in rows} == {*names, "mean"}
    for name in names:
        assert (tmp_path / "runs" / name / "heatmaps" / "hole" / "000.png").is_file()
        labels = [row["label"] for row in rows_of(tmp_path / "runs" / name / "scores.csv")]
        assert labels == ["good", "hole"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"])
def test_every_format_is_found_and_read(tmp_path, suffix):
    """A suffix is found in lower and upper case, at any depth, and its pixels are those saved."""
    lower, upper = tmp_path / f"a{suffix}", tmp_path / "deeper" / f"b{suffix.upper()}"
    upper.parent.mkdir()
    for path in (lower, upper):
        grey(value=77).save(path)
    assert patchae.list_images(tmp_path) == [lower, upper]
    for path in (lower, upper):
        assert np.abs(np.asarray(patchae.read_image(path)).astype(int) - 77).max() <= 1


def test_hidden_and_other_files_are_skipped(tmp_path):
    """Thumbnails, notes and hidden folders that systems leave behind are no images."""
    names = ("good.png", ".hidden.png", "._good.png", ".thumbs/good.png", "notes.txt", "Thumbs.db",
             "good.png.bak", "png", "good.npy")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        grey().save(path, format="PNG")
    assert patchae.list_images(tmp_path) == [tmp_path / "good.png"]


def test_a_hidden_folder_above_hides_nothing(tmp_path):
    """Only what is below the data folder counts: the data set may lie in ~/.cache."""
    folder = tmp_path / ".cache" / "good"
    folder.mkdir(parents=True)
    grey().save(folder / "000.png")
    assert patchae.list_images(folder) == [folder / "000.png"]


def test_names_that_are_not_utf8(workspace, capsys):
    """Linux lets any bytes be a file name: scored or refused, but no traceback."""
    name = os.fsdecode(b"bad\xff.png") if sys.platform == "linux" else "bad.png"
    grey().save(workspace / "data" / "part" / "test" / "good" / name)
    for more in ([], ["--predict", str(workspace / "data" / "part" / "test")]):
        capsys.readouterr()
        code = evaluate.main([*options(workspace), *more])
        lines = capsys.readouterr().err.splitlines()
        assert (code, len(lines)) in ((0, 0), (2, 1))


# ---- pixels -------------------------------------------------------------------------------------
def palette_image(**more):
    """A palette image: left half index 0, right half index 1."""
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (32, 0, 64, 64))
    image.info.update(more)
    return image


def halves(mode, left, right):
    """An image with a colour in each half."""
    image = Image.new(mode, (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    return image


WHITE, BLACK = (255, 255, 255), (0, 0, 0)
COLOUR_CASES = {
    "grey": (halves("L", 0, 100), ".png", BLACK, (100, 100, 100)),
    "palette": (palette_image(), ".png", (10, 20, 30), (200, 100, 50)),
    "palette, transparent": (palette_image(transparency=0), ".png", WHITE, (200, 100, 50)),
    "RGB, one colour transparent": (halves("RGB", (1, 2, 3), (9, 8, 7)), ".png", WHITE, (9, 8, 7)),
    "RGBA": (halves("RGBA", (200, 0, 0, 51), (0, 9, 0, 255)), ".png", (244, 204, 204), (0, 9, 0)),
    "RGBA, black but invisible": (halves("RGBA", (0, 0, 0, 0), (5, 5, 5, 255)), ".png", WHITE,
                                  (5, 5, 5)),
    "LA": (halves("LA", (0, 0), (40, 255)), ".png", WHITE, (40, 40, 40)),
    "1 bit": (halves("1", 0, 1), ".png", BLACK, WHITE),
    "CMYK": (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 128)), ".tif", (255, 0, 0),
             (127, 127, 127)),
    "CMYK JPEG": (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 128)), ".jpg", (255, 0, 0),
                  (127, 127, 127)),
}


@pytest.mark.parametrize("case", COLOUR_CASES)
def test_colours(tmp_path, case):
    """Every kind of 8-bit image becomes RGB with the colours one sees; transparency is white."""
    image, suffix, left, right = COLOUR_CASES[case]
    path = tmp_path / f"image{suffix}"
    more = {"transparency": (1, 2, 3)} if "one colour" in case else {}
    image.save(path, **more)
    seen = patchae.read_image(path)
    assert seen.mode == "RGB"
    pixels = np.asarray(seen).astype(int)
    tolerance = 6 if suffix == ".jpg" else 1
    assert np.abs(pixels[4:-4, 4:28] - left).max() <= tolerance
    assert np.abs(pixels[4:-4, 36:-4] - right).max() <= tolerance


UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    """A camera's note on how it was held is respected, in images and in masks."""
    stored = np.random.default_rng(0).integers(0, 2, (48, 64, 3)).astype(np.uint8) * 200
    stored[..., 1:] = stored[..., :1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(stored).save(path, exif=exif)
    upright = UPRIGHT[orientation](stored)
    assert np.array_equal(np.asarray(patchae.read_image(path)), upright)
    expected = nearest(upright[..., 0] > 0, 64)
    assert np.array_equal(evaluate.read_mask(path, path, 64), expected)


def test_images_need_not_be_square(workspace, capsys):
    """Any shape runs, is resized whole without a crop, and its heat picture keeps its aspect."""
    data = workspace / "data" / "part"
    grey((96, 40)).save(data / "train" / "good" / "000.png")
    shapes = {"good/000.png": (96, 48), "hole/000.png": (50, 131), "hole/001.png": (1536, 512)}
    for name, size in shapes.items():
        grey(size).save(data / "test" / name)
        if name.startswith("hole"):
            mask = halves("L", 0, 255).resize(size, Image.Resampling.NEAREST)
            mask.save(data / "ground_truth" / name.replace(".png", "_mask.png"))
    run(train.main, [*options(workspace), *UNTRAINED])
    run(evaluate.main, options(workspace))
    shapes["hole/001.png"] = (1024, 341)  # the longest side that a heatmap has
    for name, size in shapes.items():
        with Image.open(workspace / "runs" / "part" / "heatmaps" / name) as picture:
            assert picture.size == size


def test_images_are_resized_whole(tmp_path):
    """The corners of a non-square image are the corners of the network's input."""
    image = Image.new("RGB", (96, 40))
    for x, y in ((0, 0), (72, 0), (0, 30), (72, 30)):
        image.paste((x + 60, y + 60, 90), (x, y, x + 24, y + 10))
    image.save(tmp_path / "image.png")
    model = patchae.PatchAE(Config("resnet18", "random", image_size=64, layers=(1, 2)))
    batch, = patchae.read_batches([tmp_path / "image.png"], model, "reading")
    assert batch.shape == (1, 3, 64, 64) and batch.dtype == torch.uint8
    corners = batch[0][:, ::63, ::63].permute(1, 2, 0).tolist()
    assert corners == [[[60, 60, 90], [132, 60, 90]], [[60, 90, 90], [132, 90, 90]]]


def deep(mode, value):
    """Bytes of a TIFF whose pixels are wider than 8 bits."""
    file = io.BytesIO()
    Image.new(mode, (64, 64), value).save(file, format="TIFF")
    return file.getvalue()


DEEP = {
    "grey16.png": lambda: png((64, 64), 16, 0, struct.pack(">H", 40000) * 64),
    "grey16-alpha.png": lambda: png((64, 64), 16, 4, struct.pack(">HH", 40000, 65535) * 64),
    "rgb16.png": lambda: png((64, 64), 16, 2, struct.pack(">HHH", 1, 40000, 65535) * 64),
    "rgba16.png": lambda: png((64, 64), 16, 6, struct.pack(">HHHH", 1, 2, 3, 65535) * 64),
    "grey16.tif": lambda: deep("I;16", 40000),
    "integer32.tif": lambda: deep("I", 100000),
    "float32.tif": lambda: deep("F", 0.5),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_are_refused(tmp_path, name):
    """More than 8 bits would be clipped or cut without a word: refused, with what to do."""
    path = tmp_path / name
    path.write_bytes(DEEP[name]())
    with pytest.raises(UserError, match="8 bits") as error:
        patchae.read_image(path)
    assert str(path) in str(error.value)


def test_the_handmade_png_is_a_good_one(tmp_path):
    """With 8 bits the same bytes are read: the refusals above are not for a broken file."""
    path = tmp_path / "rgb8.png"
    path.write_bytes(png((64, 64), 8, 2, bytes((1, 2, 3)) * 64))
    assert patchae.read_image(path).getpixel((63, 63)) == (1, 2, 3)


def encoded(suffix, size=(64, 64)):
    """Bytes of a noisy image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=suffix)
    return file.getvalue()


BROKEN = {
    "truncated.png": lambda: encoded("PNG")[:3000],
    "truncated.jpg": lambda: encoded("JPEG")[:1500],
    "headless.jpg": lambda: encoded("JPEG")[:20],
    "text.png": lambda: b"this is no image\n" * 20,
    "empty.png": lambda: b"",
    "small.png": lambda: encoded("PNG", (64, 3)),
    "deep.png": DEEP["rgb16.png"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named(tmp_path, workspace, capsys, name):
    """Exit code 2, one line with the file's name, and what was there before is untouched."""
    path = workspace / "data" / "part" / "train" / "good" / name
    path.write_bytes(BROKEN[name]())
    before = contents(workspace / "runs")
    fails(capsys, train.main, [*options(workspace), *UNTRAINED], path)
    assert contents(workspace / "runs") == before and not leftovers(workspace)
    moved = path.rename(tmp_path / name)
    fails(capsys, evaluate.main, [*options(workspace), "--predict", moved], moved)
    assert not leftovers(workspace)


@pytest.mark.parametrize("limit", [20000, 10000])
def test_decompression_bomb(workspace, capsys, monkeypatch, limit):
    """A file that unpacks to a giant is refused, where Pillow warns (2×) and where it raises."""
    path = workspace / "data" / "part" / "train" / "good" / "bomb.png"
    grey((180, 180)).save(path)
    run(train.main, [*options(workspace), *UNTRAINED])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    fails(capsys, train.main, [*options(workspace), *UNTRAINED], path, "bomb")


# ---- masks and labels ---------------------------------------------------------------------------
def nearest(mask, size):
    """Brute-force nearest sampling: the value at the middle of each target pixel."""
    rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in mask.shape)
    return mask[rows][:, columns]


def disc_mask(side, radius):
    """A bool disc away from the middle."""
    y, x = np.mgrid[:side, :side]
    return np.hypot(x - side * 0.4, y - side * 0.55) < radius


def as_mode(mask, mode):
    """A bool mask as an image of the given kind."""
    if mode == "palette":
        image = Image.fromarray(mask.astype(np.uint8), mode="P")
        image.putpalette([0, 0, 0, 128, 0, 0])
        return image
    if mode == "palette, one of many":
        image = Image.fromarray(mask.astype(np.uint8) * 7, mode="P")
        image.putpalette([v for i in range(256) for v in (i, 0, 255 * (i > 0))])
        return image
    if mode == "transparent":
        pixels = np.full((*mask.shape, 4), 255, np.uint8)
        pixels[..., 3] = mask * 255
        return Image.fromarray(pixels)
    if mode == "grey, transparent":
        return Image.fromarray(np.stack([mask * 255, mask * 255], -1).astype(np.uint8), mode="LA")
    if mode == "1 bit":
        return Image.fromarray(mask)
    if mode == "blue":
        return Image.fromarray((mask[..., None] * [0, 0, 255]).astype(np.uint8))
    if mode.startswith("16 bit"):
        return Image.fromarray(mask.astype(np.uint16) * int(mode.split()[-1]))
    return Image.fromarray(mask.astype(np.uint8) * int(mode.split()[-1]))


@pytest.mark.parametrize("mode", [
    "value 1", "value 255", "16 bit 1", "16 bit 256", "16 bit 65535", "palette",
    "palette, one of many", "transparent", "grey, transparent", "1 bit", "blue"])
def test_any_value_but_zero_is_a_defect(tmp_path, mode):
    """Data sets write masks in many ways: the bool mask is the drawn one in all of them."""
    mask = disc_mask(64, 9)
    as_mode(mask, mode).save(tmp_path / "mask.png")
    grey().save(tmp_path / "image.png")
    read = evaluate.read_mask(tmp_path / "mask.png", tmp_path / "image.png", 64)
    assert read.dtype == bool and np.array_equal(read, mask)


@pytest.mark.parametrize("name", ["003_mask.png", "003.png", "003.tif", "003_mask.tiff", "003.bmp",
                                  "003_mask.PNG", "003.webp"])
def test_mask_names(tmp_path, name):
    """The mask of test/hole/003.jpg is 003 or 003_mask with any image suffix, and no other file."""
    image = tmp_path / "test" / "hole" / "003.jpg"
    masks = tmp_path / "ground_truth" / "hole"
    for folder in (image.parent, masks, tmp_path / "ground_truth" / "scratch"):
        folder.mkdir(parents=True)
    grey().save(image)
    drawn, other = Image.fromarray(disc_mask(64, 9)), grey(mode="L", value=255)
    for decoy in ("0033.png", "003_mask_old.png", "03.png", "003_masks.png", "../scratch/003.png"):
        other.save(masks / decoy)
    (masks / "003.txt").write_text("a note")
    assert evaluate.list_test(tmp_path) == [(image, "hole", None)]
    more = {"lossless": True} if name.endswith("webp") else {}
    drawn.convert("L").save(masks / name, **more)
    assert evaluate.list_test(tmp_path) == [(image, "hole", masks / name)]
    assert np.array_equal(evaluate.read_mask(masks / name, image, 64), disc_mask(64, 9))


@pytest.mark.parametrize("size", [(32, 32), (64, 65), (128, 128)])
def test_mask_of_another_size(workspace, capsys, size):
    """A mask that is not as large as its image is refused, with both sizes."""
    path = workspace / "data" / "part" / "ground_truth" / "hole" / "001_mask.png"
    grey(size, "L").save(path)
    sizes = f"{size[0]} × {size[1]}", "64 × 64"
    fails(capsys, evaluate.main, options(workspace), path, *sizes)
    assert not leftovers(workspace)


@pytest.mark.parametrize("side", [64, 100, 256, 300])
def test_a_disc_keeps_its_area(tmp_path, side):
    """The mask is resized by nearest sampling: compared with brute force, and with the area."""
    mask = disc_mask(side, side / 8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    grey((side, side)).save(tmp_path / "image.png")
    read = evaluate.read_mask(tmp_path / "mask.png", tmp_path / "image.png", 64)
    assert np.array_equal(read, nearest(mask, 64))
    assert read.mean() == pytest.approx(math.pi / 64, rel=0.05)


@pytest.mark.parametrize("place", [(0, 0), (63, 63), (17, 40)])
def test_one_pixel_of_value_one_is_not_lost(tmp_path, place):
    """The faintest, smallest defect survives where image and network have the same size."""
    mask = np.zeros((64, 64), np.uint8)
    mask[place] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    grey().save(tmp_path / "image.png")
    read = evaluate.read_mask(tmp_path / "mask.png", tmp_path / "image.png", 64)
    assert np.argwhere(read).tolist() == [list(place)]


def test_labels_come_from_the_parent_folder(tmp_path):
    """`good` elsewhere in the path makes no image good, and no look-alike name does."""
    root = tmp_path / "good" / "good_parts" / "good"
    kinds = {"bad", "good", "good_looking", "Scratch"}
    for kind in kinds:
        (root / "test" / kind).mkdir(parents=True)
        grey().save(root / "test" / kind / "good.png")
    samples = evaluate.list_test(root)
    assert {(path.parent.name, kind) for path, kind, _ in samples} == {(k, k) for k in kinds}
    assert sum(kind == "good" for _, kind, _ in samples) == 1


@pytest.mark.parametrize("place", ["stray.png", "hole/deeper/stray.png"])
def test_images_at_the_wrong_depth(workspace, capsys, place):
    """An image beside or below the type folders has no label: refused."""
    path = workspace / "data" / "part" / "test" / place
    path.parent.mkdir(exist_ok=True)
    grey().save(path)
    fails(capsys, evaluate.main, options(workspace), path)


# ---- folders and options ------------------------------------------------------------------------
@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_wrong_folders(workspace, capsys, main):
    """No such folder, a category in place of its parent, an unknown category: each says so."""
    data, out = workspace / "data", ["--out", workspace / "runs", "--device", "cpu"]
    fails(capsys, main, ["--data", workspace / "no", "--category", "x", *out], workspace / "no")
    fails(capsys, main, ["--category", "part", *out], "--data")
    fails(capsys, main, ["--data", data / "part", "--category", "part", *out], "parent")
    draw_dataset(data, "other", train=1, good=0, bad=0)
    fails(capsys, main, ["--data", data, "--category", "part", "nix", *out], "nix", "other, part")
    fails(capsys, main, ["--data", data, *out], "--category", "other, part")
    draw_dataset(data, "mean", train=1, good=0, bad=0)
    fails(capsys, main, ["--data", data, "--category", "mean", *out], data / "mean", "rename")


def test_empty_folders(workspace, capsys):
    """train/good without images, test/ without images, a folder to predict without images."""
    data = workspace / "data"
    (data / "empty" / "train" / "good").mkdir(parents=True)
    (data / "empty" / "train" / "good" / "readme.txt").write_text("nothing")
    folder = data / "empty" / "train" / "good"
    fails(capsys, train.main, [*options(workspace, "empty"), *UNTRAINED], folder, ".png")
    fails(capsys, evaluate.main, [*options(workspace), "--predict", folder], folder)
    fails(capsys, evaluate.main, [*options(workspace), "--predict", data / "no"], data / "no")
    shutil.rmtree(data / "part" / "test")
    fails(capsys, evaluate.main, options(workspace), data / "part" / "test")


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_no_cuda(workspace, capsys, monkeypatch, main):
    """Asking for a device that is not there names the option."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(capsys, main, [*options(workspace), "--device", "cuda"], "--device cuda", "auto")


def test_results_that_cannot_be_written(workspace, capsys):
    """A file in the way of --out, or of a result in it: one line that names it, none half-done."""
    blocked = workspace / "file"
    blocked.write_text("in the way")
    argv = ["--data", workspace / "data", "--category", "part", *UNTRAINED, "--out", blocked]
    fails(capsys, train.main, argv, blocked, "--out")
    assert blocked.read_text() == "in the way"
    (workspace / "runs" / "part" / "predictions.csv").mkdir()
    fails(capsys, evaluate.main, [*options(workspace), "--predict", workspace / "data"],
          "predictions.csv", "--out")
    assert not leftovers(workspace)


def test_a_file_where_the_heatmaps_go(workspace, capsys):
    """The folder of heatmaps is as it was before where it cannot be replaced."""
    (workspace / "runs" / "part" / "heatmaps").write_text("in the way")
    fails(capsys, evaluate.main, options(workspace), "heatmaps", "--out")
    assert (workspace / "runs" / "part" / "heatmaps").read_text() == "in the way"
    assert not leftovers(workspace)


@pytest.mark.parametrize("main, argv", [
    (train.main, "--image-size 100"), (train.main, "--image-size 0"), (train.main, "--layers 7"),
    (train.main, "--layers 0 2"), (train.main, "--neighbourhood 2"), (train.main, "--lr nan"),
    (train.main, "--neighbourhood 11"), (train.main, "--lr inf"), (train.main, "--seed -1"),
    (train.main, "--epochs many"), (train.main, "--batch-size 0"), (train.main, "--workers -1"),
    (train.main, "--workers 65"), (train.main, "--channels 1.5"), (train.main, "--backbone vgg16"),
    (train.main, "--patch-fraction 0"), (train.main, "--encoder-start anyhow"),
    (train.main, "--device tpu"), (train.main, "--nonsense 1"),
    (evaluate.main, "--quantile 0"), (evaluate.main, "--quantile 1.01"),
    (evaluate.main, "--quantile nan"), (evaluate.main, "--memory-fraction 2"),
    (evaluate.main, "--memory-fraction 0"), (evaluate.main, "--memory-fraction nan"),
    (evaluate.main, "--memory-images 0"), (evaluate.main, "--score nothing"),
    (evaluate.main, "--nonsense 1")], ids=lambda value: value if isinstance(value, str) else "")
def test_options_out_of_range(trained, capsys, main, argv):
    """An option that cannot be meant is refused by its name before anything is done."""
    before = contents(trained)
    fails(capsys, main, [*options(trained), *argv.split()], argv.split()[0])
    assert contents(trained) == before


def wrong_values():
    """(field, value) for every option of Config: of another type, beyond each limit, not finite."""
    for field in dataclasses.fields(Config):
        low, high, wrap = field.metadata["low"], field.metadata["high"], lambda value: value
        if field.type is tuple:
            wrap = lambda value: (value,)  # noqa: E731
            yield from ((field.name, value) for value in ((), [2, 3], (2.0,), (True,), ("2",), 2))
        yield from ((field.name, value) for value in (None, b"x", [1]))
        yield field.name, "nothing" if field.type is not str else 1
        if field.metadata["choices"]:
            yield field.name, "nothing"
        if low is not None:
            yield from ((field.name, wrap(value)) for value in (low - 1, high + 1, True))
        if field.type is float:
            yield from ((field.name, value) for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("name, value", list(wrong_values()))
def test_every_option_is_checked(name, value):
    """check refuses each by the option's name: a checkpoint's config gets no other check."""
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        check(Config(**{name: value}))


def test_the_defaults_pass():
    """check returns the config that it accepts, so that the refusals mean something."""
    assert check(Config()) == Config()


# ---- weights and checkpoints --------------------------------------------------------------------
def resaved(change):
    """A way to damage a checkpoint: load it, change what it says, save it."""
    def damage(path):
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)
    return damage


def set_tensor(name, function):
    """Replace one tensor by a function of it."""
    return lambda c: c["tensors"].update({name: function(c["tensors"][name])})


DAMAGE = {
    "missing": (lambda path: path.unlink(), "no checkpoint"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cannot be read"),
    "cut to a few bytes": (lambda path: path.write_bytes(path.read_bytes()[:10]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("weights"), "cannot be read"),
    "one byte flipped": (lambda path: path.write_bytes(
        path.read_bytes()[:9000] + bytes([path.read_bytes()[9000] ^ 255])
        + path.read_bytes()[9001:]), "checksum"),
    "a list": (lambda path: torch.save([1, 2], path), "not a checkpoint"),
    "no format": (resaved(lambda c: c.pop("format") and c), "not a checkpoint"),
    "another format": (resaved(lambda c: c.update(format="patch-ae 0")), "not a checkpoint"),
    "no config": (resaved(lambda c: c.pop("config") and c), "config"),
    "config of another version": (resaved(lambda c: c["config"].update(depth=3)), "depth"),
    "wrong config value": (resaved(lambda c: c["config"].update(image_size=100)), "--image-size"),
    "wrong config type": (resaved(lambda c: c["config"].update(layers=[1, 2])), "--layers"),
    "no tensors": (resaved(lambda c: c.pop("tensors") and c), "missing"),
    "tensor missing": (resaved(lambda c: c["tensors"].__delitem__("encoder.1.bias")),
                       "encoder.1.bias"),
    "tensor of another shape": (resaved(set_tensor("decoder.0.bias", lambda t: t[:-1])),
                                "decoder.0.bias"),
    "tensor is a number": (resaved(set_tensor("decoder.0.bias", lambda t: 1.0)), "decoder.0.bias"),
    "tensor not finite": (resaved(set_tensor("encoder.0.bias", lambda t: t + math.nan)),
                          "encoder.0.bias"),
    "tensor complex": (resaved(set_tensor("encoder.0.bias", lambda t: t + 1j)), "encoder.0.bias"),
    "tensor sparse": (resaved(set_tensor("encoder.0.bias", torch.Tensor.to_sparse)),
                      "encoder.0.bias"),
    "no fingerprint": (resaved(lambda c: c.pop("fingerprint") and c), "other backbone weights"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")  # torch.load, of the sparse one
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(workspace, capsys, case):
    """Whatever is wrong with a checkpoint: one line with its name and the place."""
    damage, word = DAMAGE[case]
    path = workspace / "runs" / "part" / "checkpoint.pt"
    damage(path)
    before = contents(workspace)
    fails(capsys, evaluate.main, options(workspace), path, word)
    assert contents(workspace) == before


def test_other_backbone_weights(workspace, capsys, resnet18_file):
    """Features of other weights would be compared without sense: noticed by their fingerprint."""
    path = workspace / "runs" / "part" / "checkpoint.pt"
    argv = [*options(workspace), "--weights", resnet18_file]
    fails(capsys, evaluate.main, argv, path, "other backbone weights", resnet18_file)


def test_weights_may_move(tmp_path, resnet18_file):
    """The same weights at another place are accepted with --weights."""
    draw_dataset(tmp_path / "data")
    first, second = (shutil.copy(resnet18_file, tmp_path / name) for name in ("1.pth", "2.pth"))
    run(train.main, [*options(tmp_path), *UNTRAINED, "--weights", first])
    Path(first).unlink()
    run(evaluate.main, [*options(tmp_path), "--weights", second])


WEIGHTS = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100000]),
    "truncated, old format": lambda path: torch.save(
        torch.load(path), path, _use_new_zipfile_serialization=False) or path.write_bytes(
        path.read_bytes()[:100000]),
    "text": lambda path: path.write_text("<html>not found</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "no tensors": lambda path: torch.save({"conv1.weight": 1}, path),
    "not finite": lambda path: torch.save(
        {name: tensor * math.nan for name, tensor in torch.load(path).items()}, path),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_damaged_weights(workspace, tmp_path, capsys, resnet18_file, case):
    """Whatever is wrong with a weights file: one line with its name; results stay as they were."""
    path = Path(shutil.copy(resnet18_file, tmp_path / "weights.pth"))
    WEIGHTS[case](path)
    before = contents(workspace)
    fails(capsys, train.main, [*options(workspace), *UNTRAINED, "--weights", path], path)
    assert contents(workspace) == before


def test_weights_of_another_architecture(workspace, capsys, resnet18_file):
    """The first tensor that does not fit is named with both shapes."""
    argv = [*options(workspace), *UNTRAINED, "--backbone", "resnet50", "--weights", resnet18_file]
    fails(capsys, train.main, argv, resnet18_file, "layer1.0.conv1.weight", "(64, 64, 3, 3)",
          "(64, 64, 1, 1)", "resnet50")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for downloads, and a network that is not there."""
    def offline(url, *args, **more):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_failed_download(workspace, capsys, hub):
    """Without a network the way out is told: the address, the folder for the file, --weights."""
    argv = [*options(workspace), *UNTRAINED, "--weights", "imagenet"]
    fails(capsys, train.main, argv, "https://download.pytorch.org/models/resnet18-", hub,
          "no route to host", "--weights")


@pytest.mark.parametrize("damage", [b"<html>not found</html>", b"", b"PK\x03\x04 and no more"],
                         ids=["web page", "empty", "truncated"])
def test_damaged_download(workspace, capsys, hub, damage):
    """A file put into the folder by hand may be a web page: said in one line, with the folder."""
    url = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    hub.mkdir(parents=True)
    (hub / url.rpartition("/")[2]).write_bytes(damage)
    fails(capsys, train.main, [*options(workspace), *UNTRAINED, "--weights", "imagenet"], hub)


def test_a_full_disk_leaves_the_checkpoint(workspace, capsys, monkeypatch):
    """Where writing stops half-way the previous checkpoint is whole, and no half of a new one."""
    path = workspace / "runs" / "part" / "checkpoint.pt"
    before = path.read_bytes()

    def full(content, place):
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    fails(capsys, train.main, [*options(workspace), *TINY], "No space left", "--out")
    assert path.read_bytes() == before and not leftovers(workspace)


def test_training_that_diverges(workspace, capsys):
    """Far too large rates end in one line about it, not in a checkpoint that scores nan."""
    path = workspace / "runs" / "part" / "checkpoint.pt"
    before = path.read_bytes()
    rates = ["--finetune-backbone", "--backbone-lr", "1", "--lr", "1", "--encoder-lr", "1"]
    argv = [*options(workspace), *TINY, "--epochs", "3", *rates]
    fails(capsys, train.main, argv, "part", "loss", "--lr")
    assert path.read_bytes() == before and not leftovers(workspace)


# ---- data sets that are small, unlabelled or partly broken --------------------------------------
@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_a_batch(tmp_path, count):
    """Training, memory and scores work with fewer normal images than --batch-size, even one."""
    draw_dataset(tmp_path / "data", train=count, good=1, bad=1)
    run(train.main, [*options(tmp_path), *TINY, "--batch-size", "8"])
    row, = rows_of(tmp_path / "runs" / "part" / "train.csv")
    assert math.isfinite(float(row["loss"]))
    run(evaluate.main, options(tmp_path))
    scores = rows_of(tmp_path / "runs" / "part" / "scores.csv")
    assert [row["label"] for row in scores] == ["good", "hole"]
    assert all(float(row["score"]) > 0 for row in scores)


def line_with(text, *words):
    """Whether a line of the output holds all of the words."""
    return any(all(word in line for word in words) for line in text.splitlines())


def test_without_masks(workspace, capsys):
    """Image AUROC as with masks; pixel AUROC is undefined, and the output says why."""
    run(evaluate.main, options(workspace))
    before = rows_of(workspace / "runs" / "results.csv")[0]
    shutil.rmtree(workspace / "data" / "part" / "ground_truth")
    capsys.readouterr()
    run(evaluate.main, options(workspace))
    output = capsys.readouterr()
    row = rows_of(workspace / "runs" / "results.csv")[0]
    assert row["image_auroc"] == before["image_auroc"] and math.isfinite(float(row["image_auroc"]))
    assert math.isnan(float(row["pixel_auroc"])) and math.isfinite(float(before["pixel_auroc"]))
    assert line_with(output.out, "pixel AUROC", "undefined", "no masks")
    assert line_with(output.out, "part", "feature", "undefined") and not output.err


@pytest.mark.parametrize("gone, left, labels", [("good", "defective", ["hole", "hole"]),
                                                ("hole", "good", ["good", "good"])])
def test_test_images_of_one_kind(workspace, capsys, gone, left, labels):
    """Scores are written; the image AUROC is undefined, and the output says which are missing."""
    shutil.rmtree(workspace / "data" / "part" / "test" / gone)
    capsys.readouterr()
    run(evaluate.main, options(workspace))
    output = capsys.readouterr()
    rows = rows_of(workspace / "runs" / "part" / "scores.csv")
    assert [row["label"] for row in rows] == labels
    assert all(math.isfinite(float(row["score"])) for row in rows)
    assert math.isnan(float(rows_of(workspace / "runs" / "results.csv")[0]["image_auroc"]))
    missing = "good" if gone == "good" else "defective"
    assert line_with(output.out, "image AUROC", "undefined", f"no {missing} images")
    assert not output.err


def test_one_broken_category(tmp_path, capsys):
    """The others are trained and scored; exit code 2; the last row is the mean of what ran."""
    names = ["a", "b", "c"]
    for name in names:
        draw_dataset(tmp_path / "data", name, train=3, good=3, bad=3)
    broken = tmp_path / "data" / "b" / "train" / "good" / "001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    swap = [tmp_path / "data" / "c" / "test" / place for place in ("good/000.png", "hole/000.png")]
    pixels = [path.read_bytes() for path in swap]
    for path, content in zip(swap, reversed(pixels)):  # so that c has another AUROC than a
        path.write_bytes(content)
    fails(capsys, train.main, [*options(tmp_path, *names), *UNTRAINED], broken)
    made = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/checkpoint.pt"))
    assert made == ["a", "c"]
    fails(capsys, evaluate.main, options(tmp_path, *names), tmp_path / "runs" / "b")
    rows = rows_of(tmp_path / "runs" / "results.csv")
    assert [row["category"] for row in rows] == ["a", "c", "mean"]
    for key in ("image_auroc", "pixel_auroc", "seconds_per_image"):
        values = [float(row[key]) for row in rows]
        assert values[2] == pytest.approx((values[0] + values[1]) / 2)
    assert rows[0]["image_auroc"] != rows[1]["image_auroc"]


# ---- the toy set --------------------------------------------------------------------------------
@pytest.fixture
def few(monkeypatch):
    """A toy set of 2 + 1 + 4 images, to save time."""
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):
        monkeypatch.setattr(make_toy, name, count)


def test_the_toy_set_is_drawn_by_its_seed(tmp_path, few):
    """The same seed gives the same bytes, another seed gives other images."""
    def drawn(folder, seed):
        make_toy.draw_set(tmp_path / folder, seed)
        return {p.relative_to(tmp_path / folder): b for p, b in contents(tmp_path / folder).items()}
    first, same, other = drawn("1", 0), drawn("2", 0), drawn("3", 1)
    assert first == same and first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first)


def test_the_toy_set_has_the_layout(tmp_path, few):
    """Counts, folders, sizes; a mask of 0 and 255 for each defective image and for no other."""
    make_toy.draw_set(tmp_path, seed=5)
    root = tmp_path / make_toy.CATEGORY
    kinds = [defect.__name__ for defect in make_toy.DEFECTS]
    names = {path.relative_to(root).as_posix() for path in root.rglob("*.png")}
    assert names == {"train/good/000.png", "train/good/001.png", "test/good/000.png",
                     *(f"test/{kind}/000.png" for kind in kinds),
                     *(f"ground_truth/{kind}/000_mask.png" for kind in kinds)}
    side = make_toy.SIZE
    for path, kind, mask in evaluate.list_test(root):
        assert patchae.read_image(path).size == (side, side)
        assert (mask is None) == (kind == "good")
        if mask:
            with Image.open(mask) as file:
                assert file.size == (side, side) and set(np.unique(file)) == {0, 255}
            area = evaluate.read_mask(mask, path, side).mean()
            assert 0.0005 < area < 0.05


def test_the_toy_set_has_the_counts_it_claims():
    """40 normal training images, 20 normal and 32 defective test images."""
    defective = make_toy.PER_DEFECT * len(make_toy.DEFECTS)
    assert (make_toy.TRAIN, make_toy.GOOD, defective) == (40, 20, 32)


REACH = {"scratch": 3, "stain": 5, "chip": 3, "fibre": 3}  # pixels; a stain has the softest rim


@pytest.mark.parametrize("defect", make_toy.DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.parametrize("seed", range(6))
def test_a_toy_mask_is_where_the_defect_is(defect, seed):
    """All of the mask is changed, nothing that is farther from it than the soft rim reaches."""
    side = make_toy.SIZE
    normal, mask = np.full((side, side, 3), 148.0), Image.new("L", (side, side))
    changed = np.abs(defect(normal.copy(), mask, np.random.default_rng(seed)) - normal).max(axis=2)
    mask = np.asarray(mask) > 0
    assert mask.any() and (changed[mask] >= 1).all()
    places, outside = np.argwhere(mask), np.argwhere((changed > 0) & ~mask)
    far = [np.hypot(*(places - place).T).min() for place in outside]
    assert 0 < max(far) <= REACH[defect.__name__]


def test_an_interrupted_drawing_is_no_toy_set(tmp_path, few, monkeypatch):
    """The set is there whole or not at all, and the next run draws it."""
    draw, root = make_toy.draw_set, tmp_path / "toy"

    def interrupted(folder, seed=0):
        draw(folder, seed)
        (folder / make_toy.CATEGORY / "train" / "good" / "000.png").unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr(make_toy, "draw_set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_toy.draw_if_absent(root)
    assert not (root / make_toy.CATEGORY).exists()
    monkeypatch.setattr(make_toy, "draw_set", draw)
    make_toy.draw_if_absent(root)
    assert (root / make_toy.CATEGORY / "train" / "good" / "000.png").is_file()
    assert not leftovers(tmp_path)
