"""Every format by its columns, and the ids and masks of its rows."""

import pytest

from qlora_jax.data import load_dataset
from qlora_jax.data.encode import RowEncoder, TextEncoder, last_run
from qlora_jax.data.formats import FORMATS, check_roles, format_of
from qlora_jax.errors import InputError
from tests.data.small_tokenizer import byte_level, sentence_piece

PROMPT = {"prompt": "the a", "completion": "b in"}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "second"},
]


def encoded(row, tokenizer=None, **options):
    """The row's text, and its trained text."""
    tokenizer = tokenizer or byte_level()
    form = FORMATS[format_of(row, "auto", "row")]
    ids, trained, _ = RowEncoder(tokenizer, form, **options).encode(row, "row")
    return tokenizer.decode(ids), tokenizer.decode(ids[trained])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "a"}, "text"),
        (PROMPT, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"question": "a", "answer": "b"}, "question_answer"),
        ({"messages": CHAT, "text": "the chat as text"}, "messages"),
        ({"id": 5, "conversations": []}, "sharegpt"),
    ],
)
def test_formats_by_columns(row, name):
    assert format_of(row, "auto", "row") == name


def test_columns_that_match_nothing_are_listed():
    with pytest.raises(InputError) as caught:
        load_dataset([{"txet": "a", "label": 1}], byte_level(), max_seq_length=8, skip_invalid=True)
    assert str(caught.value) == (
        "error[DATA-COLUMNS]: row 1: columns txet, label match no format (expected messages; "
        "conversations; prompt+completion; instruction+output; question+answer; text). "
        "Try: rename the columns."
    )


def test_an_unknown_format_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown 'alpaka'.*Try: alpaca"):
        format_of({}, "alpaka", "row")


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
def test_text_trains_on_all(train_on):
    assert encoded({"text": "the ab"}, train_on=train_on) == ("the ab<|end|>",) * 2


def test_prompt_and_completion():
    assert encoded(PROMPT) == ("the ab in<|end|>", "b in<|end|>")
    assert encoded(PROMPT, train_on="completion") == ("the ab in<|end|>", "b in<|end|>")
    assert encoded(PROMPT, train_on="all") == ("the ab in<|end|>",) * 2


def test_no_token_straddles_the_boundary():
    """`a` + `b` is one token of the vocabulary; apart they stay two, and the prompt stays whole."""
    tokenizer = byte_level()
    together = tokenizer("the ab in")["input_ids"]
    ids, trained, _ = RowEncoder(tokenizer, FORMATS["prompt_completion"]).encode(PROMPT, "row")
    prompt = tokenizer("the a")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("ab") in together
    assert tokenizer.convert_tokens_to_ids("ab") not in ids
    assert ids[~trained].tolist() == prompt == TextEncoder(tokenizer).start("the a")


def test_eos_once_and_not_at_all_without_one():
    assert encoded({"text": "ab<|end|>"})[0] == "ab<|end|>"
    assert encoded({"text": "abc"}, byte_level(eos=False))[0] == "abc"
    notes = load_dataset(
        [{"text": "abc"}], byte_level(eos=False), max_seq_length=8
    ).statistics.notes
    assert notes[-1] == "the tokenizer has no EOS token: nothing ends a row, no stop is learnt"
    notes = load_dataset([{"text": "ab"}], byte_level(), max_seq_length=8).statistics.notes
    assert notes[-1] == "each row ends with <|end|> (id 0), which is trained"


def test_bos_once_and_only_where_the_tokenizer_puts_it():
    assert encoded({"text": "ab"}, byte_level(bos=True))[0] == "<|bos|>ab<|end|>"
    assert encoded({"text": "<|bos|>ab"}, byte_level(bos=True))[0] == "<|bos|>ab<|end|>"
    assert encoded({"text": "ab"}, byte_level())[0] == "ab<|end|>"
    assert encoded(PROMPT, byte_level(bos=True)) == ("<|bos|>the ab in<|end|>", "b in<|end|>")


@pytest.mark.parametrize("completion", ["cd", " cd", "\ncd", "\n\n cd", "é"])
def test_sentencepiece_gets_no_space_inside(completion):
    """Llama 2's tokenizer puts a space before each text; a completion goes on behind its prompt."""
    tokenizer = sentence_piece()
    row = {"prompt": "b:", "completion": completion}
    ids, trained, _ = RowEncoder(tokenizer, FORMATS["prompt_completion"]).encode(row, "row")
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"b:{completion}"
    assert ids[~trained].tolist() == tokenizer("b:")["input_ids"]


def test_alpaca_has_the_words_of_stanford():
    with_input = {"instruction": "Add.", "input": "2 3", "output": "5"}
    assert encoded(with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n5<|end|>",
        "5<|end|>",
    )
    without = {"instruction": "Hi {x}", "input": "", "output": "5"}
    assert encoded(without)[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi {x}\n\n### Response:\n5<|end|>"
    )
    with pytest.raises(InputError, match="field input is a number"):
        encoded({"instruction": "a", "input": 5, "output": "b"})


def test_question_and_answer():
    row = {"question": "2?", "answer": "two"}
    assert encoded(row) == ("Question: 2?\nAnswer: two<|end|>", " two<|end|>")


def test_messages_by_what_is_trained():
    row = {"messages": CHAT}
    whole, assistant = encoded(row)
    assert whole.endswith("<|start|>assistant\nsecond<|end|>\n")
    assert assistant == "first<|end|>second<|end|>"
    assert encoded(row, train_on="completion")[1] == "second<|end|>"
    assert encoded(row, train_on="all") == (whole, whole)


def test_sharegpt_is_messages_by_other_names():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]}
    assert encoded(row) == encoded({"messages": CHAT})
    with pytest.raises(InputError, match="message 1 has no known role"):
        encoded({"conversations": [{"from": "narrator", "value": "x"}]})
    with pytest.raises(InputError, match="message 1: value is missing"):
        encoded({"conversations": [{"from": "human"}]})


def test_tool_messages_follow_the_call():
    check_roles(["system", "user", "assistant", "tool", "tool", "assistant", "user"], "row")
    with pytest.raises(InputError, match=r"message 2 \(tool\) follows user"):
        check_roles(["user", "tool"], "row")
    with pytest.raises(InputError, match=r"\(user\) follows tool \(expected tool or assistant\)"):
        check_roles(["user", "assistant", "tool", "user"], "row")


def test_messages_without_a_template_are_no_fault_of_a_row():
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="CHAT-NONE"):
        load_dataset([{"messages": CHAT}], tokenizer, max_seq_length=64, skip_invalid=True)


def test_another_template_is_taken():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    whole, trained = encoded({"messages": CHAT[1:3]}, chat_template=template)
    assert (whole, trained) == ("[user]u<|end|>[assistant]first<|end|>", "first<|end|>")


def test_a_template_s_own_error_names_the_row():
    template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"row 1: "):
        load_dataset([{"messages": CHAT}], byte_level(), max_seq_length=9, chat_template=template)


def test_columns_without_use_are_told():
    row = {"instruction": "a", "input": "", "output": "b", "id": 5, "source": "x"}
    notes = load_dataset([row], byte_level(), max_seq_length=512).statistics.notes
    assert notes[:2] == (
        "format alpaca: instruction and input are read as Alpaca's prompt, output as completion",
        "columns not used: id, source",
    )


def test_last_run():
    assert last_run([False, True, False, True, True, False]) == [False] * 3 + [True] * 2 + [False]
    assert last_run([True, True]) == [True, True]
    assert last_run([False]) == [False]
