"""The equations as worked examples, named after the labels in patchae.py: numbers to redo on paper."""
import random

import numpy as np
import pytest
import torch

import patchae

KINDS = ("altered_paste", "scratch", "stain")


@pytest.fixture(scope="module")
def model():
    """A model with C₃ = 2, so that R fits on paper; Φ has 64 channels, of which the tests use two."""
    return patchae.PatchAE(patchae.Config("resnet18", layers=(1,), image_size=64, patch_size=4, channels=2))


def put(layer, weight, bias):
    """Give a 1×1 convolution these numbers for its first inputs and outputs and 0 for all others."""
    with torch.no_grad():
        layer.weight.zero_()[:2, :2] = torch.tensor(weight)[:, :, None, None]
        layer.bias.zero_()[:2] = torch.tensor(bias)


def test_E1_representation_by_hand(model):
    """R = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂) for one place, on paper.

    Φ = (1, 2): W₁ Φ + b₁ = (1·1 − 1·2 + 0, 1·1 + 1·2 − 1) = (−1, 2), ReLU: (0, 2),
    W₂ (0, 2) + b₂ = (2·0 + 1·2 + 1, 0 − 3·2 + 1) = (3, −5), ReLU: (3, 0).
    """
    put(model.encoder[0], [[1.0, -1.0], [1.0, 1.0]], [0.0, -1.0])
    put(model.encoder[2], [[2.0, 1.0], [0.0, -3.0]], [1.0, 1.0])
    features = torch.zeros(1, 64, 1, 1)
    features[0, :2, 0, 0] = torch.tensor([1.0, 2.0])
    assert patchae.represent(features, model.encoder).flatten().tolist() == [3.0, 0.0]


def test_E2_one_vector_rebuilds_one_patch_by_hand(model):
    """Î = V₂ ReLU(V₁ r + c₁) + c₂ with r = (1, 2): ReLU(1 − 2, 1 + 2) = (0, 3), then (6 − 1, −3).

    The last layer has no ReLU: a patch is darker than the mean, −3, as often as brighter.
    """
    put(model.decoder[0], [[1.0, -1.0], [1.0, 1.0]], [0.0, 0.0])
    put(model.decoder[2], [[5.0, 2.0], [0.0, -1.0]], [-1.0, 0.0])
    rebuilt = patchae.rebuild(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), model.decoder)
    assert rebuilt.flatten().tolist() == [5.0, -3.0] + [0.0] * (3 * 4 * 4 - 2)


def test_E3_loss_by_hand():
    """Two patches of two values with the errors 1, 3 and 0, −2: L = (1 + 9 + 0 + 4) / (2 · 2) = 3.5."""
    patches = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).T.reshape(1, 2, 1, 2)
    rebuilt = torch.tensor([[1.0, 3.0], [1.0, -1.0]]).T.reshape(1, 2, 1, 2)
    assert patchae.reconstruction_loss(rebuilt, patches).item() == 3.5


def test_E4_distance_by_hand():
    """Memory of three images: {(0, 0), (0, 10)}, {(9, 9), (8, 9)} and {(3, 0), (50, 50)}.

    From (3, 4) it is min(5, √45, √61, √50, 4, …) = 4, in the last image; from (0, 1) it is 1, in the
    first; from (9, 11) it is 2, in the middle one. R is of two images with two patches beside each other.
    """
    memory = torch.tensor([[[0.0, 0], [0, 10]], [[9, 9], [8, 9]], [[3, 0], [50, 50]]])
    r = torch.tensor([[3.0, 4], [0, 1], [9, 11], [3, 4]]).view(2, 1, 2, 2).movedim(3, 1)
    assert patchae.nearest_distance(r, list(memory)).tolist() == [[[4.0, 1.0]], [[2.0, 4.0]]]


def test_E5_image_score_by_hand():
    """S is the mean of the three largest s_ij: (4 + 3 + 2) / 3 = 3, and (9 + 1 + 1) / 3 of the second map."""
    anomaly_map = torch.tensor([[[1.0, 4.0, 0.0], [2.0, 3.0, 1.0]], [[0.0, 9.0, 1.0], [1.0, 0.0, 1.0]]])
    assert patchae.image_score(anomaly_map).tolist() == pytest.approx([3, 11 / 3])


# ---- ⊕: from maps to features -------------------------------------------------------------------
def test_concatenation_of_scales_by_hand():
    """⊕ of a finer map, one on the grid and a coarser one: on a 4 × 4 grid, in this order.

    Finer, 16 × 16, all 0 but one 16 in a patch's corner: area averages the patch's 4 × 4 values to 1,
    nothing is skipped. On the grid: unchanged. Coarser, columns 0 and 4: bilinear gives 0, 1, 3, 4.
    Neighbours are averaged before: a 1 × 1 map of 6 has no other than itself, 6 / (3 · 1) = 2.
    """
    fine = torch.zeros(1, 1, 16, 16)
    fine[0, 0, 4, 8] = 16
    same = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = torch.tensor([[0.0, 4.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    features = patchae.concatenate_scales([fine, same, coarse], grid=4, neighbourhood=1)
    assert features[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(features[0, 1], same[0, 0])
    assert features[0, 2].tolist() == [[0, 1, 3, 4]] * 4
    features = patchae.concatenate_scales([torch.full((1, 1, 1, 1), 6.0)], grid=3, neighbourhood=3)
    assert features.flatten().tolist() == pytest.approx([2] * 9)


def test_contrast_is_tempered_by_hand():
    """(3, 4) has the length 5 and is divided by √5; four times as long, (12, 16), it becomes twice as long,
    not four times. Nothing stays nothing, and gives a gradient that is a number."""
    features = torch.tensor([[3.0, 12.0, 0.0], [4.0, 16.0, 0.0]]).view(1, 2, 1, 3).requires_grad_()
    tempered = patchae.temper_contrast(features)
    tempered.sum().backward()
    expected = torch.tensor([[3.0, 6.0, 0.0], [4.0, 8.0, 0.0]]) / 5**.5
    torch.testing.assert_close(tempered[0, :, 0].detach(), expected)
    assert features.grad.isfinite().all()


def test_neighbours_by_hand():
    """The numbers 1 to 9 on a 3 × 3 map, k = 3: the sum over the n that exist, by k √n.

    Corner, n = 4: (1 + 2 + 4 + 5) / (3 · 2) = 2. Edge, n = 6: (1 + … + 6) / (3 √6). Middle: 45 / 9.
    k = 5: every place sees all nine, 45 / (5 · 3) = 3. Of independent values with deviation 1 every average
    has the deviation √n / (k √n) = 1/k, at the border as inside; a plain mean has 1/√n, more in a corner.
    """
    numbers = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    average = patchae.average_neighbours(numbers, 3)[0, 0]
    found = [average[0, 0].item(), average[0, 1].item(), average[1, 1].item()]
    assert found == pytest.approx([2, 21 / (3 * 6**.5), 5])
    torch.testing.assert_close(patchae.average_neighbours(numbers, 5), torch.full((1, 1, 3, 3), 3.0))


# ---- pixels -------------------------------------------------------------------------------------
def test_patchify_by_hand_and_back():
    """Patch (0, 1) of p = 2: the pixels of rows 0, 1 and columns 2, 3, channel by channel.

    pixel_shuffle, with which train.py draws what is rebuilt, is the inverse.
    """
    image = torch.rand(1, 3, 4, 6)
    patches = patchae.patchify(image, 2)
    assert torch.equal(patches[0, :, 0, 1], image[0, :, :2, 2:4].flatten())
    assert torch.equal(torch.pixel_shuffle(patches, 2), image)


# ---- ⊗: artificial defects ----------------------------------------------------------------------
def test_defects_blend_by_hand(monkeypatch):
    """I ← (1 − α) I + α paint: 0.75 · 0.4 + 0.25 · 0.8 = 0.5 where α = 0.25, 0.4 elsewhere.

    The mask is True where α > 0, here in the left column of the box, and the given image stays as it was.
    A defect may take pixels of the other image, here 0.8.
    """
    def left_column(other, h, w):
        return other[:, :h, :w], 0.25 * torch.eye(1, w).expand(1, h, w)

    for kind in KINDS:
        monkeypatch.setattr(patchae, kind, left_column)
    monkeypatch.setattr(patchae, "MOST_DEFECTS", 1)
    image = torch.full((3, 64, 64), 0.4)
    defected, mask = patchae.add_defects(image, torch.full((3, 64, 64), 0.8))
    assert mask.dtype == torch.bool and mask.shape == (1, 64, 64)
    assert mask.sum() > 1 and mask[0].any(dim=0).sum() == 1
    torch.testing.assert_close(defected, torch.where(mask, 0.5, 0.4).expand(3, 64, 64))
    assert (image == 0.4).all()


def test_number_kind_and_box_of_defects_vary(monkeypatch):
    """1 to 6 in an image, of three kinds, in boxes of 1/24 to 1/4 of the height and of the width, anywhere.

    The pixels that change are those of the mask, and stay in [0, 1].
    """
    drawn, counts = [], set()

    def watched(kind):
        return lambda other, h, w: drawn.append((kind.__name__, h, w)) or kind(other, h, w)

    for kind in KINDS:
        monkeypatch.setattr(patchae, kind, watched(getattr(patchae, kind)))
    image, ever = torch.rand(3, 48, 192), torch.zeros(48, 192, dtype=bool)
    for _ in range(100):
        before = len(drawn)
        defected, mask = patchae.add_defects(image, image.flip(2))
        counts.add(len(drawn) - before)
        ever |= mask[0]
        changed = (defected != image).any(dim=0, keepdim=True)
        assert not (changed & ~mask).any() and (changed == mask).float().mean() > .99
        assert 0 <= defected.min() and defected.max() <= 1
    names, heights, widths = zip(*drawn)
    assert counts == {1, 2, 3, 4, 5, 6} and set(names) == set(KINDS)
    assert (min(heights), max(heights)) == (3, 12) and 9 <= min(widths) <= 12 and 40 < max(widths) <= 48
    assert all(part.any() for part in (ever[:2], ever[-2:], ever[:, :6], ever[:, -6:]))


def test_blob_by_hand(monkeypatch):
    """Without noise a blob is (disc − 0.3) / softness, cut to [0, 1], with disc = 1 − x² − y².

    On 5 × 5 points, x and y = −1, −½, 0, ½, 1, the disc's middle rows are 0, ½, ¾, ½, 0 and 0, ¾, 1, ¾, 0.
    A paste has the softness 0.1, cut out; a stain that or 1, multiplied by its opacity, here 0.6. With noise
    no blob is its own mirror image; at the box's border it is 0, so that no edge is cut.
    """
    blobs = torch.cat([patchae.irregular_blob(20, 30, .1) for _ in range(200)])
    assert (blobs - blobs.flip(2)).abs().amax(dim=(1, 2)).min() > .1
    assert blobs[:, [0, -1]].max() == blobs[:, :, [0, -1]].max() == 0
    soft = torch.zeros(5, 5)
    soft[1:4, 1:4] = torch.tensor([[.2, .45, .2], [.45, .7, .45], [.2, .45, .2]])
    hard = 1.0 * (soft > 0)
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.zeros(shape))
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.6)
    torch.testing.assert_close(patchae.irregular_blob(5, 5, 1.0)[0], soft)
    torch.testing.assert_close(patchae.altered_paste(torch.rand(3, 9, 9), 5, 5)[1][0], hard)
    stains = torch.cat([patchae.stain(None, 5, 5)[1] for _ in range(20)]).unique(dim=0)
    torch.testing.assert_close(stains, .6 * torch.stack([soft, hard]))


def test_scratch_by_hand(monkeypatch):
    """A straight scratch along row 10: one or three pixels wide, then softened over three.

    Across it α is ⅓ ⅓ ⅓ or ⅓ ⅔ 1 ⅔ ⅓ of its opacity, here 0.6, all along it, without a gap.
    """
    rand, seen = torch.rand, set()
    line = torch.tensor([[.5, 0], [.5, .5], [.5, 1]]).view(3, 2, 1)  # (y, x) of start, bend and end
    monkeypatch.setattr(torch, "rand", lambda *shape: line if shape == (3, 2, 1) else rand(*shape))
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.6)
    for _ in range(20):
        alpha = patchae.scratch(None, 21, 40)[1][0, :, 2:-2] / .6 * 3
        assert (alpha.amax(dim=1) - alpha.amin(dim=1)).max() < 1e-5
        seen.add(tuple(alpha[7:14, 20].round().int().tolist()))
        assert alpha[:7].max() == alpha[14:].max() == 0
    assert seen == {(0, 0, 1, 1, 1, 0, 0), (0, 1, 2, 3, 2, 1, 0)}


def test_stains_go_from_fine_noise_to_one_colour():
    """Neighbouring pixels of uniform noise differ by 1/3 on average; interpolated between cells of 4 pixels,
    the finest grain, by 0.056, and by 0 where one cell covers the box. Each channel has its own noise."""
    paints = torch.stack([patchae.stain(None, 30, 30)[0].expand(3, 30, 30) for _ in range(200)])
    rough = paints.diff(dim=3).abs().mean(dim=(1, 2, 3))
    assert .05 < rough.max() < .065 and .1 < (rough < 1e-6).float().mean() < .5
    assert paints.std(dim=1).mean() > .1


def test_paste_is_a_flipped_and_recoloured_part_of_the_image():
    """Red rises to the right and green downwards: in a paste one of the two falls. Each channel has its own
    gain of 0.6 to 1.4."""
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(96.), indexing="ij")
    other = torch.stack([.1 + x / 200, .1 + y / 200, torch.full_like(x, .5)])
    turned, gains = set(), []
    for _ in range(60):
        red, green, blue = patchae.altered_paste(other, 20, 30)[0]
        red, green = 200 * red[0].diff().mean().item(), 200 * green[:, 0].diff().mean().item()
        turned.add((red > 0, green > 0))
        gains.append((abs(red), abs(green), 2 * blue.mean().item()))
    assert turned == {(True, False), (False, True)}
    assert .59 < np.min(gains) < .65 and 1.35 < np.max(gains) < 1.41
    assert np.abs(np.corrcoef(np.transpose(gains))[~np.eye(3, dtype=bool)]).max() < .5
