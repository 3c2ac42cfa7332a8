"""Any folder is read, nothing is lost: images, masks, names, files in the way, the toy set.

The oracles are NumPy, Pillow and files written by hand.
"""
import errno
import io
import itertools
import math
import os
import platform
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, GOOD, OPTIONS, ROOT, SCORES, TEST, TINY, draw_dataset, fails
from PIL import Image, ImageFilter

import evaluate
import patchae
import train
from data import files, images, make_toy
from patchae import UserError

UNTRAINED = [*TINY, "--steps", "0", "--threshold-images", "0"]  # where only the files matter
MASK = Path("data/part/ground_truth/dent/001_mask.png")
NOISE = Image.effect_noise((64, 64), 50)
FORMATS = ("png", "jpg", "tif", "webp", "bmp")


def contents(root="."):
    """All that is below a folder: {path: bytes, or False for a folder}."""
    return {path: path.is_file() and path.read_bytes() for path in Path(root).rglob("*")}


def save(image, path, **options):
    """Save an image (Pillow's or an array) where no folder need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)


# ---- folders ------------------------------------------------------------------------------------
def test_which_categories_are_meant(tmp_path):
    """`all` is sorted, without hidden folders and those of other kinds; each comes once.

    --demo stands in for what is not given.
    """
    for place in ("b/train/good", "a/train/good", ".hidden/train/good", "c/test/good"):
        (tmp_path / place).mkdir(parents=True)
    assert images.choose_categories(tmp_path, ["b", "all"]) == ["a", "b"]
    assert images.choose_categories(tmp_path, ["b", "a", "b"]) == ["b", "a"]
    for argv, root, names in (("", ROOT / "data/toy", ["felt", "flange"]),
                              ("--data x --category felt", Path("x"), ["felt"])):
        args = files.parse_args(files.make_parser("")[0], ["--demo", *argv.split()])
        assert (args.data, args.category) == (root, names)


def test_images_of_all_suffixes_are_found_at_any_depth_and_others_are_counted(tmp_path, capsys):
    """Suffixes in lower and upper case; hidden files and folders are no files at all."""
    suffixes = ("png", "jpg", "jpeg", "jfif", "bmp", "tif", "tiff", "webp")
    wanted = [f"a.{s}" for s in suffixes] + [f"deep/er/b.{s.upper()}" for s in suffixes]
    root = tmp_path / ".cache"  # a hidden folder above hides nothing
    for name in (*wanted, ".a.png", "._a.png", ".thumbs/a.png", "deep/.er/a.png", "a.txt", "png",
                 "a.HEIC", "deep/b.heic"):
        form = Image.registered_extensions().get(Path(name).suffix.lower(), "PNG")
        save(Image.new("RGB", (8, 8), (77, 77, 77)), root / name, format=form)
    found = images.list_images(root)
    assert [path.relative_to(root).as_posix() for path in found] == sorted(wanted)
    assert all(abs(np.array(images.read_image(path)) - 77.).max() <= 1 for path in found)
    assert capsys.readouterr().out == f"{root}: skipped 2 .heic, 1 .txt, 1 without suffix\n"
    deep = root / "deep"  # results above the images, in the same folder, in it
    for results in (tmp_path, deep):
        assert len(images.list_images(deep, without=results)) == 8
    with pytest.raises(UserError, match="no images there"):
        images.list_images(deep, without=deep / "er")


def test_links_to_folders_are_followed_and_each_image_comes_once(tmp_path):
    """A link to a folder elsewhere, to one that is there anyway, to itself and to its parents.

    A link that leads to itself is a bad image, and others are read.
    """
    root = tmp_path / "set/photos"
    for place in (root / "a/1.png", tmp_path / "far/2.png", tmp_path / "far/deep/3.png",
                  root.parent / "beside.png", tmp_path / "above.png"):
        save(NOISE, place)
    for link, target in ((root / "z", tmp_path / "far"), (root / "b", root / "a"),
                         (root / "a/loop", root / "a"), (root / "a/up", root),
                         (root / "a/parent", root.parent), (root / "a/over", tmp_path),
                         (tmp_path / "far/up", tmp_path), (root / "again", tmp_path / "far")):
        link.symlink_to(target, target_is_directory=True)
    assert len(list(itertools.islice(images.walk(root), 99))) == 3  # and no endless loop
    found = [path.name for path in images.list_images(root)]
    assert sorted(found) == ["1.png", "2.png", "3.png"]
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert sorted(path.name for path in images.list_images(tmp_path / "link")) == sorted(found)
    (root / "loop.png").symlink_to("loop.png")
    readable, _, errors = images.read_readable(images.list_images(root, tmp_path / "out"), 8)
    assert (len(readable), len(errors)) == (3, 1) and "loop.png: not a readable" in errors[0]


def test_folders_that_may_not_be_read_are_named(workspace, monkeypatch, capsys):
    """Without them numbers would be wrong. Those that every disk has are left out.

    They stop no prediction of other images.
    """
    scan, listdir = os.scandir, os.listdir
    for main, folder in ((train.main, GOOD / "deep"), (evaluate.main, TEST / "dent"),
                         (evaluate.main, MASK.parent), (train.main, GOOD / "lost+found")):
        folder.mkdir(exist_ok=True)

        def refuse(path, call):
            """What the system says where the user has no rights. (Not as root, hence by hand.)"""
            if str(path) == str(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return call(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", lambda path=".": refuse(path, scan))
            patch.setattr(os, "listdir", lambda path=".": refuse(path, listdir))
            if folder.name == "lost+found":
                assert len(images.list_images(GOOD)) == 6
            else:
                fails(capsys, main, OPTIONS, folder, "Permission denied")
            if folder.name == "deep":
                assert evaluate.main([*OPTIONS, "--predict", str(GOOD)]) == 0
                said = f"left out: [Errno 13] Permission denied: '{folder}'"
                assert said in capsys.readouterr().out


@pytest.mark.parametrize("test, truth", [("test", "ground_truth"), ("test_b", "ground_truth_b"),
                                         ("val", "ground_truth_val")])
def test_types_and_masks_of_a_test_set(tmp_path, test, truth):
    """`good` in any case; masks are found by the name of their image, several of one image, too.

    Those of other images, of other types and other files are not; nor is the image its own mask.
    """
    masks = tmp_path / truth / "Hole"
    for name in ("Good/003.png", "Hole/003.jpg", "Hole/[4].png", "Hole/5.png"):
        save(NOISE, tmp_path / test / name)
    wanted = ["003.png", "003_mask.TIFF", "003_mask_1.png", "003_mask_left.png"]
    for name in (*wanted, "0033.png", "03.png", "003_maskx.png", "../scratch/003.png", "4.png",
                 "[4]_mask.png"):
        save(NOISE, masks / name)
    (masks / "003.txt").write_text("a note")
    assert images.list_test(tmp_path, test) == [
        (tmp_path / test / "Good/003.png", "good", []),
        (tmp_path / test / "Hole/003.jpg", "Hole", [masks / name for name in wanted]),
        (tmp_path / test / "Hole/5.png", "Hole", []),
        (tmp_path / test / "Hole/[4].png", "Hole", [masks / "[4]_mask.png"])]


# ---- images -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode, colour, more, seen", [
    ("L", 100, {}, (100, 100, 100)), ("1", 1, {}, (255, 255, 255)),
    ("P", 0, {}, (0, 0, 0)), ("P", 0, {"transparency": 0}, (255, 255, 255)),
    ("RGBA", (200, 0, 0, 51), {}, (244, 204, 204)), ("CMYK", (0, 255, 255, 0), {}, (255, 0, 0))])
def test_every_8_bit_image_becomes_the_rgb_that_one_sees(tmp_path, mode, colour, more, seen):
    """Transparency is laid on white: red 200, α = 51/255, becomes 0.2 · 200 + 0.8 · 255 = 244."""
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (8, 8), colour).save(path, **more)
    pixels = np.array(images.read_image(path), dtype=float)
    assert pixels.shape == (8, 8, 3) and abs(pixels - seen).max() <= 1


STORED = {  # EXIF orientation: how the camera stores what one sees
    1: lambda seen: seen, 2: lambda seen: seen[:, ::-1], 3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1], 5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1), 7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1)}


def exif_bytes(orientation, *entry):
    """EXIF data by hand: the orientation, and an entry (tag, type, numerator, denominator)."""
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    if entry:
        tags += struct.pack(">HHII", *entry[:2], 1, 38)
    values = struct.pack(">ii", *entry[2:]) if entry else b""
    return b"MM\0*" + struct.pack(">IH", 8, 1 + bool(entry)) + tags + bytes(4) + values


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the end that is missing
@pytest.mark.parametrize("orientation", STORED)
def test_a_cameras_orientation_is_undone(tmp_path, orientation):
    """In every format that has it; the mask beside it was painted upright, or has it, too.

    Other entries of the EXIF data may be broken: a negative rational, the end missing.
    """
    seen = np.random.default_rng(0).integers(0, 2, (32, 64, 1)).repeat(3, axis=2)
    seen = (255 * seen).astype(np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](seen))
    save(seen, tmp_path / "upright.png")
    small = np.array(Image.fromarray(seen[..., 0]).resize((64, 64), Image.NEAREST)) > 0
    sound = exif_bytes(orientation)
    for exif in (sound, exif_bytes(orientation, 0x011A, 10, -72, 1),
                 exif_bytes(orientation, 0x9204, 5, 1, 0),
                 exif_bytes(orientation, 0x011A, 5, 1, 1)[:-4]):
        for form in ("png", "jpg", "webp", "tif"):
            path = tmp_path / f"turned.{form}"
            if form == "tif" and exif != sound:  # Pillow cannot write such ones
                continue
            Image.fromarray(stored).save(path, quality=100, subsampling=0, lossless=True,
                                         exif=b"Exif\0\0" * (form != "png") + exif)
            read = np.array(images.read_image(path), dtype=float)
            assert read.shape == seen.shape and abs(read - seen).max() <= 2
            for mask in (tmp_path / "upright.png", tmp_path / "turned.png"):
                assert np.array_equal(images.read_mask([mask], path, 64), small)


def png(kind, channels):
    """A PNG of 16 × 16 pixels with 16 bits a channel, by hand; Pillow cannot write all of them."""
    def chunk(name, content):
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    header = struct.pack(">IIBBBBB", 16, 16, 16, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(32)) * channels) * 16)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


def tiff(order, planar):
    """A TIFF of 16 × 16 pixels, RGB with 16 bits each, by hand.

    order: < or >, of the bytes. planar: 1 for pixels in RGB order, 2 for one plane after the other.
    """
    strips = 3 if planar == 2 else 1
    fields = 8 + 2 + 12 * 10 + 4  # where the values begin that do not fit into a field
    pixels = fields + 6 + 8 * strips
    size = 16 * 16 * 6 // strips
    starts, sizes = [pixels + n * size for n in range(strips)], [size] * strips
    at = [fields + 6, fields + 6 + 4 * strips] if strips > 1 else [pixels, size]
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, fields), (259, 3, 1, 1),
               (262, 3, 1, 2), (273, 4, strips, at[0]), (277, 3, 1, 3), (278, 3, 1, 16),
               (279, 4, strips, at[1]), (284, 3, 1, planar)]
    table = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        form = "HHIHxx" if kind == 3 and count == 1 else "HHII"
        table += struct.pack(order + form, tag, kind, count, value)
    table += bytes(4) + struct.pack(order + f"3H{2 * strips}I", 16, 16, 16, *starts, *sizes)
    begin = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    return begin + table + bytes(range(256)) * 6


@pytest.mark.parametrize("content", [
    png(0, 1), png(2, 3), png(4, 2), png(6, 4), tiff("<", 1), tiff(">", 1), tiff("<", 2),
    tiff(">", 2), Image.new("I;16", (16, 16)), Image.new("F", (16, 16)), Image.new("I", (16, 16))],
    ids=["grey.png", "rgb.png", "la.png", "rgba.png", "rgb.tif", "rgb-big-endian.tif",
         "planar.tif", "planar-big-endian.tif", "I;16", "F", "I"])
def test_more_than_8_bits_are_refused(tmp_path, content):
    """Read as 8 bits they would lose detail; also those that Pillow shortens without a word."""
    path = tmp_path / "deep.tif"  # Pillow looks at the content, not at the suffix
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    assert Image.open(path).size == (16, 16)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: 16-bit .*to 8 bits"):
        images.read_image(path)


@pytest.mark.parametrize("form", FORMATS)
def test_cut_and_too_large_files_are_errors_but_foreign_exif_data_are_none(tmp_path, monkeypatch,
                                                                           form):
    """Half a picture is no picture; the limit is Pillow's, the words are ours."""
    path = tmp_path / f"image.{form}"
    NOISE.convert("RGB").save(path, **({} if form in ("tif", "bmp") else {"exif": b"junk"}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=f"image.{form}: too large, .* megapixels; make it smaller"):
        images.read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow warns of an attack
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit, match="0"):
        warnings.simplefilter("always")
        files.run(lambda: images.read_image(path).size != (64, 64))
    assert not caught
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    with pytest.raises(UserError, match=f"image.{form}: not a readable image .*repair or remove"):
        images.read_image(path)


@pytest.mark.parametrize("width, height", [(1024, 768), (1001, 779), (260, 1999)])
def test_a_large_jpeg_is_read_at_a_reduced_size_without_a_difference(tmp_path, width, height):
    """Against all of its pixels, resized; sides that are no multiples of 8, and turned, too."""
    cells = np.random.default_rng(0).integers(80, 170, (height // 40, width // 40, 3), np.uint8)
    picture = Image.fromarray(cells).resize((width, height), Image.BICUBIC)
    picture.save(tmp_path / "photo.jpg", quality=92)
    picture.save(tmp_path / "turned.jpg", quality=92, exif=b"Exif\0\0" + exif_bytes(6))
    whole = Image.open(tmp_path / "photo.jpg").convert("RGB")
    paths = [tmp_path / "photo.jpg", tmp_path / "turned.jpg"]
    seen = [whole, whole.transpose(Image.Transpose.ROTATE_270)]
    seen = [np.array(image.resize((64, 64), Image.BILINEAR), dtype=int) for image in seen]
    read = images.read_images(paths, 64).permute(0, 2, 3, 1).numpy()
    assert abs(read - np.stack(seen)).max() <= 1
    save(Image.new("L", (width, height), 255), tmp_path / "mask.png")  # as large as the photograph
    assert images.read_mask([tmp_path / "mask.png"], paths[0], 64).all()


def test_no_more_images_are_decoded_at_once_than_there_are_cores(tmp_path, monkeypatch):
    """A photograph of 24 megapixels takes 72 MB until it is resized.

    The progress shown is of images that were decoded.
    """
    NOISE.save(tmp_path / "image.png")
    lock, now, most, read_image = threading.Lock(), [], [], images.read_image

    def slowly(*arguments):
        with lock:
            now.append(1)
            most.append(len(now))
        time.sleep(0.01)
        now.pop()
        return read_image(*arguments)

    monkeypatch.setattr(images, "read_image", slowly)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def progress(paths):
        for number, path in enumerate(paths, 1):
            yield path
            assert len(most) - len(now) >= number

    read = images.read_images([tmp_path / "image.png"] * 9, 8, progress)
    assert read.shape == (9, 3, 8, 8)
    assert max(most) == 2 and len(most) == 9


# ---- masks --------------------------------------------------------------------------------------
def test_a_mask_is_what_was_drawn(tmp_path):
    """Any value but 0 is a defect: 1 of 8 bits, of blue alone, too; 256 of 16, white with a
    transparent ground.

    At half its size it has every second pixel. JPEG blurs edges: then above the half is a defect.
    """
    y, x = np.mgrid[:128, :128]
    discs = [np.hypot(x - 51, y - 70) < 16, np.hypot(x - 100, y - 20) < 9]
    image, paths = tmp_path / "image.png", [tmp_path / "0.png", tmp_path / "1.png"]
    Image.new("RGB", (128, 128)).save(image)
    white = Image.new("L", (128, 128), 255)
    for kind in (lambda disc: Image.fromarray(disc.astype(np.uint8)),
                 lambda disc: Image.fromarray(disc.astype(np.uint16) * 256),
                 lambda disc: Image.fromarray(disc[..., None] * np.uint8([0, 0, 1])),
                 lambda disc: Image.merge("LA", [white, Image.fromarray(disc).convert("L")])):
        for path, disc in zip(paths, discs):
            kind(disc).save(path)
        for size, place in ((128, np.s_[:, :]), (64, np.s_[1::2, 1::2])):
            one, both = (images.read_mask(paths[:n], image, size) for n in (1, 2))
            assert one.dtype == torch.bool and np.array_equal(one, discs[0][place])
            assert np.array_equal(both, (discs[0] | discs[1])[place])
    for form, colour in itertools.product(("jpg", "JPG", "webp"), ((255, 255, 255), (255, 0, 0))):
        coloured = Image.fromarray(discs[0][..., None] * np.uint8(colour))
        coloured.save(tmp_path / f"mask.{form}", quality=90)
        read = images.read_mask([tmp_path / f"mask.{form}"], image, 128).numpy()
        assert (read != discs[0]).sum() < 0.03 * discs[0].sum()
    assert not images.read_mask([], image, 128).any()


# ---- many files, some of them bad ---------------------------------------------------------------
def test_all_bad_files_are_named_and_a_prediction_scores_the_others(workspace, capsys, monkeypatch):
    """Training and evaluation stop and name them all at once, or the first of many."""
    before = contents("runs")
    for folder in (GOOD, TEST / "dent"):
        for name in ("000.png", "001.png"):
            (folder / name).write_bytes(b"text")
    for main, folder in ((train.main, GOOD), (evaluate.main, TEST / "dent")):
        fails(capsys, main, [*OPTIONS, *(UNTRAINED if main is train.main else [])],
              folder / "000.png", folder / "001.png", "repair or remove")
    assert contents("runs") == before
    fails(capsys, evaluate.main, [*OPTIONS, "--predict", TEST], TEST / "dent/000.png",
          TEST / "dent/001.png")
    table = Path("runs/part/predictions/data-part-test/scores.csv")
    assert len(table.read_text().splitlines()) == 3
    monkeypatch.setattr(images, "NAMED", 1)
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED], GOOD / "000.png", "; and 1 more")
    fails(capsys, evaluate.main, [*OPTIONS, "--predict", TEST / "dent"], "; and 1 more")


def test_one_broken_category_of_three(tmp_path, monkeypatch, capsys):
    """The others are trained and scored, and the exit code is 2. No older number is printed."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        draw_dataset(Path("data"), name, train=2)
    bad = Path("data/b/train/good/001.png")
    bad.write_bytes(b"")
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED, "--category", *"abc"], bad)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "c"]
    for _ in range(2):  # the second time there are results of an earlier run
        code = files.exit_code(evaluate.main, [*OPTIONS, "--category", "all"])
        out, err = capsys.readouterr()
        assert code == 2 and str(Path("runs/b/checkpoint.pt")) in err
        assert [line.split()[0] for line in out.splitlines()[-4:]] == ["category", "a", "c", "mean"]
        shutil.copytree("runs/a/trained", "runs/b/trained", dirs_exist_ok=True)
        Path("runs/b/trained/result.csv").write_text(
            Path("runs/a/trained/result.csv").read_text().replace("\na,", "\nb,"))
    table = Path("runs/results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["category", "a", "b", "c"]


def test_as_many_heatmaps_as_rows_and_none_is_scored_itself(workspace, monkeypatch):
    """Names that differ in the suffix or in the folder only, a link; a folder above --out, twice.

    Results of other folders stay: of the same last name, of one without a name, of many.
    """
    names = ("a.jpg", "a.jpg.png", "a.jpg.png.png", "a.png", "1/a.png", "2/a.png", "1/a.PNG.bmp",
             f"{'ü' * 125}.jpg")
    for name in names:
        save(NOISE.resize((8, 2600)) if "bmp" in name else NOISE, Path("photos", name))
    save(NOISE, Path("store/12ab.png"))
    Path("store/up").symlink_to("../photos/1", target_is_directory=True)
    Path("photos/link.png").symlink_to(Path("store/12ab.png").absolute())
    shutil.move("runs", "photos/runs")
    for paths, target, count in ((["photos"], "photos", 9), (["photos"], "photos", 9),
                                 (["photos/1", "photos/2"], "photos-1+photos-2", 3),
                                 (["photos/1", "../copy/photos/2"], "photos-1+photos-2", 3),
                                 (["photos/a.png", "store/up/../a.png"],
                                  "photos-a.png+photos-a.png", 1)):
        assert evaluate.main([*OPTIONS, "--out", "photos/runs", "--predict", *paths]) == 0
        folder = Path("photos/runs/part/predictions", target)
        assert len((folder / "scores.csv").read_text().splitlines()) == 1 + count
        assert len(list(folder.rglob("heatmaps/**/*.png"))) == count
        assert count < 9 or (folder / "heatmaps/link.png").exists()
    root = Path.cwd().anchor  # as a memory card on Windows
    monkeypatch.setattr(evaluate, "list_images", lambda *_, **more: [Path("photos/a.png")])
    many = ["photos/1"] * 30
    for paths in ([root], ["photos/2"], ["photos/1"], many, [*many, "photos/2"], ["../copy"]):
        before = contents("photos/runs")
        assert evaluate.main([*OPTIONS, "--out", "photos/runs", "--predict", *paths]) == 0
        after = contents("photos/runs")
        assert len(after) > len(before) and all(after[path] == before[path] for path in before)


# ---- names and messages -------------------------------------------------------------------------
def test_what_is_missing_is_named(workspace, capsys, monkeypatch):
    """The option, or the path as it was typed; `part/` and `all` mean what one expects."""
    for main, argv, words in (
            (train.main, "", "--data ROOT is missing"),
            (train.main, "--data data", "--category NAME is missing"),
            (evaluate.main, "", "--data ROOT is missing"),
            (evaluate.main, f"--predict {GOOD}", "--category NAME is missing"),
            (evaluate.main, f"--predict {GOOD}x --category part", f"--predict {GOOD}x: no such"),
            (evaluate.main, f"--predict {GOOD} --category no", Path("runs/no/checkpoint.pt")),
            (evaluate.main, f"--predict {GOOD} --category all --out no", "--out no: no NAME/")):
        fails(capsys, main, argv.split(), words)
    shutil.copytree("runs/part", "runs/second")
    predict = ["--device", "cpu", "--predict", GOOD / "000.png", "--category"]
    assert evaluate.main([*map(str, predict), "all"]) == 0
    assert {path.parts[1] for path in Path("runs").glob("*/predictions")} == {"part", "second"}
    assert evaluate.main([*map(str, predict), "part/"]) == evaluate.main([*OPTIONS[:4], *(
        "--category part/ --device cpu".split())]) == 0
    assert SCORES.exists()


def say(monkeypatch, encoding, script, argv):
    """Run a script on a console of this encoding: (exit code, the bytes printed)."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        for stream in streams:
            stream.flush()
    return end.value.code, streams[0].buffer.getvalue() + streams[1].buffer.getvalue()


def test_any_name_on_any_console(workspace, monkeypatch):
    """A category called Φ and a byte of an old code; images called 零件.png and Prüfteil.png.

    The table is UTF-8 in any case; pictures and heatmaps are there.
    """
    scripts = ("train.py", "evaluate.py", "data/make_toy.py")
    for encoding, script in itertools.product(("cp1252", "ascii"), scripts):
        code, text = say(monkeypatch, encoding, script, ["--help"])
        assert code == 0 and text.isascii()
    names, category = ["零件.png", os.fsdecode(b"Pr\xfcfteil.png")], os.fsdecode(b"\xce\xa6\xfc")
    if sys.platform in ("darwin", "win32"):  # their file systems have no other names than Unicode
        names, category = names[:1], "Φ"
    data = Path("data", category)
    shutil.move("data/part", data)
    shutil.move("runs/part", Path("runs", category))
    for number, name in enumerate(names):
        (data / f"train/good/00{number}.png").rename(data / "train/good" / name)
        (data / f"test/dent/00{number}.png").rename(data / "test/dent" / name)
    shutil.copy(data / "train/good" / names[0], data / "train/good/copy.png")  # it is named
    options = [*OPTIONS, "--category", category]
    predicted = data / "test/dent" / names[-1]
    for encoding, script, more in (("ascii", "train.py", UNTRAINED), ("cp1252", "evaluate.py", []),
                                   ("ascii", "evaluate.py", ["--predict", str(predicted)])):
        code, text = say(monkeypatch, encoding, script, [*options, *more])
        assert code == 0
        if script == "evaluate.py" and not more:
            assert text.splitlines()[-1].split()[1:3] == [b"test", b"trained"]
    prediction = f"predictions/data-{category}-test-dent-{names[-1]}"
    for folder, count in (("trained", 4), (prediction, 1)):
        folder = Path("runs", category, folder)
        table = (folder / "scores.csv").read_text("utf-8").splitlines()
        assert len(table) == 1 + count == 1 + len(list(folder.rglob("heatmaps/**/*.png")))
        assert {"nearest.png", "overview.png"} <= {path.name for path in folder.iterdir()}
    predicted.write_bytes(b"")
    assert say(monkeypatch, "ascii", "evaluate.py", options)[0] == 2


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_each_line_is_printed_at_once(monkeypatch, name):
    """Also into a file or a pipe: after hours one wants to know how far a training is."""
    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, name, stream)

    def work():
        print("a line", file=stream)
        assert stream.buffer.getvalue() == b"a line" + os.linesep.encode()

    with pytest.raises(SystemExit, match="0"):
        files.run(work)


def test_a_notebooks_streams_are_left_as_they_are(monkeypatch):
    """They have no encoding that could be changed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    with pytest.raises(SystemExit, match="0"):
        files.run(lambda: print("零件"))


def test_packages_of_the_same_names_elsewhere_do_not_win(tmp_path):
    """`data` and `evaluate` are common names; a folder on PYTHONPATH has both."""
    for name in ("data", "evaluate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('foreign')")
    code = ("from importlib.util import find_spec as find\nprint(find('data').origin)\n"
            "print(find('evaluate').origin)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)})  # as a script in ROOT
    assert shown.stdout.split() == [str(ROOT / "data/__init__.py"), str(ROOT / "evaluate.py")]


# ---- what is refused ----------------------------------------------------------------------------
@pytest.fixture
def refused(workspace, monkeypatch, capsys):
    """A check: exit code 2, one line with the words, and all files and folders as they were.

    What is wrong is said before the training, which may take hours, unless it is late.
    """
    def check(main, argv, *words, late=False):
        before = contents()
        with monkeypatch.context() as patch:
            if not late:
                patch.setattr(train, "fit", Mock(side_effect=AssertionError("trained")))
            untrained = UNTRAINED if main is train.main else []
            fails(capsys, main, [*OPTIONS, *untrained, *argv], *words)
        assert contents() == before
    return check


def test_a_file_that_cannot_be_used(refused):
    """It is named with the remedy. content: an image, the bytes of a file, or None for no file."""
    for main, argv, path, content, remedy in (
            (train.main, "", GOOD / "tiny.png", NOISE.resize((64, 3)), "larger images"),
            (evaluate.main, "", TEST / "stray.png", NOISE, "move"),
            (evaluate.main, "", MASK, NOISE.resize((32, 65)), "32 × 65 pixels, its image 64 × 64"),
            (train.main, "--weights x.pth", Path("x.pth"), b"<html>none</html>", "state-dict file"),
            (train.main, "--weights x.pth", Path("x.pth"), None, "state-dict file"),
            (train.main, "--out file", Path("file"), b"in the way", "file"),
            (evaluate.main, "", CHECKPOINT, None, "train.py")):
        old = path.read_bytes() if path.exists() else None
        if isinstance(content, Image.Image):
            content.save(path)
        elif content:
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)
        refused(main, argv.split(), path, remedy)
        path.write_bytes(old) if old else path.unlink(missing_ok=True)


def test_a_folder_that_cannot_be_written_is_named_before_the_training(refused, monkeypatch):
    """Of another user, or on a disk that is full or read-only; it may well exist."""
    for name in ("TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(tempfile, name, Mock(side_effect=PermissionError(13, "read-only")))
    refused(train.main, [], "--out runs", "read-only")


def test_weights_that_cannot_be_had_or_do_not_fit(refused, monkeypatch):
    """A failed download names the address and the folder in which the file can be put by hand."""
    offline = Mock(side_effect=urllib.error.URLError("offline"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "torch")
    Path("torch/hub/checkpoints").mkdir(parents=True)
    refused(train.main, ["--weights", "imagenet"], "https://download.pytorch.org/models/resnet18",
            "offline", Path("torch/hub/checkpoints"), "random")
    assert offline.call_args.args[2] == "f37072fd"  # a download that is damaged is noticed
    published = ("resnet18-f37072fd", "resnet50-0676ba61", "wide_resnet50_2-95faca4d",
                 "wide_resnet101_2-32ee1156")  # the weights that older papers used
    for name, file in zip(patchae.BACKBONES, published, strict=True):
        with pytest.raises(UserError, match=f"models/{file}.pth"):
            patchae.load_weights(None, name, "imagenet")
    torch.save(patchae.make_backbone("resnet18", (2,)).state_dict(), "18.pth")
    refused(train.main, "--weights 18.pth --backbone resnet50".split(), "18.pth", "resnet50")
    state = patchae.make_backbone("resnet18", (1, 2, 3, 4)).state_dict()
    state["layer1.0.conv1.weight"][0] = math.nan
    torch.save(state, "nan.pth")
    refused(train.main, ["--weights", "nan.pth"], "nan.pth", "not finite")


@pytest.mark.parametrize("main, folder", [(train.main, GOOD), (evaluate.main, TEST)])
def test_wrong_folders(refused, main, folder):
    """No such folder, a category in place of its parent, unknown categories, no images."""
    draw_dataset(Path("data"), "other", train=1, good=1, bad=1)
    refused(main, ["--data", "no"], "--data no", "NAME/train/good")
    refused(main, ["--data", "data/part"], "data/part", "parent")
    refused(main, ["--category", "part", "nix"], "nix", "other, part")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(main, [], folder, "no images there", ".png")
    if main is evaluate.main:
        refused(main, ["--test", "nix"], TEST.with_name("nix"), "no such folder")


@pytest.mark.parametrize("main, options", [
    (train.main, ["--image-size 100", "--patch-size 12", "--neighbourhood 2", "--layers 0 2",
                  "--lr 2", "--lr nan", "--steps -1", "--steps many", "--backbone vgg",
                  "--memory-fraction 2", "--device tpu", "--device cuda", "--batch-size 0",
                  "--none", "--out data"]),
    (evaluate.main, ["--quantile 0", "--quantile 1.01", "--quantile nan", "--method nothing",
                     "--batch-size 1025", "--predict", "--test test --predict data",
                     "--test ../test", "--test a/b"])])
def test_options_out_of_range(refused, monkeypatch, main, options):
    """Refused by name before anything is done.

    So are a device that is not there, and an --out where results would replace the data set.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in options:
        refused(main, option.split(), option.split()[0])


# ---- what stops half-way ------------------------------------------------------------------------
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("main, owner, name, error", [
    (train.main, Path, "write_bytes", FULL),  # the checkpoint
    (train.main, Image.Image, "save", FULL),  # defects.png
    (evaluate.main, Image.Image, "save", FULL),  # a heatmap
    (train.main, patchae, "training_loss", KeyboardInterrupt()),
    (evaluate.main, evaluate, "write_overview", KeyboardInterrupt())])
def test_what_stops_half_way_leaves_the_results_before(refused, monkeypatch, capsys, main, owner,
                                                       name, error):
    """A full disk, Ctrl-C: all is as it was, byte for byte, with one line and the exit code."""
    argv = [*TINY, "--steps", "1"] if main is train.main else []
    assert argv or evaluate.main(OPTIONS) == 0
    before = contents()
    monkeypatch.setattr(owner, name, Mock(side_effect=error))
    if error is FULL:
        refused(main, argv, "part", "No space left", late=True)
        return
    capsys.readouterr()
    with pytest.raises(SystemExit, match="130"):
        files.run(lambda: main([*OPTIONS, *argv]))
    line, = capsys.readouterr().err.strip().splitlines()
    assert "interrupted" in line and contents() == before


MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
          RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
          RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
          RuntimeError("MPS backend out of memory")]


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_line(monkeypatch, capsys, error):
    """It names what helps; a RuntimeError of another kind is a fault of ours and stays one.

    Other errors of the system say what is wrong with which file.
    """
    work = Mock(side_effect=error)
    assert files.exit_code(work, "part") == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("part", "memory", "--memory-fraction", "--batch-size"))
    assert files.exit_code(Mock(side_effect=PermissionError(13, "not allowed", "a.png"))) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "not allowed" in line and "a.png" in line
    for fault in ("shape", "an illegal memory access was encountered", "memory format"):
        with pytest.raises(RuntimeError, match=fault):
            files.exit_code(Mock(side_effect=RuntimeError(fault)))
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):  # such a file is not to be repaired
        images.read_images([Path("large.png")], 64)


def test_a_training_is_not_lost_where_memory_ends(workspace, monkeypatch, capsys):
    """Scoring the normal images needs most of it: the weights are there, the next category runs.

    With less memory the same weights are taken up, without another training.
    """
    shutil.copytree("data/part", "data/second")
    expected = torch.load(CHECKPOINT, weights_only=True)["model"]
    shutil.rmtree("runs/part")
    real, errors = patchae.nearest_distance, MEMORY[:1]

    def scarce(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(patchae, "nearest_distance", scarce)
    fails(capsys, train.main, [*OPTIONS, *TINY, "--category", "part", "second"], "part",
          "--memory-fraction", "--batch-size")
    kept = [torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)
            for name in ("part", "second")]
    assert [len(one["normal_scores"]) for one in kept] == [0, 6]
    monkeypatch.setattr(train, "fit", Mock(side_effect=AssertionError("trained again")))
    again = [*OPTIONS, *TINY, "--skip-finished", "--memory-fraction", "0.1"]
    assert train.main(again) == 0
    after = torch.load(CHECKPOINT, weights_only=True)
    assert len(after["normal_scores"]) == 6 and after["config"]["memory_fraction"] == 0.1
    assert Path("runs/part/train.csv").exists() and Path("runs/part/defects.png").exists()
    for content in (*kept, after):
        assert all(torch.equal(content["model"][name], expected[name]) for name in expected)


def test_two_trainings_at_once_are_not_mixed(workspace, monkeypatch):
    """One ends while the other scores its normal images: the last wins, with all of its files."""
    remember, steps = patchae.PatchAE.remember, ["2"]

    def interrupted(*arguments):
        if steps:
            assert train.main([*OPTIONS, *TINY, "--steps", steps.pop()]) == 0
        return remember(*arguments)

    monkeypatch.setattr(patchae.PatchAE, "remember", interrupted)
    assert train.main([*OPTIONS, *TINY, "--steps", "1"]) == 0
    content = torch.load(CHECKPOINT, weights_only=True)
    assert content["config"]["steps"] == 1 and len(content["normal_scores"]) == 6
    assert Path("runs/part/train.csv").read_text().splitlines()[-1].startswith("1,")


@pytest.mark.parametrize("number, argv", [(6, UNTRAINED), (1, [*TINY, "--steps", "0"])])
def test_what_is_finished_stays_where_there_is_no_threshold(workspace, number, argv):
    """None was asked for, or one image has nothing to be compared with: evaluations stay, too."""
    for path in sorted(GOOD.iterdir())[number:]:
        path.unlink()
    assert train.main([*OPTIONS, *argv]) == 0
    SCORES.parent.mkdir()
    assert train.main([*OPTIONS, *argv, "--skip-finished"]) == 0
    assert SCORES.parent.exists()


# ---- whole --------------------------------------------------------------------------------------
def make(path, text="new", folder=True):
    """Make a result at the path by whole: a folder with two files, or one file."""
    with files.whole(path) as unfinished:
        if folder:
            (unfinished / "deep").mkdir(parents=True)
            (unfinished / "deep/a").write_text(text)
        (unfinished / "b" if folder else unfinished).write_text(text)


@pytest.mark.parametrize("folder", [True, False])
def test_a_result_replaces_what_was_there(tmp_path, folder):
    """All of it, with its sub-folders, and nothing else is left; the folders above are made."""
    path = tmp_path / "new/runs/[part]"
    make(path, "old", folder)
    if folder:
        (path / "older").write_text("")
    make(path, "new", folder)
    assert {p.relative_to(path).as_posix(): text for p, text in contents(path).items()} == (
        {"deep": False, "deep/a": b"new", "b": b"new"} if folder else {})
    assert folder or path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_to_results_elsewhere_stays_a_link(tmp_path):
    """Of a user who keeps them on a larger disk; nothing is left beside either."""
    large, link = tmp_path / "large/part", tmp_path / "runs/part"
    make(large, "old")
    link.parent.mkdir()
    link.symlink_to(large, target_is_directory=True)
    make(link, "new")
    assert link.is_symlink() and (large / "b").read_text() == "new"
    assert [*link.parent.iterdir(), *large.parent.iterdir()] == [link, large]


@pytest.mark.parametrize("error", [PermissionError(13, "in use"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("name, folder", [("rename", True), ("replace", True), ("replace", False),
                                          ("write_text", True), ("write_text", False)])
def test_after_any_failure_the_old_is_there(tmp_path, monkeypatch, name, folder, error):
    """Byte for byte, and nothing beside it. The message names the path and the true cause.

    The old cannot be put aside, the new not into its place, or it cannot be made.
    """
    path = tmp_path / "runs/part"
    make(path, "old", folder)
    before, real = contents(tmp_path), getattr(Path, name)

    def fail(self, target):
        if self.name.startswith(".before"):  # the way back works
            return real(self, target)
        raise error

    monkeypatch.setattr(Path, name, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        make(path, "new", folder)
    assert contents(tmp_path) == before
    if isinstance(error, OSError):
        assert str(path) in str(caught.value) and "in use" in str(caught.value)


def test_an_old_file_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch):
    """Open in a viewer on Windows, or of another owner: the new result is there all the same.

    What could not be removed is removed by a later run.
    """
    path, unlink = tmp_path / "runs/part", os.unlink
    make(path, "old")
    with monkeypatch.context() as patch:
        def refuse(name, **more):
            if Path(name).name == "a":
                raise PermissionError(13, "in use")
            unlink(name, **more)
        patch.setattr(os, "unlink", refuse)
        make(path, "new")
    assert (path / "deep/a").read_text() == "new"
    make(path, "newest")
    assert list(path.parent.iterdir()) == [path] and (path / "deep/a").read_text() == "newest"


def test_two_at_once_never_fail_and_the_last_wins(tmp_path):
    """Two writers of one result, each many times: it is always whole, and nothing is left over."""
    path, errors = tmp_path / "runs/part", []

    def often(name):
        try:
            for n in range(60):
                make(path, f"{name} {n}")
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=often, args=name) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    assert (path / "b").read_text() == (path / "deep/a").read_text() in ("a 59", "b 59")
    make(path, "last")
    assert list(path.parent.iterdir()) == [path] and (path / "b").read_text() == "last"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    """Not what living ones write, of any user, nor what comes from another machine.

    On Windows os.kill ends a process in place of asking for it, so it is not called.
    """
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path, node, open_ones = tmp_path / "part", platform.node(), []

    def begin(pid, name):
        """Begin a result as this process of this machine; the folder in which it writes."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid)
            patch.setattr(platform, "node", lambda: name)
            open_ones.append(files.whole(path))
            folder = open_ones[-1].__enter__().parent
        (folder / "half").write_text("")
        return folder

    kept = [begin(os.getpid(), node), begin(ended.pid, f"{node}-{ended.pid}"),
            begin(ended.pid, f"{node}-x")]
    dead = begin(ended.pid, node)
    make(path)
    assert not dead.exists() and all((folder / "half").exists() for folder in kept)
    for name, error in ((os.name, PermissionError(1, "not yours")), ("nt", AssertionError())):
        monkeypatch.setattr(files, "os", SimpleNamespace(
            name=name, getpid=os.getpid, kill=Mock(side_effect=error)))
        make(path, "newer")
    assert all((folder / "half").exists() for folder in kept)
    assert (path / "b").read_text() == "newer"


def test_the_only_copy_is_never_removed(tmp_path, monkeypatch):
    """A process killed between the two moves: the old result lies beside, hidden, until the next.

    Another result whose name begins alike does not remove it.
    """
    part, other = tmp_path / "part-1", tmp_path / "part"
    for path in (part, other):
        make(path, "old")
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(Path, "replace", Mock(side_effect=OSError("killed")))
        patch.setattr(Path, "exists", lambda path: False)  # as if there were no time to put it back
        make(part)
    assert not part.exists()
    make(other)
    with pytest.raises(KeyboardInterrupt), files.whole(part):
        raise KeyboardInterrupt  # the next run does not get far
    assert [path.read_text() for path in tmp_path.rglob(".before*/b")] == ["old"]
    make(part)
    make(part)
    assert sorted(tmp_path.iterdir()) == [other, part]


# ---- damaged bytes ------------------------------------------------------------------------------
def damaged(content, rng, way):
    """The content cut, replaced, or with a few bytes changed, in its beginning or anywhere."""
    content = bytearray(content)
    if way == 0:
        return content[:rng.integers(len(content))]
    if way == 1:
        foreign = (b"", bytes(500), b"GIF89a" + b"\xff" * 60, b"PK\x05\x06" + bytes(18))
        return foreign[rng.integers(4)]
    for i in rng.integers(len(content) if way == 2 else 100, size=8):
        content[i] ^= int(rng.integers(1, 256))
    return content


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_damaged_images_are_read_or_refused(tmp_path, monkeypatch, form):
    """Fuzzing: an image of the right size, or an error that names the file; never another one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # to save time
    path, rng = tmp_path / f"image.{form}", np.random.default_rng(20230801)
    more = {} if form == "bmp" else {"exif": b"Exif\0\0" * (form != "png") + exif_bytes(6)}
    NOISE.convert("RGB").save(path, **more)
    content, refusals = path.read_bytes(), 0
    for n in range(40):
        path.write_bytes(damaged(content, rng, n % 4))
        readable, read, errors = images.read_readable([path], 32)
        refusals += len(errors)
        assert read.shape == (len(readable), 3, 32, 32) and len(readable) + len(errors) == 1
        assert all(str(path) in error for error in errors)
        with suppress(UserError):
            assert images.read_mask([path], path, 32).shape == (32, 32)
    assert refusals >= 10


@pytest.mark.parametrize("way", range(3))
def test_a_damaged_checkpoint_is_refused(refused, way):
    """Also where only a few of its millions of numbers are other ones; no result is changed."""
    content = damaged(CHECKPOINT.read_bytes(), np.random.default_rng(way), way)
    CHECKPOINT.write_bytes(content)
    refused(evaluate.main, [], CHECKPOINT, "train.py")


# ---- the toy set --------------------------------------------------------------------------------
KINDS = {"flange": ("gouge", "oil", "chip", "fibre"), "felt": ("hole", "thread", "grease", "thin")}


def test_the_toy_set(tmp_path, monkeypatch):
    """Layout and counts as claimed; drawn by its seed, each category whatever else is drawn.

    Both test sets have the same good images and masks, and the same parts below their defects.
    """
    assert (make_toy.TRAIN, make_toy.GOOD, make_toy.PER_DEFECT) == (40, 20, 8)
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):  # to save time
        monkeypatch.setattr(make_toy, name, count)
    monkeypatch.chdir(tmp_path)
    make_toy.draw_if_absent(Path("set"))
    drawn = {path: content for path, content in contents("set").items() if content}
    expected = [Path("set", name, f"{place}.png") for name, kinds in KINDS.items() for place in (
        "train/good/000", "train/good/001",
        *(f"test{faint}/{kind}/000" for kind in ("good", *kinds) for faint in ("", "_faint")),
        *(f"ground_truth{faint}/{kind}/000_mask" for kind in kinds for faint in ("", "_faint")))]
    assert sorted(drawn) == sorted(expected)
    assert {Image.open(path).size for path in drawn} == {(256, 256)}
    for path in drawn:
        faint = Path("set", path.parts[1], path.parts[2] + "_faint", *path.parts[3:])
        if "train" in path.parts or "_faint" in path.parts[2]:
            continue
        assert (drawn[path] == drawn[faint]) == ("good" in path.parts or "ground" in path.parts[2])
        if path.parts[2] == "test":
            ground = Path("set", path.parts[1], "ground_truth", path.parts[3], "000_mask.png")
            normal = np.ones((256, 256), bool)
            if ground.exists():
                normal = np.array(Image.open(ground).reduce(8).resize((256, 256))) == 0
            one, other = (np.array(Image.open(p))[normal].ravel() for p in (path, faint))
            assert np.corrcoef(one, other)[0, 1] > 0.9
    for name, seed in (("felt", 0), ("flange", 1)):
        make_toy.draw_category(Path("set"), name, seed)
    assert all((path.read_bytes() == content) == ("felt" in path.parts)
               for path, content in drawn.items())

    def look(image, rng):
        """In place of `expose`, for clear and for faint images: which random numbers come next."""
        numbers.append(rng.random())
        return image.clip(0, 255).astype(np.uint8)

    monkeypatch.setattr(make_toy, "expose", look)
    numbers = []
    for name, seed in (("felt", 0), ("flange", 0), ("felt", 1)):
        make_toy.draw_category(Path("other"), name, seed)
    assert len(set(numbers)) == len(numbers) == 3 * (3 + 2 * 4)


DRAWN = {
    # two normal images of each part: the mean and the deviation of their grey levels
    "flange": [(96.4, 62.6), (91.9, 59.7)], "felt": [(93.6, 17.6), (93.2, 17.2)],
    # two defects of each kind: the pixels of the mask; the mean grey level there, clear and faint
    "gouge": [(276, 196.6, 143.6), (270, 241.2, 177.5)],
    "oil": [(566, 88.0, 114.1), (638, 91.9, 137.4)],
    "chip": [(210, 38.6, 107.1), (227, 36.8, 95.8)],
    "fibre": [(234, 97.0, 126.8), (234, 93.6, 122.6)],
    "hole": [(163, 35.9, 68.0), (351, 36.0, 74.2)],
    "thread": [(262, 93.9, 97.8), (281, 164.6, 122.2)],
    "grease": [(532, 63.2, 78.2), (484, 61.6, 88.3)],
    "thin": [(266, 143.5, 109.2), (715, 148.8, 114.1)]}


def test_the_toy_set_is_the_one_of_the_published_numbers(tmp_path, monkeypatch):
    """Whoever changes the drawing has to measure README and docs anew."""
    def grey(path):
        return np.array(Image.open(path).convert("RGB"), dtype=float).mean(axis=2)

    for name, count in (("TRAIN", 1), ("GOOD", 1), ("PER_DEFECT", 2)):
        monkeypatch.setattr(make_toy, name, count)
    for name, kinds in KINDS.items():
        make_toy.draw_category(tmp_path, name)
        normal = [grey(tmp_path / name / test / "good/000.png") for test in ("train", "test")]
        found = {name: [(image.mean(), image.std()) for image in normal]}
        for kind, number in itertools.product(kinds, ("000", "001")):
            there = grey(tmp_path / name / "ground_truth" / kind / f"{number}_mask.png") > 0
            levels = [grey(tmp_path / name / test / kind / f"{number}.png")[there].mean()
                      for test in ("test", "test_faint")]
            found.setdefault(kind, []).append((there.sum(), *levels))
        for kind, values in found.items():
            np.testing.assert_allclose(values, DRAWN[kind], rtol=0.01, err_msg=kind)


def test_the_options_of_the_toy_set(tmp_path, monkeypatch, capsys):
    """They arrive, or are refused in one line; by default it is data/toy, seed 0.

    What is there is never drawn over.
    """
    draw = Mock(side_effect=lambda folder, name, *_: (folder / name).mkdir())
    monkeypatch.setattr(make_toy, "draw_category", draw)
    assert make_toy.ROOT == ROOT / "data/toy"
    monkeypatch.setattr(make_toy, "ROOT", tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    make_toy.main([])
    make_toy.main(["--out", "x", "--seed", "3", "--strength", "0", "1"])
    assert [call.args[1:] for call in draw.call_args_list] == [
        *((name, 0, (0.25, 0.5)) for name in ("flange", "felt")),
        *((name, 3, [0, 1]) for name in ("flange", "felt"))]
    assert sorted(contents(tmp_path)) == [tmp_path / p for p in (
        "toy", "toy/felt", "toy/flange", "x", "x/felt", "x/flange")]
    draw.side_effect = OSError("disk full")
    for argv in ("--seed -1", "--seed many", "--strength 1 0", "--strength nan 1",
                 "--strength 0 2", "--out full", "--out x"):
        with pytest.raises(SystemExit, match="2"):
            make_toy.main(argv.split())
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and argv.split()[0] in line


@pytest.mark.parametrize("strength", [None, (0.5, 0.6)])
def test_a_toy_mask_is_where_the_defect_is(tmp_path, monkeypatch, strength):
    """Saved files of defects on plain grey: 0 and 255; all of the mask is changed.

    Nothing is changed farther away than a soft rim reaches. A chip ends at the flange's rim; every
    fourth defect of felt is on the border of the image. A faint defect is a part of a clear one.
    """
    monkeypatch.setattr(make_toy, "TRAIN", 0)
    monkeypatch.setattr(make_toy, "GOOD", 0)
    monkeypatch.setattr(make_toy, "PER_DEFECT", 3 if strength else 8)  # to save time
    monkeypatch.setattr(make_toy, "expose",
                        lambda image, rng: image.round().clip(0, 255).astype(np.uint8))
    samples, parts = [], []
    for name, (_, defects) in list(make_toy.CATEGORIES.items()):
        drawing = (lambda rng: np.full((256, 256, 3), 148.), defects)
        monkeypatch.setitem(make_toy.CATEGORIES, name, drawing)
        make_toy.draw_category(tmp_path, name, **({"strength": strength} if strength else {}))
        samples += images.list_test(tmp_path / name)
    assert len(samples) == 8 * make_toy.PER_DEFECT
    for path, kind, (mask_path,) in samples:
        clear = np.array(Image.open(path), dtype=int) - 148
        faint = path.parents[2] / "test_faint" / kind / path.name
        faint = np.array(Image.open(faint), dtype=int) - 148
        known = abs(clear) < 100  # else white or black cut it off
        parts.append((clear * faint)[known].sum() / (clear * clear)[known].sum())
        assert abs(faint - parts[-1] * clear)[known].max() <= 1.1
        change, mask = abs(clear).max(axis=2), np.array(Image.open(mask_path))
        assert set(np.unique(mask)) == {0, 255} and change[mask > 0].all()
        inside, rim = np.argwhere(mask), 5 if kind in ("oil", "grease", "thin") else 3  # pixels
        near = np.array(Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * rim + 1)))
        assert not change[near == 0].any() and change[mask == 0].any()
        fourth, on_border = int(path.stem) % 4 == 0, inside.min() == 0 or inside.max() == 255
        assert kind != "chip" or 102 < np.hypot(*(inside - 127.5).T).max() < 0.44 * 256 + 2
        assert kind not in KINDS["felt"] or not fourth or on_border
        assert kind not in ("hole", "thin") or fourth or not on_border
    low, high = strength or (0.25, 0.5)
    assert low - 0.01 < min(parts) < low + (high - low) / 4
    assert high + 0.01 > max(parts) > high - (high - low) / 4


def test_the_toy_set_is_photographed_alike_everywhere():
    """Light of 0.96 to 1.04, once as a whole and once from left to right; noise of 2 grey levels.

    Too bright is white, too dark black. The felt is as dense at the border as inside.
    """
    rng = np.random.default_rng(0)

    def photograph(level):
        return make_toy.expose(np.full((256, 256, 3), float(level)), rng).astype(float)

    assert (photograph(400) == 255).all() and (photograph(-50) == 0).all()
    grey = np.stack([photograph(128) for _ in range(60)])
    light, ends = grey.mean(axis=(1, 2, 3)), grey[:, :, [0, -1]].mean(axis=(1, 3))
    for factors in (light / 128, (ends[:, 1] - ends[:, 0]) / 256 + 1):
        assert 0.955 < factors.min() < 0.97 and 1.03 < factors.max() < 1.045
    assert grey.std(axis=1).mean() == pytest.approx(2, rel=0.05)
    felt = np.stack([make_toy.draw_felt(rng) for _ in range(6)])
    ring = np.ones((256, 256), bool)
    ring[8:-8, 8:-8] = False
    for measure in (np.mean, np.std):
        assert measure(felt[:, ring, 0]) == pytest.approx(measure(felt[:, ~ring, 0]), rel=0.03)


def test_an_interrupted_drawing_is_no_toy_set(tmp_path, monkeypatch):
    """A category is there whole or not at all; the next run draws what is missing and no more.

    Two runs at once draw each for itself, and one of them wins.
    """
    def draw(folder, name, *_):
        (folder / name).mkdir(parents=True)
        if draw_category.call_count == 2:
            raise KeyboardInterrupt
        if draw_category.call_count == 4:
            make_toy.draw_if_absent(tmp_path / "toy")
        (folder / name / str(draw_category.call_count)).touch()

    draw_category = Mock(side_effect=draw)
    monkeypatch.setattr(make_toy, "draw_category", draw_category)
    with pytest.raises(KeyboardInterrupt):
        make_toy.draw_if_absent(tmp_path / "toy")
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["flange"]
    make_toy.draw_if_absent(tmp_path / "toy")
    assert [call.args[1] for call in draw_category.call_args_list] == ["flange", "felt", "felt"]
    shutil.rmtree(tmp_path / "toy/felt")
    make_toy.draw_if_absent(tmp_path / "toy")
    assert sorted(contents(tmp_path)) == [tmp_path / p for p in (
        "toy", "toy/felt", "toy/felt/5", "toy/flange", "toy/flange/1")]
