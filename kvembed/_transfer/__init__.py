"""Moving KV between host memory and devices: one interface, and an engine for each kind of device.

==============  ====================================================================================================
``_base``       the interface, and what callers owe it
``staging``     the bounded pool of host buffers
``plain``       copies in the calling thread: CPU, and devices without streams
``pinned``      pure PyTorch on two side streams, over ``streams``
``extension``   the same on streams of kvembed-cuda, all copies of a block in one call
``choose``      which engine a device gets, and why
``measure``     how fast it is
``fake``        a device for tests, with streams that run late and out of order
==============  ====================================================================================================
"""

from __future__ import annotations

from kvembed._transfer._base import Mark, Strip, Ticket, TransferEngine
from kvembed._transfer.choose import Transfers, engine_for
from kvembed._transfer.staging import Staging

__all__ = ["Mark", "Staging", "Strip", "Ticket", "TransferEngine", "Transfers", "engine_for"]
