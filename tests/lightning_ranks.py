"""A training by two processes, each of which leaves what it has learned and dreamed in a file.

Run as ``python lightning_ranks.py FOLDER``; Lightning starts the other process.
"""

import sys
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from pyro_symeq.lightning import SymmetricModule

SGD = partial(torch.optim.SGD, lr=0.1)


class VAE(nn.Module):
    """A pair that keeps its dreams, and has a part that nobody uses."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(3, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.guided = []

    def model(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        if self.training:
            self.guided.append(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def data():
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(1)).round()


def module_of(vae):
    return SymmetricModule(vae.model, vae.guide, SGD, example=data())


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def main(folder):
    pyro.set_rng_seed(0)
    ranks = trainer(folder, devices=2, strategy="ddp", max_epochs=2, accumulate_grad_batches=2)
    torch.manual_seed(ranks.global_rank)  # Lightning gives all the parameters of the first
    vae = VAE()
    module = module_of(vae)
    start = {name: x.clone() for name, x in vae.state_dict().items()}
    vae.guided.clear()
    ranks.fit(module, DataLoader(data(), batch_size=1), DataLoader(data(), batch_size=2))
    ranks.save_checkpoint(folder / "last.ckpt")
    left = {
        "start": start,
        "end": vae.state_dict(),
        "guided": vae.guided,
        "steps": [ranks.global_step, module.num_steps],
        "metrics": dict(ranks.callback_metrics),
    }
    torch.save(left, folder / f"rank{ranks.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
