"""onnxruntime's products with weights, float32 and uint8 x int8: prints JSON, {"onnxruntime float32": {"96": GF/s}}."""

import json
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def session(shapes: list[list[int]], layers: int, quantised: bool) -> ort.InferenceSession:
    """A graph of independent products of x768 and x3072 with weights of its own, which are packed when it is loaded."""
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    kind = TensorProto.UINT8 if quantised else TensorProto.FLOAT
    for layer in range(layers):
        for number, (n_in, n_out) in enumerate(shapes):
            name = f"w{layer}_{number}"
            if quantised:
                w = rng.integers(-127, 128, (n_in, n_out)).astype(np.int8)
            else:
                w = rng.standard_normal((n_in, n_out), dtype=np.float32)
            weights.append(numpy_helper.from_array(w, name))
            nodes.append(helper.make_node("MatMulInteger" if quantised else "MatMul", [f"x{n_in}", name], [f"y{name}"]))
            out = TensorProto.INT32 if quantised else TensorProto.FLOAT
            outputs.append(helper.make_tensor_value_info(f"y{name}", out, ["m", n_out]))
    inputs = [helper.make_tensor_value_info(f"x{n}", kind, ["m", n]) for n in sorted({n for n, _ in shapes})]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    job = json.loads(sys.argv[1])
    shapes, rows, layers = job["shapes"], job["rows"], job["layers"]
    result: dict[str, dict[str, float]] = {}
    rng = np.random.default_rng(0)
    flop = sum(2 * n_in * n_out for n_in, n_out in shapes) * layers
    for name, quantised in (("float32", False), ("int8", True)):
        run = session(shapes, layers, quantised)
        for m in rows:
            x = {n: rng.integers(0, 256, (m, n)).astype(np.uint8 if quantised else np.float32) for n, _ in shapes}
            best = float("inf")
            for _ in range(job["repeat"]):
                start = time.perf_counter()
                run.run(None, {f"x{n}": value for n, value in x.items()})
                best = min(best, time.perf_counter() - start)
            result.setdefault(f"onnxruntime {ort.__version__} {name}", {})[str(m)] = m * flop / best / 1e9
    print(json.dumps(result))


if __name__ == "__main__":
    main()
