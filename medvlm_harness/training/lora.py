"""What methods share that train LoRA by PEFT: the layers it goes into, what of a model is kept, and the folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from lm_eval.utils import simple_parse_args_string
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.metrics.bootstrap import Weights, weighted_mean
from medvlm_harness.metrics.estimate import Estimate
from medvlm_harness.metrics.paired import paired_estimates
from medvlm_harness.model_backends.adapters import WEIGHTS, keep_cast_dtype
from medvlm_harness.model_backends.frozen_encoder import base_backend
from medvlm_harness.model_backends.torch_backend import TorchBackend
from medvlm_harness.training.loop import Trainable
from medvlm_harness.training.methods import Method

__all__ = ["LoraMethod", "LoraTrainable", "after_and_before", "chosen", "put_lora", "supported", "write_adapter"]

AUTO = "auto"
Backend = TypeVar("Backend", bound=TorchBackend)


@dataclass(frozen=True, kw_only=True)
class LoraMethod(Method):
    """Low-rank additions to layers of a base model, whose own weights stay as they are.

    Source: Hu et al. 2021, arXiv 2106.09685; on rounded weights: Dettmers et al. 2023, arXiv 2305.14314.
    """

    EVALUATED_BY: ClassVar[str] = ""  # the base model's own backend

    rank: int = 16
    alpha: int = 32  # additions are multiplied by alpha / rank
    dropout: float = 0.0  # of what goes into an addition
    targets: str = AUTO  # layers by name or by how their names end, with commas between; auto takes all of them
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    validation_studies: int = 512  # at most, the first by id

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "validation_studies"):
            if getattr(self, name) <= 0:
                raise UserError(f"Expected {name} to be more than 0, but got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"Expected dropout to be 0 or more and less than 1, but got {self.dropout}.")

    def evaluation(self, output: Path) -> str:
        """The base model with `peft=`."""
        args = ",".join(part for part in (self.model_args, f"peft={output}") if part)
        return f"--model {self.model} --model_args {args}"

    def base(self, kind: Callable[..., Backend], what: str) -> Backend:
        """The base model's backend, its store off.

        Raises:
            UserError: if it is of another kind, has an adapter already, or is rounded in a way that passes no gradient.
        """
        if "peft" in simple_parse_args_string(self.model_args):
            raise UserError("Expected a base model without an adapter: leave peft= out of --model-args.")
        backend = base_backend(self.model, self.model_args, kind=kind, what=what, device=self.device)
        way = backend.quantization
        if way is not None and way.library != "bitsandbytes":
            raise UserError(f"quantization={way.name} passes no gradient on: use nf4 or int8, or leave it out.")
        return backend


def supported(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT's LoRA can go into: linear and convolution layers, rounded ones too, and torch's attention.

    Of attention the projections are part of the layer: by themselves they are not called, and would learn nothing.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, Conv1D)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    inside = {f"{name}.out_proj" for name, module in found.items() if isinstance(module, nn.MultiheadAttention)}
    return {name: module for name, module in found.items() if name not in inside}


def reached(model: nn.Module, run: Callable[[], torch.Tensor]) -> list[str]:
    """The supported layers that what `run` computes depends on; others would get no gradient."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # PEFT freezes all of it afterwards
    outputs: list[tuple[str, torch.Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            outputs.append((name, output[0] if isinstance(output, tuple) else output))

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in supported(model).items()]
    try:
        answer = run()
    finally:
        for hook in hooks:
            hook.remove()
    asked = [(name, output) for name, output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(answer.sum(), [output for _, output in asked], allow_unused=True)
    names = [name for (name, _), gradient in zip(asked, gradients, strict=True) if gradient is not None]
    return list(dict.fromkeys(names))


def chosen(names: Iterable[str], targets: str) -> list[str]:
    """Of the layers that can be trained, those that are asked for.

    Raises:
        UserError: if a name is none of them.
    """
    known = list(names)
    if targets == AUTO:
        return known
    found: list[str] = []
    for target in (part.strip() for part in targets.split(",")):
        hit = [name for name in known if name == target or name.endswith(f".{target}")]
        if not hit:
            ends = {name.rpartition(".")[2] for name in known}
            raise UserError(f"No layer that can be trained is called {target!r}.{near_matches(target, ends)}")
        found += hit
    return list(dict.fromkeys(found))


def put_lora(model: nn.Module, names: Sequence[str], method: LoraMethod, *, task_type: str | None = None) -> Any:
    """PEFT's model with fresh additions to these layers, in place; they change nothing yet."""
    from peft import LoraConfig, get_peft_model

    if not names:
        raise UserError(f"{type(model).__name__} has no layer that LoRA can go into.")
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        # As a pattern: PEFT takes a list's names for ends of names, which "conv1" of one tower is in another as well.
        target_modules="|".join(map(re.escape, names)),
        task_type=task_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(method.schedule.seed)
        adapted = get_peft_model(model, config)
    keep_cast_dtype(adapted)
    return adapted


def write_adapter(model: Any, folder: Path) -> int:
    """Write what `peft=` and PEFT itself load; gives back the number of weights."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    config.inference_mode = True
    config.save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


class LoraTrainable(Trainable):
    """A model with LoRA: the additions alone are kept.

    Batch normalisation stays as it evaluates: its statistics are the base model's, and no part of an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.additions = {name: one for name, one in model.named_parameters() if one.requires_grad}

    def state(self) -> Mapping[str, torch.Tensor]:
        """What learns."""
        return {name: one.detach() for name, one in self.additions.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what learns."""
        for name, one in self.additions.items():
            one.copy_(state[name])

    def train_mode(self) -> None:
        """Dropout as the base model and the additions have it."""
        self.module.train()
        for module in self.module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # torch names no public one
                module.eval()


def after_and_before(
    metrics: Sequence[str], after: NDArray[np.float64], before: NDArray[np.float64], study_ids: Sequence[str]
) -> dict[str, Estimate]:
    """Means over validation studies with the adapter and without it, and their difference, with paired intervals.

    Args:
        metrics: names of the columns.
        after: of each study, (n, metrics).
        before: the same of the base model.
        study_ids: the study of each row.
    """

    def mean_of(values: NDArray[np.float64]) -> Callable[[Weights], NDArray[np.float64]]:
        return lambda weights: np.stack([weighted_mean(column, weights) for column in values.T], axis=1)

    return paired_estimates({"after": mean_of(after), "before": mean_of(before)}, list(study_ids), metrics)
