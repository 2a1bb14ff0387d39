"""Merging into GGUF files, verifying and inspecting them, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support.gguf_files import mixed, q4_0, tiny_model, tokens, write_gguf

import peft_sgrq
from peft_sgrq import SGRQConfig, merge_checkpoint, verify_checkpoint
from peft_sgrq.cli import main
from peft_sgrq.formats.gguf.blocks import BY_NAME
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.names import find_places
from peft_sgrq.formats.gguf.sub_block_scales import scales_of

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def adapter_for(path, folder, **config):
    """A random adapter on a file, saved; the adapted model."""
    torch.manual_seed(0)
    model, _ = peft_sgrq.load_gguf(path)
    settings = {"init_weights": False, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, SGRQConfig(**settings)).eval()
    model.save_pretrained(folder)
    return model


class Made:
    def __init__(self, folder, types, blocks=1, **config):
        self.base = write_gguf(folder / "base.gguf", tiny_model("llama", blocks=blocks), types)
        self.adapter = folder / "adapter"
        self.unmerged = logits(adapter_for(self.base, self.adapter, **config))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Llama in Q4_K and Q6_K with an adapter on half of its groups; not to be written to."""
    return Made(tmp_path_factory.mktemp("mixed"), mixed, ratio=0.5)


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out.gguf"
    report = merge_checkpoint(None, made.adapter, out)
    assert report.layers == 6 and report.out == out and report.bytes_changed > 0
    return out


def outside_of_scales(base, merged):
    """How many bytes differ outside of `d`, `m` and the scales of sub-blocks."""
    before, after = (np.frombuffer(path.read_bytes(), np.uint8).copy() for path in (base, merged))
    assert len(before) == len(after)
    differs = before != after
    file = GGUFFile(base)
    for info in file.tensors.values():
        if info.kind is not None and info.name.startswith("blk."):
            held = scales_of(info.kind, file.data(info.name))
            differs[info.start : info.end].reshape(-1, info.kind.nbytes)[:, held.scale_bytes] = False
    return int(differs.sum())


def test_a_file_with_every_type_differs_in_bytes_of_scales_alone_and_gives_the_bits_of_the_unmerged_model(tmp_path):
    names = list(BY_NAME)

    def types(tensor):
        return names[hash_of(tensor) % len(names)]

    order = iter(range(10**6))
    numbers: dict[str, int] = {}

    def hash_of(tensor):
        return numbers.setdefault(tensor, next(order))

    made = Made(tmp_path, types, blocks=3)
    found = {info.kind.name for info in GGUFFile(made.base).tensors.values() if info.kind and "blk" in info.name}
    assert found == set(names)
    merge_checkpoint(made.base, made.adapter, tmp_path / "out.gguf")
    assert outside_of_scales(made.base, tmp_path / "out.gguf") == 0
    model, _ = peft_sgrq.load_gguf(tmp_path / "out.gguf")
    assert torch.equal(logits(model), made.unmerged)


def test_a_merge_on_files_is_the_merge_in_memory(made, merged, tmp_path):
    model, _ = peft_sgrq.load_gguf(made.base, adapter=made.adapter)
    assert torch.equal(logits(model), made.unmerged)
    saved = peft_sgrq.save_gguf(model.merge_and_unload(), tmp_path / "saved.gguf")
    assert saved.read_bytes() == merged.read_bytes()
    assert outside_of_scales(made.base, merged) == 0
    with pytest.raises(ValueError, match="not merged"):
        peft_sgrq.save_gguf(peft_sgrq.load_gguf(made.base, adapter=made.adapter)[0], tmp_path / "other.gguf")


def test_the_command_merges_names_verifies_and_inspects(made, merged, tmp_path, capsys):
    out = tmp_path / "named.gguf"
    assert main(["merge", str(made.adapter), str(out), "--base", str(made.base), "--name", "my model, tuned"]) == 0
    file = GGUFFile(out)
    assert file.metadata["general.name"] == "my model, tuned"
    for info in GGUFFile(merged).tensors.values():
        assert torch.equal(file.data(info.name), GGUFFile(merged).data(info.name))
    assert main(["verify", str(made.adapter), str(out), "--base", str(made.base)]) == 0
    assert "named 'my model, tuned'" in capsys.readouterr().out
    assert main(["inspect", str(made.base), "--json"]) == 0
    types = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["types"]}
    assert types["Q4_K"]["group_size"] == 32 and types["Q6_K"]["group_size"] == 16 and types["float16"]["tensors"] == 1
    assert main(["inspect", str(made.base)]) == 0 and main(["inspect", str(made.adapter)]) == 0
    shown = capsys.readouterr().out
    assert "scales to train" in shown and "Root mean square of the deltas" in shown


def test_zero_points_of_an_adapter_are_counted_by_inspect(tmp_path, capsys):
    made = Made(tmp_path, lambda name: "Q4_1", zero_points=True, ratio=0)
    assert main(["inspect", str(made.adapter)]) == 0
    shown = capsys.readouterr().out
    assert "0 scales and 18,432 zero points in 7 layers" in shown
    assert "Root mean square of the moves of zero points" in shown
    assert main(["inspect", str(made.adapter), "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"][0]
    assert (layer["scales"], layer["zero_points"]) == (0, 256 * 256 // 32) and 0.05 < layer["moves"] < 0.2


def test_a_file_is_known_by_its_first_bytes_where_its_name_does_not_say_so(made, merged, tmp_path, capsys):
    blob, out = tmp_path / "sha256-0123", tmp_path / "out"  # as Ollama keeps its files
    shutil.copy(made.base, blob)
    assert main(["inspect", str(blob)]) == 0
    assert "scales to train" in capsys.readouterr().out
    assert main(["merge", str(made.adapter), str(out), "--base", str(blob)]) == 0
    assert out.read_bytes() == merged.read_bytes()
    assert main(["verify", str(made.adapter), str(out), "--base", str(blob)]) == 0
    assert torch.equal(logits(peft_sgrq.load_gguf(out)[0]), made.unmerged)


def test_verify_finds_a_changed_code_scale_and_header(made, merged, tmp_path):
    assert verify_checkpoint(None, made.adapter, merged).ok
    file = GGUFFile(merged)
    tensor = file.tensors["blk.0.ffn_up.weight"]
    norm = file.tensors["blk.0.attn_norm.weight"]
    places = {tensor.start: "other values", tensor.start + 100: "other values", norm.start: "does not change"}
    for place, said in {**places, 40: "header"}.items():
        broken = tmp_path / "broken.gguf"
        data = bytearray(merged.read_bytes())
        data[place] ^= 1
        broken.write_bytes(data)
        try:
            report = verify_checkpoint(made.base, made.adapter, broken)
        except ValueError as error:
            assert place == 40 and "corrupt" in str(error)
            continue
        assert not report.ok and any(said in error for error in report.errors)
    ends = sorted((info.end, info.start) for info in file.tensors.values())
    gap = next(end for (end, _), (_, start) in itertools.pairwise(ends) if end < start)
    data = bytearray(merged.read_bytes())
    data[gap] ^= 1
    for changed in (data, merged.read_bytes() + b"\0", merged.read_bytes()[:-1]):
        broken.write_bytes(changed)
        (error,) = verify_checkpoint(made.base, made.adapter, broken).errors
        assert "behind" in error
    report = verify_checkpoint(made.base, made.adapter, made.base)
    assert not report.ok and "is that of the base" in report.errors[0]


def refused(made, tmp_path, match, base=None, adapter=None, out="out.gguf", **kwargs):
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(base or made.base, adapter or made.adapter, tmp_path / out, **kwargs)
    assert set(tmp_path.iterdir()) == before


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(made, tmp_path_factory, share):
    whole = made.base.read_bytes()
    path = tmp_path_factory.getbasetemp() / "truncated.gguf"
    end = max(info.end for info in GGUFFile(made.base).tensors.values())  # what follows is padding
    path.write_bytes(whole[: int(end * share**3)])  # many cuts in the header
    with pytest.raises(ValueError, match=r"truncated|no GGUF file"):
        GGUFFile(path)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 1500), value=st.integers(0, 255))
def test_a_corrupt_header_is_refused_or_read(made, tmp_path_factory, place, value):
    data = bytearray(made.base.read_bytes())
    data[place] = value
    path = tmp_path_factory.getbasetemp() / "corrupt.gguf"
    path.write_bytes(data)
    try:
        GGUFFile(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_files_that_cannot_be_tuned_are_refused_by_name(made, tmp_path):
    data = made.base.read_bytes()
    broken = tmp_path / "broken.gguf"

    def write(changed):
        broken.write_bytes(changed)
        return broken

    swapped = data[:4] + data[4:8][::-1] + data[8:]
    refused(made, tmp_path, "big-endian", base=write(swapped))
    refused(made, tmp_path, "version 1", base=write(data[:4] + b"\1\0\0\0" + data[8:]))
    refused(made, tmp_path, "no GGUF file", base=write(b"PK\3\4" + data[4:]))
    info = GGUFFile(made.base).tensors["blk.0.ffn_up.weight"]
    at = data.index(info.name.encode()) + len(info.name) + 4 + 8 * len(info.shape)
    for number, name in ((39, "MXFP4"), (40, "NVFP4"), (29, "IQ1_M"), (99, "number 99")):
        changed = data[:at] + number.to_bytes(4, "little") + data[at + 4 :]
        refused(made, tmp_path, f"'blk.0.ffn_up.weight' in the type {name}", base=write(changed))
    with pytest.raises(ValueError, match="one of 3 parts"):
        GGUFFile(write(_with_entry(data, "split.count", 3)))


def _with_entry(data, key, value):
    entry = len(key).to_bytes(8, "little") + key.encode() + (4).to_bytes(4, "little") + value.to_bytes(4, "little")
    count = int.from_bytes(data[16:24], "little") + 1
    return data[:16] + count.to_bytes(8, "little") + entry + data[24:]


def test_stacked_experts_and_scales_of_matrices_are_refused_by_name(made):
    file = GGUFFile(made.base)
    info = file.tensors["blk.0.ffn_up.weight"]
    model, _ = peft_sgrq.load_gguf(made.base)
    file.tensors["blk.0.ffn_up_exps.weight"] = info._replace(shape=(8, 64, 256))
    with pytest.raises(ValueError, match="stacked matrices, as experts are"):
        find_places(file, model)
    del file.tensors["blk.0.ffn_up_exps.weight"]
    file.tensors["blk.0.attn_q.scale"] = info._replace(name="blk.0.attn_q.scale", shape=(1,), ggml_type=0)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.scale"):
        find_places(file, model)


def test_another_base_another_tokenizer_no_space_and_existing_files_are_refused(made, merged, tmp_path, monkeypatch):
    other = tmp_path / "other.gguf"
    write_gguf(other, tiny_model("llama", seed=1), mixed)
    refused(made, tmp_path, "other weights", base=other)
    write_gguf(other, tiny_model("llama"), q4_0)
    refused(made, tmp_path, r"GGUF \(Q4_0-32\), expected quantized with GGUF \(Q6_K-16\)", base=other)
    adapter_for(made.base, tmp_path / "moved", zero_points=True)  # said before that this file has no zero points
    with pytest.raises(ValueError, match=r"GGUF \(Q4_0-32\), expected quantized with GGUF"):
        peft_sgrq.load_gguf(other, adapter=tmp_path / "moved")
    refused(made, tmp_path, "codes but not the scales", base=merged)
    vocabulary = [*tokens()[:-2], "the", "th"]
    write_gguf(other, tiny_model("llama"), mixed, vocabulary=vocabulary)
    refused(made, tmp_path, "another tokenizer", base=other)
    merge_checkpoint(other, made.adapter, tmp_path / "forced.gguf", check_base=False)
    shutil.copy(made.base, other)
    refused(made, tmp_path, "exists already", base=other, out="other.gguf")
    refused(made, tmp_path, "is the base", base=other, out="other.gguf", overwrite=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    refused(made, tmp_path, "0.0 MB free")


def test_links_are_followed_and_what_is_no_file_is_refused(made, merged, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.gguf"
    link.symlink_to("elsewhere/file.gguf")
    for overwrite in (False, True):  # a link to nothing, and to a file
        merge_checkpoint(made.base, made.adapter, link, overwrite=overwrite)
        assert link.is_symlink() and (tmp_path / "elsewhere" / "file.gguf").read_bytes() == merged.read_bytes()
    pipe, folder, loop = (tmp_path / f"{name}.gguf" for name in ("pipe", "folder", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path in (pipe, folder, loop, os.devnull, tmp_path / "elsewhere", f"{tmp_path / 'new'}{os.sep}"):
        for base in ([], ["--base", str(made.base)]):  # which the adapter names, too
            with pytest.raises(ValueError, match="expected a file"):
                merge_checkpoint(base[1] if base else None, made.adapter, path, overwrite=True)
            assert main(["merge", str(made.adapter), str(path), *base, "--overwrite"]) == 2
            assert "expected a file" in capsys.readouterr().err
    assert pipe.is_fifo() and folder.is_dir() and loop.is_symlink() and not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoint(None, made.adapter, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_modules_to_save_are_refused(made, tmp_path):
    adapter_for(made.base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["norm"])
    refused(made, tmp_path, "modules_to_save", adapter=tmp_path / "whole")


@pytest.mark.slow
def test_the_commands_calibrate_and_recover_take_a_file(made, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 20)
    scores = tmp_path / "scores.safetensors"
    options = ["--samples", "2", "--max-length", "16", "--quiet"]
    assert main(["calibrate", str(made.base), str(text), "-o", str(scores), *options]) == 0
    assert "diag of 6 layers" in capsys.readouterr().out
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "reference")
    recovered = tmp_path / "recovered"
    few = ["--epochs", "1", "--distill-steps", "2", "--preservation", "0"]
    command = ["recover", str(made.base), "--reference", str(tmp_path / "reference"), "--data", str(text)]
    assert main([*command, "-o", str(recovered), *options, *few]) == 0
    assert main(["merge", str(recovered), str(tmp_path / "out.gguf")]) == 0
    assert main(["verify", str(recovered), str(tmp_path / "out.gguf"), "--base", str(made.base)]) == 0
