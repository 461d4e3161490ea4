import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.errors import DataError
from data_pipeline.tokenize import load_tokenizer, train_tokenizer

TEXTS = [f"The quick brown fox {i} jumps over the lazy dog.\n\tnaïve 東京 🦊" for i in range(50)]


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 400, path)
    return path


def test_training_is_deterministic(trained, tmp_path):
    train_tokenizer(iter(TEXTS), 400, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("word", ["ab", " ", "é"])
def test_training_on_an_endless_word_ends(tmp_path, word):
    """Minutes without a limit."""
    path = tmp_path / "tokenizer.json"
    train_tokenizer([*TEXTS, word * 300_000], 400, path)
    tokenizer = load_tokenizer(path)
    text = TEXTS[0] + word * 3000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert "FixedLength" not in path.read_text()


def test_any_text_survives_the_round_trip(trained):
    tokenizer = load_tokenizer(trained)
    text = "  unseen: Привет\r\n\x00 \U0001f600é"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size <= 400


def test_agrees_with_transformers(trained):
    reference = PreTrainedTokenizerFast(tokenizer_file=str(trained), eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(trained)
    assert tokenizer.eos_id == reference.eos_token_id
    assert tokenizer.encode(TEXTS[3]) == reference(TEXTS[3], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("is_special", [True, False])
def test_text_that_spells_the_end_of_document_does_not_end_it(trained, is_special):
    content = json.loads(trained.read_text())
    content["added_tokens"][0]["special"] = is_special
    trained.write_text(json.dumps(content))
    tokenizer = load_tokenizer(trained)
    text = "before <|endoftext|> after"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_a_piece_of_a_unigram_model_does_not_end_a_document(tmp_path):
    """T5's and its kin have their special tokens among their pieces, and at the best score."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = [(chr(code), -8.0) for code in range(33, 127)]
    pieces = [*((name, 0.0) for name in special), ("▁", -3.0), *letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special)
    backend.save(str(tmp_path / "tokenizer.json"))

    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.eos_id == 1
    text = "in html </s></s>, or <pad>and </ s>"
    ids = tokenizer.encode(text)
    assert min(ids) > 2
    assert tokenizer.decode(ids) == text
    plain = "nothing < special / s>"
    assert tokenizer.encode(plain) == backend.encode(plain, add_special_tokens=False).ids


def test_truncation_stored_in_a_published_tokenizer_does_not_cut_documents(trained):
    content = json.loads(trained.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    trained.write_text(json.dumps(content))
    assert len(load_tokenizer(trained).encode(TEXTS[0])) > 4


def test_end_of_document_is_found_under_its_usual_names(trained):
    content = trained.read_text()
    trained.write_text(content.replace("<|endoftext|>", "</s>"))
    assert load_tokenizer(trained).eos_id == 0
    trained.write_text(content.replace("<|endoftext|>", "<stop>"))
    with pytest.raises(DataError, match=r"looked for <\|endoftext\|>, </s>"):
        load_tokenizer(trained)


def test_what_ends_a_document_is_special_before_it_is_usual(tmp_path):
    """Gemma's vocabulary has HTML's tags as tokens of their own."""
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    backend.add_tokens([AddedToken(name, special=False) for name in ("<s>", "</s>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == backend.token_to_id("<eos>")


def test_bad_tokenizers_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        load_tokenizer(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: not a Hugging Face tokenizer"):
        load_tokenizer(broken)
    with pytest.raises(DataError, match="vocab_size=256 is too small"):
        train_tokenizer(TEXTS, 256, tmp_path / "small.json")
