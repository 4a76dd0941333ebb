"""What a text is called in the store: the keys of its blocks, and a name that says nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvembed._keys import block_key, chain_keys, snapshot_key
from kvembed._prompt import decoder
from kvembed._prompt_view import prompt_view

if TYPE_CHECKING:
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._prompt_view import PromptView
    from kvembed._usage import Usage

__all__ = ["digits_of", "keys_of", "view_of"]


def keys_of(model: CachedModel, ids: TokenIds) -> list[bytes]:
    """Return the keys of all blocks of a text that is stored, and of the one that holds its last tokens."""
    engine = model._engine
    size = engine.block_size
    keys = chain_keys(engine.root, ids, size)
    parent, rest = keys[-1] if keys else engine.root, ids[len(keys) * size :]
    name = block_key(parent, np.ascontiguousarray(rest)) if len(rest) else parent
    if engine.spec.has_state:
        return [*keys, name, snapshot_key(name)] if len(rest) else [*keys, snapshot_key(name)]
    # The last tokens may be the start of a longer block, of a conversation that went on from here.
    tail = model.store.find_tail(parent, rest)
    if tail is not None and tail[1] == len(rest):
        keys.append(tail[0].info.key)
    elif len(rest):
        keys.append(name)  # still on its way to the disk
    return keys


def digits_of(model: CachedModel, ids: TokenIds) -> str:
    """Return a name for a text that says nothing of it: a pinned name is written to the catalog."""
    return f"text-{chain_keys(model._engine.root, ids, len(ids))[0].hex()[:12]}"


def view_of(model: CachedModel, ids: TokenIds, usage: Usage) -> PromptView | None:
    """Return where each part of a prompt came from, with its text."""
    return prompt_view(ids, usage.spans, decoder(model.tokenizer))
