"""What the Hugging Face hub and its local cache have, found out without long waits."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

__all__ = ["HubState", "cached_repos", "cached_snapshot", "has_weights", "is_offline", "probe"]

HubState = Literal["ok", "missing", "gated", "unreachable", "offline"]

# A probe that has not answered by then counts as no network. The time-out of the request alone is not
# enough: resolving a name has none, and takes 20 s and more behind some broken routers.
_PROBE_SECONDS = 4.0
_REQUEST_SECONDS = 3.0


def is_offline() -> bool:
    """Return True when ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_snapshot(
    repo: str, *, revision: str | None = None, cache_dir: str | None = None, subfolder: str = ""
) -> Path | None:
    """Return the folder of a *complete* local snapshot, or None.

    A folder in the cache proves little: reading a config or a tokenizer alone makes one too. So all
    weight files must be there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if has_weights(folder / subfolder) else None


def has_weights(folder: Path) -> bool:
    """Return True when a folder has a config and every weight file it names."""
    if not (folder / "config.json").is_file():
        return False
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, OSError):
                continue
            if shards and all((folder / shard).is_file() for shard in shards):
                return True
    return False


def cached_repos() -> list[str]:
    """Return the ids of the models in the local cache, complete or not."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob("models--*"))


def probe(repo: str, *, revision: str | None = None, token: Any = None, filename: str = "config.json") -> HubState:
    """Ask the hub, with one small request, whether a file of a model can be had.

    Without a network `from_pretrained` itself repeats every request five times and takes half a minute
    to fail; this takes a fraction of a second, and never more than a few seconds.

    Returns:
        ``"ok"``, ``"missing"`` (no such model, revision or file), ``"gated"`` (terms to accept, or no
        right to read), ``"unreachable"``, or ``"offline"`` (``HF_HUB_OFFLINE``).
    """
    if is_offline():
        return "offline"
    answer: list[HubState] = []
    # A daemon, so that a resolver that hangs does not keep the interpreter from ending.
    worker = threading.Thread(
        target=lambda: answer.append(_probe(repo, revision, token, filename)), name="kvembed-probe", daemon=True
    )
    worker.start()
    worker.join(_PROBE_SECONDS)
    return answer[0] if answer else "unreachable"


def _probe(repo: str, revision: str | None, token: Any, filename: str) -> HubState:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        url = hf_hub_url(repo, filename, revision=revision)
        get_hf_file_metadata(url, token=token, timeout=_REQUEST_SECONDS)
    except GatedRepoError:
        return "gated"
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError):
        return "missing"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        return "gated" if status in (401, 403) else "unreachable"
    except Exception:
        # The HTTP library changed once already (requests, then httpx), so its own errors are not named.
        return "unreachable"
    return "ok"
