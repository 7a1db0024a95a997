r"""The two models of ``data_exchange.py``, each in a process of its own, where only dreams cross.

Neither process ever reads the digits of the other, and they may run on different machines. They
meet at a store, which is a process, too. On one machine, in three shells:

.. code-block:: shell

    python -m pyro_symeq.store
    python examples/apart.py --player low
    python examples/apart.py --player high

or in one, ``torchrun --nproc-per-node 2 examples/apart.py``, which brings a store along. Between
machines, the store runs with ``--host ADDRESS`` and players with ``--store ADDRESS:29500``.

First each learns alone, then they exchange dreams. A player that is stopped while they do, however
hard, goes on from its checkpoint with ``--resume``. Meanwhile the other goes on without it.

Run ``python examples/apart.py --help`` for the options.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import torch.distributed
from torch import Tensor

from cli import amount, begun, ended_cleanly, parser, share

with ended_cleanly("apart.py"):
    from data import DataError, load
    from data_exchange import NUM_DRAWS, OWN, SETTINGS, VAE, drawn, of
    from long_runs import RunError
    from pyro_symeq import DreamExchange, Game, data_exchange_game
    from pyro_symeq.metrics import log_likelihood
    from training import cosine, train

EVERY = 50  # steps between checkpoints
NUM_TEST = 1000  # images of each kind, to be scored


class Saved:
    """A game that is saved after the first step, and then every few steps.

    Args:
        game: The game.
        path: The file, which is replaced as a whole.
        every: After how many steps it is, each time.
    """

    def __init__(self, game: Game, path: Path, every: int) -> None:
        self.game = game
        self.path = path
        self.every = every

    def step(self, x: Tensor) -> float:
        """Lets the player move on images of its own."""
        loss = self.game.step(x)
        if self.game.num_steps == 1 or self.game.num_steps % self.every == 0:
            self.game.save(self.path)
        return loss


class Alone:
    """A model that learns from its own images alone.

    Args:
        vae: The model.
        optim: The optimiser.
    """

    def __init__(self, vae: VAE, optim: pyro.optim.PyroOptim) -> None:
        self.name = vae.name
        self.game = data_exchange_game({vae.name: (vae.model, vae.guide)}, optim)

    def step(self, x: Tensor) -> float:
        """Lets the player move on images of its own."""
        return self.game.step(**{self.name: {"x": x}})


def address(text: str) -> tuple[str, int]:
    """Reads a host and a port."""
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected host:port, got {text!r}")
    return host, int(port)


def connected(host: str, port: int) -> Any:
    """The store at an address, if it answers within a minute."""
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, timeout=timedelta(minutes=1)
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the options of the program, and what ``torchrun`` tells."""
    told = os.environ
    options = parser("A model learns digits that it never had from one elsewhere.", SETTINGS)
    options.add_argument(
        "--player",
        choices=list(OWN),
        default=list(OWN)[int(told.get("RANK", 0)) % len(OWN)],
        help="which model: of digits 0 to 4, or of 5 to 9 (default: by torchrun's rank)",
    )
    options.add_argument(
        "--store",
        type=address,
        default=f"{told.get('MASTER_ADDR', '127.0.0.1')}:{told.get('MASTER_PORT', 29500)}",
        help="where the store is (default: torchrun's, or %(default)s)",
    )
    options.add_argument(
        "--alpha",
        type=share,
        default=0.5,
        help="the weight of its own images; the dreams of the other have the rest "
        "(default: %(default)s)",
    )
    options.add_argument(
        "--timeout",
        type=amount,
        default=300.0,
        help="how long to wait for the other (seconds; default: %(default)s)",
    )
    options.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out"
    )
    return options.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Trains a model alone and then with exchange; tells how likely it finds real test images."""
    name = options.player
    (other,) = OWN.keys() - {name}
    settings = begun(options, SETTINGS[options.data])
    images = load(options.data, options.data_root).to(options.device)
    own = of(OWN[name], images.x, images.y)
    pyro.set_rng_seed(2 * options.seed + list(OWN).index(name))
    vae = VAE(name, images.x.shape[-1], settings).to(images.x)
    path = options.out / f"apart-{options.data}-{name}.pt"
    if options.resume and not path.exists():
        raise RunError(f"There is no checkpoint {path}. Start without --resume.")
    store = connected(*options.store)

    def batch() -> tuple[Tensor]:
        return (drawn(own, settings.batch_size),)

    def tell(how: str) -> None:
        for whose, digits in (("its own", OWN[name]), ("never had", OWN[other])):
            real = of(digits, images.held_out_x, images.held_out_y)[:NUM_TEST]
            mean = log_likelihood(vae.model, vae.guide, real, num_draws=NUM_DRAWS).mean
            print(f"{name}, {how}: log p = {mean:.1f} nats of real digits, {whose}", flush=True)

    if not options.resume:
        optim = cosine(settings.steps, settings.learning_rate)
        train(Alone(vae, optim), optim, batch, settings.steps)
        tell("alone")
    optim = cosine(settings.steps, settings.learning_rate)
    with DreamExchange(
        name,
        (vae.model, vae.guide),
        optim,
        {name: options.alpha, other: 1 - options.alpha},
        store,
        timeout=options.timeout,
        on_missing="continue",
    ) as exchange:
        if options.resume:
            exchange.load(path)
        saved = Saved(exchange, path, min(EVERY, settings.steps))
        train(saved, optim, batch, settings.steps - exchange.num_steps)
    tell("with exchange")


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    with ended_cleanly("apart.py", DataError, RunError, torch.distributed.DistError):
        run(options)


if __name__ == "__main__":
    main()
