# %% [markdown]
# # 1. Quickstart
#
# `model.generate()` of transformers throws its KV cache away after every call. kvembed keeps it. Here a small model on
# the CPU reads a text once and answers questions about it; each further question computes its own words only.
#
# ```
# pip install 'kvembed[notebook]'
# ```
#
# Run it from top to bottom. The model (135 million parameters) is downloaded once.

# %%
import os
import platform
import tempfile
from pydoc_data.topics import topics

import torch

from kvembed import CachedModel, KVStore, plots

print(f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# Everything is kept in a new folder, so that this notebook always starts from nothing. Leave `store=` out and it is
# your user's cache folder, shared by all your notebooks, scripts and chats. `dtype="float32"` is for the comparison
# at the end.

# %%
folder = tempfile.mkdtemp(prefix="kvembed-")
model = CachedModel.from_pretrained("smollm2", store=KVStore(folder), dtype="float32")

# %% [markdown]
# ## A document
#
# Any text will do; this one comes with Python. It is computed now, once.

# %%
report = model.document(topics["execmodel"], name="execution model")
report

# %% [markdown]
# ## Questions
#
# The bar shows where the prompt's tokens came from, and the line under it unfolds to the prompt itself.

# %%
answer = report.ask("What is a code block? Answer in one sentence.", max_new_tokens=24)
answer

# %%
assert answer.usage.cached_tokens == report.tokens  # only the question was computed
print(f"first word after {answer.usage.ttft_s:.2f} s; reading the document took {report.usage.total_s:.1f} s")

# %% [markdown]
# The same as a cell of its own, written as it comes:

# %%
# %load_ext kvembed

# %% active="ipynb"
# %%ask report --max-new-tokens 24 --var second
# What happens when a name is not found?

# %% [markdown]
# ## Nothing but speed changes
#
# Plain transformers, from the same token ids, gives the same tokens. It reads everything again.

# %%
ids = torch.tensor(answer.prompt_ids[None].astype("int64"))
with torch.no_grad():
    plain = model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
assert plain[0, ids.shape[1] :].tolist() == answer.token_ids.tolist()

# %% [markdown]
# ## What it cost

# %%
plots.ttft(model)

# %%
plots.tokens(model, labels=["reading", "first question", "second question"])

# %%
# %kv history

# %%
model.close()
model.store.close()
