"""Train the tiny dual encoder of the demo, on phantoms drawn with other seeds than the demo's.

    python benchmarks/demo/train_tiny.py --out medvlm_harness/demo

Writes tiny.safetensors (fp16) and tiny.json (configuration, vocabulary, what it was trained on), and prints what the
model reaches on phantoms of a third seed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from medvlm_harness.data.chexpert import CHEXPERT_13
from medvlm_harness.demo.generate import DEMO_SEED, GENERATOR_VERSION, generate_cases
from medvlm_harness.demo.tiny import CONFIG_FILE, IMAGE_SIZE, MAX_TOKENS, WEIGHTS_FILE, TinyDualEncoder, preprocess

POSITIVE = [label.lower() for label in CHEXPERT_13]
NEGATIVE = [f"no {label}" for label in POSITIVE]
VIEWS = {"frontal": "a frontal chest radiograph", "lateral": "a lateral chest radiograph"}
MIN_WORD_COUNT = 3


class Samples(NamedTuple):
    """One row per image; reports and labels are those of its study."""

    pixels: Tensor  # (n, 1, 96, 96)
    study: Tensor  # (n,) index of the study
    frontal: Tensor  # (n,) bool
    labels: Tensor  # (n, 13) 1, 0, or NaN where uncertain or unlabelled
    reports: list[str]  # one per study


def draw(seed: int, studies: int) -> Samples:
    """Draw a set in memory."""
    pixels, study, frontal, labels, reports = [], [], [], [], []
    for k, case in enumerate(generate_cases(seed, studies)):
        stated = case.report.labels
        values = {1: 1.0, 0: 0.0, None: 0.0, -1: np.nan}
        row = [np.nan if stated is None else values[stated[label]] for label in CHEXPERT_13]
        reports.append(f"{case.report.findings} {case.report.impression}".strip())
        for view, grey in case.pictures:
            pixels.append(preprocess(Image.fromarray(grey)))
            study.append(k)
            frontal.append(view == "frontal")
            labels.append(row)
    return Samples(torch.stack(pixels), torch.tensor(study), torch.tensor(frontal), torch.tensor(labels), reports)


def build_vocabulary(reports: list[str]) -> list[str]:
    """The words of the training reports and of all prompts, in alphabetical order."""
    counts = Counter(word for report in reports for word in re.findall(r"[a-z0-9]+", report.lower()))
    prompts = " ".join([*POSITIVE, *NEGATIVE, *VIEWS.values()]).split()
    return sorted({word for word, count in counts.items() if count >= MIN_WORD_COUNT} | set(prompts))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each picture by a few pixels, and change its brightness and contrast a little."""
    n = len(pixels)
    shift = (torch.randint(-4, 5, (n, 2), generator=generator)).tolist()
    moved = torch.stack([torch.roll(p, (a, b), (1, 2)) for p, (a, b) in zip(pixels, shift, strict=True)])
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    return moved * gain + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)


def prompt_margins(model: TinyDualEncoder, images: Tensor) -> Tensor:
    """Cosine to the positive prompt less cosine to the negative one, shape (n, 13)."""
    positive, negative = (model.encode_texts(model.tokenize(prompts).ids) for prompts in (POSITIVE, NEGATIVE))
    return images @ (positive - negative).T


def loss_of(model: TinyDualEncoder, batch: Samples, pixels: Tensor) -> Tensor:
    """Image to report, image to label prompts, image to view prompts."""
    scale = model.logit_scale.clamp(max=50)
    images = model.encode_images(pixels)
    texts = [batch.reports[k] for k in batch.study.tolist()]
    reports = model.encode_texts(model.tokenize(texts).ids)
    # Studies with the same words are all right answers.
    same = torch.tensor([[a == b for b in texts] for a in texts], dtype=torch.float32)
    target = same / same.sum(dim=1, keepdim=True)
    similarity = scale * images @ reports.T
    contrast = functional.cross_entropy(similarity, target) + functional.cross_entropy(similarity.T, target)

    known = ~batch.labels.isnan()
    # Rare positives weigh as much as the many negatives' square root asks for.
    rise = functional.binary_cross_entropy_with_logits(
        scale * prompt_margins(model, images),
        batch.labels.nan_to_num(),
        weight=known * batch.frontal.unsqueeze(1).float(),
        pos_weight=torch.tensor(3.0),
        reduction="sum",
    ) / (known.float() * batch.frontal.unsqueeze(1).float()).sum().clamp(min=1)

    view_texts = model.encode_texts(model.tokenize(list(VIEWS.values())).ids)
    view = functional.cross_entropy(scale * images @ view_texts.T, (~batch.frontal).long())
    return 0.5 * contrast + 4 * rise + 0.2 * view


def train(model: TinyDualEncoder, samples: Samples, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Train in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    started, order = time.perf_counter(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(samples.pixels), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        batch = samples._replace(
            pixels=samples.pixels[chosen],
            study=samples.study[chosen],
            frontal=samples.frontal[chosen],
            labels=samples.labels[chosen],
        )
        loss = loss_of(model, batch, augment(batch.pixels, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} after {time.perf_counter() - started:.0f} s", flush=True)


@torch.inference_mode()
def measure(model: TinyDualEncoder, samples: Samples) -> dict[str, float]:
    """AUROC per label on frontal images, retrieval of the report, accuracy of the view."""
    model.eval()
    images = torch.cat([model.encode_images(part) for part in torch.split(samples.pixels, 128)])
    result: dict[str, float] = {}
    labels, margins = samples.labels[samples.frontal].numpy(), prompt_margins(model, images[samples.frontal]).numpy()
    for k, label in enumerate(CHEXPERT_13):
        known = ~np.isnan(labels[:, k])
        if labels[known, k].sum() >= 10:
            result[f"AUROC {label}"] = float(roc_auc_score(labels[known, k], margins[known, k]))
    result["AUROC macro"] = float(np.mean(list(result.values())))
    first = torch.tensor(np.unique(samples.study.numpy(), return_index=True)[1])  # the first image is frontal
    similarity = images[first] @ model.encode_texts(model.tokenize(samples.reports).ids).T
    rank = (similarity > similarity.diagonal().unsqueeze(1)).sum(dim=1)
    result |= {f"R@{k} of {len(rank)}": float((rank < k).float().mean()) for k in (1, 5, 10)}
    view = images @ model.encode_texts(model.tokenize(list(VIEWS.values())).ids).T
    result["view accuracy"] = float(((view[:, 0] > view[:, 1]) == samples.frontal).float().mean())
    return result


def main() -> None:
    """Draw, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=20250, help="of the training phantoms and of all else")
    parser.add_argument("--studies", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    check_seed = args.seed + 1
    if DEMO_SEED in (args.seed, check_seed):
        parser.error(f"expected a training seed that keeps clear of the demo's seed {DEMO_SEED}, but got {args.seed}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    started = time.perf_counter()
    samples = draw(args.seed, args.studies)
    print(
        f"drew {len(samples.pixels)} images of {args.studies} studies in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    vocabulary = build_vocabulary(samples.reports)
    model = TinyDualEncoder(vocabulary)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {len(vocabulary)} words")
    train(model, samples, args.steps, args.batch_size, args.rate, args.seed)

    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in halves.items()})  # measure what is written
    metrics = measure(model, draw(check_seed, 240))
    for name, value in metrics.items():
        print(f"{name:40s} {value:.3f}")
    config = {
        "training_data": "Synthetic phantoms and templated reports of medvlm_harness.demo only; no patient data.",
        "generator_version": GENERATOR_VERSION,
        "seed": args.seed,
        "studies": args.studies,
        "images": len(samples.pixels),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "rate": args.rate,
        "image_size": IMAGE_SIZE,
        "max_tokens": MAX_TOKENS,
        "parameters": size,
        "check_seed": check_seed,
        "check": {name: round(value, 3) for name, value in metrics.items()},
        "vocabulary": vocabulary,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / WEIGHTS_FILE).write_bytes(save(halves))
    (args.out / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
