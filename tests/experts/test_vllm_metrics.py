"""What is read from vLLM's `/metrics`; the samples are a real server's (0.32)."""

from __future__ import annotations

import pytest

from experts.vllm_metrics import Seconds, VllmMetrics, read_metrics

REAL = """\
# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",major="3",minor="11"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="smollm2"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="smollm2"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="smollm2",reason="capacity"} 7.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="smollm2"} 0.25
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="smollm2"} 400.0
vllm:prefix_cache_queries_created{engine="0",model_name="smollm2"} 1.795381643921702e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="smollm2"} 100.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="smollm2"} 1.2e+06
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="smollm2"} 4.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="smollm2"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.25",model_name="smollm2"} 6.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="smollm2"} 8.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="smollm2"} 10.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="smollm2"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="smollm2"} 4.5
vllm:time_to_first_token_seconds_created{engine="0",model_name="smollm2"} 1.7953816439226532e+09
"""


def test_a_real_page() -> None:
    metrics = read_metrics(REAL)
    assert (metrics.running, metrics.waiting, metrics.cache_use) == (3, 2, 0.25)
    assert (metrics.prompt_tokens, metrics.generation_tokens, metrics.prefix_hit_rate) == (1_200_000, 4, 0.25)
    first = metrics.first_token
    assert first is not None
    assert (first.count, first.mean) == (10, 0.45)


def test_quantiles_are_those_of_prometheus() -> None:
    first = read_metrics(REAL).first_token
    assert first is not None
    assert first.quantile(0.3) == pytest.approx(0.1 + 0.15 * 3 / 6)
    assert first.quantile(0.6) == pytest.approx(0.25)
    assert first.quantile(0.7) == pytest.approx(0.25 + 0.25 * 1 / 2)
    assert first.quantile(0.95) == 0.5, "beyond the last bound nothing is known"
    assert first.quantile(0) == pytest.approx(0.1)


def test_before_the_first_request() -> None:
    first = Seconds(count=0, total=0.0, bounds=((0.1, 0.0), (float("inf"), 0.0)))
    assert first.mean is None
    assert first.quantile(0.5) is None


def test_several_engines_are_summed_and_the_fullest_cache_counts() -> None:
    both = REAL + REAL.replace('engine="0"', 'engine="1"').replace("} 0.25", "} 0.75")
    metrics = read_metrics(both)
    assert (metrics.running, metrics.waiting, metrics.cache_use) == (6, 4, 0.75)
    assert metrics.first_token is not None
    assert (metrics.first_token.count, metrics.first_token.quantile(0.6)) == (20, pytest.approx(0.25))


def test_older_names() -> None:
    old = REAL.replace("kv_cache_usage", "gpu_cache_usage").replace("prefix_cache", "gpu_prefix_cache")
    assert read_metrics(old) == read_metrics(REAL)


@pytest.mark.parametrize("page", ["", "# nothing\n", 'vllm:num_requests_running{engine="0"} NaN\n', "x y z\n\x00"])
def test_what_is_not_told_is_none(page: str) -> None:
    assert read_metrics(page) == VllmMetrics()


@pytest.mark.parametrize("value", ["many", "-1", "+Inf", ""])
def test_nonsense(value: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_metrics(f'vllm:num_requests_running{{engine="0"}} {value}\n')
