"""Several adapters as one: sums of their deltas, exact or of a smaller rank, and PEFT's mixtures.

    method            delta W of one matrix                                           ranks
    cat               sum_i f_i B_i A_i                                               add up
    svd               the nearest to that sum among the matrices of a smaller rank    any
    linear            (sum_i sqrt(f_i) B_i) (sum_i sqrt(f_i) A_i)                     equal
    magnitude_prune   linear, of the largest entries of each A_i and B_i              equal
    ties              the same, the entries of the elected sign averaged              equal
    dare_linear       linear, of random entries, each divided by the density          equal
    dare_ties         the same, the entries of the elected sign averaged              equal

f_i is the weight of adapter i times its own scale (alpha / r, or alpha / sqrt(r) for rsLoRA). It is
folded into A and B once, and the result has alpha = r in every layer: a scale of 1.

Source: PEFT's add_weighted_adapter; TIES, Yadav and others 2023, arXiv 2306.01708; DARE, Yu and
others 2023, arXiv 2311.03099.
"""

import zlib
from collections.abc import Mapping

import numpy as np

from qlora_jax.adapters.adapter import Adapter
from qlora_jax.adapters.composable import (
    Weights,
    check_adapters,
    check_equal_ranks,
    check_kinds,
    check_sum_of_ranks,
    unchanged,
    weights_by_layer,
)
from qlora_jax.adapters.composed_spec import composed_spec, union_of_targets
from qlora_jax.adapters.method import Method
from qlora_jax.adapters.mixtures import MIXTURES, mixture
from qlora_jax.adapters.parts import Pair, Part, concatenated, parts_of, shapes_of, stacked
from qlora_jax.adapters.spec import module_path
from qlora_jax.adapters.truncate import kept_values, singular


def compose(
    adapters: Mapping[str, Adapter],
    weights: Weights,
    *,
    method: str = "cat",
    svd_rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    sign: str = "total",
    seed: int = 0,
) -> Adapter:
    """One adapter out of several for the same base, each with its weight.

        compose({"a": a, "b": b}, weights={"a": 0.7, "b": 0.3})                          the sum
        compose({"a": a, "b": b}, weights={"a": 0.7, "b": 0.3}, method="svd", svd_rank=8)

    The head of this file has the formulas. A matrix that only some of the adapters have is made of
    those. With a negative weight the mixtures (linear and below it) have the root of its size on A
    and B and its sign on A, as PEFT does. svd makes no matrix of (out, in): it works with the QR
    factors of all A and all B, one matrix at a time.

    DoRA's lengths of rows, and modules trained in full, have no weighted sum without the base: such
    an adapter is given back as it is when it is alone, its weight 1 and the method cat, and is
    refused otherwise. Dropout, which changes no answer, stays if all have the same, and else is 0.

    Args:
      adapters: by name; of one model.
      weights: by the same names: a number, or one for each layer.
      method: cat, svd, linear, magnitude_prune, ties, dare_linear or dare_ties.
      svd_rank: for svd, the largest rank of a matrix; by default the largest that is put in.
      energy: for svd, instead: the smallest rank that keeps this share of the sum of squared
        singular values, over 0 and at most 1.
      density: for ties, magnitude_prune and dare_...: the share of entries of A and of B that is
        kept, over 0 and at most 1; by default 0.5.
      sign: for ties and dare_ties, what elects an entry's sign: total, the sum of the values, or
        frequency, that of their signs.
      seed: for dare_...: another seed keeps other entries.

    Raises:
      InputError: COMPOSE-..., LORA-RANK, LORA-FINITE, with the adapter or the option.

    Source: PEFT's add_weighted_adapter, but that the scale of rsLoRA is not applied once more, and
    that ranks need only be equal matrix by matrix.
    """
    how = Method(method, svd_rank, energy, density, sign, seed)
    check_adapters(adapters)
    by_layer = weights_by_layer(adapters, weights)
    if how.name == "cat" and (alone := unchanged(adapters, by_layer)):
        return alone
    check_kinds(adapters)
    shapes, params, ranks = shapes_of(adapters), {}, {}
    for target in union_of_targets(adapter.spec for adapter in adapters.values()):
        pairs = [
            combined(parts, how, target, layer)
            for layer, parts in enumerate(parts_of(adapters, by_layer, target))
        ]
        ranks[target] = tuple(0 if pair is None else len(pair[0]) for pair in pairs)
        params[target] = stacked(pairs, shapes[target])
    dropouts = {adapter.spec.lora_dropout for adapter in adapters.values()}
    return Adapter(params, composed_spec(ranks, dropouts.pop() if len(dropouts) == 1 else 0.0))


def combined(parts: list[Part], how: Method, target: str, layer: int) -> Pair | None:
    """(A, B) of one matrix, float32, for a scale of 1; None where no adapter has it."""
    if not parts:
        return None
    where = module_path(layer, target)
    if how.name in MIXTURES:
        check_equal_ranks(parts, how.name, where)
        place = (how.seed, zlib.crc32(target.encode()), layer)
        return mixture(parts, MIXTURES[how.name], how.kept, how.sign, place)
    if how.name == "cat":
        check_sum_of_ranks(sum(len(part.A) for part in parts), where)
        return concatenated(parts)
    S, U, Vt = singular(*concatenated(parts, np.float64))
    most = how.svd_rank or max(len(part.A) for part in parts)
    rank = kept_values(S, most, how.energy)
    check_sum_of_ranks(rank, where)
    return np.float32(Vt[:rank]), np.float32(U[:, :rank] * S[:rank])
