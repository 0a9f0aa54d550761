# Two images: `api` without torch (migration, sweeper, an API that does not sample) and `worker`, which adds it.
#   docker build --target api -t slimtune-api . && docker build --target worker -t slimtune-worker .
# --build-arg SLIMTUNE_REVISION=$(git rev-parse HEAD) is what GET /version says then.

# The trainer's heap is C; no compiler goes into the images.
FROM python:3.11-slim-bookworm AS heap
RUN apt-get update -qq && apt-get install -qq --no-install-recommends gcc libc6-dev
COPY slim_core/tensor_heap.c /
RUN gcc -O2 -fPIC -shared -fvisibility=hidden -o /_tensor_heap.so /tensor_heap.c

FROM python:3.11-slim-bookworm AS api
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin slimtune \
 && install -d -o slimtune -g slimtune /data \
 && python -m venv /venv
WORKDIR /app
# The dependencies are a layer of their own: they change less often than the code.
COPY pyproject.toml requirements.lock ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['traces'], sep='\n')" \
      > /tmp/requirements.txt \
 && pip install --quiet -r /tmp/requirements.txt -c requirements.lock \
 && rm /tmp/requirements.txt
COPY . .
ARG SLIMTUNE_REVISION=
ENV SLIMTUNE_DATA_DIR=/data SLIMTUNE_AUTHENTICATION=keys SLIMTUNE_REVISION=$SLIMTUNE_REVISION
USER slimtune
EXPOSE 8000
CMD ["python", "-m", "cli.main", "api", "--host", "0.0.0.0", "--port", "8000"]

FROM api AS worker
USER root
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['train'], sep='\n')" \
      > /tmp/requirements.txt \
 && pip install --quiet -r /tmp/requirements.txt -c requirements.lock \
 && rm /tmp/requirements.txt
COPY --from=heap /_tensor_heap.so slim_core/
USER slimtune
CMD ["python", "-m", "cli.main", "worker"]
