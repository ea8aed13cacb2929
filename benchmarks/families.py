"""Writes the table of docs/families.md from a run of the families' tests.

Metric in words: a family is *served* under a release of transformers when its tests passed there: the store is bit for
bit what transformers loads, logits equal stock's at one slot, half and all, masked logits equal those of a physically
pruned model. Run it in one environment per release with `--run`, then write the table from the results:

    python -m benchmarks.families --run results-5.23.xml
    python -m benchmarks.families --write results-5.17.xml results-5.23.xml
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.reporting import REPOSITORY, RESULTS

PAGE = REPOSITORY / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
CAPTURE_TESTS = ("tests/server/model/device/test_families.py",)
CAPTURED, STEP = "captured", "step ÷ floor"
STEPS = RESULTS / "models_gpu.json"
"""Steps on an H100, every expert in a slot, written by `python -m benchmarks.gpu.models --save`."""
TESTS = ("tests/families/test_whole_model.py", "tests/router/test_gating.py")


def run_tests(results: Path, tests: Sequence[str]) -> int:
    """Run tests into a JUnit file that carries the release of transformers."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *tests,
            "-m",
            "exhaustive or not exhaustive",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={results}",
        ],
        cwd=REPOSITORY,
        check=False,
    ).returncode


def read_results(results: Path) -> tuple[str, dict[str, list[ElementTree.Element]]]:
    """The release of transformers, and the test cases by model type."""
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None, f"{results} is no JUnit file"
    release = next(item.get("value", "") for item in suite.iter("property") if item.get("name") == "transformers")
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in suite.iter("testcase"):
        name = case.get("name", "")
        if "[" in name:
            cases.setdefault(name[name.index("[") + 1 : -1].partition("-")[0], []).append(case)
    return release, cases


def verdict(cases: Sequence[ElementTree.Element]) -> str:
    """The verdict over the cases of one family: yes, refused, failed, or not in this release."""
    if not cases:
        return "not in this release"
    if any(case.find("failure") is not None or case.find("error") is not None for case in cases):
        return "**fails**"
    skipped = [case.find("skipped") for case in cases]
    reasons = [item.get("message", "") for item in skipped if item is not None]
    return "refused" if reasons else "yes"


def fact(cases: Sequence[ElementTree.Element], name: str) -> str:
    """A property that a test recorded."""
    found = [item.get("value", "") for case in cases for item in case.iter("property") if item.get("name") == name]
    return found[0] if found else ""


def captured_families(results: Path) -> set[str]:
    """The families whose tests of the captured step all passed."""
    seen: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        for item in case.iter("property"):
            if item.get("name") == CAPTURED:
                seen.setdefault(item.get("value", ""), []).append(case)
    return {family for family, same in seen.items() if verdict(same) == "yes"}


def step_ratios() -> dict[str, str]:
    """For each family the times of its models' steps of one row by those of reading their bytes."""
    found: dict[str, list[str]] = {}
    for row in json.loads(STEPS.read_text())["steps"]:
        if row["batch"] == 1:
            found.setdefault(row["family"], []).append(f"{row['ratio']:.2f} ({row['model']}, {row['experts']})")
    return {family: "; ".join(ratios) for family, ratios in found.items()}


def with_captured(text: str, captured: set[str]) -> str:
    """The table with its columns of the captured step written again, after that of the memory."""
    ratios = step_ratios()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    kept = [at for at, name in enumerate(rows[0]) if name not in (CAPTURED, STEP)]
    lines = []
    for number, row in enumerate(rows):
        family = row[0].strip("`")
        cells = ["yes" if family in captured else "–", ratios.get(family, "–")]
        cells = [CAPTURED, STEP] if number == 0 else ["---"] * 2 if number == 1 else cells
        left = [row[at] for at in kept]
        lines.append("| " + " | ".join([*left[:3], *cells, *left[3:]]) + " |")
    return "\n".join(lines)


def held_captured(page: str) -> set[str]:
    """The families that the page's table says are captured."""
    rows = [line.strip("|").split("|") for line in page[page.index(BEGIN) : page.index(END)].strip().splitlines()[1:]]
    names = [name.strip() for name in rows[0]]
    if CAPTURED not in names:
        return set()
    return {row[0].strip(" `") for row in rows if row[names.index(CAPTURED)].strip() == "yes"}


def rule_of(model_type: str, describe: dict[str, str]) -> str:
    """The gating rule in words, found by the model's folder."""
    folder = model_type.removesuffix("_text")
    return describe.get(folder, "")


def describe_rules() -> dict[str, str]:
    """Every family's gating rule in words, from its record."""
    from router.gating import RULES
    from router.gating.rules import Renormalised, TopKRule, no_bias

    words = {}
    for family, rule in RULES.items():
        if not isinstance(rule, TopKRule):
            words[family] = (type(rule).__doc__ or "").split(":")[0] + ": " + type(rule).__name__
            continue
        parts = ["top-k of the logits" if rule.scores.__name__ == "logits_as_scores" else rule.scores.__name__]
        if rule.bias is not no_bias:
            parts.append("selection bias")
        if rule.groups is not None:
            parts.append(f"groups by {rule.groups.score}")
        if isinstance(rule.weights, Renormalised):
            parts.append("renormalised" + (f" where `{rule.weights.when}`" if rule.weights.when else ""))
        elif rule.weights.__name__ != "kept":
            parts.append(rule.weights.__name__)
        if rule.scale or rule.expert_scale:
            parts.append("scaled")
        words[family] = ", ".join(part.replace("_", " ") if "`" not in part else part for part in parts)
    return words


def table(paths: Sequence[Path]) -> tuple[str, dict[str, dict[str, str]]]:
    """The table in Markdown, and the verdicts by family and release."""
    results = [read_results(path) for path in paths]
    describe = describe_rules()
    names = sorted({name for _, cases in results for name in cases})
    header = ["family (`model_type`)", "gating rule", "memory of a sequence", *(release for release, _ in results)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    verdicts: dict[str, dict[str, str]] = {}
    for name in names:
        every = [case for _, cases in results for case in cases.get(name, [])]
        memory = fact(every, "memory")
        verdicts[name] = {release: verdict(cases.get(name, [])) for release, cases in results}
        if not memory:  # only its router was tested: transformers has no causal language model of it
            verdicts[name] = {
                release: "router only" if value == "yes" else value for release, value in verdicts[name].items()
            }
        row = [f"`{name}`", rule_of(name, describe), memory or "–", *verdicts[name].values()]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines), verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, metavar="XML", help="run the tests and keep their results in this file")
    parser.add_argument("--write", type=Path, nargs="+", metavar="XML", help="write the table from these results")
    parser.add_argument("--run-captured", type=Path, metavar="XML", help="the same for the tests of the captured step")
    parser.add_argument("--write-captured", type=Path, metavar="XML", help="write its column from these results")
    arguments = parser.parse_args()
    if arguments.run:
        return run_tests(arguments.run.absolute(), TESTS)
    if arguments.run_captured:
        return run_tests(arguments.run_captured.absolute(), CAPTURE_TESTS)
    page = PAGE.read_text()
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    if arguments.write_captured:
        captured = captured_families(arguments.write_captured)
        text = with_captured(page[len(head) : -len(tail)], captured)
        PAGE.write_text(f"{head}\n{text}\n{tail}")
        print(json.dumps({"benchmark": "families", "captured": sorted(captured)}))
        return 0
    if not arguments.write:
        parser.error("give --run, --write, --run-captured or --write-captured")
    text, verdicts = table(arguments.write)
    text = with_captured(text, held_captured(page))
    PAGE.write_text(f"{head}\n{text}\n{tail}")
    counts = {
        value: sum(value in row.values() for row in verdicts.values()) for value in ("yes", "refused", "**fails**")
    }
    print(text)
    print(json.dumps({"benchmark": "families", "families": len(verdicts), **counts}))
    return 1 if counts["**fails**"] else 0


if __name__ == "__main__":
    sys.exit(main())
