r"""How probable data are under a model, by importance-weighted draws of its guide.

For a row :math:`x` of the data and :math:`K` draws :math:`z_k \sim q(z \mid x)`, the weights
:math:`w_k = p(x, z_k) / q(z_k \mid x)` give two estimates that are on average lower bounds of
:math:`\log p(x)`,

.. math::
    \log \frac1K \sum_k w_k \qquad\text{and}\qquad \frac1K \sum_k \log w_k.

The first rises to :math:`\log p(x)` with :math:`K`; the second estimates the ELBO. How far to
trust the first, the effective number of draws tells,
:math:`(\sum_k w_k)^2 / \sum_k w_k^2`: where it is near 1, a single draw has made the estimate, and
:math:`\log p(x)` may be much larger.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.aside import aside, buffers_kept
from pyro_symeq.batch import sole
from pyro_symeq.binding import Call, Program
from pyro_symeq.checks import check_count
from pyro_symeq.metrics.estimate import Estimate
from pyro_symeq.passes import Run
from pyro_symeq.proposals import Proposals
from pyro_symeq.rehearsal import Bind
from pyro_symeq.rows import NO_ROWS, Rows, alike, required_rows
from pyro_symeq.selection import selection
from pyro_symeq.utility import SymmetricUtility

__all__ = ["LogLikelihood", "log_likelihood"]

Draw = Callable[[Tensor], Tensor]  # log-weights by draw and row, of the numbers of rows
Propose = Callable[..., Proposals]  # of a call, and of values in the place of draws


@dataclass(frozen=True)
class LogLikelihood:
    r"""The log-likelihood of each row of a batch, as far as importance-weighted draws tell.

    Args:
        values: The estimates :math:`\log \frac1K \sum_k w_k` (nats), with shape :math:`(N)`.
        elbos: The estimates :math:`\frac1K \sum_k \log w_k` (nats), with shape :math:`(N)`.
        effective_sizes: How many draws of equal weight those of a row are worth, between 1 and
            :math:`K` (0 where no draw has any weight), with shape :math:`(N)`.
        num_draws: The number of draws :math:`K`.
    """

    values: Tensor
    elbos: Tensor
    effective_sizes: Tensor
    num_draws: int

    @classmethod
    def of(cls, log_w: Tensor) -> "LogLikelihood":
        r"""What weights tell.

        Args:
            log_w: The logarithms of the weights, with shape :math:`(K, N)`.
        """
        num_draws, total = len(log_w), log_w.logsumexp(0)
        effective_sizes = (2 * total - (2 * log_w).logsumexp(0)).exp().nan_to_num(nan=0.0)
        return cls(total - math.log(num_draws), log_w.mean(0), effective_sizes, num_draws)

    @property
    def mean(self) -> float:
        """The mean over the rows (nats)."""
        return Estimate.of(self.values).mean

    @property
    def error(self) -> float:
        """The standard error of the mean, as rows differ (nats)."""
        return Estimate.of(self.values).error

    @property
    def elbo(self) -> Estimate:
        """The mean ELBO of the rows, with its standard error (nats)."""
        return Estimate.of(self.elbos)

    def __str__(self) -> str:
        return f"{Estimate.of(self.values)} nats ({self.num_draws} draws)"


def log_likelihood(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 100,
    at_once: int = 20_000,
    bind: Bind | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    r"""Estimates the log-likelihood of each row of a batch.

    It is :math:`\log p(x)`, and where the batch observes latents :math:`y` too,
    :math:`\log p(x, y)`, with draws from :math:`q(z \mid x, y)`; where data or latents are
    observed in part, that of what is observed. Scales (``poutine.scale``) don't count. Buffers of
    modules end as they were.

    The programs run on some rows of the batch at a time: those of tensors that hold data, and of
    others that have an element for each row along their first dimension. Draws for a row are made
    at once along an outermost plate, if the programs broadcast, or else for copies of the row.
    Where programs treat rows unlike when there are other ones, or run on the whole batch alone,
    they run on that. A few runs look at the whole batch in any case, with one draw for each row: a
    dream of the model, and both programs at it.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        args: What both take, or one :class:`~pyro_symeq.Batch`, with all variables in a vectorised
            plate whose rows are those of the data.
        num_draws: The number of draws :math:`K` for each row.
        at_once: The number of draws in a run, of all rows together, which bounds the memory, but
            for the looks at the whole batch.
        bind: How dreams are handed to the guide, see :class:`~pyro_symeq.SymmetricUtility`.
        kwargs: More of what both programs take.

    Returns:
        An estimate for each row, with ``.mean`` and ``.error``.

    Raises:
        ValueError: An option is no count, there is no such plate, one leaves out rows, the model
            has a site without a density, the batch lacks all data, or there are several.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016).
        https://arxiv.org/abs/1509.00519

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the posterior
        >>> log_likelihood(model, guide, torch.zeros(3), num_draws=5).values
        tensor([-1.2655, -1.2655, -1.2655])
        >>> dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.0))
        tensor(-1.2655)
    """
    check_count("num_draws", num_draws, at_least=1)
    check_count("at_once", at_once, at_least=1)
    call = sole((args, kwargs))
    with torch.no_grad(), buffers_kept():
        draw, num_rows, size = _plan(model, guide, bind, call, num_draws, at_once)
        parts = [
            LogLikelihood.of(_several(draw, index, num_draws))
            for index in torch.arange(num_rows).split(size)
        ]
    return LogLikelihood(
        torch.cat([part.values for part in parts]),
        torch.cat([part.elbos for part in parts]),
        torch.cat([part.effective_sizes for part in parts]),
        num_draws,
    )


def _several(draw: Draw, index: Tensor, num_draws: int) -> Tensor:
    """So many log-weights of some rows, however many there are in a run."""
    first = draw(index)
    others = [draw(index) for _ in range(math.ceil(num_draws / len(first)) - 1)]
    return torch.cat([first, *others])[:num_draws]


def _plan(
    model: Program, guide: Program, bind: Bind | None, call: Call, num_draws: int, at_once: int
) -> tuple[Draw, int, int]:
    """Finds out how to draw weights, for how many rows in all, and for how many at a time."""
    dream = passes.dream(model, call, followed=True)
    rows = _rows(dream)
    select = selection(model, guide, call, dream, rows, at_once)
    size = rows.size if select is None else min(max(at_once // num_draws, 1), rows.size)
    copies = min(max(at_once // size, 1), num_draws)
    one, several = (_proposer(model, guide, bind, n) for n in (1, copies))

    def some(index: Tensor) -> Call:
        return call if select is None else select(index)

    def broadcast(index: Tensor) -> Tensor:
        return _log_weights(several(some(index)), rows)

    def copied(index: Tensor) -> Tensor:
        num = 1 if select is None else copies
        return _log_weights(one(some(index.repeat(num))), rows).reshape(num, -1)

    is_broadcast = copies > 1 and _can_broadcast(one, several, some(torch.arange(size)), rows)
    return broadcast if is_broadcast else copied, rows.size, size


def _rows(dream: Run) -> Rows:
    """The rows of the model, which has a likelihood."""
    for name, site in dream.trace.variables.items():
        if passes.is_implicit(site):
            raise ValueError(
                f"The model's site '{name}' is Implicit and has no density, so there is no "
                "log-likelihood. Compare samples with data instead, by a Fréchet distance, say."
            )
    if any(passes.left_out(dream.trace)):
        raise ValueError(
            "A plate leaves out rows, and the likelihood is one of each row. Pass fewer rows to "
            "plates without subsample_size=."
        )
    return required_rows([dream.trace])


def _proposer(model: Program, guide: Program, bind: Bind | None, num_draws: int) -> Propose:
    """Draws latents, several for each row along an outermost plate, with their weights."""
    utility = SymmetricUtility(
        bind=bind, num_proposals=num_draws, vectorize_particles=num_draws > 1
    )
    return partial(utility.pair(model, guide).propose, utility.stage(model, guide).play())


def _log_weights(proposals: Proposals, rows: Rows) -> Tensor:
    """The logarithms of weights by draw and row."""
    if rows.dim not in proposals.plate_dims():
        raise ValueError(NO_ROWS)
    if proposals.dim is None:
        return proposals.log_ratios({rows.dim}).reshape(1, -1)
    log_w = proposals.log_ratios({rows.dim, proposals.dim})
    return log_w.reshape(len(log_w), -1)


def _can_broadcast(one: Propose, several: Propose, call: Call, rows: Rows) -> bool:
    """Whether draws along a plate have the weights that each of them has alone."""
    with aside():
        try:
            proposals = several(call)
            log_w = _log_weights(proposals, rows)
            values = {n: proposals.values(n, s) for n, s in proposals.completion.variables.items()}
            return all(
                alike(_log_weights(one(call, {n: v[k] for n, v in values.items()}), rows)[0], x)
                for k, x in ((0, log_w[0]), (-1, log_w[-1]))
            )
        except Exception:  # sizes or dimensions of the programs are fixed
            return False
