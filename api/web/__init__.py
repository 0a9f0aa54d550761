"""The dashboard: pages for people, made on the server, over the same functions and routes as the API.

    /                  jobs
    /ui/new            a new job, with the curve of memory against time
    /ui/jobs/{id}      a job
    /ui/compare        two jobs
    /ui/data           datasets, models, tokenizers
    /ui/devices        what jobs run on
    /ui/login          a session for an API key, where keys are required
    /ui/static/...     styles and scripts

Scripts of the pages ask the API itself, with the session's cookie (api/browsers.py).
"""

OPEN = ("/ui/static/", "/ui/login")
"""Without a key: the beginnings of paths."""


def is_page(path: str) -> bool:
    """Whether a person's browser shows what this path answers, so that its errors are pages too."""
    return path == "/" or path.startswith("/ui/")
