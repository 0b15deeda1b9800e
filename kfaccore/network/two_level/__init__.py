"""TwoLevel: a coarse space over all layers corrects what a block-diagonal method cannot see.

`coarse` chooses the vectors, `level` holds one step's coarse level and products with the network's J, `matrices` its
coarse matrix, `corrections` how it joins the layers' directions; `pooling`, `turned` and `vectors` serve them.
"""
