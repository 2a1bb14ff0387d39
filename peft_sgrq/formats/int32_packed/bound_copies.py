"""GPTQModel 7.7 binds a compiled method to each GPTQ layer, and copies of a layer go on computing with the original.

`TorchLinear.optimize` puts `torch.compile(self.dequantize_weight)` on the instance. `copy.deepcopy` keeps the function
as it is, bound to the layer it was made of: scales written into the copy change nothing, and a merge into a copied
model would silently give its base.

A copy that scales are written into loses that function; it then computes with the method of its class.
`tests/base/test_upstream_gptqmodel.py::test_gptqmodel_still_binds_copies_to_the_original` fails once this is not
needed any more.
"""

from __future__ import annotations

import inspect

from torch import nn

_METHOD = "dequantize_weight"


def release_copy(layer: nn.Module) -> None:
    """Takes the method off a layer that is bound to another one."""
    method = vars(layer).get(_METHOD)
    owner = getattr(inspect.unwrap(method), "__self__", layer) if callable(method) else layer
    if owner is not layer:
        delattr(layer, _METHOD)
