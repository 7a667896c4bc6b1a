"""Other packages' kernels behind our contract: one file for each, and its rules beside it.

A rules file refuses and imports nothing of the package; `machine.packages` says what is installed. `calls` has what
all of them share: checks before the call, routes sorted by expert, activations between the products, gradients.
`operands` quantises activations and finds weights that a package cannot read; `tiles` is the scale layout of
Blackwell's tensor cores. Activations are always quantised here, by `microscale.quantize`, so that they are what `act`
says to the bit.
"""
