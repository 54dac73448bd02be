"""What to change when a run does not fit: the cheapest first, each with the bytes that it saves.

First what costs time alone, then what changes the training a little or more, then another GPU. The
bytes are of each change by itself, from the shapes; `qlora-jax plan ... key=value` gives the whole.
"""

import dataclasses
from collections.abc import Iterator

from qlora_jax.memory.budget import Budget
from qlora_jax.memory.choices import STREAMING
from qlora_jax.memory.estimate import Estimate, Estimator
from qlora_jax.memory.gpus import GPUS, SHARE_VARIABLES, of_gpu
from qlora_jax.models.remat import POLICIES
from qlora_jax.train.config import TrainConfig
from qlora_jax.weight_names import HEAD

SHORTEST = 128  # tokens of a row: shorter ones are no advice
LARGEST_SHARE = 0.95  # of a GPU that XLA can be told to take


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing to do.

    Attributes:
      change: as it is written: `key=value`, a variable, or a GPU.
      saves_device_bytes, saves_host_bytes: about so many; on the device also what it adds to the
        limit.
      why: what it does, in words.
    """

    change: str
    saves_device_bytes: int
    saves_host_bytes: int
    why: str


def changes(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> tuple[Change, ...]:
    """All that would help, in order of cost."""
    return tuple(
        change
        for some in (of_xla, of_optimizer, of_policy, of_streaming, of_training, of_gpus)
        for change in some(estimator, config, found, budget)
        if change.saves_device_bytes > 0 or change.saves_host_bytes > 0
    )


def of_xla(estimator, config, found: Estimate, budget: Budget) -> Iterator[Change]:
    """More of the GPU for XLA."""
    gpu = budget.card and budget.card.flops and budget.card.gpu
    if gpu and budget.host is None:
        more = int(LARGEST_SHARE * gpu.memory) - budget.device
        yield Change(f"{SHARE_VARIABLES[0]}={LARGEST_SHARE}", more, 0, "XLA may take so much more")


def of_optimizer(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> Iterator[Change]:
    """State in the host's memory, and smaller state."""
    device, host = found.device["optimizer"], found.host["optimizer"]
    if budget.card and found.choices.optim_memory == "device":
        yield Change("optim_memory=host", device, -device, "moments live in host memory")
    if config.optim != "paged_adamw_8bit":
        saved = 3 * device // 4, 3 * host // 4
        yield Change("optim=paged_adamw_8bit", *saved, "moments in 8 bits, a quarter of 32")


def of_policy(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> Iterator[Change]:
    """Less kept for the backward pass."""
    policy, layers = found.choices.gradient_checkpointing, estimator.micro.shape.num_hidden_layers
    now = 0 if policy == "offload" else layers * estimator.kept(policy)
    last = len(POLICIES) if budget.card else POLICIES.index("offload")
    for other in POLICIES[POLICIES.index(policy) + 1 : last]:
        kept = layers * estimator.kept(other)
        left, there = (0, -kept) if other == "offload" else (kept, 0)
        why = f"keeps {kept / 1e9:.2f} GB for the backward pass, {now / 1e9:.2f} now"
        yield Change(f"gradient_checkpointing={other}", now - left, there, why)


def of_streaming(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> Iterator[Change]:
    """Fewer weights on the device, or in the host's memory."""
    if budget.card is None:
        return
    here = sum(estimator.weights(estimator.split(found.choices)[0]))
    layers = estimator.micro.shape.num_hidden_layers
    for stream in STREAMING[STREAMING.index(found.choices.stream_weights) + 1 :]:
        names, there = estimator.split(dataclasses.replace(found.choices, stream_weights=stream))
        of_layers = sum(estimator.weights(name for name in there if "layers" in name))
        in_flight = 0 if found.streamed else 2 * of_layers // layers
        saved = here - sum(estimator.weights(names)) - in_flight
        moved = sum(estimator.on_host(there, from_disk=stream == "disk"))
        more = found.host["base"] + found.host["scales"] - moved
        why = {
            "on": "layers come from host memory as they are computed",
            "all": "embeddings and head too",
            "disk": "layers come from the checkpoint's files, at the pace of the drive",
        }[stream]
        yield Change(f"stream_weights={stream}", saved, more, why)


def of_training(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> Iterator[Change]:
    """What makes another training of it: a quantized head, smaller batches, rows and ranks."""
    by_tokens = found.device["activations"] + found.device["workspace"]
    rows, length = config.batch_size, config.max_seq_length
    if rows > 1:
        saved = by_tokens * (rows - 1) // rows, found.host["activations"] * (rows - 1) // rows
        why = f"with gradient_accumulation_steps={config.gradient_accumulation_steps * rows} the "
        yield Change("batch_size=1", *saved, why + "step is the same")
    head = estimator.model.get(HEAD)
    if config.load_in_4bit and not config.quantize_lm_head and head is not None:
        bits = 4.5 / 16  # of bfloat16, with scales
        here = HEAD in estimator.split(found.choices)[0]
        saved = int((1 - bits) * sum(estimator.weights([HEAD])))
        where = (saved, 0) if here else (0, saved)
        yield Change("quantize_lm_head=true", *where, "the head in 4 bits too")
    if length // 2 >= SHORTEST:
        kept = found.device["activations"] // 2, found.host["activations"] // 2
        yield Change(f"max_seq_length={length // 2}", *kept, "rows of half the tokens")
    if config.adapter is None and config.lora_r > 8:
        part = 1 - 8 / config.lora_r
        owned = (found.device[owner] for owner in ("adapter", "gradients", "optimizer"))
        moved = found.host["adapter"] + found.host["optimizer"]
        saved = int(part * sum(owned)), int(part * moved)
        yield Change("lora_r=8", *saved, "a smaller adapter")


def of_gpus(
    estimator: Estimator, config: TrainConfig, found: Estimate, budget: Budget
) -> Iterator[Change]:
    """The smallest GPU that would hold it as it is."""
    if budget.card is None:
        return
    known = sorted((of_gpu(gpu, name).memory, name) for name, gpu in GPUS.items())
    for memory, name in known:
        if memory >= found.device_bytes > budget.device:
            yield Change(f"--gpu {name}", memory - budget.device, 0, "the smallest that holds it")
            return
