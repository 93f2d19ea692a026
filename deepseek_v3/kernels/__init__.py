"""Triton ops for this architecture, one room per op, and the rule that chooses between them and plain torch.

A room `<op>/` holds three files: `reference.py`, the specification in plain torch; `triton_impl.py`, the kernels and
their launchers; `__init__.py`, the public function, its `torch.library.custom_op` with fake and autograd, and the
dispatch. Ops take tensors and numbers, never a config or a model. `docs/kernels.md` lists them.
"""
