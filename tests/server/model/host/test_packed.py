"""Encoded experts on the host-driven path, against stock transformers on their float32 values."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from expert_store.encoding import RowEncoding
from expert_store.rows import span_values
from expert_store.store import Store
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.model.host.assembly import HostModel, load_model
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import make_runner
from server.model.runner import RowStep, RunnerOptions
from tests.expert_store.test_rows import ENCODINGS
from tests.families.checkpoints import moe_blocks, random_model
from tests.families.serving import checkpoint_of
from tests.server.model.host.greedy import greedy, stock_greedy
from tests.server.model.repacked import repack

PROMPT = "The capital of France is Paris, and the capital of Italy is"
BOTH = ("gate_up_proj", "down_proj")


@pytest.fixture
def load() -> Iterator[Callable[..., HostModel]]:
    """Loads stores on the CPU; closes the models at the end."""
    models: list[HostModel] = []

    def make(store: Path, dtype: torch.dtype = torch.float32, **options: object) -> HostModel:
        models.append(load_model(Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=dtype, **options)))
        return models[-1]

    yield make
    for model in models:
        model.close()


def decoded(model: PreTrainedModel, path: Path, *, transposed: bool = False) -> PreTrainedModel:
    """The model with the values of a store's experts, in float32."""
    store = Store.open(path)
    with torch.no_grad():
        for (_, _, experts), spec in zip(moe_blocks(model), store.manifest.layers, strict=True):
            for expert in range(store.manifest.model.num_experts):
                span = torch.empty(spec.span_bytes, dtype=torch.uint8)
                store.read_expert(spec.layer, expert, span)
                for name, value in span_values(spec, span).items():
                    getattr(experts, name)[expert] = value.t() if transposed else value
    store.close()
    return model


def assert_equals_stock(model: HostModel, stock: PreTrainedModel, ids: list[int], count: int) -> None:
    tokens, logits = greedy(make_runner(model, max_rows=2, max_tokens=128), ids, count)
    wanted_tokens, wanted_logits = stock_greedy(stock, ids, count)
    assert float((logits - wanted_logits).abs().max()) < 1e-4
    assert tokens == wanted_tokens
    model.cache.check_integrity()


@pytest.fixture(scope="module", params=["int4", "fp8 in blocks", "mxfp4"])
def packed_store(request: pytest.FixtureRequest, small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    return repack(small_store, folder, dict.fromkeys(BOTH, ENCODINGS[request.param]))


def load_stock(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="batched_mm"
    ).eval()


def test_packed_experts_equal_stock_on_their_values_at_every_slot_count(
    packed_store: Path, small_store: Path, load: Callable[..., HostModel]
) -> None:
    stock = decoded(load_stock(small_store.parent / "checkpoint"), packed_store)
    for num_slots in (1, 4, 8):
        model = load(packed_store, num_slots=num_slots)
        assert_equals_stock(model, stock, model.tokenizer(PROMPT).input_ids, 12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODINGS)
def test_the_bundled_checkpoint_in_every_encoding_equals_stock_on_its_values(
    name: str, tiny_store: Path, tiny_checkpoint: Path, tmp_path: Path, load: Callable[..., HostModel]
) -> None:
    path = repack(tiny_store, tmp_path / "store", dict.fromkeys(BOTH, ENCODINGS[name]))
    stock = decoded(load_stock(tiny_checkpoint), path)
    for num_slots in (1, 32, 64):
        model = load(path, num_slots=num_slots)
        # beyond 18 tokens, routers meet two experts whose logits differ by 2e-6 in one of the encodings
        assert_equals_stock(model, stock, model.tokenizer(PROMPT).input_ids, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_depend_neither_on_slots_nor_on_the_company(
    packed_store: Path, dtype: torch.dtype, load: Callable[..., HostModel]
) -> None:
    prompts = ("Once upon a time", PROMPT, "12 + 30 =")
    alone, together = [], []
    for num_slots in (1, 8):
        model = load(packed_store, dtype, num_slots=num_slots)
        runner = HostRunner(model, max_rows=4, max_tokens=128)
        ids = [model.tokenizer(prompt).input_ids for prompt in prompts]
        alone.append([greedy(runner, each, 5)[1] for each in ids])
        rows = [runner.allocate() for _ in ids]
        logits = [[runner.prefill(row, each).logits[-1]] for row, each in zip(rows, ids, strict=True)]
        for _ in range(4):
            steps = [RowStep(row, int(each[-1].argmax())) for row, each in zip(rows, logits, strict=True)]
            for each, one in zip(logits, runner.decode(steps).logits, strict=True):
                each.append(one.clone())
        together.append([torch.stack(each) for each in logits])
    for few, many, beside, beside_many in zip(*alone, *together, strict=True):
        assert torch.equal(few, many)
        assert torch.equal(few, beside)
        assert torch.equal(few, beside_many)


def test_slots_hold_the_bytes_of_the_store(packed_store: Path, load: Callable[..., HostModel]) -> None:
    spans = sum(spec.span_bytes for spec in Store.open(packed_store).manifest.layers)
    model = load(packed_store, torch.bfloat16)
    assert model.cache.statistics().slot_bytes == 8 * spans
    few = load(packed_store, torch.bfloat16, slots_memory_bytes=3 * spans + 1)
    assert few.cache.num_slots == 3


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_layer_may_have_one_matrix_encoded_and_the_other_plain(
    small_store: Path, name: str, tmp_path: Path, load: Callable[..., HostModel]
) -> None:
    path = repack(small_store, tmp_path / "store", {name: ENCODINGS["int8"]})
    stock = decoded(load_stock(small_store.parent / "checkpoint"), path)
    assert_equals_stock(load(path, num_slots=3), stock, list(range(3, 12)), 6)


@pytest.mark.parametrize("encoding", [RowEncoding("fp4", 8, "F8_E8M0"), RowEncoding("int4", 24, "F16", zeros="U8")])
def test_encoded_rows_of_transposed_modules_are_output_rows(
    encoding: RowEncoding, tmp_path: Path, repository: Path, load: Callable[..., HostModel]
) -> None:
    model = random_model("gpt_oss")
    prepare(checkpoint_of(model, tmp_path / "checkpoint", repository), tmp_path / "plain", SelectionRequest()).run()
    path = repack(tmp_path / "plain", tmp_path / "store", dict.fromkeys(BOTH, encoding), transposed=True)
    assert_equals_stock(load(path, num_slots=3), decoded(model, path, transposed=True), list(range(3, 12)), 6)
