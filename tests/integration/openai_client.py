"""OpenAI's own client over the API in this process."""

from __future__ import annotations

from openai import OpenAI
from starlette.testclient import TestClient


def openai_over(client: TestClient, max_retries: int = 0) -> OpenAI:
    return OpenAI(api_key="none", base_url="http://testserver/v1", http_client=client, max_retries=max_retries)
