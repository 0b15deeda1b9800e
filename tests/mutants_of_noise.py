"""One-line mutants of the step that knows the noise of its batch."""

OF_NOISE = [  # name, file, line as it is, line mutated, tests that must notice
    ("weight of own shares", "step/own.py", "weight * unit * numbers(s)", "unit * numbers(s)", "test_noise.py"),
    (
        "weight of the slope's",
        "step/own.py",
        "weight * unit * unit * number(own)",
        "unit * unit * number(own)",
        "test_noise.py",
    ),
    (
        "B over B - 1",
        "step/own.py",
        "pick(alone, examples / pick(alone, examples - 1.0, 1.0), 1.0)",
        "1.0",
        "test_noise.py",
    ),
    (
        "B over B - 1 in later steps",
        "step/leaving.py",
        "weight > _ALL, examples",
        "weight > 0, examples",
        "test_noise.py",
    ),
    ("slope without n", "step/model.py", "q[0] / (n[0] * n[0])", "q[0] / n[0]", "test_noise.py"),
    ("negative slopes kept", "step/model.py", "pick(kept > least, kept, least)", "kept + 1e-9", "test_noise.py"),
    (
        "a mean not divided",
        "step/motion.py",
        "total * scalar(1 / pick(good, weight[name], 1.0), v)",
        "total",
        "test_noise.py",
    ),
    (
        "the same batch seen twice",
        "step/leaving.py",
        "again(known.loss, motion.last) | skipped",
        "skipped",
        "test_noise.py",
    ),
    (
        "values of other positions",
        "linalg/shares.py",
        "g / _taken(self.values, own.a.index)",
        "g",
        "test_own_shares.py",
    ),
    (
        "own n ignored",
        "step/own.py",
        "unit = number(drawn[name].n) / number(mine.n)",
        "unit = 1.0",
        "test_own_shares.py",
    ),
    (
        "draws by rows, own by examples",
        "linalg/shares.py",
        "return _times(_times(h, self.A).mT, self.G).mT",
        "return _times(h, self.A)",
        "test_own_shares.py",
    ),
    ("a bad batch moves damping", "step/self_tuning.py", "grown = pick(told, ", "grown = pick(True, ", "test_noise.py"),
]
