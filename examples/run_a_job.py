"""Complete a file of prompts: python examples/run_a_job.py data/prompts/sample.jsonl completions.parquet

Interrupt it and run it again: it resumes from the finished chunks.
"""

import sys

from batchgen import BatchgenError, run_job


def main(prompts: str, output: str) -> int:
    try:
        summary = run_job(prompts, output, max_tokens=16)
    except BatchgenError as error:  # its text is one line, for the user
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{summary.output}: {summary.ok} ok, {summary.rejected} rejected, {summary.failed} failed")
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
