"""Conversations: persisted by name, token-exact over turns, processes and reboots.

`kvembed._sessions.db` lists and searches them without torch; `kvembed._sessions.session` has them with a model.
"""

from __future__ import annotations

__all__: list[str] = []
