"""Tests of the chat app; a package only so that its files share ``_pilot``."""
