"""Which calls of torch's device modules are made, on a module that writes them down; and which engine a device gets."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kvembed._transfer import Strip, Transfers, engine_for
from kvembed._transfer.pinned import TorchTransfer
from kvembed._transfer.plain import PlainTransfer
from kvembed._transfer.streams import TorchStreams, has_streams

if TYPE_CHECKING:
    from collections.abc import Iterator


class Module:
    """What ``torch.cuda`` and ``torch.xpu`` have in common, writing down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.streams = 0
        module = self

        class Event:
            def record(self, stream: Any) -> None:
                module.calls.append(f"record on {stream.name}")

            def query(self) -> bool:
                return False

            def synchronize(self) -> None:
                module.calls.append("synchronize")

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None:
                module.streams += 1
                self.name = f"side {module.streams}"

            def wait_event(self, event: Event) -> None:
                module.calls.append(f"{self.name} waits")

        self.Event, self.Stream = Event, Stream
        self.main = Stream()
        self.main.name = "main"

    def current_stream(self, device: torch.device) -> Any:
        return self.main

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append(f"copy on {stream.name}")
        yield


@pytest.fixture
def module() -> Module:
    return Module()


def test_the_order_of_calls(module: Module) -> None:
    cpu = torch.device("cpu")
    engine = TorchTransfer(cpu, TorchStreams(cpu, module))
    rows, host = torch.zeros(2, 4, 4), np.ones((2, 4, 16), np.uint8)
    ticket = engine.to_device([Strip(host, rows)], engine.mark())
    ticket.wait_compute()
    out = np.zeros_like(host)
    back = engine.to_host([Strip(out, rows)], engine.mark())
    assert not back.done
    back.wait_host()
    assert back.done
    assert module.calls == [
        *("record on main", "side 2 waits", "copy on side 2", "record on side 2", "main waits"),
        *("record on main", "side 3 waits", "copy on side 3", "record on side 3", "synchronize"),
    ]
    assert np.array_equal(out, host)


def test_memory_that_cannot_be_pinned_is_used_as_it_is(module: Module) -> None:
    xpu = torch.device("xpu", 0)
    array = TorchStreams(xpu, module).allocate(1000)
    array[:] = 1
    assert (array.nbytes, array.dtype) == (1000, np.uint8)


def test_devices_without_streams_get_plain_copies() -> None:
    for name in ("cpu", "mps"):
        assert not has_streams(torch.device(name))
    engine = engine_for(torch.device("cpu"))
    assert isinstance(engine, PlainTransfer)
    assert engine.direct


def test_one_engine_a_device() -> None:
    made: list[torch.device] = []

    def make(device: torch.device) -> PlainTransfer:
        made.append(device)
        return PlainTransfer(torch.device("cpu"))

    transfers = Transfers(make)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert transfers.of(first) is transfers.of(torch.device("cuda", 0))
    assert transfers.of(second) is not transfers.of(first)
    assert made == [first, second]
    transfers.close()
    transfers.of(first)
    assert made == [first, second, first]
