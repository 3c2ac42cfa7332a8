"""One's own files: how they are read, what is refused without harm to older results; the toy set."""
import errno
import math
import shutil
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, GOOD, OPTIONS, SCORES, TEST, TINY, draw_dataset, fails
from PIL import Image
from sklearn.metrics import roc_auc_score

import evaluate
import patchae
import train
from data import images, make_toy

UNTRAINED = [*TINY, "--steps", "0", "--threshold-images", "0"]  # where only the files matter
MASK = Path("data/part/ground_truth/dent/001_mask.png")


def contents(root="."):
    """All that is below a folder: {path: bytes, or False for a folder}."""
    return {path: path.is_file() and path.read_bytes() for path in Path(root).rglob("*")}


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


@pytest.mark.parametrize("mode, colour, more, seen", [
    ("L", 100, {}, (100, 100, 100)), ("1", 1, {}, (255, 255, 255)),
    ("P", 0, {}, (0, 0, 0)), ("P", 0, {"transparency": 0}, (255, 255, 255)),
    ("RGBA", (200, 0, 0, 51), {}, (244, 204, 204)), ("CMYK", (0, 255, 255, 0), {}, (255, 0, 0))])
def test_every_kind_of_8_bit_image_becomes_the_rgb_that_one_sees(tmp_path, mode, colour, more, seen):
    """Transparency is laid on white: red 200 with α = 51/255 becomes 0.2 · 200 + 0.8 · 255 = 244."""
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (8, 8), colour).save(path, **more)
    pixels = np.array(images.read_image(path), dtype=float)
    assert pixels.shape == (8, 8, 3) and abs(pixels - seen).max() <= 1


def test_a_cameras_orientation_is_applied_to_images_and_masks(tmp_path):
    """A camera on its side, EXIF orientation 6, against numpy's rotation."""
    stored = np.random.default_rng(0).integers(0, 2, (64, 64, 1)).repeat(3, axis=2).astype(np.uint8)
    exif, path = Image.Exif(), tmp_path / "image.png"
    exif[0x0112] = 6
    Image.fromarray(stored).save(path, exif=exif)
    assert np.array_equal(images.read_image(path), np.rot90(stored, -1))
    assert np.array_equal(images.read_mask(path, path, 64), np.rot90(stored[..., 0], -1) > 0)


def test_any_value_but_zero_is_a_defect(tmp_path):
    """The mask read is the disc drawn; at half its size, every second pixel of it. Its value is 1 of 8 bits,
    or 256 of 16, or the mask is white and transparent but for the defect."""
    y, x = np.mgrid[:128, :128]
    disc = np.hypot(x - 51, y - 70) < 16
    white = Image.new("L", (128, 128), 255)
    Image.new("RGB", (128, 128)).save(tmp_path / "image.png")
    for mask in (Image.fromarray(disc.astype(np.uint8)), Image.fromarray(disc.astype(np.uint16) * 256),
                 Image.merge("LA", [white, Image.fromarray(disc).convert("L")])):
        mask.save(tmp_path / "mask.png")
        for size, expected in ((128, disc), (64, disc[1::2, 1::2])):
            read = images.read_mask(tmp_path / "mask.png", tmp_path / "image.png", size)
            assert read.dtype == torch.bool and np.array_equal(read, expected)


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
    kept, maps = [1, 2, 3], torch.rand(4, 16, 16)  # in the order of their paths
    MASK.with_name("000_mask.png").unlink()
    large = [Image.fromarray(maps[i].numpy()).resize((64, 64), Image.BILINEAR) for i in kept]
    truth = np.zeros((3, 64, 64), bool)
    truth[0] = np.array(Image.open(MASK)) > 0
    expected = roc_auc_score(truth.ravel(), np.stack(large).ravel())
    assert evaluate.pixel_auroc(images.list_test(TEST.parent), maps, 64) == pytest.approx(expected, abs=1e-6)
    assert "1 defective images have no mask" in capsys.readouterr().out
    Image.new("L", (64, 64)).save(MASK)
    assert math.isnan(evaluate.pixel_auroc(images.list_test(TEST.parent), maps, 64))
    MASK.unlink()
    assert math.isnan(evaluate.pixel_auroc(images.list_test(TEST.parent), maps, 64))
    assert capsys.readouterr().out.count("pixel AUROC: undefined") == 2


@pytest.mark.parametrize("gone, missing", [("good", "good"), ("dent", "defective")])
def test_auroc_of_test_images_of_one_kind_is_undefined(workspace, capsys, gone, missing):
    """Scores are written all the same, and the output says which images are missing."""
    shutil.rmtree(TEST / gone)
    assert evaluate.main(OPTIONS) == 0
    assert len(SCORES.read_text().splitlines()) == 3
    assert f"image AUROC: undefined (test/ has no {missing} images)" in capsys.readouterr().out
    assert "part,feature,nan," in Path("runs/results.csv").read_text()


# ---- what is refused ----------------------------------------------------------------------------
NOISE = Image.effect_noise((64, 64), 50)


@pytest.mark.parametrize("main, argv, path, content, remedy", [
    *((train.main, "", GOOD / name, content, remedy) for name, content, remedy in (
        ("grey16.png", Image.new("I;16", (64, 64), 40000), "8 bits"),
        ("tiny.png", NOISE.resize((64, 3)), "larger images"))),
    (evaluate.main, f"--predict {GOOD}", GOOD / "text.png", b"text" * 99, "repair"),
    (evaluate.main, "", TEST / "stray.png", NOISE, "move"),
    (evaluate.main, "", MASK, NOISE.resize((32, 65)), "32 × 65 pixels, its image 64 × 64"),
    (train.main, "--weights junk.pth", Path("junk.pth"), b"<html>not found</html>", "state-dict file"),
    (train.main, "--weights none.pth", Path("none.pth"), None, "state-dict file"),
    (evaluate.main, "", CHECKPOINT, None, "train.py"),
    (train.main, "--out file", Path("file"), b"in the way", "--out"),
    (evaluate.main, "", SCORES.parent, b"in the way", "--out")],
    ids=lambda value: str(value) if isinstance(value, (str, Path)) else "")
def test_a_file_that_cannot_be_used(refused, main, argv, path, content, remedy):
    """It is named with the remedy. content: an image, the bytes of the file, or None for no file."""
    if isinstance(content, Image.Image):
        content.save(path)
    elif content:
        path.write_bytes(content)
    else:
        path.unlink(missing_ok=True)
    refused(main, argv.split(), path, remedy)


def test_foreign_weights_and_checkpoints(refused, monkeypatch):
    """Files of the right kind, but made by others or for another backbone; a failed download."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=urllib.error.URLError("offline")))
    monkeypatch.setenv("TORCH_HOME", "torch")
    Path("torch/hub/checkpoints").mkdir(parents=True)
    refused(train.main, ["--weights", "imagenet"], "https://download.pytorch.org/models/resnet18",
            "offline", Path("torch/hub/checkpoints"), "random")
    torch.save({}, "empty.pth")
    refused(train.main, ["--weights", "empty.pth"], "empty.pth", "conv1.weight")
    torch.save(patchae.make_backbone("resnet18", (2,)).state_dict(), "18.pth")
    refused(train.main, "--weights 18.pth --backbone resnet50".split(), "18.pth", "resnet50")
    torch.save({"epoch": 3}, CHECKPOINT)
    refused(evaluate.main, [], CHECKPOINT, "train.py")


@pytest.mark.parametrize("main, folder", [(train.main, GOOD), (evaluate.main, TEST)])
def test_wrong_folders(refused, main, folder):
    """No such folder, a category in place of its parent, unknown categories, no images."""
    draw_dataset(Path("data"), "other", train=1, good=1, bad=1)
    refused(main, ["--data", "no"], "--data no", "NAME/train/good")
    refused(main, ["--data", "data/part"], "data/part", "parent")
    refused(main, ["--category", "part", "nix"], "nix", "other, part")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(main, [], folder, ".png")


@pytest.mark.parametrize("main, argv", [
    *((train.main, argv) for argv in (
        "--image-size 100", "--patch-size 12", "--patch-size 64", "--neighbourhood 2", "--layers 0 2",
        "--lr 2", "--lr nan", "--steps -1", "--steps many", "--backbone vgg",
        "--device tpu", "--device cuda", "--none", "--out data")),
    *((evaluate.main, argv) for argv in (
        "--quantile 0", "--quantile 1.01", "--quantile nan", "--score nothing"))])
def test_options_out_of_range(refused, monkeypatch, main, argv):
    """Refused by name before anything is done; so are a device that is not there, and an --out where
    results would replace the data set itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(main, argv.split(), argv.split()[0])


FULL = {"side_effect": OSError(errno.ENOSPC, "No space left on device")}
DIVERGED = {"return_value": torch.tensor(math.nan, requires_grad=True)}
CTRL_C = {"side_effect": KeyboardInterrupt}


@pytest.mark.parametrize("main, owner, name, what, words", [
    (train.main, Path, "write_bytes", FULL, "No space left"),  # the checkpoint
    (train.main, Image.Image, "save", FULL, "No space left"),  # defects.png
    (evaluate.main, Image.Image, "save", FULL, "No space left"),  # a heatmap
    (train.main, patchae, "training_loss", DIVERGED, "the loss is nan at step 1; use a smaller --lr"),
    (train.main, patchae, "training_loss", CTRL_C, None),
    (evaluate.main, evaluate, "write_overview", CTRL_C, None)])
def test_what_stops_half_way_leaves_the_results_before(refused, monkeypatch, main, owner, name, what, words):
    """A full disk, a loss of nan, Ctrl-C: all is as it was, byte for byte, and nothing unfinished is left."""
    argv = [*TINY, "--steps", "1"] if main is train.main else []
    assert argv or evaluate.main(OPTIONS) == 0
    before = contents()
    monkeypatch.setattr(owner, name, Mock(**what))
    if words:
        refused(main, argv, "part", words)
    else:
        with pytest.raises(KeyboardInterrupt):
            main([*OPTIONS, *argv])
        assert contents() == before


def test_one_broken_category_of_three(tmp_path, monkeypatch, capsys):
    """The others are trained and scored, and the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        draw_dataset(Path("data"), name, train=2)
    Path("data/b/train/good/001.png").write_bytes(b"")
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED, "--category", *"abc"], "data/b/train/good/001.png")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "c"]
    fails(capsys, evaluate.main, [*OPTIONS, "--category", *"abc"], "runs/b/checkpoint.pt")
    table = Path("runs/results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["category", "a", "c", "mean"]


@pytest.mark.parametrize("number", range(16))
def test_damaged_bytes_end_in_a_result_or_in_one_line(workspace, capsys, number):
    """Fuzzing: a PNG, JPEG or checkpoint cut, flipped or replaced; never a traceback."""
    main, path, result = [
        (train.main, GOOD / "000.png", CHECKPOINT), (evaluate.main, TEST / "dent/001.png", SCORES),
        (evaluate.main, MASK, SCORES), (evaluate.main, CHECKPOINT, SCORES)][number % 4]
    if number in (0, 4, 5, 13):  # Pillow looks at the content, not at the suffix
        Image.open(path).copy().save(path, "JPEG")
    rng = np.random.default_rng([20230801, number])
    content = bytearray(path.read_bytes())
    way = number // 4  # each way with each file
    if way == 0:
        content = content[:rng.integers(len(content))]
    elif way == 1:
        content = [b"", b"\0" * 500, b"GIF89a" + b"\xff" * 60, b"PK\x05\x06" + b"\0" * 18][number % 4]
    else:  # headers are small: half of the time only they are hit
        for i in rng.integers(len(content) if way == 2 else 100, size=8):
            content[i] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    before = contents()
    code = patchae.exit_code(main, [*OPTIONS, *(UNTRAINED if main is train.main else [])])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if code == 0:
        assert not lines and contents()[result] != before.get(result)
    else:
        assert code == 2 and len(lines) == 1 and str(path) in lines[0] and contents() == before


# ---- the toy set --------------------------------------------------------------------------------
KINDS = {"flange": ("gouge", "oil", "chip", "fibre"), "felt": ("hole", "thread", "grease", "thin")}


def test_the_toy_set(tmp_path, monkeypatch):
    """Layout and counts as claimed; drawn by its seed, each category whatever else is drawn."""
    assert (make_toy.TRAIN, make_toy.GOOD, make_toy.PER_DEFECT) == (40, 20, 8)
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):  # to save time
        monkeypatch.setattr(make_toy, name, count)
    monkeypatch.chdir(tmp_path)
    make_toy.draw_if_absent(Path("set"))
    drawn = {path: content for path, content in contents("set").items() if content}
    expected = [f"{name}/{place}.png" for name, kinds in KINDS.items() for place in (
        "train/good/000", "train/good/001", "test/good/000", *(f"test/{kind}/000" for kind in kinds),
        *(f"ground_truth/{kind}/000_mask" for kind in kinds))]
    assert sorted(drawn) == sorted(Path("set", place) for place in expected)
    assert {Image.open(path).size for path in drawn} == {(256, 256)}
    for name, seed in (("felt", 0), ("flange", 1)):
        make_toy.draw_category(Path("set"), name, seed)
    assert all((path.read_bytes() == content) == ("felt" in path.parts) for path, content in drawn.items())


def test_a_toy_mask_is_where_the_defect_is(tmp_path, monkeypatch):
    """Saved files of defects on plain grey: 0 and 255; all of the mask is changed, and nothing is
    farther away than a soft rim reaches. A chip ends at the flange's rim; every fourth defect of
    felt is on the border of the image."""
    monkeypatch.setattr(make_toy, "TRAIN", 0)
    monkeypatch.setattr(make_toy, "GOOD", 0)
    monkeypatch.setattr(make_toy, "expose", lambda image, rng: image.round().clip(0, 255).astype(np.uint8))
    samples = []
    for name, (_, defects) in list(make_toy.CATEGORIES.items()):
        drawing = (lambda rng: np.full((256, 256, 3), 148.), defects)
        monkeypatch.setitem(make_toy.CATEGORIES, name, drawing)
        make_toy.draw_category(tmp_path, name)
        samples += images.list_test(tmp_path / name)
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
    def draw(folder, name):
        (folder / name).mkdir(parents=True)
        if draw_category.call_count == 2:
            raise KeyboardInterrupt

    draw_category = Mock(side_effect=draw)
    monkeypatch.setattr(make_toy, "draw_category", draw_category)
    with pytest.raises(KeyboardInterrupt):
        make_toy.draw_if_absent(tmp_path / "toy")
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["flange"]
    make_toy.draw_if_absent(tmp_path / "toy")
    assert [call.args[1] for call in draw_category.call_args_list] == ["flange", "felt", "felt"]
    assert sorted(contents(tmp_path)) == [tmp_path / p for p in ("toy", "toy/felt", "toy/flange")]
