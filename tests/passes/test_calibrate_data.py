"""Data of any form comes to the same; what cannot be calibrated on is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.bases import DENSE, INT8, NF4, adapted, byte_tokenizer
from support.calibration import TEXTS, check_same, padded_batches, run_on, snapshot
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from peft_sgrq import SGRQConfig


class _Later:
    """A dataset of some columns, made in the test: the library takes long to import."""

    def __init__(self, columns: dict[str, Any], split: str | None = None) -> None:
        self.columns, self.split = columns, split

    def made(self) -> Any:
        from datasets import Dataset, DatasetDict

        data = Dataset.from_dict(self.columns)
        return DatasetDict({self.split: data}) if self.split else data


@pytest.fixture
def data(request: pytest.FixtureRequest) -> Any:
    return request.param.made() if isinstance(request.param, _Later) else request.param


def test_texts_tensors_examples_and_datasets_are_the_same_data(llama_dir: Path):
    from datasets import Dataset

    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    expected = run_on(model, TEXTS, tokenizer=tokenizer)
    assert expected.tokens == sum(len(tokenizer(text).input_ids) for text in TEXTS)
    tokens = [{"input_ids": tokenizer(text).input_ids} for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batches = [{key: value[start : start + 5] for key, value in padded.items()} for start in range(0, len(TEXTS), 5)]
    forms = {
        "dataset": (Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))}), {}),
        "named column": (Dataset.from_dict({"prose": TEXTS, "text": ["no"] * len(TEXTS)}), {"column": "prose"}),
        "streamed": (Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), {}),
        "tokenized": (Dataset.from_list(tokens), {}),
        "examples": (tokens, {}),
        "torch format": (Dataset.from_list(tokens).with_format("torch"), {}),
        "DataLoader": (DataLoader(batches, batch_size=None), {}),
        "generator": (iter(batches), {}),
        "other batch size": (TEXTS, {"batch_size": 1}),
        "tuple": (tuple(TEXTS), {}),
    }
    for form, (data, kwargs) in forms.items():
        found = run_on(model, data, tokenizer=tokenizer, **kwargs)
        assert found.tokens == expected.tokens, form
        for name, scores in expected.scores.items():
            torch.testing.assert_close(found.scores[name], scores, rtol=1e-3, atol=0, msg=form)
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)


def test_chats_are_written_out_by_the_template_of_the_tokenizer(llama_dir: Path):
    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    expected = run_on(model, texts, tokenizer=tokenizer)
    for data in (chats, _Later({"messages": chats}).made()):
        found = run_on(model, data, tokenizer=tokenizer)
        assert found.tokens == expected.tokens
        assert all(torch.equal(found.scores[name], scores) for name, scores in expected.scores.items())


def test_tensors_without_a_mask_count_whole(llama_dir: Path):
    ids = torch.randint(3, 256, (6, 10))
    model = DENSE.load(llama_dir)
    for data in ([ids[:3], ids[3:]], DataLoader(TensorDataset(ids), batch_size=4), [{"input_ids": ids}]):
        assert run_on(model, data).tokens == 60


def test_samples_are_chosen_by_the_seed_and_lengths_are_limited(llama_dir: Path):
    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    kwargs = {"tokenizer": tokenizer, "samples": 4}
    first, again, other = (run_on(model, TEXTS, seed=seed, **kwargs) for seed in (0, 0, 2))
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(first.scores[name], again.scores[name])
    assert not torch.equal(first.scores[name], other.scores[name])
    assert run_on(model, TEXTS, tokenizer=tokenizer, max_length=np.int64(7)).tokens == 7 * len(TEXTS)
    assert run_on(model, padded_batches(rows=4), samples=5).tokens == sum(
        int(batch["attention_mask"].sum()) for batch in padded_batches(rows=4)[:2]
    )
    model.config.max_position_embeddings = 9
    assert run_on(model, TEXTS, tokenizer=tokenizer).tokens == 9 * len(TEXTS)


# mistakes

EMPTY = "The calibration data is empty, expected at least one text or batch"


@pytest.mark.parametrize("criterion", ["obs", "gradient"])  # from inputs, and from gradients
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], EMPTY),
        (["", ""], EMPTY),
        (_Later({"text": []}), EMPTY),
        (DataLoader([], batch_size=2), EMPTY),
        (
            [{"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": torch.zeros(2, 5)}],
            "no token that counts: found 2 sequences that are all padding",
        ),
        (_Later({"prose": ["a"]}), r"no column .*'prose'.*`column`"),
    ],
    ids=["list", "empty texts", "dataset", "loader", "padding", "column"],
    indirect=["data"],
)
def test_data_without_tokens_is_refused(criterion, data, message, llama_dir: Path):
    model = DENSE.load(llama_dir)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run_on(model, data, criterion, tokenizer=byte_tokenizer())
    check_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "message"),
    [
        ("a text", {}, TypeError, "`data` is a str.*put a single text into a list"),
        (None, {}, TypeError, "`data` is a NoneType"),
        (_Later({"text": TEXTS}, "train"), {}, TypeError, "expected one split"),
        (_Later({"text": TEXTS}), {"column": "body"}, ValueError, r"no column 'body', found .*'text'"),
        (TEXTS, {"tokenizer": None}, TypeError, "there is no tokenizer"),
        ([3], {}, TypeError, "holds a int"),
        ([torch.zeros(2, 3, 4)], {}, TypeError, "holds a Tensor"),
        (TEXTS, {"samples": 0}, ValueError, "`samples` is 0, expected a whole number of at least 1"),
        (TEXTS, {"max_length": -1}, ValueError, "`max_length` is -1"),
        (TEXTS, {"batch_size": 0.5}, ValueError, "`batch_size` is 0.5"),
        (TEXTS, {"criterion": "salience"}, ValueError, "`criterion` is 'salience'"),
        (TEXTS, {"criterion": "error"}, ValueError, "'error' compares with the weights before quantization"),
        (TEXTS, {"criterion": "error", "original": 3}, TypeError, "`original` is a int"),
        (TEXTS, {"criterion": lambda layer: layer.weight[:3]}, ValueError, r"returned \(3, 64\).*expected a tensor"),
        (TEXTS, {"criterion": lambda layer: -layer.weight.square()}, ValueError, "scores of layer .* are negative"),
        (TEXTS, {"criterion": lambda layer: None}, ValueError, "returned None"),
    ],
    indirect=["data"],
)
def test_mistakes_are_named(data, kwargs, error, message, llama_dir: Path):
    kwargs = {"tokenizer": byte_tokenizer(), "criterion": "obs", **kwargs}
    with pytest.raises(error, match=message):
        run_on(DENSE.load(llama_dir), data, **kwargs)


def test_a_model_without_weights_or_with_an_adapter_is_refused(llama_dir: Path):
    config = DENSE.load(llama_dir).config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"has no weights yet .it is on the meta device"):
        run_on(empty, padded_batches())
    model = adapted(DENSE, llama_dir)
    for wrapped in (model, model.base_model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"has an adapter.*calibrate before `get_peft_model`"):
            run_on(wrapped, padded_batches())
    with pytest.raises(ValueError, match=r"none of the layers that the config targets"):
        run_on(DENSE.load(llama_dir), padded_batches(), config=SGRQConfig(target_modules=["c_attn"]))


def test_the_original_must_be_what_was_quantized(llama_dir: Path, gpt2_dir: Path, tmp_path: Path):
    for original in (str(llama_dir), DENSE.load(llama_dir)):
        assert run_on(NF4.load(llama_dir), padded_batches(), "error", original=original).criterion == "error"
    with pytest.raises(ValueError, match=r"no difference between the model and `original`"):
        run_on(DENSE.load(llama_dir), padded_batches(), "error", original=llama_dir)
    with pytest.raises(ValueError, match=r"`original` has no layer 'model.layers.0.self_attn.q_proj'"):
        run_on(NF4.load(llama_dir), padded_batches(), "error", original=DENSE.load(gpt2_dir))
    INT8.load(llama_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`original` .* is quantized itself"):
        run_on(NF4.load(llama_dir), padded_batches(), "error", original=tmp_path)


def test_activations_that_are_not_finite_are_named(llama_dir: Path):
    model = DENSE.load(llama_dir)
    model.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of layer 'model.layers.1.self_attn.q_proj' are not finite"):
        run_on(model, padded_batches())


def test_a_ratio_that_cannot_be_had_is_refused_before_the_work(llama_dir: Path):
    config = SGRQConfig(ratio="global", budget=3, group_size=16)
    calls: list[str] = []
    with pytest.raises(ValueError, match=r"`budget` allows 3 scales"):
        run_on(DENSE.load(llama_dir), padded_batches(), lambda layer: calls.append(layer.name), config)
    assert not calls
