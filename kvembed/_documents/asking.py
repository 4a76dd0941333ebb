"""Many questions about one document: together where that is the same and faster, else one after the other."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import LogitsProcessorList

from kvembed._documents.answer import Answer
from kvembed._documents.stored import view_of
from kvembed._errors import UnsupportedModelError
from kvembed._progress import wants_bar
from kvembed._prompt import check_prompt
from kvembed._together import (
    Margins,
    answer_together,
    can_answer_together,
    needs_trial,
    note_error,
    rows_at_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvembed._documents.document import Document
    from kvembed._keys import TokenIds
    from kvembed._model import CachedModel
    from kvembed._progress import Progress

__all__ = ["ask_many"]


def ask_many(
    model: CachedModel,
    document: Document,
    questions: Sequence[str],
    max_new_tokens: int,
    progress: Progress | None,
    kwargs: dict[str, Any],
    together: bool | None = None,
) -> list[Answer]:
    """Answer each question by itself; see `Document.ask_many`."""
    questions = [questions] if isinstance(questions, str) else list(questions)
    prompts = [document.prompt_ids(question) for question in questions]
    for prompt in prompts:
        check_prompt(model.hf_model, prompt, max_new_tokens)
    shown = model.progress if progress is None else progress
    answers: dict[int, Answer] = {}
    with _counted(shown, len(questions)) as done:
        may = together is not False and can_answer_together(model, kwargs, exact=together is None)
        if len(questions) > 1 and may:
            exact = together is None
            _together(model, document, questions, prompts, max_new_tokens, kwargs, answers, done, exact=exact)
        for i, question in enumerate(questions):
            if i not in answers:
                answers[i] = document.ask(question, max_new_tokens=max_new_tokens, **kwargs)
                done(1)
    return [answers[i] for i in range(len(questions))]


def _together(
    model: CachedModel,
    document: Document,
    questions: list[str],
    prompts: list[TokenIds],
    max_new_tokens: int,
    kwargs: dict[str, Any],
    answers: dict[int, Answer],
    done: Callable[[int], object],
    *,
    exact: bool,
) -> None:
    """Answer what can be answered together; with ``exact`` what rounding could have decided is left out."""
    prefix = document.prefix_ids
    # Alike in length, so that little is padded.
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    at_once = rows_at_once(model, len(prompts[order[-1]]) - len(prefix) + max_new_tokens)
    trial = order[0] if needs_trial(model) else None
    alone = Margins()
    if trial is not None:  # the shortest: in the batch it is padded
        processors = LogitsProcessorList([alone])
        answers[trial] = document.ask(
            questions[trial], max_new_tokens=max_new_tokens, logits_processor=processors, **kwargs
        )
        done(1)
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        if batch == [trial]:
            continue
        suffixes = [np.ascontiguousarray(prompts[i][len(prefix) :]) for i in batch]
        try:
            rows = answer_together(model, prefix, suffixes, max_new_tokens, kwargs, False)
        except UnsupportedModelError:
            if trial is not None:
                note_error(model, None, None, False)
            return
        if trial is not None and trial in batch:
            row = rows[batch.index(trial)]
            same = not row.sure or np.array_equal(row.token_ids, answers[trial].token_ids)
            if not note_error(model, alone, row, same):
                return
        for i, row in zip(batch, rows, strict=True):
            if (row.sure or not exact) and i not in answers:
                text = model.tokenizer.decode(row.token_ids, skip_special_tokens=True)
                view = view_of(model, prompts[i], row.usage)
                answers[i] = Answer(text, questions[i], row.usage, prompts[i], row.token_ids, view, document.name)
                done(1)


@contextmanager
def _counted(progress: Any, total: int) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number of questions that were answered."""
    if callable(progress):
        count = 0

        def tell(more: int) -> None:
            nonlocal count
            count += more
            progress(count, total)

        yield tell
        return
    if not wants_bar(progress, total > 1):
        yield lambda more: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="questions", unit="q", leave=False) as bar:
        yield bar.update
