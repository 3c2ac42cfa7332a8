"""Draw the toy data set, a machined flange and a sheet of felt, in the MVTec AD layout.

    python data/make_toy.py [--out FOLDER] [--seed N] [--strength LOW HIGH]

Each has 40 normal training images and two test sets of 20 normal and 32 defective images, with
masks. test_faint has the same images and defects as test, but the defects are blended into the
normal image, so that they are hard to see. The defects share no code with the artificial defects of
training. About 10 s.
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

ROOT = Path(__file__).parent / "toy"
SIZE = 256                           # pixels; the demo resizes to 96
SCALE = 2                            # drawn larger and shrunk, for smooth edges
TRAIN = 40                           # normal training images of each category
GOOD = 20                            # normal test images
PER_DEFECT = 8                       # defective test images of each kind
STRENGTH = (0.25, 0.5)               # opacity of the defects of test_faint
LIGHT, NOISE = 0.04, 2.0             # relative change of light; grey levels of sensor noise
STEEL, GREEN = (0.97, 1.0, 1.04), (0.78, 1.0, 0.94)  # tints of the flange and of the felt
TABLE = 34                           # grey level of the dark table under both

# The flange: radii and widths in parts of the image side, colours in grey levels.
RIM, BORE = 0.44, 0.13               # outer and inner radius
METAL, RINGS, SHEEN = 148, 5, 22     # mean grey, unevenness left by the lathe, how much it shines
EDGE, EDGES = 0.012, ((RIM, 205), (0.27, 92), (BORE + 0.03, 196))  # width; radii and greys
BOLTS, BOLT_CIRCLE, BOLT_DISCS = 6, 0.355, ((0.054, 188), (0.042, 24))  # each a bevel and a hole
SHIFT, TILT = 0.8, 0.5               # pixels, degrees: how well the fixture holds the part

# The felt: bent hairs, the later ones on top; lengths in pixels of the larger drawing.
HAIRS, HAIR_WIDTH = 9000, 2          # enough to cover nearly everything, with a look of depth
HAIR_PARTS, HAIR_PART, HAIR_BEND = 4, 16, 0.35  # straight parts, their length, radians between
FELT_MARGIN = HAIR_PARTS * HAIR_PART  # drawn around the frame: no hair from farther reaches it
HAIR_GREYS, SHADE, DEPTH = (75, 170), 0.75, 85  # SHADE dims the lowest hairs; DEPTH is below them

# The defects: lengths in pixels, angles in radians; (low, high) is a range, high not included.
MARGIN = 24                          # from the rim of the material to the middle of a defect
BORDER_EVERY = 4                     # but every fourth defect of a texture is on the image border
SHARP, SOFT = 0.6, 1.5               # blur of a rim: about what a lens does; a fading one
STROKES, STROKE_WIDTH, STROKE_TURN = (2, 4), 3, 0.12  # of a gouge: 2 or 3, nearly parallel
STROKE_SHIFT, STROKE_LENGTH, BURR = (-5, 5), (28, 46), (70, 110)  # BURR: grey levels added
DROPS, DROP, DROP_SPREAD = 4, (6, 11), 5  # of a spot: discs, their radius and distance
CHIP, HOLE, THIN, CORNERS = (8, 15), (6, 13), (10, 20), 13  # radii of ragged patches
CURL_STEPS, CURL_STEP, CURL_AIM = 18, 4, 0.8  # number, length; AIM: how far from the middle
CURL_BEND, CURL_DRIFT = 0.08, 0.05   # turn of a step, and how much it changes from step to step
FIBRE_WIDTH, THREAD_WIDTH = 3, 4
DYES = ((176, 46, 50), (46, 66, 160), (206, 190, 140))  # red, blue, ecru
OIL, OIL_OPACITY = (96, 66, 30), (0.55, 0.8)  # brown, hides what is below
GREASE, GREASE_OPACITY = (0.62, 0.54, 0.34), (0.5, 0.9)  # the part of the light it lets pass
LAMP, LAMP_OPACITY = (214, 226, 208), (0.25, 0.5)  # light from below, where felt is thin


def along(turn):
    """Unit vectors (..., 2) in the directions `turn`, in radians."""
    return np.stack([np.cos(turn), np.sin(turn)], axis=-1)


def disc(draw, centre, radius, fill=None, outline=None, width=1):
    """A circle, painted as Pillow's ellipse is; centre (x, y) and radius in pixels."""
    box = [*np.subtract(centre, radius), *np.add(centre, radius)]
    draw.ellipse(box, fill, outline, width)


# ---- normal images: (SIZE, SIZE, 3) float grey levels -------------------------------------------
def turned(side, rng):
    """A disc of metal (side, side) as the lathe leaves it: fine rings that differ a little."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius = np.hypot(x, y)
    rings = rng.normal(0, RINGS, side)[radius.astype(int)]
    metal = METAL + SHEEN * np.cos(2 * np.arctan2(y, x)) + rings
    return np.where(radius < RIM * side, metal, TABLE)


def draw_flange(rng):
    """A normal flange, moved and tilted a little, on the table."""
    side = SIZE * SCALE
    centre = np.array([side / 2, side / 2])
    part = Image.fromarray(turned(side, rng).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(part)
    for radius, grey in EDGES:
        disc(draw, centre, radius * side, outline=grey, width=round(EDGE * side))
    disc(draw, centre, BORE * side, fill=TABLE)
    for place in centre + BOLT_CIRCLE * side * along(np.arange(BOLTS) * 2 * np.pi / BOLTS):
        for radius, grey in BOLT_DISCS:
            disc(draw, place, radius * side, fill=grey)
    shift = tuple(SCALE * rng.uniform(-SHIFT, SHIFT, 2))
    seen = part.rotate(rng.uniform(-TILT, TILT), Image.BICUBIC, translate=shift, fillcolor=TABLE)
    seen = np.asarray(seen.resize((SIZE, SIZE), Image.LANCZOS), dtype=float)
    return seen[:, :, None] * STEEL


def draw_felt(rng):
    """A normal piece of felt, cut out of a larger one so that its border is like its middle."""
    side = SIZE * SCALE + 2 * FELT_MARGIN
    bends = rng.normal(0, HAIR_BEND, (HAIRS, HAIR_PARTS)).cumsum(axis=1)
    parts = HAIR_PART * along(rng.uniform(0, 2 * np.pi, (HAIRS, 1)) + bends)
    joints = rng.uniform(0, side, (HAIRS, 1, 2)) + parts.cumsum(axis=1)
    greys = rng.uniform(*HAIR_GREYS, HAIRS) * np.linspace(SHADE, 1, HAIRS)
    sheet = Image.new("L", (side, side), DEPTH)
    draw = ImageDraw.Draw(sheet)
    for line, grey in zip(joints.reshape(HAIRS, -1).tolist(), greys.astype(int).tolist()):
        draw.line(line, fill=grey, width=HAIR_WIDTH)
    seen = np.asarray(ImageOps.crop(sheet, FELT_MARGIN).reduce(SCALE), dtype=float)
    return seen[:, :, None] * GREEN


def expose(image, rng):
    """Light and sensor noise: float grey levels to the uint8 image."""
    ramp = np.linspace(-1, 1, SIZE) * rng.uniform(-LIGHT, LIGHT)
    image = image * (1 + rng.uniform(-LIGHT, LIGHT) + ramp[None, :, None])
    return (image + rng.normal(0, NOISE, image.shape)).clip(0, 255).astype(np.uint8)


# ---- defects: draw into a float image (SIZE, SIZE, 3) and fill in its empty mask -----------------
def on_metal(rng):
    """A random place (x, y) on the flange, away from bore and rim."""
    radius = rng.uniform(BORE * SIZE + MARGIN, RIM * SIZE - MARGIN)
    return SIZE / 2 + radius * along(rng.uniform(0, 2 * np.pi))


def inside(rng):
    """A random place (x, y) in the image, away from its border."""
    return rng.uniform(MARGIN, SIZE - MARGIN, 2)


def on_border(rng):
    """A random place (x, y) on one of the four sides of the image, away from its corners."""
    return rng.permutation([rng.uniform(MARGIN, SIZE - MARGIN), rng.choice([0, SIZE - 1])])


def painted(image, mask, rim, colour, opacity=1.0):
    """The image with a colour over it where the mask is; the rim is blurred by `rim` pixels."""
    alpha = np.asarray(mask.filter(ImageFilter.GaussianBlur(rim)), dtype=float) / 255
    return image + opacity * alpha[:, :, None] * (np.asarray(colour) - image)


def spot(mask, centre, rng):
    """Fill overlapping discs, one of them at the centre: a drop that ran a little."""
    for shift in [(0, 0), *rng.normal(0, DROP_SPREAD, (DROPS, 2))]:
        disc(ImageDraw.Draw(mask), centre + shift, rng.uniform(*DROP), fill=255)


def ragged(mask, centre, radii, rng):
    """Fill a jagged polygon whose corners lie in all directions of the centre."""
    turns = (np.arange(CORNERS) + rng.uniform(0, 1, CORNERS)) * 2 * np.pi / CORNERS
    points = centre + rng.uniform(*radii, (CORNERS, 1)) * along(turns)
    ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=255)


def gouge(image, mask, rng):
    """Two or three straight strokes in nearly one direction, with a bright burr."""
    start = on_metal(rng)
    turn = rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(*STROKES)):
        start = start + rng.uniform(*STROKE_SHIFT, 2)
        end = start + rng.uniform(*STROKE_LENGTH) * along(turn + rng.normal(0, STROKE_TURN))
        ImageDraw.Draw(mask).line([*start, *end], fill=255, width=STROKE_WIDTH)
    return painted(image, mask, SHARP, image + rng.uniform(*BURR))


def oil(image, mask, rng):
    """A brown drop of oil with a soft rim."""
    spot(mask, on_metal(rng), rng)
    return painted(image, mask, SOFT, OIL, rng.uniform(*OIL_OPACITY))


def chip(image, mask, rng):
    """A bite out of the outer rim, through which the table shows."""
    ragged(mask, SIZE / 2 + RIM * SIZE * along(rng.uniform(0, 2 * np.pi)), CHIP, rng)
    middle = (SIZE / 2, SIZE / 2)  # beyond the rim there was nothing but the table: no defect
    disc(ImageDraw.Draw(mask), middle, SIZE, outline=0, width=round((1 - RIM) * SIZE))
    return painted(image, mask, SHARP, TABLE)


def fibre(image, mask, rng, place=on_metal, width=FIBRE_WIDTH):
    """A coloured fibre, a long curl; sets out roughly to the middle, so that it stays in sight."""
    start = place(rng)
    turn = np.arctan2(*(SIZE / 2 - start)[::-1]) + rng.normal(0, CURL_AIM)
    bends = rng.normal(0, CURL_BEND) + rng.normal(0, CURL_DRIFT, CURL_STEPS).cumsum()
    points = start + CURL_STEP * along(turn + bends.cumsum()).cumsum(axis=0)
    ImageDraw.Draw(mask).line([*start, *points.ravel()], fill=255, width=width, joint="curve")
    return painted(image, mask, SHARP, rng.choice(DYES))


def hole(image, mask, rng, place=inside):
    """A ragged hole through which the table shows."""
    ragged(mask, place(rng), HOLE, rng)
    return painted(image, mask, SHARP, TABLE)


def thread(image, mask, rng, place=inside):
    """A loose sewing thread, thicker than a fibre."""
    return fibre(image, mask, rng, place, THREAD_WIDTH)


def grease(image, mask, rng, place=inside):
    """A dark yellowish spot that soaked in: what it covers can still be seen."""
    spot(mask, place(rng), rng)
    return painted(image, mask, SOFT, image * GREASE, rng.uniform(*GREASE_OPACITY))


def thin(image, mask, rng, place=inside):
    """A place with too little wool: light comes through from below."""
    ragged(mask, place(rng), THIN, rng)
    return painted(image, mask, SOFT, LAMP, rng.uniform(*LAMP_OPACITY))


CATEGORIES = {"flange": (draw_flange, (gouge, oil, chip, fibre)),
              "felt": (draw_felt, (hole, thread, grease, thin))}
TEXTURES = ("felt",)  # fill the frame, so that defects can lie on the image border


def draw_category(root, name, seed=0, strength=STRENGTH):
    """Write one category to root/name, the same for the same seed, whatever else is drawn.

    strength: lowest and highest opacity of the defects of test_faint, 0 to 1.
    """
    draw_normal, defects = CATEGORIES[name]
    number = list(CATEGORIES).index(name)
    rng = np.random.default_rng([seed, number])
    faint_rng = np.random.default_rng([seed, number, 1])  # so that `test` is as it would be alone

    def save(image, *place):
        """Write one image below the category's folder."""
        path = root.joinpath(name, *place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, compress_level=1)  # faster; the files grow by 4 %

    for folders, count in ((("train",), TRAIN), (("test", "test_faint"), GOOD)):
        for n in range(count):
            image = expose(draw_normal(rng), rng)
            for folder in folders:
                save(image, folder, "good", f"{n:03d}.png")
    for defect in defects:
        for n in range(PER_DEFECT):
            mask = Image.new("L", (SIZE, SIZE))
            place = [on_border] if name in TEXTURES and n % BORDER_EVERY == 0 else []
            normal = draw_normal(rng)
            drawn = defect(normal, mask, rng, *place)
            faint = normal + faint_rng.uniform(*strength) * (drawn - normal)
            kind, file = defect.__name__, f"{n:03d}.png"
            save(expose(drawn, rng), "test", kind, file)
            save(expose(faint, faint_rng), "test_faint", kind, file)
            for masks in ("ground_truth", "ground_truth_faint"):
                save(np.asarray(mask), masks, kind, f"{n:03d}_mask.png")


def draw_if_absent(root, seed=0, strength=STRENGTH):
    """Draw what is missing; under another name first, so that a category is whole or absent."""
    for name in CATEGORIES:
        if (root / name).exists():
            continue
        print(f"drawing the toy set into {root / name}")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=root) as unfinished:
            draw_category(Path(unfinished), name, seed, strength)
            if not (root / name).exists():  # else another process was faster
                Path(unfinished, name).rename(root / name)


def main(argv=None):
    """Draw both categories as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder (default: data/toy)")
    parser.add_argument("--seed", type=int, default=0,
                        help="decides every random choice (default: 0)")
    parser.add_argument("--strength", type=float, nargs=2, default=STRENGTH,
                        metavar=("LOW", "HIGH"),
                        help="opacity of the faint defects, 0 to 1 (default: 0.25 0.5)")
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help lists the options\n")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.exit(2, f"error: --seed {args.seed}: must be 0 or more\n")
    if not 0 <= args.strength[0] <= args.strength[1] <= 1:
        parser.exit(2, "error: --strength: must be two numbers from 0 to 1, the lower first\n")
    there = [name for name in CATEGORIES if (args.out / name).exists()]
    if there:
        parser.exit(2, f"error: --out {args.out}: has {' and '.join(there)} already; remove that, "
                       "or choose another folder\n")
    try:
        draw_if_absent(args.out, args.seed, args.strength)
    except OSError as fault:
        parser.exit(2, f"error: --out {args.out}: cannot be written ({fault})\n")


if __name__ == "__main__":
    main()
