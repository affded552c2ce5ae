"""Train, prune and export Flax modules."""

from safe_core._installed import require

require(__name__, "flax", extra="jax")

from .blocks import linen_block, linen_grams, nnx_block, nnx_grams
from .channel_models import ShrunkLinen
from .channel_results import RemovedChannels, SilentChannels
from .channels import shrink, silence_channels
from .export import load_safetensors, save_safetensors, to_bcoo, to_torch_names
from .export_advice import advise
from .layouts import layouts_of
from .sparse_model import SparseLinen, sparse_modules
from .training import (
    SparseTrainState,
    nnx_finalize,
    nnx_recalibrate,
    nnx_value_and_gradients,
    recalibrate,
)

__all__ = [
    "RemovedChannels",
    "ShrunkLinen",
    "SilentChannels",
    "SparseLinen",
    "SparseTrainState",
    "advise",
    "layouts_of",
    "linen_block",
    "linen_grams",
    "load_safetensors",
    "nnx_block",
    "nnx_finalize",
    "nnx_grams",
    "nnx_recalibrate",
    "nnx_value_and_gradients",
    "recalibrate",
    "save_safetensors",
    "shrink",
    "silence_channels",
    "sparse_modules",
    "to_bcoo",
    "to_torch_names",
]
