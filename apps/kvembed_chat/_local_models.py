"""The models one can choose from: aliases, converted ones, and those in the Hugging Face cache."""

from __future__ import annotations

import json
from pathlib import Path

from kvembed._loading.aliases import ALIASES
from kvembed._loading.convert import converted_dir, is_converted
from kvembed._loading.hub import cached_repos, cached_snapshot
from kvembed._paths import models_dir
from kvembed._units import format_bytes
from kvembed_chat._engine import ModelItem

__all__ = ["local_models"]


def local_models() -> list[ModelItem]:
    """Return what can be loaded by name, without asking the network; the best first choice is first."""
    found: list[ModelItem] = []
    known = {str(converted_dir(alias.name, alias.gguf_sha256)) for alias in ALIASES.values()}
    hub_ids = {alias.hub_id for alias in ALIASES.values()}
    for alias in ALIASES.values():
        here = is_converted(converted_dir(alias.name, alias.gguf_sha256)) or cached_snapshot(alias.hub_id)
        size = format_bytes(sum(wheel.nbytes for wheel in alias.wheels))
        note = "on this machine" if here else f"{size} to download"
        if "(base)" in alias.title:
            note += ", no chat"
        found.append(ModelItem(alias.name, alias.title, note))
    for repo in cached_repos():
        if repo not in hub_ids and cached_snapshot(repo) is not None:
            found.append(ModelItem(repo, repo, "in the Hugging Face cache"))
    for folder in _folders(models_dir()):
        if str(folder) not in known:
            found.append(ModelItem(str(folder), _title(folder), "converted on this machine"))
    return found


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(folder for folder in place.iterdir() if is_converted(folder))
    except OSError:
        return []


def _title(folder: Path) -> str:
    """Return what a converted model was made from, or its folder's name."""
    for name in ("kvembed.json", "source.json"):
        try:
            known = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(known, dict) and isinstance(known.get("file"), str):
            return Path(known["file"]).name
    return folder.name
