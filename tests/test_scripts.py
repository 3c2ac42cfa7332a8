"""The scripts as a user runs them: train, evaluate, predict, their tables and pictures; the READMEs."""
import csv
import itertools
import math
import random
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINT, GOOD, OPTIONS, ROOT, TEST, TINY, watch
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import evaluate
import patchae
import train
from data import make_toy


def run(main, *argv):
    """main must succeed with OPTIONS and these; train.py gets TINY, too."""
    assert main([*OPTIONS, *(TINY if main is train.main else []), *(str(a) for a in argv)]) == 0


def rows(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))


def checkpoint():
    """What the checkpoint holds."""
    return torch.load(CHECKPOINT, weights_only=True)


def pixels(path, size=None):
    """An image file by Pillow alone, (H, W, 3) in 0 to 255."""
    image = Image.open(path).convert("RGB")
    return np.array(image.resize(size, Image.BILINEAR) if size else image, dtype=float)


# ---- the oracle: vectors by the model, all else by numpy, scikit-learn and Pillow ----------------
def distances(queries, memory):
    """(N, 16, 16): of each vector (N, C, 16, 16) the distance to the nearest in the memory, likewise."""
    queries, memory = (np.moveaxis(v, 1, 3).reshape(-1, v.shape[1]) for v in (queries, memory))
    return NearestNeighbors(n_neighbors=1).fit(memory).kneighbors(queries)[0].reshape(-1, 16, 16)


@torch.no_grad()
def anomaly_maps(paths, kind="feature"):
    """(N, 16, 16) of image files; without any the normal images, each against the others."""
    model, _, _ = patchae.load_checkpoint(CHECKPOINT)
    image = np.stack([pixels(path, (64, 64)) for path in [*paths, *sorted(GOOD.iterdir())]]) / 255
    image = torch.tensor(image, dtype=torch.float32).permute(0, 3, 1, 2)
    if kind == "reconstruction":
        error = (F.pixel_shuffle(model(image), 4).numpy() - image.numpy())**2
        return error.reshape(-1, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))[:len(paths)]
    features = model.features(image)
    found = (features if kind == "backbone" else patchae.represent(features, model.encoder)).numpy()
    if paths:
        return distances(found[:len(paths)], found[len(paths):])
    return np.concatenate([distances(found[[i]], np.delete(found, i, axis=0)) for i in range(len(found))])


def image_scores(maps):
    """The mean of the three highest places of each map."""
    return np.sort(maps.reshape(len(maps), -1))[:, -3:].mean(axis=1)


def enlarged(anomaly_map, size):
    """A map at the size (width, height), bilinear."""
    return np.array(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.BILINEAR))


def check_results(folder, root, paths, maps, threshold):
    """scores.csv and the heatmaps of images below root. Returns the scores, in the order of the paths.

    The table begins with the most anomalous. A heatmap is the image with its own map: opaque to 0.6 from 0.9
    to 1.1 thresholds, coloured from 0.5 to 1.5. Without a threshold (NaN) the largest value is at 1.5.
    """
    table = rows(f"{folder}/scores.csv")
    assert table == sorted(table, key=lambda row: -float(row["score"])) and len(table) == len(paths)
    found = {row["path"]: row for row in table}
    scale = maps.max() / 1.5 if math.isnan(threshold) else threshold
    for path, anomaly_map, score in zip(paths, maps, image_scores(maps)):
        row = found[str(path)]
        assert row["folder"] == path.parent.name and float(row["score"]) == pytest.approx(score, rel=1e-3)
        assert row["is_anomalous"] == ("" if math.isnan(threshold) else str(score > threshold))
        image = pixels(path)
        level = enlarged(anomaly_map, image.shape[1::-1]) / scale
        stops = np.linspace(0.5, 1.5, len(evaluate.COLOURS))
        colour = np.stack([np.interp(level, stops, channel) for channel in evaluate.COLOURS.T], axis=2)
        opacity = np.interp(level, (0.9, 1.1), (0, 0.6))[..., None]
        name = path.relative_to(root).as_posix().removesuffix(".png") + ".png"
        heatmap = pixels(f"{folder}/heatmaps/{name}")
        assert abs(heatmap - image * (1 - opacity) - colour * opacity).mean() < 1
    return [float(found[str(path)]["score"]) for path in paths]


def check_column(sheet, column, *files):
    """A column of overview.png begins with these images: itself, then its mask."""
    for row, file in enumerate(files):
        shown = np.array(ImageOps.contain(Image.open(file).convert("RGB"), (160, 160)), dtype=float)
        cell = pixels(sheet)[24 + 164 * row:, 164 * column:][:shown.shape[0], :shown.shape[1]]
        assert abs(cell - shown).mean() < 2


# ---- train.py -----------------------------------------------------------------------------------
def test_training_sees_the_images_of_train_good_and_nothing_else(workspace, monkeypatch):
    """The files opened, and the images in the checkpoint: none of test/ or ground_truth/. Training anew with
    the same seed gives an equal checkpoint, another seed other weights. With --no-defects the loss is given
    these images as they are, and a mask without a defect."""
    shutil.copy(TEST / "dent/000.png", TEST / "good/009.png")
    normal, before = sorted(GOOD.iterdir()), checkpoint()
    with monkeypatch.context() as patch:
        opened = watch(patch, Image, "open")
        run(train.main)
    assert {path for (path, *_), _ in opened} == set(normal) and len(normal) == 6
    after = checkpoint()
    assert set(after) == {"config", "model", "images", "normal_scores"}
    assert after["images"].dtype == torch.uint8 and len(after["normal_scores"]) == 6
    assert np.array_equal(after["images"].permute(0, 2, 3, 1), [pixels(path) for path in normal])
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    assert torch.equal(after["normal_scores"], before["normal_scores"])
    calls = watch(monkeypatch, patchae, "training_loss")
    run(train.main, "--seed", 1, "--steps", 3, "--no-defects")
    for name in ("backbone.conv1.weight", "decoder.0.weight"):
        assert not torch.equal(checkpoint()["model"][name], before["model"][name])
    for (_, image, mask), _ in calls:
        assert (image == after["images"] / 255).flatten(1).all(dim=1).any() and not mask.any()


def test_train_csv_and_defects_png(workspace, monkeypatch, capsys):
    """10 rows at most; the loss is the mean since the last row. Here a row takes 60 s: after 2 of 13 steps 11
    more take 330 s. Columns of the picture: normal, defected, mask, rebuilt; what `rebuilt` says, 0 if all of
    the defects is rebuilt, follows from its pixels."""
    calls = watch(monkeypatch, patchae, "training_loss")
    monkeypatch.setattr(train.time, "monotonic", itertools.count(0, 60).__next__)
    run(train.main, "--steps", 13)
    log = rows("runs/part/train.csv")
    losses = [loss.item() for _, loss in calls]
    means = [(a + b) / 2 for a, b in zip(losses[:12:2], losses[1::2])] + losses[12:]
    for number, (row, mean) in enumerate(zip(log, means, strict=True), 1):
        assert (int(row["step"]), float(row["seconds"])) == (min(2 * number, 13), 60 * number)
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-5)
    text = f"step 2/13  loss {means[0]:.4f}  missing {float(log[0]['rebuilt']):.3f}  330 s left\n"
    assert f"part: {text}" in capsys.readouterr().out
    cells = pixels("runs/part/defects.png")[2:, 2:].reshape(6, 66, 4, 66, 3)[:, :64, :, :64]
    normal, defected, mask, rebuilt = cells.transpose(2, 0, 1, 3, 4)
    assert np.array_equal(normal, [pixels(path) for path in sorted(GOOD.iterdir())])
    assert set(np.unique(mask)) == {0, 255} and (normal == defected)[mask == 0].all()
    assert (normal != defected)[mask == 255].mean() > 0.5
    missing = ((rebuilt - defected)**2)[mask == 255].sum() / ((normal - defected)**2)[mask == 255].sum()
    assert float(log[-1]["rebuilt"]) == pytest.approx(missing, rel=0.03)


def test_skip_finished_skips_an_equal_configuration_only(workspace, monkeypatch):
    """With another option, or without the checkpoint, training runs."""
    monkeypatch.setattr(train, "fit", Mock(return_value=[]))
    for argv, calls in (([], 0), (["--lr", "0.5"], 1), (["--lr", "0.5"], 1), ([], 2)):
        run(train.main, "--skip-finished", *argv)
        assert train.fit.call_count == calls
    CHECKPOINT.unlink()
    run(train.main, "--skip-finished")
    assert train.fit.call_count == 3


# ---- evaluate.py --------------------------------------------------------------------------------
def test_scores_metrics_and_pictures_by_another_route(workspace, capsys):
    """For each kind of score: scores.csv and heatmaps, both AUROCs in results.csv, overview.png."""
    shutil.copy(TEST / "dent/000.png", TEST / "good/002.png")  # so that no AUROC is 1
    paths, large = sorted(TEST.rglob("*.png")), (64, 64)
    labels = [path.parent.name == "dent" for path in paths]
    masks = {path: f"data/part/ground_truth/dent/{path.stem}_mask.png" for path in paths}
    truth = [pixels(masks[p])[..., 0] > 0 if bad else np.zeros(large, bool) for p, bad in zip(paths, labels)]
    threshold = np.quantile(checkpoint()["normal_scores"], 0.99)
    for number, kind in enumerate(("feature", "backbone", "reconstruction", "feature")):
        capsys.readouterr()
        run(evaluate.main, "--score", kind)
        maps, folder = anomaly_maps(paths, kind), f"runs/part/{kind}"
        scores = check_results(folder, TEST, paths, maps, threshold if kind == "feature" else math.nan)
        results = rows("runs/results.csv")
        assert len(results) == 2 * min(number + 1, 3)  # replaced, not repeated; a mean for each kind
        row, = [row for row in results if (row["category"], row["score"]) == ("part", kind)]
        assert float(row["image_auroc"]) == roc_auc_score(labels, scores) < 1
        expected = roc_auc_score(np.ravel(truth), np.ravel([enlarged(m, large) for m in maps]))
        assert float(row["pixel_auroc"]) == pytest.approx(expected, abs=1e-3)
        text = "above the threshold 1 of 3 good and 2 of 2 defective images"
        assert (text in capsys.readouterr().out) == (kind == "feature")
        for column, path in ((2, paths[0]), (3, paths[1])):  # after two good ones
            check_column(f"{folder}/overview.png", column, path, masks[path])


def test_threshold_is_the_quantile_of_leave_one_out_scores(workspace, capsys):
    """By brute force, after training on other images, as many as before. --threshold-images 3 takes images
    0, 2 and 4 of 6; with 0, or a single image, which has no other to be compared with, nothing is decided."""
    for most, chosen in ((100, np.s_[:]), (3, np.s_[::2])):
        for path in GOOD.iterdir():
            Image.fromarray((pixels(path) * np.random.rand(64, 64, 1)).astype(np.uint8)).save(path)
        run(train.main, "--steps", 0, "--threshold-images", most)
        expected = image_scores(anomaly_maps([]))[chosen]
        assert checkpoint()["normal_scores"].tolist() == pytest.approx(expected, rel=1e-3)
        run(evaluate.main, "--quantile", 0.7)
        found, = re.findall(r"threshold ([\d.]+), the 0.7 quantile", capsys.readouterr().out)
        assert float(found) == pytest.approx(np.quantile(expected, 0.7), rel=1e-3)
    for most, unused in ((0, []), (100, sorted(GOOD.iterdir())[1:])):
        for path in unused:
            path.unlink()
        run(train.main, "--steps", 1, "--threshold-images", most)
        run(evaluate.main, "--predict", TEST)
        assert {row["is_anomalous"] for row in rows("runs/part/predictions/scores.csv")} == {""}


def test_results_csv_by_hand(tmp_path, capsys):
    """Each result.csv and a mean over each kind, without nan; a category that is called mean stays one. The
    rows of one kind are printed, in per cent."""
    for row in ("a,feature,0.5,0.9,1.0", "a,backbone,0.2,nan,1.0", "mean,feature,1.0,nan,2.0"):
        path = tmp_path.joinpath(*row.split(",")[:2], "result.csv")
        path.parent.mkdir(parents=True)
        path.write_text(f"{','.join(evaluate.RESULT)}\n{row},3,0,resnet18,random\n")
    evaluate.gather_results(tmp_path, "feature")
    assert (tmp_path / "results.csv").read_text().splitlines()[1:] == [
        "a,backbone,0.2,nan,1.0,3,0,resnet18,random", "a,feature,0.5,0.9,1.0,3,0,resnet18,random",
        "mean,feature,1.0,nan,2.0,3,0,resnet18,random",
        "mean,feature,0.75,0.9,1.5,,,,", "mean,backbone,0.2,nan,1.0,,,,"]
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[2:]] == [
        "a feature 50.0% 90.0% 1.000", "mean feature 100.0% undefined 2.000",
        "mean feature 75.0% 90.0% 1.500"]


def test_predictions(workspace):
    """A table, a heatmap and a column for each image of a folder, at any depth and of any shape, the most
    anomalous first. A single file is judged as it is among others."""
    Path("photos/sub").mkdir(parents=True)
    names = {"dent.png": "dent/000.png", "other.png": "dent/001.png", "sub/other.png": "good/001.png"}
    for name, source in names.items():
        shutil.copy(TEST / source, f"photos/{name}")
    Image.open(TEST / "good/000.png").resize((150, 90)).save("photos/broad.JPG")
    run(evaluate.main, "--predict", "photos")
    threshold = np.quantile(checkpoint()["normal_scores"], 0.99)
    paths, folder = [Path("photos", name) for name in (*names, "broad.JPG")], Path("runs/part/predictions")
    check_results(folder, "photos", paths, anomaly_maps(paths), threshold)
    table = rows(folder / "scores.csv")
    assert {row["is_anomalous"] for row in table} == {"True", "False"}
    for column, row in enumerate(table):
        check_column(folder / "overview.png", column, row["path"])
    shutil.rmtree("data")  # the checkpoint is enough
    argv = "--category part --predict photos/other.png --device cpu"
    assert evaluate.main(argv=argv.split()) == 0  # as one calls it in a notebook
    row, = rows(folder / "scores.csv")
    assert row in table and row["path"] == str(Path("photos/other.png"))
    assert [path.name for path in (folder / "heatmaps").iterdir()] == ["other.png"]


# ---- both scripts, and what is written about them -----------------------------------------------
def test_the_demo_draws_its_set_and_needs_no_download(tmp_path, monkeypatch):
    """train.py --demo and evaluate.py --demo; fewer and smaller images to save time."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=AssertionError))
    for name in ("TRAIN", "GOOD", "PER_DEFECT"):
        monkeypatch.setattr(make_toy, name, 1)
    argv = ["--demo", "--data", str(tmp_path / "toy"), "--out", str(tmp_path / "runs"), "--device", "cpu"]
    assert train.main([*argv, "--steps", "1", "--image-size", "64"]) == evaluate.main(argv) == 0
    assert [row["category"] for row in rows(tmp_path / "runs/results.csv")] == ["felt", "flange", "mean"]


@pytest.mark.parametrize("name", ["patchae.py", "train.py", "evaluate.py", "data/images.py"])
def test_importing_has_no_effect(tmp_path, monkeypatch, capsys, name):
    """Nothing printed or written, the random numbers and the number of threads as they were."""
    monkeypatch.chdir(tmp_path)
    state = random.getstate(), torch.get_num_threads(), torch.initial_seed()
    runpy.run_path(str(ROOT / name), run_name="imported")
    assert state == (random.getstate(), torch.get_num_threads(), torch.initial_seed())
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def quoted_commands():
    """Every `python ...` in a code block of the READMEs and of docs/, as the words after python."""
    for path in (ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for part in re.split(r"&&|;|\n", block.replace("\\\n", " ")):
                if command := re.match(r"\s*(?:\w+=\S* )*(?:\S*/)?python3? (.*)", part):
                    yield shlex.split(command[1], comments=True)


def test_quoted_commands_are_understood(monkeypatch):
    """The demo, one's own images, the tests and the toy set are among them. The scripts know the options;
    of pytest the files are there; of other scripts --help works."""
    commands = list(quoted_commands())
    for wanted in ("train.py --demo", "evaluate.py --demo", "--predict", "-m pytest", "make_toy.py"):
        assert any(wanted in " ".join(words) for words in commands)
    for words in commands:
        if words[0] in ("train.py", "evaluate.py"):
            {"train.py": train, "evaluate.py": evaluate}[words[0]].parse(words[1:])
        elif words[0] == "-m":
            assert words[1] in ("venv", "pip", "pytest")
            assert all((ROOT / w.split("::")[0]).exists() for w in words[2:] if w.startswith("tests/"))
        else:
            monkeypatch.setattr(sys, "argv", [words[0], "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_the_python_of_the_readme_runs(workspace):
    """Its first python block, on the tests' data, writes a heatmap."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    before = set(Path(".").rglob("*.png"))
    exec(code.replace("runs/flange", "runs/part").replace("data/toy/flange", "data/part"), {})
    written = set(Path(".").rglob("*.png")) - before
    assert written and all(pixels(path).std() > 1 for path in written)
