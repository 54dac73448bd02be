"""The names of a model's weights that several packages ask for, as Hugging Face has them."""

LAYERS = "model.layers."  # a layer's weights begin so; its number follows, or none when stacked
EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"  # absent where it is tied to the embeddings

# The linears of a layer, by their names inside it, in the order of every family.
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    *("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
)

# stream_weights: how much of a model lives in host memory.
STREAMED = {"off": (), "on": (LAYERS,), "all": (LAYERS, EMBEDDINGS, HEAD)}


def is_streamed(name: str, stream_weights: str) -> bool:
    """Whether the weight of this name, stacked or not, lives in host memory; a key of STREAMED.

    The last norm never does: it is a vector of the model's width.
    """
    return name.startswith(STREAMED[stream_weights])
