"""GPTQModel 7.7 loads no model on two cores: its pool of threads wants more workers than it gives itself there.

"Virtual pool ... requests 2 workers" goes away with `GPTQMODEL_CPU_WORKERS=2` in the environment when it is imported.
`tests/base/test_upstream_gptqmodel.py::test_gptqmodel_still_loads_nothing_on_two_cores` fails once this is not needed
any more.
"""

from __future__ import annotations

import os

_VARIABLE = "GPTQMODEL_CPU_WORKERS"


def give_gptqmodel_workers() -> None:
    """Sets the number of workers on machines of two cores or one, unless the user has."""
    if (os.cpu_count() or 1) <= 2:
        os.environ.setdefault(_VARIABLE, "2")
