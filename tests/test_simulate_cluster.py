"""The simulated cluster: no faster than its workers, no chunk lost or committed twice, and the same every time."""

from dataclasses import fields, replace

import numpy as np
import pytest

from benchmarks.simulate_check import real_run, told_of
from benchmarks.simulate_cluster import TABLES, fill, most_workers, parse_arguments, rate, shown_parameters, sized
from benchmarks.simulate_costs import (
    commit_costs,
    line_through,
    memory_costs,
    part_costs,
    prompt_texts,
    reading_costs,
    unlink_cost,
)
from benchmarks.simulation import ASSUMED, MEASURED, Cluster, draw_speeds, draw_work, simulate
from benchmarks.workloads import log_normal_lengths

SMALL = Cluster(rows=40_000, chunk_rows=64, workers=50, workers_per_node=10)
PERFECT = Cluster(
    rows=40_000,
    chunk_rows=64,
    workers=50,
    look_ahead=50,
    row_spread_s=0,
    startup_s=0,
    node_spread=0,
    straggler_share=0,
    worker_mtbf_s=0,
    node_mtbf_s=0,
    validate_s=0,
    pickle_s=0,
    payload=0,
    wait_s=0,
    scheduler_s=0,
    write_s=0,
    commit_s=0,
)
FRAGILE = replace(SMALL, worker_mtbf_s=600, node_mtbf_s=900, node_notice_s=20, node_restart_s=60, cut_off_share=0.5)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not():
    assert simulate(FRAGILE) == simulate(FRAGILE)
    assert simulate(FRAGILE).makespan != simulate(replace(FRAGILE, seed=1)).makespan


@pytest.mark.parametrize("cluster", [SMALL, PERFECT, FRAGILE])
@pytest.mark.parametrize("seed", range(5))
def test_no_run_is_faster_than_all_work_over_all_speed(cluster, seed):
    result = simulate(replace(cluster, seed=seed))
    assert result.makespan >= result.ideal * (1 - 1e-9)
    assert 0 < result.utilisation <= 1 + 1e-9
    assert result.parent_busy <= 1 + 1e-9


@pytest.mark.parametrize("chunk_rows", [1, 64, 1000])
def test_where_nothing_costs_or_fails_a_run_is_ideal_within_one_chunk(chunk_rows):
    cluster = replace(PERFECT, chunk_rows=chunk_rows)
    result = simulate(cluster)
    assert result.makespan <= result.ideal + chunk_rows * cluster.row_s + 1e-6
    assert result.losses == result.twice == 0


@pytest.mark.parametrize("seed", range(10))
def test_every_chunk_is_committed_once_whatever_fails(seed):
    result = simulate(replace(FRAGILE, seed=seed))
    assert result.commits == [1] * FRAGILE.chunks
    assert result.losses > 0
    assert result.wasted > 0


def test_results_of_nodes_that_were_cut_off_come_twice_and_count_once():
    runs = [simulate(replace(FRAGILE, seed=seed, cut_off_share=1.0)) for seed in range(10)]
    assert sum(run.twice for run in runs) > 0
    assert all(set(run.commits) == {1} for run in runs)


def test_the_time_of_workers_is_all_accounted_for():
    result = simulate(FRAGILE)
    spent = result.useful + result.wasted + result.writing + result.starting + result.down
    assert result.idle >= -1e-6
    assert spent + result.idle == pytest.approx(result.makespan * FRAGILE.workers)


def test_commits_one_after_another_bound_the_rate():
    cluster = replace(PERFECT, chunk_rows=1, rows=5_000, row_s=1e-6, commit_s=0.01, commit_sigma=0)
    result = simulate(cluster)
    assert cluster.chunks / result.makespan == pytest.approx(1 / cluster.commit_s, rel=1e-3)
    assert result.parent_busy == pytest.approx(1, rel=1e-3)


def test_a_parent_that_reads_slower_than_workers_generate_bounds_the_rate():
    cluster = replace(PERFECT, validate_s=0.01)
    result = simulate(cluster)
    assert cluster.rows / result.makespan == pytest.approx(1 / cluster.validate_s, rel=0.05)


def test_a_scheduler_that_is_slow_bounds_the_rate():
    cluster = replace(PERFECT, scheduler_s=1.0, row_s=1e-3)
    result = simulate(cluster)
    assert result.makespan == pytest.approx(cluster.chunks * cluster.scheduler_s, rel=0.05)


def test_failures_stragglers_and_latencies_cost_time():
    makespan = simulate(SMALL).makespan
    for worse in (
        replace(SMALL, straggler_share=0.4),
        replace(SMALL, worker_mtbf_s=300),
        replace(SMALL, write_s=5),
        replace(SMALL, commit_s=1),
    ):
        assert simulate(worse).makespan > makespan


def test_work_and_speed_have_the_mean_and_spread_that_are_asked_for():
    cluster = replace(SMALL, rows=6_400_000, workers=40_000, straggler_share=0)
    work = draw_work(cluster, np.random.default_rng(0))
    assert sum(work) == pytest.approx(cluster.rows * cluster.row_s, rel=0.01)
    variance = sum((w - cluster.chunk_rows * cluster.row_s) ** 2 for w in work) / len(work)
    assert variance == pytest.approx(cluster.chunk_rows * cluster.row_spread_s**2, rel=0.05)
    speeds = draw_speeds(cluster, np.random.default_rng(1))
    assert len(speeds) == cluster.workers
    assert sorted(speeds)[len(speeds) // 2] == pytest.approx(1, rel=0.02)


def test_workers_that_come_late_do_what_is_left():
    cluster = replace(PERFECT, rows=640, workers=2, workers_per_node=1)
    chunk_s = 64 * cluster.row_s
    assert simulate(cluster, starts=[0, 4 * chunk_s]).makespan == pytest.approx(7 * chunk_s)
    assert simulate(cluster, starts=[0, 99 * chunk_s]).makespan == pytest.approx(10 * chunk_s)


def test_the_last_chunk_may_be_short():
    cluster = replace(PERFECT, rows=130, chunk_rows=64, workers=1)
    assert cluster.chunks == 3
    assert simulate(cluster).makespan == pytest.approx(130 * cluster.row_s)


# ---- the command


def test_every_parameter_is_an_option_and_says_where_it_is_from():
    _, cluster = parse_arguments(["--workers", "7", "--commit-s", "0.5"])
    assert cluster == replace(Cluster(), workers=7, commit_s=0.5)
    shown = shown_parameters(cluster)
    assert all(f"`--{field.name.replace('_', '-')}`" in shown for field in fields(Cluster))
    assert all(basis in shown for basis in (MEASURED, ASSUMED))


def test_a_table_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--only", "run,nonsense"])
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "files", "merge"])
def test_a_table_has_as_many_cells_in_every_row(name):
    _, make = TABLES[name]
    rows = [line.count("|") for line in make(SMALL).splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert len(set(rows)) == 1


def test_small_chunks_cost_more_a_row():
    assert fill(16) > fill(64) > fill(192) == fill(8192)
    assert sized(SMALL, 16).row_s > SMALL.row_s
    assert sized(sized(SMALL, 16), 64).row_s == pytest.approx(SMALL.row_s)


@pytest.mark.parametrize("changes", [{}, {"commit_s": 0.1}, {"scheduler_s": 0.1}, {"chunk_rows": 64}])
def test_up_to_the_limit_the_workers_are_kept_busy_and_beyond_it_they_are_not(changes):
    steady = replace(PERFECT, row_s=0.3, validate_s=1e-3, commit_s=0.01, commit_sigma=0, chunk_rows=64)
    cluster = replace(steady, **changes)
    most = most_workers(cluster)

    def share(workers):
        c = replace(cluster, workers=workers, workers_per_node=1, look_ahead=workers, rows=workers * 20 * 64)
        result = simulate(c)
        return rate(result) / (c.rows / result.ideal)

    assert share(max(most // 2, 1)) > 0.95
    assert share(2 * most) == pytest.approx(0.5, rel=0.15)


# ---- what things cost: that it can be measured


def test_costs_can_be_measured(tmp_path):
    reading = reading_costs(tmp_path, 50)
    assert min(reading.values()) > 0
    memory = memory_costs(tmp_path, 1000)
    assert 50 < memory["ledger_bytes_per_chunk"] < 1000
    assert unlink_cost(tmp_path, 3) > 0
    assert set(commit_costs(tmp_path, (5, 300))) == {5, 300}
    assert part_costs(tmp_path, ((2, 3), (40, 3)))["part_bytes_per_row"] > 0


def test_a_line_goes_through_both_points():
    start, slope = line_through((16, 1.16), (512, 6.12))
    assert (start, slope) == pytest.approx((1.0, 0.01))


def test_prompts_are_as_long_as_w1s():
    lengths = sorted(map(len, prompt_texts(192)))
    assert [n // 4 for n in lengths] == log_normal_lengths(192)


def test_a_simulation_is_told_of_two_real_runs():
    cluster = told_of(short=7.0, long=17.0, jobs=2)
    assert simulate(cluster).makespan == pytest.approx(17.0, rel=0.1)
    assert simulate(replace(cluster, rows=500)).makespan == pytest.approx(7.0, rel=0.2)


def test_a_real_run_of_workers_that_sleep_takes_as_long_as_they_do():
    seconds, starts = real_run(4, jobs=1, chunk_rows=2, asleep=0.1)
    assert seconds >= 0.4
    assert starts == [0]
