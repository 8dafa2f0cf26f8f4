"""Hugging Face directory -> CTranslate2 model: convert_ctranslate2 SRC DST float32|int8."""

import sys

from ctranslate2.converters import TransformersConverter

if __name__ == "__main__":
    source, target, quantization = sys.argv[1:]
    TransformersConverter(source).convert(target, quantization=quantization, force=True)
