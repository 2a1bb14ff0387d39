"""The reference may be a checkpoint, of which one block is in memory at a time; a wrong one is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bases import INT8, NF4, adapted, byte_tokenizer, save_small_llama
from support.rounded_models import deltas, full, recovered, rounded, sequences
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaForCausalLM

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.base_layers import scaled_weight_of
from peft_sgrq.passes.data import load_batches
from peft_sgrq.passes.reference import Reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("options", [{}, {"preservation": 0.3}, {"augmented": False, "distill_steps": 2}], ids=str)
def test_a_streamed_reference_gives_what_one_in_memory_gives(options, llama_dir: Path):
    in_memory = recovered(llama_dir, **options)
    streamed = recovered(llama_dir, reference=str(llama_dir), **options)
    assert [block.after for block in streamed.blocks] == [block.after for block in in_memory.blocks]
    for name, delta in deltas(in_memory.model).items():
        assert torch.equal(delta, deltas(streamed.model)[name])


def test_conv1d_models_are_streamed(gpt2_dir: Path):
    model = full(gpt2_dir)
    model.transformer.h[0].mlp.c_fc.weight.data.mul_(4).round_().div_(4)
    (block,) = recovered(gpt2_dir, model, reference=str(gpt2_dir)).blocks
    assert block.after < block.before


def test_of_a_checkpoint_only_the_layer_that_runs_is_in_memory(llama_dir: Path):
    model = rounded(llama_dir)
    scaled_weights = {
        name: scaled_weight_of(name, module, 16)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name
    }
    reference = Reference(str(llama_dir), model, "model.layers", scaled_weights)
    blocks = reference.model.model.layers
    present: list[set[str]] = []

    def record(module: nn.Module, args: object) -> None:
        present.append({name.split(".")[0] for name, value in blocks.named_parameters() if not value.is_meta})

    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(record)
    (batch,) = load_batches(sequences(), batch_size=12)
    with torch.no_grad():
        expected = full(llama_dir)(**batch.inputs).logits
        assert torch.equal(reference.run(batch).logits, expected)
    assert len(present) == 14
    assert all(len(held) <= 1 for held in present)
    assert all(value.is_meta for value in blocks.parameters())
    name, scaled_weight = next(iter(scaled_weights.items()))
    assert torch.equal(reference.weight(name, scaled_weight), full(llama_dir).get_submodule(name).weight)


def test_a_checkpoint_in_shards_is_streamed(llama_dir: Path, tmp_path: Path):
    full(llama_dir).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected = deltas(recovered(llama_dir).model)
    for name, delta in deltas(recovered(llama_dir, reference=tmp_path).model).items():
        assert torch.equal(delta, expected[name])


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target, dirs_exist_ok=True)
    return target


def test_a_checkpoint_with_missing_tensors_is_refused(llama_dir: Path, tmp_path: Path):
    broken = copy_of(llama_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(the first: 'model.layers.1.mlp.up_proj.weight'\)"):
        recovered(llama_dir, reference=str(broken))


def test_a_reference_of_another_shape_is_refused(llama_dir: Path, tmp_path: Path):
    wide = save_small_llama(tmp_path)
    for reference in (str(wide), full(wide)):
        with pytest.raises(ValueError, match=r"has shape \(256, 256\), expected \(64, 64\)"):
            recovered(llama_dir, reference=reference)


def test_a_reference_of_another_architecture_is_refused(llama_dir: Path, gpt2_dir: Path):
    with pytest.raises(ValueError, match=r"has no layer 'model\.layers\.0\.self_attn\.q_proj'"):
        recovered(llama_dir, reference=full(gpt2_dir))


def test_a_reference_with_another_vocabulary_is_refused(llama_dir: Path):
    other = full(llama_dir)
    other.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="vocabulary of 300 tokens and the model of 259"):
        recovered(llama_dir, reference=other)


def test_another_tokenizer_than_the_references_is_refused(llama_dir: Path, tmp_path: Path):
    other = copy_of(llama_dir, tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="tokenizer of the reference is another one: token 'a'"):
        recovered(llama_dir, reference=str(other), tokenizer=byte_tokenizer())
    with_more = byte_tokenizer()
    with_more.add_tokens(["<more>"])
    for tokenizer in (byte_tokenizer(), with_more, object()):
        recovered(llama_dir, reference=str(llama_dir), tokenizer=tokenizer, epochs=1)


def test_a_reference_in_another_basis_is_refused_and_a_rough_embedding_is_not(llama_dir: Path):
    reference = full(llama_dir)
    weight = reference.model.embed_tokens.weight.data
    rough = full(llama_dir)
    rough.model.embed_tokens.weight.data += 0.5 * weight.std() * torch.randn(weight.shape)
    recovered(llama_dir, reference=rough)
    reference.model.embed_tokens.weight.data = weight.flip(1)  # as a rotation of the residual stream does
    with pytest.raises(ValueError, match=r"takes other hidden states .* rotated if that one was"):
        recovered(llama_dir, reference=reference)


def test_a_reference_with_more_blocks_is_refused(llama_dir: Path):
    other = full(llama_dir)
    other.model.layers.append(copy.deepcopy(other.model.layers[1]))
    other.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"has 3 blocks 'model\.layers' and the model 2"):
        recovered(llama_dir, reference=other)


def test_a_reference_that_is_not_there_is_named(llama_dir: Path, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"GGUF and more")
    messages = {"": "could not be read", "nowhere": "is no folder here", "file": "is a GGUF file"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            recovered(llama_dir, reference=tmp_path / name)


def test_a_reference_without_weights_is_refused(llama_dir: Path):
    with pytest.raises(ValueError, match="reference is on the meta device"):
        recovered(llama_dir, reference=full(llama_dir).to("meta"))


def test_a_quantized_checkpoint_is_no_reference(llama_dir: Path, tmp_path: Path):
    INT8.load(llama_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized itself"):
        recovered(llama_dir, reference=str(tmp_path))


def test_the_model_itself_is_no_reference(llama_dir: Path):
    model = rounded(llama_dir)
    with pytest.raises(ValueError, match="the quantized model itself"):
        recovered(llama_dir, model, reference=model)


def test_what_is_no_model_is_no_reference(llama_dir: Path):
    with pytest.raises(TypeError, match="`reference` is a int"):
        recovered(llama_dir, reference=3)


class Twice(LlamaForCausalLM):
    """A model that goes through its blocks two times."""

    def __init__(self, config):
        super().__init__(config)
        once = self.model.forward

        def twice(**kwargs):
            hidden = once(**kwargs).last_hidden_state
            return once(**{**kwargs, "input_ids": None, "inputs_embeds": hidden})

        self.model.forward = twice


def test_blocks_that_are_no_chain_need_distillation(llama_dir: Path):
    def load():
        return Twice.from_pretrained(llama_dir, dtype=torch.float32).eval()

    def loaded_rounded():
        model = load()
        model.load_state_dict(rounded(llama_dir).state_dict())
        return model

    with pytest.raises(ValueError, match="cannot be run one by one"):
        recovered(llama_dir, loaded_rounded(), reference=load())
    options = {"epochs": 0, "distill_steps": 10, "distill_learning_rate": 2e-2}
    found = recovered(llama_dir, loaded_rounded(), reference=load(), data=sequences(4), **options)
    assert found.distillation.after < found.distillation.before


def test_layers_outside_of_the_blocks_are_named(llama_dir: Path, caplog):
    config = SGRQConfig(ratio=1.0, group_size=16, target_modules=["q_proj", "lm_head"])
    recovered(llama_dir, config=config, epochs=1)
    assert "1 adapted layers are in none of the blocks model.layers" in caplog.text
    recovered(llama_dir, config=config, epochs=1, preservation=0.1, reference=str(llama_dir))


@pytest.mark.parametrize("options", [{}, {"preservation": 0.1}, {"distill_steps": 3}], ids=str)
@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "streamed"])
def test_in_a_decoder_its_own_tokens_count(streamed, options, tmp_path: Path):
    torch.manual_seed(0)
    size = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=64, max_position_embeddings=32, init_std=0.2, **size, **heads)
    reference = BartForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    model = copy.deepcopy(reference)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "decoder.layers" in name:
            module.weight.data = (module.weight * 4).round() / 4
    ids = torch.randint(4, 64, (3, 2, 9))
    kept = torch.arange(9) < torch.tensor([[9], [5]])
    data = [
        {
            "input_ids": one,
            "attention_mask": kept.flip(0).long(),
            "decoder_input_ids": one.flip(1),
            "decoder_attention_mask": kept.long(),
            "labels": one.masked_fill(~kept, -100),
        }
        for one in ids
    ]
    targets = SGRQConfig(ratio=1.0, group_size=16, target_modules=r".*decoder\.layers.*(proj|fc1|fc2)")
    found = recovered(
        tmp_path, copy.deepcopy(model), str(tmp_path) if streamed else reference, data, config=targets, **options
    )
    error = total = 0.0
    for batch in data:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            theirs, ours = (
                one(**inputs, output_hidden_states=True).decoder_hidden_states[1][kept] for one in (reference, model)
            )
        error, total = error + float((ours - theirs).square().sum()), total + float(theirs.square().sum())
    assert found.blocks[0].before == pytest.approx(error / total, rel=1e-4)
    assert all(block.after < block.before for block in found.blocks)
    if options.get("distill_steps"):
        assert found.distillation.after < found.distillation.before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "`epochs` is -1"),
        ({"epochs": 2.5}, TypeError, "`epochs` is 2.5"),
        ({"epochs": 0}, ValueError, "nothing would be trained"),
        ({"learning_rate": float("nan")}, ValueError, "`learning_rate` is nan"),
        ({"learning_rate": "1e-3"}, TypeError, "`learning_rate` is '1e-3'"),
        ({"preservation": -0.1}, ValueError, "`preservation` is -0.1"),
        ({"importance": "error"}, ValueError, "`importance` is 'error', expected one of"),
        ({"data": []}, ValueError, "calibration data is empty"),
        ({"config": {"ratio": 1.0}}, TypeError, "`config` is a dict"),
        ({"config": SGRQConfig(modules_to_save=["lm_head"])}, ValueError, "recovery trains nothing else"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_done(options, error, message, llama_dir: Path):
    model = rounded(llama_dir)
    with pytest.raises(error, match=message):
        recovered(llama_dir, model, **options)
    assert not any("sgrq" in name for name, _ in model.named_parameters())


def test_a_model_without_weights_is_refused(llama_dir: Path):
    config = full(llama_dir).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="on the meta device"):
        recovered(llama_dir, model)


def test_a_model_with_an_adapter_is_refused(llama_dir: Path):
    with pytest.raises(ValueError, match="recover before `get_peft_model`"):
        recovered(llama_dir, adapted(NF4, llama_dir))
