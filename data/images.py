"""A folder (laid out as data/README.md says) as tensors: categories, normal images, test sets."""
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data import make_toy
from patchae import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp")
LOSSY = ("JPEG", "MPO", "WEBP")  # formats that blur the edges of a mask
SKIPPED = (".", "@", "#", "$", "~")  # how names begin that systems and programs give
SMALLEST = 8   # pixels of a side: less than a patch shows nothing
NAMED = 20     # files that a message names; more would hide its end
THREADS = 8    # our choice: a photograph takes much memory until it is resized


# ---- folders ------------------------------------------------------------------------------------
def normal_folder(category):
    """The folder CATEGORY/train/good, in upper or lower case; None if there is none."""
    return next((folder for folder in sorted(category.glob("train/*"))
                 if folder.name.lower() == "good"), None)


def choose_categories(root, names, demo=False):
    """The data set, and those of its categories that were asked for. UserError.

    demo: the toy set and its categories stand in for what is not given.
    """
    if demo:
        root, names = root or make_toy.ROOT, names or sorted(make_toy.CATEGORIES)
        make_toy.draw_if_absent(root)
    if root is None or not names:
        missing = "--data ROOT" if root is None else "--category NAME"
        raise UserError(f"{missing} is missing; give it, or --demo")
    there = sorted(folder.name for folder in root.glob("[!.]*") if normal_folder(folder))
    if not there:
        raise UserError(f"--data {root}: no NAME/train/good in it; give the folder above NAME, or "
                        "see data/README.md for other layouts")
    unknown = [name for name in names if name not in (*there, "all")]
    if unknown:
        raise UserError(f"--category {' '.join(unknown)}: not there; {root} has "
                        f"{', '.join(there)}; or all")
    return root, there if "all" in names else list(dict.fromkeys(names))


def refuse(error):
    """A folder that may not be read is an error: without its images numbers would be wrong."""
    raise error


def list_images(folder):
    """The image files in and below a folder, sorted. One line says what was skipped.

    Links to folders are followed, each folder once. Results of ours are skipped, too. UserError if
    there is no image, OSError for a folder that may not be read.
    """
    found, skipped = [], []
    seen = set(Path(os.path.realpath(folder)).parents)
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(os.path.realpath(here))
        results = "checkpoint.pt" in files or ("scores.csv" in files and "heatmaps" in folders)
        if place in seen or results:
            skipped += [Path(here)] if results else []
            folders.clear()
            continue
        seen.add(place)
        paths = [Path(here, name) for name in files]
        images = [path for path in paths if not path.name.startswith(SKIPPED)
                  and path.suffix.lower() in SUFFIXES and path.is_file()]
        found += images
        skipped += set(paths) - set(images)
        skipped += [Path(here, name) for name in folders if name.startswith(SKIPPED)]
        folders[:] = sorted(name for name in folders if not name.startswith(SKIPPED))
    if not found:
        raise UserError(f"{folder}: no images there; expected {', '.join(SUFFIXES)}")
    if skipped:
        print(f"{folder}: skipped {len(skipped)} files and folders: {name_some(skipped)}")
    return sorted(found)


def name_some(paths):
    """The first names of many files, as a text."""
    names = sorted(path.name for path in paths)
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def find_masks(*folders):
    """{(TYPE, STEM of an image): paths of its masks STEM.* and STEM_mask*.*} in these folders."""
    masks = {}
    for folder in folders:
        for path in list_images(folder) if folder.is_dir() else ():
            for stem in {path.stem, path.stem.rpartition("_mask")[0]}:
                masks.setdefault((path.parent.relative_to(folder), stem), []).append(path)
    return masks


def list_test_sets(category):
    """{name of a folder test*: its list of (image path, type, mask paths)}. UserError without any.

    The type is the name of the folder in the test set; Good and GOOD are "good", too. Masks of
    test_X are in ground_truth_X/TYPE, or in test_X/ground_truth/TYPE.
    """
    sets = {}
    for folder in sorted(path for path in category.glob("test*") if path.is_dir()):
        if not any(path.is_dir() and not path.name.startswith((*SKIPPED, "ground_truth"))
                   for path in folder.iterdir()):
            print(f"{folder}: has no folders TYPE, left out")
            continue
        masks = find_masks(category / f"ground_truth{folder.name[4:]}", folder / "ground_truth")
        sets[folder.name] = []
        for path in list_images(folder):
            place = path.relative_to(folder)
            if len(place.parts) == 1:
                raise UserError(f"{path}: expected in {folder}/TYPE; move it there")
            kind = place.parts[0]
            if kind != "ground_truth":
                kind = "good" if kind.lower() == "good" else kind
                sets[folder.name].append((path, kind, masks.get((place.parent, path.stem), [])))
    if not sets:
        raise UserError(f"{category}: no folder test/TYPE; see data/README.md for other layouts")
    return sets


# ---- images and masks ---------------------------------------------------------------------------
def open_upright(path):
    """Pillow's image, decoded and turned as its EXIF data say. UserError if it cannot be used."""
    try:
        with Image.open(path) as image:
            # an MPO is a phone's JPEG with a second, smaller picture behind the photograph
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError("it has several pages; save each as a file")
            if ";16" in str(image.tile) or image.mode[0] in "IF":
                raise ValueError("more than 8 bits would be lost; scale all images alike to 8 bits")
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # foreign bytes: Pillow fails in a dozen ways, all mean the same
        raise UserError(f"{path}: not a usable image ({error}); repair or remove it") from error
    with suppress(Exception):  # broken EXIF data fail after the pixels were turned
        ImageOps.exif_transpose(image, in_place=True)
    return image


def lay_on(image, colour):
    """The image as RGB; where it is transparent, the colour shows."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
    return image.convert("RGB")


def read_image(path):
    """An upright RGB image of 8 bits, transparency laid on white (our choice: a page). UserError"""
    image = open_upright(path)
    if min(image.size) < SMALLEST:
        raise UserError(f"{path}: {image.width} × {image.height} pixels; use larger images")
    return lay_on(image, "white")


def to_tensor(image, size):
    """Pillow's RGB image as (3, size, size) uint8, resized whole, without a crop."""
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)             # (3, size, size)


def read_each(paths, size, progress=iter):
    """Read files in a few threads: of each (tensor (3, size, size), its size), or the UserError."""
    def read(path):
        """One file."""
        try:
            image = read_image(path)
            return to_tensor(image, size), image.size
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        return [one for _, one in zip(progress(paths), pool.map(read, paths))]


def join_errors(errors):
    """One UserError for many, which names the first NAMED files."""
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return UserError("; ".join(str(error) for error in errors[:NAMED]) + more)


def read_images(paths, size, progress=iter):
    """Images (N, 3, size, size) uint8, each resized whole. UserError that names all bad files."""
    found = read_each(paths, size, progress)
    errors = [one for one in found if isinstance(one, UserError)]
    if errors:
        raise join_errors(errors)
    return torch.stack([image for image, _ in found])                     # (N, 3, size, size)


def fingerprints(images):
    """A number for each image of (N, 3, H, W) uint8; images with equal pixels have the same."""
    return [hash(image.numpy().tobytes()) for image in images]


def read_normal_images(category, size, progress=iter):
    """The images of CATEGORY/train/good: their paths, and (N, 3, size, size) uint8.

    Exact copies are left out and named: each would make the other's score 0. UserError that names
    all bad files, or if there are no two different images.
    """
    paths = list_images(normal_folder(category))
    images = read_images(paths, size, progress)
    first = {}  # the number of the first image with these pixels
    kept = [i for i, pixels in enumerate(fingerprints(images)) if first.setdefault(pixels, i) == i]
    copies = [path for i, path in enumerate(paths) if i not in kept]
    if copies:
        print(f"{category.name}: left out {len(copies)} exact copies: {name_some(copies)}")
    if len(kept) < 2:
        raise UserError(f"{paths[0].parent}: needs at least two different images")
    return [paths[i] for i in kept], images[kept]


def read_mask(masks, image_size, size):
    """A (size, size) bool mask, True on the defect. Several masks are joined; without one: False.

    Any value but 0 is a defect; transparent places are none. A pixel of the small mask is a defect
    if any pixel in it is. image_size: (width, height) of the upright image. UserError unless the
    masks are as large and lossless.
    """
    joined = torch.zeros(size, size, dtype=torch.bool)
    for path in masks:
        mask = open_upright(path)
        if mask.format in LOSSY:
            raise UserError(f"{path}: {mask.format} blurs the edges of a mask; save masks as PNG")
        if mask.size != image_size:
            raise UserError(f"{path}: the mask has {mask.width} × {mask.height} pixels, its "
                            f"upright image {image_size[0]} × {image_size[1]}; make them alike")
        defect = np.asarray(lay_on(mask, "black")).any(axis=2).astype(np.float32)
        share = Image.fromarray(defect).resize((size, size), Image.Resampling.BOX)
        joined |= torch.from_numpy(np.array(share)) > 0
    return joined
