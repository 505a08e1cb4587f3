"""Parts of tensors: written by some ranks, read by another number of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rlhf_core.training.sharding.parts import (
    Entry,
    Part,
    Saved,
    from_json,
    index_parts,
    index_whole,
    merge,
    needed_files,
    share,
    to_host,
    to_json,
    whole_part,
    write_parts,
)

SHAPES = {"a": (13, 7), "b": (101,), "tiny": (2,)}
TENSORS = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    for name, shape in SHAPES.items()
}


def written(folder, size):
    """The tensors in one file of each rank; what is read from them."""
    indices = []
    for rank in range(size):
        parts = {"a|step": whole_part(torch.tensor(3.0))} if rank == 0 else {}
        for name, tensor in TENSORS.items():
            start, count = share(tensor.numel(), rank, size)
            if count:
                values = tensor.flatten()[start : start + count]
                parts[name] = Part(values, start, tuple(tensor.shape))
        write_parts(to_host(parts), folder / f"part-{rank}.safetensors")
        indices.append(index_parts(parts, f"part-{rank}.safetensors"))
    index = json.loads(json.dumps(to_json(merge(indices))))
    return Saved(folder, from_json(index))


@pytest.mark.parametrize("size", (1, 2, 3, 5))
@pytest.mark.parametrize("readers", (1, 2, 3, 4))
def test_any_number_of_ranks_reads_what_any_other_has_written(tmp_path, size, readers):
    saved = written(tmp_path, size)
    for name, tensor in TENSORS.items():
        ranges = [share(tensor.numel(), rank, readers) for rank in range(readers)]
        read = torch.cat([saved.read(name, wanted) for wanted in ranges])
        assert torch.equal(read, tensor.flatten())
        assert torch.equal(saved.whole(name), tensor)
    assert torch.equal(saved.whole("a|step"), torch.tensor(3.0))


def test_shares_are_those_of_torch_chunk():
    for count in range(9):
        for size in range(1, 6):
            chunks = [len(c) for c in torch.arange(count).chunk(size)] if count else []
            expected = chunks + [0] * (size - len(chunks))
            assert [share(count, rank, size)[1] for rank in range(size)] == expected


def test_a_rank_needs_only_the_files_of_what_it_holds():
    index = {
        "w": Entry((10,), (("0", 0, 4), ("1", 4, 4), ("2", 8, 2))),
        "w|exp_avg": Entry((10,), (("0", 0, 4), ("1", 4, 4), ("2", 8, 2))),
        "w|step": Entry((), (("0", 0, 1),)),
    }
    assert needed_files(index, {"w": (4, 4)}) == {"0", "1"}  # 0 has the scalar
    assert needed_files(index, {"w": (7, 2)}) == {"0", "1", "2"}
    assert needed_files(index, {"w": (8, 2)}) == {"0", "2"}
    assert needed_files(index, {"w": (10, 0)}) == {"0"}


def test_copy_for_the_host_keeps_its_values():
    tensor = torch.ones(3)
    copies = to_host({"w": whole_part(tensor)})
    tensor.zero_()
    assert copies["w"].values.tolist() == [1, 1, 1]


def test_whole_tensors_of_earlier_versions_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    save_file({"a|step": torch.tensor(5.0)}, tmp_path / "optimizer.safetensors")
    files = [tmp_path / "weights.safetensors", tmp_path / "optimizer.safetensors"]
    saved = Saved(tmp_path, index_whole(files))
    assert torch.equal(saved.read("a", (20, 30)), TENSORS["a"].flatten()[20:50])
    assert float(saved.whole("a|step")) == 5.0


def test_missing_elements_are_noticed(tmp_path):
    saved = written(tmp_path, 3)
    entry = saved.index["b"]
    saved.index["b"] = Entry(entry.shape, entry.parts[:2])
    with pytest.raises(AssertionError, match="b has 33 of 101 elements in no file"):
        saved.whole("b")
