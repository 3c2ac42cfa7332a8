"""train.py: what a training does, what it writes and prints, its options.

- Each step draws new defects into a random normal image, the input and the target of the loss.
- Plain Adam with a cosine. The encoder, and the backbone if it is trained, have their own rate.
- Only train/good is opened. The same seed gives the same files.
- OUT/NAME is made, and train.csv begun, before the first step. checkpoint.pt comes last.
- Nothing else in OUT/NAME is touched. Evaluations of the checkpoint before are named.
- --skip-finished leaves out a category whose checkpoint has the same Config and images.
- An option changes what its help names and nothing else. The help names every default.
"""
import copy
import csv
import dataclasses
import itertools
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (CHECKPOINT, GOOD, OPTIONS, TEST, TINY, contents, draw_images, fails,
                      make_model, random_states, seed_all, watch)
from PIL import Image

import patchae
import train
from patchae import RECIPES, Config, PatchAE, UserError

LOG = Path("runs/part/train.csv")


def run(*argv, code=0):
    """train.main must end with this code, given the options of a tiny training and these."""
    assert train.main([*OPTIONS, *TINY, *(str(word) for word in argv)]) == code


def checkpoint(path=CHECKPOINT):
    """What a checkpoint holds."""
    return torch.load(path, weights_only=True)


def pixels(path):
    """An image file by Pillow alone, (H, W, 3) in 0 to 255."""
    return np.array(Image.open(path).convert("RGB"), dtype=float)


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
    defects = watch(monkeypatch, patchae, "add_defects")
    losses = watch(monkeypatch, patchae, "training_loss")
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
    after = checkpoint()
    assert set(after) == {"config", "model", "images", "names", "normal_scores"}
    assert after["config"] == before["config"] and after["names"] == [p.name for p in normal]
    assert np.array_equal(after["images"].permute(0, 2, 3, 1), [pixels(path) for path in normal])
    assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])
    assert torch.equal(after["normal_scores"], before["normal_scores"])
    model = PatchAE.load(CHECKPOINT)
    model.remember(model.images)  # R of the end of the training
    assert torch.equal(model.normal_scores, after["normal_scores"])
    assert picture == Path("runs/part/defects.png").read_bytes()
    for one, other in zip(LOG.read_text().splitlines(), log.splitlines(), strict=True):
        assert one.rpartition(",")[0] == other.rpartition(",")[0]


def test_what_a_training_prints_writes_and_draws(workspace, monkeypatch, capsys):
    """A loss is the mean since the last row; here a row takes 60 s: after 2 of 13 steps 330 s are
    left.

    defects.png shows normal images, their defects, the masks, what the decoder draws; what is
    missing follows from its pixels. A copy is left out and named. Nothing goes to a pipe but that.
    Images are rebuilt one at a time, as in training, so that what can be trained can be looked at.
    """
    losses = watch(monkeypatch, patchae, "training_loss")
    looked = watch(monkeypatch, PatchAE, "features")
    clock = itertools.count(0, 60).__next__
    monkeypatch.setattr(train, "Log", partial(train.Log, clock=clock))
    Image.open(GOOD / "000.png").save(GOOD / "same.tif")
    run("--steps", 13)
    out, err = capsys.readouterr()
    text = LOG.read_bytes().decode()
    log = list(csv.DictReader(text.splitlines()))
    assert "\r" not in text and list(log[0]) == ["step", "loss", "missing_share", "seconds"]
    losses = [loss.item() for _, loss in losses]
    means = [(a + b) / 2 for a, b in zip(losses[:12:2], losses[1::2])] + losses[12:]
    steps, missing = [2, 4, 6, 8, 10, 12, 13], [float(row["missing_share"]) for row in log]
    assert [list(map(float, row.values())) for row in log] == pytest.approx(
        np.array([steps, means, missing, np.arange(60, 421, 60)]).T, rel=1e-5)
    assert err == "" and {len(image) for (_, image, *_), _ in looked} == {1}
    assert out.splitlines()[1:] == [
        "part: left out 1 exact copies: same.tif", "part: 6 normal images",
        "part: backbone resnet18, weights random; the memory M will take 0.00 GiB",
        *(f"part: step {step}/13  loss {loss:.4f}  missing_share {share:.3f}  "
          f"{60 * n / step * (13 - step):.0f} s left"
          for n, (step, loss, share) in enumerate(zip(steps, means, missing), 1)),
        f"part: wrote {CHECKPOINT}"]
    cells = pixels("runs/part/defects.png")[2:, 2:].reshape(6, 66, 4, 66, 3)[:, :64, :, :64]
    normal, defected, mask, rebuilt = cells.transpose(2, 0, 1, 3, 4)
    assert np.array_equal(normal, [pixels(path) for path in sorted(GOOD.glob("*.png"))[:6]])
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
    for name in ("trained/scores.csv", "letter.txt", "predictions/scores.csv"):
        Path("runs/part", name).parent.mkdir(exist_ok=True)
        Path("runs/part", name).write_text("old")
    old, seen = contents("runs/part"), []

    def look(model, images, log):
        seen.append(len(LOG.read_text().splitlines()))
        log(4, 0.1)
        seen.append(len(LOG.read_text().splitlines()))
        assert contents("runs/part") == {**old, LOG: LOG.read_bytes()}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "fit", look)
        run()
    assert seen == [1, 2] and CHECKPOINT.read_bytes() == old[CHECKPOINT]
    capsys.readouterr()
    run("--steps", 1)
    out = capsys.readouterr().out
    assert "part: the evaluations in runs/part are of the checkpoint before" in out
    ours = {CHECKPOINT, LOG, Path("runs/part/defects.png")}
    after = contents("runs/part")
    assert set(after) == set(old) and {path for path in old if old[path] != after[path]} == ours


def test_a_loss_that_is_no_number_stops_the_training(workspace):
    """It names the options that help; and a training without steps is one."""
    run("--steps", 0)
    assert LOG.read_text() == "step,loss,missing_share,seconds\n"
    model = PatchAE.load(CHECKPOINT)
    model.config.steps = 4
    log = train.Log(model, model.images, Path("runs/part"))
    for loss in (math.nan, math.inf, 1e5):
        with pytest.raises(UserError, match="part: the loss is .*--lr or --encoder-lr"):
            log(1, loss)


def test_skip_finished(workspace, monkeypatch, capsys):
    """The same images and Config: left as it is. Another option, another image, a damaged or absent
    checkpoint: trained anew."""
    trained = Mock()
    monkeypatch.setattr(train, "fit", trained)
    before = CHECKPOINT.read_bytes()

    def trains(*argv):
        trained.reset_mock()
        run("--skip-finished", *argv)
        return trained.call_count

    assert trains() == 0 and CHECKPOINT.read_bytes() == before
    assert "part: runs/part has these images and options" in capsys.readouterr().out
    there = PatchAE.load(CHECKPOINT)
    for option in TRAIN_OPTIONS:
        _, config = train.parse([*OPTIONS, *TINY, *option.split()])
        with monkeypatch.context() as patch:
            patch.setattr(PatchAE, "load", lambda path: there)  # once is enough
            assert train.is_finished(CHECKPOINT, config, there.images) == ("--device" in option)
    CHECKPOINT.write_bytes(before[:-9])
    assert [trains(), trains()] == [1, 0]
    shutil.copy(TEST / "good/000.png", GOOD / "one_more.png")
    assert [trains(), trains()] == [1, 0]
    (GOOD / "one_more.png").write_bytes((TEST / "good/001.png").read_bytes())
    CHECKPOINT.rename("moved.pt")
    assert [trains(), trains()] == [1, 0]


def test_where_nothing_can_be_written_no_step_is_made(workspace, monkeypatch, capsys):
    """A file in the way, a full or read-only disk: one line that names the file."""
    monkeypatch.setattr(train, "fit", Mock(side_effect=AssertionError))
    Path("file").touch()
    fails(capsys, train.main, [*OPTIONS, *TINY, "--out", "file"], "file")
    full = PermissionError(13, "read-only", LOG)
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=full))
    fails(capsys, train.main, [*OPTIONS, *TINY], "read-only", LOG)


# ---- options ------------------------------------------------------------------------------------
def train_and_look(*argv):
    """Run train.py; what a run consists of, place by place, each a flat tensor."""
    def flat(*tensors):
        return torch.cat([torch.as_tensor(t).detach().float().flatten() for t in tensors])

    def part(state, name):
        return flat(*(state[key] for key in state if key.startswith(name)))

    def build(*arguments):
        model = build_model(*arguments)
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
        run(*argv)
    content, memory = checkpoint(), seen.pop("model").memory
    seen |= {name: part(content["model"], name) for name in ("backbone", "encoder", "decoder")}
    return content["config"], seen | {
        "images": flat(content["images"]), "scores": flat(content["normal_scores"]),
        "inputs": flat(*(t for (_, image, mask, *_), _ in losses for t in (image, mask))),
        "first loss": flat(losses[0][1]), "losses": flat(*(loss for _, loss in losses)),
        "memory": flat([len(one) for one in memory]),
        "checked": flat(np.hsplit(pixels("runs/part/defects.png"), 2)[0])}  # normal, defected


def differing(one, other):
    """The places in which two runs differ by more than rounding."""
    return {place for place in one if one[place].shape != other[place].shape or not torch.allclose(
        one[place], other[place], rtol=3e-4, atol=1e-6)}


TRAINED = {"losses", "encoder", "decoder", "scores"}
BACKBONE = {"backbone at start", "backbone", "first loss", *TRAINED}
TRAIN_OPTIONS = {
    "--backbone resnet50": {*BACKBONE, "encoder at start", "decoder at start"},
    "--weights other.pt": BACKBONE,
    "--stages 1": {*BACKBONE, "encoder at start", "decoder at start"},
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
    "--seed 1": {*BACKBONE, "decoder at start", "inputs", "checked"},
    "--device auto": set()}


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
    assert {name for name in config if config[name] != plain[0][name]} == names - {"device"}


def test_the_help_names_every_option_and_its_default(capsys):
    """A default that the help names is the default: given as the option it changes nothing.

    Every option stands in the table above, or is one of those that other tests use.
    """
    with pytest.raises(SystemExit, match="0"):
        train.parse(["--help"])
    text = capsys.readouterr().out
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", text)[1:]]
    defaults = {entry.split(",")[0].split()[0]: re.findall(r"\(default: ([^,;)]*)", entry)
                for entry in entries}
    elsewhere = {"--data", "--category", "--demo", "--out", "--skip-finished", "--recipe"}
    assert text.isascii() and {name for name in defaults if not defaults[name]} == (
        elsewhere - {"--out", "--recipe"})
    used = {word.replace("--no-", "--") for option in TRAIN_OPTIONS for word in option.split()}
    assert elsewhere | used >= set(defaults)
    assert defaults.pop("--channels") == ["as many as the joined stages have"]
    for name, found in defaults.items():
        words = {"yes": [name], "no": [name.replace("--", "--no-")]}
        given = words.get(found[0], [name, *found[0].split()]) if found else []
        assert train.parse(given)[1] == Config()


def test_recipes():
    """Each is a Config of its own; options win; --demo chooses the recipe of the demo."""
    assert train.parse([])[1] == train.parse(["--recipe", "parts"])[1] == Config()
    demo = Config("resnet18", "random", True, (1, 2), 96, 4, 1, steps=1500, encoder_lr=1e-3)
    textures = Config("resnet18", "random", True, (1, 2), 256, 8, lr=5e-3, encoder_lr=1e-3,
                      steps=1500)
    assert RECIPES == {"parts": Config(), "textures": textures, "demo": demo}
    assert train.parse(["--demo"])[1] == demo
    assert train.parse(["--demo", "--recipe", "textures"])[1] == textures
    assert train.parse("--demo --steps 7 --no-finetune-backbone --stages 3 1 3".split())[1] == (
        dataclasses.replace(demo, steps=7, finetune_backbone=False, stages=(1, 3)))


@pytest.mark.parametrize("option, words", [
    ("--image-size 63", "from 64 to 2048"), ("--image-size 100", "multiple of 32"),
    ("--patch-size 12", "--image-size 64"), ("--patch-size 3", "from 4 to 32"),
    ("--neighbourhood 2", "1, 3, 5, 7, 9"), ("--stages 0 2", "1, 2, 3, 4"), ("--lr 2", "from 0"),
    ("--lr nan", "from 0 to 1"), ("--encoder-lr -1", "from 0 to 1"), ("--steps -1", "from 0"),
    ("--steps many", "invalid int value: 'many'"), ("--backbone vgg", "wide_resnet50_2"),
    ("--memory-fraction 2", "from 0 to 1"), ("--defect-weight 1.1", "from 0 to 1"),
    ("--seed -1", "from 0"), ("--channels 0", "from 1"), ("--device tpu", "mps"),
    ("--recipe metal", "textures"), ("--none", "--help"), ("--start zero", "identity"),
    ("--weights x.pth", "state-dict file"), ("--device cuda", "--device auto")])
def test_options_out_of_range_are_refused_by_name(workspace, monkeypatch, capsys, option, words):
    """Before anything is computed; what is there stays as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "fit", Mock(side_effect=AssertionError("trained")))
    before = contents()
    fails(capsys, train.main, [*OPTIONS, *TINY, *option.split()], option.split()[0], words)
    assert contents() == before


def test_several_categories(workspace, capsys):
    """One that fails leaves the others, in the order asked for, and the exit code is 2. `all` means
    all; each is trained once."""
    for name in ("second", "third"):
        shutil.copytree("data/part", Path("data", name))
    Path("data/second/train/good/000.png").write_bytes(b"text")
    argv = [*OPTIONS, *TINY, "--steps", "0", "--out", "new", "--category"]
    fails(capsys, train.main, [*argv, "third", "second", "part/", "third"], "second/train/good/000")
    assert sorted(os.listdir("new")) == ["part", "third"]
    assert train.main([*argv, "all"]) == 2
    assert re.findall(r"(\w+): wrote", capsys.readouterr().out) == ["part", "third"]
