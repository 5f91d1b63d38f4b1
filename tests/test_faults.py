"""The faults of tests/faults.py, each as often as a quick test run allows."""

import faults
import pytest

BRIEF = [fault for fault, (count, _) in faults.FAULTS.items() if count]


@pytest.mark.parametrize("fault", BRIEF, ids=lambda fault: fault.__name__)
def test_fault(fault):
    """Nothing torn, nothing lost: what the fault's own checks hold, at a small count."""
    assert fault(faults.FAULTS[fault][0])
