"""A fixed time for chat templates that ask for the present one.

transformers gives templates ``strftime_now`` and takes no other function from a caller. So a macro of that name is
put before the template, which makes any format of the parts of one time.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["at_fixed_time", "now"]

# Ends with a new line, so that what the template begins with still stands at the beginning of a line.
_MACRO = """\
{%- macro strftime_now(format) -%}
{%- set made = namespace(text=format) -%}
{%- for sign, value in kvembed_time -%}{%- set made.text = made.text.replace(sign, value) -%}{%- endfor -%}
{{- made.text -}}
{%- endmacro %}
"""
_SIGNS = "aAbBcdHIjmMpSUwWxXyYfGuVeDFTRhnt"
_WITHOUT_ZERO = "dmHIMSjy"


def now() -> str:
    """Return the local time to the second, as sessions keep it."""
    return datetime.now().isoformat(timespec="seconds")


def at_fixed_time(chat_template: str, date: str) -> tuple[str, dict[str, Any]]:
    """Return a template that is told one time, and the arguments it needs for that.

    Args:
        chat_template: The template.
        date: Local time, as `now` returns it.
    """
    if "strftime_now" not in chat_template:
        return chat_template, {}
    return _MACRO + chat_template, {"kvembed_time": _parts(datetime.fromisoformat(date))}


def _parts(time: datetime) -> Sequence[tuple[str, str]]:
    parts = [("%%", "\0")]
    parts += [(f"%-{sign}", time.strftime(f"%{sign}").lstrip("0") or "0") for sign in _WITHOUT_ZERO]
    parts += [(f"%{sign}", time.strftime(f"%{sign}")) for sign in _SIGNS]
    return [*parts, ("%z", ""), ("%Z", ""), ("\0", "%")]
