"""A model's stored texts as people name them: a document, session, text, messages or ids to forget or to export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._documents.document import Document
from kvembed._errors import BlockFormatError, ConfigError, PromptError
from kvembed._forget import Eraser, ForgetReport
from kvembed._keys import block_key, chain_keys, common_prefix, snapshot_key
from kvembed._portable import export_blocks, refuse_other_models
from kvembed._prompt import encode, split_chat, tokenize
from kvembed._sessions.session import Session

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from kvembed._encryption.sources import Key
    from kvembed._keys import TokenIds
    from kvembed._model_view import ModelView
    from kvembed._portable import ExportReport, ImportReport
    from kvembed._store import KVStore

__all__ = ["export", "forget", "import_", "sequences_of"]

_MERGES = 16
"""A text of so many tokens and more is also found where its last token was merged with what follows it."""


def sequences_of(model: ModelView, what: Any) -> list[TokenIds]:
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


def forget(model: ModelView, what: Any) -> ForgetReport:
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
    report = eraser.report()
    # A document is named: another of the same text stays, and so does what goes on from it.
    name = what.name if isinstance(what, Document) else None
    for ids in texts if isinstance(what, str | Document) else ():
        report = model.library.forget_text(ids, name, report)
    return report


def export(model: ModelView, path: str | os.PathLike[str], what: Any, plain: bool) -> ExportReport:
    """Write the blocks of a text to a file; see `CachedModel.export`."""
    if model.support is not None:
        raise ConfigError(f"nothing to export: {model.support}")
    store, engine = model.store, model._engine
    store.flush()
    wanted: dict[bytes, int | None] = {}
    for ids in sequences_of(model, what):
        for key, cut in _stored(store, engine.root, ids, engine.block_size):
            wanted.setdefault(key, cut)
    if not wanted:
        raise ConfigError("nothing of this text is stored: prefill it first")
    return export_blocks(store, path, list(wanted.items()), plain=plain)


def _stored(store: KVStore, root: bytes, ids: TokenIds, size: int) -> Iterator[tuple[bytes, int | None]]:
    """Yield what is stored of a text, root side first, each block with its tokens if only some are the text's."""
    keys = chain_keys(root, ids, size)
    blocks = store.lookup(keys)
    for block in blocks:
        yield block.info.key, None
        yield from ((state.info.key, None) for state in store.known([snapshot_key(block.info.key)]) if state)
    parent = keys[len(blocks) - 1] if blocks else root
    rest = ids[len(blocks) * size :][:size]
    names = [block_key(parent, np.ascontiguousarray(rest[:n])) for n in range(len(rest), 0, -1)]
    whole = next((found for found in store.known(names) if found is not None), None)
    tail = store.find_tail(parent, rest)
    if whole is not None and (tail is None or whole.info.n_tokens >= tail[1]):
        yield whole.info.key, None
        yield from ((state.info.key, None) for state in store.known([snapshot_key(whole.info.key)]) if state)
    elif tail is not None:
        yield tail[0].info.key, tail[1]


def import_(model: ModelView, path: str | os.PathLike[str], pin: str | None, key: Key | None) -> ImportReport:
    """Take the blocks of a file in; see `CachedModel.import_`."""
    if model.support is not None:
        raise ConfigError(f"nothing can be imported: {model.support}")
    store, engine = model.store, model._engine
    ours = {engine.fingerprint.digest: dict(engine.fingerprint.fields)}

    def accept(theirs: Mapping[bytes, Mapping[str, Any]]) -> None:
        refuse_other_models(ours, theirs)
        if len(theirs) > 1:
            raise BlockFormatError("it holds blocks of several models; use KVStore.import_")

    return store._take_in(path, accept, engine.root, pin, key)
