"""One step: statistics, inverses and directions of all layers, each when it is due.

`preconditioner` composes. `checks` refuses what cannot work before anything is computed; `assigned` knows which method
has which layer; `due` is what a step does, by the clocks of `schedule` or by a traced caller's own flags; `groups` are
the layers that are treated in one call, and `road` what every group goes through. `given` reads what a caller hands
over, `weighting` serves methods that share coefficients, `placement` and `comm` spread the work over ranks, `info`
tells what was done. `footprint` tells bytes before a run, by `trial`: what each clock of a method replaces.
"""
