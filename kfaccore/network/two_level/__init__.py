"""TwoLevel: a coarse space over all layers corrects what a block-diagonal method cannot see.

`coarse` chooses the vectors, given what `local` has of a layer; `level` holds one step's coarse level, `products` those
with the network's J, `matrices` its coarse matrix, `corrections` how it joins the layers' directions. `vectors`,
`gradients`, `pooling` and `turned` serve them.
"""
