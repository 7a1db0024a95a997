"""Faces: what is read, the utilities of the programs by enumeration, and a run's figures."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pyro import poutine
from pyro.optim import SGD
from torch import nn
from torch.nn.functional import pad

from tests.montecarlo import assert_mean
from tests.processes import EXAMPLES, run_example

sys.path.append(str(EXAMPLES))

from data import DataError  # noqa: E402
from faces import celeba, lfw, textured_digits  # noqa: E402
from faces.game import sides, three_players  # noqa: E402
from faces.judging import Judge, squares  # noqa: E402
from faces.pairs import Pairs, load  # noqa: E402
from faces.programs import Classes, Networks, Programs, convolutional  # noqa: E402

# The programs: 2x2 images of one colour, 2 classes, a bit of shape and a bit of appearance.


class Affine(nn.Module):
    """An affine function of some maps and vectors, to bits or to maps with some channels."""

    def __init__(self, num_inputs, channels, is_map=True):
        super().__init__()
        self.layer = nn.Linear(num_inputs, 4 * channels if is_map else channels)
        self.shape = (channels, 2, 2) if is_map else (channels,)

    def forward(self, *inputs):
        return self.layer(torch.cat([x.flatten(1) for x in inputs], 1)).unflatten(1, self.shape)


def tiny():
    networks = Networks(
        shape=Affine(1, 2),
        evidence=Affine(4 + 1, 2),
        painter=Affine(8 + 1, 2),
        shape_code=Affine(8, 1, is_map=False),
        appearance_code=Affine(4 + 8, 1, is_map=False),
    )
    return Programs(networks, num_classes=2, shape_bits=1, appearance_bits=1)


X = torch.tensor([[[[0.3, -0.8], [0.1, 0.9]]]], dtype=torch.float64)
S = torch.tensor([[[1, 0], [0, 1]]])
BITS = [torch.tensor([[float(bit)]], dtype=torch.float64) for bit in (0, 1)]
SEGMENTATIONS = [torch.tensor(s).view(1, 2, 2) for s in itertools.product((0, 1), repeat=4)]


class ByHand:
    """The utilities with one Gibbs round, summed over s' and z and integrated over x'.

    Of the image by which a segmentation is found, the pixels that are not visible are painted.
    """

    def __init__(self, networks, visible, num_nodes=4):
        self.net = networks
        self.visible = visible
        nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        grids = (
            np.meshgrid(*[nodes] * 4, indexing="ij"),
            np.meshgrid(*[weights] * 4, indexing="ij"),
        )
        self.nodes = torch.tensor(np.stack(grids[0], -1)).view(-1, 1, 2, 2)
        weights = torch.tensor(np.stack(grids[1], -1)).view(-1, 4).prod(1)
        self.weights = weights / weights.sum()

    def one_hot(self, s):
        return 2**0.5 * torch.stack([s == 0, s == 1], 1).double()

    def log_s(self, s, x, z1, z2):
        logits = self.net.shape(2 * z1 - 1) + self.net.evidence(
            2 * x, (2 * z2 - 1).expand(len(x), 1)
        )
        index = s.expand(len(x), 2, 2)[:, None]
        return logits.log_softmax(1).gather(1, index).sum((1, 2, 3))

    def law_x(self, s, z2):
        out = self.net.painter(self.one_hot(s), 2 * z2 - 1)
        return out[:, :1], 0.05 + out[:, 1:].sigmoid()

    def log_x(self, x, s, z2):
        loc, scale = self.law_x(s, z2)
        log_p = (
            -(((x - loc) / scale) ** 2) / 2 - scale.log() - torch.tensor(2 * torch.pi).log() / 2
        )
        return log_p.sum((1, 2, 3))

    def log_z(self, z1, z2, x, s):
        def log_bit(logit, bit):
            return nn.functional.logsigmoid((2 * bit - 1) * logit)[:, 0]

        s = self.one_hot(s).expand(len(x), 2, 2, 2)
        code = self.net.appearance_code(torch.cat([2 * x, s], 1))
        return log_bit(self.net.shape_code(s), z1) + log_bit(code, z2)

    def images(self, s, z2):
        """Nodes for x', whose weights are those of the quadrature."""
        loc, scale = (part.detach() for part in self.law_x(s, z2))
        return loc + scale * self.nodes

    def completed(self, s, z2):
        """The images with painted pixels where they are hidden."""
        return torch.where(self.visible, X, self.images(s, z2))

    def shaped(self, z1):
        """Segmentations that the shape alone tells, with their probabilities."""
        log_p = self.net.shape(2 * z1 - 1).log_softmax(1)
        for s in SEGMENTATIONS:
            yield log_p.gather(1, s[:, None]).sum().exp().detach(), s

    def found(self):
        """Segmentations and bits that a round of the chain finds, with their probabilities."""
        for z1, z2 in itertools.product(BITS, BITS):
            for p, first in self.shaped(z1):
                x = self.completed(first, z2)
                for s in SEGMENTATIONS:
                    weights = self.weights * self.log_s(s, x, z1, z2).exp()
                    for again in itertools.product(BITS, BITS):
                        q = weights @ self.log_z(*again, x, s).exp()
                        yield (p * q / 4).detach(), s, again

    def encoded(self, s=S):
        for z1, z2 in itertools.product(BITS, BITS):
            yield self.log_z(z1, z2, X, s).exp().detach(), z1, z2

    def segmented(self, z1, z2):
        for s in SEGMENTATIONS:
            yield self.log_s(s, X, z1, z2).exp().detach(), s

    def utilities(self):
        u = {"s": 0.0, "x": 0.0, "z1, z2": 0.0}
        for weight, z1, z2 in self.encoded():
            redrawn = self.log_s(S, self.images(S, z2), z1, z2)
            u["s"] = u["s"] + weight * (self.log_s(S, X, z1, z2) + self.weights @ redrawn)
            u["x"] = u["x"] + weight * self.log_x(X, S, z2)
            for p, s in self.segmented(z1, z2):
                u["x"] = u["x"] + weight * p * self.log_x(X, s, z2)
        for p, s, (z1, z2) in self.found():
            scored = self.log_s(S, self.completed(s, z2), z1, z2)
            u["s"] = u["s"] + p * (self.weights @ scored)
        for z1, z2 in itertools.product(BITS, BITS):
            x_first = self.images(S, z2)
            for s in SEGMENTATIONS:
                weights = self.weights * self.log_s(s, x_first, z1, z2).exp().detach()
                u["z1, z2"] = u["z1, z2"] + weights @ self.log_z(z1, z2, x_first, s) / 8
            for p, s in self.segmented(z1, z2):
                log_q = self.log_z(z1, z2, self.images(s, z2), s)
                u["z1, z2"] = u["z1, z2"] + p * (self.weights @ log_q) / 8
        return u


OWN = {"s": ("shape", "evidence"), "x": ("painter",), "z1, z2": ("shape_code", "appearance_code")}


@pytest.mark.parametrize(
    ("player", "visible"),
    [
        ("s", [[1, 1], [1, 1]]),
        ("s", [[1, 0], [1, 1]]),
        ("x", [[1, 1], [1, 1]]),
        ("z1, z2", [[1, 1], [1, 1]]),
    ],
)
def test_utilities_are_those_of_the_formulas(
    player, visible, monkeypatch, num_games=100, num_rows=20
):
    programs = tiny()
    named = dict(programs.networks.named_parameters())
    visible = torch.tensor([[visible]]).bool()
    monkeypatch.setattr("faces.game.sides", lambda _: visible)
    utility = ByHand(programs.networks, visible).utilities()[player]
    expected = dict(
        zip(named, torch.autograd.grad(utility, named.values(), allow_unused=True), strict=True)
    )
    # A step of size 1 / rows along the gradient is the mean gradient over the rows
    optims = dict.fromkeys(OWN, SGD({"lr": 1 / num_rows}))
    game = three_players(programs.conditionals, optims, num_rounds=1)
    data = {"x": X.expand(num_rows, -1, -1, -1), "s": S.expand(num_rows, -1, -1)}
    game.evaluate_loss(**data)
    before = {name: value.detach().clone() for name, value in named.items()}
    moves = {name: [] for name in named}
    for _ in range(num_games):
        game.respond(player, **data)
        for name, value in named.items():
            moves[name].append((value - before[name]).detach())
            value.data.copy_(before[name])
    for name, each in moves.items():
        if name.split(".")[0] in OWN[player]:
            assert_mean(torch.stack(each), expected[name])
        else:
            assert not torch.stack(each).any()


def test_of_every_other_image_a_side_is_hidden(device):
    x = torch.zeros(4000, 3, 16, 16, device=device)
    visible = sides(x)
    assert visible.shape == (4000, 1, 16, 16)
    assert visible[::2].all()
    part = visible[1::2].double().mean((1, 2, 3)).cpu()
    assert 0.3 < part.min() and part.max() <= 1
    assert 0.6 < part.mean() < 0.9
    # Each side is hidden as often as the other
    left_out = (~visible[1::2, 0]).double().mean(0).cpu()
    torch.testing.assert_close(left_out, left_out.flip(0, 1), rtol=0.3, atol=0.02)


def test_images_alone_say_nothing_to_who_segments():
    programs = tiny()
    optims = dict.fromkeys(OWN, SGD({"lr": 0.1}))
    game = three_players(programs.conditionals, optims, num_rounds=1)
    utilities = game.evaluate_loss(x=X.expand(5, -1, -1, -1)).utilities
    assert utilities["s"] == 0 and utilities["x"] < 0 and utilities["z1, z2"] < 0


def test_evidence_is_nothing_at_first():
    programs = Programs(convolutional(32, 3, 5, 7, width=2), 3, 5, 7)
    x, z1, z2 = torch.randn(4, 3, 32, 32), torch.rand(4, 5).round(), torch.rand(4, 7).round()
    trace = poutine.trace(programs.segment).get_trace(x, z1, z2)
    logits = programs.shape(z1).log_softmax(1).movedim(1, -1)
    assert torch.allclose(trace.nodes["s"]["fn"].base_dist.logits, logits)


def test_classes_are_drawn_as_often_as_they_should():
    law = Classes(logits=torch.randn(2, 3))
    draws = nn.functional.one_hot(law.sample((20_000,)), 3).double()
    assert_mean(draws, law.probs)


# The data sets.


def write_lfw(root, **changes):
    """Files of two pairs for training and one held out, of which the first is changed."""
    folder = root / lfw.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for file, number in (("val.npz", 1), ("train.npz", 2)):
        arrays = {
            "images": generator.integers(0, 256, (number, 64, 64, 3), dtype=np.uint8),
            "masks": generator.integers(0, 3, (number, 64, 64), dtype=np.uint8),
        }
        np.savez(folder / file, **(arrays | changes if number == 2 else arrays))
    return arrays


def write_celeba(root, numbers=range(3)):
    """Grey images whose masks are an upper half of hair, a square of skin in it, and a lower lip."""
    images, masks = root / celeba.FOLDER / celeba.IMAGES, root / celeba.FOLDER / celeba.MASKS
    images.mkdir(parents=True)
    for number in numbers:
        Image.new("RGB", (128, 128), (10 * number, 100, 200)).save(images / f"{number}.jpg")
        folder = masks / str(number // celeba.PER_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        boxes = {"hair": (0, 0, 128, 64), "skin": (32, 32, 96, 96), "l_lip": (0, 120, 8, 128)}
        for part, box in boxes.items():
            mask = Image.new("RGB", (128, 128))
            mask.paste((255, 255, 255), box)
            mask.save(folder / f"{number:05d}_{part}.png")


def test_labelled_faces_are_read(tmp_path):
    arrays = write_lfw(tmp_path)
    splits = load("lfw", tmp_path, tmp_path)
    assert splits.class_names == ("background", "skin", "hair")
    assert splits.training.x.shape == (2, 3, 64, 64) and splits.held_out.s.shape == (1, 64, 64)
    light = (splits.training.x + 1) * 127.5
    assert torch.equal(light.round().byte().permute(0, 2, 3, 1), torch.tensor(arrays["images"]))
    assert torch.equal(splits.training.s, torch.tensor(arrays["masks"]).long())


def test_parts_of_faces_are_merged(tmp_path):
    write_celeba(tmp_path, numbers=[0, 7, 2001])
    splits = load("celeba", tmp_path, tmp_path)
    assert len(splits.training) == 2 and len(splits.held_out) == 1
    expected = torch.zeros(64, 64, dtype=torch.long)
    expected[16:48, 16:48] = celeba.CLASS_NAMES.index("skin")
    expected[:32] = celeba.CLASS_NAMES.index("hair")  # hair lies above skin
    expected[60:, :4] = celeba.CLASS_NAMES.index("l_lip")
    assert all(torch.equal(s, expected) for s in (*splits.training.s, *splits.held_out.s))
    light = ((splits.training.x + 1) * 127.5).mean((2, 3))
    expected = torch.tensor([[0.0, 100, 200], [70, 100, 200]])
    assert torch.allclose(light, expected, atol=4)  # JPEG


def test_digits_are_free_of_persons_and_always_the_same(monkeypatch):
    ink = torch.zeros(3, 1, 28, 28)
    ink[:, :, 4:24, 12:16] = 1
    images, masks = textured_digits._made(ink, torch.Generator().manual_seed(0))
    again = textured_digits._made(ink, torch.Generator().manual_seed(0))
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert images.shape == (3, 3, 32, 32) and masks.unique().tolist() == [0, 1, 2]
    # A shadow is its digit, moved to the right and down by 0.1 of half the side
    digit = masks == 2
    moved = pad(digit, (2, 0, 2, 0))[:, :32, :32] & ~digit
    assert ((masks == 1) & moved).sum() > 0.6 * moved.sum()


def test_prepared_tensors_are_kept(tmp_path, monkeypatch):
    write_lfw(tmp_path)
    folder = tmp_path / "kept"
    first = load("lfw", tmp_path, folder)
    with monkeypatch.context() as patch:
        patch.setattr(lfw, "read", None)
        assert torch.equal(load("lfw", tmp_path, folder).training.x, first.training.x)
    write_lfw(tmp_path, images=np.zeros((2, 64, 64, 3), np.uint8))
    assert (load("lfw", tmp_path, folder).training.x == -1).all()  # the source has changed
    (path,) = folder.iterdir()
    content = torch.load(path)
    content["parts"]["training masks"][0, 0, 0] += 1
    torch.save(content, path)
    with pytest.raises(DataError, match="lfw.pairs.pt is damaged. Remove it"):
        load("lfw", tmp_path, folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="lfw.pairs.pt is damaged. Remove it"):
        load("lfw", tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 32, 32, 3), np.uint8)}, r"images \(N, 64, 64, 3\).*\(2, 32, 32"),
        ({"masks": np.zeros((3, 64, 64), np.uint8)}, r"got .*\(3, 64, 64\)"),
        ({"masks": np.zeros((2, 64, 64))}, "float64"),
        ({"masks": np.full((2, 64, 64), 3, np.uint8)}, "classes 0 to 2, got 3"),
        ({"images": np.array([None])}, "train.npz is damaged"),
    ],
)
def test_other_arrays_are_refused(tmp_path, changes, message):
    write_lfw(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load("lfw", tmp_path, tmp_path)


def test_missing_and_damaged_files(tmp_path):
    for name, folder in (("lfw", "lfw_part_labels"), ("celeba", "CelebA-HQ-img")):
        with pytest.raises(DataError, match=f"{folder}.*--data-root"):
            load(name, tmp_path, tmp_path)
    write_lfw(tmp_path)
    (tmp_path / lfw.FOLDER / "train.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(DataError, match="train.npz is damaged .*Remove it and get it again"):
        load("lfw", tmp_path, tmp_path)
    write_celeba(tmp_path)
    images, masks = (tmp_path / celeba.FOLDER / name for name in (celeba.IMAGES, celeba.MASKS))
    damaged = masks / "0" / "00001_hair.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match="00001_hair.png is damaged"):
        load("celeba", tmp_path, tmp_path)
    for path in masks.glob("0/00001_*"):
        path.unlink()
    with pytest.raises(DataError, match="Image 1 has no masks: .*00001_skin.png"):
        load("celeba", tmp_path, tmp_path)
    (images / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="0.jpg is damaged"):
        load("celeba", tmp_path, tmp_path)


# What is asked, and a whole run.


def test_squares_hide_a_quarter():
    visible = squares(20, 16, seed=1)
    assert visible.shape == (20, 1, 16, 16)
    assert (~visible).sum((1, 2, 3)).tolist() == [64] * 20
    assert ((~visible).any(2).sum(2) == 8).all() and ((~visible).any(3).sum(2) == 8).all()
    assert len({tuple(v.flatten().tolist()) for v in visible}) > 10


def test_chains_keep_what_is_seen():
    programs = Programs(convolutional(16, 3, 5, 7, width=2), 3, 5, 7)
    pairs = Pairs(torch.rand(3, 3, 16, 16) - 0.5, torch.randint(3, (3, 16, 16)))
    judge, visible = Judge(programs), squares(3, 16)
    seen = visible.expand_as(pairs.x)
    found = judge.segmented(pairs.x, visible, num_rounds=10)
    assert torch.equal(found.x[seen], pairs.x[seen]) and found.s.shape == (3, 16, 16)
    assert not torch.isclose(found.x[~seen], pairs.x[~seen]).any()
    changed = torch.where(visible, pairs.x, 5.0)  # nobody looks at what is hidden
    torch.manual_seed(0)
    one = judge.segmented(pairs.x, visible, num_rounds=10)
    torch.manual_seed(0)
    other = judge.segmented(changed, visible, num_rounds=10)
    assert torch.equal(one.x, other.x) and torch.equal(one.s, other.s)
    assert torch.equal(judge.segmented(pairs.x, None, num_rounds=3).x, pairs.x)


def run_three_players(root, *more):
    options = ["--data", "lfw", "--data-root", root, "--preset", "smoke", "--out", root]
    result = run_example("three_players.py", *options, *more)
    assert result.returncode == 0, result.stderr


def record(root, run):
    return json.loads((root / f"three-players-lfw-{run}-smoke-0.json").read_text())


def test_a_run_leaves_figures_and_pictures_and_goes_on_from_any_phase(tmp_path):
    write_lfw(tmp_path)
    run_three_players(tmp_path, "--labelled", "0.5")
    first = record(tmp_path, "game-0.5")
    assert list(first["seconds"]) == ["shapes", "appearance", "game", "evaluation"]
    for split in ("training", "held-out"):
        assert 0 < first["figures"][f"accuracy/{split}"] < 1
        assert 0 < first["figures"][f"accuracy/{split}, hidden squares"] < 1
    assert first["figures"]["accuracy/held-out, commonest class"] > 0.3
    stem = "three-players-lfw-game-0.5-smoke-0"
    for name in ("appearances", "pairs", "completions"):
        assert (tmp_path / f"{stem}-{name}.png").stat().st_size > 5000
    (tmp_path / f"{stem}-game.pt").unlink()
    run_three_players(tmp_path, "--labelled", "0.5", "--resume")
    assert record(tmp_path, "game-0.5")["figures"] == first["figures"]


def test_the_yardstick_leaves_figures(tmp_path):
    write_lfw(tmp_path)
    run_three_players(tmp_path, "--method", "supervised")
    found = record(tmp_path, "supervised-1.0")
    assert list(found["seconds"]) == ["yardstick", "evaluation"]
    assert 0 < found["figures"]["accuracy/held-out, hidden squares"] < 1
