"""What the tests of this folder found out, family by family and mode by mode, for the page of the support matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PAGE", "FamilyResult", "MediaResult", "ModeResult", "Record", "missing_rows", "render"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "support-matrix.md"

_HEAD = """# Support matrix

Written by the tests (`pytest tests/families --support-matrix=write`); a test fails when it is out of date. All
figures are of models in float32 on a CPU, transformers {transformers}. They are tiny and random but for the last table.

**Text**: greedy tokens of cold, live, cpu and disk tier equal those of plain transformers, at turn ends and at cuts in
the middle of a block. **Bits**: a warm call that reuses up to a block edge has the logits of a cold one, bit for bit.
**Reuse**: *tokens* means that any prefix is good; *snapshots* that a prompt is taken up at the nearest stored state
(the end of a turn or document, and block edges now and then); *steps* that it is, and goes on one token at a time,
because transformers is wrong with several. Each family is also run with its restored cache damaged, and the logits
have to show it.

Families that are refused are passed through to transformers unchanged; `usage.bypass_reason` and
`kvembed doctor MODEL` give the reason. A model of a family that is not listed is tried out when it is wrapped, like all
of these were.
"""


@dataclass
class FamilyResult:
    """One family.

    Args:
        name: transformers' model type, or a variant of it.
        layers: What its cache layers hold.
        reuse: ``"tokens"``, ``"snapshots"`` or ``"steps"``; empty when refused.
        text: Whether the text agreed.
        bits: Whether the bits agreed.
        reason: Why it is refused.
    """

    name: str
    layers: str = ""
    reuse: str = ""
    text: bool = False
    bits: bool = False
    reason: str = ""


@dataclass
class MediaResult:
    """One family that sees or hears.

    Args:
        name: transformers' model type, and a variant.
        served: Whether calls with media were compared with plain transformers and agreed.
        between: Whether a prompt may be taken up between two pictures too.
        reason: Why such calls pass through.
    """

    name: str
    served: bool = False
    between: bool = False
    reason: str = ""


@dataclass
class ModeResult:
    """One way of generating: for each kind of model ``"reused"`` or the reason why not."""

    name: str
    outcomes: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """Everything found in one run."""

    families: dict[str, FamilyResult] = field(default_factory=dict)
    modes: dict[str, ModeResult] = field(default_factory=dict)
    real_modes: dict[str, ModeResult] = field(default_factory=dict)
    media: dict[str, MediaResult] = field(default_factory=dict)

    def family(self, name: str) -> FamilyResult:
        """Return the entry of a family, made when it is new."""
        return self.families.setdefault(name, FamilyResult(name))

    def media_of(self, name: str) -> MediaResult:
        """Return the entry of a family with media, made when it is new."""
        return self.media.setdefault(name, MediaResult(name))

    def mode(self, name: str) -> ModeResult:
        """Return the entry of a mode, made when it is new."""
        return self.modes.setdefault(name, ModeResult(name))

    def real_mode(self, name: str) -> ModeResult:
        """Return the entry of a mode with real models, made when it is new."""
        return self.real_modes.setdefault(name, ModeResult(name))


def family_row(result: FamilyResult) -> str:
    """Return one line of the table of families."""
    if result.reason:
        return f"| {result.name} | | refused | | | {result.reason} |"
    text, bits = ("yes" if ok else "NO" for ok in (result.text, result.bits))
    return f"| {result.name} | {result.layers} | {result.reuse} | {text} | {bits} | |"


def media_row(result: MediaResult) -> str:
    """Return one line of the table of media."""
    if result.reason:
        return f"| {result.name} | passes through | | {result.reason} |"
    return f"| {result.name} | reused | {'yes' if result.between else 'no'} | |"


def mode_row(result: ModeResult, kinds: list[str]) -> str:
    """Return one line of the table of modes."""
    return f"| {result.name} | " + " | ".join(result.outcomes.get(kind, "") for kind in kinds) + " |"


def kinds_of(modes: dict[str, ModeResult]) -> list[str]:
    """Return the columns of a table of modes."""
    return sorted({kind for mode in modes.values() for kind in mode.outcomes})


def _table(modes: dict[str, ModeResult]) -> list[str]:
    kinds = kinds_of(modes)
    head = ["| mode | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    return [*head, *(mode_row(mode, kinds) for mode in modes.values())]


def render(record: Record, transformers_version: str) -> str:
    """Return the whole page."""
    served = [r for r in record.families.values() if not r.reason]
    refused = [r for r in record.families.values() if r.reason]
    lines = [_HEAD.format(transformers=transformers_version)]
    lines += [
        f"{len(served)} families are served exactly, {len(refused)} refused by name.\n",
        "## Families\n",
        "| family | cache layers | reuse | text | bits | why not |",
        "|---|---|---|---|---|---|",
        *(family_row(r) for r in sorted([*served, *refused], key=lambda r: r.name)),
        "\n## Media\n",
        "Prompts with two and three pictures (videos, sounds), compared with plain transformers from every tier and by",
        "a second model on the same store: again, a next turn, a further picture, other pictures behind the same",
        "placeholders. **Between**: whether a prompt is also taken up between two pictures; if not, it is before the",
        "first or after the last of those that come again.\n",
        "| family | media | between | why not |",
        "|---|---|---|---|",
        *(media_row(r) for r in sorted(record.media.values(), key=lambda r: r.name)),
        "\n## Ways of generating\n",
        "On a full-attention, a sliding-window and a linear hybrid family; *reused* was compared with plain",
        "transformers from every tier, with the same seed where tokens are sampled.\n",
        *_table(record.modes),
    ]
    if record.real_modes:
        lines += [
            "\n## Ways of generating, with real models\n",
            "The same with real weights, and prompts of 300 and 540 tokens of real text (Gemma's window is of 512):",
            "from a live cache and from disk, each time all but the last token of each prompt, and from nothing where",
            "a mode keeps the prompt in a way of its own. `model.compile()` is tried with the first six layers.\n",
            *_table(record.real_modes),
        ]
    return "\n".join(lines) + "\n"


def missing_rows(record: Record, page: str) -> list[str]:
    """Return the rows of this run that the page has not; rows that a run of single tests left gaps in do not count."""
    rows = [family_row(r) for r in record.families.values() if r.reason or (r.text and r.bits)]
    rows += [media_row(r) for r in record.media.values() if r.reason or r.served]
    lines = page.splitlines()
    heads = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith("| mode | ")]
    for kinds, modes in zip(heads, (record.modes, record.real_modes), strict=False):
        rows += [mode_row(mode, kinds) for mode in modes.values() if set(mode.outcomes) == set(kinds)]
    return [row for row in rows if row not in lines]
