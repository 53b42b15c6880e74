"""ONNX: linear layers of a file become operators of bsrgen, which ONNX Runtime finds in a library of its own ABI."""

from bsrgen.integrations.onnx.convert import convert
from bsrgen.integrations.onnx.session import session

__all__ = ["convert", "session"]
