"""`%load_ext kvembed` in a real IPython shell, with a tiny model."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

from kvembed import CachedModel, KVStore, SessionDB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEXT = "The lamp is green. The door is red. The cat is on the roof. " * 2


@pytest.fixture
def shell(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(history_length=0)
    shell.history_manager.enabled = False  # pyright: ignore[reportOptionalMemberAccess]
    db = SessionDB(tmp_path / "sessions.db")
    with KVStore(tmp_path / "store") as store:
        model = CachedModel(tiny_llama(), tiny_tokenizer, store=store, block_size=16, progress=False)
        doc = model.document(TEXT, name="lamps", pin=True)
        chat = model.session("talk", db=db)
        shell.push({"model": model, "report": doc, "chat": chat})
        run(shell, "%load_ext kvembed")
        yield shell
        chat.close()
        model.close()
    db.close()
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()
    shell.restore_sys_module_state()
    if shell.history_manager is not None:
        shell.history_manager.end_session()
    del shell
    gc.collect()


def run(shell: InteractiveShell, code: str) -> Any:
    """Run a cell; its own errors are raised here."""
    done = shell.run_cell(code)
    done.raise_error()
    return done.result


def refused(shell: InteractiveShell, code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a cell that a magic refuses; return what it says, which is one line and no traceback."""
    capsys.readouterr()
    done = shell.run_cell(code)
    assert type(done.error_in_exec).__name__ == "UsageError"
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    return said


def test_a_document_is_asked(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    doc, model = shell.user_ns["report"], shell.user_ns["model"]
    run(shell, "%%ask report --max-new-tokens 6 --var answer\nWhat colour is the lamp?")
    said = capsys.readouterr().out
    answer = shell.user_ns["answer"]
    assert len(answer.token_ids) == 6
    assert answer.question == "What colour is the lamp?"
    assert answer.usage.cached_tokens == doc.tokens
    assert answer.text in said
    assert str(answer.usage) in said
    # The same as without the magic.
    assert (doc.ask("What colour is the lamp?", max_new_tokens=6).token_ids == answer.token_ids).all()
    # By its name in the library, too.
    run(shell, "%%ask lamps -n 6 -v named\nWhat colour is the lamp?")
    assert (shell.user_ns["named"].token_ids == answer.token_ids).all()
    # A cell that is run again is asked again, from the document's end.
    run(shell, "%%ask report -n 6 -v again\nWhat colour is the lamp?")
    assert (shell.user_ns["again"].token_ids == answer.token_ids).all()
    assert model.history[-1] == shell.user_ns["again"].usage


def test_words_come_as_they_are_generated(shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shell.user_ns["model"]
    while_running: list[str] = []
    generate = model.hf_model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        streamer = kwargs["streamer"]
        put = streamer.put

        def seen(value: Any) -> None:
            put(value)
            while_running.append(type(value).__name__)

        streamer.put = seen
        return generate(*args, **kwargs)

    monkeypatch.setattr(model.hf_model, "generate", watched)
    run(shell, "%%ask report -n 5\nWhat?")
    assert len(while_running) == 6  # the prompt, and each token by itself


def test_a_conversation_and_a_fork_of_it(shell: InteractiveShell) -> None:
    run(shell, "%%ask chat -n 4 --var first\nHello")
    chat = shell.user_ns["chat"]
    assert [turn.user for turn in chat.turns] == ["Hello"]
    run(shell, "%%ask chat -n 4 --fork idea\nWhat if?")
    idea = shell.user_ns["idea"]
    assert [turn.user for turn in chat.turns] == ["Hello"]
    assert [turn.user for turn in idea.turns] == ["Hello", "What if?"]
    # It computed its own words only: all before them is that of the conversation.
    before = len(shell.user_ns["first"].prompt_ids) + 3  # the last token of a reply is not fed
    assert idea.last.usage.cached_tokens >= before
    run(shell, "%%ask idea -n 4\nAnd then?")
    assert [turn.user for turn in idea.turns] == ["Hello", "What if?", "And then?"]
    # Run again, the fork begins anew, and the old one can be brought back.
    run(shell, "%%ask chat -n 4 --fork idea\nWhat if?")
    assert [turn.user for turn in shell.user_ns["idea"].turns] == ["Hello", "What if?"]
    assert [info.name for info in chat._db.hidden()] == ["talk / idea"]


def test_looking_at_the_store(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    model, doc = shell.user_ns["model"], shell.user_ns["report"]
    model.store.flush()
    assert run(shell, "%kv stats").calls == model.store.stats().calls
    listed = run(shell, "%kv ls")
    assert "lamps" in repr(listed)
    assert "lamps" in listed._repr_mimebundle_()["text/html"]
    assert run(shell, '%kv lookup report "Is it so?"').num_tokens == doc.tokens
    assert run(shell, '%kv lookup "never seen"').num_tokens == 0
    shell.user_ns["prompt"] = doc.prompt_ids("Is it so?")
    assert run(shell, "%kv lookup prompt").num_tokens == doc.tokens
    assert run(shell, "%kv lookup --model model prompt").num_tokens == doc.tokens
    assert run(shell, '%kv explain report "Is it so?"').kind == "diverged"
    assert [part.tier for part in run(shell, '%kv show report "Is it so?"').parts] == ["live", "computed"]
    assert len(run(shell, "%kv history").rows) == len(model.history)
    for kind in ("ttft", "tokens", "growth", "hits", "written"):
        assert run(shell, f"%kv plot {kind}").axes
    capsys.readouterr()
    run(shell, "%kv")
    assert "%kv lookup  WHAT" in capsys.readouterr().out
    assert model.history[-1] == doc.usage  # looking computed nothing


def test_mistakes_are_answered_in_one_line(shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there are stats, ls" in refused(shell, "%kv status", capsys)
    assert "plot one of ttft" in refused(shell, "%kv plot pie", capsys)
    assert "no document or session 'repport'" in refused(shell, "%%ask repport\nWhat?", capsys)
    assert "'lamps'" in refused(shell, "%%ask lamp\nWhat?", capsys)  # the library's
    assert "the question is empty" in refused(shell, "%%ask report\n  ", capsys)
    assert "--fork is for sessions" in refused(shell, "%%ask report --fork idea\nWhat?", capsys)
    shell.user_ns["other"] = CachedModel(shell.user_ns["model"].hf_model, store=shell.user_ns["model"].store)
    assert "several models here" in refused(shell, "%kv lookup hello", capsys)
    del shell.user_ns["other"], shell.user_ns["model"]
    assert "no model here yet" in refused(shell, "%kv lookup hello", capsys)


def test_tab_completes_sub_commands_and_names(shell: InteractiveShell) -> None:
    def offered(line: str) -> list[str]:
        with provisionalcompleter():
            return [found.text for found in shell.Completer.completions(line, len(line))]

    assert "stats" in offered("%kv ")
    assert "stats" in offered("%kv st")
    assert "growth" in offered("%kv plot ")
    assert "report" in offered("%kv lookup ")
    assert "report" in offered("%%ask ")


def test_help_says_what_there_is(shell: InteractiveShell) -> None:
    asking, looking = shell.find_cell_magic("ask"), shell.find_line_magic("kv")
    assert "--max-new-tokens" in (asking.__doc__ or "")
    assert "%kv stats" in (looking.__doc__ or "")


def test_importing_kvembed_loads_no_ipython() -> None:
    code = "import sys, kvembed; kvembed.load_ipython_extension; assert 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
