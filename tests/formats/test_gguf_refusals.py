"""Broken GGUF files, and models that no file can hold: one sentence from every way in, and nothing written."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from support.gguf_files import mixed, tiny_model, write_gguf
from transformers import AutoModelForCausalLM

import peft_sgrq
from peft_sgrq import SGRQConfig, SGRQGgufConfig, merge_checkpoint
from peft_sgrq.cli import main
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.names import find_places

TENSOR = "blk.0.ffn_up.weight"


def adapted(path, **config):
    torch.manual_seed(0)
    model, _ = peft_sgrq.load_gguf(path)
    settings = {"init_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(model, SGRQConfig(**settings)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama's file, an adapter on it, the file merged, and a text; not to be written to."""
    made = tmp_path_factory.mktemp("made")
    base = write_gguf(made / "base.gguf", tiny_model("llama"), mixed)
    adapted(base, target_modules=["up_proj"]).save_pretrained(made / "adapter")
    merge_checkpoint(base, made / "adapter", made / "merged.gguf")
    (made / "text.txt").write_text("the cat sat on the mat. " * 20)
    return made


def with_entry(data, key, value):
    entry = len(key).to_bytes(8, "little") + key.encode() + (4).to_bytes(4, "little") + value.to_bytes(4, "little")
    count = int.from_bytes(data[16:24], "little") + 1
    return data[:16] + count.to_bytes(8, "little") + entry + data[24:]


def broken(folder):
    """Broken files: their bytes, and what is said of them."""
    file = GGUFFile(folder / "base.gguf")
    data, info = file.path.read_bytes(), file.tensors[TENSOR]
    kind_at = data.index(TENSOR.encode()) + len(TENSOR) + 4 + 8 * len(info.shape)
    end = max(other.end for other in file.tensors.values())
    nan = data[: info.start] + b"\0\x7e" + data[info.start + 2 :]
    return {
        "header": (data[:200], "truncated or corrupt: found 200 bytes"),
        "table": (data[: file.table_end - 40], "truncated or corrupt"),
        "data": (data[: end - 1000], "that ends at byte"),
        "big-endian": (data[:4] + data[4:8][::-1] + data[8:], "is big-endian, expected a little-endian file"),
        "type": (data[:kind_at] + b"\x63" + data[kind_at + 1 :], "in the type number 99"),
        "m-00001-of-00002": (with_entry(data, "split.count", 2), "llama-gguf-split --merge"),
        "nan": (nan, f"holds '{TENSOR}' with 1 NaN or infinite scales"),
    }


KINDS = ("header", "table", "data", "big-endian", "type", "m-00001-of-00002", "nan")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_refused_in_one_sentence_by_every_way_in(kind, folder, tmp_path, capsys):
    data, said = broken(folder)[kind]
    path = tmp_path / f"{kind}.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        peft_sgrq.load_gguf(path)
    assert said in str(error.value) and str(path) in str(error.value)
    base, adapter, out, text = (str(folder / name) for name in ("base.gguf", "adapter", "out.gguf", "text.txt"))
    commands = [
        ["merge", adapter, out, "--base", str(path), "--no-check"],
        ["verify", adapter, str(folder / "merged.gguf"), "--base", str(path), "--no-check"],
        ["calibrate", str(path), text, "-o", out, "--quiet"],
        ["recover", str(path), "--reference", str(folder), "--data", text, "-o", out, "--quiet"],
    ]
    if kind != "nan":  # what is read of the file alone, or compared with what it should be
        commands += [["inspect", str(path)], ["verify", adapter, str(path), "--base", base]]
    before = {*folder.rglob("*"), *tmp_path.rglob("*")}
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-sgrq: error: "))
        assert said in sentence and str(path) in sentence
    assert {*folder.rglob("*"), *tmp_path.rglob("*")} == before


def test_a_file_without_the_weights_of_a_layer_is_refused(folder, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes((folder / "base.gguf").read_bytes().replace(TENSOR.encode(), b"blk.0.ffn_xx.weight"))
    said = r"no tensors for 1 weights of the model, model\.layers\.0\.mlp\.up_proj"
    with pytest.raises(ValueError, match=said):
        peft_sgrq.load_gguf(path)
    with pytest.raises(ValueError, match=said):
        merge_checkpoint(path, folder / "adapter", tmp_path / "out.gguf", check_base=False)


def with_number(data, key, value):
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.attention.head_count", 0, "no config of "),
        ("llama.attention.head_count", 7, "no config of "),
        ("llama.attention.head_count_kv", 0, "no model of the sizes that "),
        ("llama.feed_forward_length", 7, r"of shape \(\d+, \d+\), expected "),
        ("llama.embedding_length", 128, r"of shape \(\d+, \d+\), expected "),
    ],
)
def test_sizes_in_a_header_that_cannot_be_are_refused_in_one_sentence(key, value, said, folder, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(with_number((folder / "base.gguf").read_bytes(), key, value))
    with pytest.raises(ValueError, match=f"{said}.*m\\.gguf|m\\.gguf.*{said}"):
        peft_sgrq.load_gguf(path)
    with pytest.raises(ValueError, match=f"{said}.*m\\.gguf|m\\.gguf.*{said}"):
        merge_checkpoint(path, folder / "adapter", tmp_path / "out.gguf", check_base=False)
    assert list(tmp_path.iterdir()) == [path]


def test_a_vocabulary_of_an_unknown_kind_is_refused_and_the_model_can_be_had_alone(folder, tmp_path):
    path, data = tmp_path / "m.gguf", (folder / "base.gguf").read_bytes()
    path.write_bytes(data.replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0rwkv"))
    with pytest.raises(ValueError, match=r"no tokenizer of .*m\.gguf .*rwkv"):
        peft_sgrq.load_gguf(path)
    config = SGRQGgufConfig()
    assert AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", quantization_config=config) is not None


def test_tensors_off_their_alignment_are_refused(folder, tmp_path):
    path, data = tmp_path / "m.gguf", (folder / "base.gguf").read_bytes()
    at = data.index(TENSOR.encode()) + len(TENSOR) + 4 + 16 + 4
    path.write_bytes(data[:at] + bytes([data[at] + 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match=rf"{TENSOR}' at the offset \d+, no multiple of the alignment 32"):
        peft_sgrq.load_gguf(path)


def test_two_files_and_a_name_that_cannot_be_written_are_refused(folder, tmp_path):
    base, adapter = folder / "base.gguf", folder / "adapter"
    with pytest.raises(ValueError, match=r"base\.gguf is a file and `gguf_file` is 'merged\.gguf'"):
        peft_sgrq.load_gguf(base, "merged.gguf")
    with pytest.raises(ValueError, match="expected text that UTF-8 can hold"):
        merge_checkpoint(base, adapter, tmp_path / "out.gguf", name="\udcff")
    with pytest.raises(TypeError, match="`name` is 5, expected a string"):
        merge_checkpoint(base, adapter, tmp_path / "out.gguf", name=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "said"), [('{"x": ', "is not JSON"), ("[]", "holds a list")])
def test_an_adapter_whose_config_is_broken_is_refused_by_its_file(text, said, folder, tmp_path, capsys):
    adapter, merged, out = tmp_path / "adapter", str(folder / "merged.gguf"), str(tmp_path / "out.gguf")
    shutil.copytree(folder / "adapter", adapter)
    (adapter / "adapter_config.json").write_text(text)
    for command in (["merge", str(adapter), out], ["verify", str(adapter), merged], ["inspect", str(adapter)]):
        assert main(command) == 2
        assert f"{adapter / 'adapter_config.json'} {said}" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named_and_no_fault_of_what_is_printed(folder, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("mmap.mmap", fails)  # as some file systems do
    for command in (
        ["inspect", str(folder / "base.gguf")],
        ["merge", str(folder / "adapter"), str(tmp_path / "o.gguf")],
    ):
        assert main(command) == 2
        assert f"peft-sgrq: error: {folder / 'base.gguf'}: No such device" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_packed_modules_cannot_be_trained_whole_or_by_rows(tied, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", tied), mixed)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=f"names '.*{name}', which is quantized"):
            adapted(path, modules_to_save=[name])
    with pytest.raises(ValueError, match="leave the rows out"):
        adapted(path, trainable_token_indices=[1, 2])


def test_a_model_of_an_unknown_architecture_or_of_experts_is_refused(folder, tmp_path):
    data, path = (folder / "base.gguf").read_bytes(), tmp_path / "m.gguf"
    path.write_bytes(data.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0xxama"))
    with pytest.raises(ValueError, match=r"no config of .*m\.gguf \(.*xxama.*expected"):
        peft_sgrq.load_gguf(path)
    file = GGUFFile(folder / "base.gguf")
    file.metadata["llama.expert_count"] = 8
    with pytest.raises(ValueError, match="a model of 8 experts"):
        find_places(file, peft_sgrq.load_gguf(file.path)[0])


def test_weights_that_are_no_scales_are_not_lost_without_a_word(folder, tmp_path):
    model = adapted(folder / "base.gguf", target_modules=["up_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.add_(0.5)
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is not what .*base\.gguf holds"):
        peft_sgrq.save_gguf(merged, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_norms_were_cast_for_training_is_saved(folder, tmp_path, caplog):
    model, _ = peft_sgrq.load_gguf(folder / "base.gguf", dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model.model.norm.weight.dtype == torch.float32 and "float32" not in caplog.text  # no advice
    saved = peft_sgrq.save_gguf(model, tmp_path / "out.gguf")
    assert saved.read_bytes() == (folder / "base.gguf").read_bytes()
