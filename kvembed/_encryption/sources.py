"""Where a store's key comes from: bytes, a function, the environment, or the keyring of the operating system."""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    Key = bytes | str | Callable[[], bytes]

__all__ = ["ENV", "KEY_BYTES", "from_environment", "key_text", "new_key", "resolve_key", "store_in_keyring"]

KEY_BYTES = 32
ENV = "KVEMBED_KEY"
_SERVICE = "kvembed"
_INSTALL = "pip install 'kvembed[encryption]'"


def new_key() -> bytes:
    """Return 32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def key_text(key: bytes) -> str:
    """Return a key as text, for an environment variable or a keyring."""
    return base64.b64encode(key).decode()


def _from_text(text: str, where: str) -> bytes:
    words = f"{where} does not hold a key: 32 bytes as base64 or as 64 hexadecimal digits (`kvembed key new` makes one)"
    text = text.strip()
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text)
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError(words) from None  # without the text: it may be a key but for one letter
    if len(key) != KEY_BYTES:
        raise ConfigError(words)
    return key


def from_environment() -> bytes | None:
    """Return the key that ``KVEMBED_KEY`` holds or names (``keyring``, ``keyring:name``), None when it is not set."""
    text = os.environ.get(ENV, "").strip()
    if not text:
        return None
    name = _entry(text)
    return _from_text(text, ENV) if name is None else _from_keyring(name)


def _entry(text: str) -> str | None:
    """Return the name of the keyring's entry that a text asks for, or None when it asks for none."""
    first, _, name = text.partition(":")
    return (name or "default") if first == "keyring" else None


def _keyring() -> Any:
    try:
        import keyring
    except ImportError:
        raise ConfigError(f"the keyring needs a package that is missing: {_INSTALL}") from None
    return keyring


def _from_keyring(name: str) -> bytes:
    keyring = _keyring()
    try:
        text = keyring.get_password(_SERVICE, name)
    except Exception as error:  # every backend has errors of its own
        raise ConfigError(f"the keyring cannot be read ({type(error).__name__}: {error})") from error
    if text is None:
        option = "--keyring" if name == "default" else f"--keyring {name}"
        raise ConfigError(f"the keyring holds no key {name!r} of kvembed; `kvembed key new {option}` makes one")
    return _from_text(text, f"the keyring's entry {name!r}")


def store_in_keyring(name: str, key: bytes) -> None:
    """Put a key into the keyring.

    Raises:
        ConfigError: There is one of that name, or the keyring cannot be used.
    """
    keyring = _keyring()
    try:
        there = keyring.get_password(_SERVICE, name)
        if there is None:
            keyring.set_password(_SERVICE, name, key_text(key))
    except Exception as error:
        raise ConfigError(f"the keyring cannot be used ({type(error).__name__}: {error})") from error
    if there is not None:
        raise ConfigError(f"the keyring has a key {name!r} already; give another name, or delete that one first")


def resolve_key(key: Key) -> bytes:
    """Return the 32 bytes of what was given as a key.

    Raises:
        ConfigError: It is no key, or cannot be got.
    """
    if callable(key):
        key = key()
        if not isinstance(key, bytes | bytearray):
            raise ConfigError("key() must return 32 bytes")
    if isinstance(key, str):
        if key == "env":
            found = from_environment()
            if found is None:
                raise ConfigError(f"{ENV} is not set; `kvembed key new` makes a key for it")
            return found
        name = _entry(key)
        if name is None:
            raise ConfigError('key must be 32 bytes, a function that returns them, "env" or "keyring"')
        return _from_keyring(name)
    if not isinstance(key, bytes | bytearray) or len(key) != KEY_BYTES:
        raise ConfigError('key must be 32 bytes, a function that returns them, "env" or "keyring"')
    return bytes(key)
