"""A folder (laid out as data/README.md says) as tensors: categories, images, test sets, masks."""
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchae import UserError

SMALLEST = 8   # pixels of a side: less than a patch shows nothing
NAMED = 20     # bad files that an error names; more would hide its end
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp")
DRAFT = 3      # sides of the resized image: then pixels differ by one grey level, rarely two
SYSTEM_FOLDERS = ("system volume information", "$recycle.bin", "lost+found")  # closed to users
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")  # formats that blur the edges of a mask
MASK_NAMES = "STEM.png, STEM_mask.png or STEM_mask_*.png"  # for the image STEM.*, any suffix
ORIENTATION = 0x0112  # the EXIF entry; its values 2 to 8 say how the picture is to be turned
BITS_PER_SAMPLE = 258  # the TIFF entry
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))


# ---- folders ------------------------------------------------------------------------------------
def choose_categories(root, names):
    """The categories of a data set that were asked for. UserError with a list of those there."""
    if root is None or not names:
        missing = "--data ROOT" if root is None else "--category NAME"
        raise UserError(f"{missing} is missing; give it, or --demo")
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one with NAME/train/good")
    there = sorted(path.parent.parent.name for path in root.glob("[!.]*/train/good"))
    if not there:
        raise UserError(f"--data {root}: no NAME/train/good in it; of a category give the parent")
    unknown = [name for name in names if name not in (*there, "all")]
    if unknown:
        raise UserError(f"--category {' '.join(unknown)}: {root} has {', '.join(there)}; or all")
    return there if "all" in names else list(dict.fromkeys(names))


def real(path):
    """A path without links. (Path.resolve fails at a link that leads to itself.)"""
    return Path(os.path.realpath(path))


def refuse(error):
    """A folder that may not be read is an error: without its images numbers would be wrong."""
    raise error


def walk(folder, closed=refuse):
    """Yield the files in and below a folder, without hidden ones and those of the system.

    closed is called with the OSError of a folder that may not be read.

    Links to folders are followed; a folder that was seen, or lies above, is not entered again.
    """
    seen = set(real(folder).parents)
    for here, folders, files in os.walk(folder, onerror=closed, followlinks=True):
        place = real(here)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders
                            if name[0] != "." and name.lower() not in SYSTEM_FOLDERS)
        yield from (Path(here, name) for name in files if not name.startswith("."))


def list_images(folder, without=None, closed=refuse):
    """The image files in and below a folder, sorted; what is below `without` is left out.

    closed: see walk. Prints how many files of other types were skipped. UserError if there is no
    image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(walk(folder, closed))
    if without:
        without, place = real(without), real(folder)
        if without not in (place, *place.parents):
            files = [path for path in files if without not in real(path).parents]
    skipped = Counter(path.suffix.lower() or "without suffix" for path in files
                      if path.suffix.lower() not in SUFFIXES)
    if skipped:
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        print(f"{folder}: skipped {found}")
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(f"{folder}: no images there; expected {', '.join(SUFFIXES)}")
    return found


def list_masks(folder):
    """The image files in a folder, sorted; none if it is absent, since masks are optional."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except FileNotFoundError:
        return []


def list_test(folder, test="test"):
    """The test set folder/test as (image path, type, list of mask paths).

    The type is the parent folder's name; Good and GOOD are "good", too. Masks lie in
    ground_truth/TYPE (of a test set test_X in ground_truth_X/TYPE) and are called MASK_NAMES.
    """
    samples, masks = [], {}
    truth = "ground_truth" + (test[4:] if test.startswith("test") else f"_{test}")
    for path in list_images(folder / test):
        if path.parent.parent != folder / test:
            raise UserError(f"{path}: expected in {folder / test}/TYPE; move it there")
        kind = path.parent.name
        if kind not in masks:  # each folder is listed once
            masks[kind] = list_masks(folder / truth / kind)
        wanted = re.compile(re.escape(path.stem) + r"(_mask(_.*)?)?")
        found = [mask for mask in masks[kind] if wanted.fullmatch(mask.stem)]
        samples.append((path, "good" if kind.lower() == "good" else kind, found))
    return samples


# ---- images and masks ---------------------------------------------------------------------------
def open_upright(path, at_least=None):
    """Pillow's image, decoded and turned as its EXIF data say. UserError if it is not readable.

    at_least: pixels; a JPEG with much larger sides is decoded at a half, a quarter or an eighth of
    its size, which is faster and takes less memory.
    """
    try:
        with Image.open(path) as file:
            if at_least and not file.width % 8 and not file.height % 8:  # else a pixel is cut
                file.draft(None, (at_least, at_least))  # does nothing to other formats
            bits = getattr(file, "tag_v2", {}).get(BITS_PER_SAMPLE, [8])  # of a TIFF
            deep = re.search(r";16[BLN]", str(file.tile)) or max(bits) > 8
            deep = deep and file.mode[0] not in "IF"
            file.load()
            try:
                turn = TURNS.get(file.getexif().get(ORIENTATION))
            except Exception:  # broken EXIF data fail in many ways; the picture itself is whole
                turn = None
            image = file if turn is None else file.transpose(turn)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large, more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} "
                        "megapixels; make it smaller first") from error
    except Exception as error:  # foreign bytes: Pillow fails in a dozen ways, all mean the same
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error
    if deep:
        raise UserError(f"{path}: 16-bit colours would lose detail; scale all images alike to 8 "
                        "bits and save them as PNG")
    return image


def lay_on(image, colour):
    """The image as RGB; where it is transparent, the colour shows."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def read_image(path, at_least=None):
    """An upright RGB image of 8 bits; at_least: see open_upright. UserError.

    Transparency is laid on white (our choice: a page).
    """
    image = open_upright(path, at_least)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: 16-bit or float pixels would be clipped; scale all images alike "
                        "to 8 bits and save them as PNG")
    if min(image.size) < SMALLEST:
        raise UserError(f"{path}: {image.width} × {image.height} pixels; use larger images")
    return lay_on(image, "white")


def read_readable(paths, size, progress=iter):
    """Read what can be read: (paths of N images, (N, 3, size, size) uint8, texts of the errors).

    Each image is resized whole, without a crop. At most as many are decoded at once as there are
    cores, since a photograph takes much more memory than what is kept of it.
    """
    def read(path):
        """One image (3, size, size), or the text of the error."""
        try:
            image = read_image(path, DRAFT * size).resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)     # (3, size, size)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [one for _, one in zip(progress(paths), pool.map(read, paths))]
    readable = [path for path, one in zip(paths, found) if torch.is_tensor(one)]
    images = [one for one in found if torch.is_tensor(one)]
    images = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return readable, images, [one for one in found if not torch.is_tensor(one)]


def all_errors(errors):
    """A UserError that names the bad files, the first NAMED of them."""
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return UserError("; ".join(errors[:NAMED]) + more)


def read_images(paths, size, progress=iter):
    """Images (N, 3, size, size) uint8, each resized whole. UserError that names all bad files."""
    _, images, errors = read_readable(paths, size, progress)
    if errors:
        raise all_errors(errors)
    return images


def read_mask(masks, image_path, size):
    """A (size, size) bool mask, True on the defect: nearest resize. Several masks are joined.

    Any value but 0 is a defect; in lossy formats any above half, since they blur edges. Transparent
    places are no defect. Without a mask all is False. UserError unless it is as large as its image.
    """
    joined = torch.zeros(size, size, dtype=torch.bool)
    wanted = open_upright(image_path).size if masks else None
    for path in masks:
        mask = open_upright(path)
        if mask.size != wanted:
            raise UserError(f"{path}: the mask has {mask.width} × {mask.height} pixels, its image "
                            f"{wanted[0]} × {wanted[1]}; make them alike")
        values = np.asarray(mask if mask.mode[0] in "IF" else lay_on(mask, "black"))
        least = 127 if path.suffix.lower() in LOSSY else 0
        defect = (values.reshape(*values.shape[:2], -1) > least).any(axis=2)  # (height, width)
        defect = Image.fromarray(defect).resize((size, size), Image.Resampling.NEAREST)
        joined |= torch.from_numpy(np.array(defect))
    return joined


def progress(what, items):
    """Yield the items of a sequence; on a terminal, one line says how far and how long still."""
    begin = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = (time.monotonic() - begin) / done * (len(items) - done)
            end = "\n" if done == len(items) else ""
            print(f"\r{what}: {100 * done // len(items)} %, {left:.0f} s left   ", end=end,
                  file=sys.stderr, flush=True)
