"""Mutants that the laws of rows, records, capabilities, layers and the catalogue must kill; see mutants.py."""

from __future__ import annotations

_MASK = "test_laws_records.py::test_a_mask_is_the_record_without_its_rows"
_RAGGED = "test_laws_records.py::test_a_ragged_mask_is_the_parts_of_equal_lengths"
_IDS = "test_laws_records.py::test_ids_are_one_hot_rows"
_PATCHES = "test_laws_records.py::test_patches_are_their_unfolded_rows"
_DRAWS = "test_laws_records.py::test_zero_draws_mean_that_G_is_the_identity"
_DAMPINGS = "test_laws_records.py::test_blocks_of_different_dampings_are_blocks_apart"
_APART = "test_laws_records.py::test_blocks_do_not_see_each_other"
_UNMEASURED = "test_laws_records.py::test_unmeasured_methods_say_so"
_STATED = "test_laws.py::test_direction_is_the_stated_formula"
_MATVEC = "test_laws.py::test_matvec_is_the_undamped_matrix"
_DEBIASED = "test_laws.py::test_averages_are_debiased"
_FORWARD = "test_layers.py::test_matrix_times_activations_is_the_forward"
_DECLARED = "test_laws_capabilities.py::test_what_a_method_declares_it_does"
_SIGNATURES = "test_laws_capabilities.py::test_declared_signatures_are_the_protocols"
_UNDECLARED = "test_laws_capabilities.py::test_undeclared_a_solve_does_not_see_the_record"

_STACKED = "test_laws_stacks.py::test_stacked_is_looped"
_UNEQUAL = "test_laws_stacks.py::test_layers_may_bring_unequal_batches"

OF_LAWS = [  # name, file, line as it is, line mutated, tests that must notice
    (
        "a stack's first damping for all",
        "precondition/side_by_side.py",
        "if len({_number(x) for x in dampings}) == 1:",
        "if True:",
        _STACKED,
    ),
    (
        "a layer of a stack given another's blocks",
        "precondition/stacks.py",
        "_cut(fresh, at[name], len(names)) if name in at",
        "_cut(fresh, 0, len(names)) if name in at",
        _STACKED,
    ),
    (
        "the first layer's rows counted for all of a stack",
        "precondition/stacks.py",
        "return leaves[0] if alike else _numbers_of(leaves, likes)",
        "return leaves[0]",
        _UNEQUAL,
    ),
    ("padding counted by expand", "record/sharing.py", "xp.reshape(record.mask, (rows, 1))", "None", _MASK),
    (
        "mean over padding as well",
        "record/sharing.py",
        "xp.where(count > 0, count, xp.ones_like(count))[:, None, None]",
        "record.shared",
        _RAGGED,
    ),
    (
        "equal ids not paired",
        "record/squares.py",
        "xp.sum(some * xp.matmul(same, some), axis=0)",
        "xp.sum(some * some, axis=0)",
        _IDS,
    ),
    (
        "sum of patches for their mean",
        "convolution/patches.py",
        "[xp.mean(part, axis=axes)",
        "[xp.sum(part, axis=axes)",
        _PATCHES,
    ),
    (
        "G of zero draws not over n",
        "linalg/grams.py",
        "side.identity(like) * scalar(record.n, like)",
        "side.identity(like)",
        _DRAWS,
    ),
    ("zero draws not refused", "methods/rows/fngd.py", "if record.draws == 0:", "if record.draws < 0:", _DRAWS),
    ("first block's damping for all", "damping.py", "return value[:, None, None]", "return value[0]", _DAMPINGS),
    (
        "blocks share a trace",
        "methods/kronecker/tkfac.py",
        "return namespace(Phi).sum(Phi, axis=-1)",
        "return namespace(Phi).sum(Phi, axis=-1) * 0 + namespace(Phi).mean(namespace(Phi).sum(Phi, axis=-1))",
        _APART,
    ),
    (
        "a method without records that does not say so",
        "methods/plain/identity.py",
        "unmeasured: ClassVar[bool] = True",
        "unmeasured: ClassVar[bool] = False",
        _UNMEASURED,
    ),
    (
        "partial trace with the mean norm of a",
        "methods/kronecker/traces.py",
        "norm = xp.sqrt(xp.vecdot(a, a))[..., None]",
        "norm = xp.sqrt(xp.mean(xp.vecdot(a, a), axis=(1, 2), keepdims=True))[..., None]",
        _STATED,
    ),
    ("damped product", "methods/plain/diagonal.py", "state.weight) * v", "state.weight) * v + v", _MATVEC),
    (
        "weight of an average",
        "factors.py",
        "where(ok, decay * weight + (1 - decay), weight)",
        "where(ok, 1.0, weight)",
        _DEBIASED,
    ),
    (
        "kernel turned round",
        "convolution/window.py",
        "for offset in product(*map(range, w.kernel)):",
        "for offset in product(*(range(k)[::-1] for k in w.kernel)):",
        _FORWARD,
    ),
    (
        "wrapped the other way",
        "layers/conv.py",
        "index = [i % size for i in index]",
        "index = [-i % size for i in index]",
        _FORWARD,
    ),
    (
        "gain without its input",
        "layers/scale.py",
        "self.gradients(gy * xhat, draws)",
        "self.gradients(gy, draws)",
        _FORWARD,
    ),
    (
        "terms not balanced",
        "methods/kronecker/tkfac.py",
        "return factors.mean(Phi, root), factors.mean(Psi, root)",
        "return Phi, Psi",
        _DECLARED,
    ),
    (
        "inverses of another damping",
        "methods/lowrank/modes.py",
        "A, G, _ = self._damped(state, self.sides(state), hyper)\n        return A, G",
        "A, G, _ = self._damped(state, self.sides(state), Hyper(0, 0.0, 2 * hyper.damping))\n        return A, G",
        _DECLARED,
    ),
    (
        "eigenvalues without damping",
        "methods/kronecker/product.py",
        "self.split.denominators(parts.a, parts.g, hyper.damping)",
        "self.split.denominators(parts.a, parts.g, 0.0)",
        _DECLARED,
    ),
    (
        "inverse for the matrix",
        "methods/plain/exact.py",
        '"""F itself, (blocks, D, D)."""\n        return factors.mean(state.F, state.weight)',
        '"""F itself, (blocks, D, D)."""\n        return state.inverse',
        _DECLARED,
    ),
    (
        "unit of one",
        "methods/kronecker/tkfac.py",
        "return self._damping(state, state.trace, 1.0)",
        "return 1.0",
        _DECLARED,
    ),
    (
        "first term for each",
        "methods/terms/pinn_kfac.py",
        "for term in records))",
        "for term in records[:1] * self.terms))",
        _DECLARED,
    ),
    (
        "coefficients in the steps that compute",
        "methods/rows/fngd.py",
        "xp.where(xp.asarray(rests, device=device_of(beta)), beta, xp.ones_like(beta))",
        "beta",
        _DECLARED,
    ),
    (
        "a capability of another signature",
        "methods/lowrank/modes.py",
        "def inverses(self, state: S, hyper: Hyper)",
        "def inverses(self, state: S, hyper: Hyper, block: Any = None)",
        _SIGNATURES,
    ),
    (
        "rows used and not declared",
        "methods/rows/fngd.py",
        "rows_at_solve: ClassVar[bool] = True",
        "rows_at_solve: ClassVar[bool] = False",
        _UNDECLARED,
    ),
    (
        "a method without a row",
        "methods/__init__.py",
        '"fngd": FNGD,\n}',
        '"fngd": FNGD,\n    "eva": type("Eva", (FNGD,), {}),\n}',
        "test_catalogue_rows.py::test_every_method_has_a_row",
    ),
    (
        "a page without its formula",
        "methods/plain/exact.py",
        '"""Exact block: x =',
        '"""The exact block, x =',
        "test_catalogue_rows.py::test_every_method_starts_with_its_formula",
    ),
    (
        "a family's page without one of its methods",
        "methods/lowrank/__init__.py",
        "    BrandCKFAC      as Brand;",
        "    B-KFAC-C        as Brand;",
        "test_catalogue_rows.py::test_every_family_has_its_page",
    ),
    (
        "an export forgotten",
        "methods/__init__.py",
        '"IKFAC",\n    "KFAC",',
        '"KFAC",',
        "test_catalogue_rows.py::test_every_method_is_exported",
    ),
]
