"""The server of transformers with our model inside: OpenAI's client, streams, and true counts of cached tokens."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvembed import CacheBypassWarning, ConfigError
from tests.model._lab import BLOCK, Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from kvembed.serving import build_app  # noqa: E402

STORY = "A lighthouse stands at the end of the pier, and its keeper counts the ships that pass by. " * 2
QUESTION = [{"role": "user", "content": STORY + "How many?"}]
HALF = "\ufffd"
"""Half a character, at whose end a stream waits for more."""
FOLLOW_UP = [*QUESTION, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "And then?"}]


@contextlib.contextmanager
def served(app: Any) -> Iterator[Any]:
    """Serve an app on a free port of this machine; yields OpenAI's client for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            base = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def cached(lab: Lab, tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    return lab.wrap(tiny_llama(), tokenizer=tiny_tokenizer)


@pytest.fixture
def plain(tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    """What transformers writes, without a server and without a cache."""
    model = tiny_llama()

    def write(prompt: Any, new: int = 8) -> tuple[str, int]:
        if isinstance(prompt, str):
            inputs = tiny_tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tiny_tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        count = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, count:]
        return tiny_tokenizer.decode(ids, skip_special_tokens=True), count

    return write


def test_chat_completions(cached: Any, plain: Any) -> None:
    with served(build_app(cached, "tiny")) as client:
        hits = []
        for messages in (QUESTION, FOLLOW_UP, FOLLOW_UP):
            reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
            text, count = plain(messages)
            assert reply.choices[0].message.content == text
            assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (count, 8)
            hits.append(reply.usage.prompt_tokens_details.cached_tokens)
        assert hits[0] == 0
        assert hits[1] > 10 * BLOCK
        assert hits[2] == plain(FOLLOW_UP)[1] - 1 == cached.usage.cached_tokens

        # As a stream: the same text, in pieces, and the usage in the last of them.
        chunks = list(
            client.chat.completions.create(model="tiny", messages=FOLLOW_UP, max_tokens=8, temperature=0, stream=True)
        )
        text, count = plain(FOLLOW_UP)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).rstrip(HALF) == text.rstrip(HALF)
        assert [chunk.usage.prompt_tokens_details.cached_tokens for chunk in chunks if chunk.usage] == [count - 1]

        # A stop string needs the tokenizer, which transformers hands over.
        stop = next(character for character in plain(QUESTION)[0] if character.isalnum())
        reply = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=8, temperature=0, stop=[stop]
        )
        assert reply.choices[0].message.content == plain(QUESTION)[0].partition(stop)[0] + stop
        assert reply.usage.prompt_tokens_details.cached_tokens == plain(QUESTION)[1] - 1


@pytest.mark.parametrize("stream", [False, True])
def test_completions_and_responses(cached: Any, plain: Any, stream: bool) -> None:
    text, count = plain(STORY)
    chat, chat_count = plain(QUESTION)
    with served(build_app(cached, "tiny")) as client:
        for hits in (0, count - 1):
            reply = client.completions.create(model="tiny", prompt=STORY, max_tokens=8, temperature=0, stream=stream)
            parts = list(reply) if stream else [reply]
            assert "".join(part.choices[0].text for part in parts).rstrip(HALF) == text.rstrip(HALF)
            assert parts[-1].usage.prompt_tokens_details.cached_tokens == hits
        for i in range(2):
            reply = client.responses.create(
                model="tiny", input=QUESTION, max_output_tokens=8, temperature=0, stream=stream
            )
            reply = list(reply)[-1].response if stream else reply
            assert reply.output_text.rstrip(HALF) == chat.rstrip(HALF)
            assert reply.usage.input_tokens == chat_count
            assert reply.usage.input_tokens_details.cached_tokens == cached.usage.cached_tokens
            assert cached.usage.cached_tokens == chat_count - 1 if i else cached.usage.cached_tokens < chat_count - 1


def test_what_is_not_served_from_the_cache_says_zero(cached: Any) -> None:
    with served(build_app(cached, "tiny")) as client:
        config = {"generation_config": '{"max_new_tokens": 4, "use_cache": false, "do_sample": false}'}
        create = functools.partial(client.chat.completions.create, model="tiny", messages=QUESTION, extra_body=config)
        with pytest.warns(CacheBypassWarning, match="use_cache"):
            replies = [create(), create()]
        assert [reply.usage.prompt_tokens_details.cached_tokens for reply in replies] == [0, 0]
        assert "use_cache" in cached.usage.bypass_reason


def test_requests_at_the_same_time_do_not_mix_up_their_counts(cached: Any, plain: Any) -> None:
    prompts = [f"{number} {STORY}" for number in range(4)]
    found: dict[str, tuple[str, int]] = {}
    with served(build_app(cached, "tiny")) as client:

        def ask(prompt: str, **options: Any) -> None:
            reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0, **options)
            found[prompt] = reply.choices[0].text, reply.usage.prompt_tokens_details.cached_tokens

        ask(prompts[0])
        # All with one and the same id, which is the client's to choose.
        options = {"extra_headers": {"x-request-id": "same"}}
        threads = [threading.Thread(target=ask, args=(prompt,), kwargs=options) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for prompt in prompts:
        text, count = plain(prompt, 4)
        assert found[prompt] == (text, count - 1 if prompt == prompts[0] else 0)


def test_a_client_that_goes_away_and_errors(cached: Any, plain: Any) -> None:
    with served(build_app(cached, "tiny")) as client:
        options = {"model": "tiny", "messages": QUESTION, "temperature": 0}
        with client.chat.completions.create(**options, max_tokens=3000, stream=True) as stream:
            next(iter(stream))
        # The model is free again, and keeps what was computed.
        reply = client.chat.completions.create(**options, max_tokens=8)
        assert reply.choices[0].message.content == plain(QUESTION)[0]
        assert reply.usage.prompt_tokens_details.cached_tokens > 10 * BLOCK
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="other", messages=QUESTION)
        assert "pinned to 'tiny'" in refused.value.response.text
        assert [model.id for model in client.models.list()] == ["tiny"]
        # It does not load what it was not given, and finds its own model again after a reset.
        root = str(client.base_url).removesuffix("/v1/")
        events = client._client.post(f"{root}/load_model", json={"model": "other"}).text
        assert "this server has one model, tiny" in events
        assert client._client.post(f"{root}/reset").json() == {"status": "ok"}
        reply = client.chat.completions.create(**options, max_tokens=8)
        assert reply.usage.prompt_tokens_details.cached_tokens > 10 * BLOCK


def test_without_a_tokenizer_or_the_packages(lab: Lab, tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        build_app(lab.wrap(tiny_llama()))
    code = "import sys; sys.modules['fastapi'] = None\nimport kvembed.serving"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'transformers[serving]>=5.23'" in done.stderr
