"""The committed support matrix says what this run found. Last in this folder by name, so that everything has run."""

from __future__ import annotations

import pytest
import transformers

from ._record import PAGE, Record, family_row, media_row, mode_row


def test_the_support_matrix_is_current(record: Record, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--support-matrix") == "write":
        pytest.skip("it is written at the end of this run")
    if not (record.families or record.modes or record.real_modes or record.media):
        pytest.skip("nothing of this folder ran before")
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}." not in page:
        pytest.skip("it was written with another version of transformers")
    lines = page.splitlines()
    for family in record.families.values():
        if family.reason or (family.text and family.bits):  # a run of single tests leaves gaps
            assert family_row(family) in lines
    for media in record.media.values():
        if media.reason or media.served:
            assert media_row(media) in lines
    heads = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith("| mode | ")]
    for kinds, modes in zip(heads, (record.modes, record.real_modes), strict=False):
        for mode in modes.values():
            if set(mode.outcomes) == set(kinds):
                assert mode_row(mode, kinds) in lines
