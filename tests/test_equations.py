"""The equations as worked examples: small tensors, numbers to redo on paper, an oracle beside each.

Every test is named after its label in patchae.py and computes the same thing another way.
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import nn

import patchae


def layer(weight, bias):
    """A 1×1 convolution with these numbers: weight (out, in), bias (out)."""
    convolution = nn.Conv2d(len(weight[0]), len(weight), 1)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor(weight)[:, :, None, None])
        convolution.bias.copy_(torch.tensor(bias))
    return convolution


def test_E1_representation_by_hand():
    """R = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂) for one place, on paper.

    Φ = (1, 2): W₁ Φ + b₁ = (1·1 − 1·2 + 0, 1·1 + 1·2 − 1) = (−1, 2), ReLU: (0, 2),
    W₂ (0, 2) + b₂ = (2·0 + 1·2 + 1, 0 − 3·2 + 1) = (3, −5), ReLU: (3, 0).
    """
    encoder = [layer([[1.0, -1.0], [1.0, 1.0]], [0.0, -1.0]),
               layer([[2.0, 1.0], [0.0, -3.0]], [1.0, 1.0])]
    features = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert patchae.represent(features, encoder).flatten().tolist() == [3.0, 0.0]


def test_E1_is_the_same_linear_layer_at_every_place():
    """On a grid: numpy multiplies each place's feature vector by W₁ and W₂ by itself."""
    torch.manual_seed(0)
    encoder = [nn.Conv2d(5, 4, 1), nn.Conv2d(4, 3, 1)]
    features = torch.randn(2, 5, 3, 4)
    (w1, b1), (w2, b2) = [(c.weight.detach().numpy()[:, :, 0, 0], c.bias.detach().numpy())
                          for c in encoder]
    expected = np.zeros((2, 3, 3, 4), dtype=np.float32)
    for b, i, j in np.ndindex(2, 3, 4):
        hidden = np.maximum(w1 @ features.numpy()[b, :, i, j] + b1, 0)
        expected[b, :, i, j] = np.maximum(w2 @ hidden + b2, 0)
    np.testing.assert_allclose(patchae.represent(features, encoder).detach(), expected, atol=1e-6)


def test_E2_one_vector_rebuilds_one_patch_by_hand():
    """Î = V₂ ReLU(V₁ r + c₁) + c₂ with r = (1, 2): ReLU(1 − 2, 1 + 2) = (0, 3), then (6 − 1, −3).

    The last layer has no ReLU: a patch is darker than the mean, −3, as often as brighter.
    """
    decoder = [layer([[1.0, -1.0], [1.0, 1.0]], [0.0, 0.0]),
               layer([[5.0, 2.0], [0.0, -1.0]], [-1.0, 0.0])]
    r = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert patchae.rebuild(r, decoder).flatten().tolist() == [5.0, -3.0]


def test_E3_loss_by_hand():
    """Two patches of two values: errors (1² + 3²)/2 = 5 and (0² + 2²)/2 = 2, so L = (5 + 2)/2."""
    patches = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).T.reshape(1, 2, 1, 2)
    rebuilt = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).T.reshape(1, 2, 1, 2)
    assert patchae.patch_errors(rebuilt, patches).tolist() == [[[5.0, 2.0]]]
    assert patchae.reconstruction_loss(rebuilt, patches).item() == 3.5


def test_E3_of_image_patches_is_the_mean_squared_error_of_the_image():
    """Cutting into patches moves pixels and changes none: numpy on the uncut images agrees."""
    torch.manual_seed(0)
    one, two = torch.rand(2, 2, 3, 16, 24)
    loss = patchae.reconstruction_loss(patchae.patchify(one, 8), patchae.patchify(two, 8))
    assert loss.item() == pytest.approx(np.mean((one.numpy() - two.numpy())**2), rel=1e-5)


def test_E4_distance_by_hand():
    """Memory (0, 0), (3, 0), (0, 10): from (3, 4) it is min(5, 4, √45) = 4; from (0, 1) it is 1."""
    memory = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 10.0]])
    r = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert patchae.nearest_distance(r, memory).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("at_once", [1, 7 * 3, 7 * 50, 10**6])
def test_E4_agrees_with_scikit_learn_whatever_the_block(monkeypatch, at_once):
    """The blocks, down to one vector at a time, leave no vector of the memory out."""
    monkeypatch.setitem(patchae.DISTANCES_AT_ONCE, "cpu", at_once)
    torch.manual_seed(0)
    r, memory = 3 + torch.rand(7, 40), 3 + torch.rand(101, 40)
    expected, _ = NearestNeighbors(n_neighbors=1).fit(memory.double()).kneighbors(r.double())
    np.testing.assert_allclose(patchae.nearest_distance(r, memory), expected[:, 0], rtol=1e-4)


def test_E5_image_score_by_hand():
    """S is the largest s_ij of each image: 4 of the first map, 9 of the second."""
    anomaly_map = torch.tensor([[[1.0, 4.0], [2.0, 3.0]], [[9.0, 0.0], [1.0, 1.0]]])
    assert patchae.image_score(anomaly_map).tolist() == [4.0, 9.0]


def test_concatenation_of_scales_by_hand():
    """⊕: the 1×1 map of the coarse stage is repeated over the 2×2 grid of the fine one."""
    fine, coarse = torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 1, 1, 1), 7.0)
    features = patchae.concatenate_scales([fine, coarse], neighbourhood=1)
    assert features.tolist() == [[[[0, 1], [2, 3]], [[7, 7], [7, 7]]]]


def test_neighbourhood_average_by_hand():
    """3×3 mean of 0 … 8: in the middle 4; in the corner of the four values there, (0+1+3+4)/4."""
    features = patchae.concatenate_scales([torch.arange(9.0).view(1, 1, 3, 3)], neighbourhood=3)
    assert features[0, 0, 1, 1].item() == pytest.approx(4) and features[0, 0, 0, 0].item() == 2


def test_coarse_scales_are_resized_bilinearly():
    """⊕ with a coarse map of two columns 0 and 4: columns 0, 1, 3, 4 at the finer grid."""
    coarse = torch.tensor([[0.0, 4.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    features = patchae.concatenate_scales([torch.zeros(1, 1, 4, 4), coarse], neighbourhood=1)
    assert features[0, 1].tolist() == [[0.0, 1.0, 3.0, 4.0]] * 4


def test_patchify_by_hand():
    """Patch (0, 1) of p = 2 holds the pixels of rows 0, 1 and columns 2, 3, channel by channel."""
    image = torch.arange(3 * 4 * 4.0).view(1, 3, 4, 4)
    patch = patchae.patchify(image, 2)[0, :, 0, 1]
    assert patch.tolist() == [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39]


def test_patchify_and_unpatchify_are_inverse():
    """Both ways, also for an image that is not square."""
    image = torch.rand(2, 3, 24, 40)
    assert torch.equal(patchae.unpatchify(patchae.patchify(image, 8), 8), image)
    patches = torch.rand(2, 192, 3, 5)
    assert torch.equal(patchae.patchify(patchae.unpatchify(patches, 8), 8), patches)


def test_normalise_by_hand():
    """ImageNet's mean colour becomes 0, one deviation more becomes 1; denormalise undoes it."""
    mean, std = torch.tensor(patchae.IMAGENET_MEAN), torch.tensor(patchae.IMAGENET_STD)
    image = torch.stack([mean, mean + std], dim=1).view(1, 3, 1, 2)
    normalised = patchae.normalise(image)
    torch.testing.assert_close(normalised, torch.tensor([[[[0.0, 1.0]]] * 3]).view(1, 3, 1, 2))
    torch.testing.assert_close(patchae.denormalise(normalised), image)


def one_defect(monkeypatch, paint, alpha):
    """Make every defect draw this paint with this opacity."""
    monkeypatch.setattr(patchae, "DEFECT_KINDS", (lambda other, h, w, rng: (paint, alpha(h, w)),))
    monkeypatch.setattr(patchae, "MOST_DEFECTS", 1)


def test_defects_blend_by_hand(monkeypatch):
    """I ← (1 − α) I + α paint: 0.75 · 0.4 + 0.25 · 0.8 = 0.5 in the box, 0.4 outside."""
    one_defect(monkeypatch, torch.full((3, 1, 1), 0.8), lambda h, w: torch.full((1, h, w), 0.25))
    image = torch.full((3, 64, 64), 0.4)
    defected, mask = patchae.add_defects(image, image, patchae.seeded(0))
    inside = mask.expand_as(image)
    assert 0 < mask.sum() < 64 * 64 and mask.any(dim=1).sum() * mask.any(dim=2).sum() == mask.sum()
    torch.testing.assert_close(defected[inside], torch.full_like(defected[inside], 0.5))
    assert torch.equal(defected[~inside], image[~inside])


@pytest.mark.parametrize("kind", patchae.DEFECT_KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_defect_shows_and_stays_in_its_mask(monkeypatch, kind):
    """In the mask most pixels change, outside none, all stay in [0, 1]; the input is not written."""
    monkeypatch.setattr(patchae, "DEFECT_KINDS", (kind,))
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing="ij")
    image = torch.stack([x, y, x * y])
    before = image.clone()
    for seed in range(20):
        defected, mask = patchae.add_defects(image, image.flip(2), patchae.seeded(seed))
        changed = (defected != image).any(dim=0, keepdim=True)
        assert mask.dtype == torch.bool and mask.shape == (1, 96, 96) and mask.any()
        assert not (changed & ~mask).any() and changed[mask].float().mean() > 0.9
        assert defected.min() >= 0 and defected.max() <= 1 and torch.equal(image, before)


def test_paste_takes_from_the_other_image():
    """altered_paste shows the other image's content: of a red image, nothing but red."""
    red = torch.zeros(3, 64, 64)
    red[0] = 0.5
    paint, alpha = patchae.altered_paste(red, 20, 30, patchae.seeded(1))
    assert paint.shape == (3, 20, 30) and alpha.shape == (1, 20, 30)
    assert (paint[0] > 0).all() and (paint[1:] == 0).all()


def test_scratch_is_thin_and_stain_is_soft():
    """A scratch covers little of its box; a stain has many opacities, a noise blob few soft ones."""
    scratch = torch.stack([patchae.scratch(None, 60, 60, patchae.seeded(s))[1] for s in range(20)])
    blob = torch.stack([patchae.noise_blob(None, 60, 60, patchae.seeded(s))[1] for s in range(20)])
    stain = torch.stack([patchae.stain(None, 60, 60, patchae.seeded(s))[1] for s in range(20)])
    assert (scratch > 0).float().mean() < 0.25 < (blob > 0).float().mean()

    def soft(alpha):
        """Part of the covered pixels that is not at the full opacity of its defect."""
        full = alpha.amax(dim=(1, 2, 3), keepdim=True)
        return ((alpha > 0) & (alpha < 0.9 * full)).sum() / (alpha > 0).sum()

    assert soft(stain) > 2 * soft(blob)


def test_bilinear_upsampling_of_the_map_keeps_its_largest_place():
    """The picture of the map glows where the map is largest."""
    import evaluate
    anomaly_map = torch.zeros(1, 8, 8)
    anomaly_map[0, 2, 5] = 1
    up = evaluate.upsample(anomaly_map, (64, 64))[0]
    assert np.unravel_index(up.argmax(), up.shape)[0] // 8 == 2 and up.argmax() % 64 // 8 == 5
    np.testing.assert_allclose(up, F.interpolate(anomaly_map[None], (64, 64), mode="bilinear")[0, 0])
