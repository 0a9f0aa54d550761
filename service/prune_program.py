"""Delete what has had its time, all of it and now: `python -m service.prune_program --help`.

The sweeper does the same little by little (retention.py). Exit status 0, or 3 if the database or the files cannot be
reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from service import database, retention
from service.errors import ServiceError
from service.retention import Pruned
from service.settings import Settings, load_settings
from service.storage import open_storage

UNREACHABLE = 3


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service.prune_program", description="Delete what has had its time."
    )
    parser.add_argument("--dry-run", action="store_true", help="only say how much it would be")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings()
        pruned = _prune(settings, dry_run=options.dry_run)
    except ValidationError as error:
        return _fail(f"a setting is missing or wrong: {', '.join(str(each['loc'][0]) for each in error.errors())}")
    except SQLAlchemyError as error:
        return _fail(f"the database cannot be used (is it migrated?): {getattr(error, 'orig', None) or error}")
    except (OSError, ServiceError, ValueError) as error:  # of a data folder that is refused a ValueError
        return _fail(f"files cannot be deleted: {error}")
    if options.json:
        print(json.dumps({"dry_run": options.dry_run, **asdict(pruned)}))
    elif not any((settings.keep_metrics_days, settings.keep_checkpoints_days, settings.keep_jobs_days)):
        names = "SLIMTUNE_KEEP_METRICS_DAYS, SLIMTUNE_KEEP_CHECKPOINTS_DAYS or SLIMTUNE_KEEP_JOBS_DAYS"
        print(f"nothing ever goes: none of {names} is set here")
    elif options.dry_run:
        print(
            f"to delete: {pruned.jobs} jobs, {pruned.checkpoints} checkpoints; {pruned.thinned_jobs} curves to thin out"
        )
    else:
        rows = f"{pruned.metrics} points and {pruned.events} events of {pruned.thinned_jobs} jobs"
        print(f"deleted: {pruned.jobs} jobs, {pruned.checkpoints} checkpoints, {rows}")
    return 0


def _prune(settings: Settings, *, dry_run: bool) -> Pruned:
    bind, files = database.engine(settings), open_storage(settings)
    try:
        if dry_run:
            with database.transaction(bind) as session:
                return retention.due(session, settings)
        pruned = Pruned()
        while (more := retention.prune(bind, files, settings)).anything:
            pruned += more
        return pruned
    finally:
        bind.dispose()


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return UNREACHABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
