"""Sampling settings: from what people write in a form to arguments of ``generate()``, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FIELDS", "Field", "form_of", "settings_of"]


@dataclass(frozen=True)
class Field:
    """One line of the form.

    Args:
        name: Argument of ``generate()``.
        label: For the eye.
        kind: Of its value.
        low: Least value.
        high: Largest value.
        hint: What an empty field means.
    """

    name: str
    label: str
    kind: type[int] | type[float]
    low: float
    high: float
    hint: str


FIELDS = (
    Field("max_new_tokens", "Most tokens of a reply", int, 1, 65536, "512"),
    Field("temperature", "Temperature", float, 0, 5, "0: always the likeliest token"),
    Field("top_p", "Top p", float, 0, 1, "1: all tokens"),
    Field("top_k", "Top k", int, 0, 100000, "the model's own"),
    Field("repetition_penalty", "Repetition penalty", float, 0.1, 5, "1: none"),
)


def form_of(settings: dict[str, Any]) -> dict[str, str]:
    """Return what the form shows."""
    return {field.name: f"{settings[field.name]:g}" for field in FIELDS if settings.get(field.name) is not None}


def settings_of(form: dict[str, str], before: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``generate()``; those the form does not show stay.

    Raises:
        ValueError: Says which field is wrong, and what it takes.
    """
    known = {field.name for field in FIELDS} | {"do_sample"}
    found = {name: value for name, value in before.items() if name not in known}
    for field in FIELDS:
        text = form.get(field.name, "").strip()
        if not text:
            continue
        try:
            value = field.kind(text)
        except ValueError:
            value = None
        if value is None or not field.low <= value <= field.high:
            raise ValueError(f"{field.label}: a number from {field.low:g} to {field.high:g}, not {text!r}")
        found[field.name] = value
    # Greedy needs no sampling settings, and transformers complains about those it does not use.
    if found.get("temperature"):
        found["do_sample"] = True
    else:
        for name in ("temperature", "top_p", "top_k"):
            found.pop(name, None)
    return found
