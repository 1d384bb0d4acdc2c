"""What loaders yield: every verb takes it in the same way, moves it, and says the same of what a model cannot take."""

import collections
import dataclasses

import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from torch.utils.data import DataLoader, TensorDataset

from abm_vision import (
    ABMConfig,
    add_lora,
    check_adapters,
    information_loss,
    initialize_lora,
    initialize_lora_abm_weights,
    initialize_lora_aligned_weights,
)
from abm_vision.abm import batches
from abm_vision.initializers import InitConfig
from abm_vision.vit import VIT

X, Y = images(8), torch.arange(8) % 5
FAST = ABMConfig(steps=2, batch_size=4, samples=8)
QUIET = {"config": InitConfig(samples=8), "show_progress_bar": False}


def adapted(**options):
    torch.manual_seed(1)
    return add_lora(build_vit(embed_dim=32, depth=2, num_heads=2, **options), rank=4).eval()


VERBS = {
    "abm": lambda model, loader: initialize_lora_abm_weights(model, loader, FAST, show_progress_bar=False),
    "aligned": initialize_lora_aligned_weights,
    "information_loss": lambda model, loader: information_loss(model, loader, VIT.loss_fn),
    "eva": lambda model, loader: initialize_lora(model, "eva", loader, **QUIET),
    "corda": lambda model, loader: initialize_lora(model, "corda", loader, **QUIET),
    "lora_ga": lambda model, loader: initialize_lora(model, "lora_ga", loader, **QUIET),
}
WITH_NAN = X.clone()
WITH_NAN[2, 0, 3, 3] = float("nan")
WITH_INFINITY = X.clone()
WITH_INFINITY[2, 0, 3, 3] = float("inf")
LOADERS = {
    "wrong size": ([(images(4, side=50), Y[:4])], r"cannot take a batch \(tuple with float32 \(., 3, 50, 50\)"),
    "swapped tuple": ([(Y, X)], r"cannot take a batch \(tuple with int64 \(.,\), float32"),
    "no batch dimension": ([(X[0], Y[0])], r"cannot take a batch \(tuple with float32 \(., 32, 32\)"),
    "one channel": ([(X[:, :1], Y)], r"cannot take a batch \(tuple with float32 \(., 1, 32, 32\)"),
    "foreign mapping": ([{"pictures": X, "labels": Y}], "cannot take a batch .*no images among the batch"),
    "dataset": (TensorDataset(X, Y), "TensorDataset is a dataset.*DataLoader"),
    "empty batch": ([(X[:0], Y[:0])], "batch 1 of the loader .* holds no sample"),
    "empty loader": ([], "the dataloader is empty"),
    "strings": (["a.png", "b.png"], "of type str holds no tensor"),
    "NaN": ([(X, Y), (WITH_NAN, Y)], "batch 2 of the loader .* holds NaN or infinity"),
    "infinity": ([(WITH_INFINITY, Y)], "batch 1 of the loader .* holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_is_wrong_with_a_loader(verb, kind):
    loader, message = LOADERS[kind]
    if kind in ("NaN",) and verb != "information_loss":  # the others stop at 8 samples
        loader = loader[1:]
        message = message.replace("2", "1")
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        VERBS[verb](model, loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["wrong size", "no batch dimension", "one channel", "empty batch", "foreign mapping"])
def test_check_adapters_too(kind):
    (batch,), _ = LOADERS[kind]
    with pytest.raises(ValueError, match="the model cannot take a batch|holds no sample"):
        check_adapters(adapted(), batch)


@pytest.mark.parametrize("verb", VERBS)
def test_weights_or_activations_that_are_not_finite(verb):
    model = adapted()
    with torch.no_grad():
        model.get_base_model().blocks[1].norm1.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinite|the loss is nan"):
        VERBS[verb](model, [(X, Y)])


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "mica"])
def test_base_weights_that_are_not_finite(name):
    model = adapted()
    with torch.no_grad():
        model.get_base_model().blocks[1].mlp.fc1.get_base_layer().weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the base weight of blocks\.1\.mlp\.fc1 is NaN or infinite"):
        initialize_lora(model, name, [(X, Y)], **QUIET)


@pytest.mark.parametrize("verb", VERBS)
def test_out_of_memory_is_no_fault_of_the_batch(verb):
    model = adapted()
    model.get_base_model().blocks[1].register_forward_pre_hook(raiser(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        VERBS[verb](model, [(X, Y)])


def raiser(error):
    def hook(*_):
        raise error

    return hook


class Counted(torch.Tensor):
    """A tensor that counts how often it is moved."""

    moves = 0

    def to(self, *args, **options):
        Counted.moves += 1
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [tuple, dict, collections.UserDict])
def test_every_verb_moves_its_batches(verb, kind):
    """Also of mappings that are no dictionaries, as transformers' tokenisers and collators give them."""
    Counted.moves = 0
    x = X.clone().as_subclass(Counted)
    batch = (x, Y) if kind is tuple else kind(image=x, label=Y)
    VERBS[verb](adapted(), [batch])
    assert Counted.moves == 1


def test_loaders_of_torch_and_batches_of_one():
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    assert len(batches.collect(loader, torch.device("cpu"))) == 3
    assert len(batches.collect(loader, torch.device("cpu"), samples=4)) == 2
    ones = list(batches.one_by_one({"image": X, "name": "x", "side": torch.tensor(32)}))
    assert len(ones) == 8 and ones[3]["image"].equal(X[3:4]) and ones[3]["name"] == "x" and ones[3]["side"] == 32


def test_minus_infinity_is_what_attention_masks_hold():
    mask = torch.zeros(8, 1, 5, 5).fill_(float("-inf"))
    assert batches.collect([(X, mask)], torch.device("cpu"))


# Patches that are padding


def naflex(pad):
    """Two images of 4 and 2 patches of 16 px, with `pad` patches of padding more; class and register tokens before."""
    valid = torch.zeros(2, 4 + pad, dtype=torch.bool)
    valid[0, :4] = valid[1, :2] = True
    coordinates = torch.zeros(2, 4 + pad, 2, dtype=torch.long)
    coordinates[:, :4] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    generator = torch.Generator().manual_seed(3)
    patches = torch.cat([torch.randn(2, count, 16 * 16 * 3, generator=generator) for count in (4, pad)], 1)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: (batch, torch.tensor([0, 1]))])
def test_patches_of_padding_do_not_count(wrap):
    """Fourteen patches of padding more change neither the output nor any figure of the matching, nor EVA's ranks."""

    def model():
        torch.manual_seed(0)
        base = timm.create_model("naflexvit_base_patch16_gap", num_classes=5, embed_dim=32, depth=2, num_heads=2)
        return randomise(add_lora(base.eval(), rank=2), scale=0.0)

    outputs, reports, ranks = [], [], []
    for pad in (0, 14):
        batch = wrap(naflex(pad))
        outputs.append(VIT.forward_fn(model(), batch))
        reports.append(initialize_lora_abm_weights(model(), [batch], FAST, show_progress_bar=False))
        eva = model()
        initialize_lora(eva, "eva", [batch], **QUIET)
        ranks.append({n: p.shape for n, p in eva.named_parameters() if "lora_A" in n})
    torch.testing.assert_close(*outputs)
    assert reports[1].before.loss == pytest.approx(reports[0].before.loss, rel=1e-5)
    assert reports[1].after.loss == pytest.approx(reports[0].after.loss, rel=1e-3)
    assert ranks[0] == ranks[1]


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match=r"token mask \(8, 9\) does not fit values \(8, 5, 96\)"):
        initialize_lora_abm_weights(
            adapted(), [X], FAST, token_mask_fn=lambda batch, stack: torch.ones(8, 9).bool(), show_progress_bar=False
        )


@dataclasses.dataclass
class Record:
    """A batch that torch does not look into."""

    image: torch.Tensor


@pytest.mark.parametrize(
    "wrap, forward",
    [
        (lambda x, y: (collections.UserDict(image=x), y), lambda m, b: m(b[0]["image"])),
        (lambda x, y: [{"inner": collections.UserDict(image=x)}, y], lambda m, b: m(b[0]["inner"]["image"])),
        (lambda x, y: (x.numpy(), y), lambda m, b: m(torch.as_tensor(b[0]))),
    ],
)
def test_nested_batches_are_cut_as_a_whole(wrap, forward):
    """A step on one sample compares it with its own signs, whatever it is packed in."""
    plain = initialize_lora_abm_weights(adapted(), [(X, Y)], dataclasses.replace(FAST, batch_size=1))
    packed = initialize_lora_abm_weights(
        adapted(), [wrap(X, Y)], dataclasses.replace(FAST, batch_size=1), forward_fn=forward
    )
    assert packed.loss_per_step == plain.loss_per_step


def test_a_batch_that_cannot_be_cut_stays_whole():
    config = dataclasses.replace(FAST, batch_size=1)
    whole = initialize_lora_abm_weights(adapted(), [(X, Y)], dataclasses.replace(FAST, batch_size=8))
    found = initialize_lora_abm_weights(
        adapted(), [(Record(X), Y)], config, forward_fn=lambda m, b: m(b[0].image), show_progress_bar=False
    )
    assert found.loss_per_step == whole.loss_per_step
