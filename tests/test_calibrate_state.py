"""Calibration leaves the model as it was, bit for bit, also when interrupted; what cannot be calibrated is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import DENSE, INT8, NF4, NF4_NESTED, Base, adapted, byte_tokenizer, logits
from calibration import TEXTS, padded_batches
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from peft_sgrq import Saliency, SGRQConfig, calibrate
from peft_sgrq.selection import LayerSaliency

CRITERIA = ["obs", "diag", "fisher", "gradient", "magnitude", "random"]


def run(model: Any, data: Any, criterion: Any = "obs", config: SGRQConfig | None = None, **kwargs: Any) -> Saliency:
    config = config or SGRQConfig(group_size=16, task_type="CAUSAL_LM")
    return calibrate(model, config, data, criterion=criterion, progress=False, **kwargs)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All there is to see of a model and of the state around it; tensors as copies, other objects themselves."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            seen[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    parameters = dict(model.named_parameters())
    return {
        "attributes": seen,
        "tensors": {key: value.clone() for key, value in tensors.items()},
        "gradients": {
            key: value.grad if value.grad is None else value.grad.clone() for key, value in parameters.items()
        },
        "trainable": {key: value.requires_grad for key, value in parameters.items()},
        "config": model.config.to_dict(),
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def check_same(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, (torch.Tensor, np.ndarray)):
        assert type(before) is type(after) and before.dtype == after.dtype, where
        equal = np.array_equal if isinstance(before, np.ndarray) else torch.equal
        assert before is after or equal(before, after), where
    elif isinstance(before, (dict, tuple, list)):
        assert type(before) is type(after) and len(before) == len(after), where
        keys = before if isinstance(before, dict) else range(len(before))
        assert not isinstance(before, dict) or list(before) == list(after), where
        for key in keys:
            check_same(before[key], after[key], f"{where}.{key}")
    else:
        assert before is after or before == after, where


def prepared(base: Base, directory: Path, training: bool) -> Any:
    """A model whose state is anything but fresh: mixed modes, gradients, hooks, a forward of its own, a used cache."""
    model = base.load(directory).train(training)
    model.model.layers[0].mlp.eval()
    model.model.layers[1].self_attn.train()
    model.model.norm.weight.requires_grad_(True).grad = torch.ones_like(model.model.norm.weight)
    model.model.layers[1].register_forward_hook(lambda *args: None)
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *args: None)
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    model.config.use_cache = True
    if base is INT8:  # bitsandbytes moves the scales of int8 layers at the first forward pass
        logits(model, torch.tensor([[5, 6]]))
    return model


@pytest.mark.parametrize("base", [NF4_NESTED, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_is_as_it_was(base: Base, criterion, training, llama_dir: Path, ids):
    model = prepared(base, llama_dir, training)
    before = snapshot(model)
    loader = DataLoader(padded_batches(), batch_size=None, shuffle=True)
    run(model, loader, criterion)
    check_same(before, snapshot(model))
    fresh = base.load(llama_dir)
    assert torch.equal(logits(model.eval(), ids), logits(fresh, ids))


def interrupting(error: type[BaseException], after: int) -> Any:
    calls = []

    def criterion(layer: Any) -> torch.Tensor:
        calls.append(layer.name)
        if len(calls) > after:
            raise error("stop")
        return layer.weight.square()

    return criterion


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 8])
def test_the_model_is_as_it_was_when_interrupted_between_blocks(error, after, llama_dir: Path):
    model = prepared(NF4, llama_dir, True)
    before = snapshot(model)
    config = SGRQConfig(task_type="CAUSAL_LM")
    with pytest.raises(error):
        run(model, padded_batches(), interrupting(error, after), config)
    check_same(before, snapshot(model))
    assert config == SGRQConfig(task_type="CAUSAL_LM")


@pytest.mark.parametrize("criterion", ["obs", "diag", "fisher"])
@pytest.mark.parametrize("call", [1, 3])
def test_the_model_is_as_it_was_when_interrupted_in_a_forward_pass(criterion, call, llama_dir: Path):
    model = prepared(NF4, llama_dir, True)
    calls = []

    def interrupt(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, padded_batches(), criterion)
    check_same(before, snapshot(model))


def test_the_model_is_as_it_was_when_interrupted_while_data_is_read(llama_dir: Path):
    def batches() -> Any:
        yield padded_batches()[0]
        torch.rand(3), random.random(), np.random.rand()
        raise KeyboardInterrupt

    model = prepared(DENSE, llama_dir, True)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches())
    check_same(before, snapshot(model))


def test_calibration_comes_to_the_same_in_train_and_eval_mode_and_twice(llama_dir: Path):
    model = NF4.load(llama_dir)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    scores = [run(model.train(mode), padded_batches()).scores for mode in (True, False, True)]
    for name in scores[0]:
        assert torch.equal(scores[0][name], scores[1][name]) and torch.equal(scores[0][name], scores[2][name])


# data


def test_texts_tensors_examples_and_datasets_are_the_same_data(llama_dir: Path):
    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    expected = run(model, TEXTS, tokenizer=tokenizer)
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
        found = run(model, data, tokenizer=tokenizer, **kwargs)
        assert found.tokens == expected.tokens, form
        for name, scores in expected.scores.items():
            torch.testing.assert_close(found.scores[name], scores, rtol=1e-3, atol=0, msg=form)
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)


def test_chats_are_written_out_by_the_template_of_the_tokenizer(llama_dir: Path):
    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    expected = run(model, texts, tokenizer=tokenizer)
    for data in (chats, Dataset.from_dict({"messages": chats})):
        found = run(model, data, tokenizer=tokenizer)
        assert found.tokens == expected.tokens
        assert all(torch.equal(found.scores[name], scores) for name, scores in expected.scores.items())


def test_tensors_without_a_mask_count_whole(llama_dir: Path):
    ids = torch.randint(3, 256, (6, 10))
    model = DENSE.load(llama_dir)
    for data in ([ids[:3], ids[3:]], DataLoader(TensorDataset(ids), batch_size=4), [{"input_ids": ids}]):
        assert run(model, data).tokens == 60


def test_samples_are_chosen_by_the_seed_and_lengths_are_limited(llama_dir: Path):
    model, tokenizer = DENSE.load(llama_dir), byte_tokenizer()
    kwargs = {"tokenizer": tokenizer, "samples": 4}
    first, again, other = (run(model, TEXTS, seed=seed, **kwargs) for seed in (0, 0, 2))
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(first.scores[name], again.scores[name])
    assert not torch.equal(first.scores[name], other.scores[name])
    assert run(model, TEXTS, tokenizer=tokenizer, max_length=7).tokens == 7 * len(TEXTS)
    assert run(model, padded_batches(rows=4), samples=5).tokens == sum(
        int(batch["attention_mask"].sum()) for batch in padded_batches(rows=4)[:2]
    )
    model.config.max_position_embeddings = 9
    assert run(model, TEXTS, tokenizer=tokenizer).tokens == 9 * len(TEXTS)


# mistakes

EMPTY = "The calibration data is empty, expected at least one text or batch"


@pytest.mark.parametrize("criterion", ["obs", "diag", "gradient"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], EMPTY),
        (["", ""], EMPTY),
        (Dataset.from_dict({"text": []}), EMPTY),
        (DataLoader([], batch_size=2), EMPTY),
        (
            [{"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": torch.zeros(2, 5)}],
            "no token that counts: found 2 sequences that are all padding",
        ),
        (Dataset.from_dict({"prose": ["a"]}), r"no column .*'prose'.*`column`"),
    ],
    ids=["list", "empty texts", "dataset", "loader", "padding", "column"],
)
def test_data_without_tokens_is_refused(criterion, data, message, llama_dir: Path):
    model = DENSE.load(llama_dir)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run(model, data, criterion, tokenizer=byte_tokenizer())
    check_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "message"),
    [
        ("a text", {}, TypeError, "`data` is a str.*put a single text into a list"),
        (None, {}, TypeError, "`data` is a NoneType"),
        (DatasetDict(train=Dataset.from_dict({"text": TEXTS})), {}, TypeError, "expected one split"),
        (Dataset.from_dict({"text": TEXTS}), {"column": "body"}, ValueError, r"no column 'body', found .*'text'"),
        (TEXTS, {"tokenizer": None}, TypeError, "there is no tokenizer"),
        ([3], {}, TypeError, "holds a int"),
        ([torch.zeros(2, 3, 4)], {}, TypeError, "holds a Tensor"),
        (TEXTS, {"criterion": "salience"}, ValueError, "`criterion` is 'salience'"),
        (TEXTS, {"criterion": "error"}, ValueError, "'error' compares with the weights before quantization"),
        (TEXTS, {"criterion": "error", "original": 3}, TypeError, "`original` is a int"),
        (TEXTS, {"criterion": lambda layer: layer.weight[:3]}, ValueError, r"returned \(3, 64\).*expected a tensor"),
        (TEXTS, {"criterion": lambda layer: -layer.weight.square()}, ValueError, "scores of layer .* are negative"),
        (TEXTS, {"criterion": lambda layer: None}, ValueError, "returned None"),
    ],
)
def test_mistakes_are_named(data, kwargs, error, message, llama_dir: Path):
    kwargs = {"tokenizer": byte_tokenizer(), "criterion": "obs", **kwargs}
    with pytest.raises(error, match=message):
        run(DENSE.load(llama_dir), data, **kwargs)


def test_a_model_without_weights_or_with_an_adapter_is_refused(llama_dir: Path):
    config = DENSE.load(llama_dir).config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"has no weights yet .it is on the meta device"):
        run(empty, padded_batches())
    model = adapted(DENSE, llama_dir)
    for wrapped in (model, model.base_model, model.get_base_model()):
        with pytest.raises(ValueError, match=r"has an adapter.*calibrate before `get_peft_model`"):
            run(wrapped, padded_batches())
    with pytest.raises(ValueError, match=r"none of the layers that the config targets"):
        run(DENSE.load(llama_dir), padded_batches(), config=SGRQConfig(target_modules=["c_attn"]))


def test_the_original_must_be_what_was_quantized(llama_dir: Path, gpt2_dir: Path):
    for original in (str(llama_dir), DENSE.load(llama_dir)):
        assert run(NF4.load(llama_dir), padded_batches(), "error", original=original).criterion == "error"
    with pytest.raises(ValueError, match=r"no difference between the model and `original`"):
        run(DENSE.load(llama_dir), padded_batches(), "error", original=llama_dir)
    with pytest.raises(ValueError, match=r"`original` has no layer 'model.layers.0.self_attn.q_proj'"):
        run(NF4.load(llama_dir), padded_batches(), "error", original=DENSE.load(gpt2_dir))


def test_activations_that_are_not_finite_are_named(llama_dir: Path):
    model = DENSE.load(llama_dir)
    model.model.layers[1].input_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of layer 'model.layers.1.self_attn.q_proj' are not finite"):
        run(model, padded_batches())


def test_a_ratio_that_cannot_be_had_is_refused_before_the_work(llama_dir: Path):
    config = SGRQConfig(ratio="global", budget=3, group_size=16)
    calls: list[str] = []
    with pytest.raises(ValueError, match=r"`budget` allows 3 scales"):
        run(DENSE.load(llama_dir), padded_batches(), lambda layer: calls.append(layer.name), config)
    assert not calls


# files


def example() -> Saliency:
    layers = {
        "a.b": LayerSaliency(torch.rand(64), (8, 64), "group", 16, "dense-16:01:"),
        "a.c": LayerSaliency(torch.rand(32), (4, 32), "group", 8, "x:2:3", torch.randperm(32) // 8),
        "d": LayerSaliency(torch.rand(6), (6, 32), "row", 32, "bnb-int8-row:0:0"),
    }
    return Saliency(layers, "obs", 123, {"total": 1.5}, {"a.b": 0.1})


def test_a_saliency_survives_saving(tmp_path: Path):
    saliency, path = example(), tmp_path / "s.safetensors"
    saliency.save(path)
    loaded = Saliency.load(str(path))
    for name in ("criterion", "tokens", "seconds", "ratios"):
        assert getattr(loaded, name) == getattr(saliency, name)
    assert list(loaded.layers) == list(saliency.layers)
    for name, layer in saliency.layers.items():
        check_same(vars(layer), vars(loaded.layers[name]))
    assert loaded.select(0.5) == saliency.select(0.5)
    saliency.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_that_are_no_saliency_are_refused(tmp_path: Path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(OSError):
        Saliency.load(path)
    example().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"truncated or corrupt"):
        Saliency.load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(ValueError, match=r"format version 9.*upgrade"):
        Saliency.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"holds no saliency"):
        Saliency.load(path)
    broken = example()
    broken.scores["a.b"][3] = torch.nan
    broken.save(path)
    with pytest.raises(ValueError, match=r"NaN, infinite or negative scores for layer 'a.b'"):
        Saliency.load(path)


def test_the_saliency_of_another_model_is_refused(llama_dir: Path, gpt2_dir: Path, tmp_path: Path):
    from peft import get_peft_model

    model = NF4.load(llama_dir)
    saliency = run(model, padded_batches())
    saliency.save(tmp_path / "s.safetensors")
    loaded = Saliency.load(tmp_path / "s.safetensors")
    loaded.check(model)
    other = DENSE.load(llama_dir)
    for parameter in other.parameters():
        parameter.data += 0.1
    for wrong in (other, DENSE.load(gpt2_dir), DENSE.load(llama_dir)):
        with pytest.raises(
            ValueError, match=r"saliency is that of another model: layer 'model.layers.0.self_attn.q_proj'"
        ):
            loaded.check(wrong)
        with pytest.raises(ValueError):
            get_peft_model(wrong, loaded.configure(SGRQConfig(group_size=64)))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({"criterion": "obs"}, "criterion"), ({"criterion": "custom:f"}, "criterion"), ({"ratio": "layerwise"}, "ratio")],
)
def test_what_needs_calibration_says_so_without(settings, asked, llama_dir: Path):
    from peft import get_peft_model

    with pytest.raises(ValueError, match=rf"`{asked}` is .*needs calibration.*call `peft_sgrq.calibrate"):
        get_peft_model(DENSE.load(llama_dir), SGRQConfig(**settings))
