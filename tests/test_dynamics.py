r"""The formulas of docs/dynamics.md: how a pair leaves the collapsed equilibrium.

At that equilibrium p(x | z) = p(x) and q(z | x) = p(z). The gains of decoder and encoder, W and
V, are zero there. The formulas are held against the library, whose mean gradients must be those
of the closed forms, and against gradient ascent on the closed forms.
"""

import importlib.util
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.optim import SGD
from torch.autograd.functional import jacobian
from torch.nn.functional import logsigmoid

from pyro_symeq import SymmetricEquilibrium, SymmetricUtility
from tests.montecarlo import assert_mean

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "dynamics.py"
RATES = [(1.0, 1.0), (0.3, 2.0), (5.0, 0.2)]  # learning rates of decoder and encoder


def escape_rates(alpha, beta, rho):
    """The roots of (r + alpha) (r + beta) = alpha beta rho, the larger one first."""
    root = math.sqrt((alpha - beta) ** 2 + 4 * alpha * beta * rho)
    return (-(alpha + beta) + root) / 2, (-(alpha + beta) - root) / 2


def eigenvalues(matrix):
    values = torch.linalg.eigvals(matrix)
    assert values.imag.abs().max() < 1e-9
    return values.real.sort().values


# ---------------------------------------------------------------------- linear-Gaussian pairs


def positive_definite(*variances, seed=0):
    """A covariance matrix with these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    size = len(variances), len(variances)
    vectors = torch.linalg.qr(torch.randn(size, generator=generator)).Q
    return vectors @ torch.diag(torch.tensor(variances)) @ vectors.T, vectors


@dataclass
class Gaussian:
    """z ~ N(0, I), x | z ~ N(W z, diag(s²)), q(z | x) = N(V x, diag(t²)), data of covariance C.

    A point is the vector of W, log s, V and log t.
    """

    C: torch.Tensor
    num_latents: int

    def __post_init__(self):
        d, k = len(self.C), self.num_latents
        self.sizes = [d * k, d, k * d, k]

    def unpack(self, point):
        W, log_s, V, log_t = point.split(self.sizes)
        d, k = len(self.C), self.num_latents
        return W.view(d, k), log_s, V.view(k, d), log_t

    def collapsed(self, variances):
        W, log_s, V, log_t = (torch.zeros(size) for size in self.sizes)
        return torch.cat([W, log_s + variances.log() / 2, V, log_t])

    def gradients(self, point):
        r"""∇ L_p in W and log s, ∇ L_q in V and log t.

        With D = diag(s²), S = diag(t²):

            ∇_W = D⁻¹ (C Vᵀ - W (V C Vᵀ + S)),    ∇_V = S⁻¹ (Wᵀ - V (W Wᵀ + D)),

        and each log-scale compares a mean square error with its variance.
        """
        W, log_s, V, log_t = self.unpack(point)
        noise, variance = (2 * log_s).exp(), (2 * log_t).exp()
        z_z = V @ self.C @ V.T + torch.diag(variance)
        x_z = self.C @ V.T
        of_W = (x_z - W @ z_z) / noise[:, None]
        error = (self.C - x_z @ W.T - W @ x_z.T + W @ z_z @ W.T).diagonal()
        of_V = (W.T - V @ (W @ W.T + torch.diag(noise))) / variance[:, None]
        missing = torch.eye(self.num_latents) - V @ W
        missed = (missing @ missing.T + V @ torch.diag(noise) @ V.T).diagonal()
        parts = of_W.reshape(-1), error / noise - 1, of_V.reshape(-1), missed / variance - 1
        return torch.cat(parts)

    def field(self, a, b, learned=("W", "s", "V", "t")):
        """The velocity at a point, for rates a and b; what isn't learned stays."""
        names, player = ("W", "s", "V", "t"), (a, a, b, b)
        rates = [rate * (name in learned) for name, rate in zip(names, player, strict=True)]
        rates = torch.tensor(rates).repeat_interleave(torch.tensor(self.sizes))
        return lambda point: rates * self.gradients(point)

    def programs(self, point, learn_noise=True):
        W0, log_s0, V0, log_t0 = self.unpack(point)

        def model(x):
            W = pyro.param("W", W0.clone())
            s = log_s0.exp()
            if learn_noise:
                s = pyro.param("s", s, constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                prior = torch.zeros(self.num_latents)
                z = pyro.sample("z", dist.Normal(prior, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ W.T, s).to_event(1), obs=x)

        def guide(x):
            V = pyro.param("V", V0.clone())
            t = pyro.param("t", log_t0.exp(), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ V.T, t).to_event(1))

        return model, guide

    def data(self, rows, exact=False):
        """Rows of covariance C, or of exactly that second moment."""
        x = torch.randn(rows, len(self.C))
        if exact:
            x = torch.linalg.solve_triangular(
                torch.linalg.cholesky(x.T @ x / rows), x.T, upper=False
            ).T
        return x @ torch.linalg.cholesky(self.C).T


def mean_gradients(model, guide, names, data, draws, rows):
    """Draws of the library's gradients of L_p and L_q, by its module: both players at once."""
    loss = SymmetricUtility()(model, guide)
    with torch.no_grad():
        loss(data(rows))
    leaves = [pyro.param(name).unconstrained() for name in names]
    for _ in range(draws):
        gradients = torch.autograd.grad(loss(data(rows)), leaves)
        yield -torch.cat([gradient.reshape(-1) for gradient in gradients]) / rows


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_gaussian_gradients_are_those_of_the_library(size):
    """13 comparisons at 5 standard errors: one false alarm in 100 000 runs."""
    game = Gaussian(positive_definite(2.0, 0.7)[0], 2)
    point = game.collapsed(torch.tensor([0.8, 1.3]))
    point = point + size * torch.randn(len(point))
    draws = mean_gradients(
        *game.programs(point), ["W", "s", "V", "t"], game.data, draws=300, rows=60
    )
    assert_mean(torch.stack(list(draws)), game.gradients(point))


@pytest.mark.parametrize(("a", "b"), RATES)
@pytest.mark.parametrize("num_latents", [1, 3])
@pytest.mark.parametrize("noise", [0.3, 0.9, 2.5])
def test_gaussian_rates_of_escape(noise, num_latents, a, b):
    """Each eigenvalue of C has its two rates, as often as there are latents."""
    variances = (2.0, 0.7, 0.4)
    game = Gaussian(positive_definite(*variances)[0], num_latents)
    point = game.collapsed(torch.full((3,), noise))
    J = jacobian(game.field(a, b, learned=("W", "V", "t")), point)
    predicted = [r for lam in variances for r in escape_rates(a / noise, b * noise, lam / noise)]
    scales = [0.0] * 3 + [-2 * b] * num_latents  # s stays, t comes back
    expected = torch.tensor(predicted * num_latents + scales).sort().values
    torch.testing.assert_close(eigenvalues(J), expected, rtol=0, atol=1e-6)
    assert (eigenvalues(J).max() > 1e-6) == (noise < max(variances))


def test_rate_grows_with_both_learning_rates_and_falls_with_the_noise():
    def rate(a, b, noise):
        return escape_rates(a / noise, b * noise, 4.0 / noise)[0]

    for a, b, noise in itertools.product((0.1, 1.0, 10.0), (0.1, 1.0, 10.0), (0.1, 1.0, 3.9)):
        r = rate(a, b, noise)
        assert r < rate(1.1 * a, b, noise) < rate(1.1 * a, 1.1 * b, noise)
        assert rate(a, b, 1.01 * noise) < r
        # The slower player sets a bound.
        assert r < min(a / noise, b * noise) * (4.0 / noise - 1)
    assert rate(1e6, 0.7, 2.0) == pytest.approx(0.7 * (4.0 - 2.0), rel=1e-4)
    assert rate(0.3, 1e6, 2.0) == pytest.approx(0.3 / 2.0 * (4.0 / 2.0 - 1), rel=1e-4)
    assert rate(0.5, 0.5, 1.0) == pytest.approx(0.5 * (4.0**0.5 - 1))


@pytest.mark.parametrize("seed", range(4))
def test_learned_noise_makes_correlations_decide(seed):
    """With s² learned for each dimension, s² = C_ii at collapse, and the matrix is Corr(x).

    The rates of escape are real, and solve det(r² / (ab) + r (D / a + D⁻¹ / b) + I - Corr) = 0.
    """
    a, b, d = 0.5, 1.5, 3
    A = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    C = A @ A.T
    D = C.diagonal()
    game = Gaussian(C, 1)
    assert game.gradients(game.collapsed(D)).abs().max() < 1e-12
    values = eigenvalues(jacobian(game.field(a, b), game.collapsed(D)))
    corr = C / (D[:, None] * D).sqrt()

    def pencil(r):
        return torch.diag(r**2 / (a * b) + r * (D / a + 1 / (D * b)) + 1) - corr

    scales = sum((values + 2 * a).abs() < 1e-9), sum((values + 2 * b).abs() < 1e-9)
    assert scales == (d, 1)
    gains = values[((values + 2 * a).abs() > 1e-9) & ((values + 2 * b).abs() > 1e-9)]
    assert len(gains) == 2 * d
    for r in gains:
        assert torch.linalg.eigvalsh(pencil(r)).abs().min() < 1e-8
    assert values.max() > 0
    independent = Gaussian(torch.diag(D), 1)
    values = eigenvalues(jacobian(independent.field(a, b), independent.collapsed(D)))
    assert values.max() < 1e-6


UPDATES = ["alternating", "simultaneous"]


def growth(alpha, beta, rho, updates):
    """The factor by which a step moves the gains away, for rates alpha and beta of a step.

    If the encoder answers the decoder's new gain, (r + alpha) (r + beta) = alpha beta rho (1 + r).
    """
    if updates == "simultaneous":
        return 1 + escape_rates(alpha, beta, rho)[0]
    p, q = alpha + beta - alpha * beta * rho, alpha * beta * (1 - rho)
    return 1 + (-p + math.sqrt(p**2 - 4 * q)) / 2


@pytest.mark.parametrize("updates", UPDATES)
@pytest.mark.parametrize(
    ("lam", "noise", "a", "b"),
    [(4.0, 1.0, 0.1, 0.1), (4.0, 2.0, 0.2, 0.05), (1.5, 0.5, 0.02, 0.3), (0.6, 1.0, 0.1, 0.2)],
)
def test_ascent_grows_at_the_predicted_rate(lam, noise, a, b, updates):
    """The last case is below the threshold: the gains decay."""
    game = Gaussian(torch.tensor([[lam]]), 1)
    point = game.collapsed(torch.tensor([noise]))
    point = point + torch.tensor([1e-9, 0.0, 1e-9, 0.0])
    by_decoder = game.field(a, 0.0, learned=("W", "t"))
    by_encoder = game.field(0.0, b, learned=("V", "t"))
    path = []
    for _ in range(120):
        first = point + by_decoder(point)
        point = first + by_encoder(first if updates == "alternating" else point)
        path.append(point[2])
    measured = (path[-1] / path[-41]).log() / 40
    factor = growth(a / noise, b * noise, lam / noise, updates)
    assert measured == pytest.approx(math.log(factor), rel=1e-5)
    assert (measured > 0) == (lam > noise)


def test_latents_compete():
    """Around a pair in which the first latent has learned the direction of lam_1.

    The unused latent still leaves along lam_2 at the rate r(lam_2); it does not learn lam_1 too,
    and the used one gives lam_1 up for no smaller direction. Where it holds lam_2 instead, it
    goes over to lam_1.
    """
    noise, a, b = 0.5, 0.7, 1.3
    variances = torch.tensor([3.0, 1.2])
    game = Gaussian(torch.diag(variances), 2)
    for held, other in ((0, 1), (1, 0)):
        lam, lam_other = variances[held].item(), variances[other].item()
        point = game.collapsed(torch.full((2,), noise))
        W, _, V, log_t = game.unpack(point)
        W[held, 0] = math.sqrt(lam - noise)
        V[0, held] = W[held, 0] / lam
        log_t[0] = math.log(noise / lam) / 2
        field = game.field(a, b, learned=("W", "V", "t"))
        assert field(point).abs().max() < 1e-12
        values = eigenvalues(jacobian(field, point))
        alpha = a / noise
        for expected in (
            *escape_rates(alpha, b * noise, lam_other / noise),  # the unused latent, other
            *escape_rates(alpha, b * lam, noise / lam),  # the unused latent, held
            *escape_rates(alpha, b * lam, lam_other / lam),  # the used latent, other
        ):
            assert (values - expected).abs().min() < 1e-9
        assert (escape_rates(alpha, b * lam, lam_other / lam)[0] > 0) == (held == 1)


@pytest.mark.slow
def test_library_leaves_along_the_predicted_direction_at_the_predicted_time():
    r"""Steps of the library from a small gain, until it is six times larger.

    In the eigendirections of C, let A_t be the amplitude along the unstable direction of the
    alternating steps, the gains of latent j being (w, v)_t. A step is A' = m A + noise; the noise
    has covariance a² lam / s⁴ for w, and b² s² for v, over the number of rows. It follows that
    A_t / m^t has the variance sum_t m^(-2 t - 2) Var[noise]. Five standard errors, 15
    and 19 % of it, are allowed around what steps without noise give, which is m^t less 5 % for
    the curvature at the gains in the end, v = 0.13 and w = 0.29. The ratio w / v has a standard
    error of 1 %; five are allowed. Four comparisons: one false alarm in 400 000 runs.
    """
    variances, noise, a, b, rows, steps = (4.0, 1.5, 0.3), 1.0, 0.1, 0.05, 40_000, 25
    C, vectors = positive_definite(*variances)
    game = Gaussian(C, 2)
    alpha, beta = a / noise, b * noise
    m = growth(alpha, beta, 4.0 / noise, "alternating")

    # One step is a matrix: first w' = w + alpha (lam v - w), then v' = v + b w' - beta v.
    decoder = torch.tensor([[1 - alpha, alpha * 4.0], [0.0, 1.0]])
    encoder = torch.tensor([[1.0, 0.0], [b, 1 - beta]])
    step_matrix = encoder @ decoder
    values, right = torch.linalg.eig(step_matrix)
    top = values.real.argmax()
    assert values.real[top].item() == pytest.approx(m)
    unstable = right.real[:, top] / right.real[1, top]  # (w / v, 1)
    assert unstable[0].item() == pytest.approx(alpha * 4.0 / (m - 1 + alpha))
    dual = torch.linalg.inv(right.real)[top] * right.real[1, top]

    point = game.collapsed(torch.full((3,), noise))
    W, _, V, _ = game.unpack(point)
    start = 0.02 * torch.tensor([1.0, -0.8])
    W += torch.outer(vectors[:, 0], 3 * start)
    V += torch.outer(start, vectors[:, 0])

    exact = point
    for _ in range(steps):
        exact = exact + game.field(a, 0.0, learned=("W",))(exact)
        exact = exact + game.field(0.0, b, learned=("V", "t"))(exact)

    optims = SGD({"lr": a / rows}), SGD({"lr": b / rows})
    symeq = SymmetricEquilibrium(*game.programs(point, learn_noise=False), optims)
    x = game.data(rows, exact=True)
    for _ in range(steps):
        symeq.step(x)

    W, V = pyro.param("W").detach(), pyro.param("V").detach()
    gains = torch.stack([vectors[:, 0] @ W, V @ vectors[:, 0]])  # rows w, v; columns latents
    W, _, exact_V, _ = game.unpack(exact)
    exact_gains = torch.stack([vectors[:, 0] @ W, exact_V @ vectors[:, 0]])
    expected, amplitude = dual @ exact_gains / m**steps, dual @ gains / m**steps
    torch.testing.assert_close(expected, dual @ torch.stack([3 * start, start]), rtol=0.07, atol=0)
    noises = torch.diag(torch.tensor([a**2 * 4.0 / noise**2, b**2 * noise]) / rows)
    moved = encoder @ torch.diag(torch.tensor([1.0, 0.0])) + torch.diag(torch.tensor([0.0, 1.0]))
    variance = dual @ moved @ noises @ moved.T @ dual
    variance = variance * sum(m ** (-2 * t - 2) for t in range(steps))
    tolerance = 5 * variance.sqrt()
    assert (tolerance < 0.2 * expected.abs()).all()
    assert ((amplitude - expected).abs() < tolerance).all()
    assert (V @ vectors[:, 0]).norm() > 0.1
    # Along the predicted direction: w / v, and hardly anything in the other eigendirections.
    torch.testing.assert_close(gains[0] / gains[1], unstable[:1].expand(2), rtol=0.05, atol=0)
    assert (V @ vectors[:, 1:]).norm() < 0.05 * (V @ vectors[:, 0]).norm()


# ------------------------------------------------------------------------------ deeper networks


def layers_field(lam, noise, a, b, depth):
    """Velocities of log-gains of layers of equal gain; w = g^depth, v = h^depth; t² stays at 1.

    Each of w and v moves depth gain^(2 - 2 / depth) times as fast as in the pair of one layer.
    """

    def field(w, v):
        of_w = (lam * v - w * (lam * v**2 + 1)) / noise
        of_v = w - v * (w**2 + noise)
        power = 2 - 2 / depth
        return depth * w.abs() ** power * a * of_w, depth * v.abs() ** power * b * of_v

    return field


def leaving_time(field, w, v, at, precision=2e-3):
    time = torch.zeros_like(v)
    while (inside := v < at).any():
        w_dot, v_dot = field(w, v)
        step = inside * precision / torch.maximum((w_dot / w).abs(), (v_dot / v).abs())
        w, v, time = w + step * w_dot, v + step * v_dot, time + step
    return time


def test_layers_multiply_the_rates_by_their_gains():
    """Gradients of g1, g2 with w = g2 g1 move w (g1² + g2²) times as fast; g1² - g2² stays."""
    lam, noise, a, b, rate = 3.0, 0.8, 0.9, 0.4, 1e-6
    g, h = torch.tensor([0.3, -0.7]), torch.tensor([0.5, 0.2])
    game = Gaussian(torch.tensor([[lam]]), 1)

    def point(g, h):
        return torch.stack([g.prod(), torch.tensor(noise).log() / 2, h.prod(), torch.zeros(())])

    of_w, _, of_v, _ = game.gradients(point(g, h))
    g_next, h_next = g + rate * a * of_w * g.flip(0), h + rate * b * of_v * h.flip(0)
    w_dot, v_dot = (g_next.prod() - g.prod()) / rate, (h_next.prod() - h.prod()) / rate
    torch.testing.assert_close(w_dot, g.square().sum() * a * of_w, rtol=1e-4, atol=0)
    torch.testing.assert_close(v_dot, h.square().sum() * b * of_v, rtol=1e-4, atol=0)
    torch.testing.assert_close(g_next[0] ** 2 - g_next[1] ** 2, g[0] ** 2 - g[1] ** 2)
    equal = torch.tensor([0.5, 0.5])
    w_dot, v_dot = layers_field(lam, noise, a, b, 2)(equal.prod(), equal.prod())
    of_w, _, of_v, _ = game.gradients(point(equal, equal))
    torch.testing.assert_close(w_dot, equal.square().sum() * a * of_w)
    torch.testing.assert_close(v_dot, equal.square().sum() * b * of_v)


@pytest.mark.parametrize(("lam", "noise", "a", "b"), [(4.0, 1.0, 1.0, 1.0), (2.0, 0.5, 0.3, 1.7)])
def test_two_layers_leave_in_a_time_of_one_over_the_gain(lam, noise, a, b):
    """On the ray w / v = (a lam + b s²) / (a + b s²) the velocity of v is 2 kappa v²."""
    kappa = a * b * (lam - noise) / (a + b * noise)
    ray = (a * lam + b * noise * noise) / (a + b * noise)
    ray_by_rates = noise * (a / noise * lam + b * noise) / (a + b * noise)
    assert ray == pytest.approx(ray_by_rates)
    v = torch.tensor([1e-5, 1e-4, 1e-3])
    time = leaving_time(layers_field(lam, noise, a, b, 2), ray * v, v, at=0.02)
    torch.testing.assert_close(time, (1 / v - 1 / 0.02) / (2 * kappa), rtol=0.02, atol=0)
    # From elsewhere, the same within a factor that does not depend on the gain.
    time = leaving_time(layers_field(lam, noise, a, b, 2), 0.1 * v, v, at=0.02)
    torch.testing.assert_close(time[:-1] / time[1:], torch.tensor([10.0, 10.0]), rtol=0.1, atol=0)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_time_to_leave_grows_as_a_power_of_the_gain(depth):
    """The power is 2 - 2 / depth; one layer each takes the logarithm."""
    field = layers_field(4.0, 1.0, 1.0, 1.0, depth)
    v = torch.tensor([1e-6, 1e-5])
    time = leaving_time(field, 2 * v, v, at=0.02)
    assert (time[0] / time[1]).log10().item() == pytest.approx(2 - 2 / depth, rel=0.02)
    one_layer = leaving_time(layers_field(4.0, 1.0, 1.0, 1.0, 1), 2 * v, v, at=0.02)
    torch.testing.assert_close(one_layer, (0.02 / v).log(), rtol=0.01, atol=0)


def test_two_layers_of_opposite_signs_never_leave():
    """Gains of equal layers keep their signs, and with opposite signs both shrink."""
    field = layers_field(4.0, 1.0, 1.0, 1.0, 2)
    w, v, step = torch.tensor(0.05), torch.tensor(-0.1), 0.2
    for _ in range(5_000):
        w_dot, v_dot = field(w, v)
        assert w_dot < 0 < v_dot
        w, v = w + step * w_dot, v + step * v_dot
        assert w > 0 > v
    assert w < 1e-3 and v > -1e-3
    one_layer = layers_field(4.0, 1.0, 1.0, 1.0, 1)
    w, v = torch.tensor(0.05), torch.tensor(-0.1)
    for _ in range(100):
        w_dot, v_dot = one_layer(w, v)
        w, v = w + step * w_dot, v + step * v_dot
    assert w.abs() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 64])
def test_adam_replaces_the_rates_by_signal_to_noise(rows):
    """With noise in command, Adam's rates are lr over the noise's standard deviation.

    That is alpha = lr sqrt(rows / lam), beta = lr s sqrt(rows), so that r grows with the root of
    the batch. Many pairs side by side; the mean amplitude over them has a standard error of 2 %
    at both ends, and Adam's memory and the growing signal cost some per cent more. 15 % are
    allowed; twice or half the rate is far outside.
    """
    lam, noise, lr, pairs, steps = 4.0, 1.0, 4e-4, 25_600 // rows, (250, 700)
    w = torch.zeros(pairs, requires_grad=True)
    v = torch.full((pairs,), 0.02, requires_grad=True)
    optim = torch.optim.Adam([w, v], lr)
    alpha, beta = lr * math.sqrt(rows / lam), lr * math.sqrt(noise * rows)
    r = escape_rates(alpha, beta, lam / noise)[0]
    slope = alpha * lam / (r + alpha)
    left = (r + alpha) * noise / beta  # the left eigenvector is (1, (r + alpha) / b)
    amplitude = []
    for _ in range(steps[1]):
        with torch.no_grad():
            x, z_noise, dream, x_noise = torch.randn(4, rows, pairs)
            x, x_noise = lam**0.5 * x, noise**0.5 * x_noise
            z, x_dream = v * x + z_noise, w * dream + x_noise
            w.grad = -((x - w * z) * z).mean(0) / noise
            v.grad = -((dream - v * x_dream) * x_dream).mean(0)
        optim.step()
        amplitude.append((w.detach() + left * v.detach()).mean() / (slope + left))
    measured = (amplitude[-1] / amplitude[steps[0]]).log() / (steps[1] - 1 - steps[0])
    assert measured.item() == pytest.approx(r, rel=0.15)


# ------------------------------------------------------------------------------------ bit pairs


@dataclass
class Bits:
    """Fair bits z of code c, p(x_i = 1 | z) = σ(b_i + W_i c), q(z_j = 1 | x) = σ(e_j + V_j X).

    The codes c of z and X of x are ±1, or 0 and 1 if not ``centred``. A point is the vector of b,
    W, e and V. ``law`` holds the probabilities of the data, in the order of ``bits(d)``.
    """

    law: torch.Tensor
    num_latents: int = 1
    centred: bool = True

    def __post_init__(self):
        self.d = int(math.log2(len(self.law)))
        k = self.num_latents
        self.x, self.z = bits(self.d), bits(k)
        self.X, self.c = (2 * y - 1 if self.centred else y for y in (self.x, self.z))
        self.sizes = [self.d, self.d * k, k, k * self.d]

    def unpack(self, point):
        b, W, e, V = point.split(self.sizes)
        return b, W.view(self.d, self.num_latents), e, V.view(self.num_latents, self.d)

    def collapsed(self):
        b, W, e, V = (torch.zeros(size) for size in self.sizes)
        return torch.cat([(self.law @ self.x).logit(), W, e, V])

    def gradients(self, point):
        """∇ L_p in b and W, ∇ L_q in e and V: what each player sees, less what it expects."""
        b, W, e, V = self.unpack(point)
        p = (b + self.c @ W.T).sigmoid()  # rows z, columns i
        q = (e + self.X @ V.T).sigmoid()  # rows x, columns j
        wake = self.law[:, None] * likelihood(self.z, q)  # rows x, columns z
        sleep = likelihood(self.x, p).T / len(self.z)
        seen = self.x[:, None] - p
        told = self.z - q[:, None]
        return torch.cat(
            [
                torch.einsum("xz,xzi->i", wake, seen),
                torch.einsum("xz,xzi,zj->ij", wake, seen, self.c).reshape(-1),
                torch.einsum("xz,xzj->j", sleep, told),
                torch.einsum("xz,xzj,xi->ji", sleep, told, self.X).reshape(-1),
            ]
        )

    def utilities(self, theta, phi):
        """L_p and L_q, written out."""
        b, W, e, V = self.unpack(torch.cat([theta, phi]))
        log_p = log_likelihood(self.x, b + self.c @ W.T).T
        log_q = log_likelihood(self.z, e + self.X @ V.T)
        decoder = (self.law[:, None] * log_q.exp() * log_p).sum()
        encoder = (log_p.exp() * log_q).sum() / len(self.z)
        return decoder, encoder

    def field(self, a, b):
        halves = torch.tensor([sum(self.sizes[:2]), sum(self.sizes[2:])])
        rates = torch.tensor([a, b]).repeat_interleave(halves)
        return lambda point: rates * self.gradients(point)

    def programs(self, point):
        b0, W0, e0, V0 = self.unpack(point)

        def code(y):
            return 2 * y - 1 if self.centred else y

        def model(x):
            b, W = pyro.param("b", b0.clone()), pyro.param("W", W0.clone())
            with pyro.plate("data", len(x)):
                prior = torch.full((self.num_latents,), 0.5)
                z = pyro.sample("z", dist.Bernoulli(prior).to_event(1))
                logits = b + code(z) @ W.T
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(x):
            e, V = pyro.param("e", e0.clone()), pyro.param("V", V0.clone())
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=e + code(x) @ V.T).to_event(1))

        return model, guide

    def data(self, rows):
        return self.x[torch.multinomial(self.law, rows, replacement=True)]

    @property
    def covariance(self):
        """Of the data in ±1."""
        X = 2 * self.x - 1
        centred = X - self.law @ X
        return centred.T @ (self.law[:, None] * centred)


def bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def likelihood(values, probs):
    """Rows of probs against rows of values: Π of p or 1 - p."""
    return torch.where(values.bool(), probs[:, None], 1 - probs[:, None]).prod(-1)


def log_likelihood(values, logits):
    return logsigmoid((2 * values - 1) * logits[:, None]).sum(-1)


def law_of_bits(d, fair, seed=0):
    """Random probabilities of d bits; if fair, of x as of 1 - x, so that each bit is."""
    law = torch.rand(2**d, generator=torch.Generator().manual_seed(seed))
    law = law + law.flip(0) if fair else law
    return law / law.sum()


BIT_PAIRS = {
    "one bit, ±1": lambda: Bits(torch.tensor([0.3, 0.7])),
    "two bits, two latents, ±1": lambda: Bits(law_of_bits(2, fair=False), 2),
    "two bits, 0 and 1": lambda: Bits(law_of_bits(2, fair=False), centred=False),
}


@pytest.mark.parametrize("make", BIT_PAIRS.values(), ids=BIT_PAIRS.keys())
def test_bit_gradients_are_those_of_the_utilities_and_of_the_library(make):
    """Up to 12 comparisons at 5 standard errors: one false alarm in 100 000 runs."""
    game = make()
    point = 0.7 * torch.randn(sum(game.sizes))
    theta, phi = point.split([sum(game.sizes[:2]), sum(game.sizes[2:])])
    by_decoder = jacobian(lambda theta: game.utilities(theta, phi)[0], theta)
    by_encoder = jacobian(lambda phi: game.utilities(theta, phi)[1], phi)
    expected = game.gradients(point)
    torch.testing.assert_close(torch.cat([by_decoder, by_encoder]), expected)
    names = ["b", "W", "e", "V"]
    draws = mean_gradients(*game.programs(point), names, game.data, draws=300, rows=100)
    assert_mean(torch.stack(list(draws)), expected)


@pytest.mark.parametrize(("a", "b"), RATES)
@pytest.mark.parametrize("num_latents", [1, 2])
def test_rates_of_fair_bits_are_those_of_their_correlations(num_latents, a, b):
    """As for Gaussian data, with alpha = a / 4, beta = b / 4 and rho of the correlations."""
    game = Bits(law_of_bits(3, fair=True), num_latents)
    rho = torch.linalg.eigvalsh(game.covariance).tolist()
    predicted = [r for one in rho for r in escape_rates(a / 4, b / 4, one)] * num_latents
    predicted += [-a / 4] * 3 + [-b / 4] * num_latents
    assert game.gradients(game.collapsed()).abs().max() < 1e-12
    values = eigenvalues(jacobian(game.field(a, b), game.collapsed()))
    torch.testing.assert_close(values, torch.tensor(predicted).sort().values)
    assert values.max() > 0


def test_one_bit_of_data_is_neither_left_nor_returned_to():
    """∇_v L_q = -∇_w L_p = (tanh(w / 2) - tanh(v / 2)) / 2: all pairs w = v are equilibria."""
    game = Bits(torch.tensor([0.5, 0.5]))
    a, b = 0.4, 0.9
    w, v = 0.3, -1.1
    gradients = game.gradients(torch.tensor([0.0, w, 0.0, v]))
    pull = (math.tanh(v / 2) - math.tanh(w / 2)) / 2
    torch.testing.assert_close(gradients, torch.tensor([0.0, pull, 0.0, -pull]))
    rho = game.covariance.item()
    assert escape_rates(a / 4, b / 4, rho)[0] == pytest.approx(0.0, abs=1e-12)
    point, field = torch.tensor([0.0, w, 0.0, v]), game.field(a, b)
    for _ in range(3_000):
        point = point + 0.1 * field(point)
    level = (w / a + v / b) / (1 / a + 1 / b)  # w / a + v / b never changes
    torch.testing.assert_close(point, torch.tensor([0.0, level, 0.0, level]))


@pytest.mark.parametrize("seed", range(4))
def test_correlations_decide_for_biased_bits_too(seed):
    """Unstable if and only if any two bits are correlated, be they fair or not."""
    game = Bits(law_of_bits(3, fair=False, seed=seed))
    D = game.covariance.diagonal()
    a, b = 0.5, 1.5
    assert game.gradients(game.collapsed()).abs().max() < 1e-12
    J = jacobian(game.field(a, b), game.collapsed())
    assert torch.linalg.eigvals(J).real.max() > 1e-6
    # The bits of p(x) = Π p(x_i) are the same, and uncorrelated.
    probs = game.law @ game.x
    independent = Bits(likelihood(game.x, probs[None])[0])
    torch.testing.assert_close(independent.covariance, torch.diag(D))
    J = jacobian(independent.field(a, b), independent.collapsed())
    assert torch.linalg.eigvals(J).real.max() < 1e-6


@pytest.mark.parametrize(("num_latents", "correlation"), [(1, 0.5), (3, 0.5), (2, -0.5)])
def test_codes_of_zero_and_one_quarter_the_rates(num_latents, correlation):
    """Two fair bits; the rate solves (r + alpha') (r + beta') = alpha' beta' rho.

    alpha' = a / 16 times f = (r + a / 4) / (r + (1 + n / 4) a / 4) along (1, ..., 1), where the
    bias has to follow n = num_latents inputs, and times 1 across. Likewise for the encoder and its
    n = 2 inputs; of these, the top direction is (1, 1) or (1, -1), by the sign of the correlation.
    """
    a, b, d = 0.8, 1.7, 2
    same, other = (1 + correlation) / 4, (1 - correlation) / 4
    law = torch.tensor([same, other, other, same])
    game = Bits(law, num_latents, centred=False)
    point = game.collapsed()
    values = torch.linalg.eigvals(jacobian(game.field(a, b), point)).real
    rho = torch.linalg.eigvalsh(game.covariance).max().item()
    assert rho == pytest.approx(1.5)

    def bias_factor(r, rate, n):
        return (r + rate / 4) / (r + (1 + n / 4) * rate / 4)

    def rate(along_latents):
        r = 0.0
        for _ in range(500):
            alpha, beta = a / 16, b / 16
            alpha *= bias_factor(r, a, num_latents) if along_latents else 1
            beta *= bias_factor(r, b, d) if correlation > 0 else 1
            r = escape_rates(alpha, beta, rho)[0]
        return r

    for along_latents in {True, num_latents == 1}:
        assert (values - rate(along_latents)).abs().min() < 1e-9
    centred = Bits(law, num_latents)
    fast = torch.linalg.eigvals(jacobian(centred.field(a, b), centred.collapsed())).real.max()
    assert fast.item() == pytest.approx(escape_rates(a / 4, b / 4, rho)[0])
    bound = fast / 4
    assert rate(True) < bound * (1 + 1e-9)
    if num_latents > 1 and correlation < 0:
        assert values.max().item() == pytest.approx(bound.item())


# ----------------------------------------------------------------------------- the code warm-up


def dealt(z, scores):
    """Draws of the prior, dealt out to rows in the order of their scores, column by column."""
    codes = torch.empty_like(z)
    return codes.scatter_(0, scores.argsort(0), z.sort(0).values)


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_force_of_the_code_does_not_vanish_with_the_gain(size):
    """E[z* xᵀ] = V C / sqrt(diag V C Vᵀ), whatever the size of V.

    Of a batch of N rows it falls short by a part of order (log log N) / N, a tenth of a standard
    error here. Six comparisons at 5 standard errors: one false alarm in 200 000 runs.
    """
    game = Gaussian(positive_definite(2.0, 0.9, 0.3)[0], 2)
    V = size * torch.randn(2, 3)
    draws, rows = [], 4_000
    for _ in range(40):
        x = game.data(rows)
        codes = dealt(torch.randn(rows, 2), x @ V.T)
        draws.append((codes.T @ x / rows).reshape(-1))
    lengths = (V @ game.C @ V.T).diagonal().sqrt()
    assert_mean(torch.stack(draws), (V @ game.C / lengths[:, None]).reshape(-1))


def test_time_to_leave_with_the_code_does_not_depend_on_the_gain(dynamics):
    """With S = 1, v' = b c (sqrt(lam) - lam v) alone: 1 - exp(-b c lam t) of 1 / sqrt(lam)."""
    import numpy as np

    v = np.logspace(-8, -4, 5)
    with_code = dynamics.leaving_times(dynamics.with_code, v, 2 * v)
    game = dynamics.leaving_times(dynamics.flow, v, 2 * v)
    assert with_code.max() / with_code.min() < 1.01
    np.testing.assert_allclose(np.diff(game), -np.log(10), rtol=1e-2)  # r = 1
    paths = dynamics.ascend(dynamics.with_code, np.array([1e-8, 2e-8]), 0.05, step=1e-4)
    times = np.linspace(0, 0.05, len(paths))
    alone = (1 - np.exp(-dynamics.LAM * times)) / dynamics.LAM**0.5
    np.testing.assert_allclose(paths[1:, 0], alone[1:], rtol=0.15)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_layers_cost_less_time_with_the_code(depth):
    """v' = depth v^(2 - 2 / depth) c sqrt(lam): a logarithm for two layers, then a power."""
    lam = 4.0
    by_game = layers_field(lam, 1.0, 1.0, 1.0, depth)

    def field(w, v):
        w_dot, v_dot = by_game(w, v)
        force = lam**0.5 - lam * v
        return w_dot, v_dot + depth * v ** (2 - 2 / depth) * force

    v = torch.tensor([1e-8, 1e-7, 1e-6])
    time = leaving_time(field, 2 * v, v, at=0.01)
    if depth == 2:
        torch.testing.assert_close(time, (0.01 / v).log() / (2 * lam**0.5), rtol=0.02, atol=0)
    else:
        powers = (time[:-1] / time[1:]).log10()
        expected = torch.full((2,), 1 - 2 / depth)
        torch.testing.assert_close(powers, expected, rtol=0.1, atol=0)


def test_directions_of_the_code_turn_to_the_top_eigenvector():
    """While V is small, v_i' = c lam_i v_i / |v|: v_2 grows as the lam_2 / lam_1 power of v_1."""
    lam = torch.tensor([3.0, 1.5])
    v = torch.tensor([1e-6, 1e-6])
    while v[0] < 1e-2:
        velocity = lam * v / (lam * v**2).sum().sqrt()
        v = v + 1e-3 * v[0] / velocity[0] * velocity
    assert (v[1] / 1e-6).log() / (v[0] / 1e-6).log() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-3, 1e-7])
def test_library_sets_an_encoder_at_the_speed_of_the_code(size, monkeypatch):
    """After 50 calls that change little, the code adds lr sum_t c_t sqrt(lam) to each latent.

    Here normal latents have a code, too, whose force is known in closed form.
    C = lam I, so that no direction is preferred. c_t falls from 4 to 0 in 1,000 calls and counts in
    every fourth of them. The 16 calls take each row of V to about 0.09. The noise of SGD has
    brought it to 0.006 before, which hardly counts in the sum of squares; the decay of V costs 5
    to 10 %, and what the draws do is less than 2 %.
    """
    monkeypatch.setattr("pyro_symeq.pair.is_dealt", lambda law: True)
    lam, noise, rows, lr, calls = 2.0, 2.0, 256, 0.004, 16
    game = Gaussian(lam * torch.eye(8), 8)
    point = game.collapsed(torch.full((8,), noise))
    W, _, V, _ = game.unpack(point)
    V += size * torch.randn(8, 8)
    model, guide = game.programs(point)
    symeq = SymmetricEquilibrium(model, guide, SGD({"lr": lr / rows}))
    lengths = {}
    for step in range(50 + calls):
        symeq.step(game.data(rows))
        lengths[step + 1] = pyro.param("V").detach().norm(dim=1)
    assert lengths[50].max() < 0.02
    speed = lr * sum(4 * (1 - t / 1000) for t in range(0, calls, 4)) * lam**0.5
    ratio = lengths[50 + calls].mean().item() / speed
    assert 0.85 < ratio < 1.05


# ----------------------------------------------------------------------------------- the figure


@pytest.fixture
def dynamics():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("dynamics", FIGURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flow_of_the_figure(dynamics):
    """It is the field of the closed form, with t² where ∇_t L_q is zero."""
    game = Gaussian(torch.tensor([[dynamics.LAM]]), 1)
    for v, w in ((0.2, -0.7), (-0.5, 1.1), (1e-3, 2e-3), (dynamics.V_GOOD, dynamics.W_GOOD)):
        variance = (1 - v * w) ** 2 + dynamics.NOISE * v**2
        noises = math.log(dynamics.NOISE) / 2, math.log(variance) / 2
        of_w, _, of_v, of_t = game.gradients(torch.tensor([w, noises[0], v, noises[1]]))
        assert of_t.abs() < 1e-12
        assert dynamics.flow(v, w) == pytest.approx((of_v.item(), of_w.item()), abs=1e-12)
        x = dynamics.LAM**0.5 * torch.randn(100_000)
        error = dealt(torch.randn(100_000), v * x) - v * x
        codes = (1 - dynamics.LAM**0.5 * abs(v)) ** 2
        assert error.square().mean().item() == pytest.approx(codes, rel=0.03, abs=2e-3)
    slope = escape_rates(1.0, 1.0, dynamics.LAM / dynamics.NOISE)[0]
    assert slope == pytest.approx(dynamics.RATE)


@pytest.mark.slow
def test_figure_is_drawn(dynamics, tmp_path):
    dynamics.draw(tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 50_000
