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
from typing import Any

import torch
from torch import Tensor

from pyro_symeq import passes
from pyro_symeq.binding import Call, Program
from pyro_symeq.checks import check_count
from pyro_symeq.metrics.estimate import Estimate
from pyro_symeq.passes import Run
from pyro_symeq.rehearsal import Bind, buffers_kept
from pyro_symeq.rows import Rows, shared_rows
from pyro_symeq.selection import selection
from pyro_symeq.utility import SymmetricUtility

__all__ = ["LogLikelihood", "log_likelihood"]

NO_ROWS = (
    "Expected all latents, data and factors of model and guide in one vectorised plate, whose "
    "rows are those of the data: the likelihood is one of each row. Put pyro.plate around them."
)


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

    The programs run on rows of the batch, each copied for its draws, ``at_once`` rows at a time:
    those of tensors that hold data, and of others that have an element for each row along their
    first dimension. Where they can't, or treat rows unlike when there are other ones, they run
    ``num_draws`` times on the whole batch.

    Args:
        model: The decoder's program.
        guide: The encoder's program.
        args: What both take, with all variables in a vectorised plate whose rows are those of the
            data.
        num_draws: The number of draws :math:`K` for each row.
        at_once: The number of rows in a run, which bounds the memory.
        bind: How dreams are handed to the guide, see :class:`~pyro_symeq.SymmetricUtility`.
        kwargs: More of what both programs take.

    Returns:
        An estimate for each row, with ``.mean`` and ``.error``.

    Raises:
        ValueError: An option is no count, there is no such plate, one leaves out rows, the model
            has a site without a density, or the batch lacks all data.

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
    call = args, kwargs
    with torch.no_grad(), buffers_kept():
        dream = passes.dream(model, call, followed=True)
        rows = _rows(dream)
        select = selection(model, guide, call, dream, rows, at_once)
        weigh = _weigher(model, guide, bind, rows)
        if select is None:
            return LogLikelihood.of(torch.stack([weigh(call) for _ in range(num_draws)]))
        total = num_draws * rows.size
        chunks = (
            torch.arange(start, min(start + at_once, total)) for start in range(0, total, at_once)
        )
        log_w = torch.cat([weigh(select(chunk % rows.size)) for chunk in chunks])
        return LogLikelihood.of(log_w.unflatten(0, (num_draws, rows.size)))


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
    rows = shared_rows([dream.trace])
    if rows is None:
        raise ValueError(NO_ROWS)
    return rows


def _weigher(
    model: Program, guide: Program, bind: Bind | None, rows: Rows
) -> Callable[[Call], Tensor]:
    """Draws the logarithm of a weight for each row of a call."""
    utility = SymmetricUtility(bind=bind)
    pair, play = utility.pair(model, guide), utility.stage(model, guide).play()

    def weigh(call: Call) -> Tensor:
        proposals = pair.propose(play, call)
        if rows.dim not in proposals.plate_dims():
            raise ValueError(NO_ROWS)
        [log_w] = proposals.log_weights({rows.dim})
        return log_w.flatten()

    return weigh
