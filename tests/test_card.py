"""The model card of a run: what it says, what it does not tell, and when it is written."""

import os
from types import SimpleNamespace

import pytest
from helpers import looped
from huggingface_hub import metadata_load

from card import licence_fields, licence_of, write_card
from qwen import Qwen

RESULTS = {
    "full": {"held-out": [1.0, 1.2]},
    "cut": {"held-out": [5.0, 5.2]},
    "ouroboros": {"held-out": [2.0, 2.2]},
}


@pytest.fixture
def ended(pretrained, tmp_path):
    """The model and the options of a run that has ended, with its last checkpoint on the disk."""
    model = looped(Qwen.from_pretrained(pretrained), depth=2, rank=4)
    options = SimpleNamespace(
        out=tmp_path / "run",
        model=str(pretrained),
        data=str(tmp_path / "text.txt"),
        steps=7,
        depth=2,
        lr=0.25,
        seq_len=32,
        text_hash="0123",
        device="cpu",
    )
    model.save(options.out / "step-0000007", step=7)
    return SimpleNamespace(model=model, options=options, card=options.out / "step-0000007" / "README.md")


def test_a_card_tells_results_settings_and_size_and_no_path(ended, tmp_path):
    write_card(ended.model, RESULTS, ended.options)
    card = ended.card.read_text(encoding="utf-8")
    trained = sum(p.numel() for p in ended.model.trained_parameters().values())
    for part in (
        "| cut to 3 layers | 5.100 ± 0.100 |",
        "| ouroboros, depth 2 | 2.100 ± 0.100 |",
        "| gap recovered | 75.0 ± 0.0% |",
        "mean over 2 sequences of 32 tokens",
        "| lr | 0.25 |",
        "| rank | 4 |",
        "| recurrent | 3 |",
        "| dtype | float32 |",
        f"The {trained:,} parameters that were trained",
        "`model`, a folder",
        "`text.txt`",
        "arxiv.org/abs/2604.02051",
    ):
        assert part in card
    for part in (str(tmp_path), "0123", "cpu"):
        assert part not in card


def test_a_base_that_is_not_on_the_hub_and_an_unknown_licence_are_not_made_up(ended):
    write_card(ended.model, RESULTS, ended.options)
    metadata = metadata_load(ended.card)
    assert "license" not in metadata
    assert "base_model" not in metadata
    assert "datasets" not in metadata
    assert "base model is not known here. Look it up" in ended.card.read_text()


@pytest.mark.parametrize("word", ["no", "1.0", "a:", "-"])
def test_a_word_that_means_something_else_in_yaml_stays_a_word(word, ended, pretrained):
    (pretrained / "README.md").write_text(f"---\nlicense: '{word}'\n---\n")
    write_card(ended.model, RESULTS, ended.options)
    assert metadata_load(ended.card)["license"] == word


def test_a_card_names_the_text_of_the_hub(ended):
    ended.options.data = "fineweb-edu"
    write_card(ended.model, RESULTS, ended.options)
    assert metadata_load(ended.card)["datasets"] == ["kjj0/finewebedu10B-gpt2"]


def test_the_licence_of_the_built_in_model_is_known():
    assert licence_of("tiny") == {"license": "apache-2.0"}


def test_a_licence_in_a_file_beside_the_card_of_a_folder_has_no_link(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: a-b\nlicense_link: LICENSE\n---\n"
    )
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "a-b"}


@pytest.mark.parametrize(
    "card, fields",
    [
        ("---\nlicense: mit\n---\n# Model", {"license": "mit"}),
        ('---\r\nlicense: "mit"\r\n---\r\n', {"license": "mit"}),
        (
            "---\nlanguage: en\nlicense: other\nlicense_link: https://a.b/c\n---\n",
            {"license": "other", "license_link": "https://a.b/c"},
        ),
        ("# Model\nlicense: mit\n", {}),
        ("---\nlanguage: en\n---\nlicense: mit\n", {}),
        ("---\nlicense: mit\n", {}),  # the metadata do not end
        ("---\nmodel:\n  license: mit\n---\n", {}),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("---\nlicense: {a: b}\nlicense_name: x\n---\n", {}),
        ("", {}),
    ],
)
def test_a_licence_is_read_where_it_is_a_plain_word_of_the_metadata(card, fields):
    assert licence_fields(card) == fields


def test_a_card_that_a_person_edited_stays_until_its_checkpoint_is_saved_again(ended):
    write_card(ended.model, RESULTS, ended.options)
    written = ended.card.read_text()
    ended.card.write_text("edited")
    write_card(ended.model, RESULTS, ended.options)
    assert ended.card.read_text() == "edited"

    older = ended.card.with_name("ouroboros.safetensors").stat().st_mtime - 10
    os.utime(ended.card, (older, older))
    write_card(ended.model, RESULTS, ended.options)
    assert ended.card.read_text() == written
