"""The gradients of one micro batch, compiled for a GPU that need not be there.

XLA's analysis of this program (`aot.sizes`) is the larger part of a step's memory: weights, adapter
and batch are its arguments, gradients its output, the rest its temporaries. estimate.py adds what
lives beside it: the sum of the micro batches before, optimizer state that stays on the device, and
pages of it that pass through. Not counted are CUDA's context and its libraries' workspaces, which
gpus.py takes off a GPU's size, and evaluation, which keeps no gradients.
"""

import dataclasses

import jax

from qlora_jax.memory import aot
from qlora_jax.memory.estimate import Estimate, memory_of
from qlora_jax.memory.program import Micro, arguments, built_for, gradients
from qlora_jax.memory.shapes import batch_shapes, nbytes
from qlora_jax.placement import OVERLAP


def compiled_gradients(micro: Micro, stream_weights: str, remat: str) -> jax.stages.Compiled:
    """The program of train/step.py; it takes a minute or more.

    Args:
      micro: with a GPU as its target.
      stream_weights: off, on or all.
      remat: one of models.remat.POLICIES.

    Raises:
      InputError: AOT-PLUGIN.
    """
    aot.load_plugin()  # before anything asks jax for its devices
    with built_for(micro.target):
        shapes = arguments(micro, stream_weights)
    copies = stream_weights != "off" or remat == "offload"
    lowered = aot.lower(micro.target, gradients(micro, remat), *shapes)
    return lowered.compile(OVERLAP if copies else None)


def compiled_estimate(micro: Micro, estimate: Estimate) -> Estimate:
    """`estimate` with the temporaries of the program that XLA makes of its choices.

    Raises:
      InputError: AOT-PLUGIN.
    """
    stream, policy = memory_of(estimate.choices), estimate.choices.gradient_checkpointing
    return with_sizes(estimate, micro, aot.sizes(compiled_gradients(micro, stream, policy)))


def with_sizes(estimate: Estimate, micro: Micro, sizes: aot.Sizes) -> Estimate:
    """`estimate` with XLA's temporaries, on the device and in host memory, instead of its own.

    What of them are layer inputs and what the loss takes stays as estimated; the rest is workspace.
    """
    device, host, left = dict(estimate.device), dict(estimate.host), sizes.temp
    for owner in ("activations", "loss"):
        device[owner] = min(device[owner], left)
        left -= device[owner]
    device["workspace"] = left + nbytes(batch_shapes(micro.rows, micro.length))
    host["activations"] = sizes.host_temp
    return dataclasses.replace(estimate, device=device, host=host)
