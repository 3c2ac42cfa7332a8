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
import io
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
import train  # noqa: E402


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
    """A step of train.py on each image of a batch, the drawing and one report included."""
    model.config.steps = model.config.batch_size
    train.REPORTS = 1  # else so few steps would have a report, with its own forward, after each
    held_out = (images[:1] / 255, *train.with_defects(images, 0))

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            train.fit(model, images, held_out, "benchmark")

    return work


def forward(model, images):
    """The floor of both: the bare backbone forward of a batch of images."""
    batch = images[:model.config.batch_size] / 255

    @torch.inference_mode()
    def work():
        model.backbone(batch.to(model.device))

    return work


def scoring(model, memory, image):
    """score_maps of one image, and its floor: the forward and the bare matrix products."""
    r = torch.rand_like(memory[0])

    @torch.inference_mode()
    def floor():
        model.backbone(image)
        for vectors in memory:
            torch.mm(r, vectors.T)

    return lambda: patchae.score_maps(model, image, memory), floor


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet18", "wide_resnet50_2"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200],
                        help="normal images in the memory")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = patchae.choose_device(args.device)
    print(f"{'':44} {'ms/image':>9} {'floor':>9} {'ratio':>6} {'peak MiB':>9}")
    for name in args.backbone:
        config = patchae.Config(backbone=name, weights="random")
        with contextlib.redirect_stdout(io.StringIO()):
            model = patchae.build_model(config).to(device)
        size = config.image_size
        images = torch.randint(0, 256, (config.batch_size, 3, size, size), dtype=torch.uint8)
        bare = forward(model, images)
        rows = [("drawing defects", 0, config.batch_size, (drawing(model, images), bare)),
                ("training", 0, config.batch_size, (training(model, images), bare))]
        one = images[:1].to(device) / 255
        vectors, = patchae.build_memory(model, [one])                     # (P, C₃)
        for count in args.images:
            memory = [torch.rand_like(vectors) for _ in range(count)]
            rows.append(("scoring", count, 1, scoring(model, memory, one)))
        for what, count, batch, (work, floor) in rows:
            own, least, ratio, peak = compare(work, floor, device, args.repeats)
            memory = f"{count * len(vectors)} vectors" if count else ""
            print(f"{what:16} {name:15} {memory:>14} {1000 * own / batch:9.1f} "
                  f"{1000 * least / batch:9.1f} {ratio:6.2f} {peak:9.0f}", flush=True)


if __name__ == "__main__":
    main()
