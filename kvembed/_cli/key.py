"""``kvembed key``: make a key for an encrypted store, and try whether the one at hand is the right one."""

from __future__ import annotations

from typing import Annotated

import typer

from kvembed._cli import _common
from kvembed._errors import ConfigError

__all__ = ["register"]

_KeyringOption = Annotated[
    str | None,
    typer.Option("--keyring", help="Name of the keyring's entry: default, or another.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    key = typer.Typer(no_args_is_help=True, help="Keys of encrypted stores.")
    app.add_typer(key, name="key")

    @key.command()
    def new(keyring: _KeyringOption = None) -> None:
        """Make a new key: print it, or put it into the keyring of the operating system.

        Nothing is encrypted by this: give the key to KVStore(key=...). Whoever loses it has lost the store.
        """
        from kvembed._encryption.sources import ENV, key_text, new_key, store_in_keyring

        made = new_key()
        if keyring is None:
            typer.echo(key_text(made))
            return
        store_in_keyring(keyring, made)
        name = "keyring" if keyring == "default" else f"keyring:{keyring}"
        typer.echo(f'The key is in the keyring. Use KVStore(key="{name}"), and {ENV}={name} for commands.')

    @key.command()
    def check(
        keyring: _KeyringOption = None, folder: _common.DirOption = None, as_json: _common.JsonOption = False
    ) -> None:
        """Say whether the store is encrypted, and whether KVEMBED_KEY (or the keyring's entry) is its key.

        Ends with status 1 when it is encrypted and this is not its key.
        """
        from kvembed._codec import marker_stamp
        from kvembed._errors import StoreKeyError

        path = _common.store_path(folder)
        if not _common.holds_store(path):
            raise ConfigError(f"there is no store at {path}")
        encrypted = marker_stamp(path) is not None
        fits, words = True, f"{path} is not encrypted."
        if encrypted:
            from kvembed._encryption.marker import codec_for

            try:
                codec_for(path, None if keyring is None else f"keyring:{keyring}", read_only=True)
                words = f"{path} is encrypted, and this is its key."
            except StoreKeyError as error:
                fits, words = False, str(error)
        if as_json:
            _common.print_json({"path": path, "encrypted": encrypted, "fits": fits if encrypted else None})
        elif fits:
            typer.echo(words)
        else:
            _common.complain(words)
        if not fits:
            raise typer.Exit(1)
