"""``kvembed demo``: a real model, a real document, and where every token came from."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvembed._cli import _common
from kvembed._cli._steps import Steps
from kvembed._errors import ConfigError, KVEmbedError, UnsupportedModelError
from kvembed._units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvembed._cli._sample import Plain
    from kvembed._model import CachedModel
    from kvembed._store import KVStore

__all__ = ["Plan", "Row", "judge", "register", "run_demo"]

_CHILD_SECONDS = 900


@dataclass(frozen=True)
class Plan:
    """What the demo does.

    Args:
        model: Name of the model.
        tokens: Tokens of the document, at most.
        questions: At least two; the last one is asked in a new process.
        max_new_tokens: Length of an answer, at most.
        dtype: Type of the weights.
        store: Folder of the demo's own store.
    """

    model: str
    tokens: int
    questions: tuple[str, ...]
    max_new_tokens: int
    dtype: str
    store: Path


@dataclass(frozen=True)
class Row:
    """One question.

    Args:
        question: What was asked.
        process: ``"this"`` or ``"new"``.
        expected: Where the document's KV should have come from: ``"cold"`` (nowhere), ``"live"``, ``"cpu"``,
            ``"disk"``, or ``"any"`` of them.
        prompt_tokens: Tokens of the prompt.
        cached_tokens_by_tier: Where they came from.
        computed_tokens: How many had to be computed.
        ttft_s: Seconds to the first token.
        plain_ttft_s: The same for plain transformers.
        times_faster: The second over the first.
        same_text: True when both gave the same token ids.
        problem: What went wrong, or None.
        answer: The answer.
    """

    question: str
    process: str
    expected: str
    prompt_tokens: int
    cached_tokens_by_tier: dict[str, int]
    computed_tokens: int
    ttft_s: float
    plain_ttft_s: float
    times_faster: float
    same_text: bool
    problem: str | None
    answer: str


def judge(expected: str, usage: dict[str, Any], document_tokens: int, block_size: int, same_text: bool) -> str | None:
    """Return what is wrong with one answer, or None.

    Args:
        expected: Tier the document should have come from, ``"any"``, or ``"cold"``.
        usage: ``Usage.to_dict()`` of the answer.
        document_tokens: Tokens of the prompt before the question.
        block_size: Tokens of a block: reuse of that granularity is enough.
        same_text: Whether plain transformers gave the same tokens.
    """
    if not same_text:
        return "the text differs from plain transformers"
    if usage["bypass_reason"]:
        return f"not cached: {usage['bypass_reason']}"
    if expected == "cold":
        return None
    tiers, needed = usage["cached_tokens_by_tier"], max(1, document_tokens // block_size * block_size)
    if usage["cached_tokens"] < needed:
        why = f" ({usage['miss_reason']})" if usage["miss_reason"] else ""
        return f"only {usage['cached_tokens']:,} of {needed:,} document tokens were reused{why}"
    if expected != "any" and expected not in tiers:
        return f"expected the {expected} tier, but tokens came from {', '.join(tiers)}"
    return None


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def demo(
        model: str = typer.Option("smollm2", help="Alias, hub id, folder or GGUF file."),
        tokens: int = typer.Option(4000, min=64, help="Tokens of the document."),
        questions: int = typer.Option(4, min=2, max=6, help="How many questions; the last in a new process."),
        max_new_tokens: int = typer.Option(32, min=1, help="Length of an answer."),
        dtype: str = typer.Option(
            "float32", help="Type of the weights. In float32 texts can be compared exactly; shorter types may round."
        ),
        keep: bool = typer.Option(False, "--keep", help="Keep the demo's store and say where it is."),
        as_json: _common.JsonOption = False,
        child: bool = typer.Option(False, "--child", hidden=True),
    ) -> None:
        """Ask a real model about a long document: cold, warm, and from disk in a new process.

        Every answer is compared with that of plain transformers. Ends with status 1 when a text differs, or when
        nothing was reused where something should have been.
        """
        if child:
            _child()
            return
        from kvembed._cli._sample import QUESTIONS
        from kvembed._paths import cache_dir, make_private_dir

        # A store of its own: in the user's the first question might not be cold.
        try:
            folder = Path(tempfile.mkdtemp(prefix="demo-", dir=make_private_dir(cache_dir())))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {cache_dir()}: {error}; set KVEMBED_CACHE_DIR to another folder"
            ) from error
        try:
            plan = Plan(model, tokens, QUESTIONS[:questions], max_new_tokens, dtype, folder / "store")
            rows, facts = run_demo(plan, Steps(quiet=as_json and not sys.stderr.isatty()))
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        failed = [row for row in rows if row.problem]
        if as_json:
            _common.print_json({"ok": not failed, **facts, "rows": [asdict(row) for row in rows]})
        else:
            _show(rows, facts, plan, keep)
        if failed:
            raise typer.Exit(1)


def run_demo(plan: Plan, steps: Steps) -> tuple[list[Row], dict[str, Any]]:
    """Run the demo.

    Returns:
        A row for every answer, and figures about the whole.

    Raises:
        KVEmbedError: The model cannot be loaded or is not supported, or the new process failed.
    """
    from kvembed import KVStore
    from kvembed._cli._sample import plain_generate, reference_text, trim_to_tokens

    began = time.perf_counter()
    rows: list[Row] = []
    plain: dict[str, Plain] = {}
    *here, there = plan.questions
    with KVStore(plan.store) as store:
        model, load_s = _load(plan, store, steps)
        with model:
            text = trim_to_tokens(model.tokenizer, reference_text(), plan.tokens)
            document = model.document(text, name="Python language reference", prefill=False)
            # Whoever comes first would pay for torch's own first-call work.
            plain_generate(model, document.prefix_ids[:16].tolist(), 2)
            for number, question in enumerate(here, start=1):
                with steps.step(f"{number}. {question} Plain transformers"):
                    plain[question] = plain_generate(model, document.prompt_ids(question).tolist(), plan.max_new_tokens)
                expected = "cold" if number == 1 else "live"
                if number == len(here) and number > 2:
                    expected = "cpu"
                    model.drop_live()
                with steps.step(f"{number}. {question} kvembed ({expected})") as model.progress:
                    answer = document.ask(question, max_new_tokens=plan.max_new_tokens)
                data = {**answer.usage.to_dict(), "token_ids": answer.token_ids.tolist(), "text": answer.text}
                rows.append(_row(question, "this", expected, data, plain[question], document.tokens, model.block_size))
            number = len(plan.questions)
            with steps.step(f"{number}. {there} Plain transformers"):
                plain[there] = plain_generate(model, document.prompt_ids(there).tolist(), plan.max_new_tokens)
            document_tokens, block_size = document.tokens, model.block_size
            facts: dict[str, Any] = {
                "model": plan.model,
                "dtype": str(model.hf_model.dtype).removeprefix("torch."),
                "device": str(model.hf_model.device),
                "document_tokens": document_tokens,
                "load_s": load_s,
            }
    # The first process gives its weights back before the second loads them: small machines have room for one.
    del model, document
    facts["store_bytes"] = sum(f.stat().st_size for f in plan.store.rglob("*") if f.is_file())
    # The new question first, all of it from disk; then the one the first process answered cold.
    asked = [there, here[0]]
    with steps.step(f"{number}. {there} kvembed (new process)"):
        result = _in_new_process(plan, text, asked)
    for question, expected, data in zip(asked, ("disk", "any"), result["answers"], strict=True):
        rows.append(_row(question, "new", expected, data, plain[question], document_tokens, block_size))
    facts |= {"new_process_load_s": result["load_s"], "total_s": time.perf_counter() - began}
    return rows, facts


def _load(plan: Plan, store: KVStore, steps: Steps) -> tuple[CachedModel, float]:
    began = time.perf_counter()
    model = _common.load_model(plan.model, store, steps, dtype=plan.dtype, progress=False)
    if model.support is not None:
        raise UnsupportedModelError(f"kvembed cannot cache {plan.model}: {model.support}")
    return model, time.perf_counter() - began


def _row(
    question: str,
    process: str,
    expected: str,
    data: dict[str, Any],
    plain: Plain,
    document_tokens: int,
    block_size: int,
) -> Row:
    same = list(data["token_ids"]) == plain.token_ids
    return Row(
        question=question,
        process=process,
        expected=expected,
        prompt_tokens=data["prompt_tokens"],
        cached_tokens_by_tier=data["cached_tokens_by_tier"],
        computed_tokens=data["computed_tokens"],
        ttft_s=data["ttft_s"],
        plain_ttft_s=plain.ttft_s,
        times_faster=plain.ttft_s / max(data["ttft_s"], 1e-9),
        same_text=same,
        problem=judge(expected, data, document_tokens, block_size, same),
        answer=data["text"],
    )


def _in_new_process(plan: Plan, text: str, questions: Sequence[str]) -> dict[str, Any]:
    order = {**asdict(plan), "store": str(plan.store), "questions": list(questions), "text": text}
    command = [sys.executable, "-m", "kvembed", "demo", "--child"]
    try:
        done = subprocess.run(
            command, input=json.dumps(order).encode(), capture_output=True, timeout=_CHILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KVEmbedError(f"the new process did not answer within {_CHILD_SECONDS} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise KVEmbedError(f"the new process ended with status {done.returncode}: {' '.join(lines[-3:])}")
    return json.loads(done.stdout)


def _child() -> None:
    order = json.loads(sys.stdin.buffer.read())
    text = order.pop("text")
    plan = Plan(**{**order, "questions": tuple(order["questions"]), "store": Path(order["store"])})
    # Libraries that print must not get into the result.
    with contextlib.redirect_stdout(sys.stderr):
        from kvembed import KVStore

        answers: list[dict[str, Any]] = []
        with KVStore(plan.store) as store:
            model, load_s = _load(plan, store, Steps(quiet=True))
            with model:
                document = model.document(text, name="Python language reference", prefill=False)
                for question in plan.questions:
                    answer = document.ask(question, max_new_tokens=plan.max_new_tokens)
                    data = {"token_ids": answer.token_ids.tolist(), "text": answer.text}
                    answers.append({**answer.usage.to_dict(), **data})
    typer.echo(json.dumps({"load_s": load_s, "answers": answers}))


def _show(rows: list[Row], facts: dict[str, Any], plan: Plan, keep: bool) -> None:
    out = _common.console()
    out.print()
    for row in rows:
        out.print(f"? {row.question}", style="bold", markup=False)
        out.print(f"  {' '.join(row.answer.split())}", markup=False)
    cells: list[tuple[object, ...]] = []
    for number, row in enumerate(rows):
        again = any(row.question == earlier.question for earlier in rows[:number])
        tiers = " + ".join(f"{name} {format_count(n)}" for name, n in row.cached_tokens_by_tier.items()) or "none"
        cells.append(
            (
                f"{row.question}{' (asked again)' if again else ''}",
                row.process,
                tiers,
                format_count(row.computed_tokens),
                format_seconds(row.ttft_s),
                format_seconds(row.plain_ttft_s),
                f"{row.times_faster:.1f}",
                "yes" if row.same_text else "NO",
            )
        )
    headers = (
        "question",
        "process",
        ">cached tokens",
        ">computed",
        ">TTFT",
        ">plain TTFT",
        ">times faster",
        "same text",
    )
    out.print(_common.table(headers, cells))
    out.print(
        f"{facts['document_tokens']:,} document tokens, {facts['model']} in {facts['dtype']} on {facts['device']}, "
        f"store {format_bytes(facts['store_bytes'])}. Loading the model took {format_seconds(facts['load_s'])}, in the "
        f"new process {format_seconds(facts['new_process_load_s'])}; the whole demo {format_seconds(facts['total_s'])}."
    )
    if keep:
        out.print(f"Store kept: {plan.store}", markup=False)
    for row in rows:
        if row.problem:
            _common.complain(f"{row.question} ({row.process} process): {row.problem}")
