"""Whether every file that the database knows is there: `python -m service.verify_program --help`.

After a restore, or when a disk is doubted. It changes nothing, and may run beside the service. Exit status 0 if all is
there, 1 if something is missing or damaged, 3 if the database or the files cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from service import database, inventory
from service.errors import ServiceError
from service.settings import load_settings
from service.storage import open_storage

WRONG, UNREACHABLE = 1, 3


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        found = _examine(options)
    except ValidationError as error:
        return _fail(f"not all settings are there: {', '.join(str(each['loc'][0]) for each in error.errors())}")
    except SQLAlchemyError as error:
        return _fail(f"the database cannot be used (is it migrated?): {getattr(error, 'orig', None) or error}")
    except (OSError, ServiceError, ValueError) as error:  # of a data folder that is refused a ValueError
        return _fail(f"the files cannot be read: {error}")
    if options.json:
        print(json.dumps(found))
    else:
        _tell(found)
    return WRONG if found["faults"] else 0


def _examine(options: argparse.Namespace) -> dict[str, Any]:
    settings = load_settings()
    bind, files = database.engine(settings), open_storage(settings)
    looked_at = 0

    def count() -> None:
        nonlocal looked_at
        looked_at += 1

    try:
        wrong = inventory.faults(bind, files, hashes=options.hashes, on_file=count)
        stray = inventory.unowned(bind, files)
        refused = _why_not(bool(wrong), inventory.knows_anything(bind)) if options.collect else None
        if options.collect and refused is None:
            for path in stray:
                files.doubt(path)
    finally:
        bind.dispose()
    collected = options.collect and refused is None
    shown = {"files": looked_at, "hashes": options.hashes, "faults": [asdict(each) for each in wrong]}
    return {**shown, "unowned": stray, "collected": collected, "not_collected_because": refused}


def _why_not(wrong: bool, knows_anything: bool) -> str | None:
    """Against a database that is not the one of these files: an hour later they would be gone."""
    if wrong:
        return "files are missing or damaged: this may not be the database of these files"
    return None if knows_anything else "the database knows of nothing: it may not be the one of these files"


def _tell(found: dict[str, Any]) -> None:
    for fault in found["faults"]:
        print(f"{fault['path']} {fault['what']} ({fault['owner']})")
    for path in found["unowned"]:
        print(f"{path} is nobody's")
    checked = "their hashes" if found["hashes"] else "their sizes"
    wrong, stray = len(found["faults"]), len(found["unowned"])
    print(f"{found['files']} files, {checked} checked: {wrong} wrong; {stray} folders are nobody's")
    if found["collected"]:
        print("what is nobody's is noted: the sweeper removes it in an hour, if it still is then")
    elif found["not_collected_because"]:
        print(f"nothing is noted for removal: {found['not_collected_because']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.verify_program", description="Rows against files.")
    parser.add_argument("--hashes", action="store_true", help="read everything and compare SHA-256s, not only sizes")
    parser.add_argument(
        "--collect", action="store_true", help="have the sweeper remove what is nobody's, an hour later"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return UNREACHABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
