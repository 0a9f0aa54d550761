"""One sample for the API, in a process of its own: the API never loads torch, and workers may be busy for days.

    python -m slim_core.sampler        started by the API (api/sampler.py); for people there is slim_core.generate

One JSON object on stdin: `folder`, `prompt` or `messages` ({role, content}), `max_tokens`, `temperature`, `top_k`,
`top_p`, `stop`, `seed`, and the limits `memory_bytes` and `seconds`. stdin then stays open, and its end means that the
API is gone: the process dies. stdout has one JSON object a line: `started` (`prompt_tokens`), `token` (`text`: a piece
that ends where a character does; `tokens`: how many so far), at the end `done` (`finish_reason`, `tokens`), or `error`
(`code`, `message`, ...).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from slim_core.data.chat import ASSISTANT, ChatTemplate, ChatTemplateError
from slim_core.data.tokenizer import Tokenizer, load_tokenizer
from slim_core.lifeline import die_with_parent
from slim_core.sampler_memory import required_bytes
from slim_core.text_stream import TextStream
from slim_core.weights.folder import read_config

MAX_PROMPT_TOKENS = 32_768
NICENESS = 5
"""As trainers have it: the API, which others wait for, goes first."""

Message = dict[str, Any]


class _RefusedError(Exception):
    """A request that cannot be met; what the API should answer."""

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message: Message = {"type": "error", "code": code, "message": message, **fields}


def main() -> int:
    """Answer the request on stdin. The exit status says nothing that stdout does not."""
    die_with_parent()
    os.nice(NICENESS)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_at_end_of_stdin, daemon=True).start()
    limit = request["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for message in answer(request):
        _send(output, message)
    return 0


def answer(request: Message) -> Iterator[Message]:
    """The messages of stdout. Raises nothing: what goes wrong is the last of them."""
    folder = Path(request["folder"])
    try:
        yield from _sample(folder, request, time.monotonic() + request["seconds"])
    except _RefusedError as error:
        yield error.message
    except Exception as error:  # noqa: BLE001  # whatever it is, the client must hear of it
        if not (folder / "config.json").exists():
            yield {"type": "error", "code": "gone", "message": "the folder is not there", "name": folder.name}
        elif _is_out_of_memory(error):
            yield _no_memory(request["memory_bytes"], None).message
        else:
            code = (
                "damaged"
                if type(error).__name__ in ("CheckpointError", "ModelFolderError", "TokenizerError")
                else "failed"
            )
            yield {"type": "error", "code": code, "message": f"{type(error).__name__}: {error}"[:500]}


def _sample(folder: Path, request: Message, deadline: float) -> Iterator[Message]:
    config = read_config(folder)
    tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").exists() else None)
    prompt, stop = _prompt(tokenizer, request)
    longest = min(MAX_PROMPT_TOKENS, config.max_positions or MAX_PROMPT_TOKENS)
    if not 1 <= len(prompt) <= longest:
        message = f"The prompt has {len(prompt)} tokens; at most {longest} are possible."
        raise _RefusedError("prompt_too_long", message, prompt_tokens=len(prompt), max_prompt_tokens=longest)
    if max(prompt) >= config.vocab_size:
        raise _RefusedError("damaged", "the tokenizer has more tokens than the model")
    required = required_bytes(config, len(prompt) + request["max_tokens"])
    if required > request["memory_bytes"]:
        raise _no_memory(request["memory_bytes"], required)

    from slim_core.generate import Sampling, generate  # noqa: PLC0415  # torch: not before it is known to have room
    from slim_core.weights.checkpoint import load_model  # noqa: PLC0415

    tokens = generate(
        load_model(folder),
        prompt,
        max_tokens=request["max_tokens"],
        end_of_document=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size,
        sampling=Sampling(request["temperature"], request["top_k"], request["top_p"], request["seed"]),
        deadline=deadline,
    )
    yield {"type": "started", "prompt_tokens": len(prompt)}
    stream = TextStream(tokenizer.decode, stop, before=prompt)
    count = 0
    while not stream.stopped:
        try:
            token = next(tokens)
        except StopIteration as end:
            reason = end.value
            break
        count += 1
        if piece := stream.push(token):
            yield {"type": "token", "text": piece, "tokens": count}
    if piece := stream.finish():
        yield {"type": "token", "text": piece, "tokens": count}
    yield {"type": "done", "finish_reason": "stop" if stream.stopped else reason, "tokens": count}


def _prompt(tokenizer: Tokenizer, request: Message) -> tuple[list[int], list[str]]:
    """The tokens to continue, and the texts to stop at."""
    if request["messages"] is None:
        return tokenizer.encode(request["prompt"]), request["stop"]
    try:
        text, closing = _conversation(tokenizer.chat_template, request["messages"])
    except ChatTemplateError as error:
        raise _RefusedError("chat_template", str(error)) from error
    return tokenizer.encode(text), [*request["stop"], *closing]


def _conversation(template: ChatTemplate, messages: list[dict[str, str]]) -> tuple[str, list[str]]:
    """A conversation up to where the assistant answers, and what the template closes an answer with, if anything: a
    model may have learned to write that before it ends a document.
    """
    text = template.render(messages, generation_prompt=True)
    stand_in = "answer"
    answered = template.render([*messages, {"role": ASSISTANT, "content": stand_in}])
    closing = answered.removeprefix(text + stand_in).strip() if answered.startswith(text + stand_in) else ""
    return text, [closing] if closing else []


def _no_memory(limit: int, required: int | None) -> _RefusedError:
    about = "more" if required is None else f"about {required} bytes"
    message = f"Sampling from this checkpoint takes {about}; SLIMTUNE_GENERATE_MEMORY_BYTES allows {limit}."
    fields = {"setting": "SLIMTUNE_GENERATE_MEMORY_BYTES", "limit_bytes": limit, "required_bytes": required}
    return _RefusedError("memory", message, **fields)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from slim_core.memory import is_out_of_memory  # noqa: PLC0415  # imports torch, which is there

    return is_out_of_memory(error)


def _send(output: BinaryIO, message: Message) -> None:
    output.write(json.dumps(message).encode() + b"\n")
    output.flush()


def _die_at_end_of_stdin() -> None:
    # The raw descriptor: a buffered read would hold a lock that the interpreter's end wants.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
