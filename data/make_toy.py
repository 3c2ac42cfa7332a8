"""Draw the toy data set: a machined flange under a fixed camera, in the MVTec AD layout.

    python data/make_toy.py [--out FOLDER] [--seed N]

40 normal training images, 20 normal and 32 defective test images (scratch, stain, chip, fibre) with
masks. Every image has its own small shift, turn, light and sensor noise. The defects are drawn by
code that shares nothing with the artificial defects of training. About 10 s.
"""
import argparse
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

ROOT = Path(__file__).parent / "toy"
CATEGORY = "flange"
SIZE = 256                           # pixels: the network's input, so that nothing is lost
SCALE = 3                            # drawn larger and shrunk, for smooth edges
TRAIN, GOOD, PER_DEFECT = 40, 20, 8  # images
RIM, GROOVE, BORE = 0.44, 0.27, 0.13       # radii of the part, in parts of the image side
BOLT_CIRCLE, BOLT, BOLTS = 0.355, 0.042, 6
BACKGROUND = 34                      # grey level
SHIFT, TURN = 0.8, 0.5               # pixels, degrees: how well the fixture holds the part
STROKE = 3                           # pixels: width of scratches and fibres
LIGHT, NOISE = 0.04, 2.0             # relative change of light; grey levels of sensor noise


def disc(draw, centre, radius, fill):
    """A filled circle; centre (x, y) and radius in pixels."""
    x, y = centre
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)


def brushed(side, rng):
    """Grey levels (side, side) of metal turned on a lathe: fine rings that differ a little."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    rings = rng.normal(0, 1, side)[radius.astype(int) % side]
    return 148 + 22 * np.cos(2 * (angle - 0.6)) + 5 * rings


def draw_part(rng):
    """A normal flange (SIZE, SIZE, 3), float grey levels, before light and noise."""
    side = SIZE * SCALE
    metal = Image.fromarray(brushed(side, rng).clip(0, 255).astype(np.uint8))
    part = Image.new("L", (side, side), BACKGROUND)
    centre, shape = (side / 2, side / 2), Image.new("L", (side, side))
    draw = ImageDraw.Draw(shape)
    disc(draw, centre, RIM * side, 255)
    part.paste(metal, mask=shape)
    draw = ImageDraw.Draw(part)
    for radius, grey in ((RIM, 205), (GROOVE, 92), (BORE + 0.03, 196)):
        x, r = side / 2, radius * side
        draw.ellipse([x - r, x - r, x + r, x + r], outline=grey, width=round(side * 0.012))
    disc(draw, centre, BORE * side, 20)
    for k in range(BOLTS):
        turn = 2 * math.pi * k / BOLTS
        place = tuple(side / 2 + BOLT_CIRCLE * side * f(turn) for f in (math.cos, math.sin))
        disc(draw, place, (BOLT + 0.012) * side, 188)
        disc(draw, place, BOLT * side, 24)
    return part


def photograph(part, rng):
    """What the camera sees: the part, moved and turned a little, as (SIZE, SIZE, 3) floats."""
    shift = tuple(SCALE * rng.uniform(-SHIFT, SHIFT, 2))
    seen = part.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, translate=shift,
                       fillcolor=BACKGROUND)
    seen = np.asarray(seen.resize((SIZE, SIZE), Image.Resampling.LANCZOS), dtype=float)
    return seen[:, :, None] * np.array([0.97, 1.0, 1.04])  # steel is slightly blue


def expose(image, rng):
    """Light and sensor noise: float grey levels to the uint8 image."""
    ramp = np.linspace(-1, 1, SIZE) * rng.uniform(-LIGHT, LIGHT)
    image = image * (1 + rng.uniform(-LIGHT, LIGHT) + ramp[None, :, None])
    return (image + rng.normal(0, NOISE, image.shape)).clip(0, 255).astype(np.uint8)


def on_metal(rng, margin):
    """A random place (x, y) on the flange, `margin` pixels away from bore and rim."""
    radius = rng.uniform(BORE * SIZE + margin, RIM * SIZE - margin)
    turn = rng.uniform(0, 2 * math.pi)
    return np.array([SIZE / 2 + radius * math.cos(turn), SIZE / 2 + radius * math.sin(turn)])


def blurred(mask, radius):
    """Opacity (SIZE, SIZE, 1) in [0, 1] of a drawn mask."""
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), dtype=float)[:, :, None] / 255


def scratch(image, mask, rng):
    """Two or three straight strokes in nearly one direction, with a bright burr."""
    draw, start = ImageDraw.Draw(mask), on_metal(rng, 24)
    turn = rng.uniform(0, 2 * math.pi)
    for _ in range(rng.integers(2, 4)):
        start = start + rng.uniform(-5, 5, 2)
        angle, length = turn + rng.normal(0, 0.12), rng.uniform(28, 46)
        end = start + length * np.array([math.cos(angle), math.sin(angle)])
        draw.line([*start, *end], fill=255, width=STROKE)
    return image + blurred(mask, 0.6) * rng.uniform(70, 110)


def stain(image, mask, rng):
    """A brown drop of oil: overlapping discs with a soft rim."""
    draw, centre = ImageDraw.Draw(mask), on_metal(rng, 24)
    for _ in range(5):
        disc(draw, centre + rng.normal(0, 5, 2), rng.uniform(6, 11), 255)
    alpha = blurred(mask, 1.5) * rng.uniform(0.55, 0.8)
    return image * (1 - alpha) + alpha * np.array([96, 66, 30])


def chip(image, mask, rng):
    """A bite out of the outer rim: a jagged polygon through which the background shows."""
    turn = rng.uniform(0, 2 * math.pi)
    centre = SIZE / 2 + RIM * SIZE * np.array([math.cos(turn), math.sin(turn)])
    angles = np.sort(rng.uniform(0, 2 * math.pi, 9))
    corners = [centre + rng.uniform(8, 15) * np.array([math.cos(a), math.sin(a)]) for a in angles]
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], fill=255)
    part = Image.new("L", mask.size)
    disc(ImageDraw.Draw(part), (SIZE / 2, SIZE / 2), RIM * SIZE, 255)
    mask.paste(ImageChops.multiply(mask, part))  # no defect where there was only background
    alpha = blurred(mask, 0.7)
    return image * (1 - alpha) + alpha * BACKGROUND


def fibre(image, mask, rng):
    """A coloured textile fibre that fell on the part: a long thin curl."""
    point, turn = on_metal(rng, 24), rng.uniform(0, 2 * math.pi)
    bend, points = rng.normal(0, 0.08), []
    for _ in range(36):
        points.append(tuple(point))
        turn, bend = turn + bend, bend + rng.normal(0, 0.03)
        point = point + 2 * np.array([math.cos(turn), math.sin(turn)])
    ImageDraw.Draw(mask).line(points, fill=255, width=STROKE, joint="curve")
    colour = np.array([[170, 40, 45], [40, 70, 170], [40, 140, 60]])[rng.integers(3)]
    alpha = blurred(mask, 0.6)
    return image * (1 - alpha) + alpha * colour


DEFECTS = (scratch, stain, chip, fibre)


def draw_set(root, seed=0):
    """Write the whole data set to root/CATEGORY, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def save(image, *place):
        """Write one image below the category's folder."""
        path = root.joinpath(CATEGORY, *place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    for folder, count in (("train", TRAIN), ("test", GOOD)):
        for n in range(count):
            save(expose(photograph(draw_part(rng), rng), rng), folder, "good", f"{n:03d}.png")
    for defect in DEFECTS:
        for n in range(PER_DEFECT):
            normal, mask = photograph(draw_part(rng), rng), Image.new("L", (SIZE, SIZE))
            save(expose(defect(normal, mask, rng), rng), "test", defect.__name__, f"{n:03d}.png")
            save(np.asarray(mask), "ground_truth", defect.__name__, f"{n:03d}_mask.png")


def draw_if_absent(root):
    """Draw the set unless it is there; under another name first, so that it is whole or absent."""
    if not (root / CATEGORY).exists():
        unfinished = root.with_name(f".part-{root.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"drawing the toy set into {root}")
        draw_set(unfinished)
        root.mkdir(parents=True, exist_ok=True)
        (unfinished / CATEGORY).rename(root / CATEGORY)
        unfinished.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder (default: data/toy)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    args = parser.parse_args()
    draw_set(args.out, args.seed)
