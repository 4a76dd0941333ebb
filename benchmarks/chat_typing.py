"""How long a key takes from the terminal to the screen of kvembed-chat, at rest and while a long document prefills.

The real app with the real model, without a terminal: a key comes as a terminal sends it, and the clock stops after the
screen was drawn with it. ``python benchmarks/chat_typing.py [--model smollm2]``
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

import common

TOKENS = 4096
KEYS = "the quick brown fox jumps over the lazy dog "


async def latencies(model: str, document: Path) -> tuple[list[float], list[float]]:
    from kvembed_chat._app import ChatApp
    from kvembed_chat._cli import Options
    from kvembed_chat._real import RealEngine
    from textual import events

    engine = RealEngine()
    app = ChatApp(engine, Options(model=model, session="Typing"))
    async with app.run_test(size=(120, 40)) as pilot:
        while app.chat.is_loading or engine.model is None:
            await asyncio.sleep(0.1)
        await pilot.pause(1.0)

        async def key(character: str) -> float:
            before, drawn = app.chat.prompt.text, asyncio.Event()
            began = time.perf_counter()
            app.post_message(events.Key("space" if character == " " else character, character))
            while app.chat.prompt.text == before:
                await asyncio.sleep(0)
            app.chat.prompt.call_after_refresh(drawn.set)
            await drawn.wait()
            return 1e3 * (time.perf_counter() - began)

        at_rest = []
        for character in KEYS:
            at_rest.append(await key(character))
            await asyncio.sleep(0.05)
        app.chat.prompt.write(f"@{document}")
        app.chat.prompt.action_submit()
        while not app.chat.is_busy:
            await asyncio.sleep(0.01)
        while_prefilling, number = [], 0
        while app.chat.is_busy:
            while_prefilling.append(await key(KEYS[number % len(KEYS)]))
            number += 1
            await asyncio.sleep(0.05)
    engine.close()
    return at_rest, while_prefilling


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=1)
    model, tokenizer = common.load(args.model)
    text = tokenizer.decode(common.text_ids(tokenizer)[:TOKENS])
    del model
    with tempfile.TemporaryDirectory() as home:
        os.environ["KVEMBED_HOME"] = home
        os.environ.setdefault("KVEMBED_MODELS_DIR", str(Path.home() / ".cache" / "kvembed" / "models"))
        document = Path(home) / "reference.txt"
        document.write_text(text, encoding="utf-8")
        runs = [asyncio.run(latencies(args.model, document))]
    rows = []
    for name, values in zip(("at rest", f"while {TOKENS:,} tokens prefill"), runs[0], strict=True):
        ordered = sorted(values)
        rows.append(
            {
                "typing": name,
                "keys": len(ordered),
                "median ms": common.median(ordered),
                "95 % ms": ordered[int(0.95 * (len(ordered) - 1))],
                "slowest ms": ordered[-1],
            }
        )
    common.report("chat_typing", rows, [])


if __name__ == "__main__":
    main()
