"""Which tensors share a file."""

from __future__ import annotations

from rlhf_core.model_files.cutting import LARGEST, cut


def model(layers: int, layer: int, outer: dict[str, int]) -> dict[str, int]:
    halves = [f"model.layers.{n}.{part}.weight" for n in range(layers) for part in ("mlp", "attn")]
    return {name: layer // 2 for name in halves} | outer


OUTER = {"model.embed_tokens.weight": 28_311_552, "model.norm.weight": 576}


def test_small_layers_share_a_file_from_the_top_and_the_embeddings_are_alone() -> None:
    files = cut(model(30, 3_540_000, OUTER))
    assert len(files) == 11
    assert files[0] == ["model.embed_tokens.weight"]
    tops = {name.split(".")[2] for name in files[-1] if "layers" in name}
    assert tops == {"27", "28", "29"} and "model.norm.weight" in files[-1]


def test_every_tensor_is_in_one_file_whatever_the_order_of_their_names() -> None:
    sizes = model(7, 5_000_000, OUTER | {"lm_head.weight": 28_311_552})
    files = cut(sizes)
    assert sorted(name for file in files for name in file) == sorted(sizes)
    assert cut(dict(reversed(sizes.items()))) == files
    # The head is trained with the top layers, the embedding with none.
    assert files[-1] == ["lm_head.weight", "model.norm.weight"]
    assert [name for name in files[0] if "embed" in name]


def test_a_model_of_70b_has_a_file_for_each_layer_and_none_is_too_large() -> None:
    vocabulary = 128_256 * 8_192
    outer = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    sizes = model(80, 855_654_400, outer | {"model.norm.weight": 8_192})
    files = cut(sizes)
    assert len(files) == 82
    assert max(sum(sizes[name] for name in file) for file in files) <= LARGEST


def test_a_tiny_model_stays_in_one_file() -> None:
    assert len(cut(model(3, 10_000, {"wte.weight": 500, "ln_f.weight": 8}))) == 1
