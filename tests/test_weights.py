"""Published checkpoints: what is read, what is refused, what conversion writes."""

import argparse
import pickle
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import swconv.models  # noqa: F401
from swconv.__main__ import main
from swconv.weights import convert, convert_official, file_sha256, lay_out, masks_in, read_checkpoint

GOLDEN = Path("tests/golden")
MINI = {"num_classes": 10, "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


@pytest.fixture(scope="module")
def sw() -> dict[str, torch.Tensor]:
    golden = load_file(GOLDEN / "sw_v2_mini.safetensors")
    return {name[6:]: tensor for name, tensor in golden.items() if name.startswith("state.")}


@pytest.fixture(scope="module")
def slak() -> dict[str, torch.Tensor]:
    golden = load_file(GOLDEN / "slak_decom_mini.safetensors")
    return {name[6:]: tensor for name, tensor in golden.items() if name.startswith("state.")}


@pytest.fixture(scope="module")
def model():
    return timm.create_model("sw_tiny", **MINI)


@pytest.fixture
def published(tmp_path, slak) -> Path:
    """As the released training script writes it, with its arguments as a Namespace."""
    path = tmp_path / "SLaK_mini.pth"
    torch.save({"model": slak, "model_ema": slak, "optimizer": {"state": {}}, "epoch": 299,
                "args": argparse.Namespace(kernel_size=["51", "49", "47", "13", "5"], lr=4e-3)}, path)
    return path


def test_a_published_checkpoint_converts_with_its_origin_in_the_file(published, tmp_path):
    out = tmp_path / "slak.safetensors"
    convert(published, "slak_tiny", out, MINI)
    model = timm.create_model("slak_tiny", **MINI)
    model.load_state_dict(load_file(out))
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert told["source_sha256"] == file_sha256(published)
    assert (told["model"], told["map_version"]) == ("slak_tiny", "1")


def test_laid_out_conversion_loads_into_the_laid_out_model_and_agrees(published, tmp_path):
    strips, pieces = tmp_path / "strips.safetensors", tmp_path / "pieces.safetensors"
    convert(published, "slak_tiny", strips, MINI)
    convert(published, "slak_tiny", pieces, MINI, laid_out=True)
    x, logits = torch.randn(1, 3, 64, 64).double(), []
    for path, laid_out in ((strips, False), (pieces, True)):
        model = timm.create_model("slak_tiny", **MINI, laid_out=laid_out)
        model.load_state_dict(load_file(path))
        logits.append(model.double().eval()(x))
    torch.testing.assert_close(*logits, atol=1e-12, rtol=1e-12)


def test_a_strip_is_cut_from_its_start_and_filled_with_zeros_at_its_end():
    kernel = torch.arange(1.0, 8.0).view(1, 1, 7, 1).repeat(1, 1, 1, 3)
    pieces = lay_out(kernel, 3)
    assert pieces[:, 0, :, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert torch.equal(lay_out(kernel.transpose(2, 3), 3), pieces.transpose(2, 3))
    assert len(lay_out(torch.ones(2, 1, 51, 3), 3)) == 2 * 17               # where N divides M, the published cutter made 18


def test_tables_in_a_file_are_checked(sw, model):
    layer = model.stages[0].blocks[0].mixer
    tables = {"stages.0.0.large_kernel.loras.pad_hv1": torch.cat([layer.pad_h, layer.pad_v], dim=1),
              "stages.0.0.large_kernel.loras.idx_identit1": layer.pick, "stages.0.0.large_kernel.ghost1": layer.ghost}
    assert convert_official(sw | tables, model).keys() == model.state_dict().keys()
    tables["stages.0.0.large_kernel.loras.idx_identit1"] = layer.pick + 1
    with pytest.raises(ValueError, match="idx_identit1 is not the table"):
        convert_official(sw | tables, model)


def test_masks_are_the_weights_that_are_not_zero(sw):
    masks = masks_in(sw)
    assert any(not mask.all() for mask in masks.values())
    assert all(torch.equal(sw[name] != 0, mask) for name, mask in masks.items())


def test_what_is_no_number_is_named(sw, model):
    broken = sw | {"head.weight": sw["head.weight"] * float("nan")}
    with pytest.raises(ValueError, match="not all finite numbers: head.weight"):
        convert_official(broken, model)


def test_another_number_of_classes_says_what_to_pass(sw):
    with pytest.raises(ValueError, match="num_classes=10"):
        convert_official(sw, timm.create_model("sw_tiny", **MINI | {"num_classes": 3}))


def test_another_kernel_size_is_told_with_both(slak):
    with pytest.raises(ValueError, match="51 x 5 px.*the model has .*31, 5"):
        convert_official(slak, timm.create_model("slak_tiny", **MINI, kernel_sizes=(31, 29, 27, 13)))


def another(**changes):
    return timm.create_model("sw_tiny", **MINI | changes)


def test_another_number_of_filters_is_told_as_the_range_of_kernel_sizes_that_have_it(sw):
    with pytest.raises(ValueError, match=r"have 17 filters per channel in .*filters\.0, that is M of 49 to 51 px, and the "
                                         r"model has 11 for M = 31 px\. Create the model with the weights' kernel sizes"):
        convert_official(sw, another(kernel_sizes=(31, 49, 47, 13)))
    with pytest.raises(ValueError, match=r"kernels of 3 x 3 px in stages\.0\.blocks\.0\.mixer\.filters\.0 .*, 1, 5, 5\)"):
        convert_official(sw, another(small_kernel=5))


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny"])
def test_another_width_is_not_told_as_a_kernel_size(request, name):
    state = request.getfixturevalue(name.partition("_")[0])
    with pytest.raises(ValueError, match=r"do not fit the model: .* of another shape") as told:
        convert_official(state, timm.create_model(name, **MINI | {"dims": (12, 16, 24, 32)}))
    assert "kernel" not in str(told.value).partition(" of another shape")[2].partition("]")[2]


def test_kernel_sizes_that_one_filter_bank_may_have_are_told_apart_by_the_arguments_of_the_training(sw, model):
    told = argparse.Namespace(kernel_size=["51", "49", "47", "13", "3"])
    other = another(kernel_sizes=(49, 49, 47, 13))
    assert {key: tuple(value.shape) for key, value in other.state_dict().items()} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert convert_official({"model": sw, "args": told}, model).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"a kernel of 51 px from filters of 3 px in stage 0.*the model has 49 px from 3 px.*"
                                         r"kernel_sizes=\(51, 49, 47, 13\), small_kernel=3"):
        convert_official({"model": sw, "args": told}, other)
    for unknown in (argparse.Namespace(), argparse.Namespace(kernel_size=None), "none", None):
        convert_official({"model": sw, "args": unknown}, other)


@pytest.mark.parametrize("told", [argparse.Namespace(N_rep=2, N_path=4), {"N_rep": 2, "N_path": 4}])
def test_another_number_of_edges_is_told_by_the_arguments_of_the_training_alone(sw, model, told):
    assert convert_official({"model": sw, "args": told}, another(edges=2)).keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=r"trained with 2 edges, as their args say \(N_rep 2\), and the model has 4\. Create "
                                         r"the model with edges=2\."):
        convert_official({"model": sw, "args": told}, model)


def test_a_number_of_edges_that_is_not_told_is_taken(sw, slak, model):
    for told in (argparse.Namespace(N_rep=4), argparse.Namespace(N_rep=None), {"kernel_size": None}, {}):
        assert convert_official({"model": sw, "args": told}, model).keys() == model.state_dict().keys()
    convert_official({"model": slak, "args": argparse.Namespace(N_rep=2)}, timm.create_model("slak_tiny", **MINI))


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    return timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_classes=10).state_dict()


@pytest.mark.parametrize(("name", "came"), [
    ("vit", r"patch_embed\.proj\.weight \(24, 3, 16, 16\), blocks\.0\.attn\.qkv\.weight \(72, 24\), "),
    ("sw", r"downsample_layers\.0\.0\.weight \(4, 3, 3, 3\), downsample_layers\.0\.3\.weight \(8, 4, 3, 3\), "),
    ("slak", r"downsample_layers\.0\.0\.weight \(10, 3, 4, 4\), downsample_layers\.1\.1\.weight \(20, 10, 2, 2\), "),
])
def test_what_is_no_convnext_of_this_size_is_told_with_what_came(request, name, came):
    with pytest.raises(ValueError, match=rf"those of a ConvNeXt of this size \(widths \(8, 16, 24, 32\)\), got {came}"):
        convert_official(request.getfixturevalue(name), timm.create_model("convnext_tiny", **MINI))


@pytest.mark.parametrize("name", ["vit", "slak"])
def test_the_verb_refuses_what_is_no_convnext_in_one_sentence(request, tmp_path, capsys, name):
    torch.save({"model": request.getfixturevalue(name)}, tmp_path / "other.pth")
    assert main(["convert", str(tmp_path / "other.pth"), "--model", "convnext_tiny", "--out", str(tmp_path / "out.safetensors"),
                 "--set", *(f"{key}={list(value) if key != 'num_classes' else value}" for key, value in MINI.items())]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("swconv convert: the weights need to be those of a ConvNeXt of this size")
    assert not (tmp_path / "out.safetensors").exists()


def test_foreign_weights_are_refused_in_a_sentence(sw, model):
    foreign = {name: tensor for name, tensor in sw.items() if name != "head.weight"} | {"extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 missing \['head.weight'\], 1 unexpected \['extra.weight'\]"):
        convert_official(foreign, model)


class Trap:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def test_a_file_with_code_is_not_opened(tmp_path, capsys):
    path = tmp_path / "trap.pth"
    path.write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    with pytest.raises(ValueError, match="can run code"):
        read_checkpoint(path)
    torch.save({"model": {}, "args": Trap()}, path)
    with pytest.raises(ValueError, match="can run code"):
        read_checkpoint(path)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SLaK_mini.pth", "cut.safetensors"])
def test_a_file_cut_short_is_told(published, tmp_path, name):
    whole = published if name.endswith("pth") else GOLDEN / "op_mp_a.safetensors"
    path = tmp_path / f"short_{name}"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_checkpoint(path)


def test_an_empty_file_is_told(tmp_path):
    path = tmp_path / "empty.pth"
    path.touch()
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_checkpoint(path)


def test_bytes_and_text_that_are_no_checkpoint_are_told(tmp_path):
    draw = random.Random(0)
    contents = [draw.randbytes(length) for length in (1, 2, 7, 64, 1000) for _ in range(10)]
    contents += [bytes([opcode]) + draw.randbytes(20) for opcode in range(256)]
    contents += [b"none\n", b"<html>404</html>", "Größe".encode(), b'{"model": 1}', b"version https://git-lfs\n", b"\x80\2."]
    path, told = tmp_path / "any.pth", r"any\.pth (holds objects that are no tensors|is damaged or cut short|needs to hold)"
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=told):
            read_checkpoint(path)


@pytest.mark.parametrize(("held", "kind"), [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), (3, "int")])
def test_a_file_without_names_is_told(tmp_path, held, kind):
    torch.save(held, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=rf"bare\.pth needs to hold tensors by name, or parts that do, got a {kind}\."):
        read_checkpoint(tmp_path / "bare.pth")


def test_what_is_no_tensor_among_the_weights_is_named(sw, model):
    with pytest.raises(ValueError, match="tensors by name, got others under epoch, 3. Say which part"):
        convert_official(sw | {"epoch": 3, 3: torch.ones(1)}, model)
    with pytest.raises(ValueError, match="got others under head.weight"):
        convert_official(sw | {"head.weight": [1.0]}, model)


def test_only_strips_can_be_laid_out(sw, tmp_path):
    torch.save({"model": sw}, tmp_path / "sw.pth")
    with pytest.raises(ValueError, match="sw_tiny has none"):
        convert(tmp_path / "sw.pth", "sw_tiny", tmp_path / "out.safetensors", MINI, laid_out=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_file_and_a_wrong_hash_say_what_to_do(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="put the downloaded file there"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="was expected"):
        read_checkpoint(published, "0" * 64)
    assert read_checkpoint(published, file_sha256(published))["epoch"] == 299
