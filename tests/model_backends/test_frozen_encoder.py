from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.frozen_encoder import (
    encoder_record,
    frozen_encoder,
    recorded_encoder,
)
from medvlm_harness.model_backends.identity import check_weights
from medvlm_harness.model_backends.open_clip_towers import _encode_image_maps
from medvlm_harness.model_backends.transformers_towers import _as_maps
from medvlm_harness.requests import ImageRef

torch.set_num_threads(1)


def test_a_recorded_encoder_is_found_where_it_lies_and_where_it_was_moved_to(shared: Path, tmp_path: Path) -> None:
    args = f"pretrained={shared / 'models' / 'iu-clip-tiny'}"
    first = frozen_encoder("medvlm-clip", args, device="cpu")
    record = encoder_record(first, "medvlm-clip", args)
    assert recorded_encoder(record, device="cpu").weights == first.weights == record["weights"]
    moved = shutil.copytree(shared / "models" / "iu-clip-tiny", tmp_path / "moved")
    assert recorded_encoder(record, pretrained=str(moved), device="cpu").identity == first.identity
    assert first.store is None


@pytest.mark.parametrize(
    ("backend", "args", "message"),
    [
        ("medvlm-clop", "", "Unknown model 'medvlm-clop'. Did you mean medvlm-clip"),
        ("medvlm-baseline", "kind=random", "Expected the encoder to be a dual encoder, but medvlm-baseline is"),
        ("medvlm-tiny", "size=3", "Unknown option 'size'"),
    ],
)
def test_what_is_no_encoder_is_refused(backend: str, args: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        frozen_encoder(backend, args)


def test_weights_may_be_renamed_but_not_changed() -> None:
    check_weights("it", {"a.bin": "1" * 64}, {"b.bin": "1" * 64}, option="encoder")
    with pytest.raises(UserError, match=r"it is not the one .* a.bin has sha256 222222222222, expected 111111111111"):
        check_weights("it", {"a.bin": "1" * 64}, {"a.bin": "2" * 64}, option="encoder")


# --- maps


def test_the_map_of_an_image_does_not_depend_on_its_batch_and_pools_to_its_vector(
    shared: Path, images: Callable[..., list[ImageRef]]
) -> None:
    encoder: Any = frozen_encoder("medvlm-clip", f"pretrained={shared / 'models' / 'iu-clip-tiny'}", device="cpu")
    refs = images(3)
    ((_, maps),) = encoder.image_maps(refs)
    ((_, alone),) = encoder.image_maps(refs[1:2])
    assert maps.shape == (3, 512, 4, 4)
    torch.testing.assert_close(maps[1:2], alone, atol=1e-5, rtol=0)
    pixels = torch.stack([encoder.preprocess(_opened(ref)) for ref in refs])
    with torch.inference_mode():
        vectors = encoder.model.visual.head(maps.mean(dim=(2, 3)))
        torch.testing.assert_close(vectors, encoder.encode_images(pixels), atol=1e-4, rtol=0)


def _opened(ref: ImageRef) -> Any:
    from medvlm_harness.data.images import open_image

    return open_image(ref.path)


def test_the_patches_of_a_vit_are_where_they_lie_in_the_image() -> None:
    """The first layer's patch shows at its own place, whatever comes after: a change of one patch moves it most."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32)
    visual = open_clip.CLIP(8, vision, open_clip.CLIPTextCfg(width=16, heads=1, layers=1, vocab_size=8)).visual.eval()
    encode = _encode_image_maps(visual)
    assert encode is not None
    before = torch.rand(1, 3, 32, 32)
    after = before.clone()
    after[:, :, 8:16, 24:32] += 1  # row 1, column 3
    with torch.inference_mode():
        moved = (encode(after) - encode(before)).norm(dim=1)[0]
    assert moved.shape == (4, 4)
    assert divmod(int(moved.argmax()), 4) == (1, 3)


def test_tokens_become_a_map_without_the_class_token() -> None:
    patches = torch.arange(18.0).reshape(1, 9, 2)
    expected = patches.transpose(1, 2).reshape(1, 2, 3, 3)
    assert torch.equal(_as_maps(patches), expected)
    assert torch.equal(_as_maps(torch.cat([torch.full((1, 1, 2), -1.0), patches], dim=1)), expected)
    assert torch.equal(_as_maps(expected), expected)


def test_an_encoder_without_maps_has_its_vector_at_one_place(images: Callable[..., list[ImageRef]]) -> None:
    from medvlm_harness.model_backends.dual_encoder import DualEncoder

    encoder: Any = frozen_encoder("medvlm-tiny", device="cpu")
    encoder.ensure_loaded()
    pixels = torch.rand(2, 1, 96, 96)
    with torch.inference_mode():
        assert torch.equal(DualEncoder.encode_image_maps(encoder, pixels)[:, :, 0, 0], encoder.encode_images(pixels))
        assert encoder.encode_image_maps(pixels).shape == (2, 24, 6, 6)
