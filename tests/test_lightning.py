"""Games that PyTorch Lightning trains are those that we train, and nothing it is told is lost."""

import copy
import importlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_symeq import Batch, SymmetricEquilibrium, SymmetricUtility, randomness
from pyro_symeq.lightning import SymmetricModule
from tests import lightning_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

SGD = partial(torch.optim.SGD, lr=0.01)
Adam = partial(torch.optim.Adam, lr=0.01)


class VAE(nn.Module):
    """A pair whose encoder leans on the decoder's network."""

    def __init__(self, num_latents=3):
        super().__init__()
        self.num_latents = num_latents
        self.decoder = nn.Linear(num_latents, 6)
        self.encoder = nn.Linear(6, num_latents)

    def model(self, x, z=None):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            prior = dist.Bernoulli(x.new_full((self.num_latents,), 0.5)).to_event(1)
            z = pyro.sample("z", prior, obs=z)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, z=None):
        pyro.module("encoder", self.encoder)
        logits = self.encoder(x) + (2 * x - 1) @ self.decoder.weight
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def data(num_rows=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(num_rows, 6, generator=generator).round()


def loader(x=None, **options):
    options = {"batch_size": 4} | options
    return DataLoader(data() if x is None else x, **options)


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def module_of(vae, optim=SGD, **options):
    return SymmetricModule(vae.model, vae.guide, optim, example=data(2), **options)


def seeded(seed=0):
    """Seeds all, and returns the number on which the draws of a training that starts depend."""
    pyro.set_rng_seed(seed)
    number = int(torch.randint(2**62, ()))
    pyro.set_rng_seed(seed)
    return number


def reference(vae, seed, steps, **options):
    """Takes steps of ``SymmetricEquilibrium`` with the draws of a trainer; returns the losses."""
    pyro.clear_param_store()
    symeq = SymmetricEquilibrium(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.01}), **options)
    losses = []
    for step, batch in enumerate(steps):
        randomness.seed(seed, 0, step)
        losses.append(symeq.step(*batch))
    return losses


def twins(**options):
    """Two equal pairs."""
    torch.manual_seed(3)
    vae = VAE(**options)
    return vae, copy.deepcopy(vae)


def assert_equal(vae, twin):
    for one, other in zip(vae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Losses(Callback):
    """Keeps the losses that a training logs."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *_):
        self.losses.append({n: x.item() for n, x in trainer.callback_metrics.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"updates": "simultaneous"},
        {"decoder_steps": 2, "encoder_steps": 3},
        {"updates": "simultaneous", "encoder_steps": 2},
        {"encoder_warmup": 2},
    ],
    ids=str,
)
def test_a_trainer_takes_the_steps_of_a_game(options, tmp_path):
    vae, twin = twins()
    module, logged = module_of(vae, **options), Losses()
    seed = seeded()
    trainer(tmp_path, logged).fit(module, loader())
    losses = reference(twin, seed, [(x,) for x in data().split(4)], **options)
    assert_equal(vae, twin)
    for found, loss in zip(logged.losses, losses, strict=True):
        assert found["train/decoder"] == pytest.approx(loss.decoder)
        assert found["train/encoder"] == pytest.approx(loss.encoder)
        assert found["train/loss"] == pytest.approx(loss)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_module_takes_the_same_steps(tmp_path):
    vae, twin = twins()
    module = torch.compile(module_of(vae), backend="eager")
    seed = seeded()
    trainer(tmp_path).fit(module, loader(), loader())
    reference(twin, seed, [(x,) for x in data().split(4)])
    assert_equal(vae, twin)


def test_a_code_is_learned_where_latents_say_nothing(tmp_path):
    vae, twin = twins(num_latents=8)
    with torch.no_grad():
        for pair in (vae, twin):
            pair.encoder.weight.zero_()
            pair.decoder.weight.zero_()
    module = module_of(vae)
    seed = seeded()
    trainer(tmp_path, max_epochs=20).fit(module, loader())
    reference(twin, seed, [(x,) for _ in range(20) for x in data().split(4)])
    assert_equal(vae, twin)
    state = {}
    module.on_save_checkpoint(state)
    assert state["symmetric_equilibrium"]["code_begun"] == 50


def test_collapse_is_warned_of(tmp_path):
    vae = VAE(num_latents=8)
    for parameter in vae.parameters():
        nn.init.zeros_(parameter)
    module = module_of(vae, partial(torch.optim.SGD, lr=0.0), code_warmup=0)
    module.num_steps = 499
    with pytest.warns(UserWarning, match="After 500 steps the latents say hardly anything"):
        trainer(tmp_path).fit(module, loader())


def test_parameters_of_the_model_are_the_decoders():
    vae = VAE()
    optimizer = module_of(vae).configure_optimizers()
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert groups == {
        "decoder": [vae.decoder.weight, vae.decoder.bias],
        "encoder": [vae.encoder.weight, vae.encoder.bias],
    }


def test_players_are_told_without_an_example(tmp_path):
    vae, twin = twins()
    parameters = {"decoder": vae.decoder, "encoder": vae.encoder}
    module = SymmetricModule(vae.model, vae.guide, SGD, parameters=parameters)
    seed = seeded()
    trainer(tmp_path).fit(module, loader())
    reference(twin, seed, [(x,) for x in data().split(4)])
    assert_equal(vae, twin)


def test_claims_come_before_what_the_model_touches():
    vae = VAE()
    module = module_of(vae, parameters={"encoder": vae})
    assert [g["name"] for g in module.configure_optimizers().param_groups] == ["encoder"]


def test_functions_play_with_the_networks_that_they_are_told():
    decoder, encoder = VAE().decoder, VAE().encoder

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    parameters = {"decoder": decoder, "encoder": encoder}
    module = SymmetricModule(model, guide, SGD, parameters=parameters, example=data())
    assert set(module.parameters()) == {*decoder.parameters(), *encoder.parameters()}
    with pytest.raises(ValueError, match="networks that the module doesn't find: .*shape"):
        SymmetricModule(model, guide, SGD, example=data())


def test_handlers_around_a_program_hide_no_network():
    vae = VAE()
    module = SymmetricModule(
        pyro.poutine.scale(vae.model, scale=0.5), partial(vae.guide, z=None), SGD, example=data()
    )
    assert set(module.parameters()) == set(vae.parameters())
    assert [*module.networks] == [vae]


def coin(heads):
    p = pyro.param("p.heads", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
    with pyro.plate("throws", len(heads)):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("heads", dist.Bernoulli(0.2 + 0.6 * z), obs=heads)


def guess(heads):
    slope = pyro.param("slope", torch.tensor(1.0))
    with pyro.plate("throws", len(heads)):
        pyro.sample("z", dist.Bernoulli(logits=slope * (2 * heads - 1)))


def test_statements_of_parameters_learn_and_are_saved(tmp_path):
    heads = torch.tensor([1.0, 1.0, 0.0, 1.0])
    module = SymmetricModule(coin, guess, Adam, example=heads)
    fitted = trainer(tmp_path, max_epochs=3)
    fitted.fit(module, loader(heads))
    p, slope = pyro.param("p.heads").item(), pyro.param("slope").item()
    assert p != pytest.approx(0.3) and slope != 1.0
    assert [g["name"] for g in fitted.optimizers[0].param_groups] == ["decoder", "encoder"]
    fitted.save_checkpoint(tmp_path / "coin.ckpt")
    for store in ("kept", "cleared"):
        if store == "cleared":
            pyro.clear_param_store()
        else:
            pyro.get_param_store()["slope"] = torch.tensor(7.0)
        SymmetricModule.load_from_checkpoint(
            tmp_path / "coin.ckpt",
            model=coin,
            guide=guess,
            optim=Adam,
            example=heads,
            weights_only=True,
        )
        assert pyro.param("p.heads").item() == pytest.approx(p)
        assert pyro.param("slope").item() == pytest.approx(slope)


class Scales(PyroModule):
    """A pair of Pyro's modules, with a parameter that is positive."""

    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 4)
        self.encoder = PyroModule[nn.Linear](4, 2)
        self.scale = PyroParam(torch.ones(4), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def test_pyro_modules(tmp_path):
    pair, x = Scales(), torch.randn(8, 4)
    module = SymmetricModule(pair, pair.guide, Adam, example=x)
    before = {name: value.clone() for name, value in pair.named_parameters()}
    trainer(tmp_path).fit(module, loader(x))
    assert [*module.networks] == [pair] and not module.statements
    assert not any(torch.equal(before[name], value) for name, value in pair.named_parameters())
    assert before.keys() == {
        *(f"{net}.{part}" for net in ("decoder", "encoder") for part in ("weight", "bias")),
        "scale_unconstrained",
    }


class Mixed(SymmetricModule):
    def arguments(self, batch):
        return (Batch(*batch["labelled"]).weighted(2.0), Batch(batch["unlabelled"][0])), {}


def test_batches_of_several_kinds_make_up_a_step(tmp_path):
    vae, twin = twins()
    x, z = data(), torch.eye(3).repeat(4, 1)
    loaders = {
        "labelled": DataLoader(TensorDataset(x, z), batch_size=4),
        "unlabelled": DataLoader(TensorDataset(x.flip(0)), batch_size=4),
    }
    example = {"labelled": (x[:2], z[:2]), "unlabelled": (x[:2],)}
    loss = SymmetricUtility(bind={"x": "x", "z": "z"}, supervise_encoder=False)
    module = Mixed(vae.model, vae.guide, SGD, loss, example=example)
    seed = seeded()
    trainer(tmp_path).fit(module, loaders)
    batches = zip(x.split(4), z.split(4), x.flip(0).split(4), strict=True)
    steps = [(Batch(a, b).weighted(2.0), Batch(c)) for a, b, c in batches]
    loss = SymmetricUtility(bind={"x": "x", "z": "z"}, supervise_encoder=False)
    reference(twin, seed, steps, loss=loss)
    assert_equal(vae, twin)


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_containers_are_arguments(kind, tmp_path):
    vae = VAE()
    batch = {"x": data(), "z": None} if kind is dict else kind([data(), None])
    module = SymmetricModule(vae.model, vae.guide, SGD, example=batch)
    trainer(tmp_path).fit(module, DataLoader([batch, batch], batch_size=None))
    assert module.num_steps == 2


class TestTrainer:
    """What a trainer is told, it does."""

    def test_gradients_accumulate(self, tmp_path):
        vae, twin = twins()
        module, logged = module_of(vae), Losses()
        seed = seeded()
        fitted = trainer(tmp_path, logged, accumulate_grad_batches=3, max_epochs=2)
        fitted.fit(module, loader(batch_size=2))
        step = [Batch(x).weighted(1 / 3) for x in data().split(2)]
        losses = reference(twin, seed, 2 * [step[:3], step[3:]])
        assert_equal(vae, twin)
        assert fitted.global_step == module.num_steps == 4
        assert logged.losses[2]["train/decoder"] == pytest.approx(losses[0].decoder)
        assert logged.losses[-1]["train/loss"] == pytest.approx(losses[-1])

    def test_gradients_are_clipped_for_each_player(self, tmp_path):
        vae, twin = twins()
        module = module_of(vae, partial(torch.optim.SGD, lr=1.0))
        trainer(tmp_path, gradient_clip_val=0.1, max_steps=1, max_epochs=-1).fit(module, loader())
        for network, before in ((vae.decoder, twin.decoder), (vae.encoder, twin.encoder)):
            pairs = zip(network.parameters(), before.parameters(), strict=True)
            moves = torch.cat([(x - y).flatten() for x, y in pairs])
            assert moves.norm().item() == pytest.approx(0.1, rel=1e-4)

    def test_steps_are_counted_and_rates_follow_them(self, tmp_path):
        def decay(optimizer):
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"scheduler": scheduler, "interval": "step"}

        optims = partial(torch.optim.SGD, lr=0.4), partial(torch.optim.Adam, lr=0.8)
        module = module_of(VAE(), optims, scheduler=decay, decoder_steps=2)
        rates = LearningRateMonitor()
        logger = CSVLogger(tmp_path)
        fitted = trainer(tmp_path, rates, max_steps=3, max_epochs=-1, logger=logger)
        fitted.fit(module, loader(batch_size=2))
        assert fitted.global_step == module.num_steps == 3
        assert rates.lrs == {
            "lr-TurnsOptimizer/decoder": [0.4, 0.2, 0.1],
            "lr-TurnsOptimizer/encoder": [0.8, 0.4, 0.2],
        }
        optimizers = fitted.optimizers[0].optimizers
        assert optimizers["decoder"].param_groups[0]["lr"] == pytest.approx(0.05)
        assert optimizers["encoder"].param_groups[0]["lr"] == pytest.approx(0.1)
        logger.save()
        header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        assert {"train/decoder", "train/encoder", "train/loss"} <= set(header.split(","))
        assert len(rows) >= 3

    def test_rates_follow_held_out_utilities(self, tmp_path):
        def plateau(optimizer):
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, mode="min"
            )
            return {"scheduler": scheduler, "monitor": "val/decoder"}  # it gets worse: it grows

        module = module_of(VAE(), scheduler=plateau)
        fitted = trainer(tmp_path, max_epochs=6, num_sanity_val_steps=0)
        fitted.fit(module, loader(), loader())
        assert fitted.optimizers[0].param_groups[0]["lr"] < 0.01

    def test_training_stops_early_on_held_out_utilities(self, tmp_path):
        module = module_of(VAE())
        stop = EarlyStopping("val/decoder", mode="max", patience=1, min_delta=1e6)
        fitted = trainer(tmp_path, stop, max_epochs=9)
        fitted.fit(module, loader(), loader())
        assert fitted.current_epoch == 2

    def test_held_out_utilities_are_means_over_batches(self, tmp_path):
        vae = VAE()
        module, seed = module_of(vae), seeded()
        fitted = trainer(tmp_path)
        fitted.fit(module, loader())
        (found,) = fitted.validate(module, loader(), verbose=False)
        symeq = SymmetricEquilibrium(vae.model, vae.guide, pyro.optim.SGD({"lr": 0.01}))
        losses = []
        for number, x in enumerate(data().split(4)):
            randomness.seed(seed, 0, 3, number, 0)
            losses.append(symeq.evaluate_loss(x))
        assert found["val/decoder"] == pytest.approx(sum(x.decoder for x in losses) / 3)
        assert found["val/encoder"] == pytest.approx(sum(x.encoder for x in losses) / 3)
        assert found["val/loss"] == pytest.approx(sum(losses) / 3)

    def test_nothing_moves_in_a_test(self, tmp_path):
        vae, twin = twins()
        (found,) = trainer(tmp_path).test(module_of(vae), loader(), verbose=False)
        assert {*found} == {"test/decoder", "test/encoder", "test/loss"}
        assert_equal(vae, twin)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_precision(self, precision, tmp_path):
        torch.set_default_dtype(torch.float32)
        vae, twin = twins()
        module = module_of(vae, Adam)
        trainer(tmp_path, precision=precision).fit(module, loader(), loader())
        dtype = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
        for now, before in zip(vae.parameters(), twin.parameters(), strict=True):
            assert now.dtype == dtype
            assert not torch.equal(now, before.to(dtype))

    def test_scaled_gradients_are_refused(self):
        optimizer = module_of(VAE()).configure_optimizers()
        with pytest.raises(ValueError, match="Expected a closure .* Use 'bf16-mixed'"):
            optimizer.step()


class Resumable:
    """A loader that knows where it was."""

    def __init__(self):
        self.next = 0

    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(self.next, 3):
            self.next = (number + 1) % 3
            yield data()[4 * number : 4 * number + 4]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
class TestResumption:
    """A training that is stopped and resumed goes on bit for bit."""

    def trained(self, folder, batches, epochs=2, ckpt=None, every=None, **options):
        """Trains a new pair, or goes on from a checkpoint; returns its parameters."""
        pyro.clear_param_store()
        pyro.set_rng_seed(5 if ckpt is None else 6)
        vae = VAE()

        def decay(optimizer):
            return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        module = module_of(vae, (Adam, SGD), scheduler=decay, encoder_warmup=2)
        saved = ModelCheckpoint(
            folder, "{step}", save_top_k=-1, every_n_train_steps=every, save_last=True
        )
        fitted = trainer(folder, saved, max_epochs=epochs, enable_checkpointing=True, **options)
        fitted.fit(module, batches, loader(), ckpt_path=ckpt, weights_only=True)
        return [parameter.detach() for parameter in vae.parameters()]

    def test_between_epochs(self, tmp_path):
        shuffled = loader(shuffle=True)
        expected = self.trained(tmp_path / "all", shuffled, epochs=4)
        self.trained(tmp_path / "some", shuffled, epochs=2)
        last = tmp_path / "some" / "last.ckpt"
        resumed = self.trained(tmp_path / "some", shuffled, epochs=4, ckpt=last)
        assert all(map(torch.equal, resumed, expected))

    @pytest.mark.parametrize("step", range(1, 6))
    def test_within_epochs(self, step, tmp_path):
        options = {"every": 1, "val_check_interval": 2}
        expected = self.trained(tmp_path, Resumable(), **options)
        saved = tmp_path / f"step={step}.ckpt"
        resumed = self.trained(tmp_path, Resumable(), ckpt=saved, **options)
        assert all(map(torch.equal, resumed, expected))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes have left that trained together, and the checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, lightning_ranks.__file__, folder]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    left = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    return left, folder / "last.ckpt"


def in_step(vae, seed, steps):
    """Takes steps of which two processes have two batches each, one process after the other."""
    stage = SymmetricUtility().stage(vae.model, vae.guide)
    for step, ranks in enumerate(steps):
        states = []
        for rank in range(2):
            randomness.seed(seed, rank, step)
            states.append(randomness.get_state())
        for name, network in (("decoder", vae.decoder), ("encoder", vae.encoder)):
            gradients = []
            for rank, rows in enumerate(ranks):
                randomness.set_state(states[rank])
                batches = tuple(Batch(x).weighted(0.5) for x in rows)
                utility = stage.score(name, (batches, {})).utility
                states[rank] = randomness.get_state()
                gradients.append(torch.autograd.grad(utility, [*network.parameters()]))
            with torch.no_grad():
                for leaf, one, other in zip(network.parameters(), *gradients, strict=True):
                    leaf += 0.1 * (one + other) / 2


@pytest.mark.slow
class TestProcesses:
    """Two processes that Lightning starts, which exchange gradients by gloo."""

    def test_all_learn_the_same(self, ranks):
        (one, other), _ = ranks
        assert not torch.equal(one["start"]["decoder.weight"], other["start"]["decoder.weight"])
        for name, start in one["start"].items():
            assert torch.equal(one["end"][name], other["end"][name])
            assert torch.equal(one["end"][name], start) == name.startswith("unused")

    def test_dreams_differ(self, ranks):
        (one, other), _ = ranks
        dreams, others = (
            torch.stack(left["guided"]).view(4, 2, 2, 6)[:, 1] for left in (one, other)
        )
        assert not torch.equal(dreams, others)
        assert torch.equal(dreams, dreams.round()) and torch.equal(others, others.round())

    def test_gradients_are_averages(self, ranks):
        (one, other), path = ranks
        torch.set_default_dtype(torch.float32)
        vae = lightning_ranks.VAE()
        vae.load_state_dict(one["start"])
        seed = torch.load(path, weights_only=True)["symmetric_equilibrium"]["seed"]
        rows = [torch.stack(left["guided"]).view(4, 2, 2, 1, 6)[:, 0] for left in (one, other)]
        in_step(vae, seed, zip(*rows, strict=True))
        for name, expected in vae.state_dict().items():
            torch.testing.assert_close(one["end"][name], expected)

    def test_steps_are_counted_and_utilities_are_averages(self, ranks):
        (one, other), _ = ranks
        assert one["steps"] == other["steps"] == [4, 4]
        assert one["metrics"] == other["metrics"]
        assert {"train/decoder", "val/encoder", "val/loss"} <= one["metrics"].keys()

    def test_one_process_goes_on(self, ranks, tmp_path):
        (one, _), path = ranks
        torch.set_default_dtype(torch.float32)
        vae = lightning_ranks.VAE()
        module = lightning_ranks.module_of(vae)
        alone = lightning_ranks.trainer(tmp_path, devices=1, max_epochs=3)
        alone.fit(module, loader(lightning_ranks.data()), ckpt_path=path, weights_only=True)
        assert module.num_steps == alone.global_step == 6
        assert not torch.equal(vae.decoder.weight, one["end"]["decoder.weight"])


class Plan(LightningModule):
    """A plan as those of scvi-tools, which puts handlers around its programs in each step."""

    def __init__(self, vae):
        super().__init__()
        self.module = vae
        self.loss = SymmetricUtility()

    def training_step(self, batch, batch_idx):
        pyro.set_rng_seed(batch_idx)
        model, guide = (
            pyro.poutine.scale(program, 0.25) for program in (self.module.model, self.module.guide)
        )
        loss = self.loss.differentiable_loss(model, guide, *batch)
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.Adam(self.module.parameters(), lr=0.01)


def test_plans_take_differentiable_losses(tmp_path):
    vae, twin = twins()
    batches = DataLoader(TensorDataset(data()), batch_size=1)
    trainer(tmp_path).fit(Plan(vae), batches)
    pyro.clear_param_store()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    objective = SymmetricUtility()(twin.model, twin.guide)
    for number, (x,) in enumerate(batches):
        pyro.set_rng_seed(number)
        optimizer.zero_grad()
        (objective(x) / 4).backward()
        optimizer.step()
    assert_equal(vae, twin)


class TestMisuse:
    def test_whose_parameters(self):
        vae = VAE()
        with pytest.raises(ValueError, match="Expected example=, a batch"):
            SymmetricModule(vae.model, vae.guide, SGD)
        with pytest.raises(ValueError, match="Expected example=, a batch"):
            SymmetricModule(vae.model, vae.guide, SGD, parameters={"decoder": vae.decoder})
        with pytest.raises(ValueError, match="parameters= names"):
            module_of(vae, parameters={"model": vae.decoder})

    def test_other_parameters_of_the_name(self):
        module_of(VAE())
        with pytest.raises(ValueError, match="call pyro.clear_param_store()"):
            module_of(VAE())

    def test_parameters_that_come_late(self, tmp_path):
        vae = VAE()
        module = SymmetricModule(
            vae.model,
            vae.guide,
            SGD,
            parameters={"decoder": [("weight", vae.decoder.weight)], "encoder": vae.encoder},
        )
        with pytest.raises(ValueError, match=r"came up after .*decoder\$\$\$bias"):
            trainer(tmp_path).fit(module, loader())

    @pytest.mark.parametrize(
        "optim", [pyro.optim.SGD({"lr": 0.1}), (SGD,), "sgd", (SGD, pyro.optim.SGD({"lr": 0.1}))]
    )
    def test_optimisers(self, optim):
        with pytest.raises(TypeError, match="Expected optim to be a function that makes"):
            module_of(VAE(), optim)

    def test_what_an_optimiser_is(self):
        with pytest.raises(TypeError, match="Expected optim to make an optimiser .*, got list"):
            module_of(VAE(), list).configure_optimizers()

    def test_the_loss(self):
        vae = VAE()
        with pytest.raises(
            TypeError, match="Expected loss to be a SymmetricUtility, got Trace_ELBO"
        ):
            SymmetricModule(vae.model, vae.guide, SGD, pyro.infer.Trace_ELBO(), example=data())

    def test_other_strategies(self):
        module = module_of(VAE())
        module._trainer = SimpleNamespace(strategy=object())
        with pytest.raises(ValueError, match="Expected a strategy for one device, .* got object"):
            module.setup("fit")

    def test_nothing_to_learn(self):
        vae = VAE().requires_grad_(False).eval()
        with pytest.raises(ValueError, match="There is nothing to learn"):
            module_of(vae)

    @pytest.mark.parametrize("option", ["encoder_warmup", "code_warmup"])
    def test_counts(self, option):
        with pytest.raises(ValueError, match=f"Expected {option} to be an integer"):
            module_of(VAE(), **{option: -1})

    def test_the_schedule(self):
        with pytest.raises(ValueError, match="Expected updates='alternating'"):
            module_of(VAE(), updates="random")

    def test_a_pair_that_cannot_learn(self):
        vae = VAE()

        def blind(x):
            vae.guide(data(len(x)))

        with pytest.raises(ValueError, match="The guide ignores the data"):
            SymmetricModule(vae.model, blind, SGD, example=data())

    def test_a_foreign_checkpoint(self):
        with pytest.raises(ValueError, match="Expected a checkpoint of a SymmetricModule"):
            module_of(VAE()).on_load_checkpoint({"state_dict": {}})

    def test_data_that_are_not_finite(self, tmp_path):
        x = data()
        x[5] = torch.nan
        with pytest.raises(ValueError, match="site 'x' is not finite"):
            trainer(tmp_path).fit(module_of(VAE()), loader(x))

    def test_without_lightning(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "pyro_symeq.lightning")
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
        with pytest.raises(ImportError, match="needs PyTorch Lightning"):
            importlib.import_module("pyro_symeq.lightning")
