"""The spec of adapters combined: each target's rank in each layer, and alpha the same.

PEFT's config says that with one r, and a pattern for every matrix that has another rank.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qlora_jax.adapters.spec import LoraSpec, module_path, saved_names
from qlora_jax.weight_names import LINEARS


def union_of_targets(specs: Iterable[LoraSpec]) -> tuple[str, ...]:
    """Every target of the specs once, in the order that models have; strange names come last."""
    names = dict.fromkeys(name for spec in specs for name in spec.targets)
    order = {name: place for place, name in enumerate(LINEARS)}
    return tuple(sorted(names, key=lambda name: order.get(name, len(order))))


def spec_of_sum(specs: Sequence[LoraSpec]) -> LoraSpec:
    """Of the exact sum of adapters, in which ranks add up."""
    ranks = {}
    for name in union_of_targets(specs):
        own = [spec.ranks(name) for spec in specs if name in spec.targets]
        ranks[name] = tuple(map(sum, zip(*own, strict=True)))
    return composed_spec(ranks)


def composed_spec(ranks: Mapping[str, tuple[int, ...]], dropout: float = 0.0) -> LoraSpec:
    """A spec whose scale is 1 everywhere.

    Args:
      ranks: by target, in the model's order, the rank in each layer; 0 where there is none.
      dropout: probability in [0, 1).
    """
    counts = Counter(rank for row in ranks.values() for rank in row if rank)
    r = max(counts, key=lambda rank: (counts[rank], rank))
    pattern = dict(exceptions(ranks, r))
    names = tuple(ranks)
    rows = [[module_path(layer, name) for layer in range(len(ranks[name]))] for name in names]
    chosen = {
        path
        for row, name in zip(rows, names, strict=True)
        for path, rank in zip(row, ranks[name], strict=True)
        if rank
    }
    return LoraSpec(
        targets=names,
        target_ranks=tuple(tuple(ranks[name]) for name in names),
        target_alphas=tuple(tuple(float(rank or r) for rank in ranks[name]) for name in names),
        lora_dropout=dropout,
        r=r,
        lora_alpha=r,
        target_modules=tuple(saved_names(rows, names, chosen, names)),
        rank_pattern=tuple(pattern.items()),
        alpha_pattern=tuple(pattern.items()),
    )


def exceptions(ranks: Mapping[str, tuple[int, ...]], r: int) -> Iterable[tuple[str, int]]:
    """(end of a path, rank) of what has another rank than `r`: a target's name where all layers do.

    q_proj 8 8 8, up_proj 4 4 4, down_proj 8 4 8, r 8   ->   mlp.up_proj 4, model.layers.1.mlp... 4
    """
    for name, row in ranks.items():
        if len(set(row)) == 1:
            if row[0] != r:
                yield name, row[0]
            continue
        for layer, rank in enumerate(row):
            if rank not in (0, r):
                yield module_path(layer, name), rank
