"""tiny-t5 and tiny-llama: byte-level models that this package pretrains, for machines that reach no hub.

They are stand-ins for trying a pipeline and for comparing initialisations on real tokenisation and trainers, and every
result says so. They are trained on the standard library's documentation, and on sentences and exercises of the grammar
of `nlp_ext.glue.synthetic`. Processes share the cached models.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from abm_vision.abm.bars import progress
from abm_vision.runs.device import autocast, has_fast_bf16
from nlp_ext.batches import IGNORED
from nlp_ext.corpus import documentation
from nlp_ext.glue import synthetic
from nlp_ext.models.cached import cached_model, is_whole, place_of

BATCH, SEED, WARMUP = 16, 0, 100
GRAMMAR_SENTENCES = EXERCISES = 20_000
NOISE, SPAN = 0.15, 6.0  # share of bytes that T5 has to fill in, and the mean length of a gap in bytes
PAD, EOS = 0, 1  # ByT5's ids; byte b has id b + 3


@dataclass(frozen=True)
class Tiny:
    """One model: steps of its pretraining, bytes in a window of text, and peak learning rates.

    All of Adam's steps have the same size. T5's embeddings are initialised with deviation 1, its matrices with much
    less, so that no rate suits both: embeddings (with norms and position biases) have their own.
    """

    steps: int
    window: int
    lr: float
    embedding_lr: float


MODELS: Mapping[str, Tiny] = {
    "tiny-t5": Tiny(steps=1200, window=128, lr=1e-3, embedding_lr=4e-2),
    "tiny-llama": Tiny(steps=700, window=192, lr=4e-3, embedding_lr=4e-3),
}


def make_model(name: str) -> PreTrainedModel:
    """Make the model with random weights of a fixed seed.

    Raises:
        ValueError: the name is none of `MODELS`.
    """
    tokens = 384  # ByT5's vocabulary: 3 special tokens, 256 bytes, 125 sentinels
    torch.manual_seed(SEED)
    if name == "tiny-t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=tokens,
                d_model=128,
                d_kv=32,
                d_ff=512,
                num_layers=4,
                num_decoder_layers=2,
                num_heads=4,
                relative_attention_max_distance=64,
                dropout_rate=0.0,
                decoder_start_token_id=PAD,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )
        )
    if name == "tiny-llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokens,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                pad_token_id=PAD,
                bos_token_id=None,
                eos_token_id=EOS,
            )
        )
    raise ValueError(f"unknown tiny model {name!r}; there are {', '.join(MODELS)}")


def tiny_folder(name: str, *, show_progress_bar: bool = True) -> Path:
    """Return the folder of a pretrained tiny model, in transformers' format; pretrain it if it is not in the cache.

    Raises:
        CannotWrite: the cache cannot be written.
    """

    def make(folder: Path) -> dict[str, str]:
        pretrain(name, show_progress_bar=show_progress_bar).save_pretrained(folder)
        ByT5Tokenizer().save_pretrained(folder)
        return {"torch": torch.__version__}

    return cached_model(name, _recipe(name), make)


def is_pretrained(name: str) -> bool:
    """Whether a tiny model is in the cache."""
    return is_whole(place_of(name, _recipe(name)))


def _recipe(name: str) -> dict[str, str]:
    return {"model": name, "code": _code_hash(), "python": platform.python_version()}


def _code_hash() -> str:
    """SHA-256 of the code that determines the models."""
    files = [Path(__file__), *(Path(__file__).parent / n for n in ("corpus.py", "glue/synthetic.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def pretrain(name: str, *, steps: int | None = None, show_progress_bar: bool = True) -> PreTrainedModel:
    """Train a tiny model on windows of text drawn with a fixed seed; AdamW, warm-up, then a linear decay to zero.

    T5 fills in gaps (Raffel et al., arXiv:1910.10683, section 3.1.4) in every third step, and does exercises in the
    others; LLaMA predicts the next byte.
    """
    settings = MODELS[name]
    steps = steps or settings.steps
    model = make_model(name).train()
    exercises = synthetic.exercises(EXERCISES)
    made_up = [*synthetic.sentences(GRAMMAR_SENTENCES), *(f"{source}\n{target}" for source, target in exercises)]
    corpora = [_bytes(documentation()), _bytes(made_up)]
    generator = torch.Generator().manual_seed(SEED)
    groups = [{"params": p, "peak": lr} for p, lr in _rates(model, settings)]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    precision = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"
    for step in progress(range(steps), f"pretraining {name}", show=show_progress_bar):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP))
        windows = _windows(corpora, settings.window, generator)
        if name == "tiny-llama":
            batch = {"input_ids": windows, "labels": windows}
        elif step % 3:
            batch = _lesson(exercises, generator)
        else:
            batch = gaps(windows, generator)
        with autocast(torch.device("cpu"), precision):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def _rates(model: PreTrainedModel, settings: Tiny) -> Iterator[tuple[list[Tensor], float]]:
    matrices = {p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    matrices -= set(model.get_input_embeddings().parameters())  # which an output layer may share
    yield [p for p in model.parameters() if p in matrices], settings.lr
    yield [p for p in model.parameters() if p not in matrices], settings.embedding_lr


def _bytes(texts: object) -> Tensor:
    """ByT5's ids of the texts in order, each with an end token."""
    return torch.cat([torch.tensor([b + 3 for b in text.encode()] + [EOS]) for text in texts])


def _windows(corpora: list[Tensor], length: int, generator: torch.Generator) -> Tensor:
    """Ids (BATCH, length), the same number from every corpus."""
    rows = []
    for corpus in corpora:
        starts = torch.randint(len(corpus) - length, (BATCH // len(corpora),), generator=generator)
        rows += [corpus[start : start + length] for start in starts.tolist()]
    return torch.stack(rows)


def _lesson(exercises: list[tuple[str, str]], generator: torch.Generator) -> dict[str, Tensor]:
    """A batch of exercises, padded."""
    chosen = [exercises[k] for k in torch.randint(len(exercises), (BATCH,), generator=generator).tolist()]
    sources, targets = ([_bytes([text]) for text in texts] for texts in zip(*chosen, strict=True))
    ids = pad_sequence(sources, batch_first=True, padding_value=PAD)
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def gaps(windows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Make T5's denoising batch: gaps in the windows become sentinels, and the targets are what they hide.

    All windows have the same number of gaps, with lengths drawn for each window, so that inputs need no padding.
    """
    count, length = windows.shape
    hidden = round(NOISE * length)
    number = max(1, round(hidden / SPAN))
    inputs, targets = [], []
    for row in windows:
        lengths = _split(hidden, number, generator)
        kept = _split(length - hidden, number, generator)
        source: list[Tensor] = []
        target: list[Tensor] = []
        at = 0
        for k in range(number):
            sentinel = torch.tensor([SENTINEL - k])
            source += [row[at : at + kept[k]], sentinel]
            target += [sentinel, row[at + kept[k] : at + kept[k] + lengths[k]]]
            at += kept[k] + lengths[k]
        inputs.append(torch.cat([*source, torch.tensor([EOS])]))
        targets.append(torch.cat([*target, torch.tensor([EOS])]))
    return {"input_ids": torch.stack(inputs), "labels": torch.stack(targets)}


SENTINEL = 258  # first id of a gap: ByT5 was pretrained with the ids of its last bytes, counting down


def _split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Positive lengths that add up to `total`, drawn uniformly."""
    cuts = (torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
