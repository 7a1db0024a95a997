r"""What the theory promises, in games whose equilibrium is known.

A game is a pair of utilities of two flat vectors, the decoder's parameters theta and the
encoder's phi. The players climb the field (∇_theta L_p, ∇_phi L_q), whose Jacobian is J.

The library plays a game by noisy steps of size lr: each moves the point by
lr (field + noise) with noise of covariance N. Summing T steps near an equilibrium shows that
the mean of the points visited is off by -J⁻¹ times the mean noise, up to O(1 / (lr T)), so

    Cov[mean of T points - equilibrium] = J⁻¹ N J⁻ᵀ / T,

whether the players move in turn or at once. This is where the tolerances for trained pairs come
from: five standard errors. The curvature of the field adds a bias of order lr N, which was
measured over many seeds: below 0.8 standard errors with the numbers of rows and steps used here.
So each compared number fails by chance less than once in 30 000, and most of them once in 1.7
million.
"""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.optim import SGD

from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
from tests.montecarlo import assert_mean
from tests.test_utility import Recorder

SIGMAS = 5.0
UPDATES = ["alternating", "simultaneous"]


def field(game, theta, phi, create_graph=False):
    """∇_theta L_p with phi fixed and ∇_phi L_q with theta fixed; rows of points if given rows."""
    if not create_graph:
        theta, phi = theta.detach().requires_grad_(), phi.detach().requires_grad_()
    by_decoder = torch.autograd.grad(
        game.decoder(theta, phi).sum(), theta, create_graph=create_graph
    )
    by_encoder = torch.autograd.grad(
        game.encoder(theta, phi).sum(), phi, create_graph=create_graph
    )
    return by_decoder[0], by_encoder[0]


def jacobian(game, theta, phi):
    """The Jacobian of the field at a point, by second derivatives of the utilities."""

    def flat(point):
        halves = point.split([len(theta), len(phi)])
        return torch.cat(field(game, *halves, create_graph=True))

    return torch.autograd.functional.jacobian(flat, torch.cat([theta, phi]))


def ascend(game, thetas, phis, lr, updates, max_steps=4_000):
    """Climbs the exact field from each row of thetas and phis until it is zero."""
    for _ in range(max_steps):
        by_decoder, by_encoder = field(game, thetas, phis)
        if max(by_decoder.abs().max(), by_encoder.abs().max()) < 1e-12:
            break
        thetas = thetas + lr[0] * by_decoder
        if updates == "alternating":
            by_encoder = field(game, thetas, phis)[1]
        phis = phis + lr[1] * by_encoder
    return thetas, phis


def mean_point(step, names, steps, burn_in):
    """The mean of the unconstrained parameters over the steps after a burn-in."""
    for _ in range(burn_in):
        step()
    total = 0.0
    for _ in range(steps):
        step()
        total = total + unconstrained(names)
    return total / steps


def leaves(names):
    return [pyro.param(name).unconstrained() for name in names]


def unconstrained(names):
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves(names)])


def assert_arrived(point, equilibrium, jacobian, noise, steps):
    """Compares the mean of a path with the equilibrium, within the standard errors above."""
    inverse = jacobian.inverse()
    standard_error = (inverse @ noise @ inverse.T / steps).diagonal().sqrt()
    sigmas = (point - equilibrium).abs() / standard_error
    assert (sigmas < SIGMAS).all(), f"off by {sigmas.max():.3g} standard errors"


# ------------------------------------------------------------------------- Proposition 1

STATES = 4  # of x and of z


@dataclass
class Lifted:
    r"""The game of eqs. 13 to 15 on a finite space, by enumeration.

    p_u(x, z) = π(z) exp[⟨φ(x, z), u⟩ - A(u)] and q_v(x, z) = π(x) exp[⟨ψ(x, z), v⟩ - B(v)]
    are joint laws of (x, z). Rows of the tables are x, columns are z.
    """

    phi: torch.Tensor
    psi: torch.Tensor
    log_pi_x: torch.Tensor
    log_pi_z: torch.Tensor

    def log_p(self, u):
        scores = self.log_pi_z + torch.einsum("xzn,...n->...xz", self.phi, u)
        return scores - scores.logsumexp((-2, -1), keepdim=True)

    def log_q(self, v):
        scores = self.log_pi_x[:, None] + torch.einsum("xzn,...n->...xz", self.psi, v)
        return scores - scores.logsumexp((-2, -1), keepdim=True)

    def decoder(self, u, v):
        return (self.log_q(v).exp() * self.log_p(u)).sum((-2, -1))

    def encoder(self, u, v):
        return (self.log_p(u).exp() * self.log_q(v)).sum((-2, -1))


def random_lifted(seed, dims):
    pyro.set_rng_seed(seed)
    return Lifted(
        phi=torch.randn(STATES, STATES, dims[0]),
        psi=torch.randn(STATES, STATES, dims[1]),
        log_pi_x=torch.randn(STATES).log_softmax(0),
        log_pi_z=torch.randn(STATES).log_softmax(0),
    )


def equilibrium(game, updates="alternating", starts=8):
    """Where the exact ascent ends from random starts: one row for each."""
    u = 2 * torch.randn(starts, game.phi.shape[-1])
    v = 2 * torch.randn(starts, game.psi.shape[-1])
    return ascend(game, u, v, (0.5, 0.5), updates)


def moments(weights, statistic):
    return torch.einsum("xz,xzn->n", weights, statistic)


def covariance(weights, statistic):
    mean = moments(weights, statistic)
    return torch.einsum("xz,xzn,xzm->nm", weights, statistic, statistic) - torch.outer(mean, mean)


LIFTED = [(0, (2, 2)), (1, (2, 2)), (2, (3, 2)), (3, (3, 3))]


@pytest.mark.parametrize("updates", UPDATES)
@pytest.mark.parametrize(("seed", "dims"), LIFTED)
def test_ascent_reaches_one_equilibrium_from_everywhere(seed, dims, updates):
    game = random_lifted(seed, dims)
    points = torch.cat(equilibrium(game, updates), dim=-1)
    torch.testing.assert_close(points, points[:1].expand_as(points), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("seed", "dims"), LIFTED)
def test_moments_match_at_the_equilibrium(seed, dims):
    """Eq. 22: ∇_u L_p = E_q[φ] - E_p[φ] is zero there, and likewise ∇_v L_q = E_p[ψ] - E_q[ψ]."""
    game = random_lifted(seed, dims)
    u, v = (rows[0] for rows in equilibrium(game, starts=1))
    p, q = game.log_p(u).exp(), game.log_q(v).exp()
    for statistic in (game.phi, game.psi):
        torch.testing.assert_close(
            moments(p, statistic), moments(q, statistic), rtol=0, atol=1e-11
        )
    # Each player's moments elsewhere differ from the other's by its gradient.
    u, v = torch.randn_like(u), torch.randn_like(v)
    p, q = game.log_p(u).exp(), game.log_q(v).exp()
    g_u, g_v = field(game, u, v)
    torch.testing.assert_close(g_u, moments(q - p, game.phi), rtol=0, atol=1e-12)
    torch.testing.assert_close(g_v, moments(p - q, game.psi), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("seed", "dims"), LIFTED)
def test_no_player_gains_by_moving_alone(seed, dims):
    game = random_lifted(seed, dims)
    u, v = (rows[0] for rows in equilibrium(game, starts=1))
    for size in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        u_moved, v_moved = (x + size * torch.randn(200, len(x)) for x in (u, v))
        assert (game.decoder(u_moved, v) < game.decoder(u, v)).all()
        assert (game.encoder(u, v_moved) < game.encoder(u, v)).all()


@pytest.mark.parametrize(("seed", "dims"), LIFTED)
def test_equilibrium_is_concave_and_stable(seed, dims):
    """The symmetrised Jacobian is negative definite: Rosen's condition, at the equilibrium."""
    game = random_lifted(seed, dims)
    u, v = (rows[0] for rows in equilibrium(game, starts=1))
    J = jacobian(game, u, v)
    of_decoder, of_encoder = J[: len(u), : len(u)], J[len(u) :, len(u) :]  # ∇²_u L_p, ∇²_v L_q
    assert torch.linalg.eigvalsh(of_decoder).max() < 0
    assert torch.linalg.eigvalsh(of_encoder).max() < 0
    assert torch.linalg.eigvalsh(J + J.T).max() < 0
    torch.testing.assert_close(-of_decoder, covariance(game.log_p(u).exp(), game.phi))
    torch.testing.assert_close(-of_encoder, covariance(game.log_q(v).exp(), game.psi))


def far_apart():
    """A game of two stable equilibria, though both players are as in Proposition 1.

    x has four values and z = ±1; φ = z a(x), ψ = z b(x), with a large at x = 0, where almost all
    of π(x) is, and b large elsewhere. At u = v = 0 the moments match, by symmetry in z. There

        J = [[-Var_p φ, Cov_q(φ, ψ)], [Cov_p(φ, ψ), -Var_q ψ]]

    has Var_p φ = 0.37, Var_q ψ = 0.236 and both covariances 0.4: a negative determinant.
    """
    z = torch.tensor([1.0, -1.0])
    a, b = torch.tensor([1.0, 0.4, 0.4, 0.4]), torch.tensor([0.4, 1.0, 1.0, 1.0])
    return Lifted(
        phi=torch.outer(a, z)[..., None],
        psi=torch.outer(b, z)[..., None],
        log_pi_x=torch.tensor([0.91, 0.03, 0.03, 0.03]).log(),
        log_pi_z=torch.tensor([0.5, 0.5]).log(),
    )


@pytest.mark.parametrize("updates", UPDATES)
def test_equilibria_may_be_several_where_the_players_are_far_apart(updates):
    """The limit of Proposition 1: uniqueness needs p and q that are not too different.

    Its proof applies Rosen's theorems to the dual game, whose constraints couple the players:
    each has multipliers for its own constraints only, which these theorems do not cover.
    """
    game = far_apart()
    at_zero = jacobian(game, torch.zeros(1), torch.zeros(1))
    assert torch.cat(field(game, torch.zeros(1), torch.zeros(1))).abs().max() < 1e-15
    torch.testing.assert_close(at_zero, torch.tensor([[-0.37, 0.4], [0.4, -0.2356]]))
    assert torch.linalg.eigvals(at_zero).real.max() > 0.1

    start = torch.tensor([[0.1], [-0.1]])
    u, v = ascend(game, start, start, (0.5, 0.5), updates)
    torch.testing.assert_close(torch.cat([u[0], v[0]]), -torch.cat([u[1], v[1]]))
    for row in (0, 1):
        assert torch.cat(field(game, u[row], v[row])).abs().max() < 1e-12
        assert u[row].abs() > 1
        assert torch.linalg.eigvals(jacobian(game, u[row], v[row])).real.max() < 0


def test_equilibria_come_in_families_where_the_players_share_statistics():
    """With φ = ψ the gradients are opposite: u + v stays as it was at the start."""
    game = random_lifted(0, (2, 2))
    game.psi = game.phi
    starts = torch.randn(2, 8, 2)
    u, v = ascend(game, *starts, (0.5, 0.5), "simultaneous")
    assert torch.cat(field(game, u, v)).abs().max() < 1e-11
    torch.testing.assert_close(u + v, starts.sum(0))
    assert (u[1:] - u[0]).norm(dim=-1).min() > 0.1


# ------------------------------------------------------- the lifted game, played by the library

ROWS = 1_000
X_COUNTS = torch.tensor([400, 300, 200, 100])  # π(x) times ROWS


def playable(seed):
    """A lifted game whose encoder is a guide.

    A guide is normalised given x, q_v of eq. 14 over (x, z). The two agree if
    ψ(x, z) = f(σ_x(z)) with a permutation σ_x for each x: then Σ_z exp⟨ψ(x, z), v⟩ does not
    depend on x, so that q_v(x) = π(x) for all v.
    """
    game = random_lifted(seed, (2, 2))
    f = torch.randn(STATES, 2)
    game.psi = torch.stack([f[torch.randperm(STATES)] for _ in range(STATES)])
    game.log_pi_x = (X_COUNTS / ROWS).log()
    return game


def programs(game, u, v):
    """The lifted laws as programs: p(z) ∝ π(z) Σ_x exp⟨φ, u⟩, p(x | z) ∝ exp⟨φ, u⟩."""

    def model(x):
        scores = game.phi @ pyro.param("u", u)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=game.log_pi_z + scores.logsumexp(0)))
            pyro.sample("x", dist.Categorical(logits=scores.T[z]), obs=x)

    def guide(x):
        scores = game.psi @ pyro.param("v", v)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=scores[x]))

    return model, guide


def by_module(model, guide, x, lr):
    """Both players move at once, by a torch optimiser."""
    loss = SymmetricUtility()(model, guide)
    with torch.no_grad():
        loss(x)
    optim = torch.optim.SGD(leaves(["u", "v"]), lr)

    def step():
        optim.zero_grad()
        loss(x).backward()
        optim.step()

    return step


def by_step(updates):
    def make(model, guide, x, lr):
        symeq = SymmetricEquilibrium(model, guide, SGD({"lr": lr}), updates=updates)
        return lambda: symeq.step(x)

    return make


ROUTES = {**{updates: by_step(updates) for updates in UPDATES}, "module": by_module}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_library_trains_a_lifted_pair_to_the_enumerated_equilibrium(route):
    """A batch holds each x as often as π(x) says, so z alone is random in the wake pass.

    The noise of a mean gradient is then E_π(x) Cov_q(z|x)[φ] / ROWS for the decoder, and
    Cov_p[ψ] / ROWS for the encoder.
    """
    game = playable(seed=4)
    u, v = (rows[0] for rows in equilibrium(game))
    p, q = game.log_p(u).exp(), game.log_q(v).exp()
    torch.testing.assert_close(q.sum(1), X_COUNTS / ROWS)

    x = torch.arange(STATES).repeat_interleave(X_COUNTS)
    model, guide = programs(game, u + 1.0, v - 1.0)
    step = ROUTES[route](model, guide, x, lr=0.5 / ROWS)
    steps = 400
    point = mean_point(step, ["u", "v"], steps, burn_in=100)

    wake = sum(
        count / ROWS * covariance(row / row.sum(), statistic)
        for count, row, statistic in zip(X_COUNTS, q.split(1), game.phi.split(1), strict=True)
    )
    noise = torch.block_diag(wake, covariance(p, game.psi)) / ROWS
    assert_arrived(point, torch.cat([u, v]), jacobian(game, u, v), noise, steps)


# ---------------------------------------------------------------------- a linear-Gaussian pair

W = torch.tensor([1.2, -1.0, 0.8], dtype=torch.float64)
B = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
S = torch.tensor([1.0, 0.9, 1.1], dtype=torch.float64)
LEARNING_RATES = (0.25, 0.05)  # of decoder and encoder
NAMES = {"decoder": ["W", "b", "s"], "encoder": ["a", "c", "t"]}
MIRROR = torch.tensor([-1.0] * 3 + [1.0] * 6, dtype=torch.float64)  # of theta, W -> -W
MIRROR_PHI = torch.tensor([-1.0] * 4 + [1.0], dtype=torch.float64)  # of phi, (a, c) -> -(a, c)


def joint_covariance(w, s):
    """Cov[x] of p: W Wᵀ + diag(s²)."""
    return torch.outer(w, w) + torch.diag(s**2)


def posterior(theta):
    """The exact p(z | x) = N(aᵀ x + c, t²) of a decoder, as phi = (a, c, log t).

    With C = W Wᵀ + diag(s²): a = C⁻¹ W, c = -aᵀ b, t² = 1 - Wᵀ C⁻¹ W.
    """
    w, b, log_s = theta.split(3)
    a = torch.linalg.solve(joint_covariance(w, log_s.exp()), w)
    return torch.cat([a, torch.stack([-a @ b, (1 - w @ a).log() / 2])])


THETA = torch.cat([W, B, S.log()])
PHI = posterior(THETA)


class Gaussian:
    r"""Factor analysis with one factor and a linear encoder; the utilities in closed form.

    p: z ~ N(0, 1), x | z ~ N(W z + b, diag(s²)); q: z | x ~ N(aᵀ x + c, t²); data
    x ~ N(m, Σ). Unconstrained: theta = (W, b, log s), phi = (a, c, log t). One factor of three
    observed dimensions can be identified up to the sign of (W, a, c).
    """

    mean = B
    covariance = joint_covariance(W, S)

    def decoder(self, theta, phi):
        r"""L_p, by the moments of x ~ data, z | x ~ q.

        μ = E z = aᵀ m + c, V = Var z = aᵀ Σ a + t², k = Cov(x, z) = Σ a, so

            E z² = V + μ²,
            E (x_i - W_i z - b_i)² = (m_i - W_i μ - b_i)² + Σ_ii - 2 W_i k_i + W_i² V.

        Constants in theta and phi are left out.
        """
        w, b, log_s = theta.split(3, dim=-1)
        a, c, log_t = phi.split([3, 1, 1], dim=-1)
        mu = a @ self.mean[:, None] + c
        k = a @ self.covariance
        variance = (a * k).sum(-1, keepdim=True) + (2 * log_t).exp()
        residual = (self.mean - w * mu - b) ** 2 + self.covariance.diagonal()
        residual = residual - 2 * w * k + w**2 * variance
        log_x = -log_s - residual / (2 * (2 * log_s).exp())
        return log_x.sum(-1) - (variance + mu**2).sum(-1) / 2

    def encoder(self, theta, phi):
        r"""L_q, by the moments of (x, z) ~ p: E z = 0, Var z = 1, E x = b, Cov(x, z) = W.

        With Cov x = W Wᵀ + diag(s²),

            E (z - aᵀ x - c)² = (aᵀ b + c)² + 1 - 2 aᵀ W + (aᵀ W)² + Σ_i a_i² s_i².
        """
        w, b, log_s = theta.split(3, dim=-1)
        a, c, log_t = phi.split([3, 1, 1], dim=-1)
        a_b, a_w = ((a * other).sum(-1, keepdim=True) for other in (b, w))
        noise = (a**2 * (2 * log_s).exp()).sum(-1, keepdim=True)
        residual = (a_b + c) ** 2 + (1 - a_w) ** 2 + noise
        return (-log_t - residual / (2 * (2 * log_t).exp())).sum(-1)

    def data(self, rows):
        return dist.MultivariateNormal(self.mean, self.covariance).sample((rows,))


def gaussian_programs(theta, phi):
    """The pair as Pyro programs that start at a point; their scales are constrained."""
    w0, b0, log_s0 = theta.split(3)
    a0, c0, log_t0 = phi[:3], phi[3], phi[4]

    def model(x):
        w, b = pyro.param("W", w0), pyro.param("b", b0)
        s = pyro.param("s", log_s0.exp(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None] * w + b, s).to_event(1), obs=x)

    def guide(x):
        a, c = pyro.param("a", a0), pyro.param("c", c0)
        t = pyro.param("t", log_t0.exp(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ a + c, t))

    return model, guide


def pushed(theta, phi, by, seed=0):
    """Moves a pair away, always the same way: steps of fixed size are unstable at small t."""
    randomness = torch.Generator().manual_seed(seed)
    push = by * torch.randn(len(theta) + len(phi), generator=randomness)
    return theta + push[: len(theta)], phi + push[len(theta) :]


def test_true_pair_is_an_equilibrium():
    """At theta* and its exact posterior both joint laws are one, and both gradients are zero."""
    for theta, phi in ((THETA, PHI), (MIRROR * THETA, MIRROR_PHI * PHI)):
        assert torch.cat(field(Gaussian(), theta, phi)).abs().max() < 1e-13


def test_consistent_equilibrium_is_stable():
    """There J = -D Cov[scores] D, D = diag(1, -1), of the scores ∇ log p(x, z), ∇ log q(z | x).

    It is symmetric, and negative definite where x identifies the decoder: uniqueness nearby,
    for any family.
    """
    J = jacobian(Gaussian(), THETA, PHI)
    torch.testing.assert_close(J, J.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(J).max() < -0.05


POINTS = {"at the true pair": 0.0, "pushed away": 0.3}


@pytest.mark.parametrize("by", POINTS.values(), ids=POINTS.keys())
@pytest.mark.parametrize("updates", UPDATES)
def test_mean_gradient_of_the_library_is_the_closed_form(updates, by):
    theta, phi = pushed(THETA, PHI, by)
    game, rows = Gaussian(), 50
    recorders = Recorder(), Recorder()
    symeq = SymmetricEquilibrium(*gaussian_programs(theta, phi), recorders, updates=updates)
    draws = []
    for _ in range(300):
        symeq.step(game.data(rows))
        seen = recorders[0].seen | recorders[1].seen
        names = NAMES["decoder"] + NAMES["encoder"]
        draws.append(torch.cat([seen[leaf].reshape(-1) for leaf in leaves(names)]))
    assert_mean(-torch.stack(draws) / rows, torch.cat(field(game, theta, phi)))


def test_best_response_of_the_encoder_is_the_exact_posterior():
    """∇_phi L_q is zero at the exact p(z | x), also of a decoder that is off the data."""
    for seed in range(10):
        theta, phi = pushed(THETA, PHI, 0.5, seed)
        exact = posterior(theta)
        assert field(Gaussian(), theta, exact)[1].abs().max() < 1e-12
        assert torch.linalg.eigvalsh(jacobian(Gaussian(), theta, exact)[9:, 9:]).max() < 0
        assert Gaussian().encoder(theta, phi) < Gaussian().encoder(theta, exact)


@pytest.mark.slow
def test_library_finds_the_best_response_to_a_frozen_decoder():
    """The dreams follow the encoder's law at the answer: noise of Fisher's information, N = -J."""
    game, rows, steps = Gaussian(), 2_000, 400
    theta, phi = pushed(THETA, PHI, 0.3)
    optims = SGD({"lr": 0.0}), SGD({"lr": 0.03 / rows})
    symeq = SymmetricEquilibrium(*gaussian_programs(theta, phi), optims)
    x = game.data(rows)
    point = mean_point(lambda: symeq.step(x), NAMES["encoder"], steps, burn_in=150)

    exact = posterior(theta)
    information = -jacobian(game, theta, exact)[9:, 9:]
    assert_arrived(point, exact, -information, information / rows, steps)
    torch.testing.assert_close(unconstrained(NAMES["decoder"]), theta, rtol=0, atol=1e-14)


@pytest.mark.parametrize("updates", UPDATES)
def test_closed_form_dynamics_come_back(updates):
    """From either side of the sign symmetry, to the equilibrium of that side."""
    starts = [pushed(THETA, PHI, 0.3, seed) for seed in range(6)]
    starts += [(MIRROR * theta, MIRROR_PHI * phi) for theta, phi in starts]
    theta, phi = (torch.stack(rows) for rows in zip(*starts, strict=True))
    theta, phi = ascend(Gaussian(), theta, phi, LEARNING_RATES, updates)
    theta[6:], phi[6:] = MIRROR * theta[6:], MIRROR_PHI * phi[6:]
    torch.testing.assert_close(theta, THETA.expand_as(theta), rtol=0, atol=1e-8)
    torch.testing.assert_close(phi, PHI.expand_as(phi), rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("updates", UPDATES)
def test_library_comes_back(updates):
    """Data are drawn anew for each step; N = diag(F_p, F_q), the diagonal blocks of -J."""
    game, rows, steps = Gaussian(), 1_500, 800
    theta, phi = pushed(THETA, PHI, 0.3)
    optims = tuple(SGD({"lr": lr / rows}) for lr in LEARNING_RATES)
    symeq = SymmetricEquilibrium(*gaussian_programs(theta, phi), optims, updates=updates)
    names = NAMES["decoder"] + NAMES["encoder"]
    point = mean_point(lambda: symeq.step(game.data(rows)), names, steps, burn_in=300)

    J = jacobian(game, THETA, PHI)
    noise = -torch.block_diag(J[:9, :9], J[9:, 9:]) / rows
    assert_arrived(point, torch.cat([THETA, PHI]), J, noise, steps)
