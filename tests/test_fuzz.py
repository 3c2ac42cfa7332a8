"""Damaged images, masks and checkpoints, drawn by a fixed seed: no traceback, one line at most.

PATCHAE_FUZZ_ROUNDS sets how many are tried (default 24).
"""
import io
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import evaluate
import train

ROUNDS = int(os.environ.get("PATCHAE_FUZZ_ROUNDS", "24"))
SIDE = 64
FORMATS = (("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("JPEG", "RGB"),
           ("JPEG", "CMYK"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"), ("WEBP", "RGBA"))
SUFFIXES = (".png", ".jpg", ".bmp", ".tif", ".webp")
STRANGERS = (b"", b"\0" * 500, b"plain text\n" * 50, b"<html></html>", b"%PDF-1.4\n%%EOF\n",
             b"GIF89a" + b"\xff" * 60, b"P6 9999 9999 255\n", b"II*\0\x08\0\0\0\xff\xff",
             b"BM" + b"\xff" * 60, b"RIFF\x24\0\0\0WEBPVP8 ", b"PK\x05\x06" + b"\0" * 18,
             b"\x80\x02}q\0.", b"\xff\xd8\xff\xe0\0\x10JFIF\0")
VALUES = (None, 0, -1, 3, 10**30, 0.5, float("nan"), "", "text", b"bytes", [], {}, (), [1, 2], True,
          {"a": 1}, torch.zeros(0), torch.zeros(3, 3), torch.tensor(5))


def pick(items, rng):
    """One of the items."""
    return items[rng.integers(len(items))]


def image_bytes(rng):
    """A small image file of a random format, sometimes with EXIF data or compressed."""
    form, mode = pick(FORMATS, rng)
    pixels = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
    image, file, more = pixels.convert("L" if mode == "I;16" else mode), io.BytesIO(), {}
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
    if form in ("PNG", "JPEG", "WEBP") and rng.random() < 0.5:
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = int(rng.integers(1, 9))
    if form == "TIFF":
        more["compression"] = pick((None, "tiff_lzw", "tiff_deflate", "packbits"), rng)
    image.save(file, format=form, **more)
    return file.getvalue()


def damaged(content, rng):
    """Bytes cut, flipped, with zeros inserted, or replaced by another kind of file."""
    content, way = bytearray(content), rng.integers(5)
    place = int(rng.integers(len(content)))
    if way == 0:
        return content[:place]
    if way == 1:
        for i in rng.integers(len(content), size=rng.integers(1, 20)):
            content[i] ^= int(rng.integers(1, 256))
    elif way == 2:  # headers are small: without this they would rarely be hit
        for i in rng.integers(min(200, len(content)), size=rng.integers(1, 5)):
            content[i] ^= int(rng.integers(1, 256))
    elif way == 3:
        content[place:place] = bytes(int(rng.integers(1, 50)))
    else:
        return pick(STRANGERS, rng)
    return content


def change_inside(content, rng):
    """Delete or replace a random value of nested dicts and lists; big ones are not spared."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = pick(list(keys), rng)
        if isinstance(content[key], (dict, list)) and content[key] and rng.random() < 0.8:
            content = content[key]
            continue
        way = rng.integers(3)
        if way == 0:
            del content[key]
        elif way == 1 and isinstance(content[key], torch.Tensor) and content[key].numel():
            content[key] = content[key] * pick((float("nan"), float("inf"), 1e30, 0), rng)
        else:
            content[key] = pick(VALUES, rng)
        return


def damage_image(path, rng):
    """Put a damaged image in the place of a file, under a random suffix."""
    path.unlink(missing_ok=True)
    path.with_suffix(pick(SUFFIXES, rng)).write_bytes(damaged(image_bytes(rng), rng))


def damage_mask(path, rng):
    """Like damage_image, or only the bytes of the mask that is there."""
    if rng.random() < 0.5:
        damage_image(path, rng)
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))


def damage_checkpoint(path, rng):
    """Change its bytes, or what it says while its checksums stay right."""
    if rng.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        content = torch.load(path, weights_only=True)
        change_inside(content, rng)
        torch.save(content, path)


@pytest.fixture(scope="session")
def fuzzed(trained, tmp_path_factory):
    """The trained workspace with an unfinished training beside the finished one, to resume."""
    workspace = shutil.copytree(trained, tmp_path_factory.mktemp("fuzz") / "workspace")
    options = ["--data", str(workspace / "data"), "--out", str(workspace / "stopped"), *TINY]
    finish = train.write_preview

    def interrupted(*args):
        raise KeyboardInterrupt
    train.write_preview = interrupted
    try:
        assert train.main([*options, "--category", "part"]) == 130
    finally:
        train.write_preview = finish
    assert (workspace / "stopped" / "part" / "unfinished.pt").is_file()
    shutil.copytree(workspace / "data" / "part" / "test", workspace / "new")
    return workspace


NORMAL, TEST = "data/part/train/good/000.png", "data/part/test/hole/001.png"
MASK, UNFINISHED = "data/part/ground_truth/hole/001_mask.png", "stopped/part/unfinished.pt"
CHECKPOINT, NEW = "runs/part/checkpoint.pt", "new/good/000.png"
RESUME = ["--out", "stopped", "--resume"]
CASES = (  # what is damaged, how, main, its further options
    (NORMAL, damage_image, train.main, [*TINY, "--epochs", "0"]),
    (TEST, damage_image, evaluate.main, []),
    (MASK, damage_mask, evaluate.main, ["--no-threshold"]),
    (CHECKPOINT, damage_checkpoint, evaluate.main, []),
    (NEW, damage_image, evaluate.main, ["--no-threshold", "--predict", "new"]),
    (CHECKPOINT, damage_checkpoint, evaluate.main, ["--predict", "new"]),
    (NORMAL, damage_image, evaluate.main, ["--score", "backbone"]),
    (UNFINISHED, damage_checkpoint, train.main, [*TINY, *RESUME]))


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("number", range(ROUNDS))
def test_damaged_files_end_in_one_line(fuzzed, tmp_path, monkeypatch, capsys, number):
    """0 and no error, or 2 and one line on stderr that starts with `error: `; never a traceback."""
    rng = np.random.default_rng([20230801, number])
    place, damage, main, options = CASES[number % len(CASES)]
    workspace = shutil.copytree(fuzzed, tmp_path / "workspace")
    monkeypatch.chdir(workspace)
    damage(workspace / place, rng)
    capsys.readouterr()
    code = main(["--data", "data", "--out", "runs", "--category", "part", "--device", "cpu",
                 *options])
    lines = capsys.readouterr().err.splitlines()
    assert code in (0, 2)
    assert len(lines) == (1 if code == 2 else 0), lines
    assert all(line.startswith("error: ") for line in lines)
