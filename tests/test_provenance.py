"""Values are followed to the elements of arguments that they are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_symeq.provenance import follow, put_back, subsampled_dim, take

IND = torch.tensor([4, 1, 3])
PICKS = {
    "rows": lambda x: x[IND],
    "rows and a step": lambda x: x[IND, 2],
    "a step of rows": lambda x: x[IND][:, 2],
    "rows of a flat view": lambda x: x.flatten(1)[IND],
    "index_select": lambda x: torch.index_select(x, 0, IND.to(x.device)),
    "index_select by name": lambda x: x.index_select(dim=0, index=IND.to(x.device)),
    "cast rows": lambda x: x[IND].float(),
    "rows of a cast": lambda x: x.float()[IND],
    "flipped rows": lambda x: x.flip(1)[IND],
    "columns by rows": lambda x: x.transpose(0, 1)[:, IND],
    "one of several outputs": lambda x: x.unbind(1)[2][IND],
    "property": lambda x: x.mT[IND],
    "gather": lambda x: x.gather(0, IND.to(x.device)[:, None, None].expand(3, 4, 2)),
    "take_along_dim": lambda x: x.take_along_dim(IND.to(x.device)[:, None, None], 0),
    "roll": lambda x: x.roll(1, 1)[IND],
    "rows of rows": lambda x: x[torch.tensor([5, 4, 3, 2, 1])][torch.tensor([1, 4, 2])],
}


@pytest.mark.parametrize("pick", PICKS.values(), ids=PICKS.keys())
def test_picked_elements_are_put_back(pick, device):
    x = torch.rand(6, 4, 2, device=device)
    with follow(((x,), {})) as followed:
        value = pick(x)
    origin = followed.origin(value)
    assert origin.path == (0, 0)
    assert torch.equal(take(x, origin.picks), value)
    other = torch.rand_like(value)
    filled = x.clone()
    put_back(filled, origin.picks, other)
    assert torch.equal(pick(filled), other)
    assert (filled != x).sum() == value.numel()
    assert subsampled_dim(x, [origin.picks], 6, IND.to(device)) == 0


COMPUTED = {
    "sum": lambda x: x[IND] + 1,
    "one_hot": lambda x: torch.nn.functional.one_hot(x[IND].long(), 2),
    "changed in place": lambda x: x[IND].add_(1),
    "augmented": lambda x: x[IND].__iadd__(1),
    "written into": lambda x: torch.zeros(3, 4, 2).index_copy_(0, torch.arange(3), x[IND]),
    "expanded": lambda x: x[IND, :1].expand(3, 4, 2),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_computed_values_have_arguments_but_no_picks(compute):
    x, y = torch.rand(6, 4, 2), torch.rand(6)
    with follow(((x,), {"y": y})) as followed:
        value = compute(x)
    origin = followed.origin(value)
    assert origin.path is None
    assert origin.paths == {(0, 0)}
    assert followed.origin(torch.zeros(3)).paths == frozenset()


def test_what_a_cast_rounds_away_stays_where_nothing_was_put():
    x = torch.tensor([0.25, 1.5, 2.75])
    with follow(((x,), {})) as followed:
        value = x.long()[1:2]
    filled = x.clone()
    put_back(filled, followed.origin(value).picks, torch.tensor([7]))
    assert filled.tolist() == [0.25, 7.0, 2.75]


STEPS = {
    "index": lambda x, draw: x[draw(indices(len(x)))],
    "flip": lambda x, draw: x.flip(0),
    "transpose": lambda x, draw: x.transpose(0, -1),
    "flatten": lambda x, draw: x.flatten(),
    "slice": lambda x, draw: x[::2],
    "select": lambda x, draw: x[draw(st.integers(0, len(x) - 1))] if x.dim() > 1 else x,
    "cast": lambda x, draw: x.double(),
    "contiguous": lambda x, draw: x.contiguous(),
}


def indices(size):
    return st.permutations(range(size)).map(lambda p: torch.tensor(p[: max(1, size - 1)]))


@given(st.data(), st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
def test_chains_of_picks_are_put_back(data, steps):
    """What is put back is found again, and all else stays."""
    x = torch.arange(24.0).reshape(2, 3, 4)
    with follow(((x,), {})) as followed:
        value = x
        for step in steps:
            value = STEPS[step](value, data.draw)
    origin = followed.origin(value)
    assert origin.path == (0, 0)
    filled = x.clone()
    put_back(filled, origin.picks, -1 - value)
    assert torch.equal(take(filled, origin.picks), -1 - value)
    assert torch.equal(filled[filled >= 0], x[filled >= 0])
    assert (filled < 0).sum() == value.numel()
