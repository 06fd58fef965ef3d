"""Runs the trials of a sweep in Ray workers, on this machine or a cluster; the only file that knows Ray."""

import logging
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpt_serve.errors import UsageError
from gpt_serve.train.recipes.recipe import Recipe
from gpt_serve.train.sweep.trial import Work, run_trial
from gpt_serve.train.sweep.trials import Outcome

# Read when Ray is imported or started. Metrics alone pass through it, and an interrupt is this package's to handle.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_worker_niceness": "0",  # of 15: on a busy machine trials would hardly run
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
OBJECT_STORE_BYTES = 80 * 2**20  # little more than the least that Ray takes
CPUS_PER_TRIAL = 4
REDUCTION = 3
FAILED = -1e9  # the score of a failed trial; finite, as percentiles are taken of scores


def require_ray() -> None:
    """Raise `UsageError` where Ray Tune is not installed."""
    os.environ.update(ENVIRONMENT)
    try:
        import ray.tune  # noqa: F401
    except ImportError as error:
        raise UsageError(f"sweep needs Ray Tune ({error}): pip install 'gpt-serve[sweep]'") from error


@dataclass(frozen=True)
class RayRunner:
    """A `Runner` on Ray Tune.

    Attributes:
        address: of a running cluster, as ``ray.init`` has it; ``local`` starts Ray on this machine, until the end.
        jobs: trials at a time; None for one a GPU, or one per four cores without.
        early_stop: stop trials that fall behind (ASHA).
    """

    address: str = "local"
    jobs: int | None = None
    early_stop: bool = False

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):  # Tune would run, and write, elsewhere
            raise UsageError(
                f"--ray-address {self.address}: run the command on a machine of the cluster, with auto or HOST:PORT"
            )

    def __call__(
        self, work: Work, recipes: Sequence[Recipe], finished: Callable[[int, Outcome], object]
    ) -> dict[int, str]:
        """See `Runner`.

        Raises:
            UsageError: Ray does not start, or has no GPU for ``work``.
        """
        with _ray(self.address), tempfile.TemporaryDirectory(prefix="gpt-serve-sweep-") as folder:
            jobs, resources = self._share(work.device)
            return self._fit(work, recipes, finished, jobs, resources, folder)

    def _share(self, device: str) -> tuple[int, dict[str, float]]:
        """How many trials run at a time, and what each of them gets."""
        import ray

        total, machines = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
        if device == "cpu":
            jobs = self.jobs or max(1, cores // CPUS_PER_TRIAL)
        elif gpus:
            jobs = self.jobs or gpus
        else:
            raise UsageError("--device cuda: Ray sees no GPU: use --device cpu")
        # A trial runs on one machine, however large the cluster is.
        largest = max(int(machine.get("CPU", 1)) for machine in machines)
        resources = {"cpu": float(max(1, min(cores // jobs, largest)))}
        if device != "cpu":
            resources["gpu"] = 1 / math.ceil(jobs / gpus)
        return jobs, resources

    def _fit(
        self,
        work: Work,
        recipes: Sequence[Recipe],
        finished: Callable[[int, Outcome], object],
        jobs: int,
        resources: dict[str, float],
        folder: str,
    ) -> dict[int, str]:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        class Watch(tune.Callback):  # type: ignore[misc]
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                finished(trial.config["index"], Outcome(**trial.last_result["outcome"]))

        def train(config: dict[str, Any]) -> None:
            def report(outcome: Outcome) -> None:
                score = FAILED if outcome.score is None else outcome.score.rank(recipes[0].select)[0]
                tune.report({"score": score, "outcome": asdict(outcome)})

            torch.set_num_threads(int(resources["cpu"]))
            run_trial(work, recipes[config["index"]], report)

        scheduler = None
        if self.early_stop:
            # In warm-up all are alike: the first epochs tell nothing.
            epochs, warmup = recipes[0].epochs, recipes[0].warmup
            grace = min(epochs, warmup + max(1, (epochs - warmup) // REDUCTION**2))
            scheduler = ASHAScheduler(max_t=epochs, grace_period=grace, reduction_factor=REDUCTION)
        tuner = tune.Tuner(
            tune.with_resources(train, resources),
            param_space={"index": tune.grid_search(list(range(len(recipes))))},
            tune_config=tune.TuneConfig(
                metric="score", mode="max", scheduler=scheduler, max_concurrent_trials=jobs, reuse_actors=True
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[Watch()]),
        )
        with redirect_stdout(sys.stderr):  # where what Ray prints cannot be taken for results
            results = tuner.fit()
        return {result.config["index"]: _reason(result.error) for result in results if result.error is not None}


def _reason(error: BaseException) -> str:
    """One line for a trial that crashed."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayActorError):
        return "its process died: it may have run out of memory"
    cause = error.cause if isinstance(error, RayTaskError) else error
    return " ".join(f"{type(cause).__name__}: {cause}".split())


@contextmanager
def _ray(address: str) -> Iterator[None]:
    """Ray, connected or started, and left or ended again."""
    import ray

    own: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    options = own if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **options)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UsageError(f"Ray cannot be used (--ray-address {address}): {' '.join(str(error).split())}") from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()
