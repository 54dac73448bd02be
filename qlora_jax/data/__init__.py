"""Files to batches: tokenizers, chat templates, row formats, packing and a resumable loader."""

from qlora_jax.data.chat import encode_chat as encode_chat
from qlora_jax.data.chat import render_chat as render_chat
from qlora_jax.data.chat import stop_tokens as stop_tokens
from qlora_jax.data.dataset import Dataset as Dataset
from qlora_jax.data.load import load_dataset as load_dataset
from qlora_jax.data.loader import Loader as Loader
from qlora_jax.data.packing import TokenSequence as TokenSequence
from qlora_jax.data.statistics import Statistics as Statistics
from qlora_jax.data.tokenizer import load_tokenizer as load_tokenizer
