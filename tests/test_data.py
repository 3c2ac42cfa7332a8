"""data/: which files are read and what becomes of them; the toy set.

- Any class name, any depth in train/good, all usual suffixes. Names that begin with . @ # $ or ~,
  other suffixes, results and what is no regular file are skipped; one line says how many.
- Links to folders are followed, each folder once. A folder that may not be read is an error.
- Every folder test* with TYPE folders is a test set. Masks are STEM.* or STEM_mask*.*.
- 8 bits, one page, upright, RGB; all bad files are named. Exact copies are left out and named.
- A mask is lossless and as large as its upright image. No defect vanishes when it is made smaller.
- The toy set is the one of the published numbers.
The oracles are NumPy, Pillow and files written by hand.
"""
import errno
import itertools
import os
import re
import shutil
import struct
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GOOD, MASKS, NOISE, OPTIONS, ROOT, TEST, TINY, contents, fails, save
from PIL import Image, JpegImagePlugin

import evaluate
import train
from data import images, make_toy
from patchae import UserError

FORMATS = ("png", "jpg", "tif", "webp", "bmp")


# ---- folders ------------------------------------------------------------------------------------
def test_which_categories_are_meant(tmp_path, monkeypatch):
    """`all` is sorted, without hidden folders and those of other kinds; each comes once. Good and
    GOOD are good. --demo stands in for what is not given."""
    for place in ("b/train/Good", "a/train/good", ".hidden/train/good", "c/test/good"):
        (tmp_path / place).mkdir(parents=True)
    assert images.choose_categories(tmp_path, ["b", "all"]) == (tmp_path, ["a", "b"])
    assert images.choose_categories(tmp_path, ["b", "a", "b"]) == (tmp_path, ["b", "a"])
    drawn = Mock()
    monkeypatch.setattr(make_toy, "draw_if_absent", drawn)
    assert images.choose_categories(tmp_path, ["a"], demo=True) == (tmp_path, ["a"])
    with pytest.raises(UserError, match="felt flange.*has a, b"):
        images.choose_categories(tmp_path, [], demo=True)
    assert drawn.call_args.args == (tmp_path,)


def test_which_files_are_images(tmp_path, capsys):
    """Suffixes in lower and upper case, at any depth. What is skipped is counted and named: hidden
    files, thumbnails of storage systems, other suffixes, pipes, results of ours."""
    suffixes = ("png", "jpg", "jpeg", "jfif", "bmp", "tif", "tiff", "webp")
    wanted = [f"a.{s}" for s in suffixes] + [f"deep/er/b.{s.upper()}" for s in suffixes]
    root = tmp_path / ".cache"  # a hidden folder above hides nothing
    hidden = (".a.png", "._a.png", "~$a.png", ".thumbs/a.png", "@eaDir/a.png", "a.txt", "png",
              "deep/#recycle/a.png", "$RECYCLE.BIN/a.png", "deep/b.heic")
    results = ("runs/checkpoint.pt", "runs/p/sheet.png", "to/scores.csv", "to/heatmaps/1_a.png")
    for name in (*wanted, *hidden, *results):
        form = Image.registered_extensions().get(Path(name).suffix.lower(), "PNG")
        save(Image.new("RGB", (8, 8), (77, 77, 77)), root / name, format=form)
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "camera.png")
    found = images.list_images(root)
    assert [path.relative_to(root).as_posix() for path in found] == sorted(wanted)
    assert all(abs(np.array(images.read_image(path)) - 77.).max() <= 1 for path in found)
    line, = capsys.readouterr().out.splitlines()
    said = line.partition("folders: ")[2].split(", ")
    assert set(said) - {"camera.png"} == {
        ".a.png", "._a.png", "~$a.png", ".thumbs", "@eaDir", "#recycle", "$RECYCLE.BIN", "a.txt",
        "png", "b.heic", "runs", "to"} and ("camera.png" in said) == hasattr(os, "mkfifo")
    assert line.startswith(f"{root}: skipped {len(said)} files and folders: ")
    (tmp_path / "empty").mkdir()
    for n in range(images.NAMED):
        (root / f"{n}.txt").touch()
    images.list_images(root)
    assert capsys.readouterr().out.strip().endswith(", ...")
    with pytest.raises(UserError, match="no images there; expected .png"):
        images.list_images(tmp_path / "empty")


def test_links_to_folders_are_followed_and_each_image_comes_once(tmp_path):
    """A link to a folder elsewhere, to one that is there anyway, to itself and to its parents.

    A link that leads to itself is no file, and others are read.
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
    found = [path.name for path in images.list_images(root)]
    assert sorted(found) == ["1.png", "2.png", "3.png"]
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert sorted(path.name for path in images.list_images(tmp_path / "link")) == sorted(found)
    (root / "loop.png").symlink_to("loop.png")
    assert len(images.list_images(root)) == 3


def test_a_folder_that_may_not_be_read_is_an_error(workspace, monkeypatch, capsys):
    """Without it numbers would be wrong."""
    scan = os.scandir
    for main, folder in ((train.main, GOOD / "deep"), (evaluate.main, TEST / "dent"),
                         (evaluate.main, MASKS)):
        folder.mkdir(exist_ok=True)

        def refuse(path="."):
            """What the system says where the user has no rights. (Not as root, hence by hand.)"""
            if str(path) == str(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            return scan(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refuse)
            fails(capsys, main, OPTIONS, folder, "Permission denied")


@pytest.mark.parametrize("test, truth", [("test", "ground_truth"), ("test_b", "ground_truth_b"),
                                         ("test_public", "test_public/ground_truth")])
def test_types_and_masks_of_a_test_set(tmp_path, capsys, test, truth):
    """`good` in any case; masks are found by the name of their image, several of one image, too.

    Those of other images, of other types and other files are not; nor is the image its own mask.
    A folder test* without types is named and left out.
    """
    masks = tmp_path / truth / "Hole"
    for name in ("Good/003.png", "Hole/003.jpg", "Hole/[4].png", "Hole/a_mask_b.png",
                 "Hole/deep/5.png"):
        save(NOISE, tmp_path / test / name)
    save(NOISE, tmp_path / "test_private/001.png")
    wanted = ["003.png", "003_mask.TIFF", "003_mask1.png", "003_mask_left.png"]
    for name in (*wanted, "0033.png", "03.png", "../scratch/003.png", "4.png", "[4]_mask.png",
                 "a_mask_b_mask.png", "deep/5.png", "003.txt"):
        save(NOISE, masks / name, format="PNG")
    found = images.list_test_sets(tmp_path)
    place = tmp_path / test
    assert found == {test: [
        (place / "Good/003.png", "good", []),
        (place / "Hole/003.jpg", "Hole", [masks / name for name in wanted]),
        (place / "Hole/[4].png", "Hole", [masks / "[4]_mask.png"]),
        (place / "Hole/a_mask_b.png", "Hole", [masks / "a_mask_b_mask.png"]),
        (place / "Hole/deep/5.png", "Hole", [masks / "deep/5.png"])]}
    assert f"{tmp_path / 'test_private'}: has no folders TYPE, left out" in capsys.readouterr().out


@pytest.mark.parametrize("main, path, content, argv, words", [
    (train.main, GOOD / "tiny.png", NOISE.resize((64, 3)), "", "64 × 3 pixels; use larger images"),
    (train.main, GOOD / "bad.png", b"text", "", "not a usable image"),
    (train.main, GOOD, "one", "", "two different images"),
    (train.main, GOOD, None, "", "no images there"),
    (train.main, Path("data/part"), None, "", "data/README.md"),
    (train.main, None, None, "--data data/part", "folder above NAME"),
    (train.main, None, None, "--data no", "--data no"),
    (train.main, None, None, "--category part nix", "--category nix: not there; data has part"),
    (evaluate.main, TEST / "stray.png", NOISE, "", "move it there"),
    (evaluate.main, TEST / "dent/bad.png", b"text", "", "not a usable image"),
    (evaluate.main, TEST, None, "", "no folder test/TYPE; see data/README.md"),
    (evaluate.main, TEST / "good", "empty", "", "no images there"),
    (evaluate.main, MASKS / "000_mask.png", NOISE.resize((32, 65)), "",
     "32 × 65 pixels, its upright image 64 × 64"),
    (evaluate.main, MASKS / "000_mask.jpg", NOISE, "", "save masks as PNG"),
    (evaluate.main, MASKS / "000_mask.webp", NOISE, "", "save masks as PNG")])
def test_bad_folders_and_files(workspace, capsys, main, path, content, argv, words):
    """One line that names the file and the remedy. All results stay as they were.

    content: an image or the bytes of a file; for a folder how many images are left in it, or None
    if the folder is not there.
    """
    if content is None and path:
        shutil.rmtree(path)
        path.mkdir(exist_ok=content == "empty")
        path.rmdir() if main is evaluate.main else None
    elif content in ("one", "empty"):
        for file in sorted(path.parent.rglob("*.png"))[content == "one":]:
            file.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content.save(path)
    before = contents("runs")
    argv = [*OPTIONS, *(TINY if main is train.main else []), *argv.split()]
    named = [path] if path and path.name.endswith("g") else []
    fails(capsys, main, argv, words, *named)
    after = contents("runs")
    assert all(after[name] == before[name] for name in before)


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
    """In every format that has it; a mask may have it, too.

    Other entries of the EXIF data may be broken: a negative rational, the end missing.
    """
    seen = np.random.default_rng(0).integers(0, 2, (32, 64, 1)).repeat(3, axis=2)
    seen = (255 * seen).astype(np.uint8)
    stored = np.ascontiguousarray(STORED[orientation](seen))
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
            if form in ("png", "tif"):
                assert np.array_equal(images.read_mask([path], (64, 32), 64), small)


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
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*scale .* to 8 bits"):
        images.read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of many pixels
@pytest.mark.parametrize("form", FORMATS)
def test_cut_and_too_large_files_are_errors_but_foreign_exif_data_are_none(tmp_path, monkeypatch,
                                                                           form):
    """Half a picture is no picture; the limit is Pillow's."""
    path = tmp_path / f"image.{form}"
    NOISE.convert("RGB").save(path, **({} if form in ("tif", "bmp") else {"exif": b"junk"}))
    assert images.read_image(path).size == (64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(UserError, match=f"image.{form}: not a usable .*4096 pixels.* exceeds"):
        images.read_image(path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    with pytest.raises(UserError, match=f"image.{form}: not a usable image .*repair or remove"):
        images.read_image(path)


@pytest.mark.parametrize("form", ["tif", "png", "webp", "jpg"])
def test_several_pages_are_an_error(tmp_path, monkeypatch, form):
    """The defect may be on the last one. But the second picture of a phone's MPO is a preview."""
    path, pages = tmp_path / f"a.{form}", [NOISE.rotate(90 * n).convert("RGB") for n in range(3)]
    more = {} if form == "jpg" else {"save_all": True, "append_images": pages[1:]}
    pages[0].save(path, **more)
    if form == "jpg":  # as Pillow reads an MPO
        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "n_frames", 2, raising=False)
        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "format", "MPO")
        assert images.read_image(path).size == (64, 64)
        return
    with pytest.raises(UserError, match=f"a.{form}.*several pages"):
        images.read_image(path)


def test_few_images_are_decoded_at_once(tmp_path, monkeypatch):
    """A photograph of 24 megapixels takes 72 MB until it is resized. Images come in their order."""
    paths = [tmp_path / f"{n}.png" for n in range(12)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (n, n, n)).save(path)
    now, most, read_image = [], [], images.read_image

    def slowly(path):
        now.append(1)
        most.append(len(now))
        time.sleep(0.02 if path.stem == "0" else 0.01)
        now.pop()
        return read_image(path)

    monkeypatch.setattr(images, "read_image", slowly)
    for allowed, limit in ((2, 2), (64, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: allowed)
        most.clear()
        read = images.read_images(paths, 8)
        assert read[:, 0, 0, 0].tolist() == list(range(12)) and 1 < max(most) <= limit


def test_all_bad_files_are_named(tmp_path, monkeypatch):
    """At once, or the first of many."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"text")
    with pytest.raises(UserError, match="0.png.*1.png.*2.png: not a usable image [^;]*; repair or"):
        images.read_images(images.list_images(tmp_path), 8)
    monkeypatch.setattr(images, "NAMED", 1)
    with pytest.raises(UserError, match="0.png.*; and 2 more"):
        images.read_images(images.list_images(tmp_path), 8)
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):  # such a file is not to be repaired
        images.read_images([tmp_path / "0.png"], 8)


def test_exact_copies_are_left_out_and_named(tmp_path, capsys):
    """A photograph as JPEG and as PNG, large, too; a copy in a folder below. The first one stays.

    Neither mirrored ones are copies, nor those that differ in one pixel.
    """
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)) for _ in "ab"]
    good = tmp_path / "part/train/good"
    for name, photograph in zip("ab", photographs):
        save(photograph, good / f"{name}.jpg", quality=90)
        save(Image.open(good / f"{name}.jpg"), good / f"{name}.png")
        save(Image.open(good / f"{name}.jpg"), good / f"deep/{name}.png")
    mirrored = np.array(Image.open(good / "a.png"))[:, ::-1].copy()
    save(mirrored, good / "mirrored.png")
    mirrored[:9, :9] = 0
    save(mirrored, good / "other.png")
    paths, read = images.read_normal_images(tmp_path / "part", 64)
    assert [path.name for path in paths] == ["a.jpg", "b.jpg", "mirrored.png", "other.png"]
    assert torch.equal(read, images.read_images(paths, 64))
    assert capsys.readouterr().out == "part: left out 4 exact copies: a.png, a.png, b.png, b.png\n"
    (good / "other.png").unlink()
    for name in ("b.jpg", "b.png", "deep/b.png", "mirrored.png"):
        (good / name).unlink()
    with pytest.raises(UserError, match="two different images"):
        images.read_normal_images(tmp_path / "part", 64)


# ---- masks --------------------------------------------------------------------------------------
def test_a_mask_is_what_was_drawn(tmp_path):
    """Any value but 0 is a defect: 1 of 8 bits, of blue alone, too; white with a transparent
    ground. Several are joined. Without one nothing is a defect."""
    y, x = np.mgrid[:128, :128]
    discs = [np.hypot(x - 51, y - 70) < 16, np.hypot(x - 100, y - 20) < 9]
    paths, white = [tmp_path / "0.png", tmp_path / "1.png"], Image.new("L", (128, 128), 255)
    for kind in (lambda disc: Image.fromarray(disc.astype(np.uint8)),
                 lambda disc: Image.fromarray(disc[..., None] * np.uint8([0, 0, 1])),
                 lambda disc: Image.merge("LA", [white, Image.fromarray(disc).convert("L")])):
        for path, disc in zip(paths, discs):
            kind(disc).save(path)
        one, both = (images.read_mask(paths[:n], (128, 128), 128) for n in (1, 2))
        assert one.dtype == torch.bool and np.array_equal(one, discs[0])
        assert np.array_equal(both, discs[0] | discs[1])
    assert not images.read_mask([], (128, 128), 128).any()


@pytest.mark.parametrize("side, size", [(1024, 384), (1024, 128), (256, 96), (300, 384), (64, 64)])
def test_no_defect_vanishes_from_a_smaller_mask(tmp_path, side, size):
    """A small pixel is a defect if any pixel in it is. So a spot of one pixel stays wherever it is,
    in one small pixel if the mask shrinks, and a line of one pixel stays one region."""
    path, rng = tmp_path / "mask.png", np.random.default_rng(0)
    for _ in range(6):
        y, x = rng.integers(side, size=2)
        spot = np.zeros((side, side), np.uint8)
        spot[y, x] = 255
        save(spot, path)
        small = images.read_mask([path], (side, side), size).numpy()
        found = np.argwhere(small)
        assert len(found) >= 1 and (len(found) == 1 or size > side)
        assert abs((found + 0.5) / size - (np.array([y, x]) + 0.5) / side).max() < 1 / size
    line = np.zeros((side, side), np.uint8)
    line[np.arange(side), (np.arange(side) * 0.4).astype(int)] = 255
    save(line, path)
    small = images.read_mask([path], (side, side), size)
    weights = evaluate.region_weights(small)[small]
    assert weights.sum() == pytest.approx(1) and small.any(1).all()  # one region, over all rows


# ---- the toy set --------------------------------------------------------------------------------
KINDS = {"flange": ("gouge", "oil", "chip", "fibre"), "felt": ("hole", "thread", "grease", "thin")}
DRAWN = {
    # of two normal images the mean of red, green and blue, and how much neighbours differ
    "flange": [(93.2, 96.1, 100.0, 6.86), (88.8, 91.6, 95.3, 6.69)],
    "felt": [(80.4, 103.3, 97.0, 15.22), (80.1, 102.8, 96.7, 14.84)],
    # of two defects the pixels of the mask; the mean of each colour there, clear and faint
    "gouge": [(276, 193.3, 196.3, 200.1, 139.9, 143.2, 147.6),
              (270, 237.7, 241.4, 244.6, 172.9, 177.0, 182.6)],
    "oil": [(566, 106.8, 89.2, 68.1, 116.1, 114.2, 112.0),
            (638, 111.0, 93.1, 71.6, 139.2, 137.4, 135.6)],
    "chip": [(210, 38.3, 38.7, 38.7, 104.0, 106.7, 110.7),
             (227, 36.6, 36.8, 36.9, 93.2, 95.6, 98.6)],
    "fibre": [(234, 171.9, 57.5, 61.7, 146.4, 114.4, 119.6),
              (234, 164.3, 56.4, 60.2, 151.7, 105.4, 110.5)],
    "hole": [(163, 35.5, 36.3, 36.0, 60.6, 73.5, 69.7),
             (351, 35.4, 36.4, 36.2, 66.0, 80.2, 76.5)],
    "thread": [(262, 51.1, 72.0, 158.4, 76.4, 99.5, 117.6),
               (281, 187.0, 175.4, 131.4, 123.8, 132.3, 110.4)],
    "grease": [(532, 61.7, 73.3, 54.5, 70.5, 87.9, 76.3),
               (484, 61.1, 71.7, 52.1, 79.7, 99.2, 86.2)],
    "thin": [(266, 135.3, 153.1, 142.0, 98.1, 118.6, 110.9),
             (715, 140.2, 158.7, 147.4, 102.5, 123.9, 115.7)]}


def measure(path, there):
    """The mean of each colour of an image, where the mask is."""
    return np.array(Image.open(path).convert("RGB"), dtype=float)[there].reshape(-1, 3).mean(axis=0)


def test_the_toy_set_is_the_one_of_the_published_numbers(tmp_path, monkeypatch):
    """Whoever changes the drawing has to measure README and docs anew. Layout, counts as claimed.

    Each category is drawn by its seed, whatever else is drawn. Both test sets have the same good
    images and masks. A mask has 0 and 255; every fourth defect of felt is on the image border.
    """
    assert (make_toy.TRAIN, make_toy.GOOD, make_toy.PER_DEFECT) == (40, 20, 8)
    for name, count in (("TRAIN", 1), ("GOOD", 1), ("PER_DEFECT", 2)):  # to save time
        monkeypatch.setattr(make_toy, name, count)
    make_toy.draw_if_absent(tmp_path)
    files = {path.relative_to(tmp_path).as_posix(): content
             for path, content in contents(tmp_path).items() if content}
    drawn = [(f"test{faint}/{kind}/00{n}", f"ground_truth{faint}/{kind}/00{n}_mask")
             for faint in ("", "_faint") for n in "01" for kind in sum(KINDS.values(), ())]
    wanted = [f"{name}/{place}.png" for name, kinds in KINDS.items() for place in (
        "train/good/000", "test/good/000", "test_faint/good/000",
        *(place for pair in drawn for place in pair if place.split("/")[1] in kinds))]
    assert sorted(files) == sorted(wanted)
    for name, kinds in KINDS.items():
        root, found = tmp_path / name, {}
        for place in ("train", "test"):
            image = np.array(Image.open(root / place / "good/000.png"), dtype=float)
            assert image.shape == (256, 256, 3)
            found.setdefault(name, []).append(
                (*image.mean(axis=(0, 1)), abs(np.diff(image, axis=1)).mean()))
        for kind, n in itertools.product(kinds, "01"):
            mask = np.array(Image.open(root / f"ground_truth/{kind}/00{n}_mask.png"))
            assert set(np.unique(mask)) == {0, 255}
            levels = [measure(root / test / kind / f"00{n}.png", mask > 0)
                      for test in ("test", "test_faint")]
            found.setdefault(kind, []).append(((mask > 0).sum(), *np.concatenate(levels)))
            rows, columns = np.nonzero(mask)
            border = min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == 255
            assert name == "flange" or n == "1" or border
        for kind, values in found.items():
            np.testing.assert_allclose(values, DRAWN[kind], rtol=0.01, err_msg=kind)
    for path, content in files.items():
        if "good" in path or "ground" in path:
            assert content == files.get(path.replace("_faint", ""), content)
    make_toy.draw_category(tmp_path / "again", "felt", 0)
    for path, content in files.items():
        if path.startswith("felt"):
            assert (tmp_path / "again" / path).read_bytes() == content
    make_toy.draw_category(tmp_path / "other", "felt", 1)
    assert all((tmp_path / "other" / path).read_bytes() != content
               for path, content in files.items() if path.startswith("felt"))


def test_the_options_of_the_toy_set(tmp_path, monkeypatch, capsys):
    """They arrive, or are refused in one line; by default it is data/toy, seed 0.

    What is there is never drawn over. After Ctrl-C a category is whole or absent.
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
    draw.side_effect = OSError("disk full")
    for argv in ("--seed -1", "--seed many", "--strength 1 0", "--strength nan 1",
                 "--strength 0 2", "--out full", "--out x"):
        with pytest.raises(SystemExit, match="2"):
            make_toy.main(argv.split())
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and argv.split()[0] in line
    draw.side_effect = lambda folder, name, *_: (folder / name).mkdir() or 1 / (name != "felt")
    with pytest.raises(ZeroDivisionError):
        make_toy.draw_if_absent(tmp_path / "half")
    assert os.listdir(tmp_path / "half") == ["flange"]
