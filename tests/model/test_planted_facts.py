"""Many documents and conversations in one small store, in random order: each answer is a never-cached run's.

The store holds about half of the documents on disk and a quarter in memory, so most calls meet blocks that were
evicted in between, promoted, or replaced.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from kvembed import KVStore

from ._lab import Lab, cat, join, random_ids, run, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

DOCUMENTS, QUESTIONS = 12, 4
DOCUMENT_BYTES = 12 * 12 * 1024
"""KV of one document: 12 blocks of 16 tokens, 12 KiB each (3 or 4 layers, 2 heads, 16 wide, keys and values)."""


def disk_usage(folder: Path) -> int:
    """Return what `du` counts for a folder."""
    return sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))


def facts(seed: int) -> torch.Tensor:
    """Return a document; two thirds of them share their first blocks with another one."""
    rng = random.Random(seed)
    start = random_ids(40, seed=1000 + seed // 3)
    fact = f" The code of vault {seed} is {rng.randrange(10**6)}.".encode()
    return cat(start, random_ids(90, seed=seed), join(fact), random_ids(40, seed=500 + seed))


def question(number: int) -> torch.Tensor:
    return join(f"\nQ{number}: what is the code?".encode())


def test_documents_under_eviction(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    store = lab.store(max_cpu_bytes=3 * DOCUMENT_BYTES, max_disk_bytes=6 * DOCUMENT_BYTES)
    cached = lab.wrap(model, store, max_live=2)
    rng = random.Random(5)
    order = [(d, q) for d in range(DOCUMENTS) for q in range(QUESTIONS)]
    rng.shuffle(order)
    tiers: Counter[str] = Counter()
    computed = 0
    for d, q in order:
        prompt = cat(facts(d), question(q))
        cached.deterministic = rng.random() < 0.3
        assert tokens(run(cached, prompt, 4)) == tokens(plain(model, prompt, 4)), f"document {d}, question {q}"
        tiers.update(cached.usage.cached_tokens_by_tier)
        computed += cached.usage.computed_tokens
    assert store.flush(30)
    # Pressure there was: what was reused came from everywhere, and much had to be computed again.
    assert set(tiers) >= {"cpu", "disk"}
    assert computed > DOCUMENTS * facts(0).shape[1]
    assert disk_usage(lab.folder / "store" / "blocks") <= 6 * DOCUMENT_BYTES
    cpu, disk = store.stats().tiers
    assert cpu.nbytes <= cpu.max_bytes
    assert disk.nbytes <= disk.max_bytes
    assert disk.blocks < 12 * DOCUMENTS
    assert store.verify().problems == ()


def test_conversations_and_documents_together(lab: Lab, model: Any, plain: Callable[..., Any]) -> None:
    store = lab.store(max_cpu_bytes=3 * DOCUMENT_BYTES, max_disk_bytes=6 * DOCUMENT_BYTES)
    cached = lab.wrap(model, store, max_live=2)
    rng = random.Random(11)
    chats = [random_ids(30 + 5 * i, seed=300 + i) for i in range(4)]
    for step in range(30):
        if rng.random() < 0.5:
            which = rng.randrange(len(chats))
            reply = run(cached, chats[which], 7)
            assert tokens(reply) == tokens(plain(model, chats[which], 7)), f"step {step}, chat {which}"
            chats[which] = cat(reply, random_ids(rng.randint(1, 12), seed=step))
            if chats[which].shape[1] > 250:
                chats[which] = chats[which][:, :40]  # the user goes back to an early turn
        else:
            prompt = cat(facts(rng.randrange(DOCUMENTS)), question(rng.randrange(QUESTIONS)))
            assert tokens(run(cached, prompt, 7)) == tokens(plain(model, prompt, 7)), f"step {step}"
        if rng.random() < 0.2:  # the notebook is restarted
            cached.close()
            store.close()
            store = lab.store(max_cpu_bytes=3 * DOCUMENT_BYTES, max_disk_bytes=6 * DOCUMENT_BYTES)
            cached = lab.wrap(model, store, max_live=2)
    assert store.flush(30)
    assert disk_usage(lab.folder / "store" / "blocks") <= 6 * DOCUMENT_BYTES


def test_named_documents_that_are_asked_in_turn(
    lab: Lab, llama: Any, plain: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    store = lab.store(max_cpu_bytes=6 * DOCUMENT_BYTES, max_disk_bytes=12 * DOCUMENT_BYTES)
    cached = lab.wrap(llama, store, tokenizer=tiny_tokenizer)
    texts = {f"vault {i}": f"Vault {i} opens with {7919 * i % 10007}. " * 5 for i in range(6)}
    documents = {name: cached.document(text, name=name, pin=name == "vault 2") for name, text in texts.items()}
    for number in range(3):
        for name, document in documents.items():
            answer = document.ask(f"Question {number}?", max_new_tokens=6)
            prompt = torch.from_numpy(answer.prompt_ids).long()[None]
            assert answer.token_ids.tolist() == tokens(plain(llama, prompt, 6))[prompt.shape[1] :], name
    for seed in range(12):
        run(cached, random_ids(180, seed=seed), 2)
    lab.leave_only(cached, "disk")
    # The pinned one outlived the rest, but for a last piece of fewer than 8 tokens.
    pinned = documents["vault 2"]
    assert cached.lookup(pinned.prompt_ids("?")).num_tokens >= pinned.tokens - 8
    assert cached.lookup(documents["vault 0"].prompt_ids("?")).num_tokens < documents["vault 0"].tokens - 8
    assert store.forget("vault 2") > 0
    assert cached.lookup(pinned.prompt_ids("?")).num_tokens < 2 * 16


def test_a_store_shared_by_two_processes_worth_of_stores(lab: Lab, llama: Any, plain: Callable[..., Any]) -> None:
    # Two stores on one folder, each evicting what the other has just found.
    budgets: dict[str, Any] = {"max_cpu_bytes": 2 * DOCUMENT_BYTES, "max_disk_bytes": 3 * DOCUMENT_BYTES}
    stores: list[KVStore] = [lab.store(**budgets), lab.store(**budgets)]
    wrapped = [lab.wrap(llama, store, max_live=0) for store in stores]
    rng = random.Random(3)
    for step in range(30):
        prompt = cat(facts(rng.randrange(8)), question(rng.randrange(2)))
        target = wrapped[rng.randrange(2)]
        assert tokens(run(target, prompt, 4)) == tokens(plain(llama, prompt, 4)), f"step {step}"
    for store in stores:
        store.flush()
    assert disk_usage(lab.folder / "store" / "blocks") <= 3 * DOCUMENT_BYTES
