"""Predictions beside what was measured: every step of the recorded runs, and the page that shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.fit import BEGIN, END, PAGE, RESULTS, Row, cpu_rows, h100_rows, page_table, shape_facts
from benchmarks.gpu.decode import QWEN
from server.fit.timing import Misses, captured_step, host_step, prompt_seconds
from server.machine.rates import known_machines

H100 = known_machines()["h100"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    measured: dict[str, Any] = json.loads((RESULTS / "fit.json").read_text())
    return [*h100_rows(), *cpu_rows(measured["cpu"])]


def _named(rows: list[Row], *, cpu: bool, prompts: bool) -> list[Row]:
    kept = [row for row in rows if row.setting.startswith("CPU") == cpu and "disk" not in row.setting]
    return [row for row in kept if ("prompt" in row.setting) == prompts]


def test_steps_on_the_h100_are_predicted_within_11_percent(rows: list[Row]) -> None:
    steps = _named(rows, cpu=False, prompts=False)
    assert len(steps) >= 50
    assert [row for row in steps if abs(row.error) > 0.11] == []


def test_steps_on_the_h100_are_predicted_by_popularity_within_11_percent(rows: list[Row]) -> None:
    popular = [row for row in rows if row.popular_ms is not None]
    assert len(popular) == 12
    assert [row for row in popular if abs((row.popular_ms or 0) / row.measured_ms - 1) > 0.11] == []


def test_steps_that_read_the_disk_are_predicted_within_20_percent(rows: list[Row]) -> None:
    read = [row for row in rows if "disk" in row.setting]
    assert len(read) == 2
    assert [row for row in read if abs(row.error) > 0.2] == []


@pytest.mark.parametrize("prompts", [False, True])
def test_steps_and_prompts_on_the_cpu_are_predicted_within_25_percent(rows: list[Row], prompts: bool) -> None:
    found = _named(rows, cpu=True, prompts=prompts)
    assert len(found) >= 7
    assert [row for row in found if abs(row.error) > 0.25] == []


def test_the_page_shows_the_table_of_today(rows: list[Row]) -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == page_table(rows)


def test_a_step_takes_longer_with_fewer_hits_more_rows_and_a_slower_bus() -> None:
    model = shape_facts(QWEN)

    def seconds(hit_rate: float, rows: int, on_disk: float = 0.0) -> float:
        misses = Misses(model.demand.distinct(rows), rows * model.top_k, hit_rate, on_disk)
        return captured_step(model, H100, misses, rows, 8, 1024).total

    assert seconds(1.0, 1) < seconds(0.9, 1) < seconds(0.5, 1) < seconds(0.5, 1, on_disk=0.01)
    assert seconds(1.0, 1) < seconds(1.0, 2) < seconds(1.0, 8)


def test_the_parts_of_a_step_add_up_to_its_time() -> None:
    model = shape_facts(QWEN)
    step = host_step(model, H100, Misses(8, 8, 0.5, 0.1), 1, 1024)
    assert step.total == pytest.approx(
        step.trunk + step.attention + step.experts + step.copies + step.layers + step.disk
    )
    assert min(step.trunk, step.attention, step.experts, step.copies, step.layers, step.disk) > 0


def test_a_prompt_takes_a_chunk_after_the_other() -> None:
    model = shape_facts(QWEN)
    whole = prompt_seconds(model, H100, 32, 2048, 2048)
    assert prompt_seconds(model, H100, 32, 2048, 256) == pytest.approx(8 * prompt_seconds(model, H100, 32, 256, 256))
    assert prompt_seconds(model, H100, 32, 2048, 256) > 4 * whole  # every chunk streams what is not in slots
    assert prompt_seconds(model, H100, 128, 2048, 2048) < whole
