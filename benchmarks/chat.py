"""Twenty turns of a chat: time to the first token of each, with the cache and without, and a restart half-way.

Turns 1 to 10 run in one process, 11 to 20 in another, which reopens the session by its name. Each turn is then
repeated with plain transformers over the same ids: reply and time. The clock starts when the text is sent (for plain
transformers when it gets the ids, without the template) and stops at the first token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from kvembed import CachedModel, KVStore, SessionDB

if TYPE_CHECKING:
    import argparse

TURNS, NEW = 20, 32
SYSTEM = "You are a guide to the Python language. Answer briefly."
WORDS = ("lambda", "assert", "with", "yield", "global", "nonlocal", "del", "import", "raise", "while")


class FirstToken(BaseStreamer):
    """Notes when the first new token comes; what comes before it is the prompt."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def text(turn: int) -> str:
    word = WORDS[turn % len(WORDS)]
    return f"In a module I maintain there is a line that begins with {word!r}: what is it for? (question {turn + 1})"


def talk(args: argparse.Namespace, folder: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Turns ``first`` to ``last`` of the session in this folder; a row each."""
    model, tokenizer = common.load(args.model)
    rows = []
    with KVStore(folder / "store") as store, CachedModel(model, tokenizer, store=store, progress=False) as cached:
        db = SessionDB(folder / "sessions.db")
        session = cached.session("chat", system=SYSTEM, db=db)
        for turn in range(first, last):
            clock, began = FirstToken(), time.perf_counter()
            reply = session.send(text(turn), max_new_tokens=NEW, streamer=clock)
            seconds = clock.at - began
            ids = torch.from_numpy(reply.prompt_ids.astype(np.int64))[None]
            plain, began = FirstToken(), time.perf_counter()
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, streamer=plain
            )
            tiers = {tier: count for tier, count in reply.usage.cached_tokens_by_tier.items() if count}
            rows.append(
                {
                    "turn": turn + 1,
                    "process": "first" if first == 0 else "second",
                    "prompt": reply.usage.prompt_tokens,
                    "cached": " + ".join(f"{tier} {count}" for tier, count in tiers.items()) or "none",
                    "computed": reply.usage.computed_tokens,
                    "TTFT ms": 1e3 * seconds,
                    "plain TTFT ms": 1e3 * (plain.at - began),
                    "same reply": whole[0, ids.shape[1] :].tolist() == reply.token_ids.tolist(),
                }
            )
        db.close()
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for first in (0, TURNS // 2):
            command = [sys.executable, __file__, "--model", args.model, "--child", json.dumps([folder, first])]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows += json.loads(output.splitlines()[-1])
    return rows


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=3)
    if args.child:
        folder, first = json.loads(args.child)
        print(json.dumps(talk(args, Path(folder), first, first + TURNS // 2)))
        return
    rounds = [run(args) for _ in range(args.rounds)]
    rows = rounds[0]
    for number, row in enumerate(rows):
        same = [each[number] for each in rounds]
        row["TTFT ms"] = common.median([each["TTFT ms"] for each in same])
        row["plain TTFT ms"] = common.median([each["plain TTFT ms"] for each in same])
        row["same reply"] = all(each["same reply"] for each in same)
    last, second = [common.median([each[at]["TTFT ms"] for each in rounds]) for at in (-1, 1)]
    plain = rows[-1]["plain TTFT ms"] / rows[1]["plain TTFT ms"]
    notes = [
        f"Medians of {args.rounds} rounds, {NEW} new tokens a turn.",
        f"TTFT of turn {TURNS} / turn 2: {last / second:.2f} with the cache, {plain:.2f} without.",
    ]
    common.report("chat", rows, notes)


if __name__ == "__main__":
    main()
