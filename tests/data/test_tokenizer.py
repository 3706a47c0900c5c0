from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer import document_tokens, file_sha256, load_tokenizer
from data.tokenizer_training import train_sentencepiece

SOURCE = Path(__file__).read_text()
AWKWARD = [
    "",
    " ",
    "\n",
    "  two  spaces  \n\n   three\t\ttabs \r\n",
    "\u2581meta\u2581\u2581 space\u2581",
    "</s> <unk> <s> <0x41>",
    "\ufeffbom \x00 nul \x7f \u00a0 \u3000 \u2028",
    "e\u0301 é ﬁ ½ 漢字 🙂👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_sentencepiece([SOURCE], folder, vocab_size=500)
    return folder


def byte_level(folder: Path, *, with_eos: bool = True) -> Path:
    """A byte-level tokenizer.json of the kind that Qwen and Llama 3 ship, adding a begin token."""
    model = HuggingFaceTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|endoftext|>", "<|stop|>"] if with_eos else ["<|begin|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [SOURCE],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet),
    )
    model.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", [*AWKWARD, SOURCE], ids=range(len(AWKWARD) + 1))
def test_a_trained_model_round_trips_exactly(trained: Path, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x", text], num_threads=2) == [
        tokenizer.encode(text),
        tokenizer.encode("x"),
        tokenizer.encode(text),
    ]


@pytest.mark.parametrize("text", [*AWKWARD[:4], SOURCE], ids=range(5))
def test_a_tokenizer_json_round_trips_without_its_begin_token(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids
    assert tokenizer.encode_batch([text])[0] == ids


def test_the_hash_is_the_files(trained: Path, tmp_path: Path) -> None:
    assert load_tokenizer(trained).sha256 == file_sha256(trained / "tokenizer.model")
    assert load_tokenizer(byte_level(tmp_path)).sha256 == file_sha256(tmp_path / "tokenizer.json")


def test_a_copy_is_the_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "merges.txt").write_text("kept\n")
    for source, eos in ((trained, None), (tmp_path, "<|stop|>")):
        tokenizer = load_tokenizer(source, eos_token=eos)
        target = tmp_path / f"copy of {source.name}"
        tokenizer.copy_to(target)
        copy = load_tokenizer(target)
        assert copy.eos_token_id == tokenizer.eos_token_id
        assert copy.sha256 == tokenizer.sha256
        assert copy.vocab_size == tokenizer.vocab_size
        config = json.loads((target / "tokenizer_config.json").read_text())
        assert config["eos_token"] == tokenizer.eos_token
    assert (tmp_path / f"copy of {tmp_path.name}" / "merges.txt").read_text() == "kept\n"


def test_a_model_file_of_any_name_is_copied_under_the_usual_one(
    trained: Path, tmp_path: Path
) -> None:
    model = tmp_path / "my.model"
    model.write_bytes((trained / "tokenizer.model").read_bytes())
    load_tokenizer(model).copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").sha256 == load_tokenizer(trained).sha256


def test_the_end_token_comes_from_the_argument_the_config_or_the_usual_names(
    tmp_path: Path,
) -> None:
    byte_level(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    assert load_tokenizer(tmp_path).eos_token == "<|stop|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|begin|>"}')
    assert load_tokenizer(tmp_path).eos_token_id == 0
    assert load_tokenizer(tmp_path, eos_token="<|endoftext|>").eos_token_id == 1


def test_a_missing_end_token_is_refused(tmp_path: Path, trained: Path) -> None:
    byte_level(tmp_path, with_eos=False)
    with pytest.raises(ValueError, match=r"end-of-document token: none is named. Set eos_token"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"'<no>' is not in its vocabulary"):
        load_tokenizer(tmp_path, eos_token="<no>")
    with pytest.raises(ValueError, match=r"'<no>' is not in its vocabulary"):
        load_tokenizer(trained, eos_token="<no>")


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([SOURCE[i : i + 99] for i in range(0, 4000, 99)]),
        model_writer=model, model_type="bpe", vocab_size=150, eos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="none is named"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", "must be a tokenizer.json"),
        ("tokenizer.model", "must be a sentencepiece model"),
        ("readme.md", r"must be a tokenizer.json, a tokenizer.model or a folder.*got neither"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("nothing of the kind")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must be JSON"):
        load_tokenizer(tmp_path)


def test_a_document_ends_with_the_end_token(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert document_tokens(tokenizer, [5, 7]).tolist() == [5, 7, tokenizer.eos_token_id]
