"""The scripts as a user runs them: options, tables, pictures, decisions, devices, the READMEs.

The oracles take vectors from the model; all else is NumPy, scikit-learn, Pillow and this file.
"""
import csv
import dataclasses
import itertools
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (CHECKPOINT, GOOD, OPTIONS, ROOT, TEST, TINY, draw_dataset, fails,
                      random_states, seed_all, watch)
from PIL import Image, ImageDraw, ImageOps
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import evaluate
import patchae
import train
from data import files, images, make_toy
from data.images import list_test
from patchae import DEMO, Config, PatchAE

DARK_TO_GLOWING = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30],
                            [255, 255, 170]])
MASKS = Path("data/part/ground_truth/dent")


def run(main, *argv, code=0):
    """main must end with this code, given OPTIONS and these; train.py gets TINY, too."""
    tiny = TINY if main is train.main else []
    assert main([*OPTIONS, *tiny, *(str(word) for word in argv)]) == code


def rows(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))


def checkpoint(path=CHECKPOINT):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def pixels(path, size=None):
    """An image file by Pillow alone, upright, (H, W, 3) in 0 to 255."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    return np.array(image.resize(size, Image.BILINEAR) if size else image, dtype=float)


# ---- the oracle: vectors by the model, all else by NumPy, scikit-learn and Pillow ----------------
@torch.no_grad()
def vectors(paths, method="trained"):
    """What the method compares of image files, (N, 16, 16, C); or what the decoder draws."""
    model = PatchAE.load(CHECKPOINT)
    image = np.stack([pixels(path, (64, 64)) for path in paths]) / 255
    image = torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)
    found = model(image) if method == "reconstruction" else model.vectors(image, method)
    return found.permute(0, 2, 3, 1).numpy()


def drawn(paths):
    """What the decoder draws of image files, (N, 64, 64, 3) in 0 to 255."""
    patches = vectors(paths, "reconstruction").reshape(-1, 16, 16, 3, 4, 4)
    return 255 * patches.transpose(0, 1, 4, 2, 5, 3).reshape(-1, 64, 64, 3).clip(0, 1)


def distances(queries, memory):
    """(N, 16, 16): of each vector (N, 16, 16, C) the distance to the nearest in the memory."""
    nearest = NearestNeighbors(n_neighbors=1).fit(memory.reshape(-1, memory.shape[-1]))
    return nearest.kneighbors(queries.reshape(-1, memory.shape[-1]))[0].reshape(-1, 16, 16)


def anomaly_maps(paths, method="trained"):
    """(N, 16, 16) of image files; of none those of the normal images, each against the others."""
    normal = sorted(GOOD.iterdir())
    if method == "reconstruction":
        patches = vectors(paths, method).reshape(-1, 16, 16, 3, 4, 4)
        image = np.stack([pixels(path, (64, 64)) for path in paths]) / 255
        image = image.reshape(-1, 16, 4, 16, 4, 3).transpose(0, 1, 3, 5, 2, 4)
        return ((patches - image)**2).mean(axis=(3, 4, 5))
    found = vectors([*paths, *normal], method)
    if paths:
        return distances(found[:len(paths)], found[len(paths):])
    images = np.stack([pixels(path) for path in normal])
    others = [(images != image).any(axis=(1, 2, 3)) for image in images]  # no copies of it, either
    return np.concatenate([distances(found[[n]], found[others[n]]) for n in range(len(found))])


def image_scores(maps):
    """The mean of the three highest places of each map."""
    return np.sort(maps.reshape(len(maps), -1))[:, -3:].mean(axis=1)


def enlarged(anomaly_map, size):
    """A map at the size (width, height), bilinear."""
    return np.array(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.BILINEAR))


def regions(truth):
    """The pixels of each region of a mask, corners included, by flood fill."""
    left = set(zip(*map(list, np.nonzero(truth))))
    while left:
        region, border = set(), {left.pop()}
        while border:
            region |= border
            border = {(y + a, x + b) for y, x in border for a in (-1, 0, 1) for b in (-1, 0, 1)}
            border &= left
            left -= border
        yield tuple(zip(*region))


def aupro_by_hand(truths, maps):
    """The area under the curve of overlaps up to 0.3, threshold by threshold."""
    normal = np.sort(maps[~truths])
    found = [np.sort(one[region]) for one, truth in zip(maps, truths) for region in regions(truth)]
    area, x, y = 0, 0, 0
    for threshold in np.unique(maps)[::-1]:
        above = [1 - np.searchsorted(part, threshold) / len(part) for part in (normal, *found)]
        end, overlap = above[0], np.mean(above[1:])
        if end > 0.3 and end > x:
            overlap, end = y + (overlap - y) * (0.3 - x) / (end - x), 0.3
        area += (end - x) * (y + overlap) / 2
        x, y = end, overlap
        if x >= 0.3:
            return area / 0.3
    return area / 0.3


# ---- options ------------------------------------------------------------------------------------
def train_and_look(*argv):
    """Run train.py; what a run consists of, place by place, each a flat tensor."""
    def flat(*tensors):
        return torch.cat([torch.as_tensor(t).detach().float().flatten() for t in tensors])

    def part(state, name):
        return flat(*(state[key] for key in state if key.startswith(name)))

    def build(config):
        model = build_model(config)
        seen["model"], state = model, model.state_dict()
        seen.update({f"{name} at start": part(state, name)
                     for name in ("backbone", "encoder", "decoder")})
        return model

    seen, build_model = {}, patchae.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patchae, "build_model", build)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(train, "CHECKED", 1)  # to save time
        losses = watch(patch, patchae, "training_loss")
        looked = watch(patch, PatchAE, "features")
        run(train.main, *argv)
    content, memory = checkpoint(), seen.pop("model").memory
    seen |= {name: part(content["model"], name)
             for name in ("backbone", "encoder", "decoder", "raw_backbone")}
    return content["config"], seen | {
        "images": flat(content["images"]), "scores": flat(content["normal_scores"]),
        "inputs": flat(*(t for (_, image, mask, *_), _ in losses for t in (image, mask))),
        "first loss": flat(losses[0][1]), "losses": flat(*(loss for _, loss in losses)),
        "memory": flat([len(one) for one in memory]),
        "checked": flat(np.hsplit(pixels("runs/part/defects.png"), 2)[0]),  # normal, defected
        "at once": flat(max(len(image) for (_, image, *_), _ in looked))}


def differing(one, other):
    """The places in which two runs differ by more than rounding."""
    return {place for place in one if one[place].shape != other[place].shape or not torch.allclose(
        one[place], other[place], rtol=3e-4, atol=1e-6, equal_nan=True)}


TRAINED = {"losses", "encoder", "decoder", "scores"}
BACKBONE = {"backbone at start", "backbone", "raw_backbone", "first loss", *TRAINED}
TRAIN_OPTIONS = {
    "--backbone resnet50": {*BACKBONE, "encoder at start", "decoder at start"},
    "--weights other.pt": BACKBONE,
    "--layers 1": {*BACKBONE, "encoder at start", "decoder at start"},
    "--image-size 96": {"images", "inputs", "checked", "memory", "first loss", *TRAINED},
    "--patch-size 8": {"decoder at start", "memory", "first loss", *TRAINED},
    "--neighbourhood 1": {"first loss", *TRAINED},
    "--start random": {"encoder at start", "first loss", *TRAINED},
    "--start random --channels 16": {"encoder at start", "decoder at start", "first loss",
                                     *TRAINED},
    "--memory-fraction 0.5": {"memory", "scores"},
    "--finetune-backbone": {"backbone", *TRAINED},
    "--no-defects": {"inputs", "first loss", *TRAINED},
    "--defect-weight 0": {"first loss", *TRAINED},
    "--steps 3": {"inputs", *TRAINED},
    "--lr 0.01": TRAINED,
    "--encoder-lr 0.01": TRAINED,
    "--threshold-images 3": {"scores"},
    "--seed 1": {*BACKBONE, "decoder at start", "inputs", "checked"},
    "--batch-size 2 --device auto": {"at once"},
}


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """What a run of train.py without further options consists of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shutil.copytree(trained, tmp_path_factory.mktemp("plain") / "copy"))
        return train_and_look()


@pytest.mark.parametrize("option", TRAIN_OPTIONS)
def test_an_option_changes_what_its_help_names_and_nothing_else(workspace, plain, option):
    """From the images to the scores; and in the Config the fields of its name, if it has any."""
    words = option.split()
    if "other.pt" in words:
        other = patchae.build_model(Config(backbone="resnet18", weights="random", seed=1))
        torch.save(other.backbone.state_dict(), "other.pt")
    config, seen = train_and_look(*words)
    assert differing(seen, plain[1]) == TRAIN_OPTIONS[option]
    names = {word[2:].removeprefix("no-").replace("-", "_") for word in words if word[:2] == "--"}
    fields = {name for name in config if config[name] != plain[0][name]}
    assert fields == names - {"batch_size", "device"}


def evaluate_and_look(*argv):
    """Run evaluate.py; what a run gives, place by place, each a tensor."""
    for path in Path("runs/part").glob("*/result.csv"):
        shutil.rmtree(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        looked = watch(patch, PatchAE, "features")
        run(evaluate.main, *argv)
    path, = Path("runs/part").glob("*/result.csv")
    table, (result,) = rows(path.parent / "scores.csv"), rows(path)
    seen = {place: [float(result[place])]
            for place in ("threshold", "image_auroc", "pixel_auroc", "aupro")}
    seen["scores"] = [float(row["score"]) for row in table]
    seen["verdicts"] = [("", "False", "True").index(row["is_anomalous"]) for row in table]
    seen["heatmaps"] = [pixels(p).mean() for p in sorted(path.parent.rglob("heatmaps/**/*.png"))]
    seen["overview"] = [pixels(path.parent / "overview.png").mean()]
    seen["at once"] = [max(len(image) for (_, image, *_), _ in looked)]
    seen["folder"] = [*path.parent.name.encode()]
    return {place: torch.tensor(numbers) for place, numbers in seen.items()}


PICTURES = {"heatmaps", "overview"}
EVALUATE_OPTIONS = {
    "--quantile 0.01": {"threshold", "verdicts", *PICTURES},
    "--batch-size 2 --device auto": {"at once"},
    "--test test_b": {"folder", "scores", "verdicts", "pixel_auroc", "aupro", *PICTURES},
    "--method reconstruction": {"folder", "scores", "threshold", "verdicts", "pixel_auroc",
                                "aupro", *PICTURES}}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A folder with a second, darker test set and normal scores far apart; a plain run there."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(TEST, "data/part/test_b")
        shutil.copytree(MASKS, "data/part/ground_truth_b/dent")
        for path in Path("data/part/test_b").rglob("*.png"):
            Image.fromarray((0.9 * pixels(path)).astype(np.uint8)).save(path)
        content = checkpoint()
        content["normal_scores"] *= torch.arange(6)
        torch.save(content, CHECKPOINT)
        return folder, evaluate_and_look()


@pytest.mark.parametrize("option", EVALUATE_OPTIONS)
def test_an_option_of_evaluate_changes_what_its_help_names(evaluated, monkeypatch, option):
    """From the scores to the pictures, and nothing else."""
    monkeypatch.chdir(evaluated[0])
    seen = evaluate_and_look(*option.split())
    assert differing(seen, evaluated[1]) == EVALUATE_OPTIONS[option]


@pytest.mark.parametrize("script, elsewhere", [
    (train, "--data --category --demo --out --skip-finished"),
    (evaluate, "--data --category --demo --out --predict")])
def test_the_help_names_every_option_and_its_default(capsys, script, elsewhere):
    """A default that the help names is the default: given as the option it changes nothing.

    Every option stands in a table above, or is one of those that the tests below use.
    """
    def parsed(*words):
        args, config = script.parse(words) if script is train else (script.parse(words), None)
        return config, *(getattr(args, name, None) for name in (
            "out", "device", "batch_size", "method", "test", "quantile", "demo"))

    with pytest.raises(SystemExit, match="0"):
        script.parse(["--help"])
    text = capsys.readouterr().out
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", text)[1:]]
    defaults = {entry.split(",")[0].split()[0]: re.findall(r"\(default: ([^,;)]*)", entry)
                for entry in entries}
    assert text.isascii() and {name for name in defaults if not defaults[name]} == set(
        elsewhere.replace("--out ", "").split())
    table = TRAIN_OPTIONS if script is train else EVALUATE_OPTIONS
    used = {word.replace("--no-", "--") for option in table for word in option.split()}
    assert {*elsewhere.split(), *used} >= set(defaults)
    assert defaults.pop("--batch-size") == ["1 on a CPU"]  # as the tables above show
    if script is train:
        assert defaults.pop("--channels") == ["as many as the joined stages have"]
        assert Config().channels is None
    for name, (default,) in ((name, found) for name, found in defaults.items() if found):
        words = {"yes": [name], "no": [name.replace("--", "--no-")]}
        assert parsed(*words.get(default, [name, *default.split()])) == parsed()


def test_the_demo_has_settings_of_its_own_and_options_win():
    """Options of both scripts given beside --demo."""
    assert train.parse(["--demo"])[1] == DEMO != Config()
    assert train.parse(["--demo", "--steps", "7", "--no-finetune-backbone"])[1] == (
        dataclasses.replace(DEMO, steps=7, finetune_backbone=False))
    assert train.parse(["--layers", "3", "1", "3"])[1].layers == (1, 3)
    args = evaluate.parse(["--demo"])
    assert (args.method, args.test) == (["raw", "trained"], ["test", "test_faint"])
    assert (args.data, args.category) == (ROOT / "data/toy", ["felt", "flange"])
    args = evaluate.parse("--demo --method raw --test b --data x --category y".split())
    assert (args.method, args.test) == (["raw"], ["b"])
    assert (args.data, args.category) == (Path("x"), ["y"])
    args = evaluate.parse("--method raw trained raw --test b/ test b".split())
    assert (args.method, args.test) == (["raw", "trained"], ["b", "test"])


# ---- train.py -----------------------------------------------------------------------------------
def test_a_training_is_repeated_by_its_seed_and_sees_only_train_good(workspace, monkeypatch):
    """Equal but for the seconds, from another state of each generator, which stays as it is."""
    shutil.copytree(TEST / "dent", "data/part/train/dent")
    normal, before = sorted(GOOD.iterdir()), checkpoint()
    picture, log = Path("runs/part/defects.png").read_bytes(), rows("runs/part/train.csv")
    seed_all(7)
    states = random_states()
    with monkeypatch.context() as patch:
        opened = watch(patch, Image, "open")
        run(train.main)
    assert random_states() == states
    assert {path for (path, *_), _ in opened} == set(normal) and len(normal) == 6
    after = checkpoint()
    assert set(after) == {"config", "model", "images", "names", "normal_scores"}
    assert after["config"] == before["config"] and after["names"] == [p.name for p in normal]
    assert np.array_equal(after["images"].permute(0, 2, 3, 1), [pixels(path) for path in normal])
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    assert torch.equal(after["normal_scores"], before["normal_scores"])
    assert picture == Path("runs/part/defects.png").read_bytes()
    assert all({**a, "seconds": 0} == {**b, "seconds": 0}
               for a, b in zip(rows("runs/part/train.csv"), log, strict=True))


def everything(folder):
    """Train, evaluate and score many paths while all clocks stand: {path: bytes} of all results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Log", partial(train.Log, clock=lambda: 0))
        patch.setattr(evaluate, "time", SimpleNamespace(monotonic=lambda: 0))
        options = [*OPTIONS, "--out", str(folder)]
        assert train.main([*options, *TINY]) == 0
        assert evaluate.main(options) == 0
        assert evaluate.main([*options, "--predict", *[str(TEST)] * 30]) == 0
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_another_process_gives_the_same(workspace):
    """Python orders sets, and hashes texts, differently in each process.

    Its encoding depends on the machine, so no text file may be opened without one.
    """
    code = (f"import sys, warnings; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "warnings.filterwarnings('error', '', EncodingWarning, 'patchae|train|eval|data')\n"
            "from test_scripts import Path, everything; everything(Path('other'))")
    subprocess.run([sys.executable, "-X", "warn_default_encoding", "-c", code], check=True)
    other, here = Path("other"), everything(Path("here"))
    assert {p.relative_to(other) for p in other.rglob("*") if p.is_file()} == set(here)
    assert len(here) > 10
    for path, content in here.items():
        assert (other / path).read_bytes() == content, path


def test_what_a_training_prints_writes_and_draws(workspace, monkeypatch, capsys):
    """A loss is the mean since the last row; here a row takes 60 s: after 2 of 13 steps 330 s are
    left.

    defects.png shows normal images, their defects, the masks, what the decoder draws; what is
    missing follows from its pixels. A copy is named. Nothing goes to a pipe but that. Images are
    rebuilt one at a time, as in training, so that what can be trained can be looked at.
    """
    losses = watch(monkeypatch, patchae, "training_loss")
    looked = watch(monkeypatch, PatchAE, "features")
    clock = itertools.count(0, 60).__next__
    monkeypatch.setattr(train, "Log", partial(train.Log, clock=clock))
    shutil.copy(GOOD / "000.png", GOOD / "copy.png")
    run(train.main, "--steps", 13)
    out, err = capsys.readouterr()
    log = rows("runs/part/train.csv")
    losses = [loss.item() for _, loss in losses]
    means = [(a + b) / 2 for a, b in zip(losses[:12:2], losses[1::2])] + losses[12:]
    steps, missing = [2, 4, 6, 8, 10, 12, 13], [float(row["missing_share"]) for row in log]
    assert [list(map(float, row.values())) for row in log] == pytest.approx(
        np.array([steps, means, missing, np.arange(60, 421, 60)]).T, rel=1e-5)
    assert list(log[0]) == ["step", "loss", "missing_share", "seconds"] and err == ""
    assert {len(image) for (_, image, *_), _ in looked} == {1}
    assert out.splitlines()[1:] == [
        "part: 7 normal images",
        "part: 1 copies, left out of each other's scores: copy.png = 000.png",
        "part: backbone resnet18, weights random",
        *(f"part: step {step}/13  loss {loss:.4f}  missing_share {share:.3f}  "
          f"{60 * n / step * (13 - step):.0f} s left"
          for n, (step, loss, share) in enumerate(zip(steps, means, missing), 1)),
        f"part: wrote {CHECKPOINT}"]
    cells = pixels("runs/part/defects.png")[2:, 2:].reshape(6, 66, 4, 66, 3)[:, :64, :, :64]
    normal, defected, mask, rebuilt = cells.transpose(2, 0, 1, 3, 4)
    assert np.array_equal(normal, [pixels(path) for path in sorted(GOOD.iterdir())[:6]])
    assert set(np.unique(mask)) == {0, 255} and (normal == defected)[mask == 0].all()
    assert (normal != defected)[mask == 255].mean() > 0.5
    error, all_of_it = (((one - defected)**2)[mask == 255].sum() for one in (rebuilt, normal))
    assert missing[-1] == pytest.approx(error / all_of_it, rel=0.03)
    for n, image in enumerate(defected):
        Image.fromarray(image.astype(np.uint8)).save(f"{n}.png")
    assert abs(drawn([f"{n}.png" for n in range(6)]) - rebuilt).max() < 2


def test_a_loss_that_is_no_number_stops_the_training(workspace):
    """It names the options that help; and a training without steps is one."""
    run(train.main, "--steps", 0)
    assert rows("runs/part/train.csv") == []
    model = PatchAE.load(CHECKPOINT)
    model.config.steps = 4
    log = train.Log(model, model.images, "part")
    for loss in (math.nan, math.inf, 1e5):
        with pytest.raises(patchae.UserError, match="part: the loss is .*--lr or --encoder-lr"):
            log(1, loss)


def test_a_training_replaces_all_that_was_there_before(workspace, monkeypatch, capsys):
    """Also evaluations, whose numbers are those of another model."""
    Path("runs/part/.DS_Store").touch()
    for folder in ("trained", "raw-test_faint", "predictions/photos"):
        Path("runs/part", folder).mkdir(parents=True)
        Path("runs/part", folder, "result.csv").write_text("old")
    run(train.main, "--steps", 1)
    assert {path.name for path in Path("runs/part").iterdir()} == {
        "checkpoint.pt", "train.csv", "defects.png"}


@pytest.mark.parametrize("main, argv, folder", [
    (train.main, TINY, "runs/part"), (evaluate.main, [], "runs/part/trained"),
    (evaluate.main, ["--method", "raw", "--predict", TEST],
     "runs/part/predictions-raw/data-part-test")])
def test_nothing_is_replaced_but_results(workspace, monkeypatch, capsys, main, argv, folder):
    """A user's file or folder among results is an error, and that before the work begins."""
    for owner, work in ((train, "fit"), (evaluate, "score_files")):
        monkeypatch.setattr(owner, work, Mock(side_effect=AssertionError))
    for foreign in ("letter.txt", "train"):
        path = Path(folder, foreign)
        path.mkdir(parents=True)
        fails(capsys, main, [*OPTIONS, *argv], "--out runs", Path(folder), foreign)
        path.rmdir()
    for content in ("raw/photo.jpg", ".git/config"):  # no results at all
        shutil.rmtree(folder)
        Path(folder, content).parent.mkdir(parents=True)
        fails(capsys, main, [*OPTIONS, *argv], "--out runs", Path(folder))
    with pytest.raises(patchae.UserError, match="is a folder"):
        with files.whole(Path(folder)) as unfinished:
            unfinished.touch()
    shutil.rmtree(folder)
    Path(folder).touch()
    fails(capsys, main, [*OPTIONS, *argv], Path(folder), "Not a directory")


def test_skip_finished(workspace, monkeypatch, capsys):
    """The same images and options: left as it is. Those of memory and threshold: no training.

    Where the normal images do not fit into memory, the training is there, and is not repeated.
    """
    trained, remember, remembered = Mock(), PatchAE.remember, Mock()
    monkeypatch.setattr(train, "fit", trained)
    monkeypatch.setattr(PatchAE, "remember", lambda *a: (remembered(), remember(*a)))
    before, log = checkpoint(), Path("runs/part/train.csv").read_bytes()

    def calls(*argv, code=0):
        """How often it trained and remembered in this run."""
        trained.reset_mock()
        remembered.reset_mock()
        run(train.main, "--skip-finished", *argv, code=code)
        return trained.call_count, remembered.call_count

    there = PatchAE.load(CHECKPOINT)
    for option in TRAIN_OPTIONS:  # only these keep the weights
        _, config = train.parse([*OPTIONS, *TINY, *option.split()])
        with monkeypatch.context() as patch:
            patch.setattr(PatchAE, "load", lambda path: there)  # once is enough
            found = train.trained_before(CHECKPOINT.parent, config, before["images"])
        kept = option.split()[0] in ("--memory-fraction", "--threshold-images", "--batch-size")
        assert (found is not None) == kept, option
    few = ("--threshold-images", 3, "--memory-fraction", 0.5)
    assert calls() == (0, 0)
    remembered.side_effect = torch.OutOfMemoryError("out of memory")
    content = CHECKPOINT.read_bytes()
    assert calls(*few, code=2) == (0, 1) and CHECKPOINT.read_bytes() == content
    remembered.side_effect = None
    assert calls(*few) == (0, 1)
    after = checkpoint()
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    assert after["config"] == {**before["config"], "threshold_images": 3, "memory_fraction": 0.5}
    assert len(after["normal_scores"]) == 3 and log == Path("runs/part/train.csv").read_bytes()
    remembered.side_effect = torch.OutOfMemoryError("out of memory")
    capsys.readouterr()
    assert calls("--lr", 0.5, code=2) == (1, 1)
    assert re.search("^error: part: .*--memory-fraction.*--batch-size", capsys.readouterr().err)
    remembered.side_effect = None
    Path("runs/part/defects.png").unlink()  # a user who needs space may remove it
    assert calls("--lr", 0.5) == (0, 1)
    shutil.copy(GOOD / "000.png", GOOD / "one_more.png")
    assert calls("--lr", 0.5) == (1, 1)
    Image.fromarray((0.9 * pixels(GOOD / "000.png")).astype(np.uint8)).save(GOOD / "000.png")
    assert calls("--lr", 0.5) == (1, 1)
    CHECKPOINT.unlink()
    none = ("--threshold-images", 0)  # then there is none to be made
    assert [calls(*none), calls(*none)] == [(1, 1), (0, 0)]


@pytest.mark.parametrize("most, chosen", [(100, np.s_[:]), (4, [0, 1, 3, 5])])
def test_the_threshold_is_a_quantile_of_leave_one_out_scores(workspace, capsys, most, chosen):
    """By brute force, in the R of the end of the training; a copy is left out together with itself.

    The rate of false alarms is that of ten thousand detectors whose scores are uniform.
    """
    for path in GOOD.iterdir():
        noise = np.random.rand(64, 64, 1)
        Image.fromarray((pixels(path) * noise).astype(np.uint8)).save(path)
    shutil.copy(GOOD / "002.png", GOOD / "copy.png")
    run(train.main, "--encoder-lr", 0.01, "--threshold-images", most)
    expected = image_scores(anomaly_maps([]))[chosen]
    assert checkpoint()["normal_scores"].tolist() == pytest.approx(expected, rel=1e-3)
    capsys.readouterr()
    evaluate.load_model("part", evaluate.parse(["--quantile", "0.7"]), "cpu")
    line = (r"part: threshold (.*), the 0.7 quantile of the scores of (.*) normal images; "
            r"if they are independent, expect (.*)% false alarms\n")
    found = re.search(line, capsys.readouterr().out)
    threshold, number, rate = map(float, found.groups())
    assert threshold == pytest.approx(np.quantile(expected, 0.7), abs=1e-4)
    uniform = np.quantile(np.random.rand(10**4, len(expected)), 0.7, axis=1)
    assert number == len(expected) and rate == pytest.approx(100 * (1 - uniform.mean()), abs=1)


# ---- evaluate.py: numbers -----------------------------------------------------------------------
@pytest.mark.parametrize("truth, levels, expected", [
    ("####.# ......", "111100 000000", 0.575),     # the large one is found: from (0, 1/2) to (1, 1)
    ("####.# ......", "000001 000000", 0.575),     # the small one counts as much
    ("#....# .#....", "200000 020000", 0.575),     # corners touch: one region of two
    ("####.. ......", "001100 000000", 0.575),     # half of the only one
    ("##.... ......", "110000 000000", 1.0),
    ("#....# ......", "300000 222000", 0.5),       # 3 of 10 normal pixels are 0.3
    ("#....# ......", "300001 222000", 0.5),       # what is found from there on is of no use
    ("...... ......", "300001 222000", math.nan), ("###### ######", "300001 222000", math.nan)])
def test_aupro_by_hand(truth, levels, expected):
    """Two rows of six pixels. The curve is cut at 0.3, where it is 0.65 if it began at 1/2."""
    truth = torch.tensor([[[sign == "#" for sign in row] for row in truth.split()]])
    levels = torch.tensor([[[float(sign) for sign in row] for row in levels.split()]])
    assert evaluate.aupro(truth, levels) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_aupro_by_another_route():
    """Threshold by threshold, the regions by flood fill; images with ties, of several densities, in
    one a scratch that winds through all of it."""
    row = np.arange(20)
    winding = np.repeat(row[:, None] % 4 == 0, 30, axis=1)
    winding[row % 8 < 4, -1] = winding[row % 8 > 4, 0] = True
    assert len(list(regions(winding))) == 1
    for density, steps in ((0.02, 1000), (0.1, 30), (0.3, 5), (0.02, 100)):
        truths = np.random.rand(3, 20, 30) < density
        truths[0] = winding if steps == 100 else truths[0]
        maps = np.floor(np.random.rand(3, 20, 30) * steps) + truths * steps // 4
        expected = aupro_by_hand(truths, maps)
        assert evaluate.aupro(*map(torch.tensor, (truths, maps))) == pytest.approx(expected)


def test_what_cannot_be_measured_is_said(workspace, capsys):
    """A defective image without a mask is left out; no mask at all, one upside down, one class."""
    def measure(kept=(0, 1, 2, 3)):
        """The metrics of these of the test images, with the same random maps, and what is said."""
        samples = list_test(Path("data/part"))
        maps = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
        numbers = evaluate.pixel_metrics([samples[n] for n in kept], maps[list(kept)], 64)
        return numbers, capsys.readouterr().out.strip()

    both, nothing = measure()
    mask = (MASKS / "000_mask.png").rename("kept.png")
    one, said = measure()
    assert one == measure((1, 2, 3))[0] != both and nothing == ""
    assert said == ("pixel metrics: 1 defective images have no mask, left out; looked for "
                    "ground_truth/TYPE/STEM.png, STEM_mask.png or STEM_mask_*.png")
    ImageOps.invert(Image.open(mask)).save(MASKS / "000.png")
    assert measure()[1] == (
        f"{MASKS / '000.png'}: more than half of the image is a defect; is it inverted?")
    shutil.rmtree(MASKS)
    for folder, kind in (("good", "good"), ("dent", "defective")):
        shutil.move(TEST / folder, "moved")
        run(evaluate.main)
        *lines, row = capsys.readouterr().out.splitlines()
        assert f"image AUROC: undefined (test/ has no {kind} images)" in lines
        assert "pixel metrics: undefined (no mask shows a defect)" in lines
        assert row.split()[3:6] == ["undefined"] * 3
        result, = rows("runs/results.csv")
        assert [result[name] for name in ("image_auroc", "pixel_auroc", "aupro")] == ["nan"] * 3
        shutil.move("moved", TEST / folder)


def test_results_of_all_categories_by_hand(tmp_path, capsys):
    """results.csv keeps every row; what was asked for is printed in per cent, with its mean.

    Other files of that name, damaged ones, and the copy of a folder are left out.
    """
    header = ("category,test_set,method,image_auroc,pixel_auroc,aupro,seconds_per_image,threshold,"
              "seed,backbone,weights")
    table = ["a,test,raw,0.5,0.9,nan,1.0,nan,0,resnet18,random",
             "a,test,trained,0.6,0.8,0.4,1.5,3.5,0,resnet18,random",
             "b,test,trained,0.8,nan,0.6,2.5,3.5,0,resnet18,random",
             "b,test_c,trained,0.7,0.6,0.5,1.0,3.5,0,resnet18,random",
             "old,test,trained,0.1,0.1,0.1,9.0,3.5,0,resnet18,random"]
    for row in table:
        name, test, method, *_ = row.split(",")
        path = tmp_path / name / (method if test == "test" else f"{method}-{test}") / "result.csv"
        path.parent.mkdir(parents=True)
        path.write_text(f"{header}\n{row}\n")
    for hidden in (".part-x/c", "a/.before"):  # what a process that was killed left
        shutil.copytree(path.parent, tmp_path / hidden)
    shutil.copytree(tmp_path / "a", tmp_path / "a copy")
    shutil.copytree(tmp_path / "a/raw", tmp_path / "a/raw-copy")
    for n, content in enumerate((b"caf\xe9,1\n", b"", bytes(9), b'"' + b"a" * 2**18, b"h\n\na,b\n",
                                 f"{header}\n\na,test\n".encode())):
        (tmp_path / f"a/{n}").mkdir()
        (tmp_path / f"a/{n}/result.csv").write_bytes(content)
    evaluate.gather_results(tmp_path, ["a", "b"], ["test", "test_c"], ["trained", "raw"])
    assert (tmp_path / "results.csv").read_text().splitlines() == [header, *table]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [], "category test set method image AUROC pixel AUROC AUPRO s/image".split(),
        "a test trained 60.0% 80.0% 40.0% 1.500".split(),
        "b test trained 80.0% undefined 60.0% 2.500".split(),
        "mean test trained 70.0% 80.0% 50.0% 2.000".split(),
        "a test raw 50.0% 90.0% undefined 1.000".split(),
        "b test_c trained 70.0% 60.0% 50.0% 1.000".split()]


# ---- evaluate.py: pictures ----------------------------------------------------------------------
def strip(width, *texts):
    """24 white rows with black texts (x, y, text) as Pillow draws them; "ma": x is the middle."""
    image = Image.new("RGB", (width, 24), "white")
    for x, y, text, *anchor in texts:
        ImageDraw.Draw(image).text((x, y), text, "black", font_size=12, anchor=(*anchor, None)[0])
    return np.array(image, dtype=float)


def near(cell, picture):
    """Is the picture (H, W, 3), made to fit into 160 × 160 pixels, what the cell begins with?"""
    shown = ImageOps.contain(Image.fromarray(picture.astype(np.uint8)), (160, 160))
    shown = np.array(shown, dtype=float)
    return abs(cell[:shown.shape[0], :shown.shape[1]] - shown).mean() < 2


def colours(level):
    """(H, W, 3): from half a threshold to one and a half, from dark to glowing."""
    stops = np.linspace(0.5, 1.5, 5)
    return np.stack([np.interp(level, stops, c) for c in DARK_TO_GLOWING.T], axis=-1)


def check_pictures(folder, names, paths, maps, threshold, shown, masks=()):
    """scores.csv, the heatmaps of these names, and the columns `shown` of overview.png.

    The table begins with the most anomalous. A heatmap is the image with its own map: clear below
    0.9, opaque to 0.6 above 1.1 thresholds. Without a threshold (NaN) the largest value is at 1.5.
    Rows of the overview: image, mask if there are masks, map, heatmap; below them the colours.
    """
    table = rows(folder / "scores.csv")
    assert list(table[0]) == ["path", "folder", "score", "is_anomalous"]
    assert table == sorted(table, key=lambda row: -float(row["score"])) and len(table) == len(paths)
    found = {row["path"]: row for row in table}
    scale = maps.max() / 1.5 if math.isnan(threshold) else threshold
    columns = {}
    for name, path, anomaly_map, score in zip(names, paths, maps, image_scores(maps)):
        row, heatmap = found[str(path)], pixels(folder / "heatmaps" / name)
        assert row["folder"] == path.parent.name
        rounding = 5e-3 if score < 1e-3 else 0  # cdist, of a vector to itself
        assert float(row["score"]) == pytest.approx(score, rel=5e-3, abs=rounding)
        assert row["is_anomalous"] == ("" if math.isnan(threshold) else str(score > threshold))
        size = heatmap.shape[1::-1]
        image, level = pixels(path, size), enlarged(anomaly_map, size) / scale
        opacity = np.interp(level, (0.9, 1.1), (0, 0.6))[..., None]
        assert abs(heatmap - image * (1 - opacity) - colours(level) * opacity).mean() < 1
        columns[path] = [image, colours(level), heatmap]
    assert len(list(folder.rglob("heatmaps/**/*.png"))) == len(paths)
    for path, mask in zip(shown, masks):
        columns[path].insert(1, mask)
    sheet, count = pixels(folder / "overview.png"), len(columns[shown[0]])
    bottom = 24 + 164 * count
    assert sheet.shape[:2] == (bottom + 48, 164 * max(3, len(shown)))
    for x, path in enumerate(shown):
        column = sheet[:, 164 * x:164 * (x + 1)]
        title = f"{path.parent.name}/{path.name}"[-16:] + f" {float(found[str(path)]['score']):.3g}"
        assert np.array_equal(column[:24], strip(164, (4, 4, title)))
        assert all(near(column[24 + 164 * y:], picture) for y, picture in enumerate(columns[path]))
    ramp, right = sheet[bottom:bottom + 24, 24:344], sheet[bottom:bottom + 24, 348:]
    assert abs(ramp - colours(np.linspace(0.5, 1.5, 320))).max() < 2
    text = "no threshold" if math.isnan(threshold) else "threshold in the middle"
    assert np.array_equal(right, strip(right.shape[1], (0, 4, text)))
    ticks = [(24 + 160 * n, 4, f"{(0.5 + n / 2) * scale:.3g}", "ma") for n in range(3)]
    below = sheet[bottom + 24:]
    assert (below[:5, [24, 184, 344]] == 0).all()
    assert np.array_equal(below[6:], strip(sheet.shape[1], *ticks)[6:])


@pytest.mark.parametrize("grid", [2, 5, 6, 7, 16])
def test_the_surroundings_of_a_patch_lie_in_the_image(grid):
    """Also where the image has fewer patches than are shown around one."""
    model = SimpleNamespace(grid=grid, config=SimpleNamespace(patch_size=4))
    for place in range(grid**2):
        for cell in evaluate.framed(torch.ones(3, 4 * grid, 4 * grid), place, model):
            assert set(np.unique(np.array(cell)[..., 0])) == {255}  # white, and the red frame


def framed_place(cell, side):
    """The place that the red frame in a cell of side × side places surrounds."""
    red = (cell == (255, 0, 0)).all(axis=2)
    assert red.any()
    return tuple(round((where.min() + 1) * side / 160) for where in np.nonzero(red))


def surroundings(picture, place):
    """The 7 × 7 patches around a place, or as near as the border allows; its place in them."""
    top, left = (min(max(i - 3, 0), 9) for i in place)
    part = picture[4 * top:4 * top + 28, 4 * left:4 * left + 28]
    return part, (place[0] - top, place[1] - left)


def check_nearest(folder, paths, method, whole=True):
    """nearest.png: for each image the worst patch, its drawing, the normal patch, each framed.

    The distance between the two patches that are framed is the one that the title names. It is the
    largest of the image's map if the memory is whole, and more if vectors of it are missing.
    """
    normal = sorted(GOOD.iterdir())
    found, pictures = vectors([*paths, *normal], method), drawn(paths)
    queries, memory = found[:len(paths)], found[len(paths):]
    sheet, farther = pixels(folder / "nearest.png"), []
    titles = ["image", "worst patch", "drawn from R", "nearest normal", "in its image"]
    titles = [title for title in titles if method != "raw" or title != "drawn from R"]
    assert sheet.shape == (212 * len(paths), 164 * len(titles), 3)
    for n, (path, anomaly_map) in enumerate(zip(paths, distances(queries, memory))):
        row = sheet[212 * n:212 * (n + 1)]
        cells = [row[48:208, 164 * x:164 * x + 160] for x in range(len(titles))]
        for x, title in enumerate(titles):
            assert np.array_equal(row[24:48, 164 * x:164 * x + 160], strip(160, (4, 0, title)))
        worst, place = framed_place(cells[0], 16), framed_place(cells[-1], 16)
        apart = np.linalg.norm(queries[n][worst] - memory[(slice(None), *place)], axis=1)
        number, = [m for m, file in enumerate(normal) if np.array_equal(row[:24], strip(
            row.shape[1], (4, 4, f"{path.parent.name}/{path.name}: worst patch at distance "
                                 f"{apart[m]:.3g} from normal {file.name}")))]
        farther.append(apart[number] / anomaly_map.max())
        image, chosen = pixels(path, (64, 64)), pixels(normal[number])
        shown = [(image, worst), surroundings(image, worst), surroundings(pictures[n], worst),
                 surroundings(chosen, place), (chosen, place)]
        if method == "raw":
            del shown[2]
        for cell, (picture, spot) in zip(cells, shown, strict=True):
            assert framed_place(cell, len(picture) // 4) == spot
            large = np.array(Image.fromarray(picture.astype(np.uint8)).resize((160, 160)))
            assert abs(cell - large)[(cell != (255, 0, 0)).any(axis=2)].mean() < 1
    assert farther == pytest.approx(np.ones(len(paths)), rel=1e-3) if whole else min(farther) > 1.01


@pytest.mark.parametrize("method", ["trained", "raw", "reconstruction"])
def test_an_evaluation_by_another_route(workspace, monkeypatch, capsys, method):
    """Scores, metrics, tables, pictures and all that is printed; read in parts of 4, 3 s each.

    Among the good images are copies of a defective one, a false alarm, and, in either part, of
    normal ones. The decoder draws less red than none, and more green and blue than there can be.
    """
    shutil.copy(TEST / "dent/000.png", TEST / "good/002.png")
    for number in (0, 3):
        shutil.copy(GOOD / f"00{number}.png", TEST / f"good/00{number}.png")
    content = checkpoint()
    content["model"]["decoder.V2.bias"] += torch.tensor([-0.6, 0.6, 0.6]).repeat_interleave(16)
    torch.save(content, CHECKPOINT)
    paths = sorted(TEST.rglob("*.png"))
    bad = np.array([path.parent.name == "dent" for path in paths])
    masks = [pixels(MASKS / f"{path.stem}_mask.png") * (path.parent.name == "dent")
             if (MASKS / f"{path.stem}_mask.png").exists() else np.zeros((64, 64, 3))
             for path in paths]
    assert evaluate.PART == 32  # at once in memory, as docs/cost.md says
    monkeypatch.setattr(evaluate, "PART", 4)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=itertools.count(0, 3).__next__))
    parts, states = watch(monkeypatch, evaluate, "read_readable"), random_states()
    built = watch(monkeypatch, PatchAE, "build_memory")
    run(evaluate.main, "--method", method)
    assert random_states() == states
    assert [len(part) for (part, *_), _ in parts] == [4, 2]
    assert len(built) == (method != "reconstruction")
    out, err = capsys.readouterr()
    maps, folder = anomaly_maps(paths, method), Path("runs/part", method)
    scores, large = image_scores(maps), np.stack([enlarged(one, (64, 64)) for one in maps])
    truth = np.stack(masks)[..., 0] > 0
    threshold = math.nan
    if method == "trained":
        threshold = np.quantile(checkpoint()["normal_scores"], 0.99)
    result, = rows(folder / "result.csv")
    assert rows("runs/results.csv") == [result]
    metrics = [float(result[name]) for name in ("image_auroc", "pixel_auroc", "aupro")]
    assert metrics == pytest.approx([roc_auc_score(bad, scores), roc_auc_score(
        truth.ravel(), large.ravel()), aupro_by_hand(truth, large)], abs=1e-3) and metrics[0] < 1
    assert float(result["threshold"]) == pytest.approx(threshold, nan_ok=True)
    assert list(result.values()) == ["part", "test", method, *map(str, metrics), "1.0",
                                     result["threshold"], "0", "resnet18", "random"]
    *lines, _, header, row = out.splitlines()
    alarms = scores > threshold
    assert lines[-2:] == [
        "part: 2 images of test/ are identical to normal training images",
        f"part test: above the threshold {alarms[~bad].sum()} of 4 good and {alarms[bad].sum()} "
        "of 2 defective images"] if method == "trained" else lines[1:] == [
        "part: 2 images of test/ are identical to normal training images"]
    assert row.split() == ["part", "test", method, *(f"{m:.1%}" for m in metrics), "1.000"]
    assert err == ""
    shown = [2, 3, 0, 1]
    check_pictures(folder, [path.relative_to(TEST) for path in paths], paths, maps, threshold,
                   [paths[n] for n in shown], [masks[n] for n in shown])
    ranked = sorted(range(6), key=lambda n: (not bad[n], -scores[n]))
    explained = [n for n in ranked if bad[n] or alarms[n]]
    if method == "reconstruction":
        assert not (folder / "nearest.png").exists()
    else:
        check_nearest(folder, [paths[n] for n in explained], method)


def test_scores_of_any_size_are_ranked_as_numbers(workspace):
    """As texts 9 would come before 100, and 1e-05 before 2."""
    levels, paths = np.array([9, 1e-5, 100, 2]), sorted(TEST.rglob("*.png"))
    maps = np.broadcast_to(levels[:, None, None], (4, 16, 16)).astype(np.float32)
    evaluate.write_results(Path("out"), paths, torch.tensor(maps), 10, [2, 0], [], iter)
    names = [path.relative_to(TEST) for path in paths]
    check_pictures(Path("out"), names, paths, maps, 10, [paths[2], paths[0]])


def test_only_the_pictures_of_the_overview_stay_in_memory(workspace, monkeypatch):
    """Those of a thousand large photographs would fill it."""
    draw, drawn, most = evaluate.heat_pictures, [], []

    def draw_and_count(*arguments):
        most.append(sum(picture() is not None for picture in drawn))
        pictures = draw(*arguments)
        drawn.extend(map(weakref.ref, pictures))
        return pictures

    monkeypatch.setattr(evaluate, "heat_pictures", draw_and_count)
    paths = [TEST / "dent/000.png"] * 20
    evaluate.write_results(Path("out"), paths, torch.rand(20, 16, 16), 1, [0, 7], [], iter)
    assert len(drawn) == 60 and max(most) <= 3 * 3  # of the two, and of the one before


def test_what_is_explained_by_hand():
    """The worst of each type, then other defective images, six; then good ones above 8."""
    scores = np.array([3, 7.5, 7, 6, 5, 4, 9, 2, 10, 8])
    kinds = ["dent"] * 7 + ["dirt", "good", "good"]
    assert evaluate.choose_explained(scores, kinds, 8) == [6, 7, 1, 2, 3, 4, 8]
    assert evaluate.choose_explained(scores, kinds, math.nan) == [6, 7, 1, 2, 3, 4]


def test_predictions(workspace, capsys):
    """Images of any depth, shape and name, one of them turned by its EXIF data, one broken: twelve
    are shown, six explained.

    What lies in --out is not scored. A second prediction has a folder of its own, and an image is
    judged as it is among others.
    """
    names = {"dent.png": "dent.png", "a.jpg": "a.jpg.png", "a.jpg.png": "a.jpg.png.png",
             "sub/a.png": "sub/a.png", "turned_by_90.PNG": "turned_by_90.PNG.png", "z.png": "z.png",
             **{f"sub/{n}.png": f"sub/{n}.png" for n in range(8)}}
    Path("photos/sub").mkdir(parents=True)
    shutil.copytree("runs", "photos/runs")
    for n, name in enumerate(names):
        normal = (pixels(GOOD / "000.png") * (n + 1) + pixels(GOOD / "001.png") * (16 - n)) / 17
        image = Image.fromarray((normal * (1 if n < 9 else 1 - n / 50)).astype(np.uint8))
        if name == "turned_by_90.PNG":
            turn = Image.Exif()
            turn[0x0112] = 6
            image.resize((900, 1500)).save(f"photos/{name}", exif=turn)
        else:
            image.save(f"photos/{name}")
    shutil.copy(TEST / "dent/000.png", "photos/dent.png")
    shutil.copy(GOOD / "003.png", "photos/z.png")
    Path("photos/broken.png").write_bytes(b"no image")
    Path("photos/runs/part/old.png").write_bytes(b"no image")
    shutil.move("data", "moved")  # the checkpoint is enough
    argv = "--category all --device cpu --out photos/runs --predict".split()
    assert evaluate.main([*argv, "photos"]) == 2
    out, err = capsys.readouterr()
    shutil.move("moved", "data")
    assert re.fullmatch(r"error: photos.broken.png: not a readable image .*\n", err)
    paths, folder = [Path("photos", name) for name in names], Path("photos/runs/part/predictions")
    maps, threshold = anomaly_maps(paths), np.quantile(checkpoint()["normal_scores"], 0.99)
    table = rows(folder / "photos/scores.csv")
    ranked, words = [Path(row["path"]) for row in table], {"True": "anomalous", "False": "normal"}
    assert Path("photos/turned_by_90.PNG") in ranked[:12]  # a name that is cut in its title
    check_pictures(folder / "photos", names.values(), paths, maps, threshold, ranked[:12])
    check_nearest(folder / "photos", ranked[:6], "trained")
    assert Image.open(folder / "photos/heatmaps/turned_by_90.PNG.png").size == (1024, 614)
    anomalous = (image_scores(maps) > threshold).sum()
    assert 0 < anomalous < 12
    assert out.splitlines()[2] == "part: 1 images are identical to normal training images"
    assert [line.split() for line in out.splitlines()[3:]] == [
        *([f"{float(row['score']):.4f}", words[row["is_anomalous"]], row["path"]]
          for row in table[:12]),
        f"part: 14 images, {anomalous} anomalous; wrote {folder / 'photos'}".split()]
    twice = str(Path("photos/sub/a.png").resolve())
    assert evaluate.main([*argv, twice, "photos/sub", "photos/z.png"]) == 0
    second = "photos-sub-a.png+photos-sub+photos-z.png"
    again = rows(folder / second / "scores.csv")
    assert again == [row for row in table if "sub" in row["path"] or "z.png" in row["path"]]
    two = ["photos/z.png", "photos/broken.png"]  # an image that cannot be read stops no method
    assert evaluate.main([*argv, *two, "--method", "raw", "trained"]) == 2
    out, err = capsys.readouterr()
    assert (out.count("undecided"), len(err.splitlines())) == (2, 1)
    assert {path.name for path in folder.iterdir()} == {
        "photos", second, "photos-z.png+photos-broken.png"}
    other, = folder.with_name("predictions-raw").iterdir()
    assert other.name == "photos-z.png+photos-broken.png"
    run(train.main, "--skip-finished", "--memory-fraction", 0.01, "--threshold-images", 0)
    run(evaluate.main, "--predict", TEST)
    folder = Path("runs/part/predictions/data-part-test")
    table = rows(folder / "scores.csv")
    assert {row["is_anomalous"] for row in table} == {""}
    check_nearest(folder, [Path(row["path"]) for row in table], "trained", whole=False)


# ---- terminals, devices, importing, what is written about the scripts ---------------------------
def test_progress_on_a_terminal(monkeypatch, capsys):
    """Per cent and the seconds left, by a clock that says 2 s for each item."""
    clock = itertools.count(0, 2).__next__
    monkeypatch.setattr(images, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert [*images.progress("part", range(4)), *images.progress("part", [])] == [0, 1, 2, 3]
    assert "".join(capsys.readouterr()) == "".join(
        f"\rpart: {done}   " for done in ("25 %, 6 s left", "50 %, 4 s left", "75 %, 2 s left",
                                          "100 %, 0 s left")) + "\n"


def test_where_data_come_from_and_where_results_go(tmp_path, monkeypatch, capsys):
    """Three categories on a terminal: one that fails leaves the others, and the exit code is 2.

    Nothing is written but to --out, and a mean is printed of what was asked for.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for name, count in (("a", 2), ("b", 3), ("c", 4)):
        draw_dataset(tmp_path / "set", name, train=count, good=1, bad=1)
    Path("set/c/train/good/broken.png").write_bytes(b"no image")
    out_folder = Path("new/results")
    options = ["--data", "set", "--out", str(out_folder), "--device", "cpu", "--category"]
    assert train.main([*options, "b/", "c", "a", "b", *TINY, "--steps", "0"]) == 2
    assert {path.name for path in out_folder.iterdir()} == {"a", "b"}
    assert [len(checkpoint(out_folder / name / "checkpoint.pt")["images"])
            for name in "ab"] == [2, 3]
    out, terminal = capsys.readouterr()
    assert re.findall(r"(\w): (?:\d normal|wrote)", out) == ["b", "b", "a", "a"]
    assert evaluate.main([*options, "all"]) == 2
    out, error = capsys.readouterr()
    terminal += error
    line, = [line for line in error.splitlines() if line.startswith("error")]
    assert str(out_folder / "c/checkpoint.pt") in line
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["a", "b", "mean"]
    assert evaluate.main([*options, "b"]) == 0
    out, error = capsys.readouterr()
    assert out.splitlines()[-2].startswith("category") and out.splitlines()[-1].startswith("b ")
    assert [row["category"] for row in rows(out_folder / "results.csv")] == ["a", "b"]
    assert evaluate.main([*options[2:4], "--category", "all", "--predict", "set/c/test"]) == 0
    terminal += error + capsys.readouterr().err
    assert all((out_folder / name / "predictions/set-c-test/scores.csv").exists() for name in "ab")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "new"}
    for what in ("b", "a", "b test trained", "b trained", "a trained"):
        assert re.search(rf"\r{what}: 100 %, 0 s left   \n", terminal)


@pytest.mark.parametrize("there, asked, chosen", [
    ((), "auto", "cpu"), (("cuda",), "auto", "cuda"), (("mps",), "auto", "cpu"),
    (("mps", "cuda"), "mps", "mps"), (("cuda",), "cpu", "cpu"), (("mps",), "cuda", None),
    (("cuda",), "mps", None)])
def test_the_device(monkeypatch, capsys, there, asked, chosen):
    """The one asked for, or an error; auto never takes an Apple GPU. It is said; cuDNN is exact."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    for name in ("allow_tf32", "deterministic"):  # whatever it was before
        monkeypatch.setattr(torch.backends.cudnn, name, name == "allow_tf32")
    if chosen is None:
        with pytest.raises(patchae.UserError, match=f"--device {asked}: .*--device auto"):
            patchae.choose_device(asked)
        return
    assert patchae.choose_device(asked) == torch.device(chosen)
    assert capsys.readouterr().out.startswith(f"device: {chosen} (")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32


def test_everything_is_computed_on_the_device(workspace, monkeypatch):
    """Meta, a device without numbers, stands for a GPU: it refuses tensors of the CPU."""
    for name, value in (("cpu", lambda t: torch.zeros(t.shape)), ("item", lambda t: 0),
                        ("__bool__", lambda t: True)):
        monkeypatch.setattr(torch.Tensor, name, lambda t, *_, real=getattr(torch.Tensor, name),
                            value=value: value(t) if t.is_meta else real(t))
    monkeypatch.setattr(patchae, "choose_device", lambda name: torch.device("meta"))
    names = ("training_loss", "nearest_distance", "patch_error")
    calls = [watch(monkeypatch, patchae, name) for name in names]
    shutil.copytree("runs", "trained/runs")
    run(train.main, "--steps", 1, "--threshold-images", 1)
    evaluated, image = ("--out", "trained/runs"), TEST / "dent/000.png"
    run(evaluate.main, *evaluated)
    run(evaluate.main, *evaluated, "--predict", image, "--method", *patchae.METHODS)
    tensors = [tensor for one in calls for (arguments, _) in one for argument in arguments
               for tensor in (argument if isinstance(argument, list) else [argument])]
    assert all(calls) and all(tensor.is_meta for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("name", ["patchae.py", "train.py", "evaluate.py", "data/images.py",
                                  "data/files.py", "data/make_toy.py"])
def test_importing_has_no_effect(tmp_path, monkeypatch, capsys, name):
    """Nothing printed or written; the random numbers and the number of threads as they were."""
    monkeypatch.chdir(tmp_path)
    before = random_states(), torch.get_num_threads()
    runpy.run_path(str(ROOT / name), run_name="imported")
    assert before == (random_states(), torch.get_num_threads())
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_the_demo_draws_its_set_and_needs_no_download(tmp_path, monkeypatch, capsys):
    """Both scripts with --demo; fewer and smaller images to save time."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=AssertionError))
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):
        monkeypatch.setattr(make_toy, name, count)
    for name, (draw, defects) in make_toy.CATEGORIES.items():
        monkeypatch.setitem(make_toy.CATEGORIES, name, (draw, defects[:1]))
    built = watch(monkeypatch, PatchAE, "build_memory")
    clock = SimpleNamespace(monotonic=lambda: 1000 * len(built))  # only this takes time
    monkeypatch.setattr(evaluate, "time", clock)
    argv = ["--demo", "--data", str(tmp_path / "toy"), "--out", str(tmp_path / "runs"), "--device",
            "cpu"]
    assert train.main([*argv, "--steps", "1", "--image-size", "64"]) == 0
    shutil.rmtree(tmp_path / "toy/flange")  # whoever needs it draws it
    assert evaluate.main(argv) == 0
    table = rows(tmp_path / "runs/results.csv")
    found = [(row["category"], row["test_set"], row["method"]) for row in table]
    assert all((row["threshold"] == "nan") == (row["method"] == "raw") for row in table)
    assert sorted(found) == sorted(itertools.product(
        ["felt", "flange"], ["test", "test_faint"], ["raw", "trained"]))
    config = checkpoint(tmp_path / "runs/felt/checkpoint.pt")["config"]
    assert config == dataclasses.asdict(dataclasses.replace(DEMO, steps=1, image_size=64))
    assert capsys.readouterr().out.count("mean") == 4
    assert {row["seconds_per_image"] for row in table} == {"0.0"}  # scoring alone is timed
    assert len(built) == 2 + 4  # by train.py; for each method once, whatever the test sets


def quoted_commands():
    """Every `python ...` in a code block of the READMEs and of docs/, as the words after python."""
    for path in (ROOT / "README.md", ROOT / "data/README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for part in re.split(r"&&|;|\n", block.replace("\\\n", " ")):
                if command := re.match(r"\s*(?:\w+=\S* )*(?:\S*[\\/])?(?:python3?|py) (.*)", part):
                    yield shlex.split(command[1], comments=True)


def test_quoted_commands_are_understood(monkeypatch):
    """The demo, one's own images, the tests and the toy set are among them. The scripts know the
    options; of pytest the files are there; of other scripts --help works."""
    commands = list(quoted_commands())
    for wanted in ("train.py --demo", "evaluate.py --demo", "--predict", "-m pytest", "make_toy"):
        assert any(wanted in " ".join(words) for words in commands)
    for words in commands:
        if words[0] in ("train.py", "evaluate.py"):
            {"train.py": train, "evaluate.py": evaluate}[words[0]].parse(words[1:])
        elif words[0] == "-m":
            assert words[1] in ("venv", "pip", "pytest")
            files = [word.split("::")[0] for word in words[2:] if word.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files)
        elif words[0] != "tests/peers.py":  # needs packages of its own
            monkeypatch.setattr(sys, "argv", [words[0], "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """The lines as they stand there, on a smaller toy set and with fewer steps; what they print."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    draw_dataset(Path("data/toy"), "flange", bad=3)
    monkeypatch.setattr(patchae, "DEMO", dataclasses.replace(DEMO, steps=4, image_size=64))
    exec(code, {})
    printed = capsys.readouterr().out
    model = PatchAE.load("flange.pt")
    assert len(model.images) == 6 and model.config.steps == 4
    verdicts = [word == "True" for word in re.findall("True|False", printed)]
    paths = sorted(Path("data/toy/flange/test").rglob("*.png"))[:len(verdicts)]
    image = torch.tensor(np.stack([pixels(path) for path in paths])).permute(0, 3, 1, 2)
    scores = image_scores(model.anomaly_maps(image.byte()).numpy())
    assert verdicts == list(scores > np.quantile(model.normal_scores, 0.99)) and len(verdicts) == 3
