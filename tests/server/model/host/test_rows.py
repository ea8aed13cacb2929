"""A row's logits are bit for bit those of the row alone, whoever else is in the batch and however its prompt is cut."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from expert_store.store import Store
from server.model.host.assembly import HostModel, load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, RunnerOptions
from server.model.seam.rows import BLOCK_ROWS, StepRows, depends_on_rows, fix_rows, rows_of_step

TEXTS = Path(__file__).parents[4] / "benchmarks" / "data" / "selection" / "stories_synth.txt"
DTYPES = [
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16", marks=pytest.mark.exhaustive),
    pytest.param(torch.float32, id="float32"),
]


@pytest.fixture(scope="module", params=DTYPES)
def model(tiny_store: Path, request: pytest.FixtureRequest) -> Iterator[HostModel]:
    options = RunnerOptions(device=torch.device("cpu"), dtype=request.param, num_slots=16)
    found = load_model(Store.open(tiny_store), options)
    yield found
    found.close()


def prompts_of(model: HostModel, count: int) -> list[list[int]]:
    """Beginnings of stories, each longer than the one before."""
    text = TEXTS.read_text()
    return [model.tokenizer(text[at * 900 : at * 900 + 20 + 12 * at]).input_ids for at in range(count)]


def greedy_together(model: HostModel, prompts: list[list[int]], num_tokens: int, chunk: int = 256) -> list[Tensor]:
    """The logits [num_tokens, V] that each prompt's greedy tokens were chosen from, all prompts in one batch."""
    runner = HostRunner(model, max_rows=8, max_tokens=512)
    rows, logits = [], []
    for prompt in prompts:
        rows.append(runner.allocate())
        for start in range(0, len(prompt), chunk):
            last = runner.prefill(rows[-1], prompt[start : start + chunk]).logits[0]
        logits.append([last])
    for _ in range(num_tokens - 1):
        step = runner.decode(
            [RowStep(row, int(told[-1].argmax())) for row, told in zip(rows, logits, strict=True)]
        ).logits
        for row, told in zip(logits, step, strict=True):
            row.append(told.clone())
    for row in rows:
        runner.free(row)
    return [torch.stack(row) for row in logits]


def assert_company_changes_nothing(model: HostModel, num_prompts: int, num_tokens: int, sizes: list[int]) -> None:
    prompts = prompts_of(model, num_prompts)
    alone = [greedy_together(model, [prompt], num_tokens)[0] for prompt in prompts]
    for size in sizes:
        for start in range(0, num_prompts, size):
            together = greedy_together(model, prompts[start : start + size], num_tokens)
            for at, logits in enumerate(together):
                assert torch.equal(logits, alone[start + at]), f"prompt {start + at} beside {size - 1} others"


def test_logits_do_not_depend_on_the_company(model: HostModel) -> None:
    assert_company_changes_nothing(model, 8, 10, [3, 8])


@pytest.mark.exhaustive
def test_hundred_tokens_of_many_prompts_do_not_depend_on_the_company(model: HostModel) -> None:
    assert_company_changes_nothing(model, 32, 100, [1, 2, 3, 5, 8])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(model: HostModel, chunk: int) -> None:
    prompt = prompts_of(model, 12)[-1]
    whole, cut = (greedy_together(model, [prompt], 6, chunk=size)[0] for size in (256, chunk))
    products = [module.weight for module in model.model.modules() if isinstance(module, nn.Linear)]
    if any(depends_on_rows(weight) for weight in products):  # float32 here: a chunk's products have its number of rows
        assert torch.allclose(whole, cut, atol=1e-4)
        assert torch.equal(whole.argmax(-1), cut.argmax(-1))
    else:
        assert torch.equal(whole, cut)


def test_logits_do_not_depend_on_the_length_of_what_follows_in_the_prompt(model: HostModel) -> None:
    prompt = prompts_of(model, 12)[-1]
    if any(depends_on_rows(m.weight) for m in model.model.modules() if isinstance(m, nn.Linear)):
        pytest.skip("products of prompts depend on their number of tokens in this dtype on this processor")
    runner = HostRunner(model, max_rows=2, max_tokens=512)
    row = runner.allocate()
    every = runner.prefill(row, prompt, all_logits=True).logits
    runner.free(row)
    for length in (1, 5, 40, len(prompt) - 1):
        row = runner.allocate()
        assert torch.equal(runner.prefill(row, prompt[:length], all_logits=True).logits, every[:length])
        runner.free(row)


def test_products_get_a_fixed_number_of_rows_only_where_their_bits_depend_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    module = nn.Sequential(nn.Linear(4, 4))
    monkeypatch.setattr("server.model.seam.rows.depends_on_rows", lambda weight: False)
    assert fix_rows(module) == 0
    monkeypatch.setattr("server.model.seam.rows.depends_on_rows", lambda weight: True)
    module[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    inner: Callable[[Tensor], Tensor] = module[0].forward
    monkeypatch.setattr(module[0], "forward", lambda x: (seen.append(len(x)), inner(x))[1])
    assert fix_rows(module) == 1
    x = torch.randn(11, 1, 4)
    with rows_of_step(StepRows(lengths=[1] * 11)):
        together = module(x)
    assert seen == [11, *[BLOCK_ROWS["cpu"]] * 11]
    assert torch.allclose(together, inner(x))
    assert torch.allclose(module(x[:3]), inner(x[:3])), "outside of a step the rows stay as they come"


def test_without_the_promise_rows_share_their_products(tiny_store: Path) -> None:
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=16, batch_invariant=False)
    model = load_model(Store.open(tiny_store), options)
    assert not any("forward" in vars(module) for module in model.model.modules())
    prompts = prompts_of(model, 4)
    alone = [greedy_together(model, [prompt], 4)[0] for prompt in prompts]
    for one, other in zip(alone, greedy_together(model, prompts, 4), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    model.close()
