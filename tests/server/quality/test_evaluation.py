import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.planning.plan import Plan, PlannedExpert, write_plan
from extractor.statistics.file import write_statistics
from router.mask import ExpertMask
from server.masks.masking import FixedMasking, PoolMasking
from server.masks.pools import PromptPool
from server.model.host.runner import HostRunner
from server.model.runner import SelectiveModel
from server.quality.batches import token_sequences
from server.quality.calibration import CalibrationOptions, calibrate
from server.quality.comparison import Comparison, masks_per_domain
from server.quality.efficiency_metrics import Parameters, configuration_entropy
from server.quality.evaluation import EvaluationRequest, evaluate
from server.quality.price import check_price
from server.quality.questions import Question, read_questions, share_answered
from server.quality.text_loss import evaluate_text
from server.quality.texts import TextOptions, TextsError, find_domains

TEXTS = Path(__file__).parents[3] / "benchmarks" / "data" / "selection"


def index_mask(count: int) -> ExpertMask:
    return ExpertMask.same_in_every_layer(range(count), 8, 64)


def test_a_mask_costs_and_the_deficit_says_so(selective: Callable[..., SelectiveModel], stories: Path) -> None:
    model = selective()
    tokens = token_sequences(model, find_domains([str(stories)])[0], TextOptions(context=96))
    plain, masked = evaluate_text(model, tokens), evaluate_text(model, tokens, index_mask(8))
    assert plain.deficit == plain.top1_missing == 0.0
    assert masked.loss > plain.loss + 0.5
    assert 0.5 < masked.deficit < 1.0
    assert len(masked.deficit_per_layer) == 8
    assert 0.5 < masked.top1_missing < 1.0


def test_questions_are_answered_greedily_and_fail_under_a_bad_mask(selective: Callable[..., SelectiveModel]) -> None:
    runner = HostRunner(selective(), max_rows=1, max_tokens=64)
    asked = [Question("The capital of France is", " Paris."), Question("The capital of France is", " London.")]
    assert share_answered(runner, asked) == 0.5
    assert share_answered(runner, asked[:1], lambda num_prompt_tokens: FixedMasking(index_mask(1))) == 0.0
    assert runner.kv.num_free_rows == 1


def test_questions_side_by_side_and_under_pools_are_answered_as_alone(
    selective: Callable[..., SelectiveModel],
) -> None:
    model = selective()
    prompts = ["The capital of France is", "The capital of Japan is", "2 + 2 ="]
    asked = [Question(prompt, answer) for prompt in prompts for answer in (" Paris.", " Tokyo.", " 4")]
    alone, many = HostRunner(model, max_rows=1, max_tokens=64), HostRunner(model, max_rows=4, max_tokens=64)
    assert share_answered(many, asked) == share_answered(alone, asked) > 0.2
    assert many.kv.num_free_rows == 4
    pools: list[PoolMasking] = []

    def pool(num_prompt_tokens: int) -> PoolMasking:
        pools.append(PoolMasking(PromptPool(2, 8, 64), num_prompt_tokens))
        return pools[-1]

    assert share_answered(many, asked[:3], pool) <= share_answered(many, asked[:3])
    assert len(pools) == 3
    assert all(one.mask is not None and (one.mask.num_allowed == 2).all() for one in pools)


def test_a_criterion_beats_a_random_choice_on_text_of_the_domain(
    selective: Callable[..., SelectiveModel], stories: Path
) -> None:
    model = selective()
    domains = find_domains([str(stories)])
    options = CalibrationOptions(TextOptions(context=96), price_tokens=96, with_weights=False)
    statistics = calibrate(model, domains, options)
    texts = {"stories": token_sequences(model, domains[0], options.text)}
    unmasked = {"stories": evaluate_text(model, texts["stories"])}
    comparison = Comparison(model, texts, unmasked)
    chosen = comparison.measure("coverage", 16, masks_per_domain(statistics, ["stories"], "coverage", 16))
    index = comparison.measure("index", 16, index_mask(16))
    assert 0.9 < chosen.mean_ratio < 1.2 < index.mean_ratio
    assert chosen.to_json()["worst"][0] == "stories"
    check = check_price(statistics, [chosen], unmasked)
    assert check.points[0]["expected"] == pytest.approx(check.points[0]["actual"], abs=0.05)
    assert check.points[0]["expected_by_routing"] == check.points[0]["expected"], "there is no other kind to be like"
    assert chosen.results["stories"].demand is not None
    assert np.allclose(chosen.results["stories"].demand.sum(axis=1), sum(len(one) for one in texts["stories"]))


def test_the_report_has_tables_json_and_a_picture(
    selective: Callable[..., SelectiveModel], stories: Path, tmp_path: Path
) -> None:
    model = selective()
    options = CalibrationOptions(TextOptions(context=96, max_tokens=96), price_tokens=96, with_weights=False)
    stats, plan, questions = tmp_path / "stats.safetensors", tmp_path / "plan.json", tmp_path / "geography.jsonl"
    write_statistics(stats, calibrate(model, find_domains([str(stories)]), options))
    deep = tuple(PlannedExpert((expert,) * 8) for expert in range(32))
    write_plan(plan, Plan(8, 64, {"kind": "index"}, deep))
    questions.write_text(json.dumps({"prompt": "The capital of France is", "answer": " Paris."}))
    request = EvaluationRequest(
        find_domains([str(stories)]), [questions], options.text, plan, stats, [0.25], ["coverage"], [0, 1]
    )
    report = evaluate(model, None, request, lambda doing, done, total: None)
    answer = json.loads(json.dumps(report.to_json()))
    assert answer["texts"]["stories"]["ratio"] > 1.0
    assert answer["texts"]["stories"]["expected_loss_change"] >= 0.0
    assert [sweep["name"] for sweep in answer["sweeps"]] == ["coverage", "random 0", "random 1"]
    assert answer["sweeps_left_out"] is None
    assert len(answer["ces"]) == 8
    assert {"name", "accuracy", "p3", "p2f", "mer", "r3", "saa"} <= set(answer["questions"][0])
    assert "keep  25.0% by coverage" in report.to_text()
    report.draw(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_criteria_that_cannot_be_compared_on_a_part_of_the_experts_are_said_to_be_left_out(
    selective: Callable[..., SelectiveModel], stories: Path, tmp_path: Path
) -> None:
    model = selective(mask=index_mask(32))
    options = CalibrationOptions(TextOptions(context=96, max_tokens=96), price_tokens=0, with_weights=False)
    stats, domains = tmp_path / "stats.safetensors", find_domains([str(stories)])
    write_statistics(stats, calibrate(selective(), domains, options))
    request = EvaluationRequest(domains, [], options.text, None, stats, [0.5, 0.25], ["coverage"], [])
    report = evaluate(model, None, request, lambda doing, done, total: None)
    told = "criteria were not compared at 2 sizes, as this store holds only a part of the experts: name the checkpoint"
    assert told in report.to_text()
    assert told in report.to_json()["sweeps_left_out"]
    assert report.compared == []


def test_efficiency_metrics_follow_their_definitions() -> None:
    of = Parameters(
        trunk=200_000_000,
        expert=100_000_000,
        expert_bytes=50_000_000,
        active_experts=8,
        kept_experts=38,
        bytes_per_parameter=2,
    )
    assert of.activation_ratio == pytest.approx(0.25)
    metrics = of.efficiency(accuracy=0.8, chance=0.1)
    assert metrics["p3"] == pytest.approx(0.8)
    assert metrics["p2f"] == pytest.approx(0.8 / 0.002)
    assert metrics["mer"] == pytest.approx(0.8 / ((0.4e9 + 38 * 0.05e9) / 2**30))
    assert metrics["r3"] == pytest.approx(0.25 * 0.8 / 0.1)
    assert metrics["saa"] == pytest.approx(0.8 * 0.75)


def test_configuration_entropy_is_one_for_even_and_zero_for_single_use() -> None:
    picks = np.array([[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert np.allclose(configuration_entropy(picks), [1.0, 0.0, 0.5])


def test_parameters_are_those_of_the_checkpoint(selective: Callable[..., SelectiveModel]) -> None:
    model = selective()
    whole = Parameters.of(model)
    assert whole.total == pytest.approx(16.4e6, rel=0.01)
    masked = Parameters.of(model, index_mask(4))
    assert (masked.kept_experts, masked.active_experts) == (4, 4)


def test_arithmetic_is_answered_once_a_document_begins_before_the_question(
    selective: Callable[..., SelectiveModel],
) -> None:
    model = selective()
    asked = read_questions(TEXTS / "questions" / "arithmetic.jsonl").questions[:16]
    runner = HostRunner(model, max_rows=8, max_tokens=64)
    assert share_answered(runner, asked, prefix="\n<|endoftext|>") > share_answered(runner, asked) + 0.25


def test_questions_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "2 + 2 ="}\n')
    with pytest.raises(TextsError, match='line 1: wanted an object with "prompt" and "answer"'):
        read_questions(path)
    for damage in (b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damage)
        with pytest.raises(TextsError, match="line 1: wanted an object"):
            read_questions(path)
    path.write_text("\n")
    with pytest.raises(TextsError, match="has no questions"):
        read_questions(path)
