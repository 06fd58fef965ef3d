"""Gates, temperatures and selection ratio, against the reference."""

from dataclasses import asdict

import pytest
import torch

from gpt_serve.insight.inspect import Inspection, inspect_adapter, plot_inspection, selection_ratio
from gpt_serve.specs import Tap
from gpt_serve.train.card import block_table
from tests import reference
from tests.factories import TINY_SPEC, make_adapter


@pytest.mark.parametrize("depth", [2, 3, 12, 24])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_selection_ratio_equals_the_reference(depth: int, spread: float) -> None:
    for seed in range(5):
        gamma = spread * torch.randn(depth - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gates = gamma.sigmoid()
        ratio = selection_ratio(gates)
        assert ratio is not None
        assert ratio.tolist() == pytest.approx(reference.selection_ratio(gates.tolist()))
        assert ratio.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0]),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
        ([0.5, 0.5], [1 / 3, 2 / 3]),
        ([0.0, 0.0, 0.0], None),
    ],
)
def test_hard_gates(gates: list[float], expected: list[float] | None) -> None:
    ratio = selection_ratio(torch.tensor(gates))
    assert ratio is None if expected is None else ratio is not None and ratio.tolist() == pytest.approx(expected)


def test_gated_adapter() -> None:
    adapter = make_adapter(method="gated")
    assert adapter.gamma is not None and adapter.tau is not None
    inspection = inspect_adapter(adapter)
    gates = adapter.gamma.double().sigmoid().tolist()
    assert inspection.gates == pytest.approx(gates)
    assert inspection.selection_ratio == pytest.approx(reference.selection_ratio(gates))
    assert inspection.temperatures == pytest.approx(adapter.tau.tolist())


def test_temperatures_are_those_in_use() -> None:
    adapter = make_adapter(method="gated", tau=torch.tensor([0.001, 1.0, 99.0]))
    assert inspect_adapter(adapter).temperatures == pytest.approx([0.01, 1.0, 10.0])


@pytest.mark.parametrize("method", ["linear", "vpt-shallow", "vpt-deep"])
def test_methods_without_gates(method: str) -> None:
    inspection = inspect_adapter(make_adapter(method=method))
    assert set(asdict(inspection).values()) == {None}
    assert block_table(inspection) == ["This method learns no gates and no temperatures."]


def test_no_ratio_where_prompts_are_not_carried_on() -> None:
    inspection = inspect_adapter(make_adapter(method="gated", deep=True))
    assert inspection.gates is not None and inspection.selection_ratio is None


def test_single_block_has_no_gate() -> None:
    spec = TINY_SPEC.__class__(**{**asdict(TINY_SPEC), "preprocess": TINY_SPEC.preprocess, "depth": 1})
    inspection = inspect_adapter(make_adapter(spec, method="gated"))
    assert (inspection.gates, inspection.selection_ratio) == ([], None)


def test_table_has_a_row_per_block() -> None:
    table = block_table(Inspection(gates=[0.25, 0.5], temperatures=[1.0, 2.0, 3.0], selection_ratio=None))
    assert table[2:] == ["| 1 | 0.2500 | 1.0000 | - |", "| 2 | 0.5000 | 2.0000 | - |", "| 3 | - | 3.0000 | - |"]


@pytest.mark.parametrize("method", ["gated", "linear"])
def test_plot_is_a_png(tmp_path, method: str) -> None:
    plot_inspection(inspect_adapter(make_adapter(method=method)), "alpha", tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_shifts_and_taps_are_shown() -> None:
    shift = torch.zeros(3, 3, 16)
    shift[1, 0, 0], shift[1, 2, 5] = 3.0, 4.0
    inspection = inspect_adapter(make_adapter(method="linear", shift=shift, taps=(Tap(2, "cls"), Tap(0, "patches"))))
    assert inspection.shifts == [0, 5, 0] and inspection.taps == [[3, "cls"], [1, "patches"]]
    table = block_table(inspection)
    assert table[0] == "The head reads cls after block 3, patches after block 1."
    assert table[2] == "| block | gate | temperature | selection ratio | norm of shifts |"
    assert table[5] == "| 2 | - | - | - | 5.0000 |"
