"""Tables of the catalog, as numbered migrations.

A migration that has been released is never edited: a change is a new one at the end. Each runs in its own
transaction and its number is recorded, so two processes opening an old store upgrade it once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvembed._errors import StoreFormatError

if TYPE_CHECKING:
    import sqlite3

__all__ = ["APPLICATION_ID", "MIGRATIONS", "SCHEMA_VERSION", "migrate"]

APPLICATION_ID = 0x6B76656D  # "kvem": written into the database's header, so that `file` can tell what it is

_M001 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('blocks', 0), ('nbytes', 0), ('file_bytes', 0), ('hits', 0), ('hit_tokens', 0);

CREATE TABLE namespaces (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, fields TEXT NOT NULL, created REAL NOT NULL);

CREATE TABLE notes (
    digest BLOB NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (digest, name)) WITHOUT ROWID;

-- `children` and `pins` count what forbids eviction. They are kept by triggers, so that the next block to
-- evict is the first entry of an index, however large the store is; a NOT EXISTS would have to step over
-- every pinned or inner block that is old.
CREATE TABLE blocks (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, namespace INTEGER NOT NULL, start INTEGER NOT NULL,
    n_tokens INTEGER NOT NULL, probe BLOB NOT NULL, exact INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    file_bytes INTEGER NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL, hits INTEGER NOT NULL DEFAULT 0,
    children INTEGER NOT NULL DEFAULT 0, pins INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX blocks_by_parent ON blocks (parent, probe);
CREATE INDEX blocks_by_namespace ON blocks (namespace);
CREATE INDEX blocks_by_use ON blocks (last_used);
CREATE INDEX blocks_to_evict ON blocks (last_used, start DESC) WHERE children = 0 AND pins = 0;
CREATE INDEX leaves_by_use ON blocks (last_used DESC) WHERE children = 0;

CREATE TABLE pins (
    name TEXT NOT NULL, key BLOB NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (name, key)) WITHOUT ROWID;
CREATE INDEX pins_by_key ON pins (key);

CREATE TABLE tombstones (key BLOB PRIMARY KEY, reason TEXT NOT NULL, time REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX tombstones_by_time ON tombstones (time);

CREATE TRIGGER block_added AFTER INSERT ON blocks BEGIN
    UPDATE meta SET value = value + 1 WHERE name = 'blocks';
    UPDATE meta SET value = value + NEW.nbytes WHERE name = 'nbytes';
    UPDATE meta SET value = value + NEW.file_bytes WHERE name = 'file_bytes';
    UPDATE blocks SET children = children + 1 WHERE key = NEW.parent;
    UPDATE blocks SET children = (SELECT count(*) FROM blocks WHERE parent = NEW.key),
                      pins = (SELECT count(*) FROM pins WHERE key = NEW.key) WHERE key = NEW.key;
    DELETE FROM tombstones WHERE key = NEW.key;
END;
CREATE TRIGGER block_removed AFTER DELETE ON blocks BEGIN
    UPDATE meta SET value = value - 1 WHERE name = 'blocks';
    UPDATE meta SET value = value - OLD.nbytes WHERE name = 'nbytes';
    UPDATE meta SET value = value - OLD.file_bytes WHERE name = 'file_bytes';
    UPDATE blocks SET children = children - 1 WHERE key = OLD.parent;
END;
CREATE TRIGGER block_resized AFTER UPDATE OF nbytes, file_bytes ON blocks BEGIN
    UPDATE meta SET value = value + NEW.nbytes - OLD.nbytes WHERE name = 'nbytes';
    UPDATE meta SET value = value + NEW.file_bytes - OLD.file_bytes WHERE name = 'file_bytes';
END;
CREATE TRIGGER block_hit AFTER UPDATE OF hits ON blocks BEGIN
    UPDATE meta SET value = value + NEW.hits - OLD.hits WHERE name = 'hits';
    UPDATE meta SET value = value + (NEW.hits - OLD.hits) * NEW.n_tokens WHERE name = 'hit_tokens';
END;
CREATE TRIGGER pin_added AFTER INSERT ON pins BEGIN
    UPDATE blocks SET pins = pins + 1 WHERE key = NEW.key;
END;
CREATE TRIGGER pin_removed AFTER DELETE ON pins BEGIN
    UPDATE blocks SET pins = pins - 1 WHERE key = OLD.key;
END;
"""

_M002 = """
-- What eviction weighs: `worth` is work to compute again (in tokens at position 0) for each byte on disk,
-- `priority` is worth in seconds plus the value of meta 'age' when the block was last used (GreedyDual-Size).
ALTER TABLE blocks ADD COLUMN worth REAL NOT NULL DEFAULT 0;
ALTER TABLE blocks ADD COLUMN priority REAL NOT NULL DEFAULT 0;
ALTER TABLE namespaces ADD COLUMN seconds_per_token REAL NOT NULL DEFAULT 0.001;
ALTER TABLE namespaces ADD COLUMN blocks INTEGER NOT NULL DEFAULT 0;
ALTER TABLE namespaces ADD COLUMN file_bytes INTEGER NOT NULL DEFAULT 0;
INSERT INTO meta VALUES ('age', 0.0), ('log_bytes', 0), ('log_calls', 0);

UPDATE namespaces SET
    blocks = (SELECT count(*) FROM blocks WHERE namespace = namespaces.id),
    file_bytes = (SELECT COALESCE(sum(file_bytes), 0) FROM blocks WHERE namespace = namespaces.id);
UPDATE namespaces SET seconds_per_token = 1.0 / (
    SELECT CAST(value AS REAL) FROM notes WHERE digest = namespaces.digest AND name = 'prefill_tokens_per_second')
    WHERE EXISTS (SELECT 1 FROM notes WHERE digest = namespaces.digest AND name = 'prefill_tokens_per_second'
                  AND CAST(value AS REAL) > 0);
-- As `kvembed._eviction.worth` has it. One token is taken for a snapshot of state, which stands for those before it.
UPDATE blocks SET worth = CASE WHEN n_tokens > 1
    THEN n_tokens * (1.0 + (start + n_tokens / 2.0) / 8192.0) / max(file_bytes, 16384 * n_tokens)
    ELSE max(1, min(start, 2048)) * (1.0 + (start + 0.5) / 8192.0) / max(file_bytes, 16384 * max(1, min(start, 2048)))
    END;
UPDATE blocks SET priority = worth * (SELECT seconds_per_token FROM namespaces WHERE id = namespace);

DROP INDEX blocks_to_evict;
CREATE INDEX blocks_to_evict ON blocks (priority, last_used, start DESC) WHERE children = 0 AND pins = 0;
CREATE INDEX blocks_to_evict_of ON blocks (namespace, priority, last_used, start DESC)
    WHERE children = 0 AND pins = 0;

CREATE TRIGGER space_added AFTER INSERT ON blocks BEGIN
    UPDATE namespaces SET blocks = blocks + 1, file_bytes = file_bytes + NEW.file_bytes WHERE id = NEW.namespace;
END;
CREATE TRIGGER space_removed AFTER DELETE ON blocks BEGIN
    UPDATE namespaces SET blocks = blocks - 1, file_bytes = file_bytes - OLD.file_bytes WHERE id = OLD.namespace;
END;
CREATE TRIGGER space_changed AFTER UPDATE OF namespace, file_bytes ON blocks BEGIN
    UPDATE namespaces SET blocks = blocks - 1, file_bytes = file_bytes - OLD.file_bytes WHERE id = OLD.namespace;
    UPDATE namespaces SET blocks = blocks + 1, file_bytes = file_bytes + NEW.file_bytes WHERE id = NEW.namespace;
END;

-- Sums of a day ('2026-11-24', local time) and, under day '', of all days.
CREATE TABLE days (
    day TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (day, name)) WITHOUT ROWID;

-- One row for each call: the whole blocks it used or made, as the first 8 bytes of their keys; `block_bytes` is
-- what one of them takes on disk.
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, keys BLOB NOT NULL, block_bytes INTEGER NOT NULL);
CREATE TRIGGER call_added AFTER INSERT ON calls BEGIN
    UPDATE meta SET value = value + length(NEW.keys) WHERE name = 'log_bytes';
    UPDATE meta SET value = value + 1 WHERE name = 'log_calls';
END;
CREATE TRIGGER call_removed AFTER DELETE ON calls BEGIN
    UPDATE meta SET value = value - length(OLD.keys) WHERE name = 'log_bytes';
    UPDATE meta SET value = value - 1 WHERE name = 'log_calls';
END;
"""

_M003 = """
-- The least faithful codec that a block's values have been through; a store reads what is good enough for its own.
ALTER TABLE blocks ADD COLUMN codec TEXT NOT NULL DEFAULT 'lossless';
"""

MIGRATIONS: tuple[tuple[str, str], ...] = (("001_initial", _M001), ("002_budgets", _M002), ("003_codecs", _M003))
SCHEMA_VERSION = len(MIGRATIONS)


def _applied(db: sqlite3.Connection) -> int:
    # PRAGMA user_version is one read of the header; the table beside it is for people.
    return db.execute("PRAGMA user_version").fetchone()[0]


def migrate(db: sqlite3.Connection, where: str) -> None:
    """Bring a catalog to `SCHEMA_VERSION`.

    Args:
        db: Connection in autocommit mode.
        where: Path named in errors.

    Raises:
        StoreFormatError: A newer kvembed has changed the tables.
    """
    version = _applied(db)
    if version > SCHEMA_VERSION:
        raise StoreFormatError(
            f"{where} was written by a newer kvembed (catalog version {version}, this one reads up to "
            f"{SCHEMA_VERSION}); upgrade kvembed or use another store folder"
        )
    for number in range(version + 1, SCHEMA_VERSION + 1):
        name, script = MIGRATIONS[number - 1]
        # BEGIN EXCLUSIVE waits for another process doing the same; then it is looked at again.
        db.execute("BEGIN EXCLUSIVE")
        try:
            if _applied(db) < number:
                db.execute("CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied REAL NOT NULL)")
                for statement in statements(script):
                    db.execute(statement)
                db.execute("INSERT INTO migrations VALUES (?, ?)", (name, time.time()))
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def statements(script: str) -> list[str]:
    """Split a script into its statements."""
    # Not executescript(): it commits the open transaction first. A statement ends where SQLite says so
    # (a trigger has semicolons inside).
    import sqlite3

    result: list[str] = []
    part = ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            result.append(part)
            part = ""
    return result
