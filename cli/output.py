"""What every command has in common: where the service is, how errors end, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cli.client import DamagedDownloadError, ServiceError
from cli.specs import SpecError

REFUSED = 1
"""The service, or the command itself, refused. 2 is wrong usage, by typer."""
UNREACHABLE = 3
"""No answer, or an error on the service's side: it may work later."""
NOT_SUCCEEDED = 4
"""A job that was waited for failed, was cancelled or paused."""
DAMAGED = 5
"""What was downloaded is not what was registered."""
INTERRUPTED = 130

EXITS = """Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the service cannot be reached or failed, 4 the job did not
succeed, 5 damaged download, 130 interrupted."""

Url = Annotated[str, typer.Option(envvar="SLIMTUNE_URL", help="The service.", rich_help_panel="Service")]
Json = Annotated[bool, typer.Option("--json", help="Print what the service says, as JSON.")]
WIDE = 200
URL = "http://127.0.0.1:8000"


def console(*, stderr: bool = False) -> Console:
    """For people; where it is no terminal nothing is cut to the width of one."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = WIDE
    return made


def print_json(value: Any) -> None:
    """One document, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def exits(*, as_json: bool = False) -> Iterator[None]:
    """Turn what may go wrong in a command into a message on stderr and an exit code; with `as_json` the service's
    problem is printed as it is."""
    try:
        yield
    except ServiceError as error:
        if as_json and error.problem is not None:
            typer.echo(json.dumps(error.problem, indent=2), err=True)
        else:
            _complain(str(error), *_advice(error))
        unreachable = error.status == 0 or error.status >= 500
        raise typer.Exit(UNREACHABLE if unreachable else REFUSED) from error
    except DamagedDownloadError as error:
        _complain(str(error))
        raise typer.Exit(DAMAGED) from error
    except SpecError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def fail(error: Exception | str, code: int = REFUSED) -> NoReturn:
    """Say why on stderr, and end."""
    _complain(str(error))
    raise typer.Exit(code) from (error if isinstance(error, Exception) else None)


def _complain(message: str, *advice: str) -> None:
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    out.print(f"error: {message}", style="red", markup=False)
    for each in advice:
        out.print(f"  - {each}", markup=False)


def _advice(error: ServiceError) -> list[str]:
    """What would help: other fields, what would make a plan fit, what the problem hints at; or a service at all."""
    if error.code == "unreachable" and not getattr(error, "sent", True):
        return ["start the service here with `slimtune up`, or name another one with --url or SLIMTUNE_URL"]
    problem = error.problem or {}
    errors = [f"{each['field']}: {each['message']}" for each in problem.get("errors", [])]
    hint = [problem["hint"]] if problem.get("hint") else []
    return [*(errors if len(errors) > 1 else []), *problem.get("suggestions", []), *hint]
