"""train.py: what a training does, what it writes and prints, its options.

- Each step draws new defects into a random normal image, the input and the target of the loss.
- Plain Adam with a cosine. The encoder, and the backbone if it is trained, have their own rate.
- Only train/good is opened. The same seed gives the same files.
- OUT/NAME is made, and train.csv begun, before the first step. checkpoint.pt comes last.
- Nothing else in OUT/NAME is touched. Evaluations of the checkpoint before are named.
- An option changes what its help names and nothing else. The help names every default.
"""
import copy
import dataclasses
import itertools
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (CHECKPOINT, GOOD, OPTIONS, TEST, TINY, contents, draw_images, fails,
                      make_model, pixels, random_states, rows, seed_all, watch)
from PIL import Image

import patchae
import train
from data.images import read_images
from patchae import RECIPES, Config, PatchAE, UserError

LOG = Path("runs/part/train.csv")


def run(*argv):
    """train.main must succeed, given the options of a tiny training and these."""
    assert train.main([*OPTIONS, *TINY, *argv]) == 0


def checkpoint():
    """What the checkpoint holds."""
    return torch.load(CHECKPOINT, weights_only=True)


# ---- fit ----------------------------------------------------------------------------------------
def adam_by_hand(model, inputs, config):
    """Train the model on the inputs (image, mask) with Adam as its authors wrote it down."""
    rates = {p: config.lr if name.startswith("decoder") else config.encoder_lr
             for name, p in model.named_parameters() if p.requires_grad}
    first, second = ({p: torch.zeros_like(p) for p in rates} for _ in range(2))
    for t, (image, mask) in enumerate(inputs):
        error = (model(image) - F.pixel_unshuffle(image, 4)).square().mean(dim=1)
        defective = F.pixel_unshuffle(mask.float(), 4).amax(dim=1) > 0
        loss = (1 - config.defect_weight) * error.mean()
        loss = loss + config.defect_weight * error[defective].mean()
        cosine = (1 + math.cos(math.pi * t / len(inputs))) / 2
        for p, g in zip(rates, torch.autograd.grad(loss, list(rates))):
            first[p] = 0.9 * first[p] + 0.1 * g
            second[p] = 0.999 * second[p] + 0.001 * g * g
            m, v = first[p] / (1 - 0.9**(t + 1)), second[p] / (1 - 0.999**(t + 1))
            p.data -= rates[p] * cosine * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("finetune", [False, True])
def test_three_steps_by_hand(monkeypatch, capsys, finetune):
    """Plain Adam with a cosine on the same inputs moves all weights to the same places.

    A frozen backbone stays, as the stored statistics always do. Each step is reported with its
    loss; nothing is printed.
    """
    model = make_model(steps=3, lr=3e-2, encoder_lr=3e-3, finetune_backbone=finetune)
    by_hand, before, reports = copy.deepcopy(model), copy.deepcopy(model.state_dict()), []
    losses = watch(monkeypatch, patchae, "training_loss")
    train.fit(model, draw_images(6, 3), lambda *report: reports.append(report))
    adam_by_hand(by_hand, [arguments[1:3] for arguments, _ in losses], model.config)
    assert reports == [(n + 1, loss.item()) for n, (_, loss) in enumerate(losses)]
    for name, expected in by_hand.state_dict().items():
        found, trainable = model.state_dict()[name], name in dict(model.named_parameters())
        moved = (expected - before[name]).float().norm()
        assert (found - expected).float().norm() <= 1e-3 * moved, name
        moves = name.partition(".")[0] in ("encoder", "decoder", finetune and "backbone")
        assert (moved > 0) == (trainable and moves)
    with torch.no_grad():  # as a notebook may have it for the rest
        train.fit(model, draw_images(2, 3))
    assert capsys.readouterr().out == ""


def test_inputs_are_random_images_with_new_defects(learned, model, monkeypatch):
    """Image and mask of the loss are what add_defects returned. All 6 images occur, in no fixed
    order, never twice with the same defects. What is pasted comes from any other image, never from
    the image itself. A single image is its own other; without defects it is as it is."""
    def number(image):
        return [torch.equal(image, known / 255) for known in learned.images].index(True)

    for ((_, image, mask, *_), _), (_, made) in zip(learned.losses, learned.defects, strict=True):
        assert torch.equal(image, made[0][None]) and torch.equal(mask, made[1][None])
    pairs = [(number(image), number(other)) for (image, other), _ in learned.defects]
    chosen, pasted = zip(*pairs)
    assert len(pairs) == 38 and all(a != b for a, b in pairs)
    assert set(chosen) == set(pasted) == set(range(6))
    assert len(set(zip(chosen, chosen[1:]))) > 12  # of 36 successions; 6 one after the other
    assert len(set(pairs)) > 12  # of 30; "always the next one" would be 6
    assert len(torch.stack([image for _, (image, _) in learned.defects]).unique(dim=0)) == 38
    defects, losses = (watch(monkeypatch, patchae, name)
                       for name in ("add_defects", "training_loss"))
    for wanted in (True, False):
        model.config = dataclasses.replace(model.config, steps=1, defects=wanted)
        train.fit(model, learned.images[:1])
    ((image, other), _), = defects
    _, ((_, plain, mask, *_), _) = losses
    assert number(image) == number(other) == number(plain[0]) == 0 and not mask.any()


def test_training_learns_to_rebuild_defects(learned):
    """The thesis in small: the loss falls, and of new defects more is rebuilt, in several draws."""
    losses = [loss.item() for _, loss in learned.losses]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    ratios = []
    for seed in range(4):
        seed_all(seed)
        images, masks = zip(*(train.with_defects(learned.images, i % 6) for i in range(12)))
        images, masks = torch.cat(images), torch.cat(masks).expand(-1, 3, -1, -1)
        errors = [(train.rebuild_images(model, images) - images)[masks].square().mean()
                  for model in (learned.before, learned.model)]
        ratios.append(errors[1] / errors[0])
    assert np.mean(ratios) < 0.9, ratios


# ---- a category, whole --------------------------------------------------------------------------
def test_a_training_is_repeated_by_its_seed_and_sees_only_train_good(workspace, monkeypatch):
    """Equal but for the seconds, from another state of each generator, which stays as it is."""
    shutil.copytree(TEST / "dent", "data/part/train/dent")
    normal, before = sorted(GOOD.iterdir()), checkpoint()
    picture, log = Path("runs/part/defects.png").read_bytes(), LOG.read_text()
    seed_all(7)
    states = random_states()
    with monkeypatch.context() as patch:
        opened = watch(patch, Image, "open")
        run()
    assert random_states() == states
    assert {path for (path, *_), _ in opened} == set(normal) and len(opened) == len(normal) == 6
    after, model = checkpoint(), PatchAE.load(CHECKPOINT)
    assert after["config"] == before["config"] and after["names"] == [p.name for p in normal]
    assert np.array_equal(after["images"].permute(0, 2, 3, 1), [pixels(path) for path in normal])
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    model.remember(model.images)  # R of the end of the training
    for scores in (before["normal_scores"], model.normal_scores):
        assert torch.equal(scores, after["normal_scores"])
    assert picture == Path("runs/part/defects.png").read_bytes()
    first, second = (re.sub(",[^,]*\n", "\n", text) for text in (log, LOG.read_text()))
    assert first == second and first.count("\n") == 5


def test_what_a_training_prints_writes_and_draws(workspace, monkeypatch, capsys):
    """A loss is the mean since the last row; here a row takes 60 s: after 2 of 13 steps 330 s are
    left.

    defects.png shows normal images, their defects, the masks, what the decoder draws; what is
    missing follows from its pixels. Nothing goes to a pipe but what is expected here. Images are
    rebuilt one at a time, as in training, so that what can be trained can be looked at. M takes
    6 · 128 vectors of 1000 numbers of 4 bytes.
    """
    losses = watch(monkeypatch, patchae, "training_loss")
    looked = watch(monkeypatch, PatchAE, "features")
    clock = itertools.count(0, 60).__next__
    monkeypatch.setattr(train, "Log", partial(train.Log, clock=clock))
    run("--steps", "13", "--start", "random", "--channels", "1000", "--memory-fraction", "0.5")
    out, err = capsys.readouterr()
    losses = [loss.item() for _, loss in losses]
    means = [(a + b) / 2 for a, b in zip(losses[:12:2], losses[1::2])] + losses[12:]
    log, steps = rows(LOG), [2, 4, 6, 8, 10, 12, 13]
    missing = [float(row["missing_share"]) for row in log]
    assert list(log[0]) == ["step", "loss", "missing_share", "seconds"]
    assert [list(map(float, row.values())) for row in log] == pytest.approx(
        np.array([steps, means, missing, np.arange(60, 421, 60)]).T, rel=1e-5)
    assert err == "" and {len(image) for (_, image, *_), _ in looked} == {1}
    assert out.splitlines()[1:] == [
        "part: 6 normal images",
        "part: backbone resnet18, weights random; the memory M will take 3 MiB",
        *(f"part: step {step}/13  loss {loss:.4f}  missing_share {share:.3f}  "
          f"{60 * n / step * (13 - step):.0f} s left"
          for n, (step, loss, share) in enumerate(zip(steps, means, missing), 1)),
        f"part: wrote {CHECKPOINT}"]
    cells = pixels("runs/part/defects.png")[2:, 2:].reshape(6, 66, 4, 66, 3)[:, :64, :, :64]
    normal, defected, mask, rebuilt = cells.transpose(2, 0, 1, 3, 4)
    assert np.array_equal(normal, [pixels(path) for path in sorted(GOOD.iterdir())])
    assert set(np.unique(mask)) == {0, 255} and (normal == defected)[mask == 0].all()
    assert (normal != defected)[mask == 255].mean() > 0.5
    error, all_of_it = (((one - defected)**2)[mask == 255].sum() for one in (rebuilt, normal))
    assert missing[-1] == pytest.approx(error / all_of_it, rel=0.03)
    image = torch.tensor(defected, dtype=torch.float32).permute(0, 3, 1, 2) / 255
    drawn = F.pixel_shuffle(PatchAE.load(CHECKPOINT)(image).detach(), 4).clamp(0, 1)
    assert abs(255 * drawn.permute(0, 2, 3, 1).numpy() - rebuilt).max() < 2


def test_in_which_order_a_training_writes_and_what_it_leaves_alone(workspace, monkeypatch, capsys):
    """train.csv is there before the first step and grows; the old checkpoint stays until the new
    one is whole. Evaluations, predictions and files of the user stay, and are named as old."""
    for name in ("letter.txt", "predictions-2/scores.csv"):
        Path("runs/part", name).parent.mkdir(exist_ok=True)
        Path("runs/part", name).write_text("old")
    old, fit = contents("runs/part"), train.fit

    def look(model, images, log):
        assert LOG.read_bytes() == b"step,loss,missing_share,seconds\n"
        fit(model, images, log)
        assert LOG.read_bytes().count(b"\n") == 2
        assert contents("runs/part") == {**old, LOG: LOG.read_bytes()}

    monkeypatch.setattr(train, "fit", look)
    run("--steps", "1")
    assert f"evaluations in {LOG.parent} are of the checkpoint before" in capsys.readouterr().out
    after = contents("runs/part")
    assert set(after) == set(old) and {path for path in old if old[path] != after[path]} == {
        CHECKPOINT, LOG, Path("runs/part/defects.png")}


def test_a_loss_that_is_no_number_stops_the_training(workspace):
    """It names the options that help; and a training without steps is one."""
    run("--steps", "0")
    model = PatchAE.load(CHECKPOINT)
    model.config.steps = 4
    log = train.Log(model, model.images, Path("runs/part"))
    for loss in (math.nan, math.inf, 1e5):
        with pytest.raises(UserError, match="part: the loss is .*--lr or --encoder-lr"):
            log(1, loss)


def test_several_categories(workspace, capsys):
    """One that fails leaves the others, in the order asked for, and the exit code is 2. `all` means
    all; each is trained once."""
    for name in ("second", "third"):
        shutil.copytree("data/part", Path("data", name))
    bad = Path("data/second/train/good/000.png")
    bad.write_bytes(b"text")
    argv = [*OPTIONS, *TINY, "--steps", "0", "--out", "new", "--category"]
    fails(capsys, train.main, [*argv, "third", "second", "part/", "third"], bad)
    assert sorted(os.listdir("new")) == ["part", "third"]
    assert train.main([*argv, "all"]) == 2
    assert re.findall(r"(\w+): wrote", capsys.readouterr().out) == ["part", "third"]


# ---- options ------------------------------------------------------------------------------------
METHOD = ["--backbone resnet50", "--weights other.pt", "--stages 1", "--image-size 96",
          "--patch-size 8", "--neighbourhood 1", "--start random", "--start random --channels 16",
          "--memory-fraction 0.5", "--finetune-backbone", "--no-defects", "--defect-weight 0",
          "--steps 1", "--lr 0.01", "--encoder-lr 0.01", "--seed 1"]
OTHERS = {"--data", "--category", "--demo", "--out", "--device", "--recipe"}


def scores_of(option=""):
    """Train as an option says: the Config, and the scores of the normal images."""
    _, config = train.parse([*TINY, "--steps", "2", *option.split()])
    images = read_images(sorted(GOOD.iterdir())[:3], config.image_size)
    model = patchae.build_model(config)
    train.fit(model, images)
    model.remember(images)
    return dataclasses.asdict(config), model.normal_scores


def test_an_option_changes_its_field_and_the_scores(workspace):
    """In the Config only the field of its name; and no option is accepted and ignored."""
    torch.save(make_model(stages=(1, 2), seed=1).backbone.state_dict(), "other.pt")
    plain, scores = scores_of()
    for option in METHOD:
        config, found = scores_of(option)
        names = {name.replace("-", "_") for name in re.findall("--(?:no-)?([a-z-]+)", option)}
        assert {name for name in plain if config[name] != plain[name]} == names
        assert not torch.allclose(found, scores, rtol=1e-4), option


def test_the_help_names_every_option_and_its_default(capsys):
    """A default that the help names is the default: given as the option it changes nothing."""
    with pytest.raises(SystemExit, match="0"):
        train.parse(["--help"])
    text = capsys.readouterr().out
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", text)[1:]]
    defaults = {re.match("[a-z-]+", entry)[0]: re.findall(r"\(default: ([^,;)]*)", entry)
                for entry in entries}
    used = {word.replace("--no-", "--") for option in METHOD for word in option.split()}
    assert text.isascii() and {word for word in used if word[0] == "-"} | OTHERS == set(defaults)
    assert defaults.pop("--channels") == ["as many as the joined stages have"]
    assert [name for name in defaults if not defaults[name]] == ["--data", "--category", "--demo"]
    for name, found in defaults.items():
        words = {"yes": [name], "no": [name.replace("--", "--no-")]}
        given = words.get(found[0], [name, *found[0].split()]) if found else []
        assert train.parse(given)[1] == Config()


def test_recipes():
    """Each is a Config of its own; options win; --demo chooses the recipe of the demo."""
    assert train.parse([])[1] == train.parse(["--recipe", "parts"])[1] == Config(
        "wide_resnet50_2", "imagenet", False, (1, 2, 3), 384, 12, 3, None, "identity", True,
        defect_weight=0.5, steps=1000, lr=2e-3, encoder_lr=1e-5, memory_fraction=1, seed=0)
    demo = Config("resnet18", "random", True, (1, 2), 96, 4, 1, steps=1500, encoder_lr=1e-3)
    textures = Config("resnet18", "random", True, (1, 2), 256, 8, lr=5e-3, encoder_lr=1e-3,
                      steps=1500)
    assert RECIPES == {"parts": Config(), "textures": textures, "demo": demo}
    assert train.parse(["--demo"])[1] == demo
    assert train.parse(["--demo", "--recipe", "textures"])[1] == textures
    assert train.parse("--demo --steps 7 --no-finetune-backbone --stages 3 1 3".split())[1] == (
        dataclasses.replace(demo, steps=7, finetune_backbone=False, stages=(1, 3)))
