"""The whole-model goldens again, with classes of keys computed by the Triton kernels in the interpreter."""

import pytest
import torch

from saccade.attention import use_backend
from tests.golden.case import golden_dir, load_cases
from tests.golden.runners import discover


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the goldens are float32 on the CPU, and Triton compiles there")
@pytest.mark.parametrize("word", ["vlm.model_llava_tiny", "vlm.model_qwen2vl_tiny"])
def test_models_through_the_kernels(word):
    (case,) = [case for case in load_cases(golden_dir()) if case.row["runner"] == word]
    with use_backend("triton"):
        discover()[word](case)
