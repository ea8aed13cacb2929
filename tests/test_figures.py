"""The tables of the README and of docs/performance.md have the figures of the result files that they cite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.choosing.adapters_figure import BESIDE, CHECKPOINTS, beside, results_of

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PERFORMANCE = "docs/performance.md"


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _rows(title: str, page: str = PERFORMANCE) -> dict[str, list[str]]:
    """Rows of the table below `title`, to its next bold row: first cell → the others, without commas."""
    _, found, text = (REPOSITORY / page).read_text().partition(title)
    assert found, f"{page} has no {title!r}"
    lines = text[text.index("\n|") :].lstrip().split("\n\n")[0].split("\n| **")[0].splitlines()
    cells = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells if not row[0].startswith("-") and row[0] and any(row[1:])}


def _decode_row(result: str, stock: str, num_slots: int) -> list[str]:
    (row,) = (
        row
        for row in _read(result)["rows"]
        if (row["num_slots"] == num_slots if num_slots else row["label"] == stock) and row["kind"] != "imports"
    )
    mib = [round(row[name] / 2**20) for name in ("held_bytes", "peak_rss_bytes")]
    hits = "" if row["hit_rate"] is None else f"{row['hit_rate']:.2f}"
    return [f"{row['tokens_per_second']:.1f}", f"{row['ttft_seconds'] * 1e3:.0f}", *map(str, mib), hits]


@pytest.mark.parametrize(
    ("page", "block", "result", "stock"),
    [
        ("README.md", "## Measured", "decode-generated-cpu", "transformers, grouped_mm"),
        (PERFORMANCE, "**generated", "decode-generated-cpu", "transformers, grouped_mm"),
        (PERFORMANCE, "**bundled", "decode-tiny-moe-cpu", "transformers, batched_mm"),
    ],
)
def test_decode_table_is_that_of_its_results(page: str, block: str, result: str, stock: str) -> None:
    rows = _rows(block, page)
    implementation = stock.partition(", ")[2]
    assert rows[f"transformers `{implementation}`"] == _decode_row(result, stock, 0)
    for num_slots in (64, 32, 16):
        assert rows[f"deepfew {num_slots} of 64 in slots"] == _decode_row(result, stock, num_slots)


def test_decode_table_in_float32_is_that_of_its_results() -> None:
    rows, result = _rows("**generated"), "decode-generated-cpu-float32"
    assert rows["transformers `grouped_mm` float32"] == _decode_row(result, "transformers, grouped_mm", 0)
    assert rows["deepfew 64 of 64 in slots float32"] == _decode_row(result, "", 64)


def test_load_table_is_that_of_its_results() -> None:
    rows = _rows("python -m benchmarks.service.load`):")
    found = {(row["server"].replace(",", ""), row["users"]): row for row in _read("load")["rows"]}
    assert {row["failed"] for row in found.values()} == {0}
    for server, cells in rows.items():
        if server.startswith("tokens/s"):
            continue
        of = [found[server.replace("in slots", "slots"), users] for users in (1, 4, 8)]
        assert cells == [f"{row['tokens/s']:.0f} ({row['latency p99 ms'] / 1e3:.1f})" for row in of]


def test_figures_in_sentences_are_those_of_their_results() -> None:
    text = " ".join((REPOSITORY / PERFORMANCE).read_text().split())
    extract, serving = _read("extract"), _read("serve_gpu")["servings"]
    assert f"at {extract['warm']['ratio']:.2f} of the rate of `cp -r`" in text
    assert f"{extract['peak_above_interpreter_mib']} MiB above the interpreter" in text
    device, host = serving["device, second start"]["tokens_per_second"], serving["host"]["tokens_per_second"]
    kinds = ("one greedy", "one sampled", "four greedy")
    fast, slow = ([f"{rates[kind]:.0f}" for kind in kinds] for rates in (device, host))
    assert f"{fast[0]} tokens/s to a greedy request" in text
    assert f"{fast[1]} to a sampled one, and {fast[2]} to four greedy ones" in text
    assert f"With the host driving the experts it would be {slow[0]}, {slow[1]} and {slow[2]}" in text
    prefix = _read("prefix")
    second = prefix["median"]
    assert f"the first token came after {second['found_seconds']:.2f} s" in text
    assert f"took {second['only_new_seconds']:.2f} s, without an engine" in text
    assert f"all anew took {second['anew_seconds']:.1f} s" in text
    assert f"in a round was {max(one['ratio'] for one in prefix['rounds']):.2f}," in text
    assert prefix["http"]["same"] == prefix["http"]["turns"] == 40
    (alone,) = (row for row in _read("decode_gpu")["resident"] if row["batch"] == 1)
    assert f"takes {alone['step_ms']:.2f} ms, {alone['ratio']:.1f} times what its bytes need" in text


def test_the_table_of_packed_steps_is_that_of_its_results() -> None:
    rows, found = _rows("### Experts in 4 and 8 bits"), _read("packed_gpu")["packed"]
    assert found
    for name in {row["experts"] for row in found}:
        steps = [row for row in found if row["experts"] == name]
        floors = " / ".join(f"{row['floor_ms']:.2f}" for row in steps)
        assert rows[name] == [*(f"{row['step_ms']:.2f}" for row in steps), floors]


def test_the_table_of_adapters_is_that_of_its_results() -> None:
    rows = _rows("rate of learning had fallen", "docs/selection.md")
    pools = {name: one for name, one in results_of("sweep", "tiny-moe-standard").items() if one["part"] == "pools"}
    (without,) = {tuple(f"{case['mean_ratio']:.3f}" for case in one["cases"]) for one in pools.values()}
    assert rows["none"] == ["–", *without]
    told = {row.split(":")[0].strip("`"): cells for row, cells in rows.items() if row.startswith("`")}
    assert told == {
        name: [f"{one['num_parameters'] / 1e6:.2f}", *(f"{ratio:.3f}" for ratio in one["curve"][-1]["ratios"].values())]
        for name, one in pools.items()
    }


def test_the_table_beside_adapters_is_that_of_its_results() -> None:
    rows, wanted = _rows("of as many experts in 16 bits.", "docs/selection.md"), {}
    for checkpoint, name in CHECKPOINTS.items():
        for part, masks in (("pools", "own"), ("together", "all")):
            lines = [beside(checkpoint, part, choice, encoding) for choice, encoding, _ in BESIDE.values()]
            for share in (0.5, 0.25, 0.125):
                wanted[f"{name} {masks} {100 * share:g} %"] = [f"{line[share][1]:.3f}" for line in lines]
    assert dict(list(rows.items())[1:]) == wanted


@pytest.mark.parametrize(
    ("title", "run", "before"),
    [
        ("4,096 held-out tokens of the kind", "plans on a CPU", "none"),
        ("49,152 tokens of training each", "experts", "before"),
    ],
)
def test_the_table_of_questions_with_adapters_is_that_of_its_results(title: str, run: str, before: str) -> None:
    rows, plans = _rows(title, "docs/selection.md"), results_of(run, "tiny-moe-standard")
    without = plans.pop(before)
    assert len(rows) == 1 + len(plans)
    for plan in plans.values():
        share, kind = plan["share"], plan["kind"]
        ratios = [f"{case['mean_ratio']:.3f}" for case in plan["cases"]]
        answered = [f"{one['questions'][str(share)][kind]:.3f}".removeprefix("0") for one in (without, plan)]
        assert rows[f"{kind} {100 * share:g} %"] == [*ratios, *answered]


def test_the_table_of_budgets_is_that_of_its_results() -> None:
    rows, wanted = _rows("Bold\nis what `plan` chose", "docs/selection.md"), {}
    for checkpoint, found in _read("budgets")["checkpoints"].items():
        for row in found:
            name = "standard" if "standard" in checkpoint else "pool"
            cell = f"{row['measured']:.3f} ({row['kept']})"
            cells = wanted.setdefault(f"{name} {row['budget']:.0%} {row['plan']}", [])
            cells.append(f"**{cell}**" if row["chosen"] == "100%" else cell)
    assert rows == {"checkpoint budget plan": ["`int4`", "`int8`", "16 bit"]} | wanted


def test_the_table_of_encodings_is_that_of_its_results() -> None:
    rows = _rows("KL tells encodings apart", "docs/selection.md")
    checkpoints = _read("encodings")["checkpoints"]
    found = [{row["name"]: row for row in checkpoints[f"tiny-moe-{name}"]} for name in ("pool", "standard")]
    for name, cells in list(rows.items())[1:]:
        key = "int4, down int8" if name == "`int4-int8`" else name.strip("`")
        of = [one[key] for one in found]
        assert cells[:3] == [f"{of[0]['bits']:g}", *(f"{row['mean_ratio']:.4f} / {row['kl']:.4f}" for row in of)]
        weighed = [f"{one[f'{key}, stats']['kl']:.4f}" for one in found if f"{key}, stats" in one]
        assert cells[3] == (" / ".join(weighed) or "–")
    assert set(rows) >= {"`fp8`", "`int8`", "`int4`", "`int4-g64`", "`int4-int8`", "`mxfp4`", "`nvfp4`"}
    assert all(one["fp8"]["mean_ratio"] <= 1.003 and one["int4"]["mean_ratio"] <= 1.015 for one in found)
