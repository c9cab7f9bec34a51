"""CheXbert on a tiny random checkpoint in the published layout, against the original's forward pass written anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.errors import UserError
from medvlm_harness.labelers import make_labeler
from medvlm_harness.labelers.chexbert import CheXbertLabeler

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += [
    "no",
    "effusion",
    "##s",
    "edema",
    ".",
    "pneumonia",
    "the",
    "heart",
    "is",
    "normal",
    "enlarged",
    "left",
    "right",
    "small",
    "large",
    ":",
    "findings",
]
# As src/constants.py lists them.
CONDITIONS = ["Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"]
CONDITIONS += ["Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"]
CONDITIONS += ["Support Devices", "No Finding"]
TEXTS = ["no effusions .", "the heart is enlarged .", "small left effusion", "edema", "No zzz Edema", "left " * 700]
Saved = Callable[..., Path]


class Original(torch.nn.Module):
    """The published model: a BERT and fourteen heads on its first token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        config = BertConfig(vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=96, initializer_range=0.6)  # fmt: skip
        self.bert = BertModel(config)
        self.linear_heads = torch.nn.ModuleList(
            [*(torch.nn.Linear(128, 4) for _ in range(13)), torch.nn.Linear(128, 2)]
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        first = self.bert(ids, attention_mask=mask)[0][:, 0, :]
        return [head(first) for head in self.linear_heads]


def ids_of(text: str) -> list[int]:
    """The published tokenization of words that are whole in the vocabulary, plural or unknown; cut at 512."""
    ids = [WORDS.index("[CLS]")]
    for word in text.lower().split():
        if word in WORDS:
            ids.append(WORDS.index(word))
        elif word.endswith("s") and word[:-1] in WORDS:
            ids += [WORDS.index(word[:-1]), WORDS.index("##s")]
        else:
            ids.append(WORDS.index("[UNK]"))
    return [*ids[:511], WORDS.index("[SEP]")]


@pytest.fixture(scope="module")
def original() -> Original:
    return Original().eval()


@pytest.fixture
def saved(tmp_path: Path, original: Original) -> Saved:
    """Write a checkpoint as training under DataParallel left it, with the vocabulary beside it."""

    def save(change: Callable[[dict[str, Any]], object] = lambda state: None, **more: Any) -> Path:
        state: dict[str, Any] = {f"module.{name}": value.clone() for name, value in original.state_dict().items()}
        state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
        change(state)
        path = tmp_path / "chexbert.pth"
        torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {"lr": 2e-5}, **more}, path)
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
        return path

    return save


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVLM_CHEXBERT", raising=False)
    monkeypatch.delenv("MEDVLM_CHEXBERT_VOCAB", raising=False)


def expected(original: Original, texts: list[str]) -> tuple[list[torch.Tensor], list[dict[str, int | None]]]:
    """Logits and labels of a padded batch, as label.py computes and names them."""
    rows = [ids_of(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        out = original(ids, mask)
    value = {0: None, 1: 1, 2: 0, 3: -1}
    classes = [logits.argmax(dim=1).tolist() for logits in out]
    return out, [{name: value[column[k]] for name, column in zip(CONDITIONS, classes, strict=True)}
                 for k in range(len(texts))]  # fmt: skip


def test_logits_and_labels_are_those_of_the_original(original: Original, saved: Saved) -> None:
    labeler = CheXbertLabeler(str(saved()))
    logits, labels = expected(original, TEXTS)
    for k, text in enumerate(TEXTS):
        ours = labeler.logits(text)
        for head, theirs in zip(ours, logits, strict=True):
            assert torch.allclose(head, theirs[k], atol=1e-4)
        assert labeler.label(text) == labels[k]
    seen = {value for row in labels for name, value in row.items() if name != "No Finding"}
    assert seen == {None, 1, 0, -1}  # else a wrong mapping of the classes could not show
    assert len({tuple(row.items()) for row in labels}) > 1


def test_the_heads_go_by_chexberts_order_not_chexperts(original: Original, saved: Saved) -> None:
    """Negative control: under CheXpert's order of columns the same outputs would be other labels."""
    _, labels = expected(original, TEXTS)
    in_the_wrong_order = [dict(zip(CHEXPERT_14, row.values(), strict=True)) for row in labels]
    assert in_the_wrong_order != labels
    labeler = CheXbertLabeler(str(saved()))
    assert [labeler.label(text) for text in TEXTS] == labels
    assert list(labeler.label("edema")) == list(CHEXPERT_14)


def test_other_heads_give_other_labels(original: Original, saved: Saved) -> None:
    """Negative control: the weights of the file are used, all of them."""
    before = CheXbertLabeler(str(saved())).label("edema")
    wanted = dict.fromkeys(CHEXPERT_14, 1)

    def all_positive(state: dict[str, Any]) -> None:
        for k in range(14):
            state[f"module.linear_heads.{k}.bias"] = torch.tensor([0.0, 1e4, 0.0, 0.0][: 2 if k == 13 else 4])

    assert CheXbertLabeler(str(saved(all_positive))).label("edema") == wanted != before


def test_a_state_dict_without_wrapping_or_prefix_loads_as_well(
    original: Original, saved: Saved, tmp_path: Path
) -> None:
    labels = CheXbertLabeler(str(saved())).label("the heart is enlarged .")
    torch.save(original.state_dict(), tmp_path / "plain.pth")
    assert CheXbertLabeler(str(tmp_path / "plain.pth")).label("the heart is enlarged .") == labels


def test_what_is_read_are_the_sections_with_single_spaces(saved: Saved) -> None:
    path = str(saved())
    labeler = CheXbertLabeler(path)
    assert labeler.label("HISTORY: pneumonia\n\nFINDINGS: the  heart\nis enlarged .") == labeler.label(
        "the heart is enlarged ."
    )
    impression = CheXbertLabeler(path, sections="impression")
    assert impression.label("FINDINGS: edema\n\nIMPRESSION: no effusions .") == labeler.label("no effusions .")
    assert labeler.label(" \n") == impression.label("FINDINGS: edema") == dict.fromkeys(CHEXPERT_14)


def test_the_version_is_that_of_the_files(saved: Saved) -> None:
    first = CheXbertLabeler(str(saved())).version
    assert CheXbertLabeler(str(saved())).version == first
    changed = CheXbertLabeler(str(saved(lambda state: state["module.linear_heads.0.bias"].add_(1.0)))).version
    assert changed.partition("-")[0] != first.partition("-")[0]
    assert changed.partition("-")[2] == first.partition("-")[2]


def test_files_are_found_by_option_by_variable_and_beside_the_weights(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = saved()
    monkeypatch.setenv("MEDVLM_CHEXBERT", str(path))
    assert make_labeler("chexbert").name == "chexbert"
    (tmp_path / "bert").mkdir()
    (tmp_path / "vocab.txt").rename(tmp_path / "bert" / "vocab.txt")
    with pytest.raises(UserError, match=r"vocab\.txt is no file: give vocab=FILE"):
        make_labeler("chexbert")
    assert make_labeler("chexbert", vocab=str(tmp_path / "bert")).version
    monkeypatch.setenv("MEDVLM_CHEXBERT_VOCAB", str(tmp_path / "bert" / "vocab.txt"))
    assert make_labeler("chexbert").version


@pytest.mark.parametrize("weights", ["", "nowhere/chexbert.pth"])
def test_a_missing_checkpoint_is_named_with_where_it_is_and_what_does_without(weights: str) -> None:
    with pytest.raises(UserError) as caught:
        make_labeler("chexbert", weights=weights)
    message = str(caught.value)
    assert weights in message
    for part in ("StanfordAIMI/RRG_scorers", "stanfordmlgroup/CheXbert", "`rules` needs no file"):
        assert part in message
    assert "\n" not in message


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.pop(f"module.{name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("linear_heads.13.bias"), "1 weights missing, 0 unexpected (linear_heads.13.bias"),
        (drop("bert.encoder.layer.1.output.dense.bias"), "1 weights missing"),
        (lambda state: state.update({"module.extra": torch.zeros(1)}), "0 weights missing, 1 unexpected (extra"),
        (drop("bert.embeddings.word_embeddings.weight"), "is no CheXbert checkpoint: it has no bert.embeddings.word"),
        (
            lambda state: state.update({"module.linear_heads.13.weight": torch.zeros(4, 128)}),
            "does not fit CheXbert: size mismatch for linear_heads.13.weight",
        ),
        (lambda state: state.clear(), "is no CheXbert checkpoint"),
    ],
)
def test_weights_that_do_not_fit_exactly_are_refused(
    saved: Saved, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        CheXbertLabeler(str(saved(change)))
    assert message in str(caught.value)


def test_a_vocabulary_of_another_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    path = saved()
    other = tmp_path / "other.txt"
    for content, message in (
        ("\n".join(WORDS[:-1]), f"Expected a vocabulary of {len(WORDS)} tokens"),
        ("a\nb", "[PAD], [UNK], [CLS], [SEP] is missing"),
        ("\n".join([*WORDS, "no"]), "a token is there twice"),
    ):
        other.write_text(content, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            CheXbertLabeler(str(path), vocab=str(other))
        assert message in str(caught.value)


class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", ["code", "text", "list", "numbers"])
def test_a_file_that_is_no_checkpoint_is_refused_and_none_of_it_runs(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved()
    if content == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"code": {"model_state_dict": {}, "x": Code()}, "list": [1], "numbers": {"a": 1}}[content], path)
    with pytest.raises(UserError, match=r"no checkpoint that loads safely|holds something else"):
        CheXbertLabeler(str(path))
    assert not Path("ran").exists()
