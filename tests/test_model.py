"""The claims about the model: what it sees, one vector and one patch, training, the memory, the border."""
import ast
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import MEAN, ROOT, STD, watch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import patchae
import train

SMALL = {"backbone": "resnet18", "weights": "random", "image_size": 64, "layers": (1, 2), "patch_size": 4}


def make_model(**options):
    """A PatchAE of 64 × 64 pixels, 16 × 16 patches, with random weights; Φ has 64 + 128 channels."""
    return patchae.build_model(patchae.Config(**{**SMALL, **options}))


def draw_images(count, cells):
    """Smooth random textures (count, 3, 64, 64) uint8."""
    colours = 51 + 153 * torch.rand(count, 3, cells, cells)
    return F.interpolate(colours, (64, 64), mode="bilinear").byte()


def defected(images):
    """What train.fit is given as held out: normal images, each with defects, their masks."""
    pairs = [train.with_defects(images, i) for i in range(len(images))]
    return images / 255, *map(torch.cat, zip(*pairs))


@pytest.fixture(scope="module")
def shared():
    """One model for the tests that only look; no weight of its encoder and decoder is as at the start."""
    model = make_model()
    for weights in (*model.encoder.parameters(), *model.decoder.parameters()):
        weights.data += .02 * torch.randn_like(weights)
    return model


# ---- the backbone -------------------------------------------------------------------------------
@torch.no_grad()
def test_backbone_is_torchvisions_with_mirrored_borders():
    """Another route: in torchvision's network put a ReflectionPad2d in front of each convolution that
    would add zeros, and listen behind stages 1 and 3. The statistics are the stored ones, not the batch's.
    The stages of all backbones halve the image 2 to 5 times."""
    backbone = patchae.make_backbone("resnet18", (1, 3))
    resnet = torchvision.models.resnet18(weights=None).eval()
    resnet.load_state_dict(backbone.state_dict(), strict=False)
    image, maps = torch.randn(2, 3, 64, 96), {}
    for name, module in list(resnet.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Conv2d):
            mirrored = nn.Sequential(nn.ReflectionPad2d(module.padding[0]), module)
            setattr(resnet.get_submodule(parent), child, mirrored)
            module.padding = (0, 0)
        elif name in ("layer1", "layer3"):
            module.register_forward_hook(lambda *io, name=name: maps.update({name: io[2]}))
    resnet(image)
    torch.testing.assert_close(dict(backbone(image)), maps, rtol=1e-4, atol=1e-4)
    backbones = patchae.Config.__dataclass_fields__["backbone"].metadata["accepted"]
    assert len(backbones) == 4
    for name in backbones:
        with torch.device("meta"):  # without a number being computed
            maps = patchae.make_backbone(name, (1, 2, 3, 4))(torch.zeros(1, 3, 64, 64))
        assert [m.shape[2:] for m in maps.values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@torch.no_grad()
def test_features_are_the_tempered_maps_of_the_normalised_image():
    """Without averaging Φ of two stages on the grid of the first, by numpy: the map of stage 1, each vector
    divided by the root of its length, then that of stage 2, twice as large by interpolation."""
    model, image = make_model(neighbourhood=1), torch.rand(2, 3, 64, 64)
    fine, coarse = model.backbone(((image - torch.tensor(MEAN)) / torch.tensor(STD)).float()).values()
    fine, coarse = [m / np.linalg.norm(m, axis=1, keepdims=True)**.5 for m in (fine.numpy(), coarse.numpy())]
    features = model.features(image).numpy()
    np.testing.assert_allclose(features[:, :64], fine, rtol=1e-3, atol=1e-4)
    between = (coarse[:, :, 3:5, 3:5] * [[[[9, 3], [3, 1]]]]).sum(axis=(2, 3)) / 16
    np.testing.assert_allclose(features[:, 64:, 7, 7], between, rtol=1e-3, atol=1e-4)


# ---- encoder and decoder ------------------------------------------------------------------------
def places_that_reach(layers, i, j, channels):
    """The grid places whose vectors the output of the layers at (i, j) depends on, by its gradient."""
    r = torch.rand(1, channels, 8, 8, requires_grad=True)
    patchae.rebuild(r, layers)[0, :, i, j].sum().backward()
    return [tuple(place) for place in r.grad[0].abs().sum(dim=0).nonzero().tolist()]


def test_one_vector_one_patch(shared):
    """The model's decoder: the patch (2, 5) depends on the vector (2, 5) and on no other. Likewise the
    encoder makes that vector from the features at (2, 5) alone."""
    reached = places_that_reach(shared.decoder, 2, 5, 192)
    print(f"\n1×1 decoder: patch (2, 5) is rebuilt from {len(reached)} vector: {reached}")
    assert reached == places_that_reach(shared.encoder, 2, 5, 192) == [(2, 5)]


def test_a_3x3_decoder_breaks_it():
    """Two 3×3 layers see 5 × 5 vectors: 25 neighbours could draw what this vector hides."""
    decoder = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1))
    for layer in (decoder[0], decoder[2]):
        layer.weight.data.abs_()  # no ReLU is at rest, so every dependence shows in the gradient
    reached = places_that_reach(decoder, 2, 5, 6)
    print(f"\n3×3 decoder: patch (2, 5) is rebuilt from {len(reached)} vectors: {reached}")
    assert len(reached) == 25 and min(reached) == (0, 3) and max(reached) == (4, 7)


def test_training_starts_at_r_equal_to_the_features():
    """R is exactly Φ before training, so trained R is compared with raw features on equal terms; a model
    with a number of channels starts at random. Either rebuilds as many pixels as the image has, from grey."""
    image = torch.rand(2, 3, 64, 64)
    for channels in (0, 10):
        model = make_model(channels=channels)
        assert model.decoder[2].bias.unique().tolist() == [.5]
        features = model.features(image)
        r = patchae.represent(features, model.encoder)
        assert r.shape == (2, channels or 192, 16, 16)
        assert torch.equal(r, features) == (channels == 0)
        assert torch.pixel_shuffle(model(image), 4).shape == image.shape


def test_what_is_brighter_than_white_is_shown_as_white(shared, monkeypatch):
    """The same images by another route, cut to [0, 1]: the first pixel of every patch is drawn too bright."""
    too_bright = 9 * (torch.arange(3 * 4**2) == 0)[:, None, None]
    rebuild = patchae.rebuild
    monkeypatch.setattr(patchae, "rebuild", lambda r, decoder: rebuild(r, decoder) + too_bright)
    image = torch.rand(3, 3, 64, 64)
    rebuilt = train.rebuild_images(shared, image)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt, F.pixel_shuffle(shared(image), 4).clamp(0, 1))
    assert rebuilt[:, 0, ::4, ::4].unique().tolist() == [1] and (rebuilt < 1).any()


def test_training_loss_by_another_route(shared, monkeypatch):
    """The mean over the patches with a pixel in the mask counts 0, a quarter or all, that over all patches
    the rest; without a mask it is all. By numpy, from whole images."""
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[0, 0, 7, 8] = mask[1, 0, 16:24, 40:47] = True
    rebuilt = F.pixel_shuffle(shared(image).detach(), 4).numpy()
    error = (rebuilt - image.numpy())**2
    error = error.reshape(2, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))        # (B, H', W')
    defective = mask.numpy().reshape(2, 16, 4, 16, 4).any(axis=(2, 4))
    of_all, there = error.mean(), error[defective].mean()
    assert defective.sum() == 5 and abs(there / of_all - 1) > .01
    for share in (0, .25, 1):
        monkeypatch.setattr(shared.config, "defect_share", share)
        for given, expected in ((mask, share * there + (1 - share) * of_all), (mask & False, of_all)):
            loss = patchae.training_loss(shared, image, given).item()
            assert loss == pytest.approx(expected, rel=1e-5)


def test_training_moves_the_backbone_only_when_fine_tuned():
    """Frozen, its weights get no gradient and stay; fine-tuned they move, but not the stored statistics."""
    images = draw_images(3, 4)
    for finetune in (False, True):
        model = make_model(finetune_backbone=finetune, steps=4)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train.fit(model, images, defected(images), "part")
        moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
        assert {"encoder.0.weight", "decoder.2.weight"} < moved and "backbone.bn1.running_mean" not in moved
        assert ("backbone.conv1.weight" in moved) == finetune
        assert (model.backbone.conv1.weight.grad is not None) == finetune


# ---- training, watched from outside -------------------------------------------------------------
@pytest.fixture(scope="module")
def watched():
    """A training of 38 steps on 6 images: the model, the images, the log; all calls of add_defects and of
    training_loss; of each step the rate of each parameter."""
    model = make_model(steps=38, lr=3e-2, encoder_lr=3e-4, defect_share=.25)
    images = draw_images(6, 3)
    held_out = defected(images)
    rates = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(
        {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}))
    with pytest.MonkeyPatch.context() as patch:
        defects, losses = watch(patch, patchae, "add_defects"), watch(patch, patchae, "training_loss")
        log = train.fit(model, images, held_out, "part")
    hook.remove()
    return SimpleNamespace(model=model, images=images, log=log, defects=defects, losses=losses, rates=rates)


def test_input_and_target_are_random_images_with_new_defects(watched):
    """Image and mask of the loss are what add_defects returned. All 6 images occur, in no fixed order, never
    twice with the same defects. What is pasted comes from any other image, never from the image itself."""
    def number(image):
        return [torch.equal(image, known / 255) for known in watched.images].index(True)

    for ((_, image, mask), _), (_, made) in zip(watched.losses, watched.defects, strict=True):
        assert torch.equal(image, made[0][None]) and torch.equal(mask, made[1][None])
    pairs = [(number(image), number(other)) for (image, other), _ in watched.defects]
    chosen, pasted = zip(*pairs)
    assert set(chosen) == set(pasted) == set(range(6)) and all(a != b for a, b in pairs)
    assert len(set(zip(chosen, chosen[1:]))) > 12  # of 36 successions; one after the other would be 6
    assert len(set(pairs)) > 12  # of 30; "always the next one" would be 6
    assert len(torch.stack([image for _, (image, _) in watched.defects]).unique(dim=0)) == 38


def test_learning_rates_follow_one_cosine(watched):
    """lr · (1 + cos(π t/T)) / 2 at step t of T = 38: the decoder from 3e-2, the encoder and a
    fine-tuned backbone from 3e-4."""
    for part, lr in (("decoder", 3e-2), ("encoder", 3e-4), ("backbone", 3e-4)):
        expected = lr * (1 + np.cos(np.pi * np.arange(38) / 38)) / 2
        for p in watched.model.get_submodule(part).parameters():
            assert [rates[id(p)] for rates in watched.rates] == pytest.approx(expected, rel=1e-5)


def test_training_learns_to_rebuild_defects(watched):
    """The thesis in small: the loss falls, and of held-out defects more is rebuilt."""
    assert watched.log[-1][1] < .6 * watched.log[0][1] and watched.log[-1][2] < .85 * watched.log[0][2]


# ---- the memory and the border -----------------------------------------------------------------
def test_memory_keeps_a_random_part_of_each_image(shared, monkeypatch):
    """⌈f · P⌉ vectors of each image in turn, at least one, each its own, from random places, the same for the
    same seed however the images come in batches. Vector k of an image is R at the place (k // W', k % W')."""
    images, kept = torch.rand(3, 3, 64, 64), {}
    with torch.no_grad():
        vectors = [r.flatten(1).T for r in patchae.represent(shared.features(images), shared.encoder)]
    for f, seed, size, n in ((.1, 0, 2, 26), (.1, 0, 3, 26), (.1, 1, 3, 26), (0, 0, 3, 1), (1, 0, 3, 256)):
        monkeypatch.setattr(shared.config, "memory_fraction", f)
        monkeypatch.setattr(shared.config, "seed", seed)
        places = []
        for own, part in zip(vectors, patchae.build_memory(shared, images.split(size)), strict=True):
            distance = (part[:, None] - own).norm(dim=2)                  # (n, P)
            places.append(distance.argmin(dim=1).tolist())
            assert distance.amin(dim=1).max() < 1e-3 and len(part) == len(set(places[-1])) == n
        kept[f, seed, size] = places
    assert kept[.1, 0, 2] == kept[.1, 0, 3] != kept[.1, 1, 3]
    first, second, _ = kept[.1, 0, 3]
    assert first != second and min(max(first), max(second)) > 200


def test_the_border_of_normal_images_is_as_normal_as_their_inside():
    """Scored against each other, 12 random textures are as far apart in the outermost ring of patches and in
    the corners as inside. With a plain mean over the neighbours that exist the corners are 1.3 times as far,
    with the sum divided by k² everywhere 0.75 times. A dark spot there is still the worst place."""
    model = make_model()
    images, spotted = draw_images(12, 16) / 255, draw_images(4, 16) / 255
    memory = patchae.build_memory(model, images.split(6))
    maps = torch.cat([patchae.score_maps(model, images[n:n + 1], memory[:n] + memory[n + 1:])
                      for n in range(12)])
    inside = maps[:, 1:-1, 1:-1].mean()
    ring = torch.cat([maps[:, [0, -1]].flatten(), maps[:, 1:-1, [0, -1]].flatten()]).mean() / inside
    corners = maps[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() / inside
    print(f"\nouter ring {ring:.2f}, corners {corners:.2f} times the inside")
    assert .94 < ring < 1.08 and .9 < corners < 1.15
    places = [(0, 0), (0, 7), (14, 14), (9, 14)]
    for image, (i, j) in zip(spotted, places):
        image[:, 4 * i:4 * i + 8, 4 * j:4 * j + 8] = 0
    for anomaly_map, (i, j) in zip(patchae.score_maps(model, spotted, memory), places):
        y, x = divmod(anomaly_map.argmax().item(), 16)
        assert i - 1 <= y <= i + 2 and j - 1 <= x <= j + 2


# ---- the text of patchae.py ---------------------------------------------------------------------
def test_notation_table_and_code_agree():
    """Every name of the notation table is a variable of the scripts, and the five labelled functions speak of
    nothing but these names, the two networks and how many of the highest places count."""
    sources = [(ROOT / name).read_text("utf-8") for name in ("patchae.py", "train.py", "evaluate.py")]
    table = re.search(r"    symbol  name.*?\n(.*?)\"{3}", sources[0], re.S)[1].splitlines()
    names = {line.split()[1] for line in table}
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    variables = {getattr(node, "id", getattr(node, "arg", None)) for node in nodes}
    assert len(names) == len(table) and names <= variables
    labels = {}
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if label := re.match(r"\((E\d)\) ", text or ""):
            labels[label[1]] = node.name
            assert {a.arg for a in node.args.args} <= names | {"encoder", "decoder", "highest"}
    assert labels == {"E1": "represent", "E2": "rebuild", "E3": "reconstruction_loss",
                      "E4": "nearest_distance", "E5": "image_score"}


def test_the_method_reads_from_top_to_bottom():
    """In the part that is the method no function or class calls one that is defined below it."""
    source = (ROOT / "patchae.py").read_text("utf-8")
    method = source[:source.index("\n# ====")]
    definitions = list(re.finditer(r"^(?:def|class) (\w+)", source, re.M))
    assert len(definitions) > 20
    for one in definitions:
        assert not re.search(rf"\b{one[1]}\(", method[:one.start()]), one[1]
