"""PatchCore and PaDiM of anomalib on the same images with the same weights. By hand, not by pytest.

    python -m venv ENV
    ENV/bin/pip install torch torchvision anomalib==2.7.0 scikit-learn
    OMP_NUM_THREADS=1 ENV/bin/python tests/peers.py --data ROOT --category NAME ... [--weights FILE]
    ENV/bin/python tests/peers.py ... --ours OUT    and the difference to OUT/NAME/trained

Needs an environment of its own, because anomalib brings many packages. Embedding, image score,
anomaly map and smoothing are anomalib's; images, weights and metrics are ours. Each image is
resized whole and normalised with ImageNet's mean and deviation, as anomalib does. PatchCore keeps
all vectors of all normal images: no coreset. Its own search holds the distances of 1024 patches
to all of them at once, 4 KiB for each vector: 1.3 GiB for 320 images. So the search here takes the
vectors in blocks; that it finds the same is checked before each run, and so are the weights:
features must equal torchvision's.

Prints a Markdown table: image AUROC / pixel AUROC / AUPRO in per cent, by the code of evaluate.py
at the network's size; after a comma the seconds for each image, from the image to its map. --ours
adds our image AUROC minus the peer's, in points, and its 95 % interval: both are computed again
and again for test images that are drawn with replacement, the same for both (paired bootstrap).
"""
import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import normalize

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import patchae  # noqa: E402
from data.images import (choose_categories, list_images, list_test_sets,  # noqa: E402
                         normal_folder, read_each)

BACKBONE = "resnet18"
BLOCK = 1024              # vectors of the memory that the search takes at once, as ours does
SEED = 0                  # PaDiM draws the channels that it keeps
MOST_DIFFERENCE = 1e-4    # of features, in parts of the largest: what rounding may do
CHECK_SIZE = 64           # pixels of the random image whose features are compared
CHECKED = (400, 2 * BLOCK + 5, 16)  # queries, vectors, length; the last block is smaller than k
RESAMPLED = 2000          # of --ours: sets of test images
INTERVAL = (0.025, 0.975)


class PatchcoreInBlocks(PatchcoreModel):
    """PatchCore with all its vectors; only BLOCK distances for each query are in memory at once."""

    def __init__(self):
        super().__init__(layers=["layer2", "layer3"], backbone=BACKBONE, pre_trained=False)

    def fit(self):
        """Keep every vector that was seen in training: no coreset."""
        self.memory_bank = torch.cat(self.embedding_store)
        self.embedding_store.clear()

    def nearest_neighbors(self, embedding, n_neighbors):
        """The same as PatchcoreModel.nearest_neighbors: k distances and k indices; (n,) if k = 1.

        The k nearest of all are among the k nearest of each block.
        """
        distances, indices = [], []
        for number, block in enumerate(self.memory_bank.split(BLOCK)):
            among = self.euclidean_dist(embedding, block)                 # (n, BLOCK)
            if n_neighbors == 1:  # faster, and PatchCore does so, too
                found = among.min(dim=1, keepdim=True)                    # (n, 1)
            else:
                found = among.topk(min(n_neighbors, len(block)), largest=False)
            distances.append(found.values)                                # (n, k) or smaller
            indices.append(found.indices + number * BLOCK)
        best = torch.cat(distances, dim=1).topk(n_neighbors, largest=False)
        indices = torch.cat(indices, dim=1).gather(1, best.indices)       # (n, k)
        return best.values.squeeze(1), indices.squeeze(1)                 # (n, k), or (n,)


PEERS = {"PatchCore (anomalib 2.7), no coreset": PatchcoreInBlocks,
         "PaDiM (anomalib 2.7)": lambda: PadimModel(BACKBONE, pre_trained=False)}


def check_search():
    """The search in blocks finds what PatchCore's own finds, for one neighbour and for nine."""
    model = PatchcoreInBlocks()
    with patchae.seeded(SEED):
        count, vectors, length = CHECKED
        queries, model.memory_bank = torch.rand(count, length), torch.rand(vectors, length)
    for k in (1, model.num_neighbors):
        own = PatchcoreModel.nearest_neighbors(model, queries, k)
        torch.testing.assert_close(model.nearest_neighbors(queries, k), own)


@torch.inference_mode()
def build(make, weights):
    """A peer with the weights of torchvision's network. Its features must equal torchvision's."""
    with patchae.seeded(SEED):
        model = make().eval()
        image = torch.randn(1, 3, CHECK_SIZE, CHECK_SIZE)
    resnet = torchvision.models.get_model(BACKBONE, weights=None)
    resnet = create_feature_extractor(resnet, list(model.layers)).eval()
    for network in (resnet, model.feature_extractor.feature_extractor):
        patchae.load_weights(network, BACKBONE, weights)
    found = model.feature_extractor(image)
    for layer, expected in resnet(image).items():
        difference = (found[layer] - expected).abs().max() / expected.abs().max()
        assert difference < MOST_DIFFERENCE, f"{layer}: features differ by {difference:.1e}"
    return model


def batches(paths, size):
    """Yield normalised images (1, 3, size, size), one at a time, and their own sizes."""
    for path in paths:
        (image, own), = read_each([path], size)
        yield normalize(image[None] / 255, patchae.IMAGENET_MEAN, patchae.IMAGENET_STD), own


@torch.inference_mode()
def measure(model, folder, size):
    """Fit a peer on train/good and score test: the metrics, s/image, {(type, file): score}."""
    model.train()
    for image, _ in batches(list_images(normal_folder(folder)), size):
        model(image)
    model.fit()
    model.eval()
    samples = list_test_sets(folder)["test"]
    scores, scored, seconds = [], [], []
    for sample, (image, own) in zip(samples, batches([path for path, _, _ in samples], size)):
        begin = time.perf_counter()
        found = model(image)
        seconds.append(time.perf_counter() - begin)
        scores.append(found.pred_score.item())
        scored.append(evaluate.Scored(*sample, own, found.anomaly_map[0, 0]))  # (size, size)
    truths = evaluate.read_truths(folder.name, scored, size)
    by_image = evaluate.auroc([kind != "good" for _, kind, _ in samples], scores)
    _, by_pixel, by_region = evaluate.measure(scored, truths)
    names = [path.parts[-2:] for path, _, _ in samples]
    return by_image, by_pixel, by_region, statistics.mean(seconds), dict(zip(names, scores))


def compare(folder, peer):
    """Our image AUROC minus the peer's, in points, with its 95 % interval, as a text."""
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        ours = {Path(row["path"]).parts[-2:]: float(row["score"]) for row in csv.DictReader(file)}
    names = sorted(ours)
    bad = np.array([kind.lower() != "good" for kind, _ in names])
    scores = np.array([[own[name] for name in names] for own in (ours, peer)])
    rng = np.random.default_rng(SEED)

    def difference(chosen):
        first, second = (evaluate.auroc(bad[chosen], one[chosen]) for one in scores)
        return 100 * (first - second)

    drawn = [difference(np.concatenate([rng.choice(np.flatnonzero(one), one.sum())
                                        for one in (bad, ~bad)])) for _ in range(RESAMPLED)]
    low, high = np.quantile(drawn, INTERVAL)
    return f"{difference(np.arange(len(names))):+.1f} [{low:+.1f}, {high:+.1f}]"


def main(argv=None):
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="ROOT", help="data set: a folder with NAME/train/good")
    add("--category", nargs="+", default=[], metavar="NAME", help="its categories, or: all")
    add("--weights", default="imagenet", metavar="FILE", help="a state dict of torchvision's "
        "ResNet-18, or imagenet, which is downloaded (default: imagenet)")
    add("--image-size", type=int, default=256, metavar="PIXELS",
        help="side to which images are resized (default: 256, as anomalib's)")
    add("--ours", type=Path, metavar="OUT", help="our results, to be compared with")
    args = parser.parse_args(argv)
    check_search()
    _, names = choose_categories(args.data, args.category)
    print(f"| image / pixel AUROC / AUPRO, s/image | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    for peer, make in PEERS.items():
        cells = []
        for name in names:
            model = build(make, args.weights)
            *metrics, seconds, scores = measure(model, args.data / name, args.image_size)
            cells.append(" / ".join(f"{100 * value:.1f}" for value in metrics)
                         + f", {seconds:.2f} s")
            if args.ours:
                cells[-1] += f", ours {compare(args.ours / name / 'trained', scores)}"
            print(f"{peer}, {name}: {cells[-1]}", file=sys.stderr, flush=True)
        print(f"| {peer}, {args.image_size} pixels | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    patchae.run(main)
