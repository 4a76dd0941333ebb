"""Tables of the file of sessions, as numbered migrations; a released one is never edited."""

from __future__ import annotations

__all__ = ["MIGRATIONS"]

_V1 = """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    system TEXT,
    settings TEXT NOT NULL DEFAULT '{}',
    head INTEGER REFERENCES messages(id),
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES messages(id),
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    meta TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL,
    token_ids BLOB,
    text_kept INTEGER NOT NULL DEFAULT 0,
    text_rest TEXT NOT NULL DEFAULT '',
    ids_kept INTEGER NOT NULL DEFAULT 0,
    ids_rest BLOB
);
CREATE INDEX messages_parent ON messages(parent);
CREATE TABLE moves (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    head INTEGER
);
CREATE VIRTUAL TABLE found USING fts5(content, content='messages', content_rowid='id');
CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
    INSERT INTO found(rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER messages_removed AFTER DELETE ON messages BEGIN
    INSERT INTO found(found, rowid, content) VALUES ('delete', old.id, old.content);
END;
"""
_V2 = """
-- A name is taken only among the sessions that are listed: a hidden one keeps its name for when it comes back.
CREATE TABLE sessions_new (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    system TEXT,
    settings TEXT NOT NULL DEFAULT '{}',
    template TEXT NOT NULL DEFAULT '{}',
    date TEXT,
    head INTEGER REFERENCES messages(id),
    created REAL NOT NULL,
    updated REAL NOT NULL,
    hidden REAL
);
INSERT INTO sessions_new (id, name, system, settings, head, created, updated)
    SELECT id, name, system, settings, head, created, updated FROM sessions;
DROP TABLE sessions;
ALTER TABLE sessions_new RENAME TO sessions;
CREATE UNIQUE INDEX sessions_listed ON sessions(name) WHERE hidden IS NULL;
-- What a conversation begins with can be changed, and that be undone.
ALTER TABLE moves ADD COLUMN system TEXT;
ALTER TABLE moves ADD COLUMN date TEXT;
UPDATE moves SET system = (SELECT system FROM sessions WHERE sessions.id = moves.session);
"""
_V3 = """
-- Which tokenizer made the ids of a message: beside its cost until now, where it was shown and exported.
ALTER TABLE messages ADD COLUMN tokenizer TEXT NOT NULL DEFAULT '';
UPDATE messages SET tokenizer = coalesce(json_extract(meta, '$.tokenizer'), ''),
    meta = json_remove(meta, '$.tokenizer');
"""
MIGRATIONS = (_V1, _V2, _V3)
