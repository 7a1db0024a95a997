r"""The figure of docs/dynamics.md: flows near collapse, and how long it takes to leave.

A linear-Gaussian pair of one latent and one direction of the data,

.. math::
    z \sim N(0, 1), \quad x \mid z \sim N(w z, \sigma^2), \quad q(z \mid x) = N(v x, S), \quad
    \mathbb{E}[x^2] = \lambda,

whose players climb the exact gradients of their utilities at equal rates. S is the best one for
(w, v) at any time, so that the flow has two dimensions. Run it as

    python docs/figures/dynamics.py [FILE]
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

LAM = 4.0  # variance of the data
NOISE = 1.0  # variance of the observation
W_GOOD = (LAM - NOISE) ** 0.5
V_GOOD = W_GOOD / LAM
RATE = (LAM / NOISE) ** 0.5 - 1  # r, with both learning rates 1
SLOPE = LAM / (1 + RATE)  # w / v of the unstable direction
KAPPA = (LAM - NOISE) / (1 + NOISE)
RAY = (LAM + NOISE) / (1 + NOISE)  # w / v of two layers each that grow together

BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#222222"
DASHES = (0, (4, 2))
OUT = Path(__file__).parent.parent / "_static" / "dynamics.png"
STARTS = np.array([[0.03, 0.01], [-0.03, -0.01], [0.3, -1.9], [-0.3, 1.9]])  # rows (v, w)

Array = NDArray[np.float64]
Flow = Callable[[Array, Array], tuple[Array, Array]]


def flow(v: ArrayLike, w: ArrayLike, code: float = 0.0) -> tuple[Array, Array]:
    r"""The velocities of the two gains.

    .. math::
        \dot w &= [\lambda v - w\,(\lambda v^2 + S)] / \sigma^2, \\
        \dot v &= [w - v\,(w^2 + \sigma^2) + c\,(\sqrt\lambda \operatorname{sign} v - \lambda v)]
            / S,

    where S is the mean square error of the encoder, over dreams with weight 1 and over rank-matched
    codes with weight c.

    Args:
        v: The encoder's gain.
        w: The decoder's gain.
        code: The weight c of the code warm-up.

    Returns:
        The velocity of v and that of w.
    """
    v, w = np.asarray(v, float), np.asarray(w, float)
    dreams = (1 - v * w) ** 2 + NOISE * v**2
    codes = (1 - LAM**0.5 * np.abs(v)) ** 2
    variance = (dreams + code * codes) / (1 + code)
    force = LAM**0.5 * np.sign(v) - LAM * v
    v_dot = (w - v * (w**2 + NOISE) + code * force) / variance
    w_dot = (LAM * v - w * (LAM * v**2 + variance)) / NOISE
    return v_dot, w_dot


def two_layers(v: ArrayLike, w: ArrayLike, code: float = 0.0) -> tuple[Array, Array]:
    """The velocities where each gain is a product of two equal gains: 2 v and 2 w times faster."""
    v_dot, w_dot = flow(v, w, code)
    return 2 * np.abs(v) * v_dot, 2 * np.abs(w) * w_dot


def with_code(v: ArrayLike, w: ArrayLike) -> tuple[Array, Array]:
    """The velocities in a code warm-up of weight 1."""
    return flow(v, w, code=1.0)


def two_layers_with_code(v: ArrayLike, w: ArrayLike) -> tuple[Array, Array]:
    """Both."""
    return two_layers(v, w, code=1.0)


def ascend(field: Flow, start: Array, time: float, step: float = 1e-3) -> Array:
    """Euler's path from (v, w), with shape (steps, 2)."""
    path = [np.asarray(start, float)]
    for _ in range(round(time / step)):
        path.append(path[-1] + step * np.stack(field(*path[-1])))
    return np.stack(path)


def leaving_times(field: Flow, v: Array, w: Array, precision: float = 2e-3) -> Array:
    """The times until both gains are at half their size in the consistent pair."""
    v, w, time = v.copy(), w.copy(), np.zeros_like(v)
    while (inside := (v < V_GOOD / 2) | (w < W_GOOD / 2)).any():
        v_dot, w_dot = field(v, w)
        # No gain changes by more than a small part of itself in a step.
        step = inside * precision / np.maximum(np.abs(v_dot / v), np.abs(w_dot / w))
        v, w, time = v + step * v_dot, w + step * w_dot, time + step
    return time


def draw(path: Path) -> None:
    """Writes the figure."""
    figure = Figure(figsize=(7.4, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.45, 1])
    game, warmup = top.subplots(1, 2, sharey=True)
    _portrait(game, flow)
    game.set_title("(a) the game alone", fontsize=11)
    reach = np.array([-0.5, 0.5])
    game.plot(reach, SLOPE * reach, color=PURPLE, linewidth=1.6, linestyle=DASHES, zorder=4)
    for start in STARTS:
        _path(game, ascend(flow, start, 9.0))
    _portrait(warmup, with_code)
    warmup.set_title("(b) with the code warm-up, $c = 1$", fontsize=11)
    for start in STARTS:
        first = ascend(with_code, start, 2.0)
        _path(warmup, first)
        _path(warmup, ascend(flow, first[-1], 4.0), after=True)
    game.set_ylabel("decoder's gain $w$", fontsize=10)
    top.legend(handles=_handles(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _times(bottom.subplots())
    figure.savefig(path, dpi=150)


def _portrait(axes: Axes, field: Flow) -> None:
    """Stream lines, nullclines and equilibria."""
    v, w = np.meshgrid(np.linspace(-0.8, 0.8, 161), np.linspace(-2.4, 2.4, 161))
    axes.streamplot(
        v, w, *field(v, w), color="0.78", linewidth=0.7, arrowsize=0.7, density=0.9, zorder=1
    )
    for side in (-1, 1):  # the code's force jumps at v = 0
        v, w = np.meshgrid(side * np.linspace(1e-9, 0.8, 400), np.linspace(-2.4, 2.4, 801))
        for velocity, color in zip(field(v, w), (BLUE, ORANGE), strict=True):
            axes.contour(v, w, velocity, levels=[0.0], colors=color, linewidths=1.6, zorder=2)
    axes.plot(0, 0, "o", color="white", markeredgecolor=BLACK, markersize=8, zorder=5)
    for side in (-1, 1):
        axes.plot(side * V_GOOD, side * W_GOOD, "o", color=BLACK, markersize=8, zorder=5)
    axes.set_xlim(-0.8, 0.8)
    axes.set_ylim(-2.4, 2.4)
    axes.set_xlabel("encoder's gain $v$", fontsize=10)
    axes.tick_params(labelsize=8)


def _path(axes: Axes, path: Array, after: bool = False) -> None:
    """A path, with a dot after each unit of time."""
    style = (0, (2, 1)) if after else "-"
    axes.plot(*path.T, color=GREEN, linewidth=1.8, linestyle=style, zorder=3)
    axes.plot(*path[::1000].T, ".", color=GREEN, markersize=6, zorder=4)


def _handles() -> list[Line2D]:
    """What the marks of the portraits mean."""
    hollow = dict(color="white", marker="o", markeredgecolor=BLACK, markersize=7)
    solid = dict(color="white", marker="o", markerfacecolor=BLACK, markersize=8)
    return [
        Line2D([], [], color=BLUE, label=r"nullcline of the encoder, $\dot v = 0$"),
        Line2D([], [], color=ORANGE, label=r"nullcline of the decoder, $\dot w = 0$"),
        Line2D([], [], color=PURPLE, linestyle=DASHES, label="unstable direction"),
        Line2D([], [], label="collapsed pair", **hollow),
        Line2D([], [], label="consistent pair", **solid),
        Line2D([], [], color=GREEN, marker=".", label="ascent, a dot for each unit of time"),
        Line2D([], [], color=GREEN, linestyle=(0, (2, 1)), label="after the warm-up"),
    ]


def _times(axes: Axes) -> None:
    """Times to leave against the initial gain, simulated (marks) and predicted (lines)."""
    v = np.logspace(-5, -1.3, 9)
    line = np.logspace(-5.2, -1.2, 200)
    axes.plot(v, leaving_times(two_layers, v, RAY * v), "s", color=ORANGE, markersize=6)
    slow = (1 / line - 2 * RAY / W_GOOD) / (2 * KAPPA)
    axes.plot(line, slow, color=ORANGE, label=r"two layers each: $1\,/\,(2 \kappa v_0)$")
    by_code = leaving_times(two_layers_with_code, v, RAY * v)
    axes.plot(v, by_code, "v:", color=PURPLE, markersize=6, label="two layers, code warm-up")
    axes.plot(v, leaving_times(flow, v, SLOPE * v), "o", color=BLUE, markersize=6)
    fast = np.log(W_GOOD / (2 * SLOPE * line)) / RATE
    axes.plot(line, fast, color=BLUE, label=r"one layer each: $\log(1/v_0)\,/\,r$")
    by_code = leaving_times(with_code, v, SLOPE * v)
    axes.plot(v, by_code, "^:", color=GREEN, markersize=6, label="one layer, code warm-up")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("initial gain $v_0$ of the encoder", fontsize=10)
    axes.set_ylabel("time to leave", fontsize=10)
    axes.set_title("(c) marks: simulated; solid lines: predicted", fontsize=11)
    axes.legend(fontsize=9, frameon=False)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
