"""Pieces joined are the whole text, and no piece ends within a character."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.inference.detokenize import Detokenizer
from tests.data.small_tokenizer import byte_level, sentence_piece

BYTES, SPACED = byte_level(), sentence_piece()


def pieces(tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(st.lists(st.integers(0, 264), max_size=30))
def test_any_ids_of_a_byte_tokenizer(ids):
    assert "".join(pieces(BYTES, ids)) == decoded(BYTES, ids)


@given(st.text(st.sampled_from("the ab é🙂\n日"), max_size=20))
def test_text_comes_in_whole_characters(text):
    for tokenizer in (BYTES, SPACED):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        given_pieces = pieces(tokenizer, ids)
        assert "".join(given_pieces) == text
        assert not any("\ufffd" in piece for piece in given_pieces)


def test_a_character_waits_for_its_last_byte():
    ids = BYTES("a🙂b")["input_ids"]
    assert pieces(BYTES, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_special_tokens_are_left_out_and_spaces_around_them_stay():
    end = SPACED.eos_token_id
    ids = SPACED("a", add_special_tokens=False)["input_ids"]
    assert pieces(SPACED, [*ids, end, *ids]) == ["a", "", " a", ""]


def test_bytes_that_are_no_character_come_out_in_the_end():
    first = BYTES("é")["input_ids"][0]
    assert pieces(BYTES, [first]) == ["", "\ufffd"]
