r"""Trains a model and a guide with PyTorch Lightning.

Lightning takes one step of one optimiser for each batch. Here the players move within that step
in turn, each by an optimiser of its own: the decoder along :math:`\nabla_\theta L_p`, then the
encoder along :math:`\nabla_\varphi L_q` against the new decoder. For each turn the step asks
Lightning for gradients once more, as line searches do. So all that Lightning does about gradients
and steps (clipping, accumulation, precision, means over processes, schedulers, counting) is as
ever.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params import module_from_param_with_module_name
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_symeq import randomness
from pyro_symeq.aside import aside, buffers_kept
from pyro_symeq.batch import Batch, batches
from pyro_symeq.binding import Call, Program, module_of
from pyro_symeq.checks import check_count
from pyro_symeq.equilibrium import information_in, schedule, whose
from pyro_symeq.ownership import NOTHING_TO_LEARN, Parameters
from pyro_symeq.play import Ascent, Score, Stage, ascent
from pyro_symeq.player import Own, Player, claims_of
from pyro_symeq.turns import TurnsOptimizer
from pyro_symeq.uncompiled import uncompiled
from pyro_symeq.utility import SymmetricUtility, attach
from pyro_symeq.warmup import CodeWarmup, may_have_collapsed, warn_if_collapsed

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        'SymmetricModule needs PyTorch Lightning. Run: pip install "pyro_symeq[lightning]".'
    ) from error

__all__ = ["SymmetricModule"]

PLAYERS = ("decoder", "encoder")
KEY = "symmetric_equilibrium"  # of the state of the schedule in a checkpoint

Optim = Callable[[list[Tensor]], Optimizer]
State = dict[str, Any]


class SymmetricModule(LightningModule):
    r"""Learns a model and a guide as the two players of a game, by ``lightning.Trainer``.

    A step of the trainer is a step of :class:`~pyro_symeq.SymmetricEquilibrium`, with all moves
    of its schedule. It logs the utilities ``train/decoder`` and ``train/encoder`` and the loss
    ``train/loss``. Validation and test log the same under ``val/`` and ``test/``, and nothing
    moves. All are what a step returns, nats summed over the batch: means over processes and, in
    validation and test, over batches.

    Networks are found where the programs are: ``model`` and ``guide`` are modules or methods of
    modules, or their networks are in ``parameters=``. Parameters of ``pyro.param`` are taken over
    from the parameter store, where they remain.

    Args:
        model: The decoder's program, :math:`p_\theta(x, z)`.
        guide: The encoder's program, :math:`q_\varphi(z \mid x)`; it takes the model's arguments.
        optim: Makes an optimiser of PyTorch for a list of parameters, such as
            ``partial(torch.optim.Adam, lr=1e-3)``; or a pair, the decoder's and the encoder's.
        loss: The utilities, with ``bind=`` and the other options of
            :class:`~pyro_symeq.SymmetricUtility`.
        example: A batch as the data loader gives it, with few rows perhaps. Both programs run on
            it on the side, so that it is known which parameters are whose. If batches are of
            several kinds, it needs all of them.
        parameters: Modules whose parameters are the ``"decoder"``'s or the ``"encoder"``'s own, as
            in :class:`~pyro_symeq.SymmetricEquilibrium`; if both are given, there need be no
            example.
        scheduler: Makes a learning rate scheduler, or what Lightning takes for one (a dict with
            ``"scheduler"``, ``"interval"``, ``"monitor"``), for the optimiser of both players. It
            has a group of parameters for each, ``"decoder"`` and ``"encoder"``.
        updates: See :class:`~pyro_symeq.SymmetricEquilibrium`, as for what follows.
        decoder_steps: How often the decoder moves in a step.
        encoder_steps: How often the encoder does.
        encoder_warmup: The number of steps at the start in which the encoder alone moves.
        code_warmup: For how many steps the encoder learns a code besides, if it needs one.

    Attributes:
        num_steps: How many steps have been taken.

    Raises:
        TypeError: ``optim`` is neither a function nor a pair of functions, or ``loss`` is no
            :class:`~pyro_symeq.SymmetricUtility`.
        ValueError: The pair can't learn from such a batch, it isn't known which parameters are
            whose, a program uses a network that isn't found, or an option has a value that it
            can't have.

    Example:
        >>> from functools import partial
        >>> class VAE(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.decoder, self.encoder = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
        ...     def model(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
        ...             pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)
        ...     def guide(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))
        >>> vae, data = VAE(), torch.eye(4)
        >>> adam = partial(torch.optim.Adam, lr=1e-3)
        >>> module = SymmetricModule(vae.model, vae.guide, adam, example=data)
        >>> # lightning.Trainer().fit(module, DataLoader(data, batch_size=2))
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optim | tuple[Optim, Optim],
        loss: SymmetricUtility | None = None,
        *,
        example: Any = None,
        parameters: Mapping[str, Own] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        updates: str = "alternating",
        decoder_steps: int = 1,
        encoder_steps: int = 1,
        encoder_warmup: int = 0,
        code_warmup: int = 1000,
    ) -> None:
        super().__init__()
        check_count("encoder_warmup", encoder_warmup, at_least=0)
        check_count("code_warmup", code_warmup, at_least=0)
        own = whose(parameters)
        self.encoder_warmup = encoder_warmup
        self.num_steps = 0
        self._programs = {"decoder": model, "encoder": guide}
        self._pair = _utility_of(loss).pair(model, guide)
        self._optims = _pair_of(optim)
        self._scheduler = scheduler
        self._schedule = schedule(updates, decoder_steps, encoder_steps)
        self._code = CodeWarmup(code_warmup)
        self._turn: tuple[str, ...] = ()
        self._waiting: list[Any] = []
        self._utilities: dict[str, Tensor] = {}
        self._seed: int | None = None
        self._random: State | None = None
        self.networks = nn.ModuleList(_outermost([*map(module_of, (model, guide)), *own.values()]))
        self.statements = nn.ParameterDict()  # of pyro.param
        self._own = self._held(self._found(own, example))
        self._stage = self._stage_of(self._own)

    def arguments(self, batch: Any) -> Call:
        """What model and guide take for a batch of the loader; override it for other batches.

        Args:
            batch: A mapping gives keyword arguments, a list or tuple gives arguments, all else is
                the only one.

        Returns:
            Arguments and keyword arguments; instead of arguments, one :class:`~pyro_symeq.Batch`
            or several.
        """
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return (tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)), {}

    def configure_optimizers(self) -> Any:  # noqa: D102
        optimizer = TurnsOptimizer(
            {
                name: _made(optim, list(own.values()))
                for optim, (name, own) in zip(self._optims, self._own.items(), strict=True)
                if own
            },
            self._turns,
        )
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def setup(self, stage: str) -> None:  # noqa: D102
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "Expected a strategy for one device, or 'ddp' for several, got "
                f"{type(strategy).__name__}. Others take parameters apart, so that it can't be "
                "told whose they are."
            )

    def on_fit_start(self) -> None:  # noqa: D102
        self._waiting.clear()
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(int(torch.randint(2**62, ())))
        if self._random is not None and self.trainer.ckpt_path is not None:
            randomness.set_state(self._random)
        self._random = None

    @uncompiled
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Tells the gradients of those whose turn it is, or keeps the batch until they move."""
        if not self._turn:
            self._waiting.append(batch)
            return torch.zeros((), device=self.device, requires_grad=True)
        parts = [part for x in (*self._waiting, batch) for part in batches(self.arguments(x))]
        call: Call = (tuple(parts), {})
        if not self._utilities:
            self._look(parts)
        ways = {name: self._ascent(name, call) for name in self._turn}
        resting = set(PLAYERS) - self._moving() - self._utilities.keys()
        utilities = {name: way.utility for name, way in ways.items()} | self._drawn(call, resting)
        share = 1 / (1 + len(self._waiting))
        self._utilities |= {name: share * utility for name, utility in utilities.items()}
        loss = -torch.stack([way.utility for way in ways.values()]).sum()
        gradients = self._gradients(ways.values())
        return attach(loss, gradients) if gradients else loss.requires_grad_()

    def optimizer_step(  # noqa: D102
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        try:
            with self._seeded(self.num_steps):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self._log("train", self._utilities)
        finally:
            self._turn, self._utilities = (), {}
        self._waiting.clear()
        self.num_steps += 1

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs the utilities ``val/decoder`` and ``val/encoder``, and the loss ``val/loss``."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Logs the utilities ``test/decoder`` and ``test/encoder``, and the loss ``test/loss``."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: State) -> None:  # noqa: D102
        checkpoint[KEY] = {
            "num_steps": self.num_steps,
            "code_begun": self._code.begun,
            "seed": self._seed,
            "random": randomness.get_state(),
        }

    def on_load_checkpoint(self, checkpoint: State) -> None:  # noqa: D102
        if KEY not in checkpoint:
            raise ValueError(
                "Expected a checkpoint of a SymmetricModule, got one with the keys "
                f"{sorted(checkpoint)}. Load one that a trainer has saved of such a module."
            )
        state = checkpoint[KEY]
        self._code.load(state["code_begun"])
        self.num_steps, self._seed = state["num_steps"], state["seed"]
        self._random = state["random"]

    def _turns(self) -> Iterator[tuple[str, ...]]:
        """Those who move in this step, at once and in turn."""
        moving = self._moving()
        for names in self._schedule:
            self._turn = tuple(name for name in names if name in moving)
            if self._turn:
                yield self._turn

    def _moving(self) -> set[str]:
        """The players that may move in this step."""
        learners = {name for name, own in self._own.items() if own}
        is_warming_up = self.num_steps < self.encoder_warmup and "encoder" in learners
        return learners - {"decoder"} if is_warming_up else learners

    def _ascent(self, name: str, call: Call) -> Ascent:
        with self._pair.coded(self._code.weight(self.num_steps)):
            return ascent(partial(self._score, name), call)

    def _score(self, name: str, call: Call) -> Score:
        """Scores a player.

        Raises:
            ValueError: The utility is not finite, or depends on parameters that nobody moves.
        """
        score = self._stage.score(name, call)
        strangers = [*(score.parameters.keys() - self._own[name]), *_labelled(score.unnamed)]
        if strangers:
            raise ValueError(
                f"The program of the {name} uses parameters that came up after the optimisers "
                f"were made: {sorted(strangers)}. Give an example= with batches of all kinds, or "
                "parameters=."
            )
        score.check()
        return score

    def _gradients(self, ways: Iterable[Ascent]) -> dict[Tensor, Tensor]:
        """The gradients by parameter; processes exchange them for all parameters."""
        gradients = {
            leaf: gradient
            for way in ways
            for leaf, gradient in zip(way.parameters.values(), way.gradients, strict=True)
            if gradient is not None
        }
        if self.trainer.world_size == 1:
            return gradients
        leaves = [leaf for leaf in self.parameters() if leaf.requires_grad]
        return {
            leaf: gradients[leaf] if leaf in gradients else torch.zeros_like(leaf)
            for leaf in leaves
        }

    def _drawn(self, call: Call, names: Iterable[str]) -> dict[str, Tensor]:
        """The utilities of players that don't move."""
        with torch.no_grad():
            return {name: self._score(name, call).utility for name in PLAYERS if name in names}

    @uncompiled
    def _evaluate(self, stage: str, batch: Any, *numbers: int) -> None:
        with self._seeded(self.num_steps, *numbers), buffers_kept():
            self._log(stage, self._drawn(self.arguments(batch), PLAYERS))

    def _log(self, stage: str, utilities: Mapping[str, Tensor]) -> None:
        values = {f"{stage}/{name}": utilities[name] for name in PLAYERS}
        loss = {f"{stage}/loss": -sum(values.values())}
        self.log_dict(values, prog_bar=True, batch_size=1, sync_dist=True)
        self.log_dict(loss, batch_size=1, sync_dist=True)

    @contextmanager
    def _seeded(self, *numbers: int) -> Iterator[None]:
        """Lets random numbers depend on the seed, the process and these numbers alone."""
        with randomness.kept():
            if self._seed is not None:
                randomness.seed(self._seed, self.global_rank, *numbers)
            yield

    def _look(self, parts: Sequence[Batch]) -> None:
        """Looks at the information in the latents, where it matters; the first process decides."""
        steps = self.num_steps
        if self._code.may_begin(steps):
            self._code.begin(steps, self._information(parts, are_coded=True))
            self._code.load(self.trainer.strategy.broadcast(self._code.begun))
        if may_have_collapsed(steps) and self.trainer.is_global_zero:
            warn_if_collapsed(steps, self._information(parts))

    def _information(self, parts: Sequence[Batch], are_coded: bool = False) -> dict[str, Tensor]:
        return information_in(self._pair, self._stage.play(), parts, are_coded)

    def _stage_of(self, claims: Mapping[str, Parameters]) -> Stage:
        utilities = {"decoder": self._pair.decoder, "encoder": self._pair.encoder}
        return Stage(self._programs, utilities, claims)

    def _found(self, own: Mapping[str, Own], example: Any) -> dict[str, Parameters]:
        """The parameters of each player.

        Args:
            own: What players claim.
            example: A batch.

        Raises:
            ValueError: There is too little to find them by.
        """
        claims = claims_of(
            Player(name, program, parameters=own.get(name))
            for name, program in self._programs.items()
        )
        if example is not None:
            return self._rehearsed(self.arguments(example), claims)
        if claims.keys() != self._programs.keys():
            raise ValueError(
                "Expected example=, a batch as the data loader gives it, or the networks of both "
                "players, parameters={'decoder': ..., 'encoder': ...}, got neither. It must be "
                "known which parameters are whose before their optimisers are made."
            )
        return claims

    def _rehearsed(self, call: Call, claims: Mapping[str, Parameters]) -> dict[str, Parameters]:
        """Runs both programs on the side, once more if that brought up statements."""
        stage = self._stage_of(claims)
        with aside(), torch.enable_grad():
            scores = {name: stage.score(name, call) for name in PLAYERS}
        for score in scores.values():
            score.check()
        found = {
            name: score.parameters | _labelled(score.unnamed) for name, score in scores.items()
        }
        if not any(found.values()):
            raise ValueError(NOTHING_TO_LEARN)
        if self._take_over(found.values()):
            return self._rehearsed(call, claims)
        return found

    def _take_over(self, found: Iterable[Parameters]) -> bool:
        """Makes parameters of ``pyro.param`` those of this module, too; whether there were any."""
        held = set(self.parameters())
        new: Parameters = {
            name: leaf if isinstance(leaf, nn.Parameter) else nn.Parameter(leaf.detach())
            for own in found
            for name, leaf in own.items()
            if leaf not in held and name in pyro.get_param_store() and _is_statement(name)
        }
        pyro.get_param_store().set_state({"params": new, "constraints": {}})
        self.statements.update({name.replace(".", "/"): leaf for name, leaf in new.items()})
        return bool(new)

    def _held(self, found: Mapping[str, Parameters]) -> dict[str, Parameters]:
        """The parameters of each player by the names that they have in this module.

        Raises:
            ValueError: The module doesn't hold some.
        """
        names: dict[Tensor, str] = {leaf: name for name, leaf in self.named_parameters()}
        own = [pair for parameters in found.values() for pair in parameters.items()]
        if strangers := sorted(name for name, leaf in own if leaf not in names):
            raise ValueError(
                f"The programs use parameters of networks that the module doesn't find: "
                f"{strangers}. They would be neither moved to the device nor saved. Let model and "
                "guide be methods of a module that has the networks, or give these as "
                "parameters={'decoder': ..., 'encoder': ...}. If they are there, other parameters "
                "of their names are in the way: call pyro.clear_param_store() before a new "
                "training."
            )
        return {
            player: {names[leaf]: leaf for leaf in parameters.values() if leaf.requires_grad}
            for player, parameters in found.items()
        }


def _labelled(leaves: Iterable[Tensor]) -> Parameters:
    """Parameters without a name, by their shapes."""
    return {f"number {i} of shape {tuple(leaf.shape)}": leaf for i, leaf in enumerate(leaves)}


def _is_statement(name: str) -> bool:
    """Whether a parameter has its name from ``pyro.param`` and not from ``pyro.module``."""
    return module_from_param_with_module_name(name) == name


def _outermost(candidates: Iterable[Any]) -> list[nn.Module]:
    """Those that are modules, each once and without those that others hold."""
    modules = list(dict.fromkeys(x for x in candidates if isinstance(x, nn.Module)))
    return [
        module
        for module in modules
        if not any(module in other.modules() for other in modules if other is not module)
    ]


def _utility_of(loss: Any) -> SymmetricUtility:
    if not isinstance(loss, (SymmetricUtility, type(None))):
        raise TypeError(
            f"Expected loss to be a SymmetricUtility, got {type(loss).__name__}. Leave it out, or "
            "give its options to a SymmetricUtility."
        )
    return loss or SymmetricUtility()


def _pair_of(optim: Any) -> tuple[Optim, Optim]:
    pair = optim if isinstance(optim, (tuple, list)) else (optim, optim)
    if len(pair) != 2 or not all(map(_may_make, pair)):
        raise TypeError(
            "Expected optim to be a function that makes an optimiser of PyTorch for a list of "
            f"parameters, or a pair of them (decoder, encoder), got {optim!r}. Give "
            "partial(torch.optim.Adam, lr=1e-3), say."
        )
    return pair[0], pair[1]


def _may_make(optim: Any) -> bool:
    return callable(optim) and not isinstance(optim, PyroOptim)


def _made(optim: Optim, parameters: list[Tensor]) -> Optimizer:
    optimizer = optim(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected optim to make an optimiser of PyTorch, got {type(optimizer).__name__}. "
            "Give partial(torch.optim.Adam, lr=1e-3), say."
        )
    return optimizer
