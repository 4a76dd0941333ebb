"""What kvembed reaches on a GPU: checks its own results, prints figures against targets, and ends with a verdict.

Exit status: 0 when everything was right and every target was met, 1 when not, 2 when there is no GPU. ``--dry-run``
goes through all of it with a small model on a device that is none; its figures mean nothing, and only wrong results
count.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvembed import CachedModel, KVStore
from kvembed._transfer import engine_for
from kvembed._transfer.measure import measure
from kvembed._transfer.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvembed._transfer import TransferEngine

SUFFIX = 20
TIERS = ("live", "gpu", "cpu", "disk")


@dataclass
class Verdict:
    """Checks as they are made.

    Args:
        speeds_count: Whether a target that was missed makes the verdict bad.
    """

    speeds_count: bool
    failed: list[str] = field(default_factory=list)

    def right(self, what: str, is_right: bool) -> None:
        """Note whether a result was right."""
        self._note(what, "right" if is_right else "WRONG", is_right)

    def reaches(self, what: str, value: float, *, least: float | None = None, most: float | None = None) -> None:
        """Note a figure and its target."""
        is_met = (least is None or value >= least) and (most is None or value <= most)
        target = f"at least {least:.2f}" if least is not None else f"at most {most:.2f}"
        if self.speeds_count:
            self._note(what, f"{value:.2f} ({target})", is_met)
        else:
            print(f"----  {what}: {value:.2f} ({target})")

    def _note(self, what: str, answer: str, is_good: bool) -> None:
        print(f"{'ok  ' if is_good else 'FAIL'}  {what}: {answer}")
        if not is_good:
            self.failed.append(what)

    def end(self) -> int:
        """Print the verdict and return the exit status."""
        good = "everything right, every target met" if self.speeds_count else "everything right (a dry run: no target)"
        print("\nVERDICT: " + ("failed: " + "; ".join(self.failed) if self.failed else good))
        return 1 if self.failed else 0


@dataclass
class Bench:
    """What is measured on.

    Args:
        model: The model, on the device.
        device: The device.
        ids: Enough token ids ``[n]``.
        tokens: Tokens of the document.
        rounds: Rounds; medians are shown.
        verdict: Takes the checks.
        link: Bytes a second of the PCIe link, or None when it is not known.
    """

    model: Any
    device: torch.device
    ids: torch.Tensor
    tokens: int
    rounds: int
    verdict: Verdict
    link: float | None = None

    def prompt(self, variant: int, tokens: int | None = None) -> torch.Tensor:
        """Return the document and some other tokens after it, ``[1, n]``."""
        n = self.tokens if tokens is None else tokens
        start = self.tokens + SUFFIX * (variant % 50)
        return torch.cat([self.ids[:n], self.ids[start : start + SUFFIX]])[None].to(self.device)

    def settled(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds a call takes, its work on the device included, and its result."""
        self.settled()
        began = time.perf_counter()
        result = function()
        self.settled()
        return time.perf_counter() - began, result

    def ask(self, cached: CachedModel, prompt: torch.Tensor, new: int = 1) -> tuple[float, Any]:
        """Generate; return the seconds and everything that came of it."""
        return self.timed(
            lambda: cached.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )


def leave_only(cached: CachedModel, bench: Bench, tier: str) -> None:
    """Make ``tier`` the fastest that still has the document."""
    store = cached.store
    if tier == "gpu":
        # Another sequence takes the place of the live one, whose blocks stay on the device.
        other = bench.ids[-600:].flip(0)[None].to(bench.device)
        cached.generate(other, attention_mask=torch.ones_like(other), max_new_tokens=1, do_sample=False)
        return
    cached.drop_live()
    if store._gpu is not None:
        store._gpu.clear()
    if tier == "disk":
        store.flush()
        assert store._cpu is not None
        store._cpu.clear()


def same(a: Any, b: Any) -> bool:
    """True when two calls have the same tokens and the same bits in their logits."""
    return torch.equal(a.sequences, b.sequences) and torch.equal(torch.stack(a.logits), torch.stack(b.logits))


def check_copies(bench: Bench, engine: TransferEngine) -> tuple[float, float]:
    """Copy there and back; return bytes a second each way."""
    rates = measure(engine, 64 << 20 if bench.verdict.speeds_count else 1 << 20)
    for way, rate in (("to the device", rates.to_device), ("to the host", rates.to_host)):
        print(f"      copies {way}: {rate / 1e9:.1f} GB/s")
        if bench.link is not None:
            bench.verdict.reaches(f"part of PCIe {way}", rate / bench.link, least=0.85)
    if bench.link is None:
        print("      the speed of the link is not known: no fraction of it (give --pcie-gbps)")
    return rates.to_device, rates.to_host


def check_tiers(bench: Bench, folder: str, rate: float) -> None:
    """Time to the first token from each tier, its bits, and how much of the transfer hides."""
    found: dict[str, list[float]] = {}
    with (
        KVStore(folder, max_cpu_bytes=4 * bench.tokens * 300_000, max_disk_bytes="50%") as store,
        CachedModel(bench.model, store=store, progress=False, deterministic=True, max_live=1) as cached,
    ):
        if cached.support is not None:
            bench.verdict.right(f"the model is served ({cached.support})", False)
            return
        reference: dict[int, Any] = {}
        for r in range(1, bench.rounds + 1):
            store.clear()
            cached.drop_live()
            seconds, reference[r] = bench.ask(cached, bench.prompt(r))
            found.setdefault("cold", []).append(seconds)
        for tier in TIERS:
            is_right, is_served = True, True
            for r in range(1, bench.rounds + 1):
                # What generate() returns with its cache does not stay live: this call leaves it so.
                prompt = bench.prompt(r + 100)
                cached.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
                if tier != "live":
                    leave_only(cached, bench, tier)
                seconds, result = bench.ask(cached, bench.prompt(r))
                found.setdefault(tier, []).append(seconds)
                is_right &= same(result, reference[r])
                is_served &= set(cached.usage.cached_tokens_by_tier) == {"gpu" if tier == "live" else tier}
            bench.verdict.right(f"tokens and logits from tier {tier}, bit for bit", is_right)
            bench.verdict.right(f"served from tier {tier}", is_served)
        nbytes = bench.tokens * cached.kv_bytes_per_token
        layers = sum(1 for _ in cached._engine.spec.rows())
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in medians.items():
        print(f"      time to first token, {name}: {1e3 * seconds:.1f} ms")
    transfer, compute = nbytes / rate, medians["live"]
    timeline = simulate([compute / layers] * layers, [0.0] * layers, [transfer / layers] * layers)
    hidden = (transfer + compute - medians["cpu"]) / transfer
    print(f"      {nbytes / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s take {1e3 * transfer:.1f} ms; by simulation:")
    print("\n".join(f"      {line}" for line in timeline.text().splitlines()))
    bench.verdict.reaches("overlap from host memory against the simulation", hidden / timeline.hidden, least=0.8)
    bench.verdict.reaches(
        "first token from host memory against the larger of transfer and compute",
        medians["cpu"] / max(transfer, compute),
        most=1.15,
    )
    for slower, faster in (("cold", "disk"), ("disk", "cpu"), ("cpu", "gpu")):
        bench.verdict.reaches(f"time from {faster} against {slower}", medians[faster] / medians[slower], most=1.05)


def check_offload(bench: Bench, folder: str) -> None:
    """What storing costs a generation that stores nothing yet, in pairs of rounds."""
    new = 4 * SUFFIX
    ratios = []
    with (
        KVStore(folder, max_cpu_bytes=4 * bench.tokens * 300_000) as store,
        KVStore(max_cpu_bytes=None, max_disk_bytes=None, max_gpu_bytes=None) as nothing,
        CachedModel(bench.model, store=store, progress=False, max_live=0) as keeps,
        CachedModel(bench.model, store=nothing, progress=False, max_live=0) as forgets,
    ):
        short = min(bench.tokens, 1024)
        for r in range(bench.rounds + 1):
            store.clear()
            seconds = {
                name: bench.ask(cached, bench.prompt(r, short), new)[0]
                for name, cached in sorted({"keeps": keeps, "forgets": forgets}.items(), reverse=r % 2 == 0)
            }
            if r:  # the first one warms up
                ratios.append(seconds["keeps"] / seconds["forgets"])
        store.flush()
        bench.verdict.right("blocks that left the device are sound", store.verify().problems == ())
        bench.verdict.right("blocks have left the device", store.stats().tiers[-1].blocks > 0)
    bench.verdict.reaches("a generation that stores against one that does not", statistics.median(ratios), most=1.02)


def run(bench: Bench, engine: TransferEngine) -> int:
    """Make all checks; return the exit status."""
    print(f"engine: {engine.name}; {bench.tokens:,} tokens; {bench.rounds} rounds, medians\n")
    into, _ = check_copies(bench, engine)
    with tempfile.TemporaryDirectory() as folder:
        check_tiers(bench, f"{folder}/tiers", into)
        check_offload(bench, f"{folder}/offload")
    return bench.verdict.end()


def link_speed(index: int) -> float | None:
    """Return the bytes a second of a GPU's PCIe link, as the system has it."""
    with contextlib.suppress(ImportError, RuntimeError, IndexError):
        from kvembed_cuda import status

        link = status().devices[index].link
        return None if link is None else link.bytes_per_second
    return None


@contextlib.contextmanager
def pretended_device() -> Iterator[Callable[[torch.device], TransferEngine]]:
    """Have models compute on a device that is none: host memory behind streams that run late."""
    from unittest import mock

    from kvembed._transfer import Transfers
    from kvembed._transfer.fake import FakeStreams
    from kvembed._transfer.pinned import TorchTransfer

    def make(device: torch.device) -> TorchTransfer:
        return TorchTransfer(device, FakeStreams("late", eager=True), 1 << 20)

    with (
        mock.patch("kvembed._devices.Transfers", lambda: Transfers(make)),
        mock.patch("kvembed._store.free_gpu_memory", lambda devices: 1 << 30),
    ):
        yield make


def small_model() -> Any:
    """Return a Llama of random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="alias, folder or hub id")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of the document")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pcie-gbps", type=float, help="GB/s of the link; asked of the system otherwise")
    parser.add_argument("--dry-run", action="store_true", help="go through it without a GPU")
    args = parser.parse_args(arguments)
    if args.dry_run:
        ids = torch.randint(1, 290, (4000,), generator=torch.Generator().manual_seed(1))
        with pretended_device() as make:
            cpu = torch.device("cpu")
            bench = Bench(small_model(), cpu, ids, 600, 1, Verdict(speeds_count=False), 1e9)
            return run(bench, make(cpu))
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured (--dry-run goes through it without one)")
        return 2
    import common

    from kvembed._loading.load import load

    device = torch.device("cuda", torch.cuda.current_device())
    model, tokenizer, _ = load(args.model, dtype=args.dtype)
    model = model.to(device)
    link = args.pcie_gbps * 1e9 if args.pcie_gbps else link_speed(device.index)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {args.model} in {model.dtype}")
    ids = common.text_ids(tokenizer)
    bench = Bench(model, device, ids, args.tokens, args.rounds, Verdict(speeds_count=True), link)
    engine = engine_for(device)
    try:
        return run(bench, engine)
    finally:
        engine.close()


if __name__ == "__main__":
    sys.exit(main())
