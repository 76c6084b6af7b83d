"""Attention tests run with poisoned memory: what an operator forgets to write is NaN."""

import pytest
import torch

# At the first use of a device context torch notes which functions make tensors, and keeps the list: it must not be
# drawn up while they are replaced.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, where the dtype has one."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
