"""A key-value store in a process of its own, through which players exchange dreams.

``python -m pyro_symeq.store --host 10.8.0.1 --port 29500`` serves it until it is stopped. Players
connect with ``torch.distributed.TCPStore("10.8.0.1", 29500, is_master=False)``.
"""

import argparse
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

__all__ = ["serve"]


def serve(host: str, port: int) -> "tuple[TCPStore, int]":
    """Starts a store that is reached through one network interface only.

    Args:
        host: The address of that interface.
        port: The port, or 0 for a free one.

    Returns:
        The store, which serves as long as it lives, and its port.

    Raises:
        OSError: The address can't be used.
    """
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno()
    )
    listener.detach()  # it is the store's now
    return store, port


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves a store until the process is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m pyro_symeq.store",
        description="Serves the store through which players exchange dreams. It knows no "
        "passwords and encrypts nothing: whoever reaches the port can read and change all that is "
        "in it. Use it within a private network, or through an SSH tunnel.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the interface to listen on (default: this machine)"
    )
    parser.add_argument("--port", type=int, default=29500, help="(default: 29500; 0: a free one)")
    options = parser.parse_args(arguments)
    try:
        store, port = serve(options.host, options.port)
    except OSError as error:
        parser.error(f"can't listen on {options.host}:{options.port}: {error}")
    print(f"The store is at {options.host}:{port}. Stop it with Ctrl-C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        del store


if __name__ == "__main__":
    main()
