# %% [markdown]
# # 2. A long document, and a restart half-way
#
# Reading a long text is what takes time. Once read, its KV is on disk: a new process, or this kernel after a restart,
# answers without reading it again.

# %%
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from kvembed import CachedModel, KVStore, Usage, plots

print(f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# All of this notebook lies in one folder, which is emptied first. `KVEMBED_HOME` is where the names of documents are
# kept. You need none of these lines for your own documents.

# %%
folder = Path(tempfile.gettempdir()) / "kvembed-long-document"
shutil.rmtree(folder, ignore_errors=True)
os.environ["KVEMBED_HOME"] = str(folder / "home")

# %% [markdown]
# ## Before the restart
#
# A chapter of Python's own reference, with a name. A document with a name is in the library.

# %%
model = CachedModel.from_pretrained("smollm2", store=KVStore(folder / "store"), dtype="float32")
manual = model.document(topics["typesmapping"], name="mappings")
manual

# %%
question = "What does the method `setdefault` of a dictionary do? Answer in one sentence."
first = manual.ask(question, max_new_tokens=20)
first

# %% [markdown]
# Many questions at once share that one reading, and are answered together where that is faster.

# %%
questions = ["What does `popitem` do?", "What does `fromkeys` do?", "What does `len(d)` return?"]
answers = manual.ask_many(questions, max_new_tokens=12)
assert all(answer.usage.cached_tokens >= manual.tokens for answer in answers)
assert [answer.text for answer in answers] == [manual.ask(question, max_new_tokens=12).text for question in questions]
for answer in answers:
    print(f"{answer.question}  {answer.text!r}")

# %%
model.library

# %% [markdown]
# Everything learned is on disk soon after each call, and at the latest here.

# %%
model.close()
model.store.close()
del model, manual

# %% [markdown]
# ## The restart
#
# Restart the kernel here if you like; a new Python process is the same thing, and can be run as one more cell. It
# knows the folder and the document's name, nothing else.

# %%
tomorrow = """
import json, sys, time
from kvembed import CachedModel, KVStore

model = CachedModel.from_pretrained("smollm2", store=KVStore(sys.argv[1]), dtype="float32")
began = time.perf_counter()
manual = model.library.open("mappings")
answer = manual.ask(sys.argv[2], max_new_tokens=20)
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "text": answer.text,
    "ids": answer.token_ids.tolist(),
    "usage": answer.usage.to_dict(),
    "opened": manual.usage.to_dict(),
}))
model.close()
"""
command = [sys.executable, "-c", tomorrow, str(folder / "store"), question]
told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
print(told["text"])
print(f"opened and answered {told['seconds']:.2f} s after the model was loaded")

# %% [markdown]
# The same tokens, and not one token of the document was computed again:

# %%
derived = ("cached_tokens", "computed_tokens", "decode_tokens_per_second")
opened, again = (Usage(**{k: v for k, v in told[name].items() if k not in derived}) for name in ("opened", "usage"))
assert told["ids"] == first.token_ids.tolist()
assert opened.computed_tokens == 0
assert again.cached_tokens >= opened.prompt_tokens
again

# %%
plots.tokens([first.usage, opened, again], labels=["first question", "opened in a new process", "asked there"])

# %% [markdown]
# Reading took this long, against opening the document by its name in the new process:

# %%
print(f"read: {first.usage.saved_s:.1f} s by estimate; opened from disk: {opened.total_s:.2f} s")

# %%
shutil.rmtree(folder)
