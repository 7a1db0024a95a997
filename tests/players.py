"""Players in processes of their own, which tests start, stop, kill and start again."""

import json
import multiprocessing
import os
import pickle
import warnings

import pyro
import pyro.distributions as dist
import torch
import torch._dynamo  # by optimisers at their first step, which takes seconds
from pyro.optim import SGD
from torch.distributed import Store, TCPStore

from pyro_symeq import Batch, DreamExchange

LONG = 60.0  # seconds that no test waits for
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.players"])


class Process:
    """A process that holds an object and calls its methods when it is told to."""

    def __init__(self, make, port, *args, **kwargs):
        self._pipe, there = CONTEXT.Pipe()
        what = pickle.dumps((make, args, kwargs))  # by value: no tensor is shared
        self._process = CONTEXT.Process(target=_serve, args=(there, port, what), daemon=True)
        self._process.start()
        there.close()

    def begin(self, method, *args, **kwargs):
        """Calls a method, and doesn't wait for its end."""
        self._pipe.send_bytes(pickle.dumps((method, args, kwargs)))

    def end(self):
        """What the method returned, or the error that it raised; and its warnings."""
        assert self._pipe.poll(LONG), "no answer"
        return pickle.loads(self._pipe.recv_bytes())

    def call(self, method, *args, **kwargs):
        """Calls a method that is to give no error and no warning."""
        self.begin(method, *args, **kwargs)
        return self.value()

    def value(self):
        value, warned = self.end()
        if isinstance(value, Exception):
            raise value
        assert warned == []
        return value

    def signal(self, number):
        os.kill(self._process.pid, number)

    def killed(self):
        """Kills the process, and waits until it is gone."""
        self._process.kill()
        self._process.join(LONG)


def _serve(pipe, port, what):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.enable_validation()
    make, args, kwargs = pickle.loads(what)
    made = None
    while True:
        try:
            method, with_args, with_kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if made is None:
                    made = make(TCPStore("127.0.0.1", port, is_master=False), *args, **kwargs)
                value = getattr(made, method)(*with_args, **with_kwargs)
            except Exception as error:
                value = error
        pipe.send_bytes(pickle.dumps((value, [str(warning.message) for warning in caught])))


class Tapped(Store):
    """A store that keeps a copy of all that is put into it and taken from it."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        self.sent = []
        self.taken = []

    def set(self, key, value):
        self.sent.append((key, value.encode() if isinstance(value, str) else bytes(value)))
        self.store.set(key, value)

    def get(self, key):
        value = self.store.get(key)
        self.taken.append((key, value))
        return value

    def check(self, keys):
        return self.store.check(keys)

    def delete_key(self, key):
        return self.store.delete_key(key)


class Mean(dist.Normal):
    """A normal distribution whose draws are its mean."""

    has_rsample = False

    def sample(self, sample_shape=()):
        return self.loc.expand(self._extended_shape(torch.Size(sample_shape))).clone()


class Learner:
    """A player with a model that a test looks into.

    The model has a parameter, and what it says of a row is up to ``site``.
    """

    def __init__(self, store, name, weights, start, lr=0.1, seed=0, device="cpu", **options):
        pyro.set_rng_seed(seed)
        self.store = Tapped(store)
        self.device = device
        self.start = torch.as_tensor(start, device=device).requires_grad_()
        self.name = name
        self.optim = SGD({"lr": lr})
        self.exchange = DreamExchange(
            name, self.programs(), self.optim, weights, self.store, **options
        )

    def programs(self):
        def model(x):
            theta = pyro.param(f"{self.name} theta", self.start)
            with pyro.plate("rows", len(x)):
                pyro.sample("x", self.site(theta), obs=x)

        return model

    def steps(self, num_steps, *batches):
        """Steps on given batches in turn; returns the parameters after each and the losses."""
        path, losses = [], []
        for i in range(num_steps):
            losses.append(self.step(batches[i % len(batches)]))
            path.append(self.theta())
        return path, losses

    def steps_while(self, missing, batch):
        """Steps as long as those and no others are missing."""
        while list(self.exchange.missing) == missing:
            self.step(batch)

    def step(self, batch):
        if not isinstance(batch, list):
            return dict(self.exchange.step(batch.to(self.device)).utilities)
        parts = [Batch(x=x.to(self.device)).weighted(weight) for x, weight in batch]
        return dict(self.exchange.step(*parts).utilities)

    def theta(self):
        return self.start.detach().cpu().clone()

    def slower(self, lr):
        for one in self.optim.optim_objs.values():
            one.param_groups[0]["lr"] = lr

    def settled(self, x, lr, num_steps):
        """The mean of the model's law over the second half of a training."""
        mean = 0.0
        for step in range(num_steps):
            self.slower(lr / (1 + step / 30))
            self.step(x)
            if step >= num_steps // 2:
                mean = mean + self.theta().softmax(-1) * 2 / num_steps
        return mean

    def missing(self):
        return self.exchange.missing

    def num_steps(self):
        return self.exchange.num_steps

    def tape(self):
        return self.store.sent, self.store.taken

    def wait_for(self, timeout):
        self.exchange.timeout = timeout

    def leave(self):
        self.exchange.leave()

    def save(self, path):
        torch.save(self.exchange.state_dict(), path)

    def load(self, path):
        self.exchange.load_state_dict(torch.load(path, weights_only=True))

    def evaluate(self, x):
        return float(self.exchange.evaluate_loss(x))


class Choice(Learner):
    def site(self, theta):
        return dist.Categorical(logits=theta)


class Gauss(Learner):
    def site(self, theta):
        return dist.Normal(theta, 1.0)


class Still(Learner):
    def site(self, theta):
        return Mean(theta, 1.0)


class Pictures(Learner):
    """Rows with a shape."""

    def site(self, theta):
        return dist.Normal(theta, 1.0).expand([3]).to_event(1)


class Pair(Learner):
    """A model with a latent and its guide, whose draws are their means."""

    def programs(self):
        a, b, v = (self.start[i].detach().clone().requires_grad_() for i in range(3))
        self.leaves = [a, b, v]

        def model(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", Mean(pyro.param(f"{self.name} a", a), 1.0))
                pyro.sample("x", Mean(z * 0.5 + pyro.param(f"{self.name} b", b), 1.0), obs=x)

        def guide(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", Mean(pyro.param(f"{self.name} v", v) * x, 1.0))

        return model, guide

    def theta(self):
        return torch.stack([leaf.detach() for leaf in self.leaves])


def greetings(tape):
    """The greetings in what was put into a store or taken from it."""
    return [json.loads(text) for key, text in tape if "greeting" in key and text]


def messages(tape):
    """The bytes of the messages, without the count of their parts."""
    return [text[4:] for key, text in tape if "greeting" not in key]
