"""A picture of kvembed-chat with a real answer: ``python benchmarks/chat_picture.py docs/images/chat.svg``.

A document is asked about in one process; this one opens the same conversation again, so that the bar shows the disk.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

DOCUMENT = "language-reference.txt"
SCRIPT = Path(__file__).absolute()
FIRST = "What does the assert statement do?"
SECOND = "Show me an example in Python."


async def talk(question: str, picture: Path | None) -> None:
    from kvembed_chat._app import ChatApp
    from kvembed_chat._cli import Options
    from kvembed_chat._real import RealEngine

    engine = RealEngine()
    document = Path(DOCUMENT) if picture is None else None
    app = ChatApp(engine, Options(model="smollm2", session="Python reference", document=document, max_new_tokens=160))
    async with app.run_test(size=(120, 40)) as pilot:

        async def settled() -> None:
            while app.chat.is_loading or app.chat.is_busy or engine.model is None:
                await asyncio.sleep(0.1)
            await pilot.pause(1.0)

        await pilot.pause(1.0)
        await settled()
        await settled()
        app.clear_notifications()
        app.chat.prompt.write(question)
        app.chat.prompt.action_submit()
        await pilot.pause(0.5)
        await settled()
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_text(app.export_screenshot(title="kvembed-chat"), encoding="utf-8")
    engine.close()


def main() -> None:
    if len(sys.argv) > 2:
        asyncio.run(talk(FIRST, None))
        return
    picture = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as home:
        os.environ["KVEMBED_HOME"] = home
        os.environ.pop("NO_COLOR", None)
        # Converted models lie in the cache, which is another one now.
        os.environ.setdefault("KVEMBED_MODELS_DIR", str(Path.home() / ".cache" / "kvembed" / "models"))
        os.chdir(home)
        text = "\n".join(topics[name] for name in ("assert", "if", "for", "while", "try", "with"))
        Path(DOCUMENT).write_text(text, encoding="utf-8")
        subprocess.run([sys.executable, str(SCRIPT), str(picture), "first"], check=True)
        asyncio.run(talk(SECOND, picture))


if __name__ == "__main__":
    main()
