"""A small T5, from scratch, on the train split's reports: a real encoder-decoder where no Hub can be reached.

    python benchmarks/train_summarizer.py OUT [--minutes 8]

It shows what the summarisation track says of a model that has learnt its format and little else; nobody should use it
for anything. Nothing of it is part of the package: it holds what it learnt from the reports.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Metaspace
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from medvlm_harness.data.records import Study
from medvlm_harness.model_backends.allocation import keep_freed_memory
from medvlm_harness.plugin import tasks_folder
from medvlm_harness.tracks.summarization import Summarization

VOCABULARY = 4000
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SOURCE_TOKENS, TARGET_TOKENS = 256, 64
BATCH = 32
PEAK_RATE = 1e-3
WARM_UP = 100  # steps


def main() -> None:
    """Train until the time is up, and save as transformers does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(common.THREADS)
    keep_freed_memory()
    torch.manual_seed(0)
    pairs = _pairs()
    tokenizer = _tokenizer([text for pair in pairs for text in pair])
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            d_ff=512,
            num_layers=3,
            num_heads=6,
            dropout_rate=0.1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    epochs = _train(model, tokenizer, pairs, seconds=60 * arguments.minutes)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{model.num_parameters():,} parameters, {len(pairs)} reports, {epochs:.1f} epochs: {arguments.out}")


def _pairs() -> list[tuple[str, str]]:
    """Prompts of the track, filled from the train split, with the impressions."""
    task = Summarization(_declaration())
    train: list[Study] = [study for study in task.data.studies if study.split == "train"]
    return [
        (task.document(study, source=study.findings, target=study.impression)["prompt"], study.impression.strip())
        for study in train
        if study.findings.strip() and study.impression.strip()
    ]


def _declaration() -> dict[str, object]:
    loaded: dict[str, object] = load_yaml(tasks_folder() / "iu_cxr" / "iu_cxr_summarization.yaml", resolve_func=False)
    return loaded


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Unigram pieces of the reports themselves, in lower case, ended by </s> as T5's are."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = Metaspace()
    special = [PAD, END, UNKNOWN]
    trainer = trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token=UNKNOWN)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=SOURCE_TOKENS,
    )


def _train(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    *,
    seconds: float,
) -> float:
    """AdamW, a linear warm-up, then down to 0 as the time runs out; epochs done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    model.train()
    start, step = time.monotonic(), 0
    for batch in _batches(pairs):
        used = (time.monotonic() - start) / seconds
        if used >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (1 - used)
        sources, targets = zip(*batch, strict=True)
        inputs = tokenizer(list(sources), padding=True, truncation=True, max_length=SOURCE_TOKENS, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, truncation=True, max_length=TARGET_TOKENS, return_tensors="pt")
        wanted = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=wanted).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {used:.0%} of the time, loss {loss.item():.3f}", flush=True)
    model.eval()
    return step * BATCH / len(pairs)


def _batches(pairs: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield [pairs[k] for k in order[first : first + BATCH]]


if __name__ == "__main__":
    main()
