import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from swconv.ops import ShiftTables, native

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# height, width, breadth, length, small, anchor of h, anchor of v
STRIPS = {
    "as long as the map": (12, 12, 3, 15, 3, 7, 7),
    "odd map": (7, 7, 3, 13, 3, 6, 6),
    "long strip, surplus taps on the far side": (14, 14, 3, 48, 3, 23, 23),
    "cut to its first and last tap": (9, 10, 3, 5, 3, 0, 4),
    "short strip in a wide map": (5, 40, 3, 5, 3, 2, 2),
    "tall map": (70, 3, 3, 9, 3, 4, 4),
    "one row": (1, 17, 3, 9, 3, 4, 5),
    "one pixel": (1, 1, 3, 3, 1, 1, 1),
    "five pixels broad": (11, 6, 5, 51, 5, 25, 24),
    "small kernel broader than the strips": (8, 8, 3, 7, 7, 3, 2),
    "seven pixels broad, off the centre": (9, 12, 7, 21, 7, 8, 12),
}


@pytest.fixture(scope="module", autouse=True)
def library():
    assert native.available(), "the compiled library must be built first: python -m swconv build"


@pytest.fixture
def threads():
    """Set the number of threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def golden(name, dtype):
    data = load_file(GOLDEN / f"op_{name}.safetensors")
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in data.items()}


def draw(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def strip_arguments(case, batch=3, channels=2, dtype=torch.float64):
    height, width, breadth, length, small, anchor_h, anchor_v = STRIPS[case]
    return (
        draw((batch, channels, height, width), dtype, 1), draw((channels, 1, breadth, length), dtype, 2),
        draw((channels, 1, length, breadth), dtype, 3), draw((channels, 1, small, small), dtype, 4), anchor_h, anchor_v,
    )


def by_convolution(x, kernel_h, kernel_v, kernel_c, anchor_h, anchor_v):
    channels, half, last = x.shape[1], kernel_h.shape[2] // 2, kernel_h.shape[3] - 1
    h = F.conv2d(F.pad(x, (anchor_h, last - anchor_h, half, half)), kernel_h, groups=channels)
    v = F.conv2d(F.pad(x, (half, half, anchor_v, last - anchor_v)), kernel_v, groups=channels)
    return h, v, F.conv2d(x, kernel_c, padding=kernel_c.shape[2] // 2, groups=channels)


def gradients(function, arguments, upstream):
    leaves = [a.detach().requires_grad_() for a in arguments[:4]]
    return torch.autograd.grad(function(*leaves, *arguments[4:]), leaves, upstream)


def tables(channels=2, taps=3, edges=2):
    generator = torch.Generator().manual_seed(5)
    pads = torch.randint(-4, 5, (2, channels * taps, edges), generator=generator, dtype=torch.int32)
    pick = torch.randint(0, taps, (channels, edges), generator=generator, dtype=torch.int32)
    return pads[0], pads[1], pick + taps * torch.arange(channels, dtype=torch.int32)[:, None]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["mp_a", "mp_b", "mp_e", "mp_g", "mp_padhalf_a"])
def test_shift_add_is_the_published_operator(name, dtype):
    d = golden(name, dtype)
    halo, edges = (d["z"].shape[2] - d["out_h"].shape[2]) // 2, d["idx_identit"].shape[1]
    maps = d["z"].requires_grad_()
    out = torch.ops.swconv.shift_add(maps, d["pad_hv"][:, :edges], d["pad_hv"][:, edges:], d["idx_identit"], halo)
    (grad,) = torch.autograd.grad(out, maps, [d["g_h"], d["g_v"], d["g_s"]])
    for got, wanted in zip((*out, grad), (d["out_h"], d["out_v"], d["out_s"], d["grad_z"]), strict=True):
        assert relative(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shift_add_with_one_edge_is_the_first_published_operator(dtype):
    d = golden("v0_reversed", dtype)
    taps, channels = len(d["shift_pads"]), d["out_h"].shape[1]
    pad = torch.empty(channels * taps, 1, dtype=torch.int32)
    pad[d["idxes"].long(), 0] = d["shift_pads"].repeat(channels)
    pick = torch.arange(channels, dtype=torch.int32)[:, None] * taps
    maps = d["z"].requires_grad_()
    h, v, _ = torch.ops.swconv.shift_add(maps, pad, pad, pick, (maps.shape[2] - d["out_h"].shape[2]) // 2)
    grad_h, grad_v = (torch.autograd.grad(o, maps, d[g], retain_graph=True)[0] for o, g in ((h, "g_h"), (v, "g_v")))
    for got, key in ((h, "out_h"), (v, "out_v"), (grad_h, "grad_z_h"), (grad_v, "grad_z_v")):
        assert relative(got, d[key]) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", STRIPS)
def test_strips_are_depthwise_convolutions_with_their_gradients(case, dtype, layout):
    exact = strip_arguments(case)
    upstream = [draw(exact[0].shape, seed=seed) for seed in (6, 7, 8)]
    wanted = (*by_convolution(*exact), *gradients(by_convolution, exact, upstream))
    arguments = (exact[0].to(dtype, memory_format=layout), *(k.to(dtype) for k in exact[1:4]), *exact[4:])
    op = torch.ops.swconv.strip_branches
    got = (*op(*arguments), *gradients(op, arguments, [g.to(dtype) for g in upstream]))
    assert max(relative(a, b) for a, b in zip(got, wanted, strict=True)) < TOLERANCE[dtype]


def test_the_two_strips_may_differ_in_length_and_breadth():
    x, kernel_c = draw((2, 3, 9, 8)), draw((3, 1, 3, 3), seed=1)
    kernel_h, kernel_v = draw((3, 1, 3, 11), seed=2), draw((3, 1, 6, 5), seed=3)
    h, v, _ = torch.ops.swconv.strip_branches(x, kernel_h, kernel_v, kernel_c, 5, 2)
    assert relative(h, F.conv2d(F.pad(x, (5, 5, 1, 1)), kernel_h, groups=3)) < 1e-10
    assert relative(v, F.conv2d(F.pad(x, (2, 2, 2, 3)), kernel_v, groups=3)) < 1e-10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", STRIPS)
def test_the_mix_is_a_sum_of_depthwise_convolutions_with_its_gradients(case, dtype, layout):
    exact, bias = strip_arguments(case), draw((2,), seed=9)
    upstream = draw(exact[0].shape, seed=10)

    def wanted(*arguments):
        return sum(by_convolution(*arguments)) + bias[:, None, None]

    def mixed(x, kernel_h, kernel_v, kernel_c, *anchors):
        return torch.ops.swconv.strip_mix(x, kernel_h, kernel_v, kernel_c, bias.to(x.dtype), *anchors)

    arguments = (exact[0].to(dtype, memory_format=layout), *(k.to(dtype) for k in exact[1:4]), *exact[4:])
    got = mixed(*arguments), *gradients(mixed, arguments, upstream.to(dtype))
    for a, b in zip(got, (wanted(*exact), *gradients(wanted, exact, upstream)), strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_bias", [True, False])
def test_mix_is_the_sum_of_the_branches_and_the_bias_with_their_gradients(with_bias):
    x, *rest = strip_arguments("as long as the map")
    bias = draw((2,), seed=9) if with_bias else None

    def summed(x, kernel_h, kernel_v, kernel_c, *anchors):
        return sum(torch.ops.swconv.strip_branches(x, kernel_h, kernel_v, kernel_c, *anchors))

    def mixed(x, kernel_h, kernel_v, kernel_c, *anchors):
        return torch.ops.swconv.strip_mix(x, kernel_h, kernel_v, kernel_c, bias, *anchors)

    offset = bias[:, None, None] if with_bias else 0.0
    assert relative(mixed(x, *rest), summed(x, *rest) + offset) < 1e-14
    upstream = draw(x.shape, seed=10)
    for got, wanted in zip(gradients(mixed, (x, *rest), upstream), gradients(summed, (x, *rest), upstream), strict=True):
        assert relative(got, wanted) < 1e-14


def test_gradients_agree_with_finite_differences():
    pads = tables()
    maps = draw((2, 6, 5, 6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: torch.ops.swconv.shift_add(m, *pads, 1), maps)
    x, *kernels = (a.requires_grad_() for a in (draw((2, 2, 4, 5)), draw((2, 1, 3, 7)), draw((2, 1, 7, 3)), draw((2, 1, 3, 3))))
    bias = draw((2,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: torch.ops.swconv.strip_branches(*a, 3, 2), (x, *kernels))
    assert torch.autograd.gradcheck(lambda *a: torch.ops.swconv.strip_mix(*a, 3, 2), (x, *kernels, bias))
    filters, mixing = [draw((10, 1, 3, 3), seed=seed).requires_grad_() for seed in (1, 2)], ShiftTables.draw(2, 5, 2).mixing()
    assert torch.autograd.gradcheck(lambda *f: torch.ops.swconv.assemble(list(f), mixing.double()), filters)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operators_keep_the_rules_of_torch_library(layout):
    x, *rest = strip_arguments("odd map", dtype=torch.float32)
    x = x.to(memory_format=layout).requires_grad_()
    kernels, anchors = [k.requires_grad_() for k in rest[:3]], rest[3:]
    upstream = [draw(x.shape, torch.float32, seed) for seed in (6, 7, 8)]
    ops = torch.ops.swconv
    torch.library.opcheck(ops.strip_branches.default, (x, *kernels, *anchors))
    torch.library.opcheck(ops.strip_mix.default, (x, *kernels, draw((2,), torch.float32).requires_grad_(), *anchors))
    torch.library.opcheck(ops.strip_mix.default, (x, *kernels, None, *anchors))
    no_grad = [t.detach() for t in (x, *kernels)]
    torch.library.opcheck(ops.strip_branches_backward.default, (*upstream, *no_grad, *anchors))
    filters = [draw((10, 1, 3, 3), torch.float32, seed).requires_grad_() for seed in (1, 2)]
    mixing = ShiftTables.draw(2, 5, 2).mixing()
    torch.library.opcheck(ops.assemble.default, (filters, mixing))
    torch.library.opcheck(ops.assemble_backward.default, (*(k.detach() for k in ops.assemble(filters, mixing)), mixing))
    pads, maps = tables(), draw((2, 6, 5, 6), torch.float32).requires_grad_()
    for some in (maps, maps.detach()[:0].requires_grad_(), maps.detach().to(memory_format=layout).requires_grad_()):
        torch.library.opcheck(ops.shift_add.default, (some, *pads, 1))
    grads = [draw((2, 2, 3, 4), torch.float32, seed) for seed in (6, 7, 8)]
    torch.library.opcheck(ops.shift_add_backward.default, (*grads, *pads, 1, 3))


def test_a_compiled_graph_holds_the_operators_without_a_break():
    x, *rest = strip_arguments("odd map")

    def block(x, *rest):
        return torch.relu(torch.ops.swconv.strip_mix(x, *rest[:3], None, *rest[3:])) if native.handles(x) else x

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, *rest), block(x, *rest))


def test_channels_last_in_gives_channels_last_out_and_the_same_bits():
    x, *rest = strip_arguments("as long as the map", channels=5)
    upstream = [draw(x.shape, seed=seed) for seed in (6, 7, 8)]
    op = torch.ops.swconv.strip_branches
    last = x.to(memory_format=torch.channels_last)
    for got, wanted in zip(op(last, *rest), op(x, *rest), strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, wanted)
    for got, wanted in zip(gradients(op, (last, *rest), upstream), gradients(op, (x, *rest), upstream), strict=True):
        assert torch.equal(got, wanted)


def test_results_do_not_depend_on_batch_split_or_thread_count(threads):
    arguments = strip_arguments("odd map", batch=13, channels=5, dtype=torch.float32)
    x, *rest = arguments
    upstream = [draw(x.shape, torch.float32, seed) for seed in (6, 7, 8)]
    op = torch.ops.swconv.strip_branches
    threads(1)
    whole, grads = op(*arguments), gradients(op, arguments, upstream)
    for start, stop in ((0, 1), (1, 6), (6, 13)):
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(op(x[start:stop], *rest), whole, strict=True))
    threads(2)
    assert all(torch.equal(a, b) for a, b in zip(op(*arguments), whole, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(op, arguments, upstream), grads, strict=True))


def test_two_runs_give_the_same_bits():
    arguments = strip_arguments("as long as the map", batch=9, channels=6, dtype=torch.float32)
    upstream = [draw(arguments[0].shape, torch.float32, seed) for seed in (6, 7, 8)]
    op = torch.ops.swconv.strip_branches
    first, second = (gradients(op, arguments, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_infinite_pixel_reaches_its_taps_and_nothing_else():
    x, *rest = strip_arguments("as long as the map", batch=2)
    x[0, 0, 2, 9] = float("inf")
    h, v, _ = torch.ops.swconv.strip_branches(x, *rest)
    reached = torch.zeros(x.shape, dtype=torch.bool)
    reached[0, 0, 1:4, 2:] = True                     # 15 taps, 7 to the left of the anchor: columns 9 - 7 to 9 + 7
    assert torch.equal(~h.isfinite(), reached)
    reached[0, 0] = False
    reached[0, 0, :10, 8:11] = True
    assert torch.equal(~v.isfinite(), reached)


def test_an_infinite_gradient_reaches_its_taps_and_nothing_else():
    x, *rest = strip_arguments("as long as the map", batch=2)
    upstream = [draw(x.shape, seed=seed) for seed in (6, 7, 8)]
    upstream[0][0, 0, 2, 9] = float("inf")
    grad, *_ = gradients(torch.ops.swconv.strip_branches, (x, *rest), upstream)
    reached = torch.zeros(x.shape, dtype=torch.bool)
    reached[0, 0, 1:4, 2:] = True
    assert torch.equal(~grad.isfinite(), reached)


def test_an_empty_batch_has_empty_maps_and_zero_kernel_gradients():
    arguments = strip_arguments("odd map", batch=0)
    grads = gradients(torch.ops.swconv.strip_branches, arguments, [arguments[0]] * 3)
    assert grads[0].shape == arguments[0].shape
    assert all(g.shape == k.shape and not g.any() for g, k in zip(grads[1:], arguments[1:4], strict=True))


def test_wrong_arguments_are_refused_with_what_was_needed():
    x, kernel_h, kernel_v, kernel_c, *anchors = strip_arguments("odd map")
    op = torch.ops.swconv.strip_branches
    with pytest.raises(RuntimeError, match=r"needs kernel_v of shape \(2, 1, 13, 3\), got \(3, 1, 13, 3\)"):
        op(x, kernel_h, draw((3, 1, 13, 3)), kernel_c, *anchors)
    with pytest.raises(RuntimeError, match="needs anchors on strips of 13 and 13 taps, got 13 and 6"):
        op(x, kernel_h, kernel_v, kernel_c, 13, 6)
    with pytest.raises(RuntimeError, match="needs tensors of one dtype, got Double and Float"):
        op(x, kernel_h.float(), kernel_v, kernel_c, *anchors)
    with pytest.raises(RuntimeError, match=r"needs float32 or float64 on the CPU, got Half. Convert with .float\(\)"):
        op(*(t.half() for t in (x, kernel_h, kernel_v, kernel_c)), *anchors)
    pad_h, pad_v, pick = tables()
    with pytest.raises(RuntimeError, match=r"needs R \* n maps \(2 \* 3 = 6\).* same kernel size\?"):
        torch.ops.swconv.shift_add(draw((1, 7, 5, 6)), pad_h, pad_v, pick, 1)
    with pytest.raises(RuntimeError, match=r"needs pick between 0 and 2 in row 0, got 6"):
        torch.ops.swconv.shift_add(draw((1, 6, 5, 6)), pad_h, pad_v, torch.full_like(pick, 6), 1)


def test_handles_says_what_the_operators_take():
    assert native.handles(torch.zeros(1))
    assert not native.handles(torch.zeros(1, dtype=torch.bfloat16))
    assert not native.handles(torch.zeros(1, device="meta"))


def test_the_environment_can_switch_the_library_off():
    code = "from swconv.ops import native; print(native.available(), native.library_sha256())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SWCONV_NATIVE": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "None"]
