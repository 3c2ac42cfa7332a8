"""How fast and how large: training and scoring beside their floor. Run by hand, not by pytest.

    python tests/benchmark.py [--backbone NAME ...] [--device NAME] [--sizes N ...] [--csv FILE]

The floor of a training step is the bare backbone forward; the floor of scoring is that forward plus
one torch.mm of the image's vectors with the whole memory. The same product in blocks that stay in the
cache is a lower floor still: `in blocks` is the ratio to that. All are timed in turn with the real
thing, so that a busy machine slows them alike; a ratio is the median over --repeats.
Peak memory is what the process (or the GPU) held at most, above what it held before that step.
"""
import argparse
import contextlib
import ctypes
import io
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import patchae  # noqa: E402
import train  # noqa: E402

HEADER = ["what", "backbone", "device", "memory_vectors", "ms_per_image", "floor_ms_per_image",
          "ratio", "ratio_in_blocks", "peak_mib"]


def resident(peak=False):
    """MiB that this process holds now, or held at most since forget_peak (Linux only, else nan)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines
                    if line.startswith("VmHWM" if peak else "VmRSS"))
    except OSError:
        return float("nan")


class Peak:
    """with Peak(device) as peak: …; peak.mib is what the block held at most, above the start."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
        else:
            with contextlib.suppress(AttributeError, TypeError):
                ctypes.CDLL(None).malloc_trim(0)  # else free memory kept from before hides the peak
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
            self.start = resident()
        return self

    def __exit__(self, *error):
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident(peak=True)
        self.mib = peak - self.start


def seconds(work, device):
    """Wall-clock time of work(), the GPU's part included."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(work, floors, device, repeats):
    """Median seconds of work and of the first floor, median ratio to each, peak MiB of work.

    They run in turn, after one round to warm up, in which the peak is taken first.
    """
    with Peak(device) as peak:
        work()
    for floor in floors:
        floor()
    rounds = [[seconds(each, device) for each in (work, *floors)] for _ in range(repeats)]
    own, first, *_ = (statistics.median(column) for column in zip(*rounds))
    ratios = [statistics.median(r[0] / r[i] for r in rounds) for i in range(1, len(floors) + 1)]
    return own, first, ratios, peak.mib


def bare_forward(model, images, steps, device):
    """A floor: the backbone alone, `steps` times on the first batch of the images."""
    batch = (images[:model.config.batch_size] / 255).to(device)

    @torch.inference_mode()
    def floor():
        for _ in range(steps):
            model.backbone(batch)

    return floor


def drawing(model, images, repeats, device):
    """A row: artificial defects drawn by one process, beside the bare backbone forward."""
    dataset, steps = train.DefectedImages(images, model.config), len(images) // model.config.batch_size
    floor = bare_forward(model, images, steps, device)
    return compare(lambda: [dataset[0, i] for i in range(len(images))], [floor], device, repeats)


def training_step(model, images, workers, repeats, device):
    """A row: steps of train.py, defects drawn on the way, beside the bare backbone forward."""
    config = model.config
    config.epochs = 10**6
    keys = train.batch_keys(config, len(images), 0)
    batches = iter(DataLoader(train.DefectedImages(images, config), batch_sampler=keys,
                              num_workers=workers))
    optimizer, steps = train.make_optimizer(model), len(images) // config.batch_size
    floor = bare_forward(model, images, steps, device)
    return compare(lambda: train.train_epoch(model, optimizer, batches, 0, steps), [floor], device, repeats)


@torch.inference_mode()
def scoring(model, size, repeats, device):
    """A row: score_maps of one image beside backbone forward and torch.mm of the same shapes."""
    channels = model.encoder[1].out_channels
    memory = torch.rand(1, size, channels, device=device)
    image = torch.rand(1, 3, model.config.image_size, model.config.image_size, device=device)
    r = torch.rand(model.grid**2, channels, device=device)

    def floor(at_once):
        model.backbone(image)
        for block in memory[0].split(at_once):
            torch.mm(r, block.T)

    floors = [lambda: floor(size), lambda: floor(patchae.DISTANCES_AT_ONCE[device.type] // len(r))]
    return compare(lambda: patchae.score_maps(model, image, memory, "feature"), floors, device, repeats)


def main():
    """Print the table, and write it to --csv."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet18", "wide_resnet50_2"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=Path("runs/benchmark.csv"))
    args = parser.parse_args()
    device = patchae.choose_device(args.device)
    print(f"{platform.machine()}, {args.image_size} px, batch {args.batch_size}, {args.repeats} repeats")
    print(f"{'':42} {'ms/image':>9} {'floor':>9} {'ratio':>6} {'in blocks':>9} {'peak MiB':>9}")
    rows = []
    for name in args.backbone:
        config = patchae.Config(backbone=name, weights="random", image_size=args.image_size,
                                batch_size=args.batch_size)
        with contextlib.redirect_stdout(io.StringIO()):
            model = patchae.build_model(config)[0].to(device)
        images = torch.randint(0, 256, (4 * args.batch_size, 3, args.image_size, args.image_size),
                               dtype=torch.uint8)
        work = [("drawing defects", 0, len(images), lambda: drawing(model, images, args.repeats, device)),
                ("training step", 0, len(images), lambda: training_step(
                    model, images, args.workers, args.repeats, device))]
        work += [("scoring", size, 1, lambda size=size: scoring(model, size, args.repeats, device))
                 for size in args.sizes]
        for what, size, count, measure in work:
            own, floor, ratios, mib = measure()
            ms = [1000 * value / count for value in (own, floor)]
            cells = [*(f"{ratio:.2f}" for ratio in ratios), ""][:2]  # in blocks: only for scoring
            rows.append([what, name, device.type, size, *(round(v, 2) for v in ms), *cells, round(mib)])
            print(f"{what:15} {name:16} {size or '':>9} {ms[0]:9.1f} {ms[1]:9.1f} {cells[0]:>6} "
                  f"{cells[1]:>9} {mib:9.0f}", flush=True)
    patchae.write_csv(args.csv, HEADER, rows)


if __name__ == "__main__":
    main()
