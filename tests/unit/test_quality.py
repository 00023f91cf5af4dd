"""benchmarks/quality*.py: the figures on distributions small enough to work out, and the shift that changes nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.quality import (
    CHUNK,
    CONTEXT_ONLY,
    COUNTED,
    WINDOW,
    Format,
    LlamaSource,
    NativeSource,
    formats,
    measure,
    number_text,
    reference,
    spread,
    table,
)
from benchmarks.quality_score import Tally, Truth, log_sum_exp, summarise

from headrace.core.errors import EngineError, InvalidParameter

VOCABULARY = 97


def logits_of(*distributions: list[float]) -> np.ndarray:
    return np.log(np.array(distributions, np.float32)) + np.float32(3.5)


def kl(p: np.ndarray, q: np.ndarray) -> list[float]:
    truth = Truth(p)
    return [truth.kl(at, row, log_sum_exp(row)) for at, row in enumerate(q.astype(np.float64))]


def test_kl_is_the_sum_of_p_log_p_over_q() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl(logits_of(p, q), logits_of(q, q)) == pytest.approx([expected, 0.0], abs=1e-7)


def test_kl_has_the_order_of_its_arguments() -> None:
    p, q = logits_of([0.9, 0.05, 0.05]), logits_of([0.4, 0.3, 0.3])
    expected = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.05 / 0.3)
    assert kl(p, q) == pytest.approx([expected], abs=1e-6)
    assert kl(q, p) != pytest.approx([expected], abs=1e-2)


def test_kl_of_small_differences_is_half_their_variance() -> None:
    """1e-5 in a logit is 1e-10 in KL, and still right: nothing is lost in float32 sums or in large offsets."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal((3, 49152)).astype(np.float32)
    delta = (rng.standard_normal(p.shape) * 1e-3).astype(np.float32)
    weights = np.exp(p.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    moved = (p + delta).astype(np.float64) - p
    mean = (weights * moved).sum(axis=1, keepdims=True)
    variance = (weights * (moved - mean) ** 2).sum(axis=1)
    assert kl(p, p + delta) == pytest.approx(list(variance / 2), rel=2e-3)
    assert kl(p, p + np.float32(64)) == pytest.approx([0.0] * 3, abs=1e-9)


def test_kl_is_never_negative_and_bears_what_is_improbable() -> None:
    p = np.array([[0.0, -1e4, 50.0]], np.float32)
    assert kl(p, p) == [0.0]
    assert kl(p, np.array([[0.0, 50.0, -1e4]], np.float32)) == pytest.approx([10050.0], rel=1e-6)


def test_a_tally_gives_agreement_perplexity_and_spread() -> None:
    p = logits_of([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1])
    q = logits_of([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1])
    tally = Tally()
    for at in (0, 2):
        tally.add(q[at : at + 2], [0, 0] if at == 0 else [2, 1], {"p": Truth(p[at : at + 2])})
    found = tally.summary("p", windows=2)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    assert found.positions == 4
    assert found.mean_kl == pytest.approx(expected / 4, abs=1e-7)
    assert found.max_kl == pytest.approx(expected, abs=1e-7)
    # The windows' means are expected / 2 and 0.
    assert found.standard_error == pytest.approx(expected / 4, abs=1e-7)
    assert found.top1_agreement == 0.75
    assert tally.perplexity == pytest.approx((0.5 * 0.5 * 0.6 * 0.8) ** -0.25, rel=1e-6)


def test_median_and_99th_percentile() -> None:
    found = summarise(np.arange(101, dtype=np.float64), np.ones(101, np.bool_), windows=1)
    assert (found.median_kl, found.p99_kl, found.max_kl, found.standard_error) == (50.0, 99.0, 100.0, None)


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    token_ids = list(range(10 * WINDOW + 7))
    windows = spread(token_ids, 2 * COUNTED + 1)
    assert [window[0] for window in windows] == [0, 1709, 3418]
    assert all(window == list(range(window[0], window[0] + WINDOW)) for window in windows)
    assert len(spread(token_ids, 10 * COUNTED)) == 10


@pytest.mark.parametrize("tokens", [0, -5, 10 * COUNTED + 1])
def test_too_many_or_no_tokens_are_refused(tokens: int) -> None:
    with pytest.raises(InvalidParameter, match=f"allowed: 1 to {10 * COUNTED}"):
        spread(list(range(10 * WINDOW)), tokens)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00336123, "0.00336"), (0.0000316, "0.0000316"), (1.5, "1.5"), (12.3456, "12.3")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_rows_of_other_files_and_of_llama_cpp() -> None:
    model, other = Path("a.gguf"), Path("b.gguf")
    without, rows = formats(model, [other], False), formats(model, [other], True)
    assert {row.engine for row in without} == {"headrace"}
    assert reference(model) not in rows
    assert [(row.engine, row.file) for row in rows[len(without) :]] == [("llama.cpp", model), ("llama.cpp", other)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("headrace.backends.native._kernels")
    from headrace.testing.checkpoints import tiny_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_checkpoint(folder, vocab_size=VOCABULARY, max_position_embeddings=WINDOW, **sizes)


def test_moved_channels_are_the_same_model(tiny: Path) -> None:
    """And rounding them to 4 bits is another one, so that the first would be seen if it were not."""
    rng = np.random.default_rng(0)
    windows = [list(map(int, rng.integers(0, VOCABULARY, WINDOW))) for _ in range(2)]
    rows = [Format("headrace", tiny, weights, shifted=True) for weights in ("none", "int4")]
    sources = [NativeSource(row, 1) for row in (reference(tiny), *rows)]
    truth, tallies = measure(windows, [(tiny, sources[0])], list(zip(rows, sources[1:], strict=True)))
    for source in sources:
        source.close()
    same, rounded = (tally.summary(str(tiny), 2) for tally in tallies)
    assert same.positions == 2 * COUNTED
    assert same.max_kl < 1e-6
    assert same.top1_agreement == 1
    assert rounded.mean_kl > 1e-3
    assert tallies[0].perplexity == pytest.approx(truth[tiny].perplexity, rel=1e-5)


FAKE_LLAMA = """
import array, json, sys
print(json.dumps({"version": "1", "vocabulary": 3, "kv": "float16"}), flush=True)
for line in sys.stdin:
    tokens = json.loads(line)
    rows = [float(token + column) for token in tokens[int(sys.argv[-1]):] for column in range(3)]
    sys.stdout.buffer.write(array.array("f", rows).tobytes())
    sys.stdout.buffer.flush()
"""


def test_logits_of_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_LLAMA, encoding="utf-8")
    monkeypatch.setattr("benchmarks.quality.SCRIPT", script)
    source = LlamaSource(Path(sys.executable), Format("llama.cpp", tmp_path, "stored", kv=""), 1)
    window = list(range(WINDOW))
    for _ in range(2):
        chunks = list(source.chunks(window))
        assert [len(chunk) for chunk in chunks] == [CHUNK] * (COUNTED // CHUNK) + [COUNTED % CHUNK]
        assert np.concatenate(chunks)[:, 1].tolist() == [token + 1 for token in window[CONTEXT_ONLY - 1 : -1]]
    assert (source.kv, source.version) == ("float16", "1")
    source.close()


def test_an_interpreter_that_ends_midway_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_LLAMA.replace("tokens = json.loads(line)", "sys.exit('no more')"), encoding="utf-8")
    monkeypatch.setattr("benchmarks.quality.SCRIPT", script)
    source = LlamaSource(Path(sys.executable), Format("llama.cpp", tmp_path, "stored", kv=""), 1)
    with pytest.raises(EngineError, match=r"llama\.cpp ended: 'no more'"):
        list(source.chunks(list(range(WINDOW))))
    source.close()


def test_an_interpreter_that_fails_is_told(tmp_path: Path) -> None:
    row = Format("llama.cpp", tmp_path / "absent.gguf", "stored", kv="")
    with pytest.raises(EngineError, match=r"llama\.cpp ended: .*"):
        LlamaSource(Path(sys.executable), row, 1)


def test_the_table_is_markdown() -> None:
    summary = {"mean_kl": 0.00336, "standard_error": 0.0001, "median_kl": 0.002, "p99_kl": 0.01, "top1_agreement": 0.97}
    row = {"engine": "headrace", "weights": "q4_1", "kv": "int8", "own": summary, "model": summary}
    text = table([{**row, "perplexity": 17.0, "fp32_perplexity": 16.9}])
    line = "| headrace | q4_1 | int8 | 0.00336 ± 0.0001 | 0.002 | 0.01 | 97.00 % | 17.000 (16.900) | 0.00336 |"
    assert text.split("\n")[2] == line
    assert len({row.count("|") for row in text.split("\n")}) == 1
