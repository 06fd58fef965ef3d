# gpt-serve serve on an NVIDIA GPU:
#   docker build -t gpt-serve .
#   docker run --gpus all -p 8000:8000 -v "$PWD/adapters:/adapters:ro" gpt-serve
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/gpt-serve \
 && useradd --create-home --uid 10001 serve

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gpt_serve gpt_serve
RUN /opt/gpt-serve/bin/pip install --no-cache-dir --constraint constraints.txt . && rm -rf /src/*

COPY --chown=serve adapters /adapters
USER serve
WORKDIR /home/serve
ENV PATH=/opt/gpt-serve/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
# /health answers as long as the process lives; orchestrators ask /ready before they send traffic.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["gpt-serve", "serve", "--host", "0.0.0.0", "--adapters", "/adapters"]
CMD ["--device", "auto"]
