"""Messages in a store: pairs in turn, large ones in parts, and nothing of those who are gone."""

import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch.distributed import FileStore, HashStore, PrefixStore, TCPStore

from pyro_symeq.mailbox import PART_SIZE, Mailbox
from pyro_symeq.parcel import Form, pack, unpack
from pyro_symeq.store import main, serve


@pytest.fixture
def store():
    host, port = serve("127.0.0.1", 0)
    yield TCPStore("127.0.0.1", port, is_master=False)
    del host


def met(store, names="ab"):
    boxes = [Mailbox(name, [n for n in names if n != name], store) for name in names]
    for box in boxes:
        box.open({})
    return boxes


def swapped(boxes, text, timeout=0.0):
    """What the mailboxes receive, each with a few looks in turn."""
    received = {box.name: {} for box in boxes}
    for _ in range(3):
        for box in boxes:
            awaited = set(box.others) - received[box.name].keys()
            if awaited:
                got = box.exchange(
                    lambda other, _, box=box: text(box.name, other), awaited, timeout
                )
                received[box.name] |= {other: message for other, (_, message) in got.items()}
    return received


def test_messages_go_in_pairs(store):
    boxes = met(store, "abc")
    for i in range(5):
        received = swapped(boxes, lambda here, there, i=i: f"{here} to {there}, {i}".encode())
        assert received == {
            here: {there: f"{there} to {here}, {i}".encode() for there in "abc" if there != here}
            for here in "abc"
        }
    assert store.num_keys() == 3


def test_nobody_runs_ahead(store):
    a, b = met(store)
    for i in range(3):
        assert a.exchange(lambda *_, i=i: b"a%d" % i, ["b"], 0.0) == {}
    assert store.num_keys() == 3  # two greetings and one message
    assert swapped([b], lambda *_: b"b0") == {"b": {"a": b"a1"}}
    assert swapped([a], lambda *_: b"a2") == {"a": {"b": b"b0"}}


@pytest.mark.parametrize("size", [0, 1, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1, 20 * 2**20])
def test_large_messages_go_in_parts(store, size):
    message = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    assert swapped(met(store), lambda *_: message) == {"a": {"b": message}, "b": {"a": message}}
    assert store.num_keys() == 2


def test_any_store_will_do(store, tmp_path):
    for other in (HashStore(), FileStore(str(tmp_path / "store"), -1), PrefixStore("run", store)):
        received = swapped(met(other), lambda here, _: here.encode())
        assert received == {"a": {"b": b"b"}, "b": {"a": b"a"}}


def test_one_who_returns_begins_anew(store):
    a, b = met(store)
    swapped([a, b], lambda *_: b"old")
    swapped([b], lambda *_: b"last")  # and then it dies
    again = Mailbox("b", ["a"], store)
    again.open({"of": "b"})
    assert swapped([a], lambda *_: b"lost") == {"a": {"b": b"last"}}
    assert swapped([a, again], lambda *_: b"new") == {"a": {"b": b"new"}, "b": {"a": b"new"}}
    assert store.num_keys() == 2


def test_both_return(store):
    a, b = met(store)
    swapped([a, b], lambda *_: b"old")
    swapped([a], lambda *_: b"lost")
    swapped([b], lambda *_: b"lost")
    again = met(store, "ba")
    assert swapped(again, lambda *_: b"new") == {"a": {"b": b"new"}, "b": {"a": b"new"}}
    assert store.num_keys() == 2
    a.close()  # its name has been taken over, so this tells nothing
    assert again[0].greeting("a")["id"] == again[1].id


def test_the_last_message_of_one_who_leaves_is_read(store):
    a, b = met(store)
    swapped([a, b], lambda *_: b"first")
    a.exchange(lambda *_: b"a", ["b"], 0.0)
    b.exchange(lambda *_: b"b", ["a"], 0.0)
    b.close()
    assert swapped([a], lambda *_: b"unused") == {"a": {"b": b"b"}}
    assert not a.has_left("b")
    assert swapped([a], lambda *_: b"too late") == {"a": {}}
    assert a.has_left("b")
    assert store.num_keys() == 2


def test_meeting():
    store = HashStore()
    a = Mailbox("a", "bc", store)
    a.open({})
    seen = []
    assert a.meet(lambda *of: seen.append(of), 0.0) == set()
    b = Mailbox("b", "ac", store)
    b.open({"of": "b"})
    assert a.meet(lambda *of: seen.append(of), 0.05) == {"b"}
    assert seen == [("b", {"of": "b", "id": b.id})]
    b.close()
    assert a.meet(lambda *of: seen.append(of), 0.0) == set()


@pytest.mark.parametrize("order", ["abc", "bac", "cab", "cba"])
def test_messages_are_made_in_one_order_whoever_greeted_first(order):
    store = HashStore()
    boxes = {name: Mailbox(name, "abc".replace(name, ""), store) for name in "abc"}
    for name in order:
        boxes[name].open({})
    made = []
    assert boxes["a"].meet(lambda *_: None, 0.0) == {"b", "c"}
    boxes["a"].exchange(lambda other, _: made.append(other) or b"", "bc", 0.0)
    assert made == ["b", "c"]


def test_messages_are_returned_in_one_order_whoever_answered_first(monkeypatch):
    a, b, c = met(HashStore(), "abc")
    a.meet(lambda *_: None, 0.0)
    c.exchange(lambda *_: b"c", "a", 0.0)
    monkeypatch.setattr(
        "pyro_symeq.mailbox.time.sleep", lambda _: b.exchange(lambda *_: b"b", "a", 0.0)
    )
    assert list(a.exchange(lambda *_: b"a", "bc", 10.0)) == ["b", "c"]


@pytest.mark.parametrize("text", ["hello", "[1]", "{}", '{"id": 3}', b"\x80\x04K\x01."])
def test_a_foreign_greeting_is_refused(text):
    store = HashStore()
    store.set("pyro_symeq/greeting/b", text)
    a = Mailbox("a", "b", store)
    with pytest.raises(ValueError, match="The store holds no greeting of 'b' under"):
        a.open({})


# Parcels.


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.half,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_parcels_are_exact(dtype, device):
    values = {
        "x": (100 * torch.randn(5, 3, 2)).to(device, dtype),
        "b": torch.randn(5).to(device, dtype)[:, None].expand(5, 2),
        "none": torch.zeros(5, 0, device=device),
    }
    forms = {name: Form.of(value) for name, value in values.items()}
    parcel = pack(forms, values, 5)
    assert len(parcel) == sum(5 * form.num_bytes for form in forms.values())
    for name, value in unpack(forms, parcel, 5).items():
        assert value.device == values[name].device
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name])


def test_a_row_may_be_folded_otherwise():
    form = Form((2, 2), torch.uint8, torch.device("cpu"))
    x = torch.arange(12.0).reshape(3, 4)
    seen = unpack({"x": form}, pack({"x": form}, {"x": x}, 3), 3)["x"]
    assert torch.equal(seen, x.reshape(3, 2, 2).byte())


@pytest.mark.parametrize("values", [{}, {"x": torch.zeros(3, 5)}, {"x": torch.zeros(2, 4)}])
def test_rows_of_another_size_are_refused(values):
    with pytest.raises(ValueError, match=r"to dream site 'x' with shape \(3, 4\)"):
        pack({"x": Form((4,), torch.float32, torch.device("cpu"))}, values, 3)


@pytest.mark.parametrize("size", [0, 47, 49])
def test_parcels_of_another_size_are_refused(size):
    message = rf"Expected 3 rows of \['x'\] in 48 bytes, got {size} bytes"
    with pytest.raises(ValueError, match=message):
        unpack({"x": Form((4,), torch.float32, torch.device("cpu"))}, bytes(size), 3)


# The store in a process of its own.


def test_the_store_is_a_program():
    command = [sys.executable, "-W", "error", "-m", "pyro_symeq.store", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"The store is at 127.0.0.1:(\d+)\. Stop it .*\n", line)[1])
        assert swapped(met(TCPStore("127.0.0.1", port, is_master=False)), lambda *_: b"1")
        with pytest.raises(ConnectionRefusedError):  # other interfaces are closed
            socket.create_connection(("127.0.0.2", port))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["--port", str(port)])
    assert f"error: can't listen on 127.0.0.1:{port}: " in capsys.readouterr().err
