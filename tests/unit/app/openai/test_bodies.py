"""A field that the `openai` package has gained is noticed here: it is served, without effect, or refused by name."""

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_params

from app.openai.bodies import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatBody,
    CompletionBody,
    PromptCacheOptions,
    StreamOptions,
)


def fields_of(params):
    return {name for base in params.__mro__ for name in getattr(base, "__annotations__", ())}


@pytest.mark.parametrize(
    ("params", "body"),
    [
        (chat_params.CompletionCreateParamsStreaming, ChatBody),
        (completion_params.CompletionCreateParamsStreaming, CompletionBody),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (chat_params.PromptCacheOptions, PromptCacheOptions),
    ],
)
def test_every_field_of_the_openai_package_is_known(params, body):
    assert fields_of(params)
    assert fields_of(params) - set(body.__struct_fields__) == set()


@pytest.mark.parametrize(
    ("unsupported", "body"), [(UNSUPPORTED_CHAT, ChatBody), (UNSUPPORTED_COMPLETION, CompletionBody)]
)
def test_every_refused_field_is_one(unsupported, body):
    assert set(unsupported) <= set(body.__struct_fields__)
