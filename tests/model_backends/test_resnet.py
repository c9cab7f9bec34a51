from __future__ import annotations

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet, resnet50

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.resnet import is_resnet, resnet

State = dict[str, torch.Tensor]


def small(*, bias: bool) -> ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(Bottleneck, [1, 2, 1, 1])
        model.fc = torch.nn.Linear(2048, 8, bias=bias)
        for module in model.modules():  # zeros and ones hide swapped names
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        return model.eval()


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_it_answers_as_the_model_that_wrote_the_weights(bias: bool) -> None:
    model, pixels = small(bias=bias), torch.randn(2, 3, 64, 64)
    built = resnet(model.state_dict(), "file", bias=bias).eval()
    assert torch.equal(built(pixels), model(pixels))
    with pytest.raises(UserError, match=r"fc\.bias"):
        resnet(model.state_dict(), "file", bias=not bias)


def test_a_published_resnet_50_is_one() -> None:
    with torch.device("meta"):
        state = resnet50().state_dict()
    assert is_resnet(state)
    assert not is_resnet({"patch_embed.proj.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "name", ["fc.weight", "fc.bias", "layer2.1.bn3.running_var", "conv1.weight", "layer4.0.conv1.weight"]
)
def test_a_missing_weight_is_named(name: str) -> None:
    state = small(bias=True).state_dict()
    del state[name]
    with pytest.raises(UserError, match=rf"file does not fit a ResNet.*{name}"):
        resnet(state, "file", bias=True)
