"""`PrefixTree`: what a store holds, as a tree of prefixes for people; a run of blocks without a fork is one row.

The catalog is read with one query, and everything else is done in memory: a store of 100,000 blocks is a tree in some
tenths of a second. No text is looked at. Which session or document uses a row is found by hashing the token ids that
the session itself knows against the keys of the tree, so nothing of them needs to be in the catalog.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvembed._html import ordered_tiers
from kvembed._keys import block_key, snapshot_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvembed._block import BlockInfo
    from kvembed._catalog import Catalog
    from kvembed._keys import TokenIds

__all__ = ["build_tree", "KnownText", "LiveTokens", "PrefixRow", "PrefixTree"]

_COLUMNS = "key, parent, namespace, start, n_tokens, exact, nbytes, file_bytes, last_used, hits"
_PART = 4096


@dataclass(frozen=True)
class KnownText:
    """A text somebody knows the ids of: a session's stream, a document.

    Args:
        label: Who uses it, for people.
        ids: Its token ids, int32.
    """

    label: str
    ids: TokenIds


@dataclass(frozen=True)
class LiveTokens:
    """A cache that is still resident.

    Args:
        tier: ``"live"`` in host memory, ``"gpu"`` on a device.
        root: Root of its key chain.
        ids: The tokens it holds, int32.
        token_nbytes: Bytes of one.
    """

    tier: str
    root: bytes
    ids: TokenIds
    token_nbytes: int


@dataclass(frozen=True)
class PrefixRow:
    """A run of blocks without a fork, all pinned under the same names and used by the same sessions.

    Args:
        key: Key of its last block; the first digits name it.
        keys: All of its blocks, root side first, states left out.
        start: Position of its first token in the text.
        end: Position after its last token.
        nbytes: Bytes by the tier they lie in, fastest first; a block in memory and on disk counts in both.
        blocks: Number of blocks by tier, likewise.
        states: Snapshots of recurrent state that belong to its blocks.
        last_used: Unix time of the latest use, None when it was never on disk.
        hits: Times its blocks were read from disk.
        names: Names it is pinned under.
        users: Sessions whose conversation holds it.
        exact: All of it is bit for bit what a cold prefill makes.
        model: Name of the model that computed it.
        namespace: Fingerprint digest of that model.
        depth: 0 for the beginning of a text, 1 for what follows it ...
        parent: Index of the row before it in `PrefixTree.rows`, or None.
        reachable: False when blocks before it are gone, so that no prompt can use it.
    """

    key: bytes
    keys: tuple[bytes, ...] = field(repr=False)
    start: int
    end: int
    nbytes: dict[str, int]
    blocks: dict[str, int]
    states: int
    last_used: float | None
    hits: int
    names: tuple[str, ...]
    users: tuple[str, ...]
    exact: bool
    model: str
    namespace: bytes
    depth: int
    parent: int | None
    reachable: bool = True

    @property
    def id(self) -> str:
        """The key's first 12 hexadecimal digits."""
        return self.key.hex()[:12]

    @property
    def n_tokens(self) -> int:
        """Tokens of this row, without those before it."""
        return self.end - self.start

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.keys)

    @property
    def tier(self) -> str:
        """Fastest tier that has any of it."""
        return next(iter(self.nbytes), "")

    @property
    def model_name(self) -> str:
        """The model's name; of one that was loaded from a folder, the folder's own name."""
        path = Path(self.model)
        return path.name if path.is_absolute() else self.model

    @property
    def pinned(self) -> bool:
        """True when a name keeps it from eviction."""
        return bool(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single keys as plain JSON values."""
        known = asdict(self) | {"id": self.id, "n_tokens": self.n_tokens, "n_blocks": self.n_blocks, "tier": self.tier}
        return {**known, "key": self.key.hex(), "namespace": self.namespace.hex(), "keys": None} | {
            "names": list(self.names),
            "users": list(self.users),
        }


@dataclass(frozen=True)
class PrefixTree:
    """What a store holds.

    Args:
        rows: Every row after the one it follows; what was used last comes first among equals.
    """

    rows: tuple[PrefixRow, ...]

    def chain(self, row: PrefixRow) -> list[bytes]:
        """Return the keys from the beginning of the text to the end of a row, root side first."""
        parts = [row.keys]
        while row.parent is not None:
            row = self.rows[row.parent]
            parts.append(row.keys)
        return [key for keys in reversed(parts) for key in keys]

    def below(self, row: PrefixRow) -> list[PrefixRow]:
        """Return the rows that follow a row, directly or not."""
        at = self.rows.index(row) + 1
        found: list[PrefixRow] = []
        while at < len(self.rows) and self.rows[at].depth > row.depth:
            found.append(self.rows[at])
            at += 1
        return found

    def find(self, digits: str) -> list[PrefixRow]:
        """Return the rows whose last key begins with some hexadecimal digits."""
        return [row for row in self.rows if row.key.hex().startswith(digits.lower())]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain JSON values; ``parent`` is the id of the row before it."""
        return [
            {k: v for k, v in row.to_dict().items() if k != "keys"}
            | {"parent": None if row.parent is None else self.rows[row.parent].id}
            for row in self.rows
        ]


class _Blocks:
    """The blocks of a store as columns: rows of the catalog, and what only memory has.

    Columns and not `BlockInfo`: making 100,000 of those takes longer than all the rest.
    """

    def __init__(self, catalog: Catalog | None, in_memory: Sequence[BlockInfo]) -> None:
        columns: list[list[Any]] = [[] for _ in _COLUMNS.split(", ")]
        digests: dict[Any, bytes] = {}
        if catalog is not None:
            codec, spaces = catalog.codec, catalog.select("SELECT id, digest FROM namespaces")
            digests = {number: codec.original(bytes(name)) for number, name in spaces}
            with catalog.connection() as db:
                # In parts: the garbage collector would look at 100,000 tuples again and again.
                cursor = db.execute(f"SELECT {_COLUMNS} FROM blocks")
                while part := cursor.fetchmany(_PART):
                    for column, values in zip(columns, zip(*part, strict=True), strict=True):
                        column.extend(values)
            columns[:2] = (codec.originals(column) for column in columns[:2])
        self.memory = {info.key: info for info in in_memory}
        if self.memory:
            numbers = {digest: number for number, digest in digests.items()}
            for key in self.memory.keys() - set(columns[0]):
                info = self.memory[key]
                space = numbers.get(info.namespace, info.namespace)
                row = (key, info.parent, space, info.start, info.n_tokens, int(info.exact), info.nbytes, 0, None, 0)
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        self.keys, self.parents, self._spaces, start, tokens, exact, nbytes, file_bytes, used, hits = columns
        self._digests = digests
        self.start, self.tokens, self.nbytes = _ints(start), _ints(tokens), _ints(nbytes)
        self.file_bytes, self.hits, self.inexact = _ints(file_bytes), _ints(hits), 1 - _ints(exact)
        # Never used yet, as only memory has it: not a number.
        self.used = np.array(used, np.float64)
        self.on_disk = ~np.isnan(self.used)
        self.place = dict(zip(self.keys, range(len(self.keys)), strict=True))
        parent = _ints([self.place.get(key, -1) for key in self.parents])
        # A block's start is past its parent's. In a catalog that somebody has tampered with it need not be: then the
        # parent counts as gone, and no walk goes in circles.
        self.parent = np.where((parent >= 0) & (self.start[parent] < self.start), parent, -1) if len(parent) else parent
        self.is_state = np.zeros(len(self.keys), bool)
        for at in np.flatnonzero(self.tokens == 1).tolist():
            self.is_state[at] = self.keys[at] == snapshot_key(self.parents[at])
        self._children: defaultdict[bytes, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def namespace(self, at: int) -> bytes:
        """Return the digest of the model that computed a block."""
        space = self._spaces[at]
        return self._digests.get(space, space if isinstance(space, bytes) else bytes(32))

    def walk(self, root: bytes, ids: TokenIds) -> list[bytes]:
        """Return the keys of the blocks that hold nothing but the beginning of a text, whatever their sizes."""
        if self._children is None:
            self._children = defaultdict(list)
            for at, parent in enumerate(self.parents):
                self._children[parent].append(at)
        found: list[bytes] = []
        level = [(root, 0)]
        while level:
            parent, begin = level.pop()
            by_length: dict[int, bytes] = {}
            for at in self._children.get(parent, ()):
                end = begin + int(self.tokens[at])
                if end <= len(ids):
                    name = by_length.get(end)
                    if name is None:
                        name = by_length[end] = block_key(parent, np.ascontiguousarray(ids[begin:end]))
                    if name == self.keys[at]:
                        found.append(name)
                        level.append((name, end))
        return found

    def roots(self) -> list[bytes]:
        """Return the roots of all chains: of every model, under every salt."""
        return list(dict.fromkeys(self.parents[at] for at in np.flatnonzero(self.start == 0).tolist()))

    def by_tier(self, resident: Mapping[bytes, Mapping[str, int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return, by tier, the bytes of every block with its state, and 1 where the block itself is there.

        Args:
            resident: Bytes of a token by tier, of blocks that are in a live cache.
        """
        sizes = {"disk": np.where(self.on_disk, self.file_bytes, 0)}
        held = {"disk": self.on_disk.astype(np.int64)}

        def add(tier: str, at: int, nbytes: int) -> None:
            if tier not in sizes:
                sizes[tier], held[tier] = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
            sizes[tier][at] = nbytes
            held[tier][at] = 1

        for key, info in self.memory.items():
            add("cpu", self.place[key], info.nbytes)
        for key, tiers in resident.items():
            at = self.place[key]
            for tier, token_nbytes in tiers.items():
                add(tier, at, token_nbytes * int(self.tokens[at]))
        for at in np.flatnonzero(self.is_state & (self.parent >= 0)).tolist():
            for tier in sizes:
                sizes[tier][self.parent[at]] += sizes[tier][at]
        return {tier: (sizes[tier], held[tier]) for tier in ordered_tiers(dict.fromkeys(sizes, 1))}


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


def build_tree(
    catalog: Catalog | None,
    in_memory: Sequence[BlockInfo],
    pins: Mapping[str, Iterable[bytes]],
    models: Mapping[bytes, str],
    texts: Iterable[KnownText] = (),
    live: Iterable[LiveTokens] = (),
) -> PrefixTree:
    """Return the tree of a store.

    Args:
        catalog: Its catalog, or None for a store in memory only.
        in_memory: The blocks of the cpu tier.
        pins: Keys by the name they are pinned under.
        models: Names of models by their digest.
        texts: Texts whose blocks are to be labelled.
        live: Caches that are still resident.
    """
    blocks = _Blocks(catalog, in_memory)
    if not len(blocks):
        return PrefixTree(())
    names: defaultdict[bytes, set[str]] = defaultdict(set)
    users: defaultdict[bytes, set[str]] = defaultdict(set)
    resident: dict[bytes, dict[str, int]] = {}
    for name, keys in pins.items():
        for key in keys:
            names[key].add(name)
    roots = blocks.roots()
    for text in texts:
        for root in roots:
            for key in blocks.walk(root, text.ids):
                users[key].add(text.label)
    for held in live:
        for key in blocks.walk(held.root, held.ids):
            resident.setdefault(key, {})[held.tier] = held.token_nbytes
    return PrefixTree(_collapsed(blocks, names, users, resident, models))


def _first_of_run(blocks: _Blocks, names: Mapping[bytes, set[str]], users: Mapping[bytes, set[str]]) -> np.ndarray:
    """Return, for every block, the first block of its run."""
    parent = blocks.parent
    followers = np.bincount(parent[(parent >= 0) & ~blocks.is_state], minlength=len(blocks))
    # Where what is pinned or used by a session ends, a row ends too.
    marks = np.zeros(len(blocks), np.int64)
    numbers: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    for key in names.keys() | users.keys():
        if key in blocks.place:
            mark = frozenset(names.get(key, ())), frozenset(users.get(key, ()))
            marks[blocks.place[key]] = numbers.setdefault(mark, len(numbers) + 1)
    goes_on = (parent >= 0) & (followers[parent] == 1) & (marks[parent] == marks)
    first = np.where(goes_on, parent, np.arange(len(blocks)))
    while True:
        further = first[first]
        if np.array_equal(further, first):
            return first
        first = further


def _collapsed(
    blocks: _Blocks,
    names: Mapping[bytes, set[str]],
    users: Mapping[bytes, set[str]],
    resident: Mapping[bytes, Mapping[str, int]],
    models: Mapping[bytes, str],
) -> tuple[PrefixRow, ...]:
    """Return one row for each run, each after the one it follows."""
    first = _first_of_run(blocks, names, users)
    members = np.flatnonzero(~blocks.is_state)
    if not len(members):
        return ()
    order = members[np.lexsort((blocks.start[members], first[members]))]
    begins = np.flatnonzero(np.diff(first[order], prepend=-1))
    ends = np.append(begins[1:], len(order))
    heads, tails = order[begins], order[ends - 1]

    def summed(values: np.ndarray) -> list[int]:
        return np.add.reduceat(values[order], begins).tolist()

    tiers = [(tier, summed(size), summed(held)) for tier, (size, held) in blocks.by_tier(resident).items()]
    states = np.bincount(blocks.parent[blocks.is_state & (blocks.parent >= 0)], minlength=len(blocks))
    n_states, hits, inexact = summed(states), summed(blocks.hits), summed(blocks.inexact)
    used = np.fmax.reduceat(blocks.used[order], begins).tolist()
    start, end = blocks.start[heads].tolist(), (blocks.start[tails] + blocks.tokens[tails]).tolist()
    run_of = np.empty(len(blocks), np.int64)
    run_of[order] = np.repeat(np.arange(len(heads)), ends - begins)
    parents = blocks.parent[heads]
    before = np.where(parents >= 0, run_of[parents], -1).tolist()
    keys = [blocks.keys[at] for at in order.tolist()]
    rows: list[PrefixRow] = []
    place: dict[int, int] = {-1: -1}
    for number, depth in _in_order(before, used):
        parent, key = place[before[number]], keys[ends[number] - 1]
        place[number] = len(rows)
        namespace = blocks.namespace(heads[number])
        rows.append(
            PrefixRow(
                key,
                tuple(keys[begins[number] : ends[number]]),
                start[number],
                end[number],
                {tier: size[number] for tier, size, _ in tiers if size[number]},
                {tier: held[number] for tier, _, held in tiers if held[number]},
                n_states[number],
                None if math.isnan(used[number]) else used[number],
                hits[number],
                tuple(sorted(names[key])) if key in names else (),
                tuple(sorted(users[key])) if key in users else (),
                not inexact[number],
                models.get(namespace, ""),
                namespace,
                depth,
                None if parent < 0 else parent,
                rows[parent].reachable if parent >= 0 else not start[number],
            )
        )
    return tuple(rows)


def _in_order(before: list[int], used: list[float]) -> Iterable[tuple[int, int]]:
    """Yield runs and their depth, each after the one it follows, those that were used last first."""
    latest = [math.inf if math.isnan(when) else when for when in used]  # never on disk yet: just put
    following: defaultdict[int, list[int]] = defaultdict(list)
    for number, parent in enumerate(before):
        following[parent].append(number)
    whole = [-1]
    for number in whole:
        whole.extend(following.get(number, ()))
    for number in whole[:0:-1]:
        if before[number] >= 0:
            latest[before[number]] = max(latest[before[number]], latest[number])
    stack = [(number, 0) for number in sorted(following[-1], key=latest.__getitem__)]
    while stack:
        number, depth = stack.pop()
        yield number, depth
        stack += [(child, depth + 1) for child in sorted(following.get(number, ()), key=latest.__getitem__)]
