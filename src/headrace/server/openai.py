"""The routes of the OpenAI API, and vLLM's beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace import __version__
from headrace.api.answers import answer_body
from headrace.api.fields import Fields, Unknown
from headrace.api.json import dump
from headrace.api.openai import URLS, ApiRequest, Kind, call_parsers, check_model, engine_requests, read_body
from headrace.api.stream import StreamWriter
from headrace.api.structured import grammar_field
from headrace.core.errors import GrammarError, InvalidParameter, ModelNotFound, shorten
from headrace.core.types import Request
from headrace.server.respond import StreamResponse, ignored_header
from headrace.server.service import Service
from headrace.server.tgi import tokenize as tgi_tokenize

PLACEHOLDERS = frozenset({"dummy", "tgi"})
"""What clients of TGI, which looks at no name, send for one."""
MAX_NAME = 1024
"""Most characters of a model's name."""
CHAT_FIELDS = (
    *("messages", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
    *("tools", "documents", "add_special_tokens"),
)
"""Of a chat that is only tokenised."""


def openai_routes(service: Service) -> APIRouter:
    """Chat, completions, models and the tokenizer's routes."""
    routes = _Routes(service)
    router = APIRouter()
    for path, kind in URLS.items():
        router.add_api_route(path, partial(routes.answer, kind), methods=["POST"], name=kind, response_model=None)
    router.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    router.add_api_route("/v1/models/{model:path}", routes.model, methods=["GET"], response_model=None)
    router.add_api_route("/tokenize", routes.tokenize, methods=["POST"], response_model=None)
    router.add_api_route("/detokenize", routes.detokenize, methods=["POST"], response_model=None)
    router.add_api_route("/tokenizer_info", routes.tokenizer_info, methods=["GET"], response_model=None)
    router.add_api_route("/version", routes.version, methods=["GET"], response_model=None)
    return router


def json_response(body: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(body), media_type="application/json", headers=dict(headers or {}))


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, kind: Kind, request: HttpRequest) -> Response:
        """POST /v1/chat/completions, /v1/completions."""
        service = self._service
        body = await service.read_json(request)
        asked = read_body(kind, body, strict=service.settings.strict)
        model, adapter = self._find(asked)
        timeout_s = service.timeout_s(request, asked.timeout_s)
        service.admit(asked.choices)
        request_id = service.request_id(request)
        salt = service.salt(request)
        try:
            requests = await service.prepare(
                lambda: self._requests(asked, request_id, salt, adapter),
                asked.choices,
                timeout_s,
                images=request if asked.has_images else None,
            )
        except GrammarError as error:
            raise GrammarError(str(error), grammar_field(body)) from None
        stamp = service.stamp(request_id, model)
        headers = ignored_header(asked.ignored)
        run = service.run(requests, request, "chat" if kind == "chat" else "text_completion")
        # From here on images are the engine's: what this holds is counted no more (`server/held.py`).
        del body, requests
        asked = asked.without_messages()
        parsers = call_parsers(asked, service.opened, service.settings.tool_parser)
        tokenizer = service.opened.tokenizer if service.opened.has_text else None
        if asked.stream:
            return StreamResponse(service, run, StreamWriter(asked, stamp, tokenizer, parsers), headers)
        completions = await service.whole(request, run)
        return json_response(answer_body(asked, stamp, completions, tokenizer, parsers=parsers), headers)

    def _find(self, asked: ApiRequest) -> tuple[str, str]:
        """(the name that answers say, the adapter). Raises ModelNotFound."""
        if asked.model in PLACEHOLDERS:
            return self._service.served[0], ""
        adapters = sorted(self._service.limits.adapters)
        name = check_model(asked, (*self._service.served, *adapters))
        return name, name if name in adapters and name not in self._service.served else ""

    def _requests(self, asked: ApiRequest, request_id: str, salt: str, adapter: str) -> tuple[Request, ...]:
        service = self._service
        found = engine_requests(
            asked, service.opened, request_id, adapter=adapter, tool_parser=service.settings.tool_parser
        )
        return tuple(replace(one, salt=f"{salt}:{one.salt}") for one in found) if salt else found

    def _names(self) -> tuple[str, ...]:
        """Of the model and its adapters."""
        return (*self._service.served, *sorted(self._service.limits.adapters))

    def _check_name(self, name: str | None, others: Collection[str] = PLACEHOLDERS) -> None:
        """Raises ModelNotFound for a name that is neither one of these nor one of the others."""
        if name is not None and name not in others and name not in self._names():
            raise ModelNotFound(f"model: got {shorten(name)}, allowed: {', '.join(self._names())}")

    # ------------------------------------------------------------ models

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        is_adapter = name in service.limits.adapters and name not in service.served
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "headrace",
            "root": name if not is_adapter else service.served[0],
            "parent": service.served[0] if is_adapter else None,
            "max_model_len": service.limits.max_model_len,
        }

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._model(name) for name in dict.fromkeys(self._names())]})

    async def model(self, model: str) -> Response:
        """GET /v1/models/{id}. Raises ModelNotFound."""
        self._check_name(model, ())
        return json_response(self._model(model))

    # ------------------------------------------------------------ text and tokens

    async def tokenize(self, request: HttpRequest) -> Response:
        """POST /tokenize: vLLM's, llama.cpp's and TGI's body, told apart by their first field."""
        service = self._service
        body = await service.read_json(request)
        if "inputs" in body:
            return await tgi_tokenize(service, body)
        unknown = Unknown(service.settings.strict)
        fields = Fields(body, unknown)
        self._check_name(fields.text("model", MAX_NAME))
        if "messages" in body:
            chat = {name: fields.take(name) for name in CHAT_FIELDS}
            asked = read_body("chat", chat, strict=service.settings.strict)
            unknown.names += asked.ignored
            style = service.settings.tool_parser
            found = await service.work(
                lambda: engine_requests(asked, service.opened, "", tool_parser=style), asked.has_images
            )
            ids = list(found[0].token_ids)
        elif "content" in body:
            ids = await self._encode(fields, "content", fields.flag("add_special"))
            fields.finish("this body")
            return json_response({"tokens": ids}, ignored_header(unknown.names))
        else:
            ids = await self._encode(fields, "prompt", fields.flag("add_special_tokens", True))
        strings = None
        if fields.flag("return_token_strs"):
            strings = service.opened.tokenizer.tokens(ids, skip_special_tokens=False)
        fields.finish("this body")
        count, longest = len(ids), service.limits.max_model_len
        told = {"count": count, "max_model_len": longest, "tokens": ids, "token_strs": strings}
        return json_response(told, ignored_header(unknown.names))

    async def _encode(self, fields: Fields, name: str, special: bool) -> list[int]:
        text = fields.take(name)
        if not isinstance(text, str):
            raise InvalidParameter(name, text, "a string")
        tokenizer = self._service.opened.tokenizer
        return await self._service.work(lambda: tokenizer.encode(text, add_special_tokens=special))

    async def detokenize(self, request: HttpRequest) -> Response:
        """POST /detokenize."""
        service = self._service
        unknown = Unknown(service.settings.strict)
        fields = Fields(await service.read_json(request), unknown)
        self._check_name(fields.text("model", MAX_NAME))
        ids = fields.take("tokens")
        high = service.limits.vocab_size
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < high for one in ids):
            raise InvalidParameter("tokens", ids, f"a list of token ids from 0 to {high - 1}")
        fields.finish("this body")
        text = await service.work(lambda: service.opened.tokenizer.decode(ids, skip_special_tokens=False))
        return json_response({"prompt": text, "content": text}, ignored_header(unknown.names))

    async def tokenizer_info(self) -> Response:
        """GET /tokenizer_info."""
        tokenizer = self._service.opened.tokenizer
        info: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
        info |= dict(tokenizer.special_tokens)
        info["chat_template"] = tokenizer.chat_template
        info["tokenizer_class"] = "PreTrainedTokenizerFast"
        info["model_max_length"] = self._service.limits.max_model_len
        return json_response(info)

    async def version(self) -> Response:
        """GET /version."""
        return json_response({"version": __version__})
