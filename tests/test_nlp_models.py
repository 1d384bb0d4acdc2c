"""The records of T5 and LLaMA on tiny models of transformers, with random weights."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import randomise
from peft import LoraConfig, PeftModel, get_peft_model

import nlp_ext
from abm_vision import find_backbone, information_loss, load_adapter
from abm_vision.abm.adapter import adapted_layers
from abm_vision.initializers import INITIALIZERS, Needs
from nlp_ext import LLAMA, T5, ABMConfig, add_lora, answer_tokens, check_adapters, initialize_lora_abm_weights
from nlp_ext.ranks import _initialised

VOCABULARY, PAD = 64, 0
DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "SmolLM3", "Phi3")
LENGTHS, ANSWERS = (9, 4, 6), (5, 2, 3)  # tokens of three sentences; of their answers, or T5 targets
ONCE = ABMConfig(steps=1, margin=0.3)


def decoder(family="Llama", kind="ForCausalLM", **options):
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 3,
    }
    config = getattr(transformers, f"{family}Config")(**{**settings, **options})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{kind}")(config).eval()


def t5(family="T5", kind="ForConditionalGeneration", **options):
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "pad_token_id": PAD,
        "eos_token_id": 1,
        "decoder_start_token_id": PAD,
        "num_labels": 3,
    }
    config = getattr(transformers, f"{family}Config")(**{**settings, **options})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{kind}")(config).eval()


def padded(rows, filler):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)


def sentences(seed=0):
    """Unpadded: ids (tokens,) of a decoder-only batch and their labels, the prompt's ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    labels = [torch.cat([torch.full((len(i) - a,), -100), i[len(i) - a :]]) for i, a in zip(ids, ANSWERS, strict=True)]
    return ids, labels


def causal_batch(seed=0):
    ids, labels = sentences(seed)
    mask = padded([torch.ones(len(i), dtype=torch.int64) for i in ids], 0)
    return {"input_ids": padded(ids, PAD), "attention_mask": mask, "labels": padded(labels, -100)}


def seq2seq_batch(seed=0):
    batch = causal_batch(seed)
    targets = [i[-a:] for i, a in zip(sentences(seed)[0], ANSWERS, strict=True)]
    return {**batch, "labels": padded(targets, -100)}


def single(batch, k):
    """Sentence k alone, without padding."""
    length = int(batch["attention_mask"][k].sum())
    labels = batch["labels"][k]
    labels = labels[labels != -100] if len(labels) != batch["input_ids"].shape[1] else labels[:length]
    return {"input_ids": batch["input_ids"][k, :length][None], "labels": labels[None]}


def inputs_of(model, names, batch):
    """What plain hooks see going into the named modules, (tokens, hidden)."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    seen = {}
    hooks = [
        bare.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0][0].double()}))
        for n in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def hinge_by_loop(adapted, pretrained, names, batch, counted, margin):
    """Per boundary the mean over the counted tokens of every sentence, run alone. `counted` (k, name, z) picks them."""
    sums = dict.fromkeys(names, 0.0)
    elements = dict.fromkeys(names, 0)
    for k in range(len(batch["input_ids"])):
        alone = single(batch, k)
        z, reference = inputs_of(adapted, names, alone), inputs_of(pretrained, names, alone)
        for name in names:
            values, signs = counted(k, z[name]), counted(k, reference[name]).sign()
            sums[name] += (margin - signs * values).clamp_min(0).square().sum().item()
            elements[name] += values.numel()
    return [sums[name] / elements[name] for name in names]


# What is found


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["ForCausalLM", "ForSequenceClassification", "Model"])
def test_decoders(family, kind):
    model = decoder(family, kind)
    assert find_backbone(model) is LLAMA
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["score"])
    stock = get_peft_model(copy.deepcopy(model), config)
    expected = {n for n, m in stock.get_base_model().named_modules() if hasattr(m, "lora_A")}
    adapted = add_lora(model, 4, 4)
    names = {n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert names == {n for n in expected if "head" not in n} and len(names) == (8 if family == "Phi3" else 14)
    assert len(LLAMA.find_boundaries(adapted.get_base_model())["layers"]) == 2
    heads = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    assert bool(heads) == (kind == "ForSequenceClassification") and all("score" in n for n in heads)


@pytest.mark.parametrize(
    ("family", "activation"), [("T5", "relu"), ("T5", "gated-gelu"), ("MT5", "gated-gelu"), ("UMT5", "gated-gelu")]
)
def test_t5(family, activation):
    model = t5(family, feed_forward_proj=activation)
    assert find_backbone(model) is T5
    adapted = add_lora(model, 4, 4)
    names = [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")]
    inside = 2 if activation == "relu" else 3  # wi and wo, or wi_0, wi_1 and wo
    assert len(names) == 2 * (4 + inside) + 3 * (8 + inside) and not any("head" in n or "shared" in n for n in names)
    found = T5.find_boundaries(adapted.get_base_model())
    assert {stack: len(names) for stack, names in found.items()} == {"encoder": 2, "decoder": 3}
    check_adapters(adapted.eval(), seq2seq_batch())


def test_both_stacks_have_a_ramp_of_their_own():
    report = initialize_lora_abm_weights(add_lora(t5()), [seq2seq_batch()], ONCE, show_progress_bar=False)
    weights = {stack: [r.weight for r in report.layers if r.stack == stack] for stack in ("encoder", "decoder")}
    assert weights == {"encoder": [0.25, 1.0], "decoder": pytest.approx([1 / 9, 4 / 9, 1.0])}


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.BertModel(transformers.BertConfig(hidden_size=36, num_hidden_layers=1, vocab_size=9)),
        lambda: decoder("Mixtral", num_local_experts=2),
        lambda: torch.nn.Linear(3, 3),
    ],
)
def test_other_models_are_an_error(model):
    with pytest.raises(ValueError, match=r"no supported model \(those are: T5, LLaMA, timm vision trans"):
        add_lora(model())


# Masks


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@pytest.mark.parametrize("answers", [False, True])
def test_padding_never_counts_in_a_decoder(family, answers):
    pretrained = decoder(family)
    adapted = randomise(add_lora(copy.deepcopy(pretrained), 4, 4)).eval()
    batch = causal_batch()
    options = {"token_mask_fn": answer_tokens} if answers else {}
    names = LLAMA.find_boundaries(pretrained)["layers"]
    counted = (lambda k, z: z[-ANSWERS[k] :]) if answers else (lambda k, z: z)
    expected = hinge_by_loop(adapted, pretrained, names, batch, counted, 0.3)
    report = initialize_lora_abm_weights(adapted, [batch], ONCE, show_progress_bar=False, **options)
    assert [r.before.loss for r in report.layers] == pytest.approx(expected, rel=1e-5)
    assert report.before.match < 1


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_padding_never_counts_in_t5(activation):
    pretrained = t5(feed_forward_proj=activation)
    adapted = randomise(add_lora(copy.deepcopy(pretrained), 4, 4)).eval()
    batch = seq2seq_batch()
    names = [n for found in T5.find_boundaries(pretrained).values() for n in found]
    expected = hinge_by_loop(adapted, pretrained, names, batch, lambda k, z: z, 0.3)
    report = initialize_lora_abm_weights(adapted, [batch], ONCE, show_progress_bar=False)
    assert [r.name for r in report.layers] == names
    assert [r.before.loss for r in report.layers] == pytest.approx(expected, rel=1e-5)


def test_a_class_a_sentence():
    """T5 then runs its decoder on the encoder's tokens."""
    model = t5(kind="ForSequenceClassification")
    batch = causal_batch()
    batch = {**batch, "labels": torch.tensor([0, 1, 2])}
    batch["input_ids"][torch.arange(3), torch.tensor(LENGTHS) - 1] = 1  # the end of a sentence, which is classified
    names = [n for found in T5.find_boundaries(model).values() for n in found]
    expected = []
    for name in names:
        parts = [
            inputs_of(model, names, {"input_ids": batch["input_ids"][k, : LENGTHS[k]][None]})[name] for k in range(3)
        ]
        z = torch.cat(parts)
        expected.append((0.3 - z.abs()).clamp_min(0).square().mean().item())
    report = initialize_lora_abm_weights(add_lora(model), [batch], ONCE, show_progress_bar=False)
    assert [r.before.loss for r in report.layers] == pytest.approx(expected, rel=1e-5)
    assert any("classification_head" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_loss_is_the_model_s_own():
    for model, batch in ((decoder(), causal_batch()), (t5(), seq2seq_batch())):
        assert find_backbone(model).loss_fn(model, batch).item() == model(**batch).loss.item()


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            t5,
            {"labels": None},
            "T5's decoder needs labels or decoder_input_ids; the batch has attention_mask, in",
        ),
        (decoder, {"input_ids": torch.full((3, 9), 99)}, "the model cannot take a batch"),
    ],
)
def test_batches_that_cannot_be_run(model, change, message):
    batch = {**(seq2seq_batch() if model is t5 else causal_batch()), **change}
    batch = {k: v for k, v in batch.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        initialize_lora_abm_weights(add_lora(model()), [batch], ONCE, show_progress_bar=False)


def test_what_is_missing_in_a_batch_is_told():
    model, batch = add_lora(decoder()), causal_batch()
    with pytest.raises(ValueError, match="a batch of type tuple was given; a mapping with input_ids is needed"):
        initialize_lora_abm_weights(model, [(batch["input_ids"],)], ONCE, show_progress_bar=False)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="the batch has attention_mask, input_ids and no labels: let the collator"):
        nlp_ext.initialize_lora_aligned_weights(model, [batch])
    with pytest.raises(ValueError, match="and no labels, so no answers are known"):
        answer_tokens(batch)
    with pytest.raises(ValueError, match="its answers were cut off, or are empty"):
        answer_tokens({**batch, "labels": torch.full_like(labels, -100)})


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_padding_gives_eva_no_directions(make, batch):
    """Whatever the padded tokens are, the start is the same; it would be another one if they counted."""
    found = []
    for filler, counts in ((PAD, False), (7, False), (7, True)):
        batches = [batch(seed) for seed in range(4)]
        for b in batches:
            b["input_ids"][b["attention_mask"] == 0] = filler
        torch.manual_seed(1)
        model = add_lora(make(), 2, 2)
        backbone = find_backbone(model)
        if counts:
            backbone = replace(backbone, token_mask_fn=lambda batch, stack: None)
        nlp_ext.initialize_lora(model, "eva", batches, backbone=backbone, show_progress_bar=False)
        found.append({n: p for n, p in model.named_parameters() if "lora_A" in n})
    first, second, third = found
    assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)
    assert not all(first[n].shape == third[n].shape and torch.allclose(first[n], third[n], atol=1e-2) for n in first)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_padding_gives_corda_no_covariance(make, batch):
    """Against the sentences one by one, cut to their own length: B A is the same whatever the padding is."""
    products = []
    for batches in ([batch()], [single(batch(), k) for k in range(len(batch()["input_ids"]))]):
        torch.manual_seed(1)
        model = add_lora(make(), 2, 2)
        nlp_ext.initialize_lora(model, "corda", batches, show_progress_bar=False)
        layers = adapted_layers(model, "default")
        products.append({n: m.lora_B["default"].weight @ m.lora_A["default"].weight for n, m in layers.items()})
    padded_ones, whole = products
    for name in whole:
        assert (padded_ones[name] - whole[name]).norm() < 0.02 * whole[name].norm()  # it inverts a covariance


def test_batches_as_collators_make_them():
    """A BatchEncoding, of a loader and by itself."""
    batch = transformers.BatchEncoding(causal_batch())
    model = add_lora(decoder(), 2, 2)
    assert initialize_lora_abm_weights(model, [batch], ONCE, show_progress_bar=False).samples == len(LENGTHS)
    check_adapters(model, batch)


@pytest.mark.parametrize(
    "init", [name for name, row in INITIALIZERS.items() if row.needs in (Needs.BATCHES, Needs.LABELS)]
)
def test_every_initialisation_takes_what_collators_make(init):
    made, batches = [], (causal_batch(), transformers.BatchEncoding(causal_batch()))
    for batch in batches:
        torch.manual_seed(1)
        model = add_lora(decoder(), 2, 2)
        nlp_ext.initialize_lora(model, init, [batch], show_progress_bar=False)
        made.append([p.detach().clone() for n, p in model.named_parameters() if "lora_" in n])
    assert all(map(torch.equal, *made))
    plain, encoded = (
        information_loss(model, [b]) for b in (causal_batch(), transformers.BatchEncoding(causal_batch()))
    )
    assert plain.layers == encoded.layers and encoded.samples == len(LENGTHS)


@pytest.mark.parametrize("init", ["abm", "abm_aligned", "eva", "corda"])
def test_every_initialisation_honours_a_mask_of_ones_own(init):
    """In a decoder, leaving out the last tokens equals never having had them."""
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    first = (torch.arange(12) < 7).expand(4, 12)
    labels = torch.where(first, ids, -100)
    whole, short = {"input_ids": ids, "labels": labels}, {"input_ids": ids[:, :7], "labels": labels[:, :7]}
    made = []
    for batch, mask in ((whole, lambda batch, stack: first[: len(batch["input_ids"])]), (short, None), (whole, None)):
        torch.manual_seed(1)
        model = add_lora(decoder(), 2, 2)
        nlp_ext.initialize_lora(model, init, [batch], token_mask_fn=mask, show_progress_bar=False)
        layers = adapted_layers(model, "default")
        products = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in layers.values()]
        made.append(torch.cat([p.detach().flatten() for p in products]))
        if init == "eva":  # B is zero
            made[-1] = torch.cat([m.lora_A["default"].weight.detach().flatten() for m in layers.values()])
    masked, truncated, unmasked = made
    assert (masked - truncated).norm() < 0.02 * truncated.norm()
    if init != "abm_aligned":  # the mask has a part in the size alone
        assert len(unmasked) != len(truncated) or (unmasked - truncated).norm() > 0.05 * truncated.norm()


def test_the_last_layers_of_an_encoder_alone():
    model = add_lora(t5(kind="EncoderModel"), 2, 2)
    batch = {name: value for name, value in seq2seq_batch().items() if "label" not in name and "decoder" not in name}
    report = initialize_lora_abm_weights(model, [batch], ABMConfig(steps=1, layers=1), show_progress_bar=False)
    assert [layer.stack for layer in report.layers] == ["encoder"]


@pytest.mark.parametrize(("init", "shared"), [("kaiming", "lora_A"), ("mica", "lora_B"), ("pissa", "base_layer")])
def test_what_other_processes_get_of_a_start(init, shared):
    """All that the start has made: frozen factors too, and the base weights where it has changed them."""
    model = add_lora(decoder(), 2, 2)
    nlp_ext.initialize_lora(model, init, show_progress_bar=False)
    sent = {tensor.data_ptr() for tensor in _initialised(model)}
    named = dict(model.named_parameters())
    assert all(named[n].data_ptr() in sent for n in named if shared in n and "bias" not in n)
    assert (init == "pissa") == any(named[n].data_ptr() in sent for n in named if "base_layer" in n)


def test_cross_attention_reads_the_encoder():
    block = "decoder.block.0.layer.1.EncDecAttention"
    stacks = {f"{block}.k": "encoder", f"{block}.v": "encoder", f"{block}.q": "decoder", f"{block}.o": "decoder"}
    stacks |= {
        "encoder.block.0.layer.1.DenseReluDense.wi": "encoder",
        "decoder.block.1.layer.0.SelfAttention.k": "decoder",
    }
    assert {name: T5.input_stack(name) for name in stacks} == stacks
    assert T5.input_stack("transformer.decoder.block.1.layer.2.DenseReluDense.wo") == "decoder"


# How models are run


def match(model, batch, **options):
    return initialize_lora_abm_weights(
        model, [batch], ABMConfig(steps=3, margin=0.3), show_progress_bar=False, **options
    )


def factors(model):
    return torch.cat([p.detach().float().flatten() for n, p in model.named_parameters() if "lora_" in n])


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_gradient_checkpointing_changes_nothing(make, batch):
    plain, checkpointed = (add_lora(copy.deepcopy(make()), 4, 4) for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    first, second = match(plain, batch()), match(checkpointed, batch())
    assert first.loss_per_step == second.loss_per_step and torch.equal(factors(plain), factors(checkpointed))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_bf16_models(make, batch):
    model = add_lora(make().to(torch.bfloat16), 4, 4)
    report = match(model, batch())
    assert report.before.match == 1 and report.loss_per_step[-1] < report.loss_per_step[0]
    reference = match(add_lora(make(), 4, 4), batch())
    assert report.before.loss == pytest.approx(reference.before.loss, rel=0.02)


@pytest.fixture
def quantised(tmp_path):
    """A tiny LLaMA in 4 bits, read by transformers, and the same with its weights rounded to what the 4 bits say."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "float"
    decoder(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    read = transformers.AutoModelForCausalLM.from_pretrained
    try:
        model = read(folder, quantization_config=settings, device_map={"": "cpu"})
        model.train()(**causal_batch())
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"bitsandbytes does not run on this CPU: {error}")
    return model, copy.deepcopy(model).dequantize()


def test_signs_come_from_the_quantised_model_itself(quantised, tmp_path):
    """Against the same model with float weights of the same values, on peft's own layer."""
    model, rounded = quantised
    torch.manual_seed(1)
    adapted = add_lora(model, 4, 4)
    assert type(adapted.get_base_model().model.layers[0].mlp.gate_proj).__module__ == "peft.tuners.lora.bnb"
    torch.manual_seed(1)
    plain = add_lora(rounded, 4, 4, merged_linear=False)
    first, second = match(adapted, causal_batch()), match(plain, causal_batch())
    assert first.loss_per_step == pytest.approx(second.loss_per_step, rel=1e-4)
    torch.testing.assert_close(factors(adapted), factors(plain), rtol=1e-3, atol=1e-4)
    lost = [nlp_ext.information_loss(m, [causal_batch()], LLAMA.loss_fn).overall.loss for m in (adapted, plain)]
    assert lost[0] == pytest.approx(lost[1], rel=1e-3)
    nlp_ext.save_adapter(adapted, tmp_path / "saved")
    loaded = PeftModel.from_pretrained(plain.unload(), tmp_path / "saved")
    torch.testing.assert_close(loaded(**causal_batch()).logits, adapted(**causal_batch()).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["abm_aligned", "eva", "gaussian", "random_b"])
def test_starts_that_run_on_a_quantised_model(quantised, init):
    model = add_lora(quantised[0], 4, 4)
    before = factors(model)
    nlp_ext.initialize_lora(model, init, [causal_batch(seed) for seed in range(8)])
    assert not torch.equal(before, factors(model)) and factors(model).isfinite().all()
    model(**causal_batch()).loss.backward()
    first = model.get_base_model().model.layers[0].self_attn.q_proj  # the last that a gradient reaches
    assert first.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica", "corda", "lora_ga"])
def test_starts_that_compute_with_the_weights(quantised, init):
    model = add_lora(quantised[0], 4, 4)
    with pytest.raises(ValueError, match=f"{init} computes with the base weights, and those of model.layers.0.*uint8"):
        nlp_ext.initialize_lora(model, init, [causal_batch()])
    with pytest.raises(ValueError, match='fit="local" computes with the base weights'):
        initialize_lora_abm_weights(model, [causal_batch()], ABMConfig(fit="local"))


def test_device_map(tmp_path):
    decoder().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.manual_seed(0)
    dispatched = add_lora(model, 4, 4)
    torch.manual_seed(0)
    plain = add_lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), 4, 4)
    assert match(dispatched, causal_batch()).loss_per_step == match(plain, causal_batch()).loss_per_step


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_compiled_afterwards(make, batch):
    model = add_lora(make(), 4, 4)
    match(model, batch())
    expected = model(**batch()).loss
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch()).loss, expected)
    with pytest.raises(ValueError, match="compiled: call torch.compile last"):
        match(compiled, batch())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch"), [(decoder, causal_batch), (t5, seq2seq_batch)])
def test_tied_embeddings_stay_tied_and_stock_peft_reads_the_file(make, batch, tmp_path):
    base = make(tie_word_embeddings=True)
    model = add_lora(copy.deepcopy(base), 4, 4)
    match(model, batch())
    bare = model.get_base_model()
    assert bare.get_output_embeddings().weight is bare.get_input_embeddings().weight
    nlp_ext.save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits)


def test_import_loads_neither_timm_nor_the_harness():
    code = (
        "import sys, nlp_ext; loaded = {'timm', 'abm_vision.vtab', 'vtab_tasks'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
)
def test_stock_adapters_of_embeddings_and_output_layers_are_loaded(tmp_path, options):
    config = LoraConfig(init_lora_weights=False, **options)
    model = get_peft_model(decoder(), config).eval()
    batch = causal_batch()
    model.save_pretrained(tmp_path)
    found = load_adapter(decoder(), tmp_path).eval()
    torch.testing.assert_close(found(**batch).logits, model(**batch).logits)
