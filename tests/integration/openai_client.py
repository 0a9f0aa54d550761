"""OpenAI's own client over the API in this process."""

from __future__ import annotations

from openai import OpenAI
from starlette.testclient import TestClient


def openai_over(client: TestClient, api_key: str = "none") -> OpenAI:
    base_url = str(client.base_url).rstrip("/") + "/v1"
    return OpenAI(api_key=api_key, base_url=base_url, http_client=client, max_retries=0)
