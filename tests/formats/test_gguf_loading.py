"""Loading GGUF files with their weights packed, of every architecture the tests can make."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from support.gguf_files import ARCHITECTURES, mixed, q4_0, tiny_model, write_gguf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peft_sgrq
from peft_sgrq import SGRQConfig, SGRQGgufConfig, merge_checkpoint
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.layers import GGUFEmbedding, GGUFHead, GGUFLinear, GGUFTiedHead


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def kinds(model):
    return {name: module.kind.name for name, module in model.named_modules() if isinstance(module, GGUFLinear)}


CASES = [(kind, tied) for kind in ARCHITECTURES for tied in (False, True) if tied or not kind.startswith("gemma")]


@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_a_packed_model_gives_the_bits_of_the_one_transformers_dequantizes(model_type, tied, tmp_path, ids):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(model_type, tied), mixed)
    model, tokenizer = peft_sgrq.load_gguf(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(logits(model, ids), logits(theirs, ids))
    dense = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    assert all(name.endswith("o_proj") for name in dense)  # what the file has in half precision
    head = model.get_output_embeddings()
    assert type(head) is (GGUFTiedHead if tied else GGUFHead)
    assert isinstance(model.get_input_embeddings(), GGUFEmbedding)
    assert torch.equal(head.weight, theirs.get_output_embeddings().weight)
    assert set(kinds(model).values()) == {"Q4_K", "Q6_K"}
    assert tokenizer.decode(tokenizer("the cat").input_ids) == "the cat"

    adapted = get_peft_model(model, SGRQConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    config = adapted.peft_config["default"]
    assert config.base_quantization["gguf_file"] == "m.gguf"
    assert not any("lm_head" in name for name in config.target_modules)
    unmerged = logits(adapted, ids)
    if model_type not in ("llama", "gemma3_text"):
        return
    saved = peft_sgrq.save_gguf(adapted.merge_and_unload(safe_merge=True), tmp_path / "out.gguf")
    again, _ = peft_sgrq.load_gguf(saved)
    assert torch.equal(logits(again, ids), unmerged)
    assert not torch.equal(unmerged, logits(theirs, ids))
    assert saved.stat().st_size == path.stat().st_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a Llama in Q4_0."""
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf(directory / "m.Q4_0.gguf", tiny_model("llama"), q4_0)
    return directory


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="m.Q4_0.gguf", quantization_config=SGRQGgufConfig(), dtype=torch.float32, **kwargs
    )


def test_from_pretrained_with_our_config_and_auto_peft_find_the_base(folder, tmp_path, ids):
    model = get_peft_model(load(folder), SGRQConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert "gguf_file='m.Q4_0.gguf', quantization_config=SGRQGgufConfig()" in (tmp_path / "README.md").read_text()
    auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.Q4_0.gguf", quantization_config=SGRQGgufConfig(), dtype=torch.float32
    )
    assert torch.equal(logits(auto, ids), expected)
    again, _ = peft_sgrq.load_gguf(folder, "m.Q4_0.gguf", adapter=tmp_path)
    assert isinstance(again, PeftModel) and torch.equal(logits(again, ids), expected)
    dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.Q4_0.gguf", dtype=torch.float32)
    with pytest.raises(ValueError, match="SGRQGgufConfig"):
        PeftModel.from_pretrained(dense, tmp_path)


def test_the_tokenizer_has_no_token_that_the_embedding_has_no_row_for(folder, tmp_path, ids):
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="m.Q4_0.gguf")
    model, tokenizer = peft_sgrq.load_gguf(folder, "m.Q4_0.gguf", dtype=torch.float32)
    rows = model.config.vocab_size
    assert len(theirs) == rows + 1, "transformers adds no token any more: remove _drop_tokens_beyond"
    assert len(tokenizer) == rows and tokenizer("the </s>").input_ids == theirs("the </s>").input_ids
    adapted = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.Q4_0.gguf", quantization_config=SGRQGgufConfig(), dtype=torch.float32
    )
    assert torch.equal(logits(auto, ids), logits(adapted, ids))


def test_without_our_config_transformers_loads_as_before(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.Q4_0.gguf")
    assert not kinds(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_is_trained_by_trl(tied, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = peft_sgrq.load_gguf(write_gguf(tmp_path / "m.gguf", tiny_model("llama", tied)))
    tokenizer.pad_token = tokenizer.eos_token
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        max_length=16,
        disable_tqdm=True,
        bf16=False,
    )
    data = Dataset.from_dict({"text": ["the cat sat on the mat"] * 6})
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=SGRQConfig()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_trl_loads_a_file_beside_the_config_of_its_model(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = tiny_model("llama")
    write_gguf(tmp_path / "m.gguf", model, mixed)
    _, tokenizer = peft_sgrq.load_gguf(tmp_path / "m.gguf")
    arguments = {"gguf_file": "m.gguf", "quantization_config": SGRQGgufConfig()}

    def trainer():
        return SFTTrainer(
            model=str(tmp_path),
            args=SFTConfig(
                str(tmp_path / "out"),
                max_steps=1,
                max_length=16,
                learning_rate=1e-2,
                use_cpu=True,
                bf16=False,
                report_to="none",
                model_init_kwargs=arguments,
            ),
            train_dataset=Dataset.from_dict({"text": ["the cat sat on the mat"] * 4}),
            processing_class=tokenizer,
            peft_config=SGRQConfig(task_type="CAUSAL_LM"),
        )

    with pytest.raises(ValueError, match="model_type"):  # TRL 1.16 reads the config without the name of the file
        trainer()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    trained = trainer()
    trained.train()
    trained.save_model(tmp_path / "adapter")
    saved = peft_sgrq.save_gguf(trained.model.merge_and_unload(), tmp_path / "saved.gguf")
    merge_checkpoint(None, tmp_path / "adapter", tmp_path / "merged.gguf")
    assert saved.read_bytes() == (tmp_path / "merged.gguf").read_bytes() != (tmp_path / "m.gguf").read_bytes()


def test_a_gradient_reaches_all_layers_with_checkpointing_too(folder, ids):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load(folder), SGRQConfig(init_weights=False)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(grad.abs().max() > 0 for grad in grads[0])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_a_vocabulary_split_in_an_unknown_way_and_unused_tensors_are_said(tmp_path, caplog):
    extra = {"rope_factors_long.weight": torch.ones(32).numpy()}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), pre="smollm", extra=extra)
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is 'smollm'"):
        peft_sgrq.load_gguf(path)
    assert "1 tensors of m.gguf are not used" in caplog.text and "rope_factors_long.weight" in caplog.text


def test_sub_blocks_can_be_left_out(tmp_path, ids):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), mixed)
    model, _ = peft_sgrq.load_gguf(path, sub_blocks=False)
    model = get_peft_model(model, SGRQConfig(init_weights=False))
    names = {digest.split(":")[0] for digest in model.peft_config["default"].base_fingerprint.values()}
    assert names == {"gguf-Q4_K-256", "gguf-Q6_K-256"}
    assert model.peft_config["default"].base_quantization["sub_blocks"] is False
    model.save_pretrained(tmp_path / "adapter")
    assert "SGRQGgufConfig(sub_blocks=False)" in (tmp_path / "adapter" / "README.md").read_text()


def test_frequencies_that_a_file_divides_are_divided(tmp_path, ids, caplog):
    model = tiny_model("llama")
    scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    settings = {"rope_type": "llama3", "rope_theta": 10000.0, **scaled}
    theirs = type(model)(type(model.config)(**{**model.config.to_dict(), "rope_parameters": settings})).eval()
    theirs.load_state_dict(model.state_dict())
    divided = theirs.model.rotary_emb.inv_freq
    factors = (model.model.rotary_emb.inv_freq / divided).numpy()
    assert factors.max() > 7
    path = write_gguf(tmp_path / "m.gguf", model, lambda name: None, extra={"rope_freqs.weight": factors})
    loaded, _ = peft_sgrq.load_gguf(path)
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, divided, rtol=1e-6)
    assert "not used" not in caplog.text
    assert torch.allclose(logits(loaded, ids), logits(theirs, ids), atol=1e-4)
    assert not torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-3)
    own, _ = peft_sgrq.load_gguf(path, config=theirs.config)  # which divides them itself
    assert torch.equal(own.model.rotary_emb.inv_freq, divided) and "not used" not in caplog.text


def test_positions_that_a_file_scales_are_said(tmp_path, caplog):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2", tied=True), q4_0)
    data, key = path.read_bytes(), b"qwen2.rope.scaling.type"
    entry = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + (4).to_bytes(8, "little") + b"yarn"
    count = int.from_bytes(data[16:24], "little") + 1
    table = GGUFFile(path).table_end
    head = data[:16] + count.to_bytes(8, "little") + entry + data[24:table]
    path.write_bytes(head + bytes(-len(head) % 32) + data[-(-table // 32) * 32 :])
    peft_sgrq.load_gguf(path)
    assert "m.gguf scales rotary positions (rope.scaling.type is 'yarn')" in caplog.text
    caplog.clear()
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    peft_sgrq.load_gguf(path, config=config)
    assert "scales rotary positions" not in caplog.text


def test_arguments_of_from_pretrained_are_taken_or_refused_by_name(folder):
    assert peft_sgrq.load_gguf(folder / "m.Q4_0.gguf", torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="`quantization_config` is given, expected `sub_blocks`"):
        peft_sgrq.load_gguf(folder / "m.Q4_0.gguf", quantization_config=SGRQGgufConfig())


def test_a_merge_leaves_packed_embeddings_tied(tmp_path, recwarn):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", tied=True), q4_0)
    merged = get_peft_model(peft_sgrq.load_gguf(path)[0], SGRQConfig(init_weights=False)).merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert not [warning for warning in recwarn if "no longer tied" in str(warning.message)]


def test_all_linear_means_packed_layers_too(tmp_path):
    packed = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), q4_0)
    adapted = get_peft_model(peft_sgrq.load_gguf(packed)[0], SGRQConfig(target_modules="all-linear"))
    assert (
        adapted.peft_config["default"].target_modules
        == get_peft_model(peft_sgrq.load_gguf(packed)[0], SGRQConfig()).peft_config["default"].target_modules
    )
    some = write_gguf(tmp_path / "mixed.gguf", tiny_model("llama"), mixed)
    config = SGRQConfig(target_modules="all-linear", ratio=0.5)
    saliency = peft_sgrq.calibrate(peft_sgrq.load_gguf(some)[0], config, criterion="magnitude", progress=False)
    adapted = get_peft_model(peft_sgrq.load_gguf(some)[0], config)
    assert adapted.peft_config["default"].selection == saliency.select(0.5)
    adapted = get_peft_model(
        peft_sgrq.load_gguf(some)[0],
        SGRQConfig(target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM"),
    )
    ends = {name.rpartition(".")[2] for name in adapted.peft_config["default"].selection}
    assert ends == {*(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))}
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"o_proj' cannot be merged .*does not hold it in blocks"):
        merge_checkpoint(None, tmp_path / "adapter", tmp_path / "out.gguf")
    with pytest.raises(ValueError, match=r"o_proj\.weight' is not what .*dense layer in `target_modules`"):
        peft_sgrq.save_gguf(adapted.merge_and_unload(), tmp_path / "out.gguf")


def test_a_model_that_is_cast_computes_in_the_dtype_it_is_cast_to(tmp_path, ids):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("gemma3_text", tied=True), mixed)
    model, _ = peft_sgrq.load_gguf(path)
    before, scale = logits(model, ids), model.get_input_embeddings().embed_scale
    cast = logits(model.bfloat16(), ids)  # as DeepSpeed does
    assert cast.dtype == torch.bfloat16 and torch.allclose(cast.float(), before, atol=0.1 * before.abs().max())
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert logits(model.to(torch.float32), ids).dtype == torch.float32
    assert model.get_input_embeddings().embed_scale == scale


def test_offloaded_layers_have_the_same_gradients_and_a_head_without_its_embedding_is_refused(tmp_path, ids):
    from accelerate import cpu_offload

    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), q4_0)
    x = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model = peft_sgrq.load_gguf(path)[0]
    offloaded = cpu_offload(peft_sgrq.load_gguf(path, config=model.config)[0], execution_device="cpu")
    one, other = (torch.autograd.grad(one(inputs_embeds=x).logits.square().sum(), x)[0] for one in (model, offloaded))
    assert torch.equal(one, other)
    path = write_gguf(tmp_path / "tied.gguf", tiny_model("llama", tied=True), q4_0)
    tied = cpu_offload(peft_sgrq.load_gguf(path)[0], execution_device="cpu")
    with pytest.raises(ValueError, match=r"GGUFEmbedding\(.* has no values on the meta device.* device_map"):
        tied(input_ids=ids)
    with pytest.raises(TypeError, match=r"`config` is 'original', expected what `AutoConfig"):
        peft_sgrq.load_gguf(path, config="original")


@pytest.mark.parametrize("target", [None, "m.gguf"])
def test_a_file_that_is_not_there_is_said_by_name(target, tmp_path):
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ValueError, match="other.gguf" if target is None else "m.gguf"):
        peft_sgrq.load_gguf(tmp_path, target)


def test_what_the_hook_stands_on_is_there():
    # Each of these is not documented; a change of one breaks loading.
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, is_gguf_arch_supported
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    assert issubclass(AUTO_QUANTIZER_MAPPING["gguf"], GgufHfQuantizer)
    assert {"llama", "gemma2", "gemma3"} <= set(TENSOR_PROCESSORS)
    assert set(GGUF_CONFIG_ARCHS) == {"qwen35", "qwen35moe", "lfm2"}  # those in it take another path
    assert not any(is_gguf_arch_supported(architecture) for architecture, _, _ in ARCHITECTURES.values())
    assert "llama-bpe" in GGUF_PRE_TOKENIZER_SPLITS
