"""SymmetricEquilibrium: schedules, ownership, state."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import SGD, Adam, ExponentialLR
from torch import nn
from torch.func import functional_call

from pyro_symeq import LimitingDistribution, SymmetricEquilibrium, SymmetricUtility
from tests.enumerable import Decoder, Encoder, Ladder, gradients
from tests.montecarlo import assert_mean
from tests.test_utility import COPIES, DRAWS, PATTERNS, Recorder, X

FROZEN = SGD({"lr": 0.0})


def clone(leaves):
    return [leaf.detach().clone() for leaf in leaves]


def identical(leaves, values):
    return all(torch.equal(leaf, value) for leaf, value in zip(leaves, values, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
@pytest.mark.parametrize("still", ["decoder", "encoder"])
def test_each_player_moves_its_own_parameters_only(updates, pattern, still, device):
    ladder = Ladder().to(device)
    moving = Adam({"lr": 0.1})
    optims = (FROZEN, moving) if still == "decoder" else (moving, FROZEN)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, optims, updates=updates)
    batch = {name: value.to(device) for name, value in PATTERNS[pattern].items()}
    theta, phi = clone(ladder.theta), clone(ladder.phi)
    for _ in range(3):
        symeq.step(**batch)
    assert identical(ladder.theta, theta) == (still == "decoder")
    assert identical(ladder.phi, phi) == (still == "encoder")
    assert all(leaf.grad is None for leaf in ladder.parameters())


@pytest.mark.parametrize("route", ["pyro.module", "PyroModule", "PyroModule, local"])
def test_ladder_guide_needs_no_detach(route):
    ladder = Ladder()
    with pyro.settings.context(module_local_params="local" in route):
        model, guide = ladder.model, ladder.guide
        if route != "pyro.module":
            model = Decoder(ladder)
            guide = Encoder(ladder, model)
        symeq = SymmetricEquilibrium(model, guide, (FROZEN, Adam({"lr": 0.1})))
        theta, phi = clone(ladder.theta), clone(ladder.phi)
        symeq.step(X)
    assert identical(ladder.theta, theta)
    assert not identical(ladder.phi, phi)


def test_what_the_model_touches_is_the_decoders_even_if_only_the_guide_names_it():
    decoder, encoder = nn.Linear(1, 2), nn.Linear(2, 1)
    scale = torch.ones((), requires_grad=True)

    def model(x):
        pyro.param("scale", scale)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), scale).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("both", nn.ModuleList([decoder, encoder]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x) + decoder(x[:, :1])[:, :1], 1.0).to_event(1))

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}))
    before = clone(decoder.parameters())
    with pytest.warns(UserWarning, match="no statement names") as seen:
        symeq.step(X[:, :2])
    assert seen[0].filename == __file__
    assert identical(decoder.parameters(), before)


def test_weights_that_pyro_stores_as_contiguous_copies_are_told_of():
    convolution = nn.Conv2d(3, 2, 2, padding=1)
    encoder = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), convolution, nn.Flatten(), nn.Linear(8, 1))
    encoder.to(memory_format=torch.channels_last)
    decoder = nn.Linear(1, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    with pytest.warns(UserWarning, match=r"shapes \[\(2, 3, 2, 2\)\]. Some aren't contiguous"):
        SymmetricEquilibrium(model, guide, SGD({"lr": 0.1})).step(X)


def test_constrained_parameters_stay_in_their_domain_and_learn():
    def model(x):
        p = pyro.param("p", torch.tensor(0.2), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=3 * x - 4.5))  # the exact posterior at p = 1/2

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.01}))
    x = torch.cat([torch.randn(50), 3 + torch.randn(150)])
    for _ in range(200):
        symeq.step(x)
    # The decoder's best response is p = E q(z = 1 | x).
    assert pyro.param("p").item() == pytest.approx((3 * x - 4.5).sigmoid().mean().item(), abs=0.05)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_alternating_encoder_answers_the_new_decoder(updates):
    ladder = Ladder()
    old = clone(ladder.theta)
    new = [value + 0.5 * torch.randn_like(value) for value in old]

    class Jump(Recorder):
        def __call__(self, params, *args, **kwargs):
            for leaf, value in zip(ladder.theta, new, strict=True):
                leaf.detach().copy_(value)

    recorder = Recorder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, (Jump(), recorder), updates=updates)
    draws = []
    for _ in range(DRAWS):
        for leaf, value in zip(ladder.theta, old, strict=True):
            leaf.detach().copy_(value)
        symeq.step(X.repeat(COPIES, 1))
        draws.append(recorder.seen)
    for leaf, value in zip(ladder.theta, new if updates == "alternating" else old, strict=True):
        leaf.detach().copy_(value)
    for leaf, gradient in zip(ladder.phi, gradients(ladder, x=X)[1], strict=True):
        assert_mean(-torch.stack([seen[leaf] for seen in draws]) / COPIES, gradient)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_steps_and_warmup(updates):
    moves = []

    class Counter(Recorder):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __call__(self, params, *args, **kwargs):
            moves.append(self.name)

    ladder = Ladder()
    optims = Counter("decoder"), Counter("encoder")
    symeq = SymmetricEquilibrium(
        ladder.model,
        ladder.guide,
        optims,
        updates=updates,
        decoder_steps=2,
        encoder_steps=3,
        encoder_warmup=1,
    )
    warmup = symeq.step(X)
    assert moves == ["encoder"] * 3
    assert warmup.decoder < 0
    moves.clear()
    symeq.step(X)
    expected = {
        "alternating": ["decoder"] * 2 + ["encoder"] * 3,
        "simultaneous": ["decoder", "encoder", "decoder", "encoder", "encoder"],
    }
    assert moves == expected[updates]
    assert symeq.num_steps == 2


def test_warmup_is_the_encoders_alone():
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, Adam({"lr": 0.1}), encoder_warmup=2)
    theta = clone(ladder.theta)
    symeq.step(X)
    symeq.step(X)
    assert identical(ladder.theta, theta)
    symeq.step(X)
    assert not identical(ladder.theta, theta)


def test_no_program_runs_more_often_than_it_must():
    ladder = Ladder()
    runs = []

    def model(x):
        runs.append("model")
        ladder.model(x)

    def guide(x):
        runs.append("guide")
        ladder.guide(x)

    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}))
    symeq.step(X)
    runs.clear()
    symeq.step(X.repeat(3, 1))
    assert runs == ["guide", "model", "model", "guide"]


def test_a_step_trains_even_where_gradients_are_off():
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, Adam({"lr": 0.1}))
    before = clone([*ladder.theta, *ladder.phi])
    with torch.no_grad():
        symeq.step(X)
    pairs = zip([*ladder.theta, *ladder.phi], before, strict=True)
    assert not any(torch.equal(leaf, value) for leaf, value in pairs)


def test_evaluating_moves_nothing():
    ladder = Ladder()
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, Adam({"lr": 0.1}))
    before = clone(ladder.parameters())
    loss = symeq.evaluate_loss(X)
    assert loss == -(loss.decoder + loss.encoder)
    assert identical(ladder.parameters(), before)
    assert symeq.num_steps == 0


class Training:
    """A training that can be stopped and taken up in a fresh process."""

    OPTIMS = {
        "one": lambda: Adam({"lr": 0.03}),
        "two": lambda: (Adam({"lr": 0.03}), SGD({"lr": 0.1, "momentum": 0.9})),
        "scheduled": lambda: ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
        ),
    }

    def __init__(self, optim, updates, state=None, device="cpu"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0 if state is None else 1)
        self.ladder = Ladder().to(device)
        self.x = X.to(device)
        self.optim = self.OPTIMS[optim]()
        self.symeq = SymmetricEquilibrium(
            self.model, self.guide, self.optim, updates=updates, encoder_warmup=2
        )
        if state is not None:
            self.symeq.load_state_dict(state)

    def model(self, x):
        pyro.param("rate", lambda: torch.rand(()), constraint=dist.constraints.positive)
        self.ladder.model(x)

    def guide(self, x):
        self.ladder.guide(x)

    def run(self, steps):
        for _ in range(steps):
            self.symeq.step(self.x[torch.randint(len(X), (5,))])
            if hasattr(self.optim, "step"):
                self.optim.step()
        return clone([*self.ladder.parameters(), pyro.param("rate")])


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
@pytest.mark.parametrize("optim", Training.OPTIMS)
def test_resumed_training_goes_on_bit_for_bit(optim, updates, stop, device):
    uninterrupted = Training(optim, updates, device=device).run(9)
    first = Training(optim, updates, device=device)
    first.run(stop)
    file = io.BytesIO()
    torch.save(first.symeq.state_dict(), file)
    first.run(1)  # the state is a copy: going on leaves it alone
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = Training(optim, updates, state, device).run(9 - stop)
    assert identical(resumed, uninterrupted)


def test_going_back_within_a_training():
    training = Training("one", "alternating")
    training.run(3)
    state = training.symeq.state_dict()
    once = training.run(4)
    training.symeq.load_state_dict(state)
    assert identical(training.run(4), once)


def test_loaded_values_survive_saving_before_they_are_used():
    training = Training("one", "alternating")
    training.run(3)
    state = training.symeq.state_dict()
    untouched = Training("one", "alternating", state).symeq.state_dict()["players"]
    for player in ("decoder", "encoder"):
        assert (
            state["players"][player]["parameters"].keys() == untouched[player]["parameters"].keys()
        )
        assert state["players"][player]["optim"].keys() == untouched[player]["optim"].keys()


def test_evaluation_uses_loaded_values():
    training = Training("one", "alternating")
    training.run(3)
    state = training.symeq.state_dict()
    expected = training.symeq.evaluate_loss(X)
    assert Training("one", "alternating", state).symeq.evaluate_loss(X) == expected


def test_parameters_that_a_state_lacks_are_named():
    training = Training("one", "alternating")
    training.run(1)
    state = training.symeq.state_dict()
    del state["players"]["decoder"]["parameters"]["rate"]
    resumed = Training("one", "alternating", state)
    with pytest.warns(UserWarning, match="no values for these parameters.*'rate'"):
        resumed.run(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("random"), "Expected a state of SymmetricEquilibrium"),
        (
            lambda state: state["players"]["encoder"].pop("optim"),
            "state of the encoder to have the keys",
        ),
        (
            lambda state: state["players"]["decoder"]["parameters"].pop("d1$$$bias"),
            "d1\\$\\$\\$bias",
        ),
        (
            lambda state: state["players"]["encoder"]["parameters"].update(
                {"e0$$$bias": torch.zeros(7)}
            ),
            r"Expected .*\(2,\).* got .*\(7,\)",
        ),
    ],
)
def test_foreign_states_are_refused_and_change_nothing(spoil, message):
    training = Training("one", "alternating")
    before = training.run(2)
    state = copy.deepcopy(training.symeq.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=message):
        training.symeq.load_state_dict(state)
    assert identical([*training.ladder.parameters(), pyro.param("rate")], before)


def test_a_first_step_leaves_no_trace_but_its_own():
    """The rehearsal draws, but random numbers and running averages go on as if it had not."""
    norm = nn.BatchNorm1d(3)
    ladder = Ladder()

    def guide(x):
        norm(x)
        ladder.guide(x)

    def second_step(symeq):
        pyro.set_rng_seed(0)
        norm.reset_running_stats()
        symeq.step(X)
        return torch.rand(3), norm.running_mean.clone(), norm.num_batches_tracked.clone()

    rehearsed = SymmetricEquilibrium(ladder.model, guide, FROZEN)
    rehearsed.step(X)
    expected = second_step(rehearsed)
    assert identical(second_step(SymmetricEquilibrium(ladder.model, guide, FROZEN)), expected)


class Centred(nn.Module):
    """Takes a running mean away, for which it makes a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("last", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.last = x
        return x - self.mean


def test_buffers_that_modules_replace_are_put_back():
    centred, ladder = Centred(), Ladder()

    def guide(x):
        centred(x)
        ladder.guide(x)

    mean = centred.mean
    symeq = SymmetricEquilibrium(ladder.model, guide, FROZEN)
    symeq.evaluate_loss(X)
    LimitingDistribution(ladder.model, guide).sample(3, X, num_steps=2)
    assert centred.mean is mean
    assert centred.last is None
    assert identical([mean], [torch.zeros(3)])
    symeq.step(X)
    assert centred.mean is not mean


def test_buffers_that_only_a_call_has_stay_out_of_the_module():
    norm, ladder = nn.BatchNorm1d(3), Ladder()
    mean = norm.running_mean
    averages = {name: value + 1 for name, value in norm.named_buffers()}

    def guide(x):
        functional_call(norm, averages, (x,))
        ladder.guide(x)

    SymmetricEquilibrium(ladder.model, guide, FROZEN).evaluate_loss(X)
    assert norm.running_mean is mean
    assert identical([averages["running_mean"]], [torch.ones(3)])


def test_leftover_elbo_is_called_out():
    ladder = Ladder()
    with pytest.warns(UserWarning, match="the game has its own utilities") as seen:
        symeq = SymmetricEquilibrium(ladder.model, ladder.guide, FROZEN, loss=Trace_ELBO())
    assert seen[0].filename == __file__
    assert symeq.step(X) == pytest.approx(-(symeq.step(X).decoder + symeq.step(X).encoder), rel=1)


def test_a_utility_may_be_the_loss():
    ladder = Ladder()
    utility = SymmetricUtility(supervise_encoder=False)
    symeq = SymmetricEquilibrium(ladder.model, ladder.guide, FROZEN, loss=utility)
    assert symeq.utility is utility
    with pytest.raises(ValueError, match="to the SymmetricUtility that is the loss"):
        SymmetricEquilibrium(ladder.model, ladder.guide, FROZEN, utility, bind={"x": "x"})


@pytest.mark.parametrize(
    "optim", [None, torch.optim.Adam, (FROZEN,), (FROZEN, None), [FROZEN] * 3, {"lr": 1e-3}]
)
def test_optim_of_another_kind_is_refused(optim):
    ladder = Ladder()
    with pytest.raises(TypeError, match="PyroOptim or a pair of them"):
        SymmetricEquilibrium(ladder.model, ladder.guide, optim)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"updates": "parallel"}, "updates='alternating' or 'simultaneous', got 'parallel'"),
        ({"decoder_steps": 0}, "decoder_steps to be an integer of at least 1, got 0"),
        ({"encoder_steps": 1.5}, "encoder_steps to be an integer of at least 1, got 1.5"),
        ({"encoder_warmup": -1}, "encoder_warmup to be an integer of at least 0, got -1"),
    ],
)
def test_options_are_checked(option, message):
    ladder = Ladder()
    with pytest.raises(ValueError, match=message):
        SymmetricEquilibrium(ladder.model, ladder.guide, FROZEN, **option)


def test_repr_tells_the_schedule():
    ladder = Ladder()
    assert "updates='alternating'" in repr(
        SymmetricEquilibrium(ladder.model, ladder.guide, FROZEN)
    )


def test_what_a_player_claims_is_its_own():
    """A network that both programs use belongs to the encoder, if it is told so."""
    shared, more = nn.Linear(2, 2), nn.Linear(2, 2)
    bias = nn.Parameter(torch.zeros(2))

    def model(x):
        pyro.module("shared", shared)
        pyro.param("bias", bias)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shared(z) + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("shared", shared)
        with pyro.plate("rows", len(x)):
            pyro.sample(
                "z", dist.Normal(shared(x) + pyro.module("more", more)(x), 1.0).to_event(1)
            )

    own = {"encoder": shared}
    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}), parameters=own)
    symeq.step(torch.randn(5, 2))
    players = symeq.state_dict()["players"]
    assert players["decoder"]["parameters"].keys() == {"bias"}
    encoder = {"weight", "bias", "more$$$weight", "more$$$bias"}
    assert players["encoder"]["parameters"].keys() == encoder
    symeq.freeze("encoder")
    before = shared.weight.clone()
    symeq.step(torch.randn(5, 2))
    assert torch.equal(shared.weight, before)

    with pytest.raises(ValueError, match="parameters= names \\['guide'\\]"):
        SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}), parameters={"guide": shared})
    with pytest.raises(TypeError, match="dict of networks by player, .*, got Linear"):
        SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}), parameters=shared)


def pair_at(z_in_model, z_in_guide):
    """A model and a guide, each with its way to sample z."""
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)

    def model(x):
        pyro.module("decoder", decoder)
        z = z_in_model(len(x), x.new_zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(decoder(z.expand(len(x), 2)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        z_in_guide(len(x), encoder(x))

    return model, guide


def in_plate(num_rows, loc):
    with pyro.plate("rows", num_rows):
        return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def in_narrow_plate(num_rows, loc):
    return in_plate(num_rows, loc[..., :1])


def for_all(num_rows, loc):
    return pyro.sample("z", dist.Normal(loc.reshape(-1, 2).mean(0), 1.0).to_event(1))


def for_all_in_a_row(num_rows, loc):
    return pyro.sample("z", dist.Normal(loc.mean(0, keepdim=True), 1.0).to_event(1))


def without_plate(num_rows, loc):
    return pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("z_in_model", "z_in_guide", "shapes"),
    [
        (in_plate, for_all, r"\(5, 2\) in the model and \(2,\) in the guide"),
        (in_plate, for_all_in_a_row, r"\(5, 2\) in the model and \(1, 2\) in the guide"),
        (in_plate, in_narrow_plate, r"\(5, 2\) in the model and \(5, 1\) in the guide"),
        (in_narrow_plate, in_plate, r"\(5, 1\) in the model and \(5, 2\) in the guide"),
        (for_all, in_plate, r"\(2,\) in the model and \(5, 2\) in the guide"),
    ],
)
@pytest.mark.parametrize("is_vectorized", [False, True])
def test_draws_that_would_broadcast_are_refused(z_in_model, z_in_guide, shapes, is_vectorized):
    model, guide = pair_at(z_in_model, z_in_guide)
    utility = SymmetricUtility(
        num_particles=2, num_proposals=3, vectorize_particles=is_vectorized, max_plate_nesting=1
    )
    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.1}), utility)
    with pytest.raises(ValueError, match=f"The site 'z' has shape {shapes}"):
        symeq.step(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("z_in_model", "z_in_guide"), [(in_plate, without_plate), (for_all, for_all_in_a_row)]
)
def test_equal_shapes_may_come_of_other_statements(z_in_model, z_in_guide):
    model, guide = pair_at(z_in_model, z_in_guide)
    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.01}))
    assert symeq.step(torch.randn(5, 4)) < torch.inf


@pytest.mark.parametrize("num_proposals", [1, 2])
@pytest.mark.parametrize("is_vectorized", [False, True])
def test_shapes_are_compared_where_a_site_is_observed_in_part(num_proposals, is_vectorized):
    """The guide samples the other part by Pyro's name for it, beside a latent of all rows."""
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)
    mask = torch.tensor([True, False, True])

    def model(x, z):
        pyro.module("decoder", decoder)
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample("z", law, obs=z, obs_mask=mask)
            pyro.sample("x", dist.Normal(decoder(z + w), 1.0).to_event(1), obs=x)

    def guide_of(width):
        def guide(x, z):
            pyro.module("encoder", encoder)
            pyro.sample("w", dist.Normal(encoder(x).mean(0), 1.0).to_event(1))
            with pyro.plate("rows", len(x)):
                pyro.sample("z_unobserved", dist.Normal(encoder(x)[:, :width], 1.0).to_event(1))

        return guide

    utility = SymmetricUtility(
        num_particles=2, num_proposals=num_proposals, vectorize_particles=is_vectorized
    )
    x, z = torch.randn(3, 4), torch.randn(3, 2)
    assert utility.loss(model, guide_of(2), x, z) < torch.inf
    with pytest.raises(ValueError, match=r"'z' has shape \(3, 2\) .* \(3, 1\) in the guide"):
        utility.loss(model, guide_of(1), x, z)


def test_shapes_are_compared_in_each_step():
    """What the guide does with later data is as wrong as what it does with the first."""

    def by_value(num_rows, loc):
        return in_plate(num_rows, loc) if loc.abs().sum() > 0 else for_all(num_rows, loc)

    model, guide = pair_at(in_plate, by_value)
    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": 0.01}))
    symeq.step(torch.randn(5, 4))
    guide_bias = pyro.get_param_store()["encoder$$$bias"]
    guide_bias.data.zero_()
    with pytest.raises(ValueError, match=r"\(5, 2\) in the model and \(2,\) in the guide"):
        symeq.step(torch.zeros(5, 4))


def test_parameters_without_names_need_settings_without_names():
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    x, own = torch.randn(5, 4), {"encoder": encoder}
    by_name = Adam(lambda name: {"lr": 0.1})
    before = clone([*decoder.parameters(), *encoder.parameters()])
    symeq = SymmetricEquilibrium(model, guide, by_name, parameters=own)
    message = r"The optimiser of the encoder goes by the names .* none for \['weight', 'bias'\]"
    with pytest.raises(ValueError, match=message):
        symeq.step(x)
    assert identical([*decoder.parameters(), *encoder.parameters()], before)
    assert not by_name.optim_objs

    SymmetricEquilibrium(model, guide, (by_name, Adam({"lr": 0.1})), parameters=own).step(x)
    assert not identical(encoder.parameters(), before[2:])
