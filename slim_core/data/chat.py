"""Chat templates: a conversation as text, and which parts of it the assistant wrote.

A template is a Jinja program that came with somebody's model. It runs in Jinja's immutable sandbox with the settings
and helpers that Hugging Face's `apply_chat_template` gives it, and nothing else of a tokenizer's folder is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, for tokenizers that come without a template."""
ASSISTANT = "assistant"


class ChatTemplateError(ValueError):
    """A template that is not one, or that does not take this conversation."""


class ChatTemplate:
    """A template and the special tokens that it may name (bos_token, eos_token, ...). Jinja is loaded on first use."""

    def __init__(self, source: str = DEFAULT_TEMPLATE, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})

    def render(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False) -> str:
        """The text of a conversation, with `generation_prompt` up to where the assistant's next message begins.

        Raises ChatTemplateError.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generation_prompt, **self._special_tokens
            )
        except (MemoryError, ChatTemplateError):
            raise
        except Exception as error:  # whatever a template does wrong
            raise ChatTemplateError(f"the chat template does not take it: {error}") from error

    def segments(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it has a loss: an assistant's message from behind the generation
        prompt to its end, with what the template closes it with.

        The pieces come from rendering the conversation up to each of them. Raises ChatTemplateError for a template that
        writes earlier messages in another way when later ones are there: its text cannot be told apart like that.
        """
        done = ""
        pieces = []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before = self._before(messages[:index])
                after = self.render(messages[: index + 1])
                if not (before.startswith(done) and after.startswith(before)):
                    raise ChatTemplateError(
                        f"the chat template writes what is before message {index + 1} in another way when that message "
                        "is there: which part is the assistant's cannot be told"
                    )
                pieces += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        whole = self.render(messages)
        if not whole.startswith(done):
            raise ChatTemplateError(
                "the chat template writes the assistant's messages in another way when others follow: which part is "
                "the assistant's cannot be told"
            )
        return [piece for piece in [*pieces, (whole[len(done) :], False)] if piece[0]]

    def _before(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self.render(messages, generation_prompt=True)
        except ChatTemplateError as error:
            if messages:
                raise
            raise ChatTemplateError("the chat template takes no conversation that the assistant begins") from error

    @cached_property
    def _template(self) -> Template:
        # The trainer's process, and one that only counts bytes, do without.
        from jinja2 import TemplateError, TemplateSyntaxError, nodes  # noqa: PLC0415
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        class Generation(Extension):
            """{% generation %} ... {% endgeneration %}, which some templates put around the assistant's part."""

            tags = {"generation"}  # noqa: RUF012  # as Jinja wants it

            def parse(self, parser: Any) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.Scope(body, lineno=line)

        def raise_exception(message: str) -> NoReturn:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        # No strftime_now, which is optional: a conversation has the same tokens on every day.
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"the chat template is not one: line {error.lineno}: {error.message}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
