# %% [markdown]
# # 5. Measuring your own machine
#
# What you gain depends on your processor, your disk and the length of what you ask about. This notebook measures it
# with your model: change the name below.

# %%
import os
import platform
import tempfile
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics

import torch

from kvembed import CachedModel, KVStore, plots

print(f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")

# %%
name = "smollm2"
lengths = [256, 512, 1024, 2048]
folder = Path(tempfile.mkdtemp(prefix="kvembed-"))
model = CachedModel.from_pretrained(name, store=KVStore(folder / "one"), dtype="float32")
ids = model.tokenizer(topics["typesmapping"], return_tensors="pt", verbose=False)["input_ids"]
assert ids.shape[1] > max(lengths) + 32

# %% [markdown]
# ## Cold against warm, by length
#
# A *suffix* of 32 new tokens after a text of each length: with nothing stored, then with the text's cache live, then
# from disk. The whole prompt counts: looking up, reading, computing what is new, up to the first token.

# %%
number = count()


def first_token(length, model):
    """Seconds to the first token behind `length` tokens, with a suffix that was never asked before."""
    suffix = (ids[:, :32] + 1 + next(number)) % 1000 + 1000
    prompt = torch.cat([ids[:, :length], suffix], dim=1)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    return model.usage


first_token(64, model)  # the first call also warms up torch
cold, live, disk = [], [], []
for length in lengths:
    model.store.clear()
    model.drop_live()
    cold.append(first_token(length, model))
    live.append(first_token(length, model))
model.close()
model.store.close()

model = CachedModel(model.hf_model, model.tokenizer, store=KVStore(folder / "one", max_cpu_bytes=None), max_live=0)
for length in lengths:
    disk.append(first_token(length, model))

# %%
for length, *usages in zip(lengths, cold, live, disk, strict=True):
    times = [f"{kind} {usage.ttft_s:6.2f} s" for kind, usage in zip(("cold", "live", "disk"), usages, strict=True)]
    print(f"{length:5} tokens: {', '.join(times)}")
assert all(usage.cached_tokens < 64 for usage in cold)
assert all(usage.cached_tokens >= length for usage, length in zip(live, lengths, strict=True))
assert all(usage.cached_tokens_by_tier.get("disk", 0) >= length for usage, length in zip(disk, lengths, strict=True))

# %%
labels = [f"{length}, {kind}" for length in lengths for kind in ("cold", "live", "disk")]
plots.ttft([usage for three in zip(cold, live, disk, strict=True) for usage in three], labels=labels)

# %% [markdown]
# ## Speeds
#
# kvembed measures these as calls go by, and loads only what loads faster than it is computed.

# %%
rate = cold[-1].computed_tokens / cold[-1].prefill_s
read = disk[-1].cached_tokens * model.kv_bytes_per_token / max(disk[-1].restore_s, 1e-9)
print(f"computing: {rate:,.0f} tokens a second")
speed = read / model.kv_bytes_per_token
print(f"reading:   {speed:,.0f} tokens a second, {read / 1e9:.2f} GB (what a call waited for)")

# %% [markdown]
# ## Exact?
#
# With `deterministic=True` a warm call is the cold one bit for bit: tokens and logits.

# %%
exact = CachedModel(model.hf_model, model.tokenizer, store=KVStore(folder / "two"), deterministic=True)
prompt = ids[:, :800]
arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
runs = [exact.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments) for _ in range(2)]
assert [usage.cached_tokens for usage in exact.history] == [0, 768]
assert torch.equal(runs[0].sequences, runs[1].sequences)
assert torch.equal(torch.stack(runs[0].logits), torch.stack(runs[1].logits))
exact.usage

# %%
plots.tokens(exact, labels=["cold", "warm"])

# %%
for each in (exact, model):
    each.close()
    each.store.close()
