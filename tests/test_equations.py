"""The equations as worked examples, named after the labels in patchae.py: redo them on paper."""
import numpy as np
import pytest
import torch
from conftest import watch

import patchae

KINDS = ("altered_paste", "scratch", "stain")


def put(layer, weight, bias):
    """Give a 1×1 convolution these numbers."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight)[:, :, None, None])
        layer.bias.copy_(torch.tensor(bias))


def test_E1_representation_by_hand():
    """R = ReLU(W₂ ReLU(W₁ Φ + b₁) + b₂) for one place, on paper.

    Φ = (1, 2): W₁ Φ + b₁ = (1·1 − 1·2 + 0, 1·1 + 1·2 − 1) = (−1, 2), ReLU: (0, 2),
    W₂ (0, 2) + b₂ = (2·0 + 1·2 + 1, 0 − 3·2 + 1) = (3, −5), ReLU: (3, 0).
    """
    encoder = patchae.Encoder(2, 2, "random")
    put(encoder.W1, [[1.0, -1.0], [1.0, 1.0]], [0.0, -1.0])
    put(encoder.W2, [[2.0, 1.0], [0.0, -3.0]], [1.0, 1.0])
    features = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert encoder(features).flatten().tolist() == [3.0, 0.0]


def test_E2_one_vector_rebuilds_one_patch_by_hand():
    """Î = V₂ ReLU(V₁ r + c₁) + c₂ with r = (1, 2).

    ReLU(1 − 2 + 0, 1 + 2 + 1) = (0, 4), then (5·0 + 2·4 − 1, 0 − 1·4 + 3, 0) = (7, −1, 0). The last
    layer has no ReLU, so that its gradient does not end where it draws too dark.
    """
    decoder = patchae.Decoder(2, 3)
    put(decoder.V1, [[1.0, -1.0], [1.0, 1.0]], [0.0, 1.0])
    put(decoder.V2, [[5.0, 2.0], [0.0, -1.0], [0.0, 0.0]], [-1.0, 3.0, 0.0])
    r = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert decoder(r).flatten().tolist() == [7.0, -1.0, 0.0]


def test_E3_loss_by_hand():
    """Two patches of two values, errors 1, 3 and 0, −2: L = (1 + 9 + 0 + 4) / (2 · 2) = 3.5.

    The terms of the two are (1 + 9) / 2 = 5 and (0 + 4) / 2 = 2.
    """
    patches = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).T.reshape(1, 2, 1, 2)
    rebuilt = torch.tensor([[1.0, 3.0], [1.0, -1.0]]).T.reshape(1, 2, 1, 2)
    assert patchae.patch_error(rebuilt, patches).tolist() == [[[5.0, 2.0]]]
    assert patchae.reconstruction_loss(rebuilt, patches).item() == 3.5


@pytest.mark.parametrize("defect_weight", [0, 0.25, 1])
def test_training_loss_by_another_route(defect_weight):
    """The mean over the patches with a pixel in the mask counts λ, that over all patches the rest.

    Without a mask it is the mean over all. By numpy, from whole images.
    """
    rebuilt, image = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[0, 0, 7, 8] = mask[1, 0, 16:24, 40:47] = True
    image[mask.expand_as(image)] = 1  # a larger error there
    error = (rebuilt - image).numpy()**2
    error = error.reshape(2, 3, 16, 4, 16, 4).mean(axis=(1, 3, 5))        # (B, H', W')
    defective = mask.numpy().reshape(2, 16, 4, 16, 4).any(axis=(2, 4))
    of_all, there = error.mean(), error[defective].mean()
    assert defective.sum() == 5 and there > 1.2 * of_all
    expected = defect_weight * there + (1 - defect_weight) * of_all
    for given, loss in ((mask, expected), (mask & False, of_all)):
        found = patchae.training_loss(patchae.patchify(rebuilt, 4), image, given, 4, defect_weight)
        assert found.item() == pytest.approx(loss, rel=1e-5)


def test_E4_distance_by_hand():
    """Memory of three images: {(0, 0), (0, 10)}, {(9, 9), (8, 9)} and {(3, 0)}, of which one is
    kept.

    From (3, 4) it is min(5, √45, √61, √50, 4) = 4, in the last image; from (0, 1) it is 1, in the
    first; from (9, 11) it is 2, in the middle one. R is of two images with two patches each.
    """
    memory = [torch.tensor([[0.0, 0], [0, 10]]), torch.tensor([[9.0, 9], [8, 9]]),
              torch.tensor([[3.0, 0]])]
    r = torch.tensor([[3.0, 4], [0, 1], [9, 11], [3, 4]]).view(2, 1, 2, 2).movedim(3, 1)
    assert patchae.nearest_distance(r, memory).tolist() == [[[4.0, 1.0]], [[2.0, 4.0]]]


def test_E5_image_score_by_hand():
    """S is the mean of the three largest s_ij: (4 + 3 + 2) / 3 = 3, and (9 + 1 + 1) / 3."""
    first, second = [[1.0, 4.0, 0.0], [2.0, 3.0, 1.0]], [[0.0, 9.0, 1.0], [1.0, 0.0, 1.0]]
    scores = patchae.image_score(torch.tensor([first, second])).tolist()
    assert scores == pytest.approx([3, 11 / 3])


# ---- ⊕: from maps to features -------------------------------------------------------------------
def test_concatenation_of_scales_by_hand():
    """⊕ of a finer map, one on the grid and a coarser one: on a 4 × 4 grid, in this order.

    Finer, 16 × 16, all 0 but one 16 in a patch's corner: the mean of the patch's 4 × 4 values is 1.
    On the grid: unchanged. Coarser, columns 0 and 4: bilinear gives 0, 1, 3, 4. Neighbours are
    averaged before: a 1 × 1 map of 6 has no other than itself, 6 / (3 · 1) = 2.
    """
    fine = torch.zeros(1, 1, 16, 16)
    fine[0, 0, 4, 8] = 16
    same = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = torch.tensor([[0.0, 4.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    features = patchae.concatenate_scales([fine, same, coarse], grid=4, neighbourhood=1)
    assert features[0, 0].tolist() == [[0] * 4, [0, 0, 1, 0], [0] * 4, [0] * 4]
    assert torch.equal(features[0, 1], same[0, 0])
    assert features[0, 2].tolist() == [[0, 1, 3, 4]] * 4
    features = patchae.concatenate_scales([torch.full((1, 1, 1, 1), 6.0)], grid=3, neighbourhood=3)
    assert features.flatten().tolist() == pytest.approx([2] * 9)


@pytest.mark.parametrize("side, grid", [(48, 32), (24, 16), (32, 24), (96, 32), (5, 3)])
def test_a_finer_map_is_averaged_over_each_patch(side, grid):
    """Whatever the sides: by integration of the map, constant on each of its places, over a patch.

    Row i of `shares` says which part of patch i, from i/grid to (i + 1)/grid, lies in which place.
    """
    ends, starts = np.minimum.outer, np.maximum.outer
    patch, place = np.arange(grid + 1) / grid, np.arange(side + 1) / side
    shares = (ends(patch[1:], place[1:]) - starts(patch[:-1], place[:-1])).clip(0) * grid
    fine = torch.rand(2, 3, side, side)
    features = patchae.concatenate_scales([fine], grid, neighbourhood=1)
    expected = shares @ fine.double().numpy() @ shares.T
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5)


def test_contrast_is_tempered_by_hand():
    """(3, 4) has the length 5 and is divided by √5; (12, 16), four times as long, by 2 √5.

    Nothing stays nothing, and its gradient is a number.
    """
    features = torch.tensor([[3.0, 12.0, 0.0], [4.0, 16.0, 0.0]]).view(1, 2, 1, 3).requires_grad_()
    tempered = patchae.temper_contrast(features)
    tempered.sum().backward()
    expected = torch.tensor([[3.0, 6.0, 0.0], [4.0, 8.0, 0.0]]) / 5**0.5
    torch.testing.assert_close(tempered[0, :, 0].detach(), expected)
    assert features.grad.isfinite().all()


def test_neighbours_by_hand():
    """The numbers 1 to 9 on a 3 × 3 map, k = 3: the sum over the n that exist, by k √n.

    Corner, n = 4: (1 + 2 + 4 + 5) / (3 · 2) = 2. Edge, n = 6: (1 + … + 6) / (3 √6). Middle: 45 / 9.
    k = 5: every place sees all nine, 45 / (5 · 3) = 3. Of independent values with deviation 1 every
    average has the deviation √n / (k √n) = 1/k, at the border as inside; a plain mean has 1/√n.
    """
    numbers = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    average = patchae.average_neighbours(numbers, 3)[0, 0]
    found = [average[0, 0].item(), average[0, 1].item(), average[1, 1].item()]
    assert found == pytest.approx([2, 21 / (3 * 6**0.5), 5])
    torch.testing.assert_close(patchae.average_neighbours(numbers, 5), torch.full((1, 1, 3, 3), 3.))


def test_patchify_by_hand_and_back():
    """Patch (0, 1) of p = 2: the pixels of rows 0, 1 and columns 2, 3, channel by channel."""
    image = torch.rand(2, 3, 4, 6)
    patches = patchae.patchify(image, 2)
    assert patches.shape == (2, 12, 2, 3)
    assert torch.equal(patches[0, :, 0, 1], image[0, :, :2, 2:4].flatten())
    assert torch.equal(patchae.unpatchify(patches, 2), image)


# ---- ⊗: artificial defects ----------------------------------------------------------------------
def levels(values, low, high):
    """How many of the values lie in each of eight parts of a range; none may lie outside."""
    assert low - 1e-4 <= min(values) and max(values) <= high + 1e-4
    return np.histogram(values, 8, (low - 1e-4, high + 1e-4))[0]


def test_defects_blend_by_hand(monkeypatch):
    """I ← (1 − α) I + α paint, one defect after the other: with I = 0, paint 1 and α = ½ 0.5,
    0.75, …

    Paint of the other image, here 1. The mask is True where α > 0, in one column hardly. The given
    images stay as they were.
    """
    def half(other, h, w):
        alpha = torch.full((1, h, w), 0.5)
        alpha[:, :, 0], alpha[:, :, 1] = 1e-6, 0
        return other[:, :h, :w], alpha

    for kind in KINDS:
        monkeypatch.setattr(patchae, kind, half)
    image, other, found = torch.zeros(3, 64, 64), torch.ones(3, 64, 64), set()
    for _ in range(50):
        defected, mask = patchae.add_defects(image, other)
        assert mask.dtype == torch.bool and torch.equal(mask, defected[:1] > 0)
        found |= set(defected.mul(1e4).round().div(1e4).unique().tolist())
    assert {0, 0.5, 0.75} <= found <= {0, 0.5, 0.75, 0.875, 0.9375, 0.9688, 0.9844}
    assert image.max() == 0 and other.min() == 1


def test_boxes_have_all_sizes_and_lie_everywhere(monkeypatch):
    """1/24 to 1/4 of the height and of the width, each for itself, also at the image's border."""
    for kind in KINDS:
        monkeypatch.setattr(patchae, kind, lambda other, h, w: (other[:, :h, :w], torch.ones(1)))
    monkeypatch.setattr(patchae, "MOST_DEFECTS", 1)
    image, boxes = torch.rand(3, 48, 96), []
    for _ in range(800):
        y, x = patchae.add_defects(image, image)[1][0].nonzero(as_tuple=True)
        boxes.append((y.min().item(), y.max().item(), x.min().item(), x.max().item()))
    tops, bottoms, lefts, rights = np.transpose(boxes)
    heights, widths = bottoms - tops + 1, rights - lefts + 1
    assert set(heights) == set(range(3, 13)) and levels(widths, 5, 24).min() > 40
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.15
    assert (tops.min(), bottoms.max(), lefts.min(), rights.max()) == (0, 47, 0, 95)
    assert levels(tops / (48 - heights), 0, 1).min() > 40
    assert levels(lefts / (96 - widths), 0, 1).min() > 40


def test_numbers_and_kinds_of_defects(monkeypatch):
    """1 to 6 of three kinds in an image. What changes is in the mask, and stays in [0, 1]."""
    calls = {kind: watch(monkeypatch, patchae, kind) for kind in KINDS}
    image, other, counts = torch.rand(3, 48, 96), torch.rand(3, 48, 96), []
    before = image.clone()
    for _ in range(150):
        drawn = sum(map(len, calls.values()))
        defected, mask = patchae.add_defects(image, other)
        counts.append(sum(map(len, calls.values())) - drawn)
        changed = (defected != image).any(dim=0, keepdim=True)
        assert not (changed & ~mask).any() and (changed == mask).float().mean() > 0.99
        assert 0 <= defected.min() and defected.max() <= 1 and torch.equal(image, before)
    assert set(counts) == {1, 2, 3, 4, 5, 6} and np.bincount(counts)[1:].min() > 10
    assert min(map(len, calls.values())) > 0.25 * sum(counts)


def test_blob_by_hand():
    """In the middle of many blobs is (disc − 0.3) / softness, cut to [0, 1], disc = 1 − x² − y².

    On 5 × 5 points, x and y = −1, −½, 0, ½, 1, the disc's rows are 0, ½, ¾, ½, 0 and 0, ¾, 1, ¾, 0.
    The noise lifts as often as it lowers, so it does not move the median. No blob is its own mirror
    image. At the box's border it is 0, so that no edge is cut. A soft one has no steps.
    """
    soft = np.zeros((5, 5))
    soft[1:4, 1:4] = [[0.2, 0.45, 0.2], [0.45, 0.7, 0.45], [0.2, 0.45, 0.2]]
    for softness, expected in ((patchae.SOFT, soft), (patchae.HARD, 1.0 * (soft > 0))):
        blobs = torch.cat([patchae.irregular_blob(5, 5, softness) for _ in range(800)])
        np.testing.assert_allclose(blobs.median(dim=0).values, expected, atol=0.05)
        blobs = torch.cat([patchae.irregular_blob(40, 60, softness) for _ in range(100)])
        assert (blobs - blobs.flip(1)).abs().amax(dim=(1, 2)).min() > 0.1
        assert (blobs - blobs.flip(2)).abs().amax(dim=(1, 2)).min() > 0.1
        assert blobs[:, [0, -1]].max() == blobs[:, :, [0, -1]].max() == 0 == blobs.min()
        steps = max(blobs.diff(dim=1).max().item(), blobs.diff(dim=2).max().item())
        assert steps < 0.45 if softness == patchae.SOFT else steps > 0.6


def test_paste_is_a_flipped_and_recoloured_part_from_anywhere():
    """Red rises to the right, green downwards: in a paste one of them falls, and their ends say
    where it comes from, whatever the gain: of the columns 1 + x, for instance, 3g to 20g is 3 to
    20.

    Each colour has its own gain of 0.6 to 1.4. What becomes brighter than white is white.
    """
    y, x = torch.meshgrid(1 + torch.arange(24.), 1 + torch.arange(32.), indexing="ij")
    other = torch.stack([x / 80, y / 80, torch.full_like(x, 0.5)])
    places, turned, gains, whole = set(), [], [], []
    for _ in range(400):
        (red, green, blue), alpha = patchae.altered_paste(other, 18, 26)
        ends = (green[0, 0].item(), green[-1, 0].item()), (red[0, 0].item(), red[0, -1].item())
        turned.append(tuple(first < last for first, last in ends))
        first = [min(pair) / (max(pair) - min(pair)) * n for pair, n in zip(ends, (17, 25))]
        places.add(tuple(round(place) - 1 for place in first))
        own = [80 * (max(pair) - min(pair)) / n for pair, n in zip(ends, (17, 25))]
        gains.append((*own, 2 * blue.mean().item()))
        assert alpha[:, [0, -1]].max() == 0 == alpha.min() and alpha.max() == 1
        whole.append(((alpha == 1).sum() / (alpha > 0).sum()).item())
    assert places == {(top, left) for top in range(7) for left in range(7)}
    assert 160 < turned.count((True, False)) == 400 - turned.count((False, True)) < 240
    assert np.median(whole) > 0.6  # of a soft rim it would be 0.1
    assert all(levels(gain, 0.6, 1.4).min() > 20 for gain in np.transpose(gains))
    assert abs(np.corrcoef(np.transpose(gains))[~np.eye(3, dtype=bool)]).max() < 0.2
    assert max(patchae.altered_paste(other / other, 9, 9)[0].max() for _ in range(9)) == 1


def test_scratches_are_thin_soft_bent_and_of_one_colour():
    """The curve is softened over 3 × 3 pixels, so that its levels are ninths of its opacity.

    All nine if it is three pixels wide; only up to seven if it is one wide. No gap: it occupies
    neighbouring rows and columns. It would be straight if its pixels spread in one direction only.
    """
    opacities, colours, spreads, areas, middles = [], [], [], [], []
    for _ in range(300):
        colour, alpha = patchae.scratch(None, 61, 61)
        ninths = alpha / alpha[alpha > 0].min()
        if ninths.max() > 8.9:
            assert (ninths - ninths.round()).abs().max() < 1e-3
            opacities.append(alpha.max().item())
        for axis in (1, 2):
            seen = np.flatnonzero(alpha[0].amax(dim=axis - 1))
            assert seen[-1] - seen[0] == len(seen) - 1
        places = alpha[0].nonzero().float()
        middles.append(places.mean().item())
        across = torch.linalg.svdvals(places - places.mean(dim=0))[1].item()
        spreads.append(across / len(places)**0.5)
        areas.append((alpha > 0).float().mean().item())
        colours.append(colour.flatten().tolist())
    assert 100 < len(opacities) < 200 and levels(opacities, 0.3, 1).min() > 4
    assert 0.03 < np.mean(areas) < 0.08 and np.mean(np.greater(spreads, 3)) > 0.3
    assert abs(np.mean(middles) - 30) < 2  # as often on one side of the box as on the other
    assert all(levels(colour, 0, 1).min() > 15 for colour in np.transpose(colours))
    assert abs(np.corrcoef(np.transpose(colours))[~np.eye(3, dtype=bool)]).max() < 0.2


def test_stains_go_from_fine_noise_to_one_colour_and_from_faint_to_opaque():
    """Neighbouring pixels of uniform noise differ by 1/3 on average; between cells of 4 pixels, the
    finest grain, by 0.056, and by 0 where one cell covers the box. Each channel has its own noise.

    A hard blob is flat in its middle, and there α is the opacity. A soft one is not.
    """
    stains = [patchae.stain(None, 30, 30) for _ in range(300)]
    paints = torch.stack([paint.expand(3, 30, 30) for paint, _ in stains])
    rough = paints.diff(dim=3).abs().mean(dim=(1, 2, 3))
    assert 0.05 < rough.max() < 0.08 and 0.1 < (rough < 1e-6).float().mean() < 0.5
    assert paints.std(dim=1).mean() > 0.1 and levels(paints.flatten().numpy(), 0, 1).min() > 1000
    hard = [alpha.max().item() for _, alpha in stains
            if (alpha == alpha.max()).float().sum() > 0.5 * (alpha > 0).float().sum()]
    assert 100 < len(hard) < 200 and levels(hard, 0.3, 1).min() > 4
    assert all(alpha[:, [0, -1]].max() == 0 <= alpha.min() for _, alpha in stains)
