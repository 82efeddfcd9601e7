"""The reference, compared with plain Python that handles one query and one key at a time."""

import math
from dataclasses import replace

import pytest
import torch

from kernels.hyper_attention.reference import all_log_weights, log_weights, reference_attention
from tests.kernels.hyper_attention.attention_samples import LOCAL, PAPER, inputs, plan_of


@pytest.mark.parametrize(("config", "causal"), [(PAPER, False), (PAPER, True), (replace(LOCAL, choice="lsh"), True)])
def test_each_key_counts_as_often_as_its_weight_says(config, causal):
    q, k, v = inputs(Hq=4, Hk=2, T=40)
    plan = plan_of(q, k, causal, config)
    weight = all_log_weights(plan, 4, 2).exp().double()
    out, lse = reference_attention(q, k, v, plan, 0.3)
    for head, row in ((0, 39), (3, 17), (2, 0)):
        keys = range(40)
        share = [
            float(weight[0, head, row, key]) * math.exp(0.3 * float(q[0, head, row] @ k[0, head // 2, key]))
            for key in keys
        ]
        value = sum(share[key] * v[0, head // 2, key] for key in keys) / sum(share)
        torch.testing.assert_close(out[0, head, row], value)
        assert float(lse[0, head, row].detach()) == pytest.approx(math.log(sum(share)), rel=1e-5)


def test_a_plan_that_reads_a_key_twice_is_refused():
    q, k, _ = inputs(T=100)
    plan = plan_of(q, k, True, LOCAL)
    with pytest.raises(RuntimeError, match="read a key twice"):
        log_weights(replace(plan, sinks=plan.band), 2, 2)
