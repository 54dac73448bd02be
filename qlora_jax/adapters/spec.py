"""Which linears get an adapter, with which rank and alpha.

Names mean what they mean in PEFT's LoraConfig, and are matched by PEFT's rules against the full
module path, `model.layers.0.self_attn.q_proj`. The answer is resolved once, per target and layer:

    make_spec(shapes, 3, r=8, targets=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.*": 4})

    targets             ranks       alphas
    self_attn.q_proj    8  8  8     16  16  16
    mlp.down_proj       8  4  8     16  16  16      rank 0: that layer has no adapter here
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qlora_jax.adapters.patterns import PLAIN, end_matches, full_matches
from qlora_jax.errors import InputError, listed, nearest
from qlora_jax.weight_names import LAYERS

SAVED = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}  # by name: module path
MAX_RANK = 4096
MAX_PATTERNS = 32  # that are no plain names: each is matched in a process of its own
LARGEST_ALPHA = float(np.finfo(np.float32).max)


def module_path(layer: int, name: str) -> str:
    """The Hugging Face module path of a layer-relative name: `model.layers.0.self_attn.q_proj`."""
    return f"{LAYERS}{layer}.{name}"


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What is fixed about an adapter: its targets, their ranks and alphas, its kind, the dropout.

    Static and hashable. Two specs that adapt alike are equal, however their settings were written;
    the settings as written (the fields with PEFT's names below `lora_dropout`) are kept for saving.

    Args:
      targets: layer-relative names of the adapted linears, in the model's order.
      target_ranks: per target, the rank in each layer; 0 where that layer has no adapter.
      target_alphas: per target, alpha in each layer.
      use_rslora: divide alpha by sqrt(r) and not by r (https://arxiv.org/abs/2312.03732).
      lora_dropout: probability in [0, 1) that an input of the adapter's branch is dropped.
      use_dora: rows have trained lengths, see adapters/dora.py.
      modules_to_save: of lm_head and embed_tokens those that are trained in full.
      target_modules: the targets as PEFT's config file holds them.
    """

    targets: tuple[str, ...]
    target_ranks: tuple[tuple[int, ...], ...]
    target_alphas: tuple[tuple[float, ...], ...]
    use_rslora: bool = False
    lora_dropout: float = 0.0
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    r: int = dataclasses.field(default=64, compare=False)
    lora_alpha: float = dataclasses.field(default=16, compare=False)
    target_modules: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    rank_pattern: tuple[tuple[str, int], ...] = dataclasses.field(default=(), compare=False)
    alpha_pattern: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)

    @property
    def num_layers(self) -> int:
        """How many layers the model has, those without an adapter included."""
        return len(self.target_ranks[0])

    def ranks(self, name: str) -> tuple[int, ...]:
        """The rank of target `name` in each layer; 0 where it has no adapter."""
        return self.target_ranks[self.targets.index(name)]

    def alphas(self, name: str) -> tuple[float, ...]:
        """The alpha of target `name` in each layer."""
        return self.target_alphas[self.targets.index(name)]

    def scales(self, name: str) -> np.ndarray:
        """What B A x is multiplied by, float32 (L,): alpha / r, or alpha / sqrt(r) for rsLoRA."""
        pairs = zip(self.alphas(name), self.ranks(name), strict=True)
        root = math.sqrt if self.use_rslora else float
        return np.array([alpha / root(rank) if rank else 0 for alpha, rank in pairs], np.float32)


def make_spec(
    module_shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    *,
    r: int = 64,
    alpha: int | float = 16,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int | float] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
    dropout: int | float = 0.0,
    where: str = "lora",
) -> LoraSpec:
    """Resolves the settings of a LoRA against the linears of a model, by PEFT's rules.

    Args:
      module_shapes: (out, in) of each linear of one layer, by its layer-relative name; those of
        lm_head and embed_tokens are left alone.
      num_layers: how many layers there are.
      r: rank, 1 to 4096.
      alpha: the scale is alpha / r, so that r can change without another learning rate.
      targets: `"all-linear"`, a list of names (a module is meant when its path is the name or ends
        with `.name`), or a regular expression for the whole path.
      exclude: names or a regular expression as for `targets`; wins over them.
      rank_pattern: rank by regular expression for the end of a path; the first that matches holds.
      alpha_pattern: the same for alpha.
      layers_to_transform: the layers in which the names of a list are meant; all by default.
      use_rslora: scale by alpha / sqrt(r).
      use_dora: train the length of each row too.
      modules_to_save: lm_head, embed_tokens or both: trained in full beside the adapter.
      dropout: probability in [0, 1).
      where: what to call the source of these settings in errors.

    Raises:
      InputError: a value out of range, or a name or pattern that matches nothing.
    """
    linears = [name for name in module_shapes if name not in SAVED]
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    for key, value in {"r": r, **labelled("rank_pattern", rank_pattern)}.items():
        check_rank(value, f"{where}: {key}")
    for key, value in {"lora_alpha": alpha, **labelled("alpha_pattern", alpha_pattern)}.items():
        check_alpha(value, f"{where}: {key}")
    check_dropout(dropout, f"{where}: lora_dropout")
    check_saved(modules_to_save, f"{where}: modules_to_save")

    paths = {
        module_path(layer, name): (name, layer) for name in linears for layer in range(num_layers)
    }
    chosen = set(paths)
    if targets != "all-linear":
        refuse_saved(targets, f"{where}: target_modules")
        chosen = select(targets, paths, f"{where}: target_modules", layers_to_transform, num_layers)
    elif layers_to_transform is not None:
        chosen = {path for path in paths if paths[path][1] in layer_set(layers_to_transform)}
    if not isinstance(exclude, str):  # lm_head is left out as it is
        exclude = [name for name in exclude if name not in (*SAVED, *SAVED.values())]
    if exclude:
        chosen -= select(exclude, paths, f"{where}: exclude_modules")
    if not chosen:
        raise unmatched(f"{where}: target_modules", "nothing is left to adapt", "", linears)

    kept = [path for path in paths if path in chosen]
    rank_of = first_match(rank_pattern, kept, r, f"{where}: rank_pattern")
    alpha_of = first_match(alpha_pattern, kept, alpha, f"{where}: alpha_pattern")
    names = tuple(name for name in linears if any(paths[path][0] == name for path in kept))
    rows = [[module_path(layer, name) for layer in range(num_layers)] for name in names]
    return LoraSpec(
        targets=names,
        target_ranks=tuple(tuple(rank_of.get(path, 0) for path in row) for row in rows),
        target_alphas=tuple(
            tuple(float(alpha_of.get(path, alpha)) for path in row) for row in rows
        ),
        use_rslora=bool(use_rslora),
        lora_dropout=float(dropout),
        use_dora=bool(use_dora),
        modules_to_save=tuple(name for name in SAVED if name in modules_to_save),
        r=r,
        lora_alpha=alpha,
        target_modules=tuple(saved_names(rows, names, chosen, linears)),
        rank_pattern=tuple(rank_pattern.items()),
        alpha_pattern=tuple(alpha_pattern.items()),
    )


def select(
    names: str | Sequence[str],
    paths: Mapping[str, tuple[str, int]],
    where: str,
    layers_to_transform: int | Sequence[int] | None = None,
    num_layers: int = 0,
) -> set[str]:
    """The module paths that a list of names or a regular expression means."""
    choices = dict.fromkeys(name for name, _ in paths.values())
    if isinstance(names, str):
        if layers_to_transform is not None:
            found = f"layers_to_transform={layers_to_transform!r} beside a regular expression"
            raise InputError("LORA-TARGETS", where, found, "a list of names, as PEFT asks for")
        found = {
            p for p, hit in zip(paths, full_matches(names, list(paths), where), strict=True) if hit
        }
        if not found:
            raise unmatched(where, f"{names!r} matches no module path", names, choices)
        return found
    layers = layer_set(range(num_layers) if layers_to_transform is None else layers_to_transform)
    anywhere = layers_to_transform is None
    selected = set()
    for name in names:
        ends = {path for path in paths if path.endswith(f".{name}")}
        # A full path is meant whatever layers_to_transform says: so in PEFT.
        found = {p for p in ends if anywhere or paths[p][1] in layers} | ({name} & set(paths))
        if not found:
            raise unmatched(where, f"{name!r} matches no linear of the model", name, choices)
        selected |= found
    return selected


def first_match(
    pattern: Mapping[str, int | float], paths: list[str], default: int | float, where: str
) -> dict[str, int | float]:
    """The value for each path: of the first key that matches its end, else `default`."""
    if sum(not PLAIN.fullmatch(key) for key in pattern) > MAX_PATTERNS:
        found, expected = "too many regular expressions", f"at most {MAX_PATTERNS} beside names"
        raise InputError("LORA-REGEX", where, found, expected)
    values = dict.fromkeys(paths, default)
    for key, value in reversed(pattern.items()):
        hits = [p for p, hit in zip(paths, end_matches(key, paths, where), strict=True) if hit]
        if not hits:
            choices = dict.fromkeys(path.split(".", 3)[3] for path in paths)
            raise unmatched(where, f"{key!r} matches no target", key, choices)
        values.update(dict.fromkeys(hits, value))
    return values


def saved_names(
    rows: list[list[str]], names: tuple[str, ...], chosen: set[str], linears: Iterable[str]
) -> Iterator[str]:
    """The targets as PEFT's config lists them: `q_proj`, or full paths where layers differ."""
    for row, name in zip(rows, names, strict=True):
        if not chosen.issuperset(row):
            yield from (path for path in row if path in chosen)
            continue
        short = name.rsplit(".", 1)[-1]
        alike = [other for other in linears if other.rsplit(".", 1)[-1] == short]
        yield short if alike == [name] else name


def layer_set(layers: int | Iterable[int]) -> set[int]:
    """The layers of a `layers_to_transform`, which may be one number."""
    return {layers} if isinstance(layers, int) else set(layers)


def labelled(field: str, pattern: Mapping[str, int | float]) -> dict[str, int | float]:
    """The values of a pattern, by what an error calls them."""
    return {f"{field}[{key!r}]": value for key, value in pattern.items()}


def unmatched(where: str, found: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that means nothing here: what there is, and what is nearest."""
    choices = list(choices)
    short = {choice.rsplit(".", 1)[-1]: choice for choice in choices}
    near = nearest(name, [*short, *choices])
    hint = "did you mean " + " or ".join(near) if near else ""
    return InputError("LORA-TARGETS", where, found, f"some of {listed(choices)}", hint)


def refuse_saved(targets: str | Sequence[str], where: str) -> None:
    """Refuses A and B for lm_head and embed_tokens, which can be trained in full only."""
    paths = list(SAVED.values())
    if isinstance(targets, str):
        hits = full_matches(targets, paths, where)
    else:
        hits = [any(f".{path}".endswith(f".{name}") for name in targets) for path in paths]
    if meant := [name for name, hit in zip(SAVED, hits, strict=True) if hit]:
        found = f"{meant[0]} has no A and B here: it is trained in full or not at all"
        hint = f"without it, and modules_to_save=[{meant[0]}] to train it in full"
        raise InputError("LORA-TARGETS", where, found, "linears of the layers", hint)


def check_saved(names: Sequence[str], where: str) -> None:
    """Refuses modules that cannot be trained in full."""
    if isinstance(names, str):
        raise InputError("LORA-MODULES", where, f"the text {names!r}", f"a list: [{names!r}]")
    for name in names:
        if name not in SAVED:
            found = f"{name!r} cannot be trained in full"
            near = nearest(name, SAVED)
            hint = f"did you mean {near[0]}" if near else ""
            raise InputError("LORA-MODULES", where, found, f"some of {', '.join(SAVED)}", hint)


def check_rank(value: object, where: str) -> None:
    """Refuses what is not a whole number from 1 to 4096."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise InputError("LORA-RANK", where, repr(value), f"a whole number from 1 to {MAX_RANK}")


def check_alpha(value: object, where: str) -> None:
    """Refuses what is not a finite number above 0."""
    if type(value) not in (int, float) or not 0 < value <= LARGEST_ALPHA:
        raise InputError("LORA-ALPHA", where, repr(value), "a finite number above 0")


def check_dropout(value: object, where: str) -> None:
    """Refuses what is not a probability below 1."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise InputError("LORA-DROPOUT", where, repr(value), "at least 0 and below 1")
