"""The reader of machine code, on a few lines in the form that nvdisasm gives them."""

import pytest

from benchmarks import sass
from pallas_kernels.nf4_matmul import decode

# A loop of the decode's permutes that waits for a copy: ptxas moved the waiting behind the end, and
# the way back from there into the loop is no loop. Before it a loop without weights, whose jump
# has its condition as an operand; around both an outer loop.
KERNEL = """
	.target	sm_90a
kernel_mosaic_gpu_kernel:
.text.kernel_mosaic_gpu_kernel:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] 
.L_x_9:
   -:-:-:Y:01        /*0010*/                   UMOV UR4, URZ 
.L_x_1:
   -:-:-:Y:02        /*0020*/                   UIADD3 UR4, UR4, 0x1, URZ 
   -:-:-:Y:02        /*0030*/                   UISETP.NE.U32.AND UP0, UPT, UR4, UR5, UPT 
   -:-:-:Y:05        /*0040*/                   BRA.U UP0, `(.L_x_1) 
.L_x_8:
   -:-:1:Y:01        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR14], R20 
 2&1:-:-:Y:09        /*0060*/              @!P1 BRA `(.L_x_5) 
.L_x_10:
   -:-:1:Y:01        /*0070*/                   LDSM.16.M88.4 R20, [R21] 
   -:-:-:Y:02        /*0080*/                   PRMT R21, R4, R152.reuse, R5 
   -:-:-:Y:02        /*0090*/                   PRMT R22, R21, 0x4051, R20 
   -:-:-:Y:02        /*00a0*/                   PRMT R23, R21, 0x6273, R20 
   -:-:-:Y:01        /*00b0*/                   HMUL2.BF16_V2 R22, R22, R24 
   -:-:-:Y:01        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], R24 
   -:-:-:Y:09        /*00d0*/               @P1 BRA `(.L_x_8) 
   -:-:-:Y:05        /*00e0*/               @P2 BRA `(.L_x_9) 
   -:-:-:Y:05        /*00f0*/                   BRA.DIV ~UR4, `(.L_x_9) 
   -:-:-:Y:05        /*0100*/                   EXIT 
.L_x_5:
   -:-:-:Y:01        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR14], R20 
 2&1:-:-:Y:05        /*0120*/              @!P1 BRA `(.L_x_5) 
   -:-:-:Y:05        /*0130*/                   BRA `(.L_x_10) 
.L_x_12:
   -:-:-:-:00        /*0140*/                   BRA `(.L_x_12)
"""  # noqa: W291

UNROLLED = """
   -:-:-:Y:01        /*0000*/                   PRMT R0, R58, 0x9910, RZ 
   -:-:1:Y:01        /*0010*/                   LDS R20, [R21] 
   -:-:-:Y:02        /*0020*/                   PRMT R22, R21, 0x4051, R20 
   -:-:-:Y:02        /*0030*/                   PRMT R23, R21, 0x6273, R20 
   -:-:-:Y:02        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R22, R4 
   -:-:-:Y:01        /*0050*/                   STG.E [R2], R4 
   -:-:-:Y:05        /*0060*/                   EXIT 
"""  # noqa: W291


def test_lines_are_read():
    instructions, labels = sass.parse(KERNEL)
    assert len(instructions) == 21
    assert instructions[6] == sass.Instruction("!P1", "BRA", "`(.L_x_5) ")
    assert instructions[4].name == "BRA.U"
    assert labels[".L_x_10"] == 7


def test_loops_are_found_and_no_others():
    loops = sass.loops(KERNEL)
    assert [len(loop.instructions) for loop in loops] == [2, 3, 9, 2]  # outer, counting, main, wait
    assert [loop.weights for loop in loops] == [0, 0, 4, 0]


def test_the_main_loop_is_counted():
    loop = sass.main_loop(KERNEL)
    assert (loop.counts["PRMT"], loop.counts["BRA"]) == (3, 2)
    assert (loop.half_rate, loop.matrix) == (3, 1)
    assert loop.weights == 4
    assert loop.multiply_adds == 64 * 128 * 16 // 4


def test_a_loop_that_was_unrolled_is_counted_from_its_first_load_to_its_last_product():
    assert sass.loops(UNROLLED) == []
    loop = sass.main_loop(UNROLLED)
    assert [each.operation for each in loop.instructions] == ["LDS", "PRMT", "PRMT", "HMMA"]
    assert (loop.weights, loop.multiply_adds) == (4, 16 * 8 * 16)


def test_a_kernel_that_decodes_nothing_has_no_main_loop():
    assert sass.main_loop(KERNEL.replace("0x4051", "0x5410").replace("0x6273", "0x5410")) is None


@pytest.mark.parametrize(
    ("operands", "leaves"), [("`(.L_x_1)", True), ("UP0, `(.L_x_1)", False), ("!UP2, `(.L)", False)]
)
def test_a_jump_may_have_its_condition_as_an_operand(operands, leaves):
    assert sass.Instruction(None, "BRA.U", operands).always_leaves == leaves


def test_the_decode_ends_with_the_permutes_that_are_counted():
    for word in sass.LAST_PERMUTES:
        assert str(int(word, 16)) in decode.PTX


def test_each_of_those_permutes_completes_two_weights():
    permutes = [line for line in decode.PTX.split(";") if "prmt" in line]
    last = [line for line in permutes if any(str(int(w, 16)) in line for w in sass.LAST_PERMUTES)]
    assert 2 * len(last) == 8  # the weights of 4 bytes of codes
