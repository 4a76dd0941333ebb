"""The config file: what the app starts with, in a few lines of TOML that people may edit.

``chat.toml`` lies in the user's config folder (``KVEMBED_HOME/config`` if that is set)::

    model = "smollm2"
    theme = "nord"
    store = "~/kv"
    system = "You are brief."
    max_new_tokens = 512
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._paths import config_dir, make_private_dir

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Config", "config_file", "read_config", "remember"]


@dataclass(frozen=True)
class Config:
    """What the file says.

    Args:
        model: What to load at the start.
        theme: Of the interface.
        store: Folder of the KV.
        system: System message of new sessions.
        max_new_tokens: Most tokens of a reply in new sessions.
    """

    model: str | None = None
    theme: str | None = None
    store: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None


def config_file() -> Path:
    """Return where the file is, or would be."""
    return config_dir() / "chat.toml"


def read_config() -> Config:
    """Return what the file says; nothing when there is none.

    Raises:
        ConfigError: It is not TOML, or a value is of the wrong kind.
    """
    path = config_file()
    try:
        known = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    values: dict[str, Any] = {}
    for entry in fields(Config):
        if (value := known.get(entry.name)) is None:
            continue
        kind = int if entry.name == "max_new_tokens" else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{path}: {entry.name} is {'a number' if kind is int else 'text'}, not {value!r}")
        values[entry.name] = value
    return Config(**values)


def remember(key: str, value: str) -> None:
    """Write one value to the file and leave every other line as it is; a file that cannot be written stays."""
    path = config_file()
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"  # a JSON string is a TOML string
    with contextlib.suppress(OSError):
        make_private_dir(path.parent)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        there = re.compile(rf"^{re.escape(key)}\s*=.*$", re.MULTILINE)
        if there.search(before):
            after = there.sub(lambda _: line, before, count=1)
        else:
            after = f"{line}\n{before}"  # in front: a line after a [table] would belong to it
        path.write_text(after, encoding="utf-8")
