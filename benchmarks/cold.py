"""A cold call, storing included, against plain ``model.generate()``: prompt and 64 tokens."""

from __future__ import annotations

import tempfile
from functools import partial

import common
import torch

from kvembed import CachedModel, KVStore


def main() -> None:
    args = common.arguments(__doc__ or "", rounds=5, lengths=(1024, 2048, 4096))
    model, tokenizer = common.load(args.model)
    ids = common.text_ids(tokenizer)
    rows = []
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    for length in args.lengths:
        prompt = common.prompt(ids, length)
        mask = torch.ones_like(prompt)
        ours, plain, same, stored = [], [], True, 0
        plain_call = partial(model.generate, prompt, attention_mask=mask, **options)
        for round_ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                store = KVStore(folder)
                cached = CachedModel(model, tokenizer, store=store, progress=False)
                cold_call = partial(cached.generate, prompt, attention_mask=mask, **options)
                # Which of the two goes first changes from round to round, so that drift hits both.
                if round_ % 2:
                    a, reference = common.timed(plain_call)
                    b, result = common.timed(cold_call)
                else:
                    b, result = common.timed(cold_call)
                    a, reference = common.timed(plain_call)
                assert cached.usage.cached_tokens == 0
                stored = cached.usage.stored_tokens
                cached.close()
                store.close()
            plain.append(a)
            ours.append(b)
            same = same and torch.equal(result, reference)
        rows.append(
            {
                "prompt tokens": length,
                "plain s": common.median(plain),
                "cold s": common.median(ours),
                "cold / plain": common.paired_ratio(ours, plain),
                "tokens stored": stored,
                "same tokens": same,
            }
        )
    common.report("cold", rows, ["Reach: at most 1.03 at 4,096 tokens."])


if __name__ == "__main__":
    main()
