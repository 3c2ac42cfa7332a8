"""The claims about the model: what it sees, one vector and one patch, training, the memory, the border."""
import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import patchae
import train

SMALL = {"backbone": "resnet18", "weights": "random", "image_size": 64, "layers": (1, 2), "patch_size": 4}
MEAN, STD = np.array([[[.485]], [[.456]], [[.406]]]), np.array([[[.229]], [[.224]], [[.225]]])


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


def nearest(vectors, memory):
    """Distances (n,) to the nearest vector of the memory, by scikit-learn in double precision."""
    search = NearestNeighbors(n_neighbors=1).fit(torch.cat(memory).double().numpy())
    return search.kneighbors(vectors.double().numpy())[0][:, 0]


@pytest.fixture(scope="module")
def shared():
    """One model for the tests that only look; no weight of its encoder and decoder is as at the start."""
    model = make_model()
    with torch.no_grad():
        for weights in (*model.encoder.parameters(), *model.decoder.parameters()):
            weights += .02 * torch.randn_like(weights)
    return model


# ---- the backbone -------------------------------------------------------------------------------
def test_backbone_is_torchvisions_with_mirrored_borders():
    """Another route: in torchvision's network put a ReflectionPad2d in front of each convolution that
    would add zeros, and listen behind stages 1 and 3. The statistics are the stored ones, not the batch's."""
    backbone = patchae.make_backbone("resnet18", (1, 3))
    resnet = torchvision.models.resnet18(weights=None).eval()
    resnet.load_state_dict(backbone.state_dict(), strict=False)
    image, maps = torch.randn(2, 3, 64, 96), {}
    for name in ("layer1", "layer3"):
        resnet.get_submodule(name).register_forward_hook(lambda *io, name=name: maps.update({name: io[2]}))
    for module in list(resnet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d) and child.padding != (0, 0):
                setattr(module, name, nn.Sequential(nn.ReflectionPad2d(child.padding[0]), child))
                child.padding = (0, 0)
    with torch.no_grad():
        resnet(image)
        torch.testing.assert_close(dict(backbone(image)), maps, rtol=1e-4, atol=1e-4)


def test_stages_of_all_backbones():
    """The stages halve the image 2 to 5 times; without a number being computed, shapes tell."""
    for name in ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet101_2"):
        channels = [64, 128, 256, 512] if name == "resnet18" else [256, 512, 1024, 2048]
        with torch.device("meta"):
            maps = patchae.make_backbone(name, (1, 2, 3, 4))(torch.zeros(1, 3, 64, 64))
        assert [m.shape[1:] for m in maps.values()] == [(c, s, s) for c, s in zip(channels, (16, 8, 4, 2))]


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
    with a number of channels starts at random. Either rebuilds as many pixels as the image has."""
    image = torch.rand(2, 3, 64, 64)
    for channels in (0, 10):
        model = make_model(channels=channels)
        r, rebuilt = model(image)
        assert r.shape == (2, channels or 192, 16, 16)
        assert torch.equal(r, model.features(image)) == (channels == 0)
        assert patchae.unpatchify(rebuilt, 4).shape == image.shape


def test_training_loss_by_another_route(shared, monkeypatch):
    """The patches one by one, cut from the image by hand and normalised by numpy: the mean over those with a
    pixel in the mask counts 0, a quarter or all, that over all patches the rest; without a mask it is all."""
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=bool)
    mask[0, 0, 7, 8] = mask[1, 0, 16:24, 40:47] = True
    rebuilt, errors, defective = shared(image)[1].detach().numpy(), [], []
    for b, i, j in np.ndindex(2, 16, 16):
        box = np.s_[b, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
        patch = (image[box].numpy() - MEAN) / STD
        errors.append(np.mean((rebuilt[b, :, i, j] - patch.flatten())**2))
        defective.append(mask[box].any().item())
    of_all, there = np.mean(errors), np.mean(np.array(errors)[defective])
    assert sum(defective) == 5 and abs(there / of_all - 1) > .01
    for share in (0, .25, 1):
        monkeypatch.setattr(shared.config, "defect_share", share)
        loss = patchae.training_loss(shared, image, mask).item()
        assert loss == pytest.approx(share * there + (1 - share) * of_all, rel=1e-5)
        loss = patchae.training_loss(shared, image, torch.zeros_like(mask)).item()
        assert loss == pytest.approx(of_all, rel=1e-5)


def test_training_moves_the_backbone_only_when_fine_tuned():
    """Frozen, its weights get no gradient and stay; fine-tuned they move, but not the stored statistics."""
    images = draw_images(3, 4)
    held_out = defected(images)
    for finetune in (False, True):
        model = make_model(finetune_backbone=finetune, steps=4)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train.fit(model, images, held_out, "part")
        moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
        assert {"encoder.0.weight", "decoder.2.weight"} < moved and "backbone.bn1.running_mean" not in moved
        assert ("backbone.conv1.weight" in moved) == finetune
        assert (model.backbone.conv1.weight.grad is not None) == finetune


# ---- training, watched from outside -------------------------------------------------------------
@pytest.fixture(scope="module")
def watched():
    """A training of 38 steps on 6 images. Returns the model, the images, what was held out, the log, and of
    some functions all calls: (arguments, result)."""
    model = make_model(steps=38, lr=1e-2, encoder_lr=3e-4, defect_share=.25)
    images = draw_images(6, 3)
    held_out = defected(images)
    calls = {"add_defects": [], "training_loss": [], "step": []}

    def watch(name, function):
        def watching(*arguments):
            result = function(*arguments)
            calls[name].append((arguments, result))
            return result
        return watching

    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: calls["step"].append(
        {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_defects", "training_loss"):
            patch.setattr(patchae, name, watch(name, getattr(patchae, name)))
        log = train.fit(model, images, held_out, "part")
    hook.remove()
    return model, images, held_out, log, calls


def test_input_and_target_are_the_images_with_their_defects(watched):
    """Image and mask of the loss are what add_defects returned, once for each step."""
    calls = watched[-1]
    assert len(calls["training_loss"]) == len(calls["add_defects"]) == 38
    for ((_, image, mask), _), (_, made) in zip(calls["training_loss"], calls["add_defects"]):
        assert torch.equal(image[0], made[0]) and torch.equal(mask[0], made[1]) and len(image) == len(mask) == 1


def test_images_are_random_and_get_new_defects(watched):
    """All 6 images occur, in no fixed order, never twice with the same defects. What is pasted comes from any
    other image, never from the image itself."""
    _, images, _, _, calls = watched
    def number(image):
        return [torch.equal(image, known / 255) for known in images].index(True)

    pairs = [(number(image), number(other)) for (image, other), _ in calls["add_defects"]]
    chosen, pasted = zip(*pairs)
    assert set(chosen) == set(pasted) == set(range(6)) and all(a != b for a, b in pairs)
    assert len(set(zip(chosen, chosen[1:]))) > 12  # of 36 successions; one after the other would be 6
    assert len(torch.stack([defected for _, (defected, _) in calls["add_defects"]]).unique(dim=0)) == 38
    assert len(set(pairs)) > 12  # of 30; "always the next one" would be 6


def test_learning_rates_follow_one_cosine(watched):
    """lr · (1 + cos(π t/T)) / 2 at step t of T = 38: the decoder from 1e-2, the encoder from 3e-4, a fine-tuned
    backbone from 1e-5."""
    model, _, _, _, calls = watched
    for t, rates in enumerate(calls["step"]):
        factor = (1 + np.cos(np.pi * t / 38)) / 2
        for part, lr in ((model.decoder, 1e-2), (model.encoder, 3e-4), (model.backbone, 1e-5)):
            assert [rates[id(p)] / factor for p in part.parameters()] == pytest.approx(
                [lr] * len(list(part.parameters())), rel=1e-5)
    assert t == 37 and factor < .002


def test_log_has_the_mean_loss_since_the_last_line(watched):
    """10 lines at most: of 38 steps every fourth, and the last."""
    _, _, _, log, calls = watched
    losses = [loss.item() for _, loss in calls["training_loss"]]
    steps = [row[0] for row in log]
    assert steps == [4, 8, 12, 16, 20, 24, 28, 32, 36, 38]
    expected = [np.mean(losses[begin:end]) for begin, end in zip([0, *steps], steps)]
    assert [row[1] for row in log] == pytest.approx(expected, rel=1e-5)


def test_a_report_says_how_long_training_still_takes(watched, capsys):
    """After 10 of 38 steps in 60 s, 28 more take 168 s."""
    row = train.report(watched[0], watched[2], "part", 10, [1.0, 3.0], 60.0)
    assert row[:2] == [10, 2.0] and row[3] == 60.0
    line = capsys.readouterr().out
    assert line.startswith(f"part: step 10/38  loss 2.0000  rebuilt {row[2]:.3f}") and line.endswith("  168 s left\n")


def test_training_learns_to_rebuild_defects(watched):
    """The thesis in small: the loss falls, and of held-out defects more is rebuilt. The last line of the log
    is of the final model, its share computed again by numpy."""
    model, _, (normal, defected, masks), log, _ = watched
    assert log[-1][1] < .6 * log[0][1] and log[-1][2] < .85 * log[0][2]
    with torch.no_grad():
        patches = model(defected)[1].numpy().reshape(6, 3, 4, 4, 16, 16)  # channel; y, x in a patch; place
    rebuilt = (patches.transpose(0, 1, 4, 2, 5, 3).reshape(6, 3, 64, 64) * STD + MEAN).clip(0, 1)
    missing, everything = [(((other - defected.numpy())**2) * masks.numpy()).sum()
                           for other in (rebuilt, normal.numpy())]
    assert log[-1][2] == pytest.approx(missing / everything, rel=1e-3)


def test_a_single_image_has_no_other_to_paste_from():
    """It is its own source then; only the pixels in the mask change."""
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    image, mask = train.with_defects(images, 0)
    assert mask.any() and torch.equal(image * ~mask, images / 255 * ~mask)


# ---- the memory and the scores ------------------------------------------------------------------
@torch.no_grad()
def test_vectors_are_in_reading_order(shared):
    """Vector k of an image is R at the place (k // W', k % W')."""
    image = torch.rand(2, 3, 64, 64)
    vectors, r = patchae.patch_vectors(shared, image), shared(image)[0]
    assert vectors.shape == (2, 256, 192)
    for k in (0, 1, 16, 100, 255):
        torch.testing.assert_close(vectors[:, k], r[:, :, k // 16, k % 16])


def test_memory_keeps_a_random_part_of_each_image(shared, monkeypatch):
    """⌈F · P⌉ vectors of each image in turn, at least one, each its own, from random places, the same for the
    same seed however the images come in batches."""
    images, kept = torch.rand(3, 3, 64, 64), {}
    with torch.no_grad():
        vectors = patchae.patch_vectors(shared, images)
    for fraction, seed, size, n in ((.1, 0, 2, 26), (.1, 0, 3, 26), (.1, 1, 3, 26), (0, 0, 3, 1),
                                    (1, 0, 3, 256)):
        monkeypatch.setattr(shared.config, "memory_fraction", fraction)
        monkeypatch.setattr(shared.config, "seed", seed)
        places = []
        for own, part in zip(vectors, patchae.build_memory(shared, images.split(size)), strict=True):
            distance = (part[:, None] - own).norm(dim=2)                  # (n, P)
            places.append(distance.argmin(dim=1).tolist())
            assert distance.amin(dim=1).max() < 1e-3 and len(part) == len(set(places[-1])) == n
        kept[fraction, seed, size] = places
    assert kept[.1, 0, 2] == kept[.1, 0, 3] != kept[.1, 1, 3]
    first, second, _ = kept[.1, 0, 3]
    assert first != second and min(max(first), max(second)) > 200


def test_maps_by_another_route(shared):
    """(E4) place by place, by scikit-learn: new images; a normal one against a memory without itself, where
    it is far from the others, and with itself, where it is at 0."""
    images = torch.rand(6, 3, 64, 64)
    memory = patchae.build_memory(shared, images[:4].split(3))
    others = memory[:2] + memory[3:]
    with torch.no_grad():
        vectors = patchae.patch_vectors(shared, images)
    expected = np.stack([nearest(vectors[n], known) for n, known in ((4, memory), (5, memory), (2, others))])
    new = patchae.score_maps(shared, images[4:], memory)
    alone = patchae.score_maps(shared, images[2:3], others)
    np.testing.assert_allclose(torch.cat([new, alone]), expected.reshape(3, 16, 16), rtol=1e-2)
    assert patchae.score_maps(shared, images[2:3], memory).max() < .05 * alone.min()


def test_reconstruction_error_is_that_of_each_patch(shared):
    """--score reconstruction: the mean squared difference of each patch, by numpy."""
    image = torch.rand(2, 3, 64, 64)
    found = patchae.reconstruction_error(shared, image)
    rebuilt = F.pixel_shuffle(shared(image)[1].detach(), 4).numpy()
    error = (rebuilt - (image.numpy() - MEAN) / STD)**2
    np.testing.assert_allclose(found, error.reshape(2, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5)), rtol=1e-4)


def test_normal_scores_leave_the_image_itself_out(shared, monkeypatch):
    """The mean of the three largest distances to the vectors of all other images, by scikit-learn; of at most
    threshold_images images, evenly spread, and of none where there is no other."""
    images = draw_images(5, 16)
    with torch.no_grad():
        vectors = list(patchae.patch_vectors(shared, images / 255))
    expected = np.array([np.sort(nearest(vectors[n], vectors[:n] + vectors[n + 1:]))[-3:].mean()
                         for n in range(5)])
    for most, chosen in ((2, [0, 3]), (0, []), (100, [0, 1, 2, 3, 4])):
        monkeypatch.setattr(shared.config, "threshold_images", most)
        np.testing.assert_allclose(train.normal_scores(shared, images), expected[chosen], rtol=1e-3)
    assert len(train.normal_scores(shared, images[:1])) == 0


def test_the_border_of_normal_images_is_as_normal_as_their_inside():
    """Scored against each other, 12 random textures are as far apart in the outermost ring of patches and in
    the corners as inside. With a plain mean over the neighbours that exist the corners are 1.3 times as far,
    with the sum divided by k² everywhere 0.75 times. A dark spot there is still the worst place."""
    images, spotted = draw_images(12, 16) / 255, draw_images(4, 16) / 255
    model = make_model()
    memory = patchae.build_memory(model, images.split(6))
    maps = torch.cat([patchae.score_maps(model, images[n:n + 1], memory[:n] + memory[n + 1:])
                      for n in range(12)])
    inside = maps[:, 1:-1, 1:-1].mean()
    ring = (maps.sum() - maps[:, 1:-1, 1:-1].sum()) / (12 * 60) / inside
    corners = maps[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() / inside
    print(f"\nouter ring {ring:.2f}, corners {corners:.2f} times the inside")
    assert .94 < ring < 1.08 and .9 < corners < 1.15
    places = [(0, 0), (0, 7), (14, 14), (9, 14)]
    for image, (i, j) in zip(spotted, places):
        image[:, 4 * i:4 * i + 8, 4 * j:4 * j + 8] = 0
    for anomaly_map, (i, j) in zip(patchae.score_maps(model, spotted, memory), places):
        y, x = np.unravel_index(anomaly_map.argmax().item(), (16, 16))
        assert i - 1 <= y <= i + 2 and j - 1 <= x <= j + 2


# ---- the text of patchae.py ---------------------------------------------------------------------
def test_notation_table_and_code_agree():
    """Every name of the notation table is a variable of the scripts, and the five labelled functions speak of
    nothing but these names and the two networks."""
    source, *others = [Path(module.__file__).read_text("utf-8") for module in (patchae, train)]
    others.append(Path(patchae.__file__).with_name("evaluate.py").read_text("utf-8"))
    table = source[source.index("    symbol  name"):source.index('"""', 3)].splitlines()[1:]
    names = {line.split()[1] for line in table}
    nodes = [node for text in (source, *others) for node in ast.walk(ast.parse(text))]
    variables = {getattr(node, "id", getattr(node, "arg", None)) for node in nodes}
    assert len(names) == len(table) and names <= variables
    labels = {}
    for node in nodes:
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if label := re.match(r"\((E\d)\) ", text or ""):
            labels[label[1]] = node.name
            assert {a.arg for a in node.args.args} <= names | {"encoder", "decoder"}
    assert labels == {"E1": "represent", "E2": "rebuild", "E3": "reconstruction_loss",
                      "E4": "nearest_distance", "E5": "image_score"}


def test_the_method_reads_from_top_to_bottom():
    """In the part that is the method no function or class uses a name that is defined below it."""
    source = Path(patchae.__file__).read_text("utf-8")
    end, defined, users = source[:source.index("\n# ====")].count("\n"), {}, []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node.lineno
            users += [node] if node.lineno <= end else []
        elif isinstance(node, ast.Assign):
            defined.update({name.id: node.lineno for target in node.targets for name in ast.walk(target)
                            if isinstance(name, ast.Name)})
    assert len(users) > 20
    for user in users:
        for node in ast.walk(user):
            assert defined.get(getattr(node, "id", None), 0) <= user.lineno, (user.name, node.id)
