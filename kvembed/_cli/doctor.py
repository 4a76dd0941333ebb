"""``kvembed doctor``: what was found on this machine, and what to do about what is wrong."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvembed._cli import _codecs, _common, _machine, _transfers
from kvembed._cli._steps import Steps
from kvembed._errors import KVEmbedError
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Problem", "find_problems", "inspect_machine", "inspect_model", "register"]

_TextOption = Annotated[
    Path | None,
    typer.Option(help="With --codec: a text to measure it on, in place of the Python reference.", show_default=False),
]
_LOW_DISK = 2 << 30


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do.

    Args:
        level: ``"error"`` when kvembed cannot do its work, else ``"warning"``.
        what: What is wrong.
        fix: What to do.
    """

    level: Literal["error", "warning"]
    what: str
    fix: str


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in ("kvembed", "torch", "transformers", "safetensors", "tokenizers", "numpy", "gguf", "cryptography"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    from kvembed import __version__

    return {**versions, "kvembed": __version__}


def inspect_machine(path: Path, *, quick: bool = False) -> dict[str, Any]:
    """Look at the machine and at the place of the store.

    Args:
        path: Folder of the store; it need not exist, and is not created.
        quick: Leave out the measurements.

    Returns:
        JSON types only; sizes in bytes, rates in bytes a second.
    """
    import torch

    from kvembed._budgets import cpu_budget, disk_budget, physical_memory
    from kvembed._codec import marker_stamp
    from kvembed._loading.dtype import default_device, explain_dtype
    from kvembed._paths import is_disabled

    device = default_device()
    dtype, reason = explain_dtype(device)
    kind = _machine.file_system(path)
    parent = _machine.existing_parent(path)
    rates: dict[str, float | None] = {}
    if not quick:
        disk = _machine.disk_rates(path)
        rates = {
            "memory_copy": _machine.memcpy_rate(),
            "disk_write_synced": disk[0] if disk else None,
            "disk_read_cached": disk[1] if disk else None,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "cores": _machine.cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": physical_memory(),
        "disabled": is_disabled(),
        "store": {
            "path": str(path),
            "exists": path.exists(),
            "encrypted": marker_stamp(path) is not None if path.is_dir() else False,
            "is_folder": path.is_dir() if path.exists() else None,
            "writable": _machine.is_writable(path),
            "file_system": kind,
            "network": _machine.is_network(kind),
            "free_bytes": shutil.disk_usage(parent).free,
            "max_cpu_bytes": cpu_budget("auto"),
            "max_disk_bytes": disk_budget("auto", parent if parent.is_dir() else parent.parent, _used(path)),
        },
        "rates": rates,
        "transfer": _transfers.inspect_transfer(device, quick=quick),
    }


def _used(path: Path) -> int:
    blocks = path / "blocks"
    return sum(f.stat().st_size for f in blocks.rglob("*.safetensors")) if blocks.is_dir() else 0


def find_problems(facts: dict[str, Any]) -> list[Problem]:
    """Return what is wrong with what `inspect_machine` found (a pure function)."""
    store, versions, transfer = facts["store"], facts["versions"], facts["transfer"]
    problems: list[Problem] = []

    def error(what: str, fix: str) -> None:
        problems.append(Problem("error", what, fix))

    def warn(what: str, fix: str) -> None:
        problems.append(Problem("warning", what, fix))

    if store["exists"] and not store["is_folder"]:
        error(f"{store['path']} is a file", "Name a folder: --dir, or KVEMBED_CACHE_DIR.")
    elif not store["writable"]:
        error(
            f"{store['path']} cannot be written",
            "Give yourself write access, or set KVEMBED_CACHE_DIR to another folder.",
        )
    if facts["disabled"]:
        warn("KVEMBED_DISABLE is set: nothing is reused and nothing is stored", "Unset it.")
    if store["network"]:
        warn(
            f"the store is on a network file system ({store['file_system']}), where the catalog's locks are not safe",
            "Set KVEMBED_CACHE_DIR to a folder on a local disk.",
        )
    if store["file_system"] in {"tmpfs", "ramfs"}:
        warn(
            f"the store is in memory ({store['file_system']}): it is lost at reboot",
            "Set KVEMBED_CACHE_DIR to a folder on disk.",
        )
    if store["free_bytes"] < _LOW_DISK:
        warn(
            f"only {format_bytes(store['free_bytes'])} are free on the store's disk",
            "Free some space, or run kvembed prune --max-bytes.",
        )
    if store["encrypted"] and not versions["cryptography"]:
        error(f"{store['path']} is encrypted, and a package is missing", "pip install 'kvembed[encryption]'")
    if transfer["ignored"]:
        warn(
            f"KVEMBED_TRANSFER is {transfer['ignored']!r}, which is no engine, and ignored",
            "Set it to auto, extension, torch or plain, or unset it.",
        )
    if transfer["error"]:
        warn(f"copies to the device failed: {transfer['error']}", "Free memory on the device, or try another engine.")
    if facts["torch_threads"] > facts["cores"]:
        warn(
            f"torch uses {facts['torch_threads']} threads on {facts['cores']} cores, which slows everything down",
            "Set OMP_NUM_THREADS to the number of cores.",
        )
    if not versions["gguf"]:
        warn("GGUF files, and aliases without the hub, need a package that is missing", "pip install 'kvembed[gguf]'")
    return problems


def inspect_model(name: str, dtype: str, codecs: Sequence[str] = (), text: str | None = None) -> dict[str, Any]:
    """Load a model and say whether kvembed can cache it.

    Args:
        name: Alias, hub id, folder or GGUF file.
        dtype: Type of its weights.
        codecs: Codecs to be measured on it.
        text: On which text; the Python reference when None.

    Returns:
        ``name``, ``supported``, ``reason`` (why not), and when it could be loaded ``class``, ``dtype``, ``device``,
        ``kv_bytes_per_token``, the fields of its ``fingerprint`` and what was measured of ``codecs``.
    """
    import tempfile

    from kvembed import KVStore

    # A store that is thrown away: looking at a model must not fill the user's.
    with tempfile.TemporaryDirectory(prefix="kvembed-doctor-") as folder:
        try:
            with KVStore(folder) as store, _common.load_model(name, store, Steps(quiet=True), dtype=dtype) as model:
                return {
                    "name": name,
                    "supported": model.support is None,
                    "reason": model.support,
                    "class": type(model.hf_model).__name__,
                    "dtype": str(model.hf_model.dtype).removeprefix("torch."),
                    "device": str(model.hf_model.device),
                    "kv_bytes_per_token": model.kv_bytes_per_token or None,
                    "fingerprint": dict(model.fingerprint),
                    **({"codecs": _codecs.measure(model, codecs, text)} if codecs and model.support is None else {}),
                }
        except KVEmbedError as error:
            return {"name": name, "supported": False, "reason": str(error)}


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def doctor(
        model: str | None = typer.Argument(None, help="Also load this model, and say whether it can be cached."),
        dtype: str = typer.Option("auto", help="Type of the model's weights."),
        quick: bool = typer.Option(False, "--quick", help="Leave out the measurements."),
        codec: str | None = typer.Option(
            None, help="Also measure what this codec (or 'all') costs the model's answers.", show_default=False
        ),
        text: _TextOption = None,
        folder: _common.DirOption = None,
        as_json: _common.JsonOption = False,
    ) -> None:
        """Say what was found on this machine, and what to do about what is wrong.

        Ends with status 1 when something keeps kvembed from working.
        """
        codecs = _codecs.chosen(codec, model, text)
        path = _common.store_path(folder)
        facts = inspect_machine(path, quick=quick)
        problems = find_problems(facts)
        if model is not None:
            facts["model"] = inspect_model(model, dtype, codecs, None if text is None else _codecs.read(text))
            if not facts["model"]["supported"]:
                loaded = "class" in facts["model"]
                fix = "Calls of it work, but without a cache." if loaded else "Look at its name and its files."
                problems.append(Problem("error", f"{model}: {facts['model']['reason'].rstrip('.')}", fix))
        failed = any(problem.level == "error" for problem in problems)
        if as_json:
            _common.print_json({"ok": not failed, **facts, "problems": [asdict(p) for p in problems]})
        else:
            _show(facts, problems)
        if failed:
            raise typer.Exit(1)


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 1e9:.1f} GB/s"


def _show(facts: dict[str, Any], problems: list[Problem]) -> None:
    out = _common.console()
    store, versions = facts["store"], facts["versions"]
    encrypted = ", encrypted" if store["encrypted"] else ""
    rows: list[tuple[str, str]] = [
        ("kvembed", f"{versions['kvembed']} on Python {facts['python']}, {facts['platform']}"),
        ("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in versions.items() if k != "kvembed")),
        ("device", f"{facts['device']} ({facts['device_name']})"),
        ("dtype", f"{facts['dtype']}: {facts['dtype_reason']}"),
        ("processor", f"{facts['cores']} cores, torch uses {facts['torch_threads']} threads"),
        ("memory", format_bytes(facts["memory_bytes"])),
        ("store", f"{store['path']}{'' if store['exists'] else ' (not made yet)'}{encrypted}"),
        (
            "disk",
            f"{store['file_system'] or 'unknown file system'}, {format_bytes(store['free_bytes'])} free"
            f"{', writable' if store['writable'] else ', NOT writable'}",
        ),
        ("budgets", f"cpu {format_bytes(store['max_cpu_bytes'])}, disk {format_bytes(store['max_disk_bytes'])}"),
    ]
    if facts["rates"]:
        rates = facts["rates"]
        rows.append(
            (
                "bandwidth",
                f"memory copy {_rate(rates['memory_copy'])}, disk write {_rate(rates['disk_write_synced'])} (synced), "
                f"read {_rate(rates['disk_read_cached'])} (page cache)",
            )
        )
    rows.append(("transfer", _transfers.describe(facts["transfer"])))
    if "model" in facts:
        model = facts["model"]
        if model["supported"]:
            size = format_bytes(model["kv_bytes_per_token"]) if model["kv_bytes_per_token"] else "unknown size"
            made = f"{model['class']} in {model['dtype']} on {model['device']}"
            text = f"{model['name']}: cached; {made}, {size} of KV a token"
        else:
            text = f"{model['name']}: not cached; {model['reason']}"
        rows.append(("model", text))
        if model.get("codecs"):
            rows.append(("codecs", _codecs.describe(model["codecs"])))
    from rich.text import Text

    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        text = text.replace("\n", "\n" + " " * (width + 2))
        out.print(Text.assemble((name.ljust(width + 2), "bold"), text), soft_wrap=True)
    out.print()
    if not problems:
        out.print("No problems found.")
    for problem in problems:
        colour = "red" if problem.level == "error" else "yellow"
        out.print(Text.assemble((f"{problem.level}: ", colour), f"{problem.what}. {problem.fix}"), soft_wrap=True)
