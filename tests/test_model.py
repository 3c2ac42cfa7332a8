"""The claims about the model: what it sees, one vector and one patch, training, memory, border."""
import ast
import copy
import dataclasses
import errno
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchgen
import torchvision
from conftest import MEAN, ROOT, STD, random_states, seed_all, watch
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patchae
import train
from patchae import UserError

SMALL = {"backbone": "resnet18", "weights": "random", "image_size": 64, "layers": (1,),
         "patch_size": 4}


def make_model(**options):
    """A PatchAE of 64 × 64 pixels, 16 × 16 patches, with random weights; Φ has 64 channels."""
    return patchae.build_model(patchae.Config(**{**SMALL, **options}))


def draw_images(count, cells, seed=0):
    """Smooth random textures (count, 3, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    colours = 51 + 153 * torch.rand(count, 3, cells, cells, generator=generator)
    return F.interpolate(colours, (64, 64), mode="bilinear").byte()


def configure(model, **options):
    """Change options of a model that need no other weights."""
    model.config = dataclasses.replace(model.config, **options)


@pytest.fixture(scope="module")
def learned():
    """A training of 38 steps on 6 images, also of the backbone, and the model as it was before.

    With all calls of add_defects and of training_loss.
    """
    model, images = make_model(steps=38, lr=3e-2, encoder_lr=1e-3, finetune_backbone=True,
                               defect_weight=0.25), draw_images(6, 3)
    before = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        defects, losses = (watch(patch, patchae, name) for name in ("add_defects", "training_loss"))
        train.fit(model, images)
    return SimpleNamespace(model=model, before=before, images=images, defects=defects,
                           losses=losses)


@pytest.fixture
def model(learned):
    """A copy of the trained model, for a test to change. It remembers nothing."""
    return copy.deepcopy(learned.model)


# ---- the backbone -------------------------------------------------------------------------------
@torch.no_grad()
def test_backbone_is_torchvisions_with_mirrored_borders():
    """Another route: in torchvision's network put a ReflectionPad2d before each convolution that
    would add zeros, and listen behind stages 1 and 3, with the stored statistics.

    The stages of all backbones halve the image 2 to 5 times.
    """
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
    assert len(patchae.BACKBONES) == 4
    for name in patchae.BACKBONES:
        with torch.device("meta"):  # without a number being computed
            maps = patchae.make_backbone(name, (1, 2, 3, 4))(torch.zeros(1, 3, 64, 64))
        assert [m.shape[2:] for m in maps.values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@torch.no_grad()
def test_features_are_the_tempered_maps_of_the_normalised_image():
    """Without averaging Φ of two stages on the grid of the first, by numpy: the map of stage 1,
    each vector divided by the root of its length; then that of stage 2, twice as large,
    interpolated. On a CPU the layout is channels_last, which is faster there."""
    model, image = make_model(layers=(1, 2), neighbourhood=1), torch.rand(2, 3, 64, 64)
    layouts, backbone = [], copy.deepcopy(model.backbone)
    backbone.register_forward_pre_hook(lambda _, inputs: layouts.append(
        inputs[0].is_contiguous(memory_format=torch.channels_last)))
    normalised = (image - torch.tensor(MEAN)) / torch.tensor(STD)
    maps = [m.numpy() for m in model.backbone(normalised.float()).values()]
    fine, coarse = (m / np.linalg.norm(m, axis=1, keepdims=True)**0.5 for m in maps)
    features = model.features(image, backbone).numpy()
    np.testing.assert_allclose(features[:, :64], fine, rtol=1e-3, atol=1e-4)
    between = (coarse[:, :, 3:5, 3:5] * [[[[9, 3], [3, 1]]]]).sum(axis=(2, 3)) / 16
    np.testing.assert_allclose(features[:, 64:, 7, 7], between, rtol=1e-3, atol=1e-4)
    assert layouts == [True]


@pytest.mark.parametrize("finetune", [False, True])
def test_weights_given_are_weights_used(tmp_path, finetune):
    """Those of a state-dict file; the encoder and the decoder are as the seed draws them anyhow."""
    path = tmp_path / "own.pt"
    seed_all(7)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {name: value for name, value in state.items() if name[:6] not in ("layer3", "layer4")}
    torch.save(state, path)
    model, other = (make_model(weights=weights, finetune_backbone=finetune, start="random")
                    for weights in (str(path), "random"))
    for backbone in (model.backbone, model.raw_backbone):
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert not torch.equal(other.backbone.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.encoder.W1.weight, other.encoder.W1.weight)
    assert torch.equal(model.decoder.V2.weight, other.decoder.V2.weight)
    del state["layer1.1.conv2.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"own\.pt.*resnet18.*layer1\.1\.conv2\.weight"):
        make_model(weights=str(path))


# ---- what a run is made of ----------------------------------------------------------------------
class Recorder(TorchDispatchMode):
    """Inside, every operation of torch is written down: (its name, the tensors it makes)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            return True  # mask.any(): the meta device knows no values
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        self.calls.append((operation.name().removeprefix("aten::"), tensors))
        return result


def operations_without(device):
    """The names of torch's operations that have code for other devices, but none for this one.

    From the list out of which torch itself is built. `structured_delegate` names another operation
    whose code is used; "Composite…" is code for all devices.
    """
    listed = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    absent, delegates = set(), {}
    for entry in listed.read_text("utf-8").split("\n- func: ")[1:]:
        name = entry.partition("(")[0]
        keys = re.findall(r"^    ([\w, ]+):", entry, re.M)
        if keys and not re.search(rf"\b{device}\b|Composite", " ".join(keys)):
            absent.add(name)
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.M):
            delegates[name] = delegate[1]
    return (absent - set(delegates)) | {n for n, other in delegates.items() if other in absent}


@pytest.mark.parametrize("finetune", [False, True])
def test_a_default_run_needs_nothing_that_a_gpu_lacks(finetune):
    """Forward, backward and scoring at the default size, on the meta device: it computes nothing,
    and like a GPU it is no CPU.

    All operations have code for Apple's GPUs. Adaptive pooling has, but refuses sides that do not
    divide. Numbers of 64 bits are missing there. channels_last, the layout, gave wrong numbers or
    aborts on Apple's and NVIDIA's GPUs.
    """
    absent = operations_without("MPS")
    assert "_pdist_forward" in absent
    with torch.device("meta"):
        model = patchae.PatchAE(patchae.Config(finetune_backbone=finetune))
        image, mask = torch.zeros(2, 3, 384, 384), torch.zeros(2, 1, 384, 384, dtype=torch.bool)
        memory = [torch.zeros(1024, 1792)]
    with Recorder() as recorder:
        patchae.training_loss(model(image), image, mask, 12, 0.5).backward()
        for method in ("trained", "raw"):
            maps = patchae.nearest_distance(model.vectors(image, method).detach(), memory)
            patchae.image_score(maps)
    names = {name for name, _ in recorder.calls}
    assert {"convolution_backward", "avg_pool2d", "_euclidean_dist", "topk"} <= names
    for name in ("reflection_pad2d_backward", "avg_pool2d_backward"):
        assert (name in names) == finetune
    assert not names & absent
    assert not [name for name in names if "adaptive" in name]
    for name, tensors in recorder.calls:
        for one in tensors:
            assert one.dtype not in (torch.float64, torch.complex128), name
            assert one.dim() != 4 or one.is_contiguous() or not one.is_contiguous(
                memory_format=torch.channels_last), name


def test_the_search_holds_the_distances_to_one_normal_image():
    """B · P · P of them, however many normal images there are; with the same few operations for
    each, however many patches; by matrix products, which are many times faster than exact
    differences."""
    def record(side, number):
        r, memory = torch.rand(2, 4, side, side), torch.rand(number, side**2, 4)
        with Recorder() as recorder:
            patchae.nearest_distance(r, list(memory))
        names = [name for name, _ in recorder.calls]
        largest = max(one.numel() for _, tensors in recorder.calls for one in tensors)
        assert largest == 2 * side**4 and "_cdist_forward" not in names
        return len(names)

    assert record(8, 21) - record(8, 1) == record(16, 21) - record(16, 1) < 20 * 12


# ---- encoder and decoder ------------------------------------------------------------------------
def places_that_reach(layers, i, j, channels):
    """The places whose vectors the output of the layers at (i, j) depends on, by its gradient."""
    r = torch.rand(1, channels, 8, 8, requires_grad=True)
    layers(r)[0, :, i, j].sum().backward()
    return [tuple(place) for place in r.grad[0].abs().sum(dim=0).nonzero().tolist()]


def test_one_vector_one_patch(model):
    """The model's decoder: the patch (2, 5) depends on the vector (2, 5) and on no other. Likewise
    the encoder makes that vector from the features at (2, 5) alone."""
    reached = places_that_reach(model.decoder, 2, 5, 64)
    print(f"\n1×1 decoder: patch (2, 5) is rebuilt from {len(reached)} vector: {reached}")
    assert reached == places_that_reach(model.encoder, 2, 5, 64) == [(2, 5)]


def test_a_3x3_decoder_breaks_it():
    """Two 3×3 layers see 5 × 5 vectors: 25 neighbours could draw what this vector hides."""
    layers = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1)]
    for layer in (layers[0], layers[2]):
        layer.weight.data.abs_()  # no ReLU is at rest, so every dependence shows in the gradient
    reached = places_that_reach(nn.Sequential(*layers), 2, 5, 6)
    print(f"\n3×3 decoder: patch (2, 5) is rebuilt from {len(reached)} vectors: {reached}")
    assert len(reached) == 25 and min(reached) == (0, 3) and max(reached) == (4, 7)


@torch.no_grad()
def test_start():
    """As the identity R is exactly Φ, so that both are compared on equal terms; at random it may
    have any number of channels, and is not Φ. The decoder begins with grey, in as many pixels."""
    image = torch.rand(2, 3, 64, 64)
    for options, channels in (({}, 64), ({"channels": 64}, 64), ({"start": "random"}, 64),
                              ({"start": "random", "channels": 10}, 10)):
        model = make_model(**options)
        features, r = model.features(image), model.represent(image)
        assert r.shape == (2, channels, 16, 16)
        assert torch.equal(r, features) == ("start" not in options)
        assert patchae.unpatchify(model(image), 4).shape == image.shape
        assert model.decoder.V2.bias.unique().tolist() == [0.5]
        assert abs(model(image).mean() - 0.5) < 0.1
    with pytest.raises(UserError, match="--channels.*64.*--start random"):
        make_model(channels=10)


# ---- training -----------------------------------------------------------------------------------
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

    A frozen backbone stays, as the stored statistics always do and the raw backbone. Each step is
    reported with its loss; nothing is printed.
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
        part = name.partition(".")[0]
        moves = part in ("encoder", "decoder", finetune and "backbone")
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
        configure(model, steps=1, defects=wanted)
        train.fit(model, learned.images[:1])
    ((image, other), _), = defects
    _, ((_, plain, mask, *_), _) = losses
    assert number(image) == number(other) == number(plain[0]) == 0 and not mask.any()


def test_only_on_a_cpu_is_the_kind_of_adam_chosen(model, monkeypatch):
    """With None torch chooses. False would forbid the faster kinds, which it chooses on a GPU."""
    adam = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(torch.optim, "Adam", adam)
    for device, chosen in (("cpu", True), ("cuda", None), ("mps", None)):
        monkeypatch.setattr(patchae.PatchAE, "device", torch.device(device))
        with pytest.raises(InterruptedError):
            train.fit(model, draw_images(2, 3))
        assert adam.call_args.kwargs == {"fused": chosen}


def test_training_learns_to_rebuild_defects(learned):
    """The thesis in small: the loss falls, and of new defects more is rebuilt."""
    losses = [loss.item() for _, loss in learned.losses]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    images, masks = zip(*(train.with_defects(learned.images, i % 6) for i in range(24)))
    images, masks = torch.cat(images), torch.cat(masks).expand(-1, 3, -1, -1)
    errors = [(train.rebuild_images(model, images) - images)[masks].square().mean()
              for model in (learned.before, learned.model)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", ["features", "raw"])
def test_training_mode_leaves_the_backbones_as_they_are(model, method):
    """With the statistics of a batch Φ of an image would depend on the others and on its defects.

    A deep copy of torchvision's backbones is in training mode, too."""
    image, state = torch.rand(2, 3, 64, 64), copy.deepcopy(model.state_dict())

    def compute(model):
        return model.features(image) if method == "features" else model.vectors(image, method)

    before = compute(model)
    model.train()
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(compute(one), before)
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# ---- chance -------------------------------------------------------------------------------------
def everything_drawn(monkeypatch, foreign, seed):
    """What a run draws, which begins in any state of the global generators."""
    seed_all(foreign)
    model, images = make_model(seed=seed, steps=8, memory_fraction=0.1, start="random"), []
    weights = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        calls = watch(patch, patchae, "add_defects")
        train.fit(model, draw_images(6, 3))
    images = [[torch.stack(images) for images in zip(*pairs)] for pairs in zip(*calls)]
    (chosen, pasted), (defected, masks) = images
    model.remember(draw_images(6, 3))
    return {"backbone": weights["backbone.conv1.weight"], "encoder": weights["encoder.W1.weight"],
            "decoder": weights["decoder.V2.weight"], "chosen": chosen, "pasted": pasted,
            "masks": masks, "defected": defected, "places": torch.stack(model.places),
            "trained": model.decoder.V2.weight.data, "scores": model.normal_scores}


def test_the_seed_decides_all_and_nothing_else_does(monkeypatch):
    """Two runs from different states of random, torch and numpy are equal; another seed differs in
    everything that is drawn."""
    first, again = (everything_drawn(monkeypatch, foreign, seed=0) for foreign in (1, 2))
    other = everything_drawn(monkeypatch, 1, seed=1)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name


def test_the_callers_chance_is_as_it_was(model, learned, tmp_path):
    """No call moves the global generators, and an exception does not, either."""
    def failing():
        with patchae.seeded(1):
            random.random(), torch.rand(1)
            raise ValueError

    configure(model, steps=2, memory_fraction=0.1)
    path = tmp_path / "part.pt"
    for call in (make_model, lambda: train.fit(model, learned.images),
                 lambda: model.remember(learned.images), lambda: model.anomaly_maps(learned.images),
                 lambda: model.save(path), lambda: patchae.PatchAE.load(path), failing):
        before = random_states()
        try:
            call()
        except ValueError:
            pass
        assert random_states() == before
    drawn = []
    for seed in (1, 2, 1):
        with patchae.seeded(seed):
            drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[2] and not set(drawn[0]) & set(drawn[1])


# ---- the memory and the scores ------------------------------------------------------------------
def as_rows(vectors):
    """(B, C₃, H', W') to a numpy array (B, P, C₃)."""
    return vectors.detach().flatten(2).movedim(1, 2).numpy()


def distances(queries, normal):
    """(B, 16, 16): the distance of each of (B, P, C₃) to the nearest of (P', C₃), by
    scikit-learn."""
    search = NearestNeighbors(n_neighbors=1).fit(normal)
    found, _ = search.kneighbors(queries.reshape(-1, queries.shape[-1]))
    return found.reshape(-1, 16, 16)


@pytest.mark.parametrize("fraction, kept", [(0, 1), (0.1, 26), (1, 256)])
def test_memory_keeps_a_random_part_of_each_image(model, fraction, kept):
    """⌈f · P⌉ vectors of each image, at least one, from random places, which are remembered.

    The seed draws other places for each image, the same however the images come in batches.
    """
    images, places = draw_images(4, 3), {}
    r = as_rows(model.represent(images / 255))
    for seed, batch_size in ((0, None), (0, 3), (1, 4)):
        configure(model, memory_fraction=fraction, seed=seed)
        model.batch_size, model.images = batch_size, images
        model.build_memory()
        for own, vectors, chosen in zip(r, model.memory, model.places, strict=True):
            assert len(vectors) == len(set(chosen.tolist())) == kept
            np.testing.assert_allclose(vectors, own[chosen.numpy()], rtol=1e-4, atol=1e-5)
        places[seed, batch_size] = [chosen.tolist() for chosen in model.places]
    assert places[0, None] == places[0, 3]
    if fraction < 1:
        first, second, *_ = places[0, 3]
        assert first != second and places[0, 3] != places[1, 4]
        assert min(map(min, places[0, 3])) < 128 < max(map(max, places[0, 3]))


def test_threshold_is_the_quantile_of_the_scores_of_normal_images(model):
    """Each is compared with all others, with a trained R, by brute force. Exact copies are left out
    together, but neither mirrored ones nor those whose blue differs in a corner. With a limit some
    are scored, evenly spread."""
    images = draw_images(7, 3)
    images[5], images[3] = images[1], images[2]
    images[3, 2, 48:, 48:], images[6] = 0, images[0].flip(2)
    configure(model, memory_fraction=0.5)
    model.remember(images)
    r, scores = as_rows(model.represent(images / 255)), []
    for i in range(7):
        others = [r[j][model.places[j]] for j in range(7) if j != i and {i, j} != {1, 5}]
        highest = np.sort(distances(r[i], np.concatenate(others)).ravel())[-3:]
        scores.append(highest.mean())
    assert model.normal_scores.tolist() == pytest.approx(scores, rel=1e-3)
    assert min(scores) > 1e-3 and len(set(scores)) == 6  # a copy scores as its original
    for quantile in (0.5, 0.99, 1):
        assert model.threshold(quantile) == pytest.approx(np.quantile(scores, quantile), rel=1e-3)
    assert model.threshold() == model.threshold(0.99)
    for limit, scored in ((6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4]), (0, [])):
        configure(model, threshold_images=limit)
        model.remember(images)
        assert model.normal_scores.tolist() == pytest.approx([scores[i] for i in scored], rel=1e-3)


def test_what_cannot_be_compared_is_said(model):
    """No normal image, or none that differs. The reconstruction needs none."""
    images = draw_images(2, 3)
    for method in ("trained", "raw"):
        with pytest.raises(UserError, match="remember"):
            model.anomaly_maps(images, method)
    assert model.anomaly_maps(images, "reconstruction").shape == (2, 16, 16)
    for few in (images[:1], images[[0, 0]]):
        model.remember(few)
        with pytest.raises(UserError, match="two different normal images"):
            model.threshold()
        assert model.anomaly_maps(images).shape == (2, 16, 16)


@pytest.mark.parametrize("first, then", [("trained", "raw"), ("raw", "trained")])
def test_a_memory_that_is_not_whole_is_built_anew(model, learned, first, then):
    """After Ctrl-C half-way neither the method before nor the new one may use what is there.

    Nor is there a threshold, which would be that of other images.
    """
    def stop_half_way(batches):
        assert not model.memory  # two at once might not fit
        yield from batches[:3]
        raise KeyboardInterrupt

    model.remember(learned.images)
    expected = {method: model.anomaly_maps(learned.images, method) for method in (then, first)}
    for method in (first, then):
        with pytest.raises(KeyboardInterrupt):
            model.build_memory(then, stop_half_way)
        assert torch.equal(model.anomaly_maps(learned.images, method), expected[method])
    with pytest.raises(KeyboardInterrupt):
        model.remember(learned.images[:5], progress=stop_half_way)
    with pytest.raises(UserError, match="no threshold"):
        model.threshold()


def test_after_a_training_that_stopped_all_is_compared_anew(model, learned):
    """The network has changed, so neither the old memory nor the old threshold fits."""
    model.remember(learned.images)
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, learned.images, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(UserError, match="no threshold"):
        model.threshold()
    maps = model.anomaly_maps(learned.images[:1])
    model.build_memory()
    assert torch.equal(maps, model.anomaly_maps(learned.images[:1]))


@pytest.mark.parametrize("change", [lambda images: images / 255, lambda images: images[0],
                                    lambda images: images[..., :32], lambda images: images[:0],
                                    lambda images: images.permute(0, 2, 3, 1),
                                    lambda images: images.to("meta")])
def test_images_of_another_form_are_refused(model, learned, change):
    """In [0, 1], a single one, of another size, none, colours last, on another device."""
    images = change(learned.images)
    for work in (model.remember, model.anomaly_maps, lambda images: train.fit(model, images)):
        with pytest.raises(UserError, match=r"'N', 3, 64, 64\) of torch.uint8.*read_images"):
            work(images)


def test_anomaly_maps_by_another_route(model, learned):
    """R is trained; "raw" compares Φ as it was before training, of the backbone that was trained
    since. The reconstruction's term is the mean squared error of a patch.

    The methods in any order, in batches of any size; after more training R is compared anew.
    """
    images = draw_images(3, 4, seed=1)
    known, new = learned.images / 255, images / 255
    phi = [as_rows(learned.before.features(image)) for image in (new, known)]
    drawn = patchae.unpatchify(model(new), 4).detach().numpy()
    error = ((drawn - new.numpy())**2).reshape(3, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))
    expected = {"raw": distances(phi[0], np.concatenate(phi[1])), "reconstruction": error}
    model.remember(learned.images)
    for batch_size, steps in ((None, None), (2, None), (1, 3)):
        model.batch_size = batch_size
        if steps:
            configure(model, steps=steps)
            train.fit(model, learned.images)
            del expected["reconstruction"]
        r = [as_rows(model.represent(image)) for image in (new, known)]
        expected["trained"] = distances(r[0], np.concatenate(r[1]))
        assert abs(expected["trained"] / expected["raw"] - 1).mean() > 0.1
        for method in ("trained", *expected):
            maps = model.anomaly_maps(images, method)
            np.testing.assert_allclose(maps, expected[method], rtol=2e-3, atol=1e-4)
            kept = [maps, *model.memory, model.normal_scores]
            assert not any(one.requires_grad or one.grad_fn for one in kept)


def test_images_pass_the_backbone_once_in_parts_of_the_batch_size(model, learned, monkeypatch):
    """The memory is built once for all that is compared with it. On a CPU an image at a time is the
    fastest, elsewhere eight."""
    parts = []
    for backbone in (model.backbone, model.raw_backbone):
        backbone.register_forward_pre_hook(lambda _, images: parts.append(len(images[0])))

    def count(work, *arguments):
        parts.clear()
        work(*arguments)
        return list(parts)

    configure(model, threshold_images=0)
    assert count(model.remember, learned.images) == [1] * 6
    model.batch_size = 4
    assert count(model.remember, learned.images) == [4, 2]
    for _ in range(2):
        assert count(model.anomaly_maps, learned.images[:5]) == [4, 1]
    assert count(model.anomaly_maps, learned.images[:5], "raw") == [4, 2, 4, 1]
    assert count(model.anomaly_maps, learned.images[:5], "raw") == [4, 1]
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    model.to("meta").anomaly_maps(learned.images, "raw")  # M goes where the model went
    assert {vectors.device.type for vectors in model.memory} == {"meta"}
    elsewhere = patchae.build_model(model.config, "meta")
    batches = list(elsewhere.batches(draw_images(20, 3)))
    assert [(len(batch), batch.device.type) for batch in batches] == [
        (8, "meta"), (8, "meta"), (4, "meta")]


def test_the_border_of_normal_images_is_as_normal_as_their_inside():
    """Scored against each other, 12 random textures are as far apart in the outermost ring of
    patches and in the corners as inside. With a plain mean over the neighbours that exist the
    corners are 1.3 times as far, with the sum divided by k² everywhere 0.75 times. A dark spot
    there is still the worst place."""
    model = make_model(layers=(1, 2))
    images, spotted = draw_images(12, 16), draw_images(4, 16, seed=1)
    model.remember(images)
    with torch.no_grad():
        maps = torch.cat([patchae.nearest_distance(model.represent(images[n:n + 1] / 255),
                                                   model.memory[:n] + model.memory[n + 1:])
                          for n in range(12)])
    inside = maps[:, 1:-1, 1:-1].mean()
    ring = torch.cat([maps[:, [0, -1]].flatten(), maps[:, 1:-1, [0, -1]].flatten()]).mean() / inside
    corners = maps[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() / inside
    print(f"\nouter ring {ring:.2f}, corners {corners:.2f} times the inside")
    assert 0.94 < ring < 1.08 and 0.9 < corners < 1.15
    places = [(0, 0), (0, 7), (14, 14), (9, 14)]
    for image, (i, j) in zip(spotted, places):
        image[:, 4 * i:4 * i + 8, 4 * j:4 * j + 8] = 0
    for anomaly_map, (i, j) in zip(model.anomaly_maps(spotted), places):
        y, x = divmod(anomaly_map.argmax().item(), 16)
        assert i - 1 <= y <= i + 2 and j - 1 <= x <= j + 2


# ---- options and files --------------------------------------------------------------------------
@pytest.mark.parametrize("field, good, bad", [
    ("backbone", patchae.BACKBONES, ("resnet19", "")),
    ("layers", ((1,), (1, 2, 3, 4)), ((), (0, 1), (5,))),
    ("image_size", (64, 2048), (32, 100, 2080)), ("patch_size", (4, 32), (2, 6, 20, 36, 0)),
    ("neighbourhood", (1, 3, 5, 7, 9), (0, 2, 11)), ("channels", (None, 1, 8192), (0, 8193)),
    ("start", ("identity", "random"), ("zero",)), ("defect_weight", (0, 1), (-0.1, 1.1, math.nan)),
    ("steps", (0, 999999), (-1, 10**6)), ("lr", (0, 1), (-1e-9, 1.1, math.nan)),
    ("encoder_lr", (0, 1), (-1e-9, 1.1, math.nan)), ("seed", (0, 2**31 - 1), (-1, 2**31)),
    ("memory_fraction", (0, 1), (-0.1, 1.1, math.nan)), ("threshold_images", (0, 10), (-1, 10**6))])
def test_options_out_of_range_are_named(field, good, bad):
    """The field, its value and the option; what is in the range is accepted."""
    option = f"--{field.replace('_', '-')}"
    for value in good:
        patchae.check_config(patchae.Config(**{"patch_size": 8, field: value}))
    for value in bad:
        with pytest.raises(UserError) as error:
            patchae.PatchAE(patchae.Config(**{"patch_size": 8, field: value}))
        words = (f"{field} = {value} ", option, "must")
        assert all(word in str(error.value) for word in words)


def test_a_saved_model_scores_as_before(model, learned, tmp_path):
    """All options, weights, normal images, names and scores, for each method the same maps.

    The file of the weights that training started from is not needed any more.
    """
    configure(model, memory_fraction=0.3, threshold_images=5, seed=7, weights=Path("gone.pth"))
    model.remember(learned.images, [Path(f"{letter}.png") for letter in "abüdef"])
    model.save(tmp_path / "part.pt")
    loaded = patchae.PatchAE.load(tmp_path / "part.pt")
    configure(model, weights="gone.pth")
    assert loaded.config == model.config
    assert loaded.names == ["a.png", "b.png", "ü.png", "d.png", "e.png", "f.png"]
    assert loaded.images.dtype == torch.uint8 and torch.equal(loaded.images, learned.images)
    assert torch.equal(loaded.normal_scores, model.normal_scores)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for ours, theirs in zip(loaded.parameters(), model.parameters()):  # it can be trained further
        assert ours.requires_grad == theirs.requires_grad and ours.device == theirs.device
    for method in patchae.METHODS:
        maps = [one.anomaly_maps(draw_images(2, 4, seed=1), method) for one in (loaded, model)]
        assert torch.equal(*maps), method


@pytest.mark.parametrize("finetune", [False, True])
def test_a_checkpoint_holds_every_weight_once(tmp_path, finetune):
    """A backbone that is trained is there twice: as it is, and as it was.

    Of a thousand images only those that were remembered.
    """
    model = make_model(finetune_backbone=finetune)
    model.images = draw_images(1000, 3)[:4]
    model.save(tmp_path / "part.pt")
    parts = [model.backbone, model.encoder, model.decoder, *[model.raw_backbone] * finetune]
    size = sum(value.nbytes for part in parts for value in part.state_dict().values())
    size += model.images.nbytes
    assert size < (tmp_path / "part.pt").stat().st_size < 1.2 * size


def test_foreign_files_run_no_code(tmp_path):
    """A pickle may call any function while it is read."""
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    torch.save({"config": Call()}, tmp_path / "foreign.pt")
    for read in (patchae.PatchAE.load, lambda path: make_model(weights=path)):
        with pytest.raises(UserError, match=r"foreign\.pt"):
            read(str(tmp_path / "foreign.pt"))
    assert not (tmp_path / "called").exists()


def test_files_written_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    """A checkpoint, and weights: their tensors go to the CPU at first."""
    model, load = make_model(), Mock(side_effect=torch.load)
    model.save(tmp_path / "part.pt")
    torch.save(model.backbone.state_dict(), tmp_path / "own.pth")
    monkeypatch.setattr(torch, "load", load)
    patchae.PatchAE.load(tmp_path / "part.pt")
    make_model(weights=str(tmp_path / "own.pth"))
    assert [call.kwargs["map_location"] for call in load.call_args_list] == ["cpu", "cpu"]


def test_load_refuses_what_save_did_not_write(model, tmp_path):
    """Bytes of another kind, a file cut short, another version's options, weights that are missing:
    one error that names the file."""
    path = tmp_path / "part.pt"
    model.save(path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    path.unlink()
    changes = (b"", b"text", whole[:1000], whole[:-1000], [1, 2], {}, {**content, "images": None},
               {**content, "config": {**content["config"], "share": 1}},
               {**content, "config": {**content["config"], "patch_size": 6}},
               {**content, "model": {**content["model"], "extra": torch.zeros(1)}},
               {key: content[key] for key in content if key != "names"}, None)
    for change in changes:
        if isinstance(change, bytes):
            path.write_bytes(change)
        elif change is None:
            path.unlink()
        else:
            torch.save(change, path)
        with pytest.raises(UserError, match=r"part\.pt: not a checkpoint of this version"):
            patchae.PatchAE.load(path)


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    """A disk that is full after half of the file; a name that cannot be stored. No other file
    stays."""
    path = tmp_path / "part.pt"
    model.save(path)
    old, write = path.read_bytes(), Path.write_bytes

    def full(path, content):
        write(path, bytes(content[:len(content) // 2]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_bytes", full)
        model.save(path)
    model.names = [lambda: None]
    with pytest.raises(Exception, match="pickle"):
        model.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# ---- the text of patchae.py ---------------------------------------------------------------------
def parse(name):
    """The syntax tree of a script."""
    return ast.parse((ROOT / name).read_text("utf-8"))


def test_notation_table_and_code_agree():
    """Every name of the notation table is used in the scripts, and no two lines have the same. Each
    equation has its label in the docstring of one function."""
    source = (ROOT / "patchae.py").read_text("utf-8")
    table = re.search(r"    symbol  name in code.*?\n(.*?)\"{3}", source, re.S)[1].splitlines()
    names = {line.split()[1] for line in table}
    nodes = [node for name in ("patchae.py", "train.py", "evaluate.py")
             for node in ast.walk(parse(name))]
    used = {getattr(node, field, None) for node in nodes for field in ("id", "arg", "attr")}
    assert len(names) == len(table) > 15 and names <= used, names - used
    labels = []
    for owner in ast.walk(parse("patchae.py")):
        for node in ast.iter_child_nodes(owner):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if label := re.match(r"\((E\d)\) ", text or ""):
                labels.append((label[1], getattr(owner, "name", ""), node.name))
    assert labels == [("E3", "", "reconstruction_loss"), ("E4", "", "nearest_distance"),
                      ("E5", "", "image_score"), ("E1", "Encoder", "forward"),
                      ("E2", "Decoder", "forward")]


def test_the_method_reads_from_top_to_bottom():
    """In the part that is the method nothing uses a function or class that is defined below it."""
    source = (ROOT / "patchae.py").read_text("utf-8")
    end = source[:source.index("\n# ====")].count("\n")
    method = [node for node in parse("patchae.py").body if node.lineno <= end]
    lines = {node.name: node.lineno for node in method if hasattr(node, "name")}
    assert len(lines) > 20
    for node in method:
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & set(lines)
        assert all(lines[name] <= node.lineno for name in used), (node.lineno, used)
