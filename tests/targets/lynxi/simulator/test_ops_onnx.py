"""ONNX files against ONNX's own reference, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from spikeport.targets.lynxi.simulator import LyngorError, lyngor, options

IMAGE = [2, 4, 6, 6]
RNG = np.random.default_rng(0)


def grid(shape: list[int]) -> np.ndarray[Any, Any]:
    return (np.round(RNG.normal(size=shape) * 4) / 8).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    constants: dict[str, Any] | None = None,
    outputs: tuple[str, ...] = ("out",),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto, folder: Path, feeds: dict[str, Any], **load: Any) -> list[Any]:
    file = folder / "net.onnx"
    onnx.save(model, file)
    with options(storage="float32"):
        net = lyngor.DLModel()
        net.load(str(file), "ONNX", **load)
        path = lyngor.Builder().build(
            net.graph, net.params, out_path=folder / "out", apu_only=False
        )
        engine = lyngor.load(path)
    engine.run(**feeds)
    return engine.get_output()


I64 = np.int64
F32 = np.float32
node = helper.make_node

# name: (node or nodes, input shapes, constants)
CASES: dict[str, tuple[Any, dict[str, list[int]], dict[str, Any]]] = {
    **{
        op: (node(op, ["x", "y"], ["out"]), {"x": IMAGE, "y": [4, 1, 1]}, {})
        for op in ("Add", "Sub", "Mul", "Max", "Min", "Sum")
    },
    **{
        op: (node(op, ["x"], ["out"]), {"x": IMAGE}, {})
        for op in (
            "Neg",
            "Abs",
            "Relu",
            "Exp",
            "Tanh",
            "Sigmoid",
            "Round",
            "Floor",
            "Ceil",
            "Identity",
            "LeakyRelu",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "Flatten",
            "Transpose",
            "Softmax",
            "Dropout",
        )
    },
    **{
        f"{op}_number": (node(op, ["x", "r"], ["out"]), {"x": IMAGE}, {"r": F32(0.75)})
        for op in ("Div", "Mul")
    },
    **{
        op: (
            [
                node("Abs", ["x"], ["a"]),
                node("Add", ["a", "h"], ["b"]),
                node(op, ["b"], ["out"]),
            ],
            {"x": IMAGE},
            {"h": F32(0.5)},
        )
        for op in ("Sqrt", "Log", "Reciprocal")
    },
    **{
        op: (
            [node(op, ["x", "y"], ["c"]), node("Cast", ["c"], ["out"], to=TensorProto.FLOAT)],
            {"x": IMAGE, "y": IMAGE},
            {},
        )
        for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
    },
    "logic": (
        [
            node("Greater", ["x", "z"], ["a"]),
            node("Less", ["x", "z"], ["b"]),
            node("Or", ["a", "b"], ["c"]),
            node("Not", ["a"], ["d"]),
            node("And", ["c", "d"], ["e"]),
            node("Xor", ["e", "a"], ["f"]),
            node("Where", ["f", "x", "z"], ["out"]),
        ],
        {"x": IMAGE},
        {"z": F32(0.125)},
    ),
    "Pow": (node("Pow", ["x", "n"], ["out"]), {"x": IMAGE}, {"n": F32(2)}),
    "Clip": (
        node("Clip", ["x", "a", "b"], ["out"]),
        {"x": IMAGE},
        {"a": F32(-0.2), "b": F32(0.3)},
    ),
    "Clip_low": (node("Clip", ["x", "a"], ["out"]), {"x": IMAGE}, {"a": F32(-0.2)}),
    "Conv": (
        node("Conv", ["x", "w", "b"], ["out"], strides=[2, 1], pads=[1, 0, 1, 0]),
        {"x": IMAGE},
        {"w": grid([6, 4, 3, 3]), "b": grid([6])},
    ),
    "Conv_uneven": (
        node("Conv", ["x", "w"], ["out"], pads=[1, 0, 0, 2], group=2),
        {"x": IMAGE},
        {"w": grid([6, 2, 3, 3])},
    ),
    "Conv_dilated": (
        node("Conv", ["x", "w"], ["out"], dilations=[2, 1]),
        {"x": IMAGE},
        {"w": grid([3, 4, 2, 3])},
    ),
    "Conv1d": (
        node("Conv", ["x", "w"], ["out"], pads=[1, 1]),
        {"x": [2, 4, 7]},
        {"w": grid([3, 4, 3])},
    ),
    "ConvTranspose": (
        node("ConvTranspose", ["x", "w"], ["out"], strides=[2, 2], pads=[1, 1, 1, 1]),
        {"x": IMAGE},
        {"w": grid([4, 3, 3, 3])},
    ),
    "Gemm": (
        node("Gemm", ["x", "w", "b"], ["out"], transB=1),
        {"x": [3, 5]},
        {"w": grid([4, 5]), "b": grid([4])},
    ),
    "Gemm_scaled": (
        node("Gemm", ["x", "w", "b"], ["out"], alpha=0.5, beta=2.0, transA=1),
        {"x": [5, 3]},
        {"w": grid([5, 4]), "b": grid([4])},
    ),
    "MatMul": (node("MatMul", ["x", "w"], ["out"]), {"x": [2, 3, 5]}, {"w": grid([5, 4])}),
    "MatMul_two": (node("MatMul", ["x", "y"], ["out"]), {"x": [2, 3, 5], "y": [2, 5, 4]}, {}),
    "BatchNormalization": (
        [
            node("Conv", ["x", "w"], ["c"]),
            node("BatchNormalization", ["c", "s", "b", "m", "v"], ["out"], epsilon=1e-3),
        ],
        {"x": IMAGE},
        {
            "w": grid([3, 4, 3, 3]),
            "s": grid([3]),
            "b": grid([3]),
            "m": grid([3]),
            "v": np.abs(grid([3])) + F32(0.5),
        },
    ),
    "MaxPool": (
        node("MaxPool", ["x"], ["out"], kernel_shape=[2, 3], strides=[2, 1]),
        {"x": IMAGE},
        {},
    ),
    "MaxPool_padded": (
        node("MaxPool", ["x"], ["out"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        {"x": IMAGE},
        {},
    ),
    "AveragePool": (
        node("AveragePool", ["x"], ["out"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        {"x": IMAGE},
        {},
    ),
    "Reshape": (
        node("Reshape", ["x", "s"], ["out"]),
        {"x": IMAGE},
        {"s": np.array([0, -1, 3], I64)},
    ),
    "Transpose_perm": (node("Transpose", ["x"], ["out"], perm=[0, 2, 3, 1]), {"x": IMAGE}, {}),
    "Unsqueeze": (
        node("Unsqueeze", ["x", "a"], ["out"]),
        {"x": [4, 6]},
        {"a": np.array([0, -1], I64)},
    ),
    "Squeeze": (node("Squeeze", ["x", "a"], ["out"]), {"x": [4, 1]}, {"a": np.array([1], I64)}),
    "Slice": (
        node("Slice", ["x", "s", "e", "a", "t"], ["out"]),
        {"x": IMAGE},
        {
            "s": np.array([1, -4], I64),
            "e": np.array([9, 2**31], I64),
            "a": np.array([1, 3], I64),
            "t": np.array([2, 1], I64),
        },
    ),
    "Gather": (
        node("Gather", ["x", "i"], ["out"], axis=1),
        {"x": IMAGE},
        {"i": np.array([0, -1, 2], I64)},
    ),
    "Gather_one": (node("Gather", ["x", "i"], ["out"], axis=1), {"x": IMAGE}, {"i": I64(-2)}),
    "GatherElements": (
        node("GatherElements", ["x", "i"], ["out"], axis=0),
        {"x": [3, 4]},
        {"i": np.array([[0, 2, 1, 0]], I64)},
    ),
    "Concat": (node("Concat", ["x", "y"], ["out"], axis=1), {"x": IMAGE, "y": [2, 1, 6, 6]}, {}),
    "Expand": (node("Expand", ["x", "s"], ["out"]), {"x": [4, 1]}, {"s": np.array([3, 1, 5], I64)}),
    "Tile": (node("Tile", ["x", "r"], ["out"]), {"x": [4, 2]}, {"r": np.array([2, 3], I64)}),
    "Pad": (
        node("Pad", ["x", "p", "v"], ["out"]),
        {"x": IMAGE},
        {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], I64), "v": F32(0.5)},
    ),
    "Pad_reflect": (
        node("Pad", ["x", "p"], ["out"], mode="reflect"),
        {"x": IMAGE},
        {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], I64)},
    ),
    "ReduceMean": (node("ReduceMean", ["x"], ["out"], axes=[2, 3]), {"x": IMAGE}, {}),
    "ReduceMean_all": (node("ReduceMean", ["x"], ["out"], keepdims=0), {"x": IMAGE}, {}),
    "ReduceSum": (
        node("ReduceSum", ["x", "a"], ["out"], keepdims=0),
        {"x": IMAGE},
        {"a": np.array([-1], I64)},
    ),
    "ReduceMax": (node("ReduceMax", ["x"], ["out"], axes=[1]), {"x": IMAGE}, {}),
    "ReduceMin": (node("ReduceMin", ["x"], ["out"], axes=[1]), {"x": IMAGE}, {}),
    "LayerNormalization": (
        node("LayerNormalization", ["x", "s", "b"], ["out"]),
        {"x": IMAGE},
        {"s": grid([6]), "b": grid([6])},
    ),
    "shape_arithmetic": (
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"]),
            node("Concat", ["n", "rest"], ["t"], axis=0),
            node("Reshape", ["x", "t"], ["out"]),
        ],
        {"x": IMAGE},
        {"zero": np.array([0], I64), "rest": np.array([-1], I64)},
    ),
    "Constant": (
        [
            node("Constant", [], ["c"], value=numpy_helper.from_array(grid([6]))),
            node("Add", ["x", "c"], ["out"]),
        ],
        {"x": IMAGE},
        {},
    ),
    "Split": (
        [
            node("Split", ["x", "s"], ["a", "b"], axis=1),
            node("Concat", ["b", "a"], ["out"], axis=1),
        ],
        {"x": IMAGE},
        {"s": np.array([1, 3], I64)},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:a hybrid")
def test_float32_is_onnx(name: str, tmp_path: Path) -> None:
    nodes, shapes, constants = CASES[name]
    model = model_of(nodes if isinstance(nodes, list) else [nodes], shapes, constants)
    feeds = {n: grid(s) for n, s in shapes.items()}
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    (got,) = run(model, tmp_path, feeds)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_opsets(opset: int, tmp_path: Path) -> None:
    if opset < 13:
        nodes = [
            node("Unsqueeze", ["x"], ["u"], axes=[1]),
            node("Squeeze", ["u"], ["s"], axes=[1]),
            node("Split", ["s"], ["a", "b"], axis=1),
            node("ReduceSum", ["b"], ["out"], axes=[1]),
        ]
        constants = {}
    else:
        nodes = [
            node("Unsqueeze", ["x", "i"], ["u"]),
            node("Squeeze", ["u", "i"], ["s"]),
            node("Split", ["s"], ["a", "b"], axis=1, **({"num_outputs": 2} if opset > 17 else {})),
            node("ReduceSum", ["b", "i"], ["out"]),
        ]
        constants = {"i": np.array([1], I64)}
    model = model_of(nodes, {"x": [2, 5]}, constants, opset=opset)
    x = grid([2, 5])
    wanted = x[:, 3:].sum(1, keepdims=True)
    if opset < 13:  # before opset 13 the parts had to be equal
        nodes[2] = node("Split", ["s"], ["a", "b"], axis=1, split=[3, 2])
        model = model_of(nodes, {"x": [2, 5]}, constants, opset=opset)
    np.testing.assert_allclose(run(model, tmp_path, {"x": x})[0], wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "corners"])
def test_resize_as_torch_exports_it(mode: str, tmp_path: Path) -> None:
    x = grid(IMAGE)
    attrs: dict[str, Any] = {
        "nearest": {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        "corners": {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    }[mode]
    model = model_of(
        [node("Resize", ["x", "", "s"], ["out"], **attrs)],
        {"x": IMAGE},
        {"s": np.array([1, 1, 2, 2], F32)},
    )
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(x),
        scale_factor=2,
        mode="nearest" if mode == "nearest" else "bilinear",
        align_corners=True if mode == "corners" else None,
    )
    np.testing.assert_allclose(run(model, tmp_path, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


def test_open_sizes_come_from_inputs_dict(tmp_path: Path) -> None:
    model = model_of([node("Relu", ["x"], ["out"])], {"x": ["N", 3]})
    x = grid([2, 3])
    with pytest.raises(LyngorError, match=r"input 'x' has the shape \[0, 3\] with unknown sizes"):
        run(model, tmp_path, {"x": x})
    (got,) = run(model, tmp_path, {"x": x}, inputs_dict={"x": (2, 3)})
    assert np.array_equal(got, np.maximum(x, 0))
    with pytest.raises(LyngorError, match="names y; the file's inputs are x"):
        run(model, tmp_path, {"x": x}, inputs_dict={"y": (2, 3)})


def test_chosen_outputs(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["b"])]
    model = model_of(nodes, {"x": [3]}, outputs=("a", "b"))
    x = grid([3])
    assert len(run(model, tmp_path, {"x": x})) == 2
    (got,) = run(model, tmp_path, {"x": x}, outputs=["b"])
    assert np.array_equal(got, -x)
    with pytest.raises(LyngorError, match="names c; the file's outputs are a, b"):
        run(model, tmp_path, {"x": x}, outputs=["c"])


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([node("CumSum", ["x", "i"], ["out"])], "CumSum in the graph: no such operation"),
        ([node("MaxPool", ["x"], ["out"], kernel_shape=[2])], "2-D pooling"),
        (
            [node("Erf", ["x"], ["a"]), node("CumSum", ["a", "i"], ["out"], name="/block/c")],
            "(?s)Erf in.*CumSum in block",
        ),
    ],
)
def test_what_is_refused(nodes: Any, text: str, tmp_path: Path) -> None:
    model = model_of(nodes, {"x": [1, 2, 6]}, {"i": I64(1)})
    with pytest.raises(LyngorError, match=text):
        run(model, tmp_path, {"x": grid([1, 2, 6])})


def test_rank_rule_holds_for_files(tmp_path: Path) -> None:
    model = model_of([node("Relu", ["x"], ["out"])], {"x": [1, 1, 1, 1, 2]})
    with pytest.raises(LyngorError, match="rank 4"):
        run(model, tmp_path, {"x": grid([1, 1, 1, 1, 2])})


def test_old_opsets_and_broken_files(tmp_path: Path) -> None:
    model = model_of([node("Relu", ["x"], ["out"])], {"x": [2]}, opset=9)
    with pytest.raises(LyngorError, match="opset 9; allowed: 11 to 21"):
        run(model, tmp_path, {"x": grid([2])})
    (tmp_path / "bad.onnx").write_bytes(b"\xff\x00 nothing")
    with pytest.raises(LyngorError, match="not a readable ONNX file"):
        lyngor.DLModel().load(tmp_path / "bad.onnx", "onnx")


def test_integer_input(tmp_path: Path) -> None:
    nodes = [node("Gather", ["w", "x"], ["out"])]
    table = grid([5, 3])
    model = model_of(nodes, {"x": [2]}, {"w": table}, kind=TensorProto.INT64)
    index = np.array([4, 0])
    assert np.array_equal(run(model, tmp_path, {"x": index})[0], table[index])
