"""Messages between processes that may come and go, left for each other in a key-value store.

Each process has a name and leaves a greeting under it, which holds an id of that very process and
what others should know of it. Between two processes, messages go in pairs: each leaves its message
number k, and then waits for the other's. So neither runs ahead, and at most two messages of each
lie in the store. If one dies and another process takes its name, the new id begins a new count.

Nothing is ever unpickled: a greeting is JSON, and a message is plain bytes.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Greeting = dict[str, Any]
Message = Callable[[str, Greeting], bytes]

__all__: list[str] = []

# Bytes of one value: stores refuse those of 8 MB, and are slow with those of 1 MB.
PART_SIZE = 2**19
LONGEST_SLEEP = 0.05  # seconds


class Mailbox:
    """What a process and others leave for each other in a store.

    Args:
        name: The name of this process.
        others: The names of the others.
        store: The store.
    """

    def __init__(self, name: str, others: Iterable[str], store: "Store") -> None:
        self.name = name
        self.others = tuple(others)
        self.store = store
        self.ids = [""]  # of this process, and of the former one of its name
        self._links: dict[str, Link] = {}

    def open(self, greeting: Greeting) -> None:
        """Leaves a greeting.

        Args:
            greeting: What others should know, as JSON takes it.

        Raises:
            ConnectionError: The store can't be reached.
        """
        with _reached():
            former = self.greeting(self.name)
            self.ids = [uuid.uuid4().hex, *([former["id"]] if former else [])]
            self._links = {other: Link(self, other, self.greeting(other)) for other in self.others}
            self._leave_greeting(json.dumps(greeting | {"id": self.id}))

    @property
    def id(self) -> str:
        """What tells this process from others of its name."""
        return self.ids[0]

    def meet(self, check: Callable[[str, Greeting], None], timeout: float) -> set[str]:
        """Waits for the greetings of the others.

        Args:
            check: Looks at the greeting of another, by its name.
            timeout: How long to wait for all of them (seconds).

        Returns:
            The names of those who are there.

        Raises:
            ConnectionError: The store can't be reached.
        """
        there: set[str] = set()
        with _reached():
            for waited in _looks(timeout):
                for other in self.others:
                    greeting = None if other in there else self.greeting(other)
                    if greeting is not None:
                        check(other, greeting)
                        self._links[other].look()  # so that messages are made in their order
                        there.add(other)
                if len(there) == len(self.others) or waited >= timeout:
                    break
        return there

    def close(self) -> None:
        """Tells the others, if the store is still there, that there won't be any more messages."""
        with suppress(ConnectionError), _reached():
            greeting = self.greeting(self.name)
            if greeting is not None and greeting["id"] == self.id:  # not a successor's
                self._leave_greeting("")

    def exchange(
        self,
        message: Message,
        awaited: Collection[str],
        timeout: float,
    ) -> dict[str, tuple[Greeting, bytes]]:
        """Swaps a message with each of the others that is there.

        Args:
            message: Makes the message for another by its name and its greeting. A process that
                takes the name of one that is dead is sent what that one was.
            awaited: Those who are waited for; those who have come back without are found too.
            timeout: How long to wait for all of them (seconds).

        Returns:
            The greetings and messages of those who answered, by name, in the order of ``others``.

        Raises:
            ConnectionError: The store can't be reached.
        """
        received = {}
        once = _Once(message)
        with _reached():
            links = [
                link for name, link in self._links.items() if name in awaited or link.is_called()
            ]
            for waited in _looks(timeout):
                for link in links.copy():
                    swapped = link.swap(once)
                    if swapped is not None:
                        received[link.other] = swapped
                    if swapped is not None or link.has_left:
                        links.remove(link)
                if not links or waited >= timeout:
                    break
        return {other: received[other] for other in self.others if other in received}

    def has_left(self, other: str) -> bool:
        """Whether another told that it wouldn't send any more messages."""
        return self._links[other].has_left

    def greeting(self, name: str) -> Greeting | None:
        """Reads the greeting of a process that is there.

        Raises:
            ValueError: It is none.
        """
        key = _greeting_key(name)
        text = self.store.get(key) if self.store.check([key]) else b""
        if not text:
            return None
        try:
            greeting = json.loads(text)
        except ValueError:
            greeting = None
        if not (isinstance(greeting, dict) and isinstance(greeting.get("id"), str)):
            raise ValueError(
                f"The store holds no greeting of '{name}' under '{key}', but {text[:40]!r}. Give "
                "each run a store of its own, or a PrefixStore."
            )
        return greeting

    def _leave_greeting(self, text: str) -> None:
        self.store.set(_greeting_key(self.name), text)


class Link:
    """What two processes have sent each other.

    Args:
        mailbox: The mailbox of this process.
        other: The name of the other.
        greeting: Its greeting, if there is one.

    Attributes:
        has_left: Whether the other has told that it won't send any more messages.
    """

    def __init__(self, mailbox: Mailbox, other: str, greeting: Greeting | None) -> None:
        self.mailbox = mailbox
        self.other = other
        self.has_left = False
        self._greeting = greeting
        self._num_sent = 0
        self._num_received = 0

    def is_called(self) -> bool:
        """Whether a message of the other waits, or another process has taken its name."""
        return self._has_mail() or self.look()

    def swap(self, message: Message) -> tuple[Greeting, bytes] | None:
        """Sends a message, unless that was done; returns the other's, if it is there by now."""
        if self._greeting is not None and self._num_sent == self._num_received:
            self._send(message(self.other, self._greeting))
        if self._greeting is not None and self._has_mail():
            return self._greeting, self._take()
        self.look()
        return None

    def look(self) -> bool:
        """Reads the greeting of the other; returns whether another process is there."""
        greeting = self.mailbox.greeting(self.other)
        if greeting == self._greeting or (greeting is None and self._has_mail()):
            return False
        self._clear()
        self.has_left = greeting is None
        self._greeting = greeting
        self._num_sent = self._num_received = 0
        return greeting is not None

    def _clear(self) -> None:
        """Deletes what the other, who is gone, and processes of this name left for each other."""
        if self._greeting is not None:
            for mine in self.mailbox.ids:
                for number in (0, 1):
                    self._delete(mine, self._id, number)
                    self._delete(self._id, mine, number)

    def _has_mail(self) -> bool:
        return self._greeting is not None and self._store.check([self._inbox(0)])

    def _send(self, message: bytes) -> None:
        outbox = self._keys(self.mailbox.id, self._id, self._num_sent)
        parts = [message[i : i + PART_SIZE] for i in range(0, len(message), PART_SIZE)] or [b""]
        parts[0] = len(parts).to_bytes(4, "big") + parts[0]
        for i, part in reversed(list(enumerate(parts))):  # the first part tells that all are there
            self._store.set(outbox(i), part)  # type: ignore[arg-type]  # it takes bytes, too
        self._num_sent += 1

    def _take(self) -> bytes:
        first = self._store.get(self._inbox(0))
        num_parts = int.from_bytes(first[:4], "big")
        others = [self._store.get(self._inbox(i)) for i in range(1, num_parts)]
        self._delete(self._id, self.mailbox.id, self._num_received)
        self._num_received += 1
        return b"".join([first[4:], *others])

    def _delete(self, sender: str, receiver: str, number: int) -> None:
        """Deletes a message, the first part first."""
        key = self._keys(sender, receiver, number)
        part = 0
        while self._store.check([key(part)]):
            self._store.delete_key(key(part))
            part += 1

    def _inbox(self, part: int) -> str:
        return self._keys(self._id, self.mailbox.id, self._num_received)(part)

    def _keys(self, sender: str, receiver: str, number: int) -> Callable[[int], str]:
        """The keys of the parts of a message; one is read before the next but one is sent."""
        return lambda part: f"pyro_symeq/{sender}/{receiver}/{number % 2}/{part}"

    @property
    def _id(self) -> str:
        assert self._greeting is not None
        return self._greeting["id"]

    @property
    def _store(self) -> "Store":
        return self.mailbox.store


class _Once:
    """Makes a message once, for all processes of a name that say the same."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self._made: dict[str, tuple[Greeting, bytes]] = {}

    def __call__(self, other: str, greeting: Greeting) -> bytes:
        said = {key: value for key, value in greeting.items() if key != "id"}
        if other not in self._made or self._made[other][0] != said:
            self._made[other] = said, self.message(other, greeting)
        return self._made[other][1]


def _greeting_key(name: str) -> str:
    return f"pyro_symeq/greeting/{name}"


def _looks(timeout: float) -> Iterator[float]:
    """Sleeps between looks, a tenth of the time waited so far; yields that time (seconds)."""
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        yield waited
        time.sleep(min(waited / 10 + 1e-4, LONGEST_SLEEP, max(timeout - waited, 0)))


@contextmanager
def _reached() -> Iterator[None]:
    """Tells in plain words that a store can't be reached.

    Raises:
        ConnectionError: It can't.
    """
    try:
        yield
    except torch.distributed.DistError as error:
        raise ConnectionError(
            f"The store can't be reached ({error}). Nothing has moved. Start it again, and new "
            "players from their checkpoints."
        ) from error
