"""Backbones under the names of MMDetection and MMSegmentation, and back."""

import hashlib

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import swconv.models  # noqa: F401  registers the models with timm
from swconv.__main__ import main
from swconv.downstream.export import to_openmmlab
from swconv.downstream.finetuning import build_pyramid
from swconv.downstream.pyramid import Pyramid
from swconv.weights import convert_official, to_official

FOUR = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}
NETWORKS = {
    "sw_tiny": FOUR | {"kernel_sizes": (13, 13, 7, 7)}, "slak_tiny": FOUR | {"kernel_sizes": (13, 13, 7, 7)},
    "unireplknet_tiny": FOUR | {"kernel_sizes": (3, 13, (13, 3), 13)}, "lk_convnext_tiny": FOUR, "convnext_tiny": FOUR,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_backbone_is_the_published_one_and_comes_back(name):
    pyramid = Pyramid(name, **NETWORKS[name])
    for weight in pyramid.parameters():
        torch.nn.init.normal_(weight)
    exported = to_openmmlab(pyramid)
    assert {key.split(".")[1] for key in exported} == {"downsample_layers", "stages", "norm0", "norm1", "norm2", "norm3"}
    assert len(exported) == len(pyramid.state_dict())
    width = FOUR["dims"][2] if name != "slak_tiny" else int(1.3 * FOUR["dims"][2])
    assert exported["backbone.norm2.weight"].shape == (width,)
    body = {key.removeprefix("backbone."): tensor for key, tensor in exported.items() if ".norm" not in key[:14]}
    classifier = timm.create_model(name, **NETWORKS[name])
    if name == "convnext_tiny":                                       # what timm's own converter of published files asks for
        head = {"norm.weight": torch.ones(20), "norm.bias": torch.zeros(20), "head.weight": torch.zeros(1000, 20),
                "head.bias": torch.zeros(1000)}
    else:
        head = {key: tensor for key, tensor in to_official(classifier).items() if key.startswith(("norm.", "head."))}
    classifier.load_state_dict(convert_official(body | head, classifier))
    back = Pyramid(name, **NETWORKS[name])
    back.load_pretrained(classifier.state_dict())
    for key, tensor in pyramid.net.state_dict().items():
        assert torch.equal(back.net.state_dict()[key], tensor), key


def test_the_verb_writes_what_mmengine_loads_and_safetensors(known, tmp_path, capsys):
    run = known.examples["voc"]
    pyramid = build_pyramid(known.resolve(run, "smoke"))
    path = tmp_path / "weights.safetensors"
    body = {f"pyramid.{name}": tensor.clone() for name, tensor in pyramid.state_dict().items()}
    save_file(body | {"roi.x": torch.ones(1)}, path)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    arguments = ["export", run, "--profile", "smoke", "--weights", str(path), "--out"]
    for out in ("backbone.pth", "backbone.safetensors"):
        assert main([*arguments, str(tmp_path / out)]) == 0
    checkpoint = torch.load(tmp_path / "backbone.pth", weights_only=True)["state_dict"]
    tensors = load_file(tmp_path / "backbone.safetensors")
    assert checkpoint.keys() == tensors.keys() == to_openmmlab(pyramid).keys()
    assert torch.equal(checkpoint["backbone.stages.0.0.pwconv1.weight"], pyramid.net.stages[0].blocks[0].pwconv1.weight)
    assert main([*arguments, str(tmp_path / "backbone.onnx")]) == 1
    assert "export writes .pth or .safetensors, got" in capsys.readouterr().err
    assert main(["export", known.examples["ade20k"], *arguments[2:], str(tmp_path / "x.pth")]) == 1
    assert "needs to hold a fine-tune of this row's network" in capsys.readouterr().err
