"""Every exception and warning kvembed raises.

::

    KVEmbedError
      ConfigError              a budget, path or option that cannot work (also a ValueError)
      PromptError              an empty prompt, or one longer than the model's context (also a ValueError)
        ContextFullError       a conversation that does not fit any more; says what leaving out turns would cost
      ModelNotFoundError       no such alias, folder, file or hub id (also a LookupError)
      UnsupportedModelError    an explicit verb on a model whose KV cannot be kept exactly
      StoreError
        StoreClosedError       the store was closed
        StoreReadOnlyError     the folder cannot be written
        StoreKeyError          an encrypted store (or exported file) without its key, or a key for one that is not
        BlockFormatError       a block file that is corrupt, truncated, foreign or of another version
          EncryptedBlockError  an encrypted one, where no key was given
        StoreFormatError       a whole store, or an exported file, of another format version
        ModelMismatchError     an exported file of another model; says what differs
    KVEmbedWarning             (also a UserWarning)
      CacheBypassWarning       a call was handed to transformers untouched; says why
      StoreWarning             something in the store went wrong; the call went on without it

``generate()`` raises none of these unless plain transformers would raise too: there a cache problem
is a miss and one warning. The explicit verbs (``document``, ``stream``, ``KVStore.verify`` ...) do raise.
"""

from __future__ import annotations

__all__ = [
    "BlockFormatError",
    "CacheBypassWarning",
    "ConfigError",
    "ContextFullError",
    "EncryptedBlockError",
    "KVEmbedError",
    "KVEmbedWarning",
    "ModelMismatchError",
    "ModelNotFoundError",
    "PromptError",
    "StoreClosedError",
    "StoreError",
    "StoreFormatError",
    "StoreKeyError",
    "StoreReadOnlyError",
    "StoreWarning",
    "UnsupportedModelError",
]


class KVEmbedError(Exception):
    """Base class of every error raised by kvembed."""


class ConfigError(KVEmbedError, ValueError):
    """An option, budget or path that cannot work; the message names what to change."""


class PromptError(KVEmbedError, ValueError):
    """A prompt that cannot be run: empty, or longer than the model's context."""


class ContextFullError(PromptError):
    """A conversation that does not fit the context any more, though it would without its oldest turns.

    Args:
        tokens: Of the whole prompt.
        new_tokens: That are to be generated.
        limit: The model's context.
        dropped_turns: So many of the oldest turns have to be left out.
        again_tokens: So many tokens are then computed again, once.
    """

    def __init__(self, tokens: int, new_tokens: int, limit: int, dropped_turns: int, again_tokens: int) -> None:
        super().__init__(tokens, new_tokens, limit, dropped_turns, again_tokens)
        self.tokens = tokens
        self.new_tokens = new_tokens
        self.limit = limit
        self.dropped_turns = dropped_turns
        self.again_tokens = again_tokens

    def __str__(self) -> str:
        """Say what can be done."""
        return (
            f"the conversation has {self.tokens:,} tokens and {self.new_tokens:,} more are to be generated, but the "
            f'context is {self.limit:,}: allow fewer tokens, delete turns, or open it with when_full="drop", which '
            f"leaves out the {self.dropped_turns} oldest turns and computes {self.again_tokens:,} tokens again, once"
        )


class ModelNotFoundError(KVEmbedError, LookupError):
    """A model name that is neither an alias, a folder, a GGUF file nor a hub id that can be reached."""


class UnsupportedModelError(KVEmbedError):
    """The KV cache of this model cannot be stored and restored exactly."""


class StoreError(KVEmbedError):
    """Base class of errors that concern the block store."""


class StoreClosedError(StoreError):
    """The store has been closed; open a new one."""


class StoreReadOnlyError(StoreError):
    """The store's folder cannot be written."""


class BlockFormatError(StoreError):
    """A block file that must not be used: corrupt, truncated, foreign or of another format version."""


class EncryptedBlockError(BlockFormatError):
    """A block file that is encrypted, in a store that was opened without a key: nothing is wrong with it."""


class StoreKeyError(StoreError):
    """The key is missing or wrong, or the store is not encrypted; the message says what to do."""


class StoreFormatError(StoreError):
    """The store on disk was written in a format this version cannot read."""


class ModelMismatchError(StoreError):
    """An exported file was made by another model than the one it is to be used with.

    Args:
        differences: Fields of the fingerprint that differ: what the file says, and what the model here says.
    """

    def __init__(self, differences: dict[str, tuple[str, str]]) -> None:
        super().__init__(differences)
        self.differences = differences

    def __str__(self) -> str:
        """Say which fields differ, each value at most 60 characters long."""
        rows = [
            f"{name} is {_short(there)} there, {_short(here)} here" for name, (there, here) in self.differences.items()
        ]
        what = "; ".join(rows) if rows else "no model here is known by its fields"
        return f"the file was made by another model, whose KV must not be used: {what}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class KVEmbedWarning(UserWarning):
    """Base class of every warning issued by kvembed."""


class CacheBypassWarning(KVEmbedWarning):
    """A call went to transformers untouched; ``usage.bypass_reason`` says why."""


class StoreWarning(KVEmbedWarning):
    """Something in the store went wrong; generation went on without it."""
