"""Hugging Face's model to OpenVINO's: SOURCE TARGET KIND, where KIND is float32 (or bfloat16) or int8 weights."""

import sys

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def main() -> None:
    source, target, kind = sys.argv[1:]
    quantization = OVWeightQuantizationConfig(bits=8) if kind == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, load_in_8bit=False, quantization_config=quantization
    )
    model.save_pretrained(target)


if __name__ == "__main__":
    main()
