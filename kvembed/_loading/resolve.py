"""From a name to something `from_pretrained` can read."""

from __future__ import annotations

import difflib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvembed._errors import ModelNotFoundError
from kvembed._loading import hub
from kvembed._loading.aliases import ALIASES, Alias, find_alias
from kvembed._loading.convert import converted_dir, is_converted, make_once, require_gguf, write_converted
from kvembed._loading.gguf import read_gguf_metadata
from kvembed._loading.package import fetch_gguf, sha256_of
from kvembed._loading.progress import progress_bar

if TYPE_CHECKING:
    import os

    from kvembed._loading.progress import ProgressCallback

__all__ = ["Resolved", "resolve"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Resolved:
    """Where a model's files are.

    Args:
        name: What was asked for.
        path_or_id: A folder in Hugging Face format, or a hub id: what `from_pretrained` is given.
        source: ``"folder"``, ``"gguf"`` (the user's file, converted), ``"hf-cache"``, ``"hub"``, or
            ``"package"`` (an alias, converted from packaged weights).
        gguf_file: The file it was converted from, when the user named one.
        local_files_only: True when nothing needs the network.
        revision: Hub revision, if one was asked for.
    """

    name: str
    path_or_id: str
    source: Literal["folder", "gguf", "hf-cache", "hub", "package"]
    gguf_file: str | None = None
    local_files_only: bool = True
    revision: str | None = None


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    on_progress: ProgressCallback | None = None,
    **hub_kwargs: Any,
) -> Resolved:
    """Find a model.

    - An alias: a complete copy in the Hugging Face cache, else a copy converted before, else the hub, else
      the packages that ship its weights, converted once.
    - A folder is used as it is; a file ending in ``.gguf`` (or a folder with one and no config) is
      converted once.
    - Anything else is a hub id. When the hub cannot be reached within seconds, a cached copy is used.

    Args:
        name: Alias, folder, GGUF file or hub id.
        revision: Hub branch, tag or commit.
        on_progress: Told of downloads and conversions; without it a bar is drawn.
        **hub_kwargs: ``token``, ``cache_dir``, ``subfolder`` and ``local_files_only`` of `from_pretrained`; others
            are ignored.

    Returns:
        What to load.

    Raises:
        ModelNotFoundError: Nothing has that name; the message names what comes near and what to do.
        ConfigError: A GGUF file or the folder of models cannot be used.
    """
    text = str(name)
    if not text.strip():
        raise ModelNotFoundError(f"the model name is empty; use an alias ({_aliases()}), a folder or a hub id")
    if alias := find_alias(text):
        return _resolve_alias(alias, text, revision, on_progress, hub_kwargs)
    path = Path(text).expanduser()
    if path.exists():
        return _resolve_path(path, text, on_progress)
    if _looks_like_path(name, text):
        raise ModelNotFoundError(f"there is no folder or file {text!r}{_near(text)}")
    return _resolve_hub_id(text, revision, hub_kwargs)


# ---------------------------------------------------------------------------------------------- aliases


def _resolve_alias(
    alias: Alias, text: str, revision: str | None, on_progress: ProgressCallback | None, hub_kwargs: dict[str, Any]
) -> Resolved:
    place = _place(hub_kwargs)
    if hub.cached_snapshot(alias.hub_id, revision=revision, **place):
        return Resolved(text, alias.hub_id, "hf-cache", revision=revision)
    folder = converted_dir(alias.name, alias.gguf_sha256)
    if revision is None and is_converted(folder):
        return Resolved(text, str(folder), "package")
    offline = bool(hub_kwargs.get("local_files_only"))
    state = "offline" if offline else hub.probe(alias.hub_id, revision=revision, token=hub_kwargs.get("token"))
    if state == "ok":
        return Resolved(text, alias.hub_id, "hub", local_files_only=False, revision=revision)
    if revision is not None:
        raise ModelNotFoundError(
            f"{text}: revision {revision!r} of {alias.hub_id} cannot be had ({_why(state)}), and the packaged "
            "weights have no revisions. Leave revision out to use them."
        )
    if offline:
        raise ModelNotFoundError(
            f"{text}: no copy on this machine, and local_files_only=True forbids a download. Leave it out once."
        )
    _from_package(alias, folder, on_progress)
    return Resolved(text, str(folder), "package")


def _from_package(alias: Alias, folder: Path, on_progress: ProgressCallback | None) -> None:
    require_gguf(f"{alias.name} ({alias.title})")  # before the download, not after

    def build(work: Path) -> Path:
        gguf, notices = fetch_gguf(alias, work, report)
        source = {"alias": alias.name, "hub_id": alias.hub_id, "gguf_sha256": alias.gguf_sha256}
        done = write_converted(gguf, work / "hf", title=alias.name, source=source, on_progress=report)
        for notice in notices:
            shutil.copyfile(notice, done / notice.name)
        return done

    with progress_bar(alias.name, on_progress) as report:
        make_once(folder, build)


# ---------------------------------------------------------------------------------------------- local files


def _resolve_path(path: Path, text: str, on_progress: ProgressCallback | None) -> Resolved:
    if path.is_file():
        return _resolve_gguf(path, text, on_progress)
    if any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        return Resolved(text, str(path), "folder")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _resolve_gguf(files[0], text, on_progress)
    if files:
        raise ModelNotFoundError(f"{text} holds several GGUF files; name one: {', '.join(f.name for f in files)}")
    raise ModelNotFoundError(f"{text} is not a model folder: it has no config.json and no .gguf file")


def _resolve_gguf(path: Path, text: str, on_progress: ProgressCallback | None) -> Resolved:
    if path.suffix.lower() != ".gguf":
        raise ModelNotFoundError(f"{text} is a file, but not a .gguf file; name the model's folder instead")
    read_gguf_metadata(path)  # a damaged file is told apart before anything else is asked for
    require_gguf(path.name)
    digest = sha256_of(path)
    folder = converted_dir("gguf", digest)

    def build(work: Path) -> Path:
        source = {"gguf_file": path.name, "gguf_sha256": digest}
        return write_converted(path, work / "hf", title=path.name, source=source, on_progress=report)

    with progress_bar(path.name, on_progress) as report:
        make_once(folder, build)
    return Resolved(text, str(folder), "gguf", gguf_file=str(path))


# ---------------------------------------------------------------------------------------------- hub ids


def _resolve_hub_id(text: str, revision: str | None, hub_kwargs: dict[str, Any]) -> Resolved:
    if not _HUB_ID.fullmatch(text):
        raise ModelNotFoundError(f"{text!r} is neither an alias, a path nor a hub id{_near(text)}")
    cached = hub.cached_snapshot(text, revision=revision, **_place(hub_kwargs)) is not None
    if hub_kwargs.get("local_files_only"):
        state: hub.HubState = "offline"
    else:
        # Asked even when a copy is cached, as transformers does: "main" may have moved.
        state = _probe(text, revision, hub_kwargs)
    if state == "ok":
        return Resolved(text, text, "hub", local_files_only=False, revision=revision)
    if cached and state != "missing":
        return Resolved(text, text, "hf-cache", revision=revision)
    what = text if revision is None else f"{text} (revision {revision})"
    raise ModelNotFoundError(f"cannot find the model {what!r}: {_why(state)}{_near(text)}")


def _probe(text: str, revision: str | None, hub_kwargs: dict[str, Any]) -> hub.HubState:
    token, subfolder = hub_kwargs.get("token"), hub_kwargs.get("subfolder") or ""
    prefix = f"{subfolder}/" if subfolder else ""
    state = hub.probe(text, revision=revision, token=token, filename=f"{prefix}config.json")
    if state == "missing":  # an adapter has another config
        state = hub.probe(text, revision=revision, token=token, filename=f"{prefix}adapter_config.json")
    return state


def _place(hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    cache_dir = hub_kwargs.get("cache_dir")
    return {"cache_dir": str(cache_dir) if cache_dir else None, "subfolder": hub_kwargs.get("subfolder") or ""}


def _why(state: str) -> str:
    return {
        "missing": "the hub has no such model or revision (for a private one, log in with `hf auth login`)",
        "gated": "the hub wants you to accept its terms and to log in with `hf auth login`",
        "unreachable": "the hub cannot be reached, and the local Hugging Face cache has no complete copy",
        "offline": "working offline, and the local Hugging Face cache has no complete copy",
    }[state]


def _looks_like_path(name: object, text: str) -> bool:
    return (
        isinstance(name, Path)
        or text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or (text.lower().endswith(".gguf"))
    )


def _aliases() -> str:
    return ", ".join(sorted(ALIASES))


def _near(text: str) -> str:
    """Return words that name what comes near ``text``, to end an error message with."""
    aliases = {alias: alias for alias in ALIASES} | {alias.hub_id.lower(): name for name, alias in ALIASES.items()}
    close = [aliases[match] for match in difflib.get_close_matches(text.lower(), aliases, n=3, cutoff=0.5)]
    parent = Path(text).expanduser().parent
    try:
        names = [path.name for path in parent.iterdir() if path.is_dir() or path.suffix == ".gguf"]
    except OSError:
        names = []
    folders = difflib.get_close_matches(Path(text).name, names, n=3, cutoff=0.6)
    close += [str(parent / folder) if "/" in text else f"./{folder}" for folder in folders]
    close += difflib.get_close_matches(text, hub.cached_repos(), n=3, cutoff=0.6)
    hint = f". Did you mean {' or '.join(repr(word) for word in dict.fromkeys(close))}?" if close else "."
    return f"{hint} Known aliases: {_aliases()}; a folder, a GGUF file or a hub id works too."
