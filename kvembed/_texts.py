"""A model's stored texts as people name them: a document, session, text, messages or ids to forget or to export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvembed._document import Document
from kvembed._errors import ConfigError, PromptError
from kvembed._forget import Eraser, ForgetReport
from kvembed._live import common_prefix
from kvembed._prompt import encode, split_chat, tokenize
from kvembed._sessions import Session

if TYPE_CHECKING:
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel

__all__ = ["forget", "sequences_of"]

_MERGES = 16
"""A text of so many tokens and more is also found where its last token was merged with what follows it."""


def sequences_of(model: CachedModel, what: Any) -> list[TokenIds]:
    """Return the token ids with which sequences made from ``what`` begin: of a text, as a prompt and as a document.

    Raises:
        PromptError: It is empty, or none of the kinds a prompt can have.
    """
    if isinstance(what, Document):
        return [what.prefix_ids]
    if isinstance(what, Session):
        return what.streams()
    ids = encode(model.tokenizer, what)
    if not len(ids):
        raise PromptError("an empty text: name at least one token")
    if not isinstance(what, str):
        return [ids]
    before, _, has_special = split_chat(model.tokenizer, what, None)
    return [ids, tokenize(model.tokenizer, before, special=not has_special)]


def forget(model: CachedModel, what: Any) -> ForgetReport:
    """Erase a text of one model and salt; see `CachedModel.forget`."""
    if model.support is not None:
        raise ConfigError(f"nothing to forget: {model.support}")
    store, engine = model.store, model._engine
    texts = sequences_of(model, what)
    store._begin_change()
    if isinstance(what, Document) and what.name in store.pins():
        store.unpin(what.name)
    eraser = Eraser(store)
    for ids in texts:
        if isinstance(what, str) and len(ids) >= _MERGES:
            ids = ids[:-1]
        for live in engine.live.of_root(engine.root):
            if common_prefix(live.ids, ids) == min(len(live.ids), len(ids)):
                engine.live.take(live)
        eraser.text(engine.root, ids, engine.block_size)
    engine.release_memory()
    return eraser.report()
