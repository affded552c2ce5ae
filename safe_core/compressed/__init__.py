"""Store tensors without their zeros in safetensors files, and read them back bit for bit.

The files hold bytes, so that every framework can write and read them.
"""

from .forms import RawTensor
from .reading import compressed_header, map_file, read_compressed, read_file
from .writing import KEY, CompressedFiles, write_compressed, write_dense

__all__ = [
    "KEY",
    "CompressedFiles",
    "RawTensor",
    "compressed_header",
    "map_file",
    "read_compressed",
    "read_file",
    "write_compressed",
    "write_dense",
]
