r"""A model that learns from its own data and from the dreams of models in other processes.

Player :math:`i` of the data-exchange game climbs

.. math::
    u_i = \alpha_{ii}\, \mathbb{E}_{\pi_i} [\log p_i]
        + \sum_{j \ne i} \alpha_{ij}\, \mathbb{E}_{p_j} [\log p_i],

and all that it needs of the others are draws :math:`x \sim p_j`. To the player, such a draw is one
more batch, which counts :math:`\alpha_{ij}`. So each player lives where its data are, and only
dreams leave that place.
"""

import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch.distributed
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_symeq import randomness
from pyro_symeq.aside import aside
from pyro_symeq.batch import Batch, batches
from pyro_symeq.binding import Call, Program, close, open_parameters
from pyro_symeq.callers import stacklevel
from pyro_symeq.checks import check_count
from pyro_symeq.data_exchange import Data, check_shares, members, needed, shaped, with_rows
from pyro_symeq.game import Captures, Game, Nonfinite, Updates
from pyro_symeq.loss import GameLoss
from pyro_symeq.mailbox import Greeting, Mailbox
from pyro_symeq.parcel import Form, pack, unpack
from pyro_symeq.player import Player
from pyro_symeq.weights import full_weights

__all__ = ["DreamExchange"]

FORMAT = 1  # of greetings and parcels
NUM_TRIED = 2  # rows, to see what a dream looks like


class DreamExchange(Game):
    r"""A player of the data-exchange game in a process of its own.

    In each step it leaves dreams of its model for the others in a store, takes theirs, and moves
    by its own utility :math:`u_i`. So all models move at once, and each waits for the dreams of the
    others; what they learn is what those of :func:`data_exchange_game` learn. Neither data nor
    parameters leave the process: dreams are drawn from the model, run on zeros in the shapes of
    its data.

    A player that doesn't answer is *missing*: the others stop with an error, or go on without it
    and share out its weight among those who are there. When its process answers again, or a new
    one does under its name, it takes part again.

    Args:
        name: The name of this player.
        model: Its program, or a pair ``(model, guide)``; see :func:`data_exchange_game` for what
            they take and observe.
        optim: The optimiser.
        weights: The weights :math:`\alpha_{ij}` of its own data and of the others' dreams, by
            name: ``{"a": 0.5, "b": 0.5}``. They name all players, and sum to 1.
        store: Where players leave their dreams, a :class:`torch.distributed.TCPStore` say. Whoever
            reaches it can read them. Two runs have two stores, or a ``PrefixStore`` each.
        num_dreams: How many dreams of each other player a step takes, and by default as many as
            the first batch has rows. Whatever their number, they count as much as the rows of a
            batch.
        timeout: How long a step waits for the others (seconds).
        on_missing: ``"stop"``: a step without all others is a ``TimeoutError``. ``"continue"``: it
            goes on with a warning that says who is missing, and another when they are back.
        updates: See :class:`Game`; the players are ``name``, or those of a pair,
            ``"name.decoder"`` and ``"name.encoder"``.
        capture: See :class:`Game`.
        nonfinite: See :class:`Game`; the others get dreams in such a step, too.

    Attributes:
        missing: The names of players who are missing, and since which step.

    Raises:
        TypeError: ``model`` is no program or pair of programs, or ``store`` is no store.
        ValueError: ``weights`` lack this player or don't sum to 1, or an option has a value that
            it can't have.

    References:
        Game-theoretic distributed learning of generative models for heterogeneous data collections
        (Schlesinger, Flach, 2025). https://arxiv.org/abs/2511.01740

    Example:
        >>> def model(x):
        ...     logit = pyro.param("logit", torch.zeros(()))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Bernoulli(logits=logit), obs=x)
        >>> store = torch.distributed.HashStore()  # TCPStore(host, port) between machines
        >>> sgd = pyro.optim.SGD({"lr": 0.1})
        >>> with DreamExchange("a", model, sgd, {"a": 1.0}, store) as exchange:  # nobody else
        ...     loss = exchange.step(torch.ones(5))
        >>> loss.utilities.keys()
        dict_keys(['a'])
    """

    def __init__(
        self,
        name: str,
        model: Program | tuple[Program, Program],
        optim: PyroOptim,
        weights: Mapping[str, float],
        store: "torch.distributed.Store",  # type: ignore[name-defined]
        *,
        num_dreams: int | None = None,
        timeout: float = 300.0,
        on_missing: Literal["stop", "continue"] = "stop",
        updates: Updates = "alternating",
        capture: Captures = False,
        nonfinite: Nonfinite = "raise",
    ) -> None:
        self._member = members({name: model})[name]
        super().__init__(
            [Player(who, of, optim, utility) for who, of, utility in self._member.players()],
            updates=updates,
            capture=capture,
            nonfinite=nonfinite,
        )
        if not isinstance(store, torch.distributed.Store):  # type: ignore[attr-defined]
            raise TypeError(
                "Expected store to be a torch.distributed.Store, such as TCPStore(host, port, "
                f"is_master=False), got {type(store).__name__}."
            )
        if on_missing not in ("stop", "continue"):
            raise ValueError(f"Expected on_missing='stop' or 'continue', got {on_missing!r}.")
        if not timeout > 0:
            raise ValueError(f"Expected timeout to be a number of seconds above 0, got {timeout}.")
        if num_dreams is not None:
            check_count("num_dreams", num_dreams, at_least=1)
        self.name = name
        self.weights = _shares(name, weights)
        self.num_dreams = num_dreams
        self.timeout = timeout
        self.on_missing = on_missing
        self.missing: dict[str, int] = {}
        self._others = [other for other in self.weights if other != name]
        self._mailbox = Mailbox(name, self._others, store)
        self._greeting: Greeting | None = None
        self._blank: Data = {}
        self._forms: dict[str, Form] = {}

    def __repr__(self) -> str:
        return (
            f"DreamExchange({self.name!r}, weights={self.weights}, num_steps={self.num_steps}, "
            f"missing={self.missing})"
        )

    def __enter__(self) -> "DreamExchange":
        return self

    def __exit__(self, *error: Any) -> None:
        self.leave()

    def step(self, *args: Any, **kwargs: Any) -> GameLoss:
        r"""Swaps dreams with the others, and moves.

        Args:
            args: What the model takes, with the player's own data, or one :class:`Batch` or
                several.
            kwargs: Likewise.

        Returns:
            The loss (nats), minus the sum of ``.utilities``; see :meth:`Game.step`.

        Raises:
            TimeoutError: A player is missing, and ``on_missing="stop"``; or all are from whom this
                one learns. Nothing has moved, and the next call asks for them again.
            ConnectionError: The store can't be reached. Nothing has moved.
            ValueError: Another player doesn't fit this one, or dreams depend on the data; and as
                :meth:`Game.step`. Nothing has moved.
        """
        own = self._own((args, kwargs))
        self._set_loaded((tuple(own), {}), needed=self.learners)
        greeting = self._greeting or self._greet(own)
        received = self._mailbox.exchange(self._parcel, self._awaited(), self.timeout)
        self._report(received)
        dreams = {
            other: unpack(self._shared(there), parcel, greeting["num_dreams"])
            for other, (there, parcel) in received.items()
            if self.weights[other] > 0
        }
        return super().step(*self._weighted(own, dreams))

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> GameLoss:
        r"""Estimates the loss on the player's own data alone; nothing crosses, nothing moves.

        Args:
            args: What the model takes, or one :class:`Batch` or several.
            kwargs: Likewise.

        Returns:
            A float with ``.utilities``, those of :math:`\alpha_{ii} = 1`.
        """
        return super().evaluate_loss(*self._own((args, kwargs)))

    def leave(self) -> None:
        """Tells the others that this player is done, so that nobody waits for it.

        The end of a ``with`` statement does so too. Another step is a return.
        """
        if self._greeting is not None:
            self._greeting = None
            self._mailbox.close()

    def _own(self, call: Call) -> list[Batch]:
        """The batches of a call, with all arguments by name."""
        own = []
        for batch in batches(call):
            data = self._named(*batch.call)
            self._member.check_batch(data)
            own.append(Batch(**data).weighted(batch.weight))
        return own

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Data:
        parameters = open_parameters(self._member.model)
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(names) or kwargs.keys() & names[: len(args)]:
            raise TypeError(
                f"Expected the data of '{self.name}' as the arguments {names} of its model, each "
                f"once, got {len(args)} without a name and {list(kwargs)}."
            )
        return dict(zip(names, args, strict=False)) | kwargs

    def _greet(self, own: list[Batch]) -> Greeting:
        """Tells the others what this player dreams and what it needs, and waits for them."""
        self.missing = {}
        data = _merged(own)
        self._blank = {name: _blank(value) for name, value in data.items()}
        self._forms = self._look(data)
        num_rows = sum(self._member.num_rows(batch.call[1]) for batch in own)
        greeting = {
            "format": FORMAT,
            "byteorder": sys.byteorder,
            "players": sorted(self.weights),
            "hears": sorted(name for name, weight in self.weights.items() if weight > 0),
            "needs": sorted(needed(self._member.arguments or {})),
            "sites": {name: form.told() for name, form in self._forms.items()},
            "num_dreams": self.num_dreams or num_rows,
        }
        self._mailbox.open(greeting)
        self._greeting = greeting
        self._report(self._mailbox.meet(self._check_fits, self.timeout))
        return greeting

    def _look(self, data: Data) -> dict[str, Form]:
        """Dreams on the side; returns the forms of what this player dreams.

        Raises:
            ValueError: Dreams depend on the data, or have no rows.
        """
        with aside():
            state = randomness.get_state()
            dream = self._dream(NUM_TRIED)
            randomness.set_state(state)
            at_data = self._member.dream(self._stage.play(), data, NUM_TRIED)
        for name, x in dream.items():
            if not close(x, at_data[name]):
                raise ValueError(
                    f"What '{self.name}' dreams at site '{name}' depends on its data, which are not "
                    "to leave it. Let the model read the values of its arguments by obs= alone."
                )
            if x.dim() == 0 or len(x) != NUM_TRIED:
                raise ValueError(
                    f"Expected '{self.name}' to dream a row of site '{name}' for each row of its "
                    f"data, got shape {tuple(x.shape)} for {NUM_TRIED} rows. Sample it in their "
                    "plate."
                )
        like = {name: with_rows(value, NUM_TRIED) for name, value in self._blank.items()}
        return {name: Form.of(shaped(x, like.get(name))) for name, x in dream.items()}

    def _dream(self, num_rows: int) -> Data:
        return self._member.dream(self._stage.play(), self._blank, num_rows)

    def _parcel(self, other: str, there: Greeting) -> bytes:
        """What crosses to another player: dreams, or nothing if it doesn't learn from them."""
        self._check_fits(other, there)
        if self.name not in there["hears"]:
            return b""
        num_dreams = there["num_dreams"]
        return pack(self._shared(there), self._dream(num_dreams), num_dreams)

    def _shared(self, there: Greeting) -> dict[str, Form]:
        """The forms of the sites that both players dream."""
        return {name: form for name, form in self._forms.items() if name in there["sites"]}

    def _check_fits(self, other: str, there: Greeting) -> None:
        """Compares what two players have told.

        Raises:
            ValueError: They can't learn from each other's dreams.
        """
        here = self._greeting
        assert here is not None
        if problems := list(_differences(self.name, here, other, there)):
            self._greeting = None  # it stays in the store, so that the other sees it too
            raise ValueError(
                f"The players '{self.name}' and '{other}' don't fit: {'; '.join(problems)}. Start "
                "them alike, and each run with a store of its own, or a PrefixStore."
            )

    def _awaited(self) -> list[str]:
        return [other for other in self._others if other not in self.missing]

    def _report(self, there: Collection[str]) -> None:
        """Tells who is missing and who is back.

        Raises:
            TimeoutError: Somebody is missing, and nobody goes on without.
        """
        step = self.num_steps
        if back := sorted(self.missing.keys() & there):
            since = {name: self.missing.pop(name) for name in back}
            warnings.warn(
                f"In step {step}, '{self.name}' has dreams of {back} again, who were missing since "
                f"steps {since}.",
                stacklevel=stacklevel(),
            )
        if not (gone := [other for other in self._awaited() if other not in there]):
            return
        why = {True: "has left", False: f"gave no answer within {self.timeout:g} s"}
        fates = [f"'{other}' {why[self._mailbox.has_left(other)]}" for other in gone]
        happened = f"In step {step}, '{self.name}' lacks dreams of others: {', '.join(fates)}."
        if self.on_missing == "stop":
            raise TimeoutError(
                f"{happened} Nothing has moved. Start them again, from their checkpoints, and "
                "call step again; or go on without, on_missing='continue'."
            )
        self.missing |= dict.fromkeys(gone, step)
        warnings.warn(f"{happened} It goes on without.", stacklevel=stacklevel())

    def _weighted(self, own: list[Batch], dreams: Mapping[str, Data]) -> Iterator[Batch]:
        """The player's own batches and others' dreams, which count as the rows of those."""
        total = self.weights[self.name] + sum(self.weights[other] for other in dreams)
        if total == 0:
            raise TimeoutError(
                f"The player '{self.name}' gives its own data no weight, and of "
                f"{list(self.missing)}, from whom it learns, nobody is there. Nothing has moved."
            )
        num_rows = 0.0
        for batch in own:
            num_rows += batch.weight * self._member.num_rows(batch.call[1])
            if self.weights[self.name] > 0:
                yield batch.weighted(batch.weight * self.weights[self.name] / total)
        for other, dream in dreams.items():
            seen = self._member.seen(other, dream, own[0].call[1])
            share = self.weights[other] / total
            yield Batch(**seen).weighted(share * num_rows / len(next(iter(seen.values()))))


def _shares(name: str, weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping) or name not in weights:
        raise ValueError(
            f"Expected weights to name all players, '{name}' among them, got {weights!r}. They "
            f"are the shares of its own data and of the dreams of others: {{'{name}': 0.5, ...}}."
        )
    row = full_weights({name: weights}, list(weights), 0.0)[name]
    check_shares(name, row)
    return row


def _merged(own: list[Batch]) -> Data:
    """All arguments that some batch gives, the first of each."""
    merged: Data = {}
    for batch in reversed(own):
        merged |= {name: x for name, x in batch.call[1].items() if x is not None}
    return merged


def _blank(value: Any) -> Any:
    """A row of zeros in the place of data."""
    return (
        torch.zeros_like(value[:1] if value.dim() else value)
        if isinstance(value, Tensor)
        else value
    )


def _differences(name: str, here: Greeting, other: str, there: Greeting) -> Iterator[str]:
    """What keeps two players from learning from each other's dreams."""
    for key in ("format", "byteorder", "players"):
        if there.get(key) != here[key]:
            yield f"{key}: {here[key]} of '{name}', {there.get(key)} of '{other}'"
            return
    for site in sorted(here["sites"].keys() & there["sites"].keys()):
        if there["sites"][site] != here["sites"][site]:
            yield (
                f"site '{site}': {here['sites'][site]} of '{name}', {there['sites'][site]} of "
                f"'{other}'"
            )
    for learner, dreamer, wants, has in ((name, other, here, there), (other, name, there, here)):
        shared = here["sites"].keys() & there["sites"].keys()
        if dreamer in wants["hears"] and not (shared and shared >= set(wants["needs"])):
            yield (
                f"'{learner}' takes {sorted(wants['sites'])} and needs {wants['needs']}, "
                f"'{dreamer}' dreams {sorted(has['sites'])}"
            )
