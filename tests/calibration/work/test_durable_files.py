from collections import UserDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibration.work.block_arguments import pack, unpack
from calibration.work.durable_files import (
    FileRecord,
    StatesWriter,
    TensorReader,
    check_file,
    hash_file,
    read_manifest,
    read_tensors,
    write_json_durably,
    write_tensors_durably,
)
from morphoquant_vllm.errors import MorphoQuantError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_written_one_by_one_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, tokens, 6).to(dtype) for tokens in (3, 1, 4)]
    # Bits that equality does not tell, or that arithmetic would change.
    states[1][0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    path = tmp_path / "hidden-00001.safetensors"
    writer = StatesWriter(path, [state.shape for state in states], dtype)
    for index, state in enumerate(states):
        writer.write(index, state)
        assert not path.exists()
    record = writer.finish()
    assert record == FileRecord(path.stat().st_size, hash_file(path))
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    for index, state in enumerate(states):
        for found in (load_file(path)[str(index)], read_tensors(path, (str(index),))[str(index)]):
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), state.view(torch.uint8))
    assert read_tensors(path, ("1",))["1"].data_ptr() % 64 == 0


def test_states_of_another_order_shape_or_dtype_are_refused(tmp_path: Path) -> None:
    writer = StatesWriter(tmp_path / "s", [(1, 2, 4), (1, 3, 4)], torch.float32)
    for index, state in ((1, torch.ones(1, 3, 4)), (0, torch.ones(1, 3, 4)), (0, torch.ones(1, 2, 4).bfloat16())):
        with pytest.raises(ValueError, match="is not the next one"):
            writer.write(index, state)
    writer.write(0, torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="1 of 2 states"):
        writer.finish()
    assert not (tmp_path / "s").exists()


def test_arguments_come_back_as_they_were(tmp_path: Path) -> None:
    cosine, sine, mask = torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    positions = torch.arange(3).expand(3, 1, 3)
    common = {"position_embeddings": (cosine, sine), "position_ids": positions, "use_cache": False, "scale": 0.1}
    # Gemma 4's blocks may leave keys and values in it.
    common["shared_kv_states"] = UserDict()
    passed = [
        {**common, "attention_mask": None},
        {**common, "attention_mask": mask},
        {**common, "attention_mask": None},
    ]
    tensors, layout = pack(passed)
    assert len(tensors) == 4, "what blocks share is held once"
    path = tmp_path / "sample-00000.safetensors"
    write_tensors_durably(path, tensors, {"arguments": layout})
    found = unpack(read_tensors(path), layout, CPU)
    assert found[0] is found[2]
    for ours, theirs in zip(found, passed, strict=True):
        assert ours.keys() == theirs.keys()
        assert isinstance(ours["position_embeddings"], tuple)
        assert all(map(torch.equal, ours["position_embeddings"], theirs["position_embeddings"]))
        assert torch.equal(ours["position_ids"], positions)
        assert (ours["use_cache"], ours["scale"], ours["shared_kv_states"]) == (False, 0.1, {})
    assert found[0]["attention_mask"] is None
    assert torch.equal(found[1]["attention_mask"], mask)
    with pytest.raises(MorphoQuantError, match="past_key_values of type object"):
        pack([{"past_key_values": object()}])


def test_tensors_of_an_open_file_have_memory_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    write_tensors_durably(path, {"a": torch.arange(3), "b": torch.ones(2)})
    reader = TensorReader(path)
    first = reader.read("a")
    first += 1
    assert reader.read("a").tolist() == [0, 1, 2] and reader.read("b").tolist() == [1, 1]
    with pytest.raises(MorphoQuantError, match=r"block.safetensors: cannot be used"):
        reader.read("c")
    with pytest.raises(MorphoQuantError, match=r"none: cannot be used"):
        TensorReader(tmp_path / "none")


def test_a_manifest_is_replaced_as_one_step(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json_durably(path, {"a": 0.1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_durably(path, {"a": float("nan")})
    assert read_manifest(path) == {"a": 0.1}
    changed = path.read_text().replace("0.1", "0.2")
    for text, reason in (("{", "not JSON"), ("[]", "its content has changed"), (changed, "its content has changed")):
        path.write_text(text)
        with pytest.raises(MorphoQuantError, match=rf"run.json: cannot be used \(.*{reason}"):
            read_manifest(path)


def test_a_file_is_known_by_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    record = FileRecord(3, hash_file(path))
    check_file(path, record)
    for bad in (b"abcd", b"abd"):
        path.write_bytes(bad)
        with pytest.raises(MorphoQuantError, match=r"f: cannot be used \(.*put the file back, or pass --restart"):
            check_file(path, record)
    path.unlink()
    with pytest.raises(MorphoQuantError, match="No such file"):
        check_file(path, record)
