"""Hugging Face directory -> GGUF file: convert_llama_cpp SRC DST f16|q8_0, as llama.cpp's own script maps GPT-2."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def read_safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start + first : start + last], "<f4").reshape(entry["shape"])
    return tensors


def gguf_name(name: str) -> str:
    """`transformer.h.3.mlp.c_fc.weight` -> `blk.3.ffn_up.weight`."""
    _, *path, leaf = name.split(".")
    if path[0] == "h":
        return f"blk.{path[1]}.{NAMES['.'.join(path[2:])]}.{leaf}"
    return f"{NAMES['.'.join(path)]}.{leaf}"


def add_metadata(writer: gguf.GGUFWriter, source: Path, file_type: int) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_ctx"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(file_type)
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = (source / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(vocabulary) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([merge for merge in merges if merge])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def main() -> None:
    source, target, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tensor_type, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(target, "gpt2")
    add_metadata(writer, source, file_type)
    for name, tensor in read_safetensors(source / "model.safetensors").items():
        linear = "c_" in name and tensor.ndim == 2
        values = np.ascontiguousarray(tensor.T if linear else tensor)  # [out, in]
        if linear or name == "transformer.wte.weight":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, tensor_type), raw_dtype=tensor_type)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
