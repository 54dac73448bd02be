"""Bugs for the kernel of few rows, whose copies the interpreter makes by TMA."""

from tests.pallas_kernels.planted import Bug

LONG, ONE_ROW, SPLIT, RAGGED = range(4)

BUGS = (
    Bug(
        "a slot is refilled before its reads are committed",
        "            plgpu.commit_smem()\n",
        "            pass\n",
        ("race",),
        "small_m",
    ),
    Bug(
        "every block of 64 multiplies the step's first of x",
        "pl.ds(BLOCK * (i + b), BLOCK)",
        "pl.ds(BLOCK * i, BLOCK)",
        ("numbers",),
        "small_m",
    ),
    Bug(
        "the scales of the step before",
        "first + index[0] + 1, end",
        "first + index[0], end",
        ("numbers",),
        "small_m",
    ),
    Bug(
        "the scales of the block's neighbours",
        "enumerate(fragments.columns(scales[i // some], interpret=interpret))",
        "enumerate(fragments.columns(scales[i // some], interpret=interpret)[::-1])",
        ("numbers",),
        "small_m",
    ),
    Bug(
        "a step that belongs to the split before counts twice",
        "if uneven else loaded",
        "if False else loaded",
        ("numbers",),
        "small_m",
        SPLIT,
    ),
    Bug(
        "two splits write their sums to one place",
        "y_g.at[split, tile]",
        "y_g.at[0 * split, tile]",
        ("race", "numbers"),
        "small_m",
        SPLIT,
    ),
    Bug(
        "every split does the first steps",
        "first = end - plan.most",
        "first = 0 * end",
        ("numbers",),
        "small_m",
        SPLIT,
    ),
    Bug(
        "the last tile does not end where W does",
        "jnp.minimum(tile * plan.rows, plan.n - plan.rows)",
        "jnp.minimum(tile * plan.rows, plan.n - plan.rows - 8)",
        ("numbers",),
        "small_m",
        RAGGED,
    ),
    Bug(
        "what two tiles have in common is kept twice",
        "total[-1, -short:]",
        "total[-1, :short]",
        ("numbers",),
        "small_m",
        ONE_ROW,
    ),
)
