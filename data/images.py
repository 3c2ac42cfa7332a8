"""A folder (laid out as data/README.md says) as tensors: categories, images, test sets, masks."""
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps

from patchae import UserError

SMALLEST = 8  # pixels of a side: less than a patch shows nothing
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def choose_categories(root, names):
    """The categories of a data set that were asked for. UserError with a list of those there."""
    if root is None or not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give one with NAME/train/good, or --demo")
    there = sorted(path.parent.parent.name for path in root.glob("*/train/good"))
    if not there:
        raise UserError(f"--data {root}: no NAME/train/good in it; of a category give the parent")
    unknown = [name for name in names if name not in (*there, "all")]
    if unknown or not names:
        raise UserError(f"--category {' '.join(unknown)}: {root} has {', '.join(there)}; or all")
    return there if "all" in names else list(dict.fromkeys(names))


def list_images(folder):
    """The image files in and below a folder, sorted, without hidden ones. UserError if none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise UserError(f"{folder}: no images there; expected {', '.join(SUFFIXES)}")
    return found


def open_upright(path):
    """Pillow's image, decoded and turned as its EXIF data say. UserError if it is not readable."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except Exception as error:  # foreign bytes: Pillow fails in a dozen ways, all mean the same
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error


def lay_on(image, colour):
    """The image as RGB; where it is transparent, the colour shows."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def read_image(path):
    """An upright RGB image of 8 bits. Transparency is laid on white (our choice: a page)."""
    image = open_upright(path)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: 16-bit or float pixels would be clipped; scale all images alike "
                        "to 8 bits and save them as PNG")
    if min(image.size) < SMALLEST:
        raise UserError(f"{path}: {image.width} × {image.height} pixels; use larger images")
    return lay_on(image, "white")


def read_images(paths, size):
    """(N, 3, size, size) uint8, each image resized whole, without a crop. UserError."""
    def read(path):
        """One image, (size, size, 3)."""
        return np.array(read_image(path).resize((size, size), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, paths)))                    # (N, size, size, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2)                   # (N, 3, size, size)


def progress(items, what):
    """Yield the items of a sequence; on a terminal, one line says how far and how long still."""
    begin = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = (time.monotonic() - begin) / done * (len(items) - done)
            end = "\n" if done == len(items) else ""
            print(f"\r{what}: {100 * done // len(items)} %, {left:.0f} s left   ", end=end,
                  file=sys.stderr, flush=True)


def batches(images, size, device, what):
    """Yield (size, 3, H, W) in [0, 1] on the device, from (N, 3, H, W) uint8."""
    for batch in progress(images.split(size), what):
        yield batch.to(device) / 255


def list_test(folder):
    """The test set as (image path, type, mask path or None); type: the parent folder's name."""
    samples = []
    for path in list_images(folder / "test"):
        if path.parent.parent != folder / "test":
            raise UserError(f"{path}: expected in {folder / 'test'}/TYPE; move it there")
        masks = (folder / "ground_truth" / path.parent.name).glob("*")
        found = [mask for mask in sorted(masks) if mask.suffix.lower() in SUFFIXES
                 and mask.stem in (path.stem, f"{path.stem}_mask")]
        samples.append((path, path.parent.name, found[0] if found else None))
    return samples


def read_mask(path, image_path, size):
    """A (size, size) bool mask, True on the defect: nearest resize, then any value but 0.

    Transparent places of a mask are no defect. UserError unless it is as large as its image.
    """
    mask = open_upright(path)
    wanted = open_upright(image_path).size
    if mask.size != wanted:
        raise UserError(f"{path}: the mask has {mask.width} × {mask.height} pixels, its image "
                        f"{wanted[0]} × {wanted[1]}; make them alike")
    values = np.asarray(mask if mask.mode[0] in "IF" else lay_on(mask, "black"))
    defect = Image.fromarray(values.reshape(*values.shape[:2], -1).any(axis=2))
    return torch.from_numpy(np.array(defect.resize((size, size), Image.Resampling.NEAREST)))
