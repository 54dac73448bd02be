"""What is read from a compiled program's text, and that each fault planted in it is found."""

import pytest

from benchmarks.host_copies import bodies, faults, report

LAYERS, BYTES = 4, 4096 * 7168
HOST, DEVICE = "u8[4,4096,7168]{2,1,0:S(5)}", "u8[1,4096,7168]{2,1,0}"
# As jax 0.12.0.1 and 0.11.2 write a slice's walk.
NEW = '{{"loop_index":"0","byte_offset":"0","byte_stride":"0","linear":{walk}}}'
OLD = '{{"loop_index":"0",{walk}}}'


def walk(first, step, form=NEW):
    """The annotation of a slice that begins at entry `first` and moves on by `step`."""
    words = f'"byte_offset":"{first * BYTES}","byte_stride":"{step * BYTES}"'
    config = form.format(walk=words if form is OLD else "{" + words + "}")
    return f', backend_config={{"operation_queue_id":"0","dynamic_slice_config":{config}}}'


def sliced(name, config):
    """A computation that cuts one layer out of the stack."""
    return f"""
%{name} (p0: u8[4,4096,7168], p1: s32[]) -> u8[1,4096,7168] {{
  %p0 = {HOST} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = {DEVICE} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={{1,4096,7168}}{config}
}}
"""


START = f"  %start = (({HOST}, s32[]), {DEVICE}, u32[]) fusion-start(%stack, %j), kind=kLoop, "
DONE = f"  %done = {DEVICE} fusion-done(%start)\n"
WRITE = """  %put-start = ((bf16[4,1024,4096]{2,1,0:S(5)}, bf16[1,1024,4096]{2,1,0}, s32[]), \
bf16[4,1024,4096]{2,1,0:S(5)}, u32[]) fusion-start(%kept, %x, %j), kind=kLoop, calls=%written
"""
WRITE_DONE = "  %put-done = bf16[4,1024,4096]{2,1,0:S(5)} fusion-done(%put-start)\n"
PRODUCTS = """  %ours = bf16[1024,4096] custom-call(%x), custom_call_target="mosaic_gpu_v2"
  %dots = f32[1024,16]{1,0} fusion(%x), kind=kCustom, calls=%product
  %attended = (bf16[8,128,128]{2,1,0}) while(%x), condition=%c, body=%attention, \
backend_config={"known_trip_count":{"n":"4"}}
"""


def loop(name, slices, between=PRODUCTS, behind=""):
    """A loop's body that begins with a copy and ends it behind `between`."""
    head = f"%{name} (arg: (s32[])) -> (s32[]) {{\n"
    stack = f"  %stack = {HOST} get-tuple-element(%arg), index=1\n"
    kept = "  %kept = bf16[4,1024,4096]{2,1,0:S(5)} get-tuple-element(%arg), index=2\n"
    x = "  %x = bf16[1,1024,4096]{2,1,0} get-tuple-element(%arg), index=3\n"
    copies = f"{START}calls=%{slices}\n{between}{DONE}{behind}"
    return f"{head}{stack}{kept}{x}{copies}  ROOT %end = (s32[]) tuple(%j)\n}}\n"


def program(
    forward=None,
    backward=None,
    ahead=None,
    behind=None,
    first="  %all = (f32[4]{0}, f32[4]{0:S(5)}, u32[]) copy-start(%numbers)\n",
):
    """A streamed step, as XLA prints it, with some parts replaced."""
    ahead = walk(1, 1) if ahead is None else ahead
    behind = walk(2, -1) if behind is None else behind
    stashed = f"{WRITE}{PRODUCTS}{WRITE_DONE}"
    return f"""HloModule jit_step, is_scheduled=true
{sliced("ahead", ahead)}{sliced("behind", behind)}
%written (p0: bf16[4,1024,4096]) -> bf16[4,1024,4096] {{
  ROOT %put = bf16[4,1024,4096]{{2,1,0:S(5)}} dynamic-update-slice(%p0, %p1, %p2), \
backend_config={{"dynamic_slice_config":{{"loop_index":"0",\
"byte_offset":"0","byte_stride":"8388608"}}}}
}}

%product (p0: bf16[1024,4096]) -> f32[1024,16] {{
  ROOT %dot = f32[1024,16]{{1,0}} dot(%p0, %p0), lhs_contracting_dims={{1}}
}}

%attention (arg: (s32[])) -> (s32[]) {{
  %scores = f32[128,128]{{1,0}} dot(%q, %k), lhs_contracting_dims={{1}}
}}

{forward or loop("forward", "ahead", stashed)}
{backward or loop("backward", "behind")}
ENTRY %main (numbers: f32[4]) -> f32[] {{
  %numbers = f32[4]{{0:S(5)}} parameter(0)
  %codes = {HOST} parameter(1)
{first}  %one = (s32[]) while(%t), condition=%c, body=%forward, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %two = (s32[]) while(%t), condition=%c, body=%backward, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""


def found(text, layer_bytes=BYTES):
    return faults(bodies(text), LAYERS, layer_bytes)


def test_what_is_read():
    outside, forward, backward = bodies(program())
    assert (outside.trips, forward.trips, backward.trips) == (None, 3, 3)
    assert (forward.products, backward.products) == (3, 3)
    assert [copy.nbytes for copy in outside.copies] == [16]
    ahead, put = forward.copies
    assert (ahead.nbytes, ahead.leaves, ahead.memcpy, ahead.beside) == (BYTES, False, True, 3)
    assert (ahead.offset, ahead.stride) == (BYTES, BYTES)
    assert (put.nbytes, put.leaves, put.memcpy, put.beside) == (1024 * 4096 * 2, True, True, 3)
    assert (backward.copies[0].offset, backward.copies[0].stride) == (2 * BYTES, -BYTES)


def test_a_good_program_has_no_fault():
    assert found(program()) == []
    assert report(bodies(program()), LAYERS) == [
        "outside loops; 0.0 MB from the host; all memcpy; 2 products",
        "forward of 3 turns; 29.4 MB from the host, 100% hidden; "
        "8.4 MB to the host, 100% hidden; all memcpy; 3 products",
        "backward of 3 turns; 29.4 MB from the host, 100% hidden; all memcpy; 3 products",
    ]


def test_the_older_annotation_is_read_too():
    assert found(program(ahead=walk(1, 1, OLD), behind=walk(2, -1, OLD))) == []


WAITED_FOR = f"  %cut = {DEVICE} fusion(%stack, %j), kind=kLoop, calls=%behind\n"
FIRST = f"  %first = (({HOST}, s32[]), {DEVICE}, u32[]) fusion-start(%codes, %zero), calls=%ahead\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (program(ahead=""), "a loop of 3 turns: 1 kernels move 29360128 bytes"),
        (program(ahead="", first=FIRST), "outside loops: 1 kernels"),
        (program(behind=walk(0, 1)), "backward: a slice of 29360128 bytes from 0 by 29360128"),
        (program(behind=walk(3, -1)), "backward: a slice of 29360128 bytes from 88080384"),
        (program(ahead=walk(0, 1)), "forward: a slice of 29360128 bytes from 0"),
        (program(forward=loop("forward", "ahead", "", PRODUCTS)), "forward: 0% of the bytes"),
        (program(backward=loop("backward", "behind", "", PRODUCTS)), "backward: 0% of the bytes"),
        (
            program(forward=loop("forward", "ahead", WRITE + WRITE_DONE + PRODUCTS)),
            "forward: 0% of the bytes",
        ),
        (program(backward=loop("backward", "behind", PRODUCTS + WAITED_FOR)), "backward: 50%"),
        (program().replace('"n":"3"', '"n":"2"'), "0 loops over layers"),
        (program().replace("S(5)", "S(0)"), "0 loops over layers"),
    ],
)
def test_a_planted_fault_is_found(text, said):
    assert said in "\n".join(found(text))


def test_a_layer_that_is_not_all_there():
    assert found(program(), BYTES + 1) == [
        f"{name}: {BYTES} bytes a layer, not {BYTES + 1}" for name in ("forward", "backward")
    ]
