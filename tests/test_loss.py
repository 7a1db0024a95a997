"""The losses that steps return: floats that carry utilities, read from a device or yet to be."""

import copy
import json
import math
import operator
import pickle
import statistics
import struct
from fractions import Fraction

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD

from pyro_symeq import Game, GameLoss, Player, SymmetricLoss
from pyro_symeq.loss import PendingLoss, loss_of


class Seen(torch.Tensor):
    """A tensor that counts what is done with it."""

    count = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Seen.count += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def start_counting():
    Seen.count = 0


def seen(number):
    return torch.tensor(number).as_subclass(Seen)


def pending(decoder=-7.0, encoder=-2.0):
    """A loss of 9 that nobody has read."""
    utilities = {"decoder": seen(decoder), "encoder": seen(encoder)}
    Seen.count = 0
    return PendingLoss(SymmetricLoss, utilities)


def pending_game(*utilities):
    return PendingLoss(GameLoss, {f"player {i}": seen(u) for i, u in enumerate(utilities)})


LOSSES = {
    "SymmetricLoss": lambda: SymmetricLoss(-7.0, -2.0),
    "GameLoss": lambda: GameLoss({"a": -7.0, "b": -3.0, "c": 1.0}),
    "pending SymmetricLoss": pending,
    "pending GameLoss": lambda: pending_game(-7.0, -3.0, 1.0),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]()


# What a user does with a float.

USES = {
    "float": float,
    "int": int,
    "complex": complex,
    "bool": bool,
    "str": str,
    "repr": repr,
    "hash": hash,
    "round": round,
    "round to digits": lambda x: round(x / 7, 2),
    "round itself": lambda x: round(x, 1),
    "format": lambda x: f"{x}|{x:.2f}|{x:>12}|{x:g}|{x!r}|{x!s}",
    "str.format": lambda x: "{:.1e} {}".format(x, x),  # noqa: UP032
    "percent": lambda x: "%s %r %d %i %.2f %5.1f %g %e" % ((x,) * 8),  # noqa: UP031
    "negative": lambda x: (-x, +x, abs(-x)),
    "with a number": lambda x: (x + 1, x - 1, x * 2, x / 2, x // 2, x % 4, x**2, divmod(x, 4)),
    "of a number": lambda x: (1 + x, 1 - x, 2 * x, 20 / x, 20 // x, 20 % x, 2**x, divmod(20, x)),
    "with a float": lambda x: (x + 0.5, x - 0.5, x * 0.5, x / 0.5, x // 0.5, x % 0.5, x**0.5),
    "of a float": lambda x: (0.5 + x, 0.5 - x, 0.5 * x, 0.5 / x, 0.5 // x, 0.5 % x, 0.5**x),
    "with itself": lambda x: (x + x, x - x, x * x, x / x, x // x, x % x, divmod(x, x)),
    "with NumPy": lambda x: (x + np.float64(1), x * np.float32(2), x / np.int64(3)),
    "of NumPy": lambda x: (
        np.float64(1) + x,
        np.float32(2) * x,
        np.float64(3) / x,
        np.int64(3) - x,
    ),
    "with fractions": lambda x: (Fraction(1, 2) + x, x * Fraction(1, 2), Fraction(x)),
    "power": lambda x: (pow(x, 2), pow(x, -1), pow(2, x)),
    "compared": lambda x: (x < 10, x <= 9, x > 8, x >= 9, x == 9, x != 9, x == 9.5),
    "comparing": lambda x: (10 > x, 9 >= x, 8 < x, 9 <= x, 9 == x, 9 != x, 9.5 == x),
    "compared with itself": lambda x: (x < x, x <= x, x == x, x != x),  # noqa: PLR0124
    "compared with NumPy": lambda x: (x < np.float64(10), np.float64(10) < x, np.float64(9) == x),
    "compared with others": lambda x: (x == "9", x != None, x in ("a", 9.0)),  # noqa: E711
    "sum": lambda x: (sum([x, x]), sum([1.0, x]), sum([x, 1]), sum([x], 0.5)),
    "in place": lambda x: (operator.iadd(1.0, x), operator.iadd(x, 1.0), operator.imul(x, 2)),
    "max and min": lambda x: (max(x, 1.0), min(1.0, x), max([1.0, x, 10.0]), min(x, math.inf)),
    "sorted": lambda x: sorted([10.0, x, 1.0, x]),
    "dict key": lambda x: ({9.0: "nine"}[x], x in {9.0}),
    "math": lambda x: (math.sqrt(x), math.log(x), math.exp(x), math.floor(x), math.ceil(x)),
    "math's predicates": lambda x: (math.isfinite(x), math.isnan(x), math.isclose(x, 9)),
    "math's sums": lambda x: (
        math.fsum([x, x]),
        math.prod([x, x]),
        math.hypot(x, x),
        math.trunc(x),
    ),
    "methods": lambda x: (x.is_integer(), x.as_integer_ratio(), x.hex(), x.real, x.imag),
    "statistics": lambda x: (statistics.fmean([x, 1.0]), statistics.median([x, 1.0, 10.0])),
    "struct": lambda x: struct.pack("d", x),
    "json, given a float": lambda x: json.dumps({"loss": float(x)}),
    "NumPy, given a dtype": lambda x: np.asarray([x, 1.0], dtype=float).tolist(),
    "NumPy's float": np.float64,
    "NumPy's mean": lambda x: float(np.mean([x, 1.0])),
    "NumPy's std": lambda x: np.std(np.array([x, 1.0], dtype=np.float32)),
    "NumPy's order": lambda x: (np.argmin([x, 1.0]), np.min([x, 1.0]), np.sort([x, 1.0])[0]),
    "NumPy's isscalar": np.isscalar,
    "a place in an array": lambda x: operator.setitem(np.zeros(2), 0, x),
    "torch, given a float": lambda x: torch.tensor(float(x)).item(),
    "pytest.approx": lambda x: (x == pytest.approx(9), 9 == pytest.approx(x)),
}


@pytest.mark.parametrize("use", USES)
def test_a_loss_passes_for_a_float(use, loss):
    assert USES[use](loss) == USES[use](9.0)


MORE = {
    "mean": lambda x: statistics.mean([x, x]),
    "mean with others": lambda x: statistics.mean([x, 1.0]),
    "standard deviation": lambda x: statistics.pstdev([x, 1.0]),
}


@pytest.mark.parametrize("use", MORE)
def test_a_loss_passes_for_a_float_in_statistics(use, loss):
    if type(loss) is PendingLoss:  # whose type the statistics module doesn't know
        with pytest.raises(TypeError, match="PendingLoss"):
            MORE[use](loss)
        loss = float(loss)
    assert MORE[use](loss) == MORE[use](9.0)


TAKEN_APART = {
    "torch.tensor": torch.tensor,
    "torch.tensor of a list": lambda x: torch.tensor([x, 1.0]),
    "tensor + loss": lambda x: torch.ones(2) + x,
    "loss + tensor": lambda x: x + torch.ones(2),
    "tensor * loss": lambda x: torch.ones(2) * x,
    "loss / tensor": lambda x: x / torch.ones(2),
    "loss - tensor": lambda x: x - torch.ones(2),
    "tensor < loss": lambda x: torch.ones(2) < x,
    "loss < tensor": lambda x: x < torch.ones(2),
    "tensor == loss": lambda x: torch.full((2,), 9.0) == x,
    "loss == tensor": lambda x: x == torch.full((2,), 9.0),
    "loss != tensor": lambda x: x != torch.full((2,), 9.0),
    "torch.full": lambda x: torch.full((2,), x),
    "fill_": lambda x: torch.ones(2).fill_(x),
    "clamp": lambda x: torch.full((2,), 10.0).clamp(max=x),
    "Normal": lambda x: dist.Normal(x, 1.0).loc,
    "np.array": lambda x: np.array([x, 1.0]),
    "array + loss": lambda x: np.ones(2) + x,
    "loss * array": lambda x: x * np.ones(2),
    "loss == array": lambda x: x == np.array([9.0, 1.0]),
    "np.isfinite": lambda x: np.isfinite([x, 1.0]),
    "np.log": np.log,
    "np.cumsum": lambda x: np.cumsum([x, x]),
    "json": json.dumps,
    "complex": lambda x: x + 1j,
    "unbound": lambda x: float.hex(x),
}


@pytest.mark.parametrize("use", TAKEN_APART)
def test_what_takes_floats_apart_fails_aloud_or_does_right(use, loss):
    expected = TAKEN_APART[use](9.0)
    try:
        result = TAKEN_APART[use](loss)
    except (TypeError, RuntimeError):
        assert type(loss) is PendingLoss
        return
    if isinstance(expected, (torch.Tensor, np.ndarray)):
        assert type(result) is type(expected)
        assert result.tolist() == expected.tolist()
    else:
        assert result == expected


def test_wrong_uses_fail_as_those_of_floats(loss):
    with pytest.raises(TypeError, match="unsupported operand"):
        loss + "1"
    with pytest.raises(TypeError, match="can only concatenate list"):
        [1] + loss
    with pytest.raises(TypeError, match="not supported between"):
        loss < "1"  # noqa: B015
    with pytest.raises(TypeError):
        [0.0][loss]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loss.nothing
    with pytest.raises(ZeroDivisionError):
        loss / 0


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv,
                                operator.floordiv, operator.mod, operator.pow, divmod,
                                operator.lt, operator.le, operator.gt, operator.ge,
                                operator.eq, operator.ne])  # fmt: skip
def test_pending_losses_go_with_each_other_and_with_read_ones(op):
    expected = op(9.0, 5.0)
    assert op(pending(), pending(-4.0, -1.0)) == expected
    assert op(pending(), SymmetricLoss(-4.0, -1.0)) == expected
    assert op(SymmetricLoss(-7.0, -2.0), pending(-4.0, -1.0)) == expected
    assert op(pending(), pending_game(-4.0, -1.0)) == expected
    assert op(9.0, pending(-4.0, -1.0)) == expected


def test_losses_of_an_epoch_add_up():
    total = 0.0
    for _ in range(3):
        total += pending()
    assert total == 27.0
    assert sum([pending(), 1.0, pending_game(-1.0)]) == 11.0
    assert sorted([pending(), pending(-1.0, -1.0), 5.0])[0].decoder == -1.0
    assert max([pending(), pending(-1.0, -1.0)]).decoder == -7.0


# What a loss carries.


def test_a_loss_carries_the_utilities(loss):
    assert isinstance(loss, float)
    assert isinstance(loss, GameLoss)
    assert loss == -sum(loss.utilities.values())
    assert all(type(u) is float for u in loss.utilities.values())
    if isinstance(loss, SymmetricLoss):
        assert (loss.decoder, loss.encoder) == (-7.0, -2.0)
        assert list(loss.utilities) == ["decoder", "encoder"]
    else:
        assert not hasattr(loss, "decoder")


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: copy.deepcopy({"losses": [x]})["losses"][0],
        *(lambda x, k=k: pickle.loads(pickle.dumps(x, k)) for k in range(6)),
    ],
    ids=["copy", "deepcopy", "deepcopy within", *(f"pickle {k}" for k in range(6))],
)
def test_copies_are_read_losses(again, loss):
    other = again(loss)
    assert type(other) is loss.__class__
    assert (other, other.utilities) == (loss, loss.utilities)


def test_a_utility_of_any_dtype_is_read_exactly():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        number = torch.tensor(1 / 3, dtype=dtype)
        assert PendingLoss(GameLoss, {"a": number}).utilities == {"a": number.item()}
    mixed = {"a": torch.tensor(0.1, dtype=torch.float32), "b": torch.tensor(0.1).double()}
    assert PendingLoss(GameLoss, mixed).utilities == {n: u.item() for n, u in mixed.items()}


def test_a_loss_of_nobody_is_zero():
    assert GameLoss({}) == 0.0
    assert loss_of(GameLoss, {}, is_awaited=False).utilities == {}


# When a loss is read.

BLIND = {
    "isinstance": lambda x: isinstance(x, (float, SymmetricLoss)),
    "class": lambda x: x.__class__,
    "type": type,
    "identity": lambda x: x is x,  # noqa: PLR0124
    "list": lambda x: [x] * 3,
    "tuple": lambda x: (x, x) + (x,),
    "dict": lambda x: {"loss": x},
    "append": lambda x: [].append(x),
    "callable": callable,
    "is None": lambda x: x is None,
}


@pytest.mark.parametrize("act", BLIND)
def test_a_loss_is_not_read_before_somebody_looks(act):
    loss = pending()
    BLIND[act](loss)
    assert Seen.count == 0
    float(loss)
    assert Seen.count > 0


def test_a_loss_is_read_once():
    loss = pending()
    assert loss + loss == 18.0
    count = Seen.count
    assert (float(loss), loss.decoder, f"{loss:.1f}") == (9.0, -7.0, "9.0")
    assert Seen.count == count


def test_a_loss_of_a_device_is_not_read_unless_it_is_awaited():
    """The meta device has no numbers to read."""
    utilities = {"decoder": torch.zeros((), device="meta"), "encoder": torch.zeros(())}
    loss = loss_of(SymmetricLoss, utilities, is_awaited=False)
    assert isinstance(loss, SymmetricLoss)
    with pytest.raises((NotImplementedError, RuntimeError)):
        float(loss)
    with pytest.raises((NotImplementedError, RuntimeError)):
        loss_of(SymmetricLoss, utilities, is_awaited=True)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_a_loss_on_the_cpu_is_read_at_once(is_awaited):
    utility = torch.tensor(-7.0)
    loss = loss_of(SymmetricLoss, {"decoder": utility, "encoder": utility}, is_awaited)
    assert type(loss) is SymmetricLoss
    utility.zero_()
    assert loss == 14.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_players_on_several_devices_have_one_loss():
    utilities = {"a": torch.tensor(-7.0, device="cuda"), "b": torch.tensor(-2.0)}
    assert loss_of(GameLoss, utilities, is_awaited=False) == 9.0
    assert loss_of(GameLoss, utilities, is_awaited=True) == 9.0


def test_devices_without_double_precision_are_read_too(monkeypatch):
    """As Apple's, whose tensors refuse to become float64."""

    class Single(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.double, torch.Tensor.to) and "cpu" not in map(str, args):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return super().__torch_function__(func, types, args, kwargs or {})

    utilities = {"a": torch.tensor(-7.0, dtype=torch.float32).as_subclass(Single)}
    assert PendingLoss(GameLoss, utilities) == 7.0


@pytest.mark.parametrize("is_validated", [True, False])
def test_steps_return_losses_of_their_kind(is_validated, device):
    leaf = torch.zeros((), device=device, requires_grad=True)

    def program():
        pyro.sample("x", dist.Normal(pyro.param("loc", leaf), 1.0), obs=torch.ones_like(leaf))

    game = Game([Player("a", program, SGD({"lr": 0.1}), lambda play: play.log_prob("a"))])
    with pyro.validation_enabled(is_validated):
        losses = [game.step(), game.evaluate_loss(), game.step()]
    expected = [
        0.5 * d**2 + 0.5 * math.log(2 * math.pi) for d in (1.0, 0.9, 0.9)
    ]  # before each move, of a tenth of the way
    assert [float(loss) for loss in losses] == pytest.approx(expected)
    assert all(isinstance(loss, GameLoss) for loss in losses)
    assert [loss.utilities["a"] for loss in losses] == pytest.approx([-x for x in expected])


# Losses that are not finite.

LOOKS = {
    "float": float,
    "format": lambda x: f"{x:.1f}",
    "add": lambda x: x + 1,
    "radd": lambda x: sum([x]),
    "compare": lambda x: x < 1,
    "attribute": lambda x: x.decoder,
    "bool": bool,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "isfinite": math.isfinite,
    "hasattr": lambda x: hasattr(x, "decoder"),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_each_look_at_a_loss_that_is_not_finite_raises(number, look):
    loss = pending(decoder=number)
    for _ in range(3):
        with pytest.raises(ValueError, match="Expected finite utilities, got .*'encoder': -2.0"):
            LOOKS[look](loss)
    assert isinstance(loss, SymmetricLoss)


def test_utilities_that_cancel_are_not_finite_either():
    with pytest.raises(ValueError, match="Expected finite utilities"):
        float(pending(math.inf, -math.inf))
    with pytest.raises(ValueError, match="Expected finite utilities"):
        _ = pending_game(-1.0, math.nan).utilities
