"""Make the README's pictures from the demo's results, and scales.png: the anomaly map scale by scale.

    python docs/make_pictures.py [--runs FOLDER] [--docs FOLDER]

Needs `python train.py --demo` and `python evaluate.py --demo` before it. For scales.png the raw
features of stage 1 alone, of stage 2 alone and of both (⊕) are searched, on one test image of each
kind; every row has its own threshold half-way on the colour scale, as distances differ by scale.
"""
import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import patchae  # noqa: E402
import train  # noqa: E402
from data import make_toy  # noqa: E402

STAGES = ((1,), (2,), (1, 2))


@torch.inference_mode()
def row_of(stages, config, normal, shown):
    """The anomaly maps of the shown images, as pictures, by (E4) on these stages' raw features."""
    model, _ = patchae.build_model(patchae.Config(**{**vars(config), "layers": stages}))
    images = torch.cat(list(patchae.read_batches(normal, model, "reading")))
    train.start(model, images)
    batches = (batch / 255 for batch in images.split(config.batch_size))
    memory = patchae.build_memory(model, batches, len(images), "backbone", 1.0)
    own = [patchae.image_score(patchae.score_maps(model, images[i:i + 1] / 255, memory, "backbone", own=i))
           for i in range(len(images))]
    threshold = float(np.quantile(own, evaluate.parse(["--demo"]).quantile))
    pixels = torch.cat(list(patchae.read_batches(shown, model, "reading"))) / 255
    maps = patchae.score_maps(model, pixels, memory, "backbone")
    return [evaluate.heat_pictures(path, one, threshold)[1] for path, one in zip(shown, maps)]


def main():
    """Write overview.png, defects.png, histogram.png and scales.png into docs/."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    folder, root = args.runs / make_toy.CATEGORY, make_toy.ROOT / make_toy.CATEGORY
    for name in ("overview.png", "defects.png", "histogram.png"):
        shutil.copy(folder / name, args.docs / name)
    config = patchae.load_checkpoint(folder / "checkpoint.pt")["config"]
    kinds = ["good", *(draw.__name__ for draw in make_toy.DEFECTS)]
    shown = [root / "test" / kind / "001.png" for kind in kinds]
    rows = [[patchae.read_image(path) for path in shown]]
    rows += [row_of(stages, config, patchae.list_images(root / "train" / "good"), shown)
             for stages in STAGES]
    patchae.write_picture(args.docs / "scales.png", patchae.picture_grid(rows, kinds))


if __name__ == "__main__":
    main()
