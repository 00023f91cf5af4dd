"""Parts of the GPU backend that need no kernel: what a step sends, which graph runs it, which form weights take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.sampling import RowSampling
from headrace.backends.torch.gpu.flight import draws_on_device
from headrace.backends.torch.gpu.graphs import buckets
from headrace.backends.torch.gpu.staging import ALIGNMENT, NUMPY_KINDS, TORCH_KINDS, Layout, Staging, StepArrays
from headrace.backends.torch.gpu.weights import Forms
from headrace.backends.torch.kernels.matmul import Card
from headrace.core.errors import ConfigError
from headrace.core.types import RowStep, SamplingParams
from headrace.weights.qtensor import SCHEMES, QTensor

SIZES = st.integers(0, 40)


@given(st.builds(Layout, SIZES, SIZES, SIZES, SIZES, SIZES))
def test_arrays_of_a_step_lie_apart_and_aligned(layout: Layout) -> None:
    """What is written to each on the host is read from it on the device, and from no other."""
    staging = Staging(layout, 2, torch.device("cpu"))
    names = StepArrays.__slots__
    numbers = {name: number for number, name in enumerate(names, 1)}

    def write(arrays: StepArrays) -> None:
        for name in names:
            getattr(arrays, name)[:] = numbers[name]

    staging.send(layout, write)
    found = staging.on_device(layout)
    for name, shape in zip(names, layout.shapes, strict=True):
        array = getattr(found, name)
        assert array.shape == shape and (array == numbers[name]).all()
        assert array.numel() == 0 or (array.data_ptr() - found.draw_floats.data_ptr()) % ALIGNMENT == 0


def test_numpy_and_torch_see_the_same_arrays() -> None:
    layout = Layout(5, 3, 4, 3, 2)
    buffer = np.arange(layout.stops[-1], dtype=np.uint8)
    host = StepArrays.at(buffer, layout, NUMPY_KINDS)
    device = StepArrays.at(torch.from_numpy(buffer), layout, TORCH_KINDS)
    for name in StepArrays.__slots__:
        assert np.array_equal(getattr(host, name), getattr(device, name).numpy(), equal_nan=True)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 9, 32, 33, 256, 1000])
def test_buckets_waste_at_most_half_of_the_rows(max_rows: int) -> None:
    sizes = buckets(max_rows)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        fits = min(size for size in sizes if size >= rows)
        assert fits < 2 * rows, "a bucket is less than twice what it holds"


def test_what_was_measured_is_told() -> None:
    """Products that are plain take the kernel that was quickest for their shape and number of rows."""
    weight = QTensor.from_array(np.zeros((16, 64), np.float32))
    forms = Forms("none", torch.float32, torch.device("cpu"), False, Card())
    made = [forms.of_layers([weight, weight]), forms.plain([weight])]
    assert forms.explain() == "2 × plain"
    seconds = iter(np.tile([3.0, 1.0, 2.0], 1000))  # the library, then tiles, then gemv where there is one
    forms.choose(torch.float32, lambda run: float(next(seconds)))
    assert {one.shape for one in made} == {(32, 64), (16, 64)}
    assert "as measured for 16 sizes: " in forms.explain() and "by tiles" in forms.explain()
    assert made[0].choices is made[1].choices


def test_a_quant_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="quant: got 'int3', allowed on a GPU: none, stored, int8, int4, fp8"):
        Forms("int3", torch.float32, torch.device("cpu"), False, Card())


@pytest.mark.parametrize(
    ("schemes", "form"),
    [
        (["q4_0", "q4_0"], "int4"),
        (["q4_K", "q4_K"], "int4"),
        (["q8_0"], "plain"),
        (["q4_K", "q6_K"], "plain"),
        (["f32"], "plain"),
    ],
)
def test_stored_weights_keep_their_codes_where_a_form_holds_them(schemes: list[str], form: str) -> None:
    rng = np.random.default_rng(3)
    tensors = []
    for scheme in schemes:
        size = 4 * 256 // SCHEMES[scheme].group * SCHEMES[scheme].group_bytes
        raw = rng.integers(0, 60, size, np.uint8)  # small exponents: every number is finite
        tensors.append(QTensor.from_bytes(scheme, (4, 256), raw))
    forms = Forms("stored", torch.float32, torch.device("cpu"), False, Card())
    made = forms.of_layers(tensors)
    wanted = np.concatenate([tensor.dequantise() for tensor in tensors])
    assert forms.explain() == f"1 × {form}"
    assert np.allclose(made.dequantise().numpy(), wanted, rtol=1e-6, atol=1e-30)


def test_what_the_device_samples() -> None:
    """What its sampler does not know goes to the host; log-probabilities are worked out there beside its token."""

    def drawn(sampling: SamplingParams, **step: object) -> bool:
        row = RowSampling(sampling, 4, frozenset({2}), 97)
        return draws_on_device(row, RowStep(0, 0, 4, sample=True, **step))

    here = (
        SamplingParams(), SamplingParams(logprobs=2),
        SamplingParams(temperature=0.7, seed=1, top_k=5, top_p=0.5, min_p=0.1),
    )  # fmt: skip
    assert all(drawn(one) for one in here)
    others = (
        SamplingParams(typical_p=0.5), SamplingParams(repetition_penalty=1.1), SamplingParams(presence_penalty=1.0),
        SamplingParams(frequency_penalty=1.0), SamplingParams(logit_bias=((1, 2.0),)), SamplingParams(min_tokens=1),
        SamplingParams(allowed_token_ids=(1,)), SamplingParams(bad_words_ids=((1,),)),
        SamplingParams(bad_words_ids=((1, 3),)), SamplingParams(temperature=1.0),
    )  # fmt: skip
    assert not any(drawn(one) for one in others)
    assert not drawn(SamplingParams(), drafts=(5,)) and not drawn(SamplingParams(), mask=b"")
