"""The bodies of requests, as pydantic models: OpenAI's fields and the extra ones that such servers commonly take.

Types are strict ("10" is no number); a field that is null counts as absent. Fields that are unknown to everyone are
ignored, as OpenAI-compatible servers do, but a known one that would change the answer and is not supported is refused
by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Fields this server does not support -> the values with which they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1, 1.0),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}

Number = Annotated[float, Field(allow_inf_nan=False)]
Prompt = str | list[int]


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[Prompt]:
    """A string, token ids, or a list of either; all one type, as the mixture has no meaning in OpenAI's API."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


def _refuse(field: str, message: str) -> PydanticCustomError:
    """An error of a value, naming the field also from a validator of the whole body."""
    return PydanticCustomError("unsupported_value", "{message}", {"message": message, "param": field})


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationBody(BaseModel):
    """What completions and chat completions have in common; the defaults are OpenAI's.

    ``data_parallel_rank`` names the DP rank to run on. ``top_k`` of 0 or -1 is off.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_stops)] = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    data_parallel_rank: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        return {field: value for field, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _supported(self) -> GenerationBody:
        for field, value in (self.model_extra or {}).items():
            harmless = UNSUPPORTED.get(field)
            if harmless is not None and value not in harmless:
                raise _refuse(field, f"'{field}' is not supported by this server")
        if self.stream_options is not None and not self.stream:
            raise _refuse("stream_options", "'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def length(self) -> int | None:
        """The bound on generated tokens that the body gives, or None."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Logprobs to return per token besides the chosen one's; None for none at all."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """``POST /v1/completions``. ``prompt`` is normalised to a list; ``logprobs`` is how many alternatives to return."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise _refuse("logprobs", "'logprobs' together with 'echo' is not supported by this server")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Message(BaseModel):
    """One message; parts of text are joined with line ends. What else it has is for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def rendered(self) -> dict[str, Any]:
        """What the chat template takes."""
        return {**(self.model_extra or {}), "role": self.role, "content": self._text()}

    def _text(self) -> str:
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part["text"] for part in self.content)

    @model_validator(mode="after")
    def _only_text(self) -> Message:
        for part in self.content if isinstance(self.content, list) else ():
            if part.get("type") != "text":
                kind = part.get("type")
                raise _refuse("messages", f"content parts of type {kind!r} are not supported: only 'text' is")
            if not isinstance(part.get("text"), str):
                raise PydanticCustomError("string_type", "a content part of type 'text' must have a string 'text'")
        if (self.model_extra or {}).get("tool_calls"):
            raise _refuse("messages", "'tool_calls' in messages are not supported by this server")
        return self


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise _refuse("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(BaseModel):
    """``POST /tokenize``: of a prompt, or of a conversation through the chat template."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise _refuse("prompt", "give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
