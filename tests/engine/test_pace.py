"""What keeps passes short and shares fair."""

import pytest
import torch

from gpt_serve.engine.engine import Row
from gpt_serve.engine.scheduler.jobs import FairQueue, Job, Shares
from gpt_serve.engine.scheduler.pace import FEW_ROWS, MOST_SECONDS, SHORT_SECONDS, Load, Pace, decode_seconds


def job(task: str, work: float = 0.0, tenant: str = "") -> Job:
    made = Job(None, task, b"", 0.0, tenant)  # type: ignore[arg-type]
    made.work = work
    return made


def row(work: float, trunk: float = 0.0, image: torch.Tensor | None = None) -> Row:
    return Row(None, torch.zeros(1) if image is None else image, work, trunk)  # type: ignore[arg-type]


def load(*work: float) -> Load:
    """Rows about an image each."""
    return Load([row(one) for one in work])


def order(queue: FairQueue, count: int) -> list[str]:
    return [queue.pop()[0].task for _ in range(count)]


def test_tasks_of_equal_work_take_turns() -> None:
    queue = FairQueue()
    for task in ("a", "a", "a", "b", "b"):
        queue.push(job(task))
    assert order(queue, 5) == ["a", "b", "a", "b", "a"]


def test_turns_are_of_work_and_not_of_requests() -> None:
    """An image that takes two seconds to decode counts as much as a hundred that take twenty milliseconds."""
    queue = FairQueue()
    for _ in range(3):
        queue.push(job("large", 2.0))
    for _ in range(150):
        queue.push(job("small", 0.02))
    turns = order(queue, 153)
    assert turns[0] == "large"
    assert turns[1:90] == ["small"] * 89, "until it has had as much"
    assert [at for at, task in enumerate(turns) if task == "large"][1] == pytest.approx(101, abs=1)


def test_who_was_idle_has_no_claim_and_who_was_busy_no_debt() -> None:
    shares = Shares()
    queue = FairQueue(shares)
    for _ in range(10):
        queue.push(job("busy", 1.0))
    order(queue, 9)
    queue.push(job("new", 1.0))
    queue.push(job("new", 1.0))
    queue.push(job("busy", 1.0))
    assert order(queue, 4) == ["new", "busy", "new", "busy"]


def test_what_was_estimated_wrong_is_charged_in_the_end() -> None:
    shares = Shares()
    queue = FairQueue(shares)
    for task in ("dear", "cheap") * 5:
        queue.push(job(task, 0.01))
    queue.pop()
    shares.charge(("", "dear"), 0.03)
    assert order(queue, 5) == ["cheap", "cheap", "cheap", "cheap", "dear"]


def test_tenants_take_turns_and_so_do_the_tasks_of_each() -> None:
    """Neither many requests nor many tasks give a tenant more turns, and a tenant's noisy task takes its own turns."""
    queue = FairQueue()
    for number in range(12):
        queue.push(job(f"task-{number % 3}", 1.0, "noisy"))
    for _ in range(4):
        queue.push(job("task-0", 1.0, "quiet"))
        queue.push(job("task-1", 1.0, "quiet"))
    turns = [queue.pop()[0].owner for _ in range(8)]
    assert [tenant for tenant, _ in turns].count("quiet") == 4
    assert [task for tenant, task in turns if tenant == "quiet"] == ["task-0", "task-1"] * 2
    assert {task for tenant, task in turns if tenant == "noisy"} == {"task-0", "task-1", "task-2"}


def test_a_pass_holds_what_ends_in_time() -> None:
    pace = Pace()
    assert pace.fits(load(1.0)) and pace.fits(load(1.0, 1.0)), "of what is not known, a few"
    assert not pace.fits(load(1.0, 1.0, 1.0))
    pace.learn(load(1.0, 1.0), 0.002)
    assert pace.row_seconds == pytest.approx(0.001)
    assert pace.fits(load(*[1.0] * 50)) and not pace.fits(load(*[1.0] * 51)) and SHORT_SECONDS == 0.05
    assert not pace.fits(load(1.0, 1.0, 1000.0)), "one of another kind makes it another pass"
    pace.learn(load(1000.0), 1.5)
    assert not pace.fits(load(1000.0, 1000.0)) and MOST_SECONDS == 1
    assert pace.row(1.0) == pytest.approx(0.001) and pace.row(1000.0) == pytest.approx(1.5)


def test_slow_rows_make_batches_too_but_small_ones() -> None:
    pace = Pace()
    pace.learn(load(1.0), 0.2)
    assert pace.fits(load(*[1.0] * FEW_ROWS)) and not pace.fits(load(*[1.0] * (FEW_ROWS + 1)))


def test_a_row_is_slow_beside_others_and_not_by_itself() -> None:
    """On a slow device, or with a large backbone, rows that take long are what there is: they make batches."""
    pace = Pace()
    assert not pace.is_slow(2.0)
    pace.learn(load(1000.0), 2.0)
    assert not pace.is_slow(pace.row(1000.0))
    pace.learn(load(1.0), 0.4)
    assert pace.is_slow(2.0) and not pace.is_slow(0.5)
    pace.learn(load(1.0), 0.001)
    assert not pace.is_slow(0.2) and pace.is_slow(0.3)


def test_a_speed_that_no_longer_holds_is_forgotten() -> None:
    pace = Pace()
    pace.learn(load(1.0), 0.001)
    for _ in range(100):
        pace.learn(load(1.0), 0.1)
    assert pace.row(1.0) == pytest.approx(0.1)


def test_large_images_are_expected_to_take_long() -> None:
    assert decode_seconds(7071 * 7071, 1980) > 1 > 0.02 > decode_seconds(224 * 224, 13_000)


def test_rows_of_one_image_share_what_their_tasks_do() -> None:
    """Ten probes, and two tasks with the last quarter of the blocks for themselves, of one image; one of another."""
    image, other = torch.zeros(1), torch.zeros(1)
    probes = [row(8.0, 8.0, image) for _ in range(10)]
    late = [row(8.0, 6.0, image) for _ in range(2)]
    alone = row(8.0, 8.0, other)
    probing = Load(probes)
    assert (probing.rows, probing.computed, probing.work) == (10, 1, pytest.approx(8.0))
    assert probing.share(probes[0]) == pytest.approx(0.1)
    both = Load([*probes, *late])
    assert (both.rows, both.computed) == (12, 3)
    assert both.work == pytest.approx((10 * 8 + 2 * 6) / 12 + 2 * 2)
    assert both.share(late[0]) > 2 * both.share(probes[0])
    everything = Load([*probes, *late, alone])
    assert everything.computed == 4 and everything.work == pytest.approx(both.work + 8.0)
    assert sum(map(everything.share, [*probes, *late, alone])) == pytest.approx(1)


def test_sharing_does_not_make_passes_seem_fast() -> None:
    """A pass over a hundred probes of one image says what one image takes, not what a hundredth of it does."""
    pace, image = Pace(), torch.zeros(1)
    pace.learn(Load([row(1.0, 1.0, image) for _ in range(100)]), 0.002)
    assert pace.row(1.0) == pytest.approx(0.002) and pace.row_seconds == pytest.approx(0.002)
    assert pace.fits(load(*[1.0] * 25)) and not pace.fits(load(*[1.0] * 26))
