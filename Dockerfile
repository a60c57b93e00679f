# syntax=docker/dockerfile:1.7@sha256:a57df69d0ea827fb7266491f2813635de6f17269be881f696fbfdf2d83dda33e
FROM python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b AS build
WORKDIR /build
COPY requirements-build.lock requirements-extras.lock ./
RUN python -m venv /tools \
 && /tools/bin/pip install --no-cache-dir --require-hashes -r requirements-build.lock
# What runs gets neither pip nor setuptools.
RUN python -m venv --without-pip /app \
 && /tools/bin/pip --python /app/bin/python install --no-cache-dir --require-hashes --no-deps -r requirements-extras.lock
COPY pyproject.toml README.md ./
COPY models models
COPY tasks tasks
COPY worker worker
COPY migrations migrations
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /tools/bin/pip --python /app/bin/python install --no-cache-dir --no-index --no-deps /wheels/*.whl

FROM python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
RUN groupadd --system --gid 10001 confirm-offer \
 && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin confirm-offer
COPY --from=build /app /app
# No caches of malloc for each thread: they grow for hours, to 25 MiB of 256 threads, and threads on one core gain nothing.
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 GLIBC_TUNABLES=glibc.malloc.tcache_count=0
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --start-interval=5s --retries=3 CMD ["confirm-offer", "health"]
ENTRYPOINT ["confirm-offer"]
CMD ["worker"]
