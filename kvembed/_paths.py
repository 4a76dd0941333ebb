"""Where kvembed keeps its files, and the environment variables that move them.

===================== ======================================================================
``KVEMBED_CACHE_DIR`` the cache folder itself
``KVEMBED_HOME``      a folder for everything of kvembed; the cache is its subfolder ``cache``, chats are in ``data``
``KVEMBED_MODELS_DIR`` converted models only (they are large, and cost a download to make again)
``KVEMBED_KEY``       the key of encrypted stores, or where it is; read by `kvembed._encryption.sources`
``KVEMBED_DISABLE``   ``1``: nothing is reused and nothing is stored
===================== ======================================================================

Without them the cache lies in the user's cache folder of the operating system. The variables are read
at every call, so a test or a notebook can change them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = [
    "cache_dir",
    "config_dir",
    "data_dir",
    "documents_file",
    "is_disabled",
    "make_private_dir",
    "models_dir",
    "sessions_file",
    "store_dir",
]


def _from_env(name: str) -> Path | None:
    # An empty variable counts as unset: `KVEMBED_HOME= command` is how shells clear one, and Path("")
    # would silently mean the current folder.
    value = os.environ.get(name)
    return Path(value).expanduser().absolute() if value else None


def cache_dir() -> Path:
    """Return the cache folder; it is not created."""
    if folder := _from_env("KVEMBED_CACHE_DIR"):
        return folder
    if home := _from_env("KVEMBED_HOME"):
        return home / "cache"
    import platformdirs

    return platformdirs.user_cache_path("kvembed", appauthor=False)


def store_dir() -> Path:
    """Return the default folder of `KVStore`; it is not created."""
    return cache_dir() / "store"


def models_dir() -> Path:
    """Return the folder of converted models; it is not created."""
    return _from_env("KVEMBED_MODELS_DIR") or cache_dir() / "models"


def config_dir() -> Path:
    """Return the folder of settings people may edit; it is not created."""
    if home := _from_env("KVEMBED_HOME"):
        return home / "config"
    import platformdirs

    return platformdirs.user_config_path("kvembed", appauthor=False)


def data_dir() -> Path:
    """Return the folder of what cannot be computed again; it is not created."""
    if home := _from_env("KVEMBED_HOME"):
        return home / "data"
    import platformdirs

    return platformdirs.user_data_path("kvembed", appauthor=False)


def sessions_file() -> Path:
    """Return the default file of `SessionDB`."""
    return data_dir() / "sessions.db"


def documents_file() -> Path:
    """Return the default file of `DocumentDB`."""
    return data_dir() / "documents.db"


def is_disabled() -> bool:
    """Return True when ``KVEMBED_DISABLE`` asks for plain transformers."""
    return os.environ.get("KVEMBED_DISABLE", "").strip().lower() in {"1", "true", "yes", "on"}


def make_private_dir(path: str | os.PathLike[str]) -> Path:
    """Create ``path`` and its missing parents with mode 0700, whatever the umask is.

    A folder that exists keeps its mode: it may be the user's own, shared on purpose.

    Args:
        path: Folder to create.

    Returns:
        The absolute path.

    Raises:
        OSError: It cannot be created, or a file is in the way.
    """
    folder = Path(path).expanduser().absolute()
    missing: list[Path] = []
    for parent in (folder, *folder.parents):
        if parent.is_dir():
            break
        missing.append(parent)
    for parent in reversed(missing):
        # Not Path.mkdir(parents=True): it applies the mode to the last folder only, less the umask.
        try:
            parent.mkdir(mode=0o700)
        except FileExistsError:
            if not parent.is_dir():
                raise
        else:
            with contextlib.suppress(NotImplementedError):
                parent.chmod(0o700)
    return folder
