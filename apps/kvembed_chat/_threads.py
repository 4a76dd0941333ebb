"""Blocking work in a thread of its own, awaited in the interface's loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread and return what it returns, or raise what it raises.

    Not `asyncio.to_thread`: its pool has few threads, which long work would fill, and leaving the loop waits for all of
    them, so that the app could not be left while a model is being downloaded.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.done():  # whoever waited was cancelled
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # pyright: ignore[reportArgumentType]

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:  # a future refuses it
            failure = RuntimeError(str(error))
        except BaseException as error:
            failure = error
        # The loop may be closed: the app was left meanwhile.
        try:
            loop.call_soon_threadsafe(finish, result, failure)
        except RuntimeError:
            return

    threading.Thread(target=run, name="kvembed-chat", daemon=True).start()
    return await done
