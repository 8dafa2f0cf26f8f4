"""oneDNN's products with weights, by PyTorch: prints JSON, {"oneDNN bfloat16": {"96": GF/s}}."""

import json
import sys
import time

import torch
from torch.utils import mkldnn


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    result: dict[str, dict[str, float]] = {}
    flop = sum(2 * n_in * n_out for n_in, n_out in job["shapes"]) * job["layers"]
    with torch.inference_mode():
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            layers = [torch.nn.Linear(n_in, n_out) for _ in range(job["layers"]) for n_in, n_out in job["shapes"]]
            packed = [mkldnn.to_mkldnn(layer.eval(), dtype) for layer in layers]
            for m in job["rows"]:
                x = {n_in: torch.randn(m, n_in).to(dtype).to_mkldnn() for n_in, _ in job["shapes"]}
                best = float("inf")
                for _ in range(job["repeat"]):
                    start = time.perf_counter()
                    for layer, source in zip(packed, layers, strict=True):
                        layer(x[source.in_features])
                    best = min(best, time.perf_counter() - start)
                result.setdefault(f"oneDNN (PyTorch {torch.__version__}) {name}", {})[str(m)] = m * flop / best / 1e9
    print(json.dumps(result))


if __name__ == "__main__":
    main()
