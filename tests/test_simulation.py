"""The simulated cluster: no faster than its workers, every chunk committed once, and the same run for the same seed."""

from dataclasses import fields, replace
from math import inf, sqrt
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulation import tables
from benchmarks.simulation.__main__ import TABLES, parse_arguments
from benchmarks.simulation.check import fit, run_real
from benchmarks.simulation.model import OTHER_ACTIVITIES, WORKER_ACTIVITIES, Cluster, Run, simulate
from benchmarks.simulation.tables import most_workers

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
SMALL = Cluster(rows=40_000, chunk_rows=64, workers=50, workers_per_node=10)
EQUAL = {"row_spread_s": 0.0, "node_spread": 0.0, "straggler_share": 0.0, "relative_cost": ((64, 1.0),)}
FREE = {"validate_s": 0.0, "pickle_s": 0.0, "row_bytes": 0.0, "wait_s": 0.0, "scheduler_s": 0.0}
PERFECT = replace(
    SMALL, look_ahead=50, startup_s=0.0, worker_mtbf_s=inf, node_mtbf_s=inf, write_s=0.0, commit_s=0.0, **EQUAL, **FREE
)
FRAGILE = replace(SMALL, worker_mtbf_s=600, node_mtbf_s=900, node_notice_s=20, node_restart_s=60)


def test_the_same_seed_gives_the_same_run_and_another_seed_another_run():
    first, second = simulate(FRAGILE), simulate(FRAGILE)
    assert (first.now, first.spent, first.sent_at) == (second.now, second.spent, second.sent_at)
    assert first.now != simulate(replace(FRAGILE, seed=1)).now


@pytest.mark.parametrize("cluster", [SMALL, PERFECT, FRAGILE])
@pytest.mark.parametrize("seed", range(5))
def test_no_run_is_faster_than_all_work_divided_by_all_speed(cluster, seed):
    run = simulate(replace(cluster, seed=seed))
    assert run.now >= run.ideal * (1 - 1e-9)
    assert 0 < run.spent["generating"] <= run.now * cluster.workers * (1 + 1e-9)
    assert sum(run.spent[name] for name in OTHER_ACTIVITIES if name != "scheduler") <= run.now * (1 + 1e-9)


@pytest.mark.parametrize("chunk_rows", [1, 64, 1000])
def test_without_costs_and_losses_a_run_is_ideal_within_one_chunk(chunk_rows):
    cluster = replace(PERFECT, chunk_rows=chunk_rows)
    run = simulate(cluster)
    assert run.now <= run.ideal + chunk_rows * cluster.mean_row_s + 1e-6
    assert run.losses == 0


@pytest.mark.parametrize("seed", range(10))
def test_every_chunk_is_committed_once_whatever_fails(seed):
    run = simulate(replace(FRAGILE, seed=seed))
    assert run.commits == [1] * FRAGILE.chunks
    assert run.losses > 0
    assert run.spent["lost work"] > 0


def test_all_time_of_the_workers_is_accounted_for():
    run = simulate(FRAGILE)
    assert run.spent["idle"] >= 0
    assert sum(run.spent[name] for name in WORKER_ACTIVITIES) == pytest.approx(run.now * FRAGILE.workers)


@pytest.mark.parametrize("cluster", [SMALL, PERFECT, FRAGILE])
def test_more_workers_are_never_slower_beyond_noise(cluster):
    def mean_makespan(workers):
        seeds = (replace(cluster, workers=workers, seed=seed) for seed in range(10))
        return np.mean([simulate(c).now for c in seeds])

    makespans = [mean_makespan(workers) for workers in (1, 10, 20, 50, 100, 200)]
    assert all(more <= 1.05 * fewer for fewer, more in zip(makespans, makespans[1:], strict=False))


def test_commits_one_after_another_bound_the_rate():
    cluster = replace(PERFECT, chunk_rows=1, rows=5_000, row_s=1e-6, commit_s=0.01)
    run = simulate(cluster)
    assert run.now == pytest.approx(cluster.chunks * cluster.commit_s, rel=1e-3)
    assert run.spent["parent: committing"] == pytest.approx(run.now, rel=1e-3)


def test_a_parent_that_reads_slower_than_workers_generate_bounds_the_rate():
    cluster = replace(PERFECT, validate_s=0.01)
    assert simulate(cluster).now == pytest.approx(cluster.rows * cluster.validate_s, rel=0.05)


def test_a_slow_scheduler_bounds_the_rate():
    cluster = replace(PERFECT, scheduler_s=1.0, row_s=1e-3)
    assert simulate(cluster).now == pytest.approx(cluster.chunks * cluster.scheduler_s, rel=0.05)


@pytest.mark.parametrize("worse", [{"straggler_share": 0.4}, {"worker_mtbf_s": 300}, {"write_s": 5}, {"commit_s": 1}])
def test_losses_stragglers_and_latencies_cost_time(worse):
    assert simulate(replace(SMALL, **worse)).now > simulate(SMALL).now


def test_work_and_speed_have_the_mean_and_the_spread_of_the_parameters():
    c = replace(SMALL, rows=6_400_000, workers=40_000, straggler_share=0)
    run = Run(c)
    assert np.mean(run.work_s) == pytest.approx(c.chunk_rows * c.mean_row_s, rel=0.01)
    assert np.std(run.work_s) == pytest.approx(sqrt(c.chunk_rows) * c.row_spread_s, rel=0.05)
    assert len(run.speeds) == c.workers
    assert np.median(run.speeds) == pytest.approx(1, rel=0.02)


def test_the_last_chunk_may_be_short():
    cluster = replace(PERFECT, rows=130, workers=1)
    assert cluster.chunks == 3
    assert simulate(cluster).now == pytest.approx(130 * cluster.mean_row_s)


def test_small_chunks_cost_more_for_each_row():
    costs = [replace(SMALL, chunk_rows=n).mean_row_s for n in (16, 64, 192, 8192)]
    assert costs[0] > costs[1] > costs[2] == costs[3] == SMALL.row_s


@pytest.mark.parametrize("changes", [{}, {"commit_s": 0.1}, {"scheduler_s": 0.1}, {"chunk_rows": 16}])
def test_up_to_the_limit_the_workers_are_busy_and_beyond_it_they_are_not(changes):
    cluster = replace(PERFECT, **({"row_s": 0.3, "validate_s": 1e-3, "commit_s": 0.01} | changes))
    most = most_workers(cluster)

    def rate_share(workers):
        c = replace(cluster, workers=workers, workers_per_node=1, look_ahead=workers)
        return tables.steady(c).rate_share

    assert rate_share(max(most // 2, 1)) > 0.95
    assert rate_share(2 * most) == pytest.approx(0.5, rel=0.15)


# ---- the command


def test_every_parameter_is_an_option():
    _, cluster = parse_arguments(["--workers", "7", "--commit-s", "0.5", "--node-mtbf-s", "inf"])
    assert cluster == replace(Cluster(), workers=7, commit_s=0.5, node_mtbf_s=inf)


def test_the_document_lists_every_parameter_with_its_value():
    text = DOCUMENT.read_text(encoding="utf-8")
    for field in (field for field in fields(Cluster) if field.metadata):
        basis, _, meaning = field.metadata["meaning"].partition(": ")
        assert f"| `--{field.name.replace('_', '-')}` | {field.default:g} | {basis} | {meaning} |" in text


@pytest.mark.parametrize("name", ["limits", "files"])  # the others take minutes
def test_the_document_shows_the_table_that_the_command_prints(name):
    assert TABLES[name](Cluster()) in DOCUMENT.read_text(encoding="utf-8")


def test_an_unknown_table_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--only", "run", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "files", "limits"])
def test_a_table_has_as_many_cells_in_every_row(name):
    rows = [line.count("|") for line in TABLES[name](SMALL).splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert len(set(rows)) == 1


# ---- beside real runs


def test_a_simulation_repeats_the_two_runs_that_it_is_fitted_to():
    cluster = fit(short_s=7.0, long_s=17.0)
    assert simulate(cluster).now == pytest.approx(17.0, rel=0.1)
    assert simulate(replace(cluster, rows=500)).now == pytest.approx(7.0, rel=0.2)


@pytest.mark.processes
def test_a_real_run_is_timed_by_its_status_file():
    assert 0 < run_real(rows=4, chunk_rows=2) < 300
