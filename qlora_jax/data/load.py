"""A file of rows to a dataset: every row is encoded, kept or dropped, and accounted for."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_jax.data.dataset import Dataset, make_dataset
from qlora_jax.data.encode import TRAIN_ON, RowEncoder
from qlora_jax.data.formats import FORMATS, Fields, Format, format_of
from qlora_jax.data.packing import TokenSequence
from qlora_jax.data.rows import read_rows
from qlora_jax.errors import InputError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("truncate", "drop", "split", "error")


def load_dataset(
    path: Any,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_length: int = 2048,
    packing: bool = True,
    train_on: str = "assistant",
    dataset_format: str = "auto",
    chat_template: str | None = None,
    overlong: str = "truncate",
    skip_invalid: bool = False,
    split: str = "train",
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    r"""Read rows and make token sequences of them, ready for a `Loader`.

        data = load_dataset("train.jsonl", tokenizer, max_seq_length=2048)
        print(*data.statistics.lines(), sep="\n")

    Args:
      path: a .jsonl, .json, .csv, .tsv or .parquet file, a folder with one file a split, a folder
        that `datasets` saved, a `datasets.Dataset`, or any iterable of dicts.
      tokenizer: of the model.
      max_seq_length: tokens of a row, at least 2.
      packing: several sequences a row, kept apart by segment ids; else one, padded to one of at
        most four lengths.
      train_on: assistant, completion or all (encode.py has the table); text trains on all.
      dataset_format: auto, or a name of `FORMATS`.
      chat_template: another template than the tokenizer's.
      overlong: what becomes of a longer row: truncate, drop, split or error; all are counted.
      skip_invalid: skip malformed rows, count them and keep their messages; else the first stops.
      split: which file of a folder.
      progress: called with the number of rows read so far, after each.

    Raises:
      InputError: DATA-..., with file and line where a row is to blame, and never its text; also
        when no row is left.
    """
    check_choice("train_on", train_on, TRAIN_ON)
    check_choice("overlong", overlong, OVERLONG)
    if max_seq_length < 2:
        raise InputError("DATA-LENGTH", "max_seq_length", f"{max_seq_length}", "at least 2")
    events, rejected, notes = Counter(), [], []
    sequences: list[TokenSequence] = []
    encoder = None
    for where, value in read_rows(path, split=split):
        events["rows"] += 1
        try:
            if isinstance(value, InputError):
                raise value
            if encoder is None:
                name = format_of(value, dataset_format, where)
                encoder = RowEncoder(tokenizer, FORMATS[name], train_on, chat_template)
                notes = format_notes(name, FORMATS[name], value, encoder)
            sequence = encoder.encode(value, where)
        except InputError as problem:
            if encoder is None and not isinstance(value, InputError):
                raise  # not this row but the dataset: no row can be read
            if not skip_invalid:
                raise
            events["invalid"] += 1
            rejected.append(str(problem))
        else:
            sequences += fitted(sequence, max_seq_length, overlong, events)
        if progress:
            progress(events["rows"])
    if not sequences:
        raise nothing_left(path, events, max_seq_length)
    return make_dataset(sequences, max_seq_length, packing, events, notes, rejected)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is none of the choices, and name the nearest."""
    if value not in choices:
        hint = listed(nearest(str(value), choices))
        raise InputError("DATA-OPTION", name, f"unknown {value!r}", ", ".join(choices), hint)


def fitted(
    sequence: TokenSequence, max_seq_length: int, overlong: str, events: Counter
) -> Iterator[TokenSequence]:
    """The sequence, or what the policy for long ones leaves of it; the events are counted."""
    ids, trained, where = sequence
    if len(ids) <= max_seq_length:
        yield sequence
        return
    if overlong == "error":
        found = f"the row has {len(ids):,} tokens"
        hint = "overlong=truncate, drop or split, or a larger max_seq_length"
        raise InputError("DATA-LONG", where, found, f"at most {max_seq_length:,}", hint)
    if overlong == "drop":
        events["dropped_long"] += 1
        return
    starts = range(0, len(ids), max_seq_length) if overlong == "split" else (0,)
    cuts = (slice(start, start + max_seq_length) for start in starts)
    pieces = [TokenSequence(ids[cut], trained[cut], where) for cut in cuts]
    kept = [piece for piece in pieces if piece.targets]
    if not kept:
        events["dropped_untrained"] += 1
    elif overlong == "truncate":
        events["truncated"] += 1
    else:
        events["divided"] += 1
        events["pieces_untrained"] += len(pieces) - len(kept)
    yield from kept


def format_notes(name: str, form: Format, fields: Fields, encoder: RowEncoder) -> list[str]:
    """What the first row decided, so that no choice is hidden."""
    notes = [f"format {name}: {form.note}"]
    if unused := [column for column in fields if column not in form.columns + form.optional]:
        notes.append(f"columns not used: {listed(unused)}")
    if form.needs_template:
        return notes
    if encoder.text.eos is None:
        notes.append("the tokenizer has no EOS token: nothing ends a row, no stop is learnt")
    else:
        token = encoder.tokenizer.convert_ids_to_tokens(encoder.text.eos)
        notes.append(f"each row ends with {token} (id {encoder.text.eos}), which is trained")
    return notes


def nothing_left(path: Any, events: Counter, max_seq_length: int) -> InputError:
    """The error of a dataset without a sequence, with the causes and their counts."""
    where = path if isinstance(path, str) or hasattr(path, "__fspath__") else "dataset"
    causes = (
        (events["invalid"], "malformed"),
        (events["dropped_long"], f"longer than max_seq_length={max_seq_length}"),
        (
            events["dropped_untrained"],
            f"all labels masked: no trained token within max_seq_length={max_seq_length}",
        ),
    )
    found = "; ".join(f"{count:,} {cause}" for count, cause in causes if count)
    found = f"empty: none of {events['rows']:,} rows is left" + (f" ({found})" if found else "")
    hint = "a larger max_seq_length" if events["rows"] > events["invalid"] else ""
    return InputError("DATA-EMPTY", where, found, "at least one row", hint)
