"""Tests of loading a model by name."""
