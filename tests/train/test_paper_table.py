"""Table 5 as data, against the paper's text and against sums over its columns."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from gpt_serve.specs import Family
from gpt_serve.train.recipes.paper_table import PaperRow, _plain, find_row, table_tasks

ROW = re.compile(r"(\S.*?) (\d+) (\d+) ([\d.]+) (\d+) (\d+) (\d+) ([\d.]+) (\d+)$", re.MULTILINE)
FAMILIES: tuple[Family, Family] = ("mae", "mocov3")


def rows(family: Family) -> list[PaperRow]:
    found = [find_row(task, family) for task in table_tasks()]
    return [row for row in found if row is not None]


def test_the_table_is_the_papers() -> None:
    """Row by row, names included, against the text of the paper; runs where the paper lies beside the repository."""
    paper = Path(__file__).parents[3] / "shared" / "papers" / "gated-prompt-tuning-icml2023.txt"
    if not paper.is_file():
        pytest.skip("needs the paper's text in ../shared/papers")
    text = paper.read_text(encoding="utf-8")
    table = text[text.index("Table 5. Selected hyper-parameters") : text.index("B. Additional Experiments")]
    printed = ROW.findall(table)
    assert len(printed) == 25
    for task, *values in [(row[0], *map(float, row[1:])) for row in printed]:
        name = next(row.task for row in rows("mae") if _plain(row.printed) == _plain(task))
        for family, part in zip(FAMILIES, (values[:4], values[4:]), strict=True):
            row = find_row(name, family)
            assert row is not None
            assert [row.batch_size, row.prompts, row.lr, row.gate_init] == part, (name, family)
    assert [_plain(row.printed) for row in rows("mae")] == [_plain(row[0]) for row in printed]


@pytest.mark.parametrize(("family", "sums"), [("mae", (2768, 640, 4.901, 204)), ("mocov3", (2640, 898, 21.501, 160))])
def test_columns_add_up_to_the_papers_sums(family: Family, sums: tuple[float, ...]) -> None:
    columns = [(row.batch_size, row.prompts, row.lr, row.gate_init) for row in rows(family)]
    assert [sum(column) for column in zip(*columns, strict=True)] == pytest.approx(sums)


def test_all_24_classification_tasks_and_ade20k_are_there_by_benchmark() -> None:
    text = (files("gpt_serve.train.recipes") / "paper_table.toml").read_text()
    kinds = [entry["benchmark"] for entry in tomllib.loads(text)["tasks"].values()]
    assert [kinds.count(kind) for kind in ("VTAB-1K", "FGVC", "segmentation")] == [19, 5, 1]
    assert "Table 5" in text and "arXiv:2306.05067" in text


def test_no_name_means_two_tasks() -> None:
    tasks = tomllib.loads((files("gpt_serve.train.recipes") / "paper_table.toml").read_text())["tasks"]
    names = [_plain(name) for task, entry in tasks.items() for name in (task, *entry["aliases"])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("flowers", "flowers"),
        ("oxford-flowers", "flowers"),
        ("flowers102", "flowers102"),
        ("flowers_102", "flowers102"),
        ("cub", "cub"),
        ("cub-200-2011", "cub"),
        ("CIFAR-100", "cifar100"),
        ("stanford_cars", "cars"),
        ("oxford_iiit_pet", "pets"),
        ("patch_camelyon", "camelyon"),
        ("smallnorb_label_azimuth", "snorb-azim"),
    ],
)
def test_names_and_aliases(name: str, task: str) -> None:
    row = find_row(name, "mae")
    assert row is not None and row.task == task


@pytest.mark.parametrize("name", ["flower", "flowers12", "my-cub", ""])
def test_other_names_have_no_row(name: str) -> None:
    assert find_row(name, "mae") is None


def test_a_row_by_family() -> None:
    assert find_row("flowers", "mae") == PaperRow("flowers", "Flowers", "mae", 64, 100, 0.1, 15.0)
    assert str(find_row("flowers", "mocov3")) == "Flowers, MoCo v3: batch size 64, prompts 100, lr 1, gate init 10"
