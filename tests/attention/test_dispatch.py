"""Choosing a backend: order of the ways to ask, refusals with reasons, explanations."""

import pytest
import torch

from saccade.attention import attention, attention_lse, explain, merge_partials, operators, use_backend
from saccade.attention.dispatch import Backend, Decision, Operator
from saccade.attention.problem import describe
from saccade.attention.sdpa import can_run_attention, can_run_attention_lse
from saccade.errors import BackendError
from tests.helpers import assert_close, randn

TENSORS = [randn(1, 2, 5, 8, seed=i) for i in range(3)]
BIAS = torch.zeros(5, 5, requires_grad=True)
VARIABLE = "SACCADE_ATTENTION_BACKEND"


def problem(**options):
    return describe(*TENSORS, **options)


def chosen(**options):
    return explain(attention_lse, *TENSORS, **options).chosen


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_argument_beats_context_beats_environment(monkeypatch):
    assert chosen() == "sdpa"
    monkeypatch.setenv(VARIABLE, "reference")
    assert chosen() == "reference"
    with use_backend("sdpa"):
        assert chosen() == "sdpa"
        assert chosen(backend="reference") == "reference"
        with use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "sdpa"
        with use_backend("auto"):
            assert chosen() == "reference"
    monkeypatch.setenv(VARIABLE, "")
    assert chosen() == "sdpa"


def test_the_choice_is_what_runs(monkeypatch):
    ran = []
    backends = tuple(
        Backend(name, lambda p: Decision(True, ""), lambda *args, n=name: ran.append(n)) for name in ("first", "second")
    )
    operator = Operator(attention, "", backends, describe, None)
    operator.choose(problem(), "auto").run()
    operator.choose(problem(), "second").run()
    monkeypatch.setenv(VARIABLE, "second")
    operator.choose(problem(), "auto").run()
    assert ran == ["first", "second", "second"]


def test_context_ends_with_an_error_inside():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert chosen() == "sdpa"


@pytest.mark.parametrize("ask", ["argument", "context", "environment"])
def test_an_explicit_choice_that_cannot_run_is_refused_with_the_reason(ask, monkeypatch):
    if ask == "argument":
        with pytest.raises(
            BackendError, match=r"'sdpa' \(asked for by backend=\): the kernel gives no gradient of the b"
        ):
            attention_lse(*TENSORS, bias=BIAS, backend="sdpa")
    elif ask == "context":
        with use_backend("sdpa"), pytest.raises(BackendError, match="asked for by use_backend"):
            attention_lse(*TENSORS, bias=BIAS)
    else:
        monkeypatch.setenv(VARIABLE, "sdpa")
        with pytest.raises(BackendError, match=f"asked for by {VARIABLE}"):
            attention_lse(*TENSORS, bias=BIAS)


def test_unknown_backends_are_named_and_a_near_one_suggested(monkeypatch):
    with pytest.raises(BackendError, match=r"attention has no backend 'sdp'.*auto, sdpa, reference.*mean 'sdpa'"):
        attention(*TENSORS, backend="sdp")
    with pytest.raises(BackendError, match=r"unknown attention backend 'refrence'.*mean 'reference'"):
        use_backend("refrence").__enter__()
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(BackendError, match=f"'fast' .asked for by {VARIABLE}"):
        attention(*TENSORS)


def test_automatic_choice_runs_whatever_the_reference_can():
    empty = torch.zeros(1, 2, 0, 8)
    for tensors, options in [(TENSORS, {"bias": BIAS}), ([TENSORS[0], empty, empty], {}), ([empty, *TENSORS[1:]], {})]:
        attention(*tensors, **options)
        assert attention_lse(*tensors, **options).out.isfinite().all()


def test_refusals_of_the_cpu_kernel():
    assert can_run_attention_lse(problem()).ok
    assert can_run_attention_lse(problem(bias=BIAS.detach(), causal=True)).ok
    for refused, reason in [
        (problem(bias=BIAS), "no gradient of the bias"),
        (describe(TENSORS[0], *(t[:, :, :0] for t in TENSORS[1:])), "at least one"),
        (describe(*(t[:0] for t in TENSORS)), "at least one"),
        (describe(*(t.to("meta") for t in TENSORS)), "runs on cpu, not on meta"),
    ]:
        decision = can_run_attention_lse(refused)
        assert not decision.ok
        assert reason in decision.reason


def test_sdpa_says_where_it_is_not_fused():
    assert "fused" in can_run_attention(problem()).reason
    assert "gradient of the bias" in can_run_attention(problem(bias=BIAS)).reason
    assert "dropout" in can_run_attention(problem(dropout_p=0.1)).reason


def test_explanation_as_text():
    text = str(explain(attention_lse, *TENSORS, bias=BIAS, causal=True))
    assert text.splitlines() == [
        "attention_lse: query (1, 2, 5, 8), key (1, 2, 5, 8), Dv 8, float32 on cpu, bias, causal",
        "   triton     no   the kernel gives no gradient of the bias",
        "   sdpa       no   the kernel gives no gradient of the bias",
        "-> reference  yes  literal form, holds the L x S scores",
    ]
    forced = explain(attention_lse, *TENSORS, bias=BIAS, backend="sdpa")
    assert forced.chosen is None
    assert str(forced).endswith("'sdpa' was asked for and cannot run this call")


def test_explain_takes_operators_only():
    with pytest.raises(BackendError, match="merge_partials is not an attention operator; these are: attention, "):
        explain(merge_partials, *TENSORS)


def test_every_operator_ends_in_the_reference_and_explains_itself_here():
    assert [operator.name for operator in operators()] == sorted(operator.name for operator in operators())
    for operator in operators():
        assert operator.backends[-1].name == "reference"
        explanation = operator.explain()
        assert explanation.chosen is not None
        assert all(row.reason for row in explanation.rows)


@pytest.mark.parametrize("operator", operators(), ids=lambda operator: operator.name)
def test_every_backend_of_every_operator_agrees_with_its_literal_form(operator):
    tensors = operator.example((1, 2, 17, 8), torch.float32, "cpu", 0)
    expected = torch.utils._pytree.tree_leaves(operator.function(*tensors, backend="reference"))
    for row in explain(operator.function, *tensors).rows:
        if row.ok:
            got = torch.utils._pytree.tree_leaves(operator.function(*tensors, backend=row.backend))
            for ours, theirs in zip(got, expected, strict=True):
                if ours is None:  # a result that this call does not have
                    assert theirs is None
                else:
                    assert_close(ours, theirs)
