"""Pairs and batches that can't be learned from are refused, and nothing has moved."""

import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn

from pyro_symeq import Implicit, SymmetricEquilibrium, SymmetricUtility

X = torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


COUNTED = (torch.tensor([float(i)]) for i in itertools.count())


class Pair:
    """A Gaussian pair that learns, with a spot for a fault in each program."""

    def __init__(self):
        self.decoder = nn.Linear(1, 2)
        self.encoder = nn.Linear(2, 1)
        self.prior = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)

    def state_dict(self):
        return nn.ModuleList([self.decoder, self.encoder]).state_dict()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            self.after_z(z)
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            self.before_z(x)
            z = pyro.sample("z", self.posterior(x))
            self.beside_z(z)

    def likelihood(self, z):
        return dist.Normal(self.decoder(z), 1.0).to_event(1)

    def posterior(self, x):
        return dist.Normal(self.encoder(x), 1.0).to_event(1)

    def after_z(self, z):
        """Sites between z and x in the model."""

    def before_z(self, x):
        """Sites before z in the guide."""

    def beside_z(self, z):
        """Sites after z in the guide."""


def refuse(pair, match, x=X, warm=False, **options):
    """Checks the message, and that parameters and optimiser are as they were."""
    optim = Adam({"lr": 0.1})
    symeq = SymmetricEquilibrium(pair.model, pair.guide, optim, **options)
    if warm:
        symeq.step(X)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    state = symeq.state_dict()
    with pytest.raises(ValueError, match=match):
        symeq.step(x)
    after = pair.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for player in ("decoder", "encoder"):
        old, new = (
            state["players"][player]["optim"],
            symeq.state_dict()["players"][player]["optim"],
        )
        assert str(old) == str(new)
    assert symeq.num_steps == int(warm)


def test_the_sound_pair_is_accepted():
    pair = Pair()
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1})).step(X)
    assert not any(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


def previous(x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], -1)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_model_that_goes_by_the_data_and_not_by_what_it_draws(weight):
    """Also where a parameter hides it that is 0 at first."""

    class Forced(Pair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            factor = pyro.param("factor", torch.tensor(weight))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior)
                loc = self.decoder(z) + factor * previous(x)
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    refuse(Forced(), r"The model's law of \['x'\] depends on the data in its arguments")


@pytest.mark.parametrize("is_given", [False, True])
def test_model_that_masks_by_its_data(is_given):
    """In a dream, the mask would be that of real data; one that is given is as good as any."""

    class Masked(Pair):
        def model(self, x, lengths):
            pyro.module("decoder", self.decoder)
            lengths = lengths if is_given else (x > 0).sum(-1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior)
                for t, loc in enumerate(self.decoder(z).unbind(-1)):
                    with pyro.poutine.mask(mask=t < lengths):
                        pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[:, t])

        def guide(self, x, lengths):
            super().guide(x)

    pair, lengths = Masked(), torch.tensor([1, 2, 1])
    x = torch.rand(3, 2) * (torch.arange(2) < lengths[:, None])
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    if is_given:
        symeq.step(x, lengths)
        return
    with pytest.raises(ValueError, match=r"law of \['x_[01]'.* depends on the data"):
        symeq.step(x, lengths)


def test_model_that_goes_by_a_label_and_not_by_what_it_draws():
    class Forced(Pair):
        is_forced = True

        def model(self, x, y):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior)
                drawn = pyro.sample("y", dist.Bernoulli(0.5 * torch.ones(len(x))), obs=y)
                loc = self.decoder(z) + (y if self.is_forced else drawn)[:, None]
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(self, x, y):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=x.sum(-1)))
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    pair, y = Forced(), torch.tensor([1.0, 0.0, 1.0]).double()
    optim = Adam({"lr": 0.1})
    with pytest.raises(ValueError, match=r"The model's law of \['x'\] depends on the data"):
        SymmetricEquilibrium(pair.model, pair.guide, optim).step(X, y)
    pair.is_forced = False
    SymmetricEquilibrium(pair.model, pair.guide, optim).step(X, y)


def test_parameters_that_can_only_be_what_they_are_are_left_alone():
    """The look at other parameters fails then, and leaves no trace."""

    class Strict(Pair):
        def likelihood(self, z):
            scale = pyro.param("scale", torch.tensor(0.5))
            if scale != 0.5:
                raise ValueError("The scale has moved.")
            return dist.Normal(self.decoder(z), scale).to_event(1)

    pair = Strict()
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    symeq.evaluate_loss(X)
    assert pyro.param("scale") == 0.5
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


@pytest.mark.parametrize("noise", [torch.rand, lambda n: next(COUNTED).expand(n)])
def test_models_with_noise_of_their_own_are_accepted(noise):
    class Noisy(Pair):
        def likelihood(self, z):
            return dist.Normal(self.decoder(z) + noise(1), 1.0).to_event(1)

    SymmetricEquilibrium(Noisy().model, Noisy().guide, Adam({"lr": 0.1})).step(X)


def test_auto_guide():
    pair = Pair()
    pair.guide = AutoNormal(pair.model)
    refuse(pair, "The guide ignores the data.*an AutoGuide")


def test_guide_that_ignores_the_data():
    pair = Pair()
    loc = torch.zeros(1, requires_grad=True)
    pair.posterior = lambda x: dist.Normal(pyro.param("loc", loc).expand(len(x), 1), 1.0).to_event(
        1
    )
    refuse(pair, r"The guide ignores the data: it never reads the values of \['x'\]")


def test_guide_that_closes_over_its_data():
    pair = Pair()
    pair.posterior = lambda x: dist.Normal(pair.encoder(X), 1.0).to_event(1)
    refuse(pair, "ignores the data")


def test_guide_that_reads_what_the_model_has_left():
    class Leaving(Pair):
        def model(self, x):
            self.left = x
            super().model(x)

        def posterior(self, x):
            return super().posterior(self.left)

    refuse(Leaving(), r"The guide ignores the data: it never reads the values of \['x'\]")


def test_a_guide_that_starts_at_zero_reads_the_data_all_the_same():
    pair = Pair()
    nn.init.zeros_(pair.encoder.weight)
    SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1})).step(X)
    assert pair.encoder.weight.abs().sum() > 0


def test_scripted_guide_networks_are_accepted():
    pair = Pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch advise against scripting
        scripted = torch.jit.script(pair.encoder)
    pair.posterior = lambda x: dist.Normal(scripted(x), 1.0).to_event(1)
    SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1})).step(X)


def test_latent_missing_from_the_guide():
    pair = Pair()
    pair.after_z = lambda z: pyro.sample("w", dist.Normal(z.squeeze(-1), 1.0))
    refuse(pair, r"The guide never samples \['w'\], which the model does")


def test_guide_site_that_the_model_lacks():
    pair = Pair()
    pair.before_z = lambda x: pyro.sample("w", dist.Normal(x[:, 0], 1.0))
    refuse(pair, r"The guide samples \['w'\], which the model doesn't.*is_auxiliary")


def test_auxiliary_guide_site_is_accepted():
    pair = Pair()
    pair.before_z = lambda x: pyro.sample(
        "w", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True}
    )
    loss = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1})).step(X)
    assert loss.encoder < 0


@pytest.mark.parametrize("place", ["likelihood", "posterior"])
def test_implicit_site_where_a_density_is_needed(place):
    pair = Pair()
    events = (2 if place == "likelihood" else 1,)
    setattr(pair, place, lambda v: Implicit(lambda shape: torch.zeros(*shape, *events), events))
    refuse(pair, "is Implicit.*Give it a distribution with log_prob")


def test_implicit_prior_with_parameters():
    pair = Pair()
    shift = nn.Parameter(torch.zeros(1))
    pair.prior = Implicit(lambda shape: torch.randn(*shape, 1) + shift, (1,))
    refuse(pair, "site 'z' is Implicit and would have to learn: it depends on parameters")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("warm", [False, True])
def test_data_that_are_not_finite(value, warm):
    pair = Pair()
    pair.posterior = lambda x: dist.Normal(pair.encoder(x.nan_to_num(0, 0)), 1.0).to_event(1)
    bad = X.clone()
    bad[1, 0] = value
    with pyro.validation_enabled(False):
        refuse(
            pair, "finite utility of the decoder, got .* from these.*'x': (nan|-inf)", bad, warm
        )


@pytest.mark.parametrize("warm", [False, True])
def test_data_that_the_guide_cannot_take(warm):
    bad = X.clone()
    bad[1] = float("nan")
    refuse(Pair(), "value of site 'x' is not finite: 2 elements of the argument 'x'", bad, warm)


@pytest.mark.parametrize("warm", [False, True])
def test_data_outside_the_support(warm):
    pair = Pair()
    pair.posterior = lambda x: dist.Normal(pair.encoder(x.nan_to_num()), 1.0).to_event(1)
    refuse(pair, "No log-probability at site 'x': Expected value", X * float("nan"), warm)


@pytest.mark.parametrize("others", [{}, {"w": torch.zeros(4)}], ids=["x alone", "with more"])
def test_a_latent_that_is_in_neither_the_guide_nor_the_batch(others):
    """It may be left out only where nothing else depends on it, as on another view of the data."""

    def model(x=None, y=None, w=None):
        p = pyro.param("p", torch.tensor([-1.0, 1.0]))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(p[y] + z, 1.0), obs=x)
            pyro.sample("w", dist.Normal(z * p[0], 1.0), obs=w)

    def guide(x=None, y=None, w=None):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}))
    problem = r"laws of \['x'\] depend on .*'y'.*, which the batch doesn't give"
    with pytest.raises(ValueError, match=problem):
        symeq.step(torch.randn(4), **others)
    symeq.step(torch.randn(4), torch.ones(4, dtype=torch.long))  # without w


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["view", "cast"])
def test_a_batch_of_one_row_does_not_hide_a_transpose(dtype, validate):
    """The guide is given the labels, and dreams of the data, in the order of its arguments."""
    seen = []

    def model(x, y):
        p = pyro.param("p", torch.ones(()))
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("times", 3, dim=-2):
            y = pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=y.t())
            pyro.sample("x", dist.Normal(9 * y + 0 * p, 0.01), obs=x.t().double())

    def guide(x, y):
        w = pyro.param("w", torch.ones(()))
        with pyro.plate("rows", len(x), dim=-1), pyro.plate("times", 3, dim=-2):
            seen.append((x, pyro.sample("y", dist.Normal(w * x.t(), 1.0)), y))

    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}))
    x, y = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3)
    with pyro.validation_enabled(validate):
        symeq.step(x[:1], y[:1])
        symeq.step(x, y)
        seen.clear()
        symeq.step(x, y)
    assert len(seen) >= 2
    for seen_x, sampled, given in seen:
        assert sampled.equal(given.t())  # the labels, or those of the dream
        if not seen_x.equal(x):
            torch.testing.assert_close(seen_x.t().double(), 9 * sampled, atol=0.1, rtol=0)


def test_labels_of_all_rows_first_and_of_some_later():
    """What unlabelled rows hold in the place of a label is no label."""
    drawn = []

    def model(x, y, is_labelled):
        p = pyro.param("p", torch.zeros(2))
        mask = {} if is_labelled.all() else {"obs_mask": is_labelled}
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)), obs=y, **mask)
            pyro.sample("x", dist.Normal(p[y.long()], 1.0), obs=x)

    def guide(x, y, is_labelled):
        w = pyro.param("w", torch.ones(()))
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=w * x))
        drawn.append((x, y))

    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}))
    x, is_labelled = torch.randn(100), torch.arange(100) < 50
    symeq.step(x[:50], torch.ones(50), torch.ones(50, dtype=torch.bool))
    symeq.step(x, is_labelled.double(), is_labelled)
    drawn.clear()
    symeq.step(x, is_labelled.double(), is_labelled)
    completed = [y for seen, y in drawn if seen is x]
    assert completed
    for y in completed:
        assert y[:50].eq(1).all()
        assert 0 < y[50:].sum() < 50


SWITCHES = {
    "mode of a module": (lambda pair, is_on: pair.train(is_on), lambda pair, _: pair.training),
    "number": (lambda pair, is_on: 0.5 * is_on, lambda pair, number: number > 0),
    "attribute": (
        lambda pair, is_on: setattr(pair, "is_on", is_on),
        lambda pair, _: pair.is_on,
    ),
}


class Switched(nn.Module):
    """A pair whose guide observes labels where it is told to.

    Args:
        is_on: Tells of the pair and its second argument whether it is told to.
    """

    def __init__(self, is_on):
        super().__init__()
        self.decoder, self.encoder, self.classes = (
            nn.Linear(1, 2),
            nn.Linear(2, 1),
            nn.Linear(2, 1),
        )
        self._is_on = is_on

    def model(self, x, switch, y):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, switch, y):
        pyro.module("encoder", self.encoder)
        pyro.module("classes", self.classes)
        with pyro.plate("rows", len(x)):
            if self._is_on(self, switch):
                pyro.sample("y", dist.Bernoulli(logits=self.classes(x)[:, 0]), obs=y)
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_the_guide_observes_may_be_switched_on_later(switch):
    """Then the labels train it at the data, and they aren't scored at dreams."""
    turn, is_on = SWITCHES[switch]
    for first in (False, True):
        pyro.clear_param_store()
        pair = Switched(is_on)
        stage = SymmetricUtility().stage(pair.model, pair.guide)
        x, y = torch.randn(4, 2), torch.ones(4)
        for value in (first, True):
            setting = turn(pair, value)
            pyro.set_rng_seed(1)
            score = stage.score("encoder", ((x, setting, y), {}))
        gradients = score.gradients(list(pair.classes.parameters()))
        at_data = dist.Bernoulli(logits=pair.classes(x)[:, 0]).log_prob(y).sum()
        expected = torch.autograd.grad(-at_data, list(pair.classes.parameters()))
        torch.testing.assert_close(list(gradients), list(expected))


def test_a_guide_that_observes_others_in_each_run_is_refused():
    pair, count = Pair(), itertools.count()
    pair.beside_z = lambda z: pyro.sample(
        f"y{next(count)}", dist.Normal(z, 1.0).to_event(1), obs=z
    )
    refuse(pair, r"guide observed \['y\d+'\] in one run and \['y\d+'\] in another")


def test_teacher_forcing_that_begins_later_is_refused():
    def model(x, ratio):
        p = pyro.param("p", torch.ones(()))
        with pyro.plate("rows", len(x)):
            state = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            for t in range(2):
                x_t = pyro.sample(f"x{t}", dist.Normal(p * state, 1.0), obs=x[:, t])
                state = x[:, t] if ratio > 0 else x_t

    def guide(x, ratio):
        w = pyro.param("w", torch.ones(()))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(w * x.sum(-1), 1.0))

    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.1}))
    symeq.step(torch.randn(4, 2), 0.0)
    with pytest.raises(ValueError, match=r"law of \['x1'\] depends on the data"):
        symeq.step(torch.randn(4, 2), 0.5)


def test_a_prior_without_draws():
    pair = Pair()
    pair.prior = dist.ImproperUniform(dist.constraints.real_vector, (), (1,))
    refuse(pair, "No draws at site 'z': its law can't be sampled")


def test_encoder_that_fails_on_dreams_at_the_first_step():
    pair = Pair()
    pair.likelihood = lambda z: dist.Normal(pair.decoder(z) + 100, 1.0).to_event(1)
    pair.posterior = lambda x: dist.Normal(
        pair.encoder(x) + torch.where(x[:, :1] > 50, float("nan"), 0.0), 1.0, validate_args=False
    ).to_event(1)
    with pyro.validation_enabled(False):
        refuse(pair, "finite utility of the encoder, got .* from these.*'z': nan")


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_encoder_that_fails_on_dreams_later(updates):
    """The decoder has moved by then, and is taken back."""
    pair = Pair()
    faults = {"on": False}

    def posterior(x):
        fault = faults["on"] and x.requires_grad is False and not torch.equal(x, X)
        loc = pair.encoder(x) * (float("nan") if fault else 1.0)
        return dist.Normal(loc, 1.0, validate_args=False).to_event(1)

    pair.posterior = posterior
    optim = Adam({"lr": 0.1})
    symeq = SymmetricEquilibrium(pair.model, pair.guide, optim, updates=updates, encoder_steps=2)
    symeq.step(X)
    faults["on"] = True
    before, state = pair.state_dict(), symeq.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with pytest.raises(ValueError, match="'z'"):
        symeq.step(X)
    assert all(torch.equal(pair.state_dict()[name], value) for name, value in before.items())
    assert str(symeq.state_dict()["players"]["decoder"]) == str(state["players"]["decoder"])
    faults["on"] = False
    symeq.step(X)


def test_nothing_to_learn():
    pair = Pair()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior)
            pyro.sample("x", dist.Normal(z.expand(len(x), 2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))

    with pytest.raises(ValueError, match="nothing to learn: no program touches a parameter"):
        SymmetricEquilibrium(model, guide, Adam({"lr": 0.1})).step(X)
    with pytest.raises(ValueError, match="nothing to learn"):
        SymmetricUtility()(model, guide)(X)


def test_networks_that_were_not_registered():
    pair = Pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pair.posterior(x))

    pair.guide = guide
    refuse(pair, r"nothing to learn for the encoder.*\(1, 2\).*Register their networks")


def test_a_guide_that_shuts_gradients_out():
    pair = Pair()
    guide = pair.guide
    pair.guide = lambda x: torch.no_grad()(guide)(x)
    refuse(pair, "utility of the encoder doesn't depend on its parameters.*encoder")


def test_labels_that_the_guide_observes_itself():
    """Written as for SVI: labelled batches observe an auxiliary site of the guide."""
    logits = nn.Linear(2, 3)

    def model(x, y=None):
        loc = pyro.param("loc", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
            pyro.sample("x", dist.Normal(loc[y], 1.0).to_event(1), obs=x)

    def guide(x, y=None):
        pyro.module("logits", logits)
        law = dist.Categorical(logits=logits(x))
        with pyro.plate("data", len(x)):
            if y is None:
                pyro.sample("y", law)
            else:
                pyro.sample("y_data", law, obs=y, infer={"is_auxiliary": True})

    with torch.no_grad():
        logits.weight.zero_()
        logits.bias.zero_()
    y = torch.tensor([0, 1, 2])
    scale = -torch.tensor(3.0).log().item() * len(X)
    for supervise, terms in ((True, 2), (False, 1)):
        utility = SymmetricUtility(supervise_encoder=supervise)
        assert utility.loss(model, guide, X, y).encoder == pytest.approx(terms * scale)
        assert utility.loss(model, guide, X).encoder == pytest.approx(scale)


def test_guide_without_latents():
    pair = Pair()

    def model(x):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", pair.likelihood(x[:, :1]), obs=x)

    def guide(x):
        pyro.module("encoder", pair.encoder)
        pair.encoder(x)

    pair.model, pair.guide = model, guide
    refuse(pair, "The guide samples no latent of the model")


def test_model_without_data():
    pair = Pair()

    def model(z):
        pyro.module("decoder", pair.decoder)
        with pyro.plate("data", len(z)):
            pyro.sample("z", pair.prior, obs=z)

    def guide(z):
        pyro.module("encoder", pair.encoder)
        with pyro.plate("data", len(z)):
            pyro.sample("z", pair.posterior(torch.ones(len(z), 2)))

    pair.model, pair.guide = model, guide
    refuse(pair, "observes no site that the guide lacks", X[:, :1])


def test_observed_sites_that_change_from_run_to_run():
    pair = Pair()
    runs = []

    def after_z(z):
        runs.append(None)
        if len(runs) % 2:
            pyro.sample("odd", dist.Normal(z.squeeze(-1), 1.0), obs=X[:, 0])

    pair.after_z = after_z
    refuse(pair, "observe|No argument", bind=lambda t, a, k: ((t.nodes["x"]["value"],), k))


class Partial(PyroModule):
    """x may be missing, z1 and z2 may be given."""

    def __init__(self):
        super().__init__()
        self.d = nn.Linear(1, 1)
        self.e = nn.Linear(1, 1)
        self.f = nn.Linear(2, 1)

    def model(self, x=None, z1=None, z2=None):
        pyro.module("d", self.d)
        n = next(len(v) for v in (x, z1, z2) if v is not None)
        with pyro.plate("data", n):
            a = pyro.sample("z1", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=z1)
            b = pyro.sample("z2", dist.Normal(self.d(a), 1.0).to_event(1), obs=z2)
            pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)

    def guide(self, x=None, z1=None, z2=None):
        pyro.module("e", self.e)
        pyro.module("f", self.f)
        with pyro.plate("data", len(x)):
            a = pyro.sample("z1", dist.Normal(self.e(x), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(self.f(torch.cat([x, a], -1)), 1.0).to_event(1))


def test_missing_data_with_missing_latents():
    pair = Partial()
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    z = torch.randn(4, 1)
    assert symeq.step(z1=z, z2=2 * z).encoder < 0
    assert symeq.step(None, z, 2 * z).encoder < 0
    with pytest.raises(ValueError, match=r"lacks \['x'\] and doesn't give \['z2'\]"):
        symeq.step(z1=z)


def test_one_of_two_kinds_of_data_may_be_missing():
    """What is missing is neither scored nor dreamed into the guide, which sees None as ever."""
    net = nn.Linear(1, 1)
    seen = []

    def model(x, w=None):
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)
            pyro.sample("w", dist.Normal(z, 1.0), obs=w)

    def guide(x, w=None):
        pyro.module("net", net)
        seen.append(w)
        both = x if w is None else x + w
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(both[:, None]).squeeze(-1), 1.0))

    x = torch.randn(3)
    symeq = SymmetricEquilibrium(model, guide, Adam({"lr": 0.0}))
    symeq.step(x)
    assert all(w is None for w in seen)
    seen.clear()
    symeq.step(x, x.clone())
    assert all(w is not None for w in seen)


def test_losses_of_partial_batches_count_what_is_there():
    """At fixed values every term is a number: log p(z) for latents only, no log p(w) without w."""
    pair = Partial()
    z = torch.randn(5, 1)
    loss = SymmetricUtility().loss(pair.model, pair.guide, z1=z, z2=2 * z)
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(z).sum() + normal.log_prob(2 * z - pair.d(z)).sum()
    assert loss.decoder == pytest.approx(expected.item())


class Global(Pair):
    """A pair whose data share a latent."""

    def __init__(self, law):
        super().__init__()
        self.law = law

    def model(self, x):
        pyro.sample("shared", dist.Normal(torch.zeros(()), 1.0))
        super().model(x)

    def guide(self, x):
        pyro.sample("shared", self.law(x))
        super().guide(x)


def test_a_site_with_a_law_of_its_own_is_warned_of():
    """The other site reads the data, so the guide as a whole does not ignore them."""

    def own(x):
        return dist.Normal(pyro.param("loc", torch.tensor(3.0)), 1.0)

    pair = Global(own)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    with pytest.warns(UserWarning, match="'shared' has parameters of its own") as seen:
        symeq.step(X)
    assert seen[0].filename == __file__


LAWS = {
    "of the data": lambda x: dist.Normal(pyro.param("loc", torch.zeros(2)) @ x.mean(0), 1.0),
    "fixed": lambda x: dist.Normal(torch.zeros(()), 1.0),
    "transformed": lambda x: dist.TransformedDistribution(
        dist.Normal(torch.zeros(()), 1.0),
        [dist.transforms.AffineTransform(pyro.param("loc", torch.zeros(2)) @ x.mean(0), 1.0)],
    ),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_other_shared_sites_are_not_warned_of(law):
    pair = Global(law)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1})).step(X)


def test_a_chain_of_latents_is_not_warned_of():
    """q(w | z) sees the data through z alone; its weights are zero at the start."""
    pair, net = Pair(), nn.Linear(1, 1)
    nn.init.zeros_(net.weight)

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pair.model(x)

    def guide(x):
        pair.guide(x)
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("w", dist.Normal(net(pair.drawn), 1.0).to_event(1))

    pair.beside_z = lambda z: setattr(pair, "drawn", z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SymmetricEquilibrium(model, guide, Adam({"lr": 0.1})).step(X)


def test_a_point_in_the_guide_is_refused():
    pair = Pair()
    pair.posterior = lambda x: dist.Delta(pair.encoder(x)).to_event(1)
    refuse(pair, "The guide's site 'z' is a Delta")


@pytest.mark.parametrize("x", [X[:, :1], X[:, None]])
def test_data_that_would_broadcast_against_their_law(x):
    """Each of three rows would be scored under the laws of all."""

    class Narrow(Pair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior)
                law = dist.Normal(self.decoder(z), 1.0).to_event(1)
                if x.dim() == 2:
                    law = dist.Normal(self.decoder(z)[:, 0], 1.0)
                pyro.sample("x", law, obs=x)

        def guide(self, x):
            return super().guide(x.flatten(1).expand(-1, 2))

    refuse(Narrow(), r"The value at site 'x' has shape \(3, 1.* and its law has shape \(3", x)


def test_rows_that_come_twice():
    """Two dreams of one row don't fit into the argument."""

    class Chosen(Pair):
        def model(self, x, rows):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x), subsample=rows) as index:
                z = pyro.sample("z", self.prior)
                law = dist.Normal(self.decoder(z), 1.0).to_event(1)
                pyro.sample("x", law, obs=x[index])

        def guide(self, x, rows):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x), subsample=rows) as index:
                pyro.sample("z", dist.Normal(self.encoder(x[index]), 1.0).to_event(1))

    pair = Chosen()
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    symeq.step(X, torch.tensor([2, 0]))
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    with pytest.raises(ValueError, match="argument 'x' twice at site 'x'.*without replacement"):
        symeq.step(X, torch.tensor([2, 2]))
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Using .torch.compile.module")  # of hooks, called once more
def test_networks_that_are_compiled_stay_so():
    """They run uncompiled on the side, where compiling would use up what the compiler allows."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pair = Pair()
    pair.decoder = torch.compile(pair.decoder, backend=backend)
    pair.encoder = torch.compile(pair.encoder, backend=backend)
    symeq = SymmetricEquilibrium(pair.model, pair.guide, Adam({"lr": 0.1}))
    with pyro.validation_enabled(False):
        symeq.step(X)
        assert len(graphs) == 4  # of two networks, with gradients and without
        for _ in range(10):
            symeq.step(X)
    assert len(graphs) == 4
