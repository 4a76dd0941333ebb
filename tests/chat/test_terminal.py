"""The app in a real terminal with a real model: ask, leave, start again, and read where the KV came from."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.multiprocess,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]


class Terminal:
    """A tmux server of its own, with one window."""

    def __init__(self, folder: Path) -> None:
        self._tmux = ["tmux", "-S", str(folder / "tmux.sock"), "-f", "/dev/null"]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, check=True)
        return done.stdout

    def until(self, condition: Callable[[str], bool]) -> str:
        """Wait for something on the screen; the test's own time limit ends what never comes."""
        screen = ""
        for _ in range(1000):
            screen = self("capture-pane", "-p", "-t", "chat")
            if condition(screen):
                return screen
            time.sleep(0.25)
        raise AssertionError(f"it never came:\n{screen}")


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


def test_ask_leave_start_again_and_read_disk(smollm2: Path, tmp_path: Path, terminal: Terminal) -> None:
    from pydoc_data.topics import topics

    document = tmp_path / "assert.txt"
    document.write_text(
        "\n".join(topics[name] for name in ("assert", "pass", "if", "while", "for", "try")), encoding="utf-8"
    )
    home = tmp_path / "home"
    environment = {
        "KVEMBED_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    start = shlex.join([sys.executable, "-m", "kvembed_chat", str(smollm2), "--session", "Reference"])
    shell = f"env -u KVEMBED_CACHE_DIR {' '.join(words)} {start}"
    config = home / "config" / "chat.toml"
    config.parent.mkdir(parents=True)
    config.write_text("max_new_tokens = 12\n", encoding="utf-8")
    try:
        terminal(
            "new-session", "-d", "-s", "chat", "-x", "80", "-y", "24", f"{shell} --doc {shlex.quote(str(document))}"
        )
        terminal("set-option", "-t", "chat", "remain-on-exit", "on")
        terminal.until(lambda screen: "Attached: assert.txt" in screen and "reusable" in screen)
        terminal("send-keys", "-t", "chat", "What does assert do?", "Enter")
        first = terminal.until(lambda screen: "TTFT" in screen)
        assert "@assert.txt" in first
        terminal("send-keys", "-t", "chat", "C-q")
        terminal.until(lambda screen: "Go on with: kvembed-chat --session Reference" in screen)
        terminal("respawn-pane", "-k", "-t", "chat", shell)
        terminal.until(lambda screen: "What does assert do?" in screen and "reusable" in screen)
        terminal("send-keys", "-t", "chat", "And what does pass do?", "Enter")

        def answer(screen: str) -> str:
            # Nothing until the question is there: the bar of the answer before it has a TTFT too.
            return screen.rpartition("And what does pass do?")[2] if "And what does pass do?" in screen else ""

        second = terminal.until(lambda screen: "TTFT" in answer(screen))
        assert "disk" in answer(second), second
    finally:
        terminal("kill-server")
