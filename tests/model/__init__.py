"""Tests of the model side; a package only so that its files share ``_lab``."""
