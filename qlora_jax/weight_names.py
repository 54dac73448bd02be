"""The names of a model's weights that several packages ask for, as Hugging Face has them."""

LAYERS = "model.layers."  # a layer's weights begin so; its number follows, or none when stacked
EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"  # absent where it is tied to the embeddings
