# %% [markdown]
# # 4. Tiers, budgets, and what a call costs
#
# KV lies in tiers: `live` (the cache of a recent sequence, used as it is), `cpu` (blocks in memory), `disk` (files).
# Each has a budget. What does not fit is evicted, and is computed again when it is wanted.

# %%
import os
import platform
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from kvembed import CachedModel, KVStore, plots

print(f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")

# %%
folder = Path(tempfile.mkdtemp(prefix="kvembed-"))
store = KVStore(folder / "one")
model = CachedModel.from_pretrained("smollm2", store=store, dtype="float32")
size = model.kv_bytes_per_token
print(f"{size / 1024:.0f} KiB of KV a token, {size * model.block_size / 2**20:.1f} MiB a block")

# %% [markdown]
# ## One question from every tier

# %%
doc = model.document(topics["calls"], name="calls", prefill=False)  # nothing is computed yet
question = "What is a keyword argument?"
cold = doc.ask(question, max_new_tokens=12)
live = doc.ask(question, max_new_tokens=12)

model.drop_live()  # as many other documents would do
memory = doc.ask(question, max_new_tokens=12)

model.close()
store.close()  # writes what is left
store = KVStore(folder / "one", max_cpu_bytes=None)  # no tier in memory
model = CachedModel.from_pretrained("smollm2", store=store, dtype="float32")
disk = model.document(topics["calls"], name="calls", prefill=False).ask(question, max_new_tokens=12)

# %%
asked = {"cold": cold, "live": live, "cpu": memory, "disk": disk}
assert len({tuple(answer.token_ids) for answer in asked.values()}) == 1  # the same answer from everywhere
assert cold.usage.cached_tokens == 0
assert all(name == "cold" or answer.usage.cached_tokens_by_tier.get(name, 0) > 1400 for name, answer in asked.items())
plots.ttft([answer.usage for answer in asked.values()], labels=list(asked))

# %% [markdown]
# All that a call cost, and its prompt by tier (unfold the last line):

# %%
disk

# %% [markdown]
# ## Why was it computed?
#
# `lookup` says how much of a prompt is there, `explain` why not more. Neither computes anything.

# %%
changed = doc.prompt_ids(question).copy()
changed[700] += 1  # one other token in the middle
model.lookup(changed)

# %%
why = model.explain(changed)
assert why.position == 700
why

# %%
model.show_prompt(changed)

# %% [markdown]
# ## Budgets
#
# A store of 64 MiB holds two of these texts, not three. What is pinned stays; of the rest, what was used longest ago
# goes first.

# %%
model.close()
store.close()
small = KVStore(folder / "two", max_cpu_bytes=None, max_disk_bytes="64MiB")
model = CachedModel(model.hf_model, model.tokenizer, store=small, max_live=0)
texts = {name: topics[name][:2400] for name in ("function", "naming", "import")}
kept = model.document(texts["function"], name="function", pin=True)
others = [model.document(texts[name], name=name) for name in ("naming", "import")]
small.flush()
there = {doc.name: model.lookup(doc.prompt_ids("Why?")).num_tokens for doc in (kept, *others)}
there

# %%
assert there["function"] >= kept.tokens - 1  # pinned: all of it
assert sum(there.values()) < sum(doc.tokens for doc in (kept, *others))  # something had to go
assert small.stats().tiers[0].nbytes <= 64 * 2**20
small.stats().tiers

# %%
plots.growth(small)

# %% [markdown]
# Which budget would be right? The store logs which blocks each call used (not what they say), and replays that.

# %%
for _ in range(2):
    for doc in (kept, *others):
        doc.ask("Why?", max_new_tokens=2)
small.flush()
plots.hit_rates(small)

# %% [markdown]
# ## The bill

# %%
plots.tokens(model)

# %%
model.close()
small.close()
