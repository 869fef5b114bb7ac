"""Learning rates against the golden schedules."""

import pytest

from formula import golden
from training.optimizer import cosine_lr, step_lr, warmup_lr


@pytest.mark.parametrize(("name", "function"), [("cosine", cosine_lr), ("warmup", warmup_lr), ("step", step_lr)])
def test_schedules(name, function):
    for *args, lr in golden()["schedules"][name]:
        assert function(*args) == pytest.approx(lr, rel=1e-12)
