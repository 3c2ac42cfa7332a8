"""The claims about the model: one vector, one patch; distances kept; the memory; the notation."""
import re

import numpy as np
import pytest
import torch
import torchvision
from sklearn.neighbors import NearestNeighbors
from torch import nn

import patchae
from patchae import Config

SMALL = {"backbone": "resnet18", "weights": "random", "image_size": 64, "layers": (1, 2)}


def small_model(**options):
    """A PatchAE of 64 × 64 pixels with random weights."""
    return patchae.build_model(Config(**{**SMALL, **options}))[0]


def places_that_reach(decoder, i, j, size=8):
    """The grid places of R whose vectors the patch at (i, j) depends on, by its gradient."""
    r = torch.rand(1, 6, size, size, requires_grad=True)
    patchae.rebuild(r, decoder)[0, :, i, j].sum().backward()
    return [tuple(place) for place in r.grad[0].abs().sum(dim=0).nonzero().tolist()]


def test_one_vector_one_patch():
    """With 1×1 layers the patch (2, 5) depends on the vector (2, 5) and on no other."""
    torch.manual_seed(0)
    decoder = [nn.Conv2d(6, 6, 1), nn.Conv2d(6, 12, 1)]
    reached = places_that_reach(decoder, 2, 5)
    print(f"\n1×1 decoder: patch (2, 5) is rebuilt from {len(reached)} vector: {reached}")
    assert reached == [(2, 5)]


def test_a_3x3_decoder_breaks_it():
    """Two 3×3 layers see 5 × 5 vectors: 25 neighbours could draw what this vector hides."""
    torch.manual_seed(0)
    decoder = [nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1)]
    for layer in decoder:
        layer.weight.data.abs_()  # no ReLU is at rest, so every dependence shows in the gradient
    reached = places_that_reach(decoder, 2, 5)
    print(f"\n3×3 decoder: patch (2, 5) is rebuilt from {len(reached)} vectors: {reached}")
    assert len(reached) == 25 and min(reached) == (0, 3) and max(reached) == (4, 7)


def test_the_models_own_layers_are_1x1():
    """So the two tests above speak of this model; the rebuilt patches cover the image."""
    model = small_model()
    assert {layer.kernel_size for part in (model.encoder, model.decoder) for layer in part} == {(1, 1)}
    r, rebuilt = model(torch.rand(2, 3, 64, 64))
    assert r.shape == (2, 192, 16, 16) and r.min() >= 0
    assert patchae.unpatchify(rebuilt, model.p).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name, layers, size, channels, grid", [
    ("resnet18", (2, 3), 64, 384, 8), ("resnet18", (1, 2, 3), 96, 448, 24),
    ("resnet50", (2, 3), 64, 1536, 8), ("wide_resnet50_2", (2, 3), 64, 1536, 8)])
def test_features_of_every_backbone(name, layers, size, channels, grid):
    """⊕ has the channels of all stages in use, on the grid of the finest, and no negative value."""
    model = patchae.PatchAE(Config(backbone=name, layers=layers, image_size=size))
    features = model.features(torch.rand(1, 3, size, size))
    assert features.shape == (1, channels, grid, grid) and features.min() >= 0
    assert model.p == size // grid
    assert not hasattr(model.backbone, f"layer{max(layers) + 1}")


def test_backbone_is_torchvisions_resnet():
    """Cutting it changes no number: the same maps as the whole network's, hooked at layer2."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None).eval()
    backbone = patchae.Backbone("resnet18", (2,))
    backbone.load_state_dict(resnet.state_dict(), strict=False)
    seen, image = [], torch.rand(2, 3, 64, 64)
    resnet.layer2.register_forward_hook(lambda module, given, out: seen.append(out))
    resnet(patchae.normalise(image))
    torch.testing.assert_close(backbone(image)[0], seen[0], rtol=1e-4, atol=1e-5)


def test_identity_start_makes_r_the_features():
    """Before training R is exactly Φ, so trained R is compared with raw features on equal terms."""
    model = small_model()
    patchae.preserve_distances(model.encoder, model.decoder, torch.rand(50, 192))
    features = model.features(torch.rand(2, 3, 64, 64))
    assert torch.equal(patchae.represent(features, model.encoder), features)


@pytest.mark.parametrize("channels, most", [(16, 0.9), (128, 0.05), (191, 1e-3)])
def test_principal_start_keeps_distances_in_fewer_channels(channels, most):
    """Distances in R are a projection's: never longer than in Φ, nearly as long with many channels."""
    torch.manual_seed(0)
    mixing = torch.randn(192, 192) * torch.logspace(0, -2, 192)[:, None]
    features = (torch.randn(400, 192) @ mixing).abs()
    model = small_model(channels=channels)
    patchae.preserve_distances(model.encoder, model.decoder, features)
    r = patchae.represent(features.T.reshape(1, 192, 20, 20), model.encoder)
    hidden = model.decoder[0](r)
    assert hidden.mean(dim=(0, 2, 3)).abs().max() < 1e-2 * r.mean()  # the decoder sees no shift
    r = r.flatten(2)[0].T
    assert r.min() > 0  # neither ReLU cuts anything off
    # scikit-learn's principal components give the same distances
    from sklearn.decomposition import PCA
    expected = torch.pdist(torch.tensor(PCA(channels).fit_transform(features.double().numpy())))
    torch.testing.assert_close(torch.pdist(r).double(), expected, rtol=2e-3, atol=2e-3)
    assert (1 - torch.pdist(r) / torch.pdist(features)).mean() < most


def test_more_channels_than_features_are_refused():
    """They would start at 0, behind a ReLU without a gradient, and never be of use."""
    with pytest.raises(patchae.UserError, match="--channels 193"):
        small_model(channels=193)
    assert small_model(channels=193, encoder_start="random").encoder[0].out_channels == 193


def test_gradient_reaches_the_backbone_only_when_fine_tuned():
    """Frozen: no gradient. --finetune-backbone: gradients, and batch norm still in eval mode."""
    image = torch.rand(2, 3, 64, 64)
    for finetune in (False, True):
        model = small_model(finetune_backbone=finetune)
        patchae.training_loss(model, image, patchae.seeded(0)).backward()
        assert (model.backbone.conv1.weight.grad is not None) == finetune
        assert not model.backbone.training and model.encoder[0].weight.grad.abs().sum() > 0


def test_training_loss_is_the_loss_of_the_chosen_part():
    """All patches: the same as (E3) on the whole image. A part: its mean over parts is that too."""
    model, image = small_model(patch_fraction=1.0), torch.rand(2, 3, 64, 64)
    patches = patchae.patchify(patchae.normalise(image), model.p)
    whole = patchae.reconstruction_loss(model(image)[1], patches).item()
    assert patchae.training_loss(model, image, patchae.seeded(0)).item() == pytest.approx(whole, rel=1e-5)
    model.config.patch_fraction = 0.25
    with torch.no_grad():
        parts = [patchae.training_loss(model, image, patchae.seeded(s)).item() for s in range(40)]
    assert np.std(parts) > 0 and np.mean(parts) == pytest.approx(whole, rel=0.05)


def test_training_rebuilds_and_moves_the_encoder_less_than_the_decoder():
    """Some steps on one batch lower (E3) a lot; the encoder, at its smaller rate, moves less."""
    import train
    model = small_model(epochs=30)
    image = nn.functional.interpolate(torch.rand(4, 3, 4, 4), (64, 64), mode="bilinear")
    patchae.preserve_distances(model.encoder, model.decoder, torch.rand(9, 192))
    optimizer = train.make_optimizer(model)
    before = [layer[0].weight.detach().clone() for layer in (model.encoder, model.decoder)]
    losses = [train.train_epoch(model, optimizer, iter([(image, None)]), epoch, 1) for epoch in range(30)]
    moved = [(layer[0].weight - old).abs().max() for layer, old in
             zip((model.encoder, model.decoder), before)]
    assert losses[-1] < 0.5 * losses[0] and 0 < moved[0] < moved[1] / 5


def vectors_and_memory(kind="feature", fraction=1.0):
    """A model, five images, their memory, their vectors (N, P, C)."""
    model, images = small_model(), torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        memory = patchae.build_memory(model, images.split(2), 5, kind, fraction)
        return model, images, memory, patchae.patch_vectors(model, images, kind)


def test_memory_holds_every_vector_of_every_image():
    """A fraction of 1 keeps all vectors of an image, in any order; normal images then score 0."""
    model, images, memory, vectors = vectors_and_memory()
    assert memory.shape == vectors.shape == (5, 256, 192)
    torch.testing.assert_close(memory.sum(dim=1), vectors.sum(dim=1))
    with torch.no_grad():
        maps = patchae.score_maps(model, images, memory, "feature")
    assert maps.max() < 5e-3 * memory.norm(dim=2).mean()  # not 0: (a − b)² by a matrix product
    assert patchae.score_maps(model, images.flip(3), memory, "feature").max() > 10 * maps.max()


def test_memory_fraction_keeps_a_seeded_part_of_each_image():
    """⌈F · P⌉ vectors of each image, all its own, the same for the same seed."""
    model, images, memory, vectors = vectors_and_memory(fraction=0.1)
    assert memory.shape == (5, 26, 192)
    for own, kept in zip(vectors, memory):
        assert torch.cdist(kept, own, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-4
    with torch.no_grad():
        again = patchae.build_memory(model, images.split(3), 5, "feature", 0.1)
    torch.testing.assert_close(again, memory)


def test_scoring_by_another_route():
    """(E4) over a whole memory, and with one image left out, by scikit-learn's nearest neighbour."""
    model, images, memory, vectors = vectors_and_memory("backbone")
    with torch.no_grad():
        whole = patchae.score_maps(model, images.flip(3), memory, "backbone")
        flipped = patchae.patch_vectors(model, images.flip(3), "backbone")
        for n in range(5):
            own = patchae.score_maps(model, images[n:n + 1], memory, "backbone", own=n)
            others = np.concatenate([vectors[m].numpy() for m in range(5) if m != n])
            search = NearestNeighbors(n_neighbors=1).fit(others)
            expected = search.kneighbors(vectors[n].numpy())[0].reshape(16, 16)
            np.testing.assert_allclose(own[0], expected, rtol=1e-3)
    search = NearestNeighbors(n_neighbors=1).fit(memory.flatten(0, 1).numpy())
    expected = search.kneighbors(flipped.flatten(0, 1).numpy())[0].reshape(5, 16, 16)
    np.testing.assert_allclose(whole, expected, rtol=1e-3)


def test_reconstruction_kind_is_the_error_of_each_patch():
    """--score reconstruction: mean squared difference of each 4 × 4 patch, by numpy."""
    model, image = small_model(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = patchae.score_maps(model, image, None, "reconstruction")[0]
        rebuilt = patchae.unpatchify(model(image)[1], model.p)[0].numpy()
    error = (rebuilt - patchae.normalise(image)[0].numpy())**2
    assert found[3, 7].item() == pytest.approx(error[:, 12:16, 28:32].mean(), rel=1e-4)


def test_search_holds_a_bounded_number_of_distances(monkeypatch):
    """No call of cdist is larger than DISTANCES_AT_ONCE, however large the memory."""
    largest, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: largest.append(len(a) * len(b)) or cdist(a, b))
    monkeypatch.setitem(patchae.DISTANCES_AT_ONCE, "cpu", 1000)
    patchae.nearest_distance(torch.rand(30, 8), torch.rand(5000, 8))
    assert len(largest) > 100 and max(largest) <= 1000


def test_batch_norm_statistics_are_those_of_the_images():
    """calibrate_batch_norm: bn1's mean is the mean of conv1's output over all images."""
    backbone, images = patchae.Backbone("resnet18", (1,)), torch.rand(8, 3, 64, 64)
    patchae.calibrate_batch_norm(backbone, images.split(4))
    with torch.no_grad():
        out = backbone.conv1(patchae.normalise(images))
    torch.testing.assert_close(backbone.bn1.running_mean, out.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in backbone.modules())


def test_two_layouts_of_memory_give_equal_features():
    """channels_last is only faster: features agree with plain layout within 1e-4 of their size."""
    torch.manual_seed(0)
    backbone, image = patchae.Backbone("resnet18", (2, 3)), torch.rand(2, 3, 64, 64)
    plain = patchae.Backbone("resnet18", (2, 3))
    plain.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        maps = backbone(image)
        plain_maps, x = {}, plain.bn1(plain.conv1(patchae.normalise(image))).relu()
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        for stage in (1, 2, 3):
            x = plain_maps[stage] = getattr(plain, f"layer{stage}")(x)
    for found, stage in zip(maps, (2, 3)):
        assert (found - plain_maps[stage]).abs().max() < 1e-4 * plain_maps[stage].abs().max()


def test_seeded_generators_are_independent_of_order():
    """The same numbers give the same draw, other numbers another one."""
    draw = torch.rand(3, generator=patchae.seeded(0, 1, 2))
    assert torch.equal(draw, torch.rand(3, generator=patchae.seeded(0, 1, 2)))
    assert not torch.equal(draw, torch.rand(3, generator=patchae.seeded(0, 2, 1)))


def test_notation_table_and_code_agree():
    """Every name in the notation table is a name that the code uses, and E1 to E5 are five functions."""
    source = open(patchae.__file__, encoding="utf-8").read()
    table = source[source.index("Notation"):source.index('"""', 3)]
    names = re.findall(r"^    \S+ +([a-z_]+) +\(", table, flags=re.M)
    assert len(names) == 9
    code = source[source.index("class Config"):]
    parameters = set(re.findall(r"[(,] ?(\w+)(?=[,)=])", " ".join(re.findall(r"def .*", code))))
    assigned = set(re.findall(r"^ +([\w, ]+) = ", code, flags=re.M))
    for name in names:
        assert name in parameters or any(name in line.split(", ") for line in assigned), name
    labels = [(match.group(1), match.group(2)) for match in
              re.finditer(r'def (\w+)\([^"]*?"""\((E\d)\)', source)]
    equations = {label: name for name, label in labels if name != "training_loss"}
    assert equations == {"E1": "represent", "E2": "rebuild", "E3": "reconstruction_loss",
                         "E4": "nearest_distance", "E5": "image_score"}


def test_code_uses_no_name_before_it_is_defined():
    """patchae.py reads without a jump forward: in the part that is the method, functions call
    only functions and classes that stand above them."""
    source = open(patchae.__file__, encoding="utf-8").read()
    method = source[:source.index("# ==== nothing from the paper")]
    defined = {m.group(1): m.start() for m in re.finditer(r"^(?:def|class) (\w+)", method, flags=re.M)}
    body = re.sub(r'""".*?"""|#[^\n]*', lambda m: " " * len(m.group()), method, flags=re.S)
    for name, start in defined.items():
        first = re.search(rf"(?<!\.)\b{name}\(", body)
        assert first is None or first.start() >= start, name
