"""Published checkpoints through the verbs that the rules call: files in the official form, a folder in ImageNet's."""

import argparse
import hashlib
import json
import logging
import pickle
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToDtype

import swconv.models  # noqa: F401
from swconv.__main__ import main
from swconv.weights import fetch, to_official

SMALL = {"depths": [1, 1, 1, 1], "dims": [6, 8, 10, 12], "layer_scale_init": 1.0}
MODELS = {"slak": ("slak_tiny", SMALL), "sw": ("sw_tiny", SMALL), "uni": ("unireplknet_tiny", SMALL)}
PROFILE = """
from: mini
reports: artifacts/photos/reports
dataset: {name: photos, root: photos, in_chans: 3, num_classes: 3, cache: false, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4]}
"""
SIDE = 64                                                             # px


def official(name: str, **changes) -> dict[str, torch.Tensor]:
    """A network's weights in the released code's form, statistics drawn, 40 % of the pointwise weights zero."""
    model, arguments = MODELS[name]
    torch.manual_seed(0)
    network = timm.create_model(model, **{"num_classes": 3, **arguments, **changes})
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if ".pwconv" in key and weight.dim() == 2:
                weight.mul_(torch.rand_like(weight) > 0.4)
    torch.nn.init.normal_(network.head.weight, std=1.0)
    return to_official(network)


def publish(path: Path, state: dict[str, torch.Tensor]) -> None:
    """As the released training scripts save."""
    small = "3" if any(".LoRAs." in key for key in state) else "5"
    args = argparse.Namespace(model="SLaK_tiny", kernel_size=["51", "49", "47", "13", small], lr=4e-3)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 299, "scaler": {}, "args": args}, path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures of three kinds, wider than high."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for split, count in (("train", 1), ("val", 8)):
        for label in range(3):
            folder = root / split / f"n0{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                colour = draw.randint(0, 255, (6, 8, 3)).astype(np.uint8)
                Image.fromarray(colour).resize((120, 90), Image.BICUBIC).save(folder / f"{index}.JPEG")
    return root


@pytest.fixture
def project(tmp_path, monkeypatch, photos) -> Path:
    shutil.copytree("params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params/profiles/photos.yaml").write_text(PROFILE)
    (tmp_path / "photos").symlink_to(photos)
    for name in MODELS:
        publish(tmp_path / f"data/weights/{name}.pth", official(name))
    register({})
    return tmp_path


def register(changes: dict, name: str = "slak") -> None:
    """Small networks in the registry, and what differs in one row."""
    rows = {each: {"model": model, "args": arguments, "path": f"data/weights/{each}.pth", "source": f"somebody/{each}",
                   "input": SIDE} for each, (model, arguments) in MODELS.items()}
    rows[name] |= changes
    Path("params/weights.yaml").write_text(yaml.safe_dump(rows))


def convert(name: str = "slak") -> int:
    return main(["convert-released", name, "--profile", "photos", "--out", name])


def measure(name: str) -> dict[str, float]:
    assert main(["data", "--profile", "photos", "--out", "data/photos"]) == 0
    assert convert(name) == 0
    files = ["--data", "data/photos", "--weights", f"{name}/weights.safetensors", "--out", f"measured/{name}"]
    assert main(["evaluate-released", name, "--profile", "photos", *files]) == 0
    return numbers(f"measured/{name}/metrics.json")


def numbers(path: str) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads(Path(path).read_text()).items()}


def refused(capsys, name: str = "slak") -> str:
    capsys.readouterr()
    assert convert(name) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path(name).exists()
    return line


def by_hand(name: str) -> float:
    """Top-1 of the published network on the pictures, with torchvision's transforms."""
    model, arguments = MODELS[name]
    network = timm.create_model(model, num_classes=3, **arguments)
    names = dict(zip(to_official(network), network.state_dict(), strict=True))
    state = {names[key]: tensor.reshape(network.state_dict()[names[key]].shape) for key, tensor in official(name).items()}
    network.load_state_dict(state)
    see = Compose([Resize(int(SIDE / 0.875), InterpolationMode.BICUBIC), CenterCrop(SIDE), PILToTensor(),
                   ToDtype(torch.float32, scale=True), Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])])
    files = sorted(Path("photos/val").rglob("*.JPEG"))
    images = torch.stack([see(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        right = [int(file.parent.name[-1]) for file in files] == network.eval()(images).argmax(1).numpy()
    return 100 * right.mean()


@pytest.mark.parametrize("name", MODELS)
def test_published_weights_have_their_accuracy_merged_and_laid_out_too(project, name):
    found = measure(name)
    assert found["images"] == 24
    assert found["top1"] == pytest.approx(by_hand(name))
    assert found["top1_merged"] == found["top1"]
    assert ("top1_laid_out" in found) == (name == "slak")
    assert found.get("top1_laid_out", found["top1"]) == found["top1"]


def test_the_conversion_tells_how_far_the_forms_are_apart(project):
    assert convert("slak") == convert("uni") == 0
    strips, dilated = numbers("slak/metrics.json"), numbers("uni/metrics.json")
    for told, form in ((strips, "merged"), (dilated, "merged")):
        assert 0 < told[f"{form}_logit_difference_float64"] < 1e-12 < told[f"{form}_logit_difference_float32"] < 1e-4
    assert strips["laid_out_logit_difference_float64"] < 1e-12
    assert strips["laid_out_logit_difference_float32"] < 1e-4
    assert "laid_out_logit_difference_float64" not in dilated


def test_the_density_is_recovered_from_the_zeros(project):
    assert convert("slak") == 0
    weights = [tensor for tensor in official("slak").values() if tensor.dim() in (2, 4)]
    alive, size = sum(int((tensor != 0).sum()) for tensor in weights), sum(tensor.numel() for tensor in weights)
    assert numbers("slak/metrics.json")["density"] == alive / size < 1
    assert numbers("slak/metrics.json")["masked_tensors"] == 8                     # two pointwise layers in each of four blocks


def test_a_hash_that_is_not_known_yet_is_told_and_recorded(project, caplog):
    digest = hashlib.sha256(Path("data/weights/slak.pth").read_bytes()).hexdigest()
    with caplog.at_level(logging.INFO):
        measure("slak")
    assert f"data/weights/slak.pth has sha256 {digest}. params/weights.yaml gives none for slak: write it there" in caplog.text
    with safe_open("slak/weights.safetensors", "pt") as file:
        assert file.metadata()["source_sha256"] == digest
    record = json.loads(Path("measured/slak/run.json").read_text())
    assert (record["source_sha256"], record["source"], record["run"]) == (digest, "somebody/slak", "slak")
    register({"sha256": digest})
    caplog.clear()
    assert convert() == 0
    assert "write it there" not in caplog.text


def test_the_average_is_taken_where_the_row_asks_for_it(project, capsys):
    path = project / "data/weights/slak.pth"
    register({"part": "model_ema"})
    assert "no weights under 'model_ema', got model, " in refused(capsys)
    other = {key: tensor * 2 if key == "head.bias" else tensor for key, tensor in official("slak").items()}
    other["head.bias"] = torch.tensor([1.0, 2.0, 3.0])
    torch.save({"model": official("slak"), "model_ema": other}, path)
    assert convert() == 0
    with safe_open("slak/weights.safetensors", "pt") as file:
        assert file.get_tensor("head.bias").tolist() == [1, 2, 3]


def test_an_image_at_384_px_is_squashed_where_the_row_says_so(project, photos):
    from swconv import params
    from swconv.training.data import ValLoader

    assert main(["data", "--profile", "photos", "--out", "data/photos"]) == 0
    seen = {}
    for mode in ("center", "squash"):
        register({"crop_pct": 1.0, "crop_mode": mode})
        images, _ = next(iter(ValLoader(params.load().released("slak", "photos")["dataset"], Path("data/photos"), 1)))
        seen[mode] = images[0].permute(1, 2, 0).numpy().astype(int)
    image = Image.open(photos / "val/n00/0.JPEG")
    squashed = np.asarray(image.resize((SIDE, SIDE), Image.BICUBIC)).astype(int)
    assert abs(seen["squash"] - squashed).max() == 0
    assert abs(seen["center"] - squashed).max() > 10


class Trap:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_a_number(path: Path) -> None:
    state = official("slak")
    state["head.bias"][1] = float("nan")
    publish(path, state)


BROKEN = [
    (cut_short, "is damaged or cut short"),
    (lambda path: path.write_bytes(pickle.dumps({"model": Trap()}, protocol=2)), "a pickle can run code"),
    (lambda path: torch.save({"model": official("slak"), "args": Trap()}, path), "a pickle can run code"),
    (not_a_number, "not all finite numbers: head.bias"),
    (lambda path: publish(path, official("slak", num_classes=5)), "classify into 5 classes and the model into 3"),
    (lambda path: publish(path, official("slak", kernel_sizes=(31, 29, 27, 13))), "kernels of 31 x 5 px"),
    (lambda path: publish(path, official("sw")), "the weights do not fit the model"),
    (lambda path: publish(path, official("slak", depths=[1, 1, 2, 1])), "the weights do not fit the model"),
    (lambda path: path.write_bytes(b""), "is damaged or cut short"),
]


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN)
def test_what_is_no_such_checkpoint_is_refused_in_a_sentence_that_names_the_row(project, capsys, spoil, sentence):
    spoil(project / "data/weights/slak.pth")
    line = refused(capsys)
    assert line.startswith("swconv convert-released: weights slak of params/weights.yaml (data/weights/slak.pth, from some")
    assert sentence in line
    assert "ran code" not in line


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"sha256": "0" * 64}, "and 000000000000... was expected"),
    ({"path": "data/weights/none.pth"}, "weights slak are needed at data/weights/none.pth, and there is no file. Get them from "
                                        "somebody/slak and put them there"),
    ({"args": SMALL | {"kernel_size": [51, 49, 47, 13]}}, "unexpected keyword argument 'kernel_size'"),
    ({"model": "slak_tinny"}, "unknown network slak_tinny; the nearest known name is slak_tiny"),
    ({"pth": "x"}, "unknown key pth; the nearest known name is path"),
    ({"sha256": "abc"}, "string should match pattern"),
    ({"url": "somewhere"}, "string should match pattern"),
    ({"fills": [{"table": "sw_table3", "off": {}}]}, "the nearest known name is of"),
    ({"run": "sw99"}, "weights slak: unknown run sw99; the nearest known name is"),
])
def test_a_wrong_row_is_told_in_a_sentence(project, capsys, changes, sentence):
    register(changes)
    assert sentence in refused(capsys)


def test_weights_that_nobody_registered_are_told_with_the_nearest(project, capsys):
    assert "unknown weights slack; the nearest known name is slak" in refused(capsys, "slack")


def test_a_finished_conversion_that_changed_is_not_measured(project, capsys):
    measure("slak")
    with open("slak/weights.safetensors", "ab") as file:
        file.write(b" ")
    files = ["--data", "data/photos", "--weights", "slak/weights.safetensors", "--out", "again"]
    assert main(["evaluate-released", "slak", "--profile", "photos", *files]) == 1
    assert "is damaged: its sha256" in capsys.readouterr().err


class Source(SimpleHTTPRequestHandler):
    """Files of a folder; `short.pth` breaks off, as a lost connection does."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path != "/short.pth":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    """Somebody's server."""
    (tmp_path / "site").mkdir()
    publish(tmp_path / "site/slak.pth", official("slak"))
    (tmp_path / "site/page.html").write_text("<html>Confirm the download</html>")
    Source.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Source, directory=str(tmp_path / "site"))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_downloaded_only_where_a_row_says_from_where(project, site, capsys):
    path = project / "data/weights/slak.pth"
    path.unlink()
    assert main(["fetch", "slak"]) == 1
    assert "weights slak have no url in params/weights.yaml" in capsys.readouterr().err
    digest = hashlib.sha256((project / "site/slak.pth").read_bytes()).hexdigest()
    register({"url": f"{site}/slak.pth", "sha256": digest})
    assert main(["fetch", "slak"]) == 0
    assert convert() == 0
    assert main(["fetch", "slak"]) == 0                                               # is there, and right
    assert Source.asked == ["/slak.pth"]


@pytest.mark.parametrize(("file", "sentence"), [
    ("short.pth", "announced 1000 bytes, got 10"), ("slak.pth", "and 000000000000... was expected"),
    ("page.html", "is a web page and no file"), ("none.pth", "could not be downloaded"),
])
def test_a_download_that_goes_wrong_leaves_what_was_there(tmp_path, site, file, sentence):
    path = tmp_path / "weights/slak.pth"
    path.parent.mkdir()
    path.write_bytes(b"the old one")
    with pytest.raises(ValueError, match=sentence):
        fetch(f"{site}/{file}", path, "0" * 64)
    assert [each.name for each in path.parent.iterdir()] == ["slak.pth"]
    assert path.read_bytes() == b"the old one"


def test_a_server_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="could not be downloaded to .*Check the address"):
        fetch("http://127.0.0.1:9/slak.pth", tmp_path / "slak.pth")
    assert list(tmp_path.iterdir()) == []
