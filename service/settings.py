"""The configuration of a process. The only reader of the environment."""

from __future__ import annotations

import functools
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service import webhook_urls

LogFormat = Literal["text", "json"]


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether a name or address (an IPv6 one with or without its brackets) means this machine and nothing else."""
    name = host.removeprefix("[").removesuffix("]").rstrip(".").lower()
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """Host, without its brackets, and port of `127.0.0.1:9101` or `[::1]:9101`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not port.isascii() or int(port) > 65_535:
        raise ValueError(f"{address!r} is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{address!r} is not host:port; an IPv6 address stands in brackets")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_private(host: str) -> bool:
    """Whether only this machine or a private network can reach the address. A name may mean any."""
    if is_loopback(host):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_private and not address.is_unspecified


class DatabaseSettings(BaseSettings):
    """What a migration needs."""

    model_config = SettingsConfigDict(
        env_prefix="SLIMTUNE_",
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,  # the input has passwords
    )

    database_url: str = Field(validation_alias="DATABASE_URL")
    """SQLAlchemy URL, `postgresql://` or `postgresql+psycopg://`."""


class Settings(DatabaseSettings):
    """Every variable that slimtune reads; names in the environment are upper case, `SLIMTUNE_` in front of most."""

    redis_url: str = Field(validation_alias="REDIS_URL")
    """Broker URL, `redis://host:port/db` or `redis+socket:///path/of/the.sock`."""
    data_dir: Path
    """Folder of uploads and checkpoints, shared by API and workers; with `storage_url`, this host's own."""
    storage_url: str | None = None
    """Where files lie instead: `s3://bucket/prefix`, or `file:///folder` for one that is mounted. None: in `data_dir`,
    as if it were empty."""
    storage_patience_seconds: float = Field(default=900, ge=0, le=43_200)
    """How long a job goes on while the object store does not answer, before it is paused."""
    cache_bytes: int = Field(default=50 * 1024**3, ge=0)
    """What `data_dir` may hold of files that lie in the object store; what is in use stays beyond that."""
    aws_endpoint_url: str | None = Field(
        default=None, validation_alias=AliasChoices("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    )
    """Of what is like S3, with its scheme. None: of AWS."""
    aws_region: str | None = Field(default=None, validation_alias=AliasChoices("AWS_REGION", "AWS_DEFAULT_REGION"))
    aws_access_key_id: SecretStr | None = Field(default=None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(default=None, validation_alias="AWS_SECRET_ACCESS_KEY")
    aws_session_token: SecretStr | None = Field(default=None, validation_alias="AWS_SESSION_TOKEN")
    """Without a key of its own, a machine's or container's role is what its credentials come from."""
    aws_allow_http: bool = Field(default=False, validation_alias="AWS_ALLOW_HTTP")
    """Whether an endpoint may be reached without TLS."""
    log_format: LogFormat = "text"
    """How every process writes its log: for people, or one JSON object a line."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    authentication: Literal["keys", "none"] | None = None
    """Whether the API asks for keys. None: unless `host`, on which it listens, is a loopback address. Without keys it
    serves this machine alone, wherever it listens."""
    metrics_token: SecretStr | None = None
    """What Prometheus sends for /metrics, as a bearer token. None, or empty: only this machine may ask, and nobody
    where keys are required."""
    otel_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """Where traces go; None, or empty: there are none. The SDK reads the other variables of its own."""
    worker_metrics_address: str | None = None
    """`host:port` at which a worker serves its own numbers; None, or empty: nowhere. A token is asked for if there is
    one, and must be where others than a private network can ask."""
    max_upload_bytes: int = Field(default=2 * 1024**3, ge=1)
    """Largest dataset file that the API takes."""
    max_model_bytes: int = Field(default=16 * 1024**3, ge=1)
    """Largest base model that the API takes, all its files together."""
    max_expanded_bytes: int = Field(default=64 * 1024**3, ge=1)
    """Largest text that a compressed dataset file may stand for."""
    read_seconds: float = Field(default=1_800, gt=0, allow_inf_nan=False)
    """How long the API may compute to read and check one dataset file."""
    trainer_threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    calibration_seconds: float = Field(default=86_400, ge=0, allow_inf_nan=False)
    """Age from which a worker that starts measures its machine again; 0: always."""
    worker_slots: int = Field(default=4, ge=1, le=64)
    """Jobs that one device runs at once, at most; the sum of their caps is the other limit."""
    device_memory_bytes: int | None = Field(default=None, ge=1)
    """What the caps of the jobs on a device may add up to; None: what the worker finds, less a part for the system."""
    device_kind: Literal["cpu", "cuda"] = "cpu"
    """What the trainers of this process compute on. The worker finds out and tells its pool processes."""
    patience_seconds: float = Field(default=600, ge=0, allow_inf_nan=False)
    """How long others may pass a job that does not fit when it is its turn."""
    lease_seconds: float = Field(default=90, gt=0, allow_inf_nan=False)
    """How long a run may stay silent before another worker may take the job."""
    heartbeat_seconds: float = Field(default=5, gt=0, allow_inf_nan=False)
    sweep_seconds: float = Field(default=10, gt=0, allow_inf_nan=False)
    preparer_memory_bytes: int = Field(default=300_000_000, ge=1)
    """What the process may hold that makes a dataset's tokens, or trains or checks a tokenizer."""
    preparer_seconds: float = Field(default=6 * 3_600, gt=0, allow_inf_nan=False)
    """How long that process may take, at most; less for small files."""
    self_kill_seconds: float = Field(default=60, gt=0, allow_inf_nan=False)
    """How long a supervisor may fail to renew its lease before it kills its own trainer."""

    generate_slots: int = Field(default=1, ge=1, le=64)
    """Processes that sample for this API at once, at most."""
    generate_memory_bytes: int = Field(default=4 * 1024**3, ge=256 * 1024**2)
    """Private memory of each."""
    generate_seconds: float = Field(default=60, gt=0, le=3_600, allow_inf_nan=False)
    """After which a sample ends."""
    generate_threads: int = Field(default=1, ge=1)

    event_streams: int = Field(default=512, ge=1, le=100_000)
    """Streams of events that this API has open at once, at most."""
    event_heartbeat_seconds: float = Field(default=15, gt=0, le=3_600, allow_inf_nan=False)
    """Silence after which a stream of events sends a comment."""

    keep_metrics_days: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """From how long after its end on a job keeps no more than a thousand points of its curve, and what of its events
    tells how it went. None, as of the others: for ever."""
    keep_checkpoints_days: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """From how long after its end on a job keeps no checkpoints but its output, or else its newest, and its best."""
    keep_jobs_days: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How long after its end a job is deleted, output and all, once no unfinished job starts from that."""

    revision: str | None = None
    """Of the source that this was built from, for /version."""

    webhook_allowed: str = ""
    """Where webhooks may go: URLs with commas between them, each for all that lies below it. None: nowhere."""

    @field_validator("metrics_token", "revision")
    @classmethod
    def _empty_is_none(cls, value: SecretStr | str | None) -> SecretStr | str | None:
        return value or None

    @field_validator("keep_metrics_days", "keep_checkpoints_days", "keep_jobs_days", mode="before")
    @classmethod
    def _empty_is_for_ever(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("storage_url")
    @classmethod
    def _names_a_store(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "")
        if url and not (
            (parts.scheme == "s3" and parts.netloc and not parts.query)
            or (parts.scheme == "file" and not parts.netloc and parts.path.strip("/"))
        ):
            raise ValueError("must be s3://bucket/prefix or file:///folder")
        return url or None

    @field_validator("otel_endpoint")
    @classmethod
    def _empty_is_no_endpoint(cls, endpoint: str | None) -> str | None:
        return endpoint or None

    @field_validator("worker_metrics_address")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if not address:
            return None
        split_address(address)
        return address

    @field_validator("webhook_allowed")
    @classmethod
    def _can_be_compared(cls, text: str) -> str:
        webhook_urls.Allowed.parse(text)
        return text

    @property
    def keys_required(self) -> bool:
        return self.authentication == "keys" or (self.authentication is None and not is_loopback(self.host))

    @model_validator(mode="after")
    def _a_token_guards_what_others_can_reach(self) -> Self:
        if self.worker_metrics_address is not None and self.metrics_token is None:
            host, _ = split_address(self.worker_metrics_address)
            if not _is_private(host):
                raise ValueError(
                    f"SLIMTUNE_WORKER_METRICS_ADDRESS: {host} can be reached by others; set SLIMTUNE_METRICS_TOKEN, or "
                    "name a loopback or private address"
                )
        return self

    @model_validator(mode="after")
    def _leases_outlast_what_renews_them(self) -> Self:
        if not self.heartbeat_seconds < self.self_kill_seconds < self.lease_seconds:
            raise ValueError(
                "SLIMTUNE_HEARTBEAT_SECONDS must be below SLIMTUNE_SELF_KILL_SECONDS, and that below "
                "SLIMTUNE_LEASE_SECONDS, so that a run ends before another begins; they are "
                f"{self.heartbeat_seconds:g}, {self.self_kill_seconds:g} and {self.lease_seconds:g}"
            )
        return self


@functools.cache
def load_settings() -> Settings:
    """The settings of this process, read once.

    Raises pydantic.ValidationError if a variable is missing or out of range.
    """
    return Settings()
