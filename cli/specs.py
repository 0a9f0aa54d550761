"""A job as a user describes it: a YAML or JSON file, and what the command line changes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from cli.client import Client

DATA_FIELDS = ("dataset", "validation_dataset")
DURATIONS = ("steps", "epochs")
"""A job has one of them, so a choice of one takes the place of the file's other."""


class SpecError(ValueError):
    """The description of a job cannot be read; says where and why."""


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as everybody means it, and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise SpecError(f"line {node.start_mark.line + 1}: a key is there twice")
        return mapping


_Loader.add_implicit_resolver(  # YAML 1.1 wants a dot and a sign in it
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_spec(path: Path | None, given: Mapping[str, Any], settings: Sequence[str] = ()) -> dict[str, Any]:
    """The body of a job: the file's fields, over which go those `given` that are not None, and `settings` such as
    `optimizer.learning_rate=3e-4`. Raises SpecError."""
    spec = {} if path is None else _load(path.read_text(encoding="utf-8"), str(path))
    chosen = {name: value for name, value in given.items() if value is not None}
    for wanted, other in (DURATIONS, DURATIONS[::-1]):
        if wanted in chosen and other not in chosen:
            spec.pop(other, None)
    spec.update(chosen)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise SpecError(f"--set {setting}: must be field=value")
        _put(spec, name.split("."), _value(text), setting)
    if "idempotency_key" in spec:
        raise SpecError("idempotency_key: is no field of a job, but an option of `slimtune submit`")
    return spec


def upload_files(client: Client, spec: dict[str, Any], beside: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The spec with the ids of datasets where it names files, which are uploaded unless the service has them already.

    Relative paths are meant from `beside`. Raises SpecError for a file that is not there, ServiceError.
    """
    found = dict(spec)
    for field in DATA_FIELDS:
        value = spec.get(field)
        if not _is_file(value):
            continue
        path = beside / Path(value).expanduser()
        if not path.is_file():
            raise SpecError(f"{field}: {value} is neither a file nor the id of a dataset")
        known = client.datasets.find(path)
        if known is None:
            say(f"uploading {path}")
            known = client.datasets.upload(path)
        say(f"{field}: {path.name} is {known['id']}")
        found[field] = known["id"]
    return found


def without_files(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec without the data that it names by file: a plan in steps needs none."""
    return {name: value for name, value in spec.items() if not (name in DATA_FIELDS and _is_file(value))}


def _is_file(value: object) -> TypeGuard[str]:
    """What is no id of a dataset is meant as a path."""
    return isinstance(value, str) and re.fullmatch("ds_[0-9a-f]{32}", value) is None


def _load(text: str, name: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, SpecError) as error:
        raise SpecError(f"{name}: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{name}: must be fields and values, as in `model: performer-tiny`")
    return {str(key): each for key, each in value.items()}


def _value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError:
        return text


def _put(spec: dict[str, Any], path: Sequence[str], value: Any, setting: str) -> None:
    *folders, last = path
    for name in folders:
        inner = spec.setdefault(name, {})
        if not isinstance(inner, dict):
            raise SpecError(f"--set {setting}: {name} is no group of fields")
        spec = inner
    spec[last] = value
