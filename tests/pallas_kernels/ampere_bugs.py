"""Bugs for the Ampere kernel, whose copies the interpreter makes by TMA."""

from tests.pallas_kernels.planted import Bug

LONG, RAGGED, SHARED, TALL = range(4)

BUGS = (
    Bug(
        "a slot is refilled before its reads are committed",
        "            plgpu.commit_smem()\n",
        "            pass\n",
        ("race",),
        "ampere",
    ),
    Bug(
        "every chunk multiplies the first rows of x",
        "fragments.read_x(x_s.at[pl.ds(row, chunk)]",
        "fragments.read_x(x_s.at[pl.ds(0 * row, chunk)]",
        ("numbers",),
        "ampere",
    ),
    Bug(
        "every step adds to the first chunk's sums",
        "            plgpu.mma(each, w, fragments",
        "            plgpu.mma(acc[0], w, fragments",
        ("numbers",),
        "ampere",
    ),
    Bug(
        "the codes of the first tile of columns",
        "codes_g.at[columns]",
        "codes_g.at[pl.ds(0, COLUMNS)]",
        ("numbers",),
        "ampere",
        RAGGED,
    ),
    Bug(
        "the scales of every other step for two steps",
        "spec((1, COLUMNS), lambda i: (first + i, 0))",
        "spec((1, COLUMNS), lambda i: (first + i // 2, 0))",
        ("numbers",),
        "ampere",
    ),
    Bug(
        "the scales of every other step for two steps, backward",
        "spec((None, COLUMNS // STEP, STEP), lambda i: (first + i, 0, 0))",
        "spec((None, COLUMNS // STEP, STEP), lambda i: (first + i // 2, 0, 0))",
        ("numbers",),
        "ampere",
        direction="backward",
    ),
    Bug(
        "the last tile of columns does not end where W does",
        "left = jnp.minimum(column * COLUMNS, k.shape[1] - COLUMNS)",
        "left = jnp.minimum(column * COLUMNS, k.shape[1] - COLUMNS - 8)",
        ("numbers",),
        "ampere",
        RAGGED,
    ),
    Bug(
        "what two tiles have in common is kept twice",
        "(last + y.shape[axis] - size, y.shape[axis])",
        "(last, size)",
        ("numbers",),
        "ampere",
        RAGGED,
    ),
    Bug(
        "two blocks write their parts to one slot",
        "y_g.at[block + tile, pl",
        "y_g.at[tile, pl",
        ("race", "numbers"),
        "ampere",
        SHARED,
    ),
    Bug(
        "a part begins with its tile's first step",
        "compute(*k.work.place(tile), *k.work.part(block, tile))",
        "compute(*k.work.place(tile), 0, k.work.part(block, tile)[1])",
        ("numbers",),
        "ampere",
        SHARED,
    ),
    Bug(
        "a block forgets its last part",
        "lax.fori_loop(0, number, part",
        "lax.fori_loop(0, number - 1, part",
        ("numbers",),
        "ampere",
        SHARED,
    ),
    Bug(
        "the low-rank term of the first tile of rows",
        "h_g.at[pl.ds(top + row, chunk)",
        "h_g.at[pl.ds(row, chunk)",
        ("numbers",),
        "ampere",
        TALL,
        rank=64,
    ),
)
