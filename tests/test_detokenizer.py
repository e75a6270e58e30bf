# SPDX-License-Identifier: Apache-2.0
"""Streaming text: nothing lost, nothing broken, nothing shown beyond a stop string."""

from __future__ import annotations

import functools
import io
import json
import unicodedata
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sentencepiece
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.tokenizers import byte_level_tokenizer, sentence_piece_tokenizer, write_tokenizer
from tokenizers import AddedToken as TokenizersAddedToken
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPTNeoXTokenizerFast, PreTrainedTokenizerFast

from gptneox.config.errors import FileError
from gptneox.engine.detokenizer import (
    Detokenizer,
    append_until_end,
    decode,
    end_ids,
    load_tokenizer,
)

IS_4 = transformers.__version__.startswith("4.")
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


# -- stop strings and special tokens ---------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As Dolly's and StableLM's: special tokens that stand between the turns of a talk."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["### End", "<|user|>"])
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("the cat### End the dog", ("### End",), "the cat"),
        ("the cat### End the dog", ("End",), "the cat"),
        ("the cat### End\nthe dog", ("### End\n",), "the cat"),
        ("the cat\n<|user|>the dog", ("\n<|user|>",), "the cat"),
        ("the cat<plain> the dog", ("<plain>",), "the cat"),
        ("a<|user|>b### Endc the", ("c",), "ab"),
        ("a<|user|>b### Endc", ("never",), "abc"),
        ("the<|user|><|user|>cat", ("|><|",), "the"),
        ("the cat ### Ending", ("### Ending",), "the cat "),
        ("the ### En### End", ("### End", "x"), "the ### En"),
        ("👍<|user|>👍", ("<|user|>",), "👍"),
        ("<|endoftext|>the", ("<|endoftext|>",), ""),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_stop_string_sees_special_tokens(
    text: str, stop: tuple[str, ...], shown: str, step: int, chat: Any
) -> None:
    """They are part of the text that is looked through, and never of what is shown."""
    ids = chat.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(chat, stop)
    for i in range(0, len(ids), step):
        detokenizer.add(ids[i : i + step], last=i + step >= len(ids))
    assert detokenizer.text == shown
    assert detokenizer.stopped == (stop != ("never",))


def append(*args: Any) -> tuple[int, str, int, str, str | int | None]:
    return astuple(append_until_end(*args))


def test_an_end_as_the_engines_take_it(chat: Any) -> None:
    """An id that ends has no text; a stop string goes before a length that is reached."""
    the, cat = chat.encode("the cat", add_special_tokens=False)[:2]
    ends = end_ids([cat], [the, 7])
    assert ends == {cat: None, the: the, 7: 7}
    detokenizer = Detokenizer(chat, ("cat", " c"))
    assert append(detokenizer, [the], {cat: None}, 2) == (1, "the", 1, "", None)
    assert append(detokenizer, [cat], {cat: None}, 1) == (1, "", 0, "stop", None)
    assert append(None, [cat], {the: None}, 1) == (1, "", 1, "length", None)
    assert append(Detokenizer(chat, ("the",)), [the], {}, 1) == (1, "", 0, "stop", "the")


def test_several_tokens_end_where_one_by_one_would(chat: Any) -> None:
    """Whatever was computed past the end of a sequence is not taken."""
    the, cat, dog = (chat.encode(t, add_special_tokens=False)[0] for t in ("the", " cat", " dog"))
    new = [the, cat, the, dog]
    assert append(Detokenizer(chat), new, {}, 9) == (4, chat.decode(new), 4, "", None)
    assert append(Detokenizer(chat), new, {}, 3) == (3, "the catthe", 3, "length", None)
    for room in (9, 2):  # an id goes before the length, too
        assert append(Detokenizer(chat), new, {cat: cat}, room) == (2, "the", 1, "stop", cat)
    assert append(Detokenizer(chat, (" ca",)), new, {}, 9) == (2, "the", 1, "stop", " ca")
    assert append(Detokenizer(chat, ("tthe",)), new, {}, 9) == (3, "the ca", 1, "stop", "tthe")
    assert append(None, new, {the: None}, 9) == (1, "", 0, "stop", None)
    assert append(None, [], {}, 0) == (0, "", 0, "length", None)


PIECES = st.sampled_from(TEXTS) | st.text(alphabet="ab <|user|>👍", max_size=9)
STOPS = st.sampled_from(["ab", "b ", "👍", "bel", " " * 9, "\n", "中", "og"])


@pytest.mark.parametrize("include_stop", [False, True])
@given(
    text=st.lists(PIECES, max_size=4),
    stop=st.lists(STOPS, max_size=3),
    noise=st.lists(st.tuples(st.integers(0, 60), st.integers(0, VOCAB_SIZE - 1)), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_released_tokens_are_those_of_the_text(
    chat: Any,
    include_stop: bool,
    text: list[str],
    stop: list[str],
    noise: list[tuple[int, int]],
) -> None:
    """After every token, what was released decodes to what was shown.

    A stop string that stays holds nothing back: as much is released as without stop strings.
    """
    ids = chat.encode("".join(text), add_special_tokens=False)
    for where, token_id in noise:
        ids.insert(where, token_id)
    detokenizer = Detokenizer(chat, tuple(stop), include_stop=include_stop)
    free = Detokenizer(chat)
    num_released, shown, reason = 0, "", ""
    for i, token_id in enumerate(ids):
        appended = append_until_end(detokenizer, [token_id], {}, len(ids) - i)
        num_released += appended.num_released
        shown += appended.text
        reason = appended.reason
        if reason == "stop":
            break
        assert decode(chat, ids[:num_released]) == shown
        free.add([token_id], last=bool(reason))
        assert num_released == free.num_released or not include_stop
    assert detokenizer.text == shown
    if reason != "stop":
        assert num_released == len(ids), "the end releases everything"
        return
    # A stop string may cut a token; all whole tokens before it are released.
    assert shown.startswith(decode(chat, ids[:num_released]))
    for longer in (decode(chat, ids[:n]) for n in range(num_released + 1, i + 2)):
        assert len(longer) > len(shown) or longer.endswith(REPLACEMENT)
    assert shown.endswith(appended.stop_reason) == include_stop or appended.stop_reason == " " * 9


@pytest.mark.parametrize(
    ("stop", "include", "shown", "num_released", "found"),
    [
        (("end",), False, "a cat. the ", 4, "end"),
        (("end",), True, "a cat. the end", 5, "end"),
        ((" end", "end", " en"), False, "a cat. the", 4, " en"),
        (("end", "en"), True, "a cat. the en", 4, "en"),
        (("nothing",), True, "a cat. the end", 5, None),
    ],
)
def test_a_stop_string_may_stay(
    byte_level: Any,
    stop: tuple[str, ...],
    include: bool,
    shown: str,
    num_released: int,
    found: str | None,
) -> None:
    """The first one counts, and of those that begin together the shortest; it may cut a token."""
    ids = byte_level.encode("a cat. the end", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level, stop, include_stop=include)
    append_until_end(detokenizer, ids, {}, len(ids))
    assert (detokenizer.text, detokenizer.stop_string) == (shown, found)
    assert detokenizer.num_released == num_released


# -- loading -------------------------------------------------------------------------------------


def test_no_tokenizer_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*--load_tokenizer False"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    num_tokens = write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    assert len(load_tokenizer(tmp_path, num_tokens)) == num_tokens
    with pytest.raises(FileError, match=rf"has {num_tokens} tokens.*vocab_size {num_tokens - 1}"):
        load_tokenizer(tmp_path, num_tokens - 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', "\x00\xff"])
def test_broken_tokenizer_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    named = "cannot be loaded" if content.startswith('{"') else r"tokenizer\.json|is empty"
    with pytest.raises(FileError, match=named) as caught:
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
        with pytest.raises(FileError, match=rf"{name} is a {found}"):
            load_tokenizer(tmp_path, VOCAB_SIZE)


def test_a_tokenizer_file_that_is_not_needed_may_be_a_pointer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text(LFS_POINTER)
    assert load_tokenizer(tmp_path, VOCAB_SIZE).encode("the cat")


def test_a_tokenizer_file_that_links_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is a link to gone, which does"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


# What tokenizer.json may hold: every kind of text that a rebuilt tokenizer would cut otherwise.
MIXED = "Ｈｅｌｌｏ ﬁne ① one\n\n\nhello  world, year 1234 e\u0301 THE cat<|sep|>the"


def nfkc(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFKC()


def lowercase(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])


def digits(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def newlines(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def own_decoder(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("t", 1, 0)])


def template(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )


def truncation(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="<|padding|>")


def plain(tokenizer: Tokenizer) -> None:
    """As it is."""


def separator(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([TokenizersAddedToken("<|sep|>", lstrip=True, rstrip=True)])


CLASSES = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizer")


@pytest.mark.parametrize("class_name", [*CLASSES, "T5Tokenizer", "NobodysTokenizer", "", None])
@pytest.mark.parametrize(
    "change",
    [
        *(plain, nfkc, lowercase, digits, newlines),
        *(prefix_space, own_decoder, template, truncation, separator),
    ],
)
def test_tokenizer_json_is_taken_as_it_is(
    change: Callable[[Tokenizer], None], class_name: str | None, tmp_path: Path
) -> None:
    """Whatever class tokenizer_config.json names; None: without that file."""
    reference = byte_level_tokenizer()
    change(reference)
    reference.save(str(tmp_path / "tokenizer.json"))
    if class_name is not None:
        named = {"tokenizer_class": class_name} if class_name else {"eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    reference.no_truncation()  # that belongs to training
    reference.no_padding()
    ids = reference.encode(MIXED, add_special_tokens=False).ids
    assert tokenizer.encode(MIXED, add_special_tokens=False) == ids
    assert decode(tokenizer, ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.get_vocab() == reference.get_vocab(), "no token more, none less"
    assert tokenizer.eos_token_id == (0 if class_name == "" else None)


@pytest.mark.parametrize("class_name", ["GPTNeoXTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_add_prefix_space_of_the_settings(
    asked: bool, stored: bool, class_name: str, tmp_path: Path
) -> None:
    """As transformers' GPT-NeoX class obeys it."""
    reference = byte_level_tokenizer()
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stored)
    reference.save(str(tmp_path / "tokenizer.json"))
    settings_file = {"tokenizer_class": class_name, "add_prefix_space": asked}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file))
    expected = GPTNeoXTokenizerFast.from_pretrained(str(tmp_path)).encode("the cat")
    actual = load_tokenizer(tmp_path, VOCAB_SIZE).encode("the cat", add_special_tokens=False)
    assert actual == expected


ADDED = {
    "additional_special_tokens": {"additional_special_tokens": ["<|user|>", "### End"]},
    "extra_special_tokens": {"extra_special_tokens": ["<|user|>", "### End"]},
    "pad": {"pad_token": "[PAD]", "eos_token": "<|endoftext|>"},
    "eos is new": {"eos_token": {"content": "### End", "lstrip": True, "__type": "AddedToken"}},
    "eos is a word": {"eos_token": "the"},
    "decoder": {
        "added_tokens_decoder": {
            "313": {"content": "<|user|>", "special": True},
            "314": {"content": "plain<>", "special": False, "normalized": False},
            "315": {"content": "### End", "special": True, "rstrip": True},
        },
        "eos_token": "### End",
    },
}


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("named", ADDED)
def test_added_tokens_are_those_of_transformers(named: str, where: str, tmp_path: Path) -> None:
    if IS_4 and (named, where) == ("extra_special_tokens", "special_tokens_map.json"):
        pytest.skip("transformers 4 cannot read it, and 5 does not write it there")
    write_tokenizer(tmp_path)
    if where == "special_tokens_map.json" and named == "decoder":
        (tmp_path / "added_tokens.json").write_text('{"<|user|>": 313, "### End": 314}')
    settings_file = {"tokenizer_class": "GPTNeoXTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_file))
    (tmp_path / where).write_text(json.dumps(settings_file | ADDED[named]))
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    if IS_4 and named == "extra_special_tokens":  # 4 itself reads its older name alone
        older = {"additional_special_tokens": ADDED[named][named]}
        (tmp_path / where).write_text(json.dumps(settings_file | older))
    expected = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = "<|user|>the cat ### End  plain<>[PAD]the"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == expected.encode(text)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert decode(tokenizer, ids) == expected.decode(ids, skip_special_tokens=True)


def test_special_tokens_beyond_the_rows_only_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A "[PAD]" that a tuner added without a row: transformers runs such a checkpoint, too."""
    reference = byte_level_tokenizer()
    reference.add_special_tokens(["[PAD]"])
    reference.save(str(tmp_path / "tokenizer.json"))
    size = reference.get_vocab_size()
    tokenizer = load_tokenizer(tmp_path, size - 1)
    assert tokenizer.encode("[PAD]") == [size - 1]
    assert f"[PAD] ({size - 1})" in caplog.text


def test_ids_with_gaps_decode(tmp_path: Path) -> None:
    tokenizer_file = json.loads(byte_level_tokenizer().to_str())
    vocab = tokenizer_file["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] = 330
    tokenizer_file["added_tokens"] = tokenizer_file["added_tokens"][:2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    assert len(tokenizer) < 330
    assert decode(tokenizer, [330, 329, 10**6, -1]) == tokenizer.decode([330]) != ""
    with pytest.raises(FileError, match=r"331 tokens.*vocab_size 330"):
        load_tokenizer(tmp_path, 330)


@pytest.mark.parametrize("class_name", ["GPTNeoXTokenizer", "GPT2Tokenizer", None])
def test_vocab_and_merges_are_enough(class_name: str | None, tmp_path: Path) -> None:
    byte_level_tokenizer().model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    if class_name:
        named = {"tokenizer_class": class_name, "eos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    elif IS_4:
        (tmp_path / "tokenizer_config.json").write_text("{}")  # it wants the file
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    if IS_4 and class_name != "GPT2Tokenizer":
        assert tokenizer.encode("the cat")
        pytest.skip("transformers 4 itself cannot read these files without tokenizer.json")
    expected = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "the cat 日本 e\u0301<|endoftext|> a"
    assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text)
    assert decode(tokenizer, expected.encode(text)) == expected.decode(
        expected.encode(text), skip_special_tokens=True
    )
    assert tokenizer.eos_token_id == expected.eos_token_id == 0


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_names_the_other_half(name: str, tmp_path: Path) -> None:
    byte_level_tokenizer().model.save(str(tmp_path))
    other = {"vocab.json": "merges.txt", "merges.txt": "vocab.json"}[name]
    (tmp_path / other).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} without {other}"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_broken_settings_of_a_tokenizer_are_named(name: str, content: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=name):
        load_tokenizer(tmp_path, VOCAB_SIZE)


@pytest.mark.skipif(IS_4, reason="transformers 4 reads config.json with the tokenizer")
def test_faults_of_config_json_are_not_the_tokenizers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("chat_template", "model_max_length"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: "{% many"}))
        assert load_tokenizer(tmp_path, VOCAB_SIZE).encode("the cat")
    for content in ("", "[]", '{"model_type": "gpt_neox", "vocab_size": "many"}'):
        (tmp_path / "config.json").write_text(content)
        assert load_tokenizer(tmp_path, VOCAB_SIZE).encode("the cat")


# -- SentencePiece -------------------------------------------------------------------------------


@functools.cache
def sentence_piece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the dog sat on the mat"] * 20),
        model_writer=model,
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<NL>"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentence_piece_file_is_enough(tmp_path: Path, name: str) -> None:
    """Japanese checkpoints have nothing else; ids and text are the processor's own."""
    (tmp_path / name).write_bytes(sentence_piece_model())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece_model())
    text = "the cat 🐈 sat<NL>on the dog"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == processor.encode(text)
    assert len(tokenizer) == processor.get_piece_size()
    assert tokenizer.eos_token_id == processor.piece_to_id("</s>")
    assert "".join(pieces(tokenizer, [*ids, tokenizer.eos_token_id])) == text
    with pytest.raises(FileError, match="vocab_size 10"):
        load_tokenizer(tmp_path, 10)


def slow_tokenizer(path: Path) -> Any:
    """transformers' own, which takes the model as it is; its subclasses rebuild it."""
    module = pytest.importorskip(
        "transformers.tokenization_utils_sentencepiece", reason="transformers 4 has no such class"
    )

    class SlowTokenizer(module.SentencePieceBackend):
        vocab_files_names: ClassVar = {"vocab_file": "spiece.model"}

    return SlowTokenizer.from_pretrained(str(path))


USER, END = "<|user|>", "<|end|>"
ROLES = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
LISTED = {
    "281": {"content": USER, "special": True, "rstrip": True, "lstrip": True},
    "283": {"content": END, "special": False, "normalized": False},
    "300": {"content": " x ", "special": False, "normalized": False},
}
SPM_FILES: dict[str, dict[str, dict[str, Any]]] = {
    "roles": {"tokenizer_config.json": ROLES},
    "pad": {"tokenizer_config.json": ROLES | {"pad_token": "[PAD]", "mask_token": "[MASK]"}},
    "map": {"special_tokens_map.json": ROLES | {"additional_special_tokens": [USER, END]}},
    "added_tokens.json": {
        "tokenizer_config.json": ROLES,
        "added_tokens.json": {USER: 281, END: 282, "[PAD]": 283},
        "special_tokens_map.json": {"additional_special_tokens": [USER], "pad_token": "[PAD]"},
    },
    "added_tokens_decoder": {"tokenizer_config.json": ROLES | {"added_tokens_decoder": LISTED}},
    "eos is added": {
        "tokenizer_config.json": ROLES | {"added_tokens_decoder": LISTED, "eos_token": END}
    },
    "eos is added and in the map only": {
        "tokenizer_config.json": ROLES,
        "added_tokens.json": {END: 281},
        "special_tokens_map.json": {"eos_token": {"content": END, "lstrip": False}},
    },
    "listed, so the map is not read": {
        "tokenizer_config.json": ROLES | {"added_tokens_decoder": LISTED},
        "special_tokens_map.json": {"eos_token": USER},
    },
}


@pytest.mark.parametrize("case", SPM_FILES)
def test_added_tokens_beside_a_sentence_piece_file(case: str, tmp_path: Path) -> None:
    """Ids as transformers' slow tokenizer finds them; special tokens have no text."""
    (tmp_path / "spiece.model").write_bytes(sentence_piece_model())
    for name, content in SPM_FILES[case].items():
        (tmp_path / name).write_text(json.dumps(content))
    expected = slow_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    text = f"<s>the cat  {USER}  the dog{END} on x the </s>mat[PAD]<unk>the<NL>[MASK]"
    ids = tokenizer.encode(text)
    assert ids == expected.encode(text, add_special_tokens=False)
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer.bos_token_id == expected.bos_token_id
    assert not any(t in decode(tokenizer, ids) for t in expected.all_special_tokens)
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)
    assert decode(tokenizer, [VOCAB_SIZE, 299, -1]) == ""
    new = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if not t.special}
    assert all(decode(tokenizer, [i]) == content for i, content in new.items())


def test_only_a_text_begins_with_a_blank_unless_legacy(tmp_path: Path) -> None:
    """As T5Tokenizer with `legacy: false`: a part behind an added token is not a new text."""
    (tmp_path / "spiece.model").write_bytes(sentence_piece_model())
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentence_piece_model())
    for legacy, behind in ((True, ["▁the"]), (False, ["t", "he"])):
        named = ROLES | {"additional_special_tokens": [USER], "legacy": legacy}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
        user = tokenizer.encode(USER)
        assert len(user) == 1
        assert tokenizer.encode("the cat") == processor.encode("the cat")
        ids = tokenizer.encode(f"the{USER}the{USER} the")
        assert ids[:2] == [processor.piece_to_id("▁the"), *user]
        assert [processor.id_to_piece(i) for i in ids[2 : ids.index(user[0], 2)]] == behind
        assert ids[-1] == processor.piece_to_id("▁the")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"<|user|>": "281"}'),
        ("added_tokens.json", '{"": 281}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"281": 3}}'),
    ],
)
def test_broken_added_tokens_are_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(sentence_piece_model())
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=name):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def test_a_damaged_sentence_piece_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(FileError, match=r"spiece\.model is not a SentencePiece model"):
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
