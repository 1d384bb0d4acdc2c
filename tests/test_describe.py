"""An adapter says which model it is for, and is loaded and used from its folder alone."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from huggingface_hub import HfApi, RepoUrl
from PIL import Image
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from abm_vision import add_lora, create_backbone, initialize_lora, load_adapter, push_to_hub, save_adapter
from abm_vision.images.predict import predict

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of pretrained weights."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(build_vit(num_classes=3, img_size=160).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Folder, and the model that was saved."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    torch.manual_seed(1)
    model = randomise(add_lora(create_backbone("test_vit", 5, 32, str(base))[0], 2)).eval()
    save_adapter(model, folder, classes=NAMES, init="kaiming", card="Trained on 20 drawings.")
    return folder, model


def read(folder, name="abm.json"):
    return json.loads((folder / name).read_text())


def test_it_says_everything(saved, base):
    found = read(saved[0])
    expected = {
        "host": "timm vision transformer",
        "model": "test_vit.r160_in1k",
        "model_args": {"img_size": 32},
        "hub": "timm/test_vit.r160_in1k",
        "license": "apache-2.0",
        "num_classes": 5,
        "classes": NAMES,
        "init": "kaiming",
    }
    assert {key: found[key] for key in expected} == expected
    shape = {"image_size": 32, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert found["preprocessing"] == {**shape, "crop_pct": 0.95, "crop_mode": "center"}
    assert found["weights"]["location"] == str(base) and len(found["weights"]["sha256"]) == 64
    assert {"torch", "peft", "timm"} <= set(found["versions"])
    assert read(saved[0], "adapter_config.json")["base_model_name_or_path"] == "timm/test_vit.r160_in1k"


def test_its_card_names_what_a_reader_needs(saved):
    card = (saved[0] / "README.md").read_text()
    for words in ("apache-2.0", "`ant`, `bee`, `cat`, `dog`, `eel`", "Trained on 20 drawings.", "32 px, ", "95.0%"):
        assert words in card
    assert 'base_model: "timm/test_vit.r160_in1k"' in card


CARD = """
import re, sys, torch
text, base, folder, out = open(sys.argv[1]).read(), *sys.argv[2:]
(code,) = re.findall(r"```python\\n(.*?)```", text, re.DOTALL)
create, load = code.split("\\nmodel = Peft")
exec(create)
state = {k: v for k, v in torch.load(base, weights_only=True).items() if "head" not in k}
del state["pos_embed"]
model.load_state_dict(state, strict=False)
model.pos_embed.data = torch.load(out, weights_only=True)["pos_embed"]
exec("model = Peft" + load.replace("path/to/this/folder", folder))
torch.save({"logits": model(torch.load(out, weights_only=True)["x"]).detach()}, out)
assert not [m for m in sys.modules if m.startswith("abm_vision")]
"""


@pytest.mark.slow
def test_the_lines_of_its_card_load_it_without_this_package(saved, base, tmp_path):
    folder, model = saved
    torch.save({"x": images(), "pos_embed": model.get_base_model().pos_embed.data}, tmp_path / "x.pt")
    words = [folder / "README.md", base, folder, tmp_path / "x.pt"]
    done = subprocess.run([sys.executable, "-c", CARD, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        torch.load(tmp_path / "x.pt", weights_only=True)["logits"], model(images()), rtol=1e-4, atol=1e-5
    )


def test_it_is_loaded_without_a_model(saved):
    model = load_adapter(saved[0])
    torch.testing.assert_close(model(images()), saved[1](images()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_adapter(saved[0], is_trainable=True).training


def test_loaded_and_saved_again_it_says_the_same(saved, tmp_path):
    save_adapter(load_adapter(saved[0]), tmp_path, classes=NAMES, init="kaiming")
    assert read(tmp_path) == read(saved[0])


def test_predict_takes_what_the_library_saved(saved, tmp_path):
    """By timm's own transform: the same image but for the rounding of a resized byte."""
    import timm.data

    Image.effect_noise((48, 40), 80).convert("RGB").save(tmp_path / "photo.png")
    (row,) = predict(saved[0], [tmp_path / "photo.png"])
    recorded = timm.data.resolve_model_data_config(saved[1].get_base_model()) | {"input_size": (3, 32, 32)}
    pixels = timm.data.create_transform(**recorded)(Image.open(tmp_path / "photo.png"))[None]
    expected = saved[1](pixels).softmax(-1)[0]
    assert row["class"] == NAMES[int(expected.argmax())]
    assert row["probability"] == pytest.approx(expected.max().item(), abs=0.02)


def changed(folder, **entries):
    path = folder / "abm.json"
    path.write_text(json.dumps({**read(folder), **entries}))


UNBUILT = {
    "other weights": ({"weights": {"name": "x", "origin": "file", "location": "x.pth", "sha256": "a"}}, "x.pth"),
    "random weights": ({"weights": {"name": "x", "origin": "none", "location": "", "sha256": None}}, "nobody has"),
    "no name": ({"model": None}, "does not say which timm model"),
    "a text model": ({"host": "T5"}, "a T5, which is not built from its name: build it and pass it"),
    "an earlier version": ({"host": None}, "not described there: build it and pass it"),
    "too few names": ({"classes": ["ant"]}, "1 classes are named, the model has 5"),
    "no size": ({"preprocessing": {}}, "lacks preprocessing.image_size"),
}


@pytest.mark.parametrize("kind", UNBUILT)
def test_a_model_that_cannot_be_built(saved, tmp_path, kind):
    entries, message = UNBUILT[kind]
    shutil.copytree(saved[0], tmp_path / "adapter")
    changed(tmp_path / "adapter", **entries)
    with pytest.raises((ValueError, OSError), match=message):
        load_adapter(tmp_path / "adapter")


def test_other_weights_are_refused(saved, tmp_path):
    other = build_vit(num_classes=3, img_size=160).requires_grad_(False)
    other.norm.bias += 1
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"was trained on .*base\.pth \(sha256 .*found was .*other\.pth"):
        load_adapter(saved[0], weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="the model is given, which has weights: leave one of them out"):
        load_adapter(build_vit(), saved[0], weights="auto")
    with pytest.raises(ValueError, match="a model is given without the adapter's folder"):
        load_adapter(build_vit())


def test_weights_that_nobody_recorded(saved, base, tmp_path, monkeypatch):
    """As of a model that timm alone has made: timm's pretrained ones are taken, and that is said."""
    shutil.copytree(saved[0], tmp_path / "adapter")
    changed(tmp_path / "adapter", weights=None)
    taken = []

    def create(*arguments):
        taken.append(arguments[3])
        return create_backbone(*arguments[:3], str(base))

    monkeypatch.setattr("abm_vision.weights.create_backbone", create)
    with pytest.warns(UserWarning, match="does not say which weights it was trained on.*pass them as weights"):
        load_adapter(tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", weights="given")  # no warning
    assert taken == ["auto", "given"]


GIVEN = {
    "a name too few": ({"classes": NAMES[1:]}, "give the name of each of the model's 5 classes"),
    "no names": ({"classes": [1, 2, 3, 4, 5]}, "give the name of each"),
    "no dictionary": ({"preprocessing": 32}, "must be a dictionary: image_size, interpolation, mean, std, crop_pct"),
    "half of it": ({"preprocessing": {"image_size": 32}}, "it lacks preprocessing|it lacks interpolation, mean, std"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_given_must_fit(tmp_path, kind):
    given, message = GIVEN[kind]
    with pytest.raises(ValueError, match=message):
        save_adapter(add_lora(build_vit(), 2), tmp_path / "adapter", **given)
    assert not (tmp_path / "adapter").exists()


def test_preprocessing_as_given(tmp_path):
    shape = {"image_size": 32, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}
    save_adapter(add_lora(build_vit(), 2), tmp_path, preprocessing=shape)
    assert read(tmp_path)["preprocessing"] == {
        **{**shape, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
        **{"crop_pct": 1.0, "crop_mode": "squash"},
    }


def test_a_model_in_transformers_wrapper(tmp_path):
    """Its names are others than timm's, so no timm model is built for it."""
    made = TimmWrapperConfig(architecture="test_vit", num_labels=5, model_args={"img_size": 32})
    model = add_lora(TimmWrapperForImageClassification(made), 2)
    save_adapter(model, tmp_path, classes=NAMES)
    found = read(tmp_path)
    assert found["num_classes"] == 5 and found["preprocessing"]["image_size"] == 32 and "model" not in found
    assert "`ant`, `bee`, `cat`, `dog`, `eel`" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="does not say which timm model.*build the model and pass it"):
        load_adapter(tmp_path)


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = add_lora(build_vit(), 2)
    save_adapter(model, tmp_path, card="First.")
    save_adapter(model, tmp_path, card="Second.")
    assert "Second." in (tmp_path / "README.md").read_text() and "First." not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My own words\n")
    save_adapter(model, tmp_path)
    assert "My own words" in (tmp_path / "README.md").read_text()


def test_push_to_hub_uploads_all_that_is_saved(saved, tmp_path, monkeypatch):
    """Into a folder that stands for the hub."""
    hub, asked = tmp_path / "hub", []

    def create(self, repo_id, **options):
        asked.append((repo_id, options))
        return RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload(self, *, repo_id, folder_path, commit_message):
        return shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    place = push_to_hub(saved[1], "name", private=True, classes=NAMES, init="kaiming", card="Trained on 20 drawings.")
    assert asked == [("name", {"private": True, "exist_ok": True})] and place == hub / "me" / "name"
    assert {p.name: p.read_bytes() for p in place.iterdir()} == {p.name: p.read_bytes() for p in saved[0].iterdir()}
    torch.testing.assert_close(load_adapter(place)(images()), saved[1](images()))


def made(**arguments):
    return timm.create_model("test_vit", num_classes=5, img_size=32, **arguments)


def changed_to(**modules):
    model = made()
    for name, module in modules.items():
        model.set_submodule(name.replace("__", "."), module)
    return model


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x / x.norm(dim=-1, keepdim=True))


def longer():
    model = made()
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    return model


def loaded_anew(base, change):
    model, _ = create_backbone("test_vit", 5, 32, str(base))
    change(model)
    return model


@torch.no_grad()
def half_as_large(model):
    model.blocks[1].mlp.fc1.weight.mul_(0.5)


OTHERWISE = {
    "pooling": (lambda base: made(global_pool="avg"), r"has global_pool 'avg', and 'token' in timm's test_vit"),
    "activation": (lambda base: made(act_layer="relu"), r"blocks\.0\.mlp\.act is a .*ReLU, and a .*GELU"),
    "channels": (lambda base: made(in_chans=1), r"has (in_chans|in_channels|weight) .*in timm's test_vit"),
    "norms of q and k": (
        lambda base: made(qk_norm=True),
        r"q_norm is a .*LayerNorm, and a .*Identity",
    ),
    "torch's norm": (lambda base: made(norm_layer=nn.LayerNorm), r"is a torch\..*LayerNorm, and a timm\..*LayerNorm"),
    "a head": (lambda base: changed_to(head=Cosine(64, 5)), r"head is a .*Cosine, and a torch.*Linear"),
    "a norm": (lambda base: changed_to(fc_norm=nn.LayerNorm(64)), r"has no fc_norm|fc_norm is a .*LayerNorm"),
    "a block more": (lambda base: longer(), r"has no blocks\.\d"),
    "a tag": (lambda base: made(pretrained_cfg_overlay={"tag": "mine"}), r"tag .mine."),
    "other weights": (lambda base: loaded_anew(base, half_as_large), "base weights are no longer those"),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_a_model_that_its_name_does_not_give_is_not_built_from_it(kind, base, tmp_path):
    """timm does not record what else a model was made with: another one would be built without a word."""
    make, difference = OTHERWISE[kind]
    model = add_lora(make(base), 2)
    with pytest.warns(UserWarning, match=f"will not be able to build the model: .*({difference})"):
        save_adapter(model, tmp_path)
    assert read(tmp_path)["model"] is None and "create_model" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="does not say which timm model"):
        load_adapter(tmp_path)


def test_a_model_as_its_name_gives_it_is_not_warned_of(tmp_path, recwarn):
    model = made(drop_rate=0.1, drop_path_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1)
    model.set_grad_checkpointing()
    model = add_lora(model, 2, targets=["attn.qkv", "fc1"])
    model.compile(backend="eager")
    save_adapter(model, tmp_path)
    assert not recwarn and read(tmp_path)["model_args"] == {"img_size": 32}


def test_features_alone_are_saved(tmp_path):
    model = add_lora(timm.create_model("test_vit", img_size=32, features_only=True), 2)
    save_adapter(model, tmp_path)
    again = load_adapter(timm.create_model("test_vit", img_size=32, features_only=True), tmp_path)
    assert again.peft_config["default"].r == 2


def test_trained_parameters_that_a_file_does_not_hold_are_named(tmp_path, recwarn):
    model = add_lora(build_vit(), 2)
    save_adapter(model, tmp_path)
    assert not recwarn
    for name, parameter in model.named_parameters():
        if ".norm1." in name:
            parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"does not hold \d+ trained parameters beside it .*norm1\.weight and others"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["lora_ga", "pissa", "kaiming"])
def test_base_weights_as_they_were_loaded_are_not_warned_of(name, base, tmp_path, recwarn):
    """Also where an initialisation has taken something out of them, and after merging and unmerging."""
    model = add_lora(create_backbone("test_vit", 5, 32, str(base))[0], 2)
    initialize_lora(model, name, [(images(), torch.arange(4) % 5)])
    model.merge_adapter()
    model.unmerge_adapter()
    save_adapter(model, tmp_path / "a")
    save_adapter(model.to(torch.bfloat16), tmp_path / "b")
    assert not [str(w.message) for w in recwarn if "will not be able" in str(w.message)]
    load_adapter(tmp_path / "a")


def test_the_size_is_that_of_the_model_now(base, tmp_path):
    model, _ = create_backbone("test_vit", 5, 32, str(base))
    model.set_input_size(img_size=48)
    with pytest.warns(UserWarning, match="base weights are no longer those"):  # position embeddings, resampled again
        save_adapter(add_lora(model, 2), tmp_path)
    assert read(tmp_path)["preprocessing"]["image_size"] == 48


@pytest.mark.parametrize("kind", ["weight norm", "pruned", "head"])
def test_parametrised_factors_cannot_be_saved(kind, tmp_path):
    model = add_lora(build_vit(), 2)
    layer = model.get_base_model().blocks[0].mlp.fc1
    if kind == "pruned":
        prune.l1_unstructured(layer.lora_A["default"], "weight", 0.5)
    else:
        head = model.get_base_model().head.modules_to_save["default"]
        weight_norm(head if kind == "head" else layer.lora_B["default"])
    with pytest.raises(ValueError, match="parametrised or pruned tensor, which a loader would not find"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
