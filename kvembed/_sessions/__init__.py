"""Conversations: persisted by name, token-exact over turns, processes and reboots."""

from __future__ import annotations

from kvembed._sessions.session import Reply, Session, Turn

__all__ = ["Reply", "Session", "Turn"]
