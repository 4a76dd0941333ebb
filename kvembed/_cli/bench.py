"""``kvembed bench``: cold against warm, tier by tier, on this machine."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvembed._cli import _common
from kvembed._cli._steps import Steps
from kvembed._cli.simulate import print_simulation
from kvembed._errors import ConfigError, UnsupportedModelError
from kvembed._units import format_count, format_seconds, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._model import CachedModel

__all__ = ["Measure", "measure_round", "register", "summarise"]

_CASES = ("plain", "cold", "live", "cpu", "disk")


@dataclass(frozen=True)
class Measure:
    """One call of one round.

    Args:
        case: ``"plain"`` (transformers alone), ``"cold"``, or the tier the document was in.
        ttft_s: Seconds to the first token.
        cached_tokens: Tokens that were reused.
        computed_tokens: Tokens that were computed.
        decode_tokens_per_second: Speed after the first token, or None.
    """

    case: str
    ttft_s: float
    cached_tokens: int
    computed_tokens: int
    decode_tokens_per_second: float | None


def summarise(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return one row for each case: medians, and how many times faster than cold.

    The factor is the median of the rounds' own factors: both halves of each come from the same minute, so a
    machine that slows down meanwhile does not bend it.
    """
    cases = {case: [m for m in measures if m.case == case] for case in _CASES}
    rows: list[dict[str, Any]] = []
    for case, found in cases.items():
        if not found:
            continue
        pairs = zip(cases["cold"], found, strict=False)
        speeds = [m.decode_tokens_per_second for m in found if m.decode_tokens_per_second]
        rows.append(
            {
                "case": case,
                "rounds": len(found),
                "ttft_s": statistics.median(m.ttft_s for m in found),
                "times_faster": statistics.median([cold.ttft_s / m.ttft_s for cold, m in pairs] or [1.0]),
                "cached_tokens": int(statistics.median(m.cached_tokens for m in found)),
                "computed_tokens": int(statistics.median(m.computed_tokens for m in found)),
                "decode_tokens_per_second": statistics.median(speeds) if speeds else None,
            }
        )
    return rows


def measure_round(
    model: CachedModel,
    document: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    new_tokens: int,
    store: Path,
    plain: bool,
) -> list[Measure]:
    """Run one document through every case, each with a suffix of its own.

    Args:
        model: The wrapped model; its store must know nothing of the document.
        document: Ids that the prompts share.
        suffixes: Ids after them, one for each case.
        new_tokens: Tokens to generate.
        store: Folder of the model's store.
        plain: Run transformers alone too.
    """
    from kvembed import CachedModel, KVStore
    from kvembed._cli._sample import plain_generate

    prompts = iter([[*document, *suffix] for suffix in suffixes])
    found: list[Measure] = []

    def run(case: str, wrapped: CachedModel) -> None:
        import torch

        hf_model: Any = wrapped.hf_model
        ids = torch.tensor([next(prompts)], device=hf_model.device)
        wrapped.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
        usage = wrapped.usage
        speed = usage.decode_tokens_per_second
        found.append(Measure(case, usage.ttft_s, usage.cached_tokens, usage.computed_tokens, speed))

    if plain:
        prompt = next(prompts)
        made = plain_generate(model, prompt, new_tokens)
        later = len(made.token_ids) - 1
        speed = later / made.decode_s if later > 0 and made.decode_s > 0 else None
        found.append(Measure("plain", made.ttft_s, 0, len(prompt), speed))
    run("cold", model)
    model.store.flush()  # or the writer would still be at work in the next case
    run("live", model)
    model.store.flush()
    model.drop_live()
    run("cpu", model)
    model.store.flush()
    # A second store on the same folder has nothing in memory: what a new process finds.
    with KVStore(store) as cold_store, CachedModel(model.hf_model, model.tokenizer, store=cold_store) as other:
        run("disk", other)
    model.drop_live()
    return found


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def bench(
        model: str = typer.Argument("smollm2", help="Alias, hub id, folder or GGUF file."),
        tokens: int = typer.Option(2000, min=64, help="Tokens of the document."),
        rounds: int = typer.Option(3, min=1, help="Rounds; medians are shown."),
        suffix: int = typer.Option(20, min=1, help="Tokens after the document, other ones each time."),
        new_tokens: int = typer.Option(16, min=1, help="Tokens to generate."),
        plain: bool = typer.Option(True, help="Measure transformers alone too."),
        dtype: str = typer.Option("auto", help="Type of the weights."),
        simulate: bool = typer.Option(False, help="Work out a restore pipelined by layer instead of running it."),
        disk: str = typer.Option("", help="Disk speed for --simulate, such as 3GB (a second); measured when empty."),
        pcie: str = typer.Option("", help="Speed to the device for --simulate, such as 25GB; empty for none."),
        as_json: _common.JsonOption = False,
    ) -> None:
        """Measure the time to the first token: cold, and from each tier.

        Uses a store of its own, which is removed afterwards.
        """
        from kvembed import KVStore
        from kvembed._cli._sample import plain_generate, reference_text
        from kvembed._paths import cache_dir, make_private_dir

        try:
            folder = Path(tempfile.mkdtemp(prefix="bench-", dir=make_private_dir(cache_dir())))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {cache_dir()}: {error}; set KVEMBED_CACHE_DIR to another folder"
            ) from error
        steps = Steps(quiet=as_json and not sys.stderr.isatty())
        try:
            measures: list[Measure] = []
            with (
                KVStore(folder) as store,
                _common.load_model(model, store, steps, dtype=dtype, progress=False) as cached,
            ):
                if cached.support is not None:
                    raise UnsupportedModelError(f"kvembed cannot cache {model}: {cached.support}")
                text = reference_text()[: (tokens + (suffix + 8) * 8) * rounds * 9]
                ids = cached.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if simulate:
                    return print_simulation(
                        cached,
                        ids[: tokens + 3 * suffix],
                        suffix,
                        folder,
                        disk_rate=parse_bytes(disk, name="--disk") if disk else None,
                        pcie_rate=parse_bytes(pcie, name="--pcie") if pcie else None,
                        as_json=as_json,
                    )
                need = tokens + suffix * len(_CASES)
                if len(ids) < need * rounds:
                    raise ConfigError(f"the sample text has {len(ids):,} tokens: lower --tokens or --rounds")
                # Whoever comes first would pay for torch's own first-call work.
                plain_generate(cached, ids[:16], 2)
                for number in range(rounds):
                    # Each round has a text of its own, or only the first one would be cold.
                    part = ids[number * need : (number + 1) * need]
                    suffixes = [part[tokens + i * suffix :][:suffix] for i in range(len(_CASES))]
                    with steps.step(f"Round {number + 1} of {rounds}"):
                        measures += measure_round(cached, part[:tokens], suffixes, new_tokens, folder, plain)
                facts = {
                    "model": model,
                    "dtype": str(cached.hf_model.dtype).removeprefix("torch."),
                    "device": str(cached.hf_model.device),
                    "tokens": tokens,
                    "suffix": suffix,
                    "rounds": rounds,
                }
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows = summarise(measures)
        if as_json:
            _common.print_json({**facts, "rows": rows, "measures": [asdict(m) for m in measures]})
            return
        cells = [
            (
                row["case"],
                format_count(row["cached_tokens"]),
                format_count(row["computed_tokens"]),
                format_seconds(row["ttft_s"]),
                f"{row['times_faster']:.1f}",
                f"{row['decode_tokens_per_second']:.1f}" if row["decode_tokens_per_second"] else "",
            )
            for row in rows
        ]
        headers = ("case", ">cached", ">computed", ">TTFT", ">times faster than cold", ">decode tok/s")
        out = _common.console()
        out.print(_common.table(headers, cells))
        out.print(
            f"{facts['model']} in {facts['dtype']} on {facts['device']}; medians of {rounds} rounds", markup=False
        )
