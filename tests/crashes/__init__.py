"""Processes that are killed, and calls that fail, at every step of a block's life."""
