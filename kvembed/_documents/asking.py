"""Many questions about one document."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvembed._progress import wants_bar
from kvembed._prompt import check_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvembed._documents.answer import Answer
    from kvembed._documents.document import Document
    from kvembed._model import CachedModel
    from kvembed._progress import Progress

__all__ = ["ask_many"]

_AUTO_QUESTIONS = 2


def ask_many(
    model: CachedModel,
    document: Document,
    questions: Sequence[str],
    max_new_tokens: int,
    progress: Progress | None,
    kwargs: dict[str, Any],
) -> list[Answer]:
    """Answer each question by itself; see `Document.ask_many`."""
    questions = [questions] if isinstance(questions, str) else list(questions)
    for question in questions:
        check_prompt(model.hf_model, document.prompt_ids(question), max_new_tokens)
    with _counted(model.progress if progress is None else progress, len(questions)) as done:
        answers: list[Answer] = []
        for question in questions:
            answers.append(document.ask(question, max_new_tokens=max_new_tokens, **kwargs))
            done(1)
        return answers


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
    if not wants_bar(progress, total >= _AUTO_QUESTIONS):
        yield lambda more: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="questions", unit="q", leave=False) as bar:
        yield bar.update
