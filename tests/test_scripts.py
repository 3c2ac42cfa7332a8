"""The scripts as a user runs them: train, evaluate, predict, resume; and the README's commands."""
import csv
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, draw_dataset, fails
from PIL import Image
from sklearn.metrics import roc_auc_score

import evaluate
import patchae
import train


def run(main, *argv):
    """main with these arguments must succeed."""
    assert main([str(a) for a in argv]) == 0


def rows(path):
    """A CSV file as a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(path):
    """The tensors of a checkpoint."""
    return torch.load(path, weights_only=True)["tensors"]


def same(one, two):
    """Both hold equal tensors under equal names."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy of the trained folder that a test may change; options for evaluate.py."""
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def options(workspace, *names):
    """--data, --category, --out and --device of a workspace."""
    return ["--data", workspace / "data", "--category", *(names or ["part"]),
            "--out", workspace / "runs", "--device", "cpu"]


def test_training_writes_what_it_promises_without_a_test_folder(tmp_path, capsys):
    """train.py works on a tree that has no test/ at all, and prints a line per epoch."""
    draw_dataset(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "part" / "test")
    shutil.rmtree(tmp_path / "data" / "part" / "ground_truth")
    run(train.main, *TINY, "--epochs", 2, *options(tmp_path))
    out = capsys.readouterr().out
    assert len(re.findall(r"part: epoch \d/2  loss \d\.\d+  [\d.]+ images/s  \d+ s left", out)) == 2
    assert "device: cpu" in out and "weights: random" in out
    folder = tmp_path / "runs" / "part"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "defects.png", "train.csv"]
    assert [row["epoch"] for row in rows(folder / "train.csv")] == ["1", "2"]
    assert Image.open(folder / "defects.png").size[0] == 4 * (patchae.CELL + patchae.GAP)


def test_checkpoint_is_plain_and_small(trained):
    """No backbone weights (only random weights' statistics); plain values; weights_only loads it."""
    path = trained / "runs" / "part" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    assert content["format"] == patchae.CHECKPOINT_FORMAT and len(content["fingerprint"]) == 64
    assert all(name.startswith(("encoder", "decoder")) or "running_" in name
               for name in content["tensors"])
    assert content["config"]["backbone"] == "resnet18" and "optimizer" not in content


def test_fine_tuned_backbone_is_in_the_checkpoint_and_used(tmp_path):
    """--finetune-backbone changes the backbone's weights; evaluate.py restores the changed ones."""
    draw_dataset(tmp_path / "data")
    run(train.main, *TINY, "--finetune-backbone", "--backbone-lr", 0.01, *options(tmp_path))
    path = tmp_path / "runs" / "part" / "checkpoint.pt"
    content = patchae.load_checkpoint(path)
    weight = content["tensors"]["backbone.conv1.weight"]
    assert torch.equal(patchae.restore(content, path).backbone.conv1.weight, weight)
    assert not torch.equal(patchae.build_model(content["config"])[0].backbone.conv1.weight, weight)


def test_evaluation_writes_scores_pictures_and_results(workspace, capsys):
    """scores.csv gives, by scikit-learn, the AUROC in results.csv; a picture for each image."""
    run(evaluate.main, *options(workspace))
    folder = workspace / "runs" / "part"
    scores = rows(folder / "scores.csv")
    assert [(row["path"], row["label"]) for row in scores] == [
        ("part/test/good/000.png", "good"), ("part/test/good/001.png", "good"),
        ("part/test/hole/000.png", "hole"), ("part/test/hole/001.png", "hole")]
    expected = roc_auc_score([row["label"] != "good" for row in scores],
                             [float(row["score"]) for row in scores])
    results = rows(workspace / "runs" / "results.csv")
    assert list(results[0]) == ["category", "score", "image_auroc", "pixel_auroc",
                                "seconds_per_image", "seed", "backbone", "weights"]
    assert [row["category"] for row in results] == ["part", "mean"]
    assert float(results[0]["image_auroc"]) == expected and 0.5 < float(results[0]["pixel_auroc"]) <= 1
    pictures = sorted(p.relative_to(folder / "heatmaps").as_posix() for p in folder.glob("heatmaps/*/*"))
    assert pictures == ["good/000.png", "good/001.png", "hole/000.png", "hole/001.png"]
    for name in ("overview.png", "histogram.png"):
        Image.open(folder / name).verify()
    out = capsys.readouterr().out
    assert "of 2 good and" in out and "of 2 defective images" in out


def test_pixel_auroc_by_another_route(workspace):
    """From the maps themselves: bilinear to the image size, masks > 0, scikit-learn over all pixels."""
    args = evaluate.parse([str(a) for a in options(workspace)])
    with torch.inference_mode():
        model, memory, _ = evaluate.prepare("part", args, torch.device("cpu"))
        samples = evaluate.list_test(workspace / "data" / "part")
        maps = evaluate.score_images([p for p, _, _ in samples], model, memory, args, "")
    masks = [np.asarray(Image.open(m)) > 0 if m else np.zeros((64, 64), bool) for _, _, m in samples]
    up = torch.nn.functional.interpolate(maps[:, None], (64, 64), mode="bilinear").numpy()
    expected = roc_auc_score(np.stack(masks).ravel(), up.ravel())
    assert evaluate.pixel_auroc(samples, maps, 64) == pytest.approx(expected)


def test_results_keep_other_rows_and_replace_their_own(workspace):
    """A row per category and score kind; evaluated again it is replaced, and means come last."""
    for kind in ("feature", "backbone", "reconstruction", "feature"):
        run(evaluate.main, *options(workspace), "--score", kind, "--no-threshold")
    found = [(row["category"], row["score"]) for row in rows(workspace / "runs" / "results.csv")]
    assert sorted(found[:3]) == [("part", "backbone"), ("part", "feature"), ("part", "reconstruction")]
    assert sorted(found[3:]) == [("mean", "backbone"), ("mean", "feature"), ("mean", "reconstruction")]


def test_mean_row_is_the_mean_of_the_categories(tmp_path):
    """update_results by hand: (0.5 + 1) / 2 = 0.75; an undefined pixel AUROC is no part of a mean."""
    path = tmp_path / "results.csv"
    evaluate.update_results(path, [["a", "feature", 0.5, 0.9, 1.0, 0, "resnet18", "random"]])
    evaluate.update_results(path, [["b", "feature", 1.0, float("nan"), 2.0, 1, "resnet18", "random"]])
    mean = rows(path)[-1]
    assert (mean["image_auroc"], mean["pixel_auroc"], mean["seconds_per_image"]) == ("0.75", "0.9", "1.5")
    assert (mean["seed"], mean["backbone"]) == ("several", "resnet18")


def test_threshold_is_the_quantile_of_leave_one_out_scores(workspace, capsys):
    """Exactly: each normal image scored by a memory that was built from the other images only."""
    run(evaluate.main, *options(workspace), "--quantile", 0.5)
    threshold = float(re.search(r"threshold: ([\d.]+),", capsys.readouterr().out).group(1))
    model = patchae.restore(patchae.load_checkpoint(workspace / "runs/part/checkpoint.pt"), "")
    paths = patchae.list_images(workspace / "data/part/train/good")
    args = evaluate.parse([str(a) for a in options(workspace)])
    expected = []
    with torch.inference_mode():
        for path in paths:
            others = [other for other in paths if other != path]
            batches = evaluate.batches_of(others, model, "")
            memory = patchae.build_memory(model, batches, len(others), "feature", 1.0)
            maps = evaluate.score_images([path], model, memory, args, "")
            expected.append(maps.max().item())
    kept = json.loads((workspace / "runs/part/threshold_feature.json").read_text())
    np.testing.assert_allclose(kept["normal_scores"], expected, rtol=1e-4)
    assert threshold == pytest.approx(np.median(expected), rel=1e-3)
    assert kept["threshold"] == pytest.approx(threshold, abs=1e-4) and kept["quantile"] == 0.5


def test_threshold_is_kept_until_the_memory_changes(workspace, monkeypatch):
    """A second run reads the normal scores; with other normal images they are computed anew."""
    run(evaluate.main, *options(workspace))
    cache = workspace / "runs/part/threshold_feature.json"
    before, left_out = cache.read_text(), []
    score_maps = patchae.score_maps
    monkeypatch.setattr(patchae, "score_maps", lambda *args, own=None: (
        left_out.append(own), score_maps(*args, own=own))[1])
    run(evaluate.main, *options(workspace))
    assert set(left_out) == {None} and cache.read_text() == before
    (workspace / "data/part/train/good/000.png").unlink()
    run(evaluate.main, *options(workspace))
    assert set(left_out) == {None, 0, 1, 2, 3, 4} and cache.read_text() != before
    cache.write_text("{not json")
    run(evaluate.main, *options(workspace))
    assert len(json.loads(cache.read_text())["normal_scores"]) == 5


def test_test_labels_do_not_move_the_threshold(workspace, capsys):
    """Defective images renamed good: another AUROC, the same threshold."""
    run(evaluate.main, *options(workspace))
    before = re.search(r"threshold: .*", capsys.readouterr().out).group()
    (workspace / "runs/part/threshold_feature.json").unlink()
    shutil.copy(workspace / "data/part/test/hole/000.png", workspace / "data/part/test/good/009.png")
    run(evaluate.main, *options(workspace))
    out = capsys.readouterr().out
    assert before in out and "of 3 good and" in out


def test_predict_a_folder_ranks_decides_and_draws(workspace, tmp_path, capsys):
    """Labels unknown: most anomalous first, the threshold decides, a heatmap for each image."""
    photos = tmp_path / "photos"
    shutil.copytree(workspace / "data/part/test/good", photos / "shift one")
    shutil.copy(workspace / "data/part/test/hole/000.png", photos / "broken.png")
    Image.open(photos / "broken.png").resize((150, 90)).save(photos / "broken.jpg")
    run(evaluate.main, *options(workspace), "--predict", photos, "--quantile", 1)
    folder = workspace / "runs" / "part"
    found = rows(folder / "predictions.csv")
    scores = [float(row["score"]) for row in found]
    threshold = float(re.search(r"threshold: ([\d.]+),", capsys.readouterr().out).group(1))
    assert scores == sorted(scores, reverse=True) and len(found) == 4
    assert [row["is_anomalous"] for row in found] == [str(s > threshold) for s in scores]
    names = {p.relative_to(folder / "predictions").as_posix() for p in folder.glob("predictions/**/*.png")}
    assert names == {"broken.png", "broken.jpg.png", "shift one/000.png", "shift one/001.png"}
    assert Image.open(folder / "predictions" / "broken.jpg.png").size == (150, 90)
    Image.open(folder / "predictions.png").verify()


def test_predict_agrees_with_evaluation(workspace):
    """One image by --predict has the score that the test set gave it."""
    run(evaluate.main, *options(workspace))
    expected = float(rows(workspace / "runs/part/scores.csv")[2]["score"])
    run(evaluate.main, *options(workspace), "--predict", workspace / "data/part/test/hole/000.png")
    found = rows(workspace / "runs/part/predictions.csv")
    assert len(found) == 1 and float(found[0]["score"]) == pytest.approx(expected, rel=1e-5)


def test_what_is_normal_does_not_glow_and_the_threshold_is_half_way():
    """One colour scale: below 0.9 thresholds no opacity, above 1.1 the most, at 1 the middle colour."""
    levels = torch.tensor([[0.1, 0.5, 0.89, 1.0, 1.2, 1.5, 9.0]]) * 3.0
    colour, opacity = evaluate.heat(levels, (1, 7), scale=3.0)
    assert opacity[0, :3, 0].tolist() == [0, 0, 0] and opacity[0, 4:, 0].tolist() == [0.6] * 3
    assert colour[0, 3] == pytest.approx(evaluate.COLOURS[2]) and opacity[0, 3, 0] == pytest.approx(0.3)
    assert colour[0, 0].tolist() == colour[0, 1].tolist() == evaluate.COLOURS[0].tolist()
    assert colour[0, 5].tolist() == colour[0, 6].tolist() == evaluate.COLOURS[-1].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_scores_whatever_the_workers(trained, tmp_path, workers):
    """Training again, with and without worker processes, gives the same tensors and scores."""
    argv = ["--data", trained / "data", "--category", "part", "--out", tmp_path]
    run(train.main, *TINY, *argv, "--workers", workers)
    assert same(tensors(tmp_path / "part/checkpoint.pt"), tensors(trained / "runs/part/checkpoint.pt"))
    run(evaluate.main, *argv, "--device", "cpu")
    again = [row["score"] for row in rows(tmp_path / "part/scores.csv")]
    run(evaluate.main, *argv, "--device", "cpu")
    assert again == [row["score"] for row in rows(tmp_path / "part/scores.csv")]


def test_another_seed_gives_other_weights(trained, tmp_path):
    """--seed matters: so the equality above is not for want of randomness."""
    run(train.main, *TINY, "--data", trained / "data", "--category", "part", "--out", tmp_path,
        "--seed", 1)
    assert not same(tensors(tmp_path / "part/checkpoint.pt"), tensors(trained / "runs/part/checkpoint.pt"))


def test_no_defects_trains_on_the_images_as_they_are(trained):
    """--no-defects: the data set returns the normal image and an empty mask."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for defects in (True, False):
        dataset = train.DefectedImages(images, patchae.Config(defects=defects))
        image, mask = dataset[0, 1]
        assert torch.equal(image, images[1] / 255) != defects and mask.any() == defects


def interrupt_after(monkeypatch, epochs):
    """Make train.py stop as by Ctrl-C at the start of epoch number `epochs`."""
    whole = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda model, optimizer, batches, epoch, steps: (
        (_ for _ in ()).throw(KeyboardInterrupt) if epoch == epochs
        else whole(model, optimizer, batches, epoch, steps)))


def test_resume_gives_the_weights_of_an_uninterrupted_run(trained, tmp_path, monkeypatch, capsys):
    """Stopped after 2 of 4 epochs and resumed: the same tensors, the same log but for the speed."""
    argv = [*TINY, "--epochs", 4, "--data", trained / "data", "--category", "part"]
    run(train.main, *argv, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert train.main([str(a) for a in [*argv, "--out", tmp_path / "cut"]]) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut/part/checkpoint.pt").exists()
    fails(capsys, train.main, [*argv, "--out", tmp_path / "cut", "--resume", "--lr", 0.5], "--resume")
    run(train.main, *argv, "--out", tmp_path / "cut", "--resume")
    assert same(tensors(tmp_path / "cut/part/checkpoint.pt"), tensors(tmp_path / "whole/part/checkpoint.pt"))
    losses = [[row["loss"] for row in rows(tmp_path / out / "part/train.csv")] for out in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not (tmp_path / "cut/part/unfinished.pt").exists()
    run(train.main, *argv, "--out", tmp_path / "cut", "--resume")
    assert "nothing to resume" in capsys.readouterr().out


def test_an_interrupted_training_keeps_the_previous_checkpoint(workspace, monkeypatch):
    """Ctrl-C while training anew: checkpoint.pt is byte for byte the one before."""
    path = workspace / "runs/part/checkpoint.pt"
    before = path.read_bytes()
    interrupt_after(monkeypatch, 1)
    assert train.main([str(a) for a in [*TINY, "--epochs", 3, *options(workspace)]]) == 130
    assert path.read_bytes() == before


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path):
    """write_whole: if the process dies half-way, the file under its name is still the previous one."""
    path = tmp_path / "file.txt"
    path.write_text("previous")
    code = ("import os, sys, pathlib, patchae\n"
            "def write(t):\n    f = open(t, 'w'); f.write('half'); f.flush(); os._exit(9)\n"
            "patchae.write_whole(pathlib.Path(sys.argv[1]), write)")
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 9
    assert path.read_text() == "previous"


def test_scores_are_the_same_for_every_batch_size_and_block(workspace, monkeypatch):
    """Scoring in other batches and blocks changes the scores by less than 1e-4 of their size."""
    run(evaluate.main, *options(workspace))
    before = [float(row["score"]) for row in rows(workspace / "runs/part/scores.csv")]
    monkeypatch.setitem(patchae.DISTANCES_AT_ONCE, "cpu", 256 * 100)
    content = patchae.load_checkpoint(workspace / "runs/part/checkpoint.pt")
    content["config"].batch_size = 1
    content["config"] = patchae.asdict(content["config"])
    torch.save(content, workspace / "runs/part/checkpoint.pt")
    run(evaluate.main, *options(workspace))
    after = [float(row["score"]) for row in rows(workspace / "runs/part/scores.csv")]
    np.testing.assert_allclose(after, before, rtol=1e-4)


def test_memory_options(workspace, capsys):
    """--memory-fraction and --memory-images make the memory smaller by what they say."""
    run(evaluate.main, *options(workspace), "--memory-fraction", 0.25)
    run(evaluate.main, *options(workspace), "--memory-images", 1)
    out = capsys.readouterr().out
    assert "6 images × 64 vectors × 192 channels" in out and "1 images × 256 vectors" in out
    assert "threshold: undefined (one normal image)" in out


def test_progress_speaks_only_to_a_terminal(capsys, monkeypatch):
    """Quiet in a pipe; on a terminal one line with percentage and time left."""
    assert list(patchae.progress([1, 2], "work", 2)) == [1, 2] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(patchae.progress([1, 2], "work", 2))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "work: 50 %, " in err and "work: 100 %, 0 s left" in err


def test_importing_has_no_effect(tmp_path):
    """No output, no file, no thread setting changed."""
    code = "import torch; n = torch.get_num_threads(); import patchae, train, evaluate; " \
           "assert torch.get_num_threads() == n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def readme_commands():
    """Every python command in a code block of README.md and data/README.md."""
    for path in (ROOT / "README.md", ROOT / "data" / "README.md"):
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for part in re.split(r"&&|\n", block.replace("\\\n", " ")):
                words = shlex.split(part, comments=True)
                if words and re.search(r"python3?$", words[0]):
                    yield words[1:]


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_readme_commands_parse(words, monkeypatch):
    """Every command that a README quotes is one that the scripts understand."""
    if words[0] == "train.py":
        train.parse(words[1:])
    elif words[0] == "evaluate.py":
        evaluate.parse(words[1:])
    elif words[0] == "-m":
        assert words[1] in ("venv", "pip", "pytest")
        assert all((ROOT / w.split("::")[0]).exists() for w in words[2:] if w.startswith("tests/"))
    else:
        monkeypatch.setattr(sys, "argv", [words[0], "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        assert stop.value.code == 0


def test_readme_speaks_of_the_demo_and_of_mvtec():
    """The commands above are really found: the demo, MVTec AD, prediction and the tests."""
    found = [" ".join(words) for words in readme_commands()]
    for wanted in ("train.py --demo", "evaluate.py --demo", "--category all", "--predict", "-m pytest"):
        assert any(wanted in command for command in found), wanted
