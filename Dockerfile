# A run as a service: docker build -t nqf-serve . ; docker run -p 8000:8000 -v RUN_FOLDER:/run-folder nqf-serve
FROM python:3.12-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY configs configs
COPY nqf nqf
# The versions are those that pyproject.toml allows.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[serve]' && useradd --create-home --uid 1000 nqf \
  && mkdir /run-folder && chown nqf /run-folder
USER 1000
ENV JAX_PLATFORMS=cpu
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD \
  ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Inside the container, all addresses are those that -p opens.
ENTRYPOINT ["nqf", "serve", "/run-folder", "--host", "0.0.0.0"]
