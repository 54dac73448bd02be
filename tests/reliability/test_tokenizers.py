"""R26: a crafted tokenizer.json is refused, and the process that reads it lives on.

Not in a child, although tokenizers is Rust that panics: reading SmolLM2's file a second time, in a
process that imports nothing else, takes 0.3 s, and Gemma's vocabulary is five times as large. What
is known to end its process (a charsmap that claims 4 GB did) is checked before, a panic is caught,
and of 1500 files damaged at random none ended the process.
"""

import base64
import json

from tests.data.test_tokenizer import BAD_JSON
from tests.reliability import clean

RULE = "R26"


def document(**changes) -> dict:
    """A good tokenizer.json with parts replaced, its model's or its own."""
    found = clean.tokenizer_json()
    for key, value in changes.items():
        (found["model"] if key in found["model"] else found)[key] = value
    return found


def nested(depth: int) -> str:
    """A file whose normalizer is so deep; json.dumps would not write it."""
    start, end = '{"type": "Sequence", "normalizers": [' * depth, "]}" * depth
    whole = json.dumps(document(normalizer="HERE"))
    return whole.replace('"HERE"', f'{start}{{"type": "NFC"}}{end}')


def unigram(**changes) -> dict:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    return document(model=model | {"byte_fallback": False} | changes, added_tokens=[])


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def charsmap(data: bytes) -> dict:
    part = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
    return document(normalizer=part)


LATE = {"id": 2**21 - 1, **clean.special("late")}
CRAFTED = {
    "nested 100": nested(100),
    "nested 5000": nested(5000),
    "open group": document(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(((("}}),
    "long pattern": document(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(a{1000}){1000}" * 99}}),
    "no charsmap": charsmap(b""),
    "charsmap of 4 GB": charsmap(b"\xfc" + b"\xff" * 63),
    "charsmap of 3 bytes": charsmap(b"\3\0\0\0abc"),
    "charsmap not UTF-8": charsmap(b"\4\0\0\0" + b"\0" * 4 + b"\xff"),
    "dropout 5": document(dropout=5.0),
    "unknown unk": document(unk_token="none"),
    "unk_id out of range": unigram(unk_id=2**40),
    "unk_id negative": unigram(unk_id=-1),
    "empty piece": unigram(vocab=[["", 0.0], ["", 0.0]]),
    "an id far behind": document(added_tokens=[LATE]),
    "two of one id": document(added_tokens=[LATE, LATE | {"content": "x"}]),
    "type 2^63": document(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 2**63}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "decoder of nothing": document(decoder={"type": "Sequence", "decoders": [{"type": "x"}]}),
    "BPE of a list": document(vocab=["a"]),
    "WordPiece without prefix": document(model={"type": "WordPiece", "vocab": {"a": 0}}),
}
# What a tokenizer may well have; it must load and go on.
GOOD = {"long pattern", "unknown unk", "empty piece", "an id far behind"}


def as_bytes(content) -> bytes:
    content = json.dumps(content) if isinstance(content, dict) else content
    return content.encode() if isinstance(content, str) else content


def test_crafted_files(tmp_path, worker_of, record_property):
    cases = {**{name: content for name, _, content in BAD_JSON}, **CRAFTED}
    pristine, folder = clean.tokenizer(tmp_path / "clean"), clean.tokenizer(tmp_path / "case")
    wrong, reports = [], []
    worker = worker_of("tokenizer")
    worker.learn(pristine)
    for name, content in cases.items():
        (folder / "tokenizer.json").write_bytes(as_bytes(content))
        report = worker.load(folder)
        reports.append(report)
        good = report.outcome == "loaded"
        refused = report.outcome == "refused" and report.code.startswith("TOK-")
        if not (good if name in GOOD else refused):
            wrong.append((name, report))
    (folder / "tokenizer.json").write_bytes((pristine / "tokenizer.json").read_bytes())
    assert worker.load(folder).outcome == "loaded"
    record_property("cases", len(cases))
    record_property("passed", len(cases) - len(wrong))
    record_property("slowest_seconds", max(report.seconds for report in reports))
    record_property("largest_rss_growth_bytes", max(report.grown for report in reports))
    assert wrong == []
    assert max(report.seconds for report in reports) < 2
