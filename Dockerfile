# gpt-serve serve, on NVIDIA GPUs and without one (torch's wheels bring CUDA; the host brings the driver):
#   docker build -t gpt-serve .
#   docker run --gpus all -p 8000:8000 -v "$PWD/adapters:/adapters:ro" gpt-serve
# With Prometheus and Grafana: compose.yaml.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 10001 serve

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY gpt_serve gpt_serve
RUN pip install --no-cache-dir --constraint constraints.txt '.[otel]' && rm -rf /src/*

COPY --chown=10001 adapters /adapters
USER 10001
WORKDIR /home/serve
ENV PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
# /health answers as long as the process lives; orchestrators ask /ready before they send traffic.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["gpt-serve", "serve", "--host", "0.0.0.0", "--adapters", "/adapters"]
CMD ["--device", "auto"]
