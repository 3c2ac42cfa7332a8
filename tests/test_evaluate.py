"""evaluate.py: scores, metrics, thresholds, tables, pictures, predictions; and what scripts share.

- Labelled sets and predictions are scored on one path. Each image is decoded once for its score
  and once for its picture. Numbers are those that NumPy and scikit-learn find by another route.
- `raw` is the model as it was before training, built again from the checkpoint's own Config.
- scores.csv is removed first and written last. Only heatmaps of the same folder are deleted.
- Heatmaps are called RANK_TYPE_STEM.png. The sheet shows why an image is called anomalous.
- A prediction never replaces another. It goes on without damaged images, and ends with exit code 2.
- results.csv has one row for each category, test set and method.
- Bad input, a full disk, no memory: one line. Any console shows any name. No terminal is needed.
The oracles take vectors from the model; all else is NumPy, scikit-learn, Pillow and this file.
"""
import csv
import dataclasses
import io
import itertools
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (CHECKPOINT, GOOD, MASKS, NOISE, OPTIONS, ROOT, TEST, TINY, contents,
                      draw_dataset, fails, random_states, save, watch)
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import evaluate
import patchae
import train
from data import make_toy
from patchae import RECIPES, PatchAE, UserError

TRAINED = Path("runs/part/trained")
COLOURS = np.array([[0, 0, 60], [90, 20, 130], [220, 60, 60], [255, 160, 30], [255, 255, 170]])


def run(*argv, code=0):
    """evaluate.main must end with this code, given OPTIONS and these."""
    assert evaluate.main([*OPTIONS, *(str(word) for word in argv)]) == code


def rows(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))


def pixels(path, size=None):
    """An image file by Pillow alone, (H, W, 3) in 0 to 255."""
    image = Image.open(path).convert("RGB")
    return np.array(image.resize(size, Image.BILINEAR) if size else image, dtype=float)


# ---- the oracle: vectors by the model, all else by NumPy, scikit-learn and Pillow ----------------
def as_images(paths):
    """Image files as (N, 3, 64, 64) in [0, 1]."""
    image = np.stack([pixels(path, (64, 64)) for path in paths]) / 255
    return torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)


def model_of(method):
    """The model of the checkpoint, or as it was before training."""
    model = PatchAE.load(CHECKPOINT)
    return patchae.build_model(model.config) if method == "raw" else model


@torch.no_grad()
def vectors(paths, method):
    """What the method compares of image files, (N, 16, 16, C)."""
    return model_of(method).represent(as_images(paths)).permute(0, 2, 3, 1).numpy()


def distances(queries, memory):
    """(N, 16, 16): of each vector (N, 16, 16, C) the distance to the nearest in the memory."""
    nearest = NearestNeighbors(n_neighbors=1).fit(memory.reshape(-1, memory.shape[-1]))
    return nearest.kneighbors(queries.reshape(-1, memory.shape[-1]))[0].reshape(-1, 16, 16)


@torch.no_grad()
def anomaly_maps(paths, method):
    """(N, 16, 16) of image files; and the scores of the normal images, each against the others."""
    normal = sorted(GOOD.iterdir())
    if method == "reconstruction":
        model, image = model_of(method), as_images([*paths, *normal])
        error = (patchae.unpatchify(model(image), 4) - image).numpy()**2
        maps = error.reshape(-1, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))
        return maps[:len(paths)], image_scores(maps[len(paths):])
    found = vectors([*paths, *normal], method)
    known = found[len(paths):]
    others = [distances(known[[n]], np.delete(known, n, axis=0)) for n in range(len(known))]
    return distances(found[:len(paths)], known), image_scores(np.concatenate(others))


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


# ---- metrics ------------------------------------------------------------------------------------
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


def test_what_cannot_be_measured_is_said(workspace, capsys):
    """A defective image without a mask is left out; a mask without a defect is named; with one
    class alone, or without any mask, there is no number."""
    Image.new("L", (64, 64)).save(MASKS / "000_mask.png")
    run()
    assert "part test trained: 1 masks show no defect: 000_mask.png" in capsys.readouterr().out
    (MASKS / "000_mask.png").unlink()
    run()
    out = capsys.readouterr().out
    assert "1 defective images have no mask, left out of pixel metrics; expected" in out
    found, = rows("runs/results.csv")
    kept = sorted(path for path in TEST.rglob("*.png") if path != TEST / "dent/000.png")
    maps, _ = anomaly_maps(kept, "trained")
    truth = [pixels(MASKS / "001_mask.png")[..., 0] > 0, *np.zeros((2, 64, 64), bool)]
    large = np.stack([enlarged(one, (64, 64)) for one in maps])
    assert float(found["pixel_auroc"]) == pytest.approx(
        roc_auc_score(np.ravel(truth), large.ravel()), abs=1e-3)
    shutil.rmtree(MASKS.parent)
    for kind in ("good", "dent"):
        shutil.move(TEST / kind, "moved")
        run()
        assert capsys.readouterr().out.splitlines()[-1].split()[3:6] == ["undefined"] * 3
        found, = rows("runs/results.csv")
        assert [found[name] for name in ("image_auroc", "pixel_auroc", "aupro")] == ["nan"] * 3
        shutil.move("moved", TEST / kind)


# ---- an evaluation ------------------------------------------------------------------------------
def colours(level):
    """(H, W, 3): from half a threshold to one and a half, from dark to glowing."""
    stops = np.linspace(0.5, 1.5, 5)
    return np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)


def heatmap_of(path, anomaly_map, threshold, size):
    """The image with its map: clear below 0.9 thresholds, opaque to 0.6 above 1.1."""
    level = enlarged(anomaly_map, size) / threshold
    opacity = np.interp(level, (0.9, 1.1), (0, 0.6))[..., None]
    return pixels(path, size) * (1 - opacity) + colours(level) * opacity


def check_tables(folder, paths, maps, threshold):
    """scores.csv, the most anomalous first, and the heatmap that each row names, all of them."""
    table, scores = rows(folder / "scores.csv"), image_scores(maps)
    assert list(table[0]) == ["path", "type", "score", "is_anomalous", "heatmap"]
    assert sorted(row["path"] for row in table) == sorted(map(str, paths))
    ranked = [paths.index(Path(row["path"])) for row in table]
    assert (np.diff(scores[ranked]) < 0.02).all()  # of copies of normal images, only rounding
    for rank, (row, n) in enumerate(zip(table, ranked), 1):
        path = paths[n]
        assert float(row["score"]) == pytest.approx(scores[n], rel=5e-3, abs=2e-2)
        assert row["is_anomalous"] == str(scores[n] > threshold)
        assert row["heatmap"] == f"{rank:04d}_{row['type']}_{path.stem}"[:60] + ".png"
        heatmap = pixels(folder / "heatmaps" / row["heatmap"])
        expected = heatmap_of(path, maps[n], threshold, heatmap.shape[1::-1])
        assert row["type"] == path.absolute().parent.name and abs(heatmap - expected).mean() < 1
    assert sorted(os.listdir(folder / "heatmaps")) == [row["heatmap"] for row in table]
    return [paths[n] for n in ranked]


def framed_place(cell, side):
    """The place that the red frame in a cell of side × side places surrounds."""
    red = (cell == (255, 0, 0)).all(axis=2)
    assert red.any()
    return tuple(round(where.min() * side / 160) for where in np.nonzero(red))


def around(picture, place):
    """The 7 × 7 patches around a place, or as near as the border allows; its place in them."""
    top, left = (min(max(i - 3, 0), 9) for i in place)
    part = picture[4 * top:4 * top + 28, 4 * left:4 * left + 28]
    return part, (place[0] - top, place[1] - left)


@torch.no_grad()
def check_sheet(path, shown, maps, threshold, method, masks=None):
    """Row by row: the worst patch, what the decoder draws there, the nearest normal patch.

    The distance between the two patches that are framed is the one that the title names.
    """
    sheet, normal = pixels(path), sorted(GOOD.iterdir())
    assert sheet.shape == (20 + 188 * len(shown) + 20, 7 * 164 + 4, 3)
    model = model_of(method)
    memory = vectors(normal, method)
    for n, (image_path, anomaly_map) in enumerate(zip(shown, maps)):
        row = sheet[20 + 188 * n:208 + 188 * n]
        cells = [row[24:184, 4 + 164 * x:164 + 164 * x] for x in range(7)]
        image = pixels(image_path, (64, 64))
        drawn = patchae.unpatchify(model(as_images([image_path])), 4).clamp(0, 1)
        drawn = 255 * drawn[0].permute(1, 2, 0).numpy()
        worst, place = framed_place(cells[0], 16), framed_place(cells[6], 16)
        assert worst == divmod(anomaly_map.argmax(), 16)
        query = vectors([image_path], method)[0][worst]
        shown_image = [abs(np.array(Image.open(path).resize((160, 160)), dtype=float) - cells[6])
                       .mean() for path in normal]
        chosen = normal[np.argmin(shown_image)]
        apart = np.linalg.norm(query - memory, axis=-1)
        assert apart[(np.argmin(shown_image), *place)] == pytest.approx(apart.min(), rel=1e-4)
        title = f"{image_path.parent.name}/{image_path.name}: score "
        text = evaluate.text_line(1152, [(4, title)]).permute(1, 2, 0).numpy()
        assert (text < 128).any() and (row[:20][text < 128] < 128).all()
        mask = np.full((64, 64, 3), 255.) if masks is None else masks[n]
        overlay = heatmap_of(image_path, anomaly_map, threshold, (64, 64))
        expected = [(image, worst), (mask, None), (overlay, None), around(image, worst),
                    around(drawn, worst), around(pixels(chosen), place), (pixels(chosen), place)]
        for cell, (picture, spot) in zip(cells, expected):
            assert spot is None or framed_place(cell, len(picture) // 4) == spot
            large = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((160, 160))
            assert abs(cell - np.array(large))[(cell != (255, 0, 0)).any(axis=2)].mean() < 6
    ramp = sheet[-20:, 160:480]
    assert abs(ramp - colours(np.linspace(0.5, 1.5, 320))).max() < 2


@pytest.mark.parametrize("method", ["trained", "raw", "reconstruction"])
def test_an_evaluation_by_another_route(workspace, monkeypatch, capsys, method):
    """Scores, metrics, tables, pictures and all that is printed; read in parts of 5, 3 s each.

    Among the good images are copies of a defective one, a false alarm, and, in either part, of
    normal ones. Each image is decoded twice, each mask once.
    """
    shutil.copy(TEST / "dent/000.png", TEST / "good/003.png")
    for number in (2, 4):
        shutil.copy(GOOD / f"00{number}.png", TEST / f"good/00{number}.png")
    paths = sorted(TEST.rglob("*.png"))
    bad = np.array([path.parent.name == "dent" for path in paths])
    masks = [pixels(MASKS / f"{path.stem}_mask.png") if one else np.zeros((64, 64, 3))
             for path, one in zip(paths, bad)]
    assert evaluate.PART == 32  # at once in memory, as docs/cost.md says
    monkeypatch.setattr(evaluate, "PART", 5)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=itertools.count(0, 3).__next__))
    parts, states = watch(monkeypatch, evaluate, "read_each"), random_states()
    opened = watch(monkeypatch, Image, "open")
    run("--method", method)
    assert random_states() == states and [len(part) for (part, *_), _ in parts] == [5, 2]
    decoded = [path for (path, *_), _ in opened]
    assert sorted(decoded) == sorted([*paths, *paths, *MASKS.iterdir()])
    out, err = capsys.readouterr()
    maps, normal_scores = anomaly_maps(paths, method)
    scores, large = image_scores(maps), np.stack([enlarged(one, (64, 64)) for one in maps])
    truth, threshold = np.stack(masks)[..., 0] > 0, np.quantile(normal_scores, 0.99)
    found, = rows("runs/results.csv")
    metrics = [float(found[name]) for name in ("image_auroc", "pixel_auroc", "aupro")]
    assert metrics == pytest.approx([roc_auc_score(bad, scores), roc_auc_score(
        truth.ravel(), large.ravel()), aupro_by_hand(truth, large)], abs=2e-3) and metrics[0] < 1
    assert float(found["threshold"]) == pytest.approx(threshold, rel=1e-3)
    assert list(found.values()) == ["part", "test", method, *map(str, metrics), str(6 / 7),
                                    found["threshold"], "0", "resnet18", "random"]
    *lines, _, header, row = out.splitlines()
    alarms = scores > threshold
    assert lines[-2:] == [
        f"part test {method}: 2 images are identical to normal training images",
        f"part test {method}: above the threshold {alarms[~bad].sum()} of 5 good and "
        f"{alarms[bad].sum()} of 2 defective images"]
    assert ("training saw these images" in out) == (method == "reconstruction")
    assert row.split() == ["part", "test", method, *(f"{m:.1%}" for m in metrics), "0.857"]
    assert err == "" and sorted(os.listdir(f"runs/part/{method}")) == [
        "heatmaps", "scores.csv", "sheet.png"]
    check_tables(Path("runs/part", method), paths, maps, threshold)
    shown = [2, 3, 0, 1, *(n for n in np.argsort(-scores) if n > 3 and alarms[n])]
    check_sheet(f"runs/part/{method}/sheet.png", [paths[n] for n in shown], maps[shown], threshold,
                method, [masks[n] for n in shown])


def test_raw_is_the_model_before_training(workspace, capsys):
    """From the same seed and weights; the file of the weights must still be there."""
    config = PatchAE.load(CHECKPOINT).config
    fresh = patchae.build_model(config)
    name, model, *_ = "part", PatchAE.load(CHECKPOINT)
    raw, maps_of, threshold = evaluate.prepare(name, model, "raw", 0.99)
    assert all(torch.equal(v, raw.state_dict()[k]) for k, v in fresh.state_dict().items())
    assert threshold == raw.threshold() and maps_of == raw.anomaly_maps
    assert torch.equal(raw.images, model.images) and raw.names == model.names
    model.config.weights = "gone.pth"
    model.save(CHECKPOINT)
    fails(capsys, evaluate.main, [*OPTIONS, "--method", "raw"], "--weights gone.pth")
    run()


def test_the_false_alarms_to_expect(workspace, capsys):
    """The rate is that of ten thousand detectors whose scores are independent and uniform."""
    model = PatchAE.load(CHECKPOINT)
    for quantile in (0.7, 0.99):
        _, _, threshold = evaluate.prepare("part", model, "trained", quantile)
        assert threshold == pytest.approx(np.quantile(model.normal_scores, quantile), rel=1e-4)
        said = re.search(r"threshold (.*), the (.*) quantile .* of 6 normal .* expect (.*)% false",
                         capsys.readouterr().out)
        uniform = np.quantile(np.random.rand(10**4, 6), quantile, axis=1)
        assert [float(part) for part in said.groups()] == pytest.approx(
            [threshold, quantile, 100 * (1 - uniform.mean())], abs=1)


def test_all_test_sets_and_what_is_left_alone(workspace, capsys, monkeypatch):
    """Each folder test* is scored. An older scores.csv is gone before anything is scored, and the
    new one comes last. Of what is in the folder only heatmaps of ours are deleted."""
    shutil.copytree("data/part/test/dent", "data/part/test_b/dent")
    for name in ("heatmaps/0009_dent_009.png", "heatmaps/10000_a_b.png", "heatmaps/my_0001.png",
                 "0001_a_b.png", "notes.txt"):
        save(NOISE, TRAINED / name, format="PNG")
    for folder in (TRAINED, Path("runs/part/trained-test_b")):
        folder.mkdir(exist_ok=True)
        (folder / "scores.csv").touch()
    seen = []
    score_files, write_table = evaluate.score_files, evaluate.write_table
    monkeypatch.setattr(evaluate, "score_files", lambda title, *a: (
        seen.append((title, list(Path("runs").rglob("scores.csv")))), score_files(title, *a))[1])
    monkeypatch.setattr(evaluate, "write_table", lambda path, *a: (
        seen.append((path, path.parent.joinpath("sheet.png").exists())), write_table(path, *a)))
    run()
    b = Path("runs/part/trained-test_b")
    assert seen == [("part test trained", [b / "scores.csv"]), (TRAINED / "scores.csv", True),
                    (Path("runs/results.csv"), False),
                    ("part test_b trained", [TRAINED / "scores.csv"]), (b / "scores.csv", True),
                    (Path("runs/results.csv"), False)]
    assert len(os.listdir(TRAINED / "heatmaps")) == 5
    assert (TRAINED / "heatmaps/my_0001.png").exists()
    assert (TRAINED / "0001_a_b.png").exists() and (TRAINED / "notes.txt").exists()
    assert [row["test_set"] for row in rows("runs/results.csv")] == ["test", "test_b"]


def test_results_of_all_categories(tmp_path, capsys):
    """A new row takes the place of its own and keeps the others; what was measured is printed in
    per cent, with its mean. A foreign table is no table of ours, and stays."""
    path, nan = tmp_path / "results.csv", math.nan
    table = [["b", "test", "trained", 0.8, nan, 0.6, 2.5, 3.5, 0, "resnet18", "random"],
             ["a", "test", "trained", 0.6, 0.8, 0.4, 1.5, 3.5, 0, "resnet18", "random"],
             ["a", "test", "raw", 0.5, 0.9, nan, 1.0, 2.5, 0, "resnet18", "random"],
             ["b", "test_c", "trained", 0.7, 0.6, 0.5, 1.0, 3.5, 0, "resnet18", "random"]]
    for row in [["a", "test", "raw", 0, 0, 0, 0, 0, 0, "", ""], *table]:
        evaluate.add_result(path, row)
    assert path.read_bytes().decode().split("\n") == [
        "category,test_set,method,image_auroc,pixel_auroc,aupro,seconds_per_image,threshold,seed,"
        "backbone,weights", *(",".join(map(str, table[n])) for n in (2, 1, 0, 3)), ""]
    evaluate.print_table(table)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [], "category test set method image AUROC pixel AUROC AUPRO s/image".split(),
        "a test raw 50.0% 90.0% undefined 1.000".split(),
        "b test trained 80.0% undefined 60.0% 2.500".split(),
        "a test trained 60.0% 80.0% 40.0% 1.500".split(),
        "mean test trained 70.0% 80.0% 50.0% 2.000".split(),
        "b test_c trained 70.0% 60.0% 50.0% 1.000".split()]
    for foreign in (b"caf\xe9,1\n", b"", b"a,b\n1,2\n"):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="results.csv: not a table of this version"):
            evaluate.add_result(path, table[0])
        assert path.read_bytes() == foreign


def test_what_the_sheet_shows():
    """Of a test set two of each type, the good ones first, then good ones above 8, at most twelve;
    of predictions the twelve first of the ranking."""
    scored = [SimpleNamespace(kind=kind, score=score) for kind, score in [
        ("dent", 3), ("dent", 7.5), ("dent", 9), ("Dirt", 2), ("good", 9), ("good", 8),
        ("good", 8.5), *(("good", 10 + n) for n in range(13))]]
    ranked = sorted(scored, key=lambda one: -one.score)
    shown = [scored.index(one) for one in evaluate.choose_shown(scored, ranked, 8, True)]
    assert shown == [4, 5, 3, 0, 1, *range(19, 7, -1)]
    assert evaluate.choose_shown(scored, ranked, 8, False) == ranked[:12]


# ---- predictions --------------------------------------------------------------------------------
def test_predictions(workspace, capsys):
    """Images of any depth, shape and name, one of them turned by its EXIF data, one broken, one
    given twice. What lies in the results is not scored."""
    names = ["dent.png", "a.jpg", "a.png", "sub/a.png", "turned.PNG", "z.png", "ü" * 70 + ".png",
             *(f"sub/{n}.png" for n in range(8))]
    for n, name in enumerate(names):
        normal = (pixels(GOOD / "000.png") * (n + 1) + pixels(GOOD / "001.png") * (16 - n)) / 17
        save(normal * (1 if n < 9 else 1 - n / 50), Path("photos", name))
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.open("photos/turned.PNG").resize((900, 1500)).save("photos/turned.PNG", exif=turn)
    shutil.copy(TEST / "dent/000.png", "photos/dent.png")
    shutil.copy(GOOD / "003.png", "photos/z.png")
    Path("photos/broken.png").write_bytes(b"no image")
    shutil.move("data", "moved")  # the checkpoint is enough
    shutil.move("runs", "photos/runs")
    argv = ["--out", "photos/runs", "--category", "all", "--predict", "photos",
            Path("photos/z.png").absolute()]
    fails(capsys, evaluate.main, [*OPTIONS, *argv], "photos/broken.png: not a usable image")
    run(*argv, code=2)
    out = capsys.readouterr().out
    shutil.move("photos/runs", "runs")
    shutil.move("moved", "data")
    assert [path.name for path in sorted(Path("runs/part").glob("pred*"))] == [
        "predictions", "predictions-2"]
    folder = Path("runs/part/predictions-2")
    for path in (folder, folder.with_name("predictions")):
        assert len(rows(path / "scores.csv")) == 15
    Image.open("photos/turned.PNG").transpose(Image.Transpose.ROTATE_270).save("photos/turned.PNG")
    paths = [Path("photos", name) for name in names]
    maps, normal_scores = anomaly_maps(paths, "trained")
    threshold = np.quantile(normal_scores, 0.99)
    ranked = check_tables(folder, paths, maps, threshold)
    check_sheet(folder / "sheet.png", ranked[:12], maps[[paths.index(p) for p in ranked[:12]]],
                threshold, "trained")
    heatmap, = [row["heatmap"] for row in rows(folder / "scores.csv") if "turned" in row["path"]]
    assert Image.open(folder / "heatmaps" / heatmap).size == (1024, 614)
    lines, table = out.splitlines(), rows(folder / "scores.csv")
    assert "part trained: 1 images are identical to normal training images" in lines
    words = {"True": "anomalous", "False": "normal"}
    assert [line.split() for line in lines[-14:-2]] == [
        [f"{float(row['score']):.4f}", words[row["is_anomalous"]], row["path"]]
        for row in table[:12]]
    anomalous = sum(row["is_anomalous"] == "True" for row in table)
    assert 0 < anomalous < 12 and lines[-2:] == [
        f"part trained: 15 images, {anomalous} anomalous",
        "part trained: wrote photos/runs/part/predictions-2"]


def test_a_prediction_never_replaces_another(workspace, capsys, monkeypatch):
    """--to goes anywhere, also beside a model that is read-only; a folder that is there stays as it
    is. The folder is made before the first image is scored."""
    Path("mine").mkdir()
    Path("mine/scores.csv").write_text("mine")
    before = contents("runs")
    for to in ("mine", "new/deep", "new/deep", "new/deep"):
        run("--predict", GOOD / "000.png", "--to", to)
    assert contents("runs") == before and Path("mine/scores.csv").read_text() == "mine"
    assert sorted(os.listdir("new")) == ["deep", "deep-2", "deep-3"]
    assert len(rows("mine-2/scores.csv")) == 1
    seen = []
    monkeypatch.setattr(evaluate, "score_files", lambda *_: seen.append(os.listdir("runs/part")))
    with pytest.raises(TypeError):
        run("--predict", GOOD / "000.png", "--method", "raw")
    assert "predictions" in seen[0]


def test_a_file_that_disappears_costs_only_itself(workspace, monkeypatch, capsys):
    """Between its score and its picture: the row stays, without a heatmap; the exit code is 2."""
    read_image = evaluate.read_image

    def vanishing(path):
        (GOOD / "001.png").unlink(missing_ok=True)
        return read_image(path)

    monkeypatch.setattr(evaluate, "read_image", vanishing)
    fails(capsys, evaluate.main, [*OPTIONS, "--predict", GOOD], GOOD / "001.png", "No such file")
    table = rows("runs/part/predictions/scores.csv")
    assert len(table) == 6 and [row["path"] for row in table if not row["heatmap"]] == [
        str(GOOD / "001.png")]


@pytest.mark.parametrize("argv, words", [
    ("--quantile 1.01", "from 0 to 1"), ("--quantile nan", "from 0 to 1"), ("--method no", "raw"),
    ("--predict", "--predict"), ("--to x", "belongs to --predict"), ("--device mps", "auto"),
    ("--predict nix --category part", "--predict nix: no such file"), ("--none", "--help"),
    ("--category no --predict data", f"{Path('runs/no/checkpoint.pt')}: no such file; train"),
    ("--out no --category all --predict data", "--out no: no NAME/checkpoint.pt"),
    ("--out no", f"{Path('no/part/checkpoint.pt')}: no such file; train it first, or copy")])
def test_bad_options_are_refused_by_name(workspace, monkeypatch, capsys, argv, words):
    """In one line, before anything is written."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = contents()
    fails(capsys, evaluate.main, [*OPTIONS, *argv.split()], words)
    assert contents() == before
    for main, argv, words in ((train.main, "", "--data ROOT is missing"),
                              (train.main, "--data data", "--category NAME is missing"),
                              (evaluate.main, "--predict data", "--category NAME is missing")):
        fails(capsys, main, argv.split(), words)


# ---- what both scripts share --------------------------------------------------------------------
MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
          RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
          RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
          RuntimeError("MPS backend out of memory")]


def test_errors_are_one_line(capsys):
    """Out of memory names what helps; an error of the system its file. A RuntimeError of another
    kind is a fault of ours and stays one."""
    for error in MEMORY:
        assert patchae.exit_code(Mock(side_effect=error), "part") == 2
        line, = capsys.readouterr().err.splitlines()
        assert all(word in line for word in ("part", "memory", "--memory-fraction"))
    assert patchae.exit_code(Mock(side_effect=PermissionError(13, "not allowed", "a.png"))) == 2
    assert "not allowed: 'a.png'" in capsys.readouterr().err
    for fault in ("shape", "an illegal memory access was encountered", "memory format"):
        with pytest.raises(RuntimeError, match=fault):
            patchae.exit_code(Mock(side_effect=RuntimeError(fault)))
    with pytest.raises(SystemExit, match="130"):
        patchae.run(Mock(side_effect=KeyboardInterrupt))
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_progress_on_a_terminal(monkeypatch, capsys):
    """Per cent and the seconds left, by a clock that says 2 s for each item; nothing elsewhere."""
    clock = itertools.count(0, 2).__next__
    monkeypatch.setattr(patchae, "time", SimpleNamespace(monotonic=clock))
    for stream in (None, SimpleNamespace(write=None), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert [*patchae.progress(range(3))] == [0, 1, 2]
    assert stream.getvalue() == ""
    stream.isatty = lambda: True
    assert [*patchae.progress(range(4)), *patchae.progress([])] == [0, 1, 2, 3]
    assert stream.getvalue() == "\r 25 %, 6 s left   \r 50 %, 4 s left   \r 75 %, 2 s left   " \
        "\r100 %, 0 s left   \n"


def say(monkeypatch, encoding, script, argv):
    """Run a script on a console of this encoding: (exit code, the bytes printed).

    Each line is there at once, also in a file or a pipe.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return end.value.code, streams[0].buffer.getvalue() + streams[1].buffer.getvalue()


def test_any_name_on_any_console(workspace, monkeypatch):
    """A category called Φ and a byte of an old code; images called 零件.png and Prüfteil.png.

    The table is UTF-8 in any case; pictures and heatmaps are there.
    """
    for encoding, script in itertools.product(("cp1252", "ascii"), ("train.py", "evaluate.py")):
        code, text = say(monkeypatch, encoding, script, ["--help"])
        assert code == 0 and text.isascii()
    names, category = ["零件.png", os.fsdecode(b"Pr\xfcfteil.png")], os.fsdecode(b"\xce\xa6\xfc")
    if sys.platform in ("darwin", "win32"):  # their file systems have no other names than Unicode
        names, category = names[:1], "Φ"
    data, out = Path("data", category), Path("runs", category)
    shutil.move("data/part", data)
    shutil.move("runs/part", out)
    for number, name in enumerate(names):
        (data / f"train/good/00{number}.png").rename(data / "train/good" / name)
        (data / f"test/dent/00{number}.png").rename(data / "test/dent" / name)
    shutil.copy(data / "train/good" / names[0], data / "train/good/z.png")
    shutil.copy(data / "train/good" / names[0], data / "train/good" / f"z{names[-1]}")  # a copy
    options = [*OPTIONS, "--category", category]
    predicted = data / "test/dent" / names[-1]
    for encoding, script, more in (
            ("ascii", "train.py", [*TINY, "--steps", "0"]), ("cp1252", "evaluate.py", []),
            ("cp1252", "evaluate.py", []), ("ascii", "evaluate.py", ["--predict", str(predicted)])):
        code, text = say(monkeypatch, encoding, script, [*options, *more])
        assert code == 0 and text
    for folder, count in (("trained", 4), ("predictions", 1)):
        assert len(rows(out / folder / "scores.csv")) == count == len(
            os.listdir(out / folder / "heatmaps")) and (out / folder / "sheet.png").exists()
    assert len(rows("runs/results.csv")) == 1
    predicted.write_bytes(b"")
    assert say(monkeypatch, "ascii", "evaluate.py", options)[0] == 2


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
def test_a_process_without_any_stream_and_with_any_encoding(workspace):
    """A scheduled task, or pythonw, has no streams. The encoding of text files depends on the
    machine, so none may be opened without one; only the start of a process can ask for that."""
    code = (f"import sys, warnings; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            "warnings.filterwarnings('error', '', EncodingWarning, 'patchae|train|eval|data')\n"
            f"import train, evaluate\nassert train.main({[*OPTIONS, *TINY]!r}) == 0\n"
            f"assert evaluate.main({OPTIONS!r}) == evaluate.main({OPTIONS!r}) == 0")
    command = shlex.join([sys.executable, "-X", "warn_default_encoding", "-c", code])
    done = subprocess.run(f"{command} >&- 2>&-", shell=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and len(rows(TRAINED / "scores.csv")) == 4


def test_everything_is_computed_on_the_device(workspace, monkeypatch):
    """Meta, a device without numbers, stands for a GPU: it refuses tensors of the CPU."""
    for name, value in (("cpu", lambda t: torch.zeros(t.shape)), ("item", lambda t: 0),
                        ("__bool__", lambda t: True)):
        monkeypatch.setattr(torch.Tensor, name, lambda t, *_, real=getattr(torch.Tensor, name),
                            value=value: value(t) if t.is_meta else real(t))
    monkeypatch.setattr(patchae, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(torch, "quantile", lambda *_: torch.ones(()))
    monkeypatch.setattr(evaluate, "explain", Mock(side_effect=lambda one, *_: (
        "", [torch.zeros(3, 160, 160, dtype=torch.uint8)] * 7)))
    calls = [watch(monkeypatch, patchae, name)
             for name in ("training_loss", "nearest_distance", "patch_error")]
    shutil.copytree("runs", "trained/runs")
    assert train.main([*OPTIONS, *TINY, "--steps", "1"]) == 0
    run("--out", "trained/runs", "--predict", TEST / "dent/000.png", "--method", *evaluate.METHODS)
    tensors = [tensor for one in calls for (arguments, _) in one for argument in arguments
               for tensor in (argument if isinstance(argument, list) else [argument])]
    assert all(calls) and all(tensor.is_meta for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("name", ["patchae.py", "train.py", "evaluate.py", "data/images.py",
                                  "data/make_toy.py"])
def test_importing_has_no_effect(tmp_path, monkeypatch, capsys, name):
    """Nothing printed or written; the random numbers and the number of threads as they were. `data`
    is a package, so that no other folder of that name on the path wins."""
    assert (ROOT / "data/__init__.py").exists()
    monkeypatch.chdir(tmp_path)
    before = random_states(), torch.get_num_threads()
    runpy.run_path(str(ROOT / name), run_name="imported")
    assert before == (random_states(), torch.get_num_threads())
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# ---- the demo and the READMEs -------------------------------------------------------------------
def test_the_demo_draws_its_set_and_needs_no_download(tmp_path, monkeypatch, capsys):
    """Both scripts with --demo; fewer and smaller images to save time."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=AssertionError))
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1)):
        monkeypatch.setattr(make_toy, name, count)
    for name, (draw, defects) in make_toy.CATEGORIES.items():
        monkeypatch.setitem(make_toy.CATEGORIES, name, (draw, defects[:1]))
    monkeypatch.setattr(make_toy, "ROOT", tmp_path / "toy")
    argv = ["--demo", "--out", str(tmp_path / "runs"), "--device", "cpu"]
    assert train.main([*argv, "--steps", "1", "--image-size", "64"]) == 0
    shutil.rmtree(tmp_path / "toy/flange")  # whoever needs it draws it
    remembered = watch(monkeypatch, PatchAE, "remember")
    assert evaluate.main(argv) == 0
    found = [(row["category"], row["test_set"], row["method"])
             for row in rows(tmp_path / "runs/results.csv")]
    assert found == list(itertools.product(
        ["felt", "flange"], ["test", "test_faint"], ["raw", "trained"]))
    config = torch.load(tmp_path / "runs/felt/checkpoint.pt", weights_only=True)["config"]
    assert config == dataclasses.asdict(
        dataclasses.replace(RECIPES["demo"], steps=1, image_size=64))
    assert capsys.readouterr().out.count("mean") == 4
    assert len(remembered) == 2  # raw once for each category, whatever the test sets


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
    """The lines as they stand there, on a smaller toy set and with fewer steps; what they print.

    The scripts then score with the model that they made, which knows no file names.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    draw_dataset(Path("data/toy"), "flange", bad=3)
    monkeypatch.setitem(RECIPES, "demo", dataclasses.replace(RECIPES["demo"], steps=4,
                                                             image_size=64))
    exec(code, {})
    printed = capsys.readouterr().out
    model = PatchAE.load("flange.pt")
    assert len(model.images) == 6 and model.config.steps == 4
    verdicts = [word == "True" for word in re.findall("True|False", printed)]
    paths = sorted(Path("data/toy/flange/test").rglob("*.png"))[:len(verdicts)]
    scores = image_scores(model.anomaly_maps((255 * as_images(paths)).round().byte()).numpy())
    assert verdicts == list(scores > np.quantile(model.normal_scores, 0.99)) and len(verdicts) == 3
    Path("runs/flange").mkdir(parents=True)
    shutil.copy("flange.pt", "runs/flange/checkpoint.pt")
    assert evaluate.main("--data data/toy --category flange --device cpu".split()) == 0
