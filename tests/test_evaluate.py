"""evaluate.py: scores, metrics, thresholds, tables, pictures, predictions; and what scripts share.

- Labelled sets and predictions are scored on one path. Each image is decoded once for its score
  and once for its picture. Numbers are those that NumPy and scikit-learn find by another route.
- `raw` is the model as it was before training, built again from the checkpoint's own Config.
- scores.csv is removed first and written last. Only heatmaps of the same folder are deleted.
- Heatmaps are called RANK_TYPE_STEM.png. The sheet shows why an image is called anomalous.
- A prediction never replaces another. It goes on without damaged images, and ends with exit code 2.
- results.csv has one row for each category, test set and method.
- Bad input, a full disk, no memory: one line. Any console shows any name. No terminal is needed.
"""
import builtins
import dataclasses
import io
import itertools
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (CHECKPOINT, GOOD, MASKS, NOISE, OPTIONS, ROOT, TEST, TINY, contents,
                      distances, draw_dataset, fails, make_model, pixels, random_states, rows, save,
                      watch)
from PIL import Image
from sklearn.metrics import roc_auc_score

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


# ---- the oracle: vectors by the model, all else by NumPy, scikit-learn and Pillow ----------------
def as_images(paths):
    """Image files as (N, 3, 64, 64) in [0, 1]."""
    image = np.stack([pixels(path, (64, 64)) for path in paths]) / 255
    return torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)


def image_scores(maps):
    """The mean of the three highest places of each map."""
    return np.sort(maps.reshape(len(maps), -1))[:, -3:].mean(axis=1)


def enlarged(anomaly_map, size):
    """A map at the size (width, height), bilinear."""
    return np.array(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.BILINEAR))


class Oracle:
    """What a method finds in image files: maps (N, 16, 16), scores, the scores of the normal ones.
    """

    @torch.no_grad()
    def __init__(self, method, paths):
        self.paths, self.normal = paths, sorted(GOOD.iterdir())
        self.model = PatchAE.load(CHECKPOINT)
        if method == "raw":
            self.model = patchae.build_model(self.model.config)
        image = as_images([*paths, *self.normal])
        found = self.model.represent(image).permute(0, 2, 3, 1).numpy()   # (N, 16, 16, C₃)
        self.vectors, self.memory = found[:len(paths)], found[len(paths):]
        if method == "reconstruction":
            error = (patchae.unpatchify(self.model(image), 4) - image).numpy()**2
            maps = error.reshape(-1, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))
        else:
            others = [distances(own, np.delete(self.memory, n, axis=0))
                      for n, own in enumerate(self.memory)]
            maps = np.concatenate([distances(self.vectors, self.memory), *others])
        self.maps, self.scores = maps[:len(paths)], image_scores(maps)[:len(paths)]
        self.normal_scores = image_scores(maps)[len(paths):]


def colours(level):
    """(H, W, 3): from half a threshold to one and a half, from dark to glowing."""
    stops = np.linspace(0.5, 1.5, 5)
    return np.stack([np.interp(level, stops, channel) for channel in COLOURS.T], axis=-1)


def heatmap_of(path, anomaly_map, threshold, size):
    """The image with its map: clear below 0.9 thresholds, opaque to 0.6 above 1.1."""
    level = enlarged(anomaly_map, size) / threshold
    opacity = np.interp(level, (0.9, 1.1), (0, 0.6))[..., None]
    return pixels(path, size) * (1 - opacity) + colours(level) * opacity


def check_tables(folder, oracle, threshold):
    """scores.csv, the most anomalous first, and the heatmap that each row names, all of them.

    Returns the numbers of the images in this order.
    """
    table = rows(folder / "scores.csv")
    assert list(table[0]) == ["path", "type", "score", "is_anomalous", "heatmap"]
    ranked = [oracle.paths.index(Path(row["path"])) for row in table]
    assert sorted(ranked) == list(range(len(oracle.paths)))
    assert (np.diff(oracle.scores[ranked]) < 0.02).all()  # of copies of normal ones, only rounding
    for rank, (row, n) in enumerate(zip(table, ranked), 1):
        path, score = oracle.paths[n], oracle.scores[n]
        assert float(row["score"]) == pytest.approx(score, rel=5e-3, abs=2e-2)
        assert row["is_anomalous"] == str(score > threshold)
        assert row["type"] == path.absolute().parent.name
        assert row["heatmap"] == f"{rank:04d}_{row['type']}_{path.stem}"[:60] + ".png"
        heatmap = pixels(folder / "heatmaps" / row["heatmap"])
        expected = heatmap_of(path, oracle.maps[n], threshold, heatmap.shape[1::-1])
        assert abs(heatmap - expected).mean() < 1
    assert sorted(os.listdir(folder / "heatmaps")) == [row["heatmap"] for row in table]
    return ranked


def framed_place(cell, side):
    """The place that the red frame in a cell of side × side places surrounds."""
    red = (cell == (255, 0, 0)).all(axis=2)
    return tuple(round(where.min() * side / 160) for where in np.nonzero(red))


def around(picture, place):
    """The 7 × 7 patches around a place, or as near as the border allows; its place in them."""
    top, left = (min(max(i - 3, 0), 9) for i in place)
    return picture[4 * top:4 * top + 28, 4 * left:4 * left + 28], (place[0] - top, place[1] - left)


@torch.no_grad()
def check_sheet(path, lines, oracle, shown, threshold, masks=None):
    """Row by row: the worst patch, what the decoder draws there, the nearest normal patch.

    The distance between the two patches that are framed is the one that the title names. lines:
    the calls of text_line.
    """
    sheet = pixels(path)
    assert sheet.shape == (20 + 188 * len(shown) + 20, 7 * 164 + 4, 3)
    assert abs(sheet[-20:, 160:480] - colours(np.linspace(0.5, 1.5, 320))).max() < 2
    header, *titles, legend = [[text for _, text in texts] for (_, texts), _ in lines]
    assert header == [*evaluate.COLUMNS] and len(titles) == len(shown)
    numbers = re.findall(r"\d\S*\d", " ".join(legend))  # at both ends, in the middle
    assert [float(number) for number in numbers] == pytest.approx(
        [0.5 * threshold, 1.5 * threshold, threshold], rel=0.01)
    for row, (n, (title,)) in enumerate(zip(shown, titles)):
        cells = sheet[44 + 188 * row:204 + 188 * row, 4:].reshape(160, 7, 164, 3)[:, :, :160]
        cells = cells.swapaxes(0, 1)
        photo, anomaly_map = oracle.paths[n], oracle.maps[n]
        worst, place = framed_place(cells[0], 16), framed_place(cells[6], 16)
        assert worst == divmod(anomaly_map.argmax(), 16)
        number = np.argmin([abs(np.array(Image.open(one).resize((160, 160)), dtype=float)
                                - cells[6]).mean() for one in oracle.normal])
        apart = np.linalg.norm(oracle.vectors[n][worst] - oracle.memory, axis=-1)
        assert apart[(number, *place)] == pytest.approx(apart.min(), rel=1e-4)
        file, score, distance, name = re.fullmatch(
            r"(.*): score (\S+); its worst patch is at distance (\S+) from normal (.*)",
            title).groups()
        assert file == f"{photo.absolute().parent.name}/{photo.name}"
        assert name == oracle.normal[number].name
        assert [float(score), float(distance)] == pytest.approx(
            [oracle.scores[n], apart.min()], rel=0.01, abs=0.02)
        image, normal = pixels(photo, (64, 64)), pixels(oracle.normal[number])
        drawn = patchae.unpatchify(oracle.model(as_images([photo])), 4)[0].clamp(0, 1)
        drawn = 255 * drawn.permute(1, 2, 0).numpy()
        mask = np.full((64, 64, 3), 255.) if masks is None else masks[n]
        expected = [(image, worst), (mask, None),
                    (heatmap_of(photo, anomaly_map, threshold, (64, 64)), None),
                    around(image, worst), around(drawn, worst), around(normal, place),
                    (normal, place)]
        for cell, (picture, spot) in zip(cells, expected):
            assert spot is None or framed_place(cell, len(picture) // 4) == spot
            large = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).resize((160, 160))
            assert abs(cell - np.array(large))[(cell != (255, 0, 0)).any(axis=2)].mean() < 6


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
    class alone there is no number."""
    Image.new("L", (64, 64)).save(MASKS / "000_mask.png")
    (MASKS / "001_mask.png").unlink()
    run()
    out = capsys.readouterr().out
    assert "part test trained: 1 masks show no defect: 000_mask.png" in out
    assert "1 defective images have no mask, left out of pixel metrics; expected" in out
    found, = rows("runs/results.csv")
    assert found["image_auroc"] == "1.0" and found["pixel_auroc"] == found["aupro"] == "nan"
    shutil.rmtree(MASKS.parent)
    shutil.rmtree(TEST / "good")
    run()
    assert capsys.readouterr().out.splitlines()[-1].split()[3:6] == ["undefined"] * 3


# ---- an evaluation ------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["trained", "raw", "reconstruction"])
def test_an_evaluation_by_another_route(workspace, monkeypatch, capsys, method):
    """Scores, metrics, tables, pictures and all that is printed; read in parts of 7, 3 s each.

    Among the good images are copies of a defective one, a false alarm, and, in either part, of
    normal ones. A defective one has no mask. Each image is decoded twice, each mask once. With the
    0.9 quantile of 6 scores a share of 1 − (0.9 · 5 + 1) / 7 is above it.
    """
    shutil.copy(TEST / "dent/000.png", TEST / "good/003.png")
    shutil.copy(TEST / "dent/001.png", TEST / "dent/002.png")
    for number in (2, 4):
        shutil.copy(GOOD / f"00{number}.png", TEST / f"good/00{number}.png")
    paths = sorted(TEST.rglob("*.png"))
    bad = np.array([path.parent.name == "dent" for path in paths])
    masks = [pixels(MASKS / f"{path.stem}_mask.png") if n < 2 else np.full(
        (64, 64, 3), 255. * (n == 2)) for n, path in enumerate(paths)]
    assert evaluate.PART == 32  # at once in memory, as docs/cost.md says
    monkeypatch.setattr(evaluate, "PART", 7)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(monotonic=itertools.count(0, 3).__next__))
    states, (parts, opened, drawn) = random_states(), (watch(monkeypatch, *one) for one in (
        (evaluate, "read_each"), (Image, "open"), (evaluate, "text_line")))
    run("--method", method, "--quantile", "0.9")
    assert random_states() == states and [len(part) for (part, *_), _ in parts] == [7, 1]
    assert sorted(path for (path, *_), _ in opened) == sorted([*paths, *paths, *MASKS.iterdir()])
    out, err = capsys.readouterr()
    oracle = Oracle(method, paths)
    threshold, known = np.quantile(oracle.normal_scores, 0.9), np.arange(8) != 2
    large = np.stack([enlarged(one, (64, 64)) for one in oracle.maps])[known]
    truth = np.stack(masks)[known, ..., 0] > 0
    found, = rows("runs/results.csv")
    metrics = [float(found[name]) for name in ("image_auroc", "pixel_auroc", "aupro")]
    assert metrics == pytest.approx([
        roc_auc_score(bad, oracle.scores), roc_auc_score(truth.ravel(), large.ravel()),
        evaluate.aupro(*map(torch.tensor, (truth, large)))], abs=2e-3) and metrics[0] < 1
    assert float(found["threshold"]) == pytest.approx(threshold, rel=1e-3)
    assert list(found.values()) == ["part", "test", method, *map(str, metrics), str(6 / 8),
                                    found["threshold"], "0", "resnet18", "random"]
    lines, alarms = out.splitlines(), oracle.scores > threshold
    note = ("training saw them: their error is too low, and so is the threshold"
            if method == "reconstruction" else "if they are independent, expect 21.4% false alarms")
    assert lines[-7:-3] == [
        f"part {method}: threshold {float(found['threshold']):.4f}, the 0.9 quantile of the scores "
        "of 6 normal images; " + note,
        f"part test {method}: 2 images are identical to normal training images",
        f"part test {method}: 1 defective images have no mask, left out of pixel metrics; expected "
        "ground_truth/TYPE/STEM.* or STEM_mask*.*",
        f"part test {method}: above the threshold {alarms[~bad].sum()} of 5 good and "
        f"{alarms[bad].sum()} of 3 defective images"]
    assert lines[-1].split() == ["part", "test", method, *(f"{m:.1%}" for m in metrics), "0.750"]
    assert err == "" and sorted(os.listdir(f"runs/part/{method}")) == [
        "heatmaps", "scores.csv", "sheet.png"]
    check_tables(Path("runs/part", method), oracle, threshold)
    shown = [3, 4, 0, 1, *(n for n in np.argsort(-oracle.scores) if n > 4 and alarms[n])]
    check_sheet(f"runs/part/{method}/sheet.png", drawn, oracle, shown, threshold, masks)


def test_raw_needs_the_weights_that_training_started_from(workspace, capsys):
    """It is built again from them. Nothing else needs their file; the table has its name. One
    category that fails, here since it was not trained, leaves the others."""
    model = PatchAE.load(CHECKPOINT)
    model.config.weights = str(Path("far/gone.pth"))
    model.save(CHECKPOINT)
    fails(capsys, evaluate.main, [*OPTIONS, "--method", "raw"], model.config.weights)
    shutil.copytree("data/part", "data/first")
    run("--category", "all", code=2)
    assert [(row["category"], row["weights"]) for row in rows("runs/results.csv")] == [
        ("part", "gone.pth")]


def test_all_test_sets_and_what_is_left_alone(workspace, monkeypatch):
    """Each folder test* is scored. An older scores.csv is gone before anything is scored, and the
    new one comes last. Of what is in the folder only heatmaps of ours are deleted."""
    shutil.copytree("data/part/test/dent", "data/part/test_b/dent")
    others = [TRAINED / name for name in ("heatmaps/my_0001.png", "0001_a_b.png", "notes.txt")]
    for path in (*others, TRAINED / "heatmaps/0009_dent_009.png", TRAINED / "scores.csv",
                 TRAINED / "heatmaps/10000_a_b.png"):
        save(NOISE, path, format="PNG")
    seen, score_files, write_table = [], evaluate.score_files, evaluate.write_table
    monkeypatch.setattr(evaluate, "score_files", lambda title, *a: (
        seen.append((title, list(Path("runs").rglob("scores.csv")))), score_files(title, *a))[1])
    monkeypatch.setattr(evaluate, "write_table", lambda path, *a: (
        seen.append((path, path.with_name("sheet.png").exists())), write_table(path, *a)))
    run()
    a, b = TRAINED / "scores.csv", Path("runs/part/trained-test_b/scores.csv")
    assert seen == [("part test trained", []), (a, True), (Path("runs/results.csv"), False),
                    ("part test_b trained", [a]), (b, True), (Path("runs/results.csv"), False)]
    assert len(os.listdir(TRAINED / "heatmaps")) == 5 and all(path.exists() for path in others)
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
    for foreign in (b"caf\xe9,1\n", b""):
        path.write_bytes(foreign)
        with pytest.raises(UserError, match="results.csv: not a table of this version"):
            evaluate.add_result(path, table[0])
        assert path.read_bytes() == foreign


def test_the_nearest_normal_patch_is_framed_where_it_was(model, learned):
    """Also where M has but one vector of each image, that of place (6, 4). The close-ups of a model
    with 4 × 4 patches show all of them."""
    model.remember(learned.images)
    model.memory = [vectors[100:101] for vectors in model.memory]
    one = evaluate.Scored(Path("a.png"), "dent", [], (64, 64), torch.rand(16, 16))
    _, cells = evaluate.explain(one, NOISE.convert("RGB"), model, 1.0, None)
    assert framed_place(cells[6].permute(1, 2, 0).numpy(), 16) == (6, 4)
    cell = evaluate.framed(learned.images[0], 6, make_model(patch_size=16), evaluate.CONTEXT)
    assert framed_place(cell.permute(1, 2, 0).numpy(), 4) == (1, 2)


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
def test_predictions(workspace, monkeypatch, capsys):
    """Images of any depth, shape and name, one of them turned by its EXIF data, one broken, one
    given twice. What lies in the results is not scored. The checkpoint is enough."""
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
    shutil.move("data", "moved")
    shutil.copytree("runs", "photos/runs")
    drawn, argv = watch(monkeypatch, evaluate, "text_line"), [
        "--category", "all", "--predict", "photos", str(Path("photos/z.png").absolute())]
    run(*argv, code=2)
    lines, err = capsys.readouterr()
    shutil.move("moved", "data")
    Image.open("photos/turned.PNG").transpose(Image.Transpose.ROTATE_270).save("photos/turned.PNG")
    oracle, folder = Oracle("trained", [Path("photos", n) for n in names]), Path(
        "runs/part/predictions")
    threshold = np.quantile(oracle.normal_scores, 0.99)
    ranked = check_tables(folder, oracle, threshold)
    check_sheet(folder / "sheet.png", drawn, oracle, ranked[:12], threshold)
    assert Image.open(folder / f"heatmaps/{ranked.index(4) + 1:04}_photos_turned.png").size == (
        1024, 614)
    lines, table = lines.splitlines(), rows(folder / "scores.csv")
    assert "part trained: 1 images are identical to normal training images" in lines
    words = {"True": "anomalous", "False": "normal"}
    assert [line.split() for line in lines[-14:-2]] == [
        [f"{float(row['score']):.4f}", words[row["is_anomalous"]], row["path"]]
        for row in table[:12]]
    anomalous = sum(row["is_anomalous"] == "True" for row in table)
    assert 0 < anomalous < 12 and lines[-2:] == [
        f"part trained: 15 images, {anomalous} anomalous", f"part trained: wrote {folder}"]
    assert err.count("\n") == 1 and err.startswith(f"error: {Path('photos/broken.png')}: not a ")


def test_a_prediction_never_replaces_another(workspace, monkeypatch):
    """--to goes anywhere, also beside a model that is read-only; a folder that is there stays as it
    is. The folder is made before the first image is scored."""
    Path("mine").mkdir()
    Path("mine/scores.csv").write_text("mine")
    before = contents("runs")
    shutil.copy(GOOD / "000.png", "bare.png")
    for to in ("mine", "new/deep", "new/deep", "new/deep"):
        run("--category", "part", "part", "--predict", "bare.png", "--to", to)
    assert contents("runs") == before and Path("mine/scores.csv").read_text() == "mine"
    assert sorted(os.listdir("new")) == ["deep", "deep-2", "deep-3"]
    assert [row["type"] for row in rows("mine-2/scores.csv")] == [Path.cwd().name]
    monkeypatch.setattr(evaluate, "score_files", lambda *_: os.listdir("runs/part/predictions") / 0)
    with pytest.raises(TypeError):
        run("--predict", GOOD / "000.png")


# ---- what both scripts share --------------------------------------------------------------------
BAD_OPTIONS = [(train, *one) for one in (
    ("--image-size 63", "from 64 to 2048"), ("--image-size 100", "multiple of 32"),
    ("--patch-size 12", "--image-size 64"), ("--patch-size 3", "from 4 to 32"),
    ("--neighbourhood 2", "1, 3, 5, 7, 9"), ("--stages 0 2", "1, 2, 3, 4"), ("--lr 2", "0 to 1"),
    ("--lr nan", "from 0 to 1"), ("--encoder-lr -1", "from 0 to 1"), ("--steps -1", "from 0"),
    ("--steps many", "invalid int value: 'many'"), ("--backbone vgg", "wide_resnet50_2"),
    ("--memory-fraction 2", "from 0 to 1"), ("--defect-weight 1.1", "from 0 to 1"),
    ("--seed -1", "from 0"), ("--channels 0", "from 1"), ("--device tpu", "mps"),
    ("--channels 10", "--channels 10: the identity start needs 192"), ("--start zero", "identity"),
    ("--recipe metal", "textures"), ("--none", "--help"), ("--weights x.pth", "state-dict file"),
    ("--device cuda", "--device auto"), ("--data data/part", "folder above NAME"),
    ("--data no", "--data no: no NAME/train/good"),
    ("--category part nix", "--category nix: not there; data has part"))] + [
    (evaluate, *one) for one in (
        ("--quantile 1.01", "--quantile: must be from 0 to 1"), ("--quantile nan", "from 0 to 1"),
        ("--method no", "raw"), ("--predict", "--predict"), ("--to x", "belongs to --predict"),
        ("--device mps", "--device auto"), ("--predict nix", "--predict nix: no such file"),
        ("--category no --predict data", f"{Path('runs/no/checkpoint.pt')}: no such file; train"),
        ("--out no --category all --predict data", "--out no: no NAME/checkpoint.pt"),
        ("--out no", f"{Path('no/part/checkpoint.pt')}: no such file; train it first, or copy"))]
BAD_FILES = [  # script, a file, its content, or None for a folder that is not there, the error
    (train, GOOD / "tiny.png", NOISE.resize((64, 3)), "64 × 3 pixels; use larger images"),
    (train, GOOD / "bad.png", b"text", "not a usable image"),
    (train, GOOD, None, "--data data: no NAME/train/good in it; give the folder above NAME"),
    (evaluate, TEST / "stray.png", NOISE, "move it there"),
    (evaluate, TEST / "dent/bad.png", b"text", "not a usable image"),
    (evaluate, TEST, None, f"{TEST.parent}: no folder test/TYPE; see data/README.md"),
    (evaluate, MASKS / "000_mask.png", NOISE.resize((32, 65)),
     "32 × 65 pixels, its upright image 64 × 64"),
    (evaluate, MASKS / "000_mask.jpg", NOISE, "save masks as PNG"),
    (evaluate, MASKS / "000_mask.webp", NOISE, "save masks as PNG")]


def test_bad_input_is_refused_by_name(workspace, monkeypatch, capsys):
    """One line that names the option or the file and the remedy, before anything is computed. What
    was there stays as it was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(train, "fit", Mock(side_effect=AssertionError("trained")))
    options, before = {train: [*OPTIONS, *TINY], evaluate: OPTIONS}, contents()
    for script, argv, words in BAD_OPTIONS:
        named = argv.split()[0] if script is train else ""
        fails(capsys, script.main, [*options[script], *argv.split()], named, words)
    file = GOOD / "000.png"  # where a folder should be
    fails(capsys, train.main, [*options[train], "--out", file], file)
    for script, argv, words in ((train, "", "--data ROOT"), (train, "--data x", "--category NAME"),
                                (evaluate, "--predict data", "--category NAME")):
        fails(capsys, script.main, argv.split(), f"{words} is missing")
    assert contents() == before
    for script, path, content, words in BAD_FILES:
        shutil.move("data", "whole")
        shutil.copytree("whole", "data")
        if content is None:
            shutil.rmtree(path)
        else:
            path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
        fails(capsys, script.main, options[script], words, *([path] if content else []))
        shutil.rmtree("data")
        shutil.move("whole", "data")
    after = contents()
    assert all(after[path] == before[path] for path in before)


MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
          RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
          RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
          RuntimeError("MPS backend out of memory")]


def test_errors_are_one_line(capsys):
    """Out of memory names what helps; an error of the system its file. A RuntimeError of another
    kind is a fault of ours and stays one."""
    for error in MEMORY:
        fails(capsys, Mock(side_effect=error), ["part"], "part", "memory", "--memory-fraction")
    fails(capsys, Mock(side_effect=PermissionError(13, "no", "a.png")), [], "no: 'a.png'")
    for fault in ("shape", "an illegal memory access was encountered", "memory format"):
        with pytest.raises(RuntimeError, match=fault):
            patchae.exit_code(Mock(side_effect=RuntimeError(fault)))
    with pytest.raises(SystemExit, match="130"):
        patchae.run(Mock(side_effect=KeyboardInterrupt))
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_progress_on_a_terminal(monkeypatch):
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


def say(monkeypatch, encoding, script, *argv):
    """Run a script on a console of this encoding: (exit code, the bytes printed), each line at
    once. No text file may be opened without an encoding, since the default differs by machine."""
    streams = [encoding and io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]

    def opened(file, mode="r", *more, real=open, **named):
        assert "b" in mode or named["encoding"]
        return real(file, mode, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        for name, value in (("stdout", streams[0]), ("stderr", streams[1]),
                            ("argv", [script, *map(str, argv)])):
            patch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return end.value.code, b"".join(stream.buffer.getvalue() for stream in streams if stream)


def test_any_name_on_any_console(workspace, monkeypatch):
    """A category Φ with images called 零件.png and, in an old code, Prüfteil.png. The tables are
    UTF-8 in any case; pictures and heatmaps are there. A scheduled task has no console at all."""
    for script in ("train.py", "evaluate.py"):
        code, text = say(monkeypatch, "ascii", script, "--help")
        assert code == 0 and b"--category" in text
    names = ["零件.png", os.fsdecode(b"Pr\xfcfteil.png")]
    if sys.platform in ("darwin", "win32"):  # their file systems have no other names than Unicode
        names[1] = "Prüfteil.png"
    for parent in ("data", "runs"):
        Path(parent, "part").rename(Path(parent, "Φ"))
    for n, name in enumerate(names):
        for folder in ("train/good", "test/dent"):
            Path("data/Φ", folder, f"00{n}.png").rename(Path("data/Φ", folder, name))
        shutil.copy(Path("data/Φ/train/good", name), f"data/Φ/train/good/z{name}")  # a copy
    options = [*OPTIONS, "--category", "Φ"]
    for encoding, script, more in (
            ("ascii", "train.py", [*TINY, "--steps", "0"]), ("cp1252", "evaluate.py", []),
            (None, "train.py", TINY), (None, "evaluate.py", []),
            ("ascii", "evaluate.py", ["--predict", Path("data/Φ/test/dent", names[1])])):
        code, text = say(monkeypatch, encoding, script, *options, *more)
        assert code == 0 and bool(text) == bool(encoding)
    for folder, count in (("trained", 4), ("predictions", 1)):
        table = rows(f"runs/Φ/{folder}/scores.csv")
        assert len(table) == len(os.listdir(f"runs/Φ/{folder}/heatmaps")) == count
        path = str(Path("data/Φ/test/dent", names[1])).encode("utf-8", "backslashreplace").decode()
        assert path in [row["path"] for row in table]
    Path("data/Φ/test/dent", names[1]).write_bytes(b"")
    assert say(monkeypatch, "ascii", "evaluate.py", *options)[0] == 2


def test_everything_is_computed_on_the_device(workspace, monkeypatch):
    """Meta, a device without numbers, stands for a GPU: it refuses tensors of the CPU."""
    for name, value in (("cpu", lambda t: torch.zeros(t.shape)), ("item", lambda t: 0),
                        ("__bool__", lambda t: True)):
        monkeypatch.setattr(torch.Tensor, name, lambda t, *_, real=getattr(torch.Tensor, name),
                            value=value: value(t) if t.is_meta else real(t))
    monkeypatch.setattr(patchae, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(torch, "quantile", lambda *_: torch.ones(()))
    monkeypatch.setattr(evaluate, "explain", lambda *_: (
        "", [torch.zeros(3, 160, 160, dtype=torch.uint8)] * 7))
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
    for name, count in (("TRAIN", 2), ("GOOD", 1), ("PER_DEFECT", 1), ("HAIRS", 99)):
        monkeypatch.setattr(make_toy, name, count)
    for name, (draw, defects) in make_toy.CATEGORIES.items():
        monkeypatch.setitem(make_toy.CATEGORIES, name, (draw, defects[:1]))
    monkeypatch.setattr(make_toy, "ROOT", tmp_path / "toy")
    argv = ["--demo", "--out", str(tmp_path / "runs"), "--device", "cpu"]
    assert train.main([*argv, "--steps", "1", "--image-size", "64"]) == 0
    remembered = watch(monkeypatch, PatchAE, "remember")
    assert evaluate.main(argv) == 0
    found = [(row["category"], row["test_set"], row["method"])
             for row in rows(tmp_path / "runs/results.csv")]
    assert found == list(itertools.product(
        ["felt", "flange"], ["test", "test_faint"], ["raw", "trained"]))
    assert PatchAE.load(tmp_path / "runs/felt/checkpoint.pt").config == dataclasses.replace(
        RECIPES["demo"], steps=1, image_size=64)
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
    monkeypatch.chdir(tmp_path)
    draw_dataset(Path("data/toy"), "flange", bad=3)
    monkeypatch.setitem(RECIPES, "demo", dataclasses.replace(RECIPES["demo"], steps=4,
                                                             image_size=64))
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], {})
    verdicts = [word == "True" for word in re.findall("True|False", capsys.readouterr().out)]
    model, paths = PatchAE.load("flange.pt"), sorted(Path("data/toy/flange/test").rglob("*.png"))
    assert len(model.images) == 6 and model.config.steps == 4
    scores = image_scores(model.anomaly_maps((255 * as_images(paths[:3])).round().byte()).numpy())
    assert verdicts == list(scores > np.quantile(model.normal_scores, 0.99))
    Path("runs/flange").mkdir(parents=True)
    shutil.copy("flange.pt", "runs/flange/checkpoint.pt")
    assert evaluate.main("--data data/toy --category flange --device cpu".split()) == 0
