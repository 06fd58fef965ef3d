"""The server with its adapters in a bucket."""

import time
from pathlib import Path

import pytest

from gpt_serve.adapters.exchange import push
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.specs import BackboneSpec
from tests.factories import make_adapter
from tests.s3 import S3
from tests.serve.harness import ServerProcess, until
from tests.serve.test_hot_swap import Sender

pytestmark = pytest.mark.slow


def test_adapters_are_replaced_in_the_bucket_and_the_bucket_is_gone_while_clients_send(
    s3: S3, spec: BackboneSpec, image: bytes, tmp_path: Path
) -> None:
    versions = [make_adapter(spec, "birds", seed=seed, labels=[f"v{seed}-{c}" for c in range(4)]) for seed in range(3)]
    folder = AdapterStore(tmp_path / "adapters")
    labels: dict[str, str] = {}

    def publish(version: int) -> str:
        revision = folder.publish(versions[version])
        labels[revision] = f"v{version}-"
        push(folder.root, "birds", "s3://models/team")
        return revision

    publish(0)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with ServerProcess("s3://models/team", env=environment, engine="torch", poll_seconds=0.5) as server:  # type: ignore[arg-type]
        server.wait_ready()
        sender = Sender(server.url, "birds", image)
        sender.start()
        try:
            second = publish(1)
            until(lambda: sender.results and sender.results[-1][3]["revision"] == second, 20)
            s3.stop()
            try:
                sent = len(sender.results)
                time.sleep(3)
                assert len(sender.results) > sent + 10
            finally:
                s3.start()
            third = publish(2)
            until(lambda: sender.results[-1][3]["revision"] == third, 60)
            s3.calls.clear()
            time.sleep(2)
            assert 1 <= s3.listings <= 8, "one for both processes in each half second"
            assert s3.count(".safetensors") == 0
        finally:
            sender.stopped.set()
            sender.join()
    for _, _, status, answer in sender.results:
        assert status == 200, answer
        assert all(best["label"].startswith(labels[answer["revision"]]) for best in answer["predictions"])
