# SPDX-License-Identifier: Apache-2.0
"""Streaming text: nothing lost, nothing broken, nothing shown beyond a stop string."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hostile import sentence_piece_tokenizer, write_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gptneox.config import ConfigError
from gptneox.engine.detokenizer import Detokenizer, decode, load_tokenizer

VOCAB_SIZE = 336  # rows of the embedding; the tokenizers are smaller
REPLACEMENT = "\ufffd"

# Texts that are hard to stream: characters of several tokens, combining marks, blanks, controls.
TEXTS = [
    "the cat and the dog",
    "👩‍👩‍👧‍👦 family 🇨🇭 flag 👍🏽",
    "e\u0301 n\u0303 — NFD beside é ñ",
    "a" + " " * 23 + "b" + " " * 24 + "c" + " " * 49 + "d",
    "nul \0 bell \a tab\t\r\nline\n\n\n",
    "日本語テキスト、中文。한국어",
    "zero\u200bwidth \u202eright to left\u202c \ufeffmark",
    "real \ufffd replacement \ufffd\ufffd",
    "\U0010ffff\U00010000 𝔘𝔫𝔦",
    " leading and trailing  ",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As GPT-NeoX-20B's: byte-level BPE."""
    directory = tmp_path_factory.mktemp("byte_level")
    write_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "gpt_neox"}')
    return load_tokenizer(directory, VOCAB_SIZE)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As the Japanese GPT-NeoX models'."""
    directory = tmp_path_factory.mktemp("sentence_piece")
    sentence_piece_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    (directory / "config.json").write_text('{"model_type": "gpt_neox"}')
    return load_tokenizer(directory, VOCAB_SIZE)


@pytest.fixture(params=["byte_level", "sentence_piece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def pieces(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = (), step: int = 1) -> list[str]:
    """What is shown after each step of `step` tokens; the last step ends the sequence."""
    detokenizer = Detokenizer(tokenizer, stop)
    shown = []
    for i in range(0, len(ids), step):
        last = i + step >= len(ids)
        shown.append(detokenizer.add(ids[i : i + step], last=last))
    assert detokenizer.text == "".join(shown)
    return shown


def assert_streams_whole(tokenizer: Any, ids: list[int], step: int) -> None:
    shown = pieces(tokenizer, ids, step=step)
    text = decode(tokenizer, ids)
    assert "".join(shown) == text
    # A piece never begins or ends in the middle of a character.
    for i, piece in enumerate(shown[:-1]):
        assert not piece.endswith(REPLACEMENT), f"piece {i} of {shown}"
    assert sum(p.count(REPLACEMENT) for p in shown) == text.count(REPLACEMENT)


# -- pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_hard_texts(tokenizer: Any, text: str, step: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = pieces(tokenizer, ids, step=step)
    assert "".join(shown) == decode(tokenizer, ids)
    if REPLACEMENT not in text:
        assert REPLACEMENT not in "".join(shown)
    # GPT-NeoX's tokenizer normalises to NFC; otherwise both are lossless.
    assert unicodedata.normalize("NFC", "".join(shown)) == unicodedata.normalize("NFC", text)


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), step=st.integers(1, 4))
@settings(max_examples=400, deadline=None)
@example(ids=[2, 335, 3], step=1)
def test_any_tokens(byte_level: Any, ids: list[int], step: int) -> None:
    """Bytes in any order, special tokens and padding rows among them."""
    assert_streams_whole(byte_level, ids, step)


@given(
    text=st.lists(st.sampled_from(TEXTS) | st.text(max_size=6), max_size=5).map("".join),
    noise=st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 1, 334, 335])), max_size=4),
    step=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_text_with_special_and_padding_tokens(
    byte_level: Any, sentence_piece: Any, text: str, noise: list[tuple[int, int]], step: int
) -> None:
    for tokenizer in (byte_level, sentence_piece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for where, token_id in noise:
            ids.insert(where, token_id)
        shown = "".join(pieces(tokenizer, ids, step=step))
        assert shown == decode(tokenizer, ids)


def test_blank_after_a_padding_token_is_kept(sentence_piece: Any) -> None:
    ids = sentence_piece.encode("the cat", add_special_tokens=False)
    for silent in (335, sentence_piece.eos_token_id):
        mixed = [ids[0], silent, silent, *ids[1:]]
        assert "".join(pieces(sentence_piece, mixed)) == "the cat"


def test_an_emoji_appears_whole(byte_level: Any) -> None:
    ids = byte_level.encode("a👍b", add_special_tokens=False)
    assert len(ids) == 6
    assert pieces(byte_level, ids) == ["a", "", "", "", "👍", "b"]


def test_an_end_inside_a_character_shows_that(byte_level: Any) -> None:
    ids = byte_level.encode("a👍", add_special_tokens=False)[:-1]
    assert pieces(byte_level, ids) == ["a", "", "", REPLACEMENT]


def test_padding_rows_decode_to_nothing(tokenizer: Any) -> None:
    assert len(tokenizer) < VOCAB_SIZE
    padding = list(range(len(tokenizer), VOCAB_SIZE))
    assert decode(tokenizer, padding) == ""
    assert decode(tokenizer, [-1]) == ""
    assert pieces(tokenizer, padding) == [""] * len(padding)


def test_no_tokens_no_text(byte_level: Any) -> None:
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.add([]) == ""
    assert detokenizer.add([], last=True) == ""
    assert detokenizer.text == ""


# -- stop strings --------------------------------------------------------------------------------


def first_stop(tokenizer: Any, ids: list[int], stop: tuple[str, ...], step: int) -> str | None:
    """The text before the stop string that was complete first; None when there is none.

    Independent of the class under test: the whole text is decoded anew after each step that ends
    with a whole character.
    """
    for i in range(0, len(ids), step):
        text = decode(tokenizer, ids[: i + step])
        if i + step < len(ids) and text.endswith(REPLACEMENT):
            continue
        hits = [text.find(s) for s in stop if s in text]
        if hits:
            return text[: min(hits)]
    return None


def assert_stops(tokenizer: Any, ids: list[int], stop: tuple[str, ...], step: int) -> None:
    shown, expected = pieces(tokenizer, ids, stop, step), first_stop(tokenizer, ids, stop, step)
    text = "".join(shown)
    assert text == (decode(tokenizer, ids) if expected is None else expected)
    assert not any(s in text for s in stop)


@given(
    text=st.text(alphabet="ab ", max_size=25),
    stop=st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), min_size=1, max_size=3),
    step=st.integers(1, 3),
)
@settings(max_examples=400, deadline=None)
def test_few_letters_many_stops(byte_level: Any, text: str, stop: list[str], step: int) -> None:
    """Overlapping and nested stop strings, spanning tokens and inside one."""
    ids = byte_level.encode(text, add_special_tokens=False)
    assert_stops(byte_level, ids, tuple(stop), step)


@given(data=st.data(), text=st.sampled_from(TEXTS), step=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_stop_strings_taken_from_the_text(
    byte_level: Any, sentence_piece: Any, data: st.DataObject, text: str, step: int
) -> None:
    assume(REPLACEMENT not in text)
    stop = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        stop.append(text[start : start + data.draw(st.integers(1, 5))])
    for tokenizer in (byte_level, sentence_piece):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert_stops(tokenizer, ids, tuple(stop), step)


def test_nothing_after_the_stop_is_ever_shown(byte_level: Any) -> None:
    detokenizer = Detokenizer(byte_level, ("the end",))
    ids = byte_level.encode("a cat. the end of the cat", add_special_tokens=False)
    shown = [detokenizer.add([i]) for i in ids]
    assert detokenizer.stopped
    assert detokenizer.text == "".join(shown) == "a cat. "
    assert detokenizer.add(ids, last=True) == ""
    assert detokenizer.text == "a cat. "


def test_a_stop_inside_one_token_cuts_the_token(byte_level: Any) -> None:
    ids = byte_level.encode(" the", add_special_tokens=False)
    assert len(ids) == 1
    assert pieces(byte_level, ids, ("h",)) == [" t"]


def test_a_beginning_of_a_stop_is_held_back_only_as_long_as_needed(byte_level: Any) -> None:
    ids = [byte_level.encode(c, add_special_tokens=False)[0] for c in "abxabc"]
    detokenizer = Detokenizer(byte_level, ("abc",))
    assert [detokenizer.add([i]) for i in ids] == ["", "", "abx", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.text == "abx"


def test_an_unfinished_stop_is_shown_at_the_end(byte_level: Any) -> None:
    ids = [byte_level.encode(c, add_special_tokens=False)[0] for c in "xab"]
    assert pieces(byte_level, ids, ("abc",)) == ["x", "", "ab"]


# -- loading -------------------------------------------------------------------------------------


def test_no_tokenizer_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*--load_tokenizer False"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    num_tokens = write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert len(load_tokenizer(tmp_path, num_tokens)) == num_tokens
    with pytest.raises(ConfigError, match=rf"has {num_tokens} tokens.*vocab_size {num_tokens - 1}"):
        load_tokenizer(tmp_path, num_tokens - 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', "\x00\xff"])
def test_broken_tokenizer_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ConfigError, match=r"cannot be loaded|is empty") as caught:
        load_tokenizer(tmp_path, VOCAB_SIZE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 138\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"]
)
def test_a_text_instead_of_a_tokenizer_file_is_named(tmp_path: Path, name: str) -> None:
    if name != "spiece.model":
        write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    for text, found in ((LFS_POINTER, "git-lfs pointer"), ("<html>404</html>", "web page")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=rf"{name} is a {found}"):
            load_tokenizer(tmp_path, VOCAB_SIZE)


def test_a_tokenizer_file_that_is_not_needed_may_be_a_pointer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text(LFS_POINTER)
    assert load_tokenizer(tmp_path, VOCAB_SIZE).encode("the cat")


def test_a_tokenizer_file_that_links_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is a link to gone, which does"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_a_padding_token_beyond_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Added for training and never learnt: transformers runs such a model, and so do we."""
    num_tokens = write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    added = content["added_tokens"]
    added.append(added[0] | {"id": num_tokens, "content": "[PAD]"})
    file.write_text(json.dumps(content))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    tokenizer = load_tokenizer(tmp_path, num_tokens)
    assert tokenizer.encode("[PAD]") == [num_tokens]
    assert "no rows for the special tokens [PAD]" in caplog.text
    with pytest.raises(ConfigError, match="different models"):
        load_tokenizer(tmp_path, num_tokens - 1)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentence_piece_file_is_enough(tmp_path: Path, name: str) -> None:
    """Japanese checkpoints have nothing else; ids and text are the processor's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the dog sat on the mat"] * 20),
        model_writer=model,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / name).write_bytes(model.getvalue())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "the cat 🐈 sat on the dog"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == processor.encode(text)
    assert len(tokenizer) == processor.get_piece_size()
    assert tokenizer.eos_token_id == processor.piece_to_id("</s>")
    assert "".join(pieces(tokenizer, [*ids, tokenizer.eos_token_id])) == text
    with pytest.raises(ConfigError, match="vocab_size 10"):
        load_tokenizer(tmp_path, 10)


def test_a_damaged_sentence_piece_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"spiece\.model is no SentencePiece model"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_planted_code_is_not_run(tmp_path: Path) -> None:
    """An auto_map that points at a file beside the weights is not followed without the flag."""
    write_tokenizer(tmp_path)
    marker = tmp_path / "executed"
    planted = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        code = planted + "class Evil: pass\nclass EvilFast: pass\n"
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt_neox", "auto_map": {"AutoConfig": "configuration_evil.Evil", '
        '"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.EvilFast"]}}'
    )
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(
        settings_file.read_text()[:-1]
        + ', "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", '
        '"tokenization_evil.EvilFast"]}}'
    )
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert not marker.exists()
