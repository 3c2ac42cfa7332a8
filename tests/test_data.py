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
import itertools
import os
import re
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import NOISE, ROOT, contents, pixels, save, watch
from PIL import Image, JpegImagePlugin

import evaluate
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
    many = [Path(f"{n:02}.png") for n in range(21)]
    assert images.name_some(many).endswith("18.png, 19.png, ...")
    with pytest.raises(UserError, match="no images there; expected .png"):
        images.list_images(root / "runs")


def test_links_to_folders_are_followed_and_each_image_comes_once(tmp_path, monkeypatch):
    """A link to a folder elsewhere, to one that is there anyway, to its parents. A link that leads
    to itself is no file. A folder that may not be read is an error: without it numbers are wrong.
    """
    root = tmp_path / "set/photos"
    for place in (root / "a/1.png", tmp_path / "far/deep/2.png", root.parent / "beside.png"):
        save(NOISE, place)
    for link, target in ((root / "z", tmp_path / "far"), (root / "b", root / "a"),
                         (root / "a/up", root), (root / "a/over", root.parent),
                         (tmp_path / "far/up", tmp_path), (root / "loop.png", "loop.png")):
        link.symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    for folder in (root, tmp_path / "link"):
        assert [path.name for path in images.list_images(folder)] == ["1.png", "2.png"]
    closed = PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=[os.scandir(root), closed]))
    with pytest.raises(PermissionError):
        images.list_images(root)


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


@pytest.mark.filterwarnings("ignore")  # Pillow's, of broken EXIF data
def test_a_cameras_orientation_is_undone(tmp_path):
    """In every format that has it; a mask may have it, too. Other EXIF data may be broken: here a
    second entry, x_resolution as a negative rational, which Pillow cannot write as TIFF."""
    seen = 255 * np.random.default_rng(0).integers(0, 2, (32, 64, 1)).repeat(3, axis=2)
    stored = np.rot90(seen).copy()
    small = np.array(Image.fromarray(seen[..., 0] > 0).resize((64, 64), Image.NEAREST))
    entry = struct.pack(">HHIHxx", 0x0112, 3, 1, 6)  # orientation 6: turned by a quarter
    sound = b"MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)
    broken = (b"MM\0*\0\0\0\x08\0\x02" + entry + struct.pack(">HHII", 0x011A, 10, 1, 38) + bytes(4)
              + struct.pack(">ii", -72, 1))
    for form, exif in (*itertools.product(("png", "jpg", "webp"), (sound, broken)), ("tif", sound)):
        path = tmp_path / f"turned.{form}"
        save(stored, path, quality=100, subsampling=0, lossless=True,
             exif=b"Exif\0\0" * (form != "png") + exif)
        assert abs(np.array(images.read_image(path), dtype=float) - seen).max() <= 2
        if form in ("png", "tif"):
            assert np.array_equal(images.read_mask([path], (64, 32), 64), small)


def deep_png():
    """A PNG of 16 × 16 pixels, RGB of 16 bits each, by hand: Pillow cannot write it."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
                       (b"IDAT", zlib.compress(bytes(16 * (1 + 16 * 6)))), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


@pytest.mark.parametrize("mode", ["RGB", "I;16", "I", "F"])
def test_more_than_8_bits_are_refused(tmp_path, mode):
    """Read as 8 bits they would lose detail; Pillow shortens RGB without a word."""
    path = tmp_path / "deep.tif"  # Pillow looks at the content, not at the suffix
    path.write_bytes(deep_png()) if mode == "RGB" else Image.new(mode, (16, 16)).save(path)
    assert Image.open(path).size == (16, 16)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*scale .* to 8 bits"):
        images.read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of many pixels
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_usable_image(tmp_path, monkeypatch, form):
    """Foreign EXIF data are no fault. But more pixels than Pillow allows, half a picture, and
    several pages, since the defect may be on the last one."""
    path, image = tmp_path / f"image.{form}", NOISE.convert("RGB")
    image.save(path, **({} if form in ("tif", "bmp") else {"exif": b"junk"}))
    assert images.read_image(path).size == (64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
        with pytest.raises(UserError, match=f"image.{form}: not a usable .*4096 pixels.* exceeds"):
            images.read_image(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    with pytest.raises(UserError, match=f"image.{form}: not a usable image .*repair or remove"):
        images.read_image(path)
    if form in ("png", "tif", "webp"):
        image.save(path, save_all=True, append_images=[image.rotate(90)])
        with pytest.raises(UserError, match=f"image.{form}.*several pages"):
            images.read_image(path)


def test_the_preview_in_a_phones_photograph_is_no_second_page(tmp_path, monkeypatch):
    """An MPO, as Pillow reads it."""
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "n_frames", 2, raising=False)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "format", "MPO")
    save(NOISE, tmp_path / "a.jpg")
    assert images.read_image(tmp_path / "a.jpg").size == (64, 64)


def test_all_bad_files_are_named(tmp_path, monkeypatch):
    """At once, or the first of many. The others come in their order, however many threads read."""
    for n in range(12):
        Image.new("RGB", (8, 8 * 4**(n < 3)), (n, n, n)).save(tmp_path / f"{n:02}.png")
    paths, pools = images.list_images(tmp_path), watch(monkeypatch, images, "ThreadPoolExecutor")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert images.read_images(paths, 8)[:, 0, 0, 0].tolist() == list(range(12))
    assert [arguments for arguments, _ in pools] == [(8,)]  # of 64 threads
    for path in paths[:3]:
        path.write_bytes(b"text")
    with pytest.raises(UserError, match="00.png.*01.png.*02.png: not a usable image [^;]*; repair"):
        images.read_images(paths, 8)
    monkeypatch.setattr(images, "NAMED", 1)
    with pytest.raises(UserError, match="00.png.*; and 2 more"):
        images.read_images(paths, 8)
    monkeypatch.setattr(Image, "open", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):  # such a file is not to be repaired
        images.read_images(paths, 8)


def test_exact_copies_are_left_out_and_named(tmp_path, capsys):
    """A photograph as JPEG and as PNG, large, too; a copy in a folder below. The first one stays.

    Neither mirrored ones are copies, nor those that differ in one pixel.
    """
    good = tmp_path / "part/train/good"
    save(np.random.default_rng(0).integers(0, 255, (300, 400, 3)), good / "a.jpg", quality=90)
    photograph = pixels(good / "a.jpg")
    for name in ("a.png", "deep/a.png"):
        save(photograph, good / name)
    with pytest.raises(UserError, match="good: needs at least two different images"):
        images.read_normal_images(tmp_path / "part", 64)
    save(photograph[:, ::-1], good / "mirrored.png")
    photograph[:9, :9] = 0
    save(photograph, good / "other.png")
    capsys.readouterr()
    paths, read = images.read_normal_images(tmp_path / "part", 64)
    assert [path.name for path in paths] == ["a.jpg", "mirrored.png", "other.png"]
    assert torch.equal(read, images.read_images(paths, 64))
    assert capsys.readouterr().out == "part: left out 2 exact copies: a.png, a.png\n"


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


@pytest.mark.parametrize("side, size", [(512, 192), (512, 64), (256, 96), (150, 192), (64, 64)])
def test_no_defect_vanishes_from_a_smaller_mask(tmp_path, side, size):
    """A small pixel is a defect if any pixel in it is. So a spot of one pixel stays wherever it is,
    in one small pixel if the mask shrinks, and a line of one pixel stays one region."""
    path, rng = tmp_path / "mask.png", np.random.default_rng(0)
    for _ in range(6):
        y, x = rng.integers(side, size=2)
        spot = np.zeros((side, side))
        spot[y, x] = 255
        save(spot, path)
        found = np.argwhere(images.read_mask([path], (side, side), size).numpy())
        assert len(found) >= 1 and (len(found) == 1 or size > side)
        assert abs((found + 0.5) / size - (np.array([y, x]) + 0.5) / side).max() < 1 / size
    line = np.zeros((side, side))
    line[np.arange(side), (np.arange(side) * 0.4).astype(int)] = 255
    save(line, path)
    small = images.read_mask([path], (side, side), size)
    weights = evaluate.region_weights(small)[small]
    assert weights.sum() == pytest.approx(1) and small.any(1).all()  # one region, over all rows


# ---- the toy set --------------------------------------------------------------------------------
KINDS = {"flange": ("gouge", "oil", "chip", "fibre"), "felt": ("hole", "thread", "grease", "thin")}
DRAWN = {  # of a normal image the mean of red, green and blue, and how much neighbours differ;
    "flange": (88.8, 91.6, 95.3, 6.69), "felt": (80.1, 102.8, 96.7, 14.84),
    # of a defect the pixels of the mask; there the mean of each colour, clear and faint
    "gouge": (270, 237.7, 241.4, 244.6, 172.9, 177.0, 182.6),
    "oil": (638, 111.0, 93.1, 71.6, 139.2, 137.4, 135.6),
    "chip": (227, 36.6, 36.8, 36.9, 93.2, 95.6, 98.6),
    "fibre": (234, 164.3, 56.4, 60.2, 151.7, 105.4, 110.5),
    "hole": (351, 35.4, 36.4, 36.2, 66.0, 80.2, 76.5),
    "thread": (281, 187.0, 175.4, 131.4, 123.8, 132.3, 110.4),
    "grease": (484, 61.1, 71.7, 52.1, 79.7, 99.2, 86.2),
    "thin": (715, 140.2, 158.7, 147.4, 102.5, 123.9, 115.7)}


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
    wanted = [f"{name}/{place}/good/000.png" for name in KINDS
              for place in ("train", "test", "test_faint")]
    for name, kinds in KINDS.items():
        image = pixels(tmp_path / name / "test/good/000.png")
        assert image.shape == (256, 256, 3)
        found = {name: (*image.mean(axis=(0, 1)), abs(np.diff(image, axis=1)).mean())}
        for kind, n, faint in itertools.product(kinds, "01", ("", "_faint")):
            wanted += [f"{name}/test{faint}/{kind}/00{n}.png",
                       f"{name}/ground_truth{faint}/{kind}/00{n}_mask.png"]
            mask = pixels(tmp_path / wanted[-1])[..., 0]
            assert set(np.unique(mask)) == {0, 255}
            edges = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert name == "flange" or n == "1" or edges.any()
            seen = pixels(tmp_path / wanted[-2])[mask > 0].mean(axis=0)
            found[kind] = (*found[kind], *seen) if faint else ((mask > 0).sum(), *seen)
        for kind, values in found.items():
            np.testing.assert_allclose(values, DRAWN[kind], rtol=0.01, err_msg=kind)
    assert sorted(files) == sorted(wanted)
    for path, content in files.items():
        if "good" in path or "ground" in path:
            assert content == files.get(path.replace("_faint", ""), content)
    for name, seed in (("felt", 0), ("flange", 1)):
        make_toy.draw_category(tmp_path / "again", name, seed)
        assert all(((tmp_path / "again" / path).read_bytes() == content) == (seed == 0)
                   for path, content in files.items() if path.startswith(name))


def test_the_options_of_the_toy_set(tmp_path, monkeypatch, capsys):
    """They arrive, or are refused in one line; by default it is data/toy, seed 0.

    What is there is never drawn over. After Ctrl-C a category is whole or absent.
    """
    draw = Mock(side_effect=lambda folder, name, *_: (folder / name).mkdir())
    monkeypatch.setattr(make_toy, "draw_category", draw)
    assert make_toy.ROOT == ROOT / "data/toy"
    monkeypatch.setattr(make_toy, "ROOT", tmp_path / "toy")
    make_toy.main([])
    make_toy.main(["--out", str(tmp_path / "x"), "--seed", "3", "--strength", "0", "1"])
    assert [call.args[1:] for call in draw.call_args_list] == [
        ("flange", 0, (0.25, 0.5)), ("felt", 0, (0.25, 0.5)), ("flange", 3, [0, 1]),
        ("felt", 3, [0, 1])]
    draw.side_effect = OSError("disk full")
    for argv in (["--seed", "-1"], ["--seed", "many"], ["--strength", "1", "0"],
                 ["--strength", "nan", "1"], ["--strength", "0", "2"],
                 ["--out", str(tmp_path / "full")], ["--out", str(tmp_path / "x")]):
        with pytest.raises(SystemExit, match="2"):
            make_toy.main(argv)
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and argv[0] in line
    draw.side_effect = lambda folder, name, *_: (folder / name).mkdir() or 1 / (name != "felt")
    with pytest.raises(ZeroDivisionError):
        make_toy.draw_if_absent(tmp_path / "half")
    assert os.listdir(tmp_path / "half") == ["flange"]
