"""The two-step reference: cases worked out by hand, and the golden operator files in plain torch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swconv.ops import responses, shift_add, shift_add_ref

GOLDEN = Path("tests/golden")
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
FILES = ["op_mp_a", "op_mp_b", "op_mp_e", "op_mp_g", "op_mp_padhalf_a"]
I32 = torch.int32


@pytest.mark.parametrize("padding", [1, 2])
def test_responses_are_those_of_one_grouped_convolution(padding):
    x, filters = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(12, 1, 3, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(x, filters, padding=padding, groups=3)
    torch.testing.assert_close(responses(x, filters, padding), expected, atol=1e-14, rtol=0)


def test_one_hot_map_lands_on_its_tap():
    maps = torch.zeros(1, 1, 7, 7)
    maps[0, 0, 3, 3] = 1
    pad = torch.tensor([[3]], dtype=I32)
    h, v, i = shift_add_ref(maps, pad, pad, torch.tensor([[0]]), halo=0)
    assert h[0, 0].nonzero().tolist() == [[3, 6]]                     # 3 px to the right
    assert v[0, 0].nonzero().tolist() == [[6, 3]]                     # 3 px down
    assert i[0, 0].nonzero().tolist() == [[3, 3]]


def test_halo_is_cut_across_the_shift_and_used_along_it():
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 2, 0] = 1                                              # in the left halo
    pad = torch.tensor([[1]], dtype=I32)
    h, v, i = shift_add_ref(maps, pad, pad, torch.tensor([[0]]), halo=1)
    assert h[0, 0].nonzero().tolist() == [[1, 1]]
    assert not v.any()
    assert not i.any()


def test_a_filter_picked_by_two_edges_counts_twice():
    maps = torch.ones(1, 2, 3, 3)
    pad = torch.zeros(2, 2, dtype=I32)
    _, _, i = shift_add_ref(maps, pad, pad, torch.tensor([[1, 1]]), halo=0)
    assert (i == 2).all()


def golden(name: str, dtype: torch.dtype):
    data, about = load_file(GOLDEN / f"{name}.safetensors"), MANIFEST[f"{name}.safetensors"]
    maps = data["z"].to(dtype).requires_grad_()
    edges = about["E"]
    arguments = (data["pad_hv"][:, :edges].contiguous(), data["pad_hv"][:, edges:].contiguous(), data["idx_identit"],
                 about["extra_pad"])
    return data, maps, arguments


@pytest.mark.parametrize("form", [shift_add, shift_add_ref])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", FILES)
def test_golden_outputs_and_gradients_come_out(name, dtype, tolerance, form):
    data, maps, arguments = golden(name, dtype)
    outputs = form(maps, *arguments)
    for ours, key in zip(outputs, ("out_h", "out_v", "out_s"), strict=True):
        torch.testing.assert_close(ours.double(), data[key], atol=tolerance, rtol=tolerance)
    upstream = [data[key].to(dtype) for key in ("g_h", "g_v", "g_s")]
    (grad,) = torch.autograd.grad(outputs, maps, upstream)
    torch.testing.assert_close(grad.double(), data["grad_z"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", [shift_add, shift_add_ref])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_single_path_operator_with_reversed_order_is_an_edge_of_ours(dtype, tolerance, form):
    data = load_file(GOLDEN / "op_v0_reversed.safetensors")
    about = MANIFEST["op_v0_reversed.safetensors"]
    taps, channels = about["nk"], about["C"]
    # idxes[r * n + j]: the map that slot j of channel r takes; its displacement is shift_pads[j].
    slots = data["idxes"].long()
    pad = torch.empty(channels * taps, 1, dtype=I32)
    pad[slots, 0] = data["shift_pads"].repeat(channels)
    maps = data["z"].to(dtype).requires_grad_()
    h, v, _ = form(maps, pad, pad, torch.arange(channels)[:, None] * taps, about["extra_pad"])
    for ours, side in ((h, "h"), (v, "v")):
        torch.testing.assert_close(ours.double(), data[f"out_{side}"], atol=tolerance, rtol=tolerance)
        (grad,) = torch.autograd.grad(ours, maps, data[f"g_{side}"].to(dtype), retain_graph=True)
        torch.testing.assert_close(grad.double(), data[f"grad_z_{side}"], atol=tolerance, rtol=tolerance)


def test_tables_of_another_kernel_size_are_refused():
    pad = torch.zeros(6, 2, dtype=I32)
    with pytest.raises(ValueError, match="same kernel size"):
        shift_add(torch.zeros(1, 8, 4, 4), pad, pad, torch.zeros(2, 2, dtype=I32), halo=0)


def test_maps_smaller_than_their_halo_are_refused():
    pad = torch.zeros(2, 1, dtype=I32)
    with pytest.raises(ValueError, match="larger than two halos"):
        shift_add(torch.zeros(1, 2, 4, 2), pad, pad, torch.zeros(1, 1, dtype=I32), halo=1)


@pytest.mark.parametrize("tables", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_that_are_shapes_only_give_shapes_wherever_the_tables_are(dtype, tables):
    maps = torch.empty(2, 6, 9, 7, dtype=dtype, device="meta", requires_grad=True)
    pad = torch.zeros(6, 4, dtype=I32, device=tables)
    pick = torch.tensor([[0, 1, 2, 2], [3, 3, 4, 5]])
    parts = shift_add(maps, pad, pad, pick, halo=1)
    real = shift_add(torch.zeros(2, 6, 9, 7, dtype=dtype), torch.zeros(6, 4, dtype=I32), torch.zeros(6, 4, dtype=I32), pick, 1)
    for part, wanted in zip(parts, real, strict=True):
        assert part.is_meta
        assert (part.shape, part.dtype, part.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    (grad,) = torch.autograd.grad([part.sum() for part in parts], maps)
    assert grad.shape == maps.shape
    with pytest.raises(ValueError, match="same kernel size"):
        shift_add(maps, pad[:4], pad[:4], pick, halo=1)


def test_tables_that_are_shapes_only_do_not_move_real_maps():
    pad, pick = torch.zeros(2, 1, dtype=I32, device="meta"), torch.zeros(1, 1, dtype=I32)
    with pytest.raises(ValueError, match="on one device, got cpu, meta, meta, cpu"):
        shift_add(torch.zeros(1, 2, 4, 4), pad, pad, pick, halo=0)
