"""What we say of cost against independent measurements: torch's timers, /usr/bin/time, operations counted by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import common

IMAGES = 300
ROUNDS = 5  # each measures ours and theirs, one after the other: what else the machine does changes with time
SECONDS = 3.0  # that one measurement takes at least
THREADS = 1  # the same for both, and the least disturbed by others
TOKENS = 32


def measure(images: int = IMAGES) -> dict[str, Any]:
    """Each number with its ratio, ours / independent; the ratio is the one that is furthest from 1.

    - `forward`: the image tower alone, one image, against torch.utils.benchmark.Timer on the bare model, and against
      torch.profiler; random ViT-B/32.
    - `generate`: 32 tokens by a random Llama of 40 million weights, against the same timer on transformers.
    - `peak_ram`: a run's own peak against the system's of the same process (/usr/bin/time, else wait4).
    - `gflops`: of an image against the closed form of ViT-B/32.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common.shortened(folder, images)
        model = str(common.random_clip(folder))
        environment = {"MEDVLM_DATA": str(folder), "OMP_NUM_THREADS": str(THREADS)}
        found = common.child("efficiency.py", "forward", model, environment=environment)
        found |= common.child("efficiency.py", "generate", str(folder / "llama"), environment=environment)
        found["peak_ram"] = _peak_ram(model, folder)
    ratios = [one["ratio"] for one in found.values()]
    return {"images": images, **found, "ratio": max(ratios, key=lambda ratio: abs(ratio - 1))}


# --- time and operations


def _forward(model: str) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from torch.utils.benchmark import Timer

    from medvlm_harness.model_backends.clip import ClipBackend
    from medvlm_harness.requests import ImageRef, TimingProtocol, Workload

    torch.set_num_threads(THREADS)
    data = common.dataset()
    refs = [ImageRef(image.sha256, data.path(image)) for study in data.studies for image in study.images]
    backend = ClipBackend(pretrained=model, precision="fp32", store="off", device="cpu")
    protocol = TimingProtocol(seconds=SECONDS, max_batch_size=1)
    workload = Workload("embed", tuple((ref,) for ref in refs), protocol)
    timed, profiled, gflops = [], [], 0.0
    for _ in range(ROUNDS):
        (found,) = _profiled(backend, workload)
        ours = median(found.single.stages["encode_images"])
        gflops = found.gflops_per_item or 0.0
        ((_, pixels),) = backend._pixels(refs[:1])
        bare = {"network": backend.towers.model, "pixels": pixels, "torch": torch}
        with torch.inference_mode():
            timer = Timer("network.encode_image(pixels)", globals=bare, num_threads=THREADS)
            theirs = timer.blocked_autorange(min_run_time=SECONDS).median
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                for _ in range(20):
                    with record_function("image tower"):
                        backend.towers.model.encode_image(pixels)
        event = next(one for one in trace.key_averages() if one.key == "image tower")
        timed.append((ours, theirs))
        profiled.append((ours, event.cpu_time_total / event.count / 1e6))
    by_hand = _vit_flops(tokens=50, width=768, layers=12, patch=32, output=512) / 1e9
    return {
        "forward": _compared(timed),
        "forward_profiler": _compared(profiled),
        "gflops": {"ours": gflops, "independent": by_hand, "ratio": gflops / by_hand},
    }


def _vit_flops(*, tokens: int, width: int, layers: int, patch: int, output: int) -> int:
    """Twice the multiplications: patches, per layer projections and feed-forward (12 d^2 t) and attention (2 t^2 d)."""
    patches = (tokens - 1) * width * 3 * patch**2
    layer = 12 * width**2 * tokens + 2 * tokens**2 * width
    return 2 * (patches + layers * layer + width * output)


def _generate(folder: str) -> dict[str, Any]:
    import torch
    from torch.utils.benchmark import Timer

    from medvlm_harness.model_backends.language_model import LanguageModelBackend
    from medvlm_harness.requests import TimingProtocol, Workload

    torch.set_num_threads(THREADS)
    _write_llama(Path(folder))
    texts = list(dict.fromkeys(study.findings for study in common.dataset().studies if study.findings.strip()))[:8]
    backend = LanguageModelBackend(pretrained=folder, precision="fp32", store="off", device="cpu")
    protocol = TimingProtocol(seconds=SECONDS, new_tokens=TOKENS, max_batch_size=1)
    workload = Workload("generate_until", ((texts[0],),), protocol)
    pairs = {"text": [], "first_token": []}
    for _ in range(ROUNDS):
        (found,) = _profiled(backend, workload)
        ids = torch.tensor([backend.encode_prompt((texts[0],), backend.max_length - TOKENS).ids])
        network: Any = backend.model
        for name, ours, tokens in (
            ("text", found.single.seconds, TOKENS),
            ("first_token", found.single.first_token_seconds, 1),
        ):
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            bare = {"network": network, "ids": ids, "mask": torch.ones_like(ids), "options": options}
            timer = Timer("network.generate(ids, attention_mask=mask, **options)", globals=bare, num_threads=THREADS)
            with torch.inference_mode():
                pairs[name].append((median(ours), timer.blocked_autorange(min_run_time=SECONDS).median))
    return {f"generate_{name}": _compared(found) for name, found in pairs.items()}


def _write_llama(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: k for k, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10}
    tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=260, max_position_embeddings=2048, **sizes, **tokens)).save_pretrained(
        folder
    )


def _profiled(backend: Any, workload: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    found: list[Any] = backend.profile([Instance("profile", {}, (str(workload), workload), 0)])
    return found


def _compared(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians over the rounds in milliseconds; the ratio is the median of the rounds' own."""
    return {
        "ours": 1000 * median(ours for ours, _ in pairs),
        "independent": 1000 * median(theirs for _, theirs in pairs),
        "ratio": median(ours / theirs for ours, theirs in pairs),
        "rounds": [ours / theirs for ours, theirs in pairs],
    }


# --- memory


def _peak_ram(model: str, folder: Path) -> dict[str, Any]:
    out = folder / "out"
    command = [sys.executable, "-m", "medvlm_harness", "run", "--model", "medvlm-clip", "--tasks", "iu_cxr_view"]
    command += ["--model_args", f"pretrained={model},store=off", "--metadata", json.dumps({"split": "all"})]
    command += ["--output_path", str(out), "--device", "cpu", "--batch_size", "32"]
    environment = {**os.environ, "MEDVLM_DATA": str(folder), "OMP_NUM_THREADS": str(THREADS)}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL}
    if Path("/usr/bin/time").is_file():
        report = folder / "time.txt"
        timed = ["/usr/bin/time", "-f", "%M", "-o", str(report), *command]
        subprocess.run(timed, check=True, stderr=subprocess.DEVNULL, **quiet)
        theirs, by = int(report.read_text().split()[-1]) / 1024, "/usr/bin/time"
    else:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"The run ended with status {status}.")
        theirs, by = usage.ru_maxrss / 1024, "wait4"
    (path,) = out.rglob("results_*.json")
    block = json.loads(path.read_text(encoding="utf-8"))["medvlm"]["efficiency"]
    return {"ours": block["peak_ram_mib"], "independent": theirs, "by": by, "ratio": block["peak_ram_mib"] / theirs}


if __name__ == "__main__":
    print(json.dumps({"forward": _forward, "generate": _generate}[sys.argv[1]](sys.argv[2])))
