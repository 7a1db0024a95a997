r"""Chains of binary latent sites, for what one more site costs.

Bits :math:`z_1, \dots, z_T` and :math:`x` follow each other downwards in the decoder and upwards
in the encoder,

.. math::
    p_\theta(x, z) &= p(z_1) \prod_{t=1}^{T-1} p_\theta(z_{t+1} \mid z_t) \; p_\theta(x \mid z_T), \\
    q_\varphi(z \mid x) &= q_\varphi(z_T \mid x) \prod_{t=1}^{T-1} q_\varphi(z_t \mid z_{t+1}).
"""

import math

import pyro
import torch
from torch import Tensor, nn

from pairs import Pair, binary, code, cross_entropy, draw

__all__ = ["Chain"]

NUM_BITS, NUM_PIXELS = 16, 64


class Links(nn.Module):
    """The networks of a decoder or of an encoder.

    Args:
        num_sites: The number of latent sites.
        end: The network between the data and the site next to them.
    """

    def __init__(self, num_sites: int, end: nn.Module) -> None:
        super().__init__()
        self.links = nn.ModuleList(nn.Linear(NUM_BITS, NUM_BITS) for _ in range(num_sites - 1))
        self.end = end


class Chain(Pair):
    """A chain, as programs and by hand.

    By hand, the logits of all sites that have parents are scored at once.

    Args:
        name: Tells the parameters of several pairs apart in Pyro's parameter store.
        num_sites: The number of latent sites T.
    """

    num_pixels = NUM_PIXELS
    decoder: Links
    encoder: Links
    prior: Tensor
    fair: Tensor

    def __init__(self, name: str, num_sites: int) -> None:
        decoder = Links(num_sites, nn.Linear(NUM_BITS, NUM_PIXELS))
        encoder = Links(num_sites, nn.Linear(NUM_PIXELS, NUM_BITS))
        super().__init__(name, decoder, encoder)
        self.register_buffer("prior", torch.zeros(NUM_BITS))
        self.register_buffer("fair", torch.full((NUM_BITS,), 0.5))

    def model(self, x: Tensor) -> None:
        """The decoder's program, with the sites z_1 to z_T and x."""
        pyro.module(f"{self.name}.decoder", self.decoder)
        with pyro.plate("rows", x.shape[-2]):
            z = pyro.sample("z_1", self.bits(self.prior))
            for t, link in enumerate(self.decoder.links, start=2):
                z = pyro.sample(f"z_{t}", self.bits(link(code(z))))
            pyro.sample("x", binary(self.decoder.end(code(z))), obs=x)

    def guide(self, x: Tensor) -> None:
        """The encoder's program, with the sites z_1 to z_T."""
        pyro.module(f"{self.name}.encoder", self.encoder)
        with pyro.plate("rows", x.shape[-2]):
            t = len(self.encoder.links) + 1
            z = pyro.sample(f"z_{t}", self.bits(self.encoder.end(code(x))))
            for link in self.encoder.links:
                t -= 1
                z = pyro.sample(f"z_{t}", self.bits(link(code(z))))

    def decoder_loss(self, x: Tensor) -> Tensor:
        """By hand, a draw of -L_p (nats)."""
        with torch.no_grad():
            z = [draw(self.encoder.end(code(x)))]
            for link in self.encoder.links:
                z.append(draw(link(code(z[-1]))))
            z.reverse()
        loss = _linked(self.decoder, z) + cross_entropy(self.decoder.end(code(z[-1])), x)
        return loss + z[0].numel() * math.log(2)

    def encoder_loss(self, num_rows: int) -> Tensor:
        """By hand, a draw of -L_q (nats)."""
        with torch.no_grad():
            z = [torch.bernoulli(self.fair.expand(num_rows, -1))]
            for link in self.decoder.links:
                z.append(draw(link(code(z[-1]))))
            x = draw(self.decoder.end(code(z[-1])))
            z.reverse()
        return _linked(self.encoder, z) + cross_entropy(self.encoder.end(code(x)), z[0])


def _linked(player: Links, z: list[Tensor]) -> Tensor:
    """The negative log-probability of all sites but the first, given those before them."""
    parents = code(torch.stack(z[:-1]))
    logits = [link(parent) for link, parent in zip(player.links, parents, strict=True)]
    return cross_entropy(torch.cat(logits), torch.cat(z[1:]))
