"""``kvembed doctor --codec``: what codecs cost a model's answers, measured and shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvembed._codecs.names import CODECS, LOSSLESS, check_codec
from kvembed._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvembed._model import CachedModel

__all__ = ["chosen", "describe", "measure", "read"]

_TOKENS = 2048
_PREDICTED = 256


def chosen(codec: str | None, model: str | None, text: Path | None) -> tuple[str, ...]:
    """Return the codecs to be measured, the lossless one first; none when nobody asked.

    Raises:
        ConfigError: There is no such codec, or no model to measure it on.
    """
    if codec is None:
        if text is not None:
            raise ConfigError("--text is what a codec is measured on: add --codec all")
        return ()
    if model is None:
        raise ConfigError(f"name a model to measure {codec} on: kvembed doctor --codec {codec} smollm2")
    if codec == "all":
        return tuple(reversed(CODECS))
    return tuple(dict.fromkeys((LOSSLESS, check_codec(codec))))


def read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as text in UTF-8 ({error})") from error


def measure(model: CachedModel, codecs: Sequence[str], text: str | None) -> list[dict[str, Any]]:
    """Measure codecs on the first 2,048 tokens of a text; at least half of them are predicted on top of the others."""
    from kvembed._cli._sample import reference_text
    from kvembed._codecs.measure import measure_codecs
    from kvembed._keys import as_token_ids

    # Nine characters a token is more than most texts have.
    ids = model.tokenizer((text or reference_text())[: 9 * _TOKENS], verbose=False)["input_ids"][:_TOKENS]
    predicted = min(_PREDICTED, max(64, len(ids) - model._engine.block_size))
    return [f.to_dict() for f in measure_codecs(model._engine, as_token_ids(ids), codecs, predicted=predicted)]


def describe(figures: Sequence[dict[str, Any]]) -> str:
    """Return a table of what was measured."""
    head = ("codec", "KL mean", "KL max", "top-1", "smaller", "encode", "decode")
    rows: list[tuple[str, ...]] = [head]
    for f in figures:
        rates = ("" if f[name] is None else f"{f[name] / 1e9:.1f} GB/s" for name in ("encode_rate", "decode_rate"))
        name = "(rounding)" if f["codec"] == LOSSLESS else f["codec"]
        ratio = "" if f["codec"] == LOSSLESS else f"{f['ratio']:.2f}x"
        rows.append((name, f"{f['kl_mean']:.1e}", f"{f['kl_max']:.1e}", f"{100 * f['top1']:.1f} %", ratio, *rates))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines: list[str] = []
    for row in rows:
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([name.strip().ljust(widths[0]), *cells]))
    first = figures[0]
    lines.append(
        f"{first['predicted_tokens']} tokens predicted on top of {first['prefix_tokens']:,} that were stored; KL in "
        "nats, from predictions on KV as it was."
    )
    lines.append("(rounding) is one plain forward of transformers: what the model differs by from itself.")
    return "\n".join(line.rstrip() for line in lines)
