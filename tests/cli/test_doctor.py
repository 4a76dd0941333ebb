"""``kvembed doctor``: what it finds, and what it makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvembed._cli import _machine, _transfers
from kvembed._cli.doctor import find_problems, inspect_machine

if TYPE_CHECKING:
    from collections.abc import Callable

_SOUND: dict[str, Any] = {
    "versions": {"gguf": "1.0", "cryptography": "47"},
    "disabled": False,
    "transfer": {"ignored": None, "error": None},
    "cores": 4,
    "torch_threads": 4,
    "store": {
        "path": "/s",
        "exists": True,
        "is_folder": True,
        "writable": True,
        "file_system": "ext4",
        "network": False,
        "encrypted": False,
        "free_bytes": 1 << 40,
    },
}


def test_a_sound_machine_has_no_problems() -> None:
    assert find_problems(_SOUND) == []


@pytest.mark.parametrize(
    ("change", "level", "word"),
    [
        ({"store": {"is_folder": False}}, "error", "is a file"),
        ({"store": {"writable": False}}, "error", "KVEMBED_CACHE_DIR"),
        ({"store": {"network": True, "file_system": "nfs4"}}, "warning", "nfs4"),
        ({"store": {"file_system": "tmpfs"}}, "warning", "reboot"),
        ({"store": {"free_bytes": 1 << 20}}, "warning", "prune"),
        ({"torch_threads": 64}, "warning", "OMP_NUM_THREADS"),
        ({"transfer": {"ignored": "dma"}}, "warning", "KVEMBED_TRANSFER"),
        ({"transfer": {"error": "out of memory"}}, "warning", "out of memory"),
        ({"disabled": True}, "warning", "KVEMBED_DISABLE"),
        ({"versions": {"gguf": None}}, "warning", "pip install"),
        ({"store": {"encrypted": True}, "versions": {"cryptography": None}}, "error", "kvembed[encryption]"),
    ],
)
def test_each_problem_is_named_with_a_fix(change: dict[str, Any], level: str, word: str) -> None:
    facts = copy.deepcopy(_SOUND)
    for name, value in change.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    problems = find_problems(facts)
    assert [p.level for p in problems] == [level]
    assert word in problems[0].what + problems[0].fix


def test_doctor_looks_without_making_anything(run_json: Callable[..., Any], tmp_path: Path) -> None:
    facts = run_json("doctor", "--quick", "--dir", tmp_path / "a" / "store")
    assert list(tmp_path.iterdir()) == []
    assert facts["ok"] is True
    assert facts["store"]["exists"] is False
    assert facts["store"]["writable"] is True
    assert facts["store"]["max_cpu_bytes"] > 0
    assert facts["cores"] >= 1
    assert facts["dtype"] in {"float32", "bfloat16", "float16"}
    assert facts["dtype_reason"]
    assert facts["rates"] == {}
    assert facts["transfer"]["engine"]
    assert facts["transfer"]["to_device"] is None


def test_doctor_text(run: Callable[..., Any], tmp_path: Path) -> None:
    out = run("doctor", "--quick", "--dir", tmp_path / "store").stdout
    for word in ("device", "dtype", "budgets", "GiB", str(tmp_path), "not made yet"):
        assert word in out


def test_doctor_ends_with_1_when_the_store_cannot_be(run_json: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    facts = run_json("doctor", "--quick", "--dir", file, status=1)
    assert not facts["ok"]
    assert [p["level"] for p in facts["problems"] if "is a file" in p["what"]] == ["error"]


def test_doctor_of_an_unknown_model(run_json: Callable[..., Any], tmp_path: Path) -> None:
    facts = run_json("doctor", "smollm", "--quick", "--dir", tmp_path / "store", status=1)
    assert facts["model"]["supported"] is False
    assert "smollm2" in facts["model"]["reason"]


def test_rates_are_measured_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(_machine, "_DISK_BYTES", 1 << 20)
    monkeypatch.setattr(_transfers, "_MEASURED_BYTES", 1 << 20)
    facts = inspect_machine(tmp_path / "store")
    rates = facts["rates"]
    assert all(facts["transfer"][way] > 1e6 for way in ("to_device", "to_host"))
    assert all(rates[name] > 1e6 for name in ("memory_copy", "disk_write_synced", "disk_read_cached"))
    assert list(tmp_path.iterdir()) == []


def test_rates_of_a_folder_that_cannot_be_written() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    assert _machine.disk_rates(Path("/proc/self/x")) is None
    assert _machine.is_writable(Path("/proc/self/x")) is False


def test_file_system_of_the_innermost_mount(tmp_path: Path) -> None:
    home = tmp_path / "home dir"
    (home / "nfs").mkdir(parents=True)
    escaped = str(home).replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 0:5 / {escaped}/nfs rw shared:1 - nfs4 server:/x rw\n"
        f"3 1 0:6 / {tmp_path}/home rw - tmpfs none rw\n"
        "broken line\n"
    )
    assert _machine.file_system(home / "nfs" / "not" / "there", mounts) == "nfs4"
    assert _machine.file_system(home, mounts) == "ext4"  # /home is not the start of "/home dir"
    assert _machine.file_system(home, tmp_path / "absent") is None


def test_network_file_systems() -> None:
    assert all(_machine.is_network(kind) for kind in ("nfs4", "cifs", "fuse.sshfs", "lustre"))
    assert not any(_machine.is_network(kind) for kind in ("ext4", "xfs", "apfs", "overlay", None))
