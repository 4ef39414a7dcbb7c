"""The shapes of what the gateway answers, for the OpenAPI document and for tests that hold it to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """A reply may hold more than is told here: an expert's server adds what it likes."""

    model_config = ConfigDict(extra="allow")


class ErrorBody(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Reply):
    """An error in OpenAI's shape."""

    error: ErrorBody


class ReplyMessage(Reply):
    """What was answered."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ReplyMessage
    finish_reason: str | None


class ChatCompletion(Reply):
    """A whole answer to a chat; a graph's tells under `agora` how it came about."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    agora: dict[str, Any] = {}


class TextChoice(Reply):
    """One continuation."""

    index: int
    text: str
    finish_reason: str | None


class TextCompletion(Reply):
    """A whole continuation of a text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]


class ModelCard(Reply):
    """Somebody who can be asked; `agora` tells more."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Reply):
    """All who can be asked."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(Reply):
    """How the node is."""

    status: str


class NodeCard(Reply):
    """What a node tells its neighbours."""

    revision: str | int


class Neighbours(Reply):
    """How the neighbours are."""

    object: Literal["list"]
    data: list[dict[str, Any]]
