"""The operators as users meet them: properties, AMP, graphs, and the sentences for wrong arguments, whatever engine runs."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import reparameterize_model

import swconv.models  # noqa: F401
from swconv.ops import ShiftTables, ShiftwiseConv2d, assemble, native, shift_add, strip_branches, strip_mix

NETWORK = {"num_classes": 4, "depths": (1, 1), "dims": (8, 12), "kernel_sizes": (13, 5), "layer_scale_init": 1.0}


def kernels(channels=3, taps=5, small=3, dtype=torch.float64):
    torch.manual_seed(1)
    tables = ShiftTables.draw(channels, taps, edges=2)
    return assemble(torch.randn(channels * taps, 1, small, small, dtype=dtype), tables.mixing().to(dtype))


def literal(filters, tables, x, extent, small):
    """The definition, element by element: where pixel and filter meet, for every edge and slot."""
    images, channels, height, width = x.shape
    edges, _, taps = tables.slot_h.shape
    sums = torch.zeros(3, *x.shape, dtype=x.dtype)
    half = small // 2

    def response(b, r, k, y, column):
        """Filter k of channel r centred on a pixel, which may lie outside the map."""
        total = 0.0
        for dy in range(-half, half + 1):
            for dx in range(-half, half + 1):
                if 0 <= y + dy < height and 0 <= column + dx < width:
                    total += filters[r * taps + k, 0, dy + half, dx + half] * x[b, r, y + dy, column + dx]
        return total

    for b in range(images):
        for r in range(channels):
            for y in range(height):
                for column in range(width):
                    for e in range(edges):
                        for slot in range(taps):
                            offset = slot * small + half - extent // 2
                            sums[0, b, r, y, column] += response(b, r, tables.slot_h[e, r, slot], y, column + offset)
                            sums[1, b, r, y, column] += response(b, r, tables.slot_v[e, r, slot], y + offset, column)
                        sums[2, b, r, y, column] += response(b, r, tables.pick[r, e] - r * taps, y, column)
    return sums


@pytest.mark.parametrize(("extent", "small", "shape"), [(13, 3, (1, 2, 4, 5)), (7, 5, (2, 1, 3, 6)), (9, 7, (1, 1, 4, 4))])
def test_the_operator_is_its_definition_element_by_element(extent, small, shape):
    torch.manual_seed(0)
    taps = -(-extent // small)
    tables = ShiftTables.draw(shape[1], taps, edges=2)
    filters, x = torch.randn(shape[1] * taps, 1, small, small, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    parts = strip_branches(x, *assemble(filters, tables.mixing().double()), extent // 2, extent // 2)
    torch.testing.assert_close(torch.stack(parts), literal(filters, tables, x, extent, small), atol=1e-12, rtol=0)


def test_the_operator_is_linear():
    x, y = torch.randn(2, 2, 3, 9, 7, dtype=torch.float64).unbind()
    k = kernels()
    for a, b, c in zip(strip_branches(2 * x - y, *k), strip_branches(x, *k), strip_branches(y, *k), strict=True):
        torch.testing.assert_close(a, 2 * b - c, atol=1e-12, rtol=0)


def test_a_moved_image_gives_a_moved_output_inside():
    x = torch.zeros(1, 3, 48, 48, dtype=torch.float64)
    x[..., 20:24, 20:24] = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    k = kernels()
    y = strip_mix(x, *k)
    moved = strip_mix(x.roll((4, -4), (2, 3)), *k)
    assert torch.equal(moved, y.roll((4, -4), (2, 3)))
    for shift in ((4, -2), (3, -1)):                                     # other neighbours make four: other roundings
        torch.testing.assert_close(strip_mix(x.roll(shift, (2, 3)), *k), y.roll(shift, (2, 3)), atol=1e-13, rtol=0)


def test_the_order_of_rep_branches_and_edges_means_nothing():
    torch.manual_seed(0)
    layer = ShiftwiseConv2d(8, 13, rep_branches=3, edges=4).double().eval()
    x = torch.randn(2, 8, 10, 9, dtype=torch.float64)
    expected = layer(x)
    layer.filters = torch.nn.ParameterList(reversed(list(layer.filters)))
    tables = ShiftTables.draw(len(layer.mixed), 5, 4)
    turned = ShiftTables(tables.slot_h.flip(0), tables.slot_v.flip(0), tables.pick.flip(1))
    layer.mixing = turned.mixing().double()
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_a_masked_filter_adds_nothing_and_a_dead_channel_passes_no_gradient():
    torch.manual_seed(0)
    filters = torch.randn(10, 1, 3, 3, dtype=torch.float64)
    mask = torch.ones(10, 1, 1, 1, dtype=torch.float64)
    mask[5:] = 0                                                      # all filters of channel 1
    leaf, x = filters.clone().requires_grad_(), torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    y = strip_mix(x, *assemble(leaf * mask, ShiftTables.draw(2, 5, 2).mixing().double()), None, 6, 6)
    grad_filters, grad_x = torch.autograd.grad(y.sum(), (leaf, x))
    assert not y[:, 1].any()
    assert not grad_filters[5:].any()
    assert not grad_x[:, 1].any()
    assert grad_filters[:5].any()


def test_training_keeps_the_input_and_the_kernels_and_no_expanded_map():
    layer = ShiftwiseConv2d(12, 13, norm=None, ghost_ratio=0.0)
    x, kept = torch.randn(4, 12, 14, 14, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    maps = [t for t in kept if t.dim() == 4 and t.shape[2:] == x.shape[2:]]
    assert {t.data_ptr() for t in maps} == {x.data_ptr()}
    assert max(t.numel() for t in kept) == x.numel()


def network():
    torch.manual_seed(0)
    return timm.create_model("sw_tiny", **NETWORK)


def test_autocast_trains_and_stays_near_float32():
    model, x = network(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_by_every_function(dtype):
    x, k = torch.randn(1, 3, 8, 8, dtype=torch.float64), kernels()
    halved = [t.to(dtype) for t in k]
    for got, wanted in zip(strip_branches(x.to(dtype), *halved), strip_branches(x, *k), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < 0.02 * wanted.norm()
    assert strip_mix(x.to(dtype), *k, torch.zeros(3)).dtype == dtype  # kernels are rounded to x's dtype


@pytest.mark.parametrize("arguments", [{"norm": "filter"}, {"padding": "half"}], ids=str)
def test_a_layer_keeps_the_dtype_of_half_precision_and_sums_in_float32(arguments):
    torch.manual_seed(0)
    layer = ShiftwiseConv2d(9, 25, **arguments).eval()
    x = torch.randn(2, 9, 20, 20)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - expected).norm() < 0.005 * expected.norm()
    layer.reparameterize()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer(x.bfloat16()) - expected).norm() < 0.01 * expected.norm()


def functions():
    """Every operator as a function of tensors that may need gradients, and such tensors in float64."""
    tables, mixing = ShiftTables.draw(2, 3, 2), ShiftTables.draw(2, 3, 2).mixing().double()
    pads = tables.pads(9, 3, 2)
    torch.manual_seed(2)
    x, k, bias = torch.randn(2, 2, 4, 5).double(), kernels(2, 3), torch.randn(2).double()
    filters, maps = [torch.randn(6, 1, 3, 3).double() for _ in range(2)], torch.randn(2, 6, 6, 7).double()
    return {"branches": (lambda *a: strip_branches(*a, 4, 4), (x, *k)), "mix": (lambda *a: strip_mix(*a, 4, 4), (x, *k, bias)),
            "assemble": (lambda *f: assemble(f, mixing), filters),
            "shift_add": (lambda m: shift_add(m, *pads, tables.pick, 1), (maps,))}


@pytest.mark.parametrize("name", functions())
def test_gradients_can_be_differentiated(name):
    function, inputs = functions()[name]
    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in inputs])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")                                    # by torch itself
@pytest.mark.parametrize("name", functions())
def test_forward_mode_and_torch_func_see_through_the_operators(name):
    function, inputs = functions()[name]
    inputs = tuple(inputs)

    def total(*inputs):
        out = function(*inputs)
        return sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))

    leaves = [t.clone().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(total(*leaves), leaves)
    got = torch.func.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    _, slope = torch.func.jvp(total, inputs, inputs)
    torch.testing.assert_close(slope, sum((a * b).sum() for a, b in zip(wanted, inputs, strict=True)))


def test_layers_have_gradients_per_image():
    layer, x = ShiftwiseConv2d(9, 13).double().eval(), torch.randn(3, 9, 6, 5).double()
    weights = dict(layer.named_parameters())

    def total(weights, image):
        return torch.func.functional_call(layer, weights, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(total), (None, 0))(weights, x)
    for name, grad in torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).square().sum())(weights).items():
        torch.testing.assert_close(each[name].sum(0), grad, atol=1e-10, rtol=1e-10)
    layer(x).square().sum().backward()
    torch.testing.assert_close(each["filters.0"].sum(0), layer.filters[0].grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", ["training", "merged"])
def test_a_network_compiles_into_one_graph_and_is_exported(form):
    model, x = network().eval(), torch.randn(2, 3, 32, 32)
    model = reparameterize_model(model) if form == "merged" else model
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=0)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    torch.testing.assert_close(program.module()(torch.cat([x, x])), torch.cat([expected, expected]), atol=1e-5, rtol=0)
    assert any("swconv.strip" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")                                    # by torch itself
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_torchs_compiler_makes_a_training_step_of_the_same_gradients(layout):
    torch.compiler.reset()                                                                             # and with it its limits
    model, x = network(), torch.randn(2, 3, 32, 32).to(memory_format=layout)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    largest = max(grad.abs().max().item() for grad in wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * largest, rtol=1e-3)


def test_which_engine_runs_is_said_once(caplog):
    native._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "swconv"):
        for _ in range(2):
            strip_mix(torch.randn(1, 3, 8, 8), *kernels(dtype=torch.float32))
    assert [record.getMessage() for record in caplog.records] == ["The SW operator runs on cpu in float32: compiled csrc/"]


TELL = """
import sys
from pathlib import Path
import torch
from swconv.ops import ShiftwiseConv2d, native
native.LIBRARY = Path(sys.argv[1] or native.LIBRARY)
torch.manual_seed(0)
layer, x = ShiftwiseConv2d(8, 13).double(), torch.arange(8 * 81.).view(1, 8, 9, 9).double().requires_grad_()
y = layer(x / 648)
y.square().sum().backward()
print(native.strip_engine(x), y.square().sum().item(), x.grad.square().sum().item(), layer.filters[0].grad.norm().item())
"""


def told(library: str = "", **environment: str) -> tuple[str, list[float], str]:
    """The engine, what a training step of a layer gives, and what is logged, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", TELL, library], env=os.environ | environment, capture_output=True, text=True,
                          check=True)
    engine, *values = done.stdout.split()
    return engine, [float(value) for value in values], done.stderr


@pytest.fixture(scope="module")
def compiled():
    engine, values, _ = told()
    assert engine == "compiled"
    return values


def test_without_a_build_plain_torch_does_the_same(compiled, tmp_path):
    for engine, values, _ in (told(SWCONV_NATIVE="0"), told(str(tmp_path / "missing.so"))):
        assert engine == "torch"
        assert values == pytest.approx(compiled, rel=1e-9)


@pytest.mark.parametrize("content", ["int not_ours;", None], ids=["of other sources", "of another kind"])
def test_a_library_that_does_not_fit_is_told_and_plain_torch_does_the_same(content, compiled, tmp_path):
    library = tmp_path / "_C.abi3.so"
    if content is None:
        library.write_bytes(b"no library")
    else:
        subprocess.run(["g++", "-shared", "-x", "c++", "-", "-o", library], input=content, text=True, check=True)
    engine, values, logged = told(str(library))
    assert engine == "torch"
    assert values == pytest.approx(compiled, rel=1e-9)
    assert "Plain torch does the work; run `python -m swconv build` to build it anew." in logged


@pytest.mark.parametrize("instructions", ["portable", "avx2", "avx512"])
def test_every_set_of_instructions_in_the_library_does_the_same(instructions, compiled):
    flag = {"avx512": " avx512f "}.get(instructions, f" {instructions} ")
    if instructions != "portable" and flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {instructions}")
    engine, values, _ = told(SWCONV_CPU=instructions)
    assert engine == "compiled"
    assert values == pytest.approx(compiled, rel=1e-12)


X = torch.zeros(1, 3, 8, 8)
KERNELS = (torch.zeros(3, 1, 3, 15), torch.zeros(3, 1, 15, 3), torch.zeros(3, 1, 3, 3))
PAD, PICK = torch.zeros(6, 1, dtype=torch.int32), torch.tensor([[0], [3]])


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: strip_mix(X[0], *KERNELS), "strips need x (B, C, H, W) and kernels (C, 1, N, L), (C, 1, L, N), (C, 1, K, K)"),
    (lambda: strip_mix(X.long(), *KERNELS), "strips need floating-point tensors, got torch.int64, torch.float32"),
    (lambda: strip_mix(X.to("meta"), *KERNELS), "strips need x and kernels on one device, got meta, cpu, cpu, cpu."),
    (lambda: strip_mix(X, *KERNELS, torch.zeros(4)), "strip_mix needs a bias of shape (3,), one per channel of x, got (4,)."),
    (lambda: strip_branches(X, *KERNELS, 15), "anchors must lie on the strips of 15 and 15 taps, got 15 and 7."),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK + 3, 1), "shift_add needs pick between 0 and 2 in row 0, the"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK - 1, 1), "the filters of that channel, got -1. Are its entries"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK[:0], 1), "and pick (0, 1). Were maps and tables made for the"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK[:, :0], 1), "pick (R, E), got maps (1, 6, 8, 8), pad_h (6, 1)"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK[:, 0], 1), "and pick (2,)."),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD + 0.5, PAD, PICK, 1), "whole numbers, got torch.float32, torch.float32"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8).long(), PAD, PAD, PICK, 1), "needs floating-point maps and tables"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD.long() + 2**32, PAD, PICK, 1), "less than 2**31 pixels, got 4294967296."),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD, PAD, PICK, -1), "shift_add needs maps larger than two halos of -1 >= 0"),
    (lambda: shift_add(torch.zeros(1, 6, 8, 8), PAD.to("meta"), PAD, PICK, 1), "needs maps and tables on one device"),
    (lambda: shift_add(torch.zeros(1, 5, 8, 8), PAD, PAD, PICK, 1), "shift_add needs maps (B, R * n, H, W), pad_h and"),
    (lambda: ShiftwiseConv2d(9, 13)(torch.zeros(1, 12, 8, 8)), "needs x of shape (B, 9, H, W), got (1, 12, 8, 8)."),
    (lambda: ShiftwiseConv2d(9, 13)(torch.zeros(9, 8, 8)), "ShiftwiseConv2d needs x of shape (B, 9, H, W), got (9, 8, 8)."),
])
def test_wrong_arguments_are_told_before_any_memory_is_touched(call, sentence):
    with pytest.raises(ValueError) as raised:                         # noqa: PT011  the sentence is compared below
        call()
    assert sentence in str(raised.value)


def test_mixed_and_strided_layouts_give_the_dense_result():
    k = kernels(dtype=torch.float32)
    x = torch.randn(2, 6, 16, 9)[:, ::2, ::2]
    dense = strip_mix(x.contiguous(), *k)
    assert torch.equal(strip_mix(x, *k), dense)
    assert torch.equal(strip_mix(x.contiguous(), *(t.transpose(2, 3).contiguous().transpose(2, 3) for t in k)), dense)


def test_the_toeplitz_operators_are_registered_with_shapes_and_gradients():
    """On the meta device, as a graph sees them: no GPU is here to run them."""
    native._register_toeplitz()
    x = torch.empty(2, 3, 9, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weights = [t.to("meta").requires_grad_() for t in (*KERNELS, torch.zeros(3))]        # in float32, as autocast has them
    outputs = torch.ops.swconv.toeplitz_branches(x, *weights[:3], 7, 7)
    y = torch.ops.swconv.toeplitz_mix(x, *weights, 7, 7)
    assert [(o.shape, o.dtype) for o in (y, *outputs)] == [(x.shape, x.dtype)] * 4
    grads = torch.autograd.grad([y, *outputs], [x, *weights], [torch.empty_like(y)] * 4)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, *weights)]
    assert torch.ops.swconv.toeplitz_mix(x, *weights[:3], None, 7, 7).shape == x.shape
