"""How fast and how large: training and scoring beside their floor. By hand, not by pytest.

    python tests/benchmark.py [--backbone NAME ...] [--device NAME] [--images N ...]

The floor of training is the bare backbone forward. The floor of scoring is that forward plus one
torch.mm of the image's vectors with the vectors of each normal image. Both are timed in turn with
the real thing, so that a busy machine slows them alike; a ratio is the median over --repeats.
Peak memory is what the process (or the GPU) held at most, above what it held before that step.
"""
import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
import train  # noqa: E402

TRAINED = 8  # images of a training that is timed


def resident(peak=False):
    """MiB that this process holds now, or held at most since forget_peak (Linux only, else nan)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines
                    if line.startswith("VmHWM" if peak else "VmRSS"))
    except OSError:
        return float("nan")


def peak_of(work, device):
    """MiB that work() held at most, above what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    with contextlib.suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # else free memory kept from before hides the peak
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    start = resident()
    work()
    return resident(peak=True) - start


def seconds(work, device):
    """Wall-clock time of work(), the GPU's part included."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(work, floor, device, repeats):
    """Median seconds of work and floor, the median of their ratio, and the peak MiB of work."""
    peak = peak_of(work, device)
    floor()
    rounds = [(seconds(work, device), seconds(floor, device)) for _ in range(repeats)]
    ratio = statistics.median(own / least for own, least in rounds)
    return *(statistics.median(column) for column in zip(*rounds)), ratio, peak


def drawing(model, images):
    """Artificial defects drawn into a batch: the work alone."""
    return lambda: [train.with_defects(images, i) for i in range(len(images))]


def training(model, images):
    """As many steps of train.fit as there are images, the drawing included."""
    model.config.steps = len(images)
    return lambda: train.fit(model, images)


def forward(model, images):
    """The floor of training: the bare backbone forward of the images, one at a time."""
    @torch.inference_mode()
    def work():
        for image in model.batches(images):
            model.backbone(image)

    return work


def scoring(model, images):
    """anomaly_maps of one image, and its floor: the forward and the bare matrix products."""
    r = torch.rand_like(model.memory[0])
    bare = forward(model, images)

    @torch.inference_mode()
    def floor():
        bare()
        for vectors in model.memory:
            torch.mm(r, vectors.T)

    return lambda: model.anomaly_maps(images), floor


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet18", "wide_resnet50_2"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200],
                        help="normal images in the memory (default: 10 50 200)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = patchae.choose_device(args.device)
    print(f"{'':44} {'ms/image':>9} {'floor':>9} {'ratio':>6} {'peak MiB':>9}")
    for name in args.backbone:
        config = patchae.Config(backbone=name, weights="random")
        model = patchae.build_model(config, device)
        size = config.image_size
        images = torch.randint(0, 256, (TRAINED, 3, size, size), dtype=torch.uint8)
        bare = forward(model, images)
        rows = [("drawing defects", 0, TRAINED, (drawing(model, images), bare)),
                ("training", 0, TRAINED, (training(model, images), bare)),
                ("remembering", 0, TRAINED, (lambda: model.remember(images), bare))]
        for what, count, batch, work in [*rows, *(("scoring", n, 1, None) for n in args.images)]:
            if count:
                model.remember(images[:2])
                model.memory = [torch.rand_like(model.memory[0]) for _ in range(count)]
                work = scoring(model, images[:1])
            own, least, ratio, peak = compare(*work, device, args.repeats)
            memory = f"{count * model.grid**2} vectors" if count else ""
            print(f"{what:16} {name:15} {memory:>14} {1000 * own / batch:9.1f} "
                  f"{1000 * least / batch:9.1f} {ratio:6.2f} {peak:9.0f}", flush=True)


if __name__ == "__main__":
    main()
