"""ONNX: one .onnx file of standard operators, run by ONNX Runtime or taken by a vendor's compiler."""

from .adapter import Onnx

__all__ = ["Onnx"]
