"""A loader gives each row once, in an order that it draws where the data lie."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro.optim import SGD

from pyro_symeq import SymmetricEquilibrium, TensorLoader
from tests.enumerable import Ladder, bits
from tests.montecarlo import assert_mean

N = 10


def numbers(device, n=N):
    return torch.arange(n, device=device)


def epoch(loader):
    """The rows in the order in which they come."""
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "batch_size, sizes", [(1, [1] * N), (4, [4, 4, 2]), (5, [5, 5]), (N, [N]), (99, [N])]
)
def test_an_epoch_gives_each_row_once(batch_size, sizes, shuffle, device):
    loader = TensorLoader(numbers(device), batch_size=batch_size, shuffle=shuffle)
    for _ in range(3):
        assert [len(batch) for batch in loader] == sizes
        assert sorted(epoch(loader)) == list(range(N))
    assert len(loader) == len(sizes)
    assert (loader.num_rows, loader.batch_size) == (N, batch_size)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size, num_batches", [(1, N), (4, 2), (5, 2), (N, 1)])
def test_without_the_last_batch_all_have_one_shape(batch_size, num_batches, shuffle, device):
    x = torch.rand(N, 2, 3, device=device)
    loader = TensorLoader(x, batch_size=batch_size, shuffle=shuffle, drop_last=True)
    assert [batch.shape for batch in loader] == [(batch_size, 2, 3)] * num_batches
    assert len(loader) == num_batches


def test_each_epoch_leaves_out_others(device):
    loader = TensorLoader(numbers(device), batch_size=9, drop_last=True)
    assert len({tuple(sorted(epoch(loader))) for _ in range(50)}) > 1


def test_rows_stay_together_and_as_they_are(device):
    y = numbers(device)
    x = torch.stack([y, -y], dim=-1).float()
    loader = TensorLoader(x, y, y > 4, batch_size=4)
    for _ in range(3):
        for batch in loader:
            assert isinstance(batch, tuple)
            for part, whole in zip(batch, loader.tensors, strict=True):
                assert part.dtype == whole.dtype
                assert part.device == whole.device
                assert part.is_contiguous()
            x_batch, y_batch, is_large = batch
            assert torch.equal(x_batch, x[y_batch])
            assert torch.equal(is_large, y_batch > 4)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_rows_of_any_layout(layout, device):
    x = torch.rand(3, 2 * N, device=device).T
    x = {"transposed": x, "strided": x[::2], "expanded": x[:, :1].expand(2 * N, 3)}[layout]
    rows = torch.cat(list(TensorLoader(x, batch_size=4)))
    assert torch.equal(rows[rows[:, 0].argsort()], x[x[:, 0].argsort()])


def test_epochs_differ_and_a_seed_repeats_them(device):
    loader = TensorLoader(numbers(device), batch_size=4)
    pyro.set_rng_seed(1)
    first = [epoch(loader) for _ in range(3)]
    pyro.set_rng_seed(1)
    assert [epoch(loader) for _ in range(3)] == first
    assert len({tuple(order) for order in first}) == 3


def test_a_generator_repeats_its_orders(device):
    generator = torch.Generator(device)
    loader = TensorLoader(numbers(device), batch_size=4, generator=generator)
    generator.manual_seed(1)
    first = [epoch(loader) for _ in range(2)]
    torch.rand(7, device=device)
    generator.manual_seed(1)
    assert [epoch(loader) for _ in range(2)] == first


@pytest.mark.parametrize("shuffle", [True, False])
def test_only_orders_without_a_generator_are_drawn_from_the_default(shuffle, device):
    generator = torch.Generator(device) if shuffle else None
    loader = TensorLoader(numbers(device), batch_size=4, shuffle=shuffle, generator=generator)
    pyro.set_rng_seed(1)
    expected = torch.rand(3, device=device)
    pyro.set_rng_seed(1)
    epoch(loader)
    assert torch.equal(torch.rand(3, device=device), expected)


def test_without_shuffling_rows_come_in_their_order(device):
    loader = TensorLoader(numbers(device), batch_size=4, shuffle=False)
    assert epoch(loader) == epoch(loader) == list(range(N))


def test_epochs_at_once_do_not_disturb_each_other(device):
    loader = TensorLoader(numbers(device), batch_size=3)
    pyro.set_rng_seed(1)
    one_by_one = [epoch(loader), epoch(loader)]
    pyro.set_rng_seed(1)
    at_once = [[], []]
    for batches in zip(loader, loader, strict=True):
        torch.rand(2, device=device)  # like a step, between two batches
        for rows, batch in zip(at_once, batches, strict=True):
            rows += batch.tolist()
    assert at_once == one_by_one


def test_an_epoch_that_is_left_early_does_not_shorten_the_next(device):
    loader = TensorLoader(numbers(device), batch_size=3)
    next(iter(loader))
    assert sorted(epoch(loader)) == list(range(N))


def test_batches_are_views_where_nothing_is_shuffled(device):
    x = torch.zeros(N, 2, device=device)
    for number, batch in enumerate(TensorLoader(x, batch_size=4, shuffle=False)):
        assert batch.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        batch.fill_(number)
    assert x[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2


def test_batches_are_copies_where_rows_are_shuffled(device):
    x = torch.zeros(N, 2, device=device)
    for batch in TensorLoader(x, batch_size=4):
        batch.fill_(1)
    assert not x.any()


def test_all_orders_are_equally_probable(device):
    """24 comparisons of frequencies: fails by chance about once in 30 000 runs."""
    n = 4
    loader = TensorLoader(numbers(device, n), batch_size=n)
    orders = torch.stack([order for _ in range(20_000) for order in loader])
    possible = torch.tensor(list(itertools.permutations(range(n))), device=device)
    hits = (orders[:, None] == possible).all(-1)
    assert_mean(hits.double(), torch.tensor(1 / len(possible), device=device))


def test_orders_of_successive_epochs_are_independent(device):
    """9 comparisons of frequencies: fails by chance about once in 100 000 runs."""
    n = 3
    loader = TensorLoader(numbers(device, n), batch_size=1)
    firsts = torch.stack([next(iter(loader)) for _ in range(20_000)]).view(-1, 2)
    possible = torch.cartesian_prod(numbers(device, n), numbers(device, n))
    hits = (firsts[:, None] == possible).all(-1)
    assert_mean(hits.double(), torch.tensor(1 / len(possible), device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells of synchronisations")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [10, 60_000])
def test_the_host_never_waits(n, shuffle):
    x = torch.zeros(n, 3, device="cuda")
    y = numbers("cuda", n)
    loader = TensorLoader(x, y, batch_size=128, shuffle=shuffle)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [batch for _ in range(2) for batch in loader]
        with pytest.raises(RuntimeError, match="synchronizing"):
            y[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(batches) == 2 * len(loader)


def test_a_training_goes_on_in_the_same_order(device):
    """Two epochs are those of a training that is saved after the first and loaded elsewhere."""

    def begun():
        pyro.clear_param_store()
        ladder = Ladder().to(device)
        symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
        return symeq, TensorLoader(bits(3).to(device), batch_size=3)

    symeq, loader = begun()
    for x in loader:
        symeq.step(x)
    state = symeq.state_dict()
    losses = [symeq.step(x) for x in loader]

    pyro.set_rng_seed(7)
    symeq, loader = begun()
    symeq.load_state_dict(state)
    assert [symeq.step(x) for x in loader] == losses


def test_several_tensors_are_arguments_of_a_step(device):
    ladder = Ladder().to(device)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, SGD({"lr": 0.1}))
    x, z0 = bits(3).to(device), torch.ones(8, 2, device=device)
    for x_batch, z0_batch in TensorLoader(x, z0, batch_size=4):
        symeq.step(x_batch, z0=z0_batch)
    assert symeq.num_steps == 2


X = torch.zeros(5, 2)
KIND_ERRORS = {
    "no data": ((), "at least one tensor, got none"),
    "an array": ((X, np.zeros(5)), "got ndarray. Convert an array .* by torch.as_tensor"),
    "a list": (([1.0, 2.0],), "got list"),
    "a tuple of tensors": (((X, X),), r"got tuple.* one by one: TensorLoader\(x, y"),
    "a data set": ((torch.utils.data.TensorDataset(X),), "got TensorDataset"),
    "a size by position": ((X, 2), "got int"),
}


@pytest.mark.parametrize("tensors, message", KIND_ERRORS.values(), ids=KIND_ERRORS)
def test_what_is_no_tensor_is_refused(tensors, message):
    with pytest.raises(TypeError, match=message):
        TensorLoader(*tensors, batch_size=2)


VALUE_ERRORS = {
    "no rows": ((X[:0],), {}, r"at least one, got the shapes \[\(0, 2\)\]"),
    "a number": ((torch.tensor(1.0),), {}, r"at least one, got the shapes \[\(\)\]"),
    "lengths": ((X, X[:4]), {}, r"as many rows, .* \[\(5, 2\), \(4, 2\)\]"),
    "devices": ((X, X.to("meta")), {}, r"on one device, got \['cpu', 'meta'\]"),
    "size 0": ((X,), {"batch_size": 0}, "batch_size to be an integer of at least 1, got 0"),
    "size 2.0": ((X,), {"batch_size": 2.0}, "an integer of at least 1, got 2.0"),
    "size True": ((X,), {"batch_size": True}, "an integer of at least 1, got True"),
    "no batch": (
        (X,),
        {"batch_size": 6, "drop_last": True},
        "at most the number of rows, 5, got 6",
    ),
    "generator": (
        (X.to("meta"),),
        {"generator": torch.Generator()},
        r"'meta', got one on 'cpu'. Make it there: torch.Generator\('meta'\)",
    ),
}


@pytest.mark.parametrize("tensors, options, message", VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_bad_values_are_refused(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(*tensors, **{"batch_size": 2, **options})


def test_it_prints_what_it_loads():
    assert repr(TensorLoader(X, batch_size=2)) == "TensorLoader(1 tensor of 5 rows, batch_size=2)"
