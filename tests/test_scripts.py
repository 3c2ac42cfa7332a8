"""The scripts as a user runs them: train, evaluate, predict, their tables and pictures; the READMEs."""
import csv
import math
import random
import re
import runpy
import shlex
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import evaluate
import patchae
import train
from data import make_toy

OPTIONS = "--data data --out runs --category part --device cpu".split()
CHECKPOINT = Path("runs/part/checkpoint.pt")
GOOD, TEST = Path("data/part/train/good"), Path("data/part/test")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """The current folder is a copy of the trained workspace that a test may change."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    monkeypatch.setattr(train, "HELD_OUT", train.PREVIEWS)  # to save time


def run(main, *argv):
    """main must succeed with OPTIONS and these; train.py gets TINY, too."""
    assert main([*OPTIONS, *(TINY if main is train.main else []), *(str(a) for a in argv)]) == 0


def rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def checkpoint():
    """What the checkpoint holds."""
    return torch.load(CHECKPOINT, weights_only=True)


def pixels(path, size=None):
    """An image file by Pillow alone, (H, W, 3) in 0 to 255."""
    image = Image.open(path).convert("RGB")
    return np.array(image.resize(size, Image.BILINEAR) if size else image, dtype=float)


# ---- the oracle: vectors by the model, all else by numpy, scikit-learn and Pillow ----------------
def vectors(paths, kind="feature"):
    """(N, 256, C): of each image file the vectors of its patches; their pixels for reconstruction."""
    model, _, _ = patchae.load_checkpoint(CHECKPOINT)
    image = np.stack([pixels(path, (64, 64)) for path in paths]).transpose(0, 3, 1, 2) / 255
    image = torch.tensor(image, dtype=torch.float32)
    with torch.no_grad():
        found = model.features(image) if kind == "backbone" else model(image)[kind == "reconstruction"]
    return found.flatten(2).transpose(1, 2).numpy()


def distances(queries, memory):
    """(N, 16, 16): of each vector the distance to the nearest in the memory."""
    search = NearestNeighbors(n_neighbors=1).fit(np.concatenate(memory))
    return search.kneighbors(np.concatenate(queries))[0].reshape(-1, 16, 16)


def anomaly_maps(paths, kind="feature"):
    """(N, 16, 16) of image files."""
    if kind != "reconstruction":
        found = vectors([*paths, *sorted(GOOD.iterdir())], kind)
        return distances(found[:len(paths)], found[len(paths):])
    image = (np.stack([pixels(path, (64, 64)) for path in paths]) / 255 - MEAN) / STD
    patches = image.reshape(-1, 16, 4, 16, 4, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 256, 48)
    return ((vectors(paths, kind) - patches)**2).mean(axis=2).reshape(-1, 16, 16)


def image_scores(maps):
    """The mean of the three highest places of each map."""
    return np.sort(maps.reshape(len(maps), -1))[:, -3:].mean(axis=1)


def enlarged(anomaly_map, size):
    """A map at the size (width, height), bilinear."""
    return np.array(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.BILINEAR))


def check_heatmap(heatmap, path, anomaly_map, threshold):
    """It is the image with its own map: opaque to 0.6 from 0.9 to 1.1 thresholds, coloured 0.5 to 1.5."""
    image = pixels(path)
    level = enlarged(anomaly_map, image.shape[1::-1]) / threshold
    stops = np.linspace(0.5, 1.5, len(evaluate.COLOURS))
    colour = np.stack([np.interp(level, stops, channel) for channel in evaluate.COLOURS.T], axis=2)
    opacity = np.interp(level, (0.9, 1.1), (0, 0.6))[..., None]
    assert abs(pixels(heatmap) - image * (1 - opacity) - colour * opacity).mean() < 1


def check_column(sheet, column, path, mask=None):
    """A column of overview.png begins with this image, then this mask."""
    for row, file in enumerate((path, mask)[:1 + bool(mask)]):
        shown = np.array(ImageOps.contain(Image.open(file).convert("RGB"), (160, 160)), dtype=float)
        cell = pixels(sheet)[24 + 164 * row:, 164 * column:][:shown.shape[0], :shown.shape[1]]
        assert abs(cell - shown).mean() < 2


# ---- train.py -----------------------------------------------------------------------------------
def test_training_sees_the_images_of_train_good_and_nothing_else(workspace, monkeypatch):
    """The files opened, and the images in the checkpoint: none of test/ or ground_truth/."""
    shutil.copy(TEST / "hole/000.png", TEST / "good/009.png")
    opened, normal, open_image = set(), sorted(GOOD.iterdir()), Image.open
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda path, *more: (opened.add(path), open_image(path, *more))[1])
        run(train.main)
    assert opened == set(normal) and len(normal) == 6
    content = checkpoint()
    assert set(content) == {"config", "model", "images", "normal_scores"}
    assert content["images"].dtype == torch.uint8 and len(content["normal_scores"]) == 6
    assert np.array_equal(content["images"].permute(0, 2, 3, 1), [pixels(path) for path in normal])


def test_train_csv_and_defects_png(workspace, monkeypatch):
    """Loss: the mean since the last row. Columns of the picture: normal, defected, mask, rebuilt;
    what `rebuilt` says, 0 if all of the defects is rebuilt, follows from its pixels."""
    losses, loss = [], patchae.training_loss
    monkeypatch.setattr(patchae, "training_loss", lambda *args: (losses.append(loss(*args)), losses[-1])[1])
    begin = time.monotonic()
    run(train.main, "--steps", 12)
    log = rows("runs/part/train.csv")
    assert list(log[0]) == ["step", "loss", "rebuilt", "seconds"]
    assert [int(row["step"]) for row in log] == [2, 4, 6, 8, 10, 12]
    means = torch.stack(losses).detach().reshape(6, 2).mean(dim=1)
    assert [float(row["loss"]) for row in log] == pytest.approx(means.tolist(), rel=1e-5)
    assert 0 < float(log[0]["seconds"]) < float(log[5]["seconds"]) < time.monotonic() - begin
    cells = pixels("runs/part/defects.png")[2:, 2:].reshape(6, 66, 4, 66, 3)[:, :64, :, :64]
    normal, defected, mask, rebuilt = cells.transpose(2, 0, 1, 3, 4)
    assert np.array_equal(normal, [pixels(path) for path in sorted(GOOD.iterdir())])
    assert set(np.unique(mask)) == {0, 255} and (normal == defected)[mask == 0].all()
    assert (normal != defected)[mask == 255].mean() > 0.5
    model, _, _ = patchae.load_checkpoint(CHECKPOINT)
    again = train.rebuild_images(model, torch.tensor(defected.transpose(0, 3, 1, 2)).float() / 255)
    assert abs(again.permute(0, 2, 3, 1).numpy() * 255 - rebuilt).mean() < 3
    missing = ((rebuilt - defected)**2)[mask == 255].sum() / ((normal - defected)**2)[mask == 255].sum()
    assert float(log[-1]["rebuilt"]) == pytest.approx(missing, rel=0.03)


def test_the_seed_decides(workspace, monkeypatch):
    """Training anew with the same seed gives equal tensors and scores; another seed others."""
    run(evaluate.main)
    before, scores = checkpoint(), Path("runs/part/feature/scores.csv").read_bytes()
    monkeypatch.setattr(train, "HELD_OUT", 24)  # as the workspace was trained
    run(train.main)
    after = checkpoint()
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    assert torch.equal(after["normal_scores"], before["normal_scores"])
    run(evaluate.main)
    assert Path("runs/part/feature/scores.csv").read_bytes() == scores
    run(train.main, "--seed", 1, "--steps", 1)
    for name in ("backbone.conv1.weight", "decoder.0.weight"):
        assert not torch.equal(checkpoint()["model"][name], before["model"][name])


def test_skip_finished_skips_an_equal_configuration_only(workspace, monkeypatch):
    """With another option, or without the checkpoint, training runs."""
    monkeypatch.setattr(train, "fit", Mock(return_value=[]))
    for argv, calls in (([], 0), (["--lr", "0.5"], 1), (["--lr", "0.5"], 1), ([], 2)):
        run(train.main, "--skip-finished", *argv)
        assert train.fit.call_count == calls
    CHECKPOINT.unlink()
    run(train.main, "--skip-finished")
    assert train.fit.call_count == 3


@pytest.mark.parametrize("argv, untouched", [([], False), (["--no-defects"], True)])
def test_no_defects_trains_on_the_images_as_they_are(workspace, monkeypatch, argv, untouched):
    """By default every image of training has a defect, with --no-defects none."""
    seen, loss = [], patchae.training_loss
    monkeypatch.setattr(patchae, "training_loss", lambda *args: (seen.extend(args[1]), loss(*args))[1])
    run(train.main, "--steps", 3, *argv)
    normal = checkpoint()["images"] / 255
    assert seen and all((image == normal).flatten(1).all(dim=1).any() == untouched for image in seen)


def test_only_fine_tuning_changes_the_backbone(workspace):
    """Frozen, its weights are those that the seed draws; fine-tuned, all its convolutions move."""
    drawn = patchae.build_model(train.parse(TINY)[1]).backbone.named_parameters()
    drawn = {f"backbone.{name}": value for name, value in drawn if value.dim() == 4}
    assert all(torch.equal(checkpoint()["model"][name], value) for name, value in drawn.items())
    run(train.main, "--finetune-backbone", "--backbone-lr", 0.01, "--steps", 1)
    assert not any(torch.equal(checkpoint()["model"][name], value) for name, value in drawn.items())


# ---- evaluate.py --------------------------------------------------------------------------------
def test_scores_metrics_and_pictures_by_another_route(workspace, capsys):
    """For each kind of score: its folder, scores.csv, both AUROCs in results.csv, every heatmap."""
    shutil.copy(TEST / "hole/000.png", TEST / "good/002.png")  # so that no AUROC is 1
    paths, large = sorted(TEST.rglob("*.png")), (64, 64)
    labels = [path.parent.name == "hole" for path in paths]
    masks = {path: f"data/part/ground_truth/hole/{path.stem}_mask.png" for path in paths}
    truth = [pixels(masks[p])[..., 0] > 0 if bad else np.zeros(large, bool) for p, bad in zip(paths, labels)]
    threshold = np.quantile(checkpoint()["normal_scores"], 0.99)
    for number, kind in enumerate(("feature", "backbone", "reconstruction", "feature")):
        capsys.readouterr()
        run(evaluate.main, "--score", kind)
        maps = anomaly_maps(paths, kind)
        found = rows(f"runs/part/{kind}/scores.csv")
        ranking = [float(row["score"]) for row in found]
        assert ranking == sorted(ranking, reverse=True)
        found = {row["path"]: row for row in found}
        assert [found[str(path)]["folder"] for path in paths] == [path.parent.name for path in paths]
        scores = [float(found[str(path)]["score"]) for path in paths]
        assert scores == pytest.approx(image_scores(maps), rel=1e-3)
        results = rows("runs/results.csv")
        row, = [row for row in results if (row["category"], row["score"]) == ("part", kind)]
        assert len(results) == 2 * min(number + 1, 3)  # replaced, not repeated; a mean for each kind
        assert float(row["image_auroc"]) == roc_auc_score(labels, scores) < 1
        expected = roc_auc_score(np.ravel(truth), np.ravel([enlarged(m, large) for m in maps]))
        assert float(row["pixel_auroc"]) == pytest.approx(expected, abs=1e-3)
        for path, anomaly_map in zip(paths, maps):
            heatmap = f"runs/part/{kind}/heatmaps" / path.relative_to(TEST)
            check_heatmap(heatmap, path, anomaly_map, threshold if kind == "feature" else maps.max() / 1.5)
        text = "above the threshold 1 of 3 good and 2 of 2 defective images"
        assert (text in capsys.readouterr().out) == (kind == "feature")
    for column, path in ((2, paths[-2]), (3, paths[-1])):  # after two good ones
        check_column("runs/part/feature/overview.png", column, path, masks[path])


def test_threshold_is_the_quantile_of_leave_one_out_scores(workspace, capsys):
    """By brute force; after training on other images, as many as before, the new one is used.
    --threshold-images 3 takes images 0, 2 and 4 of 6; with 0 nothing is decided."""
    found = []
    for options in (None, [], ["--threshold-images", 3]):
        if options is not None:
            for path in GOOD.iterdir():
                Image.fromarray((pixels(path) * np.random.rand(64, 64, 1)).astype(np.uint8)).save(path)
            run(train.main, "--steps", 0, *options)
        run(evaluate.main, "--quantile", 0.7)
        known = vectors(sorted(GOOD.iterdir()))
        expected = [image_scores(distances(known[[i]], np.delete(known, i, axis=0)))[0] for i in range(6)]
        expected = expected[::2 if options else 1]
        assert checkpoint()["normal_scores"].tolist() == pytest.approx(expected, rel=1e-3)
        found += re.findall(r"threshold ([\d.]+), the 0.7 quantile", capsys.readouterr().out)
        assert float(found[-1]) == pytest.approx(np.quantile(expected, 0.7), rel=1e-3)
    assert float(found[1]) > 2 * float(found[0]) and len(found) == 3
    run(train.main, "--steps", 0, "--threshold-images", 0)
    run(evaluate.main, "--predict", TEST)
    assert {row["is_anomalous"] for row in rows("runs/part/predictions/scores.csv")} == {""}


def scores_with(**options):
    """The scores of the test set after a change of the checkpoint's configuration."""
    content = checkpoint()
    content["config"].update(options)
    torch.save(content, CHECKPOINT)
    run(evaluate.main)
    return np.array([float(row["score"]) for row in sorted(
        rows("runs/part/feature/scores.csv"), key=lambda row: row["path"])])


def test_batches_do_not_change_scores_and_a_part_of_the_memory_does(workspace):
    """--batch-size by less than 1e-4; --memory-fraction only upwards, always by the same draw."""
    whole, model = scores_with(batch_size=4), patchae.load_checkpoint(CHECKPOINT)[0]
    assert scores_with(batch_size=1) == pytest.approx(whole, rel=1e-4)
    part = scores_with(memory_fraction=0.1)
    assert (part >= whole * 0.9999).all() and (part > whole * 1.001).any()
    assert (scores_with() == part).all()
    images = checkpoint()["images"] / 255
    memory = patchae.build_memory(model, [images[3:]])
    alone = torch.cat([patchae.score_maps(model, image[None], memory) for image in images[:3]])
    assert patchae.score_maps(model, images[:3], memory).numpy() == pytest.approx(alone.numpy(), abs=2e-4)


def test_results_csv_by_hand(tmp_path, capsys):
    """The rows of all result.csv, a mean over each kind, without nan; a category that is called mean stays a
    category. The rows of one kind are printed, in per cent."""
    for row in (["a", "feature", 0.5, 0.9, 1.0], ["a", "backbone", 0.2, math.nan, 1.0],
                ["mean", "feature", 1.0, math.nan, 2.0]):
        folder = tmp_path / row[0] / row[1]
        folder.mkdir(parents=True)
        evaluate.write_csv(folder / "result.csv", evaluate.RESULT, [[*row, 3, 0, "resnet18", "random"]])
    evaluate.gather_results(tmp_path, "feature")
    assert [",".join(row.values()) for row in rows(tmp_path / "results.csv")] == [
        "a,backbone,0.2,nan,1.0,3,0,resnet18,random", "a,feature,0.5,0.9,1.0,3,0,resnet18,random",
        "mean,feature,1.0,nan,2.0,3,0,resnet18,random",
        "mean,feature,0.75,0.9,1.5,,,,", "mean,backbone,0.2,nan,1.0,,,,"]
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["a", "feature", "50.0%", "90.0%", "1.000"], ["mean", "feature", "100.0%", "undefined", "2.000"],
        ["mean", "feature", "75.0%", "90.0%", "1.500"]]


def test_predictions(workspace):
    """Most anomalous first, decided by the threshold; each image has its own heatmap and column.
    A single file is judged as it is among others."""
    Path("photos/sub").mkdir(parents=True)
    names = {"hole.png": "hole/000.png", "other.png": "hole/001.png", "sub/good.png": "good/001.png"}
    for name, source in names.items():
        shutil.copy(TEST / source, f"photos/{name}")
    Image.open(TEST / "good/000.png").resize((150, 90)).save("photos/broad.JPG")
    run(evaluate.main, "--predict", "photos")
    threshold = np.quantile(checkpoint()["normal_scores"], 0.99)
    paths = [Path("photos", name) for name in (*names, "broad.JPG")]
    maps = anomaly_maps(paths)
    ranked = sorted(zip(image_scores(maps), paths, maps), key=lambda row: -row[0])
    table, folder = rows("runs/part/predictions/scores.csv"), Path("runs/part/predictions")
    assert [row["path"] for row in table] == [str(path) for _, path, _ in ranked]
    assert [float(row["score"]) for row in table] == pytest.approx([row[0] for row in ranked], rel=1e-3)
    assert [row["is_anomalous"] for row in table] == [str(score > threshold) for score, _, _ in ranked]
    assert {row["is_anomalous"] for row in table} == {"True", "False"}
    for column, (_, path, anomaly_map) in enumerate(ranked):
        name = path.relative_to("photos").as_posix().replace(".JPG", ".JPG.png")
        check_heatmap(folder / "heatmaps" / name, path, anomaly_map, threshold)
        check_column(folder / "overview.png", column, path)
    run(evaluate.main, "--predict", "photos/other.png")
    row, = rows(folder / "scores.csv")
    assert row in table and row["path"] == str(Path("photos/other.png"))
    assert [path.name for path in (folder / "heatmaps").iterdir()] == ["other.png"]


def test_what_is_normal_does_not_glow_and_the_threshold_is_half_way():
    """Below 0.9 thresholds no opacity, above 1.1 the most; at 1 the middle colour, for any threshold."""
    for threshold in (1.0, 3.0):
        levels = torch.tensor([[0.1, 0.5, 0.89, 1.0, 1.2, 1.5, 9.0]]) * threshold
        colour, opacity = evaluate.heat(levels, (1, 7), threshold)
        assert opacity[0, :, 0] == pytest.approx([0, 0, 0, 0.3, 0.6, 0.6, 0.6], abs=1e-5)
        assert colour[0, [0, 1, 3, 5, 6]] == pytest.approx(evaluate.COLOURS[[0, 0, 2, 4, 4]], abs=1e-2)


# ---- both scripts, and what is written about them -----------------------------------------------
def test_the_demo_draws_its_set_and_needs_no_download(tmp_path, monkeypatch):
    """train.py --demo and evaluate.py --demo; fewer and smaller images to save time."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=AssertionError))
    monkeypatch.setattr(train, "HELD_OUT", 1)
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


@pytest.mark.parametrize("words", list(quoted_commands()), ids=" ".join)
def test_quoted_commands_are_understood(words, monkeypatch):
    """Options that the scripts know; of pytest files that are there; of other scripts --help."""
    if words[0] in ("train.py", "evaluate.py"):
        {"train.py": train, "evaluate.py": evaluate}[words[0]].parse(words[1:])
    elif words[0] == "-m":
        assert words[1] in ("venv", "pip", "pytest")
        assert all((ROOT / w.split("::")[0]).exists() for w in words[2:] if w.startswith("tests/"))
    else:
        monkeypatch.setattr(sys, "argv", [words[0], "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        assert stop.value.code == 0


def test_the_readme_is_short_and_quotes_the_commands_that_matter():
    """At most 200 lines; the test above finds the demo, one's own images, the tests."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    found = [" ".join(words) for words in quoted_commands()]
    for wanted in ("train.py --demo", "evaluate.py --demo", "--predict", "-m pytest", "make_toy.py"):
        assert any(wanted in command for command in found), wanted


def test_the_python_of_the_readme_runs(workspace):
    """Its first python block, on the tests' data, writes a heatmap."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    for kind in ("gouge", "oil", "chip", "fibre"):
        shutil.copytree(TEST / "hole", TEST / kind)
    before = set(Path(".").rglob("*.png"))
    exec(code.replace("runs/flange", "runs/part").replace("data/toy/flange", "data/part"), {})
    written = set(Path(".").rglob("*.png")) - before
    assert written and all(pixels(path).std() > 1 for path in written)
