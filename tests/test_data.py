"""Any folder is read, nothing is lost: images, masks, names, files in the way, the toy set.

The oracles are NumPy, Pillow and files written by hand.
"""
import errno
import io
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import zlib
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (CHECKPOINT, GOOD, OPTIONS, ROOT, SCORES, TEST, TINY, draw_dataset, fails,
                      watch)
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


def test_links_to_folders_are_followed_and_each_image_comes_once(tmp_path):
    """A link to a folder elsewhere, to one that is there anyway, to itself and to its parents."""
    root = tmp_path / "photos"
    for place in (root / "a/1.png", tmp_path / "far/2.png", tmp_path / "far/deep/3.png"):
        save(NOISE, place)
    save(NOISE, tmp_path / "above.png")
    for link, target in ((root / "z", tmp_path / "far"), (root / "b", root / "a"),
                         (root / "a/loop", root / "a"), (root / "a/up", root),
                         (tmp_path / "far/up", tmp_path), (root / "again", tmp_path / "far")):
        link.symlink_to(target, target_is_directory=True)
    found = [path.name for path in images.list_images(root)]
    assert sorted(found) == ["1.png", "2.png", "3.png"]
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert sorted(path.name for path in images.list_images(tmp_path / "link")) == sorted(found)


@pytest.mark.parametrize("test, truth", [("test", "ground_truth"), ("test_b", "ground_truth_b"),
                                         ("val", "ground_truth_val")])
def test_types_and_masks_of_a_test_set(tmp_path, test, truth):
    """`good` in any case; masks are found by the name of their image, several of one image, too.

    Those of other images, of other types and other files are not; nor is the image its own mask.
    """
    masks = tmp_path / truth / "hole"
    for name in ("Good/003.png", "hole/003.jpg", "hole/[4].png", "hole/5.png"):
        save(NOISE, tmp_path / test / name)
    wanted = ["003.png", "003_mask.TIFF", "003_mask_1.png", "003_mask_left.png"]
    for name in (*wanted, "0033.png", "03.png", "003_maskx.png", "../scratch/003.png", "4.png",
                 "[4]_mask.png"):
        save(NOISE, masks / name)
    (masks / "003.txt").write_text("a note")
    assert images.list_test(tmp_path, test) == [
        (tmp_path / test / "Good/003.png", "good", []),
        (tmp_path / test / "hole/003.jpg", "hole", [masks / name for name in wanted]),
        (tmp_path / test / "hole/5.png", "hole", []),
        (tmp_path / test / "hole/[4].png", "hole", [masks / "[4]_mask.png"])]


# ---- images -------------------------------------------------------------------------------------
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
    for exif in (exif_bytes(orientation), exif_bytes(orientation, 0x011A, 10, -72, 1),
                 exif_bytes(orientation, 0x9204, 5, 1, 0),
                 exif_bytes(orientation, 0x011A, 5, 1, 1)[:-4]):
        for form in ("png", "jpg", "webp"):
            path = tmp_path / f"turned.{form}"
            Image.fromarray(stored).save(path, quality=100, subsampling=0, lossless=True,
                                         exif=b"Exif\0\0" * (form != "png") + exif)
            read = np.array(images.read_image(path), dtype=float)
            assert read.shape == seen.shape and abs(read - seen).max() <= 2
            for mask in (tmp_path / "upright.png", tmp_path / "turned.png"):
                assert np.array_equal(images.read_mask([mask], path, 64), small)


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_exif_data_that_are_none_do_no_harm(tmp_path, form):
    """The picture itself is whole."""
    NOISE.convert("RGB").save(tmp_path / f"image.{form}", exif=b"junk")
    assert images.read_image(tmp_path / f"image.{form}").size == (64, 64)


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
    """Read as 8 bits they would lose what sensors see; all modes, also those that Pillow shortens."""
    path = tmp_path / "deep.tif"  # Pillow looks at the content, not at the suffix
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    assert Image.open(path).size == (16, 16)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: 16-bit .*to 8 bits"):
        images.read_image(path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_cut_file_is_an_error_and_so_is_one_that_is_too_large(tmp_path, monkeypatch, form):
    """Half a picture is no picture; the limit is Pillow's, the words are ours."""
    path = tmp_path / f"image.{form}"
    NOISE.convert("RGB").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=f"image.{form}: too large, .* megapixels; make it smaller"):
        images.read_image(path)
    monkeypatch.undo()
    assert images.read_image(path).size == (64, 64)
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


def test_no_more_images_are_decoded_at_once_than_there_are_cores(tmp_path, monkeypatch):
    """A photograph of 24 megapixels takes 72 MB until it is resized."""
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
    assert images.read_images([tmp_path / "image.png"] * 9, 8).shape == (9, 3, 8, 8)
    assert max(most) == 2 and len(most) == 9


# ---- masks --------------------------------------------------------------------------------------
def test_a_mask_is_what_was_drawn(tmp_path):
    """Any value but 0 is a defect: 1 of 8 bits, 256 of 16, white with a transparent ground.

    At half its size it has every second pixel. JPEG blurs edges: then above the half is a defect.
    """
    y, x = np.mgrid[:128, :128]
    discs = [np.hypot(x - 51, y - 70) < 16, np.hypot(x - 100, y - 20) < 9]
    image, paths = tmp_path / "image.png", [tmp_path / "0.png", tmp_path / "1.png"]
    Image.new("RGB", (128, 128)).save(image)
    white = Image.new("L", (128, 128), 255)
    for kind in (lambda disc: Image.fromarray(disc.astype(np.uint8)),
                 lambda disc: Image.fromarray(disc.astype(np.uint16) * 256),
                 lambda disc: Image.merge("LA", [white, Image.fromarray(disc).convert("L")])):
        for path, disc in zip(paths, discs):
            kind(disc).save(path)
        for size, place in ((128, np.s_[:, :]), (64, np.s_[1::2, 1::2])):
            one, both = (images.read_mask(paths[:n], image, size) for n in (1, 2))
            assert one.dtype == torch.bool and np.array_equal(one, discs[0][place])
            assert np.array_equal(both, (discs[0] | discs[1])[place])
    for form in ("jpg", "webp"):
        Image.fromarray(discs[0]).convert("L").save(tmp_path / f"mask.{form}", quality=90)
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
    assert len(Path("runs/part/predictions/test/scores.csv").read_text().splitlines()) == 3
    monkeypatch.setattr(images, "NAMED", 1)
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED], GOOD / "000.png", "; and 1 more")
    fails(capsys, evaluate.main, [*OPTIONS, "--predict", TEST / "dent"], "; and 1 more")


def test_one_broken_category_of_three(tmp_path, monkeypatch, capsys):
    """The others are trained and scored, and the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        draw_dataset(Path("data"), name, train=2)
    bad = Path("data/b/train/good/001.png")
    bad.write_bytes(b"")
    fails(capsys, train.main, [*OPTIONS, *UNTRAINED, "--category", *"abc"], bad)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "c"]
    fails(capsys, evaluate.main, [*OPTIONS, "--category", "all"], Path("runs/b/checkpoint.pt"))
    table = Path("runs/results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["category", "a", "c"]


def test_as_many_heatmaps_as_rows_and_none_is_scored_itself(workspace, capsys):
    """Names that differ in the suffix only, in the folder only; a folder above --out, twice."""
    names = ("a.jpg", "a.jpg.png", "a.jpg.png.png", "a.png", "1/a.png", "2/a.png", "1/a.PNG.bmp")
    for name in names:
        save(NOISE, Path("photos", name))
    for paths, target in ((["photos"], "photos"), (["photos/1", "photos/2"], "1-and-1-more")):
        assert evaluate.main([*OPTIONS, "--predict", *paths]) == 0
        folder = Path("runs/part/predictions", target)
        rows = (folder / "scores.csv").read_text().splitlines()[1:]
        assert len(rows) == len(list(folder.rglob("heatmaps/**/*.png"))) == (
            len(names) if paths == ["photos"] else 3)
    for _ in range(2):
        assert evaluate.main([*OPTIONS, "--predict", "."]) == 0
        assert "part: 19 images" in capsys.readouterr().out  # 12 of data, 7 photos
    assert evaluate.main([*OPTIONS, "--predict", "runs/part/defects.png", "runs/part"]) == 0


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


def say(monkeypatch, encoding, main, argv):
    """Run main as the scripts do, on a console of this encoding: (exit code, the bytes printed)."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            files.run(lambda: main(argv))
        for stream in streams:
            stream.flush()
    return end.value.code, streams[0].buffer.getvalue() + streams[1].buffer.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_name_on_any_console(workspace, monkeypatch, encoding):
    """A category called Φ, images called 零件.png and, in an old code, Prüfteil.png.

    The table is UTF-8 in any case; pictures and heatmaps are there.
    """
    for main in (train.main, evaluate.main):
        code, text = say(monkeypatch, encoding, main, ["--help"])
        assert code == 0 and text.isascii()
    shutil.move("data/part", "data/Φ")
    shutil.move("runs/part", "runs/Φ")
    names = ["零件.png", os.fsdecode(b"Pr\xfcfteil.png")]
    if sys.platform in ("darwin", "win32"):  # their file systems have no other names than Unicode
        names.pop()
    for folder in ("train/good", "test/dent"):
        for number, name in enumerate(names):
            Path("data/Φ", folder, f"00{number}.png").rename(Path("data/Φ", folder, name))
    Path("data/Φ/train/good/copy.png").write_bytes(Path("data/Φ/train/good", names[0]).read_bytes())
    options = [*OPTIONS, "--category", "Φ"]
    assert say(monkeypatch, encoding, train.main, [*options, *UNTRAINED])[0] == 0
    assert say(monkeypatch, encoding, evaluate.main, options)[0] == 0
    predicted = Path("data/Φ/test/dent", names[-1])
    assert say(monkeypatch, encoding, evaluate.main, [*options, "--predict", str(predicted)])[0] == 0
    for folder, count in (("trained", 4), (f"predictions/{names[-1]}", 1)):
        folder = Path("runs/Φ", folder)
        table = (folder / "scores.csv").read_text("utf-8").splitlines()
        assert len(table) == 1 + count == 1 + len(list(folder.rglob("heatmaps/**/*.png")))
        assert {"nearest.png", "overview.png"} <= {path.name for path in folder.iterdir()}
    predicted.write_bytes(b"")
    assert say(monkeypatch, encoding, evaluate.main, options)[0] == 2


def test_packages_of_the_same_names_elsewhere_do_not_win(tmp_path):
    """`data` and `evaluate` are common names; a folder on PYTHONPATH has both."""
    for name in ("data", "evaluate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('foreign')")
    shown = subprocess.run([sys.executable, ROOT / "evaluate.py", "--help"], capture_output=True,
                           env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True)
    assert shown.returncode == 0 and "--predict" in shown.stdout, shown.stderr


# ---- what is refused ----------------------------------------------------------------------------
@pytest.fixture
def refused(workspace, capsys):
    """A check: exit code 2, one line with the words, and all files and folders as they were."""
    def check(main, argv, *words):
        before = contents()
        fails(capsys, main, [*OPTIONS, *(UNTRAINED if main is train.main else []), *argv], *words)
        assert contents() == before
    return check


def test_a_file_that_cannot_be_used(refused):
    """It is named with the remedy. content: an image, the bytes of the file, or None for no file."""
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
