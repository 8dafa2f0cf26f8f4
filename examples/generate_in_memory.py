"""Complete prompts that are in memory, in this process: python examples/generate_in_memory.py"""

from batchgen import Generator, SamplingParams

generator = Generator("tales")  # the embedded model; `batchgen models` lists others
params = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=7, n=2)

for row in generator.generate(["Once upon a time", "The king"], params):
    print(f"{row.prompt!r}, sample {row.sample} -> {row.completion!r} ({row.finish_reason})")
