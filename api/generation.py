"""What the request for a sample may say, and its answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas import INTEGER_END, Text

MAX_PROMPT_CHARACTERS = 200_000
"""Of text; what a model reads of it is limited in tokens."""
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class MessageFields(BaseModel):
    model_config = _STRICT

    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, Field(max_length=MAX_PROMPT_CHARACTERS)]


StopText = Annotated[Text, Field(min_length=1, max_length=100)]


class GenerateRequest(BaseModel):
    """What to continue, from which checkpoint, and how."""

    model_config = _STRICT

    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)] | None = Field(
        None, description="Text to continue. This or `messages`."
    )
    messages: Annotated[list[MessageFields], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="A conversation to answer, written by the chat template of the model's tokenizer."
    )
    checkpoint: Literal["latest", "best", "final"] | Annotated[int, Field(ge=0, lt=INTEGER_END)] = Field(
        "latest", description="Or a step."
    )
    max_tokens: int = Field(200, ge=1, le=4_096, description="Where the text ends at the latest.")
    temperature: float = Field(0.8, ge=0, le=10, description="0 takes the most likely token every time.")
    top_k: int | None = Field(None, ge=1, lt=2**31, description="Only the k most likely tokens.")
    top_p: float = Field(1.0, gt=0, le=1, description="Only the most likely tokens with this probability together.")
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] = Field(
        [], description="The text ends before the first of these."
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=INTEGER_END,
        description="The same seed, checkpoint and request give the same text; null: any.",
    )
    stream: bool = Field(False, description="Answer `text/event-stream`: `token` events as they come, then `done`.")


class GenerateResponse(BaseModel):
    text: str = Field(description="What follows the prompt, without a stop text.")
    finish_reason: Literal["stop", "length", "time"] = Field(
        description="The end of a document or a stop text; `max_tokens`, or the last of a model's learned positions; "
        "the server's time limit."
    )
    tokens: int = Field(description="Tokens that were drawn, those of a stop text included.")
    prompt_tokens: int
    seconds: float = Field(description="From the start of the process, the loading of the model included.")
    step: int = Field(description="The checkpoint.")
    seed: int


GENERATE_EXAMPLES: dict[str, Any] = {
    "prompt": {
        "summary": "Continue a text",
        "value": {"prompt": "The import statement", "checkpoint": "best", "max_tokens": 100},
    },
    "conversation": {
        "summary": "Answer a question, as a stream",
        "value": {"messages": [{"role": "user", "content": "What is a tuple?"}], "temperature": 0.5, "stream": True},
    },
}
