"""Every transformer of timm is supported whole or refused with a message."""

import json
import re

import families
import pytest
import timm
import torch
from conftest import images

from abm_vision import VIT, ABMConfig, add_lora, check_adapters, initialize_lora_abm_weights

ARCHITECTURES = families.architectures()
MEASURED = json.loads(families.RESULT.read_text())["rows"]
REFUSED = {name for row in MEASURED for name in row["refused"]}
SIZE = re.compile(
    r"_(patch\d+|window\d+|[a-z]?\d{2,}[a-z]?|x*[sml]|b|nano|x*tiny|x*small|medium|base|x*large|huge|giant)(?=_|$)"
)
# The smallest of each family is run for real, at the size that it is made for.
RUN = {
    "vision_transformer": "vit_tiny_patch16_224",
    "deit": "deit3_small_patch16_224",
    "beit": "beit_base_patch16_224",
    "eva": "eva02_tiny_patch14_224",
    "cait": "cait_xxs24_224",
    "crossvit": "crossvit_tiny_240",
    "hiera": "hiera_tiny_224",
    "levit": "levit_128s",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nextvit": "nextvit_small",
    "pvt_v2": "pvt_v2_b0",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_cr_tiny_ns_224",
    "twins": "twins_pcpvt_small",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "volo": "volo_d1_224",
    "xcit": "xcit_nano_12_p16_224",
}


def is_supported_whole(name):
    """False if it is refused, which no plain ViT may be."""
    model = families.build(name)
    targets, stacks = VIT.find_targets(model), VIT.find_boundaries(model)
    if all(targets.values()) and any(stacks.values()):
        assert families.uncovered(model) == [], name
        return True
    assert "no blocks of attention and MLP that this package can adapt" in families.refusal(model), name
    return False


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_all_are_supported_whole_or_refused_as_measured(family):
    """Of a family that is no plain ViT one of each size: `benchmarks/families.py` has built them all."""
    names = ARCHITECTURES[family]
    if family not in families.PLAIN:
        names = list({SIZE.sub("", name): name for name in names}.values())
    assert {name for name in names if not is_supported_whole(name)} == REFUSED & set(names)


def test_plain_vits_and_nine_in_ten_of_all_are_supported():
    counts = {row["family"]: (row["supported"], row["models"]) for row in MEASURED}
    assert all(counts[family][0] == counts[family][1] for family in families.PLAIN)
    supported, models = map(sum, zip(*counts.values(), strict=True))
    assert supported >= 0.9 * models


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if kind in families.PLAIN else pytest.mark.slow) for kind, name in RUN.items()],
)
def test_adapters_get_gradients_and_boundaries_fire(name):
    torch.manual_seed(0)
    shallow = {"depth": 3} if "beit_" in name or "deit3_" in name else {}  # of twelve blocks alike
    model = timm.create_model(name, num_classes=3, **shallow)
    with torch.no_grad():
        for parameter in model.parameters():  # some start the norms of their residual branches at zero
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.ndim == 1))
    model = add_lora(model, rank=2)
    side = model.get_base_model().pretrained_cfg["input_size"][-1]
    check_adapters(model, images(2, side))
    report = initialize_lora_abm_weights(model, [images(1, side)], ABMConfig(steps=1), show_progress_bar=False)
    assert report.before.match == 1 and len(report.layers) == sum(map(len, VIT.find_boundaries(model).values()))
