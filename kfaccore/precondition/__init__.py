"""One step: statistics, inverses and directions of all layers, each when its clock strikes.

`preconditioner` composes, `layerwise` is the road of every layer, `given` reads what a caller hands over, `weighting`
serves methods that share coefficients, `placement` and `comm` spread the work over ranks, `schedule` has the clocks and
the numbers of a step, and `info` says what it did.
"""
