"""batchgen generate: prompts in, completions out."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from batchgen.errors import UsageError
from batchgen.input.readers import DEFAULT_ID_COLUMN
from batchgen.jobs import options, report
from batchgen.jobs.fetch import fetch_shown, is_to_be_fetched
from batchgen.jobs.html_report import page_beside
from batchgen.jobs.logs import log_as_json
from batchgen.jobs.progress import ProgressStyle, showing_progress
from batchgen.models.registry import DEFAULT_MODEL
from batchgen.output.store import is_address, stand_in
from batchgen.progress import status_path
from batchgen.review.report.page import check_page, write_report
from batchgen.run import Backend, Job, Summary, checked, run_job
from batchgen.types import SamplingParams

logger = logging.getLogger(__name__)


def generate(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Prompts: JSON lines, CSV or Parquet; files, globs, directories, s3:// and the like, or - (stdin).",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUTPUT",
            help="Where to: .parquet or .jsonl, a folder, or either as s3:// and the like; - is JSON lines to stdout.",
        ),
    ],
    model: options.Model = DEFAULT_MODEL,
    prompt_column: options.PromptColumn = "prompt",
    id_column: options.IdColumn = DEFAULT_ID_COLUMN,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COL", help="A column to carry to the output; can be given again.")
    ] = None,
    input_format: options.Format = "auto",
    max_tokens: options.MaxTokens = 40,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    min_tokens: options.MinTokens = 0,
    ignore_eos: options.IgnoreEos = False,
    stop: options.Stop = None,
    include_stop: options.IncludeStop = False,
    bad_words: options.BadWords = None,
    stop_token_ids: options.StopTokenIds = "",
    logit_bias: options.LogitBias = "",
    stop_loops: options.StopLoops = False,
    echo: options.Echo = False,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples of each prompt; a row of output each.")] = 1,
    seed: options.Seed = 0,
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="Add columns of log-probabilities: each token's, and the K highest.")
    ] = None,
    output_token_ids: Annotated[bool, typer.Option(help="Add a column of the completion's token ids.")] = False,
    on_too_long: options.TooLong = "reject",
    empty_prompt: options.Empty = "reject",
    trim: options.Trim = False,
    row_params: options.RowParams = True,
    jobs: options.Jobs = "auto",
    batch_size: options.BatchSize = "auto",
    chunk_rows: options.ChunkRows = "auto",
    kv_memory: options.KvMemory = "auto",
    share_prefixes: options.SharePrefixes = True,
    backend: Annotated[
        Backend, typer.Option(help="Workers of this machine, or those of a Dask or Ray cluster.")
    ] = "loky",
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Dask's: tcp://HOST:8786, or its scheduler file (.json).")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray's: HOST:6379, ray://HOST:10001; auto is the one of here.")
    ] = None,
    model_cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where each node keeps its own copy of the model.")
    ] = None,
    require_invariant: Annotated[
        bool, typer.Option("--require-invariant", help="Refuse to run where rows depend on their company.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart/--resume", help="Discard what an interrupted run did.")] = False,
    row_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="A worker without a step for so long hangs: 30s, 10m (default).")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Stop in time, exit code 75: 50m, 7h30m; run again to go on."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the failed rows of a finished output again.")
    ] = False,
    output_format: Annotated[
        Literal["file", "dataset"], typer.Option("--format", help="One file, or a folder of Parquet parts.")
    ] = "file",
    work_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the work of an output in an object store is kept; else the folder you are in."
        ),
    ] = None,
    status: Annotated[bool, typer.Option(help="Keep OUTPUT.status.json up to date, for machines.")] = True,
    log_json: Annotated[
        bool, typer.Option("--log-json", callback=log_as_json, help="Messages as JSON, one object a line.")
    ] = False,
    fetch: Annotated[bool, typer.Option(help="Fetch one of OpenAI's models where it is not here yet.")] = True,
    progress: Annotated[ProgressStyle, typer.Option(help="A bar, lines, or nothing.")] = "auto",
    show: Annotated[int, typer.Option(min=0, help="Completions to show at the end.")] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    html_report: Annotated[
        bool, typer.Option("--report", help="Write a report too, beside the output as .html.")
    ] = False,
) -> None:
    """Complete every prompt of INPUT; every row is accounted for in the output, in input order.

    An interrupted run is gone on with by running the same command again. Exit code 0: every row ok; 3: some
    were rejected or failed, and say why in the output; 1: the job could not run; 2: usage; 75: run again later.

    Example: batchgen generate prompts.jsonl -o completions.parquet --max-tokens 64 --temperature 0.8
    """
    if (scheduler and backend != "dask") or (address and backend != "ray"):
        given, wanted = ("--scheduler", "dask") if scheduler and backend != "dask" else ("--address", "ray")
        raise UsageError(
            f"{given} names a {wanted.title()} cluster, and this is --backend {backend}; add --backend {wanted}"
        )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        n=n,
        seed=seed,
        logprobs=logprobs,
        stop=tuple(stop or ()),
        include_stop=include_stop,
        stop_token_ids=options.parse_token_ids(stop_token_ids),
        logit_bias=options.parse_biases(logit_bias),
        bad_words=tuple(bad_words or ()),
        stop_loops=stop_loops,
        echo=echo,
    )
    remote = is_address(output)
    if output == str(report.STDOUT) and backend != "loky":
        raise UsageError("-o -: a cluster's nodes write to a folder that all share; name a file there")
    if output == str(report.STDOUT) and output_format == "dataset":
        raise UsageError("-o -: a dataset is a folder of files; name one, such as completions/")
    if work_dir and not remote:
        raise UsageError("--work-dir: a local output keeps its work beside it; leave it away, or name s3://bucket/...")
    path = stand_in(output, work_dir or Path()) if remote else Path(output)
    if not path.name:
        raise UsageError(f"-o {output!r} is no file's name; name one, such as completions.parquet")
    job = Job(
        input=inputs,
        output=path,
        destination=output if remote else None,
        model=model,
        params=params,
        prompt_column=prompt_column,
        id_column=id_column,
        input_format=input_format,
        keep=tuple(keep or ()),
        on_too_long=on_too_long,
        empty_prompt=empty_prompt,
        trim=trim,
        row_params=row_params,
        jobs=options.parse_count(jobs, "--jobs"),
        batch_size=options.parse_count(batch_size, "--batch-size"),
        chunk_rows=options.parse_count(chunk_rows, "--chunk-rows"),
        kv_bytes=options.parse_size(kv_memory, "--kv-memory"),
        share_prefixes=share_prefixes,
        token_ids=output_token_ids,
        require_invariant=require_invariant,
        restart=restart,
        time_limit=options.parse_duration(time_limit, "--time-limit"),
        dataset=output_format == "dataset",
        retry_failed=retry_failed,
        status=status_path(path) if status else None,
        row_timeout=options.parse_duration(row_timeout, "--row-timeout"),
        backend=backend,
        address=scheduler or address,
        model_cache=model_cache,
    )
    if html_report:
        if job.dataset or remote or path == report.STDOUT:
            raise UsageError("--report: a report is about one output file; leave it away, or name a .parquet file")
        check_page(path, page_beside(path))
    if quiet:
        progress = "none"
    with report.destination(path) as local:
        if local != path:  # which is standard output
            job = replace(job, output=local, status=None)
        if fetch and is_to_be_fetched(model):
            job = checked(job)  # before hours of download, not after
            fetch_shown(model, progress)
        with showing_progress(progress) as on_progress:
            summary = run_job(job, on_progress)
    if path == report.STDOUT:
        summary = replace(summary, output=path)
    page = write_report(path, page_beside(path)) if html_report else None
    if not quiet:
        with report.to_whoever_reads():
            _print_summary(summary, show, page)
    logger.info("finished", extra={"values": {"exit_code": summary.exit_code} | summary.statuses})
    sys.exit(summary.exit_code)


def _print_summary(summary: Summary, show: int, page: Path | None) -> None:
    to_stdout = summary.output == report.STDOUT
    for line in report.summary_lines(summary):
        typer.echo(line, err=to_stdout)
    if page:
        typer.echo(f"report: {report.one_line(str(page))}")
    if show and summary.rows and not to_stdout and isinstance(summary.output, Path):
        typer.echo("")
        for line in report.sample_lines(summary.output, show):
            typer.echo(line)
