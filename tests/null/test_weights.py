"""Initial values: read by slices, or drawn the same on every mesh."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meshwright.runtime import BundleError, weights
from meshwright.runtime.layout import Split, piece_of
from meshwright.runtime.weights import Weights

SIZES = {"dp": 2, "tp": 3}
SHAPE = (12, 6)
TYPES = [{}, {"tp": Split(0)}, {"tp": Split(1)}, {"tp": Split(0, 2)}, {"dp": Split(1), "tp": Split(0, 4)}]
WHOLE = piece_of(SHAPE, None, {}, {}, {})


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("segment", [None, (1, 0, 6)])
def test_pieces_are_cut_from_the_same_whole(
    types: dict[str, Split], segment: tuple[int, int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "DRAWN_AT_ONCE", 30)  # five rows
    save_file({"w": torch.randn(SHAPE, dtype=torch.float64)}, tmp_path / "weights.safetensors")
    entry = {"shape": SHAPE, "dtype": "float64"}
    for source in (Weights(tmp_path, 0), Weights(None, 7)):
        whole = source.read("w", entry, WHOLE)
        for dp in range(2):
            for tp in range(3):
                piece = piece_of(SHAPE, segment, types, {"dp": dp, "tp": tp}, SIZES)
                assert torch.equal(source.read("w", entry, piece), piece.cut(whole))


@pytest.mark.parametrize(
    ("name", "shape", "init", "mean", "deviation"),
    [
        ("norm.weight", (6,), None, 1.0, 0.0),
        ("norm.bias", (6,), None, 0.0, 0.0),
        ("scale", (), None, 1.0, 0.0),
        ("w", (500, 20), None, 0.0, 0.02),
        ("w", (500, 20), {"op": "normal_", "args": [3.0, 2.0]}, 3.0, 2.0),
        ("w", (500, 20), {"op": "uniform_", "args": [0.0, 12.0**0.5]}, 3.0**0.5, 1.0),
        ("w", (500, 20), {"op": "fill_", "args": [4.0]}, 4.0, 0.0),
    ],
)
def test_how_tensors_are_drawn(
    name: str, shape: tuple[int, ...], init: dict[str, object] | None, mean: float, deviation: float
) -> None:
    entry = {"shape": shape, "dtype": "float32", "init": init}
    drawn = Weights(None, 0).read(name, entry, piece_of(shape, None, {}, {}, {}))
    assert drawn.shape == shape and drawn.dtype == torch.float32
    assert drawn.mean().item() == pytest.approx(mean, abs=0.05 * deviation)
    assert drawn.std(correction=0).item() == pytest.approx(deviation, rel=0.05)


def test_seed_and_name_decide() -> None:
    entry = {"shape": SHAPE, "dtype": "float32"}
    one = Weights(None, 0).read("a", entry, WHOLE)
    assert not torch.equal(one, Weights(None, 0).read("b", entry, WHOLE))
    assert not torch.equal(one, Weights(None, 1).read("a", entry, WHOLE))


def test_tied_names_indexes_and_refusals(tmp_path: Path) -> None:
    tensor = torch.randn(SHAPE)
    save_file({"head": tensor}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"head": "model-00001-of-00001.safetensors"}}'
    )
    source = Weights(tmp_path, 0, complete=True)
    entry = {"shape": SHAPE, "dtype": "float32", "aliases": ["head"]}
    assert torch.equal(source.read("embed", entry, WHOLE), tensor)
    with pytest.raises(BundleError, match=f"'other' is not among the weights in {tmp_path}"):
        source.read("other", {**entry, "aliases": []}, WHOLE)
    with pytest.raises(BundleError, match=r"head has shape \(12, 6\) in .*, in the manifest \(6, 12\)"):
        source.read("head", entry, piece_of((6, 12), None, {}, {}, {}))
    with pytest.raises(BundleError, match="has no weights: give a safetensors file, or a directory of them"):
        Weights(tmp_path / "nowhere", 0)
    with pytest.raises(BundleError, match="cannot initialize by 'exec': a manifest may name normal_, uniform_, fill_"):
        Weights(None, 0).read("w", {**entry, "init": {"op": "exec", "args": []}}, WHOLE)
