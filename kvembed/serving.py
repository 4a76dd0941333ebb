"""The server of ``transformers serve`` around a cached model, with ``cached_tokens`` that are true.

::

    import uvicorn
    from kvembed import CachedModel
    from kvembed.serving import build_app

    uvicorn.run(build_app(CachedModel.from_pretrained("smollm2"), "smollm2"), host="127.0.0.1", port=8000)

Routes, validation, chat templates, streaming and tool calls are transformers' own. What is replaced: where the model
comes from, and the ``usage`` of a reply, for which transformers has no cache to report on. That is written into the
finished reply, in OpenAI's format, because the handlers build theirs deep inside methods that change between versions.
"""

from __future__ import annotations

import contextvars
import json
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError

try:
    from fastapi.responses import JSONResponse, StreamingResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerateManager, GenerationState, split_model_id
except ImportError as error:
    raise ImportError(
        "kvembed.serving needs the server of transformers 5.23 or later: pip install 'transformers[serving]>=5.23'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from fastapi import FastAPI

    from kvembed._model import CachedModel
    from kvembed._usage import Usage

__all__ = ["build_app"]

# What the calls of the request that is being answered cost. The context of a request reaches the manager, which
# starts the generation, but not the thread that runs it: so the list itself is handed on.
_CALLS: contextvars.ContextVar[list[Usage]] = contextvars.ContextVar("kvembed_calls")


def build_app(model: CachedModel, name: str | None = None, *, enable_cors: bool = False) -> FastAPI:
    """Return the app of ``transformers serve`` for one model.

    Args:
        model: Answers all requests, one at a time; has its tokenizer. It stays the caller's to close.
        name: What requests may call it; by default the name it was loaded by.
        enable_cors: Allow web pages of all origins.

    Returns:
        An ASGI app with the routes of ``transformers serve``: ``/v1/chat/completions``, ``/v1/completions``,
        ``/v1/responses``, ``/v1/models`` and others. Those three say in their ``usage`` how many tokens of the
        prompt came from the cache; what they ask for without a cache (a static one, say) is passed through, and 0.

    Raises:
        ConfigError: The model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ConfigError("a server needs a tokenizer: pass one to CachedModel(model, tokenizer)")
    models = _OneModel(model, name or str(model.name_or_path) or type(model.hf_model).__name__)
    state = _State()
    return build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completions(models, state),
        response_handler=_Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
        enable_cors=enable_cors,
    )


class _OneModel(ModelManager):
    """Loads nothing: it has its model.

    Args:
        model: The model.
        name: Its name.
    """

    def __init__(self, model: CachedModel, name: str) -> None:
        self._cached = model
        self._id = self.process_model_name(split_model_id(name)[0])
        super().__init__(force_model=name)  # which "loads" it, by the methods below, and never unloads it

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        return self._cached.tokenizer

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        if model_id_and_revision != self._id:
            raise ConfigError(f"this server has one model, {self.force_model}, and loads no others")
        return self._cached

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "kvembed"}]


class _State(GenerationState):
    """Gives each model a manager of ours; continuous batching, which has a cache of its own, stays off."""

    def __init__(self) -> None:
        super().__init__()
        self._managers: dict[str, _Manager] = {}

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._managers.setdefault(model_id, _Manager())


class _Manager(GenerateManager):
    """Runs calls on transformers' inference thread, and notes what they cost."""

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        noting: Any = _Noting(model, _CALLS.get())
        return super().generate_streaming(noting, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        noting: Any = _Noting(model, _CALLS.get())
        return await super().generate_non_streaming(noting, *args, **kwargs)


class _Noting:
    """A model for one request.

    Args:
        model: What it stands for.
        calls: Where the usage of its calls goes.
    """

    def __init__(self, model: CachedModel, calls: list[Usage]) -> None:
        self._model = model
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        streamer = kwargs.get("streamer")
        if streamer is not None:
            kwargs["streamer"] = _EndLater(streamer)
        with self._model._lock:  # nobody else's call comes between this one and its usage
            result = self._model.generate(**kwargs)
            self._calls.append(self._model.usage)
        if streamer is not None:
            streamer.end()
        return result


class _EndLater:
    """A streamer whose end the other side does not see before the usage is there.

    Args:
        streamer: The real one.
    """

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        """Wait: `_Noting` ends the real one."""


class _TrueUsage:
    """Makes a handler's replies tell what came from the cache."""

    async def handle_request(self, body: dict, request_id: str) -> Any:
        calls: list[Usage] = []
        token = _CALLS.set(calls)
        try:
            response = await super().handle_request(body, request_id)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            _CALLS.reset(token)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _amended_stream(response.body_iterator, calls)
            return response
        reply = json.loads(response.body)
        _amend(reply, calls)
        return JSONResponse(reply, status_code=response.status_code)


class _Chat(_TrueUsage, ChatCompletionHandler): ...


class _Completions(_TrueUsage, CompletionHandler): ...


class _Responses(_TrueUsage, ResponseHandler): ...


async def _amended_stream(pieces: Any, calls: list[Usage]) -> AsyncIterator[str]:
    async for piece in pieces:
        yield "\n".join(_amended_lines(piece.split("\n"), calls))


def _amended_lines(lines: Iterable[str], calls: list[Usage]) -> Iterable[str]:
    for line in lines:
        # The one line in hundreds that has a usage. Inside a text these quotes would be escaped.
        if '"usage":{' in line and line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            _amend(event, calls)
            yield f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}"
        else:
            yield line


def _amend(reply: dict[str, Any], calls: list[Usage]) -> None:
    for part in (reply, reply.get("response")):
        usage = part.get("usage") if isinstance(part, dict) else None
        if isinstance(usage, dict):
            details = usage.setdefault(
                "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details", {}
            )
            details["cached_tokens"] = sum(call.cached_tokens for call in calls)
