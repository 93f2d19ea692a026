"""Triton implementation of the routed experts: the sort, forward and backward."""

from .triton_backward import _grad_activation_kernel as _grad_activation_kernel
from .triton_backward import _grad_parameter_kernel as _grad_parameter_kernel
from .triton_backward import experts_backward as experts_backward
from .triton_forward import _combine_kernel as _combine_kernel
from .triton_forward import _gate_up_kernel as _gate_up_kernel
from .triton_forward import _grouped_product_kernel as _grouped_product_kernel
from .triton_forward import combine as combine
from .triton_forward import experts_forward as experts_forward
from .triton_forward import gate_up_rows as gate_up_rows
from .triton_forward import grouped_product as grouped_product
from .triton_forward import grouped_rows_product as grouped_rows_product
from .triton_permutation import Tiles as Tiles
from .triton_permutation import _count_kernel as _count_kernel
from .triton_permutation import _place_kernel as _place_kernel
from .triton_permutation import _sum_kernel as _sum_kernel
from .triton_permutation import _tile_kernel as _tile_kernel
from .triton_permutation import expert_permutation as expert_permutation
from .triton_permutation import expert_tiles as expert_tiles
