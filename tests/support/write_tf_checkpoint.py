"""Write an OpenAI checkpoint with TensorFlow: write_tf_checkpoint.py DIRECTORY '{"n_vocab": ...}' SEED [--training].

It runs in its own process because TensorFlow prints and warns, and the tests turn warnings into errors. The weights
are random_tensors(config, seed) under OpenAI's names and shapes (linear weights have a dimension of 1 in front).
--training adds the variables of an optimizer.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

import tensorflow as tf  # noqa: E402

from batchgen.gpt2.config import GPT2Config  # noqa: E402
from tests.support.tensors import random_tensors  # noqa: E402


def main(directory: Path, hparams: dict[str, int], seed: int, training: str = "") -> None:
    tensors = random_tensors(GPT2Config(**hparams), seed)
    del tensors["lm_head"]
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        for name in list(tensors):
            array = tensors.pop(name)  # TensorFlow has its own copy; two of 1558M need too much memory
            value = array[None] if array.ndim == 2 and name.startswith("h") else array
            given = tf1.placeholder(tf.float32, value.shape)
            variable = tf1.get_variable(f"model/{name}", initializer=given)
            session.run(variable.initializer, {given: value})
            if training:
                for slot in ("Adam", "Adam_1"):
                    session.run(tf1.get_variable(f"model/{name}/{slot}", initializer=tf.zeros(value.shape)).initializer)
        if training:
            step, text = tf.constant(7, tf.int64), tf.constant(["some", "text"])
            for name, value in {"global_step": step, "beta1_power": tf.constant(0.9), "note": text}.items():
                session.run(tf1.get_variable(name, initializer=value).initializer)
        tf1.train.Saver().save(session, str(directory / "model.ckpt"))
    (directory / "hparams.json").write_text(json.dumps(hparams, indent=2))
    (directory / "encoder.json").write_text('{"<|endoftext|>": 0}')
    (directory / "vocab.bpe").write_text("#version: 0.2\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
