"""A real S3 server on this machine, in threads of the test's process: moto's."""

import logging
import re
from typing import Any

import boto3
import httpx
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class S3(logging.Handler):
    """The server, which can be gone for a while and keeps its buckets; it counts the calls that it answers.

    Attributes:
        env: what finds it.
        calls: of each request since `forget`, its method and path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        log = logging.getLogger("werkzeug")
        log.addHandler(self)
        log.setLevel(logging.INFO)
        log.propagate = False
        self.port = 0
        self.start()
        self.env = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def start(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()

    def emit(self, record: logging.LogRecord) -> None:
        call = re.search(r"(GET|PUT|HEAD|POST|DELETE) (\S+) HTTP", record.getMessage())
        if call:
            self.calls.append(f"{call[1]} {call[2]}")

    def count(self, *words: str) -> int:
        """Calls that hold all of ``words``."""
        return sum(all(word in call for word in words) for call in self.calls)

    @property
    def listings(self) -> int:
        return self.count("GET", "list-type=2", "delimiter=&")

    def refuse(self, yes: bool) -> None:
        """Whether keys that it does not know are refused from now on."""
        url = f"{self.env['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        httpx.post(url, content="0" if yes else "inf").raise_for_status()
