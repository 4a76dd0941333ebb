# %% [markdown]
# # 3. Conversations
#
# A session keeps a conversation by name: its words, the exact tokens that were computed, and (in the store) their KV.
# So each turn computes only what is new, also after going back, and also in another process.

# %%
import os
import platform
import tempfile
from pathlib import Path

import torch

from kvembed import CachedModel, KVStore, SessionDB, plots

print(f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")

# %%
folder = Path(tempfile.mkdtemp(prefix="kvembed-"))
model = CachedModel.from_pretrained("smollm2", store=KVStore(folder / "store"), dtype="float32")
db = SessionDB(folder / "sessions.db")  # leave it out: one file for all your sessions
chat = model.session("trip", system="You are a brief and friendly travel guide.", db=db)

# %% [markdown]
# ## Turn by turn

# %%
chat.send("I have one day in Lisbon. What should I see?", max_new_tokens=40)

# %%
second = chat.send("And where do I eat?", max_new_tokens=30)
second

# %%
assert second.usage.computed_tokens < 40  # of the first turn, one token at most
second.prompt

# %% [markdown]
# ## Exact history
#
# The prompt of each turn is the chat template's, built on the very tokens that were generated. Plain transformers,
# given these ids, says the same.

# %%
ids = torch.tensor(second.prompt_ids[None].astype("int64"))
with torch.no_grad():
    plain = model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
assert plain[0, ids.shape[1] :].tolist() == second.token_ids.tolist()

# %% [markdown]
# ## Forks between cells
#
# A fork goes on from here under another name. It shares all KV of what was said, so it costs its new words only. With
# the magic, every cell can be a fork, and be run again.

# %%
# %load_ext kvembed

# %% active="ipynb"
# %%ask chat --fork rainy --max-new-tokens 30
# What if it rains?

# %% active="ipynb"
# %%ask chat --fork children --max-new-tokens 30
# We have two small children.

# %%
assert [len(session.turns) for session in (chat, rainy, children)] == [2, 3, 3]
assert rainy.last.usage.cached_tokens >= len(second.prompt_ids)
chat

# %% [markdown]
# ## Going back
#
# An edited turn goes on from what stands before it. `undo` brings the old branch back, and its KV was never gone.

# %%
edited = chat.edit(1, "And where can I hear music?", max_new_tokens=20)
print(edited.text)
assert chat.undo()
assert chat.turns[1].user == "And where do I eat?"
looked = chat.preview("Thank you!")
looked

# %%
assert looked.prompt_tokens - looked.num_tokens < 30  # all that was said is there

# %% [markdown]
# ## In another process
#
# `model.session("trip")` opens it again by name: here with a second model object and empty memory.

# %%
chat.close()
model.close()
model.store.close()
later = CachedModel.from_pretrained("smollm2", store=KVStore(folder / "store"), dtype="float32")
chat = later.session("trip", db=db)
third = chat.send("Thank you! One last tip?", max_new_tokens=20)
assert third.usage.cached_tokens_by_tier.get("disk", 0) >= len(second.prompt_ids)
third

# %%
plots.tokens([second.usage, edited.usage, third.usage], labels=["second turn", "edited turn", "third, from disk"])

# %%
chat.close()
later.close()
later.store.close()
db.close()
