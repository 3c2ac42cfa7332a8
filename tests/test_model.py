"""patchae.py: what an image becomes, one vector for one patch, memory, threshold, files, chance.

- The backbone is torchvision's, with mirrored borders. Its statistics never change.
- The decoder sees one vector. With the identity start R is Φ.
- M holds the vectors of all normal images, or a drawn part. The search holds one image at a time.
- The threshold is a quantile of the scores of normal images, each against all the others.
- The border of a normal image is as normal as its inside.
- The seed decides every random choice.
- A checkpoint holds all that scoring needs, replaces the old one in one step, and runs no code.
- Nothing needs what GPUs lack: numbers of 64 bits, adaptive pooling, channels_last.
"""
import ast
import copy
import dataclasses
import errno
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, distances, draw_images, make_model, random_states, seed_all, watch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patchae
import train
from patchae import PatchAE, UserError


def as_rows(vectors):
    """(B, C₃, H', W') to a numpy array (B, P, C₃)."""
    return vectors.detach().flatten(2).movedim(1, 2).numpy()


# ---- the backbone -------------------------------------------------------------------------------
@torch.no_grad()
def test_backbone_is_torchvisions_with_mirrored_borders():
    """Another route: in torchvision's network put a ReflectionPad2d before each convolution that
    would add zeros, and listen behind stages 1 and 3. The other backbones have four stages, too."""
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
    for name in patchae.BACKBONES:
        with torch.device("meta"):  # without a number being computed
            maps = patchae.make_backbone(name, (1, 2, 3, 4))(torch.zeros(1, 3, 64, 64))
        assert [one.shape[2:] for one in maps.values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@torch.no_grad()
def test_features_are_the_tempered_maps_of_the_normalised_image():
    """Without averaging Φ of two stages on the grid of the first, by numpy: the map of stage 1,
    each vector divided by the root of its length; then that of stage 2, interpolated. On a CPU the
    layout is channels_last, which is faster there."""
    model, image, layouts = make_model(stages=(1, 2), neighbourhood=1), torch.rand(2, 3, 64, 64), []
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    maps = [one.numpy() for one in model.backbone((image - mean) / std).values()]
    fine, coarse = (one / np.linalg.norm(one, axis=1, keepdims=True)**0.5 for one in maps)
    model.backbone.register_forward_pre_hook(lambda _, inputs: layouts.append(
        inputs[0].is_contiguous(memory_format=torch.channels_last)))
    features = model.features(image).numpy()
    np.testing.assert_allclose(features[:, :64], fine, rtol=1e-3, atol=1e-4)
    between = (coarse[:, :, 3:5, 3:5] * [[[[9, 3], [3, 1]]]]).sum(axis=(2, 3)) / 16
    np.testing.assert_allclose(features[:, 64:, 7, 7], between, rtol=1e-3, atol=1e-4)
    assert layouts == [True]


def test_weights_given_are_weights_used(tmp_path, monkeypatch):
    """Those of a state-dict file, also of one from a GPU; the encoder and the decoder are as the
    seed draws them anyhow. Of the published weights the first ones, which older papers used."""
    path = tmp_path / "own.pt"
    seed_all(7)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {name: value for name, value in state.items() if name[:6] not in ("layer3", "layer4")}
    torch.save(state, path)
    loads = Mock(side_effect=torch.load)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", loads)
        model = make_model(weights=str(path), start="random")
    assert loads.call_args.kwargs["map_location"] == "cpu"
    other = make_model(start="random")
    assert all(torch.equal(v, state[name]) for name, v in model.backbone.state_dict().items())
    assert torch.equal(model.encoder.W1.weight, other.encoder.W1.weight)
    assert torch.equal(model.decoder.V2.weight, other.decoder.V2.weight)
    del state["layer1.1.conv2.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"own\.pt.*resnet18.*layer1\.1\.conv2\.weight"):
        make_model(weights=str(path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("offline")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file in zip(patchae.BACKBONES, ("resnet18-f37072fd", "resnet50-0676ba61",
                                              "wide_resnet50_2-95faca4d",
                                              "wide_resnet101_2-32ee1156"), strict=True):
        with pytest.raises(UserError, match=f"models/{file}.pth.*offline.*{tmp_path}"):
            patchae.load_weights(None, name, "imagenet")


def test_training_mode_leaves_the_backbone_as_it_is(model):
    """With the statistics of a batch Φ of an image would depend on the others and on its defects.

    A deep copy of torchvision's backbones is in training mode, too."""
    image, state = torch.rand(2, 3, 64, 64), copy.deepcopy(model.state_dict())
    before = model.features(image)
    model.train()
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(one.features(image), before)
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# ---- what a run is made of ----------------------------------------------------------------------
class Recorder(TorchDispatchMode):
    """Inside, every operation of torch is written down: (its name, the tensors it makes)."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            return True  # mask.any(): the meta device knows no values
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation.name(), [
            leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]))
        return result

    def record(self, work):
        """The calls of work()."""
        self.calls = []
        with self:
            work()
        return self.calls


def test_a_default_run_needs_nothing_that_a_gpu_lacks():
    """Forward, backward and scoring at the default size, on the meta device: it computes nothing,
    and like a GPU it is no CPU.

    Apple's GPUs have no numbers of 64 bits, and adaptive pooling there refuses sides that do not
    divide. channels_last, the layout, gave wrong numbers or aborts on Apple's and NVIDIA's GPUs.
    """
    with torch.device("meta"):
        model = PatchAE(patchae.Config(finetune_backbone=True))
        image, mask = torch.zeros(2, 3, 384, 384), torch.zeros(2, 1, 384, 384, dtype=torch.bool)
        memory = [torch.zeros(1024, 1792)]
    calls = Recorder().record(lambda: (model.loss(image, mask).backward(), patchae.image_score(
        patchae.nearest_distance(model.represent(image).detach(), memory))))
    assert "aten::convolution_backward" in [name for name, _ in calls]
    for name, tensors in calls:
        assert "adaptive" not in name
        for one in tensors:
            assert one.dtype not in (torch.float64, torch.complex128), name
            assert one.dim() != 4 or one.is_contiguous() or not one.is_contiguous(
                memory_format=torch.channels_last), name


def test_the_search_holds_the_distances_to_one_normal_image():
    """B · P · P of them, however many normal images there are; with the same few operations for
    each, by matrix products, which are many times faster than exact differences."""
    def record(side, number):
        r, memory = torch.rand(2, 4, side, side), torch.rand(number, side**2, 4)
        calls = Recorder().record(lambda: patchae.nearest_distance(r, list(memory)))
        largest = max(one.numel() for _, tensors in calls for one in tensors)
        assert largest == 2 * side**4 and "aten::_cdist_forward" not in [name for name, _ in calls]
        return len(calls)

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
@pytest.mark.parametrize("options, channels", [({}, 64), ({"channels": 64}, 64), (
    {"start": "random"}, 64), ({"start": "random", "channels": 10}, 10)])
def test_start(options, channels):
    """As the identity R is exactly Φ, so that both are compared on equal terms; at random it may
    have any number of channels, and is not Φ. The decoder begins with grey, in as many pixels."""
    model, image = make_model(**options), torch.rand(2, 3, 64, 64)
    features, r = model.features(image), model.represent(image)
    assert r.shape == (2, channels, 16, 16)
    assert torch.equal(r, features) == ("start" not in options)
    assert patchae.unpatchify(model(image), 4).shape == image.shape
    assert model.decoder.V2.bias.unique().tolist() == [0.5] and abs(model(image).mean() - 0.5) < 0.1


# ---- chance -------------------------------------------------------------------------------------
def everything_drawn(monkeypatch, foreign, seed):
    """What a run draws, which begins in any state of the global generators."""
    seed_all(foreign)
    model = make_model(seed=seed, steps=8, memory_fraction=0.1, start="random")
    weights = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        calls = watch(patch, patchae, "add_defects")
        train.fit(model, draw_images(6, 3))
    (chosen, pasted), (defected, masks) = (map(torch.stack, zip(*one)) for one in zip(*calls))
    model.remember(draw_images(6, 3))
    return {"backbone": weights["backbone.conv1.weight"], "encoder": weights["encoder.W1.weight"],
            "decoder": weights["decoder.V2.weight"], "chosen": chosen, "pasted": pasted,
            "masks": masks, "defected": defected, "memory": torch.stack(model.memory),
            "trained": model.decoder.V2.weight.data, "scores": model.normal_scores}


def test_the_seed_decides_all_and_nothing_else_does(monkeypatch):
    """Two runs from different states of random, torch and numpy are equal; another seed differs in
    everything that is drawn."""
    first, again = (everything_drawn(monkeypatch, foreign, seed=0) for foreign in (1, 2))
    other = everything_drawn(monkeypatch, 1, seed=1)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name


# ---- the memory and the scores ------------------------------------------------------------------
@pytest.mark.parametrize("fraction, kept", [(0, 1), (0.1, 26), (1, 256)])
def test_memory_keeps_a_random_part_of_each_image(model, monkeypatch, fraction, kept):
    """⌈f · P⌉ vectors of each image, at least one, from places that the seed draws.

    Other places for each image, the same however the images come in batches.
    """
    model.images, places = draw_images(4, 3), {}
    r = as_rows(model.represent(model.images / 255))
    for seed, batch in ((0, 1), (0, 3), (1, 4)):
        model.config = dataclasses.replace(model.config, memory_fraction=fraction, seed=seed)
        monkeypatch.setattr(model, "batches", lambda images, _: (images / 255).split(batch))
        model.build_memory()
        near = [np.linalg.norm(own[:, None] - vectors.numpy(), axis=2)
                for own, vectors in zip(r, model.memory, strict=True)]
        assert max(one.min(axis=0).max() for one in near) < 1e-3
        places[seed, batch] = [one.argmin(axis=0).tolist() for one in near]
        assert {len(set(one)) for one in places[seed, batch]} == {kept}
    first, second, *_ = drawn = places[0, 1]
    assert drawn == places[0, 3] and (fraction == 1 or first != second and drawn != places[1, 4])
    assert min(map(min, drawn)) < 128 < max(map(max, drawn))


@pytest.mark.parametrize("fraction", [0.5, 1])
def test_threshold_is_the_quantile_of_the_scores_of_normal_images(model, monkeypatch, fraction):
    """Each is compared with all others, with a trained R, by brute force; of many images some,
    evenly spread. With the whole of M no image passes the backbone twice."""
    images = draw_images(7, 3)
    model.config = dataclasses.replace(model.config, memory_fraction=fraction)
    passed = watch(monkeypatch, model, "features")
    model.remember(images)
    assert len(passed) == 7 if fraction == 1 else 14
    r, scores = as_rows(model.represent(images / 255)), []
    for i in range(7):
        others = np.concatenate(model.memory[:i] + model.memory[i + 1:])
        scores.append(np.sort(distances(r[i], others).ravel())[-3:].mean())
    assert model.normal_scores.tolist() == pytest.approx(scores, rel=1e-3)
    assert model.threshold(0.5) == pytest.approx(np.quantile(scores, 0.5), rel=1e-3)
    assert model.threshold() == pytest.approx(np.quantile(scores, 0.99), rel=1e-3)
    assert patchae.MOST_SCORED == 100
    monkeypatch.setattr(patchae, "MOST_SCORED", 3)
    model.remember(images)
    assert model.normal_scores.tolist() == pytest.approx([scores[i] for i in (0, 2, 4)], rel=1e-3)


def test_what_cannot_be_compared_is_said(model):
    """No normal image, or one. A model that never remembered has no threshold."""
    images = draw_images(2, 3)
    for work in (lambda: model.anomaly_maps(images), model.threshold):
        with pytest.raises(UserError, match="call remember"):
            work()
    with pytest.raises(UserError, match="two different"):
        model.remember(images[:1])


def test_what_was_interrupted_is_built_anew(model, learned):
    """After Ctrl-C half-way, or a training that stopped, nothing old is compared with anything new:
    neither M nor the threshold, which would be those of other images or of another R."""
    def stop_half_way(items):
        yield from items[:3]
        raise KeyboardInterrupt

    model.remember(learned.images)
    with pytest.raises(KeyboardInterrupt):
        model.remember(learned.images[:5], progress=stop_half_way)
    assert not model.memory and not len(model.normal_scores)
    model.anomaly_maps(learned.images)
    assert len(model.memory) == 5
    model.remember(learned.images, "abcdef")
    states = random_states()
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, learned.images, Mock(side_effect=KeyboardInterrupt))
    assert random_states() == states
    assert not any(map(len, (model.images, model.names, model.memory, model.normal_scores)))


@pytest.mark.parametrize("change", [lambda images: images / 255, lambda images: images[0],
                                    lambda images: images[..., :32], lambda images: images[:0],
                                    lambda images: images.permute(0, 2, 3, 1),
                                    lambda images: images.to("meta")])
def test_images_of_another_form_are_refused(model, learned, change):
    """In [0, 1], a single one, of another size, none, colours last, on another device. What the
    model remembers is left as it is."""
    model.remember(learned.images)
    images, before = change(learned.images), model.normal_scores
    for work in (model.remember, model.anomaly_maps, lambda images: train.fit(model, images)):
        with pytest.raises(UserError, match=r"'N', 3, 64, 64\) of torch.uint8.*read_images"):
            work(images)
        assert model.memory and model.normal_scores is before


def test_anomaly_maps_by_another_route(model, learned, monkeypatch):
    """The distance to the nearest vector of a trained R; on a CPU an image at a time passes the
    backbone, once. Elsewhere eight; M goes where the model went."""
    images = draw_images(3, 4, seed=1)
    queries, normal = (as_rows(model.represent(one / 255)) for one in (images, learned.images))
    model.remember(learned.images)
    passed = watch(monkeypatch, model, "features")
    maps = model.anomaly_maps(images)
    assert [len(image) for (image,), _ in passed] == [1, 1, 1]
    np.testing.assert_allclose(maps, distances(queries, normal), rtol=2e-3, atol=1e-4)
    assert not any(one.requires_grad for one in (maps, *model.memory, model.normal_scores))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
        model.to("meta").anomaly_maps(draw_images(20, 3))
    assert {vectors.device.type for vectors in model.memory} == {"meta"}
    assert [len(image) for (image,), _ in passed[3:]] == [8, 8, 4]


def test_the_border_of_normal_images_is_as_normal_as_their_inside():
    """Scored against each other, 12 random textures are as far apart in the outermost ring of
    patches and in the corners as inside. With a plain mean over the neighbours that exist the
    corners are 1.3 times as far, with the sum divided by k² everywhere 0.75 times. A dark spot
    there is still the worst place."""
    model = make_model(stages=(1, 2))
    images, spotted = draw_images(12, 16), draw_images(2, 16, seed=1)
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
    for image, (i, j) in zip(spotted, [(14, 14), (0, 7)]):
        image[:, 4 * i:4 * i + 8, 4 * j:4 * j + 8] = 0
        y, x = divmod(model.anomaly_maps(image[None]).argmax().item(), 16)
        assert i - 1 <= y <= i + 2 and j - 1 <= x <= j + 2


# ---- files --------------------------------------------------------------------------------------
def test_a_saved_model_scores_as_before(model, learned, tmp_path, monkeypatch):
    """All options, weights, normal images, names and scores; the same maps. It may come from a GPU.

    The file of the weights that training started from is not needed for it.
    """
    model.config = dataclasses.replace(model.config, memory_fraction=0.3, seed=7,
                                       weights=Path("gone.pth"))
    images = learned.images.repeat(100, 1, 1, 1)[:6]  # of 7 MB
    model.remember(images, [Path(f"{letter}.png") for letter in "abüdef"])
    model.save(tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 4e6
    loads = Mock(side_effect=torch.load)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", loads)
        loaded = PatchAE.load(tmp_path / "part.pt")
    assert loads.call_args.kwargs["map_location"] == "cpu"
    assert loaded.config == dataclasses.replace(model.config, weights="gone.pth")
    assert loaded.names == ["a.png", "b.png", "ü.png", "d.png", "e.png", "f.png"]
    assert loaded.images.dtype == torch.uint8 and torch.equal(loaded.images, learned.images)
    assert torch.equal(loaded.normal_scores, model.normal_scores)
    assert all(torch.equal(loaded.state_dict()[name], v) for name, v in model.state_dict().items())
    for ours, theirs in zip(loaded.parameters(), model.parameters()):  # it can be trained further
        assert ours.requires_grad == theirs.requires_grad and ours.device == theirs.device
    maps = [one.anomaly_maps(draw_images(2, 4, seed=1)) for one in (loaded, model)]
    assert torch.equal(*maps)


def test_load_refuses_what_save_did_not_write(model, tmp_path):
    """Bytes of another kind, a file cut short, a few changed bytes, another version's options,
    weights that are missing: one error that names the file. A pickle may call any function while it
    is read; no code is run, neither of a checkpoint nor of weights."""
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    path = tmp_path / "part.pt"
    model.save(path)
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    changed = bytearray(whole)
    for i in np.random.randint(len(whole), size=8):
        changed[i] ^= 1
    for change in (b"", b"text", whole[:1000], whole[:-1000], changed, [1, 2], {"config": Call()},
                   {**content, "images": None},
                   {**content, "config": {**content["config"], "share": 1}},
                   {**content, "config": {**content["config"], "patch_size": 6}},
                   {**content, "model": {**content["model"], "extra": torch.zeros(1)}},
                   {key: content[key] for key in content if key != "names"}):
        if isinstance(change, (bytes, bytearray)):
            path.write_bytes(change)
        else:
            torch.save(change, path)
        with pytest.raises(UserError, match=r"part\.pt: not a checkpoint of this version"):
            PatchAE.load(path)
    torch.save({"conv1.weight": Call()}, path)
    with pytest.raises(UserError, match=r"part\.pt"):
        make_model(weights=path)
    assert not (tmp_path / "called").exists()


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


@pytest.mark.parametrize("there, asked, chosen", [
    ((), "auto", "cpu"), (("cuda",), "auto", "cuda"), (("mps",), "auto", "cpu"),
    (("mps", "cuda"), "mps", "mps"), (("cuda",), "cpu", "cpu")])
def test_the_device(monkeypatch, capsys, there, asked, chosen):
    """The one asked for; auto never takes an Apple GPU. It is said; cuDNN is exact."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    for name in ("allow_tf32", "deterministic"):  # whatever it was before
        monkeypatch.setattr(torch.backends.cudnn, name, name == "allow_tf32")
    assert patchae.choose_device(asked) == torch.device(chosen)
    assert capsys.readouterr().out == (
        f"device: {chosen} ({torch.get_num_threads()} CPU threads), torch {torch.__version__}\n")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32


# ---- the text of patchae.py ---------------------------------------------------------------------
def test_notation_table_and_code_agree():
    """Every name of the notation table is used in the scripts, and no two lines have the same. Each
    equation has its label in the docstring of one function."""
    text, *others = [(ROOT / f"{name}.py").read_text("utf-8")
                     for name in ("patchae", "train", "evaluate")]
    table = re.search(r"    symbol +name in code.*?\n(.*?)\"{3}", text, re.S)[1].splitlines()
    names = [name for line in table for name in re.split(", ?", line[13:28].strip()) if name]
    used = {getattr(node, field, None) for one in (text, *others) for node in ast.walk(
        ast.parse(one)) for field in ("id", "arg", "attr")}
    assert len(names) == len(set(names)) > 15 and set(names) <= used, set(names) - used
    labels = re.findall(r'def (\w+)\([^\n]*\n +"{3}\((E\d)\) ', text)
    assert labels == [("forward", "E1"), ("forward", "E2"), ("reconstruction_loss", "E3"),
                      ("nearest_distance", "E4"), ("image_score", "E5")]
