"""Learns to draw and to classify digits, with Lightning. For curves: tensorboard --logdir out."""

import argparse
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from cli import count
from data import load
from networks import LadderVAE
from pyro_symeq import SymmetricUtility
from pyro_symeq.lightning import SymmetricModule

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=count, default=100, help="(default: %(default)s)")
    epochs = parser.parse_args().epochs
    seed_everything(0)
    images = load("digits", Path("data"))
    training = TensorDataset(images.x, images.y)
    held_out = DataLoader(TensorDataset(images.held_out_x, images.held_out_y), batch_size=397)
    vae = LadderVAE(images.side, num_styles=8, num_units=30, width=256, num_channels=None)
    module = SymmetricModule(
        vae.model,
        vae.guide,
        partial(AdamW, lr=5e-3, weight_decay=0.05),
        SymmetricUtility(supervise_encoder=False),  # the encoder learns from dreams alone
        example=training[:2],
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
    )
    logger = TensorBoardLogger("out", name="lightning")
    callbacks = [LearningRateMonitor(), ModelCheckpoint(monitor="val/decoder", mode="max")]
    trainer = Trainer(max_epochs=epochs, logger=logger, callbacks=callbacks, log_every_n_steps=5)
    trainer.fit(module, DataLoader(training, 256, shuffle=True, drop_last=True), held_out)
