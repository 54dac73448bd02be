"""The kernel benchmark without a GPU: what it measures, refuses to time, judges and writes."""

import functools
import itertools
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import contenders, kernels, measuring, peers, speed_bars, speed_table, timing
from benchmarks.contenders import Contender
from pallas_kernels import gpu
from pallas_kernels.backends import Unsupported
from pallas_kernels.cross_entropy import cases as head_cases
from pallas_kernels.nf4_matmul import api, cases
from pallas_kernels.nf4_matmul.cases import Case

H100 = gpu.KNOWN["h100"]
ROW = {
    **{"op": str, "model": str, "projection": str, "direction": str, "contender": str},
    **{"m": int | None, "n": int, "k": int, "calls": int},
    **{"ours": bool, "chosen": bool, "cold": bool | None, "outcome": str, "reason": str | None},
    **{"error": float | None, "worst": float | None, "weight_bytes": int | None},
    **{"seconds": float | None, "low": float | None, "high": float | None},
    **{"bandwidth_share": float | None, "flops_share": float | None},
}
BAR = {
    **{"model": str, "projection": str, "m": int, "n": int, "k": int, "direction": str},
    **{"contender": str, "bar": str, "against": str, "at_least": float, "value": float | None},
    "holds": bool | None,
}
FOUND = {
    **{"date": str, "gpu": str, "interpreted": bool, "bandwidth": float, "flops": float},
    **{"driver": str | None, "versions": dict, "double_quantized": bool, "repetitions": int},
    **{"how": str, "rows": list, "bars": list},
}


def has_schema(found: dict, schema: dict) -> bool:
    return found.keys() == schema.keys() and all(isinstance(found[k], schema[k]) for k in schema)


@pytest.mark.slow
def test_end_to_end_on_tiny_cases(monkeypatch, tmp_path, capsys):
    tiny = (Case("tiny", "decode", 3, 64, 192), Case("tiny", "training", 64, 72, 128))
    monkeypatch.setattr(cases, "TINY", tiny)
    monkeypatch.setattr(head_cases, "TINY", (Case("tiny", "head", 70, 300, 64),))
    out = tmp_path / "found.json"
    assert kernels.main(["--interpret", "h100", "--out", str(out)]) == 0

    found = json.loads(out.read_text())
    assert has_schema(found, FOUND)
    assert found["interpreted"]
    assert all(has_schema(row, ROW) for row in found["rows"])
    assert all(has_schema(bar, BAR) for bar in found["bars"])
    assert {row["op"] for row in found["rows"]} == set(kernels.OPS)
    for row in found["rows"]:
        assert row["outcome"] in ("timed", "refused"), row
        assert (row["seconds"] is not None) == (row["outcome"] == "timed")
        assert bool(row["reason"]) == (row["outcome"] == "refused")
    products = speed_bars.by_product(found["rows"])
    assert len(products) == 2 * len(tiny)
    for rows in products.values():
        by_name = {row["contender"]: row for row in rows}
        assert by_name.keys() >= {*api.BACKENDS, "bf16", "dequantize + bf16"}
        assert by_name["bf16"]["outcome"] == "timed"
        (chosen,) = (row for row in rows if row["chosen"])
        assert chosen["contender"] in api.GPU_BACKENDS
        assert chosen["outcome"] == "timed"
    shown = capsys.readouterr().out
    assert "INTERPRETED ON THE CPU" in shown
    assert "refused, nf4_matmul cpu: layout is 'bnb'" in shown


def test_without_a_gpu_it_says_what_works(capsys):
    assert kernels.main([]) == 2
    assert "--interpret h100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--ops=matmul", "the ops are nf4_matmul"), ("--models=llama", "the models are square")],
)
def test_arguments_that_name_nothing(argument, message, capsys):
    with pytest.raises(SystemExit):
        kernels.main([argument])
    assert message in capsys.readouterr().err


def problem(*found, allowed=4e-3):
    """Twice the weight, by contenders `found`."""
    return contenders.Problem(
        op="nf4_matmul",
        case=Case("made", "up", 4, 4, 4),
        direction="forward",
        x=jnp.float32(2),
        weight=lambda seed: jnp.arange(1.0, 17.0).reshape(4, 4) + seed,
        exact=lambda x, w: x * w,
        flops=16,
        moved=64,
        chosen="right",
        contenders=found,
        allowed=allowed,
    )


def refusing(x, w):
    raise Unsupported("refuses: w is not to its liking")


def failing(x, w):
    raise RuntimeError("out of memory\nand much more")


def one_wrong_number(x, w):
    return (x * w).at[0, 0].add(4.0)


def test_only_what_is_right_is_timed():
    rows = measuring.measure(
        problem(
            Contender("right", lambda x, w: x * w, ours=True),
            Contender("wrong", lambda x, w: x * w * 1.01, ours=True),
            Contender("nan", lambda x, w: (x * w).at[0, 0].set(jnp.nan)),
            Contender("one", one_wrong_number, ours=True),
            Contender("refuses", refusing, ours=True),
            Contender("fails", failing),
            Contender("half", lambda x, w: w * 4, store=lambda w: w / 2),
        ),
        H100,
        3,
        None,
        None,
    )
    assert all(has_schema(row, ROW) for row in rows)
    outcomes = {row["contender"]: row["outcome"] for row in rows}
    assert outcomes == {
        **{"right": "timed", "wrong": "wrong", "nan": "wrong", "one": "wrong"},
        **{"refuses": "refused", "fails": "failed", "half": "timed"},
    }
    by_name = {row["contender"]: row for row in rows}
    assert [row["contender"] for row in rows if row["seconds"]] == ["right", "half"]
    right = by_name["right"]
    assert right["chosen"]
    assert right["low"] <= right["seconds"] <= right["high"]
    assert right["flops_share"] == 16 / right["seconds"] / H100.flops
    assert right["bandwidth_share"] == (64 + 64) / right["seconds"] / H100.bandwidth
    assert by_name["nan"]["error"] is None
    assert by_name["one"]["error"] > 4e-3
    assert by_name["fails"]["reason"] == "RuntimeError: out of memory"
    assert by_name["refuses"]["reason"] == "w is not to its liking"


def test_one_wrong_number_is_wrong_though_the_norm_allows_it():
    call = Contender("one", one_wrong_number)
    (row,) = measuring.measure(problem(call, allowed=0.1), H100, 1, 2, None)
    assert row["error"] < 0.1
    assert row["outcome"] == "wrong"


@pytest.mark.slow
def test_lora_the_loss_and_attention_are_right_by_their_plain_forms():
    """Also where no kernel can be asked: their exact results are not made by themselves."""
    case = Case("made", "up", 8, 32, 64)
    for made in (
        contenders.lora_matmul(case, double=True),
        contenders.head_loss(case),
        contenders.attention(Case("made", "up", 8, 64, 16)),
    ):
        rows = measuring.measure(made, H100, 1, 1, None)
        assert [row["outcome"] for row in rows if row["chosen"]] == ["timed"]
        assert {row["outcome"] for row in rows} <= {"timed", "refused"}


def test_calls_are_enough_to_empty_the_cache():
    assert timing.calls(8_912_896, H100.l2_bytes) == 18
    assert timing.calls(10**9, H100.l2_bytes) == timing.FEWEST
    assert timing.calls(1000, H100.l2_bytes) == timing.MOST


def test_contenders_take_turns():
    order, values = [], {"a": iter((5.0, 1.0, 2.0)), "b": iter((1.0, 1.0, 1.0))}

    def run(name):
        order.append(name)
        return next(values[name])

    found = timing.in_turn({name: functools.partial(run, name) for name in "ab"}, 3)
    assert order == list("abbaab")
    assert found["a"] == timing.Timing(median=2.0, low=1.5, high=3.5)
    assert timing.in_turn({}, 3) == {}


@pytest.mark.parametrize("count", [1, 2, 3, 6, 10])
def test_a_turn_favours_no_contender(count):
    turns = [timing.order(count, turn) for turn in range(count)]
    assert all(sorted(places) == list(range(count)) for places in zip(*turns, strict=True))
    behind = [pair for turn in turns for pair in itertools.pairwise(turn)]
    if count % 2 == 0:
        assert sorted(behind) == list(itertools.permutations(range(count), 2))


def test_every_call_of_a_program_has_its_own_weight():
    run = timing.program(lambda x, w: x + w, jnp.ones(3), [jnp.ones(3), jnp.zeros(3)])
    assert jax.tree.map(float, [y[0] for y in run()]) == [2.0, 1.0]


def made_up(m, contender, microseconds, chosen=False, share=None):
    return {
        "op": "nf4_matmul",
        **dict(zip(speed_bars.PRODUCT, ("made", "up", m, 64, 64, "forward"), strict=True)),
        **{"contender": contender, "seconds": microseconds and microseconds * 1e-6},
        **{"chosen": chosen, "bandwidth_share": share},
    }


@pytest.mark.parametrize(
    ("m", "share", "others", "holds"),
    [
        (1, 0.8, {"bf16": 31, "bitsandbytes": 20, "bitsandbytes gemv": 14}, [True, True, True]),
        (1, 0.7, {"bf16": 29, "bitsandbytes": 20, "bitsandbytes gemv": 12}, [False] * 3),
        (16, None, {"bf16": 31}, [None, True, None]),
        (64, 0.1, {"bf16": 11, "bitsandbytes": 9}, [True, False]),
        (1024, 0.1, {"bf16": 1}, []),
        (2048, 0.1, {"bf16": 9.4}, [False]),
        (4096, 0.1, {"bf16": 9.6}, [True]),
    ],
)
def test_bars(m, share, others, holds):
    rows = [made_up(m, "ours", 10, chosen=True, share=share), made_up(m, "other", 1)]
    rows += [made_up(m, name, microseconds) for name, microseconds in others.items()]
    found = list(speed_bars.judged(rows))
    assert [bar["holds"] for bar in found] == holds
    assert all(has_schema(bar, BAR) for bar in found)


def test_no_bar_without_a_time_of_our_own():
    rows = [made_up(1, "ours", None, chosen=True), made_up(1, "bf16", 3)]
    assert list(speed_bars.judged(rows)) == []


def test_a_file_is_named_by_its_gpu():
    found = {"gpu": H100.name, "date": "2026-11-24"}
    assert kernels.file_name(found) == "kernels-nvidia-h100-80gb-hbm3-2026-11-24.json"


def test_how_bars_read():
    rows = [made_up(1, "ours", 10, chosen=True, share=0.61), made_up(1, "bf16", 34.6)]
    key = ("nf4_matmul", "made", "up", 1, 64, 64, "forward")
    expected = "NO bandwidth 0.61 (0.75), ok bf16 3.46 (3), ? bitsandbytes (1.3)"
    assert speed_table.bars(list(speed_bars.judged(rows)), key) == expected


PEER = """
import json, sys
print(json.dumps({"versions": {"bitsandbytes": "9"}, "device": "cpu"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "run" in request:
        answer = {"seconds": 0.5}
    elif request["prepare"]["m"] == 5:
        answer = {"error": "RuntimeError: no kernel image"}
    else:
        assert request["prepare"]["double"]
        answer = {"names": ["bitsandbytes", "bitsandbytes gemv"]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def command(tmp_path):
    """That starts the program above."""
    (tmp_path / "peer.py").write_text(PEER)
    return shlex.join([sys.executable, str(tmp_path / "peer.py")])


def test_bitsandbytes_in_a_process_of_its_own(command):
    with peers.Bitsandbytes(command, double=True) as peer:
        assert peer.versions["bitsandbytes"] == "9"
        made = problem(Contender("right", lambda x, w: x * w))
        rows = measuring.measure(made, H100, 2, 2, peer)
        assert [row["contender"] for row in rows][1:] == ["bitsandbytes", "bitsandbytes gemv"]
        assert {row["seconds"] for row in rows[1:]} == {0.5}
        with pytest.raises(peers.PeerError, match="no kernel image"):
            peer.prepare(op="nf4_matmul", m=5, n=64, k=64, direction="forward", calls=1)


def test_a_program_that_is_none():
    with pytest.raises(peers.PeerError, match="ended with code 1"):
        peers.Bitsandbytes("/bin/false", double=True)
    with pytest.raises(peers.PeerError, match="No such file or directory: '/no/python'"):
        peers.Bitsandbytes("/no/python", double=True)
