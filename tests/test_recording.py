"""Recordings of functions of tensors."""

import random

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from pyro_symeq.operations import CannotRecord
from pyro_symeq.recording import _is_rounded, record


def seeded(function, *args):
    pyro.set_rng_seed(3)
    return function(*args), torch.get_rng_state()


def assert_replays(function, *inputs, others=None):
    """The recording does what the function does, on these inputs and on others."""
    recording = record(function, list(inputs))
    for args in (inputs, *(others or [])):
        expected, end = seeded(function, *args)
        seen, other_end = seeded(recording, *args)
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(end, other_end)
        assert not any(x.requires_grad for x in seen)
    return recording


WEIGHT = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

FUNCTIONS = {
    "arithmetic": lambda x: [x * 2 + 1, x.sum()],
    "draws": lambda x: [x + torch.randn_like(x), torch.rand(3), torch.randint(9, (2,))],
    "draws that nobody uses": lambda x: [x * 2] if torch.rand(3) is None else [x],
    "constants": lambda x: [x @ WEIGHT, WEIGHT + 1],
    "an input itself": lambda x: [x],
    "a constant itself": lambda x: [WEIGHT],
    "views": lambda x: [x.T.reshape(-1)[::2], x[:, None].expand(3, 2, 3).sum(1)],
    "in place": lambda x: [x.clone().add_(1).mul_(x), torch.zeros(3).add_(x[0])],
    "small tensors from Python": lambda x: [x + torch.tensor([1.0, 2, 3]), torch.tensor(2.0) * x],
    "without inputs": None,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_recording_does_what_the_function_does(name):
    if name == "without inputs":
        assert_replays(lambda: [torch.randn(3), WEIGHT * 2])
        return
    assert_replays(FUNCTIONS[name], torch.randn(3, 3), others=[(torch.randn(3, 3),)])


def test_gradients_are_among_the_operations():
    weight = torch.randn(3, requires_grad=True)

    def function(x):
        return list(torch.autograd.grad((torch.tanh(x * weight) ** 2).sum(), weight))

    recording = record(function, [torch.randn(2, 3)])
    for _ in range(3):
        x = torch.randn(2, 3)
        torch.testing.assert_close(recording(x), function(x), rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            weight.add_(1.0)  # read where it lies
    assert weight.grad is None


def test_recording_leaves_random_states_and_buffers_as_they_were():
    norm = nn.BatchNorm1d(3)
    before = [x.clone() for x in norm.buffers()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    recording = record(lambda x: [norm(x) + torch.randn(3)], [torch.randn(5, 3)])
    # The inputs themselves were drawn before, and everything else on the side.
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before, strict=True))
    torch.set_rng_state(states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    recording(torch.randn(5, 3))
    assert norm.num_batches_tracked == 1


def num_calls(recording, name):
    """How often an operation is done."""
    return sum(str(node.target) == f"aten.{name}" for node in recording.operations.graph.nodes)


def test_what_several_draws_depend_on_is_computed_once():
    network = nn.Linear(3, 3)

    def function(x):
        return [torch.bernoulli(network(2 * x - 1).sigmoid()) for _ in range(4)]

    recording = assert_replays(function, torch.randn(5, 3), others=[(torch.randn(5, 3),)])
    assert num_calls(recording, "addmm.default") == 1
    assert num_calls(recording, "bernoulli.default") == 4


def test_numbers_of_other_types_make_other_operations():
    def function(x):
        return [torch.randint_like(x * 1, 9), torch.bernoulli(x * 1.0), torch.bernoulli(x / 1.0)]

    assert_replays(function, torch.tensor([0, 1, 1]))


def test_outputs_are_tensors_of_their_own():
    recording = assert_replays(lambda x: [x + 1, x + 1, torch.rand(3) * x], torch.randn(3))
    first, second, _ = recording(torch.randn(3))
    assert first.data_ptr() != second.data_ptr()


def test_what_changes_in_place_is_computed_each_time():
    def function(x):
        p = x.sigmoid()
        first = torch.bernoulli(p + 0.0)
        p[0].zero_()
        return [first, torch.bernoulli(p + 0.0)]

    assert_replays(function, torch.full((2, 3), 9.0), others=[(torch.full((2, 3), 8.0),)])


def test_running_averages_take_part_in_each_run():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    recording = record(lambda x: [torch.bernoulli(norm(x).sigmoid()) for _ in range(2)], [x])
    recording(x)
    torch.testing.assert_close(norm.running_mean, (1 - 0.9**2) * x.mean(0))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("is_training", [True, False])
def test_a_recording_is_valid_until_a_module_switches(is_training):
    drop = nn.Dropout(0.5).train(is_training)
    recording = record(lambda x: [drop(x)], [torch.ones(3)])
    assert recording.is_valid()
    drop.train(not is_training)
    assert not recording.is_valid()
    drop.train(is_training)
    assert recording.is_valid()


def named(name, value):
    return lambda x: [x * pyro.param(name, lambda: torch.tensor(value))]


CHANGES = {
    "the store is cleared": pyro.clear_param_store,
    "the value is set": lambda: pyro.get_param_store().__setitem__("p", torch.tensor(3.0)),
    "the store is loaded": lambda: pyro.get_param_store().set_state(
        {"params": {"p": torch.tensor(3.0, requires_grad=True)}, "constraints": {}}
    ),
    "the memory is exchanged": lambda: setattr(pyro.param("p"), "data", torch.tensor(3.0)),
    "the gradient is switched off": lambda: pyro.param("p").requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recording_is_valid_until_a_parameter_is_another(change):
    named("p", 1.0)(torch.ones(()))
    recording = record(named("p", 1.0), [torch.ones(())])
    assert recording.is_valid()
    with torch.no_grad():
        pyro.param("p").mul_(2)
    assert recording.is_valid()
    CHANGES[change]()
    assert not recording.is_valid()


def test_recordings_agree_if_they_do_the_same_to_the_same():
    x = torch.ones(3)
    other = WEIGHT.clone()
    one = record(lambda x: [x @ WEIGHT], [x.double()])
    assert one.agrees(record(lambda x: [x @ WEIGHT], [x.double()]))
    assert one.agrees(record(lambda x: [x @ other], [x.double()]))  # the same numbers
    assert not one.agrees(record(lambda x: [x @ (other + 1)], [x.double()]))
    assert not one.agrees(record(lambda x: [x @ other.mT.contiguous()], [x.double()]))
    assert not record(lambda x: [x * 2], [x]).agrees(record(lambda x: [x * 3], [x]))


def branch(x):
    return [x if x.sum() > 0 else -x]


REFUSED = {
    "a branch": branch,
    "item": lambda x: [x * x.sum().item()],
    "tolist": lambda x: [x * sum(x.tolist())],
    "numpy": lambda x: [x * float(x.numpy().sum())],
    "Python draws": lambda x: [x * random.random()],
    "NumPy draws": lambda x: [x * np.random.rand()],
    "a generator of its own": lambda x: [x + torch.randn(3, generator=torch.Generator())],
    "a seed": lambda x: [x + torch.randn(3, generator=torch.manual_seed(3))],
    "rows that a mask chooses": lambda x: [x * len(x[x > 0])],
    "nonzero": lambda x: [x * len(x.nonzero())],
    "an error": lambda x: [x.reshape(7)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_values_cannot_be_recorded(name):
    with pytest.raises(CannotRecord):
        record(REFUSED[name], [torch.ones(3)])


def test_an_input_that_is_not_read_is_told():
    recording = record(
        lambda x, y, z: [x + z], [torch.ones(3)] * 1 + [torch.ones(3) for _ in "yz"]
    )
    assert [recording.reads(i) for i in range(3)] == [True, False, True]
    constant = record(lambda x, y: [y + WEIGHT[0]], [torch.ones(3), torch.ones(3)])
    assert [constant.reads(i) for i in range(2)] == [False, True]


def test_recording_leaves_tensors_that_change_as_they_were():
    """The programs' own and the inputs, changed in place: each call does it, and recording doesn't."""
    mean = torch.zeros(3)

    def function(x):
        mean.mul_(0.5).add_(x.sum(0))
        mean[0] += 1
        return [x.mul_(2) - mean]

    x = torch.ones(2, 3)
    recording = record(function, [x])
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(x, torch.ones(2, 3))
    (replayed,) = recording(x)
    assert torch.equal(mean, torch.tensor([3.0, 2.0, 2.0]))
    assert torch.equal(x, torch.full((2, 3), 2.0))
    assert torch.equal(replayed, x - mean)


def test_sparse_tensors_of_a_program_are_refused():
    weights = torch.eye(3).to_sparse()
    with pytest.raises(CannotRecord, match="sparse_coo"):
        record(lambda x: [torch.sparse.mm(weights, x)], [torch.ones(3, 2)])


def test_bits_with_probabilities_that_are_not_numbers_are_not_numbers():
    """PyTorch refuses them, on a GPU for good; other bits are drawn as ever."""
    recording = record(lambda p: [torch.bernoulli(p)], [torch.full((50,), 0.5)])
    p = torch.rand(50)
    expected = seeded(torch.bernoulli, p)[0]
    p[[3, 20]] = torch.nan
    expected[[3, 20]] = torch.nan
    (seen,) = seeded(recording, p)[0]
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "error", "is_same"),
    [
        (torch.bfloat16, 1e-2, True),
        (torch.bfloat16, 0.5, False),
        (torch.float32, 1e-4, True),
        (torch.float32, 1e-2, False),
        (torch.float64, 1e-2, False),
    ],
)
def test_a_replay_may_differ_by_rounding(dtype, error, is_same):
    """In norm, since single elements may be as good as zero."""
    x = torch.tensor([100.0, -30.0, 1e-3, torch.nan], dtype=dtype)
    y = x + torch.tensor([0.0, 0.0, 100 * error, 0.0], dtype=dtype)
    assert _is_rounded(y, x) == is_same
