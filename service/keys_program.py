"""Make, list and revoke API keys in the database that DATABASE_URL names: `python -m service.keys_program --help`.

One JSON value on stdout; `slimtune keys` shows it to people. A refusal is `{"error": "..."}` with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from typing import Any

import sqlalchemy
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service import database, keys
from service.errors import NotFoundError
from service.limits import Limits
from service.models import ApiKey
from service.settings import DatabaseSettings

MAX_NAME_CHARACTERS = 200
FIELDS = (
    "id",
    "tenant",
    "name",
    "prefix",
    "created_at",
    "expires_at",
    "revoked_at",
    "last_used_at",
    "requests_per_minute",
    "max_jobs",
    "max_bytes",
)
"""Of a key that are shown: all but its hash."""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        engine = sqlalchemy.create_engine(DatabaseSettings().database_url, poolclass=sqlalchemy.NullPool)
        with database.transaction(engine) as session:
            answer = _answer(session, options)
    except (NotFoundError, ValueError) as error:
        reason = "DATABASE_URL is not set, or is no URL" if isinstance(error, ValidationError) else str(error)
        return _refuse(reason)
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        return _refuse(f"the database cannot be used (is it migrated?): {cause}")
    print(json.dumps(answer))
    return 0


def _answer(session: Session, options: argparse.Namespace) -> Any:
    if options.command == "list":
        return [_shown(row) for row in keys.listed(session, options.tenant)]
    if options.command == "revoke":
        return _shown(keys.revoke(session, options.id))
    limits = Limits(options.requests_per_minute, options.max_jobs, options.max_bytes)
    row, key = keys.create(session, options.tenant, options.name[:MAX_NAME_CHARACTERS], limits, options.expires_days)
    return {"key": key, **_shown(row)}


def _shown(row: ApiKey) -> dict[str, Any]:
    values = {field: getattr(row, field) for field in FIELDS}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.keys_program", description="API keys, for the operator.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="a new key, which is shown this once")
    create.add_argument("--tenant", required=True)
    create.add_argument("--name", required=True, help="for people")
    for limit in ("--requests-per-minute", "--max-jobs", "--max-bytes"):
        create.add_argument(limit, type=_positive)
    create.add_argument("--expires-days", type=_days)
    commands.add_parser("list", help="all keys").add_argument("--tenant")
    commands.add_parser("revoke", help="make a key invalid").add_argument("id")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number < 2**63:
        raise argparse.ArgumentTypeError("must be at least 1 and below 2^63")
    return number


def _days(text: str) -> float:
    days = float(text)
    if not 0 < days <= 36_500:
        raise argparse.ArgumentTypeError("must be above 0, and 36500 at most")
    return days


def _refuse(reason: str) -> int:
    print(json.dumps({"error": reason}))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
