"""Every engine of the GPU against float64 on the CPU; and what users build around the operators: AMP, graphs, processes."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import reparameterize_model

import swconv.models  # noqa: F401
from swconv.ops import ShiftTables, ShiftwiseConv2d, assemble, native, shift_add, strip_branches, strip_mix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# dtype, whether TF32 is allowed, and the relative error that is
ENGINES = {"float32": (torch.float32, False, 1e-5), "tf32": (torch.float32, True, 2e-3),
           "bfloat16": (torch.bfloat16, False, 1e-2), "float16": (torch.float16, False, 2e-3)}
# images, channels, height, width; breadth, length and anchor of the horizontal strip, of the vertical; side of the small kernel
CASES = {
    "stage 1": ((5, 3, 56, 56), (3, 51, 25), (3, 51, 25), 3),
    "stage 2": ((5, 3, 28, 28), (3, 51, 24), (3, 51, 24), 3),
    "stage 3": ((9, 3, 14, 14), (3, 48, 23), (3, 48, 23), 3),
    "stage 4": ((17, 3, 7, 7), (3, 15, 6), (3, 15, 6), 3),
    "SLaK, stage 1": ((3, 2, 56, 56), (5, 51, 25), (5, 51, 25), 5),
    "N = 7": ((2, 2, 28, 28), (7, 49, 24), (7, 49, 24), 7),
    "breadth 5, off-centre anchors": ((1, 1, 14, 20), (5, 9, 0), (5, 9, 8), 3),
    "low map": ((2, 2, 5, 9), (3, 7, 5), (3, 7, 1), 3),
    "one row": ((3, 1, 1, 7), (3, 9, 4), (3, 9, 5), 3),
    "one pixel": ((1, 1, 1, 1), (1, 1, 0), (1, 1, 0), 1),
    "longer than a tile": ((1, 1, 70, 20), (3, 51, 25), (3, 51, 25), 3),
    "a map of detection": ((1, 2, 100, 168), (3, 51, 25), (3, 51, 25), 3),
    "wider than the reach": ((1, 1, 3, 70), (3, 5, 1), (3, 5, 2), 3),
    "small kernel broader than the strips": ((1, 1, 8, 8), (3, 7, 3), (3, 7, 2), 5),
    "small kernel past the strip's end": ((1, 1, 8, 8), (3, 7, 0), (3, 7, 3), 3),
    "unequal strips": ((1, 2, 6, 11), (7, 5, 3), (3, 9, 2), 3),
    "whole maps, three tiles": ((150, 5, 7, 7), (3, 15, 6), (3, 15, 6), 3),
    "64 pixels": ((65, 2, 8, 8), (5, 21, 20), (3, 9, 0), 7),
    "64 pixels in a row": ((2, 1, 1, 64), (3, 51, 24), (3, 51, 25), 3),
    "a column": ((2, 2, 37, 1), (3, 51, 24), (7, 99, 60), 5),
    "one more than 64 pixels": ((2, 1, 5, 13), (3, 15, 6), (3, 15, 6), 3),
    "few pixels": ((5, 2, 3, 4), (3, 3, 0), (1, 4, 3), 3),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORK = {"num_classes": 4, "depths": (1, 1), "dims": (8, 12), "kernel_sizes": (13, 5), "layer_scale_init": 1.0}


@pytest.fixture(autouse=True)
def convolutions_in_float32():
    """torch allows TF32 in cuDNN's convolutions unless told otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def engine(request):
    """The dtype of an engine of `ENGINES`, and the error it may have; TF32 is allowed, or not, as it says."""
    dtype, tf32, allowed = ENGINES[request.param]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    yield dtype, allowed
    torch.backends.cuda.matmul.allow_tf32 = before


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(case):
    """x, the kernels, a bias and three gradients in float64; and the anchors."""
    shape, (breadth_h, length_h, anchor_h), (breadth_v, length_v, anchor_v), small = CASES[case]
    channels = shape[1]
    kernels = ((breadth_h, length_h), (length_v, breadth_v), (small, small))
    tensors = [draw(shape, 0), *(draw((channels, 1, *sides), 1 + i) for i, sides in enumerate(kernels)), draw((channels,), 4)]
    return tensors, [draw(shape, 5 + i) for i in range(3)], (anchor_h, anchor_v)


def results(tensors, upstream, anchors):
    """h, v, i and their gradients, the mix and its gradients."""
    x, *kernels, bias = leaves = [t.detach().requires_grad_() for t in tensors]
    parts = strip_branches(x, *kernels, *anchors)
    mix = strip_mix(x, *kernels, bias, *anchors)
    return {"parts": parts, "gradients": torch.autograd.grad(parts, leaves[:4], upstream), "mix": (mix,),
            "gradients of mix": torch.autograd.grad(mix, leaves, upstream[0])}


def relative(got, wanted):
    return ((got.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def poison(shape, dtype):
    """Leave NaN in the memory that the next tensors of this size will get."""
    kept = [torch.full(shape, float("nan"), device="cuda", dtype=dtype) for _ in range(6)]
    del kept


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_every_engine_is_the_operator_and_repeats_its_bits(engine, case, layout):
    dtype, allowed = engine
    tensors, upstream, anchors = arguments(case)
    if case == "one pixel" and torch.backends.cuda.matmul.allow_tf32:  # three products, each off by 2^-9 at most, may cancel
        allowed *= 2
    rounded = [t.to(dtype).double() for t in tensors], [g.to(dtype).double() for g in upstream]
    wanted = results(*rounded, anchors)

    def on_gpu():
        x, *kernels = (t.to("cuda", dtype) for t in tensors)
        grads = [g.to("cuda", dtype).contiguous(memory_format=LAYOUTS[layout]) for g in upstream]
        poison(x.shape, dtype)
        return results([x.contiguous(memory_format=LAYOUTS[layout]), *kernels], grads, anchors)

    got, again = on_gpu(), on_gpu()
    for what in wanted:
        for a, b, c in zip(got[what], wanted[what], again[what], strict=True):
            assert a.dtype == dtype
            assert relative(a, b) < allowed, what
            assert torch.equal(a, c), what
    if layout == "channels_last" and min(CASES[case][0][1:]) > 1:
        assert got["mix"][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("case", ["stage 1", "stage 3", "stage 4", "whole maps, three tiles"])
def test_a_batch_in_pieces_gives_the_same_bits(engine, case):
    dtype, _ = engine
    (x, *kernels, bias), _, anchors = arguments(case)
    x, *kernels, bias = (t.to("cuda", dtype) for t in (x, *kernels, bias))
    pieces = torch.cat([strip_mix(piece, *kernels, bias, *anchors) for piece in x.split([1, 2, len(x) - 3])])
    assert torch.equal(strip_mix(x, *kernels, bias, *anchors), pieces)
    empty = strip_mix(x[:0], *kernels, bias, *anchors)
    assert empty.shape == x[:0].shape


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(3, 80, 14, 14), (2, 3, 7, 9), (1, 130, 5, 5)])
def test_a_copy_to_the_other_layout_is_torchs_and_torch_accepts_it(shape, last):
    given, wanted = (torch.contiguous_format, torch.channels_last)[:: 1 if last else -1]
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=given).requires_grad_()
        got = native.relaid(x, wanted)
        assert got.is_contiguous(memory_format=wanted)
        assert torch.equal(got, x)
        torch.library.opcheck(torch.ops.swconv.relayout.default, (x, last))


def test_float64_is_taken_by_plain_torch_and_its_gradients_are_right():
    tensors, _, anchors = arguments("unequal strips")
    x, *kernels, bias = (t.cuda().requires_grad_() for t in tensors)
    assert native.strip_engine(x) == "torch"
    assert torch.autograd.gradcheck(lambda *t: strip_branches(*t, *anchors), (x, *kernels))
    assert torch.autograd.gradcheck(lambda *t: strip_mix(*t, *anchors), (x, *kernels, bias))


@pytest.mark.parametrize("engine", ["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("op", ["branches", "mix"])
def test_torch_accepts_the_operators_of_the_gpu(engine, op):
    dtype, _ = engine
    (x, *kernels, bias), _, anchors = arguments("low map")
    x, *kernels, bias = (t.to("cuda", dtype).requires_grad_() for t in (x, *kernels, bias))
    name = native.strip_engine(x).replace("compiled", "strip")
    given = (x, *kernels, *([bias] if op == "mix" else []), *anchors)
    torch.library.opcheck(getattr(torch.ops.swconv, f"{name}_{op}").default, given)


def test_torch_accepts_the_parts_of_the_gradient_in_float32():
    (x, *kernels, _), upstream, anchors = arguments("low map")
    x, *kernels = (t.to("cuda", torch.float32) for t in (x, *kernels))
    grads = [g.to("cuda", torch.float32) for g in upstream]
    assert native.strip_engine(x.bfloat16()) == "toeplitz"
    torch.library.opcheck(torch.ops.swconv.strip_branches_adjoint.default, (*grads, *kernels, *anchors))
    torch.library.opcheck(torch.ops.swconv.toeplitz_kernel_gradients.default, (*grads, x, *kernels, *anchors))


@pytest.mark.parametrize("op", ["shift_add", "shift_add_atomic"])
def test_the_two_step_form_is_the_strip_form(op):
    torch.manual_seed(0)
    layer = ShiftwiseConv2d(8, 51, ghost_ratio=0.0, norm=None, skip=False).cuda()
    x = torch.randn(3, 8, 28, 28, device="cuda")
    maps = layer.responses(x)
    function = shift_add if op == "shift_add" else torch.ops.swconv.shift_add_atomic
    two_step = function(maps, layer.pad_h, layer.pad_v, layer.pick.int(), layer.halo)
    upstream = [torch.randn_like(x) for _ in range(3)]
    grads = (torch.autograd.grad(parts, list(layer.filters), upstream) for parts in (two_step, layer.branches(x)))
    for a, b in [*zip(two_step, layer.branches(x), strict=True), *zip(*grads, strict=True)]:
        assert relative(a, b.double().cpu()) < 1e-5


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_computes_strips_in_half_precision_and_leaves_weights_in_float32(amp):
    torch.manual_seed(0)
    layer, x = ShiftwiseConv2d(12, 13).cuda(), torch.randn(4, 12, 14, 14, device="cuda")
    wanted = layer(x)
    expected = torch.autograd.grad(wanted.sum() + wanted.square().sum(), list(layer.parameters()))
    with torch.autocast("cuda", amp):
        got = layer(x)
        parts = layer.branches(layer.split(x)[0])
    grads = torch.autograd.grad(got.float().sum() + got.float().square().sum(), list(layer.parameters()))
    assert {part.dtype for part in parts} == {amp}
    assert {grad.dtype for grad in grads} == {torch.float32}
    for a, b in zip((got, *grads), (wanted, *expected), strict=True):
        assert relative(a, b.detach().double().cpu()) < 2e-2


@pytest.mark.parametrize("case", ["stage 1", "stage 4", "unequal strips"])
def test_under_autocast_gradients_of_weights_are_not_rounded_to_half_precision(case):
    tensors, upstream, anchors = arguments(case)
    x, *kernels, bias = (t.float().cuda().requires_grad_() for t in tensors)
    with torch.autocast("cuda", torch.bfloat16):
        parts = strip_branches(x, *kernels, *anchors)
        mix = strip_mix(x, *kernels, bias, *anchors)
    upstream = [grad.bfloat16() for grad in upstream]
    got = *torch.autograd.grad(parts, kernels, [grad.cuda() for grad in upstream]), \
        *torch.autograd.grad(mix, (*kernels, bias), upstream[0].cuda())
    wanted = results([x.detach().bfloat16().double().cpu(), *tensors[1:]], [grad.double() for grad in upstream], anchors)
    for a, b in zip(got, (*wanted["gradients"][1:], *wanted["gradients of mix"][1:]), strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny", "unireplknet_tiny"])
def test_networks_give_on_the_gpu_what_they_give_in_float64_and_merge(name):
    torch.manual_seed(0)
    sizes = NETWORK | {"kernel_sizes": {"sw_tiny": (13, 5), "slak_tiny": (13, 7), "unireplknet_tiny": (3, 13)}[name]}
    model, x = timm.create_model(name, **sizes).eval(), torch.randn(3, 3, 64, 64)
    wanted = copy.deepcopy(model).double()(x.double()).detach()
    x = x.cuda().contiguous(memory_format=torch.channels_last)
    for network in (model.cuda(), reparameterize_model(model).cuda()):
        network.to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert relative(network(x), wanted) < 1e-4
            assert relative(copy.deepcopy(network).bfloat16()(x.bfloat16()), wanted) < 5e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")       # torch.compile's own, of torch.jit,
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")         # and its advice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["training", "merged"])
def test_networks_compile_whole_and_replay_as_cuda_graphs(form, dtype):
    torch.manual_seed(0)
    model = timm.create_model("sw_tiny", **NETWORK).eval()
    model = (reparameterize_model(model) if form == "merged" else model).to("cuda", dtype)
    first, second = torch.randn(2, 2, 3, 64, 64, device="cuda").to(dtype).unbind()
    with torch.no_grad():
        expected = model(second)
        compiled = torch.compile(model, fullgraph=True)
        assert relative(compiled(second), expected.double().cpu()) < (1e-5 if dtype == torch.float32 else 3e-2)
        still = first.clone()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(still)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(still)
        still.copy_(second)
        graph.replay()
        assert torch.equal(captured, expected)


# torch warms up and captures on two streams, and warns itself of that.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_a_training_step_replays_as_a_cuda_graph():
    torch.manual_seed(0)
    layer, x = ShiftwiseConv2d(12, 51, norm=None).cuda(), torch.randn(4, 12, 28, 28, device="cuda")
    call = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
    for _ in range(2):
        again = torch.randn_like(x)
        wanted, got = layer(again), call(again)
        assert torch.equal(got, wanted)
        grads = [torch.autograd.grad(y.square().sum(), list(module.parameters()))
                 for y, module in ((wanted, layer), (got, call))]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_network_trains_among_processes_with_torch_s_own_synchronised_norm(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        alone = timm.create_model("sw_tiny", **NETWORK).cuda()
        shared = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(alone))
        shared = torch.nn.parallel.DistributedDataParallel(shared, device_ids=[0])
        x = torch.randn(4, 3, 64, 64, device="cuda")
        for model in (alone, shared):
            model(x).square().sum().backward()
        for (name, a), b in zip(alone.named_parameters(), shared.parameters(), strict=True):
            assert relative(b.grad, a.grad.double().cpu()) < 1e-3, name
    finally:
        dist.destroy_process_group()


# branches, R, n, N
ASSEMBLIES = [(1, 5, 17, 3), (2, 246, 16, 3), (16, 3, 11, 5), (18, 3, 5, 3), (2, 4, 8, 7), (2, 3, 6, 9)]


def assembly(branches, channels, taps, small):
    """Filters of every branch, mixing and the gradients of the three kernels, in float64."""
    filters = [draw((channels * taps, 1, small, small), seed) for seed in range(branches)]
    sides = (small, taps * small), (taps * small, small), (small, small)
    upstream = [draw((channels, 1, *side), 20 + i) for i, side in enumerate(sides)]
    return filters, ShiftTables.draw(channels, taps, edges=4).mixing(), upstream


@pytest.mark.parametrize("sizes", ASSEMBLIES, ids=str)
def test_filters_are_assembled_in_their_own_precision_with_their_gradients(sizes):
    filters, mixing, upstream = assembly(*sizes)
    leaves = [branch.requires_grad_() for branch in filters]
    kernels = assemble(leaves, mixing.double())
    wanted = *kernels, *torch.autograd.grad(kernels, leaves, upstream)

    def on_gpu():
        leaves = [branch.detach().float().cuda().requires_grad_() for branch in filters]
        with torch.autocast("cuda", torch.bfloat16):
            kernels = assemble(leaves, mixing.cuda())
        return *kernels, *torch.autograd.grad(kernels, leaves, [grad.float().cuda() for grad in upstream])

    for a, b, c in zip(on_gpu(), wanted, on_gpu(), strict=True):
        assert relative(a, b.detach()) < 1e-6
        assert torch.equal(a, c)


def test_torch_accepts_the_assembly_of_the_gpu_which_says_how_many_branches_it_takes():
    filters, mixing, upstream = assembly(2, 3, 5, 3)
    filters, mixing = [branch.float().cuda().requires_grad_() for branch in filters], mixing.cuda()
    assert native.handles(filters[0], "assemble")
    torch.library.opcheck(torch.ops.swconv.assemble.default, (filters, mixing))
    torch.library.opcheck(torch.ops.swconv.assemble_backward.default, (*(grad.float().cuda() for grad in upstream), mixing))
    with pytest.raises(RuntimeError, match="needs at most 16 Rep branches on the GPU, got 17. Add some of them up before."):
        torch.ops.swconv.assemble(filters[:1] * 17, mixing)
